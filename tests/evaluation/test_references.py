"""References: features of real pictures are those of a direct computation and are kept; statistics of anything else are refused in one line."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastgen.evaluation import versions
from fastgen.evaluation.extraction import Extractors, Part
from fastgen.evaluation.extractors.base import Extractor, Feature, Options, Pictures, Resources, feature
from fastgen.evaluation.protocol import PrepareBlock, ReferenceBlock
from fastgen.evaluation.references import Absent, KnownPictures, KnownStatistics, OpenReference, StatisticsAndPictures, load_reference
from fastgen.evaluation.weights import Unavailable
from fastgen.progress import Progress

HOW = PrepareBlock(crop="centre", resize=4)
POOL, CLASS_TOKEN = feature("inception", "pool3"), feature("dinov2", "cls")


def five(pixels: Tensor) -> Tensor:
    """Five numbers a picture."""
    wide = pixels.float()
    return torch.cat([wide.mean((2, 3)), wide.amax((1, 2, 3))[:, None], wide[:, 0, 0, :1]], 1)


class Five(Extractor):
    class Config(Options):
        resize: Literal["tf1", "clean"] = "tf1"
        crop: int | None = None

    seen = 0
    fails_after = 10**9
    weights = "00"

    @property
    def hash(self) -> str:
        return self.weights

    def __call__(self, pictures: Pictures, layers: Collection[str]) -> dict[str, Tensor]:
        if self.seen >= self.fails_after:
            raise KeyboardInterrupt
        if pictures.raw is not None:
            self.seen += len(pictures.pixels)
        return {layer: five(pictures.pixels)[:, : 3 if layer == "cls" else 5] for layer in layers}


class Fives(Extractors):
    """Extractors that need no weights."""

    def __init__(self) -> None:
        super().__init__(Resources())
        self.one: dict[tuple[Any, ...], Five] = {}

    def of(self, each: Feature) -> Five:
        key = (each.extractor, each.options)
        if key not in self.one:
            self.one[key] = Five(Five.Config(**dict(each.options)), self.resources)
        return self.one[key]

    def hash(self, each: Feature) -> str:
        return self.of(each).hash


def folder(path: Path, count: int = 7) -> list[np.ndarray]:
    path.mkdir(parents=True)
    noise = [np.random.default_rng(i).integers(0, 256, (6 + i % 3, 9, 3), dtype=np.uint8) for i in range(count)]
    for i, one in enumerate(noise):
        Image.fromarray(one).save(path / f"{i}.png")
    return noise


def direct(pictures: list[np.ndarray]) -> Tensor:
    """The features by Pillow and NumPy alone."""
    ready = []
    for one in pictures:
        side = one.shape[0]
        left = round((one.shape[1] - side) / 2)
        ready.append(np.asarray(Image.fromarray(one[:, left : left + side]).resize((4, 4), Image.Resampling.LANCZOS)))
    return five(torch.from_numpy(np.stack(ready)).permute(0, 3, 1, 2))


def opened(
    tmp_path: Path, extractors: Extractors, how: PrepareBlock = HOW, *, allow_pickle: bool = False, kept: str | None = None, **block: Any
) -> OpenReference:
    return load_reference(
        ReferenceBlock(**block),
        extractors,
        tmp_path / "stores",
        data_dir=tmp_path,
        prepare=how,
        chunk=3,
        where="protocol p: ",
        allow_pickle=allow_pickle,
        kept=kept,
    )


def test_features_of_a_folder_are_those_of_a_direct_computation(tmp_path: Path) -> None:
    expected = direct(folder(tmp_path / "real"))
    reference = opened(tmp_path, Fives(), images="real")
    assert isinstance(reference, KnownPictures)
    assert torch.equal(reference.table(POOL).read(), expected)
    found = reference.statistics(POOL)
    assert found.n == 7
    np.testing.assert_allclose(found.mean.numpy(), expected.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.cov.numpy(), np.cov(expected.double().numpy(), rowvar=False), rtol=1e-10)
    (store,) = (tmp_path / "stores").iterdir()
    assert reference.record == {"kind": "pictures", "sha256": reference.source.content, "n": 7, "store": store.name}


def test_features_are_extracted_once_wherever_the_pictures_lie(tmp_path: Path) -> None:
    folder(tmp_path / "real")
    first = Fives()
    expected = opened(tmp_path, first, images="real").table(POOL).read()
    shutil.copytree(tmp_path / "real", tmp_path / "elsewhere")
    second = Fives()
    reference = opened(tmp_path, second, images="elsewhere")
    assert torch.equal(reference.table(POOL).read(), expected) and reference.statistics(POOL) is reference.statistics(POOL)
    assert (first.of(POOL).seen, second.of(POOL).seen) == (7, 0)
    for change in ({"resize": 5}, {"filter": "box"}):
        third = Fives()
        opened(tmp_path, third, HOW.model_copy(update=change), images="real").table(POOL)
        assert third.of(POOL).seen == 7
    (tmp_path / "elsewhere/0.png").rename(tmp_path / "elsewhere/9.png")
    fourth = Fives()
    opened(tmp_path, fourth, images="elsewhere").table(POOL)
    assert fourth.of(POOL).seen == 7


def test_features_that_an_evaluation_has_recorded_are_read_wherever_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as on a laptop that has the stores of a server."""
    folder(tmp_path / "real")
    there = opened(tmp_path, Fives(), images="real")
    expected = there.table(POOL).read()
    monkeypatch.setattr(versions, "FORMAT", 0)
    for kept, seen in ((there.record["store"], 0), ("0" * 32, 7), (None, 0)):
        here = Fives()
        assert torch.equal(opened(tmp_path, here, images="real", kept=kept).table(POOL).read(), expected)
        assert here.of(POOL).seen == seen


