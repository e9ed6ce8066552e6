"""How the rows of a learnt domain were made, and a warning where they are measured or learnt otherwise."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gaintune.config.plan import DataConfig, DomainConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearntDomain:
    """What decided which of a domain's rows were held out, and how its rows became tokens; see `DataConfig`."""

    task: str
    seed: int
    template: str
    block_size: int
    packing: bool
    end_of_text: bool

    @classmethod
    def of(cls, domain: DomainConfig, data: DataConfig) -> LearntDomain:
        """What a plan says of one of its domains."""
        written = (data.template_of(domain), data.block_size, data.packing, data.end_of_text)
        return cls(data.task_of(domain), data.seed, *written)


def warn_of_other_rows(adapter: Path, learnt: Mapping[str, LearntDomain], data: DataConfig) -> None:
    """Say which domains an adapter has learnt with another split or template than a plan has, and what to give.

    Args:
        adapter: its folder.
        learnt: its domains by name, as its record has them.
        data: the plan's.
    """
    for domain in data.domains:
        if domain.name not in learnt:
            continue
        before, here = learnt[domain.name], LearntDomain.of(domain, data)
        if before.seed != here.seed:
            logger.warning(
                "%s learnt %s with data.seed %d, here it is %d: unless its source has a validation split of its own, "
                "text that was trained on counts as held out. Give --set data.seed=%d",
                adapter, domain.name, before.seed, here.seed, before.seed,
            )  # fmt: skip
        if not before.task == here.task == "instruct":
            continue
        if before.template != here.template:
            logger.warning(
                "%s learnt %s with template %s, here it is %s. Give --template %s, or the domain's own in a plan",
                adapter, domain.name, before.template, here.template, before.template,
            )  # fmt: skip
        if before.end_of_text != here.end_of_text:
            logger.warning(
                "%s learnt %s with data.end_of_text %s, here it is %s. Give --set data.end_of_text=%s",
                adapter, domain.name, *(str(each.end_of_text).lower() for each in (before, here, before)),
            )  # fmt: skip
