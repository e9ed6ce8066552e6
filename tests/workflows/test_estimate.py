"""The estimate of memory and time: what real tensors take, counted another way, and what is refused before loading."""

import gc
import json

import pytest
import torch
import transformers

import gaintune.workflows.estimate as estimating
from gaintune.config import MethodConfig, build_plan
from gaintune.errors import ConfigError, DivergedError
from gaintune.methods import METHODS as CATALOGUE
from gaintune.methods import attach
from gaintune.models import NextTokenLoss
from gaintune.storage import read_json
from gaintune.training import checkpoint_activations
from gaintune.workflows import adapt, estimate_plan, read_bytes, read_pace, run_sequence
from support import refused, tiny_base, tiny_domains
from support.cli import gaintune, printed, refusal, run

SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 5, "vocab_size": 1024}
ROWS, LENGTH = 4, 48
METHODS = [
    {"name": "lora", "rank": 4, "targets": "all-linear"}, {"name": "disel", "rank": 4}, "gain-ffn", "adalora", "full",
]  # fmt: skip


@pytest.fixture(scope="module")
def mid(tmp_path_factory):
    return tiny_base.folder(tmp_path_factory.mktemp("mid"), **SIZES)


def plan(folder, *methods, **changes):
    values = {
        "model": {"name": str(folder), "dtype": "fp32", "device": "cpu"},
        "data": {"domains": ["law"], "train_tokens": 960, "validation_tokens": 96, "block_size": LENGTH},
        "methods": list(methods),
        "train": {"batch_size": ROWS},
    }
    for section, fields in changes.items():
        values[section] = {**values.get(section, {}), **fields}
    return values


