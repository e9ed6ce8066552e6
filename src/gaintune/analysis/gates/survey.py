"""An adapter's gates over the validation rows of several domains, recorded during forward passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from gaintune.adapters import adapter_method, check_adapters, load_adapter, read_config, read_record
from gaintune.analysis.gates import GatesOptions, Tokens
from gaintune.analysis.gates.statistics import BINS, GateRecord, LayerGates, check_bins
from gaintune.analysis.positions import ModulePosition, positions_of
from gaintune.config import DataConfig, DomainConfig, Plan
from gaintune.data import Examples, load_domain
from gaintune.errors import AdapterError, ConfigError, TrainingError, UnsupportedModuleError
from gaintune.evaluate import run_batches
from gaintune.models import IGNORED, load_base, require_rows
from gaintune.progress import Progress
from gaintune.storage import describe_environment
from gaintune.tuners.disel.layer import disel_layers

Counted = Literal["response", "all"]


@dataclass(frozen=True)
class GateSurvey:
    """A record with what it was made of.

    Attributes:
        record: the gates.
        counted: for each domain, which tokens were counted (`response` or `all`).
        adapter: the adapter's folder.
        base_fingerprint: of the base it was put on.
        plan: base, domains and budgets.
        environment: as `describe_environment` has it.
    """

    record: GateRecord
    counted: Mapping[str, Counted]
    adapter: Path
    base_fingerprint: str
    plan: Plan
    environment: Mapping[str, Any]


def counted_tokens(tokens: Tokens, data: DataConfig, domain: DomainConfig) -> Counted:
    """Which tokens of a domain count; by itself as in the paper: responses of instruction data, all of plain text."""
    if tokens != "auto":
        return tokens
    return "response" if data.task_of(domain) == "instruct" else "all"


def survey_gates(
    plan: Plan,
    adapter: Path,
    options: GatesOptions | None = None,
    *,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> GateSurvey:
    """Load an adapter onto the plan's base, and record its gates on the validation rows of the plan's domains.

    Raises:
        AdapterError: not a DISeL adapter, or a damaged one.
        BaseMismatchError: an adapter of another base.
        DataError: a domain's text is missing or broken.
    """
    chosen = options or GatesOptions()
    _check_gated(adapter)
    check_adapters([adapter], plan.model, plan.data, allow_other_base=allow_other_base)
    base = load_base(plan.model)
    model = load_adapter(base, adapter, allow_other_base=allow_other_base)
    domains = [(domain, load_domain(domain, plan.data, base.tokenizer)) for domain in plan.data.domains]
    counted: dict[str, Counted] = {
        domain.name: counted_tokens(chosen.tokens, plan.data, domain) for domain in plan.data.domains
    }
    with record_gates(model, bins=chosen.bins) as recorder:
        for domain, rows in domains:
            size, choice = plan.evaluate.batch_size, counted[domain.name]
            record_examples(model, recorder, domain.name, rows.validation, choice, batch_size=size, progress=progress)
    environment = describe_environment(next(model.parameters()).device)
    return GateSurvey(recorder.result(), counted, adapter, base.fingerprint, plan, environment)


def record_examples(
    model: nn.Module,
    recorder: GateRecorder,
    domain: str,
    examples: Examples,
    counted: Counted,
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> None:
    """Run rows through a causal language model with a DISeL adapter, its gates being recorded; no loss is computed."""
    forward: Any = _without_head(model)
    device = next(model.parameters()).device
    require_rows(model, examples.input_ids.shape[1], packed=examples.position_ids is not None)
    mask_of = response_tokens if counted == "response" else all_tokens

    def step(batch: dict[str, torch.Tensor]) -> int:
        inputs = {key: batch[key].to(device) for key in ("input_ids", "position_ids") if key in batch}
        with recorder.counting(domain, mask_of(batch).to(device)):
            forward(**inputs, use_cache=False)
        return batch["input_ids"].numel()

    batches, title = examples.batches(batch_size), f"gates on {domain}"
    run_batches(model, batches, step, total=examples.tokens, title=title, progress=progress)


def _check_gated(adapter: Path) -> None:
    """One clear line, before a model is loaded, for an adapter that has no gates."""
    method, record = adapter_method(adapter), read_record(adapter)
    if method is None or not method.gates:
        name = record.method if record is not None else read_config(adapter).get("peft_type")
        raise AdapterError(
            f"{adapter}: an adapter of method {name} has no gates; give one of method disel "
            "(gaintune adapt --method disel)"
        )


def _without_head(model: Any) -> nn.Module:
    """The part of a language model before its vocabulary projection, unless that is adapted as well."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
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
    """The running histogram, moments and row sums of one layer on one domain, on the layer's own device."""

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
        of_tokens = values.sum(1, dtype=torch.float64)
        if index is not None:
            counted, of_tokens = of_tokens, of_tokens.new_zeros(tokens.total)
            of_tokens[index] = counted
        sums = of_tokens.view(tokens.rows, -1).sum(1)
        passes, before = self.rows.get(tokens.first, (0, 0.0))  # a layer that is used twice sees each row twice
        self.rows[tokens.first] = (passes + 1, sums + before)

    def layer(self, position: ModulePosition, row_tokens: np.ndarray) -> LayerGates:
        """What was counted, given how many tokens of each row of the domain count, `(rows,)`."""
        moments = self.moments.cpu().numpy()
        if not np.isfinite(moments).all():
            raise TrainingError(f"{position.name}: gate values are not finite, so the model or its adapter is broken")
        histogram = self.histogram.cpu().numpy().reshape(-1, self.bins)
        values, totals = np.zeros_like(row_tokens), np.zeros(len(row_tokens))
        for first, (passes, sums) in self.rows.items():
            rows = slice(first, first + len(sums))
            values[rows] = passes * len(histogram) * row_tokens[rows]
            totals[rows] = sums.cpu().numpy()
        return LayerGates(position, self.tokens, histogram, moments[0].copy(), moments[1].copy(), values, totals)


