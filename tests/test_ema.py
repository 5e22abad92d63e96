"""The average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm_dcn.ema import EMA, Constant, Power, gamma_of, mixture


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(5, 2)).to(
        dtype=dtype, memory_format=torch.channels_last
    )


def test_decay_warms_up_to_its_value_and_is_a_function_of_the_step() -> None:
    decays = [Constant(0.99).at(step) for step in range(1, 2000)]
    assert decays[0] == pytest.approx(2 / 11)
    assert decays == sorted(decays) and decays[-1] == 0.99
    assert Constant(0.0).at(5) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_textbook_average_in_fp32(dtype: torch.dtype) -> None:
    net = network(dtype)
    average = EMA(net, Constant(0.9))
    expected = {name: p.detach().clone().double() for name, p in net.named_parameters()}
    for step in range(1, 6):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        decay = average.rule.at(step)
        average.update(step)
        for name, p in net.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    for name, shadow in average.shadow.items():
        assert shadow.dtype == torch.float32
        torch.testing.assert_close(shadow.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_average_is_lent_without_a_copy_and_taken_back_even_after_an_error() -> None:
    net = network()
    average = EMA(net, Constant(0.9))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    own = {name: p.data_ptr() for name, p in net.named_parameters()}
    with pytest.raises(RuntimeError, match="on purpose"), average.in_place():
        for name, p in net.named_parameters():
            assert p.data_ptr() == average.shadow[name].data_ptr()
        raise RuntimeError("on purpose")
    assert {name: p.data_ptr() for name, p in net.named_parameters()} == own


def test_the_shadow_has_the_layout_of_the_weights() -> None:
    net = network()
    assert EMA(net, Constant(0.9)).shadow["0.weight"].stride() == net[0].weight.stride()


# ------------------------------------------------------------------------------------------------ power-function averages


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.1, 6.94)])
def test_the_exponent_is_the_papers(width: float, gamma: float) -> None:
    assert gamma_of(width) == pytest.approx(gamma, abs=0.005)  # Karras et al. (2024), section 3.1
    square = (gamma_of(width) + 1) / ((gamma_of(width) + 2) ** 2 * (gamma_of(width) + 3))
    assert square**0.5 == pytest.approx(width)


def weighting(rule: Power, steps: int) -> torch.Tensor:
    """The share of each step's weights in the average after `steps`, as the updates give it: what it is given, and keeps in each later one."""
    keeps = torch.tensor([rule.at(step) for step in range(1, steps + 1)], dtype=torch.float64)
    later = torch.cat([keeps[1:], torch.ones(1, dtype=torch.float64)])
    return (1 - keeps) * later.flip(0).cumprod(0).flip(0)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_the_updates_give_a_power_of_the_step_of_the_width_asked_for(width: float) -> None:
    shares = weighting(Power(width), 4000)
    step = torch.arange(1, 4001, dtype=torch.float64) / 4000
    assert float(shares.sum()) == pytest.approx(1)
    mean = (shares * step).sum()
    assert float((shares * (step - mean).square()).sum().sqrt()) == pytest.approx(width, rel=0.01)
    torch.testing.assert_close(
        shares[1999] / shares[3999], torch.tensor(0.5).double() ** gamma_of(width), rtol=0.01, atol=0
    )


def test_any_width_is_a_mixture_of_the_snapshots_of_two() -> None:
    """The weightings of 2 x 8 snapshots, mixed, are that of a width in between which was never averaged."""
    times = [500 * i for i in range(1, 9)] * 2
    widths = [0.05] * 8 + [0.1] * 8
    factors, error = mixture(times, widths, 4000, 0.075)
    assert factors.sum() == pytest.approx(1, abs=1e-9)
    mixed = torch.zeros(4000, dtype=torch.float64)
    for factor, time, width in zip(factors, times, widths, strict=True):
        mixed[:time] += factor * weighting(Power(width), time)
    wanted = weighting(Power(0.075), 4000)
    assert error < 0.02 and float((mixed - wanted).norm() / wanted.norm()) == pytest.approx(error, abs=0.005)


@pytest.mark.parametrize("count", [1, 2, 8, 64])
@pytest.mark.parametrize("width", [0.01, 0.04, 0.075, 0.15, 0.25])
def test_a_mixture_is_an_average_however_far_its_width_is(count: int, width: float) -> None:
    """Its factors sum to one, and it says how far its weighting is from the one asked for."""
    times = [4000 * (i + 1) / count for i in range(count)] * 2
    widths = [0.05] * count + [0.1] * count
    factors, error = mixture(times, widths, 4000, width)
    assert factors.sum() == pytest.approx(1, abs=1e-6)
    mixed = torch.zeros(4000, dtype=torch.float64)
    for factor, time, own in zip(factors, times, widths, strict=True):
        mixed[: int(time)] += factor * weighting(Power(own), int(time))
    wanted = weighting(Power(width), 4000)
    assert float((mixed - wanted).norm() / wanted.norm()) == pytest.approx(error, abs=0.02)


def test_a_snapshot_of_the_width_itself_is_taken_alone() -> None:
    factors, error = mixture([1000, 2000, 1000, 2000], [0.05, 0.05, 0.1, 0.1], 2000, 0.1)
    assert factors == pytest.approx([0, 0, 0, 1], abs=1e-6) and error < 1e-6
