"""What a run will take, against what it takes, and the cost of the loop around the network."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval import loop, plan, throughput
from eval.plan import Counted
from ldm_dcn.config import Config, load_config
from ldm_dcn.denoiser import Denoiser
from ldm_dcn.errors import UserError
from ldm_dcn.unet import build_unet
from tiny import ROOT, UNET, WHOLE, setting, tiny_config, write_config

_counted: dict[str, Counted] = {}


def count(config: Config) -> Counted:
    """`plan.count`, which takes seconds, once for each network, its precision and what it keeps, whatever else the config says."""
    settings = config.resolved()
    parts = ("model", "autoencoder", "data")
    key = json.dumps(
        [config.run.name, config.train.precision, config.train.gradient_checkpointing]
        + [settings[part] for part in parts]
    )
    if key not in _counted:
        _counted[key] = _count(config)
    return _counted[key]


_count = plan.count


@pytest.fixture(autouse=True)
def _count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "count", count)


def kept_in_truth(config: Config, images: int, checkpointing: bool) -> int:
    """Bytes that autograd keeps in a real forward pass, each storage once."""
    denoiser = Denoiser(build_unet(config.model.unet, swap=config.model.swap), 10).train()
    if checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
    own = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(images, 1, 8, 8).to(memory_format=torch.channels_last)
    times = torch.zeros(images, dtype=torch.int64)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        output = denoiser(x, times, times)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


SWAP = "{sites: [resnet, self_attention], group_channels: 4}"


@pytest.mark.parametrize(
    ("swap", "precision", "asked"),
    [("null", "fp32", False), ("null", "bf16", True), (SWAP, "fp32", True), (SWAP, "bf16", False)],
)
def test_what_is_kept_is_foreseen(tmp_path: Path, swap: str, precision: str, asked: bool) -> None:
    """With and without checkpointing, by one count, whichever of them the config asks for."""
    config = tiny_config(
        tmp_path,
        f"model.swap={swap}",
        f"train.gradient_checkpointing={str(asked).lower()}",
        f"train.precision={precision}",
        "data.num_classes=10",
        setting("model.unet", WHOLE),
    )
    counted = count(config)
    for checkpointing, (an_image, once) in ((False, counted.kept), (True, counted.kept_checkpointed)):
        for images in (1, 6):
            kept = kept_in_truth(config, images, checkpointing)
            assert an_image * images + once == pytest.approx(kept, rel=0.02)


def test_counts_are_those_of_the_network(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "data.num_classes=10")
    counted = count(config)
    denoiser = Denoiser(build_unet(config.model.unet), 10)
    assert counted.parameters == sum(p.numel() for p in denoiser.parameters())
    inputs = torch.randn(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    assert counted.forward_flops == 2 * throughput.count_macs(denoiser, *inputs)


def test_captions_are_more_tokens_than_a_class(tmp_path: Path) -> None:
    labels = count(tiny_config(tmp_path, "data.num_classes=10"))
    text = count(tiny_config(tmp_path, "data.condition=text"))
    assert text.forward_flops > labels.forward_flops and text.kept[0] > labels.kept[0]
    assert text.parameters == labels.parameters - 11 * UNET["cross_attention_dim"]
    with pytest.raises(UserError, match=r"model\.pretrained=null model\.preset=sd_dcn_convs"):
        count(tiny_config(tmp_path, "model.unet=null", "model.pretrained=x/y"))


def test_the_papers_networks_are_counted_without_their_weights() -> None:
    config = load_config(ROOT / "configs" / "imagenet256_dcn_convs.yaml")
    counted = count(config)
    assert counted.parameters == 565_581_716 + 1001 * 768
    assert counted.kept[1] == pytest.approx(2 * 565_581_716, rel=0.02)  # bf16 copies of the weights
    assert counted.kept_checkpointed[0] < counted.kept[0] / 5


COUNTED = Counted("x", 1_000_000, 50_000, 10**9, (4_000_000, 2_000_000), (500_000, 0))
ZERO = "train.parallel=zero"
FSDP = "train.parallel=fsdp"
PARTS = "train.gradient_accumulation=4"
CHECKPOINTING = "train.gradient_checkpointing=true"
POWER = "train.ema=power"  # two averages


@pytest.mark.parametrize(
    ("overrides", "gpus", "images", "state", "activations", "seconds"),
    [
        ((), 1, 64, 20e6, 64 * 4e6 + 2e6, 3 * 64e9 / 1e14),
        ((), 8, 8, 20e6, 8 * 4e6 + 2e6, 3 * 64e9 / 8e14),
        ((FSDP,), 8, 8, 20e6 / 8 + 4 * 50e3, 8 * 4e6 + 2e6, 3 * 64e9 / 8e14),
        ((FSDP, PARTS), 8, 2, 20e6 / 8 + 4 * 50e3 + 4e6, 2 * 4e6 + 2e6, 3 * 64e9 / 8e14),
        ((ZERO,), 8, 8, 20e6 / 8 + 4e6, 8 * 4e6 + 2e6, 3 * 64e9 / 8e14),
        ((ZERO, PARTS), 8, 2, 20e6 / 8 + 8e6, 2 * 4e6 + 2e6, 3 * 64e9 / 8e14),
        # In 16 bits autograd keeps the same copies, but for checkpointing, which computes them again.
        ((ZERO, "train.precision=bf16"), 8, 8, 20e6 / 8, 8 * 4e6 + 2e6, 3 * 64e9 / 8e14),
        ((ZERO, "train.precision=bf16", CHECKPOINTING), 8, 8, 20e6 / 8 + 2e6, 8 * 5e5, 4 * 64e9 / 8e14),
        ((POWER,), 8, 8, 24e6, 8 * 4e6 + 2e6, 3 * 64e9 / 8e14),
        ((POWER, FSDP), 8, 8, 24e6 / 8 + 4 * 50e3, 8 * 4e6 + 2e6, 3 * 64e9 / 8e14),
        ((POWER, ZERO), 8, 8, 24e6 / 8 + 4e6, 8 * 4e6 + 2e6, 3 * 64e9 / 8e14),
        ((CHECKPOINTING,), 8, 8, 20e6, 8 * 5e5, 4 * 64e9 / 8e14),
        ((PARTS,), 8, 2, 20e6, 2 * 4e6 + 2e6, 3 * 64e9 / 8e14),
    ],
)
def test_the_formula(
    tmp_path: Path,
    overrides: tuple[str, ...],
    gpus: int,
    images: int,
    state: float,
    activations: float,
    seconds: float,
) -> None:
    config = tiny_config(tmp_path, "train.batch_size=64", "train.steps=86400", *overrides)
    got = plan.plan(COUNTED, config, gpus, tflops=100)
    assert (got.images, got.state_bytes, got.activation_bytes) == (images, state, activations)
    assert got.seconds_a_step == pytest.approx(seconds) and got.days == pytest.approx(seconds)
    assert got.basis == "assumed"
    unknown = plan.plan(COUNTED, config, gpus)
    assert (unknown.basis, unknown.seconds_a_step, unknown.days) == ("unknown", None, None)


@pytest.mark.parametrize(
    ("overrides", "a_parameter"),
    [
        ((), 8),
        ((PARTS,), 8),
        ((FSDP,), 2 * 4 + 4),
        ((FSDP, "train.precision=bf16"), 2 * 2 + 4),
        ((FSDP, PARTS), 8 * 4 + 4),
        ((ZERO,), 4 + 4),
        ((ZERO, PARTS), 4 + 4),
        ((ZERO, PARTS, "train.precision=bf16"), 2 + 4),
    ],
)
def test_what_a_gpu_sends(tmp_path: Path, overrides: tuple[str, ...], a_parameter: int) -> None:
    config = tiny_config(tmp_path, "train.batch_size=64", *overrides)
    assert plan.sent_bytes(1000, config, 1) == 0
    assert plan.sent_bytes(1000, config, 8) == pytest.approx(1000 * a_parameter * 7 / 8)
    alone, together = (plan.plan(COUNTED, config, 8, 100, bandwidth=width) for width in (None, 0.5))
    assert together.seconds_a_step - alone.seconds_a_step == pytest.approx(together.sent_bytes / 0.5e9)


def measurement(config: Config, folder: Path, **changes: object) -> Path:
    """What `eval.throughput --train` writes: 64 images in 640 ms, and 16 ms a step whatever their number."""
    parts = {"waiting for the batch": 0.04, "forward": 0.2, "backward": 0.4}
    a_step = {"optimiser": 0.01, "average": 0.004, "rest": 0.002}
    content = {
        "config": config.resolved(),
        "seconds": parts | a_step,
        "processes": 1,
        "peak_bytes": None,
        "environment": {"gpu": "a GPU of ours", "cpu": "x", "threads": 2},
    }
    path = folder / "measured.json"
    path.write_text(json.dumps(content | changes))
    return path


@pytest.mark.parametrize(
    ("overrides", "gpus", "seconds"),
    [
        ((), 1, 64 * 0.01 + 0.016),  # what was measured
        ((), 8, 8 * 0.01 + 0.016),
        ((PARTS,), 1, 64 * 0.01 + 0.016),
        (("train.batch_size=256", "train.gradient_accumulation=2"), 8, 2 * 16 * 0.01 + 0.016),
        ((FSDP,), 8, 8 * 0.01 + 0.01 / 8 + 0.006),
        ((ZERO,), 8, 8 * 0.01 + 0.01 / 8 + 0.006),
    ],
)
def test_measured_costs_make_the_time(
    tmp_path: Path, overrides: tuple[str, ...], gpus: int, seconds: float
) -> None:
    base = ("train.batch_size=64", "train.steps=86400")
    measured = plan.read_measured(measurement(tiny_config(tmp_path, *base), tmp_path))
    config = tiny_config(tmp_path, *base, *overrides)
    assert plan.matched([config], [measured]) == [measured]
    got = plan.plan(COUNTED, config, gpus, tflops=1, measured=measured)
    assert got.basis == "measured"
    assert got.seconds_a_step == pytest.approx(seconds) and got.days == pytest.approx(seconds)


def test_memory_is_compared_by_the_averages_there_are(tmp_path: Path) -> None:
    counted = replace(COUNTED, parameters=10**9)
    for overrides, state in (((), 20e9), ((POWER,), 24e9)):
        config = tiny_config(tmp_path, "train.batch_size=64", *overrides)
        measured = plan.read_measured(measurement(config, tmp_path, peak_bytes=2**30))
        text = plan.table([counted], [plan.plan(counted, config, 1)], [config], None, [measured])
        foreseen = state + 64 * 4e6 + 2e6
        assert f"1.0 GiB of memory there, {foreseen / 2**30:.1f} GiB by the formula" in text
    with pytest.raises(UserError, match=r"train\.ema: power -> constant"):
        plan.matched([tiny_config(tmp_path, "train.batch_size=64")], [measured])


def test_a_measurement_of_something_else_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    other = plan.read_measured(
        measurement(tiny_config(tmp_path, "train.gradient_checkpointing=true"), tmp_path)
    )
    told = r"measured.json was measured with other settings.*train.gradient_checkpointing: True -> False"
    with pytest.raises(UserError, match=told):
        plan.matched([config], [other])
    for content in ("[]", "{", '{"config": {}}', '{"config": {"train": {"gradient_accumulation": 0}}}'):
        (tmp_path / "measured.json").write_text(content)
        with pytest.raises(
            UserError, match=r"is no measurement of a training loop .*eval.throughput CONFIG --train"
        ):
            plan.read_measured(tmp_path / "measured.json")
    with pytest.raises(UserError, match=r"nowhere.json: No such file"):
        plan.read_measured(tmp_path / "nowhere.json")


def test_the_command_says_what_was_measured_and_what_assumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And reads what `eval.throughput --train` really writes."""
    swap = ["--set", "train.batch_size=4", "train.steps=20"]
    file = tmp_path / "loop.json"
    config = str(write_config(tmp_path))
    throughput.main([config, "--train", "--json", str(file), *swap])
    written = json.loads(file.read_text())
    capsys.readouterr()
    out = tmp_path / "plan.json"
    plan.main([config, "--gpus", "1", "--measured", str(file), "--json", str(out), *swap])
    printed = capsys.readouterr().out
    assert "tiny: MEASURED " in printed and f"({written['config']['run']['name']}" not in printed
    assert "with 4 images at once" in printed and "give --bandwidth" in printed
    (planned,) = json.loads(out.read_text())["plans"]
    assert planned["basis"] == "measured"
    assert planned["seconds_a_step"] == pytest.approx(sum(written["seconds"].values()))
    plan.main([config, "--gpus", "1", "2", "--tflops", "3", "--bandwidth", "9", *swap])
    printed = capsys.readouterr().out
    assert "tiny: ASSUMED 3 TFLOP/s a GPU" in printed and "at 9 GB/s a GPU" in printed
    plan.main([config, "--gpus", "1", *swap])
    assert "no times; give --measured FILE or --tflops F" in capsys.readouterr().out


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made" / "plan.json"
    plan.main([str(write_config(tmp_path)), "--gpus", "1", "2", "--tflops", "1", "--json", str(path)])
    assert "tiny" in capsys.readouterr().out
    assert [p["gpus"] for p in json.loads(path.read_text())["plans"]] == [1, 2]
    with pytest.raises(SystemExit) as stopped:
        plan.main([str(write_config(tmp_path)), "--gpus", "3"])
    assert stopped.value.code == 2
    assert "train.batch_size=8 cannot be shared by 3 GPUs" in capsys.readouterr().err


