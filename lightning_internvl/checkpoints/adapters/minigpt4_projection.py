"""The released .pth files of MiniGPT-4, which hold `llama_proj` alone; tower, Q-Former and language model come from elsewhere.

A run takes it as a part of its start: `init_from=FILE`, with all other names under `new`.
"""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters import Config, Shapes
from lightning_internvl.checkpoints.name_rules import NameRule, rename
from lightning_internvl.encoders.features import Features
from lightning_internvl.middleware.connector import LinearConnector
from lightning_internvl.model.vlm import VLM

NAME = "MiniGPT-4's released projection (a bare .pth with `llama_proj.*`)"
NATIVE = False
SINGLE_FILE = True

NAMES = {"llama_proj.weight", "llama_proj.bias"}


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether the names are those of the file."""
    return not config and set(shapes) == NAMES


def canonical(name: str) -> str | None:
    """The names are the rules'."""
    return name


def rules(config: Config) -> list[NameRule]:
    """The projection, where every middleware of MiniGPT-4 has it."""
    return [rename("middleware.proj.*", "llama_proj.*")]


def build(config: Config, shapes: Shapes) -> VLM:
    """The projection between features and a decoder that is not there."""
    out, width = shapes["llama_proj.weight"]
    encoder = Features(dim=width)
    return VLM(encoder, LinearConnector(encoder_dim=width, decoder_dim=out, special_tokens=0))


def config_of(model: VLM) -> Config | None:
    """An empty config for a projection that stands alone."""
    alone = isinstance(model.encoder, Features) and isinstance(model.middleware, LinearConnector) and model.decoder is None
    return {} if alone and model.middleware.skipped == 0 else None
