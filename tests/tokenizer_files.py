"""Tokenizers as published systems hold them, but small: SentencePiece with added tokens, ranks of tiktoken."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

CODE = "tokenization_internlm2.InternLM2Tokenizer"
CORPUS = [f"what is thing {i} in the picture? it is a cat, a dog and number {i}. 中文 你好 é" for i in range(200)]
PLAIN = {"add_dummy_prefix": False, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
MARKS = {"user_defined_symbols": ["[U_1]", "[U_2]"]}  # XComposer's are such pieces


def sentencepiece_folder(folder: Path, **options: Any) -> SentencePieceProcessor:
    """An InternLM2 tokenizer as published, but small."""
    folder.mkdir()
    sizes = {"vocab_size": 340, "model_type": "bpe", "byte_fallback": True, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    given = {**sizes, "minloglevel": 2, **options}
    SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_prefix=str(folder / "tokenizer"), **given)
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    size = pieces.get_piece_size()
    added = {0: "<unk>", 1: "<s>", 2: "</s>", size: "<|im_start|>", size + 1: "<|im_end|>", size + 2: "<IMG_CONTEXT>"}
    config = {
        "tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": [CODE, None]},
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>", "model_max_length": 8192,
        "added_tokens_decoder": {str(i): {"content": token, "special": True, "normalized": False} for i, token in added.items()},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return pieces


def ranks_folder(folder: Path) -> dict[bytes, int]:
    """A `qwen.tiktoken` of all bytes and some words made of others."""
    words = [b" t", b"he", b" the", b"in", b"wh", b"at", b"what", b" in", b"er", b" c", b" cat", "你".encode(), b"\n\n", b"20"]
    words.insert(11, "你".encode()[:2])
    ranks = {token: number for number, token in enumerate([*(bytes([i]) for i in range(256)), *words])}
    folder.mkdir()
    (folder / "qwen.tiktoken").write_text("\n".join(f"{base64.b64encode(token).decode()} {i}" for token, i in ranks.items()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer", "model_max_length": 8192}))
    return ranks
