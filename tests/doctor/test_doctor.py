"""The doctor passes what is sound and names every fault that is planted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from runs import TINY, train
from torch import Tensor

from lightning_internvl.cli import CONF
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.data.collate.packed import PackedChats
from lightning_internvl.doctor import equivalences as equals, single_stage as checks
from lightning_internvl.doctor.command import harness_of, results_of, run_doctor
from lightning_internvl.doctor.harness import Harness, Result
from lightning_internvl.layers import attention, peft
from lightning_internvl.protocols import DeepTokens
from lightning_internvl.stages import base

Check = Callable[[Harness], Any]
# Micro-batches that differ in what their mean is over
UNEQUAL = ("data=scenes", "stages.supervised.objectives.next_token.average=token")


def config(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=[*overrides, "paths.run=unused"]), resolve=True)


@pytest.fixture
def harness() -> Harness:
    """The supervised stage of the default recipe, tiny: a frozen encoder, a middleware and a decoder that train."""
    return harness_of(stage_settings(config(*TINY), "supervised"), build)


def result(check: Check, harness: Harness, name: str = "") -> Result:
    """The one result of a check, or that of a name."""
    (found,) = (one for one in check(harness) if one.name.startswith(name))
    return found


def assert_found(found: Result, *words: str) -> None:
    assert found.passed is False, found
    for word in words:
        assert word in found.detail


# --- what is sound passes ---------------------------------------------------------------------------------------------


def test_the_default_recipe_passes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    outcome = train(*TINY, "doctor=true", f"paths.run={tmp_path}/run", "hydra.run.dir=${paths.run}")
    assert outcome.code == 0, outcome.out + outcome.err
    assert "FAIL" not in outcome.out
    assert outcome.out.count("PASS") == 36
    assert "36 checks passed, 0 failed, 12 do not apply" in outcome.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "recipe",
    [
        ["experiment=qwen2_vl_toy", "pipeline=[sft]", "data.packing=true"],  # any resolution, M-RoPE
        ["experiment=qwen3_vl_toy", "pipeline=[long]", "data.packing=true"],  # DeepStack, times as text
        ["experiment=qwen2_5_vl_toy", "pipeline=[long]", "data.packing=true"],  # windows, videos in seconds
        ["experiment=internvl_2_5_toy", "pipeline=[sft]", "data.packing=true"],  # tiles, videos as frames, JPEG, square roots
        ["experiment=internvl_3_5_toy", "pipeline=[cpt]"],  # Qwen3, text alone
        ["experiment=llava_next_toy", "pipeline=[supervised]", "peft=lora"],  # grids of squares
        ["experiment=llava_onevision_toy", "pipeline=[onevision]", "data.packing=true"],  # pooled frames
        ["experiment=xcomposer2_toy", "pipeline=[sft]", "peft=lora"],  # Partial LoRA below adapters
        ["experiment=llava_toy", "pipeline=[alignment]", "peft=qlora", "trainer.accumulate_grad_batches=2"],
        ["experiment=flamingo_toy", "pipeline=[start]", "attention=math"],  # gates that begin at zero
        ["experiment=internvl_probe_toy", "pipeline=[probe]"],
    ],
    ids=lambda recipe: recipe[0],
)
def test_recipes_pass(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor(config(*recipe), build), capsys.readouterr().out


def test_a_stage_is_as_before_after_all_checks(harness: Harness) -> None:
    before, training = harness.tensors(), [module.training for module in harness.stage.modules()]
    torch.manual_seed(1)
    assert all(found.passed is not False for found in results_of(harness))
    assert all(x.equal(before[name]) for name, x in harness.tensors().items())
    assert [module.training for module in harness.stage.modules()] == training
    assert attention._backend == "sdpa"


def test_weights_of_16_bits_are_compared_in_32_and_come_back(harness: Harness) -> None:
    harness.stage.model.decoder.bfloat16()
    before = harness.tensors()
    for check in (equals.check_packed_rows, equals.check_accumulation, equals.check_backends):
        assert result(check, harness).passed
    assert all(x.dtype == before[name].dtype and x.equal(before[name]) for name, x in harness.tensors().items())


def test_weights_that_join_later_are_looked_at_when_they_do() -> None:
    rules = "['middleware.mlp*',{name: decoder,from_step: 2}]"
    found = list(
        checks.step_by_step(
            harness_of(stage_settings(config(*TINY, f"stages.supervised.module.train={rules}"), "supervised"), build)
        )
    )
    assert [one.name for one in found[::3]] == ["finite gradients from step 0", "finite gradients from step 2"]
    assert all(one.passed for one in found)
    assert [one.detail.partition(" ")[0] for one in found[::3]] == ["8", "19"]


# --- every planted fault is named -------------------------------------------------------------------------------------


def with_optimizer(harness: Harness, change: Callable[[torch.optim.Optimizer], Any]) -> None:
    """Let the stage's optimizer be changed once it is built."""
    made = harness.stage.optimizer

    def changed(*given: Any, **settings: Any) -> torch.optim.Optimizer:
        optimizer = made(*given, **settings)
        change(optimizer)
        return optimizer

    harness.stage.optimizer = changed


