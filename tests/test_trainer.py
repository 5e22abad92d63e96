"""Training: what a run does, that it resumes to the bit, and that its division into processes and parts does
not matter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import sample
import train as train_program
from ldm_dcn import checkpoint, diffusion, metrics, trainer
from ldm_dcn.autoencoder import IdentityAutoencoder
from ldm_dcn.batches import Batches
from ldm_dcn.config import Config, load_config
from ldm_dcn.data import open_dataset
from ldm_dcn.diffusion import Schedule
from ldm_dcn.errors import UserError
from ldm_dcn.export import load_model
from ldm_dcn.folders import DiskFull
from ldm_dcn.latents import Latents
from ldm_dcn.opening import open_run
from ldm_dcn.run import phases
from ldm_dcn.sampling import generate
from ldm_dcn.signals import StopSignals
from ldm_dcn.trainer import learning_rate, train, training_step
from programs import torchrun
from tiny import WHOLE, setting, tiny_config, write_config

pytestmark = pytest.mark.usefixtures("one_thread_and_a_fresh_accelerator")


def losses(config: Config) -> list[float]:
    return [line["loss"] for line in metrics.read(config.folder / "metrics.jsonl") if "loss" in line]


def weights(config: Config, group: str = "model") -> dict[str, torch.Tensor]:
    return load_file(config.folder / "checkpoints" / f"step-{config.train.steps}" / f"{group}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run of 8 steps that others are compared with."""
    config = tiny_config(tmp_path_factory.mktemp("finished"), "train.sample_every=8")
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert train(config) == 0
    torch.set_num_threads(threads)
    return config


# ------------------------------------------------------------------------------------------ what a run leaves


def test_a_run_leaves_what_the_design_says(finished: Config) -> None:
    folder = finished.folder
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml",
        "provenance.jsonl",
        "metrics.jsonl",
        "samples",
        "checkpoints",
        "export",
    }
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-6", "step-8"]
    assert load_config(folder / "config.yaml") == finished
    assert Image.open(folder / "samples" / "step-8.png").size == (
        2 * 64,
        10 * 64,
    )  # 8 pixels are enlarged to 64
    provenance = json.loads((folder / "provenance.jsonl").read_text().splitlines()[0])
    assert provenance["versions"]["torch"] == torch.__version__


