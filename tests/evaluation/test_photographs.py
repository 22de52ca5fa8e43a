"""Real photographs through the whole line: measured against themselves, against others, and against copies that are worse in a known way.

The networks' weights are random, which sees colours, noise and structure, and knows nothing of objects. A copy of the reference's own pictures is
compared, so that nothing but what was done to them differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import photographs as shown
import pytest
import small_networks
import yaml
from inception_weights import random_weights
from photographs import PHOTOGRAPHS, Piece

from fastgen.evaluation.extractors.base import Resources
from fastgen.evaluation.protocol import load_protocol
from fastgen.evaluation.runner import Evaluation, Settings
from fastgen.evaluation.subjects.pictures import PicturesSubject
from fastgen.evaluation.weights import Weights

Values = Mapping[str, float]
PAIRS = (("slightly blurred", "blurred"), ("slightly noisy", "noisy"), ("JPEG 50", "JPEG 10"))  # of which the second is worse
SEVERAL = {"cmmd": None, "fd_dinov2": None, "clip_score": {"preset": "sana-mjhq"}, "hps_v21": None, "pick_score": None, "dino_diversity": None}
SEVERAL |= {"lpips_diversity": None, "vendi": {"extractor": "dinov2", "options": {"resize": "torch"}}, "teacher_error": None}
BY_PROMPTS = ("clip_score", "hps_v21", "pick_score")


def copies(real: Sequence[Piece], held_out: Sequence[Piece], each: int, folder: Path, radius: float = 1.0) -> dict[str, Path]:
    """Folders by what is in them. radius: of the slight blur."""
    changed = {
        "itself": real,
        "held out": held_out,
        "slightly blurred": shown.blurred(real, radius),
        "blurred": shown.blurred(real, 3 * radius),
        "slightly noisy": shown.noisy(real, 15),
        "noisy": shown.noisy(real, 50),
        "discoloured": shown.discoloured(real),
        "enlarged": shown.enlarged(real),
        "repeated": shown.repeated(real, each),
    }
    found = {name: shown.write(pieces, folder / name) for name, pieces in changed.items()}
    return found | {f"JPEG {quality}": shown.write(real, folder / f"JPEG {quality}", quality=quality) for quality in (50, 10)}


def measured(
    root: Path,
    folders: Mapping[str, Path],
    metrics: Mapping[str, Any],
    each: int,
    prompts: Sequence[str] = tuple(PHOTOGRAPHS),
    *,
    teacher: bool = True,
) -> dict[str, Values]:
    """Every value of each folder, `itself` being the reference and the teacher, by a protocol file whose weights lie in `root/weights`."""
    (root / "prompts.txt").write_text("\n".join(prompts))
    content = {
        "name": "photographs",
        "sets": {"main": {"prompts": "prompts.txt", "count": each * len(prompts), "per_prompt": each}},
        "reference": {"images": str(folders["itself"])},
        "metrics": metrics,
    }
    (root / "photographs.yaml").write_text(yaml.safe_dump(content))
    protocol = load_protocol(str(root / "photographs.yaml"), data_dir=root)
    evaluation = Evaluation(protocol, Resources(Weights(root / "weights"), data_dir=root), Settings(root / "store"))
    for subject in ([_teacher(folders["itself"])] if teacher else []) + [PicturesSubject(folder) for folder in folders.values()]:
        assert evaluation.draw(subject)
    rows = [row for row in evaluation.rows() if row["model"] == "pictures"]
    assert not evaluation.missing
    count = len(rows) // len(folders)
    own = zip(folders, range(0, len(rows), count), strict=True)
    return {name: {row["name"]: row["value"] for row in rows[start : start + count]} for name, start in own}


def _teacher(folder: Path) -> PicturesSubject:
    subject = PicturesSubject(folder)
    subject.name = "teacher"  # pyright: ignore[reportAttributeAccessIssue]
    return subject


def in_order(found: Mapping[str, Values], metric: str, *names: str) -> bool:
    """Whether these folders' values rise."""
    values = [found[name][metric] for name in names]
    return values == sorted(values) and len(set(values)) == len(values)


@pytest.fixture(scope="module")
def by_small_networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Values]:
    """Everything but Inception, of four pieces of each photograph."""
    root, (real, held_out) = tmp_path_factory.mktemp("small"), shown.halves(4, 64)
    (root / "weights").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        small_networks.write_all(root / "weights", held_out, patch)
        found = measured(root, copies(real, held_out, 4, root), SEVERAL, 4)
        others = [*PHOTOGRAPHS][1:] + [*PHOTOGRAPHS][:1]
        swapped = [piece._replace(prompt=others[[*PHOTOGRAPHS].index(piece.prompt)]) for piece in real]
        misnamed = {"itself": shown.write(swapped, root / "misnamed")}
        return found | {"misnamed": measured(root, misnamed, {name: SEVERAL[name] for name in BY_PROMPTS}, 4, others)["itself"]}


@pytest.mark.parametrize("metric", ["cmmd", "fd_dinov2", "teacher_error"])
def test_distances_are_nothing_from_oneself_and_grow_with_the_damage(by_small_networks: dict[str, Values], metric: str) -> None:
    found = by_small_networks
    assert found["itself"][metric] == pytest.approx(0, abs=1e-9)
    for pair in PAIRS:
        assert in_order(found, metric, "itself", *pair)
    for name in ("held out", "discoloured", "enlarged", "repeated"):
        assert found[name][metric] > 10 * found["itself"][metric] + 1e-3


