"""The command that measures a model and adapters on it, and what commands print of a classifier."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.table import Table

from gaintune.cli import benchmarks as benchmark_tables
from gaintune.cli.benchmarks import BenchmarkSettings
from gaintune.cli.console import err, out, percent, progress_on, quiet_libraries, table
from gaintune.cli.options import Given, command, refuse
from gaintune.config import Plan, as_domain
from gaintune.errors import ConfigError
from gaintune.progress import plural

if TYPE_CHECKING:
    from gaintune.evaluate import Scores
    from gaintune.results import Interval
    from gaintune.workflows import ClassifierResult

commands = typer.Typer()


class Figure(Protocol):
    """One row of a comparison."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        ...


@command(
    commands,
    "evaluate",
    group="Evaluation",
    takes=("model", "data", "evaluate", "classify"),
    without=("model.name", "data.watched", "data.train_tokens"),
    helps={"plan": "Plan whose base, domains and data settings are used."},
    examples="""\
gaintune evaluate demo --adapter adapters/notes --domain notes.jsonl
gaintune evaluate --plan plan.yaml --adapter adapters/notes --json
gaintune evaluate roberta-base --adapter adapters/mrpc --masked --domain law
gaintune evaluate demo --choices medqa=questions.jsonl
gaintune evaluate demo --adapter adapters/notes --benchmarks arc_easy,gsm8k:8""",
)
def evaluate(
    given: Given,
    benchmark: BenchmarkSettings,
    model: Annotated[
        str | None, typer.Argument(help="Hub id, local folder, .gguf file, 'demo', or a YAML plan.")
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="Adapter to measure against the base; repeatable.", rich_help_panel="Model"),
    ] = None,
    allow_other_base: Annotated[
        bool,
        typer.Option(
            "--allow-other-base", help="Load adapters that were trained on another base.", rich_help_panel="Model"
        ),
    ] = False,
    masked: Annotated[
        bool,
        typer.Option(
            "--masked",
            help="Masked-LM perplexity of an encoder with its original head, on text.",
            rich_help_panel="Evaluation",
        ),
    ] = False,
    choices: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|NAME=FILE",
            help="Questions with choices: accuracy by the likelihood of each choice; repeatable.",
            rich_help_panel="Evaluation",
        ),
    ] = None,
    benchmarks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="lm-eval's benchmarks: arc_easy,piqa, or gsm8k:8 for eight worked examples.",
            rich_help_panel="Benchmark",
        ),
    ] = None,
    no_cache: Annotated[
        bool,
        typer.Option("--no-cache", help="Measure benchmarks anew, and keep no scores.", rich_help_panel="Benchmark"),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of a table.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Measure a model, and adapters on it, with paired intervals.

    Perplexity and bits per byte of text and instructions; of classifiers the accuracy on labelled rows. With
    --benchmarks lm-eval's scores, and of domains only those that are named with --domain.
    """
    given = _on_model(given, model)
    adapters = adapter or []
    _check_together(given, benchmarks, masked, choices or [])
    known = given.file or masked or choices or "data.task" in given.options or benchmarks
    if not known and adapters and _all_classifiers(adapters):
        given = given.over({"data.task": "classify"})
    plan = given.plan()
    asked = benchmark.config(plan.evaluate, benchmarks)
    if no_cache and not asked:
        refuse("is for benchmarks: name some with --benchmarks", ["no-cache"])
    quiet_libraries()
    compare, draw = _measurement(plan, masked, choices or [])
    options: dict[str, Any] = {"allow_other_base": allow_other_base, "progress": progress_on(err)}
    suite = benchmark_tables.suite_of(asked) if asked else None  # all that is to be read is read before the long part
    figures = compare(plan, adapters, **options) if "data.domains" in given.options or not asked else []
    report = None
    if asked and suite:
        report = benchmark_tables.measure(plan, adapters, asked, suite, keep=not no_cache, **options)
    if as_json:
        values = [figure.to_dict() for figure in figures]
        typer.echo(json.dumps({"domains": values, "benchmarks": report.to_dict()} if report else values, indent=1))
        return
    for drawn in [*(draw(figures) if figures else []), *(benchmark_tables.tables(report) if report else [])]:
        out.print(drawn, highlight=False, soft_wrap=isinstance(drawn, str))


def _on_model(given: Given, model: str | None) -> Given:
    """Read the command's argument: a plan by its ending, else a base in place of the plan's."""
    if model is None:
        if given.file is None:
            raise ConfigError("what is to be measured? Name a model, such as demo, or give a plan with --plan")
        return given
    if Path(model).suffix not in {".yaml", ".yml"}:
        return given.over({"model.name": model})
    return given.on_file(Path(model))


def _check_together(given: Given, benchmarks: str | None, masked: bool, choices: Sequence[str]) -> None:
    """Refuse options that have no effect beside others."""
    domain, task = "data.domains" in given.options, "data.task" in given.options
    if masked and (choices or task):
        raise ConfigError("--masked measures text on its own: leave --choices and --task out")
    if choices and (domain or task):
        raise ConfigError("--choices asks questions on its own: leave --domain and --task out")
    if benchmarks and (masked or choices):
        raise ConfigError("--benchmarks goes with --domain alone: leave --masked and --choices out")
    of_texts = [key.rpartition(".")[2] for key in given.options if key.startswith("data.") and key != "data.domains"]
    if choices:
        refuse("is for domains, and --choices asks questions on its own: leave it out", of_texts)
    if benchmarks and not domain:
        refuse("is for domains: name some with --domain", of_texts)


def _all_classifiers(adapters: Sequence[Path]) -> bool:
    from gaintune.evaluate import is_classifier

    return all(is_classifier(adapter) for adapter in adapters)


def _measurement(plan: Plan, masked: bool, choices: Sequence[str]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What measures, and what draws its figures."""
    if masked:
        from gaintune.evaluate import compare_masked

        return compare_masked, partial(_figures_table, of="domain", columns=MASKED)
    if choices:
        from gaintune.evaluate import compare_choices

        return partial(compare_choices, sets=_sets(choices)), partial(_figures_table, of="questions", columns=CHOICES)
    if plan.classifies:
        from gaintune.evaluate import compare_classifiers

        return compare_classifiers, _classifier_tables
    from gaintune.evaluate import compare_adapters

    return compare_adapters, partial(_figures_table, of="domain", columns=PERPLEXITY)


def _sets(choices: Sequence[str]) -> dict[str, Path]:
    sets: dict[str, Path] = {}
    for each in choices:
        domain = as_domain(each)
        if domain["name"] in sets or not all(domain.values()):
            raise ConfigError(f"--choices {each}: write NAME=FILE, every name once, such as medqa=questions.jsonl")
        sets[domain["name"]] = Path(domain["source"]).expanduser()
    return sets


def _change(figure: Any) -> str:
    return percent(figure.change, figure.low, figure.high)


Columns = tuple[tuple[str, Callable[[Any], str]], ...]
PERPLEXITY: Columns = (
    ("perplexity", lambda each: f"{each.perplexity:.2f}"),
    ("bits per byte", lambda each: f"{each.bits_per_byte:.3f}"),
    ("change against the base", _change),
)
MASKED: Columns = (
    ("masked-LM perplexity", lambda each: f"{each.perplexity:.3f}"),
    ("masked tokens", lambda each: f"{each.masked:,}"),
    ("change against the base", _change),
)
CHOICES: Columns = (
    ("rows", lambda each: f"{each.rows:,}"),
    ("accuracy", lambda each: share(each.accuracy)),
    ("against the base", lambda each: points(each.change)),
    ("accuracy, per byte", lambda each: share(each.accuracy_per_byte)),
    ("against the base", lambda each: points(each.change_per_byte)),
    ("always the most frequent", lambda each: f"{100 * each.majority:.1f} %"),
)


def _figures_table(figures: Sequence[Any], of: str, columns: Columns) -> list[Table]:
    """A row for every model on every domain; `of` is what a domain is called."""
    rows = [[each.domain, each.label, *(cell(each) for _, cell in columns)] for each in figures]
    heads = [of, "model", *(head for head, _ in columns)]
    return [table("", heads, rows, numeric=range(2, len(heads)))]


def _classifier_tables(figures: Sequence[Any]) -> list[Table]:
    rows = [[each.scores.domain, each.label, *overall(each.scores), points(each.change)] for each in figures]
    heads = ["domain", "classifier", *OVERALL, "against the first"]
    return [table("", heads, rows, numeric=range(2, 9)), *(classes(each.scores, each.label) for each in figures)]


OVERALL = ("rows", "accuracy", "always the most frequent", "Matthews", "F1", "mean F1 of the classes")


def overall(scores: Scores) -> list[str]:
    """The cells under `OVERALL`."""
    f1 = "—" if scores.f1 is None else f"{scores.f1:.3f}"
    majority = f"{100 * scores.majority:.1f} %"
    return [
        f"{scores.rows:,}",
        share(scores.accuracy),
        majority,
        f"{scores.matthews:.3f}",
        f1,
        f"{scores.macro_f1:.3f}",
    ]


def classes(scores: Scores, title: str) -> Table:
    """Every class of one classifier on one domain."""
    rows = [
        [
            each.label,
            f"{each.rows:,}",
            f"{each.predicted:,}",
            f"{each.precision:.3f}",
            f"{each.recall:.3f}",
            f"{each.f1:.3f}",
        ]
        for each in scores.classes
    ]
    heads = ["label", "rows", "predicted", "precision", "recall", "F1"]
    return table(f"{scores.domain}: {title}", heads, rows, numeric=range(1, 6))


def share(value: Interval) -> str:
    """A share in % with its interval."""
    interval = "" if value.low is None or value.high is None else f" [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    return f"{100 * value.value:.1f} %{interval}"


def points(value: Interval | None) -> str:
    """A difference of two shares in points of % with its interval; a dash for none."""
    if value is None:
        return "—"
    interval = "" if value.low is None or value.high is None else f" [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"
    return f"{100 * value.value:+.1f}{interval}"


def print_classifier(result: ClassifierResult) -> None:
    """What `gaintune adapt` says of a classifier."""
    out.print(table(result.scores.domain, OVERALL, [overall(result.scores)], numeric=range(6)))
    out.print(classes(result.scores, "every label"))
    out.print(
        f"{result.trainable_parameters:,} parameters trained, the new head's among them, on {result.tokens:,} tokens "
        f"in {plural(result.steps, 'step')}, {result.tokens_per_second:,.0f} tokens/s\nadapter {result.adapter}",
        highlight=False,
        soft_wrap=True,
    )
