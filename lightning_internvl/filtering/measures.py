"""What can be told of a pair without a model: sizes, lengths, scripts, digests."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
import unicodedata
from collections import Counter
from typing import Any

import numpy as np
from PIL import Image

Row = dict[str, Any]  # the scores of one pair, as they are written
# A picture is compared at 32 x 32, by the 8 lowest frequencies in each direction
SIDE, KEPT = 32, 8
TOLD_LANGUAGE = "told_language"  # of a row: that of the caption, as its record or source says
# Letters of languages that are written without spaces: each is a word. Chinese and Japanese; Thai,
# Lao, Tibetan, Burmese, Khmer
UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
ALIASES = {"cjk": "han", "hiragana": "kana", "katakana": "kana", "fullwidth": "latin"}
# Letters that say about as much as three of an alphabet: Chinese, Japanese, Korean
DENSE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")
READ = 10_000  # characters of a caption whose script and words are looked at
INSTALL = "pip install -r requirements-language.txt"
SURE = 0.5  # probability from which on a guessed language counts
JAPANESE = 0.1  # share of kana among Chinese characters from which on a text is Japanese


def measure_pair(image: np.ndarray, caption: str, size: tuple[int, int], language: bool = False) -> Row:
    """The scores of a picture (H, W, 3) uint8 and its caption.

    Args:
        size: width and height of the picture as its file says; it may have been decoded at less.
        language: whether the caption's language is guessed, which takes a package of its own.
    """
    width, height = size
    row: Row = {
        "width": width,
        "height": height,
        "side": min(width, height),
        "aspect": round(max(width, height) / min(width, height), 4),
        "characters": len(caption) + 2 * len(DENSE.findall(caption)),
        "words": len(WORD.findall(caption[:READ])),
        "scripts": script_shares(caption[:READ]),
        "picture": f"{picture_hash(image):016x}",
        "caption": f"{caption_hash(caption):016x}",
    }
    if language:
        name, probability = language_identifier().classify(caption[:READ])
        row |= {"language": name, "language_probability": round(float(probability), 4)}
    return row


def language_of(row: Row) -> str:
    """What a caption is written in: as its record or source says, as it was guessed where that is
    sure, or else the script of most of its letters; kana, where Chinese characters stand among
    them."""
    if told := row.get(TOLD_LANGUAGE):
        return str(told)
    if row.get("language") and row.get("language_probability", 1.0) >= SURE:
        return str(row["language"])
    shares = row.get("scripts", {})
    script = next(iter(shares), "")
    return "kana" if script == "han" and shares.get("kana", 0.0) >= JAPANESE else script


def script_shares(text: str) -> dict[str, float]:
    """Shares of a text's letters by script, the largest first."""
    counts = Counter(script for script in map(_script, text) if script)
    largest_first = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    return {script: round(count / counts.total(), 4) for script, count in largest_first}


@functools.lru_cache(maxsize=2**16)
def _script(character: str) -> str | None:
    """The script of a letter; None of anything else."""
    if not character.isalpha():
        return None
    first = unicodedata.name(character, "UNKNOWN").split()[0].lower()
    return ALIASES.get(first, first)


def caption_hash(caption: str) -> int:
    """A number of 64 bits, the same whatever a caption's case, spaces and punctuation."""
    words = unicodedata.normalize("NFKC", caption).casefold()
    return int.from_bytes(hashlib.blake2b(" ".join(re.findall(r"\w+", words)).encode(), digest_size=8).digest())


@functools.cache
def _cosines() -> np.ndarray:
    """The lowest frequencies of a discrete cosine transform, (KEPT, SIDE); whole numbers, so that
    every machine agrees."""
    place, frequency = np.arange(SIDE), np.arange(KEPT)[:, None]
    return np.rint(4096 * np.cos((2 * place + 1) * frequency * np.pi / (2 * SIDE))).astype(np.int64)


def picture_hash(image: np.ndarray) -> int:
    """A number of 64 bits in which alike pictures differ by few: which of the lowest frequencies of
    its brightness lie above their median (the "perceptual hash" of Zauner, 2010, with DC as one of
    its bits)."""
    small = Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    found = (_cosines() @ np.asarray(small, dtype=np.int64) @ _cosines().T).ravel()
    above = 2 * found > np.sort(found)[KEPT * KEPT // 2 - 1 :][:2].sum()
    return int.from_bytes(np.packbits(above).tobytes())


def can_guess_languages() -> bool:
    """Whether the package that guesses languages is there."""
    return importlib.util.find_spec("py3langid") is not None


@functools.cache
def language_identifier() -> Any:
    """What guesses languages. Raises ValueError without its package."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ValueError(f"rules.language needs the package py3langid:  {INSTALL}") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
