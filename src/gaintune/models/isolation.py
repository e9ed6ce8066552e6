"""Whether a model keeps the texts of a row apart where position ids start anew: tried on a few tokens."""

from __future__ import annotations

from typing import Any

import torch

from gaintune.errors import ConfigError, one_line

TEXT_TOKENS = 12
# Largest differences of logits that are rounding, as shares of the largest logit. Exchanging a text leaves every shape
# as it is, so that most models give the very same numbers; text alone takes other kernels than text in a packed row.
EXCHANGED, COARSELY_EXCHANGED = 1e-4, 0.01
ALONE, COARSELY_ALONE = 1e-3, 0.03


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
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
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
    except (TypeError, ValueError) as error:
        raise _refusal(base, f"does not take position ids ({one_line(error)[:200]})") from None
    finally:
        model.train(training)
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


def _refusal(base: Any, why: str) -> ConfigError:
    return ConfigError(f"{type(base).__name__} {why}: set data.packing=false, which gives every row a block of its own")
