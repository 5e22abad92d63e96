"""The operator benchmark: peers compute what they are called, results can be resumed, the one command for a GPU rehearses."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dcnv4_ext import dcnv4, dcnv4_reference
from eval import contenders, operators, peers, stopwatch
from eval.environment import environment
from eval.peers import PEERS, Case, Shape
from eval.stopwatch import describe
from problems import between_cells
from programs import run

ROOT = Path(__file__).parent.parent
PLAIN = [name for name in PEERS if PEERS[name].package is None]  # importable everywhere


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few small buffer sets and single calls: these tests look at results, not at times."""
    monkeypatch.setattr(contenders, "MOST_SETS", 3)
    monkeypatch.setattr(operators, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(operators, "host_cost", lambda device: {"forward, no_grad": 1e-5})
    monkeypatch.setattr(stopwatch, "CPU_TURN", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def smooth_case(shape: str, dtype: torch.dtype = torch.float32) -> Case:
    """A case whose offsets keep away from lattice points, where grid_sample's round trip picks another cell."""
    case = Case(Shape.parse(shape), dtype, 2.0, "cpu")
    offset_mask = case.map("offset_mask", 0)
    groups = offset_mask[..., : 27 * case.shape.groups].unflatten(-1, (case.shape.groups, 27))
    offsets = groups[..., :18]
    offsets.copy_(between_cells(tuple(offsets.shape), torch.Generator().manual_seed(0), 2))
    return case


def outputs_of(case: Case, name: str) -> torch.Tensor:
    """(N, H, W, C) of a peer on the first buffer set."""
    peer = PEERS[name](case).to(case.dtype)
    with torch.no_grad(), peer.context():
        return peer.lay_back(peer(*peer.lay_out(*(case.map(kind, 0) for kind in peer.takes))))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc")
def test_results_of_a_timed_call_lie_on_pages_that_are_there(tmp_path: Path) -> None:
    """Else the kernel clears them within the call's time, for one contender and not for another."""
    program = tmp_path / "faults.py"
    program.write_text("""
import resource, torch
from eval.stopwatch import keep_freed_memory

def faults_of(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        results = [torch.empty(6 * 2**20, dtype=torch.uint8).fill_(1) for _ in range(3)]
        del results
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory()
faults_of(20)  # the heap grows to what they need
print(int(kept), faults_of(20))
""")
    ended = run(str(program))
    assert ended.poll() == 0, ended.stderr
    kept, faults = map(int, ended.stdout.split())
    if not kept:
        pytest.skip("another C library than glibc")
    assert faults < 3 * 6 * 2**20 // 4096  # less than one call's pages in twenty calls; else as many in each


@pytest.mark.parametrize("shape", ["2x7x9x64", "1x28x24x32"])
def test_grid_sample_is_the_operators_twin(shape: str) -> None:
    case = smooth_case(shape)
    torch.testing.assert_close(
        outputs_of(case, "grid_sample"), outputs_of(case, "dcnv4"), rtol=1e-4, atol=1e-4
    )


def test_grid_sample_has_the_operators_gradients() -> None:
    case = smooth_case("2x6x5x64")
    gradients = []
    for name in ("dcnv4", "grid_sample"):
        leaves = [case.map(kind, 0).clone().requires_grad_() for kind in ("value", "offset_mask")]
        gradients.append(torch.autograd.grad(PEERS[name](case)(*leaves).square().sum(), leaves))
    for ours, twin in zip(*gradients, strict=True):
        torch.testing.assert_close(twin, ours, rtol=1e-3, atol=1e-3)


def test_low_precision_twin_is_the_fp32_twin_rounded() -> None:
    case = smooth_case("1x5x6x32", torch.bfloat16)
    torch.testing.assert_close(
        outputs_of(case, "grid_sample").float(), outputs_of(case, "dcnv4").float(), rtol=2**-6, atol=2**-6
    )


def test_dcnv3_rule_is_a_softmax() -> None:
    case = smooth_case("1x5x6x64")
    want = dcnv4_reference(case.map("value", 0), case.map("offset_mask", 0), groups=2, softmax=True)
    torch.testing.assert_close(outputs_of(case, "dcnv3_rule"), want, rtol=1e-4, atol=1e-5)


def plain_attention(m: torch.Tensor, groups: int) -> torch.Tensor:
    """Self-attention over the positions of (N, L, C), a head a group."""
    heads = m.unflatten(-1, (groups, -1)).transpose(1, 2)  # (N, G, L, D)
    weights = (heads @ heads.transpose(-1, -2) / heads.shape[-1] ** 0.5).softmax(-1)
    return (weights @ heads).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", ["attention_math", "attention_flash"])
def test_attention_is_global(name: str) -> None:
    case = Case(Shape.parse("2x5x6x64"), torch.float32, 1.0, "cpu")
    want = plain_attention(case.map("value", 0).flatten(1, 2), 2).view(2, 5, 6, 64)
    torch.testing.assert_close(outputs_of(case, name), want, rtol=1e-4, atol=1e-5)


def test_window_attention_stays_in_its_windows() -> None:
    case = Case(Shape.parse("2x14x7x64"), torch.float32, 1.0, "cpu")
    value = case.map("value", 0)
    halves = [plain_attention(half.flatten(1, 2), 2).view(2, 7, 7, 64) for half in value.split(7, dim=1)]
    torch.testing.assert_close(
        outputs_of(case, "attention_window"), torch.cat(halves, 1), rtol=1e-4, atol=1e-5
    )
    assert outputs_of(Case(Shape.parse("1x8x8x32"), torch.float32, 1.0, "cpu"), "attention_window").shape == (1, 8, 8, 32)  # fmt: skip


@pytest.mark.parametrize("name", ["depthwise_onednn", "depthwise_native", "conv3x3"])
def test_convolutions(name: str) -> None:
    case = Case(Shape.parse("2x9x8x32"), torch.float32, 1.0, "cpu")
    torch.manual_seed(0)
    got = outputs_of(case, name)
    torch.manual_seed(0)
    weight = PEERS[name](case).weight.detach().contiguous()
    padding, groups = weight.shape[-1] // 2, 32 // weight.shape[1]
    want = F.conv2d(
        case.map("value", 0).permute(0, 3, 1, 2).contiguous(), weight, padding=padding, groups=groups
    )
    torch.testing.assert_close(got, want.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)


def test_torchvisions_layout() -> None:
    """What deform_conv2d is given samples where dcnv4 samples: a scalar loop over taps in its own order."""
    case = smooth_case("1x4x5x32")
    value, offsets, weights = PEERS["deform_conv2d"](case).lay_out(
        case.map("value", 0), case.map("offset_mask", 0)
    )
    want = dcnv4(case.map("value", 0), case.map("offset_mask", 0), groups=1)[0, 2, 3]
    got = torch.zeros(32)
    for row in range(3):
        for column in range(3):
            tap = 3 * row + column
            y, x = (
                2 - 1 + row + float(offsets[0, 2 * tap, 2, 3]),
                3 - 1 + column + float(offsets[0, 2 * tap + 1, 2, 3]),
            )
            point = torch.tensor([(2 * x + 1) / 5 - 1, (2 * y + 1) / 4 - 1]).view(1, 1, 1, 2)
            got += weights[0, tap, 2, 3] * F.grid_sample(value, point, align_corners=False).flatten()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in PLAIN if n not in ("depthwise_cudnn", "deterministic")])
