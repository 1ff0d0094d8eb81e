"""CLIP in the layout of transformers, and towers of CLIP or SigLIP alone: embeddings, logits, loss and gradients."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from golden import Fixture
from safetensors.torch import load_file
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import clip, clip_siglip_vision, layout_of_checkpoint, siglip
from lightning_internvl.model.vlm import VLM

SYSTEM = "CLIP and SigLIP of transformers (whole models, or a tower alone)"
ECHOES: frozenset[str] = frozenset()


def knows(fixture: Fixture) -> bool:
    return any(layout.LAYOUT.recognises(fixture.config, {}) for layout in (clip, siglip, clip_siglip_vision))


def run(fixture: Fixture) -> dict[str, Tensor]:
    model = load_pretrained(fixture.folder)
    find = _tower if model.middleware is None else _pairs
    found = find(model, fixture.inputs)
    for name, case in json.loads((fixture.folder / "fixture.json").read_text()).get("cases", {}).items():
        inputs = load_file(fixture.folder / case["inputs"])
        with torch.no_grad():
            found |= {f"{name}.{key}": value for key, value in find(model, inputs).items()}
    return found


def _tower(model: VLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    (states,) = (state.detach() for state in model.encoder(inputs["pixel_values"]))
    if model.encoder.special_tokens == 0:
        return {"last_hidden_state": states}
    found = {"pooler_output": states[:, 0], "last_hidden_state": states[:, 1:]}
    if model.encoder.post_norm == "cls":  # the CLS token is pooled after the last norm, and stands before it among the rest
        model.encoder.post_norm = "unused"
        found["last_hidden_state"] = model.encoder(inputs["pixel_values"])[0].detach()
    return found


def _pairs(model: VLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    image, text = model.encode_image(inputs["pixel_values"]), model.encode_text(inputs["input_ids"], mask)
    square = len(image) == len(text)
    pixels = inputs["pixel_values"]
    output = model(input_ids=inputs["input_ids"], attention_mask=mask, pixel_values=pixels, return_loss=square)
    found = {
        "image_embeds": F.normalize(image, dim=-1),
        "text_embeds": F.normalize(text, dim=-1),
        "logits_per_image": output.logits_per_image,
        "logits_per_text": output.logits_per_text,
    }
    if square and torch.is_grad_enabled():
        output.loss.backward()
        found["loss"] = output.loss
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        layout = layout_of_checkpoint(model.config, {})
        found |= {f"grad.{name}": g for name, g in layout.official_tensors(model.config, gradients).items()}
    return {name: tensor.detach() for name, tensor in found.items()}
