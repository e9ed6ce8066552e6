"""Estimate a plan's memory and time before anything is loaded, from the shapes of its model alone.

One training step and one forward pass of the evaluation run on fake tensors, which have shapes and no values. They run
through the code that trains: `attach`, the objectives, activation checkpointing. Every storage is counted once, from
its first use until it is freed. Two short models of the same layers give the whole one: a model's bytes are a constant
and a multiple of its layers.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.pytorch_utils import Conv1D

from gaintune.config import MethodConfig, ModelConfig, Plan, read_plan
from gaintune.data import replayed_rows
from gaintune.errors import ConfigError, GaintuneError, one_line
from gaintune.evaluate import LabelLoss
from gaintune.methods import Precision, PreparedMethod, StagePosition, attach, check_method, prepare_method, rules_of
from gaintune.models import NextTokenLoss, autocast, is_hub_id, locate, resolve_device, without_adapter
from gaintune.storage import process_count
from gaintune.training import checkpoint_activations, count_updates
from gaintune.workflows.ledger import Ledger, fused_attention, made_fake, undisturbed

logger = logging.getLogger(__name__)

GB = 10**9
HEADROOM = 0.92  # share of a GPU that tensors may fill; its context, workspaces and gaps between tensors take the rest
LABELS = 3  # of a classifier, whose labels are not known before its rows are read
SHORT, LONGER = 2, 3  # layers of the two models that give the whole one; the first layer differs from the others
NF4_BLOCK, NF4_BLOCKS = 64, 256  # weights that share a scale of one byte, and scales that share one of four

PAPER_MODELS: dict[str, dict[str, Any]] = {
    "openai-community/gpt2-large": {
        "model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20, "vocab_size": 50257, "n_positions": 1024,
    },
    "mistralai/Mistral-7B-v0.1": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768,
    },
    "meta-llama/Llama-2-7b-hf": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "meta-llama/Llama-2-13b-hf": {
        "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "meta-llama/Llama-2-70b-hf": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "FacebookAI/roberta-base": {
        "model_type": "roberta", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
        "pad_token_id": 1,
    },
    "Qwen/Qwen2.5-7B": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Public config values of the papers' models, so that no hub is needed for them."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each device while one method trains, and while it is measured.

    Attributes:
        weights: all frozen weights, quantized ones as they are stored.
        trained: trained parameters, their gradients, AdamW's two averages, and what rules keep beside them.
        activations: what the forward pass keeps for the backward pass.
        loss: the most that the loss takes beside these.
        training: the most at any moment of training. Gradients appear while activations go, so that it may be less
            than the sum of the parts.
        evaluation: the most while the model is measured.
    """

    weights: int
    trained: int
    activations: int
    loss: int
    training: int
    evaluation: int

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return max(self.training, self.evaluation)


@dataclass(frozen=True)
class MethodEstimate:
    """Memory and time of one method of a plan.

    Attributes:
        memory: bytes on each device.
        tokens: training tokens over all domains and epochs, at most; 0 for a classifier whose rows are not limited.
        updates: updates over all domains, at most.
        fits: whether it fits the devices; None if their memory was not given.
        settings: keys of the plan to set, with their values, where it does not fit and something helps.
        advice: the same in words, with the bytes that are left; or why nothing helps.
        seconds: training time; None if no pace was given.
    """

    label: str
    memory: Memory
    tokens: int
    updates: int
    fits: bool | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a plan, method by method, on `devices` with `device_memory` bytes each (None: not given)."""

    model: str
    devices: int
    device_memory: int | None
    methods: tuple[MethodEstimate, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, bytes and seconds."""
        values = asdict(self)
        for method, written in zip(self.methods, values["methods"], strict=True):
            written["memory"]["peak"] = method.memory.peak
        return values


