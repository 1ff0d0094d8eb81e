"""A model with random weights that is judged on features: 17 visual tokens of width 24 from pictures of 16 pixels."""

from __future__ import annotations

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


def seeing_predictor() -> Predictor:
    """A small InternVL without a decoder, with a matching head and 48 held-out single things."""
    torch.manual_seed(0)
    words = toy_tokenizer()
    encoder = InternViT(image_size=16, patch_size=4, dim=24, depth=2, heads=2, mlp_dim=32, layer_scale=1.0, init_std=0.2)
    qllama = QLLaMA(
        encoder_dim=24, vocab_size=len(words), dim=16, depth=2, heads=2, mlp_dim=24, num_queries=2, embed_dim=8, pool_heads=2,
        init_std=0.2,
    )  # fmt: skip
    model = VLM(encoder, qllama, objectives={"itm": ITM(dim=16)}).eval()
    held_out = HeldOutScenes(seed=0, image_size=16, scenes=12, single=48)
    return Predictor(model, held_out, pairs=PairCollator(words, Squash(16)), batch_size=10)
