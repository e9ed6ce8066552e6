"""A stream: one training run over all domains, which blend into one another, measured where each share ends."""

import itertools
import math
import shutil
from fractions import Fraction

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gaintune.adapters import load_adapter
from gaintune.config import MethodConfig, TrainConfig, build_plan, plan_yaml
from gaintune.data import Examples, blend_domains, load_domain
from gaintune.errors import ConfigError, RunDirectoryError
from gaintune.evaluate import measure
from gaintune.methods import StagePosition, attach, prepare_method
from gaintune.models import load_base
from gaintune.report import write_report
from gaintune.storage import read_json
from gaintune.training import train_stage
from gaintune.workflows import adapt, run_sequence
from support import files, refused, tiny_domains
from support.killing import Nothing, killed, stopped

WEIGHTS = "adapter_model.safetensors"
NAMES = ("prose", "code", "more")


def plan_of(tiny, folder, stream=True, **changes):
    """A plan over three domains of 16 rows each."""
    plan = tiny_domains.plan(tiny, folder, **changes)
    plan["data"]["domains"].append(f"more={folder / 'prose.jsonl'}")
    plan["data"] |= {"train_tokens": 512, **({"stream": True} if stream else {})}
    return plan


def rows_of(*counts):
    """Domains of so many rows of one token each, every token another number."""
    tokens = torch.arange(sum(counts)).view(-1, 1).split(counts)
    return [Examples.of_blocks(part) for part in tokens]


def diffused(lengths, blend, offsets):
    """The domains of a stream's rows by the definition: a share of a row is saved up until it is a whole one."""
    numbers = [number for number, length in enumerate(lengths) for _ in range(length)]
    for number, offset in enumerate(offsets):
        half, border = math.floor(blend * min(lengths[number : number + 2]) / 2), sum(lengths[: number + 1])
        saved = Fraction(offset, 4 * half)
        for i in range(2 * half):
            saved += Fraction(2 * i + 1, 4 * half)  # the share in the middle of row i
            taken = saved >= 1
            saved -= taken
            numbers[border - half + i] = number + taken
    return numbers


@pytest.mark.parametrize("blend", [0.5, 1, Fraction(1, 5)])
@pytest.mark.parametrize("passes", [1, 3])
def test_rows_are_in_the_order_of_the_definition_and_each_is_there_once_a_pass(passes, blend):
    counts = (20, 31, 24)
    lengths, domains = [passes * count for count in counts], rows_of(*counts)
    stream = blend_domains(domains, passes=passes, blend=float(blend), seed=3)
    halves = [math.floor(blend * min(pair) / 2) for pair in itertools.pairwise(lengths)]
    possible = [diffused(lengths, blend, (one, 0)) for one in range(4 * halves[0])]
    found, cut = stream.domains.tolist(), sum(lengths[:2]) - halves[1]
    assert found[:cut] in [numbers[:cut] for numbers in possible]
    possible = [diffused(lengths, blend, (0, two)) for two in range(4 * halves[1])]
    assert found[cut:] in [numbers[cut:] for numbers in possible]
    assert stream.ends == (lengths[0] + halves[0], sum(lengths[:2]) + halves[1], sum(lengths))
    seen = [stream[row]["input_ids"].item() for row in range(len(stream))]
    for number, domain in enumerate(domains):
        own = [token for token, of in zip(seen, found, strict=True) if of == number]
        for start in range(0, len(own), len(domain)):
            assert sorted(own[start : start + len(domain)]) == domain.input_ids.flatten().tolist()
    assert stream.tokens == sum(lengths)


def test_the_share_of_the_next_domain_rises_evenly_and_the_seed_decides_the_rest():
    domains = rows_of(400, 400)
    streams = [blend_domains(domains, passes=1, blend=0.5, seed=seed) for seed in (0, 0, 1)]
    window = streams[0].domains[300:500].double()
    shares = window.view(10, 20).mean(dim=1)
    assert torch.allclose(shares, (torch.arange(10) + 0.5).double() / 10, atol=0.05)  # a row of 20 is 0.05
    assert torch.equal(streams[0].order, streams[1].order) and not torch.equal(streams[0].order, streams[2].order)
    apart = blend_domains(domains, passes=1, blend=0.0, seed=0)
    assert apart.domains.tolist() == [0] * 400 + [1] * 400 and apart.ends == (400, 800)


