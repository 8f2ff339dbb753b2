"""Checkpoints of other projects, opened as ours: a fork's `opened(raw)` knows its own."""

import torch

import forks
from plumbing.errors import UserError
from recipes import paper


def as_checkpoint(fork, sizes, weights, family, image_size=256):
    """What `read_checkpoint` gives, as of a phase 1 that ended.

    fork, sizes: its tokenizer is built with these;  weights: {our name: tensor};  family: whose they are
    The recipe is that of the paper's preset, but for the tokenizer. Where images are is told with --data.
    raises: UserError for a name that lacks or is too many, and for another shape
    """
    from plumbing.files import FORMAT

    Tokenizer = forks.load(fork).parts()["tokenizer"]
    with torch.device("meta"):
        expected = Tokenizer(Tokenizer.Config(image_size=image_size, **sizes)).state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in expected or name not in weights:
            raise UserError(f"these are no weights of {family}: {name} "
                            f"{'is missing' if name in expected else 'is too many'}")
        if weights[name].shape != expected[name].shape:
            raise UserError(f"these are no weights of {family}: {name} is {tuple(weights[name].shape)}, not "
                            f"{tuple(expected[name].shape)}")
    config = paper.variant(
        paper.IMAGENET, fork=fork, image_size=image_size, data=None, val=None, tokenizer=sizes,
        phase1=dict(layers="lpips"))
    config["tokenizer"] = sizes
    return dict(format=FORMAT, stage="phase1", step=0, config=config, model=weights, ema=None, train={},
                model_config=dict(sizes, image_size=image_size), class_names=[], tokenizer_hash=None,
                fingerprint=None, note=f"weights of {family}", world=1, seconds=0.0, skips=0)


def opened(raw, path):
    """A checkpoint of a family that some fork knows, in our form, else None.

    raises: UserError for one of a known family whose keys are not all there, or too many, or of other shapes
    """
    for name in forks.names() if isinstance(raw, dict) else ():
        try:
            found = getattr(forks.load(name), "opened", lambda raw: None)(raw)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except ValueError:  # somebody's own fork that cannot be imported
            continue
        if found:
            return found
    return None