class GateRecorder:
    """Counts gate values while a `counting` block is open; made by `record_gates`."""

    def __init__(self, model: nn.Module, adapter: str, bins: int) -> None:
        self.adapter = adapter
        self._bins = bins
        self._layers = {name: layer for name, layer in disel_layers(model) if adapter in layer.lora_G}
        self._positions = positions_of(model, self._layers)
        self._counts: dict[str, dict[str, _Accumulator]] = {}
        self._row_tokens: dict[str, list[int]] = {}
        self._tokens: _Tokens | None = None
        self._observers: list[tuple[Any, Callable[[str, torch.Tensor], None]]] = []

    @contextlib.contextmanager
    def counting(self, domain: str, mask: torch.Tensor) -> Iterator[None]:
        """Count the gates of the forward passes inside, each over one batch of the shape of `mask`.

        Args:
            domain: under which name; several blocks of one name add up.
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
        """What was counted so far.

        Raises:
            TrainingError: a gate was not finite.
        """
        return GateRecord(
            self.adapter,
            {
                domain: tuple(
                    counts[name].layer(position, np.array(self._row_tokens[domain], np.int64))
                    for name, position in self._positions.items()
                    if name in counts
                )
                for domain, counts in self._counts.items()
            },
        )

    @property
    def stored_values(self) -> int:
        """Numbers held: by domains, layers, rank and bins, and one for each layer and row, however long the rows."""
        accumulators = [each for counts in self._counts.values() for each in counts.values()]
        fixed = sum(each.histogram.numel() + each.moments.numel() + each.offsets.numel() for each in accumulators)
        return fixed + sum(len(sums) for each in accumulators for _, sums in each.rows.values())

    def _attach(self) -> None:
        for name, layer in self._layers.items():
            observer = self._observer(name)
            layer.gate_observers.append(observer)
            self._observers.append((layer, observer))

    def _detach(self) -> None:
        for layer, observer in self._observers:
            layer.gate_observers.remove(observer)
        self._observers.clear()

    def _observer(self, name: str) -> Callable[[str, torch.Tensor], None]:
        def observe(adapter: str, gates: torch.Tensor) -> None:
            tokens = self._tokens
            if tokens is None or adapter != self.adapter:
                return
            values = gates.detach().reshape(-1, gates.shape[-1])
            if len(values) != tokens.total:
                raise UnsupportedModuleError(
                    f"{name}: gates of {len(values)} tokens, but the mask has {tokens.total}: a layer that sees only "
                    "some of the tokens, or a batch with several adapters, cannot be recorded"
                )
            counts = self._counts[tokens.domain]
            if name not in counts:
                counts[name] = _Accumulator(values.shape[1], self._bins, values.device)
            counts[name].add(values, tokens)

        return observe


@contextlib.contextmanager
def record_gates(model: nn.Module, *, adapter: str | None = None, bins: int = BINS) -> Iterator[GateRecorder]:
    """Record the gates of a DISeL model; outputs are untouched, and nothing is left in the model afterwards.

        with record_gates(model) as recorder, torch.inference_mode():
            for batch in examples.batches(4):
                with recorder.counting("math", response_tokens(batch)):
                    model(input_ids=batch["input_ids"])
        figures = summarise(recorder.result().domains["math"])

    Args:
        model: a PeftModel, or any module that holds DISeL layers.
        adapter: whose gates; the only one there is unless given.
        bins: bins of [0, 1] in a histogram, a multiple of 20.

    Raises:
        AdapterError: no DISeL layer, no such adapter, several to choose from, or Gated LoRA (no sigmoid gates).
        ConfigError: a number of bins that is not a multiple of 20.
    """
    check_bins(bins)
    recorder = GateRecorder(model, _adapter_of(model, adapter), bins)
    recorder._attach()
    try:
        yield recorder
    finally:
        recorder._detach()


def _adapter_of(model: nn.Module, adapter: str | None) -> str:
    """The adapter to record, once it is known to have sigmoid gates."""
    layers = [layer for _, layer in disel_layers(model)]
    if not layers:
        raise AdapterError("this model has no gates: only a DISeL adapter has them (gaintune adapt --method disel)")
    names = sorted({name for layer in layers for name in layer.lora_G})
    if not names or (adapter is not None and adapter not in names):
        asked = f"adapter {adapter!r} has" if adapter is not None else "this model has"
        raise AdapterError(f"{asked} no sigmoid gates; adapters with such gates: {', '.join(names) or 'none'}")
    if adapter is None and len(names) > 1:
        raise AdapterError(f"several adapters have gates ({', '.join(names)}): say which one to record")
    return names[0] if adapter is None else adapter


def response_tokens(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Tokens of the response, `(batch, tokens)`: those the loss scores, whose label is not -100; never padding."""
    return batch["labels"] != IGNORED


def all_tokens(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All tokens but padding, `(batch, tokens)`: a row's tokens up to the last that is scored, since a text ends so."""
    scored = response_tokens(batch)
    return scored.flip(1).cummax(1).values.flip(1)
