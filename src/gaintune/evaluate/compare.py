"""Measure a base and adapters on it on the same blocks; each adapter is attached while it is measured."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from gaintune.adapters import BASE, adapter_labels, attached, check_adapters, load_adapter, read_record
from gaintune.config import DomainConfig, Plan
from gaintune.data import DomainBlocks, MaskedBlocks, load_domain, load_masked_blocks
from gaintune.errors import AdapterError, ConfigError
from gaintune.evaluate.perplexity import measure_domain, measure_masked
from gaintune.methods import Precision, measuring_precision
from gaintune.models import Base, load_base, load_classifier, load_masked, longest_input, without_adapter
from gaintune.progress import Progress
from gaintune.results import DomainLoss, paired_change

T = TypeVar("T")
F = TypeVar("F")

Measure = Callable[[nn.Module, str, torch.dtype | None], T]
"""Measures a model, given the model, its label, and the autocast dtype to measure it in, if any."""


@dataclass(frozen=True)
class Measured(Generic[T]):
    """Results for an adapter, and for the untouched base in the same precision."""

    label: str
    adapted: T
    base: T


def measure_base_and_adapters(
    plan: Plan,
    adapters: Sequence[Path],
    load: Callable[..., Base],
    prepare: Callable[[Base], Measure[T]],
    *,
    allow_other_base: bool = False,
) -> tuple[T, list[Measured[T]]]:
    """Measure the plan's untouched base, and then each adapter on it.

    An adapter is measured in the precision it was trained in, and against the base in the same. The base is loaded once
    for each precision, and is itself again after each adapter (`attached`). The base that is returned first is in the
    precision of the first adapter.

    Args:
        load: makes the base of `plan.model` and a `dtype`.
        prepare: makes the measure of models, once the first base is there.

    Raises:
        ConfigError: an adapter named twice.
        AdapterError, BaseMismatchError: as `attached`.
    """
    labels = adapter_labels(adapters)
    precisions = [_precision(plan, folder) for folder in adapters] or [measuring_precision(plan.model, None)]
    untouched: dict[Precision, T] = {}
    adapted: dict[str, T] = {}
    measure: Measure[T] | None = None
    for precision in dict.fromkeys(precisions):
        base = load(plan.model, dtype=precision.load)
        measure = measure or prepare(base)
        untouched[precision] = measure(base.model, BASE, precision.mixed)
        for label, folder, own in zip(labels, adapters, precisions, strict=False):
            if own == precision:
                with attached_to_language_model(base, folder, plan, allow_other_base=allow_other_base) as model:
                    adapted[label] = measure(model, label, precision.mixed)
                gc.collect()  # an adapted model refers to itself
        del base
    measured = [Measured(label, adapted[label], untouched[own]) for label, own in zip(labels, precisions, strict=False)]
    return untouched[precisions[0]], measured


def _precision(plan: Plan, folder: Path) -> Precision:
    """Return the precision to measure an adapter in."""
    record = read_record(folder)
    return measuring_precision(plan.model, record.method if record else None)


@contextlib.contextmanager
def attached_to_language_model(
    base: Base, folder: Path, plan: Plan, *, allow_other_base: bool = False
) -> Iterator[nn.Module]:
    """Attach an adapter to the language model of `base`, causal or masked, for the block.

    Of a classifier the backbone is attached. It is loaded whole, as `load_adapter` does, which finds missing and
    superfluous weights, and then replaces the backbone under the original language-model head (DISeL, arXiv 2605.19028,
    appendix II.5).

    Raises:
        AdapterError, BaseMismatchError: as `load_adapter`; or a backbone of another class than the base's.
        BaseModelError: the base has no classifier of its kind.
    """
    record = read_record(folder)
    if record is None or not record.labels:
        with attached(base, folder, allow_other_base=allow_other_base) as (model, _):
            yield model
        return
    classifier = load_classifier(plan.model, record.labels, seed=0, dtype=base.model.dtype)
    adapted = load_adapter(classifier, folder, allow_other_base=allow_other_base)
    backbone = without_adapter(adapted).base_model
    model = base.model
    original: Any = model.base_model
    if type(backbone) is not type(original):
        raise AdapterError(f"{folder}: its backbone is a {type(backbone).__name__}, not {base.name!r}'s")
    setattr(model, model.base_model_prefix, backbone)
    try:
        yield model.eval()
    finally:
        setattr(model, model.base_model_prefix, original)


def paired_figures(
    base: list[T], adapted: list[Measured[list[T]]], figure: Callable[[int, str, T, T | None], F]
) -> list[F]:
    """Make the figures of each domain: the base's, then the adapters' in their order.

    `figure` makes a figure of a domain's number, a label, a result, and the base's result (None for the base itself).
    """
    figures = []
    for number, result in enumerate(base):
        figures.append(figure(number, BASE, result, None))
        figures += [figure(number, one.label, one.adapted[number], one.base[number]) for one in adapted]
    return figures


@dataclass(frozen=True)
class PerplexityFigure:
    """A model on a domain; `change` and its interval in % of the base's perplexity, None for the base itself.

    Running text has bits per byte; a masked language model has the number of masked tokens behind its perplexity.
    """

    domain: str
    label: str
    perplexity: float
    bits_per_byte: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    masked: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without what this kind of perplexity does not have."""
        optional = {"bits_per_byte", "masked"}
        return {name: value for name, value in asdict(self).items() if name not in optional or value is not None}


