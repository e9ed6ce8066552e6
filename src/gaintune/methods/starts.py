"""Starts of LoRA that read training rows before the first update: EVA, CorDA and LoRA-GA, on PEFT's own functions.

CorDA and LoRA-GA start at factors that are not zero, and PEFT takes their product out of the base's weights. The
changed base fits no other adapter, and PEFT loads such an adapter onto the plain base without an error. Here the base
stays as it is. The adapter has twice the rank: its second half is the start with its sign turned, and never changes
(`FrozenStart`). For other programs it is a plain LoRA adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from gaintune.errors import ConfigError
from gaintune.methods.rules import Rows, TrainingRule
from gaintune.models import NextTokenLoss, without_adapter

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

START_ROWS = 256  # as many as CorDA's authors take
EVA_BATCH = 8  # rows, so that a batch of short ones has more tokens than an adapter has directions

Collate = Callable[[list[dict[str, torch.Tensor]]], Mapping[str, Any]]


@dataclass(frozen=True)
class StartRows:
    """The training rows that a start is computed from: at most `limit` of them, drawn by the seed."""

    rows: Rows
    collate: Collate | None
    seed: int
    limit: int | None

    def batches(self, size: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the rows in their order, `size` at a time; an incomplete batch only if there is no complete one."""
        generator = torch.Generator().manual_seed(self.seed)
        picked = sorted(torch.randperm(len(self.rows), generator=generator).tolist()[: self.limit or START_ROWS])
        for begin in range(0, max(len(picked) - size + 1, 1), size):
            rows = [self.rows[row] for row in picked[begin : begin + size]]
            batch = (
                self.collate(rows)
                if self.collate
                else {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            )
            yield {key: value.to(device) for key, value in batch.items()}


Start = Callable[[Any, Any, StartRows | None], Any]
"""Attaches PEFT's configuration to a base, with a start that is computed from rows, and returns the `PeftModel`.

Without rows the adapter has the same shapes, and a random start.
"""


def eva(model: Any, config: LoraConfig, data: StartRows | None) -> PeftModel:
    """Start A at the main directions of each module's inputs, with ranks by explained variance (arXiv 2410.07170)."""
    from peft import get_peft_model
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    if data is None:
        _call_plain(config)
        return get_peft_model(model, config)
    batches = list(data.batches(EVA_BATCH, model.device))
    for batch in batches:
        if batch["labels"].shape != batch["input_ids"].shape:
            del batch["labels"]  # a class for each row masks no tokens
    needed = round(config.r * (config.eva_config.rho if config.eva_config else 2.0))
    fewest = min(batch.get("attention_mask", batch["input_ids"]).numel() for batch in batches)
    if fewest < needed:
        raise ConfigError(
            f"EVA compares {needed} directions of rank {config.r}, and {EVA_BATCH} rows have {fewest} tokens"
        )
    adapted = get_peft_model(model, config)
    initialize_lora_eva_weights(
        adapted, batches, forward_fn=_read, gather_distributed_inputs=False, show_progress_bar=False
    )
    _call_plain(adapted.peft_config["default"])
    return adapted


def corda(model: Any, config: LoraConfig, data: StartRows | None) -> PeftModel:
    """Start at the parts of each weight that act most on its inputs, or least with `kpm` (arXiv 2406.05223)."""
    from peft.tuners.lora.corda import preprocess_corda

    def read() -> None:
        for batch in data.batches(1, model.device) if data else ():  # PEFT's sum of products wants one row
            _read(model, batch)

    prepare = None if data is None else lambda targeted: preprocess_corda(model, targeted, read)
    return _with_frozen_start(model, config, prepare)


def lora_ga(model: Any, config: LoraConfig, data: StartRows | None) -> PeftModel:
    """Start at the main directions of each weight's gradient (arXiv 2407.05000)."""
    from peft.tuners.lora.loraga import preprocess_loraga

    # without rows there may be no numbers either, and the loss compares logits
    loss = None if data is None or model.get_output_embeddings() is None else NextTokenLoss(model)

    def step() -> None:
        for batch in data.batches(1, model.device) if data else ():
            total = model(**batch).loss if loss is None else loss.sum(model, batch) / loss.scored(batch).clamp_min(1)
            total.backward()

    def prepare(targeted: LoraConfig) -> None:
        for name in cast(list[str], targeted.target_modules):
            side = min(model.get_submodule(name).weight.shape)
            if 2 * config.r > side:
                raise ConfigError(
                    f"LoRA-GA takes two main directions of a gradient for each rank, and {name} has {side}: choose a "
                    f"rank of at most {side // 2}, or other targets"
                )
        preprocess_loraga(model, targeted, step)

    return _with_frozen_start(model, config, None if data is None else prepare)


def _read(model: Any, batch: Mapping[str, torch.Tensor]) -> None:
    """Pass a batch through a model's layers, without the product with the vocabulary."""
    without_adapter(model).base_model(**{key: value for key, value in batch.items() if key != "labels"})


def _call_plain(config: Any) -> None:
    """Mark a configuration as plain LoRA, which an adapter is once its start is done."""
    config.init_lora_weights = True
    config.eva_config = config.corda_config = config.lora_ga_config = None


def _with_frozen_start(model: Any, config: LoraConfig, prepare: Callable[[LoraConfig], None] | None) -> PeftModel:
    """Attach LoRA of twice the rank: a start of PEFT's, and the same with its sign turned; random without `prepare`."""
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    from gaintune.tuners import matched_modules, with_named_targets

    targeted: Any = with_named_targets(config, model)
    doubled = deepcopy(targeted)
    growth = sqrt(2) if config.use_rslora else 2  # so that the scale of an update stays
    doubled.r, doubled.lora_alpha = 2 * config.r, growth * config.lora_alpha
    doubled.rank_pattern = {key: 2 * rank for key, rank in doubled.rank_pattern.items()}
    doubled.alpha_pattern = {key: growth * alpha for key, alpha in doubled.alpha_pattern.items()}
    _call_plain(doubled)
    if prepare is None:
        return get_peft_model(model, doubled)
    weights = {name: module.weight.data for name, module in _weighted(model)}
    heads = {*SEQ_CLS_HEAD_NAMES, *(config.modules_to_save or ())}  # trained whole, not adapted
    targeted.target_modules = [name for name in matched_modules(doubled, model) if not heads & {*name.split(".")}]
    prepare(targeted)
    started = get_peft_model(model, targeted)
    layers: dict[str, Any] = {name: layer for name, layer in started.named_modules() if isinstance(layer, LoraLayer)}
    factors = {name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for name, layer in layers.items()}
    started.unload()
    vars(model).pop("peft_config", None)
    for name, module in _weighted(model):
        module.weight.data = weights[name]  # PEFT puts other tensors in their place, and leaves these alone
    adapted = get_peft_model(model, doubled)
    with torch.no_grad():
        for name, (a, b) in factors.items():
            layer: Any = adapted.get_submodule(name)
            layer.lora_A["default"].weight.copy_(torch.cat([a, a]))
            layer.lora_B["default"].weight.copy_(torch.cat([b, -b], dim=1))
    return adapted


def _weighted(model: nn.Module) -> list[tuple[str, Any]]:
    modules: list[tuple[str, Any]] = list(model.named_modules())
    return [(name, module) for name, module in modules if isinstance(getattr(module, "weight", None), nn.Parameter)]


class FrozenStart(TrainingRule):
    """Rule that keeps the second half of every LoRA matrix, which takes the start out of the base, as it is."""

    def start(self, model: nn.Module, steps: int) -> None:
        """Remember the frozen halves."""
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        self._held = [
            (weight, axis, _second_half(weight, axis).detach().clone())
            for name, weight in named for axis, part in enumerate(("lora_A", "lora_B")) if f".{part}." in name
        ]  # fmt: skip

    def before_update(self, model: nn.Module, step: int) -> None:
        """Set the gradients of the frozen halves to 0, before the norm of all gradients is clipped."""
        for weight, axis, _ in self._held:
            if weight.grad is not None:
                _second_half(weight.grad, axis).zero_()

    def after_update(self, model: nn.Module, step: int) -> None:
        """Put the frozen halves back, which weight decay has changed."""
        with torch.no_grad():
            for weight, axis, held in self._held:
                _second_half(weight, axis).copy_(held)


def _second_half(weight: torch.Tensor, axis: int) -> torch.Tensor:
    rank = weight.shape[axis] // 2
    return weight.narrow(axis, rank, rank)
