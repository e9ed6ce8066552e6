"""From a plan's domain to blocks of tokens: drawn by the seed, encoded, without near-duplicates, packed or masked."""

from __future__ import annotations

import hashlib
import logging
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from gaintune.config import DataConfig, DomainConfig, Template
from gaintune.data.documents import (
    Document,
    Documents,
    Passage,
    drawn_order,
    in_drawn_order,
    read_some,
    split_documents,
)
from gaintune.data.domains import characters_needed, load_documents, load_exchanges
from gaintune.data.encode import (
    Encoded,
    beginning_of_text,
    encode_parts,
    encode_texts,
    end_of_text,
    render,
    special_tokens,
)
from gaintune.data.examples import IGNORED, DomainBlocks, Examples, Packed, TokenRow, pack
from gaintune.data.exchanges import Exchange
from gaintune.data.neighbours import NeighbourIndex
from gaintune.errors import BaseModelError, ConfigError, DataError
from gaintune.progress import plural

logger = logging.getLogger(__name__)

ENCODED_AT_ONCE = 16
NAMED_ROWS = 5
COMMON_SHARE = 0.05  # words that more than this share of the prompts have in common make no near-duplicates

MASKED_SHARE = 0.15  # of a block's tokens that are to be predicted, special ones not counted
SHOWN_AS_MASK, SHOWN_AS_OTHER = 0.8, 0.1  # shares of those that are shown as the mask token, and as another token
SPECIAL_TOKENS = 2  # special tokens around a block


