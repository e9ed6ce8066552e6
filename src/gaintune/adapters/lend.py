"""An adapter lent to a base for a while: the base is afterwards what it was, whatever happened in between."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gaintune.adapters.disk import load_adapter, strip_adapters
from gaintune.errors import ConfigError
from gaintune.models import Base, Checkpoint, load_model

PROBE_TOKENS = 32


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Switch a `PeftModel`'s adapter off for a while; ConfigError for another model."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ConfigError("only a PeftModel has an adapter to switch off; measure the two models one by one")
    with model.disable_adapter():
        yield


@contextlib.contextmanager
def attached(base: Base, folder: Path, *, allow_other_base: bool = False) -> Iterator[tuple[nn.Module, bool]]:
    """Put an adapter onto a base for a while; it is off again also where loading it broke halfway.

    Yields:
        The adapted model, and whether it computes exactly what the base does when the adapter is switched off.

    Raises:
        AdapterError, BaseMismatchError: as `load_adapter`.
    """
    from peft import PeftModel

    before = _probe(base.model)
    model: nn.Module | None = None
    try:
        model = load_adapter(base, folder, allow_other_base=allow_other_base)
        gives_back = False
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                gives_back = torch.equal(_probe(model), before)
        yield model, gives_back
    finally:
        if isinstance(model, PeftModel) and hasattr(model.base_model, "unload"):  # a prompt has no layers to take out
            cast(Any, model.base_model).unload()
        strip_adapters(base.model)  # what is left of one that was loaded halfway
        beside = isinstance(model, PeftModel)  # else the weights themselves may be others, in any row of any matrix
        if not beside or not torch.equal(_probe(base.model), before):
            _restore(base)


def _probe(model: nn.Module) -> torch.Tensor:
    """Logits on a few tokens from all over the vocabulary: they tell whether a model is what it was."""
    wrapped: Any = model
    carrier = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    options = {"use_cache": False} if "use_cache" in inspect.signature(carrier.forward).parameters else {}
    last = wrapped.config.get_text_config().vocab_size - 1
    tokens = torch.linspace(0, last, PROBE_TOKENS, dtype=torch.float64).long().to(wrapped.device)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return wrapped(input_ids=tokens[None], **options).logits.clone()
    finally:
        model.train(training)


def _restore(base: Base) -> None:
    """Read a base's weights again, into the model it has; methods that change weights never work on quantized ones.

    They are read into the model's own class, which needs no leave to run a base's own code a second time.
    """
    model = base.model
    place = Checkpoint(base.name, base.folder, base.revision)
    saved = load_model(place, model.dtype, torch.device("cpu"), kind=type(model))
    model.load_state_dict(saved.state_dict(), strict=True)
