"""Several processes that share one run, as torchrun and `accelerate launch` start them.

All of them go through the same code; the first, the main one, writes and prints. Everything here is
right, and imports nothing heavy, in a lone process.

What they exchange goes through gloo, in host memory, and is waited for by looking: a process that
fails says so in the launcher's key-value store, where the others find it (`Ended`), and a signal is
heard while waiting. So none waits for one that is gone.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from moe_lab import stopping

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import Tensor
    from torch._C._distributed_c10d import Store

Value = TypeVar("Value")

FOREVER = timedelta(days=365)  # the main process may work alone for long
LOOK_EVERY = 0.2  # seconds between looks at whether another process has failed
LAST_WORDS = 5.0  # seconds in which a process that breaks off says why
GOODBYE = 5.0  # seconds in which the others leave before the main process does
PATIENCE = 600.0  # seconds that a failed process gives the main one to end the job


@dataclass(frozen=True)
class Failure:
    """Why a process has ended its part of a job: an exit code, and what to tell.

    traceback: where it is our mistake; signal: its number, where one stopped the process.
    """

    process: int
    message: str
    code: int
    traceback: str = ""
    signal: int | None = None


class Ended(Exception):
    """Another process has failed, so that this one cannot go on."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass
class _State:
    store: Store | None = None
    job: int = 0  # how many jobs of a sweep are over
    alone: int = 0
    open: bool = False
    looked: float = 0.0


_state = _State()


def started_together() -> int:
    """How many processes the launcher has started for this run, also where one works alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """How many processes work together here."""
    return 1 if _state.alone else started_together()


def index() -> int:
    """Which of them this is, counted from 0."""
    return 0 if number() == 1 else int(os.environ["RANK"])


def is_main() -> bool:
    """Whether it is the first, which writes and prints."""
    return index() == 0


def speaks() -> bool:
    """Whether this process may print: asked of the launcher's order, whoever works alone."""
    return started_together() == 1 or int(os.environ["RANK"]) == 0


def hush() -> None:
    """Print nothing from now on, whoever prints: the main process says it."""
    sys.stdout.flush()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)


def of_machine() -> int:
    """Which of the processes on its machine this is, counted from 0: the number of its card."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def alone() -> Iterator[None]:
    """While it is open this process works by itself, as if there were no others."""
    _state.alone += 1
    try:
        yield
    finally:
        _state.alone -= 1


def share(values: Sequence[Value]) -> list[Value]:
    """This process's part of a sequence: every number()-th, from its own index on."""
    return list(values[index() :: number()])


def join(part: Sequence[Value]) -> list[Value]:
    """The whole sequence, of which each process gives what it made of its `share`."""
    parts = gather(list(part))
    found: list[Any] = [None] * sum(map(len, parts))
    for place, one in enumerate(parts):
        found[place :: len(parts)] = one
    return found


@contextmanager
def main_first() -> Iterator[None]:
    """What is inside the main process does before the others, which find what it has fetched."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def wait() -> None:
    """Go on when all have come here."""
    gather(None)


def broadcast(value: Value) -> Value:
    """The main process's value, in each. It is pickled: tensors lie in host memory."""
    if number() == 1:
        return value
    import torch

    _open()
    told = pickle.dumps(value) if is_main() else b""
    length = torch.tensor([len(told)])
    _exchanged(lambda d: d.broadcast(length, 0, async_op=True))
    content = _bytes_in(told, int(length))
    _exchanged(lambda d: d.broadcast(content, 0, async_op=True))
    return value if is_main() else _value_of(content, int(length))


def gather(value: Value) -> list[Value]:
    """One value of each process, in their order, in each. They are pickled, as by `broadcast`."""
    if number() == 1:
        return [value]
    import torch

    _open()
    told = pickle.dumps(value)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(number())]
    mine = torch.tensor([len(told)])
    _exchanged(lambda d: d.all_gather(lengths, mine, async_op=True))
    longest = int(max(lengths))
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(number())]
    content = _bytes_in(told, longest)
    _exchanged(lambda d: d.all_gather(parts, content, async_op=True))
    sizes = [int(length) for length in lengths]
    found: list[Value] = [_value_of(part, size) for part, size in zip(parts, sizes, strict=True)]
    found[index()] = value
    return found


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in each; on its own device, and in place."""
    if number() > 1:
        _open()
        _exchanged(lambda d: d.all_reduce(tensor, async_op=True))
    return tensor


def failed(error: BaseException, message: str, code: int, signal: int | None = None) -> Failure:
    """Tell the others that this process cannot go on; what ended the job: the first to tell."""
    told = "".join(traceback.format_exception(error)) if code == 1 else ""
    mine = (
        error.failure if isinstance(error, Ended) else Failure(index(), message, code, told, signal)
    )
    if number() == 1:
        return mine
    key, content = _key("failed"), json.dumps(asdict(mine))
    first = ""
    with suppress(RuntimeError):  # whoever keeps the store may be gone
        first = _store().compare_set(key, "", content).decode()
    close()  # those that wait for this process in an exchange hear that it has gone
    return Failure(**json.loads(first or content))


def failure() -> Failure | None:
    """What ended this job in a process that was the first to fail; None while all go on."""
    key = _key("failed")
    if number() == 1 or _state.store is None or not _store().check([key]):
        return None
    return Failure(**json.loads(_store().get(key)))


def end_job(code: int) -> int:
    """Leave a job together, with the main process's exit code: the next one begins anew."""
    if number() == 1:
        return code
    with suppress(RuntimeError):
        if is_main():
            _store().set(_key("over"), str(code))
        elif _comes(_key("over"), PATIENCE if code else None):
            code = int(_store().get(_key("over")))
    close()
    _state.job += 1
    return code