def test_all_features_are_extracted_in_one_pass_and_its_progress_is_told(tmp_path: Path) -> None:
    told: list[Any] = []

    class Told(Progress):
        def start(self, what: str, total: int, done: int = 0) -> None:
            told.append((what, total))

        def update(self, done: int, numbers: Any) -> None:
            told.append(done)

    folder(tmp_path / "real")
    extractors = Fives()
    reference = opened(tmp_path, extractors, images="real")
    assert reference.gather([POOL, CLASS_TOKEN], progress=Told())
    assert told == [("reference pictures", 7), 3, 6, 7]
    assert len(reference.table(POOL)) == len(reference.table(CLASS_TOKEN)) == 7
    assert [each.seen for each in extractors.one.values()] == [7, 7]


def test_parts_make_the_whole(tmp_path: Path) -> None:
    folder(tmp_path / "real")
    whole = opened(tmp_path, Fives(), images="real").table(POOL).read()
    shutil.rmtree(tmp_path / "stores")
    assert not opened(tmp_path, one := Fives(), images="real").gather([POOL], part=Part(1, 2))
    assert opened(tmp_path, two := Fives(), images="real").gather([POOL], part=Part(0, 2))
    assert (one.of(POOL).seen, two.of(POOL).seen) == (3, 4)
    assert torch.equal(opened(tmp_path, Fives(), images="real").table(POOL).read(), whole)


def test_what_a_kill_left_is_not_computed_again(tmp_path: Path) -> None:
    expected = direct(folder(tmp_path / "real"))
    killed = Fives()
    killed.of(POOL).fails_after = 3
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, killed, images="real").gather([POOL])
    again = Fives()
    assert torch.equal(opened(tmp_path, again, images="real").table(POOL).read(), expected)
    assert again.of(POOL).seen == 4


def test_a_picture_that_ends_early_is_one_line(tmp_path: Path) -> None:
    folder(tmp_path / "real")
    (tmp_path / "real/4.png").write_bytes((tmp_path / "real/4.png").read_bytes()[:100])
    reference = opened(tmp_path, Fives(), images="real")
    reference.check([POOL])
    with pytest.raises(Unavailable, match=r"^protocol p: reference\.images: '.*4\.png' is not a picture that can be read"):
        reference.gather([POOL])


