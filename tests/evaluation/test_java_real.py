"""The COCO tools' own Java programs, where they and Java are installed."""

from __future__ import annotations

import pytest

from lightning_internvl.evaluation import ptb
from lightning_internvl.evaluation.meteor import meteor

pytestmark = pytest.mark.skipif(ptb.lacking() is not None, reason=str(ptb.lacking()))
SAID = ["A man's hat (red) on a bed.", "Two dogs, black-and-white, don't run!", "the u.s. flag at 10:30", "", 'a "big" 5" disk']


def test_captions_are_split_as_without_java() -> None:
    assert ptb.official_words(SAID) == [ptb.words_of(text) for text in SAID]


def test_meteor() -> None:
    """The score of METEOR 1.5: one caption is its reference, the other lacks an article and has another form of a verb."""
    found = meteor(["a dog runs in the snow", "a dog running in snow"], [["a dog runs in the snow"]] * 2)
    assert found == pytest.approx(0.524062, abs=1e-6)
