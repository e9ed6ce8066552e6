"""HumanEval's pass@1 with the generated programs run in processes of their own, under limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gaintune.evaluate.benchmarks.programs import CodeLimits, run_program

TASK = "humaneval"


def with_own_runner(settings: Mapping[str, Any], limits: CodeLimits) -> dict[str, Any]:
    """lm-eval's settings of the task with its metric computed by `run_program`.

    lm-eval's metric comes from the Hub and runs the programs in its own process; this one runs the same program (the
    prompt, what the model wrote after it, the tests and the call of their `check`) and calls it passed likewise.
    """
    metric = {"metric": _pass_at_k(limits), "aggregation": "mean", "higher_is_better": True}
    joined = {"function": "custom", "filter_fn": _programs}
    return {**settings, "metric_list": [metric], "filter_list": [{"name": "none", "filter": [joined]}]}


def _programs(responses: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What a model wrote after each prompt, joined to it."""
    return [[doc["prompt"] + each for each in written] for written, doc in zip(responses, docs, strict=True)]


def _pass_at_k(limits: CodeLimits) -> Callable[..., dict[str, float]]:
    def pass_at_k(references: Sequence[str], predictions: Sequence[Sequence[str]], **_: Any) -> dict[str, float]:
        """Share of one row's programs that pass its tests; greedy decoding writes one."""
        (tests,), (programs,) = references, predictions
        passed = [run_program(f"{program}\n{tests}", limits).passed for program in programs]
        return {"pass@1": sum(passed) / len(passed)}

    return pass_at_k
