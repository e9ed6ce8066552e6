"""Apply a method of the catalogue: a name becomes a model whose trainable parameters are the method's."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.helpers import find_kappa_target_modules
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from gaintune.config import MethodConfig, ModelConfig, TrainConfig
from gaintune.errors import ConfigError, GaintuneError, one_line
from gaintune.methods.catalogue import METHODS, Method, configured_method
from gaintune.methods.penalties import penalty_of
from gaintune.methods.rules import Renormalization, Rows, StagePosition, TrainingRule
from gaintune.methods.starts import Collate, StartRows
from gaintune.models import probe, resolve_device, resolve_dtype
from gaintune.storage import process_count
from gaintune.tuners import SHAPES_ALONE, matched_modules, with_named_targets
from gaintune.tuners.gain import default_projections

logger = logging.getLogger(__name__)

COMMON = frozenset({
    "name", "label", "lr", "penalty", "penalty_strength", "ewc_rows", "replay", "renormalize"
})  # fmt: skip
"""Options of every method; `renormalize` is refused where nothing can be pulled."""
TRAINING_OPTIONS = frozenset({"lr_ratio", "gate_lr", "gate_lr_ratio", "orthogonality"})
"""Options that are free to change from domain to domain."""
_EXPECTED = (  # warnings of PEFT and torch about what is as it should be
    "fan_in_fan_out is set to False",  # PEFT then sets it
    "Full backward hook is firing",  # it counts LoRA-GA's passes all the same
    "lora with eva initialization used with low_cpu_mem_usage=False",
    r"`init_lora_weights` is '\w+' but `\w+` is not specified. Using default",
)
WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
OPTIONS = tuple(option for option in MethodConfig.model_fields if option not in COMMON)


def check_method(config: MethodConfig) -> Method:
    """Look up a configured method, and refuse options it would ignore and values that PEFT refuses."""
    method = configured_method(config)
    for option in OPTIONS:
        if getattr(config, option) is not None and option not in {*method.options, "config"}:
            raise ConfigError(f"method {config.name!r} has no option {option!r}; remove it")
    if config.renormalize is not None and method.pulled is None:
        raise ConfigError(
            f"method {config.name!r} has no gains, factors or plain B A that renormalize could pull toward the base; "
            "remove it"
        )
    if config.config:
        _require_types(method, config)
        with _in_words_of_peft(config):
            peft_config(method, None, config)
    return method


def _require_types(method: Method, config: MethodConfig) -> None:
    """Refuse values of another type than PEFT's fields of numbers, texts and truths have; PEFT itself takes any."""
    kind = cast(type[PeftConfig], PEFT_TYPE_TO_CONFIG_MAPPING[cast(Any, method.peft_type)])
    try:
        hints = get_type_hints(kind)
    except NameError:  # of a type whose module does not import what it annotates with
        return
    for key, value in (config.config or {}).items():
        hint = hints.get(key)
        union = get_origin(hint) in (Union, UnionType)
        types = {*(get_args(hint) if union else (hint,))} - {type(None)}
        plain = types <= {bool, int, float, str}
        if value is not None and plain and type(value) not in types and not (type(value) is int and float in types):
            names = " or ".join(sorted(WORDS[name] for name in types))
            raise ConfigError(f"method {config.label!r}: {key} is {names}, got {value!r}")


@contextlib.contextmanager
def _in_words_of_peft(config: MethodConfig) -> Iterator[None]:
    """Turn PEFT's errors into ConfigError: all of them where a plan gives fields of PEFT, else those about values."""
    with warnings.catch_warnings():
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        except GaintuneError:
            raise
        except Exception as error:
            if not config.config and not isinstance(error, ValueError | TypeError):
                raise
            named = type(error).__name__ if isinstance(error, KeyError) or not str(error) else ""
            raise ConfigError(
                f"method {config.label!r} cannot be attached to this base: {named} {one_line(error)}".replace("  ", " ")
            ) from error


@dataclass(frozen=True)
class Precision:
    """The precision a method computes in: the dtype in which the base is loaded, and the autocast around it, if any."""

    name: str
    load: torch.dtype
    mixed: torch.dtype | None


@dataclass(frozen=True)
class PreparedMethod:
    """A plan's method as a run uses it: checked against the plan, its rate and precision decided once.

    Attributes:
        config: what the plan says of it; the name and label for tables are there.
        entry: its entry in the catalogue.
        lr: peak learning rate: the method's own, else the plan's, else the catalogue's.
        precision: what it computes in; adapters leave the base in its own.
    """

    config: MethodConfig
    entry: Method
    lr: float
    precision: Precision

    @property
    def rate_multipliers(self) -> Mapping[str, float]:
        """Which parameters learn at another rate: part of their names -> factor."""
        return self.entry.rates(self.config)


