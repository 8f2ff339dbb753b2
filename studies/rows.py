"""The runner of rows: trains and measures what tables and the arena lack, in an order that can be stopped.

A row is a label and its commands, [(file that it makes, words)]. What is finished is not run again, and a
file that several rows need is made once, by the first of them.
"""

import json
import os
import shlex
import subprocess
import sys
import time

from plumbing.errors import ROOT, UserError
from plumbing.files import header
from plumbing.processes import print0
from studies.metrics import read_result


def measure(ckpt, extractor, references, out, *words):
    """The command that measures a checkpoint: (file that it makes, words)"""
    return out, ["-m", "studies", "metrics", "--ckpt", str(ckpt), "--extractor", str(extractor),
                 "--references", str(references), *map(str, words), "--out", str(out)]


def compare(ckpt, out, *words):
    """The command that trains the probe on the tokens of a checkpoint: (file that it makes, words)"""
    return out, ["-m", "studies", "compare", str(ckpt), *map(str, words), "--out", str(out)]


def passed(args, *keys):
    """The words of flags that were given a value."""
    values = {key: getattr(args, key) for key in keys}
    return [word for key, value in values.items() if value and value != "auto"
            for word in (f"--{key}", str(value))]


def shown(words, nproc=1):
    """A command as one would type it."""
    many = f"torchrun --standalone --nproc_per_node={nproc}"
    return f"{many if nproc > 1 else 'python'} {shlex.join(words)}"


def finished(path, words):
    """Whether a command need not be run again: its checkpoint has all its steps, or its result is newer than
    what was measured and of the same extractor and number."""
    if not path.exists():
        return False
    if path.suffix == ".pt":
        try:
            ckpt = header(path)
        except UserError:  # train.py sets it aside and takes the one before
            return False
        section = "classifier" if ckpt["stage"] in ("vgg", "resnet") else ckpt["stage"]
        return ckpt["step"] >= ckpt["config"][section]["steps"]
    told = dict(zip(words, words[1:], strict=False))  # {flag: its value}, and what is compared
    sources = [told[word] for word in ("--ckpt", "--tokenizer", "compare") if word in told]
    sources += [p for p in [told.get("--extractor", "")] if os.path.isfile(p)]  # not inception or lite0
    if not all(os.path.exists(p) and os.stat(p).st_mtime < path.stat().st_mtime for p in sources):
        return False
    if "compare" in told:
        return True
    result = read_result(path)
    alike = result["extractor"] == told["--extractor"]
    return alike and told.get("--num", str(result["num_images"])) == str(result["num_images"])


def missing(rows):
    """[(label, commands still to be run, what comes first)]: files that this row has or names and an earlier
    one makes, {file: place of that row in the list}.

    rows: [(label, [(file that it makes, words)])]
    """
    found, maker = [], {}
    for label, commands in rows:
        left = [(path, words) for path, words in commands
                if str(path) not in maker and not finished(path, words)]
        named = {str(path) for path, _ in commands} | {word for _, words in commands for word in words}
        found.append((label, left, {path: place for path, place in maker.items() if path in named}))
        maker |= {str(path): len(found) - 1 for path, _ in left}
    return found


class Command:
    """A command at work. What it prints goes to log.txt beside the file that it makes."""

    def __init__(self, path, words, nproc=1, threads=0):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.start, self.log = time.time(), path.with_name("log.txt")
        launch = [sys.executable]
        if nproc > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        if words[0] != "-m":
            words = [os.path.join(ROOT, words[0]), *words[1:]]
        places = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
        more = dict(PYTHONPATH=places) | (dict(OMP_NUM_THREADS=str(threads)) if threads else {})
        with open(self.log, "ab") as log:
            self.before = log.tell()
            self.child = subprocess.Popen([*launch, *words], stdout=log, stderr=log, env=os.environ | more)

    def ended(self, wait=False):
        """None while it runs, then "", or why it failed."""
        code = self.child.wait() if wait else self.child.poll()
        if not code:
            return None if code is None else ""
        lines = self.log.read_bytes()[self.before :].decode("utf-8", "backslashreplace").split("\n")
        lines = [line for line in lines if line.strip()] or ["no message"]
        told = [line for line in lines if line.startswith("error: ")] or lines
        return f"ended with {code}: {told[-1].removeprefix('error: ')}"


def run(rows, nproc=1, workers=1, threads=0, after=None):
    """Makes what is missing, the commands of a row one after the other, `workers` rows at a time.

    A row that fails is left, and the others go on. Ctrl-C reaches the commands too: they save and end first.
    nproc: processes of a command, by torchrun;  threads: of a command, 0: those that torch takes
    after: called with the label of each row whose files are all there
    returns: [what failed];  raises: UserError after Ctrl-C
    """
    rows, begin, failed, at_work = missing(rows), time.time(), [], {}
    waiting, busy, done = list(range(len(rows))), {}, set()
    count, made = sum(len(commands) for _, commands, _ in rows), set()

    def ready(i):
        return all(path in made or place in done for path, place in rows[i][2].items())

    def steps(label, commands):
        """A row: yields as long as a command is at work."""
        for path, words in commands:
            print0(f"\n{label}: {shown(words, nproc)}")
            at_work[label] = command = Command(path, words, nproc, threads)
            while (why := command.ended()) is None:
                yield
            del at_work[label]
            if why:
                raise UserError(f"{path.name} was not made, its command {why}")
            made.add(str(path))
            minutes = (time.time() - begin) / 60 / len(made) * (count - len(made))
            print0(f"{label}, {path.name}: {time.time() - command.start:.0f} s; {len(made)} of {count} done, "
                   f"about {minutes:.0f} minutes left")
        if after:
            after(label)

    try:
        while waiting or busy:
            for i in [i for i in waiting if ready(i)][: workers - len(busy)]:
                waiting.remove(i)
                busy[i] = steps(*rows[i][:2])
            for i, row in list(busy.items()):
                try:
                    if next(row, "ended") is None:
                        continue
                except UserError as error:
                    failed.append(f"{rows[i][0]}: {error}")
                    print0(f"{failed[-1]}; the next row goes on")
                del busy[i]
                done.add(i)
            time.sleep(0.05 if busy else 0)
    except KeyboardInterrupt:
        raise UserError("stopped; the same command with --run goes on from there", code=130) from None
    finally:  # they save first
        for command in at_work.values():
            command.ended(wait=True)
    print0(f"\n{time.time() - begin:.0f} s" + "".join(f"\nfailed: {line}" for line in failed))
    return failed


def seconds_of(path):
    """What a file took, by itself: a checkpoint of ours, a result, or a comparison of one tokenizer."""
    if path.suffix == ".pt":
        return header(path)["seconds"]
    if isinstance(found := json.loads(path.read_text()), list):
        return found[0]["seconds"]
    return read_result(path)["seconds"]
