"""Experts of a block as layers that adapters and quantisation reach.

transformers holds a projection of all experts as one parameter of its module, which is no layer.
`open_experts` puts an `ExpertLinear` over that parameter in its place, `close_experts` takes it away
again. Names in files stay those of transformers.

Letters: T tokens, K experts of a token, R = T * K rows in the order of their experts, E experts, H
width of the model, I and O width in and out of a projection, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# with its ways around what PyTorch's kernel lacks on some devices and when compiled
from transformers.integrations.moe import _grouped_mm

from lightning_internvl.layers.basic import autocast_type
from lightning_internvl.layers.quantized_layers import Nf4Weight

NAME = "default"  # of the adapter, there is one
PROJECTIONS = ("gate_up_proj", "down_proj")
HELD = ".held.weight"  # what an open projection's weight has behind its name in files
_ALIGNED = 8  # numbers of 16 bits in the 16 bytes that a row of grouped products must be a multiple of


class StackedWeight(nn.Module):
    """A parameter of a projection, as it came: (E, O, I), or (E, I, O) in a model that turns them."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class Bf16Weight(StackedWeight):
    """The same held in bfloat16."""

    def __init__(self, weight: nn.Parameter) -> None:
        weight.data = weight.data.to(torch.bfloat16)
        weight.requires_grad_(False)
        super().__init__(weight)


class Factor(nn.Module):
    """One half of the updates of all experts: (E, a, b)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class ExpertLinear(nn.Module):
    """A projection of all experts of a block, with low-rank updates (Hu et al. 2021) that act on what
    the projection reads.

    Args:
        weight: (E, O, I); (E, I, O) where `turned`, and so are the updates.
    """

    lora_magnitude_vector: ClassVar[Mapping[str, Any]] = {}  # experts have no DoRA

    def __init__(self, weight: nn.Parameter, turned: bool) -> None:
        super().__init__()
        self.held: nn.Module = StackedWeight(weight)
        self.turned = turned
        self.lora_A, self.lora_B, self.dropout = nn.ModuleDict(), nn.ModuleDict(), nn.Dropout(0.0)
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False

    @property
    def weight(self) -> Tensor:
        """What the projection holds, or what its 4 bits stand for."""
        return self.held.weight

    def get_base_layer(self) -> nn.Module:
        """The layer without its updates, as PEFT's layers have it."""
        return self.held

    def adapt(self, rank: int, alpha: float, dropout: float) -> None:
        """Add an update that changes nothing yet: A is drawn as in a linear layer, B is zero.

        Raises:
            ValueError: for a rank that is no smaller than the width of what is read.
        """
        shape = self.weight.shape
        count, (out, width) = shape[0], shape[:0:-1] if self.turned else shape[1:]
        if rank >= width:
            raise ValueError(f"rank={rank} is no low rank for experts that read {width} numbers; use less than {width}")
        a = self.weight.new_empty(count, *((width, rank) if self.turned else (rank, width)))
        nn.init.uniform_(a, -(width**-0.5), width**-0.5)
        b = self.weight.new_zeros(count, *((rank, out) if self.turned else (out, rank)))
        self.lora_A[NAME], self.lora_B[NAME], self.scaling[NAME] = Factor(a), Factor(b), alpha / rank
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows_RI: Tensor, ends_E: Tensor) -> Tensor:
        """(R, I) -> (R, O); the rows of expert e end before `ends_E[e]`."""
        found = self._base(rows_RI, ends_E)
        if self._disable_adapters or NAME not in self.lora_A:
            return found
        dtype = autocast_type(rows_RI.device) or rows_RI.dtype
        a, b = (half[NAME].weight.to(dtype) for half in (self.lora_A, self.lora_B))
        more = -self.rank % _ALIGNED
        a, b = F.pad(a, (0, more) if self.turned else (0, 0, 0, more)), F.pad(b, (0, 0, 0, more) if self.turned else (0, more))
        low_Rr = product(self.dropout(rows_RI).to(dtype), a, ends_E, self.turned)
        return found + (self.scaling[NAME] * product(low_Rr, b, ends_E, self.turned)).to(found.dtype)

    @property
    def rank(self) -> int:
        """Of the update."""
        return self.lora_A[NAME].weight.shape[2 if self.turned else 1]

    def _base(self, rows: Tensor, ends: Tensor) -> Tensor:
        if not isinstance(self.held, Nf4Weight):
            return product(rows, self.weight, ends, self.turned).to(rows.dtype)
        dtype = autocast_type(rows.device) or rows.dtype
        return _PackedProduct.apply(rows.to(dtype), self.held.packed, ends, self.held, self.turned)

    def replace(self, weight: Tensor) -> None:
        """Hold this weight and no update."""
        self.held = StackedWeight(nn.Parameter(weight, requires_grad=False))
        self.lora_A.clear()
        self.lora_B.clear()


