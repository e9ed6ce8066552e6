"""What is on disk survives: a crash in the middle leaves the old or the new, never half of one."""

import contextlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import threading

import pytest
from filelock import FileLock

from gaintune.errors import RunDirectoryError
from gaintune.results import DomainLoss
from gaintune.storage import (
    as_yaml,
    canonical_json,
    complete_folder,
    damage,
    locked,
    number_changes,
    open_run,
    read_json,
    read_stored,
    write_json,
    write_text,
)
from support import refused
from support.files import as_plan


def test_a_failed_write_leaves_the_old_file_and_the_same_value_gives_the_same_bytes(tmp_path):
    file = tmp_path / "value.json"
    write_json(file, {"a": 1})
    refused(ValueError, "Out of range float", write_json, file, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "\ud800")
    assert read_json(file) == {"a": 1} and list(tmp_path.iterdir()) == [file]
    assert canonical_json({"b": 1, "a": [1.5, "ü"]}) == canonical_json({"a": [1.5, "ü"], "b": 1})


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "adapter"
    with pytest.raises(RuntimeError), complete_folder(folder) as temporary:
        (temporary / "weights").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with complete_folder(folder) as temporary:
        (temporary / "weights").write_text("whole")
    assert damage(folder) is None
    (folder / "weights").write_text("who")
    assert "does not match" in damage(folder)
    (folder / "weights").unlink()
    assert "missing" in damage(folder)


