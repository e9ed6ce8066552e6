"""The sequence: every cell is measured, a kill at any point changes nothing, and other plans are refused."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import gaintune
from gaintune.adapters import load_adapter
from gaintune.config import build_plan
from gaintune.data import load_domain
from gaintune.errors import BaseModelError, ConfigError, DivergedError, RunDirectoryError
from gaintune.evaluate import compare_adapters, measure
from gaintune.methods import StageData
from gaintune.methods.branches import BASES
from gaintune.methods.penalties import FISHER, fisher_information
from gaintune.models import NextTokenLoss, load_base
from gaintune.report import write_report
from gaintune.storage import damage, read_json
from gaintune.tuners.gainlora import gainlora_layers
from gaintune.workflows import adapt, run_sequence
from support import files, refused, tiny_base, tiny_domains
from support.killing import Nothing, killed, stopped

SHORT = {"train_tokens": 256}  # two updates, where more would show nothing else


def contents(run: Path) -> dict[str, bytes]:
    """What a run holds, but for times."""
    return files.contents(run, leave_out={"events.jsonl", ".lock"})


@pytest.fixture
def plan_of(tiny, tmp_path):
    """A function that makes a plan over prose and code."""
    return lambda **changes: tiny_domains.plan(tiny, tmp_path, **changes)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of `gain-ffn` that nothing stopped: its plan and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    plan = tiny_domains.plan(tiny, folder)
    run_sequence(plan, folder / "run")
    return plan, folder / "run"


@pytest.fixture
def copied(finished, tmp_path):
    """The same in a folder of its own, to be changed."""
    plan, run = finished
    return plan, Path(shutil.copytree(run, tmp_path / "run"))


def test_what_a_method_refuses_is_refused_before_another_trains(plan_of, tmp_path):
    plan = plan_of(methods=["gain", {"name": "gainlora", "penalty": "l2"}])
    refused(ConfigError, "a penalty has nothing to pull back", run_sequence, plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_method_that_this_base_refuses_leaves_the_others_alone(plan_of, tmp_path):
    refused_here = {"name": "lora", "targets": ["no_such_module"], "label": "nowhere"}
    with pytest.raises(DivergedError, match="method 'nowhere' cannot be attached to this base") as error:
        run_sequence(plan_of(methods=[refused_here, "gain"]), tmp_path / "run")
    assert (list(error.value.methods), error.value.finished) == (["nowhere"], 1)
    written = read_json(tmp_path / "run" / "matrix.json")["methods"]
    assert {method["label"]: len(method["stages"]) for method in written} == {"nowhere": 0, "gain": 2}
    refused(ConfigError, "cannot be attached", run_sequence, plan_of(methods=[refused_here]), tmp_path / "alone")
    both = [refused_here, {**refused_here, "label": "nowhere-else"}]
    refused(ConfigError, "cannot be attached", run_sequence, plan_of(methods=both), tmp_path / "both")


@pytest.mark.parametrize("method", ["gain-ffn", "full"])
def test_killed_in_training_and_in_measuring_it_ends_with_the_same_files(plan_of, tmp_path, method):
    plan = plan_of(methods=[method])
    matrix = run_sequence(plan, tmp_path / "whole")
    run = tmp_path / "killed"
    killed(run_sequence, (plan, run), f"{method}: learning code", 5)  # the stage's second checkpoint is not there yet
    assert (run / "stages" / method / "02-code" / "checkpoints" / "checkpoint-3").is_dir()
    (run / "run.json").unlink()  # as a version left it that wrote none
    killed(run_sequence, (plan, run), f"{method} after code: measuring code", 1)
    assert not (run / "stages" / method / "02-code" / "metrics.json").exists()
    assert run_sequence(plan, run) == matrix and contents(run) == contents(tmp_path / "whole")


def test_a_run_that_was_killed_continues_with_smaller_batches_and_comes_to_the_same(plan_of, tmp_path):
    plan = plan_of(methods=["gain-ffn"])
    whole = run_sequence(plan, tmp_path / "whole")
    run = tmp_path / "run"
    stopped(run_sequence, (plan, run), "gain-ffn: learning code", 5)  # after its first checkpoint
    first = (run / "stages" / "gain-ffn" / "01-prose" / "adapter" / "manifest.json").read_bytes()
    halves = {"batch_size": 1, "gradient_accumulation": 4, "gradient_checkpointing": True}
    again = run_sequence({**plan, "train": {**plan["train"], **halves}}, run)
    assert (run / "stages" / "gain-ffn" / "01-prose" / "adapter" / "manifest.json").read_bytes() == first
    weights = [load_file(f / "stages" / "gain-ffn" / "02-code" / "adapter" / "adapter_model.safetensors")
               for f in (run, tmp_path / "whole")]  # fmt: skip
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, rtol=1e-4, atol=1e-6)
    figures = [each.methods[0].summary for each in (again, whole)]
    assert figures[0].in_domain.value == pytest.approx(figures[1].in_domain.value, abs=1e-3)
    refused(RunDirectoryError, r"train\.batch_size: 1 there, 4 now", run_sequence,
            {**plan, "train": {**plan["train"], "gradient_accumulation": 3}}, run)  # fmt: skip


@pytest.mark.parametrize("method", [
    *({"name": name, "rank": 8 if name == "vera" else 2} for name in ("dora", "pissa", "adalora", "hira", "vera")),
    {"name": "osf"},
    {"name": "svft", "off_diagonals": 1},
    {"name": "gainlora", "rank": 2},
    {"name": "lora+", "rank": 2, "penalty": "ewc", "penalty_strength": 100, "ewc_rows": 7, "replay": 0.4},
    {"name": "full", "penalty": "ewc", "penalty_strength": 100},
    {"name": "gain-ffn", "penalty": "l2", "replay": 1},
], ids=lambda method: "-".join(str(method[key]) for key in ("name", "penalty") if key in method))  # fmt: skip
def test_every_method_and_penalty_survives_a_stop_in_a_later_stage(plan_of, tmp_path, method):
    """The stage before is loaded and its checkpoint continued; one that must look back is stopped there once more."""
    plan = plan_of(methods=[{**method, "label": "m"}], data={"train_tokens": 768})
    run_sequence(plan, tmp_path / "whole")
    run = tmp_path / "stopped"
    stopped(run_sequence, (plan, run), "m: learning code", 5)
    assert (run / "stages" / "m" / "02-code" / "checkpoints" / "checkpoint-3").is_dir()
    if method.get("penalty") == "ewc":
        stopped(run_sequence, (plan, run), "m: learning code: what matters to it", 2)
    run_sequence(plan, run)
    assert contents(run) == contents(tmp_path / "whole")


def stopped_run_of_three(plan_of, tmp_path, method):
    """Stop a run over three domains in the last one, and finish it; return its plan, its folder and its domains."""
    plan = plan_of(methods=[{**method, "label": "m"}])
    third = files.write_rows(tmp_path / "names.jsonl", [{"text": f"def f{n}(x): return {n} * x"} for n in range(300)])
    plan["data"] = {**plan["data"], "domains": [*plan["data"]["domains"], f"names={third}"]}
    run = tmp_path / "run"
    stopped(run_sequence, (plan, run), "m: learning names", 5)
    if method["name"] == "gainlora":
        stopped(run_sequence, (plan, run), "m: learning names: what matters to it", 2)
    matrix = run_sequence(plan, run)
    assert not matrix.partial and len(matrix.methods[0].stages) == 3
    run_sequence(plan, tmp_path / "whole")
    assert contents(run) == contents(tmp_path / "whole")
    assert method["name"] in write_report(run).read_text()
    return plan, run, [domain.partition("=")[0] for domain in plan["data"]["domains"]]


def test_svft_goes_through_three_domains_and_moves_only_its_singular_values(plan_of, tmp_path):
    _, run, names = stopped_run_of_three(plan_of, tmp_path, {"name": "svft"})
    for count, name in enumerate(names, start=1):
        saved = load_file(run / "stages" / "m" / f"{count:02d}-{name}" / "adapter" / "adapter_model.safetensors")
        assert all(key.endswith(".svft_m") and value.shape == (32,) and value.any() for key, value in saved.items())


def test_gainlora_grows_a_branch_for_each_of_three_domains_and_shuts_its_gates_on_earlier_ones(plan_of, tmp_path):
    plan, run, names = stopped_run_of_three(plan_of, tmp_path, {"name": "gainlora", "rank": 2, "lr": 0.01})
    adapters = [run / "stages" / "m" / f"{count:02d}-{name}" / "adapter" for count, name in enumerate(names, start=1)]
    saved = [load_file(adapter / "adapter_model.safetensors") for adapter in adapters]
    for count, (before, after) in enumerate(pairwise(saved), start=2):
        assert read_json(adapters[count - 1] / "adapter_config.json")["branches"] == count
        for name in (name for name in after if "_old_gate" in name):
            newest = before[name.replace("_old_gate", "_gate")]
            assert torch.equal(after[name], torch.cat([before[name], newest[None]])), (
                "a branch is frozen once it is old"
            )
    earlier = load_file(adapters[1] / BASES)  # the directions of the first two domains' inputs
    for name, basis in earlier.items():
        gate = saved[2][f"base_model.model.{name}.gainlora_gate"]
        assert (basis.T @ gate).norm() < 1e-5 * gate.norm() and 0 < basis.shape[1] < len(basis)
    loose = opening(plan, adapters[2], "prose"), opening(plan, adapters[0], "prose")
    assert loose[0][:1] == pytest.approx(loose[1], rel=0.05), "an old gate reads what it read"
    assert loose[0][2] < 0.2 < loose[0][0], "a new gate is nearly shut on earlier text"


def opening(plan, adapter, domain):
    """The mean over tokens and modules of each branch's gate on the validation text of a domain."""
    checked, found = build_plan(plan), []
    base = load_base(checked.model)
    model = load_adapter(base, adapter)
    for _, layer in gainlora_layers(model, "default"):
        layer.gate_observers.append(lambda name, gates: found.append(gates.flatten(0, -2).mean(0)))
    (config,) = (each for each in checked.data.domains if each.name == domain)
    blocks = load_domain(config, checked.data, base.tokenizer)
    measure(model, blocks.validation, blocks.validation_bytes)
    return torch.stack(found).mean(0).tolist()


