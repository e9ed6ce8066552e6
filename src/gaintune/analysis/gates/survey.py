"""An adapter's gates over the validation rows of several domains: recorded, summarized and compared.

Modules of one adapter are no sample of anything, so nothing is resampled over them: they are a fixed set. Intervals say
what other text would have given, and are a bootstrap over rows. Rows of two domains are two samples, each resampled by
itself; two parts of the model are paired, since they saw the same rows.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from gaintune.adapters import check_adapters, load_adapter
from gaintune.analysis.gates import CLOSED, OPEN, GatesOptions, check_bins
from gaintune.analysis.positions import DEPTHS, ModulePosition, positions_of
from gaintune.analysis.provenance import method_with
from gaintune.config import EvaluateConfig, Plan
from gaintune.data import IGNORED, load_domain
from gaintune.errors import AdapterError, ConfigError, TrainingError, UnsupportedModuleError
from gaintune.evaluate import run_batches
from gaintune.models import load_base, require_rows, without_adapter
from gaintune.progress import Progress
from gaintune.results import FloatArray, Interval, replicate_means, stretched, sum_interval, unbiased
from gaintune.storage import describe_environment
from gaintune.tuners.disel import disel_layers

Counted = Literal["response", "all"]
RowFigure = Literal["mean", "open"]
Batch = Mapping[str, torch.Tensor]
ALL = "all"
BLOCKS = ("attention", "mlp")


@dataclass(frozen=True)
class LayerGates:
    """Gates of one layer on one domain."""

    position: ModulePosition
    tokens: int  # that counted
    histogram: np.ndarray  # gate values by rank part and equal bins of [0, 1], the last closed, int64 `(rank, bins)`
    total: np.ndarray  # sum of the values of each part, float64 `(rank,)`
    squares: np.ndarray  # sum of their squares, float64 `(rank,)`
    row_values: np.ndarray  # how many gate values each text row counted, int64 `(rows,)`
    row_totals: np.ndarray  # sum of those values, float64 `(rows,)`
    row_open: np.ndarray  # how many of them are open (from 0.5 up), float64 `(rows,)`


@dataclass(frozen=True)
class GateRecord:
    """Record of one adapter's gates: for each domain its layers, in the order of the model."""

    adapter: str
    domains: Mapping[str, tuple[LayerGates, ...]]


@dataclass(frozen=True)
class GateSurvey:
    """A record with what it was made from; `counted` names the tokens that count in each domain."""

    record: GateRecord
    counted: Mapping[str, Counted]
    adapter: Path
    base_fingerprint: str
    plan: Plan
    environment: Mapping[str, Any]


