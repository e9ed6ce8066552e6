"""Rules that act on an update beside the gradient of the loss: the border between training and methods or penalties.

Loads no PEFT, since the catalogue, which names the rules, does not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gaintune.config import MethodConfig
from gaintune.errors import ConfigError
from gaintune.models import Objective
from gaintune.progress import Progress, Silent
from gaintune.storage import first_process

if TYPE_CHECKING:
    from gaintune.tuners.gain import GainLayer

logger = logging.getLogger(__name__)


class Rows(Protocol):
    """Rows to train on: `gaintune.data.Examples`, or rows of another objective."""

    @property
    def tokens(self) -> int:
        """All tokens of one pass."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True)
class StagePosition:
    """Position of an adaptation in a sequence of them.

    Attributes:
        previous: folder of the adapter it continues, None for the first one.
        first: updates of the adaptations before it.
        total: updates of all adaptations; None for this one's alone.
    """

    previous: Path | None = None
    first: int = 0
    total: int | None = None


@dataclass(frozen=True)
class StageData:
    """The rows and the loss of an adaptation, for rules that need them after its last update."""

    rows: Rows
    objective: Objective
    title: str
    collate: Callable[[list[dict[str, torch.Tensor]]], Mapping[str, Any]] | None = None
    mixed_precision: torch.dtype | None = None
    progress: Progress = field(default_factory=Silent)

    def batch(self, row: int, device: torch.device) -> dict[str, Any]:
        """Return one row as a batch on a device."""
        picked = self.rows[row]
        if self.collate is not None:
            batch = dict(self.collate([picked]))
        else:
            batch = {name: tensor.unsqueeze(0) for name, tensor in picked.items()}
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def process_share() -> tuple[int, int]:
    """Return the number of this process and of all processes of the run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class TrainingRule:
    """Rule that acts on the updates of one adaptation beside the gradient of its loss; the base class does nothing.

    The methods are called in the order in which they stand. Steps are counted from 0. What a rule must remember between
    updates it writes with the checkpoints and reads back, so that a stopped run ends with the same bytes; what it keeps
    with the adapter is for the next domain.
    """

    copies: ClassVar[int] = 0  # numbers that the rule keeps in memory for each trained number, for estimates

    def start(self, model: nn.Module, steps: int) -> None:
        """Prepare for `steps` updates; called before `load`.

        The weights are those the adaptation starts from, also when it continues from a checkpoint.
        """

    def load(self, folder: Path) -> None:
        """Take the state back from a checkpoint's folder."""

    def before_update(self, model: nn.Module, step: int) -> None:
        """Add to the gradients, which are complete (accumulated, reduced, unscaled) and not clipped yet."""

    def after_update(self, model: nn.Module, step: int) -> None:
        """Read the weights that have moved, and the gradients, which are still there."""

    def save(self, folder: Path) -> None:
        """Write the rule's state into a checkpoint's folder, as safetensors or JSON."""

    def finish(self, model: nn.Module, stage_data: StageData) -> None:
        """Learn from the rows of the stage after its last update, in every process."""

    def keep(self, folder: Path) -> None:
        """Write beside the adapter, before its manifest, what the next adaptation needs; in the process that writes."""


class SubspaceProjection(TrainingRule):
    """Rule that attaches OSF's hooks, which project the gradients, to the parameters that train.

    PEFT hangs them on the parameters it makes first. On a bf16 or fp16 base it then replaces these by fp32 ones, which
    have no hooks, and OSF would train without its constraint.
    """

    def start(self, model: nn.Module, steps: int) -> None:
        """Attach the hooks again."""
        from peft.tuners.osf.layer import OSFLayer

        for layer in model.modules():
            if isinstance(layer, OSFLayer):
                layer._detach_hooks()
                for adapter in layer.osf_svd_params:
                    layer._attach_hooks(adapter)


@dataclass
class IntruderReduction(TrainingRule):
    """Rule that shrinks intruder dimensions of LoRA after the last update, with PEFT's function for it.

    These are singular directions of the adapted weight that no direction of the pretrained weight resembles. They come
    with forgetting (Shuttleworth et al. 2024, arXiv 2410.21228).

    Args:
        share: the share of them that stays.
    """

    share: float

    def finish(self, model: nn.Module, stage_data: StageData) -> None:
        """Replace the trained adapter by the one that PEFT makes with smaller intruder dimensions."""
        from peft.tuners.lora import LoraLayer
        from peft.tuners.lora.intruders import reduce_intruder_dimension

        adapted, trained, reduced = cast(Any, model), "default", "reduced"
        reduce_intruder_dimension(adapted, trained, reduced, mitigation_lambda=self.share, logging_sink=None)
        with torch.no_grad():
            for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
                for factor in (layer.lora_A, layer.lora_B):
                    cast(Any, factor[trained]).weight.copy_(cast(Any, factor[reduced]).weight)
        adapted.set_adapter(trained)
        adapted.delete_adapter(reduced)


