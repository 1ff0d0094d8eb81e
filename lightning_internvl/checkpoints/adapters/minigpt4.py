"""MiniGPT-4 with the names of its own code (`minigpt4.py`): Q-Former and `llama_proj`, or the LLaMA-2 variant without Q-Former.

The released .pth hold `llama_proj` alone (see `minigpt4_projection`); this layout is the whole state of the model. Features stand
in the tower's place where the files hold none.
"""

from __future__ import annotations

from torch import nn

from lightning_internvl.checkpoints.adapters import Config, Shapes, updated
from lightning_internvl.checkpoints.families.language_model import language_config, language_model
from lightning_internvl.checkpoints.families.lavis import DEFAULTS, NORM_EPS, TOWER, lavis_encoder, lavis_encoder_config
from lightning_internvl.checkpoints.families.qformer import lavis_qformer_rules, lavis_tower_rules, qformer_config, qformer_of
from lightning_internvl.checkpoints.name_rules import NameRule, rename
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.middleware.concat import ConcatConnector
from lightning_internvl.middleware.qformer import QFormer
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import NextToken

NAME = "MiniGPT-4 with its own names (model_type 'minigpt4')"
NATIVE = SINGLE_FILE = False

IMAGE = -200  # stands for one visual token; no word
TOP: Config = {"has_qformer": True, "num_query_token": 32, "cross_attention_freq": 2, "concat": 4, "vision_width": 1408}


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a `config.json` is of this layout."""
    return config.get("model_type") == "minigpt4"


def canonical(name: str) -> str | None:
    """Buffers are no weights."""
    return None if name.endswith((".rotary_emb.inv_freq", ".position_ids")) else name


def rules(config: Config) -> list[NameRule]:
    """Tower, Q-Former, projection and language model."""
    return [
        *lavis_tower_rules(TOWER),
        rename("middleware.proj.*", "llama_proj.*"),
        *lavis_qformer_rules(),
        rename("decoder.lm.**", "llama_model.**"),
    ]


def build(config: Config, shapes: Shapes) -> VLM:
    """The model of a config.

    Raises:
        ValueError: for a setting that the parts do not have.
    """
    top = TOP | config
    encoder = lavis_encoder(config, shapes, top["vision_width"])
    text = {"model_type": "llama"} | config["llama_config"]
    decoder = language_model(text, tied="llama_model.lm_head.weight" not in shapes)
    dims = {"encoder_dim": encoder.dim, "decoder_dim": decoder.dim}
    if top["has_qformer"]:
        bert = config.get("bert_config", {}) | {"cross_attention_frequency": top["cross_attention_freq"]}
        middleware: nn.Module = qformer_of(
            bert, num_queries=top["num_query_token"], vision_norm_eps=NORM_EPS, text="none", **dims
        )
    else:
        middleware = ConcatConnector(**dims, concat=top["concat"], norm_eps=NORM_EPS)
    return VLM(encoder, middleware, decoder, objectives={"next_token": NextToken()}, image_token_id=IMAGE)


def config_of(model: VLM) -> Config | None:
    """The config that the model was loaded with, brought up to date, else one made from its parts."""
    middleware, decoder = model.middleware, model.decoder
    if not isinstance(decoder, HFCausalLM) or decoder.lm.config.model_type != "llama":
        return None
    tower = lavis_encoder_config(model.encoder)
    if tower is None or not isinstance(getattr(middleware, "ln_vision", None), nn.LayerNorm):
        return None
    made = {**tower, "llama_config": {"vocab_size": decoder.vocab_size}}
    if type(middleware) is QFormer and middleware.text == "none":
        bert = qformer_config(middleware)
        made |= {"has_qformer": True, "num_query_token": middleware.num_queries}
        made |= {"cross_attention_freq": bert.pop("cross_attention_frequency"), "bert_config": bert}
    elif isinstance(middleware, ConcatConnector):
        made |= {"has_qformer": False, "concat": middleware.concat}
    else:
        return None
    if middleware.ln_vision.eps != NORM_EPS:
        return None
    loaded = model.config or {}
    if recognises(loaded, {}):
        return updated(loaded, TOP | DEFAULTS, made)
    return {"model_type": "minigpt4", **made, "llama_config": language_config(decoder)}
