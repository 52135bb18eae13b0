"""Without a process group, the collectives are the identity."""

from __future__ import annotations

import pytest
import torch

from cloc_mllm.objectives.distributed import all_reduce_sum, gather_with_grad, world_size


def test_one_process_gathers_its_own_rows() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    gathered = gather_with_grad(rows)
    assert gathered.equal(rows)
    gathered.square().sum().backward()
    torch.testing.assert_close(rows.grad, 2 * rows.detach())


def test_one_process_sums_itself_into_a_new_tensor() -> None:
    x = torch.ones(2, requires_grad=True)
    total = all_reduce_sum(x)
    assert total.equal(x)
    assert not total.requires_grad
    total += 1
    assert x.equal(torch.ones(2))


def test_world_size_is_one() -> None:
    assert world_size() == 1


def test_a_number_has_no_rows_to_gather() -> None:
    with pytest.raises(ValueError, match="row dimension"):
        gather_with_grad(torch.tensor(1.0))
