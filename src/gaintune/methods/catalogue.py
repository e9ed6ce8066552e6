"""The catalogue of methods: one entry says all that the rest of the package knows of a method.

To add a method of PEFT, add an entry to `METHODS`: the name of PEFT's configuration, the values it begins with, and
which options of a plan replace them. An entry is a preset: `configured_method` lays a plan's `config` over it, and
makes an entry for a type that has none. Importing this module loads neither PEFT nor a model, so that adapters are
recognized in no time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from math import ceil
from typing import Any, Literal, NamedTuple, cast

import torch
from pydantic import ValidationError

from gaintune.config import ANY_METHOD, MethodConfig
from gaintune.errors import ConfigError
from gaintune.methods.branches import BranchGrowth
from gaintune.methods.rules import (
    BudgetSchedule,
    GainWarnings,
    IntruderReduction,
    StagePosition,
    SubspaceProjection,
    TrainingRule,
)
from gaintune.methods.starts import FrozenStart, Start, corda, eva, lora_ga
from gaintune.tuners import GATES

LORA_PLUS_RATIO = 16.0
ADALORA_START = 1.5  # PEFT's proportion of the rank at the start to the average one at the end, 12 to 8

ANY_LR = 0.002  # the rate of a PEFT type that the catalogue has no entry for
_OPTIONS_BY_FIELD = (("rank", "r"), ("alpha", "alpha"), ("alpha", "lora_alpha"), ("targets", "target_modules"))
_OF_A_RUN = ("total_step",)  # what PEFT refuses to be without, and only a run's schedule knows
_VIRTUAL_TOKENS = "trains virtual tokens before a text, and rows of packed texts have no place for them"
_UNFIT = {
    "POLY": "wants the number of a task with every row, and rows have none",
    "XLORA": "mixes the adapters in other folders, which an adapter's own folder would need at every load",
}
_DECIDED_HERE = (
    "peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version",
)  # fmt: skip

VARIANT_MARKS = (
    "gate_kind", "use_dora", "velora_config", "alora_invocation_tokens", "monteclora_config",
    "use_bdlora", "arrow_config", "kasa_config", "use_qalora", "output_modules",
)  # fmt: skip
"""Keys of a PEFT configuration that, where they are set, make it another method's than its type alone says."""


class FactorTensor(NamedTuple):
    """The saved tensor that holds a method's factors: the end of its name, and what is added to make the factor."""

    name: str
    start: float


@dataclass(frozen=True)
class Method:
    """One way to adapt a model.

    Attributes:
        name: what users type.
        description: one line for `gaintune methods`.
        lr: default peak learning rate.
        options: fields of `MethodConfig` that the method understands, beside `lr` and `label`, each with the key of
            PEFT's configuration that holds it; None where it holds for training alone.
        needs: what it costs or asks for.
        peft_type: PEFT's name of its configuration; None where every weight of the base trains.
        settings: values of PEFT's configuration where a plan says nothing, in order: a function makes a value from
            those before it. `target_modules` may also be "output-projection", where GAIN acts.
        rates: rate multipliers by part of a parameter's name, as in `parameter_groups`.
        rule: makes what acts on every update of one adaptation, for its place in the sequence; None where nothing does.
        quantized: whether the base may be quantized.
        shared: whether all modules share its matrices, so that its rank may exceed the sides of their weights.
        merges: whether an adapter can become a change of weights; where there are gates, it cannot anyway.
        factors: the tensor of its factors; None where it multiplies no features.
        line: how an adapter is moved along the line from the base through it: by its "gains", by the "scale" of plain
            LoRA's B A, "gated" (by the scale of an update that depends on the input), or by the merged "weights", which
            every other method that merges can do.
        borders: whether it acts at the border of two domains, so that a stream without borders cannot train it.
        start: attaches the method with a start that is computed from training rows, of the first domain in a sequence;
            None where the start needs none.
    """

    name: str
    description: str
    lr: float
    options: Mapping[str, str | None]
    needs: str
    peft_type: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    rates: Callable[[MethodConfig], Mapping[str, float]] = lambda config: {}
    rule: Callable[[MethodConfig, StagePosition], TrainingRule | None] | None = None
    quantized: bool = True
    shared: bool = False
    merges: bool = True
    factors: FactorTensor | None = None
    line: Literal["gains", "scale", "gated", "weights"] = "weights"
    borders: bool = False
    start: Start | None = None

    @property
    def trains_base(self) -> bool:
        """Whether the base's own weights train: they are then kept in fp32, with mixed precision around them."""
        return self.peft_type is None

    @property
    def gates(self) -> bool:
        """Whether its update depends on the input, through gates, so that it is no change of weights."""
        return self.line == "gated"

    @property
    def pulled(self) -> tuple[str, float] | None:
        """The tensor that `renormalize` pulls to its value at the base, and that value; None where there is none."""
        if self.factors is not None:
            return self.factors.name, 1.0 - self.factors.start
        return ("lora_B", 0.0) if self.line == "scale" else None

    @property
    def kind(self) -> str | None:
        """The kind of PEFT's configuration, as `kind_of` names it; None where there is none."""
        return None if self.trains_base else kind_of({"peft_type": self.peft_type, **self.settings})


