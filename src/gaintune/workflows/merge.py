"""Merge an adapter into its base: a plain transformers folder, and a certificate of how near it is to its adapter."""

from __future__ import annotations

import errno
import gc
import logging
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gaintune import adapters, models
from gaintune.config import ModelConfig
from gaintune.data import IGNORED, Examples, beginning_of_text
from gaintune.errors import ConfigError, GaintuneError, MergeError, TrainingError
from gaintune.evaluate import measure
from gaintune.progress import plural
from gaintune.results import DomainLoss
from gaintune.storage import files

logger = logging.getLogger(__name__)

TOLERANCE = 0.5  # % of perplexity
BLOCK_TOKENS = 256  # of texts to judge a merge on, or as many as the base takes
LOGIT_POSITIONS = 512  # positions whose logits are compared: 100 MB for a vocabulary of 50,000
LOGIT_BLOCKS = 8  # blocks they lie in, each of which is computed once more
PACKAGES = ("gaintune", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Reading:
    """Results of a model on some blocks: its losses, and its logits `(positions, vocabulary)` at some positions."""

    loss: DomainLoss
    logits: torch.Tensor


def distance(first: Reading, second: Reading) -> dict[str, Any]:
    """Compare two readings' logits: absolute differences, and the share of positions with the same first choice."""
    apart = (first.logits - second.logits).abs()
    same = first.logits.argmax(dim=1) == second.logits.argmax(dim=1)
    return {
        "largest_logit_difference": apart.max().item(),
        "mean_logit_difference": apart.double().mean().item(),
        "same_first_choice": same.double().mean().item(),
    }


@dataclass(frozen=True)
class Certificate:
    """Certificate of one merge. Perplexities are per token on the same blocks; changes and tolerance are in %.

    `share_unmoved` is the share of the weights the adapter changes that rounding puts back to the base's value, and
    `gains_lost` the share of gains that leave more than half of their weights unmoved (None where the adapter is not
    a gain); `gain_error` is the mean distance of gains from their trained values, relative to these values' distance
    from 1.
    """

    adapter: str
    adapter_sha256: str
    method: str
    base: str
    base_fingerprint: str
    merged_fingerprint: str
    dtype: str
    reference: str
    computed_in: str
    blocks: int
    block_size: int
    adapter_perplexity: float
    merged_perplexity: float
    perplexity_change: float
    tolerance: float
    within_tolerance: bool
    forced: bool
    largest_logit_difference: float
    mean_logit_difference: float
    same_first_choice: float
    weights_changed: int
    share_unmoved: float
    gains: int
    gains_lost: float | None
    gain_error: float | None
    versions: dict[str, str]

    @property
    def verdict(self) -> str:
        """One sentence for a person."""
        drift = f"perplexity changes by {self.perplexity_change:+.3f} %, tolerance {self.tolerance:g} %"
        if self.within_tolerance:
            return f"The merged model is within tolerance of its adapter: {drift}."
        return f"The merged model is NOT within tolerance: {drift}{'; written because it was forced' * self.forced}."

    def page(self) -> str:
        """Write the certificate as Markdown."""
        merged = f"fingerprint {self.merged_fingerprint[:16]}...), absorbed in fp32, then rounded once"
        rows = {
            "adapter": f"{self.adapter} ({self.method}, SHA-256 {self.adapter_sha256[:16]}...)",
            "base": f"{self.base} (fingerprint {self.base_fingerprint[:16]}...)",
            "merged model": f"{self.dtype} ({merged}",
            "compared with": self.reference,
            "merged model computed in": self.computed_in,
            "text": f"{plural(self.blocks, 'block')} of {self.block_size} tokens",
            "perplexity, adapter": f"{self.adapter_perplexity:.4f}",
            "perplexity, merged": f"{self.merged_perplexity:.4f} ({self.perplexity_change:+.3f} %)",
            "tolerance": f"{self.tolerance:g} %",
            "logits, largest difference": f"{self.largest_logit_difference:.4g}",
            "logits, mean difference": f"{self.mean_logit_difference:.4g}",
            "same first choice": f"{100 * self.same_first_choice:.2f} % of positions",
            "weights the adapter changes": f"{self.weights_changed:,}",
            f"of these unmoved in {self.dtype}": f"{100 * self.share_unmoved:.2f} %",
        }
        if self.gains_lost is not None and self.gain_error is not None:
            lost = f"{100 * self.gains_lost:.2f} % (more than half of their weights unmoved)"
            rows |= {"gains that differ from 1": f"{self.gains:,}", f"gains lost in {self.dtype}": lost}
            rows["mean error of a gain"] = f"{100 * self.gain_error:.2f} % of its distance from 1"
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in sorted(self.versions.items()))
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        return f"# Merge certificate\n\n{self.verdict}\n\n| what | value |\n|---|---|\n{table}\n"


