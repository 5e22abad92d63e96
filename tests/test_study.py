"""Studies: what a file may say, which runs follow from it, what the numbers say, and the way from a file to its tables."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import re
import runpy
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open

from eval import comparison, fid, gpus, programs, protocol, study
from eval.report.__main__ import main as report
from eval.sources import LABEL_RULES
from ldm_dcn.arithmetic import ARITHMETIC
from ldm_dcn.config import load_config
from ldm_dcn.errors import UserError
from programs import Program
from tiny import ROOT, write_config

STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


def write_study(folder: Path, **changes) -> Path:
    config = write_config(folder)
    content = {
        "question": "Which of the two?",
        "seeds": [0, 1],
        "set": ["train.steps=2", "train.save_every=0"],
        "variants": {
            "a": {"config": config.name, "label": "first"},
            "b": {"config": config.name, "set": ["train.lr=1e-2"], "seeds": [1]},
        },
        "comparisons": {"pair": ["a", "b"]},
        "scoring": {"steps": 1, "num": 40},
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------ what a file says


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_projects_studies_can_be_run(path, tmp_path):
    read = protocol.load_study(path)
    jobs = study.jobs_of(read, path, tmp_path, list(read.variants))
    assert len({job.config.folder for job in jobs}) == len(jobs)
    assert len({(job.settings, job.seed) for job in jobs}) == len(jobs), "two variants are the same"
    for names in read.comparisons.values():
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"comparisons": {"pair": ["a", "c"]}}, r"pair names c, which is no variant; there are a, b"),
        ({"comparisons": {"pair": ["a"]}}, r"comparisons.pair"),
        ({"qeustion": "?"}, r"qeustion: unknown setting; did you mean question\?"),
        (
            {"variants": {"a": {"confg": "x.yaml"}}},
            r"variants.a.config: missing.*variants.a.confg: unknown .* mean config\?",
        ),
        ({"seeds": []}, r"seeds"),
        ({"seeds": [1, 0, 1]}, r"seeds: \[1, 0, 1\] names a seed twice"),
        (
            {"variants": {"a": {"config": "x.yaml", "seeds": [2, 2]}}, "comparisons": {}},
            r"variants.a.seeds: \[2, 2\] names a seed twice",
        ),
        ({"scoring": {"guidence": [1.0]}}, r"scoring.guidence: unknown setting; did you mean guidance\?"),
        (
            {"scoring": {"cfg": 2}},
            r"scoring.cfg: unknown setting; there are extractor, reference, guidance, ",
        ),
        ({"scoring": {"guidance": []}}, r"scoring.guidance"),
        ({"scoring": {"guidance_interval": [0.2, 1.2]}}, r"scoring.guidance_interval"),
        ({"scoring": {"precision": "int8"}}, r"scoring.precision"),
        ({"scoring": {"labels": "sorted"}}, r"scoring.labels"),
        ({"scoring": {"batch_size": 0}}, r"scoring.batch_size"),
        ({"variants": {}}, r"variants"),
    ],
)
def test_a_wrong_study_is_refused(changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        protocol.load_study(write_study(tmp_path, **changes))


def test_scoring_is_that_of_eval_fid():
    """Its parameters by their names, their defaults and choices."""
    parameters = inspect.signature(fid.evaluate).parameters
    own = {"extractor", "steps", "device"}  # of other defaults
    assert {field: parameters[field].default for field, _ in protocol.Scoring() if field not in own} == {
        field: value for field, value in protocol.Scoring() if field not in own
    }
    for field, choices in (("labels", LABEL_RULES), ("precision", ARITHMETIC)):
        assert get_args(protocol.Scoring.model_fields[field].annotation) == tuple(choices)


def test_a_study_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml.*configs/studies"):
        protocol.load_study(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [", encoding="utf-8")
    with pytest.raises(UserError, match=r"broken\.yaml is not valid YAML"):
        protocol.load_study(broken)
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    with pytest.raises(UserError, match=r"empty\.yaml: it holds no study but None"):
        protocol.load_study(empty)


def test_a_config_is_no_study_and_a_study_no_config():
    config, study_file = ROOT / "configs/digits_dcn.yaml", STUDIES[0]
    with pytest.raises(UserError, match=rf"run python train.py {config}"):
        protocol.load_study(config)
    with pytest.raises(UserError, match=rf"run python -m eval.study {study_file}"):
        load_config(study_file)


def test_runs_come_seed_by_seed(tmp_path):
    path = write_study(tmp_path)
    jobs = study.jobs_of(protocol.load_study(path), path, tmp_path / "runs", ["a", "b"])
    assert [(job.variant, job.seed) for job in jobs] == [("a", 0), ("a", 1), ("b", 1)]
    assert jobs[1].config.train.seed == 1 and jobs[1].config.train.steps == 2
    assert jobs[2].config.train.lr == 1e-2
    moved = study.jobs_of(protocol.load_study(path), path, tmp_path / "elsewhere", ["a", "b"])
    assert [job.settings for job in moved] == [job.settings for job in jobs]
    assert jobs[0].settings != jobs[1].settings != jobs[2].settings


@pytest.mark.parametrize(
    ("settings", "scoring", "said"),
    [
        (["data.condition=text"], {}, r"a draws from prompts.*sample\.py --npz"),
        (["data.source={cache}"], {}, r"a learns from the latent cache .*give scoring\.reference FOLDER"),
        ([], {"reference": "{two}"}, r"two is not the digits .*give scoring\.extractor inception:FILE"),
        ([], {"reference": "{two}", "extractor": "digits"}, r"two has 2 classes, the model 10; use scoring\.labels balanced"),
        ([], {"reference": "{cache}/none.npz"}, r"none\.npz: no such file"),
        ([], {"reference": "{statistics}", "labels": "reference"}, r"no classes .*; use scoring\.labels balanced"),
        ([], {"reference": "{statistics}", "extractor": "import:torch:nn.Nothing"}, r"cannot be had"),
        ([], {"guidance_interval": [0.9, 0.1]}, r"guidance interval 0\.9 to 0\.1"),
        ([], {"sampler": "plms"}, r"sampler 'plms' is unknown"),
        ([], {"steps": 1001}, r"1001 sampling steps .*use 1 to 1000"),
        ([], {"num": 8}, r"scoring\.num is 8, too few"),
        ([], {"device": "cuda:77"}, r"device 'cuda:77' cannot be used"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_not_trained(tmp_path, monkeypatch, capsys, settings, scoring, said):
    """One line, and nothing was begun."""
    places = {name: str(tmp_path / name) for name in ("cache", "two", "statistics.npz")}
    (tmp_path / "cache" / "shards").mkdir(parents=True)
    (tmp_path / "cache" / "manifest.json").write_text("{}")
    for number in range(20):
        place = tmp_path / "two" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(place / f"{number}.png")
    np.savez(places["statistics.npz"], mu=np.zeros(64), sigma=np.eye(64))
    places["statistics"] = places["statistics.npz"]
    scoring = {
        key: value.format(**places) if isinstance(value, str) else value for key, value in scoring.items()
    }
    path = write_study(tmp_path, set=[text.format(**places) for text in settings], scoring=scoring)
    monkeypatch.setattr(study, "_call", lambda *_: pytest.fail("something was begun"))
    with pytest.raises(SystemExit) as leaving:
        study.main([str(path), "--runs", str(tmp_path / "runs")])
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and error.count("\n") == 1
    assert re.search(rf"^error: the study could not score its runs: .*{said}", error), error


# ------------------------------------------------------------------------------------------------- on several GPUs


@pytest.mark.parametrize(
    ("visible", "count", "jobs", "expected"),
    [
        (None, 0, 2, ["", ""]),
        (None, 4, 4, ["0", "1", "2", "3"]),
        (None, 4, 1, ["0,1,2,3"]),
        (None, 8, 3, ["0,3,6", "1,4,7", "2,5"]),
        (None, 2, 5, ["0", "1", "0", "1", "0"]),
        ("6, 2", 2, 2, ["6", "2"]),
        ("GPU-5ee, GPU-1ab,GPU-f00", 3, 2, ["GPU-5ee,GPU-f00", "GPU-1ab"]),
        ("3,1,-1,0", 2, 2, ["3", "1"]),  # CUDA stops reading at what is no GPU
        ("", 0, 1, [""]),
        ("-1", 0, 2, ["", ""]),
    ],
)
def test_gpus_are_shared_out_among_runs(visible, count, jobs, expected):
    known = gpus.visible_gpus({} if visible is None else {gpus.VISIBLE: visible}, count)
    assert [",".join(share) for share in gpus.shared_out(known, jobs)] == expected


def test_each_run_has_a_gpu_of_its_own_and_leaves_it_to_the_next(tmp_path, monkeypatch, capsys):
    """Of those that CUDA_VISIBLE_DEVICES leaves to the study; training and scoring alike."""
    path = write_study(tmp_path, seeds=list(range(4)), variants={name: {"config": "tiny.yaml"} for name in "ab"})  # fmt: skip
    monkeypatch.setenv(gpus.VISIBLE, "5,7,6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    together, begun, taken, seen = threading.Barrier(3), itertools.count(), set(), []

    def run_job(job: study.Job, scoring: protocol.Scoring, threads: int, own: Sequence[str]) -> dict:
        if next(begun) < 3:
            together.wait(timeout=60)
        assert len(own) == 1 and taken.isdisjoint(own)
        taken.update(own)
        time.sleep(0.01)
        taken.difference_update(own)
        seen.extend(own)
        return {**RUN, "variant": job.variant, "seed": job.seed, "settings": job.settings}

    monkeypatch.setattr(study, "run_job", run_job)
    command = [str(path), "--runs", str(tmp_path / "runs"), "--rounds", "0"]
    study.main(command)
    assert len(seen) == 8 and set(seen) == {"5", "6", "7"}
    assert "8 to go, 3 at a time on GPUs 5, 7, 6\n" in capsys.readouterr().out


def test_a_process_of_a_run_knows_its_gpus_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(gpus.VISIBLE, "4,5")
    program = tmp_path / "program.py"
    program.write_text("import os\nprint(os.environ['CUDA_VISIBLE_DEVICES'])\n")
    for own in (["5"], []):
        study._call([str(program)], tmp_path / "log", 1, own)
    assert (tmp_path / "log").read_text().split() == ["5", "4,5"]


def test_more_runs_than_gpus_share_them_and_it_is_said(tmp_path, monkeypatch, capsys):
    """And a GPU that scoring names by number must be among those of each run."""
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(study, "check_scoring", lambda *_: None)
    monkeypatch.setattr(study, "run_job", lambda *_: pytest.fail("something was begun"))
    path = write_study(tmp_path, scoring={"steps": 1, "num": 40, "device": "cuda:1"})
    with pytest.raises(SystemExit):
        study.main([str(path), "--runs", str(tmp_path / "runs"), "--jobs", "3"])
    out, error = capsys.readouterr()
    assert "3 to go, 3 at a time on 2 GPUs (0, 1), which some share" in out
    assert (
        "scoring.device=cuda:1: of 3 runs at a time each has 1 of the GPUs" in error and "--jobs 1" in error
    )


# -------------------------------------------------------------------------------------------- what the numbers say


def brute_force_p(a: Sequence[float], b: Sequence[float]) -> float:
    """By walking through all orders instead of all hands."""
    observed = abs(statistics.fmean(a) - statistics.fmean(b))
    orders = list(itertools.permutations([*a, *b]))
    hits = sum(
        abs(statistics.fmean(o[: len(a)]) - statistics.fmean(o[len(a) :])) >= observed - 1e-12 for o in orders
    )
    return hits / len(orders)


def test_of_many_ways_to_deal_some_are_drawn(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(1)
    a, b = (tuple((torch.randn(8, generator=generator).double() + shift).tolist()) for shift in (0, 0.6))
    exact = comparison.permutation_test(a, b)
    comparison.permutation_test.cache_clear()
    monkeypatch.setattr(comparison, "MOST_HANDS", 10_000)  # of 12,870
    drawn = comparison.permutation_test(a, b)
    comparison.permutation_test.cache_clear()
    assert drawn != exact and drawn == pytest.approx(exact, abs=0.02) and 0.05 < exact < 0.9


def test_the_permutation_test_is_exact():
    assert comparison.permutation_test((1, 2, 3), (4, 5, 6)) == pytest.approx(2 / 20)
    assert comparison.permutation_test((1.0, 1.0), (1.0, 1.0)) == 1
    assert comparison.permutation_test((0, 1, 2, 3), (10, 11, 12, 13)) == pytest.approx(2 / 70)
    generator = torch.Generator().manual_seed(0)
    for sizes in ((2, 2), (3, 2), (2, 5), (4, 3)):
        a, b = (tuple(torch.randn(n, generator=generator).double().tolist()) for n in sizes)
        assert comparison.permutation_test(a, b) == pytest.approx(brute_force_p(a, b)), sizes
        assert comparison.permutation_test(b, a) == pytest.approx(brute_force_p(a, b)), sizes
        apart = comparison.permutation_test(range(sizes[0]), range(100, 100 + sizes[1]))
        assert apart == pytest.approx(comparison.least_p(*sizes)), sizes


RUN = {
    "parameters": 1000,
    "training_cpu_seconds": 30.0,
    "scoring_cpu_seconds": 30.0,
    "scores": {"1": {"fd": 0.1, "fd_of_noise": 0.01}},
    "tags": {"N": 40, "weights": "EMA 0.9", "step": 2},
    "metric": "FD-digits-v1",
    "reference": {"source": "digits"},
    "extractor": {"name": "digits-v1", "weights": "beef", "resize": "none"},
    "losses": [[1, 2.0], [2, 1.0]],
    "distances": [],
    "distance_tags": {},
}


def results(folder: Path, a: Sequence[float], b: Sequence[float]) -> dict:
    """A study's content with these FDs, and accuracies that go the other way."""
    read = protocol.load_study(write_study(folder))
    runs = [
        {
            **RUN,
            "variant": name,
            "seed": seed,
            "settings": "",
            "scores": {
                "1": {"fd": fd, "fd_of_noise": fd / 40, "class_accuracy": 1 - fd, "nearest_neighbour": 3.0}
            },
            "distances": [[2, fd]],
            "distance_tags": {"metric": "FD-digits-v1", "N": 10, "guidance": 1.5},
        }
        for name, values in (("a", a), ("b", b))
        for seed, fd in enumerate(values)
    ]
    speed = {
        "figures": [
            {
                "name": name,
                "macs": 10**6,
                "timings": {k: {"seconds": [t, t]} for k in ("forward", "training")},
            }
            for name, t in (("a", 1.0), ("b", 1.5))
        ],
        "settings": {"rounds": 2, "batch_size": 64, "precision": "fp32"},
        "environment": {"cpu": "a processor", "threads": 1},
    }
    environment = {"command": "study.py study.yaml", "cpu": "a processor", "threads": 1}
    return {"study": read.model_dump(mode="json"), "runs": runs, "speed": speed, "environment": environment}


