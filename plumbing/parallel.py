"""A network in several processes, and the micro-batches of a step."""

import contextlib
import warnings

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from plumbing.compiling import compile_network
from plumbing.processes import all_reduce_mean, world

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
    return sum(total(one) for one in (output.values() if isinstance(output, dict) else output))


def begin_step(run, tokenizer, optimizer, x, step):
    """The micro-batches of x, after all that comes before their first forward pass.

    K-means overwrites the codebook when it is due, and Adam forgets the moments of the old one. The
    quantizer gets D_bar of the whole global batch.
    """
    for parameter in tokenizer.start_step(step):
        optimizer.state.pop(parameter, None)
    micro = run.micro(x)
    with run.autocast:
        tokenizer.quantizer.global_probs = mean_probs(tokenizer, micro)
    return micro


def mean_probs(tokenizer, micro):
    """D_bar of the global batch where a step has several micro-batches (see VectorQuantizer.usage_loss), None
    where no loss reads it."""
    quantizer, c = tokenizer.quantizer, tokenizer.config
    used = hasattr(quantizer, "probs") and c.codebook == "entropy" and c.entropy_set == "batch"
    if len(micro) == 1 or tokenizer.frozen or not used:
        return None
    with torch.no_grad():
        shares = [len(x) / sum(map(len, micro)) for x in micro]
        probs = [quantizer.probs(tokenizer.encoder(x)) for x in micro]
        return all_reduce_mean(sum(share * p for share, p in zip(shares, probs, strict=True)))


def accumulate(net, micro):
    """Yields the micro-batches of a step; DDP synchronises gradients in the last backward only."""
    micro = list(micro)
    for i, one in enumerate(micro):
        with net.no_sync() if isinstance(net, DDP) and i + 1 < len(micro) else contextlib.nullcontext():
            yield one