def survey_gates(
    plan: Plan,
    adapter: Path,
    options: GatesOptions | None = None,
    *,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> GateSurvey:
    """Load an adapter onto the plan's base, and record its gates on the validation rows of the plan's domains.

    As in the paper, responses count in instruction data, and all tokens in texts, unless the options say otherwise.

    Raises:
        AdapterError: not a DISeL adapter, or a damaged one.
        BaseMismatchError: an adapter of another base.
        DataError: a domain's text is missing or broken.
    """
    chosen = options or GatesOptions()
    method_with("gates", adapter, "gates; give one of method disel (gaintune adapt --method disel)")
    check_adapters([adapter], plan.model, plan.data, allow_other_base=allow_other_base)
    base = load_base(plan.model)
    model = load_adapter(base, adapter, allow_other_base=allow_other_base)
    domains = [(domain, load_domain(domain, plan.data, base.tokenizer).validation) for domain in plan.data.domains]
    forward, device = _without_head(model), next(model.parameters()).device
    counted: dict[str, Counted] = {}
    with record_gates(model, bins=chosen.bins) as recorder:
        for domain, examples in domains:
            automatic: Counted = "response" if plan.data.task_of(domain) == "instruct" else "all"
            counted[domain.name] = automatic if chosen.tokens == "auto" else chosen.tokens
            step = partial(_step, forward, recorder, domain.name, counted[domain.name], device)
            batches, title = examples.batches(plan.evaluate.batch_size), f"gates on {domain.name}"
            require_rows(model, examples.input_ids.shape[1], packed=examples.position_ids is not None)
            run_batches(model, batches, step, total=examples.tokens, title=title, progress=progress)
    return GateSurvey(recorder.result(), counted, adapter, base.fingerprint, plan, describe_environment(device))


def _step(
    forward: nn.Module, recorder: GateRecorder, domain: str, counted: Counted, device: torch.device, batch: Batch
) -> int:
    """Run a batch of rows through a causal language model whose gates are recorded; no loss is computed."""
    inputs = {key: batch[key].to(device) for key in ("input_ids", "position_ids") if key in batch}
    mask = response_tokens(batch) if counted == "response" else all_tokens(batch)
    with recorder.counting(domain, mask.to(device)):
        forward(**inputs, use_cache=False)
    return batch["input_ids"].numel()


def _without_head(model: Any) -> nn.Module:
    """Return a language model without its vocabulary projection, unless that is adapted as well."""
    whole = without_adapter(model)
    backbone: nn.Module = whole.base_model
    inside = {id(module) for module in backbone.modules()}
    return backbone if all(id(layer) in inside for _, layer in disel_layers(model)) else whole


class _Tokens(NamedTuple):
    """The tokens of the current batch that count: all of `total`, or those at `index`; its first row in the domain."""

    domain: str
    first: int
    rows: int
    total: int
    index: torch.Tensor | None


class _Accumulator:
    """Running histogram, moments and row sums of one layer on one domain, on the layer's own device."""

    def __init__(self, rank: int, bins: int, device: torch.device) -> None:
        self.bins = bins
        self.tokens = 0
        self.rows: dict[int, tuple[int, torch.Tensor]] = {}  # of each batch, by its first row: passes, and sums
        with torch.inference_mode(False):  # so that they can be updated inside and outside of inference mode
            self.offsets = torch.arange(0, rank * bins, bins, device=device)
            self.histogram = torch.zeros(rank * bins, dtype=torch.int64, device=device)
            self.moments = torch.zeros(2, rank, dtype=torch.float64, device=device)

    def add(self, gates: torch.Tensor, tokens: _Tokens) -> None:
        """Count those of the gate values `(tokens, rank)` whose tokens count."""
        index = None if tokens.index is None else tokens.index.to(gates.device)
        values = (gates if index is None else gates[index]).float()
        # clamped as integers: a gate of exactly 1 belongs to the last bin, and what is not finite shows in the moments
        codes = (values * self.bins).to(torch.int64).clamp_(0, self.bins - 1).add_(self.offsets)
        self.histogram += torch.bincount(codes.view(-1), minlength=len(self.histogram))
        self.moments[0] += values.sum(0)
        self.moments[1] += values.square().sum(0)
        self.tokens += len(values)
        of_tokens = torch.stack([values.sum(1, dtype=torch.float64), (values >= OPEN).sum(1).double()])
        if index is not None:
            counted, of_tokens = of_tokens, of_tokens.new_zeros(2, tokens.total)
            of_tokens[:, index] = counted
        sums = of_tokens.view(2, tokens.rows, -1).sum(2)
        passes, before = self.rows.get(tokens.first, (0, 0.0))  # a layer that is used twice sees each row twice
        self.rows[tokens.first] = (passes + 1, sums + before)

    def layer(self, position: ModulePosition, row_tokens: np.ndarray) -> LayerGates:
        """Return what was counted, given how many tokens of each row of the domain count, `(rows,)`."""
        moments = self.moments.cpu().numpy()
        if not np.isfinite(moments).all():
            raise TrainingError(f"{position.name}: gate values are not finite, so the model or its adapter is broken")
        histogram = self.histogram.cpu().numpy().reshape(-1, self.bins)
        values, sums_of_rows = np.zeros_like(row_tokens), np.zeros((2, len(row_tokens)))
        for first, (passes, sums) in self.rows.items():
            rows = slice(first, first + sums.shape[1])
            values[rows] = passes * len(histogram) * row_tokens[rows]
            sums_of_rows[:, rows] = sums.cpu().numpy()
        kept = (histogram, moments[0].copy(), moments[1].copy(), values, *sums_of_rows)
        return LayerGates(position, self.tokens, *kept)


class GateRecorder:
    """Counter of gate values while a `counting` block is open; made by `record_gates`."""

    def __init__(self, model: nn.Module, adapter: str, bins: int) -> None:
        self.adapter = adapter
        self._bins = bins
        self._layers: dict[str, Any] = {name: layer for name, layer in disel_layers(model) if adapter in layer.lora_G}
        self._positions = positions_of(model, self._layers)
        self._counts: dict[str, dict[str, _Accumulator]] = {}
        self._row_tokens: dict[str, list[int]] = {}
        self._tokens: _Tokens | None = None

    @contextlib.contextmanager
    def counting(self, domain: str, mask: torch.Tensor) -> Iterator[None]:
        """Count the gates of the forward passes inside, each over one batch of the shape of `mask`.

        Args:
            domain: name to count under; several blocks of one name add up.
            mask: which tokens count, bool `(batch, tokens)`: a gate counts if the token at its own position counts (the
                token the gate reads, not the one predicted from there). See `response_tokens`, `all_tokens`.

        A forward pass outside of such a block is not counted.
        """
        if mask.dtype != torch.bool or mask.ndim != 2:
            given = f"{mask.dtype} of {mask.ndim} dimensions"
            raise ConfigError(f"the mask of counted tokens is {given}: give a bool tensor, (batch, tokens)")
        flat = mask.reshape(-1)
        self._counts.setdefault(domain, {})
        rows = self._row_tokens.setdefault(domain, [])
        index = None if bool(flat.all()) else flat.nonzero().squeeze(1)
        self._tokens = _Tokens(domain, len(rows), len(mask), len(flat), index)
        rows.extend(mask.sum(1).tolist())
        try:
            yield
        finally:
            self._tokens = None

    def result(self) -> GateRecord:
        """Return what was counted so far; TrainingError where a gate was not finite."""
        domains = {}
        for domain, counts in self._counts.items():
            tokens, positions = np.array(self._row_tokens[domain], np.int64), self._positions.items()
            domains[domain] = tuple(counts[name].layer(at, tokens) for name, at in positions if name in counts)
        return GateRecord(self.adapter, domains)

    @property
    def stored_values(self) -> int:
        """Numbers held: by domains, layers, rank and bins, and two for each layer and row, however long the rows."""
        accumulators = [each for counts in self._counts.values() for each in counts.values()]
        fixed = sum(each.histogram.numel() + each.moments.numel() + each.offsets.numel() for each in accumulators)
        return fixed + sum(sums.numel() for each in accumulators for _, sums in each.rows.values())

    def _observe(self, layer: str, adapter: str, gates: torch.Tensor) -> None:
        tokens = self._tokens
        if tokens is None or adapter != self.adapter:
            return
        values = gates.detach().reshape(-1, gates.shape[-1])
        if len(values) != tokens.total:
            raise UnsupportedModuleError(
                f"{layer}: gates of {len(values)} tokens, but the mask has {tokens.total}: a layer that sees only some "
                "of the tokens, or a batch with several adapters, cannot be recorded"
            )
        counts = self._counts[tokens.domain]
        if layer not in counts:
            counts[layer] = _Accumulator(values.shape[1], self._bins, values.device)
        counts[layer].add(values, tokens)


@contextlib.contextmanager
def record_gates(model: nn.Module, *, adapter: str | None = None, bins: int = 100) -> Iterator[GateRecorder]:
    """Record the gates of a DISeL model; outputs are untouched, and nothing is left in the model afterwards.

        with record_gates(model) as recorder, torch.inference_mode():
            for batch in examples.batches(4):
                with recorder.counting("math", response_tokens(batch)):
                    model(input_ids=batch["input_ids"])
        figures = summarize(recorder.result().domains["math"])

    Args:
        model: a PeftModel, or any module that holds DISeL layers.
        adapter: whose gates; may be left out where only one has gates.
        bins: bins of [0, 1] in a histogram, a multiple of 20.

    Raises:
        AdapterError: no DISeL layer, no such adapter, several to choose from, or Gated LoRA (no sigmoid gates).
        ConfigError: a number of bins that is not a multiple of 20.
    """
    check_bins(bins)
    recorder = GateRecorder(model, _adapter_of(model, adapter), bins)
    attached = [(layer, partial(recorder._observe, name)) for name, layer in recorder._layers.items()]
    for layer, observer in attached:
        layer.gate_observers.append(observer)
    try:
        yield recorder
    finally:
        for layer, observer in attached:
            layer.gate_observers.remove(observer)


def _adapter_of(model: nn.Module, adapter: str | None) -> str:
    """Return the adapter to record, which has sigmoid gates."""
    layers = [layer for _, layer in disel_layers(model)]
    if not layers:
        raise AdapterError("this model has no gates: only a DISeL adapter has them (gaintune adapt --method disel)")
    names = sorted({name for layer in layers for name in layer.lora_G})
    if not names or (adapter is not None and adapter not in names):
        subject = f"adapter {adapter!r} has" if adapter is not None else "this model has"
        raise AdapterError(f"{subject} no sigmoid gates; adapters with such gates: {', '.join(names) or 'none'}")
    if adapter is None and len(names) > 1:
        raise AdapterError(f"several adapters have gates ({', '.join(names)}): say which one to record")
    return names[0] if adapter is None else adapter


def response_tokens(batch: Batch) -> torch.Tensor:
    """Return the mask of the response, `(batch, tokens)`: tokens the loss scores, whose label is not -100."""
    return batch["labels"] != IGNORED


def all_tokens(batch: Batch) -> torch.Tensor:
    """Return the mask of all tokens but padding, `(batch, tokens)`: a row ends with its last scored token."""
    scored = response_tokens(batch)
    return scored.flip(1).cummax(1).values.flip(1)


@dataclass(frozen=True)
class GateSummary:
    """Figures of some gate values: how many, mean, standard deviation, and the shares below 0.05 and from 0.5 up."""

    values: int
    mean: float
    deviation: float
    closed: float
    open: float
    histogram: np.ndarray


def summarize(layers: Iterable[LayerGates], part: int | None = None) -> GateSummary:
    """Summarize the gate values of several layers, of all rank parts or one; ValueError if nothing was counted.

    Every value has equal weight.
    """
    chosen = slice(None) if part is None else slice(part, part + 1)
    histogram, total, squares = np.zeros(1, np.int64), 0.0, 0.0
    for each in layers:
        histogram = histogram + each.histogram[chosen].sum(axis=0)
        total += float(each.total[chosen].sum())
        squares += float(each.squares[chosen].sum())
    values = int(histogram.sum())
    if not values:
        raise ValueError("no gate value was counted")
    mean = total / values
    bins = len(histogram)
    closed, opened = histogram[: round(CLOSED * bins)].sum(), histogram[round(OPEN * bins) :].sum()
    deviation = float(np.sqrt(max(squares / values - mean**2, 0.0)))
    return GateSummary(values, mean, deviation, float(closed / values), float(opened / values), histogram)


def select(layers: Sequence[LayerGates], depth: str = ALL, part: str = ALL) -> list[LayerGates]:
    """Return the layers of a depth third, and of a block or projection; "all" selects every one."""
    return [
        each
        for each in layers
        if depth in (ALL, each.position.depth) and part in (ALL, each.position.block, each.position.projection)
    ]


def projections_of(layers: Sequence[LayerGates]) -> list[str]:
    """Return the projections of layers, in the order of the model."""
    return list(dict.fromkeys(each.position.projection for each in layers))


class Group(NamedTuple):
    """Group of gates of a domain: of one depth third or all, and of one block, one projection or all."""

    domain: str
    depth: str = ALL
    part: str = ALL


def apart(record: GateRecord, one: Group, other: Group, settings: EvaluateConfig) -> Interval:
    """Return the mean gate of one group less that of another; every gate value of a group has equal weight.

    Percentile bootstrap over rows of text: over each domain's own, or, within a domain, over the same rows for both.
    Widened for few rows, with the degrees of freedom of both domains' rows together (`sum_interval`).

    The difference lies between -1 and 1, and has no ends where a domain has one row, which cannot be resampled.

    Raises:
        ConfigError: a group without a gate in the record.
    """
    return compared(record, settings, [(one, other)])[one, other]


def compared(
    record: GateRecord,
    settings: EvaluateConfig,
    pairs: Iterable[tuple[Group, Group]] | None = None,
    figure: RowFigure = "mean",
) -> dict[tuple[Group, Group], Interval]:
    """Compare pairs of groups as `apart` does, or all `comparisons`; a domain's rows are drawn once for all groups.

    `figure` is the mean gate, or the share of gates that are open (from 0.5 up).
    """
    chosen = list(comparisons(record) if pairs is None else pairs)
    means, rows = _resampled(record, settings, dict.fromkeys(itertools.chain.from_iterable(chosen)), figure)
    differences = {}
    for one, other in chosen:
        first, second = means[one], -means[other]
        parts = np.stack([first, second], axis=1) if one.domain != other.domain else (first + second)[:, None]
        sizes = [rows[name] for name in dict.fromkeys((one.domain, other.domain))]
        differences[one, other] = sum_interval(partial(stretched, parts), sizes, settings.confidence)
    return differences


def levels(
    record: GateRecord, settings: EvaluateConfig, groups: Iterable[Group], figure: RowFigure = "mean"
) -> dict[Group, Interval]:
    """Return a figure of each group with its interval over rows of text, as `compared` for pairs of groups."""
    means, rows = _resampled(record, settings, groups, figure)
    return {
        group: sum_interval(partial(stretched, own[:, None]), [rows[group.domain]], settings.confidence)
        for group, own in means.items()
    }


def _resampled(
    record: GateRecord, settings: EvaluateConfig, chosen: Iterable[Group], figure: RowFigure
) -> tuple[dict[Group, FloatArray], dict[str, int]]:
    """Return a figure of each group over resamples of its domain's rows, and how many rows each domain has."""
    groups = list(chosen)
    means: dict[Group, FloatArray] = {}
    rows: dict[str, int] = {}
    samples, seed = settings.bootstrap_samples, settings.seed
    for domain in dict.fromkeys(group.domain for group in groups):
        own = [group for group in groups if group.domain == domain]
        totals, values = row_sums(record, own, figure)
        counted = values.any(axis=0)  # a row without a response has no token that counts
        rows[domain] = int(counted.sum())
        sums, ones = np.concatenate([totals, values])[:, counted], np.ones(rows[domain], np.int64)
        total, weight = np.split(replicate_means(sums, ones, samples=samples, seed=seed, domain=domain), 2, axis=1)
        ratios = np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)
        means |= dict(zip(own, unbiased(ratios, rows[domain]).T, strict=True))
    return means, rows


