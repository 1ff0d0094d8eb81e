"""InternVL-C and InternVL-G: embeddings, captions, and the three losses of stage 2 with their gradients."""

from __future__ import annotations

import torch
from golden import Fixture
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import internvl_14b
from lightning_internvl.middleware.qllama import TextStream
from lightning_internvl.model.vlm import VLM
from lightning_internvl.stages.generative import three_losses

SYSTEM = "InternVL-G (InternViT + QLLaMA), stage 2"
ECHOES = frozenset({"generate.prompt_ids"})

# Lengths, special tokens included, at which the original takes a text for empty.
EMPTY_CAPTION, EMPTY_SUMMARY = 2, 5


def knows(fixture: Fixture) -> bool:
    outputs = ("vision_last_hidden", "c.", "g.", "generate.", "stage2.")
    return internvl_14b.LAYOUT.recognises(fixture.config, {}) and all(name.startswith(outputs) for name in fixture.outputs)


def run(fixture: Fixture) -> dict[str, Tensor]:
    model = load_pretrained(fixture.folder)
    return _embeddings(model, fixture.inputs) | _captions(model, fixture) | _losses(model, fixture.inputs)


@torch.no_grad()
def _embeddings(model: VLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    pixels, ids, mask = (inputs[name] for name in ("pixel_values", "summarize_ids", "summarize_mask"))
    visual = model.encoder(pixels)[0]
    found = {"vision_last_hidden": visual, "g.query_outputs": model.middleware.query(visual)}
    for mode in ("c", "g"):
        found[f"{mode}.image_embeds"] = model.encode_image(pixels, mode=mode)
        found[f"{mode}.text_embeds"] = model.encode_text(ids, mask)
        output = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, mode=mode)
        found[f"{mode}.logits_per_image"] = output.logits_per_image
    return found


def _captions(model: VLM, fixture: Fixture) -> dict[str, Tensor]:
    if "generate.greedy_ids" not in fixture.outputs:
        return {}
    prompt, special = fixture.outputs["generate.prompt_ids"], fixture.config["qllama_config"]
    tokens = fixture.outputs["generate.greedy_ids"].shape[1] - 1
    new = model.generate(
        pixel_values=fixture.inputs["pixel_values"],
        input_ids=prompt,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        eos_id=special.get("eos_token_id", 2),
    )
    # Generation from embeddings puts a placeholder in front of the new tokens in the original library.
    first = torch.full_like(new[:, :1], special.get("bos_token_id", 1))
    return {"generate.greedy_ids": torch.cat([first, new], dim=1)}


def _losses(model: VLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    batch = len(inputs["pixel_values"])
    wrong = batch - batch // 2
    ids, mask = (torch.cat([inputs[f"negative_{x}"][:wrong], inputs[f"positive_{x}"][wrong:]]) for x in ("ids", "mask"))
    match = (torch.arange(batch) >= wrong).long().masked_fill(mask.sum(dim=1) == EMPTY_CAPTION, -100)
    streams = [
        TextStream("itm", ids, mask),
        TextStream("itc", inputs["summarize_ids"], inputs["summarize_mask"]),
        TextStream("itg", inputs["caption_ids"], inputs["caption_mask"]),
    ]
    reads = model.middleware.stream_states(model.encoder(inputs["pixel_values"])[0], streams)
    ignored = inputs["summarize_mask"].sum(dim=1) == EMPTY_SUMMARY
    losses = three_losses(model, reads, streams[1], match, inputs["caption_labels"], ignored)
    total = sum(losses.values())
    total.backward()
    found = {f"stage2.loss_{name}": loss.detach().reshape(1) for name, loss in losses.items()}
    gradients = internvl_14b.LAYOUT.official_tensors(
        model.config, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    )
    return found | {f"stage2.grad.{n}": g for n, g in gradients.items()} | {"stage2.loss": total.detach().reshape(1)}
