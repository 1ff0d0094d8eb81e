"""METEOR (Denkowski and Lavie, 2014), by its own Java program, as `pycocoevalcap` runs it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pycocoevalcap.meteor.meteor import Meteor


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The score of all captions together, from 0 to 1; captions are words with blanks between them.

    Raises:
        ValueError: if the program fails.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    true = {number: [_without_mark(text) for text in own] for number, own in enumerate(references)}
    written = {number: [text] for number, text in enumerate(candidates)}
    program = Meteor()
    try:
        return program.compute_score(true, written)[0]
    except (OSError, ValueError) as error:  # a closed pipe, or an empty line in place of a number
        raise ValueError("METEOR's program has ended before it was done; leave it out with meteor=false") from error
    finally:
        _close(program)


def _without_mark(text: str) -> str:
    """A reference without the separator, which the library takes out of candidates alone."""
    return text.replace("|||", "").replace("  ", " ")


def _close(program: Meteor) -> None:
    """Do what the end of the library's object leaves out: it waits for a lock that an error leaves
    taken, and closes one pipe."""
    if program.lock.locked():
        program.lock.release()
    for pipe in (program.meteor_p.stdin, program.meteor_p.stdout, program.meteor_p.stderr):
        with suppress(BrokenPipeError):
            pipe.close()
