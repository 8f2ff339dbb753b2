"""Shows a run in TensorBoard or Weights & Biases while it goes: `python -m studies watch runs/demo`.

It follows metrics.jsonl and the pictures in the folder of a run, from beside: training knows nothing of it,
and a watcher that is stopped or fails disturbs nothing. Both packages are installed only where wanted.

    pip install tensorboard; python -m studies watch runs/demo; tensorboard --logdir runs/demo/tensorboard
    pip install wandb; WANDB_MODE=offline python -m studies watch runs/demo --to wandb
"""

import contextlib
import importlib
import json
import sys
import time

import numpy as np

from plumbing.errors import UserError
from plumbing.images import BadImage, load_rgb
from plumbing.processes import print0
from recipes.flags import STAGES


def package(name):
    """raises: UserError where it is not installed"""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"--to {name} needs its package: pip install {name}") from None


class TensorBoard:
    """Event files in RUN/tensorboard, written anew; a TensorBoard that is open forgets the old ones."""

    def __init__(self, run):
        package("tensorboard")
        for old in (run / "tensorboard").glob("events.out.tfevents.*"):
            old.unlink()
        writer = package("torch.utils.tensorboard").SummaryWriter
        self.writer = writer(str(run / "tensorboard"), purge_step=0, flush_secs=5)
        self.close = self.writer.close

    def row(self, stage, step, numbers):
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, name, pixels, step):
        self.writer.add_image(name, pixels, step, dataformats="HWC")
        self.writer.flush()


class WandB:
    """A run of the project `seqgan`; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, run):
        self.wandb = package("wandb")
        try:
            self.run = self.wandb.init(project="seqgan", name=run.absolute().name, dir=str(run))
        except self.wandb.errors.Error as error:
            raise UserError(f"wandb does not start ({error}); wandb login, or WANDB_MODE=offline") from None
        for stage in (*STAGES, "resnet"):  # each counts its own steps
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.close = self.run.finish

    def row(self, stage, step, numbers):
        self.run.log(numbers | {f"{stage}/step": step})

    def picture(self, name, pixels, step):
        self.run.log({name: self.wandb.Image(pixels)})


TARGETS = {"tensorboard": TensorBoard, "wandb": WandB}


def watch(args):
    """Hands on what the folder of a run holds, and without --once what is added, until Ctrl-C.

    A run that is resumed takes out of metrics.jsonl what it will repeat; then all is handed on anew.
    raises: UserError for no folder
    """
    run = args.run
    if not run.is_dir():
        raise UserError(f"{run} is no folder of a run")
    target, told, times, step = TARGETS[args.to](run), [], {}, 0
    print0(f"handing {run} on to {args.to}" + ("" if args.once else "; Ctrl-C ends watching"))
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            log = run / "metrics.jsonl"
            lines = log.read_text().splitlines(keepends=True) if log.exists() else []
            lines = [line for line in lines if line.endswith("\n")]  # the last may be half written
            if lines[: len(told)] != told:
                target.close()
                target, told, times = TARGETS[args.to](run), [], {}
            for line in lines[len(told) :]:
                with contextlib.suppress(json.JSONDecodeError):  # torn by a kill
                    row = json.loads(line)
                    step, stage = row["step"], row["stage"]
                    target.row(stage, step, {f"{stage}/{key}": value for key, value in row.items()
                                             if isinstance(value, int | float) and key != "step"})
            for path in sorted(run.glob("[!.]*.png")):  # not those that are being written
                with contextlib.suppress(OSError, BadImage):
                    changed = path.stat().st_mtime_ns
                    if times.get(path) != changed:
                        target.picture(path.stem, np.asarray(load_rgb(path)), step)
                        times[path] = changed
            told = lines
            if args.once:
                break
            time.sleep(args.every)
    target.close()


if __name__ == "__main__":
    print("error: the command is now: python -m studies watch", file=sys.stderr)
    sys.exit(2)
