"""Weights: the formats that numbers are kept in, and the hash that tells one network's from another's."""

from __future__ import annotations

import hashlib

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def hash_weights(model: torch.nn.Module) -> str:
    """sha256 over names and float32 values: the same for every file layout of the same network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
