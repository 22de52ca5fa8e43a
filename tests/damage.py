"""Bits that flip, as on a disk."""

from __future__ import annotations

import os
from pathlib import Path


def flipped(content: bytes, bit: int) -> bytes:
    """The same but for one bit."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def flip(path: Path, share: float) -> None:
    """Flip the bit that lies at a share of a file, and keep its times."""
    stat, content = path.stat(), path.read_bytes()
    path.write_bytes(flipped(content, int(share * (8 * len(content) - 1))))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
