"""PEFT's tests, with our methods put in place of PEFT's (run by `run.py`; not collected by a plain pytest).

Every upstream test that is parametrized over methods is kept, with the cases of `methods.py` in place of the others'.
Tests that name one other method, without a parameter to exchange, say nothing about ours and are left out, as are the
few listed there with their reasons.
"""

from __future__ import annotations

import functools
import sys
import types
from pathlib import Path
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

sys.path.insert(0, str(Path(__file__).parent))
from methods import METHODS, Method

UPSTREAM_CLASSES = (
    upstream.TestPeftCustomModel,
    upstream.TestMultipleActiveAdapters,
    upstream.TestRequiresGrad,
    upstream.TestMixedAdapterBatches,
    upstream.TestDefaultTargetModules,
    upstream.TestPeftFsdpStateDict,
)
_OTHER_METHOD = "names another method and has no parameter for the method"
_theirs, _their_skip = upstream.set_init_weights_false, upstream._skip_if_merging_not_supported


def _set_init_weights_false(config_cls: type, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Upstream's, which goes by the class and not by the field."""
    method = next((method for method in METHODS if method.config is config_cls), None)
    return _theirs(config_cls, kwargs) if method is None else {**kwargs, **method.random}


def _skip_if_merging_not_supported(model_id: str, config_cls: type, config_kwargs: dict[str, Any]) -> None:
    """Upstream's, which lists PEFT's own methods: it ends a test that has done all else before it merges."""
    if any(method.config is config_cls and not method.mergeable for method in METHODS):
        pytest.skip("what is left of this test merges, which is refused")
    _their_skip(model_id, config_cls, config_kwargs)


upstream.set_init_weights_false = _set_init_weights_false
upstream._skip_if_merging_not_supported = _skip_if_merging_not_supported


def _as_ours(value: Any, method: Method) -> Any:
    """A configuration of another method as ours with the same targets; embeddings have no features to read."""
    if not isinstance(value, PeftConfig):
        return value
    targets = [name for name in sorted(value.target_modules) if name != "emb"]
    return method.config(target_modules=targets, modules_to_save=value.modules_to_save, **method.random)


def _translate(mark: pytest.Mark, method: Method) -> pytest.Mark | None:
    """The mark with our method in it, or None where it does not range over methods."""
    names, values = mark.args[0], mark.args[1]
    if values is upstream.TEST_CASES:
        return pytest.mark.parametrize(names, method.rows()).mark
    if names == "config_cls":
        return pytest.mark.parametrize(names, [method.config]).mark
    if values is upstream.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES:
        return pytest.mark.parametrize(names, method.pairs()).mark
    rows = [row if isinstance(row, tuple) else (row,) for row in values]
    lora = next((row for row in rows if any(isinstance(value, LoraConfig) for value in row)), None)
    if lora is None:
        return None
    row = tuple(_as_ours(value, method) for value in lora)
    return pytest.mark.parametrize(names, [row if len(row) > 1 else row[0]]).mark


def _with_ours(name: str, function: Any, method: Method) -> Any:
    """The test with our method as its method, or a string: why it is left out."""
    if name in method.left_out:
        return method.left_out[name]
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    translated = [_translate(mark, method) for mark in marks]
    if not any(translated):
        return _OTHER_METHOD
    marks = [new or old for new, old in zip(translated, marks, strict=True)]
    narrowed = method.narrowed.get(name, {})
    marks = [
        pytest.mark.parametrize(mark.args[0], narrowed[mark.args[0]][0]).mark if mark.args[0] in narrowed else mark
        for mark in marks
    ]
    copy = functools.wraps(function)(
        types.FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    )
    del copy.__wrapped__
    other = [mark for mark in getattr(function, "pytestmark", []) if mark.name != "parametrize"]
    copy.pytestmark = [*other, *marks]
    return copy


def _our_class(upstream_class: type, method: Method, left_out: dict[str, str]) -> type:
    members: dict[str, Any] = {}
    for name in dir(upstream_class):
        if not name.startswith("test"):
            continue
        member = _with_ours(name, getattr(upstream_class, name), method)
        if isinstance(member, str):
            left_out[name] = member
            member = None
        members[name] = member
    return type(f"{upstream_class.__name__}{method.name}", (upstream_class,), members)


NOT_RUN: dict[str, dict[str, str]] = {}
for _method in METHODS:
    _left_out = NOT_RUN.setdefault(_method.name, {})
    for _upstream_class in UPSTREAM_CLASSES:
        _class = _our_class(_upstream_class, _method, _left_out)
        globals()[_class.__name__] = _class
    for _name, _parameters in _method.narrowed.items():
        _left_out.update({f"{_name}[{_parameter}]": reason for _parameter, (_, reason) in _parameters.items()})
del _class, _upstream_class  # not to be collected a second time


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_reason_is_still_needed(method: Method) -> None:
    """A test that upstream renamed or dropped must not leave a stale reason behind."""
    assert set(method.left_out) <= set(NOT_RUN[method.name])
    assert all(any(hasattr(cls, name) for cls in UPSTREAM_CLASSES) for name in method.narrowed)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_is_left_out_is_printed(method: Method, capsys: pytest.CaptureFixture[str]) -> None:
    not_run = NOT_RUN[method.name]
    with capsys.disabled():
        for reason in sorted(set(not_run.values())):
            names = sorted(name for name, why in not_run.items() if why == reason)
            print(f"\n{method.name}, left out ({len(names)}): {reason}\n    {', '.join(names)}", end="")
        print()
    assert not_run
