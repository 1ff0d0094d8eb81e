"""Where a finished model runs, and in which types."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_internvl.inference import device
from lightning_internvl.inference.device import place_for


@pytest.mark.parametrize(
    ("kind", "dtype", "trained_in", "capable", "name"),
    [
        ("cpu", "auto", "bf16-mixed", True, "float32"),
        ("cuda", "auto", "bf16-mixed", True, "float32 with products in bfloat16"),
        ("cuda", "auto", "bf16-mixed", False, "float32"),
        ("cuda", "auto", "16-mixed", False, "float32 with products in float16"),
        ("cuda", "auto", "32-true", True, "float32"),
        ("cuda", "float32", "bf16-mixed", True, "float32"),
        ("cuda", "bfloat16", "32-true", True, "bfloat16"),
    ],
)
def test_a_run_is_used_in_the_precision_that_it_trained_in(
    kind: str, dtype: str, trained_in: str, capable: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = list[tuple[str, torch.device, torch.dtype]]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: kind == "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capable)
    monkeypatch.setattr(device, "choose_backend", lambda *place: chosen.append(place))
    monkeypatch.setattr(device, "set_products", lambda precision, _: None)
    place = place_for(SimpleNamespace(device="auto", dtype=dtype, matmul_precision="high"), trained_in)
    assert (place.device.type, place.name) == (kind, name)
    assert chosen == [("auto", place.device, place.products or place.dtype)]


def test_products_are_computed_in_the_lower_type_inside() -> None:
    place = device.Place(torch.device("cpu"), torch.float32, torch.bfloat16)
    layer = torch.nn.Linear(2, 2)
    with place.precision():
        assert layer(torch.ones(1, 2)).dtype == torch.bfloat16
    with place._replace(products=None).precision():
        assert layer(torch.ones(1, 2)).dtype == torch.float32
