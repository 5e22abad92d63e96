"""Scores: closed forms, brute force, refusals, extractors, and the whole way from images to the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from eval import fid, scores, sources
from eval.extractors import FeatureExtractor, load_extractor
from eval.scores import class_accuracy, extract, frechet_distance, kernel_distance, nearest_neighbour_distance
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


def test_what_would_end_the_process_is_an_error():
    x = normal(20, 3)
    for bad in (float("nan"), float("inf")):
        broken = x.clone()
        broken[4, 1] = bad
        for distance in (frechet_distance, kernel_distance):
            with pytest.raises(ValueError, match=r"images \[4\]"):
                distance(x, broken)
    with pytest.raises(ValueError, match="at least 2"):
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


# --------------------------------------------------------------------------------------------------- extractors


def test_the_digits_extractor_knows_digits(digits):
    images, labels = digits
    extractor = load_extractor("digits")
    features = extract(extractor, images.split(100))
    assert features.values.shape == (len(images), 64) and features.values.dtype == torch.float64
    assert class_accuracy(features.logits, labels) >= 0.96
    alone = extract(extractor, images[:50].split(1))
    torch.testing.assert_close(alone.values, features.values[:50], rtol=1e-4, atol=1e-4)  # any batch size
    colour = extract(extractor, [images[:50].expand(-1, 3, -1, -1)])
    torch.testing.assert_close(colour.values, alone.values, rtol=1e-4, atol=1e-4)
    large = nn.functional.interpolate(images[:100].float(), scale_factor=2, mode="nearest").to(torch.uint8)
    assert class_accuracy(extract(extractor, [large]).logits, labels[:100]) >= 0.96
    assert len(extractor.fingerprint) == 16 and extractor.metric_name == "FD-digits-v1"
    assert not extractor.train().training  # torchmetrics cannot turn it over


def test_extraction_refuses_what_is_no_image(digits):
    extractor = load_extractor("digits")
    with pytest.raises(ValueError, match="uint8"):
        extract(extractor, [digits[0].float()])
    with pytest.raises(ValueError, match="no images"):
        extract(extractor, [])

    class Diverged(FeatureExtractor):
        name, num_features = "diverged", 2

        def forward(self, images):
            return torch.where(images[:, 0, :1, 0] > 200, float("nan"), 1.0).expand(-1, 2)

    batch = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    batch[5] = 255
    with pytest.raises(ValueError, match=r"diverged.*images \[5\]"):
        extract(Diverged(), batch.split(2))


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
    torch.testing.assert_close(extract(mine, images.split(4)).values, expected)
    assert mine.num_features == 3 and extract(mine, [images]).logits is None
    torch.jit.save(torch.jit.script(MeanColour()), tmp_path / "colours.pt")
    scripted = load_extractor(f"torchscript:{tmp_path / 'colours.pt'}")
    torch.testing.assert_close(extract(scripted, [images]).values, expected)
    assert scripted.metric_name == "FD-colours" and len(scripted.fingerprint) == 16
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"\(N, features\)"):
        extract(load_extractor("import:my_extractor:wrong"), [images])
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


# --------------------------------------------------------------------------------------------------- inputs


def test_labels_follow_the_rule():
    reference = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    choose = sources.choose_labels
    assert torch.equal(choose("reference", 8, 3, reference, 0), reference)
    assert choose("reference", 4, 3, reference, 0).tolist() == [0, 0, 1, 2]  # thinned out, all classes met
    assert choose("reference", 10, 3, reference, 0).tolist() == [*reference.tolist(), 0, 0]
    assert choose("balanced", 5, 3, None, 0).tolist() == [0, 1, 2, 0, 1]
    assert torch.equal(choose("random", 50, 3, None, 4), choose("random", 50, 3, None, 4))
    assert choose("balanced", 5, 0, None, 0) is None
    with pytest.raises(UserError, match=r"label 2.*2 classes"):
        choose("reference", 8, 2, reference, 0)
    with pytest.raises(UserError, match="no classes"):
        choose("reference", 8, 2, None, 0)


def test_inputs_that_cannot_be_scored_are_refused(tmp_path, digits):
    images = digits[0][:4]

    def folder(name: str, *sizes: tuple[int, int]) -> str:
        (tmp_path / name).mkdir()
        for i, size in enumerate(sizes):
            Image.new("L", size).save(tmp_path / name / f"{i}.png")
        return str(tmp_path / name)

    def npz(name: str, **arrays) -> str:
        np.savez(tmp_path / name, **arrays)
        return str(tmp_path / name)

    grey = images.permute(0, 2, 3, 1).numpy()
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not a zip")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    cases = {
        folder("two_sizes", (32, 32), (64, 64)): "different sizes",
        folder("oblong", (32, 16)): "not square",
        folder("nothing"): "no images",
        npz("no_arr.npz", images=grey): "no arr_0",
        npz("float.npz", arr_0=grey.astype(np.float32)): "uint8",
        npz("flat.npz", arr_0=grey[..., 0]): "uint8",
        npz("pickled.npz", arr_0=np.array([{}], dtype=object)): "cannot be read",
        str(tmp_path / "broken.npz"): "cannot be read",
        str(tmp_path / "missing.npz"): "no such file",
        str(tmp_path / "no_run_here"): "does not exist",
        str(tmp_path / "run"): "not saved a model",
    }
    for path, reason in cases.items():
        with pytest.raises(UserError, match=reason) as caught:
            fid.evaluate([path], progress=False)
        assert Path(path).name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--reference"):
        fid.evaluate(
            [npz("fine.npz", arr_0=grey)], extractor="import:eval.extractors:DigitsClassifier", progress=False
        )


# --------------------------------------------------------------------------------------------------- the table


@pytest.fixture
def small_reference(tmp_path, digits) -> Path:
    """A class folder of 300 digits: quick to compare with."""
    images, labels = digits
    for i in range(300):
        place = tmp_path / "reference" / str(int(labels[i]))
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i, 0].numpy()).save(place / f"{i:03}.png")
    return tmp_path / "reference"


def test_folder_and_npz_of_the_same_images_score_alike(tmp_path, digits, small_reference, capsys):
    images, labels = digits
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(300, 445):
        Image.fromarray(images[i, 0].numpy()).save(flat / f"{i:03}.png")
    array = (
        images[300:].permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()
    )  # grey as RGB, as ADM's layout wants it
    np.savez(tmp_path / "samples.npz", array, labels[300:].numpy())
    json_file = tmp_path / "out" / "scores.json"
    fid.main([str(flat), str(tmp_path / "samples.npz"), "--reference", str(small_reference), "--json", str(json_file),
              "--batch-size", "50", "--device", "cpu"])  # fmt: skip
    text = capsys.readouterr().out
    assert "FD-digits-v1" in text and " FID" not in text
    result = json.loads(json_file.read_text())
    assert [column["name"] for column in result["columns"]] == [
        "flat",
        "samples",
        "real held-out",
        "real half",
        "noise",
    ]
    by_name = {column["name"]: column["scores"] for column in result["columns"]}
    for key in ("fd", "kid_x1000", "nearest_neighbour"):
        assert by_name["flat"][key] == pytest.approx(by_name["samples"][key], rel=1e-3, abs=1e-3)
    assert "class_accuracy" not in by_name["flat"] and by_name["samples"]["class_accuracy"] > 0.95
    assert by_name["noise"]["fd_of_noise"] == 1 and by_name["noise"]["fd"] > 20 * by_name["samples"]["fd"]
    assert by_name["samples"]["fd_of_noise"] == pytest.approx(
        by_name["samples"]["fd"] / by_name["noise"]["fd"]
    )
    assert all(column["tags"]["N"] == column["scores"]["images"] for column in result["columns"])
    assert result["extractor"]["weights"] == load_extractor("digits").fingerprint
    assert result["reference"]["images"] == 300 and result["environment"]["versions"]["torch"]


def test_copies_of_the_reference_show_themselves(small_reference):
    table = fid.evaluate([str(small_reference)], reference=str(small_reference), progress=False)
    copies, real = table.columns[0].scores, table.columns[1].scores
    assert copies["fd"] < 1e-6 and copies["nearest_neighbour"] < 1e-3 < 10 < real["nearest_neighbour"]


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """An untrained model on the digits, exported as a run exports it."""
    from ldm_dcn.autoencoder import load_autoencoder
    from ldm_dcn.denoiser import Denoiser
    from ldm_dcn.diffusion import Schedule
    from ldm_dcn.export import Model, save_export
    from ldm_dcn.unet import build_unet

    torch.manual_seed(0)
    unet = build_unet({
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [16, 16], "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "cross_attention_dim": 16, "attention_head_dim": 2,
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "norm_num_groups": 8})  # fmt: skip
    model = Model(Denoiser(unet, 10), load_autoencoder("digits"), Schedule(), (4, 8, 8), "untrained", 7,
                  {"data": {"source": "digits", "image_size": 32}}, {"weights": "EMA 0.99"})  # fmt: skip
    folder = tmp_path_factory.mktemp("runs") / "untrained"
    save_export(folder, model)
    return folder


def test_a_run_is_drawn_from_once_for_each_guidance(export, capsys):
    fid.main(
        [
            str(export),
            "--guidance",
            "1",
            "1.5",
            "--num",
            "30",
            "--steps",
            "2",
            "--batch-size",
            "16",
            "--seed",
            "5",
        ]
    )
    text = capsys.readouterr().out
    assert "untrained g=1 " in text and "untrained g=1.5" in text and "EMA 0.99" in text
    result = json.loads((export / "fid.json").read_text())
    first, second = result["columns"][:2]
    assert first["tags"] | {"guidance": 1.5} == second["tags"]
    wanted = {"N": 30, "guidance": 1.0, "sampler": "dpm++", "sampler_steps": 2, "seed": 5, "step": 7}
    assert wanted.items() <= first["tags"].items()
    assert first["scores"]["images_per_second"] > 0 and first["scores"]["fd"] != second["scores"]["fd"]
    assert "means nothing" in first["tags"]["warning"]  # 30 images in 64 dimensions
    again = fid.evaluate([str(export)], num=30, steps=2, batch_size=7, seed=5, progress=False)
    assert again.columns[0].scores["fd"] == pytest.approx(
        first["scores"]["fd"], rel=1e-3
    )  # whatever the batch


def test_mistakes_leave_with_code_2_and_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        fid.main(["/no/such/run"])
    error = capsys.readouterr().err
    assert (
        left.value.code == 2
        and error.startswith("error: ")
        and "/no/such/run" in error
        and error.count("\n") == 1
    )