def estimate_plan(
    plan: Plan | Mapping[str, Any] | str | Path,
    *,
    devices: int = 1,
    device_memory: int | None = None,
    architecture: str | Path | None = None,
    tokens_per_second: float | Mapping[str, float] | None = None,
) -> Estimate:
    """Estimate what a plan takes: bytes on each device, and time. Of the model only its config is read.

    Args:
        plan: a `Plan`, nested values, or the path of a YAML plan.
        devices: how many devices work on it, a process each; one process if `model.device_map` spreads the model.
        device_memory: bytes of each device, which then counts as a GPU with bf16, whatever this machine has.
        architecture: folder with the model's config.json, where neither the hub nor a folder of the model has it.
        tokens_per_second: pace of one process, or the pace of each method by its label.

    Raises:
        ConfigError: an impossible plan, or a model whose config cannot be read.
    """
    plan = read_plan(plan)
    folder = None if architecture is None else str(architecture)
    gpu = device_memory is not None or resolve_device(plan.model.device).type == "cuda"
    if gpu and not torch.cuda.is_available():
        dtype = "bf16" if plan.model.dtype == "auto" else plan.model.dtype
        plan = plan.model_copy(update={"model": plan.model.model_copy(update={"device": "cpu", "dtype": dtype})})
    estimates = []
    for config in plan.methods:
        case = _Case.of_plan(plan, config, devices, gpu=gpu, architecture=folder)
        memory = _memory(case)
        fits = None if device_memory is None else memory.peak <= HEADROOM * device_memory
        settings, advice = ({}, "") if fits is not False else _advice(case, plan, devices, cast(int, device_memory))
        rows = _rows(plan, config)
        tokens = sum(rows) * case.length * plan.train.epochs
        updates = sum(count_updates(count, plan.train, case.processes) for count in rows)
        pace = tokens_per_second.get(config.label) if isinstance(tokens_per_second, Mapping) else tokens_per_second
        seconds = tokens / pace / case.processes if pace and tokens else None
        estimates.append(MethodEstimate(config.label, memory, tokens, updates, fits, settings, advice, seconds))
    return Estimate(plan.model.name, devices, device_memory, tuple(estimates))


def _rows(plan: Plan, method: MethodConfig) -> list[int]:
    """Count the most training rows of every domain, replayed ones among them."""
    if plan.classifies:
        return [plan.classify.train_rows or 0]
    own = plan.data.train_tokens // plan.data.block_size
    return [own + bool(n) * replayed_rows(own, method.replay) for n in range(len(plan.data.domains))]


def require_memory(plan: Plan) -> None:
    """Refuse training that cannot fit the CUDA devices of this process, before anything is loaded.

    Raises:
        ConfigError: the numbers of the first method that does not fit, and what to set.
    """
    for reason in unfit_methods(plan).values():
        raise ConfigError(reason)


def unfit_methods(plan: Plan) -> dict[str, str]:
    """Return the methods that cannot fit the CUDA devices of this process, each with the numbers and what to set.

    There are none on a CPU, and none among methods and models that cannot be estimated.
    """
    memory = device_memory(plan.model)
    if memory is None:
        return {}
    devices = torch.cuda.device_count() if plan.model.device_map else process_count()
    unfit = {}
    for config in plan.methods:
        alone = plan.model_copy(update={"methods": (config,)})
        try:
            (method,) = estimate_plan(alone, devices=max(1, devices), device_memory=memory).methods
        except Exception as error:  # config classes, remote code and operators without shapes each have their own
            logger.info("the memory of %s is not estimated: %s", config.label, one_line(error)[:300])
            continue
        if method.memory.peak > memory:
            parts = {"weights": method.memory.weights, "trained state": method.memory.trained}
            parts |= {"activations": method.memory.activations, "loss": method.memory.loss}
            listed = ", ".join(f"{name} {in_gb(size)}" for name, size in parts.items())
            unfit[method.label] = (
                f"method {method.label!r} takes about {in_gb(method.memory.peak)} on a device of {in_gb(memory)} "
                f"({listed}): {method.advice}"
            )
    return unfit


def device_memory(model: ModelConfig) -> int | None:
    """Return the bytes of the CUDA device that a base would be loaded on; None on the CPU."""
    device = resolve_device(model.device)
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def read_bytes(text: str) -> int:
    """Read an amount of memory such as 80GB (10^9 bytes) or 80GiB (2^30)."""
    units = {"KB": 10**3, "MB": 10**6, "GB": GB, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    amount = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]I?B)\s*", text.upper())
    if amount is None or float(amount[1]) == 0:
        raise ConfigError(f"{text!r} is no amount of memory: write it such as 80GB or 79.6GiB")
    return int(float(amount[1]) * units[amount[2]])