@pytest.mark.parametrize("name", ["real.npz", "real.npy"])
def test_an_array_of_pictures_is_a_reference(tmp_path: Path, name: str) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (7, 6, 9, 3), dtype=np.uint8)
    np.save(tmp_path / name, pictures) if name.endswith("npy") else np.savez(tmp_path / name, pictures)
    reference = opened(tmp_path, Fives(), file=name)
    assert isinstance(reference, KnownPictures)
    assert torch.equal(reference.table(POOL).read(), direct(list(pictures)))


def moments(width: int = 5) -> dict[str, Any]:
    rows = np.random.default_rng(1).normal(size=(20, width))
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}


def test_statistics_of_others_are_checked_by_their_dimension_and_the_record_says_so(tmp_path: Path) -> None:
    np.savez(tmp_path / "ref.npz", **moments())
    reference = opened(tmp_path, Fives(), file="ref.npz")
    assert isinstance(reference, KnownStatistics) and reference.gather([POOL])
    assert np.array_equal(reference.statistics(POOL).cov.numpy(), moments()["sigma"])
    assert reference.record["checked"] == "the dimension alone: the file does not say what it is of"
    assert reference.record["sha256"] == hashlib.sha256((tmp_path / "ref.npz").read_bytes()).hexdigest()
    with pytest.raises(Unavailable, match=r"^'.*ref\.npz' is of 5 features a picture, dinov2 cls has 3: it is of another extractor$"):
        reference.check([CLASS_TOKEN])
    with pytest.raises(Unavailable, match=r"^needs the reference's pictures, and '.*ref\.npz' holds statistics only: give a folder of pictures$"):
        reference.table(POOL)
    with pytest.raises(Unavailable, match=r"^'.*ref\.npz' holds no statistics of inception pool3 \(crop=299\): give a folder of pictures$"):
        reference.statistics(feature("inception", "pool3", crop=299))


def test_broken_statistics_are_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "ref.npz", **{**moments(), "sigma": np.full((5, 5), np.nan)})
    with pytest.raises(Unavailable, match=r"^protocol p: reference\.file: '.*ref\.npz': mu: it holds NaN or infinity$"):
        opened(tmp_path, Fives(), file="ref.npz").check([POOL])


def test_our_own_statistics_are_refused_where_they_are_of_something_else(tmp_path: Path) -> None:
    folder(tmp_path / "real")
    pictures = opened(tmp_path, Fives(), images="real")
    assert isinstance(pictures, KnownPictures)
    path = pictures.save(tmp_path / "own.npz", POOL)
    shutil.rmtree(tmp_path / "stores")
    again = opened(tmp_path, Fives(), file="own.npz")
    fit = again.statistics(POOL)
    assert fit.n == 7 and torch.equal(fit.mean, pictures.statistics(POOL).mean) and torch.equal(fit.cov, pictures.statistics(POOL).cov)
    again.check([feature("inception", "pool3", resize="tf1")])  # what it is by default
    assert again.record["stated"]["pictures"] == pictures.source.content
    for of, said in (
        (CLASS_TOKEN, "extractor 'inception', needed is 'dinov2'"),
        (feature("inception", "logits_unbiased"), "layer 'pool3', needed is 'logits_unbiased'"),
        (feature("inception", "pool3", resize="clean"), r"options\.resize 'tf1', needed is 'clean'"),
    ):
        with pytest.raises(Unavailable, match=rf"^'.*own\.npz' holds statistics with {said}: compute them again$"):
            again.check([of])
    with pytest.raises(Unavailable, match=r"prepare\.crop 'centre', needed is 'none'"):
        opened(tmp_path, Fives(), PrepareBlock(resize=4), file=str(path)).check([POOL])
    others = Fives()
    others.of(POOL).weights = "11"
    with pytest.raises(Unavailable, match="hash '00', needed is '11'"):
        opened(tmp_path, others, file=str(path)).check([POOL])