def test_tables_say_what_differs_and_what_does_not(tmp_path, monkeypatch):
    content = results(tmp_path, [0.1, 0.12, 0.11, 0.13], [0.2, 0.22, 0.21, 0.23])
    table = comparison.tables(content)
    assert "0.1150 ± 0.0129" in table and "0.2150 ± 0.0129 (p 0.029*)" in table
    assert "training time / first's" in table and "1.50" in table
    assert "8 runs, 8 processor minutes" in table
    assert comparison.verdicts(content) == ["pair, guidance 1: b against first: worse in FD, class accuracy"]
    content = results(tmp_path, [0.1, 0.3, 0.2, 0.15], [0.2, 0.22, 0.21, 0.14])
    assert comparison.verdicts(content) == ["pair, guidance 1: b against first: no difference shown in FD, class accuracy"]  # fmt: skip
    # however far apart, three against three cannot be told apart: p is a tenth at least
    content = results(tmp_path, [0.1, 0.12, 0.11], [9.2, 9.22, 9.21])
    assert comparison.verdicts(content) == ["pair, guidance 1: b against first: too few seeds to tell in FD, class accuracy"]  # fmt: skip
    # the nearest neighbours are equal: the third test
    few = comparison.in_all(results(tmp_path, [0.1, 0.12, 0.11, 0.13], [0.2, 0.22, 0.21, 0.23]))
    assert few.startswith(
        "3 tests, 2 below 0.05, 0 by Holm's rule over all, as there must be with so few seeds: "
    )
    assert few.endswith("it asks for p below 0.017, and the least there can be is 0.029")
    many = results(tmp_path, [0.1, 0.12, 0.11, 0.13, 0.14], [0.2, 0.22, 0.21, 0.23, 0.24])
    assert comparison.in_all(many) == "3 tests, 2 below 0.05, 2 by Holm's rule over all"
    same = comparison.Summary((0.0,), p=0.03, least=0.001)
    monkeypatch.setattr(comparison, "summaries", lambda *_: {"b": same})
    # 6 x 0.03 is too much, and Holm's rule looks no further, though 0.03 alone would do
    assert comparison.in_all(many) == "6 tests, 6 below 0.05, 0 by Holm's rule over all"
    monkeypatch.undo()
    alone = comparison.summaries(results(tmp_path, [0.1], [0.2])["runs"], ["a", "b"], "1", "fd")
    assert alone["b"].p is None and math.isnan(alone["b"].spread)


