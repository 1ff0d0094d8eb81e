"""Which parts fit each other, said before anything is trained.

Most combinations work. Those that cannot, and why:

=====================================================
============================================================== encoder, middleware or decoder
needs =====================================================
============================================================== an encoder of any resolution
(Qwen2ViT)                a middleware that reads its blocks of patches (PatchMerger), and
                                                       a processor that tells their grids
PatchMerger                                            such an encoder; others give patches row by
row HybridMLP                                              an encoder of two towers (HybridEncoder)
an encoder of two towers                               HybridMLP, and a processor that gives both
sizes a middleware that hands tokens to a decoder and       a decoder
reads no text (MLP, resamplers)
a Q-Former                                             QueryITC where pictures and captions are
contrasted a decoder that attends to pictures (FlamingoCausalLM)  an encoder that gives equally many
patches of every picture CLIPText, probes                                       no decoder: they
hand nothing to one CLIPText                                               an encoder with a token
that stands for the whole picture `data.packing=packed`                                  a decoder
that keeps the samples of a row apart (no encoder-decoder) QLLaMA, Q-Former with masking in the
contrastive       an encoder that can leave out patches (not SAM) stage (`keep_tokens`)
=====================================================
==============================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_internvl.config.targets import parameters_of
from lightning_internvl.decoders import hf_attention
from lightning_internvl.decoders.hf_causal import HFCausalLM

# What a stage can do whose middleware reads no text, or stands where no decoder is.
READERS = (
    "Choose one that reads text (qllama_toy, qformer_toy, clip_text_toy) for stages without a decoder, and this one for those "
    "with one alone, as in pipeline=[contrastive,supervised] middleware@stages.supervised.middleware=mlp"
)
# What an encoder gives: how it is described, and the middleware that reads it.
GIVEN = {
    "rows": ("patches of square pictures, row by row", "another middleware, such as mlp or pixel_shuffle_mlp"),
    "blocks": (
        "patches of pictures of any size, in blocks of neighbours",
        "middleware=patch_merger, which needs a decoder in each stage (experiment=qwen2_vl_toy is a recipe of both)",
    ),
    "pair": (
        "the patches of two towers",
        "middleware=hybrid_mlp, which needs a decoder in each stage (experiment=deepseek_vl_toy is a recipe of both)",
    ),
}


def check_order(encoder: nn.Module, middleware: type[nn.Module]) -> None:
    """Refuse a middleware that cannot read what the encoder gives.

    An encoder says by `gives`, a middleware by `reads` what passes between them (see `GIVEN`);
    "rows" where neither says it.

    Raises:
        ValueError: with the reason and what to change.
    """
    given, read = getattr(encoder, "gives", "rows"), getattr(middleware, "reads", "rows")
    if given != read:
        (gives, change), (reads, _) = GIVEN[given], GIVEN[read]
        raise ValueError(
            f"encoder {type(encoder).__name__} and middleware {middleware.__name__} do not fit: "
            f"the one gives {gives}, the other reads {reads}; choose {change}"
        )


def check_decoder(encoder: nn.Module, middleware: nn.Module, decoder: nn.Module | None) -> None:
    """Refuse a decoder behind a middleware that hands nothing to one, or nothing that it can read.

    Raises:
        ValueError: with what to change.
    """
    if decoder is not None and middleware.tokens_out(encoder.num_tokens()) == 0:
        raise ValueError(
            f"middleware {type(middleware).__name__} hands nothing to a decoder; leave the decoder out of the stage's parts, or "
            "choose another middleware for this stage (middleware@stages.NAME.middleware=mlp)"
        )
    if "visual" in getattr(decoder, "inputs", ()) and getattr(encoder, "gives", "rows") == "blocks":
        raise ValueError(
            f"decoder {type(decoder).__name__} attends to equally many tokens of every picture, and encoder "
            f"{type(encoder).__name__} gives pictures of any size; choose another encoder or decoder"
        )


def check_without_decoder(middleware: Mapping[str, Any]) -> None:
    """Refuse a middleware's configuration that needs a decoder in a stage without one.

    Raises:
        ValueError: with what fits.
    """
    size = parameters_of(middleware["_target_"])[0].get("decoder_dim")
    if size is not None and size.default is size.empty and middleware.get("decoder_dim") is None:
        raise ValueError(
            f"{middleware['_target_']} needs decoder_dim, which neither the configuration nor its "
            f"neighbours give: it hands tokens to a decoder, and this stage has none. {READERS}"
        )


def check_contrasts(middleware: nn.Module, objectives: Mapping[str, nn.Module]) -> None:
    """Refuse a contrast of whole pictures with a middleware that embeds a picture by several
    queries, and the reverse.

    Raises:
        ValueError: with the loss that fits.
    """
    embeds = getattr(middleware, "embeds", "pictures")
    for name, objective in objectives.items():
        compares = getattr(objective, "compares", embeds)
        if compares != embeds:
            fitting = {"queries": "query_itc", "pictures": "itc"}[embeds]
            raise ValueError(
                f"objectives.{name}: {type(objective).__name__} compares captions with {compares}, and middleware "
                f"{type(middleware).__name__} embeds {embeds}; give objective={fitting} for stages.contrastive, "
                f"+objective@stages.NAME.objectives.{name}={fitting} for another stage, or choose another middleware"
            )


def check_processor(encoder: nn.Module, processor: Any) -> None:
    """Refuse a processor that does not give what the encoder reads beside the pixels.

    Raises:
        ValueError: with the names and what to change.
    """
    missing = [name for name in getattr(encoder, "inputs", ()) if name not in processor.blank(1, "meta")]
    if missing:
        fitting = {"image_grid_thw": "any_resolution", "high_res_pixel_values": "padded_pair"}
        choices = ", ".join(sorted({f"processor@data.processor={fitting[n]}" for n in missing if n in fitting})) or "another one"
        raise ValueError(
            f"encoder {type(encoder).__name__} reads {', '.join(missing)}, "
            f"which processor {type(processor).__name__} does not give; choose {choices}"
        )


def check_captions(middleware: nn.Module, max_length: int) -> None:
    """Refuse captions that may be longer than a middleware can read.

    Raises:
        ValueError: with the longest that it can.
    """
    most = getattr(middleware, "max_text", max_length)
    if max_length > most:
        raise ValueError(
            f"data.pairs_collate.max_length={max_length}: {type(middleware).__name__} reads texts of up to {most} tokens; "
            f"give data.pairs_collate.max_length={most}, and longer captions lose their end"
        )


def check_packable(decoder: nn.Module) -> None:
    """Refuse a decoder that does not keep the samples of a packed row apart.

    Raises:
        ValueError: with what to choose instead.
    """
    if "segments" not in getattr(decoder, "inputs", ()):
        raise ValueError(
            f"data.packing=packed: decoder {type(decoder).__name__} does not keep the samples of a row apart; choose "
            "data.packing=bucketed, which leaves each sample its own row, data.packing=null, or another decoder"
        )
    if isinstance(decoder, HFCausalLM):
        hf_attention.check_packable(decoder.lm)
