"""Attention backends agree, and the choice among them says why."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_internvl import attention
from lightning_internvl.attention import attend, choose_backend


@pytest.fixture(autouse=True)
def restore_backend() -> Iterator[None]:
    before = attention._backend
    yield
    attention._backend = before


def inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 3, 6, 8, device=device, dtype=dtype) for _ in range(3)]


def row_masks() -> Tensor:
    mask = torch.rand(2, 1, 6, 6) > 0.4
    mask[..., 0] = True
    return mask


CASES = [{}, {"causal": True}, {"mask": row_masks()}]


@pytest.mark.parametrize("options", CASES, ids=["all", "causal", "mask"])
def test_math_is_the_formula(options: dict[str, Tensor | bool]) -> None:
    choose_backend("math")
    q, k, v = inputs()
    out = attend(q, k, v, **options)
    allowed = options.get("mask", torch.ones(2, 1, 6, 6, dtype=torch.bool))
    allowed = allowed.tril() if options.get("causal") else allowed
    for row in range(2):
        for head in range(3):
            for t in range(6):
                keys = allowed[row, 0, t]
                weights = torch.exp(k[row, head, keys] @ q[row, head, t] / 8**0.5)
                torch.testing.assert_close(out[row, head, t], weights @ v[row, head, keys] / weights.sum())


@pytest.mark.parametrize("options", CASES, ids=["all", "causal", "mask"])
def test_sdpa_equals_math_with_its_gradients(options: dict[str, Tensor | bool]) -> None:
    tensors = [x.requires_grad_() for x in inputs()]
    results = []
    for backend in ("math", "sdpa"):
        choose_backend(backend)
        out = attend(*tensors, **options)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_one_mask_for_all_rows_and_heads_is_broadcast() -> None:
    q, k, v = inputs()
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(attend(q, k, v, mask=mask), attend(q, k, v, causal=True))


def test_choice_and_reason() -> None:
    assert choose_backend("math") == ("math", "asked for by the configuration")
    with pytest.raises(ValueError, match="attention='flash' is not known; valid choices: auto, xformers, sdpa, math"):
        choose_backend("flash")
    assert attention._backend == "math"


@pytest.mark.parametrize(
    ("installed", "cuda", "expected"),
    [
        (True, True, ("xformers", "a CUDA device and the xformers package were found")),
        (True, False, ("sdpa", "no CUDA device")),
        (False, True, ("sdpa", "xformers is not installed")),
    ],
)
def test_auto_takes_what_is_there(
    monkeypatch: pytest.MonkeyPatch, installed: bool, cuda: bool, expected: tuple[str, str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    assert choose_backend("auto") == expected


@pytest.mark.parametrize(("installed", "reason"), [(True, "no CPU kernel"), (False, "not installed")])
def test_xformers_that_cannot_run_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, installed: bool, reason: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=f"{reason}.*use attention=auto, sdpa or math"):
        choose_backend("xformers")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="xformers has no CPU kernel and no CUDA device was found")
@pytest.mark.parametrize("options", CASES, ids=["all", "causal", "mask"])
def test_xformers_equals_math(options: dict[str, Tensor | bool]) -> None:
    pytest.importorskip("xformers")
    options = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
    tensors = [x.requires_grad_() for x in inputs("cuda", torch.bfloat16)]
    results = []
    for backend in ("math", "xformers"):
        choose_backend(backend)
        out = attend(*tensors, **options)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), tensors)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-2, atol=2e-2)
