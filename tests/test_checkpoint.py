"""Checkpoints: a restored run is the uninterrupted one bit for bit, and a damaged file is refused, not half loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from damage import flip, flipped
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_runs import optimizer_block, toy_method, toy_setting, toy_trainer, weights

from fastgen import checkpoint, fingerprints, tensor_files
from fastgen.config import OptimizerBlock
from fastgen.distillers.dmd2 import DMD2
from fastgen.errors import UserError
from fastgen.families.toy import Toy
from fastgen.fingerprints import file_hashes, sealed
from fastgen.group import Member
from fastgen.trainer import Trainer

RECIPE = {"distiller": {"name": "dmd2"}}
ADAM = optimizer_block(lr=1e-2, betas=(0.5, 0.9), schedule="cosine", warmup=2)


def dmd2(optimizer: OptimizerBlock = ADAM, **options: Any) -> Trainer:
    family = Toy("toy:mixture")
    method = toy_method(DMD2, toy_setting(family, steps=2), critic_updates=2)
    return toy_trainer(method, family, prompts=["", "1"], optimizers=optimizer, **{"steps": 6, **options})


def stop_at(trainer: Trainer, step: int) -> Trainer:
    trainer.run([], should_stop=lambda: trainer.step == step)
    return trainer


def moments(trainer: Trainer) -> dict[str, Tensor]:
    """Every optimizer tensor, by role, parameter and name."""
    return {
        f"{role}/{index}/{key}": value.clone()
        for role, optimizer in trainer.optimizers.items()
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if value is not None
    }


def assert_bitwise_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [key for key in a if not torch.equal(a[key], b[key])]


def record(path: Path, **keys: Any) -> None:
    """Make the files in a checkpoint those that its state.json knows; keys: what else that says."""
    state = checkpoint.read_state(path)
    files = file_hashes(path, sorted(file.name for file in path.glob("*.safetensors")))
    (path / "state.json").write_text(json.dumps(sealed({**state, "files": files, **keys})))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The checkpoint of a run stopped at step 3 of 6."""
    return checkpoint.save(tmp_path, stop_at(dmd2(), 3), RECIPE, keep=2)


@pytest.mark.parametrize(
    "optimizer",
    [ADAM, ADAM.model_copy(update={"name": "adam"}), ADAM.model_copy(update={"name": "sgd"}), optimizer_block(name="sgd", lr=0.1, betas=(0, 0))],
    ids=["adamw", "adam", "sgd with momentum", "sgd without"],
)
def test_a_restored_run_ends_as_the_uninterrupted_one(tmp_path: Path, optimizer: OptimizerBlock) -> None:
    whole = stop_at(dmd2(optimizer), 3)
    path = checkpoint.save(tmp_path, whole, RECIPE, keep=1)
    restored = dmd2(optimizer)
    checkpoint.load(path, restored)
    assert (restored.step, restored.seconds, restored.ema["student"].updates) == (3, whole.seconds, 3)
    assert_bitwise_equal(weights(restored), weights(whole))
    assert_bitwise_equal(moments(restored), moments(whole))
    for trainer in (whole, restored):
        trainer.run([])
    assert whole.step == restored.step == 6
    assert_bitwise_equal(weights(restored), weights(whole))
    assert_bitwise_equal(moments(restored), moments(whole))
    assert not torch.equal(weights(whole)["student/out.bias"], load_file(path / "role_student.safetensors")["out.bias"])


def test_saving_does_not_disturb_the_run(tmp_path: Path) -> None:
    saving, plain = dmd2(), dmd2()
    saving.run([lambda step, metrics: checkpoint.save(tmp_path, saving, RECIPE, keep=1) and None])
    plain.run([])
    assert_bitwise_equal(weights(saving), weights(plain))


