"""A network in several processes and under the compiler, and the micro-batches of a step."""

import contextlib
import warnings

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from plumbing.errors import UserError
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
        quantizer = getattr(model, "quantizer", None)
        if quantizer is not None:  # random keys, collectives and branches on the step stay outside
            quantizer.forward = torch.compiler.disable(quantizer.forward)
        model.compile()
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


def check_compiler(device):
    """Compiles a tiny function, as --compile will compile the networks in their first step.

    raises: UserError if that fails, mostly for want of a compiler: C++ on a CPU, C on a GPU (for Triton)
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds, with dozens of lines
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0]).strip()
        wanted = "C++ compiler (g++, or what CXX names)"
        if device.type == "cuda":
            wanted = "C compiler (gcc, or what CC names)"
        raise UserError(f"--compile does not work here: {reason}. Install a {wanted}, or leave --compile "
                        "out") from None
