"""Benchmarks, run by hand and never by pytest.

    PYTHONPATH=. python tests/benchmark.py safety     # what the checks of train.py add to a training step
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import train
from sample import read_checkpoint, save_checkpoint
from visualize import read_metrics


def median_time(function, repeats=30):
    """Seconds of one call, the median of `repeats`."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def safety(stage, folder):
    """Times of the added work beside the time of a step, at the scale of preset cifar10.

    Added: the norm of the gradients, the agreement on signals, the seed, and, at their usual intervals, a log
    line that is synced to disk and a checkpoint that is checked for finite numbers and written twice-safe.
    """
    words = ["--preset", "cifar10", "--data", "shapes", "--out", str(folder), "--set", "judge.steps=2",
             "--limit", "2000", "--eval-every", "0", "--log-every", "5", "--save-every", "1000",
             "--set", "tokenizer.warm_start=0", "--set", "phase1.adv_start=0.0"]
    args, config = train.parse_args(["--stage", stage, "--steps", "40", *words])
    run, path = train.Run(args, config), folder / f"{stage}.pt"
    train.train_stage(run, stage)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["stage"] == stage]
    step = (rows[-1]["seconds"] - rows[1]["seconds"]) / (rows[-1]["step"] - rows[1]["step"])
    ckpt = read_checkpoint(path, [stage])
    checks = median_time(lambda: run.due("save", stage, 0))
    checks += median_time(lambda: torch.manual_seed(train.mix(0, stage, 1, 0)))
    for weights in (ckpt["model"], ckpt["train"].get("disc", {})):
        grads = [torch.randn_like(value) for value in weights.values() if value.is_floating_point()]
        checks += median_time(lambda g=grads: torch.nn.utils.get_total_norm(g).isfinite().item())
    line = median_time(lambda: run.log(stage, 0, lr=0.1, loss_rec=1.0)) / 20
    plain = median_time(lambda: torch.save(ckpt, folder / "plain.pt"), 7)
    safe = median_time(lambda: train.not_finite(ckpt) or save_checkpoint(ckpt, path), 7)
    save = (safe - plain) / min(2000, train.CIFAR10[stage]["steps"] // 10)
    print(f"{stage}: step {step * 1e3:.1f} ms; checks {checks * 1e3:.2f} ms, log {line * 1e3:.3f} ms, "
          f"checkpoint {save * 1e3:.3f} ms a step ({plain:.2f} -> {safe:.2f} s each): "
          f"{(checks + line + save) / step:.2%}")


if __name__ == "__main__":
    if sys.argv[1:] != ["safety"]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as name:
        safety("phase1", Path(name))
        safety("ar", Path(name))
