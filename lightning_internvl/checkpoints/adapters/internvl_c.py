"""internvl_c_13b_224px.pth: tower and text encoder in one bare file, as stage 1 leaves them
(`internvl_c_pytorch`)."""

from __future__ import annotations

import math

from lightning_internvl.checkpoints.adapters.internvl_14b import LLAMA, ROPE_THETA, TOP, qllama_of
from lightning_internvl.checkpoints.adapters.layout import BESIDE, BareFileLayout
from lightning_internvl.checkpoints.families.intern_vit import (
    FIRST_NAMES,
    HEAD_DIM,
    config_from_shapes,
    first_rules,
    tower,
    tower_config,
)
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, match_rules, rename, scalar
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITC


class InternVLC(BareFileLayout):
    NAME = f"InternVL-C (a bare .pth with `blocks.*` and `transformer.*`; heads {BESIDE}, else as published)"

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        return {"patch_embed.proj.weight", "transformer.embed_tokens.weight"} <= shapes.keys()

    def rules(self, config: Config) -> list[NameRule]:
        return [
            *first_rules(),
            rename("middleware.qllama.model.**", "transformer.**"),
            *(rename(f"middleware.{name}", name) for name in ("text_projection", "clip_projector.**")),
            scalar("objectives.itc.logit_scale", "logit_scale"),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        """Shapes tell the sizes; a config.json beside the file may tell the numbers of heads."""
        vision = config_from_shapes(release_shapes(shapes)) | config.get("vision_config", {})
        vocabulary, width = shapes["transformer.embed_tokens.weight"]
        llama = LLAMA | {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": shapes["transformer.layers.0.mlp.gate_proj.weight"][0],
            "num_hidden_layers": sum(name.endswith("mlp.gate_proj.weight") for name in shapes),
            "num_attention_heads": max(1, width // HEAD_DIM),
            **config.get("qllama_config", {}),
        }
        top = TOP | {"clip_embed_dim": shapes["text_projection"][1]} | config
        middleware = qllama_of(top, vision["hidden_size"], llama, num_queries=0)
        return VLM(tower(vision), middleware, objectives={"itc": ITC(max_scale=math.inf)})

    def holds(self, model: VLM) -> bool:
        encoder, middleware = model.encoder, model.middleware
        if not (isinstance(encoder, InternViT) and isinstance(middleware, QLLaMA)):
            return False
        if tower_config(encoder) is None or model.decoder is not None:
            return False
        reads = middleware.query_tokens is None and middleware.rope_theta == ROPE_THETA
        return reads and set(model.objectives) == {"itc"}


def release_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes of a bare file under the tower's names in releases with a config."""
    rules = [rename(old, new) for old, new in FIRST_NAMES]
    groups, _ = match_rules(rules, shapes)
    return {name: shapes[group.ours[0]] for group in groups for name in group.official}


LAYOUT = InternVLC()