def test_every_block_keeps_the_shape_and_trains(name: str) -> None:
    case = Case(Shape.parse("1x6x5x64"), torch.float32, 2.0, "cpu")
    peer = PEERS[name](case)
    block = peer.block(case)
    with peer.context():
        output = block(case.map("value", 0))
        gradients = torch.autograd.grad(output.square().sum(), list(block.parameters()))
    assert output.shape == (1, 6, 5, 64)
    assert all(gradient.isfinite().all() for gradient in gradients)


STAND_IN = """
import os
from dcnv4_ext import dcnv4

class DCNv4Function:
    # The official argument order.
    @staticmethod
    def apply(input, offset_mask, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group,
              group_channels, offset_scale, im2col_step, remove_center):
        if input.shape[0] == 3:
            os.abort()
        if input.shape[0] == 5:
            raise ValueError("invalid d_stride")
        assert group * group_channels == input.shape[-1] and im2col_step == 256 and remove_center == 0
        return dcnv4(input, offset_mask, groups=group, kernel_size=(kernel_h, kernel_w), stride=(stride_h, stride_w),
                     padding=(pad_h, pad_w), dilation=(dilation_h, dilation_w), offset_scale=offset_scale)
"""


def test_official_operator_is_tried_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that takes the official arguments, and aborts where the official one would."""
    if PEERS["official"].importable():
        pytest.skip("the official package is installed")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "DCNv4.py").write_text(STAND_IN)
    importlib.invalidate_caches()
    assert PEERS["official"].importable()
    case = smooth_case("2x4x5x64")
    assert PEERS["official"].unavailable(case, backward=False) == "CUDA only"
    torch.testing.assert_close(outputs_of(case, "official"), outputs_of(case, "dcnv4"), rtol=0, atol=0)
    found = [peers.tried_elsewhere(Shape(n, 4, 5, 64), torch.float32, "cpu", True) for n in (2, 3, 5, 4)]
    assert found == [None, "it aborts the process", "ValueError: invalid d_stride", None]
    peers._workers.pop().shutdown()
    sys.modules.pop("DCNv4", None)


@pytest.mark.parametrize("sigma", [0.5, 8.0])
def test_module_offsets_have_the_spread_that_was_asked_for(sigma: float) -> None:
    case = Case(Shape.parse("4x8x8x128"), torch.float32, sigma, "cpu")
    block = PEERS["dcnv4"](case).block(case)
    with torch.no_grad():
        columns = block.offset_mask(case.map("value", 0))[..., : 27 * 4].unflatten(-1, (4, 27))
    assert float(columns[..., :18].std()) == pytest.approx(sigma, rel=0.1)
    assert float(case.map("offset_mask", 0)[..., :108].unflatten(-1, (4, 27))[..., :18].std()) == pytest.approx(sigma, rel=0.1)  # fmt: skip


def command(file: Path, *more: str) -> list[str]:
    return ["--device", "cpu", "--rows", "8x5x7x64", "--dtype", "float32", "--sigma", "0.5", "2", "--seconds", "0.01",
            "--rounds", "2", "--json", str(file), *more]  # fmt: skip


def test_results_file_resume_and_chart(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, drawing = tmp_path / "speed.json", tmp_path / "speed.png"
    assert operators.main(command(file, "--level", "op", "--chart", str(drawing))) == 0
    content = json.loads(file.read_text())
    assert set(content) >= {
        "identity",
        "environment",
        "measurements",
        "copy_bandwidth",
        "cache_bytes",
        "host_cost",
    }
    machine = {"device", "threads", "torch", "dcnv4_ext", "kernels"}
    assert set(content["identity"]) == machine | {"seconds", "rounds", "graphs"}
    assert (
        content["environment"]["command"] and content["environment"]["versions"]["torch"] == torch.__version__
    )
    assert [operators.key_of(record) for record in content["measurements"]] == [
        ("4x5x7x64", "float32", sigma, "op", direction)
        for sigma in (2.0, 0.5)
        for direction in ("forward", "backward")
    ]
    main, other = content["measurements"][0], content["measurements"][2]
    assert main["row"] == "8x5x7x64" and main["groups"] == 2
    # fp32: value, offset_mask and output once each
    assert (
        main["floor_bytes"] == 4 * 4 * 5 * 7 * (64 + 56 + 64) and main["floor"] == main["floor_bytes"] / 1e10
    )
    assert set(main["times"]) | set(main["skipped"]) == set(PEERS)
    assert main["skipped"]["depthwise_cudnn"] == "CUDA only"
    assert set(main["times"]) >= {
        "dcnv4",
        "dcnv3_rule",
        "grid_sample",
        "attention_math",
        "depthwise_onednn",
        "conv3x3",
    }
    assert "conv3x3" not in other["times"] and "grid_sample" in other["times"]
    for record in content["measurements"]:
        for figures in record["times"].values():
            assert figures["median"] > 0 and figures["spread"] >= 0 and figures["timer"] == "clock"
    assert main["times"]["grid_sample"]["difference"] < 1e-3
    with Image.open(drawing) as image:
        image.load()
        assert (
            image.format == "PNG" and image.width > 600 and len(image.convert("RGB").getcolors(1 << 16)) > 5
        )
    printed = capsys.readouterr().out
    assert "op, float32, sigma 2, forward" in printed and "geometric mean" in printed and "x floor" in printed

    # The same command again measures nothing twice; what is missing is added.
    with monkeypatch.context() as patch:
        patch.setattr(operators, "measure", lambda *arguments: pytest.fail("measured again"))
        assert operators.main(command(file, "--level", "op")) == 0
    assert "4 of 4 measurements are in" in capsys.readouterr().out
    assert operators.main(command(file, "--limit", "0")) == 3
    assert "4 measurements were left" in capsys.readouterr().out


def test_measurements_that_cannot_stand_together_do_not_come_into_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "speed.json"
    short = [*command(file, "--level", "op", "--peers", "dcnv4"), "--sigma", "2"]
    assert operators.main(short) == 0
    content = json.loads(file.read_text())
    content["identity"]["kernels"] = "another"
    file.write_text(json.dumps(content))
    for changed, said in (([], "kernels another, here"), (["--rounds", "3"], "rounds 2, here 3")):
        with pytest.raises(SystemExit) as stop:
            operators.main([*short, *changed])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert said in error and "name another --json, or give --replace" in error
        assert json.loads(file.read_text()) == content
    assert operators.main([*short, "--replace"]) == 0
    assert "is measured anew: kernels another" in capsys.readouterr().out
    assert json.loads(file.read_text())["identity"]["kernels"] != "another"
    for foreign in ("[]", "{}", "no JSON"):
        file.write_text(foreign)
        with pytest.raises(SystemExit):
            operators.main([*short, "--replace"])
        assert "is no file of this command" in capsys.readouterr().err and file.read_text() == foreign


def test_what_was_taken_over_keeps_what_it_was_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's `environment` is that of the call that began it; what another call adds carries its own."""
    file = tmp_path / "speed.json"
    short = [*command(file, "--level", "op", "--peers", "dcnv4"), "--sigma", "2"]
    monkeypatch.setattr(sys, "argv", ["operators.py", "first"])
    assert operators.main(short) == 0
    first = json.loads(file.read_text())
    monkeypatch.setattr(sys, "argv", ["operators.py", "second"])
    assert operators.main([*short, "--dtype", "float64"]) == 0
    second = json.loads(file.read_text())
    assert second["environment"] == first["environment"]
    assert (
        second["measurements"][:2] == first["measurements"] and "environment" not in second["measurements"][0]
    )
    assert [m["environment"]["command"] for m in second["measurements"][2:]] == ["operators.py second"] * 2
    assert second["copy_bandwidth"] == first["copy_bandwidth"]