# ------------------------------------------------------------------------------------------- from a file to tables


@pytest.fixture
def in_this_process(monkeypatch) -> list[list[str]]:
    """The commands of a study run here, not in processes of their own; the list of them."""
    called = []

    def call(arguments: Sequence[str], log: Path, threads: int, gpus: Sequence[str] = ()) -> float:
        called.append(list(arguments))
        AcceleratorState._reset_state(reset_partial_state=True)
        program, *others = arguments if arguments[0] != "-m" else arguments[1:]
        monkeypatch.setattr(sys, "argv", [program, *others])
        run = runpy.run_path if program.endswith(".py") else runpy.run_module
        try:
            run(program, run_name="__main__")
        except SystemExit as leaving:
            assert not leaving.code
        return 1.0

    monkeypatch.setattr(study, "_call", call)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield called
    torch.set_num_threads(threads)


def test_from_a_file_to_tables_and_a_report(tmp_path, in_this_process, capsys):
    path = write_study(tmp_path, variants={"a": {"config": "tiny.yaml"}, "b": {"config": "tiny.yaml", "set": ["train.lr=1e-2"]}}, seeds=[3])  # fmt: skip
    file = tmp_path / "results" / "small.json"
    command = [
        str(path),
        "--json",
        str(file),
        "--runs",
        str(tmp_path / "runs"),
        "--jobs",
        "1",
        "--rounds",
        "1",
    ]
    study.main(command)
    assert len(in_this_process) == 6  # training, scoring, a grid
    content = json.loads(file.read_text())
    assert [(run["variant"], run["seed"]) for run in content["runs"]] == [("a", 3), ("b", 3)]
    assert all(run["tags"]["step"] == 2 and len(run["losses"]) == 2 for run in content["runs"])
    exported = next((tmp_path / "runs").glob("b-3-*")) / "export" / "unet"
    with safe_open(exported / "diffusion_pytorch_model.safetensors", "pt") as weights:
        count = sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    assert content["runs"][1]["parameters"] >= count > 8_000
    first = capsys.readouterr().out
    assert "Which of the two?" in first and "forward time" in first
    study.main(command)  # everything is done
    again = capsys.readouterr().out
    assert len(in_this_process) == 6 and again.startswith(f"2 of 2 runs are done and stand in {file}\n")
    assert first.endswith(again.partition("\n")[2])
    report(["--study", str(file), "--out", str(tmp_path / "page")])
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Which of the two?" in page and page.count("data:image/png") == 2 and "<polyline" in page


