"""Formats of numbers, names of the figures, and sentences that claim no more than the intervals allow."""

from __future__ import annotations

from gaintune.progress import plural
from gaintune.results import Comparison, Interval, Matrix, MethodMatrix

NONE = "—"
MINUS = "−"

# figure of a summary -> heading, and what it is
FIGURES: dict[str, tuple[str, str]] = {
    "in_domain": ("In-domain", "mean of the diagonal: each domain right after training on it, against the base"),
    "backward_transfer": (
        "Earlier domains, against the base",
        "backward transfer: mean over all domains but the last, after the last stage, against the base",
    ),
    "backward_transfer_since_learnt": (
        "Earlier domains, since trained",
        "backward transfer: the same domains after the last stage, each against right after training on it; "
        "above zero is what was forgotten again",
    ),
    "below_diagonal": (
        "Below the diagonal",
        "mean of all cells below the diagonal: earlier domains after every stage, not only the last",
    ),
    "forward_interference": (
        "Not yet trained",
        "forward interference: mean of all cells above the diagonal, domains before their own stage, against the base",
    ),
}


def number(value: float) -> str:
    """Write a perplexity or a count of bits with three to four digits that mean something."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def signed(value: float, unit: str = "") -> str:
    """Write a change with its sign, one decimal below 100; a value that rounds to zero has no sign."""
    text = f"{value:+,.1f}" if abs(value) < 99.95 else f"{value:+,.0f}" if abs(value) < 1e6 else f"{value:+.0e}"
    text = text.lstrip("+-") if float(text.replace(",", "")) == 0 else text
    return text.replace("-", MINUS) + (f" {unit}" if unit else "")


def bracket(figure: Interval) -> str:
    """Write the interval alone: [low, high]."""
    if figure.low is None or figure.high is None:
        return "[no interval]"
    return f"[{signed(figure.low)}, {signed(figure.high)}]"


def with_interval(figure: Interval | None, unit: str = "") -> str:
    """Write a value and its interval, or a dash where there is no such figure."""
    return NONE if figure is None else f"{signed(figure.value, unit)} {bracket(figure)}"


def listed(names: list[str]) -> str:
    """Join names: 'a', 'a and b', 'a, b and c'."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "nothing"


def _against_base(figure: Interval, several: bool) -> str:
    """Return the predicate of a sentence about one or several domains."""
    has, does = ("have", "do") if several else ("has", "does")
    if figure.low is None:
        return f"{has} a perplexity {with_interval(figure, '%')} against the untouched base"
    if figure.sign == 0:
        return f"{does} not measurably differ from the untouched base ({with_interval(figure, '%')})"
    size, way = signed(abs(figure.value), "%").lstrip("+"), "lower" if figure.sign < 0 else "higher"
    return f"{has} {size} {way} perplexity than the untouched base {bracket(figure)}"


def verdict(method: MethodMatrix) -> str:
    """Say what one method kept, in a sentence or two."""
    summary, stages = method.summary, len(method.per_stage)
    if summary.in_domain is None:
        return "No stage is finished yet."
    if summary.backward_transfer is None:
        return f"After one stage, {method.per_stage[0].domain} {_against_base(summary.in_domain, False)}."
    earlier = "the earlier domain" if stages == 2 else f"the {stages - 1} earlier domains"
    text = f"After {stages} stages, {earlier} {_against_base(summary.backward_transfer, stages > 2)}."
    if since := summary.backward_transfer_since_learnt:
        moves = {-1: "it fell further", 1: "it rose again", 0: "it did not measurably change"}
        text += f" Since each was trained, {moves[since.sign]}: {with_interval(since, '%')}."
    return text


def compare(comparison: Comparison, partial: bool = False) -> str:
    """Say how two methods differ on earlier domains, or else in-domain; a winner only if zero is outside."""
    first, other = comparison.against, comparison.label
    kept, own = comparison.summary.backward_transfer, comparison.summary.in_domain
    figure, verb, where = (kept, "kept more of", "earlier domains") if kept else (own, "learned more", "in-domain")
    if figure is None:
        return f"{other} and {first} share no finished stage."
    points = f"{other} minus {first}: {with_interval(figure, 'points')}"
    if figure.sign == 0:
        on = "on earlier domains" if kept else "in-domain"
        text = f"No winner between {first} and {other} {on}: their paired difference may be zero ({points})."
    else:
        winner, loser = (other, first) if figure.sign < 0 else (first, other)
        text = f"{winner} {verb} {where} than {loser} ({points})."
    if partial:
        text = f"So far, after {plural(comparison.stages, 'stage')}: {text}"
    if kept and own:
        level = with_interval(own, "points")
        if own.sign == 0:
            text += f" In-domain they do not measurably differ ({level})."
        else:
            more = other if own.sign < 0 else first
            text += f" They did not learn equally much: in-domain {more} is ahead ({level}), so read both together."
    return text


def title(matrix: Matrix) -> str:
    """Return the heading of the page."""
    labels = listed([method.label for method in matrix.methods])
    count = len(matrix.planned) or len(matrix.domains)
    return f"What {labels} kept over {plural(count, 'domain')}" if count > 1 else f"What {labels} learned and kept"


def cautions(matrix: Matrix) -> list[str]:
    """Say what this run cannot tell; some sentences only where they apply."""
    percent = f"{100 * matrix.settings.confidence:g} %"
    notes = [
        "A change of perplexity is not a change of accuracy. It says how well the next token of such text is "
        "predicted; whether answers became better or worse takes benchmarks.",
        f"The intervals ({percent}, paired bootstrap over validation blocks, {matrix.settings.bootstrap_samples:,} "
        "resamples, widened for few blocks) cover the choice of validation text only. They do not cover the seed of "
        "training, the order of domains or the learning rate: repeat the run with others before you generalize.",
        "Budgets of a few thousand tokens a domain show the direction of an effect, not its size after long training.",
        "Methods are compared at the learning rates of the plan. A method at a rate that does not suit it looks worse "
        "than it is.",
    ]
    fewest = min((figures.blocks for method in matrix.methods for figures in method.base.values()), default=0)
    if 0 < fewest < 10:
        notes.append(
            f"A domain has only {plural(fewest, 'validation block')}: its interval is wide because of that. "
            "Raise data.validation_tokens."
        )
    if len(matrix.comparisons) > 1:
        notes.append(
            f"{len(matrix.comparisons)} methods are compared with {matrix.comparisons[0].against}; the intervals are "
            "not corrected for looking several times."
        )
    if matrix.partial:
        notes.append("The run is not finished: figures cover the finished stages, and will change.")
    return notes
