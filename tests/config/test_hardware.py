"""Strategies and numbers of processes that do not fit are refused before anything is built."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lightning_internvl.config.hardware import (
    data_workers,
    hardware_faults,
    precision_faults,
    readers,
    strategy_refusal,
    with_hardware,
)
from lightning_internvl.config.stream_checks import stream_faults

FSDP2 = {"_target_": "lightning_internvl.distributed.fsdp2.FSDP2", "data_parallel_size": "auto", "tensor_parallel_size": 1}
ADAMW, BITS = ({"_target_": f"lightning_internvl.training.optim.{name}"} for name in ("adamw", "adamw_8bit"))


def config(strategy: dict[str, Any], devices: int = 2, optimizer: dict[str, Any] = ADAMW, second: Any = None) -> dict[str, Any]:
    return {
        "strategy": strategy, "trainer": {"devices": devices, "num_nodes": 1}, "pipeline": ["first", "second"], "plan": False,
        "optimizer": optimizer, "stages": {"first": {"batch_size": 4}, "second": {"batch_size": 4, **(second or {})}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (config(FSDP2 | {"data_parallel_size": 3}), "differs from the 2 processes"),
        (config(FSDP2 | {"tensor_parallel_size": 2}, devices=3), "valid choices: 1, 3"),
        (config(FSDP2 | {"tensor_parallel_size": 2, "data_parallel_size": 2}), "data_parallel_size=2 x tensor_parallel_size=2"),
        (config(FSDP2, optimizer=BITS), "use optimizer=adamw, or strategy=ddp"),
        (config(FSDP2, second={"optimizer": BITS}), "use optimizer@stages.second.optimizer=adamw, or strategy=ddp"),
        (config({"name": "fsdp_cpu_offload"}), "strategy.reshard_after_forward=false as SHARD_GRAD_OP"),
        (config({"_target_": "lightning.pytorch.strategies.FSDPStrategy"}), "FSDP 1 lays weights out flat"),
        (config({"_target_": "lightning.pytorch.strategies.DeepSpeedStrategy"}), "DeepSpeed's checkpoints"),
    ],
)
def test_what_is_refused(given: dict[str, Any], told: str) -> None:
    (fault,) = hardware_faults(given)
    assert told in fault


@pytest.mark.parametrize(
    ("common", "own", "told"),
    [
        ("bf16-true", None, [r"^trainer.precision=bf16-true holds weights and moments in 16 bits.*; use bf16-mixed"]),
        ("bf16-mixed", "16-true", [r"^stages.second.trainer.precision=16-true .*; use 16-mixed"]),
        ("32-true", "bf16-mixed", []),
    ],
)
def test_weights_in_16_bits_are_refused(common: str, own: str | None, told: list[str]) -> None:
    given = config({"name": "auto"}, second={"trainer": {"precision": own}} if own else None)
    given["trainer"]["precision"] = common
    for stage in given["stages"].values():
        stage["module"] = {"_target_": "Stage"}
    faults = list(precision_faults(given))
    assert len(faults) == len(told)
    assert all(re.search(pattern, fault) for pattern, fault in zip(told, faults, strict=True))


def test_what_fits() -> None:
    assert not list(hardware_faults(config(FSDP2)))
    assert not list(hardware_faults(config(FSDP2 | {"tensor_parallel_size": 2}, devices=4)))
    assert not list(hardware_faults(config({"name": "auto"}, optimizer=BITS)))
    assert not any(
        map(strategy_refusal, ("auto", "ddp", "fsdp2", "lightning_internvl.distributed.fsdp2.FSDP2", "my.OwnStrategy"))
    )


def test_processes_that_divide_layers_read_the_same_samples() -> None:
    given = config(FSDP2 | {"tensor_parallel_size": 2}, devices=4)
    assert readers(given, "first") == 2
    found, (told, _) = with_hardware(given, {"devices": 8})
    assert found["stages"]["first"]["batch_size"] == 2
    assert told.startswith("first: 8 processes instead of 4, batch_size 4 -> 2")


@pytest.mark.parametrize(
    ("cores", "trainer", "expected"),
    [(2, {}, 1), (1, {}, 1), (16, {}, 8), (16, {"devices": 4}, 3), (96, {"devices": 8, "num_nodes": 4}, 8)],
)
def test_auto_shares_the_cores_that_training_leaves(
    cores: int, trainer: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    assert data_workers("auto", trainer) == expected
    assert data_workers(5, trainer) == 5


def test_shards_need_a_number_of_workers() -> None:
    data = {"lanes": 8, "turns": 8, "shuffle": 8, "run": 8, "num_workers": "auto"}
    assert any("auto: readers of shards need a number" in fault for fault in stream_faults(data, None, look=False))
