"""What a worker process is: its place in the job, its device, and its way to talk to the others."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from hybridpar.errors import HybridparError, LaunchError, PlanError, StuckError
from hybridpar.host import keep_freed_memory
from hybridpar.planning.communicators import connections
from hybridpar.planning.communicators import groups as groups_of
from hybridpar.planning.plan import Plan
from hybridpar.runtime.communicators import ProcessGroups
from hybridpar.schema import from_data, to_data

DeviceChoice = Literal["auto", "cpu", "cuda"]

PLANNING_TIMEOUT = timedelta(hours=2)
"""For rank 0 to measure a profile and to plan, while the others wait."""
SAVING_TIMEOUT = timedelta(minutes=30)
"""Ranks may take longer to write a checkpoint than to communicate."""
_FAREWELL_S = 5.0
"""A rank 0 that ends with an error waits so long for the others to hear of it, since it may host the store."""

_REPORT_S = 5.0
"""Ranks whose communication timed out wait so long for each other to say so; who says nothing is stuck."""
_CLOSING_S = 1.0
"""A rank whose connection was closed looks so long for one that closed it because of a timeout."""


@dataclass(frozen=True)
class Place:
    """Where this process stands in the job, from torchrun's environment. Without torchrun: alone."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    node: int = 0
    restarts: int = 0

    @staticmethod
    def read(environment: Mapping[str, str]) -> Place:
        """Read RANK, WORLD_SIZE, LOCAL_RANK, ...; raises LaunchError for an incomplete or malformed set."""
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            return Place()

        def number(name: str, default: int | None = None) -> int:
            text = environment.get(name, "" if default is None else str(default))
            if not text.isdecimal():
                raise LaunchError(
                    f"the environment variable {name} is {text!r}, not a number; start the job with torchrun, "
                    "or unset RANK and WORLD_SIZE for a single process"
                )
            return int(text)

        rank, world = number("RANK"), number("WORLD_SIZE")
        if rank >= world:
            raise LaunchError(f"RANK is {rank}, but WORLD_SIZE is {world}; start the job with torchrun")
        local_rank = number("LOCAL_RANK", rank)
        return Place(
            rank,
            world,
            local_rank,
            number("LOCAL_WORLD_SIZE", world),
            number("GROUP_RANK", 0),
            number("TORCHELASTIC_RESTART_COUNT", 0),
        )


