"""benchmarks/roofline.py: what it counts of a tiny step, and what it says of changes."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.roofline import OPTIONS, measure
from benchmarks.roofline_fusion import Op, found_again, fused

TINY = {**OPTIONS, "size": "tiny", "tokens": 128, "tiles": 2, "learnt": 16}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    kinds = ("selective", "full")
    ways = {"plain": {}, "compiled": {"compile": "true"}} | {kind: {"activation_checkpointing": kind} for kind in kinds}
    return {name: measure(TINY | way) for name, way in ways.items()}


def _flops(rows: list[list[Any]], *phases: str) -> float:
    return 1e12 * sum(flops for phase, name, ms, calls, flops, size in rows if phase in phases)


def test_flops_are_those_of_the_products(found: dict[str, dict[str, Any]]) -> None:
    tokens, width, mlp, layers, patches, samples, length = 128, 64, 128, 2, 17, 4, 32
    tower = 2 * (2 * 16 * 588 * width + layers * (2 * patches * width * (4 * width + 2 * mlp) + 4 * patches**2 * width))
    connector = 2 * 4 * 2 * (4 * width * width + width * width)
    text = layers * (2 * tokens * width * (2 * width + 2 * 32 + 3 * mlp) + 0.5 * 4 * samples * length**2 * width)
    head = 2 * 16 * width * 100
    forward = _flops(found["plain"]["operators"], "forward")
    assert forward == pytest.approx(tower + connector + text + head)
    every_product_twice = _flops(found["plain"]["operators"], "backward")
    attended = layers * (4 * 2 * patches**2 * width + 0.5 * 4 * samples * length**2 * width)
    no_gradient = 2 * 2 * 16 * 588 * width  # of pixels
    assert every_product_twice == pytest.approx(2 * forward + 0.5 * attended - no_gradient)


def test_what_is_computed_again_is_kept_less_and_is_no_work_of_the_model(found: dict[str, dict[str, Any]]) -> None:
    plain, full = found["plain"], found["full"]
    assert _flops(full["operators"], "recompute") > 0.5 * _flops(plain["operators"], "forward")
    for phases in (["forward"], ["backward"]):
        assert _flops(full["operators"], *phases) == _flops(plain["operators"], *phases)
    assert plain["kept_GiB"] > found["selective"]["kept_GiB"] > full["kept_GiB"] > 0


def test_fusion_saves_bytes_and_no_products(found: dict[str, dict[str, Any]]) -> None:
    plain, compiled = found["plain"], found["compiled"]
    assert _flops(compiled["operators"], "forward", "backward") == _flops(plain["operators"], "forward", "backward")
    assert compiled["elementwise_ms"] < 0.6 * plain["elementwise_ms"]
    assert compiled["kept_GiB"] < plain["kept_GiB"]
    assert compiled["kernels"] < plain["kernels"]


def _op(name: str, reads: list[int], write: int, region: int | None = 0, phase: str = "forward") -> Op:
    return Op(name, phase, 0.0, dict.fromkeys(reads, 8), {write: 8}, None if region is None else (region, phase))


def test_a_fused_run_reads_what_it_did_not_make_and_writes_what_is_used_later() -> None:
    product, other = _op("mm", [4, 3], 6, None), _op("mm", [0], 7, None)
    run = [_op("mul", [0, 1], 2), other, _op("add", [2, 1], 3), _op("gelu", [3], 4)]
    found = list(fused([*run, product, _op("add", [6], 8), _op("neg", [8], 9, 1)], {9}))
    assert [one.name for one in found] == ["mm", "fused elementwise", "mm", "add", "neg"]
    assert found[1].reads == {0: 8, 1: 8}
    assert found[1].writes == {3: 8, 4: 8}
    assert found[4].writes == {9: 8}


def test_what_reads_the_same_joins_though_it_comes_later_but_waits_for_products() -> None:
    ops = [_op("gelu_backward", [0, 1], 2), _op("mm", [2], 3, None), _op("sum", [2], 4), _op("sum", [3], 5), _op("neg", [9], 6)]
    found = list(fused(ops, {4, 5, 6}))
    assert [(one.name, set(one.reads), set(one.writes)) for one in found] == [
        ("fused elementwise", {0, 1}, {2, 4}),
        ("mm", {2}, {3}),
        ("fused elementwise", {3, 9}, {5, 6}),
    ]


def test_a_row_too_long_to_be_held_is_read_twice() -> None:
    ops = [_op("amax", [0], 1), _op("sub", [0, 1], 2)]
    ops[0].long = True
    (kernel,) = fused(ops, {2})
    assert (kernel.reads, kernel.writes) == ({0: 16}, {2: 8})


def test_what_the_backward_pass_can_find_again_is_not_kept() -> None:
    """Of silu(gate) * up, in front of a product, the first factor, and not what a product or the next block reads."""
    forward = [_op("silu", [0], 1), _op("mul", [1, 2], 3), _op("mm", [3], 4, None), _op("add", [4, 5], 6)]
    after = [_op("neg", [6], 7, 1)]
    backward = [_op("mul", [8, 1], 9, 2, "backward"), _op("mm", [9, 3], 10, None, "backward")]
    backward += [_op("mul", [8, 0, 2, 6], 11, 2, "backward")]
    changed, dropped = found_again([*forward, *after, *backward])
    assert dropped == {1}
    assert set(changed[5].reads) == {8, 0}
    assert set(changed[7].reads) == {8, 0, 2, 6}
