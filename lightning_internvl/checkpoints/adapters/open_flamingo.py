"""Flamingo under the names of OpenFlamingo's whole state dict: tower of open_clip, resampler,
wrapped language model.

OpenFlamingo has no `config.json`; ours says what its code takes from elsewhere. Its released files
(`checkpoint.pt`) hold the trained tensors alone (`perceiver.*`, `gated_cross_attn_layer.*`, the
embeddings), and say nothing: tower and language model are named by a `config.json` with the
arguments of `create_model_and_transforms` (open_flamingo/src/factory.py), or by the user.
"""

from __future__ import annotations

import dataclasses
import re
from functools import partial

from lightning_internvl.checkpoints.adapters import clip_openai
from lightning_internvl.checkpoints.adapters.layout import Layout, chat_model
from lightning_internvl.checkpoints.companion import Companion
from lightning_internvl.checkpoints.families.clip import clip_tower, clip_tower_config, vision_rules
from lightning_internvl.checkpoints.families.open_flamingo import (
    BLOCKS,
    CLIP_NAMES,
    DECODER,
    ENCODER,
    NEOX,
    OUTPUTS,
    SOURCES,
    TOWER,
    TOWERS,
    WEIGHTS,
    blocks_of,
    flamingo_tower_names,
    language_names,
    tables,
    with_language,
    with_tower,
)
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.checkpoints.tied_tables import FIELD
from lightning_internvl.checkpoints.weight_files import WeightFiles
from lightning_internvl.decoders.flamingo import FlamingoCausalLM
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.middleware.perceiver_resampler import PerceiverResampler
from lightning_internvl.model.vlm import VLM

TOP: Config = {"cross_attn_every_n_layers": 1, "only_attend_immediate_media": True}
# the same tensors once more
TWICE = ("lang_encoder.old_decoder_blocks.", "lang_encoder.gated_cross_attn_layers.")
GATED = re.compile(r"lang_encoder\.(.+)\.(\d+)\.gated_cross_attn_layer\.")
MASKS = re.compile(r"\.(attn|attention)\.(masked_)?bias$")  # causal masks of GPT-J, GPT-Neo and GPT-NeoX
HEADS, HEAD_DIM = 8, 64  # of the resampler and the gated layers, in all of OpenFlamingo


class OpenFlamingo(Layout):
    NAME = "Flamingo under the names of OpenFlamingo (model_type 'open_flamingo')"
    MODEL_TYPES = ("open_flamingo",)
    DEFAULTS = TOP
    LANGUAGE = "text_config"

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        """Released files are known by their names."""
        gated = any(map(GATED.match, shapes))
        return super().recognises(config, shapes) or (gated and "perceiver.latents" in shapes)

    def canonical(self, name: str) -> str | None:
        """Tensors that stand twice count once; the projection of CLIP and masks are not used."""
        unused = name.startswith(TWICE) or name == f"{TOWER}proj" or MASKS.search(name)
        return None if unused else super().canonical(name)

    def completed(self, config: Config, files: WeightFiles) -> Config:
        """With the sizes that a released file tells."""
        if "text_config" in config and "vision_config" in config:
            return config
        shapes = files.shapes
        inner, width = shapes["perceiver.layers.0.0.to_q.weight"]
        heads, head = config.get("heads", HEADS), config.get("dim_head", HEAD_DIM)
        if heads * head != inner:
            advice = f'put a config.json beside them: {{"heads": {HEADS}, "dim_head": {inner // HEADS}}} or as they were trained'
            raise ValueError(f"the files do not tell the heads of attention over {inner} channels; {advice}")
        told = {
            "model_type": self.MODEL_TYPES[0],
            "cross_attn_every_n_layers": min(int(found[2]) for found in map(GATED.match, shapes) if found) + 1,
            "num_latents": shapes["perceiver.latents"][0],
            "depth": sum(name.endswith(".0.to_q.weight") for name in shapes if name.startswith("perceiver.layers.")),
            "heads": heads,
            "dim_head": head,
            "ff_mult": shapes["perceiver.layers.0.1.1.weight"][0] // width,
        }
        return {ENCODER: "ViT-L-14", **told, **config, "model_type": told["model_type"]}

    def companions(self, config: Config, shapes: Shapes) -> list[Companion]:
        """What was frozen in training is left out of the files."""
        found = []
        if not any(name.startswith(TOWER) for name in shapes):
            name = str(config.get(ENCODER) or "").removeprefix("hf-hub:")
            said = TOWERS.get(name, name) if config.get(WEIGHTS, "openai") == "openai" else name
            lacks = f"holds no tower ({TOWER}*)"
            found.append(Companion("encoder", said, ENCODER, lacks, flamingo_tower_names, with_tower))
        if not any(".decoder_layer." in name for name in shapes):
            blocks = next(gated[1] for gated in map(GATED.match, shapes) if gated)
            names = partial(language_names, blocks, lambda name: bool(self.canonical(name)) and name not in shapes)
            join = partial(with_language, shapes)
            found.append(Companion("decoder", config.get(DECODER), DECODER, "holds no language model", names, join))
        return found

    def table_rows(self, config: Config, shapes: Shapes) -> dict[str, int]:
        """Tables of words of the language model have no rows for the added words."""
        if DECODER not in config:
            return {}
        text, rows = config["text_config"], {}
        for name, (count, *_) in ((name, shapes[name]) for name in tables(shapes)):
            if name.startswith(OUTPUTS) and text[FIELD]:
                rows[name] = 0
            elif count != text["vocab_size"]:
                rows[name] = text["vocab_size"]
        return rows

    def rules(self, config: Config) -> list[NameRule]:
        blocks = blocks_of(config["text_config"])
        rules = clip_openai.LAYOUT.rules({})
        towers = [_below_vision_encoder(rule) for rule in rules if rule.ours[0].startswith("encoder.")]
        return [
            *(vision_rules(TOWER) if config.get(CLIP_NAMES) else towers),
            rename("middleware.blocks.*.attn.**", "perceiver.layers.*.0.**"),
            rename("middleware.blocks.*.ff.**", "perceiver.layers.*.1.**"),
            rename("middleware.**", "perceiver.**"),
            rename("decoder.cross.*.**", f"lang_encoder.{blocks}.*.gated_cross_attn_layer.**"),
            rename(f"decoder.lm.{blocks}.*.**", f"lang_encoder.{blocks}.*.decoder_layer.**"),
            *((rename("decoder.lm.lm_head.**", "lang_encoder.embed_out.**"),) if blocks == NEOX else ()),
            rename("decoder.lm.**", "lang_encoder.**"),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        top, text = TOP | config, dict(config["text_config"])
        blocks_of(text)
        encoder = clip_tower(config["vision_config"], post_norm="unused")
        tied = not any(name.startswith(OUTPUTS) for name in shapes)
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
        return chat_model(encoder, resampler, decoder, image_token_id=config.get("media_token_id"))

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

    def update(self, loaded: Config, fields: Config) -> Config:
        """What is saved holds all parts."""
        return super().update({key: value for key, value in loaded.items() if key not in SOURCES}, fields)


def _below_vision_encoder(rule: NameRule) -> NameRule:
    names = tuple(name.replace("visual.", "vision_encoder.", 1) for name in rule.official)
    return dataclasses.replace(rule, official=names)


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
