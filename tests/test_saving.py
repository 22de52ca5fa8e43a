"""Saving beside training: the checkpoint is of the moment it was asked for, and what goes wrong is said by the next one."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import RECIPE, assert_bitwise_equal, dmd2, moments, stop_at
from toy_runs import weights

from fastgen import checkpoint, tensor_files
from fastgen.errors import CannotWrite
from fastgen.saving import Saver

ASKED: Any = {"inputs": {}, "metrics": {}}


class Gate:
    """Writing files waits until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, whole = threading.Event(), tensor_files.save_file

        def wait(*given: Any) -> None:
            assert self.open.wait(60)
            whole(*given)

        monkeypatch.setattr(tensor_files, "save_file", wait)


def test_the_copies_do_not_see_what_training_does_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, gate = stop_at(dmd2(), 3), Gate(monkeypatch)
    then = weights(trainer), moments(trainer)
    with Saver(tmp_path, keep=1, beside=True) as saver:
        saver.save(trainer, RECIPE, **ASKED)
        stop_at(trainer, 5)
        assert checkpoint.checkpoints(tmp_path) == []
        gate.open.set()
    (path,) = checkpoint.checkpoints(tmp_path)
    checkpoint.load(path, restored := dmd2())
    assert restored.step == 3
    assert_bitwise_equal(weights(restored), then[0])
    assert_bitwise_equal(moments(restored), then[1])
    trainer.run([])
    restored.run([])
    assert_bitwise_equal(weights(restored), weights(trainer))


def test_one_is_written_at_a_time_and_the_oldest_deleted(tmp_path: Path) -> None:
    trainer = dmd2()
    with Saver(tmp_path, keep=2, beside=True) as saver:
        trainer.run([lambda step, metrics: saver.save(trainer, RECIPE, **ASKED)])
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_000005", "step_000006"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000005", "step_000006"]


@pytest.mark.parametrize("beside", [False, True])
def test_a_full_disk_ends_the_run_at_the_next_save_or_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_files, "save_file", full)
    trainer = stop_at(dmd2(), 2)
    said = r"^cannot write '[^']*step_000002': no space left on device; free some space and go on$"
    with pytest.raises(CannotWrite, match=said), Saver(tmp_path, keep=1, beside=beside) as saver:
        saver.save(trainer, RECIPE, **ASKED)
    assert list(tmp_path.iterdir()) == []
    if beside:
        with Saver(tmp_path, keep=1, beside=True) as saver:
            saver.save(trainer, RECIPE, **ASKED)
            with pytest.raises(CannotWrite, match=said):
                saver.save(stop_at(trainer, 3), RECIPE, **ASKED)


def test_what_ends_a_run_is_said_rather_than_what_ended_its_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)

    def end() -> None:
        with Saver(tmp_path, keep=1, beside=True) as saver:
            saver.save(stop_at(dmd2(), 2), RECIPE, **ASKED)
            gate.open.set()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        end()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_000002"]  # what was begun is finished
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("saving")]


def test_states_stay_on_their_own_device(tmp_path: Path) -> None:
    with Saver(tmp_path, keep=1, beside=True) as saver:
        saver.save(trainer := stop_at(dmd2(), 2), RECIPE, **ASKED)
    content = checkpoint.Content.of(trainer, RECIPE, apart=True)
    own = checkpoint.Content.of(trainer, RECIPE)
    for name, tensors in content.tensors.items():
        for key, value in tensors.items():
            assert torch.equal(value, own.tensors[name][key])
            assert value.data_ptr() != own.tensors[name][key].data_ptr() or not value.numel()
