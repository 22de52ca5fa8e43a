"""A gallery shows what each model draws for a prompt and a seed, side by side; a blind one tells nobody which is whose."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from html_pages import Tags
from pipelines import NEGATIVE, PROMPTS, in_a_run, student_info, student_role
from pipelines import sd3_folder as sd3_folder

from fastgen import cli, gallery, load_student, load_teacher_of
from fastgen.errors import UserError
from fastgen.export import export_student
from fastgen.families import source_hash
from fastgen.families.sd3 import SD3
from fastgen.fingerprints import unsealed
from fastgen.gallery import key_file, read_rows, write_gallery
from fastgen.generator import ImageGenerator


def exported(sd3_folder: Path, folder: Path, *, resolution: int | None = None, **told: Any) -> Path:
    family = SD3(sd3_folder, max_sequence_length=16, resolution=resolution)
    return in_a_run(export_student(student_role(family), family, student_info(sd3_folder, **told), folder), sd3_folder)


@pytest.fixture(scope="module")
def student(sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher = {"pretrained": str(sd3_folder), "guidance": 4.0, "negative_prompt": NEGATIVE, "sha256": source_hash(str(sd3_folder))}
    return exported(sd3_folder, tmp_path_factory.mktemp("one") / "student", teacher=teacher)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS[:2]) + "\n")
    return path


def pixels(pictures: torch.Tensor) -> np.ndarray:
    """(B, H, W, 3), as a saved PNG holds them."""
    return (pictures * 255 + 0.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def test_each_cell_is_what_its_model_draws_for_that_prompt_and_seed(student: Path, prompts: Path, tmp_path: Path) -> None:
    (page,) = write_gallery([str(student)], read_rows(prompts, 2, seed=5), tmp_path / "page.html")
    tags = Tags(page.read_text(encoding="utf-8"))
    texts, seeds = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], [5, 6, 7, 8]
    columns = [pixels(load_teacher_of(student)(texts, seeds)), pixels(load_student(student)(texts, seeds))]
    shown = np.stack([np.asarray(image) for image in tags.images()]).reshape(4, 2, 16, 16, 3)
    np.testing.assert_array_equal(shown, np.stack(columns, 1))
    assert (columns[0] != columns[1]).any()
    assert [attributes["alt"] for attributes in tags.named("img")][:2] == ["teacher, seed 5", f"{student.parent.name}, seed 5"]


def test_the_page_names_models_steps_and_evaluations_and_fetches_nothing(student: Path, prompts: Path, tmp_path: Path) -> None:
    prompts.write_text("<script>alert(1)</script>\n" + PROMPTS[0] + "\n")
    (page,) = write_gallery([str(student)], read_rows(prompts), tmp_path / "page.html", steps=3)
    html = page.read_text(encoding="utf-8")
    tags = Tags(html)
    assert tags.open == [] and tags.named("script") == [] and "http" not in html and "url(" not in html
    assert all(address.startswith("data:image/png;base64,") for address in tags.addresses())
    assert "<script>alert(1)</script>" in tags.text and str(tmp_path) not in html
    assert student.parent.name in tags.text and "3 steps · 3 NFE" in tags.text
    assert "28 steps · 56 NFE" in tags.text  # the pipeline's own number, with guidance


def test_only_one_model_is_in_memory_and_students_come_first(
    student: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sd3_folder: Path
) -> None:
    import weakref

    alive, drew, most = weakref.WeakSet[ImageGenerator](), list[str](), list[int]()
    init, call = ImageGenerator.__init__, ImageGenerator.__call__

    def counted(self: ImageGenerator, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        alive.add(self)

    def drawing(self: ImageGenerator, *args: Any) -> torch.Tensor:
        drew.append(self.name.split()[0])
        most.append(len(alive))
        return call(self, *args)

    monkeypatch.setattr(ImageGenerator, "__init__", counted)
    monkeypatch.setattr(ImageGenerator, "__call__", drawing)
    write_gallery([str(student)], read_rows(prompts), tmp_path / "page.html", batch_size=1)
    assert drew == ["student", "student", "teacher", "teacher"] and most == [1] * 4


def test_stock_pipelines_stand_beside_students(student: Path, prompts: Path, tmp_path: Path, sd3_folder: Path) -> None:
    (page,) = write_gallery([str(student), str(sd3_folder)], read_rows(prompts), tmp_path / "page.html", steps=2, teacher=False)
    tags = Tags(page.read_text(encoding="utf-8"))
    assert [image.size for image in tags.images()] == [(16, 16)] * 4
    assert sd3_folder.name in tags.text and tags.text.count("2 NFE") == 2  # a stock call's are not known


def test_a_blind_page_shows_the_keys_order_and_tells_nothing_else(student: Path, prompts: Path, tmp_path: Path) -> None:
    rows = read_rows(prompts, 6)
    page, key = write_gallery([str(student)], rows, tmp_path / "page.html", blind=True, secret="s")
    assert key == tmp_path / "page.key.json"
    html, record = page.read_text(encoding="utf-8"), unsealed(json.loads(key.read_text(encoding="utf-8")))
    tags = Tags(html)
    names = [model["name"] for model in record["models"]]
    assert names == ["teacher", student.parent.name]
    for word in ("teacher", "student", "steps", "NFE", "guidance", "secret", *(model["sha256"][:8] for model in record["models"])):
        assert word not in html.partition("</style>")[2], word
    assert [attributes["alt"] for attributes in tags.named("img")] == ["picture A", "picture B"] * 12
    texts, seeds = [prompt for prompt, _ in rows.each], [seed for _, seed in rows.each]
    drawn = [pixels(each(texts, seeds)) for each in (load_teacher_of(student), load_student(student))]
    shown = np.stack([np.asarray(image) for image in tags.images()]).reshape(12, 2, 16, 16, 3)
    for row, (cells, told) in enumerate(zip(shown, record["rows"], strict=True)):
        assert (told["prompt"], told["seed"]) == rows.each[row]
        for place, model in enumerate(told["order"]):
            assert np.abs(cells[place].astype(int) - drawn[model][row].astype(int)).max() <= 1  # other batches round otherwise
    orders = Counter(tuple(told["order"]) for told in record["rows"])
    assert set(orders) == {(0, 1), (1, 0)}


def test_the_order_of_blind_rows_is_even_and_another_for_another_secret() -> None:
    orders = {secret: [tuple(gallery._order(secret, row, 3)) for row in range(600)] for secret in "ab"}
    for found in orders.values():
        assert sorted(Counter(found)) == [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
        assert max(Counter(found).values()) < 150  # 100 each, on average
        assert sum(one == other for one, other in pairwise(found)) < 150  # a row says nothing about the next
    assert sum(one == other for one, other in zip(*orders.values(), strict=True)) < 150


def test_a_new_blind_page_has_a_new_order_and_a_new_name(student: Path, prompts: Path, tmp_path: Path) -> None:
    records = []
    for name in "ab":
        _, key = write_gallery([str(student)], read_rows(prompts, 10), tmp_path / f"{name}.html", blind=True, batch_size=20)
        records.append(json.loads(key.read_text()))
    assert records[0]["page"] != records[1]["page"] and records[0]["secret"] != records[1]["secret"]
    assert [row["order"] for row in records[0]["rows"]] != [row["order"] for row in records[1]["rows"]]  # fails once in 2^20 times


def one_line_of(run: Any, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main([str(each) for each in run]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_mistakes_are_one_line_and_write_nothing(
    student: Path, prompts: Path, tmp_path: Path, sd3_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, broken, pictures, page = tmp_path / "empty.txt", tmp_path / "b.jsonl", tmp_path / "pictures", tmp_path / "page.html"
    empty.write_text("\n\n")
    broken.write_text('{"nothing": 1}\n')
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"")
    larger = exported(sd3_folder, tmp_path / "larger" / "student", resolution=24)
    other = {"pretrained": str(sd3_folder), "guidance": 4.0, "negative_prompt": NEGATIVE, "sha256": "0" * 64}
    stranger = exported(sd3_folder, tmp_path / "stranger" / "student", teacher=other)
    to, ask = ("--output", page), ("--prompts", prompts)
    known = source_hash(str(sd3_folder))[:8]
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((), "STUDENT: missing"),
        ((student, *to), "--prompts: missing"),
        ((student, *ask), "--output: missing"),
        ((student, *ask, "--output", tmp_path / "page.png"), "--output: .* must end in .html"),
        ((student, *ask, "--output", tmp_path / "nowhere" / "page.html"), "--output: no folder"),
        ((student, "--prompts", empty, *to), "--prompts: .*empty.txt' holds no prompts"),
        ((student, "--prompts", broken, *to), "--prompts: .*line 1 has no text field"),
        ((student, "--prompts", tmp_path / "absent.txt", *to), "--prompts: .*absent.txt"),
        ((student, *ask, *to, "--samples", "1000", "--prompts", many(tmp_path)), "--prompts: 3 prompts with --samples 1000 make 3,000 rows"),
        ((student, larger, *ask, *to), r"STUDENT: pictures of different sizes .*'teacher' draws 16x16 pixels, 'larger' 24x24"),
        ((student, stranger, *ask, *to), f"STUDENT: they have different teachers .*{known} of .*00000000 of .*--no-teacher"),
        ((student, student, *ask, *to), "the same model is given twice"),
        ((pictures, *ask, *to), "STUDENT: .*pictures' is a folder of pictures"),
        ((tmp_path / "absent", *ask, *to), "STUDENT: no folder"),
        ((student, *ask, *to, "--blind", "--no-teacher"), "--blind: there is one model"),
        ((student, *ask, *to, "--no-teacher", "--teacher", sd3_folder), "--teacher: .* --no-teacher"),
        ((sd3_folder, *ask, *to, "--teacher", sd3_folder), "--teacher: no student is given"),
        ((student, *ask, *to, "--key", page), "--key: needs --count"),
        (("--count", "votes.json", *ask), "--count: counts votes and draws nothing; remove --prompts"),
        (("--count", "votes.json"), "--key: missing"),
        (("--count", "--key", "k.json"), "--count: missing"),
    ]
    for arguments, message in cases:
        assert re.search(message, line := one_line_of(("gallery", *arguments), capsys)), line
    page.write_text("mine")
    assert "is there already; give --overwrite" in one_line_of(("gallery", student, *ask, *to), capsys)
    assert page.read_text() == "mine" and not key_file(page).exists()


def many(folder: Path) -> Path:
    (folder / "many.txt").write_text("\n".join(PROMPTS))
    return folder / "many.txt"


def test_more_pixels_than_a_page_takes_are_refused_before_anything_is_drawn(
    student: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "MOST_PIXELS", 1000)
    monkeypatch.setattr(gallery, "_draw", lambda *args: pytest.fail("it has drawn"))
    with pytest.raises(UserError, match="--prompts: 4 pictures of 16x16 have 0 million pixels; a page takes at most"):
        write_gallery([str(student)], read_rows(prompts), tmp_path / "page.html")


def test_the_command_says_what_it_wrote(student: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert cli.main(["gallery", str(student), "--prompts", str(prompts), "--output", str(page), "--blind", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"gallery: {page}", f"key: {tmp_path / 'page.key.json'}"]
