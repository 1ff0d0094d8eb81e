"""Released files that hold a part: LLaVA without its tower, InternVL-Chat 1.0 without the tower's sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import internvl_chat_llava, llava
from lightning_internvl.config.consent import Untrusted
from lightning_internvl.model.vlm import VLM

FIXTURE = Path(__file__).parents[1] / "fixtures/official/llava_15_mlp"
NAME = "openai/clip-vit-large-patch14-336"
TOWER = "model.vision_tower.vision_tower."


def released(folder: Path, tower: Path, name: str = NAME) -> None:
    """The fixture as LLaVA publishes it, and its CLIP as OpenAI does, with more than the tower."""
    tensors = load_file(FIXTURE / "model.safetensors")
    inner = {there.removeprefix(TOWER): tensors.pop(there) for there in [*tensors] if there.startswith(TOWER)}
    config = json.loads((FIXTURE / "config.json").read_text())
    vision = config.pop("vision_config")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": name}))
    save_file(tensors, folder / "model.safetensors")
    tower.mkdir(parents=True)
    (tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    more = {"text_model.final_layer_norm.bias": torch.ones(2), "logit_scale": torch.ones(())}
    save_file(inner | more, tower / "model.safetensors")


def logits(model: VLM) -> torch.Tensor:
    ids = torch.tensor([[1, -200, 5, 6]])
    pixels = torch.randn(1, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits


@pytest.mark.parametrize("place", ["llava/{}", "llava/clip-vit-large-patch14-336", "{}", "clip-vit-large-patch14-336"])
def test_the_tower_is_taken_from_a_folder_beside(tmp_path: Path, place: str) -> None:
    (tmp_path / "models").mkdir()
    released(tmp_path / "models/llava", tmp_path / "tower")
    shutil.copytree(tmp_path / "tower", tmp_path / "models" / place.format(NAME))
    model = load_pretrained(tmp_path / "models/llava")
    assert logits(model).equal(logits(load_pretrained(FIXTURE)))
    model.save_pretrained(tmp_path / "saved", layout="llava")  # which holds the tower
    assert logits(load_pretrained(tmp_path / "saved")).equal(logits(model))


def test_the_tower_is_taken_from_the_folder_that_the_config_names(tmp_path: Path) -> None:
    released(tmp_path / "llava", tmp_path / "far/clip", str(tmp_path / "far/clip"))
    assert logits(load_pretrained(tmp_path / "llava")).equal(logits(load_pretrained(FIXTURE)))


def laid(tmp_path: Path) -> Path:
    """LLaVA as pickles without their tower, and CLIP's file for a test to lay beside them."""
    folder = tmp_path / "llava"
    released(folder, tmp_path / "tower")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    shutil.copy(FIXTURE / "config.json", folder)
    return folder


def test_the_tower_is_taken_from_a_file_among_those_of_the_model(tmp_path: Path) -> None:
    """CLIP's file under its own name, which a loader would take for the model's, or renamed."""
    folder, clip = laid(tmp_path), load_file(tmp_path / "tower/model.safetensors")
    expected = logits(load_pretrained(FIXTURE))
    torch.save({"irrelevant": torch.ones(1)}, folder / "optimizer.bin")
    (folder / "training_args.bin").write_bytes(b"no state dict")
    shutil.copy(tmp_path / "tower/model.safetensors", folder)
    assert logits(load_pretrained(folder)).equal(expected)
    (folder / "model.safetensors").unlink()
    torch.save({f"{TOWER}{name}": tensor for name, tensor in clip.items()}, folder / "vision_tower.bin")
    assert logits(load_pretrained(folder)).equal(expected)
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), "vision_config": None}))
    with pytest.raises(ValueError, match=r"do not tell the heads of a tower of width 40; write its vision_config"):
        load_pretrained(folder)
    shutil.copy(tmp_path / "tower/model.safetensors", folder)
    with pytest.raises(ValueError, match=r"model.safetensors and vision_tower.bin beside them hold one each; keep one"):
        load_pretrained(folder)


def test_the_tower_is_taken_from_the_folder_that_the_user_gives(tmp_path: Path) -> None:
    released(tmp_path / "llava", tmp_path / "tower")
    model = load_pretrained(tmp_path / "llava", parts={"encoder": tmp_path / "tower"})
    assert logits(model).equal(logits(load_pretrained(FIXTURE)))
    with pytest.raises(ValueError, match=rf"encoder.pretrained={tmp_path}/tower has no effect: .* holds its encoder"):
        load_pretrained(FIXTURE, parts={"encoder": tmp_path / "tower"})
    with pytest.raises(ValueError, match=r"parts names 'tower'; valid choices: encoder, decoder"):
        load_pretrained(tmp_path / "llava", parts={"tower": tmp_path / "tower"})
    with pytest.raises(ValueError, match=r"encoder.pretrained=.*llava_llama holds none under names that are known"):
        load_pretrained(tmp_path / "llava", parts={"encoder": FIXTURE.parents[1] / "hf/llava_llama"})


