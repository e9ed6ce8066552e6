"""Steps that train classifiers: every task with every method, rank and seed, its accuracy, and what the base keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from gaintune.adapters import BASE
from gaintune.config import MethodConfig, Plan, build_plan
from gaintune.data import ROW_SUFFIXES
from gaintune.errors import ConfigError
from gaintune.evaluate import compare_adapters, compare_classifiers, compare_masked
from gaintune.methods import check_method
from gaintune.models import is_masked
from gaintune.recipes import smoke
from gaintune.recipes.outcome import Context, PreparedStep, StepOutcome
from gaintune.recipes.scales import BUDGETS
from gaintune.recipes.schema import laid_over
from gaintune.recipes.steps.train import BEST, OWN_DOMAINS, sums_of
from gaintune.report import INK, MUTED, NONE, figure_files, ruled, style_of, styled
from gaintune.results import Interval, bare, replicated
from gaintune.storage import Run, damage, discard_whole, make_folder, read_stored, write_bytes, write_json, write_text
from gaintune.workflows import adapt_classifier

SECTIONS = ("model", "train", "evaluate", "classify")
KEYS = ("tasks", "texts", "methods", "ranks", "seeds", "text", *SECTIONS)
FOLDERS = ("glue", ".", "domains")  # inside `--data`, where local copies of rows may be
MAX_REPORTED_PERPLEXITY = 1e100  # also of a change in %: infinity must not stop the rest of a report
SAME_ROWS = "A folder is one study over one set of rows and texts: name another one for others"
DECODER = (
    "the base is a decoder: what it learnt is put back under its own language-model head and ordinary perplexity is "
    "measured, where the paper measures an encoder's masked-LM perplexity"
)


def classify(settings: dict[str, Any], context: Context) -> PreparedStep:
    """Train a classifier for every task, method, rank and seed (`gaintune adapt --task classify`); measure `texts`.

    Settings: `tasks`, each a name, or a mapping with `name`, `train` and `methods` (options by label) of its own;
    `texts`; `methods`; `ranks` for those that have one; `seeds`; `text`, the sizes of the texts; sections of a
    plan. Finished classifiers are kept and not trained again.

    Numbers, means over tasks and ranks with t intervals over seeds: `LABEL.accuracy` in %; `LABEL.TASK.accuracy`;
    `LABEL.retention`, the change of perplexity in %; `LABEL.perplexity`; of several ranks also `LABEL-rRANK.accuracy`
    and so on; `A-minus-B.accuracy` and `.retention`, paired seed by seed, for every method A and those before it.
    """
    owned = {
        "methods": "each task has its own",
        "train.seed": "its seeds are an axis",
        "data.task": "its rows have labels",
    }
    context.refuse_owned({**OWN_DOMAINS, **owned})
    study = ClassificationStudy(settings, context)
    if not study.tasks:
        return PreparedStep.left_out(study.why_not)
    runs = list(study.runs())
    for run in runs:
        check_method(run.plan.methods[0])
    adapters = {f"{run.variant}/{run.task}-seed-{run.seed}": study.folder(run) / "adapter" for run in runs}
    texts, plan = study.text_plan, runs[0].plan

    def measure() -> StepOutcome:
        study.check_rows()
        accuracies = [100 * study.accuracy(run) for run in runs]
        kept = {task: study.kept([run for run in runs if run.task == task]) for task in study.tasks}
        scores = [
            ClassifierScores(run.task, run.label, run.rank, run.seed, accuracy, **asdict(kept[run.task][run.name]))
            for run, accuracy in zip(runs, accuracies, strict=True)
        ]
        base = next(iter(kept.values()))[BASE].perplexity
        write(scores, base, context.folder)
        notes = [*context.setup.text_notes({"domains": settings["texts"]}), *([study.why_not] if study.missing else [])]
        notes += [BEST] if plan.train.keep == "best" else []
        missing = [f"{label}.{task}.accuracy" for label in _grouped(scores, "label") for task in study.missing]
        return StepOutcome(
            numbers=numbers(scores, base, plan.evaluate.confidence),
            tables=tables(scores, base),
            figures=tuple(sorted(context.folder.glob("*.png"))),
            adapters=adapters,
            plan=plan,
            apart=True,
            notes=tuple(notes if is_masked(texts.model) else [*notes, DECODER]),
            without=dict.fromkeys(missing, "its task has no rows"),
        )

    return PreparedStep(StepOutcome(adapters=adapters, plan=plan, apart=True), measure)


@dataclass(frozen=True)
class ClassifierRun:
    """One classifier to train; `rank` is None for a method that has none."""

    task: str
    label: str
    rank: int | None
    seed: int
    plan: Plan

    @property
    def variant(self) -> str:
        """The method with its rank, which names its folder."""
        return self.label if self.rank is None else f"{self.label}-r{self.rank}"

    @property
    def name(self) -> str:
        """Its name among the classifiers of its task."""
        return f"{self.variant}/seed-{self.seed}"


@dataclass(frozen=True)
class Kept:
    """Means over texts of a model's perplexity, and of its change in % against the base (0 for the base)."""

    perplexity: float
    change: float


