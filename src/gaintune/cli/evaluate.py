"""The command that measures a model and adapters on it, its options, and the tables that it prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field
from rich.table import Table

from gaintune.adapters import BASE
from gaintune.cli.console import err, out, percent, progress_on, quiet_libraries, say, table
from gaintune.cli.options import PLAN_OF_TEXTS, AllowOtherBase, Given, command, refuse
from gaintune.config import EvaluateConfig, Flag, Plan, Section, as_domain
from gaintune.errors import ConfigError
from gaintune.progress import plural
from gaintune.results import Interval

if TYPE_CHECKING:
    from gaintune.evaluate import Scores
    from gaintune.evaluate.benchmarks import BenchmarkComparison, BenchmarkConfig, BenchmarkReport, BenchmarkScore
    from gaintune.workflows import ClassifierResult

commands = typer.Typer()


class EvaluationSettings(Section):
    """Measures other than the perplexity of texts and the accuracy of classifiers."""

    masked: bool = Field(default=False, description="masked-LM perplexity of an encoder with its original head.")
    choices: Annotated[list[str], Flag(metavar="FILE|NAME=FILE")] = Field(
        default=[], description="questions with choices: accuracy by the likelihood of each choice; repeatable."
    )


class BenchmarkSettings(Section):
    """Options for benchmarks, beside their names; None for what was not given."""

    fewshot: int | None = Field(default=None, description="worked examples before a question; lm-eval's unless given.")
    fewshot_seed: int | None = Field(
        default=None, serialization_alias="seed", description="seed that draws worked examples; lm-eval's unless given."
    )
    limit: int | None = Field(default=None, description="rows of each benchmark, the first ones; all unless given.")
    benchmark_data: Annotated[list[str] | None, Flag(metavar="FOLDER|NAME=PATH")] = Field(
        default=None, serialization_alias="data", description="local rows: a folder of benchmarks' folders; repeatable."
    )
    benchmark_source: str | None = Field(
        default=None, serialization_alias="source", description="rows from: auto (local, else the Hub), hub or local."
    )
    generated_tokens: int | None = Field(default=None, description="longest generated answer, in tokens.")
    allow_code_execution: bool = Field(default=False, description="run programs that the model writes (humaneval).")

    def config(self, uncertainty: EvaluateConfig, benchmarks: str | Sequence[str] | None) -> BenchmarkConfig | None:
        """Return which benchmarks to measure and how; None for none.

        Raises:
            ConfigError: an option for benchmarks without any, or a wrong value.
        """
        if not benchmarks:
            refuse("is for benchmarks: name some with --benchmarks", self.model_dump(exclude_unset=True))
            return None
        from gaintune.evaluate.benchmarks import read_config

        common = uncertainty.model_dump()
        common["bootstrap_seed"] = common.pop("seed")
        return read_config({**common, "tasks": benchmarks, **self.model_dump(exclude_unset=True, by_alias=True)})


@command(
    commands,
    "evaluate",
    group="Evaluation",
    takes=("model", "data", "evaluate", "classify"),
    without=("model.name", "data.watched", "data.stream", "data.train_tokens"),
    helps={"plan": PLAN_OF_TEXTS},
    examples="""\
gaintune evaluate demo --adapter adapters/notes --domain notes.jsonl
gaintune evaluate --plan plan.yaml --adapter adapters/notes --json
gaintune evaluate roberta-base --adapter adapters/mrpc --masked --domain law
gaintune evaluate demo --choices medqa=questions.jsonl
gaintune evaluate demo --adapter adapters/notes --benchmarks arc_easy,gsm8k:8""",
)
def evaluate(
    given: Given,
    evaluation: EvaluationSettings,
    benchmark: BenchmarkSettings,
    model: Annotated[
        str | None, typer.Argument(help="Hub id, folder, .gguf file, demo, demo-gemma, or a YAML plan.")
    ] = None,
    adapter: Annotated[
        list[Path] | None, typer.Option(help="Adapter to compare with the base; repeatable.", rich_help_panel="Model")
    ] = None,
    allow_other_base: AllowOtherBase = False,
    benchmarks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="lm-eval's benchmarks: arc_easy,piqa, or gsm8k:8 for eight worked examples.",
            rich_help_panel="Benchmark",
        ),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Measure anew, and keep no scores.", rich_help_panel="Benchmark")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of a table.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Measure a model, and adapters on it, with paired intervals.

    Perplexity and bits per byte of text and instructions; of classifiers the accuracy on labelled rows. With
    --benchmarks lm-eval's scores, and of domains only those that are named with --domain.
    """
    given, adapters = _on_model(given, model), adapter or []
    _check_together(given, evaluation, benchmarks)
    known = given.file or evaluation.masked or evaluation.choices or "data.task" in given.options or benchmarks
    if not known and adapters:
        from gaintune.evaluate import is_classifier

        if all(is_classifier(folder) for folder in adapters):
            given = given.over({"data.task": "classify"})
    plan = given.plan()
    config = benchmark.config(plan.evaluate, benchmarks)
    if no_cache and not config:
        refuse("is for benchmarks: name some with --benchmarks", ["no-cache"])
    quiet_libraries()
    from gaintune.evaluate.benchmarks import benchmark_adapters, load_suite
    from gaintune.storage import cache_dir

    compare, draw = _measurement(plan, evaluation)
    options: dict[str, Any] = {"allow_other_base": allow_other_base, "progress": progress_on(err)}
    suite = load_suite(config) if config else None  # everything is read before the long part begins
    figures = compare(plan, adapters, **options) if "data.domains" in given.options or not config else []
    report = None
    if config:
        cache = None if no_cache else cache_dir() / "benchmarks"
        report = benchmark_adapters(plan.model, adapters, config, cache=cache, suite=suite, **options)
    if as_json:
        values = [figure.to_dict() for figure in figures]
        typer.echo(json.dumps({"domains": values, "benchmarks": report.to_dict()} if report else values, indent=1))
        return
    for drawn in [*(draw(figures) if figures else []), *(benchmark_tables(report) if report else [])]:
        out.print(drawn, highlight=False, soft_wrap=isinstance(drawn, str))


