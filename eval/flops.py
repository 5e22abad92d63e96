"""FLOPs, counted by `torch.utils.flop_counter` with the one formula that it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def flop_counter() -> FlopCounterMode:
    """Counts the FLOPs of what runs inside it (`get_total_flops`): matrix products, convolutions, attention, DCNv4.

    torch has a formula for each attention of CUDA's, and none for the CPU's fused one.
    """
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    return FlopCounterMode(display=False, custom_mapping=on_cpu)
