"""Makes `assets/digits.npz` out of scikit-learn's copy of the UCI handwritten digits: `python -m ldm_dcn.make_digits`.

Needs scikit-learn. The file is shipped, so nobody has to run this.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from .data import DIGITS_FILE


def make_digits(out: Path) -> Path:
    """Write images (1797, 8, 8) uint8 in 0..16 and labels (1797,) uint8, in scikit-learn's order, to `out`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images.astype(np.uint8)
    if not np.array_equal(images, digits.images):
        raise ValueError("scikit-learn's digits are no whole numbers any more; this script needs a look")
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, images=images, labels=digits.target.astype(np.uint8))
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DIGITS_FILE, help="file to write (default: %(default)s)")
    out = make_digits(parser.parse_args(arguments).out)
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
