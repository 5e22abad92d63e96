"""The protocol of a study: what its file says of variants, seeds, scoring and comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ldm_dcn.config import Config, Count, Fraction, NonNegative, dotted, wrong_value
from ldm_dcn.errors import UserError, shown
from ldm_dcn.key_names import unknown_beside
from ldm_dcn.strict_yaml import Loader

_OF_A_CONFIG = {"base", *Config.model_fields}  # keys that a study has none of


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Variant(_Strict):
    """A config and settings over it. `label` is what tables call it."""

    config: str
    set: tuple[str, ...] = ()
    label: str | None = None
    seeds: tuple[int, ...] | None = None  # others than the study's


class Scoring(_Strict):
    """How `eval.fid` scores a run: its options by their names, and but for `steps` with its defaults.

    `extractor` may be left out where the reference is the digits only; `device` null takes a GPU where there is one.
    """

    extractor: str = "digits"
    reference: str | None = None
    guidance: Annotated[tuple[float, ...], Field(min_length=1)] = (1.0,)
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    guidance_rescale: Fraction = 0.0
    sampler: str = "dpm++"
    steps: Count = 20
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: Annotated[int, Field(ge=0)] = 0
    num: Count | None = None
    labels: Literal["auto", "reference", "balanced", "random"] = "auto"
    image_size: Count | None = None
    max_bad: NonNegative | None = None
    batch_size: Count = 128
    device: str | None = None

    def scores_as(self, other: Scoring) -> bool:
        """Whether scores of both may stand side by side: they do wherever images are drawn, and however many at once."""
        left_out = {"batch_size", "device"}
        return self.model_dump(exclude=left_out) == other.model_dump(exclude=left_out)


class Study(_Strict):
    """What a study's file says. Paths of configs are relative to it; those of data to where the command runs."""

    question: str
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    set: tuple[str, ...] = ()  # settings over all configs
    variants: Annotated[dict[str, Variant], Field(min_length=1)]
    comparisons: dict[str, Annotated[tuple[str, ...], Field(min_length=2)]] = {}
    scoring: Scoring = Scoring()

    @model_validator(mode="after")
    def _names_are_known(self) -> Study:
        for title, names in self.comparisons.items():
            unknown = [name for name in names if name not in self.variants]
            if unknown:
                raise ValueError(
                    f"comparisons.{title} names {unknown[0]}, which is no variant; there are {', '.join(self.variants)}"
                )
        return self

    @model_validator(mode="after")
    def _seeds_come_once(self) -> Study:
        own = {f"variants.{name}.seeds": variant.seeds or () for name, variant in self.variants.items()}
        for where, seeds in {"seeds": self.seeds, **own}.items():
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"{where}: {list(seeds)} names a seed twice, which would be the same run")
        return self


def load_study(path: Path) -> Study:
    """Raises `UserError` for what is no study."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
        if isinstance(content, dict) and "variants" not in content and content.keys() & _OF_A_CONFIG:
            raise UserError(
                f"{path} is the config of one run; run python train.py {path}, or give one of configs/studies"
            )
        return Study.model_validate(content)
    except OSError as error:
        raise UserError(
            f"cannot read the study {path}: {error.strerror}; give one of configs/studies"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(map(_explain, error.errors()))}") from None


def _explain(error: Mapping[str, Any]) -> str:
    place = error["loc"]
    if error["type"] == "extra_forbidden":
        return f"{dotted(place)}: unknown setting{unknown_beside(Study, place)}"
    if error["type"] == "missing":
        return f"{dotted(place)}: missing; set it"
    if not place and error["type"] != "value_error":
        return f"it holds no study but {shown(error['input'])}; see configs/studies"
    return wrong_value(error)


def comparisons_of(study: Study) -> dict[str, tuple[str, ...]]:
    return study.comparisons or {"all": tuple(study.variants)}
