"""Scores: closed forms, brute force, refusals, and extractors."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from eval import scores
from eval.extractors import load_extractor
from eval.features import FeatureExtractor
from eval.scores import (
    class_accuracy,
    extract,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_neighbour_distance,
    precision_recall,
)
from ldm_dcn.data import open_dataset
from ldm_dcn.errors import UserError


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images = open_dataset("digits", image_size=32, image_channels=1, split="held-out")
    return images.read(range(len(images)))[0], images.labels


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """(n, d) float64 with mean exactly 0 and covariance exactly 1."""
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T


# --------------------------------------------------------------------------------------------------- distances


def test_frechet_distance_has_its_closed_forms():
    x = normal(200, 5)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    scale = torch.tensor([0.5, 1.0, 2.0, 3.0, 1.5], dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9) and frechet_distance(x, x) >= 0
    assert frechet_distance(x, x + shift) == pytest.approx((shift**2).sum().item(), rel=1e-9)
    assert frechet_distance(x * scale, x) == pytest.approx(((scale - 1) ** 2).sum().item(), rel=1e-9)
    far = 1e4  # float32 sums would lose these digits
    assert frechet_distance(x + far, x * scale + far) == pytest.approx(
        ((scale - 1) ** 2).sum().item(), rel=1e-6
    )


def test_frechet_distance_equals_the_matrix_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = normal(300, 6) @ torch.randn(6, 6, dtype=torch.float64), normal(250, 6, 1) + 0.3
    ca, cb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(
        ca + cb - 2 * linalg.sqrtm(ca @ cb).real
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_kernel_distance_is_the_unbiased_estimate_and_repeats(monkeypatch):
    monkeypatch.setattr(scores, "KID_SUBSET_SIZE", 100)
    a, b = normal(40, 3), normal(40, 3, 1) + 0.2

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    n = len(a)
    expected = sum(k(a[i], a[j]) + k(b[i], b[j]) for i in range(n) for j in range(n) if i != j) / (
        n * (n - 1)
    )
    expected -= 2 * sum(k(a[i], b[j]) for i in range(n) for j in range(n)) / n**2
    mean, spread = kernel_distance(a, b)  # fewer than a subset: every subset is everything
    assert mean == pytest.approx(expected.item(), rel=1e-9) and spread == pytest.approx(0, abs=1e-9)
    many, others = normal(400, 2), normal(300, 2, 1)
    state = torch.get_rng_state()
    first = kernel_distance(many, others)
    torch.manual_seed(99)
    assert kernel_distance(many, others) == first and first[1] > 0
    torch.set_rng_state(state)
    kernel_distance(a, b)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is left alone


def brute_force_precision_recall(samples: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Kynkaanniemi et al. 2019, one pair at a time."""

    def share(points, of):
        radii = [sorted((x - y).norm().item() for y in of)[3] for x in of]  # the third after the point itself
        near = [any((p - x).norm().item() <= r for x, r in zip(of, radii, strict=True)) for p in points]
        return sum(near) / len(near)

    return share(samples, reference), share(reference, samples)


@pytest.mark.parametrize("tile", [4096, 7])
def test_precision_and_recall_are_those_of_brute_force(tile, monkeypatch):
    monkeypatch.setattr(scores, "TILE", tile)
    samples, reference = 0.7 * normal(40, 3) + 101, normal(50, 3, 1) + 100
    found = precision_recall(samples, reference)
    assert found == pytest.approx(brute_force_precision_recall(samples, reference), abs=1e-12)
    assert 0 < found[1] < found[0] < 1  # the narrower set: precise, and missing the rest
    assert precision_recall(reference, reference) == (1, 1)
    assert precision_recall(reference + 1000, reference) == (0, 0)
    collapsed = reference[:1].expand(30, 3)  # radius 0: precise, and recalls its one image
    assert precision_recall(collapsed, reference) == (1, 1 / 50)
    with pytest.raises(UserError, match="3 neighbours"):
        precision_recall(samples[:3], reference)


def test_inception_score_has_its_closed_forms(monkeypatch):
    certain = 100 * torch.eye(10).repeat_interleave(30, 0)
    assert inception_score(certain) == pytest.approx(10, rel=1e-6)  # ten classes, each image of one
    assert inception_score(torch.zeros(50, 10)) == pytest.approx(1)
    logits = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(1)
    expected = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    assert inception_score(logits) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(scores, "INCEPTION_SCORE_SPLIT", 30)
    state = torch.get_rng_state()
    in_halves = inception_score(logits)
    assert 1 < in_halves < expected and in_halves == inception_score(logits)
    monkeypatch.setattr(scores, "INCEPTION_SCORE_SPLIT", 40)
    assert inception_score(logits) == in_halves  # no split is larger
    monkeypatch.setattr(scores, "INCEPTION_SCORE_SPLIT", 30)
    assert inception_score(certain) > 8  # sorted labels are mixed before they are split; unmixed, it is 1
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError, match=r"images \[3\]"):
        inception_score(torch.where(torch.arange(60) == 3, float("nan"), 0.0)[:, None].expand(-1, 5))


def test_what_would_end_the_process_is_an_error():
    x = normal(20, 3)
    for bad in (float("nan"), float("inf")):
        broken = x.clone()
        broken[4, 1] = bad
        for distance in (frechet_distance, kernel_distance):
            with pytest.raises(UserError, match=r"images \[4\]"):
                distance(x, broken)
    with pytest.raises(UserError, match="at least 2"):
        frechet_distance(x, x[:1])
    with pytest.raises(ValueError, match="3 and 2 values"):
        frechet_distance(x, x[:, :2])


