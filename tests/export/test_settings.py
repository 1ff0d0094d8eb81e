"""What a user gets wrong on the command line of `export.py`: named with the valid choices, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from runs import call

from lightning_internvl.checkpoints import handoff, weight_source
from lightning_internvl.checkpoints.weight_source import fingerprint
from lightning_internvl.cli import CONF
from lightning_internvl.config.targets import build
from lightning_internvl.export.report import ExportOptions
from lightning_internvl.export.settings import check_settings
from lightning_internvl.export.write import export
from lightning_internvl.inference.load_run import open_run
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.messages import ConfigError
from lightning_internvl.stages.base import BaseWeights
from lightning_internvl.stages.freezing import FreezePlan

MakeRun = Callable[..., Path]


def settings(*overrides: str) -> object:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return check_settings(
            OmegaConf.to_container(compose("export", overrides=list(overrides)), resolve=True, throw_on_missing=True)
        )


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("run=nowhere", "run=nowhere: there is no such folder; give a run"),
        ("dtype=bfloat", "dtype='bfloat' is not known; did you mean 'bfloat16'? valid choices: float32, bfloat16, float16"),
        ("max_shard_gb=0", "max_shard_gb=0 must be a number above 0"),
        ("adapter=some", "adapter='some' must be true"),
    ],
)
def test_settings(tmp_path: Path, override: str, problem: str) -> None:
    name, _, value = override.partition("=")
    given = {"run": str(tmp_path), "to": str(tmp_path / "out"), name: value}
    with pytest.raises(ConfigError) as caught:
        settings(*(f"{key}={text}" for key, text in given.items()))
    assert problem in str(caught.value)


def test_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ConfigError, match="exists and is not an empty folder; choose another one"):
        settings(f"run={tmp_path}", f"to={tmp_path}")


def test_gguf_files(tmp_path: Path) -> None:
    to = tmp_path / "m.gguf"
    (tmp_path / "mmproj-m.gguf").touch()
    with pytest.raises(ConfigError) as caught:
        settings(f"run={tmp_path}", f"to={to}", "adapter=true")
    assert f"to={tmp_path / 'mmproj-m.gguf'} exists; choose another name" in str(caught.value)
    assert "adapter=true writes a folder for peft" in str(caught.value)


def command(*words: str) -> str:
    done = call("export.py", *words)
    assert done.code == 2
    return done.err


def test_the_command_names_what_is_missing_and_writes_nothing(tmp_path: Path) -> None:
    assert "run has no value; give run=VALUE" in command()
    assert "did you mean 'dtype'" in command(f"run={tmp_path}", f"to={tmp_path}/out", "dtyp=float32")
    message = command(f"run={tmp_path}", f"to={tmp_path}/out")
    assert "is neither a run (config.yaml) nor a hand-off folder (manifest.json)" in message
    assert not any(tmp_path.iterdir())


def test_an_unfinished_run(make_run: MakeRun) -> None:
    run = make_run("llava_toy")
    (run / "handoff").rename(run / "elsewhere")
    with pytest.raises(ValueError, match="no stage of this run has finished; use resume="):
        open_run(run, build)


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        ("llava2", r"layout='llava2' is not known; valid choices: blip2_hf, .*, handoff"),
        ("qwen2_vl", r"layout=qwen2_vl cannot hold this model; valid choices: llava, llava_native, handoff"),
    ],
)
def test_layouts(make_run: MakeRun, tmp_path: Path, layout: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        export(open_run(make_run("llava_toy"), build), tmp_path / "out", ExportOptions(layout=layout))
    assert not (tmp_path / "out").exists()


def test_our_own_layout_keeps_its_type(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype=bfloat16 is not known to layout=handoff"):
        export(open_run(make_run("internvl_probe_toy"), build), tmp_path / "out", ExportOptions(dtype="bfloat16"))


def test_adapters_on_another_base_than_they_were_trained_on(make_run: MakeRun) -> None:
    base, run = make_run("llava_toy", name="base"), make_run("llava_toy", "peft=lora")
    opened = open_run(run, build)
    manifest = weight_source.read_handoff(opened.folder)[1]
    place = base / "handoff" / "supervised"
    frozen = frozenset(n for n in own_tensors(opened.view.model) if n.startswith("encoder."))
    plan = FreezePlan(["decoder"], manifest["config"]["peft"])
    known = {"stage": "supervised", "step": 1, "config": manifest["config"], "plan": plan}
    handoff.save(opened.view.model, opened.folder, **known, base=BaseWeights(str(place), frozen, fingerprint(place)))
    open_run(run, build)
    other = make_run("llava_toy", "seed=1", name="other")
    place.rename(base / "away")
    (other / "handoff" / "supervised").rename(place)
    (place / "manifest.json").write_text((place / "manifest.json").read_text().replace('"step": 1', '"step": 2'))
    with pytest.raises(ValueError, match="holds adapters for another base"):
        open_run(run, build)
