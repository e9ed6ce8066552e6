"""What lm-eval says while it works: its bars and expected warnings are kept back, the rest is passed on once."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator

logger = logging.getLogger(__name__)

EXPECTED = (  # what lm-eval warns of by design of ours, or what is said here once instead of for every row
    "`pretrained` model kwarg is not of type `str`",
    "Passed an already-initialized model",
    "exceeds model's maximum length",
    "Custom kwargs can be passed",
    "is defined, but aggregation is not",
    "is defined, but higher_is_better is not",
    "num_fewshot > 0 but fewshot_split is None",
    "using test_docs as fewshot_docs",
    "doc_to_target returned a list",
)


class _Relay(logging.Handler):
    """Passes on what lm-eval warns of, each kind once, without what is expected."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        kind = text[:60]
        if kind not in self._said and not any(each in text for each in EXPECTED):
            self._said.add(kind)
            logger.log(record.levelno, "lm-eval: %s", " ".join(text.split())[:300])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's bars and expected warnings off the terminal; other warnings of its come through ours, once."""
    import lm_eval.api.task

    talker = logging.getLogger("lm_eval")
    relay = _Relay()
    handlers, propagate, bar = talker.handlers, talker.propagate, lm_eval.api.task.tqdm
    talker.handlers, talker.propagate = [relay], False
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)  # type: ignore[assignment]  # it has no switch
    try:
        yield
    finally:
        talker.handlers, talker.propagate = handlers, propagate
        lm_eval.api.task.tqdm = bar
