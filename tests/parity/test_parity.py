"""Every published number that a fixture holds is reproduced, from the original's own weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import HERE, Fixture, differences, extra_roots, find
from runners import RUNNERS, runner_for
from safetensors.torch import load_file, save_file

from lightning_internvl import load_pretrained

FIXTURES = find(HERE, *extra_roots())
STAGE_2 = HERE / "official" / "internvl_g_stage2"


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: f"{fixture.folder.parent.name}/{fixture.folder.name}")
def test_outputs_equal_the_original(fixture: Fixture) -> None:
    runner = runner_for(fixture)
    problems = differences(fixture.outputs, runner.run(fixture), runner.ECHOES)
    assert not problems, "\n".join(f"{name}: {problem}" for name, problem in sorted(problems.items()))


def test_every_runner_has_a_fixture_here() -> None:
    ours = find(HERE)
    assert all(any(runner.knows(fixture) for fixture in ours) for runner in RUNNERS)


def test_a_planted_bug_is_seen_where_it_acts_and_nowhere_else(tmp_path: Path) -> None:
    folder = tmp_path / "planted"
    shutil.copytree(STAGE_2, folder)
    weights = load_file(folder / "model.safetensors")
    weights["qllama.model.layers.0.cross_attn.o_proj.weight"] *= 1.01
    save_file(weights, folder / "model.safetensors")
    fixture = Fixture(folder)
    problems = differences(fixture.outputs, runner_for(fixture).run(fixture), runner_for(fixture).ECHOES)
    assert {"g.query_outputs", "g.logits_per_image", "stage2.loss_itm", "stage2.grad.query_tokens"} <= problems.keys()
    assert not any(name.startswith(("c.", "vision_last_hidden")) for name in problems)


def test_empty_texts_are_compared_with_but_not_judged() -> None:
    fixture = Fixture(STAGE_2)
    fixture.inputs["summarize_mask"] = torch.tensor([9, 5, 8, 7])[:, None] > torch.arange(
        14
    )  # row 1 has the length of an empty text
    fixture.inputs["positive_mask"] = torch.tensor([7, 7, 2, 6])[:, None] > torch.arange(14)  # and so has row 2 of the matches
    ours = runner_for(fixture).run(fixture)

    model = load_pretrained(STAGE_2)
    with torch.no_grad():
        image = F.normalize(model.middleware.clip_projector2(ours["g.query_outputs"]), dim=-1)
        logits = model.objectives["itc"].scale * image @ F.normalize(ours["g.text_embeds"], dim=-1).T
    judged = torch.tensor([0, 2, 3])
    expected = (F.cross_entropy(logits[judged], judged) + F.cross_entropy(logits.T[judged], judged)) / 2
    torch.testing.assert_close(ours["stage2.loss_itc"], expected.reshape(1))

    fixture.inputs["positive_ids"][2] = 7  # another text in the row that is not judged
    assert runner_for(fixture).run(fixture)["stage2.loss_itm"].equal(ours["stage2.loss_itm"])


def test_an_unknown_system_fails_and_names_the_known_ones(tmp_path: Path) -> None:
    shutil.copytree(STAGE_2, tmp_path / "unknown")
    (tmp_path / "unknown" / "config.json").write_text(json.dumps({"model_type": "something_else"}))
    (fixture,) = find(tmp_path)
    with pytest.raises(LookupError, match=r"InternVL-G .* known systems: InternVL-G"):
        runner_for(fixture)


@pytest.mark.parametrize(
    ("ours", "problem"),
    [
        (torch.tensor([1.0, 100.0]), None),
        (torch.tensor([1.0, 100.009]), None),
        (torch.tensor([1.0, 100.02]), "off by"),
        (torch.tensor([1.0, float("nan")]), "off by"),
        (torch.tensor([[1.0, 100.0]]), "instead of"),
        (torch.tensor([1.0, 100.0], dtype=torch.bfloat16), "instead of"),
        (None, "not computed"),
    ],
)
def test_comparison(ours: torch.Tensor | None, problem: str | None) -> None:
    found = differences({"x": torch.tensor([1.0, 100.0])}, {} if ours is None else {"x": ours})
    assert found == {} if problem is None else problem in found["x"]


def test_ids_are_compared_exactly_and_echoes_not_at_all() -> None:
    reference = {"ids": torch.tensor([[1, 2, 3]]), "prompt": torch.tensor([9])}
    assert differences(reference, {"ids": torch.tensor([[1, 2, 3]])}, frozenset({"prompt"})) == {}
    assert differences(reference, {"ids": torch.tensor([[1, 2, 4]])}, frozenset({"prompt"})) == {"ids": "1 of 3 differ"}


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        find(tmp_path / "nowhere")
