"""LLaVA, LLaVA-NeXT and LLaVA-OneVision in the layouts of transformers: logits, loss, image features, gradients and greedy
tokens."""

from __future__ import annotations

import json

import torch
from golden import Fixture
from safetensors.torch import load_file
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import llava_native, llava_next, llava_onevision

SYSTEM = "LLaVA of transformers (Llava, LlavaNext and LlavaOnevisionForConditionalGeneration)"
LAYOUTS = llava_native.LAYOUT, llava_next.LAYOUT, llava_onevision.LAYOUT
ECHOES: frozenset[str] = frozenset()


def knows(fixture: Fixture) -> bool:
    return any(layout.recognises(fixture.config, {}) for layout in LAYOUTS)


def run(fixture: Fixture) -> dict[str, Tensor]:
    model, inputs = load_pretrained(fixture.folder), fixture.inputs
    output = model(**inputs)
    output.loss.backward()
    # Logits of padding depend on the attention kernel; the reference is only good, and only compared, where the mask is 1.
    hidden = ~inputs["attention_mask"].bool()[..., None]
    pixels, more = inputs["pixel_values"], {name: inputs[name] for name in ("image_sizes",) if name in inputs}
    if hasattr(model.middleware, "as_squares"):
        pixels, more = model.middleware.as_squares(pixels, more)
    with torch.no_grad():
        features = model.visual_tokens(pixels, **more).flatten(0, -2)
    layout = next(layout for layout in LAYOUTS if layout.recognises(fixture.config, {}))
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    found = {f"grad.{name}": g for name, g in layout.official_tensors(model.config, gradients).items()}
    found |= {"logits": torch.where(hidden, fixture.outputs["logits"], output.logits.detach())}
    found |= {"loss": output.loss.detach(), "image_features": features}
    for case in json.loads((fixture.folder / "fixture.json").read_text()).get("cases", {}).values():
        prompt = load_file(fixture.folder / case["inputs"])
        new = model.generate(**prompt, **case["kwargs"])
        found |= {"greedy_new_ids": new, "greedy_ids": torch.cat([prompt["input_ids"], new], dim=1)}
    return found
