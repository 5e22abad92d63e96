"""From inputs to the table: sources, references, statistics, several processes, and ADM's npz, to the last line of output."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval import fid, measurement, score_files, sources, stored_models
from eval.extractors import load_extractor
from eval.features import FeatureExtractor
from eval.moments import Moments
from eval.scores import extract, frechet_distance
from ldm_dcn.data import open_dataset
from ldm_dcn.errors import UserError
from ldm_dcn.export import load_model
from ldm_dcn.sampling import generate
from programs import run, run_together


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes of a launcher have: sums over threads differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images = open_dataset("digits", image_size=32, image_channels=1, split="held-out")
    return images.read(range(len(images)))[0], images.labels


# --------------------------------------------------------------------------------------------------- inputs


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
    np.savez(tmp_path / "cut.npz", arr_0=np.repeat(grey, 50, 0))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:60_000])
    np.save(tmp_path / "single.npy", grey)
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    nan = (grey / 255).astype(np.float32)
    nan[2, 5] = np.nan
    cut = folder("cut_png", *[(32, 32)] * 20)
    Image.fromarray(images[0, 0].numpy()).save(Path(cut, "7.png"))
    Path(cut, "7.png").write_bytes(Path(cut, "7.png").read_bytes()[:200])
    with pytest.raises(
        UserError,
        match=r"^1 of 20 images .*/7\.png \(.*\); delete or repair it, or leave out .* --max-bad 1 ",
    ):
        fid.evaluate([cut], extractor="digits", reference=cut, progress=False)
    for number in (3, 5, 11):  # of these not even the headers can be read
        Path(cut, f"{number}.png").write_text("no picture")
    told = (
        r"^4 of 20 images of .*cut_png cannot be read: .*/11\.png \(not an image.*/3\.png .*/5\.png .*; and 1 more; "
        "delete or repair them, or leave out as many with --max-bad 4 "
    )
    for size in (None, 32):
        with pytest.raises(UserError, match=told):
            fid.evaluate([cut], extractor="digits", reference=cut, image_size=size, progress=False)
    cases = {
        folder("eight", *[(32, 32)] * 8): "8 images, too few",
        str(tmp_path / "cut.npz"): "cannot be read",
        str(tmp_path / "single.npz"): "cannot be read",
        npz("nan.npz", arr_0=nan): "image 2 of arr_0 holds NaN",
        npz("shares.npz", arr_0=(grey / 255).astype(np.float32)): r"float32 in \[0, 1\]",
        npz("wide.npz", arr_0=grey.astype(np.int64) * 2): r"int64 in \[0, 510\]",
        npz("cast.npz", arr_0=(grey / 255).astype(np.uint8)): "cast to bytes",
        npz("statistics.npz", mu=np.zeros(3), sigma=np.eye(3)): "statistics and no images",
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
    for settings, reason in (({"num": 8}, "--samples is 8"), ({"batch_size": 0}, "--batch-size is 0")):
        with pytest.raises(UserError, match=reason):
            fid.evaluate([str(tmp_path / "run")], progress=False, **settings)
    with pytest.raises(UserError, match="nothing to score"):
        fid.evaluate([], progress=False)
    with pytest.raises(UserError, match="--reference"):
        fid.evaluate(
            [npz("fine.npz", arr_0=grey)], extractor="import:eval.extractors:DigitsClassifier", progress=False
        )


# --------------------------------------------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def small_reference(tmp_path_factory, digits) -> Path:
    """A class folder of 300 digits: quick to compare with."""
    images, labels = digits
    folder = tmp_path_factory.mktemp("small") / "reference"
    for i in range(300):
        place = folder / str(int(labels[i]))
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i, 0].numpy()).save(place / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def quick(small_reference) -> dict[str, str]:
    """Settings of `fid.evaluate` for what does not depend on the reference: a table of all digits takes a second and more."""
    return {"reference": str(small_reference), "extractor": "digits"}


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
    fid.main([str(flat), str(tmp_path / "samples.npz"), "--extractor", "digits", "--reference", str(small_reference),
              "--json", str(json_file), "--batch-size", "50", "--device", "cpu"])  # fmt: skip
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


def test_colours_are_read_alike_from_folder_and_npz(tmp_path, digits):
    """Against themselves, against statistics, against grey digits."""
    grey = digits[0][:80]
    tints = torch.tensor([1.0, 0.6, 0.2])[:, None, None]
    images = (grey * tints).round().to(torch.uint8)
    folder = tmp_path / "colours"
    folder.mkdir()
    for i, pixels in enumerate(images):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    packed = tmp_path / "colours.npz"
    np.savez(packed, images.permute(0, 2, 3, 1).numpy())

    def distances(reference: str) -> list[float]:
        table = fid.evaluate(
            [str(folder), str(packed)], extractor="digits", reference=reference, progress=False
        )
        return [column.scores["fd"] for column in table.columns[:2]]

    assert distances(str(folder)) == pytest.approx([0, 0], abs=1e-6)
    # An npz has its colours, as a run's images have: a folder read in grey would be other images.
    assert distances(str(packed)) == pytest.approx([0, 0], abs=1e-6)
    statistics = tmp_path / "statistics.npz"
    fid.evaluate([], extractor="digits", reference=str(folder), save_statistics=statistics, progress=False)
    assert distances(str(statistics)) == pytest.approx([0, 0], abs=1e-6)
    of_folder, of_npz = distances("digits")
    assert of_folder == pytest.approx(of_npz, rel=1e-9) and of_folder > 1
    as_pillow = torch.stack(
        [torch.from_numpy(np.array(Image.open(file).convert("L"))) for file in sorted(folder.iterdir())]
    )
    assert torch.equal(sources.NpzSource(str(packed), as_grey=True).read(0, 80, 1)[:, 0], as_pillow)


def test_broken_images_of_a_reference_are_left_out_as_far_as_allowed(tmp_path, digits, capsys):
    images, labels = digits
    folder = tmp_path / "reference"
    for i in range(60):
        place = folder / str(int(labels[i]))
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i, 0].numpy()).save(place / f"{i:03}.png")
    whole = fid.evaluate([str(folder)], extractor="digits", reference=str(folder), progress=False)
    broken = next(place for place in sorted(folder.rglob("*.png")))
    torn = broken.with_name("torn.png")
    torn.write_bytes(broken.read_bytes()[:-40])  # its header is whole
    (broken.with_name("empty.png")).write_bytes(b"")

    def score(*more: str) -> str:
        with pytest.raises(SystemExit) if "2" not in more else nullcontext():
            fid.main(
                [str(folder), "--reference", str(folder), "--extractor", "digits", "--device", "cpu", *more]
            )
        return "".join(capsys.readouterr())

    refused = score()
    assert "2 of 62 images" in refused and "torn.png" in refused and "--max-bad 2" in refused
    assert "2 of 62 images" in score("--max-bad", "1")
    assert "--max-bad is -1" in score("--max-bad", "-1")
    for option, value in (
        ("--guidance", "1.5"),
        ("--labels", "balanced"),
        ("--samples", "100"),
        ("--steps", "20"),
    ):
        assert f"{option} says how a run is drawn" in score(option, value)
    text = score("--max-bad", "2")
    assert text.count("broken, left out 2") == 2 and "images 60" in text
    table = fid.evaluate(
        [str(folder)], extractor="digits", reference=str(folder), max_bad=0.04, progress=False
    )
    assert table.columns[1].scores == whole.columns[1].scores  # the labels are still those of their images
    trained = {"source": str(folder), "image_size": 32, "max_bad": 2}
    assert len(fid._reference_of("a run", trained, 1, None, None, None)[0]) == 60
    elsewhere = {**trained, "source": "digits"}
    with pytest.raises(UserError, match="2 of 62"):
        fid._reference_of("a run", elsewhere, 1, str(folder), None, None)[0].read(0, 62, 1)


def test_copies_of_the_reference_show_themselves(small_reference):
    reference = str(small_reference)
    table = fid.evaluate([reference], extractor="digits", reference=reference, progress=False)
    copies, real = table.columns[0].scores, table.columns[1].scores
    assert copies["fd"] < 1e-6 and copies["nearest_neighbour"] < 1e-3 < 10 < real["nearest_neighbour"]


def test_of_other_class_names_no_accuracy_is_given(tmp_path, digits, quick):
    """Folders 5 and 7 would be classes 0 and 1, and copies of real digits all wrong."""
    images, labels = digits
    for digit in (5, 7):
        (tmp_path / str(digit)).mkdir()
        for i in (labels == digit).nonzero().flatten()[:12].tolist():
            Image.fromarray(images[i, 0].numpy()).save(tmp_path / str(digit) / f"{i}.png")
    of_two, of_all = fid.evaluate([str(tmp_path), quick["reference"]], progress=False, **quick).columns[:2]
    assert "class_accuracy" not in of_two.scores and of_all.scores["class_accuracy"] > 0.95


def test_the_digits_extractor_is_not_taken_for_other_images_unasked(tmp_path, capsys):
    """Their distance would be called FD-digits-v1, and folder numbers would be compared with digits."""
    noise = torch.randint(
        0, 256, (40, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    for i, pixels in enumerate(noise):
        place = tmp_path / "imgs" / ("cats", "dogs")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(place / f"{i}.png")
    images = str(tmp_path / "imgs")
    with pytest.raises(SystemExit) as left:
        fid.main([images, "--reference", images, "--image-size", "16"])
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1
    assert "not the digits" in error and "--extractor inception:FILE" in error
    # Asked for, it is taken, without the names of its classes, and the table says so.
    fid.main([images, "--reference", images, "--image-size", "16", "--extractor", "digits"])
    text = capsys.readouterr().out
    assert f"Warning: extractor digits-v1: it learned from the digits, and the reference is {images}" in text
    assert "class accuracy" not in text and "FD-digits-v1" in text
    # Nor do statistics of such images know the classes, whose source they name.
    statistics = tmp_path / "statistics.npz"
    asked = dict(image_size=16, extractor="digits", progress=False)
    fid.evaluate([], reference=images, save_statistics=statistics, **asked)
    text = str(fid.evaluate([images], reference=str(statistics), **asked))
    assert (
        f"Warning: extractor digits-v1: it learned from the digits, and the reference's images are {images}"
        in text
    )
    assert "class accuracy" not in text
    assert "it learned" not in str(fid.evaluate(["digits"], progress=False))


def test_a_run_from_a_latent_cache_is_told_to_name_its_images(export, tmp_path, capsys):
    from ldm_dcn.export import save_export

    cache, run = tmp_path / "cache", tmp_path / "from_cache"
    (cache / "shards").mkdir(parents=True)
    (cache / "manifest.json").write_text("{}")
    model = load_model(str(export), device="cpu")
    model.config["data"]["source"] = str(cache)
    save_export(run, model)
    with pytest.raises(SystemExit) as left:
        fid.main([str(run), "--num", "30"])
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1
    assert "latent cache" in error and "--reference FOLDER" in error


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """An untrained model on the digits, exported as a run exports it."""
    from ldm_dcn.autoencoder import load_autoencoder
    from ldm_dcn.denoiser import Denoiser
    from ldm_dcn.diffusion import Schedule
    from ldm_dcn.export import save_export
    from ldm_dcn.model import Model
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


def test_against_statistics_each_class_is_drawn_alike(export, tmp_path):
    """They hold no labels. The headline of docs/training.md is of this kind."""
    statistics = tmp_path / "digits.npz"
    fid.evaluate([], save_statistics=statistics, progress=False)
    table = fid.evaluate([str(export)], reference=str(statistics), num=20, steps=1, progress=False)
    assert table.columns[0].tags["labels"] == "balanced"
    table = fid.evaluate([str(export)], num=20, steps=1, progress=False)
    assert table.columns[0].tags["labels"] == "reference"


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
    result = json.loads((export / "fid-digits-v1-30.json").read_text())
    first, second = result["columns"][:2]
    assert first["tags"] | {"guidance": 1.5} == second["tags"]
    wanted = {"N": 30, "guidance": 1.0, "sampler": "dpm++", "sampler_steps": 2, "seed": 5, "step": 7}
    assert wanted.items() <= first["tags"].items()
    assert first["scores"]["images_per_second"] > 0 and first["scores"]["fd"] != second["scores"]["fd"]
    assert "means nothing" in first["tags"]["warning"]  # 30 images in 64 dimensions
    assert first["tags"]["guidance_interval"] == [0, 1]
    again = fid.evaluate([str(export)], num=30, steps=2, batch_size=7, seed=5, progress=False)
    assert again.columns[0].scores["fd"] == pytest.approx(
        first["scores"]["fd"], rel=1e-3
    )  # whatever the batch


def test_a_run_may_be_drawn_in_fewer_bits_and_with_less_contrast(export, quick, tmp_path, capsys):
    """As sample.py's --precision and --guidance-rescale draw; the tags of a column say both."""
    given = [str(export), "--num", "20", "--steps", "2", "--guidance", "3", "--json", str(tmp_path / "fid.json"),
             "--save-npz", str(tmp_path), "--reference", quick["reference"], "--extractor", "digits"]  # fmt: skip
    model, labels = load_model(str(export)), open_dataset(quick["reference"], image_size=32).labels
    labels = labels[torch.arange(20) * len(labels) // 20]
    for options, dtype, said in (
        ([], None, {"precision": "fp32"}),
        (["--precision", "bf16"], torch.bfloat16, {"precision": "bf16"}),
        (["--guidance-rescale", "0.7"], None, {"precision": "fp32", "guidance_rescale": 0.7}),
    ):
        fid.main([*given, *options, "--device", "cpu"])
        tags = json.loads((tmp_path / "fid.json").read_text())["columns"][0]["tags"]
        assert {key: tags.get(key) for key in ("precision", "guidance_rescale")} == {
            "guidance_rescale": None,
            **said,
        }
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            drawn = generate(model, labels, range(20), steps=2, guidance=3.0, guidance_rescale=said.get("guidance_rescale", 0.0))  # fmt: skip
        kept = np.load(tmp_path / "untrained_g=3.npz")["arr_0"][..., 0]
        assert np.array_equal(kept, drawn[:, 0].numpy()), options
    with pytest.raises(UserError, match="precision 'int8' is unknown; use one of fp32, bf16, fp16"):
        fid.evaluate([str(export)], num=20, precision="int8", progress=False)


@pytest.fixture
def exports(export, tmp_path) -> dict[str, Path]:
    """Three exports of one run: two of one step that are averaged otherwise, and a later one."""
    from ldm_dcn.export import load_model, save_export

    folders = {}
    for name, step, weights in (("narrow", 7, "EMA 0.05"), ("wide", 7, "EMA 0.1"), ("later", 9, "EMA 0.05")):
        model = load_model(export)
        with torch.no_grad():
            next(model.denoiser.parameters()).add_(len(folders))
        model.step, model.tags = step, {"weights": weights}
        folders[name] = tmp_path / "of_one_run" / name
        save_export(folders[name], model)
    return folders


def test_models_are_on_the_device_one_at_a_time(exports, quick, monkeypatch):
    loaded, load = [], stored_models.load_denoiser

    def watched(*arguments):
        assert all(network() is None for network in loaded)  # the one before is gone
        network = load(*arguments)
        loaded.append(weakref.ref(network))
        return network

    settings = {**quick, "num": 20, "steps": 1, "guidance": (1.0, 2.0), "progress": False}
    alone = [fid.evaluate([str(path)], **settings).columns[:2] for path in exports.values()]
    monkeypatch.setattr(stored_models, "load_denoiser", watched)
    together = fid.evaluate([str(path) for path in exports.values()], **settings)
    assert len(loaded) == 3  # each once, for both of its columns
    for column, expected in zip(together.columns, [*chain(*alone)], strict=False):
        for one in (column.scores, expected.scores):
            del one["images_per_second"]
        assert column.scores == expected.scores and column.tags == expected.tags


def test_exports_that_cannot_be_drawn_from_are_seen_before_anything_is_measured(
    exports, tmp_path, monkeypatch
):
    def cut(name: str, file: str) -> Path:
        shutil.copytree(exports["later"], tmp_path / name)
        weights = tmp_path / name / file
        weights.write_bytes(weights.read_bytes()[:-8])
        return tmp_path / name

    measured = []
    monkeypatch.setattr(fid, "measure", lambda *_, **__: measured.append(1))
    damaged, unlisted = (
        cut(name, "unet/diffusion_pytorch_model.safetensors") for name in ("cut", "unlisted")
    )
    (unlisted / "manifest.json").unlink()  # as of a copy that was stripped of it
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(exports["later"], elsewhere)
    (elsewhere / "manifest.json").unlink()
    (elsewhere / "autoencoder.json").write_text(json.dumps({"spec": "/not/here", "fingerprint": {}}))
    for path, reason in (
        (damaged, "bytes instead of"),
        (unlisted, "cannot load a U-Net"),
        (elsewhere, "/not/here"),
    ):
        with pytest.raises(UserError, match=reason):
            fid.evaluate([str(exports["narrow"]), str(path)], num=20, progress=False)
    assert not measured


def test_an_export_that_is_replaced_meanwhile_is_not_taken_for_itself(exports, quick, monkeypatch):
    """As that of a run that goes on."""
    from ldm_dcn.export import load_model, save_export

    model, measure = load_model(exports["later"]), fid.measure
    model.step = 11

    def measure_and_replace(source, *arguments, **settings):
        measured = measure(source, *arguments, **settings)
        save_export(exports["later"], model)
        return measured

    monkeypatch.setattr(fid, "measure", measure_and_replace)
    with pytest.raises(
        UserError, match=r"later was written again .* \(step 9, now 11\); give an export that stays"
    ):
        fid.evaluate(
            [str(exports["narrow"]), str(exports["later"])], num=20, steps=1, progress=False, **quick
        )


def test_exports_of_one_run_have_columns_of_their_own(exports, quick):
    copy = exports["wide"].parent / "copy"
    shutil.copytree(exports["wide"], copy)

    def names(*paths: Path) -> list[str]:
        table = fid.evaluate(list(map(str, paths)), num=20, steps=1, progress=False, **quick)
        return [column.name.removesuffix(" g=1") for column in table.columns[: len(paths)]]

    assert names(exports["narrow"], exports["later"]) == ["untrained step 7", "untrained step 9"]
    assert names(*exports.values(), copy) == [
        "untrained step 7 EMA 0.05",
        "untrained step 7 EMA 0.1 wide",
        "untrained step 9",
        "untrained step 7 EMA 0.1 copy",
    ]


def test_what_was_kept_is_replaced_by_its_like_alone(exports, quick, capsys, monkeypatch):
    """A quick look with few images leaves the table of all of them, and so does one with other settings."""
    folder = exports["narrow"]
    given = [str(folder), "--steps", "1", "--device", "cpu", "--reference", quick["reference"], "--extractor", "digits"]  # fmt: skip

    def score(*options: str) -> str:
        fid.main([*given, *options])
        name = capsys.readouterr().out.splitlines()[-1].removeprefix(f"The table is kept in {folder}/")
        assert len(json.loads((folder / name).read_text())["columns"]) == 4
        return name

    assert score("--num", "24") == "fid-digits-v1-24.json"
    assert score("--num", "20") == "fid-digits-v1-20.json"
    first = (folder / "fid-digits-v1-20.json").read_bytes()
    assert score("--num", "20", "--seed", "5") == "fid-digits-v1-20-2.json"
    assert (folder / "fid-digits-v1-20.json").read_bytes() == first
    assert score("--num", "20", "--batch-size", "7") == "fid-digits-v1-20.json"  # the same again
    assert (folder / "fid-digits-v1-20.json").read_bytes() != first  # its command
    (folder / "fid-digits-v1-20.json").write_text("damaged")
    assert score("--num", "20") == "fid-digits-v1-20-3.json"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)  # another machine: its speeds are others
    assert score("--num", "24") == "fid-digits-v1-24-2.json"
    files = score_files.files_of(str(folder))
    assert [file.name.removeprefix("fid-digits-v1-") for file in files] == [
        "20-2.json",
        "20-3.json",
        "20.json",
        "24-2.json",
        "24.json",
    ]


