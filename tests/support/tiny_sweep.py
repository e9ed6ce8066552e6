"""Grids of seconds over a tiny base, workers that are killed, and sweeps whose losses are made up."""

import os
import signal
import threading
import time
from pathlib import Path

from gaintune.config import build_plan
from gaintune.results import build_matrix
from gaintune.storage import Run, read_json, write_json
from gaintune.workflows.sweep import SweepTable
from gaintune.workflows.sweep.grid import PlannedRun, plan_id
from gaintune.workflows.sweep.run import SweepRow
from support import tiny_domains
from support.synthetic_run import make_runs


def grid(model: Path, folder: Path, **changes) -> dict:
    """Two methods over a tiny base and both domains, as nested values."""
    plan = tiny_domains.plan(model, folder, data={"train_tokens": 512})
    return {"plan": plan, "methods": [*plan.pop("methods"), {"name": "lora", "rank": 2}], **changes}


def numbers(folder: Path) -> dict[str, bytes]:
    """The matrix of every run by its id."""
    return {file.parent.name: file.read_bytes() for file in (folder / "runs").glob("*/matrix.json")}


def events(folder: Path) -> dict[str, str]:
    """What was done in every run, with its times: any work on a run changes it."""
    return {file.parent.name: file.read_text() for file in (folder / "runs").glob("*/events.jsonl")}


class Killer(threading.Thread):
    """Kills the worker of the first run that has trained its first domain, as the kernel does when memory is out."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self.killed: str | None = None

    def run(self) -> None:
        end = time.monotonic() + 500
        while self.killed is None and time.monotonic() < end:
            for stage in self._folder.glob("runs/*/stages/*/01-*/adapter"):
                state = read_json(self._folder / "outcomes" / f"{stage.parents[3].name}.json")
                if state["state"] == "begun":
                    assert state["process"] != os.getpid()
                    os.kill(state["process"], signal.SIGKILL)
                    self.killed = stage.parents[3].name
                    return
            time.sleep(0.002)


def note_node() -> None:
    """Leave what this worker may see of its Ray node's GPUs in the folder that NODES names, under the node's id."""
    import ray

    node = Path(os.environ["NODES"]) / ray.get_runtime_context().get_node_id()
    node.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "not set"))


def synthetic(
    folder, effects, *, rates=(0.001, 0.01), orders=1, seeds=3, blocks=12, budget=8192, computed=("float32", "cpu")
) -> SweepTable:
    """A sweep; `effects` maps a label to (lr, order, seed) -> (in-domain %, earlier %), or None where a run failed."""
    rows = []
    for order in range(orders):
        for seed in range(seeds):
            for label, effect in effects.items():
                for lr in rates:
                    names = ("a", "b", "c")
                    values = {
                        "data": {"domains": list(names), "train_tokens": budget},
                        "methods": [{"name": "gain", "label": label, "lr": lr}],
                        "train": {"seed": seed}, "evaluate": {"bootstrap_samples": 300},
                    }  # fmt: skip
                    plan = build_plan(values)
                    planned = PlannedRun(plan_id(plan), label, "gain", None, lr, order, names, seed, budget, plan)
                    run = Run(folder / f"{planned.id}-{order}")
                    if (figures := effect(lr, order, seed)) is None:
                        rows.append(SweepRow(planned, run.folder, None, "the loss is not finite"))
                        continue
                    own, earlier = figures

                    def percent(stage, place, own=own, earlier=earlier):
                        return own if place == stage else earlier if place < stage else 0.0

                    (made,) = make_runs(names, {label: percent}, blocks=blocks)
                    made.info["numbers"], device = computed
                    write_json(run.folder / "environment.json", {"device": device})
                    for name, loss in made.base.items():
                        write_json(run.base(computed[0], name), loss.to_dict())
                    for index, stage in enumerate(made.stages):
                        for name, loss in stage.losses.items():
                            file = run.stage(label, index, stage.domain) / "evaluations" / f"{name}.json"
                            write_json(file, loss.to_dict())
                    rows.append(SweepRow(planned, run.folder, build_matrix([made], plan.evaluate, planned=names), None))
    return SweepTable(tuple(rows))