def _on_model(given: Given, model: str | None) -> Given:
    """Read the command's argument: a plan by its ending, else a base in place of the plan's."""
    if model is None:
        if given.file is None:
            raise ConfigError("what is to be measured? Name a model, such as demo, or give a plan with --plan")
        return given
    if Path(model).suffix in {".yaml", ".yml"}:
        return given.on_file(Path(model))
    return given.over({"model.name": model})


def _check_together(given: Given, evaluation: EvaluationSettings, benchmarks: str | None) -> None:
    """Refuse options that have no effect beside others."""
    domain, task, choices = "data.domains" in given.options, "data.task" in given.options, evaluation.choices
    if evaluation.masked and (choices or task):
        raise ConfigError("--masked measures text on its own: leave --choices and --task out")
    if choices and (domain or task):
        raise ConfigError("--choices asks questions on its own: leave --domain and --task out")
    if benchmarks and (evaluation.masked or choices):
        raise ConfigError("--benchmarks goes with --domain alone: leave --masked and --choices out")
    of_texts = [key.rpartition(".")[2] for key in given.options if key.startswith("data.") and key != "data.domains"]
    if choices:
        refuse("is for domains, and --choices asks questions on its own: leave it out", of_texts)
    if benchmarks and not domain:
        refuse("is for domains: name some with --domain", of_texts)