def prepare_method(config: MethodConfig, model: ModelConfig, train: TrainConfig) -> PreparedMethod:
    """Check a method of a plan against its base, and decide its rate and precision.

    Raises:
        ConfigError: no such method or option, or a base it cannot work on.
    """
    entry = check_method(config)
    for option in () if entry.quantized else ("quantization", "device_map"):
        if given := getattr(model, option):
            raise ConfigError(
                f"method {config.name!r} works on the base's own weights: leave model.{option}={given} out"
            )
    if model.device_map and process_count() > 1:
        raise ConfigError(
            f"model.device_map={model.device_map} spreads one model over all devices, and {process_count()} processes "
            "would each do so: start one process, or leave model.device_map out"
        )
    train.accumulation(process_count())  # for its error
    precision = measuring_precision(model, config.name)
    if precision.mixed is torch.float16:
        raise ConfigError(f"method {config.name!r} trains the base itself, not with fp16: use model.dtype bf16 or fp32")
    rate = config.lr or train.lr or entry.lr
    if config.gate_lr is not None:  # adapters keep the ratio, which other trainers read too
        config = config.model_copy(update={"gate_lr": None, "gate_lr_ratio": config.gate_lr / rate})
    return PreparedMethod(config, entry, rate, precision)


def measuring_precision(model: ModelConfig, method: str | None = None) -> Precision:
    """Return the precision in which a method's model is measured: the one it was trained in.

    `method` is the name in an adapter's record; None for a base, or an adapter that we did not write.
    """
    dtype = resolve_dtype(model.dtype, resolve_device(model.device))
    short = str(dtype).removeprefix("torch.")
    if method not in METHODS or not METHODS[method].trains_base:
        return Precision(f"{short}-{model.quantization}" if model.quantization else short, dtype, None)
    if dtype is torch.float32:
        return Precision("float32", dtype, None)
    return Precision(f"float32-autocast-{short}", torch.float32, dtype)


def rules_of(method: PreparedMethod, position: StagePosition, *, seed: int) -> list[TrainingRule]:
    """List what acts on one adaptation beside its loss: the method's own rule, renormalization, then the penalty.

    Args:
        method: the method and its options.
        position: where the adaptation stands in its sequence.
        seed: seed of the choice of rows for EWC.

    Raises:
        ConfigError: what the rules need is not kept with the adapter to continue.
    """
    own = None if method.entry.rule is None else method.entry.rule(method.config, position)
    share, pulled = method.config.renormalize, method.entry.pulled
    pull = None if share is None or pulled is None else Renormalization(share, *pulled)
    return [rule for rule in (own, pull, penalty_of(method.config, position, seed=seed)) if rule is not None]


def attach(
    model: PreTrainedModel,
    config: MethodConfig,
    *,
    seed: int,
    task_type: str = "CAUSAL_LM",
    head: Sequence[str] = (),
    rows: Rows | None = None,
    collate: Collate | None = None,
    shapes_only: bool = False,
) -> nn.Module:
    """Prepare a base model for a method: wrap it in its adapter, or set all its weights to train.

    Args:
        model: the base, changed in place (its modules are wrapped; 'pissa' takes its start out of their weights).
        config: the method and its options.
        seed: seed of random start values, such as LoRA's A.
        task_type: PEFT's word for what the model does.
        head: names of the modules of a new head, trained whole and saved with the adapter.
        rows: training rows, for a method whose start is computed from them.
        collate: function from rows to a batch; default: stack rows of one length.
        shapes_only: neither compute a start from rows nor check the first output, for a model without numbers.

    Returns:
        A `PeftModel`, or the model itself where every weight trains.

    Raises:
        ConfigError: the method cannot work on this base or on the modules chosen, or its rank exceeds every weight.
    """
    method = check_method(config)
    if method.start is not None and rows is None and not shapes_only:
        raise ConfigError(f"method {config.label!r} computes its start from training rows: give attach `rows`")
    before = probe(model) if config.config and not shapes_only else None
    set_seed(seed)
    if method.trains_base:
        if any(parameter.dtype not in (torch.float32, torch.float64) for parameter in model.parameters()):
            raise ConfigError(f"method {config.name!r} updates the base's own weights and needs them in fp32")
        return model.requires_grad_(True)
    with _in_words_of_peft(config):
        configured = peft_config(method, model, config)
        configured.task_type = TaskType(task_type)
        if head:
            _save_with_adapter(configured, head, config)
        _require_rank(model, configured, method, config, head)
        alone = SHAPES_ALONE.set(shapes_only)
        try:
            if method.start is None:
                adapted = get_peft_model(model, configured)
            else:
                data = None if rows is None else StartRows(rows, collate, seed, config.start_rows)
                adapted = method.start(model, configured, data)
        finally:
            SHAPES_ALONE.reset(alone)
        if method.start is None:  # EVA may give a module no rank, and such a module stays as it is
            _require_all_adapted(adapted, config)
    if before is not None:
        _probe_start(adapted, before, config, compare=not head)  # a new head gives other logits
    return adapted


