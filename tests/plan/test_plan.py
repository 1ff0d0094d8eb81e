"""What `plan=true` says, held against the published counts and against real runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from runs import ROOT, STAGES as DEFAULT, TINY, train
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lightning_internvl.cli  # noqa: F401  # for its resolvers
from lightning_internvl.config.run_settings import RunSettings
from lightning_internvl.config.stage_settings import TrainerSettings, stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.inference.collators import make_view
from lightning_internvl.model.compose import compose_model
from lightning_internvl.plan.measure import SAMPLES, Curve, precision_of
from lightning_internvl.plan.memory import GIB, Setup, largest_batch, setup_of
from lightning_internvl.plan.meter import ACTIVATIONS, COPIES, LOGITS, parts_of
from lightning_internvl.plan.stage_plan import StagePlan, stage_plan, stage_plans
from lightning_internvl.stages import Stage
from lightning_internvl.training.assembly import build_stage

STAGES = ("contrastive", "generative", "supervised")
SMALL = (*TINY, "encoder.depth=3", "encoder.drop_path=0.2", "middleware.depth=4", "decoder.config.num_hidden_layers=3")


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)


def real_stage(config: dict[str, Any], name: str) -> tuple[Stage, dict[str, Tensor]]:
    """The same stage with real weights, and a real batch of the largest size."""
    settings = stage_settings(config, name)
    model, tokenizers = compose_model(settings.parts.config, build)
    stage = build_stage(settings, model, Path(), build).train()
    stage.plan.apply(model, 0)
    batch = make_view(settings, model, tokenizers, build).training.blank(SAMPLES[0])
    batch = {key: torch.ones_like(x) if "labels" in key else x for key, x in batch.items()}  # a plan counts every token as learnt
    if "attention_mask" in batch:
        batch["attention_mask"][0, -1] = 0  # rows without padding would need no mask
    return stage, batch


def kept_bytes(stage: Stage, batch: dict[str, Tensor], autocast: bool) -> int:
    """Bytes that autograd keeps of a real forward pass, without the weights."""
    weights = {x.untyped_storage().data_ptr() for x in [*stage.parameters(), *stage.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = stage.losses(batch)
        assert all(loss.requires_grad for loss in losses.values())
    return sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in weights)


@pytest.fixture(scope="module")
def plans() -> dict[str, StagePlan]:
    config = composed(*SMALL)
    return {name: stage_plan(stage_settings(config, name), build) for name in STAGES}


@pytest.mark.parametrize("name", STAGES)
def test_parameters_are_those_of_the_real_model(name: str, plans: dict[str, StagePlan]) -> None:
    stage, _ = real_stage(composed(*SMALL), name)
    for part, module in parts_of(stage.model).items():
        count = sum(p.numel() * 4 for p in module.parameters()) + sum(b.numel() * b.element_size() for b in module.buffers())
        assert plans[name].fixed.weights[part] == count
        assert plans[name].fixed.gradients[part] == sum(p.numel() * 4 for p in module.parameters() if p.requires_grad)
    trained = sum(p.numel() * 4 for p in stage.parameters() if p.requires_grad)
    assert plans[name].fixed.optimizer.total() == 2 * trained  # AdamW


@pytest.mark.parametrize("name", STAGES)
def test_flops_are_those_of_a_real_run(name: str, plans: dict[str, StagePlan]) -> None:
    stage, batch = real_stage(composed(*SMALL), name)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        losses = stage.losses(batch)
    with FlopCounterMode(display=False) as backward:
        sum(losses.values()).backward()
    measured = plans[name].meta_stage.measure("32-true", 0)
    said = sum(curve.values[0] for curve in measured.forward.values())
    assert said == forward.get_total_flops()
    assert sum(curve.values[0] for curve in measured.training.values()) - said == backward.get_total_flops()


@pytest.mark.parametrize("autocast", [False, True], ids=["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", STAGES)
def test_activations_are_those_of_a_real_run(name: str, autocast: bool, plans: dict[str, StagePlan]) -> None:
    stage, batch = real_stage(composed(*SMALL), name)
    plan = plans[name]
    measured = plan.meta_stage.measure("bf16-mixed" if autocast else "32-true", 0)
    said = sum(curve.values[0] for kind in (ACTIVATIONS, LOGITS, COPIES) for curve in measured.kept[kind].values())
    assert said == pytest.approx(kept_bytes(stage, batch, autocast), rel=0.02)


def test_equal_blocks_are_counted_once_and_unequal_ones_apart(plans: dict[str, StagePlan]) -> None:
    plan = stage_plan(stage_settings(composed(*SMALL), "contrastive"), build)
    kinds = {key[0] for key in plan.meta_stage.units.records}
    assert len(kinds) == 2 + 2  # the tower's with and without drop path, QLLaMA's with and without cross-attention


def test_the_published_counts() -> None:
    counts = {}
    for plan in stage_plans(
        RunSettings.of(composed("experiment=internvl", "pipeline=[contrastive_full,generative]")).trained, build
    ):
        parameters = dict(plan.stage.model.named_parameters())
        counts[plan.name] = {
            name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in parts_of(plan.stage.model).items()
        }
        trained = {name: p.numel() / 1e6 for name, p in parameters.items() if plan.stage.plan.trains(name, 0)}
    assert counts["generative"]["encoder"] == pytest.approx(5902.8, abs=0.05)
    assert sum(counts["generative"].values()) == pytest.approx(13_835.0, abs=0.1)
    groups = {"cross_attn.": 956.4, "query_tokens": 0.393, "clip_projector2": 53.5, "itm_head": 0.008, "logit_scale": 1e-6}
    groups = {("middleware.qllama" if "." in g else "") + "|" + g: size for g, size in groups.items()}
    for group, size in groups.items():
        within, _, word = group.partition("|")
        found = sum(n for name, n in trained.items() if name.startswith(within) and word in name)
        assert found == pytest.approx(size, rel=2e-3, abs=5e-4)
    assert sum(trained.values()) == pytest.approx(1010.3, abs=0.1)


@pytest.mark.parametrize(
    ("overrides", "part", "millions"),
    [
        (["encoder=internvit_6b_45"], "encoder", 5537.0),
        (["encoder=internvit_300m"], "encoder", 304.0),
        (["decoder=vicuna_7b"], "decoder", 6738.4),
        (["decoder=vicuna_13b"], "decoder", 13_015.9),
        (["decoder=internlm2_20b"], "decoder", 19_861.1),
        (["encoder=internvit_6b_45", "decoder=internlm2_20b"], "middleware", 116.43),
    ],
)  # fmt: skip
def test_the_published_parts(overrides: list[str], part: str, millions: float) -> None:
    config = composed(*overrides, "middleware@stages.supervised.middleware=pixel_shuffle_mlp", "pipeline=[supervised]")
    plan = stage_plan(stage_settings(config, "supervised"), build)
    count = sum(p.numel() for p in parts_of(plan.stage.model)[part].parameters()) / 1e6
    assert count == pytest.approx(millions, rel=3e-4)


def test_a_curve_is_exact_for_parabolas() -> None:
    curve = Curve(tuple(3 + 5 * x + 7 * x * x for x in SAMPLES))
    assert [curve(x) for x in (1, 5, 640)] == [3 + 5 * x + 7 * x * x for x in (1, 5, 640)]
    assert largest_batch(lambda batch: batch <= 77) == 77
    assert largest_batch(lambda batch: False) == 0


def test_more_devices_compare_more_pairs(plans: dict[str, StagePlan]) -> None:
    config = composed(*SMALL, "trainer.devices=4", "trainer.num_nodes=16", "strategy=ddp")
    many = stage_plan(stage_settings(config, "contrastive"), build)
    batch = SAMPLES[0]
    one = plans["contrastive"].measured.kept[LOGITS]["objectives.itc"](batch)
    assert many.setup == Setup("DDPStrategy", 64, False, True, 80 * GIB)
    assert many.measured.kept[LOGITS]["objectives.itc"](batch) > 20 * one
    assert not torch.distributed.is_initialized()


def test_sharding_divides_what_does_not_depend_on_the_batch(plans: dict[str, StagePlan]) -> None:
    plan, sharded = plans["supervised"], {"sharded": True, "devices": 8}
    whole, part = plan.memory(), plan.memory(**sharded)
    for kind in ("gradients", "optimizer"):
        assert sum(part.parts[kind].values()) == pytest.approx(sum(whole.parts[kind].values()) / 8)
    shared = sum(whole.parts["weights"].values()) / 8
    assert sum(part.parts["weights"].values()) == pytest.approx(shared + plan.fixed.gathered)
    assert part.parts["activations"] == whole.parts["activations"]
    assert setup_of({"name": "fsdp2"}, TrainerSettings.of({"devices": 8}), 80).sharded
    assert (
        setup_of(
            {"_target_": "lightning.pytorch.strategies.ModelParallelStrategy"}, TrainerSettings.of({"devices": [0, 1]}), 80
        ).devices
        == 2
    )


def test_attention_with_all_scores_keeps_them(plans: dict[str, StagePlan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_internvl.layers.attention._backend", "math")
    math = stage_plan(stage_settings(composed(*SMALL), "contrastive"), build)
    activations = [one.memory().parts["activations"] for one in (math, plans["contrastive"])]
    assert sum(activations[0].values()) > 1.1 * sum(activations[1].values())


def test_the_command_writes_nothing_and_needs_no_paths(tmp_path: Path) -> None:
    plain = "experiment=internvl", "strategy=ddp", "activation_checkpointing=null"
    outcome = train("plan=true", *plain, "pipeline=[generative]", f"paths.root={tmp_path}/outputs")
    assert outcome.code == 0, outcome.err
    assert not any(tmp_path.iterdir())
    text = re.sub(r"\s+", " ", outcome.out)
    assert "generative: 160 devices (DDPStrategy), bf16-mixed, 128 samples a device, 20,480 a step" in text
    assert "middleware.qllama.model.layers.*.cross_attn 956.4 M" in text
    assert re.search(r"does not fit: [\d.]+ GiB of 80\.0 GiB a device", text)
    assert "strategy=fsdp2 ++stages.generative.activation_checkpointing=full" in text
    assert max(map(len, outcome.out.splitlines())) <= 120


def test_what_fits_is_said_to_fit(tmp_path: Path) -> None:
    outcome = train(*SMALL, "plan=true", f"paths.run={tmp_path}/run")
    place = "of an NVIDIA" if torch.cuda.is_available() else "of this machine's RAM"
    assert outcome.out.count(place) == outcome.out.count("; largest micro-batch that fits:") == len(DEFAULT)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan=maybe", r"plan='maybe' must be true .* or false"),
        ("device_memory=-1", r"device_memory=-1 must be a number above 0"),
        ("device_utilisation=1.5", r"device_utilisation=1\.5 must be"),
        ("price_per_hour=free", r"price_per_hour='free' must be a number above 0"),
        ("trainer.precision=bf17", r"trainer\.precision=bf17: plan=true knows .*bf16-mixed"),
        ("attention=foo", r"attention='foo' is not known"),
        ("stages.supervised.module.train=[decodr]", r"stages\.supervised: train: 'decodr' matches no parameter"),
    ],
)
def test_faults_are_told(override: str, message: str, tmp_path: Path) -> None:
    outcome = train(*TINY, "plan=true", override, f"paths.run={tmp_path}/run")
    assert outcome.code == 2
    assert re.search(message, outcome.err)
    assert not (tmp_path / "run").exists()


def test_the_memory_of_a_device_is_that_of_this_machine_if_it_has_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = setup_of({}, TrainerSettings.of({}), None)
    assert here.place == "of this machine's RAM"
    assert GIB / 4 < here.capacity != 80 * GIB
    assert setup_of({}, TrainerSettings.of({"devices": 8}), None).capacity == 80 * GIB
    assert setup_of({}, TrainerSettings.of({"accelerator": "gpu"}), None).capacity == 80 * GIB
    assert setup_of({}, TrainerSettings.of({}), 24).capacity == 24 * GIB


def test_the_stage_of_words_is_measured() -> None:
    """It chooses by values, of which the meta device has none: every label counts as learnt, every word as another."""
    config = composed("pipeline=[words]", "paths.run=x", *SMALL)
    plan = stage_plan(stage_settings(config, "words"), build)
    real, batch = real_stage(config, "words")
    batch = {name: torch.cat([x, x]) for name, x in batch.items()}
    # four captions that share no word
    places = torch.arange(batch["input_ids"].shape[1]) % (real.model.decoder.vocab_size // 4)
    pictures = real.model.visual_places(batch["input_ids"])
    batch["input_ids"] = torch.where(pictures, batch["input_ids"], 4 * places + torch.arange(4)[:, None])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = real.weighted_sum(real.losses(batch))
        loss.sum().backward()
    told = sum(curve(SAMPLES[1]) for curve in plan.measured.training.values())
    assert told == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_precisions_have_other_names() -> None:
    assert [precision_of(name) for name in (32, "bf16", "16-mixed", None)] == ["32-true", "bf16-mixed", "16-mixed", "32-true"]