def test_accuracy_and_neighbours_are_what_they_say():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert class_accuracy(logits, torch.tensor([1, 0, 0, 0])) == 0.75
    reference = torch.tensor([[0, 0, 0, 0], [10, 10, 10, 10]], dtype=torch.uint8)
    points = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [10, 10, 10, 4]], dtype=torch.uint8)
    assert nearest_neighbour_distance(points, reference) == pytest.approx(1)  # of 0, 1 and 3
    with pytest.raises(ValueError, match="3 values"):
        nearest_neighbour_distance(points[:, :3], reference)


@pytest.mark.parametrize("tile", [4096, 7])
def test_neighbours_are_those_of_brute_force_and_copies_are_found(tile, monkeypatch):
    monkeypatch.setattr(scores, "TILE", tile)
    seeds = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 1, 6, 6), generator=seeds, dtype=torch.uint8)
    for drawn, real in ((pixels[:40], pixels[40:]), (normal(40, 3) + 100, normal(50, 3, 1) + 100)):
        a, b = drawn.flatten(1).double(), real.flatten(1).double()
        nearest = (a[:, None] - b).square().mean(2).min(1).values.sqrt()
        assert nearest_neighbour_distance(drawn, real) == pytest.approx(nearest.median().item(), rel=1e-9)
        assert nearest_neighbour_distance(real[:30], real) == 0
    nearly = pixels.clone()
    nearly[:, 0, 0, 0] ^= 1  # one grey level of one pixel is no copy
    assert nearest_neighbour_distance(nearly, pixels) == pytest.approx(1 / 6, rel=1e-12)


# --------------------------------------------------------------------------------------------------- extractors


def test_the_digits_extractor_knows_digits(digits):
    images, labels = digits
    extractor = load_extractor("digits")
    features = extract(extractor, images)
    assert features.values.shape == (len(images), 64) and features.values.dtype == torch.float64
    assert class_accuracy(features.logits, labels) >= 0.96
    alone = extract(extractor, images[:50])
    torch.testing.assert_close(alone.values, features.values[:50], rtol=1e-4, atol=1e-4)  # any company
    colour = extract(extractor, images[:50].expand(-1, 3, -1, -1))
    torch.testing.assert_close(colour.values, alone.values, rtol=1e-4, atol=1e-4)
    large = nn.functional.interpolate(images[:100].float(), scale_factor=2, mode="nearest").to(torch.uint8)
    assert class_accuracy(extract(extractor, large).logits, labels[:100]) >= 0.96
    assert len(extractor.fingerprint) == 16 and extractor.named("FID") == "FD-digits-v1"
    assert not extractor.train().training  # torchmetrics cannot turn it over


def test_features_are_full_precision_whatever_is_around(digits):
    """Scores on the way are taken inside a run's bf16, and compare with statistics made outside."""
    extractor, images = load_extractor("digits"), digits[0][:20]
    expected, products = extract(extractor, images), torch.backends.cuda.matmul
    before = products.allow_tf32
    products.allow_tf32 = True
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = extract(extractor, images)
        assert products.allow_tf32
    finally:
        products.allow_tf32 = before
    assert torch.equal(found.values, expected.values) and torch.equal(found.logits, expected.logits)


def test_extraction_refuses_what_is_no_image(digits):
    extractor = load_extractor("digits")
    with pytest.raises(ValueError, match="uint8"):
        extract(extractor, digits[0].float())
    with pytest.raises(ValueError, match="no images"):
        extract(extractor, digits[0][:0])

    class Diverged(FeatureExtractor):
        name, num_features = "diverged", 2

        def forward(self, images):
            return torch.where(images[:, 0, :1, 0] > 200, float("nan"), 1.0).expand(-1, 2)

    batch = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    batch[5] = 255
    with pytest.raises(UserError, match=r"diverged.*images \[105\]"):
        extract(Diverged(), batch, first=100)


class MeanColour(nn.Module):
    num_features = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


def test_foreign_extractors_come_through_the_same_door(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_extractor.py").write_text(
        "import torch\n"
        "def colours():\n    return lambda images: images.float().mean((2, 3))\n"
        "def wrong():\n    return lambda images: images\n"
        "number = 3\n"
    )
    images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    expected = images.double().mean((2, 3))
    mine = load_extractor("import:my_extractor:colours")
    torch.testing.assert_close(extract(mine, images).values, expected)
    assert mine.num_features == 3 and extract(mine, images).logits is None
    torch.jit.save(torch.jit.script(MeanColour()), tmp_path / "colours.pt")
    scripted = load_extractor(f"torchscript:{tmp_path / 'colours.pt'}")
    torch.testing.assert_close(extract(scripted, images).values, expected)
    assert scripted.named("sFID") == "sFD-colours" and len(scripted.fingerprint) == 16
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"\(N, features\)"):
        extract(load_extractor("import:my_extractor:wrong"), images)
    for spec, named in (("import:my_extractor:missing", "missing"), ("import:no_such_module:f", "no_such_module"),
                        (f"torchscript:{tmp_path / 'junk.pt'}", "junk.pt"), ("torchscript:/nowhere.pt", "no such file"),
                        ("fid", "unknown"), ("import:my_extractor", "unknown")):  # fmt: skip
        with pytest.raises(UserError, match=named):
            load_extractor(spec)
    sys.modules.pop("my_extractor")


def test_the_script_that_made_the_extractor_runs_again(tmp_path, capsys):
    from eval import make_digits_classifier
    from eval.extractors import _load_digits

    make_digits_classifier.main(["--out", str(tmp_path / "made.safetensors"), "--steps", "20"])
    assert "held out" in capsys.readouterr().out
    assert _load_digits(tmp_path / "made.safetensors").fingerprint != load_extractor("digits").fingerprint
    (tmp_path / "made.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="make_digits_classifier"):
        _load_digits(tmp_path / "made.safetensors")
