"""The ablations of speed: every variant computes, and those that only do it differently compute the same."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from dcnv4_ext import native
from eval import ablations, contenders, stopwatch
from eval.peers import Case, Ours, Shape
from eval.report import __main__ as page


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few buffer sets and single calls: these tests look at results, not at times."""
    monkeypatch.setattr(contenders, "MOST_SETS", 3)
    monkeypatch.setattr(stopwatch, "CPU_TURN", 0.0)


def test_every_ablation_is_measured(tmp_path, capsys):
    file = tmp_path / "speed.json"
    ablations.main(["--device", "cpu", "--rows", "1x3x4x64", "--seconds", "0.001", "--json", str(file)])
    table = capsys.readouterr().out
    records = json.loads(file.read_text())["records"]
    assert {record["ablation"] for record in records} == set(ablations.ABLATIONS)
    for record in records:
        assert not record["failed"]
        assert set(record["seconds"]) == {"dcnv4", *(c[0] for c in ablations.ABLATIONS[record["ablation"]].contenders)}  # fmt: skip
        assert min(record["seconds"].values()) > 0
    for ablation in ablations.ABLATIONS.values():
        assert all(label in table for label, *_ in ablation.contenders)


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch, capsys):
    """What was measured is in the file at once; the same command adds the rest, and other settings leave it alone."""
    file, measure = tmp_path / "speed.json", ablations.measure
    command = ["--device", "cpu", "--rows", "1x3x4x64", "--seconds", "0.001", "--only", "softmax", "depthwise", "--json", str(file)]  # fmt: skip

    def stopped(name, *arguments, **settings):
        if name == "depthwise":
            raise KeyboardInterrupt
        return measure(name, *arguments, **settings)

    monkeypatch.setattr(ablations, "measure", stopped)
    monkeypatch.setattr(sys, "argv", ["ablations.py", "first"])
    with pytest.raises(SystemExit):
        ablations.main(command)
    first = json.loads(file.read_text())
    assert [record["direction"] for record in first["records"]] == ["forward", "backward"]

    monkeypatch.setattr(
        ablations, "measure", lambda name, *a, **s: measure({"depthwise": name}[name], *a, **s)
    )
    monkeypatch.setattr(sys, "argv", ["ablations.py", "second"])
    ablations.main(command)
    assert "2 of 4 measurements are in" in capsys.readouterr().out
    second = json.loads(file.read_text())
    assert second["records"][:2] == first["records"] and second["environment"] == first["environment"]
    assert [r["environment"]["command"] for r in second["records"][2:]] == ["ablations.py second"] * 2

    with pytest.raises(SystemExit) as leaving:
        ablations.main([*command, "--dtype", "bfloat16"])
    assert leaving.value.code == 2 and "dtype float32, here bfloat16" in capsys.readouterr().err
    assert json.loads(file.read_text()) == second
    page.main(["--ablations", str(file), "--out", str(tmp_path / "page")])
    text = (tmp_path / "page" / "index.html").read_text()
    assert "python -m eval.ablations first; python -m eval.ablations second" in text


@pytest.mark.parametrize("kind", [ablations.Separate, ablations.OneProjection])
def test_other_projections_compute_the_same(kind):
    case = Case(Shape(2, 5, 4, 64), torch.float32, 2.0, "cpu")
    torch.manual_seed(0)
    plain = Ours(case).block(case)
    other = kind(case).block(case)
    x = case.map("value", 0)
    with torch.no_grad():
        used = 27 * case.shape.groups
        if kind is ablations.Separate:
            other.value_proj, other.output_proj = plain.value_proj, plain.output_proj
            for mine, theirs in zip((other.offset, other.mask), (slice(0, 18), slice(18, 27)), strict=True):
                for name in ("weight", "bias"):
                    rows = getattr(plain.offset_mask, name)[:used].unflatten(0, (case.shape.groups, 27))
                    getattr(mine, name).copy_(rows[:, theirs].flatten(0, 1))
        else:
            for name in ("weight", "bias"):
                rows = [getattr(plain.value_proj, name), getattr(plain.offset_mask, name)]
                getattr(other.inward, name).copy_(torch.cat(rows))
            other.outward = plain.output_proj
        assert torch.allclose(other(x), plain(x), atol=1e-5)


def test_without_vectors_is_a_matter_of_the_device_measured_not_of_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    peer = ablations.Scalar(Case(Shape(1, 3, 4, 32), torch.float32, 2.0, "cpu"))
    with peer.context():
        assert native.cpu().dcnv4_cpu_selected() == b"portable"


def test_mistakes(tmp_path, capsys):
    for arguments, said in ((["--sigma", "-1"], "--sigma"), (["--rows", "3x3"], "3x3"), (["--json", str(tmp_path)], "is a folder")):  # fmt: skip
        with pytest.raises(SystemExit) as leaving:
            ablations.main(["--device", "cpu", *arguments])
        assert leaving.value.code == 2 and said in capsys.readouterr().err


def test_the_report_shows_them(tmp_path, capsys):
    file = tmp_path / "speed.json"
    shared = {"level": "module", "direction": "forward", "dtype": "float32", "sigma": 2.0}
    records = [
        {**shared, "shape": shape, "seconds": {"dcnv4": 1.0, "with softmax": seconds}}
        for shape, seconds in (("1x4x4x32", 2.0), ("1x8x8x32", 8.0))
    ]
    made = {"command": "ablations.py --device cpu", "cpu": "a processor", "threads": 3}
    file.write_text(json.dumps({"records": records, "environment": made}))
    page.main(["--ablations", str(file), "--out", str(tmp_path / "page")])
    text = (tmp_path / "page" / "index.html").read_text()
    for said in ("What each choice costs", "4.00x", "with softmax", "<td>8.00</td>", "python -m eval.ablations --device cpu",
                 "a processor, 3 threads", "sigma 2 px"):  # fmt: skip
        assert said in text, said
    file.write_text("{}")
    with pytest.raises(SystemExit):
        page.main(["--ablations", str(file), "--out", str(tmp_path / "page")])
    assert "no file of eval.ablations" in capsys.readouterr().err