def saved_bytes(model, batch):
    """The bytes that autograd keeps of a real forward pass: every storage once, and no weight."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage, storage.nbytes())
        return tensor

    loss = NextTokenLoss(model)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = loss.sum(model, batch)
    total.backward()
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method if isinstance(method, str) else method["name"])
def test_the_activations_are_the_tensors_that_autograd_keeps(mid, method):
    memory = estimate_plan(plan(mid, method)).methods[0].memory
    base = transformers.AutoModelForCausalLM.from_pretrained(mid, dtype=torch.float32)
    weights = sum(parameter.nbytes for parameter in base.parameters())
    model = attach(base, MethodConfig.model_validate(method), seed=0)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    ids = torch.randint(0, 257, (ROWS, LENGTH))
    assert memory.activations == pytest.approx(saved_bytes(model, {"input_ids": ids, "labels": ids}), rel=0.01)
    assert memory.trained == (7 if method == "adalora" else 4) * trained
    if method != "full":
        assert memory.weights == pytest.approx(weights, rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"effective_batch": 8}], ids=str)
def test_the_peak_is_that_of_a_real_step(mid, changes):
    """The real step's tensors are counted by torch's profiler: allocations and releases of the CPU's allocator."""
    found = estimate_plan(plan(mid, METHODS[0], train=changes)).methods[0].memory
    model = attach(
        transformers.AutoModelForCausalLM.from_pretrained(mid, dtype=torch.float32),
        MethodConfig.model_validate(METHODS[0]), seed=0,
    )  # fmt: skip
    if changes.get("gradient_checkpointing"):
        checkpoint_activations(model)
    loss = NextTokenLoss(model)
    model.train()
    ids = torch.randint(0, 257, (ROWS, LENGTH))
    passes = changes.get("effective_batch", ROWS) // ROWS
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profiled:
        for _ in range(passes):
            loss.sum(model, {"input_ids": ids, "labels": ids}).backward()
    records = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(records, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert found.training - found.weights - 3 * trained == pytest.approx(peak, rel=0.1)


def test_two_short_models_give_the_whole_one(mid, monkeypatch):
    values = plan(mid, *METHODS)
    by_parts = estimate_plan(values)
    monkeypatch.setattr(estimating, "LONGER", 99)
    estimating._parts.cache_clear()
    assert estimate_plan(values) == by_parts
    estimating._parts.cache_clear()


def test_nothing_random_changes_and_no_weights_are_needed(mid, tmp_path):
    (tmp_path / "config.json").write_bytes((mid / "config.json").read_bytes())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    values = plan(mid, "lora")
    alone = estimate_plan({**values, "model": {**values["model"], "name": str(tmp_path)}})
    assert torch.equal(torch.rand(3), expected)
    given = estimate_plan({**values, "model": {"name": "no/such", "dtype": "fp32"}}, architecture=tmp_path)
    assert alone.methods[0].memory == given.methods[0].memory


PUBLISHED = {  # parameters, in the models' papers and cards
    "openai-community/gpt2-large": 774e6, "mistralai/Mistral-7B-v0.1": 7.24e9, "meta-llama/Llama-2-7b-hf": 6.74e9,
    "meta-llama/Llama-2-13b-hf": 13.02e9, "meta-llama/Llama-2-70b-hf": 68.98e9, "FacebookAI/roberta-base": 125e6,
    "Qwen/Qwen2.5-7B": 7.62e9,
}  # fmt: skip


@pytest.mark.parametrize("name", estimating.PAPER_MODELS)
def test_the_papers_models_have_their_published_sizes(name):
    values = {"model": {"name": name, "dtype": "bf16"}, "methods": ["ia3"]}
    if "roberta" in name:
        values["data"] = {"task": "classify", "domains": ["mrpc"]}
    found = estimate_plan(values)
    assert found.methods[0].memory.weights / 2 == pytest.approx(PUBLISHED[name], rel=0.01)


def test_four_bits_are_those_that_bitsandbytes_stores():
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(96, 256)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    stored = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert estimating.stored_bytes(weight.numel(), 96, "4bit") == stored
    rows, scales, _ = functional.int8_vectorwise_quant(weight.half())
    assert estimating.stored_bytes(weight.numel(), 96, "8bit") == rows.nbytes + scales.nbytes


SEVEN = "meta-llama/Llama-2-7b-hf"
LORA64 = {"name": "lora", "rank": 64, "targets": "all-linear"}
GPU = {"data": {"domains": ["law"], "train_tokens": 1_000_000, "block_size": 512}, "train": {"batch_size": 64}}


def test_what_does_not_fit_gets_advice_and_then_fits():
    values = {"model": {"name": SEVEN}, "methods": [LORA64], **GPU}
    (found,) = estimate_plan(values, devices=8, device_memory=80 * 10**9).methods
    assert not found.fits and found.settings == {"train.batch_size": 8, "train.effective_batch": 512}
    values["train"] = {"batch_size": 8, "effective_batch": 512}
    (again,) = estimate_plan(values, devices=8, device_memory=80 * 10**9).methods
    assert again.fits and again.updates == found.updates == 1_000_000 // 512 // 512 + 1, "the updates stay the same"
    assert found.memory.activations == pytest.approx(8 * again.memory.activations, rel=0.03)


def test_a_base_larger_than_a_device_is_spread_or_quantized_and_full_is_refused():
    values = {"model": {"name": "meta-llama/Llama-2-70b-hf"}, "methods": ["gain"]}
    (spread,) = estimate_plan(values, devices=8, device_memory=80 * 10**9).methods
    assert spread.settings["model.device_map"] == "auto" and "model.quantization" not in spread.settings
    (packed,) = estimate_plan(values, device_memory=80 * 10**9).methods
    assert packed.settings["model.quantization"] == "4bit"
    values = {"model": {"name": SEVEN}, "methods": ["full"]}
    (full,) = estimate_plan(values, device_memory=80 * 10**9).methods
    assert not full.settings and "keeps 108 GB" in full.advice and "FSDP2) is not supported" in full.advice


def test_training_that_cannot_fit_is_refused_before_anything_is_loaded(mid, tmp_path, monkeypatch):
    """A CUDA device of five megabytes stands in for one that is too small."""
    monkeypatch.setattr(estimating, "device_memory", lambda model: 5_000_000)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    values = tiny_domains.of(tiny_domains.plan(mid, tmp_path), "prose", methods=[METHODS[0]])
    for start in (adapt, run_sequence):
        refused(
            ConfigError, r"takes about 0.01 GB on a device of 0.01 GB \(weights .*loss", start, values, tmp_path / "out"
        )
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(estimating, "device_memory", lambda model: 10**9)
    assert adapt(values, tmp_path / "out").steps > 0


ANY = [{"name": "lora", "config": {"use_rslora": True}}, {"name": "peft", "config": {"peft_type": "RANDLORA", "r": 4}}]


@pytest.mark.parametrize("method", [*CATALOGUE, *ANY], ids=str)
def test_every_method_of_the_catalogue_and_of_peft_is_estimated(method, mid):
    values = plan(mid, method)
    memory = estimate_plan(values).methods[0].memory
    base = transformers.AutoModelForCausalLM.from_pretrained(mid, dtype=torch.float32)
    adapted = attach(base, build_plan(values).methods[0], seed=0, shapes_only=True)
    trained = sum(parameter.nbytes for parameter in adapted.parameters() if parameter.requires_grad)
    assert memory.trained >= 4 * trained > 0, "parameters, gradients and two averages"


def test_a_method_that_cannot_fit_may_be_passed_over_where_others_fit(mid, tmp_path, monkeypatch):
    values = tiny_domains.of(tiny_domains.plan(mid, tmp_path), "prose", methods=["gain", "full"])
    gain, full = (method.memory.peak for method in estimate_plan(values).methods)
    monkeypatch.setattr(estimating, "device_memory", lambda model: (gain + full) // 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused(ConfigError, "method 'full' takes about", run_sequence, values, tmp_path / "refused")
    with pytest.raises(DivergedError, match="method 'full' takes about") as error:
        run_sequence(values, tmp_path / "out", pass_over_unfit=True)
    assert (list(error.value.methods), error.value.finished) == (["full"], 1)
    written = read_json(tmp_path / "out" / "matrix.json")["methods"]
    assert {method["label"]: len(method["stages"]) for method in written} == {"gain": 1, "full": 0}


def test_time_is_that_of_a_pace_or_of_a_finished_run(mid, tmp_path):
    values = tiny_domains.plan(tiny_base.folder(tmp_path / "tiny"), tmp_path)
    run_sequence(values, tmp_path / "run")
    paces = read_pace(tmp_path / "run")
    (found,) = estimate_plan(values, tokens_per_second=paces).methods
    steps = [read_json(file)["steps"] for file in (tmp_path / "run").glob("stages/*/*/training.json")]
    assert (found.tokens, found.updates) == (2 * 1024, sum(steps))
    assert found.seconds == pytest.approx(2 * 1024 / paces["gain-ffn"])
    refused(ConfigError, "no run of `gaintune sequence`", read_pace, tmp_path)


def test_the_command_prints_a_table_json_and_single_refusals(mid):
    words = [f"--set=model.{key}" for key in ("dtype=fp32", "device=cpu")]
    given = ["estimate", "--model", mid, *words, "--block-size", LENGTH, "--batch-size", ROWS, "--domain", "law"]
    given += ["--set=data.validation_tokens=96"]
    values = json.loads(run(*given, "--json", "--tokens-per-second", 100))
    (expected,) = estimate_plan(plan(mid, "gain-ffn")).methods
    (method,) = values["methods"]
    assert method["memory"]["peak"] == expected.memory.peak and method["seconds"] == method["tokens"] / 100
    shown = printed(gaintune(*given, "--device-memory", "80GB", "--devices", 2))
    assert "trained state" in shown and "fits 2 x 80GB" in shown and "updates" in shown
    assert "80 is no amount" in refusal(gaintune(*given, "--device-memory", "80")).replace("'", "")
    assert "only paper has estimates" in refusal(gaintune("recipe", "show", "G8", "--scale", "small"))
    assert "give one" in refusal(gaintune(*given, "--run", "x", "--tokens-per-second", 5))
    message = refusal(gaintune("estimate", "--model", "nobody/nothing-of-this-name"))
    assert "give the folder of the model's config.json with --config FOLDER" in message


@pytest.mark.parametrize(("text", "expected"), [("80GB", 80e9), ("1.5 GiB", 1.5 * 2**30), ("512mb", 512e6)])
def test_amounts_of_memory_are_read(text, expected):
    assert read_bytes(text) == expected
