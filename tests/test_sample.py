"""sample.py as a long job: it writes as it goes, goes on where it was stopped, and shares the work."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import sample
from eval import fid
from ldm_dcn import drawn, sampling
from ldm_dcn.arithmetic import ARITHMETIC
from ldm_dcn.errors import UserError
from ldm_dcn.trainer import train
from programs import Program, run_together
from tiny import WHOLE, setting, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread_and_a_fresh_accelerator")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = tiny_config(
        tmp_path_factory.mktemp("run"), setting("model.unet", WHOLE), "train.steps=2", "train.save_every=0"
    )
    assert train(config) == 0
    return str(config.folder)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images every call of `generate` drew."""
    counts: list[int] = []
    generate = sampling.generate

    def counting(model: object, conditions: object, seeds: list[int], **options: object) -> torch.Tensor:
        counts.append(len(seeds))
        return generate(model, conditions, seeds, **options)

    monkeypatch.setattr(sampling, "generate", counting)
    return counts


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: np.asarray(Image.open(path)).tobytes() for path in folder.glob("*.png")}


def arrays(npz: Path) -> list[bytes]:
    with np.load(npz, allow_pickle=False) as file:
        return [file[name].tobytes() for name in ("arr_0", "arr_1")]


def test_kill_9_then_the_same_command_draws_only_what_is_missing(
    run: str, tmp_path: Path, counted: list[int]
) -> None:
    options = [run, "--n", "600", "--steps", "2", "--batch-size", "3"]
    npz = tmp_path / "samples.npz"
    killed = Program("sample.py", *options, "--npz", str(npz))
    began = time.monotonic()
    while len(list(tmp_path.glob("samples.npz.*.drawn/*.png"))) < 20:
        assert killed.poll() is None and time.monotonic() - began < 120, killed.stderr
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    (folder,) = tmp_path.glob("samples.npz.*.drawn")
    there = pictures(folder)
    assert 20 <= len(there) < 600 and not npz.exists()
    options[-1] = "64"
    assert sample.main([*options, "--npz", str(npz)]) == 0
    assert sum(counted) == 600 - len(there) and max(counted) <= 64  # nothing twice, and never all in memory
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]
    counted.clear()

    assert sample.main([*options, "--npz", str(npz)]) == 0
    assert not counted  # it is there
    straight = tmp_path / "straight.npz"
    assert sample.main([*options, "--npz", str(straight)]) == 0
    assert arrays(npz) == arrays(straight)
    with pytest.raises(UserError, match=r"holds other images than this command.s"):  # hours of drawing
        sample.main([*options, "--guidance", "2", "--npz", str(npz)])
    assert arrays(npz) == arrays(straight)
    other = tmp_path / "other.npz"
    counted.clear()
    assert sample.main([*options, "--guidance", "2", "--npz", str(other)]) == 0
    assert sum(counted) == 600 and arrays(other) != arrays(npz)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)]
)
def test_a_signal_ends_after_the_batch(
    run: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    counted: list[int],
    number: signal.Signals,
    code: int,
) -> None:
    save, calls = drawn.Drawn.save, []

    def save_and_signal(self: drawn.Drawn, index: int, image: torch.Tensor) -> None:
        calls.append(index)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        save(self, index, image)

    monkeypatch.setattr(drawn.Drawn, "save", save_and_signal)
    command = [run, "--n", "9", "--steps", "1", "--batch-size", "2", "--png-dir", str(tmp_path / "png")]
    assert sample.main(command) == code
    assert len(pictures(tmp_path / "png")) == 4
    assert "4 of 9 images are in" in capsys.readouterr().out
    counted.clear()
    assert sample.main(command) == 0
    assert sum(counted) == 5 and len(pictures(tmp_path / "png")) == 9


