"""Pictures from seeds: independent of the batch, equal to plain diffusers, with the settings of the folder they come from."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from damage import flip
from diffusers import FlowMapEulerDiscreteScheduler, StableDiffusion3Pipeline
from pipelines import NEGATIVE, PROMPTS, adapter_tuning, draw, in_a_run, student_role
from pipelines import sd3_folder as sd3_folder
from torch import Tensor

from fastgen import cli, generator, load_student, load_teacher
from fastgen.conditioning import Conditioning
from fastgen.denoiser import Denoiser, Predictor
from fastgen.errors import UserError
from fastgen.export import StudentInfo, export_lora, export_student
from fastgen.families import resolve_source, source_hash
from fastgen.families.sd3 import SD3
from fastgen.families.toy import MIXTURES, Toy
from fastgen.fingerprints import file_names
from fastgen.generator import ImageGenerator, generate_pictures, load_teacher_of, noise_from_seeds, read_manifest
from fastgen.path import Flow, Kind, TrigFlow, VarianceExploding, VariancePreserving
from fastgen.path import Path as NoisingPath
from fastgen.roles import Role, build_roles, trainable
from fastgen.timesteps import down_to

TOKENS = 16


@pytest.fixture(scope="module")
def teacher(sd3_folder: Path) -> ImageGenerator:
    return load_teacher(sd3_folder, steps=2, guidance=3.0, negative_prompt=NEGATIVE, max_sequence_length=TOKENS)


def test_noise_of_a_seed_is_one_cpu_generators() -> None:
    noise = noise_from_seeds([7, 8, 7], (4, 3, 5))
    assert noise.shape == (3, 4, 3, 5)
    assert torch.equal(noise[0], torch.randn((4, 3, 5), generator=torch.Generator().manual_seed(7)))
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])


def test_the_picture_of_a_seed_does_not_depend_on_its_batch(teacher: ImageGenerator) -> None:
    together = teacher(PROMPTS, [3, 4, 5])
    for i in (0, 1, 2):
        torch.testing.assert_close(teacher([PROMPTS[i]], [3 + i]), together[i : i + 1], rtol=0, atol=1e-5)
    torch.testing.assert_close(teacher(PROMPTS[::-1], [5, 4, 3]), together.flip(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(generate_pictures(teacher, PROMPTS, [3, 4, 5], batch=2), together, rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.05


def test_pictures_equal_plain_diffusers_with_one_generator_a_prompt(sd3_folder: Path, teacher: ImageGenerator) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_folder, scheduler=FlowMapEulerDiscreteScheduler(shift=3.0))
    call = {"guidance_scale": 3.0, "negative_prompt": [NEGATIVE] * 3, "max_sequence_length": TOKENS}
    for steps in (2, 3):
        expected = draw(pipeline, PROMPTS, [3, 4, 5], num_inference_steps=steps, **call)
        pictures = teacher(PROMPTS, [3, 4, 5], steps)
        assert (pictures - expected).abs().max() <= 1e-5
        assert pictures.dtype == torch.float32
        assert pictures.min() >= 0
        assert pictures.max() <= 1


def test_the_result_does_not_depend_on_the_ambient_generator(teacher: ImageGenerator) -> None:
    pictures = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        pictures.append(teacher(PROMPTS[:1], [9]))
    assert torch.equal(*pictures)


def test_each_prompt_is_encoded_once() -> None:
    class Counting(Toy):
        encoded: list[str]

        def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
            self.encoded += prompts
            return super().encode_prompts(prompts)

    family = Counting("toy:ring")
    family.encoded = []
    generator = ImageGenerator(family, Predictor(Denoiser(family.load_backbone(), family), family), steps=2, guidance=2.0)
    assert family.encoded == [""]
    rows = generator.conditioning(["3", "5", "3"])["component"]
    assert rows.tolist() == [3, 5, 3]
    assert generator.conditioning(["5", "1"])["component"].tolist() == [5, 1]
    assert family.encoded == ["", "3", "5", "1"]


def test_an_explicit_grid_serves_its_own_number_of_steps_only(sd3_folder: Path) -> None:
    family = SD3(sd3_folder)
    generator = ImageGenerator(family, Predictor(Denoiser(family.load_backbone(), family), family), steps=2, grid=[0.8, 0.3])
    assert generator.times().tolist() == generator.times(2).tolist() == [0.8, 0.3]
    assert generator.times(4).tolist() == pytest.approx([1, 0.9, 0.75, 0.5])


def test_load_teacher_takes_the_pipelines_own_steps_and_guidance(sd3_folder: Path, tmp_path: Path) -> None:
    plain = load_teacher(sd3_folder)
    assert (plain.steps, plain.guidance, plain.family.own_call["guidance_scale"]) == (28, 7.0, 7.0)
    copy = shutil.copytree(sd3_folder, tmp_path / "own")
    (copy / "fastgen.json").write_text(json.dumps({"call": {"num_inference_steps": 5, "guidance_scale": 1.5, "max_sequence_length": 9}}))
    own = load_teacher(copy)
    assert (own.steps, own.guidance) == (5, 1.5)
    assert isinstance(own.family, SD3)
    assert own.family.max_sequence_length == 9
    given = load_teacher(copy, steps=3, guidance=1.0, resolution=24)
    assert (given.steps, given.guidance, given.family.latent.size) == (3, 1.0, (12, 12))


def test_load_teacher_uses_the_guidance_and_the_negative_prompt_it_is_given(sd3_folder: Path, teacher: ImageGenerator) -> None:
    options: dict[str, Any] = {"steps": 2, "guidance": 3.0, "max_sequence_length": TOKENS}
    same = load_teacher(sd3_folder, negative_prompt=NEGATIVE, **options)
    assert (same(PROMPTS, [3, 4, 5]) - teacher(PROMPTS, [3, 4, 5])).abs().max() <= 1e-5
    other = load_teacher(sd3_folder, **options)
    assert (other(PROMPTS, [3, 4, 5]) - teacher(PROMPTS, [3, 4, 5])).abs().max() > 1e-3


def test_the_bundled_teacher_draws_what_plain_diffusers_draws_with_its_own_call() -> None:
    bundled, folder = load_teacher("fastgen:digits"), resolve_source("fastgen:digits")
    assert (bundled.steps, bundled.guidance, bundled.family.latent.shape) == (25, 1.5, (2, 8, 8))
    prompts = ["the digit three", "an odd digit"]
    expected = draw(StableDiffusion3Pipeline.from_pretrained(folder), prompts, [0, 1], **read_manifest(folder)["call"])
    assert (bundled(prompts, [0, 1]) - expected).abs().max() <= 1e-5


def test_load_teacher_of_a_closed_form_teacher_samples_its_component() -> None:
    ring = load_teacher("toy:ring")
    assert (ring.steps, ring.guidance) == (25, 1.0)
    mixture = MIXTURES["ring"]()
    samples = ring.latents(["2"] * 64, range(64))
    assert (samples.double().mean(0) - mixture.means[2]).abs().max() < 0.05
    assert (samples.double().std(0) - 0.06).abs().max() < 0.03


def student_info(**settings: Any) -> StudentInfo:
    teacher = {"pretrained": "owner/teacher", "guidance": 4.0, "negative_prompt": NEGATIVE}
    sampling = {"steps": 3, "grid": None, "guidance": 1.0}
    return StudentInfo(**{"method": "dmd2", "teacher": teacher, "prompts": PROMPTS, "recipe": {}} | sampling | settings)


@pytest.mark.parametrize(
    ("settings", "resolution"),
    [({}, None), ({"guidance": 2.5}, 24), ({"grid": [1.0, 0.7, 0.2]}, None)],
    ids=["plain", "guided 24 pixels", "explicit grid"],
)
def test_load_student_brings_weights_and_settings(sd3_folder: Path, tmp_path: Path, settings: dict[str, Any], resolution: int | None) -> None:
    family = SD3(sd3_folder, max_sequence_length=TOKENS, resolution=resolution)
    role, info = student_role(family), student_info(**settings)
    trained = ImageGenerator(family, role.predictor, steps=3, guidance=info.guidance, negative_prompt=NEGATIVE, grid=info.grid)
    expected: Tensor = trained(PROMPTS, [0, 1, 2])
    student = load_student(export_student(role, family, info, tmp_path / "student"))
    assert (student.steps, student.guidance) == (3, info.guidance)
    assert torch.equal(student.times(), trained.times())
    assert (student(PROMPTS, [0, 1, 2]) - expected).abs().max() <= 1e-5
    teacher = load_teacher(sd3_folder, steps=3, guidance=info.guidance, max_sequence_length=TOKENS, resolution=resolution)
    assert (teacher(PROMPTS, [0, 1, 2]) - expected).abs().max() > 1e-3


def test_read_manifest_says_why_a_folder_is_no_student(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        read_manifest(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"holds no fastgen\.json, so it is not an exported student"):
        load_student(tmp_path)
    (tmp_path / "fastgen.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_student(tmp_path)
    (tmp_path / "fastgen.json").write_text('{"format": 4}')
    with pytest.raises(UserError, match=r"fastgen\.json' has format 4, this fastgen reads 1 to 3"):
        load_student(tmp_path)
    (tmp_path / "fastgen.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match=r"fastgen\.json': it has no seal; export the student again"):
        load_student(tmp_path)
    (tmp_path / "fastgen.json").write_text("[]")
    with pytest.raises(UserError, match=r"fastgen\.json': must be a JSON object, not \[\]"):
        load_student(tmp_path)


def adapter_role(family: SD3) -> Role:
    return build_roles({"student": trainable()}, family, family.load_backbone(), tuning=adapter_tuning())["student"]


@pytest.fixture(scope="module")
def originals(sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student of each form, and the teacher that they know by its content."""
    root = tmp_path_factory.mktemp("students")
    teacher = Path(shutil.copytree(sd3_folder, root / "teacher"))
    family = SD3(teacher, max_sequence_length=TOKENS)
    origin = {"pretrained": str(teacher), "guidance": 4.0, "negative_prompt": NEGATIVE, "sha256": source_hash(str(teacher))}
    info = student_info(teacher=origin)
    lora = in_a_run(export_lora(adapter_role(family), family, info, root / "lora"), teacher)
    return {"teacher": teacher, "lora": lora, "full": export_student(student_role(family), family, info, root / "full")}


