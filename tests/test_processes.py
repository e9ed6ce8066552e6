"""Two processes on one run, as `accelerate launch` or `torchrun` start them: one writes, both train."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

import gaintune
import tiny_base
import tiny_domains
from gaintune.runs import damage, read_json


def test_two_processes_share_a_run(tmp_path):
    model = tiny_base.folder(tmp_path / "base")
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(tiny_domains.plan(model, tmp_path, train={"batch_size": 2})))
    run = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    program = str(Path(gaintune.__file__).with_name("__main__.py"))
    command = [*launch, "--", program, "sequence", str(plan), "--run", str(run)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("01-prose", "02-code"):
        folder = run / "stages" / "gain-ffn" / stage
        assert damage(folder / "adapter") is None
        metrics = read_json(folder / "metrics.json")
        assert metrics["steps"] == 8  # 32 blocks, 2 processes with 2 blocks each
    matrix = read_json(run / "matrix.json")
    assert not matrix["partial"]
    assert matrix["methods"][0]["summary"]["in_domain"]["value"] < 0
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events.count("finished") == 1
    assert done.stdout.count("numbers ") == 1
