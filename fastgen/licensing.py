"""The licence that a teacher's own model card states, for its students' cards."""

from __future__ import annotations

import re
from pathlib import Path

from fastgen.families import is_hub_id, resolve_source
from fastgen.yaml_files import MOST_BYTES, parse

KEYS = ("license", "license_name", "license_link")  # of a card's header, as the hub reads them


def license_of(source: str, revision: str | None = None) -> dict[str, str]:
    """Those of KEYS that the README.md of a teacher's folder states, or that of its page on the hub. Empty where there is no such file, it
    cannot be got, or it states none: who publishes a student looks there."""
    if source.startswith("toy:"):
        return {}
    card = resolve_source(source, revision) / "README.md"
    if not card.is_file() and is_hub_id(source):
        card = _from_hub(source, revision) or card
    if not card.is_file():
        return {}
    with card.open("rb") as file:
        text = file.read(MOST_BYTES).decode("utf-8", errors="replace").replace("\r\n", "\n")
    header = re.match(r"---\n(.*?\n)---(?:\n|$)", text, re.DOTALL)
    try:
        stated = parse(header[1]) if header else {}
    except ValueError:  # its writer's mistake, and no reason to lose a student
        return {}
    return {key: stated[key] for key in KEYS if isinstance(stated.get(key), str)} if isinstance(stated, dict) else {}


def _from_hub(hub_id: str, revision: str | None) -> Path | None:
    """A pipeline's download leaves its card behind; None where the hub cannot be reached or has none."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, "README.md", revision=revision))
    except (OSError, ValueError):
        return None