@pytest.mark.parametrize("form", ["full", "lora"])
def test_one_flipped_bit_in_any_file_of_a_student_is_refused(
    originals: dict[str, Path], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    student = Path(shutil.copytree(originals[form], tmp_path / "student"))
    names = file_names(student)
    assert {"fastgen.json", "README.md", "scheduler/scheduler_config.json"} < set(names)
    monkeypatch.setattr(generator, "open_student", lambda *_, **__: "opened")
    for name in names:
        content = (student / name).read_bytes()
        for share in (0.0, 0.31, 0.64, 1.0):
            flip(student / name, share)
            if name == "README.md":  # anybody may edit the card
                assert load_student(student) == "opened"
            else:
                assert cli.main(["sample", str(student), "--prompt", "x", "--output", str(tmp_path / "x.png")]) == 2, name
                error = capfd.readouterr().err
                assert error.count("\n") == 1
                assert f"{student / name}'" in error
            (student / name).write_bytes(content)
    assert load_student(student) == "opened"


def test_what_lies_beside_a_students_own_files_may_change(originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = Path(shutil.copytree(originals["full"], tmp_path / "student"))
    monkeypatch.setattr(generator, "open_student", lambda *_, **__: "opened")
    (student / "README.md").unlink()
    for name in ("results.json", "LICENSE", "samples/one.png", ".gitattributes", "transformer/.DS_Store"):
        (student / name).parent.mkdir(exist_ok=True)
        (student / name).write_text("mine")
    assert load_student(student) == "opened"
    (student / "tokenizer/added_tokens.json").write_text('{"cat": 3}')  # a tokenizer would read it
    with pytest.raises(UserError, match=r"cannot read '.*tokenizer/added_tokens\.json': it is not among the files that were exported"):
        load_student(student)


def test_a_manifest_changed_on_purpose_says_so(originals: dict[str, Path], tmp_path: Path) -> None:
    student = Path(shutil.copytree(originals["full"], tmp_path / "student"))
    record = json.loads((student / "fastgen.json").read_text())
    changed = record | {"guidance": 3.0}
    (student / "fastgen.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"fastgen\.json': .* the seal does not fit; export the student again, or set its key 'seal' to null"):
        load_student(student)
    (student / "fastgen.json").write_text(json.dumps(changed | {"seal": None}))
    assert load_student(student).guidance == 3.0
    (student / "fastgen.json").write_text(json.dumps({key: value for key, value in changed.items() if key != "seal"}))
    with pytest.raises(UserError, match="it has no seal"):
        load_student(student)


def test_an_adapter_is_not_put_on_another_teacher(originals: dict[str, Path]) -> None:
    file = originals["teacher"] / "scheduler/scheduler_config.json"
    content = file.read_text()
    load_student(originals["lora"])
    load_teacher_of(originals["full"])
    try:
        file.write_text(content.replace("3.0", "2.0"))
        for use in (lambda: load_student(originals["lora"]), lambda: load_teacher_of(originals["full"])):
            with pytest.raises(UserError, match=r"its teacher '.*/teacher' has changed since the student was trained"):
                use()
        load_student(originals["full"])  # it holds all it needs
    finally:
        file.write_text(content)


def test_a_student_that_teaches_is_checked_too(originals: dict[str, Path], tmp_path: Path) -> None:
    student = Path(shutil.copytree(originals["full"], tmp_path / "student"))
    load_teacher(student)
    flip(student / "vae/diffusion_pytorch_model.safetensors", 0.9)
    with pytest.raises(UserError, match=r"vae/\S+': it is not the file that was exported"):
        load_teacher(student)


SEEDS = list(range(20, 28))
PATHS: list[NoisingPath] = [Flow(), TrigFlow(), VariancePreserving(), VarianceExploding()]
SECOND = 0.15  # the student's second time, as a share of the path's range


class Recorded:
    """A predictor that remembers samples and times it was asked about."""

    def __init__(self, family: Toy) -> None:
        self.inner = Predictor(Denoiser(family.load_backbone(), family), family)
        self.path = family.path
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, kind: Kind = "x0", path: NoisingPath | None = None) -> Tensor:
        self.calls.append((x.clone(), t.clone()))
        return self.inner(x, t, cond, kind, path)


def gaussian(path: NoisingPath, **settings: Any) -> tuple[ImageGenerator, Recorded]:
    """The closed-form Gaussian with noise at its own scale."""
    family = Toy("toy:gaussian", path=path)
    predict = Recorded(family)
    return ImageGenerator(family, predict, **{"steps": 3, "grid": [1.0, SECOND, SECOND / 2]} | settings), predict


MEAN, COVARIANCE = torch.tensor([0.5, -0.3]).double(), torch.tensor([[0.49, 0.0], [0.0, 0.16]]).double()


def by_hand(path: NoisingPath, x: Tensor, times: list[float]) -> Tensor:
    """Euler steps of the ODE on Flow and VE, DDIM steps on the others, from the definitions, in float64."""
    schedule = oracle.SCHEDULES[type(path).__name__]
    for t, following in pairwise(times):
        now = torch.full((len(x),), t, dtype=torch.float64)
        if isinstance(path, Flow | VarianceExploding):
            x = x + (following - t) * oracle.gaussian_prediction("velocity", x, now, schedule, MEAN, COVARIANCE)
        else:
            x0, eps = (oracle.gaussian_prediction(kind, x, now, schedule, MEAN, COVARIANCE) for kind in ("x0", "eps"))
            x = schedule.noisy(x0, eps, torch.full_like(now, following))
    return x


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_the_student_starts_where_the_teachers_first_step_ends(path: NoisingPath, steps: int) -> None:
    (teacher, asked), (student, answered) = gaussian(path), gaussian(path)
    plain = student.latents([""] * 8, SEEDS)
    answered.calls.clear()
    result = student.with_first_step(teacher, steps).latents([""] * 8, SEEDS)

    scale = path.t_max if isinstance(path, VarianceExploding) else 1.0
    start = (noise_from_seeds(SEEDS, (2,)) * scale).double()
    times = [path.t_max * (1 - (1 - SECOND) * i / steps) for i in range(steps + 1)]
    assert torch.equal(asked.calls[0][0].double(), start)  # the same noise as without the teacher
    assert [t[0].item() for _, t in asked.calls] == pytest.approx(times[:-1], rel=1e-12)
    handed_over, _ = answered.calls[0]
    assert [t[0].item() for _, t in answered.calls] == [SECOND * path.t_max, SECOND / 2 * path.t_max]
    assert (handed_over - by_hand(path, start, times)).abs().max() <= 1e-6 * max(1, scale)
    expected = by_hand(path, handed_over.double(), [SECOND * path.t_max, SECOND / 2 * path.t_max])
    assert (answered.calls[1][0] - expected).abs().max() <= 1e-6 * max(1, scale)

    assert torch.equal(student.latents([""] * 8, SEEDS), plain)  # the student itself is as it was
    if steps == 1:
        assert (result - plain).abs().max() <= 1e-5  # this student is its teacher


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_many_steps_of_the_teacher_are_its_ode(path: NoisingPath) -> None:
    errors = []
    for steps in (50, 400):
        (teacher, asked), (student, answered) = gaussian(path), gaussian(path)
        student.with_first_step(teacher, steps).latents([""] * 8, SEEDS)
        assert len(asked.calls) == steps
        schedule = oracle.SCHEDULES[type(path).__name__]
        exact = oracle.gaussian_ode_map(asked.calls[0][0].double(), path.t_max, SECOND * path.t_max, schedule, MEAN, COVARIANCE)
        errors.append((answered.calls[0][0] - exact).abs().max().item())
    assert errors[1] < 5e-3
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.25)  # first order


def test_the_teachers_times_are_its_own_schedules(sd3_folder: Path) -> None:
    family = SD3(sd3_folder)
    assert family.shift == 3
    # Where the student's second time is a node of the teacher's grid, the teacher's times are the nodes down to it.
    for count, node in ((4, 2), (10, 7), (25, 1)):
        own = family.grid(count)
        assert (down_to(own[node].item(), node, shift=family.shift) - own[: node + 1]).abs().max() < 1e-6
    times = down_to(0.6, 3, shift=family.shift)
    assert times.tolist() == pytest.approx([1, 21 / 23, 15 / 19, 0.6], abs=1e-12)  # 3u/(1 + 2u) at u = 1, 7/9, 5/9, 1/3
    assert times[-1].item() == 0.6
    toy = Toy("toy:gaussian", path=VarianceExploding())
    assert down_to(20.0, 3, t_max=toy.path.t_max).tolist() == pytest.approx([80, 60, 40, 20])


def test_the_teacher_brings_its_guidance_and_the_student_its_grid(sd3_folder: Path, teacher: ImageGenerator) -> None:
    family = teacher.family
    student = load_teacher(sd3_folder, steps=2, guidance=1.0, max_sequence_length=TOKENS)
    for steps in (2, 3):  # the student's own number, and another with a grid of its own
        rest = [*family.grid(steps)[1:].tolist(), 0.0]
        x = noise_from_seeds([3, 4, 5], family.latent.shape)
        times = down_to(family.grid(steps)[1].item(), 2, shift=family.shift).tolist()
        with torch.no_grad():
            for t, following in pairwise(times):
                x = x + (following - t) * teacher.predict(x, torch.full((3,), t), teacher.conditioning(PROMPTS), "velocity")
            for t, following in pairwise(rest):
                x = x + (following - t) * student.predict(x, torch.full((3,), t), student.conditioning(PROMPTS), "velocity")
        assert (student.with_first_step(teacher, 2).latents(PROMPTS, [3, 4, 5], steps) - x).abs().max() < 1e-5
    other = student.with_first_step(student, 2).latents(PROMPTS, [3, 4, 5], steps)
    assert (other - x).abs().max() > 1e-3


def test_a_first_step_that_cannot_be_taken_is_refused(teacher: ImageGenerator) -> None:
    (gauss, _), (exploding, _) = gaussian(Flow()), gaussian(VarianceExploding())
    for steps in (0, -1):
        with pytest.raises(UserError, match=f"--first-step-from-teacher: the teacher takes 1 step or more, got {steps}"):
            gauss.with_first_step(gauss, steps)
    with pytest.raises(UserError, match=r"teacher has latents \(2,\) on VarianceExploding\(\), the student \(2,\) on Flow\(\)"):
        gauss.with_first_step(exploding, 1)
    with pytest.raises(UserError, match=r"the student \(2,\) on Flow"):
        gauss.with_first_step(teacher, 1)
    short, _ = gaussian(Flow(), steps=1, grid=None)
    both = short.with_first_step(gauss, 2)
    with pytest.raises(UserError, match=r"a student that takes 1 step .* --steps 2 or more"):
        both.latents([""], [0])
    assert both.latents([""], [0], 2).isfinite().all()


def test_load_teacher_of_a_student_follows_its_manifest(sd3_folder: Path, tmp_path: Path) -> None:
    family = SD3(sd3_folder, max_sequence_length=TOKENS, resolution=24)
    origin = {"pretrained": str(sd3_folder), "guidance": 4.0, "negative_prompt": NEGATIVE}
    folder = in_a_run(export_student(student_role(family), family, student_info(teacher=origin), tmp_path / "student"), sd3_folder)
    for guidance in (None, 1.5):
        found = load_teacher_of(folder, guidance=guidance)
        same = load_teacher(sd3_folder, guidance=guidance or 4.0, negative_prompt=NEGATIVE, max_sequence_length=TOKENS, resolution=24)
        assert (found(PROMPTS, [0, 1, 2], 2) - same(PROMPTS, [0, 1, 2], 2)).abs().max() <= 1e-5
        assert math.isclose(found.guidance, guidance or 4.0)
