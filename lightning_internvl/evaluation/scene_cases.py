"""Questions about the built-in scenes for tasks without a path, in words of training.

The scenes are those of the split "scenes", which no training shows, all of different content.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from lightning_internvl.data.scenes import language as say
from lightning_internvl.data.scenes.generator import Scene, Scenes
from lightning_internvl.data.scenes.held_out import HeldOutScenes
from lightning_internvl.data.scenes.things import COLOURS, THINGS
from lightning_internvl.evaluation.answer_task import Case

POPE_SPLITS = ("random", "popular", "adversarial")
HARD = 3  # things that are not there, by rank, among which one is drawn
DRAWS = 5  # a stream of draws of its own, beside those of the datasets


class DrawnScene(NamedTuple):
    """A scene, its name and what draws it."""

    key: str
    scene: Scene
    picture: partial[np.ndarray]
    rng: np.random.Generator


def drawn_scenes(held_out: HeldOutScenes, count: int) -> Iterator[DrawnScene]:
    """The first `count` scenes of different content."""
    source = Scenes(held_out.seed, "scenes", held_out.image_size, held_out.styles)
    for index in source.unique_indices(count):
        scene = source.scene(index)
        seed = np.random.SeedSequence([held_out.seed, index, DRAWS])
        rng = np.random.Generator(np.random.PCG64(seed))
        yield DrawnScene(f"scenes/{index}", scene, partial(source.render, scene), rng)


def question_cases(held_out: HeldOutScenes, count: int) -> list[Case]:
    """One question a scene with an answer of a word or two; `part` is its kind."""
    cases = []
    for shown in drawn_scenes(held_out, count):
        turn = next(turn for turn in say.questions(shown.scene, shown.rng, 3) if turn.box is None)
        cases.append(Case(shown.key, shown.picture, turn.question, turn.answer, turn.kind))
    return cases


def caption_cases(held_out: HeldOutScenes, count: int) -> list[Case]:
    """A scene each, with all accepted captions."""
    return [Case(one.key, one.picture, "", say.references(one.scene)) for one in drawn_scenes(held_out, count)]


def grounding_cases(held_out: HeldOutScenes, count: int) -> list[Case]:
    """Scenes with a thing that is there once, its name, and its box (0..1)."""
    cases: list[Case] = []
    for shown in drawn_scenes(held_out, 2 * count + 20):  # about one in seven has none
        single = [placed for placed in shown.scene.objects if shown.scene.counts[placed.thing] == 1]
        if single and len(cases) < count:
            placed = single[int(shown.rng.integers(len(single)))]
            cases.append(Case(shown.key, shown.picture, f"the {THINGS[placed.thing].name}", placed.box))
    return cases


def pope_cases(held_out: HeldOutScenes, count: int) -> list[Case]:
    """For every scene and split one thing that is there and one that is not. Those that are not are
    drawn at random, or are the commonest of all scenes, or those that most often stand beside what
    is there (Li et al., 2023, section 4)."""
    shown = list(drawn_scenes(held_out, count))
    common = Counter(thing for one in shown for thing in one.scene.counts)
    beside: dict[int, Counter[int]] = {thing: Counter() for thing in range(len(THINGS))}
    for one in shown:
        for a, b in itertools.permutations(one.scene.counts, 2):
            beside[a][b] += 1
    pairs = [_pope_pair(one, split, common, beside) for split in POPE_SPLITS for one in shown]
    return [case for pair in pairs for case in pair]


def _pope_pair(one: DrawnScene, split: str, common: Mapping[int, int], beside: Mapping[int, Mapping[int, int]]) -> list[Case]:
    here = list(one.scene.counts)
    absent = [int(thing) for thing in one.rng.permutation(len(THINGS)) if thing not in here]
    near = {thing: sum(beside[other][thing] for other in here) for thing in absent}
    rank = {"random": lambda thing: 0, "popular": lambda thing: common[thing], "adversarial": near.__getitem__}[split]
    hard = sorted(absent, key=rank, reverse=True)[:HARD]
    pair = {"yes": here[int(one.rng.integers(len(here)))], "no": hard[int(one.rng.integers(len(hard)))]}
    return [Case(f"{split}/{one.key}/{answer}", one.picture, _is_there(thing), answer, split) for answer, thing in pair.items()]


def mme_cases(held_out: HeldOutScenes, count: int) -> list[Case]:
    """Two questions a scene, one to be answered yes and one no, of four kinds by turns: those of
    MME's coarse perception."""
    kinds = {"existence": _existence, "count": _count, "position": _position, "color": _color}
    cases = []
    for shown, (kind, ask) in zip(drawn_scenes(held_out, count), itertools.cycle(kinds.items()), strict=False):
        for answer, question in zip(("yes", "no"), ask(shown), strict=True):
            cases.append(Case(f"{kind}/{shown.key}/{answer}", shown.picture, question, answer, kind))
    return cases


def _is_there(thing: int) -> str:
    return f"is there {say.noun_phrase(THINGS[thing], 1)}?"


def _existence(one: DrawnScene) -> tuple[str, str]:
    here, other = _there_and_not(one)
    return _is_there(here), _is_there(other)


def _count(one: DrawnScene) -> tuple[str, str]:
    thing, _ = _there_and_not(one)
    right = one.scene.counts[thing]
    wrong = int(one.rng.choice([number for number in (1, 2, 3) if number != right]))
    return _are_there(thing, right), _are_there(thing, wrong)


def _are_there(thing: int, number: int) -> str:
    words = f"one {THINGS[thing].name}" if number == 1 else say.noun_phrase(THINGS[thing], number)
    return f"{'is' if number == 1 else 'are'} there {words}?"


def _position(one: DrawnScene) -> tuple[str, str]:
    placed = one.scene.objects[int(one.rng.integers(len(one.scene.objects)))]
    elsewhere = [cell for cell in range(4) if all((o.cell, o.thing) != (cell, placed.thing) for o in one.scene.objects)]
    name = say.noun_phrase(THINGS[placed.thing], 1)
    here, other = say.CELLS[placed.cell], say.CELLS[int(one.rng.choice(elsewhere))]
    return f"is there {name} in the {here}?", f"is there {name} in the {other}?"


def _color(one: DrawnScene) -> tuple[str, str]:
    right = one.scene.background
    wrong = int(one.rng.choice([colour for colour in range(len(COLOURS)) if colour != right]))
    here, other = COLOURS[right].name, COLOURS[wrong].name
    return f"is the background {here}?", f"is the background {other}?"


def _there_and_not(one: DrawnScene) -> tuple[int, int]:
    here = list(one.scene.counts)
    absent = [thing for thing in range(len(THINGS)) if thing not in here]
    return here[int(one.rng.integers(len(here)))], absent[int(one.rng.integers(len(absent)))]
