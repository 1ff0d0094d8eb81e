"""Scenes of a few things on a coloured background: a pure function of (seed, split, index)."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np

from lightning_internvl.data.scenes.artwork import Artwork
from lightning_internvl.data.scenes.things import COLOURS, THINGS

SPLITS = ("train", "scenes", "combinations", "single")
HELD_OUT_SHARE = 0.1
ONE_KIND_SHARE, THREE_KINDS_SHARE = 0.15, 0.2
ONE_KIND_COUNTS = ((2,), (3,))
TWO_KIND_COUNTS = ((1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (1, 3))
THREE_KIND_COUNTS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2))
SIZE_RANGE = (0.80, 0.95)  # of a cell
COLOUR_JITTER = 10  # +- in 0..255

Key = tuple[int, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class Placed:
    """One object. `cell`: 0 top left, 1 top right, 2 bottom left, 3 bottom right; `box`: x0, y0,
    x1, y1 in 0..1."""

    thing: int
    style: str
    cell: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """`background` indexes COLOURS; `rgb` is its jittered value; `objects` are in cell order."""

    background: int
    rgb: tuple[int, int, int]
    objects: tuple[Placed, ...]

    @functools.cached_property
    def counts(self) -> dict[int, int]:
        """How many of each thing, in the order of the table of things."""
        return dict(sorted(Counter(placed.thing for placed in self.objects).items()))

    @property
    def key(self) -> Key:
        """What a caption tells: the background, and the things with their counts."""
        return self.background, tuple(self.counts.items())


@functools.cache
def held_out_pairs() -> frozenset[tuple[int, int]]:
    """Pairs (i, j), i < j, that share a scene only in "combinations"; the names decide."""
    pairs = itertools.combinations(range(len(THINGS)), 2)
    return frozenset(pair for pair in pairs if _pair_hash(*pair) < HELD_OUT_SHARE)


def _pair_hash(i: int, j: int) -> float:
    names = "+".join(sorted((THINGS[i].name, THINGS[j].name)))
    return int.from_bytes(hashlib.blake2b(names.encode(), digest_size=8).digest(), "little") / 2**64


@functools.cache
def _held_out_list() -> tuple[tuple[int, int], ...]:
    return tuple(sorted(held_out_pairs()))


@functools.cache
def seen_partners() -> tuple[tuple[int, ...], ...]:
    """For each thing, the things that training may show it with."""
    pairs, things = held_out_pairs(), range(len(THINGS))
    return tuple(tuple(j for j in things if j != i and (min(i, j), max(i, j)) not in pairs) for i in things)


class _Draws:
    """Uniform numbers of one scene, drawn in one block, for generator calls are slow."""

    def __init__(self, seed: int, split: str, index: int) -> None:
        sequence = np.random.SeedSequence([seed, SPLITS.index(split), index])
        self.values = iter(np.random.Generator(np.random.PCG64(sequence)).random(40).tolist())

    def uniform(self) -> float:
        return next(self.values)

    def below(self, n: int) -> int:
        return int(next(self.values) * n)


class Scenes:
    """All scenes of one split.

    "train": for training; "scenes": other scenes of pairs that training may show; "combinations":
    two things that no training scene shows together; "single": one thing alone (index i shows thing
    i modulo 48). Raises ValueError for an unknown split or a canvas under 16 px.
    """

    def __init__(self, seed: int, split: str, image_size: int = 64, styles: tuple[str, ...] = ("twemoji", "openmoji")) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose from {list(SPLITS)}")
        if image_size < 16 or image_size % 2:
            raise ValueError(f"image_size must be even and at least 16 px, got {image_size}")
        self.seed, self.split, self.image_size, self.styles = seed, split, image_size, tuple(styles)
        self.artwork = Artwork(self.styles)

    def scene(self, index: int) -> Scene:
        """Scene number `index` >= 0 of the split."""
        draws = _Draws(self.seed, self.split, index)
        background = draws.below(len(COLOURS))
        jitter = [draws.below(2 * COLOUR_JITTER + 1) - COLOUR_JITTER for _ in range(3)]
        red, green, blue = (min(value + by, 255) for value, by in zip(COLOURS[background].rgb, jitter, strict=True))
        rgb = (red, green, blue)
        if self.split == "single":
            style = self.styles[index // len(THINGS) % len(self.styles)]
            return Scene(background, rgb, (self._place(draws, index % len(THINGS), style, draws.below(4)),))
        things = self._things(draws)
        cells = sorted(range(4), key=[draws.uniform() for _ in range(4)].__getitem__)[: len(things)]
        placed = [
            self._place(draws, thing, self.styles[draws.below(len(self.styles))], cell)
            for thing, cell in zip(things, cells, strict=True)
        ]
        return Scene(background, rgb, tuple(sorted(placed, key=lambda one: one.cell)))

    def _things(self, draws: _Draws) -> list[int]:
        """The thing of every object: one to three kinds by their counts; two objects at least."""
        counts: tuple[tuple[int, ...], ...] = TWO_KIND_COUNTS
        kinds: tuple[int, ...]
        if self.split == "combinations":
            pairs = _held_out_list()
            kinds = pairs[draws.below(len(pairs))]
        else:
            partners = seen_partners()
            first = draws.below(len(THINGS))
            second = partners[first][draws.below(len(partners[first]))]
            kinds, draw = (first, second), draws.uniform()
            if draw < ONE_KIND_SHARE:
                kinds, counts = (first,), ONE_KIND_COUNTS
            elif draw < ONE_KIND_SHARE + THREE_KINDS_SHARE:
                both = [thing for thing in partners[first] if thing in partners[second]]
                kinds, counts = (first, second, both[draws.below(len(both))]), THREE_KIND_COUNTS
        chosen = counts[draws.below(len(counts))]
        return [kind for kind, count in zip(kinds, chosen, strict=True) for _ in range(count)]

    def _place(self, draws: _Draws, thing: int, style: str, cell: int) -> Placed:
        """Put a thing into a cell at a random size and position (whole pixels)."""
        half = self.image_size // 2
        low, high = SIZE_RANGE
        size = round(half * (low + (high - low) * draws.uniform()))
        room = half - size + 1
        x, y = half * (cell % 2) + draws.below(room), half * (cell // 2) + draws.below(room)
        scale = 1 / self.image_size
        box = (x * scale, y * scale, (x + size) * scale, (y + size) * scale)
        return Placed(thing, style, cell, box)

    def render(self, scene: Scene) -> np.ndarray:
        """Draw a scene: (image_size, image_size, 3) uint8 RGB."""
        side = self.image_size
        canvas = np.empty((side, side, 3), dtype=np.float32)
        canvas[:] = scene.rgb
        for placed in scene.objects:
            x0, y0, x1, y1 = (round(value * side) for value in placed.box)
            colour, keep = self.artwork.layers(placed.thing, placed.style, x1 - x0)
            patch = canvas[y0:y1, x0:x1]
            patch *= keep
            patch += colour
        canvas += 0.5
        return canvas.astype(np.uint8)

    def mask(self, scene: Scene) -> np.ndarray:
        """What every pixel shows: (image_size, image_size) uint8, 0 for the background, 1 + its
        number for a thing."""
        side = self.image_size
        found = np.zeros((side, side), dtype=np.uint8)
        for placed in scene.objects:
            x0, y0, x1, y1 = (round(value * side) for value in placed.box)
            _, keep = self.artwork.layers(placed.thing, placed.style, x1 - x0)
            found[y0:y1, x0:x1][keep[..., 0] < 0.5] = placed.thing + 1
        return found

    def unique_indices(self, n: int) -> list[int]:
        """Indices of the first n scenes of different content: a caption names one picture.

        Raises ValueError where the split holds too few different scenes.
        """
        taken: dict[Key, int] = {}
        limit = 100 * n + 1000
        for index in range(limit):
            taken.setdefault(self.scene(index).key, index)
            if len(taken) >= n:
                return list(taken.values())[:n]
        first = f"the first {limit} scenes of split {self.split!r}"
        raise ValueError(f"{first} hold {len(taken)} different ones, not {n}")

    def unique_scenes(self, n: int) -> list[Scene]:
        """The scenes of `unique_indices`."""
        return [self.scene(index) for index in self.unique_indices(n)]
