"""Whole runs: what they leave behind, that they repeat, and that they start in the middle."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from runs import ROOT, STAGES, TINY, losses, once, read_json, same_weights, tiny_run, train, weights

from lightning_internvl import load_pretrained
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.stages.freezing import FreezePlan
from lightning_internvl.stages.roles import roles_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of all stages; not to be changed."""
    return tiny_run(tmp_path_factory.mktemp("full") / "run")


def test_the_folder_of_a_run(run: Path) -> None:
    assert "pipeline:\n- contrastive\n- generative\n- words\n- supervised\n" in (run / "config.yaml").read_text()
    assert "${" not in (run / "config.yaml").read_text()
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    timing, metrics = read_json(run / "timing.json"), read_json(run / "metrics.json")
    assert set(timing) == set(metrics) == set(STAGES)
    for stage in STAGES:
        assert (run / "checkpoints" / stage / "last.ckpt").is_file()
        assert list((run / "tensorboard" / stage).glob("events.out.tfevents.*"))
        assert timing[stage]["steps"] == 4
        assert {"train_seconds", "eval_seconds", "samples_per_s", "tokens_per_s", "padding_share", "peak_memory_gib"} < set(
            timing[stage]
        )
        history = losses(run, stage)
        assert [row["step"] for row in history] == [0, 1, 2, 3]
        assert all(math.isfinite(row["train/loss"]) for row in history)
        freezing = read_json(run / "stages" / stage / "freezing.json")
        assert [entry["step"] for entry in freezing] == [0]
        samples = sorted(path.name for path in (run / "stages" / stage / "samples").iterdir())
        assert samples == ["step-000000.json", "step-000004.json"]
    assert not list(run.rglob(".*")), "drafts are left behind"


def test_measures_stand_beside_their_chance(run: Path) -> None:
    metrics = read_json(run / "metrics.json")
    for stage, names in {
        "contrastive": ["zero_shot_top1", "zero_shot_top5", "c_image_to_text_r1", "c_text_to_image_r10", "c_zh_text_to_image_r5"],
        "generative": ["zero_shot_top1", "g_image_to_text_r1", "g_text_to_image_r10", "itm_hard_accuracy"],
        "supervised": ["answers_accuracy"],
    }.items():
        for name in names:
            assert 0 <= metrics[stage][name] <= 1
            assert 0 < metrics[stage][f"{name}_chance"] < 1
    assert {"caption_cider", "caption_exact_match"} <= set(metrics["generative"])


def test_manifests_say_what_trained(run: Path) -> None:
    origins = {}
    for stage in STAGES:
        manifest = read_json(run / "handoff" / stage / "manifest.json")
        assert (manifest["stage"], manifest["step"], manifest["format"]) == (stage, 4, 1)
        assert set(manifest["config"]) == {"encoder", "middleware", "decoder", "objectives", "image_token"}
        origins[stage] = {part: entry["origin"] for part, entry in manifest["parts"].items()}
    assert origins["contrastive"] == {"encoder": "trained", "middleware": "trained", "objectives": "trained"}
    assert set(origins["generative"]) == {"encoder", "middleware", "objectives"}
    assert origins["supervised"]["decoder"] == "trained"
    assert set(origins["supervised"]) == {"encoder", "middleware", "decoder"}


def test_exactly_what_the_rules_name_has_changed(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    for before, after in pairwise(STAGES):
        roles = roles_of({"encoder": InternViT, "middleware": QLLaMA, "decoder": HFCausalLM})
        plan = FreezePlan(config["stages"][after]["module"]["train"], roles=roles)
        old, new = weights(run, before), weights(run, after)
        both = old.keys() & new.keys()
        assert all(new[name].equal(old[name]) for name in both if not plan.ever_trains(name))
        # Biases of dead units may stay where they are; matrices do not.
        assert all(not new[name].equal(old[name]) for name in both if plan.ever_trains(name) and new[name].ndim > 1)


def test_a_hand_off_loads_as_a_model(run: Path) -> None:
    model = load_pretrained(run / "handoff" / "supervised")
    given = weights(run, "supervised")
    assert all(tensor.equal(given[name]) for name, tensor in model.state_dict().items() if name in given)


def test_the_last_lines_say_where_everything_is(tmp_path: Path) -> None:
    outcome = train(*TINY, "pipeline=[contrastive]", f"paths.run={tmp_path}/run")
    lines = [line.split() for line in outcome.out.strip().splitlines()[-3:]]
    places = [str(tmp_path / "run" / name) for name in ("", "metrics.json", "report.html")]
    assert [line[-1].rstrip("/") for line in lines] == [place.rstrip("/") for place in places]


def test_the_same_seed_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    again = tiny_run(tmp_path / "again")
    assert (again / "metrics.json").read_bytes() == (run / "metrics.json").read_bytes()
    for stage in STAGES:
        assert same_weights(run, again, stage)
        for part in (run / "handoff" / stage).glob("*.safetensors"):
            assert part.read_bytes() == (again / "handoff" / stage / part.name).read_bytes()


def test_another_seed_gives_another_run(run: Path, tmp_path: Path) -> None:
    other = tiny_run(tmp_path / "other", "pipeline=[contrastive]", "seed=1")
    assert read_json(other / "metrics.json")["contrastive"] != read_json(run / "metrics.json")["contrastive"]
    assert not same_weights(run, other, "contrastive")


def test_a_pipeline_may_start_in_the_middle(run: Path, tmp_path: Path) -> None:
    first = tiny_run(tmp_path / "first", "pipeline=[contrastive]")
    rest = tiny_run(tmp_path / "rest", "pipeline=[generative,words,supervised]", f"init_from={first}")
    whole, parts = read_json(run / "metrics.json"), read_json(rest / "metrics.json")
    assert {name: whole[name] for name in STAGES[1:]} == parts
    assert all(same_weights(run, rest, stage) for stage in STAGES[1:])


def test_a_hand_off_folder_is_a_start_too(run: Path, tmp_path: Path) -> None:
    source = run / "handoff" / "words"
    last = tiny_run(tmp_path / "last", "pipeline=[supervised]", f"init_from={source}")
    assert same_weights(run, last, "supervised")


def test_resume_of_a_finished_run_changes_nothing(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    outcome = train(f"resume={copy}")
    assert outcome.code == 0
    assert all(f"{stage}: finished earlier" in outcome.out for stage in STAGES)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_chat_without_qllama(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "chat", "experiment=internvl_chat_toy", "pipeline=[contrastive,supervised]")
    assert set(read_json(run / "metrics.json")) == {"contrastive", "supervised"}
    manifest = read_json(run / "handoff" / "supervised" / "manifest.json")
    assert manifest["config"]["middleware"]["_target_"].endswith("MLPConnector")
    assert not any("qllama" in name for name in weights(run, "supervised"))
    assert weights(run, "supervised")["encoder.embeddings.class_embedding"].equal(
        weights(run, "contrastive")["encoder.embeddings.class_embedding"]
    )


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The same global batch, split over two processes, gives the same weights up to the order of sums."""
    one = tiny_run(tmp_path / "one", "pipeline=[contrastive]")
    split = ("strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "stages.contrastive.batch_size=2")
    words = once(*TINY, "pipeline=[contrastive]", *split, f"paths.run={tmp_path}/two")
    command = [sys.executable, "train.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder") == 1
    a, b = weights(one, "contrastive"), weights(tmp_path / "two", "contrastive")
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=0, atol=1e-4)