STATE = "adalora.safetensors"  # in a checkpoint and beside an adapter: what the rank allocator remembers
ORTHOGONALITY = 0.1  # weight of the orthogonality term unless a plan gives one
WARM_UP, FINAL, ALLOCATIONS = 0.1, 0.3, 100  # shares of all updates, and how often the budget may fall


class BudgetSchedule(TrainingRule):
    """Rule that drives PEFT's rank allocator over the updates of a sequence.

    The full rank trains for the first tenth of all updates; then the budget falls (by a cubic) to the average rank
    of the plan, at most a hundred times; in the last three tenths it stays. These shares and the weight of the
    orthogonality term (0.1; PEFT's 0.5 drowned the loss in the experience of the DISeL paper, appendix on AdaLoRA) are
    ours: the papers' values for budgets of this size are not known.

    An adapter on disk keeps its full shape, with zeros for the singular values that are pruned: it computes the same
    wherever it is loaded, and can be continued. What the allocator remembers lies beside it.

    Args:
        config: the method; `orthogonality` is read here.
        position: where this adaptation stands. A single one has a schedule of its own, whatever it continues.
    """

    copies = 3

    def __init__(self, config: MethodConfig, position: StagePosition) -> None:
        self._weight = ORTHOGONALITY if config.orthogonality is None else config.orthogonality
        self._position = position
        self._kept: dict[str, list[bool]] | None = None
        self._tuner: Any = None

    def start(self, model: nn.Module, steps: int) -> None:
        """Set the schedule, and take the allocator's state of the stage before."""
        self._tuner = model.base_model
        config = self._config
        total = self._position.total or steps
        if total < 2:
            raise ConfigError("adalora needs at least two updates: give more text or train.epochs, or smaller batches")
        config.total_step, config.tinit, config.tfinal = total, int(WARM_UP * total), max(1, round(FINAL * total))
        config.deltaT = max(1, total // ALLOCATIONS)
        self._tuner.rankallocator.reset_ipt()
        if self._position.first and self._position.previous is not None:
            self.load(self._position.previous)

    @torch.no_grad()
    def before_update(self, model: nn.Module, step: int) -> None:
        """Add the gradient of PEFT's term: weight times the mean of ||P P^T - I||_F, P being every A and B^T."""
        if self._weight == 0:
            return
        directions = list(self._directions())
        for is_a, value in directions:
            rows = value if is_a else value.T
            excess = rows @ rows.T
            excess.diagonal().sub_(1.0)
            size = torch.linalg.matrix_norm(excess)
            scale = 2.0 * self._weight / len(directions) / size.clamp_min(torch.finfo(size.dtype).tiny)
            pull = excess.mul_(scale) @ rows
            pull = pull if is_a else pull.T
            value.grad = pull.contiguous() if value.grad is None else value.grad.add_(pull)

    def after_update(self, model: nn.Module, step: int) -> None:
        """Measure what every direction is worth, and allocate the budget of this update."""
        config = self._config
        config.rank_pattern = self._kept
        self._tuner.update_and_allocate(self._position.first + step)
        # PEFT would cut the saved matrices down by it, and then not load them into the model that goes on training
        self._kept, config.rank_pattern = config.rank_pattern, None

    def save(self, folder: Path) -> None:
        """Write the two running averages of the importance, and which directions are kept."""
        allocator = self._tuner.rankallocator
        state = {f"importance/{name}": value for name, value in allocator.exp_avg_ipt.items()}
        state |= {f"uncertainty/{name}": value for name, value in allocator.exp_avg_unc.items()}
        state |= {f"kept/{name}": torch.tensor(kept) for name, kept in (self._kept or {}).items()}
        save_file({name: value.cpu().contiguous() for name, value in state.items()}, folder / STATE)

    def load(self, folder: Path) -> None:
        """Take the allocator's state back."""
        if not (folder / STATE).is_file():
            raise ConfigError(f"{folder} has no {STATE}, without which AdaLoRA's budget cannot be continued")
        allocator = self._tuner.rankallocator
        devices = {name: value.device for name, value in self._tuner.model.named_parameters()}
        parts: dict[str, dict[str, torch.Tensor]] = {"importance": {}, "uncertainty": {}, "kept": {}}
        for key, value in load_file(folder / STATE).items():
            part, _, name = key.partition("/")
            parts[part][name] = value if part == "kept" else value.to(devices[name])
        allocator.exp_avg_ipt, allocator.exp_avg_unc = parts["importance"], parts["uncertainty"]
        allocator.ipt = {name: torch.zeros_like(value) for name, value in parts["importance"].items()}
        self._kept = {name: value.tolist() for name, value in parts["kept"].items()} or None

    def keep(self, folder: Path) -> None:
        """Write the same state beside the adapter."""
        self.save(folder)

    @property
    def _config(self) -> Any:
        return self._tuner.peft_config[self._tuner.trainable_adapter_name]

    def _directions(self) -> Iterator[tuple[bool, nn.Parameter]]:
        """Yield every A `(rank, in)` and B `(out, rank)`, after whether it is an A."""
        adapter = self._tuner.trainable_adapter_name
        for name, value in self._tuner.model.named_parameters():
            if name.endswith((f"lora_A.{adapter}", f"lora_B.{adapter}")):
                yield "lora_A" in name, value


class Renormalization(TrainingRule):
    """Rule that pulls what trained toward the base after the last update: `base + share * (value - base)`.

    It acts on the trained tensors called `name`, whose value at the base is `neutral`. So v of GAIN is multiplied by
    the share. The GAIN paper (appendix J) proposes it for very long sequences, as future work.
    """

    def __init__(self, share: float, name: str, neutral: float) -> None:
        self._share, self._name, self._neutral = share, name, neutral

    @torch.no_grad()
    def finish(self, model: nn.Module, stage_data: StageData) -> None:
        """Pull the weights, before a penalty reads them and before they are saved and measured."""
        for name, value in model.named_parameters():
            if value.requires_grad and self._name in name.split("."):
                value.sub_(self._neutral).mul_(self._share).add_(self._neutral)


class GainWarnings(TrainingRule):
    """Rule that checks the smallest gain after every update until it has warned once, and all gains after the last one.

    A check is one pass over the gains and one number read back from the device. It changes nothing.
    """

    def __init__(self) -> None:
        self._gains: dict[str, torch.Tensor] | None = None
        self._warned = False

    @torch.no_grad()
    def after_update(self, model: nn.Module, step: int) -> None:
        """Warn of the first gain at or below 0."""
        if self._warned:
            return
        if self._gains is None:  # not at the start: loading a checkpoint may put other parameters in their place
            self._gains = {name: v for name, (_, v) in _trained_layers(model).items()}
        smallest = [v.amin() for v in self._gains.values()]
        if smallest and float(torch.stack([v.to(smallest[0].device) for v in smallest]).amin()) <= -1:
            self._warned = True
            if first_process():
                self._warn(step + 1)

    def finish(self, model: nn.Module, stage_data: StageData) -> None:
        """Warn where no gain is far enough from 1 to change an activation in the base's precision."""
        found = _trained_layers(model).values()
        dtypes = {cast(torch.Tensor, layer.get_base_layer().weight).dtype for layer, _ in found}
        if not first_process() or not dtypes or not dtypes <= {torch.bfloat16, torch.float16}:
            return
        largest = max(float(v.detach().abs().amax()) for _, v in found)
        least = min(torch.finfo(dtype).eps for dtype in dtypes) / 4
        if largest < least:
            logger.warning(
                "no gain is further from 1 than %.1g, and %s activations show nothing below %.1g, so the adapter "
                "changes nothing. Train it longer or at a higher rate, or compute in fp32 (model.dtype=fp32)",
                largest, " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)), least,
            )  # fmt: skip

    def _warn(self, updates: int) -> None:
        gains = self._gains or {}
        flipped = sum(int((v <= -1).sum()) for v in gains.values())
        total = sum(v.numel() for v in gains.values())
        name, lowest = min(((name, 1 + float(v.amin())) for name, v in gains.items()), key=lambda pair: pair[1])
        logger.warning(
            "after update %d, %s of %s gains are at or below 0 (the lowest, %.3f, in %s): their features' signs are "
            "turned, and what was trained before may suffer. A lower learning rate keeps gains positive; see "
            "`gaintune gains` on what comes out",
            updates, f"{flipped:,}", f"{total:,}", lowest, name,
        )  # fmt: skip


def _trained_layers(model: nn.Module) -> dict[str, tuple[GainLayer, torch.Tensor]]:
    """Return the layers whose gains train, each with these gains minus 1, by the name of their module in the base."""
    from gaintune.tuners.gain import GainLayer

    return {
        name.removeprefix("base_model.model."): (layer, v)
        for name, layer in model.named_modules()
        if isinstance(layer, GainLayer)
        for v in layer.gain_v.values()
        if v.requires_grad
    }
