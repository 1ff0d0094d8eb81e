"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: logits, loss, visual features, rotary positions, gradients and greedy tokens, for pictures
and videos."""

from __future__ import annotations

import json

import torch
from golden import Fixture
from safetensors.torch import load_file
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import qwen2_5_vl, qwen2_vl, qwen3_vl, qwen3_vl_moe
from lightning_internvl.model.vlm import VLM

SYSTEM = "Qwen2-VL, Qwen2.5-VL and Qwen3-VL (transformers' native classes)"
LAYOUTS = qwen2_vl.LAYOUT, qwen2_5_vl.LAYOUT, qwen3_vl.LAYOUT, qwen3_vl_moe.LAYOUT
ECHOES: frozenset[str] = frozenset()


def knows(fixture: Fixture) -> bool:
    return any(layout.recognises(fixture.config, {}) for layout in LAYOUTS)


def run(fixture: Fixture) -> dict[str, Tensor]:
    model, inputs = load_pretrained(fixture.folder), fixture.inputs
    output = model(**inputs)
    output.loss.backward()
    seen = inputs["attention_mask"].bool()
    # What stands at padding depends on the attention kernel; the reference is only good, and only compared, where the mask is 1.
    logits = torch.where(seen[..., None], output.logits.detach(), fixture.outputs["logits"])
    layout = next(layout for layout in LAYOUTS if layout.recognises(fixture.config, {}))
    gradients = layout.official_tensors(model.config, {name: _gradient(p) for name, p in model.named_parameters()})
    found = {"logits": logits, "loss": output.loss.detach()}
    found |= _features(model, inputs) | _positions(model, inputs)
    found |= {f"grad.{name}": gradient for name, gradient in gradients.items()}
    for case in json.loads((fixture.folder / "fixture.json").read_text()).get("cases", {}).values():
        prompt = load_file(fixture.folder / case["inputs"])
        new = model.generate(**prompt, **case["kwargs"])
        found |= {"greedy_new_ids": new, "greedy_ids": torch.cat([prompt["input_ids"], new], dim=1)}
    return found


@torch.no_grad()
def _features(model: VLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    kinds = {"image": "pixel_values", "video": "pixel_values_videos"}
    return {
        f"{kind}_features": model.visual_tokens(inputs[pixels], image_grid_thw=inputs[f"{kind}_grid_thw"])
        for kind, pixels in kinds.items()
        if pixels in inputs
    }


def _positions(model: VLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    videos = ids == model.video_token_id
    places = {"visual_places": (ids == model.image_token_id) | videos, "video_places": videos}
    grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if name in inputs}
    positions = model.decoder.positions(mask, **places, **grids)
    deltas = positions.amax(dim=(0, 2)) + 1 - mask.sum(dim=1)
    return {"rope.position_ids": positions, "rope.deltas": deltas[:, None]}


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