@pytest.mark.parametrize("metric", BY_PROMPTS)
def test_pictures_fit_their_own_prompts_best(by_small_networks: dict[str, Values], metric: str) -> None:
    """The more noise and the fewer pixels, the worse; blur, which these networks hardly see at 32 pixels a side, is not asked for."""
    found = by_small_networks
    for worse in (("noisy", "slightly noisy"), ("JPEG 10",), ("discoloured",), ("repeated",)):
        assert in_order(found, metric, *worse, "itself")
    assert found["misnamed"][metric] < min(found["itself"][metric], found["noisy"][metric])


def test_diversity_falls_where_a_prompt_has_one_picture_left(by_small_networks: dict[str, Values]) -> None:
    """To what equal pictures have. What other damage does to it depends on the network: noise, of which every picture has its own, adds to it."""
    for metric, least in {"dino_diversity": 0.0, "lpips_diversity": 0.0, "vendi": 1.0}.items():
        values = {name: each[metric] for name, each in by_small_networks.items() if name != "misnamed"}
        assert values.pop("repeated") == pytest.approx(least, abs=1e-6)
        assert min(values.values()) > least + 0.02
    assert in_order(by_small_networks, "lpips_diversity", "repeated", "blurred", "slightly blurred", "itself", "slightly noisy", "noisy")


def inception(root: Path, **metrics: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Metrics on a random Inception network, and how their rows' names end."""
    (root / "weights").mkdir()
    sha256 = random_weights(root / "weights" / "random.pth")
    own = {"weights": "random.pth", "sha256": sha256}
    return {name: {**own, **options} for name, options in metrics.items()}, f"_{sha256[:8]}"


def test_inception_tells_worse_pictures_from_fewer(tmp_path: Path) -> None:
    """Noise costs quality, and so precision; one piece of each photograph in place of two costs variety, and so recall."""
    real, _ = shown.halves(2, 64)
    every = {"itself": real, "noisy": shown.noisy(real, 50), "repeated": shown.repeated(real, 2)}
    folders = {name: shown.write(pieces, tmp_path / name) for name, pieces in every.items()}
    size = {"subsets": 1, "subset_size": len(real)}
    metrics, end = inception(tmp_path, fid={}, kid=size, precision_recall={"k": 1}, inception_score={"splits": 1})
    found = measured(tmp_path, folders, metrics, 2, teacher=False)
    for metric in (f"fd_inception{end}", f"mmd_inception{end}"):
        assert in_order(found, metric, "itself", "repeated", "noisy")
    assert found["itself"][f"fd_inception{end}"] == pytest.approx(0, abs=1e-3)
    shares = {name: tuple(each[f"{share}_inception{end}"] for share in ("precision", "recall")) for name, each in found.items()}
    assert shares["itself"] == (1, 1)
    assert shares["repeated"][0] == 1 and shares["repeated"][1] <= 0.7
    assert shares["noisy"][0] <= 0.5
    # Of random logits, which have no classes, it is only known that noise over all pictures leaves them fewer different answers.
    assert 1 < found["noisy"][f"score_inception{end}"] < found["itself"][f"score_inception{end}"]


@pytest.mark.slow
def test_everything_that_inception_measures(tmp_path: Path) -> None:
    """Of pictures large enough for patches. A random network hardly sees JPEG's blocks, so KID, which is not exact in small sets, is not asked for
    them; Inception scores and FID∞ of so few pictures are shown by noise and repetition alone."""
    real, held_out = shown.halves(3, 320)
    folders = copies(real, held_out, 3, tmp_path, radius=4)
    size, few = {"subsets": 1, "subset_size": len(real)}, {"points": 3}
    metrics, end = inception(
        tmp_path, fid={}, sfid={}, patch_fid={}, fid_infinity=few, kid=size, precision_recall={"k": 1}, inception_score={"splits": 1}
    )
    found = measured(tmp_path, folders, metrics, 3, teacher=False)
    import json

    Path("/tmp/photos/slow.json").write_text(json.dumps(found))
    for metric in ("fd_inception", "fd_inception_spatial", "fd_inception_patch"):
        assert found["itself"][metric + end] == pytest.approx(0, abs=1e-3)
        for pair in PAIRS:
            assert in_order(found, metric + end, "itself", *pair)
        for name in ("held out", "discoloured", "enlarged", "repeated"):
            assert found[name][metric + end] > found["itself"][metric + end] + 0.1
    for metric in ("mmd_inception", "fd_inception_infinity"):
        assert in_order(found, metric + end, "itself", "slightly noisy", "noisy")
        assert in_order(found, metric + end, "itself", "repeated", "noisy")
    assert found["noisy"][f"precision_inception{end}"] < found["slightly noisy"][f"precision_inception{end}"] < 1
    assert found["repeated"][f"precision_inception{end}"] == 1 and found["repeated"][f"recall_inception{end}"] < 0.5
    assert 1 < found["noisy"][f"score_inception{end}"] < found["slightly noisy"][f"score_inception{end}"] < found["itself"][f"score_inception{end}"]
