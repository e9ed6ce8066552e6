"""Run PEFT's own tests of its methods with ours as the method: `python tests/peft_contract/run.py [pytest options]`.

The tests ride in PEFT's source distribution. That of the installed version is downloaded once through pip, checked
against its SHA-256 and unpacked below `.peft-tests/`; everything after that is offline. What is run, and which
inherited tests are left out and why, stands in `contract.py` beside this file and is printed at the end.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHA256 = {"0.21.2": "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"}


def source_distribution(peft_version: str, folder: Path) -> Path:
    """The checked archive, downloaded if it is not there."""
    archive = folder / f"peft-{peft_version}.tar.gz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*command, "--dest", str(folder), f"peft=={peft_version}"], check=True)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256.get(peft_version):
        expected = SHA256.get(peft_version, "unknown: this version is not pinned in tests/peft_contract/run.py")
        raise SystemExit(f"{archive} has SHA-256 {digest}, expected {expected}")
    return archive


def unpack_tests(archive: Path, peft_version: str, folder: Path) -> Path:
    """Unpack the tests as the package `peft_upstream_tests`; return the folder to import it from."""
    home = folder / peft_version
    package = home / "peft_upstream_tests"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            path = Path(member.name)
            if member.isfile() and path.parent == Path(f"peft-{peft_version}/tests") and path.suffix == ".py":
                content = tar.extractfile(member)
                assert content is not None, "a file has content"
                (package / path.name).write_bytes(content.read())
    return home


def main(arguments: list[str]) -> int:
    """Return pytest's exit code."""
    peft_version = version("peft")
    folder = ROOT / ".peft-tests"
    home = unpack_tests(source_distribution(peft_version, folder), peft_version, folder)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(home), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    options = ["-c", os.devnull, "--rootdir", str(home), "--disable-warnings", "-p", "no:cacheprovider", "-q"]
    command = [sys.executable, "-m", "pytest", *options, str(Path(__file__).with_name("contract.py")), *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
