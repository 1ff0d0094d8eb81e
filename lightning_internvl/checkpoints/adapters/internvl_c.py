"""internvl_c_13b_224px.pth: tower and text encoder in one bare file, as stage 1 leaves them (`internvl_c_pytorch`)."""

from __future__ import annotations

import math

from lightning_internvl.checkpoints.adapters import Config, Shapes
from lightning_internvl.checkpoints.adapters.internvl_14b import LLAMA, ROPE_THETA, TOP, qllama_of
from lightning_internvl.checkpoints.families.intern_vit import (
    FIRST_NAMES,
    HEAD_DIM,
    config_from_shapes,
    first_rules,
    tower,
    tower_config,
)
from lightning_internvl.checkpoints.name_rules import NameRule, match_rules, rename, scalar
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITC

NAME = "InternVL-C (a bare .pth with `blocks.*` and `transformer.*`; heads from a config.json beside it, else as published)"
NATIVE = False
SINGLE_FILE = True


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether the names are those of the file."""
    return "patch_embed.proj.weight" in shapes and "transformer.embed_tokens.weight" in shapes


def canonical(name: str) -> str | None:
    """Rotary tables are no weights."""
    return None if name.endswith(".rotary_emb.inv_freq") else name


def rules(config: Config) -> list[NameRule]:
    """The first names of the tower, a LLaMA without a head, and the two projections."""
    return [
        *first_rules(),
        rename("middleware.qllama.model.**", "transformer.**"),
        *(rename(f"middleware.{name}", name) for name in ("text_projection", "clip_projector.**")),
        scalar("objectives.itc.logit_scale", "logit_scale"),
    ]


def build(config: Config, shapes: Shapes) -> VLM:
    """The model that the shapes describe; a config.json beside the file, as of InternVL-14B, tells the numbers of heads."""
    vision = config_from_shapes(release_shapes(shapes)) | config.get("vision_config", {})
    embeddings, mlp = shapes["transformer.embed_tokens.weight"], shapes["transformer.layers.0.mlp.gate_proj.weight"]
    llama = LLAMA | {
        "vocab_size": embeddings[0],
        "hidden_size": embeddings[1],
        "intermediate_size": mlp[0],
        "num_hidden_layers": sum(name.endswith("mlp.gate_proj.weight") for name in shapes),
        "num_attention_heads": max(1, embeddings[1] // HEAD_DIM),
    }
    top = TOP | {"clip_embed_dim": shapes["text_projection"][1]} | config
    middleware = qllama_of(top, vision["hidden_size"], llama | config.get("qllama_config", {}), num_queries=0)
    return VLM(tower(vision), middleware, objectives={"itc": ITC(max_scale=math.inf)})


def release_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes of a bare file under the tower's names in releases with a config."""
    rules = [rename(old, new) for old, new in FIRST_NAMES]
    return {name: shapes[group.ours[0]] for group in match_rules(rules, shapes)[0] for name in group.official}


def config_of(model: VLM) -> Config | None:
    """An empty config where the layout can hold the model: a tower and a text encoder without queries."""
    encoder, middleware = model.encoder, model.middleware
    fits = isinstance(encoder, InternViT) and isinstance(middleware, QLLaMA) and model.decoder is None
    if not fits or tower_config(encoder) is None or middleware.query_tokens is not None:
        return None
    return {} if middleware.rope_theta == ROPE_THETA and set(model.objectives) == {"itc"} else None