@pytest.mark.parametrize(("rows", "passes"), [(12, 2), (11, 1)])  # whole batches in every pass, or a part at the end
def test_a_stream_of_one_domain_trains_as_its_epochs_do_bit_by_bit(tiny, tmp_path, rows, passes):
    plan = build_plan(plan_of(tiny, tmp_path))
    train = TrainConfig(epochs=passes, seed=3)
    method = prepare_method(MethodConfig(name="gain-ffn", label="m"), plan.model, train)
    outcomes = []
    for streamed in (False, True):
        base = load_base(plan.model)
        blocks = load_domain(plan.data.domains[0], plan.data, base.tokenizer).train
        own = Examples(**blocks[:rows])
        model = attach(base.model, method.config, seed=3)
        given = blend_domains([own], passes=passes, blend=0.5, seed=3) if streamed else own
        once = train.model_copy(update={"epochs": 1}) if streamed else train
        done = train_stage(
            model, method, given, once, StagePosition(), checkpoints=tmp_path / f"{streamed}", in_order=streamed
        )
        trained = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
        outcomes.append((done.losses, done.steps, done.tokens, trained))
    assert outcomes[0][:3] == outcomes[1][:3] and outcomes[0][1] == passes * 3
    assert all(torch.equal(value, outcomes[1][3][name]) for name, value in outcomes[0][3].items())


def test_a_run_over_a_stream_of_one_domain_is_that_of_a_sequence(tiny, tmp_path):
    for stream in (False, True):
        plan = tiny_domains.of(plan_of(tiny, tmp_path, stream), "code", train={"epochs": 2})
        run_sequence(plan, tmp_path / f"{stream}")
    leave = {"events.jsonl", ".lock", "plan.yaml"}
    contents = [files.contents(tmp_path / name, leave_out=leave) for name in ("True", "False")]
    assert contents[0] == contents[1] and len(contents[0]) > 5
    stored = yaml.safe_load((tmp_path / "False" / "plan.yaml").read_text())
    assert not {"stream", "stream_blend"} & set(stored["data"])


@pytest.mark.parametrize("name", ["gain-ia3", "lora", "adalora", "full"])
def test_three_domains_end_in_a_matrix_of_saved_adapters_and_a_report(tiny, tmp_path, name):
    still = {"schedule": "constant", "warmup_ratio": 0.0, "epochs": 2}  # so that a shorter training begins alike
    plan, run = plan_of(tiny, tmp_path, methods=[{"name": name, "label": "m"}], train=still), tmp_path / "run"
    matrix, checked = run_sequence(plan, run), build_plan(plan)
    apart = run_sequence(plan_of(tiny, tmp_path, False, methods=[{"name": name, "label": "m"}]), tmp_path / "apart")
    (method,) = matrix.methods
    assert [row.domain for row in method.stages] == list(NAMES) and not matrix.partial
    assert set(matrix.to_dict()) == set(apart.to_dict()) and method.summary.in_domain.value < 0
    base = load_base(checked.model, dtype=torch.float32)
    blocks = [load_domain(domain, checked.data, base.tokenizer) for domain in checked.data.domains]
    stream = blend_domains([each.train for each in blocks], passes=2, blend=0.5, seed=0)
    stages = [run / "stages" / "m" / f"{index + 1:02d}-{domain}" for index, domain in enumerate(NAMES)]
    metrics = [read_json(stage / "metrics.json") for stage in stages]
    assert [each["steps"] for each in metrics] == [
        10,
        8,
        6,
    ]  # 32 rows a domain, and a half window of 8 rows: 40, 72, 96
    assert sum(each["tokens"] for each in metrics) == stream.tokens == 96 * 32
    assert all(len(each["losses"]) == each["steps"] for each in metrics)
    records = [read_json(stage / "adapter" / "gaintune.json") for stage in stages]
    assert [record["domains"] for record in records] == [["prose", "code"], list(NAMES), list(NAMES)]
    assert [record["settings"]["stream"]["step"] for record in records] == [10, 18, 24]
    adapted = load_adapter(base, stages[1] / "adapter")
    perplexity = measure(adapted, blocks[0].validation, blocks[0].validation_bytes).perplexity
    assert method.stages[1].cells["prose"].perplexity == pytest.approx(perplexity, rel=1e-9)
    if name == "adalora":
        assert read_json(stages[0] / "adapter" / "adapter_config.json")["total_step"] == 24
        assert (stages[0] / "adapter" / "adalora.safetensors").is_file()
        return  # its schedule is that of all updates
    again = load_base(checked.model, dtype=torch.float32)
    prepared = prepare_method(checked.methods[0], checked.model, checked.train)
    model = attach(again.model, prepared.config, seed=0)
    parts = [stream[row] for row in range(40)]
    first = Examples(*(torch.stack([part[key] for part in parts]) for key in ("input_ids", "labels")))
    once = checked.train.model_copy(update={"epochs": 1})
    train_stage(model, prepared, first, once, StagePosition(), checkpoints=tmp_path / "first", in_order=True)
    saved = load_file(stages[0] / "adapter" / ("model.safetensors" if name == "full" else WEIGHTS))
    values = {key.replace(".default", ""): value for key, value in model.named_parameters() if value.requires_grad}
    assert values and all(torch.equal(value, saved[key]) for key, value in values.items() if key in saved)
    assert len(values.keys() & saved.keys()) >= len(values) - 1  # `full` saves tied weights once
    page = write_report(run).read_text()
    assert "in one stream that blends over 0.5 of a domain" in page


