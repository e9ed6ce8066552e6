"""Steps that train on answers to questions, and then ask questions: a classification loss over words."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from gaintune.adapters import BASE
from gaintune.config import Plan
from gaintune.data import (
    QUESTION_SETS,
    ROW_SUFFIXES,
    holds_questions,
    load_questions,
    write_choice_rows,
    write_instruction_rows,
)
from gaintune.errors import ConfigError
from gaintune.evaluate import ChoiceFigure, compare_choices, difference
from gaintune.recipes.outcome import Context, PreparedStep, StepOutcome
from gaintune.recipes.scales import ScaleSetup
from gaintune.recipes.steps.train import MEASURE, OWN_DOMAINS, sums_of, train
from gaintune.report import INK, NONE, figure_files, ruled, style_of, styled, summary_frame, with_interval
from gaintune.results import Interval, in_percent
from gaintune.storage import Run, make_folder, write_bytes

FOLDERS = ("questions", "benchmarks", ".", "domains", "glue")  # inside `--data`, where local copies may be
SAME_ROWS = "A step is one set of rows: name another folder for others"


def answers(settings: dict[str, Any], context: Context) -> PreparedStep:
    """Train each method on the answers to the set `learn`; then ask base and methods every set of `ask`.

    Only the tokens of the right answer are trained on, in a run of one domain: cross-entropy over the vocabulary, as in
    GAIN's appendix H. No row is both trained on and asked. Settings: `learn`, `ask`, `methods`, sections of a plan;
    `classify.validation_rows` limits the rows that are asked of a set.

    Numbers: `LABEL.SET.accuracy` and `base.SET.accuracy` in %; `LABEL.SET`, points of accuracy against the base, and
    `A-minus-B.SET`, both paired row by row; `LABEL.in_domain`, % of perplexity of the answers trained on.
    """
    learn, ask = settings.pop("learn", None), tuple(settings.pop("ask", ()))
    if learn not in QUESTION_SETS or not ask or not set(ask) <= set(QUESTION_SETS):
        known = ", ".join(QUESTION_SETS)
        raise ConfigError(f"{context.origin}: `learn` names a set of questions, and `ask` some: {known}")
    questions = QuestionPlan(learn, ask, {name: local_questions(context.setup, name) for name in (learn, *ask)})
    missing = [name for name, path in questions.paths.items() if path is None and context.setup.scale != "paper"]
    if missing:
        why = f"left out for want of questions with their answers (give --data FOLDER): {', '.join(missing)}"
        return PreparedStep.left_out(why)
    context.refuse_owned({**OWN_DOMAINS, "data.task": "answers are trained on as instructions"})
    rows = context.folder / "questions"
    data = {"task": "instruct", "template": "plain", "end_of_text": False, **settings.pop("data", {})}
    domain = {"name": learn, "source": str(rows / f"{learn}-learnt")}
    plan = context.setup.plan({**settings, "domains": [domain], "data": data}, origin=context.origin)

    def run() -> StepOutcome:
        counts = questions.write(rows, plan.data.seed)
        matrix, outcome = train(plan, context.folder / "run", context)
        labels = {BASE: BASE, **{str(path): key.partition("/")[0] for key, path in outcome.adapters.items()}}
        sets = {name: rows / f"{name}.jsonl" for name in ask}
        figures = compare_choices(plan, list(outcome.adapters.values()), sets=sets, progress=context.progress)
        by_model = {(labels[figure.label], figure.domain): figure for figure in figures}
        _write_figure(by_model, context.folder)
        in_domain = {name: value for name, value in outcome.numbers.items() if name.endswith(".in_domain")}
        return replace(
            outcome,
            numbers={**in_domain, **_numbers(by_model, plan)},
            tables={"Answers": _table(by_model), f"What was learnt: {MEASURE}": summary_frame(matrix)},
            figures=(*sorted(context.folder.glob("*.png")), *outcome.figures),
            notes=(*counts, *outcome.notes),
        )

    return PreparedStep(StepOutcome.expected(plan), run)


@dataclass(frozen=True)
class QuestionPlan:
    """The set of questions that a step trains on and those that it asks, with their local copies."""

    learn: str
    ask: tuple[str, ...]
    paths: Mapping[str, Path | None]

    def write(self, folder: Path, seed: int) -> list[str]:
        """Write the rows, unless they differ from those that the step began with; say how many there are of each."""
        make_folder(folder.parent)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".questions-") as name:
            fresh = Path(name)
            counts = self._write_rows(fresh, seed)
            sums = sums_of(fresh)
            Run(folder.parent).write_once("questions.json", sums, SAME_ROWS)
            for key in sums:
                make_folder((folder / key).parent)
                (fresh / key).replace(folder / key)
        return counts

    def _write_rows(self, folder: Path, seed: int) -> list[str]:
        counts = []
        training = folder / f"{self.learn}-learnt"
        make_folder(training)
        for name, path in self.paths.items():
            questions = load_questions(name, path, learn=name == self.learn, seed=seed)
            if name == self.learn:
                write_instruction_rows(questions.train, training / "train.jsonl")
                write_instruction_rows(questions.validation, training / "validation.jsonl")
                counts.append(f"{name}: {len(questions.train):,} rows of {questions.source} to learn from")
            if name in self.ask:
                write_choice_rows(questions.validation, folder / f"{name}.jsonl")
                counts.append(f"{name}: {len(questions.validation):,} rows of {questions.source} to ask")
        return counts


def local_questions(setup: ScaleSetup, name: str) -> Path | None:
    """Return the local copy of a set: the first file or folder of its name that holds questions; None for none."""
    return next(filter(holds_questions, setup.local(name, FOLDERS, ROW_SUFFIXES)), None)


Figures = Mapping[tuple[str, str], ChoiceFigure]  # by label and set


def _numbers(figures: Figures, plan: Plan) -> dict[str, Interval]:
    numbers = {}
    for (label, name), figure in figures.items():
        numbers[f"{label}.{name}.accuracy"] = in_percent(figure.accuracy)
        if figure.change is not None:
            numbers[f"{label}.{name}"] = in_percent(figure.change)
        for (other, set_), against in figures.items():
            if set_ == name and other != label and BASE not in (label, other):
                paired = difference(against.answers, figure.answers, plan.evaluate)
                numbers[f"{label}-minus-{other}.{name}"] = in_percent(paired)
    return numbers


def _table(figures: Figures) -> pd.DataFrame:
    """Return a row for each model: accuracy on every set, and points against the base."""
    labels, sets = (list(dict.fromkeys(names)) for names in zip(*figures, strict=True))
    rows: dict[str, list[str]] = {label: [] for label in labels}
    heads = []
    for name in sets:
        heads += [f"{name} ({figures[BASE, name].rows:,} rows), %", "against the base, points"]
        for label in labels:
            figure = figures[label, name]
            change = NONE if figure.change is None else with_interval(in_percent(figure.change))
            rows[label] += [f"{100 * figure.accuracy.value:.1f}", change]
    return pd.DataFrame.from_dict(rows, orient="index", columns=heads)


def _write_figure(figures: Figures, folder: Path) -> None:
    """Draw each model's accuracy on every set with its interval, and the most frequent answer's, as accuracy.png."""

    def draw() -> Figure:
        labels, sets = (list(dict.fromkeys(names)) for names in zip(*figures, strict=True))
        sheet = Figure(figsize=(2.4 + 1.9 * len(sets), 3.6), layout="constrained")
        axes = sheet.subplots()
        for index, label in enumerate(labels):
            shift = 0.5 * (index + 0.5) / len(labels) - 0.25
            shares = [figures[label, name].accuracy for name in sets]
            x, y = [place + shift for place in range(len(sets))], [100 * share.value for share in shares]
            below = [100 * (share.value - (share.low or 0)) for share in shares]
            above = [100 * ((1 if share.high is None else share.high) - share.value) for share in shares]
            style = style_of(index)
            axes.errorbar(x, y, yerr=[below, above], color=style.color, fmt=style.marker, markersize=5, label=label)
        for place, name in enumerate(sets):
            level = 100 * figures[BASE, name].majority
            axes.plot([place - 0.35, place + 0.35], [level, level], color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.set_xticks(range(len(sets)), sets)
        axes.set_xlim(-0.5, len(sets) - 0.5)
        axes.set(ylabel="accuracy, %")
        ruled(axes)
        axes.set_title("Higher is better; dashes: the most frequent answer", loc="left")
        axes.legend(frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
        return sheet

    make_folder(folder)
    for name, content in figure_files("accuracy", styled(draw)).items():
        write_bytes(folder / name, content)