def test_every_line_of_metrics_says_what_it_is(finished: Config) -> None:
    lines = metrics.read(finished.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert set(lines[0]) == {
        "step",
        "loss",
        "lr",
        "ema_decay",
        "gradient_norm",
        "samples",
        "images_per_second",
    }
    assert [line["samples"] for line in lines] == [8 * step for step in range(1, 9)]


def test_the_loss_falls(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, "train.steps=40", "train.lr=5e-3", "train.save_every=0", "train.batch_size=16"
    )
    train(config)
    history = losses(config)
    assert np.mean(history[-10:]) < 0.7 * np.mean(history[:5])


def test_the_same_command_after_the_end_does_nothing(
    finished: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    before = losses(finished)
    assert train(finished) == 0
    assert losses(finished) == before
    said = capsys.readouterr().err
    assert "all steps are taken" in said and f"python sample.py {finished.folder} draws" in said


# ------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("stop", [3, 6])
def test_resuming_is_exact_to_the_bit(finished: Config, tmp_path: Path, stop: int) -> None:
    """`stop` steps, then a new run object that goes on: losses, weights, averages and optimiser state are
    equal."""
    config = tiny_config(tmp_path, "train.sample_every=8")
    with open_run(config) as run:
        signals = StopSignals()
        while run.state.step < stop:
            run.record(trainer.training_step(run, signals))
            run.log()
        run.save()
        run.record(trainer.training_step(run, signals))  # one step that a crash loses
        run.log()
    assert len(losses(config)) == stop + 1
    assert train(config) == 0
    assert losses(config) == losses(finished)
    for group in ("model", "ema", "optimizer"):
        assert same(weights(config, group), weights(finished, group))
    assert same(
        *(
            load_file(c.folder / "export" / "unet" / "diffusion_pytorch_model.safetensors")
            for c in (config, finished)
        )
    )


def test_a_window_of_metrics_survives_a_resume(finished: Config, tmp_path: Path) -> None:
    """A line is the mean over its window, though the window was cut by a save that fell within it."""
    whole = tiny_config(tmp_path, "train.log_every=4", name="whole")
    train(whole)
    cut = tiny_config(tmp_path, "train.log_every=4", name="cut")
    with open_run(cut) as run:
        for _ in range(6):
            run.record(trainer.training_step(run, StopSignals()))
            if run.due(4):
                run.log()
        run.save()
    train(cut)
    each = losses(finished)
    assert losses(cut) == losses(whole) == pytest.approx([np.mean(each[:4]), np.mean(each[4:])])


def test_going_on_under_another_config_is_refused(finished: Config) -> None:
    def again(*overrides: str) -> Config:
        return load_config(finished.folder / "config.yaml", overrides)

    with pytest.raises(
        UserError, match=r"another model or other data \(model.unet.layers_per_block: 1 -> 2\)"
    ):
        train(again("model.unet.layers_per_block=2"))
    with pytest.raises(UserError, match=r"go on with --allow-change train.lr"):
        train(again("train.lr=5.0"))
    assert train(again("train.lr=5.0"), allow_change=["train.lr"]) == 0


def test_a_lost_export_is_made_again(finished: Config, tmp_path: Path) -> None:
    export = finished.folder / "export"
    before = load_file(export / "unet" / "diffusion_pytorch_model.safetensors")
    export.rename(tmp_path / "gone")
    train(finished)
    assert same(load_file(export / "unet" / "diffusion_pytorch_model.safetensors"), before)


def test_a_full_disk_does_not_stop_a_run_that_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, "train.save_every=2")
    real = checkpoint.save

    def save(root: Path, step: int, *arguments: object) -> object:
        if step in (4, 6):
            raise DiskFull("no room to write it")
        return real(root, step, *arguments)

    monkeypatch.setattr(checkpoint, "save", save)
    assert train(config) == 0
    assert capsys.readouterr().err.count("warning: no room to write it; training goes on") == 2
    assert [path.name for path in (config.folder / "checkpoints").iterdir() if path.name != "step-8"] == [
        "step-2"
    ]


# ---------------------------------------------------------------------------------------- parts and processes


@pytest.mark.parametrize(
    "override",
    ["train.gradient_accumulation=2", "train.gradient_accumulation=8", "train.gradient_checkpointing=true"],
)
def test_accumulation_and_checkpointing_change_rounding_only(
    finished: Config, tmp_path: Path, override: str
) -> None:
    config = tiny_config(tmp_path, override)
    train(config)
    assert losses(config) == pytest.approx(losses(finished), rel=1e-5)
    for column in ("lr", "ema_decay"):
        assert [line[column] for line in metrics.read(config.folder / "metrics.jsonl")] == [
            line[column] for line in metrics.read(finished.folder / "metrics.jsonl")
        ]


def test_two_processes_see_the_same_samples_and_losses_as_one(finished: Config, tmp_path: Path) -> None:
    path = write_config(tmp_path)
    run = torchrun("train.py", str(path))
    assert "on 2 x cpu" in run.stderr
    config = load_config(path)
    assert losses(config) == pytest.approx(losses(finished), rel=1e-5)
    for column in ("step", "lr", "ema_decay", "samples"):
        assert [line[column] for line in metrics.read(config.folder / "metrics.jsonl")] == [
            line[column] for line in metrics.read(finished.folder / "metrics.jsonl")
        ]
    ours, theirs = weights(config, "ema"), weights(finished, "ema")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 4), (4, 2)])
def test_positions_are_shared_out_without_gap_or_overlap(
    tmp_path: Path, processes: int, accumulation: int
) -> None:
    config = tiny_config(tmp_path, f"train.gradient_accumulation={accumulation}")
    seen = []
    for rank in range(processes):
        place = SimpleNamespace(num_processes=processes, process_index=rank, device=torch.device("cpu"))
        latents = Latents(torch.zeros(9, 2, 8, 8), torch.zeros(9), 0, {})
        denoiser = SimpleNamespace(num_classes=0, takes_text=False)
        batches = Batches(config, Schedule(), latents, IdentityAutoencoder(1), denoiser, place)
        for micro in range(accumulation):
            seen.extend(batches.positions(5, micro))
    assert sorted(seen) == list(range(40, 48))


