"""Running text to blocks of tokens: split by document, packed with end-of-text between, near-duplicates left out."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from gaintune.config import DataConfig, DomainConfig
from gaintune.data.domains import characters_needed, load_documents
from gaintune.data.encode import Encoded, beginning_of_text, encode_texts, end_of_text
from gaintune.data.examples import DomainBlocks, Examples
from gaintune.data.neighbours import NeighbourIndex
from gaintune.data.split import Passage, in_drawn_order, split_documents
from gaintune.errors import DataError
from gaintune.progress import plural

logger = logging.getLogger(__name__)

ENCODED_AT_ONCE = 16


@dataclass(frozen=True)
class _Packed:
    """Blocks of one side: tokens and bytes `(blocks, block_size)`, the passages in them, the tokens that were there.

    Those are the tokens of text, and a beginning-of-text token for every block that they begin.
    """

    tokens: np.ndarray
    bytes: np.ndarray
    passages: tuple[Passage, ...]
    available: int

    @property
    def documents(self) -> int:
        return len({passage.document for passage in self.passages})


def load_text(domain: DomainConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> DomainBlocks:
    """Load, split and pack a domain of running text within its budgets.

    Documents are drawn in an order the seed decides and joined with the tokenizer's end-of-text token; what is beyond
    the last whole block of the budget is left out. Where `data.beginning_of_text` or the model calls for it, every
    block begins with the beginning-of-text token and holds one token of text less. A domain smaller than a budget is
    used up, with a warning. Validation text does not depend on the training budget, except that near-duplicates of what
    is trained on are left out.

    Raises:
        DataError: the text is missing, broken, or less than one block on one side; the file and line are named.
        AssetError: a download failed.
        BaseModelError: the tokenizer has no end-of-text token.
        ConfigError: a beginning-of-text token is asked for, and the tokenizer has none.
    """
    begin, separator = beginning_of_text(tokenizer, data.beginning_of_text), end_of_text(tokenizer)
    documents = split_documents(load_documents(domain, characters=characters_needed(data)), data.seed)
    assert documents.validation is not None

    def pack(side: str, budget: int, keep: Callable[[Passage], bool]) -> _Packed:
        source = documents.train if side == "train" else documents.validation or ()
        passages = filter(keep, in_drawn_order(source, data.seed, side, data.block_size))
        return _pack(passages, tokenizer, begin, separator, data.block_size, budget)

    train = pack("train", data.train_tokens, lambda passage: True)
    _check_size(train, "training", domain, documents.source, data.train_tokens, data.block_size, "")
    trained_on = NeighbourIndex((passage.document, passage.text) for passage in train.passages)
    removed: set[int] = set()

    def is_new(passage: Passage) -> bool:
        if passage.text in trained_on:
            removed.add(passage.document)
            return False
        return True

    validation = pack("validation", data.validation_tokens, is_new)
    if removed:
        origins = [documents.validation[number].origin for number in sorted(removed)[:3]]
        logger.info(
            "domain %s: left %d validation document(s) out, near-duplicates of training documents: %s%s",
            domain.name, len(removed), ", ".join(origins), ", ..." if len(removed) > 3 else "",
        )  # fmt: skip
    note = f", after {len(removed)} near-duplicate(s) of training documents were left out" if removed else ""
    _check_size(validation, "validation", domain, documents.source, data.validation_tokens, data.block_size, note)
    return DomainBlocks(
        name=domain.name,
        train=Examples.of_blocks(torch.from_numpy(train.tokens)),
        validation=Examples.of_blocks(torch.from_numpy(validation.tokens)),
        validation_bytes=tuple(validation.bytes[:, 1:].sum(axis=1).tolist()),
        content_hash=_content_hash(data, separator, train, validation),
        train_documents=train.documents,
        validation_documents=validation.documents,
        removed_near_duplicates=len(removed),
        beginning=begin[0] if begin else None,
    )


def _pack(
    passages: Iterator[Passage],
    tokenizer: PreTrainedTokenizerBase,
    begin: list[int],
    separator: int,
    block_size: int,
    budget: int,
) -> _Packed:
    """Draw passages until the budget's whole blocks are full, or there are no more; `begin` starts every block."""
    room = block_size - len(begin)
    wanted = budget // block_size * room
    ids: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    starts: list[tuple[int, Passage]] = []
    available = 0
    for passage, encoded in _encoded(passages, tokenizer):
        if available >= wanted:
            break
        if ids:
            ids.append(np.array([separator]))
            sizes.append(np.array([0]))
            available += 1
        starts.append((available, passage))
        ids.append(encoded.ids)
        sizes.append(encoded.bytes)
        available += len(encoded.ids)
    kept = min(available, wanted) // room * room

    def blocks(pieces: list[np.ndarray], first: list[int]) -> np.ndarray:
        rows = np.concatenate(pieces or [np.empty(0, np.int64)])[:kept].reshape(-1, room)
        return np.concatenate([np.tile(np.array(first, np.int64), (len(rows), 1)), rows], axis=1)

    return _Packed(
        tokens=blocks(ids, begin),
        bytes=blocks(sizes, [0] * len(begin)),
        passages=tuple(passage for start, passage in starts if start < kept),
        available=available + len(begin) * math.ceil(available / room),
    )


def _encoded(passages: Iterator[Passage], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Passage, Encoded]]:
    """Tokenise a few passages at a time: in parallel where the tokenizer can, and hardly beyond what is needed."""
    while batch := list(islice(passages, ENCODED_AT_ONCE)):
        yield from zip(batch, encode_texts([passage.text for passage in batch], tokenizer), strict=True)


def _check_size(
    packed: _Packed, side: str, domain: DomainConfig, source: str, budget: int, block_size: int, note: str
) -> None:
    used = packed.tokens.size
    if used == 0:
        found = f"{packed.available} tokens, fewer than one block of {block_size}" if packed.available else "no text"
        raise DataError(
            f"domain {domain.name!r}, {source}: the {side} part holds {found}{note}; "
            f"give more text or set a smaller data.block_size"
        )
    if used < budget // block_size * block_size:
        logger.warning(
            "domain %s: the %s part holds %d tokens, fewer than the %d asked for; using %d (%s of %d)%s",
            domain.name, side, packed.available, budget, used, plural(len(packed.tokens), "block"), block_size, note,
        )  # fmt: skip


def _content_hash(data: DataConfig, separator: int, train: _Packed, validation: _Packed) -> str:
    """SHA-256 over the settings and both sides' tokens, the same on machines of either byte order."""
    settings = (data.train_tokens, data.validation_tokens, data.block_size, data.seed, separator)
    digest = hashlib.sha256(repr(settings).encode())
    for packed in (train, validation):
        digest.update(repr(packed.tokens.shape).encode())
        digest.update(packed.tokens.astype("<i8").tobytes())
    return digest.hexdigest()
