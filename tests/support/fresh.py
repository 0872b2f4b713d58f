"""Programs in processes that know transformers and nothing of ours.

Each is forked from one that has imported transformers and done nothing else: it costs a tenth of a
second, and not the seconds of that import.
"""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SERVER = """
import json, os, sys, traceback
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
import transformers.models.auto.modeling_auto
for line in sys.stdin:
    code, arguments, output = json.loads(line)
    child = os.fork()
    if not child:
        end = 1
        try:
            file = os.open(output, os.O_WRONLY)
            os.dup2(file, 1), os.dup2(file, 2)
            sys.argv = ["-c", *arguments]
            assert "moe_lab" not in sys.modules
            exec(compile(code, "a fresh process", "exec"), {"__name__": "__main__"})
            end = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(end)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Ends with the process that asks."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)
    return server


def run(code: str, *arguments: object) -> str:
    """All that a program prints, with these as sys.argv[1:]; AssertionError where it fails."""
    server = _server()
    assert server.stdin and server.stdout
    with tempfile.NamedTemporaryFile() as output:
        asked = code, list(map(str, arguments)), output.name
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        end = server.stdout.readline().strip()
        printed = Path(output.name).read_text(errors="replace")
    assert end == "0", printed[-4000:]
    return printed


def result(code: str, *arguments: object) -> Any:
    """What a program prints behind RESULT, in a line of JSON."""
    (told,) = run(code, *arguments).split("RESULT")[1:]
    return json.loads(told.splitlines()[0])
