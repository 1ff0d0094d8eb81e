"""BLIP-2's first stage in LAVIS's layout, with and without a tower, as a folder and as a bare file; models of our own making."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration

from lightning_internvl import load_pretrained
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.decoders.hf_seq2seq import HFSeq2SeqLM
from lightning_internvl.encoders.eva_vit import EvaViT
from lightning_internvl.middleware.qformer import QFormer
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITM, NextToken, QueryITC

OFFICIAL = Path(__file__).parents[1] / "fixtures" / "official" / "blip2_stage1"


def tower(**change: object) -> EvaViT:
    return EvaViT(**{"image_size": 12, "patch_size": 6, "dim": 88, "depth": 2, "heads": 1, "mlp_dim": 20} | change)


def first_stage() -> VLM:
    torch.manual_seed(0)
    middleware = QFormer(
        encoder_dim=88, dim=64, depth=3, heads=1, mlp_dim=24, num_queries=3, text="write", vocab_size=20, embed_dim=6,
        max_positions=9, init_std=0.2,
    )  # fmt: skip
    return VLM(tower(), middleware, objectives={"itc": QueryITC(), "itm": ITM(dim=64), "itg": NextToken()}).eval()


def test_a_folder_comes_back_as_it_was(tmp_path: Path) -> None:
    load_pretrained(OFFICIAL).save_pretrained(tmp_path / "saved")
    theirs, ours = load_file(OFFICIAL / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert ours.keys() == theirs.keys() - {"Qformer.bert.embeddings.position_ids"}
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    again = load_pretrained(tmp_path / "saved")
    assert again.config == load_pretrained(OFFICIAL).config


def test_a_model_of_ours_there_and_back(tmp_path: Path) -> None:
    model, pixels = first_stage(), torch.randn(2, 3, 12, 12)
    model.save_pretrained(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert {"visual_encoder.blocks.1.attn.q_bias", "visual_encoder.patch_embed.proj.weight", "temp", "ln_vision.bias"} <= names
    assert load_pretrained(tmp_path / "saved").encode_image(pixels).equal(model.encode_image(pixels))


def test_a_bare_file_tells_its_sizes(tmp_path: Path) -> None:
    model, pixels = first_stage(), torch.randn(2, 3, 12, 12)
    model.save_pretrained(tmp_path / "saved")
    torch.save({"model": load_file(tmp_path / "saved" / "model.safetensors")}, tmp_path / "blip2.pth")
    found = load_pretrained(tmp_path / "blip2.pth")
    assert found.encode_image(pixels).equal(model.encode_image(pixels))
    assert found.middleware.cross_every == 2


def test_an_untied_language_head_is_refused(tmp_path: Path) -> None:
    tensors = load_file(OFFICIAL / "model.safetensors")
    tensors["Qformer.cls.predictions.decoder.weight"] = tensors["Qformer.cls.predictions.decoder.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((OFFICIAL / "config.json").read_text())
    with pytest.raises(ValueError, match="untied language head is not supported"):
        load_pretrained(tmp_path)


DECODERS = {
    "opt": lambda: HFCausalLM(
        config={
            "model_type": "opt", "hidden_size": 16, "ffn_dim": 20, "word_embed_proj_dim": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 40, "vocab_size": 30,
        }
    ),
    "t5": lambda: HFSeq2SeqLM(
        config={
            "model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2, "vocab_size": 30,
            "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        }
    ),
}  # fmt: skip


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("instructed", [False, True])
def test_a_chat_model_of_ours_is_read_by_the_library(tmp_path: Path, decoder: str, instructed: bool) -> None:
    torch.manual_seed(1)
    text = {"text": "read", "instructed": True, "vocab_size": 25} if instructed else {"text": "none"}
    middleware = QFormer(
        encoder_dim=88,
        dim=24,
        depth=3,
        heads=2,
        mlp_dim=24,
        num_queries=3,
        decoder_dim=16,
        vision_norm_eps=1e-6,
        init_std=0.2,
        **text,
    )
    model = VLM(tower(init_std=0.1), middleware, DECODERS[decoder](), image_token_id=29).eval()
    model.save_pretrained(tmp_path / "saved")
    kind = InstructBlipForConditionalGeneration if instructed else Blip2ForConditionalGeneration
    theirs, report = kind.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.tensor([[29, 29, 29, 2, 5, 6], [29, 29, 29, 2, 7, 8]])
    labels = torch.tensor([[5, 6, 1], [7, 1, -100]]) if decoder == "t5" else ids.masked_fill(ids == 29, -100)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.randn(2, 3, 12, 12),
    }
    if instructed:
        inputs |= {
            "qformer_input_ids": torch.tensor([[1, 2], [3, 4]]),
            "qformer_attention_mask": torch.ones(2, 2, dtype=torch.long),
        }
    expected, found = theirs.eval()(**inputs), model(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.loss.reshape(()), expected.loss.reshape(()), atol=1e-5, rtol=1e-4)
    assert AutoConfig.from_pretrained(tmp_path / "saved").num_query_tokens == 3
    assert load_pretrained(tmp_path / "saved")(**inputs).logits.equal(found.logits)
