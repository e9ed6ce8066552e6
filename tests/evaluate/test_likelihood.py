"""Choosing by likelihood: the choice is that of the model's own log-softmax, of questions read from real rows."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from gaintune.config import build_plan
from gaintune.data import ChoiceRow, load_domain, read_choices, write_instruction_rows
from gaintune.errors import DataError
from gaintune.evaluate import compare_choices
from gaintune.evaluate.choices import choice_likelihoods
from gaintune.models import load_base
from gaintune.workflows import adapt
from support import STUDY_DATA, needs_study_data, refused, tiny_base, tiny_encoders

EXAM = {"question": "Which?", "options": {"B": "that", "A": "this"}, "answer_idx": "B"}
TEXTS = (("fine ", "positive"), ("bad", "negative"), ("so", "neutral"))
LABELLED = [{"text": text, "label": label} for text, label in TEXTS]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_base.folder(tmp_path_factory.mktemp("base"), dtype=torch.float32)


def plan_of(model: Path, **changes):
    values = {"model": {"name": str(model), "dtype": "fp32", "device": "cpu"}, "evaluate": {"bootstrap_samples": 50}}
    return build_plan({**values, **changes})


def written(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> Path:
    return tiny_encoders.write_rows(folder / name, rows)


def direct(model, tokenizer, row: ChoiceRow) -> list[float]:
    """Log-likelihoods from the model's full logits, one choice at a time."""
    found = []
    for choice in row.choices:
        prompt, text = tokenizer(row.prompt)["input_ids"], tokenizer(choice)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + text])).logits[0].double()
        picked = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
        found.append(sum(picked[place, token].item() for place, token in enumerate(text)))
    return found


def test_an_exam_question_is_answered_by_its_letter(tmp_path):
    (row,) = read_choices("medqa", written(tmp_path, [EXAM]))
    assert row.prompt == "Which?\nA. this\nB. that\nAnswer:"
    assert (row.choices, row.answer, row.completion) == ((" A", " B"), 1, " B")
    assert row.origin.endswith("rows.jsonl:1")


def test_a_labelled_text_is_answered_by_the_name_of_a_label(tmp_path):
    rows = read_choices("finphrase", written(tmp_path, LABELLED))
    assert rows[0].prompt == "fine\nSentiment:" and rows[0].choices == (" negative", " neutral", " positive")
    assert [row.answer for row in rows] == [2, 0, 1]
    numbered = written(tmp_path, [{"text": "a", "label": 1}, {"text": "b", "label": 0}], "numbered.jsonl")
    assert [row.completion for row in read_choices("sst2", numbered)] == [" positive", " negative"]
    refused(DataError, r"numbered\.jsonl:1: the label is 1, which is no word", read_choices, "reviews", numbered)
    copied = written(tmp_path, [{"sentence": "a", "label": 1}, {"sentence": "b", "label": 0}], "cola.jsonl")
    assert [row.completion for row in read_choices("cola", copied)] == [" acceptable", " unacceptable"]
    pair = {"premise": "It rains. ", "hypothesis": "It is wet.", "label": "entailment"}
    (first, _) = read_choices("mnli", written(tmp_path, [pair, {**pair, "label": "neutral"}], "pairs.jsonl"))
    assert (first.prompt, first.choices) == ("It rains.\nIt is wet.\nLabel:", (" entailment", " neutral"))
    topics = written(tmp_path, [{"text": "a", "label": "law"}, {"text": "b", "label": "code"}], "topics.jsonl")
    assert read_choices("topics", topics)[0].prompt == "a\nLabel:"


def test_the_answers_are_those_of_both_sides_of_a_folder(tmp_path, caplog):
    written(tmp_path / "news", LABELLED, "train.jsonl")
    written(tmp_path / "news", LABELLED[:2], "validation.jsonl")
    rows = read_choices("news", tmp_path / "news")
    assert [row.origin.rpartition("/")[2] for row in rows] == ["validation.jsonl:1", "validation.jsonl:2"]
    assert {row.choices for row in rows} == {(" negative", " neutral", " positive")} and not caplog.text
    (tmp_path / "news" / "validation.jsonl").rename(tmp_path / "news" / "test.jsonl")
    assert len(read_choices("news", tmp_path / "news")) == 2
    assert "news: no validation files; measuring on test.jsonl" in caplog.text
    (tmp_path / "news" / "test.jsonl").unlink()
    assert len(read_choices("news", tmp_path / "news")) == 3
    assert "news: no validation files; asking train.jsonl" in caplog.text


def test_rows_on_one_line_are_read_one_by_one(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(LABELLED))
    assert [row.answer for row in read_choices("rows", tmp_path / "rows.json")] == [2, 0, 1]


def test_a_space_is_put_between_prompt_and_choice_where_there_is_none(tmp_path):
    row = {"choices": ["A", "B"], "answer": "B"}
    prompts = ["Answer:", "Answer: ", "Answer:\n"]
    read = read_choices("given", written(tmp_path, [{**row, "prompt": prompt} for prompt in prompts]))
    assert [each.prompt + each.completion for each in read] == ["Answer: B", "Answer: B", "Answer:\nB"]


