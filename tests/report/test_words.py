"""Sentences claim what the intervals allow, and no more."""

import re

import pytest

from gaintune.report import words
from gaintune.results import Comparison, Interval, Summary
from support.synthetic_run import forgets, keeps, make_matrix

DOMAINS = ("medical", "law", "code")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-16.44, "−16.4"),
        (0.04, "0.0"),
        (-0.04, "0.0"),
        (3.0, "+3.0"),
        (1418.2, "+1,418"),
        (99.96, "+100"),
        (-2e9, "−2e+09"),
    ],
)
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


def test_no_difference_from_the_base_is_claimed_where_the_interval_holds_zero():
    flat = words.verdict(make_matrix(DOMAINS, {"flat": lambda s, p: 0.0}).methods[0])
    assert "do not measurably differ from the untouched base" in flat


def test_one_block_supports_no_verdict():
    single = words.verdict(make_matrix(DOMAINS, {"gain": keeps}, blocks=1).methods[0])
    assert "[no interval]" in single and "lower" not in single


def test_one_domain_and_no_stage_have_their_own_sentences():
    assert words.verdict(make_matrix(("law",), {"gain": keeps}).methods[0]).startswith("After one stage, law has 1")
    nothing = make_matrix(DOMAINS, {"gain": keeps}, finished={"gain": 0})
    assert words.verdict(nothing.methods[0]) == "No stage is finished yet."
    two = words.verdict(make_matrix(("a", "b"), {"gain": keeps}).methods[0])
    assert "the earlier domain has" in two


def compared(kept, learnt):
    return words.compare(Comparison("lora", "gain", 5, Summary(in_domain=learnt, backward_transfer=kept)))


def test_a_winner_is_called_only_when_the_paired_interval_excludes_zero():
    level = Interval(0.1, -0.3, 0.5)
    assert compared(Interval(9.0, 7.0, 11.0), level) == (
        "gain kept more of earlier domains than lora (lora minus gain: +9.0 points [+7.0, +11.0]). "
        "In-domain they do not measurably differ (+0.1 points [−0.3, +0.5])."
    )
    assert compared(Interval(-9.0, -11.0, -7.0), level).startswith("lora kept more of earlier domains than gain")
    open_ = compared(Interval(9.0, -0.1, 11.0), level)
    assert open_.startswith("No winner between gain and lora on earlier domains")
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
