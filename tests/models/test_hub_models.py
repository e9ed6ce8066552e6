"""Bases by hub id, against a server on this machine that answers as the hub does, and with no hub at all."""

import json
import socket
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants

from gaintune.config import ModelConfig
from gaintune.errors import GaintuneError
from gaintune.models import fingerprint_folder, load_base
from support import tiny_base

COMMIT = "a" * 40
TOKEN = "hf_madeupsecretmadeupsecret"


class Hub(BaseHTTPRequestHandler):
    """The answers `huggingface_hub` needs to download a repository: its commit, its files, and each file."""

    def __init__(self, folder: Path, requested: list[str], *arguments):
        self.folder, self.requested = folder, requested
        super().__init__(*arguments)

    def log_message(self, *_):
        pass

    def answer(self, status=200, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def respond(self):
        path = self.path.split("?")[0]
        self.requested.append(path)
        if path.startswith("/api/models/acme/tiny/revision/"):
            if path.rpartition("/")[2] not in ("main", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="no such revision")
            files = [{"rfilename": file.name} for file in self.folder.iterdir()]
            return self.answer(body=json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": files}).encode())
        if path.startswith("/api/models/acme/tiny/tree/"):
            files = [(file.name, file.stat().st_size) for file in sorted(self.folder.iterdir())]
            entries = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in files]
            return self.answer(body=json.dumps(entries).encode(), Content_Type="application/json")
        if path.startswith(f"/acme/tiny/resolve/{COMMIT}/"):
            body = (self.folder / path.rpartition("/")[2]).read_bytes()
            return self.answer(body=body, ETag=f'"{len(body)}-{path[-9:]}"', X_Repo_Commit=COMMIT)
        if "gated" in path:
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="accept the licence")
        return self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="no such model")

    do_GET = do_HEAD = respond


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A sharded tiny model with pickled weights beside it, as many repositories have; and what was requested for."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    tiny_base.model().to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    tiny_base.tokenizer().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights once more")
    (folder / "modeling_own.py").write_text("raise SystemExit('code was run')")
    requested: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder, requested))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", requested
    server.shutdown()


@pytest.fixture
def load(tmp_path, monkeypatch, capfd, caplog):
    """What load_base makes of a hub id: '<name> <revision> <fingerprint>', or the error's class and text."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level("DEBUG")

    def load(name: str, endpoint: str, revision: str | None = None, offline: bool = False) -> str:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        close_session()  # the client keeps its settings with its connections
        try:
            base = load_base(ModelConfig(name=name, device="cpu", dtype="fp32", revision=revision))
            outcome = f"{base.model.name_or_path} {base.revision} {base.fingerprint}"
        except GaintuneError as error:
            outcome = f"{type(error).__name__} {error}"
        out, err = capfd.readouterr()
        assert TOKEN not in outcome + out + err + caplog.text
        return outcome

    yield load
    close_session()


def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_hub_model_is_fetched_once_without_what_is_not_needed(published, load):
    folder, endpoint, requested = published
    expected = f"acme/tiny None {fingerprint_folder(folder)}"
    requested.clear()
    assert load("acme/tiny", endpoint) == expected
    fetched = {path.rpartition("/")[2] for path in requested if "/resolve/" in path}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} < fetched
    assert not fetched & {"pytorch_model.bin", "consolidated.safetensors", "modeling_own.py"}
    assert load("acme/tiny", nobody()) == expected, "from the cache, with no hub to be reached"
    assert load("acme/tiny", endpoint, offline=True) == expected


def test_a_hub_id_that_cannot_be_had_is_explained(published, load):
    _, endpoint, _ = published
    away = load("acme/tiny", nobody())
    assert away.startswith("AssetError model 'acme/tiny': the hub cannot be reached")
    assert "local folder" in away and "'demo'" in away and "no such model" in load("acme/unknown", endpoint)
    assert load("acme/gated", endpoint).startswith("BaseModelError model 'acme/gated'")
    assert "no revision 'v9'" in load("acme/tiny", endpoint, revision="v9")


def test_a_download_that_stopped_half_way_is_not_used(published, load, tmp_path):
    _, endpoint, _ = published
    load("acme/tiny", endpoint)
    next(tmp_path.rglob("model-00002*.safetensors")).unlink()
    assert load("acme/tiny", endpoint, offline=True).startswith("AssetError model 'acme/tiny'")
    assert load("acme/tiny", endpoint).startswith("acme/tiny")
