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

from gaintune.analysis.base import Headline, Result, Subject, numbers_of
from gaintune.analysis.drawing import drawn, line, text_table
from gaintune.analysis.subspace.survey import (
    AdapterSubspace,
    ModuleSubspace,
    SubspaceFigures,
    SubspaceSurvey,
    share_of,
)
from gaintune.report import MUTED, NONE, ruled
from gaintune.results import Interval, exact

COLUMNS = (
    "outputs", "inputs", "rank", "has_outside", "outside", "has_outside_rows", "outside_rows", "leading_rank",
    "outside_leading",
)  # fmt: skip
LOWEST = 1e-36  # where a share of exactly 0 is drawn: below anything that rounding leaves
Pick = Callable[[ModuleSubspace], float | None]


def module_table(survey: SubspaceSurvey) -> pd.DataFrame:
    """Return a row for each adapter and module; shares of the update's energy, empty where the update is zero.

    Updates scaled to one size add columns of their own.
    """
    rows, scaled = [], survey.options.relative_update is not None
    for adapter in survey.adapters:
        for module in adapter.modules:
            at, figures = module.position, module.figures
            relative, vectors = (figures.update_energy / figures.weight_energy) ** 0.5, figures.similarities
            own = [getattr(figures, name) for name in COLUMNS]
            counted = [relative, figures.intruders, len(vectors), min(vectors), at.name]
            at_size = [figures.scaled.intruders, min(figures.scaled.similarities)] if figures.scaled else []
            rows.append([adapter.label, at.layer, at.projection, *own, *counted, *at_size])
    added = ["relative_update", "intruders", "looked_at", "smallest_similarity", "module"]
    added += ["scaled_intruders", "scaled_smallest_similarity"] if scaled else []
    return pd.DataFrame(rows, columns=["adapter", "layer", "projection", *COLUMNS, *added])


def summary_rows(survey: SubspaceSurvey) -> list[list[str]]:
    """Return a row of text for each adapter and projection, and for several projections of an adapter together.

    Where updates were scaled as well, their rows come after those of the same adapter.
    """
    rows = []
    for adapter in survey.adapters:
        projections = list(dict.fromkeys(each.position.projection for each in adapter.modules))
        for whole, suffix in ((adapter, ""), (adapter.scaled, ", scaled")):
            for projection in [*projections, "all"] if len(projections) > 1 else projections:
                if whole is None:
                    continue
                chosen = [each for each in whole.modules if projection in ("all", each.position.projection)]
                part = replace(whole, modules=tuple(chosen))
                shares = [_share(part.outside) if part.with_outside else "no outside", _share(part.outside_leading)]
                update, intruders = f"{part.relative_update:.2e}", f"{part.intruders()} of {part.looked_at}"
                modules = [f"{part.intruder_modules} of {len(chosen)}", f"{part.intruders_per_module:.2f}"]
                name = f"{adapter.label}{suffix}"
                rows.append([name, projection, _shapes(chosen), *shares, update, intruders, *modules])
    return rows


def heads(survey: SubspaceSurvey) -> list[str]:
    """Return the heads of the columns of `summary_rows`."""
    leading = f"outside the leading {100 * survey.options.leading:g} %"
    update = ["|dW| / |W|", "intruders", "modules with intruders", "intruders per module"]
    return ["adapter", "projection", "rank of outputs", "outside column space", leading, *update]


def _shapes(modules: Sequence[ModuleSubspace]) -> str:
    """Write the ranks and outputs of modules, such as `576 of 576`."""
    pairs = sorted({(each.figures.rank, each.figures.outputs) for each in modules})
    shown = [f"{rank} of {outputs}" for rank, outputs in pairs]
    return ", ".join(shown) if len(shown) <= 2 else f"{shown[0]} to {shown[-1]}"


