"""Parts from their configurations. Dimensions are written once: what a part needs of its neighbours is completed here.

A configuration is a plain dict with the class under `_target_`; `build` makes the object (Hydra's `instantiate` in `train.py`).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lightning_internvl.model import VLM

Config = dict[str, Any]
Build = Callable[..., Any]
TRUSTED = "lightning_internvl."


def locate(target: str) -> Any:
    """The class or function behind a dotted path.

    Raises:
        ValueError: if there is none.
    """
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"_target_: {target!r} cannot be found ({error})") from error


def trusted_build(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build a part of this package, and nothing else: for configurations that come with a checkpoint."""
    target = str(config.get("_target_"))
    if not target.startswith(TRUSTED):
        raise ValueError(f"_target_: {target!r} comes with the checkpoint and lies outside {TRUSTED[:-1]}; it is not run")
    return locate(target)(**{k: v for k, v in config.items() if not k.startswith("_")}, **extra)


def completed(build: Build, config: Mapping[str, Any], **known: Any) -> Any:
    """Build a part, passing on those of the known values that its signature names and the configuration leaves open.

    Raises:
        ValueError: if the part needs a value that nobody has, or is given one that it does not know.
    """
    config = {k: v for k, v in config.items() if k != "tokenizer"}
    parameters = inspect.signature(locate(config["_target_"])).parameters
    extra = {k: v for k, v in known.items() if k in parameters and config.get(k) is None and v is not None}
    given = {k for k in config if not k.startswith("_")}
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not free and (unknown := given - set(parameters)):
        raise ValueError(f"{config['_target_']} does not know {sorted(unknown)}; valid names: {', '.join(parameters)}")
    needed = {k for k, p in parameters.items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY}
    if missing := needed - given - set(extra):
        raise ValueError(f"{config['_target_']} needs {sorted(missing)}, which neither the configuration nor its neighbours give")
    return build({k: v for k, v in config.items() if k not in extra}, **extra)


def compose_model(config: Mapping[str, Config | None], build: Build) -> tuple[VLM, dict[str, Any]]:
    """A model from the configurations of its parts.

    Args:
        config: `encoder`, `middleware`, `decoder` (None without one), `objectives` (name to configuration) and
            `image_token` (the placeholder in the decoder's text).

    Returns:
        the model and the tokenizers of the parts that read text, by part
    """
    tokenizers = {
        part: build(config[part]["tokenizer"]) for part in ("middleware", "decoder") if (config.get(part) or {}).get("tokenizer")
    }
    sizes = {part: len(tokenizer) for part, tokenizer in tokenizers.items()}
    encoder = build(config["encoder"])
    decoder = None
    if config.get("decoder"):
        decoder = completed(build, config["decoder"], vocab_size=sizes.get("decoder"))
    decoder_dim = decoder.dim if decoder is not None else None
    middleware = completed(
        build, config["middleware"], encoder_dim=encoder.dim, decoder_dim=decoder_dim, vocab_size=sizes.get("middleware")
    )
    objectives: dict[str, nn.Module] = {
        name: completed(build, objective, dim=getattr(middleware, "dim", None))
        for name, objective in (config.get("objectives") or {}).items()
    }
    image_token_id = None
    if decoder is not None and "decoder" in tokenizers:
        image_token_id = tokenizers["decoder"].convert_tokens_to_ids(config["image_token"])
    return VLM(encoder, middleware, decoder, objectives=objectives, image_token_id=image_token_id), tokenizers
