"""BLIP-2 stage 1: features, similarities, the three losses and their gradients, plain and with several captions a picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from golden import Fixture
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import blip2_lavis
from lightning_internvl.middleware.text_streams import TextStream
from lightning_internvl.stages.generative import itc_features, match_both, similarity, three_losses

SYSTEM = "BLIP-2 stage 1 (Q-Former)"
RUNS = ("pretrain", "coco")
# Drawn at random by the original, and given to ours.
ECHOES = frozenset(f"{run}.neg_{kind}_index" for run in RUNS for kind in ("image", "text"))


def knows(fixture: Fixture) -> bool:
    return blip2_lavis.LAYOUT.recognises(fixture.config, {})


def run(fixture: Fixture) -> dict[str, Tensor]:
    found = {}
    for name in RUNS:
        if f"{name}.loss" in fixture.outputs:
            found |= {f"{name}.{key}": value for key, value in _run(fixture, name).items()}
    return found


def _run(fixture: Fixture, name: str) -> dict[str, Tensor]:
    model, inputs, config = load_pretrained(fixture.folder), fixture.inputs, fixture.config
    visual, ids, mask = inputs["image_features"], inputs["text_ids"], inputs["text_mask"]
    image_ids = inputs["image_id"] if name == "coco" else None
    if image_ids is not None:  # rows of a picture show what its first row shows
        visual = visual[(image_ids[:, None] == image_ids).int().argmax(dim=1)]
    written = torch.cat([torch.full_like(ids[:, :1], config["bos_token_id"]), ids[:, 1:]], dim=1)
    labels = written.masked_fill(written == config["pad_token_id"], -100)
    itc, itg = TextStream("itc", ids, mask), TextStream("itg", written, mask)
    wrong = (fixture.outputs[f"{name}.neg_{kind}_index"] for kind in ("image", "text"))
    shown, itm, match = match_both(visual, TextStream("itm", ids, mask), *wrong)
    reads = model.middleware.stream_states(shown, [itm]) + model.middleware.stream_states(model.encoder(visual)[0], [itc, itg])
    losses = three_losses(model, reads, itc, match, labels, image_ids_B=image_ids)
    total = sum(losses.values())
    total.backward()
    with torch.no_grad():
        features = itc_features(model, reads[1], itc)
        found = {
            "loss": total.detach(),
            "loss_itc": losses["itc"].detach(),
            "loss_itm": losses["itm"].detach(),
            "loss_lm": losses["itg"].detach(),
            "sim_i2t": similarity(model, *features),
            "image_feats": F.normalize(features[0], dim=-1),
            "text_feat": F.normalize(features[1], dim=-1),
            "itm_logits": model.objectives["itm"].logits(reads[0][0]),
            "lm_logits": model.middleware.head(reads[2][1]),
        }
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"grad.{name}": gradient for name, gradient in blip2_lavis.LAYOUT.official_tensors(config, gradients).items()}
