"""What the papers' recipes fetch from the Hub, in the Hub's layouts and schemas, with a few weights and rows.

A model has its family's classes, weight names, shards and tokenizer, and its own number of positions; it is tiny. A
data set has its configurations, splits, columns and label names; its files are Parquet or JSON, as on the Hub.
"""

import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pyarrow.parquet as parquet
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GPT2_END = "<|endoftext|>"
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
PICKLED = "pytorch_model.bin"  # lies beside the safetensors in most repositories, and is never read


def write(root: Path) -> None:
    """Write every model and data set of the papers' recipes into a hub's folder."""
    models_of_the_hub(root / "models")
    data_sets_of_the_hub(root / "datasets")


def models_of_the_hub(root: Path) -> None:
    """Write every model that a paper names."""
    causal, llama = hf.AutoModelForCausalLM, {"tokenizer": _sentencepiece, "shards": True}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 260, "hidden_size": 64}  # the largest rank
    gpt2 = hf.GPT2Config(
        vocab_size=257, n_embd=32, n_layer=3, n_head=4, n_positions=1024, bos_token_id=256, eos_token_id=256
    )
    _model(root / "openai-community/gpt2-large", causal, gpt2, _gpt2)
    mistral = {"max_position_embeddings": 32768, "sliding_window": 4096, "rms_norm_eps": 1e-5, "dtype": "bfloat16"}
    _model(
        root / "mistralai/Mistral-7B-v0.1",
        causal,
        hf.MistralConfig(**{**SIZES, **mistral, **ends}, num_key_value_heads=2),
        **llama,
    )
    for size, heads in (("7b", 4), ("13b", 4), ("70b", 2)):
        config = hf.LlamaConfig(
            **{**SIZES, **ends},
            max_position_embeddings=4096,
            num_key_value_heads=heads,
            rms_norm_eps=1e-5,
            dtype="float16",
        )
        sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096}
        _model(root / f"meta-llama/Llama-2-{size}-hf", causal, config, generation=sampling, **llama)
    qwen = {"max_position_embeddings": 131072, "num_key_value_heads": 2, "vocab_size": 264, "dtype": "bfloat16"}
    qwen |= {"bos_token_id": 256, "eos_token_id": 256, "rope_theta": 1e6}
    _model(root / "Qwen/Qwen2.5-7B", causal, hf.Qwen2Config(**SIZES, **qwen), _qwen, shards=True)
    roberta = {"vocab_size": 261, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    roberta |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    _model(
        root / "FacebookAI/roberta-base",
        hf.AutoModelForMaskedLM,
        hf.RobertaConfig(**{**SIZES, "hidden_size": 64}, **roberta),
        _roberta,
    )


def _model(
    folder: Path,
    kind: Any,
    config: hf.PreTrainedConfig,
    tokenizer: Callable[[Path], None],
    shards: bool = False,
    generation: Mapping[str, Any] | None = None,
) -> None:
    torch.manual_seed(len(folder.as_posix()))
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)  # as peaked as a trained model, so that adapting changes what it says
        if kind is hf.AutoModelForCausalLM and shards:  # and its answers end soon: one feature calls for the end
            model.get_input_embeddings().weight[:, 0] = 3
            model.get_output_embeddings().weight[config.eos_token_id, 0] = 4
            for layer in model.model.layers:
                for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    module.weight[0] *= 0.01  # not 0: DoRA divides by a row's norm
    if generation:
        model.generation_config = hf.GenerationConfig(**generation, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder, max_shard_size="40KB" if shards else "1GB")
    assert shards == (folder / "model.safetensors.index.json").is_file()
    if config.model_type == "gpt2":  # an old file: no prefix, and the causal masks are in it
        weights = {
            name.removeprefix("transformer."): value for name, value in load_file(folder / "model.safetensors").items()
        }
        mask = torch.tril(torch.ones(1, 1, config.n_positions, config.n_positions))
        weights |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(config.n_layer)}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / PICKLED).write_bytes(b"never read")
    tokenizer(folder)


