"""Pools of gloo ranks that live for a session, so that a case costs milliseconds.

``pool(3).run(function, *args)`` calls ``function(rank, 3, *args)`` on three ranks and gives the
list of what they return. Ranks are forked from one process that has imported torch and has no
threads: a pool that was killed, after a hang or a failure, is replaced at once. That process ends
all ranks when the session ends, however it ends.

A function is one of a module's top level. It returns plain values and CPU tensors, never a
DTensor. What it patches it restores. :func:`mesh_of` gives its mesh of all ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import faulthandler
import importlib
import importlib.util
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parents[1]
PATIENCE = 30.0
"""Seconds after which a collective gives up that other ranks do not join."""
GRACE = 5.0
"""Seconds that ranks have to end once another has failed."""
PRELOADED = (
    *("pytest", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp"),
    *("stiefel.optimizers", "helpers.methods"),
)
"""What ranks use, which takes seconds to import: once, where they are forked from."""


class RanksFailed(AssertionError):
    """A function raised, hung or died on a rank; the text has what every rank says."""


@dataclass(frozen=True)
class Outcome:
    """What became of a function on one rank.

    Attributes:
        value: What it returned; None if it did not.
        error: None, the traceback of its exception, or why there is none.
        kind: Name of the class of the exception; ``"died"`` or ``"hung"`` without one.
        message: Text of the exception.
    """

    value: Any = None
    error: str | None = None
    kind: str | None = None
    message: str = ""


# the side of the test --------------------------------------------------------------------------


class Pool:
    """Ranks of one world, until one of them fails."""

    def __init__(self, world: int, patience: float = PATIENCE) -> None:
        self.world = world
        self.folder = tempfile.mkdtemp(prefix="ranks-")
        self._connections: list[Connection] = []
        self._pids: list[int] = []
        self.is_open = True
        for rank in range(world):
            here, there = Pipe()
            order = ("fork", rank, world, self.folder, patience)
            self._pids.append(nursery().ask(order, there.fileno()))
            there.close()
            self._connections.append(here)

    def run(self, function: Any, *args: Any, timeout: float = 60.0) -> list[Any]:
        """What the function returns on every rank.

        Args:
            function: A function of a module's top level, or ``"module:name"``.
            args: Its arguments after rank and world, as anything that pickle takes.
            timeout: Seconds after which the ranks are killed.

        Raises:
            RanksFailed: If a rank raised, died or took longer; the next case has a fresh pool.
        """
        outcomes = self.outcomes(function, *args, timeout=timeout)
        failed = {rank: x for rank, x in enumerate(outcomes) if x.error is not None}
        seen: set[tuple[str | None, str]] = set()
        texts = []
        for rank, x in failed.items():  # the same sentence needs one traceback
            is_known = (x.kind, x.message) in seen
            seen.add((x.kind, x.message))
            text = f"the same {x.kind}" if is_known and x.kind not in (None, "hung") else x.error
            texts.append(f"rank {rank} of {self.world}: {text}")
        if texts:
            raise RanksFailed("\n".join(texts))
        return [x.value for x in outcomes]

    def outcomes(
        self, function: Any, *args: Any, timeout: float = 60.0, grace: float = GRACE
    ) -> list[Outcome]:
        """What became of the function on every rank, for functions that are to fail.

        Args:
            function: As in :meth:`run`.
            args: As in :meth:`run`.
            timeout: Seconds after which the ranks are killed.
            grace: Seconds after the first failure after which they are killed too.
        """
        if not self.is_open:
            raise RuntimeError("this pool has been closed; ask pool() for another")
        order = pickle.dumps((_reference(function), args))
        for connection in self._connections:
            with contextlib.suppress(OSError):  # a rank that died says so below
                connection.send_bytes(order)
        found = self._collect(timeout, grace)
        missing = [rank for rank in range(self.world) if rank not in found]
        stacks = self._stacks(missing)
        for rank in missing:
            text = f"did not end within {timeout:g} s, or {grace:g} s after the first failure"
            found[rank] = Outcome(error=f"{text}; {stacks[rank]}", kind="hung", message=text)
        if any(x.error is not None for x in found.values()):
            self.close()
        return [found[rank] for rank in range(self.world)]

    def _collect(self, timeout: float, grace: float) -> dict[int, Outcome]:
        """Outcomes by rank, of those that came in time."""
        found: dict[int, Outcome] = {}
        deadline = time.monotonic() + timeout
        while len(found) < self.world:
            open_ = [c for rank, c in enumerate(self._connections) if rank not in found]
            ready = wait(open_, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = self._connections.index(connection)
                try:
                    found[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    text = f"the process died; {self._log(rank)}"
                    found[rank] = Outcome(error=text, kind="died", message=text)
                if found[rank].error is not None:
                    deadline = min(deadline, time.monotonic() + grace)
        return found

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        """Where ranks hang, as they themselves print it."""
        for rank in ranks:
            nursery().ask(("signal", self._pids[rank], int(signal.SIGUSR1)))
        if ranks:
            time.sleep(0.3)
        return {rank: self._log(rank) for rank in ranks}

    def _log(self, rank: int) -> str:
        """The end of what a rank has printed."""
        path = Path(self.folder, f"{rank}.log")
        text = path.read_text(errors="replace") if path.exists() else ""
        return f"it printed:\n{text[-3000:]}" if text else "it printed nothing"

    def close(self) -> None:
        """Kill the ranks and wait until they are gone."""
        if not self.is_open:
            return
        self.is_open = False
        for connection in self._connections:
            connection.close()
        if _nursery:
            for pid in self._pids:
                nursery().ask(("end", pid))
        shutil.rmtree(self.folder, ignore_errors=True)


class Nursery:
    """The process that ranks are forked from.

    Args:
        preloaded: Modules that it imports first.
    """

    def __init__(self, preloaded: Sequence[str] = PRELOADED) -> None:
        self._socket, there = socket.socketpair()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(there.fileno()), *preloaded],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            env=env,
            cwd=TESTS.parent,
        )
        there.close()
        self._socket.settimeout(120)

    def ask(self, order: tuple[Any, ...], fd: int | None = None) -> int:
        """Send an order, with a file descriptor that goes with it; the answer."""
        socket.send_fds(self._socket, [pickle.dumps(order)], [] if fd is None else [fd])
        answer = self._socket.recv(64)
        if not answer:
            raise RanksFailed("the process that ranks are forked from has died")
        return int(answer)

    def close(self) -> None:
        """End the process and all ranks."""
        self._socket.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


_nursery: list[Nursery] = []
_pools: dict[int, Pool] = {}


def nursery() -> Nursery:
    """The one of this session, started when it is needed first."""
    if not _nursery:
        _nursery.append(Nursery())
    return _nursery[0]


def pool(world: int) -> Pool:
    """The pool of a world size: the one that is there, or a fresh one after a failure."""
    known = _pools.get(world)
    if known is None or not known.is_open:
        known = _pools[world] = Pool(world)
    return known


def close() -> None:
    """End every rank of this session."""
    for known in _pools.values():
        known.close()
    _pools.clear()
    while _nursery:
        _nursery.pop().close()


atexit.register(close)


def _reference(function: Any) -> tuple[str | None, str]:
    """(module or path, name) of a function that another process can find."""
    if isinstance(function, str):
        module, _, name = function.partition(":")
        return module, name
    home = sys.modules.get(function.__module__)
    path = getattr(home, "__file__", None) or function.__code__.co_filename
    if "<" in function.__qualname__:
        raise ValueError(f"{function.__qualname__} is not at the top level of its module")
    return str(Path(path).resolve()), function.__qualname__


# the side of the ranks -------------------------------------------------------------------------


def serve(fd: int, preloaded: Sequence[str]) -> None:
    """Fork and end ranks as the session asks, and end them all with it."""
    faulthandler.enable()
    torch.set_num_threads(1)
    for name in preloaded:
        importlib.import_module(name)
    orders, alive, folders = socket.socket(fileno=fd), set(), set()
    while True:
        message, fds, _, _ = socket.recv_fds(orders, 4096, 1)
        if not message:
            break
        kind, *what = pickle.loads(message)
        if kind == "fork":
            pid = os.fork()
            if pid == 0:
                orders.close()
                _live(Connection(fds[0]), *what)
            os.close(fds[0])
            folders.add(what[2])
            alive.add(pid)
            answer = pid
        else:
            pid, number = what[0], what[1] if kind == "signal" else signal.SIGKILL
            answer = pid
            if pid in alive:
                os.kill(pid, number)
            if kind == "end" and pid in alive:
                os.waitpid(pid, 0)
                alive.remove(pid)
        orders.send(str(answer).encode())
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # a long list of modules takes a second to be taken down


def _live(orders: Connection, rank: int, world: int, folder: str, patience: float) -> None:
    """Run functions on one rank until the session closes the connection; never returns."""
    log = os.open(os.path.join(folder, f"{rank}.log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=patience),
        )
        while True:
            where, args = pickle.loads(orders.recv_bytes())
            torch.manual_seed(0)
            orders.send_bytes(_outcome(where, rank, world, args))
            sys.stdout.flush()
    except (EOFError, OSError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _outcome(where: tuple[str, str], rank: int, world: int, args: tuple[Any, ...]) -> bytes:
    """What becomes of one function, as bytes."""
    try:
        value = _find(*where)(rank, world, *args)
        return pickle.dumps(Outcome(value))
    except Exception as error:
        text = traceback.format_exc()
        return pickle.dumps(Outcome(None, text, type(error).__name__, str(error)))


def _find(where: str, name: str) -> Any:
    """A function by its module's name, or by its file."""
    found = importlib.import_module(where) if not where.endswith(".py") else _module_at(where)
    for part in name.split("."):
        found = getattr(found, part)
    return found


@cache
def _module_at(path: str) -> Any:
    """The module of a file: under its name if it is a helper, else under a name of its own."""
    parts = (
        Path(path).relative_to(TESTS).with_suffix("").parts if TESTS in Path(path).parents else ()
    )
    if parts[:1] == ("helpers",):
        return importlib.import_module(".".join(parts))
    name = "ranks_" + "_".join(parts or Path(path).with_suffix("").parts[-2:])
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@cache
def mesh_of(world: int) -> Any:
    """The mesh of all ranks, one dimension."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (world,))


if __name__ == "__main__":
    sys.path[0] = str(TESTS)
    importlib.import_module("helpers.ranks").serve(int(sys.argv[1]), sys.argv[2:])