def test_runs_are_scored_as_the_file_says(tmp_path, in_this_process, monkeypatch):
    """Among others runs of classes against statistics, which hold no labels."""
    fid.evaluate([], save_statistics=tmp_path / "digits.npz", progress=False, image_size=8)
    scoring = {"reference": str(tmp_path / "digits.npz"), "guidance": [1.0, 2.0], "guidance_interval": [0.0, 0.5],
               "guidance_rescale": 0.7, "sampler": "euler", "steps": 2, "precision": "bf16", "seed": 3, "num": 20,
               "batch_size": 7, "device": "cpu"}  # fmt: skip
    path = write_study(tmp_path, variants={"a": {"config": "tiny.yaml"}}, comparisons={}, seeds=[3], scoring=scoring)  # fmt: skip
    file = tmp_path / "results.json"
    study.main([str(path), "--json", str(file), "--runs", str(tmp_path / "runs"), "--jobs", "1", "--rounds", "0"])  # fmt: skip
    (run,) = json.loads(file.read_text())["runs"]
    wanted = {"N": 20, "guidance": 1.0, "guidance_interval": [0.0, 0.5], "guidance_rescale": 0.7, "sampler": "euler",
              "sampler_steps": 2, "precision": "bf16", "seed": 3, "labels": "balanced"}  # fmt: skip
    assert wanted.items() <= run["tags"].items() and set(run["scores"]) == {"1", "2"}
    assert in_this_process[1][in_this_process[1].index("--batch-size") + 1] == "7"


