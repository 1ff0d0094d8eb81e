"""Lengths in epochs: steps from the size of the file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_internvl.cli import CONF
from lightning_internvl.config.targets import build
from lightning_internvl.messages import ConfigError
from lightning_internvl.training.length import with_lengths

FILES = ("experiment=finetune", "init_from=owner/name", "stages.finetune.batch_size=2")


def stage(*words: str, name: str = "finetune") -> dict[str, Any]:
    """A stage whose steps were counted."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", overrides=list(words)), resolve=True)
    return with_lengths(config, build)["stages"][name]


@pytest.fixture
def chats(tmp_path: Path) -> str:
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    lines = [json.dumps({"id": str(number), "messages": said}) for number in range(40)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    return f"data.path={tmp_path / 'chats.jsonl'}"


def test_steps_are_passes_over_what_is_not_held_out(chats: str) -> None:
    nothing_held_out = (*FILES, chats, "data.validation=null")
    assert stage(*nothing_held_out)["max_steps"] == 60  # 3 x 40 records, 2 a step
    assert stage(*nothing_held_out, "stages.finetune.epochs=0.51")["max_steps"] == 11
    assert stage(*nothing_held_out, "trainer.accumulate_grad_batches=4", "trainer.devices=2")["max_steps"] == 8
    assert stage(*FILES, chats, "data.validation=0.5")["max_steps"] < 60


def test_a_warm_up_fits_into_a_short_stage(chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "warmup_steps" in stage(*FILES, chats)["scheduler"]
    assert not capsys.readouterr().out
    short = stage(*FILES, chats, "stages.finetune.epochs=1", "data.validation=null")
    assert short["scheduler"]["warmup_steps"] == 2
    assert "finetune: scheduler.warmup_steps 2 in place of 15, for 20 steps in all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("stages.finetune.max_steps=9",), "stages.finetune: epochs=3 and max_steps=9 both say how long to train"),
        (("data.packing=true",), r"no epoch is known in steps; give max_steps=N, .* \(20 or fewer an epoch\)"),
        (("data.endless=true",), "epochs=3: stage finetune reads data without an end; give max_steps=N"),
        (("data.path=null",), "no file of conversations is given; give data.path=FILE"),
    ],
)
def test_epochs_are_refused_where_they_say_nothing(words: tuple[str, ...], message: str, chats: str) -> None:
    given = [] if words[0].startswith("data.path") else [chats, "data.validation=null"]
    with pytest.raises(ConfigError if given else ValueError, match=message):
        stage(*FILES, *given, *words)
