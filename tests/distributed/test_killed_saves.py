"""Two processes (gloo, CPU) that save together: one of them is killed, or finds its disk full. Run with `pytest -m distributed`.

Processes are forked, which is cheap, and so take no backward pass.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from damage import flip
from run_cases import kept, toy
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_runs import CPU

from fastgen import checkpoint, fingerprints, tensor_files
from fastgen.distillers.dmd2 import DMD2
from fastgen.errors import UserError
from fastgen.parallel import Replicas, SingleProcess, Strategy
from fastgen.saving import Saver
from fastgen.trainer import Trainer

pytestmark = pytest.mark.distributed


def trainer_on(strategy: Strategy) -> Trainer:
    return toy(DMD2, strategy, critic_updates=1)


def step(trainer: Trainer) -> dict[str, Tensor]:
    """What one step leaves, of gradients that need no backward pass."""
    for name, optimizer in trainer.optimizers.items():
        for parameter in trainer.parameters[name]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    trainer.ema["student"].update()
    trainer.move_to(trainer.step + 1)
    return {name: value.contiguous() for name, value in kept(trainer).items()}


def counted(moment: int) -> None:
    """Kill this process when it comes for the `moment`th time to write a file, to put one on disk, or to rename one."""
    left = moment

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **options)

        return call

    tensor_files.save_file = before(tensor_files.save_file)  # type: ignore[attr-defined]
    os.fsync, os.replace = before(os.fsync), before(os.replace)


def killed(rank: int, folder: Path, victim: int, moment: int, beside: bool) -> None:
    trainer = trainer_on(Replicas(CPU))
    with Saver(folder / "checkpoints", keep=1, beside=beside, timeout=20) as saver:
        for number in (1, 2):
            state = step(trainer)
            if rank == 0:
                save_file(state, folder / f"expected_{number}.safetensors")
            if number == 2:
                saver.wait()
                dist.barrier()
                if rank == victim:
                    counted(moment)
            saver.save(trainer, {}, inputs={}, metrics={})


def full(rank: int, folder: Path) -> None:
    """The second file of one process finds no room; then there is some."""
    trainer, written = trainer_on(Replicas(CPU)), []
    whole = tensor_files.save_file

    def no_room(tensors: Any, path: Path, metadata: Any) -> None:
        written.append(path)
        if rank == 1 and len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(tensors, path, metadata)

    for beside in (False, True):
        written.clear()
        with Saver(folder / "checkpoints", keep=1, beside=beside, timeout=20) as saver:
            step(trainer)
            tensor_files.save_file = no_room  # type: ignore[attr-defined]
            try:
                saver.save(trainer, {}, inputs={}, metrics={})
                saver.wait()
                said = "nothing"
            except UserError as error:
                said = str(error)
            dist.barrier()
            left = sorted(path.name for path in (folder / "checkpoints").iterdir())
            dist.barrier()
            tensor_files.save_file = whole  # type: ignore[attr-defined]
            saver.save(trainer, {}, inputs={}, metrics={})
        (folder / f"said_{rank}_{beside}").write_text(f"{said}\n{left}", encoding="utf-8")


def process(rank: int, work: Callable[..., None], folder: Path, given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    work(rank, folder, *given)
    os._exit(0)  # a forked interpreter would end pytest's session too


def two(work: Callable[..., None], folder: Path, *given: Any) -> list[int | None]:
    """Exit codes of two processes."""
    folder.mkdir()
    context = mp.get_context("fork")
    running = [context.Process(target=process, args=(rank, work, folder, given)) for rank in (0, 1)]
    for each in running:
        each.start()
    for each in running:
        each.join()
    return [each.exitcode for each in running]


def assert_usable(folder: Path, numbers: tuple[int, ...]) -> int:
    """A run goes on from what is there, which is the whole of one of these steps; which."""
    checkpoint.recover_all(folder / "checkpoints")
    assert not [path for path in (folder / "checkpoints").iterdir() if not path.name.startswith("step_")]
    chosen, state = checkpoint.opened(folder)
    assert state["step"] in numbers
    trainer = trainer_on(SingleProcess(CPU))
    checkpoint.load(chosen, trainer, state)
    found, expected = kept(trainer), load_file(folder / f"expected_{state['step']}.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())
    return state["step"]


@pytest.mark.parametrize("beside", [False, True], ids=["in between", "beside"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path: Path, victim: int, beside: bool) -> None:
    found: list[int] = []
    for moment in range(1, 30, 3 if victim == 0 else 4):
        folder = tmp_path / str(moment)
        codes = two(killed, folder, victim, moment, beside)
        if codes == [0, 0]:  # there are fewer such moments in a save
            assert assert_usable(folder, (2,)) == 2
            break
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] != 0
        found.append(assert_usable(folder, (1, 2)))
    else:
        pytest.fail("the last moment was not reached")
    assert found == sorted(found) and len(found) >= 3 and found[0] == 1


def test_a_full_disk_of_one_process_is_one_line_on_all(tmp_path: Path) -> None:
    assert two(full, tmp_path / "run") == [0, 0]
    for number, beside in ((1, False), (2, True)):
        said = {(tmp_path / f"run/said_{rank}_{beside}").read_text(encoding="utf-8") for rank in (0, 1)}
        target, before = tmp_path / f"run/checkpoints/step_00000{number}", ["step_000001"] if beside else []
        assert said == {f"cannot write '{target}': no space left on device; free some space and go on\n{before}"}
    assert checkpoint.opened(tmp_path / "run")[1]["step"] == 2


def test_a_bit_in_any_processes_file_is_one_line(tmp_path: Path) -> None:
    assert two(killed, tmp_path / "run", 0, 10**6, False) == [0, 0]
    path = checkpoint.latest(tmp_path / "run")
    files = sorted(path.glob("*.safetensors"))
    assert len(files) == 10 and len(fingerprints.file_hashes(path, [file.name for file in files])) == 10
    for file in files:
        content = file.read_bytes()
        flip(file, 0.7)
        with pytest.raises(UserError, match=rf"^cannot read '{file}': it is not the file that was saved, but damaged or another [^\n]*$"):
            checkpoint.opened(tmp_path / "run")
        file.unlink()
        with pytest.raises(UserError, match=rf"^cannot read '{file}': [^\n]*; no other checkpoint is complete"):
            checkpoint.opened(tmp_path / "run")
        file.write_bytes(content)
    checkpoint.opened(tmp_path / "run")
