"""What is no whole model in 16 bits or more is named for what it is, with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_internvl import load_pretrained

FIXTURE = Path(__file__).parents[1] / "fixtures/hf/internvl_native_qwen2"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 1876\n"


def fixture(folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    shutil.copy(FIXTURE / "config.json", folder)
    tensors = load_file(FIXTURE / "model.safetensors")
    return tensors, next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))


@pytest.mark.parametrize(
    ("kind", "message"),
    [(torch.int8, r"quantised weights \(.*up_proj.weight is I8\); take"), (torch.float8_e4m3fn, "up_proj.weight is F8_E4M3")],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_weights_of_eight_bits(tmp_path: Path, kind: torch.dtype, message: str, pickled: bool) -> None:
    tensors, name = fixture(tmp_path)
    tensors[name] = tensors[name].to(kind)
    if pickled:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        message = f"up_proj.weight is {str(kind).removeprefix('torch.')}"
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_a_folder_of_bitsandbytes(tmp_path: Path) -> None:
    tensors, name = fixture(tmp_path)
    tensors |= {name: torch.zeros(8, 1, dtype=torch.uint8), f"{name}.absmax": torch.zeros(2)}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"weights that bitsandbytes has quantised \(.*U8\); take the model's release in bfloat16"
    ):
        load_pretrained(tmp_path)


def pointer(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(POINTER) and None


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (pointer("model.safetensors"), "model.safetensors is a pointer of Git LFS, not the file itself; run  git lfs pull"),
        (pointer("pytorch_model.bin"), "pytorch_model.bin is a pointer of Git LFS"),
        (pointer("config.json"), "config.json is a pointer of Git LFS"),
        (lambda folder: (folder / "model.safetensors.incomplete").touch(), "a download that has not finished; get the rest"),
        (lambda folder: (folder / "model-00001-of-00002.safetensors").touch(), "1 numbered files .* without the index"),
    ],
)
def test_what_stands_in_place_of_weights(tmp_path: Path, made: Callable[[Path], None], message: str) -> None:
    shutil.copy(FIXTURE / "config.json", tmp_path)
    made(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)