@dataclass(frozen=True)
class MergePlan:
    """A merge that is checked and can begin: its files, precision, and the text to judge it on."""

    adapter: Path
    out: Path
    model: ModelConfig
    method: str
    device: torch.device
    dtype: torch.dtype
    blocks: Examples
    bytes_per_block: tuple[int, ...]
    tolerance: float
    force: bool
    allow_other_base: bool
    max_shard_size: str
    batch_size: int

    @property
    def computed_in(self) -> torch.dtype:
        """The written dtype, or fp32, which holds every fp16 weight, on a CPU, where fp16 computes ten times slower."""
        return torch.float32 if self.dtype == torch.float16 and self.device.type == "cpu" else self.dtype

    def read(self, model: nn.Module) -> Reading:
        """Measure the loss on all blocks, and keep the logits of evenly spread positions."""
        loss = measure(model, self.blocks, self.bytes_per_block, batch_size=self.batch_size, title="comparing")
        device = next(model.parameters()).device
        count, length = self.blocks.input_ids.shape
        chosen = torch.linspace(0, count - 1, min(count, LOGIT_BLOCKS)).long()
        positions = torch.linspace(0, length - 1, min(length, LOGIT_POSITIONS // len(chosen))).long()
        kept = []
        with torch.inference_mode():
            for block in chosen.split(1):
                inputs = {name: tensor.to(device) for name, tensor in self.blocks[block].items() if name != "labels"}
                logits = model(**inputs, use_cache=False).logits
                kept.append(logits[0, positions.to(device)].float().cpu())
        return Reading(loss, torch.cat(kept))


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    blocks: torch.Tensor | Examples | None = None,
    texts: Sequence[str] | None = None,
    model: ModelConfig | str | None = None,
    dtype: str = "auto",
    tolerance: float = TOLERANCE,
    force: bool = False,
    allow_other_base: bool = False,
    bytes_per_block: Sequence[int] | None = None,
    max_shard_size: str = "5GB",
    batch_size: int = 4,
) -> Certificate:
    """Absorb an adapter into its base in fp32, write the result in `dtype`, and compare it with the adapter.

    The written folder is read back from disk without PEFT, and compared with the adapter on the base as `model` loads
    it (dtype, quantization, device), which is how people serve it.

    Args:
        adapter: folder of a mergeable adapter, or of fully fine-tuned weights.
        out: folder to write; must not exist, or be empty. It appears only when it is complete.
        blocks: token ids `(blocks, block_size)` of the base's tokenizer to compare on, all scored but the first of a
            block, or `Examples`, which define what is scored; or give `texts`.
        texts: plain text to compare on, instead of `blocks`.
        model: the base, or its name alone; default: the base that the adapter names.
        dtype: dtype of the written model: bf16, fp16, fp32, or auto for the dtype the base is loaded in.
        tolerance: largest change of perplexity, in %.
        force: write the model even beyond the tolerance; the certificate says so.
        allow_other_base: merge into another base than the adapter was trained on.
        bytes_per_block: UTF-8 bytes of the scored tokens of each block; counted from the tokens by default.

    Raises:
        MergeError: beyond the tolerance, or the disk is full; nothing is left at `out`.
        AdapterError: damaged, of another base, or of a method that cannot be merged.
        ConfigError: `out` is in use, an unknown dtype, or no text.
        RunDirectoryError: the parent folder of `out` cannot be made.
    """
    adapter, out = Path(adapter), Path(out)
    check_out(out)
    if dtype not in ("auto", *models.DTYPES):
        raise ConfigError(f"dtype {dtype!r} is unknown: use auto, {', '.join(models.DTYPES)}")
    if not re.fullmatch(r"[1-9][0-9]*\s*[KMG]i?B", max_shard_size):
        raise ConfigError(f"max_shard_size {max_shard_size!r} is not a size: write 500MB or 5GB")
    if not 0 < tolerance < math.inf:
        raise ConfigError(f"tolerance is {tolerance} %, it must be a number above 0")
    record = adapters.read_record(adapter)
    if record is not None and record.labels:
        raise ConfigError(
            f"{adapter} is a classifier: merging is for language models. Encoder, adapter and head are served as "
            "they are, with PEFT"
        )
    adapters.check_mergeable(adapter)
    model = ModelConfig(name=model) if isinstance(model, str) else model or adapters.claimed_base(adapter, record)
    files.make_folder(out.absolute().parent)
    blocks, counted = _judging_text(blocks, texts or (), bytes_per_block, model)
    device = models.resolve_device(model.device)
    plan = MergePlan(
        adapter, out, model, record.method if record else "adapter of unknown origin",
        device, models.resolve_dtype(model.dtype, device) if dtype == "auto" else models.DTYPES[dtype], blocks, counted,
        tolerance, force, allow_other_base, max_shard_size, batch_size,
    )  # fmt: skip
    try:
        return _apply(plan)
    except Exception as error:  # safetensors reports a full disk through a class of its own
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full and not isinstance(error, GaintuneError):
            raise MergeError(f"the disk of {out.absolute().parent} is full; nothing is left at {out}") from error
        raise


def check_out(out: Path) -> None:
    """Refuse a path for a model that exists and is not an empty folder; ConfigError."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError(
            f"{out} exists and is not empty, or is a link: name another folder, or delete it if it is no longer wanted"
        )


def _judging_text(
    blocks: torch.Tensor | Examples | None, texts: Sequence[str], counted: Sequence[int] | None, model: ModelConfig
) -> tuple[Examples, tuple[int, ...]]:
    """Return the blocks to compare on, and the UTF-8 bytes of the scored tokens of each block."""
    if blocks is None and not texts:
        raise ConfigError("a merge is judged on text: give blocks of token ids, or texts")
    tokenizer: Any = models.load_tokenizer(model) if blocks is None or counted is None else None
    ids = blocks.input_ids if isinstance(blocks, Examples) else blocks
    if ids is None:
        longest = models.longest_row(models.read_architecture(models.locate(model), model))
        ids = blocks_of(texts, tokenizer, min(BLOCK_TOKENS, longest or BLOCK_TOKENS))
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ConfigError(f"blocks of shape {tuple(ids.shape)}: (blocks, block_size) of 2 tokens or more are needed")
    examples = blocks if isinstance(blocks, Examples) else Examples.of_blocks(ids)
    if counted is None:
        scored = examples.labels[:, 1:] != IGNORED
        pairs = zip(ids[:, 1:], scored, strict=True)
        counted = [max(1, len(tokenizer.decode(row[kept].tolist()).encode())) for row, kept in pairs]
    return examples, tuple(counted)


def blocks_of(texts: Sequence[str], tokenizer: Any, block_size: int = BLOCK_TOKENS) -> torch.Tensor:
    """Cut texts, joined with end-of-text tokens, into blocks that begin as the model's texts do; drop the rest."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False).input_ids, *end]]
    begin = torch.tensor(beginning_of_text(tokenizer), dtype=torch.long)
    size = min(block_size - len(begin), len(ids))
    if size + len(begin) < 2:
        raise ConfigError("the text to judge a merge on is empty")
    rows = torch.tensor(ids[: len(ids) // size * size]).view(-1, size)
    return torch.cat([begin.expand(len(rows), -1), rows], dim=1)


def _apply(plan: MergePlan) -> Certificate:
    """Read the adapter, absorb it, write the model, read it back and judge it; raises as `merge_adapter` does."""
    reference = models.load_base(plan.model)
    before = plan.read(adapters.load_adapter(reference, plan.adapter, allow_other_base=plan.allow_other_base))
    served = models.DTYPE_NAMES.get(reference.model.dtype, str(reference.model.dtype))
    numbers = f"{plan.model.quantization} with {served}" if plan.model.quantization else served
    described = f"the adapter on {reference.name} in {numbers}, on {plan.device.type}"
    del reference
    gc.collect()

    base = models.load_base(plan.model.model_copy(update={"device": "cpu", "quantization": None}), dtype=torch.float32)
    merged, rounding = adapters.absorb(base, plan.adapter, plan.dtype, allow_other_base=plan.allow_other_base)
    _check_space(merged, plan)
    with files.complete_folder(plan.out) as temporary:
        models.save_model(merged, temporary, max_shard_size=plan.max_shard_size)
        base.tokenizer.save_pretrained(temporary)
        facts = {"reference": described, "base": base.name, "base_fingerprint": base.fingerprint}
        del merged, base
        gc.collect()
        checkpoint, trust = models.Checkpoint(str(plan.out), temporary), plan.model.trust_remote_code
        try:  # load the folder as anyone would, without PEFT
            after = plan.read(models.load_model(checkpoint, plan.computed_in, plan.device, trust_remote_code=trust))
        except TrainingError:
            raise MergeError(
                f"in {models.DTYPE_NAMES[plan.dtype]} the merged model's loss is not finite: its values leave the "
                f"range of that dtype. Choose bf16 or fp32; nothing is left at {plan.out}"
            ) from None
        certificate = _certify(plan, before, after, rounding, temporary, **facts)
        files.write_json(temporary / "certificate.json", asdict(certificate))
        files.write_text(temporary / "certificate.md", certificate.page())
        if not certificate.within_tolerance and not plan.force:
            raise MergeError(
                f"{certificate.verdict} {100 * certificate.share_unmoved:.0f} % of the weights the adapter changes do "
                f"not move in {certificate.dtype}. Nothing is left at {plan.out}: choose --dtype fp32, raise "
                "--tolerance, or pass --force"
            )
        if not certificate.within_tolerance:
            logger.warning("%s", certificate.verdict)
    return certificate


def _check_space(model: Any, plan: MergePlan) -> None:
    """Refuse to begin where the disk has too little room."""
    needed = sum(weight.numel() * weight.element_size() for weight in model.parameters()) + 2**26
    parent = plan.out.absolute().parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        room = f"{needed / 1e9:.2f} GB, the disk of {parent} has {free / 1e9:.2f} GB left"
        raise MergeError(f"the merged model needs {room}; nothing was written")


def _certify(
    plan: MergePlan, before: Reading, after: Reading, rounding: adapters.Rounding, folder: Path, **facts: Any
) -> Certificate:
    change = 100 * (after.loss.perplexity / before.loss.perplexity - 1)
    count, size = plan.blocks.input_ids.shape
    return Certificate(
        adapter=str(plan.adapter),
        adapter_sha256=files.sha256_file(adapters.identity_file(plan.adapter)),
        method=plan.method,
        merged_fingerprint=models.fingerprint_folder(folder, trust_remote_code=plan.model.trust_remote_code),
        dtype=models.DTYPE_NAMES[plan.dtype],
        computed_in=f"{models.DTYPE_NAMES[plan.computed_in]}, on {plan.device.type}",
        blocks=count,
        block_size=size,
        adapter_perplexity=before.loss.perplexity,
        merged_perplexity=after.loss.perplexity,
        perplexity_change=change,
        tolerance=plan.tolerance,
        within_tolerance=abs(change) <= plan.tolerance,
        forced=plan.force,
        weights_changed=rounding.changed,
        share_unmoved=rounding.unmoved / max(1, rounding.changed),
        gains=rounding.gains,
        gains_lost=rounding.lost / rounding.gains if rounding.gains else None,
        gain_error=rounding.error / rounding.gains if rounding.gains else None,
        versions={name: version(name) for name in PACKAGES},
        **facts,
        **distance(before, after),
    )
