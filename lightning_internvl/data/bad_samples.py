"""Samples that cannot be used: each is named and replaced, all are counted, and a run stops where
they are too many.

A source of samples says what is wrong with one by a ValueError: `BadSample` with the kind of fault,
or any other. Whatever else is raised for one sample (a library's own errors, too little memory, too
deep a nesting) is a fault of that sample too. What it costs is decided here, for every source alike.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

from lightning_internvl.files import append_text, json_text, whole_lines, write_text
from lightning_internvl.messages import hidden, without_secrets

TRIES = 32  # samples in a row of which one must be of use
MINIMUM = 1000  # samples before a share says something; fewer where an epoch has fewer
TOO_SLOW = "too slow"  # the kind of a sample that a limit of time has left out
SKIPPED = "skipped"  # what travels with a batch from the process that prepared it to the ledger
REASON = 2000  # characters of a reason that are kept
AGAIN = 1.0  # seconds until a limit of time is told again, where a library has swallowed it
NEARBY = 2**20  # how far ahead an endless source is asked for another sample


class BadSample(ValueError):
    """A sample that cannot be used.

    Args:
        kind: of the fault, by which it is counted.
        key: the sample's name, where the message comes from one who knows it.
    """

    counts = True

    def __init__(self, message: str, kind: str = "refused", key: str | None = None) -> None:
        super().__init__(message)
        self.kind, self.key = kind, key


class Unwanted(BadSample):
    """A sample that the settings leave out: counted, but no reason to stop."""

    counts = False

    def __init__(self, message: str, kind: str = "left out: too long", key: str | None = None) -> None:
        super().__init__(message, kind, key)


def kind_of(error: Exception) -> str:
    """The kind of a fault; errors that are no `BadSample` may carry one too."""
    return getattr(error, "kind", "refused" if isinstance(error, ValueError) else type(error).__name__)


def reason_of(error: Exception) -> str:
    """What was wrong, in words that can be written to any file."""
    said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}".removesuffix(": ")
    return without_secrets(writable(said or type(error).__name__))[:REASON]


def writable(text: str) -> str:
    """A text without the halves of characters that UTF-8 does not know."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Inside, what takes longer is ended by a BadSample; None: never.

    By an alarm of the process, which the main thread alone hears: outside of it, and on systems
    without one, there is no limit. It is heard between two steps of Python, so that one call of a
    library is not cut short.
    """
    alarms = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    left, every = signal.getitimer(signal.ITIMER_REAL) if alarms else (0.0, 0.0)
    if not seconds or not alarms or 0 < left <= seconds:  # an earlier alarm of others is not put off
        yield
        return
    inside, begun = True, time.monotonic()

    def stop(_: int, frame: FrameType | None) -> None:
        if inside:
            limit = f"data.max_sample_seconds={seconds:g}"
            raise BadSample(f"it takes longer than {limit}", TOO_SLOW)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        inside = False
        signal.setitimer(signal.ITIMER_REAL, max(left - time.monotonic() + begun, 1e-3) if left else 0, every)
        signal.signal(signal.SIGALRM, before if before is not None else signal.SIG_DFL)


class Skipped(NamedTuple):
    """One sample that was not used: its name, what was wrong, the place in the stage's data that it
    was drawn for, and from which of several sources. It travels with a batch, where Lightning's
    conversion to 64-true takes no frozen dataclass."""

    place: int
    key: str
    kind: str
    reason: str
    counts: bool = True
    source: str | None = None


def usable_sample(
    read: Callable[[int], dict[str, Any]],
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
    index: int,
    place: int,
    *,
    seed: int,
    length: int | None,
    tries: int = TRIES,
    seconds: float | None = None,
) -> tuple[dict[str, Any], list[Skipped]]:
    """A prepared sample for a place, and those that were skipped for it.

    The first one tried is at `index`; others are drawn from (seed, place), so that a place always
    gets the same sample, whatever ran before.

    Args:
        read, prepare: by index to a sample, and what is made of it. Their errors are a sample's
            fault.
        length: of the source; None for an endless one.
        tries: 1 hands the first fault on.
        seconds: that both may take (see `time_limit`).

    Raises:
        ValueError: if none of `tries` samples can be used.
    """
    skipped: list[Skipped] = []
    for attempt in range(tries):
        at = index if attempt == 0 else _another_index(index, [seed, place, attempt], length)
        key = f"sample {at}"
        try:
            with time_limit(seconds):
                sample = read(at)
                key = sample["key"]
                return prepare({**sample, "draw": (seed, place)}), skipped
        except Exception as error:
            if tries == 1:
                # A plain ValueError, which comes through from a data process by its message.
                raise ValueError(reason_of(error)) from error
            key, counts = getattr(error, "key", None) or key, getattr(error, "counts", True)
            skipped.append(Skipped(place, writable(key), kind_of(error), reason_of(error), counts))
    raise ValueError(f"{tries} samples in a row cannot be used; the first one: {skipped[0].reason}")


def _another_index(index: int, draw: Sequence[int], length: int | None) -> int:
    rng = np.random.default_rng(list(draw))
    return index + int(rng.integers(1, NEARBY)) if length is None else int(rng.integers(length))


class Ledger:
    """The account of one process in one stage: a line for each skipped sample, the stop.

    Lines of batches from `start` on are dropped first, so that a resumed run writes and counts none
    twice.

    Args:
        path: the file; there is none as long as every sample is used.
        max_bad_fraction: the largest share of all samples tried that may be bad.
        start: the first batch that is read.
        batch_size: samples of a batch in this process.
        epoch: samples of the source; None for an endless one.
        samples_read: for the batches before `start`, where that does not follow from `batch_size`.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bad_fraction: float,
        start: int,
        batch_size: int,
        epoch: int | None,
        samples_read: int | None = None,
    ) -> None:
        self.path, self.max_bad_fraction, self.batch_size = path, max_bad_fraction, batch_size
        self.minimum = min(MINIMUM, epoch or MINIMUM)
        self.batch = start
        rows = [json.loads(line) for line in whole_lines(path)]
        kept = [row for row in rows if row["batch"] < start]
        self.kinds: Counter[str] = Counter(row["kind"] for row in kept)
        self.sources: Counter[str] = Counter(row["source"] for row in kept if "source" in row)
        self.bad = sum(row["counts"] for row in kept)
        self.tried = (start * batch_size if samples_read is None else samples_read) + len(kept)
        if len(kept) < len(rows):
            write_text(path, "".join(json_text(row) + "\n" for row in kept))

    def add(self, skipped: Sequence[Skipped], samples_read: int | None = None) -> None:
        """Enter the next batch and what was skipped for it.

        Args:
            samples_read: samples that were read for it; None: `batch_size`.

        Raises:
            ValueError: if too large a share of the samples is bad.
        """
        rows = [hidden({"batch": self.batch, **{k: v for k, v in one._asdict().items() if v is not None}}) for one in skipped]
        self.batch += 1
        self.tried += (self.batch_size if samples_read is None else samples_read) + len(rows)
        if not rows:
            return
        append_text(self.path, "".join(json_text(row) + "\n" for row in rows))
        self.kinds.update(one.kind for one in skipped)
        self.sources.update(one.source for one in skipped if one.source is not None)
        self.bad += sum(one.counts for one in skipped)
        if self.bad > self.max_bad_fraction * max(self.tried, self.minimum):
            last = next(one for one in reversed(skipped) if one.counts)
            raise ValueError(
                f"{self.bad} of {self.tried} samples cannot be used ({self.counted()}), more than data.max_bad_fraction="
                f"{self.max_bad_fraction}. The last one: {last.reason}. All are listed in {self.path}"
                + ("" if self.sources else "; data.validate=true checks the files without training")
            )

    def counted(self) -> str:
        """How many of each kind and of each source, the most frequent first."""
        counted = (one.most_common() for one in (self.kinds, self.sources) if one)
        return "; of ".join(", ".join(f"{name}: {n}" for name, n in counts) for counts in counted)

    def note(self) -> str:
        """A few words for the progress bar; none if every sample was used."""
        total = sum(self.kinds.values())
        sources = ", ".join(f"{name} {number}" for name, number in self.sources.most_common())
        return f"skipped {total}{f' ({sources})' if sources else ''}" if total else ""

    def summary(self) -> str | None:
        """A line for the end of the stage; None if every sample was used."""
        total = sum(self.kinds.values())
        skipped = f"{total} of {self.tried} samples were skipped"
        return f"{skipped} ({self.counted()}); {self.path} names them" if total else None
