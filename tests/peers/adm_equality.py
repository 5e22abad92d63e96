"""Our npz files and scores against ADM's evaluator itself, whose file ADM_EVALUATOR names (guided-diffusion, evaluations/evaluator.py).

Its reader, statistics and distance run as they are; TensorFlow, which only its networks and its tiles need, is left out. See
absent_torchvision.py for the environment.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from eval.moments import Moments, save_statistics
from eval.npz import AdmNpzWriter
from eval.scores import inception_score, precision_recall

EVALUATOR = os.environ.get("ADM_EVALUATOR")
pytestmark = pytest.mark.skipif(
    not EVALUATOR, reason="ADM_EVALUATOR does not name guided-diffusion's evaluator.py"
)
pytest.importorskip("scipy")


class _Session:
    """Runs what the evaluator asks of TensorFlow, in numpy: softmax of its features as logits."""

    def run(self, _, feed_dict):
        (logits,) = feed_dict.values()
        share = np.exp(logits - logits.max(1, keepdims=True))
        return share / share.sum(1, keepdims=True)


class _Distances:
    """ADM's `DistanceBlock` in float64 numpy; its own computes in half precision where that is finite."""

    def pairwise_distances(self, u, v):
        return ((u[:, None] - v) ** 2).sum(-1)

    def less_thans(self, batch_1, radii_1, batch_2, radii_2):
        distances = self.pairwise_distances(batch_1, batch_2)[..., None]
        return (distances <= radii_2).any(1), (distances <= radii_1[:, None]).any(0)


@pytest.fixture(scope="module")
def adm():
    spec = importlib.util.spec_from_file_location("adm_evaluator", EVALUATOR)
    module = importlib.util.module_from_spec(spec)
    absent = {
        name: mock.MagicMock()
        for name in ("tensorflow", "tensorflow.compat", "tensorflow.compat.v1", "requests")
    }
    with mock.patch.dict(sys.modules, absent):
        spec.loader.exec_module(module)
    return module


def test_it_reads_what_we_write(adm, tmp_path):
    images = torch.randint(
        0, 256, (70, 3, 16, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with AdmNpzWriter(tmp_path / "ours.npz", 70, 16, 12, comment="as sample.py leaves one") as file:
        for part in images.split(32):
            file.add(part)
        file.label(torch.arange(70))
    with adm.open_npz_array(str(tmp_path / "ours.npz"), "arr_0") as reader:
        assert isinstance(reader, adm.StreamingNpzArrayReader)
        read = np.concatenate(list(reader.read_batches(33)))
    assert np.array_equal(read, images.permute(0, 2, 3, 1).numpy())


def test_it_reads_our_statistics_and_agrees_on_the_distance(adm, tmp_path):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(500, 20, dtype=torch.float64, generator=generator) + shift for shift in (0, 0.2))
    save_statistics(tmp_path / "ours.npz", Moments.of(a), Moments.of(b), {"n": 500})
    evaluator = adm.Evaluator.__new__(adm.Evaluator)
    of_a, of_b = evaluator.read_statistics(str(tmp_path / "ours.npz"), None)
    assert Moments.of(a).frechet_distance(Moments.of(b)) == pytest.approx(
        of_a.frechet_distance(of_b), rel=1e-6
    )


def test_it_agrees_on_precision_recall_and_inception_score(adm, monkeypatch):
    monkeypatch.setattr(np, "bool", np.bool_, raising=False)  # numpy's name when ADM was written
    generator = torch.Generator().manual_seed(0)
    samples, reference = (torch.randn(n, 8, dtype=torch.float64, generator=generator) for n in (300, 400))
    samples = 0.9 * samples
    evaluator = adm.Evaluator.__new__(adm.Evaluator)
    evaluator.sess, evaluator.softmax_batch_size, evaluator.softmax_input, evaluator.softmax = (
        _Session(),
        512,
        "logits",
        None,
    )
    monkeypatch.setattr(adm, "DistanceBlock", lambda session: _Distances())
    evaluator.manifold_estimator = adm.ManifoldEstimator(None)
    expected = evaluator.compute_prec_recall(reference.numpy(), samples.numpy())
    assert precision_recall(samples, reference) == pytest.approx(
        expected, abs=1.01 / 300
    )  # its radii are float32
    logits = 2 * torch.randn(5000, 9, dtype=torch.float64, generator=generator)
    assert inception_score(logits) == pytest.approx(
        evaluator.compute_inception_score(logits.numpy()), rel=1e-9
    )
