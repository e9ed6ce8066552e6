"""A few rows of every benchmark that the papers ask, made by counting: what a smoke run's models are asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gaintune.runs import write_text

ROWS = 6
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
LETTERS = "ABCDE"

Make = Callable[[int], dict[str, Any]]


def rows(folder: Path) -> Path:
    """Write `folder/TASK/SPLIT.jsonl` for each benchmark, in the Hub's columns; files that are there are kept.

    Prompts are short enough for 512 tokens of one byte each, with eight worked examples too.
    """
    for task, (splits, make) in BENCHMARKS.items():
        for place, split in enumerate(splits):
            file = folder / task / f"{split}.jsonl"
            if not file.exists():
                made = (make(place + number) for number in range(ROWS + 2 * place))
                write_text(file, "".join(json.dumps(row) + "\n" for row in made))
    return folder


def _next(number: int) -> str:
    return NUMBERS[(number + 1) % len(NUMBERS)]


def _wrong(number: int, count: int) -> list[str]:
    return [NUMBERS[(number + 2 + step) % len(NUMBERS)] for step in range(count)]


def _asks(number: int) -> str:
    return f"What comes after {NUMBERS[number % len(NUMBERS)]}"


def _listed(number: int, count: int) -> tuple[list[str], int]:
    """Choices with the right one at a place that changes from row to row."""
    choices = _wrong(number, count - 1)
    choices.insert(number % count, _next(number))
    return choices, number % count


def _lettered(question: str, count: int) -> Make:
    def make(number: int) -> dict[str, Any]:
        choices, right = _listed(number, count)
        letters = list(LETTERS[:count])
        return {
            question: f"{_asks(number)}?",
            "choices": {"text": choices, "label": letters},
            "answerKey": letters[right],
        }

    return make


def _boolq(number: int) -> dict[str, Any]:
    passage = f"Counting -- After {NUMBERS[number % len(NUMBERS)]} comes {_next(number)}."
    named = _next(number) if number % 2 else _wrong(number, 1)[0]
    return {"passage": passage, "question": f"is it {named} that comes then", "label": number % 2}


def _hellaswag(number: int) -> dict[str, Any]:
    endings, right = _listed(number, 4)
    begun = f"She says {NUMBERS[number % len(NUMBERS)]}."
    return {
        "activity_label": "Counting",
        "ctx_a": begun,
        "ctx_b": "then she",
        "endings": [f"says {ending}." for ending in endings],
        "label": str(right),
    }


def _piqa(number: int) -> dict[str, Any]:
    (first, second), right = _listed(number, 2)
    return {"goal": f"To go on after {NUMBERS[number % len(NUMBERS)]},", "sol1": first, "sol2": second, "label": right}


def _winogrande(number: int) -> dict[str, Any]:
    (first, second), right = _listed(number, 2)
    sentence = f"{first} and {second} were counted and _ comes after {NUMBERS[number % len(NUMBERS)]}."
    return {"sentence": sentence, "option1": first, "option2": second, "answer": str(right + 1)}


def _sciq(number: int) -> dict[str, Any]:
    wrong = {f"distractor{place}": each for place, each in enumerate(_wrong(number, 3), start=1)}
    support = f"After {NUMBERS[number % len(NUMBERS)]} comes {_next(number)}." if number % 2 else ""
    return {"support": support, "question": f"{_asks(number)}?", **wrong, "correct_answer": _next(number)}


def _mmlu(number: int) -> dict[str, Any]:
    choices, right = _listed(number, 4)
    return {"question": f"{_asks(number)}?", "choices": choices, "answer": right}


def _medqa(number: int) -> dict[str, Any]:
    choices, right = _listed(number, 4)
    endings = {f"ending{place}": choice for place, choice in enumerate(choices)}
    return {"sent1": f"{_asks(number)}?", **endings, "label": right}


def _lambada(number: int) -> dict[str, Any]:
    return {"text": f"He counted: {NUMBERS[number % len(NUMBERS)]} and then {_next(number)}"}


def _triviaqa(number: int) -> dict[str, Any]:
    return {"question": _asks(number), "answer": {"aliases": [_next(number), _next(number).upper()]}}


def _nq_open(number: int) -> dict[str, Any]:
    return {"question": _asks(number).lower(), "answer": [_next(number)]}


def _gsm8k(number: int) -> dict[str, Any]:
    return {"question": f"What is {number} plus 2?", "answer": f"It is {number + 2}.\n#### {number + 2}"}


def _humaneval(number: int) -> dict[str, Any]:
    name = f"add_{number}"
    return {
        "task_id": f"Counting/{number}",
        "prompt": f'def {name}(a):\n    """Return a plus {number}."""\n',
        "entry_point": name,
        "test": f"def check(candidate):\n    assert candidate(1) == {number + 1}\n",
    }


BENCHMARKS: dict[str, tuple[tuple[str, ...], Make]] = {
    "arc_easy": (("test",), _lettered("question", 4)),
    "arc_challenge": (("test",), _lettered("question", 4)),
    "boolq": (("validation",), _boolq),
    "hellaswag": (("validation",), _hellaswag),
    "openbookqa": (("test",), _lettered("question_stem", 4)),
    "piqa": (("validation",), _piqa),
    "winogrande": (("validation",), _winogrande),
    "sciq": (("test",), _sciq),
    "commonsense_qa": (("validation",), _lettered("question", 5)),
    "mmlu": (("test", "dev"), _mmlu),
    "medqa_4options": (("test",), _medqa),
    "lambada_openai": (("test",), _lambada),
    "triviaqa": (("validation", "train"), _triviaqa),
    "nq_open": (("validation", "train"), _nq_open),
    "gsm8k": (("test", "train"), _gsm8k),
    "humaneval": (("test",), _humaneval),
}
"""For each of lm-eval's names the splits it reads, and what makes one row."""
