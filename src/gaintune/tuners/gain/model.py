"""GAIN as a PEFT tuner: which modules are adapted, what is refused before the model is touched, and mixed batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
)
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_quantization_kwargs
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from gaintune.errors import UnsupportedModuleError
from gaintune.tuners.gain.config import GainConfig
from gaintune.tuners.gain.layer import BASE, GainLayer, GainLinear
from gaintune.tuners.gain.mapping import (
    DEFAULTS,
    FLATTENED_TOKENS,
    FUSED_QUERIES,
    Projections,
    default_projections,
    fused_keys_values,
)
from gaintune.tuners.targets import matched_modules, refuse_parameters, refuse_parent, refuse_shard, refuse_unfit


def check_modules(
    config: GainConfig, model: nn.Module, quantization: dict[str, Any], model_config: dict[str, Any]
) -> None:
    """Raise `UnsupportedModuleError` for the first module that is named but cannot be adapted correctly."""
    matched = matched_modules(config, model)
    refuse_unfit(matched, model, partial(refuse_module, quantization=quantization))
    refuse_parameters(config, model, matched, any_experts=config.ffn)
    scaled = {name: scaled_outputs(config, module, name, model_config) for name, module in matched.items()}
    if config.output_modules and not any(scaled.values()):
        raise UnsupportedModuleError(
            f"No module to adapt ends with {' or '.join(sorted(config.output_modules))}, which `output_modules` names: "  # type: ignore[arg-type]
            "name others there, and check `target_modules`, `exclude_modules` and `layers_to_transform`."
        )


def scaled_outputs(config: GainConfig, module: nn.Module, name: str, model_config: dict[str, Any]) -> int:
    """Count the last output features of a module that are scaled; 0 where its input is.

    Raises `UnsupportedModuleError` where these cannot be told from queries, or an adapter that is there already scales
    others.
    """
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    outputs = 0
    if config.output_modules and _ends_with(name, tuple(config.output_modules)):  # type: ignore[arg-type]  # a set
        fused = name.rpartition(".")[2] in FUSED_QUERIES
        features = fused_keys_values(model_config) if fused else _get_in_out_features(base)[1]
        if features is None:
            raise UnsupportedModuleError(
                f"{name} computes queries, keys and values together, and where the keys and values of "
                f"{model_config.get('model_type')!r} are in its output is not known, so a gain would scale queries "
                "too. Leave `output_modules` out, or name other modules there."
            )
        outputs = features
    if isinstance(module, GainLayer) and module.outputs != outputs:
        sides = ["output" if count else "input" for count in (module.outputs, outputs)]
        raise UnsupportedModuleError(
            f"{name} has gains on its {sides[0]} already, and this adapter would have them on its {sides[1]}: one "
            "module scales one of them. Load the adapters into models of their own, or merge the first."
        )
    return outputs


def refuse_module(module: nn.Module, name: str, quantization: dict[str, Any]) -> None:
    """Refuse what is no linear layer: only there is a gain a column scale of the weight."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(module, BaseTunerLayer) and not hasattr(module, "gain_v"):
        raise UnsupportedModuleError(
            f"{name} already carries an adapter of another method ({type(module).__module__}). Gains in front of it "
            "would scale that adapter's input too. Merge or unload it first, or exclude the module."
        )
    if isinstance(base, nn.Linear | Conv1D):
        refuse_shard(base, name)
        return
    backend = resolve_quantization_backend(base, **quantization)
    fused_norm = type(base).__name__ in ("LayerNormLinear", "LayerNormMLP")  # the norm would undo the gains
    if backend is None or backend.layer_type != "linear" or fused_norm:
        raise UnsupportedModuleError(
            f"{name} is a {type(base).__name__}, not a linear layer: GAIN scales the input of torch.nn.Linear, "
            "transformers' Conv1D and quantized linear layers. Name other modules in `target_modules`, or this one in "
            "`exclude_modules`."
        )


