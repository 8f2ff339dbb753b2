"""Networks whose features the metrics compare."""

import hashlib
import io
from pathlib import Path

import torch

from plumbing.errors import UserError
from plumbing.fast import in_slices
from plumbing.files import load_torch
from plumbing.hashes import weights_hash
from plumbing.models import load_model
from plumbing.paths import expanded
from plumbing.processes import fetched
from studies.distances import register_scorer


class Extractor:
    """A network from torch-fidelity's registry, and what identifies it.

    source: 'inception', a .pth file of its weights, or a checkpoint of `train.py --stage vgg`
    raises: UserError for a missing or foreign file, or if images are not of the size it was trained on
    """

    def __init__(self, source, image_size, device):
        self.device, self.class_names, note, path = device, None, "", Path(expanded(source))
        if path.suffix == ".pt":
            network, ckpt = load_model(path, ("vgg", "resnet"), device)
            size, self.class_names, note = ckpt["config"]["image_size"], ckpt["class_names"], ckpt["note"]
            if size != image_size:
                raise UserError(f"--extractor {path} was trained on {size}-pixel images and these have "
                                f"{image_size}; train one with --set image_size={image_size}")
            self.network, layer, resize = register_scorer(getattr(network, "vgg", network)), "pool", "none"
        else:
            self.network = fetched(lambda: load_inception(source))
            layer, resize = "2048", "tf1-bilinear-299"
        self.network.to(device)
        one = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=device)
        self.num_features = in_slices(lambda part: self.network(part)[0], one).shape[1]
        self.info = dict(extractor=str(source), extractor_hash=weights_hash(self.network), resize=resize,
                         feature_layer=layer, extractor_note=note)

    def __call__(self, images):
        """(B, 3, S, S) uint8 -> dict of features (B, F), logits (B, C), digests (B, 8) on the CPU."""
        both = in_slices(lambda part: torch.cat(self.network(part), 1), images.to(self.device))
        features, logits = both.tensor_split([self.num_features], dim=1)
        digests = [hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest() for image in images]
        digests = torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)
        return dict(features=features.float().cpu(), logits=logits.float().cpu(), digests=digests)

    def check_number(self, num, what):
        """raises: UserError if so few images make no Frechet distance"""
        if num <= self.num_features:
            raise UserError(f"{num} {what} are too few for a Frechet distance in {self.num_features} "
                            "features; it needs more images than features")


def load_inception(source):
    """torch-fidelity's Inception of the FID, downloaded by its own loader or read from a local file."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torch_fidelity.utils import create_feature_extractor

    path, remedy = None, f"fetch {URL_INCEPTION_V3} and pass --extractor FILE"
    try:
        if source != "inception":
            path = Path(expanded(source))
            if path.name == Path(URL_INCEPTION_V3).name:  # it ends in the first digits of its sha256
                with open(path, "rb") as file:
                    if not hashlib.file_digest(file, "sha256").hexdigest().startswith(path.stem[-8:]):
                        raise ValueError("its hash is wrong")
            state, path = load_torch(path), io.BytesIO()  # torch-fidelity would execute pickled code
            torch.save(state, path)
            path.seek(0)
        return create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], cuda=False,
                                        feature_extractor_weights_path=path, verbose=False)
    except Exception as error:  # no network, no file, or a state dict of something else
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(f"--extractor {source}: no Inception weights ({reason}); {remedy}, or pass a "
                        "checkpoint of train.py --stage vgg") from None