def test_adms_batches_have_statistics_for_inception_and_pictures_for_all_else(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (7, 6, 9, 3), dtype=np.uint8)
    np.savez(tmp_path / "adm.npz", arr_0=pictures, **moments())
    reference = opened(tmp_path, Fives(), file="adm.npz")
    assert isinstance(reference, StatisticsAndPictures)
    patches = feature("inception", "pool3", crop=299)
    reference.check([POOL, CLASS_TOKEN, patches])
    assert reference.gather([POOL, CLASS_TOKEN, patches])
    assert np.array_equal(reference.statistics(POOL).mean.numpy(), moments()["mu"])
    assert torch.equal(reference.table(POOL).read(), direct(list(pictures)))
    rows = direct(list(pictures)).double().numpy()
    np.testing.assert_allclose(reference.statistics(CLASS_TOKEN).mean.numpy(), rows[:, :3].mean(0), rtol=1e-12)
    np.testing.assert_allclose(reference.statistics(patches).mean.numpy(), rows.mean(0), rtol=1e-12)
    assert reference.record["kind"] == "statistics and pictures" and reference.record["n"] == 7


def test_a_pickle_needs_the_flag(tmp_path: Path) -> None:
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps({"num_images": 20, "fid": moments(), "fd_dinov2": moments(3)}))
    refused = opened(tmp_path, Fives(), file="ref.pkl")
    with pytest.raises(Unavailable, match=r"^protocol p: reference\.file: '.*ref\.pkl' is not read: it is a pickle"):
        refused.check([POOL])
    reference = opened(tmp_path, Fives(), file="ref.pkl", allow_pickle=True)
    reference.check([POOL, CLASS_TOKEN])
    assert reference.statistics(POOL).n == 20 and len(reference.statistics(CLASS_TOKEN).mean) == 3
    with pytest.raises(Unavailable, match="holds no statistics of inception spatial"):
        reference.check([feature("inception", "spatial")])


def test_files_and_folders_other_than_the_recorded_ones_are_refused(tmp_path: Path) -> None:
    folder(tmp_path / "real")
    np.savez(tmp_path / "ref.npz", **moments())
    blocks: list[dict[str, Any]] = [{"file": "ref.npz"}, {"images": "real"}]
    for block in blocks:
        reference = opened(tmp_path, Fives(), **block)
        wrong = opened(tmp_path, Fives(), **block, sha256="0" * 64)
        with pytest.raises(Unavailable, match=r"^protocol p: reference\.\w+: '.*' is not what is recorded: its SHA-256 is [0-9a-f]{64}, not 0{64}$"):
            wrong.check([POOL])
        opened(tmp_path, Fives(), **block, sha256=reference.record["sha256"]).check([POOL])


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"file": "gone.npz", "source": "https://example.org"}, r"file: no file '.*gone\.npz': get it from https://example\.org"),
        ({"images": "gone"}, r"images: no folder '.*gone'"),
        ({"file": "broken.npz"}, r".*cannot read '.*broken\.npz': BadZipFile: "),
        ({"images": "empty"}, r"images: '.*empty' is not a folder of pictures: it is empty"),
        ({"images": "broken"}, r"images: 2 of 3 pictures cannot be read, the first: '.*1\.png'"),
        ({"images": "uneven"}, r"images: pictures differ in size: '0\.png' has 9 x 6 pixels \(width x height\), '1\.png' 9 x 7"),
    ],
)
def test_what_cannot_be_read_is_absent_and_says_why(tmp_path: Path, block: dict[str, Any], said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.npz").write_text("x")
    folder(tmp_path / "uneven")
    folder(tmp_path / "broken", 3)
    for name in "12":
        (tmp_path / f"broken/{name}.png").write_text("x")
    reference = opened(tmp_path, Fives(), PrepareBlock(), **block)
    assert isinstance(reference, Absent) and reference.record["kind"] == "absent"
    reference.check([])
    for ask in (lambda: reference.check([POOL]), lambda: reference.gather([POOL]), lambda: reference.statistics(POOL), lambda: reference.table(POOL)):
        with pytest.raises(Unavailable, match=f"^(protocol p: reference\\.)?{said}"):
            ask()


def test_without_a_data_folder_the_message_names_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = ReferenceBlock(file="ref.npz", source="its author")
    reference = load_reference(block, Fives(), tmp_path / "stores")
    with pytest.raises(Unavailable, match=r"^reference\.file: needs 'ref\.npz': get it from its author and name its folder with --data-dir"):
        reference.check([POOL])
    np.savez("ref.npz", **moments())
    load_reference(block, Fives(), tmp_path / "stores").check([POOL])
