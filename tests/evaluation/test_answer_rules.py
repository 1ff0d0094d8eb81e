"""How answers are judged, against values that the official programs gave.

They were VQA's vqaEval.py (GT-Vision-Lab/VQA a013f00), POPE's evaluate.py (AoiDragon/POPE 08d957b), MME's calculation.py, and
pycocoevalcap 1.2 with its Java tokenizer.
"""

from __future__ import annotations

import hashlib
import json

import pytest
from test_cider import CANDIDATES, REFERENCES, tokenize

from lightning_internvl.evaluation.metrics.bleu import bleu
from lightning_internvl.evaluation.metrics.ptb_tokenizer import words_of
from lightning_internvl.evaluation.metrics.vqa_accuracy import CONTRACTIONS, accuracy
from lightning_internvl.evaluation.mme import meaning
from lightning_internvl.evaluation.pope import says_no
from lightning_internvl.evaluation.refer import first_box

ALL_YES = ["yes"] * 10


@pytest.mark.parametrize(
    ("answer", "people", "official"),
    [
        ("Yes", ALL_YES, 0),  # where all agree nothing is put into a common form, not even the case
        ("yes", ALL_YES, 100),
        ("two", ["2"] * 2 + ["two"] * 3 + ["3"] * 5, 100),
        ("The red.", ["red"] * 4 + ["dark red"] * 6, 100),
        ("dont know", ["don't know"] + ["no"] * 9, 30),
        ("1,000", ["1000"] * 2 + ["100"] * 8, 60),
        ("t-shirt", ["t shirt"] * 3 + ["shirt"] * 7, 90),
        ("a dog, cat", ["dog cat"] * 3 + ["dog and cat"] * 7, 90),
        ("3.5", ["3.5"] * 6 + ["35"] * 4, 100),
        ("u.s.a.", ["usa"] * 3 + ["america"] * 7, 90),
        ("none", ["0"] * 5 + ["1"] * 5, 100),
        ("\nblue\t", ["blue"] * 9 + ["navy"], 100),
        ("she'd've", ["she'dve"] * 3 + ["no"] * 7, 90),
        ("what?", ["what"] + ["that"] * 9, 30),
        ("", ["a"] * 4 + ["b"] * 6, 100),
    ],
)
def test_vqa_accuracy(answer: str, people: list[str], official: float) -> None:
    assert round(100 * accuracy(answer, people), 2) == official


def test_contractions_are_the_official_ones() -> None:
    table = json.dumps(sorted(CONTRACTIONS.items())).encode()
    assert (len(CONTRACTIONS), hashlib.sha256(table).hexdigest()[:16]) == (114, "853d25c89947b7f6")


@pytest.mark.parametrize(
    ("answer", "no"),
    [
        ("No", True),
        ("no.", True),
        ("Yes. No", False),
        ("NO", False),
        ("There is not, I think", True),
        ("no\n", False),
        ("", False),
    ],
)
def test_what_pope_takes_for_no(answer: str, no: bool) -> None:
    assert says_no(answer) == no


@pytest.mark.parametrize(
    ("answer", "meant"),
    [("Yes, it is", "yes"), ("NO", "no"), ("know", "no"), ("ok yes", "other"), ("", "other"), ("not", "no"), (" yes", "yes")],
)
def test_what_mme_takes_for_yes_and_no(answer: str, meant: str) -> None:
    assert meaning(answer) == meant


@pytest.mark.parametrize(
    ("text", "official"),
    [
        ("A man's dog isn't here, can't you see?", "a man 's dog is n't here ca n't you see"),
        ('a t-shirt that says "I ♥ NY"', "a t-shirt that says i ♥ ny"),
        ("2 people at 10:30 a.m. in the U.S.A.", "2 people at 10:30 a.m. in the u.s.a."),
        ("and/or black/white", "and/or black/white"),
        ("they are gonna eat, we cannot", "they are gon na eat we can not"),
        ("it's 3.5 miles -- I'd say... maybe", "it 's 3.5 miles i 'd say maybe"),
        ("the cats' toys (two of them) [ok]", "the cats toys -lrb- two of them -rrb- -lsb- ok -rsb-"),
        ("a 50% off sale for $5.99", "a 50 % off sale for $ 5.99"),
        ("mr. smith on st. james ave.", "mr. smith on st. james ave."),
        ("a woman w/ dog & cat @ park #1", "a woman w / dog & cat @ park # 1"),
        ("'quoted' words", "quoted words"),
        ("don’t – won’t", "do n't wo n't"),
        ("a sign reading “STOP”.", "a sign reading stop"),
        ("hello!! what??", "hello !! what ??"),
        ("1920's style in the 1990s", "1920 's style in the 1990s"),
        ("100,000 people in a 7-eleven", "100,000 people in a 7-eleven"),
        ("a 1/2 cup; e-mail: foo@bar.com", "a 1/2 cup e-mail foo@bar.com"),
    ],
)
def test_words_of_captions(text: str, official: str) -> None:
    assert " ".join(words_of(text)) == official


def test_bleu() -> None:
    scores = bleu([tokenize(text) for text in CANDIDATES], [[tokenize(text) for text in texts] for texts in REFERENCES])
    assert scores == pytest.approx([0.6896551723900118, 0.5872202194923453, 0.5166788264250992, 0.4010198002723809], rel=1e-12)


@pytest.mark.parametrize(
    ("text", "scale", "box"),
    [
        ("<box>(100,200),(300,400)</box>", 1000, (0.1, 0.2, 0.3, 0.4)),
        ("<ref>the cat</ref><box>[[100, 200, 300, 400]]</box>", 1000, (0.1, 0.2, 0.3, 0.4)),
        ("it is at [0.1, 0.2, 0.3, 0.4] or (1,2),(3,4)", 1000, (0.1, 0.2, 0.3, 0.4)),
        ("(0,0),(999,999)", 999, (0, 0, 1, 1)),
        ("<box>(100,200),(300</box>", 1000, None),
        ("nowhere", 1000, None),
    ],
)
def test_boxes_in_answers(text: str, scale: float, box: tuple[float, ...] | None) -> None:
    assert first_box(text, scale) == (None if box is None else pytest.approx(box))