def compare_adapters(
    plan: Plan, adapters: Sequence[Path], *, allow_other_base: bool = False, progress: Progress | None = None
) -> list[PerplexityFigure]:
    """Measure the plan's base, and every adapter on it, on the plan's domains.

    Of a classifier the backbone is measured, under the base's own language-model head.

    Returns:
        For each domain the base, then the adapters in the order given, labelled by their folders. An adapter is
        measured in the precision it was trained in, and compared with the base in the same; the base shown is that of
        the first adapter.

    Raises:
        AdapterError, BaseMismatchError: an adapter that is damaged or of another base.
    """
    check_adapters(adapters, plan.model, plan.data, allow_other_base=allow_other_base)

    def prepare(base: Base) -> Measure[list[DomainLoss]]:
        domains = [load_domain(domain, plan.data, base.tokenizer) for domain in plan.data.measured]

        def measure(model: nn.Module, label: str, mixed: torch.dtype | None) -> list[DomainLoss]:
            of_domain = partial(measure_domain, base=plan.model.name if label == BASE else None)
            return _losses(of_domain, domains, plan, progress, model, label, mixed)

        return measure

    return _compare(plan, adapters, load_base, prepare, plan.data.measured, allow_other_base)


def compare_masked(
    plan: Plan, adapters: Sequence[Path], *, allow_other_base: bool = False, progress: Progress | None = None
) -> list[PerplexityFigure]:
    """Measure masked-LM perplexity of the plan's encoder, and with every adapter, on the plan's domains of text.

    This is how the DISeL paper measures what RoBERTa forgets (arXiv 2605.19028, section 4.1 and appendix II.5): an
    adapter's own head is left out, and the encoder gets the masked-LM head it was pretrained with. The masked tokens
    are the same for every model (`load_masked_blocks`, with `data.seed`), so models are compared block by block.

    Returns:
        For each domain the base, then the adapters in the order given, labelled by their folders.

    Raises:
        AdapterError, BaseMismatchError: an adapter that is damaged or of another base.
        BaseModelError: the base is no encoder with a masked-LM head.
        ConfigError: blocks longer than the encoder takes, `data.beginning_of_text`, or an adapter named twice.
    """
    data = plan.data
    if data.beginning_of_text != "auto":
        raise ConfigError("data.beginning_of_text is for decoders: an encoder's special tokens are around every block")
    check_adapters(adapters, plan.model, data, allow_other_base=allow_other_base)

    def prepare(base: Base) -> Measure[list[DomainLoss]]:
        longest = longest_input(base.model, base.tokenizer)
        if longest is not None and data.block_size > longest:
            raise ConfigError(
                f"data.block_size is {data.block_size}, but model {base.name!r} takes {longest} tokens at most"
            )
        domains = [load_masked_blocks(domain, data, base.tokenizer, seed=data.seed) for domain in data.domains]
        return partial(_losses, measure_masked, domains, plan, progress)

    return _compare(plan, adapters, load_masked, prepare, data.domains, allow_other_base)


def _losses(
    measure: Callable[..., DomainLoss],
    domains: Sequence[DomainBlocks] | Sequence[MaskedBlocks],
    plan: Plan,
    progress: Progress | None,
    model: nn.Module,
    label: str,
    mixed: torch.dtype | None,
) -> list[DomainLoss]:
    """Measure a model on every domain."""
    options = {"batch_size": plan.evaluate.batch_size, "mixed_precision": mixed, "progress": progress}
    return [measure(model, domain, title=f"{label}: measuring {domain.name}", **options) for domain in domains]


def _compare(
    plan: Plan,
    adapters: Sequence[Path],
    load: Callable[..., Base],
    prepare: Callable[[Base], Measure[list[DomainLoss]]],
    domains: Sequence[DomainConfig],
    allow_other_base: bool,
) -> list[PerplexityFigure]:
    """Measure a base and adapters, and pair their losses block by block."""

    def figure(number: int, label: str, loss: DomainLoss, base: DomainLoss | None) -> PerplexityFigure:
        name = domains[number].name
        paired = (None, None, None) if base is None else astuple(paired_change(base, loss, name, plan.evaluate))
        change, low, high = paired
        bits, masked = (None, sum(loss.tokens)) if loss.bytes is None else (loss.bits_per_byte, None)
        return PerplexityFigure(name, label, loss.perplexity, bits, change, low, high, masked)

    before, adapted = measure_base_and_adapters(plan, adapters, load, prepare, allow_other_base=allow_other_base)
    return paired_figures(before, adapted, figure)
