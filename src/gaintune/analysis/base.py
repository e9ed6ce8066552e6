"""What an analysis is and what it gives, and the one place that writes its files.

To add an analysis: make a folder with `survey.py` (what measures) and `report.py` (tables and figures), describe it in
the folder's `__init__.py` as a subclass of `Analysis`, and list it in `catalogue.py`. The command, the recipe step, the
check before a recipe starts and the files are made from that. This module loads fast: no torch, pandas or matplotlib.
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
        """Read options from plain values; ConfigError, which begins with `origin`, for a wrong key or value."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise explain(error, origin, cls) from None


@dataclass(frozen=True)
class Subject:
    """What an analysis is run on.

    Attributes:
        adapters: folders of adapters, or run directories where the analysis takes them.
        plan: base, texts, and how uncertainty is measured; an analysis that loads no model needs none.
        names: what numbers call the adapters, in their order; what tables call them unless given.
        title: what the titles of a recipe's tables call all of them together.
        folder: where the result will be written; a survey may keep losses there, so that a stopped one continues.
        benchmarks: which benchmarks to measure too; None for none.
        allow_other_base: take adapters that were trained on another base.
    """

    adapters: Sequence[Path] = ()
    plan: Plan | None = None
    names: Sequence[str] = ()
    title: str = ""
    folder: Path | None = None
    benchmarks: BenchmarkConfig | None = None
    allow_other_base: bool = False

    @property
    def base_plan(self) -> Plan:
        """The plan, for an analysis that needs one."""
        assert self.plan is not None, "this analysis measures a model, which the plan names"
        return self.plan


@dataclass(frozen=True)
class Headline:
    """The table for the terminal: text, and changes in % (None for a dash); columns from `numeric` on are numbers."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str | Interval | None]]
    numeric: int
    title: str = ""


@dataclass(frozen=True)
class Result:
    """What an analysis found.

    Attributes:
        headline: the table for the terminal.
        remarks: sentences below it.
        tables: by file name: what is written as CSV.
        markdown: the text of the .md file.
        record: plain values for the .json file.
        figures: by file name; None takes away what an earlier call wrote.
        provenance: what the numbers depend on; part of the .json file. None where the record has it.
        numbers: what the claims of recipes may name; an interval without ends is a bare value.
        without: numbers that could not be had, each with the reason.
        shown: by title: tables of a recipe's page.
        notes: sentences of a recipe's page.
        survey: what was measured, for `Analysis.across`.
    """

    headline: Headline
    tables: Mapping[str, pd.DataFrame]
    markdown: str
    record: Mapping[str, Any]
    figures: Mapping[str, Figure | None]
    provenance: Mapping[str, Any] | None = None
    remarks: Sequence[str] = ()
    numbers: Mapping[str, Interval] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)
    shown: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    notes: Sequence[str] = ()
    survey: Any = None


Numbers = tuple[Mapping[str, "Interval"], Mapping[str, str]]
"""Numbers by name, and those that could not be had, each with the reason."""


class Analysis:
    """One analysis; its own docstring names its source, the section, table or figure of a paper.

    A command or a recipe step reads `Options`, puts together a `Subject` as the attributes below say, calls `run`, and
    gives the result to `write_result`.

    Attributes:
        name: of the command, the recipe step and the files.
        help: of the command; the first sentence says what the analysis is.
        examples: command lines for the help, one to a line.
        takes: what it is given: nothing, one adapter, several, adapters with snapshots, or runs beside adapters.
        argument: what the command's help says of that.
        texts: which texts it measures: none, those that the adapters were trained on unless others are named, or those
            that are named (in a recipe by the step itself).
        default_domains: of a command that measures named texts, where none is named.
        watches: whether it measures watched domains beside the others.
        measures_benchmarks: whether `Options` has `tasks` and `target`, names of benchmarks.
        together: in a recipe, whether it is run on what all labels ended with, on each label's adapters, or on one
            adapter at a time.
        label: in a recipe, the label whose adapters are taken unless the step's `label` names another; "" for all.
        needs: the ability that a method must have in the catalogue, such as `gates`; "" for none. A recipe is refused
            before it trains others.
        one_figure: whether it draws one figure and no more.
        Options: its options.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    examples: ClassVar[str]
    takes: ClassVar[Takes] = "adapters"
    argument: ClassVar[str] = "Adapter folders on one base."
    texts: ClassVar[Texts] = "none"
    default_domains: ClassVar[Sequence[str]] = ()
    watches: ClassVar[bool] = True
    measures_benchmarks: ClassVar[bool] = False
    together: ClassVar[Together] = "all"
    label: ClassVar[str] = ""
    needs: ClassVar[str] = ""
    one_figure: ClassVar[bool] = True
    Options: ClassVar[type[Options]] = Options

    def run(self, subject: Subject, options: Any, progress: Progress) -> Result:
        """Measure, and put what was found into tables, figures and numbers.

        Raises:
            GaintuneError: what the subject or the options do not allow.
        """
        return self.part("report").result(self.measure(subject, options, progress), subject, options)

    def measure(self, subject: Subject, options: Any, progress: Progress) -> Any:
        """Call `survey_NAME` of the folder's `survey.py`, as most analyses need it."""
        survey = getattr(self.part("survey"), f"survey_{self.name}")
        return survey(
            subject.base_plan,
            subject.adapters[0] if self.takes == "adapter" else subject.adapters,
            options,
            allow_other_base=subject.allow_other_base,
            progress=progress,
        )

    def part(self, name: str) -> Any:
        """Import a module of the analysis's folder, which loads what the command's help does without."""
        return import_module(f"{type(self).__module__}.{name}")

    @property
    def loads_model(self) -> bool:
        """Whether it needs a plan that names a base."""
        return self.takes not in ("nothing", "runs")

    def domains(self, named: Sequence[Any], options: Any) -> Sequence[Any]:
        """Return the domains to measure, given those that a person named."""
        return named

    def recipe_defaults(self, adapters: Sequence[Path]) -> Mapping[str, Any]:
        """Return options that are others in a recipe than in the command, given the adapters of one run."""
        return {}

    def across(self, results: Mapping[str, Result]) -> Numbers:
        """Return the numbers of a recipe that take the results of several labels, by label."""
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
