"""A process that runs commands one after another, each as a shell would, without importing everything again for each.

It reads a line of JSON for each command (a file for its output, and its words), forks, runs the program's entry point
there, and answers with the exit code. What libraries read of the environment at import counts.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

TESTS = Path(__file__).parents[1]


class Shell:
    """The process from a test's side; `seconds` is the processor time of the command before."""

    def __init__(self, environment: Mapping[str, str], folder: Path):
        self.environment, self._folder, self.seconds = dict(environment), folder, 0.0
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        values = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", **environment}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.rehearsal"],
            env=values,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: object) -> tuple[int, str]:
        """Run the program with these words; return its exit code and what it printed."""
        file = self._folder / "output.txt"
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([str(file), *map(str, words)]) + "\n")
        self._process.stdin.flush()
        code, self.seconds = json.loads(self._process.stdout.readline())
        return code, file.read_text(encoding="utf-8")

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _serve() -> None:
    import datasets  # noqa: F401  # what every recipe imports
    import lm_eval.api.task  # noqa: F401
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401

    import gaintune.recipes.runner  # noqa: F401
    from gaintune.cli import main

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # stages collect garbage, of which these modules are none
    for line in sys.stdin:
        file, *words = json.loads(line)
        child = os.fork()
        if child == 0:
            output = os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            for stream in (sys.stdout, sys.stderr):
                os.dup2(output, stream.fileno())
            sys.argv = ["gaintune", *words]
            code = 0
            try:
                main()
            except SystemExit as stop:
                code = stop.code or 0
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 99
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status, usage = os.wait4(child, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime]), flush=True)


if __name__ == "__main__":
    _serve()
