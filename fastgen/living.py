"""Whether another process of this machine still runs (Linux; elsewhere nothing is known)."""

from __future__ import annotations

import os
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")  # of a machine since it was started; names of machines need not differ


def space() -> list[str]:
    """What processes have in common whose numbers mean the same: a machine, and a container of it; empty where that is not known."""
    try:
        return [_BOOT.read_text(encoding="utf-8").strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:
        return []


def runs(number: int) -> bool:
    """Whether there is a process of this number, of one's own `space`, that is more than an exit status which nobody has collected."""
    try:
        status = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")
