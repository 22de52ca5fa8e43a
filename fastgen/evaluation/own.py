"""The protocol of an evaluation on the command line: a shipped one, a file, or one made of prompts and real pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgen.errors import UserError
from fastgen.evaluation.protocol import Protocol, load_protocol, protocol_from

# What prompts alone, and real pictures with them, can be measured by.
_BY_PROMPTS: dict[str, Any] = {"clip_score": {"preset": "dmd2"}}
_BY_PICTURES: dict[str, Any] = {"fid": None, "fid_infinity": None, "kid": None, "precision_recall": None, "cmmd": None}


def protocol_of(protocol: str | None, *, prompts: Path | None = None, images: Path | None = None, data_dir: Path | None = None) -> Protocol:
    """The protocol that is named, by default `digits`; or, of prompts and pictures of one's own, `own`: one picture a prompt, compared with
    the pictures. UserError where both are given."""
    if prompts is None and images is None:
        return load_protocol(protocol or "digits", data_dir=data_dir, key="--protocol")
    if protocol is not None:
        raise UserError(f"--prompts and --images make a protocol of their own, and --protocol {protocol} is one: give either")
    if prompts is None:
        raise UserError("--images: needs --prompts, of which the pictures are drawn")
    content: dict[str, Any] = {"name": "own", "sets": {"main": {"prompts": str(prompts.absolute())}}, "metrics": dict(_BY_PROMPTS)}
    if images is not None:
        content["reference"] = {"images": str(images.absolute())}
        content["metrics"] |= _BY_PICTURES
    return protocol_from(content, data_dir=data_dir, where="--prompts: ")
