"""Qwen-7B, the decoder of Qwen-VL: a Qwen2 block with two rules for texts beyond the trained length
(Bai et al. 2023; official `modeling_qwen.py`).

Letters: B rows, L text length, T query positions, K width of a head, H width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.layers import hf_attention
from lightning_internvl.layers.attention_masks import Mask, Segments
from lightning_internvl.layers.basic import rotary_table

LOG_N = "sdpa_log_n"  # name of the attention below, for transformers


class Qwen(HFCausalLM):
    """A `qwen2` model that reads beyond `seq_length` as Qwen does, in evaluation only.

    Args:
        seq_length: tokens of a row in training. Longer rows change the two rules below.
        dynamic_ntk: the rotary base grows with the length of the row (while writing, with that of
            the prompt).
        log_n: a query at a place i beyond `seq_length` is multiplied by log(i) / log(seq_length).
        model: `pretrained`, `config`, `vocab_size` and `embed_std`, as in `HFCausalLM`;
            `model_type` is qwen2.
    """

    def __init__(
        self,
        *,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        embed_std: float | None = None,
        seq_length: int = 2048,
        dynamic_ntk: bool = True,
        log_n: bool = True,
    ) -> None:
        super().__init__(pretrained=pretrained, config=config, vocab_size=vocab_size, embed_std=embed_std)
        fields = self.lm.config
        if fields.model_type != "qwen2":
            given = f"decoder.config.model_type={fields.model_type!r}"
            raise ValueError(f"{given} is not supported by Qwen; it must be 'qwen2'")
        if seq_length < 2:
            raise ValueError(f"{seq_length=} must be 2 or more")
        self.seq_length, self.dynamic_ntk, self.log_n = seq_length, dynamic_ntk, log_n
        theta = fields.rope_parameters["rope_theta"]
        width = self.lm.model.layers[0].self_attn.head_dim
        self.rotary = QwenRotary(width, theta, seq_length if dynamic_ntk else None)
        self.lm.model.rotary_emb = self.rotary
        if log_n:
            self.lm.config._attn_implementation = LOG_N
            for layer in self.lm.model.layers:
                layer.self_attn.log_n_from = seq_length

    def hidden(
        self,
        embeds_BLH: Tensor,
        attention_mask_BL: Tensor,
        *,
        segments: Segments | None = None,
        right_padded: bool = False,
    ) -> Tensor:
        """States after the final norm: (B, L, H) -> (B, L, H); arguments as in `HFCausalLM`."""
        self.rotary.length = embeds_BLH.shape[1] if segments is None else self._longest(segments)
        return super().hidden(embeds_BLH, attention_mask_BL, segments=segments, right_padded=right_padded)

    def _longest(self, segments: Segments) -> int:
        """Tokens of the longest sample; in evaluation a longer one has its own rotary base."""
        longest = max(map(max, filter(None, segments)), default=0)
        if self.dynamic_ntk and not self.training and longest > self.seq_length:
            raise ValueError(
                f"a packed sample of {longest} tokens is longer than decoder.seq_length={self.seq_length}; "
                "evaluate it in a row of its own (data.packing=null)"
            )
        return longest

    @torch.no_grad()
    def generate(self, embeds_BLH: Tensor, attention_mask_BL: Tensor, **options: Any) -> Tensor:
        """New ids (B, <= max_new_tokens) after left-padded embeddings; options of transformers."""
        self.rotary.length = embeds_BLH.shape[1]
        return super().generate(embeds_BLH, attention_mask_BL, **options)


class QwenRotary(nn.Module):
    """Rotary positions whose base grows with the row, in evaluation.

    Args:
        dim: K, width of a head.
        theta: the base at lengths up to `seq_length`.
        seq_length: tokens of a row in training; None keeps the base.

    Attributes:
        length: tokens of the row, or of the prompt while writing. Keys that are kept were turned
            with one base, so it must not change while an answer grows.
    """

    def __init__(self, dim: int, theta: float, seq_length: int | None) -> None:
        super().__init__()
        self.dim, self.theta, self.seq_length, self.length = dim, theta, seq_length, 0

    @property
    def alpha(self) -> int:
        """By how much the context grows: 1 to the trained length, 3 to twice, 7 to 4 times."""
        if self.training or self.seq_length is None or self.length <= self.seq_length:
            return 1
        return 2 ** math.ceil(math.log2(self.length / self.seq_length) + 1) - 1

    def forward(self, x: Tensor, position_ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, L, K) in the dtype of `x`."""
        base = self.theta * self.alpha ** (self.dim / (self.dim - 2))
        table = rotary_table(position_ids_BL.flatten(), self.dim, base)
        cos, sin = (t.unflatten(0, position_ids_BL.shape).to(x.dtype) for t in table)
        return cos, sin


def _log_n_attention(
    module: nn.Module,
    query_BHTK: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Mask | None,
    *,
    position_ids: Tensor,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention with longer queries at places beyond the trained length."""
    if not module.training:
        places = position_ids[:, None, :, None] + 1  # the first is 1
        scale = places.clamp(min=module.log_n_from).float().log() / math.log(module.log_n_from)
        query_BHTK = query_BHTK * scale.to(query_BHTK.dtype)
    return hf_attention.attention(module, query_BHTK, key, value, attention_mask, **options)


hf_attention.register(LOG_N, _log_n_attention)
