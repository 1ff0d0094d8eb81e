"""Another tower in front of a finished model, from the command line: what is handed over, planned, resumed and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from runs import ROOT, read_json, same_weights, stopped_before, tiny_run, train, weights

from lightning_internvl import load_pretrained
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.stages import TransplantStage

ANSWERING = (
    "pipeline=[supervised]",
    "middleware@stages.supervised.middleware=mlp",
    "stages.supervised.max_steps=2",
    "stages.supervised.new=[encoder,middleware,decoder]",
)
SHORT = (
    "data=scenes", "data.image_size=48", "data.held_out.scenes=12", "data.held_out.questions=4", "callbacks.samples=null",
    "stages.transplant.max_steps=8", "stages.transplant.batch_size=4", "stages.words.max_steps=1", "stages.words.batch_size=4",
    "stages.supervised.max_steps=1", "stages.supervised.batch_size=4",
)  # fmt: skip
CLIP = ROOT / "tests/fixtures/hf/clip"  # 32 px in patches of 8, width 48, behind a model of 48 px in patches of 24


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model that answers, and a released CLIP's tower in front of it."""
    folder = tmp_path_factory.mktemp("transplant")
    found = {"old": tiny_run(folder / "old", *ANSWERING), "whole": folder / "whole"}
    outcome = train(*command(found), f"paths.run={found['whole']}", "callbacks.checkpoint.every_n_steps=3")
    assert outcome.code == 0, outcome.err
    assert "transplant: linear layer 2 of 2 (16 -> 16) solved from" in outcome.out
    return found


def command(runs: dict[str, Path], *words: str) -> tuple[str, ...]:
    return ("experiment=transplant", f"init_from={runs['old']}", f"encoder.pretrained={CLIP}", *SHORT, *words)


def test_the_tower_is_the_new_one_and_the_language_model_the_old_one(runs: dict[str, Path]) -> None:
    old, solved = weights(runs["old"], "supervised"), weights(runs["whole"], "transplant")
    new = {f"encoder.{name}": tensor for name, tensor in own_tensors(load_pretrained(CLIP).encoder).items()}
    for name, tensor in solved.items():
        source = {"encoder": new, "decoder": old}.get(name.partition(".")[0])
        assert source is None or tensor.equal(source[name]), name
    assert solved["middleware.mlp1.0.weight"].shape == (16, 48)
    metrics = read_json(runs["whole"] / "metrics.json")["transplant"]
    assert metrics["places"] == 3 * 4 * 16
    assert metrics["tokens_explained"] < 1
    model = load_pretrained(runs["whole"] / "handoff" / "supervised")
    assert (model.encoder.dim, model.middleware.tokens_out(model.encoder.num_tokens())) == (48, 16)


def test_pictures_have_the_size_of_the_new_tower(runs: dict[str, Path]) -> None:
    config = yaml.safe_load((runs["whole"] / "config.yaml").read_text())
    assert config["data"]["processor"]["image_size"] == 32
    assert config["stages"]["transplant"]["module"]["old"]["image_size"] == 48


def test_stopped_and_resumed_equals_whole(runs: dict[str, Path], tmp_path: Path) -> None:
    with stopped_before(7, TransplantStage):
        train(*command(runs, "pipeline=[transplant]"), f"paths.run={tmp_path}/run", "callbacks.checkpoint.every_n_steps=3")
    outcome = train(f"resume={tmp_path}/run")
    assert "transplant: goes on from step 6" in outcome.out
    assert same_weights(runs["whole"], tmp_path / "run", "transplant")
    both = (read_json(run / "metrics.json")["transplant"] for run in (runs["whole"], tmp_path / "run"))
    assert next(both) == next(both)


def test_a_plan_counts_both_towers(runs: dict[str, Path]) -> None:
    outcome = train(*command(runs, "plan=true", "pipeline=[transplant]"))
    assert outcome.code == 0, outcome.err
    assert "│ other" in outcome.out


def test_what_stands_without_weights_or_answers_nothing_is_refused(runs: dict[str, Path]) -> None:
    bare = train("experiment=transplant", f"init_from={runs['old']}", "encoder=clip_vit_toy", *SHORT)
    assert (bare.code, "CLIPViT has no weights" in bare.err) == (2, True)
    nothing = train("experiment=transplant", f"init_from={runs['old']}", *SHORT)
    assert (nothing.code, "nothing is another part than in init_from" in nothing.err) == (2, True)


def test_the_language_model_is_another_one_and_all_before_it_stays(runs: dict[str, Path], tmp_path: Path) -> None:
    start = f"init_from={runs['whole']}/handoff/transplant"
    words = ("experiment=transplant", start, f"decoder.pretrained={runs['old']}", *SHORT, "pipeline=[transplant]")
    outcome = train(*words, f"paths.run={tmp_path}/run", "stages.transplant.max_steps=2")
    assert outcome.code == 0, outcome.err
    before, solved, other = (
        weights(runs["whole"], "transplant"),
        weights(tmp_path / "run", "transplant"),
        weights(runs["old"], "supervised"),
    )
    for name, tensor in solved.items():
        source = other if name.startswith("decoder.") else before
        assert tensor.equal(source[name]) == (not name.startswith("middleware.mlp1.2.")), name
    planned = train(*words, "plan=true")
    assert planned.code == 0, planned.err