class Process:
    """One rank of a job. Before ``connect`` the ranks talk through a store only; ``connect`` makes process groups.

    All ranks call ``agree``, ``share``, ``tell``, ``connect`` and ``gather`` in the same order. ``device`` is one
    GPU per rank, or the CPU with one thread per rank where several ranks share the machine. ``timeout_s`` is the
    longest that one communication may take. Raises LaunchError where there are fewer GPUs than ranks but
    ``device`` is ``cuda``, and where the other processes cannot be reached.
    """

    def __init__(self, device: DeviceChoice = "auto", timeout_s: float = 120.0) -> None:
        self.place = Place.read(os.environ)
        self.rank, self.world = self.place.rank, self.place.world
        self.device = _device(device, self.place)
        self.timeout = timedelta(seconds=timeout_s)
        self.groups: dict[str, dist.ProcessGroup] = {}
        """This rank's process groups by communicator name, once connected."""
        self._communicators: list[ProcessGroups] = []
        self._founded = False
        self._shared = 0
        self._store = _open_store(self.place, self.timeout)
        if self.world > 1:  # nodes whose ranks did not fail count no restart
            self.place = replace(self.place, restarts=max(self.tell(self.place.restarts)))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
            if self.place.local_world > 1:
                torch.set_num_threads(1)

    def agree(self, make: Callable[[], Plan]) -> Plan:
        """Return the plan that ``make`` gives on rank 0, on every rank; only rank 0 calls ``make``.

        Where it fails, rank 0 raises its error and all other ranks end quietly with the exit code for it (2 for a
        HybridparError). Raises LaunchError on rank 0 where the plan is for another number of processes.
        """

        def checked() -> Any:
            plan = make()
            check_world(plan, self.world)
            return to_data(plan)

        return from_data(Plan, self.share(checked), "plan", PlanError)

    def share(self, make: Callable[[], Any], owner: int = 0) -> Any:
        """Return the JSON data that ``make`` gives on rank ``owner``, on every rank; errors as in ``agree``."""
        key = f"shared/{self._shared}"
        self._shared += 1
        if self.rank == owner:
            try:
                data = make()
            except BaseException as e:
                self._store.set(key, json.dumps({"exit": 2 if isinstance(e, HybridparError) else 1}))
                self._await_hearing(key)
                raise
            self._store.set(key, json.dumps({"data": data}))
            return json.loads(json.dumps(data))
        self._store.wait([key], PLANNING_TIMEOUT)
        answer = json.loads(self._store.get(key))
        if "exit" in answer:
            self._store.add(f"{key}/heard", 1)
            raise SystemExit(answer["exit"])
        return answer["data"]

    def tell(self, value: Any) -> list[Any]:
        """Return the JSON data of every rank, in rank order, on every rank; needs the store only."""
        key = f"told/{self._shared}"
        self._shared += 1
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        keys = [f"{key}/{rank}" for rank in range(self.world)]
        self._store.wait(keys, PLANNING_TIMEOUT)
        return [json.loads(self._store.get(k)) for k in keys]

    def propose(self, key: str, value: str) -> None:
        """Post a value for all ranks, unless one of them has done so before."""
        self._store.compare_set(key, "", value)

    def posted(self, key: str) -> str | None:
        """Return the value that a rank has posted, None as long as none has."""
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _await_hearing(self, key: str) -> None:
        deadline_s = time.monotonic() + _FAREWELL_S
        with contextlib.suppress(RuntimeError):
            while self._store.add(f"{key}/heard", 0) < self.world - 1 and time.monotonic() < deadline_s:
                time.sleep(0.02)

    def connect(self, plan: Plan, *, checkpoints: bool = False) -> ProcessGroups:
        """Make the process groups of a plan and one connection per pair of ranks that exchange anything.

        ``checkpoints`` makes one more group of all ranks on the CPU, ``checkpoint``, after the plan's.
        A default group that exists already, of an earlier job or the user's own, is used. Raises LaunchError,
        before any process group exists, where the plan is for another number of processes.
        """
        check_world(plan, self.world)
        self.join()
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        result, self.groups = create_communicators(plan, self.rank, backend, self.timeout)
        self._communicators.append(result)
        _warm_up(plan, self.rank, self.groups, self.device)
        if checkpoints and self.world > 1:
            everyone: Any = dist.new_group(timeout=SAVING_TIMEOUT, backend="gloo")
            everyone.allreduce([torch.zeros(1)]).wait()
            self.groups["checkpoint"] = everyone
        return result

    def join(self) -> None:
        """Make the default process group of all ranks, unless there is one."""
        self._meet()
        if not dist.is_initialized():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.world,
                timeout=self.timeout,
            )
            self._founded = True

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's picklable ``value`` in rank order, on every rank; needs ``connect``."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def collect(self, value: Any) -> list[Any] | None:
        """Return every rank's picklable ``value`` in rank order on rank 0, None elsewhere; needs ``connect``."""
        values: list[Any] | None = [None] * self.world if self.rank == 0 else None
        dist.gather_object(value, values)
        return values

    def fail(self, error: BaseException) -> NoReturn:
        """End this process because of an error, so that the whole job ends; alone, raise the error.

        The first rank to fail tells what happened: one line and exit code 2 for a HybridparError, else a traceback
        and exit code 1. Ranks that fail because of it say so in one line. No clean-up that could wait for a peer
        is done.
        """
        if self.world == 1:
            self.close()
            raise error
        error = self._explained(error)
        own = isinstance(error, HybridparError)
        first = str(self.rank)
        with contextlib.suppress(RuntimeError):
            first = self._store.compare_set("failed", "", str(self.rank)).decode()
        if first != str(self.rank):
            sys.stderr.write(f"rank {self.rank} ends because rank {first} failed\n")
        elif own:
            sys.stderr.write(f"hybridpar: rank {self.rank}: {error}\n")
        else:
            sys.stderr.write("".join(traceback.format_exception(error)))
            sys.stderr.write(f"hybridpar: {error}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if own else 1)

    def _explained(self, error: BaseException) -> BaseException:
        """Return a StuckError for the timeout of a communication, other errors as they are.

        A backend closes the connections of what timed out. A rank that sees only this lets the other one tell.
        """
        with contextlib.suppress(RuntimeError):
            self._store.set(f"reported/{self.rank}", "")
            if is_timeout(error):
                self._store.set("timed out", "")
                missing = self._missing()
                names = [f"rank {r} ({self._store.get(f'at/{r}').decode()})" for r in missing]
                return StuckError(_stuck(error, names, _limit(error, self.timeout)))
            closed = isinstance(error, RuntimeError) and "connection" in str(error).lower()
            if closed and self._appears("timed out", _CLOSING_S):
                self._appears("failed", 2 * _REPORT_S)
        return error

    def _appears(self, key: str, within_s: float) -> bool:
        """Wait for a key of the store; returns whether it came in time."""
        deadline_s = time.monotonic() + within_s
        while not (there := bool(self._store.check([key]))) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        return there

    def _missing(self) -> list[int]:
        """Return the ranks that report no failure; those that wait as this one does get some time for it."""
        deadline_s = time.monotonic() + _REPORT_S
        missing = list(range(self.world))
        while missing and time.monotonic() < deadline_s:
            missing = [r for r in missing if not self._store.check([f"reported/{r}"])]
            time.sleep(0.05)
        return missing

    def _meet(self) -> None:
        """Wait for all ranks, which may still read data for long; tells them where this one runs."""
        self._store.set(f"at/{self.rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self._store.wait([f"at/{r}" for r in range(self.world)], PLANNING_TIMEOUT)

    def close(self) -> None:
        """Leave the process groups; may be called twice."""
        self._let_go()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _let_go(self) -> None:
        self.groups = {}
        while self._communicators:
            self._communicators.pop().close()

    def leave_at_exit(self) -> None:
        """Have the interpreter close what this object made before it ends, unless an exception ends it.

        A backend's threads may still hold tensors of the last communication. Where they give them back to an
        interpreter that is gone, the process aborts after its work is done. After an exception a communication may
        be under way that never ends, and closing would wait for it.
        """
        atexit.register(self._leave)

    def _leave(self) -> None:
        if getattr(sys, "last_value", None) is not None:
            return
        if self._founded:
            self.close()
        else:  # the default group is the user's own, and so is its end
            self._let_go()
        gc.collect()  # what waits for a work may refer to it in a circle


def is_timeout(error: BaseException) -> bool:
    """Whether a communication took too long; backends tell by their text only."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("timed out" in text or "timeout" in text)


def _limit(error: BaseException, timeout: timedelta) -> float | None:
    """Return the seconds of ``train.timeout_s`` if it was this limit that was passed, None for another one.

    The store, through which ranks plan and read data sets, has a longer one of its own.
    """
    return None if isinstance(error, dist.DistStoreError) else timeout.total_seconds()


def _stuck(error: BaseException, missing: Sequence[str], timeout_s: float | None) -> str:
    """Say what waited, for whom (the missing ranks and where they run), and what to do."""
    what = f"{str(error).splitlines()[0]}; "
    if timeout_s is None:
        return (
            f"{what}the ranks wait {PLANNING_TIMEOUT} at most for each other to plan and to read their data; see "
            f"what {', '.join(missing) or 'rank 0'} does (py-spy dump --pid)"
        )
    if not missing:
        return (
            f"{what}every rank waited for another for {timeout_s:g} s: look at the network between the hosts "
            "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), or raise train.timeout_s"
        )
    return (
        f"{what}{', '.join(missing)} did not arrive at any communication within {timeout_s:g} s: see what it does "
        "there (py-spy dump --pid, its host's load and memory), or raise train.timeout_s if it is only slow"
    )


def check_world(plan: Plan, world: int) -> None:
    """Raise LaunchError unless a plan is for ``world`` processes."""
    if plan.world != world:
        raise LaunchError(
            f"the plan is for {plan.world} processes, but this job has {world}; "
            f"start it with torchrun --nproc-per-node {plan.world} -m hybridpar train ... "
            "(nodes x processes per node on several nodes), or plan for another world"
        )


def create_communicators(
    plan: Plan, rank: int, backend: str, timeout: timedelta
) -> tuple[ProcessGroups, dict[str, dist.ProcessGroup]]:
    """Create a process group per communicator of the plan, in the plan's order; all ranks of the job call it.

    Returns the communicators for the executor, and this rank's process groups by name.
    """
    own: dict[str, tuple[dist.ProcessGroup, tuple[int, ...]]] = {}
    for name, members in groups_of(plan):
        group: Any = dist.new_group(list(members), timeout=timeout, backend=backend)
        if rank in members:
            own[name] = group, members
    first = plan.locate(rank)[0] * plan.replica_world
    return ProcessGroups(own, first), {name: group for name, (group, _) in own.items()}


def _warm_up(plan: Plan, rank: int, groups: dict[str, dist.ProcessGroup], device: torch.device) -> None:
    """Use every connection once, in one order on all ranks.

    A backend may open connections at first use and block until the peer does the same (NCCL does); in the order of
    a program's steps, that could lock up.
    """
    token = torch.zeros(1, device=device)
    for name, members in groups_of(plan):
        if rank in members and not name.startswith(("forward.", "backward.")):
            groups[name].allreduce([token]).wait()
    rank = plan.locate(rank)[1]
    for source, target in connections(plan):
        way, back = ("up", "down") if source < target else ("down", "up")
        for name, ends in ((f"forward.{way}", (source, target)), (f"backward.{back}", (target, source))):
            if rank == ends[0]:
                groups[name].send([token], ends[1], 0).wait()
            elif rank == ends[1]:
                groups[name].recv([token], ends[0], 0).wait()


def _open_store(place: Place, timeout: timedelta) -> Store:
    """Open the job's store; a restarted job must not read what the one before left there.

    The launcher's own store outlives restarts, and torch then tells them apart by a count that each node keeps for
    itself: only the nodes whose ranks failed count. Otherwise every start has a store of its own.
    """
    if place.world == 1:
        return HashStore()
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if kept and place.world > place.local_world and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise LaunchError(
            "torchrun --max-restarts on several nodes: the nodes do not find each other after a restart; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, on every node, and use --rdzv-backend=c10d"
        )
    try:
        store, _, _ = next(rendezvous("env://", place.rank, place.world, timeout=timeout))
    except (ValueError, dist.DistError) as e:
        raise LaunchError(f"the other processes cannot be reached: {e}; start the job with torchrun") from e
    return PrefixStore(f"hybridpar/{place.restarts if kept else 0}", store)


def _device(choice: DeviceChoice, place: Place) -> torch.device:
    count = torch.cuda.device_count() if choice != "cpu" and torch.cuda.is_available() else 0
    if count >= place.local_world:
        return torch.device("cuda", place.local_rank)
    if choice == "cuda":
        raise LaunchError(
            f"train.device=cuda needs one GPU per rank, but there are {count} for {place.local_world} ranks; "
            "start fewer ranks, or set train.device=cpu"
        )
    return torch.device("cpu")


def gpu_uuid(device: torch.device) -> str:
    """Return what NVML calls a GPU, whatever its number is here."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