def starts_at_base(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Tell whether logits `(batch, tokens, vocabulary)` of an attached adapter are the base's, within rounding."""
    near = 16 * torch.finfo(before.dtype).eps  # a weight that is taken apart and put together is rounded a few times
    return bool((after - before).abs().max() <= near * before.abs().max())


def _probe_start(model: PeftModel, before: torch.Tensor, config: MethodConfig, *, compare: bool) -> None:
    """Refuse an adapter that cannot compute from tokens alone; warn of one whose first logits are not the base's."""
    try:
        after = probe(model)
    except Exception as error:
        message = f"method {config.label!r} cannot compute from a text's tokens alone: {one_line(error)}"
        raise ConfigError(message) from error
    if compare and not starts_at_base(before, after):
        logger.warning(
            "method %r does not start at the base: with the new adapter a logit is off by %.2g before any training",
            config.label, (after - before).abs().max(),
        )  # fmt: skip


def peft_config(method: Method, model: PreTrainedModel | None, config: MethodConfig) -> PeftConfig:
    """Make PEFT's configuration: the settings of the catalogue's entry, with the plan's options laid over them.

    Without a model, which is enough to check values, "output-projection" and "kappa" are not resolved.
    """
    options = ((key, getattr(config, option)) for option, key in method.options.items() if key)
    given = {key: value for key, value in options if value is not None}
    values: dict[str, Any] = {}
    for key, value in {**method.settings, **given}.items():
        values[key] = value(values) if callable(value) else value
    targets = values.get("target_modules")
    if targets == "output-projection" and model is not None:
        values["target_modules"] = list(default_projections(model.config.to_dict()).attention)
    elif targets == "kappa" and model is not None:
        values["target_modules"] = _best_conditioned(model)
    elif targets is not None and targets != "all-linear":
        values["target_modules"] = [targets] if isinstance(targets, str) else list(targets)
    kind = cast(type[PeftConfig], PEFT_TYPE_TO_CONFIG_MAPPING[cast(Any, method.peft_type)])
    return kind(**values)


def _best_conditioned(model: PreTrainedModel) -> list[str]:
    """Name the fifth of the linear modules with the lowest condition numbers, as KappaTune does."""
    chosen = find_kappa_target_modules(model, show_progress=False)["target_modules"] or []
    head = model.get_output_embeddings()
    return [name for name in chosen if model.get_submodule(name) is not head]


def _require_rank(
    model: PreTrainedModel, configured: PeftConfig, method: Method, config: MethodConfig, head: Sequence[str]
) -> None:
    """Refuse a rank above the smaller side of every adapted weight; warn of a rank above that of some."""
    if config.rank is None or method.shared:
        return
    matched = matched_modules(with_named_targets(configured, model), model)
    linear = {
        name: module
        for name, module in matched.items()
        if isinstance(module, nn.Linear | Conv1D) and not {*head} & {*name.split(".")}  # a head trains whole
    }
    sides = {name: cast(tuple[int, int], _get_in_out_features(module)[::-1]) for name, module in linear.items()}
    narrow = [name for name in sides if min(sides[name]) < config.rank]
    if not narrow:
        return
    problem = f"method {config.label!r}: rank {config.rank} is more than the smaller side of"
    if len(narrow) == len(sides):
        widest = max(sides, key=lambda name: min(sides[name]))
        rows, columns = sides[widest]
        raise ConfigError(
            f"{problem} every weight it would adapt, the largest being {widest} ({rows} x {columns}): choose a rank of "
            f"at most {min(rows, columns)}"
        )
    rows, columns = sides[narrow[0]]
    counts = f"{len(narrow)} of {len(sides)} weights it adapts, such as {narrow[0]} ({rows} x {columns})"
    logger.warning("%s %s", problem, counts)


def _save_with_adapter(peft_config: PeftConfig, head: Sequence[str], config: MethodConfig) -> None:
    """Have PEFT train and save a head; those that it calls a classifier's it finds by itself."""
    if not hasattr(peft_config, "modules_to_save"):
        raise ConfigError(f"method {config.name!r} has no way to train a new head beside it; choose another method")
    cast(Any, peft_config).modules_to_save = [name for name in head if name not in SEQ_CLS_HEAD_NAMES] or None


def _require_all_adapted(model: PeftModel, config: MethodConfig) -> None:
    """Refuse a method of PEFT that silently passed over a layer of a kind it does not know."""
    tuner: Any = model.base_model
    for name in getattr(tuner, "targeted_module_names", ()):
        module = tuner.model.get_submodule(name)
        if not isinstance(module, BaseTunerLayer):
            raise ConfigError(
                f"method {config.label!r} cannot be attached to this base: it has no form for {name} "
                f"({type(module).__name__}); choose other targets"
            )


def trainable_parameters(model: nn.Module) -> int:
    """Count the parameters that require a gradient."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
