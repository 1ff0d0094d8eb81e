"""Several datasets read as one. Which sample stands at a position is a pure function of (seed,
position), so resume is exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from lightning_internvl.choices import BY_SIZE
from lightning_internvl.data.order.sampler import permuted
from lightning_internvl.files import identity_of

ENDLESS = 2**40
BLOCK = 1024  # positions (or runs) over which the shares are kept to the sample
KEPT_BLOCKS = 4


class _SourceBlock(NamedTuple):
    """The sources of BLOCK runs, and how many runs of its source came before each."""

    sources: np.ndarray
    earlier: np.ndarray


class Mixture(Dataset[dict[str, Any]]):
    """An endless stream of samples of several map-style datasets. Every sample carries the name of
    its dataset as "source".

    Positions are shared out in blocks: a block holds each dataset in its share, in a random order.
    A dataset with a length is read in a new order each epoch, one without is read in order. Read it
    with `endless: true`.

    Args:
        datasets: by name.
        weights: by name, of any sum; "size" in proportion to the lengths; "sqrt" to their square
            roots (InstructBLIP 2.4).
        schedule: instead of `weights`, steps and the weights there, linear in between and constant
            after the last (the modality warm-up of DeepSeek-VL): [{step: 0, weights: {...}}, {step:
            2000, weights: {...}}].
        samples_per_step: samples of an optimizer step on all devices, to which the steps of
            `schedule` refer.
        run: so many samples in a row come from one dataset (the batch size of a device keeps
            batches of one kind).
        seed: of all orders.

    Raises:
        ValueError: for names, weights or lengths that do not fit.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset[Any]],
        weights: Mapping[str, float] | str = "size",
        *,
        schedule: Sequence[Mapping[str, Any]] | None = None,
        samples_per_step: int = 1,
        run: int = 1,
        seed: int = 0,
    ) -> None:
        if not datasets or run < 1 or samples_per_step < 1:
            raise ValueError(f"a mixture needs datasets, and 1 or more for {run=} and {samples_per_step=}")
        self.datasets, self.run, self.seed = dict(datasets), run, seed
        self.names = list(self.datasets)
        knots: Sequence[Mapping[str, Any]] = schedule or []
        if schedule is None:
            knots = [{"step": 0, "weights": weights}]
        steps = [int(knot["step"]) for knot in knots]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError(f"the steps of a schedule start at 0 and rise, but they are {steps}")
        # In blocks; a run counts as one position.
        self.times = np.array(steps, dtype=np.float64) * samples_per_step / (run * BLOCK)
        self.shares = np.stack([self._shares(knot["weights"]) for knot in knots])
        self.filler = int(self.shares.min(axis=0).argmax())
        if len(self.names) > 2 and self.shares[:, self.filler].min() * BLOCK < len(self.names) - 1:
            least = f"{(len(self.names) - 1) / BLOCK:.4f}"
            raise ValueError(f"one of more than two datasets must keep a share above {least} throughout")
        self.blocks: dict[int, _SourceBlock] = {}

    def identity(self) -> dict[str, Any]:
        """That of each dataset."""
        return {name: identity_of(dataset) for name, dataset in self.datasets.items()}

    def __len__(self) -> int:
        raise TypeError("a mixture has no end; read it with data.endless=true")

    def share(self, position: float) -> dict[str, float]:
        """Shares by name at a position (in samples)."""
        time = position / (self.run * BLOCK)
        shares = (float(np.interp(time, self.times, column)) for column in self.shares.T)
        return dict(zip(self.names, shares, strict=True))

    def place(self, position: int) -> tuple[str, int]:
        """The dataset at a position and the index in it."""
        turn, inside = divmod(position, self.run)
        number, slot = divmod(turn, BLOCK)
        block = self._block(number)
        source = int(block.sources[slot])
        name, count = self.names[source], int(block.earlier[slot]) * self.run + inside
        length = known_length(self.datasets[name])
        if length is None:
            return name, count
        epoch, index = divmod(count, length)
        return name, int(permuted(np.array([index]), length, self.seed + source, epoch)[0])

    def __getitem__(self, position: int) -> dict[str, Any]:
        name, index = self.place(position)
        return {**self.datasets[name][index], "source": name}

    def _shares(self, weights: Mapping[str, float] | str) -> np.ndarray:
        if isinstance(weights, str):
            weights = self._by_size(weights)
        if set(weights) != set(self.names):
            raise ValueError(f"weights for {', '.join(weights)}, but the datasets are {', '.join(self.names)}")
        found = np.array([float(weights[name]) for name in self.names])
        if (found < 0).any() or not found.sum() > 0:
            raise ValueError(f"weights must be 0 or more, and one of them above it: {dict(weights)}")
        return found / found.sum()

    def _by_size(self, rule: str) -> dict[str, float]:
        if rule not in BY_SIZE:
            choices = f"{', '.join(BY_SIZE)}, or a weight for each name"
            raise ValueError(f"weights={rule!r} is not known; valid choices: {choices}")
        lengths = {name: known_length(dataset) for name, dataset in self.datasets.items()}
        weights = {name: n ** BY_SIZE[rule] for name, n in lengths.items() if n is not None}
        if endless := ", ".join(name for name in lengths if name not in weights):
            raise ValueError(f"weights={rule!r} needs datasets with a length; without one: {endless}")
        return weights

    def _before(self, number: int) -> np.ndarray:
        """How many runs each dataset has in the blocks before this one: the integral of its share,
        rounded down; what rounding leaves over goes to the dataset with the steadiest share."""
        times = np.append(self.times[self.times < number], number)
        shares = np.stack([np.interp(times, self.times, column) for column in self.shares.T], axis=1)
        sums = ((shares[1:] + shares[:-1]) / 2 * np.diff(times)[:, None]).sum(axis=0) * BLOCK
        counts = np.floor(sums + 1e-6).astype(np.int64)
        counts[self.filler] = 0
        counts[self.filler] = number * BLOCK - counts.sum()
        return counts

    def _block(self, number: int) -> _SourceBlock:
        if number not in self.blocks:
            before, after = self._before(number), self._before(number + 1)
            sources = np.repeat(np.arange(len(self.names)), after - before)
            np.random.default_rng([self.seed, number]).shuffle(sources)
            earlier = np.empty(BLOCK, dtype=np.int64)
            for source, start in enumerate(before):
                here = sources == source
                earlier[here] = start + np.arange(here.sum())
            while len(self.blocks) >= KEPT_BLOCKS:
                del self.blocks[next(iter(self.blocks))]
            self.blocks[number] = _SourceBlock(sources, earlier)
        return self.blocks[number]


def known_length(dataset: Dataset[Any]) -> int | None:
    """Samples of a dataset; None for an endless one (no length, or `ENDLESS`)."""
    try:
        length = len(dataset)  # type: ignore[arg-type]
    except TypeError:
        return None
    return None if length >= ENDLESS else length
