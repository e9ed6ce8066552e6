"""Folders that this program did not begin: every command refuses them, and not a byte in them is another one after."""

import hashlib
import json
import os
from pathlib import Path

from typer.main import get_command

from gaintune.cli.app import app
from gaintune.config import build_plan, plan_yaml
from gaintune.errors import ConfigError, RunDirectoryError
from gaintune.storage import ADAPTATION, SWEEP, close_run, complete_folder, open_run, take_folder, write_json
from gaintune.storage.ownership import SEQUENCE, Kind
from support import refused
from support.files import as_plan

WRONG_MODEL = "no-such-owner/no-such-model"  # looking for it would raise an error of another class
PLAN = f"model: {{name: {WRONG_MODEL}}}\ndata: {{domains: [contracts=texts/contracts.jsonl]}}\nmethods: [gain-ffn]\n"
RECIPE = (
    "{id: MINE, title: t, source: s, asks: a, model: none, claims: [], steps: [{name: one, do: linear-model, settings: "
    "{dimension: 4, rank: 1, steps: 5, seeds: 2, batch_size: 16}}]}"
)


def write(folder: Path, files: dict[str, str]) -> Path:
    """Write files by their path."""
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def project(folder: Path, **more: str) -> Path:
    """What a person keeps together: a plan, the texts it is about, and notes."""
    texts = '{"text": "years of work"}\n' * 9
    return write(folder, {"plan.yaml": PLAN, "texts/contracts.jsonl": texts, "notes.md": "mine", **more})


def begun(folder: Path, kind: Kind = SEQUENCE, **more: str) -> Path:
    """A run of another plan that got nowhere, and what a person put there since."""
    with open_run(folder, as_plan({"train": {"lr": 0.7}}), {}, kind=kind) as run:
        run.write_once("inputs.json", {}, "")
        if kind is SEQUENCE:
            run.write_json(run.base("float32", "law"), {})
    return write(folder, more)


def finished(folder: Path) -> Path:
    """A run of another plan with an adapter."""
    return adapter(begun(folder) / "stages" / "gain-ffn" / "01-law" / "adapter").parents[3]


def unmarked(folder: Path) -> Path:
    """The same folder as an earlier version left it."""
    (folder / "run.json").unlink()
    return folder


def adapter(folder: Path) -> Path:
    with complete_folder(folder) as temporary:
        write(temporary, {"adapter_config.json": '{"peft_type": "LORA"}'})
    return folder


def sweep(folder: Path, **more: str) -> Path:
    with take_folder(folder, SWEEP):
        return write(folder, {"grid.yaml": "methods: [lora]\n", "outcomes/0123456789abcdef.json": "{}", **more})


def recipe(folder: Path) -> Path:
    write_json(folder / "recipe.json", {"recipe": {"id": "MINE"}, "scale": "small", "data": None, "overrides": {}})
    return write(folder, {"results.md": "verdicts", "train/notes.md": "mine"})


def link(at: Path, name: str = "") -> Path:
    """A link to a project, in a folder or by itself."""
    (at / name).symlink_to(project(at.with_name("project")), target_is_directory=True)
    return at


def lock_is_a_link(folder: Path) -> Path:
    folder.mkdir()
    (folder / ".lock").symlink_to(write(folder.with_name("project"), {"thesis.tex": "years of work"}) / "thesis.tex")
    return folder


def named_like_tables(folder: Path) -> Path:
    """A person's own tables, under the names of analyses."""
    for name in ("gates", "gains", "linear-model", "landscape", "subspace", "tokens", "transfer", "retention"):
        write(folder, {f"{name}.csv": "mine", f"{name}.json": '{"mine": true}'})
    return folder


