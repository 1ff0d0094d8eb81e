"""The released .pth files of MiniGPT-4, which hold `llama_proj` alone; tower, Q-Former and language
model come from elsewhere.

A run takes it as a part of its start: `init_from=FILE`, with all other names under `new`.
"""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters.layout import BareFileLayout
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.encoders.features import Features
from lightning_internvl.middleware.connector import LinearConnector
from lightning_internvl.model.vlm import VLM

NAMES = {"llama_proj.weight", "llama_proj.bias"}


class MiniGPT4Projection(BareFileLayout):
    NAME = "MiniGPT-4's released projection (a bare .pth with `llama_proj.*`)"

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        return not config and set(shapes) == NAMES

    def rules(self, config: Config) -> list[NameRule]:
        return [rename("middleware.proj.*", "llama_proj.*")]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        out, width = shapes["llama_proj.weight"]
        encoder = Features(dim=width)
        return VLM(encoder, LinearConnector(encoder_dim=width, decoder_dim=out, special_tokens=0))

    def holds(self, model: VLM) -> bool:
        connector = model.middleware
        if not isinstance(model.encoder, Features) or model.decoder is not None:
            return False
        return isinstance(connector, LinearConnector) and connector.skipped == 0


LAYOUT = MiniGPT4Projection()
