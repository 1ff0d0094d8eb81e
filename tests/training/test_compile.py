"""Compiled blocks: the same numbers and names, one compilation for equal blocks, and an early word where no compiler is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from runs import TINY, losses, same_weights, tiny_run, train
from test_activation_checkpointing import LLAMA, loss_of, tiny
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lightning_internvl.choices import block_faults, by_part
from lightning_internvl.cli import CONF
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.objectives import NextToken
from lightning_internvl.stages import ContrastiveStage
from lightning_internvl.training import compile as compiling
from lightning_internvl.training.compile import check_compiler, chosen_blocks, compile_blocks

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by PyTorch, of PyTorch


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("again", [None, "full", "selective"])
def test_losses_gradients_and_names_stay(again: str | None) -> None:
    plain, compiled = tiny(), tiny(again)
    names = list(plain.state_dict())
    compile_blocks(compiled, by_part("aot_eager"))
    ends = [loss_of(model) for model in (plain, compiled)]
    for loss in ends:
        loss.backward()
    assert ends[0].equal(ends[1])
    assert names == list(compiled.state_dict())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-7)


def test_what_judges_logits_is_compiled_with_the_decoder() -> None:
    model, counter, found = torch.nn.Module(), CompileCounter(), []
    model.next_token, model.decoder = NextToken(chunk=4), HFCausalLM(config=LLAMA, vocab_size=50)
    states, targets = torch.randn(12, 32, requires_grad=True), torch.arange(12)
    for _ in range(2):
        loss = model.next_token.total_loss(states, targets, model.decoder.head)
        found.append([loss, torch.autograd.grad(loss, states)[0]])
        compile_blocks(model, {"decoder": counter})
    assert counter.frame_count == 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_equal_blocks_share_what_is_compiled_and_rows_of_any_length_too() -> None:
    decoder, counter = HFCausalLM(config=LLAMA | {"num_hidden_layers": 6}, vocab_size=50), CompileCounter()
    model = torch.nn.Module()
    model.decoder = decoder
    compile_blocks(model, {"decoder": counter})
    for length in (8, 9, 10, 11, 12, 30):
        decoder.hidden(torch.randn(2, length, 32), torch.ones(2, length, dtype=torch.int64)).sum().backward()
    # One length, then any, for a first block, whose input has no gradient, and for all others; not one for each of 36.
    assert 2 <= counter.frame_count <= 4


def test_packed_rows_and_numbers_of_tiles_that_vary_are_compiled_a_few_times() -> None:
    decoder, tower, counter = HFCausalLM(config=LLAMA, vocab_size=50), tiny().encoder, CompileCounter()
    model = torch.nn.Module()
    model.encoder, model.decoder = tower.train(), decoder.train()
    compile_blocks(model, by_part(counter))
    found = []
    for tiles, segments in enumerate(([8], [5, 4], [2, 3, 6], [12, 1], [30], [7, 7, 7]), start=1):
        length = sum(segments)
        tower(torch.randn(tiles, 3, tower.image_size, tower.image_size))[0].sum().backward()
        mask = torch.ones(1, length, dtype=torch.int64)
        decoder.hidden(torch.randn(1, length, 32), mask, segments=[segments]).sum().backward()
        found.append(counter.frame_count)
    assert found[2:] == [found[2]] * 4  # the first size, then any
    assert found[-1] <= 24  # for a first block and the others, before and after attention; not one for each of 30


def settings_of(compile: object = "auto", accelerator: str = "gpu", quantization: str | None = None, shares: int = 1) -> Any:  # noqa: A002
    parts = SimpleNamespace(quantization=by_part(quantization))
    trainer, strategy = SimpleNamespace(accelerator=accelerator), {"tensor_parallel_size": shares}
    return SimpleNamespace(compile=by_part(compile), trainer=trainer, strategy=strategy, parts=parts)


@torch._dynamo.config.patch(suppress_errors=False)
def test_auto_compiles_large_parts_on_a_gpu_that_code_can_be_made_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny()
    monkeypatch.setattr(compiling, "find_spec", lambda name: name)
    monkeypatch.setattr(compiling, "WORTH", 1_000)
    weights = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert chosen_blocks(settings_of(), model) == by_part(True)
    assert torch._dynamo.config.suppress_errors
    assert "compile: the blocks of encoder, middleware, decoder; compile=false" in capsys.readouterr().out
    monkeypatch.setattr(compiling, "WORTH", max(weights.values()))
    largest = max(weights, key=lambda name: weights[name])
    assert chosen_blocks(settings_of(), model) == dict.fromkeys(by_part(True)) | {largest: True}
    for off in (settings_of(accelerator="cpu"), settings_of(quantization="nf4"), settings_of(shares=2), settings_of(False)):
        assert not any(chosen_blocks(off, model).values())
    assert chosen_blocks(settings_of({"encoder": "eager", "decoder": "auto"}, "cpu"), model) == {
        "encoder": "eager",
        "decoder": None,
    }
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    capsys.readouterr()
    assert not any(chosen_blocks(settings_of(), model).values())
    assert "compile: nothing; Triton (pip install triton) is not there" in capsys.readouterr().out


def test_auto_is_the_default_and_does_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OmegaConf.load(CONF / "config.yaml").compile == "auto"
    assert not list(block_faults({"compile": "auto"}))
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    check_compiler(by_part("auto"), "gpu")


def test_a_copy_is_not_compiled() -> None:
    model = tiny()
    compile_blocks(model, by_part("eager"))
    assert model.encoder.sharding_units()[0]._compiled_call_impl is not None
    assert copy.deepcopy(model).encoder.sharding_units()[0]._compiled_call_impl is None


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"compile=true needs a C\+\+ compiler \(no-such-compiler"):
        check_compiler(by_part(True), "cpu")
    check_compiler(by_part("aot_eager"), "cpu")
    check_compiler({"decoder": None}, "cpu")
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs Triton"):
        check_compiler({"decoder": "inductor"}, "gpu")


def test_a_run_says_so_before_it_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    outcome = train(*TINY, f"paths.run={tmp_path}/run", "trainer.accelerator=cpu", "+stages.generative.compile=true")
    assert outcome.code == 2
    assert "stages.generative: compile=true needs a C++ compiler" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_run_of_all_stages_is_the_same(tmp_path: Path) -> None:
    shared = ("pipeline=[contrastive,generative]", "callbacks.samples=null", "callbacks.evaluation=null")
    plain = tiny_run(tmp_path / "plain", *shared)
    other = tiny_run(tmp_path / "other", *shared, "compile=eager", "activation_checkpointing=selective")
    for stage in ("contrastive", "generative"):
        assert losses(plain, stage) == losses(other, stage)
        assert same_weights(plain, other, stage)


def test_a_run_that_was_stopped_goes_on_as_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    often = "callbacks.checkpoint.every_n_steps=1"
    settings = (
        "pipeline=[contrastive]", "max_steps=3", "compile=eager", "activation_checkpointing=full", often,
        "callbacks.samples=null", "callbacks.evaluation=null",
    )  # fmt: skip
    whole = tiny_run(tmp_path / "whole", *settings)
    plain, steps = ContrastiveStage.losses, list[int]()

    def stopping(stage: ContrastiveStage, batch: dict[str, Any]) -> dict[str, Tensor]:
        steps.append(stage.global_step)
        if steps[-1] == 2:
            raise RuntimeError("stopped")
        return plain(stage, batch)

    with monkeypatch.context() as patched:
        patched.setattr(ContrastiveStage, "losses", stopping)
        with pytest.raises(RuntimeError, match="stopped"):
            train(*TINY, *settings, f"paths.run={tmp_path}/run")
    assert train(f"resume={tmp_path}/run").code == 0
    assert same_weights(whole, tmp_path / "run", "contrastive")
