"""A tiny byte-level tokenizer, and short ways to write domain files."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from support.files import write_rows as write_file

END_OF_TEXT = "<|end|>"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with few merges, so that a character outside ASCII is several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(["the cat and the hat and the bat sat on the mat"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write texts as a .jsonl file below the test's folder."""
    return lambda name, texts: write_file(tmp_path / name, ({"text": text} for text in texts))


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with ChatML's markers and template, and a beginning of text that the template writes itself."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|begin|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|begin|> $A", "<|begin|> $A $B", [("<|begin|>", made.bos_token_id)]
    )
    made.chat_template = (
        "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made
