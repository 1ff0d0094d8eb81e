"""The description of a checkpoint's tensors is read, and nothing that else stands in its place is run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from lightning_internvl.distributed.checkpoint_files import TensorReader

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
TENSORS = {"model/a": torch.arange(6.0).view(2, 3), "model/b": torch.ones(2, dtype=torch.bfloat16), "step": torch.tensor(3.0)}


class Calls:
    """Unpickled, a call of `os.mkdir`."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    dcp.save(dict(TENSORS), checkpoint_id=tmp_path / "saved")
    return tmp_path / "saved"


def test_tensors_are_read(checkpoint: Path) -> None:
    reader = TensorReader(checkpoint)
    assert reader.read_metadata().state_dict_metadata.keys() == TENSORS.keys()
    found = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    dcp.load(found, storage_reader=reader)
    assert all(found[name].equal(tensor) for name, tensor in TENSORS.items())


def test_a_description_that_calls_something_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Calls(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"\.metadata is refused: it names posix\.mkdir"):
        TensorReader(checkpoint).read_metadata()
    assert not (tmp_path / "ran").exists()


def test_an_entry_that_is_a_pickle_is_refused(checkpoint: Path) -> None:
    described = pickle.loads((checkpoint / ".metadata").read_bytes())
    described.state_dict_metadata["model/a"] = BytesStorageMetadata()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(described))
    with pytest.raises(ValueError, match=r"it names torch\.distributed\.checkpoint\.metadata\.BytesStorageMetadata"):
        TensorReader(checkpoint).read_metadata()
