"""The look at the Hub before step 1, by the program itself, against a hub on this machine and with none."""

import json
import shutil

import pytest
import yaml

from support.hub import ENDPOINT, GATED, LocalHub
from support.rehearsal import Shell

TOKEN = "hf_madeupsecretmadeupsecret"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """An open model, a gated and a huge one, and one of two data sets; what matters of each is that it is there."""
    root = tmp_path_factory.mktemp("hub")
    for name in ("open", "gated", "huge"):
        folder = root / "models/acme" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "pytorch_model.bin").write_bytes(b"never counted")
    (root / "models/acme/gated" / GATED).touch()
    with (root / "models/acme/huge/model.safetensors").open("wb") as file:
        file.truncate(2 * shutil.disk_usage(root).total)  # a hole, which takes no room
    (root / "datasets/stanfordnlp/sst2/data").mkdir(parents=True)
    (root / "datasets/stanfordnlp/sst2/data/train.parquet").write_bytes(b"rows")
    with LocalHub(root) as served:
        yield served


@pytest.fixture(scope="module")
def online(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    shell = Shell(hub.environment(home, HF_TOKEN=TOKEN), home)
    yield shell
    shell.close()


@pytest.fixture(scope="module")
def offline(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("offline")
    shell = Shell(hub.environment(home, HF_HUB_OFFLINE="1"), home)
    yield shell
    shell.close()


def recipe(folder, model: str, *domains: str, method="lora"):
    """Write a recipe of one step; return its file."""
    settings = {"domains": list(domains), "methods": [{"name": method, "lr": 0.01}]}
    values = {"id": "MINE", "title": "t", "source": "s", "asks": "a", "model": model}
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({**values, "steps": [{"name": "run", "do": "sequence", "settings": settings}]}))
    return file


def refusal(shell: Shell, file, code: int, *more: str) -> str:
    """Return the one message of a recipe that is not begun, and leaves nothing."""
    folder = file.parent / "run"
    ended, output = shell.run("recipe", "run", file, "--scale", "paper", "--run-dir", folder, *more)
    message = " ".join(output.split())
    assert ended == code and message.count("error:") == 1 and "Traceback" not in output, output
    assert TOKEN not in output
    assert not folder.exists()
    return message


def test_all_that_is_gated_or_missing_is_named_at_once(hub, online, tmp_path):
    hub.requested.clear()
    message = refusal(online, recipe(tmp_path, "acme/gated", "sst2", "pubmedqa"), 2)
    assert f"model acme/gated is gated: accept its license at {ENDPOINT}/acme/gated and run `hf auth login`" in message
    assert "--set model.name=FOLDER" in message
    assert "dataset qiaojin/PubMedQA is not on the Hub, or not for you to see" in message
    assert f"{ENDPOINT}/datasets/qiaojin/PubMedQA" in message
    assert "give --data FOLDER with a local copy called pubmedqa" in message
    assert "sst2" not in message
    assert hub.requested and not [path for path in hub.requested if "/resolve/" in path], "nothing is downloaded"


def test_local_copies_are_not_looked_up(hub, online, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pubmedqa.jsonl").write_text(json.dumps({"text": "words"}) + "\n")
    hub.requested.clear()
    message = refusal(online, recipe(tmp_path, "acme/gated", "sst2", "pubmedqa"), 2, "--data", str(tmp_path / "data"))
    assert "acme/gated" in message and "PubMedQA" not in message
    assert not [path for path in hub.requested if "PubMedQA" in path]
    hub.requested.clear()
    base = tmp_path / "base"
    base.mkdir()
    message = refusal(online, recipe(tmp_path, "acme/gated", "sst2", "pubmedqa"), 2, "--set", f"model.name={base}")
    assert "PubMedQA" in message and "acme/gated" not in message


def test_texts_from_the_command_line_take_the_place_of_the_recipes(hub, online, tmp_path):
    made = recipe(tmp_path, "acme/gated", "sst2", "pubmedqa")
    hub.requested.clear()
    message = refusal(online, made, 2, "--set", "data.domains=[sst2,own=pg19]", "--set", "run.data.watched=[hellaswag]")
    assert "acme/gated" in message and "PubMedQA" not in message
    assert "dataset emozilla/pg19 is not on the Hub" in message and "dataset Rowan/hellaswag is not" in message
    assert not [path for path in hub.requested if "PubMedQA" in path]


def test_a_download_that_does_not_fit_is_refused_with_numbers(hub, online, tmp_path):
    total = 2 * shutil.disk_usage(hub.root).total / 1e9
    hub.requested.clear()
    message = refusal(online, recipe(tmp_path, "acme/huge", "sst2"), 2)
    assert f"recipe MINE needs {total:.2f} GB on the disk of" in message and "GB left" in message
    assert f"model acme/huge {total:.2f} GB" in message and "HF_HOME" in message
    assert not [path for path in hub.requested if "/resolve/" in path]


def test_without_a_hub_what_the_cache_lacks_is_named(hub, offline, tmp_path):
    hub.requested.clear()
    message = refusal(offline, recipe(tmp_path, "acme/open", "sst2", "pg19"), 1)
    assert "the Hub is not reached" in message and "HF_HUB_OFFLINE" in message
    for name in ("model acme/open", "dataset stanfordnlp/sst2", "dataset emozilla/pg19"):
        assert name in message
    assert not hub.requested


def test_what_is_looked_up_is_shown_on_request(hub, online, tmp_path):
    hub.requested.clear()
    code, output = online.run("recipe", "show", recipe(tmp_path, "acme/open", "sst2", "wikitext"), "--check")
    assert code == 2 and "dataset Salesforce/wikitext is not on the Hub" in output and TOKEN not in output
    code, output = online.run("recipe", "show", recipe(tmp_path, "acme/open", "sst2"), "--check")
    assert code == 0, output
    assert "model acme/open: 0.00 GB to download" in output
    assert "dataset stanfordnlp/sst2: 0.00 GB to download" in output
    assert not [path for path in hub.requested if "/resolve/" in path]
