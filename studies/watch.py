"""Shows a run in TensorBoard or Weights & Biases while it goes: `python -m studies watch runs/demo`.

It follows metrics.jsonl and the pictures in the folder of a run, from beside: training knows nothing of it,
and a watcher that is stopped or fails disturbs nothing. Both packages are installed only where wanted.

    pip install tensorboard; python -m studies watch runs/demo; tensorboard --logdir runs/demo/tensorboard
    pip install wandb; WANDB_MODE=offline python -m studies watch runs/demo --to wandb
"""

import contextlib
import importlib
import json
import time

import numpy as np

from plumbing.errors import InUse, UserError
from plumbing.files import claim
from plumbing.images import BadImage, load_rgb
from plumbing.processes import print0
from studies.commands import moved


def package(name, pip):
    """raises: UserError where it is not installed"""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"--to {pip} needs its package: pip install {pip}") from None


class TensorBoard:
    """Event files in RUN/tensorboard, which are written anew by each watcher."""

    def __init__(self, run):
        package("tensorboard", "tensorboard")
        self.folder = run / "tensorboard"
        for old in self.folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.begin()

    def begin(self):
        """A new file, which takes back what the others say: a TensorBoard that is open reads no deletion."""
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self.writer = writer(str(self.folder), purge_step=0)

    def numbers(self, stage, step, values):
        for name, value in values.items():
            self.writer.add_scalar(f"{stage}/{name}", value, step)

    def picture(self, name, pixels, step):
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def flush(self):
        self.writer.flush()

    def close(self):
        self.writer.close()


class WandB:
    """A run of the project `seqgan`; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, run):
        self.wandb, self.folder = package("wandb", "wandb"), run
        self.begin()

    def begin(self):
        """Another run: nothing can be taken back from one."""
        name = self.folder.absolute().name
        try:
            self.run = self.wandb.init(project="seqgan", name=name, dir=str(self.folder))
        except self.wandb.errors.Error as error:
            raise UserError(f"wandb does not start ({error}); wandb login, or WANDB_MODE=offline") from None
        self.stages = set()

    def numbers(self, stage, step, values):
        if stage not in self.stages:  # each stage counts its own steps
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self.stages.add(stage)
        self.run.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step})

    def picture(self, name, pixels, step):
        self.run.log({name: self.wandb.Image(pixels)})

    def flush(self):
        """wandb sends by itself."""

    def close(self):
        self.run.finish()


TARGETS = {"tensorboard": TensorBoard, "wandb": WandB}


class Follower:
    """What is new in a run folder since it was last asked."""

    def __init__(self, run, target):
        self.run, self.target, self.seen, self.times, self.step = run, target, set(), {}, 0

    def rows(self):
        """The lines that were finished since; a line that is being written waits for the next time.

        The whole file is read. A run that is resumed first takes out of it what it will repeat: then the
        target begins anew, and all lines are new.
        """
        path = self.run / "metrics.jsonl"
        whole = path.read_bytes() if path.exists() else b""
        lines = {hash(line): line for line in whole[: whole.rfind(b"\n") + 1].splitlines()}
        if not self.seen <= lines.keys():
            self.target.close()
            self.target.begin()
            self.__init__(self.run, self.target)
        for key, line in lines.items():
            if key not in self.seen:
                with contextlib.suppress(json.JSONDecodeError):  # torn by a kill
                    row = json.loads(line)
                    self.seen.add(key)
                    yield row

    def follow(self):
        """Hands on what is new; returns how many rows and pictures that were."""
        count = 0
        for row in self.rows():
            values = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
            self.target.numbers(row["stage"], row["step"], values)
            self.step, count = row["step"], count + 1
        for path in sorted(self.run.glob("[!.]*.png")):  # not those that are being written
            try:
                changed = path.stat().st_mtime_ns
                if self.times.get(path) == changed:
                    continue
                pixels = np.asarray(load_rgb(path))
            except (OSError, BadImage):  # being written by something else than train.py
                continue
            self.target.picture(path.stem, pixels, self.step)
            self.times[path], count = changed, count + 1
        self.target.flush()
        return count


def watch(args):
    """Hands on what the folder of a run holds, and without --once what is added, until Ctrl-C.

    raises: UserError for no folder, and for a run that is watched already
    """
    run, to = args.run, args.to
    if not run.is_dir():
        raise UserError(f"{run} is no folder of a run")
    try:
        lock = claim(run / to)
    except InUse:
        raise UserError(f"another process hands {run} on to {to} already; end it first") from None
    with lock:
        follower = Follower(run, TARGETS[to](run))
        print0(f"{follower.follow()} rows and pictures of {run} handed on to {to}"
               + ("" if args.once else "; Ctrl-C ends watching"))
        with contextlib.suppress(KeyboardInterrupt):
            while not args.once:
                time.sleep(args.every)
                follower.follow()


if __name__ == "__main__":
    moved("watch")
