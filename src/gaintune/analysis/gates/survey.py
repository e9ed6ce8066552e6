"""An adapter's gates over the validation rows of several domains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gaintune.adapters import adapter_method, check_adapters, load_adapter, read_config, read_record
from gaintune.analysis.gates.recorder import GateRecorder, all_tokens, record_gates, response_tokens
from gaintune.analysis.gates.statistics import BINS, GateRecord, check_bins
from gaintune.config import DataConfig, DomainConfig, Plan
from gaintune.data import Examples, load_domain
from gaintune.errors import AdapterError
from gaintune.models import load_base
from gaintune.progress import Progress, Silent
from gaintune.storage import describe_environment
from gaintune.tuners.disel.layer import disel_layers

Counted = Literal["response", "all"]
Tokens = Literal["auto", "response", "all"]
"""Which tokens count: the response's, all, or (auto) the response's in instruction domains and all in texts."""


@dataclass(frozen=True)
class Survey:
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
    *,
    tokens: Tokens = "auto",
    bins: int = BINS,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> Survey:
    """Load an adapter onto the plan's base, and record its gates on the validation rows of the plan's domains.

    Raises:
        ConfigError: a number of bins that is not a multiple of 20.
        AdapterError: not a DISeL adapter, or a damaged one.
        BaseMismatchError: an adapter of another base.
        DataError: a domain's text is missing or broken.
    """
    check_bins(bins)
    _check_gated(adapter)
    check_adapters([adapter], plan.model, plan.data, allow_other_base=allow_other_base)
    base = load_base(plan.model)
    model = load_adapter(base, adapter, allow_other_base=allow_other_base)
    domains = [(domain, load_domain(domain, plan.data, base.tokenizer)) for domain in plan.data.domains]
    counted: dict[str, Counted] = {
        domain.name: counted_tokens(tokens, plan.data, domain) for domain in plan.data.domains
    }
    with record_gates(model, bins=bins) as recorder:
        for domain, rows in domains:
            size, choice = plan.evaluate.batch_size, counted[domain.name]
            record_examples(model, recorder, domain.name, rows.validation, choice, batch_size=size, progress=progress)
    environment = describe_environment(next(model.parameters()).device)
    return Survey(recorder.result(), counted, adapter, base.fingerprint, plan, environment)


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
    mask_of = response_tokens if counted == "response" else all_tokens
    training = model.training
    model.eval()
    try:
        with (
            torch.inference_mode(),
            (progress or Silent()).task(f"gates on {domain}", examples.tokens, "tokens") as advance,
        ):
            for batch in examples.batches(batch_size):
                inputs = {key: batch[key].to(device) for key in ("input_ids", "position_ids") if key in batch}
                with recorder.counting(domain, mask_of(batch).to(device)):
                    forward(**inputs, use_cache=False)
                advance(batch["input_ids"].numel())
    finally:
        model.train(training)


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
