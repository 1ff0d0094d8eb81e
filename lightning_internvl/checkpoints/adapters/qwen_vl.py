"""Qwen-VL and Qwen-VL-Chat as released (`modeling_qwen.py`, `visual.py`), or their visual part."""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters.layout import Layout, chat_model, updated_config
from lightning_internvl.checkpoints.families.clip import add_first_dimension, transposed
from lightning_internvl.checkpoints.families.config_fields import check_only, square_side
from lightning_internvl.checkpoints.families.language_model import fused_rows
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename, stacked_rows
from lightning_internvl.decoders.qwen import Qwen
from lightning_internvl.encoders.openclip_vit import OpenCLIPViT
from lightning_internvl.middleware.resampler import Resampler
from lightning_internvl.model.vlm import VLM

VISUAL_ALONE = "qwen_vl_visual"
HEAD_DIM, POSITIONS, NORM_EPS, ACT = 128, 16, 1e-6, "gelu"  # written into the official code
PADDING = 2  # how far the id of the placeholder lies behind that of <img>
TEXT: Config = {
    "vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "kv_channels": 128, "intermediate_size": 22016, "seq_length": 2048,
    "max_position_embeddings": 8192, "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000,
    "initializer_range": 0.02, "use_dynamic_ntk": True, "use_logn_attn": True,
}  # fmt: skip
ONLY: Config = {
    "no_bias": True, "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, "rotary_pct": 1.0, "scale_attn_weights": True,
}  # fmt: skip
VISUAL: Config = {"n_queries": 256}


