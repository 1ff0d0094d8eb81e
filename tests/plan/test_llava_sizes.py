"""Parameters of LLaVA-NeXT and LLaVA-OneVision as their recipes build them, beside transformers' classes with the settings of
the released files, tensor by tensor, which have a few more words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from test_plan import composed
from transformers import AutoConfig

from lightning_internvl.checkpoints.adapters import layout_of_checkpoint
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.plan.meter import parts_of
from lightning_internvl.plan.stage_plan import stage_plan

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "vocab_size": 32064, "tie_word_embeddings": False,
}  # fmt: skip
WIDER = {"intermediate_size": 14336, "num_key_value_heads": 8}
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 24, "image_size": 336, "patch_size": 14,
}  # fmt: skip
SO400M = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16,
    "num_hidden_layers": 26, "image_size": 384, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
QWEN = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "vocab_size": 152128, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {
    "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "vocab_size": 152000, "tie_word_embeddings": True,
}  # fmt: skip
TIED = "decoder.config.tie_word_embeddings=true"
# Recipe and overrides; the language model of the released files; parameters by transformers' class
SIZES: dict[str, tuple[list[str], dict[str, Any], int]] = {
    "llava-v1.6-vicuna-7b": ([], LLAMA, 7_063_431_168),
    "llava-v1.6-mistral-7b": (["decoder=mistral_7b"], LLAMA | WIDER | {"model_type": "mistral"}, 7_566_747_648),
    "llama3-llava-next-8b": (["decoder=llama3_8b"], LLAMA | WIDER | {"vocab_size": 128320}, 8_355_276_800),
    "llava-onevision-qwen2-0.5b-ov": (["decoder=qwen2_5_0_5b", TIED], QWEN | SMALL, 893_675_552),
    "llava-onevision-qwen2-7b-ov": ([], QWEN, 8_030_807_584),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_released_files(name: str) -> None:
    overrides, text, published = SIZES[name]
    newer = "onevision" in name
    recipe, kind = ("llava_onevision", "LlavaOnevision") if newer else ("llava_next", "LlavaNext")
    tied = text["tie_word_embeddings"]
    fields: Any = AutoConfig.for_model(
        recipe, text_config=text, vision_config=SO400M if newer else CLIP, tie_word_embeddings=tied
    )
    with torch.device("meta"):
        stock = getattr(transformers, f"{kind}ForConditionalGeneration")(fields)
    shapes = {
        there: tuple(tensor.shape)
        for there, tensor in stock.state_dict().items()
        if there not in stock.all_tied_weights_keys and not there.endswith("position_ids")
    }
    assert sum(p.numel() for p in stock.parameters()) == published

    layout = layout_of_checkpoint(fields.to_dict(), shapes)
    with torch.device("meta"):
        model = layout.build(fields.to_dict(), {layout.canonical(there): shape for there, shape in shapes.items()})
    model.decoder.tie()
    ours = layout.official_tensors(fields.to_dict(), own_tensors(model))
    assert {n: tuple(t.shape) for n, t in ours.items()} == {layout.canonical(there): shape for there, shape in shapes.items()}

    settings = stage_settings(composed(f"experiment={recipe}", *overrides), "onevision" if newer else "supervised")
    parts = parts_of(stage_plan(settings, build).stage.model)
    count = sum(p.numel() for module in parts.values() for p in module.parameters())
    assert count == pytest.approx(published, rel=5e-3)
