"""Our distances against pytorch-fid's, scipy's and torch-fidelity's on the same features. See absent_torchvision.py."""

from __future__ import annotations

import absent_torchvision  # noqa: F401  before the peers are imported
import numpy as np
import pytest
import torch

from eval import scores
from eval.moments import Moments, read_statistics, save_statistics
from eval.scores import frechet_distance, kernel_distance

linalg = pytest.importorskip("scipy.linalg")
pytorch_fid = pytest.importorskip("pytorch_fid.fid_score")


def features(count: int, size: int, seed: int, scale: float = 1) -> torch.Tensor:
    """Rectified, correlated, of unequal scales, as an Inception's are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = (
        torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) / size**0.5
    )
    return scale * torch.relu(
        torch.randn(count, size, dtype=torch.float64, generator=generator) @ mixing + 0.3
    )


@pytest.mark.parametrize("size", [16, 256, 2048])
def test_frechet_distance(size):
    a, b = features(2 * size + 100, size, 0, 1.1), features(3 * size, size, 1)
    mu_a, sigma_a, mu_b, sigma_b = (
        a.mean(0).numpy(),
        np.cov(a.numpy().T),
        b.mean(0).numpy(),
        np.cov(b.numpy().T),
    )
    theirs = pytorch_fid.calculate_frechet_distance(mu_a, sigma_a, mu_b, sigma_b)
    formula = ((mu_a - mu_b) ** 2).sum() + np.trace(
        sigma_a + sigma_b - 2 * linalg.sqrtm(sigma_a @ sigma_b).real
    )
    own = frechet_distance(a, b)
    print(
        f"{size} features: {own:.10g}, {own / theirs - 1:.1e} from pytorch-fid, {own / formula - 1:.1e} from scipy's formula"
    )
    assert own == pytest.approx(theirs, rel=1e-6) and own == pytest.approx(formula, rel=1e-6)


def test_statistics_files_pass_between_us(tmp_path):
    a, b = features(500, 32, 0), features(700, 32, 1, 1.2)
    save_statistics(tmp_path / "ours.npz", Moments.of(a), None, {})
    theirs = pytorch_fid.compute_statistics_of_path(str(tmp_path / "ours.npz"), None, 50, 32, "cpu")
    np.savez(tmp_path / "theirs.npz", mu=b.mean(0).numpy(), sigma=np.cov(b.numpy().T))
    ours = read_statistics(str(tmp_path / "theirs.npz"))
    expected = pytorch_fid.calculate_frechet_distance(*theirs, b.mean(0).numpy(), np.cov(b.numpy().T))
    assert ours.moments.frechet_distance(Moments.of(a)) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance(monkeypatch):
    metric = pytest.importorskip("torch_fidelity.metric_kid")
    monkeypatch.setattr(scores, "KID_SUBSET_SIZE", 300)
    a, b = features(300, 64, 0), features(300, 64, 1, 1.2)  # every subset is everything
    expected = metric.kid_features_to_metric(a, b, kid_subsets=2, kid_subset_size=300, verbose=False)
    own, _ = kernel_distance(a, b)
    print(f"KID {own:.10g}, {own / expected['kernel_inception_distance_mean'] - 1:.1e} from torch-fidelity")
    assert own == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
