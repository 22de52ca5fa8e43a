"""A pipeline's folder as hubs have them: weights as fp16 alone, in shards, without an optional encoder; also of the teacher of an adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import PROMPTS, adapter_tuning, card_snippet, draw, in_a_run, student_info, student_role, tiny_sd3
from pipelines import same_interpreter as same_interpreter
from pipelines import sd3_folder as sd3_folder

from fastgen.errors import UserError
from fastgen.export import export_lora, export_student, verify
from fastgen.families import find_family, source_hash
from fastgen.families.sd3 import SD3
from fastgen.generator import load_student, load_teacher

TOKENS, SEEDS = 16, [3, 4, 5]


def pictures(source: Any) -> torch.Tensor:
    return load_teacher(source, steps=2, guidance=3.0, negative_prompt="blurry", max_sequence_length=TOKENS)(PROMPTS, SEEDS)


@pytest.fixture(scope="module")
def half() -> Any:
    """A pipeline whose weights are halves, though it computes in fp32."""
    return tiny_sd3().to(dtype=torch.float16).to(dtype=torch.float32)


@pytest.mark.parametrize("shards", ["one file", "shards"])
@pytest.mark.parametrize("kept", [(), ("vae", "text_encoder")], ids=["all", "some"])
def test_weights_as_fp16_alone(half: Any, tmp_path: Path, shards: str, kept: tuple[str, ...]) -> None:
    more = {"max_shard_size": "20KB"} if shards == "shards" else {}
    half.save_pretrained(tmp_path / "plain")
    half.save_pretrained(tmp_path / "variant", variant="fp16", **more)
    for name in kept:  # these have no variant
        shutil.rmtree(tmp_path / "variant" / name)
        shutil.copytree(tmp_path / "plain" / name, tmp_path / "variant" / name)
    find_family(tmp_path / "variant").load_backbone(meta=True)
    assert (pictures(tmp_path / "variant") - pictures(tmp_path / "plain")).abs().max() <= 1e-6


def test_a_variant_counts_for_who_a_teacher_is_only_where_it_is_all_there_is(half: Any, tmp_path: Path) -> None:
    half.save_pretrained(tmp_path / "both")
    plain = source_hash(str(tmp_path / "both"))
    half.save_pretrained(tmp_path / "variant", variant="fp16")
    file = "transformer/diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(tmp_path / "variant" / file, tmp_path / "both" / file)
    assert source_hash(str(tmp_path / "both")) == plain
    alone = source_hash(str(tmp_path / "variant"))
    (tmp_path / "variant" / file).write_bytes((tmp_path / "variant" / file).read_bytes()[:-4] + b"abcd")
    assert source_hash(str(tmp_path / "variant")) not in (alone, plain)


def test_a_shard_of_a_variant_that_is_not_there_is_refused(half: Any, tmp_path: Path) -> None:
    half.save_pretrained(tmp_path / "variant", variant="fp16", max_shard_size="20KB")
    first = min((tmp_path / "variant/transformer").glob("*.safetensors"))
    first.unlink()
    with pytest.raises(UserError, match=r"index\.fp16\.json names the weights '.*00001-of-\d+\.safetensors', which are not there"):
        find_family(tmp_path / "variant")


@pytest.fixture
def without_t5(tmp_path: Path) -> Path:
    pipeline = tiny_sd3()
    pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
    pipeline.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.usefixtures("same_interpreter")
def test_without_an_optional_encoder(without_t5: Path, tmp_path: Path) -> None:
    family = SD3(without_t5, max_sequence_length=TOKENS)
    assert family.encode_prompts(PROMPTS)["encoder_hidden_states"].shape == family.meta_conditioning(3)["encoder_hidden_states"].shape
    assert not family.encode_prompts(PROMPTS)["encoder_hidden_states"][:, -TOKENS:].any()
    assert [reader.name for reader in family.readers()] == ["tokenizer", "tokenizer_2"]
    live = tiny_sd3()
    live.text_encoder_3 = live.tokenizer_3 = None
    assert (pictures(without_t5) - pictures(live)).abs().max() <= 1e-6
    assert live.transformer is not None
    stock = family.load_pipeline(None, family.export_scheduler())
    call = family.call_arguments(2, 3.0)
    assert (pictures(without_t5) - draw(stock, PROMPTS, SEEDS, negative_prompt=["blurry"] * 3, **call)).abs().max() <= 1e-5
    family.load_backbone(meta=True)
    folder = in_a_run(export_student(student_role(family), family, student_info(without_t5, steps=2), tmp_path / "run/student"), without_t5)
    assert "text_encoder_3=None, tokenizer_3=None)" in card_snippet(folder)
    assert verify(folder).passed


@pytest.mark.usefixtures("same_interpreter")
def test_an_adapters_teacher_is_loaded_as_it_lies_there(half: Any, tmp_path: Path) -> None:
    half.save_pretrained(tmp_path / "teacher", variant="fp16")
    family = SD3(tmp_path / "teacher", max_sequence_length=TOKENS)
    role = student_role(family, tuning=adapter_tuning())
    folder = in_a_run(export_lora(role, family, student_info(tmp_path / "teacher", steps=2), tmp_path / "run/student"), tmp_path / "teacher")
    assert "variant='fp16'" in card_snippet(folder)
    assert verify(folder).passed
    assert load_student(folder).steps == 2
    full = export_student(student_role(family), family, student_info(tmp_path / "teacher", steps=2), tmp_path / "full")
    assert "variant" not in card_snippet(full)
    assert verify(full).passed