def test_runs_that_were_taken_over_keep_what_they_were_made_with(tmp_path, in_this_process, monkeypatch):
    """What another call trains or times carries its own machine and command; the file's are those of the call that began it."""
    path = write_study(tmp_path, variants={"a": {"config": "tiny.yaml"}, "b": {"config": "tiny.yaml", "set": ["train.lr=1e-2"]}}, seeds=[3])  # fmt: skip
    read, file = protocol.load_study(path), tmp_path / "results.json"
    (job,) = (j for j in study.jobs_of(read, path, tmp_path / "runs", ["a", "b"]) if j.variant == "a")
    first = {"command": "study.py elsewhere", "cpu": "another processor", "threads": 7}
    taken_over = {**RUN, "variant": "a", "seed": 3, "settings": job.settings}
    content = {"study": read.model_dump(mode="json"), "runs": [taken_over], "environment": first}
    file.write_text(json.dumps(content))
    command = [str(path), "--json", str(file), "--runs", str(tmp_path / "runs"), "--jobs", "1", "--rounds", "0"]  # fmt: skip
    monkeypatch.setattr(study, "draw", lambda *_: None)
    study.main(command)
    now = json.loads(file.read_text())
    assert now["environment"] == first and now["runs"][0] == taken_over
    added = now["runs"][1]["environment"]
    assert added["cpu"] != "another processor" and added["threads"] == 1  # those of --threads
    report(["--study", str(file), "--out", str(tmp_path / "page")])
    page = (tmp_path / "page" / "index.html").read_text()
    assert "another processor, 7 threads and " in page and "python -m eval.study elsewhere; " in page


