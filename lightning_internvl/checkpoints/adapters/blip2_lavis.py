"""BLIP-2 after its first stage as LAVIS names it (`Blip2Qformer`): tower, Q-Former with text and
language head, the three heads.

A folder's `config.json` holds the fields of LAVIS's constructor and of its BERT under one roof. A
bare .pth file, as released, is read too; what its shapes do not tell is taken from the published
model (heads of 64 in the Q-Former, of 88 in the tower).
"""

from __future__ import annotations

import re

from torch import Tensor

from lightning_internvl.checkpoints.adapters.layout import Layout
from lightning_internvl.checkpoints.families.lavis import TOWER, lavis_encoder, lavis_encoder_config
from lightning_internvl.checkpoints.families.qformer import (
    lavis_qformer_rules,
    lavis_tower_rules,
    qformer_config,
    qformer_of,
)
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.middleware.qformer import QFormer
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITM, NextToken, QueryITC

SMOOTHING = 0.1  # of ITC and ITG, written into the original's code
TOP: Config = {"num_query_token": 32, "embed_dim": 256, "cross_attention_freq": 2, "ln_vision_eps": 1e-5}
HEAD_WIDTH = 64
_WORDS = "Qformer.bert.embeddings.word_embeddings.weight"
_CLS = "Qformer.cls.predictions."


class Blip2Lavis(Layout):
    NAME = "BLIP-2 stage 1 of LAVIS (model_type 'blip2_qformer', or a bare .pth file)"
    MODEL_TYPES = ("blip2_qformer",)
    DEFAULTS = TOP | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        bare = not config and {_WORDS, "itm_head.weight", "temp"} <= shapes.keys()
        return bare or super().recognises(config, shapes)

    def rules(self, config: Config) -> list[NameRule]:
        """Tables that the original ties stand in its files twice."""
        ours = "middleware.qformer"
        return [
            *lavis_qformer_rules(),
            NameRule((f"{ours}.embeddings.words.weight",), (_WORDS, f"{_CLS}decoder.weight"), _same, _twice),
            NameRule((f"{ours}.head.bias",), (f"{_CLS}bias", f"{_CLS}decoder.bias"), _same, _twice),
            rename(f"{ours}.head.dense.*", f"{_CLS}transform.dense.*"),
            rename(f"{ours}.head.norm.*", f"{_CLS}transform.LayerNorm.*"),
            rename("middleware.vision_proj.*", "vision_proj.*"),
            rename("middleware.text_proj.*", "text_proj.*"),
            rename("objectives.itm.itm_head.*", "itm_head.*"),
            rename("objectives.itc.temp", "temp"),
            *lavis_tower_rules(TOWER),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        """Where the files hold no tower, the model takes visual tokens in the place of pixels."""
        top = TOP | (config or config_from_shapes(shapes))
        encoder = lavis_encoder(top, shapes, top.get("vision_width"))
        q = top | {"cross_attention_frequency": top["cross_attention_freq"]}
        middleware = qformer_of(
            q,
            encoder.dim,
            num_queries=top["num_query_token"],
            vision_norm_eps=top["ln_vision_eps"],
            text="write",
            embed_dim=top["embed_dim"],
        )
        objectives = {
            "itc": QueryITC(min_temp=0.0, label_smoothing=SMOOTHING, gather_gradient=False),
            "itm": ITM(dim=middleware.dim),
            "itg": NextToken(label_smoothing=SMOOTHING),
        }
        return VLM(encoder, middleware, objectives=objectives)

    def fields_of(self, model: VLM) -> Config | None:
        middleware = model.middleware
        if not isinstance(middleware, QFormer) or model.decoder is not None:
            return None
        if middleware.text != "write" or middleware.embed_dim is None:
            return None
        if not {"itc", "itm"} <= set(model.objectives) or not hasattr(middleware.ln_vision, "eps"):
            return None
        if (tower := lavis_encoder_config(model.encoder, with_k_bias=True)) is None:
            return None
        fields = qformer_config(middleware) | {
            "num_query_token": middleware.num_queries,
            "cross_attention_freq": middleware.cross_every,
            "embed_dim": middleware.embed_dim,
            "vision_width": tower.pop("vision_width"),
            "ln_vision_eps": middleware.ln_vision.eps,
        }
        del fields["cross_attention_frequency"]
        return fields | tower


def _same(first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    if not first.is_meta and not first.equal(second):
        untied = f"{_CLS}decoder is not tied to its twin in this file"
        raise ValueError(f"{untied}; an untied language head is not supported")
    return (first,)


def _twice(x: Tensor) -> tuple[Tensor, ...]:
    return x, x.clone()


def config_from_shapes(shapes: Shapes) -> Config:
    """The config of a bare file."""
    bert = "Qformer.bert."
    layer = rf"{re.escape(bert)}encoder\.layer\.(\d+)\."
    layers = {int(found[1]) for found in map(re.compile(layer).match, shapes) if found}
    cross = "crossattention.self.key.weight"
    crossed = sorted(n for n in layers if f"{bert}encoder.layer.{n}.{cross}" in shapes)
    vocab, dim = shapes[_WORDS]
    return {
        "hidden_size": dim,
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, dim // HEAD_WIDTH),
        "intermediate_size": shapes[f"{bert}encoder.layer.0.intermediate.dense.weight"][0],
        "cross_attention_freq": crossed[1] - crossed[0] if len(crossed) > 1 else len(layers),
        "vocab_size": vocab,
        "max_position_embeddings": shapes[f"{bert}embeddings.position_embeddings.weight"][0],
        "num_query_token": shapes["query_tokens"][1],
        "embed_dim": shapes["vision_proj.weight"][0],
        "vision_width": shapes["ln_vision.weight"][0],
    }


LAYOUT = Blip2Lavis()
