"""BLIP-2 and InstructBLIP in the layouts of transformers: logits, losses, features, gradients, greedy tokens, other cases."""

from __future__ import annotations

import json
from typing import Any

import torch
from golden import Fixture
from safetensors.torch import load_file
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import blip2_hf, blip2_itm_hf, instructblip_hf, layout_of_checkpoint
from lightning_internvl.decoders.hf_seq2seq import HFSeq2SeqLM
from lightning_internvl.model.vlm import VLM

SYSTEM = "BLIP-2 and InstructBLIP of transformers"
ECHOES: frozenset[str] = frozenset()
LAYOUTS = (blip2_hf, blip2_itm_hf, instructblip_hf)
# The tower fits its positions to every picture; generation is that of the language model.
OWN_WORDS = {"interpolate_pos_encoding"}


def knows(fixture: Fixture) -> bool:
    return any(layout.LAYOUT.recognises(fixture.config, {}) for layout in LAYOUTS)


def run(fixture: Fixture) -> dict[str, Tensor]:
    model, notes = load_pretrained(fixture.folder), json.loads((fixture.folder / "fixture.json").read_text())
    found = _forward(model, fixture, fixture.inputs, "", notes.get("forward_kwargs", {}))
    if "loss" in found:
        found["loss"].sum().backward()
        gradients = {name: _gradient(p) for name, p in model.named_parameters()}
        layout = layout_of_checkpoint(fixture.config, {})
        found |= {f"grad.{name}": g for name, g in layout.official_tensors(fixture.config, gradients).items()}
    for name, case in notes.get("cases", {}).items():
        inputs, options = load_file(fixture.folder / case["inputs"]), case["kwargs"]
        if case["method"] == "generate":
            found |= _written(model, inputs, options, "" if name == "generate" else f"{name}.")
        else:
            found |= _forward(model, fixture, inputs, f"{name}.", options)
    return {name: value.detach() for name, value in found.items()}


def _forward(model: VLM, fixture: Fixture, inputs: dict[str, Tensor], prefix: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """All outputs of one forward that the fixture may hold."""
    output = model(**inputs, **{k: v for k, v in options.items() if k not in OWN_WORDS})
    if model.decoder is None:
        with torch.no_grad():
            found = {
                "logits_per_image": output.logits_per_image,
                "logits_per_text": output.logits_per_text,
                "image_embeds": model.encode_image(inputs["pixel_values"]),
                "text_embeds": model.encode_text(inputs["input_ids"], inputs["attention_mask"]),
            }
        return {f"{prefix}{name}": value for name, value in found.items()}
    found = {"logits": output.logits.detach()}
    notes = json.loads((fixture.folder / "fixture.json").read_text())
    if mask := notes.get("compare_mask", {}).get(f"{prefix}logits"):
        # Logits of padding depend on the attention kernel; the reference is only good, and only compared, where the mask is 1.
        hidden = ~inputs[mask].bool()[..., None]
        found["logits"] = torch.where(hidden, fixture.outputs[f"{prefix}logits"], found["logits"])
    if output.loss is not None:
        found["loss"] = output.loss
    with torch.no_grad():
        others = {name: value for name, value in inputs.items() if name.startswith("qformer_")}
        found["image_features"] = model.visual_tokens(inputs["pixel_values"], **others).flatten(0, 1)
    return {f"{prefix}{name}": value for name, value in found.items()}


def _written(model: VLM, prompt: dict[str, Tensor], options: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    new = model.generate(**prompt, **{k: v for k, v in options.items() if k not in OWN_WORDS})
    before = prompt["input_ids"]
    if isinstance(model.decoder, HFSeq2SeqLM):  # the original returns the start of the answer, not the prompt
        before = torch.full_like(new[:, :1], model.decoder.lm.config.decoder_start_token_id)
    return {f"{prefix}greedy_new_ids": new, f"{prefix}greedy_ids": torch.cat([before, new], dim=1)}


def _gradient(parameter: Tensor) -> Tensor:
    """Zero for what was not used."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
