"""Protocol files and prompt files: what is read, what is refused and in which words, and what a protocol's hash depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastgen.errors import UserError
from fastgen.evaluation.prompts import prompts_of
from fastgen.evaluation.protocol import Protocol, find_protocol, load_protocol, protocol_from, shipped_protocols
from fastgen.rng import derive_seed

TEXTS = ["a red cat", "日本, in the rain", 'a "quoted" dog', "two boats"]


def content(**more: Any) -> dict[str, Any]:
    sets = {"open": {"prompts": "fastgen:classes/4"}}
    return {"name": "mine", "sets": sets, "metrics": {"fid": None}} | more


def with_set(**block: Any) -> dict[str, Any]:
    return content(sets={"open": {"prompts": "fastgen:classes/4"} | block})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same prompts in every form."""
    (tmp_path / "texts.txt").write_text("\ufeff" + "\r\n".join(f"  {text} " for text in TEXTS) + "\n\n", encoding="utf-8")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"id": i, "caption": text}) + "\n" for i, text in enumerate(TEXTS)))
    quoted = ["id,text", *(f'{i},"{text.replace(chr(34), chr(34) * 2)}"' for i, text in enumerate(TEXTS))]
    (tmp_path / "texts.csv").write_text("\n".join(quoted) + "\n")
    (tmp_path / "texts.tsv").write_text("prompt\tid\n" + "".join(f"{json.dumps(text).replace(chr(92), '')}\t1\n" for text in TEXTS[:2]))
    return tmp_path


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl", "texts.csv"])
def test_prompts_are_read_from_every_form(folder: Path, name: str):
    protocol = protocol_from(with_set(prompts=name, sha256=hash_of(folder / name)), data_dir=folder)
    assert protocol.sets["open"].prompts == tuple(TEXTS)


def test_a_caption_of_several_lines_stays_one(folder: Path):
    (folder / "lines.csv").write_bytes(b'caption,n\r\n"one\nother",1\r\nsecond,2\r\n')
    assert prompts_of(folder / "lines.csv", "key") == ["one\nother", "second"]


def test_sets_count_repeat_and_seed_as_they_say(folder: Path):
    sets = {
        "pairs": {"prompts": "texts.txt", "per_prompt": 2},
        "round": {"prompts": "texts.txt", "count": 6, "cycle": True, "first_seed": 7},
        "few": {"prompts": "texts.txt", "count": 3, "seed": 9},
        "none": {"prompts": None, "count": 5, "seed": 9, "per_prompt": 5},
    }
    pairs, round_, few, none = protocol_from(content(sets=sets, chunk=3), data_dir=folder).sets.values()
    assert pairs.prompts == tuple(text for text in TEXTS for _ in range(2)) and pairs.groups == [0, 0, 1, 1, 2, 2, 3, 3]
    assert pairs.seeds == tuple(derive_seed("evaluation", 0, id) for id in range(8))
    assert (round_.prompts, round_.seeds) == ((*TEXTS, *TEXTS[:2]), tuple(range(7, 13)))
    assert few.prompts == tuple(TEXTS[:3]) and few.seeds == tuple(derive_seed("evaluation", 9, id) for id in (14, 15, 16))
    assert none.prompts == ("",) * 5 and len(set(none.seeds + few.seeds)) == 8
    assert [each.first for each in (pairs, round_, few, none)] == [0, 8, 14, 17]
    assert [each.chunk for each in (pairs, round_, few, none)] == [4, 3, 3, 5]  # whole groups of a prompt


