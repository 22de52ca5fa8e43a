"""What tokenizers make of prompts: nothing, a part, the beginning; in the bundled teacher's own and in ones made for the purpose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from fastgen import legibility, run
from fastgen.assets import DIGITS_TEACHER
from fastgen.config import Recipe
from fastgen.data import digits
from fastgen.errors import UserError
from fastgen.families.base import Family
from fastgen.families.sd3 import SD3
from fastgen.families.toy import Toy
from fastgen.legibility import Legibility, Reader, read
from fastgen.outlook import dry_run
from fastgen.plan import plan

NINE = "a handwritten seven and a drawing of the number nine"  # in CLIP's tokens 9 words, and 'and' as two
BLORP = "blorp qux"  # in CLIP's tokens 8 letters


@pytest.fixture(scope="module")
def teacher() -> SD3:
    return SD3("fastgen:digits")


def words(*known: str) -> Any:
    """Words are tokens, others are <unk>."""
    model = WordLevel({word: i for i, word in enumerate(["<unk>", *known])}, unk_token="<unk>")  # pyright: ignore[reportArgumentType]
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def letters(known: str) -> Any:
    """Letters are tokens, others vanish without a trace."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({letter: i for i, letter in enumerate(known)}, [])))


def test_every_caption_of_the_digits_is_read_whole(teacher: SD3) -> None:
    texts = ["", " ", *digits.prompts()]
    assert teacher.legibility(texts) == Legibility(len(texts))


def test_the_bundled_teacher(teacher: SD3) -> None:
    found = teacher.legibility(["a handwritten seven", BLORP, "any blorp", "A Handwritten Seven", NINE, "\u200b", "\ud800", "any blorp"])
    assert found.total == 7
    t5 = "tokenizer_3 knows none of its tokens"
    assert found.lost == {"\ud800": "is no valid text", BLORP: t5, "A Handwritten Seven": t5, "\u200b": t5}
    assert found.partial == {"any blorp": "tokenizer_3 knows 1 of its 2 tokens", NINE: "tokenizer_3 knows 6 of its 7 tokens"}
    assert found.cut == {BLORP: "tokenizer keeps 6 of its 8 tokens", NINE: "tokenizer keeps 6 of its 11 tokens"}


def test_a_prompt_is_lost_where_one_of_several_tokenizers_reads_nothing() -> None:
    one, other = Reader("one", words("red", "cat"), 8), Reader("other", words("cat", "dog"), 8)
    found = read(["red cat", "red", "dog", "cat", "bird"], [one, other])
    assert found.lost == {
        "red": "other knows none of its tokens",
        "dog": "one knows none of its tokens",
        "bird": "one knows none of its tokens",
    }
    assert found.partial == {"red cat": "other knows 1 of its 2 tokens"}
    assert not found.cut
    assert read(["red", "bird"], []) == Legibility(2)


def test_what_lies_beyond_the_end_is_not_read() -> None:
    found = read(["cat cat", "cat cat cat", "x y cat", "cat cat x"], [Reader("one", words("cat"), 2)])
    assert found.cut == dict.fromkeys(["cat cat cat", "x y cat", "cat cat x"], "one keeps 2 of its 3 tokens")
    assert found.lost == {"x y cat": "one knows none of its tokens"}
    assert not found.partial


def test_unknown_text_that_leaves_no_token_at_all() -> None:
    found = read(["abba", "xyz", "abx", ""], [Reader("one", letters("ab"), 8)])
    assert found.lost == {"xyz": "one reads nothing in it"}


