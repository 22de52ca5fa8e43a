"""A pipeline whose configurations, weights and encoders do not fit together is refused in one line before anything large is made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import PROMPTS, edit_json
from pipelines import sd3_folder as sd3_folder
from safetensors.torch import load_file, save_file

from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.sd3 import SD3

TOKENS = 16


@pytest.fixture
def copied(sd3_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd3_folder, tmp_path / "teacher"))


def planned(folder: Path) -> Any:
    """What a dry run makes of the teacher."""
    return find_family(folder, max_sequence_length=TOKENS).load_backbone(meta=True)


ABSURD = [10**12, 1e12, 0, -1, None, "2", [2], {}, True, float("nan"), float("inf"), 10**400]


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: f"{value!s:.12}")
@pytest.mark.parametrize(
    ("file", "key"),
    [("transformer/config.json", key) for key in ("num_layers", "patch_size", "sample_size", "pos_embed_max_size", "in_channels")]
    + [("vae/config.json", key) for key in ("block_out_channels", "layers_per_block", "scaling_factor")]
    + [("text_encoder_3/config.json", "num_layers"), ("text_encoder/config.json", "projection_dim")],
)
def test_absurd_numbers_are_refused_by_file_and_key(file: str, key: str, value: Any, copied: Path) -> None:
    if key == "scaling_factor" and type(value) in (int, float) and abs(value) <= 1e12:
        pytest.skip("a factor may be any number")
    if key == "projection_dim" and value == [2]:
        value = "2"
    if key == "block_out_channels" and value == [2]:
        value = [0]
    edit_json(copied / file, **{key: value})
    with pytest.raises(
        UserError, match=rf"teacher\.pretrained.*{file.split('/')[0]}.*{key}|cannot read '.*{file.split('/')[0]}|{key} of {file.split('/')[0]}"
    ) as caught:
        planned(copied)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("file", "options", "said"),
    [
        ("transformer/config.json", {"num_layers": 3}, r"transformer_blocks\.\d.* in its weights, where its config\.json says"),
        ("transformer/config.json", {"joint_attention_dim": 44}, r"has the shape \(32, 40\) in its weights, where its config\.json says \(32, 44\)"),
        ("vae/config.json", {"block_out_channels": [8, 16]}, r"in its weights, where its config\.json says"),
        ("text_encoder/config.json", {"projection_dim": 13}, "projections of text_encoder and text_encoder_2 together: 21, where 20 is needed"),
        ("text_encoder_3/config.json", {"d_model": 44}, r"the output of text_encoder_3: 44, where 40 is needed"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 10**12}, "model_max_length is 1000000000000, but text_encoder reads 1 to 24 tokens"),
        ("vae/config.json", {"layers_per_block": 2}, "is missing in its weights"),
        ("transformer/config.json", {"sample_size": 64}, "PatchEmbed|pos_embed|at most|larger"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused_by_the_plan(file: str, options: dict[str, Any], said: str, copied: Path) -> None:
    edit_json(copied / file, **options)
    with pytest.raises(UserError, match=said):
        planned(copied)


def test_a_network_that_lacks_a_tensor_is_refused_and_one_in_two_files_is_not(copied: Path) -> None:
    file = copied / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    first, *others = sorted(tensors)
    file.unlink()
    save_file({first: tensors[first]}, copied / "transformer/a.safetensors", metadata={"format": "pt"})
    save_file({name: tensors[name] for name in others}, copied / "transformer/b.safetensors", metadata={"format": "pt"})
    places = {first: "a.safetensors", **dict.fromkeys(others, "b.safetensors")}
    index = copied / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    assert planned(copied) is not None
    assert torch.equal(SD3(copied).load_backbone().state_dict()[first], tensors[first])
    index.write_text(json.dumps({"weight_map": {**places, first: 3}}))
    with pytest.raises(UserError, match=rf"index\.json': key weight_map\.{first}: must be a text, not 3"):
        planned(copied)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(others, "b.safetensors")}))
    with pytest.raises(UserError, match=f"{first} is missing in its weights"):
        planned(copied)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_texts_that_are_not_finite_are_refused_in_one_line(value: float, copied: Path) -> None:
    file = copied / "text_encoder_3/model.safetensors"
    tensors = load_file(file)
    tensors["encoder.final_layer_norm.weight"][3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    family = SD3(copied, max_sequence_length=TOKENS)
    with pytest.raises(UserError, match=r"teacher\.pretrained: its text encoder gives encoder_hidden_states that are not finite for 'a red cat'"):
        family.encode_prompts(PROMPTS)