def _byte_level(folder: Path, special: Iterable[str], settings: Mapping[str, Any], post: Any = None) -> None:
    """Write a tokenizer of bytes as GPT-2's and its heirs' are stored."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = list(ROBERTA) if post else []
    vocabulary = {token: number for number, token in enumerate([*first, *letters, *special])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = post or processors.ByteLevel(trim_offsets=False)
    made.add_special_tokens([*first, *special])
    made.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _gpt2(folder: Path) -> None:
    _byte_level(folder, [GPT2_END], {"model_max_length": 1024})


def _roberta(folder: Path) -> None:
    _byte_level(folder, [], {"model_max_length": 512}, processors.RobertaProcessing(("</s>", 2), ("<s>", 0)))


def _qwen(folder: Path) -> None:
    special = [GPT2_END, "<|im_start|>", "<|im_end|>"]
    named = {"bos_token": None, "eos_token": GPT2_END, "pad_token": GPT2_END, "unk_token": None}
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    )
    settings = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131072, "add_bos_token": False, **named}
    added = {str(256 + n): {"content": token, "special": True} for n, token in enumerate(special)}
    _byte_level(folder, special, {**settings, "chat_template": template, "added_tokens_decoder": added})


def _sentencepiece(folder: Path) -> None:
    """Write a tokenizer of Llama's kind: byte fallback, a mark for the space, and a beginning of text."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}, "▁": 259}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, **named}
    settings["model_max_length"] = 1000000000000000019884624838656
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(named), encoding="utf-8")


WORDS = ("cell", "sea", "of", "patient", "market", "film", "rose", "fell", "gave", "two", "trial", "letter", "was")
Rows = list[dict[str, Any]]


def prose(seed: str, count: int, words: int = 8) -> list[str]:
    """Return different short texts."""
    generator = random.Random(seed)
    return [f"{number} " + " ".join(generator.choices(WORDS, k=words)) + "." for number in range(count)]


UNSPLIT = 40  # rows of a set that gaintune splits; the seeds below are ones with many rows on the side to measure
FEW = 24


def data_sets_of_the_hub(root: Path) -> None:
    """Write every data set that the catalogue, the question sets and lm-eval's tasks name."""
    _texts(root)
    _questions(root)
    _benchmarks(root)


