"""The retrieval fine-tune of InternVL-G: both contrasts with soft targets, matching, and the gradients of their sum."""

from __future__ import annotations

import torch
from golden import Fixture
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import internvl_14b
from lightning_internvl.middleware.qllama import TextStream
from lightning_internvl.stages.generative import itc_features
from lightning_internvl.stages.retrieval import retrieval_losses

SYSTEM = "InternVL-G, retrieval fine-tune"
ECHOES = frozenset[str]()


def knows(fixture: Fixture) -> bool:
    return internvl_14b.LAYOUT.recognises(fixture.config, {}) and all(name.startswith("retrieval.") for name in fixture.outputs)


def run(fixture: Fixture) -> dict[str, Tensor]:
    model, inputs = load_pretrained(fixture.folder), fixture.inputs
    # With soft targets the original does not read this field of its config.
    model.objectives["itc"].label_smoothing = 0.0
    texts = {"itm wrong": "negative", "itm right": "positive", "itc": "summarize"}
    streams = [TextStream(task[:3], inputs[f"{name}_ids"], inputs[f"{name}_mask"]) for task, name in texts.items()]
    visual = model.encoder(inputs["pixel_values"])[0]
    reads = model.middleware.stream_states(visual, streams)
    losses = retrieval_losses(model, visual, reads, streams[2], inputs["image_ids"])
    sum(losses.values()).backward()
    with torch.no_grad():
        itc, itm = losses["itc"].detach() + losses["itc_tower"].detach(), losses["itm"].detach()
        queried, _ = itc_features(model, reads[2], streams[2])
        found = {
            "loss": (itc + itm).reshape(1),
            "loss_itc": itc.reshape(1),
            "loss_itm": itm.reshape(1),
            "itm_logits": torch.cat([model.objectives["itm"].logits(queries) for queries, _ in reads[:2]]),
            "query_embeds": queried,
            "backbone_embeds": model.middleware.clip_projector(visual),
            "text_embeds": model.encode_text(inputs["summarize_ids"], inputs["summarize_mask"]),
        }
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, gradient in internvl_14b.LAYOUT.official_tensors(fixture.config, gradients).items():
        found[f"grad.{name}"] = gradient if gradient.ndim else gradient.reshape(1)  # the logit scale is a scalar there
    return {f"retrieval.{name}": value for name, value in found.items()}
