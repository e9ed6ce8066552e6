"""A few rows of each benchmark, as the Hub has them and as questions with choices, and lm-eval's own task over them.

A test file that imports this module is skipped where lm-eval is not installed.
"""

import random
import re
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="benchmarks need lm-eval: pip install 'gaintune[benchmarks]'")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from gaintune.evaluate.benchmarks import BenchmarkConfig, load_suite
from gaintune.evaluate.benchmarks.model import LmEvalModel
from gaintune.progress import Silent
from support import tiny_base

LM_EVAL = Path(lm_eval.__file__).parent / "tasks"
STOCK = {  # lm-eval's own task files
    "arc_easy": "arc/arc_easy.yaml", "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml", "hellaswag": "hellaswag/hellaswag.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml", "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml", "sciq": "sciq/sciq.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml", "medqa_4options": "medqa/medqa.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "triviaqa": "triviaqa/default.yaml", "nq_open": "nq_open/nq_open.yaml",
}  # fmt: skip
WORDS = "the river bends where old stones lie and cold wind sings over green hills".split()  # noqa: SIM905


def _text(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def hub_rows(name: str, count: int, seed: int = 0) -> list[dict]:
    """Rows with the Hub's columns, some with spaces and markers at odd places."""
    rng = random.Random(f"{name} {seed}")
    return [_hub_row(name, rng, number) for number in range(count)]


def _hub_row(name: str, rng: random.Random, number: int) -> dict:
    question = _text(rng, 4, 9)
    if name in {"arc_easy", "arc_challenge", "openbookqa", "commonsense_qa"}:
        count = 5 if name == "commonsense_qa" else 4
        letters = list("ABCDE"[:count])
        row = {
            "choices": {"text": [_text(rng, 1, 6) for _ in range(count)], "label": letters},
            "answerKey": rng.choice(letters),
        }
        return {("question_stem" if name == "openbookqa" else "question"): question, **row}
    if name == "boolq":
        return {"passage": f"Title -- {_text(rng, 9, 20)}", "question": question, "label": rng.randrange(2)}
    if name == "hellaswag":
        endings = [f"{_text(rng, 2, 5)}. [step] {_text(rng, 2, 5)}" for _ in range(3)] + [f"[substeps] {question}."]
        return {
            "activity_label": _text(rng, 1, 2),
            "ctx_a": f"{_text(rng, 3, 6)} [title] {_text(rng, 2, 4)}",
            "ctx_b": _text(rng, 1, 2) if number % 2 else "",
            "endings": endings,
            "label": str(rng.randrange(4)),
        }
    if name == "piqa":
        return {"goal": question, "sol1": _text(rng, 2, 9), "sol2": _text(rng, 2, 9) + " ", "label": rng.randrange(2)}
    if name == "winogrande":
        names = rng.sample(["Ada", "Grace", "Barbara", "Margaret"], 2)
        sentence = f"{names[0]} met {names[1]} because _ {_text(rng, 2, 6)}."
        return {"sentence": sentence, "option1": names[0], "option2": names[1], "answer": rng.choice("12")}
    if name == "sciq":
        wrong = {f"distractor{which}": _text(rng, 1, 3) for which in (1, 2, 3)}
        support = _text(rng, 5, 12) if number % 3 else ""
        return {"question": question, **wrong, "correct_answer": _text(rng, 1, 3), "support": support}
    if name == "medqa_4options":
        endings = {f"ending{which}": _text(rng, 1, 4) for which in range(4)}
        return {"sent1": question, **endings, "label": rng.randrange(4)}
    if name == "lambada_openai":
        return {"text": f"{_text(rng, 8, 14)}"}
    if name in {"triviaqa", "nq_open"}:
        return {"question": question, **answered(name, [_text(rng, 1, 2), _text(rng, 1, 2)])}
    raise AssertionError(name)


def answered(name: str, right: list[str]) -> dict:
    """Right answers as the Hub has them."""
    return {"answer": {"value": right[0], "aliases": right} if name == "triviaqa" else right}


def normalized(name: str, row: dict) -> dict:
    """The same row as a rendered question with choices, written here by hand for each benchmark."""
    if name in {"arc_easy", "arc_challenge", "openbookqa", "commonsense_qa"}:
        question = row.get("question", row.get("question_stem"))
        choices = row["choices"]
        return _asked(f"Question: {question}\nAnswer:", choices["text"], choices["label"].index(row["answerKey"]))
    if name == "boolq":
        query = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        return _asked(query, ["yes", "no"], 0 if row["label"] else 1)
    if name == "hellaswag":
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return _asked(_plain(context), [_plain(each) for each in row["endings"]], int(row["label"]))
    if name == "piqa":
        return _asked(f"Goal: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])
    if name == "winogrande":
        return _asked(row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1)
    if name == "sciq":
        before = f"{row['support']}\n" if row["support"] else ""
        choices = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
        return _asked(f"{before}Question: {row['question']}\nAnswer:", choices, 3)
    if name == "medqa_4options":
        options = {letter: row[f"ending{which}"] for which, letter in enumerate("ABCD")}
        return {"question": row["sent1"], "options": options, "answer_idx": "ABCD"[row["label"]]}
    return row


def said(model, name: str, config: BenchmarkConfig) -> list[str]:
    """What a model answers to each row, without spaces at the ends."""
    asked = LmEvalModel(model, tiny_base.tokenizer(), batch_size=4, title=name, progress=Silent())
    (task,) = (each.task for each in load_suite(config).tasks if each.name == name)
    task.build_all_requests()
    return [each.strip() for each in asked.generate_until(task.instances)]


def _plain(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _asked(query: str, choices: list[str], gold: int) -> dict:
    return {"query": query, "choices": choices, "gold": gold}


def stock_task(name: str, rows: Path, work: Path, split: str = "validation", lines: tuple[str, ...] = ()) -> str:
    """A task file that includes lm-eval's own and points it at a local copy of the rows, with more lines; its path."""
    splits = dict.fromkeys(("training_split", "validation_split", "test_split"), "null") | {f"{split}_split": split}
    written = [
        f"include: {LM_EVAL / STOCK[name]}",
        "dataset_path: json",
        "dataset_name: null",
        f"dataset_kwargs: {{data_files: {{{split}: {rows}}}, cache_dir: {work / 'datasets'}}}",
        *(f"{key}: {value}" for key, value in splits.items()),
        *lines,
    ]
    file = work / f"{name}.yaml"
    file.write_text("\n".join(written) + "\n", encoding="utf-8")
    return str(file)


def reference(model, tasks: list[str]) -> dict:
    """Return what lm-eval itself measures, per task: metrics and per-row results."""
    asked = HFLM(pretrained=model, tokenizer=tiny_base.tokenizer(), batch_size=8)
    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(model=asked, tasks=tasks, bootstrap_iters=1000, task_manager=manager)
    return {name: (figures, found["samples"][name]) for name, figures in found["results"].items()}
