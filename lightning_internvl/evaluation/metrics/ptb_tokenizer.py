"""Captions as the COCO evaluation compares them: split into words as the Penn Treebank is, in lower
case, without punctuation.

The COCO tools run a Java program for that, which `pycocoevalcap` brings (`official_words`).
`words_of` follows its rules for what captions hold, without Java; docs/evaluation.md says how well.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

REQUIREMENTS = "requirements-captions.txt"
# Left out after splitting, and no more.
PUNCTUATION = {"'", "''", "`", "``", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
# Written in lower case these are words to the COCO tools, although they mean to leave them out.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SPLIT = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "lemme": "lem me", "gimme": "gim me", "wanna": "wan na"}
_PIECE = re.compile(
    r"""
    (?:https?://|www\.)[^\s,;]+[\w/]
    | (?:[a-z]\.){2,}                                  # u.s. a.m.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|ave|blvd)\.(?!\w)    # abbreviations
    | \d+(?:[.,:/-]\d+)*(?:st|nd|rd|th|s)?(?!-?\w)    # 1,000 3.5 10:30 1/2 2nd 1990s
    | [^\W_]+(?:[-/_.@'&][^\W_]+)*                     # black-and-white and/or don't
    | '(?:s|re|ve|ll|d|m)(?!\w)                        # 1920's
    | \.{2,} | --+ | [!?]{2,} | `` | '' | \S
    """,
    re.VERBOSE,
)
_ENDING = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))$")
_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": " -- ", "—": " -- "})


def words_of(text: str) -> list[str]:
    """The words of a caption."""
    found: list[str] = []
    for piece in _PIECE.findall(text.lower().translate(_QUOTES)):
        found += _SPLIT[piece].split() if piece in _SPLIT else _ENDING.sub(r" \1", piece).split()
    return [_BRACKETS.get(word, word) for word in found if word not in PUNCTUATION and word.strip('"-.')]


def lacking() -> str | None:
    """Why the Java programs of the COCO tools cannot run here, or None."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return f"pycocoevalcap is not installed: pip install -r {REQUIREMENTS}"
    return None if shutil.which("java") else "there is no Java on this machine"


def official_words(texts: Sequence[str]) -> list[list[str]]:
    """The words of captions by the COCO tools' own program.

    It is called here and not through pycocoevalcap's `PTBTokenizer`, which writes into the folder
    where it is installed and gives fewer captions without a word where the program fails.

    Raises:
        ValueError: if it fails.
    """
    jar = tools() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = "\n".join(" ".join(text.split()) for text in texts)
    done = subprocess.run(command, input=lines, capture_output=True, encoding="utf-8", check=False)
    found = [[word for word in line.split() if word not in PUNCTUATION] for line in done.stdout.split("\n")[: len(texts)]]
    if done.returncode or len(found) != len(texts):
        raise ValueError(f"the COCO tools' program split {len(found)} of {len(texts)} captions: {done.stderr[-300:]}")
    return found


@functools.cache
def tools() -> Path:
    """The folder of the COCO tools."""
    import pycocoevalcap

    return Path(pycocoevalcap.__path__[0])
