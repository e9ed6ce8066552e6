"""Instruction tuning from start to finish: adapt, evaluate, merge, and a sequence that mixes text and instructions."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import yaml
from transformers import BloomConfig, BloomForCausalLM
from typer.testing import CliRunner

from gaintune.cli.app import app
from gaintune.errors import ConfigError, DataError
from gaintune.workflows import adapt, merge_adapter, run_sequence
from support import tiny_base, tiny_domains


def gaintune(*arguments):
    """The command line in this process, which has loaded the heavy libraries already."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_base.folder(tmp_path_factory.mktemp("base"), max_position_embeddings=512)


@pytest.fixture
def questions(tmp_path) -> Path:
    """Rows of about 60 tokens, a third of them prompt."""
    file = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"On {topic}?\n", "completion": topics[topic][40:80]} for topic in sorted(topics)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def plan(model, tmp_path, questions) -> dict:
    """Prose as text, and questions."""
    values = tiny_domains.plan(model, tmp_path)
    values["data"]["domains"] = [
        values["data"]["domains"][0],
        {"name": "questions", "source": str(questions), "task": "instruct"},
    ]
    values["data"]["block_size"] = 128
    values["train"]["lr"] = 0.02
    return values


def test_a_sequence_mixes_text_and_instructions_and_merges(plan, tmp_path):
    run = tmp_path / "run"
    matrix = run_sequence(plan, run)
    (method,) = matrix.methods
    assert [stage.domain for stage in method.stages] == ["prose", "questions"]
    base = method.base["questions"]
    assert base.tokens < 0.8 * 256, "prompts and padding are not scored"
    assert method.base["prose"].tokens == 2 * 127
    assert method.stages[1].cells["questions"].change < 0
    inputs = json.loads((run / "inputs.json").read_text())
    assert inputs["domains"]["questions"]["train_documents"] > 8
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump({**plan, "data": {**plan["data"], "domains": plan["data"]["domains"][1:]}}))
    (adapter,) = run.glob("stages/**/02-questions/adapter")
    merged = tmp_path / "merged"
    done = gaintune("merge", adapter, merged, "--plan", file, "--dtype", "fp32")
    assert done.exit_code == 0, done.exception
    certificate = json.loads((merged / "certificate.json").read_text())
    assert certificate["largest_logit_difference"] < 1e-3
    assert certificate["adapter_perplexity"] == pytest.approx(method.stages[1].cells["questions"].perplexity, rel=1e-4)


def test_a_merge_counts_the_bytes_of_what_is_scored(model, plan, tmp_path):
    from gaintune.config import ModelConfig, build_plan
    from gaintune.data import load_domain
    from gaintune.models import load_tokenizer

    plan["data"]["domains"] = plan["data"]["domains"][1:]
    adapt(plan, tmp_path / "out")
    settled = build_plan(plan)
    examples = load_domain(settled.data.domains[0], settled.data, load_tokenizer(settled.model)).validation
    base = ModelConfig(name=str(model), device="cpu", dtype="fp32")
    given = merge_adapter(tmp_path / "out", tmp_path / "merged", blocks=examples, model=base, dtype="fp32")
    assert given.within_tolerance and given.block_size == 128


def test_adapt_and_evaluate_on_the_command_line(model, questions, tmp_path):
    said = ["--domain", f"gsm8k={questions}", "--task", "instruct", "--template", "alpaca", "--block-size", 320]
    said += ["--set", "model.dtype=fp32", "--set", "model.device=cpu", "--validation-tokens", 1280]
    out = tmp_path / "adapter"
    done = gaintune("adapt", "--model", model, "--out", out, *said, "--train-tokens", 3200, "--lr", 0.02)
    assert done.exit_code == 0, done.exception
    assert "gsm8k: perplexity" in done.stdout
    done = gaintune("evaluate", model, "--adapter", out, *said, "--json")
    assert done.exit_code == 0, done.exception
    base, adapted = json.loads(done.stdout)
    assert (base["domain"], base["change"]) == ("gsm8k", None)
    assert adapted["change"] < -3


def test_a_row_without_room_is_named(model, questions, tmp_path):
    options = ["--domain", f"q={questions}", "--task", "instruct", "--block-size", "8"]
    done = gaintune("adapt", "--model", model, "--out", tmp_path / "out", *options)
    assert isinstance(done.exception, DataError)
    message = str(done.exception)
    assert "row(s) whose prompt fills a block of 8 tokens" in message and f"{questions}:" in message
    assert "\n" not in message


def test_domains_show_their_task():
    told = gaintune("domains").stdout
    assert "instruct" in next(line for line in told.splitlines() if "gsm8k" in line)
    assert "text" in next(line for line in told.splitlines() if "wikitext" in line)


def test_a_model_that_mixes_packed_rows_learns_from_padded_ones(plan, tmp_path):
    sizes = {"vocab_size": tiny_base.VOCABULARY, "hidden_size": 32, "n_layer": 1, "n_head": 2}
    BloomForCausalLM(BloomConfig(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "bloom")
    tiny_base.tokenizer().save_pretrained(tmp_path / "bloom")
    plan["model"]["name"] = str(tmp_path / "bloom")
    plan["data"]["domains"] = plan["data"]["domains"][1:]
    with pytest.raises(ConfigError, match=r"BloomForCausalLM.*set data\.packing=false"):
        adapt(plan, tmp_path / "out")
    plan["data"]["packing"] = False
    result = adapt(plan, tmp_path / "padded")
    assert result.after.perplexity < result.before.perplexity
    assert sum(result.before.tokens) < 2 * 64
