"""Records that leave this machine: what lies here is called by its name, without the folders above it, which may name a user."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from fastgen.families import is_hub_id

_TEXTS = ("negative_prompt",)  # beginnings of keys whose value may look like a path and is none
_QUOTED = re.compile(r"""(['"])((?:~|\.{1,2})?/.*?)\1""")
_UNQUOTED = re.compile(r"""(?<![\w/.~-])~?(?:/[^\s/'"]*\w[^\s/'"]*){2,}/?""")  # an address's // follows its scheme
_ORIGINS = ("_name_or_path", "name_or_path", "base_model_name_or_path")  # where diffusers, transformers and peft note what they loaded


def source_name(source: str) -> str:
    """A teacher as a record calls it: a hub id, a bundled or closed-form teacher as it is, a local folder by its own name."""
    if is_hub_id(source) or source.startswith(("fastgen:", "toy:")):
        return source
    return os.path.basename(os.path.abspath(os.path.expanduser(source)))


def is_local(name: str) -> bool:
    """Whether `source_name` made this of a local folder. Older records hold a folder's whole path."""
    return "/" not in name and not name.startswith(("fastgen:", "toy:"))


def portable(record: Any) -> Any:
    """JSON data with every path in it reduced to its last part; texts that users write are left alone."""
    if isinstance(record, Mapping):
        return {key: value if str(key).startswith(_TEXTS) else portable(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [portable(value) for value in record]
    return _last_part(record) if isinstance(record, str) else record


def portable_text(text: str) -> str:
    """A message with every path in it reduced to its last part: those in quotes, and of others those of two parts or more. Addresses of the web
    stay."""
    text = _QUOTED.sub(lambda found: f"{found[1]}{_last_part(found[2])}{found[1]}", text)
    return _UNQUOTED.sub(lambda found: PurePath(found[0]).name, text)


def forget_origins(folder: Path) -> None:
    """Take out of the configurations in a pipeline's folder where on this machine their components were loaded from."""
    for path in [folder / "model_index.json", *folder.rglob("*config.json")]:
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(config, dict) and any(config.get(key) is not None for key in _ORIGINS):
                kept = {key: value for key, value in config.items() if key not in _ORIGINS}
                path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _last_part(text: str) -> str:
    return PurePath(text).name or text if text.startswith(("/", "~/", "./", "../")) else text
