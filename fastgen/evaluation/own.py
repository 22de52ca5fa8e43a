"""The protocol of an evaluation on the command line: a shipped one, a file, or one made of prompts and real pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastgen.errors import UserError
from fastgen.evaluation.picture_captions import read_captions
from fastgen.evaluation.picture_folder import PictureFolder
from fastgen.evaluation.protocol import Protocol, load_protocol, protocol_from
from fastgen.files import expanded

# What pictures with prompts, and with real ones beside them, can be measured by without anything else being known of them.
_BY_PROMPTS: dict[str, Any] = {"clip_score": {"preset": "sana-mjhq"}}
_BY_PICTURES: dict[str, Any] = dict.fromkeys(("fid", "fid_infinity", "kid", "precision_recall", "fd_dinov2", "cmmd"))


def protocol_of(
    protocol: str | None,
    *,
    model: str = "",
    prompts: Path | None = None,
    images: Path | None = None,
    captions: Path | None = None,
    count: int | None = None,
    data_dir: Path | None = None,
) -> Protocol:
    """The protocol that is named, by default `digits`; or, of prompts or pictures of one's own, `own`: `count` pictures, one a prompt and
    again from the first where prompts end, compared with the pictures in `images`, of any size.

    Without prompts, a model that is a folder of pictures brings its own number of them, and its captions (`captions`, or what lies beside
    them); any other model draws `count` without conditions. UserError for options that exclude or need each other.
    """
    if prompts is None and images is None:
        if count is not None:
            raise UserError("--count: needs --prompts or --images; a protocol says itself how many pictures it measures")
        return load_protocol(protocol or "digits", data_dir=data_dir, key="--protocol")
    if protocol is not None:
        raise UserError(f"--prompts and --images make a protocol of their own, and --protocol {protocol} is one: give either")
    if prompts is not None:
        main = {"prompts": str(prompts.absolute()), "count": count, "cycle": count is not None}
        return _own(main, images, "--prompts: ", data_dir, has_prompts=True)
    if is_pictures(model) and count is None:
        drawn = PictureFolder(expanded(model), "MODEL")
        texts = read_captions(drawn, captions)
        made = _own({"prompts": None, "count": len(drawn)}, images, "--images: ", data_dir, has_prompts=texts is not None)
        return made if texts is None else _with_prompts(made, texts)
    if count is None:
        raise UserError("--images: needs --prompts, of which pictures are drawn, or --count, how many are drawn without prompts")
    return _own({"prompts": None, "count": count}, images, "--images: ", data_dir, has_prompts=False)


def is_pictures(model: str) -> bool:
    """Whether it is a folder that holds no model."""
    folder = expanded(model)
    return folder.is_dir() and not any((folder / name).is_file() for name in ("fastgen.json", "model_index.json"))


def _own(main: dict[str, Any], images: Path | None, where: str, data_dir: Path | None, *, has_prompts: bool) -> Protocol:
    metrics = (_BY_PROMPTS if has_prompts else {}) | (_BY_PICTURES if images is not None else {})
    reference = None if images is None else {"images": str(images.absolute())}
    return protocol_from({"name": "own", "sets": {"main": main}, "reference": reference, "metrics": metrics}, data_dir=data_dir, where=where)


def _with_prompts(protocol: Protocol, texts: Sequence[str]) -> Protocol:
    """The same with these prompts in place of none."""
    protocol.sets["main"] = replace(protocol.sets["main"], prompts=tuple(texts))
    return protocol
