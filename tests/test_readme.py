"""What the README says is what the files say."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import statistics
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch

from eval import comparison
from eval.results import kernels_hash
from ldm_dcn.config import load_config, valid_keys
from tiny import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
EVIDENCE = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_json(readme: ModuleType) -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in readme.DOCUMENTS}
    for name in readme.TABLES:
        assert any(f"<!-- {name} -->" in text for text in texts.values()), name
    for path, text in texts.items():
        assert readme.with_tables(text) == text, f"{path.name}: run `python benchmarks/readme.py`"
    assert readme.with_tables(README.replace("| class accuracy | ", "| class accuracy | 9", 1)) == README


def test_results_say_what_made_them(readme: ModuleType) -> None:
    """Device, versions and command stand in every file of results; each is named in a text beside its command."""
    texts = "".join(path.read_text(encoding="utf-8") for path in TEXTS)
    for path in readme.RESULTS.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        made_with = content["environment"]
        assert (
            made_with["command"] and made_with["versions"]["torch"] and (made_with["gpu"] or made_with["cpu"])
        )
        assert path.name in texts, f"{path.name} is named in no text"


def test_the_report_is_of_all_results(readme: ModuleType) -> None:
    """`make report` leaves no file of results out."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nreport:")[2].partition("\n\n")[0]
    names = {path.name for path in readme.RESULTS.glob("*.json")}
    assert [name for name in sorted(names) if name not in recipe] == [
        "cache_reading.json",
        "cpu_scaling.json",
        "digits_dcn_loop.json",
        "digits_unet_loop.json",
        "full_size_cpu.json",
        "gpu.json",
        "networks_nvidia_h200.json",  # several of eval.throughput in one file
        "networks_nvidia_h200_last.json",
        "times.json",
    ]


def test_sentences_are_those_of_the_json(readme: ModuleType) -> None:
    """What the texts say of the study beside its tables."""
    content = json.loads((readme.RESULTS / "digits_study.json").read_text(encoding="utf-8"))
    text = " ".join(README.split())
    assert comparison.in_all(content) in text
    ablations = json.loads((readme.RESULTS / "ablations.json").read_text(encoding="utf-8"))
    assert comparison.in_all(ablations) in " ".join(EVIDENCE.split())
    seeds = len(content["study"]["seeds"])
    assert f"cannot be below {2 / math.comb(2 * seeds, seeds):.3f}" in text
    worse = {}
    for title, (first, *others) in content["study"]["comparisons"].items():
        for score in ("fd", "precision", "recall", "class_accuracy"):
            found = comparison.summaries(content["runs"], (first, *others), "1", score)
            for name in others:
                assert score != "fd" or (
                    found[name].difference > 0 and found[name].p >= comparison.SIGNIFICANT
                )
                if found[name].p < comparison.SIGNIFICANT and (found[name].difference < 0) != (score == "fd"):
                    worse.setdefault(score, set()).add((title, name))
    assert (
        "The U-Net's mean FD is lower in both comparisons, by less than four seeds can tell from chance"
        in text
    )
    assert {score: (len(where), {name for _, name in where}) for score, where in worse.items()} == {
        "precision": (4, {"dcn_convs", "dcn_full"}),
        "recall": (2, {"dcn_convs"}),
        "class_accuracy": (2, {"dcn_full"}),
    }
    said = "precision is worse with DCNv4 in all four, recall with DCNv4 in the convolutions alone, class accuracy with DCNv4 in both."
    assert said in text
    photographs = json.loads((readme.RESULTS / "photographs_compare.json").read_text(encoding="utf-8"))
    text = " ".join((ROOT / "docs" / "photographs.md").read_text(encoding="utf-8").split())
    columns = {column["name"]: column for column in photographs["columns"]}
    counts = f"{photographs['reference']['images']:,} crops to train on and {columns['held-out']['tags']['N']:,} held out"
    unet, dcn = (columns[f"photographs_{name} g=1"]["tags"] for name in ("unet", "dcn"))
    sizes = f"{unet['parameters'] / 1e6:.3f} M parameters for the U-Net and {dcn['parameters'] / 1e6:.3f} M with DCNv4"
    nearest = f"are {columns['held-out']['scores']['nearest_neighbour']:.1f} grey levels from the nearest"
    accuracy = f"and {columns['held-out']['scores']['class_accuracy']:.0%} of those held out".replace(
        "%", " %"
    )
    for sentence in (counts, sizes, nearest, accuracy, f"{unet['step']} steps"):
        assert sentence in text, sentence


