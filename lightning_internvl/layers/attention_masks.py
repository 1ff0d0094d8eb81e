"""Attention masks described by lengths, plain Python numbers: no square of tokens is needed, and no
look at a device.

A mask says for every row which runs of queries see which runs of keys. From that follow the dense
mask, which is the reference, and what each kernel wants: the slices for a loop, the packed places
and lengths for kernels of uneven lengths, the blocks of FlexAttention.

Letters: B rows, T query positions, S key positions, R runs of keys, L length of a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_internvl.choices import IGNORE_INDEX

Run = tuple[int, int]  # [start, end)
Segments = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Piece:
    """A run of queries and the runs of keys that it sees.

    Attributes:
        queries: [start, end) of the queries.
        keys: [start, end) of each run of keys, in order.
        causal: the last query sees all of these keys, the one before it all but the last, and so
            on; the last run has at least as many keys as there are queries.
    """

    queries: Run
    keys: tuple[Run, ...]
    causal: bool = False

    @property
    def counts(self) -> tuple[int, int]:
        """How many queries and keys."""
        return self.queries[1] - self.queries[0], sum(end - start for start, end in self.keys)


@dataclass(frozen=True)
class Varlen:
    """Pieces of one kind side by side, as kernels of uneven lengths read them.

    Attributes:
        queries, keys: how many of each a piece has.
        query_places, key_places: where they stand among all B * T queries and B * S keys; None: all
            of them, in order.
    """

    causal: bool
    queries: list[int]
    keys: list[int]
    query_places: Tensor | None
    key_places: Tensor | None


@dataclass(frozen=True)
class Mask:
    """Who may look at whom in B rows of T queries and S keys. A query of no piece (padding) sees
    nothing; its output is zero.

    Attributes:
        rows: the pieces of each row, by their queries.
    """

    rows: tuple[tuple[Piece, ...], ...]
    queries: int
    keys: int
    made: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """That of the dense mask."""
        return len(self.rows), 1, self.queries, self.keys

    @property
    def ndim(self) -> int:
        """transformers asks this of masks."""
        return 4

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What was made of the mask before, for all layers of a forward; made now if it was not."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def alike(self, row: int) -> list[tuple[Piece, int]]:
        """The pieces of a row; those of one length that follow each other and see themselves alone
        are the first of them and how many there are, which may be computed as one batch."""
        return self.once(("alike", row), lambda: _alike(self.rows[row]))

    def limits(self) -> Tensor:
        """First key and end of each run that a query sees: (B, R, T, 2), or empty."""
        runs = max((len(piece.keys) for row in self.rows for piece in row), default=1)
        limits = torch.zeros(len(self.rows), runs, self.queries, 2, dtype=torch.int32, device="cpu")
        for row, pieces in enumerate(self.rows):
            for piece in pieces:
                start, end = piece.queries
                for run, keys in enumerate(piece.keys):
                    limits[row, run, start:end] = torch.tensor(keys, dtype=torch.int32, device="cpu")
                if piece.causal:
                    last = piece.keys[-1][1]
                    limits[row, len(piece.keys) - 1, start:end, 1] = _count(last - (end - start), last) + 1
        return limits

    def dense(self, device: torch.device | str = "cpu") -> Tensor:
        """bool (B, 1, T, S), True where a query may look."""
        device = torch.device(device)
        return self.once(("dense", device), lambda: on_device(self._dense(), device))

    def _dense(self) -> Tensor:
        first, end = self.limits()[..., None, :].unbind(-1)  # B, R, T, 1
        keys = _count(0, self.keys)
        return ((first <= keys) & (keys < end)).any(dim=1, keepdim=True)

    def varlen(self, device: torch.device) -> list[Varlen]:
        """The pieces that are causal and those that are not, each side by side."""
        return self.once(
            ("varlen", device), lambda: [self._side_by_side(kind, device) for kind in (False, True) if self._of(kind)]
        )

    def _of(self, causal: bool) -> list[tuple[int, Piece]]:
        return [(row, piece) for row, pieces in enumerate(self.rows) for piece in pieces if piece.causal is causal]

    def _side_by_side(self, causal: bool, device: torch.device) -> Varlen:
        placed = self._of(causal)
        queries, keys = zip(*(piece.counts for _, piece in placed), strict=True)
        rows = len(self.rows)
        query_places = [_count(*piece.queries) + row * self.queries for row, piece in placed]
        key_places = [_count(*run) + row * self.keys for row, piece in placed for run in piece.keys]
        places = (_unless_all(query_places, rows * self.queries, device), _unless_all(key_places, rows * self.keys, device))
        return Varlen(causal, list(queries), list(keys), *places)

    def sees(self, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The `mask_mod` of FlexAttention: row, head, query and key to whether it may look."""
        first, end = on_device(self.limits(), device).unbind(-1)  # B, R, T

        def look(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = (first[row, 0, query] <= key) & (key < end[row, 0, query])
            for run in range(1, first.shape[1]):
                seen = seen | ((first[row, run, query] <= key) & (key < end[row, run, query]))
            return seen

        return look


def _alike(pieces: Sequence[Piece]) -> list[tuple[Piece, int]]:
    found: list[tuple[Piece, int]] = []
    for piece in pieces:
        first, count = found[-1] if found else (piece, 0)
        start, length = first.queries[0] + count * first.counts[0], first.counts[0]
        follows = first.keys == (first.queries,) and first.causal == piece.causal
        if count and follows and (start, start + length) == piece.queries and piece.keys == (piece.queries,):
            found[-1] = first, count + 1
        else:
            found.append((piece, 1))
    return found


def _count(start: int, end: int) -> Tensor:
    return torch.arange(start, end, device="cpu")  # whatever the default device is


def _unless_all(places: list[Tensor], count: int, device: torch.device) -> Tensor | None:
    joined = torch.cat(places)
    return None if len(joined) == count and torch.equal(joined, _count(0, count)) else on_device(joined, device)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; from pinned memory, so that the host need not wait."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# --- the masks ----------------------------------------------------------------------------------


def packed(segments: Segments, length: int, causal: bool = True) -> Mask:
    """Rows of samples that do not see each other, and padding behind them.

    Args:
        segments: for each row the lengths of its samples in order.
        length: L, the same for all rows.
        causal: whether a token sees those after it in its sample (False) or not.

    Raises:
        ValueError: naming a row whose samples are longer than it, or a sample without tokens.
    """
    check_segments(segments, length)
    return Mask(tuple(tuple(Piece(run, (run,), causal) for run in runs(row)) for row in segments), length, length)


def prefix(prefixes: Sequence[int], lengths: Sequence[int], length: int) -> Mask:
    """Rows that begin with tokens that all see each other; those after them see what was before.

    Args:
        prefixes: how many tokens of each row see each other.
        lengths: how many tokens each row has, prefix included; the rest is padding.
    """
    check_segments([[n] for n in lengths], length)
    if wrong := [(p, n) for p, n in zip(prefixes, lengths, strict=True) if not 0 <= p <= n]:
        raise ValueError(f"a prefix of {wrong[0][0]} tokens does not fit a row of {wrong[0][1]}")
    rows = []
    for p, n in zip(prefixes, lengths, strict=True):
        pieces = Piece((0, p), ((0, p),)), Piece((p, n), ((0, n),), causal=True)
        rows.append(tuple(piece for piece in pieces if piece.counts[0]))
    return Mask(tuple(rows), length, length)


# --- packed rows --------------------------------------------------------------------------------


def runs(lengths: Sequence[int]) -> list[Run]:
    """[start, end) of each sample of a row."""
    return list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))


