"""The GPUs of a machine that a study may use, shared out among the runs that it has at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

VISIBLE = "CUDA_VISIBLE_DEVICES"  # CUDA's own variable: which GPUs a process knows, by number or UUID, as cuda:0, cuda:1, ...


def visible_gpus(variables: Mapping[str, str], count: int) -> list[str]:
    """What CUDA calls the `count` GPUs that this process knows, as `VISIBLE` takes them; `variables` are its environment's.

    CUDA reads its variable up to the first name that is no GPU, so that the first `count` names are those.
    """
    if VISIBLE not in variables:
        return [str(number) for number in range(count)]
    return [name.strip() for name in variables[VISIBLE].split(",")][:count]


def shared_out(gpus: Sequence[str], jobs: int) -> list[list[str]]:
    """The GPUs of each of `jobs` that run at a time: as many for each as can be, or one where there are fewer GPUs than jobs.

    Of fewer, each has as many jobs as can be. Without GPUs, none.
    """
    return [list(gpus[job::jobs]) or [gpus[job % len(gpus)]] if gpus else [] for job in range(jobs)]
