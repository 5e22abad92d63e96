"""What a run can be asked beyond the recipe: other number formats and averages, FSDP, pretrained networks, caches, text."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from eval import fid
from eval.on_the_way import OnTheWay
from ldm_dcn import checkpoint, latents, metrics, opening, posthoc_ema, trainer
from ldm_dcn.config import Config, load_config
from ldm_dcn.errors import UserError
from ldm_dcn.export import load_model
from ldm_dcn.launch import check_plugins
from ldm_dcn.matching import Matching
from ldm_dcn.model import Model
from ldm_dcn.opening import open_run
from ldm_dcn.pipeline import LatentDiffusion
from ldm_dcn.processes import Processes
from ldm_dcn.run import Run
from ldm_dcn.sampling import generate
from ldm_dcn.signals import StopSignals
from ldm_dcn.swap import apply_swap, plan_swap
from ldm_dcn.trainer import train, training_step
from ldm_dcn.unet import build_unet, set_attention
from programs import run_together
from tiny import ROOT, WHOLE, setting, tiny_config, write_config

pytestmark = pytest.mark.usefixtures("one_thread_and_a_fresh_accelerator")


def lines(config: Config) -> list[dict]:
    return metrics.read(config.folder / "metrics.jsonl")


def losses(config: Config, key: str = "loss") -> list[float]:
    return [line[key] for line in lines(config) if key in line]


# ------------------------------------------------------------------------------------------------ objectives


@pytest.mark.parametrize(
    "overrides",
    [
        ("diffusion.prediction=v", "train.min_snr_gamma=5"),
        ("diffusion.prediction=x0",),
        ("diffusion.prediction=flow", "train.times=lognormal", "train.stratified_times=true"),
    ],
    ids=["v", "x0", "flow"],
)
def test_every_objective_learns_and_draws_what_it_exported(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    config = tiny_config(tmp_path, "train.steps=40", "train.log_every=10", "train.save_every=0", *overrides)
    assert train(config) == 0
    assert losses(config)[-1] < losses(config)[0]
    with open_run(config) as run, run.averages[0].in_place():
        expected = generate(run.averaged_model(), [1, 2], [3, 4], steps=3)
    assert torch.equal(generate(load_model(config.folder), [1, 2], [3, 4], steps=3), expected)


def test_stratified_times_meet_every_share_once_a_batch(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.stratified_times=true", "train.batch_size=50")
    with open_run(config) as run:
        for step in (0, 7):
            times = run.batches.times(run.batches.positions(step, 0))
            assert torch.equal(times * 50 // 1000, torch.arange(50))
        assert not torch.equal(run.batches.times(range(0, 50)), run.batches.times(range(50, 100)))


# ------------------------------------------------------------------------------------------------ number formats


def test_fp16_takes_an_overflowing_step_again_at_half_the_scale(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.precision=fp16")
    with open_run(config) as run:
        run.state.loss_scale = 2.0**27  # overflows until it is small enough
        before = {name: p.detach().clone() for name, p in run.denoiser.named_parameters()}
        assert training_step(run, StopSignals()) is None
        assert all(torch.equal(p, before[name]) for name, p in run.denoiser.named_parameters())
        assert (run.state.step, run.state.overflows, run.state.loss_scale) == (0, 1, 2.0**26)
        while (loss := training_step(run, StopSignals())) is None:
            pass
        run.record(loss)
        assert run.state.step == 1 and run.state.overflows > 3
        run.save()
        state = run.state
    with open_run(config) as run:
        assert run.state == state


def test_fp16_learns_what_fp32_learns(tmp_path: Path) -> None:
    configs = [tiny_config(tmp_path, f"train.precision={p}", f"run.name={p}") for p in ("fp32", "fp16")]
    assert [train(config) for config in configs] == [0, 0]
    assert losses(configs[1]) == pytest.approx(losses(configs[0]), rel=0.02)
    assert lines(configs[1])[-1]["loss_scale"] == 2.0**16 and lines(configs[1])[-1]["overflows"] == 0


def test_fp16_stops_where_no_scale_mends_the_gradient(tmp_path: Path) -> None:
    """A NaN that only the backward pass makes: the loss is finite, and halving its scale would go on for ever."""
    config = tiny_config(tmp_path, "train.precision=fp16", "train.skip_non_finite=1")
    with open_run(config) as run:
        for _ in range(2):
            run.record(training_step(run, StopSignals()))
        run.save()
        before = {name: p.detach().clone() for name, p in run.denoiser.named_parameters()}
        parameter = next(iter(run.denoiser.parameters()))
        hook = parameter.register_hook(lambda gradient: gradient * math.nan)
        for taken_again in (1, 2):
            for _ in range(trainer.OVERFLOWS_IN_A_ROW):
                assert training_step(run, StopSignals()) is None
            assert run.state.loss_scale == 2.0**16 / 2**trainer.OVERFLOWS_IN_A_ROW
            if taken_again == 1:  # train.skip_non_finite leaves the batch out, and the scale is what it was
                loss = training_step(run, StopSignals())
                assert math.isnan(loss)
                run.record(loss)
                assert (run.state.left_out, run.state.loss_scale) == (1, 2.0**16)
        told = r"step 4: the loss is 0\.\d+ and the gradient's norm nan after 12 halvings of fp16's loss scale, down to 16; the"
        with pytest.raises(trainer.NonFinite, match=told):
            training_step(run, StopSignals())
        assert all(torch.equal(p, before[name]) for name, p in run.denoiser.named_parameters())
        hook.remove()
    with open_run(config) as run:
        assert (run.state.step, run.state.loss_scale) == (2, 2.0**16)
        assert math.isfinite(training_step(run, StopSignals()))


def test_the_loss_scale_grows_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "GROWTH_STEPS", 3)
    monkeypatch.setattr(opening, "FIRST_LOSS_SCALE", 16.0)  # far from an overflow
    config = tiny_config(tmp_path, "train.precision=fp16", "train.steps=7", "train.save_every=0")
    assert train(config) == 0
    assert [line["loss_scale"] / 16 for line in lines(config)] == [1, 1, 2, 2, 2, 4, 4]


def test_batches_with_nan_are_left_out_as_often_as_allowed(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.skip_non_finite=1", "train.steps=6")
    with open_run(config) as run:
        good = run.latents.moments.clone()
        bad_step(run, 0)
        loss = training_step(run, StopSignals())
        assert math.isnan(loss)
        run.record(loss)
        run.latents.moments.copy_(good)
        for _ in range(2):
            run.record(training_step(run, StopSignals()))
        assert run.state.step == 3 and run.state.left_out == 1 and run.state.loss_count == 2
        bad_step(run, 3)
        with pytest.raises(trainer.NonFinite, match=r"step 4: the loss is nan.*train.skip_non_finite"):
            training_step(run, StopSignals())
    assert (config.folder / "nonfinite-step-1.json").exists()


def test_fp16_does_not_take_a_broken_sample_for_an_overflow(tmp_path: Path) -> None:
    """The loss scale stays: at 1, where halving for it would end, gradients vanish for thousands of steps."""
    config = tiny_config(tmp_path, "train.precision=fp16", "train.skip_non_finite=1")
    with open_run(config) as run:
        bad_step(run, 0)
        loss = training_step(run, StopSignals())
        assert loss is not None and math.isnan(loss)
        assert run.state.left_out == 1 and run.state.overflows == 0
        assert run.state.loss_scale == 2.0**16


def bad_step(run: Run, step: int) -> None:
    run.latents.moments[run.batches.order[run.batches.positions(step, 0)][2]] = float("nan")


# ------------------------------------------------------------------------------------------------ averages


def test_power_averages_resume_exactly_and_give_any_width_afterwards(tmp_path: Path) -> None:
    settings = ("train.ema=power", "train.ema_snapshot_every=4", "train.steps=16", "train.save_every=4")
    whole, parts = (tiny_config(tmp_path, *settings, f"run.name={name}") for name in ("whole", "parts"))
    assert train(whole) == 0
    with open_run(parts) as run:
        for _ in range(6):
            run.record(training_step(run, StopSignals()))
            if run.due(4):
                run.snapshot()
                run.save()
    assert train(parts) == 0
    for group in ("ema", "ema_2"):
        ours, theirs = (
            load_file(c.folder / "checkpoints" / "step-16" / f"{group}.safetensors") for c in (whole, parts)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert load_model(whole.folder).tags["weights"] == "power EMA 0.05"

    out = tmp_path / "wide"
    assert posthoc_ema.main([str(whole.folder), "--width", "0.1", "--out", str(out)]) == 0
    kept = load_file(whole.folder / "checkpoints" / "step-16" / "ema_2.safetensors")
    made = load_model(out)
    (whole.folder / "averages" / "step-16.copy").mkdir()  # is none of ours
    assert posthoc_ema.main([str(whole.folder), "--width", "0.1", "--out", str(out)]) == 0
    for name, p in made.denoiser.named_parameters():
        torch.testing.assert_close(p, kept[name], rtol=2e-3, atol=2e-4)  # snapshots are fp16
    assert made.tags["weights"] == "power EMA 0.1, post hoc"
    with pytest.raises(UserError, match=r"no snapshot of step 5; there are those of 4, 8, 12, 16"):
        posthoc_ema.main([str(whole.folder), "--width", "0.1", "--step", "5", "--out", str(out)])


def test_an_average_that_no_snapshots_make_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.ema=power", "train.ema_snapshot_every=4")
    assert train(config) == 0
    command = [str(config.folder), "--out", str(tmp_path / "out"), "--width"]
    for width in ("0.02", "0.25"):
        with pytest.raises(
            UserError, match=rf"widths 0.05 and 0.1, comes near width {width} at step 8: .*% off"
        ):
            posthoc_ema.main([*command, width])
    assert not (tmp_path / "out").exists()


def test_a_second_average_is_not_made_up_at_a_resume(tmp_path: Path) -> None:
    assert train(tiny_config(tmp_path, "train.steps=1")) == 0
    power = tiny_config(tmp_path, "train.steps=2", "train.ema=power")
    with pytest.raises(UserError, match=r"keeps one average .* takes two; set train.ema=constant"):
        train(power, ["train.ema"])


def test_exports_of_single_steps_stay_and_are_scored_side_by_side(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.steps=6", "train.save_every=0", "train.export_every=2")
    assert train(config) == 0
    exports = [config.folder / "exports" / f"step-{step}" for step in (2, 4, 6)]
    assert [load_model(folder).step for folder in exports] == [2, 4, 6]
    newest = load_model(config.folder)
    for p, kept in zip(
        newest.denoiser.parameters(), load_model(exports[2]).denoiser.parameters(), strict=True
    ):
        assert torch.equal(p, kept)
    table = fid.evaluate([str(folder) for folder in exports[:2]], num=20, steps=1, progress=False)
    assert [column.name for column in table.columns[:2]] == ["tiny step 2 g=1", "tiny step 4 g=1"]

    again = tiny_config(tmp_path, "train.steps=3", "train.save_every=3", "train.export_every=2", name="again")
    assert train(again) == 0
    shutil.copytree(exports[2], again.folder / "exports" / "step-6")  # of a life that is taken back
    with open_run(again):
        assert sorted(path.name for path in (again.folder / "exports").iterdir()) == ["step-2"]


# ------------------------------------------------------------------------------------------------ processes


def test_fsdp_goes_on_from_one_process_and_one_process_from_fsdp(tmp_path: Path) -> None:
    """Steps 1 to 3 in one process, 4 to 6 shared out on two, 7 and 8 in one again: the losses of eight in one."""
    swap = (
        "model.swap={sites: [resnet], group_channels: 4}",
        setting("model.unet", WHOLE),
        "data.split=train",
    )
    every = ("train.sample_every=6", "train.validate_every=6", "train.validation_images=50")
    every += ("train.score_every=6", "sample.score_extractor=digits", "sample.score_images=300")
    one = tiny_config(tmp_path, *swap, *every, name="one")
    assert train(one, score=OnTheWay(one)) == 0

    path = write_config(tmp_path, "shared")
    assert train(load_config(path, [*swap, "train.steps=3"])) == 0
    settings = ("train.steps=6", "train.parallel=fsdp", "train.export_every=6", *every)
    run_together("train.py", str(path), *swap, *settings)
    shared = load_config(path, [*swap, "train.steps=6"])
    assert load_model(shared.folder).step == load_model(shared.folder / "exports" / "step-6").step == 6
    grids = [Image.open(config.folder / "samples" / "step-6.png") for config in (shared, one)]
    assert np.abs(np.array(grids[0]).astype(int) - np.array(grids[1])).max() <= 2  # the averaged weights
    validated = losses(shared, "validation_loss")
    assert len(validated) == 1 and validated == pytest.approx(losses(one, "validation_loss"), rel=1e-4)
    scores = [losses(config, "fd_digits-v1") for config in (shared, one)]
    assert len(scores[0]) == 1 and scores[0] == pytest.approx(scores[1], rel=1e-3)
    assert train(load_config(path, swap)) == 0
    assert losses(shared) == pytest.approx(losses(one), rel=1e-4)


def test_two_processes_share_the_drawing_of_grids_and_scores(tmp_path: Path) -> None:
    settings = (
        "train.steps=2",
        "train.sample_every=2",
        "train.score_every=2",
        "sample.score_extractor=digits",
    )
    settings += ("sample.score_images=300", "sample.batch_size=8")
    one = write_config(tmp_path, "one")
    run_together("train.py", str(one), *settings, processes=1)
    two = write_config(tmp_path, "two")
    run_together("train.py", str(two), *settings)
    ours, theirs = load_config(two, settings), load_config(one, settings)
    grids = [Image.open(config.folder / "samples" / "step-2.png") for config in (ours, theirs)]
    assert np.abs(np.array(grids[0]).astype(int) - np.array(grids[1])).max() <= 2
    assert losses(ours, "fd_digits-v1") == pytest.approx(losses(theirs, "fd_digits-v1"), rel=1e-3)
    assert losses(ours, "N") == [300]


def test_sigusr1_saves_and_asks_to_be_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path)
    real = trainer.training_step

    def interrupted(run: Run, stop: StopSignals) -> float | None:
        if run.state.step == 4:
            signal.raise_signal(signal.SIGUSR1)
        return real(run, stop)

    monkeypatch.setattr(trainer, "training_step", interrupted)
    assert train(config) == 0
    assert checkpoint.newest(config.folder / "checkpoints", print).name == "step-5"


def test_sigusr1_before_the_first_step_asks_to_be_started_again_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(latents, "encode_dataset", lambda *_: signal.raise_signal(signal.SIGUSR1))
    with pytest.raises(SystemExit) as left:
        train(tiny_config(tmp_path))
    assert left.value.code == 0 and signal.getsignal(signal.SIGUSR1) is before


def test_a_signal_ends_the_drawing_and_the_step_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(
        tmp_path, "train.sample_every=3", "train.score_every=3", "train.save_every=0", "sample.batch_size=2"
    )
    drawn = []

    def score(model: Model, count: int, _: Processes) -> dict[str, object]:
        generate(model, [0] * count, range(count), steps=1, batch_size=1, progress=count_and_signal)
        raise AssertionError("drawing should have ended")

    def count_and_signal(count: int) -> None:
        drawn.append(count)
        if len(drawn) == 3:
            signal.raise_signal(signal.SIGTERM)

    assert train(config, score=score) == 128 + signal.SIGTERM
    assert len(drawn) == 3
    assert checkpoint.newest(config.folder / "checkpoints", print).name == "step-3"
    said = capsys.readouterr().err
    assert "asked to stop, the score waits until the run goes on" in said and "step 3 is saved" in said
    scored = []
    assert train(config, score=lambda model, *_: scored.append(model.step) or {"fd_x": 1.0}) == 0
    assert scored == list(range(3, config.train.steps + 1, 3))


def test_what_a_kill_left_undone_is_made_up_for(tmp_path: Path) -> None:
    """Grid, score and validation of a step come after its save; the same command again makes those that are missing."""
    due = [f"train.{what}_every=3" for what in ("save", "sample", "score", "validate")]
    config = tiny_config(tmp_path, "train.steps=6", "data.split=train", "train.validation_images=8", *due)
    scored = []

    def score(model: Model, *_: object) -> dict[str, float]:
        scored.append(model.step)
        weights = torch.cat([p.flatten() for p in model.denoiser.parameters()])
        return {"fd_x": float(weights.square().sum())}

    assert train(config, score=score) == 0
    lines, grid = metrics.read(config.folder / "metrics.jsonl"), config.folder / "samples" / "step-6.png"
    picture = grid.read_bytes()
    kept = [line for line in lines if line["step"] < 6 or "loss" in line]
    (config.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    grid.unlink()
    for _ in range(2):  # the second time nothing is missing
        assert train(config, score=score) == 0
        assert scored == [3, 6, 6]
        assert grid.read_bytes() == picture and metrics.read(config.folder / "metrics.jsonl") == lines


@pytest.mark.parametrize(
    ("name", "mend"), [("ACCELERATE_USE_FSDP", "fsdp"), ("ACCELERATE_USE_DEEPSPEED", "zero")]
)
def test_accelerates_own_plugins_are_refused_with_the_right_setting(name: str, mend: str) -> None:
    with pytest.raises(UserError, match=f"accelerate was told to use .*set train.parallel={mend}"):
        check_plugins({name: "true"})
    check_plugins({name: "false"})


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("train.attention=flash",), "train.attention=flash needs a CUDA GPU"),
        (("train.match_steps=2",), "are for a swapped pretrained U-Net; set model.pretrained"),
        (("train.parallel=fsdp", "train.new_only_steps=2"), "do those steps with train.parallel=ddp"),
        (("train.parallel=zero", "train.match_steps=2"), "do those steps with train.parallel=ddp"),
        (("data.condition=text",), "holds no text; encode it with --text-encoder"),
        (("data.flip=true",), "holds no mirrored latents; encode it with --flip"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, overrides: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        train(tiny_config(tmp_path, *overrides))


# ------------------------------------------------------------------------------------------------ pretrained networks


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small U-Net in a pipeline's layout."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("pretrained")
    build_unet(WHOLE).save_pretrained(folder / "unet")
    return folder


def test_new_blocks_learn_the_old_ones_outputs_first(pretrained: Path, tmp_path: Path) -> None:
    """After the matching phase the swapped network is near the old one; the old weights have not moved."""
    config = tiny_config(
        tmp_path,
        "model.unet=null",
        f"model.pretrained={pretrained}",
        "model.swap={sites: [resnet], group_channels: 4}",
        "train.match_steps=60",
        "train.new_only_steps=62",
        "train.steps=64",
        "train.lr=1e-2",
        "train.save_every=60",
        "train.log_every=1",
    )
    assert train(config) == 0
    matching = [line["loss"] for line in lines(config) if line.get("phase") == "match"]
    assert len(matching) == 60 and matching[-1] < 0.35 * matching[0]
    assert [line.get("phase") for line in lines(config)[59:]] == ["match", "new", "new", None, None]

    old = load_file(pretrained / "unet" / "diffusion_pytorch_model.safetensors")
    new = load_file(config.folder / "checkpoints" / "step-60" / "model.safetensors")
    sites = [site.name for site in plan_swap(build_unet(WHOLE), sites=["resnet"], group_channels=4)]
    stayed = [name for name in old if not name.startswith(tuple(f"{site}." for site in sites))]
    assert stayed and all(torch.equal(new[f"unet.{name}"], old[name]) for name in stayed)
    end = load_file(config.folder / "checkpoints" / "step-64" / "model.safetensors")
    assert not all(torch.equal(end[f"unet.{name}"], old[name]) for name in stayed)


def test_matching_runs_the_network_on_its_old_blocks(pretrained: Path) -> None:
    unet = build_unet(WHOLE)
    plan = plan_swap(unet, sites=["resnet", "self_attention"], group_channels=4)
    originals = {site.name: unet.get_submodule(site.name) for site in plan}
    x, t, tokens = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.randn(2, 1, 8)
    with torch.no_grad():
        expected = unet(x, t, tokens).sample
    apply_swap(unet, plan)
    for name, p in unet.named_parameters():
        p.requires_grad_(name.startswith(tuple(originals)))
    made, old = [], []
    for name, block in originals.items():
        unet.get_submodule(name).register_forward_hook(lambda *given: made.append(given[-1]))
        block.register_forward_hook(lambda *given: old.append(given[-1]))
    matching = Matching(unet, originals)
    with matching.attached():
        assert torch.equal(unet(x, t, tokens).sample, expected)
    # In units of the variance: whoever gives the mean of the old output is wrong by 1.
    errors = [(new - known).square().mean() / known.var() for new, known in zip(made, old, strict=True)]
    torch.testing.assert_close(matching.error, torch.stack(errors).mean())
    matching.error.backward()
    learnt = {name for name, p in unet.named_parameters() if p.grad is not None}
    assert learnt and all(name.startswith(tuple(originals)) for name in learnt)
    with torch.no_grad():
        assert not torch.equal(unet(x, t, tokens).sample, expected)  # detached again


def test_a_pretrained_network_may_be_swapped_in_part(pretrained: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        "model.unet=null",
        f"model.pretrained={pretrained / 'unet'}",
        "model.swap={sites: [resnet], include: ['mid_block'], group_channels: 4}",
        "train.steps=2",
    )
    assert train(config) == 0
    card = (config.folder / "export" / "README.md").read_text()
    assert "mid_block.resnets.0.conv1" in card and "down_blocks.0.resnets.0.conv1" not in card
    pictures = LatentDiffusion.from_pretrained(config.folder)(labels=[1, 2], steps=2, seed=4)
    assert [picture.size for picture in pictures] == [(8, 8), (8, 8)]


def test_a_network_that_predicts_something_else_is_refused(pretrained: Path, tmp_path: Path) -> None:
    """Such as Stable Diffusion 2.1, which predicts v."""
    shutil.copytree(pretrained, tmp_path / "sd21")
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "sd21" / "scheduler")
    settings = ("model.unet=null", f"model.pretrained={tmp_path / 'sd21'}", "train.steps=1")
    with pytest.raises(UserError, match=r"sd21 predicts v, and .*; set diffusion.prediction=v, or"):
        train(tiny_config(tmp_path, *settings))
    assert train(tiny_config(tmp_path, *settings, "diffusion.prediction=v")) == 0
    alone = (
        "model.unet=null",
        f"model.pretrained={tmp_path / 'sd21' / 'unet'}",
        "train.steps=1",
        "run.name=alone",
    )
    assert train(tiny_config(tmp_path, *alone)) == 0


def test_two_processes_match_and_thaw_like_one(pretrained: Path, tmp_path: Path) -> None:
    """The error of a matched block is relative to its process's share of the batch, so that it is not quite the same."""
    settings = [
        "model.unet=null",
        f"model.pretrained={pretrained}",
        "model.swap={sites: [resnet, self_attention], group_channels: 4}",
        "train.match_steps=3",
        "train.new_only_steps=5",
        "train.gradient_accumulation=2",
        "train.gradient_checkpointing=true",
    ]
    one, two = (write_config(tmp_path, name) for name in ("one", "two"))
    run_together("train.py", str(two), *settings)
    assert train(load_config(one, settings)) == 0
    ours, theirs = (lines(load_config(path, settings)) for path in (two, one))
    assert [line.get("phase") for line in ours] == 3 * ["match"] + 2 * ["new"] + 3 * [None]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=3e-3)


