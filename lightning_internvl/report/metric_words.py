"""What metrics are called where people read them, and what each says in one line.

Files, loggers and settings keep the short names. A name that is not listed stays as it is.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MODES = {"c": "mode C", "g": "mode G", "zh": "Chinese", "combinations": "new combinations"}
KINDS = {
    "what": "what stands where",
    "exists": "is there such a thing",
    "count": "how many",
    "colour": "background colour",
    "where": "box of a thing",
}


class Words(NamedTuple):
    """A metric in words."""

    title: str
    about: str


_OF = r"(?P<of>(?:[cg]|zh|combinations)(?:_(?:zh|combinations))*)"  # mode and kind of captions
_PART = r"(?:_(?P<part>.+))?"
_HELD_OUT = r"(?:validation_)?"

# Pattern of a whole name, title, explanation; the first that fits holds. In the texts {k} is the
# number in a name, {nearest} what it means, {of} the mode, {part} the part of a benchmark.
TABLE = (
    (
        rf"(?:{_OF}_)?image_to_text_r(?P<k>\d+)",
        "captions found, R@{k}{of}",
        "Share of held-out pictures whose own caption is {nearest} of all captions.",
    ),
    (
        rf"(?:{_OF}_)?text_to_image_r(?P<k>\d+)",
        "pictures found, R@{k}{of}",
        "Share of held-out captions whose own picture is {nearest} of all pictures.",
    ),
    (
        r"zero_shot_top(?P<k>\d+)",
        "zero-shot naming, top {k}",
        "Share of pictures of one thing whose name is {nearest}; no classifier was trained.",
    ),
    (
        r"probe_top(?P<k>\d+)",
        "naming by a probe, top {k}",
        "Share of pictures of one thing whose name is {nearest}, by a classifier on the tower's features.",
    ),
    (r"(?:\w+_)?mean_per_class", "naming, mean over classes", "Each class's share of right names, averaged over classes."),
    (
        rf"{_HELD_OUT}itm_hard_accuracy",
        "matching, accuracy",
        "Share of right judgements whether a caption belongs to a picture; wrong captions are the most similar of all others.",
    ),
    (
        r"caption_cider",
        "captions, CIDEr",
        "Words in a row that captions share with true ones, rare ones counting more; at most 10.",
    ),
    (r"caption_exact_match", "captions word for word", "Share of captions that equal a true one of their picture."),
    (r"caption_bleu_(?P<k>\d)", "captions, BLEU-{k}", "Share of up to {k} words in a row that a true caption holds too."),
    (
        r"caption_meteor",
        "captions, METEOR",
        "Words that captions share with true ones, also by stem and meaning, and their order.",
    ),
    (r"answers_accuracy", "answers, all", "Share of right answers; chance is the most frequent answer to each kind of question."),
    (
        rf"answers_(?P<kind>{'|'.join(KINDS)})",
        "answers: {kind}",
        "Share of right answers to this kind of question; chance is its most frequent answer.",
    ),
    (rf"{_HELD_OUT}loss", "loss on held-out data", "What training lowers, on data that it does not see."),
    (rf"{_HELD_OUT}token_f1", "answers, shared words", "Words that answers share with true ones (F1), from 0 to 1."),
    (rf"{_HELD_OUT}exact_match", "short answers word for word", "Share of short answers that equal the true one."),
    (
        rf"relaxed_accuracy{_PART}",
        "answers within 5 %{part}",
        "Share of answers that are right or, as numbers, within 5 percent.",
    ),
    (
        rf"anls{_PART}",
        "letters of answers (ANLS){part}",
        "How much of an answer's letters is right; less than half counts as nothing.",
    ),
    (r"accuracy_at_0\.5", "boxes found", "Share of boxes that overlap the true one by at least half."),
    (rf"accuracy{_PART}", "answers, accuracy{part}", "Share of answers that are right by the rules of the benchmark."),
    (r"miou", "regions, mIoU", "Overlap of found and true regions, averaged over classes, from 0 to 1."),
    (r"pixel_accuracy", "right pixels", "Share of pixels that are given their class."),
    (r"mean_accuracy", "right pixels, mean over classes", "Each class's share of right pixels, averaged over classes."),
    (r"grad_norm", "length of the gradient", "How large a change the loss asks for, before it is clipped."),
    (r"lr", "learning rate", "How far a step goes, of what learns fastest."),
    (r"throughput/samples_per_s", "samples a second", "Pictures or conversations that training reads."),
    (r"throughput/tokens_per_s", "tokens a second", "Words and parts of words that training reads, without padding."),
    (r"throughput/padding_share", "padding", "Share of the places of a batch that hold nothing."),
    (r"throughput/mfu", "share of the device's peak (MFU)", "What the model computes of what the device could."),
    (r"throughput/model_tflops_per_s", "TFLOP/s of the model", "What forward and backward passes compute."),
)


def words(name: str) -> str:
    """A logged name as text that can break into lines: "c_image_to_text_r1" as "captions found, R@1
    (mode C)", and what is not listed, "train/odd_thing", as "odd thing"."""
    found = described(name)
    return found.title if found else name.removeprefix("train/").replace("_", " ").replace("/", ", ")


def about(name: str) -> str:
    """What a metric says, in a sentence; empty for a name that is not listed."""
    found = described(name)
    return found.about if found else ""


def described(name: str) -> Words | None:
    """A metric in words; None for a name that is not listed."""
    plain = name.removeprefix("train/")
    for pattern, title, text in TABLE:
        if found := re.fullmatch(pattern, plain):
            return Words(_filled(title, found), _filled(text, found))
    return None


def _filled(text: str, found: re.Match[str]) -> str:
    groups = found.groupdict()
    k, part, kind = groups.get("k") or "", groups.get("part"), groups.get("kind")
    of = [MODES[word] for word in groups["of"].split("_")] if groups.get("of") else []
    return text.format(
        k=k,
        nearest="the nearest" if k == "1" else f"among the {k} nearest",
        of=f" ({', '.join(of)})" if of else "",
        part=f": {part.replace('_', ' ')}" if part else "",
        kind=KINDS[kind] if kind else "",
    )