def test_a_table_of_several_runs_lies_with_each(exports, quick, capsys):
    folders = [exports["narrow"], exports["later"]]
    fid.main([*map(str, folders), "--num", "20", "--steps", "1", "--device", "cpu", "--reference", quick["reference"],
              "--extractor", "digits"])  # fmt: skip
    first, second = (folder / "fid-digits-v1-20.json" for folder in folders)
    assert capsys.readouterr().out.endswith(f"The table is kept in {first}\nThe table is kept in {second}\n")
    assert first.read_bytes() == second.read_bytes()


def test_tables_lie_where_they_outlast_the_export(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "a"
    for folder in ("checkpoints", "export", "exports/step-3", "export-0.05"):
        (run / folder).mkdir(parents=True)
    (tmp_path / "alone").mkdir()
    for path in (run, run / "export", run / "exports" / "step-3", run / "export-0.05"):
        assert score_files.folder_of(str(path)) == run, path
    assert score_files.folder_of(str(tmp_path / "alone")) == tmp_path / "alone"
    assert score_files.folder_of("somebody/model") is None and score_files.files_of("somebody/model") == []
    monkeypatch.chdir(run / "exports")
    assert score_files.folder_of("step-3") == Path("..")
    (run / "fid.json").write_text("")  # of an earlier version
    (run / "fidelity.json").write_text("")
    assert score_files.files_of("step-3") == [Path("../fid.json")]


@pytest.mark.parametrize(
    "mistake", ["no run", "two sizes", "8 images", "no arr_0", "NaN", "other extractor", "cut weights"]
)
def test_mistakes_leave_with_code_2_and_one_line(mistake, tmp_path, capsys):
    for i in range(8):
        Image.new("L", (32, 64 if mistake == "two sizes" and i else 32)).resize(
            (32, 32) if i < 4 else (64, 64) if mistake == "two sizes" else (32, 32)
        ).save(tmp_path / f"{i}.png")
    arrays = {
        "no arr_0": {"images": np.zeros((20, 8, 8, 3), np.uint8)},
        "NaN": {"arr_0": np.full((20, 8, 8, 3), np.nan)},
    }
    np.savez(tmp_path / "given.npz", **arrays.get(mistake, {"mu": np.zeros(2048), "sigma": np.eye(2048)}))
    (tmp_path / "weights.pth").write_bytes(b"PK\x03\x04 cut short")
    given = {"no run": ["/no/such/run"], "two sizes": [str(tmp_path)], "8 images": [str(tmp_path)],
             "other extractor": ["digits", "--reference", str(tmp_path / "given.npz")],
             "cut weights": [str(tmp_path), "--extractor", f"inception:{tmp_path / 'weights.pth'}"]}  # fmt: skip
    named = {"no run": "/no/such/run", "two sizes": "different sizes", "8 images": "8 images, too few", "no arr_0": "no arr_0",
             "NaN": "NaN", "other extractor": "2048 features", "cut weights": "weights.pth"}  # fmt: skip
    with pytest.raises(SystemExit) as left:
        fid.main([*given.get(mistake, [str(tmp_path / "given.npz")]), "--device", "cpu"])
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert named[mistake] in error


def test_an_extractor_that_fails_is_told_what_it_gets(quick, monkeypatch):
    monkeypatch.setattr("test_fid.unscaled", lambda: torch.nn.Conv2d(1, 4, 3), raising=False)
    with pytest.raises(
        UserError, match=r"test_fid:unscaled failed on uint8 images \(64, 3, 32, 32\): .*; it takes uint8"
    ):
        fid.evaluate(
            [quick["reference"]],
            reference=quick["reference"],
            extractor="import:test_fid:unscaled",
            progress=False,
        )


def test_features_that_are_nan_do_not_end_the_process(tmp_path, small_reference):
    """torchmetrics' eigenvalue routine would: hence a process of its own."""
    (tmp_path / "diverged.py").write_text(
        "def extractor():\n    return lambda images: images.float().mean((2, 3)).expand(-1, 3) * float('nan')\n"
    )
    command = ["-m", "eval.fid", str(small_reference), "--extractor", "import:diverged:extractor",
               "--reference", str(small_reference), "--device", "cpu"]  # fmt: skip
    ended = run(*command, folder=tmp_path)
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.poll() == 2 and last.startswith("error: ") and "NaN" in last and "[0, 1, 2" in last


# --------------------------------------------------------------------------------------------------- statistics


class Coloured(FeatureExtractor):
    """Mean colours, and as spatial features the first two pixels."""

    name, num_features, num_spatial, fingerprint = "coloured", 3, 6, "0123"

    def forward(self, images):
        return images.float().mean((2, 3))

    def with_spatial(self, images):
        return self(images), images[:, :, 0, :2].float().flatten(1)


def colours(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)


def save_images(path: Path, images: torch.Tensor, **more: np.ndarray) -> str:
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **more)
    return str(path)


