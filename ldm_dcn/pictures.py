"""Picture files: uint8 tensors to PNG, and grids of them."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from .files import replacing

SMALLEST_CELL = 64  # pixels; smaller images are enlarged in a grid by whole pixels


def save_png(image: torch.Tensor, path: Path) -> None:
    """One uint8 image (c, H, W), c = 1 or 3."""
    with replacing(path) as file:
        to_pil(image).save(file, format="PNG")


def save_grid(images: torch.Tensor, columns: int, path: Path) -> None:
    """uint8 images (N, c, H, W) in rows of `columns`, black where the last row ends early."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    cells = torch.zeros(rows * columns, c, h, w, dtype=torch.uint8)
    cells[:n] = images
    grid = cells.reshape(rows, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, rows * h, columns * w)
    scale = -(-SMALLEST_CELL // h) if h < SMALLEST_CELL else 1
    picture = to_pil(grid)
    large = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    with replacing(path) as file:
        large.save(file, format="PNG")


def to_pil(image: torch.Tensor) -> Image.Image:
    """A uint8 image (c, H, W), grey or RGB."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
