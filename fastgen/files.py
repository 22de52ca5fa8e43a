"""Writing files so that a reader, or a crash, never sees half of one; reading files that may be broken."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastgen.errors import CannotWrite, UserError

PARTIAL = ".partial_"  # begins the names of files and folders that are not whole yet, or not any more
OLD = ".old_"  # begins the name of what `publish` is about to replace
_ABANDONED = 60.0  # seconds without a change, after which nobody is writing a file any more


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write text (UTF-8) or bytes to `path`, making its folder; a file is replaced in one step once everything is on disk, and keeps its mode.

    A link stays, and what it leads to is replaced; a device or a FIFO is written into. UserError where that cannot be done, as in `writing`.
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file() and not target.is_dir():
            target.write_bytes(data)
        else:
            _replace(target, data)
    return path


def _replace(target: Path, data: bytes) -> None:
    stem = PARTIAL + os.fsdecode(os.fsencode(target.name)[:100])
    for leftover in target.parent.glob(f"{glob.escape(stem)}.*"):  # of a kill; what another process is writing now is younger
        with suppress(FileNotFoundError):  # which that process has just put in its place
            if time.time() - leftover.stat().st_mtime > _ABANDONED:
                leftover.unlink()
    partial = target.with_name(f"{stem}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.is_file():
            shutil.copymode(target, partial)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path | str, key: str = "") -> Iterator[None]:
    """Around whatever writes to `path` or below it: what the system or safetensors refuse is CannotWrite, of one line, which ends in the way on;
    key: the option or recipe key that named the path, to begin with."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, (OSError, SafetensorError)) and _number(error) is None:
            raise
        raise CannotWrite(f"{key and f'{key}: '}cannot write {str(path)!r}: {_why(error, Path(path))}") from error


def _why(error: Exception, path: Path) -> str:
    """What went wrong, and what to do about it."""
    number = error.errno if isinstance(error, OSError) else _number(error)
    if number in (errno.ENOENT, errno.EEXIST, errno.ENOTDIR):
        for part in (path, *path.parents):
            if part.is_symlink() and not part.exists():
                return f"{str(part)!r} is a link to {os.readlink(part)!r}, where there is nothing; make that, or remove the link"
            if part != path and part.is_file():
                return f"{str(part)!r} is a file; choose another place"
    reason = os.strerror(number).lower() if number else " ".join(str(error).split())[:300]
    return reason + (f"; {_WAYS_ON[number]}" if number in _WAYS_ON else "")


def _number(error: Exception) -> int | None:
    """The system's error number in the text of an error that Rust's standard library made."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


_WAYS_ON = {
    errno.ENOSPC: "free some space and go on",
    errno.EDQUOT: "free some space and go on",
    errno.EFBIG: "choose a place that takes large files",
    errno.EROFS: "choose another place",
    errno.EACCES: "choose another place, or change its permissions",
    errno.EPERM: "choose another place, or change its permissions",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "a file is needed there, and it is a folder",
    errno.ELOOP: "its links lead in a circle",
}


def check_writable(folder: Path, key: str) -> None:
    """UserError unless files can be made in `folder`, or, while it does not exist, it can be made; touches nothing."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(parent))
    with writing(folder, key):
        if not there.is_dir():
            raise OSError(errno.ENOTDIR, "")
        for part in folder.absolute().relative_to(there).parts:
            if len(os.fsencode(part)) > os.pathconf(there, "PC_NAME_MAX"):
                raise OSError(errno.ENAMETOOLONG, "")
        if os.statvfs(there).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, "")
        if not os.access(there, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, "")


def check_writable_file(path: Path, key: str) -> None:
    """UserError unless a file can be written there; a device or a FIFO needs no place for another beside it."""
    with writing(path, key):
        if path.is_dir():
            raise UserError(f"{key}: {str(path)!r} is a folder, a file is needed")
        if not path.parent.is_dir():
            raise UserError(f"{key}: no folder {str(path.parent)!r}")
        if path.exists() and not path.is_file():
            if not os.access(path, os.W_OK):
                raise OSError(errno.EACCES, "")
            return
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            raise OSError(errno.ENOENT, "")
        check_writable(folder, key)


def check_folder(path: Path | None, key: str) -> None:
    """UserError unless there is a folder, where one is named at all; key: the option or recipe key that names it."""
    if path is not None and not os.path.isdir(path):  # Path.is_dir fails on names that are too long
        raise UserError(f"{key}: {str(path)!r} is a file, a folder is needed" if os.path.exists(path) else f"{key}: no folder {str(path)!r}")


def share(folder: Path) -> None:
    """Give the files below a folder that we have made the permissions which the umask gives new ones: safetensors makes them private."""
    allowed = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(allowed)


def remove_partial(folder: Path) -> None:
    """Remove what a kill has left half written, or half deleted, directly below a folder that nobody else writes to."""
    for path in folder.glob(f"{PARTIAL}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a file or a folder, of which a kill meanwhile leaves no half under its name."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    partial = path.with_name(PARTIAL + path.name)
    shutil.rmtree(partial, ignore_errors=True)
    os.replace(path, partial)
    shutil.rmtree(partial)


def publish(partial: Path, target: Path) -> None:
    """Rename a whole folder to `target` in place of what is there, which stays when that fails; after a kill `recover` finds the one or the other."""
    old = target.with_name(OLD + target.name)
    recover(target, partial)
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(partial, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path, keep: Path | None = None) -> None:
    """Put the former `target` back where a kill came between the renames of `publish`, and remove what else it left; keep: not that."""
    old, partial = target.with_name(OLD + target.name), target.with_name(PARTIAL + target.name)
    if os.path.lexists(old):
        remove(old) if os.path.lexists(target) else os.replace(old, target)
    if partial != keep:
        shutil.rmtree(partial, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Put its names on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def expanded(source: str | Path) -> Path:
    """A path with the home folder that a leading `~` stands for; as it is where there is none."""
    return Path(os.path.expanduser(source))


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Around our own readers, and around safetensors': a file under `source` that is missing, broken or misshapen is a UserError, and so is what
    is no file, such as a FIFO, on which a reader would wait for ever."""
    from safetensors import SafetensorError

    refuse_special(source)
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(_cannot_read(source, error)) from error


@contextmanager
def loading(source: Path) -> Iterator[None]:
    """Around what *another library* does with a user's files: whatever it raises is a UserError. It asserts, indexes and computes with what it
    reads, and Rust's panics are no Exceptions. Not around code of ours, whose faults it would hide."""
    try:
        with reading(source):
            yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(_cannot_read(source, error, type(error).__name__)) from error


def _cannot_read(source: Path, error: BaseException, kind: str = "") -> str:
    said = " ".join(str(error).split())[:300]
    return f"cannot read {str(source)!r}: {': '.join(filter(None, (kind, said)))}"


def refuse_special(source: Path) -> None:
    """UserError where a FIFO, a socket or a device lies at `source` or below it."""
    folders = [Path(here) / name for here, _, names in os.walk(source) for name in names]
    for path in (source, *folders):
        try:
            mode = path.stat().st_mode
        except (OSError, ValueError):  # whoever opens it will say so
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"cannot read {str(path)!r}: it is no file, but a FIFO, a socket or a device")