def test_a_peer_that_fails_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(self, *operands):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(peers.Dense, "forward", broken)
    arguments = command(tmp_path / "speed.json", "--level", "module", "--peers", "conv3x3")
    assert operators.main([*arguments, "--sigma", "2"]) == 0
    records = json.loads((tmp_path / "speed.json").read_text())["measurements"]
    assert all(record["skipped"]["conv3x3"] == "RuntimeError: no kernel" for record in records)
    assert all("dcnv4" in record["times"] and record["floor"] is None for record in records)
    assert "conv 3x3: RuntimeError: no kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--rows", "64x56x56"], "--rows 64x56x56: neither a set"),
        (["--replace"], "give --json FILE"),
        (["--batch", "0"], "--batch must be at least 1"),
        pytest.param(
            ["--device", "cuda"],
            "sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU"),
        ),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], text: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        operators.main(["--device", "cpu", *arguments] if "--device" not in arguments else arguments)
    assert stop.value.code == 2
    assert text in capsys.readouterr().err


def test_rows_are_those_of_the_tables() -> None:
    rows = operators.parse_rows(["all"])
    assert len(rows) == 14 and all(Shape.parse(row).c % 32 == 0 for row in rows)
    plans = operators.plans(rows, None, ["float32"], [0.5, 2.0, 8.0], ["op", "module"], list(PEERS))
    assert len(plans) == 14 * 3 * 2 * 2 and len({plan.key() for plan in plans}) == len(plans)
    assert {plan.sigma for plan in plans[: 2 * 2 * 14]} == {2.0}
    # The published table's first row, fp32: 295 MB forward, 488 MB backward.
    assert [round(size / 1e6) for size in Shape.parse(rows[0]).least_bytes(4)] == [295, 488]


