"""Where adapted layers sit in a model, read from their names."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Literal

from torch import nn

PREFIX = "base_model.model."  # of a module's name in a PeftModel
DEPTHS = ("early", "middle", "late")
Block = Literal["attention", "mlp"]


@dataclass(frozen=True)
class ModulePosition:
    """Position of an adapted module in its model."""

    name: str  # of the module, such as `model.layers.3.self_attn.q_proj`
    layer: int | None  # index of its transformer layer, None outside of them (such as a vocabulary projection)
    depth: str  # `early`, `middle` or `late` third of the transformer layers; `outside` where `layer` is None
    projection: str  # last part of its name, such as `q_proj`
    block: Block  # `attention` where some part of the name inside the layer says so, else `mlp`


def positions_of(model: nn.Module | None, names: Iterable[str]) -> dict[str, ModulePosition]:
    """Read the positions of modules from their names: the first number in a name counts transformer layers.

    A projection is named by the last part of its name, or, where several in a layer share that (BERT's `dense`), by its
    whole name inside the layer. Without a model, the names tell how many transformer layers there are.
    """
    split: dict[str, tuple[str, int | None, tuple[str, ...]]] = {}
    for name in names:
        parts = tuple(name.split("."))
        at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            split[name] = (name, None, parts[-1:])
        else:
            split[name] = (".".join(parts[:at]), int(parts[at]), parts[at + 1 :])
    whole = {inside for _, layer, inside in split.values() if layer is not None}
    named = 1 + max((layer for _, layer, _ in split.values() if layer is not None), default=-1)
    shared = {inside[-1] for inside in whole if sum(other[-1] == inside[-1] for other in whole) > 1}
    positions = {}
    for name, (above, layer, inside) in split.items():
        projection = ".".join(inside) if inside[-1] in shared else inside[-1]
        attention = any("attn" in part.lower() or "attention" in part.lower() for part in inside)
        depth = "outside"
        if layer is not None:
            siblings = range(named) if model is None else model.get_submodule(above)
            depth = DEPTHS[3 * layer // len(siblings)] if isinstance(siblings, Sized) else "outside"
        positions[name] = ModulePosition(name, layer, depth, projection, "attention" if attention else "mlp")
    return positions
