"""SVFT as a PEFT tuner."""

from __future__ import annotations

from typing import Any

from torch import nn

from gaintune.tuners.linear import LinearTuner
from gaintune.tuners.svft.layer import SvftLinear


class SvftModel(LinearTuner):
    """A model whose linear layers have changes of their singular values.

    Made by `peft.get_peft_model(model, SvftConfig(...))`. See `SvftConfig` for the settings.
    """

    prefix: str = "svft_"
    tuner_layer_cls = SvftLinear
    title = "SVFT"
    quantized = False

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        if peft_config.base_dtype is None:
            peft_config.base_dtype = str(target.weight.dtype).removeprefix("torch.")
        super()._create_and_replace(peft_config, adapter_name, target, *args, **kwargs)
