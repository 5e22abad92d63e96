"""Settings: strict, explained, inherited, compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from ldm_dcn.changes import LATER, check_same_run
from ldm_dcn.config import (
    Config,
    check_keys,
    config_hash,
    flat,
    load_config,
    make_config,
    valid_keys,
)
from ldm_dcn.errors import UserError
from ldm_dcn.key_names import OTHER_NAMES
from ldm_dcn.provenance import provenance

CONFIGS = Path(__file__).parent.parent / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "base")
KEYS = list(valid_keys())


def load(*overrides: str) -> Config:
    return load_config(CONFIGS / "digits_dcn.yaml", overrides)


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(*overrides)
    return str(caught.value)


# ------------------------------------------------------------------------------------------ the shipped files


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_short_valid_and_named_after_its_file(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    config = load_config(path)
    assert len(path.read_text().splitlines()) <= 20
    assert config.folder == Path("runs") / name


def test_the_presets_are_there() -> None:
    assert PRESETS == [
        "coco256_dcn_convs",
        "coco256_unet",
        "digits_dcn",
        "digits_dcn_full",
        "digits_unet",
        "digits_unet_small",
        "imagenet256_dcn_convs",
        "imagenet256_dcn_full",
        "imagenet256_unet",
        "photographs_dcn",
        "photographs_unet",
        "sd15_dcn_finetune",
    ]


def test_base_gives_every_setting_but_the_model() -> None:
    base = yaml.safe_load((CONFIGS / "base.yaml").read_text())
    assert sorted(flat(base)) == sorted(key for key in KEYS if not key.startswith("model."))


@pytest.mark.parametrize(
    ("baseline", "swapped"),
    [
        ("digits_unet", "digits_dcn"),
        ("imagenet256_unet", "imagenet256_dcn_convs"),
        ("imagenet256_unet", "imagenet256_dcn_full"),
        ("coco256_unet", "coco256_dcn_convs"),
    ],
)
def test_baseline_and_swap_differ_in_the_model_alone(baseline: str, swapped: str) -> None:
    a, b = (load_config(CONFIGS / f"{name}.yaml", ["run.name=x"]).resolved() for name in (baseline, swapped))
    assert a.pop("model") != b.pop("model")
    assert a == b


def test_imagenet_follows_the_published_recipe() -> None:
    config = load_config(CONFIGS / "imagenet256_dcn_convs.yaml")
    train, noise = config.train, config.diffusion
    assert (train.batch_size, train.lr, train.betas, train.weight_decay) == (1024, 2e-4, (0.99, 0.99), 0.03)
    assert (train.warmup_steps, train.lr_schedule, train.label_dropout, train.ema_decay) == (
        5000,
        "constant",
        0.1,
        0.9999,
    )
    assert (noise.num_steps, noise.beta_schedule, noise.beta_start, noise.beta_end) == (
        1000,
        "scaled_linear",
        0.00085,
        0.0120,
    )
    assert (config.sample.sampler, config.sample.steps, config.sample.guidance) == ("dpm++", 50, 1.4)


# ------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.lr=1e-4", "train.lr", 1e-4),
        ("train.lr=.5", "train.lr", 0.5),
        ("train.lr=1", "train.lr", 1.0),
        ("train.gradient_clip=null", "train.gradient_clip", None),
        ("train.gradient_clip=", "train.gradient_clip", None),
        ("train.betas=[0.9, 0.95]", "train.betas", [0.9, 0.95]),
        ("train.trackers=[tensorboard]", "train.trackers", ["tensorboard"]),
        ("autoencoder=some/folder", "autoencoder.spec", "some/folder"),
        ("autoencoder.dtype=bfloat16", "autoencoder.dtype", "bfloat16"),
        ("data.source=C: odd [name", "data.source", "C: odd [name"),
        ("run.name=no", "run.name", "no"),  # YAML 1.1 would read false
        ("model.unet.layers_per_block=3", "model.unet.layers_per_block", 3),
        ("model.swap=null", "model.swap", None),
        ("train.steps=010", "train.steps", 10),  # YAML 1.1 would read eight
        ("train.steps=+7", "train.steps", 7),
        ("run.name=2001-99-99", "run.name", "2001-99-99"),
        ("run.name=0x10", "run.name", "0x10"),
    ],
)
def test_overrides(override: str, key: str, value: object) -> None:
    assert flat(load(override).resolved())[key] == value


def test_an_override_reaches_into_an_absent_section() -> None:
    config = load_config(CONFIGS / "digits_unet.yaml", ["model.swap.sites=[resnet]"])
    assert config.model.swap == {"sites": ["resnet"]}


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", ".=1"])
def test_what_is_no_override_is_refused(override: str) -> None:
    assert "section.key=value" in refusal(override)


def test_an_override_below_a_value_is_refused() -> None:
    assert "train.steps is a value" in refusal("train.steps.more=1")


# ------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("key", KEYS)
def test_a_misspelt_key_names_itself_and_the_right_one(key: str) -> None:
    section, leaf = key.split(".")
    wrong = f"{section}.{leaf[:-1]}"
    text = refusal(f"{wrong}=1")
    assert f"{wrong}: unknown setting; did you mean " in text
    meant = text.split("did you mean ")[1].split("?")[0]
    assert meant == key


def test_a_key_without_its_section_finds_it() -> None:
    assert "batch_size: unknown setting; did you mean train.batch_size?" in refusal("batch_size=3")
    assert "lr: unknown setting; did you mean train.lr?" in refusal("lr=3")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("train.checkpoint_every", "did you mean train.save_every?"),
        ("train.num_steps", "did you mean train.steps?"),
        ("train.max_grad_norm", "did you mean train.gradient_clip?"),
        ("train.warmup", "did you mean train.warmup_steps?"),
        ("train.checkpoint", "did you mean train.gradient_checkpointing or train.keep_checkpoints?"),
        ("sampel.stesp", "did you mean sample.steps?"),
        ("train.workers", "there are seed, steps, batch_size, lr, "),  # not trackers
        ("sample.eta", "there are sampler, steps, guidance, "),  # not steps
        ("model.path", "there are preset, unet, pretrained, swap"),
    ],
)
def test_what_is_only_a_little_alike_is_not_what_was_meant(key: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        check_keys("--allow-change", [key])
    assert f"'{key}': unknown setting; {expected}" in str(caught.value)


def test_other_names_lead_to_settings_and_hide_none() -> None:
    sections = set(Config.model_fields)
    for name, key in OTHER_NAMES.items():
        assert key in KEYS and name not in KEYS and name not in sections
        assert "." in name or name not in {own.rsplit(".", 1)[-1] for own in KEYS}


def test_a_mistake_is_looked_for_where_it_was_made(tmp_path: Path) -> None:
    """On the command line, in the file, or in both."""
    assert refusal("trian.steps=3").startswith("the command line: trian: unknown setting")
    assert refusal("train.steps=x").startswith("the command line: train.steps: ")
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {CONFIGS / 'digits_dcn.yaml'}\ntrain: {{stesp: 3}}\n")
    for overrides, origin in (
        ((), f"{path}: "),
        (("train.lr=x",), f"{path} and the command line: 2 mistakes: "),
    ):
        with pytest.raises(UserError) as refused:
            load_config(path, overrides)
        assert str(refused.value).startswith(origin) and "train.stesp" in str(refused.value)


def test_nonsense_has_no_suggestion() -> None:
    assert refusal("zzqqxx=3").endswith("zzqqxx: unknown setting")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=abc", "train.steps: input should be a valid integer (got 'abc')"),
        ("train.steps=1.5", "train.steps: input should be a valid integer"),
        ("train.steps=0", "train.steps: input should be greater than or equal to 1 (got 0)"),
        ("train.lr=-1", "train.lr: input should be greater than 0 (got -1)"),
        ("train.lr=.nan", "train.lr: input should be"),
        ("train.betas=[0.9, 0.99, 1]", "train.betas:"),
        ("train.betas=[0.9, 1.5]", "train.betas.1: input should be less than 1 (got 1.5)"),
        ("train.precision=fp8", "train.precision: input should be 'fp32', 'bf16' or 'fp16' (got 'fp8')"),
        ("train.compile=1", "train.compile: input should be a valid boolean (got 1)"),
        ("sample.sampler=plms", "'ddim', 'euler', 'ddpm' or 'heun' (got 'plms')"),
        ("data.image_channels=2", "data.image_channels: input should be 1 or 3 (got 2)"),
        ("train=3", "train: input should be"),
        ("train.steps=0x10", "train.steps: input should be a valid integer (got '0x10')"),
        ("train.steps=1:30", "train.steps: input should be a valid integer (got '1:30')"),
        ("train.steps=1_000", "train.steps: input should be a valid integer (got '1_000')"),
        ("train.steps=" + "9" * 5000, "train.steps: input should be a valid integer (got '9999"),
        ("train.steps=9223372036854775808", "train.steps: input should be a valid integer"),
        ("train.steps=!!binary aGk=", "train.steps: input should be a valid integer (got '!!binary"),
        ("train.betas=" + "[" * 3000, "train.betas: input should be a valid tuple"),
        ("train.betas=[*a]", "train.betas: input should be a valid tuple"),
        ("diffusion.beta_start=0.5", "diffusion.beta_start=0.5 is more than diffusion.beta_end"),
        ("diffusion.num_steps=1", "is more than diffusion.num_steps=1, and no time is taken twice"),
        ("sample.guidance=.inf", "sample.guidance: input should be"),
        ("sample.guidance=-1", "sample.guidance: input should be"),
        ("sample.guidance_interval=[0.6, 0.2]", "runs backwards; write [0.2, 0.6]"),
        ("train.learning_rate=3", "train.learning_rate: unknown setting; did you mean train.lr?"),
        (
            "train.parameter_groups=[{match: dcn, lr_facter: 2}]",
            "train.parameter_groups.0.lr_facter: unknown setting; did you mean lr_factor?",
        ),
        (
            "train.parameter_groups=[{match: dcn, betas: 2}]",
            "parameter_groups.0.betas: unknown setting; there are match, lr_factor, weight_decay",
        ),
        ("train.parameter_groups=[{match:dcn}]", "YAML wants a space after the colon: match: dcn"),
        ("train.parameter_groups=[{lr_factor: 2}]", "train.parameter_groups.0.match: missing; set it"),
        (
            "train.trackers=tensorboard",
            "train.trackers: it takes a list (got 'tensorboard'); write [tensorboard]",
        ),
        ("train.steps=1e3", "train.steps: input should be a valid integer (got 1000.0); write 1000"),
        ("train.ema_widths=[0.05]", "train.ema_widths: takes more values than 1"),
        ("train.validate_every=2", "data.split=all holds nothing out; set data.split=train"),
        ("run.zzqqxx=3", "run.zzqqxx: unknown setting; there are dir, name"),
        ("run.name=..", "run.name: names one folder in run.dir"),
        ("run.name=.", "run.name: names one folder in run.dir"),
        ("run.name=a/b", "run.name: names one folder in run.dir"),
        ("run.name='a\\b'", "run.name: names one folder in run.dir"),
        ("run.name=a\nb", "run.name: takes printable characters only"),
        ('run.name="a\\0b"', "run.name: takes printable characters only"),
        ("run.name=" + 300 * "x", "run.name: is too long for a folder's name; use at most 200 bytes"),
        ('run.dir="a\\0b"', "run.dir: takes printable characters only"),
        ('data.source="a\\0b"', "data.source: takes printable characters only"),
        ("model.preset=sd_unet", "exactly one of model.preset, model.unet and model.pretrained"),
    ],
)
def test_a_wrong_value_names_key_rule_and_value(override: str, expected: str) -> None:
    assert expected in refusal(override)


def test_all_mistakes_are_listed_at_once() -> None:
    text = refusal("train.lrr=1", "train.steps=abc", "optimiser.lr=2")
    assert "3 mistakes" in text
    assert all(key in text for key in ("train.lrr", "train.steps", "optimiser"))


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no settings"),
        ("- 1\n- 2\n", "holds no settings"),
        ("train: {lr: 1, lr: 2}\n", "key 'lr' is given twice"),
        ("train: [\n", "not valid YAML"),
        ("base: mine.yaml\n", "leads back to itself"),
        ("base: nowhere.yaml\n", "mine.yaml): No such file"),
        ("base: [1]\n", "path of one YAML file"),
        ("train: {lr: 1.0}\n", "train.steps: missing; train.stratified_times: missing"),
        ("train: !!python/object:os.system {}\n", "not valid YAML"),
        ("? [a, b]\n: 3\n", "a key is a word, not ['a', 'b']"),
        ("? {a: b}\n: 3\n", "a key is a word, not {'a': 'b'}"),
        ("3: 4\n", "a key is a word, not 3"),
        ("a: &a [*a]\n", "references (*a) are not taken"),
        ("a: !!binary aGVsbG8=\n", "binary"),
        ("a: !!timestamp 2001-99-99\n", "timestamp"),
        ("a: 2001-99-99\n", "a: unknown setting"),
        ("a: " + "9" * 5000 + "\n", "a whole number of 5000 digits is too large"),
        ("a: " + "[" * 3000 + "\n", "nested too deeply"),
        ("a:\n" + "".join(" " * i + "a:\n" for i in range(1, 300)), "nested too deeply"),
        ("\0\n", "not valid YAML"),
    ],
)
def test_a_bad_file_is_explained(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=r"mine.yaml|nowhere.yaml") as caught:
        load_config(write(tmp_path, text))
    assert expected in str(caught.value)


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the config"):
        load_config(tmp_path / "none.yaml")


# -------------------------------------------------------------------------------------- inheritance, identity


def test_sections_merge_and_values_replace(tmp_path: Path) -> None:
    path = write(
        tmp_path, f"base: {CONFIGS / 'digits_unet.yaml'}\nmodel: {{unet: {{block_out_channels: [8, 16]}}}}\n"
    )
    ours, theirs = load_config(path), load_config(CONFIGS / "digits_unet.yaml")
    assert ours.model.unet == {**theirs.model.unet, "block_out_channels": [8, 16]}
    assert ours.train == theirs.train
    assert ours.run.name == "mine"


def test_the_printed_config_reads_back_the_same(tmp_path: Path) -> None:
    config = load("train.lr=1e-5", "train.gradient_clip=null")
    assert load_config(write(tmp_path, config.to_yaml())) == config


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        load().train.lr = 3.0


def test_the_hash_follows_the_values() -> None:
    assert config_hash(load().resolved()) == config_hash(load().resolved())
    assert config_hash(load().resolved()) != config_hash(load("train.seed=1").resolved())


def test_provenance_names_versions() -> None:
    facts = provenance()
    assert facts["versions"]["torch"] and facts["versions"]["diffusers"] and facts["python"]
    assert facts["versions"]["dcnv4-diffusion"]  # its own, under the name that pip knows


# ------------------------------------------------------------------------------ going on under another config


def compare(*overrides: str, allowed: tuple[str, ...] = ()) -> list[str]:
    return check_same_run(load().resolved(), load(*overrides), "runs/x", allowed)


def test_the_same_config_goes_on() -> None:
    assert compare() == []


def test_harmless_differences_are_listed() -> None:
    assert compare("train.save_every=7", "run.dir=elsewhere", "sample.guidance=3.0") == [
        "run.dir: 'runs' -> 'elsewhere'",
        "sample.guidance: 1.5 -> 3.0",
        "train.save_every: 500 -> 7",
    ]


@pytest.mark.parametrize(
    "override",
    [
        "model.swap=null",
        "model.unet.layers_per_block=4",
        "autoencoder.dtype=bfloat16",
        "diffusion.beta_end=0.02",
        "data.split=train",
        "data.image_size=16",
    ],
)
def test_another_architecture_is_refused_whatever_is_allowed(override: str) -> None:
    key = override.split("=")[0]
    with pytest.raises(UserError, match="another model or other data") as caught:
        compare(override, allowed=(key,))
    assert key in str(caught.value)


@pytest.mark.parametrize("override", ["autoencoder=moved/folder", "data.source=moved/folder"])
def test_a_place_may_change_when_that_is_allowed(override: str) -> None:
    key = {"autoencoder": "autoencoder.spec"}.get(override.split("=")[0], "data.source")
    with pytest.raises(UserError, match=f"--allow-change {key}"):
        compare(override)
    assert len(compare(override, allowed=(key,))) == 1


def test_another_recipe_must_be_allowed_key_by_key() -> None:
    with pytest.raises(UserError, match=r"--allow-change train.lr train.seed") as caught:
        compare("train.lr=5e-4", "train.seed=3")
    assert "train.lr: 0.004 -> 0.0005" in str(caught.value)
    assert compare("train.lr=5e-4", allowed=("train.lr",)) == ["train.lr: 0.004 -> 0.0005"]


def test_more_steps_are_free_under_a_constant_rate_only() -> None:
    with pytest.raises(UserError, match=r"train\.steps"):
        compare("train.steps=9000")
    constant = load("train.lr_schedule=constant")
    longer = load("train.lr_schedule=constant", "train.steps=9000")
    assert check_same_run(constant.resolved(), longer, "runs/x") == [
        f"train.steps: {constant.train.steps} -> 9000"
    ]


def test_a_run_from_before_a_setting_goes_on_with_what_it_meant_then() -> None:
    old = load().resolved()
    for key in LATER:
        section, name = key.split(".")
        del old[section][name]
    assert check_same_run(old, load(), "runs/x") == []
    with pytest.raises(UserError, match=r"train.parameter_groups: \[\] -> "):
        check_same_run(old, load("train.parameter_groups=[{match: norm}]"), "runs/x")
    with pytest.raises(UserError, match=r"diffusion.zero_terminal_snr: False -> True"):
        check_same_run(old, load("diffusion.prediction=v", "diffusion.zero_terminal_snr=true"), "runs/x")


def test_settings_given_in_code_meet_the_same_rules() -> None:
    settings = load().resolved()
    assert make_config(settings, "other").run.name == "digits_dcn"
    settings["run"]["name"] = None
    assert make_config(settings, "other").run.name == "other"
    settings["train"]["lrr"] = 1
    with pytest.raises(UserError, match=r"did you mean train\.lr\?"):
        make_config(settings, "other")