@pytest.mark.parametrize("command", [plan.main, throughput.main])
def test_a_place_that_cannot_be_written_is_seen_first(
    command: Callable[[list[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr(plan, "count", lambda *_: pytest.fail("it counted"))
    monkeypatch.setattr(throughput, "open_subject", lambda *_: pytest.fail("it measured"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        command([str(write_config(tmp_path)), "--json", str(tmp_path / "file" / "a.json")])
    assert stopped.value.code == 2
    assert "file/a.json: Not a directory; give another --json" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the loop


def test_the_parts_of_a_step_add_up_to_it(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.log_every=2")
    cost = loop.measure_loop(config, 6, progress=False)
    assert set(cost.parts) == {"waiting for the batch", "forward", "backward", "optimiser", "average", "rest"}
    assert all(len(seconds) == 6 for seconds in cost.parts.values())
    for i, whole in enumerate(cost.step):
        assert sum(seconds[i] for seconds in cost.parts.values()) == pytest.approx(whole)
        assert all(seconds[i] > 0 for seconds in cost.parts.values())
    assert 0 < cost.overhead < 1 and cost.loader > 0
    assert not (config.folder / "checkpoints").exists()
    assert "outside forward, backward and optimiser" in loop.table(cost, config)


def _gibibytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


@pytest.mark.parametrize("name", ["imagenet256_unet", "imagenet256_dcn_convs", "imagenet256_dcn_full"])
def test_the_tables_of_the_documentation(name: str) -> None:
    """docs/training.md says what `eval.plan` says: of the network, and of a run on A100s."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    counted = count(config)
    state = _gibibytes(20 * counted.parameters)
    kept, checkpointed = (f"{size[0] / 2**20:.0f} MiB" for size in (counted.kept, counted.kept_checkpointed))
    parameters, macs = f"{counted.parameters / 1e6:.2f} M", f"{counted.forward_flops / 2e9:.1f} GMAC"
    assert f"| `{name}` | {parameters} | {macs} | {state} | {kept} | {checkpointed} |" in text

    parts = load_config(ROOT / "configs" / f"{name}.yaml", ["train.gradient_accumulation=32"])
    alone = plan.plan(counted, parts, 1, 72)
    cells = [f"{alone.days:.1f} days, {_gibibytes(alone.activation_bytes)}"]
    for gpus in (8, 64):
        there, slowest = (plan.plan(counted, config, gpus, 72, bandwidth=speed) for speed in (None, 50))
        cells.append(
            f"{there.days:.2f} days, {_gibibytes(there.activation_bytes)} ({there.sent_bytes / 1e9:.1f} GB, "
            f"{slowest.exchange_seconds:.2f} of {there.seconds_a_step:.2f} s)"
        )
    assert f"| `{name}` | {' | '.join(cells)} |" in text