_FROZEN = "frozen base"
_THIN = f"{_FROZEN}; two thin matrices a module (fp32)"
_TARGETS = {"targets": "target_modules"}
_RANKED = {"rank": "r", **_TARGETS}
_LOW_RANK = {**_RANKED, "alpha": "lora_alpha"}
_PLAIN = {**_LOW_RANK, "intruders": None}


def _twice_the_rank(chosen: Mapping[str, Any]) -> float:
    return 2.0 * chosen["r"]


_LORA = {"r": 1, "lora_alpha": _twice_the_rank, "target_modules": "output-projection"}
_DISEL = {"r": 8, "lora_alpha": _twice_the_rank, "target_modules": "all-linear"}


def _intruder_rule(config: MethodConfig, position: StagePosition) -> TrainingRule | None:
    return None if config.intruders is None else IntruderReduction(config.intruders)


def _gain(name: str, description: str, **settings: bool) -> Method:
    return Method(
        name, description, 0.01, _TARGETS, f"{_FROZEN}; gains only (fp32)", "GAIN", settings,
        rule=lambda config, position: GainWarnings(), factors=FactorTensor("gain_v", 1.0), line="gains",
    )  # fmt: skip


def _from_rows(name: str, description: str, lr: float, init: str, start: Start, *, frozen: bool) -> Method:
    doubled = "; twice the rank on disk and in memory, half of it fixed; not for quantized bases" if frozen else ""
    return Method(
        name, description, lr, {**_LOW_RANK, "start_rows": None},
        f"{_FROZEN}; a pass over training rows before the first update{doubled}", "LORA",
        {**_LORA, "init_lora_weights": init, f"{init}_config": {}},
        rule=(lambda config, position: FrozenStart()) if frozen else None, quantized=not frozen, start=start,
    )  # fmt: skip


