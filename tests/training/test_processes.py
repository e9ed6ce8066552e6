"""Two processes on one run, as `accelerate launch` or `torchrun` start them: one writes, both train."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

import gaintune
from gaintune.adapters import load_adapter
from gaintune.config import build_plan
from gaintune.data import load_domain
from gaintune.methods import StageData
from gaintune.methods.penalties import FISHER, fisher_information
from gaintune.models import NextTokenLoss, load_base
from gaintune.storage import damage, read_json
from support import tiny_domains


def test_two_processes_share_a_run(tiny, tmp_path):
    plan = tmp_path / "plan.yaml"
    methods = [{"name": "gain-ffn", "label": "gain-ffn", "penalty": "ewc"}]
    values = tiny_domains.plan(tiny, tmp_path, train={"batch_size": 2}, methods=methods)
    plan.write_text(yaml.safe_dump(values))
    run = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    program = str(Path(gaintune.__file__).with_name("__main__.py"))
    command = [*launch, "--", program, "sequence", str(plan), "--run", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
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
    checked = build_plan(values)
    base = load_base(checked.model)
    prose = load_domain(checked.data.domains[0], checked.data, base.tokenizer).train
    first = run / "stages" / "gain-ffn" / "01-prose" / "adapter"
    adapted = load_adapter(base, first, trainable=True)
    alone = fisher_information(adapted, StageData(prose, NextTokenLoss(adapted), "alone"))
    for name, together in load_file(first / FISHER).items():
        torch.testing.assert_close(together, alone[name], rtol=1e-3, atol=1e-7, msg=name)
