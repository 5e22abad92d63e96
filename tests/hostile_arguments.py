"""Calls the operator with random wrong arguments, by every door: the function, the registered operators, the C interface.

    cd tests && python hostile_arguments.py [number of calls]

Each must be refused by a ValueError or TypeError (from torch's own checks of a registered operator's schema: by a RuntimeError
too), or be right after all and give what the reference gives. A call that crashes takes this process with it, which is what the test
in test_operator.py looks for; the last line printed tells which call it was.
"""

from __future__ import annotations

import ctypes
import faulthandler
import math
import os
import random
import sys
import warnings

import numpy as np
import torch

from dcnv4_ext import DCNv4, DCNv4Conv, dcnv4, dcnv4_reference, native

LARGE = [2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1, 2**63, 10**30]
INTS = [
    0,
    1,
    2,
    3,
    5,
    -1,
    -(2**31) - 1,
    -(2**63),
    *LARGE,
    True,
    False,
    1.0,
    2.5,
    math.nan,
    None,
    "3",
    np.int64(3),
    3j,
]
INTS += [torch.tensor(3), torch.ones(2), object(), {}, b"3"]
PAIRS = [
    (3,),
    (3, 3, 3),
    [],
    (),
    (1, 2),
    [2, 1],
    (0, 1),
    (-1, 1),
    (2**40, 1),
    (1, 2**31),
    (1.0, 1),
    (True, 1),
    (None, 1),
    "33",
]
FLOATS = [
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    -1e308,
    -0.0,
    0,
    2,
    10**400,
    True,
    None,
    "1",
    1j,
    [1.0],
    np.float32(2),
]
FLOATS += [torch.tensor(1.0)]
FLAGS = [None, 0, 1, "no", "", torch.zeros(2), True, False, np.bool_(True), []]


class Labelled(torch.Tensor):
    """A subclass, as libraries have."""


def strange_tensors(tensor: torch.Tensor) -> dict[str, object]:
    """What may come in the place of a dense (N, H, W, C) tensor, by name; made when called."""
    n, h, w, c = tensor.shape

    def freed(keep: int) -> torch.Tensor:
        gone = tensor.clone()
        gone.untyped_storage().resize_(keep)
        return gone

    return {
        "int64": tensor.long, "bool": tensor.bool, "complex": lambda: tensor.to(torch.complex64),
        "complex half": lambda: tensor.to(torch.complex32), "float8": lambda: tensor.to(torch.float8_e4m3fn),
        "uint8": lambda: tensor.to(torch.uint8), "half": tensor.half, "bfloat16": tensor.bfloat16, "double": tensor.double,
        "quantized": lambda: torch.quantize_per_tensor(tensor, 1.0, 0, torch.quint8),
        "scalar": lambda: tensor.sum(), "vector": tensor.flatten, "matrix": lambda: tensor.flatten(1),
        "rank 3": lambda: tensor[0], "rank 5": lambda: tensor[None], "no batch": lambda: tensor[:0],
        "no rows": lambda: tensor[:, :0], "no columns": lambda: tensor[:, :, :0], "no channels": lambda: tensor[..., :0],
        "a batch more": lambda: torch.cat([tensor, tensor[:1]]), "a row less": lambda: tensor[:, 1:],
        "a column less": lambda: tensor[:, :, 1:], "a channel less": lambda: tensor[..., 1:],
        "a channel more": lambda: torch.cat([tensor, tensor[..., :1]], -1),
        "coo": tensor.to_sparse, "csr": lambda: tensor[0, 0].to_sparse_csr(), "mkldnn": tensor.to_mkldnn,
        "nested": lambda: torch.nested.nested_tensor([*tensor]), "meta": lambda: tensor.to("meta"),
        "jagged": lambda: torch.nested.nested_tensor([*tensor], layout=torch.jagged),
        "expanded": lambda: tensor[:1, :1, :1, :1].expand(tensor.shape),
        "overlapping": lambda: tensor.flatten().as_strided(tensor.shape, (1, 1, 1, 1)) if n + h + w + c < tensor.numel() else tensor,
        "batch without end": lambda: tensor[:1].expand(2**40, h, w, c),
        "turned": lambda: tensor.transpose(1, 2).contiguous().transpose(1, 2), "flipped": lambda: tensor.flip(1),
        "strides of size one": lambda: tensor.as_strided(tensor.shape, [10**6 if k == 1 else s for s, k in zip(tensor.stride(), tensor.shape, strict=True)]),
        "channels first": lambda: tensor.permute(0, 3, 1, 2), "negated": lambda: torch._neg_view(tensor),
        "subclass": lambda: tensor.as_subclass(Labelled), "parameter": lambda: torch.nn.Parameter(tensor),
        "freed": lambda: freed(0), "cut": lambda: freed(16), "nan": lambda: tensor * math.nan, "inf": lambda: tensor / 0,
        "list": tensor.tolist, "array": tensor.numpy, "none": lambda: None, "number": lambda: 1.0, "string": lambda: "value",
    }  # fmt: skip


