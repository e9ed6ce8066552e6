"""The code blocks of README and docs run, in order and page by page, on a tiny base in place of the demo model.

A block under `<!-- not run by the tests: REASON -->` is read only: its commands are parsed, its Python is compiled.
"""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import click
import pytest
import typer
import yaml
from typer.testing import CliRunner

from gaintune.cli import app
from gaintune.models import checkpoints
from gaintune.recipes import recipe_named, smoke
from gaintune.recipes.schema import read_recipe
from gaintune.storage import assets
from gaintune.workflows.sweep import read_grid
from support.cli import run

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("[ag]*/*.md"))]
BLOCK = re.compile(r"(?P<unrun><!-- not run by the tests: [^>]+ -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)```", re.DOTALL)
FENCED = {path: list(BLOCK.finditer(path.read_text(encoding="utf-8"))) for path in PAGES}
HUB_MODELS = {"Qwen/Qwen2.5-0.5B": "demo", "FacebookAI/roberta-base": "encoder"}
COMMAND = typer.main.get_command(app)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """Make what the pages take for granted: a base, an encoder, rows, and adapters of a user."""
    folder = tmp_path_factory.mktemp("workshop")
    smoke.base(folder / "demo")
    smoke.encoder(folder / "encoder")
    texts = smoke.texts(folder / "rows")
    for name in ("notes", "contracts"):
        shutil.copy(texts / "wikitext.jsonl", folder / f"{name}.jsonl")
    answers = [{"prompt": f"What is {n} and {n}?\n", "completion": f"It is {2 * n}."} for n in range(40)]
    labelled = [{"text": f"ticket {n}", "label": ("open", "closed")[n % 2]} for n in range(40)]
    choices = [
        {"question": f"{n} + 1?", "options": {"A": str(n), "B": str(n + 1)}, "answer_idx": "B"} for n in range(8)
    ]
    for name, rows in {"gsm8k": answers, "support": answers, "tickets": labelled, "questions": choices}.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    with at_home(folder):
        for name, method in {"law": "gain-ffn", "medical": "gain-ffn", "code": "gain-ffn", "disel": "disel"}.items():
            domain = "law" if name == "disel" else name
            gaintune(f"adapt --domain {domain} --method {method} --train-tokens 1024 --out adapters/{name}")
        for name in ("notes", "contracts"):
            gaintune(f"adapt --domain {name}.jsonl --method gain-ffn --train-tokens 1024 --out adapters/{name}")
        gaintune(
            "sequence --domain law --domain medical --method gain-ffn --method lora --train-tokens 1024 --run runs/mine"
        )
    return folder


@contextlib.contextmanager
def at_home(folder: Path):
    """Work in a folder where the name `demo` is the tiny base."""
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        fetch = assets.fetch
        patch.setattr(assets, "fetch", lambda name: Path(name) if name == "demo-model" else fetch(name))
        patch.setattr(checkpoints, "converted_folder", lambda path: folder / "demo")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def gaintune(line: str) -> str:
    done = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, shlex.split(line))
    assert done.exit_code == 0, (line, done.output[-500:], done.exception)
    return done.stdout


def parse(words: list[str]) -> None:
    """Parse a command's words without running it; click raises for an option that is not there."""
    command: click.Command = COMMAND
    while isinstance(command, click.Group):
        command, words = command.commands[words[0]], words[1:]
    command.make_context("gaintune", list(words), resilient_parsing=False)


def commands(text: str) -> list[str]:
    """Split a block into command lines: continued lines joined, comments dropped."""
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


def run_line(line: str, made: set[str]) -> None:
    words = shlex.split(line)
    target = words[words.index(">") + 1] if ">" in words else None
    for option in ("--out", "--run"):
        if option in words and (folder := words[words.index(option) + 1]) not in made:
            shutil.rmtree(folder, ignore_errors=True)  # of the workshop, not of this page
            made.add(folder)
    budget = "--train-tokens 1024 --validation-tokens 1024"
    trains = words[1] in ("adapt", "sequence") and not {"--train-tokens", "classify"} & set(words)
    shown = gaintune(f"{line.removeprefix('gaintune ').partition('>')[0]} {budget if trains else ''}")
    if target:
        Path(target).write_text(shown, encoding="utf-8")


def check_line(line: str) -> None:
    """Check a line of another program: its target, file or extras exist."""
    first, *words = shlex.split(line)
    if first == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), line
    elif first == "python":
        assert (ROOT / words[0]).is_file(), line
    elif first == "accelerate":
        parse(words[words.index("gaintune") + 1 :])
    elif first == "pip":
        known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        assert set(re.findall(r"[\w-]+", (re.findall(r"\[(.*?)\]", line) or [""])[0])) <= set(known), line
    elif first.startswith("{"):
        json.loads(line)
    else:
        raise AssertionError(f"no test knows what this line is: {line}")


@pytest.mark.real_model
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [path for path in PAGES if FENCED[path]], ids=lambda path: str(path.relative_to(ROOT)))
def test_its_code_blocks_run(page, workshop, tmp_path):
    shutil.copytree(workshop, tmp_path, dirs_exist_ok=True)
    made: set[str] = set()
    with at_home(tmp_path):
        for block in FENCED[page]:
            if block["kind"] == "yaml":
                Path(block["text"].partition("\n")[0].removeprefix("# ")).write_text(block["text"], encoding="utf-8")
        for block in FENCED[page]:
            kind, text = block["kind"], block["text"]
            for name, folder in HUB_MODELS.items():
                text = text.replace(name, folder)
            if kind == "python":
                code = compile(text, str(page), "exec")
                if not block["unrun"]:
                    with contextlib.redirect_stdout(io.StringIO()):
                        exec(code, {})
            elif kind == "yaml":
                path = Path(text.partition("\n")[0].removeprefix("# "))
                (read_recipe if "steps" in yaml.safe_load(text) else read_grid)(path)
            elif kind != "text":
                for line in commands(text):
                    if not line.startswith("gaintune "):
                        check_line(line)
                    elif block["unrun"]:
                        parse(shlex.split(line)[1:])
                    else:
                        run_line(line, made)


def test_the_reference_is_current():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    stale = [page for page, make in generate.PAGES.items() if (generate.FOLDER / page).read_text("utf-8") != make()]
    assert not stale, f"run `make docs`: {stale}"


def test_the_memory_of_one_experiment_is_what_its_page_and_the_command_say():
    """Of all of them it would take minutes: `python docs/memory.py`."""
    spec = importlib.util.spec_from_file_location("memory", DOCS / "memory.py")
    memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    rows = memory.rows(recipe_named("G8"))
    page = memory.PAGE.read_text(encoding="utf-8").splitlines()
    assert rows and [line for line in page if line.startswith("| G8 ")] == rows
    words = rows[-1].rpartition(" | ")[2].removesuffix(" |")
    assert words.endswith("fits 1 x 80GB") and words in run("recipe", "show", "G8", "--scale", "paper")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
            assert anchor in slugs, (target, anchor)