def test_the_answers_alone_are_scored_without_the_end_of_text(tmp_path):
    """One token of an exam's row is trained, its letter after the space: a classification loss over the vocabulary."""
    asked = [EXAM, {**EXAM, "question": "What?", "answer_idx": "A"}] * 20
    rows = [{**row, "question": f"{row['question']} {number}"} for number, row in enumerate(asked)]
    write_instruction_rows(read_choices("medqa", written(tmp_path, rows)), tmp_path / "train.jsonl")
    data = {"task": "instruct", "template": "plain", "domains": [str(tmp_path / "train.jsonl")], "end_of_text": False}
    plan = build_plan({"data": {**data, "train_tokens": 512, "validation_tokens": 128, "block_size": 64}})
    tokenizer = tiny_base.tokenizer()
    train = load_domain(plan.data.domains[0], plan.data, tokenizer).train
    scored = [tokenizer.decode(labels[labels != -100]) for labels in train.labels]
    assert len(scored) > 5 and set(scored) == {" A", " B"}


def test_choices_can_be_given_and_a_limit_draws_rows(tmp_path):
    rows = [{"prompt": f"{n} is", "choices": ["odd", " even"], "answer": "odd" if n % 2 else 1} for n in range(20)]
    file = written(tmp_path, rows)
    read = read_choices("parity", file)
    assert [row.answer for row in read] == [0 if n % 2 else 1 for n in range(20)]
    assert read[0].choices == (" odd", " even")
    drawn = read_choices("parity", file, limit=5)
    assert len(drawn) == 5 and drawn == read_choices("parity", file, limit=5)
    assert drawn != read[:5] and drawn != read_choices("parity", file, limit=5, seed=1)


@pytest.mark.parametrize(("row", "message"), [
    ({**EXAM, "answer_idx": "C"}, r"rows\.jsonl:2: the answer 'C' is none of the 2 choices"),
    ({**EXAM, "options": {}}, r"rows\.jsonl:2: column 'options'"),
    ({**EXAM, "question": " "}, r"rows\.jsonl:2: column 'question' is empty"),
])  # fmt: skip
def test_a_broken_question_is_named_by_its_line(row, message, tmp_path):
    refused(DataError, message, read_choices, "medqa", written(tmp_path, [EXAM, row]))


def test_rows_of_another_kind_are_refused_with_what_is_wanted(tmp_path):
    message = r"rows\.jsonl:1: not a question with choices \(prompt \+ choices \+ answer"
    refused(DataError, message, read_choices, "x", written(tmp_path, [{"words": "a"}]))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_likelihoods_are_those_of_the_models_own_logits(model, tmp_path, batch_size):
    base = load_base(plan_of(model).model)
    given = {"prompt": "Once", "choices": [" upon a time", " more"], "answer": 0}
    sets = (("medqa", [EXAM]), ("finphrase", LABELLED), ("given", [given]))
    rows = [row for name, kind in sets for row in read_choices(name, written(tmp_path, kind))]
    found = choice_likelihoods(base.model, base.tokenizer, rows, "mixed", batch_size=batch_size)
    expected = [direct(base.model, base.tokenizer, row) for row in rows]
    for sums, ours in zip(expected, found.sums, strict=True):
        assert ours == pytest.approx(sums, rel=1e-4, abs=1e-4)
    assert found.chosen().predicted == tuple(map(np.argmax, expected))
    sizes = [[len(choice.strip().encode()) for choice in row.choices] for row in rows]
    per_byte = [np.divide(sums, size) for sums, size in zip(expected, sizes, strict=True)]
    assert found.chosen(per_byte=True).predicted == tuple(map(np.argmax, per_byte))
    assert found.chosen().truth == tuple(row.answer for row in rows)


def with_merge(*pair: str) -> PreTrainedTokenizerFast:
    """The bytes' tokenizer with one more token, of two letters."""
    plain = tiny_base.tokenizer()
    merged = Tokenizer(models.BPE({**plain.get_vocab(), "".join(pair): len(plain)}, [pair]))
    merged.pre_tokenizer = plain.backend_tokenizer.pre_tokenizer
    merged.decoder = plain.backend_tokenizer.decoder
    return PreTrainedTokenizerFast(tokenizer_object=merged, eos_token="<end>", bos_token="<end>")


@pytest.mark.parametrize("template", ["$A <end>", "<end> $A", "<end> $A <end>"])
def test_special_tokens_of_the_tokenizer_are_seen_before_a_text_and_never_scored(model, tmp_path, template):
    base, rows = load_base(plan_of(model).model), read_choices("moods", written(tmp_path, LABELLED))
    plain, adding = base.tokenizer, tiny_base.tokenizer()
    both, special = f"{template} $B", [("<end>", plain.eos_token_id)]
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(template, both, special)
    begins = "<end>" if template.startswith("<end>") else ""
    expected = [direct(base.model, plain, replace(row, prompt=begins + row.prompt)) for row in rows]
    for sums, ours in zip(expected, choice_likelihoods(base.model, adding, rows, "moods").sums, strict=True):
        assert ours == pytest.approx(sums, rel=1e-4, abs=1e-4)


