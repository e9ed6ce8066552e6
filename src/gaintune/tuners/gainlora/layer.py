"""A linear layer with gated low-rank branches, one a domain, and what keeps a new gate shut on earlier inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from gaintune.errors import ConfigError, MergeError
from gaintune.tuners.disel.layer import add_product, compute_dtype, stacked_product, widened
from gaintune.tuners.gainlora.config import GainloraConfig
from gaintune.tuners.linear import UpdatedLinear
from gaintune.tuners.precision import Float32ParameterDict

EPSILON = 1e-6  # added to the mean square of an input, so that a token of zeros has shut gates

OLD = ("gainlora_old_A", "gainlora_old_B", "gainlora_old_gate")

GateObserver = Callable[[str, torch.Tensor], None]
"""Called in every forward pass of a layer with the adapter's name and its gates `(..., branches)`, detached."""


def inverse_rms(x: torch.Tensor) -> torch.Tensor:
    """Return `1 / rms(x)` of every token, `(..., 1)`, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPSILON)


def normalized(x: torch.Tensor) -> torch.Tensor:
    """Return what a gate reads: `x / rms(x)`, `(..., in_features)`, in float32 or wider."""
    return x * inverse_rms(x)


def widened_basis(basis: torch.Tensor, gram: torch.Tensor, share: float) -> torch.Tensor:
    """Add directions to an orthonormal basis until it holds a share of the energy of some inputs.

    The fewest directions are added, the largest first, as in gradient projection memory (Saha et al., 2021, arXiv
    2103.09762, section 5).

    Args:
        basis: `(in, k)`, float64.
        gram: `X^T X` of the inputs `X` `(tokens, in)`, float64.
        share: share of the trace of `gram`, between 0 and 1.

    Returns:
        `(in, k + added)`, float64, orthonormal; the first k columns are those of `basis`, up to their sign.
    """
    outside = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - basis @ basis.T
    rest = outside @ gram @ outside
    values, vectors = torch.linalg.eigh((rest + rest.T) / 2)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    total = gram.trace()
    held = total - values.sum() + torch.cat([values.new_zeros(1), values.cumsum(0)])
    added = int((held < share * total).sum())
    return torch.linalg.qr(torch.cat([basis, vectors[:, :added]], dim=1))[0] if added else basis


class GainloraLinear(UpdatedLinear):
    """`W x + (alpha / r) sum_t g_t(x) B_t A_t x`.

    Of each adapter, `gainlora_A` `(r, in)`, `gainlora_B` `(out, r)` and `gainlora_gate` `(in,)` are the newest branch,
    which trains. `gainlora_old_A`, `gainlora_old_B` and `gainlora_old_gate` hold the frozen branches, the oldest first:
    stacked by rows, and B by columns. Every forward pass calls the functions in `gate_observers`.
    """

    adapter_layer_names: tuple[str, ...] = ("gainlora_A", "gainlora_B", "gainlora_gate")
    other_param_names: tuple[str, ...] = (*OLD, "scaling")

    gainlora_gate: Float32ParameterDict

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: GainloraConfig) -> None:
        super().__init__(base_layer, adapter_name, config)
        for name in (*self.adapter_layer_names, *OLD):
            setattr(self, name, Float32ParameterDict())
        self.scaling: dict[str, float] = {}
        self.gate_observers: list[GateObserver] = []
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: GainloraConfig) -> None:
        """Add the branches of one adapter: all but the last are empty until an adapter's file fills them."""
        self.scaling[adapter_name] = config.lora_alpha / config.r
        old, inputs, outputs = (config.branches - 1) * config.r, self.in_features, self.out_features
        a, gate = new_branch(config.r, inputs)
        self._add(
            adapter_name, config,
            gainlora_A=a, gainlora_gate=gate,
            gainlora_B=torch.zeros(outputs, config.r) if config.init_weights else torch.randn(outputs, config.r),
            gainlora_old_A=torch.zeros(old, inputs), gainlora_old_B=torch.zeros(outputs, old),
            gainlora_old_gate=torch.zeros(config.branches - 1, inputs),
        )  # fmt: skip

    def add_update(self, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Return `result` plus all branches behind their gates, in the dtype of `result`."""
        a, b, gate, old_a, old_b, old_gate = (
            getattr(self, name)[adapter_name] for name in (*self.adapter_layer_names, *OLD)
        )
        dtype, branches = compute_dtype(x, a), 1 + len(old_gate)
        product = widened(stacked_product(x, (old_a, a, old_gate, gate[None]), dtype))
        hidden, read = product.split([branches * len(a), branches], dim=-1)
        gates = torch.tanh(read * inverse_rms(x) / 2).abs()
        for observe in self.gate_observers:
            observe(adapter_name, gates.detach())
        gated = (hidden.unflatten(-1, (branches, len(a))) * gates.unsqueeze(-1)).flatten(-2)
        return add_product(result, gated * self.scaling[adapter_name], torch.cat([old_b, b], dim=1), dtype)

    @torch.no_grad()
    def begin_branch(self, adapter_name: str, basis: torch.Tensor, generator: torch.Generator) -> None:
        """Freeze the newest branch, and begin one whose gate is orthogonal to the columns of `basis` `(in, k)`."""
        parameters = {name: getattr(self, name) for name in (*self.adapter_layer_names, *OLD)}
        a, b, gate, old_a, old_b, old_gate = (values[adapter_name].data for values in parameters.values())
        drawn_a, drawn_gate = (drawn.to(a.device) for drawn in new_branch(len(a), a.shape[1], generator))
        made = (
            drawn_a, torch.zeros_like(b), outside(drawn_gate, basis),
            torch.cat([old_a, a]), torch.cat([old_b, b], dim=1), torch.cat([old_gate, gate[None]]),
        )  # fmt: skip
        for (name, values), value in zip(parameters.items(), made, strict=True):
            values[adapter_name] = nn.Parameter(value, requires_grad=name in self.adapter_layer_names)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse: a weight cannot depend on the input."""
        raise refusal_to_merge()

    def get_delta_weight(self, adapter_name: str) -> NoReturn:
        """Refuse: there is no update that is the same for every input."""
        raise refusal_to_merge()

    def __repr__(self) -> str:
        return "gainlora." + super().__repr__()


def new_branch(r: int, in_features: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw A `(r, in)` and a gate's w `(in,)`, uniform within 1 / sqrt(in) as in LoRA."""
    bound = 1 / math.sqrt(in_features)
    drawn = torch.empty(r + 1, in_features).uniform_(-bound, bound, generator=generator)
    return drawn[:r].clone(), drawn[r].clone()


def outside(gate: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Return the part of a gate's w `(in,)` that is orthogonal to the columns of `basis` `(in, k)`, in its dtype."""
    wide = basis.to(gate.device)
    return (gate.to(wide.dtype) - wide @ (wide.T @ gate.to(wide.dtype))).to(gate.dtype)


def refusal_to_merge() -> MergeError:
    """Return the error that says why there is no merged model."""
    return MergeError(
        "a GainLoRA adapter cannot be merged: its gates depend on the input, and a weight cannot. Serve the model with "
        "the adapter on it."
    )


def gainlora_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, GainloraLinear]]:
    """Yield the layers with an adapter's branches, each with the name of its module in the base."""
    for name, module in model.named_modules():
        if isinstance(module, GainloraLinear) and module.has_adapter(adapter_name):
            yield name.removeprefix("base_model.model."), module


def add_branch(model: Any, adapter_name: str, bases: Mapping[str, torch.Tensor], seed: int) -> None:
    """Begin a branch in every layer of an adapter of a PeftModel, with gates shut on the inputs in `bases`.

    `bases` has an orthonormal basis `(in, k)` for each module of the base, by its name. Raises `ConfigError` where a
    module is missing or its basis leaves no direction for a new gate.
    """
    layers, generator = dict(gainlora_layers(model, adapter_name)), torch.Generator().manual_seed(seed)
    if {name: layer.in_features for name, layer in layers.items()} != {n: len(basis) for n, basis in bases.items()}:
        raise ConfigError("the directions of earlier inputs are about other modules than the adapter has")
    full = next((name for name, basis in bases.items() if basis.shape[1] >= len(basis)), None)
    if full is not None:
        raise ConfigError(
            f"the inputs of earlier domains fill all {len(bases[full])} directions of {full}, and leave a new gate "
            "none to open in: train the earlier domains with a lower share (`preserved`)"
        )
    for name, layer in layers.items():
        layer.begin_branch(adapter_name, bases[name], generator)
    model.peft_config[adapter_name].branches += 1