def test_what_other_machines_wrote_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system shows it late, in a listing of the folder that it keeps for up to a minute."""
    images = drawn.Drawn(tmp_path, ["a.png", "b.png"], {})
    images.save(0, torch.zeros(1, 2, 2, dtype=torch.uint8))
    clock, waited = [0.0], []

    def wait(seconds: float) -> None:
        clock[0] += seconds
        waited.append(seconds)
        if len(waited) == 3:
            images.save(1, torch.zeros(1, 2, 2, dtype=torch.uint8))

    monkeypatch.setattr(drawn.time, "sleep", wait)
    monkeypatch.setattr(drawn.time, "monotonic", lambda: clock[0])
    assert images.missing() == [1]  # a signal does not wait
    assert images.lost() == [] and len(waited) == 3
    (tmp_path / "b.png").unlink()
    assert images.lost() == [1] and clock[0] > 60


def test_a_batch_is_written_by_threads_and_is_there_or_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, write = threading.Barrier(4), drawn.save_png
    numbers = torch.arange(12, dtype=torch.uint8)

    def meeting(image: torch.Tensor, path: Path) -> None:
        together.wait(timeout=60)
        write(image, path)

    monkeypatch.setattr(drawn, "save_png", meeting)
    images = drawn.Drawn(tmp_path / "a", [f"{number}.png" for number in range(12)], {})
    images.save_batch(range(12), numbers[:, None, None, None].expand(-1, 1, 2, 2))
    assert images.missing() == []
    assert [int(images.read(number)[0, 0, 0]) for number in range(12)] == numbers.tolist()
    assert len(list((tmp_path / "a").iterdir())) == 13  # with the note, and nothing unfinished

    def full(image: torch.Tensor, path: Path) -> None:
        if path.name == "7.png":
            raise OSError(28, "No space left on device", str(path))
        write(image, path)

    monkeypatch.setattr(drawn, "save_png", full)
    images = drawn.Drawn(tmp_path / "b", [f"{number}.png" for number in range(12)], {})
    with pytest.raises(OSError, match=r"No space left.*7\.png"):
        images.save_batch(range(12), numbers[:, None, None, None].expand(-1, 1, 2, 2))
    assert 7 in images.missing() and all(file.stat().st_size for file in (tmp_path / "b").iterdir())


def test_other_settings_are_told_in_few_words(tmp_path: Path) -> None:
    """A data set's captions are thirty thousand lines."""
    prompts = [f"caption {number}" for number in range(30_000)]
    made_with = {"prompts": prompts, "autoencoder": {"spec": "a", "sha256": 64 * "a", "dtype": 64 * "b"}}
    images = drawn.Drawn(tmp_path, ["a.png"], made_with)
    images.save(0, torch.zeros(1, 2, 2, dtype=torch.uint8))
    others = {**made_with, "prompts": [*prompts[:17], "a red bus " * 40, *prompts[18:]]}
    with pytest.raises(
        UserError, match=r"30000 -> 30000 of them, number 18 from 'caption 17' to 'a red"
    ) as told:
        drawn.Drawn(tmp_path, ["a.png"], others).begin()
    assert len(str(told.value)) < 400
    others = {"prompts": prompts[:-1], "autoencoder": {**made_with["autoencoder"], "sha256": 64 * "c"}}
    told = r"30000 -> 29999 of them, number 30000 from 'caption 29999' to none; autoencoder: sha256 from 'aaa.* to 'ccc"
    with pytest.raises(UserError, match=told):
        drawn.Drawn(tmp_path, ["a.png"], others).begin()


def test_what_is_not_given_is_the_runs_own(run: str, tmp_path: Path, counted: list[int]) -> None:
    """Its section `sample`: 2 steps and guidance 1.4. Giving the same values is the same command."""
    command = [run, "--n", "4", "--npz", str(tmp_path / "a.npz"), "--png-dir", str(tmp_path / "png")]
    assert sample.main(command) == 0 and counted == [4]
    note = json.loads((tmp_path / "png" / drawn.NOTE).read_text())
    own = {"sampler": "dpm++", "steps": 2, "guidance": 1.4, "guidance_interval": [0.0, 1.0]}
    assert {name: note[name] for name in own} == own
    typed = ["--sampler", "dpm++", "--steps", "2", "--guidance", "1.4", "--guidance-interval", "0", "1"]
    typed += ["--guidance-rescale", "0"]
    for options in (typed, typed[:4]):
        assert sample.main([*command, *options]) == 0
        assert sample.main([*command[:-2], *options]) == 0
    assert counted == [4]
    with pytest.raises(UserError, match=r"other settings \(steps: 2 -> 50; guidance: 1.4 -> 1.5\)"):
        sample.main([*command, "--steps", "50", "--guidance", "1.5"])


def test_an_export_without_a_section_is_drawn_with_defaults(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = stripped(run, tmp_path / "export")
    assert sample.main([str(export), "--n", "1", "--png-dir", str(tmp_path / "png")]) == 0
    note = json.loads((tmp_path / "png" / drawn.NOTE).read_text())
    defaults = json.loads(json.dumps(sampling.DEFAULTS))
    assert {name: note[name] or 0.0 for name in defaults} == defaults
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "{sampler}, {steps} steps, guidance {guidance}".format(**defaults) in told
    for name in defaults:
        assert f"sample.{name} of the run" in told


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"guidance": "much"}, "guidance 'much' is no number"),
        ({"steps": 0}, "0 sampling steps were asked for"),
        ({"sampler": "magic"}, "sampler 'magic' is unknown"),
    ],
)
def test_a_section_that_means_nothing_is_refused(
    run: str, tmp_path: Path, section: dict[str, object], expected: str
) -> None:
    export = stripped(run, tmp_path / "export", **section)
    with pytest.raises(UserError, match=expected):
        sample.main([str(export), "--n", "1", "--png-dir", str(tmp_path / "png")])


