"""Parts from their configurations; what one needs of its neighbours is completed here.

A configuration is a plain dict with the class under `_target_`; `build` makes the object (Hydra's
`instantiate` in `train.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lightning_internvl.config.targets import check_arguments, locate, parameters_of
from lightning_internvl.config.trust import check_parts, is_trusted, targets_of, without_notes
from lightning_internvl.data.tokenizer import token_id
from lightning_internvl.layers.peft import add_adapters
from lightning_internvl.model.compatibility import check_contrasts, check_decoder, check_order, check_without_decoder
from lightning_internvl.model.vlm import VLM

Config = dict[str, Any]
Build = Callable[..., Any]
TRUSTED = "lightning_internvl."
TOKENIZERS = "lightning_internvl.data.tokenizer"


def trusted_build(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build a part or a tokenizer of this package or of one that the user trusts: for
    configurations that come with a checkpoint."""
    check_trusted(config)
    return _built(without_notes(config), **extra)


def _built(config: Mapping[str, Any], **extra: Any) -> Any:
    known = {key: _inner(value) for key, value in config.items() if not key.startswith("_")}
    return locate(config["_target_"])(**known, **extra)


def _inner(value: Any) -> Any:
    """A part inside a part's configuration is built too, as Hydra does."""
    return _built(value) if isinstance(value, Mapping) and "_target_" in value else value


def check_trusted(config: Any) -> None:
    """Refuse a configuration that comes with a checkpoint if it names anything but our parts and
    tokenizers, at any depth.

    Raises:
        ValueError: for another class or function that the user does not trust (not even its module
            is imported), and for settings that would fetch weights, code or kernels from elsewhere.
    """
    check_parts(config)
    for target in targets_of(config):
        if not is_trusted(target) and not _is_part(target):
            fault = f"comes with the checkpoint and is no part of {TRUSTED[:-1]}"
            raise ValueError(f"_target_: {target!r} {fault}; it is not run")


def _is_part(target: str) -> bool:
    found = locate(target)
    part = inspect.isclass(found) and issubclass(found, nn.Module) and found.__module__.startswith(TRUSTED)
    return part or (inspect.isfunction(found) and found.__module__ == TOKENIZERS)


def completed(build: Build, config: Mapping[str, Any], **known: Any) -> Any:
    """Build a part, passing on those of the known values that its signature names and the
    configuration leaves open.

    Raises:
        ValueError: if the part needs a value that nobody has, or is given one that it does not
            know.
    """
    config = {k: v for k, v in config.items() if k != "tokenizer"}
    check_arguments(config)
    parameters, _ = parameters_of(config["_target_"])
    extra = {k: v for k, v in known.items() if k in parameters and config.get(k) is None and v is not None}
    needed = {k for k, p in parameters.items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY}
    if missing := sorted(needed - set(config) - set(extra)):
        needs = f"{config['_target_']} needs {', '.join(missing)}"
        raise ValueError(f"{needs}, which neither the configuration nor its neighbours give")
    return build({k: v for k, v in config.items() if k not in extra}, **extra)


def completed_middleware(
    build: Build, config: Mapping[str, Any], encoder: Any, *, decoder_dim: int | None = None, vocab_size: int | None = None
) -> Any:
    """Build a middleware between an encoder and a decoder of this width; raises ValueError as
    `completed`."""
    return completed(
        build,
        config,
        encoder_dim=encoder.dim,
        encoder_dims=getattr(encoder, "dims", None),
        special_tokens=getattr(encoder, "special_tokens", None),
        decoder_dim=decoder_dim,
        vocab_size=vocab_size,
    )


def compose_model(config: Mapping[str, Any], build: Build) -> tuple[VLM, dict[str, Any]]:
    """A model from the configurations of its parts.

    Args:
        config: `encoder`, `middleware`, `decoder` (None without one), `objectives` (name to
            configuration), `image_token` (the placeholder in the decoder's text) and, where they
            are, `video_token` of videos and `peft` (adapters by part).

    Returns:
        the model and the tokenizers of the parts that read text, by part
    """
    readers = [part for part in ("middleware", "decoder") if (config.get(part) or {}).get("tokenizer")]
    tokenizers = {part: build(config[part]["tokenizer"]) for part in readers}
    sizes = {part: len(tokenizer) for part, tokenizer in tokenizers.items()}
    for part in tokenizers:
        _check_vocabulary(part, config[part], sizes[part])
    encoder = build(config["encoder"])
    decoder = None
    if config.get("decoder"):
        keeps_width = getattr(locate(config["middleware"]["_target_"]), "keeps_width", False)
        reads = encoder.dim if keeps_width else None
        decoder = completed(build, config["decoder"], vocab_size=sizes.get("decoder"), encoder_dim=reads)
    decoder_dim = decoder.dim if decoder is not None else None
    check_order(encoder, locate(config["middleware"]["_target_"]))
    if decoder is None:
        check_without_decoder(config["middleware"])
    words = sizes.get("middleware")
    middleware = completed_middleware(build, config["middleware"], encoder, decoder_dim=decoder_dim, vocab_size=words)
    check_decoder(encoder, middleware, decoder)
    objectives: dict[str, nn.Module] = {
        name: completed(build, objective, dim=getattr(middleware, "dim", None), decoder_dim=decoder_dim)
        for name, objective in (config.get("objectives") or {}).items()
    }
    check_contrasts(middleware, objectives)
    tokens: dict[str, Any] = {}
    if decoder is not None and "decoder" in tokenizers:
        named = {kind: config[f"{kind}_token"] for kind in ("image", "video") if config.get(f"{kind}_token")}
        tokens = {f"{kind}_token_id": token_id(tokenizers["decoder"], token) for kind, token in named.items()}
    model = VLM(encoder, middleware, decoder, objectives=objectives, **tokens)
    add_adapters(model, config.get("peft"))
    return model, tokenizers


def _check_vocabulary(part: str, config: Config, words: int) -> None:
    """Refuse a table of words smaller than the tokenizer, unless a checkpoint gave both.

    Raises:
        ValueError: with both sizes.
    """
    rows = config.get("vocab_size")
    if rows is not None and rows < words and not config["tokenizer"]["_target_"].endswith("saved_tokenizer"):
        fault = f"{part}.vocab_size={rows}, but its tokenizer has {words} words"
        raise ValueError(f"{fault}; leave vocab_size out, or give {words} or more")
