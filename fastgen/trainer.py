"""The training loop: for each update a method asks for, for each micro-batch, for each term: compute, backward, free; then step.

It names no method and no pipeline family. Everything it does iterates over `roles` and over the method's updates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen import across, divergence
from fastgen.config import OptimizerBlock, TrainBlock
from fastgen.data.feed import feed
from fastgen.data.training import Batch, Data
from fastgen.distillers.base import Distiller, Term, Update
from fastgen.ema import EMA, Averages
from fastgen.errors import TrainingFailed
from fastgen.optimizers import make_optimizer, states_on
from fastgen.parallel import Strategy
from fastgen.rng import SampleRng
from fastgen.roles import Roles
from fastgen.shards import largest

Metrics = dict[str, float]

_CHECK_EVERY = 100  # steps between checks of all weights, which read them once


def lr_factor(block: OptimizerBlock, step: int, steps: int) -> float:
    """Share of the learning rate at `step` of `steps`: linear warm-up, then constant, linear or cosine decay to 0."""
    if step < block.warmup:
        return (step + 1) / block.warmup
    progress = (step - block.warmup) / max(1, steps - block.warmup)
    decays = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return decays[block.schedule]


@dataclass
class Trainer:
    """A run's moving parts. `step` counts finished student steps; `events` are called after each one with (step, metrics)."""

    distiller: Distiller
    roles: Roles
    data: Data
    optimizer_blocks: Mapping[str, OptimizerBlock]
    settings: TrainBlock
    parallel: Strategy

    def __post_init__(self) -> None:
        self.seconds = 0.0  # spent training, interruptions left out
        for role in self.roles.values():
            self.parallel.prepare(role)
        self.models = self.roles.predictors()
        self.parameters = {name: list(role.parameters().values()) for name, role in self.roles.trained.items()}
        self.begun = {name: largest(own) for name, own in self.parameters.items()}  # largest weights, by role
        self.optimizers = {name: make_optimizer(self.optimizer_blocks[name], own) for name, own in self.parameters.items()}
        averaged = {name: role for name, role in self.roles.items() if role.spec.averaged}
        self.ema = Averages({name: EMA(role.parameters(), self.settings.ema, self.settings.ema_device) for name, role in averaged.items()})
        self._fed: tuple[int, Data, Iterator[Batch]] | None = None  # the step that the batches are for, and what they are of
        self.move_to(0)

    def run(self, events: Sequence[Callable[[int, Metrics], None]], should_stop: Callable[[], bool] = lambda: False) -> None:
        """Train up to `settings.steps`, or until `should_stop()` after a step. TrainingFailed at the first non-finite number."""
        while self.step < self.settings.steps and not self.parallel.any(should_stop()):
            started = time.perf_counter()
            metrics = self.train_step()
            taken = time.perf_counter() - started
            self.seconds += taken
            if self.step % _CHECK_EVERY == 0 or self.step == self.settings.steps:
                self.check_weights()  # some methods' losses stay finite, even 0, whatever becomes of their network
            metrics |= {"seconds": self.seconds, "samples_per_second": self.settings.batch_size / taken}
            for event in events:
                event(self.step, metrics)

    def train_step(self) -> Metrics:
        """All updates of one student step, then the averages of the roles it trained. Metrics average over the updates that log a name."""
        sums: dict[str, list[float]] = {}
        updates, batches = self.distiller.updates(self.step), self._batches()
        for index, update in enumerate(updates):
            for name, value in self._update(update, index, batches).items():
                sums.setdefault(name, []).append(value)
        for name in self.ema.keys() & {name for update in updates for name in update.trains}:
            self.ema[name].update()
        self.distiller.take_together(self.step, self.parallel.gather)
        self.move_to(self.step + 1)
        self._fed = (self.step, self.data, batches)
        return {name: sum(values) / len(values) for name, values in sums.items()}

    def check_weights(self) -> None:
        """TrainingFailed where a trained role or its average has left its range, as it may in an optimizer step with a finite gradient: due
        before what these weights are kept or drawn for, because it reads them all."""
        if found := divergence.unsound(self.roles.trained, self.begun) or divergence.unsound_average(self.ema):
            raise TrainingFailed(f"after step {self.step}: {found.reason}", role=found.role)

    def move_to(self, step: int) -> None:
        """Stand after `step` student steps, and free what no later one uses: the optimizers of roles whose training is over, and roles that
        are not needed any more. A run that is over keeps what its last step had."""
        self.step, ahead = step, min(step, self.settings.steps - 1)
        for name in [name for name in self.optimizers if ahead >= sum(self._span(name))]:
            del self.optimizers[name], self.parameters[name]
        for name in [name for name in self.roles if not self.distiller.needed(name, ahead)]:
            self.release(name)

    def release(self, name: str) -> None:
        """Free a role that no step asks, and what trained it."""
        self.roles.release(name)
        del self.models[name]
        self.optimizers.pop(name, None)
        self.parameters.pop(name, None)

    def _span(self, name: str) -> tuple[int, int]:
        """(first, count) of the student steps in which a role trains."""
        return self.distiller.span(name) or (0, self.settings.steps)

    def _batches(self) -> Iterator[Batch]:
        """The batches from this step on, in the order of its updates and their micro-batches."""
        fed, self._fed = self._fed, None
        if fed is not None and fed[0] == self.step and fed[1] is self.data:
            return fed[2]
        steps = range(self.step, max(self.settings.steps, self.step + 1))
        return feed(self.data, (rng.at("data") for step in steps for rng in self._samples_of(step)))

    def _samples_of(self, step: int) -> list[SampleRng]:
        """The samples of each micro-batch of each of a step's updates."""
        return [rng for index in range(len(self.distiller.updates(step))) for rng in self._micro_batches(step, index)]

    def _micro_batches(self, step: int, index: int) -> list[SampleRng]:
        ids = self.parallel.share(self.settings.batch_size)
        size = self.settings.micro_batch or len(ids)
        return [SampleRng(self.settings.seed, (step, index), ids[start : start + size], self.parallel.device) for start in range(0, len(ids), size)]

    def _update(self, update: Update, index: int, batches: Iterator[Batch]) -> Metrics:
        for name in update.settles:
            self.ema[name].settle()
        for blend in update.blends:
            self.roles[blend.target].blend(self.roles[blend.source], blend.weight)
        with self.roles.training(update.trains, update.only):
            metrics = self._backward(update, index, batches)
            for name in update.trains:
                metrics |= self._optimizer_step(name, update)
                self.roles[name].denoiser.after_step(self.parallel.mean)
        return metrics

    def _backward(self, update: Update, index: int, batches: Iterator[Batch]) -> Metrics:
        """Accumulate gradients of all terms over all micro-batches; each term's graph is freed before the next is built."""
        logs: dict[str, _Mean] = {}
        micro_batches = self._micro_batches(self.step, index)
        count = sum(len(rng.ids) for rng in micro_batches)
        modules = [self.roles[name].module for name in update.trains]
        for m, rng in enumerate(micro_batches):
            batch, share = next(batches), len(rng.ids) / count
            for k, term in enumerate(update.terms):
                with across.parts(self.parallel.total, self._parts):
                    loss = term(self.models, batch, rng.at(term.__name__), self.step)
                own = {name: taken for name in update.trains if (taken := self.models[name].take_auxiliary()) is not None}
                value = sum((auxiliary.value for auxiliary in own.values()), loss.value)
                self._check_finite(value, term, update, batch)
                last = m == len(micro_batches) - 1 and k == len(update.terms) - 1
                with self.parallel.gradients(modules, synchronise=last):
                    (value * share).backward()
                found = {f"loss/{term.__name__}": loss.value, **{f"{term.__name__}/{n}": v for n, v in loss.logs.items()}}
                found |= {f"experts/{name}/{n}": v for name, auxiliary in own.items() for n, v in auxiliary.logs.items()}
                for name, number in found.items():
                    logs.setdefault(name, _Mean()).add(number.detach(), batch.size)
        self.parallel.reduce(parameter for name in update.trains for parameter in self.parameters[name])
        sums = torch.stack([number for mean in logs.values() for number in mean.sums(self.parallel.device)]).view(-1, 2)
        totals, counts = self.parallel.total(sums).unbind(1)
        means = dict(zip(logs, (totals / counts).tolist(), strict=True))
        return {name: value for name, value in means.items() if not math.isnan(value)}

    @property
    def _parts(self) -> int:
        """In how many parts, one a process, lie the samples that one process would take at once."""
        return 1 if self.settings.micro_batch else self.parallel.world_size

    def _check_finite(self, value: Tensor, term: Term, update: Update, batch: Batch) -> None:
        """TrainingFailed, on every process, where a term's loss is not finite on some process."""
        own = None
        if not bool(torch.isfinite(value)):
            trained = " and ".join(repr(name) for name in update.trains)
            own = f"the loss of term {term.__name__!r}, which trains role {trained}, is {value.item()}"
        if (found := self.parallel.first(own)) is not None:
            raise self._failed(found, batch)

    def _optimizer_step(self, name: str, update: Update) -> Metrics:
        block, optimizer = self.optimizer_blocks[name], self.optimizers[name]
        norm = self.parallel.clip_gradients(self.parameters[name], block.clip).item()
        if not math.isfinite(norm):
            terms = " and ".join(repr(term.__name__) for term in update.terms)
            raise self._failed(f"the gradient norm of role {name!r}, from term {terms}, is {norm}")
        first, steps = self._span(name)
        lr = block.lr * lr_factor(block, self.step - first, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with states_on(optimizer, self.parallel.device) if self.settings.offload_optimizers else nullcontext():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {f"grad_norm/{name}": norm, f"lr/{name}": lr}

    def _failed(self, what: str, batch: Batch | None = None) -> TrainingFailed:
        inputs = {} if batch is None else divergence.inputs_of(batch, self.distiller.setting.negative)
        found = self.parallel.first(divergence.of_inputs(inputs)) or divergence.diagnose(self.roles, self.begun)
        return TrainingFailed(f"step {self.step}: {what}; {found.reason}", role=found.role)


@dataclass
class _Mean:
    """Mean over samples of what micro-batches log: scalars stand for all their samples, vectors have one value each, NaN for none."""

    total: Tensor | float = 0.0
    count: Tensor | float = 0.0

    def add(self, value: Tensor, size: int) -> None:
        known = ~value.isnan()
        weight = size / value.numel()
        self.total = self.total + weight * value.nan_to_num().double().sum()
        self.count = self.count + weight * known.sum()

    def sums(self, device: torch.device) -> list[Tensor]:
        """Sum and number, fp64, on `device`."""
        return [torch.as_tensor(number, dtype=torch.float64, device=device) for number in (self.total, self.count)]
