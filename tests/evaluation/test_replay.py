"""`record=PATH`: what a record says of the command, and records that are none or name what is not trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import ROOT

from lightning_internvl.config.model_source import ModelSource
from lightning_internvl.evaluation.replay import check_replay, with_record
from lightning_internvl.messages import ConfigError

RECORD: dict[str, Any] = {
    "task": "scenes/supervised",
    "settings": {"_target_": "lightning_internvl.evaluation.stage_tasks.StageTasks", "version": 1, "tasks": {"a": {}}},
    "model": {"weights": "1f", "place": "run/handoff/supervised"},
    "asked": {"run": "run/handoff/supervised", "device": "cpu", "dtype": "auto", "batch_size": 7, "to": "elsewhere"},
    "metrics": {"accuracy": 0.1, "bad": float("nan")},
}


def settings(**given: Any) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "conf" / "evaluate.yaml").read_text()) | {"task": {"scenes": {}}} | given


def written(folder: Path, **changed: Any) -> str:
    (folder / "record.json").write_text(json.dumps(RECORD | changed))
    return str(folder / "record.json")


def test_the_settings_are_those_of_the_record(tmp_path: Path) -> None:
    found = with_record(settings(record=written(tmp_path), trust=[]))
    assert (found["run"], found["device"], found["batch_size"], found["model"]) == ("run/handoff/supervised", "cpu", 7, None)
    assert found["task"] == {"scenes": {"_target_": RECORD["settings"]["_target_"], "version": 1}}
    assert found["to"] == str(tmp_path / "replay")
    assert with_record(settings()) == settings()
    asked = {"model": str(tmp_path), "template": "vicuna", "encoder": str(tmp_path)}
    reading = ModelSource.of(with_record(settings(record=written(tmp_path, asked=asked), trust=[]))).reading
    assert {name: value for name, value in reading.items() if value} == {"template": "vicuna", "encoder": str(tmp_path)}


@pytest.mark.parametrize(
    ("changed", "given", "message"),
    [
        ({}, {"run": "x", "task": {"vqa": {}}}, "says the run, task; leave them out"),
        ({"metrics": None}, {}, "is no record of a finished score: it has no metrics"),
        ({"settings": {}}, {}, "it has no settings._target_"),
        ({"settings": {"_target_": "os.system", "command": "true"}}, {}, "os.system"),
        ({"settings": {"_target_": RECORD["settings"]["_target_"], "path": "${oc.env:HOME}"}}, {}, "oc.env"),
        ({"asked": {"model": "somebody/a-model"}}, {}, "asked.model: 'somebody/a-model' comes with the folder"),
        ({}, {"decoder": {"pretrained": "x"}}, "says the decoder; leave them out"),
    ],
)
def test_records_that_are_refused(changed: dict[str, Any], given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        with_record(settings(record=written(tmp_path, **changed), **given))
    assert message in str(error.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"record=nowhere.json cannot be read"):
        with_record(settings(record="nowhere.json"))


def test_numbers_and_weights_are_compared() -> None:
    assert check_replay(RECORD, RECORD, "r.json") == "all 2 numbers are those of r.json, to the last digit"
    with pytest.raises(ValueError, match=r"r.json: 1 of 2 numbers differ; accuracy: 0.1 then, 0.10000000000000002 now"):
        check_replay(RECORD, RECORD | {"metrics": RECORD["metrics"] | {"accuracy": 0.1 + 2e-17}}, "r.json")
    with pytest.raises(ValueError, match="the weights of run/handoff/supervised are others"):
        check_replay(RECORD, RECORD | {"model": RECORD["model"] | {"weights": "2e"}}, "r.json")
