"""GainLoRA's rule: a branch for every domain, whose gate stays shut on the inputs of the domains before it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gaintune.config import MethodConfig
from gaintune.errors import ConfigError
from gaintune.methods.rules import StageData, StagePosition, TrainingRule, process_share
from gaintune.models import autocast

if TYPE_CHECKING:
    from gaintune.tuners.gainlora import GainloraLinear

BASES = "gainlora.safetensors"  # beside an adapter: the directions of its domains' inputs, for each module


class BranchGrowth(TrainingRule):
    """Rule that begins a branch for every domain after the first, and keeps its gate shut on earlier inputs.

    After a domain, the directions that hold most of the energy of its inputs are added to those of the domains before
    (`GainloraConfig.shut` says how much). The next domain's gates begin orthogonal to them, and are projected again
    after every update: AdamW rescales gradients, so projecting the gradients would not be enough.

    Args:
        config: the method.
        position: where this adaptation stands.

    Raises:
        ConfigError: a penalty beside it, or an adapter to continue that lacks its directions.
    """

    def __init__(self, config: MethodConfig, position: StagePosition) -> None:
        if config.penalty is not None:
            raise ConfigError(
                "gainlora freezes the branches of earlier domains, so a penalty has nothing to pull back: leave "
                f"penalty={config.penalty} out"
            )
        self._file = None if position.previous is None else position.previous / BASES
        if self._file is not None and not self._file.is_file():
            raise ConfigError(f"{self._file.parent} has no {BASES}, without which its next branch cannot be begun")
        self._bases: dict[str, torch.Tensor] = {}
        self._layers: dict[str, GainloraLinear] = {}
        self._adapter = ""
        self._shut = 0.0

    def start(self, model: nn.Module, steps: int) -> None:
        """Begin a branch, unless this is the first domain."""
        from gaintune.tuners.gainlora import add_branch, gainlora_layers

        tuned: Any = model
        self._adapter, self._shut = tuned.active_adapter, tuned.peft_config[tuned.active_adapter].shut
        self._layers = dict(gainlora_layers(model, self._adapter))
        if self._file is None:
            return
        devices = {name: layer.gainlora_gate[self._adapter].device for name, layer in self._layers.items()}
        saved = {name: basis.double() for name, basis in load_file(self._file).items()}
        self._bases = {name: basis.to(devices.get(name, "cpu")) for name, basis in saved.items()}
        add_branch(tuned, self._adapter, self._bases, seed=torch.initial_seed())

    @torch.no_grad()
    def after_update(self, model: nn.Module, step: int) -> None:
        """Take out of every new gate what would open it on earlier inputs."""
        from gaintune.tuners.gainlora import outside

        for name, basis in self._bases.items():
            gate = self._layers[name].gainlora_gate[self._adapter]
            gate.copy_(outside(gate, basis))

    @torch.no_grad()
    def finish(self, model: nn.Module, stage_data: StageData) -> None:
        """Add the directions of the domain just trained."""
        from gaintune.tuners.gainlora import widened_basis

        grams = input_grams(self._layers, model, stage_data)
        for name, gram in grams.items():
            basis = self._bases.get(name)
            if basis is None:
                basis = gram.new_zeros(len(gram), 0)
            self._bases[name] = widened_basis(basis, gram, self._shut)

    def keep(self, folder: Path) -> None:
        """Write the directions of all domains so far."""
        save_file({name: basis.float().cpu().contiguous() for name, basis in self._bases.items()}, folder / BASES)


@torch.no_grad()
def input_grams(layers: dict[str, GainloraLinear], model: nn.Module, stage_data: StageData) -> dict[str, torch.Tensor]:
    """Return `X^T X` `(in, in)`, float64, of what the gates of each layer read from a domain's rows, without padding.

    Rows go through one at a time, without dropout; of several processes each takes its share.
    """
    from gaintune.tuners.gainlora import normalized

    device = next(model.parameters()).device
    grams: dict[str, torch.Tensor] = {}
    kept: list[torch.Tensor | None] = [None]  # which tokens of the row count

    def watch(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows, mask = normalized(args[0].detach()).reshape(-1, args[0].shape[-1]), kept[0]
            rows = rows[mask] if mask is not None and len(mask) == len(rows) else rows
            wide = rows.double()
            grams[name] = grams.get(name, 0) + wide.T @ wide

        return add

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    training, (first, step), rows = model.training, process_share(), stage_data.rows
    model.eval()
    try:
        with stage_data.progress.task(stage_data.title, rows.tokens, "tokens") as advance:
            for row in range(first, len(rows), step):
                batch = stage_data.batch(row, device)
                mask = batch.get("attention_mask")
                kept[0] = mask.reshape(-1).bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
                with autocast(device, stage_data.mixed_precision):
                    stage_data.objective.sum(model, batch)
                advance(rows.tokens / len(rows) * step)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    for gram in grams.values() if step > 1 else ():
        torch.distributed.all_reduce(gram)
    return grams
