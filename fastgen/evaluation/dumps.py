"""The pictures of an evaluation on disk, as they were measured: 8 bits, before any cropping or resizing.

A folder holds the pictures of one set of one model: what another evaluation left there is refused. It is filled a chunk at a time, by several
processes if need be, and a chunk that is there is whole.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from fastgen import records
from fastgen.errors import UserError, nearest
from fastgen.evaluation.protocol import SampleSet
from fastgen.files import PARTIAL, sync_folder, write_atomically, writing

MANIFEST = "dump.json"
PROMPTS = "prompts.jsonl"
_IMAGEFOLDER = "metadata.jsonl"  # the name under which Hugging Face's imagefolder, and our data.images, look for the same lines
_COMPRESSION = 1  # of 0 to 9: a third of the time of the usual 6, for pictures that are 6 % larger
_THREADS = 4  # encoding and writing leave Python's lock


class _Manifest(records.Schema):
    form: str
    set: str
    model: str


class Dump(ABC):
    """A folder for the pictures of one set."""

    form: ClassVar[str]

    def __init__(self, folder: Path, samples: SampleSet, model: str, key: str = "--dump") -> None:
        """model: a digest of all that the 8-bit pictures depend on beside the set: weights, settings, the rule of quantisation. key: what named
        the folder. UserError, which begins with it, where something else lies there."""
        self.folder, self.samples = folder, samples
        self._claim({"form": self.form, "set": samples.hash, "model": model}, key)

    @abstractmethod
    def write(self, rows: range, pixels: Tensor | Sequence[Tensor]) -> None:
        """Keep the pictures of a chunk, rows of the set: (B, 3, H, W) uint8, or each of its own size. UserError where the disk takes no more."""

    @abstractmethod
    def has(self, rows: range) -> bool:
        """Whether a chunk's pictures are all there."""

    def name(self, row: int) -> str:
        return f"{self.samples.first + row:06d}.png"

    def record(self, row: int) -> dict[str, object]:
        """What `prompts.jsonl` and the shards say of a picture."""
        return {"id": self.samples.first + row, "file_name": self.name(row), "prompt": self.samples.prompts[row], "seed": self.samples.seeds[row]}

    def _claim(self, manifest: Mapping[str, str], key: str) -> None:
        """Write down whose pictures the folder holds, or see that it holds just those."""
        path = self.folder / MANIFEST
        if not any(not name.name.startswith(".") for name in _content(self.folder, key)):
            write_atomically(path, json.dumps(manifest, indent=2) + "\n")
            return
        if not path.exists():  # which is first to be written, perhaps by another process just now
            raise UserError(f"{key}: {str(self.folder)!r} holds other files; choose a folder that is empty, or none yet")
        found = records.read(path, _Manifest)
        if differences := [what for name, what in _DIFFERENCES.items() if found[name] != manifest[name]]:
            raise UserError(f"{key}: {str(self.folder)!r} holds pictures of {' and '.join(differences)}; remove it, or choose another")


_DIFFERENCES = {"form": "another form", "set": "other prompts or seeds", "model": "another model, or of this one with other settings or versions"}


def _content(folder: Path, key: str) -> list[Path]:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{key}: {str(folder)!r} is a file, a folder is needed")
    with writing(folder, key):
        folder.mkdir(parents=True, exist_ok=True)
        return list(folder.iterdir())


class PngFolder(Dump):
    """A PNG for each picture, named by its id, and `prompts.jsonl`: what external metrics are given."""

    form = "png"

    def __init__(self, folder: Path, samples: SampleSet, model: str, key: str = "--dump") -> None:
        super().__init__(folder, samples, model, key)
        lines = "".join(json.dumps(self.record(row)) + "\n" for row in range(len(samples)))
        for name in (PROMPTS, _IMAGEFOLDER):
            if not (folder / name).exists():
                write_atomically(folder / name, lines)

    def write(self, rows: range, pixels: Tensor | Sequence[Tensor]) -> None:
        partial = self.folder / f"{PARTIAL}{self.samples.first + rows.start:06d}"
        names = [self.name(row) for row in rows]
        with writing(self.folder), ThreadPoolExecutor(_THREADS) as pool:
            shutil.rmtree(partial, ignore_errors=True)  # of a kill
            partial.mkdir()
            try:
                list(pool.map(lambda name, picture: _put(partial / name, png(picture)), names, pixels))
                for name in names:
                    os.replace(partial / name, self.folder / name)
                sync_folder(self.folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def has(self, rows: range) -> bool:
        return all((self.folder / self.name(row)).is_file() for row in rows)


class ParquetShards(Dump):
    """A shard for each chunk, with columns id, prompt, seed and image, which `datasets.load_dataset("parquet", ...)` reads as pictures."""

    form = "parquet"

    def __init__(self, folder: Path, samples: SampleSet, model: str, key: str = "--dump") -> None:
        if importlib.util.find_spec("pyarrow") is None:
            raise UserError(f"{key}: parquet needs pyarrow: pip install 'fastgen-distill[data]', or choose png")
        super().__init__(folder, samples, model, key)

    def write(self, rows: range, pixels: Tensor | Sequence[Tensor]) -> None:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]

        with ThreadPoolExecutor(_THREADS) as pool:
            images = [{"bytes": data, "path": self.name(row)} for row, data in zip(rows, pool.map(png, pixels), strict=True)]
        columns = {name: [self.record(row)[name] for row in rows] for name in ("id", "prompt", "seed")}
        image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        fields = [("id", pyarrow.int64()), ("prompt", pyarrow.string()), ("seed", pyarrow.int64()), ("image", image)]
        schema = pyarrow.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})})
        shard = io.BytesIO()
        parquet.write_table(pyarrow.table({**columns, "image": images}, schema=schema), shard, compression="none")
        write_atomically(self._shard(rows), shard.getvalue())

    def has(self, rows: range) -> bool:
        return self._shard(rows).is_file()

    def _shard(self, rows: range) -> Path:
        return self.folder / f"{self.samples.first + rows.start:06d}.parquet"


_FEATURES = {
    "id": {"dtype": "int64", "_type": "Value"},
    "prompt": {"dtype": "string", "_type": "Value"},
    "seed": {"dtype": "int64", "_type": "Value"},
    "image": {"_type": "Image"},
}
FORMS: dict[str, type[Dump]] = {kind.form: kind for kind in (PngFolder, ParquetShards)}


@dataclass(frozen=True)
class DumpFolder:
    """Where the pictures of an evaluation go, a folder below it for each model and set. form: `png` or `parquet`."""

    folder: Path
    form: str = "png"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"--dump-form: {self.form!r}; {nearest(self.form, FORMS)}")

    def of(self, samples: SampleSet, name: str, steps: int | None, model: str) -> Dump:
        """For a set of a model of this name at so many steps; model: as of `Dump`."""
        kind = name if steps is None else f"{name}_{steps}step{'s' * (steps != 1)}"
        return FORMS[self.form](self.folder / kind / samples.name, samples, model)


def png(picture: Tensor) -> bytes:
    """A picture (3, H, W) uint8 as the bytes of a PNG."""
    from torchvision.io import encode_png

    return encode_png(picture.contiguous(), compression_level=_COMPRESSION).numpy().tobytes()


def _put(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
