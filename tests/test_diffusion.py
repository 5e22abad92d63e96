"""Schedules, noising, losses and guidance."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from ldm_dcn.diffusion import Schedule, add_noise, alpha_bars, coefficients, guide, noise_loss

SCHEDULES = [
    Schedule(),
    Schedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    Schedule(num_steps=50),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_is_diffusers(schedule: Schedule) -> None:
    theirs = DDPMScheduler(
        num_train_timesteps=schedule.num_steps,
        beta_schedule=schedule.beta_schedule,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
    )
    torch.testing.assert_close(alpha_bars(schedule), theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)
    x0, noise, times = torch.randn(6, 4, 5, 3), torch.randn(6, 4, 5, 3), torch.tensor([0, 1, 7, 20, 48, 49])
    ours = add_noise(x0, noise, *coefficients(alpha_bars(schedule)[times]))
    torch.testing.assert_close(ours, theirs.add_noise(x0, noise, times), rtol=1e-4, atol=1e-5)


def test_the_default_is_stable_diffusions() -> None:
    bars = alpha_bars(Schedule())
    assert len(bars) == 1000
    assert bars[0] == pytest.approx(1 - 0.00085, rel=1e-6)
    assert bars[-1] == pytest.approx(4.66e-3, rel=1e-3)


def test_noising_keeps_the_variance() -> None:
    alpha, sigma = coefficients(alpha_bars(Schedule()))
    assert alpha.shape == sigma.shape == (1000, 1, 1, 1)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))


def test_the_loss_is_the_mean_square_in_fp32() -> None:
    noise, off = torch.randn(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    assert float(noise_loss(noise + off, noise)) == pytest.approx(0.25)
    assert noise_loss(noise.bfloat16(), noise.bfloat16()).dtype == torch.float32


def test_guidance_is_on_every_channel() -> None:
    u, c = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    assert torch.equal(guide(u, c, 0), u)
    torch.testing.assert_close(guide(u, c, 1), c)
    torch.testing.assert_close(guide(u, c, 1.5), u + 1.5 * (c - u))
    torch.testing.assert_close(guide(u, c, 1.4), c + 0.4 * (c - u))  # U-ViT's convention


@pytest.mark.parametrize("wrong", [{"beta_schedule": "cosine"}, {"prediction": "v"}])
def test_unknown_kinds_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .* use"):
        Schedule(**wrong)
