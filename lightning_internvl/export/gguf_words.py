"""The tokenizer of an exported folder as the metadata of a GGUF file.

As llama.cpp's converters write it (conversion/base.py `get_vocab_base`, `_set_vocab_llama_hf`); what
splits texts before they are merged, which they know by the ids of a text, is known here by what the
file says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_internvl.files import read_json

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = "ByteLevel"  # with the pattern of GPT-2
# What splits texts, piece by piece, by its name in llama.cpp (`llama_vocab::impl::load`).
SPLITS: Mapping[tuple[str, ...], str] = {
    (_WORDS.format(r"\p{N}"),): "qwen2",
    (_WORDS.format(r"\p{N}{1,3}"),): "llama-bpe",
    ("Digits", _BYTES): "smollm",
    (_BYTES,): "gpt-2",
}
UNKNOWN_SPLIT = "llama.cpp has no name for how this tokenizer splits texts: `default` stands there, and it may split others"
# llama.cpp asks for merges: where a tokenizer has none, that of two bytes 0, which stand in no text.
NO_MERGES = ["\u0100 \u0100"]
Token = tuple[str, float, int]  # text, score, type


def write_words(writer: Any, folder: Path, rows: int) -> list[str]:
    """Write tokens, merges, special tokens and the chat template.

    Args:
        rows: of the table of words, each of which needs a token.

    Returns:
        what llama.cpp does otherwise than the tokenizer

    Raises:
        ValueError: for a tokenizer that llama.cpp does not have, or with more tokens than rows.
    """
    import gguf

    tokenizer = read_json(folder / "tokenizer.json")
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ValueError(f"a GGUF file cannot have a tokenizer of kind {model['type']}; BPE, of bytes or SentencePiece, can")
    pieces, notes = bool(model.get("byte_fallback")), []
    tokens = list(_tokens(tokenizer, rows, pieces))
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    split = "default" if pieces else SPLITS.get(tuple(_splits(tokenizer.get("pre_tokenizer"))))
    writer.add_tokenizer_pre(split or "default")
    writer.add_token_list([text for text, _, _ in tokens])
    if pieces:
        writer.add_token_scores([score for _, score, _ in tokens])
        writer.add_add_space_prefix(_begins_with_space(tokenizer))
    writer.add_token_types([kind for _, _, kind in tokens])
    special = gguf.SpecialVocab(folder, load_merges=not pieces, n_vocab=rows)
    special.merges = special.merges or ([] if pieces else NO_MERGES)
    special.add_to_gguf(writer, quiet=True)
    ends = read_json(folder / "generation_config.json", {}).get("eos_token_id")
    own = special.special_token_ids.get("eos")
    if others := [end for end in (ends if isinstance(ends, list) else [ends]) if end not in (None, own)]:
        writer.add_eot_token_id(others[0])  # what ends an answer beside the end of a text
    if split is None:
        notes.append(UNKNOWN_SPLIT)
    return notes


def _tokens(tokenizer: Mapping[str, Any], rows: int, pieces: bool) -> Iterator[Token]:
    """A token for each row. Of SentencePiece, whose merges are found by scores, the score is the
    place of the merge that makes the token."""
    from gguf import TokenType

    model = tokenizer["model"]
    vocabulary = {number: text for text, number in model["vocab"].items()}
    added = {entry["id"]: entry for entry in tokenizer["added_tokens"]}
    if (last := max([*vocabulary, *added])) >= rows:
        raise ValueError(f"the tokenizer has {last + 1} tokens and the language model {rows} rows; a GGUF file has one each")
    places: dict[str, int] = {}
    for place, pair in enumerate(model["merges"] if pieces else ()):
        places.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ")), place)
    for number in range(rows):
        if (entry := added.get(number)) is not None:
            kind = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
            kind = TokenType.UNKNOWN if entry["content"] == model.get("unk_token") else kind
            yield entry["content"], -1000.0, kind
        elif number not in vocabulary:
            yield f"[PAD{number}]", -1000.0, TokenType.UNUSED
        else:
            text = vocabulary[number]
            is_byte = pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", text)
            yield text, -float(places.get(text, len(places) + number)), TokenType.BYTE if is_byte else TokenType.NORMAL


def _splits(node: Mapping[str, Any] | None) -> Iterator[str]:
    """What splits texts: patterns, and the names of what has none."""
    if node is None:
        return
    if node["type"] == "Sequence":
        for inner in node["pretokenizers"]:
            yield from _splits(inner)
    elif node["type"] == "Split":
        yield node["pattern"].get("Regex") or json.dumps(node["pattern"])
    elif node["type"] != _BYTES or node.get("use_regex", True):
        yield node["type"]


def _begins_with_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    text = json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")])
    scheme = re.search(r'"prepend_scheme": "(\w+)"', text)
    return '"Prepend"' in text or (scheme is not None and scheme[1] != "never")
