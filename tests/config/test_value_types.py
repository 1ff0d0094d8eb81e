"""The value of a setting is of the type that its class says, and told by its name where it is not."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_internvl.cli import CONF
from lightning_internvl.config.known_keys import key_faults, stage_key_faults
from lightning_internvl.config.shapes import check_run_shapes
from lightning_internvl.config.signatures import signature_of
from lightning_internvl.config.value_types import type_fault
from lightning_internvl.messages import ConfigError

NAN, INF = float("nan"), float("inf")
FITTING: list[tuple[str, list[Any]]] = [
    ("int", [3, -1]),
    ("float", [3, 0.5, INF]),
    ("bool", [True, False]),
    ("str", ["a", ""]),
    ("int | None", [None, 3]),
    ("Optional[Union[int, str]]", [None, 3, "a"]),
    ("Sequence[str] | str", ["a", ["a", "b"], []]),
    ("tuple[float, float]", [[1, 2.5]]),
    ("Mapping[str, float] | None", [None, {"a": 1}]),
    ("Literal['c', 'g']", ["c"]),
    ("Tokenizer", [3, None, {"_target_": "x"}]),
    ("int", [{"_target_": "x"}]),
]
ODD: list[tuple[str, list[Any], str]] = [
    ("int", [True, 0.5, 1e30, NAN, INF, 10**20, "3", "", None, [], {"a": 1}], "must be a whole number"),
    ("float", [NAN, -INF, False, "a", None, [1.0]], "must be a number"),
    ("bool", [0, 1, "false", None, NAN], "must be true or false"),
    ("str | None", [3, True, ["a"]], "must be a text or null"),
    ("Sequence[str]", ["a", [1], {"a": 1}, None], "must be a list, each a text"),
    ("tuple[float, float]", [[1], [1, 2, 3], 1.0], "must be a list, each a number"),
    ("Mapping[str, float]", [[1], 1.5], "must be a mapping"),
    ("Literal['c', 'g']", ["", "C", None], "must be 'c' or 'g'"),
]


def annotation(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


@pytest.mark.parametrize(("kind", "values"), FITTING)
def test_fitting(kind: str, values: list[Any]) -> None:
    assert [type_fault("some", annotation(kind), value) for value in values] == [None] * len(values)


@pytest.mark.parametrize(("kind", "values", "told"), ODD)
def test_odd(kind: str, values: list[Any], told: str) -> None:
    assert {type_fault("some", annotation(kind), value) for value in values} == {told}


def test_numbers_of_known_names_have_bounds() -> None:
    assert type_fault("heads", annotation("int"), 0) == "must be a number from 1 on"
    assert type_fault("min_ratio", annotation("float"), 2) == "must be a number from 0 to 1"


TOLD: dict[str, Any] = {
    "encoder.heads": 0, "encoder.layer_scale": [], "middleware.dim": "7", "data.pairs.styles": True, "data.endless": INF,
    "data.pairs._target_": {}, "middleware.tokenizer._target_": 3, "callbacks.guard._target_": [1], "logger.history": {},
    "callbacks.samples.at": 2, "optimizer.layer_decay": -1, "trainer.accumulate_grad_batches": 0, "scheduler._partial_": 1.5,
    "stages.contrastive.samples.mode": "", "stages.contrastive.module.full_from_step": INF, "data.held_out.seed": -1,
    "stages.contrastive.evaluation.retrieval.name": 0, "optimizer.fused": "foo",
}  # fmt: skip


@pytest.fixture(scope="module")
def default() -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("config", overrides=["paths.run=x"]), resolve=True)
    return config


@pytest.mark.parametrize("setting", TOLD)
def test_settings_are_told_by_their_names(setting: str, default: dict[str, Any]) -> None:
    config = copy.deepcopy(default)
    assert faults_of(config) == []
    *path, last = setting.split(".")
    node = config
    for name in path:
        node = node[name]
    node[last] = TOLD[setting]
    (fault,) = faults_of(config)
    assert setting.removeprefix("stages.contrastive.") in fault or f"{last!r}" in fault


def test_names_that_import_each_other_are_nowhere_defined() -> None:
    assert signature_of("lightning_internvl.model.vlm.nn") is None  # torch imports nn from torch


def test_a_run_has_all_its_groups(default: dict[str, Any]) -> None:
    path = Path("run/config.yaml")
    check_run_shapes(default, path)
    lacking = {name: node for name, node in default.items() if name != "optimizer"}
    for config, told in (
        (lacking, "it has no optimizer"),
        ([1], "it has no encoder, "),
        ({**default, "quantization": NAN}, "quantization=nan: quantization holds settings"),
        ({**default, "decoder": 3}, "decoder=3: decoder holds settings"),
    ):
        with pytest.raises(ConfigError, match=rf"^run/config\.yaml.*{told}"):
            check_run_shapes(config, path)


def test_null_leaves_a_size_of_the_neighbours_to_the_program(default: dict[str, Any]) -> None:
    config = copy.deepcopy(default)
    config["middleware"]["vocab_size"] = None
    assert faults_of(config) == []


def faults_of(config: dict[str, Any]) -> list[str]:
    return [*key_faults(config), *stage_key_faults(config, config["stages"]["contrastive"])]
