"""Runs programs so that nothing of them is left behind."""

import os
import signal
import subprocess

# A program that takes longer hangs.
SECONDS = 3600


def run(argv, cwd=None, check=True, **environment):
    """Runs a program to its end, in a process group of its own, so that what it starts ends with it."""
    argv = list(map(str, argv))
    env = {**os.environ, **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(argv, cwd=cwd, env=env, text=True, start_new_session=True, **pipes)
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        end_group(process.pid)
    if check and process.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)} ended with {process.returncode}: {err.strip()[-500:]}")
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def end_group(group):
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