def test_pictures_of_one_text_are_one_draw_wherever_they_lie(folder: Path):
    (folder / "twice.txt").write_text("a cat\na dog\na cat\n")
    sets = {
        "round": {"prompts": "texts.txt", "count": 6, "cycle": True},
        "pairs": {"prompts": "texts.txt", "count": 10, "cycle": True, "per_prompt": 2},
        "twice": {"prompts": "twice.txt"},
        "once": {"prompts": "texts.txt"},
        "none": {"prompts": None, "count": 3},
        "pairs_of_none": {"prompts": None, "count": 4, "per_prompt": 2},
    }
    found = {name: (each.groups, each.repeats) for name, each in protocol_from(content(sets=sets), data_dir=folder).sets.items()}
    assert found == {
        "round": ([0, 1, 2, 3, 0, 1], True),
        "pairs": ([0, 0, 1, 1, 2, 2, 3, 3, 0, 0], True),
        "twice": ([0, 1, 0], True),
        "once": ([0, 1, 2, 3], False),
        "none": ([0, 1, 2], False),
        "pairs_of_none": ([0, 0, 1, 1], True),  # what is measured of a pair is one draw
    }


def test_prompts_that_are_all_there_are_have_not_been_drawn():
    """Classes are strata: leaving one out would measure another distribution."""
    sets = {"classes": {"prompts": "fastgen:classes/3", "count": 7, "cycle": True}, "open": {"prompts": "fastgen:digits/open"}}
    classes, open_ = protocol_from(content(sets=sets)).sets.values()
    assert classes.groups == list(range(7)) and not classes.repeats
    assert open_.groups == list(range(1797)) and len(set(open_.prompts)) == 7
    pairs = protocol_from(content(sets={"a": {"prompts": "fastgen:classes/3", "per_prompt": 2}})).sets["a"]
    assert pairs.groups == [0, 0, 1, 1, 2, 2] and pairs.repeats


def test_a_quick_look_takes_whole_groups(folder: Path):
    (pairs,) = protocol_from(content(sets={"a": {"prompts": "texts.txt", "per_prompt": 2, "seed": 3}}), data_dir=folder).sets.values()
    for count, length in ((1, 2), (2, 2), (5, 4), (8, 8), (100, 8)):
        few = pairs.head(count)
        assert (few.prompts, few.seeds) == (pairs.prompts[:length], pairs.seeds[:length]) and len(few) == length
        assert (few.hash == pairs.hash) == (length == 8)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (content(metric={"fid": None}), "key metric: unknown key; did you mean 'metrics'?"),
        (with_set(promts="x"), "key sets.open.promts: unknown key; did you mean 'prompts'?"),
        (content(prepare={"resise": 8}), "key prepare.resise: unknown key; did you mean 'resize'?"),
        (content(reference={"file": "a.npz", "sha": "x"}), "key reference.sha: unknown key; did you mean 'sha256'?"),
        (content(reference={}), "key reference: give either file or images"),
        (content(reference={"file": "a.npz", "images": "b"}), "key reference: give either file or images"),
        ({key: value for key, value in content().items() if key != "sets"}, "key sets: missing"),
        ({key: value for key, value in content().items() if key != "name"}, "key name: missing"),
        (content(sets={"open": {"count": 4}}), "key sets.open.prompts: missing"),
        (content(sets={}), "key sets"),
        (content(metrics={}), "key metrics"),
        (content(name="Mine!"), "key name"),
        (content(sets={"../out": {"prompts": None}}), "key sets"),
        (content(size=[8]), "key size"),
        (content(size=[8, 0]), "key size.1"),
        (content(quantisation="round"), "key quantisation"),
        (content(prepare={"filter": "nearest"}), "key prepare.filter"),
        (content(prepare={"resize": 1.5}), "key prepare.resize"),
        (content(seed=-1), "key seed"),
        (content(chunk=0), "key chunk"),
        (content(batch_size=True), "key batch_size: a number is needed, not a boolean"),
        (with_set(count=0), "key sets.open.count"),
        (with_set(sha256="abc"), "key sets.open.sha256"),
        (with_set(first_seed=-1), "key sets.open.first_seed"),
        (content(metrics=["fid"]), "key metrics"),
        (content(metrics={"fid": 3}), "key metrics.fid"),
    ],
)
def test_mistakes_in_a_file_name_the_key(given: dict[str, Any], words: str):
    with pytest.raises(UserError) as caught:
        protocol_from(given, where="'my.yaml': ")
    assert str(caught.value).startswith(f"'my.yaml' {words}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (content(metrics={"fidd": None}), "metrics.fidd: unknown metric 'fidd'; did you mean 'fid'? allowed: "),
        (content(metrics={"base": None}), "metrics.base: unknown metric 'base'"),
        (content(metrics={"../fid": None}), "metrics.../fid: unknown metric '../fid'"),
        (content(metrics={"fid": {"set": "opne"}}), "metrics.fid.set: 'opne'; did you mean 'open'? allowed: open"),
        (with_set(count=5), "sets.open.count: 5 pictures need 5 prompts, 'fastgen:classes/4' holds 4; lower it, or set cycle: true"),
        (with_set(count=10, per_prompt=2), "sets.open.count: 10 pictures need 5 prompts, 'fastgen:classes/4' holds 4"),
        (with_set(count=5, per_prompt=2), "sets.open.count: 5 pictures are no whole number of groups of per_prompt: 2"),
        (
            with_set(prompts="fastgen:digit/named"),
            "sets.open.prompts: no bundled prompts 'fastgen:digit/named'; did you mean 'digits'? allowed: classes/N, digits",
        ),
        (
            with_set(prompts="fastgen:digits/names"),
            "sets.open.prompts: fastgen:digits has no set 'names'; did you mean 'named'? allowed: named, open",
        ),
        (with_set(prompts="fastgen:classes/0"), "sets.open.prompts: no bundled prompts 'fastgen:classes/0'; did you mean 'classes/N'?"),
        (with_set(prompts="fastgen:classes/" + "9" * 5000), "sets.open.prompts: no bundled prompts 'fastgen:classes/999"),
    ],
)
def test_what_cannot_be_measured_names_the_key(given: dict[str, Any], words: str):
    with pytest.raises(UserError) as caught:
        protocol_from(given)
    assert str(caught.value).startswith(f"protocol mine: {words}") and "\n" not in str(caught.value)


