"""`evaluate.py` with the tasks that are judged on features, on a tiny run and the built-in scenes."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import call, read_json, tiny_run

TASKS = {
    "zero_shot": {"zero_shot_top1", "zero_shot_mean_per_class"},
    "retrieval": {"c_image_to_text_r1", "c_text_to_image_r10"},
    "probe": {"probe_top1", "fitted_on"},
    "segmentation": {"miou", "pixel_accuracy"},
    "video": {"frames1_top1", "frames8_top1"},
}
SMALL = (
    "samples=12", "task.probe.epochs=1", "task.probe.train_samples=64", "task.segmentation.steps=1",
    "task.segmentation.batch_size=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("run") / "tiny", "pipeline=[contrastive]")


def test_all_tasks_on_the_built_in_scenes(run: Path, tmp_path: Path) -> None:
    outcome = call("evaluate.py", f"run={run}", f"task=[{','.join(TASKS)}]", f"to={tmp_path}", *SMALL)
    assert outcome.code == 0, outcome.err
    found = read_json(tmp_path / "metrics.json")
    assert set(found) == set(TASKS)
    for name, wanted in TASKS.items():
        assert wanted <= found[name].keys()
        assert found[name]["samples"] == 12
        assert found[name]["samples_asked"] >= 12
    record = read_json(tmp_path / "retrieval" / "record.json")
    assert record["settings"]["version"] == 2
    assert "12 of" in outcome.out


def test_an_exported_model_scores_as_its_run(run: Path, tmp_path: Path) -> None:
    assert call("export.py", f"run={run}", f"to={tmp_path / 'model'}").code == 0
    found = []
    for source in (f"run={run}", f"model={tmp_path / 'model'}"):  # both see the same first scenes
        outcome = call("evaluate.py", source, "task=retrieval", "samples=12", f"to={tmp_path / 'scores'}")
        assert outcome.code == 0, outcome.err
        found.append(read_json(tmp_path / "scores" / "metrics.json")["retrieval"])
    assert [one.pop("samples_asked") for one in found] == [12, 500]
    assert found[0] == found[1]


def test_a_folder_that_is_not_there(run: Path, tmp_path: Path) -> None:
    outcome = call("evaluate.py", f"run={run}", "task=zero_shot", "task.zero_shot.path=nowhere", f"to={tmp_path}")
    assert outcome.code == 2
    assert "folder of pictures nowhere does not exist" in outcome.err
