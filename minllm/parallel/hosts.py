"""Many processes as one run: joining, stopping together, and what happens when one is lost, slow or stuck.

Each process tells the others through the key-value store of `jax.distributed` that it lives, at which step it is and how many seconds of a
step it works by itself. A thread in each reads that. So a process that dies is named by the others, which would else wait for it in a
collective; a slow one is named while it runs; and of a stuck one there are the stacks of all threads (faulthandler).
"""

import faulthandler
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

LOST = 75  # exit status: EX_TEMPFAIL of sysexits.h, "try again"


def join(coordinator: str | None, processes: int | None, process: int | None, automatic: bool = False) -> None:
    """Makes this process one of several; nothing without a coordinator, unless `automatic`, which asks the cluster (a TPU VM's metadata,
    Slurm, MPI). Before anything else of jax. Collectives of CPUs are gloo's. Raises ValueError where the processes do not find each other.
    """
    if coordinator is None and not automatic:
        return
    if coordinator is not None and (processes is None or process is None):
        raise ValueError(f"coordinator {coordinator} is given, but not how many processes there are and which this one is; give all three")
    if None not in (process, processes) and not 0 <= process < processes:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"process {process} of {processes} does not exist; they are numbered 0 to {processes - 1}")
    import jax

    try:  # the service's own time-out is the longer one: it aborts without a word about where to go on
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=50, initialization_timeout=120)
    except RuntimeError as error:
        who = f"process {process} of {processes}" if coordinator else "this process"
        raise ValueError(f"{who} did not find the others at {coordinator or 'the cluster'} within 120 s: {error}") from None


class Told(NamedTuple):
    """What a process says of itself. beat: grows while it lives. own: seconds of its last step in which it did not wait for devices.
    failed: why it ends, if it does."""

    host: str
    beat: int = 0
    step: int = 0
    doing: str = "starting"
    own: float = 0.0
    failed: str = ""


