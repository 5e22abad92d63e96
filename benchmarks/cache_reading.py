"""How fast latents come out of a cache: `python benchmarks/cache_reading.py [--json FILE]`.

Writes a cache of random moments, mean and log-variance of 4x32x32 latents and of their mirror images in half precision (0.7 GB, for
a while), and times reading random batches of 256 out of the page cache, on all cores. A cache of your own is timed by
`python -m ldm_dcn.encode --measure CACHE`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval.environment import environment  # noqa: E402
from ldm_dcn import cache, cache_layout, cache_writer  # noqa: E402

IMAGES = 20_000
LATENT_SHAPE = (4, 32, 32)
BATCH = 256
ROUNDS = 5
SECONDS = 2.0  # a round


def make_cache(out: Path, images: int) -> None:
    channels, height, width = LATENT_SHAPE
    plan = {
        "format": cache_layout.FORMAT,
        "source": "random",
        "images": images,
        "image_list_sha256": "",
        "class_names": [],
        "preprocessing": {"pixels": "random", "image_size": 8 * height, "image_channels": 3, "flips": True},
        "autoencoder": {"spec": "random"},
        "latent_shape": list(LATENT_SHAPE),
        "dtype": "float16",
        "text": None,
        "shard_size": 4096,  # of the size that the encoder chooses
    }
    cache_writer.begin(out, plan)
    generator = torch.Generator().manual_seed(0)
    for shard in cache_layout.shard_ranges(images, plan["shard_size"]):
        indices = torch.arange(shard.first, shard.last + 1)
        shape = (len(shard), 2 * channels, height, width)
        names = ("moments", "moments_flipped")
        tensors = {name: torch.randn(shape, generator=generator).half() for name in names}
        tensors |= {"indices": indices, "labels": torch.zeros_like(indices)}
        cache_writer.write_shard(out, shard, plan, "", tensors, [])
    cache_writer.finish(out, plan, None, 0, "0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "cache_reading.json")
    parser.add_argument("--images", type=int, default=IMAGES, help="default: %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_cache(Path(folder), options.images)
        latents = cache.LatentCache.open(folder)
        rounds = [round(cache.reading_speed(latents, BATCH, SECONDS, seed)) for seed in range(ROUNDS)]
    channels, height, width = LATENT_SHAPE
    content = {
        "environment": environment(),
        "images": options.images,
        "moments": [2 * channels, height, width],
        "dtype": "float16",
        "batch_size": BATCH,
        "latents_per_second": rounds,
        "median": statistics.median(rounds),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{options.json}: {content['median']:,.0f} latents/s, rounds {min(rounds):,} to {max(rounds):,}")


if __name__ == "__main__":
    main()
