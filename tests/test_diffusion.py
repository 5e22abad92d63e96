"""Noise levels, targets, weights, times and guidance."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from ldm_dcn import randomness
from ldm_dcn.diffusion import (
    PREDICTIONS,
    Schedule,
    add_noise,
    alpha_bars,
    at,
    denoised,
    guide,
    levels,
    lognormal_edges,
    lognormal_times,
    loss,
    min_snr_weight,
    target,
    uniform_times,
)

SCHEDULES = [
    Schedule(),
    Schedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    Schedule(num_steps=50),
    Schedule(prediction="v", zero_terminal_snr=True),
    Schedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, prediction="x0", zero_terminal_snr=True),
]
TIMES = torch.tensor([0, 1, 200, 500, 998, 999])


def sample(prediction: str) -> tuple[torch.Tensor, ...]:
    """x0, noise, alpha, sigma at the six TIMES, in fp64."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 6, 4, 5, 3, generator=generator, dtype=torch.float64)
    sigma = at(levels(Schedule(prediction=prediction)), TIMES)[1].double()
    return x0, noise, 1 - sigma if prediction == "flow" else (1 - sigma**2).sqrt(), sigma


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_is_diffusers(schedule: Schedule) -> None:
    theirs = DDPMScheduler(
        num_train_timesteps=schedule.num_steps,
        beta_schedule=schedule.beta_schedule,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        rescale_betas_zero_snr=schedule.zero_terminal_snr,
    )
    torch.testing.assert_close(alpha_bars(schedule).float(), theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)
    x0, noise, times = torch.randn(6, 4, 5, 3), torch.randn(6, 4, 5, 3), torch.tensor([0, 1, 7, 20, 48, 49])
    ours = add_noise(x0, noise, *at(levels(schedule), times))
    torch.testing.assert_close(ours, theirs.add_noise(x0, noise, times), rtol=1e-4, atol=1e-5)


def test_the_default_is_stable_diffusions() -> None:
    bars = alpha_bars(Schedule())
    assert len(bars) == 1000
    assert bars[0] == pytest.approx(1 - 0.00085, rel=1e-6)
    assert bars[-1] == pytest.approx(4.66e-3, rel=1e-3)


