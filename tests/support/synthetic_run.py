"""Run directories as a sequence leaves them, with losses made up here and everything else real."""

import math

import numpy as np

from gaintune.config import EvaluateConfig, build_plan, plan_yaml
from gaintune.results import DomainLoss, MethodRun, Stage, build_matrix
from gaintune.storage import write_json, write_text

QUICK = EvaluateConfig(bootstrap_samples=200)


def make_runs(domains, methods, *, blocks=12, extra=(), finished=None):
    """One run for each method; `methods` maps a label to a function of (stage, domain) giving the change in %."""
    names, tokens = [*domains, *extra], (255,) * blocks
    mean = {name: np.random.default_rng([1, i]).normal(3.0, 0.3, blocks) for i, name in enumerate(names)}

    def loss(nats):
        return DomainLoss(tuple(float(n) * 255 for n in nats), tokens, (1000,) * blocks)

    runs = []
    for index, (label, percent) in enumerate(methods.items()):
        noise, stages = np.random.default_rng([2, index]), []
        for stage, domain in enumerate(domains[: (finished or {}).get(label, len(domains))]):
            losses = {
                name: loss(mean[name] + math.log1p(percent(stage, place) / 100) + noise.normal(0, 0.02, blocks))
                for place, name in enumerate(names)
            }
            stages.append(Stage(domain, losses))
        info = {"method": "gain", "lr": 0.01, "trainable_parameters": 63360}
        runs.append(MethodRun(label, {name: loss(mean[name]) for name in names}, tuple(stages), info))
    return runs


def keeps(stage, place):
    return -16.0 if place <= stage else -6.0


def forgets(stage, place):
    return -16.0 if place == stage else -16.0 + 9 * (stage - place) if place < stage else 3.0


def make_matrix(domains, methods, **options):
    return build_matrix(make_runs(domains, methods, **options), QUICK, planned=domains)


def write_run(folder, matrix, *, plan=None, environment=None):
    """The files of a run directory that a report is made from."""
    values = plan or {"data": {"domains": [f"d{i}" for i in range(len(matrix.planned))]}}
    write_json(folder / "matrix.json", matrix.to_dict())
    write_text(folder / "plan.yaml", plan_yaml(build_plan(values)))
    write_json(
        folder / "environment.json", environment or {"packages": {"gaintune": "0.1.0"}, "python": "3.11", "threads": 2}
    )
    return folder
