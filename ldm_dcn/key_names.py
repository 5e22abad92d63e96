"""The names of settings, and what is meant by one that is none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

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
    "validation_steps": "train.validate_every",
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


def meant(key: str, keys: Collection[str], sections: Collection[str]) -> list[str]:
    """What may be meant by `key`, which is none of `keys` ("train.lr") in `sections` ("train"): another name, a place, a spelling, or a
    part of it. Never a mere guess."""
    leaf = key.rsplit(".", 1)[-1]
    if other := OTHER_NAMES.get(key) or OTHER_NAMES.get(leaf):
        return [other]
    if same_leaf := [k for k in keys if k.rsplit(".", 1)[-1] == leaf]:
        return same_leaf[:1]
    if "." not in key:
        names = {**{k.rsplit(".", 1)[-1]: k for k in reversed(list(keys))}, **{s: s for s in sections}}
        return [names[near] for near in difflib.get_close_matches(key, names, n=1, cutoff=0.7)]
    section = difflib.get_close_matches(key.partition(".")[0], sections, n=1)
    own = [k for k in keys if section and k.startswith(f"{section[0]}.")]
    corrected = ".".join([*section, key.partition(".")[2]])
    if near := difflib.get_close_matches(corrected, own, n=1, cutoff=ALIKE):
        return near
    words = leaf.split("_")
    return [k for k in own if all(re.search(rf"[._]{re.escape(word)}", k) for word in words)]


def unknown_beside(root: type[BaseModel], place: Sequence[str | int]) -> str:
    """The tail of an error about the last key of `place`, ("train", "parameter_groups", 0, "lr"), which its section of `root` does not
    have: what may be meant, or all that there is."""
    key, fields = str(place[-1]), list(_section_at(root, place).model_fields)
    name, colon, value = key.partition(":")
    if colon and name in fields:
        return f"; YAML wants a space after the colon: {name}: {value}"
    if near := difflib.get_close_matches(key, fields, n=1, cutoff=0.7):
        return f"; did you mean {near[0]}?"
    return f"; there are {', '.join(fields)}"


def _section_at(root: type[BaseModel], place: Sequence[str | int]) -> type[BaseModel]:
    section, is_name = root, False
    for part in place[:-1]:
        if is_name:  # of an entry of a dict or a list
            is_name = False
            continue
        annotation = section.model_fields[str(part)].annotation
        is_name = get_origin(annotation) in (dict, tuple)
        section = next(kind for kind in (annotation, *get_args(annotation)) if _is_section(kind))
    return section


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and not get_args(kind) and issubclass(kind, BaseModel)
