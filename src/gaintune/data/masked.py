"""Blocks for a masked language model: which tokens are hidden, by a seed that knows nothing of the model."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from gaintune.config import DataConfig, DomainConfig
from gaintune.data.blocks import TextBlocks
from gaintune.data.examples import IGNORED
from gaintune.errors import BaseModelError, DataError

SHARE = 0.15
"""Share of a block's tokens that are to be predicted, special ones not counted."""
HIDDEN, REPLACED = 0.8, 0.1
"""Shares of those that the model sees as the mask token, and as another token; it sees the rest as they are."""
ENDS = 2  # special tokens around a block


@dataclass(frozen=True)
class MaskedBlocks:
    """Validation text of one domain with tokens hidden, for a masked language model.

    `input_ids` are what the model sees, with special tokens around every block; `labels` are the tokens to predict, and
    -100 elsewhere. Both are int64 `(blocks, block_size)`.
    """

    name: str
    input_ids: torch.Tensor
    labels: torch.Tensor

    @property
    def scored(self) -> tuple[int, ...]:
        """Number of tokens to predict in each block."""
        return tuple((self.labels != IGNORED).sum(dim=1).tolist())


def load_masked_blocks(
    domain: DomainConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> MaskedBlocks:
    """Load a domain's validation text, packed as for a causal model, between the encoder's special tokens.

    Two tokens of a block are the special ones; `seed` is that of the masking.

    Raises:
        BaseModelError: the tokenizer lacks the special tokens of an encoder.
        DataError, AssetError: as for `load_domain`.
    """
    inner = data.model_copy(update={"block_size": data.block_size - ENDS, "beginning_of_text": "never"})
    blocks = TextBlocks(domain, inner, tokenizer).build().validation.input_ids
    return mask_blocks(blocks, domain.name, tokenizer, seed=seed)


def mask_blocks(blocks: torch.Tensor, name: str, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> MaskedBlocks:
    """Hide tokens of packed blocks `(blocks, length)` and put the special tokens around them.

    Of every block the same share is drawn, 15 % of the tokens that are not special; of those 80 % become the mask
    token, 10 % another token and 10 % stay, as in the pretraining of BERT (arXiv 1810.04805, 3.1) and RoBERTa, and as
    perplexity of masked language models is usually reported. The draw depends on the seed, the domain's name, the
    block's number and its length alone, so every model with this tokenizer predicts the same tokens.
    """
    begin = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
    end = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    mask = tokenizer.mask_token_id
    if begin is None or end is None or mask is None:
        raise BaseModelError(
            f"the tokenizer {tokenizer.name_or_path!r} has no mask token, or none for the ends of a text: "
            "masked-LM perplexity is for encoders"
        )
    special = np.array(sorted(tokenizer.all_special_ids))
    ordinary = np.setdiff1d(np.array(sorted(tokenizer.get_vocab().values())), special)
    seen, labels = [], []
    for number, block in enumerate(blocks.numpy()):
        generator = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
        eligible = np.flatnonzero(~np.isin(block, special))
        if not len(eligible):
            raise DataError(f"domain {name!r}: block {number + 1} holds special tokens only")
        chosen = generator.permutation(eligible)[: max(1, round(SHARE * len(eligible)))]
        fate = generator.random(len(chosen))
        others = generator.choice(ordinary, len(chosen))
        shown, wanted = block.copy(), np.full_like(block, IGNORED)
        wanted[chosen] = block[chosen]
        kept = np.where(fate < HIDDEN + REPLACED, others, block[chosen])
        shown[chosen] = np.where(fate < HIDDEN, mask, kept)
        seen.append(np.concatenate([[begin], shown, [end]]))
        labels.append(np.concatenate([[IGNORED], wanted, [IGNORED]]))
    return MaskedBlocks(name, torch.from_numpy(np.stack(seen)), torch.from_numpy(np.stack(labels)))