def test_a_newest_checkpoint_with_a_damaged_manifest_costs_its_updates_and_nothing_else(finished, tmp_path, caplog):
    (plan, whole), run = finished, tmp_path / "stopped"
    stopped(run_sequence, (plan, run), "gain-ffn: learning code", 7)
    checkpoints = run / "stages" / "gain-ffn" / "02-code" / "checkpoints"
    manifest = checkpoints / "checkpoint-6" / "manifest.json"
    assert (checkpoints / "checkpoint-3").is_dir()
    manifest.write_bytes(manifest.read_bytes().replace(b"s", b"\xf3", 1))
    run_sequence(plan, run)
    assert [record.getMessage().count("training continues from checkpoint-3") for record in caplog.records] == [1]
    assert contents(run) == contents(whole)


def test_cells_are_what_the_saved_adapters_measure(plan_of, tmp_path):
    plan = plan_of(methods=["gain-ffn", {"name": "lora", "rank": 2, "lr": 0.02}])
    run = tmp_path / "run"
    matrix, checked = run_sequence(plan, run), build_plan(plan)
    assert [method.label for method in matrix.methods] == ["gain-ffn", "lora"] and not matrix.partial
    for method in matrix.methods:
        for index, row in enumerate(method.stages):
            adapter = run / "stages" / method.label / f"{index + 1:02d}-{row.domain}" / "adapter"
            assert damage(adapter) is None
            base = load_base(checked.model)
            adapted = load_adapter(base, adapter)
            for domain in checked.data.domains:
                blocks = load_domain(domain, checked.data, base.tokenizer)
                loss = measure(adapted, blocks.validation, blocks.validation_bytes)
                cell = row.cells[domain.name]
                assert cell.perplexity == pytest.approx(loss.perplexity, rel=1e-9)
                assert cell.change == pytest.approx(100 * (loss.perplexity / method.base[domain.name].perplexity - 1))
    assert matrix.methods[0].summary.in_domain.value < -1  # it does learn