def test_an_option_that_a_metric_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"^protocol mine key metrics\.digits\.sets: unknown key; did you mean 'set'\?"):
        protocol_from(content(metrics={"digits": {"sets": "open"}}))


def in_folder(name: str, text: str | bytes | None = None, **block: Any) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        if text is not None:
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return with_set(prompts=name, **block)

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (in_folder("there.txt"), r"no file '.*there\.txt'$"),
        (in_folder("there.txt", source="https://example.org/x"), r"no file '.*there\.txt': get it from https://example\.org/x$"),
        (in_folder("texts.txt", sha256="0" * 64), r"'.*texts\.txt' is not the recorded file: its SHA-256 is [0-9a-f]{64}, not 0{64}$"),
        (in_folder("texts.parquet", "x"), r"'.*texts\.parquet' is none of \*\.txt, \*\.jsonl, \*\.csv, \*\.tsv$"),
        (in_folder("empty.txt", "\n \n"), r"'.*empty\.txt' holds no prompts$"),
        (in_folder("empty.csv", "prompt\n"), r"'.*empty\.csv' holds no prompts$"),
        (in_folder("a.jsonl", '{"prompt": "a"}\n{"promt": "b"}\n'), r"'.*a\.jsonl' line 2 has no text field prompt, caption or text: {'promt'"),
        (in_folder("a.jsonl", '{"prompt": 3}\n'), r"line 1 has no text field"),
        (in_folder("a.jsonl", '\n{"prompt": \n'), r"line 2 is not JSON"),
        (in_folder("a.jsonl", "[1, 2]\n"), r"line 1 has no text field"),
        (in_folder("a.jsonl", '{"prompt": "\\ud800"}\n'), r"prompt 1 holds half a surrogate pair"),
        (in_folder("a.csv", "id,words\n1,x\n"), r"'.*a\.csv' row 1 has no text field"),
        (in_folder("a.csv", b"prompt\nsome \rwords\n"), r"'.*a\.csv' is no table with fields between commas"),
        (in_folder("a.tsv", "prompt\t" + "x" * 200_000), r"'.*a\.tsv' is no table with fields between tabs"),
        (in_folder("a.txt", b"caf\xe9\n"), r"'.*a\.txt' is not UTF-8 text"),
        (in_folder("."), r"'.*' is a folder, not a file$"),
    ],
)
def test_a_prompt_file_that_is_none_is_refused_in_one_line(folder: Path, make: Callable[[Path], dict[str, Any]], words: str):
    with pytest.raises(UserError, match=f"^protocol mine: sets.open.prompts: .*{words}") as caught:
        protocol_from(make(folder), data_dir=folder)
    assert "\n" not in str(caught.value)