def test_another_batch_size_takes_the_samples_that_come_next(tmp_path: Path) -> None:
    def again(*overrides: str) -> Config:
        return tiny_config(tmp_path, "train.stratified_times=true", "train.log_every=1", *overrides)

    assert train(again("train.steps=3", "train.batch_size=8")) == 0
    allowed = ["train.batch_size"]
    assert train(again("train.steps=5", "train.batch_size=50"), allowed) == 0
    assert [line["samples"] for line in metrics.read(again().folder / "metrics.jsonl")] == [
        8,
        16,
        24,
        74,
        124,
    ]
    with open_run(again("train.batch_size=50")) as run:
        assert run.batches.positions(5, 0) == range(124, 174)
        times = run.batches.times(run.batches.positions(5, 0))
        assert torch.equal(times * 50 // 1000, torch.arange(50))
    with open_run(again("train.batch_size=10"), allowed) as run:
        assert run.batches.positions(5, 0) == range(124, 134)
        assert run.batches.positions(6, 0) == range(134, 144)
        assert run.batches.of_everyone(6)[0] == run.batches.order[range(134, 144)].tolist()


def test_a_loss_scale_is_of_its_number_format(tmp_path: Path) -> None:
    def again(precision: str) -> Config:
        return tiny_config(tmp_path, "train.steps=2", f"train.precision={precision}")

    def scale_under(precision: str) -> float:
        with open_run(again(precision), ["train.precision"]) as run:
            run.save()
            return run.state.loss_scale

    assert train(again("fp32")) == 0
    assert scale_under("fp16") == 2.0**16
    with open_run(again("fp16")) as run:
        run.state.loss_scale = 2.0**9
        run.save()
    assert scale_under("fp16") == 2.0**9  # the same format goes on with its own
    assert scale_under("bf16") == 1


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"train.batch_size=8 cannot be shared by 1 processes in 3 .*; use 6 or 9"
    ):
        train(tiny_config(tmp_path, "train.gradient_accumulation=3"))


# ------------------------------------------------------------------------------------------- the recipe


