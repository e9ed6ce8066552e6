"""Write the page of what the papers' experiments take: `python docs/memory.py` (minutes; a test checks a part)."""

from __future__ import annotations

from pathlib import Path

from gaintune.recipes import Recipe, paper_memory, recipes

PAGE = Path(__file__).parent / "reference" / "memory.md"
HEAD = """\
# Memory of the papers' experiments

<!-- Written by docs/memory.py; edit the code it reads. -->

What every training step takes at scale `paper`, by `gaintune recipe show ID --scale paper`: the most on each GPU, in GB
of 10^9 bytes, estimated from shapes in bf16. [Memory](../guide/memory.md) says how. Benchmarks and analyses are not in
it. None of these has been run on a GPU by us.

| recipe | step, model | methods | memory |
|---|---|---|---|
"""


def rows(recipe: Recipe) -> list[str]:
    """Return the page's rows of one recipe."""
    return [
        f"| {recipe.id} | {line.step}, {line.model} | {', '.join(line.labels)} | {line.says} |"
        for line in paper_memory(recipe)
    ]


if __name__ == "__main__":
    lines = []
    for recipe in recipes().values():
        lines += rows(recipe)
        print(recipe.id, flush=True)
    PAGE.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
