"""Ten steps of each paper network at full size on the CPU, from a latent cache of a hundred generated images.

    python benchmarks/full_size.py [CONFIG ...] [--json FILE]

Shows that the three configs run as they stand, how much memory they take, and that the loss falls when the warm-up is cut to
one step. Checkpoint and export are written too: 15 GB of disk for the largest network. With several configs, an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval.environment import environment, noted  # noqa: E402

CONFIGS = ("imagenet256_unet", "imagenet256_dcn_convs", "imagenet256_dcn_full")
STEPS = 10
BATCH = 4
IMAGES = 100


def make_images(folder: Path) -> None:
    """Smooth colour fields in ten class folders."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        place = folder / f"class{i % 10}"
        place.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC).save(place / f"{i:03}.png")


def make_autoencoder(folder: Path) -> None:
    """Stable Diffusion's shape, a fraction of its width: 8 pixels a latent, 4 channels, random weights."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
    ).save_pretrained(folder)


def run(command: list[str]) -> tuple[str, float, int]:
    """Output, seconds, and the largest resident memory in bytes."""
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
            peak = max(peak, int(found[1]) * 1024 if found else 0)
            time.sleep(0.5)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}:\n{text[-3000:]}")
    return text, time.perf_counter() - began, peak


def train(name: str, folder: Path) -> dict:
    config = str(ROOT / "configs" / f"{name}.yaml")
    overrides = [
        f"data.source={folder / 'cache'}",
        f"autoencoder={folder / 'autoencoder'}",
        f"train.steps={STEPS}",
        f"train.batch_size={BATCH}",
        "train.gradient_checkpointing=true",
        "train.warmup_steps=1",
        "train.log_every=1",
        f"run.dir={folder}",
    ]
    _, seconds, peak = run([sys.executable, "train.py", config, *overrides])
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    subprocess.run(["rm", "-r", str(folder / name)], check=True)  # room for the next
    losses = [line["loss"] for line in lines]
    return {
        "config": name,
        "steps": STEPS,
        "batch_size": BATCH,
        "losses": losses,
        "seconds": round(seconds, 1),
        "peak_gib": round(peak / 2**30, 2),
        "images_per_second": lines[-1]["images_per_second"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", default=list(CONFIGS), help=f"default: {' '.join(CONFIGS)}")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "full_size_cpu.json")
    parser.add_argument("--scratch", help="where to put 15 GB for a while (default: the system's)")
    options = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    content = json.loads(options.json.read_text()) if options.json.exists() else {"runs": []}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        make_images(folder / "images")
        make_autoencoder(folder / "autoencoder")
        encode = ["-m", "ldm_dcn.encode", str(folder / "images"), str(folder / "cache"), "--flip"]
        run([sys.executable, *encode, "--autoencoder", str(folder / "autoencoder")])
        for name in options.configs:
            result = train(name, folder)
            print(
                f"{name}: {result['seconds']:.0f} s, peak {result['peak_gib']:.1f} GiB, loss "
                f"{result['losses'][0]:.3f} -> {result['losses'][-1]:.3f}",
                flush=True,
            )
            others = [r for r in content["runs"] if r["config"] != name]
            if not others:
                content = {"environment": environment(), "runs": []}
            content["runs"] = [*others, noted(result, content)]
            options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