_ENTRIES = (
    _gain("gain", "one gain per feature at the attention output projection", ffn=False),
    _gain("gain-ffn", "GAIN, and one gain per hidden feature of the FFN", ffn=True),
    Method(
        "disel",
        "DISeL: LoRA with a gate a token on every rank-one part; by default rank 8 on all linear layers",
        0.002,
        {
            **_LOW_RANK, "gate_bias": "gate_bias_init", "gate_lr_ratio": "gate_lr_ratio", "gate_lr": None,
            "gate_rank": "gate_rank",
        },
        f"{_FROZEN}; three thin matrices a module (fp32); cannot be merged",
        "DISEL",
        {**_DISEL, "gate_kind": "sigmoid"},
        rates=lambda config: {} if config.gate_lr_ratio is None else {GATES: config.gate_lr_ratio},
        line="gated",
    ),
    Method(
        "gated-lora",
        "Gated LoRA: LoRA behind a ReLU of its own features; by default rank 8 on all linear layers",
        0.002, _LOW_RANK, f"{_FROZEN}; two thin matrices a module (fp32); cannot be merged",
        "DISEL", {**_DISEL, "gate_kind": "relu"}, line="gated",
    ),
    Method(
        "ia3", "(IA)3: scales keys, values and FFN activations", 0.01, {}, f"{_FROZEN}; vectors only (fp32)",
        "IA3", factors=FactorTensor("ia3_l", 0.0),
    ),
    Method(
        "lora", "LoRA; by default rank 1 on the attention output projection",
        0.01, _PLAIN, _THIN, "LORA", _LORA, rule=_intruder_rule, line="scale",
    ),
    Method(
        "lora+", "LoRA whose B trains faster than its A, by default 16 times",
        0.002, {**_PLAIN, "lr_ratio": None}, _THIN, "LORA", _LORA, rule=_intruder_rule,
        rates=lambda config: {"lora_B": LORA_PLUS_RATIO if config.lr_ratio is None else config.lr_ratio}, line="scale",
    ),
    Method(
        "dora", "DoRA: LoRA for the direction of a weight, and its length a column; modules and rank as in lora",
        0.01, _LOW_RANK, f"{_FROZEN}; the whole weight is put together in every forward pass: slower, more memory",
        "LORA", {**_LORA, "use_dora": True},
    ),
    Method(
        "pissa", "PiSSA: LoRA that starts as the largest part of the weight; modules and rank as in lora",
        0.002, _LOW_RANK, "an exact SVD of every adapted weight at each start and load; not for quantized bases",
        "LORA", {**_LORA, "init_lora_weights": "pissa"}, quantized=False,
    ),
    Method(
        "adalora",
        "AdaLoRA: rank 8 on average over all linear layers, from 12 in each, by importance",
        0.01,
        {**_LOW_RANK, "rank": "target_r", "orthogonality": None},
        f"{_FROZEN}; the number of updates of all domains, known from the plan; three numbers for each trained one",
        "ADALORA",
        {
            "target_r": 8,
            "init_r": lambda chosen: ceil(ADALORA_START * chosen["target_r"]),
            "lora_alpha": lambda chosen: 2.0 * chosen["init_r"],
            "target_modules": "all-linear",
            "total_step": 1,  # how many updates there will be is not known yet: `BudgetSchedule` sets it
        },
        rule=BudgetSchedule,
    ),
    Method(
        "hira", "HiRA: every weight times 1 + BA; by default rank 8 on all linear layers",
        0.01, _RANKED,
        f"{_FROZEN}; a matrix of the weight's size for every module in a forward pass: slower, more memory",
        "HIRA", {"r": 8, "target_modules": "all-linear"},
    ),
    Method(
        "vera",
        "VeRA: two vectors a module around one pair of random matrices; rank 256 on all linear layers",
        0.05,
        _RANKED,
        f"{_FROZEN}; vectors only (fp32), and the shared matrices on disk",
        "VERA",
        {
            "r": 256,
            "target_modules": "all-linear",
            "projection_prng_key": lambda chosen: torch.initial_seed(),  # which `attach` has set
            "save_projection": True,
        },
        shared=True,
    ),
    Method(
        "osf", "OSF: trains the smaller half of every weight's singular directions, apart from the larger half",
        1e-4, {**_TARGETS, "preserved": "effective_rank"},
        "an SVD of every weight at each start and load; about full's memory (fp32); not for quantized bases",
        "OSF", {"effective_rank": 0.5, "target_modules": "all-linear"},
        rule=lambda config, position: SubspaceProjection(), quantized=False,
    ),
    _from_rows(
        "lora-ga", "LoRA-GA: LoRA that starts along the main directions of the gradient; modules and rank as in lora",
        0.002, "lora_ga", lora_ga, frozen=True,
    ),
    _from_rows(
        "corda", "CorDA: LoRA that starts at the parts of a weight that act most on its inputs; rank as in lora",
        0.002, "corda", corda, frozen=True,
    ),
    _from_rows(
        "eva", "EVA: LoRA whose A starts at the main directions of a module's inputs; modules and mean rank as in lora",
        0.01, "eva", eva, frozen=False,
    ),
    Method(
        "full", "every weight of the base trains", 2e-5, {},
        "fp32 weights, gradients and AdamW's two averages: 16 bytes a parameter; not for quantized bases",
        None, quantized=False,
    ),
    Method(
        "svft", "SVFT: one number per singular direction of the attention output projection, added to its value",
        0.05, {**_TARGETS, "off_diagonals": "off_diagonals"},
        "an SVD of every adapted weight at each start and load; about twice its memory beside it; not for quantized "
        "bases",
        "SVFT", {"target_modules": "output-projection"}, quantized=False,
    ),
    Method(
        "gainlora",
        "GainLoRA: a LoRA branch a domain behind a gate that is shut on earlier domains; rank 8 where lora acts",
        0.002, {**_LOW_RANK, "preserved": "shut"},
        f"{_FROZEN}; branches that grow with the domains (fp32), and directions of their inputs; cannot be merged",
        "GAINLORA", {"r": 8, "lora_alpha": _twice_the_rank, "target_modules": "output-projection"},
        rule=BranchGrowth, merges=False, borders=True,
    ),
    _gain("gain-ia3", "GAIN-FFN and (IA)3 together: gains on keys and values too", ffn=True, output_modules=True),
)  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for method in _ENTRIES}