def _texts(root: Path) -> None:
    for name in ("wikitext-103-raw-v1", "wikitext-2-raw-v1"):
        splits = {split: _articles(split, count) for split, count in {"test": 1, "train": 4, "validation": 3}.items()}
        _parquet(root / "Salesforce/wikitext", name, splits)
    books = [
        {"short_book_title": f"Book {n}", "publication_date": 1900, "url": "u", "text": text}
        for n, text in enumerate(prose("pg19", 2 * FEW, 12))
    ]
    _parquet(root / "emozilla/pg19", None, {"train": books[:FEW], "validation": books[FEW:], "test": books[:4]})
    titled = [{"title": f"book-{n}.epub.txt", "text": text} for n, text in enumerate(prose("open 1", UNSPLIT, 18))]
    _parquet(root / "lucadiliello/bookcorpusopen", None, {"train": titled})
    news = [
        {
            "title": "News",
            "text": text,
            "domain": "a.org",
            "date": "2017-01-01",
            "description": "",
            "url": "u",
            "image_url": "",
        }
        for text in prose("news 9", UNSPLIT, 18)
    ]
    _parquet(root / "vblagoje/cc_news", "plain_text", {"train": news})
    passages = [{"text": text} for text in prose("lambada 32", UNSPLIT, 10)]
    _jsonl(root / "EleutherAI/lambada_openai", {"default": {"test": ("data/lambada_test_en.jsonl", passages)}})
    labels = datasets.ClassLabel(names=["negative", "positive"])
    films = [{"idx": n, "sentence": text, "label": n % 2} for n, text in enumerate(prose("sst2", 2 * FEW))]
    hidden = [{**row, "label": -1} for row in films[:4]]
    splits = {"train": films[:FEW], "validation": films[FEW:], "test": hidden}
    _parquet(root / "stanfordnlp/sst2", None, splits, idx=datasets.Value("int32"), label=labels)
    news = [{"sentence": text, "label": n % 3} for n, text in enumerate(prose("finance 29", UNSPLIT, 10))]
    names = datasets.ClassLabel(names=["negative", "neutral", "positive"])
    _parquet(
        root / "atrost/financial_phrasebank",
        None,
        {"train": news[:24], "validation": news[24:30], "test": news[30:]},
        label=names,
    )
    answers = [
        (f"What is {n} and {n}? {text}", f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}")
        for n, text in enumerate(prose("gsm8k 38", UNSPLIT + 6, 3))
    ]
    solved = [{"question": question, "answer": answer} for question, answer in answers]
    for name in ("main", "socratic"):
        _parquet(root / "openai/gsm8k", name, {"train": solved[:UNSPLIT], "test": solved[UNSPLIT:]})
    long = [  # more than half a block of 512 each, and more blocks than a batch of 64: AdaLoRA needs two updates
        (f"What is {n} and {n}? {text}", f"{text} {text[::-1]} {2 * n}")
        for n, text in enumerate(prose("solved", 80, 13))
    ]
    meta = [
        {"type": "GSM_Rephrased", "query": question, "original_question": question, "response": answer}
        for question, answer in long
    ]
    folder = root / "meta-math/MetaMathQA"
    folder.mkdir(parents=True)
    (folder / "MetaMathQA-395K.json").write_text(json.dumps(meta, indent=1))
    tasks = [{"instruction": question, "response": answer} for question, answer in long]
    _lines(root / "ise-uiuc/Magicoder-Evol-Instruct-110K/data-evol_instruct-decontaminated.jsonl", tasks)


def _articles(seed: str, count: int) -> Rows:
    """Return WikiText's rows, which are lines: an article begins with a heading between empty ones."""
    lines = []
    for number, (first, second) in enumerate(
        zip(prose(seed, count, 40), prose(f"{seed} again", count, 40), strict=True)
    ):
        lines += ["", f" = Title {number} = \n", "", f" {first} \n", " = = Part = = \n", f" {second} \n"]
    return [{"text": line} for line in lines]


GLUE = {
    "cola": (("sentence",), ("unacceptable", "acceptable"), ("validation",)),
    "mnli": (
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("validation_matched", "validation_mismatched"),
    ),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("validation",)),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment"), ("validation",)),
    "sst2": (("sentence",), ("negative", "positive"), ("validation",)),
}


def _questions(root: Path) -> None:
    for name, (columns, labels, validations) in GLUE.items():

        def rows(seed: str, count: int, columns=columns, labels=labels) -> Rows:
            sides = [prose(f"{seed} {column}", count, 4) for column in columns]
            texts = [dict(zip(columns, row, strict=True)) for row in zip(*sides, strict=True)]
            return [{**text, "label": n % len(labels), "idx": n} for n, text in enumerate(texts)]

        splits = {"train": rows("train", 40), **{split: rows(split, 8) for split in validations}}
        _parquet(
            root / "nyu-mll/glue",
            name,
            splits,
            label=datasets.ClassLabel(names=list(labels)),
            idx=datasets.Value("int32"),
        )
    abstracts = [
        {
            "pubid": n,
            "question": f"Does {text}?",
            "context": {"contexts": [text, text[::-1]], "labels": ["METHODS", "RESULTS"], "meshes": ["Humans"]},
            "long_answer": text,
        }
        for n, text in enumerate(prose("medical 56", UNSPLIT, 8))
    ]
    folder = root / "qiaojin/PubMedQA"
    _parquet(folder, "pqa_unlabeled", {"train": abstracts})
    decided = [{**row, "final_decision": ("yes", "no", "maybe")[n % 3]} for n, row in enumerate(abstracts)]
    _parquet(folder, "pqa_labeled", {"train": decided})
    exam = [
        {
            "question": text,
            "answer": "two",
            "options": {"A": "one", "B": "two", "C": "both", "D": "none"},
            "meta_info": "step1",
            "answer_idx": "B",
            "metamap_phrases": ["trial"],
        }
        for text in prose("exam 22", UNSPLIT, 14)
    ]
    folder = root / "GBaker/MedQA-USMLE-4-options"
    _lines(folder / "phrases_no_exclude_train.jsonl", exam)
    _lines(
        folder / "phrases_no_exclude_test.jsonl",
        [{**row, "question": f"Asked: {row['question']}"} for row in exam[:10]],
    )


