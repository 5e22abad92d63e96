"""Typed, strict settings: YAML files with a `base:`, dotted overrides, errors that name the nearest key.

A config file states its differences from the file named by its `base:` key (a path beside it);
`configs/base.yaml` is the one place where values stand. This file holds their types and ranges. Every mistake
is reported at once, in one `UserError`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
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

from .errors import UserError

LARGEST = 2**63 - 1  # of a whole number: what torch holds
LONGEST_NAME = 200  # bytes of a run's name; file systems take 255, and temporary names are longer
SHOWN = 80  # characters of a wrong value in its error


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
    count, or a share below 1) are left out before it is an error. `text_encoder` is needed where prompts are
    to be drawn whose tokens no cache holds; null takes the cache's.
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

    @model_validator(mode="after")
    def _noise_grows(self) -> DiffusionConfig:
        if self.beta_start > self.beta_end:
            raise ValueError(
                f"diffusion.beta_start={self.beta_start} is more than diffusion.beta_end={self.beta_end}; noise grows "
                "from the first to the second, so give the smaller one first"
            )
        return self


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
    keep_checkpoints: Count
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_as_tuple)]


class SampleConfig(_Section):
    """Defaults of the sample grids drawn on the way and of `sample.py`."""

    sampler: Literal["dpm++", "ddim", "euler"]
    steps: Count
    guidance: NonNegative
    guidance_interval: Annotated[tuple[Fraction, Fraction], BeforeValidator(_as_tuple)]
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


# --------------------------------------------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: `1e-4` is a float, `no` and `2001-01-01` are strings, `010` is ten.

    A key that is given twice or is no word, a reference (`*name`), nesting that no setting has, and types that JSON does
    not know are errors.
    """

    DEEPEST = 32
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None,
                None,
                f"references (*{event.anchor}) are not taken; write the value out",
                event.start_mark,
            )
        self._depth += 1
        if self._depth > self.DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "nested too deeply for a setting", mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise self._error(f"a key is a word, not {_shown(key)}", key_node)
            if key in seen:
                raise self._error(f"key '{key}' is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        digits = text.lstrip("+-").lstrip("0") or "0"
        if len(digits) > len(str(LARGEST)) or int(digits) > LARGEST:
            raise self._error(f"a whole number of {len(digits)} digits is too large", node)
        return -int(digits) if text.startswith("-") else int(digits)

    @staticmethod
    def _error(text: str, node: yaml.Node) -> yaml.YAMLError:
        return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


_TAG = "tag:yaml.org,2002:"
_OWN = ("bool", "float", "int", "timestamp")  # PyYAML's rules for these are YAML 1.1's
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.removeprefix(_TAG) not in _OWN]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_JSON = ("null", "bool", "float", "str", "seq", "map")
_Loader.yaml_constructors = {
    **{_TAG + kind: yaml.SafeLoader.yaml_constructors[_TAG + kind] for kind in _JSON},
    None: yaml.SafeLoader.yaml_constructors[None],  # an error that names the tag
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


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
        raise UserError(f"{origin}: {count}" + "; ".join(problems)) from None


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
        raise UserError(f"cannot read the config {path}: {reason}; give the path of a YAML file") from None
    try:
        settings = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings; it should start with `base: base.yaml`, then sections")
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
    if len(parts) > _Loader.DEEPEST:
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
        value = yaml.load(text, _Loader) if text else None
    except yaml.YAMLError:
        return text
    opener = {str: ("'", '"'), dict: ("{",), list: ("[",)}.get(type(value))
    return value if opener is None or text.startswith(opener) else text


# ------------------------------------------------------------------------------------------------- explaining


def valid_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key there is, such as train.lr."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from valid_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


# What other programs of this field call these settings, by the last part of the name or by all of it.
OTHER_NAMES = {
    "learning_rate": "train.lr",
    "lr_scheduler": "train.lr_schedule",
    "scheduler": "train.lr_schedule",
    "lr_warmup_steps": "train.warmup_steps",
    "epochs": "train.steps",
    "max_steps": "train.steps",
    "max_train_steps": "train.steps",
    "train.num_steps": "train.steps",
    "train_batch_size": "train.batch_size",
    "mixed_precision": "train.precision",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "grad_norm": "train.gradient_clip",
    "max_grad_norm": "train.gradient_clip",
    "accumulation_steps": "train.gradient_accumulation",
    "snr_gamma": "train.min_snr_gamma",
    "ema_rate": "train.ema_decay",
    "checkpoint_every": "train.save_every",
    "checkpoint_interval": "train.save_every",
    "checkpointing_steps": "train.save_every",
    "ckpt_every": "train.save_every",
    "save_interval": "train.save_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "checkpoints_total_limit": "train.keep_checkpoints",
    "log_interval": "train.log_every",
    "logging_steps": "train.log_every",
    "validation_steps": "train.sample_every",
    "eval_every": "train.score_every",
    "evaluate_every": "train.score_every",
    "report_to": "train.trackers",
    "resolution": "data.image_size",
    "train_data_dir": "data.source",
    "dataset": "data.source",
    "data_dir": "data.source",
    "data.path": "data.source",
    "prediction_type": "diffusion.prediction",
    "num_train_timesteps": "diffusion.num_steps",
    "diffusion.steps": "diffusion.num_steps",
    "num_inference_steps": "sample.steps",
    "guidance_scale": "sample.guidance",
    "cfg": "sample.guidance",
    "cfg_scale": "sample.guidance",
    "pretrained_model_name_or_path": "model.pretrained",
    "vae": "autoencoder.spec",
    "autoencoder.path": "autoencoder.spec",
    "output_dir": "run.dir",
}
ALIKE = 0.85  # share of letters from which on another spelling is taken for a slip


def _meant(key: str) -> list[str]:
    """What may be meant by `key`, which is no setting: another name, a place, a spelling, or a part of it. Never a mere guess."""
    leaf = key.rsplit(".", 1)[-1]
    if other := OTHER_NAMES.get(key) or OTHER_NAMES.get(leaf):
        return [other]
    keys = list(valid_keys())
    if same_leaf := [k for k in keys if k.rsplit(".", 1)[-1] == leaf]:
        return same_leaf[:1]
    if "." not in key:
        names = {**{k.rsplit(".", 1)[-1]: k for k in reversed(keys)}, **{s: s for s in Config.model_fields}}
        return [names[near] for near in difflib.get_close_matches(key, names, n=1, cutoff=0.7)]
    section = difflib.get_close_matches(key.partition(".")[0], Config.model_fields, n=1)
    own = [k for k in keys if section and k.startswith(f"{section[0]}.")]
    corrected = ".".join([*section, key.partition(".")[2]])
    if near := difflib.get_close_matches(corrected, own, n=1, cutoff=ALIKE):
        return near
    words = leaf.split("_")
    return [k for k in own if all(re.search(rf"[._]{re.escape(word)}", k) for word in words)]


def _unknown(key: str) -> str:
    """The tail of an error: what may be meant, or the settings of the section, where there is one."""
    if meant := _meant(key):
        return f"; did you mean {' or '.join(meant)}?"
    field = Config.model_fields.get(key.partition(".")[0])
    return "" if field is None else f"; there are {', '.join(field.annotation.model_fields)}"


def check_keys(option: str, keys: Sequence[str]) -> None:
    """Raise `UserError`, naming the nearest, for one of `keys` that is no setting."""
    known = (
        *valid_keys(),
        "model.unet.",
        "model.swap.",
    )  # the last two take what diffusers and the swap take
    for key in keys:
        if key not in known and not key.startswith(known[-2:]):
            hint = _unknown(key) or "; write section.key, such as train.lr"
            raise UserError(f"{option} {_shown(key)}: unknown setting{hint}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _is_from(overrides: Sequence[str], error: Mapping[str, Any]) -> bool:
    """Whether the setting that is wrong, or all of its section that there is, was set by one of `overrides`."""
    key = ".".join(str(part) for part in error["loc"])
    unknown = error["type"] == "extra_forbidden"
    given = [override.partition("=")[0].strip() for override in overrides]
    return any(
        key == own or key.startswith(f"{own}.") or (unknown and own.startswith(f"{key}.")) for own in given
    )


def _explain(error: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown setting{_unknown(key)}"
    if error["type"] == "missing":
        return f"{key}: missing; set it, or start the file with `base: base.yaml`"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and not isinstance(error["input"], str):
        return message  # of a section, which names its keys
    return f"{key}: {message[0].lower()}{message[1:]} (got {_shown(error['input'])})"


# -------------------------------------------------------------------------------------------------- comparing

# Settings that make the network and its data another thing: a checkpoint cannot go on under other values.
ARCHITECTURE = (
    "model.",
    "autoencoder.dtype",
    "diffusion.",
    "data.image",
    "data.condition",
    "data.num_classes",
    "data.split",
)
# Where the data and the autoencoder lie, which may have moved, stands in neither list: when its change is allowed, the
# autoencoder's fingerprint and the identity of the data say whether they are still the same.
# Settings that leave the path of the weights as it is, up to rounding: they may change at a resume.
FREE = (
    "run.",
    "sample.",
    "data.encode_batch_size",
    "train.gradient_accumulation",
    "train.gradient_checkpointing",
    "train.compile",
    "train.attention",
    "train.parallel",
    "train.skip_non_finite",
    "train.log_every",
    "train.save_every",
    "train.sample_every",
    "train.score_every",
    "train.keep_checkpoints",
    "train.ema_snapshot_every",
    "train.trackers",
)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.lr": 1e-4, ...} from {"train": {"lr": 1e-4, ...}}."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result


def check_same_run(old: Mapping[str, Any], new: Config, where: str, allowed: Sequence[str] = ()) -> list[str]:
    """Refuse to go on with the run of settings `old` under `new` where they differ in what matters.

    Returns the harmless or `allowed` (dotted keys) differences, as "key: old -> new". Raises `UserError`
    listing the others. A key that one side lacks counts as null there.
    """
    before, after = flat(old), flat(new.resolved())
    constant = new.train.lr_schedule == "constant"
    fatal, asked, harmless = [], [], []
    for key in sorted(before.keys() | after.keys()):
        a, b = before.get(key), after.get(key)
        if a == b:
            continue
        line = f"{key}: {a!r} -> {b!r}"
        if key.startswith(ARCHITECTURE):
            fatal.append(line)
        elif key.startswith(FREE) or (key == "train.steps" and constant) or key in allowed:
            harmless.append(line)
        else:
            asked.append((key, line))
    another = "choose another run.name for a new run"
    if fatal:
        raise UserError(
            f"{where} was trained with another model or other data ({'; '.join(fatal)}); {another}"
        )
    if asked:
        keys = " ".join(key for key, _ in asked)
        lines = "; ".join(line for _, line in asked)
        raise UserError(
            f"{where} was trained under other settings ({lines}); {another}, or go on with "
            f"--allow-change {keys}"
        )
    return harmless


def config_hash(settings: Mapping[str, Any]) -> str:
    """12 hex digits that name a resolved config."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def provenance() -> dict[str, Any]:
    """What the run was made with: versions, command line and git state."""
    packages = ("dcnv4-diffusion", "torch", "diffusers", "accelerate", "safetensors", "numpy", "pydantic")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            check=False,
            capture_output=True,
            text=True,
            timeout=10,
        )
        return run.stdout.strip() if run.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain"))} if commit else None
    except (OSError, subprocess.TimeoutExpired):
        return None