def get_method(name: str) -> Method:
    """Look up a method; a ConfigError names the nearest one for a typo."""
    if name in METHODS:
        return METHODS[name]
    kind = name.upper()
    near = [f"{ANY_METHOD}:{kind}"] if kind in _peft_types() else get_close_matches(name, METHODS, n=1)
    advice = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown method {name!r}; {advice}known methods: {', '.join(METHODS)}, {ANY_METHOD}:TYPE")


def configured_method(config: MethodConfig) -> Method:
    """Return a method's entry with the fields that a plan gives of PEFT's configuration laid over its settings.

    A type of PEFT has PEFT's own settings. If the catalogue has an entry for it, rule, rate and abilities are those of
    the entry. Nothing is loaded.

    Raises:
        ConfigError: no such method, type or field; a field that an option sets, or that is decided here.
    """
    given = dict(config.config or {})
    entry = _entry_of_type(given, config.label) if config.name == ANY_METHOD else get_method(config.name)
    if not given:
        return entry
    if entry.peft_type is None:
        raise ConfigError(f"method {config.name!r} has no option {next(iter(given))!r}; remove it")
    options = {key: option for option, key in entry.options.items() if key}
    for key in given:
        option = options.get(key)
        if option and (config.name != ANY_METHOD or getattr(config, option) is not None):
            raise ConfigError(f"method {config.name!r}: {key} is what its option {option!r} sets: give {option} alone")
        _require_field(key, entry, config)
    chosen = replace(entry, settings={**entry.settings, **given})
    like = recognize({"peft_type": chosen.peft_type, **chosen.settings})
    if chosen.kind == entry.kind:
        return chosen
    if like is None:
        return replace(chosen, line="weights")
    options = {option: key for option, key in entry.options.items() if option != "intruders" or option in like.options}
    own = {name: getattr(chosen, name) for name in ("name", "lr", "rates", "settings")}  # LoRA+ keeps its ratio
    return replace(like, options=options, **own)  # it is another method's, as LoRA with `use_dora` is DoRA


