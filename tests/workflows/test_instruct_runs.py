"""Instruction tuning from start to finish: adapt, evaluate, merge, and a sequence that mixes text and instructions."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import yaml
from transformers import BloomConfig, BloomForCausalLM
from typer.testing import CliRunner

from gaintune.cli.app import app
from gaintune.config import build_plan
from gaintune.data import load_domain
from gaintune.errors import ConfigError, DataError
from gaintune.models import load_tokenizer
from gaintune.workflows import adapt, merge_adapter, run_sequence
from support import refused, tiny_base, tiny_domains
from support.files import write_rows
from support.tiny_adapters import config_of


def gaintune(*arguments):
    """The command line in this process, which has loaded the heavy libraries already."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_base.folder(tmp_path_factory.mktemp("base"), max_position_embeddings=512)


@pytest.fixture
def questions(tmp_path) -> Path:
    """Rows of about 60 tokens, a third of them prompt."""
    rows = [{"prompt": f"On {topic}?\n", "completion": topics[topic][40:80]} for topic in sorted(topics)]
    return write_rows(tmp_path / "questions.jsonl", rows)


@pytest.fixture
def plan(tiny, tmp_path, questions) -> dict:
    """Prose as text, and questions."""
    values = tiny_domains.plan(tiny, tmp_path, data={"block_size": 128}, train={"lr": 0.02})
    values["data"]["domains"][1] = {"name": "questions", "source": str(questions), "task": "instruct"}
    return values


@pytest.fixture
def questions_only(plan) -> dict:
    """The questions alone."""
    return {**plan, "data": {**plan["data"], "domains": plan["data"]["domains"][1:]}}


def test_a_sequence_mixes_text_and_instructions_and_merges(plan, questions_only, tmp_path):
    run = tmp_path / "run"
    (method,) = run_sequence(plan, run).methods
    assert [stage.domain for stage in method.stages] == ["prose", "questions"]
    assert method.base["questions"].tokens < 0.8 * 256, "prompts and padding are not scored"
    assert method.base["prose"].tokens == 2 * 127 and method.stages[1].cells["questions"].change < 0
    assert json.loads((run / "inputs.json").read_text())["domains"]["questions"]["train_documents"] > 8
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(questions_only))
    (adapter,) = run.glob("stages/**/02-questions/adapter")
    merged = tmp_path / "merged"
    done = gaintune("merge", adapter, merged, "--plan", file, "--dtype", "fp32")
    assert done.exit_code == 0, done.exception
    certificate = json.loads((merged / "certificate.json").read_text())
    assert certificate["largest_logit_difference"] < 1e-3
    assert certificate["adapter_perplexity"] == pytest.approx(method.stages[1].cells["questions"].perplexity, rel=1e-4)


def test_a_merge_counts_the_bytes_of_what_is_scored(tiny, questions_only, tmp_path):
    adapt(questions_only, tmp_path / "out")
    plan = build_plan(questions_only)
    examples = load_domain(plan.data.domains[0], plan.data, load_tokenizer(plan.model)).validation
    options = {"blocks": examples, "model": config_of(tiny, "fp32"), "dtype": "fp32"}
    certificate = merge_adapter(tmp_path / "out", tmp_path / "merged", **options)
    assert certificate.within_tolerance and certificate.block_size == 128


def test_adapt_and_evaluate_on_the_command_line(tiny, questions, tmp_path):
    options = ["--domain", f"gsm8k={questions}", "--task", "instruct", "--template", "alpaca", "--block-size", 320]
    options += ["--set", "model.dtype=fp32", "--set", "model.device=cpu", "--validation-tokens", 1280]
    out = tmp_path / "adapter"
    done = gaintune("adapt", "--model", tiny, "--out", out, *options, "--train-tokens", 3200, "--lr", 0.02)
    assert done.exit_code == 0, done.exception
    assert "gsm8k: perplexity" in done.stdout
    done = gaintune("evaluate", tiny, "--adapter", out, *options, "--json")
    assert done.exit_code == 0, done.exception
    base, adapted = json.loads(done.stdout)
    assert (base["domain"], base["change"]) == ("gsm8k", None) and adapted["change"] < -3


def test_a_row_without_room_is_named(tiny, questions, tmp_path):
    options = ["--domain", f"q={questions}", "--task", "instruct", "--block-size", "8"]
    done = gaintune("adapt", "--model", tiny, "--out", tmp_path / "out", *options)
    assert isinstance(done.exception, DataError)
    message = str(done.exception)
    assert "row(s) whose prompt fills a block of 8 tokens" in message and f"{questions}:" in message
    assert "\n" not in message


def test_domains_show_their_task():
    lines = gaintune("domains").stdout.splitlines()
    assert "instruct" in next(line for line in lines if "gsm8k" in line)
    assert "text" in next(line for line in lines if "wikitext" in line)


def test_a_model_that_mixes_packed_rows_learns_from_padded_ones(questions_only, tmp_path):
    sizes = {"vocab_size": tiny_base.VOCABULARY, "hidden_size": 32, "n_layer": 1, "n_head": 2}
    BloomForCausalLM(BloomConfig(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "bloom")
    tiny_base.tokenizer().save_pretrained(tmp_path / "bloom")
    questions_only["model"]["name"] = str(tmp_path / "bloom")
    refused(ConfigError, r"BloomForCausalLM.*set data\.packing=false", adapt, questions_only, tmp_path / "out")
    questions_only["data"]["packing"] = False
    result = adapt(questions_only, tmp_path / "padded")
    assert result.after.perplexity < result.before.perplexity and sum(result.before.tokens) < 2 * 64
