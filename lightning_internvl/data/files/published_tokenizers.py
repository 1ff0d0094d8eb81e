"""Tokenizers that their publishers read with code of their own, read from their files alone.

SentencePiece with added tokens (InternLM 1 and 2, XComposer: official `tokenization_internlm2.py`)
and the ranks of tiktoken (Qwen, Qwen-VL: `tokenization_qwen.py`). Each becomes a tokenizer of the
library `tokenizers` that gives the same ids and is saved as `tokenizer.json`.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor, TikTokenConverter, generate_merges
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from lightning_internvl.files import read_json

CONFIG, PIECES = "tokenizer_config.json", "tokenizer.model"
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")
# What a class reads, by how its name starts.
FILES = {"InternLM": PIECES, "QWen": "qwen.tiktoken"}
# What those classes add where their configuration does not say.
INTERNLM = {
    "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>",
    "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
}  # fmt: skip
TOKEN_NAMES = ("unk_token", "bos_token", "eos_token", "pad_token")
PASSED_ON = (
    "add_bos_token", "add_eos_token", "clean_up_tokenization_spaces", "model_max_length",
    "padding_side", "chat_template",
)  # fmt: skip
# Kinds of pieces in a SentencePiece model
NORMAL, UNKNOWN, USER_DEFINED = 1, 2, 4
UNIGRAM, BPE = 1, 2

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_END = "<|endoftext|>"
QWEN_SPECIAL = (QWEN_END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
# Behind them in Qwen-VL; what it says of places is part of an answer.
QWEN_PLACES = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
QWEN_PICTURE = ("<img>", "</img>", "<imgpad>")


def published_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a folder that only code of its publisher reads otherwise; None for one that
    transformers reads.

    Raises:
        ValueError: for a file that is damaged or of another kind than its name says.
    """
    if (folder / "tokenizer.json").is_file():
        return None
    if ranks := sorted(folder.glob("*.tiktoken")):
        return qwen_tokenizer(ranks[0])
    name = _class_name(read_json(folder / CONFIG, {}))
    for start, file in FILES.items():
        if name.startswith(start) and not (folder / file).is_file():
            raise ValueError(f"{folder} lacks {file}, the file of its {name}")
    if (folder / PIECES).is_file():
        # what is no such model, transformers reports as something else
        spec = sentencepiece_model(folder / PIECES).normalizer_spec
        # LLaMA's class puts a space before a text where the model has none (Yi's of InternVL2-40B)
        wrong = name in LLAMA and not spec.add_dummy_prefix
        return sentencepiece_tokenizer(folder) if wrong or (name and tokenizer_class_from_name(name) is None) else None
    return None


def _class_name(config: dict[str, Any]) -> str:
    """The class of a tokenizer's configuration, "" without one."""
    own = config.get("auto_map") or {}
    code = own.get("AutoTokenizer") if isinstance(own, dict) else own
    named = code[0] if isinstance(code, list) and code else code
    return config.get("tokenizer_class") or str(named or "").rpartition(".")[2]


def sentencepiece_model(file: Path) -> Any:
    """The message that a SentencePiece model consists of.

    Raises:
        ValueError: if the file is none.
    """
    held = _bytes_of(file)
    try:
        proto = SentencePieceExtractor(str(file)).proto
    except DecodeError as error:
        raise ValueError(f"{file} is no SentencePiece model: {error}") from error
    if not proto.pieces:
        raise ValueError(f"{file} is no SentencePiece model: it holds no pieces ({len(held)} bytes)")
    return proto