class Watch:
    """Watches this process and the others while a run lasts; where there is only one, whether it is stuck.

    restart: says where a new start would go on. heir: a command that speaks after this process has died without a word (killed, aborted by
    the runtime): it is started now, and learns by the end of its standard input, which stays empty. hang: seconds without progress after
    which the stacks of all threads are written to standard error; None: never. patience: seconds of silence after which a process counts
    as lost.
    """

    def __init__(
        self, restart: Callable[[], str], heir: Sequence[str] = (), hang: float | None = None, patience: float = 30.0, period: float = 2.0
    ):
        import jax
        from jax._src.distributed import global_state

        self.restart, self.heir, self.hang, self.patience, self.period = restart, heir, hang, patience, period
        self.index, self.count, self._client = jax.process_index(), jax.process_count(), global_state.client
        self._mine = Told(socket.gethostname())
        self._told: dict[int, Told] = {}
        self._news, self._over, self._named = threading.Event(), False, set()
        self._silent: subprocess.Popen | None = None
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        if self.count > 1:
            # in a session of its own: what ends the process from the terminal must not end its heir
            self._silent = subprocess.Popen(self.heir, stdin=subprocess.PIPE, start_new_session=True) if self.heir else None
            self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """After an exception the thread goes on: `accuse` needs what it hears."""
        faulthandler.cancel_dump_traceback_later()
        if self.count > 1 and kind is None:
            self._mine, self._over = self._mine._replace(doing="done"), True
            self._news.set()
            self._thread.join()
            self._speaks()

    def note(self, step: int, doing: str, own: float | None = None) -> None:
        """This process begins something in a step. Puts off the report on a stuck one."""
        self._mine = self._mine._replace(step=step, doing=doing, own=self._mine.own if own is None else own)
        if self.hang:
            faulthandler.dump_traceback_later(self.hang, file=sys.__stderr__)
        if own is not None:
            self._news.set()

    def meet(self, what: str) -> None:
        """Returns when all processes are here. Devices that meet for the first time wait for each other half a minute (gloo), and one
        process may compile for longer than another."""
        if self.count > 1:
            self._client.wait_at_barrier(f"minllm/{what}", 3_600_000)

    def stops(self, step: int, asked: bool) -> bool:
        """Whether to stop after `step` steps: the same number for all processes. `asked`: this one was told to.

        A process that has begun step s has seen the end of step s - 1, which all had begun: none is more than one step ahead, so that all
        hear in time of a stop two steps from here.
        """
        if self.count == 1:
            return asked
        if asked and not self._client.key_value_dir_get("minllm/stop/"):
            self._client.key_value_set(f"minllm/stop/{self.index}", str(step + 2))
        at = [int(value) for _, value in self._client.key_value_dir_get("minllm/stop/")]
        return bool(at) and step >= min(at)

    def slow(self, step_time: float) -> str | None:
        """A line on a process that keeps the others waiting, once for each: its own work takes a tenth of a second and of a step, and three
        times what it takes the others."""
        told = dict(self._told)
        if len(told) < 2:
            return None
        index, worst = max(told.items(), key=lambda item: item[1].own)
        usual = statistics.median(t.own for i, t in told.items() if i != index)
        if worst.own < max(0.1, 0.1 * step_time, 3 * usual) or index in self._named:
            return None
        self._named.add(index)
        return (
            f"process {index} ({worst.host}) is slow: it works {worst.own:.2f} s of a step by itself (data, host), the others "
            f"{usual:.2f} s; a step takes {step_time:.2f} s"
        )

    def accuse(self, error: BaseException) -> None:
        """After an exception in one of several processes. Was another lost, then that is why, and the thread ends this process while we
        wait here; if not, the fault is our own, and the others are told, who would else wait for us."""
        time.sleep(self.patience + 3 * self.period)
        self.fail(error)

    def fail(self, error: BaseException) -> None:
        """The others are told that this process ends. They meet at process 0, which waits until they have heard."""
        if self.count > 1:
            self._mine = self._mine._replace(failed=f"{type(error).__name__}: {_first_line(error)}")
            self._tell()
            self._speaks()
            time.sleep(3 * self.period if self.index == 0 else 0)

    def end(self, why: str) -> None:
        """Ends this process at once: its devices may wait for ever."""
        self._speaks()
        print(f"error: {why}; {self.restart()}", file=sys.stderr, flush=True)
        os._exit(LOST)

    def _speaks(self) -> None:
        """This process has its own last word: its heir need not speak."""
        if self._silent is not None:
            self._silent.communicate(b"spoken")
            self._silent = None

    def _tell(self) -> None:
        self._mine = self._mine._replace(beat=self._mine.beat + 1)
        self._client.key_value_set(f"minllm/told/{self.index}", json.dumps(self._mine), allow_overwrite=True)

    def _listen(self) -> None:
        heard: dict[int, float] = {}
        answered = time.monotonic()
        while not self._over:
            self._news.wait(self.period)
            self._news.clear()
            now = time.monotonic()
            try:
                self._tell()
                rows = self._client.key_value_dir_get("minllm/told/")
                answered = now
            except Exception as error:
                if now - answered > self.patience:
                    self.end(f"process 0, where all meet, has not answered for {self.patience:.0f} s ({_first_line(error)})")
                continue
            for key, value in rows:
                i, told = int(key.rsplit("/", 1)[1]), Told(*json.loads(value))
                if i not in self._told or told.beat != self._told[i].beat:
                    heard[i] = now
                self._told[i] = told
                if i == self.index or told.doing == "done":
                    continue
                if told.failed:
                    self.end(f"process {i} of {self.count} ({told.host}) failed after step {told.step}: {told.failed}")
                if now - heard[i] > self.patience:
                    self.end(
                        f"process {i} of {self.count} ({told.host}) is lost: not heard of for {self.patience:.0f} s, last seen after step "
                        f"{told.step} ({told.doing})"
                    )


def _first_line(x: Any) -> str:
    return (str(x).splitlines() or [type(x).__name__])[0][:200]
