"""A Slurm of one machine: sbatch begins the tasks of a script at once, scontrol queues them again.

`install(folder)` lays its commands into folder/bin; what sbatch was given lies in folder/script.sh,
the tasks that were queued again in folder/requeued.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

SBATCH = """
import os, re, subprocess, sys
from pathlib import Path
home, script = Path(os.environ["FAKE_SLURM"]), Path(sys.argv[1]).read_text()
(home / "script.sh").write_text(script)
last = re.search(r"--array=0-(\\d+)", script)
for task in range(int(last[1]) + 1) if last else [None]:
    own = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}
    own |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    if task is not None:
        own |= {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(task)}
    subprocess.Popen(
        [sys.executable, str(home / "bin" / "task")], env=os.environ | own,
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
print("Submitted batch job 77")
"""
TASK = """
import os, subprocess
from pathlib import Path
home = Path(os.environ["FAKE_SLURM"])
task = os.environ.get("SLURM_ARRAY_TASK_ID")
name = "77" if task is None else f"77_{task}"
again, mark = True, home / f"again_{name}"
while again:
    subprocess.run(["bash", str(home / "script.sh")])
    again = mark.exists()
    mark.unlink(missing_ok=True)
"""
SRUN = """
import os, subprocess, sys
words = sys.argv[1:]
output = words[words.index("--output") + 1]
task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
for pattern, value in (("%A", "77"), ("%a", task), ("%j", "77"), ("%t", "0")):
    output = output.replace(pattern, value)
command = words[words.index(sys.executable):]
with open(output, "ab") as file:
    sys.exit(subprocess.run(command, stdout=file, stderr=file).returncode)
"""
SCONTROL = """
import os, sys
from pathlib import Path
home = Path(os.environ["FAKE_SLURM"])
assert sys.argv[1] == "requeue"
(home / f"again_{sys.argv[2]}").touch()
with (home / "requeued").open("a") as file:
    file.write(sys.argv[2] + "\\n")
"""
SACCT = 'print("JobID|State|NodeList")'
COMMANDS = {"sbatch": SBATCH, "task": TASK, "srun": SRUN, "scontrol": SCONTROL, "sacct": SACCT}


def install(folder: Path) -> dict[str, str]:
    """The environment in which this Slurm is there."""
    (folder / "bin").mkdir(parents=True)
    for name, program in COMMANDS.items():
        path = folder / "bin" / name
        path.write_text(f"#!{sys.executable}\n{program}")
        path.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(folder)}