def test_the_learning_rate_is_a_function_of_the_step(tmp_path: Path) -> None:
    settings = tiny_config(tmp_path, "train.warmup_steps=4", "train.steps=12", "train.lr=1.0").train
    assert [learning_rate(step, settings) for step in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    cosine = settings.model_copy(update={"lr_schedule": "cosine"})
    linear = settings.model_copy(update={"lr_schedule": "linear"})
    assert learning_rate(8, cosine) == pytest.approx(0.5) and learning_rate(8, linear) == pytest.approx(0.5)
    assert learning_rate(6, linear) == pytest.approx(0.75) and learning_rate(6, cosine) == pytest.approx(
        0.8536, abs=1e-4
    )
    assert learning_rate(12, cosine) == pytest.approx(0, abs=1e-12) and learning_rate(12, linear) == 0
    never = settings.model_copy(update={"warmup_steps": 0})
    assert learning_rate(0, never) == 1


@pytest.mark.parametrize(
    ("match", "new", "expected"),
    [
        (0, 0, {0: "all"}),
        (4, 0, {0: "match", 4: "all"}),
        (0, 6, {0: "new", 6: "all"}),
        (4, 6, {0: "match", 4: "new", 6: "all"}),
        (6, 4, {0: "match", 6: "all"}),
    ],
)
def test_the_warm_up_comes_again_where_others_begin_to_learn(
    tmp_path: Path, match: int, new: int, expected: dict[int, str]
) -> None:
    settings = tiny_config(tmp_path, "train.warmup_steps=2", "train.lr=1.0").train
    settings = settings.model_copy(update={"match_steps": match, "new_only_steps": new})
    assert phases(settings) == expected
    for first in expected:
        assert learning_rate(first, settings) == 0.5 and learning_rate(first + 1, settings) == 1
    assert learning_rate(20, settings) == 1


def test_named_parameters_learn_at_rates_and_decays_of_their_own(tmp_path: Path) -> None:
    groups = "train.parameter_groups=[{match: offset_mask, lr_factor: 0.1}, {match: 'norm|bias$', weight_decay: 0}]"
    settings = (
        "model.swap={sites: [resnet], group_channels: 4}",
        "train.warmup_steps=0",
        "train.weight_decay=0.5",
    )
    config = tiny_config(tmp_path, groups, *settings, "train.lr=1e-3")
    with open_run(config) as run:
        names = {p: name for name, p in run.denoiser.named_parameters()}
        found = {
            names[p]: (group["lr_factor"], group["weight_decay"])
            for group in run.optimizer.param_groups
            for p in group["params"]
        }
        assert found.keys() == set(names.values())
        for name, own in found.items():
            offsets, no_decay = "offset_mask" in name, "norm" in name or name.endswith("bias")
            assert own == ((0.1, 0.5) if offsets else (1.0, 0.0 if no_decay else 0.5)), name
        before = {p: p.detach().clone() for p in names}
        training_step(run, StopSignals())
        for p, name in names.items():  # AdamW's first step is lr * (sign of the gradient + decay * weight)
            if re.search(r"transformer_blocks.*(attn2.to_[qk]|norm2)", name):
                continue  # of one token there is nothing to choose, so no gradient
            factor, decay = found[name]
            moved = ((p.detach() - before[p]) / -(1e-3 * factor) - decay * before[p]).abs()
            assert float(moved.max()) == pytest.approx(1, abs=0.01), name
    with pytest.raises(UserError, match=r"no parameter is left whose name holds 'offsets'"):
        train(tiny_config(tmp_path, "train.parameter_groups=[{match: offsets}]", name="none"))
    with pytest.raises(UserError, match=r"is no regular expression"):
        tiny_config(tmp_path, "train.parameter_groups=[{match: '('}]")


def test_a_batch_holds_what_the_recipe_says(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.batch_size=4000", "train.label_dropout=0.25")
    with open_run(config) as run:
        batch, again, next_one = run.batches.at(3, 0), run.batches.at(3, 0), run.batches.at(4, 0)
        null = run.denoiser.num_classes
        ids = run.batches.order[run.batches.positions(3, 0)]
        kept = batch.condition != null
        assert null == 10
        assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.03)
        assert torch.equal(batch.condition[kept], run.latents.labels[ids][kept])
        assert batch.times.min() >= 0 and batch.times.max() <= 999
        assert float(batch.times.float().mean()) == pytest.approx(499.5, abs=20)
        assert float(batch.noise.std()) == pytest.approx(1, abs=0.01)
        torch.testing.assert_close(
            batch.latents, run.latents.moments[ids][:, :1]
        )  # the identity has no variance
        assert all(
            torch.equal(getattr(batch, k), getattr(again, k))
            for k in ("latents", "noise", "times", "condition")
        )
        assert not torch.equal(batch.noise, next_one.noise)


def test_validation_is_the_averaged_models_loss_on_images_held_out(tmp_path: Path) -> None:
    settings = ("data.split=train", "train.steps=4", "train.label_dropout=0.5", "train.batch_size=20")
    quiet = tiny_config(tmp_path, *settings, name="quiet")
    config = tiny_config(tmp_path, *settings, "train.validate_every=2", "train.validation_images=90")
    assert [train(quiet), train(config)] == [0, 0]
    assert losses(config) == losses(quiet)  # looking changes nothing
    lines = [line for line in metrics.read(config.folder / "metrics.jsonl") if "validation_loss" in line]
    assert [(line["step"], line["validation_images"]) for line in lines] == [(2, 100), (4, 100)]

    digits = open_dataset("digits", image_size=8, image_channels=1, split="held-out")
    with open_run(config) as run:
        batches = [run.held_out.at(0, part) for part in range(run.held_out.parts)]
        everyone, times = run.held_out.of_everyone(0)
        assert not set(digits.labels[everyone].tolist()) - set(range(10)) and len(everyone) == 100
        condition = torch.cat([batch.condition for batch in batches])
        assert torch.equal(condition, digits.labels[everyone])  # no label is dropped
        pixels = torch.cat([batch.latents for batch in batches])
        torch.testing.assert_close(pixels, digits.images(torch.tensor(everyone)))
        assert (torch.tensor(times) * 100 // 1000).tolist() == list(range(100))
        model = load_model(config.folder).denoiser.eval()
        errors = []
        for batch in batches:
            alpha, sigma = diffusion.at(run.levels, batch.times)
            noised = diffusion.add_noise(batch.latents, batch.noise, alpha, sigma)
            with torch.no_grad():
                errors.append((model(noised, batch.times, batch.condition) - batch.noise).square().mean())
    assert lines[1]["validation_loss"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)


def test_of_colour_that_turns_grey_a_run_tells_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the images that are held out are opened too."""
    (tmp_path / "images").mkdir()
    for number in range(8):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / f"{number}.png")
    settings = (f"data.source={tmp_path / 'images'}", "data.split=train", "train.validate_every=2")
    with open_run(tiny_config(tmp_path, *settings, "train.validation_images=2")) as run:
        assert len(run.latents) == 6 and run.held_out is not None
    assert capsys.readouterr().err.count("is in colour") == 1


def test_without_classes_every_label_is_the_null_one(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "data.num_classes=0", "train.steps=2", "train.sample_every=2")
    assert train(config) == 0
    model = load_model(config.folder)
    assert model.num_classes == 0
    assert generate(model, None, [0], steps=1).shape == (1, 1, 8, 8)
    with pytest.raises(UserError, match="knows no classes"):
        generate(model, [0], [0], steps=1)


def test_clipping_bounds_the_step_and_bf16_and_tensorboard_run(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny_config(
        tmp_path,
        "train.gradient_clip=1e-6",
        "train.precision=bf16",
        "train.trackers=[tensorboard]",
        "train.steps=2",
        "train.sample_every=2",
    )
    assert train(config) == 0
    events = event_accumulator.EventAccumulator(str(config.folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    (grid,) = events.Images("samples")
    drawn = Image.open(config.folder / "samples" / "step-2.png")
    assert grid.step == 2 and (grid.width, grid.height) == drawn.size
    momentum = {k: v for k, v in weights(config, "optimizer").items() if k.startswith("exp_avg/")}
    assert 0 < sum(float(v.square().sum()) for v in momentum.values()) ** 0.5 < 1e-6


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped_at_their_own_length(tmp_path: Path, precision: str) -> None:
    """Not at that which fp16's loss scale gives them."""
    lengths = []
    for clip in ("null", "1e-3", "1e3"):
        config = tiny_config(tmp_path, "train.steps=1", f"train.precision={precision}", f"train.gradient_clip={clip}",
                             f"run.name=clip-{clip}")  # fmt: skip
        assert train(config) == 0
        moments = [v for k, v in weights(config, "optimizer").items() if k.startswith("exp_avg/")]
        lengths.append(float(torch.cat([v.flatten() for v in moments]).norm()) / (1 - config.train.betas[0]))
    whole, short, long = lengths
    assert (
        1e-2 < whole < 1e2
        and short == pytest.approx(1e-3, rel=1e-3)
        and long == pytest.approx(whole, rel=1e-6)
    )


def test_the_average_begins_with_the_first_steps_weights(tmp_path: Path) -> None:
    """A power average has no share of the weights that a network starts with: its decay is 0 at step 1."""
    config = tiny_config(tmp_path, "train.steps=1", "train.ema=power")
    assert train(config) == 0
    averaged, own = (weights(config, group) for group in ("ema", "model"))
    assert all(torch.equal(value.float(), own[name].float()) for name, value in averaged.items())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.num_classes=4", "has 10 classes and data.num_classes=4; use 10, or null"),
        (
            "model.unet.in_channels=4",
            "takes 4 and gives 1 channels, the latents of autoencoder 'identity' have 1; set ",
        ),
        ("model.unet.in_chanels=4", "in_channels"),
        ("model.swap.include=nowhere", "nowhere"),
        ("autoencoder=no/folder/here", "no/folder/here"),
        ("data.source=no/folder/here", "no/folder/here"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path: Path, override: str, expected: str) -> None:
    config = tiny_config(tmp_path, override)
    with pytest.raises(UserError, match=expected):
        train(config)
    assert not (config.folder / "checkpoints").exists()


def test_a_swapped_network_trains_resumes_exports_and_draws(tmp_path: Path) -> None:
    swap = (
        "model.swap.sites=[resnet, self_attention]",
        "model.swap.group_channels=4",
        setting("model.unet", WHOLE),
    )
    whole, cut = (tiny_config(tmp_path, *swap, "train.steps=4", name=name) for name in ("whole", "cut"))
    assert train(whole) == 0
    with open_run(cut) as run:
        for _ in range(2):
            run.record(trainer.training_step(run, StopSignals()))
            run.log()
        run.save()
    assert train(cut) == 0
    assert losses(cut) == losses(whole)
    assert same(weights(cut, "ema"), weights(whole, "ema"))
    with open_run(whole) as run, run.averages[0].in_place():
        expected = generate(run.averaged_model(), [1, 2], [3, 4], steps=2)
    assert torch.equal(generate(load_model(whole.folder), [1, 2], [3, 4], steps=2), expected)


# ------------------------------------------------------------------------------------------- using it


def test_the_export_draws_what_the_run_drew(finished: Config, tmp_path: Path) -> None:
    """The grid of the averaged weights in memory, and the same from the files."""
    assert (
        sample.main(
            [
                str(finished.folder),
                "--steps",
                "2",
                "--seeds",
                "0-1",
                "--grid",
                str(tmp_path / "grid.png"),
                "--guidance",
                str(finished.sample.guidance),
                "--batch-size",
                "20",
            ]
        )
        == 0
    )
    drawn = np.asarray(Image.open(finished.folder / "samples" / "step-8.png"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), drawn)


def test_a_model_knows_where_it_comes_from(finished: Config, tmp_path: Path) -> None:
    model = load_model(finished.folder)
    assert (model.name, model.step, model.num_classes, model.latent_shape) == ("tiny", 8, 10, (1, 8, 8))
    assert model.config == finished.resolved()
    assert model.tags["weights"] == "EMA 0.9999" and model.tags["step"] == 8
    moved = tmp_path / "moved"
    subprocess.run(["cp", "-r", str(finished.folder / "export"), str(moved)], check=True)
    again = load_model(moved)
    assert torch.equal(generate(again, [3], [1], steps=2), generate(model, [3], [1], steps=2))


def test_sample_writes_every_kind_of_file(
    finished: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(finished.folder)
    monkeypatch.chdir(tmp_path)
    sample.main([run, "--steps", "1"])
    assert Image.open("grid.png").size == (8 * 64, 10 * 64)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    sample.main(
        [
            run,
            "--steps",
            "1",
            "--n",
            "7",
            "--labels",
            "4,2",
            "--seeds",
            "100",
            "--npz",
            "n.npz",
            "--png-dir",
            "png",
        ]
    )
    with np.load("n.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.shape == (7, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [4, 2, 4, 2, 4, 2, 4]
    assert (images[..., 0] == images[..., 2]).all()
    files = sorted(Path("png").glob("*.png"))
    assert [path.name for path in files[:2]] == ["000000_label4_seed100.png", "000001_label2_seed101.png"]
    assert np.array_equal(np.asarray(Image.open(files[1])), images[1, :, :, 0])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--labels", "0-10"], "label 10 does not exist: tiny knows 10 classes, 0 to 9"),
        (["--labels", "x"], "label 'x' is no number, no range and no name of a class of "),
        (["--seeds", "5-3"], "seed range '5-3' runs backwards; write 3-5"),
        (["--n", "0"], "ask for at least one image"),
        (["--n", "3", "--seeds", "1,2"], "--n 3 came with 2 seeds"),
        (["--sampler", "dpm"], "sampler 'dpm' is unknown"),
        (["--steps", "0"], "0 sampling steps"),
    ],
)
def test_sample_refuses_what_it_cannot_do(
    finished: Config, arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=expected):
        sample.main([str(finished.folder), *arguments])
    assert not list(tmp_path.iterdir())  # before anything is drawn


def test_print_config_and_a_typo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", str(path), "train.lr=3e-5", "--print-config"])
    assert train_program.main() == 0
    assert "lr: 3.0e-05" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(sys, "argv", ["train.py", str(path), "train.lrr=3e-5"])
    with pytest.raises(UserError, match=r"train.lrr: unknown setting; did you mean train.lr\?"):
        train_program.main()