def test_without_a_data_folder_the_file_its_source_and_the_option_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = r"needs the file 'coco\.txt': get it from example\.org and name its folder with --data-dir \(recipe key evaluate\.data_dir\)$"
    with pytest.raises(UserError, match=rf"^protocol mine: sets\.open\.prompts: {wanted}"):
        protocol_from(with_set(prompts="coco.txt", source="example.org"))
    monkeypatch.chdir(folder)
    assert protocol_from(with_set(prompts="texts.txt")).sets["open"].prompts == tuple(TEXTS)  # where one runs it
    (folder / "other").mkdir()
    with pytest.raises(UserError, match=r"no file 'other/texts\.txt'"):
        protocol_from(with_set(prompts="texts.txt"), data_dir="other")
    assert protocol_from(with_set(prompts=str(folder / "texts.txt")), data_dir="other").sets["open"].prompts == tuple(TEXTS)


def test_a_prompt_file_shorter_than_its_count_is_refused(folder: Path):
    with pytest.raises(UserError, match=r"sets\.open\.count: 6 pictures need 6 prompts, 'texts\.txt' holds 4; lower it, or set cycle: true"):
        protocol_from(with_set(prompts="texts.txt", count=6), data_dir=folder)


def test_protocols_are_found_by_name_and_by_path(tmp_path: Path):
    shipped = shipped_protocols()
    assert shipped["digits"].name == "digits.yaml"
    assert find_protocol("digits") == shipped["digits"]
    for name in ("mine.yaml", "a/MINE.YML"):
        assert find_protocol(str(tmp_path / name)) == tmp_path / name
    with pytest.raises(UserError, match=r"unknown protocol 'digit' \(recipe key evaluate\.protocol\): did you mean 'digits'\?.*, or a \.yaml file"):
        load_protocol("digit")
    with pytest.raises(UserError, match=r"unknown protocol 'digits\.json' \(--protocol\)"):
        load_protocol("digits.json", key="--protocol")
    with pytest.raises(UserError, match=r"mine\.yaml' is not there"):
        load_protocol(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(("text", "words"), [("- digits\n", "is not a protocol: "), ("", "is not a protocol: "), ("name: [", "is not valid YAML: ")])
def test_a_file_that_is_no_protocol_is_called_so(tmp_path: Path, text: str, words: str):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"mine\.yaml' {words}") as caught:
        load_protocol(str(tmp_path / "mine.yaml"))
    assert "recipe" not in str(caught.value) and "teacher" not in str(caught.value)


def test_messages_of_a_users_file_begin_with_its_path(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content(metrics={"fidd": None})))
    with pytest.raises(UserError, match=r"^'.*mine\.yaml': metrics\.fidd: unknown metric"):
        load_protocol(str(path))
    path.write_text(yaml.safe_dump(content(chunks=3)))
    with pytest.raises(UserError, match=r"^'.*mine\.yaml' key chunks: unknown key; did you mean 'chunk'\?"):
        load_protocol(str(path))


def test_a_users_file_measures_what_the_content_says(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content()))
    assert load_protocol(str(path)).hash() == protocol_from(content()).hash()


