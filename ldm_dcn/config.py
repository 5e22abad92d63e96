"""Typed settings: YAML files with a `base:`, dotted overrides, errors that name the nearest key.

A config file states its differences from the file named by its `base:` key (a path beside it);
`configs/base.yaml` is the one place where values stand. This file holds their types and ranges. Every mistake
is reported at once, in one `UserError`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from .compiling import WITH_GRAPHS
from .errors import SHOWN, UserError, shown
from .key_names import meant, unknown_beside
from .strict_yaml import LARGEST, Loader

LONGEST_NAME = 200  # bytes of a run's name; file systems take 255, and temporary names are longer


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("takes printable characters only")
    return text


def _file_name(text: str) -> str:
    if text.strip() in ("", ".", "..") or "/" in text or "\\" in text:
        raise ValueError("names one folder in run.dir: no path, and neither . nor ..")
    if len(text.encode("utf-8", "surrogateescape")) > LONGEST_NAME:
        raise ValueError(f"is too long for a folder's name; use at most {LONGEST_NAME} bytes")
    return text


Count = Annotated[int, Field(ge=1, le=LARGEST)]
Every = Annotated[int, Field(ge=0, le=LARGEST)]  # a period in steps; 0 means never
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1), AfterValidator(_printable)]
FileName = Annotated[Name, AfterValidator(_file_name)]
Width = Annotated[float, Field(gt=0, lt=0.28)]  # of a power-function average


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from None
    return text


def _as_tuple(value: Any) -> Any:
    """YAML and JSON know lists only."""
    return tuple(value) if isinstance(value, list) else value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(_Section):
    """The denoiser: a preset of `build_unet`, `UNet2DConditionModel` settings, or a trained U-Net; and what to swap in it.

    `pretrained` is a folder in diffusers layout or a hub id, of a U-Net or of a pipeline with one in unet/.
    """

    preset: Name | None = None
    unet: dict[str, Any] | None = None
    pretrained: Name | None = None
    swap: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if [self.preset, self.unet, self.pretrained].count(None) != 2:
            raise ValueError(
                "give exactly one of model.preset, model.unet and model.pretrained (set the others to null)"
            )
        return self


class AutoencoderConfig(_Section):
    """A hub id, a folder, a file, `digits` or `identity`. `autoencoder: X` is short for its `spec: X`."""

    spec: Name
    dtype: Literal["auto", "float32", "bfloat16", "float16"]


class DataConfig(_Section):
    """The images to learn from: a latent cache (`ldm_dcn.encode`), or what `ldm_dcn.data.open_dataset` opens.

    `num_classes` null takes the number the source has; 0 trains without labels. `max_bad` broken images (a
    count, or a share below 1) are left out before it is an error.
    """

    source: Name
    split: Literal["all", "train", "held-out"]
    image_size: Annotated[int, Field(ge=1, le=2**14)]
    image_channels: Literal[1, 3]
    condition: Literal["labels", "text"]
    num_classes: Annotated[int, Field(ge=0, le=2**31)] | None
    flip: bool | None
    max_bad: NonNegative
    encode_batch_size: Count


class DiffusionConfig(_Section):
    """The noise schedule and what the network predicts (`ldm_dcn.diffusion.Schedule`); `flow` has no betas."""

    num_steps: Annotated[int, Field(ge=1, le=10**6)]
    beta_schedule: Literal["scaled_linear", "linear"]
    beta_start: Annotated[float, Field(gt=0, lt=1)]
    beta_end: Annotated[float, Field(gt=0, lt=1)]
    prediction: Literal["noise", "v", "x0", "flow"]
    zero_terminal_snr: bool = False  # which exports from before there was one do not say

    @model_validator(mode="after")
    def _noise_grows(self) -> DiffusionConfig:
        if self.beta_start > self.beta_end:
            raise ValueError(
                f"diffusion.beta_start={self.beta_start} is more than diffusion.beta_end={self.beta_end}; noise grows "
                "from the first to the second, so give the smaller one first"
            )
        if self.zero_terminal_snr and self.prediction not in ("v", "x0"):
            raise ValueError(
                f"diffusion.zero_terminal_snr is on and diffusion.prediction={self.prediction}; set it to v or x0, which can be "
                "learnt where there is noise alone"
            )
        return self


class ParameterGroup(_Section):
    """Parameters whose names hold `match`, a regular expression (`unet.mid_block.resnets.0.conv1.dcn.offset_mask.weight`): `lr_factor`
    times `train.lr`, and a `weight_decay` of their own unless it is null."""

    match: Annotated[str, AfterValidator(_regex)]
    lr_factor: NonNegative = 1.0
    weight_decay: NonNegative | None = None


class TrainConfig(_Section):
    """The recipe. `batch_size` is the global batch, whatever the number of processes and of parts."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    steps: Count
    batch_size: Count
    lr: Positive
    lr_schedule: Literal["constant", "cosine", "linear"]
    warmup_steps: Every
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(_as_tuple)]
    weight_decay: NonNegative
    parameter_groups: Annotated[tuple[ParameterGroup, ...], BeforeValidator(_as_tuple)]
    gradient_clip: Positive | None
    label_dropout: Fraction
    times: Literal["uniform", "lognormal"]
    times_mean: Annotated[float, Field(allow_inf_nan=False)]
    times_std: Positive
    stratified_times: bool
    min_snr_gamma: Positive | None
    ema: Literal["constant", "power"]
    ema_decay: Beta
    ema_widths: Annotated[tuple[Width, Width], BeforeValidator(_as_tuple)]
    ema_snapshot_every: Every
    precision: Literal["fp32", "bf16", "fp16"]
    tf32: bool
    compile: bool
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
    attention: Literal["sdpa", "flash", "xformers"]
    parallel: Literal["ddp", "fsdp", "zero"]
    gradient_accumulation: Count
    gradient_checkpointing: bool
    match_steps: Every
    new_only_steps: Every
    skip_non_finite: Every
    log_every: Count
    save_every: Every
    sample_every: Every
    score_every: Every
    validate_every: Every
    validation_images: Count
    export_every: Every
    keep_checkpoints: Count
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_as_tuple)]