def name_of(harness: Harness, parameter: Tensor) -> str:
    return next(name for name, p in harness.stage.model.named_parameters() if p is parameter)


def test_a_parameter_left_out_of_the_optimizer(harness: Harness) -> None:
    out: list[Tensor] = []
    with_optimizer(harness, lambda optimizer: out.append(optimizer.param_groups[0]["params"].pop()))
    assert_found(result(checks.one_group, harness), "in none", name_of(harness, out[0]))
    assert_found(result(checks.step_by_step, harness, "trained"), "unchanged", name_of(harness, out[1]))


def test_a_parameter_in_two_groups(harness: Harness) -> None:
    def twice(optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"][0])

    with_optimizer(harness, twice)
    first = harness.stage.optimizer(harness.stage.model, harness.stage.plan).param_groups[0]["params"][0]
    assert_found(result(checks.one_group, harness), "in several", name_of(harness, first))
    with_optimizer(harness, lambda optimizer: optimizer.add_param_group({"params": [first]}))  # which PyTorch refuses
    assert_found(result(checks.one_group, harness), "cannot be built", "more than one parameter group")


def test_a_frozen_parameter_in_the_optimizer(harness: Harness) -> None:
    weight = next(harness.stage.model.encoder.parameters())
    with_optimizer(harness, lambda optimizer: optimizer.add_param_group({"params": [weight]}))
    assert_found(result(checks.one_group, harness), "frozen", name_of(harness, weight))


def test_a_detached_part(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = harness.stage.model._visual
    monkeypatch.setattr(harness.stage.model, "_visual", lambda *given: DeepTokens(seen(*given).tokens.detach(), ()))
    assert_found(result(checks.step_by_step, harness, "finite"), "no gradient", ": middleware.")
    assert_found(result(checks.step_by_step, harness, "trained"), "unchanged: middleware.")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number(harness: Harness, value: float) -> None:
    weight = harness.stage.model.decoder.lm.model.norm.weight
    weight.register_hook(lambda gradient: gradient + value)
    assert_found(result(checks.step_by_step, harness, "finite"), "NaN or infinite", "decoder.lm.model.norm.weight")


def test_an_adapter_that_is_stuck_at_zero() -> None:
    harness = harness_of(stage_settings(config(*TINY, "peft=lora"), "supervised"), build)
    (name, layer), *_ = peft.adapted_layers(harness.stage.model)
    with torch.no_grad():
        layer.lora_A["default"].weight.zero_()  # as B is: the gradient of both is zero for ever
    assert_found(
        result(checks.step_by_step, harness, "trained"), f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"
    )


def test_a_frozen_parameter_that_changes(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, losses = harness.stage.model.encoder.embeddings.patch_embedding.weight, harness.stage.losses

    def moving(batch: dict[str, Any]) -> dict[str, Tensor]:
        weight.data.add_(1e-6)
        return losses(batch)

    monkeypatch.setattr(harness.stage, "losses", moving)
    assert_found(result(checks.step_by_step, harness, "frozen"), name_of(harness, weight))


def test_a_frozen_tower_that_keeps_activations(harness: Harness) -> None:
    assert result(checks.saved_activations, harness).passed
    harness.stage.model.encoder.register_forward_pre_hook(lambda _, given: (given[0].requires_grad_(), *given[1:]))
    assert_found(result(checks.saved_activations, harness), "activations of encoder (")


def test_a_frozen_layer_that_keeps_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = harness_of(stage_settings(config("experiment=llava_toy", "pipeline=[alignment]"), "alignment"), build)
    assert result(checks.saved_activations, harness).passed
    name = "decoder.lm.model.layers.1.mlp.up_proj"
    layer = harness.stage.model.get_submodule(name)
    monkeypatch.setattr(layer, "forward", lambda x: torch.nn.functional.linear(x, (layer.weight * 1.0).requires_grad_()))
    assert_found(result(checks.saved_activations, harness), f"activations of {name} (")


def test_labels_that_are_all_masked(harness: Harness) -> None:
    ids, labels = harness.samples[3]["row"]
    harness.samples[3] = {**harness.samples[3], "row": (ids, [-100] * len(labels))}
    assert_found(result(checks.labels, harness), harness.samples[3]["key"])


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_number_of_placeholders(harness: Harness, change: int) -> None:
    ids, labels = harness.samples[2]["row"]
    image = harness.stage.model.image_token_id
    count = ids.count(image)
    place = ids.index(image) if change < 0 else next(i for i, token in enumerate(ids) if token != image)
    changed = [*ids[:place], image if change > 0 else 1, *ids[place + 1 :]]
    harness.samples[2] = {**harness.samples[2], "row": (changed, labels)}
    words = (f"{harness.samples[2]['key']}: {count + change} placeholders, {count} visual tokens",)
    assert_found(result(checks.placeholders, harness), *words)
    stopped = [one for one in results_of(harness) if "it stopped with ValueError" in one.detail]
    assert {"packed", "accumulated"} <= {one.name for one in stopped}  # no check hides what stopped it


def test_packed_samples_that_see_each_other(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = PackedChats.pack

    def leaking(self: PackedChats, rows: Any) -> dict[str, Any]:
        batch = pack(self, rows)
        del batch["segments"]
        return batch

    monkeypatch.setattr(PackedChats, "pack", leaking)
    assert_found(result(equals.check_packed_rows, harness), "loss differs by")


def test_a_mean_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = harness_of(stage_settings(config(*TINY, *UNEQUAL), "supervised"), build)
    monkeypatch.setattr(base, "window_shares", lambda *given: ({}, 1.0))
    assert_found(result(equals.check_accumulation, harness), "2 micro-batches, next_token", "gradient by")


def test_a_contrast_is_not_accumulated() -> None:
    found = result(equals.check_accumulation, harness_of(stage_settings(config(*TINY), "contrastive"), build))
    assert found.passed is None
    assert "not for itc" in found.detail


def test_a_resume_that_drops_the_moments(harness: Harness) -> None:
    def forgetful(optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_state_dict_post_hook(lambda _, state: {**state, "state": {}})

    with_optimizer(harness, forgetful)
    assert_found(result(equals.check_resume, harness), "tensors differ")


def test_a_resume_that_lacks_a_weight(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.decoder.lm.model.norm.weight"
    monkeypatch.setattr(harness.stage, "checkpoint_tensors", lambda state: {key: x for key, x in state.items() if key != name})
    (stopped,) = (one for one in results_of(harness) if one.name == "resumed")
    assert_found(stopped, "RuntimeError")


def test_a_merge_that_drops_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = harness_of(stage_settings(config(*TINY, "peft=lora"), "supervised"), build)
    merged, (lost, *_) = peft.merged_weight, [name for name, _ in peft.adapted_layers(harness.stage.model)]
    first = iter([True])
    monkeypatch.setattr(peft, "merged_weight", lambda weight, *rest: weight if next(first, False) else merged(weight, *rest))
    assert_found(result(equals.check_merge, harness), f"differ: {lost} (")


def test_a_backend_that_disagrees(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    sdpa = attention._sdpa
    monkeypatch.setattr(attention, "_sdpa", lambda *given: 1.001 * sdpa(*given))
    assert_found(result(equals.check_backends, harness), "sdpa and math: loss differs by")


def test_a_fault_makes_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "window_shares", lambda *given: ({}, 1.0))
    outcome = train(*TINY, "doctor=true", "pipeline=[supervised]", *UNEQUAL, f"paths.run={tmp_path}/run")
    assert outcome.code == 1
    assert "FAIL  accumulated = large batch: 2 micro-batches" in outcome.out
    assert outcome.out.count("FAIL") == 1


def test_another_word_than_true_or_false(tmp_path: Path) -> None:
    outcome = train("doctor=yess", f"paths.run={tmp_path}/run")
    assert outcome.code == 2
    assert "doctor='yess' must be true" in outcome.err
