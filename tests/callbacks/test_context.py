"""What a callback is given: the settings that its YAML names, and, where it asks for it, the context of its stage."""

from __future__ import annotations

from typing import Any

import pytest
from lightning import Callback

from lightning_internvl.config.targets import build
from lightning_internvl.training.assembly import build_callbacks
from lightning_internvl.training.context import StageContext


class Mine(Callback):
    """A callback whose parameters are named as fields of the context."""

    def __init__(self, *, every: int, settings: Any = None, view: Any = None, tokenizers: Any = "mine") -> None:
        self.given = (every, settings, view, tokenizers)


class Curious(Callback):
    def setup_stage(self, context: StageContext) -> None:
        self.context = context


def built(*nodes: dict[str, Any]) -> list[Any]:
    context = StageContext(settings=None, view="view", predictor=None, tasks={}, tokenizers={"decoder": "words"}, build=build)
    return build_callbacks({str(number): node for number, node in enumerate(nodes)}, context)


def test_parameters_are_not_filled_by_their_names() -> None:
    (mine,) = built({"_target_": f"{__name__}.Mine", "every": 3})
    assert mine.given == (3, None, None, "mine")


def test_a_callback_that_asks_knows_its_stage() -> None:
    (curious,) = built({"_target_": f"{__name__}.Curious"})
    assert curious.context.view == "view"
    assert curious.context.tokenizers == {"decoder": "words"}


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="does not know evry; valid choices: every"):
        built({"_target_": f"{__name__}.Mine", "evry": 3})
