"""`evaluate.py` as a command: what it measures, what it leaves behind, and faults that are found early."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from PIL import Image
from runs import ROOT, Outcome, call, read_json, tiny_run

from lightning_internvl.config.model_source import READING
from lightning_internvl.evaluation import lmms
from lightning_internvl.evaluation.command import EvalJob, _forget_others, _record
from lightning_internvl.evaluation.settings import check_settings
from lightning_internvl.messages import ConfigError


def evaluate(*arguments: str) -> Outcome:
    """`python evaluate.py ARGUMENTS`."""
    return call("evaluate.py", *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that also kept its best weights on the way."""
    track = (
        "callbacks.tracking.every_n_steps=2",
        "callbacks.tracking.samples=10",
        "callbacks.tracking.best={supervised: caption_cider}",
    )
    return tiny_run(tmp_path_factory.mktemp("run") / "tiny", *track)


def test_what_training_measured_is_measured_again(run: Path) -> None:
    outcome = evaluate(f"run={run}")
    assert outcome.code == 0, outcome.err
    trained, found = read_json(run / "metrics.json"), read_json(run / "evaluation" / "metrics.json")
    assert found == {f"scenes/{stage}": metrics for stage, metrics in trained.items() if metrics}
    assert len(read_json(run / "evaluation" / "scenes" / "supervised" / "cases.json")) == 8  # all questions of the tiny run


def test_the_best_weights_on_the_way(run: Path, tmp_path: Path) -> None:
    lines = (run / "stages" / "supervised" / "history.jsonl").read_text().splitlines()
    values = [row["val/caption_cider"] for row in map(json.loads, lines) if "val/caption_cider" in row]
    best = read_json(run / "stages" / "supervised" / "best.json")
    assert len(values) == 3
    assert best["value"] == max(values)
    assert [path.name for path in (run / "best").iterdir()] == ["supervised"]
    assert read_json(run / "best" / "supervised" / "manifest.json")["step"] == best["step"]
    outcome = evaluate(f"run={run}/best/supervised", "task=vqa", "samples=1", f"to={tmp_path}")
    assert outcome.code == 0, outcome.err
    assert "Right and wrong" in (run / "report.html").read_text()