ENVIRONMENT = {"environment.json": "{}"}
TARGETS = {
    "a project with its plan and texts": project,
    "a project, as the folder one stands in": project,
    "a project that is a git repository": lambda at: project(at, **{".git/HEAD": "ref: refs/heads/main\n"}),
    "a project with a finished run one level down": lambda at: finished(project(at) / "runs").parent,
    "a project with a file run.json of its own": lambda at: project(at, **{"run.json": '{"distance": "10 km"}'}),
    "a project with a grid and a comparison": lambda at: project(at, **{"grid.yaml": "", "comparison.md": "mine"}),
    "a project with a folder of stages": lambda at: finished(project(at, **ENVIRONMENT) / "stages").parent,
    "a home": lambda at: project(at / "thesis", **{"../.bashrc": "alias"}).parent,
    "the parent of the texts": lambda at: write(at / "texts", {"contracts.jsonl": '{"text": "a"}\n'}).parent,
    "a plan and nothing else": lambda at: write(at, {"plan.yaml": PLAN}),
    "a plan that differs, with an environment": lambda at: write(at, {"plan.yaml": PLAN, **ENVIRONMENT}),
    "a plan that is a folder": lambda at: write(at, {"plan.yaml/chapter.md": "one", **ENVIRONMENT}),
    "a file": lambda at: write(at.parent, {at.name: "a thesis"}) / at.name,
    "a link to a project": link,
    "an adapter": adapter,
    "a hub cache": lambda at: write(at, {"hub/models--a--b/refs/main": "0123", "version.txt": "1"}),
    "a sweep": lambda at: sweep(at, **{"comparison.md": "ours"}),
    "a sweep of an earlier version": lambda at: unmarked(sweep(at)),
    "a sweep of an earlier version, with notes": lambda at: unmarked(sweep(at, **{"runs/notes.md": "mine"})),
    "a recipe": recipe,
    "a finished run of another plan": finished,
    "a run that got nowhere, with texts in it": lambda at: begun(at, **{"texts/contracts.jsonl": '{"text": "a"}\n'}),
    "a run that got nowhere, with notes below": lambda at: begun(at, **{"stages/gain-ffn/01-law/notes.md": "mine"}),
    "a run of an earlier version of another plan": lambda at: unmarked(begun(at)),
    "a run of an earlier version that holds a link": lambda at: link(unmarked(begun(at)), "stages"),
    "a run that claims to be of a later version": lambda at: begun(at, **{"run.json": '{"format": 2}'}),
    "unfinished work, with notes in it": lambda at: begun(at, ADAPTATION, **{"checkpoints/notes.md": "mine"}),
    "unfinished work of an earlier version": lambda at: unmarked(begun(at, ADAPTATION)),
    "a lock that is a link": lock_is_a_link,
    "tables of a person's own": named_like_tables,
}
LINES = {
    "sequence": "sequence {plan} --run {at}",
    "demo": "demo {plan} --run {at}",
    "sweep": "sweep {grid} --run {at}",
    "recipe": "recipe run {mine} --scale smoke --run {at}",
    "adapt": "adapt {plan} --out {at}",
    "adapt, its unfinished work": "adapt {plan} --out {beside}",
    "merge": "merge {adapter} {at} --model {model}",
    "gains": "gains {adapter} --out {at}",
    "linear-model": "linear-model --steps 1 --out {at}",
} | {
    name: name + " {adapter} --model {model} --out {at}"
    for name in ("gates", "landscape", "retention", "subspace", "tokens", "transfer")
}
OWN = {("a sweep", "sweep"), ("a sweep of an earlier version", "sweep")}  # which may be continued


