"""The processes that a launcher (torchrun, accelerate launch --multi_gpu) started for one run: how they meet, wait for one another, and end.

They share a store of small texts, which the launcher or rank 0 keeps. Each process's thread writes a heartbeat there, and reads that of the next
rank: so a process that is stopped is named within `train.timeout`, one that has been killed on the watcher's own machine within seconds, while one
that works alone for hours is not. A failure is written there too: rank 0 prints it, once, and all end. Where rank 0 cannot, the first to notice does.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastgen import living
from fastgen.errors import CannotWrite, NotFinite, ProcessLost, TrainingFailed, UserError, one_line, shown

T = TypeVar("T")

BEAT = 1.0  # seconds between heartbeats, less where the timeout is short
_GRACE = 5.0  # seconds for rank 0 to print what another process has to say, or for a process to come out by itself
_KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (UserError, CannotWrite, NotFinite, TrainingFailed, ProcessLost)}


def launched() -> int:
    """How many processes run this, 1 without a launcher. UserError where the environment says nonsense."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise UserError(f"the environment says WORLD_SIZE={shown(text, 40)}, which is no number of processes; unset it, or use a launcher")
    return int(text)


def left_alone() -> list[str]:
    """What to say where a launcher was asked for several processes and started one: `accelerate launch --cpu --num_processes 2`, which gives it an
    address to meet others at and no number of them (accelerate 1.x)."""
    environment = os.environ
    if "WORLD_SIZE" in environment or "MASTER_ADDR" not in environment or environment.get("ACCELERATE_USE_CPU", "").lower() != "true":
        return []
    return ["accelerate launch started one process, as it does on CPUs whatever its --num_processes: torchrun --nproc-per-node N starts several"]


