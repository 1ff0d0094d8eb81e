"""A model in an official layout, built from its configuration and its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from lightning_internvl.checkpoints.adapters import Adapter, adapter_for
from lightning_internvl.checkpoints.name_rules import RuleMatch, match_rules
from lightning_internvl.checkpoints.weight_files import Shape, WeightFiles, read_config
from lightning_internvl.files import read_json
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.messages import first_of
from lightning_internvl.model.vlm import VLM


def meta_model(place: Path) -> VLM:
    """The model of an official folder without its weights, on the meta device.

    Raises:
        ValueError: if no layout is known for it.
    """
    config, files = read_config(place), WeightFiles(place)
    adapter = adapter_for(config, files.shapes)
    names = {there: adapter.canonical(there) for there in files.shapes}
    with torch.device("meta"):
        model = adapter.build(config, {name: files.shapes[there] for there, name in names.items() if name is not None})
    if model.decoder is not None and model.image_token_id is None:
        model.image_token_id = image_token_id(place)
    return model


def official_model(place: Path, dtype: torch.dtype | None, device: torch.device) -> VLM:
    """The model of an official folder or file, with its weights.

    Args:
        dtype: type of all floating-point parameters; None keeps the types of the file.

    Raises:
        ValueError: if no layout is known for it, or if tensors are missing, unexpected or of another shape.
    """
    config, files = read_config(place), WeightFiles(place)
    adapter = adapter_for(config, files.shapes)
    names = {name: adapter.canonical(name) for name in files.shapes}
    shapes = {name: files.shapes[there] for there, name in names.items() if name is not None}
    with init_empty_weights(include_buffers=False):
        model = adapter.build(config, shapes)
    _tie(model)
    groups = _checked(model, adapter, config, shapes, place)
    waiting: dict[int, dict[str, Tensor]] = {}
    for there, tensor in files.tensors(device, dtype):
        name = names[there]
        if name not in groups:
            continue
        group = groups[name]
        parts = waiting.setdefault(id(group), {})
        parts[name] = tensor
        if len(parts) == len(group.official):
            _assign(model, group.read(waiting.pop(id(group))))
    _tie(model)
    if model.decoder is not None and model.image_token_id is None:
        model.image_token_id = image_token_id(place)
    model.config = config
    return model.to(device)  # buffers, which no file holds


def image_token_id(folder: Path, token: str = "<IMG_CONTEXT>") -> int | None:
    """Id of the placeholder in the tokenizer files of a folder, for layouts whose config does not tell it; None without them."""
    added = read_json(folder / "added_tokens.json", {})
    if token in added:
        return added[token]
    entries = read_json(folder / "tokenizer_config.json", {}).get("added_tokens_decoder", {})
    found = {entry["content"]: int(number) for number, entry in entries.items()}
    found |= {entry["content"]: entry["id"] for entry in read_json(folder / "tokenizer.json", {}).get("added_tokens", [])}
    return found.get(token)


def _checked(
    model: VLM, adapter: Adapter, config: dict[str, Any], shapes: Mapping[str, Shape], place: Path
) -> dict[str, RuleMatch]:
    """The group of every official tensor, after all names and shapes have been found right."""
    wanted = {name: tensor.to("meta") for name, tensor in own_tensors(model).items()}
    groups, homeless = match_rules(adapter.rules(config), wanted)
    if homeless:
        raise ValueError(f"the layout {adapter.NAME} has no place for: {first_of(homeless, 20)}")
    expected = {name: tuple(t.shape) for group in groups for name, t in group.write(wanted).items()}
    problems = {
        "missing": sorted(f"{name} {shape}" for name, shape in expected.items() if name not in shapes),
        "unexpected": [f"{name} {shape}" for name, shape in shapes.items() if name not in expected],
        "of another shape": [
            f"{name} is {shapes[name]}, the config says {shape}"
            for name, shape in expected.items()
            if name in shapes and (shapes[name] or (1,)) != (shape or (1,))
        ],
    }
    if any(problems.values()):
        lines = [f"  {len(found)} {what}: {first_of(found, 20)}" for what, found in problems.items() if found]
        raise ValueError("\n".join([f"the weights in {place} do not fit {adapter.NAME}:", *lines]))
    return {name: group for group in groups for name in group.official}


def _assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of parameters and buffers of the meta device."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        placed = getattr(model.get_submodule(owner), leaf)
        if isinstance(placed, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=placed.requires_grad)
        setattr(model.get_submodule(owner), leaf, tensor)


def _tie(model: VLM) -> None:
    """Let tensors that stand in several places be one again after one of the places was filled."""
    if model.decoder is not None:
        model.decoder.tie()
