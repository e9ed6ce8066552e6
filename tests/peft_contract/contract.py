"""PEFT's tests, with GAIN put in place of PEFT's methods (run by `run.py`; not collected by a plain pytest).

Every upstream test that is parametrized over methods is kept, with GAIN's cases in place of the others'. Tests that
name one other method, without a parameter to exchange, say nothing about GAIN and are left out, as are the few listed
in LEFT_OUT with their reasons.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import pytest

try:
    import diffusers  # noqa: F401
except ImportError:  # the helpers import one name of it, for tests of image models that are not run here
    stub = types.ModuleType("diffusers")
    stub.StableDiffusionPipeline = None  # type: ignore[attr-defined]
    sys.modules["diffusers"] = stub

from peft import LoraConfig, PeftConfig
from peft_upstream_tests import test_custom_models as upstream

from gaintune.tuners.gain import GainConfig

CASES = [
    ("Linear, name", "MLP", GainConfig, {"target_modules": "lin0"}),
    ("Linear, list", "MLP", GainConfig, {"target_modules": ["lin0"]}),
    ("Linear, last layer", "MLP", GainConfig, {"target_modules": ["lin1"]}),
    ("Linear, two layers", "MLP", GainConfig, {"target_modules": ["lin0", "lin1"]}),
    ("Linear, all-linear", "MLP", GainConfig, {"target_modules": "all-linear"}),
    ("Linear, module saved", "MLP", GainConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("Linear, excluded", "MLP", GainConfig, {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]}),
    ("Conv1D", "EmbConv1D", GainConfig, {"target_modules": ["conv1d"]}),
    ("Conv1D and Linear", "EmbConv1D", GainConfig, {"target_modules": ["conv1d", "lin0"]}),
    ("Conv1D, module saved", "EmbConv1D", GainConfig, {"target_modules": ["conv1d"], "modules_to_save": ["lin0"]}),
    ("Linear behind Conv1D", "EmbConv1D", GainConfig, {"target_modules": ["lin0"]}),
]
_RANDOM = {"init_weights": False}
PAIRS = [
    ("Same", "gain", GainConfig, {"target_modules": ["lin0"], **_RANDOM}, {"target_modules": ["lin0"], **_RANDOM}),
    ("Different", "gain", GainConfig, {"target_modules": ["lin0"], **_RANDOM}, {"target_modules": ["lin1"], **_RANDOM}),
]
UPSTREAM_CLASSES = (
    upstream.TestPeftCustomModel,
    upstream.TestMultipleActiveAdapters,
    upstream.TestRequiresGrad,
    upstream.TestMixedAdapterBatches,
    upstream.TestDefaultTargetModules,
    upstream.TestPeftFsdpStateDict,
)
LEFT_OUT = {
    "test_adapter_dtype_autocast[autocast_adapter_dtype=False]": "expects the base's dtype; gains are always float32 "
    "(tests/tuners/test_gain_saving.py)",
    "test_mixed_adapter_batches_lora_conv2d": "adapts a convolution, which GAIN refuses",
    "test_mixed_adapter_batches_mha_raises": "adapts nn.MultiheadAttention, which GAIN refuses",
    "test_mixed_adapter_batches_lora_opt_timing": "times a model from the Hub on a GPU",
    "test_save_pretrained_targeting_lora_to_embedding_layer": "adapts an embedding, refused",
    "test_save_pretrained_targeting_lora_to_embedding_layer_non_transformers": "adapts an embedding, refused",
    "test_default_target_modules_list_of_str": "patches the table of another method (see test_gain_mapping.py)",
    "test_default_target_modules_str": "patches the table of another method (see test_gain_mapping.py)",
    "test_save_load_roundtrip_fsdp_wrapped_learnable_bias": "GAIN has no bias setting",
}
_OTHER_METHOD = "names another method and has no parameter for the method"


def _as_gain(value: Any) -> Any:
    """A configuration of another method as GAIN's with the same targets; embeddings have no input to scale."""
    if not isinstance(value, PeftConfig):
        return value
    targets = [name for name in sorted(value.target_modules) if name != "emb"]
    return GainConfig(target_modules=targets, modules_to_save=value.modules_to_save, init_weights=False)


def _translate(mark: pytest.Mark) -> pytest.Mark | None:
    """The mark with GAIN in it, or None where it does not range over methods."""
    names, values = mark.args[0], mark.args[1]
    if values is upstream.TEST_CASES or names == "config_cls":
        return pytest.mark.parametrize(names, CASES if values is upstream.TEST_CASES else [GainConfig]).mark
    if values is upstream.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES:
        return pytest.mark.parametrize(names, PAIRS).mark
    rows = [row if isinstance(row, tuple) else (row,) for row in values]
    lora = next((row for row in rows if any(isinstance(value, LoraConfig) for value in row)), None)
    if lora is None:
        return None
    row = tuple(_as_gain(value) for value in lora)
    return pytest.mark.parametrize(names, [row if len(row) > 1 else row[0]]).mark


def _with_gain(name: str, function: Any) -> Any:
    """The test with GAIN as its method, or a string: why it is left out."""
    if name in LEFT_OUT:
        return LEFT_OUT[name]
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    translated = [_translate(mark) for mark in marks]
    if not any(translated):
        return _OTHER_METHOD
    marks = [new or old for new, old in zip(translated, marks, strict=True)]
    if name == "test_adapter_dtype_autocast":
        only_fp32 = pytest.mark.parametrize("autocast_adapter_dtype", [True]).mark
        marks = [only_fp32 if mark.args[0] == "autocast_adapter_dtype" else mark for mark in marks]
    copy = functools.wraps(function)(
        types.FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    )
    del copy.__wrapped__
    other = [mark for mark in getattr(function, "pytestmark", []) if mark.name != "parametrize"]
    copy.pytestmark = [*other, *marks]
    return copy


def _gain_class(upstream_class: type, left_out: dict[str, str]) -> type:
    members: dict[str, Any] = {}
    for name in dir(upstream_class):
        if not name.startswith("test"):
            continue
        member = _with_gain(name, getattr(upstream_class, name))
        if isinstance(member, str):
            left_out[name] = member
            member = None
        members[name] = member
    return type(upstream_class.__name__, (upstream_class,), members)


NOT_RUN: dict[str, str] = {}
for _upstream_class in UPSTREAM_CLASSES:
    globals()[_upstream_class.__name__] = _gain_class(_upstream_class, NOT_RUN)
NOT_RUN["test_adapter_dtype_autocast[autocast_adapter_dtype=False]"] = LEFT_OUT[
    "test_adapter_dtype_autocast[autocast_adapter_dtype=False]"
]


def test_every_reason_is_still_needed() -> None:
    """A test that upstream renamed or dropped must not leave a stale reason behind."""
    assert set(LEFT_OUT) <= set(NOT_RUN)


def test_what_is_left_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Print the tests left out, by reason."""
    with capsys.disabled():
        for reason in sorted(set(NOT_RUN.values())):
            names = sorted(name for name, why in NOT_RUN.items() if why == reason)
            print(f"\nleft out ({len(names)}): {reason}\n    {', '.join(names)}", end="")
        print()
    assert NOT_RUN
