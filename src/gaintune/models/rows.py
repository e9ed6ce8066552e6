"""What a language model must do with rows: take their length, and keep the texts of a packed row apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from gaintune.errors import ConfigError, one_line
from gaintune.models.loss import without_adapter

TEXT_TOKENS = 12  # of each text in the check for isolation
# Largest differences of logits that are rounding, as shares of the largest logit. Exchanging a text leaves every shape
# as it is, so that most models give the very same numbers; text alone takes other kernels than text in a packed row.
EXCHANGED, COARSELY_EXCHANGED = 1e-4, 0.01
ALONE, COARSELY_ALONE = 1e-3, 0.03


def longest_row(config: PretrainedConfig) -> int | None:
    """Return the most tokens of a row that a language model was made for; None without a limit (ALiBi, state spaces).

    Rotary positions that are stretched (linear, dynamic, YaRN and their kin) reach as far as their factor says.
    """
    text: Any = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not positions or getattr(text, "alibi", False):  # Falcon's config has both
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    reach = positions
    for kind in (rope, *(kind for kind in rope.values() if isinstance(kind, dict))):  # Gemma has one a kind of layer
        if kind.get("factor"):
            reach = max(reach, int(kind["factor"] * (kind.get("original_max_position_embeddings") or positions)))
    return reach


def require_rows(model: Any, length: int, *, packed: bool) -> None:
    """Refuse rows that are longer than a language model was made for, or whose texts it does not keep apart.

    Args:
        model: a causal language model of transformers, or a `PeftModel` around one.
        length: tokens of a row.
        packed: whether rows hold several texts, each with positions of its own.

    Raises:
        ConfigError: names the plan's key, and what to set instead.
    """
    base = without_adapter(model)
    longest = longest_row(base.config)
    if longest is not None and length > longest:
        raise ConfigError(
            f"data.block_size is {length}, but model {base.name_or_path!r} takes {longest} tokens at most "
            f"(max_position_embeddings): set data.block_size={longest} or less"
        )
    if packed:
        require_isolation(model)


def require_isolation(model: Any) -> None:
    """Refuse a model that lets one text of a packed row reach the next, or that places it other than alone.

    Two short texts are packed into a row. The second's logits must stay as they are when the first is exchanged, and
    must be those of the second alone. Models without position ids, or that carry a state or a bias across the row
    (recurrent ones, say), fail.

    Args:
        model: a causal language model of transformers, or a `PeftModel` around one; left in the mode it was in.

    Raises:
        ConfigError: the model cannot be trained or measured on packed rows; says what to set instead.
    """
    base = without_adapter(model)
    device = next(base.parameters()).device
    tokens = torch.arange(3 * TEXT_TOKENS, device=device) % base.config.get_text_config().vocab_size
    first, other, second = tokens.view(3, TEXT_TOKENS)
    positions = torch.arange(TEXT_TOKENS, device=device)
    packed = torch.stack([torch.cat([first, second]), torch.cat([other, second])])
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            # two rows in a batch, as in training, so that the first text's exchange is the only difference
            logits = _logits(model, packed, torch.cat([positions, positions]).expand(2, -1))[:, TEXT_TOKENS:]
            alone = _logits(model, second.expand(2, -1), positions.expand(2, -1))
            source = None if alone.isfinite().all() else _first_not_finite(model, second[None], positions[None])
    except (TypeError, ValueError) as error:
        raise _refusal(base, f"does not take position ids ({one_line(error)[:200]})") from None
    finally:
        model.train(training)
    if source is not None:
        raise ConfigError(
            f"{type(base).__name__} gives logits that are not finite, from {source} on: no setting of data.packing "
            "changes that. Check that module's weights (a row of zeros is no base for DoRA), or give other targets"
        )
    coarse = logits.dtype in (torch.bfloat16, torch.float16)
    largest = alone.float().abs().max()
    exchanged = (logits[0].float() - logits[1].float()).abs().max() / largest
    moved = (logits.float() - alone.float()).abs().max() / largest
    if not exchanged <= (COARSELY_EXCHANGED if coarse else EXCHANGED):
        raise _refusal(base, "lets one text of a packed row reach the next")
    if not moved <= (COARSELY_ALONE if coarse else ALONE):
        raise _refusal(base, "treats a text in a packed row other than the text alone")


def _logits(model: Any, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, position_ids=positions, use_cache=False).logits


def _first_not_finite(model: Any, tokens: torch.Tensor, positions: torch.Tensor) -> str:
    """Return the name and type of the first module, in the order of computation, whose output is not finite."""
    names: list[str] = []

    def note(name: str, module: nn.Module, output: Any) -> None:
        values = output[0] if isinstance(output, tuple) and output else output
        if isinstance(values, torch.Tensor) and values.is_floating_point() and not values.isfinite().all():
            names.append(f"{name.removeprefix('base_model.model.')} ({type(module).__name__})")

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: note(name, module, output))
        for name, module in model.named_modules()
    ]
    try:
        _logits(model, tokens, positions)
    finally:
        for handle in handles:
            handle.remove()
    return names[0] if names else "its output"


def _refusal(base: Any, why: str) -> ConfigError:
    return ConfigError(f"{type(base).__name__} {why}: set data.packing=false, which gives every row a block of its own")
