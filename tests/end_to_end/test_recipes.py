"""Recipes with stages of their own: the retrieval fine-tune and the probe."""

from __future__ import annotations

from pathlib import Path

from runs import TINY, losses, read_json, tiny_run, train_apart, weights


def short(stage: str) -> tuple[str, ...]:
    return f"stages.{stage}.max_steps=3", f"stages.{stage}.batch_size=6", f"stages.{stage}.scheduler.warmup_steps=1"


def test_retrieval_fine_tune_of_both_embeddings(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "g", "experiment=internvl_retrieval_toy", *short("retrieval"))
    metrics = read_json(run / "metrics.json")["retrieval"]
    assert {"c_image_to_text_r1", "g_text_to_image_r5", "zero_shot_top1", "itm_hard_accuracy"} <= set(metrics)
    before, after = weights(run, "generative"), weights(run, "retrieval")
    assert before.keys() == after.keys()
    assert not after["encoder.embeddings.class_embedding"].equal(before["encoder.embeddings.class_embedding"])
    assert not after["objectives.itm.itm_head.weight"].equal(before["objectives.itm.itm_head.weight"])
    assert after["middleware.qllama.lm_head.weight"].equal(before["middleware.qllama.lm_head.weight"])  # nothing is written


def test_retrieval_fine_tune_of_the_tower_alone(tmp_path: Path) -> None:
    choice = ("stage@stages.retrieval=retrieval_c", "pipeline=[contrastive,retrieval]")
    run = tiny_run(tmp_path / "c", "experiment=internvl_retrieval_toy", *choice, *short("retrieval"))
    assert "g_image_to_text_r1" not in read_json(run / "metrics.json")["retrieval"]
    before, after = weights(run, "contrastive"), weights(run, "retrieval")
    changed = {name for name in before if not after[name].equal(before[name])}
    assert {"encoder.embeddings.class_embedding", "middleware.text_projection"} < changed
    assert not any(
        word in name for name in changed for word in ("query_tokens", "qllama.model.layers.0.cross_attn", "projector2")
    )


def test_two_processes_fine_tune_every_parameter_that_trains(tmp_path: Path) -> None:
    """A parameter without a gradient would stop data-parallel training."""
    split = ("strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "pipeline=[contrastive,retrieval]")
    command = ["experiment=internvl_retrieval_toy", *TINY, *split, *short("retrieval"), f"paths.run={tmp_path}/two"]
    done = train_apart(*command)
    assert done.code == 0, done.err
    assert {"train/itc", "train/itc_tower", "train/itm"} < set(losses(tmp_path / "two", "retrieval")[-1])


def test_probe_on_a_frozen_tower(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "linear", "experiment=internvl_probe_toy", *short("probe"))
    metrics = read_json(run / "metrics.json")["probe"]
    assert set(metrics) == {"probe_top1", "probe_top1_chance", "probe_top5", "probe_top5_chance"}
    before, after = weights(run, "contrastive"), weights(run, "probe")
    towers = [{n: t for n, t in found.items() if n.startswith("encoder.")} for found in (before, after)]
    assert all(tensor.equal(towers[1][name]) for name, tensor in towers[0].items())
    assert after["middleware.head.weight"].shape == (48, 32)
    pooled = ("middleware@stages.probe.middleware=attention_probe", "stages.probe.middleware.heads=2")
    other = tiny_run(
        tmp_path / "attention", "experiment=internvl_probe_toy", "pipeline=[probe]", f"init_from={run}/handoff/contrastive",
        *pooled, *short("probe"),
    )  # fmt: skip
    assert "middleware.pooling.cross_attn.q_bias" in weights(other, "probe")
