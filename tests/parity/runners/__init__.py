"""One module per family of systems; each says which fixtures it knows and computes their outputs with this project."""

from __future__ import annotations

from typing import Protocol

from golden import Fixture
from torch import Tensor

from . import (
    blip2_hf,
    blip2_lavis,
    clip,
    clip_loss,
    deepseek_vl,
    internvl_chat_llava,
    internvl_g,
    internvl_native,
    internvl_retrieval,
    internvl_tiles,
    llava,
    llava_native,
    llava_preprocess,
    minigpt4,
    qwen2_vl,
    qwen_vl,
    xcomposer1,
    xcomposer2,
)


class Runner(Protocol):
    """What a module of this folder offers."""

    SYSTEM: str
    ECHOES: frozenset[str]  # outputs that repeat an input

    def knows(self, fixture: Fixture) -> bool:
        """Whether the fixture is of this family."""

    def run(self, fixture: Fixture) -> dict[str, Tensor]:
        """Our value of every output."""


RUNNERS: tuple[Runner, ...] = (
    internvl_g,
    internvl_retrieval,
    internvl_native,
    internvl_chat_llava,
    internvl_tiles,
    clip,
    qwen2_vl,
    xcomposer2,
    xcomposer1,
    minigpt4,
    llava,
    llava_native,
    qwen_vl,
    deepseek_vl,
    llava_preprocess,
    clip_loss,
    blip2_lavis,
    blip2_hf,
)


def runner_for(fixture: Fixture) -> Runner:
    """The runner that knows a fixture.

    Raises:
        LookupError: if none does.
    """
    for runner in RUNNERS:
        if runner.knows(fixture):
            return runner
    known = "; ".join(runner.SYSTEM for runner in RUNNERS)
    raise LookupError(f"no runner knows the system {fixture.system!r} in {fixture.folder}; known systems: {known}")
