"""LLaVA in the layout of transformers: logits, loss, image features, gradients and greedy tokens."""

from __future__ import annotations

import json

import torch
from golden import Fixture
from safetensors.torch import load_file
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import llava_native

SYSTEM = "LLaVA of transformers (LlavaForConditionalGeneration)"
ECHOES: frozenset[str] = frozenset()


def knows(fixture: Fixture) -> bool:
    return llava_native.LAYOUT.recognises(fixture.config, {})


def run(fixture: Fixture) -> dict[str, Tensor]:
    model, inputs = load_pretrained(fixture.folder), fixture.inputs
    output = model(**inputs)
    output.loss.backward()
    # Logits of padding depend on the attention kernel; the reference is only good, and only compared, where the mask is 1.
    hidden = ~inputs["attention_mask"].bool()[..., None]
    with torch.no_grad():
        features = model.visual_tokens(inputs["pixel_values"]).flatten(0, 1)
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    found = {f"grad.{name}": g for name, g in llava_native.LAYOUT.official_tensors(model.config, gradients).items()}
    found |= {"logits": torch.where(hidden, fixture.outputs["logits"], output.logits.detach())}
    found |= {"loss": output.loss.detach(), "image_features": features}
    for case in json.loads((fixture.folder / "fixture.json").read_text()).get("cases", {}).values():
        prompt = load_file(fixture.folder / case["inputs"])
        new = model.generate(**prompt, **case["kwargs"])
        found |= {"greedy_new_ids": new, "greedy_ids": torch.cat([prompt["input_ids"], new], dim=1)}
    return found