def _entry_of_type(given: dict[str, Any], label: str) -> Method:
    """Make the entry of a type of PEFT, and take the type out of the fields `given`."""
    known, named = _peft_types(), str(given.pop("peft_type", ""))
    if named not in known:
        near = get_close_matches(named.upper(), known, n=3)
        advice = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(
            f"method {label!r}: PEFT has no type {named!r}; {advice}write {ANY_METHOD}:TYPE:field=value, or in a "
            f"plan config: {{peft_type: TYPE}}. This PEFT has {', '.join(sorted(known))}"
        )
    defaults, prompts = known[named]
    why = _UNFIT.get(named) or (_VIRTUAL_TOKENS if prompts else None)
    if why:
        raise ConfigError(f"method {label!r}: {named} {why}; choose another type")
    marks = {key: defaults[key] for key in VARIANT_MARKS if defaults.get(key)}
    like = recognize({"peft_type": named, **marks, **given})
    if like is not None:
        own = {key: like.settings[key] for key in _OF_A_RUN if key in like.settings}
        return replace(like, name=ANY_METHOD, settings={**marks, **own})
    options = {name: key for name, key in _OPTIONS_BY_FIELD if key in defaults}
    description = f"PEFT's {named}, with PEFT's own settings"
    return Method(ANY_METHOD, description, ANY_LR, options, "as PEFT says", named, marks)


def _require_field(key: str, entry: Method, config: MethodConfig) -> None:
    """Refuse what is no field of a method's PEFT configuration, or one that is decided here."""
    known = _peft_types()[str(entry.peft_type)].defaults
    if key in _DECIDED_HERE:
        raise ConfigError(f"method {config.label!r}: {key} is decided by gaintune; leave it out")
    if key in known:
        return
    free = sorted({*known} - {*_DECIDED_HERE, *(entry.options.values() if config.name != ANY_METHOD else ())})
    common = (option for option in MethodConfig.model_fields if option != "config")
    near = get_close_matches(key, [*common, *free], n=1)
    advice = f"did you mean {near[0]!r}? " if near else ""
    own = f"Its options are {', '.join(entry.options)}; " if entry.options else ""
    raise ConfigError(
        f"method {config.label!r} has no option {key!r}; {advice}{own}PEFT's configuration of {entry.peft_type} has "
        f"the fields {', '.join(free)}"
    )


class _Fields(NamedTuple):
    """Fields of a PEFT configuration with their defaults, and whether it trains virtual tokens."""

    defaults: Mapping[str, Any]
    prompts: bool


@cache
def _peft_types() -> dict[str, _Fields]:
    """Return the fields of every configuration that is registered with PEFT, by its type."""
    from peft import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import gaintune.tuners  # noqa: F401  # registers ours

    return {
        str(getattr(kind, "value", kind)): _Fields(
            {item.name: None if item.default is MISSING else item.default for item in fields(cast(Any, config))},
            issubclass(config, PromptLearningConfig),
        )
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }


def kind_of(config: Mapping[str, Any]) -> str:
    """Name the kind of adapter that an `adapter_config.json` describes: PEFT's type, and what marks a variant of it.

    "LORA use_dora", "LORA pissa" and "DISEL relu" are other methods than "LORA" and "DISEL sigmoid".
    """
    marks = [value if isinstance(value := config[key], str) else key for key in VARIANT_MARKS if config.get(key)]
    init = str(config.get("init_lora_weights"))
    marks += [name for name in ("pissa", "corda", "eva", "lora_ga") if init.startswith(name)]
    return " ".join([str(config.get("peft_type")), *marks])


def recognize(config: Mapping[str, Any], name: str | None = None) -> Method | None:
    """Find the method whose adapter an `adapter_config.json` describes, None where the catalogue has none.

    Of several methods with adapters of one kind (lora, lora+, gain, gain-ffn) it is the one of that `name`, else the
    first.
    """
    kind = kind_of(config)
    alike = {method.name: method for method in METHODS.values() if method.kind == kind}
    return alike.get(str(name)) or next(iter(alike.values()), None)


def stored_options(method: Method, config: Mapping[str, Any], names: Collection[str] = ()) -> MethodConfig:
    """Read a method's options, and the fields of PEFT called `names`, from an adapter's `adapter_config.json`."""
    found: dict[str, Any] = {"name": method.name, "config": {key: config.get(key) for key in names} or None}
    for option, key in method.options.items():
        if key in names:
            continue
        try:
            MethodConfig.model_validate({"name": method.name, option: config.get(str(key))})
        except ValidationError:
            continue  # a value that a plan has no words for, such as OSF's rank as a count
        found[option] = config.get(str(key))
    return MethodConfig.model_validate(found)