def test_seeds_may_be_shared_out_among_commands_of_one_file(tmp_path, monkeypatch):
    """Each began before the other had a run: none takes away what the other has kept."""
    path, file = write_study(tmp_path), tmp_path / "results.json"
    monkeypatch.setattr(study, "draw", lambda *_: None)
    monkeypatch.setattr(study, "check_scoring", lambda *_: None)

    def command(*more: str) -> None:
        study.main([str(path), "--json", str(file), "--runs", str(tmp_path / "runs"), "--rounds", "0", *more])

    def train_and_score(jobs, scoring, shares, threads, keep) -> None:
        if [job.seed for job in jobs] == [0]:
            command("--seeds", "1")  # from its beginning to its end
        for job in jobs:
            keep({**RUN, "variant": job.variant, "seed": job.seed, "settings": job.settings})

    monkeypatch.setattr(study, "train_and_score", train_and_score)
    command("--seeds", "0")
    kept = [(run["variant"], run["seed"]) for run in json.loads(file.read_text())["runs"]]
    assert kept == [("a", 0), ("a", 1), ("b", 1)]


def test_results_of_another_protocol_are_refused_and_kept(tmp_path, capsys):
    """Runs of other settings, scores of another rule, and variants that are gone never meet in one table."""
    path = write_study(tmp_path)
    read = protocol.load_study(path)
    content = results(tmp_path, [0.1], [0.2])
    for run in content["runs"]:
        jobs = study.jobs_of(read, path, tmp_path / "runs", ["a", "b"])
        run["seed"] = 1
        run["settings"] = next(job.settings for job in jobs if (job.variant, job.seed) == (run["variant"], 1))
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content))
    study.main([str(path), "--json", str(file), "--print"])
    assert "0.1000" in capsys.readouterr().out
    variants = {
        "a": {"config": "tiny.yaml"},
        "b": {"config": "tiny.yaml", "set": ["train.lr=2e-2"], "seeds": [1]},
    }
    # those of a study from before a way to score was added were scored by its default, which is the file's
    content["study"]["scoring"] = {
        key: content["study"]["scoring"][key]
        for key in ("extractor", "reference", "guidance", "sampler", "steps", "seed", "num")
    }
    file.write_text(json.dumps(content))
    elsewhere = {"steps": 1, "num": 40, "device": "cpu", "batch_size": 3}  # which changes no image
    study.main([str(write_study(tmp_path, scoring=elsewhere)), "--json", str(file), "--print"])
    assert "0.1000" in capsys.readouterr().out
    for changes, said in (
        ({"variants": variants}, "b seed 1"),
        ({"scoring": {"steps": 1, "num": 40, "precision": "bf16"}}, "scored in another way"),
        ({"scoring": {"steps": 1, "num": 41}}, "scored in another way"),
        ({"variants": {"a": {"config": "tiny.yaml"}}, "comparisons": {}}, "b seed 1"),
    ):
        before = file.read_bytes()
        with pytest.raises(SystemExit) as leaving:
            study.main([str(write_study(tmp_path, **changes)), "--json", str(file), "--print"])
        assert leaving.value.code == 2
        error = capsys.readouterr().err
        assert said in error and "name another --json" in error
        assert file.read_bytes() == before


