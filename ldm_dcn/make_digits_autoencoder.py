"""Trains the shipped autoencoder of the digits: `python -m ldm_dcn.make_digits_autoencoder [--out FOLDER] [--steps N]`.

32x32 grey to 4x8x8 and back, some minutes on two cores. The loss is the mean squared error of pixels plus KL_WEIGHT times the
mean KL divergence of a latent: with a pixel noise of std s, a proper likelihood has KL_WEIGHT = s^2 / 2 * (256 latents / 1024
pixels). That is a hundred times Stable Diffusion's weight: the decoder forgives an error of 0.2 standard deviations in its latents,
and two of the four latent channels carry little. Smaller weights fill all four, and a U-Net of the demo's size then draws worse
digits in the same number of steps.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .autoencoder import DIGITS_FOLDER, load_autoencoder
from .data import open_dataset
from .images import Images

CONFIG = {
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 4,
    "block_out_channels": (16, 24, 40),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 32,
    "mid_block_add_attention": False,
    "force_upcast": False,
}
STEPS = 1500
BATCH = 64
PEAK_LR = 2e-3
KL_WEIGHT = 2e-4
WARMUP = 0.05  # of the steps; the learning rate falls to zero by a cosine after it
SEED = 0
JITTER_SHIFT = 0.1  # of half the side
JITTER_TURN = 0.15  # radians
JITTER_SCALE = 0.1  # of the size


def train(
    steps: int = STEPS, seed: int = SEED, kl_weight: float = KL_WEIGHT, progress: bool = True
) -> torch.nn.Module:
    """Train on all digits, turned, scaled and shifted a little. Returns the autoencoder with its scaling factor set."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    digits = open_dataset("digits", image_size=32, image_channels=1)
    images = digits.images(range(len(digits)))
    model = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-4)
    bar = tqdm(range(steps), desc="autoencoder", disable=not progress)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = PEAK_LR * schedule(step / steps)
        batch = jitter(images[torch.randint(len(images), (BATCH,))]).contiguous(
            memory_format=torch.channels_last
        )
        posterior = model.encode(batch).latent_dist
        error = F.mse_loss(model.decode(posterior.sample()).sample, batch)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        optimiser.zero_grad(set_to_none=True)
        (error + kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 50 == 0:
            bar.set_postfix_str(f"mse {error.item():.5f} kl {kl.item():.3f}")
    model.eval()
    model.register_to_config(scaling_factor=round(1 / latent_std(model, images), 5))
    return model


def schedule(done: float) -> float:
    """Learning rate as a share of its peak after the share `done` of the steps: a warm-up, then half a cosine."""
    return min(1.0, done / WARMUP + 0.01) * 0.5 * (1 + math.cos(math.pi * done))


def jitter(images: Tensor, amount: float = 1.0) -> Tensor:
    """Images (N, c, H, W) shifted, turned and scaled at random, by up to `amount` of the ranges below; black comes in."""
    n = len(images)

    def uniform(width: float) -> Tensor:
        return (2 * torch.rand(n) - 1) * width * amount

    angle, zoom = uniform(JITTER_TURN), 1 + uniform(JITTER_SCALE)
    cos, sin = zoom * torch.cos(angle), zoom * torch.sin(angle)
    across, down = uniform(JITTER_SHIFT), uniform(JITTER_SHIFT)
    theta = torch.stack([torch.stack([cos, -sin, across], 1), torch.stack([sin, cos, down], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # outside the image is black, -1


@torch.no_grad()
def latent_std(model: torch.nn.Module, images: Tensor) -> float:
    """Standard deviation of posterior samples over all latents of `images`."""
    return torch.cat([model.encode(part).latent_dist.sample() for part in images.split(256)]).std().item()


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write `config.json` and float16 weights in diffusers layout."""
    model.half().save_pretrained(folder)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    config.pop("_name_or_path", None)
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner only, and a wheel would keep that


def report(folder: Path, digits: Images) -> str:
    """Reconstruction error and latent statistics of the saved autoencoder."""
    autoencoder = load_autoencoder(folder)
    images = digits.images(range(len(digits)))
    moments = torch.cat([autoencoder.encode(part) for part in images.split(256)])
    latents = autoencoder.latents(moments, torch.randn(len(images), autoencoder.latent_channels, 8, 8))
    error = F.mse_loss(torch.cat([autoencoder.decode(part) for part in latents.split(256)]), images).item()
    spread = torch.exp(0.5 * moments.chunk(2, 1)[1]).mean().item()
    size = sum(file.stat().st_size for file in folder.iterdir())
    return (
        f"{folder}: {size:,} bytes, reconstruction {10 * math.log10(4 / error):.1f} dB, "
        f"latent std {latents.std().item():.3f}, posterior std {spread:.3f}, "
        f"channel means {[round(m, 2) for m in latents.mean((0, 2, 3)).tolist()]}, "
        f"stds {[round(s, 2) for s in latents.std((0, 2, 3)).tolist()]}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=DIGITS_FOLDER, help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--kl-weight", type=float, default=KL_WEIGHT, help="weight of the KL term (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    save(train(options.steps, options.seed, options.kl_weight), options.out)
    torch.manual_seed(options.seed)
    print(report(options.out, open_dataset("digits", image_size=32, image_channels=1, split="held-out")))


if __name__ == "__main__":
    main()
