"""A hub on this machine: a folder of repositories, and a server that answers for them as the Hugging Face Hub does.

A repository is `ROOT/models/OWNER/NAME` or `ROOT/datasets/OWNER/NAME`, and one with a file `.gated` in it lets nobody
read its files, like a model whose license was not accepted. A process that is to use it has the variables of
`environment()`: the endpoint is a name that exists nowhere, and the server is the proxy for every address, so that
nothing leaves the machine.
"""

import hashlib
import json
import re
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

GATED = ".gated"
ENDPOINT = "http://hub.test"
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree|paths-info|auth-check)(?:/(.*))?)?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the client's next request waits for the answer

    def __init__(self, root: Path, requested: list[str], *arguments):
        self.root, self.requested = root, requested
        super().__init__(*arguments)

    def log_message(self, *_):
        pass

    def answer(self, status: int = 200, body: bytes = b"", **headers: str):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: object):
        self.answer(body=json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str):
        self.answer(status, X_Error_Code=code, X_Error_Message=f"{code} of this hub")

    def do_CONNECT(self):
        self.requested.append(self.path)
        self.answer(502)

    def respond(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.requested.append(path)
        if f"{url.scheme}://{url.netloc}" != ENDPOINT:
            return self.answer(502)
        if asked := _API.fullmatch(path):
            kind, name, about, rest = asked.groups()
            repository = self.root / kind / name
            if not repository.is_dir():
                return self.refuse(404 if "Authorization" in self.headers else 401, "RepoNotFound")
            if about == "auth-check":
                return self.refuse(403, "GatedRepo") if (repository / GATED).exists() else self.answer()
            if about == "tree":
                folder = repository / (rest or "").partition("/")[2]
                if not folder.is_dir():
                    return self.refuse(404, "EntryNotFound")
                found = folder.rglob("*") if query.get("recursive") == ["True"] else folder.iterdir()
                return self.answer_json([_entry(each, repository) for each in sorted(found)])
            if about == "paths-info":
                paths = [repository / name for name in parse_qs(body)["paths"]]
                return self.answer_json([_entry(each, repository) for each in paths if each.exists()])
            files = [file for file in sorted(repository.rglob("*")) if file.is_file() and file.name != GATED]
            siblings = [{"rfilename": file.relative_to(repository).as_posix()} for file in files]
            if query.get("blobs"):
                siblings = [{**each, "size": file.stat().st_size} for each, file in zip(siblings, files, strict=True)]
            gated = "manual" if (repository / GATED).exists() else False
            return self.answer_json({"id": name, "sha": commit(repository), "gated": gated, "siblings": siblings})
        if asked := _FILE.fullmatch(path):
            kind, name, file = asked.groups()
            repository = self.root / (kind or "models") / name
            if not repository.is_dir():
                return self.refuse(401, "RepoNotFound")
            if (repository / GATED).exists():
                return self.refuse(403, "GatedRepo")
            if not (repository / file).is_file():
                return self.refuse(404, "EntryNotFound")
            return self.answer_file(repository / file, commit(repository))
        return self.refuse(404, "EntryNotFound")

    def answer_file(self, file: Path, revision: str):
        content = file.read_bytes()
        headers = {"ETag": f'"{_hash(file)}"', "X_Repo_Commit": revision, "Accept_Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            if first > last:
                return self.answer(416)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.answer(206, content[first : last + 1], **headers)
        return self.answer(200, content, **headers)

    do_GET = do_HEAD = do_POST = respond


def _hash(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def commit(repository: Path) -> str:
    """Return the only revision of a repository."""
    return hashlib.sha1(repository.as_posix().encode()).hexdigest()


def _entry(path: Path, repository: Path) -> dict:
    name = path.relative_to(repository).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _hash(path)}


class LocalHub:
    """A hub that serves a folder; `requested` lists the paths that were requested of it."""

    def __init__(self, root: Path):
        self.root, self.requested = root, []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, root, self.requested))

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Return the variables of a process that uses this hub, with its caches in `home`."""
        proxy = f"http://127.0.0.1:{self._server.server_port}"
        proxies = {
            name: proxy for scheme in ("http", "https") for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper())
        }
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return {"HF_ENDPOINT": ENDPOINT, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **proxies, **quiet, **more}
