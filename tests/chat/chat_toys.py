"""Untrained models of a few numbers that talk, shared by the tests of this folder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import yaml
from runs import ROOT

from lightning_internvl.chat.session import Session
from lightning_internvl.chat.settings import ChatSettings
from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.pairs import PairCollator
from lightning_internvl.data.processors.basic import Squash
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model.vlm import VLM

TOWER = {"image_size": 16, "patch_size": 8, "dim": 16, "depth": 1, "heads": 2, "mlp_dim": 32}
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def picture(seed: int = 0, height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def chat_settings(**changes: Any) -> ChatSettings:
    """The settings of conf/chat.yaml, some of them changed; any free port."""
    return ChatSettings.of(yaml.safe_load((ROOT / "conf/chat.yaml").read_text()) | {"port": 0} | changes)


def talker(template: str = "vicuna", context: int = 256, seed: int = 0) -> tuple[VLM, ChatCollator]:
    """A model that answers and how it reads; 4 tokens a picture."""
    torch.manual_seed(seed)
    tokenizer = toy_tokenizer()
    config = LLAMA | {"max_position_embeddings": context, "initializer_range": 0.6, "eos_token_id": 2, "pad_token_id": 0}
    model = VLM(
        InternViT(**TOWER),
        MLPConnector(encoder_dim=16, decoder_dim=16),
        HFCausalLM(config=config, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    ).eval()
    return model, ChatCollator(tokenizer, load_template(template, ""), Squash(16), 4, 64)


def session(**options: Any) -> Session:
    return Session(*talker(**options))


def comparer() -> tuple[VLM, PairCollator]:
    """A model that compares and writes captions, and how it reads."""
    torch.manual_seed(0)
    tokenizer = toy_tokenizer()
    reader = QLLaMA(
        encoder_dim=16, vocab_size=len(tokenizer), dim=16, depth=2, heads=2, mlp_dim=32, num_queries=2, embed_dim=8, pool_heads=2,
        patches=False,
    )  # fmt: skip
    return VLM(InternViT(**TOWER), reader).eval(), PairCollator(tokenizer, Squash(16))
