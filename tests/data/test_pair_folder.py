"""A folder of pairs: what was drawn comes back, an interrupted drawing goes on where it stopped, and a run refuses what is not its teacher's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import flipped
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen.data import pair_folder
from fastgen.data.pair_folder import Manifest, PairFolder, create_folder, open_folder
from fastgen.data.pairs import Pairs, TeacherSampler, make_pairs
from fastgen.denoiser import Denoiser, Predictor
from fastgen.errors import UserError
from fastgen.families.toy import Toy

FAMILY = Toy("toy:mixture")
PROMPTS = {"0": 0.5, "2": 0.25, "": 0.25}
TEACHER = {"pretrained": "toy:mixture", "family": "auto", "guidance": 1.5, "negative_prompt": "", "max_sequence_length": None, "resolution": None}
SHAPE = (2,)
SAMPLER = TeacherSampler(Predictor(Denoiser(FAMILY.load_backbone(), FAMILY), FAMILY), FAMILY.grid(3), SHAPE)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_folder, "SHARD", 8)


def manifest(count: int = 20, **changes: Any) -> Manifest:
    return Manifest.describe(SAMPLER, TEACHER, PROMPTS, seed=1, count=count).model_copy(update=changes)


def complete(folder: PairFolder, encode: Any = FAMILY.encode_prompts, **options: Any) -> PairFolder:
    folder.complete(SAMPLER, encode, PROMPTS, **options)
    return folder


def drawn(count: int) -> Pairs:
    return make_pairs(SAMPLER, FAMILY.encode_prompts, PROMPTS, range(count), seed=1)


def assert_equal(left: Pairs, right: Pairs) -> None:
    assert torch.equal(left.seeds, right.seeds)
    assert left.prompts == right.prompts
    torch.testing.assert_close(left.x0, right.x0, rtol=0, atol=1e-6)


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_what_was_drawn_comes_back(tmp_path: Path) -> None:
    seen: list[int] = []
    complete(create_folder(tmp_path / "new/pairs", manifest()), batch=3, progress=seen.append)
    folder = open_folder(tmp_path / "new/pairs")
    folder.check(TEACHER, SHAPE)
    pairs = folder.load()
    assert_equal(pairs, drawn(20))
    assert (pairs.seeds.dtype, pairs.x0.dtype, tuple(pairs.x0.shape)) == (torch.int64, torch.float32, (20, 2))
    assert folder.manifest == manifest()
    assert seen == [3, 6, 8, 11, 14, 16, 19, 20]
    assert names(folder.path) == ["pairs.json", *(f"pairs_{i:06d}.safetensors" for i in range(3))]


def test_prompts_survive_whatever_they_hold(tmp_path: Path) -> None:
    texts = ("", 'naïve 猫 \u2028 "quoted" \\ \n', "0")
    pairs = Pairs(torch.tensor([2**63 - 1, 0, 5]), texts, torch.ones(3, 2))
    folder = create_folder(tmp_path / "pairs", manifest(3))
    pair_folder._write(folder.shards()[0][0], pairs)
    assert folder.load().prompts == texts
    assert torch.equal(folder.load().seeds, pairs.seeds)


def test_an_interrupted_drawing_goes_on_where_it_stopped(tmp_path: Path) -> None:
    folder, encoded = create_folder(tmp_path / "pairs", manifest()), list[int]()

    def interrupted(prompts: Sequence[str]) -> dict[str, Tensor]:
        if sum(encoded) >= 12:
            raise KeyboardInterrupt
        encoded.append(len(prompts))
        return FAMILY.encode_prompts(prompts)

    with pytest.raises(KeyboardInterrupt):
        complete(folder, interrupted, batch=4)
    assert names(folder.path) == ["pairs.json", "pairs_000000.safetensors"]  # the second shard was half done
    with pytest.raises(UserError, match=r"recipe key data\.pairs: .* holds 8 of 20 pairs; finish it with the same `fastgen cache pairs`"):
        open_folder(folder.path).check(TEACHER, SHAPE)
    first, before = folder.path / "pairs_000000.safetensors", (folder.path / "pairs_000000.safetensors").stat().st_mtime_ns
    again = create_folder(folder.path, manifest())
    assert again.held() == 8
    encoded.clear()
    complete(again, lambda prompts: encoded.append(len(prompts)) or FAMILY.encode_prompts(prompts), batch=4)
    assert sum(encoded) == 12
    assert first.stat().st_mtime_ns == before
    assert_equal(again.load(), drawn(20))


def test_a_folder_grows_and_never_shrinks(tmp_path: Path) -> None:
    complete(create_folder(tmp_path, manifest(11)))
    larger = create_folder(tmp_path, manifest(30))
    assert (larger.held(), larger.manifest.count) == (11, 30)
    assert_equal(complete(larger).load(), drawn(30))
    smaller = create_folder(tmp_path, manifest(5))
    assert smaller.manifest.count == 30
    assert_equal(complete(smaller, encode=None).load(), drawn(30))  # nothing was left to draw


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "heun"}, r"--solver 'euler', not 'heun'"),
        ({"steps": 4}, r"--steps 3, not 4"),
        ({"grid": (1.0, 0.5, 0.2)}, r"the sampling grid \(.*\), not \(1\.0, 0\.5, 0\.2\)"),
        ({"seed": 2}, r"train\.seed 1, not 2"),
        ({"shape": (4, 8, 8)}, r"the latents' shape \(2,\), not \(4, 8, 8\)"),
        ({"prompts": "other"}, r"data\.prompts '[0-9a-f]{16}', not 'other'"),
        ({"teacher": dict(TEACHER, guidance=3.0)}, r"teacher\.guidance 1\.5, not 3\.0"),
    ],
)
def test_another_drawing_does_not_go_on_in_the_same_folder(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    complete(create_folder(tmp_path, manifest(4)))
    if "teacher" in changes:
        changes["teacher"] = {key: changes["teacher"][key] for key in manifest().teacher}
    content = (tmp_path / "pairs.json").read_text()
    with pytest.raises(UserError, match=rf"--output: .* holds pairs drawn with {message}; choose another folder"):
        create_folder(tmp_path, manifest(**changes))
    assert (tmp_path / "pairs.json").read_text() == content


def test_prompts_are_told_apart_by_text_and_by_weight() -> None:
    hashes = {
        Manifest.describe(SAMPLER, TEACHER, prompts, seed=1, count=1).prompts
        for prompts in (PROMPTS, PROMPTS | {"0": 0.4}, {"1": 0.5, "2": 0.25, "": 0.25}, dict(reversed(PROMPTS.items())))
    }
    assert len(hashes) == 4  # the order too: pair i depends on it


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pretrained", "toy:ring", r"teacher\.pretrained 'toy:mixture', this recipe has 'toy:ring'"),
        ("guidance", 7.0, r"teacher\.guidance 1\.5, this recipe has 7\.0"),
        ("negative_prompt", "1", r"teacher\.negative_prompt '', this recipe has '1'"),
        ("max_sequence_length", 16, r"teacher\.max_sequence_length None, this recipe has 16"),
    ],
)
def test_a_run_refuses_pairs_of_another_teacher(tmp_path: Path, key: str, value: Any, message: str) -> None:
    folder = complete(create_folder(tmp_path, manifest(4)))
    folder.check(TEACHER, SHAPE)
    with pytest.raises(UserError, match=rf"recipe key data\.pairs: .* was drawn with {message}"):
        folder.check(TEACHER | {key: value}, SHAPE)


def test_a_run_refuses_latents_of_another_shape(tmp_path: Path) -> None:
    folder = complete(create_folder(tmp_path, manifest(4)))
    with pytest.raises(UserError, match=r"recipe key data\.pairs: .* holds latents \(2,\), this recipe's teacher has \(16, 64, 64\)"):
        folder.check(TEACHER, (16, 64, 64))


def test_places_where_no_pairs_can_go_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--output: .* holds other files and no pairs; choose an empty or new folder"):
        create_folder(tmp_path, manifest())
    for path in (tmp_path / "notes.txt", tmp_path / "notes.txt/pairs"):
        with pytest.raises(UserError, match=r"--output: .* cannot be made, because .*notes\.txt' is a file"):
            create_folder(path, manifest())
    assert names(tmp_path) == ["notes.txt"]


def test_what_is_no_folder_of_pairs_is_refused(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"recipe key data\.pairs: .* is no folder made by `fastgen cache pairs`"):
            open_folder(source)
    good = json.loads(manifest(format=1).model_dump_json())
    contents = {
        "{": "Expecting property name",
        "[]": "must be a JSON object",
        json.dumps(good | {"format": 3}): r"key format: ",
        json.dumps(good | {"steps": "x"}): r"key steps: ",
    }
    for text, message in contents.items():
        (tmp_path / "pairs.json").write_text(text)
        with pytest.raises(UserError, match=rf"recipe key data\.pairs: cannot read .*pairs\.json': .*{message}"):
            open_folder(tmp_path)


def test_a_broken_or_misshapen_shard_is_named(tmp_path: Path) -> None:
    folder = complete(create_folder(tmp_path, manifest(20)))
    second = tmp_path / "pairs_000001.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-5])
    for look in (folder.held, folder.load, lambda: folder.check(TEACHER, SHAPE), lambda: complete(folder)):
        with pytest.raises(UserError, match=r"cannot read .*pairs_000001\.safetensors"):
            look()
    pairs = drawn(8)
    for prompts, x0 in ((pairs.prompts[:5], pairs.x0), (pairs.prompts, torch.ones(8, 3))):
        save_file({"seeds": pairs.seeds, "x0": x0}, second, metadata={"prompts": json.dumps(prompts)})
        with pytest.raises(UserError, match=r"cannot read .*pairs_000001\.safetensors.*do not fit together"):
            folder.load()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.9, 0.97, 1.0])
def test_one_flipped_bit_in_any_file_is_refused(tmp_path: Path, share: float) -> None:
    complete(create_folder(tmp_path, manifest(20)))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4
    for file in files:
        content = file.read_bytes()
        bit = int(share * (8 * len(content) - 1))
        file.write_bytes(flipped(content, bit))
        with pytest.raises(UserError, match=rf"cannot read .*{file.name}|{file.name}' cannot be read"):
            open_folder(tmp_path).load()
        file.write_bytes(content)
    assert_equal(open_folder(tmp_path).load(), drawn(20))


def test_a_bit_anywhere_in_a_shard_counts(tmp_path: Path) -> None:
    folder = complete(create_folder(tmp_path, manifest(2)))
    ((file, _),) = folder.shards()
    content, pairs = file.read_bytes(), folder.load()
    for bit in range(0, 8 * len(content), 37):
        file.write_bytes(flipped(content, bit))
        try:
            found = folder.load()
        except UserError:
            continue
        assert torch.equal(found.seeds, pairs.seeds)  # one text may be written in two ways
        assert found.prompts == pairs.prompts
        assert torch.equal(found.x0, pairs.x0)


def test_the_first_pairs_are_what_they_were_when_a_folder_has_grown_or_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(create_folder(tmp_path / "one", manifest(11)))
    before = {count: open_folder(tmp_path / "one").content(count) for count in (3, 8, 11)}
    assert len(set(before.values())) == 3
    complete(create_folder(tmp_path / "one", manifest(20)), batch=5)
    moved = (tmp_path / "one").rename(tmp_path / "two")
    monkeypatch.setattr(PairFolder, "load", lambda _: pytest.fail("headers are enough"))
    assert {count: open_folder(moved).content(count) for count in before} == before
    with pytest.raises(UserError, match=r"recipe key data\.pairs: .* holds 20 pairs, but the run began with 21"):
        open_folder(moved).content(21)
    monkeypatch.undo()
    monkeypatch.setattr(pair_folder, "SHARD", 8)
    file, _ = open_folder(moved).shards()[0]
    changed = drawn(8)
    changed.x0[2] += 1e-3
    pair_folder._write(file, changed)
    assert open_folder(moved).content(3) != before[3]


def as_older(path: Path) -> None:
    """Make a folder what an older fastgen has written: without hashes."""
    record: dict[str, Any] = json.loads((path / "pairs.json").read_text())
    old: dict[str, Any] = {key: value for key, value in record.items() if key != "seal"} | {"format": 1}
    old["teacher"] = {key: value for key, value in old["teacher"].items() if key != "sha256"}
    (path / "pairs.json").write_text(json.dumps(old))
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            metadata = {"prompts": shard.metadata()["prompts"]}
        save_file(load_file(file), file, metadata=metadata)


def test_a_folder_of_an_older_fastgen_is_read_and_identified_but_not_continued(tmp_path: Path) -> None:
    folder = complete(create_folder(tmp_path, manifest(11)))
    content = folder.content(11)
    as_older(tmp_path)
    assert open_folder(tmp_path).content(11) == content
    open_folder(tmp_path).check(TEACHER | {"sha256": "unknown to it"}, SHAPE)
    complete(create_folder(tmp_path, manifest(11)))
    with pytest.raises(
        UserError, match=r"--output: .* pairs of an older fastgen, which drew their seeds otherwise: they can be used, but not continued"
    ):
        create_folder(tmp_path, manifest(20))
    assert_equal(open_folder(tmp_path).load(), drawn(11))
    assert open_folder(tmp_path).content(11) == content
    assert open_folder(tmp_path).manifest.format == 1


def test_a_shard_that_has_lost_its_hashes_is_refused(tmp_path: Path) -> None:
    folder = complete(create_folder(tmp_path, manifest(4)))
    ((file, _),) = folder.shards()
    save_file(load_file(file), file, metadata={"prompts": json.dumps(folder.load().prompts)})
    with pytest.raises(UserError, match=r"cannot read .*its pairs are not those that were written"):
        folder.load()


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ({"sha256": "a"}, {"sha256": "b"}, r"teacher\.pretrained 'toy:mixture', which has changed since"),
        ({"sha256": "a"}, {"sha256": "b", "pretrained": "/new"}, r"teacher\.pretrained 'toy:mixture', this recipe has '/new'"),
        ({"sha256": "a"}, {"sha256": "a", "pretrained": "/new"}, None),
        ({}, {"sha256": "a", "pretrained": "/new"}, r"teacher\.pretrained 'toy:mixture', this recipe has '/new'"),
        ({"sha256": "a"}, {"sha256": "a", "guidance": 3.0}, r"teacher\.guidance 1\.5, this recipe has 3\.0"),
    ],
)
def test_a_teacher_is_its_content_where_that_is_known(tmp_path: Path, then: dict[str, Any], now: dict[str, Any], message: str | None) -> None:
    drawn_by = Manifest.describe(SAMPLER, TEACHER | then, PROMPTS, seed=1, count=4)
    folder = complete(create_folder(tmp_path, drawn_by))
    if message is None:
        folder.check(TEACHER | now, SHAPE)
        assert create_folder(tmp_path, Manifest.describe(SAMPLER, TEACHER | now, PROMPTS, seed=1, count=4)).manifest == drawn_by
    else:
        with pytest.raises(UserError, match=rf"recipe key data\.pairs: .* was drawn with {message}"):
            folder.check(TEACHER | now, SHAPE)
        with pytest.raises(UserError, match=r"--output: .* holds pairs drawn with teacher\."):
            create_folder(tmp_path, Manifest.describe(SAMPLER, TEACHER | now, PROMPTS, seed=1, count=4))


def test_a_crash_while_writing_leaves_no_half_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = create_folder(tmp_path, manifest(8))

    def crash(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(UserError, match=r"cannot write .*disk full"):
        complete(folder)
    assert names(tmp_path) == ["pairs.json"]


def test_a_kill_before_the_folder_said_what_it_holds_leaves_it_empty(tmp_path: Path) -> None:
    (tmp_path / ".partial_pairs.json.123.456").touch()
    assert complete(create_folder(tmp_path, manifest(3)), batch=3).held() == 3
