"""Random numbers as functions of (seed, stream, position)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm_dcn import randomness
from ldm_dcn.randomness import Order, keys, normal, permutation, uniform


def test_a_number_depends_on_its_position_alone() -> None:
    whole = normal((3, 5), 7, "noise", range(20))
    assert whole.shape == (20, 3, 5) and whole.dtype == torch.float32
    assert torch.equal(normal((3, 5), 7, "noise", [19, 4, 4]), whole[[19, 4, 4]])
    assert np.array_equal(uniform(7, "time", [19, 4]), uniform(7, "time", range(20))[[19, 4]])
    assert np.array_equal(keys(7, "time", np.array([3])), keys(7, "time", torch.arange(5))[3:4])


@pytest.mark.parametrize("other", [(8, "noise", 4), (7, "time", 4), (7, "noise", 5), (7, "noise", 4 + 2**32)])
def test_seed_stream_and_position_all_matter(other: tuple[int, str, int]) -> None:
    seed, stream, position = other
    assert not torch.equal(normal((16,), 7, "noise", [4]), normal((16,), seed, stream, [position]))
    assert uniform(7, "noise", [4]) != uniform(seed, stream, [position])


def test_torch_sees_a_different_seed_at_every_position() -> None:
    """torch's CPU generator uses the low 32 bits of a seed: they must not repeat, as a hash's would some 10
    times here."""
    generator = torch.Generator()
    first, second = (torch.randn(20, generator=generator.manual_seed(1 + high)) for high in (0, 1 << 32))
    assert torch.equal(first, second)
    low = keys(0, "image", range(300_000)) & np.uint64(0xFFFFFFFF)
    assert len(np.unique(low)) == 300_000


def test_normal_numbers_are_standard_normal_and_uncorrelated() -> None:
    x = normal((64,), 0, "noise", range(4000)).double()
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert abs((x**4).mean() - 3) < 0.1
    neighbours = (x[1:] * x[:-1]).mean(1)
    assert abs(neighbours.mean()) < 0.01


def test_uniform_numbers_are_uniform() -> None:
    u = uniform(0, "time", range(100_000))
    assert u.min() >= 0 and u.max() < 1
    counts, _ = np.histogram(u, 100, (0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi-squared with 99 degrees of freedom: 1 in 10,000
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.02


def test_seeds_up_to_63_bits_and_late_positions() -> None:
    assert np.isfinite(uniform(2**63 - 1, "time", [2**62])).all()
    assert torch.isfinite(normal((4,), 2**63 - 1, "noise", [2**62])).all()
    assert normal((4, 8, 8), 0, "noise", []).shape == (0, 4, 8, 8)


def test_the_global_generators_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    normal((8,), 0, "noise", range(5))
    uniform(0, "time", range(5))
    permutation(10, 0, "order", 0)
    assert torch.equal(torch.randn(4), expected)


def test_one_position_has_the_key_that_it_has_among_many() -> None:
    positions = [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**63 - 1]
    for seed in (0, 1, 2**63 - 1):
        many = randomness.keys(seed, "noise", positions).tolist()
        assert [randomness.key(seed, "noise", position) for position in positions] == many


@pytest.mark.parametrize("first", [0, 5, 11, 12, 13, 24])
def test_order_of_a_range_is_that_of_its_numbers(first: int) -> None:
    order = randomness.Order(12, seed=3)
    for positions in (range(first, first + 7), range(first, first)):
        assert torch.equal(order[positions], order[list(positions)])


def test_fix_global_seeds_them() -> None:
    randomness.fix_global(0, "dropout", 5)
    first = torch.rand(3)
    randomness.fix_global(0, "dropout", 6)
    assert not torch.equal(torch.rand(3), first)
    randomness.fix_global(0, "dropout", 5)
    assert torch.equal(torch.rand(3), first)


def test_every_epoch_sees_every_sample_once_in_another_order() -> None:
    order = Order(101, seed=5)
    epochs = [order[range(e * 101, (e + 1) * 101)] for e in range(3)]
    for ids in epochs:
        assert sorted(ids.tolist()) == list(range(101))
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    assert not torch.equal(epochs[0], Order(101, seed=6)[range(101)])


def test_the_order_is_the_same_from_any_start_and_in_any_pieces() -> None:
    whole = Order(37, seed=1)[range(200)]
    fresh = Order(37, seed=1)
    assert torch.equal(fresh[range(150, 200)], whole[150:])
    assert torch.equal(torch.cat([fresh[range(i, i + 8)] for i in range(0, 200, 8)]), whole)
    assert torch.equal(fresh[[199, 0, 73]], whole[[199, 0, 73]])
