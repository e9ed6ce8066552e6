"""Whether one adaptation can begin: one domain, one method, and an adapter to carry on that this method made."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from peft import PeftModel
from torch import nn

from gaintune.adapters.disk import AdapterRecord, check_adapters, load_adapter, read_config, read_record
from gaintune.config.plan import MethodConfig, Plan
from gaintune.data.load import DomainBlocks
from gaintune.errors import ConfigError
from gaintune.methods.attach import OPTIONS, TRAINING_OPTIONS, check_method
from gaintune.models.base import Base
from gaintune.methods.peft_configs import kind_of, method_of
from gaintune.progress import plural
from gaintune.tuners.disel import DiselConfig

logger = logging.getLogger(__name__)


def require_one_of_each(plan: Plan) -> None:
    """Refuse a plan of several methods, of several domains where none is replayed, or one that watches others."""
    if plan.data.watched:
        watched = ", ".join(domain.name for domain in plan.data.watched)
        raise ConfigError(
            f"data.watched: adapt measures its own domain only, and the plan watches {watched}: leave it out"
        )
    one_domain = len(plan.data.domains) == 1 or plan.methods[0].replay
    if len(plan.methods) == 1 and one_domain:
        return
    domains = [domain.name for domain in plan.data.domains]
    methods = [method.label for method in plan.methods]
    held = " and ".join(
        f"{plural(len(names), what)} ({', '.join(names)})" for what, names in (("domain", domains), ("method", methods))
    )
    options = " and ".join(
        option for option, chosen in (("--domain", one_domain), ("--method", len(methods) == 1)) if not chosen
    )
    raise ConfigError(
        f"adapt takes one domain and one method, and the plan has {held}: choose one with {options}; "
        "`gaintune sequence` takes several"
    )


def carried_on(start: Path, plan: Plan, *, allow_other_base: bool = False) -> tuple[AdapterRecord | None, MethodConfig]:
    """The record of the adapter that a plan carries on, None for a foreign one, and the plan's method as that has it.

    What the adapter was made with stays: options that the plan leaves out are the adapter's own, and only those of
    training alone may be given anew. Rate, penalty and replay are the plan's. Nothing is loaded. Warns where the plan
    splits or writes a domain that the adapter has learnt otherwise.

    Raises:
        AdapterError, BaseMismatchError: not an adapter folder, a damaged one, or one of another base.
        ConfigError: another method made it, or with other options than the plan gives.
    """
    record, method = read_record(start), plan.methods[0]
    had = _foreign(start, method) if record is None else _ours(start, record, method)
    for option in (option for option in OPTIONS if option not in TRAINING_OPTIONS):
        given, held = getattr(method, option), getattr(had, option)
        if given is not None and given != held:
            made = f"without choosing {option}" if held is None else f"with {option} {reprlib.repr(held)}"
            raise ConfigError(
                f"{start} was made {made}, and cannot be carried on with {given!r}: leave {option} out, or leave "
                "--start out to begin anew"
            )
    check_adapters([start], plan.model, plan.data, allow_other_base=allow_other_base)
    kept = {option: getattr(had, option) for option in OPTIONS if getattr(method, option) is None}
    return record, method.model_copy(update=kept)


def _ours(start: Path, record: AdapterRecord, method: MethodConfig) -> MethodConfig:
    """The method that made an adapter of ours; refuses another than the plan's."""
    if record.method != method.name:
        raise ConfigError(
            f"{start} was made by method {record.method!r}, and {method.name!r} cannot carry it on: use --method "
            f"{record.method}, or leave --start out to begin anew"
        )
    return MethodConfig.model_validate(record.settings.get("method", {"name": record.method}))


def _foreign(start: Path, method: MethodConfig) -> MethodConfig:
    """The plan's method with the options of an adapter that PEFT wrote without us; refuses one of another kind."""
    config, wanted = read_config(start), check_method(method)
    found = kind_of(config)
    if wanted.kind != found:
        raise ConfigError(
            f"{start} is a {found} adapter, and method {method.name!r} carries on {wanted.kind or 'full weights'}: "
            "choose its own method with --method, or leave --start out to begin anew"
        )
    return method_of(config, method.name, wanted.options)


def open_adapter(base: Base, start: Path, method: MethodConfig, *, allow_other_base: bool = False) -> nn.Module:
    """Load an adapter to go on training it; a gate rate given anew is its own from now on. Raises as `load_adapter`."""
    model = load_adapter(base, start, trainable=True, allow_other_base=allow_other_base)
    if method.gate_lr_ratio is not None:  # other trainers read it from the adapter's configuration
        adapted = cast(PeftModel, model)
        cast(DiselConfig, adapted.peft_config[str(adapted.active_adapter)]).gate_lr_ratio = method.gate_lr_ratio
    return model


def check_replay(plan: Plan, start: Path | None, previous: AdapterRecord | None) -> None:
    """Replay needs the earlier domains' texts: refuse it without, and domains that the adapter has not learnt."""
    method, *_ = plan.methods
    earlier = [domain.name for domain in plan.data.domains[:-1]]
    if not method.replay:
        return
    if not earlier or start is None:
        learnt = previous.domains if previous else ("earlier",)
        named = " ".join(f"--domain {name}" for name in [*learnt, plan.data.domains[-1].name])
        given, wanted = ("", "--start, and those") if start is None else (f", which {start} has learnt", "those")
        raise ConfigError(
            f"replay mixes in rows of earlier domains{given}: give {wanted} before the new one ({named}); or leave "
            "replay out"
        )
    unknown = [name for name in earlier if previous is not None and name not in previous.domains]
    if unknown:
        learnt = ", ".join(previous.domains if previous else ())
        raise ConfigError(f"replay: {start} has not learnt {', '.join(unknown)}; it has learnt {learnt}")


def warn_of_other_text(start: Path | None, previous: AdapterRecord | None, earlier: Sequence[DomainBlocks]) -> None:
    """Say which domains to replay are not, by their content hashes, what the adapter has learnt under their names.

    Budgets and cut are in the hash too and may well be others than they were, so it is no error.
    """
    for domain in earlier:
        if previous is not None and domain.content_hash != previous.content_hashes.get(domain.name):
            logger.warning(
                "replay: %s is not as %s learnt it: another text, or other budgets, blocks or seed (data.*). Its "
                "rows are replayed as they are now",
                domain.name, start,
            )  # fmt: skip
