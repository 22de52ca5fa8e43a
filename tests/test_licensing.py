"""A student's card states the licence that its teacher's card states."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipelines import sd3_folder as sd3_folder
from pipelines import student_info, student_role

from fastgen import licensing
from fastgen.export import export_student
from fastgen.families.sd3 import SD3
from fastgen.generator import load_student

FLUX = {"license": "other", "license_name": "flux-1-dev-non-commercial-license", "license_link": "LICENSE.md"}


def teacher(folder: Path, card: bytes | None) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text("{}")
    if card is not None:
        (folder / "README.md").write_bytes(card)
    return str(folder)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (f"---\n{yaml.safe_dump(FLUX | {'tags': ['a']})}---\n# A model".encode(), FLUX),
        (b"---\r\nlicense: apache-2.0\r\n---\r\n", {"license": "apache-2.0"}),
        (b"---\nlicense: mit\n---", {"license": "mit"}),
        (b"---\nlicense: [mit, gpl]\nlicense_name: 7\n---\n", {}),
        (b"---\nlicense: mit\n", {}),
        (b"# A model\n---\nlicense: mit\n---\n", {}),
        (b"---\n- license\n---\n", {}),
        (b"---\nlicense: {a: &a [*a]}\n\xff: {\n---\n", {}),
        (b"", {}),
        (None, {}),
    ],
    ids=["other", "crlf", "short", "lists", "no end", "not first", "a list", "broken", "empty", "none"],
)
def test_what_a_card_states(tmp_path: Path, card: bytes | None, expected: dict[str, str]) -> None:
    assert licensing.license_of(teacher(tmp_path, card)) == expected


def test_a_hubs_card_is_fetched_where_the_download_left_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = Path(teacher(tmp_path / "snapshot", None)), []
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")

    def fetched(*given: Any, **more: Any) -> str:
        asked.append((given, more))
        if len(asked) > 1:
            raise OSError("no network")
        return str(tmp_path / "README.md")

    monkeypatch.setattr(licensing, "resolve_source", lambda source, revision: folder)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    assert licensing.license_of("owner/name", "abc") == {"license": "mit"}
    assert licensing.license_of("owner/name") == {}
    assert asked == [(("owner/name", "README.md"), {"revision": "abc"}), (("owner/name", "README.md"), {"revision": None})]
    assert licensing.license_of("toy:mixture") == {}


def test_a_student_says_the_same(sd3_folder: Path, tmp_path: Path) -> None:
    family = SD3(sd3_folder, max_sequence_length=16)
    said = {"pretrained": "owner/teacher", "guidance": 4.0, "negative_prompt": "", "license": FLUX | {"license_link": "a: [b] # c"}}
    folder = export_student(student_role(family), family, student_info(sd3_folder, teacher=said), tmp_path / "student")
    _, header, body = (folder / "README.md").read_text().split("---\n", 2)
    assert {key: value for key, value in yaml.safe_load(header).items() if key in licensing.KEYS} == said["license"]
    assert "Its licence is its teacher's: `flux-1-dev-non-commercial-license`." in body
    assert load_student(folder).steps == 4
    again = shutil.copytree(folder, tmp_path / "teacher_now")
    assert licensing.license_of(str(again)) == said["license"]  # a student that teaches passes it on