def test_another_size_is_another_image(run: str, tmp_path: Path, counted: list[int]) -> None:
    npz, folder = tmp_path / "a.npz", tmp_path / "png"
    command = [run, "--n", "3", "--size", "16x12", "--npz", str(npz), "--png-dir", str(folder)]
    assert sample.main(command) == 0 and counted == [3]
    assert sample.main(command) == 0 and sample.main(command[:-2]) == 0 and counted == [3]
    assert json.loads((folder / drawn.NOTE).read_text())["size"] == [16, 12]
    with np.load(npz) as file:
        assert file["arr_0"].shape == (3, 16, 12, 3)
    assert {Image.open(path).size for path in folder.glob("*.png")} == {(12, 16)}  # width first
    for size, told in (("16", r"\[16, 12\] -> \[16, 16\]"), ("8", r"\[16, 12\] -> None")):
        with pytest.raises(UserError, match=rf"other settings \(size: {told}\)"):
            sample.main([*command, "--size", size])
    npz.unlink()  # it would be refused, as the folder is
    command[4] = "8x8"  # which is what it was trained at
    assert sample.main(command[:-2]) == 0 and sum(counted) == 6
    del command[3:5]
    assert sample.main(command[:-2]) == 0 and sum(counted) == 6


def test_a_folder_from_before_there_were_sizes_is_gone_on_with(
    run: str, tmp_path: Path, counted: list[int]
) -> None:
    folder = tmp_path / "png"
    command = [run, "--n", "3", "--png-dir", str(folder)]
    assert sample.main(command) == 0
    note = json.loads((folder / drawn.NOTE).read_text())
    later = {key for key, value in note.items() if value is None}
    assert later == {"size", "guidance_rescale"}
    (folder / drawn.NOTE).write_text(
        json.dumps({key: value for key, value in note.items() if key not in later})
    )
    next(folder.glob("*.png")).unlink()
    assert sample.main(command) == 0 and counted == [3, 1]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("7", "size 7x7: tiny draws multiples of 2 pixels"),
        ("big", "--size 'big': give HEIGHTxWIDTH in pixels, such as 320x256"),
        ("8x", "--size '8x': give HEIGHTxWIDTH"),
        ("0", "give height and width in pixels"),
        ("99999", "16384 at most"),
    ],
)
def test_a_size_that_cannot_be_drawn_is_refused(run: str, tmp_path: Path, size: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        sample.main([run, "--size", size, "--png-dir", str(tmp_path / "png")])
    assert not list(tmp_path.iterdir())


def stripped(run: str, folder: Path, **section: object) -> Path:
    """The export of `run`, with `section` for its own settings of sampling."""
    shutil.copytree(Path(run, "export"), folder)
    (folder / "manifest.json").unlink()
    facts = json.loads((folder / "run.json").read_text())
    del facts["config"]["sample"]
    if section:
        facts["config"]["sample"] = section
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def test_images_of_other_settings_are_never_mixed(run: str, tmp_path: Path) -> None:
    folder = tmp_path / "png"
    command = [run, "--n", "4", "--steps", "1", "--png-dir", str(folder)]
    assert sample.main(command) == 0
    before = pictures(folder)
    for option, told in (
        (["--guidance", "3"], r"guidance: 1.4 -> 3.0"),
        (["--steps", "2"], r"steps: 1 -> 2"),
        (["--sampler", "ddim"], r"sampler: dpm\+\+ -> ddim"),
        (["--precision", "bf16"], "precision: fp32 -> bf16"),
        (["--guidance-rescale", "0.7"], "guidance_rescale: None -> 0.7"),
    ):
        with pytest.raises(UserError, match=rf"drawn with other settings \({told}\); give another place"):
            sample.main([*command, *option])
    assert pictures(folder) == before
    assert sample.main([*command[:2], "6", *command[3:]]) == 0  # more of the same
    assert before.items() < pictures(folder).items() and len(pictures(folder)) == 6
    (folder / drawn.NOTE).unlink()
    with pytest.raises(
        UserError, match=r"holds 000000_label0_seed0.png, and no .drawn.json that says what drew"
    ):
        sample.main(command)


def test_a_folder_with_other_files_is_not_drawn_into(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of somebody's own pictures stays that; images of other seeds lie together, and it is said."""
    folder = tmp_path / "png"
    folder.mkdir()
    command = [run, "--n", "2", "--steps", "1", "--png-dir", str(folder)]
    (folder / "mine.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds mine\.png, which was not drawn here; give an empty folder"):
        sample.main(command)
    assert [path.name for path in folder.iterdir()] == ["mine.png"]
    (folder / "mine.png").unlink()
    assert sample.main(command) == 0
    assert capsys.readouterr().out == f"{folder}: 2 PNG files\n"
    assert sample.main([*command, "--seeds", "7", "--grid", str(folder / "grid.png")]) == 0
    capsys.readouterr()
    assert sample.main([*command, "--seeds", "7"]) == 0
    assert capsys.readouterr().out == f"{folder}: 2 PNG files, beside 2 of other commands\n"


def test_16_bits_draw_nearly_the_same(run: str, tmp_path: Path) -> None:
    images = {}
    assert tuple(ARITHMETIC) == sample.PRECISIONS
    for precision in sample.PRECISIONS:
        folder = tmp_path / precision
        assert (
            sample.main([run, "--n", "8", "--steps", "3", "--precision", precision, "--png-dir", str(folder)])
            == 0
        )
        images[precision] = np.stack(
            [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
        ).astype(int)
    off = {precision: np.abs(images["fp32"] - images[precision]).mean() for precision in ("bf16", "fp16")}
    assert 0 < off["fp16"] < off["bf16"] < 2  # of 255


def test_the_weights_are_known_again(run: str, tmp_path: Path) -> None:
    from ldm_dcn.export import load_model

    model = load_model(run)
    before = drawn.weights_hash(model.denoiser)
    assert drawn.weights_hash(load_model(run).denoiser) == before
    with torch.no_grad():
        next(model.denoiser.parameters()).view(-1)[0] += 1e-3
    assert drawn.weights_hash(model.denoiser) != before


def test_a_power_cut_and_damage_are_seen(run: str, tmp_path: Path, counted: list[int]) -> None:
    folder = tmp_path / "png"
    command = [run, "--n", "4", "--steps", "1", "--png-dir", str(folder), "--npz", str(tmp_path / "a.npz")]
    assert sample.main(command) == 0
    first, second = sorted(folder.glob("*.png"))[:2]
    whole = first.read_bytes()
    first.write_bytes(b"")
    counted.clear()
    assert sample.main(command) == 0
    assert counted == [1] and first.read_bytes() == whole
    second.write_bytes(second.read_bytes()[:40])
    with pytest.raises(
        UserError, match=rf"{re.escape(str(second))} cannot be read .*; delete it and run the same"
    ):
        sample.main(command)
    second.unlink()
    assert sample.main(command) == 0


def test_an_npz_scores_as_the_run_that_it_was_drawn_from(run: str, tmp_path: Path) -> None:
    """As docs/training.md has it: where a job may be stopped, `sample.py` draws what `eval.fid` would."""
    npz = tmp_path / "samples.npz"
    settings = ["--sampler", "dpm++", "--steps", "2", "--guidance", "2", "--guidance-interval", "0", "1"]
    assert sample.main([run, "--n", "45", *settings, "--guidance-rescale", "0", "--npz", str(npz)]) == 0
    drawn = fid.evaluate([run], num=45, labels="balanced", steps=2, guidance=[2.0], progress=False)
    scored = fid.evaluate([str(npz)], reference="digits", image_size=8, progress=False)
    expected = drawn.columns[0].scores
    del expected["images_per_second"]
    assert scored.columns[0].scores == expected and len(expected) > 6
    assert scored.columns[0].tags["source"] == str(npz)


def test_two_processes_draw_the_files_of_one(run: str, tmp_path: Path) -> None:
    def command(name: str) -> list[str]:
        outputs = ["--png-dir", str(tmp_path / name), "--npz", str(tmp_path / f"{name}.npz")]
        return [run, "--count", "11", "--steps", "2", "--batch-size", "2", *outputs]

    assert sample.main(command("one")) == 0
    run_together("sample.py", *command("two"))
    assert len(pictures(tmp_path / "one")) == 11
    assert pictures(tmp_path / "one") == pictures(tmp_path / "two")
    assert arrays(tmp_path / "one.npz") == arrays(tmp_path / "two.npz")


def test_a_grid_replaces_no_file_of_another_kind(run: str, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("run: {name: mine}\n")
    command = [run, "--n", "1", "--steps", "1", "--grid"]
    with pytest.raises(
        UserError, match=r"--grid .*mine.yaml: there is a file that is no PNG; remove it, or give"
    ):
        sample.main([*command, str(config)])
    assert config.read_text() == "run: {name: mine}\n"
    for _ in range(2):  # a grid replaces a grid
        assert sample.main([*command, str(tmp_path / "grid.png")]) == 0
