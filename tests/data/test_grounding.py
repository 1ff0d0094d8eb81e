"""Boxes in text, out and in."""

from __future__ import annotations

import pytest

from lightning_internvl.data.grounding import Grounded, box_of, box_text, grounded_text, parse
from lightning_internvl.data.scenes import language as say
from lightning_internvl.data.scenes.generator import Scenes
from lightning_internvl.data.scenes.grounding import SceneGrounding, SceneTexts

BOX = (0.12, 0.048, 0.51, 1.0)


def test_exact_text_and_back() -> None:
    text = grounded_text("the cat", [BOX, (0.0, 0.0, 1.0, 0.5)])
    assert text == "<ref>the cat</ref><box>(120,48),(510,1000)</box><box>(0,0),(1000,500)</box>"
    assert parse(text, "s") == [Grounded("the cat", (BOX, (0.0, 0.0, 1.0, 0.5)))]
    assert box_of(box_text(BOX)) == BOX
    assert box_of("top-left " + box_text(BOX)) == BOX
    assert box_of("top-left <box>(1,2),(3,4)") is None
    assert box_text((0.0, 0.51, 0.4921875, 1.0), step=50) == "<box>(0,500),(500,1000)</box>"


def test_boxes_go_with_the_phrase_right_before_them() -> None:
    text = f"{grounded_text('a dog', [BOX])} beside <ref>a hat</ref> and {box_text(BOX)}, or {box_text(BOX)}{box_text(BOX)}"
    assert parse(text, "s") == [
        Grounded("a dog", (BOX,)),
        Grounded("a hat", ()),
        Grounded(None, (BOX,)),
        Grounded(None, (BOX, BOX)),
    ]
    assert parse("no boxes at all", "s") == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<box>(0,0),(1001,5)</box>", r"sample s/7: the box <box>\(0,0\),\(1001,5\)</box> lies outside its picture"),
        ("<box>(9,0),(5,5)</box>", "sample s/7: the corners of the box .* are swapped"),
        ("<box>(0,0),(5)</box>", "sample s/7: <box> without its other half"),
        ("<ref>a cat<box>(0,0),(5,5)</box>", "sample s/7: <ref> without"),
        ("<box>(0,0),(5,5)", "sample s/7: <box> without"),
    ],
)
def test_what_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse(text, "s/7")


def test_scenes_tell_where_things_are() -> None:
    data, scenes = SceneGrounding(seed=0, split="train", image_size=48), Scenes(0, "train", 48)
    for number in range(30):
        sample, scene = data[number], scenes.scene(number)
        where, what, all_of_it = (m["content"] for m in sample["conversation"][1::2])
        boxes = {box_of(say.box_text(placed.box)) for placed in scene.objects}
        (asked,) = parse(where, "s")
        assert set(asked.boxes) <= boxes
        (shown,) = parse(sample["conversation"][2]["content"], "s")
        assert shown.boxes[0] in boxes
        assert what.split()[0] in ("a", "an")
        found = parse(all_of_it, "s")
        assert [len(one.boxes) for one in found] == list(scene.counts.values())
        assert {box for one in found for box in one.boxes} == boxes
        assert sample["images"][0].shape == (48, 48, 3)


def test_texts_without_pictures() -> None:
    data = SceneTexts(seed=0, split="train", length=20)
    assert len(data) == 20
    turned = set()
    for number in range(20):
        sample = data[number]
        asked, answer = (m["content"] for m in sample["conversation"])
        assert sample["images"] == []
        assert asked.isascii() != answer.isascii()
        turned.add(asked.isascii())
    assert turned == {True, False}
