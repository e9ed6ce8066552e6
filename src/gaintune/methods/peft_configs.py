"""PEFT's configuration of every method that PEFT computes: a plan's method in PEFT's words, and read back from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import fields
from typing import Any, Literal, cast

import torch
from peft import AdaLoraConfig, HiraConfig, IA3Config, LoraConfig, OSFConfig, PeftConfig, VeraConfig
from transformers import PreTrainedModel

from gaintune.config import MethodConfig
from gaintune.tuners.disel import DiselConfig
from gaintune.tuners.gain import GainConfig
from gaintune.tuners.gain.mapping import default_projections

Build = Callable[[PreTrainedModel, MethodConfig], PeftConfig]

ADALORA_RANK = 8
ADALORA_START = 1.5  # PEFT's proportion of the rank at the start to the average one at the end, 12 to 8
DISEL_RANK = 8
HIRA_RANK = 8
VERA_RANK = 256
OSF_PRESERVED = 0.5


def targets_of(model: PreTrainedModel, chosen: str | tuple[str, ...] | None, default: Any) -> Any:
    """Module names in the form PEFT takes: a list of endings, 'all-linear', or the method's default."""
    if chosen is None:
        return default
    if chosen == "output-projection":
        return list(default_projections(model.config.to_dict()).attention)
    return chosen if chosen == "all-linear" else [chosen] if isinstance(chosen, str) else list(chosen)


def gain(ffn: bool) -> Build:
    """GAIN, or GAIN-FFN."""

    def build(model: PreTrainedModel, config: MethodConfig) -> PeftConfig:
        return GainConfig(ffn=ffn, target_modules=targets_of(model, config.targets, None))

    return build


def lora(**changes: Any) -> Build:
    """LoRA, or one of its kin by a field of PEFT's `LoraConfig`: rank 1 on the attention output projection."""

    def build(model: PreTrainedModel, config: MethodConfig) -> PeftConfig:
        rank = config.rank or 1
        return LoraConfig(
            r=rank,
            lora_alpha=_alpha(config, rank),
            target_modules=targets_of(model, config.targets or "output-projection", None),
            **changes,
        )

    return build


def ia3(model: PreTrainedModel, config: MethodConfig) -> PeftConfig:
    """(IA)3 where PEFT puts it."""
    return IA3Config()


def disel(gate_kind: Literal["sigmoid", "relu"]) -> Build:
    """DISeL, or Gated LoRA, on all linear layers; alpha is twice the rank unless told otherwise."""

    def build(model: PreTrainedModel, config: MethodConfig) -> PeftConfig:
        rank = config.rank or DISEL_RANK
        gates = {
            "gate_bias_init": config.gate_bias,
            "gate_lr_ratio": config.gate_lr_ratio,
            "gate_rank": config.gate_rank,
        }
        return DiselConfig(
            r=rank,
            lora_alpha=_alpha(config, rank),
            target_modules=targets_of(model, config.targets, "all-linear"),
            gate_kind=gate_kind,
            **{name: value for name, value in gates.items() if value is not None},
        )

    return build


def adalora(model: PreTrainedModel, config: MethodConfig) -> PeftConfig:
    """AdaLoRA on all linear layers. How many updates there will be is not known yet: `BudgetSchedule` sets it."""
    rank = config.rank or ADALORA_RANK
    start = math.ceil(ADALORA_START * rank)
    return AdaLoraConfig(
        target_r=rank,
        init_r=start,
        total_step=1,
        lora_alpha=_alpha(config, start),
        target_modules=targets_of(model, config.targets, "all-linear"),
    )


def hira(model: PreTrainedModel, config: MethodConfig) -> PeftConfig:
    """HiRA on all linear layers."""
    return HiraConfig(r=config.rank or HIRA_RANK, target_modules=targets_of(model, config.targets, "all-linear"))


def vera(model: PreTrainedModel, config: MethodConfig) -> PeftConfig:
    """VeRA on all linear layers; its shared random matrices come from the seed that `attach` set, and are saved."""
    return VeraConfig(
        r=config.rank or VERA_RANK,
        target_modules=targets_of(model, config.targets, "all-linear"),
        projection_prng_key=torch.initial_seed(),
        save_projection=True,
    )


def osf(model: PreTrainedModel, config: MethodConfig) -> PeftConfig:
    """Orthogonal subspace fine-tuning of all linear layers."""
    preserved = OSF_PRESERVED if config.preserved is None else config.preserved
    return OSFConfig(effective_rank=preserved, target_modules=targets_of(model, config.targets, "all-linear"))


def _alpha(config: MethodConfig, rank: int) -> int:
    alpha = 2.0 * rank if config.alpha is None else config.alpha
    return cast(int, alpha)  # PEFT says int and divides floats as well


def kind_of(config: Mapping[str, Any]) -> str:
    """What adapter an `adapter_config.json` describes: PEFT's type, and what tells adapters of one type apart.

    "LORA use_dora", "LORA pissa" and "DISEL relu" are other methods than "LORA" and "DISEL sigmoid".
    """
    kind = str(config.get("peft_type"))
    if kind == "DISEL":
        return f"{kind} {config.get('gate_kind')}"
    if kind != "LORA":
        return kind
    variants = [each.name for each in fields(LoraConfig) if each.metadata.get("is_lora_variant")]
    marks = [name for name in (*variants, "use_qalora") if config.get(name)]
    if str(config.get("init_lora_weights")).startswith("pissa"):
        marks.append("pissa")
    return " ".join([kind, *marks])


def method_of(config: Mapping[str, Any], name: str, options: Set[str]) -> MethodConfig:
    """A method with those of its `options` that an `adapter_config.json` of its kind holds."""
    places = {
        "rank": "target_r" if config.get("peft_type") == "ADALORA" else "r",
        "alpha": "lora_alpha",
        "targets": "target_modules",
        "gate_bias": "gate_bias_init",
        "gate_lr_ratio": "gate_lr_ratio",
        "gate_rank": "gate_rank",
    }
    held = {option: config.get(places[option]) for option in places.keys() & options}
    return MethodConfig.model_validate({"name": name, **held})
