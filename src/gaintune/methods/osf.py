"""Orthogonal subspace fine-tuning in training: the projection of gradients that PEFT loses on 16-bit bases."""

from __future__ import annotations

from peft.tuners.osf.layer import OSFLayer
from torch import nn

from gaintune.methods.rules import StageRule


class SubspaceProjection(StageRule):
    """Puts the hooks that project the gradients onto the parameters that train.

    PEFT hangs them on the parameters it makes first. On a bf16 or fp16 base it then replaces these by fp32 ones, which
    have no hooks, and OSF would train without its constraint.
    """

    def start(self, model: nn.Module, steps: int) -> None:
        """Hang the hooks anew."""
        for layer in model.modules():
            if isinstance(layer, OSFLayer):
                layer._detach_hooks()
                for adapter in layer.osf_svd_params:
                    layer._attach_hooks(adapter)