def test_the_second_stage_carries_the_first_one_s_adapter_on(plan_of, finished, tmp_path):
    run_sequence(plan_of(train={"lr": 1e-12}), tmp_path / "still")
    still = read_json(tmp_path / "still" / "stages" / "gain-ffn" / "02-code" / "evaluations" / "prose.json")
    assert still["nll"] == pytest.approx(read_json(tmp_path / "still" / "base" / "float32" / "prose.json")["nll"])
    plan, run = finished
    carried = run / "stages" / "gain-ffn" / "02-code" / "adapter"
    assert read_json(carried / "gaintune.json")["domains"] == ["prose", "code"]
    run_sequence(tiny_domains.of(plan, "code"), tmp_path / "alone")
    fresh = tmp_path / "alone" / "stages" / "gain-ffn" / "01-code" / "adapter"
    name = "adapter_model.safetensors"
    assert (carried / name).read_bytes() != (fresh / name).read_bytes()


def test_a_cell_that_was_deleted_is_measured_again_on_its_own_stage(copied):
    plan, run = copied
    before = contents(run)
    (run / "stages/gain-ffn/01-prose/evaluations/code.json").unlink()
    (run / "stages/gain-ffn/02-code/evaluations/prose.json").unlink()
    (run / "base/float32/code.json").unlink()
    run_sequence(plan, run)
    assert contents(run) == before


