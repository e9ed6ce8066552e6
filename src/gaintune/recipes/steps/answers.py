"""Steps that learn to answer questions, and ask questions of what was learnt: a classification loss over words."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from gaintune.adapters import BASE
from gaintune.config import Plan
from gaintune.data import QUESTION_SETS, load_questions, write_choice_rows, write_instruction_rows
from gaintune.errors import ConfigError
from gaintune.evaluate import ChoiceFigure, compare_choices, difference
from gaintune.recipes.outcome import Context, Outcome
from gaintune.recipes.steps.train import MEASURE, adapters_of, learn, matrix_numbers, notes_on
from gaintune.recipes.world import questions
from gaintune.report import INK, NONE, RULE, figure_files, look, styled, summary_frame, with_interval
from gaintune.results import Interval
from gaintune.storage import Run, make_folder, sha256_file, write_bytes

SAME_ROWS = "A step is one set of rows: name another folder for others"


def answers(settings: dict[str, Any], context: Context) -> Outcome:
    """Each method learns the answers to the set `learn`; then base and methods answer every set of `ask`.

    Learnt are the tokens of the right answer alone, in a run of one domain: cross-entropy over the vocabulary, as in
    GAIN's appendix H. Rows that are asked are none of those that are learnt. Settings: `learn`, `ask`, `methods`,
    sections of a plan; `classify.validation_rows` limits the rows that are asked of a set.

    Numbers: `LABEL.SET.accuracy` and `base.SET.accuracy` in %; `LABEL.SET`, points of accuracy against the base, and
    `A-minus-B.SET`, both paired row by row; `LABEL.in_domain`, % of perplexity of the answers learnt.
    """
    asked = asked_of(settings, context)
    if asked.why_not:
        return Outcome(notes=(asked.why_not,), left_out=True)
    ask, plan, rows = asked.ask, asked.plan(settings, context), context.folder / "questions"
    counts = _settle_rows(rows, asked, plan.data.seed)
    run = context.folder / "run"
    matrix, diverged = learn(plan, run, context)
    adapters = adapters_of(run, matrix)
    labels = {BASE: BASE, **{str(folder): key.partition("/")[0] for key, folder in adapters.items()}}
    figures = compare_choices(
        plan,
        list(adapters.values()),
        sets={name: rows / f"{name}.jsonl" for name in ask},
        progress=context.progress,
    )
    found = {(labels[one.label], one.domain): one for one in figures}
    _write_figure(found, context.folder)
    in_domain = {name: value for name, value in matrix_numbers(matrix).items() if name.endswith(".in_domain")}
    return Outcome(
        numbers={**in_domain, **_numbers(found, plan)},
        tables={"Answers": _table(found), f"What was learnt: {MEASURE}": summary_frame(matrix)},
        figures=(*sorted(context.folder.glob("*.png")), *sorted((run / "figures").glob("*.png"))),
        adapters=adapters,
        plan=plan,
        notes=(*counts, *notes_on(diverged)),
        runs=(run,),
        diverged=diverged,
    )


@dataclass(frozen=True)
class Asked:
    """The sets that a step learns and asks, with their local copies, and why this scale has not all of them."""

    learn: str
    ask: tuple[str, ...]
    places: Mapping[str, Path | None]
    why_not: str | None

    def plan(self, settings: dict[str, Any], context: Context) -> Plan:
        """The plan that learns the answers, from rows that need not be written yet."""
        domain = {"name": self.learn, "source": str(context.folder / "questions" / f"{self.learn}-learnt")}
        data = {"task": "instruct", "template": "plain", "end_of_text": False, **settings.pop("data", {})}
        return context.world.plan({**settings, "domains": [domain], "data": data}, origin=context.origin)


def asked_of(settings: dict[str, Any], context: Context) -> Asked:
    """Take `learn` and `ask` out of the settings; ConfigError for a set that is not known."""
    learn, ask = settings.pop("learn", None), tuple(settings.pop("ask", ()))
    if learn not in QUESTION_SETS or not ask or not set(ask) <= set(QUESTION_SETS):
        known = ", ".join(QUESTION_SETS)
        raise ConfigError(f"{context.origin}: `learn` names a set of questions, and `ask` some: {known}")
    places = {name: questions(context.world, name) for name in (learn, *ask)}
    missing = [name for name, place in places.items() if place is None and context.world.scale != "paper"]
    why = f"left out for want of questions with their answers (give --data FOLDER): {', '.join(missing)}"
    return Asked(learn, ask, places, why if missing else None)


def _settle_rows(folder: Path, asked: Asked, seed: int) -> list[str]:
    """Write the rows, unless they differ from those that the step began with; says how many there are of each."""
    make_folder(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".questions-") as name:
        fresh = Path(name)
        counts = _write_rows(fresh, asked.places, asked.learn, asked.ask, seed)
        files = {file.relative_to(fresh).as_posix(): file for file in sorted(fresh.rglob("*.jsonl"))}
        Run(folder.parent).settle("questions.json", {key: sha256_file(file) for key, file in files.items()}, SAME_ROWS)
        for key, file in files.items():
            make_folder((folder / key).parent)
            file.replace(folder / key)
    return counts


def _write_rows(
    folder: Path, places: Mapping[str, Path | None], learn: str, ask: Sequence[str], seed: int
) -> list[str]:
    """Write what is learnt as instruction rows and what is asked as questions; says how many there are of each."""
    told = []
    make_folder(folder / f"{learn}-learnt")
    for name, place in places.items():
        rows = load_questions(name, place, learn=name == learn, seed=seed)
        if name == learn:
            write_instruction_rows(rows.train, folder / f"{name}-learnt" / "train.jsonl")
            write_instruction_rows(rows.validation, folder / f"{name}-learnt" / "validation.jsonl")
            told.append(f"{name}: {len(rows.train):,} rows of {rows.source} to learn from")
        if name in ask:
            write_choice_rows(rows.validation, folder / f"{name}.jsonl")
            told.append(f"{name}: {len(rows.validation):,} rows of {rows.source} to ask")
    return told


Found = Mapping[tuple[str, str], ChoiceFigure]


def _numbers(found: Found, plan: Plan) -> dict[str, Interval]:
    numbers = {}
    for (label, name), one in found.items():
        numbers[f"{label}.{name}.accuracy"] = _percent(one.accuracy)
        if one.change is not None:
            numbers[f"{label}.{name}"] = _percent(one.change)
        for (other, asked), against in found.items():
            if asked == name and other != label and BASE not in (label, other):
                share = difference(against.answers, one.answers, plan.evaluate)
                numbers[f"{label}-minus-{other}.{name}"] = _percent(share)
    return numbers


def _percent(share: Interval) -> Interval:
    ends = (None if end is None else 100 * end for end in (share.low, share.high))
    return Interval(100 * share.value, *ends)


def _table(found: Found) -> pd.DataFrame:
    """A row for each model: accuracy on every set, and points against the base."""
    sets = list(dict.fromkeys(name for _, name in found))
    rows = {}
    for label in dict.fromkeys(label for label, _ in found):
        cells = []
        for one in (found[label, name] for name in sets):
            change = NONE if one.change is None else with_interval(_percent(one.change))
            cells += [f"{100 * one.accuracy.value:.1f}", change]
        rows[label] = cells
    heads = [
        head for name in sets for head in (f"{name} ({found[BASE, name].rows:,} rows), %", "against the base, points")
    ]
    return pd.DataFrame.from_dict(rows, orient="index", columns=heads)


def _write_figure(found: Found, folder: Path) -> None:
    """The accuracy of every model on every set with its interval, and the most frequent answer's, as accuracy.png."""

    def draw() -> Figure:
        sets = list(dict.fromkeys(name for _, name in found))
        labels = list(dict.fromkeys(label for label, _ in found))
        sheet = Figure(figsize=(2.4 + 1.9 * len(sets), 3.6), layout="constrained")
        axes = sheet.subplots()
        for index, label in enumerate(labels):
            shift = 0.5 * (index + 0.5) / len(labels) - 0.25
            shares = [found[label, name].accuracy for name in sets]
            x, y = [place + shift for place in range(len(sets))], [100 * share.value for share in shares]
            reach = [[100 * (share.value - (share.low or 0)) for share in shares]]
            reach.append([100 * ((1 if share.high is None else share.high) - share.value) for share in shares])
            style = look(index)
            axes.errorbar(x, y, yerr=reach, color=style.colour, fmt=style.marker, markersize=5, label=label)
        for place, name in enumerate(sets):
            level = 100 * found[BASE, name].majority
            axes.plot([place - 0.35, place + 0.35], [level, level], color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.set_xticks(range(len(sets)), sets)
        axes.set_xlim(-0.5, len(sets) - 0.5)
        axes.set(ylabel="accuracy, %")
        axes.grid(color=RULE, linewidth=0.6, axis="y")
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.set_title("Higher is better; dashes: the most frequent answer", loc="left")
        axes.legend(frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
        return sheet

    make_folder(folder)
    for name, content in figure_files("accuracy", styled(draw)).items():
        write_bytes(folder / name, content)