def test_clips_end_token_stands_for_what_it_does_not_know() -> None:
    pieces = ["a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=5)
    assert clip("xy", add_special_tokens=False)["input_ids"] == [5, 5]
    found = read(["ab", "xy", "ax", "abab"], [Reader("clip", clip, 5)])
    assert found.lost == {"xy": "clip knows none of its tokens"}
    assert found.partial == {"ax": "clip knows 1 of its 2 tokens"}
    assert found.cut == {"abab": "clip keeps 3 of its 4 tokens"}


def test_large_sets_are_read_in_batches(teacher: SD3, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{word} {other}" for word in (*digits.WORDS, "blorp") for other in (*digits.WORDS, "qux", NINE)]
    whole = teacher.legibility(texts)
    assert (list(whole.lost), len(whole.cut)) == ([BLORP], 12)
    monkeypatch.setattr(legibility, "_BATCH", 7)
    assert teacher.legibility(texts) == whole


def test_a_tokenizer_whose_encoder_the_pipeline_lacks_is_not_asked(tmp_path: Path) -> None:
    folder = shutil.copytree(DIGITS_TEACHER, tmp_path / "teacher", ignore=shutil.ignore_patterns("text_encoder*"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_3": [None, None]}))
    assert SD3(folder).legibility(["blorp qux"]).lost == {}  # CLIP falls back to letters


def test_a_family_that_cannot_tell_reads_all(teacher: SD3) -> None:
    assert Family.legibility(teacher, ["blorp qux"]) == Legibility(1)
    assert list(Toy("toy:gaussian").legibility(["", "0", "1", "x"]).lost) == ["1", "x"]


def test_what_is_lost_is_refused_and_the_rest_said_once() -> None:
    why, long = "one knows none of its tokens", "x" * 200
    with pytest.raises(UserError, match=r"^--prompt: 'x' \(one knows none of its tokens\), so it conditions on nothing$"):
        Legibility(1, {"x": why}).check("--prompt")
    with pytest.raises(UserError, match=rf"'{'x' * 80}…' .* nothing; the same holds for 1 more of 9 prompts$"):
        Legibility(9, {long: why, "y": why}).check("--prompt")
    assert Legibility(9, {}, {"a x": "w", "b x": "w"}, {"c": "v"}).check("key") == [
        "key: words are unknown in 2 of 9 prompts, such as 'a x' (w)",
        "key: the end is cut off 1 of 9 prompts, such as 'c' (v)",
    ]
    assert Legibility(9).check("key") == []


def recipe(folder: Path, *prompts: str, **teacher: Any) -> Recipe:
    (folder / "prompts.txt").write_text("\n".join(prompts))
    return Recipe.load("digits_dmd2_1step", [f"data.prompts={folder / 'prompts.txt'}", *(f"teacher.{key}={value}" for key, value in teacher.items())])


def test_the_plan_refuses_what_the_teacher_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^recipe key data\.prompts: 'blorp qux' \(tokenizer_3 knows none"):
        plan(recipe(tmp_path, "a handwritten seven", "blorp qux"))
    with pytest.raises(UserError, match=r"^recipe key teacher\.negative_prompt: 'blurry' "):
        plan(recipe(tmp_path, "a handwritten seven", negative_prompt="blurry"))
    captioned = {"distiller": {"name": "flow_matching"}, "optimizer": {"student": {"lr": 1e-3}}, "data": {"images": str(tmp_path)}}
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["any digit", "blorp"]}')
    with pytest.raises(UserError, match=r"^recipe key data\.images: 'blorp' "):
        plan(Recipe.model_validate(recipe(tmp_path, "any digit").dump() | captioned))


def test_a_run_that_has_begun_is_not_asked_again(tmp_path: Path) -> None:
    assert plan(recipe(tmp_path, "blorp qux"), started=True).warnings == ()


class Stopped(Exception):
    pass


def test_what_is_read_in_part_is_said_by_the_dry_run_and_by_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partly = recipe(tmp_path, "a handwritten seven", "any blorp")
    warning = "recipe key data.prompts: words are unknown in 1 of 2 prompts, such as 'any blorp' (tokenizer_3 knows 1 of its 2 tokens)"
    assert dry_run(partly)["warnings"] == [warning]
    said: list[str] = []

    class Listening(run.Progress):
        def warn(self, message: str) -> None:
            said.append(message)

    def stop(*_: Any) -> None:
        raise Stopped

    monkeypatch.setattr(run, "build", stop)
    with pytest.raises(Stopped):
        run.train(partly, tmp_path / "run", progress=Listening())
    assert said == [f"warning: {warning}"]
