"""A run: its folder, device, data and log, and how it begins, goes on, saves and ends."""

import contextlib
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing.compiling import check_compiler
from plumbing.data import load_data
from plumbing.dataset import batches
from plumbing.errors import UserError, warn
from plumbing.files import (
    FORMAT, claim, newest_intact, read_checkpoint, read_metrics, save_atomic, save_checkpoint, save_text,
    writable,
)
from plumbing.hashes import not_finite, weights_hash
from plumbing.images import make_sheet, to_float
from plumbing.models import vgg_of
from plumbing.parallel import wrap
from plumbing.processes import (
    agreed, all_reduce_mean, barrier, bf16_instructions, mix, on_rank0, peak_memory, print0, rank,
    setup_device, world,
)
from plumbing.progress import HIDDEN, Progress
from plumbing.signals import listening
from plumbing.stages import DEPENDS, SECTION, refuse_other_config, refuse_other_images
from plumbing.validation import early_warnings
from plumbing.weights import load_lpips


class Run:
    """The run folder, the device, the data and the log: what every stage needs besides its own networks.

    A stage calls `wrap` for each network that it trains, `start` (which goes on from <stage>.pt), `loop` for
    its steps, `update` for each optimizer, and at the end of a step `due` with `log`, `save` and so on.
    """

    def __init__(self, args, config):
        self.args, self.config = args, config
        self.out = args.out or Path("runs") / (args.preset + "-quick" * args.quick)
        writable(self.out / "metrics.jsonl")
        self.device, self.parent = setup_device(args.device, args.timeout), os.getppid()
        if args.compile:
            check_compiler(self.device)
        slow = self.device.type == "cpu" and not bf16_instructions()
        if slow and config["precision"] == "bf16" and not args.precision:
            print0("note: this CPU has no bf16 instructions, so all is float32; --precision bf16 insists")
            self.config = config = dict(config, precision="fp32")
        self.train, self.val = load_data(config)
        self.fingerprint = on_rank0(lambda: [self.train.fingerprint, self.val.fingerprint])
        self.train.bad_list = self.val.bad_list = self.out / "bad_files.txt"
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=config["precision"] == "bf16")
        self.note = "random VGG weights: a test run" if config["vgg"] == "random" else ""
        if args.quick:
            self.note = "--quick: a test run"
            print0(f"note: {self.note}, with all schedules scaled down; pictures and checkpoints say so")
        self.lock, self.request, self.agreed, self.in_loop, self.place = None, 0, 0, False, "the start"
        self.opened, self.progress = None, Progress({}, "")

    @cached_property
    def vgg(self):
        """The frozen VGG of the perceptual loss, see `vgg_of`."""
        return vgg_of(self)

    @cached_property
    def lpips(self):
        """LPIPS as a loss: the run's VGG-16 under the package's linear layers."""
        return load_lpips(self.config["vgg"], self.device)

    def steps(self, stage):
        return self.config[SECTION[stage]]["steps"]

    def wrap(self, model, *example):
        """`model` in DDP and compiled, as the command asks. example: arguments of one forward pass"""
        return wrap(model, example, self.device, self.autocast, self.args.compile)

    def example(self):
        """Images of the size of a run, for `wrap`."""
        S = self.config["image_size"]
        return torch.zeros(min(self.args.micro_batch or 4, 4), 3, S, S, device=self.device)

    def micro(self, x):
        """This process's part of a batch, cut into micro-batches."""
        return x.split(self.args.micro_batch or len(x))

    def stream(self, batch, start):
        """`batches` of the training images; `train_stage` closes it, in whatever way the stage ends."""
        self.opened = batches(self.train, batch, start, self.args.workers, self.args.timeout)
        return self.opened

    def close_stream(self):
        if self.opened:
            self.opened.close()

    def images(self, batch, start):
        """Endless training images (B, 3, S, S) in [-1, 1]: this process's share, from step `start` on."""
        for pixels, _ in self.stream(batch, start):
            yield to_float(pixels, self.device)

    def backward(self, loss, share, /, **terms):
        """Gradients of one micro-batch, a `share` of the batch; `means` sums its terms up for the log."""
        (loss * share).backward()
        for name, value in terms.items():
            if value is not None:
                self.means[name] = self.means.get(name, 0) + share * value.detach()

    def claim(self):
        """Makes the run folder and locks it, once."""
        self.lock = self.lock or claim(self.out)

    def start(self, stage, made_from=None, **state):
        """Goes on from <stage>.pt where there is one: loads it, cuts the log to fit, returns the steps done.

        made_from: hash of the tokenizer that this stage builds on; a checkpoint of another one is refused.
        """
        path, c, self.made_from = self.out / f"{stage}.pt", self.config[SECTION[stage]], made_from
        on_rank0(self.claim)
        seen = stage in ("phase1", "phase2") and c["layers"] != "lpips" and "vgg" in self.__dict__  # loaded
        self.seen_by = weights_hash(self.vgg) if seen else None
        step, seconds, self.skips = 0, 0.0, {}
        file = on_rank0(lambda: newest_intact(path))
        if file:
            ckpt = read_checkpoint(file, [stage])
            refuse_other_config(file, DEPENDS[stage], ckpt["config"], self.config)
            if made_from not in (None, ckpt["tokenizer_hash"]):
                raise UserError(f"{file} was made with tokenizer {ckpt['tokenizer_hash']}, not with "
                                f"{made_from} as here; move {path} and {stage}.previous.pt away, or use "
                                "another --out")
            if self.seen_by not in (None, ckpt.get("vgg_hash", self.seen_by)):
                raise UserError(f"{file} was trained with another VGG than that of here (more steps, or "
                                "another --vgg); use that one, or another --out")
            refuse_other_images(file, ckpt, self)
            if ckpt["world"] != world():
                print0(f"note: {ckpt['world']} processes wrote {file} and {world()} go on: the batches are "
                       "the same, the last bits of sums and the draws of dropout are not")
            for name, thing in state.items():
                if thing is not None:
                    thing.load_state_dict(ckpt["model"] if name == "model" else ckpt["train"][name])
            step, seconds = ckpt["step"], ckpt["seconds"]
            if stage == "phase1" and self.args.tokenizer:
                print0(f"note: {file} goes on; --tokenizer {self.args.tokenizer} is where a new one begins")
            self.skips = {name: torch.tensor(n, device=self.device) for name, n in ckpt["skips"].items()}
        share = f"{c['batch']} images" + (f" = {world()} processes x {c['batch'] // world()}" * (world() > 1))
        name = self.progress.name(stage)
        if step >= c["steps"]:
            print0(f"\n{name}: {file or path} has all its steps: nothing to do")
        else:
            print0(f"\n{name}: step {step} of {c['steps']}, {share} a step, lr {c['lr']}, "
                   f"{self.config['precision']} -> {path}")
        if step < c["steps"] and c["ema"] ** c["steps"] > 0.15 and rank() == 0:  # of what it began with
            warn(f"{SECTION[stage]}.ema={c['ema']:g} is slow for {c['steps']} steps: the averaged weights, "
                 "which are measured and used, will be near those of the start; lower it with --set")
        self.clock, self.warned = time.time() - seconds, set()
        self.rows = on_rank0(lambda: self.cut_log(stage, step))
        return step

    def cut_log(self, stage, step):
        """Takes what a later start repeats out of metrics.jsonl, and returns this stage's rows."""
        log = self.out / "metrics.jsonl"
        rows = [row for row in read_metrics(log) if row["stage"] != stage or row["step"] <= step]
        if log.exists():
            save_text("".join(json.dumps(row) + "\n" for row in rows), log)
        return [row for row in rows if row["stage"] == stage]

    def loop(self, stage, start):
        """Step numbers with a progress bar; seeds every random draw of the step, and ends when asked to."""
        self.bar = tqdm(range(start, self.steps(stage)), self.progress.name(stage), initial=start,
                        total=self.steps(stage), disable=None if rank() == 0 else True, dynamic_ncols=True)
        self.in_loop = True
        self.progress.begin(start)
        try:
            for step in self.bar:
                self.place, self.means = f"{stage} step {step + 1}", {}
                torch.manual_seed(mix(self.config["seed"], stage, step, rank()))
                yield step
                if self.agreed > 1:
                    barrier()
                    sys.exit(self.agreed)
                if self.agreed == self.request:
                    self.request = 0
        finally:
            self.in_loop = False

    @contextlib.contextmanager
    def session(self, stages=()):
        """Around all stages of a command: signals are answered, and errors of torch become one line."""
        begin = time.time()
        self.progress = Progress({stage: self.steps(stage) for stage in stages}, self.args.preset)
        if self.args.ablation:
            sets = (f"--set {k}={v}" for k, v in self.args.expanded.items())
            print0(f"ablation {self.args.ablation}:", *sets)
        with listening(self):
            try:
                yield
            except RuntimeError as error:
                if re.match("DataLoader|Caught RuntimeError in DataLoader", str(error)):  # at any moment
                    raise UserError(f"{str(error).splitlines()[0]} Too little memory, or /dev/shm full? Try "
                                    "--workers 0; the same command goes on from the last checkpoint",
                                    code=1) from None
                if world() > 1 and re.search("gloo|nccl|connection|timed out", str(error), re.I):
                    warn(f"{self.place}: another process died or hangs; the same command goes on")
                raise
        bad = self.out / "bad_files.txt"
        if bad.exists():
            count = bad.read_bytes().count(b"\n")
            print0(f"note: {count} images could not be read, see {bad}")
        memory = peak_memory()
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**20
        print0(f"\ndone in {time.time() - begin:.0f} s, {memory:.0f} MB peak memory; see {self.out}/")

    def due(self, what, stage, step):
        """Is it time, after `step` + 1 updates, to "log", "eval" or "save"? Always after the last one, but
        --eval-every 0 never evaluates. All processes agree that it is time to save once one was asked to,
        or once torchrun, their parent, is gone."""
        if what == "save":
            orphaned = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent
            self.agreed = agreed(128 + signal.SIGTERM if orphaned else self.request)
            if self.agreed:
                return True
        steps, times = self.steps(stage), 1 if self.args.quick else 5
        default = {"eval": max(1, steps // times), "save": min(2000, max(1, steps // 10))}
        every = getattr(self.args, f"{what}_every")
        if what == "eval" and every == 0:
            return False
        every = every or default[what]
        return (step + 1) % every == 0 or step + 1 == steps

    def update(self, optimizer, name, clip=0.0):
        """optimizer.step(), which changes nothing if a gradient is not finite. The host does not wait for
        that: fused optimizers read `found_inf` themselves, and `skips` counts on the device.

        clip: the gradients' norm is cut to this, 0: not. Gradients are equal in all processes, so all skip or
        none.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        bad = 1 - norm.isfinite().long()
        in_a_row, skipped = self.skips.setdefault(name, torch.zeros(2, dtype=torch.int64, device=self.device))
        self.skips[name] = torch.stack([(in_a_row + 1) * bad, skipped + bad])
        optimizer.found_inf = bad.to(torch.float32)
        optimizer.step()

    def count_skips(self):
        """{optimizer: updates skipped so far}, read at log lines and saves.

        raises: UserError, code 1, if the last MAX_SKIPS or more in a row were skipped
        """
        counts = {name: pair.tolist() for name, pair in self.skips.items()}
        for name, (in_a_row, _) in counts.items():
            if in_a_row >= MAX_SKIPS:
                raise UserError(f"{self.place}: the last {in_a_row} updates of the {name} were skipped, as a "
                                "gradient was not finite; the last save is intact. Try a lower lr, or "
                                "--precision fp32", code=1)
        return {name: skipped for name, (_, skipped) in counts.items()}

    def log(self, stage, step, **values):
        """One line of metrics.jsonl, means over processes; tensors are read here and nowhere else."""
        names = [name for name, value in values.items() if torch.is_tensor(value)]
        if names:
            means = all_reduce_mean(torch.stack([values[n].detach().float() for n in names])).tolist()
            values.update(zip(names, means, strict=True))
        values = {k: float(f"{v:.6g}") if math.isfinite(v) else None for k, v in values.items()}
        values |= {f"skipped_{name}": skipped for name, skipped in self.count_skips().items() if skipped}
        row = dict(stage=stage, step=step + 1, **values, seconds=round(time.time() - self.clock, 1))
        self.rows.append(row)

        def append():
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())

        on_rank0(append)
        if rank() == 0:
            seen = {k: v for k, v in values.items() if k not in HIDDEN}
            shown = [f"{k} {v}" if v is None else f"{k} {v:.4g}" for k, v in seen.items()]
            if stage in self.progress.steps and "lr" in values:  # of the loop, not of a validation
                words = self.progress.words(stage, step)
                self.bar.set_postfix_str("".join(words[3:]))
                shown += [f"({', '.join(words)})"] * bool(self.bar.disable)  # no terminal shows the bar
            print0(f"{stage} {step + 1:>6}  " + "  ".join(shown))
            K = self.config["tokenizer"].get("codebook_size", 1024)
            for name, message in early_warnings(self.rows, stage, self.config[SECTION[stage]], K).items():
                if name not in self.warned:
                    self.warned.add(name)
                    warn(f"{stage} step {step + 1}: {message}")

    def save(self, stage, step, model, ema=None, tokenizer_hash=None, **train):
        """Writes <stage>.pt after `step` + 1 updates, once all processes are found to hold equal weights."""
        self.count_skips()
        if self.made_from not in (None, tokenizer_hash):
            raise RuntimeError("phase 2 changed the encoder or the codebook")
        if world() > 1:
            hashes = [None] * world()
            modules = [thing for thing in (model, ema, *train.values()) if isinstance(thing, torch.nn.Module)]
            dist.all_gather_object(hashes, weights_hash(*modules))
            if len(set(hashes)) > 1:
                raise RuntimeError(f"weights differ between processes after step {step + 1}: {hashes}")
        config = asdict(model.config) if hasattr(model, "config") else model.sizes
        config = {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}
        ckpt = dict(
            format=FORMAT, stage=stage, step=step + 1, config=self.config, model_config=config,
            model=model.state_dict(), ema=ema and ema.module.state_dict(),
            class_names=self.train.class_names, fingerprint=self.fingerprint, tokenizer_hash=tokenizer_hash,
            vgg_hash=self.seen_by, note=self.note, world=world(), seconds=time.time() - self.clock,
            skips={name: pair.tolist() for name, pair in self.skips.items()},
            train={name: thing.state_dict() for name, thing in dict(train, ema=ema).items() if thing})
        bad = not_finite(ckpt)
        if bad:
            raise UserError(f"{stage} step {step + 1}: {bad[1:]} is not finite, so nothing was written; the "
                            "last save is intact. Try a lower lr, or --precision fp32", code=1)
        on_rank0(lambda: save_checkpoint(ckpt, self.out / f"{stage}.pt"))

    def sheet(self, name, images, columns, **words):
        """A picture in the run folder. words: `names` and `sides` of `make_sheet`"""
        picture = make_sheet(images, columns, self.note, **words)
        on_rank0(lambda: save_atomic(lambda p: picture.save(p, "PNG"), self.out / f"{name}.png"))


MAX_SKIPS = 10  # updates with a gradient that is not finite, in a row
