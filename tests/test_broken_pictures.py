"""Networks and decoders that draw numbers which are no pictures: one line that says whose, wherever they are drawn."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pipelines import PROMPTS, in_a_run, record_hashes, student_info, student_role, tiny_protocol, verifying_here
from pipelines import sd3_folder as sd3_folder
from safetensors.torch import load_file, save_file

from fastgen import cli
from fastgen.errors import NotFinite
from fastgen.evaluation import diversity, frechet, unkept
from fastgen.evaluation.protocol import load_protocol
from fastgen.export import export_student
from fastgen.families.sd3 import SD3
from fastgen.generator import load_teacher

NAN = float("nan")


def spoil(pipeline: Path, component: str, *, values: float = NAN) -> None:
    """One number in the middle of a network's last layer."""
    (file,) = (pipeline / component).glob("*.safetensors")
    weights = load_file(file)
    name = {"vae": "decoder.conv_out.bias", "transformer": "proj_out.bias"}[component]
    weights[name][0] = values
    save_file(weights, file, {"format": "pt"})


@pytest.fixture(scope="module")
def student(sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = SD3(sd3_folder, max_sequence_length=16)
    folder = tmp_path_factory.mktemp("run") / "student"
    return in_a_run(export_student(student_role(family), family, student_info(sd3_folder), folder), sd3_folder)


def one_line(arguments: list[str], capfd: pytest.CaptureFixture[str], status: int = 2) -> str:
    capfd.readouterr()
    assert cli.main(arguments) == status
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("component", "said"),
    [
        ("vae", "are not finite; its network's latents are finite, so its decoder (VAE) is damaged or overflows"),
        ("transformer", "are not finite: its network is damaged or overflows"),
    ],
)
def test_a_damaged_student_is_named_by_every_command(
    component: str, said: str, student: Path, sd3_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(student, tmp_path / "student"))
    spoil(broken, component)
    record_hashes(broken)  # as if it had been exported so
    prompts = ["--prompt", "a red cat", "--prompt", "two boats at sea"]
    with verifying_here():
        for arguments, count in (
            (["sample", str(broken), *prompts, "--output", str(tmp_path / "a.png")], 2),
            (["verify", str(broken)], 4),
            (["evaluate", str(broken), "--teacher", str(sd3_folder), "--protocol", tiny_protocol(tmp_path)], 3),
        ):
            assert one_line(arguments, capfd) == f"error: {count} of {count} pictures of student '{broken}' {said}"
    assert not (tmp_path / "a.png").exists() and not (broken / "results.json").exists()


def recipe(folder: Path, teacher: Path) -> list[str]:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    blocks = {
        "teacher": {"pretrained": str(teacher), "guidance": 2.0, "max_sequence_length": 16},
        "student": {"steps": 1},
        "distiller": {"name": "dmd2", "critic_updates": 1},
        "data": {"prompts": str(folder / "prompts.txt")},
        "optimizer": {"student": {"lr": 1e-4}, "fake_score": {"lr": 1e-4}},
        "train": {"steps": 4, "batch_size": 2, "checkpoint_every": 1, "sample_every": 2, "device": "cpu"},
        "evaluate": {"protocol": None},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(blocks))
    return ["train", str(folder / "recipe.yaml"), "--output", str(folder / "run")]


def test_a_teacher_with_a_damaged_decoder_is_named_before_training(sd3_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher = Path(shutil.copytree(sd3_folder, tmp_path / "teacher"))
    spoil(teacher, "vae")
    line = one_line(recipe(tmp_path, teacher), capfd)
    assert line.startswith(f"error: 2 of 2 pictures of teacher '{teacher}' are not finite; its network's latents are finite, so its decoder (VAE)")


def test_training_samples_that_are_none_end_training(
    sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The student's weights are sound, and what they draw overflows."""
    decode, calls = SD3.decode_latents, []

    def failing(self: Any, latents: torch.Tensor) -> torch.Tensor:
        calls.append(len(latents))
        pixels = decode(self, latents)
        if len(calls) > 8:  # the teacher's row is drawn in eight calls
            pixels[0, 0, 0, 0] = NAN
        return pixels

    monkeypatch.setattr(SD3, "decode_latents", failing)
    line = one_line(recipe(tmp_path, sd3_folder), capfd, status=1)
    assert line.startswith("error: step 2: 1 of 2 pictures of the student are not finite; its network's latents are finite")
    assert "; newest sound checkpoint: step_000002; go on from it with fastgen train RECIPE --resume" in line


def test_latents_that_a_decoder_would_clamp_are_found(sd3_folder: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(sd3_folder, tmp_path / "teacher"))
    spoil(teacher, "transformer", values=float("inf"))
    with pytest.raises(NotFinite, match=r"^3 of 3 pictures of teacher '.*' are not finite: its network is damaged or overflows"):
        load_teacher(teacher, steps=1, guidance=1.0)(PROMPTS, [0, 1, 2])


def test_a_measurement_of_any_generator_says_how_many_images_are_none() -> None:
    def generate(prompts: list[str], seeds: list[int], steps: int) -> torch.Tensor:
        images = torch.zeros(len(prompts), 3, 8, 8)
        images[1] = NAN
        return images

    with pytest.raises(NotFinite, match=r"^1 of 256 images that the generator returned are not finite"):
        unkept.run_protocol(load_protocol("digits"), generate, model="student", steps=[1], guidance=1.0)


def test_features_that_are_not_finite_are_no_statistics() -> None:
    features = torch.ones(4, 3)
    features[2, 1] = NAN
    for measure in (
        lambda: frechet.FeatureStatistics.from_features(features),
        lambda: diversity.vendi_score(features, ["a"] * 4),
        lambda: diversity.pairwise_distance(features, ["a"] * 4),
    ):
        with pytest.raises(ValueError, match=r"^features of 1 of 4 images are not finite"):
            measure()
