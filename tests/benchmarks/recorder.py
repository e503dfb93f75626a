"""Takes down every value as it is measured, prints it, and keeps the file of results whole all the time."""

import contextlib
import json
import shlex

# Above this share of busy cores before a round, its timings are not worth much.
QUIET = 0.1


class Recorder:
    """`results` is what the file holds: facts about the run, then one record for every value."""

    def __init__(self, path, options, about, peers, root):
        self.path = path
        self.names = [(str(peers.folder), "PEERS"), (str(peers.scripts), "SCRIPTS"), (f"{root}/", "")]
        if options.add:
            self.results = json.loads(path.read_text())
            if self.results["cpu"] != about["cpu"]:
                raise SystemExit(f"{path.name} is from {self.results['cpu']}, this is {about['cpu']}")
            self.first = self.results["rounds"] + 1
            self.rounds = self.results["rounds"] = self.results["rounds"] + options.rounds
            added = {"rounds": options.rounds, "only": options.only, "date": about["date"], "revision": about["revision"]}
            self.results.setdefault("added", []).append(added)
            return
        self.first, self.rounds = 1, options.rounds
        self.results = {
            **about,
            "rounds": options.rounds,
            "quick": options.quick,
            "texts": [text.name for text in options.texts],
            "versions": peers.versions(),
            "left_out": peers.left_out(),
            "busy": [],
            "failures": [],
            "records": [],
        }
        for reason in self.results["left_out"]:
            print(f"left out: {reason}")

    def begin(self, number, busy):
        """A round begins; `busy` is the share of the cores that others took just before."""
        self.round = number
        self.results["busy"].append(round(busy, 3))
        print(f"== round {number} of {self.rounds}")
        if busy > QUIET:
            print(f"warning: the machine is not quiet, {busy:.0%} of the cores are busy")

    def add(self, work, who, value, unit, command, raw=None, **more):
        """A value of this round. `raw` is what it was read from."""
        record = {"round": self.round, "work": work, "who": who, "value": value, "unit": unit, **more}
        self.results["records"].append({**record, "command": self.readable(command), "raw": raw})
        at = f" at {more['at']}" if "at" in more else ""
        print(f"[{self.round}/{self.rounds}] {work}{at}, {who}: {value:,.4g} {unit}", flush=True)
        self.save()

    @contextlib.contextmanager
    def guard(self, name):
        """What fails is taken down, and the rest goes on."""
        try:
            yield
        except Exception as error:
            message = f"round {self.round}, {name}: {type(error).__name__}: {self.shorten(str(error))}"
            self.results["failures"].append(message)
            print(f"failed: {message}", flush=True)
            self.save()

    def save(self):
        """One record a line, so that a difference between two files can be read."""
        facts = {key: value for key, value in self.results.items() if key != "records"}
        head = json.dumps(facts, indent=1)[:-2]
        lines = ",\n".join(f"  {json.dumps(record)}" for record in self.results["records"])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(f'{head},\n "records": [\n{lines}\n ]\n}}\n')

    def readable(self, command):
        return self.shorten(command if isinstance(command, str) else shlex.join(map(str, command)))

    def shorten(self, text):
        """Folders of this machine by their names in the usage."""
        for folder, name in self.names:
            text = text.replace(folder, name)
        return text
