"""Whether an adapter can be carried on by a method: one that made it, with the options it was made with."""

from __future__ import annotations

from pathlib import Path

from gaintune.adapters import AdapterRecord, read_config, read_record
from gaintune.config import MethodConfig, Plan
from gaintune.errors import ConfigError
from gaintune.methods import OPTIONS, TRAINING_OPTIONS, check_method


def previous_record(start: Path, method: MethodConfig) -> AdapterRecord | None:
    """The record of the adapter to carry on, None for a foreign one.

    Raises:
        AdapterError: not an adapter folder.
        ConfigError: another method made it, or with other options than the plan gives.
    """
    record = read_record(start)
    if record is None:
        wanted, found = check_method(method).peft_type, read_config(start).get("peft_type")
        if wanted != found:
            raise ConfigError(
                f"{start} is a {found} adapter, method {method.name!r} carries on {wanted or 'full weights'}"
            )
        return None
    if record.method != method.name:
        raise ConfigError(f"{start} was made by method {record.method!r}, the plan says {method.name!r}")
    had = MethodConfig.model_validate(record.settings.get("method", {"name": record.method}))
    for option in (option for option in OPTIONS if option not in TRAINING_OPTIONS):
        given = getattr(method, option)
        if given is not None and given != getattr(had, option):
            raise ConfigError(f"{start} has {option} {getattr(had, option)!r}, the plan says {given!r}; leave it out")
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
