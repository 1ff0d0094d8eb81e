"""CLIP under OpenAI's names, as OpenAI and open_clip publish it: folders, bare files, training checkpoints, TorchScript."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import clip_openai
from lightning_internvl.checkpoints.families.open_clip import NOTES
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.model.vlm import VLM

SIZES = {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_act": "gelu"}
SAYS = {"model_cfg": {"embed_dim": 20, "vision_cfg": {"head_width": 12}, "text_cfg": {"heads": 2}}}
INPUTS = {"input_ids": torch.tensor([[3, 7, 49], [5, 2, 49]]), "attention_mask": torch.ones(2, 3)}
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> CLIPModel:
    torch.manual_seed(0)
    text = SIZES | {"hidden_size": 32, "vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 49}
    vision = SIZES | {"hidden_size": 24, "image_size": 12, "patch_size": 6}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model


@pytest.fixture(scope="module")
def state(theirs: CLIPModel, tmp_path_factory: pytest.TempPathFactory) -> State:
    """The tensors as open_clip writes them: without OpenAI's notes."""
    folder = tmp_path_factory.mktemp("native")
    theirs.save_pretrained(folder)
    tensors = clip_openai.LAYOUT.official_tensors({}, own_tensors(load_pretrained(folder)))
    return {name: x.detach().clone().contiguous() for name, x in tensors.items() if name not in NOTES}


def same(ours: VLM, theirs: CLIPModel) -> None:
    inputs = INPUTS | {"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))}
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits_per_image, theirs(**inputs).logits_per_image, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("text", ["", "text."])
def test_a_folder_says_heads_and_activation(tmp_path: Path, theirs: CLIPModel, state: State, weights: str, text: str) -> None:
    """With the text tower at the top or, as newer models have it, in a module of its own."""
    inner = ("positional_embedding", "text_projection", "token_embedding", "transformer", "ln_final")
    there = {text + name if name.startswith(inner) else name: tensor for name, tensor in state.items()}
    save_file(there, tmp_path / weights) if weights.endswith("safetensors") else torch.save(there, tmp_path / weights)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(SAYS))
    same(load_pretrained(tmp_path), theirs)
    same(load_pretrained(tmp_path / weights), theirs)


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ("vision_cfg", {"timm_model_name": "vit_base"}),
        ("vision_cfg", {"pool_type": "avg"}),
        ("text_cfg", {"hf_model_name": "roberta"}),
    ],
)
def test_what_the_towers_do_not_have_is_refused(tmp_path: Path, state: State, section: str, fields: dict[str, Any]) -> None:
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {section: fields}}))
    with pytest.raises(ValueError, match=rf"{section}.{next(iter(fields))}=.* is not supported"):
        load_pretrained(tmp_path)


def test_a_bare_file_asks_for_what_it_does_not_tell(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"does not tell its activation .* and heads; put the open_clip_config.json"):
        load_pretrained(tmp_path / "clip.pt")


@pytest.mark.parametrize(("name", "act"), [("2024-model_ViT-B-32-quickgelu-lr_1", "quick_gelu"), ("run", "gelu")])
def test_a_training_checkpoint_of_open_clip(tmp_path: Path, state: State, capsys: Any, name: str, act: str) -> None:
    wrapped = {f"module.{key}": tensor for key, tensor in state.items()}
    torch.save({"epoch": 3, "name": name, "state_dict": wrapped, "optimizer": {"state": {}}}, tmp_path / "epoch_3.pt")
    model = load_pretrained(tmp_path / "epoch_3.pt")
    assert model.encoder.encoder.layers[0].mlp.act == act
    assert torch.equal(model.middleware.text_model.embeddings.token_embedding.weight, state["token_embedding.weight"])
    assert "is a training checkpoint of open_clip" in " ".join(capsys.readouterr().out.split())


class Program(nn.Module):
    """Tensors below their dotted names, as a program has them, with values beside them."""

    def __init__(self, tensors: State) -> None:
        super().__init__()
        self.layers = [1, 2]
        for name, tensor in tensors.items():
            owner: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_buffer(leaf, tensor)

    def forward(self) -> int:
        return self.layers[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_program_of_openai_is_read_and_not_run(tmp_path: Path, state: State) -> None:
    notes = {"input_resolution": torch.tensor(12), "context_length": torch.tensor(12), "vocab_size": torch.tensor(50)}
    halves = {name: x.half() if x.ndim > 1 else x for name, x in state.items()}
    torch.jit.save(torch.jit.script(Program(halves | notes)), tmp_path / "ViT.pt")
    model = load_pretrained(tmp_path / "ViT.pt")
    layer = model.encoder.encoder.layers[0]
    assert (layer.mlp.act, layer.self_attn.heads) == ("quick_gelu", 1)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert layer.mlp.fc1.weight.equal(halves["visual.transformer.resblocks.0.mlp.c_fc.weight"].float())
    model.save_pretrained(tmp_path / "saved.pth")  # with the notes by which it is known again
    assert load_pretrained(tmp_path / "saved.pth").encoder.encoder.layers[0].mlp.act == "quick_gelu"


class Call:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("value", ["call", "torch.load", "storage"])
def test_an_archive_with_more_than_tensors_is_refused_and_not_run(tmp_path: Path, value: str) -> None:
    made = {"call": Call(tmp_path / "made"), "torch.load": torch.load, "storage": torch.ones(1)}[value]
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
        archive.writestr("bad/constants.pkl", pickle.dumps(()))
        archive.writestr("bad/data.pkl", pickle.dumps(made))
    with pytest.raises(ValueError, match=r"bad.pt is refused: it holds more than modules and tensors"):
        load_pretrained(tmp_path / "bad.pt")
    assert not (tmp_path / "made").exists()