def test_every_file_is_json_or_holds_the_tensors_of_the_run(tmp_path: Path) -> None:
    trainer = stop_at(dmd2(), 3)
    path = checkpoint.save(tmp_path, trainer, RECIPE, keep=2)
    roles, kinds = ("student", "fake_score"), ("role", "optimizer")
    assert {file.name for file in path.iterdir()} == {
        "state.json",
        "ema_student.safetensors",
        *(f"{k}_{r}.safetensors" for k in kinds for r in roles),
    }
    for role in roles:
        assert_bitwise_equal(load_file(path / f"role_{role}.safetensors"), trainer.roles[role].state_dict())
    assert_bitwise_equal(load_file(path / "ema_student.safetensors"), {**trainer.ema["student"].shadow, "updates": torch.tensor(3)})
    state = json.loads((path / "state.json").read_text())
    expected = {
        "format": 5,
        "step": 3,
        "seconds": trainer.seconds,
        "trained": ["student"],
        "pairs": None,
        "recipe": RECIPE,
        "inputs": {},
        "metrics": {},
    }
    expected["files"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.glob("*.safetensors")}
    assert state == expected | {"seal": state["seal"]}
    assert checkpoint.read_state(path) == expected


def test_the_oldest_are_deleted(tmp_path: Path) -> None:
    trainer = dmd2(steps=12)
    trainer.run([lambda step, metrics: checkpoint.save(tmp_path, trainer, RECIPE, keep=3) and None])
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_000010", "step_000011", "step_000012"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000010", "step_000011", "step_000012"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    trainer = stop_at(dmd2(), 3)
    first = checkpoint.save(tmp_path, trainer, RECIPE, keep=2)
    (first / "role_student.safetensors").write_bytes(b"old")
    assert checkpoint.save(tmp_path, trainer, RECIPE, keep=2) == first
    checkpoint.load(first, dmd2())


def test_a_half_written_folder_is_never_found(tmp_path: Path) -> None:
    run_dir, folder = tmp_path, tmp_path / "checkpoints"
    trainer = stop_at(dmd2(), 2)
    complete = checkpoint.save(folder, trainer, RECIPE, keep=2)
    (folder / ".partial_step_000003").mkdir()
    (folder / ".partial_step_000003" / "state.json").write_text("{")
    (folder / "step_000004").mkdir()  # without state.json
    assert checkpoint.checkpoints(folder) == [complete]
    assert checkpoint.latest(run_dir) == complete
    shutil.rmtree(folder / "step_000004")
    done = checkpoint.save(folder, stop_at(trainer, 3), RECIPE, keep=2)  # writes over what was left
    assert checkpoint.checkpoints(folder) == [complete, done]
    assert sorted(path.name for path in folder.iterdir()) == ["step_000002", "step_000003"]


def test_a_crash_while_writing_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, trainer = tmp_path / "checkpoints", stop_at(dmd2(), 2)
    earlier = checkpoint.save(folder, trainer, RECIPE, keep=1)

    def full_disk(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*step_000003': no space left on device"):
        checkpoint.save(folder, stop_at(trainer, 3), RECIPE, keep=1)
    assert checkpoint.latest(tmp_path) == earlier
    assert [path.name for path in folder.iterdir()] == ["step_000002"]
    checkpoint.load(earlier, dmd2())


def test_a_run_without_checkpoints_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.latest(tmp_path)


def test_another_format_is_refused(saved: Path) -> None:
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({**state, "format": 1}))
    with pytest.raises(UserError, match=r"has format 1; its random streams are .* older fastgen, .*; train again, or resume with fastgen 0\.1"):
        checkpoint.load(saved, dmd2())
    (saved / "state.json").write_text(json.dumps({**state, "format": 6}))
    with pytest.raises(UserError, match="has format 6; this version reads 5"):
        checkpoint.load(saved, dmd2())


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def misshapen(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.zeros(3, 5)})


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("role_student", without("layers.1.weight"), "role 'student' do not match"),
        ("role_fake_score", misshapen("layers.1.weight"), "role 'fake_score': layers.1.weight is (3, 5), not (64, 64)"),
        ("role_student", misshapen("extra"), "role 'student' do not match"),
        ("optimizer_student", without("layers.1.weight/exp_avg"), "optimizer of role 'student' does not match"),
        ("optimizer_student", misshapen("layers.1.weight/exp_avg_sq"), "optimizer of role 'student' does not match"),
        ("optimizer_fake_score", misshapen("layers.9.weight/exp_avg"), "optimizer of role 'fake_score'"),
        ("ema_student", without("out.bias"), "averaged weights"),
        ("ema_student", misshapen("out.bias"), "averaged weights"),
        ("ema_student", without("updates"), "averaged weights"),
    ],
)
def test_missing_and_misshapen_tensors_are_errors(saved: Path, file: str, damage: Any, message: str) -> None:
    path = saved / f"{file}.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    record(saved)  # as a checkpoint of other networks would
    with pytest.raises(UserError) as caught:
        checkpoint.load(saved, dmd2())
    assert message in str(caught.value)