def read_pace(run: str | Path) -> dict[str, float]:
    """Read the tokens per second of a process in a run of `gaintune sequence`: the mean of each method's stages.

    Raises:
        ConfigError: it is no such run, or no stage of it was trained.
    """
    events = Path(run) / "events.jsonl"
    paces: dict[str, list[float]] = {}
    for line in events.read_text(encoding="utf-8").splitlines() if events.is_file() else ():
        with contextlib.suppress(ValueError, KeyError):  # the last line of a run that was killed
            event = json.loads(line)
            if event["event"] == "learnt":
                paces.setdefault(event["method"], []).append(event["tokens_per_second"])
    if not paces:
        raise ConfigError(f"{run}: no run of `gaintune sequence` that has trained a stage; give --tokens-per-second")
    return {label: sum(stages) / len(stages) for label, stages in paces.items()}


def in_gb(size: float) -> str:
    """Write bytes in GB of 10^9, with two digits or more."""
    return f"{size / GB:.{0 if size >= 10 * GB else 1 if size >= GB else 2}f} GB"


@dataclass(frozen=True)
class _Case:
    """Everything that decides the bytes of one method's step; `method` without label and rate, which do not."""

    model: ModelConfig
    architecture: str | None
    method: MethodConfig
    precision: Precision
    gpu: bool
    rows: int
    length: int
    evaluated_rows: int
    packed: bool
    classifies: bool
    accumulates: bool
    checkpointing: bool
    processes: int
    spread: int

    def __hash__(self) -> int:
        return hash(repr(self))  # a method's `config` is a dictionary, which has no hash of its own

    @classmethod
    def of_plan(cls, plan: Plan, config: MethodConfig, devices: int, *, gpu: bool, architecture: str | None) -> _Case:
        method = prepare_method(config, plan.model, plan.train)
        spread = devices if plan.model.device_map else 1
        tasks = {plan.data.task_of(domain) for domain in plan.data.domains}
        train, processes = plan.train, devices // spread
        return cls(
            model=plan.model.model_copy(update={"device_map": None}),
            architecture=architecture,
            method=config.model_copy(update={"label": "", "lr": None, "replay": 0.0}),
            precision=method.precision,
            gpu=gpu,
            rows=min(train.batch_size, max(_rows(plan, config)) or train.batch_size),
            length=plan.classify.max_length if plan.classifies else plan.data.block_size,
            evaluated_rows=plan.evaluate.batch_size,
            packed="instruct" in tasks and plan.data.packing,
            classifies=plan.classifies,
            accumulates=train.accumulation(processes) > 1,
            checkpointing=train.gradient_checkpointing,
            processes=processes,
            spread=spread,
        )


def _advice(case: _Case, plan: Plan, devices: int, device_memory: int) -> tuple[dict[str, Any], str]:
    """Find settings that make a method fit, and say so: smaller batches, recomputation, a spread base, last 4 bits."""

    def fits(setting: _Case) -> bool:
        return _memory(setting).peak <= HEADROOM * device_memory

    wanted = plan.train.rows_per_update(case.processes)
    ladders = list(filter(None, _ladders(case, wanted, devices)))
    for ladder in ladders:
        if fits(ladder[-1]):
            chosen = next(filter(fits, ladder))
            settings = _settings(case, chosen, wanted)
            words = " ".join(f"{key}={str(value).lower()}" for key, value in settings.items())
            return settings, f"set {words} ({in_gb(_memory(chosen).peak)})"
    on = "a device" if devices == 1 else f"each of {devices} devices"
    least = min((_memory(ladder[-1]) for ladder in ladders), key=lambda memory: memory.peak, default=_memory(case))
    if not check_method(case.method).quantized:
        return {}, (
            f"no setting helps: {case.method.name} works on the base's own weights, and keeps "
            f"{in_gb(least.weights + least.trained)} on {on} whatever the batch. Sharding them (FSDP2) is not "
            "supported here: take more memory, a smaller base, or a method that takes a quantized base"
        )
    return {}, f"no setting helps: it takes {in_gb(least.peak)} on {on} at least; take more memory, or a smaller base"