def change(draw: random.Random, call: dict[str, object]) -> list[str]:
    """Put one or two strange things in place of arguments; what was done, in words."""
    done = []
    tensors = [name for name in call if isinstance(call[name], torch.Tensor)]
    names = draw.sample(sorted(call), 2) if draw.random() < 0.6 or not tensors else draw.sample(tensors, 2)
    for name in names[: draw.choice([1, 1, 2])]:
        old = call[name]
        if isinstance(old, torch.Tensor):
            kinds = strange_tensors(old)
            kind = draw.choice(sorted(kinds))
            call[name] = kinds[kind]()
            done.append(f"{name} {kind}")
        else:
            pool = (
                FLAGS
                if name in ("remove_center", "softmax")
                else FLOATS
                if name == "offset_scale"
                else INTS + PAIRS
            )
            call[name] = draw.choice(pool)
            done.append(f"{name}={call[name]!r:.40}")
    return done


def good_call(draw: random.Random) -> dict[str, object]:
    n, h, w, g, d = draw.choice([(2, 4, 3, 2, 8), (1, 1, 1, 1, 5), (3, 5, 1, 1, 16)])
    generator = torch.Generator().manual_seed(draw.randrange(2**30))
    return dict(
        value=torch.randn(n, h, w, g * d, generator=generator), offset_mask=torch.randn(n, h, w, 27 * g, generator=generator),
        groups=g, kernel_size=3, stride=1, padding=1, dilation=1, offset_scale=1.0, remove_center=False, softmax=False,
    )  # fmt: skip


# What torch says before the operator is asked, or where a copy has no room. An error of ours is a ValueError or TypeError.
ALLOCATION = (
    "can't allocate memory",
    "not enough memory",
    "Storage size calculation overflowed",
    "numel: integer multiplication overflow",
)


def by_function(draw: random.Random, done: list[str]) -> str:
    call = good_call(draw)
    done += change(draw, call)
    say(done)
    settings = {name: setting for name, setting in call.items() if name not in ("value", "offset_mask")}
    try:
        output = dcnv4(call["value"], call["offset_mask"], **settings)
    except (ValueError, TypeError) as error:
        assert not isinstance(error, UnicodeError), error
        return "refused"
    except RuntimeError as error:
        assert any(text in str(error) for text in ALLOCATION), f"{done}: {type(error).__name__}: {error}"
        return "no room"
    if output.is_meta or not abs(settings["offset_scale"]) < 1e6:
        return "accepted"
    want = dcnv4_reference(call["value"].detach().double(), call["offset_mask"].detach().double(), **settings)
    tolerance = {torch.bfloat16: 0.02, torch.float16: 0.003}.get(output.dtype, 1e-4)
    torch.testing.assert_close(
        output.detach().as_subclass(torch.Tensor).double(),
        want.as_subclass(torch.Tensor),
        rtol=tolerance,
        atol=tolerance * 10,
        equal_nan=True,
    )
    return "right"


ORDER = ("kernel_size", "stride", "padding", "dilation", "groups", "offset_scale", "remove_center", "softmax")


def by_operator(draw: random.Random, done: list[str]) -> str:
    """torch.ops.dcnv4_ext.forward and backward, with and without gradients."""
    call = good_call(draw)
    if backward := draw.random() < 0.5:
        call["grad_output"] = torch.randn(call["value"].shape)
        call["needed"] = draw.choice([[True, True], [True, False], [False, True]])
    done += [f"backward={backward}", *change(draw, call)]
    say(done)
    value = call["value"]
    if draw.random() < 0.3 and isinstance(value, torch.Tensor) and value.is_floating_point():
        call["value"] = value.detach().requires_grad_()
    arguments = [
        call["value"],
        call["offset_mask"],
        *([call["grad_output"]] if backward else []),
        *(call[name] for name in ORDER),
    ]
    try:
        if backward:
            torch.ops.dcnv4_ext.backward(*arguments, call["needed"])
        else:
            torch.ops.dcnv4_ext.forward(*arguments)
    except (ValueError, TypeError):
        return "refused"
    except (RuntimeError, AttributeError):  # the schema's; None passes it as an undefined tensor
        return "refused by torch"
    return "accepted"