def backward_over_forward(measurements: list[dict], dtype: str) -> list[float]:
    """How many times as long as forward dcnv4's backward takes, row by row."""
    ours = {(r["dtype"], r["direction"], r["shape"]): r["times"]["dcnv4"]["median"] for r in measurements}
    shapes = dict.fromkeys(r["shape"] for r in measurements)
    return [ours[dtype, "backward", shape] / ours[dtype, "forward", shape] for shape in shapes]


def test_what_is_said_of_the_operators_speed_is_in_the_json(readme: ModuleType) -> None:
    """Where dcnv4 and oneDNN's depthwise convolution stand, and what backward costs."""
    measurements = json.loads((readme.RESULTS / "operators_cpu.json").read_text(encoding="utf-8"))[
        "measurements"
    ]
    text = " ".join(EVIDENCE.split())
    for dtype, name in (("float32", "fp32"), ("bfloat16", "bf16")):
        forward = [r for r in measurements if (r["dtype"], r["direction"]) == (dtype, "forward")]
        ratios = [readme.times_as_long(r, "depthwise_onednn") for r in forward]
        ahead = sum(ratio >= 1 for ratio in ratios)
        assert f"{name} dcnv4 is ahead in {ahead} of {len(ratios)} rows" in text, ahead
        assert f"{statistics.geometric_mean(ratios):.2f} in geometric mean" in text
        costs = backward_over_forward(measurements, dtype)
        assert f"{statistics.median(costs):.1f} times its forward in {name}" in text, costs


def test_what_is_said_of_an_intel_xeon_is_in_the_json(readme: ModuleType) -> None:
    """Against oneDNN and the grid_sample twin, backward against forward, two threads against one."""
    content = json.loads((readme.RESULTS / "operators_cpu_intel.json").read_text(encoding="utf-8"))
    measurements = content["measurements"]
    assert content["environment"]["cpu"].startswith("Intel") and content["environment"]["threads"] == 2
    text = " ".join(EVIDENCE.split()).partition("### On an Intel Xeon")[2].partition("### Where")[0]
    for dtype, name in (("float32", "fp32"), ("bfloat16", "bf16")):
        ratios = [
            readme.times_as_long(r, "depthwise_onednn")
            for r in measurements
            if (r["dtype"], r["direction"]) == (dtype, "forward")
        ]
        costs = backward_over_forward(measurements, dtype)
        ahead = sum(ratio >= 1 for ratio in ratios)
        mean = statistics.geometric_mean(ratios)
        assert (
            f"in {name} dcnv4 is ahead in {ahead} of {len(ratios)} rows ({mean:.2f} in geometric mean)"
            in text
        )
        said = f"{statistics.median(costs):.1f} times its forward in {name} (at most {max(costs):.2f})"
        assert said in text, costs
    for direction in ("forward", "backward"):
        least = min(
            readme.times_as_long(r, "grid_sample") for r in measurements if r["direction"] == direction
        )
        assert f"{least:.1f} times dcnv4's {direction}" in text, least
    scaling = json.loads((readme.RESULTS / "cpu_scaling.json").read_text(encoding="utf-8"))
    assert scaling["identity"]["kernels"] == content["identity"]["kernels"]
    speedups = [r["speedup"] for r in scaling["measurements"]]
    said = f"median {statistics.median(speedups):.2f}, and {sum(s >= 1.8 for s in speedups)} of {len(speedups)} are 1.8 or more"
    assert said in text, said


def test_what_is_said_of_avx2_is_in_the_json(readme: ModuleType) -> None:
    content = json.loads((readme.RESULTS / "operators_cpu_avx2.json").read_text(encoding="utf-8"))
    assert content["environment"]["cpu"].endswith("(AVX2)") and content["environment"]["threads"] == 2
    times: dict[tuple[str, str], dict[str, dict]] = {}
    for r in content["measurements"]:
        times.setdefault((r["dtype"], r["direction"]), {})[r["shape"]] = r
    assert all(
        r["times"]["dcnv4"]["median"] == min(t["median"] for t in r["times"].values())
        for r in content["measurements"]
    )
    means = [
        statistics.geometric_mean(
            readme.times_as_long(r, "depthwise_onednn") for r in times["float32", direction].values()
        )
        for direction in ("forward", "backward")
    ]
    costs = {
        dtype: backward_over_forward(content["measurements"], dtype) for dtype in ("float32", "bfloat16")
    }
    text = " ".join(EVIDENCE.split())
    assert (
        "ahead in every row, in fp32 by {:.2f} forward and {:.2f} backward in geometric mean".format(*means)
        in text
    )
    said = "Backward takes {:.1f} times its forward in fp32 and {:.1f} times in bf16 (medians over the rows; from {:.1f} to {:.1f})"
    both = [cost for of in costs.values() for cost in of]
    assert said.format(*map(statistics.median, costs.values()), min(both), max(both)) in text