def test_tasks_their_answers_and_their_records(run: Path, tmp_path: Path) -> None:
    arguments = f"run={run}", "task=[vqa,captions]", "samples=3", f"to={tmp_path}", "task.captions.meteor=false", "cases=1"
    outcome = evaluate(*arguments)
    assert outcome.code == 0, outcome.err
    found = read_json(tmp_path / "metrics.json")
    assert {"accuracy", "accuracy_chance", "samples"} <= found["vqa"].keys()
    record = read_json(tmp_path / "vqa" / "record.json")
    assert (record["prompt"], record["settings"]["max_new_tokens"], record["settings"]["version"]) == ("{question}", 16, 1)
    assert record["model"]["place"] == str(run / "handoff" / "supervised")
    rows = [json.loads(line) for line in (tmp_path / "vqa" / "predictions.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"key", "part", "question", "answer", "truth", "score"}] * 3
    page = (tmp_path / "index.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")

    predictions = tmp_path / "vqa" / "predictions.jsonl"
    rows[0]["answer"] = rows[0]["truth"].partition(" (")[0]  # as if the model had been right
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(*arguments).code == 0
    assert read_json(tmp_path / "metrics.json")["vqa"]["accuracy"] > found["vqa"]["accuracy"]  # it was not asked again
    assert "asked again" in evaluate(*arguments, "task.vqa.max_new_tokens=4").out
    assert read_json(tmp_path / "metrics.json")["captions"] == found["captions"]


def test_a_score_comes_out_again_from_its_record(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "vqa" / "record.json"
    assert evaluate(f"run={run}", "task=vqa", "samples=2", f"to={tmp_path}", "task.vqa.max_new_tokens=3").code == 0
    record = read_json(path)
    assert record["asked"]["run"] == str(run / "handoff" / "supervised")
    (tmp_path / "vqa" / "replay" / "vqa").mkdir(parents=True)
    for _ in range(2):  # the second time, answers of the first are there, and all is asked again all the same
        outcome = evaluate(f"record={path}")
        assert outcome.code == 0, outcome.err
        assert f"all {len(record['metrics'])} numbers are those of {path}, to the last digit" in outcome.out
        again = tmp_path / "vqa" / "replay" / "vqa"
        assert read_json(again / "record.json")["settings"] == record["settings"]
        rows = [json.loads(line) for line in (again / "predictions.jsonl").read_text().splitlines()]
        (again / "predictions.jsonl").write_text("".join(json.dumps(row | {"answer": "x"}) + "\n" for row in rows))
    record["metrics"]["accuracy"] += 1e-16 + 1
    path.write_text(json.dumps(record))
    outcome = evaluate(f"record={path}")
    assert outcome.code == 2
    assert f"numbers differ; accuracy: {record['metrics']['accuracy']} then, " in outcome.err


def test_answers_of_a_model_that_was_read_in_another_way_are_forgotten(tmp_path: Path) -> None:
    model = SimpleNamespace(place="model", weights="1f", dtype="float32")
    reading = dict.fromkeys(READING)
    first, again, other = (
        _record(EvalJob("vqa", None, model, {"version": 1}), SimpleNamespace(reading=read))
        for read in (reading, reading, {**reading, "template": "vicuna"})
    )
    (tmp_path / "predictions.jsonl").write_text("{}")
    (tmp_path / "record.json").write_text(json.dumps(first))
    _forget_others(tmp_path, again)
    assert (tmp_path / "predictions.jsonl").exists()
    _forget_others(tmp_path, other)
    assert not (tmp_path / "predictions.jsonl").exists()


def test_a_run_as_a_model_of_lmms_eval(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself is large; what the adapter needs of it is a base class that remembers tasks."""

    class Base:
        def __init__(self) -> None:
            self.task_dict, self.cache_hook = {}, SimpleNamespace(add_partial=lambda *_: None)

    for name, content in {"lmms_eval": {}, "api": {}, "api.model": {"lmms": Base}, "api.instance": {"Instance": object}}.items():
        module = ModuleType(name if name == "lmms_eval" else f"lmms_eval.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "lightning_internvl.evaluation.lmms_adapter", raising=False)
    from lightning_internvl.evaluation.lmms_adapter import LightningInternVL

    model = LightningInternVL(run=str(run), batch_size="4", max_batch_size=None)
    shown = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    model.task_dict["colours"] = {"test": shown}
    asked = [
        SimpleNamespace(
            args=("what colour is it?", {"max_new_tokens": n, "until": ["\n"]}, lambda doc: [doc], i, "colours", "test")
        )
        for i, n in ((0, 6), (1, 3), (1, 6))
    ]
    pictures = [np.array(picture) for picture in shown]
    with model.predictor.evaluating() as predictor:
        expected = [predictor.answer([pictures[i]], ["what colour is it?"], n)[0] for i, n in ((0, 6), (1, 3), (1, 6))]
    assert model.generate_until(asked) == expected
    own = expected[0]
    choices = [SimpleNamespace(args=(asked[0].args[0], f" {text}", *asked[0].args[2:])) for text in (own, "two pigs")]
    (likely, _), (unlikely, greedy) = model.loglikelihood(choices)
    assert likely < unlikely
    assert not greedy
    with pytest.raises(ValueError, match="asks in several rounds"):
        model.generate_until_multi_round(asked)
    with pytest.raises(ConfigError, match="--model_args rnu: did you mean 'run'"):
        LightningInternVL(rnu=str(run))


def test_lmms_eval_that_is_not_there_comes_with_the_line_that_installs_it() -> None:
    with patch("importlib.util.find_spec", return_value=None), pytest.raises(ConfigError, match=r"-r requirements-lmms\.txt"):
        lmms.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run={tmp}", "task=vqq"], "there is no 'vqq' in the group task; did you mean 'vqa'?"),
        (["run={tmp}", "task=[]"], "task=[] measures nothing"),
        (["run={tmp}", "task=[vqa]", "task.vqa.pth=x"], "in task.vqa: did you mean 'path'?"),
        (["run={tmp}", "task=pope", "task.pope.path=/nowhere"], "path=/nowhere: there is no such file or folder"),
        (["run={tmp}"], "is neither a run (config.yaml) nor a hand-off folder"),
        (["run={run}/handoff/contrastive", "task=vqa"], "task.vqa needs a decoder that answers; there is contrastive"),
        (["run={run}", "device=gpu"], "device='gpu' is not known"),
    ],
)
def test_faults(arguments: list[str], message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = evaluate(*(argument.format(tmp=tmp_path, run=run) for argument in arguments))
    assert outcome.code == 2
    assert message in outcome.err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"run": None}, "nothing to measure; give run=FOLDER"),
        ({"model": "a"}, "exclude each other; leave one out"),
        ({"run": "nowhere"}, "run=nowhere: there is no such folder"),
        ({"template": "vicuna"}, "template: a run knows how it reads; only with model="),
        ({"task": {"vqa": {"path": "x"}}}, "task.vqa={'path': 'x'} is no task; choose it first, as in task=[vqa]"),
        ({"task": {"vqa": {"_target_": "x"}}}, "task.vqa has no version"),
        ({"task": {"vqa": {"_target_": "x", "version": 1, "samples": 0}}}, "task.vqa.samples=0 must be a whole number from 1 on"),
        ({"samples": 2.5}, "samples=2.5 must be a whole number from 1 on"),
        ({"max_missing": 2}, "max_missing=2 must be a share from 0 to 1"),
        ({"dtype": "float31"}, "dtype='float31' is not known; did you mean 'float32'?"),
    ],
)
def test_faults_that_need_no_model(changed: dict[str, Any], message: str) -> None:
    plain = yaml.safe_load((ROOT / "conf" / "evaluate.yaml").read_text())
    task = {"scenes": {"_target_": "lightning_internvl.evaluation.stage_tasks.StageTasks", "version": 1}}
    with pytest.raises(ConfigError) as error:
        check_settings({**plain, "run": str(ROOT), "task": task, **changed})
    assert message in str(error.value)
