"""Tables hold the numbers of the matrix, whatever the names in them look like."""

import pytest

from gaintune.report import palette, tables
from support.synthetic_run import keeps, make_matrix


def test_the_tidy_table_has_one_row_for_each_cell(two_methods):
    frame = tables.tidy(two_methods)
    assert len(frame) == 2 * 3 * 3
    for row in frame.itertuples():
        method = two_methods.methods[["gain-ffn", "lora"].index(row.method)]
        cell = method.stages[row.stage - 1].cells[row.domain]
        assert row.learnt == method.stages[row.stage - 1].domain
        assert (row.change_percent, row.low_percent, row.high_percent) == pytest.approx(
            (cell.change, cell.low, cell.high)
        )
        assert row.perplexity == pytest.approx(row.base_perplexity * (1 + row.change_percent / 100))
        assert row.bits_per_byte == pytest.approx(cell.bits_per_byte)
    assert list(frame[frame.method == "lora"].place) == [
        "learning", "later", "later", "earlier", "learning", "later", "earlier", "earlier", "learning",
    ]  # fmt: skip


def test_markdown_holds_summary_differences_matrices_and_base(two_methods):
    text = tables.to_markdown(two_methods)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    widths = {line.count("|") for line in lines if line.startswith(("| gain-ffn |", "| lora |", "| Method"))}
    assert widths == {9}
    assert any(line.startswith("| lora minus gain-ffn | 3 |") for line in lines)
    diagonal = two_methods.methods[1].stages[1].cells["law"].change
    assert f"**{diagonal:+.1f}**".replace("-", "−") in next(
        line for line in text[text.index("lora: a row") :].splitlines() if line.startswith("| 2 law |")
    )
    assert "| medical | 2" in text and "| 3,060 | 12 |" in text
    assert "not finished" not in text


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
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
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


def test_the_colour_scale_is_shared_centred_and_robust(two_methods):
    limit = palette.limit_of(two_methods)
    assert limit == 20.0
    assert palette.bin_of(0.0, limit) == 0 and palette.bin_of(-limit, limit) == -palette.BINS
    assert palette.bin_of(1e6, limit) == palette.BINS
    assert palette.limit_of(make_matrix(("a",), {"x": lambda s, p: 0.1})) == palette.SMALLEST_LIMIT
    assert palette.limit_of(make_matrix(("a",), {"x": lambda s, p: 900.0})) == palette.LARGEST_LIMIT
