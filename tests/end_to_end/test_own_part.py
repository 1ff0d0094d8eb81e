"""A part, a template-free recipe and a stage setting from a folder outside the repository: one Python file and YAMLs."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import TINY, call, read_json, train

PART = '''
import torch
from torch import nn


class MeanColours(nn.Module):
    """Each cell of a grid as the mean of its colours, widened."""

    def __init__(self, *, image_size, grid=2, dim=16):
        super().__init__()
        self.image_size, self.grid, self.dim, self.depth = image_size, grid, dim, 1
        self.widen = nn.Linear(3, dim)

    def num_tokens(self, image_size=None):
        return 1 + self.grid**2

    def sharding_units(self):
        return [self.widen]

    def forward(self, pixels, *, layers=(-1,), keep=1.0):
        cells = nn.functional.adaptive_avg_pool2d(pixels, self.grid).flatten(2).transpose(1, 2)
        tokens = self.widen(torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1))
        return [tokens for _ in layers]
'''
RECIPE = """# @package _global_
defaults:
  - override /encoder: mean_colours
name: mine
pipeline: [contrastive]
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a part of one's own, its YAML and a recipe."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_encoder.py").write_text(PART)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    for name, text in {
        "encoder/mean_colours.yaml": "_target_: my_encoder.MeanColours\nimage_size: 48\ngrid: 3\n",
        "experiment/mine.yaml": RECIPE,
    }.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return tmp_path / "conf"


def test_a_part_from_outside_trains_in_a_recipe_from_outside(tmp_path: Path, mine: Path) -> None:
    own = [word for word in TINY if not word.startswith("encoder.")]
    outcome = train("--config-dir", str(mine), "experiment=mine", "pipeline=[contrastive]", *own, f"paths.run={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    assert read_json(tmp_path / "run" / "handoff" / "contrastive" / "manifest.json")["config"]["encoder"] == {
        "_target_": "my_encoder.MeanColours", "image_size": 48, "grid": 3,
    }  # fmt: skip
    run = tmp_path / "run"
    refused = train(f"resume={run}")
    assert refused.code == 2
    assert "trust=[my_encoder]" in refused.err
    resumed = train(f"resume={run}", "trust=[my_encoder]")
    assert resumed.code == 0, resumed.err
    gallery = Path(__file__).parents[2] / "docs"
    for command in (
        ("chat.py", f"run={run}", "question=a cat", f"gallery={gallery}"),
        ("evaluate.py", f"run={run}", "samples=4", "task=zero_shot"),
        ("export.py", f"run={run}", f"to={tmp_path / 'exported'}", "layout=handoff"),
    ):
        opened = call(*command, "trust=[my_encoder]")
        assert opened.code == 0, opened.err
    start = ("--config-dir", str(mine), "experiment=mine", "pipeline=[contrastive]", *own, f"init_from={run}")
    again = train(*start, f"paths.run={tmp_path / 'again'}")  # which names the part itself
    assert again.code == 0, again.err


def test_a_part_from_outside_that_cannot_be_imported_is_named(tmp_path: Path, mine: Path) -> None:
    (mine / "encoder" / "mean_colours.yaml").write_text("_target_: my_encoder.MeanColour\nimage_size: 48\n")
    own = [word for word in TINY if not word.startswith("encoder.")]
    outcome = train("--config-dir", str(mine), "experiment=mine", "pipeline=[contrastive]", *own, f"paths.run={tmp_path / 'run'}")
    assert outcome.code == 2
    assert "'my_encoder.MeanColour' cannot be found" in outcome.err


DATASET = """
import numpy as np
from torch.utils.data import Dataset


class Greys(Dataset):
    def __init__(self, side):
        self.side = side

    def __len__(self):
        return 16

    def __getitem__(self, position):
        image = np.full((self.side, self.side, 3), 9 * position, np.uint8)
        return {"key": f"grey/{position}", "image": image, "caption": f"grey {position}", "language": "en"}
"""


def test_a_dataset_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "greys.py").write_text(DATASET)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = [word for word in TINY if not word.startswith("data.")]
    given = (*own, "pipeline=[contrastive]", f"paths.run={tmp_path / 'run'}")
    assert (
        "data.pairs is empty; add one with +data.pairs._target_=VALUE"
        in train(*given, "data=own", "data.pairs._target_=greys.Greys").err
    )
    merged = train(*given, "data.pairs._target_=greys.Greys")
    assert "greys.Greys does not know" in merged.err
    assert "~PATH.NAME leaves one out, data=own has none" in merged.err
    outcome = train(*given, "data=own", "+data.pairs._target_=greys.Greys", "+data.pairs.side=20")
    assert outcome.code == 0, outcome.err
