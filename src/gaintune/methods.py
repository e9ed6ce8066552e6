"""The catalogue of methods: a name becomes a model whose trainable parameters are the method's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, cast

import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, set_seed

from gaintune.config import MethodConfig, ModelConfig, TrainConfig
from gaintune.errors import ConfigError, GaintuneError, one_line
from gaintune.models import resolve_device, resolve_dtype
from gaintune.tuners.gain import GainConfig
from gaintune.tuners.gain.mapping import default_projections

Build = Callable[[PreTrainedModel, MethodConfig], PeftConfig]


@dataclass(frozen=True)
class Method:
    """One way to adapt a model.

    Attributes:
        name: what users type.
        description: one line for `gaintune methods`.
        lr: default peak learning rate.
        options: fields of `MethodConfig` the method understands, beside `lr` and `label`.
        needs: what it costs or asks for.
        build: makes the PEFT configuration; None where every weight of the base trains.
        peft_type: PEFT's name for what `build` makes.
    """

    name: str
    description: str
    lr: float
    options: frozenset[str]
    needs: str
    build: Build | None
    peft_type: str | None = None

    @property
    def trains_base(self) -> bool:
        """Whether the base's own weights train: they are then kept in fp32, with mixed precision around them."""
        return self.build is None


def _targets(model: PreTrainedModel, chosen: str | tuple[str, ...] | None, default: Any) -> Any:
    """Module names in the form PEFT takes: a list of endings, 'all-linear', or the method's default."""
    if chosen is None:
        return default
    if chosen == "output-projection":
        return list(default_projections(model.config.to_dict()).attention)
    return chosen if chosen == "all-linear" else [chosen] if isinstance(chosen, str) else list(chosen)


def _gain(ffn: bool) -> Build:
    def build(model: PreTrainedModel, config: MethodConfig) -> PeftConfig:
        return GainConfig(ffn=ffn, target_modules=_targets(model, config.targets, None), task_type="CAUSAL_LM")

    return build


def _lora(model: PreTrainedModel, config: MethodConfig) -> PeftConfig:
    rank = config.rank or 1
    targets = _targets(model, config.targets or "output-projection", None)
    alpha = 2.0 * rank if config.alpha is None else config.alpha
    return LoraConfig(
        r=rank, lora_alpha=cast(int, alpha), target_modules=targets, task_type="CAUSAL_LM"
    )  # PEFT says int and divides floats as well


def _ia3(model: PreTrainedModel, config: MethodConfig) -> PeftConfig:
    return IA3Config(task_type="CAUSAL_LM")


_LOW_RANK = frozenset({"rank", "alpha", "targets"})

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "gain",
            "one gain per feature at the attention output projection",
            0.01,
            frozenset({"targets"}),
            "frozen base; gains only (fp32)",
            _gain(ffn=False),
            "GAIN",
        ),
        Method(
            "gain-ffn",
            "GAIN, and one gain per hidden feature of the FFN",
            0.01,
            frozenset({"targets"}),
            "frozen base; gains only (fp32)",
            _gain(ffn=True),
            "GAIN",
        ),
        Method(
            "ia3",
            "(IA)3: scales keys, values and FFN activations",
            0.01,
            frozenset(),
            "frozen base; vectors only (fp32)",
            _ia3,
            "IA3",
        ),
        Method(
            "lora",
            "LoRA; rank 1 on the attention output projection unless told otherwise",
            0.01,
            _LOW_RANK,
            "frozen base; two thin matrices a module (fp32)",
            _lora,
            "LORA",
        ),
        Method(
            "full",
            "every weight of the base trains",
            2e-5,
            frozenset(),
            "fp32 weights, gradients and AdamW's two averages: 16 bytes a parameter; not for quantized bases",
            None,
        ),
    )
}


def get_method(name: str) -> Method:
    """Look a method up, naming the nearest one for a typo."""
    if name in METHODS:
        return METHODS[name]
    near = get_close_matches(name, METHODS, n=1)
    advice = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown method {name!r}; {advice}known methods: {', '.join(METHODS)}")


def check_method(config: MethodConfig) -> Method:
    """Look a configured method up and refuse options it would ignore."""
    method = get_method(config.name)
    for option in ("rank", "alpha", "targets"):
        if getattr(config, option) is not None and option not in method.options:
            raise ConfigError(f"method {config.name!r} has no option {option!r}; remove it")
    return method


@dataclass(frozen=True)
class Numbers:
    """The numbers a method computes with: how the base is loaded, and the autocast around it if there is one."""

    name: str
    load: torch.dtype
    mixed: torch.dtype | None


def numbers_of(model: ModelConfig, method: MethodConfig) -> Numbers:
    """Adapters leave the base in its own numbers; a method that trains the base keeps it in fp32 under autocast."""
    dtype = resolve_dtype(model.dtype, resolve_device(model.device))
    short = str(dtype).removeprefix("torch.")
    if not check_method(method).trains_base:
        return Numbers(f"{short}-{model.quantization}" if model.quantization else short, dtype, None)
    if model.quantization or dtype is torch.float16:
        given = f"model.quantization={model.quantization}" if model.quantization else "fp16"
        raise ConfigError(
            f"method {method.name!r} trains the base itself, not with {given}: use model.dtype bf16 or fp32"
        )
    if dtype is torch.float32:
        return Numbers("float32", dtype, None)
    return Numbers(f"float32-autocast-{short}", torch.float32, dtype)


def learning_rate(config: MethodConfig, train: TrainConfig) -> float:
    """The method's own rate, else the plan's, else the catalogue's."""
    return config.lr or train.lr or get_method(config.name).lr


def attach(model: PreTrainedModel, config: MethodConfig, *, seed: int) -> nn.Module:
    """Prepare a base model for a method: wrap it in its adapter, or set all its weights to train.

    Args:
        model: the base, changed in place (its modules are wrapped).
        config: the method and its options.
        seed: seed of random start values, such as LoRA's A.

    Returns:
        A `PeftModel`, or the model itself where every weight trains.
    """
    method = check_method(config)
    set_seed(seed)
    if method.build is None:
        if any(parameter.dtype not in (torch.float32, torch.float64) for parameter in model.parameters()):
            raise ConfigError(f"method {config.name!r} updates the base's own weights and needs them in fp32")
        return model.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # PEFT then sets it as it should be
        try:
            return get_peft_model(model, method.build(model, config))
        except GaintuneError:
            raise
        except ValueError as error:  # PEFT's word for targets that match nothing or no default for a model
            reason = one_line(error)
            raise ConfigError(f"method {config.label!r} cannot be attached to this base: {reason}") from error


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers the method trains."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