def mean_kept(texts: Sequence[tuple[float, float]]) -> Kept:
    """Return the means over texts of perplexities and changes, none of them above `MAX_REPORTED_PERPLEXITY`."""
    columns = zip(*texts, strict=True)
    return Kept(*(sum(min(value, MAX_REPORTED_PERPLEXITY) for value in column) / len(texts) for column in columns))


class ClassificationStudy:
    """The classifiers of one step: their plans, their folders, and what is measured of them."""

    def __init__(self, settings: Mapping[str, Any], context: Context) -> None:
        origin = context.origin
        if unknown := [key for key in settings if key not in KEYS]:
            raise ConfigError(f"{origin}: unknown key {unknown[0]!r}; known keys: {', '.join(KEYS)}")
        named = settings.get("tasks", ())
        tasks: list[dict[str, Any]] = [{"name": task} if isinstance(task, str) else dict(task) for task in named]
        self._settings, self._context = settings, context
        self._sources: dict[str, str | None] = {}
        for name in (task["name"] for task in tasks):
            hub = name if context.setup.scale == "paper" else None
            local = context.setup.local(name, FOLDERS, ROW_SUFFIXES)
            self._sources[name] = str(local[0]) if local else hub
        self.tasks = {task["name"]: task for task in tasks if self._sources[task["name"]] is not None}
        self.missing = [name for name, source in self._sources.items() if source is None]
        self.why_not = f"left out for want of rows with labels (give --data FOLDER): {', '.join(self.missing)}"
        self._methods = [MethodConfig.model_validate(method) for method in settings.get("methods", ())]
        labels = [method.label for method in self._methods]
        for task in tasks:
            if unknown := [label for label in task.get("methods", {}) if label not in labels]:
                raise ConfigError(f"{origin}: task {task['name']}: no method is called {unknown[0]!r}")
        if not self._methods or not settings.get("texts"):
            raise ConfigError(f"{origin}: give methods, and texts to measure what is kept")

    def runs(self) -> Iterator[ClassifierRun]:
        """Yield every classifier, task by task."""
        for task in self.tasks:
            for method in self._methods:
                ranks = self._settings.get("ranks") if "rank" in check_method(method).options else None
                for rank in ranks or (None,):
                    for seed in self._settings.get("seeds", (0,)):
                        yield ClassifierRun(task, method.label, rank, seed, self._plan(task, method, rank, seed))

    def _plan(self, task: str, method: MethodConfig, rank: int | None, seed: int) -> Plan:
        own = self.tasks[task]
        options = method.model_dump(exclude_none=True, exclude_defaults=True)
        options |= own.get("methods", {}).get(method.label, {})
        values = self._common()
        for over in (self._settings, own):
            values = laid_over(values, {key: over[key] for key in SECTIONS if key in over})
        values["data"] = {"task": "classify", "domains": [{"name": task, "source": self._sources[task]}]}
        values["methods"] = [options if rank is None else {**options, "rank": rank}]
        if self._context.setup.scale == "paper":
            values = self._context.setup.with_fixed_updates(values)
        values = laid_over(values, dict(self._context.setup.overrides))
        return build_plan(laid_over(values, {"train": {"seed": seed}}), self._context.origin)

    def _common(self) -> dict[str, Any]:
        """Return the scale's values of any plan, and its base: an encoder of a smoke run."""
        setup = self._context.setup
        base = str(smoke.encoder(Path(setup.model).with_name("encoder"))) if setup.scale == "smoke" else setup.model
        budget = {key: value for key, value in BUDGETS[setup.scale].items() if key in ("model", "evaluate")}
        return laid_over(budget, {"model": {"name": base}})

    @cached_property
    def text_plan(self) -> Plan:
        """The plan that measures what classifiers keep."""
        settings = self._settings
        own = {key: settings[key] for key in ("model", "evaluate") if key in settings}
        own = laid_over({"model": self._common()["model"]}, own)
        texts = {"domains": settings["texts"], "data": settings.get("text", {})}
        return self._context.setup.plan({**own, **texts}, origin=self._context.origin)

    def check_rows(self) -> None:
        """Refuse rows and texts other than those that the folder began with: finished work is not measured again."""
        texts = [domain.source for domain in self.text_plan.data.domains]
        sources = {source for source in (*self._sources.values(), *texts) if source is not None}
        sums = {source: sums_of(Path(source)) for source in sorted(sources) if Path(source).exists()}
        make_folder(self._context.folder)
        Run(self._context.folder).write_once("rows.json", sums, SAME_ROWS)

    def folder(self, run: ClassifierRun) -> Path:
        """Return the folder of a classifier and of what was measured of it."""
        return self._context.folder / "classifiers" / run.task / run.name

    def accuracy(self, run: ClassifierRun) -> float:
        """Return the share of validation rows that a classifier labels right; train it unless it is finished."""
        folder, progress = self.folder(run), self._context.progress
        adapter, file = folder / "adapter", folder / "scores.json"
        trained = adapter.is_dir() and damage(adapter) is None
        if trained and file.exists():
            progress.note(f"{run.task}: {run.name} is finished")
            return read_stored(file, lambda scores: float(scores["accuracy"]["value"]))
        make_folder(folder)
        if trained:
            scores = compare_classifiers(run.plan, [adapter], progress=progress)[0].scores
        else:
            scores = adapt_classifier(run.plan, adapter, progress=progress).scores
        write_json(file, scores.to_dict())
        if run.plan.train.keep == "best":  # the snapshots of all classifiers would fill a disk
            copies = adapter.with_name(f"{adapter.name}.snapshots")
            for copy in copies.glob("step-*"):
                discard_whole(copy)
            with contextlib.suppress(OSError):
                copies.rmdir()
        return scores.accuracy.value

    def kept(self, runs: Sequence[ClassifierRun]) -> dict[str, Kept]:
        """Return what the base and the classifiers of one task keep, by name; what is on disk is not measured again."""
        file = self._context.folder / "classifiers" / runs[0].task / "kept.json"
        kept: dict[str, Kept] = {}
        if file.exists():
            kept = read_stored(file, lambda values: {name: Kept(**value) for name, value in values.items()})
        adapters = {str(self.folder(run) / "adapter"): run.name for run in runs if run.name not in kept}
        if adapters:
            compare = compare_masked if is_masked(self.text_plan.model) else compare_adapters
            figures = compare(self.text_plan, list(map(Path, adapters)), progress=self._context.progress)
            for label, name in {BASE: BASE, **adapters}.items():
                own = [figure for figure in figures if figure.label == label]
                kept[name] = mean_kept([(figure.perplexity, figure.change or 0.0) for figure in own])
            write_json(file, {name: asdict(value) for name, value in kept.items()})
        return kept


