"""M-RoPE: positions counted by hand, packed with what the model holds, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lightning_internvl.decoders.mrope import MRopeCausalLM
from lightning_internvl.encoders.qwen2_vit import Qwen2ViT
from lightning_internvl.middleware.patch_merger import PatchMerger
from lightning_internvl.model.vlm import VLM

IMAGE, VIDEO = 50, 51
CONFIG = {"model_type": "qwen2_vl_text", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 60,
          "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2,
          "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]}}  # fmt: skip


def model(**settings: object) -> VLM:
    torch.manual_seed(0)
    encoder = Qwen2ViT(image_size=16, patch_size=4, dim=24, depth=1, heads=2, mlp_dim=48)
    decoder = MRopeCausalLM(config=CONFIG, embed_std=0.5, **settings)
    return VLM(encoder, PatchMerger(encoder_dim=24, decoder_dim=32), decoder, image_token_id=IMAGE, video_token_id=VIDEO).eval()


def positions(decoder: MRopeCausalLM, ids: list[int], **grids: object) -> list[list[int]]:
    row = torch.tensor([ids])
    places = {"visual_places": (row == IMAGE) | (row == VIDEO), "video_places": row == VIDEO}
    return decoder.positions((row != 0).long(), **places, **grids)[:, 0].tolist()


def test_positions_counted_by_hand() -> None:
    decoder = model().decoder
    found = positions(decoder, [0, 5, 6, *[IMAGE] * 6, 7, 8, 0], image_grid_thw=[(1, 4, 6)])
    assert found[0] == [0, 0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 0]
    assert found[1] == [0, 0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 0]
    assert found[2] == [0, 0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 0]
    found = positions(decoder, [*[VIDEO] * 8, 9, *[IMAGE] * 2], video_grid_thw=[(2, 4, 4)], image_grid_thw=[(1, 2, 4)])
    assert found[0] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 3, 3]
    assert found[1] == [0, 0, 1, 1, 0, 0, 1, 1, 2, 3, 3]
    assert found[2] == [0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 4]


def test_two_pictures_without_text_between_them() -> None:
    found = positions(model().decoder, [*[IMAGE] * 5, 3], image_grid_thw=[(1, 2, 2), (1, 4, 4)])
    assert found == [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]


@pytest.mark.parametrize(("time_counts", "after"), [(False, 1), (True, 5)])
def test_text_behind_a_long_video(time_counts: bool, after: int) -> None:
    decoder = model(time_counts=time_counts).decoder
    assert positions(decoder, [*[VIDEO] * 5, 3], video_grid_thw=[(5, 2, 2)]) == [[0, 1, 2, 3, 4, after], *[[0] * 5 + [after]] * 2]


def test_text_alone_reads_as_a_qwen2() -> None:
    decoder = model().decoder
    fields = {name: value for name, value in CONFIG.items() if name != "model_type"}
    plain = Qwen2ForCausalLM(Qwen2Config(**fields | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}})).eval()
    plain.load_state_dict(decoder.lm.state_dict())
    ids = torch.randint(3, 50, (2, 9))
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    found = decoder.head(decoder.hidden(decoder.embed(ids), mask))
    torch.testing.assert_close(
        found[mask.bool()], plain(input_ids=ids, attention_mask=mask).logits[mask.bool()], atol=1e-5, rtol=1e-5
    )


def test_a_plain_qwen2_is_a_start(tmp_path: object) -> None:
    fields = {name: value for name, value in CONFIG.items() if name not in ("model_type", "rope_parameters")} | {
        "hidden_size": 256
    }
    plain = Qwen2ForCausalLM(Qwen2Config(**fields | {"tie_word_embeddings": True})).eval()
    plain.save_pretrained(tmp_path)
    decoder = MRopeCausalLM(pretrained=str(tmp_path), vocab_size=64).eval()
    assert decoder.vocab_size == 64
    assert decoder.tied
    ids = torch.randint(3, 50, (2, 9))
    found = decoder.head(decoder.hidden(decoder.embed(ids), torch.ones_like(ids)))[..., :60]
    torch.testing.assert_close(found, plain(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


QWEN3 = {name: value for name, value in CONFIG.items() if name not in ("model_type", "rope_parameters")} | {"head_dim": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True}


@pytest.mark.parametrize("experts", [False, True])
def test_a_plain_qwen3_is_a_start(tmp_path: Path, experts: bool) -> None:
    torch.manual_seed(0)
    plain = Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN3, **EXPERTS)) if experts else Qwen3ForCausalLM(Qwen3Config(**QWEN3))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    plain.eval().save_pretrained(tmp_path)
    decoder = MRopeCausalLM(pretrained=str(tmp_path), steps_apart=True).eval()
    ids = torch.randint(3, 50, (2, 9))
    found = decoder.head(decoder.hidden(decoder.embed(ids), torch.ones_like(ids)))
    torch.testing.assert_close(found, plain(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_steps_of_a_video_are_pictures_of_their_own() -> None:
    decoder = model(steps_apart=True).decoder
    ids = [7, *[VIDEO] * 4, 8, 9, *[VIDEO] * 4, *[IMAGE] * 2, 5]
    found = positions(decoder, ids, video_grid_thw=[(2, 4, 4)], image_grid_thw=[(1, 2, 4)])
    assert found[0] == [0, 1, 1, 1, 1, 3, 4, 5, 5, 5, 5, 7, 7, 9]
    assert found[1] == [0, 1, 1, 2, 2, 3, 4, 5, 5, 6, 6, 7, 7, 9]
    assert found[2] == [0, 1, 2, 1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9]
    for other in ({"tokens_per_second": 2}, {"time_counts": True}):
        with pytest.raises(ValueError, match=r"decoder\.steps_apart=true leaves no time within a video to count"):
            model(steps_apart=True, **other)


def rows() -> dict[str, Tensor]:
    ids = torch.tensor([[3, *[IMAGE] * 2, 4, *[VIDEO] * 4, 5], [*[VIDEO] * 1, 6, 7, 8, 9, *[IMAGE] * 1, 3, 4, 5]])
    grids = {"image_grid_thw": torch.tensor([[1, 2, 4], [1, 2, 2]]), "video_grid_thw": torch.tensor([[2, 2, 4], [1, 2, 2]])}
    generator = torch.Generator().manual_seed(2)
    pixels = {
        "pixel_values": torch.randn(12, 96, generator=generator),
        "pixel_values_videos": torch.randn(20, 96, generator=generator),
    }
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **grids, **pixels}


def test_pictures_and_videos_are_one_run_of_the_tower() -> None:
    vlm, batch, calls = model(), rows(), []
    vlm.encoder.register_forward_hook(lambda *_: calls.append(1))
    together = vlm(**batch).logits
    assert len(calls) == 1
    for row, (images, videos) in enumerate([((0, 8), (0, 16)), ((8, 12), (16, 20))]):
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items() if not name.startswith("pixel")}
        alone |= {
            "pixel_values": batch["pixel_values"][slice(*images)],
            "pixel_values_videos": batch["pixel_values_videos"][slice(*videos)],
        }
        torch.testing.assert_close(vlm(**alone).logits[0], together[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("empty", [torch.zeros(0, 96), None], ids=["no pictures", "none given"])
def test_text_alone_and_videos_alone(empty: Tensor | None) -> None:
    vlm = model()
    ids = torch.tensor([[3, 4, *[VIDEO] * 2, 5]])
    grid = torch.tensor([[2, 2, 2]])
    none = {} if empty is None else {"pixel_values": empty, "image_grid_thw": torch.zeros(0, 3, dtype=torch.long)}
    videos = {"pixel_values_videos": torch.randn(8, 96), "video_grid_thw": grid}
    assert vlm(ids, torch.ones_like(ids), **none, **videos).logits.shape == (1, 5, 60)
    text = torch.tensor([[3, 4, 5, 6, 7]])
    nothing = none | {"pixel_values_videos": torch.zeros(0, 96), "video_grid_thw": torch.zeros(0, 3, dtype=torch.long)}
    output = vlm(text, torch.ones_like(text), labels=text, **nothing)
    output.loss.backward()
    assert all(p.grad is not None for p in vlm.parameters())
    assert output.logits.equal(vlm(text, torch.ones_like(text)).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pixel_values": torch.zeros(8, 96), "image_grid_thw": torch.tensor([[1, 2, 4]])},
            r"8 patches of image\(s\) give 2 visual tokens",
        ),
        (
            {"pixel_values_videos": torch.zeros(16, 96), "video_grid_thw": torch.tensor([[2, 2, 4]])},
            r"16 patches of video\(s\) give 4 visual",
        ),
        ({"pixel_values_videos": None, "video_grid_thw": None}, r"0 patches of video\(s\) give 0 visual tokens"),
        ({"image_grid_thw": torch.tensor([[1, 2, 4]])}, r"pixels are \(32, 96\)"),
    ],
)
def test_places_and_pixels_must_agree(change: dict[str, Tensor | None], message: str) -> None:
    batch = {name: tensor for name, tensor in (rows() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        model()(**batch)


def test_settings_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"model_type='llama' has no M-RoPE; valid choices: qwen2, qwen2_vl_text"):
        MRopeCausalLM(config=CONFIG | {"model_type": "llama"})
    with pytest.raises(ValueError, match=r"mrope_section=\[2, 2, 2\] must be three numbers with the sum 8"):
        MRopeCausalLM(
            config=CONFIG | {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [2, 2, 2]}}
        )
    with pytest.raises(ValueError, match="the grids give 2 visual tokens, the text holds 6 placeholders"):
        positions(model().decoder, [3, *[IMAGE] * 6], image_grid_thw=[(1, 2, 4)])
