"""What GAIN refuses to adapt, found before the model is touched: never adapt a part and say nothing."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from gaintune.errors import UnsupportedModuleError
from gaintune.tuners.gain.config import GainConfig
from gaintune.tuners.gain.mapping import Projections


def matched_modules(config: GainConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that `config.target_modules` names, those inside adapter layers left out."""
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


def check_modules(config: GainConfig, model: nn.Module, quantization: dict[str, Any]) -> None:
    """Raise `UnsupportedModuleError` for the first module that is named but cannot be adapted correctly."""
    matched = matched_modules(config, model)
    for name, module in matched.items():
        parent_name, _, _ = name.rpartition(".")
        refuse_parent(model.get_submodule(parent_name), name)
        refuse_module(module, name, quantization)
    _refuse_nested(matched)
    _refuse_shared(matched, model)
    _refuse_fused_experts(config, model, matched)


def refuse_module(module: nn.Module, name: str, quantization: dict[str, Any]) -> None:
    """Only a linear layer has an input on which a gain is a column scale of its weight."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(module, BaseTunerLayer) and not hasattr(module, "gain_v"):
        raise UnsupportedModuleError(
            f"{name} already carries an adapter of another method ({type(module).__module__}). Gains in front of it "
            "would scale that adapter's input too. Merge or unload it first, or exclude the module."
        )
    if isinstance(base, nn.Linear | Conv1D):
        _refuse_shard(base, name)
        return
    backend = resolve_quantization_backend(base, **quantization)
    fused_norm = type(base).__name__ in ("LayerNormLinear", "LayerNormMLP")  # the norm would undo the gains
    if backend is None or backend.layer_type != "linear" or fused_norm:
        raise UnsupportedModuleError(
            f"{name} is a {type(base).__name__}, not a linear layer: GAIN scales the input of torch.nn.Linear, "
            "transformers' Conv1D and quantized linear layers. Name other modules in `target_modules`, or this one in "
            "`exclude_modules`."
        )


def _refuse_shard(module: nn.Module, name: str) -> None:
    mesh = getattr(getattr(module, "weight", None), "device_mesh", None)
    sharded = mesh is not None and not set(mesh.mesh_dim_names or ()) <= {"fsdp"}
    if sharded or getattr(module, "_hf_tp_plan", None) is not None:
        raise UnsupportedModuleError(
            f"{name} is sharded by tensor parallelism, and the gains would have to be sharded with its input. Load the "
            "base without a tensor-parallel plan."
        )


def refuse_parent(parent: nn.Module, name: str) -> None:
    """Some modules use a child's weight without calling the child; a wrapped child would be ignored."""
    reason = None
    if isinstance(parent, nn.MultiheadAttention):
        reason = "torch.nn.MultiheadAttention reads its out_proj's weight and never calls the module"
    elif isinstance(parent, nn.TransformerEncoderLayer):
        reason = "torch.nn.TransformerEncoderLayer reads its children's weights on its fast path"
    elif name.endswith("out_proj") and hasattr(parent, "A_log") and hasattr(parent, "D"):
        reason = "Mamba's fused kernel reads its out_proj's weight and never calls the module"
    if reason is not None:
        raise UnsupportedModuleError(
            f"{name} cannot be adapted: {reason}, so gains there would act in some runs and not in others. Name other "
            "modules in `target_modules`, or this one in `exclude_modules`."
        )


def _refuse_nested(matched: dict[str, nn.Module]) -> None:
    for name in matched:
        outer = next((other for other in matched if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise UnsupportedModuleError(
                f"{name} lies inside {outer}, and `target_modules` matches both: it would be scaled twice. Exclude one."
            )


def _refuse_shared(matched: dict[str, nn.Module], model: nn.Module) -> None:
    """A module that hangs in two places is replaced in the first only."""
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


def _refuse_fused_experts(config: GainConfig, model: nn.Module, matched: dict[str, nn.Module]) -> None:
    """Experts kept as one 3-D parameter are no modules: their names match nothing, or only a shared expert."""
    for owner_name, owner in model.named_modules():
        if isinstance(owner, nn.Linear | nn.Embedding | Conv1D | BaseTunerLayer):
            continue
        for parameter_name, parameter in owner.named_parameters(recurse=False):
            full_name = f"{owner_name}.{parameter_name}" if owner_name else parameter_name
            fused = parameter.dim() >= 3 and "expert" in f"{owner_name} {type(owner).__name__}".lower()
            named = parameter.dim() >= 2 and owner_name not in matched and check_target_module_exists(config, full_name)
            if named or (fused and config.ffn):
                raise UnsupportedModuleError(
                    f"{full_name} is one parameter of shape {tuple(parameter.shape)}, not a linear module"
                    f"{' (the fused experts of a mixture of experts)' if fused else ''}: its inputs cannot be scaled. "
                    "Adapt the attention alone: ffn=False and target_modules=['o_proj'], or the like."
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
    """The names in a list of `target_modules` that no module is called."""
    if not isinstance(config.target_modules, set):
        return set()
    names = [name for name, _ in model.named_modules()]
    return {target for target in config.target_modules if not any(_ends_with(name, (target,)) for name in names)}


def _ends_with(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
