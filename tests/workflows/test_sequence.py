"""The sequence: every cell is measured, a kill at any point changes nothing, and other plans are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gaintune.adapters import load_adapter
from gaintune.config import build_plan
from gaintune.data import load_domain
from gaintune.errors import BaseModelError, ConfigError, DivergedError, RunDirectoryError
from gaintune.evaluate import compare_adapters, measure
from gaintune.models import load_base
from gaintune.storage import damage, read_json
from gaintune.workflows import adapt, run_sequence
from support import tiny_base, tiny_domains
from support.killing import Nothing, StopAt, Stopped, killed

NOT_COMPARED = {"events.jsonl", ".lock"}  # times


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_base.folder(tmp_path_factory.mktemp("base"))


def contents(run: Path) -> dict[str, bytes]:
    files = (file for file in run.rglob("*") if file.is_file() and file.name not in NOT_COMPARED)
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in files}


@pytest.mark.parametrize("method", ["gain-ffn", "full"])
def test_killed_in_training_and_in_measuring_it_ends_with_the_same_files(model, tmp_path, method):
    plan = tiny_domains.plan(model, tmp_path, methods=[method])
    matrix = run_sequence(plan, tmp_path / "whole")
    run = tmp_path / "killed"
    killed(run_sequence, (plan, run), f"{method}: learning code", 5)  # the stage's second checkpoint is not there yet
    assert (run / "stages" / method / "02-code" / "checkpoints" / "checkpoint-3").is_dir()
    (run / "run.json").unlink()  # as a version left it that wrote none
    killed(run_sequence, (plan, run), f"{method} after code: measuring code", 1)
    assert not (run / "stages" / method / "02-code" / "metrics.json").exists()
    again = run_sequence(plan, run)
    assert again == matrix
    assert contents(run) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "method",
    [
        {"name": "dora", "rank": 2},
        {"name": "pissa", "rank": 2},
        {"name": "adalora", "rank": 2},
        {"name": "hira", "rank": 2},
        {"name": "vera", "rank": 8},
        {"name": "osf"},
        {"name": "lora+", "rank": 2, "penalty": "ewc", "penalty_strength": 100, "ewc_rows": 7, "replay": 0.4},
        {"name": "full", "penalty": "ewc", "penalty_strength": 100},
        {"name": "gain-ffn", "penalty": "l2", "replay": 1},
    ],
    ids=lambda method: "-".join(str(method[key]) for key in ("name", "penalty") if key in method),
)
def test_every_method_and_penalty_survives_a_stop_in_a_later_stage(model, tmp_path, method):
    """The stage before is loaded and its checkpoint continued; one that must look back is stopped there once more."""
    plan = tiny_domains.plan(model, tmp_path, methods=[{**method, "label": "m"}], data={"train_tokens": 768})
    run_sequence(plan, tmp_path / "whole")
    run = tmp_path / "stopped"
    with pytest.raises(Stopped):
        run_sequence(plan, run, progress=StopAt("m: learning code", 5))
    assert (run / "stages" / "m" / "02-code" / "checkpoints" / "checkpoint-3").is_dir()
    if method.get("penalty") == "ewc":
        with pytest.raises(Stopped):
            run_sequence(plan, run, progress=StopAt("m: learning code: what matters to it", 2))
    run_sequence(plan, run)
    assert contents(run) == contents(tmp_path / "whole")


def test_a_newest_checkpoint_with_a_damaged_manifest_costs_its_updates_and_nothing_else(model, tmp_path, caplog):
    plan = tiny_domains.plan(model, tmp_path)
    run_sequence(plan, tmp_path / "whole")
    run = tmp_path / "stopped"
    with pytest.raises(Stopped):
        run_sequence(plan, run, progress=StopAt("gain-ffn: learning code", 7))
    checkpoints = run / "stages" / "gain-ffn" / "02-code" / "checkpoints"
    manifest = checkpoints / "checkpoint-6" / "manifest.json"
    assert (checkpoints / "checkpoint-3").is_dir()
    manifest.write_bytes(manifest.read_bytes().replace(b"s", b"\xf3", 1))
    run_sequence(plan, run)
    assert [record.getMessage().count("training continues from checkpoint-3") for record in caplog.records] == [1]
    assert contents(run) == contents(tmp_path / "whole")


def test_cells_are_what_the_saved_adapters_measure(model, tmp_path):
    plan = tiny_domains.plan(model, tmp_path, methods=["gain-ffn", {"name": "lora", "rank": 2, "lr": 0.02}])
    run = tmp_path / "run"
    matrix = run_sequence(plan, run)
    settled = build_plan(plan)
    assert [method.label for method in matrix.methods] == ["gain-ffn", "lora"]
    assert not matrix.partial
    for method in matrix.methods:
        for index, row in enumerate(method.stages):
            adapter = run / "stages" / method.label / f"{index + 1:02d}-{row.domain}" / "adapter"
            assert damage(adapter) is None
            base = load_base(settled.model)
            adapted = load_adapter(base, adapter)
            for domain in settled.data.domains:
                blocks = load_domain(domain, settled.data, base.tokenizer)
                loss = measure(adapted, blocks.validation, blocks.validation_bytes)
                cell = row.cells[domain.name]
                assert cell.perplexity == pytest.approx(loss.perplexity, rel=1e-9)
                assert cell.change == pytest.approx(100 * (loss.perplexity / method.base[domain.name].perplexity - 1))
    assert matrix.methods[0].summary.in_domain.value < -1  # it does learn


def test_the_second_stage_carries_the_first_one_s_adapter_on(model, tmp_path):
    plan = tiny_domains.plan(model, tmp_path, train={"lr": 1e-12})
    run_sequence(plan, tmp_path / "still")
    still = read_json(tmp_path / "still" / "stages" / "gain-ffn" / "02-code" / "evaluations" / "prose.json")
    base = read_json(tmp_path / "still" / "base" / "float32" / "prose.json")
    assert still["nll"] == pytest.approx(base["nll"])
    plan = tiny_domains.plan(model, tmp_path)
    run_sequence(plan, tmp_path / "run")
    record = read_json(tmp_path / "run" / "stages" / "gain-ffn" / "02-code" / "adapter" / "gaintune.json")
    assert record["domains"] == ["prose", "code"]
    alone = tiny_domains.plan(model, tmp_path)
    alone["data"]["domains"] = alone["data"]["domains"][1:]
    run_sequence(alone, tmp_path / "alone")
    carried = (tmp_path / "run/stages/gain-ffn/02-code/adapter/adapter_model.safetensors").read_bytes()
    fresh = (tmp_path / "alone/stages/gain-ffn/01-code/adapter/adapter_model.safetensors").read_bytes()
    assert carried != fresh


def test_a_cell_that_was_deleted_is_measured_again_on_its_own_stage(model, tmp_path):
    run = tmp_path / "run"
    plan = tiny_domains.plan(model, tmp_path, methods=["gain-ffn"])
    run_sequence(plan, run)
    before = contents(run)
    (run / "stages/gain-ffn/01-prose/evaluations/code.json").unlink()
    (run / "stages/gain-ffn/02-code/evaluations/prose.json").unlink()
    (run / "base/float32/code.json").unlink()
    run_sequence(plan, run)
    assert contents(run) == before


def test_a_stage_missing_below_others_is_refused_rather_than_learnt_in_the_wrong_place(model, tmp_path):
    run = tmp_path / "run"
    plan = tiny_domains.plan(model, tmp_path, methods=["gain-ffn"])
    run_sequence(plan, run)
    before = contents(run)
    shutil.rmtree(run / "stages/gain-ffn/01-prose")
    with pytest.raises(RunDirectoryError, match=r"delete .*02-code"):
        run_sequence(plan, run)
    shutil.rmtree(run / "stages/gain-ffn/02-code")
    run_sequence(plan, run)
    assert contents(run) == before


def test_a_method_added_to_a_plan_does_not_move_the_others(model, tmp_path):
    one = run_sequence(tiny_domains.plan(model, tmp_path, methods=["lora"]), tmp_path / "one")
    two = run_sequence(tiny_domains.plan(model, tmp_path, methods=["full", "gain", "lora"]), tmp_path / "two")
    assert two.methods[2] == one.methods[0]


def test_a_run_of_another_plan_or_of_changed_texts_is_refused(model, tmp_path):
    plan = tiny_domains.plan(model, tmp_path)
    run_sequence(plan, tmp_path / "run")
    other = tiny_domains.plan(model, tmp_path, train={"lr": 0.5})
    with pytest.raises(RunDirectoryError, match=r"train\.lr"):
        run_sequence(other, tmp_path / "run")
    prose = tmp_path / "prose.jsonl"
    prose.write_text("".join(json.dumps({"text": line[10:90]}) + "\n" for line in prose.read_text().splitlines()))
    with pytest.raises(RunDirectoryError, match=r"prose\.content_hash"):
        run_sequence(plan, tmp_path / "run")


def test_a_method_that_diverges_stops_neither_the_others_nor_the_numbers(model, tmp_path):
    plan = tiny_domains.plan(model, tmp_path, methods=[{"name": "lora", "lr": 1e36, "alpha": 1e4}, "gain-ffn"])
    with pytest.raises(DivergedError, match=r"lora: the (loss|gradient) is (nan|inf)") as caught:
        run_sequence(plan, tmp_path / "run")
    assert list(caught.value.methods) == ["lora"]
    assert (tmp_path / "run" / "stages" / "gain-ffn" / "02-code" / "metrics.json").exists()
    matrix = read_json(tmp_path / "run" / "matrix.json")
    assert matrix["partial"] and {method["label"]: len(method["stages"]) for method in matrix["methods"]} == {
        "gain-ffn": 2,
        "lora": 0,
    }


@pytest.mark.parametrize("key", ["lr", "penalty_strength"])
def test_an_infinite_number_of_one_method_is_refused_before_anything_is_made(model, tmp_path, key):
    method = {"name": "lora", "label": "bad", "penalty": "l2", "penalty_strength": 1.0, key: float("inf")}
    plan = tiny_domains.plan(model, tmp_path, methods=[method, "gain-ffn"])
    with pytest.raises(ConfigError, match=rf"methods\.0\.{key}: Input should be a finite number \(got inf\)"):
        run_sequence(plan, tmp_path / "run", progress=Nothing())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("lr", "why"), [(3e37, "the loss is not finite"), (1e300, "is too large for the weights")])
def test_a_method_that_diverges_in_its_only_update_stops_no_other_the_second_time_either(model, tmp_path, lr, why):
    plan = tiny_domains.plan(
        model, tmp_path, methods=[{"name": "full", "lr": lr}, "gain-ffn"], data={"train_tokens": 128}
    )
    found = []
    for _ in range(2):
        with pytest.raises(DivergedError, match=why) as caught:
            run_sequence(plan, tmp_path / "run")
        assert (list(caught.value.methods), caught.value.finished) == (["full"], 1)
        found.append((tmp_path / "run" / "matrix.json").read_bytes())
    assert found[0] == found[1]


def test_a_base_whose_own_loss_is_not_finite_is_said_to_be_the_base(tmp_path):
    folder = tiny_base.folder(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("inf"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    told = r"the base's own loss on prose is not finite in \w+: its weights are"
    with pytest.raises(BaseModelError, match=told):
        run_sequence(tiny_domains.plan(folder, tmp_path), tmp_path / "run")
    plan = tiny_domains.plan(folder, tmp_path)
    one = {**plan, "data": {**plan["data"], "domains": plan["data"]["domains"][:1]}}
    with pytest.raises(BaseModelError, match=told):
        adapt(one, tmp_path / "adapter")
    with pytest.raises(BaseModelError, match=told):
        compare_adapters(build_plan(one), [])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("gian", "unknown method 'gian'; did you mean 'gain'"),
        ({"name": "gain", "rank": 4}, "method 'gain' has no option 'rank'"),
    ],
)
def test_a_method_that_cannot_be_is_refused_before_anything_is_written(model, tmp_path, method, message):
    with pytest.raises(ConfigError, match=message):
        run_sequence(tiny_domains.plan(model, tmp_path, methods=[method]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_watched_domain_is_measured_at_every_stage_and_never_learnt(model, tmp_path):
    learnt = tiny_domains.plan(model, tmp_path)
    _, code = learnt["data"]["domains"]
    alone = run_sequence(
        tiny_domains.plan(model, tmp_path, data={"domains": learnt["data"]["domains"][:1]}), tmp_path / "1"
    )
    plan = tiny_domains.plan(model, tmp_path, data={"domains": learnt["data"]["domains"][:1], "watched": [code]})
    (method,) = run_sequence(plan, tmp_path / "2").methods
    both = run_sequence(learnt, tmp_path / "3").methods[0]
    assert [row.domain for row in method.stages] == ["prose"]
    assert method.stages[0].cells == both.stages[0].cells
    assert method.stages[0].cells["prose"] == alone.methods[0].stages[0].cells["prose"]
    assert method.summary.forward_interference.value == method.stages[0].cells["code"].change


def test_adapt_refuses_a_plan_that_watches_domains(model, tmp_path):
    prose, code = tiny_domains.plan(model, tmp_path)["data"]["domains"]
    plan = tiny_domains.plan(model, tmp_path, data={"domains": [prose], "watched": [code]})
    with pytest.raises(ConfigError, match=r"data\.watched.*code"):
        adapt(plan, tmp_path / "adapter")
