"""LLaVA in the layout of its own code: features, the merged sequence in all its variants, logits, loss and gradients."""

from __future__ import annotations

from dataclasses import replace

import torch
from golden import Fixture
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import llava
from lightning_internvl.model.placeholders import Expanded
from lightning_internvl.model.vlm import VLM

SYSTEM = "LLaVA v1 and v1.5 (own layout)"
ECHOES: frozenset[str] = frozenset()


def knows(fixture: Fixture) -> bool:
    return llava.LAYOUT.recognises(fixture.config, {})


def run(fixture: Fixture) -> dict[str, Tensor]:
    model, inputs = load_pretrained(fixture.folder), fixture.inputs
    model.encoder.requires_grad_(False)  # the original runs the tower without a graph
    output = model(**inputs)
    output.loss.backward()
    # What stands in the padding of a row is arbitrary in the original.
    padding = ~model.expand(**inputs).attention_mask.bool()[..., None]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {f"grad.{name}": g for name, g in llava.LAYOUT.official_tensors(model.config, gradients).items()}
    found |= {"logits": torch.where(padding, fixture.outputs["logits"], output.logits.detach()), "loss": output.loss.detach()}
    with torch.no_grad():
        return found | _features(model, inputs["pixel_values"]) | _merged(model, inputs, fixture.config["truncated_max_length"])


def _features(model: VLM, pixels: Tensor) -> dict[str, Tensor]:
    (states,) = model.encoder(pixels, layers=model.middleware.layers)
    return {"vit_features": states[:, model.middleware.skipped :], "image_features": model.visual_tokens(pixels)}


def _merged(model: VLM, inputs: dict[str, Tensor], longest: int) -> dict[str, Tensor]:
    rows = model.expand(**inputs)
    embeds = model.embed(rows.input_ids, rows.pixel_values)
    found = _named("merged", rows) | {"merged.inputs_embeds": embeds}
    placeholders = model.image_placeholders
    model.image_placeholders = replace(placeholders, max_length=longest)
    found |= _named("truncated", model.expand(**inputs)) | {"truncated.inputs_embeds": embeds[:, :longest]}
    model.image_placeholders = replace(placeholders, side="left")
    rows = model.expand(**inputs)
    found |= _named("left", rows) | {"left.inputs_embeds": model.embed(rows.input_ids, rows.pixel_values)}
    return found


def _named(variant: str, rows: Expanded) -> dict[str, Tensor]:
    mask = rows.attention_mask
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0) * mask
    return {f"{variant}.attention_mask": mask, f"{variant}.labels": rows.labels, f"{variant}.position_ids": positions}