def product(rows: Tensor, weight: Tensor, ends_E: Tensor, turned: bool) -> Tensor:
    """Rows (R, I) by the weight of their expert, in its type -> (R, O)."""
    return _grouped_mm(rows, weight if turned else weight.transpose(-2, -1), offs=ends_E)


class _PackedProduct(torch.autograd.Function):
    """`product` with packed weights, which are unpacked a second time in the backward pass: what
    they stand for is not kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, packed: Tensor, ends: Tensor, held: Nf4Weight, turned: bool) -> Tensor:
        ctx.save_for_backward(packed, ends)
        ctx.held, ctx.turned = held, turned
        return product(rows, held.as_numbers(rows.dtype, packed), ends, turned)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        packed, ends = ctx.saved_tensors
        (grad,) = grads
        weight = ctx.held.as_numbers(grad.dtype, packed)
        return product(grad.contiguous(), weight, ends, not ctx.turned), None, None, None, None


def update_of(a: Tensor, b: Tensor) -> Tensor:
    """What two halves add to a weight, before its scale; the rank is the smaller side of A."""
    return b @ a if a.shape[1] < a.shape[2] else a @ b


def experts_of(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of transformers that hold the experts of a block, by name."""
    for name, module in part.named_modules():
        held = all(hasattr(module, one) for one in (*PROJECTIONS, "_apply_gate", "is_transposed"))
        if held and not getattr(module, "has_post_expert_norm", False):
            yield name, module


def expert_weights(part: nn.Module) -> dict[str, nn.Parameter]:
    """The projections of experts that are not quantised, by their names in files."""
    found = {}
    for name, experts in experts_of(part):
        for kind in PROJECTIONS:
            own = getattr(experts, kind)
            weight = own.held.weight if isinstance(own, ExpertLinear) else own
            if not isinstance(own, ExpertLinear) or type(own.held) is StackedWeight:
                found[f"{name}.{kind}".lstrip(".")] = weight
    return found


def open_experts(experts: nn.Module) -> None:
    """Let both projections be layers, over the parameters that they were."""
    for kind in PROJECTIONS:
        if not isinstance(weight := getattr(experts, kind), ExpertLinear):
            delattr(experts, kind)
            setattr(experts, kind, ExpertLinear(weight, bool(experts.is_transposed)))
    setattr(experts, "forward", MethodType(_forward, experts))  # noqa: B010 (a method)
    experts.register_state_dict_post_hook(_names_of_files)
    experts.register_load_state_dict_pre_hook(_names_of_layers)


def close_experts(model: nn.Module) -> None:
    """Let projections be parameters of their module again where they hold neither updates nor
    quantised weights."""
    for _, experts in list(experts_of(model)):
        layers = {kind: getattr(experts, kind) for kind in PROJECTIONS}
        if all(isinstance(own, ExpertLinear) and type(own.held) is StackedWeight and not own.lora_A for own in layers.values()):
            for kind, own in layers.items():
                delattr(experts, kind)
                experts.register_parameter(kind, own.weight)
            delattr(experts, "forward")


def _forward(experts: Any, states_TH: Tensor, experts_TK: Tensor, shares_TK: Tensor) -> Tensor:
    """The sum over a token's experts: (T, H) -> (T, H)."""
    ids_R, order_R = experts_TK.flatten().sort(stable=True)
    ends_E = torch.searchsorted(ids_R, torch.arange(experts.num_experts, device=ids_R.device), right=True).int()
    rows = experts.gate_up_proj(states_TH[order_R // experts_TK.shape[1]], ends_E)
    if experts.has_bias:
        rows = rows + experts.gate_up_proj_bias[ids_R]
    rows = experts.down_proj(experts._apply_gate(rows), ends_E)
    if experts.has_bias:
        rows = rows + experts.down_proj_bias[ids_R]
    shared_RH = (rows * shares_TK.flatten()[order_R, None])[order_R.argsort()]
    return shared_RH.unflatten(0, experts_TK.shape).sum(dim=1).to(states_TH.dtype)


def _names_of_files(experts: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for kind in PROJECTIONS:
        if f"{prefix}{kind}{HELD}" in state:
            state[f"{prefix}{kind}"] = state.pop(f"{prefix}{kind}{HELD}")


def _names_of_layers(experts: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    for kind in PROJECTIONS:
        if isinstance(getattr(experts, kind), ExpertLinear) and f"{prefix}{kind}" in state:
            state[f"{prefix}{kind}{HELD}"] = state.pop(f"{prefix}{kind}")


def for_peft(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Halves as PEFT holds those of a parameter: A (E * r, I) by expert, B (O, r * E) by rank."""
    if a.shape[1] > a.shape[2]:
        a, b = a.transpose(1, 2), b.transpose(1, 2)
    return a.flatten(0, 1).contiguous(), b.permute(1, 2, 0).flatten(1).contiguous()
