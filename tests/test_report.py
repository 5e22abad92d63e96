"""The report: one page that needs nothing else, whose numbers have tags, and offset maps that show what the layers did."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor

from dcnv4_ext import DCNv4
from eval import fid, offsets, operators, stopwatch, stored_models, throughput
from eval.report import plots, tags
from eval.report.__main__ import main
from eval.report.inputs import Throughput, command_of, read_file
from eval.report.markup import joined, tag
from ldm_dcn.export import load_model
from ldm_dcn.sampling import generate
from ldm_dcn.trainer import train
from tiny import ROOT, WHOLE, setting, tiny_config

SWAP = "model.swap={sites: [resnet, self_attention, resample], group_channels: 4}"
DRAW = ["--labels", "3", "1", "--seeds", "7", "8", "9", "--steps", "3", "--moments", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Two trained runs: with DCNv4 at every kind of site, and without."""
    folder = tmp_path_factory.mktemp("runs")
    found = []
    validated = ("data.split=train", "train.validate_every=2", "train.validation_images=8")
    network = setting("model.unet", WHOLE)
    for name, overrides in (("dcn", (network, SWAP, "train.lr=1e-2", *validated)), ("unet", (network,))):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = tiny_config(
            folder, f"run.name={name}", "train.steps=4", "train.log_every=2", "train.save_every=0", *overrides
        )
        assert train(config) == 0
        found.append(config.folder)
    lines = [json.dumps({"step": step, "fd_digits-v1": 9.0 / step, **FD_TAGS}) for step in (2, 4)]
    with (found[0] / "metrics.jsonl").open("a") as file:
        file.write("\n".join(lines) + "\n")
    return tuple(found)


ALIVE: list[int] = []  # when a network was loaded for the report: how many of those before were still there

FD_TAGS = {"N": 64, "guidance": 1.5, "sampler": "euler", "sampler_steps": 6, "weights": "EMA 0.99", "extractor_weights": "beef",
           "reference": "digits", "seed": 5}  # fmt: skip
MADE_WITH = {"command": "fid.py runs/dcn --steps 7", "cpu": "a processor", "threads": 1}


def scores_file(path: Path, **changes) -> Path:
    drawn = {"N": 123, "guidance": 1.25, "guidance_interval": [0.0, 0.75], "sampler": "dpm++", "sampler_steps": 17, "seed": 40,
             "uint8": "round(127.5 x + 127.5)", "run": "dcn", "weights": "EMA 0.97"}  # fmt: skip
    columns = [
        fid.Column("dcn g=1.25", {"fd": 0.4321, "kid_x1000": 3.21, "images_per_second": 88.0}, drawn),
        fid.Column("real half", {"fd": 0.1}, {"N": 900, "reference": "the other 897"}),
        fid.Column("unknown", {"fd": 0.987654321}, {}),
    ]
    for column in columns[:2]:
        column.tags["warning"] = "fewer images than features"
    extractor = {
        "name": "digits-v1",
        "weights": "cafe0123",
        "resize": "area to 32x32",
        "warning": "it learned from others",
    }
    reference = {"source": "digits", "images": 1797}
    table = {"metric": "FD-digits-v1", "names": {}, "columns": columns, "reference": reference, "extractor": extractor,
             "environment": MADE_WITH, **changes}  # fmt: skip
    fid.write_json(fid.Table(**table), path)
    return path


