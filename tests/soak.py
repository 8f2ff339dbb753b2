"""A run killed at random moments ends, bit for bit, as an unbroken one. By hand; takes two to three runs.

    PYTHONPATH=. python tests/soak.py --kills 25 --processes 1 --out DIR -- --preset demo
    PYTHONPATH=. python tests/soak.py --kills 25 --processes 2 --out DIR -- --preset demo

What follows `--` goes to train.py --stage all. Each kill is SIGKILL or SIGTERM, to one process or to all.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers import differing, rows

from plumbing.files import read_checkpoint
from recipes.options import STAGES

ROOT = Path(__file__).parent.parent


def start(args, out):
    """The launched command, in a session of its own."""
    launch = [sys.executable]
    if args.processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}"]
    words = [*launch, ROOT / "train.py", "--stage", "all", "--out", out, *args.words]
    log = open(args.out / "log", "a")
    return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def processes_of(out):
    """The numbers of all live processes that have the run folder on their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if str(out).encode() in (folder / "cmdline").read_bytes().split(b"\0") and state != "Z":
                found.append(int(folder.name))
        except OSError:
            continue
    return sorted(found)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for both runs")
    parser.add_argument("words", nargs="*", help="arguments of train.py")
    args = parser.parse_args()
    dice, straight, broken = random.Random(args.seed), args.out / "straight", args.out / "broken"
    args.out.mkdir(parents=True, exist_ok=True)
    if not (straight / "summary.json").exists():
        begin = time.time()
        assert start(args, straight).wait() == 0
        (args.out / "seconds").write_text(str(time.time() - begin))
    seconds = float((args.out / "seconds").read_text())
    print(f"unbroken: {seconds:.0f} s")
    shutil.rmtree(broken, ignore_errors=True)
    begin, kills = time.time(), 0
    while True:
        job, end = start(args, broken), None
        if kills < args.kills:
            end = time.time() + dice.uniform(2, 2 * (seconds / args.kills + 10))  # 10 s: to start
        while job.poll() is None and (end is None or time.time() < end):
            time.sleep(0.05)
        if job.poll() is None:
            number, whole = dice.choice([signal.SIGKILL, signal.SIGTERM]), dice.random() < 0.5
            targets = processes_of(broken)
            for target in targets if whole else [dice.choice(targets)]:
                try:
                    os.kill(target, number)
                except ProcessLookupError:
                    pass
            kills += 1
            code = job.wait()
            log = rows(broken) if (broken / "metrics.jsonl").exists() else []
            place = f"{log[-1]['stage']} {log[-1]['step']}" if log else "the start"
            to = "all" if whole else "one"
            print(f"{kills}: {number.name} to {to} near {place}, exit {code}", flush=True)
            while processes_of(broken):
                time.sleep(0.1)
        elif job.returncode == 0:
            break
        else:
            sys.exit(f"the run ended by itself with exit code {job.returncode}, see {args.out / 'log'}")
    print(f"{kills} kills, {time.time() - begin:.0f} s")
    for stage in STAGES:
        a, b = (read_checkpoint(folder / f"{stage}.pt", [stage]) for folder in (straight, broken))
        names = differing(a, b)
        same_log = rows(straight, stage) == rows(broken, stage)
        print(f"{stage}: {'equal' if not names else f'{len(names)} entries differ: {names[:3]}'}, "
              f"log {'equal' if same_log else 'differs'}")


if __name__ == "__main__":
    main()