def test_rehearsal_of_the_gpu_command(gpu, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its stages in order, none stopped by another's failure; what needs a GPU is left out, not passed."""
    assert gpu.main(["--device", "cpu", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    places = [
        printed.index(text) for text in ("cmake", "test_cuda_device", "eval.operators", "eval.throughput")
    ]
    assert places == sorted(places)
    out = tmp_path / "rehearsed"
    environment = {**os.environ, "OUT": str(out), "OMP_NUM_THREADS": "1"}
    stages = ["memcheck", "racecheck", "official"]
    real = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--stages", *stages],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    state = json.loads((out / "gpu.json").read_text())
    assert {stage: state["stages"][stage]["status"] for stage in stages} == dict.fromkeys(
        stages, "left out"
    ), real.stdout
    assert real.returncode == 0
    assert {file.name for file in out.iterdir()} == {"gpu.json", "gpu.log"}


@pytest.fixture(scope="module")
def told() -> dict[tuple[str, ...], str]:
    """What gpu.py was told about this machine by commands that import torch, each asked once for all tests."""
    return {}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: dict[tuple[str, ...], str]):
    """benchmarks/gpu.py as a module, with folders of its own and a GPU that is not there."""
    spec = importlib.util.spec_from_file_location("gpu_command", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_command", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(module, "STORED", tmp_path / "stored")
    monkeypatch.setattr(module, "OFFICIAL", tmp_path / "peers")  # a developer's tree may have sources there
    monkeypatch.setattr(module, "gpu_facts", lambda: ("NVIDIA Imagined 1", "90"))
    query = module.query

    def ask_once(command: list[str]) -> str:
        if tuple(command) not in told:
            told[tuple(command)] = query(command)
        return told[tuple(command)]

    monkeypatch.setattr(module, "query", ask_once)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return module


def test_networks_are_measured_once_each_and_go_on(gpu, monkeypatch, tmp_path, capsys) -> None:
    """The stage of whole networks: each of its measurements is kept, a failure stops no other, what is done is not done again."""
    commands: list[list[str]] = []

    def run(self, command: list[str], limit: float, log: str, **extra: str) -> int | None:
        commands.append(command)
        if len(commands) == 2:
            return None  # stopped at its limit
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"number": len(commands)}))
        return 0

    monkeypatch.setattr(gpu.Session, "run", run)
    monkeypatch.setattr(gpu, "why_not", lambda *modules: "")
    (tmp_path / "logs").mkdir()
    assert gpu.main(["--stages", "networks"]) == 1
    assert "networks: unfinished 1 measurements were left" in capsys.readouterr().out
    file = tmp_path / "out" / "networks_nvidia_imagined_1.json"
    kept = json.loads(file.read_text())["measurements"]
    names = [str(one) for one in gpu.NETWORKS]
    count = len(set(names))
    assert count == len(names) > 4
    numbers = {name: number for number, name in enumerate(names, 1) if number != 2}
    assert {name: entry["number"] for name, entry in kept.items()} == numbers
    assert gpu.main(["--stages", "networks"]) == 0
    assert len(commands) == count + 1 and commands[-1] == commands[1]
    assert json.loads(file.read_text())["measurements"].keys() == set(names)
    # Another build of the operator is measured anew, and a missing package is said.
    monkeypatch.setattr(gpu, "sources_hash", lambda *more: "another")
    assert gpu.main(["--stages", "networks"]) == 0 and len(commands) == 2 * count + 1
    monkeypatch.setattr(gpu, "why_not", lambda *modules: "ModuleNotFoundError: No module named 'diffusers'")
    assert gpu.main(["--stages", "networks"]) == 0
    assert "left out needs packages that are not there: ModuleNotFoundError" in capsys.readouterr().out


