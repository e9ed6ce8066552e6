"""Recipes of a test's own, made of steps."""

from gaintune.recipes import Recipe


def recipe(*steps: tuple[str, str, dict], claims=(), scales=None) -> Recipe:
    """Make a recipe of steps, each given as its name, its kind and its settings."""
    named = [{"name": name, "do": kind, "settings": settings} for name, kind, settings in steps]
    values = {"id": "MINE", "title": "t", "source": "s", "asks": "a", "model": "m", "steps": named}
    return Recipe.model_validate({**values, "claims": claims, "scales": scales or {}})
