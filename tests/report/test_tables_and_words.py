"""Tables hold the numbers of the matrix, and sentences claim what the intervals allow, and no more."""

import re

import pytest

from gaintune.report import palette, tables, words
from gaintune.results import Comparison, Interval, Summary
from support.synthetic_run import forgets, keeps, make_matrix


def test_the_tidy_table_has_one_row_for_each_cell(two_methods):
    frame = tables.tidy(two_methods)
    assert len(frame) == 2 * 3 * 3
    for row in frame.itertuples():
        method = two_methods.methods[["gain-ffn", "lora"].index(row.method)]
        cell = method.stages[row.stage - 1].cells[row.domain]
        assert row.learnt == method.stages[row.stage - 1].domain
        figures = (row.change_percent, row.low_percent, row.high_percent)
        assert figures == pytest.approx((cell.change, cell.low, cell.high))
        assert row.perplexity == pytest.approx(row.base_perplexity * (1 + row.change_percent / 100))
        assert row.bits_per_byte == pytest.approx(cell.bits_per_byte)
    places = ["learning", "later", "later", "earlier", "learning", "later", "earlier", "earlier", "learning"]
    assert list(frame[frame.method == "lora"].place) == places


def test_markdown_holds_summary_differences_matrices_and_base(two_methods):
    text = tables.to_markdown(two_methods)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    widths = {line.count("|") for line in lines if line.startswith(("| gain-ffn |", "| lora |", "| Method"))}
    assert widths == {9} and any(line.startswith("| lora minus gain-ffn | 3 |") for line in lines)
    diagonal = two_methods.methods[1].stages[1].cells["law"].change
    (row,) = [line for line in text[text.index("lora: a row") :].splitlines() if line.startswith("| 2 law |")]
    assert f"**{diagonal:+.1f}**".replace("-", "−") in row
    assert "| medical | 2" in text and "| 3,060 | 12 |" in text and "not finished" not in text


def test_markdown_of_a_partial_run_and_of_names_with_bars():
    text = tables.to_markdown(make_matrix(("a|b", "c"), {"x|y": keeps}, finished={"x|y": 1}))
    assert "| 1 a\\|b |" in text and "| x\\|y |" in text and "not finished" in text


def test_bases_that_differ_are_shown_apart(two_methods):
    assert [labels for labels, _ in tables.base_frames(two_methods)] == [["gain-ffn", "lora"]]
    one, two = make_matrix(("a",), {"x": keeps}), make_matrix(("b", "a"), {"y": keeps})
    both = type(one)(("a", "b"), ("a",), (*one.methods, *two.methods), (), one.settings, False)
    assert [labels for labels, _ in tables.base_frames(both)] == [["x"], ["y"]]


def test_html_escapes_names_and_marks_headings():
    matrix = make_matrix(("<b>", 'x" onload="y'), {"<i>&": keeps})
    for html in (tables.heatmap_html(matrix, matrix.methods[0]), tables.to_html(tables.summary_frame(matrix), "<b>")):
        assert "<b>" not in html and "<i>" not in html and 'onload="' not in html
        assert 'scope="col"' in html and 'scope="row"' in html
    assert "&lt;i&gt;&amp;" in tables.to_html(tables.summary_frame(matrix), "c")


def contrast(ink, paper):
    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_every_shade_can_be_read_on_light_and_dark_pages():
    for sheet in palette.css():
        rules = [line for line in sheet.splitlines() if line.startswith(".shade")]
        assert len(rules) == 2 * palette.BINS + 1
        for rule in rules:
            paper, ink = rule.split("background-color:")[1].rstrip("}").split(";color:")
            assert contrast(ink, paper) >= 4.4, rule


