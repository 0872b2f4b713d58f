"""What of the log a terminal shows: ours, each warning once; run.log keeps everything."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from moe_lab import processes

OUR_LOGGERS, PYTHON = ("moe_lab", "run", "__main__"), "py.warnings"
already_shown: set[str] = (
    set()
)  # over all jobs of this process: Hydra sets logging up anew for each


class RunLog(logging.FileHandler):
    """run.log, which one process writes.

    Where the disk is full that is said once, and not by a traceback for each line.
    """

    def __init__(self, filename: str, **options: Any) -> None:
        super().__init__(filename if processes.speaks() else os.devnull, **options)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            text = f"{self.baseFilename} is not whole: {error.strerror}"
            if text not in already_shown:
                already_shown.add(text)
                print(text, file=sys.stderr)
        else:
            super().handleError(record)


class Console(logging.Filter):
    """Passes what moe_lab says, and of libraries warnings and errors; no warning twice.

    A warning of Python's (`warnings.warn`) is cut to its message, without the line of code.
    """

    def filter(  # type: ignore[override]  # a record in another's place: from Python 3.12 on
        self, record: logging.LogRecord
    ) -> bool | logging.LogRecord:
        """Whether, or as what, a record is shown."""
        if not processes.speaks():
            return False
        ours = record.name.partition(".")[0] in OUR_LOGGERS
        if record.levelno < logging.WARNING:
            return ours
        text = record.getMessage()
        if record.name == PYTHON:
            text = _message(text)
        if record.levelno == logging.WARNING and text in already_shown:
            return False
        already_shown.add(text)
        if record.name != PYTHON:
            return True
        return logging.makeLogRecord(record.__dict__ | {"msg": f"warning: {text}", "args": None})


def _message(formatted: str) -> str:
    """`path:line: Category: message` and a line of code, as warnings formats them: the message."""
    first = formatted.strip().splitlines()[0] if formatted.strip() else ""
    _, is_warning, message = first.partition("Warning: ")
    return message if is_warning else first
