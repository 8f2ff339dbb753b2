"""Checks of tensors at the public boundary of the priors."""

import contextlib

import torch


def check(name, x, shape, dtype=None, below=None, batch=None):
    """ValueError unless x is (B, *shape), of `dtype` and, where `below` is given, of values in [0, below).

    Reading values waits for the device, so training leaves it out. batch: B, or None for any
    """
    sizes = ((batch or len(x)) if x.ndim else None, *shape)
    if tuple(x.shape) != sizes or dtype not in (None, x.dtype):
        wanted = ", ".join([str(batch or "B"), *map(str, shape)])
        kind = f" {str(dtype).removeprefix('torch.')}" if dtype else ""
        raise ValueError(f"{name}: expected ({wanted}){kind}, got {tuple(x.shape)} {x.dtype}")
    if below is not None and not bool(((x >= 0) & (x < below)).all()):
        raise ValueError(f"{name}: expected values in [0, {below})")


def with_defaults(defaults, given):
    """The settings of a sampler, {name: value}.  raises: TypeError for a name that has no default"""
    unknown = given.keys() - defaults.keys()
    if unknown:
        raise TypeError(f"generate has no setting {min(unknown)!r}, it has {', '.join(defaults)}")
    return defaults | given


def check_labels(labels, batch_size, num_classes, values=False):
    """ValueError unless labels is None or (batch_size,) int64, with `values` in [0, num_classes)."""
    if labels is None:
        return
    if num_classes == 0:
        raise ValueError("this prior is unconditional (num_classes=0): labels must be None")
    check("labels", labels, (), torch.int64, num_classes if values else None, batch_size)


@contextlib.contextmanager
def eval_mode(module):
    """Dropout off inside the `with`, the old mode restored after it, so sampling may interrupt training."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