def test_wrong_pictures_are_refused_with_what_named_the_protocol():
    digits = load_protocol("digits")
    digits.check_image((3, 8, 8))
    with pytest.raises(UserError, match=r"^protocol digits measures images of shape \(3, 8, 8\), the model makes \(3, 16, 16\)$"):
        digits.check_image((3, 16, 16))
    with pytest.raises(UserError, match=r"^--protocol: protocol digits measures"):
        digits.check_image((1, 8, 8), "--protocol")
    anything = protocol_from(content())
    anything.check_image((3, 5, 7))
    with pytest.raises(UserError, match=r"measures pictures \(3, H, W\), the model makes \(3, 4, 8, 8\)"):
        anything.check_image((3, 4, 8, 8))


def base(folder: Path, **more: Any) -> Protocol:
    sets = {"open": {"prompts": "texts.txt", "count": 4, "seed": 1}, "named": {"prompts": "fastgen:classes/4", "first_seed": 0}}
    given = content(sets=sets, reference={"images": "photographs"}, metrics={"fid": None, "fd_dinov2": {"set": "named"}}) | more
    if "block" in given:
        given["sets"] = sets | {"open": sets["open"] | given.pop("block")}
    return protocol_from(given, data_dir=folder)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"size": [8, 8]},
        {"quantisation": "truncate"},
        {"prepare": {"crop": "centre"}},
        {"prepare": {"resize": 8}},
        {"seed": 1},
        {"chunk": 32},
        {"metrics": {"fid": None}},
        {"metrics": {"fid": None, "fd_dinov2": {"set": "open"}}},
        {"metrics": {"fid": None, "fd_dinov2": {"set": "named", "resize": "pil"}}},
        {"block": {"count": 3}},
        {"block": {"seed": 2}},
        {"block": {"first_seed": 1}},
        {"block": {"per_prompt": 2}},
        {"block": {"prompts": "fastgen:classes/4"}},
    ],
)
def test_the_hash_follows_what_numbers_depend_on(folder: Path, change: dict[str, Any]):
    assert base(folder, **change).hash() != base(folder).hash()


def test_the_hash_follows_the_prompts_themselves(folder: Path):
    before = base(folder).hash()
    (folder / "texts.txt").write_text((folder / "texts.txt").read_text(encoding="utf-8-sig").replace("cat", "dog"))
    assert base(folder).hash() != before


@pytest.mark.parametrize(
    "change",
    [
        {"description": "words"},
        {"batch_size": 3},
        {"metrics": {"fd_dinov2": {"set": "named"}, "fid": None}},
        {"metrics": {"fid": {}, "fd_dinov2": {"set": "named", "resize": "torch"}}},
        {"metrics": {"fid": {"set": "open"}, "fd_dinov2": {"set": "named"}}},
        {"reference": {"images": "photographs", "source": "https://example.org", "sha256": "0" * 64}},
        {"reference": {"images": "/elsewhere/photographs"}},
        {"reference": {"file": "statistics.npz"}},
        {"reference": None},
        {"block": {"source": "https://example.org"}},
        {"block": {"prompts": "texts.jsonl"}},
        {"block": {"cycle": True}},
        {"block": {"count": None}},
    ],
)
def test_the_hash_leaves_aside_what_changes_no_number(folder: Path, change: dict[str, Any]):
    """Recording where a file is to be had, or its hash, changes nothing that is measured; nor does saying what would be so anyway. Which reference
    it is, wherever it lies, is told by the hash of its content in results.json."""
    assert base(folder, **change).hash() == base(folder).hash()


def test_two_metrics_with_a_row_of_one_name_are_refused_with_both():
    sets = {name: {"prompts": f"fastgen:digits/{name}"} for name in ("named", "open")}
    with pytest.raises(UserError, match=r"^protocol p: metrics\.digits and metrics\.vendi both have a row vendi: leave one of them out$"):
        protocol_from({"name": "p", "sets": sets, "metrics": {"digits": None, "vendi": {"extractor": "digits_classifier"}}})