def load_domain(domain: DomainConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> DomainBlocks:
    """Load, split and pack a domain within its budgets, for the task its plan names.

    Raises:
        DataError: the data are missing, broken, or too little on one side; the file and line are named.
        ConfigError: the domain is a classifier's, or the model lacks the chat template that is asked for.
        AssetError: a download failed.
        BaseModelError: the tokenizer has no end-of-text token.
    """
    task = data.task_of(domain)
    if task == "classify":
        raise ConfigError(
            f"domain {domain.name!r} has task classify, and this is for text and instructions alone: `gaintune "
            "adapt` and `gaintune evaluate` take classifiers, and PEFT loads one with its head onto the base"
        )
    builder = InstructionBlocks if task == "instruct" else TextBlocks
    return builder(domain, data, tokenizer).build()


class BlockBuilder(ABC):
    """Builder of a domain's blocks of tokens; subclasses say how text and instructions differ.

    Documents are drawn in an order the seed decides until a side's budget is full. A domain smaller than a budget is
    used up, with a warning. Validation text does not depend on the training budget, except that near-duplicates of what
    is trained on are left out. Errors are those of `load_domain`.

    `noun` is what is compared to find near-duplicates, and `common` is as for `NeighbourIndex`; the content hash goes
    over the `hashed` tensors of both sides.
    """

    noun: str
    common: float | None = None
    hashed: tuple[str, ...]

    def __init__(self, domain: DomainConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load the documents of a domain and split them."""
        self.domain, self.data, self.tokenizer = domain, data, tokenizer
        self.begin, self.end = beginning_of_text(tokenizer, data.beginning_of_text), end_of_text(tokenizer)
        self.documents = self.split(characters_needed(data))

    @abstractmethod
    def split(self, characters: int) -> Documents[Any]:
        """Load at least so many characters of each side, and split what has no split of its own."""

    @abstractmethod
    def draw(self, source: Sequence[Any], side: str) -> Iterator[Passage]:
        """Draw from the documents of a side, in an order that the seed decides."""

    @abstractmethod
    def pack(self, source: Sequence[Any], passages: Iterator[Passage], budget: int) -> Packed:
        """Pack passages into blocks until the budget is full."""

    @abstractmethod
    def check(self, packed: Packed, source: Sequence[Any], side: str, budget: int, note: str = "") -> None:
        """Refuse a side without blocks, and warn of a budget that is not met; `note` says what was left out."""

    def settings(self) -> tuple[Any, ...]:
        """Return what decides the blocks beside the budgets, for their hash."""
        return (self.end,)

    def build(self) -> DomainBlocks:
        """Fill the blocks of both sides."""
        data, train_source, held_out = self.data, self.documents.train, self.documents.validation
        train = self.pack(train_source, self.draw(train_source, "train"), data.train_tokens)
        self.check(train, train_source, "training", data.train_tokens)
        trained_on = NeighbourIndex(((passage.document, passage.text) for passage in train.passages), self.common)
        removed: set[int] = set()

        def is_new(passage: Passage) -> bool:
            if passage.text in trained_on:
                removed.add(passage.document)
                return False
            return True

        new = filter(is_new, self.draw(held_out, "validation"))
        validation = self.pack(held_out, new, data.validation_tokens)
        note = ""
        if removed:
            note = f", after {len(removed)} near-duplicate(s) of training {self.noun}s were left out"
            named = ", ".join(held_out[number].origin for number in sorted(removed)[:3])
            logger.info(
                "domain %s: left %d validation %s(s) out, near-duplicates of training %ss: %s%s",
                self.domain.name, len(removed), self.noun, self.noun, named, ", ..." if len(removed) > 3 else "",
            )  # fmt: skip
        self.check(validation, held_out, "validation", data.validation_tokens, note)
        return DomainBlocks(
            name=self.domain.name,
            train=train.examples,
            validation=validation.examples,
            validation_bytes=validation.bytes,
            content_hash=self._content_hash(train, validation),
            train_documents=train.documents,
            validation_documents=validation.documents,
            removed_near_duplicates=len(removed),
            beginning=train.beginning,
        )

    def _content_hash(self, *sides: Packed) -> str:
        """Return the SHA-256 over settings and both sides' tensors, the same on machines of either byte order."""
        data = self.data
        settings = (data.train_tokens, data.validation_tokens, data.block_size, data.seed, *self.settings())
        digest = hashlib.sha256(repr(settings).encode())
        for packed in sides:
            for tensor in (tensor for name, tensor in packed.examples[:].items() if name in self.hashed):
                digest.update(repr(tuple(tensor.shape)).encode())
                digest.update(tensor.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


class TextBlocks(BlockBuilder):
    """Blocks of running text.

    Documents are joined with the tokenizer's end-of-text token; what is beyond the last whole block of the budget is
    left out. Where `data.beginning_of_text` or the model calls for it, every block begins with the beginning-of-text
    token and holds one token of text less.
    """

    noun, hashed = "document", ("input_ids",)

    def split(self, characters: int) -> Documents[Document]:
        return split_documents(load_documents(self.domain, characters=characters), self.data.seed)

    def draw(self, source: Sequence[Document], side: str) -> Iterator[Passage]:
        return in_drawn_order(source, self.data.seed, side, self.data.block_size)

    def pack(self, source: Sequence[Document], passages: Iterator[Passage], budget: int) -> Packed:
        room = self.data.block_size - len(self.begin)
        wanted = budget // self.data.block_size * room
        ids, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        starts: list[tuple[int, Passage]] = []
        available = 0
        for passage, encoded in self._encoded(passages):
            if available >= wanted:
                break
            if starts:
                ids.append(np.array([self.end]))
                sizes.append(np.array([0]))
                available += 1
            starts.append((available, passage))
            ids.append(encoded.ids)
            sizes.append(encoded.bytes)
            available += len(encoded.ids)
        kept = min(available, wanted) // room * room
        rows, counted = (np.concatenate(pieces)[:kept].reshape(-1, room) for pieces in (ids, sizes))
        first = np.tile(np.array(self.begin, np.int64), (len(rows), 1))
        scored = counted if self.begin else counted[:, 1:]  # the first token of a block is not
        return Packed(
            examples=Examples.of_blocks(torch.from_numpy(np.concatenate([first, rows], axis=1))),
            bytes=tuple(scored.sum(axis=1).tolist()),
            passages=tuple(passage for start, passage in starts if start < kept),
            available=available + len(self.begin) * math.ceil(available / room),
            beginning=self.begin[0] if self.begin else None,
        )

    def _encoded(self, passages: Iterator[Passage]) -> Iterator[tuple[Passage, Encoded]]:
        """Tokenize a few passages at a time: in parallel where the tokenizer can, and hardly beyond what is needed."""
        while batch := list(islice(passages, ENCODED_AT_ONCE)):
            yield from zip(batch, encode_texts([passage.text for passage in batch], self.tokenizer), strict=True)

    def check(self, packed: Packed, source: Sequence[Document], side: str, budget: int, note: str = "") -> None:
        used, size = packed.examples.tokens, self.data.block_size
        if used == 0:
            few = f"{packed.available} tokens, fewer than one block of {size}" if packed.available else "no text"
            raise DataError(
                f"domain {self.domain.name!r}, {self.documents.source}: the {side} part holds {few}{note}; "
                f"give more text or set a smaller data.block_size"
            )
        if used < budget // size * size:
            logger.warning(
                "domain %s: the %s part holds %d tokens, fewer than the %d asked for; using %d (%s of %d)%s",
                self.domain.name, side, packed.available, budget, used, plural(used // size, "block"), size, note,
            )  # fmt: skip


class InstructionBlocks(BlockBuilder):
    """Blocks of instructions and their completions, written in a template, padding included.

    Rows whose questions differ by case, spacing or punctuation alone are on the same side. Scored are the completions
    and, unless `data.end_of_text` is false, the end-of-text token after them. A row longer than a block is cut and
    counted in a warning; one whose prompt leaves no room for the completion is refused.
    """

    noun, hashed = "prompt", ("input_ids", "labels", "position_ids")
    common = COMMON_SHARE

    def split(self, characters: int) -> Documents[Exchange]:
        rows = load_exchanges(self.domain, characters=characters)
        return split_documents(rows, self.data.seed, attrgetter("question"))

    def draw(self, source: Sequence[Exchange], side: str) -> Iterator[Passage]:
        order = drawn_order(len(source), self.data.seed, side)
        for number, row in zip(order.tolist(), read_some(source, order), strict=True):
            yield Passage(row.question, number)

    def pack(self, source: Sequence[Exchange], passages: Iterator[Passage], budget: int) -> Packed:
        data, template = self.data, self.data.template_of(self.domain)
        ends = [self.end] if data.end_of_text else []
        rows = token_rows(source, passages, template, self.tokenizer, self.begin, ends)
        blocks = budget // data.block_size
        return pack(rows, block_size=data.block_size, blocks=blocks, filler=self.end, packing=data.packing)

    def settings(self) -> tuple[Any, ...]:
        return (self.data.template_of(self.domain), self.data.packing, self.end)

    def check(self, packed: Packed, source: Sequence[Exchange], side: str, budget: int, note: str = "") -> None:
        name, size = self.domain.name, self.data.block_size
        if packed.refused:
            named = []
            for refused in packed.refused[:NAMED_ROWS]:
                row = source[refused.passage.document]
                counts = f"a prompt of {refused.prompt} tokens, {len(refused.ids)} with its completion"
                named.append(f"{row.origin} (row {row.row}): {counts}")
            more = f"; and {len(packed.refused) - NAMED_ROWS} more" if len(packed.refused) > NAMED_ROWS else ""
            needed = max(len(row.ids) for row in packed.refused)
            raise DataError(
                f"domain {name!r}: {len(packed.refused)} row(s) whose prompt fills a block of {size} tokens, so that "
                f"nothing of the completion is left: {'; '.join(named)}{more}. Set data.block_size={needed} or more, "
                f"or shorten or delete these rows"
            )
        blocks, used, rows = len(packed.examples), packed.examples.tokens, packed.documents
        if not blocks:
            raise DataError(f"domain {name!r}, {self.documents.source}: the {side} part holds no rows{note}; give more")
        if packed.cut:
            logger.warning(
                "domain %s: %d of %d %s rows are longer than a block of %d tokens and are cut; the longest has %d "
                "tokens: raise data.block_size to keep them whole",
                name, packed.cut, rows, side, size, packed.longest,
            )  # fmt: skip
        if blocks < budget // size:
            logger.warning(
                "domain %s: the %s part fills %d tokens, fewer than the %d asked for; using %s of %d%s",
                name, side, used, budget, plural(blocks, "block"), size, note,
            )  # fmt: skip
        logger.info(
            "domain %s: %d %s rows in %d blocks of %d tokens, %.0f %% of them padding",
            name, rows, side, blocks, size, 100 * packed.padding / used,
        )  # fmt: skip


def token_rows(
    source: Sequence[Exchange],
    passages: Iterator[Passage],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    begin: list[int],
    end: list[int],
) -> Iterator[TokenRow]:
    """Write the rows of passages and tokenize them, a few at a time, in parallel where that works.

    `begin` comes before every row that has not written it itself, as most chat templates do; `end` after every row that
    does not bring its own end of turn.
    """
    special = np.array(sorted(special_tokens(tokenizer)))
    while batch := list(islice(passages, ENCODED_AT_ONCE)):
        numbers = [passage.document for passage in batch]
        rendered = [render(row, template, tokenizer) for row in read_some(source, numbers)]
        encoded = encode_parts([[part.text for part in text.parts] for text in rendered], tokenizer)
        for passage, text, pieces in zip(batch, rendered, encoded, strict=True):
            written = np.concatenate([piece.ids for piece in pieces])
            before = [] if written[:1].tolist() == begin else begin
            after = [] if text.ends else end
            ids = np.concatenate([before, written, after]).astype(np.int64)
            scored = np.repeat(
                [False, *(part.scored for part in text.parts), True],
                [len(before), *(len(piece.ids) for piece in pieces), len(after)],
            )
            counted = np.concatenate([[0] * len(before), *(piece.bytes for piece in pieces), [0] * len(after)])
            counted[np.isin(ids, special)] = 0
            scored[0] = False  # nothing of its own row comes before it
            yield TokenRow(ids, scored, counted.astype(np.int64), passage)


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
        BaseModelError: the tokenizer lacks the special tokens of an encoder; other errors are those of `load_domain`.
    """
    inner = data.model_copy(update={"block_size": data.block_size - SPECIAL_TOKENS, "beginning_of_text": "never"})
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
        chosen = generator.permutation(eligible)[: max(1, round(MASKED_SHARE * len(eligible)))]
        fate = generator.random(len(chosen))
        others = generator.choice(ordinary, len(chosen))
        shown, wanted = block.copy(), np.full_like(block, IGNORED)
        wanted[chosen] = block[chosen]
        kept = np.where(fate < SHOWN_AS_MASK + SHOWN_AS_OTHER, others, block[chosen])
        shown[chosen] = np.where(fate < SHOWN_AS_MASK, mask, kept)
        seen.append(np.concatenate([[begin], shown, [end]]))
        labels.append(np.concatenate([[IGNORED], wanted, [IGNORED]]))
    return MaskedBlocks(name, torch.from_numpy(np.stack(seen)), torch.from_numpy(np.stack(labels)))
