"""A loaded model is built again from the configurations of its parts, and computes the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from torch import nn

from lightning_internvl import load_pretrained
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.model.compose import compose_model, trusted_build
from lightning_internvl.model.vlm import VLM
from lightning_internvl.protocols import Part

sys.path.insert(0, str(Path(__file__).parent / "parity"))

from golden import HERE, Fixture, extra_roots, find
from runners import runner_for

FIXTURES = [fixture for fixture in find(HERE, *extra_roots()) if hasattr(runner_for(fixture), "load_pretrained")]
PARTS = ("encoder", "middleware", "decoder")


def rebuilt(folder: Path) -> VLM:
    """The model of a folder, its parts built anew from what they say of themselves, with the same weights."""
    model = load_pretrained(folder)
    parts = {part: json.loads(json.dumps(getattr(model, part).config)) for part in PARTS if getattr(model, part) is not None}
    if model.middleware is None:
        again = VLM(trusted_build(parts["encoder"]), objectives=dict(model.objectives))
    else:
        again = compose_model(parts, trusted_build)[0]
        again.objectives = model.objectives
    theirs, ours = own_tensors(model), own_tensors(again)
    assert {name: tensor.shape for name, tensor in theirs.items()} == {name: tensor.shape for name, tensor in ours.items()}
    for name, tensor in ours.items():
        tensor.copy_(theirs[name])
    for name in ("image_token_id", "video_token_id", "image_placeholders", "config"):
        setattr(again, name, getattr(model, name))
    return again.eval()


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: f"{fixture.folder.parent.name}/{fixture.folder.name}")
def test_same_numbers_bit_for_bit(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_for(fixture)
    expected = runner.run(fixture)
    monkeypatch.setattr(runner, "load_pretrained", rebuilt)
    found = runner.run(fixture)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not tensor.equal(found[name])] == []


class Outer(Part):
    def __init__(self, width: int, *, inner: Part | None = None, **settings: int) -> None:
        super().__init__()
        self.inner, self.table = inner, nn.Linear(width, settings.get("depth", 1))


class Named(Outer):
    def __init__(self, *, name: str = "a", **settings: int) -> None:
        super().__init__(settings.pop("width"), **settings)


def test_what_a_constructor_was_told_is_remembered() -> None:
    part = Named(name="b", width=3, depth=2, inner=Outer(4))
    assert part.config == {
        "_target_": f"{__name__}.Named", "name": "b", "width": 3, "depth": 2,
        "inner": {"_target_": f"{__name__}.Outer", "width": 4},
    }  # fmt: skip
    assert list(part.state_dict()) == ["inner.table.weight", "inner.table.bias", "table.weight", "table.bias"]