def test_a_missing_pretrained_network_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder: nowhere; model\.pretrained names .*at each start"):
        train(tiny_config(tmp_path, "model.unet=null", "model.pretrained=nowhere"))


# ------------------------------------------------------------------------------------------------ scores on the way


def test_scores_on_the_way_carry_their_tags(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.steps=4", "train.score_every=2", "sample.score_images=20")
    asked = []

    def score(model: object, count: int, _: Processes) -> dict[str, object]:
        asked.append((model.step, count))
        return {"fd": 1.5, "guidance": 1.0, "N": count}

    assert train(config, score=score) == 0
    assert asked == [(2, 20), (4, 20)]
    assert [line for line in lines(config) if "fd" in line] == [
        {"step": 2, "fd": 1.5, "guidance": 1.0, "N": 20},
        {"step": 4, "fd": 1.5, "guidance": 1.0, "N": 20},
    ]
    json.dumps(lines(config))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("data.source={cache}",), "is a latent cache.*set sample.score_reference to the images"),
        (("data.condition=text",), "data.condition=text; set train.score_every=0"),
        (("sample.score_extractor=null",), "sample.score_extractor is not set; set it to"),
        (
            ("sample.score_reference={two}",),
            "two has 2 classes, the model 10; set sample.score_reference to images of the classes",
        ),
        (
            ("sample.score_reference={two}", "data.source={other}", "data.num_classes=2"),
            "class 1 is 'c' to the model and 'b' in the reference .*two; set sample.score_reference to .* drawn alike$",
        ),
    ],
)
def test_scores_that_cannot_be_had_are_refused_at_the_start(
    tmp_path: Path, overrides: tuple[str, ...], expected: str
) -> None:
    from eval.on_the_way import OnTheWay

    cache = tmp_path / "cache"
    (cache / "shards").mkdir(parents=True)
    (cache / "manifest.json").touch()
    two, other = tmp_path / "two", tmp_path / "other"
    for folder in (two / "a", two / "b", other / "a", other / "c"):
        folder.mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / "0.png")
    places = {"cache": cache, "two": two, "other": other}
    settings = ("sample.score_extractor=digits", *(text.format(**places) for text in overrides))
    with pytest.raises(UserError, match=expected):
        OnTheWay(tiny_config(tmp_path, *settings))


