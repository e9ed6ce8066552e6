"""What SVFT and GainLoRA share: linear layers whose output has an update added, and refusals of other modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from peft.utils import get_quantization_kwargs
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from gaintune.errors import ConfigError, UnsupportedModuleError
from gaintune.tuners.targets import (
    matched_modules,
    refuse_name,
    refuse_parameters,
    refuse_parent,
    refuse_shard,
    refuse_unfit,
    with_named_targets,
)


class UpdatedLinear(nn.Module, BaseTunerLayer):
    """`nn.Linear` or `Conv1D` whose output has the active adapters' updates added.

    A method's layer names its parameters in `adapter_layer_names`, makes them in `update_layer`, and adds one adapter's
    update in `add_update`.
    """

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        assert in_features is not None and out_features is not None, "a linear layer has features"
        self.in_features, self.out_features = in_features, out_features

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add the parameters of one adapter."""
        raise NotImplementedError

    def add_update(self, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Return `result` `(..., out_features)` plus an adapter's update for the input `x` `(..., in_features)`."""
        raise NotImplementedError

    def has_adapter(self, adapter_name: str) -> bool:
        """Tell whether the layer has parameters of an adapter."""
        return adapter_name in getattr(self, self.adapter_layer_names[0])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the base layer's output with the updates of the active adapters that are not merged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        for name in () if self.disable_adapters else self.active_adapters:
            if name not in self.merged_adapters and self.has_adapter(name):
                result = self.add_update(name, x, result)
        return result

    def _add(self, adapter_name: str, config: Any, **values: torch.Tensor) -> None:
        """Store an adapter's parameters, by the names of their dictionaries; refuse a second adapter of that name."""
        refuse_name(adapter_name, getattr(self, self.adapter_layer_names[0]))
        for name, value in values.items():
            getattr(self, name)[adapter_name] = nn.Parameter(value, requires_grad=name in self.adapter_layer_names)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move parameters, and widen those loaded in half precision; PEFT's own method would narrow them."""
        target = device or getattr(self.get_base_layer().weight, "device", None)
        for name in (*self.adapter_layer_names, *self.other_param_names):
            values = getattr(self, name)
            old = values.get(adapter_name)
            if not isinstance(old, nn.Parameter) or old.device.type == "meta":
                continue
            moved = old.data.to(None if target is None or target.type == "meta" else target, torch.float32)
            values[adapter_name] = nn.Parameter(moved, requires_grad=old.requires_grad)


class LinearTuner(BaseTuner):
    """Tuner whose layers are `UpdatedLinear`; it refuses mixed batches, whose adapter names PEFT would ignore.

    A subclass gives `tuner_layer_cls`, `prefix`, its `title` in messages, and whether the base may be `quantized`.
    """

    title: ClassVar[str]
    quantized: ClassVar[bool]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Refuse what cannot be adapted before the first module is replaced."""
        if peft_config.target_modules == DUMMY_TARGET_MODULES:
            return
        named = with_named_targets(peft_config, model)
        matched = matched_modules(named, model)
        refuse_unfit(matched, model, self._refuse)
        refuse_parameters(named, model, matched, any_experts=peft_config.target_modules == "all-linear")

    def _refuse(self, module: nn.Module, name: str) -> None:
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(module, BaseTunerLayer) and not isinstance(module, self.tuner_layer_cls):
            raise UnsupportedModuleError(
                f"{name} already carries an adapter of another method ({type(module).__module__}). Merge or unload it "
                "first, or exclude the module."
            )
        backend = resolve_quantization_backend(base, **get_quantization_kwargs(self.model))
        if backend is not None and not self.quantized:
            raise UnsupportedModuleError(
                f"{name} is quantized ({backend.backend_name}), and {self.title} works on the weight itself. Load the "
                "base unquantized."
            )
        if not isinstance(base, nn.Linear | Conv1D):
            raise UnsupportedModuleError(
                f"{name} is a {type(base).__name__}, which {self.title} does not adapt: it adapts torch.nn.Linear and "
                "transformers' Conv1D. Name other modules in `target_modules`, or this one in `exclude_modules`."
            )
        refuse_shard(base, name)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        refuse_parent(parent, current_key)
        self._refuse(target, current_key)
        if isinstance(target, UpdatedLinear):
            target.update_layer(adapter_name, peft_config)
            return
        layer_cls: Any = self.tuner_layer_cls
        layer = layer_cls(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trained until it is activated
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(f"{self.title} takes one adapter for a whole batch: leave adapter_names out")
        yield
