"""Our attention in the models of transformers, for packed rows of language and chosen backends.

A model keeps the attention of its configuration until one of the two is needed; then it goes
through `attend`. For rows that are not packed that is PyTorch's attention as transformers calls it,
unless the configuration of the run asks for another.

Letters: B rows, H heads, G heads of keys and values, T query positions, S key positions, K width of
a head, L length of a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_internvl.layers.attention import attend, requested_backend
from lightning_internvl.layers.attention_masks import Mask, Segments, check_segments, on_device, packed, positions

OURS = "lightning_internvl"  # name of the attention below, for transformers
_reads_masks: set[str] = set()
# What some models add to the scores, which no packed row has been shown to survive.
_EXTRAS = ("softcap", "s_aux", "position_bias")


def register(name: str, attention: Callable[..., tuple[Tensor, None]]) -> None:
    """Make an attention that reads masks described by lengths known to transformers."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, _mask)
    _reads_masks.add(name)


def attention(
    module: torch.nn.Module,
    query_BHTK: Tensor,
    key_BGSK: Tensor,
    value_BGSK: Tensor,
    attention_mask: Tensor | Mask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`attend` with the arguments of transformers: (B, T, H, K)."""
    settings = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **options}
    if not isinstance(attention_mask, Mask) and (requested_backend() == "auto" or options.get("position_bias") is not None):
        tensors = query_BHTK, key_BGSK, value_BGSK
        return sdpa_attention_forward(module, *tensors, attention_mask, **settings)
    _check_options(module, attention_mask, options)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query_BHTK.shape[2] > 1
    out = attend(query_BHTK, key_BGSK, value_BGSK, mask=attention_mask, causal=causal, dropout=dropout, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


class RightPadded:
    """Stands where a model reads a mask, for rows with all padding behind their tokens: no token
    sees what comes after it, so that nothing is left to hide, and no device is asked whether."""

    ndim = 4  # as of a mask that is ready: transformers asks

    def __init__(self, rows: int, length: int) -> None:
        self.shape = (rows, 1, length, length)


def _mask(*, attention_mask: Tensor | Mask | RightPadded | None = None, **options: Any) -> Tensor | Mask | None:
    """A mask described by lengths stays what it is; of others PyTorch's attention gets what it
    always gets."""
    if isinstance(attention_mask, Mask):
        return attention_mask
    if isinstance(attention_mask, RightPadded):
        attention_mask = None
    return sdpa_mask(attention_mask=attention_mask, **options)


def _check_options(module: torch.nn.Module, mask: Tensor | Mask | None, options: dict[str, Any]) -> None:
    if extras := [name for name in _EXTRAS if options.get(name) is not None]:
        raise ValueError(
            f"{type(module).__name__} needs {', '.join(extras)} in its attention, "
            f"which neither packed rows nor attention={requested_backend()} have; set data.packing=null and attention=auto"
        )
    window = options.get("sliding_window")
    if window is not None and isinstance(mask, Mask):
        longest = max(piece.counts[0] for row in mask.rows for piece in row)
        if longest > window:
            raise ValueError(f"a packed sample of {longest} tokens is longer than the decoder's sliding window of {window}")


def use_ours(model: PreTrainedModel) -> None:
    """Let a model's attention go through `attend`, unless it has one of its own."""
    if _follows_interface(model):
        for part in model.modules():  # an encoder-decoder has a configuration for each stack
            if isinstance(part, PreTrainedModel) and part.config._attn_implementation not in _reads_masks:
                part.config._attn_implementation = OURS


def packed_inputs(model: PreTrainedModel, segments: Segments, attention_mask_BL: Tensor) -> dict[str, Any]:
    """What a model reads of packed rows: `attention_mask`, of which no square is made, and
    `position_ids` (B, L) from 0 in each.

    Raises:
        ValueError: for segments that do not fit the rows, and for a model that would let one sample
            see another.
    """
    length = attention_mask_BL.shape[1]
    _check_rows(segments, attention_mask_BL)
    check_packable(model)
    use_ours(model)
    places = on_device(positions(segments, length), attention_mask_BL.device)
    return {"attention_mask": packed(segments, length), "position_ids": places}


def right_padded_inputs(model: PreTrainedModel, attention_mask_BL: Tensor) -> dict[str, Any]:
    """What a model reads of rows that end with their padding: `attention_mask`, and `position_ids`
    (1, L); the mask alone where the model has an attention that must look at it."""
    kinds = {part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)}
    if _unpackable(model) or not kinds <= {"sdpa", *_reads_masks}:
        return {"attention_mask": attention_mask_BL}
    use_ours(model)
    rows, length = attention_mask_BL.shape
    places = torch.arange(length, device=attention_mask_BL.device)[None]
    return {"attention_mask": RightPadded(rows, length), "position_ids": places}


def _check_rows(segments: Segments, attention_mask_BL: Tensor) -> None:
    check_segments(segments, attention_mask_BL.shape[1], len(attention_mask_BL))
    if attention_mask_BL.device.type == "cpu":  # on a GPU this look would stop the host
        tokens, told = attention_mask_BL.sum(dim=1).tolist(), [sum(lengths) for lengths in segments]
        if tokens != told:
            raise ValueError(f"the segments of the rows sum to {told} tokens, but their attention_mask has {tokens}")


def check_packable(model: PreTrainedModel) -> None:
    """Raises ValueError for a model that would let the samples of a packed row see each other."""
    if fault := _unpackable(model):
        raise ValueError(
            f"the decoder's model_type={model.config.model_type!r} {fault}, so that packed samples would see each other; "
            "set data.packing=null, or take another decoder (llama, qwen2, mistral, opt)"
        )


def _unpackable(model: PreTrainedModel) -> str | None:
    """Why a model cannot read a mask that is described."""
    config, base = model.config, model.base_model
    known = {"full_attention", "sliding_attention"}
    kinds = set(getattr(config, "layer_types", None) or ()) - known
    if not _follows_interface(model):
        return "has an attention of its own"
    if kinds:
        return f"has layers of {', '.join(sorted(kinds))}"
    return None if "position_ids" in inspect.signature(base.forward).parameters else "cannot be told positions"


def _follows_interface(model: PreTrainedModel) -> bool:
    return model.base_model._can_set_attn_implementation()


register(OURS, attention)
