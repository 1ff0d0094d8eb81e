"""What tests compose is what Hydra and OmegaConf compose as they are, whatever was composed before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, base
from quick_hydra import QUICK, as_published

from lightning_internvl.cli import CONF

PLACES = ("paths.run=run", "paths.sweep=sweep")  # else they hold the time


def composed(folder: Path, *words: str) -> tuple[str, Any]:
    """A configuration as written and as resolved; a change of it must not come back in the next one."""
    with initialize_config_dir(str(folder), version_base="1.3"):
        config = compose("config", overrides=[*words])
    found = OmegaConf.to_yaml(config), OmegaConf.to_container(config, resolve=True)
    OmegaConf.set_struct(config, False)
    OmegaConf.update(config, "encoder.dim", "changed", force_add=True)
    return found


@pytest.mark.parametrize(
    "words",
    [
        ["debug=fast"],
        ["experiment=blip2_toy", "middleware@stages.supervised.middleware=perceiver_resampler", "++data.more=[1,{a: 2}]"],
        ["experiment=finetune", "peft=qlora", "init_from=owner/name", "~callbacks.report"],
    ],
)
def test_a_recipe(words: list[str]) -> None:
    with as_published():
        expected = [composed(CONF, *words, *PLACES, seed) for seed in ("seed=1", "seed=2")]
    for _ in range(2):  # made, and taken from what was kept
        assert [composed(CONF, *words, *PLACES, seed) for seed in ("seed=1", "seed=2")] == expected


def test_a_defaults_list_that_refers_to_its_choices(tmp_path: Path) -> None:
    for name in ("small", "large"):
        for group in ("encoder", "data"):
            (tmp_path / group).mkdir(exist_ok=True)
            (tmp_path / group / f"{name}.yaml").write_text(f"dim: {name}\nsame: ${{encoder.dim}}\n")
    (tmp_path / "config.yaml").write_text("defaults: [_self_, {encoder: small}, {data: '${encoder}'}]\n")
    with as_published():
        expected = composed(tmp_path, "encoder=large")
    assert composed(tmp_path, "encoder=large") == expected
    assert expected[1]["data"] == {"dim": "large", "same": "large"}


def test_inside_nothing_is_changed() -> None:
    with as_published():
        assert not [name for owner, name, quick in QUICK if vars(owner).get(name) is quick]
    assert base.Metadata.__deepcopy__