def test_the_color_scale_is_shared_centered_and_robust(two_methods):
    limit = palette.limit_of(two_methods)
    assert limit == 20.0 and palette.bin_of(0.0, limit) == 0 and palette.bin_of(-limit, limit) == -palette.BINS
    assert palette.bin_of(1e6, limit) == palette.BINS
    assert palette.limit_of(make_matrix(("a",), {"x": lambda s, p: 0.1})) == palette.SMALLEST_LIMIT
    assert palette.limit_of(make_matrix(("a",), {"x": lambda s, p: 900.0})) == palette.LARGEST_LIMIT


DOMAINS = ("medical", "law", "code")


@pytest.mark.parametrize(("value", "text"), [
    (-16.44, "−16.4"), (0.04, "0.0"), (-0.04, "0.0"), (3.0, "+3.0"), (1418.2, "+1,418"), (99.96, "+100"),
    (-2e9, "−2e+09"),
])  # fmt: skip
def test_changes_carry_their_sign_and_zero_has_none(value, text):
    assert words.signed(value) == text


def test_intervals_read_as_brackets_and_a_missing_figure_as_a_dash():
    assert words.with_interval(Interval(-16.24, -17.9, -14.58), "%") == "−16.2 % [−17.9, −14.6]"
    assert words.with_interval(Interval(1.0, None, None)) == "+1.0 [no interval]"
    assert words.with_interval(None) == "—"


def test_a_method_that_kept_and_one_that_forgot(two_methods):
    gain, lora = (words.verdict(method) for method in two_methods.methods)
    assert re.match(r"After 3 stages, the 2 earlier domains have 1\d\.\d % lower perplexity", gain)
    rose = words.verdict(make_matrix(DOMAINS, {"bad": lambda s, p: -16 if s == p else 30}).methods[0])
    assert "% higher perplexity than the untouched base" in rose
    assert "it rose again: +5" in rose and lora != gain


def verdict(domains=DOMAINS, method=keeps, **options):
    return words.verdict(make_matrix(domains, {"gain": method}, **options).methods[0])


def test_verdicts_claim_no_more_than_the_intervals_and_the_stages_allow():
    flat, single = verdict(method=lambda s, p: 0.0), verdict(blocks=1)
    assert "do not measurably differ from the untouched base" in flat
    assert "[no interval]" in single and "lower" not in single
    assert verdict(("law",)).startswith("After one stage, law has 1")
    assert "the earlier domain has" in verdict(("a", "b"))
    assert verdict(finished={"gain": 0}) == "No stage is finished yet."


def compared(kept, in_domain):
    return words.compare(Comparison("lora", "gain", 5, Summary(in_domain=in_domain, backward_transfer=kept)))


def test_a_winner_is_called_only_when_the_paired_interval_excludes_zero():
    level = Interval(0.1, -0.3, 0.5)
    kept = "gain kept more of earlier domains than lora (lora minus gain: +9.0 points [+7.0, +11.0])."
    level_text = "In-domain they do not measurably differ (+0.1 points [−0.3, +0.5])."
    assert compared(Interval(9.0, 7.0, 11.0), level) == f"{kept} {level_text}"
    assert compared(Interval(-9.0, -11.0, -7.0), level).startswith("lora kept more of earlier domains than gain")
    assert compared(Interval(9.0, -0.1, 11.0), level).startswith("No winner between gain and lora on earlier domains")
    assert compared(Interval(9.0, None, None), level).startswith("No winner")
    assert "in-domain lora is ahead (−3.0 points" in compared(Interval(9, 7, 11), Interval(-3, -4, -2))
    assert compared(None, Interval(-3.0, -4.0, -2.0)).startswith("lora learned more in-domain than gain")


def test_cautions_name_what_applies(two_methods):
    text = " ".join(words.cautions(two_methods))
    assert "not a change of accuracy" in text and "seed of training" in text
    assert "validation block" not in text.replace("validation blocks,", "") and "not finished" not in text
    few = make_matrix(DOMAINS, {"a": keeps, "b": forgets, "c": keeps}, blocks=3, finished={"b": 1})
    text = " ".join(words.cautions(few))
    assert "only 3 validation blocks" in text and "not finished" in text and "not corrected" in text
