"""Runs a Criterion benchmark of the workspace and reads what it measured."""

import json
import time

import process


def run(root, argv, group, **environment):
    """Medians of a group by function: {"ns": time of an iteration, "per_iteration": its elements or bytes, or None}."""
    begun = time.time()
    process.run(argv, cwd=root, **environment)
    # What an earlier run left does not count.
    found = [path for path in (root / "target/criterion").glob("*/*/new") if fresh(path, begun)]
    read = (pair for pair in map(read_one, found) if pair[0] == group)
    return {function: values for _, function, values in read}


def fresh(folder, begun):
    path = folder / "estimates.json"
    return path.exists() and path.stat().st_mtime >= begun


def read_one(folder):
    about = json.loads((folder / "benchmark.json").read_text())
    estimates = json.loads((folder / "estimates.json").read_text())
    amount = next(iter((about.get("throughput") or {}).values()), None)
    values = {"ns": estimates["median"]["point_estimate"], "per_iteration": amount}
    return about["group_id"], about["function_id"], values