def test_a_missing_file_is_an_error(saved: Path) -> None:
    (saved / "optimizer_fake_score.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*optimizer_fake_score\.safetensors"):
        checkpoint.load(saved, dmd2())


@pytest.mark.parametrize(
    ("file", "message"),
    [("state.json", "cannot read"), ("role_student.safetensors", "it is not the file that was saved")],
)
def test_a_broken_file_is_an_error(saved: Path, file: str, message: str) -> None:
    (saved / file).write_bytes(b"\xff" * 32)
    with pytest.raises(UserError, match=message):
        checkpoint.load(saved, dmd2())


@pytest.mark.parametrize("share", [0.0, 0.003, 0.5, 0.77, 1.0])
def test_one_flipped_bit_in_any_file_is_refused_before_anything_is_loaded(saved: Path, share: float) -> None:
    files = sorted(saved.iterdir())
    assert len(files) == 6
    for file in files:
        trainer = dmd2()
        before, content = weights(trainer), file.read_bytes()
        flip(file, share)
        with pytest.raises(UserError, match=rf"cannot read .*state\.json|{file.name}': it is not the file that was saved|has format"):
            checkpoint.load(saved, trainer)
        assert_bitwise_equal(weights(trainer), before)
        file.write_bytes(content)
    checkpoint.load(saved, dmd2())


def test_a_bit_anywhere_in_the_record_counts(saved: Path) -> None:
    file, content = saved / "state.json", (saved / "state.json").read_bytes()
    state = checkpoint.read_state(saved)
    for bit in range(0, 8 * len(content), 61):
        file.write_bytes(flipped(content, bit))
        try:
            assert checkpoint.read_state(saved) == state  # 1e-05 and 1E-05 are one number
        except UserError:
            continue


@pytest.mark.parametrize("kind", ["role", "optimizer"])
def test_swapped_files_of_two_roles_are_refused(saved: Path, kind: str) -> None:
    student, fake_score = (saved / f"{kind}_{role}.safetensors" for role in ("student", "fake_score"))
    student.rename(saved / "other")
    fake_score.rename(student)
    (saved / "other").rename(fake_score)
    with pytest.raises(UserError, match=rf"{kind}_fake_score.safetensors': it is not the file that was saved"):
        checkpoint.load(saved, dmd2())


@pytest.mark.parametrize("name", ["optimizer_student", "ema_student", "role_fake_score"])
def test_a_file_of_another_step_is_refused(tmp_path: Path, name: str) -> None:
    trainer = stop_at(dmd2(), 2)
    earlier = checkpoint.save(tmp_path, trainer, RECIPE, keep=2)
    later = checkpoint.save(tmp_path, stop_at(trainer, 3), RECIPE, keep=2)
    shutil.copy(earlier / f"{name}.safetensors", later / f"{name}.safetensors")
    with pytest.raises(UserError, match=rf"{name}.safetensors': it is not the file that was saved"):
        checkpoint.load(later, dmd2())
    checkpoint.load(earlier, dmd2())


def test_a_file_that_was_not_saved_is_refused(saved: Path) -> None:
    shutil.copy(saved / "role_student.safetensors", saved / "statistics.safetensors")
    with pytest.raises(UserError, match=r"statistics\.safetensors': it does not belong to this checkpoint"):
        checkpoint.load(saved, dmd2())


