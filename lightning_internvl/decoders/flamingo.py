"""The decoder of Flamingo: a frozen language model in which gated cross-attention reads pictures
before every k-th block (Alayrac et al. 2022, section 2.2; public design of OpenFlamingo).

Letters: B rows, L text length, H width, N pictures of the batch, M most pictures of a row, T visual
tokens of a picture, D their width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.layers.attention import attend
from lightning_internvl.layers.attention_masks import Segments, check_segments, on_device, starts
from lightning_internvl.layers.basic import feed_forward, init_normal, merge_heads, split_heads


class FlamingoCausalLM(HFCausalLM):
    """A language model that reads visual tokens by attention, one placeholder for each picture
    marking where it stands.

    A text token sees the picture before it, and no other; with `all_before` all pictures before it.
    The placeholder itself sees its own. Gates start at zero, so that a fresh model gives the
    language model's own logits. Blocks are reached by hooks, and the language model keeps its class
    and names; the layers of attention lie below `cross`, to train them alone: `train: [middleware,
    decoder.cross]`.

    Args:
        encoder_dim: D, width of the visual tokens (completed from the encoder behind a middleware
            that keeps its width, as the resampler does); None: that of the language model.
        every: k, counted so that the last of k blocks has one (published: 1 for 3B, 4 for 9B, 7 for
            80B).
        heads, head_dim, mlp_ratio: of the cross-attention layers (OpenFlamingo: 8, 64, 4).
        all_before: whether text sees all pictures before it.
        gate: where the gates start; 0.0 leaves a trained language model as it is, a fresh one
            learns to look sooner from 1.0.
        init_std: deviation of the initial weights of the cross-attention layers.
        options: of `HFCausalLM`.

    Raises:
        ValueError: if the language model has fewer than `every` blocks.
    """

    inputs = ("visual", "visual_places", "image_counts", "segments", "right_padded")

    def __init__(
        self,
        *,
        encoder_dim: int | None = None,
        every: int = 1,
        heads: int = 8,
        head_dim: int = 64,
        mlp_ratio: int = 4,
        all_before: bool = False,
        gate: float = 0.0,
        init_std: float = 0.02,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        blocks = super().sharding_units()
        if not 1 <= every <= len(blocks):
            raise ValueError(f"decoder.{every=} must be from 1 to {len(blocks)}, the blocks of the language model")
        self.every, self.all_before, self.encoder_dim = every, all_before, encoder_dim or self.dim
        places = [i for i in range(len(blocks)) if (i + 1) % every == 0]
        sizes = (self.encoder_dim, heads, head_dim, mlp_ratio, init_std)
        self.cross = nn.ModuleDict({str(i): GatedCrossAttention(self.dim, *sizes) for i in places})
        for layer in self.cross.values():
            nn.init.constant_(layer.attn_gate, gate)
            nn.init.constant_(layer.ff_gate, gate)
        self._shown: _Shown | None = None
        for i in places:
            blocks[i].register_forward_pre_hook(_Before(self, str(i)), with_kwargs=True)

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""
        return [*super().sharding_units(), *self.cross.values()]

    def hidden(
        self,
        embeds_BLH: Tensor,
        attention_mask_BL: Tensor,
        visual: Tensor | None = None,
        visual_places: Tensor | None = None,
        image_counts: Tensor | None = None,
        segments: Segments | None = None,
        right_padded: bool = False,
    ) -> Tensor:
        """States after the final norm: (B, L, H) -> (B, L, H).

        Args:
            visual: (N, T, D), the pictures of all rows in order; None: no row shows one.
            visual_places: bool (B, L), where a picture stands.
            image_counts: pictures of each sample, on the host; None: they are counted on the device,
                for which the host waits.
            segments, right_padded: as in `HFCausalLM`; a text sees pictures of its own sample only.
        """
        most = None
        if image_counts is not None and not image_counts.is_meta:
            most = most_pictures(image_counts.tolist(), segments)
        with self._showing(embeds_BLH, visual, visual_places, segments, most):
            return super().hidden(embeds_BLH, attention_mask_BL, segments=segments, right_padded=right_padded)

    @torch.no_grad()
    def generate(
        self,
        embeds_BLH: Tensor,
        attention_mask_BL: Tensor,
        visual: Tensor | None = None,
        visual_places: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """New ids (B, <= max_new_tokens) after left-padded prompts, which see the last picture."""
        with self._showing(embeds_BLH, visual, visual_places):
            return super().generate(embeds_BLH, attention_mask_BL, **options)

    @contextmanager
    def _showing(
        self,
        embeds_BLH: Tensor,
        visual: Tensor | None,
        places_BL: Tensor | None,
        segments: Segments | None = None,
        most: int | None = None,
    ) -> Iterator[None]:
        if places_BL is None or visual is None:
            places_BL = torch.zeros(embeds_BLH.shape[:2], dtype=torch.bool, device=embeds_BLH.device)
            visual = embeds_BLH.new_zeros(0, 1, self.encoder_dim)
        self._shown = _Shown(visual, places_BL, self.all_before, segments, most)
        try:
            yield
        finally:
            self._shown = None


class _Shown:
    """The pictures of a batch by row, and which of them each token sees.

    Args:
        most: pictures of the row that has most; None: they are counted.

    Attributes:
        media: (B, M * T, D); rows with fewer pictures are filled up with zeros, M is 1 or more.
        seen: bool (B, L, M * T).
    """

    def __init__(
        self,
        visual_NTD: Tensor,
        places_BL: Tensor,
        all_before: bool,
        segments: Segments | None = None,
        most: int | None = None,
    ) -> None:
        before = places_BL.cumsum(dim=1)  # pictures up to each token
        # On the meta device there are no values to count: as many in each row as there are for it.
        if places_BL.is_meta:
            most = len(visual_NTD) // len(places_BL)
        elif most is None:
            most = int(before[:, -1].max())
        numbers = torch.arange(1, max(1, most) + 1, device=places_BL.device)
        held = numbers <= before[:, -1:]  # B, M
        media = visual_NTD.new_zeros(*held.shape, *visual_NTD.shape[1:])
        if len(visual_NTD):
            media = media.masked_scatter(held[..., None, None], visual_NTD)
        self.media = media.flatten(1, 2)
        # B, L, M
        own = numbers <= before[..., None] if all_before else numbers == before[..., None]
        if segments is not None:
            check_segments(segments, places_BL.shape[1], len(places_BL))
            begin = on_device(starts(segments, places_BL.shape[1]), places_BL.device)
            # pictures of the samples before, in the same row
            others = (before - places_BL.long()).gather(1, begin)
            own = own & (numbers > others[..., None])
        self.seen = own.repeat_interleave(visual_NTD.shape[1], dim=2)

    def at(self, hidden_BLH: Tensor) -> tuple[Tensor, Tensor]:
        """Media and what is seen of them for the rows and tokens of a step: all, or in generation
        the newest, for each beam."""
        beams, length = len(hidden_BLH) // len(self.media), hidden_BLH.shape[1]
        media = self.media if beams == 1 else self.media.repeat_interleave(beams, dim=0)
        seen = self.seen if length == self.seen.shape[1] else self.seen[:, -1:].expand(-1, length, -1)
        return media, seen if beams == 1 else seen.repeat_interleave(beams, dim=0)


def most_pictures(counts: Sequence[int], segments: Segments | None = None) -> int:
    """Pictures of the row that has most, for those of each sample, one a row or as packed."""
    left = iter(counts)
    rows = counts if segments is None else [sum(islice(left, len(row))) for row in segments]
    return max(rows, default=0)


class _Before:
    """The hook of one block: an object, which copies of the model copy."""

    def __init__(self, decoder: FlamingoCausalLM, name: str) -> None:
        self.decoder, self.name = decoder, name

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shown, cross = self.decoder._shown, self.decoder.cross[self.name]
        if shown is None:  # the language model alone
            return args, kwargs
        if args:
            return (cross(args[0], *shown.at(args[0])), *args[1:]), kwargs
        hidden = kwargs["hidden_states"]
        return args, kwargs | {"hidden_states": cross(hidden, *shown.at(hidden))}


class GatedCrossAttention(nn.Module):
    """Text attends to visual tokens, then a feed-forward layer; each is added times the tanh of a
    gate that starts at zero.

    Parameter names are those of OpenFlamingo (`gated_cross_attn_layer`).
    """

    def __init__(self, dim: int, visual_dim: int, heads: int, head_dim: int, mlp_ratio: int, init_std: float = 0.02) -> None:
        super().__init__()
        self.attn = _MaskedCrossAttention(dim, visual_dim, heads, head_dim)
        self.ff = feed_forward(dim, mlp_ratio)
        self.attn_gate, self.ff_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        init_normal(self, init_std)

    def forward(self, x_BLH: Tensor, media_BSD: Tensor, seen_BLS: Tensor) -> Tensor:
        """(B, L, H), visual tokens (B, S, D) and which of them each text token sees -> (B, L, H)"""
        x = x_BLH + self.attn_gate.tanh() * self.attn(x_BLH, media_BSD, seen_BLS)
        return x + self.ff_gate.tanh() * self.ff(x)


class _MaskedCrossAttention(nn.Module):
    def __init__(self, dim: int, visual_dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(visual_dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x_BLH: Tensor, media_BSD: Tensor, seen_BLS: Tensor) -> Tensor:
        keys, values = self.to_kv(media_BSD.to(self.norm.weight.dtype)).chunk(2, dim=-1)
        q, k, v = (split_heads(t, self.heads) for t in (self.to_q(self.norm(x_BLH)), keys, values))
        some = seen_BLS.any(dim=2)
        # A token before any picture sees nothing: it may look anywhere, and what it finds is not
        # taken.
        out = merge_heads(attend(q, k, v, mask=(seen_BLS | ~some[..., None])[:, None]))
        return self.to_out(out * some[..., None])