def _ladders(case: _Case, wanted: int, devices: int) -> Iterator[list[_Case]]:
    """Yield settings in the order of preference; those of a list differ in their batch, the largest first."""
    frozen = check_method(case.method).quantized
    bits = case.model.quantization
    for quantization in (bits, "4bit") if frozen and not bits else (bits,):
        for spread in dict.fromkeys((case.spread, devices if frozen else case.spread)):
            processes = devices // spread
            for checkpointing in dict.fromkeys((case.checkpointing, True)):
                yield [
                    replace(
                        case,
                        model=case.model.model_copy(update={"quantization": quantization}),
                        rows=rows,
                        spread=spread,
                        processes=processes,
                        checkpointing=checkpointing,
                        accumulates=rows * processes < wanted,
                    )
                    for rows in range(min(case.rows, wanted), 0, -1)
                    if wanted % (rows * processes) == 0
                ]


def _settings(case: _Case, chosen: _Case, wanted: int) -> dict[str, Any]:
    """Return the keys of a plan that lead from one case to another."""
    keys: dict[str, Any] = {}
    if chosen.rows != case.rows:
        keys |= {"train.batch_size": chosen.rows, "train.effective_batch": wanted}
    if chosen.checkpointing != case.checkpointing:
        keys["train.gradient_checkpointing"] = True
    if chosen.spread != case.spread:
        keys["model.device_map"] = "auto"
    if chosen.model.quantization != case.model.quantization:
        keys["model.quantization"] = chosen.model.quantization
    return keys


