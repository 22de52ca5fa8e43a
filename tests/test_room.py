"""`fastgen plan`: what it says a run needs is what training really holds, and the changes that it proposes make a run fit."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Iterable
from typing import Any

import pytest
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgen import cli, room
from fastgen.config import Recipe
from fastgen.data.rows import Held
from fastgen.errors import UserError
from fastgen.plan import plan
from fastgen.progress import Progress
from fastgen.room import CHANGES, answer, bytes_of, changes_that_fit, need
from fastgen.run.building import build
from fastgen.trainer import Trainer


class Storages(TorchDispatchMode):
    """The most bytes of storages made inside that live at one time."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.most = self.now = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, storage.nbytes())
        return result

    def forget(self, size: int) -> None:
        self.now -= size


def standing(trainer: Trainer) -> list[Tensor]:
    """What a run keeps between steps, each storage once."""
    found = [tensor for role in trainer.roles.values() for tensor in (*role.denoiser.parameters(), *role.denoiser.buffers())]
    found += [value for optimizer in trainer.optimizers.values() for state in optimizer.state.values() for value in state.values()]
    found += [shadow for average in trainer.ema.values() for shadow in average.shadow.values()]
    found += [
        tensor for rows in (trainer.data.parts[0].cond, trainer.data.parts[0].latents) if isinstance(rows, Held) for tensor in rows.tensors.values()
    ]
    return list({tensor.untyped_storage().data_ptr(): tensor for tensor in found}.values())


def measured(recipe: Recipe) -> int:
    """The peak of a later training step."""
    trainer = build(plan(recipe, only="train"), Progress()).trainer
    for _ in range(2):
        trainer.train_step()
    kept = standing(trainer)
    with Storages(kept) as storages:
        trainer.train_step()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept) + storages.most


LORA = "student.tune={lora: {rank: 8}}"


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("digits_dmd2_1step", []),
        ("digits_dmd2_1step", ["train.micro_batch=16"]),
        ("digits_dmd2_1step", [LORA]),
        ("digits_dmd2_1step", [LORA, "teacher.quantise=int8", "train.precision=bf16"]),
        ("digits_dmd2_1step", [LORA, "teacher.dtype=bf16"]),
        ("digits_dmd2_1step", ["train.precision=bf16"]),
        ("digits_dmd2_1step", ["train.checkpointing=true"]),
        ("digits_scm_2step", []),
        ("digits_scm_2step", [LORA, "train.precision=bf16"]),
        ("digits_rcm_2step", ["train.micro_batch=32"]),
        ("digits_phased_dmd_4step", []),
        ("digits_dmd2_gan_1step", []),
        ("scenes_dmd2_4step", []),
    ],
)
def test_training_holds_what_the_plan_says(name: str, keys: list[str]) -> None:
    recipe = Recipe.load(name, [*keys, "train.device=cpu", "evaluate.protocol=null"])
    said = need(plan(recipe, only="train")).stages["training"]
    assert said == pytest.approx(measured(recipe), rel=0.15)


def test_the_changes_are_tried_in_order_until_the_run_fits() -> None:
    recipe = Recipe.load("digits_dmd2_1step")
    now = need(plan(recipe, dry=True))
    whole = now.peak
    made, fits = changes_that_fit(recipe, now, whole // 3)
    assert fits and made and made[-1][2].peak <= whole // 3
    assert [CHANGES.index(change) for change, _, _ in made] == sorted(CHANGES.index(change) for change, _, _ in made)
    peaks = [whole, *(after.peak for _, _, after in made)]
    assert all(later < earlier for earlier, later in itertools.pairwise(peaks))
    together = [key for _, keys, _ in made for key in keys]
    assert need(plan(Recipe.load("digits_dmd2_1step", together), dry=True)).peak == made[-1][2].peak


def test_the_command_says_what_fits_and_what_would(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["plan", "digits_dmd2_1step", "--memory", "24GB"]) == 0
    assert "\nfits into 24.00 GB\n" in capsys.readouterr().out
    assert cli.main(["plan", "digits_dmd2_1step", "--memory", "60MB"]) == 1
    said = capsys.readouterr().out
    assert "\ndoes not fit into 60.00 MB\n" in said, said and "\n  train.checkpointing=true " in said
    answers = list[dict[str, Any]]()
    monkeypatch.setattr(room, "answer", lambda *asked, **more: answers.append(answer(*asked, **more)) or answers[-1])
    # A batch of two has one smaller one: each change takes a training step on tensors without content, some seconds.
    assert cli.main(["plan", "digits_dmd2_1step", "train.batch_size=2", "--memory", "1MB", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False and found["fits_with_changes"] is False and found["peak"] == max(found["stages"].values())
    assert [found] == answers and len(found["changes"]) > 4


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("80 GiB", 80 * 2**30), ("1.5m", 1_500_000), ("4096", 4096)])
def test_sizes(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-3GB", "0", "24 GBs", "1e9"])
def test_what_is_no_size_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^--memory: .* is no size such as 24GB or 80GiB$"):
        bytes_of(text)