def test_a_stage_missing_below_others_is_refused_rather_than_trained_in_the_wrong_place(copied):
    plan, run = copied
    before = contents(run)
    shutil.rmtree(run / "stages/gain-ffn/01-prose")
    refused(RunDirectoryError, r"delete .*02-code", run_sequence, plan, run)
    shutil.rmtree(run / "stages/gain-ffn/02-code")
    run_sequence(plan, run)
    assert contents(run) == before


def test_a_method_added_to_a_plan_does_not_move_the_others(plan_of, tmp_path):
    one = run_sequence(plan_of(methods=["lora"], data=SHORT), tmp_path / "one")
    two = run_sequence(plan_of(methods=["full", "gain", "lora"], data=SHORT), tmp_path / "two")
    assert two.methods[2] == one.methods[0]


def test_a_run_of_another_plan_or_of_changed_texts_is_refused(plan_of, tmp_path):
    plan = plan_of(data=SHORT)
    run_sequence(plan, tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"train\.lr"):
        run_sequence({**plan, "train": {**plan["train"], "lr": 0.5}}, tmp_path / "run")
    tiny_domains.edit(tmp_path / "prose.jsonl")
    refused(RunDirectoryError, r"prose\.content_hash", run_sequence, plan, tmp_path / "run")


def test_a_method_that_diverges_stops_neither_the_others_nor_the_numbers(plan_of, tmp_path):
    plan = plan_of(methods=[{"name": "lora", "lr": 1e36, "alpha": 1e4}, "gain-ffn"])
    with pytest.raises(DivergedError, match=r"lora: the (loss|gradient) is (nan|inf)") as caught:
        run_sequence(plan, tmp_path / "run")
    assert list(caught.value.methods) == ["lora"]
    assert (tmp_path / "run" / "stages" / "gain-ffn" / "02-code" / "metrics.json").exists()
    matrix = read_json(tmp_path / "run" / "matrix.json")
    assert matrix["partial"]
    assert {method["label"]: len(method["stages"]) for method in matrix["methods"]} == {"gain-ffn": 2, "lora": 0}


@pytest.mark.parametrize("corrected", [{"name": "lora", "lr": 0.01}, "gain", None])
def test_a_run_goes_on_with_another_method_in_place_of_one_that_trained_nothing(plan_of, tmp_path, corrected):
    broken = {"name": "lora", "lr": 1e36, "alpha": 1e4}
    with pytest.raises(DivergedError):
        run_sequence(plan_of(methods=["gain-ffn", broken], train={"checkpoint_steps": 1}), tmp_path / "run")
    plan = plan_of(methods=["gain-ffn", *filter(None, [corrected])], train={"checkpoint_steps": 1})
    assert not (tmp_path / "run" / "stages" / "lora" / "01-prose" / "checkpoints").exists()
    mine = {"stages/old/01-prose/adapter/manifest.json": b"{}", "stages/notes.txt": b"mine"}
    for name, content in mine.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(content)
    (tmp_path / "run" / "stages" / "linked").symlink_to(tmp_path / "run" / "stages" / "gain-ffn")
    matrix = run_sequence(plan, tmp_path / "run")
    (tmp_path / "run" / "stages" / "linked").unlink()
    undisturbed = run_sequence(plan, tmp_path / "once")
    assert matrix == undisturbed
    told = "events.jsonl"
    assert {**contents(tmp_path / "run"), told: b""} == {**contents(tmp_path / "once"), **mine, told: b""}
    other = plan_of(methods=[{"name": "gain-ffn", "lr": 0.5}], train={"checkpoint_steps": 1})
    refused(RunDirectoryError, r"methods", run_sequence, other, tmp_path / "run")
    refused(RunDirectoryError, r"methods", run_sequence, plan_of(methods=["lora"]), tmp_path / "run")


