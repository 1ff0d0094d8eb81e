"""The closed form of a linear layer: exact where targets are linear, sums that add up, a prior."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_internvl.layers.least_squares import NormalEquations, solve


def equations(x: Tensor, y: Tensor) -> NormalEquations:
    found = NormalEquations(x.shape[1], y.shape[1])
    found.add(x, y)
    return found


def drawn(places: int, width: int = 12, outputs: int = 5, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(places, width, generator=draw) * torch.linspace(0.5, 3, width) + 2
    weight, bias = torch.randn(outputs, width, generator=draw), torch.randn(outputs, generator=draw)
    return x, x @ weight.T + bias + noise * torch.randn(places, outputs, generator=draw), weight, bias


def test_a_linear_target_is_found_exactly() -> None:
    x, y, weight, bias = drawn(400)
    found = solve(equations(x[:300], y[:300]), equations(x[300:], y[300:]))
    torch.testing.assert_close(found.weight.float(), weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.bias.float(), bias, atol=1e-3, rtol=0)
    assert found.explained > 1 - 1e-9
    assert found.rank == 12
    assert found.places == 300


def test_the_solution_and_its_score_are_those_of_numpy() -> None:
    """Ridge regression as numpy 2 solves the stacked system, and R^2 from the residuals themselves."""
    x, y, _, _ = drawn(60, noise=4.0)
    found = solve(equations(x[:40], y[:40]), equations(x[40:], y[40:]))
    inside, target = (x[:40] - x[:40].mean(0)).double().numpy(), (y[:40] - y[:40].mean(0)).double().numpy()
    damping = found.penalty * np.trace(inside.T @ inside) / 12
    stacked = np.vstack([inside, np.sqrt(damping) * np.eye(12)])
    weight = np.linalg.lstsq(stacked, np.vstack([target, np.zeros((12, 5))]), rcond=None)[0]
    np.testing.assert_allclose(found.weight.numpy(), weight.T, atol=1e-6)
    outside = (x[40:].double() @ found.weight.T + found.bias).numpy()
    true = y[40:].double().numpy()
    share = 1 - ((true - outside) ** 2).sum() / ((true - true.mean(0)) ** 2).sum()
    assert found.explained == pytest.approx(share, abs=1e-9)


def test_sums_of_two_processes_are_those_of_one() -> None:
    x, y, _, _ = drawn(20_000, noise=1.0)  # several chunks
    whole, one, other = equations(x, y), equations(x[:7000], y[:7000]), equations(x[7000:], y[7000:])
    added = NormalEquations(12, 5, {name: value + other.sums[name] for name, value in one.sums.items()})
    assert added.count == whole.count == 20_000
    for name, value in whole.sums.items():
        torch.testing.assert_close(added.sums[name], value, rtol=1e-12, atol=0)


def test_a_layer_without_bias_goes_through_the_origin() -> None:
    x, _, weight, _ = drawn(200)
    found = solve(equations(x[:150], x[:150] @ weight.T), equations(x[150:], x[150:] @ weight.T), bias=False)
    torch.testing.assert_close(found.weight.float(), weight, atol=1e-4, rtol=0)
    assert not found.bias.any()


def test_where_places_say_nothing_the_prior_stays() -> None:
    x, y, weight, _ = drawn(300)
    x[:, 4] = 0.0  # a channel that nothing excites
    y = x @ weight.T
    prior = torch.full((5, 12), 0.7)
    found = solve(equations(x[:200], y[:200]), equations(x[200:], y[200:]), prior)
    torch.testing.assert_close(found.weight[:, 4].float(), prior[:, 4])
    assert found.rank == 11
    assert (found.weight[:, 5].float() - weight[:, 5]).abs().max() < 1e-3


def test_few_noisy_places_are_damped() -> None:
    x, y, _, _ = drawn(14 + 500, noise=6.0)
    found = solve(equations(x[:14], y[:14]), equations(x[14:], y[14:]))
    bare = torch.linalg.lstsq(torch.cat([x[:14], torch.ones(14, 1)], dim=1).double(), y[:14].double()).solution
    judged = equations(x[14:], y[14:])
    assert found.penalty > 1e-8
    assert found.explained > judged.explained(bare[:-1].T, bare[-1])


def test_no_places_are_told() -> None:
    x, y, _, _ = drawn(10)
    with pytest.raises(ValueError, match="solved from 0 places and judged at 10"):
        solve(NormalEquations(12, 5), equations(x, y))
