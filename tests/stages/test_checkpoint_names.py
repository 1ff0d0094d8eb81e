"""What a checkpoint's file holds beside its values."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from lightning_internvl.stages.base import with_names_of_code


def test_state_that_begins_behind_a_resume_leaves_the_same_bytes(tmp_path: Path) -> None:
    """A file holds a name once where it is one object."""

    def begun() -> tuple[list[torch.Tensor], torch.optim.AdamW]:
        weights = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
        return weights, torch.optim.AdamW(weights)

    def step(weights: list[torch.Tensor], optimizer: torch.optim.AdamW) -> None:
        sum((weight**2).sum() for weight in weights).backward()
        optimizer.step()
        optimizer.zero_grad()

    def saved(optimizer: torch.optim.AdamW, name: str) -> Path:
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")  # whose name the file holds
        return (tmp_path / "state.pt").rename(tmp_path / name)

    whole, left_alone = begun()
    step(whole[:1], left_alone)
    again, resumed = begun()
    again[0].data.copy_(whole[0].data)
    resumed.load_state_dict(with_names_of_code(torch.load(saved(left_alone, "early"), weights_only=True)))
    step(whole, left_alone)
    step(again, resumed)
    pickles = [zipfile.ZipFile(saved(one, name)).read("state/data.pkl") for one, name in ((left_alone, "one"), (resumed, "two"))]
    assert pickles[0] == pickles[1]
