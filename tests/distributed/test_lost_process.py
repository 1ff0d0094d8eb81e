"""What is said where another process of a run has gone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_internvl.pipeline import explain_lost_process


@pytest.mark.parametrize("kind", [torch.distributed.DistNetworkError, torch.distributed.DistStoreError])
def test_a_process_that_ends_before_all_have_met_is_told(kind: type[RuntimeError]) -> None:
    lost = pytest.raises(ValueError, match=r"^another process of this run has ended \(nobody there\); .* resume=RUN$")
    with lost, explain_lost_process(Path("RUN")):
        raise kind("nobody there\nbacktrace")


def test_errors_of_one_process_are_its_own() -> None:
    with pytest.raises(RuntimeError, match=r"^Connection closed by peer$"), explain_lost_process(Path("RUN")):
        raise RuntimeError("Connection closed by peer")