def _bytes_of(file: Path) -> bytes:
    held = file.read_bytes()
    if held.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`")
    return held


def sentencepiece_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """`tokenizer.model` with the added tokens of the JSON files beside it: their ids are kept, the
    text between them is read as the library sentencepiece reads it.

    Raises:
        ValueError: if the file is no SentencePiece model.
    """
    proto = sentencepiece_model(folder / PIECES)
    config = INTERNLM | read_json(folder / "special_tokens_map.json", {}) | read_json(folder / CONFIG, {})
    added = _added_tokens(folder, config)
    pieces = {i: piece.piece for i, piece in enumerate(proto.pieces)} | {i: token.content for i, token in added.items()}
    tokenizer = _model(proto, pieces, set(added))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_tokens([added[i] for i in sorted(added)])
    names: dict[str, Any] = {name: _content(config[name]) for name in TOKEN_NAMES if config.get(name)}
    names = {name: token for name, token in names.items() if tokenizer.token_to_id(token) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{name: config[name] for name in PASSED_ON if name in config}, **names
    )


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Added tokens by their ids: of `added_tokens_decoder`, else of `added_tokens.json`, the files
    that transformers wrote before."""
    written = {int(i): dict(token) for i, token in (config.get("added_tokens_decoder") or {}).items()}
    older = {i: {"content": token, "special": True} for token, i in read_json(folder / "added_tokens.json", {}).items()}
    fields = ("single_word", "lstrip", "rstrip", "special")
    found = older | written
    return {
        i: AddedToken(token["content"], normalized=False, **{name: token[name] for name in fields if name in token})
        for i, token in found.items()
    }


def _model(proto: Any, pieces: dict[int, str], added: set[int]) -> Tokenizer:
    """The model, and the pieces that are never split or merged."""
    options = {"byte_fallback": proto.trainer_spec.byte_fallback}
    kinds = {i: piece.type for i, piece in enumerate(proto.pieces)}
    unknown = next((i for i, kind in kinds.items() if kind == UNKNOWN), 0)
    whole = sorted((pieces[i] for i, kind in kinds.items() if kind == USER_DEFINED and i not in added), key=len, reverse=True)
    if proto.trainer_spec.model_type == UNIGRAM:
        scores = [(pieces[i], proto.pieces[i].score) for i in kinds]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=unknown, **options))
        tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in whole])
    elif proto.trainer_spec.model_type == BPE:
        vocabulary = {piece: i for i, piece in pieces.items()}
        merged = {i for i, kind in kinds.items() if kind == NORMAL and i not in added}
        scored = {pieces[i]: proto.pieces[i].score for i in merged}
        merges = generate_merges(scored, scored) if scored else []
        # A piece of the user's is one token wherever it stands; then it is a word of its own here.
        options |= {"unk_token": pieces[unknown], "fuse_unk": True, "ignore_merges": bool(whole)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
        if whole:
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, whole))), "isolated")
    else:
        raise ValueError(f"{PIECES} is a SentencePiece model of words or characters; known are BPE and unigram models")
    return tokenizer


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


class _Ranks(TikTokenConverter):
    """The converter of transformers without the library tiktoken, which it would ask for."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        rows = [line.split() for line in _bytes_of(Path(tiktoken_url)).splitlines() if line]
        try:
            return {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
        except ValueError as error:
            raise ValueError(f"{tiktoken_url} holds no ranks of tiktoken (base64 and a number a line): {error}") from error


def qwen_tokenizer(ranks: Path) -> PreTrainedTokenizerFast:
    """A file `qwen.tiktoken` with the pattern and special tokens of Qwen, behind them those of
    Qwen-VL unless the configuration beside it is that of a model without a tower."""
    tokenizer = _Ranks(vocab_file=str(ranks), pattern=QWEN_PATTERN).converted()
    tokenizer.normalizer = normalizers.NFC()
    config = read_json(ranks.parent / "config.json", {})
    sees = "visual" in config or not config
    special = [*QWEN_SPECIAL, *(QWEN_PLACES + QWEN_PICTURE if sees else ())]
    tokenizer.add_tokens([AddedToken(token, special=token not in QWEN_PLACES, normalized=False) for token in special])
    limit = read_json(ranks.parent / CONFIG, {}).get("model_max_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=QWEN_END,
        pad_token=QWEN_END,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **({"model_max_length": limit} if limit else {}),
    )