@pytest.mark.parametrize(("lr", "why"), [(3e37, "the loss is not finite"), (1e300, "is too large for the weights")])
def test_a_method_that_diverges_in_its_only_update_stops_no_other_the_second_time_either(plan_of, tmp_path, lr, why):
    plan = plan_of(methods=[{"name": "full", "lr": lr}, "gain-ffn"], data={"train_tokens": 128})
    found = []
    for _ in range(2):
        with pytest.raises(DivergedError, match=why) as caught:
            run_sequence(plan, tmp_path / "run")
        assert (list(caught.value.methods), caught.value.finished) == (["full"], 1)
        found.append((tmp_path / "run" / "matrix.json").read_bytes())
    assert found[0] == found[1]


def test_a_base_whose_own_loss_is_not_finite_is_reported_as_the_base_s(tmp_path):
    folder = tiny_base.folder(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("inf"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    plan = tiny_domains.plan(folder, tmp_path)
    one = tiny_domains.of(plan, "prose")
    for measure_base in (
        lambda: run_sequence(plan, tmp_path / "run"),
        lambda: adapt(one, tmp_path / "adapter"),
        lambda: compare_adapters(build_plan(one), []),
    ):
        refused(BaseModelError, r"the base's own loss on prose is not finite in \w+: its weights are", measure_base)


@pytest.mark.parametrize(("method", "message"), [
    ("gian", "unknown method 'gian'; did you mean 'gain'"),
    ({"name": "gain", "rank": 4}, "method 'gain' has no option 'rank'"),
    ({"name": "lora", "lr": float("inf")}, r"methods\.0\.lr: Input should be a finite number \(got inf\)"),
    ({"name": "lora", "penalty": "l2", "penalty_strength": float("inf")},
     r"methods\.0\.penalty_strength: Input should be a finite number \(got inf\)"),
])  # fmt: skip
def test_a_method_that_cannot_be_is_refused_before_anything_is_written(plan_of, tmp_path, method, message):
    with pytest.raises(ConfigError, match=message):
        run_sequence(plan_of(methods=[method, "gain-ffn"]), tmp_path / "run", progress=Nothing())
    assert not (tmp_path / "run").exists()


def test_a_watched_domain_is_measured_at_every_stage_and_never_trained_on_and_adapt_refuses_it(plan_of, tmp_path):
    plan = plan_of(data=SHORT)
    prose, code = plan["data"]["domains"]
    alone = run_sequence(tiny_domains.of(plan, "prose"), tmp_path / "1")
    watching = plan_of(data={**SHORT, "domains": [prose], "watched": [code]})
    (method,) = run_sequence(watching, tmp_path / "2").methods
    both = run_sequence(plan, tmp_path / "3").methods[0]
    assert [row.domain for row in method.stages] == ["prose"] and method.stages[0].cells == both.stages[0].cells
    assert method.stages[0].cells["prose"] == alone.methods[0].stages[0].cells["prose"]
    assert method.summary.forward_interference.value == method.stages[0].cells["code"].change
    refused(ConfigError, r"data\.watched.*code", adapt, watching, tmp_path / "adapter")


def test_two_processes_share_a_run(tiny, tmp_path):
    """As `accelerate launch` or `torchrun` start them: one writes, both train."""
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
        assert read_json(folder / "metrics.json")["steps"] == 8  # 32 blocks, 2 processes with 2 blocks each
    matrix = read_json(run / "matrix.json")
    assert not matrix["partial"] and matrix["methods"][0]["summary"]["in_domain"]["value"] < 0
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events.count("finished") == 1 and done.stdout.count("numbers ") == 1
    checked = build_plan(values)
    base = load_base(checked.model)
    prose = load_domain(checked.data.domains[0], checked.data, base.tokenizer).train
    first = run / "stages" / "gain-ffn" / "01-prose" / "adapter"
    adapted = load_adapter(base, first, trainable=True)
    alone = fisher_information(adapted, StageData(prose, NextTokenLoss(adapted), "alone"))
    for name, together in load_file(first / FISHER).items():
        torch.testing.assert_close(together, alone[name], rtol=1e-3, atol=1e-7, msg=name)
