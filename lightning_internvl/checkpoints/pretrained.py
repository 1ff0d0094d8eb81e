"""Models from and to folders that the original libraries read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from lightning_internvl.checkpoints.adapters import layout_of_model
from lightning_internvl.checkpoints.load_handoff import load_model
from lightning_internvl.checkpoints.official import official_model
from lightning_internvl.checkpoints.weight_files import write_pickle, write_weights
from lightning_internvl.choices import GIVEN_PARTS
from lightning_internvl.config.consent import giving_parts
from lightning_internvl.files import atomic_folder
from lightning_internvl.hub import local_folder
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.model.vlm import VLM

MAX_SHARD_BYTES = 5 * 10**9


def load_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
    parts: Mapping[str, str | Path | None] | None = None,
) -> VLM:
    """A model in evaluation mode: of an official layout, a bare .pth, a hand-off or a hub id.

    No code from the checkpoint is run. Tensors are read one by one, each straight to `device` and
    `dtype`: peak memory is the model and the file that is being read.

    Args:
        path: an existing folder or .pth file, else an id of the Hugging Face hub.
        dtype: type of all floating-point parameters; None keeps the types of the file.
        image_size: side in pixels to which the encoder's position table is resized; None keeps it.
        parts: folders or hub ids of an `encoder` or a `decoder` which the files lack and only name,
            as LLaVA's do its tower.

    Raises:
        ValueError: if `path` is none of these, if no layout is known for it, or if tensors are
            missing, unexpected or of another shape. Nothing is returned half loaded.
    """
    if other := parts and parts.keys() - {*GIVEN_PARTS}:
        raise ValueError(f"parts names {min(other)!r}; valid choices: {', '.join(GIVEN_PARTS)}")
    with giving_parts(parts):
        model = _loaded(local_folder(path), dtype, torch.device(device))
    if image_size is not None:
        model.encoder.resize(image_size)
    return model.eval()


def _loaded(place: Path, dtype: torch.dtype | None, device: torch.device) -> VLM:
    if (place / "manifest.json").is_file():
        model = load_model(place)
        return (model if dtype is None else model.to(dtype)).to(device)
    return official_model(place, dtype, device)


def save_pretrained(
    model: VLM,
    path: str | Path,
    *,
    layout: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model for the original library, complete or not at all.

    A folder gets `config.json` and safetensors; a path that ends in .pth becomes one file in the
    layout of the first releases.

    Args:
        layout: a module of `checkpoints.adapters`; None takes the one that transformers loads,
            where there is one, else that from which the model came.

    Raises:
        ValueError: if no official layout can hold the model, or if `path` exists and is not an
            empty folder.
    """
    path = Path(path)
    found, config = layout_of_model(model, layout, single_file=path.suffix == ".pth")
    tensors = found.written_tensors(config, own_tensors(model))
    if path.suffix == ".pth":
        write_pickle(path, tensors)
        return
    with atomic_folder(path) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_weights(folder, tensors, max_shard_bytes)