def _share(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{100 * value:.1f} %" if value >= 5e-4 else f"{100 * value:.1e} %"


def remarks(survey: SubspaceSurvey) -> list[str]:
    """Return what has to be said beside the numbers, a sentence each; part of the stored record."""
    sentences = []
    modules = [each for adapter in survey.adapters for each in adapter.modules]
    without = [each for each in modules if not each.figures.has_outside]
    if without:
        which = "Every weight" if len(without) == len(modules) else f"{len(without)} of {len(modules)} weights"
        sentences.append(
            f"{which} compared: the pretrained rank is the number of outputs, so the column space is the whole output, "
            "no update of any method can leave it, and proposition 1 of the GAIN paper excludes nothing there."
        )
    scaled = [adapter.label for adapter in survey.adapters if adapter.scales_inputs]
    if scaled:
        sentences.append(
            f"{', '.join(scaled)}: the update is W diag(v), so that its share outside the column space is zero by "
            "construction; what is shown was measured all the same, and holds what W itself has along directions that "
            "its rank counts as zero."
        )
    for adapter in survey.adapters:
        if (gate := adapter.gate) is not None:
            sentences.append(
                f"{adapter.label}: every gate held at {gate:g}, so the weight is W + {gate:g} alpha / r BA. The shares "
                "do not depend on that value, the intruders do; the real gates differ from token to token."
            )
    options, first = survey.options, modules[0]
    given = options.tolerance is not None
    rule = "as given" if given else f"max(out, in) times fp32's epsilon, of {first.position.name}"
    sentences.append(
        f"Ranks count singular values above {first.figures.tolerance:.1e} of the largest ({rule}). Intruders: of the "
        f"{options.top} leading left singular vectors of each adapted weight, those whose largest |cosine| to any "
        f"pretrained left singular vector is below {options.epsilon:g}."
    )
    if options.relative_update is not None:
        sentences.append(
            f"Scaled: every module's update was set to |dW| / |W| = {options.relative_update:g} before its intruders "
            "were counted. Adapters then differ in the modules they change and in direction, and no longer in size."
        )
    return sentences


def markdown(survey: SubspaceSurvey) -> str:
    """Return the summary as Markdown, with the remarks."""
    said = "\n".join(f"- {remark}" for remark in remarks(survey))
    return f"{text_table(heads(survey), summary_rows(survey))}\n{said}\n"


def record_values(survey: SubspaceSurvey) -> dict[str, Any]:
    """Return everything as plain values for JSON; the similarities of all vectors allow any other epsilon."""

    def plain_figures(figures: SubspaceFigures) -> dict[str, Any]:
        values = asdict(replace(figures, scaled=None))
        del values["scaled"]
        if figures.scaled is not None:
            changed = ("update_energy", "singular_values", "similarities")
            values["scaled"] = {name: getattr(figures.scaled, name) for name in changed}
        return values

    def counts(adapter: AdapterSubspace) -> dict[str, Any]:
        return {
            "outside_leading": adapter.outside_leading,
            "relative_update": adapter.relative_update,
            "intruders": adapter.intruders(),
            "looked_at": adapter.looked_at,
            "intruder_modules": adapter.intruder_modules,
            "intruders_per_module": adapter.intruders_per_module,
        }

    def plain(adapter: AdapterSubspace) -> dict[str, Any]:
        return {
            "label": adapter.label,
            "zero_outside_by_construction": adapter.scales_inputs,
            "gate": adapter.gate,
            "outside": adapter.outside,
            "modules_with_outside": adapter.with_outside,
            **counts(adapter),
            **({"scaled": counts(adapter.scaled)} if adapter.scaled else {}),
            "modules": [{**asdict(each.position), **plain_figures(each.figures)} for each in adapter.modules],
        }

    adapters = [plain(adapter) for adapter in survey.adapters]
    return {"settings": survey.options.counted(), "remarks": remarks(survey), "adapters": adapters}


def _by_layer(adapter: AdapterSubspace, pick: Pick) -> tuple[list[int], list[float]]:
    """Return the layers and the share of each, over its modules by the energy of their updates; NaN for no share."""
    layers = sorted({each.position.layer for each in adapter.modules if each.position.layer is not None})
    shares = []
    for layer in layers:
        share = share_of([(each.figures, pick(each)) for each in adapter.modules if each.position.layer == layer])
        shares.append(math.nan if share is None else max(share, LOWEST))
    return layers, shares


def _shares_panel(axes: Axes, survey: SubspaceSurvey, title: str, pick: Pick, *, logarithmic: bool) -> None:
    drawn = False
    for index, adapter in enumerate(survey.adapters):
        layers, shares = _by_layer(adapter, pick)
        if not all(map(math.isnan, shares)):
            heights = shares if logarithmic else [100 * share for share in shares]
            axes.plot(layers, heights, **line(index, markersize=3.5, linewidth=1.4))
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
    """Draw the share of intruders at every similarity below which a vector may be called an intruder."""
    thresholds = np.linspace(0, 1, 101)
    for index, adapter in enumerate(survey.adapters):
        shares = [100 * adapter.intruders(float(each)) / adapter.looked_at for each in thresholds]
        axes.plot(thresholds, shares, **line(index, marked=False, linewidth=1.5))
    axes.axvline(survey.options.epsilon, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.set(xlabel="similarity below which a vector is an intruder", xlim=(0, 1), ylim=(0, 102))
    axes.set_title(f"Intruders, % of the leading {survey.options.top} vectors", loc="left")


def _outside(module: ModuleSubspace) -> float | None:
    return module.figures.outside if module.figures.has_outside else None


@drawn
def figure(survey: SubspaceSurvey) -> Figure:
    """Draw shares outside the column space and the leading directions by layer, and intruders by threshold."""
    sheet = Figure(figsize=(11.4, 3.5), layout="constrained")
    first, second, third = sheet.subplots(1, 3)
    leading = f"… outside the directions of {100 * survey.options.leading:g} % of W, %"
    _shares_panel(first, survey, "Update outside the column space, share", _outside, logarithmic=True)
    _shares_panel(second, survey, leading, lambda each: each.figures.outside_leading, logarithmic=False)
    _intruder_panel(third, survey)
    for axes in (first, second, third):
        ruled(axes, which="both")
    handles = [
        third.plot([], [], label=adapter.label, **line(index, markersize=4, linewidth=1.5))[0]
        for index, adapter in enumerate(survey.adapters)
    ]
    columns = min(4, len(handles))
    sheet.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, handlelength=3)
    return sheet


def result(survey: SubspaceSurvey, subject: Subject, *_: Any) -> Result:
    """Make the result.

    Numbers, counted and not sampled: `LABEL.intruders`; `LABEL.outside` and `LABEL.outside_leading`, shares of the
    update's energy in %; `LABEL.modules`, their number; `LABEL.intruder_share`, the share of modules with an
    intruder in %; `LABEL.intruders_per_module`. Of updates scaled to one size, if asked, `LABEL.scaled.NAME`.
    """
    figures: dict[str, Interval | None] = {}
    for label, adapter in zip(subject.names or [each.label for each in survey.adapters], survey.adapters, strict=True):
        for prefix, one in ((label, adapter), (f"{label}.scaled", adapter.scaled)):
            if one is not None:
                figures[f"{prefix}.intruders"] = exact(one.intruders())
                for name, share in (("outside", one.outside), ("outside_leading", one.outside_leading)):
                    figures[f"{prefix}.{name}"] = None if share is None else exact(100 * share)
                figures[f"{prefix}.modules"] = exact(len(one.modules))
                figures[f"{prefix}.intruder_share"] = exact(100 * one.intruder_modules / len(one.modules))
                figures[f"{prefix}.intruders_per_module"] = exact(one.intruders_per_module)
    numbers, without = numbers_of(figures, "no adapted weight has such directions")
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
