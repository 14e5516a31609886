"""SLURM on one machine: a batch script runs as on several nodes, with stubs of ``srun``, ``scontrol`` and ``losa``."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.processes import environment

# Starts the tasks of all nodes. As srun does, it refuses options that it does not know, ends with the highest code, a
# signal's being its number and 128, ends all tasks once one has failed, unless an option says to let them end by
# themselves, and kills what still runs so many seconds (--wait) after the first task has ended.
SRUN = """#!{python}
import os, pathlib, signal, subprocess, sys, time
folder, words = pathlib.Path({folder!r}), sys.argv[1:]
options = {{}}
while words[0].startswith("--"):
    name, _, value = words.pop(0).partition("=")
    if name not in ("--cpus-per-task", "--distribution", "--kill-on-bad-exit", "--wait"):
        sys.exit(f"srun: unrecognized option '{{name}}'")
    options[name] = value
tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
(folder / "waited").write_text(options["--wait"])
each = tasks // nodes
started = []
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in started])
for task in range(tasks):
    place = {{"SLURM_PROCID": task, "SLURM_LOCALID": task % each, "SLURM_NODEID": task // each}}
    started.append(subprocess.Popen(words, env=os.environ | {{key: str(value) for key, value in place.items()}}))
(folder / "started").write_text(" ".join(str(pid) for pid in (os.getpid(), *(task.pid for task in started))))
(folder / "started").rename(folder / "processes")
wait, ended = float(options.get("--wait", "inf")), None
while None in (codes := [task.poll() for task in started]):
    if ended is None and codes != [None] * tasks:
        ended = time.monotonic()
    if ended is not None and time.monotonic() - ended > min(wait, {wait}):
        [task.kill() for task in started]
    elif any(codes) and options.get("--kill-on-bad-exit") != "0":
        [task.terminate() for task in started]
    time.sleep(0.01)
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/bash
case $1 in
  show) for node in $(seq $SLURM_NNODES); do echo "{host}"; done ;;
  requeue) echo "$2" >> "{folder}/requeued" ;;
esac
"""
# Takes down what it was started with. Files of the folder tell when it ends, and with which code.
FAKE_LOSA = """#!/bin/bash
env > "{folder}/environment.$RANK"
printf '%s\\n' "$@" > "{folder}/words.$RANK"
if [ -e "{folder}/hangs.$RANK" ]; then
  exec sleep 1000
fi
if [ -e "{folder}/wait" ]; then
  trap 'exit 75' TERM
  touch "{folder}/ready.$RANK"
  while true; do sleep 0.05; done
fi
sleep "$(cat "{folder}/seconds.$RANK" 2>/dev/null || echo 0)"
exit "$(cat "{folder}/code.$RANK" 2>/dev/null || echo 0)"
"""
REAL_LOSA = '#!/bin/bash\nexec "{python}" -m losa "$@"\n'


def batch_options(script: Path) -> dict[str, str]:
    """The #SBATCH lines of a batch script: the value by the option, empty for one that has none."""
    lines = re.findall(r"^#SBATCH (--[\w-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE)
    return dict(lines)


class Slurm:
    """One job: a batch script that runs once, or again after it was queued again.

    Args:
        folder: takes the stubs and what they note.
        options: of sbatch, in place of the script's own #SBATCH lines. --gres=none: nodes without GPUs.
        losa: the program that tasks start, FAKE_LOSA or REAL_LOSA.
        host: the name of every node.
        wait: seconds that stand for the seconds of srun's --wait, where that has more.
    """

    def __init__(
        self, script: Path, folder: Path, losa: str, host: str = "localhost", wait: float = 1000, **options: str
    ):
        self.script, self.folder, self.runs = script, folder, 0
        asked = batch_options(script) | {f"--{key.replace('_', '-')}": value for key, value in options.items()}
        nodes, tasks = int(asked["--nodes"]), int(asked["--ntasks-per-node"])
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "losa": losa}.items():
            values = {"python": sys.executable, "folder": str(folder), "host": host, "wait": wait}
            (folder / name).write_text(text.format(**values))
            (folder / name).chmod(0o755)
        self.environment = environment(
            PATH=f"{folder}:{os.environ['PATH']}",
            SLURM_JOB_ID="7012345",
            SLURM_JOB_NODELIST="nodes",
            SLURM_NNODES=str(nodes),
            SLURM_NTASKS=str(nodes * tasks),
            SLURM_CPUS_PER_TASK=asked["--cpus-per-task"],
        )
        if asked["--gres"] != "none":
            self.environment["SLURM_GPUS_ON_NODE"] = asked["--gres"].removeprefix("gpu:")

    @contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen]:
        """The script, started as SLURM does each time that the job's turn comes. What still runs at the end of the
        context is killed."""
        (self.folder / "processes").unlink(missing_ok=True)
        again = {"SLURM_RESTART_COUNT": str(self.runs)} if self.runs else {}
        self.runs += 1
        script = subprocess.Popen(
            ["bash", str(self.script), *arguments],
            env=self.environment | again,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        try:
            yield script
        finally:
            if script.poll() is None:
                os.killpg(script.pid, signal.SIGKILL)
            script.communicate()

    def run(self, *arguments: str, timeout: float = 200) -> tuple[int, str]:
        """The script's exit code and log."""
        with self.running(*arguments) as script:
            log, _ = script.communicate(timeout=timeout)
        return script.returncode, log

    def processes(self) -> list[int]:
        """srun and the processes of the tasks; empty before they are started."""
        file = self.folder / "processes"
        return [int(task) for task in file.read_text().split()] if file.exists() else []

    def waited(self) -> float:
        """Seconds for which srun lets other tasks go on after the first one has ended."""
        return float((self.folder / "waited").read_text())

    def warn(self) -> None:
        """What SLURM does some time before the time limit (--signal): all tasks get the signal, the script does not."""
        name, _, _ = batch_options(self.script)["--signal"].partition("@")
        for task in self.processes()[1:]:
            os.kill(task, signal.Signals[f"SIG{name}"])

    def cancel(self, script: subprocess.Popen) -> None:
        """What scancel does first: the script, srun and the tasks get SIGTERM."""
        for process in (script.pid, *self.processes()):
            os.kill(process, signal.SIGTERM)

    def requeued(self) -> list[str]:
        """The jobs that the script asked to queue again."""
        file = self.folder / "requeued"
        return file.read_text().split() if file.exists() else []
