"""Faults of a filter's settings, found before anything is built."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_internvl.choices import trained_stages
from lightning_internvl.config.filter_checks import ORDER, RANGES, step_faults

STAGE = yaml.safe_load((Path(__file__).resolve().parents[2] / "conf" / "stage" / "filter.yaml").read_text())


def faults(pipeline: tuple[str, ...] = ("contrastive", "filter"), **changes: Any) -> list[str]:
    """The faults of the file in `conf` with some settings changed; dots lead into mappings."""
    config: dict[str, Any] = {
        "pipeline": list(pipeline),
        "init_from": None,
        "resume": None,
        "stages": {"contrastive": {"module": {}}, "filter": copy.deepcopy(STAGE)},
        "data": {"pairs": {"shards": "a.tar"}},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        node = config if path and path[0] in config else config["stages"]["filter"]
        for name in path:
            node = node[name]
        (config if last in ("init_from", "resume") else node)[last] = value
    return list(step_faults(config, "filter"))


def test_the_file_in_conf_is_valid() -> None:
    assert faults() == []
    assert set(RANGES) < set(ORDER)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rules__similarity__keep_share": 0}, "rules.similarity.keep_share=0 must be a number above 0 and at most 1"),
        ({"rules__similarity__keep_share": 1.5}, "keep_share=1.5"),
        ({"rules__similarity__keep_share": "half"}, "keep_share='half'"),
        ({"rules__similarity": {"minimum": 0.2}}, "there is no setting 'minimum'; did you mean 'min'?"),
        ({"rules__simliarity": {"min": 0.2}}, "there is no rule 'simliarity'; did you mean 'similarity'?"),
        ({"rules__side": {"min": 10, "max": 5}}, "rules.side: min=10 is above max=5, so it would drop every pair"),
        ({"rules__aspect": 3}, "rules.aspect=3 must be null"),
        ({"rules__scripts": {"allowed": ["klingon"], "min": 0.5}}, "there is no script 'klingon'"),
        ({"rules__scripts": {"allowed": ["latin"], "min": 2}}, "rules.scripts.min=2 must be a number from 0 to 1"),
        ({"rules__same_picture__distance": 40}, "rules.same_picture.distance=40"),
        ({"rules__same_caption__copies": 0}, "rules.same_caption.copies=0"),
        ({"rules": None}, "rules=None must name rules"),
        ({"scores_from": "nowhere"}, "scores_from=nowhere holds no scores"),
        ({"engine": "spark"}, "engine='spark' is not known"),
        ({"mode": "x"}, "mode='x' is not known"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number from 1 on"),
        ({"step": "sort"}, "step='sort' is not known"),
        ({"rulez": {}}, "'rulez' is no setting of a filter; did you mean 'rules'?"),
        ({"data__pairs": {"_target_": "ScenePairs"}}, "give data=webdataset"),
        ({"data__pairs": None}, "give data=webdataset"),
    ],
)
def test_each_fault_is_named(change: dict[str, Any], told: str) -> None:
    found = faults(**change)
    assert len(found) == 1
    assert told in found[0]


def test_similarity_needs_a_model_from_somewhere() -> None:
    first = ("filter", "contrastive")
    assert "there is no model before it" in faults(first)[0]
    assert faults(first, rules__similarity=None) == []
    assert faults(first, init_from="outputs/run") == []
    assert faults(first, resume="outputs/run") == []


def test_steps_are_not_among_the_stages_that_train() -> None:
    config = {"pipeline": ["a", "filter", "b"], "stages": {"a": {}, "b": {}, "filter": STAGE}}
    assert trained_stages(config) == ["a", "b"]