def test_networks_are_known_by_what_they_are_made_of(gpu, monkeypatch, tmp_path) -> None:
    """Other configs, other code around the operator or another torch: their times are no longer these."""
    for name in ("configs/a.yaml", "ldm_dcn/swap.py", "eval/throughput.py", "eval/kept.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    operator, seen = gpu.sources_hash(), [gpu.networks_hash()]
    for name in ("configs/a.yaml", "ldm_dcn/swap.py", "eval/throughput.py"):
        (tmp_path / name).write_text("2")
        seen.append(gpu.networks_hash())
    monkeypatch.setattr(gpu, "version", lambda name: "another")
    seen.append(gpu.networks_hash())
    (tmp_path / "eval" / "kept.json").write_text("2")
    assert len(set(seen)) == 5 and gpu.networks_hash() == seen[-1] and gpu.sources_hash() == operator


def test_the_official_operators_build_goes_on(gpu, monkeypatch, tmp_path) -> None:
    """Another call on the same machine keeps what was compiled; with other sources it begins anew."""
    source, build = tmp_path / "sources" / "DCNv4_op", tmp_path / "build"
    source.mkdir(parents=True)
    (source / "setup.py").write_text("")
    (source / "build.sh").write_text("cat kernel >> compiled")
    (source / "kernel").write_text("first ")
    monkeypatch.setattr(gpu, "OFFICIAL", source.parent)
    monkeypatch.setattr(gpu, "OFFICIAL_BUILD", build)
    monkeypatch.setattr(gpu.Session, "run", lambda *_, **__: 0)  # importing it

    def compiled() -> str:
        assert gpu.main(["--stages", "official"]) == 0
        return (build / "compiled").read_text()

    assert [compiled(), compiled()] == ["first ", "first first "]
    (source / "kernel").write_text("second ")
    assert compiled() == "second "


def test_a_stage_that_was_taken_over_keeps_what_it_was_made_with(gpu, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(gpu.Session, "run", lambda *_, **__: 0)
    monkeypatch.setattr(gpu, "why_not", lambda *modules: "a package")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "correctness.log").write_text("==== 90 passed in 3.1s ====\n")
    for command in ("first", "second"):
        monkeypatch.setattr(gpu, "made_with", lambda command=command: {"command": command})
        stage = {"first": "correctness", "second": "networks"}[command]
        assert gpu.main(["--stages", stage]) == 0
    state = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert state["environment"] == {"command": "second"}
    assert state["stages"]["correctness"]["environment"] == {"command": "first"}
    assert "environment" not in state["stages"]["networks"]


def test_the_operators_are_measured_a_type_a_process_and_go_on(gpu, monkeypatch, tmp_path, capsys) -> None:
    """The main spread of all types before anything else, each in a process of its own, all into one file."""
    commands: list[list[str]] = []
    codes = [0, 3, *[0] * 6]

    def run(self, command: list[str], limit: float, log: str, **extra: str) -> int | None:
        commands.append(command[3:])
        return codes[len(commands) - 1]

    monkeypatch.setattr(gpu.Session, "run", run)
    assert gpu.main(["--stages", "benchmark"]) == 1  # the second has no time
    assert "benchmark: unfinished" in capsys.readouterr().out and len(commands) == 2
    assert gpu.main(["--stages", "benchmark"]) == 0
    assert len(commands) == 8
    done = commands[2:]
    assert [c[c.index("--dtype") + 1] for c in done] == [*gpu.TYPES, *gpu.TYPES]
    assert ["--sigma" in c for c in done] == [True] * 3 + [False] * 3
    (file,) = {Path(c[c.index("--json") + 1]) for c in done}
    assert all("--replace" in c for c in done)  # measured with other kernels, else it is gone on with
    file.write_text("{}")
    codes.extend([0] * 6)
    assert gpu.main(["--stages", "benchmark", "--again"]) == 0
    assert len(commands) == 14 and not file.exists()  # what would be gone on with
    monkeypatch.setattr("eval.operators.run", lambda options: options)
    for command in commands:
        operators.main(command)


def test_commands_of_the_gpu_stages_are_understood(gpu, monkeypatch, tmp_path) -> None:
    """Every option exists and every config is there: nobody should learn otherwise on a GPU that is paid for."""
    from eval import throughput

    opened: list = []
    monkeypatch.setattr(throughput, "open_subject", lambda path, *_: opened.append(path) or Subject())
    monkeypatch.setattr(
        throughput, "compare", lambda subjects, settings, wanted: opened.append(settings) or []
    )
    monkeypatch.setattr(throughput, "table", lambda *_: "")
    monkeypatch.setattr(
        throughput, "profile_modules", lambda subjects, settings: opened.append(settings) or []
    )
    for one in (*gpu.NETWORKS, *gpu.REHEARSED_NETWORKS):
        for device in ("cuda", "cpu"):
            opened.clear()
            _, _, module, *arguments = one.command(device, tmp_path / "part.json")
            assert module == "eval.throughput"
            throughput.main(arguments)
            *paths, settings = opened
            count = 1 + len(one.swapped) if device == "cuda" else 2
            assert len(paths) == count and all((ROOT / path).exists() for path in paths)
            assert (settings.batch_size, settings.device) == (one.batch, device)
            assert settings.compile == (one.compile if device == "cuda" else None)
            assert ("--profile" in arguments) == (one.profile and device == "cuda")
            assert device == "cpu" or settings.precision == "bf16"


class Subject:
    class model:
        config: dict = {}  # noqa: RUF012


def test_skipped_tests_do_not_pass_for_correctness_on_a_gpu(gpu, monkeypatch, tmp_path) -> None:
    """Without the CUDA library every test of the device is skipped, with exit code 0."""
    monkeypatch.setattr(gpu.Session, "run", lambda *_, **__: 0)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "correctness.log").write_text("==== 90 skipped in 3.1s ====\n")
    assert gpu.main(["--stages", "correctness"]) == 1
    assert (
        json.loads((tmp_path / "out" / "gpu.json").read_text())["stages"]["correctness"]["status"] == "failed"
    )


