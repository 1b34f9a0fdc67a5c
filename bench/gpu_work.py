"""Jobs of ``gpu.py`` in processes of their own, which may hang or crash, and what they give."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Row:
    """One figure.

    Attributes:
        name: What was looked at.
        figures: Numbers and words by name.
        wrong: In what it is wrong, or how it failed; empty if it is right.
        slow: By how much a time misses what is asked for; empty if it does not.
    """

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    wrong: str = ""
    slow: str = ""


Job = tuple[str, Callable[[], Sequence[Row]]]
"""A name, and what gives its rows. It runs in a process of its own, which alone touches the GPU."""


@dataclass(frozen=True)
class Stage:
    """Jobs that belong together.

    Attributes:
        name: Its name.
        seconds: Its time limit.
        jobs: What it consists of.
        workers: How many jobs run at a time.
    """

    name: str
    seconds: float
    jobs: Sequence[Job]
    workers: int = 1


# a stage in processes of its own ------------------------------------------------------------------


def work(to_parent: Connection, jobs: Sequence[Job]) -> None:
    """Run the jobs that the parent names, until it says None or the GPU is lost."""
    import torch

    torch.set_num_threads(2 if (os.cpu_count() or 1) > 8 else 1)
    while (i := to_parent.recv()) is not None:
        try:
            rows, text = list(jobs[i][1]()), ""
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0][:200]
            rows = [Row(jobs[i][0], wrong=f"{type(error).__name__}: {said}")]
            text = f"--- {jobs[i][0]}\n{traceback.format_exc()}"
        lost = bool(text) and is_lost()
        to_parent.send((rows, text, lost))
        if lost:
            return


def is_lost() -> bool:
    """Whether this process can do no more on the GPU, as after an access to wrong memory."""
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Crew:
    """Processes that share the jobs of a stage. One that dies is replaced, and its job has failed.

    Attributes:
        left: Numbers of jobs that nobody has begun.
        busy: Per pipe its process and the number of its job.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage, self.left = stage, deque(range(len(stage.jobs)))
        self.busy: dict[Connection, tuple[BaseProcess, int]] = {}
        self.context = multiprocessing.get_context("fork")  # torch is imported once

    def start(self) -> None:
        """Start a process with the next job."""
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=work, args=(theirs, self.stage.jobs), daemon=True)
        process.start()
        theirs.close()
        self.give(ours, process)

    def give(self, pipe: Connection, process: BaseProcess) -> None:
        """Give a process the next job, or let it end."""
        if self.left:
            self.busy[pipe] = process, self.left.popleft()
            pipe.send(self.busy[pipe][1])
        else:
            with contextlib.suppress(OSError):  # it has ended already
                pipe.send(None)
            process.join(10)

    def rows(self, deadline: float) -> Iterator[tuple[Sequence[Row], str]]:
        """Rows and errors of jobs as they end, until all have or time is up."""
        for _ in range(min(self.stage.workers, len(self.left))):
            self.start()
        while self.busy and (rest := deadline - time.monotonic()) > 0:
            for pipe in wait(list(self.busy), rest):
                assert isinstance(pipe, Connection)
                process, i = self.busy.pop(pipe)
                try:
                    found, error, lost = pipe.recv()
                except EOFError:
                    process.join(10)
                    text = f"its process died, exit status {process.exitcode}"
                    found, error, lost = [Row(self.stage.jobs[i][0], wrong=text)], "", True
                if not lost:
                    self.give(pipe, process)
                elif self.left:
                    self.start()
                yield found, error

    def stop(self) -> list[str]:
        """End what still runs; names of jobs that have not ended."""
        left = [i for _, i in self.busy.values()] + list(self.left)
        for process, _ in self.busy.values():
            process.kill()
            process.join(10)
        return [self.stage.jobs[i][0] for i in sorted(left)]
