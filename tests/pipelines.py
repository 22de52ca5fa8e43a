"""A tiny random StableDiffusion3Pipeline, as different from the defaults as it can be: every size, factor and shift has its own value.

16x16 pixels, VAE of factor 2 with shift and scale, 4 latent channels, CLIP widths below T5's (so the pipeline pads), character
tokenizers, and the scheduler that shifts twice. Random weights, but everything the picture should depend on does change it.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from fastgen import export
from fastgen.export import StudentInfo
from fastgen.families import resolve_source
from fastgen.families.base import Family
from fastgen.families.sd3 import SD3
from fastgen.fingerprints import SEAL, file_hashes, sealed
from fastgen.generator import read_manifest
from fastgen.provenance import teacher_source
from fastgen.roles import LoraTuning, Role, build_roles, trainable

CLIP_TOKENS = 24
PROMPTS = ["a red cat", "two boats at sea", "a small house"]
NEGATIVE = "blurry"


def clip_tokenizer() -> Any:
    """One token a character: no merges."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=CLIP_TOKENS)


def t5_tokenizer() -> Any:
    """One token a character."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, ("▁", -2.0), *((chr(c), -3.0) for c in range(33, 127))], extra_ids=0, model_max_length=64)


def clip_encoder(tokenizer: Any, projection: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS, projection_dim=projection, hidden_act="gelu", **special,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config).eval()


def t5_encoder(tokenizer: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer), d_model=40, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def tiny_sd3(seed: int = 0) -> Any:
    """The pipeline, in eval mode, fp32, from `seed` alone."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip, t5 = clip_tokenizer(), t5_tokenizer()
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            caption_projection_dim=32, joint_attention_dim=40, pooled_projection_dim=20, pos_embed_max_size=16,
        ).eval()  # fmt: skip
        blocks: dict[str, Any] = {
            "block_out_channels": (8, 12),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        }
        vae = AutoencoderKL(
            sample_size=16, layers_per_block=1, latent_channels=4, norm_num_groups=4, **blocks,
            use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305,
        ).eval()  # fmt: skip
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            tokenizer=clip, tokenizer_2=clip, tokenizer_3=t5,
            text_encoder=clip_encoder(clip, 12), text_encoder_2=clip_encoder(clip, 8), text_encoder_3=t5_encoder(t5),
        )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_sd3(0)`, saved as a diffusers folder once a session, whichever modules import this fixture; read-only by agreement."""
    folder = tmp_path_factory.getbasetemp() / "tiny_sd3"
    if not folder.exists():
        tiny_sd3().save_pretrained(folder)
    return folder


def student_role(family: Family, *, tuning: LoraTuning | None = None, noise: float = 0.03, seed: int = 1) -> Role:
    """A student whose trainable weights moved away from the teacher's by normal noise."""
    role = build_roles({"student": trainable()}, family, family.load_backbone(), tuning=tuning)["student"]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in role.parameters().values():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return role


def student_info(source: Any, **settings: Any) -> StudentInfo:
    teacher = {"pretrained": str(source), "guidance": 4.0, "negative_prompt": NEGATIVE}
    sampling = {"steps": 4, "grid": None, "guidance": 1.0}
    origin = {"method": "dmd2", "teacher": teacher, "prompts": PROMPTS, "recipe": {"train": {"seed": 0}}}
    return StudentInfo(**sampling | origin | settings)


def adapter_tuning() -> LoraTuning:
    """alpha differs from rank, so a lost alpha shows."""
    return LoraTuning(rank=4, alpha=12.0, targets=SD3.lora_targets)


def draw(pipeline: Any, prompts: list[str], seeds: list[int], **call: Any) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 1] of a stock pipeline call with one generator a prompt."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.from_numpy(pipeline(prompts, generator=generators, output_type="np", **call).images).permute(0, 3, 1, 2)


def without_fastgen(monkeypatch: pytest.MonkeyPatch, script: str, names: dict[str, Any]) -> None:
    """Run a script in this interpreter with every fastgen module made impossible to import."""
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "fastgen"]:
            patch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
        exec(compile(script, "script", "exec"), names)


@contextmanager
def verifying_here() -> Iterator[None]:
    """verify's child script runs here: a new interpreter takes ten seconds to import diffusers, and two tests do that for all."""

    def run(command: list[str], *, input: str, **_: Any) -> subprocess.CompletedProcess[str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(input))
            try:
                without_fastgen(patch, command[-1], {})
            except Exception as error:
                return subprocess.CompletedProcess(command, 1, "", f"{type(error).__name__}: {error}")
        return subprocess.CompletedProcess(command, 0, "", "")

    # Of `export` alone: others start programs too, such as matplotlib on its first use.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "subprocess", SimpleNamespace(run=run))
        yield


@pytest.fixture
def same_interpreter() -> Iterator[None]:
    with verifying_here():
        yield


def in_a_run(student: Path, teacher: Path) -> Path:
    """A student, beside which now lies the recipe of a run with this teacher."""
    (student.parent / "recipe.yaml").write_text(json.dumps({"teacher": {"pretrained": str(teacher)}}))
    return student


def card_snippet(folder: Path) -> str:
    """The code of the model card, with the student's folder and that of an adapter's teacher filled in."""
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert "STUDENT_DIR" in snippet
    assert not re.search(r"(import|from) fastgen", snippet)
    if "TEACHER_DIR" in snippet:
        snippet = snippet.replace("TEACHER_DIR", str(resolve_source(*teacher_source(folder, read_manifest(folder)["teacher"]))))
    return snippet.replace("STUDENT_DIR", str(folder))


def run_snippet(monkeypatch: pytest.MonkeyPatch, folder: Path) -> np.ndarray:
    """The card's snippet, run where fastgen cannot be imported: its picture (H, W, 3), 8-bit."""
    names: dict[str, Any] = {}
    without_fastgen(monkeypatch, card_snippet(folder), names)
    return np.asarray(names["image"])


def assert_shows(image: np.ndarray, picture: Tensor) -> None:
    """image: (H, W, 3), 8-bit; picture: (1, 3, H, W) in [0, 1], of which it must be the rounded value, ties within 1e-5 either way."""
    assert image.dtype == np.uint8
    assert np.abs(image - 255 * picture[0].permute(1, 2, 0).double().numpy()).max() <= 0.5 + 255e-5


def edit_json(path: Path, **values: Any) -> None:
    """Change a JSON file of a pipeline; of a student, as if it had been exported so."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    for student in [folder for folder in path.parents if (folder / "fastgen.json").is_file()]:
        record_hashes(student)


def record_hashes(student: Path) -> None:
    """Make what lies in a student's folder what its fastgen.json says."""
    manifest = {key: value for key, value in json.loads((student / "fastgen.json").read_text()).items() if key != SEAL}
    manifest["sha256"] = file_hashes(student, [name for name in manifest["sha256"] if (student / name).is_file()])
    (student / "fastgen.json").write_text(json.dumps(sealed(manifest)))


def tiny_protocol(folder: Path, texts: list[str] = PROMPTS) -> str:
    """A protocol file of a picture of the small pipeline for each text, measured against the teacher's, which needs no weights."""
    (folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    sets = {"open": {"prompts": str(folder / "texts.txt"), "first_seed": 0}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"name": "tiny", "size": [16, 16], "sets": sets, "metrics": {"teacher_error": None}}))
    return str(folder / "tiny.yaml")
