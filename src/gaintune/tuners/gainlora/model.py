"""GainLoRA as a PEFT tuner."""

from __future__ import annotations

from typing import NoReturn

from gaintune.tuners.gainlora.layer import GainloraLinear, refusal_to_merge
from gaintune.tuners.linear import LinearTuner


class GainloraModel(LinearTuner):
    """A model whose linear layers have gated low-rank branches.

    Made by `peft.get_peft_model(model, GainloraConfig(...))`. See `GainloraConfig` for the settings; no merging.
    """

    prefix: str = "gainlora_"
    tuner_layer_cls = GainloraLinear
    title = "GainLoRA"
    quantized = True
    mergeable = False

    def _check_merge_allowed(self) -> NoReturn:
        raise refusal_to_merge()
