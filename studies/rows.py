"""The runner of rows: trains and measures what tables and the arena lack, in an order that can be stopped.

A row is a label and its commands, [(file that it makes, words)]. What is finished is not run again, and a
file that several rows need is made once, by the first of them.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
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
    sources = [words[i + 1] for i, word in enumerate(words) if word in ("--ckpt", "--tokenizer", "compare")]
    if not all(os.path.exists(p) and os.stat(p).st_mtime < path.stat().st_mtime for p in sources):
        return False
    if "compare" in words:
        return True
    num, result = int(words[words.index("--num") + 1]) if "--num" in words else None, read_result(path)
    alike = result["extractor"] == words[words.index("--extractor") + 1]
    return alike and num in (None, result["num_images"])


def missing(rows):
    """[(label, commands still to be run, rows that come first)]: earlier rows, by their place in the list,
    which make a file that this one has or names.

    rows: [(label, [(file that it makes, words)])]
    """
    found, maker = [], {}
    for label, commands in rows:
        left = [(path, words) for path, words in commands
                if str(path) not in maker and not finished(path, words)]
        named = {str(path) for path, _ in commands} | {word for _, words in commands for word in words}
        found.append((label, left, {place for path, place in maker.items() if path in named}))
        maker |= {str(path): len(found) - 1 for path, _ in left}
    return found


class Command:
    """A command at work. What it prints goes to log.txt beside the file that it makes."""

    def __init__(self, path, words, nproc=1, threads=0):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.start, self.log, self.errors = time.time(), path.with_name("log.txt"), tempfile.TemporaryFile()
        launch = [sys.executable]
        if nproc > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        if words[0] != "-m":
            words = [os.path.join(ROOT, words[0]), *words[1:]]
        places = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
        more = dict(PYTHONPATH=places) | (dict(OMP_NUM_THREADS=str(threads)) if threads else {})
        with open(self.log, "a", encoding="utf-8") as log:
            self.child = subprocess.Popen([*launch, *words], stdout=log, stderr=self.errors,
                                          env=os.environ | more)

    def ended(self, wait=False):
        """None while it runs, then "", or why it failed."""
        code = self.child.wait() if wait else self.child.poll()
        if code is None:
            return None
        self.errors.seek(0)
        text = self.errors.read().decode("utf-8", "backslashreplace")
        self.errors.close()
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(text)
        lines = text.strip().splitlines() or ["no message"]
        lines = [line for line in lines if line.startswith("error: ")][-1:] or lines[-1:]
        return f"ended with {code}: {lines[0].removeprefix('error: ')}" if code else ""


def run(rows, nproc=1, workers=1, threads=0, after=None):
    """Makes what is missing, the commands of a row one after the other, `workers` rows at a time.

    A row that fails is left, and the others go on. Ctrl-C reaches the commands too: they save and end first.
    nproc: processes of a command, by torchrun;  threads: of a command, 0: those that torch takes
    after: called with the label of each row whose files are all there
    returns: [what failed];  raises: UserError after Ctrl-C
    """
    rows, spent, failed, begin = missing(rows), {}, [], time.time()
    waiting, busy, done = list(range(len(rows))), {}, set()

    def go_on(i, place):
        """The next command of a row, or its end."""
        label, commands, _ = rows[i]
        if place == len(commands):
            done.add(i)
            try:
                if after:
                    after(label)
            except UserError as error:
                failed.append(f"{label}: {error}")
                print0(f"{label} failed ({error}); the next row goes on")
            return
        path, words = commands[place]
        print0(f"\n{label}: {shown(words, nproc)}")
        busy[i] = place, Command(path, words, nproc, threads)

    def left():
        """In words: how many commands wait, and for how long by those of their kind that were timed."""
        places = dict.fromkeys(waiting, 0) | {i: place for i, (place, _) in busy.items()}
        kinds = [path.stem for i, place in places.items() for path, _ in rows[i][1][place:]]
        known = [sum(spent[kind]) / len(spent[kind]) for kind in kinds if kind in spent]
        return (f"{len(kinds)} commands left, about {sum(known) / min(workers, len(rows)) / 60:.0f} minutes"
                + f" and {len(kinds) - len(known)} of kinds not yet timed" * (len(kinds) > len(known)))

    try:
        while waiting or busy:
            for i in [i for i in waiting if rows[i][2] <= done]:
                if len(busy) < workers:
                    waiting.remove(i)
                    go_on(i, 0)
            for i, (place, command) in list(busy.items()):
                if (why := command.ended()) is None:
                    continue
                del busy[i]
                label, commands, _ = rows[i]
                path, words = commands[place]
                if why:
                    done.add(i)
                    failed.append(f"{label}: {path.name} was not made, its command {why}")
                    print0(f"{label} failed ({why}); the next row goes on")
                    continue
                seconds = time.time() - command.start
                spent.setdefault(path.stem, []).append(seconds)
                go_on(i, place + 1)
                print0(f"{label}, {path.name}: {seconds:.0f} s; {left()}")
            if busy:
                time.sleep(0.05)
    except KeyboardInterrupt:
        raise UserError("stopped; the same command with --run goes on from there", code=130) from None
    finally:  # they save first
        for _, command in busy.values():
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