def test_the_betas_keep_the_variance_and_the_straight_path_the_sum() -> None:
    alpha, sigma = levels(Schedule())
    assert alpha.shape == sigma.shape == (1000,)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000))
    alpha, sigma = levels(Schedule(prediction="flow"))
    torch.testing.assert_close(alpha + sigma, torch.ones(1000))
    assert 0 < sigma[0] == alpha[-1] < 1e-3


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_levels_and_the_share_of_the_signal_agree(prediction: str) -> None:
    schedule = Schedule(prediction=prediction)
    alpha, sigma = (level.double() for level in levels(schedule))
    torch.testing.assert_close(alpha**2 / (alpha**2 + sigma**2), alpha_bars(schedule), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_target_leads_back_to_the_data(prediction: str) -> None:
    x0, noise, alpha, sigma = sample(prediction)
    wanted = target(prediction, x0, noise, alpha, sigma)
    back = denoised(prediction, wanted, add_noise(x0, noise, alpha, sigma), alpha, sigma)
    torch.testing.assert_close(back, x0, rtol=1e-9, atol=1e-9)


def test_v_is_diffusers() -> None:
    x0, noise, alpha, sigma = sample("v")
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.0120)
    ours = target("v", x0, noise, alpha, sigma)
    torch.testing.assert_close(
        ours.float(), theirs.get_velocity(x0.float(), noise.float(), TIMES), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_flow_is_the_speed_along_the_path(prediction: str) -> None:
    """d x_t / d sigma on the straight path; the others are no derivatives and must differ from it."""
    x0, noise, _, _ = sample(prediction)
    ahead, behind = (add_noise(x0, noise, 1 - s, s) for s in (0.5 + 1e-6, 0.5 - 1e-6))
    same = torch.allclose(
        target(prediction, x0, noise, *torch.tensor([0.5, 0.5])), (ahead - behind) / 2e-6, atol=1e-6
    )
    assert same == (prediction == "flow")


def test_the_loss_is_the_mean_square_in_fp32() -> None:
    noise, off = torch.randn(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    assert float(loss(noise + off, noise)) == pytest.approx(0.25)
    assert loss(noise.bfloat16(), noise.bfloat16()).dtype == torch.float32
    weight = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)
    assert float(loss(noise + off, noise, weight)) == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------ min-SNR


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_is_one_rule_in_the_space_of_the_data(prediction: str) -> None:
    """The weighted error of any prediction is min(SNR, 5) times the error of the x_0 it stands for."""
    x0, noise, alpha, sigma = sample(prediction)
    x = add_noise(x0, noise, alpha, sigma)
    wanted = target(prediction, x0, noise, alpha, sigma)
    output = wanted + 0.1 * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).double()
    error = (denoised(prediction, output, x, alpha, sigma) - x0).square()
    expected = torch.minimum(alpha**2 / sigma**2, torch.tensor(5.0)) * error
    weighted = min_snr_weight(prediction, 5.0, alpha, sigma) * (output - wanted).square()
    torch.testing.assert_close(weighted, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_is_finite_at_both_ends(prediction: str) -> None:
    ends = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    weight = min_snr_weight(prediction, 5.0, ends, ends.flip(0))
    assert torch.isfinite(weight).all() and (weight >= 0).all() and (weight <= 5).all()


def test_min_snr_is_the_papers_for_noise() -> None:
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.0120)
    snr = compute_snr(theirs, TIMES)
    ours = min_snr_weight("noise", 5.0, *at(levels(Schedule()), TIMES)).flatten()
    torch.testing.assert_close(ours, snr.clamp(max=5) / snr, rtol=1e-4, atol=1e-6)
    v = min_snr_weight("v", 5.0, *at(levels(Schedule(prediction="v")), TIMES)).flatten()
    torch.testing.assert_close(v, snr.clamp(max=5) / (snr + 1), rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------ times


def test_uniform_times_meet_every_time_alike() -> None:
    share = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    assert torch.equal(uniform_times(share, 1000).bincount(minlength=1000), torch.full((1000,), 5))
    assert uniform_times(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1000).tolist() == [0, 999]


@pytest.mark.parametrize("prediction", ["noise", "flow"])
def test_lognormal_times_have_the_mean_and_spread_asked_for(prediction: str) -> None:
    table = levels(Schedule(prediction=prediction))
    share = torch.from_numpy(randomness.uniform(3, "time", range(20_000)))
    alpha, sigma = (level[lognormal_times(share, lognormal_edges(table), -0.4, 0.8)] for level in table)
    ratio = (sigma / alpha).log()
    assert float(ratio.mean()) == pytest.approx(-0.4, abs=0.02)
    assert float(ratio.std()) == pytest.approx(0.8, abs=0.02)


def test_lognormal_times_stay_in_range() -> None:
    times = lognormal_times(
        torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), lognormal_edges(levels(Schedule())), 0.0, 50.0
    )
    assert times.tolist() == [0, 999]


# ------------------------------------------------------------------------------------------------ guidance


def test_guidance_is_on_every_channel() -> None:
    u, c = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    assert torch.equal(guide(u, c, 0), u)
    torch.testing.assert_close(guide(u, c, 1), c)
    torch.testing.assert_close(guide(u, c, 1.5), u + 1.5 * (c - u))
    torch.testing.assert_close(guide(u, c, 1.4), c + 0.4 * (c - u))  # U-ViT's convention


def test_without_terminal_signal_the_last_time_is_noise_alone() -> None:
    """And the others keep the variance they began with; every ratio stays finite."""
    schedule = Schedule(prediction="v", zero_terminal_snr=True)
    alpha, sigma = levels(schedule)
    assert alpha[-1] < 3e-4 and sigma[-1] > 1 - 1e-6
    torch.testing.assert_close(alpha[0], levels(Schedule())[0][0])
    assert bool((alpha[1:] < alpha[:-1]).all())
    assert torch.isfinite(lognormal_edges((alpha, sigma))).all()
    for prediction in ("noise", "flow"):
        with pytest.raises(ValueError, match=f"prediction is '{prediction}'; use 'v' or 'x0'"):
            Schedule(prediction=prediction, zero_terminal_snr=True)


@pytest.mark.parametrize("wrong", [{"beta_schedule": "cosine"}, {"prediction": "epsilon"}])
def test_unknown_kinds_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .* use"):
        Schedule(**wrong)
