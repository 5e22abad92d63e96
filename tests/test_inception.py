"""The FID Inception: the right file and no other, TensorFlow's resizing, and the parts in which it differs from torchvision's."""

from __future__ import annotations

import pytest
import torch

from eval.extractors import load_extractor
from eval.inception import SHA256, Inception, _average_pool, load_inception, tf1_bilinear
from ldm_dcn.errors import UserError
from ldm_dcn.files import hash_file


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights in the well-known file's layout."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(Inception().state_dict(), path)
    return path


def test_the_layout_is_that_of_the_well_known_file():
    with torch.device("meta"):
        state = Inception().state_dict()
    assert len(state) == 566
    assert sum(v.numel() for k, v in state.items() if "running" not in k and "tracked" not in k) == 23_850_960
    assert state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)


def test_weights_come_in_by_their_hash_only(weights, tmp_path):
    with pytest.raises(UserError, match="6726825d"):
        load_extractor(f"inception:{weights}")
    with pytest.raises(UserError, match="no such file"):
        load_extractor(f"inception:{tmp_path / 'none.pth'}")
    cut = tmp_path / "cut.pth"
    cut.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"cut\.pth"):
        load_inception(cut, hash_file(cut))
    network = load_inception(weights, hash_file(weights)[:8])
    assert network.named("FID") == "FD-inception-2015-12-05"  # FID is for the well-known weights alone
    network.fingerprint = SHA256[:16]
    assert network.named("FID") == "FID"


def test_features_do_not_depend_on_batch_or_colour_layout(weights):
    network = load_inception(weights, "")
    grey = torch.randint(
        0, 256, (2, 1, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        both, one = network(grey), network(grey[1:].expand(-1, 3, -1, -1))
    assert both.shape == (2, 2048) and torch.isfinite(both).all()
    torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="uint8"):
        network(grey.float())


def test_images_come_as_in_pytorch_fid_where_that_is_asked_for(weights):
    """Half-pixel centres and [-1, 1] instead of TensorFlow's corners and (v - 128) / 128; the features differ, and the tag says why."""
    ours, theirs = load_inception(weights, ""), load_inception(weights, "", by_torch=True)
    images = torch.randint(
        0, 256, (1, 3, 40, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )
    seen = []
    theirs.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        assert not torch.allclose(ours(images), theirs(images), rtol=1e-3, atol=0)
    x = torch.nn.functional.interpolate(images.float() / 255, size=(299, 299), mode="bilinear")
    torch.testing.assert_close(seen[0].contiguous(), 2 * x - 1)
    assert (ours.resize, theirs.resize) == ("TF1 bilinear to 299x299", "torch bilinear to 299x299")
    with pytest.raises(UserError, match="6726825d"):
        load_extractor(f"pytorch-fid:{weights}")


def test_spatial_features_and_logits_are_those_of_adm(weights):
    network = load_inception(weights, "")
    images = torch.randint(
        0, 256, (1, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    seen = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        features, spatial = network.with_spatial(images)
        assert torch.equal(network(images), features)
    assert spatial.shape == (1, network.num_spatial) == (1, 17 * 17 * 7)
    grid = spatial.reshape(17, 17, 7)  # TensorFlow's layout: rows, columns, channels
    assert torch.equal(grid[3, 5], seen[0][0, :7, 3, 5]) and bool((spatial >= 0).all())
    assert torch.equal(network.logits(features), features @ network.fc.weight.T)  # no bias
    assert not network.names_classes  # 1008 classes in an order of their own


def test_resizing_is_tensorflows():
    x = torch.rand(1, 2, 5, 7, dtype=torch.float64)
    resized = tf1_bilinear(x, 9)
    for i in range(9):
        for j in range(9):
            y, z = i * 5 / 9, j * 7 / 9  # from the corner: no half pixel, no antialiasing
            a, b = int(y), int(z)
            below, right = min(a + 1, 4), min(b + 1, 6)
            top = x[0, :, a, b] * (1 - (z - b)) + x[0, :, a, right] * (z - b)
            bottom = x[0, :, below, b] * (1 - (z - b)) + x[0, :, below, right] * (z - b)
            torch.testing.assert_close(resized[0, :, i, j], top * (1 - (y - a)) + bottom * (y - a))
    assert torch.equal(tf1_bilinear(x[..., :5], 5), x[..., :5])


def test_average_pooling_leaves_the_padding_out():
    assert torch.equal(_average_pool(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))