@dataclass(frozen=True)
class ClassifierScores:
    """One classifier: accuracy on its task in %, and means over texts of perplexity and of its change in %."""

    task: str
    label: str
    rank: int | None
    seed: int
    accuracy: float
    perplexity: float
    change: float


Rows = Sequence[ClassifierScores]
FIGURES = {"accuracy": "accuracy", "retention": "change", "perplexity": "perplexity"}  # number of a claim -> field
SHORT_BELOW = 1e9  # greater numbers are written with two digits
WIDE = 2.0  # ratio of perplexities from which evenly spaced ticks would crowd one end of a log axis


def by_seed(rows: Rows, field: str) -> list[float]:
    """Return a field's mean over tasks and ranks for every seed, in order."""
    return [mean(getattr(row, field) for row in own) for _, own in sorted(_grouped(rows, "seed").items())]


def numbers(rows: Rows, base: float, confidence: float) -> dict[str, Interval]:
    """Return every number by the name that a claim uses; `base` is the perplexity of the untouched base."""
    result = {"base.perplexity": bare(base)}
    labels = _grouped(rows, "label")
    groups = dict(labels)
    for label, own in labels.items():
        ranks = _grouped(own, "rank")
        if len(ranks) > 1:
            groups |= {f"{label}-r{rank}": of_rank for rank, of_rank in ranks.items()}
    for name, own in groups.items():
        for figure, field in FIGURES.items():
            result[f"{name}.{figure}"] = replicated(by_seed(own, field), confidence=confidence)
        for task, of_task in _grouped(own, "task").items():
            result[f"{name}.{task}.accuracy"] = replicated(by_seed(of_task, "accuracy"), confidence=confidence)
    for index, one in enumerate(labels):
        for other in list(labels)[:index]:
            for figure, field in FIGURES.items():
                pairs = zip(by_seed(labels[one], field), by_seed(labels[other], field), strict=True)
                differences = [first - second for first, second in pairs]
                result[f"{one}-minus-{other}.{figure}"] = replicated(differences, confidence=confidence)
    return result


