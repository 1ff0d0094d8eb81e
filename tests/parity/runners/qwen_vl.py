"""Qwen-VL: the tower and the resampler at several resolutions; the language model with pictures, alone, and beyond its length."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from golden import Fixture
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import qwen_vl
from lightning_internvl.middleware.resampler import sincos_positions
from lightning_internvl.model.vlm import VLM

SYSTEM = "Qwen-VL (visual part, and language model with pictures)"
ECHOES: frozenset[str] = frozenset()
PREFIX = "transformer.visual."


def knows(fixture: Fixture) -> bool:
    return qwen_vl.LAYOUT.recognises(fixture.config, {})


def run(fixture: Fixture) -> dict[str, Tensor]:
    model = load_pretrained(fixture.folder)
    return visual(fixture, model) if model.decoder is None else language(fixture, model)


def visual(fixture: Fixture, model: VLM) -> dict[str, Tensor]:
    grid = round(model.middleware.num_queries**0.5)
    found = {"sincos_table": sincos_positions(fixture.config["output_dim"], grid)}
    sizes = sorted(int(name.removeprefix("pixel_values_")) for name in fixture.inputs if name.startswith("pixel_values_"))
    for size in sizes:
        first, last = model.encoder(fixture.inputs[f"pixel_values_{size}"], layers=(0, -1))
        found |= {f"ln_pre_{size}": first, f"encoder_last_{size}": last, f"resampler_{size}": model.middleware.resample(last)}
        found[f"tokens_{size}"] = model.middleware([last])
    (found[f"tokens_{sizes[0]}"] * fixture.inputs["grad_probe"]).sum().backward()
    gradients = {f"grad.{name.removeprefix(PREFIX)}": g for name, g in written_gradients(model).items()}
    return {name: tensor.detach() for name, tensor in found.items()} | gradients


def language(fixture: Fixture, model: VLM) -> dict[str, Tensor]:
    inputs, config = fixture.inputs, fixture.config
    ids, mask = with_placeholders(inputs["input_ids"], config["visual"]), inputs["attention_mask"]
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"], "labels": inputs["labels"]}
    seen: list[Tensor] = []
    hook = model.decoder.lm.model.layers[0].register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        output = model(**batch)
        hook.remove()
        alone = inputs["text_only_ids"]
        found = {
            "visual_tokens": model.visual_tokens(inputs["pixel_values"]),
            "inputs_embeds": model.embed(ids, inputs["pixel_values"]),
            "hidden_after_block0": seen[0],
            "logits": output.logits,
            "loss": output.loss,
            "text_only.logits": model(alone, torch.ones_like(alone)).logits,
            "longctx.logits_row0": beyond(fixture, ids, mask),
        }
    for name in ("hidden_after_block0", "logits"):  # of padding only the original's own kernel makes the same
        found[name] = torch.where(mask.bool()[..., None], found[name], fixture.outputs[name])
    loss = model.train()(**batch).loss
    loss.backward()
    gradients = {f"train.grad.{name}": gradient for name, gradient in written_gradients(model).items()}
    return found | gradients | {"train.loss": loss.detach()}


def with_placeholders(ids: Tensor, visual: dict[str, int]) -> Tensor:
    """The original fills a picture's places with the bytes of its path; here each is a placeholder."""
    ids = ids.clone()
    for row, start in (ids == visual["image_start_id"]).nonzero().tolist():
        ids[row, start + 1 : start + 1 + visual["n_queries"]] = visual["image_start_id"] + qwen_vl.PADDING
    return ids


def beyond(fixture: Fixture, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the first row by the same weights under a trained length that is shorter than it."""
    config = fixture.config | {"seq_length": fixture.config["longctx_seq_length"]}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        Path(folder, "model.safetensors").symlink_to((fixture.folder / "model.safetensors").absolute())
        model = load_pretrained(folder)
    pictures = int((ids[0] == fixture.config["visual"]["image_start_id"]).sum())
    logits = model(ids[:1], mask[:1], fixture.inputs["pixel_values"][:pictures]).logits
    return torch.where(mask[:1].bool()[..., None], logits, fixture.outputs["longctx.logits_row0"])


def written_gradients(model: VLM) -> dict[str, Tensor]:
    """Gradients under the official names."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return qwen_vl.LAYOUT.official_tensors(model.config, gradients)