ROWS = 2  # of a benchmark's split
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


def _lettered(count: int) -> dict[str, list[str]]:
    return {"text": list(NUMBERS[1 : count + 1]), "label": list("ABCDE"[:count])}


def _benchmarks(root: Path) -> None:
    asked = [f"What comes after {word}" for word in NUMBERS[:ROWS]]
    four = [{"question": text, "choices": _lettered(4), "answerKey": "ABCD"[n]} for n, text in enumerate(asked)]
    _same(
        root / "allenai/ai2_arc", ("ARC-Easy", "ARC-Challenge"), [{"id": str(n), **row} for n, row in enumerate(four)]
    )
    stems = [{"id": str(n), "question_stem": row.pop("question"), **row} for n, row in enumerate(four)]
    _same(root / "allenai/openbookqa", ("main",), stems)
    five = [
        {"id": str(n), "question": text, "question_concept": "c", "choices": _lettered(5), "answerKey": "ABCDE"[n]}
        for n, text in enumerate(asked)
    ]
    _same(root / "tau/commonsense_qa", (None,), five)
    endings = [f"comes {word}." for word in NUMBERS[1:5]]
    swag = [
        {
            "ind": n,
            "activity_label": "Counting",
            "ctx_a": f"[header] {text} [title] Count on.",
            "ctx_b": "then",
            "ctx": text,
            "endings": endings,
            "source_id": "s",
            "split": "train",
            "split_type": "indomain",
            "label": str(n % 4),
        }
        for n, text in enumerate(prose("swag", FEW, 10))
    ]
    splits = {"train": swag[6:], "validation": swag[:6], "test": [{**row, "label": ""} for row in swag[:ROWS]]}
    _parquet(root / "Rowan/hellaswag", None, splits, ind=datasets.Value("int32"))
    goals = [{"goal": text, "sol1": "one", "sol2": "two", "label": n % 2} for n, text in enumerate(asked)]
    _same(root / "baber/piqa", (None,), goals, label=datasets.ClassLabel(names=["0", "1"]))
    schemas = [
        {"sentence": f"After {word} comes _ in order.", "option1": "one", "option2": "two", "answer": "1"}
        for word in NUMBERS[:ROWS]
    ]
    _same(root / "allenai/winogrande", ("winogrande_xl",), schemas)
    science = [
        {
            "question": text,
            "distractor3": "x",
            "distractor1": "y",
            "distractor2": "z",
            "correct_answer": "one",
            "support": text,
        }
        for text in asked
    ]
    _same(root / "allenai/sciq", (None,), science)
    boolq = [{"question": f"is {text}", "passage": text, "idx": n, "label": n % 2} for n, text in enumerate(asked)]
    _same(
        root / "aps/super_glue",
        ("boolq",),
        boolq,
        label=datasets.ClassLabel(names=["False", "True"]),
        idx=datasets.Value("int32"),
    )
    trivia = [
        {
            "question": text,
            "question_id": "q",
            "question_source": "s",
            "answer": {
                "aliases": ["One", "1"],
                "normalized_aliases": ["one", "1"],
                "value": "One",
                "normalized_value": "one",
                "type": "x",
            },
        }
        for text in asked
    ]
    _same(root / "mandarjoshi/trivia_qa", ("rc.nocontext",), trivia)
    _same(
        root / "google-research-datasets/nq_open",
        ("nq_open",),
        [{"question": text, "answer": ["one"]} for text in asked],
    )
    medqa = [
        {"id": str(n), "sent1": text, "sent2": "", **{f"ending{n}": NUMBERS[n] for n in range(4)}, "label": n}
        for n, text in enumerate(asked)
    ]
    folder = root / "GBaker/MedQA-USMLE-4-options-hf"
    for split in ("train", "dev", "test"):
        _lines(folder / f"{split}.json", medqa)
    programs = [
        {
            "task_id": f"HumanEval/{n}",
            "prompt": f'def add_{n}(x: int) -> int:\n    """Add {n}."""\n',
            "entry_point": f"add_{n}",
            "canonical_solution": f"    return x + {n}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {1 + n}\n",
        }
        for n in range(FEW)
    ]
    _parquet(root / "openai/openai_humaneval", "openai_humaneval", {"test": programs})
    exams = [
        {"question": text, "subject": "s", "choices": list(NUMBERS[1:5]), "answer": n % 4}
        for n, text in enumerate(asked)
    ]
    letters = datasets.ClassLabel(names=list("ABCD"))
    for subject in mmlu_subjects():
        _parquet(root / "cais/mmlu", subject, {"test": exams[:1], "validation": exams, "dev": exams}, answer=letters)