def test_timing_one_comparison_keeps_the_others_times(tmp_path):
    path = write_study(tmp_path, comparisons={"one": ["a", "b"], "two": ["a", "c"]}, seeds=[3],
                       variants={name: {"config": "tiny.yaml", "set": [f"train.lr={lr}"]} for name, lr in (("a", "1e-3"), ("b", "2e-3"), ("c", "3e-3"))})  # fmt: skip
    read, file = protocol.load_study(path), tmp_path / "results.json"
    jobs = study.jobs_of(read, path, tmp_path / "runs", list(read.variants))
    runs = [{**RUN, "variant": job.variant, "seed": 3, "settings": job.settings} for job in jobs]
    content = {"study": read.model_dump(mode="json"), "runs": runs, "environment": {"command": "study.py"}}
    file.write_text(json.dumps(content))
    for title in read.comparisons:
        study.main(
            [
                str(path),
                "--json",
                str(file),
                "--runs",
                str(tmp_path / "runs"),
                "--rounds",
                "1",
                "--only",
                title,
            ]
        )
    speed = json.loads(file.read_text())["speed"]
    assert [figure["name"] for figure in speed["figures"]] == ["a", "b", "c"]


def test_a_run_that_fails_is_told_while_another_one_goes_on(tmp_path, monkeypatch):
    path, begun, told, said, kept = write_study(tmp_path), Event(), Event(), [], []
    jobs = study.jobs_of(protocol.load_study(path), path, tmp_path / "runs", ["a", "b"])[::2]

    def run_job(job, *_):
        if job.variant == "a":
            assert begun.wait(20)
            raise UserError("it is broken")
        begun.set()
        return {"told in time": told.wait(20)}

    monkeypatch.setattr(study, "run_job", run_job)
    monkeypatch.setattr(study.tqdm, "write", lambda text, **_: said.append(text) or told.set())
    with pytest.raises(UserError, match="it is broken"):
        study.train_and_score(jobs, protocol.Scoring(), [[], []], 1, kept.append)
    assert said == ["error: it is broken; the runs that have begun are waited for"]
    assert kept == [{"told in time": True}]


def test_a_setting_that_is_wrong_is_the_studys(tmp_path):
    path = write_study(tmp_path, set=["train.stpes=2"])
    with pytest.raises(UserError, match=rf"^{path}, variant a: train.stpes: unknown setting"):
        study.jobs_of(protocol.load_study(path), path, tmp_path / "runs", ["a"])


def test_nothing_to_print_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.main([str(write_study(tmp_path)), "--json", str(tmp_path / "none.json"), "--print"])
    assert "none.json does not exist: there is nothing to print" in capsys.readouterr().err


def test_a_run_that_fails_is_named_with_its_words(tmp_path):
    path = write_study(tmp_path, set=["train.steps=2", "data.source=nowhere"])
    jobs = study.jobs_of(protocol.load_study(path), path, tmp_path / "runs", ["a"])
    with pytest.raises(UserError, match=r"train\.py.* failed: .*nowhere.*a-0-\w+\.log"):
        study.run_job(jobs[0], protocol.Scoring(), threads=1)


def test_mistakes_on_the_command_line(tmp_path, capsys):
    path = write_study(tmp_path)
    other = tmp_path / "other.json"
    other.write_text("[]")
    for arguments, said in (
        (["--only", "none"], "--only none: no comparison; there are pair"),
        (["--seeds", "9"], "the study has [0, 1]"),
        (["--jobs", "0"], "--jobs"),
        (["--json", str(other)], "other.json is no file of eval.study"),
    ):
        with pytest.raises(SystemExit) as leaving:
            study.main([str(path), *arguments])
        assert leaving.value.code == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as leaving:
        report(["--out", str(tmp_path / "page")])
    assert leaving.value.code == 2 and "--study JSON" in capsys.readouterr().err


