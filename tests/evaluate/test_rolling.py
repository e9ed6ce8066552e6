"""Perplexity of running text against lm-eval's `loglikelihood_rolling`, on the same tokens in the same contexts.

One block is one text to lm-eval: of a longer one it would cut windows, and only the first begins as texts do. Before a
text it puts a prefix token, which it does not score: the beginning of text, or here the block's first token where
the model has none.
"""

import math

import pytest

from gaintune.config import ModelConfig, build_plan
from gaintune.data import load_domain
from gaintune.evaluate import measure
from gaintune.models import load_base
from support import tiny_domains, tiny_gemma

pytest.importorskip("lm_eval", reason="benchmarks need lm-eval: pip install 'gaintune[benchmarks]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from gaintune.evaluate.benchmarks.model import LmEvalModel
from gaintune.progress import Silent


def both(base, domain, data):
    """Perplexity over a domain's blocks, ours and lm-eval's, and how many blocks it is over."""
    blocks = load_domain(domain, data, base.tokenizer)
    ours = measure(base.model, blocks.validation, blocks.validation_bytes)
    theirs = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=1, add_bos_token=False)
    sums, kept = [], []
    for number, (first, *rest) in enumerate(blocks.validation.input_ids.tolist()):
        text = base.tokenizer.decode(rest)
        if base.tokenizer(text, add_special_tokens=False)["input_ids"] != rest:
            continue  # cut inside of a character, so it is no text
        if blocks.beginning is None:
            theirs.custom_prefix_token_id = first
        assert theirs.prefix_token_id == first
        request = Instance("loglikelihood_rolling", {}, (text,), 0)
        sums.append(-theirs.loglikelihood_rolling([request], disable_tqdm=True)[0])
        kept.append(number)
    tokens = sum(ours.tokens[number] for number in kept)
    found = (math.exp(total / tokens) for total in (sum(ours.nll[number] for number in kept), sum(sums)))
    return *found, len(kept)


def test_a_model_that_begins_its_texts(tmp_path):
    plan = build_plan(tiny_domains.plan(tiny_gemma.folder(tmp_path / "gemma"), tmp_path))
    ours, theirs, count = both(load_base(plan.model), plan.data.domains[0], plan.data)
    assert (ours, count) == (pytest.approx(theirs, rel=1e-5), 8)


def test_lm_eval_is_given_gemmas_beginning_of_text(tmp_path):
    base = load_base(ModelConfig(name=str(tiny_gemma.folder(tmp_path)), dtype="fp32", device="cpu"))
    for tokenizer in (base.tokenizer, tiny_gemma.tokenizer()):
        asked = LmEvalModel(base.model, tokenizer, batch_size=1, title="", progress=Silent())
        context, answer = asked._encode_pair("a b", " c")
        assert context == [tiny_gemma.BEGIN, *tiny_gemma.tokenizer()("a b")["input_ids"]]
        assert answer == tiny_gemma.tokenizer()(" c")["input_ids"]


@pytest.mark.real_model
def test_the_demo_model(demo):
    plan = build_plan({"data": {"domains": ["law"], "validation_tokens": 1024}})
    ours, theirs, count = both(demo, plan.data.domains[0], plan.data)
    assert (ours, count) == (pytest.approx(theirs, rel=1e-3), 4)


@pytest.mark.real_model
def test_the_demo_models_rows_are_what_they_were_before_blocks_could_begin_with_a_token(demo):
    plan = build_plan({"data": {"domains": ["medical", "law", "scripture"]}})  # the others differ between Pythons
    assert {each.name: load_domain(each, plan.data, demo.tokenizer).content_hash for each in plan.data.domains} == {
        "medical": "b6a5d31df06bcd0a3427fe0a2232adb2a2b19e6fe55b66e08034cf4ad02a1948",
        "law": "27afd1432dfabab863322bdf6aec79606371073d5336eaaa0267f5104db2f8c9",
        "scripture": "7d01be1f5bfadfe5c0b5a406d1c7f31c58a3f0919a4770638da51cf877c6fcbd",
    }
