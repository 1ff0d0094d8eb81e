"""Two answers to one question: their rows share the question and its pictures."""

from __future__ import annotations

import hashlib
import json

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.collate.base import Prepared, Sample
from lightning_internvl.data.templates import Message

COPIES = "copies"  # of a batch: so many rows, one behind all others, have each picture


def with_rejected(sample: Sample) -> Sample:
    """A sample with its rejected answer in place of its last one. Raises BadSample where it has
    none."""
    if "rejected" not in sample:
        fault = "it has no chosen and rejected answer, which this stage compares"
        raise BadSample(f"sample {sample['key']}: {fault}; give records with both", "no preference")
    answer: Message = {"role": "assistant", "content": sample["rejected"]}
    return {**sample, "conversation": [*sample["conversation"][:-1], answer]}


def pair_key(prepared: Prepared) -> str:
    """A name for the tokens of both rows and what the encoder sees of their pictures and videos."""
    digest = hashlib.blake2b(json.dumps([prepared["row"], prepared["rejected"]]).encode(), digest_size=16)
    for shown in (*prepared["pictures"], *prepared["videos"]):
        digest.update(f"{shown.shape}".encode())
        digest.update(shown.tobytes())
    return digest.hexdigest()


def longest_row(prepared: Prepared) -> int:
    """Tokens of the longest row of a prepared sample; the answer of an encoder-decoder is one too."""
    return max(map(len, (*prepared["row"], *prepared.get("rejected", ()))))