def test_a_plan_decides_whether_questions_begin_as_texts_do(model, tmp_path):
    rows = [{"prompt": f"{number} is", "choices": ["low", "top"], "answer": "low"} for number in range(60)]
    file = written(tmp_path, rows)
    auto, always, never = (
        compare_choices(plan_of(model, data={"beginning_of_text": choice}), [], sets={"rows": file})[0].answers
        for choice in ("auto", "always", "never")
    )
    assert auto == never != always, "this tokenizer puts nothing before a text"


def test_a_token_across_the_border_is_not_made(model):
    """As in training, where a prompt has the tokens it has without its completion."""
    base, merging = load_base(plan_of(model).model), with_merge("b", "c")
    assert len(merging("abcd")["input_ids"]) == 3
    row = ChoiceRow("ab", ("cd", " no"), 0, "a:1")
    (ours,) = choice_likelihoods(base.model, merging, [row], "border").sums
    assert ours == pytest.approx(direct(base.model, base.tokenizer, row), rel=1e-4)


def test_a_prompt_beyond_the_models_length_loses_its_beginning_with_a_warning(model, caplog):
    base = load_base(plan_of(model).model)
    longest = base.model.config.max_position_embeddings
    long = ChoiceRow("x" * 300 + "yes or no?", (" yes", " no"), 0, "a:1")
    found = choice_likelihoods(base.model, base.tokenizer, [long], "cut")
    assert "2 of 2 prompts with a choice are longer than the model's 128 tokens" in caplog.text
    short = replace(long, prompt=long.prompt[-(longest - 3) :])  # the last letter of the answer is not seen
    assert found.sums[0][0] == pytest.approx(direct(base.model, base.tokenizer, short)[0], rel=1e-4)
    beginning, begun = tiny_base.tokenizer(), processors.TemplateProcessing("<end> $A", "<end> $A $B", [("<end>", 0)])
    beginning.backend_tokenizer.post_processor = begun
    found = choice_likelihoods(base.model, beginning, [long], "cut")
    kept = replace(long, prompt="<end>" + long.prompt[-(longest - 4) :])
    assert found.sums[0][0] == pytest.approx(direct(base.model, base.tokenizer, kept)[0], rel=1e-4)


def test_training_on_the_answers_alone_teaches_to_choose_them(model, tmp_path):
    """Instruction rows of prompt and right choice, through adapt; base and adapter compared row by row."""
    letters = [(letter, n) for n in range(40) for letter in "abcxyz"]
    answers, choices = {letter: "low" if letter in "abc" else "top" for letter in "abcxyz"}, ["low", "top"]
    rows = [{"prompt": f"{one}{n % 7} is", "choices": choices, "answer": answers[one]} for one, n in letters]
    file = written(tmp_path, rows)
    write_instruction_rows(read_choices("letters", file), tmp_path / "train.jsonl")
    first = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    assert first == {"prompt": "a0 is", "completion": " low"}
    data = {"task": "instruct", "domains": [f"letters={tmp_path / 'train.jsonl'}"], "block_size": 64}
    data |= {"train_tokens": 2048, "validation_tokens": 128}
    lora = {"name": "lora", "rank": 8, "targets": "all-linear"}
    plan = plan_of(model, data=data, methods=[lora], train={"lr": 0.01, "epochs": 4, "checkpoint_steps": 100})
    adapt(plan, tmp_path / "adapter")
    base, adapted = compare_choices(plan, [tmp_path / "adapter"], sets={"letters": file})
    assert (base.label, base.change) == ("base", None) and adapted.accuracy.value > 0.9 > base.accuracy.value
    assert adapted.change.value == pytest.approx(adapted.accuracy.value - base.accuracy.value)
    assert adapted.change.low <= adapted.change.value <= adapted.change.high
    assert (base.rows, base.majority) == (240, 0.5)
    json.dumps([base.to_dict(), adapted.to_dict()])


@needs_study_data("domains")
def test_the_study_rows_read_as_questions():
    exam = read_choices("medqa", STUDY_DATA / "benchmarks" / "medqa" / "test.jsonl")
    assert {row.choices for row in exam} == {(" A", " B", " C", " D")}
    assert {row.answer for row in exam} == {0, 1, 2, 3}
    reviews = read_choices("sst2", STUDY_DATA / "domains" / "sst2")
    assert {row.choices for row in reviews} == {(" negative", " positive")} and len(reviews) == 872
    news = read_choices("finphrase", STUDY_DATA / "domains" / "finphrase")
    assert {row.choices for row in news} == {(" negative", " neutral", " positive")}
