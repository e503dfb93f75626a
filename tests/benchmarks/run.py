"""Measures Plumb and what a user would pick instead, in one run, and renders BENCHMARKS.md from it.

Every round takes all measurements one after the other, Plumb's right before those it is compared with. Raw values go
to a JSON file as they come; `--from` renders such a file again. Only rendering needs requirements.txt.
"""

import argparse
import pathlib
import signal
import subprocess
import sys
import tempfile

import machine
import measure
import peers
import tables
from recorder import Recorder

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/benchmarks"

EXAMPLES = """\
examples:
  # Everything, about ten minutes a round on two cores
  python tests/benchmarks/run.py --peers ~/peers --scripts ~/scripts --texts helpful.jsonl.gz --texts harmless.jsonl.gz

  # More rounds of what scatters
  python tests/benchmarks/run.py --peers ~/peers --scripts ~/scripts --only score --add tests/benchmarks/results/X.json

  # Some of it: prints the tables, and leaves BENCHMARKS.md alone
  python tests/benchmarks/run.py --peers ~/peers --scripts ~/scripts --only score decode --rounds 1

  # Render again
  pip install -r tests/benchmarks/requirements.txt
  python tests/benchmarks/run.py --from tests/benchmarks/results/2026-01-31-0123abc.json

PEERS holds the models pm/ and smollm2/, a *.gguf file below whl/, and the environments torch/, vllm/ and llama/.
SCRIPTS holds score_torch.py, score_vllm.py and generate_vllm.py. What is missing is left out, and said.
Nothing else should run on the machine.

measurements:
"""


def main():
    options = parse()
    # Let servers be ended on the way out, however the run ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.results:
        return render(options.results)
    path = options.add or options.out or default_path(options)
    recorder = take(options, path)
    print(f"\n{tables.text(recorder.results)}\nresults are in {path}")
    if recorder.results["failures"]:
        sys.exit(f"{len(recorder.results['failures'])} measurements failed; nothing was rendered")
    if options.add or not options.quick and not options.only:
        render(path)


def parse():
    names = "".join(f"  {name:8} {function.__doc__.splitlines()[0]}\n" for name, function in measure.ALL.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES + names, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peers", type=pathlib.Path, metavar="PEERS", help="folder with models and other software")
    add("--scripts", type=pathlib.Path, metavar="SCRIPTS", help="folder with the scripts that time other software")
    add("--texts", type=pathlib.Path, metavar="FILE", action="append", default=[],
        help="JSONL, plain or gzipped, with chosen and rejected texts; repeat for several")  # fmt: skip
    add("--rounds", type=int, default=3, metavar="N", help="rounds (default: %(default)s)")
    add("--only", nargs="+", choices=measure.ALL, metavar="NAME", help="only these measurements; renders nothing")
    add("--add", type=pathlib.Path, metavar="FILE", help="add the rounds to these results, then render")
    add("--out", type=pathlib.Path, metavar="FILE", help="results (default: DATE-REVISION.json in results/)")
    add("--no-build", action="store_true", help="take the server and client in target/release as they are")
    add("--quick", action="store_true", help="tiny sizes, to try the script; renders nothing")
    add("--from", dest="results", type=pathlib.Path, metavar="FILE", help="render these results; measure nothing")
    options = parser.parse_args()
    if not options.results and not (options.peers and options.scripts):
        parser.error("--peers and --scripts are needed to measure, --from to render")
    return options


def default_path(options):
    if options.quick:
        return pathlib.Path(tempfile.gettempdir()) / "plumb-benchmarks-quick.json"
    about = machine.describe(ROOT)
    return HERE / "results" / f"{about['date'][:10]}-{about['revision'][:7]}.json"


def take(options, path):
    """All rounds; answers the recorder."""
    if not options.no_build:
        build()
    found = peers.Peers(options.peers.expanduser().resolve(), options.scripts.expanduser().resolve())
    recorder = Recorder(path, options, machine.describe(ROOT), found, ROOT)
    names = options.only or list(measure.ALL)
    with tempfile.TemporaryDirectory(prefix="plumb-benchmarks-") as folder:
        recorder.names.append((folder, "TEMP"))
        job = measure.Job(ROOT, found, recorder, options, pathlib.Path(folder))
        for number in range(recorder.first, recorder.rounds + 1):
            recorder.begin(number, machine.busy_share(seconds=2))
            for name in names:
                if number > 1 and name in measure.ONCE and not options.only:
                    continue
                with recorder.guard(name):
                    measure.ALL[name](job)
    return recorder


def build():
    """Everything that is timed, before the first measurement, so that no compiler runs beside one."""
    for line in (
        "cargo build --release -p plumb-server -p plumb-client -p plumb-trainer",
        "cargo bench --no-run -p plumb-kernels --bench kernels",
        "cargo bench --no-run -p plumb-model --bench forward",
        "cargo bench --no-run -p plumb-trainer --bench step",
    ):
        subprocess.run(line.split(), cwd=ROOT, check=True)


def render(path):
    results = tables.load(path)
    try:
        import plots
    except ImportError as error:
        sys.exit(f"{error}: pip install -r tests/benchmarks/requirements.txt, then run.py --from {path}")
    for drawn in plots.draw(results, HERE / "plots"):
        print(f"drew {drawn}")
    tables.write(results, ROOT / "BENCHMARKS.md", path.resolve())
    print("wrote BENCHMARKS.md")


if __name__ == "__main__":
    main()
