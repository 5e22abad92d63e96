"""Throughput: counted figures are exact, timed ones are taken in turns, and the table says what they were made with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from eval import profile, throughput
from eval.throughput import Settings, Timing, count_macs
from ldm_dcn.errors import UserError

CONFIG = """
base: {base}
model:
  unet: {{sample_size: 8, in_channels: 4, out_channels: 4, block_out_channels: [16, 16], layers_per_block: 1,
         down_block_types: [DownBlock2D, CrossAttnDownBlock2D], up_block_types: [CrossAttnUpBlock2D, UpBlock2D],
         cross_attention_dim: 16, attention_head_dim: 2, norm_num_groups: 8}}
  swap: {swap}
autoencoder: digits
data: {{source: digits, image_size: 32, image_channels: 1}}
train: {{batch_size: 3, precision: fp32}}
"""


@pytest.fixture
def configs(tmp_path, request) -> tuple[str, str]:
    base = request.config.rootpath / "configs" / "base.yaml"
    (tmp_path / "dcn.yaml").write_text(CONFIG.format(base=base, swap="{sites: [resnet], group_channels: 16}"))
    (tmp_path / "unet.yaml").write_text(CONFIG.format(base=base, swap="null"))
    return str(tmp_path / "dcn.yaml"), str(tmp_path / "unet.yaml")


def settings(**changes) -> Settings:
    values = {"batch_size": 2, "precision": "fp32", "device": "cpu", "rounds": 2, "sampler": "dpm++", "sampler_steps": 2,
              "guidance": 1.5}  # fmt: skip
    return Settings(**(values | changes))


def test_macs_are_those_of_the_textbook():
    convolution = nn.Conv2d(3, 5, 3, padding=1)
    assert count_macs(convolution, torch.zeros(1, 3, 8, 6)) == 8 * 6 * 5 * 3 * 9
    assert count_macs(nn.Linear(7, 11), torch.zeros(1, 13, 7)) == 13 * 7 * 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_counted_on_a_cpu_too(dtype: torch.dtype) -> None:
    class Attention(nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(query, key, key)

    query, key = torch.zeros(2, 3, 5, 8, dtype=dtype), torch.zeros(2, 3, 7, 8, dtype=dtype)
    assert count_macs(Attention(), query, key) == 2 * 3 * 5 * 7 * 8 * 2  # scores, and the sum of values


def test_a_model_of_text_is_measured_with_its_tokens(configs) -> None:
    text, labels = ["data.condition=text", "model.swap=null"], ["model.swap=null"]
    first, second = (throughput.open_subject(configs[0], overrides) for overrides in (text, labels))
    assert first.model.denoiser.takes_text and not second.model.denoiser.takes_text
    figures = throughput.compare([first, second], settings(rounds=1), progress=False)
    assert figures[0].macs > figures[1].macs and set(figures[0].timings) == set(throughput.ACTIVITIES)


def test_what_a_step_is_made_of_is_what_is_timed(configs, capsys) -> None:
    dcn, unet = configs
    subject = throughput.open_subject(dcn, ["train.gradient_checkpointing=true"])
    assert all(block.gradient_checkpointing for block in subject.model.unet.down_blocks)
    with pytest.raises(UserError, match=r"train.attention=xformers, and sdpa is what is timed here"):
        throughput.open_subject(dcn, ["train.attention=xformers"])
    assert throughput._averages(subject) == 1
    assert throughput._averages(throughput.open_subject(unet, ["train.ema=power"])) == 2
    assert settings(precision="fp16").autocast().fast_dtype == torch.float16
    assert throughput.Subject("x", subject.model, "bf16").settings(settings()).precision == "bf16"
    Path(unet).write_text(Path(unet).read_text().replace("precision: fp32", "precision: bf16"))
    with pytest.raises(SystemExit):
        throughput.main([dcn, "--baseline", unet])
    assert (
        "the models train in fp32 and bf16, and one table compares one; give --precision"
        in capsys.readouterr().err
    )


def test_dcnv4_is_counted():
    from dcnv4_ext import DCNv4

    module = DCNv4(32, groups=1)
    products = (
        4 * 4 * (32 * 32 + 32 * module.offset_mask.out_features + 32 * 32)
    )  # value, offsets and weights, output
    sampling = count_macs(module, torch.randn(1, 4, 4, 32)) - products
    assert sampling >= 4 * 4 * 32 * 9 * 4  # at least four corners a tap
    assert sampling <= 4 * 4 * 32 * 9 * 8


def test_a_dcnv4_without_a_formula_is_not_passed_over(monkeypatch):
    import torch.utils.flop_counter

    from dcnv4_ext import DCNv4

    monkeypatch.setattr(torch.utils.flop_counter, "flop_registry", {})
    with pytest.raises(UserError, match="no formula"):
        count_macs(DCNv4(16), torch.randn(1, 4, 4, 16))


def test_timing_is_robust_and_paired():
    timing = Timing(seconds=[1.0, 1.1, 1.2, 9.0, 1.1])
    assert timing.median == 1.1 and timing.spread == pytest.approx(0.05)
    assert timing.ratio(Timing(seconds=[0.5, 0.55, 0.6, 4.5, 0.55])) == pytest.approx(
        2
    )  # one slow round hits both
    assert Timing(seconds=[1.0]).spread == 0


def test_models_take_turns_and_the_counts_are_exact(configs):
    subjects = [throughput.open_subject(path) for path in configs]
    order: list[str] = []
    for subject in subjects:
        subject.model.denoiser.register_forward_pre_hook(lambda *_, name=subject.name: order.append(name))
    dcn, unet = throughput.compare(subjects, settings(rounds=3), progress=False)
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert len(turns) > 3 * 3  # nobody is measured in one block
    for figures, subject in ((dcn, subjects[0]), (unet, subjects[1])):
        assert figures.parameters == sum(p.numel() for p in subject.model.denoiser.parameters())
        assert figures.state_bytes == 20 * figures.parameters and figures.activation_bytes > 0
        assert set(figures.timings) == {"forward", "training", "sampling", "drawing"}
        assert all(
            len(timing.seconds) == 3 and min(timing.seconds) > 0 for timing in figures.timings.values()
        )
    assert dcn.parameters < unet.parameters and dcn.macs < unet.macs
    assert unet.peak_bytes is None  # CUDA's allocator alone knows


def test_kept_activations_are_counted_once():
    class Twice(nn.Module):
        num_classes, takes_text = 0, False

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 8, 8))

        def forward(self, x, times, labels):
            y = x * self.weight  # keeps x
            return y * y  # keeps y, twice

    class Stub:
        denoiser, latent_shape, num_classes, config = Twice(), (4, 8, 8), 0, {}

        class schedule:
            num_steps = 10

    counted = throughput._count(throughput.Subject("stub", Stub()), settings(batch_size=2))
    assert counted["activation_bytes"] == 2 * (2 * 4 * 8 * 8 * 4)


def test_the_command_prints_one_table_and_writes_json(configs, tmp_path, capsys):
    throughput.main([configs[0], "--baseline", configs[1], "--rounds", "1", "--steps", "1", "--batch-size", "2", "--device",
                     "cpu", "--json", str(tmp_path / "speed.json")])  # fmt: skip
    text = capsys.readouterr().out
    for row in (
        "parameters",
        "MACs",
        "training step, images/s",
        "training step, time / unet's",
        "activations",
    ):
        assert row in text
    assert f"torch {torch.__version__}" in text and "batch 2, fp32, 1 rounds" in text
    result = json.loads((tmp_path / "speed.json").read_text())
    assert [figures["name"] for figures in result["figures"]] == ["dcn", "unet"]
    assert result["environment"]["cpu"] and result["settings"]["sampler_steps"] == 1


def test_some_activities_alone(configs, tmp_path, capsys):
    arguments = ["--only", "forward", "training", "--rounds", "1", "--batch-size", "2", "--device", "cpu"]
    throughput.main([configs[0], *arguments, "--json", str(tmp_path / "speed.json")])
    assert "sampling," not in capsys.readouterr().out
    (figures,) = json.loads((tmp_path / "speed.json").read_text())["figures"]
    assert figures["timings"].keys() == {"forward", "training"}


def test_peak_memory_is_the_network_s_own(configs, monkeypatch):
    """Other networks lie on the same GPU: 1000 bytes of them here."""
    subject = throughput.open_subject(configs[0])
    own = sum(p.nbytes for p in (*subject.model.denoiser.parameters(), *subject.model.denoiser.buffers()))
    held = [1000 + own]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held[-1])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: max(held))
    monkeypatch.setattr(throughput, "_training", lambda *_: lambda: held.append(1000 + own + 500))
    assert throughput._peak(subject, replace(settings(), device="cuda")) == own + 500


def test_compiled_networks_are_the_same_networks(configs, monkeypatch):
    """--compile compiles what train.compile does, after everything has been counted on the network as it is written."""
    subjects = [throughput.open_subject(path) for path in configs]
    plain = throughput.compare(subjects, settings(rounds=1), progress=False, wanted=["forward"])
    compiled = []
    for subject in subjects:
        unet = subject.model.denoiser.unet
        monkeypatch.setattr(unet, "compile", lambda mode, name=subject.name: compiled.append((name, mode)))
    figures = throughput.compare(
        subjects, replace(settings(rounds=1), compile="max-autotune"), progress=False, wanted=["forward"]
    )
    assert compiled == [(subject.name, "max-autotune") for subject in subjects]
    for a, b in zip(plain, figures, strict=True):
        assert (a.macs, a.activation_bytes, a.parameters) == (b.macs, b.activation_bytes, b.parameters)
    assert "fp32, compiled (max-autotune), 1 rounds" in throughput.table(
        figures, 1, replace(settings(rounds=1), compile="max-autotune")
    )


def test_mistakes_leave_with_code_2(configs, capsys):
    for arguments, named in (
        (["nowhere.yaml"], "nowhere.yaml"),
        ([configs[0], "--set", "train.lrr=1"], "train.lr"),
        ([configs[0], "--train", "--profile"], "--profile"),
        ([configs[0], "--train", "--compile"], "--compile"),
        ([configs[0], "--rounds", "0"], "--rounds"),
        ([configs[0], "--rounds", "many"], "--rounds"),
    ):
        with pytest.raises(SystemExit) as left:
            throughput.main(arguments)
        error = capsys.readouterr().err
        assert left.value.code == 2 and named in error and error.count("\n") == 1


class Clock:
    """Stands still unless somebody works."""

    seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


def test_time_goes_to_the_module_that_spends_it(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(profile, "time", clock)

    class SlowBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            clock.seconds += 8
            return gradient

    class Convolution(nn.Conv2d):
        def forward(self, x):
            clock.seconds += 1
            return SlowBackward.apply(super().forward(x))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.convolution = nn.GroupNorm(1, 2), Convolution(2, 2, 1)

        def forward(self, x):
            clock.seconds += 2  # its own, not that of what it calls
            return SlowBackward.apply(self.convolution(self.norm(x)) + x)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.embedding = Block(), nn.Embedding(3, 2)

        def forward(self, x):
            clock.seconds += 4
            return self.block(self.block(x) + self.embedding(torch.tensor([1]))[:, :, None, None])

    network, x = Network(), torch.randn(1, 2, 4, 4)
    result = profile.profile("network", network, lambda: network(x).sum(), rounds=2, progress=False)
    for direction, own in (
        ("forward", {"convolutions": 2, "rest": 2 * 2 + 4}),
        ("backward", {"convolutions": 16, "rest": 16}),
    ):
        assert result.seconds[direction] == {kind: [own.get(kind, 0)] * 2 for kind in profile.KINDS}
        assert result.marked[direction] == result.plain[direction] == [sum(own.values())] * 2
        assert result.share(direction, "convolutions") == own["convolutions"] / sum(own.values())
    assert {kind: count for kind, count in result.modules.items() if count} == {
        "convolutions": 1,
        "norms": 1,
        "time and class embedding": 1,
    }
    assert all(p.grad is None for p in network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_every_module_of_a_unet_has_its_kind(configs):
    subject = throughput.open_subject(configs[0])
    kinds = {name: profile.kinds_of_modules(subject.model.denoiser)[module] for name, module in subject.model.denoiser.named_modules()}  # fmt: skip
    for end, kind in (
        ("resnets.0.conv1.dcn", "DCNv4"),
        ("resnets.0.conv1.dcn.offset_mask", "DCNv4's projections"),
        ("unet.conv_in", "convolutions"),
        ("attentions.0.proj_in", "convolutions"),
        ("attn1", "attention"),
        ("attn2.to_q", "attention"),
        ("ff.net.0.proj", "feed-forward"),
        ("norm1", "norms"),
        ("time_embedding.linear_1", "time and class embedding"),
        ("resnets.0.time_emb_proj", "time and class embedding"),
        ("class_embedding", "time and class embedding"),
        ("unet", "rest"),
    ):
        found = {own for name, own in kinds.items() if name.endswith(end)}
        assert found == {kind}, (end, found)


def test_the_profile_is_one_table_and_part_of_the_json(configs, tmp_path, capsys):
    throughput.main([configs[0], "--baseline", configs[1], "--profile", "--rounds", "1", "--batch-size", "2", "--device", "cpu",
                     "--json", str(tmp_path / "profile.json")])  # fmt: skip
    text = capsys.readouterr().out
    for row in (
        *profile.KINDS,
        "whole pass, with marks",
        f"torch {torch.__version__}",
        "dcn modules",
        "unet modules",
    ):
        assert row in text
    content = json.loads((tmp_path / "profile.json").read_text())
    dcn, unet = content["profiles"]
    assert content["figures"] == [] and content["settings"]["batch_size"] == 2
    for direction in ("forward", "backward"):
        assert (
            dcn["seconds"][direction]["DCNv4"][0] > 0
            and dcn["seconds"][direction]["DCNv4's projections"][0] > 0
        )
        assert (
            unet["seconds"][direction]["DCNv4"] == [0] and unet["seconds"][direction]["convolutions"][0] > 0
        )
    assert dcn["modules"]["DCNv4"] > 0 and unet["modules"]["DCNv4"] == 0
