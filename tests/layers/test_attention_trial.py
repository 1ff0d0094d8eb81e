"""A backend of attention is taken where it has run: kernels that refuse, on a device that is claimed to be theirs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from runs import TINY, train
from torch import Tensor

from lightning_internvl.config.stage_settings import TrainerSettings
from lightning_internvl.distributed.placement import computes_in, device_of, place_of
from lightning_internvl.layers import attention, attention_kernels, attention_trial
from lightning_internvl.layers.attention import attend, choose_backend
from lightning_internvl.layers.attention_masks import packed, prefix
from lightning_internvl.layers.hf_attention import attention as in_transformers

NOT_BUILT = """No operator found for `memory_efficient_attention_forward` with inputs:
     query       : shape=(2, 8, 2, 64) (torch.float32)
`fa2F@2.5.7-pt` is not supported because:
    xFormers wasn't built for this device
    dtype=torch.float32 (supported: {torch.float16, torch.bfloat16})
`cutlassF-pt` is not supported because:
    xFormers wasn't built for this device"""
TOLD = "xFormers wasn't built for this device; dtype=torch.float32 (supported: {torch.float16, torch.bfloat16})"
Refuse = Callable[[Tensor], None]


class Kernels:
    """Stands for a package: the formula, which counts its calls and raises what `refuse` raises."""

    def __init__(self, refuse: Refuse = lambda q: None) -> None:
        self.refuse, self.calls = refuse, 0

    def even(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float, scale: float | None) -> Tensor:
        self.refuse(q)
        self.calls += 1
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attention._math(q, k, v, None, causal, dropout, None, scale).transpose(1, 2)

    def side_by_side(self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Any, *options: Any) -> Tensor:
        self.refuse(q)
        self.calls += 1
        return attention._by_pieces(q, k, v, mask, *options)


def raising(error: Exception) -> Refuse:
    def refuse(q: Tensor) -> None:
        raise error

    return refuse


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Kernels]]:
    """Makes xformers a package of given kernels that is for CPUs; flash-attn is not installed."""

    def install(refuse: Refuse = lambda q: None) -> Kernels:
        made = Kernels(refuse)
        monkeypatch.setattr(attention, "DEVICES", attention.DEVICES | {"xformers": ("cpu",)})
        monkeypatch.setattr(attention, "_is_installed", lambda name: name != "flash")
        monkeypatch.setitem(attention_kernels.EVEN, "xformers", made.even)
        monkeypatch.setattr(attention_kernels, "side_by_side", made.side_by_side)
        monkeypatch.setattr(attention_trial, "_load", lambda backend: None)
        monkeypatch.setattr(attention_trial, "package_title", lambda backend: f"{backend} 1.0")
        monkeypatch.setattr(attention, "package_title", attention_trial.package_title)
        return made

    before = attention._asked, attention._backend
    monkeypatch.setattr(attention_trial, "_told", set())
    attention_trial.refusal.cache_clear()
    yield install
    attention_trial.refusal.cache_clear()
    attention._asked, attention._backend = before


def qkv(width: int = 16, groups: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(1, heads, 6, width, dtype=dtype, requires_grad=True) for heads in (2, groups, groups)]


# --- the choice ---------------------------------------------------------------------------------------------------------


def test_auto_takes_what_runs(installed: Callable[..., Kernels]) -> None:
    kernels = installed()
    assert choose_backend("auto") == ("xformers", "xformers 1.0 runs on cpu in float32")
    assert kernels.calls == 8, "even, causal, and two masks by lengths, each with heads of their own and with shared ones"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NotImplementedError(NOT_BUILT), TOLD),
        (
            ImportError("libcudart.so.12: cannot open shared object file"),
            r"libcudart.so.12: .* \(pip install nvidia-cuda-runtime-cu12\)",
        ),
        (RuntimeError("no kernel image is available\nmore"), "no kernel image is available"),
        (ValueError("headdim"), "headdim"),
    ],
    ids=["not implemented", "library", "runtime", "value"],
)
def test_kernels_that_refuse_are_not_taken(installed: Callable[..., Kernels], error: Exception, told: str) -> None:
    installed(raising(error))
    backend, reason = choose_backend("auto")
    assert backend == "sdpa"
    pattern = told if "pip" in told else re.escape(told)
    assert re.fullmatch(f"xformers 1.0 cannot run here: {pattern}", reason)
    with pytest.raises(ValueError, match=f"attention=xformers cannot run here: {pattern}; use attention=auto, sdpa or math"):
        choose_backend("xformers")


