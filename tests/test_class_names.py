"""What training data calls its classes: kept in the export, and taken by `sample.py --labels` beside numbers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

import sample
from eval.report.grids import _named
from ldm_dcn import LatentDiffusion, encode, export
from ldm_dcn.errors import UserError
from ldm_dcn.export import load_model
from ldm_dcn.model import Model
from ldm_dcn.opening import open_run
from ldm_dcn.sampling import check_labels
from ldm_dcn.trainer import train
from tiny import tiny_config

NAMES = ("brown bear", "fox", "polar bear")


pytestmark = pytest.mark.usefixtures("one_thread_and_a_fresh_accelerator")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a class."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in NAMES:
        (folder / name).mkdir()
        for number in range(2):
            Image.new("L", (8, 8), 40 * number).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained from a cache of them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("run")
    options = ["--autoencoder", "identity", "--image-size", "8", "--image-channels", "1", "--device", "cpu"]
    assert encode.main([str(pictures), str(folder / "cache"), *options]) == 0
    config = tiny_config(folder, f"data.source={folder / 'cache'}", "data.flip=false", "train.steps=1")
    assert train(config) == 0
    return config.folder


@pytest.fixture(scope="module")
def model(run: Path) -> Model:
    return load_model(run)


def test_an_export_keeps_them_as_diffusers_does(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawing = LatentDiffusion.from_pretrained(run)
    assert drawing.class_names == NAMES
    by_name, by_number = (
        [image.tobytes() for image in drawing(labels=labels, steps=1)] for labels in ([NAMES[1], 0], [1, 0])
    )
    assert by_name == by_number != [image.tobytes() for image in drawing(labels=NAMES[0], steps=1)] * 2
    with pytest.raises(UserError, match="label 'nothing' is no number, no range and no name"):
        drawing(labels=["nothing"])
    index = json.loads((run / "export" / "model_index.json").read_text())
    assert index["id2label"] == {"0": NAMES[0], "1": NAMES[1], "2": NAMES[2]}  # as of DiTPipeline
    source = f"data.source={pictures}"
    for wanted, expected in (("null", NAMES), ("5", NAMES), ("0", ())):
        config = tiny_config(tmp_path, source, f"data.num_classes={wanted}", f"run.name=of-{wanted}")
        with open_run(config) as opened:
            assert opened.averaged_model().class_names == expected
        warned = "data.num_classes=5, and" in capsys.readouterr().err
        assert warned == (wanted == "5")


def test_sample_takes_names_and_numbers(run: Path, tmp_path: Path) -> None:
    command = [str(run), "--seeds", "0", "--steps", "1", "--png-dir"]
    assert sample.main([*command, str(tmp_path / "a"), "--labels", "polar bear", "fox, 0-1"]) == 0
    drawn = sorted(path.name for path in (tmp_path / "a").glob("*.png"))
    assert drawn == [f"{i:06d}_label{label}_seed0.png" for i, label in enumerate((2, 1, 0, 1))]
    assert sample.main([*command, str(tmp_path / "a"), "--labels", "2", "1", "0", "1"]) == 0  # the same
    with pytest.raises(UserError, match=r"label 'Bear' is .* no name of a class of tiny; did you mean"):
        sample.main([*command, str(tmp_path / "b"), "--labels", "Bear"])
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fix", "'fix' is no number, no range and no name of a class of tiny; did you mean 'fox'?"),
        ("FOX", "did you mean 'fox'?"),
        ("bear", "did you mean 'brown bear' or 'polar bear'?"),
        ("xyz", "names are such as 'brown bear', 'fox', 'polar bear'"),
        ("", "names are such as"),
        ("-1", "label '-1' is no number, no range"),
    ],
)
def test_an_unknown_name_is_an_error_with_those_like_it(model: Model, name: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        sample._by_number([name], model)
    assert expected in str(caught.value)


def test_exports_from_before_there_were_names_go_on_working(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(run / "export", old)
    (old / "manifest.json").unlink()
    index = json.loads((old / "model_index.json").read_text())

    def written(**changes: object) -> Path:
        (old / "model_index.json").write_text(json.dumps({**index, **changes}))
        return old

    for wrong in (["fox"], {"0": 3}, {"1": "fox"}, {str(i): "fox" for i in range(4)}):
        told = "names of 4 classes and is of 3" if len(wrong) == 4 else "model_index.json has id2label"
        with pytest.raises(UserError, match=rf"not a whole export: .*{told}"):
            load_model(written(id2label=wrong))
    many = {str(number): f"class {number}" for number in range(12)}
    assert export._read_class_names({"id2label": dict(sorted(many.items()))}) == tuple(many.values())
    del index["id2label"]
    nameless = load_model(written())
    assert nameless.class_names == () and sample._by_number(["0-2"], nameless) == ["0-2"]
    with pytest.raises(UserError, match=r"label 'fox' is no number and no range, and tiny knows no names"):
        sample._by_number(["fox"], nameless)


def test_a_number_is_never_taken_for_a_name(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders are sorted as texts: 10 comes before 2. What is drawn is said."""
    folders = replace(model, class_names=("1", "10", "2"))
    for texts, told in ((["2"], ""), (["0-2"], ""), (["2,1"], "label 1 is the class of that number, which is called '10'; the class called '1' has number 0")):  # fmt: skip
        assert ",".join(sample._by_number(texts, folders)) == texts[0]
        sample._warn_of_numbers(texts, sample._numbers(texts, "label"), folders)
        assert capsys.readouterr().err == (f"warning: {told}\n" if told else "")
    with pytest.raises(UserError, match="3 classes, 0 to 2; the class called 10 has number 1"):
        check_labels(folders, [10])
    listed = replace(model, class_names=("0", "0-1", "a, b"))
    assert sample._by_number(["0-1", "a, b"], listed) == ["0-1", "2"]
    same = replace(model, class_names=("crane", "fox", "crane"))
    with pytest.raises(
        UserError, match=r"'crane' is the name of 2 classes of tiny; give the number, one of 0, 2"
    ):
        sample._by_number(["crane"], same)


def test_a_reports_grid_names_its_rows() -> None:
    digits = SimpleNamespace(class_names=tuple("0123456789"))
    assert _named([0, 1, 2, 3], digits) == "0 to 3"
    assert _named([2, 5], SimpleNamespace(class_names=NAMES)) == "2 polar bear, 5"
