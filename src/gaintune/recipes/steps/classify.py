"""Steps that learn labels: every task with every method, rank and seed, its accuracy, and what the base keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from gaintune.adapters import BASE
from gaintune.config import MethodConfig, Plan, build_plan
from gaintune.errors import ConfigError
from gaintune.evaluate import compare_adapters, compare_classifiers, compare_masked
from gaintune.methods import get_method
from gaintune.models import is_masked
from gaintune.recipes import smoke
from gaintune.recipes.outcome import Context, Outcome
from gaintune.recipes.schema import laid_over
from gaintune.recipes.steps.train import left_out
from gaintune.recipes.world import BUDGETS, content_of, labelled_rows
from gaintune.report import INK, MUTED, NONE, RULE, figure_files, look, styled
from gaintune.results import Interval, bare, replicated
from gaintune.storage import Run, damage, make_folder, read_json, write_bytes, write_json, write_text
from gaintune.workflows import adapt_classifier

Read = Callable[["Measured"], float]
TELLING = 1e9  # digits of a greater number tell nothing
WIDE = 2.0  # ratio of perplexities from which evenly spaced ticks would crowd one end of a log axis


@dataclass(frozen=True)
class Measured:
    """One classifier: accuracy on its task in %, and means over texts of perplexity and of its change in %."""

    task: str
    label: str
    rank: int | None
    seed: int
    accuracy: float
    perplexity: float
    change: float


FIGURES: dict[str, Read] = {
    "accuracy": lambda one: one.accuracy,
    "retention": lambda one: one.change,
    "perplexity": lambda one: one.perplexity,
}


def by_seed(rows: Sequence[Measured], read: Read) -> list[float]:
    """A figure of every seed, in order: its mean over the tasks and ranks of the rows."""
    seeds = sorted({one.seed for one in rows})
    return [mean(read(one) for one in rows if one.seed == seed) for seed in seeds]


def numbers(measured: Sequence[Measured], base: float, confidence: float) -> dict[str, Interval]:
    """Every number by the name that a claim uses; `base` is the perplexity of the untouched base."""
    found = {"base.perplexity": bare(base)}
    labels = {label: [one for one in measured if one.label == label] for label in _unique(measured, "label")}
    groups = dict(labels)
    for label, rows in labels.items():
        ranks = _unique(rows, "rank")
        if len(ranks) > 1:
            groups |= {f"{label}-r{rank}": [one for one in rows if one.rank == rank] for rank in ranks}
    for name, rows in groups.items():
        for figure, read in FIGURES.items():
            found[f"{name}.{figure}"] = replicated(by_seed(rows, read), confidence=confidence)
        for task in _unique(rows, "task"):
            own = [one for one in rows if one.task == task]
            found[f"{name}.{task}.accuracy"] = replicated(by_seed(own, FIGURES["accuracy"]), confidence=confidence)
    names = list(labels)
    for place, one in enumerate(names):
        for other in names[:place]:
            for figure, read in FIGURES.items():
                pairs = zip(by_seed(labels[one], read), by_seed(labels[other], read), strict=True)
                differences = [first - second for first, second in pairs]
                found[f"{one}-minus-{other}.{figure}"] = replicated(differences, confidence=confidence)
    return found


def _unique(rows: Sequence[Measured], attribute: str) -> list:
    return list(dict.fromkeys(getattr(one, attribute) for one in rows))


def _variants(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    """The rows of every method and rank, by its name in tables."""
    found: dict[str, list[Measured]] = {}
    for one in measured:
        found.setdefault(one.label if one.rank is None else f"{one.label}, rank {one.rank}", []).append(one)
    return found


def tables(measured: Sequence[Measured], base: float) -> dict[str, pd.DataFrame]:
    """A row for each method and rank: means over seeds with standard deviations, overall and task by task."""
    tasks = _unique(measured, "task")
    rows, each = {"base": [NONE, f"{base:.2f}", NONE]}, {}
    for name, own in _variants(measured).items():
        rows[name] = [
            _spread(by_seed(own, read), decimals)
            for read, decimals in ((FIGURES[key], 2) for key in ("accuracy", "perplexity", "retention"))
        ]
        each[name] = [
            _spread(by_seed([one for one in own if one.task == task], FIGURES["accuracy"]), 1) for task in tasks
        ]
    seeds = len(_unique(measured, "seed"))
    heads = ["Accuracy, %", "Perplexity", "Change of perplexity, %"]
    told = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return {
        f"Mean over tasks; {told}": pd.DataFrame.from_dict(rows, orient="index", columns=heads),
        f"Accuracy of every task, %; {told}": pd.DataFrame.from_dict(each, orient="index", columns=tasks),
    }


def _spread(values: Sequence[float], decimals: int) -> str:
    middle, spread = mean(values), stdev(values) if len(values) > 1 else None
    form = f".{decimals}f" if abs(middle) < TELLING else ".2g"
    told = f"{round(middle, decimals) + 0.0:{form}}".replace("-", "−")
    return told if spread is None else f"{told} ± {spread:{form}}"


def write(measured: Sequence[Measured], base: float, folder: Path) -> None:
    """Write classifiers.csv, a row for each, and the figure as accuracy-perplexity.png and .svg."""
    make_folder(folder)
    frame = pd.DataFrame([asdict(one) for one in measured])
    write_text(folder / "classifiers.csv", frame.to_csv(index=False, lineterminator="\n"))
    for name, content in figure_files("accuracy-perplexity", figure(measured, base)).items():
        write_bytes(folder / name, content)


def figure(measured: Sequence[Measured], base: float) -> Figure:
    """Accuracy (up) against perplexity (across, log): a point for each method and rank, with standard deviations."""

    def draw() -> Figure:
        sheet = Figure(figsize=(5.6, 4.2), layout="constrained")
        axes = sheet.subplots()
        for index, label in enumerate(_unique(measured, "label")):
            _draw_method(axes, [one for one in measured if one.label == label], index)
        axes.axvline(base, color=INK, linewidth=0.9, zorder=1, label="pretrained")
        axes.set_xscale("log")
        perplexities = [base, *(one.perplexity for one in measured)]
        wide = max(perplexities) / min(perplexities) > WIDE
        few = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)) if wide else few)
        axes.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="perplexity of texts never learnt (log)", ylabel="accuracy, mean over tasks, %")
        axes.grid(color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.set_title("Left and up is better; numbers are ranks", loc="left")
        axes.legend(frameon=False, handlelength=3)
        return sheet

    return styled(draw)


def _draw_method(axes: Axes, rows: Sequence[Measured], index: int) -> None:
    style = look(index)
    ranks = _unique(rows, "rank")
    own = [[one for one in rows if one.rank == rank] for rank in ranks]
    across, up = ([by_seed(one, FIGURES[key]) for one in own] for key in ("perplexity", "accuracy"))
    x, y = [mean(values) for values in across], [mean(values) for values in up]
    spreads = [[stdev(values) if len(values) > 1 else 0.0 for values in side] for side in (across, up)]
    axes.plot(x, y, color=style.colour, linestyle=style.dashes, marker=style.marker, markersize=5, label=rows[0].label)
    axes.errorbar(
        x, y, xerr=spreads[0], yerr=spreads[1], ecolor=style.colour, elinewidth=0.9, alpha=0.5, fmt="none", zorder=2
    )
    for rank, place in zip(ranks, zip(x, y, strict=True), strict=True):
        if rank is not None:
            axes.annotate(str(rank), place, xytext=(5, 4), textcoords="offset points", color=MUTED, fontsize=7)


KEYS = ("tasks", "texts", "methods", "ranks", "seeds", "text")
SECTIONS = ("model", "train", "evaluate", "classify")
HOPELESS = 1e100
"""A perplexity, or a change in %, that stands for all greater ones: infinity must not stop the rest of a report."""
SAME_ROWS = "A folder is one study over one set of rows and texts: name another one for others"
DECODER = (
    "the base is a decoder: what it learnt is put back under its own language-model head and ordinary perplexity is "
    "measured, where the paper measures an encoder's masked-LM perplexity"
)


@dataclass(frozen=True)
class Cell:
    """One classifier to train; `rank` is None for a method that has none."""

    task: str
    label: str
    rank: int | None
    seed: int
    plan: Plan

    @property
    def variant(self) -> str:
        """The method with its rank, as its folder is called."""
        return self.label if self.rank is None else f"{self.label}-r{self.rank}"

    @property
    def name(self) -> str:
        """What it is called among those of its task."""
        return f"{self.variant}/seed-{self.seed}"


def classify(settings: dict[str, Any], context: Context) -> Outcome:
    """`gaintune adapt --task classify` for every task, method, rank and seed, then perplexity on `texts`.

    Settings: `tasks`, each a name, or a mapping with `name`, `train` and `methods` (options by label) of its own;
    `texts`; `methods`; `ranks` for those that have one; `seeds`; `text`, the sizes of the texts; sections of a
    plan. Finished classifiers are kept and not trained again.

    Numbers, means over tasks and ranks with t intervals over seeds: `LABEL.accuracy` in %; `LABEL.TASK.accuracy`;
    `LABEL.retention`, the change of perplexity in %; `LABEL.perplexity`; of several ranks also `LABEL-rRANK.accuracy`
    and so on; `A-minus-B.accuracy` and `.retention`, paired seed by seed, for every method A and those before it.
    """
    study = Study(settings, context)
    if not study.tasks:
        return Outcome(notes=(study.why_not,), left_out=True)
    cells = list(study.cells())
    study.settle_rows()
    accuracies = {(cell.task, cell.name): study.accuracy(cell) for cell in cells}
    kept = {task: study.kept([cell for cell in cells if cell.task == task]) for task in study.tasks}
    measured = [
        Measured(
            task=cell.task,
            label=cell.label,
            rank=cell.rank,
            seed=cell.seed,
            accuracy=100 * accuracies[cell.task, cell.name],
            perplexity=kept[cell.task][cell.name].perplexity,
            change=kept[cell.task][cell.name].change,
        )
        for cell in cells
    ]
    base = next(iter(kept.values()))[BASE].perplexity
    write(measured, base, context.folder)
    confidence = cells[0].plan.evaluate.confidence
    return Outcome(
        numbers=numbers(measured, base, confidence),
        tables=tables(measured, base),
        figures=tuple(sorted(context.folder.glob("*.png"))),
        adapters={f"{cell.variant}/{cell.task}-seed-{cell.seed}": study.folder(cell) / "adapter" for cell in cells},
        plan=cells[0].plan,
        apart=True,
        notes=study.notes(),
        without=study.without(measured),
    )


@dataclass(frozen=True)
class Kept:
    """Mean over texts of one model's perplexity, and of its change in % against the base (0 for the base)."""

    perplexity: float
    change: float


