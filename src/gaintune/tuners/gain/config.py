"""The settings of a GAIN adapter, stored in its `adapter_config.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from gaintune.tuners.registry import add_peft_type, match_names


@dataclass
class GainConfig(PeftConfig):
    """`GainConfig()` is GAIN, `GainConfig(ffn=True)` is GAIN-FFN (arXiv 2604.04516).

    GAIN multiplies the input of the attention output projection, feature by feature, with a gain that starts at 1;
    GAIN-FFN does the same before the down-projection of the feed-forward block. Stored and trained is the
    difference `v` to 1 (gain = 1 + v), always in float32.

    Which modules that means is looked up by the base's `model_type` (`gaintune.tuners.gain.mapping.DEFAULTS`) unless
    `target_modules` names them. Any linear layer can be named, or "all-linear".

    `GainConfig(ffn=True, output_modules=True)` is GAIN-FFN and (IA)3 in one adapter: gains on the outputs of the key
    and value projections as well, bias included.
    """

    ffn: bool = field(
        default=False,
        metadata={"help": "Adapt the feed-forward down-projections as well (GAIN-FFN). Read where `target_modules` "
                          "is not given."},
    )  # fmt: skip
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of the linear modules to adapt: a list of names (matched exactly or as the end of the "
                          "full name), a regular expression for the full name, or 'all-linear'. Default: by model "
                          "type."},
    )  # fmt: skip
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of modules not to adapt, matched as `target_modules` are."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of the layers to adapt; default: all. Needs `target_modules` as a list of names, or "
                          "none."},
    )  # fmt: skip
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the module list that `layers_to_transform` counts in, where it is not the usual "
                          "one: 'layers', 'h', ..."},
    )  # fmt: skip
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules besides the gains to train and to save in full, a classification head for example."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start at gain 1, so that the adapted model computes exactly what the base computes. False "
                          "starts at random gains around 1, which is of use in tests only."},
    )  # fmt: skip
    output_modules: list[str] | bool | None = field(
        default=None,
        metadata={"help": "Names of the modules whose output is scaled and not their input, matched as a list of "
                          "`target_modules` is, and added to such a list. True: the key and value projections, by "
                          "model type."},
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("GAIN")
        match_names(self)
        if isinstance(self.output_modules, str):
            raise ValueError("`output_modules` is a list of names, or True for the key and value projections.")
        if self.output_modules is not True:
            self.output_modules = set(self.output_modules or ()) or None  # type: ignore[assignment]
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` works with names in `target_modules`, not with a regular expression or "
                "'all-linear': give `target_modules` as a list, or put the layer numbers into the expression."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` says where `layers_to_transform` counts: give both.")

    def to_dict(self) -> dict[str, Any]:
        """Return what PEFT saves: without `output_modules` where there are none, as earlier versions wrote it."""
        values = super().to_dict()
        return values if values["output_modules"] else {k: v for k, v in values.items() if k != "output_modules"}
