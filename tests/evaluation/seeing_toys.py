"""A model with random weights that is judged on features: 17 visual tokens of width 24 from pictures of 16 pixels."""

from __future__ import annotations

from typing import Any

import torch

from lightning_internvl.data.collate.pairs import PairCollator
from lightning_internvl.data.processors.basic import Squash
from lightning_internvl.data.scenes.held_out import HeldOutScenes
from lightning_internvl.data.tokenizer import toy_tokenizer
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITM


def seeing_predictor(seed: int = 0, scenes: int = 12, single: int = 48) -> Predictor:
    """A small InternVL without a decoder, with a matching head and so many held-out scenes and single things.

    Args:
        seed: of its weights.
    """
    torch.manual_seed(seed)
    words = toy_tokenizer()
    encoder = InternViT(image_size=16, patch_size=4, dim=24, depth=2, heads=2, mlp_dim=32, layer_scale=1.0, init_std=0.2)
    qllama = QLLaMA(
        encoder_dim=24, vocab_size=len(words), dim=16, depth=2, heads=2, mlp_dim=24, num_queries=2, embed_dim=8, pool_heads=2,
        init_std=0.2,
    )  # fmt: skip
    model = VLM(encoder, qllama, objectives={"itm": ITM(dim=16)}).eval()
    held_out = HeldOutScenes(seed=0, image_size=16, scenes=scenes, single=single)
    return Predictor(model, held_out, pairs=PairCollator(words, Squash(16)), batch_size=10)


def measured(task: Any, predictor: Predictor, value: float | None) -> dict[str, float]:
    """What a task says of a predictor, whose tower gives one value for every picture unless that is None."""
    tower, see = predictor.model.encoder, predictor.model.encoder.forward

    def blind(*args: Any, **options: Any) -> Any:
        seen = see(*args, **options)
        return [torch.full_like(x, value) for x in seen] if isinstance(seen, list) else torch.full_like(seen, value)

    tower.forward = see if value is None else blind
    try:
        with predictor.evaluating():
            return task(predictor)
    finally:
        tower.forward = see