def row_sums(record: GateRecord, groups: Sequence[Group], figure: RowFigure = "mean") -> tuple[FloatArray, FloatArray]:
    """Return the sums of the gate values of each row (or how many are open), and how many there are.

    Both are `(groups, rows)`.
    """
    totals, values = [], []
    for group in groups:
        chosen = select(record.domains.get(group.domain, ()), group.depth, group.part)
        if not sum(int(each.row_values.sum()) for each in chosen):
            raise ConfigError(f"no gate was counted of {', '.join(group)}; domains: {', '.join(record.domains)}")
        summed = [each.row_totals if figure == "mean" else each.row_open for each in chosen]
        totals.append(np.sum(summed, axis=0))
        values.append(np.sum([each.row_values for each in chosen], axis=0))
    return np.array(totals, np.float64), np.array(values, np.float64)


def comparisons(record: GateRecord) -> Iterator[tuple[Group, Group]]:
    """Yield the pairs of groups to compare, in both directions.

    They are every two domains, by depth and block and by projection; and within a domain MLP and attention, every two
    projections, and every two depths.
    """
    for one, other in itertools.permutations(record.domains, 2):
        first, second = record.domains[one], record.domains[other]
        cells = [*itertools.product((ALL, *DEPTHS), (ALL, *BLOCKS)), *((ALL, part) for part in projections_of(first))]
        for cell in cells:
            if select(first, *cell) and select(second, *cell):
                yield Group(one, *cell), Group(other, *cell)
    for domain, layers in record.domains.items():
        for parts in ([block for block in BLOCKS if select(layers, part=block)], projections_of(layers)):
            for one, other in itertools.permutations(parts, 2):
                yield Group(domain, part=one), Group(domain, part=other)
        for one, other in itertools.permutations([depth for depth in DEPTHS if select(layers, depth)], 2):
            yield Group(domain, one), Group(domain, other)