def test_a_projector_alone_is_put_on_the_language_model_that_the_user_gives(tmp_path: Path) -> None:
    """What LLaVA's pretraining writes: mm_projector.bin and a config, which names its base."""
    released(tmp_path / "llava", tmp_path / "tower")
    tensors, pre, base = load_file(tmp_path / "llava/model.safetensors"), tmp_path / "pre", tmp_path / "base"
    pre.mkdir(), base.mkdir()
    torch.save({name: tensors.pop(name) for name in [*tensors] if "mm_projector" in name}, pre / "mm_projector.bin")
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"all that LLaVA's pretraining has trained, and lacks the config.json"):
        load_pretrained(pre)
    config = json.loads((tmp_path / "llava/config.json").read_text())
    (pre / "config.json").write_text(json.dumps(config | {"_name_or_path": "lmsys/vicuna-7b-v1.5"}))
    with pytest.raises(Untrusted) as found:
        load_pretrained(pre)
    assert "trust=[lmsys/vicuna-7b-v1.5]); give decoder.pretrained=FOLDER_OR_ID" in str(found.value)
    parts = {"encoder": tmp_path / "tower", "decoder": base}
    assert logits(load_pretrained(pre, parts=parts)).equal(logits(load_pretrained(FIXTURE)))


def test_the_weights_of_two_models_in_one_folder_are_named(tmp_path: Path) -> None:
    folder = laid(tmp_path)
    save_file({"model.other.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"the weights of two models, model.safetensors and pytorch_model.bin; keep one"):
        load_pretrained(folder, parts={"encoder": tmp_path / "tower"})


def test_the_same_weights_twice_are_read_once(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE, tmp_path / "both")
    tensors = load_file(FIXTURE / "model.safetensors")
    torch.save(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "both/pytorch_model.bin")
    assert logits(load_pretrained(tmp_path / "both")).equal(logits(load_pretrained(FIXTURE)))


def test_a_tower_that_is_nowhere_is_not_fetched_and_the_advice_works(tmp_path: Path) -> None:
    released(tmp_path / "llava", tmp_path / "tower")
    with pytest.raises(Untrusted, match=rf"holds no tower .*give trust=\[{NAME}\].* or put its folder there as ") as found:
        load_pretrained(tmp_path / "llava")
    shutil.copytree(tmp_path / "tower", str(found.value).rpartition(" as ")[2])
    assert logits(load_pretrained(tmp_path / "llava")).equal(logits(load_pretrained(FIXTURE)))


def test_another_kind_of_tower_is_refused(tmp_path: Path) -> None:
    released(tmp_path / "llava", tmp_path / "tower")
    shutil.copytree(Path(__file__).parents[1] / "fixtures/hf/llava_llama", tmp_path / "llava" / NAME)
    with pytest.raises(ValueError, match=r"holds no tower .* mm_vision_tower='openai/clip.*' holds none"):
        load_pretrained(tmp_path / "llava")


def test_internvl_chat_1_0_as_its_own_code_writes_it(tmp_path: Path) -> None:
    """A name for a tower in the config, InternViT in the files."""
    vision = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 64, "image_size": 28}
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    config = {
        "model_type": "llava",
        "mm_projector_type": "mlp2x_gelu",
        "vision_tower": {"vision_config": vision},
        "text_config": text,
    }
    torch.manual_seed(0)
    ours = internvl_chat_llava.LAYOUT.build(config, {"lm_head.weight": (40, 16)}).eval()
    ours.save_pretrained(tmp_path / "saved", layout="internvl_chat_llava")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    del config["vision_tower"]
    (tmp_path / "saved/config.json").write_text(json.dumps(config | {"mm_vision_tower": "OpenGVLab/InternViT-6B-224px"}))
    again = load_pretrained(tmp_path / "saved")
    pixels = torch.randn(1, 3, 28, 28)
    assert again.encoder(pixels)[0].equal(ours.encoder(pixels)[0])
    assert internvl_chat_llava.LAYOUT.recognises(again.config, {})
    assert not llava.LAYOUT.recognises(again.config, {})