def test_a_backward_pass_that_is_not_there_is_found(installed: Callable[..., Kernels]) -> None:
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor) -> Tensor:
            return q.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise RuntimeError("there is no backward")

    kernels = installed()
    attention_kernels.EVEN["xformers"] = lambda q, *rest: kernels.even(Forward.apply(q), *rest)
    assert choose_backend("auto") == ("sdpa", "xformers 1.0 cannot run here: there is no backward")


def test_a_kernel_that_reads_masks_otherwise_is_not_taken(installed: Callable[..., Kernels]) -> None:
    """Its queries see the sample from the other end of the row."""
    kernels = installed()
    right = kernels.side_by_side
    attention_kernels.side_by_side = lambda name, q, k, v, mask, *rest: right(name, q, k.flip(2), v.flip(2), mask, *rest)
    assert choose_backend("auto") == ("sdpa", "xformers 1.0 cannot run here: what it computes is 1 from the formula")


def test_memory_that_is_short_is_no_refusal(installed: Callable[..., Kernels]) -> None:
    installed(raising(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        choose_backend("auto")


def only_in(dtype: torch.dtype) -> Refuse:
    def refuse(q: Tensor) -> None:
        if q.dtype != dtype:
            raise NotImplementedError(f"only {dtype}")

    return refuse


def test_the_type_decides(installed: Callable[..., Kernels]) -> None:
    installed(only_in(torch.bfloat16))
    assert choose_backend("auto", "cpu", torch.bfloat16)[0] == "xformers"
    assert choose_backend("auto", "cpu", torch.float32)[0] == "sdpa"
    with pytest.raises(ValueError, match=r"only torch.bfloat16; with trainer.precision=bf16-mixed it can; use attention="):
        choose_backend("xformers", "cpu", torch.float32)


def test_without_a_device_or_a_package_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    before = attention._asked, attention._backend
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # a GPU that the trainer does not use
    assert choose_backend("auto", "cpu") == ("sdpa", "xformers and flash-attn have no kernel for cpu")
    assert choose_backend("auto", torch.device("cuda", 0)) == ("sdpa", "neither xformers nor flash-attn is installed")
    attention._asked, attention._backend = before


@pytest.mark.parametrize(
    ("name", "there", "reason"),
    [
        ("xformers", True, "it has no kernel for cpu"),
        ("xformers", False, r"the package xformers is not installed \(pip install xformers==.*\)"),
        ("flash", True, "it has no kernel for cpu"),
        ("flash", False, r"the package flash_attn is not installed \(pip install flash-attn .*\)"),
        ("flex", True, "PyTorch's FlexAttention has no backward on cpu"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch, name: str, there: bool, reason: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if there else None)
    with pytest.raises(ValueError, match=f"attention={name} cannot run here: {reason}.*; use attention=auto, sdpa or math"):
        choose_backend(name)


# --- single calls -------------------------------------------------------------------------------------------------------


def odd(q: Tensor) -> None:
    if q.shape[-1] % 8:
        raise ValueError("query.shape[-1] % 8 != 0")


@pytest.mark.parametrize("groups", [2, 1], ids=["own keys", "shared keys"])
def test_a_call_without_a_kernel_is_pytorchs_and_told_once(
    installed: Callable[..., Kernels], capsys: pytest.CaptureFixture[str], groups: int
) -> None:
    kernels = installed(odd)
    choose_backend("xformers")
    mask = packed([[2, 3]], 6)
    for width, runs in ((16, True), (12, False)):
        tensors, before = qkv(width, groups), kernels.calls
        found = [attend(*tensors), attend(*tensors, causal=True), attend(*tensors, mask=mask)]
        assert (kernels.calls > before) is runs
        again = kernels.calls
        attend(*tensors)
        assert kernels.calls == again + runs, "a kernel is tried once, and then runs once a call"
        expected = [attention._sdpa(*tensors, None, causal, 0.0, None) for causal in (False, True)]
        for one, other in zip(found, [*expected, attention._by_pieces(*tensors, mask, 0.0, None)], strict=True):
            torch.testing.assert_close(one, other)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "attention: PyTorch's for heads of width 12 in float32; xformers 1.0 cannot run them here: query.shape[-1] % 8 != 0"
    ]


def test_the_lower_type_of_mixed_precision_decides(installed: Callable[..., Kernels]) -> None:
    kernels = installed(only_in(torch.bfloat16))
    choose_backend("xformers", "cpu", torch.bfloat16)
    attend(*qkv())
    before = kernels.calls
    attend(*qkv())
    assert kernels.calls == before
    with torch.autocast("cpu", torch.bfloat16):
        attend(*qkv())
        assert kernels.calls > before


@pytest.mark.parametrize("way", ["no_grad", "inference", "autocast", "full", "selective"])
def test_a_trial_in_the_midst_of_a_forward_pass_leaves_no_trace(installed: Callable[..., Kernels], way: str) -> None:
    """Neither in what recomputation notes nor in the draws that follow, and it sees nothing of the caller's settings."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    kernels, modes = installed(), list[tuple[bool, bool]]()
    kernels.refuse = lambda q: modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
    choose_backend("xformers")
    tensors, state = qkv(24), torch.get_rng_state()

    def keep(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE

    modes.clear()
    if way == "no_grad":
        with torch.no_grad():
            attend(*tensors, mask=prefix([2], [6], 6))
    elif way == "inference":
        with torch.inference_mode():
            attend(*tensors, mask=prefix([2], [6], 6))
    elif way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            attend(*tensors)
    else:
        options = {"context_fn": lambda: create_selective_checkpoint_contexts(keep)} if way == "selective" else {}
        found = torch.autograd.grad(checkpoint(attend, *tensors, use_reentrant=False, **options).square().sum(), tensors)
        expected = torch.autograd.grad(attention._math(*tensors, None, False, 0.0).square().sum(), tensors)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert modes[0] == (True, False), "the trial has gradients and no mixed precision"
    kind = "lengths" if way in ("no_grad", "inference") else "even"
    dtype = torch.bfloat16 if way == "autocast" else torch.float32
    before = kernels.calls
    assert attention_trial.refusal("xformers", torch.device("cpu"), dtype, 24, kind, False, False) is None
    assert kernels.calls == before, "it was known"
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trial_with_dropout_draws_nothing_of_the_runs_numbers(installed: Callable[..., Kernels]) -> None:
    installed()
    state = torch.get_rng_state()
    assert attention_trial.refusal("xformers", torch.device("cpu"), torch.float32, 24, "even", False, True) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_compiled_blocks_know_the_verdict(installed: Callable[..., Kernels]) -> None:
    kernels = installed(odd)
    choose_backend("xformers")
    torch._dynamo.reset()
    block = torch.compile(lambda q, k, v: attend(q, k, v) + 1, backend="eager", fullgraph=True)
    for width, runs in ((16, True), (12, False)):
        tensors, before = qkv(width), kernels.calls
        torch.testing.assert_close(block(*tensors), attention._sdpa(*tensors, None, False, 0.0, None) + 1)
        assert (kernels.calls > before) is runs


def test_language_models_fall_back_too(installed: Callable[..., Kernels]) -> None:
    installed(odd)
    choose_backend("xformers")
    tensors = qkv(12)
    found, _ = in_transformers(torch.nn.Identity(), *tensors, None, is_causal=True)
    torch.testing.assert_close(found.transpose(1, 2), attention._sdpa(*tensors, None, True, 0.0, None))


# --- where a trainer computes -------------------------------------------------------------------------------------------


def test_the_place_is_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert place_of(TrainerSettings.of({"accelerator": "cpu", "precision": "bf16-true"})) == (torch.device("cpu"), torch.bfloat16)
    assert place_of(TrainerSettings.of({"accelerator": "auto", "precision": "32-true"})) == (
        torch.device("cuda", 0),
        torch.float32,
    )
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of("gpu", 4) == torch.device("cuda", 1)
    assert device_of("gpu", [2, 3]) == torch.device("cuda", 3)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device_of("auto", 1) == torch.device("cpu")
    types = {"16-mixed": torch.float16, "bf16": torch.bfloat16, 64: torch.float64, 32: torch.float32, None: torch.float32}
    assert {name: computes_in(name) for name in types} == types


def test_a_run_asks_for_its_trainers_device_and_precision(
    installed: Callable[..., Kernels], tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a stage of another precision another backend is taken, and said."""
    installed(only_in(torch.bfloat16))
    run = ("trainer.precision=bf16-mixed", "+stages.generative.trainer={precision: 32-true}", "pipeline=[contrastive,generative]")
    outcome = train(*TINY, f"paths.run={tmp_path}", *run)
    assert outcome.code == 0, outcome.err
    said = [line.partition(" (")[0] for line in outcome.out.splitlines() if line.startswith("attention:")]
    assert said == ["attention: xformers", "attention: sdpa"]


def test_an_explicit_choice_that_cannot_run_ends_before_a_model_is_built(
    installed: Callable[..., Kernels], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(raising(ImportError("libcudart.so.12: cannot open shared object file")))
    monkeypatch.setattr("lightning_internvl.pipeline.assemble", lambda *_: pytest.fail("a model was built"))
    outcome = train(*TINY, f"paths.run={tmp_path}", "attention=xformers")
    assert outcome.code != 0
    assert "attention=xformers cannot run here" in outcome.err
    assert "pip install nvidia-cuda-runtime-cu12" in outcome.err
