"""Weights and images as hashes, and whether weights are finite."""

import hashlib

import torch


def not_finite(thing, name=""):
    """The name of the first tensor in nested dicts and lists that holds an infinity or a nan, else ''."""
    if torch.is_tensor(thing):
        return "" if thing.isfinite().all() else name
    parts = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, list) else ()
    return next(filter(None, (not_finite(part, f"{name}.{key}") for key, part in parts)), "")


def weights_hash(*modules, skip=None):
    """16 hex digits over the names and bits of all weights, of modules or of state dicts, but those whose
    name begins with `skip`."""
    digest = hashlib.sha256()
    for module in modules:
        weights = module if isinstance(module, dict) else module.state_dict()
        for name, tensor in sorted(weights.items()):
            if skip is None or not name.startswith(skip):
                digest.update(name.encode())
                bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(bits.numpy().tobytes())
    return digest.hexdigest()[:16]


def latent_hash(tokenizer):
    """Hash of everything that decides the tokens of an image: all weights but the decoder's."""
    return weights_hash(tokenizer, skip="decoder.")


def digests(images):
    """A hash of the pixels of each image: (B, ...) uint8 on the CPU -> (B, 8) uint8."""
    found = [hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest() for image in images]
    return torch.tensor([list(digest) for digest in found], dtype=torch.uint8)
