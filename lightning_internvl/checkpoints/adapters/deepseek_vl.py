"""DeepSeek-VL as released (model_type 'multi_modality'): SigLIP, SAM, projector, LLM.

The original normalises its pictures itself and makes the small ones from the large ones; here the
processor does both, so the model takes `pixel_values` and `high_res_pixel_values` as transformers'
class does. What the original holds and never uses (the pooling head of SigLIP, two norms) is left
out on loading.
"""

from __future__ import annotations

import re

from lightning_internvl.checkpoints.adapters.deepseek_vl_hf import vision_configs
from lightning_internvl.checkpoints.adapters.layout import Layout, chat_model, updated_config
from lightning_internvl.checkpoints.families.config_fields import check_only
from lightning_internvl.checkpoints.families.language_model import language_config, language_model, language_rules
from lightning_internvl.checkpoints.families.sam import release_rules
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename, stacked_rows
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.hybrid import HybridEncoder
from lightning_internvl.encoders.sam_vit import SamViT
from lightning_internvl.encoders.siglip_vit import SiglipViT
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.middleware.hybrid_mlp import HybridMLP
from lightning_internvl.model.vlm import VLM

HYBRID, ALONE = "HybridVisionTower", "CLIPVisionTower"
HYBRID_MLP, MLP = "low_high_hybrid_split_mlp_gelu", "mlp_gelu"
HEAD = "language_model.lm_head.weight"
IMAGE_TOKEN = 100015
NORM_EPS, ACT = 1e-6, "gelu"  # written into the official code
SIGLIP_HEADS = 16  # of every SigLIP that the official code knows
_UNUSED = re.compile(r"vision_model\.(high|low)_layer_norm\..*|.*\.attn_pool\..*|.*\.rotary_emb\.inv_freq")
_NORMS = {
    "siglip": {"image_size": 384, "pixel_mean": [0.5] * 3, "pixel_std": [0.5] * 3},
    "sam": {
        "image_size": 1024,
        "pixel_mean": [0.48145466, 0.4578275, 0.40821073],
        "pixel_std": [0.26862954, 0.26130258, 0.27577711],
    },
}
_SELECT = {"select_feature": "same", "select_layer": -1, "ckpt_path": ""}
LOW = {"model_name": "siglip_large_patch16_384", "output_dim": 1024, **_NORMS["siglip"], **_SELECT}
HIGH = {"model_name": "sam_b_downsample", "output_dim": 1024, **_NORMS["sam"], **_SELECT}
# The towers behind these names, as `vision_configs` describes them.
SIZES: Config = {
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 384, "patch_size": 16, "hidden_act": ACT, "layer_norm_eps": NORM_EPS,
    },
    "high_res_vision_config": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 1024,
        "output_channels": 256, "patch_size": 16, "window_size": 14, "mlp_dim": 3072,
        "global_attn_indexes": [2, 5, 8, 11], "use_abs_pos": True,
        "use_rel_pos": True, "qkv_bias": True, "hidden_act": ACT, "layer_norm_eps": NORM_EPS,
    },
}  # fmt: skip


class DeepseekVL(Layout):
    NAME = "DeepSeek-VL as released (model_type 'multi_modality')"
    MODEL_TYPES = ("multi_modality",)
    ARCHITECTURE = "MultiModalityCausalLM"

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        """Later models of the same authors share its model_type."""
        tower = (config.get("vision_config") or {}).get("cls")
        own = tower in (HYBRID, ALONE) and "gen_vision_config" not in config
        return own and super().recognises(config, shapes)

    def canonical(self, name: str) -> str | None:
        """What the original never uses is left out."""
        return None if _UNUSED.fullmatch(name) else super().canonical(name)

    def rules(self, config: Config) -> list[NameRule]:
        if config["vision_config"]["cls"] == ALONE:
            towers = _siglip_rules("encoder.", "vision_model.vision_tower.")
            aligner = [rename("middleware.mlp1.**", "aligner.layers.**")]
        else:
            low, high = (f"vision_model.vision_tower_{x}.vision_tower." for x in ("low", "high"))
            towers = [*_siglip_rules("encoder.low.", low), *release_rules("encoder.high.", high)]
            aligner = [rename("middleware.proj.*", "aligner.layers.1.*"), rename("middleware.**", "aligner.**")]
        return [*towers, *aligner, *language_rules({})]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        """The config names the towers; their sizes stand in the files."""
        hybrid, params = config["vision_config"]["cls"] == HYBRID, config["vision_config"]["params"]
        low = params["low_res_cfg"] if hybrid else params
        check_only(low, {"select_layer": -1, "select_feature": "same"}, "vision_config.params")
        text = {"model_type": "llama"} | config["language_config"]
        decoder = language_model(text, tied=HEAD not in shapes)
        aligner = {"projector_type": HYBRID_MLP if hybrid else MLP, "depth": 2}
        check_only(config["aligner_config"]["params"], aligner, "aligner_config")
        image = config.get("image_token_id", IMAGE_TOKEN)
        if not hybrid:
            siglip = _siglip(shapes, "vision_model.vision_tower.")
            width = decoder.dim
            connector = MLPConnector(encoder_dim=siglip.dim, decoder_dim=width, special_tokens=0)
            return chat_model(siglip, connector, decoder, image_token_id=image)
        check_only(params, {"concat_type": "tuple"}, "vision_config.params")
        siglip = _siglip(shapes, "vision_model.vision_tower_low.vision_tower.")
        sam = _sam(shapes, "vision_model.vision_tower_high.vision_tower.", siglip)
        encoder = HybridEncoder(low=siglip, high=sam)
        middleware = HybridMLP(encoder_dims=encoder.dims, decoder_dim=decoder.dim)
        return chat_model(encoder, middleware, decoder, image_token_id=image)

    def config_of(self, model: VLM) -> Config | None:
        """A new config can only name the published towers."""
        vision, decoder, loaded = vision_configs(model), model.decoder, model.config or {}
        if vision is None or type(decoder) is not HFCausalLM:
            return None
        hybrid = "high_res_vision_config" in vision
        tower = HYBRID if hybrid else ALONE
        if self.recognises(loaded, {}) and loaded["vision_config"]["cls"] == tower:
            return updated_config(loaded, {}, {"language_config": {"vocab_size": decoder.vocab_size}})
        for part, fields in vision.items():
            if any(fields.get(name) != size for name, size in SIZES[part].items()):
                return None
        freeze = {"freeze_high": True, "freeze_low": True}
        params = {"concat_type": "tuple", **freeze, "high_res_cfg": HIGH, "low_res_cfg": LOW}
        kind = HYBRID_MLP if hybrid else MLP
        aligner = {"depth": 2, "input_dim": 1024, "n_embed": decoder.dim, "projector_type": kind}
        return self.new_config(
            model,
            {
                "vision_config": {"cls": tower, "model_type": "vision", "params": params if hybrid else LOW},
                "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": aligner},
                "language_config": language_config(decoder),
            },
        )