@pytest.mark.parametrize(("manifest", "problem"), [
    (b"", "not valid JSON"),
    (b'{"sha256": {', "not valid JSON"),
    (b'{"sha256": {"weights\xf7": ""}}', "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b"[]", "lists no SHA-256 sums"),
    (b'{"sha255": {"weights": ""}}', "lists no SHA-256 sums"),
    (b'{"sha256": ["weights"]}', "lists no SHA-256 sums"),
    (b'{"sha256": {}}', "lists no SHA-256 sums"),
    (b'{"sha256": {"weights": 5}}', "does not match"),
    (b'{"sha256": {"weightt": ""}}', "is missing"),
    (b'{"sha256": {"../secret": ""}}', "not a file of the folder"),
    (b'{"sha256": {"/ecret": ""}}', "not a file of the folder"),
    (b'{"sha256": {"": ""}}', "not a file of the folder"),
    (b'{"sha256": {"weights\\u0000": ""}}', "is missing|cannot be checked"),
    (b'{"sha256": {"%s": ""}}' % (b"w" * 5000), "cannot be checked"),
], ids=lambda value: value if isinstance(value, str) else value[:30].decode(errors="replace"))  # fmt: skip
def test_a_broken_manifest_is_damage_in_words(tmp_path, manifest, problem):
    (tmp_path / "secret").write_text("")
    with complete_folder(tmp_path / "adapter") as temporary:
        (temporary / "weights").write_text("whole")
    (tmp_path / "adapter" / "manifest.json").write_bytes(manifest)
    assert re.search(problem, damage(tmp_path / "adapter"))


def test_what_is_written_has_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        with complete_folder(tmp_path / "adapter") as temporary:
            (temporary / "part").mkdir()
            (temporary / "part" / "weights").write_text("as safetensors writes them")
            (temporary / "part" / "weights").chmod(0o600)
        write_text(tmp_path / "plan.yaml", "")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    folders, files = {"adapter": 0o750, "part": 0o750}, {"weights": 0o640, "manifest.json": 0o640, "plan.yaml": 0o640}
    assert modes == {**folders, **files}


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "run"
    for make in (open_run(below, as_plan({}), {}), complete_folder(below / "adapter")):
        with pytest.raises(RunDirectoryError, match="cannot be made"), make:
            pass
    refused(RunDirectoryError, "cannot be made", write_text, below / "plan.yaml", "")


def test_an_unused_run_is_gone_when_it_fails_unless_it_holds_more(tmp_path):
    for kept in ((), ("checkpoints/checkpoint-3",), ("base",), ("mine.txt",)):
        folder = tmp_path / "run"
        with contextlib.suppress(KeyError), open_run(folder, as_plan({}), {}, remove_if_unused=True) as run:
            run.write_once("inputs.json", {}, "")
            run.event("begun")
            (folder / "checkpoints").mkdir()
            for name in kept:
                (folder / name).mkdir(parents=True)
            raise KeyError
        assert folder.exists() == bool(kept), kept
        assert all((folder / name).exists() for name in (*kept, *(("plan.yaml",) if kept else ())))
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(KeyError), open_run(tmp_path / "run", as_plan({}), {}):
        raise KeyError
    assert (tmp_path / "run" / "plan.yaml").exists()


def test_a_run_of_another_plan_is_refused_with_the_differences_by_name_and_briefly(tmp_path):
    folder, lr = tmp_path / "run", {"train": {"lr": 0.1}}
    first = {"data": {"domains": ["law", "code"]}, "methods": ["gain", {"name": "lora", "rank": 2}], **lr}
    with open_run(folder, as_plan(first), {"python": "3"}):
        for label in ("gain", "lora"):
            (folder / "stages" / label / "01-law" / "adapter").mkdir(parents=True)
    second = {"data": {"domains": ["law"], "seed": 3}, "methods": ["gain", {"name": "lora", "rank": 4}], **lr}
    several = "data.domains: [law, code] there, [law] now; data.seed: 0 there, 3 now; methods.lora.rank: 2 there, 4"
    for plan, differences in ((second, several), ({**first, "train": {"lr": 0.2}}, "train.lr: 0.1 there, 0.2 now")):
        with pytest.raises(RunDirectoryError) as caught, open_run(folder, as_plan(plan), {"python": "3"}):
            pass
        message = str(caught.value)
        assert f"({differences}" in message and "{" not in message and len(message) < 400


def test_broken_json_names_file_and_line(tmp_path):
    file = tmp_path / "metrics.json"
    file.write_text('{"a": 1,\n"b" 2}')
    refused(RunDirectoryError, r"metrics\.json:2", read_json, file)
    file.write_bytes(b'{"a": "\xf7"}')
    refused(RunDirectoryError, r"metrics\.json: not text in UTF-8", read_json, file)


ONE = {"nll": [1.0], "tokens": [5], "bytes": [9]}


@pytest.mark.parametrize(
    "value", [{}, [], None, {"nll": [1.0]}, {**ONE, "nll": ["x"]}, {**ONE, "nll": [1.0, 2.0]}, {**ONE, "bytes": "nine"}]
)
def test_a_stored_value_of_another_shape_names_its_file(tmp_path, value):
    write_json(tmp_path / "law.json", value)
    with pytest.raises(RunDirectoryError, match=r"law\.json: .*; restore or delete it"):
        read_stored(tmp_path / "law.json", DomainLoss.from_dict)


def test_a_corrected_plan_takes_over_a_run_that_got_nowhere(tmp_path):
    folder = tmp_path / "run"
    for lr in (0.1, 0.2):
        with open_run(folder, as_plan({"train": {"lr": lr}}), {"python": "3"}) as run:
            assert not run.base("bf16", "law").exists()
            run.write_json(run.base("bf16", "law"), {})
    assert "lr: 0.2" in (folder / "plan.yaml").read_text()


SAME = {"model": {"device": "cpu"}, "evaluate": {"batch_size": 1}, "train": {"gradient_checkpointing": True}}
HALVES = {"batch_size": 2, "gradient_accumulation": 2}


@pytest.mark.parametrize(("change", "lines", "refused_for"), [
    (SAME, 3, ""),
    ({"train": HALVES}, 2, ""),
    ({"train": {"batch_size": 2}}, 0, "train.batch_size: 4 there, 2 now"),
    ({"model": {"quantization": "4bit"}, "train": HALVES}, 0, "model.quantization: nothing there, '4bit' now"),
])  # fmt: skip
def test_a_run_with_results_continues_where_its_numbers_stay_the_same(tmp_path, change, lines, refused_for):
    folder = tmp_path / "run"
    with open_run(folder, as_plan({}), {}):
        (folder / "stages" / "gain" / "01-law" / "adapter").mkdir(parents=True)
    before = (folder / "plan.yaml").read_text()
    if refused_for:
        with pytest.raises(RunDirectoryError) as caught, open_run(folder, as_plan(change), {}):
            pass
        assert f"({refused_for})" in str(caught.value), "keys that leave the numbers alone are not named"
        assert (folder / "plan.yaml").read_text() == before and not (folder / "events.jsonl").exists()
        return
    with open_run(folder, as_plan(change), {}):
        assert (folder / "stages" / "gain" / "01-law" / "adapter").is_dir()
    assert (folder / "plan.yaml").read_text() == as_yaml(as_plan(change))
    (event,) = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert event["event"] == "plan changed" and len(event["differences"]) == lines and not event["started_over"]


def test_a_key_with_values_of_its_own_is_one_key():
    maps = [{"model": {"device_map": {"model.layers.0": device}}} for device in (0, 1)]
    assert number_changes(*maps) == number_changes(maps[0], {"model": {}}) == []
    assert number_changes({"model": {"devices": 1}}, {"model": {}}) == ["model.devices: nothing there, 1 now"]


@pytest.mark.parametrize("text", ["[]", "train: null", "train: {batch_size: x}"])
def test_a_stored_plan_of_another_shape_is_another_plan(tmp_path, text):
    with open_run(tmp_path / "run", as_plan({}), {}):
        (tmp_path / "run" / "stages" / "gain" / "01-law" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "plan.yaml").write_text(text)
    with pytest.raises(RunDirectoryError, match="belongs to another plan"), open_run(tmp_path / "run", as_plan({}), {}):
        pass


def test_other_inputs_start_a_run_without_results_over_and_delete_nothing_of_others(tmp_path):
    folder = tmp_path / "run"

    def begin(fingerprint, *made):
        with open_run(folder, as_plan({}), {}) as run:
            run.write_inputs({"base_fingerprint": fingerprint}, "Name another folder")
            for name in made:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_text(folder / name, "")

    begin("broken", "base/bf16/law.json")
    begin("repaired")
    assert read_json(folder / "inputs.json") == {"base_fingerprint": "repaired"} and not (folder / "base").exists()
    assert "inputs changed" in (folder / "events.jsonl").read_text() and (folder / "plan.yaml").exists()
    (folder / "mine.txt").write_text("notes")
    refused(RunDirectoryError, "mine.txt, which no run wrote", begin, "other")
    (folder / "mine.txt").unlink()
    begin("repaired", "stages/gain/01-law/adapter/manifest.json")
    refused(RunDirectoryError, "'repaired' there, 'other' now. Name another folder", begin, "other")


def test_a_changed_environment_is_written_down(tmp_path):
    for version in ("3.11", "3.12"):
        with open_run(tmp_path / "run", as_plan({}), {"python": version}):
            pass
    assert read_json(tmp_path / "run" / "environment.json") == {"python": "3.11"}
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events[0]["differences"] == ["python: '3.11' there, '3.12' now"]


def _try_to_open(folder, answer):
    try:
        with open_run(folder, as_plan({}), {}):
            answer.put("opened")
    except RunDirectoryError as error:
        answer.put(str(error))


def test_one_process_at_a_time(tmp_path):
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    with open_run(tmp_path / "run", as_plan({}), {}):
        other = context.Process(target=_try_to_open, args=(tmp_path / "run", answer))
        other.start()
        assert "in use" in answer.get(timeout=30)
        other.join()


def test_inputs_that_changed_under_a_run_are_refused(tmp_path):
    with open_run(tmp_path / "run", as_plan({}), {}) as run:
        for _ in range(2):
            run.write_once("inputs.json", {"law": {"content_hash": "a"}}, "Name another folder")
        with pytest.raises(RunDirectoryError, match=r"law\.content_hash: 'a' there, 'b' now.*Name another folder"):
            run.write_once("inputs.json", {"law": {"content_hash": "b"}}, "Name another folder")


def test_a_long_wait_is_explained_once(tmp_path, caplog):
    held, found = FileLock(tmp_path / "a.lock", thread_local=False), []

    def wait():
        with locked(tmp_path / "a.lock", "measuring the base on law", patience=0.1):
            found.append("mine")

    with caplog.at_level(logging.WARNING):
        held.acquire()
        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.6)
        assert found == []
        held.release()
        waiting.join(10)
        assert found == ["mine"]
        messages = [record.getMessage() for record in caplog.records if record.name == "gaintune.storage.run"]
        assert len(messages) == 1 and "another process is measuring the base on law" in messages[0]
        with locked(tmp_path / "a.lock", "measuring", patience=0.1):
            pass
    assert len([record for record in caplog.records if record.name == "gaintune.storage.run"]) == 1
