"""Noise levels, targets, losses and guidance: functions of tensors.

A noised sample is x_t = alpha x_0 + sigma eps. A `Schedule` gives alpha and sigma at each of `num_steps` times; what the
network predicts there, which times are learnt how often, and how their losses are weighted are separate from that line and
from each other. Coefficients have the shape (N, 1, 1, 1), the rest (N, C, H, W).

    prediction   target           x_0 from it                  (d x_0 / d prediction)^2
    noise        eps              (x_t - sigma eps) / alpha    sigma^2 / alpha^2
    v            alpha eps - sigma x_0   alpha x_t - sigma v   sigma^2                    (Salimans & Ho 2022)
    x0           x_0              x_0                          1
    flow         eps - x_0        x_t - sigma v                sigma^2                    (alpha = 1 - sigma; Lipman et al. 2023)

The last column carries every loss into the space of x_0, where min-SNR weighting is one rule for all four.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PREDICTIONS = ("noise", "v", "x0", "flow")
LEAST_SIGNAL = (
    2.0**-24
)  # of the last time's variance, for zero: ratios stay finite. diffusers' schedulers take the same


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`num_steps` discrete noise levels, and what the network predicts; the defaults are Stable Diffusion's.

    prediction     noise | v | x0 on the variance-preserving path of the betas, or flow on the straight path from data to
                   noise, which has no betas
    beta_schedule  scaled_linear (linear in sqrt(beta)) | linear
    zero_terminal_snr  the betas scaled so that nothing of the data is left at the last time (Lin et al. 2024, algorithm 1),
                   where noise says nothing about x_0 and cannot be predicted
    """

    num_steps: int = 1000
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    prediction: str = "noise"
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.beta_schedule not in ("scaled_linear", "linear"):
            raise ValueError(f"beta_schedule is '{self.beta_schedule}'; use 'scaled_linear' or 'linear'")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction is '{self.prediction}'; use one of {', '.join(PREDICTIONS)}")
        if self.zero_terminal_snr and self.prediction not in ("v", "x0"):
            raise ValueError(
                f"zero_terminal_snr is on and prediction is '{self.prediction}'; use 'v' or 'x0', or leave it off"
            )


def levels(schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma at each time, both (num_steps,) fp32.

    The straight path has sigma = (i + 1/2) / num_steps, the middles of equal cells: neither end is ever reached, so that
    no ratio of the two is infinite.
    """
    if schedule.prediction == "flow":
        sigma = (torch.arange(schedule.num_steps, dtype=torch.float64) + 0.5) / schedule.num_steps
        return (1 - sigma).float(), sigma.float()
    bars = alpha_bars(schedule)
    return bars.sqrt().float(), (1 - bars).sqrt().float()


def alpha_bars(schedule: Schedule) -> torch.Tensor:
    """(num_steps,) fp64: the share of the signal in the variance at each time (Ho et al. 2020, eq. 4).

    For the straight path, the one of the variance-preserving path that passes through the same signal-to-noise ratios.
    """
    if schedule.prediction == "flow":
        sigma = (torch.arange(schedule.num_steps, dtype=torch.float64) + 0.5) / schedule.num_steps
        return (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)
    power = 0.5 if schedule.beta_schedule == "scaled_linear" else 1.0
    ends = schedule.beta_start**power, schedule.beta_end**power
    betas = torch.linspace(*ends, schedule.num_steps, dtype=torch.float64) ** (1 / power)
    bars = torch.cumprod(1 - betas, 0)
    if schedule.zero_terminal_snr:
        root = bars.sqrt()
        bars = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
        bars[-1] = LEAST_SIGNAL
    return bars


def at(table: tuple[torch.Tensor, torch.Tensor], times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma at `times` (N,) int64, each (N, 1, 1, 1)."""
    alpha, sigma = table
    return alpha[times].reshape(-1, 1, 1, 1), sigma[times].reshape(-1, 1, 1, 1)


def add_noise(
    x0: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """x_t = alpha x_0 + sigma eps."""
    return alpha * x0 + sigma * noise


# ------------------------------------------------------------------------------------------------ what is predicted


def target(
    prediction: str, x0: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """What the network should give."""
    if prediction == "noise":
        return noise
    if prediction == "v":
        return alpha * noise - sigma * x0
    return x0 if prediction == "x0" else noise - x0


def denoised(
    prediction: str, output: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """The x_0 that the network's `output` at `x` = x_t stands for."""
    if prediction == "noise":
        return (x - sigma * output) / alpha
    if prediction == "v":
        return alpha * x - sigma * output
    return output if prediction == "x0" else x - sigma * output


# ------------------------------------------------------------------------------------------------ what is learnt


def loss(output: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
    """The weighted mean squared error in fp32, a scalar; `weight` (N, 1, 1, 1). (Ho et al. 2020, eq. 14)"""
    return (weight * (output.float() - wanted.float()).square()).mean()


def min_snr_weight(prediction: str, gamma: float, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The weight of the prediction's squared error that gives x_0's the weight min(SNR, gamma), SNR = alpha^2 / sigma^2.

    Finite at both ends. (Hang et al. 2023, eq. 6; diffusers had it wrong for v until its pull request 6307)
    """
    if prediction == "noise":
        return (gamma * sigma**2 / alpha**2).clamp(max=1.0)
    if prediction == "x0":
        return (alpha**2 / sigma**2).clamp(max=gamma)
    return torch.minimum(alpha**2, gamma * sigma**2)


def uniform_times(share: torch.Tensor, num_steps: int) -> torch.Tensor:
    """(N,) int64 times, all equally likely, for `share` (N,) uniform in [0, 1)."""
    return (share.double() * num_steps).long()


def lognormal_edges(table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """(num_steps - 1,) float64: half way between the ln(sigma / alpha) of one time and of the next, ascending."""
    alpha, sigma = (t.double() for t in table)
    grid = (sigma / alpha).log()
    return (grid[1:] + grid[:-1]) / 2


def lognormal_times(share: torch.Tensor, edges: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """(N,) int64: the times nearest to ln(sigma / alpha) ~ N(mean, std^2), for `share` (N,) uniform in [0, 1).

    edges   of `lognormal_edges`

    On the straight path ln(sigma / alpha) is the logit of sigma, and this is the logit-normal rule of Esser et al. (2024,
    section 3.1; mean 0, std 1); elsewhere it is Karras et al.'s (2022, table 1; mean -1.2, std 1.2 for unit-variance data).
    """
    wanted = mean + std * torch.special.ndtri(share.double().clamp(1e-12, 1 - 1e-12))
    return torch.bucketize(wanted, edges)


# ------------------------------------------------------------------------------------------------ guidance


def guide(unconditional: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance u + s (c - u), on every channel: s = 1 is no guidance.

    Ho & Salimans (2022) and U-ViT write c + w (c - u), which is s = 1 + w: U-ViT's 0.4 is 1.4 here. DiT's reference code
    guides the first 3 channels only. All four predictions are affine in x_0 with the same coefficients for u and c, so it
    does not matter which of them is guided.
    """
    return unconditional + scale * (conditional - unconditional)