def test_train_scores_with_the_extractor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train as program

    path = str(write_config(tmp_path))
    settings = ["train.steps=2", "train.score_every=2", "sample.score_images=20", "train.save_every=0"]
    monkeypatch.setattr(sys, "argv", ["train.py", path, *settings, "sample.score_extractor=digits"])
    assert program.main() == 0
    scored = [line for line in lines(load_config(path)) if "fd_digits-v1" in line]
    assert len(scored) == 1 and scored[0]["fd_digits-v1"] > 0
    expected = {"N": 20, "guidance": 1.4, "sampler": "dpm++", "sampler_steps": 2, "weights": "EMA 0.9999"}
    assert expected.items() <= scored[0].items() and scored[0]["reference"] == "digits"

    monkeypatch.setattr(sys, "argv", ["train.py", path, *settings, "run.name=other"])
    with pytest.raises(UserError, match=r"sample.score_extractor is not set; set it to digits"):
        program.main()


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(
        UserError, match=r"wandb, which is not installed; run `pip install -c constraints\.txt wandb`"
    ):
        train(tiny_config(tmp_path, "train.trackers=[wandb]"))


def test_weights_and_biases_goes_on_with_the_same_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every start of a run is told to wandb under one id, with the run's settings, and every line goes there too."""
    from accelerate import utils

    begun: list[dict[str, object]] = []
    logged: list[tuple[int, dict[str, object]]] = []

    class Begun:
        config = SimpleNamespace(update=lambda settings, **_: begun[-1].update(settings=settings))

        def log(self, values: dict[str, object], step: int, **_: object) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            begun[-1]["finished"] = True

    def init(**options: object) -> Begun:
        begun.append(options)
        return Begun()

    wandb = ModuleType("wandb")
    wandb.init, wandb.config = init, Begun.config
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(utils, "is_wandb_available", lambda: True)
    config = tiny_config(tmp_path, "train.trackers=[wandb]", "train.steps=3")
    assert train(config) == 0
    assert train(tiny_config(tmp_path, "train.trackers=[wandb]", "train.steps=5")) == 0
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5]
    assert [values["loss"] for _, values in logged] == losses(config)
    assert begun[0]["id"] == begun[1]["id"] and all(run["resume"] == "allow" for run in begun)
    assert all(run["name"] == "tiny" and run["finished"] for run in begun)
    assert begun[0]["settings"] == config.resolved()


