"""Our scores are lm-eval's: `simple_evaluate` with its own task files on local copies of the rows says the same."""

import json

import pytest

from support import STUDY_DATA, tiny_base

lm_eval = pytest.importorskip("lm_eval", reason="benchmarks need lm-eval: pip install 'gaintune[benchmarks]'")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from gaintune.evaluate.benchmarks import BenchmarkConfig  # noqa: E402
from gaintune.evaluate.benchmarks.records import find_score  # noqa: E402
from gaintune.evaluate.benchmarks.run import measure_benchmarks  # noqa: E402
from support import tiny_benchmarks  # noqa: E402

NAMES = (
    "arc_easy",
    "arc_challenge",
    "boolq",
    "piqa",
    "hellaswag",
    "winogrande",
    "sciq",
    "openbookqa",
    "commonsense_qa",
    "medqa_4options",
    "lambada_openai",
)
ROWS = 24
SHARED = STUDY_DATA / "benchmarks"


@pytest.fixture(scope="module")
def model():
    return tiny_base.model(max_position_embeddings=4096).eval()


def reference(model, tasks: list[str]) -> dict:
    """What lm-eval itself says, per task: metrics and per-row results."""
    asked = HFLM(pretrained=model, tokenizer=tiny_base.tokenizer(), batch_size=8)
    found = lm_eval.simple_evaluate(
        model=asked, tasks=tasks, bootstrap_iters=1000, task_manager=TaskManager(include_defaults=False)
    )
    return {name: (figures, found["samples"][name]) for name, figures in found["results"].items()}


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
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def theirs(model, work):
    tasks = []
    for name in NAMES:
        file = tiny_benchmarks.write(work / "hub" / f"{name}.jsonl", tiny_benchmarks.hub_rows(name, ROWS))
        tasks.append(tiny_benchmarks.stock_task(name, file, work))
    return reference(model, tasks)


@pytest.mark.parametrize("written", ["as the Hub has them", "as questions with choices"])
def test_local_rows_score_as_lm_eval_scores_them(model, theirs, work, written):
    folder = work / "hub"
    if written == "as questions with choices":
        folder = work / "questions"
        for name in NAMES:
            rows = [tiny_benchmarks.normalised(name, row) for row in tiny_benchmarks.hub_rows(name, ROWS)]
            tiny_benchmarks.write(folder / name / "validation.jsonl", rows)
    config = BenchmarkConfig(tasks=NAMES, source="local", data=(str(folder),), batch_size=5)
    ours = measure_benchmarks(model, tiny_base.tokenizer(), config)
    for name in NAMES:
        check(ours, theirs, name)
    accuracies = {score.task: score.value for score in ours if score.metric == "acc"}
    assert len(set(accuracies.values())) > 3, "a model that always says the same would agree with anything"


def test_generated_answers_score_as_lm_eval_scores_them(model, tmp_path):
    """Every other row's right answer is what this model says, in other letters, beside a wrong one."""
    names, settings = ("triviaqa", "nq_open"), {"source": "local", "data": (str(tmp_path),), "generated_tokens": 5}
    short = ('generation_kwargs: {until: ["\\n", ".", ","], do_sample: false, temperature: 0.0, max_gen_toks: 5}',)
    config = BenchmarkConfig(tasks=names, **settings)
    for name in names:
        tiny_benchmarks.write(tmp_path / f"{name}.jsonl", tiny_benchmarks.hub_rows(name, 10))
    said = {name: tiny_benchmarks.said(model, name, config) for name in names}
    tasks = []
    for name in names:
        rows = tiny_benchmarks.hub_rows(name, 10)
        for row, answer in zip(rows[::2], said[name][::2], strict=True):
            row |= tiny_benchmarks.answered(name, ["nothing", answer.upper()])
        file = tiny_benchmarks.write(tmp_path / f"{name}.jsonl", rows)
        tasks.append(tiny_benchmarks.stock_task(name, file, tmp_path, lines=short))
    theirs = reference(model, tasks)
    ours = measure_benchmarks(model, tiny_base.tokenizer(), config)
    for name in names:
        figures, samples = theirs[name]
        score = find_score(ours, name, "exact_match,remove_whitespace")
        assert score.value == figures["exact_match,remove_whitespace"]
        assert score.stderr == figures["exact_match_stderr,remove_whitespace"]
        assert score.items == tuple(sample["exact_match"] for sample in samples)
        assert 0.4 < score.value < 1


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


@pytest.mark.study_data
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the study's benchmarks are not in {SHARED}")
def test_real_rows_score_as_lm_eval_scores_them(model, tmp_path):
    names, tasks = ("arc_easy", "boolq", "piqa", "hellaswag", "winogrande"), []
    for name in names:
        lines = (SHARED / name / "validation.jsonl").read_text(encoding="utf-8").split("\n")[:ROWS]
        rows = [hub_columns(name, json.loads(line)) for line in lines]
        tasks.append(
            tiny_benchmarks.stock_task(name, tiny_benchmarks.write(tmp_path / f"{name}.jsonl", rows), tmp_path)
        )
    theirs = reference(model, tasks)
    config = BenchmarkConfig(tasks=names, source="local", data=(str(SHARED),), limit=ROWS, batch_size=6)
    ours = measure_benchmarks(model, tiny_base.tokenizer(), config)
    for name in names:
        check(ours, theirs, name)
