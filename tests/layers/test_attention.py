"""Attention backends agree, and the choice among them says why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_attention_masks import KINDS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_internvl.layers import attention
from lightning_internvl.layers.attention import BACKENDS, attend, choose_backend
from lightning_internvl.layers.attention_kernels import flex
from lightning_internvl.layers.attention_masks import Mask, packed


@pytest.fixture(autouse=True)
def restore_backend() -> Iterator[None]:
    before = attention._asked, attention._backend
    yield
    attention._asked, attention._backend = before


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
    with pytest.raises(ValueError, match="attention='fast' is not known; valid choices: auto, xformers, flash, flex, sdpa, math"):
        choose_backend("fast")
    assert attention._backend == attention.requested_backend() == "math"


def masked(mask: Mask, device: str = "cpu", dtype: torch.dtype = torch.float32, groups: int = 4) -> list[Tensor]:
    """Queries of four heads, and keys and values of `groups`."""
    rows, _, queries, keys = mask.shape
    sizes = ((4, queries), (groups, keys), (groups, keys))
    return [torch.randn(rows, heads, length, 16, device=device, dtype=dtype, requires_grad=True) for heads, length in sizes]


def by_formula(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """From the dense mask; a query that sees nothing gets nothing."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).float() for x in (k, v))
    dense = mask.dense(q.device)
    scores = (q.float() @ k.mT / q.shape[-1] ** 0.5).masked_fill(~dense, -torch.inf)
    weights = torch.where(dense.any(-1, keepdim=True), scores, 0.0).softmax(-1)
    return torch.where(dense.any(-1, keepdim=True), weights @ v, 0.0)


@pytest.mark.parametrize("groups", [4, 2], ids=["own keys", "shared keys"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_backends_agree_on_every_mask_with_gradients(backend: str, kind: str, groups: int) -> None:
    mask, _ = KINDS[kind]
    tensors = masked(mask, groups=groups)
    choose_backend(backend)
    out = attend(*tensors, mask=mask)
    expected = by_formula(*tensors, mask)
    weights = torch.randn_like(out)
    for found, reference in zip(
        [out, *torch.autograd.grad((out * weights).sum(), tensors)],
        [expected, *torch.autograd.grad((expected * weights).sum(), tensors)],
        strict=True,
    ):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
def test_flex_agrees_forward_on_a_cpu(kind: str) -> None:
    mask, _ = KINDS[kind]
    q, k, v = (x.detach() for x in masked(mask))
    torch.testing.assert_close(flex(q, k, v, mask, None), by_formula(q, k, v, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_the_scale_can_be_set(backend: str) -> None:
    mask = packed([[3, 4]], 8)
    q, k, v = masked(mask)
    choose_backend(backend)
    torch.testing.assert_close(attend(q, k, v, mask=mask, scale=0.5), by_formula(q * 2, k, v, mask))


class Largest(TorchDispatchMode):
    """The most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("groups", [4, 2])
def test_sdpa_makes_no_square_of_packed_rows(groups: int) -> None:
    """Neither of the row nor, where a piece is causal from its first key on, of the piece."""
    length = 512
    tensors = masked(packed([[200, 300]], length), groups=groups)
    own = tensors[0].numel()
    for backend, squares in (("sdpa", False), ("math", True)):
        choose_backend(backend)
        with Largest() as largest:
            attend(*tensors, mask=packed([[200, 300]], length)).sum().backward()
        assert (largest.elements >= length**2) is squares
        assert squares or largest.elements <= own


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_mixed_precision_gives_the_lower_type(backend: str) -> None:
    """With padding in the row, whose zeros nobody computed."""
    mask = packed([[3, 4]], 9)
    q, k, v = masked(mask)
    choose_backend(backend)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v, mask=mask)
    torch.testing.assert_close(out.float(), by_formula(q, k, v, mask), rtol=3e-2, atol=3e-2)
    assert out.dtype == torch.bfloat16


def test_a_mask_for_other_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="is for 1 rows of 8 queries and 8 keys, not for 2 rows of 6 queries and 6 keys"):
        attend(*inputs(), mask=packed([[3]], 8))


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("auto", "math")])
def test_gpu_backends_agree_on_every_mask(backend: str, kind: str, groups: int) -> None:
    try:
        choose_backend(backend, "cuda", torch.bfloat16)
    except ValueError as error:
        pytest.skip(str(error))
    mask, _ = KINDS[kind]
    tensors = masked(mask, "cuda", torch.bfloat16, groups)
    out = attend(*tensors, mask=mask)
    expected = by_formula(*tensors, mask)
    weights = torch.randn_like(expected)
    for found, reference in zip(
        [out, *torch.autograd.grad((out.float() * weights).sum(), tensors)],
        [expected, *torch.autograd.grad((expected * weights).sum(), tensors)],
        strict=True,
    ):
        torch.testing.assert_close(found.float(), reference.float(), rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="xformers has no CPU kernel and no CUDA device was found")
@pytest.mark.parametrize("options", CASES, ids=["all", "causal", "mask"])
def test_xformers_equals_math(options: dict[str, Tensor | bool]) -> None:
    pytest.importorskip("xformers")
    options = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
    tensors = [x.requires_grad_() for x in inputs("cuda", torch.bfloat16)]
    results = []
    for backend in ("math", "xformers"):
        choose_backend(backend, "cuda", torch.bfloat16)
        out = attend(*tensors, **options)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), tensors)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-2, atol=2e-2)
