"""Our Inception against torch-fidelity's on the same random weights, and what is made of its features. See absent_torchvision.py."""

from __future__ import annotations

import absent_torchvision  # noqa: F401  before the peers are imported
import pytest
import torch

from eval.inception import Inception, load_inception
from eval.scores import inception_score, precision_recall

peer = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
metric_isc = pytest.importorskip("torch_fidelity.metric_isc")
metric_prc = pytest.importorskip("torch_fidelity.metric_prc")

TOLERANCE = 1e-5  # of the largest value: float32 through 48 layers


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Both with one file of random weights, batch normalisation included."""
    generator = torch.Generator().manual_seed(0)
    state = Inception().state_dict()
    for name, values in state.items():
        if name.endswith("conv.weight"):  # He's, so that activations neither die nor grow
            values.normal_(0, (2 / values[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("running_var", "bn.weight")):
            values.uniform_(0.8, 1.2, generator=generator)
        elif values.is_floating_point():
            values.normal_(0, 0.1, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(state, path)
    theirs = peer.FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    return load_inception(path, ""), theirs.eval()


@pytest.mark.parametrize("size", [(32, 32), (256, 256), (299, 299), (400, 333)])
def test_features_spatial_features_and_logits(networks, size):
    ours, theirs = networks
    images = torch.randint(
        0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    seen = []
    hook = theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        features, spatial = ours.with_spatial(images)
        expected_features, expected_logits = theirs(images)
    hook.remove()
    pairs = {"2048": (features, expected_features), "logits": (ours.logits(features), expected_logits),
             "spatial": (spatial, seen[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1))}  # fmt: skip
    for name, (own, expected) in pairs.items():
        error = ((own - expected).abs().max() / expected.abs().max()).item()
        print(
            f"{size[0]}x{size[1]} {name}: largest error {error:.1e} of the largest value, {expected.abs().max():.3g}"
        )
        assert expected.std() > 0 and error <= TOLERANCE


def test_inception_score():
    logits = 3 * torch.randn(5000, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = metric_isc.isc_features_to_metric(logits, splits=1)["inception_score_mean"]
    assert inception_score(logits) == pytest.approx(expected, rel=1e-9)


def test_precision_and_recall():
    generator = torch.Generator().manual_seed(0)
    samples, reference = (torch.randn(n, 16, dtype=torch.float64, generator=generator) for n in (900, 1100))
    expected = metric_prc.calculate_precision_recall_part(
        0.9 * samples, reference, neighborhood=3, batch_size=400
    )
    assert precision_recall(0.9 * samples, reference) == pytest.approx(
        expected, abs=1e-7
    )  # they average in float32
