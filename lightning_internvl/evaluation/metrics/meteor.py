"""METEOR (Denkowski and Lavie, 2014), by its own Java program, which `pycocoevalcap` brings."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import IO

from lightning_internvl.evaluation.metrics.ptb_tokenizer import tools

MARK = " ||| "


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The score of all captions together, from 0 to 1; captions are words with blanks between them.

    Raises:
        ValueError: if the program fails.
    """
    command = ["java", "-jar", "-Xmx2G", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "encoding": "utf-8"}
    with subprocess.Popen(command, cwd=tools() / "meteor", **pipes) as program:
        try:
            counts = [
                _told(program, MARK.join(["SCORE", *map(_plain, own), _plain(candidate)]))
                for candidate, own in zip(candidates, references, strict=True)
            ]
            _told(program, MARK.join(["EVAL", *counts]))  # the score of the first caption; those of the others follow
            for _ in candidates[1:]:
                _line(program.stdout)
            return float(_line(program.stdout))
        finally:
            program.kill()


def _told(program: subprocess.Popen[str], line: str) -> str:
    """What the program answers to a line."""
    try:
        program.stdin.write(f"{line}\n")
        program.stdin.flush()
    except BrokenPipeError as error:
        raise ValueError("METEOR's program has ended before it was done; leave it out with meteor=false") from error
    return _line(program.stdout)


def _line(stream: IO[str]) -> str:
    if not (line := stream.readline()):
        raise ValueError("METEOR's program has ended before it was done; leave it out with meteor=false")
    return line.strip()


def _plain(text: str) -> str:
    return text.replace("|||", "").replace("  ", " ")
