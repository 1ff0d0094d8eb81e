"""Flamingo under the names of OpenFlamingo's whole state dict: tower of open_clip, resampler,
wrapped language model.

OpenFlamingo has no `config.json`; ours says what its code takes from elsewhere. Its released files
hold the trained tensors alone (`perceiver.*`, `gated_cross_attn_layer.*`, the embeddings) and are
completed by a CLIP and a language model, under these names.
"""

from __future__ import annotations

import dataclasses

from lightning_internvl.checkpoints.adapters import clip_openai
from lightning_internvl.checkpoints.adapters.layout import Layout, chat_model
from lightning_internvl.checkpoints.families.clip import clip_tower, clip_tower_config
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.decoders.flamingo import FlamingoCausalLM
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.middleware.perceiver_resampler import PerceiverResampler
from lightning_internvl.model.vlm import VLM

# Where each language model keeps its blocks.
BLOCKS = {
    "mpt": "transformer.blocks", "llama": "model.layers", "opt": "model.decoder.layers",
    "gptj": "transformer.h", "gpt_neo": "transformer.h", "gpt_neox": "gpt_neox.layers",
    "qwen2": "model.layers", "mistral": "model.layers",
}  # fmt: skip
TOP: Config = {"cross_attn_every_n_layers": 1, "only_attend_immediate_media": True}
# the same tensors once more
TWICE = ("lang_encoder.old_decoder_blocks.", "lang_encoder.gated_cross_attn_layers.")


class OpenFlamingo(Layout):
    NAME = "Flamingo under the names of OpenFlamingo (model_type 'open_flamingo')"
    MODEL_TYPES = ("open_flamingo",)
    DEFAULTS = TOP
    LANGUAGE = "text_config"

    def canonical(self, name: str) -> str | None:
        """Tensors that stand twice count once; the projection of CLIP is not used."""
        unused = name.startswith(TWICE) or name == "vision_encoder.proj"
        return None if unused else name

    def rules(self, config: Config) -> list[NameRule]:
        blocks = blocks_of(config["text_config"])
        rules = clip_openai.LAYOUT.rules({})
        towers = [rule for rule in rules if rule.ours[0].startswith("encoder.")]
        return [
            *map(_below_vision_encoder, towers),
            rename("middleware.blocks.*.attn.**", "perceiver.layers.*.0.**"),
            rename("middleware.blocks.*.ff.**", "perceiver.layers.*.1.**"),
            rename("middleware.**", "perceiver.**"),
            rename("decoder.cross.*.**", f"lang_encoder.{blocks}.*.gated_cross_attn_layer.**"),
            rename(f"decoder.lm.{blocks}.*.**", f"lang_encoder.{blocks}.*.decoder_layer.**"),
            rename("decoder.lm.**", "lang_encoder.**"),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        top, text = TOP | config, dict(config["text_config"])
        blocks_of(text)
        encoder = clip_tower(config["vision_config"], post_norm="unused")
        tied = not any(name.startswith(("lang_encoder.lm_head.", "lang_encoder.embed_out.")) for name in shapes)
        sizes = {"heads": config["heads"], "head_dim": config["dim_head"], "mlp_ratio": config["ff_mult"]}
        resampler = PerceiverResampler(
            encoder_dim=encoder.dim,
            latents=config["num_latents"],
            depth=config["depth"],
            special_tokens=1,
            max_frames=shapes.get("perceiver.frame_embs", (0,))[0],
            **sizes,
        )
        decoder = FlamingoCausalLM(
            encoder_dim=encoder.dim,
            every=top["cross_attn_every_n_layers"],
            all_before=not top["only_attend_immediate_media"],
            config=text | {"tie_word_embeddings": tied},
            **sizes,
        )
        return chat_model(encoder, resampler, decoder, image_token_id=config["media_token_id"])

    def fields_of(self, model: VLM) -> Config | None:
        encoder, resampler, decoder = model.encoder, model.middleware, model.decoder
        if not (isinstance(encoder, CLIPViT) and isinstance(resampler, PerceiverResampler)):
            return None
        if not isinstance(decoder, FlamingoCausalLM) or model.image_token_id is None:
            return None
        if resampler.special_tokens != 1 or resampler.layers not in ((-1,), (encoder.depth,)):
            return None
        vision, sizes = clip_tower_config(encoder), _sizes(resampler, decoder)
        if vision is None or sizes is None or decoder.lm.config.model_type not in BLOCKS:
            return None
        return {
            "media_token_id": model.image_token_id,
            "cross_attn_every_n_layers": decoder.every,
            "only_attend_immediate_media": not decoder.all_before,
            **sizes,
            "vision_config": vision,
            "text_config": {"vocab_size": decoder.vocab_size},
        }


def _below_vision_encoder(rule: NameRule) -> NameRule:
    names = tuple(name.replace("visual.", "vision_encoder.", 1) for name in rule.official)
    return dataclasses.replace(rule, official=names)


def blocks_of(text: Config) -> str:
    """Where a language model keeps its blocks.

    Raises:
        ValueError: for one of another kind.
    """
    kind = text.get("model_type")
    if kind not in BLOCKS:
        raise ValueError(
            f"text_config.model_type={kind!r} is not known to OpenFlamingo's layout; valid choices: {', '.join(BLOCKS)}"
        )
    return BLOCKS[kind]


def _sizes(resampler: PerceiverResampler, decoder: FlamingoCausalLM) -> Config | None:
    """Sizes that the resampler and the gated layers share; None if they differ."""
    found = []
    for layer in (resampler.blocks[0], next(iter(decoder.cross.values()))):
        inner, width = layer.attn.to_q.weight.shape[0], layer.ff[0].normalized_shape[0]
        found.append((layer.attn.heads, inner // layer.attn.heads, layer.ff[1].out_features // width))
    if len(set(found)) != 1:
        return None
    sizes = dict(zip(("heads", "dim_head", "ff_mult"), found[0], strict=True))
    return {"num_latents": len(resampler.latents), "depth": len(resampler.blocks), **sizes}


LAYOUT = OpenFlamingo()