def test_what_is_said_of_the_operator_on_a_gpu_is_in_the_json(readme: ModuleType) -> None:
    """Ahead of which peers in how many rows, where the official operator fails, how far from the floor."""
    content = json.loads((readme.RESULTS / "operators_nvidia_h200.json").read_text(encoding="utf-8"))
    assert content["identity"]["device"] == "NVIDIA H200"
    earlier, last = (
        json.loads((readme.RESULTS / f"operators_nvidia_h200_{name}.json").read_text(encoding="utf-8"))
        for name in ("earlier", "last")
    )
    text = " ".join(EVIDENCE.split())

    def rows(
        dtype: str, direction: str, sigma: float = 2, level: str = "op", of: dict = content
    ) -> list[dict]:
        kind = (dtype, direction, sigma, level)
        return [r for r in of["measurements"] if (r["dtype"], r["direction"], r["sigma"], r["level"]) == kind]

    def against_table(other: dict, dtype: str, direction: str) -> float:
        """What the kernels of another file take, as a share of this one's."""
        here = {r["shape"]: r["times"]["dcnv4"]["median"] for r in rows(dtype, direction)}
        there = [r for r in rows(dtype, direction, of=other) if r["shape"] in here]
        return statistics.geometric_mean(r["times"]["dcnv4"]["median"] / here[r["shape"]] for r in there)

    def ahead(
        dtype: str, direction: str, peer: str, *kind: object, of: dict = content
    ) -> tuple[int, int, str]:
        found = rows(dtype, direction, *kind, of=of)
        ratios = [readme.times_as_long(r, peer) for r in found if peer in r["times"]]
        return sum(q >= 1 for q in ratios), len(ratios), f"{statistics.geometric_mean(ratios):.2f}"

    def said(dtype: str, direction: str, peer: str) -> str:
        won, count, mean = ahead(dtype, direction, peer)
        return f"in {won} of {count} {{}}in {dict(bfloat16='bf16', float32='fp32')[dtype]} ({mean})"

    assert said("bfloat16", "forward", "official").format("rows ") in text
    assert said("float32", "forward", "official").format("") in text
    means = (ahead(dtype, "forward", "official")[2] for dtype in ("bfloat16", "float32"))
    assert "takes {} times as long on an H200 in bf16 and {} in fp32".format(*means) in " ".join(
        README.split()
    )
    assert "backward " + said("float32", "backward", "official").format("") in text
    assert said("bfloat16", "forward", "depthwise_cudnn").format("rows ") in text
    for kind in (("float32", "forward"), ("bfloat16", "backward"), ("float32", "backward")):
        assert said(*kind, "depthwise_cudnn").format("") in text, kind
    for direction, sentence in (
        ("forward", "bf16 forward in {} rows of 14"),
        ("backward", "backward in {}."),
    ):
        won, count, _ = ahead("bfloat16", direction, "conv3x3")
        assert sentence.format(count - won) in text
    floors = [
        f"{statistics.geometric_mean(r['times']['dcnv4']['median'] / r['floor'] for r in rows(dtype, direction)):.1f}"
        for dtype in ("bfloat16", "float32")
        for direction in ("forward", "backward")
    ]
    assert (
        "{} times what moving its bytes once would in bf16 forward and {} backward ({} and {} in fp32)".format(
            *floors
        )
        in text
    )
    different = {
        r["shape"]
        for r in content["measurements"]
        if r["sigma"] == 2 and "official" in r["times"] and (r["times"]["official"]["difference"] or 0) > 0.5
    }
    assert different == {"64x14x14x512", "64x7x7x1024"}
    assert all("BFloat16" in r["skipped"]["official"] for r in rows("bfloat16", "backward"))
    failing = {r["shape"] for r in rows("float32", "backward") if "official" in r["skipped"]}
    assert failing == {"64x8x8x1280"}
    for other, sentence in (
        (last, "take {:.2f} of the table's time forward and {:.2f} backward in bf16, {:.2f} and {:.2f} in fp32"),
        (earlier, "took {:.2f} times as long forward and {:.2f} times backward in bf16, {:.2f} and {:.2f} times in fp32"),
    ):  # fmt: skip
        figures = [against_table(other, t, d) for t in ("bfloat16", "float32") for d in ("forward", "backward")]  # fmt: skip
        assert sentence.format(*figures) in text, figures
    assert last["identity"]["kernels"] == kernels_hash("cuda")
    assert f"operators_nvidia_h200_last.json`, {len(last['measurements'])} of the rows" in text
    _, count, mean = ahead("bfloat16", "forward", "official", 2, "module", of=earlier)
    assert count == 14 and f"1/{mean}, in geometric mean" in text
    wide = (ahead(dtype, "forward", "official", 8, of=earlier)[2] for dtype in ("bfloat16", "float32"))
    assert "takes {} times as long forward in bf16 and {} times in fp32".format(*wide) in text
    half = [ahead("float16", direction, "official", of=earlier)[2] for direction in ("forward", "backward")]
    assert (
        "In fp16 the official operator takes {} times as long forward and {} times backward".format(*half)
        in text
    )
    stages = json.loads((readme.RESULTS / "gpu.json").read_text(encoding="utf-8"))
    assert stages["known"]["device"] == "NVIDIA H200"
    for stage in ("correctness", "memcheck", "racecheck"):
        assert stages["stages"][stage]["status"] == "passed"