def _siglip_rules(ours: str, prefix: str) -> list[NameRule]:
    """The tower under timm's names."""
    block, theirs = f"{ours}encoder.layers.*", f"{prefix}blocks.*"
    return [
        rename(f"{ours}embeddings.position_embedding", f"{prefix}pos_embed"),
        rename(f"{ours}embeddings.patch_embedding.*", f"{prefix}patch_embed.proj.*"),
        *(
            stacked_rows([f"{block}.self_attn.{x}_proj.{leaf}" for x in "qkv"], f"{theirs}.attn.qkv.{leaf}")
            for leaf in ("weight", "bias")
        ),
        rename(f"{block}.self_attn.out_proj.*", f"{theirs}.attn.proj.*"),
        *(rename(f"{block}.layer_norm{i}.*", f"{theirs}.norm{i}.*") for i in (1, 2)),
        rename(f"{block}.mlp.**", f"{theirs}.mlp.**"),
        rename(f"{ours}post_layernorm.*", f"{prefix}norm.*"),
    ]


def _siglip(shapes: Shapes, prefix: str) -> SiglipViT:
    dim, _, patch, _ = _shape(shapes, f"{prefix}patch_embed.proj.weight")
    return SiglipViT(
        image_size=patch * round(_shape(shapes, f"{prefix}pos_embed")[1] ** 0.5),
        patch_size=patch,
        dim=dim,
        depth=_depth(shapes, prefix),
        heads=SIGLIP_HEADS,
        mlp_dim=_shape(shapes, f"{prefix}blocks.0.mlp.fc1.weight")[0],
        act=ACT,
        norm_eps=NORM_EPS,
        head="none",
    )


def _sam(shapes: Shapes, prefix: str, siglip: SiglipViT) -> SamViT:
    """SAM's sizes; a block's table of distances tells the side that it sees and a head's width."""
    dim, _, patch, _ = _shape(shapes, f"{prefix}patch_embed.proj.weight")
    grid, depth = _shape(shapes, f"{prefix}pos_embed")[1], _depth(shapes, prefix)
    tables = [_shape(shapes, f"{prefix}blocks.{i}.attn.rel_pos_h") for i in range(depth)]
    sides = [(rows + 1) // 2 for rows, _ in tables]
    return SamViT(
        image_size=patch * grid,
        patch_size=patch,
        dim=dim,
        depth=depth,
        heads=dim // tables[0][1],
        mlp_dim=_shape(shapes, f"{prefix}blocks.0.mlp.lin1.weight")[0],
        window=min(sides),
        global_layers=[i for i, side in enumerate(sides) if side == grid],
        neck_dim=_shape(shapes, f"{prefix}neck.0.weight")[0],
        out_grid=siglip.image_size // siglip.patch_size,
    )


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"the checkpoint lacks {name}, which tells the size of a tower")
    return shapes[name]


def _depth(shapes: Shapes, prefix: str) -> int:
    return len([name for name in shapes if re.fullmatch(re.escape(prefix) + r"blocks\.\d+\.norm1\.weight", name)])


LAYOUT = DeepseekVL()
