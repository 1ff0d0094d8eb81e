"""EVA ViT and Q-Former in checkpoints: as LAVIS and its descendants (MiniGPT-4, XComposer) name
them, and transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_internvl.checkpoints.families.config_fields import block_sizes, check_only, tower_sizes
from lightning_internvl.checkpoints.name_rules import Config, NameRule, rename, stacked_rows
from lightning_internvl.encoders.eva_vit import EvaViT
from lightning_internvl.middleware.qformer import QFormer

# What a config of transformers may leave out.
VISION: Config = {
    "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16, "image_size": 224,
    "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True,
}  # fmt: skip
QFORMER: Config = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 512, "layer_norm_eps": 1e-12,
    "cross_attention_frequency": 2, "encoder_hidden_size": 1408, "use_qformer_text_input": False,
}  # fmt: skip
VISION_ONLY: Config = {"attention_dropout": 0.0}

_FFN = {
    "query_ffn.up": "intermediate_query.dense", "query_ffn.down": "output_query.dense",
    "query_ffn.norm": "output_query.LayerNorm", "text_ffn.up": "intermediate.dense",
    "text_ffn.down": "output.dense", "text_ffn.norm": "output.LayerNorm",
}  # fmt: skip
_ATTENTION = {"self_attn": "attention", "cross_attn": "crossattention"}
_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}


# --- names ----------------------------------------------------------------------------------------


def layer_rules(prefix: str, inner: str) -> list[NameRule]:
    """The layers below `prefix`; `inner` names the module that holds query, key and value ("self"
    or "attention")."""
    ours, theirs = "middleware.qformer.layers.*", f"{prefix}encoder.layer.*"
    names = {
        f"{attention}.{own}": f"{name}.{inner}.{their}"
        for attention, name in _ATTENTION.items()
        for own, their in _PROJECTIONS.items()
    }
    names |= {f"{own}.o_proj": f"{name}.output.dense" for own, name in _ATTENTION.items()}
    names |= {f"{own}.norm": f"{name}.output.LayerNorm" for own, name in _ATTENTION.items()}
    names = names | _FFN
    return [rename(f"{ours}.{own}.*", f"{theirs}.{names[own]}.*") for own in names]


def lavis_qformer_rules(prefix: str = "Qformer.") -> list[NameRule]:
    """The Q-Former below `prefix` with its queries beside it, without heads of its own: LAVIS,
    MiniGPT-4, XComposer."""
    ours, bert = "middleware.qformer.embeddings", f"{prefix}bert."
    return [
        rename("middleware.query_tokens", "query_tokens"),
        rename("middleware.ln_vision.*", "ln_vision.*"),
        rename(f"{ours}.positions.weight", f"{bert}embeddings.position_embeddings.weight"),
        rename(f"{ours}.norm.*", f"{bert}embeddings.LayerNorm.*"),
        *layer_rules(bert, "self"),
    ]


def lavis_tower_rules(prefix: str = "visual_encoder.") -> list[NameRule]:
    """The tower below `prefix`, named as in EVA."""
    return [
        rename("encoder.class_embedding", f"{prefix}cls_token"),
        rename("encoder.position_embedding", f"{prefix}pos_embed"),
        rename("encoder.patch_embedding.*", f"{prefix}patch_embed.proj.*"),
        rename("encoder.blocks.**", f"{prefix}blocks.**"),
    ]


def hf_tower_rules() -> list[NameRule]:
    """The tower below `vision_model.`, and the norm behind it."""
    ours, theirs = "encoder.blocks.*", "vision_model.encoder.layers.*"
    return [
        rename("encoder.class_embedding", "vision_model.embeddings.class_embedding"),
        rename("encoder.position_embedding", "vision_model.embeddings.position_embedding"),
        rename("encoder.patch_embedding.*", "vision_model.embeddings.patch_embedding.*"),
        rename(f"{ours}.norm1.*", f"{theirs}.layer_norm1.*"),
        rename(f"{ours}.norm2.*", f"{theirs}.layer_norm2.*"),
        rename(f"{ours}.attn.qkv.weight", f"{theirs}.self_attn.qkv.weight"),
        stacked_rows((f"{ours}.attn.{x}_bias" for x in "qkv"), f"{theirs}.self_attn.qkv.bias"),
        # A tower without a bias of keys, which no softmax would see.
        NameRule((f"{ours}.attn.q_bias", f"{ours}.attn.v_bias"), (f"{theirs}.self_attn.qkv.bias",), _outer, _with_middle),
        rename(f"{ours}.attn.proj.*", f"{theirs}.self_attn.projection.*"),
        rename(f"{ours}.mlp.**", f"{theirs}.mlp.**"),
        rename("middleware.ln_vision.*", "vision_model.post_layernorm.*"),
    ]


def _outer(bias: Tensor) -> tuple[Tensor, ...]:
    first, _, last = bias.chunk(3)
    return first.clone(), last.clone()


def _with_middle(first: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    return (torch.cat([first, torch.zeros_like(first), last]),)


def hf_qformer_rules(embeddings: str | None, norm: str) -> list[NameRule]:
    """The Q-Former below `qformer.`, its queries and its projections.

    Args:
        embeddings: the module of word and position embeddings; None without text.
        norm: the module of the norm over queries and text.
    """
    found = [
        rename("middleware.query_tokens", "query_tokens"),
        rename("middleware.qformer.embeddings.norm.*", f"{norm}.*"),
        *layer_rules("qformer.", "attention"),
    ]
    for ours, theirs in {"words": "word_embeddings", "positions": "position_embeddings"}.items() if embeddings else ():
        found.append(rename(f"middleware.qformer.embeddings.{ours}.weight", f"{embeddings}.{theirs}.weight"))
    return found


# --- configurations -------------------------------------------------------------------------------


def hf_tower(config: Config, *, k_bias: bool = True) -> EvaViT:
    """The tower of a `vision_config` of transformers.

    Args:
        k_bias: whether keys have a bias where queries and values have one; EVA's own have none.

    Raises:
        ValueError: for a setting that the tower does not have.
    """
    check_only(config, VISION_ONLY, "vision_config")
    vision = VISION | config
    return EvaViT(
        **tower_sizes(vision),
        qkv_bias=vision["qkv_bias"],
        k_bias=k_bias and vision["qkv_bias"],
        act=vision["hidden_act"],
    )


def hf_tower_config(encoder: EvaViT, model_type: str) -> Config:
    """The `vision_config` of a tower."""
    block = encoder.blocks[0]
    return {
        "model_type": model_type,
        "hidden_size": encoder.dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": block.attn.heads,
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "hidden_act": encoder.act,
        "layer_norm_eps": block.norm1.eps,
        "qkv_bias": block.attn.q_bias is not None,
    }


def qformer_of(config: Config, encoder_dim: int, *, num_queries: int, vision_norm_eps: float | None, **others: Any) -> QFormer:
    """The Q-Former of a BERT-like config; `others` go to the constructor as they are."""
    q = QFORMER | config
    return QFormer(
        encoder_dim=encoder_dim,
        num_queries=num_queries,
        cross_every=q["cross_attention_frequency"],
        vocab_size=q["vocab_size"],
        max_positions=q["max_position_embeddings"],
        vision_norm_eps=vision_norm_eps,
        **bert_blocks(q),
        **others,
    )


def bert_blocks(bert: Config) -> Config:
    """What a BERT-like config says of its blocks, as arguments of `QFormer`."""
    return {
        **block_sizes(bert),
        "act": bert["hidden_act"],
        "dropout": bert["hidden_dropout_prob"],
        "attention_dropout": bert["attention_probs_dropout_prob"],
    }


def qformer_config(middleware: QFormer) -> Config:
    """The BERT-like config of a Q-Former; the sizes of text only where it has some."""
    lm, layer = middleware.qformer, middleware.qformer.layers[0]
    found = {
        "hidden_size": middleware.dim,
        "num_hidden_layers": len(lm.layers),
        "num_attention_heads": layer.self_attn.heads,
        "intermediate_size": layer.query_ffn.up.out_features,
        "hidden_act": middleware.act,
        "hidden_dropout_prob": layer.self_attn.drop.p,
        "attention_probs_dropout_prob": layer.self_attn.attention_dropout,
        "layer_norm_eps": layer.self_attn.norm.eps,
        "cross_attention_frequency": middleware.cross_every,
    }
    if middleware.text == "none":
        return found
    embeddings = lm.embeddings
    sizes = {"vocab_size": embeddings.words.num_embeddings, "max_position_embeddings": embeddings.positions.num_embeddings}
    return found | sizes
