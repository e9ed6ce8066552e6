"""The settings of an SVFT adapter, stored in its `adapter_config.json`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft.config import PeftConfig

from gaintune.errors import ConfigError
from gaintune.tuners.registry import add_peft_type, match_names


@dataclass
class SvftConfig(PeftConfig):
    """`SvftConfig()` is plain SVFT (arXiv 2405.19597) on every linear layer.

        y = W x + U M V^T x,    W = U S V^T

    U and V are the singular vectors of the frozen weight, and M is trained: diagonal, or banded with `off_diagonals`
    on each side of the diagonal. M starts at 0, so the adapted model starts at the base, and stays in float32. U and V
    are not saved: they are computed from the base wherever the adapter is attached or loaded.
    """

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
        metadata={"help": "Modules besides M to train and to save in full, a classification head for example."},
    )
    off_diagonals: int = field(
        default=0,
        metadata={"help": "Diagonals of M on each side of the main one: 0 is plain SVFT, more is its banded form."},
    )
    base_dtype: str | None = field(
        default=None,
        metadata={"help": "Precision of the weights whose singular vectors are meant, such as 'bfloat16': that of the "
                          "base at the first start. A base loaded in a wider one is rounded to it before the SVD."},
    )  # fmt: skip
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start at M = 0, so that the adapted model computes exactly what the base computes. False "
                          "starts at random values, which is of use in tests only."},
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("SVFT")
        match_names(self)
        if self.off_diagonals < 0:
            raise ConfigError(f"off_diagonals is {self.off_diagonals}: a count of diagonals, 0 or more.")
        if self.base_dtype is not None and not isinstance(getattr(torch, self.base_dtype, None), torch.dtype):
            raise ConfigError(f"base_dtype is {self.base_dtype!r}: the name of a dtype of torch, such as 'bfloat16'.")
