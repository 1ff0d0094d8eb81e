"""A batch of one pair gives a contrast and a match nothing to compare it with."""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_internvl.cli import CONF
from lightning_internvl.config.pair_checks import pair_faults
from lightning_internvl.config.stage_settings import stage_settings


def faults(name: str, batch_size: int, devices: Any, resume: str | None = None) -> list[str]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = [f"stages.{name}.batch_size={batch_size}", f"trainer.devices={devices}", "paths.run=unused"]
        config = OmegaConf.to_container(compose("config", overrides=words), resolve=True)
    return list(pair_faults({**config, "resume": resume}, stage_settings(config, name)))


@pytest.mark.parametrize(
    ("name", "batch_size", "devices"), [("contrastive", 2, 1), ("contrastive", 1, 2), ("generative", 2, 1), ("supervised", 1, 1)]
)
def test_what_has_something_to_compare_is_accepted(name: str, batch_size: int, devices: int) -> None:
    assert not faults(name, batch_size, devices)


def test_one_pair_is_refused_with_the_setting_that_helps() -> None:
    (alone,) = faults("contrastive", 1, 1)
    assert "ITC (itc) has nothing to compare a single pair with" in alone
    assert "give stages.contrastive.batch_size=2 or more" in alone
    (shared,) = faults("generative", 1, 2)  # wrong captions come from the same device
    assert "ITM (itm) shows a wrong partner from the batch of the same device" in shared


def test_after_a_resume_on_more_devices_fewer_of_them_help() -> None:
    (fault,) = faults("generative", 1, 4, resume="RUN")
    assert "resume on fewer: at most half as many, trainer.devices=N" in fault
    assert "batch_size=2" not in fault