def _memory(case: _Case) -> Memory:
    """Put the bytes of one device together."""
    parts = _parts(replace(case, processes=1, spread=1))
    copies = sum(rule.copies for rule in rules_of(_prepared(case), StagePosition(), seed=0))
    buckets = case.processes > 1  # DistributedDataParallel copies the gradients of all processes into buckets
    static = parts.frozen + parts.trained * (3 + copies + buckets)
    step = parts.trained + (parts.trained if case.gpu else parts.widest)  # AdamW works on all at once there
    inside = parts.working - parts.loss
    return Memory(
        weights=parts.frozen // case.spread,
        trained=parts.trained * (4 + copies + buckets) // case.spread,
        activations=parts.activations // case.spread,
        loss=parts.loss,
        training=max((static + step) // case.spread, (static + inside) // case.spread + parts.loss),
        evaluation=static // case.spread + parts.evaluation,
    )


def _prepared(case: _Case) -> PreparedMethod:
    return PreparedMethod(case.method, check_method(case.method), 1.0, case.precision)


class _Parts(NamedTuple):
    """Bytes of a model and its steps: `working` and `evaluation` are the most beside parameters and averages."""

    frozen: int
    trained: int
    widest: int
    activations: int
    loss: int
    working: int
    evaluation: int


@functools.cache
def _parts(case: _Case) -> _Parts:
    """Count one process's bytes: of the whole model, or from two short ones if all its layers are alike."""
    config = _architecture(case.model, case.architecture)
    text: Any = config.get_text_config()
    layers = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or ["same"]
    with undisturbed():
        if layers <= LONGER or len(set(kinds)) > 1:
            return _step(case, config)
        short, longer = (_step(case, _shortened(config, count)) for count in (SHORT, LONGER))
    return _Parts(*(a + (layers - SHORT) * (b - a) for a, b in zip(short, longer, strict=True)))


def _shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    short = copy.deepcopy(config)
    text: Any = short.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers
    return short


def _architecture(model: ModelConfig, folder: str | None) -> PreTrainedConfig:
    """Read a model's config: from a folder that was given, this module's facts, the model's folder, or the hub."""
    options = {"trust_remote_code": model.trust_remote_code}
    try:
        if folder is not None:
            return AutoConfig.from_pretrained(Path(folder), **options)
        if model.name in PAPER_MODELS:
            return AutoConfig.for_model(**PAPER_MODELS[model.name])
        if is_hub_id(model.name):
            return AutoConfig.from_pretrained(model.name, revision=model.revision, **options)
        path = Path(model.name).expanduser()
        return AutoConfig.from_pretrained(path if path.is_dir() else locate(model).folder, **options)
    except GaintuneError:
        raise
    except Exception as error:  # those of the hub's client, of JSON, and transformers' own
        where = model.name if folder is None else folder
        raise ConfigError(
            f"the config of {where!r} cannot be read ({one_line(error).partition('. ')[0]}): give the folder of the "
            "model's config.json with --config FOLDER"
        ) from None


def _step(case: _Case, config: PreTrainedConfig) -> _Parts:
    """Train one step and measure one batch on fake tensors, and count."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second, and most runs never estimate

    mixed, task = case.precision.mixed, {}
    kind: Any = AutoModelForCausalLM
    if case.classifies:
        kind, config = AutoModelForSequenceClassification, copy.deepcopy(config)
        text: Any = config.get_text_config()
        config.num_labels, text.pad_token_id = LABELS, text.pad_token_id or 0
    with torch.device("meta"):
        model = kind.from_config(config, dtype=case.precision.load, trust_remote_code=case.model.trust_remote_code)
        if case.classifies:
            heads = [name for name, _ in model.named_children() if name != model.base_model_prefix]
            task = {"task_type": "SEQ_CLS", "head": heads}
        saved, unpacked = _quantized(model, case.model.quantization)
        adapted: Any = attach(model, case.method, seed=0, shapes_only=True, **task)
    fake = FakeTensorMode()
    held = made_fake(adapted, fake)
    trained = [tensor.nbytes for tensor in held if tensor.requires_grad]
    frozen = sum(tensor.nbytes for tensor in held if not tensor.requires_grad) - saved
    if case.checkpointing:
        checkpoint_activations(adapted, preserve_rng_state=False)
    with fake, fused_attention(packed=case.packed, gpu=case.gpu), Ledger(held) as ledger:
        objective: Any = (LabelLoss if case.classifies else NextTokenLoss)(adapted)
        base = without_adapter(adapted)
        backbone = base.base_model if case.classifies else base.get_decoder()
        adapted.train()
        ledger.start()
        for _ in range(2 if case.accumulates else 1):
            batch = _batch(case, case.rows)
            handle = backbone.register_forward_hook(lambda *_: ledger.mark())
            with autocast(torch.device("cpu"), mixed):
                total = objective.sum(adapted, batch)
            handle.remove()
            activations, loss = ledger.live, ledger.since_mark - ledger.live
            total.backward()
            del total, batch
        working = ledger.peak
        adapted.eval()
        for tensor in held:
            tensor.grad = None
        ledger.start()
        with torch.no_grad(), autocast(torch.device("cpu"), mixed):
            measure = objective.logits if case.classifies else objective.per_token
            measure(adapted, _batch(case, case.evaluated_rows))
        evaluation = ledger.peak
    return _Parts(
        frozen, sum(trained), max(trained), activations, loss, working + unpacked, evaluation + unpacked
    )  # fmt: skip


def _batch(case: _Case, rows: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(rows, case.length, dtype=torch.long)
    labels = torch.zeros(rows, dtype=torch.long) if case.classifies else ids.clone()
    return {"input_ids": ids, "labels": labels, **({"position_ids": ids.clone()} if case.packed else {})}


def _quantized(model: Any, quantization: str | None) -> tuple[int, int]:
    """Return the bytes that quantization saves, and those of the largest weight, which is unpacked where it is used."""
    if quantization is None:
        return 0, 0
    kept = model.get_output_embeddings() if hasattr(model, "lm_head") else None
    weights = [
        cast(torch.Tensor, module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not kept and name.startswith(model.base_model_prefix)
    ]
    stored = sum(stored_bytes(weight.numel(), weight.shape[0], quantization) for weight in weights)
    return sum(weight.nbytes for weight in weights) - stored, max(weight.nbytes for weight in weights)


def stored_bytes(weights: int, rows: int, quantization: str) -> int:
    """Return the bytes of a quantized matrix: NF4 with double quantization, or LLM.int8 with a scale for each row."""
    if quantization == "8bit":
        return weights + 4 * rows
    scales = math.ceil(weights / NF4_BLOCK)
    return math.ceil(weights / 2) + scales + 4 * math.ceil(scales / NF4_BLOCKS)
