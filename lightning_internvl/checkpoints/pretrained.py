"""Models from and to folders that the original libraries read."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

from lightning_internvl.checkpoints.adapters import Adapter, adapter_for, layout_of
from lightning_internvl.checkpoints.files import Shape, WeightFiles, listed, write_folder, write_weights
from lightning_internvl.model import VLM

MAX_SHARD_BYTES = 5 * 10**9


def load_pretrained(path: str | Path, *, dtype: torch.dtype | None = None) -> VLM:
    """A model in evaluation mode, from a folder in an official layout, a hand-off folder, or a hub id.

    No code from the checkpoint is run. Tensors are assigned one by one: peak memory is the model and one tensor.

    Args:
        path: an existing folder, else an id of the Hugging Face hub.
        dtype: type of all floating-point parameters; None keeps the types of the file.

    Raises:
        ValueError: if `path` is neither, if no layout is known for its config, or if tensors are missing, unexpected or
            of another shape.
    """
    folder = Path(path) if Path(path).is_dir() else _downloaded(str(path))
    if (folder / "manifest.json").is_file():
        from lightning_internvl.checkpoints.handoff import load_model

        model = load_model(folder)
        return (model if dtype is None else model.to(dtype)).eval()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds neither config.json (an official layout) nor manifest.json (a hand-off)")
    config = json.loads((folder / "config.json").read_text())
    adapter, files = adapter_for(config), WeightFiles(folder)
    with torch.device("meta"):
        model = adapter.build(config, set(files.shapes))
    names = _matched(model, adapter, files)
    for official, tensor in files.tensors():
        if official in names:
            _assign(model, names[official], tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor)
    model.config = config
    return model.eval()


def save_pretrained(model: VLM, path: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `config.json` and safetensors under the official names, complete or not at all.

    Raises:
        ValueError: if no official layout can hold the model, or if `path` exists and is not an empty folder.
    """
    adapter, config = layout_of(model)
    official = {name: adapter.to_official(name) for name in model.state_dict()}
    if homeless := [name for name, to in official.items() if to is None]:
        raise ValueError(f"the layout {adapter.NAME} has no place for: {listed(homeless)}")
    tensors = {official[name]: tensor for name, tensor in model.state_dict().items()}
    tensors |= {name: tensors[name].reshape(()) for name in adapter.SCALARS}

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_weights(folder, tensors, max_shard_bytes)

    write_folder(Path(path), write)


def _downloaded(hub_id: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=["*.json", "*.bin", "*.pth"]))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise ValueError(f"{hub_id!r} is neither an existing folder nor an id that the Hugging Face hub gave: {error}") from error
    return folder


def _matched(model: VLM, adapter: Adapter, files: WeightFiles) -> dict[str, str]:
    """Official name to ours for every tensor to read, checked against the model before any of them is."""
    wanted: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names: dict[str, str] = {}
    unexpected, misshaped = [], []
    for official, shape in files.shapes.items():
        ours = adapter.to_ours(official)
        if any(fnmatchcase(official, pattern) for pattern in adapter.IGNORED):
            continue
        if ours not in wanted:
            unexpected.append(f"{official} {shape}")
            continue
        names[official] = ours
        shape = shape or (1,) if official in adapter.SCALARS else shape
        if shape != wanted[ours]:
            misshaped.append(f"{official} is {shape}, the config says {wanted[ours]}")
    missing = [f"{adapter.to_official(ours) or ours} {wanted[ours]}" for ours in wanted.keys() - set(names.values())]
    problems = {"missing": sorted(missing), "unexpected": unexpected, "of another shape": misshaped}
    if any(problems.values()):
        lines = [f"  {len(found)} {what}: {listed(found)}" for what, found in problems.items() if found]
        raise ValueError("\n".join([f"the weights in {files.folder} do not fit {adapter.NAME}:", *lines]))
    return names


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer of the meta device."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    placed = getattr(module, leaf)
    tensor = tensor.reshape(placed.shape)
    if isinstance(placed, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=placed.requires_grad)
    setattr(module, leaf, tensor)
