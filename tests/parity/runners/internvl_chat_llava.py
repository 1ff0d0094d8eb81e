"""InternVL-Chat 1.0 with QLLaMA: tower, queries, the two MLPs, the merged sequence, logits, loss and gradients."""

from __future__ import annotations

import torch
from golden import Fixture
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import internvl_chat_llava

SYSTEM = "InternVL-Chat with QLLaMA (two_mlp)"
ECHOES: frozenset[str] = frozenset()


def knows(fixture: Fixture) -> bool:
    return internvl_chat_llava.LAYOUT.recognises(fixture.config, {})


def run(fixture: Fixture) -> dict[str, Tensor]:
    model, inputs = load_pretrained(fixture.folder), fixture.inputs
    rows = model.expand(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], inputs["pixel_values"])
    with torch.no_grad():
        last, patches = model.encoder(inputs["pixel_values"], layers=(-1, fixture.config["mm_vision_select_layer"]))
        found = {
            "vit_last_hidden": last,
            "vit_layer_m4_patches": patches[:, 1:],
            "qllama_queries": model.middleware.query(last),
            "visual_tokens": model.visual_tokens(inputs["pixel_values"]),
            "merged.inputs_embeds": model.embed(rows.input_ids, rows.pixel_values),
            "merged.attention_mask": rows.attention_mask,
            "merged.labels": rows.labels,
        }
    model.encoder.requires_grad_(False)  # the original runs the tower, QLLaMA included, without a graph
    model.middleware.qllama.requires_grad_(False)
    model.middleware.query_tokens.requires_grad_(False)
    output = model(**inputs)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"grad.{name}": g for name, g in internvl_chat_llava.LAYOUT.official_tensors(model.config, gradients).items()}
    return found | {"logits": output.logits.detach(), "loss": output.loss.detach()}
