"""The moving average of the weights, against the formula and against an uninterrupted run."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.errors import ClocError
from cloc_mllm.training.running.ema import STATE_KEY, averaged_weights, base_optimizer, decay_at, keep_average


def trained(steps: int, decay: float, seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer, list[Any]]:
    """A linear layer after some steps on random targets, and its weights after each."""
    torch.manual_seed(seed)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": [layer.weight]}, {"params": [layer.bias]}], lr=0.1)
    keep_average(optimizer, decay)
    return layer, optimizer, [step(layer, optimizer, k) for k in range(steps)]


def step(layer: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(number)
    optimizer.zero_grad()
    layer(torch.randn(4, 3, generator=rng)).square().sum().backward()
    optimizer.step()
    return copy.deepcopy(layer.state_dict())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.floats(0.5, 0.9999))
def test_it_is_the_weighted_sum_of_all_steps(steps: int, decay: float) -> None:
    layer, optimizer, seen = trained(steps, decay)
    expected = {name: value.double() for name, value in seen[0].items()}
    for number, weights in enumerate(seen[1:], 2):
        share = 1 - min(decay, (1 + number) / (10 + number))
        expected = {name: (1 - share) * value + share * weights[name] for name, value in expected.items()}
    raw = copy.deepcopy(layer.state_dict())
    with averaged_weights(optimizer):
        for name, value in layer.state_dict().items():
            torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-5)
    assert all(torch.equal(value, raw[name]) for name, value in layer.state_dict().items())


def look_and_fail(layer: torch.nn.Module, optimizer: torch.optim.Optimizer, raw: dict[str, torch.Tensor]) -> None:
    with averaged_weights(optimizer):
        assert not torch.equal(layer.weight, raw["weight"])
        raise KeyError


def test_weights_come_back_after_an_error() -> None:
    layer, optimizer, _ = trained(5, 0.9)
    raw = copy.deepcopy(layer.state_dict())
    with pytest.raises(KeyError):
        look_and_fail(layer, optimizer, raw)
    assert torch.equal(layer.weight, raw["weight"])


def test_the_optimizers_state_carries_it_over_an_interruption() -> None:
    whole_layer, whole, _ = trained(9, 0.9)
    layer, optimizer, _ = trained(4, 0.9)
    again = torch.nn.Linear(3, 2)
    again.load_state_dict(layer.state_dict())
    resumed = torch.optim.AdamW([{"params": [again.weight]}, {"params": [again.bias]}], lr=0.1)
    keep_average(resumed, 0.9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(4, 9):
        step(again, resumed, number)
    with averaged_weights(whole), averaged_weights(resumed):
        for name, value in whole_layer.state_dict().items():
            assert torch.equal(again.state_dict()[name], value)


def test_a_run_that_had_none_cannot_go_on_with_one() -> None:
    layer, optimizer, _ = trained(2, 0.9)
    for state in optimizer.state.values():
        del state[STATE_KEY]
    with pytest.raises(ClocError, match="after step 3 there is no average"):
        step(layer, optimizer, 2)
    with pytest.raises(ClocError, match="not one step"), averaged_weights(torch.optim.AdamW(layer.parameters())):
        raise AssertionError("there is nothing to average")


def test_a_parameter_without_gradient_stays_out() -> None:
    layer, idle = torch.nn.Linear(3, 2), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([*layer.parameters(), idle], lr=0.1)
    keep_average(optimizer, 0.9)
    step(layer, optimizer, 0)
    assert idle not in optimizer.state
    with averaged_weights(optimizer):
        assert torch.equal(idle, torch.ones(2))


def test_the_optimizer_is_found_behind_its_wrappers() -> None:
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    zero = SimpleNamespace(optimizer=inner, param_groups=inner.param_groups)
    assert base_optimizer(SimpleNamespace(optimizer=zero, param_groups=[])) is inner
    assert base_optimizer(inner) is inner


def test_the_decay_warms_up_to_what_was_asked() -> None:
    assert decay_at(1, 0.9999) == 0.0
    assert decay_at(2, 0.9999) == pytest.approx(3 / 12)
    assert decay_at(10**6, 0.9999) == 0.9999
    assert decay_at(5, 0.1) == 0.1
