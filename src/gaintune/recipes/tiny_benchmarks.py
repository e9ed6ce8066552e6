"""Rows of every benchmark that a recipe names, made by counting: what a smoke run asks."""

from __future__ import annotations

from typing import Any

ROWS = 4
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def rows() -> dict[str, list[dict[str, Any]]]:
    """Questions by the benchmark's name, in a form that `gaintune.evaluate.benchmarks.rows` reads."""
    found: dict[str, list[dict[str, Any]]] = {
        name: [_choice(f"Question: What comes after {NAMES[n]}?\nAnswer:", n, 4) for n in range(ROWS)]
        for name in ("arc_easy", "arc_challenge", "openbookqa", "mmlu")
    }
    found["commonsense_qa"] = [_choice(f"Question: What comes after {NAMES[n]}?\nAnswer:", n, 5) for n in range(ROWS)]
    found["hellaswag"] = [_choice(f"{NAMES[n]}, and after that comes", n, 4) for n in range(ROWS)]
    found["piqa"] = [_choice(f"Goal: count on from {NAMES[n]}\nAnswer:", n, 2) for n in range(ROWS)]
    found["winogrande"] = [_choice(f"After {NAMES[n]} comes _ in order.", n, 2) for n in range(ROWS)]
    found["sciq"] = [_choice(f"Question: What comes after {NAMES[n]}?\nAnswer:", 3, 4) for n in range(ROWS)]
    found["boolq"] = [
        {
            "query": f"After {NAMES[n]} comes {NAMES[n + 1]}.\nQuestion: does {NAMES[n + n % 2]} come first?\nAnswer:",
            "choices": ["no", "yes"],
            "gold": 1 - n % 2,
        }
        for n in range(ROWS)
    ]
    found["medqa_4options"] = [
        {
            "question": f"What comes after {NAMES[n]}?",
            "options": dict(zip("ABCD", _choice("", n, 4)["choices"], strict=True)),
            "answer_idx": "ABCD"[n % 4],
        }
        for n in range(ROWS)
    ]
    found["lambada_openai"] = [{"text": f"{', '.join(NAMES[n : n + 3])}, {NAMES[n + 3]}"} for n in range(ROWS)]
    found["gsm8k"] = [
        {"prompt": f"What is {n} and {n}?", "completion": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(24)
    ]
    found["triviaqa"] = [
        {"question": f"What comes after {NAMES[n]}?", "answer": {"value": NAMES[n + 1], "aliases": [NAMES[n + 1]]}}
        for n in range(ROWS)
    ]
    found["nq_open"] = [{"question": f"what comes after {NAMES[n]}", "answer": [NAMES[n + 1]]} for n in range(ROWS)]
    found["humaneval"] = [
        {
            "task_id": f"Tiny/{n}",
            "prompt": f'def add_{n}(x: int) -> int:\n    """Add {n}."""\n',
            "entry_point": f"add_{n}",
            "canonical_solution": f"    return x + {n}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {1 + n}\n",
        }
        for n in range(24)
    ]
    return found


def _choice(query: str, number: int, choices: int) -> dict[str, Any]:
    """A question whose right answer stands at its own number among the choices."""
    gold = number % choices
    return {"query": query, "choices": [NAMES[(number + 1 + n - gold) % 10] for n in range(choices)], "gold": gold}
