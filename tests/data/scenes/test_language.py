"""Captions, questions and the tokenizer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from lightning_internvl.data.scenes import language as say
from lightning_internvl.data.scenes.datasets import SceneChats, ScenePairs
from lightning_internvl.data.scenes.generator import Scenes
from lightning_internvl.data.scenes.things import COLOURS, THINGS
from lightning_internvl.data.tokenizer import SPECIAL_TOKENS, toy_tokenizer

SCENES = [Scenes(0, "train").scene(index) for index in range(500)]
TOKENIZER = toy_tokenizer()


@pytest.mark.parametrize("language", say.LANGUAGES)
def test_captions_name_everything(language: str) -> None:
    for number, scene in enumerate(SCENES):
        text = say.caption(scene, np.random.default_rng(number), language)
        assert text in say.references(scene, language)
        assert text == say.caption(scene, np.random.default_rng(number), language)
        assert len(text.split()) <= 16
        colour = COLOURS[scene.background]
        assert (colour.zh if language == "zh" else colour.name) in text
        for thing, count in scene.counts.items():
            assert say.noun_phrase(THINGS[thing], count, language) in text


@pytest.mark.parametrize("language", say.LANGUAGES)
@pytest.mark.parametrize("split", ["train", "scenes", "combinations"])
def test_captions_identify_unique_scenes(split: str, language: str) -> None:
    scenes = Scenes(1, split).unique_scenes(500)
    assert len({text for scene in scenes for text in say.references(scene, language)}) == 500 * 2


def test_phrases() -> None:
    cat, octopus = THINGS[1], THINGS[11]
    assert [say.noun_phrase(octopus, 1), say.noun_phrase(cat, 2)] == ["an octopus", "two cats"]
    assert say.noun_phrase(cat, 2, "zh") == "两只猫"
    assert "a cat on an orange background" in say.class_prompts(cat)
    assert say.box_text((0.0, 0.51, 0.4921875, 1.0)) == "<box>(0,500),(500,1000)</box>"
    with pytest.raises(ValueError, match=r"'fr'.*en"):
        say.references(SCENES[0], "fr")
    with pytest.raises(ValueError, match="turns=99"):
        say.questions(SCENES[0], np.random.default_rng(0), 99)


def test_answers_are_true() -> None:
    kinds, exists, answers = Counter(), Counter(), Counter()
    for number, scene in enumerate(SCENES):
        turns = say.questions(scene, np.random.default_rng(number), 4)
        assert len({turn.question for turn in turns}) == 4
        for turn in turns:
            kinds[turn.kind] += 1
            answers[turn.answer] += 1
            if turn.kind == "what":
                cell = next(i for i, name in enumerate(say.CELLS) if name in turn.question)
                held = [THINGS[placed.thing].name for placed in scene.objects if placed.cell == cell]
                assert turn.answer == (held[0] if held else "nothing")
            elif turn.kind == "count":
                thing = next(i for i, one in enumerate(THINGS) if f" {one.plural} " in turn.question)
                assert turn.answer == say.COUNTS["en"][scene.counts[thing]]
            elif turn.kind == "colour":
                assert turn.answer == COLOURS[scene.background].name
            elif turn.kind == "exists":
                thing = next(i for i, one in enumerate(THINGS) if turn.question.endswith(f" {one.name}?"))
                assert turn.answer == ("yes" if thing in scene.counts else "no")
                exists[turn.answer] += 1
            else:
                thing = next(i for i, one in enumerate(THINGS) if turn.question == f"where is the {one.name}?")
                boxes = [placed.box for placed in scene.objects if placed.thing == thing]
                assert scene.counts[thing] == 1
                assert boxes == [turn.box]
    assert set(kinds) == set(say.QUESTION_SHARES)
    assert 0.4 < exists["yes"] / sum(exists.values()) < 0.6
    assert 0 < answers["nothing"] < 0.15 * kinds["what"]


def test_descriptions_come_last_and_are_true() -> None:
    chats = SceneChats(0, "train", turns=3, caption_share=0.3, layout_share=0.5)
    kinds = Counter()
    for position in range(500):
        scene, turns = chats.scene(position), chats.questions(position)
        assert len(turns) == 3
        assert not {"caption", "layout"} & {turn.kind for turn in turns[:-1]}
        kinds[turns[-1].kind] += 1
        if turns[-1].kind == "layout":
            named = dict(part.split(" ", 1) for part in turns[-1].answer.split(", "))
            held = {say.CELLS[placed.cell]: THINGS[placed.thing].name for placed in scene.objects}
            assert named == {cell: held.get(cell, "nothing") for cell in say.CELLS}
    assert 110 <= kinds["caption"] <= 190
    assert 200 <= kinds["layout"] <= 300
    with pytest.raises(ValueError, match=r"at most 1 together: caption_share=0\.6, layout_share=0\.5"):
        SceneChats(0, "train", caption_share=0.6, layout_share=0.5)


def test_a_further_question_asks_for_a_place_that_no_turn_has_told() -> None:
    chats = SceneChats(0, "train", turns=1, caption_share=0.1, layout_share=0.2, place_share=1.0)
    plain = SceneChats(0, "train", turns=1, caption_share=0.1, layout_share=0.2)
    kinds, firsts = Counter(), Counter()
    for position in range(600):
        scene, turns = chats.scene(position), chats.questions(position)
        asked = [turn for turn in turns if turn.question.startswith("where in") or turn.answer.startswith(say.CELLS)]
        asked = [turn for turn in asked if turn.kind in ("place", "where")]
        assert [turn for turn in turns if turn not in asked] == plain.questions(position)
        if not asked:
            continue
        (place,), (other,) = asked, plain.questions(position)
        assert other.kind not in ("caption", "layout")
        kinds[place.kind] += 1
        firsts[turns[0] is place] += 1
        name = place.question.removeprefix("where is the ").removeprefix("where in the picture is the ").removesuffix("?")
        (placed,) = (one for one in scene.objects if THINGS[one.thing].name == name)
        assert place.answer.split(" ")[0] == say.CELLS[placed.cell]
        assert place.box == (placed.box if place.kind == "where" else None)
        assert name not in other.answer
        assert name not in other.question or turns[0] == other
    assert min(kinds["place"], kinds["where"]) > 50
    assert kinds["place"] > 1.5 * kinds["where"]
    assert min(firsts.values()) > 50
    with pytest.raises(ValueError, match="place_share=2"):
        SceneChats(0, "train", place_share=2)


def test_kinds_of_questions_follow_their_shares() -> None:
    chats = SceneChats(0, "train", turns=2, caption_share=0.0, questions={"exists": 0.75, "count": 0.25})
    kinds = Counter(turn.kind for position in range(500) for turn in chats.questions(position))
    assert set(kinds) == {"exists", "count"}
    assert 600 < kinds["exists"] < 800
    for unclear, turns in (({"which": 1.0}, 1), ({"exists": -1.0}, 1), ({}, 25)):
        with pytest.raises(ValueError, match=r"questions must give shares|gives 0 to 24 questions"):
            SceneChats(0, "train", turns=turns, questions=unclear)
    with pytest.raises(ValueError, match=r"gives 0 to 0 questions of these kinds .*turns=1"):
        SceneChats(0, "train", turns=1, questions={"where": 1.0})  # a scene of pairs has none
    with pytest.raises(ValueError, match=r"gives 0 to 2 questions .*turns=4"):
        SceneChats(0, "train", questions={"colour": 0.5, "count": 0.5})


def test_the_first_conversations_practise_one_kind_after_another() -> None:
    chats = SceneChats(0, "train", turns=1, caption_share=0.5, layout_share=0.5, first={"exists": 20, "count": 10})
    kinds = [[turn.kind for turn in chats.questions(position)] for position in range(60)]
    assert kinds[:30] == [["exists"]] * 20 + [["count"]] * 10
    assert {kind for (kind,) in kinds[30:]} == {"caption", "layout"}
    with pytest.raises(ValueError, match=r"gives 0 to 1 questions of these kinds .*'count'.*turns=2"):
        SceneChats(0, "train", turns=2, first={"count": 10})
    with pytest.raises(ValueError, match=r"first must give numbers of samples, got .*-1"):
        SceneChats(0, "train", first={"exists": -1})


def test_draws_follow_the_shares() -> None:
    rng = np.random.default_rng(0)
    counts = Counter(say.draw({"a": 3.0, "b": 1.0, "never": 0.0}, rng) for _ in range(2000))
    assert set(counts) == {"a", "b"}
    assert 1400 <= counts["a"] <= 1600


def test_special_tokens() -> None:
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(12))
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 2)
    assert 500 <= len(TOKENIZER) <= 800
    assert all(len(TOKENIZER.encode(token)) == 1 for token in SPECIAL_TOKENS)
    kept = TOKENIZER.decode(TOKENIZER.encode("<s><img>cat<box>(0,50),(500,1000)</box><|im_end|></s>"), True)
    assert kept == "cat<box>(0,50),(500,1000)</box>"


def test_one_token_a_word() -> None:
    def pieces(text: str) -> list[str]:
        return [TOKENIZER.decode([i]) for i in TOKENIZER.encode(text)]

    assert pieces("two cats and a dog") == ["two", " cats", " and", " a", " dog"]
    assert pieces("top-left cat, bottom-right nothing") == ["top-left", " cat", ",", " bottom-right", " nothing"]
    assert pieces("两只猫") == ["两只", "猫"]
    box = ["<box>", "(", "0", ",", "50", "),(", "950", ",", "1000", ")", "</box>"]
    assert pieces("".join(box)) == box
    assert {len(pieces(thing.name)) + len(pieces(" " + thing.plural)) for thing in THINGS} == {2}


def test_round_trip() -> None:
    texts = [
        "",
        " ",
        "  two  spaces ",
        "Ünïcode 漢字 한글 😀👩‍🚀",
        "tab\tand\r\nlines\n\n",
        "3.14, don't (1,2)",
        "\x00\x7f\u2028",
    ]
    pairs = ScenePairs(0, "train", languages={"en": 0.5, "zh": 0.5})
    chats = SceneChats(0, "train", turns=6)
    texts += [pairs[i]["caption"] for i in range(500)]
    texts += [message["content"] for i in range(200) for message in chats[i]["conversation"]]
    texts += ["\n".join(texts[7:20]), "summarize: English caption: " + texts[8]]
    letters = np.random.default_rng(0).integers(0x20, 0x3000, (50, 20))
    texts += ["".join(map(chr, row)) for row in letters]
    for text in texts:
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_deterministic_and_reloads(tmp_path: Path) -> None:
    assert toy_tokenizer().get_vocab() == TOKENIZER.get_vocab()
    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<img> a cat and 两只猫 on a blue background\n<box>(50,100),(500,550)</box><|im_end|> xyz"
    assert again.encode(text) == TOKENIZER.encode(text)
    assert again.decode(again.encode(text)) == text