def leave() -> None:
    """Before a process ends: not before the main one has said what there is to say."""
    if number() == 1:
        return
    with suppress(RuntimeError):
        if is_main():
            _store().set("left", "1")
            _comes(f"heard by {number() - 1}", GOODBYE)  # it may keep the store
        elif _comes("left", PATIENCE):
            _store().set(f"heard by {_store().add('heard', 1)}", "1")
    stopping.ignore()  # the launcher ends those that are left when the first has ended


def close() -> None:
    """Leave the group of processes, if one is open."""
    if not _state.open:
        return
    import torch.distributed as dist
    from accelerate import PartialState

    _state.open = False
    PartialState._reset_state()
    if dist.is_initialized():
        dist.destroy_process_group()


def open_group() -> None:
    """Let the processes find each other, for what goes between them without this module."""
    if number() > 1:
        _open()


def _open() -> None:
    """Join the group of this job's processes: gloo, and NCCL beside it where there are cards."""
    if _state.open:
        return
    import torch
    import torch.distributed as dist
    from accelerate import PartialState
    from torch.distributed.distributed_c10d import PrefixStore

    _meet()
    cards = torch.cuda.is_available() and not on_cpu()
    if not dist.is_initialized():
        if cards:
            torch.cuda.set_device(of_machine() % torch.cuda.device_count())
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cards else "gloo",
            store=PrefixStore(f"group{_state.job}", _store()),
            rank=index(), world_size=number(), timeout=FOREVER,
        )  # fmt: skip
    PartialState(cpu=not cards)
    _state.open = True


def _meet() -> None:
    """Wait for all to come here: joining a group cannot be broken off."""
    _store().add(_key("here"), 1)
    while _store().add(_key("here"), 0) < number():
        stopping.check()
        _look()
        time.sleep(0.005)


def on_cpu() -> bool:
    """Whether accelerate's launcher was told to leave the GPUs alone (--cpu)."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def _store() -> Store:
    """The key-value store of the launcher, or of the main process."""
    if _state.store is None:
        from torch.distributed.rendezvous import rendezvous

        found = next(rendezvous("env://", index(), number(), timeout=timedelta(minutes=10)))
        _state.store = found[0]
    return _state.store


def _key(name: str) -> str:
    return f"job{_state.job}/{name}"


def _comes(key: str, patience: float | None) -> bool:
    """Whether a key is set before patience, in seconds, ends; None: wait for it."""
    started, pause = time.monotonic(), 0.001
    while not _store().check([key]):
        if patience is not None and time.monotonic() > started + patience:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return True


def _exchanged(begin: Callable[[Any], dist.Work | None]) -> None:
    """Do an exchange that every process takes part in; `Ended` where one has failed."""
    import torch.distributed as dist

    try:
        work = begin(dist)
        assert work is not None
        pause = 1e-5
        while not work.is_completed():
            stopping.check()
            _look()
            time.sleep(pause)
            pause = min(1.5 * pause, 0.01)
        work.wait()
    except RuntimeError as error:
        raise Ended(_last_words()) from error


def _look() -> None:
    """Raise `Ended` where another process has failed; asked now and then."""
    if time.monotonic() > _state.looked + LOOK_EVERY:
        _state.looked = time.monotonic()
        if found := failure():
            raise Ended(found)


def _last_words() -> Failure:
    """What a process said that broke an exchange off; one that was killed says nothing."""
    until = time.monotonic() + LAST_WORDS
    with suppress(RuntimeError):  # the store lies in the main process, perhaps
        while time.monotonic() < until:
            stopping.check()
            if found := failure():
                return found
            time.sleep(0.05)
    others = "the other process" if number() == 2 else "one of the other processes"
    return Failure(
        index(),
        f"{others} has ended without a word: it was killed, ran out of memory, or its machine is "
        "gone. What is finished is kept: start all of them again",
        1,
    )


def _bytes_in(content: bytes, length: int) -> torch.Tensor:
    """These bytes in a tensor of so many."""
    import torch

    whole = torch.empty(length, dtype=torch.uint8)
    if content:
        whole[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return whole


def _value_of(content: torch.Tensor, length: int) -> Any:
    return pickle.loads(content[:length].numpy().tobytes())
