"""What a recipe's training steps take at scale paper: memory, from the shapes of its models alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gaintune.config import Plan
from gaintune.progress import Silent
from gaintune.recipes.outcome import Context
from gaintune.recipes.scales import TRAINING, ScaleSetup
from gaintune.recipes.schema import Recipe, Step
from gaintune.recipes.steps import KINDS
from gaintune.recipes.steps.classify import ClassificationStudy
from gaintune.workflows import MethodEstimate, estimate_plan, in_gb, read_bytes

DEVICE = "80GB"
DEVICES = (1, 8)
CHANGES_NUMBERS = "model.quantization"  # with it the experiment is not the paper's any more


@dataclass(frozen=True)
class StepMemory:
    """Memory of those methods of a step that take the same, in words: the peak on a device, and what to set."""

    step: str
    model: str
    labels: tuple[str, ...]
    says: str


def paper_memory(recipe: Recipe) -> Iterator[StepMemory]:
    """Say of each training step which methods fit one or eight GPUs of 80 GB at scale paper, or what to set.

    Yields one entry for all methods of a step that take the same.
    """
    setup, recipe = ScaleSetup.make("paper", recipe.model, None, {}, Path()), recipe.at("paper")
    for step in recipe.steps:
        plan = _plan(recipe, step, setup)
        if plan is None:
            continue
        said: dict[str, list[str]] = {}
        for method in plan.methods:
            said.setdefault(_says(plan.model_copy(update={"methods": (method,)})), []).append(method.label)
        for words, labels in said.items():
            yield StepMemory(step.name, plan.model.name, tuple(labels), words)


def _plan(recipe: Recipe, step: Step, setup: ScaleSetup) -> Plan | None:
    """Return the plan of a step that trains, with all its methods; None for other steps."""
    settings = recipe.settings(step, "paper")
    context = Context(step.name, Path(step.name), setup, {}, Silent())
    if step.do in TRAINING:
        return KINDS[step.do](settings, context).expected.plan
    if step.do != "classify":
        return None
    runs = list(ClassificationStudy(settings, context).runs())
    methods = {run.variant: run.plan.methods[0] for run in runs if run.task == runs[0].task}
    labelled = tuple(method.model_copy(update={"label": variant}) for variant, method in methods.items())
    return runs[0].plan.model_copy(update={"methods": labelled})


def _says(plan: Plan) -> str:
    """Say how a plan with one method fits: as it is, with settings, or not at all."""
    tried: list[tuple[int, MethodEstimate]] = []
    for devices in DEVICES:
        if plan.train.effective_batch and plan.train.effective_batch % (devices * plan.train.batch_size) and tried:
            break  # as many processes would change the rows of an update
        (estimate,) = estimate_plan(plan, devices=devices, device_memory=read_bytes(DEVICE)).methods
        if estimate.fits and devices == 1:
            return f"{in_gb(estimate.memory.peak)}, fits 1 x {DEVICE}"
        tried.append((devices, estimate))
        if estimate.settings and CHANGES_NUMBERS not in estimate.settings:
            break
    helped = [(devices, estimate) for devices, estimate in tried if estimate.settings]
    devices, estimate = min(helped or tried[-1:], key=lambda trial: CHANGES_NUMBERS in trial[1].settings)
    return f"{in_gb(tried[0][1].memory.peak)} as shipped; on {devices} x {DEVICE} {estimate.advice}"
