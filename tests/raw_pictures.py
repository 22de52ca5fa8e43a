"""Picture files and colour profiles byte by byte, where Pillow cannot write what it can read."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

GREY, RGB, INDEXED, GREY_ALPHA = 0, 2, 3, 4  # PNG colour types


def png(path: Path, width: int, depth: int, kind: int, rows: list[bytes], **chunks: bytes) -> Path:
    """A PNG of `rows`, packed as the format says; further chunks, such as PLTE or tRNS, by name."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *((name.encode(), value) for name, value in chunks.items()), (b"IDAT", data), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(value)) + name + value + struct.pack(">I", zlib.crc32(name + value)) for name, value in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def fixed(*values: float) -> bytes:
    """s15Fixed16 numbers."""
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(*values)


def gamma(exponent: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))


def profile(space: bytes, *, pcs: bytes = b"XYZ ", **tags: bytes) -> bytes:
    """An ICC profile (version 2) of a display or printer with these tags; its white is D50, as the format demands."""
    needed = {"desc": b"desc\0\0\0\0\0\0\0\5test\0" + b"\0" * 78, "cprt": b"text\0\0\0\0none\0", "wtpt": xyz(0.9642, 1, 0.8249)}
    table, body, start = b"", b"", 132 + 12 * (3 + len(tags))
    for name, value in {**needed, **tags}.items():
        padded = value + b"\0" * (-len(value) % 4)
        table += name.encode() + struct.pack(">II", start + len(body), len(value))
        body += padded
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(">IIIII", start + len(body), 0, 0x02100000, int.from_bytes(kind), int.from_bytes(space)) + pcs
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + fixed(0.9642, 1, 0.8249) + b"\0" * 48
    return header + struct.pack(">I", 3 + len(tags)) + table + body


# Adobe RGB (1998): gamma 563/256, primaries adapted to D50.
ADOBE_TO_XYZ = ((0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457))
ADOBE_GAMMA = 563 / 256


def adobe_rgb() -> bytes:
    red, green, blue = (xyz(*column) for column in zip(*ADOBE_TO_XYZ, strict=True))
    curve = gamma(ADOBE_GAMMA)
    return profile(b"RGB ", rXYZ=red, gXYZ=green, bXYZ=blue, rTRC=curve, gTRC=curve, bTRC=curve)


def linear_grey() -> bytes:
    return profile(b"GRAY", kTRC=gamma(1))


def printer(lab: dict[tuple[int, int, int, int], tuple[float, float, float]], paper: tuple[float, float, float]) -> bytes:
    """A CMYK printer whose full inks, alone or over one another, have these L*, a*, b*, and all others the paper's."""
    corners = [lab.get((c, m, y, k), paper) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    clut = bytes(round(value) for L, a, b in corners for value in (L * 255 / 100, a + 128, b + 128))
    identity = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + identity * 4 + clut + identity * 3
    return profile(b"CMYK", pcs=b"Lab ", A2B0=table)
