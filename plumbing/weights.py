"""VGG-16 and LPIPS from files: torchvision's, a local file, or a narrow VGG of one's own."""

import copy
import itertools
import warnings

import torch
from torch import nn

from plumbing.errors import as_user_error, one_line
from plumbing.files import check_digest, load_torch, reason
from plumbing.processes import GlobalBatchNorm, fetched

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
REMEDY = f"fetch {VGG_URL} (528 MB) and pass it as --vgg FILE or --lpips FILE"


def build_vgg16(width=64, num_classes=1000, hidden=4096, batch_norm=False, skip_pools=0):
    """torchvision's VGG-16, or a narrower one: channels are (1, 2, 4, 8, 8) * width.

    At the defaults: torchvision's `vgg16()`, same state-dict keys, 138,357,544 parameters. With width < 64
    (the reduced VGG for small images, ours) the 7x7 average pool becomes 1x1, and there is no dropout.
    batch_norm: for training it; `fold_batch_norm` removes it afterwards
    skip_pools: of the five max-pools the first ones do nothing, so that the features of a small image are as
                fine as those of a large one (docs/decisions.md)
    deviation: weights start as He-normal and biases at zero (ours); trained ones replace them.
    """
    from torchvision.models.vgg import VGG, make_layers

    channels = [[1, 1], [2, 2], [4, 4, 4], [8, 8, 8], [8, 8, 8]]
    plan = [c for stage in channels for c in [*(width * multiple for multiple in stage), "M"]]
    pooled, dropout = (7, 0.5) if width >= 64 else (1, 0.0)
    with torch.device("meta"):  # shapes only: torchvision would draw 124 million weights that we replace
        vgg = VGG(make_layers(plan, batch_norm), num_classes, init_weights=False)
        vgg.avgpool = nn.AdaptiveAvgPool2d(pooled)
        vgg.classifier = nn.Sequential(
            nn.Linear(8 * width * pooled**2, hidden), nn.ReLU(True), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), nn.ReLU(True), nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
    vgg.features = nn.Sequential(
        *[GlobalBatchNorm(m.num_features) if isinstance(m, nn.BatchNorm2d) else m for m in vgg.features]
    )
    pools = [i for i, module in enumerate(vgg.features) if isinstance(module, nn.MaxPool2d)]
    for index in pools[:skip_pools]:  # keeps its place: the taps are known by their index
        vgg.features[index] = nn.Identity()
    vgg.to_empty(device=torch.empty(0).device)  # get_default_device() forgets an outer one in PyTorch 2.6
    for module in vgg.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    return vgg


class EverySecond(nn.Conv2d):
    """1x1, on every second pixel. With a stride oneDNN's AVX2 kernels write beyond the gradients' memory."""

    def forward(self, x):
        return super().forward(x[..., ::2, ::2])


class ResNet(nn.Module):
    """A narrow ResNet classifier, the FID classifier: distances are taken in its features (ours).

    A 3x3 convolution, four of torchvision's basic blocks with (1, 2, 4, 8) * width channels, each but the
    first halving the side; global average; one linear layer. Same members as a VGG.
    """

    def __init__(self, width=32, num_classes=10):
        from torchvision.models.resnet import BasicBlock

        def block(a, b, stride):
            shortcut = None
            if stride > 1:
                shortcut = nn.Sequential(EverySecond(a, b, 1, bias=False), GlobalBatchNorm(b))
            return BasicBlock(a, b, stride, shortcut, norm_layer=GlobalBatchNorm)

        super().__init__()
        stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), GlobalBatchNorm(width), nn.ReLU()]
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        stages = [block(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(widths)]
        self.features, self.avgpool = nn.Sequential(*stem, *stages), nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(8 * width, num_classes)

    def forward(self, x):  # (B, 3, H, W), normalised by `normalize_images` -> (B, num_classes)
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def fold_batch_norm(vgg):
    """A plain VGG-16 that equals `vgg` (built with batch_norm=True) in eval mode; `vgg` is left as it was.

    The convolution before each BatchNorm absorbs it, so the taps are where `LAYERS` says.
    """
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    vgg = copy.deepcopy(vgg).eval()
    layers = []
    for module in vgg.features:
        if isinstance(module, nn.BatchNorm2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], module)
        else:
            layers.append(module)
    vgg.features = nn.Sequential(*layers)
    return vgg


