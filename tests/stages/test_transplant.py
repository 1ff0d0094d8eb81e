"""The connector behind another tower gives what the old ones gave, found in closed form; processes add up; bad input is named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import together
from torch import Tensor, distributed as dist

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.launch import leave_processes
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.middleware.connector import LinearConnector, MLPConnector
from lightning_internvl.middleware.pixel_shuffle import PixelShuffleMLP
from lightning_internvl.model.vlm import VLM
from lightning_internvl.stages import TransplantStage
from lightning_internvl.stages.transplant import at_places
from lightning_internvl.training.transplant import new_part, with_new_part

INHERITED: dict[str, Any] = {"_target_": "inherited", "pretrained": None}


def tower(seed: int, dim: int, patch: int = 8) -> CLIPViT:
    torch.manual_seed(seed)
    return CLIPViT(image_size=32, patch_size=patch, dim=dim, depth=1, heads=2, mlp_dim=2 * dim, embed_std=0.5)


def finished(kind: type = MLPConnector, **options: Any) -> VLM:
    """A model with a tower of its own and a connector behind it."""
    config = {
        "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    encoder = tower(0, 12)
    return VLM(encoder, kind(encoder_dim=12, decoder_dim=16, **options), HFCausalLM(config=config), image_token_id=39)


def stage(
    model: VLM, encoder: CLIPViT, folder: Path, steps: int = 10, kind: type = MLPConnector, **options: Any
) -> TransplantStage:
    """The stage that puts another tower in front of a finished model, with its weights."""
    old = {"encoder": model.encoder.config, "middleware": model.middleware.config}
    old["middleware"] = {name: x for name, x in old["middleware"].items() if name not in ("encoder_dim", "decoder_dim")}
    pixels = {"image_size": 32, "scale": [1.0, 1.0, 1.0], "shift": [0.0, 0.0, 0.0]}
    torch.manual_seed(7)  # a connector that knows nothing of the old one
    new = VLM(encoder, kind(encoder_dim=encoder.dim, decoder_dim=16, **options), model.decoder, image_token_id=39)
    found = TransplantStage(
        new, old=old | pixels, weights_of="NEW", name="transplant", run_dir=folder, parts={}, train=["middleware"],
        max_steps=steps, optimizer=None, scheduler=None,
    )  # fmt: skip
    wanted = {name: x.clone() for name, x in own_tensors(encoder).items()}
    tensors, elsewhere = found.start_tensors(own_tensors(model), lambda _: {f"encoder.{name}": x for name, x in wanted.items()})
    assert elsewhere == {f"encoder.{name}" for name in wanted}
    with torch.no_grad():
        for name, own in own_tensors(new).items():
            own.copy_(tensors.get(name, own))
    return found


def pictures(step: int, count: int = 12) -> dict[str, Tensor]:
    """Smooth ones, whose neighbouring patches have to do with each other."""
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(step))
    return {"pixel_values": F.interpolate(coarse, (32, 32), mode="bicubic")}


def solve_all(found: TransplantStage, rank: int = 0, size: int = 1, steps: range | None = None) -> None:
    """The steps of a stage, without a trainer, on this process's share of the pictures."""
    found.trainer = SimpleNamespace(accumulate_grad_batches=1, log_every_n_steps=0)  # type: ignore[assignment]
    for step in steps or range(found.max_steps):
        found.assumed_step = step
        share = {name: x[rank::size] for name, x in pictures(step).items()}
        optimizer = found.configure_optimizers()["optimizer"]
        optimizer.step(lambda share=share: found.training_step(share, 0))


@pytest.mark.parametrize(("kind", "options"), [(LinearConnector, {}), (MLPConnector, {"depth": 3}), (PixelShuffleMLP, {})])
def test_the_old_tower_behind_a_new_connector_gives_the_old_tokens(kind: type, options: dict[str, Any], tmp_path: Path) -> None:
    model = finished(kind, **options)
    found = stage(model, tower(0, 12), tmp_path, steps=15, kind=kind, **options)
    seen = pictures(99)["pixel_values"]
    wanted, before = model.visual_tokens(seen), found.model.visual_tokens(seen)
    solve_all(found)
    assert (before - wanted).norm() > 0.3 * wanted.norm()
    assert (found.model.visual_tokens(seen) - wanted).norm() < 2e-3 * wanted.norm()
    assert found.measured["tokens_explained"] > 0.999
    assert found.measured["rank"] == (47 if kind is PixelShuffleMLP else 12)  # the norm takes one


