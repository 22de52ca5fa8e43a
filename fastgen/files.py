"""Writing files so that a reader, or a crash, never sees half of one; reading files that may be broken."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastgen.errors import UserError


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write text (UTF-8) or bytes to `path`, making its folder; it is replaced in one step once everything is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Around a loader of safetensors, diffusers or transformers: a file under `source` that is missing, broken or misshapen is a UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read {str(source)!r}: {' '.join(str(error).split())[:300]}") from error