def throughput_file(path: Path) -> Path:
    settings = throughput.Settings(4, "fp32", "cpu", 2, "dpm++", 5, 1.5)
    timings = {"forward": throughput.Timing(seconds=[0.2, 0.4]), "training": throughput.Timing(seconds=[1.0])}
    throughput.write_json(
        [throughput.Figures("dcn", 12345, 678_000_000, 10, 20, None, timings)], settings, path
    )
    return path


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory) -> Path:
    """The whole command, with a file of each kind."""
    folder = tmp_path_factory.mktemp("report")
    profiled, raced = folder / "profile.json", folder / "operators.json"
    threads = torch.get_num_threads()
    loaded, load = [], stored_models.load_denoiser

    def watched(*arguments: Any) -> torch.nn.Module:
        ALIVE.append(sum(network() is not None for network in loaded))
        network = load(*arguments)
        loaded.append(weakref.ref(network))
        return network

    throughput.main([str(runs[0]), "--profile", "--rounds", "1", "--batch-size", "2", "--device", "cpu", "--json", str(profiled)])  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopwatch, "CPU_TURN", 0.0)  # single calls: nobody looks at the times
        operators.main(["--device", "cpu", "--rows", "1x4x4x32", "--dtype", "float32", "--sigma", "2", "--level", "op", "--peers",
                        "dcnv4", "grid_sample", "--seconds", "0.01", "--rounds", "2", "--json", str(raced)])  # fmt: skip
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_models, "load_denoiser", watched)
        main([*map(str, runs), *DRAW, "--scores", str(scores_file(folder / "fid.json")), "--throughput",
              str(throughput_file(folder / "speed.json")), str(profiled), "--operators", str(raced), "--out", str(folder / "out")])  # fmt: skip
    return folder / "out"


def parsed(page: Path) -> ElementTree.Element:
    """The page as XML, which is stricter than HTML."""
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(text.partition("\n")[2])