def by_module(draw: random.Random, done: list[str]) -> str:
    call = dict(
        kernel_size=3, stride=1, padding=1, dilation=1, offset_scale=1.0, remove_center=False, softmax=False
    )
    kind = draw.choice([DCNv4, DCNv4Conv])
    call |= dict(channels=8) if kind is DCNv4 else dict(in_channels=8, out_channels=8)
    done += [kind.__name__, *change(draw, call)]
    say(done)
    x = torch.randn(2, 8, 8, 8)
    points = call["kernel_size"]
    if isinstance(points, (tuple, list)) and len(points) == 2 and all(type(p) is int for p in points):
        points = points[0] * points[1]
    if (
        type(points) is int and points > 100
    ):  # within what an operator takes, but not within what parameters take
        return "left out"
    sizes = ("channels", "in_channels", "out_channels", "padding")
    if any(type(call.get(name)) is int and call[name] > 10**6 for name in sizes):
        return "left out"
    try:
        kind(**call)(x)
    except (ValueError, TypeError):
        return "refused"
    return "accepted"


GOOD_PROBLEM = dict(
    abi_version=native.ABI_VERSION, dtype=0, N=1, H=4, W=4, G=1, D=8, Ho=4, Wo=4, P=27, value_stride=8, offset_mask_stride=27,
    output_stride=8, grad_value_stride=8, grad_offset_mask_stride=27, kernel_h=3, kernel_w=3, stride_h=1, stride_w=1,
    pad_h=1, pad_w=1, dilation_h=1, dilation_w=1, threads=1, offset_scale=1.0,
)  # fmt: skip


def hostile_problem(draw: random.Random) -> tuple[native.Problem, list[str]]:
    """A struct with up to four fields changed to anything."""
    fields = dict(GOOD_PROBLEM)
    for name in draw.sample(sorted(fields), draw.randint(1, 4)):
        numbers = [draw.choice([math.nan, math.inf, 1e300, -2.0])] if name == "offset_scale" else [
            0, -1, 1, 7, 2**20, 2**28 - 1, 2**31 - 1, -(2**31), draw.randrange(-(2**31), 2**31), 2**40, 2**62, 2**63 - 1, -(2**63),
        ]  # fmt: skip
        fields[name] = draw.choice(numbers)
    problem = native.Problem(**{name: field for name, field in fields.items()})
    return problem, [f"{name}={field}" for name, field in fields.items() if field != GOOD_PROBLEM[name]]


def by_c_interface(draw: random.Random, done: list[str]) -> str:
    """Without tensors behind it no problem may be computed: what is refused is refused before memory is looked at."""
    problem, changed = hostile_problem(draw)
    done += ["C", *changed]
    say(done)
    library = native.cpu()
    statuses = [
        library.dcnv4_cpu_forward(ctypes.byref(problem), None, None, None),
        library.dcnv4_cpu_backward(ctypes.byref(problem), None, None, None, 8, 8),
        library.dcnv4_cpu_backward(ctypes.byref(problem), None, None, None, None, None),
    ]
    assert statuses[2] in (0, 1) and all(status == 1 or problem.N == 0 for status in statuses[:2]), (
        done,
        statuses,
    )
    return "refused"


DOORS = (by_function, by_function, by_operator, by_module, by_c_interface)


def say(done: list[str]) -> None:
    print("; ".join(done), flush=True)


def main() -> int:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    outcomes: dict[str, int] = {}
    for seed in range(count):
        draw, done = random.Random(seed), [f"call {seed}"]
        door = DOORS[seed % len(DOORS)]
        try:
            outcome = f"{door.__name__}: {door(draw, done)}"
        except Exception as error:
            print(f"{'; '.join(done)}: {type(error).__name__}: {error}", file=sys.stderr)
            raise
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    print(*(f"{name} {number}" for name, number in sorted(outcomes.items())), sep="\n")
    return 0


if __name__ == "__main__":
    if "DCNV4_SANITIZE" in os.environ:  # below tests/emulation/sanitize.py: its library here too
        import sanitize

        sanitize.pytest_configure()
    sys.exit(main())