def mean_kept(texts: Sequence[tuple[float, float]]) -> Kept:
    """The mean over texts of perplexities and changes, none of them above `HOPELESS`."""
    return Kept(*(sum(min(each, HOPELESS) for each in figures) / len(texts) for figures in zip(*texts, strict=True)))


class Study:
    """The classifiers of one step: their plans, where they lie, and how each is measured."""

    def __init__(self, settings: Mapping[str, Any], context: Context) -> None:
        for key in settings:
            if key not in (*KEYS, *SECTIONS):
                known = ", ".join((*KEYS, *SECTIONS))
                raise ConfigError(f"{context.origin}: unknown key {key!r}; known keys: {known}")
        self._settings = settings
        self._context = context
        asked = {each["name"]: each for each in map(_as_task, settings.get("tasks", ()))}
        self._sources = {name: labelled_rows(context.world, name) for name in asked}
        self.tasks = {name: asked[name] for name, source in self._sources.items() if source is not None}
        self.missing = [name for name, source in self._sources.items() if source is None]
        self._methods = [MethodConfig.model_validate(each) for each in settings.get("methods", ())]
        for each in asked.values():
            for label in each.get("methods", {}):
                if label not in [method.label for method in self._methods]:
                    raise ConfigError(f"{context.origin}: task {each['name']}: no method is called {label!r}")
        if not self._methods or not settings.get("texts"):
            raise ConfigError(f"{context.origin}: give methods, and texts to measure what is kept")

    @property
    def why_not(self) -> str:
        """Which tasks have no rows."""
        return f"left out for want of rows with labels (give --data FOLDER): {', '.join(self.missing)}"

    def cells(self) -> Iterator[Cell]:
        """Every classifier, a task after the other."""
        for task in self.tasks:
            for method in self._methods:
                ranks = self._settings.get("ranks") if "rank" in get_method(method.name).options else None
                for rank in ranks or (None,):
                    for seed in self._settings.get("seeds", (0,)):
                        yield Cell(task, method.label, rank, seed, self._plan(task, method, rank, seed))

    def settle_rows(self) -> None:
        """See that rows and texts are those that the folder began with, for what is finished is not measured again.

        Raises:
            RunDirectoryError: a file has changed.
        """
        texts = [domain.source for domain in self.text_plan().data.domains]
        sources = {source for source in (*self._sources.values(), *texts) if source is not None}
        sums = {source: content_of(Path(source)) for source in sorted(sources) if Path(source).exists()}
        make_folder(self._context.folder)
        Run(self._context.folder).settle("rows.json", sums, SAME_ROWS)

    def _plan(self, task: str, method: MethodConfig, rank: int | None, seed: int) -> Plan:
        own = self.tasks[task]
        given = {
            **method.model_dump(exclude_none=True, exclude_defaults=True),
            **own.get("methods", {}).get(method.label, {}),
        }
        values: dict[str, Any] = self._common()
        for over in (self._settings, own):
            values = laid_over(values, {key: over[key] for key in SECTIONS if key in over})
        values["data"] = {"task": "classify", "domains": [{"name": task, "source": self._sources[task]}]}
        values["methods"] = [given if rank is None else {**given, "rank": rank}]
        values = laid_over(values, dict(self._context.world.overrides))
        return build_plan(laid_over(values, {"train": {"seed": seed}}), self._context.origin)

    def _common(self) -> dict[str, Any]:
        """What the scale says of any plan, and its base: of a smoke run an encoder."""
        world = self._context.world
        base = world.model
        if world.scale == "smoke":
            base = str(smoke.encoder(Path(base).with_name("encoder")))
        budget = {key: value for key, value in BUDGETS[world.scale].items() if key in ("model", "evaluate")}
        return laid_over(budget, {"model": {"name": base}})

    def folder(self, cell: Cell) -> Path:
        """Where a classifier lies, and what was measured of it."""
        return self._context.folder / "classifiers" / cell.task / cell.name

    def accuracy(self, cell: Cell) -> float:
        """The share of validation rows that a classifier labels right, once it is trained."""
        folder = self.folder(cell)
        adapter, file = folder / "adapter", folder / "scores.json"
        progress = self._context.progress
        if file.exists() and damage(adapter) is None:
            progress.note(f"{cell.task}: {cell.name} is finished")
            return read_json(file)["accuracy"]["value"]
        make_folder(folder)
        if adapter.is_dir() and damage(adapter) is None:
            scores = compare_classifiers(cell.plan, [adapter], progress=progress)[0].scores
        else:
            scores = adapt_classifier(cell.plan, adapter, progress=progress).scores
        write_json(file, scores.to_dict())
        return scores.accuracy.value

    def kept(self, cells: Sequence[Cell]) -> dict[str, Kept]:
        """What the classifiers of one task keep, by name, and the base among them; what is on disk is not measured."""
        file = self._context.folder / "classifiers" / cells[0].task / "kept.json"
        found = read_json(file) if file.exists() else {}
        adapters = {str(self.folder(cell) / "adapter"): cell.name for cell in cells if cell.name not in found}
        if adapters:
            plan = self.text_plan()
            compare = compare_masked if is_masked(plan.model) else compare_adapters
            figures = compare(plan, list(map(Path, adapters)), progress=self._context.progress)
            for label, name in {BASE: BASE, **adapters}.items():
                own = [figure for figure in figures if figure.label == label]
                found[name] = asdict(mean_kept([(figure.perplexity, figure.change or 0.0) for figure in own]))
            write_json(file, found)
        return {name: Kept(**values) for name, values in found.items()}

    def text_plan(self) -> Plan:
        """The plan that measures what classifiers keep."""
        asked = {key: self._settings[key] for key in ("model", "evaluate") if key in self._settings}
        asked = laid_over({"model": self._common()["model"]}, asked)
        texts = {"domains": self._settings["texts"], "data": self._settings.get("text", {})}
        return self._context.world.plan({**asked, **texts}, origin=self._context.origin)

    def notes(self) -> tuple[str, ...]:
        """What a reader must know."""
        notes = list(left_out({"domains": self._settings["texts"]}, self._context))
        if self.missing:
            notes.append(self.why_not)
        return (*notes, *(() if is_masked(self.text_plan().model) else (DECODER,)))

    def without(self, measured: Sequence[Measured]) -> dict[str, str]:
        """The numbers of tasks that are left out."""
        labels = dict.fromkeys(one.label for one in measured)
        return {f"{label}.{task}.accuracy": "its task has no rows" for label in labels for task in self.missing}


def _as_task(value: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"name": value} if isinstance(value, str) else dict(value)