class Alone:
    """The only process of a run."""

    rank, world_size = 0, 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def lone(self, work: Callable[[], T]) -> T | None:
        """Rank 0 does it while the others wait, as long as it is alive; its result there, None elsewhere. Where it fails, all do."""
        return work()

    def told(self, work: Callable[[], T]) -> T:
        """The same for a result that is JSON: everywhere."""
        return work()

    def together(self) -> None:
        """Wait until every process has come here, as long as all are alive."""

    def same(self, what: Mapping[str, str]) -> None:
        """UserError where processes have other values by the same names: of the processes the first that differs, and of the names the first."""

    def gather(self, own: T) -> list[T]:
        """What each process has, in the order of ranks. Any object of ours; the processes have `join`ed."""
        return [own]

    def each(self, own: T) -> list[T]:
        """The same for what is JSON, and small: they need not have `join`ed."""
        return [own]

    def in_turn(self, own: list[T]) -> list[T]:
        """Of a list that processes share by dealing it out, `all[rank::world_size]` to each, what each has made of its items: in the list's order."""
        each = self.gather(own)
        return [each[i % len(each)][i // len(each)] for i in range(sum(map(len, each)))]


class Member(Alone):
    """This process among the others. store: what all of them read and write."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.timeout = 1800.0
        self._is_printer = False
        self._has_left = False
        self._lock = threading.Lock()  # whoever of the threads has it ends the process
        self._lost: set[int] = set()
        self._heard = time.monotonic()  # from the store
        self._calls = 0
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """Begin to write heartbeats, and to watch the next rank's."""
        self.store.set(f"where/{self.rank}", json.dumps([living.space(), os.getpid()]))
        self._thread = threading.Thread(target=self._watch, name="heartbeats", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch_store, name="store", daemon=True).start()

    def lone(self, work: Callable[[], T]) -> T | None:
        self._calls += 1
        if self.rank == 0:
            result = work()
            self.store.set(f"lone/{self._calls}", "done")
            return result
        self.wait([f"lone/{self._calls}"])
        return None

    def told(self, work: Callable[[], T]) -> T:
        self._calls += 1
        if self.rank == 0:
            result = work()
            self.store.set(f"told/{self._calls}", json.dumps(result))
            return result
        self.wait([f"told/{self._calls}"])
        return json.loads(self.store.get(f"told/{self._calls}"))

    def together(self) -> None:
        self._calls += 1
        self.store.set(f"here/{self._calls}/{self.rank}", "")
        self.wait([f"here/{self._calls}/{rank}" for rank in range(self.world_size)])

    def same(self, what: Mapping[str, str]) -> None:
        (_, first), *others = self.each((socket.gethostname(), dict(what)))
        for rank, (host, theirs) in enumerate(others, 1):
            for name in [*first, *(theirs.keys() - first.keys())]:
                if first.get(name) != theirs.get(name):
                    raise UserError(f"process {rank} on {host} has another {name}: {theirs.get(name)}, but process 0 has {first.get(name)}")

    def gather(self, own: T) -> list[T]:
        each: list[Any] = [None] * self.world_size
        dist.all_gather_object(each, own)
        return each

    def each(self, own: T) -> list[T]:
        self._calls += 1
        keys = [f"each/{self._calls}/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], json.dumps(own))
        self.wait(keys)
        return [json.loads(self.store.get(key)) for key in keys]

    def wait(self, keys: list[str]) -> None:
        """Until the store has them all. What another process failed with is raised here."""
        pause = 0.002
        while not self.store.check(keys):
            if self.store.check(["failed"]):
                raise self.elsewhere()
            time.sleep(pause)
            pause = min(pause * 1.5, 0.2)

    def elsewhere(self) -> Exception:
        """What the process failed with that was first to say so."""
        found = json.loads(self.store.get("failed"))
        kind, message = found["kind"], found["message"]
        message = message if kind in _KINDS else f"{kind}: {message}"
        return _KINDS.get(kind, ProcessLost)(message if kind == "ProcessLost" or found["of"] == self.rank else f"{found['who']}: {message}")

    def fail(self, error: BaseException) -> None:
        """Say what this process ends with, unless another has before, and have rank 0 print it."""
        if not self._lock.acquire(blocking=False):
            time.sleep(2 * _GRACE)  # the other thread ends the process, and is saying why
        if not self._has_left:
            self._ending.set()
            self._report(type(error).__name__, str(error), self.rank)
        if self.rank and not self._within(_GRACE, lambda: self.store.check(["printed"])):
            self._is_printer = self._claims()
        if not self.prints:
            self.leave()

    @property
    def prints(self) -> bool:
        """Whether this process says what all end with."""
        return self.rank == 0 or self._is_printer

    def said(self) -> None:
        """What all end with has been printed, if this process prints."""
        if self.prints:
            with suppress(Exception):  # the store may have gone
                self.store.set("printed", "")
            self.leave()

    def part(self) -> None:
        """End well, once all have come so far."""
        self.together()
        if dist.is_initialized():
            dist.destroy_process_group()
        self.leave()

    def leave(self) -> None:
        """Ask the store nothing from here on. Rank 0, which may keep it, leaves last; nobody misses a heartbeat."""
        if self._has_left:
            return
        self._has_left = True
        self._ending.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_GRACE)
        with suppress(Exception):
            self.store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                keys = [f"left/{rank}" for rank in range(self.world_size) if rank not in self._lost]
                self._within(_GRACE, lambda: self.store.check(keys))

    def silent(self, seconds: float) -> list[int] | None:
        """The processes that give no sign for so long; None where one says what it failed with meanwhile."""
        before = self._beats()
        if self._within(seconds, lambda: self.store.check(["failed"])):
            return None
        now = self._beats()
        return [rank for rank in now if rank != self.rank and now[rank] == before.get(rank)]

    def _beats(self) -> dict[int, bytes]:
        with suppress(Exception):
            keys = {rank: f"beat/{rank}" for rank in range(self.world_size)}
            return {rank: self.store.get(key) for rank, key in keys.items() if self.store.check([key])}
        return {}

    def _claims(self) -> bool:
        with suppress(Exception):
            return self.store.add("printer", 1) == 1
        return self.rank == min(1, self.world_size - 1)

    def _report(self, kind: str, message: str, of: int) -> None:
        found = {"kind": kind, "message": message, "of": of, "who": f"process {of} on {socket.gethostname()}"}
        with suppress(Exception):
            if self.store.add("failures", 1) == 1:
                self.store.set("failed", json.dumps(found))
            self._within(1.0, lambda: self.store.check(["failed"]))

    def _within(self, seconds: float, condition: Callable[[], bool]) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if condition():
                    return True
            except Exception:
                return False
            time.sleep(0.02)
        return False

    def _watch(self) -> None:
        """The thread: beats, watches the next rank, and ends this process where it hangs while another has failed."""
        watched, beats = (self.rank + 1) % self.world_size, 0
        store, seen, since = self.store.clone(), b"", time.monotonic()
        while not self._ending.wait(min(BEAT, self.timeout / 8)):
            try:
                beats += 1
                store.set(f"beat/{self.rank}", str(beats))
                if store.check(["failed"]):
                    self._end(self.elsewhere())
                    return
                self._heard = time.monotonic()
                now = store.get(f"beat/{watched}") if store.check([f"beat/{watched}"]) else b""
                seen, since = (now, time.monotonic()) if now != seen else (seen, since)
                silent = time.monotonic() - since
                ended = silent > 3 * BEAT and self._has_ended(store, watched)
                if (ended or silent > 0.75 * self.timeout) and not store.check([f"left/{watched}"]):
                    said = f"process {watched} has ended without a word, killed perhaps"
                    if not ended:
                        timeout = f"(train.timeout: {self.timeout:g})"
                        said = f"process {watched} has given no sign for {silent:.0f} seconds {timeout}: stopped, or its machine is"
                    self._lost.add(watched)
                    self._report("ProcessLost", said, self.rank)
                    self._end(ProcessLost(said))
                    return
            except Exception as error:
                if not self._ending.wait(_GRACE):
                    self._end(ProcessLost(f"the process that keeps the launcher's store has ended ({one_line(str(error), 80)})"))
                return

    def _has_ended(self, store: Any, rank: int) -> bool:
        """Whether a process is known to be no more, rather than stopped: one of this machine is looked for."""
        if not store.check([f"where/{rank}"]):
            return False
        space, number = json.loads(store.get(f"where/{rank}"))
        return bool(space) and space == living.space() and not living.runs(number)

    def _watch_store(self) -> None:
        """The other thread: a store whose keeper is stopped does not answer at all, and who asks it waits for good."""
        while not self._ending.wait(min(BEAT, self.timeout / 8)):
            silent = time.monotonic() - self._heard
            if silent > 0.9 * self.timeout and self._lock.acquire(blocking=False):
                if self.rank == min(1, self.world_size - 1):
                    said = f"the process that keeps the launcher's store, rank 0 perhaps, has given no sign for {silent:.0f} seconds"
                    print(f"error: {said} (train.timeout: {self.timeout:g})", file=sys.stderr, flush=True)
                os._exit(1)

    def _end(self, error: Exception) -> None:
        """End a process whose main thread waits for others that will not come. It may come out by itself: then this is not needed."""
        if self._ending.wait(1.0) or not self._lock.acquire(blocking=False):
            return
        is_printed = self.rank and self._within(_GRACE, lambda: self.store.check(["printed"]))
        self._is_printer = not is_printed and (self.rank == 0 or self._claims())
        if self._is_printer:
            with suppress(Exception):
                print(f"error: {one_line(str(error))}", file=sys.stderr, flush=True)
            self.said()
        self.leave()
        os._exit(status_of(error))


_member: Member | None = None


def status_of(error: BaseException) -> int:
    """The exit status that the command line has for it."""
    return 2 if isinstance(error, UserError) else 1


def current() -> Alone:
    """This process among those of its group; without heartbeats where collectives were begun by another than `join`."""
    global _member
    if _member is None and not (dist.is_available() and dist.is_initialized()):
        return Alone()
    if _member is None:
        _member = Member(dist.PrefixStore("fastgen", dist.distributed_c10d._get_default_store()), dist.get_rank(), dist.get_world_size())
    return _member


@contextmanager
def joined() -> Iterator[Alone]:
    """Meet the launcher's other processes, if there are any. Whatever ends one inside ends all, and is raised on each; what has `everywhere` set
    is raised by all at once as it is."""
    global _member
    if launched() == 1 or _member is not None:
        yield current()
        return
    _member = met()
    try:
        _member.beat()
        yield _member
        _member.part()
    except BaseException as error:
        if getattr(error, "everywhere", False):
            _member.part()
            raise
        cause = _cause(_member, error)
        _member.fail(cause)
        if cause is error:
            raise
        raise cause from None


def met() -> Member:
    """The member that a launcher's environment describes."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"the environment says WORLD_SIZE={launched()} but not {', '.join(missing)}; start fastgen with torchrun or accelerate launch"
        )
    store, own, count = next(iter(dist.rendezvous("env://")))
    return Member(dist.PrefixStore("fastgen", store), own, count)


def _cause(member: Member, error: BaseException) -> BaseException:
    """Why this process ends: what another failed with, where this one only found it gone."""
    gone = isinstance(error, RuntimeError) and not isinstance(error, TrainingFailed) and _is_of_a_collective(error)
    if not gone:
        return error
    lost = member.silent(3 * BEAT)
    if lost is None:
        return member.elsewhere()
    who = f"process {lost[0]} has" if len(lost) == 1 else "another process has" if not lost else f"processes {', '.join(map(str, lost))} have"
    return ProcessLost(f"{who} ended without a word, killed perhaps")


def _is_of_a_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "Gloo", "NCCL", "Connection closed by peer"))


def join(device: torch.device, timeout: float) -> None:
    """Have collectives among the processes that have met, once; timeout: seconds after which one that some process does not come to fails."""
    global _member
    if dist.is_initialized():
        return
    me = _member = _member or met()
    me.timeout = float(timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("collectives", me.store), rank=me.rank, world_size=me.world_size, timeout=_of(timeout))


def _of(timeout: float) -> timedelta:
    return timedelta(seconds=timeout)


def speaks() -> bool:
    """Whether this process is the one that prints what a command has to say."""
    if _member is not None:
        return _member.prints
    return (os.environ.get("WORLD_SIZE") or "1") == "1" or os.environ.get("RANK", "0") == "0"


def said() -> None:
    """What a command ends with has been printed."""
    if _member is not None:
        _member.said()
