"""Every type of PEFT's on the tiny base: what it takes to train there, and what it turns out to do."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import gaintune.tuners
from gaintune.adapters import absorb, load_adapter, save_adapter
from gaintune.config import MethodConfig, ModelConfig, TrainConfig
from gaintune.data import Examples
from gaintune.errors import GaintuneError
from gaintune.methods import StagePosition, attach, prepare_method, trainable_parameters
from gaintune.training import train_stage
from support import tiny_base
from support.tiny_adapters import base_of, record_of

gaintune.tuners.register()
TYPES = sorted(str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
SIZES = {  # what PEFT has no default for, or one that is too large for a model 32 wide
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2}, "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 16}, "MISS": {"r": 4}, "PSOFT": {"r": 4}, "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4}, "TRAINABLE_TOKENS": {"token_indices": [12, 18]}, "VBLORA": {"vector_length": 8},
    "WAVEFT": {"n_frequency": 16},
}  # fmt: skip
PAGE = """\
# Types of PEFT

<!-- Written by docs/generate.py; edit the code it reads. -->

Every type that PEFT {version} has, and ours. `--method peft:TYPE:field=value` trains it ([methods](../methods.md)).

"Starts at the base" means that a new adapter changes no logit beyond rounding. "Merges" means that `gaintune merge`
gives the same logits. Two updates of a random Llama of two layers, with PEFT's settings, were measured for it. Where
PEFT's settings do not fit that model, the third column has what was given.

| type | here | given | starts at the base | merges |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a type: the sentence that refuses it, or what it did; `losses` of its updates."""

    kind: str
    refusal: str = ""
    starts: bool = False
    merges: bool = False
    losses: tuple[float, ...] = ()
    moved: bool = False
    loaded: bool = False
    parameters: tuple[int, int] = (0, 0)

    @property
    def row(self) -> str:
        """Its row of the page."""
        given = ", ".join(f"`{key}={value}`" for key, value in SIZES.get(self.kind, {}).items())
        yes = {True: "yes", False: "no"}
        refusal = self.refusal.removeprefix(f"method {self.kind.lower()!r}: ")
        cells = [refusal, given, "", ""] if self.refusal else ["trains", given, yes[self.starts], yes[self.merges]]
        return f"| `{self.kind}` | {' | '.join(cells)} |"


def method_of(kind: str, **more) -> MethodConfig:
    return MethodConfig(name="peft", config={"peft_type": kind, **SIZES.get(kind, {})}, **more)


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(tiny_base.blocks(2, 16, seed=9)).logits


def measure(kind: str, tiny: Path, folder: Path) -> Outcome:
    """Train two updates of a type, save it, load it and merge it."""
    method, plan = method_of(kind, lr=0.01), TrainConfig(batch_size=2)
    base = base_of(tiny, "fp32")
    before = logits(base.model)
    try:
        prepared = prepare_method(method, ModelConfig(device="cpu", dtype="fp32"), plan)
        model = attach(base.model, method, seed=0)
    except GaintuneError as error:
        return Outcome(kind, refusal=str(error))
    start = logits(model)
    rows = Examples.of_blocks(tiny_base.blocks(4, 16))
    trained = train_stage(model, prepared, rows, plan, StagePosition(), checkpoints=folder / "checkpoints")
    after = logits(model)
    save_adapter(model, folder / "adapter", record_of(base, "peft"), keep=trained.keep)
    again = load_adapter(base_of(tiny, "fp32"), folder / "adapter", trainable=True)
    try:
        merged = logits(absorb(base_of(tiny, "fp32"), folder / "adapter", torch.float32)[0])
    except GaintuneError:
        merged = before
    return Outcome(
        kind,
        starts=torch.allclose(start, before, rtol=1e-4, atol=1e-4),
        merges=torch.allclose(merged, after, rtol=1e-4, atol=1e-4),
        losses=trained.losses,
        moved=not torch.equal(after, start),
        loaded=torch.equal(logits(again), after),
        parameters=(trainable_parameters(model), trainable_parameters(again)),
    )


def page() -> str:
    """Return the page of all types, each of them measured anew."""
    with TemporaryDirectory() as place:
        tiny = tiny_base.folder(Path(place) / "tiny")
        rows = [measure(kind, tiny, Path(place) / kind).row for kind in TYPES]
    return PAGE.format(version=peft.__version__) + "\n".join(rows) + "\n"
