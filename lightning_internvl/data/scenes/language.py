"""What is said about a scene: captions in two languages, questions, prompts for a thing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lightning_internvl.data import grounding
from lightning_internvl.data.grounding import Box
from lightning_internvl.data.scenes.generator import Scene
from lightning_internvl.data.scenes.things import COLOURS, THINGS, Colour, Thing

LANGUAGES = ("en", "zh")
COUNTS = {"en": ("no", "one", "two", "three", "four"), "zh": ("零", "一", "两", "三", "四")}
CELLS = ("top-left", "top-right", "bottom-left", "bottom-right")
CAPTIONS = {
    "en": ("{things} on {article} {colour} background", "{article} {colour} background with {things}"),
    "zh": ("{colour}背景上有{things}", "{things}在{colour}背景上"),
}
BOX_SHARE = 0.3  # of questions for a place that ask for the box too
CAPTION_REQUEST = "describe the picture."
LAYOUT_REQUEST = "what is where?"
# Kinds of questions and how often each is asked. A box takes ten times the tokens of a word, so few
# of them already weigh much.
QUESTION_SHARES = {"what": 0.35, "exists": 0.25, "count": 0.2, "colour": 0.15, "where": 0.05}
EMPTY_CELL_SHARE = 0.15  # of "what" questions, where a cell is empty
# Different questions of a kind that every scene has, at the least: two things, or one twice.
FEWEST = {"what": 2, "exists": 24, "count": 1, "colour": 1, "where": 0}
BOX_STEP = 50  # box numbers are multiples of this, in 0..1000
MAX_QUESTIONS = FEWEST["exists"]


@dataclass(frozen=True)
class Turn:
    """A question and its answer. `box` (x0, y0, x1, y1 in 0..1) is the unrounded truth of a "where"
    question."""

    question: str
    answer: str
    kind: str
    box: Box | None = None


def article(word: str) -> str:
    """The indefinite article of a word of this closed world."""
    return "an" if word[0] in "aeiou" else "a"


def noun_phrase(thing: Thing, count: int, language: str = "en") -> str:
    """ "a cat", "two cats", "两只猫"."""
    if language == "zh":
        return f"{COUNTS['zh'][count]}{thing.measure}{thing.zh}"
    if count == 1:
        return f"{article(thing.name)} {thing.name}"
    return f"{COUNTS['en'][count]} {thing.plural}"


def _join(phrases: list[str], language: str) -> str:
    comma, last = {"en": (", ", " and "), "zh": ("、", "和")}[language]
    return comma.join(phrases[:-1]) + last + phrases[-1] if len(phrases) > 1 else phrases[0]


def _phrase(pattern: str, things: str, colour: Colour, language: str) -> str:
    name = colour.zh if language == "zh" else colour.name
    return pattern.format(things=things, colour=name, article=article(name))


def references(scene: Scene, language: str = "en") -> list[str]:
    """Every caption that `caption` may give; raises ValueError for an unknown language."""
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}; choose from {list(LANGUAGES)}")
    phrases = [noun_phrase(THINGS[thing], count, language) for thing, count in scene.counts.items()]
    things, colour = _join(phrases, language), COLOURS[scene.background]
    return [_phrase(pattern, things, colour, language) for pattern in CAPTIONS[language]]


def caption(scene: Scene, rng: np.random.Generator, language: str = "en") -> str:
    """One caption: all kinds of things with counts, and the background colour."""
    choices = references(scene, language)
    return choices[int(rng.integers(len(choices)))]


def layout(scene: Scene) -> str:
    """What each cell holds: "top-left cat, top-right nothing, bottom-left dog, bottom-right
    cat"."""
    held = _held(scene)
    return ", ".join(f"{name} {held.get(cell, 'nothing')}" for cell, name in enumerate(CELLS))


def _held(scene: Scene) -> dict[int, str]:
    """The name of the thing in every cell that holds one."""
    return {placed.cell: THINGS[placed.thing].name for placed in scene.objects}


def class_prompts(thing: Thing, language: str = "en") -> list[str]:
    """Captions of just this thing in each phrasing and colour, after the bare name."""
    name = noun_phrase(thing, 1, language)
    return [name] + [_phrase(pattern, name, colour, language) for pattern in CAPTIONS[language] for colour in COLOURS]


def box_text(box: Box) -> str:
    """A box in 0..1 as "<box>(x0,y0),(x1,y1)</box>": multiples of BOX_STEP in 0..1000."""
    return grounding.box_text(box, BOX_STEP)


def check_shares(shares: Mapping[str, float], n: int) -> None:
    """Raises ValueError for kinds that there are not, shares that are none, and where kinds with a
    share cannot give n different questions about every scene."""
    if not set(shares) <= set(QUESTION_SHARES) or min(shares.values(), default=0) < 0:
        raise ValueError(f"questions must give shares, 0 or more, of {list(QUESTION_SHARES)}, got {dict(shares)}")
    fewest = min(sum(FEWEST[kind] for kind, share in shares.items() if share > 0), MAX_QUESTIONS)
    if not 0 <= n <= fewest:
        raise ValueError(f"a scene gives 0 to {fewest} questions of these kinds ({dict(shares)}), got turns={n}")