def _grouped(rows: Rows, field: str) -> dict[Any, list[ClassifierScores]]:
    groups: dict[Any, list[ClassifierScores]] = {}
    for row in rows:
        groups.setdefault(getattr(row, field), []).append(row)
    return groups


def tables(rows: Rows, base: float) -> dict[str, pd.DataFrame]:
    """Return a row for each method and rank: means over seeds with standard deviations, overall and task by task."""
    overall, each = {"base": [NONE, f"{base:.2f}", NONE]}, {}
    for label, of_label in _grouped(rows, "label").items():
        for rank, own in _grouped(of_label, "rank").items():
            name = label if rank is None else f"{label}, rank {rank}"
            overall[name] = [_spread(by_seed(own, field), 2) for field in ("accuracy", "perplexity", "change")]
            tasks = _grouped(own, "task")
            each[name] = [_spread(by_seed(tasks[task], "accuracy"), 1) for task in _grouped(rows, "task")]
    seeds = len(_grouped(rows, "seed"))
    heads = ["Accuracy, %", "Perplexity", "Change of perplexity, %"]
    over = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    tasks = list(_grouped(rows, "task"))
    return {
        f"Mean over tasks; {over}": pd.DataFrame.from_dict(overall, orient="index", columns=heads),
        f"Accuracy of every task, %; {over}": pd.DataFrame.from_dict(each, orient="index", columns=tasks),
    }


def _spread(values: Sequence[float], decimals: int) -> str:
    middle = mean(values)
    form = f".{decimals}f" if abs(middle) < SHORT_BELOW else ".2g"
    text = f"{round(middle, decimals) + 0.0:{form}}".replace("-", "−")
    return f"{text} ± {stdev(values):{form}}" if len(values) > 1 else text


def write(rows: Rows, base: float, folder: Path) -> None:
    """Write classifiers.csv, a row for each, and the figure as accuracy-perplexity.png and .svg."""
    make_folder(folder)
    frame = pd.DataFrame(rows)
    write_text(folder / "classifiers.csv", frame.to_csv(index=False, lineterminator="\n"))
    for name, content in figure_files("accuracy-perplexity", figure(rows, base)).items():
        write_bytes(folder / name, content)


def figure(rows: Rows, base: float) -> Figure:
    """Draw accuracy (up) against perplexity (across, log): a point for each method and rank, with deviations."""

    def draw() -> Figure:
        sheet = Figure(figsize=(5.6, 4.2), layout="constrained")
        axes = sheet.subplots()
        for index, own in enumerate(_grouped(rows, "label").values()):
            _draw_method(axes, own, index)
        axes.axvline(base, color=INK, linewidth=0.9, zorder=1, label="pretrained")
        axes.set_xscale("log")
        perplexities = [base, *(row.perplexity for row in rows)]
        wide = max(perplexities) / min(perplexities) > WIDE
        few = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)) if wide else few)
        axes.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="perplexity of texts never learnt (log)", ylabel="accuracy, mean over tasks, %")
        ruled(axes, "both")
        axes.set_title("Left and up is better; numbers are ranks", loc="left")
        axes.legend(frameon=False, handlelength=3)
        return sheet

    return styled(draw)


def _draw_method(axes: Axes, rows: Rows, index: int) -> None:
    style, ranks = style_of(index), _grouped(rows, "rank")
    across, up = ([by_seed(own, field) for own in ranks.values()] for field in ("perplexity", "accuracy"))
    x, y = ([mean(values) for values in side] for side in (across, up))
    x_spread, y_spread = ([stdev(v) if len(v) > 1 else 0.0 for v in side] for side in (across, up))
    axes.plot(x, y, color=style.color, linestyle=style.dashes, marker=style.marker, markersize=5, label=rows[0].label)
    bars = {"ecolor": style.color, "elinewidth": 0.9, "alpha": 0.5, "fmt": "none", "zorder": 2}
    axes.errorbar(x, y, xerr=x_spread, yerr=y_spread, **bars)
    for rank, point in zip(ranks, zip(x, y, strict=True), strict=True):
        if rank is not None:
            axes.annotate(str(rank), point, xytext=(5, 4), textcoords="offset points", color=MUTED, fontsize=7)
