"""Samplers against oracles, schedulers built from our settings, images independent of the batch."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch.utils._python_dispatch import TorchDispatchMode

from ldm_dcn import randomness
from ldm_dcn.autoencoder import load_autoencoder
from ldm_dcn.denoiser import Denoiser
from ldm_dcn.diffusion import PREDICTIONS, Schedule, alpha_bars, levels, target
from ldm_dcn.diffusion import at as level_at
from ldm_dcn.errors import UserError
from ldm_dcn.model import Model
from ldm_dcn.sampling import (
    SAMPLERS,
    Predict,
    build_scheduler,
    generate,
    guided,
    published_scheduler,
    rescaled,
    sample_latents,
    sampling_times,
)
from ldm_dcn.unet import build_unet
from tiny import WHOLE

SCHEDULE = Schedule()
SHAPE = (4, 6, 5)
ODES = [name for name in SAMPLERS if name != "ddpm"]


def at(t: torch.Tensor, schedule: Schedule = SCHEDULE) -> tuple[torch.Tensor, torch.Tensor]:
    return level_at(levels(schedule), t.long())


# ------------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 50, 61])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_truth_leads_back_to_the_data(prediction: str, sampler: str, steps: int) -> None:
    """Data far outside [-1, 1]: anything that clips, rescales or stops short of sigma = 0 ends elsewhere."""
    schedule = Schedule(prediction=prediction)
    data = 5 * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = at(t, schedule)
        return target(prediction, data, (x - alpha * data) / sigma, alpha, sigma)

    got = sample_latents(predict, SHAPE, [0, 1, 2], schedule=schedule, sampler=sampler, steps=steps)
    torch.testing.assert_close(got, data, rtol=1e-3, atol=1e-3)


def of_a_gaussian(mean: float, std: float, schedule: Schedule) -> Predict:
    """What x_0 ~ N(mean, std^2) is predicted as: E[x_0 | x_t] = mean + alpha std^2 (x_t - alpha mean) / (alpha^2 std^2 + sigma^2)."""

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = at(t, schedule)
        x0 = mean + alpha * std**2 * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return target(schedule.prediction, x0, (x - alpha * x0) / sigma, alpha, sigma)

    return predict


@pytest.mark.parametrize("sampler", ODES)
def test_flow_goes_the_way_of_its_ode(sampler: str) -> None:
    """x_0 ~ N(mean, std^2) on the straight path: the exact flow is x(sigma) = (1 - sigma) mean + s(sigma) z, s^2 = (1 -
    sigma)^2 std^2 + sigma^2."""
    mean, std, schedule = 1.5, 0.6, Schedule(prediction="flow")
    predict = of_a_gaussian(mean, std, schedule)
    got = sample_latents(predict, SHAPE, range(40), schedule=schedule, sampler=sampler, steps=400)
    noise = randomness.normal(SHAPE, 0, "image", range(40))
    torch.testing.assert_close(got, mean + std * noise, rtol=0.02, atol=0.02)


def test_heun_is_of_second_order_on_the_straight_path() -> None:
    """Twice the steps leave a quarter of the error; ten already less than thirty of Euler's do."""
    mean, std, schedule = 1.5, 0.6, Schedule(prediction="flow")
    predict = of_a_gaussian(mean, std, schedule)
    alpha, sigma = at(torch.tensor([999]), schedule)  # where it starts, which is not quite noise
    start = sigma * randomness.normal(SHAPE, 0, "image", range(40))
    exact = mean + std * (start - alpha * mean) / (alpha**2 * std**2 + sigma**2) ** 0.5
    calls: list[int] = []

    def error(sampler: str, steps: int) -> float:
        def counting(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            calls.append(int(t[0]))
            return predict(x, t)

        got = sample_latents(counting, SHAPE, range(40), schedule=schedule, sampler=sampler, steps=steps)
        return float((got - exact).square().mean().sqrt())

    errors = [error("heun", steps) for steps in (10, 20, 40)]
    assert len(calls) == 19 + 39 + 79  # two evaluations a step, one for the last
    assert errors[0] / errors[1] > 3.5 and errors[1] / errors[2] > 3.5
    assert error("heun", 10) < error("euler", 30)


@pytest.mark.parametrize(
    "schedule",
    [SCHEDULE, Schedule(prediction="v", zero_terminal_snr=True), Schedule(prediction="flow")],
    ids=("betas", "betas to noise alone", "flow"),
)
def test_heun_bears_long_steps(schedule: Schedule) -> None:
    """Five of them, the first from almost infinite sigma / alpha, end near the exact flow, whose own spread is 0.6."""
    mean, std = 1.5, 0.6
    alpha, sigma = at(torch.tensor([999]), schedule)
    start = torch.hypot(alpha, sigma) * randomness.normal(SHAPE, 0, "image", range(40))
    exact = mean + std * (start - alpha * mean) / (alpha**2 * std**2 + sigma**2) ** 0.5
    predict = of_a_gaussian(mean, std, schedule)
    got = sample_latents(predict, SHAPE, range(40), schedule=schedule, sampler="heun", steps=5)
    assert float((got - exact).square().mean().sqrt()) < 0.2


# All 1,000 times, which take longest, of the two that differ most: noise, and flow with levels of its own.
DDPM_STEPS = [
    *((prediction, steps, short) for prediction in PREDICTIONS for steps, short in ((50, 0.09), (250, 0.03))),
    *((prediction, 1000, 0.01) for prediction in ("noise", "flow")),
]


@pytest.mark.parametrize(("prediction", "steps", "short"), DDPM_STEPS)
def test_ddpm_draws_from_the_gaussian_as_its_equations_do(prediction: str, steps: int, short: float) -> None:
    """q(x_s | x_t, x_0) of Ho et al. (2020, eq. 6-7) at x_0 = E[x_0 | x_t], which is affine in x_t: mean and variance of x_s
    follow from those of x_t. What is `short` of std is the posterior's own variance, which fewer and longer steps lose more of.
    """
    mean, std, schedule = 1.5, 0.6, Schedule(prediction=prediction)
    alpha, sigma = (level.double() for level in levels(schedule))
    bars = [float(bar) for bar in alpha**2 / (alpha**2 + sigma**2)]
    times = sampling_times(1000, steps)
    expected, variance = 0.0, 1.0
    for now, after in zip([bars[t] for t in times], [*(bars[t] for t in times[1:]), 1.0], strict=True):
        step = now / after
        gain = now**0.5 * std**2 / (now * std**2 + 1 - now)
        of_data, of_x = after**0.5 * (1 - step) / (1 - now), step**0.5 * (1 - after) / (1 - now)
        slope = of_data * gain + of_x
        expected = slope * expected + of_data * mean * (1 - gain * now**0.5)
        variance = slope**2 * variance + (1 - after) / (1 - now) * (1 - step)
    got = sample_latents(
        of_a_gaussian(mean, std, schedule), SHAPE, range(200), schedule=schedule, sampler="ddpm", steps=steps
    )
    count = got.numel()
    assert abs(float(got.mean()) - expected) < 4 * std / count**0.5
    assert float(got.std()) == pytest.approx(variance**0.5, rel=4 / (2 * count) ** 0.5)
    assert (1 - short) * std < variance**0.5 < std and expected == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize(
    ("sampler", "tolerance"), [("dpm++", 0.03), ("ddim", 0.06), ("euler", 0.06), ("heun", 0.03)]
)
def test_the_posterior_mean_of_a_gaussian_leads_to_that_gaussian(sampler: str, tolerance: float) -> None:
    """x_0 ~ N(mean, std^2) has E[eps | x_t] in closed form; every sampler must give back mean and std.

    The schedule ends at alpha = 0.068, not 0, and sampling starts from pure noise: what is missing of the
    mean there comes out scaled by the ODE's exact flow, std / sqrt(alpha^2 std^2 + sigma^2). The tolerance is
    the last step's: from t = 19 it goes to the posterior mean, which has lost the posterior's variance, 2 %
    of std here.
    """
    mean, std = 1.5, 0.6
    alpha, sigma = (float(c) for c in at(torch.tensor([999])))
    expected = mean - alpha * mean * std / (alpha**2 * std**2 + sigma**2) ** 0.5
    denoise = of_a_gaussian(mean, std, SCHEDULE)
    got = sample_latents(denoise, SHAPE, range(400), schedule=SCHEDULE, sampler=sampler, steps=50)
    assert float(got.mean()) == pytest.approx(expected, abs=tolerance)
    assert float(got.std()) == pytest.approx(std, rel=tolerance)


def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network that is none of a Gaussian's."""
    return torch.tanh(x) * (t / 1000).reshape(-1, 1, 1, 1)


def test_ddim_is_diffusers_ddim_where_that_one_meets_its_own_times() -> None:
    theirs = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.0120,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(50)
    x = randomness.normal(SHAPE, 0, "image", [3, 9])
    for t in theirs.timesteps:
        x = theirs.step(denoise(x, t.expand(2)), t, x).prev_sample
    ours = sample_latents(denoise, SHAPE, [3, 9], schedule=SCHEDULE, sampler="ddim", steps=50)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_ddpm_is_diffusers_ddpm_with_noise_of_image_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its noise is a function of (seed, time): of no batch, of no step before, of no generator of torch's."""
    seen: dict[tuple[int, int], torch.Tensor] = {}
    normal = randomness.normal

    def recording(shape: tuple[int, ...], key: int, stream: str, seeds: list[int]) -> torch.Tensor:
        rows = normal(shape, key, stream, seeds)
        if stream != "image":
            for seed, row in zip(seeds, rows, strict=True):
                assert torch.equal(seen.setdefault((seed, key), row), row)
        return rows

    monkeypatch.setattr(randomness, "normal", recording)

    state = torch.get_rng_state()
    ours = sample_latents(denoise, SHAPE, [3, 9], schedule=SCHEDULE, sampler="ddpm", steps=250)
    sample_latents(denoise, SHAPE, [9, 2], schedule=SCHEDULE, sampler="ddpm", steps=50)
    sample_latents(
        denoise, SHAPE, [9], schedule=SCHEDULE, sampler="dpm++", steps=50, algorithm_type="sde-dpmsolver++"
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert len(seen) == 2 * 250 + 50 and len({row.sum().item() for row in seen.values()}) == len(seen)

    theirs = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.0120,
        clip_sample=False,
        variance_type="fixed_small",
    )
    theirs.set_timesteps(timesteps=sampling_times(1000, 250))
    x = normal(SHAPE, 0, "image", [3, 9])
    for t in theirs.timesteps:
        noise = torch.stack([seen[seed, int(t)] for seed in (3, 9)])
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, own=noise, **__: own
        )
        x = theirs.step(denoise(x, t.expand(2)), t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


def test_times_begin_where_training_ends_for_every_number_of_steps() -> None:
    for steps in range(1, 1001):
        times = sampling_times(1000, steps)
        assert len(times) == len(set(times)) == steps
        assert times[0] == 999 and times == sorted(times, reverse=True) and times[-1] >= 0
    assert sampling_times(1000, 50) == list(range(999, 0, -20))


# ------------------------------------------------------------------------------------------- settings


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(UserError, match=r"no setting 'solver_ordr'; did you mean solver_order\?"):
        build_scheduler("dpm++", SCHEDULE, solver_ordr=3)
    assert build_scheduler("dpm++", SCHEDULE, solver_order=3).config.solver_order == 3


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_the_published_scheduler_has_the_noise_levels(zero_terminal_snr: bool) -> None:
    schedule = Schedule(prediction="v", zero_terminal_snr=zero_terminal_snr)
    theirs = published_scheduler(schedule).alphas_cumprod
    torch.testing.assert_close(theirs, alpha_bars(schedule).float(), rtol=1e-4, atol=1e-7)


def test_nothing_may_clip_latents() -> None:
    with pytest.raises(UserError, match="no setting 'clip_sample'"):
        build_scheduler("ddim", SCHEDULE, clip_sample=True)
    with pytest.raises(UserError, match="thresholding would cut off latents"):
        build_scheduler("dpm++", SCHEDULE, thresholding=True)
    with pytest.raises(UserError, match="clip_sample would cut off latents"):
        build_scheduler("heun", SCHEDULE, clip_sample=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sampler": "dpm"}, "sampler 'dpm' is unknown; use one of dpm[+][+], ddim, euler, ddpm, heun"),
        ({"steps": 0}, "0 sampling steps were asked for; use 1 to 1000"),
        ({"steps": 1001}, "1001 sampling steps"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        sample_latents(lambda x, t: x, SHAPE, [0], schedule=SCHEDULE, **options)


# ------------------------------------------------------------------------------------------- images


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    denoiser = Denoiser(UNet2DConditionModel(**WHOLE), num_classes=10)
    torch.nn.init.normal_(denoiser.class_embedding.weight)
    denoiser.to(memory_format=torch.channels_last)
    return Model(denoiser, load_autoencoder("identity", image_channels=1), SCHEDULE, (1, 8, 8), "tiny", 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_the_batch_around_it(model: Model, sampler: str) -> None:
    labels, seeds = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [5, 3, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]
    whole = generate(model, labels, seeds, sampler=sampler, steps=5, batch_size=12)
    assert whole.shape == (12, 1, 8, 8) and whole.dtype == torch.uint8
    for batch_size in (1, 5):
        some = generate(model, labels, seeds, sampler=sampler, steps=5, batch_size=batch_size)
        difference = (some.int() - whole.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    alone = generate(model, [9], [9], sampler=sampler, steps=5)
    assert (alone[0].int() - whole[5].int()).abs().max() <= 1
    assert not torch.equal(whole[3], whole[5])  # label 1 and 9, same seed
    assert not torch.equal(whole[0], whole[9])  # label 3, seeds 5 and 8


def test_another_size_is_drawn_with_the_same_weights(model: Model) -> None:
    """Any that the U-Net (8 and 16 channels: it halves once) takes; the trained one is what is drawn without."""
    whole = generate(model, [3, 1], [5, 3], steps=3)
    assert torch.equal(generate(model, [3, 1], [5, 3], steps=3, size=(8, 8)), whole)
    for size in ((12, 20), (2, 2), [np.int64(16), 8]):
        images = generate(model, [3, 1], [5, 3], steps=3, size=size)
        assert images.shape == (2, 1, *size)
        alone = generate(model, [1], [3], steps=3, size=size)
        assert (alone[0].int() - images[1].int()).abs().max() <= 1


def test_a_swapped_network_and_an_autoencoder_draw_another_size(model: Model) -> None:
    """DCNv4 in convolutions and self-attention, which is told height and width; 4 pixels a latent."""
    torch.manual_seed(0)
    unet = build_unet(
        {**WHOLE, "in_channels": 4, "out_channels": 4},
        swap={"sites": ("resnet", "self_attention"), "group_channels": 4},
    )
    autoencoder = load_autoencoder("digits", image_channels=1)
    drawing = Model(Denoiser(unet), autoencoder, SCHEDULE, (4, 8, 8), "tiny", 0)
    assert (autoencoder.factor, drawing.image_size) == (4, (32, 32))
    assert drawing.latent_shape_at((48, 24)) == (4, 12, 6)
    assert generate(drawing, None, [0], steps=2, size=(48, 24)).shape == (1, 1, 48, 24)
    with pytest.raises(
        UserError,
        match="size 44x24: tiny draws multiples of 8 pixels, 4 of the autoencoder times 2 of the U-Net; give such as 48x24",
    ):
        generate(drawing, None, [0], steps=2, size=(44, 24))
    odd = Model(Denoiser(unet), autoencoder, SCHEDULE, (4, 7, 7), "tiny", 0)  # diffusers' U-Net pads it
    assert torch.equal(generate(odd, None, [0], steps=1, size=(28, 28)), generate(odd, None, [0], steps=1))


def test_progress_counts_images(model: Model) -> None:
    counts: list[int] = []
    generate(model, [0] * 7, range(7), steps=1, batch_size=3, progress=counts.append)
    assert counts == [3, 3, 1]


def test_guidance_is_one_forward_of_both_halves(model: Model) -> None:
    labels = torch.tensor([2, 7])
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([500, 500])
    with torch.no_grad():
        conditional = model.denoiser(x, t, labels)
        null = model.denoiser(x, t, torch.tensor([10, 10]))
        assert not torch.equal(conditional, null)
        for scale in (0.0, 1.0, 1.5, 4.0):
            got = guided(model.denoiser, labels, scale)(x, t)
            torch.testing.assert_close(got, null + scale * (conditional - null), rtol=1e-4, atol=1e-5)


class _Crossings(TorchDispatchMode):
    """Counts the copies from the CPU to another device and back, for each of which a program waits until a GPU has done all before."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            self.count += result.device != args[operation.overloadpacket is torch.ops.aten.copy_].device
        return result


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_networks_are_given_whole_times(sampler: str) -> None:
    """FSDP casts what is floating to its 16 bits, in which 999 is 1000."""
    seen: list[torch.Tensor] = []
    sample_latents(
        lambda x, t: seen.append(t) or x, SHAPE, [0, 1], schedule=SCHEDULE, sampler=sampler, steps=3
    )
    assert {t.dtype for t in seen} == {torch.int64} and seen[0].tolist() == [999, 999]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", ODES)
def test_no_step_waits_for_the_device(sampler: str, prediction: str) -> None:
    schedule = Schedule(prediction=prediction)
    few, many = (crossings(lambda x, t: x, schedule, sampler, steps) for steps in (3, 6))
    assert few == many > 0


def test_no_network_waits_for_the_device(model: Model) -> None:
    predict = guided(copy.deepcopy(model.denoiser).to("meta"), torch.tensor([1, 2], device="meta"), 1.5)
    few, many = (crossings(predict, SCHEDULE, "ddim", steps) for steps in (1, 2))
    assert few == many > 0


def crossings(predict: Predict, schedule: Schedule, sampler: str, steps: int) -> int:
    """Copies between the CPU and the meta device, on which a number that is asked for is an error, in drawing two samples."""
    with _Crossings() as counted:
        sample_latents(
            predict, (1, 8, 8), [0, 1], schedule=schedule, sampler=sampler, steps=steps, device="meta"
        )
    return counted.count


def test_guidance_works_within_its_interval_only(model: Model) -> None:
    labels, x = torch.tensor([2]), torch.randn(1, 1, 8, 8)
    predict = guided(model.denoiser, labels, 3.0, interval=(0.2, 0.6))
    everywhere, nowhere = guided(model.denoiser, labels, 3.0), guided(model.denoiser, labels, 1.0)
    with torch.no_grad():
        for time, inside in [(0, False), (199, False), (200, True), (599, True), (600, False), (999, False)]:
            t = torch.tensor([time])
            assert torch.equal(predict(x, t), (everywhere if inside else nowhere)(x, t))


def test_rescaled_guidance_has_the_contrast_of_the_condition(model: Model) -> None:
    """As diffusers' `rescale_noise_cfg` has it, image by image; 0 changes not a bit, and outside of the interval nothing is guided."""
    labels, x, t = torch.tensor([2, 7]), torch.randn(2, 1, 8, 8), torch.tensor([500, 500])

    def predict(scale: float, rescale: float, **options: Any) -> torch.Tensor:
        return guided(model.denoiser, labels, scale, rescale=rescale, **options)(x, t)

    with torch.no_grad():
        conditional, plain = predict(1.0, 0.0), predict(5.0, 0.0)
        for share in (0.3, 0.7, 1.0):
            expected = rescale_noise_cfg(plain, conditional, guidance_rescale=share)
            torch.testing.assert_close(predict(5.0, share), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(predict(5.0, 1.0).std((1, 2, 3)), conditional.std((1, 2, 3)))
        assert not torch.allclose(plain.std((1, 2, 3)), conditional.std((1, 2, 3)), rtol=0.01)
        assert torch.equal(predict(5.0, 0.7, interval=(0.9, 1.0)), conditional)
        assert torch.equal(predict(1.0, 0.7), conditional)
    flat = torch.zeros(1, 1, 2, 2)  # has no contrast to bring anywhere
    assert torch.equal(rescaled(flat, flat, 0.7), flat)
    whole = generate(model, [3, 1], [5, 3], steps=3, guidance=4.0)
    assert torch.equal(generate(model, [3, 1], [5, 3], steps=3, guidance=4.0, guidance_rescale=0.0), whole)
    other = generate(model, [3, 1], [5, 3], steps=3, guidance=4.0, guidance_rescale=0.7)
    assert not torch.equal(other, whole)
    alone = generate(model, [1], [3], steps=3, guidance=4.0, guidance_rescale=0.7)
    assert (alone[0].int() - other[1].int()).abs().max() <= 1


def test_no_labels_draw_from_the_null_class(model: Model) -> None:
    free = generate(model, None, [0, 1], steps=3, guidance=3.0)
    null = Model(model.denoiser, model.autoencoder, model.schedule, model.latent_shape, "tiny", 0)
    assert torch.equal(free, generate(null, None, [0, 1], steps=3, guidance=1.0))


@pytest.mark.parametrize("label", [-1, 10, 1000])
def test_a_label_that_does_not_exist_is_refused(model: Model, label: int) -> None:
    with pytest.raises(UserError, match=f"label {label} does not exist: tiny knows 10 classes, 0 to 9"):
        generate(model, [0, label], [0, 1], steps=1)


def test_labels_and_seeds_must_match(model: Model) -> None:
    with pytest.raises(ValueError, match="2 labels came with 3 seeds"):
        generate(model, [0, 1], [0, 1, 2], steps=1)
    with pytest.raises(UserError, match="seed -4 is negative"):
        generate(model, [0], [-4], steps=1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"guidance": float("nan")}, "guidance must be finite and not negative"),
        ({"guidance": float("inf")}, "guidance must be finite and not negative"),
        ({"guidance": -1.0}, "guidance must be finite and not negative"),
        ({"guidance_interval": (0.6, 0.2)}, "guidance interval 0.6 to 0.2"),
        ({"guidance_interval": (0.0, float("nan"))}, "guidance interval 0.0 to nan"),
        (
            {"size": (9, 8)},
            "size 9x8: tiny draws multiples of 2 pixels, 1 of the autoencoder times 2 of the U-Net; give such as 8x8",
        ),
        ({"size": (1, 1)}, "give such as 2x2"),
        ({"size": 8}, "size 8: give height and width in pixels, such as"),
        ({"size": "88"}, "size '88': give height and width in pixels"),
        ({"size": (8.0, 8)}, "size .8.0, 8.: give height and width in pixels"),
        ({"size": (8, 0)}, "size .8, 0.: give height and width in pixels"),
        ({"size": (8, 2**15)}, "16384 at most"),
        ({"guidance_rescale": 1.1}, "guidance rescale 1.1: give a share, 0 to 1; 0 is none"),
        ({"guidance_rescale": -0.1}, "guidance rescale -0.1: give a share"),
        ({"guidance_rescale": float("nan")}, "guidance rescale nan: give a share"),
        ({"guidance_rescale": "0.7"}, "guidance rescale '0.7': give a share"),
        ({"guidance_rescale": None}, "guidance rescale None: give a share"),
        ({"precision": "int8"}, "precision 'int8' is unknown; use one of fp32, bf16, fp16"),
        ({"batch_size": 0}, "batch size 0: draw at least one"),
        ({"conditions": [], "seeds": []}, "there is nothing to draw"),
        ({"conditions": [2**63]}, "every label must be a whole number of at most"),
        ({"seeds": [2**64]}, "every seed must be a whole number of at most"),
    ],
)
def test_settings_that_mean_nothing_are_refused(model: Model, options: dict, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        generate(model, **{"conditions": [0], "seeds": [0], "steps": 1, **options})


def test_the_denoiser_goes_back_to_training(model: Model) -> None:
    model.denoiser.train()
    generate(model, [0], [0], steps=1)
    assert model.denoiser.training
    model.denoiser.eval()


def test_latents_with_nan_are_an_error_that_names_the_guidance(model: Model) -> None:
    with pytest.raises(UserError, match=r"tiny draws NaN or infinity at guidance 1e\+38; use a smaller one"):
        generate(model, [0], [0], steps=2, guidance=1e38)


def test_what_leaves_fp16s_range_is_an_error_that_names_fp32(model: Model) -> None:
    weight = model.denoiser.unet.conv_in.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1e7)
    try:
        assert generate(model, [0], [0], steps=1, guidance=1, precision="fp32").shape == (1, 1, 8, 8)
        with pytest.raises(UserError, match=r"at guidance 1 in fp16; use a smaller one, or fp32, or look"):
            generate(model, [0], [0], steps=1, guidance=1, precision="fp16")
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_a_precision_is_the_networks_alone_and_a_callers_stays(model: Model) -> None:
    """The autoencoder's is its own: Stable Diffusion's overflows in fp16."""
    seen = []

    def predict(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        seen.append(kind)
        return torch.zeros_like(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.denoiser, "forward", predict)
        for precision in (None, "fp32", "bf16", "fp16"):
            generate(model, [0], [0], steps=1, guidance=1, precision=precision)
        with torch.autocast("cpu", torch.bfloat16):
            for precision in (None, "fp32", "fp16"):
                generate(model, [0], [0], steps=1, guidance=1, precision=precision)
    bf16, fp16 = torch.bfloat16, torch.float16
    assert seen == [None, None, bf16, fp16, bf16, None, fp16]
    autoencoder = load_autoencoder("digits")
    latents = torch.randn(2, autoencoder.latent_channels, 4, 4)
    expected = autoencoder.decode(latents)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(autoencoder.decode(latents), expected)


def test_images_with_nan_are_an_error(model: Model) -> None:
    def broken(latents: torch.Tensor) -> torch.Tensor:
        return torch.full_like(latents, float("nan"))

    bad = SimpleNamespace(decode=broken)
    with pytest.raises(ValueError, match="NaN"):
        generate(Model(model.denoiser, bad, SCHEDULE, (1, 8, 8), "tiny", 0), [0], [0], steps=1)
