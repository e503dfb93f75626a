"""What the figures were measured on: processor, memory, revision; and whether it was quiet."""

import datetime
import os
import subprocess
import time

# Vector instructions that decide which kernels run.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe(root):
    """Date, machine and revision."""
    git = lambda *words: output("git", "-C", str(root), *words)  # noqa: E731
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "compiler": output("rustc", "--version"),
        "cpu": cpu(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
    }


def output(*argv):
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


def cpu():
    """A name, and family and model too: virtual machines often keep the name short."""
    lines = open("/proc/cpuinfo").read().split("\n\n")[0].splitlines()
    fields = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    flags = [flag for flag in FLAGS if flag in fields.get("flags", "").split()]
    number = f"family {fields.get('cpu family')}, model {fields.get('model')}"
    return f"{fields.get('model name', 'unknown')} ({', '.join([number, *flags])})"


def cores():
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def busy_share(seconds):
    """The share of all cores that was taken, by this machine or by another one beside it, while this process slept."""
    before = ticks()
    time.sleep(seconds)
    busy, total = (after - earlier for after, earlier in zip(ticks(), before))
    return busy / max(total, 1)


def ticks():
    """Busy and all clock ticks since the start; time stolen by the host counts as busy."""
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, open("/proc/stat").readline().split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    return busy, busy + idle + iowait
