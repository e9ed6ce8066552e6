"""The settings of a DISeL adapter, stored in its `adapter_config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from peft import LoraConfig

from gaintune.errors import ConfigError
from gaintune.tuners.registry import add_peft_type


@dataclass
class DiselConfig(LoraConfig):
    """`DiselConfig(r=16)` is DISeL as in its paper (arXiv 2605.19028): every linear layer, alpha = 2 r.

        y = W x + (alpha / r) B diag(g(x)) A x,    g(x) = sigmoid(G x + c), one gate a token and rank-one part

    A starts as in LoRA, B at 0 (so the adapted model starts at the base), G at random and c at `gate_bias_init`, so
    that the gates start nearly shut. The gates read what A reads: with `lora_dropout` that is the input with some of
    its features dropped, so in training the gates are noisy too; in evaluation they are not.

    LoRA's other settings mean what they mean there; `target_modules` is "all-linear" unless given. With `rank_pattern`
    a module's scale is still its alpha over its own rank. What cannot hold with gates is refused: other LoRA variants,
    starts that change the base's weights, biases (they would act on every token, past the gates).

    Gates are kept in float32 whatever the base and however they are loaded; A and B are what PEFT makes of LoRA's,
    which is float32 through PEFT, and the base's own dtype where transformers adds or loads the adapter itself
    (`model.add_adapter`, `model.load_adapter`). A file that lacks gates is refused by PEFT's loading and hot swap;
    transformers' own loader asks no tuner and only names them in its report (`missing_keys`), leaving random gates:
    load with `PeftModel.from_pretrained`.

    The forward pass reads A, B and G from their layer without calling them, so a wrapper must gather whole decoder
    layers: FSDP-2 does by default. Under FSDP-1 PEFT's policy wraps each of these matrices by itself, and the first
    forward pass stops at a size mismatch; `AdapterOptimizerMixin` and `parameter_groups` refuse FSDP-1 with a word.
    """

    lora_alpha: int = field(
        default=None,  # type: ignore[assignment]  # filled in below: the dataclass cannot refer to r
        metadata={"help": "The update is alpha / r * B diag(g) A. Default: 2 r."},
    )
    gate_kind: Literal["sigmoid", "relu"] = field(
        default="sigmoid",
        metadata={"help": "'sigmoid' is DISeL. 'relu' is Gated LoRA, B relu(A x), for comparison: a part acts where "
                          "its own feature is positive, and the other gate settings are not read."},
    )  # fmt: skip
    gate_bias_init: float = field(
        default=-3.0,
        metadata={"help": "Start of c: a gate starts near sigmoid(c), 0.047 at -3. Lower keeps the base more firmly "
                          "and learns later; the paper takes -7 for large classification sets."},
    )  # fmt: skip
    gate_weight_init: Literal["kaiming", "zeros"] = field(
        default="kaiming",
        metadata={"help": "Start of G: 'kaiming' is nn.Linear's own, uniform within 1 / sqrt(inputs), as in the paper; "
                          "'zeros' opens every gate to exactly sigmoid(c) for every token at first."},
    )  # fmt: skip
    gate_rank: int | None = field(
        default=None,
        metadata={"help": "Rank of G = G2 G1; default: a full r x inputs matrix. Fewer parameters where r is large: "
                          "gate_rank * (inputs + r) in place of r * inputs."},
    )  # fmt: skip
    gate_lr_ratio: float = field(
        default=5.0,
        metadata={"help": "Learning rate of G and c, as a multiple of A's and B's: the dial between learning and "
                          "keeping. Applied by `gaintune.parameter_groups`, `create_disel_optimizer` and "
                          "`AdapterOptimizerMixin`; any other optimizer gives gates the common rate."},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        super().__post_init__()
        self.peft_type = add_peft_type("DISEL")
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` for settings that mean nothing or cannot hold; fields may have been set since."""
        self._check_gates()
        self._refuse_variants()

    def _check_gates(self) -> None:
        if self.gate_kind not in ("sigmoid", "relu"):
            raise ConfigError(f"gate_kind is {self.gate_kind!r}: use 'sigmoid' (DISeL) or 'relu' (Gated LoRA).")
        if self.gate_weight_init not in ("kaiming", "zeros"):
            raise ConfigError(f"gate_weight_init is {self.gate_weight_init!r}: use 'kaiming' or 'zeros'.")
        if self.gate_rank is not None and (self.gate_kind == "relu" or self.gate_rank < 1):
            raise ConfigError(
                f"gate_rank is {self.gate_rank}: it is the rank of a sigmoid gate's matrix, 1 or more, and Gated LoRA "
                "(gate_kind='relu') has none."
            )
        for name in ("lora_alpha", "gate_bias_init", "gate_lr_ratio"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)}: give a finite number.")
        if not self.gate_lr_ratio > 0:
            raise ConfigError(f"gate_lr_ratio is {self.gate_lr_ratio}: a factor on the learning rate, more than 0.")

    def _refuse_variants(self) -> None:
        chosen = [entry.name for entry in fields(self) if entry.metadata.get("is_lora_variant")]
        for name in (name for name in [*chosen, "use_qalora", "megatron_config"] if getattr(self, name, None)):
            raise ConfigError(
                f"{name} is another way to compute LoRA's update, which gates cannot sit in: leave it out."
            )
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} moves a part of the base's weights into A and B, and "
                "gates would then take it away: use True, 'gaussian', or False (random B, for tests)."
            )
        if self.lora_bias or self.bias != "none":
            name = "lora_bias=True" if self.lora_bias else f"bias={self.bias!r}"
            raise ConfigError(f"{name} trains a constant that acts on every token, past the gates: leave it out.")
        if self.target_parameters:
            raise ConfigError("target_parameters: gates read a module's input, and a parameter has none; name modules.")
