"""The tower of any resolution and its merger: each picture and step by itself, gradients, blank batches, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from lightning_internvl.encoders.qwen2_vit import Qwen2ViT, patch_places
from lightning_internvl.encoders.windows import step_lengths, window_order
from lightning_internvl.layers.attention import choose_backend
from lightning_internvl.middleware.patch_merger import PatchMerger

SIZES = {"patch_size": 4, "dim": 24, "depth": 2, "heads": 2, "mlp_dim": 48}
GRIDS = [(1, 4, 6), (3, 2, 2), (1, 2, 8), (1, 4, 4)]


def tower(**changes: object) -> Qwen2ViT:
    torch.manual_seed(0)
    return Qwen2ViT(image_size=16, **(SIZES | changes)).eval()


def patches(grids: list[tuple[int, int, int]]) -> Tensor:
    return torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_every_step_of_a_picture_or_video_is_read_by_itself(backend: str) -> None:
    encoder, pixels = tower(), patches(GRIDS)
    choose_backend(backend)
    try:
        (found,) = encoder(pixels, image_grid_thw=torch.tensor(GRIDS))
    finally:
        choose_backend("sdpa")
    steps = [(h, w) for t, h, w in GRIDS for _ in range(t)]
    parts = pixels.split([h * w for h, w in steps])
    alone = [encoder(part, image_grid_thw=[(1, h, w)])[0] for part, (h, w) in zip(parts, steps, strict=True)]
    torch.testing.assert_close(found, torch.cat(alone))


def test_layers_are_numbered_as_in_transformers() -> None:
    encoder, pixels = tower(depth=3), patches(GRIDS)
    first, middle, last = encoder(pixels, image_grid_thw=GRIDS, layers=(0, 2, -1))
    torch.testing.assert_close(first, pixels @ encoder.patch_embed.proj.weight.flatten(1).T)
    assert not torch.allclose(middle, last)
    torch.testing.assert_close(encoder(pixels, image_grid_thw=GRIDS, layers=(3,))[0], last)
    with pytest.raises(ValueError, match=r"layers \[4\] do not exist; with 3 blocks"):
        encoder(pixels, image_grid_thw=GRIDS, layers=(4,))


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_tower_and_merger_equal_those_of_transformers(merge: int) -> None:
    grids = [(1, 6, 12), (2, 6, 6)]
    encoder = tower(merge_size=merge)
    merger = PatchMerger(encoder_dim=24, decoder_dim=16, factor=merge)
    config = Qwen2VLVisionConfig(
        depth=2, embed_dim=24, hidden_size=16, num_heads=2, mlp_ratio=2, patch_size=4, spatial_merge_size=merge
    )
    theirs = Qwen2VisionTransformerPretrainedModel(config).eval()
    ours = encoder.state_dict() | {f"merger.{name}": tensor for name, tensor in merger.state_dict().items()}
    theirs.load_state_dict(ours)
    pixels = patches(grids)
    found, expected = merger(encoder(pixels, image_grid_thw=grids)), theirs(pixels, grid_thw=torch.tensor(grids)).pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(found) == sum(merger.tokens_out(t * h * w) for t, h, w in grids)


def test_patches_come_in_blocks() -> None:
    assert patch_places((1, 2, 4), 2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert patch_places((2, 2, 2), 2).tolist() == 2 * [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert step_lengths([(1, 2, 2), (3, 2, 2), (1, 2, 4)]) == [4, 4, 4, 4, 8]


def test_windows_are_described_by_an_order_and_lengths() -> None:
    grids = [(1, 4, 6), (2, 4, 2), (1, 10, 10)]
    order, lengths = window_order(grids, merge=2, side=2)
    assert order.sort().values.equal(torch.arange(40 + 100))
    assert lengths == [16, 8, 8, 8, 16, 16, 16, 16, 8, 8, 8, 8, 4]
    places = torch.cat([patch_places(grid, 2) for grid in grids])[order]
    for window in places.split(lengths):
        low, high = window.amin(dim=0), window.amax(dim=0)
        assert int((high - low + 1).prod()) == len(window)  # a rectangle
        assert (low % 4 == 0).all()
        assert (high - low < 4).all()


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_a_patch_sees_its_window_and_in_full_layers_its_step(backend: str) -> None:
    pixels = patches([(2, 6, 8)]).requires_grad_()
    places, step = patch_places((2, 6, 8), 2), torch.arange(96) // 48
    near = (step == 0) & (places < 4).all(dim=1)
    choose_backend(backend)
    try:
        for options, seen in (({"full_layers": []}, near), ({"full_layers": [1]}, step == 0)):
            encoder = tower(window=16, gated=True, norm="rms_norm", activation="silu", **options)
            (found,) = encoder(pixels, image_grid_thw=[(2, 6, 8)])
            (gradient,) = torch.autograd.grad(found[0].sum(), pixels)
            assert (gradient.abs().sum(dim=1) > 0).equal(seen)
    finally:
        choose_backend("sdpa")


def test_learned_positions_are_those_of_the_table_at_the_corners_and_between() -> None:
    encoder = tower(positions=3, patch_bias=True)
    table = encoder.pos_embed.weight.unflatten(0, (3, 3))
    (first,) = encoder(torch.zeros(2 * 24 + 4, 96), image_grid_thw=[(2, 4, 6), (1, 2, 2)], layers=(0,))
    expected = F.interpolate(table.permute(2, 0, 1)[None], size=(4, 6), mode="bilinear", align_corners=True)[0]
    rows, columns = patch_places((2, 4, 6), 2).unbind(dim=1)
    torch.testing.assert_close(first[:48], expected[:, rows, columns].T)
    torch.testing.assert_close(first[48:], table[[0, 0, 2, 2], [0, 2, 0, 2]])


def test_the_blank_picture_reaches_every_parameter() -> None:
    encoder, merger = tower(window=16, gated=True, norm="rms_norm"), PatchMerger(encoder_dim=24, decoder_dim=16)
    blank = encoder.blank(torch.zeros(0, 96))
    merger(encoder(blank.pop("pixel_values"), **blank)).sum().backward()
    assert all(p.grad is not None for p in [*encoder.parameters(), *merger.parameters()])


def test_it_runs_on_the_meta_device_with_grids_as_numbers() -> None:
    with torch.device("meta"):
        encoder, merger = Qwen2ViT(image_size=16, window=8, **SIZES), PatchMerger(encoder_dim=24, decoder_dim=16)
        found = merger(encoder(torch.zeros(56, 96), image_grid_thw=[(1, 4, 6), (2, 4, 4)]))
    assert found.shape == (14, 16)


@pytest.mark.parametrize(
    ("grids", "rows", "message"),
    [
        ([(1, 4, 6)], 20, r"pixels are \(20, 96\), the grids \[\(1, 4, 6\)\] ask for \(24, 96\)"),
        ([(1, 3, 8)], 24, r"must be at least 1 and divide by merge_size=2"),
        ([(0, 2, 2), (1, 4, 6)], 24, r"\(0, 2, 2\)"),
    ],
)
def test_grids_that_do_not_fit(grids: list[tuple[int, int, int]], rows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tower()(torch.zeros(rows, 96), image_grid_thw=grids)


def test_settings_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="processor=any_resolution"):
        tower()(torch.zeros(1, 3, 16, 16), image_grid_thw=[(1, 4, 4)])
    with pytest.raises(ValueError, match=r"keep_tokens=0\.5"):
        tower()(torch.zeros(16, 96), image_grid_thw=[(1, 4, 4)], keep=0.5)
    with pytest.raises(ValueError, match="activation='relu' is not known; valid choices: quick_gelu, gelu"):
        tower(activation="relu")
    with pytest.raises(ValueError, match=r"activation='relu' is not known; valid choices: quick_gelu, .*silu"):
        tower(activation="relu", gated=True)
    with pytest.raises(ValueError, match="norm='batch' is not known; valid choices: rms_norm, layer_norm"):
        tower(norm="batch")
    with pytest.raises(ValueError, match=r"full_layers=\[2\] do not exist; with depth=2 they are 0 to 1"):
        tower(window=16, full_layers=[0, 2])
    with pytest.raises(ValueError, match="give window too"):
        tower(full_layers=[0])
    with pytest.raises(ValueError, match="dim=20 must divide by heads=2, and the width of a head by 4"):
        tower(dim=20)
    with pytest.raises(ValueError, match="6 patches do not divide into blocks of 2 x 2"):
        PatchMerger(encoder_dim=24, decoder_dim=16)([torch.zeros(6, 24)])