def questions(scene: Scene, rng: np.random.Generator, n: int, shares: Mapping[str, float] = QUESTION_SHARES) -> list[Turn]:
    """n different questions about a scene, of kinds by their shares; what the picture does not allow
    is left out.

    Raises ValueError for what `check_shares` refuses.
    """
    check_shares(shares, n)
    makers = {"what": _what, "count": _count, "colour": _colour, "exists": _exists, "where": _where}
    turns: dict[str, Turn] = {}
    while len(turns) < n:
        turn = makers[draw(shares, rng)](scene, rng)
        if turn is not None:
            turns.setdefault(turn.question, turn)
    return list(turns.values())


def draw(shares: Mapping[str, float], rng: np.random.Generator) -> str:
    """A name, drawn in proportion to its share."""
    left = rng.random() * sum(shares.values())
    for name, share in shares.items():
        if (left := left - share) < 0:
            return name
    return list(shares)[-1]  # what rounding leaves


def _pick(items: list[int], rng: np.random.Generator) -> int:
    return items[int(rng.integers(len(items)))]


def _what(scene: Scene, rng: np.random.Generator) -> Turn:
    held = _held(scene)
    empty = [cell for cell in range(len(CELLS)) if cell not in held]
    ask_empty = bool(empty) and rng.random() < EMPTY_CELL_SHARE
    cell = _pick(empty if ask_empty else list(held), rng)
    return Turn(f"what is in the {CELLS[cell]}?", held.get(cell, "nothing"), "what")


def _count(scene: Scene, rng: np.random.Generator) -> Turn:
    thing = _pick(list(scene.counts), rng)
    return Turn(f"how many {THINGS[thing].plural} are there?", COUNTS["en"][scene.counts[thing]], "count")


def _colour(scene: Scene, rng: np.random.Generator) -> Turn:
    return Turn("what colour is the background?", COLOURS[scene.background].name, "colour")


def _exists(scene: Scene, rng: np.random.Generator) -> Turn:
    shown = rng.random() < 0.5
    thing = _pick([i for i in range(len(THINGS)) if (i in scene.counts) == shown], rng)
    return Turn(f"is there {noun_phrase(THINGS[thing], 1)}?", "yes" if shown else "no", "exists")


def _where(scene: Scene, rng: np.random.Generator) -> Turn | None:
    single = [placed for placed in scene.objects if scene.counts[placed.thing] == 1]
    if not single:
        return None
    placed = single[int(rng.integers(len(single)))]
    return Turn(f"where is the {THINGS[placed.thing].name}?", box_text(placed.box), "where", placed.box)


def with_place(turns: list[Turn], scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """These turns and one that asks where a thing is that is there once and that no answer of theirs
    names, in a word ("place") or with its box behind the word ("where"); these alone where no thing
    is left. Before the others only where none of them asks about the thing.
    """
    said = " ".join(turn.answer for turn in turns)
    single = [one for one in scene.objects if scene.counts[one.thing] == 1 and THINGS[one.thing].name not in said]
    if not single:
        return turns
    placed = single[int(rng.integers(len(single)))]
    name, cell = THINGS[placed.thing].name, CELLS[placed.cell]
    if rng.random() < BOX_SHARE:
        asked = Turn(f"where is the {name}?", f"{cell} {box_text(placed.box)}", "where", placed.box)
    else:
        asked = Turn(f"where in the picture is the {name}?", cell, "place")
    behind = any(name in turn.question for turn in turns) or rng.random() < 0.5
    return [*turns, asked] if behind else [asked, *turns]


def chinese_words() -> set[str]:
    """The words of the Chinese captions, of two characters and more."""
    counted = {f"{count}{thing.measure}" for count in COUNTS["zh"][1:] for thing in THINGS}
    frames = {piece for pattern in CAPTIONS["zh"] for piece in re.split(r"\{\w+\}", pattern)}
    words = {t.zh for t in THINGS} | {c.zh for c in COLOURS} | counted | frames
    return {word for word in words if len(word) > 1}


def vocabulary_texts() -> Iterator[str]:
    """Short texts that hold every word of this module in every position."""
    for thing in THINGS:
        yield from (thing.name, f"how many {thing.plural} are there?", f"where is the {thing.name}?")
        for language in LANGUAGES:
            for count in range(1, 4):
                phrase = noun_phrase(thing, count, language)
                yield from (phrase, _join([phrase] * 3, language))
        yield f"is there {noun_phrase(thing, 1)}?"
    for colour in COLOURS:
        yield from (colour.name, colour.zh)
        for language in LANGUAGES:
            for pattern in CAPTIONS[language]:
                yield _phrase(pattern, noun_phrase(THINGS[0], 1, language), colour, language)
    for words in (CELLS, COUNTS["en"], COUNTS["zh"], ("nothing", "yes", "no", CAPTION_REQUEST, LAYOUT_REQUEST)):
        yield from words
    yield from (f"what is in the {cell}?" for cell in CELLS)
    yield from (f"{cell} {THINGS[0].name}, {cell} nothing" for cell in CELLS)
    yield "what colour is the background?"
    yield from (box_text((value / 1000,) * 4) for value in range(0, 1001, BOX_STEP))
