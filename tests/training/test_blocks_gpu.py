"""What blocks and the feature cache do on a GPU in bf16: the same numbers, less memory, code that Triton makes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_activation_checkpointing import loss_of, tiny

from lightning_internvl.choices import by_part
from lightning_internvl.model.feature_cache import FeatureCache
from lightning_internvl.model.feature_stores import MemoryStore
from lightning_internvl.model.vlm import VLM
from lightning_internvl.training.compile import check_compiler, compile_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.device("cuda"), torch.autocast("cuda", torch.bfloat16):
        yield
    torch._dynamo.reset()


def step(model: VLM) -> tuple[float, int]:
    """The loss of a step, and the bytes that its forward pass left."""
    before = torch.cuda.memory_allocated()
    loss = loss_of(model)
    held = torch.cuda.memory_allocated() - before
    loss.backward()
    return loss.item(), held


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_blocks_that_are_computed_again(kind: str) -> None:
    plain, again = tiny(), tiny(kind)
    (first, kept), (second, less) = step(plain), step(again)
    assert first == second
    assert less < kept
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(again.get_parameter(name).grad, parameter.grad, rtol=1e-2, atol=1e-4)


def test_compiled_blocks() -> None:
    check_compiler(by_part(True), "gpu")
    plain, compiled = tiny().eval(), tiny().eval()
    compile_blocks(compiled, by_part(True))
    torch.testing.assert_close(loss_of(compiled), loss_of(plain), rtol=1e-2, atol=1e-2)


def test_cached_features() -> None:
    model, pixels = tiny(train="middleware").eval(), torch.randn(2, 3, 16, 16)
    model.feature_cache = FeatureCache(MemoryStore(2**20), lambda: "tower")
    first, again = (model.visual_tokens(pixels, picture_keys=["a", "b"]) for _ in range(2))
    assert first.equal(again)
    assert again.is_cuda
    assert (model.feature_cache.computed, model.feature_cache.found) == (2, 2)
