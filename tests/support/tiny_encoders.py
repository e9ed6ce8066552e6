"""Random encoders of a few thousand weights with a small tokenizer of their own, as a user's model folders."""

import random
from pathlib import Path

import torch
import transformers as hf
from tokenizers import processors

from support.files import write_rows as write_rows
from support.tiny_base import byte_tokenizer, sharpen

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
VOCABULARY = len(SPECIAL) + 256


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """One token a byte, with RoBERTa's special tokens and pairs."""
    names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    pairs = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return byte_tokenizer(SPECIAL, pairs, bos_token="<s>", eos_token="</s>", **names)


def bert_tokenizer() -> hf.PreTrainedTokenizerFast:
    """The same tokens, joined as BERT joins a pair, and without an end-of-text token."""
    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
    made.eos_token = made.bos_token = None
    return made


_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"intermediate_size": 48, "pad_token_id": 1}
_PLACES = {"max_position_embeddings": 512}
_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "bos_token_id": 0, "eos_token_id": 2}
_DISTIL = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "pad_token_id": 1}
CONFIGS = {
    "roberta": lambda: hf.RobertaConfig(**_SIZES, **_ROBERTA),
    "bert": lambda: hf.BertConfig(**_SIZES, **_PLACES),
    "deberta-v2": lambda: hf.DebertaV2Config(**_SIZES, **_PLACES, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "distilbert": lambda: hf.DistilBertConfig(**_DISTIL),
}


def folder(path: Path, kind: str = "roberta", seed: int = 0) -> Path:
    """Write a tiny encoder with the masked-LM head it was 'pretrained' with, and its tokenizer."""
    torch.manual_seed(seed)
    sharpen(hf.AutoModelForMaskedLM.from_config(CONFIGS[kind]())).save_pretrained(path)
    (bert_tokenizer() if kind == "bert" else tokenizer()).save_pretrained(path)
    return path


def rule_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows with a rule that a classifier can learn: the label is the vowel that the text is full of."""
    generator, rows = random.Random(seed), []
    for _ in range(count):
        label = generator.choice(["many-a", "many-o"])
        letters = ("aaab" if label == "many-a" else "ooob") + "cd"
        text = "".join(generator.choice(letters) for _ in range(generator.randint(6, 12)))
        rows.append({"text": text, "label": label})
    return rows


def plan(base: Path, domain: Path, **changes) -> dict:
    """A plan of seconds over one domain of labelled rows, as nested values."""
    values = {
        "model": {"name": str(base), "dtype": "fp32", "device": "cpu"},
        "data": {"task": "classify", "domains": [f"{domain.stem}={domain}"]},
        "methods": ["gain-ffn"],
        "train": {"batch_size": 8, "checkpoint_steps": 3},
        "evaluate": {"bootstrap_samples": 50, "batch_size": 16},
        "classify": {"max_length": 64},
    }
    for section, fields in changes.items():
        values[section] = {**values[section], **fields} if isinstance(fields, dict) else fields
    return values