def test_tools_are_found_beside_python_and_in_cudas_folder(gpu, monkeypatch, tmp_path) -> None:
    for folder, name in (
        ("python/bin", "cmake"),
        ("cuda/bin", "nvcc"),
        ("cuda/compute-sanitizer", "compute-sanitizer"),
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_text("#!/bin/sh\n")
        (tmp_path / folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python" / "bin" / "python3"))
    for name in ("cmake", "nvcc", "compute-sanitizer"):
        assert Path(gpu.find_program(name)).is_relative_to(tmp_path)
    assert gpu.find_program("no-such-program") is None


def test_variants_of_the_cuda_library_are_compared(capsys) -> None:
    """benchmarks/variants.py, rehearsed with the emulated library: every kind runs, equal results make no remark."""
    from emulation.build import NoCompiler, build

    try:
        library = str(build())
    except NoCompiler as missing:
        pytest.skip(str(missing))
    spec = importlib.util.spec_from_file_location("variants", ROOT / "benchmarks" / "variants.py")
    variants = importlib.util.module_from_spec(spec)
    sys.modules["variants"] = variants
    spec.loader.exec_module(variants)
    assert variants.main([library]) == (2 if not torch.cuda.is_available() else 0)
    variants.MOST_SETS = 2
    arguments = [
        library,
        f"{library}:16",
        "--device",
        "cpu",
        "--rows",
        "1x5x6x64",
        "--rounds",
        "1",
        "--kinds",
        *variants.KINDS,
    ]
    assert variants.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "differs" not in printed and "status" not in printed and "nan" not in printed
    for kind in variants.KINDS:
        assert printed.count(f" {kind} ") == 4, kind  # a row and a mean of two types


def test_results_do_not_tell_where_the_machine_keeps_its_files(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv",
        ["x/operators.py", "--json", str(tmp_path / "out" / "a.json"), "--chart", "/elsewhere/b.png"],
    )
    expected = f"operators.py --json {Path('out', 'a.json')} --chart b.png"
    assert environment()["command"] == expected
    error = RuntimeError(f'assert failed at "{tmp_path / "peer" / "x.cpp"}":3')
    assert describe(error) == f'RuntimeError: assert failed at "{Path("peer", "x.cpp")}":3'


def test_a_speedup_is_one_threads_time_over_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each contender calls the operator with its own number of threads; the ratio is taken round by round."""
    spec = importlib.util.spec_from_file_location("cpu_scaling", ROOT / "benchmarks" / "cpu_scaling.py")
    assert spec is not None and spec.loader is not None
    cpu_scaling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cpu_scaling)
    seconds = {"1": [4.0, 6.0, 2.0], "2": [2.0, 2.0, 1.0]}
    threads = {}

    def race(self: stopwatch.Stopwatch, contenders: list[stopwatch.Contender]) -> tuple[dict, dict]:
        for contender in contenders:
            with contender.context():
                threads[contender.name] = torch.get_num_threads()
                contender.calls[0]()
        return {name: stopwatch.Timing("clock", 1, seconds=all_of) for name, all_of in seconds.items()}, {}

    monkeypatch.setattr(stopwatch.Stopwatch, "race", race)
    record = cpu_scaling.measure(Shape.parse("1x16x16x32"), "float32", "backward", 2)
    assert threads == {"1": 1, "2": 2} and torch.get_num_threads() == 1
    assert (record["one_thread"], record["all_threads"], record["speedup"], record["rounds"]) == (4, 2, 2, 3)
