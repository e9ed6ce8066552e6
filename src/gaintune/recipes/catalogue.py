"""The experiments that come with the package, by id."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from gaintune.errors import ConfigError
from gaintune.recipes.schema import Recipe, read_recipe


def recipes() -> dict[str, Recipe]:
    """All recipes by id, in the order G1 to G19, D1 to D5."""
    folder = files("gaintune.recipes") / "experiments"
    found = [read_recipe(Path(str(each))) for each in folder.iterdir() if each.name.endswith(".yaml")]
    return {each.id: each for each in sorted(found, key=lambda each: (each.id[0] != "G", int(each.id[1:])))}


def recipe_named(name: str) -> Recipe:
    """A recipe by its id, in capitals or not, or from a YAML file of one's own.

    Raises:
        ConfigError: there is none of that id, or the file cannot be read as a recipe.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        return read_recipe(Path(name))
    known = recipes()
    if name.upper() not in known:
        raise ConfigError(
            f"no recipe {name!r}; there are {', '.join(known)} (`gaintune recipe list`), or name a .yaml file"
        )
    return known[name.upper()]