@pytest.mark.parametrize("method", ["gain-ffn", "adalora"])
def test_a_stop_at_any_point_ends_with_the_same_files(tiny, tmp_path, method):
    plan, run = plan_of(tiny, tmp_path, methods=[{"name": method, "label": "m"}]), tmp_path / "run"
    plan["train"]["snapshot_steps"] = 5
    run_sequence(plan, tmp_path / "whole")
    stopped(run_sequence, (plan, run), "m: learning the stream", 6)  # after the first adapter and a checkpoint
    assert (run / "stages/m/01-prose/adapter").is_dir() and not (run / "stages/m/02-code/adapter").exists()
    assert (run / "stages/m/03-more/checkpoints/checkpoint-3").is_dir()
    (killed if method == "gain-ffn" else stopped)(run_sequence, (plan, run), "m: learning the stream", 6)
    stopped(run_sequence, (plan, run), "m after code: measuring prose", 1)
    assert run_sequence(plan, run).to_dict()["methods"][0]["label"] == "m"
    leave = {"events.jsonl", ".lock"}
    assert files.contents(run, leave_out=leave) == files.contents(tmp_path / "whole", leave_out=leave)


def test_a_lost_adapter_is_refused_where_the_stream_cannot_be_trained_again_from_it(tiny, tmp_path):
    plan, run = plan_of(tiny, tmp_path), tmp_path / "run"
    stopped(run_sequence, (plan, run), "gain-ffn: learning the stream", 10)
    first, last = run / "stages/gain-ffn/01-prose", run / "stages/gain-ffn/03-more"
    shutil.rmtree(first / "adapter")
    refused(RunDirectoryError, "one run: delete .*checkpoints, and", run_sequence, plan, run)
    shutil.rmtree(last / "checkpoints")
    run_sequence(plan, run)
    before = files.contents(run, leave_out={"events.jsonl", ".lock"})
    shutil.rmtree(first / "adapter")
    refused(RunDirectoryError, "01-prose.*02-code.*03-more, and it is trained again", run_sequence, plan, run)
    shutil.rmtree(run / "stages")
    run_sequence(plan, run)
    assert files.contents(run, leave_out={"events.jsonl", ".lock"}) == before


@pytest.mark.parametrize(
    "option", [{"penalty": "ewc"}, {"penalty": "l2"}, {"replay": 0.5}, {"renormalize": 0.9}], ids=str
)
def test_what_needs_borders_is_refused_in_one_sentence(tiny, tmp_path, option):
    plan = plan_of(tiny, tmp_path, methods=[{"name": "lora", **option}])
    refused(ConfigError, f"{next(iter(option))} acts at the border", run_sequence, plan, tmp_path / "run",
            progress=Nothing())  # fmt: skip


def test_one_adaptation_and_a_blend_without_a_stream_are_refused(tiny, tmp_path):
    one = tiny_domains.of(plan_of(tiny, tmp_path), "code")
    refused(ConfigError, r"data\.stream: a stream is of `gaintune sequence`", adapt, one, tmp_path / "adapter")
    refused(ConfigError, "stream_blend is given without stream", build_plan, {"data": {"stream_blend": 0.2}})
    refused(ConfigError, r"data\.stream_blend", build_plan, {"data": {"stream": True, "stream_blend": 1.5}})
    streamed = build_plan({"data": {"stream": True}})
    assert build_plan(yaml.safe_load(plan_yaml(streamed))) == streamed and "stream" not in plan_yaml(build_plan({}))
