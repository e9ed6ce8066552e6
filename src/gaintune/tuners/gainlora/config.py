"""The settings of a GainLoRA adapter, stored in its `adapter_config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from peft.config import PeftConfig

from gaintune.errors import ConfigError
from gaintune.tuners.registry import add_peft_type, match_names


@dataclass
class GainloraConfig(PeftConfig):
    """`GainloraConfig(r=8)` is GainLoRA (arXiv 2505.15424) with one gate a module and token.

        y = W x + (alpha / r) sum_t g_t(x) B_t A_t x,    g_t(x) = |2 sigmoid(w_t . x / rms(x)) - 1|

    One branch (A_t, B_t, w_t) is added for every domain, and only the newest trains. A_t and w_t start at random, B_t
    at 0. The gate is 0 where w_t and x are orthogonal: `gaintune.tuners.gainlora.add_branch` begins a branch whose
    w_t is orthogonal to given directions, those of earlier domains' inputs. All values stay in float32.
    """

    r: int = field(default=8, metadata={"help": "Rank of every branch."})
    lora_alpha: float = field(
        default=None,  # type: ignore[assignment]  # filled in below: the dataclass cannot refer to r
        metadata={"help": "A branch's update is alpha / r * g B A x. Default: 2 r."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of the linear modules to adapt: a list of names (matched exactly or as the end of the "
                          "full name), a regular expression for the full name, or 'all-linear', the default."},
    )  # fmt: skip
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of modules not to adapt, matched as `target_modules` are."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules besides the branches to train and to save in full, a classification head for "
                          "example."},
    )  # fmt: skip
    branches: int = field(default=1, metadata={"help": "Branches, of which all but the last are frozen."})
    shut: float = field(
        default=0.95,
        metadata={"help": "Share of the energy of earlier domains' inputs on which a new gate stays shut. More keeps "
                          "earlier domains better, and leaves a new gate fewer directions to open in."},
    )  # fmt: skip
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start at B = 0, so that the adapted model computes exactly what the base computes. False "
                          "starts at random values, which is of use in tests only."},
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("GAINLORA")
        if self.lora_alpha is None:
            self.lora_alpha = 2.0 * self.r
        match_names(self)
        for name in ("r", "branches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: a count, 1 or more.")
        if not math.isfinite(self.lora_alpha):
            raise ConfigError(f"lora_alpha is {self.lora_alpha}: give a finite number.")
        if not 0 < self.shut < 1:
            raise ConfigError(f"shut is {self.shut}: a share between 0 and 1.")
