"""The description of an analysis, its input and output, and the function that writes its files.

To add an analysis: make a folder with `survey.py` (measures and computes) and `report.py` (tables and figures),
describe it in the folder's `__init__.py` as a subclass of `Analysis`, and list it in `catalogue.py`. The command, the
recipe step, the check before a recipe starts and the files are made from that. This module loads fast: it imports no
torch, pandas or matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import ValidationError

from gaintune.config import Plan, Section, explain

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from gaintune.evaluate.benchmarks import BenchmarkConfig
    from gaintune.progress import Progress
    from gaintune.results import Interval

Takes = Literal["nothing", "adapter", "adapters", "snapshots", "runs"]
Texts = Literal["none", "trained", "named"]
Together = Literal["all", "label", "one"]


class Options(Section):
    """Options of an analysis: each field is an option of its command and a setting of its recipe step."""

    @classmethod
    def read(cls, values: Mapping[str, Any], origin: str) -> Self:
        """Read options from plain values; a ConfigError for a wrong key or value begins with `origin`."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise explain(error, origin, cls) from None


@dataclass(frozen=True)
class Subject:
    """Input of an analysis."""

    adapters: Sequence[Path] = ()  # folders of adapters, or run directories where the analysis takes them
    plan: Plan | None = None  # base, texts, and how uncertainty is measured; None if no model is loaded
    names: Sequence[str] = ()  # of the adapters in the result's numbers; those of the tables if empty
    title: str = ""  # name of all adapters together in the titles of a recipe's tables
    folder: Path | None = None  # for the result; a survey may store losses there, so that it can be resumed
    benchmarks: BenchmarkConfig | None = None  # to measure as well
    allow_other_base: bool = False  # take adapters that were trained on another base

    @property
    def base_plan(self) -> Plan:
        """The plan, for an analysis that needs one."""
        assert self.plan is not None, "this analysis measures a model, which the plan names"
        return self.plan


@dataclass(frozen=True)
class Headline:
    """Table for the terminal: text, and changes in % (None for a dash); columns from `numeric` on are numbers."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str | Interval | None]]
    numeric: int
    title: str = ""


@dataclass(frozen=True)
class Result:
    """Output of an analysis."""

    headline: Headline
    tables: Mapping[str, pd.DataFrame]  # to write as CSV, by file name
    markdown: str  # text of the .md file
    record: Mapping[str, Any]  # plain values for the .json file
    figures: Mapping[str, Figure | None]  # by file name; None removes what an earlier call wrote
    provenance: Mapping[str, Any] | None = None  # what the numbers depend on; None where the record has it
    remarks: Sequence[str] = ()  # sentences below the headline
    numbers: Mapping[str, Interval] = field(default_factory=dict)  # for claims of recipes; bare values have no ends
    without: Mapping[str, str] = field(default_factory=dict)  # numbers that are missing, each with the reason
    shown: Mapping[str, pd.DataFrame] = field(default_factory=dict)  # tables of a recipe's page, by title
    notes: Sequence[str] = ()  # sentences of a recipe's page
    survey: Any = None  # measurements, for `Analysis.across`


Numbers = tuple[Mapping[str, "Interval"], Mapping[str, str]]
"""Numbers by name, and the names of those that are missing, each with the reason."""


def numbers_of(figures: Mapping[str, Interval | None], reason: str) -> Numbers:
    """Split figures into numbers and the names of those that are None, which are missing for one reason."""
    found = {name: figure for name, figure in figures.items() if figure is not None}
    return found, {name: reason for name in figures if name not in found}


class Analysis:
    """Description of an analysis; a subclass's docstring names its source, the section, table or figure of a paper.

    A command or a recipe step reads `Options`, makes a `Subject` as the attributes below say, calls `run`, and gives
    the result to `write_result`.
    """

    name: ClassVar[str]  # of the command, the recipe step and the files
    help: ClassVar[str]  # of the command; the first sentence says what the analysis is
    examples: ClassVar[str]  # command lines for the help, one to a line
    takes: ClassVar[Takes] = "adapters"  # "snapshots" are adapters with snapshots, "runs" are runs and adapters
    argument: ClassVar[str] = "Adapter folders on one base."  # help of the command's argument
    texts: ClassVar[Texts] = "none"  # to measure: "trained" are the adapters' own unless others are named
    default_domains: ClassVar[Sequence[str]] = ()  # of a command that measures named texts, where none is named
    watches: ClassVar[bool] = True  # whether it measures watched domains as well
    measures_benchmarks: ClassVar[bool] = False  # whether `Options` has `tasks` and `target`, names of benchmarks
    together: ClassVar[Together] = "all"  # a recipe gives it all labels' last adapters, a label's adapters, or one
    label: ClassVar[str] = ""  # whose adapters a recipe takes unless the step's `label` names another; "" for all
    needs: ClassVar[str] = ""  # ability a method must have in the catalogue, such as `gates`; a recipe checks it first
    one_figure: ClassVar[bool] = True
    Options: ClassVar[type[Options]] = Options

    def run(self, subject: Subject, options: Any, progress: Progress) -> Result:
        """Measure, and make tables, figures and numbers; GaintuneError for a subject or options it cannot take."""
        return self.part("report").result(self.measure(subject, options, progress), subject, options)

    def measure(self, subject: Subject, options: Any, progress: Progress) -> Any:
        """Call `survey_NAME` of the folder's `survey.py`; the default for most analyses."""
        survey = getattr(self.part("survey"), f"survey_{self.name.replace('-', '_')}")
        adapters = subject.adapters[0] if self.takes == "adapter" else subject.adapters
        other = subject.allow_other_base
        return survey(subject.base_plan, adapters, options, allow_other_base=other, progress=progress)

    def part(self, name: str) -> Any:
        """Import a module of the analysis's folder; it is loaded late, as the command's help needs no torch."""
        return import_module(f"{type(self).__module__}.{name}")

    @property
    def loads_model(self) -> bool:
        """Say whether it needs a plan that names a base."""
        return self.takes not in ("nothing", "runs")

    def domains(self, named: Sequence[Any], options: Any) -> Sequence[Any]:
        """Return the domains to measure, given those that the user named."""
        return named

    def recipe_defaults(self, adapters: Sequence[Path]) -> Mapping[str, Any]:
        """Return a recipe's defaults that differ from the command's, given the adapters of a run."""
        return {}

    def across(self, results: Mapping[str, Result]) -> Numbers:
        """Return the numbers of a recipe that compare results of several labels; `results` is by label."""
        return {}, {}


def write_result(name: str, result: Result, folder: Path) -> None:
    """Write NAME.csv and the other tables, NAME.md, NAME.json, and every figure as PNG and SVG into a folder."""
    from gaintune.report import figure_files
    from gaintune.storage import write_bytes, write_json, write_text

    for table, frame in result.tables.items():
        write_text(folder / f"{table}.csv", frame.to_csv(index=False, lineterminator="\n"))
    write_text(folder / f"{name}.md", result.markdown)
    provenance = {} if result.provenance is None else {"provenance": result.provenance}
    write_json(folder / f"{name}.json", {**result.record, **provenance})
    for drawing, figure in result.figures.items():
        if figure is None:
            for kind in ("png", "svg"):
                (folder / f"{drawing}.{kind}").unlink(missing_ok=True)
        else:
            for file, content in figure_files(drawing, figure).items():
                write_bytes(folder / file, content)