def test_times_of_older_kernels_are_called_so(readme: ModuleType) -> None:
    """Where results name other sources than there are now, the texts beside them say it, and only there."""
    for device, name, sentence in (
        ("cuda", "operators_nvidia_h200", "The CUDA kernels have changed since"),
        ("cpu", "operators_cpu", "The CPU kernels have changed since"),
        ("cpu", "operators_cpu_intel", "These kernels have changed since on Intel processors"),
        ("cpu", "operators_cpu_avx2", "These AVX2 kernels have changed since"),
    ):
        content = json.loads((readme.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        older = content["identity"]["kernels"] != kernels_hash(device)
        assert older == (sentence in " ".join(EVIDENCE.split())), device
        assert device == "cpu" or older == (sentence in " ".join(README.split()))


def test_what_is_said_of_whole_networks_on_a_gpu_is_in_the_json(readme: ModuleType) -> None:
    measured = json.loads((readme.RESULTS / "networks_nvidia_h200.json").read_text(encoding="utf-8"))[
        "measurements"
    ]
    ratios: dict[str, list[float]] = {"training": [], "sampling": []}
    for one in measured.values():
        *swapped, unet = one["figures"]
        for figure, key in itertools.product(swapped, ratios):
            pairs = zip(figure["timings"][key]["seconds"], unet["timings"][key]["seconds"], strict=True)
            ratios[key].append(statistics.median(a / b for a, b in pairs))
        parameters = [figure["parameters"] / unet["parameters"] for figure in swapped]
    text = " ".join(EVIDENCE.split())
    assert "With {:.2f} and {:.2f} of the parameters".format(*parameters) in text
    training, sampling = ((min(r), max(r)) for r in ratios.values())
    assert "train at {:.2f} to {:.2f} of the U-Net's".format(*training) in text
    assert "sample at {:.2f} to {:.2f}.".format(*sampling) in text
    last = json.loads((readme.RESULTS / "networks_nvidia_h200_last.json").read_text(encoding="utf-8"))
    (one,) = last["measurements"].values()
    *swapped, unet = (
        {key: statistics.median(timing["seconds"]) for key, timing in figure["timings"].items()}
        for figure in one["figures"]
    )
    figures = [figure[key] / unet[key] for key in ("training", "sampling") for figure in swapped]
    said = "a training step at {:.2f} and {:.2f} of the U-Net's time, sampling at {:.2f} and {:.2f} "
    assert said.format(*figures) in text, figures


def test_times_of_the_commands_are_those_of_the_json(readme: ModuleType) -> None:
    times = json.loads((readme.RESULTS / "times.json").read_text(encoding="utf-8"))
    seconds, slower = times["seconds"], times["slower_machine"]["seconds"]
    minutes = {name: round(value / 60) for name, value in seconds.items()}
    words = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
    text = " ".join(README.split())
    assert (
        f"The first takes about {words[minutes['make demo, after it']]} minutes on two idle CPU cores" in text
    )
    assert f"the second {words[minutes['make compare, after make demo']]} more" in text
    xeon = times["intel_xeon"]["seconds"]
    assert max(seconds["make test, the tests"], xeon["make test, the tests"]) < 360
    assert "under 6 minutes on two cores of a Zen 5 processor and on two shared ones of an Intel Xeon" in text
    assert f"{slower['make test, the tests'] / 60:.0f} on two of a Zen 3" in text


def test_costs_of_loop_and_loader_are_those_of_the_json(readme: ModuleType) -> None:
    """And within what was asked: 20,000 latents a second, 3 % of a digits step."""
    text = " ".join((ROOT / "docs" / "training.md").read_text(encoding="utf-8").split())
    reading = json.loads((readme.RESULTS / "cache_reading.json").read_text(encoding="utf-8"))
    assert reading["moments"] == [8, 32, 32] and reading["dtype"] == "float16" and reading["median"] >= 20_000
    assert (
        f"{reading['median']:,} latents of 4x32x32 a second on {reading['environment']['cores']} cores"
        in text
    )
    overheads, averages = [], []
    for name in ("digits_unet", "digits_dcn"):
        loop = json.loads((readme.RESULTS / f"{name}_loop.json").read_text(encoding="utf-8"))
        assert loop["config"]["run"]["name"] == name and loop["overhead"] <= 0.03
        overheads.append(f"{loop['overhead']:.1%}".replace("%", " %"))
        averages.append(f"{loop['seconds']['average'] / loop['step']:.1%}".replace("%", " %"))
    unet, dcn = overheads
    assert f"takes {unet} of a step of `digits_unet` and {dcn} of one of `digits_dcn`" in text
    assert f"the moving average {averages[0]} and {averages[1]}" in text


def test_the_operators_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's code of "The operator alone" as it stands, one block after the other; onnxruntime gives what the layer gives."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    section = README.partition("## The operator alone")[2].partition("\n## ")[0]
    blocks = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", section, re.MULTILINE)
    code = [textwrap.dedent(block) for block in blocks if re.match(r"\s*(import|from) ", block)]
    assert len(code) == 2 and "torch.onnx.export" in code[1]
    names: dict = {}
    for block in code:
        exec(compile(block, "README.md", "exec"), names)
    x = torch.randn(2, 28, 28, 64)
    session = onnxruntime.InferenceSession("layer.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), names["layer"](x), rtol=1e-4, atol=1e-4)


def test_the_code_for_those_who_come_from_the_official_package_runs() -> None:
    text = (ROOT / "docs" / "official.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", text, re.MULTILINE)
    names: dict = {}
    lines = textwrap.dedent(block).splitlines()
    by_position = next(i for i, line in enumerate(lines) if line.startswith("layer = "))
    exec(compile("\n".join(lines[: by_position + 1]), "official.md", "exec"), names)
    first = names["layer"]
    exec(compile(textwrap.dedent(block), "official.md", "exec"), names)
    assert repr(names["layer"]) == repr(first) and names["y"].shape == (2, 14, 14, 128)
    trained = names["DCNv4"](64, groups=4).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for offset_mask"):
        names["DCNv4"](64).load_state_dict(trained)


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_files_that_are_named_are_there(text: Path) -> None:
    content = text.read_text(encoding="utf-8")
    named = set(
        re.findall(
            r"(?:configs|docs|benchmarks|tests|ldm_dcn|dcnv4_ext|eval)/[\w./-]*\w(?![\w./*-])", content
        )
    )
    named |= {target for target in re.findall(r"\]\(([\w./-]+)\)", content) if "://" not in target}
    missing = [name for name in named if not (ROOT / name).exists() and not (text.parent / name).exists()]
    assert not missing


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_settings_that_are_named_exist(text: Path) -> None:
    """Every `section.key=value` of the texts, with that value where it is one."""
    content = text.read_text(encoding="utf-8")
    found = set(re.findall(r"\b(?:train|data|diffusion|sample)\.[a-z_0-9]+=[\w.\[\]-]*\w\]?", content))
    for override in found:
        setting, _, value = override.partition("=")
        assert setting in valid_keys()
        if not value.isupper():  # a placeholder such as N
            load_config(ROOT / "configs" / "digits_unet.yaml", [override])


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_modules_that_are_run_exist(text: Path) -> None:
    for module in set(re.findall(r"python -m ([\w.]+)", text.read_text(encoding="utf-8"))):
        assert importlib.util.find_spec(module) is not None, module
