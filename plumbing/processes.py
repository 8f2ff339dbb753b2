"""Processes, devices and seeds: all of it does nothing in a run of one process."""

import contextlib
import datetime
import hashlib
import os
import resource
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce  # with a gradient
from tqdm import tqdm

from plumbing.console import print_error
from plumbing.errors import UserError, of_fork, print_traceback, warn
from plumbing.fast import keep_freed_memory


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*words):
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)))


def barrier():
    if dist.is_initialized():
        dist.barrier()


def on_rank0(action):
    """What `action()` returns in the first process, in every process; so is the UserError that it raises."""
    result, error = None, None
    if rank() == 0:
        try:
            result = action()
        except (UserError, OSError) as caught:
            error = (str(caught), getattr(caught, "code", 1))
    if world() > 1:
        outcome = [(result, error)]
        dist.broadcast_object_list(outcome)
        result, error = outcome[0]
    if error:
        raise UserError(*error)
    return result


def fetched(load):
    """What `load()` gives, first in one process alone, which downloads what is missing."""
    if world() > 1:
        on_rank0(lambda: load() is not None)  # one word for the others, not the networks
    return load()


def agreed(request):
    """The largest of all processes' requests, an int. One small all-reduce, on the CPU even beside NCCL."""
    if world() == 1:
        return request
    request = torch.tensor(request)
    dist.all_reduce(request, dist.ReduceOp.MAX)
    return request.item()


def all_reduce_mean(x):
    """Mean of `x` over the processes of a distributed run, `x` itself otherwise. No gradient."""
    if world() > 1:
        x = x.clone()
        dist.all_reduce(x)
        x /= world()
    return x


def all_rows(x):
    """The rows of x of all processes, in the order of their ranks."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@contextlib.contextmanager
def one_line_errors():
    """Around each command: what is wrong ends with one line, and all processes leave together."""
    try:
        yield
        barrier()
    except torch.OutOfMemoryError:
        print_error("out of GPU memory; pass a smaller --micro-batch (train.py), --batch or --num")
        sys.exit(1)
    except Exception as error:
        place = "" if isinstance(error, UserError) else of_fork(error)
        if not place and not isinstance(error, UserError | OSError):
            raise
        print_traceback()
        code = error.code if isinstance(error, UserError) else 1
        if code == 1 or local_rank() == 0:  # bad input is the same in all processes
            print_error(place or error)
        sys.exit(code)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def setup_device(name, timeout=1800):
    """Opens the process group under torchrun (NCCL on GPUs, gloo on CPUs) and returns the device.

    timeout: seconds after which processes that wait for a dead or hung one give up
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    found = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if not found.get(name):
        raise UserError(f"--device must be cuda, cpu, mps or auto, and be there: torch has no {name!r} here")
    if name == "mps":
        warn("nobody has tried --device mps; it lacks float64, which training needs, but may sample")
    gpus, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if name == "cuda" and launched() and wanted > gpus:
        raise UserError(f"{wanted} processes for the {gpus} visible GPUs; lower --nproc_per_node")
    device = torch.device(name, local_rank()) if name == "cuda" else torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.deterministic = True
    else:
        keep_freed_memory()
    if launched() and not dist.is_initialized():
        # After a restart (torchrun --max-restarts) the store still holds the addresses of the dead workers:
        # every attempt gets a prefix of its own (pytorch issue 135712).
        try:
            store, number, size = next(dist.rendezvous("env://"))
        except ValueError as error:
            raise UserError(f"{error}; start with torchrun, or for one process: unset WORLD_SIZE") from None
        store = dist.PrefixStore(f"try{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=number,
            world_size=size, timeout=datetime.timedelta(seconds=timeout))
    return device


@contextlib.contextmanager
def full_float32(x):
    """Around products that choose codes: no autocast on the device of x, and no TF32, which rounds factors to
    10 bits (`setup_device` turns it on for GPUs). Backward passes run outside: their products may be TF32."""
    matmul = torch.backends.cuda.matmul
    was, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        matmul.allow_tf32 = was


def mix(*parts):
    """A 63-bit seed from any numbers and strings, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_rand(*shape, seed):
    """Uniform float32 numbers in [0, 1) that depend on the seed only."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def seeded_rows(batch, *shape, seed):
    """This process's rows of `seeded_rand(batch, *shape)`."""
    return seeded_rand(batch, *shape, seed=seed)[my_rows(batch)]


def my_rows(batch):
    """This process's rows of the global batch. Contiguous, so that the discriminator's groups of four images
    are the same for every number of processes."""
    share = batch // world()
    return slice(rank() * share, (rank() + 1) * share)


def to_device(x, device):
    """x on the device; the host goes on at once, which needs memory that is pinned."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class GlobalBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the global batch, of which all processes hold equal shares, on CPUs too."""

    def forward(self, x):  # (B, C, H, W) -> (B, C, H, W)
        if not self.training or world() == 1:
            return super().forward(x)
        x32 = x.float()
        moments = torch.stack([x32.mean((0, 2, 3)), x32.square().mean((0, 2, 3))])  # (2, C)
        mean, square = all_reduce(moments) / world()
        var = (square - mean.square()).clamp(min=0)  # rounding may leave it below
        with torch.no_grad():
            count = x.numel() // x.shape[1] * world()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        y = x32 * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]
        return y.to(x.dtype)


def launched():
    """Whether torchrun started this process; a RANK that another tool left behind means nothing alone."""
    given = os.environ
    return "WORLD_SIZE" in given and ("MASTER_ADDR" in given or given["WORLD_SIZE"] != "1")


def local_rank():
    """The number of this process on its machine, as torchrun sets it; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def peak_memory():
    """The most memory that this process held so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, but in bytes on macOS
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def bf16_instructions():
    """Whether this CPU computes in bf16; where it does not, oneDNN is ten times slower than in float32."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return supported()
