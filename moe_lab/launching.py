"""Several processes on a CPU by `accelerate launch`, which starts only one there without MPI.

In 1.15 `accelerate launch --num_processes 2 --cpu run.py` runs the script once, by itself, and says
nothing. Here that one process starts the others, with the launcher that accelerate has for GPUs
(torchrun's): it works on a CPU as well.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

LAUNCHERS = ("accelerate", "accelerate-launch", "launch.py", "accelerate_cli.py")


def start_missing() -> None:
    """Become the launcher where accelerate was asked for several processes and started this one.

    Then it does not return: it ends with their exit code.
    """
    if "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return
    import psutil

    parent = psutil.Process().parent()
    words = arguments_of(parent.cmdline()) if parent else None
    if words is None:
        return
    from accelerate.commands.launch import (
        _validate_launch_command,
        launch_command_parser,
        multi_gpu_launcher,
    )

    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)  # said before
    asked, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if asked.num_processes > 1:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        try:
            multi_gpu_launcher(asked)
        except ChildFailedError as error:
            sys.exit(error.get_first_failure()[1].exitcode)
        sys.exit(0)


def arguments_of(command: Sequence[str]) -> list[str] | None:
    """What `accelerate launch` was given, from the words of its process; None for another one."""
    for place, word in enumerate(command[:3]):
        name = os.path.basename(word)
        if name in LAUNCHERS:
            rest = list(command[place + 1 :])
            return rest[1:] if rest[:1] == ["launch"] else rest
    return None
