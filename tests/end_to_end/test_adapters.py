"""Fine-tuning with adapters as a user runs it: one on top of the other, killed and resumed, with a base in 4 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import TINY, read_json, same_weights, stopped_before, tiny_run, train, weights

from lightning_internvl.layers.peft import is_update
from lightning_internvl.stages import SupervisedStage

TUNE = ("pipeline=[supervised]", "peft.decoder.rank=2", "decoder.config.hidden_size=64", "decoder.config.intermediate_size=64")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("base") / "run", *TUNE[2:])


def tuned(base: Path, run: Path, *arguments: str) -> Path:
    return tiny_run(run, *TUNE, f"init_from={base}", *arguments)


@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
def test_a_small_hand_off_and_an_untouched_base(base: Path, tmp_path: Path, method: str) -> None:
    run = tuned(base, tmp_path / "run", f"peft={method}", "stages.supervised.module.train=[decoder]")
    found = weights(run, "supervised")
    assert found
    assert all(is_update(name) for name in found)
    manifest = read_json(run / "handoff" / "supervised" / "manifest.json")
    assert set(manifest["trained"]) == set(found)
    table = read_json(run / "stages" / "supervised" / "freezing.json")[0]["rows"]
    assert {row["group"]: row["trained"] for row in table}["decoder.lm"] == sum(t.numel() for t in found.values())


def test_chained_fine_tunes(base: Path, tmp_path: Path) -> None:
    first = tuned(base, tmp_path / "first", "peft=lora")
    same = train(
        *TINY, *TUNE, "peft=lora", f"init_from={first}", f"paths.run={tmp_path}/same", "stages.supervised.optimizer.lr=1e-9"
    )
    assert same.code == 0, same.err
    assert "were added to their weights" not in same.out
    before, after = weights(first, "supervised"), weights(tmp_path / "same", "supervised")
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    other = train(*TINY, *TUNE, "peft=lora", "peft.decoder.rank=3", f"init_from={first}", f"paths.run={tmp_path}/other")
    assert other.code == 0, other.err
    assert f"the adapters of {first} on decoder were added to their weights" in other.out
    whole = train(*TINY, *TUNE[:1], *TUNE[2:], f"init_from={first}", f"paths.run={tmp_path}/whole")
    assert whole.code == 0, whole.err
    assert not any(is_update(name) for name in weights(tmp_path / "whole", "supervised"))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_stopped_and_resumed_equals_never_stopped(base: Path, tmp_path: Path, method: str) -> None:
    arguments = (f"peft={method}", "max_steps=6", "callbacks.checkpoint.every_n_steps=2")
    whole = tuned(base, tmp_path / "whole", *arguments)

    with stopped_before(5, SupervisedStage):
        train(*TINY, *TUNE, f"init_from={base}", *arguments, f"paths.run={tmp_path}/run")
    state = torch.load(tmp_path / "run" / "checkpoints" / "supervised" / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.removeprefix("model.") for name in state} == set(weights(whole, "supervised"))
    outcome = train(f"resume={tmp_path}/run")
    assert outcome.code == 0, outcome.err
    assert same_weights(whole, tmp_path / "run", "supervised")
    assert (whole / "metrics.json").read_bytes() == (tmp_path / "run" / "metrics.json").read_bytes()


BAD = {
    ("peft=lora", "peft.decoder.rank=0"): r"peft\.decoder\.rank=0 must be a whole number above 0",
    ("peft=lora", "peft.decoder.method=loha"): r"peft\.decoder\.method='loha' is not known; .*valid choices: lora, dora",
    ("peft=lora", "peft.decoder.targets=[wqkv]"): r"peft\.decoder\.targets: 'wqkv' matches no linear layer",
    ("peft=lora", "+peft.decoder.alhpa=3"): r"peft\.decoder: there is no setting 'alhpa'; did you mean 'alpha'\?",
    ("+peft.tower={}",): r"peft: there is no part 'tower'; .*valid choices: encoder, middleware, decoder",
    ("quantization=nf4", "quantization.decoder=nf5"): r"quantization\.decoder='nf5' is not known; did you mean 'nf4'\?",
    ("+stages.supervised.peft.decoder.rank=3",): r"stages\.supervised: peft\.decoder lacks method, alpha, dropout, targets",
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_settings(arguments: tuple[str, ...], tmp_path: Path) -> None:
    import re

    outcome = train(*TINY, "pipeline=[supervised]", *arguments, f"paths.run={tmp_path}/run")
    assert outcome.code != 0
    assert re.search(BAD[arguments], outcome.err), outcome.err
