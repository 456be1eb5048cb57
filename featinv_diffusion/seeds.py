"""Seeds that derive from what a sample is, never from where it stands in a batch."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: object) -> int:
    """Hashes parts such as (seed, image id, sample number) to 63 bits, the same everywhere."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def make_generator(*parts: object) -> torch.Generator:
    """Returns a CPU generator seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
