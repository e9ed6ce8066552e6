"""Energy outside the pretrained column space, and intruder dimensions, as tables and a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gaintune.analysis.base import Headline, Result, Subject
from gaintune.analysis.drawing import drawn, ruled
from gaintune.analysis.subspace.survey import AdapterSubspace, ModuleSubspace, SubspaceSurvey, share_of
from gaintune.report import MUTED, NONE, look, markdown_table
from gaintune.results import Interval, exact

NO_OUTSIDE = "no outside"
COLUMNS = ("outputs", "inputs", "rank", "has_outside", "outside", "has_outside_rows", "outside_rows", "leading_rank")
LOWEST = 1e-36  # where a share of exactly 0 is drawn: below anything that rounding leaves
Pick = Callable[[ModuleSubspace], float | None]


def module_table(survey: SubspaceSurvey) -> pd.DataFrame:
    """One row for each adapter and module; shares of the update's energy, empty where the update is zero."""
    rows = []
    for adapter in survey.adapters:
        for module in adapter.modules:
            figures = module.figures
            rows.append(
                {
                    "adapter": adapter.label,
                    "layer": module.position.layer,
                    "projection": module.position.projection,
                    **{name: getattr(figures, name) for name in COLUMNS},
                    "outside_leading": figures.outside_leading,
                    "relative_update": (figures.update_energy / figures.weight_energy) ** 0.5,
                    "intruders": figures.intruders,
                    "looked_at": len(figures.similarities),
                    "smallest_similarity": min(figures.similarities),
                    "module": module.position.name,
                }
            )
    return pd.DataFrame(rows)


def summary_rows(survey: SubspaceSurvey) -> list[list[str]]:
    """A row of text for each adapter and projection, and for all projections of an adapter."""
    rows = []
    for adapter in survey.adapters:
        projections = dict.fromkeys(each.position.projection for each in adapter.modules)
        for projection in (*projections, "all"):
            chosen = [each for each in adapter.modules if projection in ("all", each.position.projection)]
            if projection == "all" and len(projections) == 1:
                continue
            part = replace(adapter, modules=tuple(chosen))
            rows.append(
                [
                    adapter.label,
                    projection,
                    _shapes(chosen),
                    _share(part.outside) if part.with_outside else NO_OUTSIDE,
                    _share(part.outside_leading),
                    f"{part.relative_update:.2e}",
                    f"{part.intruders()} of {part.looked_at}",
                ]
            )
    return rows


def heads(survey: SubspaceSurvey) -> list[str]:
    """What heads the columns of `summary_rows`."""
    leading = f"outside the leading {100 * survey.options.leading:g} %"
    return ["adapter", "projection", "rank of outputs", "outside column space", leading, "|dW| / |W|", "intruders"]


def _shapes(modules: Sequence[ModuleSubspace]) -> str:
    """Ranks and outputs of modules, such as `576 of 576`."""
    pairs = sorted({(each.figures.rank, each.figures.outputs) for each in modules})
    shown = [f"{rank} of {outputs}" for rank, outputs in pairs]
    return ", ".join(shown) if len(shown) <= 2 else f"{shown[0]} to {shown[-1]}"