def test_another_tower_with_other_patches_comes_near_and_nothing_but_the_connector_moves(tmp_path: Path) -> None:
    model, encoder = finished(), tower(1, 20, patch=4)
    found = stage(model, encoder, tmp_path)
    before = {name: x.clone() for name, x in own_tensors(found.model).items()}
    solve_all(found)
    moved = {name for name, x in own_tensors(found.model).items() if not x.equal(before[name])}
    assert moved == {f"middleware.mlp1.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    assert found.measured["places"] == 4 * 12 * 64
    assert 0.1 < found.measured["tokens_explained"] < 1


def test_layers_behind_the_first_keep_their_weights_until_they_are_solved(tmp_path: Path) -> None:
    model = finished()
    found = stage(model, tower(1, 20), tmp_path)
    solve_all(found, steps=range(5))
    assert found.model.middleware.mlp1[2].weight.equal(model.middleware.mlp1[2].weight)
    assert found.model.middleware.mlp1[0].weight.shape == (16, 20)


def test_tokens_at_the_places_of_another_grid() -> None:
    four = torch.arange(4.0).view(1, 4, 1)
    assert at_places(four, 4, 0, 0).equal(four)
    assert at_places(four, 16, 0, 0).flatten()[[0, 3, 12, 15]].tolist() == [0.0, 1.0, 2.0, 3.0]
    with_first = torch.cat([torch.full((1, 1, 1), 9.0), four], dim=1)
    assert at_places(with_first, 5, 1, 1).equal(with_first)
    assert at_places(with_first, 4, 1, 0).equal(four)
    assert at_places(four, 5, 0, 1).flatten().tolist() == [1.5, 0.0, 1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="give 4 and 6 places of a picture, which are no squares"):
        at_places(four, 6, 0, 0)


def test_a_checkpoint_holds_the_sums(tmp_path: Path) -> None:
    model = finished()
    whole, begun, resumed = (stage(model, tower(1, 20), tmp_path) for _ in range(3))
    solve_all(whole)
    solve_all(begun, steps=range(7))
    state: dict[str, Any] = {"state_dict": begun.state_dict()}
    begun.on_save_checkpoint(state)
    resumed.load_state_dict(state["state_dict"])
    resumed.on_load_checkpoint(state)
    solve_all(resumed, steps=range(7, 10))
    for name, own in own_tensors(resumed.model.middleware).items():
        assert own.equal(own_tensors(whole.model.middleware)[name]), name
    assert resumed.measured == whole.measured


def half(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = stage(finished(), tower(1, 20), Path(folder))
    solve_all(found, rank, 2)
    torch.save((own_tensors(found.model.middleware), found.measured), f"{folder}/{rank}")
    leave_processes()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    together(half, str(tmp_path), count=2)
    (one, measured), (two, _) = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    found = stage(finished(), tower(1, 20), tmp_path)
    solve_all(found)
    assert measured == pytest.approx(found.measured, rel=1e-5)
    for name, own in own_tensors(found.model.middleware).items():
        assert one[name].equal(two[name])
        torch.testing.assert_close(one[name], own, rtol=1e-4, atol=1e-5)


def test_too_few_steps_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"solves 2 layers.*; give max_steps=4 or more"):
        stage(finished(), tower(1, 20), tmp_path, steps=3)


def test_a_start_without_the_old_connector_is_told(tmp_path: Path) -> None:
    found = stage(finished(), tower(1, 20), tmp_path)
    with pytest.raises(ValueError, match=r"init_from lacks middleware\.mlp1\.0\.weight, which the old connector is made of"):
        found.start_tensors({f"encoder.{name}": x for name, x in own_tensors(tower(0, 12)).items()}, lambda _: {})


OTHER = INHERITED | {"pretrained": "a"}


@pytest.mark.parametrize(
    ("encoder", "decoder", "told"),
    [
        (INHERITED, INHERITED, r"nothing is another part than in init_from; give encoder\.pretrained=.* or decoder\.pretrained="),
        (OTHER, OTHER, "encoder and decoder: both are new.* swap one, then the other with init_from=RUN_OF_THE_FIRST"),
        ({"_target_": "lightning_internvl.encoders.clip_vit.CLIPViT"}, INHERITED, "CLIPViT has no weights, and a tower that has"),
        (INHERITED, {"_target_": "a.HFCausalLM", "pretrained": None}, "HFCausalLM has no weights, and a language model that has"),
    ],
)
def test_which_part_is_new_is_told_well_or_refused(encoder: dict[str, Any], decoder: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        new_part({"encoder": encoder, "decoder": decoder})


HF_TOWER = {"_target_": "lightning_internvl.encoders.hf_vision.HFVision", "pretrained": "a"}
PLAIN = ("connector.MLPConnector", "clip_vit.CLIPViT", "hf_causal.HFCausalLM")


@pytest.mark.parametrize(
    ("parts", "given", "told"),
    [
        (
            ("qformer.QFormer", *PLAIN[1:]),
            {"encoder": HF_TOWER},
            "its middleware QFormer is no chain of linear layers.*experiment=blip2",
        ),
        (
            ("qformer.QFormer", *PLAIN[1:]),
            {"decoder": OTHER},
            "its middleware QFormer is no chain of linear layers.*experiment=blip2",
        ),
        ((PLAIN[0], "qwen2_vit.Qwen2ViT", PLAIN[2]), {"encoder": HF_TOWER}, "Qwen2ViT reads more than square pictures"),
        ((*PLAIN[:2], "flamingo.FlamingoCausalLM"), {"decoder": OTHER}, "init_from: FlamingoCausalLM attends to visual tokens"),
    ],
)
def test_parts_that_have_no_closed_form_are_told(parts: tuple[str, str, str], given: dict[str, Any], told: str) -> None:
    names = zip(("middleware", "encoder", "decoder"), ("middleware", "encoders", "decoders"), parts, strict=True)
    old = {part: {"_target_": f"lightning_internvl.{folder}.{name}"} for part, folder, name in names}
    config = old | {
        "pipeline": ["transplant"],
        "stages": {"transplant": {"module": {"_target_": "lightning_internvl.stages.TransplantStage"}}},
    }
    with pytest.raises(ValueError, match=told):
        with_new_part(config, {"encoder": INHERITED, "decoder": INHERITED} | given, old, {})


def test_the_stage_comes_first() -> None:
    config = {"pipeline": ["words", "transplant"], "stages": {"words": {}, "transplant": {}}}
    config["stages"]["transplant"] = {"module": {"_target_": "lightning_internvl.stages.TransplantStage"}}
    with pytest.raises(ValueError, match="pipeline: transplant replaces a part of init_from, and comes first and once"):
        with_new_part(config, {"encoder": INHERITED, "decoder": INHERITED}, {}, {})
