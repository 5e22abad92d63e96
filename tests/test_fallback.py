"""The operator in torch's own operators. No such device is here: the kernels that torch's dispatcher has for them are called on
tensors of the CPU."""

from __future__ import annotations

import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor

from dcnv4_ext import fallback, ops
from problems import OFFICIAL_FAILURES, Problem, mismatches, problem_of, random_problem
from programs import environment

DEVICES = ("MPS", "XPU", "PrivateUse1")
pytestmark = pytest.mark.filterwarnings("ignore:dcnv4_ext has no kernels")


def arguments(problem: Problem) -> tuple:
    """The settings as the dispatcher takes them."""
    given = dict(kernel_size=3, stride=1, padding=1, dilation=1) | problem.settings
    pairs = [size if isinstance(size, tuple) else (size, size) for size in list(given.values())[:4]]
    rest = (given["groups"], given.get("offset_scale", 1.0), given.get("remove_center", False))
    return *pairs, *rest, given.get("softmax", False)


def solved(problem: Problem, device: str, needed: tuple[bool, bool] = (True, True)) -> tuple[Tensor, ...]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device))
    tensors = problem.value, problem.offset_mask
    settings = arguments(problem)
    output = ops.forward.redispatch(keys, *tensors, *settings)
    return output, *ops.backward.redispatch(keys, *tensors, problem.grad_output, *settings, needed)


@pytest.mark.parametrize("device", DEVICES)
def test_random_problems(device: str) -> None:
    """Every dtype, geometry and width, empty batches, and offsets that are not finite."""
    seeds = range(DEVICES.index(device), 45, len(DEVICES))
    assert not [
        text
        for seed in seeds
        for text in mismatches(*(lambda p: (p, solved(p, device)))(random_problem(seed)))
    ]


@pytest.mark.parametrize("name", ["groups_of_16_batch_2", "stride_2_14x14", "kernel_5", "padding_2"])
def test_where_the_official_operator_fails(name: str) -> None:
    shape, settings = OFFICIAL_FAILURES[name]
    problem = problem_of(*shape, torch.bfloat16, **settings)
    assert not mismatches(problem, solved(problem, "MPS"))


def test_a_gradient_that_nobody_needs_is_empty() -> None:
    problem = problem_of(2, 5, 6, 8, 2, torch.float32)
    _, *both = solved(problem, "XPU")
    for needed in ((True, False), (False, True), (False, False)):
        _, *gradients = solved(problem, "XPU", needed)
        for wanted, gradient, whole in zip(needed, gradients, both, strict=True):
            assert torch.equal(gradient, whole if wanted else torch.empty(0))


def test_what_is_wrong_is_told_as_of_the_kernels() -> None:
    problem = problem_of(1, 5, 5, 8, 2, torch.float32)
    problem.offset_mask = problem.offset_mask[..., :-1]
    with pytest.raises(ValueError, match="offset_mask has 53 channels, fewer than"):
        solved(problem, "MPS")
    whole = problem_of(1, 5, 5, 8, 2, torch.float32)
    with pytest.raises(TypeError, match=r"value is torch\.int32"):
        whole.value, whole.offset_mask = whole.value.int(), whole.offset_mask.int()
        solved(whole, "MPS")


def test_it_is_said_once_that_it_is_slow() -> None:
    fallback._warn.cache_clear()
    call = partial(solved, problem_of(1, 3, 3, 4, 1, torch.float32), "MPS")
    with pytest.warns(UserWarning, match="no kernels for 'cpu' devices: torch's own operators"):
        call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def test_autocast_is_known_there_too() -> None:
    for device in ("MPS", "XPU"):
        key = getattr(torch._C.DispatchKey, f"Autocast{device}")
        assert torch._C._dispatch_has_kernel_for_dispatch_key("dcnv4_ext::forward", key)


ROCM = """
import torch
torch.version.hip = "6.4"
from dcnv4_ext import fallback, ops
fallback.forward = lambda *_: torch.ones(1)
fallback.backward = lambda *_: (torch.ones(2), torch.ones(3))
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
tensors, settings = (torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 27)), ([3, 3], [1, 1], [1, 1], [1, 1], 1, 1.0, False, False)
assert len(ops.forward.redispatch(keys, *tensors, *settings)) == 1
assert list(map(len, ops.backward.redispatch(keys, *tensors, tensors[0], *settings, [True, True]))) == [2, 3]
assert ops.plain(tensors[0]) and len(ops._ORDINARY_TENSORS) == 1  # `direct` is for devices with kernels alone
assert ops.forward(*tensors, *settings).shape == (1, 2, 2, 4)
"""


def test_amd_gpus_which_torch_calls_cuda_too_are_among_them() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ROCM], env=environment(), text=True, capture_output=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
