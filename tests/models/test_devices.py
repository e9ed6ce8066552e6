"""Every worker process of a machine takes a CUDA device of its own, before torch could take the first."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gaintune.models import VISIBLE, take_device, visible_devices
from gaintune.workflows.sweep.workers import Pool

TAKE = """
import json, sys
from pathlib import Path
from gaintune.models.devices import VISIBLE, take_device
import os
taken = take_device(json.loads(sys.argv[1]), Path(sys.argv[2]))
print(json.dumps([taken, take_device(["other"], Path(sys.argv[2])), os.environ.get(VISIBLE), "torch" in sys.modules]))
sys.stdout.flush()
sys.stdin.read()
"""


def worker(devices, folder):
    """A process that takes a device and keeps it until its input ends, and what it prints."""
    command = [sys.executable, "-c", TAKE, json.dumps(devices), str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, json.loads(process.stdout.readline())


def test_processes_share_devices_evenly_and_one_takes_a_dead_one_s_place(tmp_path):
    devices = ["2", "GPU-5f"]
    started = [worker(devices, tmp_path) for _ in range(3)]
    try:
        assert [answer[0] for _, answer in started] == ["2", "GPU-5f", "2"]
        for _, (taken, again, visible, torch) in started:
            assert again is None and visible == taken and not torch
        started[1][0].kill()
        started[1][0].wait()
        started.append(worker(devices, tmp_path))
        assert started[3][1][0] == "GPU-5f"
    finally:
        for process, _ in started:
            process.kill()
            process.communicate()


def test_devices_are_called_what_this_process_may_see_and_none_is_taken_where_there_is_none(monkeypatch):
    assert visible_devices(2, {}) == ("0", "1") and visible_devices(2, {VISIBLE: "3, 5"}) == ("3", "5")
    assert visible_devices(0, {}) == visible_devices(0, {VISIBLE: ""}) == ()
    monkeypatch.delenv(VISIBLE, raising=False)
    assert take_device(()) is None and VISIBLE not in os.environ


def note(folder):
    """What a worker of a sweep does first, with devices that are not there."""
    taken = take_device(("first", "second"), Path(folder) / "locks")
    (Path(folder) / f"{os.getpid()}.txt").write_text(str(taken or os.environ.get(VISIBLE)))
    time.sleep(1.0)  # until the other worker has begun


@pytest.mark.timeout(300)
def test_workers_of_a_pool_have_a_device_each(tmp_path):
    Pool("loky", 2).run(note, [str(tmp_path)] * 4, 2)
    assert {file.read_text() for file in tmp_path.glob("*.txt")} == {"first", "second"}
