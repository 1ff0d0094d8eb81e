"""Partial LoRA: a language model with low-rank updates that act on visual tokens only
(InternLM-XComposer2, Dong et al. 2024, section 3.2; official `build_mlp.py`).

Letters: B rows, L text length, H decoder width, D in and O out width of a projection, R rank, V
visual tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.layers.attention_masks import Segments
from lightning_internvl.layers.places import true_places

# Projections that share one A, by the module that holds them: InternLM2 has queries, keys and
# values in one matrix.
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "self_attn": {"qkv": ("q_proj", "k_proj", "v_proj"), "out": ("o_proj",)},
    "mlp": {"gate": ("gate_proj",), "up": ("up_proj",), "down": ("down_proj",)},
}


class PartialLoRA(nn.Module):
    """The update B(A(dropout(x))) * alpha / rank of the rows that show visual tokens, for
    projections that read the same x.

    A starts as in a linear layer, B at zero, so that a fresh update changes nothing. (The public
    file leaves B as it comes, because its guard looks for another name.) While training, dropout is
    drawn for each projection.

    Args:
        projections: the linear layers, by name; they keep their class and parameters, and are added
            to by a hook.

    Attributes:
        rows: (V,) places of the visual tokens among the B * L rows; None changes nothing.
    """

    def __init__(self, projections: dict[str, nn.Module], rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        (width,) = {linear.in_features for linear in projections.values()}
        self.scale, self.dropout = alpha / rank, nn.Dropout(dropout)
        self.a = nn.Parameter(torch.empty(rank, width))
        zeros = {name: torch.zeros(one.out_features, rank) for name, one in projections.items()}
        self.b = nn.ParameterDict(zeros)
        nn.init.kaiming_uniform_(self.a, a=5**0.5)
        self.rows: Tensor | None = None
        for name, linear in projections.items():
            linear.register_forward_hook(_Added(self, name))

    def forward(self, x: Tensor, out: Tensor, name: str) -> Tensor:
        """(..., D) and the projection's own (..., O) -> (..., O)"""
        if self.rows is None:
            return out
        seen_VD = self.dropout(x.flatten(0, -2).index_select(0, self.rows).to(self.a.dtype))
        update_VO = F.linear(F.linear(seen_VD, self.a), self.b[name]) * self.scale
        # Without visual tokens this adds nothing, yet keeps the parameters in the graph of every
        # rank.
        return out.flatten(0, -2).index_add(0, self.rows, update_VO.to(out.dtype)).view_as(out)


class _Added:
    """The hook of one projection: an object, which copies of the model copy."""

    def __init__(self, update: PartialLoRA, name: str) -> None:
        self.update, self.name = update, name

    def __call__(self, linear: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return self.update(args[0], out, self.name)


class PartialLoRACausalLM(HFCausalLM):
    """A LLaMA-shaped language model with a Partial LoRA around every projection of every layer.

    The updates lie below `lm...self_attn.plora` and `lm...mlp.plora`; to train them alone: `train:
    ["decoder.*.plora"]`. Hooks add them to the linear layers, whatever these become: they go on to
    act inside PEFT's LoRA layers and after these are merged.

    Args:
        rank, alpha: of the updates; they count alpha / rank.
        dropout: of what the updates read, while training.
        settings: of `HFCausalLM`.

    Raises:
        ValueError: if the language model has no LLaMA layers, or rank is below 1.
    """

    inputs = ("visual_places", "visual_count", "segments", "right_padded")
    layouts = ("xcomposer2",)  # checkpoints that have a place for the updates

    def __init__(self, *, rank: int = 256, alpha: float = 256.0, dropout: float = 0.05, **settings: Any) -> None:
        super().__init__(**settings)
        if rank < 1:
            raise ValueError(f"Partial LoRA needs a rank of 1 or more, not {rank}")
        self.rank, self.alpha = rank, alpha
        for layer in self.sharding_units():
            _add_updates(layer, rank, alpha, dropout)
            layer.register_forward_pre_hook(_mark_layer, with_kwargs=True)
        self._places: Tensor | None = None
        self._count: int | None = None
        self.lm.base_model.register_forward_pre_hook(self._show, with_kwargs=True)

    def hidden(
        self,
        embeds_BLH: Tensor,
        attention_mask_BL: Tensor,
        visual_places: Tensor | None = None,
        visual_count: int | None = None,
        segments: Segments | None = None,
        right_padded: bool = False,
    ) -> Tensor:
        """States after the final norm: (B, L, H) -> (B, L, H).

        Args:
            visual_places: bool (B, L), where visual tokens stand; None: the language model without
                its updates.
            visual_count: how many of them there are, where the host knows it.
            segments, right_padded: as in `HFCausalLM`.
        """
        with self._showing(visual_places, visual_count):
            return super().hidden(embeds_BLH, attention_mask_BL, segments=segments, right_padded=right_padded)

    @torch.no_grad()
    def generate(
        self,
        embeds_BLH: Tensor,
        attention_mask_BL: Tensor,
        visual_places: Tensor | None = None,
        visual_count: int | None = None,
        **options: Any,
    ) -> Tensor:
        """New ids (B, <= max_new_tokens) after left-padded prompts; the updates act on the prompt's
        visual tokens."""
        with self._showing(visual_places, visual_count):
            return super().generate(embeds_BLH, attention_mask_BL, **options)

    @contextmanager
    def _showing(self, places_BL: Tensor | None, count: int | None) -> Iterator[None]:
        self._places, self._count = places_BL, count
        try:
            yield
        finally:
            self._places = self._count = None

    def _show(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the layers the places of visual tokens, as an argument, so that gradient
        checkpointing gives them once more."""
        embeds = kwargs.get("inputs_embeds")
        if self._places is None or embeds is None:  # a later step of generation, which reads ids
            return args, kwargs
        beams = len(embeds) // len(self._places)
        count = None if self._count is None else self._count * beams
        return args, kwargs | {"visual_rows": rows_of(self._places.repeat_interleave(beams, dim=0), count)}


def _add_updates(layer: nn.Module, rank: int, alpha: float, dropout: float) -> None:
    for owner, groups in GROUPS.items():
        module: Any = getattr(layer, owner, None)
        names = [name for group in groups.values() for name in group]
        if lacking := [name for name in names if not hasattr(getattr(module, name, None), "in_features")]:
            raise ValueError(f"Partial LoRA needs the layers of LLaMA; {type(layer).__name__} has no {owner}.{lacking[0]}")
        owned = {key: _projections(module, group) for key, group in groups.items()}
        updates = {key: PartialLoRA(own, rank, alpha, dropout) for key, own in owned.items()}
        module.plora = nn.ModuleDict(updates)


def _projections(module: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    return {name: getattr(module, name) for name in names}


def rows_of(places_BL: Tensor, count: int | None = None) -> Tensor:
    """(B, L) bool -> (V,) places among B * L rows, V of them where `count` says so; on the meta
    device all rows."""
    flat = places_BL.flatten()
    return torch.arange(len(flat), device="meta") if flat.is_meta else true_places(flat, count)[0]


def mark(module: nn.Module, rows_V: Tensor | None) -> None:
    """Say to every update below a module which rows are visual tokens."""
    for update in module.modules():
        if isinstance(update, PartialLoRA):
            update.rows = rows_V


def _mark_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mark(layer, kwargs.pop("visual_rows", None))
    return args, kwargs