def scale_taps(vgg, taps, logit):
    """Multiplies the features of a plain VGG-16 by positive numbers, in place, and changes nothing else.

    taps:    {index in vgg.features: number}, of ReLUs, up to the last; logit: number of its output
    returns: `vgg`; its `logit_scale` is `logit`, for a softmax that wants the logits as they were
    Weights and biases take the numbers up: ReLU and pooling let a positive factor through.
    """
    layers = [(module, next(number for tap, number in sorted(taps.items()) if index < tap))
              for index, module in enumerate(vgg.features) if isinstance(module, nn.Conv2d)]
    layers += [(module, logit) for module in vgg.classifier if isinstance(module, nn.Linear)]
    before = 1.0
    with torch.no_grad():
        for layer, now in layers:
            layer.weight *= now / before
            layer.bias *= now
            before = now
    vgg.logit_scale = logit
    return vgg


def vgg_from_state_dict(state, name="state dict", **sizes):
    """A VGG-16 that holds the tensors of `state`; `sizes` are arguments of `build_vgg16`.

    raises: ValueError, in one line, if a weight is missing, left over or of another shape (strict load).
    """
    with torch.device("meta"):
        vgg = build_vgg16(**sizes)
    try:
        vgg.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} holds no VGG-16 of this size: {one_line(error)}") from error
    return vgg.float()


def load_vgg16(source="imagenet"):
    """The ImageNet VGG-16 of the perceptual loss (Eq. 4), with the classifier that gives the logit.

    source:  "imagenet": torchvision's IMAGENET1K_V1, fetched once (528 MB)
             "random": weights drawn with seed 0, for test runs
             a path: a local state dict. If its name ends in eight hex digits, as the official
             vgg16-397923af.pth does, its sha256 must begin with them. Pickled code is never executed.
    returns: VGG on the CPU, float32; its `random_weights` is True only for "random".
    raises:  RuntimeError if the download fails, ValueError if a file is missing, damaged or foreign.
    """
    if source == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vgg = build_vgg16()
    else:
        state = download_vgg16() if source == "imagenet" else read_state_dict(source)
        vgg = vgg_from_state_dict(state, str(source))
    vgg.random_weights = source == "random"
    return vgg


def download_vgg16():
    from torchvision.models import VGG16_Weights

    try:
        weights = VGG16_Weights.IMAGENET1K_V1
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True, map_location="cpu")
    except Exception as error:  # no network, no space, wrong hash, damaged cache: the remedies are the same
        raise RuntimeError(f"no VGG-16 weights: {REMEDY}; for a test run --vgg random, --lpips none "
                           f"({one_line(error)})") from error


def read_state_dict(path):
    try:
        state = load_torch(path)
    except Exception as error:  # torch.load fails in many ways on a file that is not a plain state dict
        raise ValueError(f"{path} is no readable state dict: {REMEDY} ({reason(path, error)})") from error
    check_digest(path)
    return state


def load_vgg16_of(source):
    """`load_vgg16`, in one process first.  raises: UserError"""

    def load():
        with as_user_error():
            return load_vgg16(source)

    return fetched(load)


def build_lpips(vgg):
    """LPIPS v0.1 of the lpips package on the weights of `load_vgg16`; its linear weights ship with it. A
    metric for us, and the perceptual loss of FQGAN.

    returns: a frozen network: x, x_hat (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1)
    """
    import lpips

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # lpips calls torchvision in its old way
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for part in network.net.children():
        for index, layer in part.named_children():
            layer.load_state_dict(vgg.features[int(index)].state_dict())
    return network.requires_grad_(False).eval()


def load_lpips(source, device):
    """LPIPS on the VGG-16 `source`, as `load_vgg16` takes it; None for "none".  raises: UserError"""
    if source == "none":
        return None
    return build_lpips(load_vgg16_of(source)).to(device, memory_format=torch.channels_last)
