"""DeepSeek-VL in the layout of transformers, with SigLIP alone and with SAM: logits, loss, features, gradients, greedy tokens."""

from __future__ import annotations

import json

import torch
from golden import Fixture
from safetensors.torch import load_file
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import deepseek_vl_hf

SYSTEM = "DeepSeek-VL of transformers (DeepseekVLForConditionalGeneration, DeepseekVLHybridForConditionalGeneration)"
ECHOES: frozenset[str] = frozenset()
PICTURES = ("pixel_values", "high_res_pixel_values")


def knows(fixture: Fixture) -> bool:
    return deepseek_vl_hf.LAYOUT.recognises(fixture.config, {})


def run(fixture: Fixture) -> dict[str, Tensor]:
    model, inputs = load_pretrained(fixture.folder), fixture.inputs
    output = model(**inputs)
    output.loss.backward()
    # Logits of padding depend on the attention kernel; the reference is only good, and only compared, where the mask is 1.
    hidden = ~inputs["attention_mask"].bool()[..., None]
    logits = torch.where(hidden, fixture.outputs["logits"], output.logits.detach())
    with torch.no_grad():
        features = model.visual_tokens(**{name: inputs[name] for name in PICTURES if name in inputs}).flatten(0, 1)
    named = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    gradients = deepseek_vl_hf.LAYOUT.official_tensors(model.config, named)
    found = {"logits": logits, "loss": output.loss.detach(), "image_features": features}
    found |= {f"grad.{name}": gradient for name, gradient in gradients.items()}
    for case in json.loads((fixture.folder / "fixture.json").read_text()).get("cases", {}).values():
        prompt = load_file(fixture.folder / case["inputs"])
        new = model.generate(**prompt, **case["kwargs"])
        found |= {"greedy_new_ids": new, "greedy_ids": torch.cat([prompt["input_ids"], new], dim=1)}
    return found