def test_attention_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would meet; without one, either is refused before (`test_what_cannot_be_is_refused`)."""
    unet = build_unet(WHOLE)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    expected = {"flash": "this PyTorch was built without it; use train.attention=sdpa"}
    if not importlib.util.find_spec("xformers"):
        expected["xformers"] = "run `pip install -c constraints.txt xformers`, or use train.attention=sdpa"
    for backend, mend in expected.items():
        with (
            pytest.raises(UserError, match=f"train.attention={backend}: .*{mend}"),
            set_attention(unet, backend),
        ):
            pass


def test_flash_attention_is_for_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids and scores are drawn in fp32, and by an autoencoder whose attention no FlashAttention takes."""
    monkeypatch.setattr(opening, "_check_settings", lambda *_: None)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    allowed, real = {}, trainer.batch_loss

    def note(what: str) -> None:
        allowed[what] = torch.backends.cuda.math_sdp_enabled()

    def loss(*arguments: object) -> torch.Tensor:
        note("training")
        return real(*arguments)

    def draw(*_: object) -> dict[str, object]:
        note("drawing")
        return {}

    monkeypatch.setattr(trainer, "batch_loss", loss)
    config = tiny_config(tmp_path, "train.attention=flash", "train.steps=1", "train.score_every=1")
    assert train(config, score=draw) == 0
    assert allowed == {"training": False, "drawing": True}


def test_flash_attention_in_fp32_is_refused() -> None:
    gpu = SimpleNamespace(num_processes=1, device=SimpleNamespace(type="cuda"))
    settings = load_config(ROOT / "configs" / "digits_unet.yaml", ["train.attention=flash"]).train
    with pytest.raises(UserError, match=r"flash computes in 16 bits.*set train.precision=bf16"):
        opening._check_settings(settings, gpu)


@pytest.mark.slow(why="compiles for two minutes")
def test_a_compiled_run_learns_what_the_others_learn(tmp_path: Path) -> None:
    swap = "model.swap={sites: [resnet, self_attention], group_channels: 4}"
    settings = (swap, "train.steps=4", "train.sample_every=4", "train.save_every=2")
    plain, compiled = (
        tiny_config(tmp_path, *settings, f"train.compile={value}", name=name)
        for name, value in (("plain", "false"), ("compiled", "true"))
    )
    assert [train(plain), train(compiled)] == [0, 0]
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    grids = [
        np.asarray(Image.open(c.folder / "samples" / "step-4.png")).astype(int) for c in (plain, compiled)
    ]
    assert np.abs(grids[0] - grids[1]).max() <= 2
    assert load_model(compiled.folder).step == 4