class QwenVL(Layout):
    NAME = "Qwen-VL as released (model_type 'qwen' with 'visual'), or its visual part ('qwen_vl_visual')"
    MODEL_TYPES = ("qwen", VISUAL_ALONE)
    ARCHITECTURE = "QWenLMHeadModel"
    DEFAULTS = TEXT | {"visual": VISUAL}

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        """Qwen without pictures has the same model_type."""
        kind = config.get("model_type")
        return kind == VISUAL_ALONE or (kind == "qwen" and "visual" in config)

    def rules(self, config: Config) -> list[NameRule]:
        heads = config.get("visual", config)["heads"]
        ours, theirs = "encoder.encoder.layers.*", "transformer.visual.transformer.resblocks.*"
        return [
            rename("encoder.embeddings.patch_embedding.weight", "transformer.visual.conv1.weight"),
            add_first_dimension("encoder.embeddings.position_embedding", "transformer.visual.positional_embedding"),
            rename("encoder.pre_layrnorm.*", "transformer.visual.ln_pre.*"),
            rename(f"{ours}.layer_norm1.*", f"{theirs}.ln_1.*"),
            rename(f"{ours}.layer_norm2.*", f"{theirs}.ln_2.*"),
            *(fused_rows(ours, f"{theirs}.attn.in_proj.{leaf}", leaf, heads, heads) for leaf in ("weight", "bias")),
            rename(f"{ours}.self_attn.out_proj.*", f"{theirs}.attn.out_proj.*"),
            rename(f"{ours}.mlp.fc1.*", f"{theirs}.mlp.c_fc.*"),
            rename(f"{ours}.mlp.fc2.*", f"{theirs}.mlp.c_proj.*"),
            *_resampler_rules("transformer.visual."),
            *_language_rules(),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        if config["model_type"] == VISUAL_ALONE:
            return VLM(*_visual(config, config["output_dim"]))
        check_only(config, ONLY, "config.json")
        text = TEXT | config
        if text["kv_channels"] * text["num_attention_heads"] != text["hidden_size"]:
            kv_channels = text["kv_channels"]
            raise ValueError(f"{kv_channels=} is not supported; heads times it must be the hidden size")
        check_only(config["visual"], {"output_dim": text["hidden_size"]}, "config.json.visual")
        encoder, resampler = _visual(config["visual"], text["hidden_size"])
        decoder = Qwen(
            config=_as_qwen2(text) | {"tie_word_embeddings": "lm_head.weight" not in shapes},
            seq_length=text["seq_length"],
            dynamic_ntk=text["use_dynamic_ntk"],
            log_n=text["use_logn_attn"],
        )
        image = config["visual"]["image_start_id"] + PADDING
        return chat_model(encoder, resampler, decoder, image_token_id=image)

    def fields_of(self, model: VLM) -> Config | None:
        encoder, resampler, decoder = model.encoder, model.middleware, model.decoder
        if not (isinstance(encoder, OpenCLIPViT) and isinstance(resampler, Resampler)):
            return None
        if not _standard(encoder, resampler):
            return None
        visual = _visual_config(encoder, resampler, model.config or {})
        if decoder is None:
            return {"model_type": VISUAL_ALONE, **visual}
        if not isinstance(decoder, Qwen) or model.image_token_id is None:
            return None
        text = _text_config(decoder)
        visual["image_start_id"] = model.image_token_id - PADDING
        return None if text is None else {**text, "visual": visual}

    def update(self, loaded: Config, fields: Config) -> Config:
        alone = fields.get("model_type") == VISUAL_ALONE
        return updated_config(loaded, VISUAL if alone else self.DEFAULTS, fields)

    def new_config(self, model: VLM, fields: Config) -> Config:
        if model.decoder is None:
            return fields
        tied = {"tie_word_embeddings": model.decoder.tied}
        return super().new_config(model, {**ONLY, **fields, **tied})


def _resampler_rules(prefix: str) -> list[NameRule]:
    pool = f"{prefix}attn_pool."
    return [
        rename("middleware.query_tokens", f"{pool}query"),
        rename("middleware.positions", f"{pool}pos_embed"),
        rename("middleware.ln_post.*", f"{prefix}ln_post.*"),
        transposed("middleware.proj.weight", f"{prefix}proj"),
        *(stacked_rows(_qkv("middleware", leaf), f"{pool}attn.in_proj_{leaf}") for leaf in ("weight", "bias")),
        rename("middleware.out_proj.*", f"{pool}attn.out_proj.*"),
        rename("middleware.*.*", f"{pool}*.*"),
    ]


def _language_rules() -> list[NameRule]:
    ours, theirs = "decoder.lm.model.layers.*", "transformer.h.*"
    return [
        rename("decoder.lm.model.embed_tokens.weight", "transformer.wte.weight"),
        rename("decoder.lm.model.norm.weight", "transformer.ln_f.weight"),
        rename("decoder.lm.lm_head.weight", "lm_head.weight"),
        rename(f"{ours}.input_layernorm.weight", f"{theirs}.ln_1.weight"),
        rename(f"{ours}.post_attention_layernorm.weight", f"{theirs}.ln_2.weight"),
        *(stacked_rows(_qkv(f"{ours}.self_attn", leaf), f"{theirs}.attn.c_attn.{leaf}") for leaf in ("weight", "bias")),
        rename(f"{ours}.self_attn.o_proj.weight", f"{theirs}.attn.c_proj.weight"),
        # These two names are the wrong way round there.
        rename(f"{ours}.mlp.gate_proj.weight", f"{theirs}.mlp.w2.weight"),
        rename(f"{ours}.mlp.up_proj.weight", f"{theirs}.mlp.w1.weight"),
        rename(f"{ours}.mlp.down_proj.weight", f"{theirs}.mlp.c_proj.weight"),
    ]


def _qkv(ours: str, leaf: str) -> list[str]:
    return [f"{ours}.{x}_proj.{leaf}" for x in "qkv"]


def _visual(config: Config, output_dim: int) -> tuple[OpenCLIPViT, Resampler]:
    visual = VISUAL | config
    encoder = OpenCLIPViT(
        image_size=square_side(visual, "image_size"),
        patch_size=square_side(visual, "patch_size"),
        dim=visual["width"],
        depth=visual["layers"],
        heads=visual["heads"],
        mlp_dim=int(visual["width"] * visual["mlp_ratio"]),
        act=ACT,
        norm_eps=NORM_EPS,
        positions=POSITIONS,
    )
    resampler = Resampler(
        encoder_dim=encoder.dim,
        decoder_dim=output_dim,
        num_queries=visual["n_queries"],
        head_dim=HEAD_DIM,
        special_tokens=0,
    )
    return encoder, resampler


def _as_qwen2(text: Config) -> Config:
    return {
        "model_type": "qwen2",
        "vocab_size": text["vocab_size"],
        "hidden_size": text["hidden_size"],
        "intermediate_size": text["intermediate_size"] // 2,  # there both halves are counted
        "num_hidden_layers": text["num_hidden_layers"],
        "num_attention_heads": text["num_attention_heads"],
        "num_key_value_heads": text["num_attention_heads"],
        "max_position_embeddings": text["max_position_embeddings"],
        "rms_norm_eps": text["layer_norm_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": float(text["rotary_emb_base"])},
        "initializer_range": text["initializer_range"],
    }


def _standard(encoder: OpenCLIPViT, resampler: Resampler) -> bool:
    """Whether the parts have what the official code does not let one choose."""
    block = encoder.encoder.layers[0]
    fixed = (encoder.positions, block.layer_norm1.eps, block.mlp.act, resampler.layers, resampler.skipped)
    head_dim = resampler.query_tokens.shape[1] // resampler.heads
    return fixed == (POSITIONS, NORM_EPS, ACT, (-1,), 0) and head_dim == HEAD_DIM


def _visual_config(encoder: OpenCLIPViT, resampler: Resampler, loaded: Config) -> Config:
    block = encoder.encoder.layers[0]
    mlp_dim, dim = block.mlp.fc1.out_features, encoder.dim
    ratio = loaded.get("visual", loaded).get("mlp_ratio", 0.0)
    if int(dim * ratio) != mlp_dim:  # a ratio that comes out right when it is cut off
        ratios = (mlp_dim / dim, (mlp_dim + 0.5) / dim)
        ratio = next(ratio for ratio in ratios if int(dim * ratio) == mlp_dim)
    return {
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "width": encoder.dim,
        "layers": encoder.depth,
        "heads": block.self_attn.heads,
        "mlp_ratio": ratio,
        "n_queries": resampler.num_queries,
        "output_dim": resampler.query_tokens.shape[1],
    }


def _text_config(decoder: Qwen) -> Config | None:
    """The fields of the language model; None if Qwen cannot have it."""
    lm = decoder.lm.config
    if lm.num_key_value_heads != lm.num_attention_heads or lm.use_sliding_window:
        return None
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.dim,
        "num_hidden_layers": lm.num_hidden_layers,
        "num_attention_heads": lm.num_attention_heads,
        "kv_channels": decoder.dim // lm.num_attention_heads,
        "intermediate_size": 2 * lm.intermediate_size,
        "seq_length": decoder.seq_length,
        "max_position_embeddings": lm.max_position_embeddings,
        "layer_norm_epsilon": lm.rms_norm_eps,
        "rotary_emb_base": lm.rope_parameters["rope_theta"],
        "initializer_range": lm.initializer_range,
        "use_dynamic_ntk": decoder.dynamic_ntk,
        "use_logn_attn": decoder.log_n,
    }


LAYOUT = QwenVL()