def test_statistics_stand_for_the_images_they_are_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("test_fid.Coloured", Coloured, raising=False)
    extractor = "import:test_fid:Coloured"
    real, drawn = colours(300, 0), colours(200, 1)
    images, samples = save_images(tmp_path / "real.npz", real), save_images(tmp_path / "samples.npz", drawn)
    statistics = tmp_path / "out" / "statistics.npz"
    fid.main(
        [
            "--reference",
            images,
            "--extractor",
            extractor,
            "--save-statistics",
            str(statistics),
            "--device",
            "cpu",
        ]
    )
    assert capsys.readouterr().out.count("\n") == 1
    with np.load(statistics) as file:
        assert set(file.files) == {
            "mu",
            "sigma",
            "mu_s",
            "sigma_s",
            "n",
            "extractor",
            "weights",
            "resize",
            "source",
            "dataset_hash",
        }
        features = real.double().mean((2, 3)).numpy()
        np.testing.assert_allclose(file["mu"], features.mean(0), rtol=1e-6)
        np.testing.assert_allclose(file["sigma"], np.cov(features.T), rtol=1e-5, atol=1e-3)
        assert (int(file["n"]), str(file["extractor"]), str(file["source"])) == (300, "coloured", images)

    def score(reference: str) -> dict[str, float]:
        return (
            fid.evaluate([samples], extractor=extractor, reference=reference, progress=False)
            .columns[0]
            .scores
        )

    of_images, of_statistics = score(images), score(str(statistics))
    for key in ("fd", "sfd"):
        assert of_statistics[key] == pytest.approx(of_images[key], rel=1e-9)
    assert "precision" in of_images and not {"precision", "kid_x1000", "nearest_neighbour"} & set(
        of_statistics
    )
    a, b = (extract(Coloured(), part) for part in (drawn, real))
    assert of_images["sfd"] == pytest.approx(frechet_distance(a.spatial, b.spatial), rel=1e-9)

    known = dict(np.load(statistics))
    others = colours(40, 2)  # ADM's reference: statistics of all, and some images
    both = save_images(
        tmp_path / "adm.npz", others, **{key: known[key] for key in ("mu", "sigma", "mu_s", "sigma_s")}
    )
    adm = fid.evaluate([samples], extractor=extractor, reference=both, progress=False)
    assert adm.columns[0].scores["fd"] == pytest.approx(of_images["fd"], rel=1e-9)
    assert adm.columns[0].scores["precision"] == score(save_images(tmp_path / "o.npz", others))["precision"]
    assert adm.reference["images"] == "not stated" and "does not state" in adm.reference["made with"]
    assert [column.name for column in adm.columns] == ["samples", "real held-out", "real half", "noise"]

    def damaged(name: str, **changed: np.ndarray) -> str:
        np.savez(tmp_path / name, **(known | changed))
        return str(tmp_path / name)

    cases = {
        damaged("extractor.npz", extractor=np.array("digits-v1")): "statistics of extractor digits-v1",
        damaged("weights.npz", weights=np.array("4567")): "statistics of weights 4567",
        damaged("resize.npz", resize=np.array("antialiased")): "statistics of resize antialiased",
        damaged("size.npz", mu=np.zeros(4), sigma=np.eye(4)): "4 features.*gives 3",
        damaged("spatial.npz", mu_s=np.zeros(4), sigma_s=np.eye(4)): "4 spatial features.*gives 6",
        damaged("nan.npz", mu=np.full(3, np.nan)): "NaN",
        damaged("shape.npz", sigma=np.eye(4)): r"\(4, 4\)",
        damaged("crooked.npz", sigma=np.triu(np.ones((3, 3)))): "no covariance",
        damaged("negative.npz", sigma=-np.eye(3)): "no covariance",
    }
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    cases[str(tmp_path / "half.npz")] = "no sigma"
    for path, reason in cases.items():
        with pytest.raises(UserError, match=reason) as caught:
            score(path)
        assert Path(path).name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no images to make statistics of"):
        fid.evaluate(
            [], extractor=extractor, reference=str(statistics), save_statistics=tmp_path / "again.npz"
        )


