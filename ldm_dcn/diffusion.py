"""Noise schedules, noising, losses and guidance: functions of tensors.

A noised sample is x_t = alpha x_0 + sigma eps with coefficients of shape (N, 1, 1, 1); how a schedule chooses
alpha and sigma at a time, and what the network predicts, are separate from that line and from each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A variance-preserving schedule of `num_steps` discrete times; the defaults are Stable Diffusion's."""

    num_steps: int = 1000
    beta_schedule: str = "scaled_linear"  # linear in sqrt(beta), or "linear"
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    prediction: str = "noise"

    def __post_init__(self) -> None:
        if self.beta_schedule not in ("scaled_linear", "linear"):
            raise ValueError(f"beta_schedule is '{self.beta_schedule}'; use 'scaled_linear' or 'linear'")
        if self.prediction != "noise":
            raise ValueError(f"prediction is '{self.prediction}'; use 'noise'")


def alpha_bars(schedule: Schedule) -> torch.Tensor:
    """(num_steps,) fp32: the share of the signal's variance left at each time (Ho et al. 2020, eq. 4)."""
    power = 0.5 if schedule.beta_schedule == "scaled_linear" else 1.0
    ends = schedule.beta_start**power, schedule.beta_end**power
    betas = torch.linspace(*ends, schedule.num_steps, dtype=torch.float64) ** (1 / power)
    return torch.cumprod(1 - betas, 0).float()


def coefficients(alpha_bar: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) alpha_bar -> alpha = sqrt(alpha_bar) and sigma = sqrt(1 - alpha_bar), both (N, 1, 1, 1)."""
    alpha_bar = alpha_bar.reshape(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def add_noise(
    x0: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """x_t = alpha x_0 + sigma eps; x0, noise (N, C, H, W)."""
    return alpha * x0 + sigma * noise


def noise_loss(prediction: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the predicted noise, in fp32: a scalar (Ho et al. 2020, eq. 14)."""
    return F.mse_loss(prediction.float(), noise.float())


def guide(unconditional: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance u + s (c - u), on every channel: s = 1 is no guidance.

    (Ho & Salimans 2022 and U-ViT write c + w (c - u), which is s = 1 + w. DiT's reference code guides the
    first 3 channels only.)
    """
    return unconditional + scale * (conditional - unconditional)
