"""The modules that a configuration names, and refusals of those that no adapter on a layer's input can be put on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from gaintune.errors import UnsupportedModuleError

SHAPES_ALONE: ContextVar[bool] = ContextVar("shapes_alone", default=False)
"""Whether adapters are attached for their shapes alone, so that a base without numbers will do."""


def with_named_targets(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """Return a copy of a configuration whose "all-linear" is replaced by the names of the model's linear modules."""
    return _maybe_include_all_linear_layers(copy.copy(config), model)


def matched_modules(config: PeftConfig, model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of `model` that `config.target_modules` names, without those inside adapter layers."""
    matched: dict[str, nn.Module] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if name and check_target_module_exists(config, name):
            matched[name] = module
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
    return matched


def refuse_unfit(matched: dict[str, nn.Module], model: nn.Module, refuse: Callable[[nn.Module, str], None]) -> None:
    """Raise for the first matched module that its parent would bypass, that `refuse` refuses, or that appears twice."""
    for name, module in matched.items():
        parent_name, _, _ = name.rpartition(".")
        refuse_parent(model.get_submodule(parent_name), name)
        refuse(module, name)
    _refuse_nested(matched)
    _refuse_shared(matched, model)


def refuse_parent(parent: nn.Module, name: str) -> None:
    """Refuse a parent that uses its child's weight without calling the child: a wrapped child would be ignored."""
    reason = None
    if isinstance(parent, nn.MultiheadAttention):
        reason = "torch.nn.MultiheadAttention reads its out_proj's weight and never calls the module"
    elif isinstance(parent, nn.TransformerEncoderLayer):
        reason = "torch.nn.TransformerEncoderLayer reads its children's weights on its fast path"
    elif name.endswith("out_proj") and hasattr(parent, "A_log") and hasattr(parent, "D"):
        reason = "Mamba's fused kernel reads its out_proj's weight and never calls the module"
    if reason is not None:
        raise UnsupportedModuleError(
            f"{name} cannot be adapted: {reason}, so an adapter there would act in some runs and not in others. Name "
            "other modules in `target_modules`, or this one in `exclude_modules`."
        )


def refuse_name(adapter_name: str, existing: Iterable[str], layer: str = "This layer") -> None:
    """Refuse an adapter whose name another adapter of a layer has."""
    if adapter_name in existing:
        raise UnsupportedModuleError(
            f"{layer} already has an adapter called {adapter_name!r}: a second adapter needs a name of its own, and a "
            "model is wrapped by get_peft_model once. Call `unload()` or `delete_adapter` to start over."
        )


def refuse_shard(module: nn.Module, name: str) -> None:
    """Refuse a layer whose weight is split over devices by its features."""
    mesh = getattr(getattr(module, "weight", None), "device_mesh", None)
    sharded = mesh is not None and not set(mesh.mesh_dim_names or ()) <= {"fsdp"}
    if sharded or getattr(module, "_hf_tp_plan", None) is not None:
        raise UnsupportedModuleError(
            f"{name} is sharded by tensor parallelism, and the adapter would have to be sharded with its input. Load "
            "the base without a tensor-parallel plan."
        )


def _refuse_nested(matched: dict[str, nn.Module]) -> None:
    """Refuse a target inside another target: both would act on the same input."""
    for name in matched:
        outer = next((other for other in matched if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise UnsupportedModuleError(
                f"{name} lies inside {outer}, and `target_modules` matches both: it would be adapted twice. Exclude "
                "one."
            )


def _refuse_shared(matched: dict[str, nn.Module], model: nn.Module) -> None:
    """Refuse a module that hangs in two places: PEFT replaces it in the first only."""
    names = {id(module): name for name, module in matched.items()}
    places: dict[int, set[tuple[int, str]]] = {}
    for parent in model.modules():
        for child_name, child in parent._modules.items():
            if child is not None and id(child) in names:
                places.setdefault(id(child), set()).add((id(parent), child_name))
    for key, found in places.items():
        if len(found) > 1:
            raise UnsupportedModuleError(
                f"{names[key]} is one module used in {len(found)} places of the model, so it would be matched twice. "
                "Untie it (copy.deepcopy) or exclude it."
            )


def refuse_parameters(config: Any, model: nn.Module, matched: dict[str, nn.Module], *, any_experts: bool) -> None:
    """Refuse experts kept as one 3-D parameter: they are no modules, and their names match nothing or a shared expert.

    `any_experts` refuses them even where `config` does not name them.
    """
    for owner_name, owner in model.named_modules():
        if isinstance(owner, nn.Linear | nn.Embedding | Conv1D | BaseTunerLayer):
            continue
        for parameter_name, parameter in owner.named_parameters(recurse=False):
            full_name = f"{owner_name}.{parameter_name}" if owner_name else parameter_name
            fused = parameter.dim() >= 3 and "expert" in f"{owner_name} {type(owner).__name__}".lower()
            named = parameter.dim() >= 2 and owner_name not in matched and check_target_module_exists(config, full_name)
            if named or (fused and any_experts):
                raise UnsupportedModuleError(
                    f"{full_name} is one parameter of shape {tuple(parameter.shape)}, not a linear module"
                    f"{' (the fused experts of a mixture of experts)' if fused else ''}: its inputs cannot be adapted. "
                    "Adapt the attention alone: target_modules=['o_proj'], or the like (GAIN: with ffn=False)."
                )
