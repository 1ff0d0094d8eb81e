"""Where in a picture a score comes from, of models whose answer is known, and in runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import STAGES, losses, read_json, same_weights, tiny_run
from torch import Tensor, nn

from lightning_internvl.data.processors.basic import CenterCrop, Squash, Tiles
from lightning_internvl.data.processors.padded import PadSquare
from lightning_internvl.inference.relevance import MOST, SIDE, relevance, sees_whole


class Patches(nn.Module):
    """An encoder that returns the states it was made with, and notes whether a graph was kept."""

    special_tokens = 1

    def __init__(self, states_1PD: Tensor) -> None:
        super().__init__()
        self.states, self.kept = nn.Parameter(states_1PD), []

    def forward(self, pixels: Any, layers: Any = ()) -> list[Tensor]:
        state = self.states * 1.0
        self.kept.append(state.requires_grad)
        return [state]


def found(states_PD: Tensor, slope_D: Tensor) -> Any:
    """The grid of a score that is linear in the patches behind a first, special token."""
    model = nn.Module()
    model.encoder = Patches(torch.cat([torch.full((1, states_PD.shape[1]), 50.0), states_PD])[None])
    weight = nn.Parameter(slope_D)
    with torch.no_grad():
        grid = relevance(model, lambda: (model.encoder(None)[0][0, 1:] @ weight).sum() + model.encoder.states.sum() * 0)
        assert not torch.is_grad_enabled()
    assert model.encoder.kept == [False]
    assert weight.grad is None
    assert model.encoder.states.grad is None
    assert model.encoder(None)[0].requires_grad  # nothing hangs on it any more
    return grid


def test_of_a_linear_score_it_is_how_far_a_patch_lies_from_the_mean() -> None:
    states = torch.zeros(4, 2)
    states[1, 0], states[2, 0], states[3, 1] = 8.0, 4.0, 90.0  # the last one in what the score does not read
    # means are 3, so the differences are -3, 5, 1, -3
    assert found(states, torch.tensor([1.0, 0.0])) == [[round(MOST * 3 / 5), MOST], [round(MOST / 5), round(MOST * 3 / 5)]]


def test_a_fine_grid_becomes_a_smaller_one() -> None:
    states = torch.zeros(32 * 32, 1)
    states[:2] = states[32:34] = 1.0
    grid = found(states, torch.ones(1))
    assert len(grid) == len(grid[0]) == SIDE
    assert grid[0][0] == MOST
    assert sum(map(sum, grid)) == MOST


@pytest.mark.parametrize("patches", [5, 6, 12])
def test_tokens_that_are_no_square_have_no_grid(patches: int) -> None:
    assert found(torch.rand(patches, 2), torch.ones(2)) is None


def test_a_score_that_reads_nothing_of_the_picture_has_no_grid() -> None:
    assert found(torch.rand(4, 2), torch.zeros(2)) is None


def test_a_grid_lies_only_on_pictures_that_are_one_whole_square() -> None:
    assert sees_whole(Squash(32), 50, 90)
    assert sees_whole(CenterCrop(32), 90, 90)
    assert not sees_whole(CenterCrop(32), 50, 90)
    assert not sees_whole(PadSquare(32), 50, 90)
    assert not sees_whole(PadSquare(32, colour=(0, 0, 0)), 50, 90)
    assert not sees_whole(Tiles(32), 50, 90)


def test_training_is_the_same_to_the_bit_with_it_and_without(tmp_path: Path) -> None:
    with_it = tiny_run(tmp_path / "with", "callbacks.samples.at=[0,0.5,1]", "callbacks.evaluation=null")
    without = tiny_run(
        tmp_path / "without", "callbacks.samples.at=[0,0.5,1]", "callbacks.samples.relevance=false", "callbacks.evaluation=null"
    )
    for stage, kind in zip(STAGES, ("similarity", "caption", "similarity", "answer"), strict=True):
        assert same_weights(with_it, without, stage)
        assert losses(with_it, stage) == losses(without, stage)
        files = sorted((with_it / "stages" / stage / "samples").iterdir())
        assert len(files) == 3
        for file in files:
            sample = read_json(file)
            assert sample.pop("relevance")["of"] == kind
            assert sample == read_json(without / "stages" / stage / "samples" / file.name)
        grids = read_json(files[-1])["relevance"]["grids"]
        assert [(len(grid), max(max(row) for row in grid)) for grid in grids if grid] == [(2, MOST)] * 2