def check_groups(config: GainConfig, model: nn.Module, projections: Projections) -> None:
    """Raise if a group of default modules matches nothing, as for a model class without that part."""
    names = matched_modules(config, model)
    groups = {"attention output projections": projections.attention}
    if config.ffn:
        groups["feed-forward down-projections"] = projections.ffn
    for what, endings in groups.items():
        if not any(_ends_with(name, endings) for name in names):
            raise UnsupportedModuleError(
                f"No {what} found: no module to adapt ends with {' or '.join(endings)}. Please specify "
                "`target_modules` in `peft_config`, and check `exclude_modules` and `layers_to_transform`."
            )


def unmatched_targets(config: GainConfig, model: nn.Module) -> set[str]:
    """Return the names in a list of `target_modules` that no module is called."""
    if not isinstance(config.target_modules, set):
        return set()
    names = [name for name, _ in model.named_modules()]
    return {target for target in config.target_modules if not any(_ends_with(name, (target,)) for name in names)}


def _ends_with(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


class GainModel(BaseTuner):
    """A model whose attention output projections, and down-projections for GAIN-FFN, have gains on their inputs.

    With `output_modules`, key and value projections have gains on their outputs beside them, as in (IA)3.

    Made by `peft.get_peft_model(model, GainConfig(...))`. See `GainConfig` for the settings.
    """

    prefix: str = "gain_"
    tuner_layer_cls = GainLayer
    target_module_mapping = {name: list(projections.attention) for name, projections in DEFAULTS.items()}  # noqa: RUF012

    _defaults_used: Projections | None = None

    def _prepare_adapter_config(self, peft_config: GainConfig, model_config: dict[str, Any]) -> GainConfig:  # type: ignore[override]
        self._defaults_used = None
        outputs: Any = peft_config.output_modules
        if outputs is True:
            outputs = set(default_projections(model_config).keys_values)
            if not outputs:
                raise UnsupportedModuleError(
                    f"{model_config.get('model_type')!r} computes queries, keys and values in one module that mixes "
                    "them, so no gains can be put on its keys and values alone. Leave `output_modules` out."
                )
            peft_config.output_modules = outputs
        if peft_config.target_modules is None:
            projections = default_projections(model_config)
            names = projections.attention + (projections.ffn if peft_config.ffn else ())
            peft_config.target_modules = set(names)  # type: ignore[assignment]  # PEFT matches names in a set
            self._defaults_used = projections
        if outputs and not isinstance(peft_config.target_modules, str):
            peft_config.target_modules = set(peft_config.target_modules) | set(outputs)  # type: ignore[assignment]
        return peft_config

    def _prepare_model(self, peft_config: GainConfig, model: nn.Module) -> None:  # type: ignore[override]
        """Refuse what cannot be adapted before the first module is replaced."""
        if peft_config.target_modules == DUMMY_TARGET_MODULES:
            return
        _maybe_include_all_linear_layers(peft_config, model)
        unmatched = unmatched_targets(peft_config, model)
        if self._defaults_used is not None:
            check_groups(peft_config, model, self._defaults_used)
            # without cross-attention, where the model has none
            peft_config.target_modules = set(peft_config.target_modules or ()) - unmatched  # type: ignore[assignment]
            if peft_config.output_modules:
                peft_config.output_modules = set(peft_config.output_modules) - unmatched  # type: ignore[assignment,arg-type]
        elif unmatched:
            # most often a typo
            warnings.warn(
                f"target_modules names {', '.join(sorted(unmatched))}, which no module of the model is called.",
                stacklevel=2,
            )
        check_modules(peft_config, model, get_quantization_kwargs(model), self.get_model_config(model))

    def _create_and_replace(  # type: ignore[override]  # PEFT annotates the base class of the config
        self,
        peft_config: GainConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        quantization = get_quantization_kwargs(self.model)
        refuse_parent(parent, current_key)
        refuse_module(target, current_key, quantization)
        model_config = self.get_model_config(self.model)
        outputs = scaled_outputs(peft_config, target, current_key, model_config)
        if isinstance(target, GainLayer):
            target.update_layer(adapter_name, peft_config)
            return
        flattened = model_config.get("model_type") in FLATTENED_TOKENS
        layer = GainLinear(
            target, adapter_name, peft_config, outputs=outputs, flattened_tokens=flattened, **quantization
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trained until it is activated
        self._replace_module(parent, target_name, layer, target)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose gain is `1 + sum_i w_i (g_i - 1)`; an adapter that lacks a layer counts as 1.

        The new adapter is frozen and not activated, as in PEFT's other tuners. Raises `ValueError` for unknown
        adapters, a name that is taken, a wrong number of weights, or adapters with `modules_to_save`.
        """
        adapters, weights = list(adapters), list(weights)
        self._check_weighted(adapters, weights, adapter_name)
        layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, GainLayer) and any(adapter in module.gain_v for adapter in adapters)
        }
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]],
            target_modules=list(layers),
            output_modules=[name for name, layer in layers.items() if layer.outputs],
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            inference_mode=True,
            init_weights=True,
        )
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        with torch.no_grad():
            for layer in layers.values():
                combined = layer.gain_v[adapter_name]
                for adapter, weight in zip(adapters, weights, strict=True):
                    if adapter in layer.gain_v:
                        combined.add_(layer.gain_v[adapter].to(combined.device), alpha=weight)
                combined.requires_grad_(False)

    def _check_weighted(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"Got {len(adapters)} adapters and {len(weights)} weights: give one weight each.")
        unknown = [adapter for adapter in adapters if adapter not in self.peft_config]
        if unknown:
            raise ValueError(f"Adapter {', '.join(unknown)} does not exist; there are {', '.join(self.peft_config)}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        saved = {
            adapter
            for module in self.model.modules()
            if isinstance(module, ModulesToSaveWrapper)
            for adapter in adapters
            if adapter in module.modules_to_save
        }
        if saved:
            raise ValueError(f"Adapter {', '.join(sorted(saved))} has `modules_to_save`, which weights cannot combine.")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one a row, to every layer; PeftModel calls it around `forward` and `generate`."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        self._check_adapter_names(adapter_names)
        give_names = partial(_pass_adapter_names, adapter_names=list(adapter_names))
        check_rows = partial(_check_rows, adapter_names=list(adapter_names), names=self._input_names())
        # generate passes its input here, and the rows multiply by the beams further down; forward may not pass it
        input_is_here = _first_batch(args, kwargs, self._input_names()) is not None
        if input_is_here:
            check_rows(self, args, kwargs)
        handles = [
            module.register_forward_pre_hook(give_names, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, GainLayer | AuxiliaryTrainingWrapper)
        ]
        if not input_is_here:
            handles.append(self.model.register_forward_pre_hook(check_rows, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, adapter_names: Sequence[str]) -> None:
        known = {name for module in self.modules() if isinstance(module, GainLayer) for name in module.gain_v}
        unknown = sorted(set(adapter_names) - known - {BASE})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

    def _input_names(self) -> tuple[str, ...]:
        main = getattr(self.model, "main_input_name", "input_ids")
        return (main, "input_ids", "inputs", "inputs_embeds", "decoder_input_ids")


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]) -> Any:
    return args, {**kwargs, "adapter_names": adapter_names}


def _first_batch(args: Sequence[Any], kwargs: dict[str, Any], names: Sequence[str]) -> int | None:
    """Return the rows of the model's input; None where it is not among the arguments."""
    for value in (*args[:1], *(kwargs.get(name) for name in names)):
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return len(value)
    return None


def _check_rows(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str], names: Any) -> None:
    rows = _first_batch(args, kwargs, names)
    if rows is not None and rows != len(adapter_names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {rows} respectively."
        )
