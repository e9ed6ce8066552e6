"""Whether one adaptation can begin: one domain, one method, and an adapter to carry on that this method made."""

from __future__ import annotations

from pathlib import Path

from gaintune.adapters import AdapterRecord, check_adapters, read_config, read_record
from gaintune.config import MethodConfig, Plan
from gaintune.errors import ConfigError
from gaintune.methods import OPTIONS, TRAINING_OPTIONS, check_method
from gaintune.progress import plural


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


def previous_record(start: Path, plan: Plan, *, allow_other_base: bool = False) -> AdapterRecord | None:
    """The record of the adapter that the plan's method is to carry on, None for a foreign one; nothing is loaded.

    Raises:
        AdapterError, BaseMismatchError: not an adapter folder, a damaged one, or one of another base.
        ConfigError: another method made it, or with other options than the plan gives.
    """
    record = _of_this_method(start, plan.methods[0])
    check_adapters([start], plan.model, allow_other_base=allow_other_base)
    return record


def _of_this_method(start: Path, method: MethodConfig) -> AdapterRecord | None:
    record = read_record(start)
    if record is None:
        wanted, found = check_method(method).peft_type, read_config(start).get("peft_type")
        if wanted != found:
            raise ConfigError(
                f"{start} is a {found} adapter, and method {method.name!r} carries on {wanted or 'full weights'}: "
                "choose its own method with --method, or leave --start out to begin anew"
            )
        return None
    if record.method != method.name:
        raise ConfigError(
            f"{start} was made by method {record.method!r}, and {method.name!r} cannot carry it on: use --method "
            f"{record.method}, or leave --start out to begin anew"
        )
    had = MethodConfig.model_validate(record.settings.get("method", {"name": record.method}))
    for option in (option for option in OPTIONS if option not in TRAINING_OPTIONS):
        given = getattr(method, option)
        if given is not None and given != getattr(had, option):
            raise ConfigError(
                f"{start} was made with {option} {getattr(had, option)!r}, and cannot be carried on with {given!r}: "
                f"leave {option} out, or leave --start out to begin anew"
            )
    return record


def check_replay(plan: Plan, start: Path | None, previous: AdapterRecord | None) -> None:
    """Replay needs the earlier domains' texts: refuse it without, and domains that the adapter has not learnt."""
    method, *_ = plan.methods
    earlier = [domain.name for domain in plan.data.domains[:-1]]
    if not method.replay:
        return
    if not earlier or start is None:
        raise ConfigError(
            "replay mixes in rows of earlier domains: give --start, and the domains it has learnt before the new one "
            "(--domain earlier --domain new); or leave replay out"
        )
    unknown = [name for name in earlier if previous is not None and name not in previous.domains]
    if unknown:
        learnt = ", ".join(previous.domains if previous else ())
        raise ConfigError(f"replay: {start} has not learnt {', '.join(unknown)}; it has learnt {learnt}")