def test_moments_do_not_depend_on_how_they_came():
    x = (
        torch.randn(500, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        * torch.arange(1, 8)
        + 30
    )
    at_once, bit_by_bit = Moments.of(x), Moments(7)
    for part in x.split(37):
        bit_by_bit.add(part)
    torch.testing.assert_close(bit_by_bit.covariance, torch.cov(x.T), rtol=1e-10, atol=1e-10)
    for count in (500, None):
        known = Moments.known(at_once.mean, at_once.covariance, count)
        torch.testing.assert_close(known.mean, x.mean(0))
        assert known.frechet_distance(bit_by_bit) < 1e-9
        assert known.frechet_distance(Moments.of(2 * x)) == pytest.approx(
            frechet_distance(x, 2 * x), rel=1e-9
        )
    with pytest.raises(UserError, match="at least 2"):
        at_once.frechet_distance(Moments.of(x[:1]))
    with pytest.raises(UserError, match="7 and 3 values"):
        at_once.frechet_distance(Moments.of(x[:, :3]))


# --------------------------------------------------------------------------------------------------- any number of processes


@pytest.fixture(scope="module")
def scored_alone(export, quick, tmp_path_factory) -> tuple[dict, np.ndarray]:
    """300 samples against 300 images, two blocks each, scored by one process; the table and the images."""
    folder = tmp_path_factory.mktemp("alone")
    fid.main([str(export), "--num", "300", "--steps", "1", "--json", str(folder / "fid.json"), "--save-npz", str(folder),
              "--device", "cpu", "--reference", quick["reference"], "--extractor", "digits"])  # fmt: skip
    return json.loads((folder / "fid.json").read_text()), np.load(folder / "untrained_g=1.npz")["arr_0"]


def numbers(table: dict) -> dict[str, dict[str, float]]:
    return {
        column["name"]: {k: v for k, v in column["scores"].items() if k != "images_per_second"}
        for column in table["columns"]
    }


def test_two_processes_make_the_numbers_of_one(export, quick, scored_alone, tmp_path):
    command = ["-m", "eval.fid", str(export), "--samples", "300", "--steps", "1", "--json", str(tmp_path / "fid.json"),
               "--save-npz", str(tmp_path), "--device", "cpu", "--reference", quick["reference"],
               "--extractor", "digits"]  # fmt: skip
    texts = [ended.stdout for ended in run_together(*command)]
    assert [text.count("FD-digits-v1, share") for text in texts] == [1, 0]  # one table
    table, (alone, images) = json.loads((tmp_path / "fid.json").read_text()), scored_alone
    assert numbers(table) == numbers(alone)  # to the last bit
    assert np.array_equal(np.load(tmp_path / "untrained_g=1.npz")["arr_0"], images)
    assert (table["environment"]["processes"], alone["environment"]["processes"]) == (2, 1)
    assert (
        table["reference"] == alone["reference"]
        and table["columns"][0]["tags"] == alone["columns"][0]["tags"]
    )


def test_an_error_in_one_process_ends_all(tmp_path):
    program = (
        "from ldm_dcn.processes import joined_processes\n"
        "from ldm_dcn.errors import UserError\n"
        "def make(block):\n"
        "    if block == 5: raise UserError('block 5 is broken')\n"
        "    return block\n"
        "with joined_processes() as processes:\n"
        "    made = list(processes.in_order(lambda block: -block, 5))\n"
        "    assert made == ([0, -1, -2, -3, -4] if processes.is_first else [])\n"
        "    try: list(processes.in_order(make, 9))\n"
        "    except UserError as error: open(f'{processes.rank}.txt', 'w').write(str(error))\n"
        "    def fail():\n"
        "        if not processes.is_first: raise OSError(28, 'No space left')\n"
        "    try: processes.together(fail)\n"
        "    except OSError as error: assert error.errno == 28\n"
        "    else: raise AssertionError\n"
    )
    (tmp_path / "program.py").write_text(program)
    run_together("program.py", folder=tmp_path)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["block 5 is broken"] * 2


def test_batches_do_not_change_the_numbers(export, quick, scored_alone):
    alone, _ = scored_alone
    again = fid.evaluate([str(export)], num=300, steps=1, batch_size=70, progress=False, **quick)
    assert again.columns[0].scores["fd"] == pytest.approx(numbers(alone)["untrained g=1"]["fd"], rel=1e-6)
    for column in again.columns[1:]:  # what is read, not drawn, is the same to the last bit
        assert column.scores == pytest.approx(numbers(alone)[column.name], rel=1e-12)


def test_a_set_too_large_to_keep_is_scored_by_an_even_choice(monkeypatch):
    monkeypatch.setattr(measurement, "MOST_KEPT", 100)
    source = sources.NoiseSource(700, (1, 4, 4))
    measured = measurement.measure(source, load_extractor("digits"))
    assert measured.count == measured.moments.count == 700 and len(measured.features) == 100


def test_of_classes_in_turn_all_are_kept(monkeypatch, digits):
    """As `sample.py --count` writes them: every second image is one of half the classes alone."""
    monkeypatch.setattr(measurement, "MOST_KEPT", 200)
    images, labels = digits
    order = torch.stack([(labels == digit).nonzero().flatten()[:40] for digit in range(10)], 1).flatten()

    class InTurn(sources.NoiseSource):
        def read(self, start: int, stop: int, batch_size: int) -> torch.Tensor:
            return images[order[start:stop]]

    source = InTurn(400, (1, 32, 32))
    source.labels = labels[order]
    measured = measurement.measure(source, load_extractor("digits"))
    assert len(measured.features) == 200 and measured.labels.bincount(minlength=10).min() > 10
    known = extract(load_extractor("digits"), images[order])
    kept = measurement._chosen(400)
    assert torch.equal(measured.labels, labels[order][kept])
    torch.testing.assert_close(measured.features.values, known.values[kept])


# --------------------------------------------------------------------------------------------------- before anything is drawn


@pytest.mark.parametrize("option", ["--json", "--save-statistics", "--save-npz"])
def test_a_place_that_cannot_be_written_is_seen_before_anything_is_drawn(
    export, tmp_path, capsys, monkeypatch, option
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(fid, "evaluate", lambda *_, **__: pytest.fail("something was drawn"))
    with pytest.raises(SystemExit) as ended:
        fid.main([str(export), option, str(tmp_path / "file" / "scores.npz")])
    text = capsys.readouterr().err
    assert (
        ended.value.code == 2 and f"choose another place with {option}" in text and "file/scores.npz" in text
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"save_npz": Path("kept")},
            r"kept/untrained_g=1\.npz is a folder; choose another folder with --save-npz",
        ),
        ({"guidance_rescale": 7.0}, "guidance rescale 7.0: give a share"),
        ({"sampler": "plms"}, "sampler 'plms' is unknown"),
        ({"steps": 1001}, "1001 sampling steps were asked for; use 1 to 1000"),
    ],
)
def test_what_cannot_be_drawn_or_kept_is_seen_before_the_reference_is_read(
    export, tmp_path, monkeypatch, settings, said
):
    monkeypatch.chdir(tmp_path)
    Path("kept", "untrained_g=1.npz").mkdir(parents=True)
    monkeypatch.setattr(fid, "measure", lambda *_, **__: pytest.fail("something was measured"))
    with pytest.raises(UserError, match=said):
        fid.evaluate([str(export)], num=20, progress=False, **settings)


def test_statistics_are_kept_where_they_are_read_again(tmp_path, monkeypatch):
    """`--reference ref` would be a folder; and what is there stays where writing fails."""
    with pytest.raises(UserError, match=r"does not end in \.npz, .*; give .*ref\.npz$"):
        fid.evaluate([], save_statistics=tmp_path / "ref", progress=False)
    file = tmp_path / "ref.npz"
    file.write_text("precious")

    def fail(file, **_):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="No space"):
        fid.evaluate([], save_statistics=file, progress=False)
    assert file.read_text() == "precious" and list(tmp_path.iterdir()) == [file]