def test_a_report_of_results_alone(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results(tmp_path, [0.1, 0.12, 0.11], [0.2, 0.22, 0.21])))
    report(["--study", str(file), "--out", str(tmp_path / "page")])
    page = (tmp_path / "page" / "index.html").read_text()
    for text in (
        "p 0.100",
        "too few seeds to tell",
        "python -m eval.study study.yaml",
        "3 tests, 0 below 0.05, 0 by Holm",
        "Fréchet distance on the way",
        "batch 64, fp32",
    ):
        assert text in page, text
    (quality,) = (part for part in page.split("<figure") if "against the time of a training step" in part)
    for told in ("Guidance 1", "weights beef", "resize none", "N 40", "reference digits", "dpm++ 1 steps", "sampling seed 0", "EMA 0.9"):  # fmt: skip
        assert told in quality, told
    broken = tmp_path / "broken.json"
    broken.write_text('{"study": {}, "runs": []}')
    with pytest.raises(SystemExit):
        report(["--study", str(broken), "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_more_variants_than_colours_stand_in_charts_by_comparison(tmp_path):
    """And a study that measured no distance on the way says so."""
    content = results(tmp_path, [0.1, 0.12], [0.2, 0.22])
    names = [f"v{i}" for i in range(9)]
    content["study"] |= {
        "variants": {name: {"config": "tiny.yaml"} for name in names},
        "comparisons": {"front": names[:5], "back": [names[0], *names[5:]]},
    }
    content["runs"] = [{**RUN, "variant": name, "seed": seed, "settings": ""} for name in names for seed in (0, 1)]  # fmt: skip
    content["speed"] = {}
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content))
    report(["--study", str(file), "--out", str(tmp_path / "page")])
    page = (tmp_path / "page" / "index.html").read_text()
    for title in ("Loss, front", "Loss, back"):
        assert page.count(f"<h4>{title}</h4>") == 1
    assert page.count("Fréchet distance on the way: not measured") == 1


@pytest.mark.parametrize(
    ("file", "results"), [("digits", "digits_study"), ("ablations", "ablations")], ids=["digits", "ablations"]
)
def test_the_committed_studies_go_on_with_the_programs_of_today(tmp_path, file: str, results: str):
    """Settings that came later mean what there was before: the same command finds everything done."""
    path = ROOT / "configs" / "studies" / f"{file}.yaml"
    read = study.load_study(path)
    jobs = study.jobs_of(read, path, tmp_path, list(read.variants))
    content = study.open_results(ROOT / "benchmarks" / "results" / f"{results}.json", read, jobs)
    assert {(run["variant"], run["seed"]) for run in content["runs"]} <= {
        (job.variant, job.seed) for job in jobs
    }


def test_the_words_of_a_failing_run_are_its_own(tmp_path: Path) -> None:
    """Not those of a bar that a run draws on, whose study was killed, in the same log."""
    log = tmp_path / "log"
    log.write_text("error: of an earlier start\n")
    begin = log.stat().st_size
    bar = "\rdcn: 49%|####    | 49/100 [01:18<01:15, 1.48s/step, loss=1.1733]"
    log.write_text(
        f"{log.read_text()}{bar}error: another process is training in runs/dcn; wait for it\n{bar}"
    )
    assert programs._last_words(log, begin) == "another process is training in runs/dcn; wait for it"


THAT_IS_KILLED = """
import sys
from pathlib import Path
from threading import Thread
from eval.programs import call

# As a study does, from a thread for each run.
runs = Thread(target=call, args=([sys.argv[1]], Path(sys.argv[2]), {}))
runs.start()
runs.join()
"""
THAT_RUNS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(143)))
print("runs", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_runs_stop_when_their_study_is_killed(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(THAT_IS_KILLED)
    (tmp_path / "run.py").write_text(THAT_RUNS)
    log = tmp_path / "log"
    log.touch()
    study_process = Program(str(tmp_path / "killed.py"), str(tmp_path / "run.py"), str(log))

    def comes(word: str) -> bool:
        deadline = time.monotonic() + 30
        while word not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
        return word in log.read_text()

    assert comes("runs")
    study_process.kill()
    assert comes("saved")
