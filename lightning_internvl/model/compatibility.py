"""Which parts fit each other, said of parts that are built: the rules of
`lightning_internvl.config.fit`, for classes whose source files do not say it too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_internvl.config import fit
from lightning_internvl.config.targets import parameters_of
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.layers import hf_attention


def check_order(encoder: nn.Module, middleware: type[nn.Module]) -> None:
    """Refuse a middleware that cannot read what the encoder gives.

    An encoder says by `gives`, a middleware by `reads` what passes between them (see `fit.GIVEN`);
    "rows" where neither says it.

    Raises:
        ValueError: with the reason and what to change.
    """
    names = type(encoder).__name__, middleware.__name__
    _raise(fit.order_faults(names, getattr(encoder, "gives", "rows"), getattr(middleware, "reads", "rows")))


def check_decoder(encoder: nn.Module, middleware: nn.Module, decoder: nn.Module | None) -> None:
    """Refuse a decoder behind a middleware that hands nothing to one, or nothing that it can read.

    Raises:
        ValueError: with what to change.
    """
    if decoder is not None and middleware.tokens_out(encoder.num_tokens()) == 0:
        raise ValueError(fit.hands_nothing(type(middleware).__name__))
    if decoder is not None and getattr(middleware, "keeps_width", False) and "visual" not in getattr(decoder, "inputs", ()):
        names = type(middleware).__name__, type(decoder).__name__
        _raise(fit.width_faults(names, encoder.dim, decoder.dim))
    if "visual" in getattr(decoder, "inputs", ()):
        uneven = [f"encoder {type(encoder).__name__}"] if getattr(encoder, "gives", "rows") == "blocks" else []
        uneven += [f"middleware {type(middleware).__name__}"] if getattr(middleware, "uneven", False) else []
        for part in uneven:
            raise ValueError(fit.uneven_pictures(type(decoder).__name__, part))


def check_without_decoder(middleware: Mapping[str, Any]) -> None:
    """Refuse a middleware's configuration that needs a decoder in a stage without one.

    Raises:
        ValueError: with what fits.
    """
    size = parameters_of(middleware["_target_"])[0].get("decoder_dim")
    if size is not None and size.default is size.empty and middleware.get("decoder_dim") is None:
        raise ValueError(fit.without_decoder(fit.name_of(middleware)))


def check_contrasts(middleware: nn.Module, objectives: Mapping[str, nn.Module]) -> None:
    """Refuse a contrast of whole pictures with a middleware that embeds a picture by several
    queries, and the reverse.

    Raises:
        ValueError: with the loss that fits.
    """
    embeds = getattr(middleware, "embeds", "pictures")
    for name, objective in objectives.items():
        compares = getattr(objective, "compares", None) or embeds
        names = type(objective).__name__, type(middleware).__name__
        _raise(fit.contrast_faults(name, names[0], compares, names[1], embeds))


def check_processor(model: Any, processor: Any) -> None:
    """Refuse a processor that does not give what encoder and middleware read beside the pixels, or
    that gives more.

    Raises:
        ValueError: with the names and what to change; for other grids than those of the middleware.
    """
    parts = {"encoder": model.encoder, "middleware": model.middleware}
    readers = {f"{name} {type(part).__name__}": getattr(part, "inputs", ()) for name, part in parts.items()}
    _raise(fit.processor_faults(readers, type(processor).__name__, set(processor.blank(1, "meta")) - {"pixel_values"}))
    for name in ("grids", "map_squares", "frame_pool"):
        here, there = getattr(processor, name, None), getattr(model.middleware, name, None)
        if here != there:
            raise ValueError(f"data.processor.{name}={here} differs from middleware.{name}={there}; give both the same")


def _raise(faults: Iterator[str]) -> None:
    for fault in faults:
        raise ValueError(fault)


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