def check_segments(segments: Segments, length: int, rows: int | None = None) -> None:
    """Raise ValueError for other rows, samples that do not fit, or one without tokens."""
    if rows not in (None, len(segments)):
        raise ValueError(f"the batch has {rows} rows, but segments of {len(segments)}")
    for row, lengths in enumerate(segments):
        if sum(lengths) > length or min(lengths, default=1) < 1:
            raise ValueError(f"segments of row {row} are {list(lengths)}; each must be 1 or more, and their sum at most {length}")


def positions(segments: Segments, length: int) -> Tensor:
    """Place of every token within its sample, 0 at padding: (B, L), on the host."""
    places = torch.zeros(len(segments), length, dtype=torch.long, device="cpu")
    for row, start, end in _each(segments):
        places[row, start:end] = _count(0, end - start)
    return places


def starts(segments: Segments, length: int) -> Tensor:
    """Where the sample of every token begins, at padding the place itself: (B, L), on the host."""
    places = _count(0, length).repeat(len(segments), 1)
    for row, start, end in _each(segments):
        places[row, start:end] = start
    return places


def without_firsts(labels_BL: Tensor, segments: Segments, ignored: int = IGNORE_INDEX) -> Tensor:
    """Labels without each sample's first, which the sample before would judge."""
    check_segments(segments, labels_BL.shape[1], len(labels_BL))
    firsts = torch.zeros(labels_BL.shape, dtype=torch.bool, device="cpu")
    for row, start, _ in _each(segments):
        firsts[row, start] = True
    return labels_BL.masked_fill(on_device(firsts, labels_BL.device), ignored)


def _each(segments: Segments) -> Iterable[tuple[int, int, int]]:
    return ((row, start, end) for row, lengths in enumerate(segments) for start, end in runs(lengths))
