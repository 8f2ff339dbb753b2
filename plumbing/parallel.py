"""A network in several processes, and the micro-batches of a step."""

import contextlib
import warnings

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from plumbing.compiling import compile_network
from plumbing.processes import world

WARM_UP = 2  # passes through a network in DDP before its state is loaded


def wrap(model, example, device, autocast, compiled=False):
    """DDP over all processes, compiled on demand; the module itself in a run of one process.

    example: arguments of one forward pass. DDP lays out its gradient buckets anew after the first step
    of a process, and three or more processes then add in another order. Two passes without effect
    bring this forward, so that a resumed run adds as an unbroken one does.
    """
    net = model
    if world() > 1:
        device_ids = [device.index] if device.index is not None else None
        with warnings.catch_warnings():  # torch 2.14 gives broadcast_buffers a new name
            warnings.simplefilter("ignore", FutureWarning)
            net, mode = DDP(model, device_ids, broadcast_buffers=False), model.training
        model.eval()
        for _ in range(WARM_UP):
            with autocast:
                output = net(*example)
            total(output).backward()
        model.zero_grad(set_to_none=True)
        model.train(mode)
    if compiled:
        compile_network(model)
    return net


def total(output):
    """The sum of everything in a network's output that carries a gradient."""
    if torch.is_tensor(output):
        return output.float().sum() if output.requires_grad else 0.0
    return sum(total(part) for part in (output.values() if isinstance(output, dict) else output))


def accumulate(net, parts):
    """Yields the micro-batches of a step; DDP synchronises gradients in the last backward only."""
    parts = list(parts)
    for i, part in enumerate(parts):
        with net.no_sync() if isinstance(net, DDP) and i + 1 < len(parts) else contextlib.nullcontext():
            yield part
