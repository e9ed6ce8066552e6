"""The catalogue of methods: one entry for each, with its default rate, its options and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from gaintune.config import MethodConfig
from gaintune.errors import ConfigError
from gaintune.methods import peft_configs
from gaintune.methods.rules import BudgetSchedule, GainWarnings, Place, StageRule, SubspaceProjection
from gaintune.tuners import GATES

LORA_PLUS_RATIO = 16.0


@dataclass(frozen=True)
class Method:
    """One way to adapt a model.

    Attributes:
        name: what users type.
        description: one line for `gaintune methods`.
        lr: default peak learning rate.
        options: fields of `MethodConfig` the method understands, beside `lr` and `label`.
        needs: what it costs or asks for.
        build: makes the PEFT configuration; None where every weight of the base trains.
        kind: what `build` makes, in the words of `peft_configs.kind_of`.
        rates: rate multipliers by part of a parameter's name, as in `parameter_groups`; None where all learn alike.
        quantized: whether the base may be quantized.
        rule: makes what acts on every update of one adaptation, for its place in the sequence; None where nothing does.
    """

    name: str
    description: str
    lr: float
    options: frozenset[str]
    needs: str
    build: peft_configs.Build | None
    kind: str | None = None
    rates: Callable[[MethodConfig], Mapping[str, float]] | None = None
    quantized: bool = True
    rule: Callable[[MethodConfig, Place], StageRule] | None = None

    @property
    def trains_base(self) -> bool:
        """Whether the base's own weights train: they are then kept in fp32, with mixed precision around them."""
        return self.build is None


_FROZEN = "frozen base"
_LOW_RANK = frozenset({"rank", "alpha", "targets"})

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "gain",
            "one gain per feature at the attention output projection",
            0.01,
            frozenset({"targets"}),
            f"{_FROZEN}; gains only (fp32)",
            peft_configs.gain(ffn=False),
            "GAIN",
            rule=lambda config, place: GainWarnings(),
        ),
        Method(
            "gain-ffn",
            "GAIN, and one gain per hidden feature of the FFN",
            0.01,
            frozenset({"targets"}),
            f"{_FROZEN}; gains only (fp32)",
            peft_configs.gain(ffn=True),
            "GAIN",
            rule=lambda config, place: GainWarnings(),
        ),
        Method(
            "disel",
            "DISeL: LoRA with a gate a token on every rank-one part; rank 8 on all linear layers unless told otherwise",
            0.002,
            _LOW_RANK | {"gate_bias", "gate_lr_ratio", "gate_rank"},
            f"{_FROZEN}; three thin matrices a module (fp32); cannot be merged",
            peft_configs.disel("sigmoid"),
            "DISEL sigmoid",
            rates=lambda config: {} if config.gate_lr_ratio is None else {GATES: config.gate_lr_ratio},
        ),
        Method(
            "gated-lora",
            "Gated LoRA: LoRA behind a ReLU of its own features; rank 8 on all linear layers unless told otherwise",
            0.002,
            _LOW_RANK,
            f"{_FROZEN}; two thin matrices a module (fp32); cannot be merged",
            peft_configs.disel("relu"),
            "DISEL relu",
        ),
        Method(
            "ia3",
            "(IA)3: scales keys, values and FFN activations",
            0.01,
            frozenset(),
            f"{_FROZEN}; vectors only (fp32)",
            peft_configs.ia3,
            "IA3",
        ),
        Method(
            "lora",
            "LoRA; rank 1 on the attention output projection unless told otherwise",
            0.01,
            _LOW_RANK,
            f"{_FROZEN}; two thin matrices a module (fp32)",
            peft_configs.lora(),
            "LORA",
        ),
        Method(
            "lora+",
            "LoRA whose B learns faster than its A (16 times unless told otherwise)",
            0.002,
            _LOW_RANK | {"lr_ratio"},
            f"{_FROZEN}; two thin matrices a module (fp32)",
            peft_configs.lora(),
            "LORA",
            rates=lambda config: {"lora_B": LORA_PLUS_RATIO if config.lr_ratio is None else config.lr_ratio},
        ),
        Method(
            "dora",
            "DoRA: LoRA for the direction of a weight, and its length a column; modules and rank as in lora",
            0.01,
            _LOW_RANK,
            f"{_FROZEN}; the whole weight is put together in every forward pass: slower, more memory",
            peft_configs.lora(use_dora=True),
            "LORA use_dora",
        ),
        Method(
            "pissa",
            "PiSSA: LoRA that starts as the largest part of the weight; modules and rank as in lora",
            0.002,
            _LOW_RANK,
            "an exact SVD of every adapted weight at each start and load; not for quantized bases",
            peft_configs.lora(init_lora_weights="pissa"),
            "LORA pissa",
            quantized=False,
        ),
        Method(
            "adalora",
            "AdaLoRA: rank 8 on average over all linear layers, from 12 in each, by importance",
            0.01,
            _LOW_RANK | {"orthogonality"},
            f"{_FROZEN}; the number of updates of all domains, known from the plan; three numbers for each trained one",
            peft_configs.adalora,
            "ADALORA",
            rule=BudgetSchedule,
        ),
        Method(
            "hira",
            "HiRA: every weight times 1 + BA; rank 8 on all linear layers unless told otherwise",
            0.01,
            frozenset({"rank", "targets"}),
            f"{_FROZEN}; a matrix of the weight's size for every module in a forward pass: slower, more memory",
            peft_configs.hira,
            "HIRA",
        ),
        Method(
            "vera",
            "VeRA: two vectors a module around one pair of random matrices; rank 256 on all linear layers",
            0.05,
            frozenset({"rank", "targets"}),
            f"{_FROZEN}; vectors only (fp32), and the shared matrices on disk",
            peft_configs.vera,
            "VERA",
        ),
        Method(
            "osf",
            "OSF: trains the smaller half of every weight's singular directions, apart from the larger half",
            1e-4,
            frozenset({"targets", "preserved"}),
            "an SVD of every weight at each start and load; about full's memory (fp32); not for quantized bases",
            peft_configs.osf,
            "OSF",
            quantized=False,
            rule=lambda config, place: SubspaceProjection(),
        ),
        Method(
            "full",
            "every weight of the base trains",
            2e-5,
            frozenset(),
            "fp32 weights, gradients and AdamW's two averages: 16 bytes a parameter; not for quantized bases",
            None,
            quantized=False,
        ),
    )
}


def get_method(name: str) -> Method:
    """Look a method up, naming the nearest one for a typo."""
    if name in METHODS:
        return METHODS[name]
    near = get_close_matches(name, METHODS, n=1)
    advice = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown method {name!r}; {advice}known methods: {', '.join(METHODS)}")
