"""A folder of pairs: what was drawn comes back, an interrupted drawing goes on where it stopped, and a run refuses what is not its teacher's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import flipped
from pair_sets import loaded, samples_of, seeds_of
from safetensors.torch import save_file
from torch import Tensor

from fastgen.config import DataBlock, PairsBlock
from fastgen.data import older_pairs, store
from fastgen.data.encoded import Keeping
from fastgen.data.pair_folder import Drawing, PairFolder, check, check_unused, content, kept_before, open_folder
from fastgen.data.pairs import Pairs, make_pairs
from fastgen.data.store import Store
from fastgen.denoiser import Denoiser, Predictor
from fastgen.errors import UserError
from fastgen.families.toy import Toy
from fastgen.fingerprints import sealed
from fastgen.progress import Progress

FAMILY = Toy("toy:mixture")
PROMPTS = {"0": 0.5, "2": 0.25, "": 0.25}
TEACHER: dict[str, Any] = {"pretrained": "toy:mixture", "family": "auto", "guidance": 1.5, "negative_prompt": "", "max_sequence_length": None}
TEACHER |= {"resolution": None, "sha256": "toy"}
SHAPE = (2,)
PREDICT = Predictor(Denoiser(FAMILY.load_backbone(), FAMILY), FAMILY)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ROWS", 8)
    monkeypatch.setattr(older_pairs, "SHARD", 8)


def drawing(**changes: Any) -> Drawing:
    given: dict[str, Any] = {"times": FAMILY.grid(3), "shape": SHAPE, "solver": "euler", "teacher": TEACHER, "prompts": PROMPTS, "seed": 1}
    return Drawing(**{**given, **changes})


def complete(
    folder: Path,
    count: int = 20,
    encode: Any = FAMILY.encode_prompts,
    *,
    batch: int = 3,
    part: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
    **changes: Any,
) -> tuple[Store, int]:
    """What `fastgen cache pairs` does."""
    how, keeping = drawing(**changes), Keeping(CPU, DataBlock(store=str(folder)))
    encoder = how.of_noise(lambda: how.sampler(PREDICT, CPU), encode, max(count, kept_before(folder / "pairs")), batch)
    return keeping.fill(encoder, progress or Progress(), part, thorough=True)


def drawn(count: int) -> Pairs:
    return make_pairs(drawing().sampler(PREDICT, CPU), FAMILY.encode_prompts, PROMPTS, range(count), seed=1)


def assert_equal(left: Pairs, right: Pairs) -> None:
    assert torch.equal(seeds_of(left), seeds_of(right))
    assert left.prompts == right.prompts
    torch.testing.assert_close(samples_of(left), samples_of(right), rtol=0, atol=1e-6)


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def hashes(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


def test_what_was_drawn_comes_back(tmp_path: Path) -> None:
    seen: list[int] = []

    class Noting(Progress):
        def update(self, done: int, numbers: Any) -> None:
            seen.append(done)

    complete(tmp_path / "new", progress=Noting())
    for named in (tmp_path / "new", tmp_path / "new/pairs"):  # the folder that was asked for, and the one that was made in it
        folder = open_folder(named)
        check(folder, TEACHER, SHAPE, "fp32")
        assert folder.count == folder.held() == 20
    pairs = loaded(tmp_path / "new")
    assert_equal(pairs, drawn(20))
    assert (seeds_of(pairs).dtype, samples_of(pairs).dtype, tuple(samples_of(pairs).shape)) == (torch.int64, torch.float32, (20, 2))
    assert dict(folder.drawn) == {"solver": "euler", "steps": 3, "shape": SHAPE, "dtype": "fp32"}
    assert seen == [3, 6, 8, 11, 14, 16, 19, 20]
    assert names(folder.path) == [*(f"shard_{i:06d}.safetensors" for i in range(3)), "store.json"]


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_pairs_are_the_same_from_memory_and_from_disk(tmp_path: Path, keep: str) -> None:
    complete(tmp_path)
    pairs = loaded(tmp_path, keep=keep)
    assert pairs.rows.read_ahead is (keep == "disk")
    index = torch.tensor([19, 0, 7, 7])
    noise, x0 = pairs.select(index)
    expected = drawn(20).select(index)
    assert torch.equal(noise, expected[0])
    torch.testing.assert_close(x0, expected[1], rtol=0, atol=1e-6)


def test_prompts_survive_whatever_they_hold(tmp_path: Path) -> None:
    texts = {"": 0.3, 'naïve 猫 \u2028 "quoted" \\ \n': 0.4, "0": 0.3}
    complete(tmp_path, encode=lambda some: FAMILY.encode_prompts([""] * len(some)), prompts=texts)
    assert set(loaded(tmp_path).prompts) == set(texts)
    assert open_folder(tmp_path).prompts() == list(loaded(tmp_path).prompts)


def test_an_interrupted_drawing_goes_on_where_it_stopped(tmp_path: Path) -> None:
    encoded = list[int]()

    def interrupted(prompts: Sequence[str]) -> dict[str, Tensor]:
        if sum(encoded) >= 12:
            raise KeyboardInterrupt
        encoded.append(len(prompts))
        return FAMILY.encode_prompts(prompts)

    with pytest.raises(KeyboardInterrupt):
        complete(tmp_path, encode=interrupted, batch=4)
    assert names(tmp_path / "pairs") == ["shard_000000.safetensors", "store.json"]  # the second shard was half done
    with pytest.raises(UserError, match=r"recipe key data\.pairs: .* holds 8 of 20 pairs; finish it with the same `fastgen cache pairs`"):
        check(open_folder(tmp_path), TEACHER, SHAPE, "fp32")
    first = tmp_path / "pairs/shard_000000.safetensors"
    before = first.stat().st_mtime_ns
    encoded.clear()
    assert complete(tmp_path, encode=lambda prompts: encoded.append(len(prompts)) or FAMILY.encode_prompts(prompts), batch=4)[1] == 12
    assert sum(encoded) == 12
    assert first.stat().st_mtime_ns == before
    assert_equal(loaded(tmp_path), drawn(20))


def test_parts_and_growth_write_the_bytes_of_one_drawing(tmp_path: Path) -> None:
    complete(tmp_path / "whole")
    for part in ((1, 2), (0, 2)):
        complete(tmp_path / "parts", part=part)
    for count in (11, 20, 5):  # a folder grows and never shrinks
        grown, _ = complete(tmp_path / "grown", count)
    assert len(grown) == 20
    assert hashes(tmp_path / "whole/pairs") == hashes(tmp_path / "parts/pairs") == hashes(tmp_path / "grown/pairs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "heun"}, r"--solver 'euler', this recipe needs 'heun'"),
        ({"times": FAMILY.grid(4)}, r"--steps 3, this recipe needs 4"),
        ({"times": torch.tensor([1.0, 0.5, 0.25])}, r"the sampling grid \[.*\], this recipe needs \[1\.0, 0\.5, 0\.25\]"),
        ({"seed": 2}, r"train\.seed 1, this recipe needs 2"),
        ({"prompts": PROMPTS | {"0": 0.4}}, r"data\.prompts '[0-9a-f]{16}', this recipe needs '[0-9a-f]{16}'"),
        ({"teacher": TEACHER | {"guidance": 3.0}}, r"teacher\.guidance 1\.5, this recipe needs 3\.0"),
        ({"teacher": TEACHER | {"pretrained": "toy:ring", "sha256": "ring"}}, r"teacher\.pretrained 'toy:mixture', this recipe needs 'toy:ring'"),
        ({"teacher": TEACHER | {"sha256": "other"}}, r"teacher\.pretrained 'toy:mixture', which has changed since"),
        ({"images": "abc"}, r"--from 'noise', this recipe needs 'data'"),
    ],
)
def test_another_drawing_does_not_go_on_in_the_same_folder(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    complete(tmp_path, 4)
    before = hashes(tmp_path / "pairs")
    with pytest.raises(UserError, match=rf"recipe key data\.pairs: .* was drawn with {message}; choose another folder"):
        complete(tmp_path, 4, **changes)
    assert hashes(tmp_path / "pairs") == before


def test_prompts_are_told_apart_by_text_weight_and_order() -> None:
    tables = (PROMPTS, PROMPTS | {"0": 0.4}, {"1": 0.5, "2": 0.25, "": 0.25}, dict(reversed(PROMPTS.items())))
    assert len({drawing(prompts=table).origin["data.prompts"] for table in tables}) == 4  # pair i depends on the order too


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("guidance", 7.0, r"teacher\.guidance 1\.5, this recipe has 7\.0"),
        ("negative_prompt", "1", r"teacher\.negative_prompt '', this recipe has '1'"),
        ("max_sequence_length", 16, r"teacher\.max_sequence_length None, this recipe has 16"),
        ("shift", 3.0, r"teacher\.shift None, this recipe has 3\.0"),
        ("sha256", "ring", r"teacher\.pretrained 'toy:mixture', which has changed since"),
    ],
)
def test_a_run_refuses_pairs_of_another_teacher(tmp_path: Path, key: str, value: Any, message: str) -> None:
    complete(tmp_path, 4)
    folder = open_folder(tmp_path)
    check(folder, TEACHER | {"pretrained": "/moved"}, SHAPE, "fp32")  # a teacher is its content, wherever it lies
    with pytest.raises(UserError, match=rf"recipe key data\.pairs: .* was drawn with {message}"):
        check(folder, TEACHER | {key: value}, SHAPE, "fp32")


def test_a_run_refuses_latents_of_another_shape_or_dtype(tmp_path: Path) -> None:
    complete(tmp_path, 4)
    with pytest.raises(UserError, match=r"recipe key data\.pairs: .* holds latents \(2,\), this recipe's teacher has \(16, 64, 64\)"):
        check(open_folder(tmp_path), TEACHER, (16, 64, 64), "fp32")
    with pytest.raises(UserError, match=r"recipe key data\.pairs: .* holds samples in fp32, this recipe has data\.dtype 'bf16'"):
        check(open_folder(tmp_path), TEACHER, SHAPE, "bf16")


def asked(folder: Path, **keys: Any) -> PairsBlock:
    return PairsBlock.model_validate({"from": str(folder), **keys})


def test_what_a_recipe_says_of_its_pairs_must_be_so(tmp_path: Path) -> None:
    complete(tmp_path)
    assert open_folder(tmp_path, asked(tmp_path, solver="euler", steps=3, count=20)).count == 20
    few = open_folder(tmp_path, asked(tmp_path, count=11))
    assert few.count == 11 and len(few.prompts()) == len(few.hashes()) == 11
    assert_equal(few.load(Keeping(CPU), Progress()), drawn(11))
    (tmp_path / "pairs/shard_000002.safetensors").unlink()  # of pairs that are not asked for
    check(few, TEACHER, SHAPE, "fp32")
    assert_equal(few.load(Keeping(CPU), Progress()), drawn(11))
    for keys, message in (
        ({"solver": "heun"}, r"\.solver: .* was drawn with 'euler', this recipe asks for 'heun'"),
        ({"steps": 4}, r"\.steps: .* was drawn with 3, this recipe asks for 4"),
        ({"count": 21}, r"\.count: .* is to hold 20 pairs, this recipe asks for 21"),
    ):
        with pytest.raises(UserError, match=rf"recipe key data\.pairs{message}"):
            open_folder(tmp_path, asked(tmp_path, **keys))


def test_places_where_no_pairs_can_go_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"recipe key data\.pairs: .* holds other files and no store; choose an empty or new folder"):
        complete(tmp_path)
    with pytest.raises(UserError, match=r"recipe key data\.pairs: .*notes\.txt"):
        complete(tmp_path / "pairs/notes.txt")
    assert names(tmp_path / "pairs") == ["notes.txt"]


def test_what_is_no_folder_of_pairs_is_refused(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"recipe key data\.pairs: .* is no folder made by `fastgen cache pairs`"):
            open_folder(source)
    complete(tmp_path, 4)
    (tmp_path / "pairs/store.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"recipe key data\.pairs: .*store\.json"):
        open_folder(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.9, 0.97, 1.0])
def test_one_flipped_bit_in_any_file_is_refused_or_drawn_again(tmp_path: Path, share: float) -> None:
    complete(tmp_path)
    before, files = hashes(tmp_path / "pairs"), sorted((tmp_path / "pairs").iterdir())
    assert len(files) == 4

    def read() -> None:
        check(open_folder(tmp_path), TEACHER, SHAPE, "fp32")
        loaded(tmp_path, keep="memory")

    for file in files:
        whole = file.read_bytes()
        file.write_bytes(flipped(whole, int(share * (8 * len(whole) - 1))))
        with pytest.raises(UserError, match=rf"{file.name}|holds 1[26] of 20 pairs"):
            read()
        if file.suffix == ".safetensors":
            complete(tmp_path)
        else:
            file.write_bytes(whole)
    assert hashes(tmp_path / "pairs") == before


def test_the_first_pairs_are_what_they_were_when_a_folder_has_grown_or_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(tmp_path / "one", 11)
    before = {count: content(open_folder(tmp_path / "one"), count) for count in (3, 8, 11)}
    assert len(set(before.values())) == 3
    complete(tmp_path / "one", 20)
    moved = (tmp_path / "one").rename(tmp_path / "two")
    monkeypatch.setattr(Store, "read", lambda *_: pytest.fail("headers are enough"))
    assert {count: content(open_folder(moved), count) for count in before} == before
    with pytest.raises(UserError, match=r"recipe key data\.pairs: .* holds 20 pairs, but the run began with 21"):
        content(open_folder(moved), 21)


def test_a_crash_while_writing_leaves_no_half_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(tmp_path, 8)
    (tmp_path / "pairs/shard_000000.safetensors").unlink()

    def crash(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(UserError, match=r"cannot write .*disk full"):
        complete(tmp_path, 8)
    assert names(tmp_path / "pairs") == ["store.json"]


# Of an older fastgen


def older_folder(path: Path, count: int = 20, form: int = 2) -> PairFolder:
    """What it wrote, which recorded hashes in format 2."""
    pairs, path_of = drawn(count), (path / "pairs_{:06d}.safetensors").as_posix()
    teacher = {key: TEACHER[key] for key in ("pretrained", "guidance", "negative_prompt", "max_sequence_length")}
    record: dict[str, Any] = {"format": form, "teacher": teacher | ({"sha256": "toy"} if form == 2 else {}), "shape": SHAPE, "solver": "euler"}
    record |= {"steps": 3, "grid": FAMILY.grid(3).tolist(), "seed": 1, "prompts": "0123", "count": count}
    path.mkdir(exist_ok=True)
    (path / "pairs.json").write_text(json.dumps(sealed(record) if form == 2 else record), encoding="utf-8")
    for start in range(0, count, 8):
        seeds, prompts, x0 = seeds_of(pairs)[start : start + 8], pairs.prompts[start : start + 8], samples_of(pairs)[start : start + 8]
        heads = [json.dumps([seed, prompt, "torch.float32 (2,)"]) for seed, prompt in zip(seeds.tolist(), prompts, strict=True)]
        each = [hashlib.sha256(head.encode() + sample.numpy().tobytes()).hexdigest() for head, sample in zip(heads, x0, strict=True)]
        header = {"prompts": json.dumps(prompts)} | ({"sha256": json.dumps(each)} if form == 2 else {})
        save_file({"seeds": seeds.clone(), "x0": x0.clone()}, path_of.format(start // 8), metadata=header)
    return open_folder(path)


@pytest.mark.parametrize("form", [1, 2])
def test_a_folder_of_an_older_fastgen_is_read_and_identified_but_not_continued(tmp_path: Path, form: int) -> None:
    folder = older_folder(tmp_path, form=form)
    check(folder, TEACHER, SHAPE, "fp32")
    assert_equal(loaded(tmp_path), drawn(20))
    assert folder.prompts() == list(drawn(20).prompts)
    few = open_folder(tmp_path, asked(tmp_path, count=11))
    assert content(few, 11) == content(folder, 11) != content(folder, 12)
    with pytest.raises(UserError, match=r"--output: .* holds pairs of an older fastgen.*: they can be used, but not continued"):
        check_unused(tmp_path)
    with pytest.raises(UserError, match=r"was drawn with teacher\.guidance 1\.5, this recipe has 4\.0"):
        check(folder, TEACHER | {"guidance": 4.0}, SHAPE, "fp32")


def test_both_older_formats_are_the_same_pairs(tmp_path: Path) -> None:
    assert content(older_folder(tmp_path / "1", form=1), 20) == content(older_folder(tmp_path / "2"), 20)


def test_a_broken_record_of_an_older_fastgen_is_named(tmp_path: Path) -> None:
    older_folder(tmp_path, form=1)
    good = json.loads((tmp_path / "pairs.json").read_text(encoding="utf-8"))
    contents = {
        "{": "Expecting property name",
        "[]": "must be a JSON object",
        json.dumps(good | {"format": 3}): r"key format: ",
        json.dumps(good | {"steps": "x"}): r"key steps: ",
    }
    for text, message in contents.items():
        (tmp_path / "pairs.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=rf"recipe key data\.pairs: cannot read .*pairs\.json': .*{message}"):
            open_folder(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.97, 1.0])
def test_a_flipped_bit_in_an_older_folder_is_refused(tmp_path: Path, share: float) -> None:
    older_folder(tmp_path)
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(flipped(whole, int(share * (8 * len(whole) - 1))))
        with pytest.raises(UserError, match=rf"cannot read .*{file.name}|{file.name}' cannot be read"):
            loaded(tmp_path)
        file.write_bytes(whole)
    second = tmp_path / "pairs_000001.safetensors"
    save_file({"seeds": torch.arange(8), "x0": torch.ones(8, 3)}, second, metadata={"prompts": json.dumps([""] * 8)})
    with pytest.raises(UserError, match=r"cannot read .*pairs_000001\.safetensors.*do not fit together"):
        loaded(tmp_path)