def _share(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{100 * value:.1f} %" if value >= 5e-4 else f"{100 * value:.1e} %"


def remarks(survey: SubspaceSurvey) -> list[str]:
    """What has to be said beside the numbers, a sentence each."""
    told = []
    modules = [each for adapter in survey.adapters for each in adapter.modules]
    without = [each for each in modules if not each.figures.has_outside]
    if without:
        which = "Every weight" if len(without) == len(modules) else f"{len(without)} of {len(modules)} weights"
        told.append(
            f"{which} compared: the pretrained rank is the number of outputs, so the column space is the whole output, "
            "no update of any method can leave it, and proposition 1 of the GAIN paper excludes nothing there."
        )
    scaled = [adapter.label for adapter in survey.adapters if adapter.scales_inputs]
    if scaled:
        told.append(
            f"{', '.join(scaled)}: the update is W diag(v), so that its share outside the column space is zero by "
            "construction; what is shown was measured all the same, and holds what W itself has along directions that "
            "its rank counts as zero."
        )
    gated = {adapter.label: adapter.gate for adapter in survey.adapters if adapter.gate is not None}
    for label, gate in gated.items():
        told.append(
            f"{label}: every gate held at {gate:g}, so the weight is W + {gate:g} alpha / r BA. The shares do not "
            "depend on that value, the intruders do; the real gates differ from token to token."
        )
    figures = modules[0].figures
    setting = survey.options.tolerance
    rule = "max(out, in) times fp32's epsilon" if setting is None else "as given"
    told.append(
        f"Ranks count singular values above {figures.tolerance:.1e} of the largest ({rule}"
        f"{', of ' + modules[0].position.name if setting is None else ''}). Intruders: of the {survey.options.top} "
        "leading left singular vectors of each adapted weight, those whose largest |cosine| to any pretrained left "
        f"singular vector is below {survey.options.epsilon:g}."
    )
    return told


def markdown(survey: SubspaceSurvey) -> str:
    """The summary as Markdown, with the remarks."""
    names = [head[:1].upper() + head[1:] for head in heads(survey)]
    rows = summary_rows(survey)
    frame = pd.DataFrame([row[1:] for row in rows], index=[row[0] for row in rows], columns=names[1:], dtype=object)
    return markdown_table(frame, names[0]) + "\n" + "\n".join(f"- {remark}" for remark in remarks(survey)) + "\n"


def record_values(survey: SubspaceSurvey) -> dict[str, Any]:
    """Everything as plain values for JSON; similarities of all vectors looked at, so that any epsilon can be tried."""
    return {
        "settings": survey.options.counted(),
        "remarks": remarks(survey),
        "adapters": [
            {
                "label": adapter.label,
                "zero_outside_by_construction": adapter.scales_inputs,
                "gate": adapter.gate,
                "outside": adapter.outside,
                "modules_with_outside": adapter.with_outside,
                "outside_leading": adapter.outside_leading,
                "relative_update": adapter.relative_update,
                "intruders": adapter.intruders(),
                "looked_at": adapter.looked_at,
                "modules": [{**asdict(each.position), **asdict(each.figures)} for each in adapter.modules],
            }
            for adapter in survey.adapters
        ],
    }


def _by_layer(adapter: AdapterSubspace, pick: Pick) -> tuple[list[int], list[float]]:
    """Shares of each transformer layer, its modules put together by the energy of their updates; NaN for no share."""
    numbers = sorted({each.position.layer for each in adapter.modules if each.position.layer is not None})
    shares = []
    for number in numbers:
        parts = [(each.figures, pick(each)) for each in adapter.modules if each.position.layer == number]
        share = share_of(parts)
        shares.append(math.nan if share is None else max(share, LOWEST))
    return numbers, shares


def _shares_panel(axes: Axes, survey: SubspaceSurvey, title: str, pick: Pick, *, logarithmic: bool) -> None:
    drawn = False
    for index, adapter in enumerate(survey.adapters):
        layers, shares = _by_layer(adapter, pick)
        style = look(index)
        line = {"color": style.colour, "linestyle": style.dashes, "marker": style.marker, "markersize": 3.5}
        if not all(map(math.isnan, shares)):
            axes.plot(layers, shares if logarithmic else [100 * share for share in shares], linewidth=1.4, **line)
            drawn = True
    axes.set_title(title, loc="left")
    axes.set_xlabel("transformer layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if not drawn:
        text = "no weight compared has an outside:\nits column space is the whole output"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)
        axes.set_xticks([])
        axes.set_yticks([])
    elif logarithmic:
        axes.set_yscale("log")
        low, _ = axes.get_ylim()
        axes.set_ylim(min(low, 1e-4), 2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    else:
        axes.set_ylim(0, 102)


def _intruder_panel(axes: Axes, survey: SubspaceSurvey) -> None:
    """Intruders at every similarity below which a vector may be called one."""
    thresholds = np.linspace(0, 1, 101)
    for index, adapter in enumerate(survey.adapters):
        style = look(index)
        shares = [100 * adapter.intruders(float(each)) / adapter.looked_at for each in thresholds]
        axes.plot(thresholds, shares, color=style.colour, linestyle=style.dashes, linewidth=1.5)
    axes.axvline(survey.options.epsilon, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.set(xlabel="similarity below which a vector is an intruder", xlim=(0, 1), ylim=(0, 102))
    axes.set_title(f"Intruders, % of the leading {survey.options.top} vectors", loc="left")


@drawn
def figure(survey: SubspaceSurvey) -> Figure:
    """Shares outside the column space and the leading directions by layer, and intruders by threshold."""
    sheet = Figure(figsize=(11.4, 3.5), layout="constrained")
    first, second, third = sheet.subplots(1, 3)
    leading = f"{100 * survey.options.leading:g} %"
    _shares_panel(
        first, survey, "Update outside the column space, share",
        lambda each: each.figures.outside if each.figures.has_outside else None, logarithmic=True,
    )  # fmt: skip
    _shares_panel(
        second, survey, f"… outside the directions of {leading} of W, %",
        lambda each: each.figures.outside_leading, logarithmic=False,
    )  # fmt: skip
    _intruder_panel(third, survey)
    for axes in (first, second, third):
        ruled(axes, which="both")
    handles = []
    for index, adapter in enumerate(survey.adapters):
        style = look(index)
        line = {"color": style.colour, "linestyle": style.dashes, "marker": style.marker, "markersize": 4}
        handles.append(third.plot([], [], label=adapter.label, linewidth=1.5, **line)[0])
    columns = min(4, len(handles))
    sheet.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, handlelength=3)
    return sheet


def result(survey: SubspaceSurvey, subject: Subject, *_: Any) -> Result:
    """Put the survey together.

    Numbers, counted and not sampled: `LABEL.outside` and `LABEL.outside_leading`, shares of the update's energy in %;
    `LABEL.intruders`.
    """
    numbers: dict[str, Interval] = {}
    without: dict[str, str] = {}
    for label, one in zip(subject.names or [each.label for each in survey.adapters], survey.adapters, strict=True):
        numbers[f"{label}.intruders"] = exact(one.intruders())
        for name, share in (("outside", one.outside), ("outside_leading", one.outside_leading)):
            if share is None:
                without[f"{label}.{name}"] = "no adapted weight has such directions"
            else:
                numbers[f"{label}.{name}"] = exact(100 * share)
    said, rows = remarks(survey), summary_rows(survey)
    return Result(
        headline=Headline(heads(survey), rows, numeric=2),
        remarks=said,
        tables={"subspace": module_table(survey)},
        markdown=markdown(survey),
        record=record_values(survey),
        provenance=survey.provenance.to_dict(),
        figures={"subspace": figure(survey)},
        numbers=numbers,
        without=without,
        shown={"Updates": pd.DataFrame(rows, columns=heads(survey)).set_index("adapter")},
        notes=said,
    )
