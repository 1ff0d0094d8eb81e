"""Tokenizers that come with code of their own are read without it, with the ids of the libraries that the code calls."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import regex
from tokenizer_files import CODE, MARKS, PLAIN, ranks_folder, sentencepiece_folder
from transformers import AutoTokenizer

from lightning_internvl.data.files.published_tokenizers import QWEN_PATTERN
from lightning_internvl.data.tokenizer import hf_tokenizer, saved_tokenizer, token_id

TEXTS = (
    "what is the cat? 7 dogs.", " two  spaces ", "a\nb\n\nc\t d", "中文 你好 🙂 é ﬁ ＡＢＣ", "x", "", "   ", "<box>3,4</box>",
    "[U_1]user\nwhat is it?[U_2]\n[U_1]bot\n", "user\nit's THEY'LL 2024\r\n  \n",
)  # fmt: skip
KINDS = {
    "usual": {},
    "as InternLM2's": PLAIN,
    "with marks": MARKS,
    "as XComposer 2's": PLAIN | MARKS,
    "unigram": {"model_type": "unigram", "vocab_size": 310},
}


@pytest.mark.parametrize("kind", KINDS)
def test_sentencepiece_with_added_tokens(kind: str, tmp_path: Path) -> None:
    pieces = sentencepiece_folder(tmp_path / "published", **KINDS[kind])
    size = pieces.get_piece_size()
    tokenizer = saved_tokenizer(str(tmp_path / "published"))
    tokenizer.save_pretrained(tmp_path / "saved")
    for found in (tokenizer, saved_tokenizer(str(tmp_path / "saved"))):
        for text in TEXTS:
            ids = pieces.encode(text)
            assert found.encode(text, add_special_tokens=False) == ids
            # each text between added tokens is one for sentencepiece
            assert found.encode(f"<|im_start|>{text}<|im_end|>{text}") == [1, size, *ids, size + 1, *ids]
            assert found.decode(ids) == pieces.decode(ids)
        assert (len(found), found.bos_token_id, found.eos_token_id, found.pad_token_id) == (size + 3, 1, 2, 2)
        assert token_id(found, "<IMG_CONTEXT>") == size + 2
        assert found.model_max_length == 8192
    if kind == "with marks":
        assert token_id(tokenizer, "[U_2]") == pieces.piece_to_id("[U_2]")


def test_an_added_token_in_the_place_of_a_piece_and_the_older_files(tmp_path: Path) -> None:
    pieces = sentencepiece_folder(tmp_path / "published", **PLAIN, **MARKS)
    size, place = pieces.get_piece_size(), pieces.piece_to_id("[U_1]")
    config = {"auto_map": {"AutoTokenizer": [CODE, None]}, "add_bos_token": False}
    (tmp_path / "published" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "published" / "added_tokens.json").write_text(json.dumps({"<|im_end|>": place, "<img>": size}))
    (tmp_path / "published" / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<img>"}}))
    found = saved_tokenizer(str(tmp_path / "published"))
    assert found.encode("it<|im_end|>is<img>") == [*pieces.encode("it"), place, *pieces.encode("is"), size]
    assert (found.bos_token, found.pad_token, found.convert_ids_to_tokens(place)) == ("<s>", "<img>", "<|im_end|>")


def tiktoken_ids(ranks: dict[bytes, int], text: str) -> list[int]:
    """What tiktoken does: of each word the neighbours of the lowest rank become one, until none has a rank."""
    ids = []
    for word in regex.findall(QWEN_PATTERN, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while joined := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]:
            _, i = min(joined)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_a_llama_tokenizer_without_a_space_before_texts(tmp_path: Path) -> None:
    pieces = sentencepiece_folder(tmp_path / "published", **PLAIN)
    file = tmp_path / "published" / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}
    config |= {"eos_token": "<|im_end|>", "pad_token": "<nowhere>"}
    del config["auto_map"]
    file.write_text(json.dumps(config))
    found = saved_tokenizer(str(tmp_path / "published"))
    assert [found.encode(text) for text in TEXTS] == [pieces.encode(text) for text in TEXTS]
    assert (found.eos_token_id, found.pad_token, len(found)) == (len(pieces) + 1, None, len(pieces) + 3)


def test_of_a_hub_id_its_files_are_fetched_and_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = sentencepiece_folder(tmp_path / "published")
    asked = []

    def fetched(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        return str(tmp_path / "published")

    def refused(*args: Any, **options: Any) -> None:
        raise ValueError("contains custom code")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refused)
    assert saved_tokenizer("owner/name").encode("what is it") == [1, *pieces.encode("what is it")]
    assert asked == [("owner/name", ["*.json", "*.model", "*.tiktoken"])]
    (tmp_path / "published" / "tokenizer.json").write_text("{}")  # which the library reads, or says why not
    with pytest.raises(ValueError, match="contains custom code"):
        saved_tokenizer("owner/name")


def test_qwen_vl_from_its_ranks(tmp_path: Path) -> None:
    ranks = ranks_folder(tmp_path / "published")
    tokenizer, first = saved_tokenizer(str(tmp_path / "published")), len(ranks)
    tokenizer.save_pretrained(tmp_path / "saved")
    for found in (tokenizer, saved_tokenizer(str(tmp_path / "saved"))):
        for text in [*(text for text in TEXTS if "box" not in text), "what is the cat in 2024", "你好 then"]:
            ids = tiktoken_ids(ranks, text)
            assert found.encode(text) == ids
            assert found.encode(f"<|im_start|>{text}<|im_end|>") == [first + 1, *ids, first + 2]
            assert found.decode(ids) == text
        # official `tokenization_qwen.py`: 208 special tokens, then those of Qwen-VL
        names = {
            "<|endoftext|>": 0,
            "<|extra_204|>": 207,
            "<ref>": 208,
            "<box>": 210,
            "<img>": 214,
            "</img>": 215,
            "<imgpad>": 216,
        }
        assert {name: token_id(found, name) - first for name in names} == names
        assert (len(found), found.eos_token, found.pad_token, found.bos_token) == (first + 217, *["<|endoftext|>"] * 2, None)
        assert found.decode([first + 214, first + 210, 51, first + 211], skip_special_tokens=True) == "<box>3</box>"
    (tmp_path / "published" / "config.json").write_text(json.dumps({"model_type": "qwen"}))
    blind = hf_tokenizer(str(tmp_path / "published"))  # Qwen alone, with what a new picture needs behind
    assert (len(saved_tokenizer(str(tmp_path / "published"))), token_id(blind, "<img>") >= first + 208) == (first + 208, True)


@pytest.mark.parametrize(
    ("file", "held", "problem"),
    [
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", r"tokenizer\.model is a pointer of Git LFS"),
        ("tokenizer.model", b"", r"tokenizer\.model is no SentencePiece model: it holds no pieces \(0 bytes\)"),
        ("tokenizer.model", b"<html>", r"tokenizer\.model is no SentencePiece model"),
        ("qwen.tiktoken", b"IQ== 0\n!! 1", r"qwen\.tiktoken holds no ranks of tiktoken"),
        ("qwen.tiktoken", b"version https://git-lfs.github.com/spec/v1\n", r"qwen\.tiktoken is a pointer of Git LFS"),
        ("vocab.json", b"{}", r"lacks tokenizer\.model, the file of its InternLM2Tokenizer"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(file: str, held: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(held)
    name = "InternLM2Tokenizer" if file == "vocab.json" else "LlamaTokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(ValueError, match=problem):
        saved_tokenizer(str(tmp_path))