def words(element: ElementTree.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def test_networks_are_loaded_one_after_the_other(report) -> None:
    assert ALIVE == [0, 0]


def test_the_page_is_whole_and_needs_nothing_else(report) -> None:
    root = parsed(report / "index.html")
    text = (report / "index.html").read_text(encoding="utf-8")
    assert "http" not in text and "<script" not in text and "@import" not in text and "url(" not in text
    links = [
        value for element in root.iter() for key, value in element.attrib.items() if key in ("href", "src")
    ]
    assert len(links) > 10 and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    anchors = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(set(anchors)) == len(anchors)
    assert all(link[1:] in anchors for link in links if link.startswith("#"))
    assert "dcn, held out" in text and "unet, held out" not in text


def test_every_section_says_what_it_shows_and_how_it_was_made(report) -> None:
    root = parsed(report / "index.html")
    headings = [words(heading) for heading in root.iter("h2")]
    assert headings == ["Runs, parameters and MACs", "Samples", "Where DCNv4 looks", "Training", "Scores",
                        "Quality against speed", "Speed and size", "The operator beside its peers"]  # fmt: skip
    figures = list(root.iter("figure"))
    assert len(figures) >= 10
    for figure in figures:
        assert "Made with" in words(figure.find("figcaption"))
    everything = words(root)
    for name in (
        "dcn",
        "unet",
        "python -m eval.fid runs/dcn --steps 7",
        "DCNv4's projections",
        "grid_sample",
        "12,345",
    ):
        assert name in everything
    (drawn,) = {words(f.find("figcaption/code")) for f in figures if "python -m eval.report" in words(f)}
    assert "--seeds 7 8 9" in drawn and "--scores" not in drawn and "--operators" not in drawn


def test_scores_stand_beside_their_eight_tags(report) -> None:
    rows = {}
    for row in parsed(report / "index.html").iter("tr"):
        cells = [words(cell) for cell in row]
        rows.setdefault(cells[0], []).append(cells[1:])
    assert len(tags.TAGS) == 8 and rows["tags of"] == [list(tags.TAGS)]
    assert rows["dcn g=1.25"][0][:2] == ["0.4321", "3.21"]
    assert rows["dcn g=1.25"][1] == ["digits-v1 cafe0123", "area to 32x32, round(127.5 x + 127.5)", "123", "digits, 1797 images",
                                     "1.25, at 0 to 0.75 of the times", "dpm++, 17 steps", "EMA 0.97", "40"]  # fmt: skip
    assert rows["real half"][1] == [
        "digits-v1 cafe0123",
        "area to 32x32",
        "900",
        "the other 897",
        "–",
        "–",
        "–",
        "–",
    ]
    warned = [words(p) for p in parsed(report / "index.html").iter("p") if words(p).startswith("Warning")]
    assert warned == [
        "Warning: extractor digits-v1: it learned from others",
        "Warning: dcn g=1.25, real half: fewer images than features",
    ]
    # a number without tags is none
    assert rows["unknown"][0] == ["not measured"] * 3 and rows["unknown"][1] == ["not stated"] * 8
    assert "0.98765" not in (report / "index.html").read_text()
    # on the way
    assert [
        "2.25",
        "digits-v1 beef",
        "not stated",
        "64",
        "digits",
        "1.5",
        "euler, 6 steps",
        "EMA 0.99",
        "5",
    ] in rows["dcn"]


@pytest.mark.parametrize(
    ("own", "guidance", "sampler"),
    [
        ({}, "1.5", "dpm++, 20 steps"),
        ({"precision": "fp32", "guidance_interval": [0.0, 1.0]}, "1.5", "dpm++, 20 steps"),
        ({"precision": "bf16", "guidance_rescale": 0.7}, "1.5, rescaled by 0.7", "dpm++, 20 steps, bf16"),
        (
            {"guidance_interval": [0.2, 1.0], "guidance_rescale": 0.7},
            "1.5, at 0.2 to 1 of the times, rescaled by 0.7",
            "dpm++, 20 steps",
        ),
    ],
)
def test_tags_tell_what_is_not_usual(own, guidance, sampler) -> None:
    """Files from before there was a choice state neither."""
    column = {"tags": {"guidance": 1.5, "sampler": "dpm++", "sampler_steps": 20, **own}}
    found = tags.tags_of_column({}, column)
    assert (found["guidance"], found["sampler and steps"]) == (guidance, sampler)


def test_pictures_lie_beside_the_page_and_are_those_in_it(report, runs) -> None:
    assert sorted(file.name for file in report.glob("*.png")) == [
        "offsets_dcn.png",
        "samples_dcn.png",
        "samples_unet.png",
    ]
    with Image.open(report / "samples_dcn.png") as grid:
        assert grid.size == (3 * 64, 2 * 64)  # seeds across, labels down, 8 pixels enlarged to 64
        cell = torch.from_numpy(np.asarray(grid.resize((24, 16), Image.Resampling.NEAREST)).copy())
    image = generate(load_model(runs[0]), [1], [9], steps=3, guidance=1.5)[0, 0]
    assert torch.equal(cell[8:, 16:], image)
    # each x_0 estimate is in the page once, and used by every map of its step
    root = parsed(report / "index.html")
    estimates = [element.attrib["id"] for element in root.iter("image")]
    assert estimates == ["x0-dcn-1", "x0-dcn-3"]
    uses = [element.attrib["href"] for element in root.iter("use")]
    assert len(uses) >= 2 * 3 and set(uses) == {"#x0-dcn-1", "#x0-dcn-3"}


def test_pictures_of_an_earlier_report_are_not_counted(tmp_path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples_earlier.png").write_bytes(b"")
    study = ROOT / "benchmarks" / "results" / "digits_study.json"
    main(["--study", str(study), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.endswith("MB, open it in a browser\n")


def exported_column(step: int, weights: str, fd: float, **tags) -> fid.Column:
    """As eval.fid scores the exports of one run."""
    drawn = {"N": 50, "guidance": 1.0, "guidance_interval": [0, 1], "sampler": "dpm++", "sampler_steps": 9, "seed": 0, "run": "dcn",
             "step": step, "weights": weights}  # fmt: skip
    return fid.Column(f"dcn step {step} g=1", {"fd": fd, "images_per_second": 10.0 + fd}, drawn | tags)


def chart_of(page: Path, title: str) -> tuple[list[str], list[list[str]]]:
    """The legend of a chart, and the points of its lines."""
    for figure in parsed(page).iter("figure"):
        for svg in figure.iter("svg"):
            if svg.attrib.get("aria-label") == title:
                (legend,) = (div for div in figure.iter("div") if div.attrib.get("class") == "legend")
                lines = [line.attrib["points"].split() for line in svg.iter("polyline")]
                return [words(span) for span in legend][1:], lines
    raise AssertionError(f"no chart {title}")


def test_exports_of_one_run_are_told_apart(tmp_path) -> None:
    narrow = [exported_column(step, "EMA 0.05", fd) for step, fd in ((300, 1.0), (100, 3.0), (200, 2.0))]
    wide = [exported_column(step, "EMA 0.1", fd) for step, fd in ((200, 2.5), (300, 0.5))]
    other = [
        exported_column(300, "EMA 0.05", 1.5, guidance=2.0),
        exported_column(300, "EMA 0.05", 9.0, run="unet"),
    ]
    files = [
        scores_file(tmp_path / "a.json", columns=narrow),
        scores_file(tmp_path / "b.json", columns=[*wide, *other]),
    ]
    main(["--study", str(ROOT / "benchmarks" / "results" / "digits_study.json"), "--scores", *map(str, files),
          "--out", str(tmp_path / "out")])  # fmt: skip
    page = tmp_path / "out" / "index.html"
    legend, lines = chart_of(page, "FD-digits-v1 of exports over training steps")
    drawn = "guidance 1, dpm++, 9 steps"
    assert legend == [f"dcn, weights EMA 0.05, {drawn}", f"dcn, weights EMA 0.1, {drawn}"]
    assert [len(points) for points in lines] == [3, 2]
    across = [float(point.split(",")[0]) for point in lines[0]]
    assert across == sorted(across)
    legend, lines = chart_of(page, "FD-digits-v1 against speed")
    assert len(lines) == len(legend) == 7  # nothing that is no series is joined by a line
    assert (
        "dcn, step 300, weights EMA 0.1, guidance 1, dpm++" in legend and "unet, guidance 1, dpm++" in legend
    )


def test_what_eval_fid_kept_in_the_run_folder_is_found(runs, tmp_path) -> None:
    for name, run in zip(("dcn", "unet"), runs, strict=True):
        shutil.copytree(run, tmp_path / name)
    folder = tmp_path / "dcn"
    scores_file(folder / "fid-digits-v1-1797.json")
    scores_file(folder / "fid.json", metric="FID")
    shutil.copy(folder / "fid.json", tmp_path / "unet" / "fid.json")  # as of a table of both
    given = scores_file(tmp_path / "given.json", metric="FD-given")
    paths = [str(folder), str(tmp_path / "unet")]
    main([*paths, *DRAW, "--out", str(tmp_path / "found")])
    text = words(parsed(tmp_path / "found" / "index.html"))
    assert "FD-digits-v1 (fid-digits-v1-1797.json)" in text and text.count("FID (fid.json)") == 1
    assert "Scores: not measured" not in text and "Scores of unet: not measured" in text
    main([*paths, *DRAW, "--scores", str(given), "--out", str(tmp_path / "asked")])
    text = words(parsed(tmp_path / "asked" / "index.html"))
    assert "FD-given (given.json)" in text and "FD-digits-v1 (" not in text


def test_what_was_not_measured_is_called_so(runs, tmp_path, capsys) -> None:
    shutil.copytree(runs[1] / "export", tmp_path / "export")
    main([str(tmp_path / "export"), *DRAW, "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.endswith("open it in a browser; 1 PNG file beside it\n")
    text = words(parsed(tmp_path / "out" / "index.html"))
    for what in ("Loss of unet", "Fréchet distance of unet on the way", "Scores", "Quality against speed", "Throughput",
                 "The profile by kind of module", "The operator beside its peers"):  # fmt: skip
        assert f"{what}: not measured." in text
    assert "unet has no DCNv4 layer" in text
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["index.html", "samples_unet.png"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{folder}"], "neither a run folder"),
        (["{folder}/nothing/here"], "does not exist"),
        (["{run}", "--scores", "{speed}"], "no file of eval.fid"),
        (["{run}", "--throughput", "{scores}"], "no file of eval.throughput"),
        (["{run}", "--operators", "{speed}"], "no file of eval.operators"),
        (["{run}", "--scores", "{run}/config.yaml"], "is no JSON"),
        (["{run}", "--scores", "{folder}/none.json"], "does not exist"),
        (["{run}", "{run}"], "twice"),
        (["{run}", "--out", "{speed}"], "is a file"),
        (["{run}", "--labels", "1", "11"], "label 11"),
        (["{run}", "--seeds", "-1"], "seed -1"),
        (["{run}", "--positions", "1,0"], "ACROSS,DOWN"),
        (["{run}", "--layers", "("], "regular expression"),
        (["{run}", "--layers", "nowhere"], "matches none"),
        (["{run}", "--sampler", "magic"], "sampler"),
        (["{run}", "--guidance", "nan"], "guidance"),
        ([], "give a run folder, or --study JSON"),
    ],
)
def test_mistakes_are_one_line_and_code_2(runs, tmp_path, capsys, arguments, named) -> None:
    places = {"folder": tmp_path, "run": runs[0], "speed": throughput_file(tmp_path / "speed.json"),
              "scores": scores_file(tmp_path / "fid.json")}  # fmt: skip
    with pytest.raises(SystemExit) as left:
        main([*(text.format(**places) for text in arguments), "--out", str(tmp_path / "out"), "--steps", "1"]
             if "--out" not in arguments else [text.format(**places) for text in arguments])  # fmt: skip
    error = capsys.readouterr().err
    assert left.value.code == 2 and named in error and error.startswith("error: ") and error.count("\n") == 1


# ---- offsets


def bilinear(value: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(H, W, D) at (x, y): four corners, zero outside."""
    h, w, _ = value.shape
    total = value.new_zeros(value.shape[-1])
    for i in (x.floor(), x.floor() + 1):
        for j in (y.floor(), y.floor() + 1):
            if 0 <= i < w and 0 <= j < h:
                total = total + (1 - (x - i).abs()) * (1 - (y - j).abs()) * value[int(j), int(i)]
    return total


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2), "offset_scale": 0.7},
        {"dilation": 2, "padding": 2, "remove_center": True, "softmax": True},
    ],
)
def test_the_points_are_those_that_the_operator_used(options) -> None:
    torch.manual_seed(0)
    module = DCNv4(6, groups=2, without_pointwise=True, **options)
    with torch.no_grad():
        module.offset_mask.weight.normal_(0, 0.4)
        module.offset_mask.bias.normal_()
    x = torch.randn(2, 5, 4, 6)
    seen = {}
    module.offset_mask.register_forward_hook(lambda _, __, output: seen.update(mask=output))
    with torch.no_grad():
        output = module(x)
    points = offsets.sampling_points(module, seen["mask"], (5, 4))
    n, ho, wo, g, k = points.x.shape
    assert (n, ho, wo) == output.shape[:3] and (g, k) == (2, module.taps)
    for index in ((0, 0, 0, 0), (1, ho - 1, wo - 1, 1), (1, ho // 2, 0, 0)):
        image, row, column, group = index
        value = x[image, :, :, 3 * group : 3 * group + 3]
        summed = sum(
            points.weight[(*index, tap)] * bilinear(value, points.x[(*index, tap)], points.y[(*index, tap)])
            for tap in range(k)
        )
        torch.testing.assert_close(
            summed, output[image, row, column, 3 * group : 3 * group + 3], rtol=1e-4, atol=1e-5
        )


def shifted(module: DCNv4, dx: float, dy: float) -> None:
    """Every tap of every group by (dx, dy), whatever the input."""
    with torch.no_grad():
        module.offset_mask.weight.zero_()
        used = module.offset_mask.bias[: 3 * module.groups * module.taps].view(module.groups, -1)
        used[:, : 2 * module.taps] = torch.tensor([dx, dy]).repeat(module.taps)


def test_a_shift_of_all_taps_appears_as_such(runs) -> None:
    model = load_model(runs[0])
    layers = offsets.find_layers(model.unet)
    assert {layer.kind for layer in layers} == {"resnet", "self_attention", "resample"}
    assert [layer.name.split("_")[0] for layer in layers] == sorted(
        layer.name.split("_")[0] for layer in layers
    )
    settings = {"numbers": (1, 3), "positions": ((0.5, 0.5),), "steps": 3}
    looks = {}
    for dx in (0.0, 1.0):
        for layer in layers:
            shifted(layer.module, dx, 0.0)
        _, moments = offsets.watch(model, torch.tensor([4]), 11, **settings)
        assert [moment.number for moment in moments] == [1, 3]
        looks[dx] = moments[-1].looks
    assert set(looks[0.0]) == {layer.name for layer in layers}
    for name, moved in looks[1.0].items():
        still = looks[0.0][name]
        assert still.mean_length == 0 and moved.mean_length == pytest.approx(1)
        assert moved.weighted_length in (None, pytest.approx(1))
        torch.testing.assert_close(moved.spots[0].x, still.spots[0].x + 1)
        torch.testing.assert_close(moved.spots[0].y, still.spots[0].y)
        # unmoved, they are the taps of a 3x3 convolution around its centre, columns outside
        x, y = still.spots[0].center
        assert still.spots[0].x[0].tolist() == [x + i for i in (-1, 0, 1) for _ in range(3)]
        assert still.spots[0].y[0].tolist() == [y + j for _ in range(3) for j in (-1, 0, 1)]


@pytest.mark.parametrize("sampler", ["dpm++", "heun"])
def test_watching_changes_nothing_and_sees_the_image_come_about(runs, sampler: str) -> None:
    model, settings = load_model(runs[0]), {"steps": 3, "guidance": 2.0, "sampler": sampler}
    image, moments = offsets.watch(model, torch.tensor([4]), 11, numbers=(1, 2, 3), positions=(), **settings)
    assert [moment.number for moment in moments] == [1, 2, 3]
    assert torch.equal(image, generate(model, [4], [11], **settings)[0])
    assert torch.equal(moments[-1].estimate, image)  # the last step ends at the estimate of x_0
    assert [moment.time for moment in moments] == sorted((moment.time for moment in moments), reverse=True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (layer.module for layer in offsets.find_layers(model.unet)))  # fmt: skip


def test_the_conditional_half_is_what_is_looked_at() -> None:
    module = DCNv4(4, groups=1)
    with torch.no_grad():
        module.offset_mask.weight[:18].fill_(0.5)
    layer = offsets.Layer("layer", "resnet", module)
    null, condition = torch.zeros(1, 12, 4), torch.ones(1, 12, 4)
    with offsets.recorded([layer], 1, [(0.0, 0.99)]) as looks:
        module(torch.cat([null, condition]), shape=(3, 4))
    assert looks["layer"].mean_length == pytest.approx(2 * 2**0.5) and looks["layer"].size == (3, 4)
    assert looks["layer"].spots[0].center == (0, 2) and looks["layer"].weighted_length is None


def test_layers_and_steps_are_chosen_evenly() -> None:
    assert (
        offsets.evenly(20, 4) == [1, 7, 14, 20]
        and offsets.evenly(2, 4) == [1, 2]
        and offsets.evenly(9, 1) == [9]
    )
    module = DCNv4(4)
    layers = [offsets.Layer(f"{kind}.{i}", kind, module) for kind in "ab" for i in range(5)]
    assert [layer.name for layer in offsets.choose_layers(layers, 4)] == ["a.0", "a.4", "b.0", "b.4"]
    assert [layer.name for layer in offsets.choose_layers(layers, 1)] == ["a.4", "b.4"]


# ---- markup and charts


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "a < b & c", tag("br"), class_="x", data_name='"') == '<p class="x" data-name="&quot;">a &lt; b &amp; c<br /></p>'  # fmt: skip
    assert joined("<", None, tag("b", 1)) == "&lt;<b>1</b>"


def test_axes_hold_their_values_and_end_on_round_numbers() -> None:
    for values in (
        [0.3, 17.2],
        [1e-4, 3.0],
        [5.0, 5.0],
        [0.0],
        [-3.0, 8.0],
        [12345.0, 12346.0],
        [1.0, 9.0],
        [3e6, 1e3],
    ):
        axis = plots.axis(values)
        assert all(-1e-9 <= axis.share(value) <= 1 + 1e-9 for value in values), values
        assert 2 <= len(axis.ticks) <= 12
    assert plots.axis([1e-4, 3.0]).logarithmic and not plots.axis([1.0, 5.0]).logarithmic


def test_series_of_one_colour_differ_in_shape() -> None:
    """A study of ablations has more variants than there are colours."""
    looks = {(plots.colour(index), plots.variety(index)) for index in range(20)}
    assert len(looks) == 20
    chart = plots.lines(
        [plots.Series(str(i), [(0, i), (1, i + 1)]) for i in range(9)], x="x", y="y", title="t"
    )
    root = ElementTree.fromstring(f"<div>{chart}</div>")
    signs = [(line.attrib["stroke"], line.attrib.get("stroke-dasharray")) for line in root.iter("polyline")]
    keys = [
        (line.attrib["stroke"], line.attrib.get("stroke-dasharray")) for line in root.findall("div//line")
    ]
    assert len(set(signs)) == 9 and signs == keys


def test_values_and_names_beside_bars_fit_on_a_phone() -> None:
    """Where letters are 15 units high (page.py), two thirds as wide on the average."""
    rows = [("a row", {"a name that is longer than there is room": 97.99, "b": 1.0})]
    for reference in (None, 1.0):
        chart = plots.bars(rows, title="t", form=lambda v: f"{v:.2f}x", reference=reference)
        (svg,) = (s for s in ElementTree.fromstring(f"<div>{chart}</div>").iter("svg") if "role" in s.attrib)
        for text in svg.iter("text"):
            assert float(text.attrib["x"]) + 15 * 0.56 * len(text.text) <= plots.WIDTH, text.text


def test_smoothing_shifts_nothing() -> None:
    line = [(float(i), 2.0 * i) for i in range(50)]
    assert [x for x, _ in plots.smoothed(line, 7)] == [x for x, _ in line]
    assert [y for _, y in plots.smoothed(line, 7)] == pytest.approx([y for _, y in line])


def test_long_curves_are_thinned_and_short_ones_are_not() -> None:
    chart = plots.lines([plots.Series("a", [(i, i % 7) for i in range(5000)])], x="step", y="loss", title="t")
    assert len(re.search(r'points="([^"]+)"', chart)[1].split()) == plots.MOST_POINTS
    ElementTree.fromstring(f"<div>{chart}</div>")


def test_networks_of_one_name_are_told_apart(tmp_path) -> None:
    content = json.loads(throughput_file(tmp_path / "speed.json").read_text())
    content["figures"] *= 2
    (tmp_path / "speed.json").write_text(json.dumps(content))
    assert [f.name for f in read_file(tmp_path / "speed.json", Throughput).figures] == ["dcn", "dcn (2)"]


def test_commands_can_be_typed_again() -> None:
    assert command_of({"command": "throughput.py a --b"}) == "python -m eval.throughput a --b"
    assert command_of({"command": "other thing"}) == "other thing" and command_of({}) is None
