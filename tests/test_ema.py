"""The average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm_dcn.ema import EMA, decay_at


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(5, 2)).to(
        dtype=dtype, memory_format=torch.channels_last
    )


def test_decay_warms_up_to_its_value_and_is_a_function_of_the_step() -> None:
    decays = [decay_at(step, 0.99) for step in range(1, 2000)]
    assert decays[0] == pytest.approx(2 / 11)
    assert decays == sorted(decays) and decays[-1] == 0.99
    assert decay_at(5, 0.0) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_textbook_average_in_fp32(dtype: torch.dtype) -> None:
    net = network(dtype)
    average = EMA(net)
    expected = {name: p.detach().clone().double() for name, p in net.named_parameters()}
    for step in range(1, 6):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        decay = decay_at(step, 0.9)
        average.update(decay)
        for name, p in net.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    for name, shadow in average.shadow.items():
        assert shadow.dtype == torch.float32
        torch.testing.assert_close(shadow.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_average_is_lent_without_a_copy_and_taken_back_even_after_an_error() -> None:
    net = network()
    average = EMA(net)
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
    assert EMA(net).shadow["0.weight"].stride() == net[0].weight.stride()


def test_loading() -> None:
    net, other = network(), network()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    average = EMA(net)
    average.load(EMA(other).shadow)
    assert torch.equal(average.shadow["1.bias"], other[1].bias)
    with pytest.raises(ValueError, match=r"1 names, first '1.bias'"):
        average.load({k: v for k, v in average.shadow.items() if k != "1.bias"})