class SampleConfig(_Section):
    """How the grids and scores on the way are drawn, and what `sample.py` and `LatentDiffusion` draw where they are told nothing else."""

    sampler: Literal["dpm++", "ddim", "euler", "ddpm", "heun"]
    steps: Count
    guidance: NonNegative
    guidance_interval: Annotated[tuple[Fraction, Fraction], BeforeValidator(_as_tuple)]
    guidance_rescale: Fraction
    batch_size: Count
    images_per_class: Count
    prompts: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
    score_images: Count
    score_extractor: Name | None
    score_reference: Name | None

    @model_validator(mode="after")
    def _interval_runs_forwards(self) -> SampleConfig:
        low, high = self.guidance_interval
        if low > high:
            raise ValueError(
                f"sample.guidance_interval=[{low}, {high}] runs backwards; write [{high}, {low}]"
            )
        return self


class RunConfig(_Section):
    """Where the run lives: `dir/name`. A null name is the config file's."""

    dir: Name
    name: FileName | None


class Config(_Section):
    """A whole training run."""

    model: ModelConfig
    autoencoder: AutoencoderConfig
    data: DataConfig
    diffusion: DiffusionConfig
    train: TrainConfig
    sample: SampleConfig
    run: RunConfig

    @model_validator(mode="after")
    def _something_is_held_out(self) -> Config:
        if self.train.validate_every and self.data.split != "train":
            raise ValueError(
                f"train.validate_every is on and data.split={self.data.split} holds nothing out; set data.split=train, or "
                "train.validate_every=0"
            )
        return self

    @model_validator(mode="after")
    def _graphs_keep_no_gradients(self) -> Config:
        train = self.train
        # The next part's replay would overwrite the gradients that the one before left (pytorch issue 169545).
        if train.compile and train.compile_mode in WITH_GRAPHS and train.gradient_accumulation > 1:
            raise ValueError(
                f"train.compile_mode={train.compile_mode} replays CUDA graphs, which do not add up gradients over "
                f"train.gradient_accumulation={train.gradient_accumulation} parts; set train.compile_mode=default, or "
                "train.gradient_accumulation=1"
            )
        return self

    @model_validator(mode="after")
    def _snapshots_are_of_power_averages(self) -> Config:
        if self.train.ema_snapshot_every and self.train.ema != "power":
            raise ValueError(
                f"train.ema_snapshot_every={self.train.ema_snapshot_every} keeps power averages, and train.ema={self.train.ema} has "
                "none; set train.ema=power, or train.ema_snapshot_every=0"
            )
        return self

    @model_validator(mode="after")
    def _enough_times(self) -> Config:
        if self.sample.steps > self.diffusion.num_steps:
            raise ValueError(
                f"sample.steps={self.sample.steps} is more than diffusion.num_steps={self.diffusion.num_steps}, and no "
                f"time is taken twice; set sample.steps={self.diffusion.num_steps} or less"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        """Every setting as plain JSON-able values."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.resolved(), sort_keys=False, default_flow_style=None, width=110)

    @property
    def folder(self) -> Path:
        """The run folder: a function of the config, so that the same command finds its run again."""
        assert self.run.name is not None  # load_config and make_config fill it in
        return Path(self.run.dir) / self.run.name


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in the YAML file `path`, with its bases below it and `overrides` ("train.lr=1e-4") above it.

    Raises `UserError` naming every unknown key (with the nearest valid one), missing key, wrong type and
    wrong value.
    """
    path = Path(path)
    settings = _read(path, ())
    for override in overrides:
        _override(settings, override)
    return make_config(settings, name=path.stem, origin=str(path), overrides=overrides)


def make_config(
    settings: Mapping[str, Any], name: str, origin: str = "config", overrides: Sequence[str] = ()
) -> Config:
    """The config of nested `settings`; `name` is the run's name where the settings give none. Errors name `origin`, or the
    command line where what is wrong came from `overrides`."""
    settings = _normalised(settings)
    run = settings.get("run")
    if isinstance(run, Mapping) and run.get("name", "") is None:
        settings["run"] = {**run, "name": name}
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        problems = sorted({_explain(e) for e in error.errors()})
        by_hand = {_is_from(overrides, e) for e in error.errors()}
        if True in by_hand:
            origin = "the command line" if by_hand == {True} else f"{origin} and the command line"
        count = "" if len(problems) == 1 else f"{len(problems)} mistakes: "
        told = "; ".join(problems)
        if told.count(_MISSING) > 1:  # once will do
            told = told.replace(_MISSING, "") + _MISSING.replace("it", "them", 1)
        raise UserError(f"{origin}: {count}{told}") from None


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    try:
        if path.resolve() in chain:
            raise UserError(f"{path}: its `base:` leads back to itself; break the circle")
        text = path.read_text(encoding="utf-8")
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # not there, not UTF-8, a circle of links, NUL in its name
        reason = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 text ({error})"
        asked = f" (the base of {chain[-1]})" if chain else ""
        raise UserError(
            f"cannot read the config {path}{asked}: {reason}; give the path of a YAML file"
        ) from None
    try:
        settings = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings; it should start with `base: base.yaml`, then sections")
    if "variants" in settings:
        raise UserError(f"{path} is a study of several runs; run python -m eval.study {path}")
    settings = _normalised(settings)
    base = settings.pop("base", None)
    if base is None:
        return settings
    if not isinstance(base, str):
        raise UserError(f"{path}: `base:` takes the path of one YAML file, not {base!r}")
    return _merged(_read(path.parent / base, (*chain, path.resolve())), settings)


def _normalised(settings: Mapping[str, Any]) -> dict[str, Any]:
    settings = dict(settings)
    if isinstance(settings.get("autoencoder"), str):
        settings["autoencoder"] = {"spec": settings["autoencoder"]}
    return settings


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`: sections and dicts merge key by key, everything else is replaced."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result


def _override(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"'{override}' is not an override; write section.key=value, such as train.steps=1000")
    value = _value(text.strip())
    if parts == ["autoencoder"] and isinstance(value, str):
        parts = ["autoencoder", "spec"]
    node = settings
    if len(parts) > Loader.DEEPEST:
        raise UserError(f"'{override[:SHOWN]}' is nested too deeply for a setting; write section.key=value")
    for depth, part in enumerate(parts[:-1], 1):
        if node.get(part) is None:
            node[part] = {}
        if not isinstance(node[part], dict):
            raise UserError(
                f"'{override}': {'.'.join(parts[:depth])} is a value, not a section, so it has no key "
                f"'{parts[depth]}'"
            )
        node = node[part]
    node[parts[-1]] = value


def _value(text: str) -> Any:
    """An override's right side: YAML in flow style, so that a path with `: ` or ` #` in it stays a path."""
    try:
        value = yaml.load(text, Loader) if text else None
    except yaml.YAMLError:
        return text
    opener = {str: ("'", '"'), dict: ("{",), list: ("[",)}.get(type(value))
    return value if opener is None or text.startswith(opener) else text


def valid_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key there is, such as train.lr."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from valid_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _unknown(key: str) -> str:
    """The tail of an error: what may be meant, or the settings of the section, where there is one."""
    if names := meant(key, list(valid_keys()), Config.model_fields):
        return f"; did you mean {' or '.join(names)}?"
    section = key.partition(".")[0]
    return f"; there are {', '.join(names_in(section))}" if section in Config.model_fields else ""


def names_in(section: str) -> list[str]:
    return list(Config.model_fields[section].annotation.model_fields)


def check_keys(option: str, keys: Sequence[str]) -> None:
    """Raise `UserError`, naming the nearest, for one of `keys` that is no setting."""
    known = (
        *valid_keys(),
        "model.unet.",
        "model.swap.",
    )  # the last two take what diffusers and the swap take
    for key in keys:
        if key in Config.model_fields:
            raise UserError(
                f"{option} {key} is a section; name those of its settings, such as {key}.{names_in(key)[0]}"
            )
        if key not in known and not key.startswith(known[-2:]):
            hint = _unknown(key) or "; write section.key, such as train.lr"
            raise UserError(f"{option} {shown(key)}: unknown setting{hint}")


def _is_from(overrides: Sequence[str], error: Mapping[str, Any]) -> bool:
    """Whether the setting that is wrong, or all of its section that there is, was set by one of `overrides`."""
    key = dotted(error["loc"])
    unknown = error["type"] == "extra_forbidden"
    given = [override.partition("=")[0].strip() for override in overrides]
    return any(
        key == own or key.startswith(f"{own}.") or (unknown and own.startswith(f"{key}.")) for own in given
    )


_MISSING = "; set it, or start the file with `base: base.yaml`, the path of the project's configs/base.yaml"


def _explain(error: Mapping[str, Any]) -> str:
    place = error["loc"]
    key, is_in_list = dotted(place), any(isinstance(part, int) for part in place)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown setting{unknown_beside(Config, place) if is_in_list else _unknown(key)}"
    if error["type"] == "missing" and isinstance(place[-1], int):
        return f"{dotted(place[:-1])}: takes more values than {place[-1]}"
    if error["type"] == "missing":
        return f"{key}: missing{'; set it' if is_in_list else _MISSING}"
    return wrong_value(error)


def dotted(place: Sequence[str | int]) -> str:
    """Where pydantic found a mistake: train.betas.0."""
    return ".".join(map(str, place))


def wrong_value(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors about a value in words, its key before it."""
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and not isinstance(error["input"], str):
        return message  # of a section, which names its keys
    given, mend = error["input"], ""
    if error["type"] == "tuple_type" and isinstance(given, (str, int, float)) and "[" not in str(given):
        message, mend = "it takes a list", f"; write [{given}]"
    elif error["type"] == "int_type" and isinstance(given, float) and given.is_integer():
        mend = f"; write {given:.0f}"
    return f"{dotted(error['loc'])}: {message[0].lower()}{message[1:]} (got {shown(given)}){mend}"


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.lr": 1e-4, ...} from {"train": {"lr": 1e-4, ...}}."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result


def config_hash(settings: Mapping[str, Any]) -> str:
    """12 hex digits that name a resolved config."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