def test_processes_share_the_reading_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is read by one of them; what one finds all raise, and an older checkpoint is named as by a process alone."""
    trainer = stop_at(dmd2(), 2)
    checkpoint.save(tmp_path / "checkpoints", trainer, RECIPE, keep=2)
    path = checkpoint.save(tmp_path / "checkpoints", stop_at(trainer, 3), RECIPE, keep=2)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    read: list[list[str]] = []
    monkeypatch.setattr(fingerprints, "file_hashes", lambda folder, names: read.append(list(names)) or file_hashes(folder, names))

    def by_two() -> list[Any]:
        def opened(member: Member) -> Any:
            try:
                return checkpoint.opened(tmp_path, None, member)
            except UserError as error:
                return str(error)

        store = dist.HashStore()
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(opened, [Member(store, rank, 2) for rank in range(2)]))

    assert by_two() == [checkpoint.opened(tmp_path)] * 2
    assert sorted(read[:2]) == [files[::2], files[1::2]] and read[2:] == [files]
    for name in files:
        content = (path / name).read_bytes()
        flip(path / name, 0.7)
        with pytest.raises(UserError, match=rf"{name}': it is not the file .*the newest complete one is step_000002") as alone:
            checkpoint.opened(tmp_path)
        assert by_two() == [str(alone.value)] * 2
        (path / name).write_bytes(content)


def test_another_run_does_not_start_from_a_damaged_student(tmp_path: Path) -> None:
    path, other = checkpoint.save(tmp_path / "checkpoints", stop_at(dmd2(), 3), RECIPE, keep=2), dmd2()
    checkpoint.load_students(tmp_path, other.roles, ["student"])
    average = load_file(path / "ema_student.safetensors")
    assert_bitwise_equal({**other.roles["student"].state_dict(), "updates": torch.tensor(3)}, average)
    flip(path / "optimizer_student.safetensors", 0.9)  # nobody reads it
    checkpoint.load_students(tmp_path, other.roles, ["student"])
    flip(path / "ema_student.safetensors", 0.9)
    with pytest.raises(UserError, match=r"ema_student\.safetensors': it is not the file that was saved"):
        checkpoint.load_students(tmp_path, other.roles, ["student"])


def test_a_run_is_its_newest_checkpoint_wherever_it_lies(tmp_path: Path) -> None:
    trainer = stop_at(dmd2(), 2)
    checkpoint.save(tmp_path / "run/checkpoints", trainer, RECIPE, keep=2)
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    assert checkpoint.identity(tmp_path / "run") == checkpoint.identity(tmp_path / "moved")
    checkpoint.save(tmp_path / "run/checkpoints", stop_at(trainer, 3), RECIPE, keep=2)
    assert checkpoint.identity(tmp_path / "run") != checkpoint.identity(tmp_path / "moved")


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        (tmp_path / f"step_{step:06d}").mkdir()
        (tmp_path / f"step_{step:06d}" / "state.json").write_text("{}")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_999999", "step_1000000"]


def test_the_newest_whole_checkpoint_is_the_newest_by_number(tmp_path: Path) -> None:
    """Names alone would put a millionth step before the one that it follows."""
    first = checkpoint.save(tmp_path, stop_at(dmd2(), 2), RECIPE, keep=3)
    for step in (999_999, 1_000_000):
        shutil.copytree(first, tmp_path / f"step_{step:06d}")
    found = checkpoint.checkpoints(tmp_path)
    assert checkpoint.newest_whole(found) == tmp_path / "step_1000000"


def test_the_format_that_named_states_by_index_is_read(saved: Path) -> None:
    trainer, whole = dmd2(), dmd2()
    checkpoint.load(saved, whole)
    for role in ("student", "fake_score"):
        file, names = saved / f"optimizer_{role}.safetensors", list(trainer.roles[role].parameters())
        save_file({f"{names.index(name)}/{key}": value for flat, value in load_file(file).items() for name, key in [flat.rsplit("/")]}, file)
    record(saved, format=4)
    assert checkpoint.read_state(saved)["format"] == 4
    checkpoint.load(saved, trainer)
    assert_bitwise_equal(weights(trainer), weights(whole))
    assert_bitwise_equal(moments(trainer), moments(whole))
    assert (trainer.step, trainer.ema["student"].updates) == (3, 3)