def tree(folder: Path) -> str:
    """A hash of every name, link and byte below a folder."""
    digest = hashlib.sha256()
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted([*folders, *files]):
            path = Path(place, name)
            digest.update(f"{path.relative_to(folder)}\0".encode())
            link = str(path.readlink()).encode() if path.is_symlink() else None
            digest.update(link or (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def test_no_command_touches_a_folder_that_it_did_not_begin(tmp_path, monkeypatch):
    tools = write(tmp_path / "tools", {"plan.yaml": PLAN, "grid.yaml": f"plan: {{model: {{name: {WRONG_MODEL}}}}}\n"})
    write(tools, {"mine.yaml": RECIPE})
    adapter(tools / "adapter")
    adapter(tools / "adapter.snapshots" / "step-000001")
    files = ("plan.yaml", "grid.yaml", "mine.yaml", "adapter")
    places = {"model": WRONG_MODEL, **{name.partition(".")[0]: tools / name for name in files}}
    command = get_command(app)
    problems, unchanged = [], 0
    for number, (name, make) in enumerate(TARGETS.items()):
        world = tmp_path / str(number)
        world.mkdir()
        at, here = make(world / "out.unfinished"), "stands in" in name
        monkeypatch.chdir(at if here else world)
        before, broken = tree(world), []
        for what, line in LINES.items():
            if (name, what) in OWN:
                continue
            words = line.format(at="." if here else at, beside=world / "out", **places).split()
            try:
                command(words, standalone_mode=False)
                broken.append(f"{what} goes on")
            except (ConfigError, RunDirectoryError):
                pass
            except Exception as error:  # such as one about the model, which nobody should have looked at
                broken.append(f"{what} goes on: {error!r}")
            if tree(world) != before:
                broken.append(f"{what} changes it")
                before = tree(world)
        unchanged += not broken
        problems += [f"{name}: {each}" for each in broken]
    print(*problems, sep="\n")
    print(f"{unchanged} of {len(TARGETS)} hostile folders are unchanged, each under {len(LINES)} commands")
    assert not problems, f"{unchanged} of {len(TARGETS)}"


def test_runs_of_an_earlier_version_are_continued_and_marked(tmp_path):
    plan = build_plan({})
    for kind in (SEQUENCE, ADAPTATION):
        folder = tmp_path / kind.name
        with open_run(folder, plan.model_dump(mode="json"), {}, kind=kind) as run:
            run.write_once("inputs.json", {}, "")
            run.event("begun")
            adapter(folder / ("snapshots/step-000003" if kind is ADAPTATION else "stages/gain-ffn/01-law/adapter"))
            (folder / f".plan.yaml.{'0' * 12}").touch()  # of a process that was killed
        before = tree(folder)
        unmarked(folder)
        with open_run(folder, plan.model_dump(mode="json"), {}, kind=kind):
            pass
        assert tree(folder) == before
        assert json.loads((folder / "run.json").read_text()) == {"format": 1, "kind": kind.name, "program": "gaintune"}
    folder = unmarked(sweep(tmp_path / "sweep"))
    with take_folder(folder, SWEEP):
        assert (folder / "run.json").exists()
    assert (tmp_path / "sequence" / "plan.yaml").read_text() == plan_yaml(plan)


def test_only_what_a_manifest_lists_is_replaced(tmp_path):
    folder, before = adapter(tmp_path / "adapter"), tree(tmp_path)
    adapter(folder)
    assert tree(tmp_path) == before
    (folder / "notes.md").write_text("mine")
    refused(RunDirectoryError, r"holds notes\.md, which its manifest\.json does not list", adapter, folder)
    (folder / "notes.md").unlink()
    (folder / "manifest.json").unlink()
    refused(RunDirectoryError, r"no manifest\.json says that it was written by this program", adapter, folder)
    (tmp_path / "link").symlink_to(folder)
    refused(RunDirectoryError, "is a link", adapter, tmp_path / "link")
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json"]


def test_what_is_put_there_while_it_trains_stays(tmp_path):
    """As `gaintune adapt` ends: its own unfinished work goes, and nothing else."""
    with open_run(tmp_path / "out.unfinished", as_plan({}), {}, kind=ADAPTATION) as run:
        adapter(run.folder / "checkpoints" / "checkpoint-3")
        write(run.folder, {"checkpoints/mine/notes.md": "mine", "notes.md": "mine"})
    close_run(run.folder, ADAPTATION)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"out.unfinished/notes.md", "out.unfinished/checkpoints/mine/notes.md"}
