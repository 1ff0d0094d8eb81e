"""Flamingo under OpenFlamingo's names, there and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_internvl import load_pretrained
from lightning_internvl.config.consent import Untrusted
from lightning_internvl.data.tokenizer import toy_tokenizer
from lightning_internvl.decoders.flamingo import FlamingoCausalLM
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.inference.load_official import open_model
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.middleware.perceiver_resampler import PerceiverResampler
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import NextToken

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 2,
         "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
MPT = {"model_type": "mpt", "d_model": 32, "n_heads": 2, "n_layers": 4, "vocab_size": 60, "max_seq_len": 64}
CASES = {"llama untied": (LLAMA | {"tie_word_embeddings": False}, 1), "llama tied": (LLAMA | {"tie_word_embeddings": True}, 2),
         "mpt": (MPT | {"tie_word_embeddings": True}, 4)}  # fmt: skip


def model(case: str, max_frames: int = 0) -> VLM:
    text, every = CASES[case]
    torch.manual_seed(0)
    encoder = CLIPViT(image_size=12, patch_size=6, dim=64, depth=2, heads=1, mlp_dim=32, post_norm="unused")
    sizes = {"heads": 2, "head_dim": 8, "mlp_ratio": 3}
    resampler = PerceiverResampler(encoder_dim=64, latents=3, depth=2, max_frames=max_frames, special_tokens=1, **sizes)
    decoder = FlamingoCausalLM(encoder_dim=64, config=text, every=every, **sizes)
    vlm = VLM(encoder, resampler, decoder, objectives={"next_token": NextToken()}, image_token_id=50)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return vlm.eval()


NEOX = {"model_type": "gpt_neox", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 2,
        "max_position_embeddings": 64, "rotary_pct": 1.0}  # fmt: skip
OPT = {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 40, "num_hidden_layers": 4,
       "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
BASES = {"mpt": MPT, "llama": LLAMA, "gpt_neox": NEOX, "opt": OPT}
HEADS = {"llama": "lm_head.weight", "gpt_neox": "embed_out.weight"}  # of those that do not tie it


def released(folder: Path, kind: str, tower: str = "transformers") -> tuple[VLM, dict[str, Tensor]]:
    """OpenFlamingo's trained tensors alone, as `filter_state_dict_to_trainable` of its train_utils.py leaves them, with what they
    were trained on as `clip` and `language`; the whole model."""
    words = toy_tokenizer()
    text = BASES[kind] | {"vocab_size": len(words), "tie_word_embeddings": kind not in HEADS}
    CASES["base"] = (text | {"vocab_size": len(words) + 2}, 2)
    whole = model("base")
    whole.image_token_id = len(words) + 1
    whole.save_pretrained(folder / "whole", layout="open_flamingo")
    tensors = load_file(folder / "whole/model.safetensors")
    base = {n.removeprefix("lang_encoder.").replace(".decoder_layer.", "."): t for n, t in tensors.items() if "lang_encoder" in n}
    base = {n: t[: len(words)] if len(t) == len(words) + 2 else t for n, t in base.items() if "gated" not in n}
    language = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text))
    language.load_state_dict(base, strict=False)
    language.save_pretrained(folder / "language")
    words.save_pretrained(folder / "language")
    vision = json.loads((folder / "whole/config.json").read_text())["vision_config"]
    (folder / "clip").mkdir()
    if tower == "transformers":
        load = {n: t for n, t in own_tensors(whole).items() if n.startswith("encoder.")}
        theirs = {n.replace("encoder.", "vision_model.", 1): t.clone() for n, t in load.items()}
        for table in ("class_embedding", "position_embedding"):
            name = f"vision_model.embeddings.{table}"
            theirs[name if table[0] == "c" else f"{name}.weight"] = theirs.pop(name).squeeze(0).squeeze(0)
        (folder / "clip/config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
        save_file(theirs | {"logit_scale": torch.ones(())}, folder / "clip/model.safetensors")
    else:
        theirs = {n.replace("vision_encoder", "visual"): t for n, t in tensors.items() if n.startswith("vision_encoder.")}
        more = {"quick_gelu": True, "vision_cfg": {"head_width": 64}}
        (folder / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": more}))
        save_file(theirs | {"visual.proj": torch.ones(64, 8)}, folder / "clip/open_clip_model.safetensors")
    words_too = ("gated", "perceiver", "embed", "wte")
    kept = {n: t for n, t in tensors.items() if any(w in n for w in words_too) and "vision_encoder" not in n}
    masks = {"lang_encoder.gpt_neox.layers.0.decoder_layer.attention.masked_bias": torch.ones(())} if kind == "gpt_neox" else {}
    (folder / "flamingo").mkdir()
    torch.save(kept | masks, folder / "flamingo/checkpoint.pt")
    (folder / "flamingo/config.json").write_text('{"heads": 2, "dim_head": 8}')
    return whole, kept


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 50, 6, 7, 50, 8], [50, 9, 10, 11, 12, 13]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "pixel_values": torch.randn(3, 3, 12, 12)}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(tmp_path: Path, case: str) -> None:
    ours, inputs = model(case, max_frames=2 if case == "mpt" else 0), batch()
    ours.save_pretrained(tmp_path / "saved")
    back = load_pretrained(tmp_path / "saved")
    assert back(**inputs).logits.equal(ours(**inputs).logits)
    back.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "again"))
    assert first.keys() == second.keys()
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == json.loads(
        (tmp_path / "again" / "config.json").read_text()
    )


def test_names_are_those_of_open_flamingo(tmp_path: Path) -> None:
    ours = model("mpt")
    ours.save_pretrained(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert {
        "vision_encoder.class_embedding",
        "vision_encoder.conv1.weight",
        "vision_encoder.transformer.resblocks.1.attn.in_proj_weight",
        "perceiver.latents",
        "perceiver.layers.1.0.norm_media.weight",
        "perceiver.layers.1.0.to_kv.weight",
        "perceiver.layers.1.1.0.weight",
        "perceiver.layers.1.1.3.weight",
        "perceiver.norm.bias",
        "lang_encoder.transformer.wte.weight",
        "lang_encoder.transformer.blocks.3.gated_cross_attn_layer.attn.to_out.weight",
        "lang_encoder.transformer.blocks.3.gated_cross_attn_layer.attn_gate",
        "lang_encoder.transformer.blocks.3.gated_cross_attn_layer.ff.1.weight",
        "lang_encoder.transformer.blocks.0.decoder_layer.attn.Wqkv.weight",
        "lang_encoder.transformer.norm_f.weight",
    } <= names
    assert not any("blocks.0.gated" in name for name in names)


def test_tensors_that_stand_twice_are_read_once(tmp_path: Path) -> None:
    ours, inputs = model("llama tied"), batch()
    ours.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lang_encoder.old_decoder_blocks.0.mlp.up_proj.weight"] = torch.zeros(40, 32)
    weights["lang_encoder.gated_cross_attn_layers.1.attn_gate"] = torch.zeros(1)
    weights["vision_encoder.proj"] = torch.zeros(64, 8)
    save_file(weights, tmp_path / "model.safetensors")
    assert load_pretrained(tmp_path)(**inputs).logits.equal(ours(**inputs).logits)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model("mpt").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"cross_attn_every_n_layers": 2}))
    with pytest.raises(ValueError, match=r"missing: lang_encoder\.transformer\.blocks\.1\.gated_cross_attn_layer"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": {"model_type": "bert"}}))
    with pytest.raises(ValueError, match=r"text_config\.model_type='bert' is not known"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("kind", BASES)
def test_released_tensors_are_completed_by_their_bases(tmp_path: Path, kind: str) -> None:
    whole, _ = released(tmp_path, kind, "open_clip" if kind == "opt" else "transformers")
    parts = {"encoder": tmp_path / "clip", "decoder": tmp_path / "language"}
    opened = load_pretrained(tmp_path / "flamingo", parts=parts)
    assert opened.image_token_id == whole.image_token_id
    assert opened.decoder.tied == (kind not in HEADS)
    inputs = batch()
    inputs["input_ids"][inputs["input_ids"] == 50] = whole.image_token_id
    ours, theirs = opened(**inputs).logits, whole(**inputs).logits
    known = ours.shape[-1] - 2 if kind == "llama" else None  # LLaMA's head was frozen without the added words
    assert ours[..., :known].equal(theirs[..., :known])
    opened.save_pretrained(tmp_path / "saved")
    assert load_pretrained(tmp_path / "saved")(**inputs).logits.equal(ours)
    assert not {"clip_names", "lang_encoder_path"} & json.loads((tmp_path / "saved/config.json").read_text()).keys()


def test_released_folders_open_for_use(tmp_path: Path) -> None:
    """With the bases that the configuration names, beside the folder; their tokenizer gets OpenFlamingo's words in its order."""
    whole, _ = released(tmp_path, "mpt")
    said = {
        "heads": 2,
        "dim_head": 8,
        "clip_vision_encoder_path": "clip",
        "lang_encoder_path": "language",
        "cross_attn_every_n_layers": 2,
    }
    (tmp_path / "flamingo/config.json").write_text(json.dumps(said))
    view = open_model(tmp_path / "flamingo").view
    words = view.chats.tokenizer
    assert words.convert_tokens_to_ids(["<|endofchunk|>", "<image>"]) == [len(words) - 2, len(words) - 1]
    assert view.model.image_token_id == whole.image_token_id == len(words) - 1
    assert view.chats.template.name == "flamingo"


def test_bases_that_are_nowhere_are_asked_for_at_once(tmp_path: Path) -> None:
    released(tmp_path, "mpt")
    with pytest.raises(Untrusted) as found:
        load_pretrained(tmp_path / "flamingo")
    assert "(if you want it, give trust=[openai/clip-vit-large-patch14]); give encoder.pretrained=" in str(found.value)
    assert "holds no language model, and names none as lang_encoder_path; give decoder.pretrained=" in str(found.value)
    with pytest.raises(ValueError, match=r"decoder.pretrained=.*clip holds none under names that are known"):
        load_pretrained(tmp_path / "flamingo", parts={"encoder": tmp_path / "clip", "decoder": tmp_path / "clip"})
    with pytest.raises(ValueError, match=r"encoder.pretrained=/nowhere: .*neither an existing folder"):
        load_pretrained(tmp_path / "flamingo", parts={"encoder": "/nowhere", "decoder": tmp_path / "language"})
    (tmp_path / "flamingo/config.json").unlink()
    with pytest.raises(ValueError, match=r"do not tell the heads of attention over 16 channels; put a config.json beside them"):
        load_pretrained(tmp_path / "flamingo")