def _measurement(plan: Plan, evaluation: EvaluationSettings) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what measures, and what draws its figures."""
    from gaintune import evaluate as library

    if evaluation.masked:
        return library.compare_masked, partial(_figures_table, of="domain", columns=MASKED)
    if evaluation.choices:
        compare = partial(library.compare_choices, sets=_sets(evaluation.choices))
        return compare, partial(_figures_table, of="questions", columns=CHOICES)
    if plan.classifies:
        return library.compare_classifiers, _classifier_tables
    return library.compare_adapters, partial(_figures_table, of="domain", columns=PERPLEXITY)


def _sets(choices: Sequence[str]) -> dict[str, Path]:
    sets: dict[str, Path] = {}
    for text in choices:
        domain = as_domain(text)
        if domain["name"] in sets or not all(domain.values()):
            raise ConfigError(f"--choices {text}: write NAME=FILE, every name once, such as medqa=questions.jsonl")
        sets[domain["name"]] = Path(domain["source"]).expanduser()
    return sets


def _share(value: Interval) -> str:
    return percent(value, ".1f", factor=100.0)


def _points(value: Interval | None) -> str:
    return percent(value, unit="", factor=100.0)


def _change(figure: Any) -> str:
    return percent(None if figure.change is None else Interval(figure.change, figure.low, figure.high))


Columns = tuple[tuple[str, str | Callable[[Any], str]], ...]  # heading, and format or maker of its cells
CHANGE = ("change against the base", _change)
PERPLEXITY: Columns = (("perplexity", "{.perplexity:.2f}"), ("bits per byte", "{.bits_per_byte:.3f}"), CHANGE)
MASKED: Columns = (("masked-LM perplexity", "{.perplexity:.3f}"), ("masked tokens", "{.masked:,}"), CHANGE)
MAJORITY = ("always the most frequent", lambda scores: f"{100 * scores.majority:.1f} %")
CHOICES: Columns = (
    ("rows", "{.rows:,}"),
    ("accuracy", lambda figure: _share(figure.accuracy)),
    ("against the base", lambda figure: _points(figure.change)),
    ("accuracy, per byte", lambda figure: _share(figure.accuracy_per_byte)),
    ("against the base", lambda figure: _points(figure.change_per_byte)),
    MAJORITY,
)
CLASSIFIER: Columns = (
    ("rows", "{.rows:,}"),
    ("accuracy", lambda scores: _share(scores.accuracy)),
    MAJORITY,
    ("Matthews", "{.matthews:.3f}"),
    ("F1", lambda scores: "—" if scores.f1 is None else f"{scores.f1:.3f}"),
    ("mean F1 of the classes", "{.macro_f1:.3f}"),
)
COUNTS: Columns = (("label", "{.label}"), ("rows", "{.rows:,}"), ("predicted", "{.predicted:,}"))
CLASS: Columns = (*COUNTS, ("precision", "{.precision:.3f}"), ("recall", "{.recall:.3f}"), ("F1", "{.f1:.3f}"))


def _heads(columns: Columns) -> list[str]:
    return [head for head, _ in columns]


def _cells(value: Any, columns: Columns) -> list[str]:
    return [cell.format(value) if isinstance(cell, str) else cell(value) for _, cell in columns]


def _figures_table(figures: Sequence[Any], of: str, columns: Columns) -> list[Table]:
    """Draw a row for every model on every domain; `of` is the heading of the domains."""
    rows = [[figure.domain, figure.label, *_cells(figure, columns)] for figure in figures]
    heads = [of, "model", *_heads(columns)]
    return [table("", heads, rows, numeric=range(2, len(heads)))]


def _classifier_tables(figures: Sequence[Any]) -> list[Table]:
    rows = [[f.scores.domain, f.label, *_cells(f.scores, CLASSIFIER), _points(f.change)] for f in figures]
    heads = ["domain", "classifier", *_heads(CLASSIFIER), "against the first"]
    return [table("", heads, rows, numeric=range(2, 9)), *(_classes(f.scores, f.label) for f in figures)]


def _classes(scores: Scores, title: str) -> Table:
    """Draw every class of one classifier on one domain."""
    rows = [_cells(row, CLASS) for row in scores.classes]
    return table(f"{scores.domain}: {title}", _heads(CLASS), rows, numeric=range(1, 6))


def print_classifier(result: ClassifierResult) -> None:
    """Print the scores of a classifier that `gaintune adapt` trained, and what the training took."""
    cells = _cells(result.scores, CLASSIFIER)
    out.print(table(result.scores.domain, _heads(CLASSIFIER), [cells], numeric=range(6)))
    out.print(_classes(result.scores, "every label"))
    say(
        f"{result.trainable_parameters:,} parameters trained, the new head's among them, on {result.tokens:,} tokens "
        f"in {plural(result.steps, 'step')}, {result.tokens_per_second:,.0f} tokens/s\nadapter {result.adapter}"
    )


def benchmark_tables(report: BenchmarkReport) -> Iterator[Table | str]:
    """Draw the scores of the benchmarks, and yield a line about the rows of each."""
    rows = []
    about = {}
    names = _short(list(report.adapted))
    for score in (score for name in report.asked for score in report.base if score.task == name):
        compared = [one for one in report.comparisons if (one.task, one.metric) == (score.task, score.metric)]
        share = all(one.unit == "points" for one in compared) if compared else score.is_share
        rows.append([score.task, score.metric, BASE, _value(score, share), "—"])
        rows += [["", "", names[one.label], _value(one.adapted, share), _difference(one)] for one in compared]
        facts = score.facts
        origin = f"{score.rows:,} {facts.split} rows of {facts.source}"
        about[score.task] = "; ".join([f"{score.task}: {origin}", f"{facts.fewshot} worked examples", *facts.notes])
    heads = ["benchmark", "metric", "model", "score ± standard error", "against the base"]
    yield table("", heads, rows, numeric=(3, 4))
    yield from about.values()


def _short(labels: Sequence[str]) -> dict[str, str]:
    """Shorten paths by the folders that all begin and end with, a single one to its last part; never to `base`."""
    parts = [list(Path(label).parts) for label in labels]
    for end in (0, -1):
        while len(parts) > 1 and all(len(path) > 1 and path[end] == parts[0][end] for path in parts):
            for path in parts:
                path.pop(end)
    names = ["/".join(path if len(parts) > 1 else path[-1:]) for path in parts]
    return dict(zip(labels, labels if BASE in names else names, strict=True))


def _value(score: BenchmarkScore, share: bool) -> str:
    factor, unit = (100.0, " %") if share else (1.0, "")
    error = "" if score.stderr is None else f" ± {factor * score.stderr:.2f}"
    return f"{factor * score.value:.2f}{error}{unit}"


def _difference(comparison: BenchmarkComparison) -> str:
    difference = comparison.difference
    if difference is None:
        return "—"
    if comparison.unit == "%":
        return percent(difference)
    text = percent(difference, "+.2f", unit="")
    return f"{text} points" if comparison.unit == "points" else text