def mmlu_subjects() -> list[str]:
    """Return the names of MMLU's 57 configurations, as lm-eval's task files have them."""
    folder = Path(lm_eval.tasks.__path__[0], "mmlu", "default")
    stated = [re.search(r'"?dataset_name"?: "?(\w+)', file.read_text()) for file in sorted(folder.glob("mmlu_*.yaml"))]
    return [name[1] for name in stated if name]


def _same(folder: Path, configurations: Iterable[str | None], rows: Rows, **features: Any) -> None:
    for name in configurations:
        _parquet(folder, name, dict.fromkeys(("train", "validation", "test"), rows), **features)


def _parquet(folder: Path, configuration: str | None, splits: Mapping[str, Rows], **features: Any) -> None:
    """Write a configuration as Parquet, `features` in place of the ones its rows suggest, and list it in the card."""
    inside = configuration or "data"
    (folder / inside).mkdir(parents=True)
    for split, rows in splits.items():
        columns = {**datasets.Dataset.from_list(rows).features, **features}
        made = datasets.Dataset.from_list(rows, features=datasets.Features(columns))
        parquet.write_table(made.data.table, folder / inside / f"{split}-00000-of-00001.parquet")
    lines = [f"- config_name: {configuration or 'default'}", "  data_files:"]
    for split in splits:
        lines += [f"  - split: {split}", f"    path: {inside}/{split}-*"]
    _card(folder, lines)


def _jsonl(folder: Path, configurations: Mapping[str, Mapping[str, tuple[str, Rows]]]) -> None:
    for name, splits in configurations.items():
        lines = [f"- config_name: {name}", "  data_files:"]
        for split, (file, rows) in splits.items():
            _lines(folder / file, rows)
            lines += [f"  - split: {split}", f"    path: {file}"]
        _card(folder, lines)


def _card(folder: Path, lines: list[str]) -> None:
    card = folder / "README.md"
    before = card.read_text().removesuffix("---\n") if card.exists() else "---\nconfigs:\n"
    card.write_text(before + "".join(f"{line}\n" for line in lines) + "---\n")


def _lines(file: Path, rows: Rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
