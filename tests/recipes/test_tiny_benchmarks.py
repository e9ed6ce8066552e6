"""A smoke run's rows: every benchmark the papers ask is there, is asked as lm-eval asks it, and has a right answer."""

import math

import pytest

pytest.importorskip("lm_eval", reason="benchmarks need lm-eval: pip install 'gaintune[benchmarks]'")

from gaintune.config import ModelConfig
from gaintune.evaluate.benchmarks import BenchmarkConfig, counting_score
from gaintune.evaluate.benchmarks.run import measure_benchmarks
from gaintune.models import load_base
from gaintune.recipes import smoke as tiny
from gaintune.recipes import smoke as tiny_benchmarks

RETENTION = "hellaswag,winogrande,arc_challenge,arc_easy,lambada_openai,boolq,piqa,triviaqa,openbookqa,sciq,mmlu"
RETENTION += ",medqa_4options,commonsense_qa,nq_open"


def test_a_tiny_base_is_asked_every_benchmark(tmp_path):
    base = load_base(ModelConfig(name=str(tiny.base(tmp_path / "base")), device="cpu", dtype="fp32"))
    config = BenchmarkConfig.model_validate(
        {
            "tasks": f"{RETENTION},gsm8k:8,humaneval",
            "source": "local",
            "data": (str(tiny.texts(tmp_path / "rows") / "benchmarks"),),
            "limit": tiny_benchmarks.ROWS,
            "generated_tokens": 16,
            "allow_code_execution": True,
            "code_seconds": 20.0,
        }
    )
    scores = measure_benchmarks(base.model, base.tokenizer, config)
    names = [task.name for task in config.tasks]
    assert {score.task for score in scores} == set(names) == set(tiny_benchmarks.benchmark_rows())
    counted = [counting_score(scores, name) for name in names]
    assert all(score.rows == tiny_benchmarks.ROWS and math.isfinite(score.value) for score in counted)
    assert len({score.value for score in counted}) > 2
