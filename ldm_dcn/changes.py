"""The changes of settings with which a run may go on, and those with which it is another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .config import Config, flat
from .errors import UserError

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
    "train.validate_every",
    "train.validation_images",
    "train.export_every",
    "train.keep_checkpoints",
    "train.ema_snapshot_every",
    "train.trackers",
)


_ABSENT = object()
# Settings that came later, and the value that means what runs before them did.
LATER = {
    "diffusion.zero_terminal_snr": False,
    "train.compile_mode": "default",
    "train.parameter_groups": [],
    "train.validate_every": 0,
    "train.validation_images": 4096,
    "train.export_every": 0,
    "sample.guidance_rescale": 0,
}


def settings_before(config: Config) -> dict[str, Any]:
    """The dotted settings of `config` without those that came later and mean what there was before them."""
    return {key: value for key, value in flat(config.resolved()).items() if LATER.get(key, _ABSENT) != value}


def check_same_run(old: Mapping[str, Any], new: Config, where: str, allowed: Sequence[str] = ()) -> list[str]:
    """Refuse to go on with the run of settings `old` under `new` where they differ in what matters.

    Returns the harmless or `allowed` (dotted keys) differences, as "key: old -> new". Raises `UserError`
    listing the others. A key that one side lacks counts as null there, or as `LATER` says.
    """
    before, after = LATER | flat(old), flat(new.resolved())
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
            + ", and --other-data where data.source holds other images"
            * ("data.source" in keys)
        )
    return harmless
