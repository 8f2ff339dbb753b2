"""What an image is judged by: VGG-16 features (Eq. 4, Table 6), a discriminator (Eq. 2), and metrics; at the
end FQGAN's losses and teachers.

Equation, section and table numbers are those of arXiv 2212.03185. Images are float tensors (B, 3, H, W)
in [-1, 1]. Every loss is an unweighted float32 scalar; `train.py` weights and adds them.
"""

import copy
import hashlib
import itertools
import math
import re
import warnings
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# Index in torchvision's `vgg16().features` of the ReLU behind each tap; "logit" is the classifier's output.
LAYERS = {"relu1_2": 3, "relu2_2": 8, "relu3_3": 15, "relu4_3": 22, "relu5_3": 29}
LOGIT = "logit"
NAMES = [*LAYERS, LOGIT]

# The rows of Table 6: "low", then ever fewer low-level layers beside the logit. All weights are 1.
LAYER_SETS = {"low": dict.fromkeys(LAYERS, 1.0)}
LAYER_SETS |= {name: dict.fromkeys(NAMES[i:], 1.0) for i, name in enumerate(["A", "B", "C", "D", "sem", "E"])}


def layer_weights(alpha):
    """Layer weights of L_per(alpha) = alpha * L_sem + (1 - alpha) * L_low (Eq. 4).

    alpha:   semantic ratio in [0, 1]; 0 is Table 6's "low", 1 is "sem".
    returns: dict layer -> weight: relu1_2..relu4_3 have 1 - alpha, relu5_3 has 1 (it is in both sums),
             logit has alpha. Layers of weight zero are left out, so VGG is not run for them.
    raises:  ValueError if alpha is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    low, sem = LAYER_SETS["low"], LAYER_SETS["sem"]
    weights = {name: alpha * sem.get(name, 0) + (1 - alpha) * low.get(name, 0) for name in NAMES}
    weights["relu5_3"] = 1.0  # alpha + (1 - alpha), without rounding
    return {name: weight for name, weight in weights.items() if weight}


# ---------------------------------------------------------------------------------------------------
# VGG-16

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


class SumOverProcesses(torch.autograd.Function):
    """The sum of `x` over all processes; the gradient of it is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return SumOverProcesses.apply(grad.contiguous())


class GlobalBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the global batch: in distributed training the moments are averaged over processes.

    (torch's SyncBatchNorm does the same, on GPUs only.) Processes must hold equal shares of the batch.
    """

    def forward(self, x):  # (B, C, H, W) -> (B, C, H, W)
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(x)
        x32 = x.float()
        moments = torch.stack([x32.mean((0, 2, 3)), x32.square().mean((0, 2, 3))])  # (2, C)
        mean, square = SumOverProcesses.apply(moments) / dist.get_world_size()
        var = (square - mean.square()).clamp(min=0)  # rounding may leave it below
        with torch.no_grad():
            count = x.numel() // x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        y = x32 * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]
        return y.to(x.dtype)


def build_vgg16(width=64, num_classes=1000, hidden=4096, batch_norm=False):
    """torchvision's VGG-16, or a narrower one: channels are (1, 2, 4, 8, 8) * width.

    At the defaults: torchvision's `vgg16()`, same state-dict keys, 138,357,544 parameters. With width < 64
    (the reduced judge for small images, ours) the 7x7 average pool becomes 1x1, so the first linear layer
    has 8 * width inputs instead of 8 * width * 49, and there is no dropout. `batch_norm` is for training it;
    `fold_batch_norm` removes it afterwards. Five max-pools: sides of at least 32 pixels.

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
    vgg.to_empty(device=torch.get_default_device())
    for module in vgg.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    return vgg


def fold_batch_norm(vgg):
    """A plain VGG-16 that equals `vgg` (built with batch_norm=True) in eval mode; `vgg` is left as it was.

    Each BatchNorm, at its running statistics, is absorbed by the convolution before it, so the taps of
    `LAYERS` are again at 3, 8, 15, 22 and 29.
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


def vgg_from_state_dict(state, name="state dict", **sizes):
    """A VGG-16 that holds the tensors of `state`; `sizes` are arguments of `build_vgg16`.

    raises: ValueError, in one line, if a weight is missing, left over or of another shape (strict load).
    """
    with torch.device("meta"):
        vgg = build_vgg16(**sizes)
    try:
        vgg.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} holds no VGG-16 of this size: {_one_line(error)}") from error
    return vgg.float()


def load_vgg16(source=None):
    """The ImageNet VGG-16 of the perceptual loss (Eq. 4), with the classifier that gives the logit.

    source:  None: torchvision's IMAGENET1K_V1, fetched once (528 MB), its hash checked then.
             (The other published set, IMAGENET1K_FEATURES, has no valid classifier and cannot serve.)
             "random": weights drawn with seed 0, for test runs.
             A path: a local state dict. If its name ends in eight hex digits, as the official
             vgg16-397923af.pth does, its sha256 must begin with them. Pickled code is never executed.
    returns: VGG on the CPU, float32; its `random_weights` is True only for "random".
    raises:  RuntimeError if the download fails, ValueError if a file is missing, damaged or foreign.
    """
    if source == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vgg = build_vgg16()
    elif source is None:
        vgg = vgg_from_state_dict(_download_vgg16(), VGG_URL)
    else:
        vgg = vgg_from_state_dict(_read_state_dict(Path(source)), str(source))
    vgg.random_weights = source == "random"
    return vgg


def _download_vgg16():
    from torchvision.models import VGG16_Weights

    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(VGG_URL).name
    if path.is_file():  # torch would check the hash of a new file only
        return _read_state_dict(path)
    try:
        weights = VGG16_Weights.IMAGENET1K_V1
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True, map_location="cpu")
    except Exception as error:  # no network, no space, wrong hash, damaged cache: the remedies are the same
        raise RuntimeError(
            f"no VGG-16 weights: {VGG_URL} (528 MB) could not be fetched or read ({_one_line(error)}); "
            "fetch it elsewhere and pass `--vgg FILE`, or pass `--vgg random` for a test run"
        ) from error


def _read_state_dict(path):
    if not path.is_file():
        raise ValueError(f"no VGG-16 weights: {path} is not a file; the official one is {VGG_URL} (528 MB)")
    expected = re.search(r"-([0-9a-f]{8})\.", path.name)
    if expected:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(expected[1]):
            raise ValueError(f"{path} is damaged (sha256 {digest[:8]}...); fetch {VGG_URL} (528 MB) again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in many ways on a file that is not a plain state dict
        reason = f"{path} is no readable state dict ({_one_line(error)})"
        raise ValueError(f"{reason}; the official one is {VGG_URL} (528 MB)") from error


def _one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def normalize_images(x):
    """(B, 3, H, W) in [-1, 1] to the input that VGG-16 was trained on: ImageNet's mean and deviation.

    returns: float32, of bf16 images too: in bf16 the rounding of a pixel would be part of the loss
    """
    x = x.float()
    mean, std = x.new_tensor([0.485, 0.456, 0.406]), x.new_tensor([0.229, 0.224, 0.225])
    return ((x + 1) / 2 - mean[:, None, None]) / std[:, None, None]


class VGGTaps(nn.Module):
    """A frozen VGG-16, always in eval mode, that returns features by name (Table 6).

    vgg:        a plain VGG-16 (`load_vgg16`, or `fold_batch_norm` of a trained judge). It is frozen in place.
    logit_size: None feeds the logit the image as it is, through VGG's adaptive pool (ours; the paper does
                not say). An integer, e.g. 224, resizes the image for the logit alone, at the price of a
                second pass.
    raises:     ValueError if the taps are not where `LAYERS` says.
    """

    def __init__(self, vgg, logit_size=None):
        super().__init__()
        kinds = [type(module) for module in vgg.features]
        if len(kinds) != 31 or any(kinds[index] is not nn.ReLU for index in LAYERS.values()):
            raise ValueError("VGGTaps needs a plain VGG-16; call fold_batch_norm first")
        self.vgg = vgg.requires_grad_(False)
        self.logit_size = logit_size
        self.random_weights = getattr(vgg, "random_weights", False)
        self.eval()

    def train(self, mode=True):
        return super().train(False)  # dropout stays off, whatever the parent does

    def forward(self, x, layers):
        """Features after the activation, and the logit before the softmax.

        x:       (B, 3, H, W) float, about [-1, 1], not clamped.
        layers:  names out of `LAYERS` and "logit".
        returns: dict name -> (B, C, H/s, W/s) with s = 1, 2, 4, 8, 16; "logit" -> (B, num_classes).
        raises:  ValueError on an unknown name, no name at all, or a wrong or too small shape.
        """
        layers = list(layers)
        if not layers or not set(layers) <= set(NAMES):
            raise ValueError(f"layers must be names out of {NAMES}, got {layers}")
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"expected images (B, 3, H, W), got {tuple(x.shape)}")
        x = normalize_images(x)
        apart = {LOGIT} & set(layers) if self.logit_size else set()
        out = self._features(x, set(layers) - apart)
        if apart:
            size = (self.logit_size, self.logit_size)
            out |= self._features(F.interpolate(x, size=size, mode="bilinear", antialias=True), apart)
        if LOGIT in out:  # (B, 512, h, w) -> (B, 512, 7, 7) -> (B, 25088) -> (B, 1000)
            out[LOGIT] = self.vgg.classifier(self.vgg.avgpool(out[LOGIT]).flatten(1))
        return {name: out[name] for name in layers}

    def _features(self, x, names):
        """Run `features` as deep as the deepest name; "logit" stands for the last max-pool, index 30."""
        wanted = {LAYERS.get(name, 30): name for name in names}
        modules = self.vgg.features[: max(wanted, default=-1) + 1]
        side = 2 ** sum(isinstance(module, nn.MaxPool2d) for module in modules)
        if min(x.shape[2:]) < side:
            raise ValueError(f"these layers need images of at least {side}x{side}, got {tuple(x.shape)}")
        out = {}
        for index, module in enumerate(modules):
            x = module(x)  # the in-place ReLUs overwrite convolution outputs only, never a tapped tensor
            if index in wanted:
                out[wanted[index]] = x
        return out


def perceptual_terms(vgg, x, x_hat, layers):
    """d_l = mean((f_l(x_hat) - f_l(x))^2) for each layer: the terms inside Eq. 4 and Table 6.

    vgg:       VGGTaps.
    x, x_hat:  (B, 3, H, W) in about [-1, 1]; only x_hat gets a gradient.
    returns:   dict layer -> float32 scalar, unweighted, averaged over all elements and the batch.
    raises:    ValueError if the two shapes differ.
    This is not LPIPS: plain feature MSE as in the paper, no channel normalisation, no learned weights.
    """
    if x.shape != x_hat.shape:
        raise ValueError(f"x and x_hat must have one shape, got {tuple(x.shape)} and {tuple(x_hat.shape)}")
    layers = list(layers)
    with torch.no_grad():
        target = vgg(x, layers)
    output = vgg(x_hat, layers)
    return {name: (output[name].float() - target[name].float()).square().mean() for name in layers}


def perceptual_loss(vgg, x, x_hat, weights):
    """L_per = sum_l w_l * d_l (Eq. 4 with `layer_weights(alpha)`, Table 6 with `LAYER_SETS[name]`).

    weights: dict layer -> weight, at least one; see `perceptual_terms` for the rest.
    returns: float32 scalar.
    """
    terms = perceptual_terms(vgg, x, x_hat, weights)
    return sum(weights[name] * term for name, term in terms.items())


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


# ---------------------------------------------------------------------------------------------------
# The style-based discriminator


class EqualConv2d(nn.Module):
    """Convolution with equalised learning rate: weights N(0, 1), times 1/sqrt(fan_in) at run time."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scale = 1 / math.sqrt(in_channels * kernel_size**2)
        self.stride, self.padding = stride, padding

    def forward(self, x):
        return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, self.padding)


class EqualLinear(nn.Module):
    """Linear layer with equalised learning rate."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = 1 / math.sqrt(in_features)

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


class FixedConv(torch.autograd.Function):
    """Depthwise convolution with one kernel that does not learn, (B, C, H, W) -> (B, C, H', W').

    Its gradient is the transposed convolution, whose gradient is again this one. F.conv2d gives the same
    numbers, but R1 differentiates twice, and PyTorch then also computes the gradient of the kernel, channel
    by channel: 6 s instead of 2 s for 32 images of 256x256 in channels_last on an H100.
    """

    @staticmethod
    def forward(ctx, x, kernel, stride, padding, transposed):
        ctx.save_for_backward(kernel)
        ctx.rest = stride, padding, not transposed
        conv, channels = F.conv_transpose2d if transposed else F.conv2d, x.shape[1]
        kernel = kernel.to(x.dtype).expand(channels, 1, *kernel.shape)
        return conv(x, kernel, stride=stride, padding=padding, groups=channels)

    @staticmethod
    def backward(ctx, grad):
        return FixedConv.apply(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None


class Blur(nn.Module):
    """Depthwise low-pass filter, outer product of [1, 3, 3, 1], normalised to sum 1."""

    def __init__(self, padding, stride=1):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps), persistent=False)
        self.padding, self.stride = padding, stride

    def forward(self, x):
        return FixedConv.apply(x, self.kernel, self.stride, self.padding, False)


def lrelu(x):
    return F.leaky_relu(x, 0.2) * math.sqrt(2)  # sqrt(2) keeps the variance about 1


class DiscriminatorBlock(nn.Module):
    """Residual block a -> b that halves the side: (main + skip) / sqrt(2)."""

    def __init__(self, a, b):
        super().__init__()
        self.conv1 = EqualConv2d(a, a, 3, padding=1)
        self.blur = Blur(padding=2)
        self.conv2 = EqualConv2d(a, b, 3, stride=2)
        self.skip_blur = Blur(padding=1, stride=2)  # StyleGAN2's blur, then 1x1 at stride 2, in one step
        self.skip = EqualConv2d(a, b, 1, bias=False)

    def forward(self, x):
        main = lrelu(self.conv1(x))  # (B, a, s, s)
        main = lrelu(self.conv2(self.blur(main)))  # (B, a, s+1, s+1) -> (B, b, s/2, s/2)
        return (main + self.skip(self.skip_blur(x))) / math.sqrt(2)


def minibatch_stddev(x):
    """Append one channel: how much the images of a group differ, so that D sees a lack of variety.

    x:       (B, C, h, w). A group is G contiguous samples, G the largest divisor of B not above 4.
    returns: (B, C+1, h, w); the new channel is mean_chw sqrt(var + 1e-8) of the group, in float32 until
             it is appended (1e-4 for equal images).
    deviation: StyleGAN2 takes strided groups. Contiguous ones (ours) let a batch split over processes in
             contiguous blocks give the same logits as one process, if each block holds whole groups.
    """
    b, _, h, w = x.shape
    group = max(g for g in (1, 2, 3, 4) if b % g == 0)
    y = x.float().unflatten(0, (b // group, group))  # (B/G, G, C, h, w)
    std = (y.var(dim=1, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))  # (B/G,)
    std = std.repeat_interleave(group).view(b, 1, 1, 1).expand(b, 1, h, w)
    return torch.cat([x, std.to(x.dtype)], dim=1)


class StyleDiscriminator(nn.Module):
    """The residual discriminator of StyleGAN2 (the paper: style-based, as in ViT-VQGAN; details ours).

    image_size: power of two, at least 8. Width at side r: min(max_width, 16384 * channel_multiplier // r).
    24,001,089 parameters at 256 with channel_multiplier 1, 28,864,129 with 2 (StyleGAN2's config F).
    """

    def __init__(self, image_size=256, channel_multiplier=1, max_width=512):
        super().__init__()
        if image_size < 8 or image_size & (image_size - 1):
            raise ValueError(f"image_size must be a power of two, at least 8, got {image_size}")
        self.image_size = image_size
        sides = [image_size >> i for i in range(image_size.bit_length() - 2)]  # 256, 128, ..., 4
        widths = [min(max_width, int(16384 * channel_multiplier) // side) for side in sides]
        if min(widths) < 1:
            raise ValueError(f"max_width {max_width} and channel_multiplier {channel_multiplier} leave no "
                             "channel")
        top = widths[-1]
        self.from_rgb = EqualConv2d(3, widths[0], 1)
        self.blocks = nn.Sequential(*(DiscriminatorBlock(a, b) for a, b in itertools.pairwise(widths)))
        self.conv = EqualConv2d(top + 1, top, 3, padding=1)
        self.linear = EqualLinear(top * 4 * 4, top)
        self.out = EqualLinear(top, 1)

    def forward(self, x):
        """x: (B, 3, H, W) in [-1, 1], H = W = image_size. returns: (B,) logits, high for real images."""
        if x.ndim != 4 or x.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"expected (B, 3, {self.image_size}, {self.image_size}), got {tuple(x.shape)}")
        x = self.blocks(lrelu(self.from_rgb(x)))  # (B, 512, 4, 4)
        x = lrelu(self.conv(minibatch_stddev(x)))  # (B, 513, 4, 4) -> (B, 512, 4, 4)
        return self.out(lrelu(self.linear(x.flatten(1)))).squeeze(1)  # (B, 8192) -> (B, 512) -> (B,)


class PatchDiscriminator(nn.Module):
    """PatchGAN, the discriminator of VQGAN (an alternative, ours; the paper's is style-based).

    width 64 and num_layers 3: 2,765,633 parameters. BatchNorm after all inner convolutions, over the
    micro-batches of all processes; weights start N(0, 0.02).
    """

    def __init__(self, width=64, num_layers=3):
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(num_layers + 1)]
        layers = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [nn.Conv2d(widths[i - 1], widths[i], 4, stride, padding=1, bias=False)]
            layers += [GlobalBatchNorm(widths[i]), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x):
        """x: (B, 3, H, W) in [-1, 1]. returns: (B, 1, h, w) logits, h = H/8 - 2 at num_layers 3."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"expected images (B, 3, H, W), got {tuple(x.shape)}")
        return self.layers(x)


# ---------------------------------------------------------------------------------------------------
# The losses of both players


def disc_loss(logits_real, logits_fake, kind="logistic"):
    """What the discriminator minimises; the paper's L_adv (Eq. 2) leaves its form open.

    logits:  any shape, high for real; `logits_fake` must come from a detached x_hat.
    kind:    "logistic" (ours, default): mean softplus(-D(x)) + mean softplus(D(x_hat)), 2 ln 2 at zero.
             "hinge": mean relu(1 - D(x)) + mean relu(1 + D(x_hat)). Both sums, not halved.
    returns: float32 scalar.
    raises:  ValueError on another kind.
    """
    real, fake = logits_real.float(), logits_fake.float()
    if kind == "logistic":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    raise ValueError(f"kind must be 'logistic' or 'hinge', got {kind!r}")


def adv_loss(logits_fake, kind="logistic"):
    """L_adv, what the decoder minimises (Eq. 2): mean softplus(-D(x_hat)), or -mean D(x_hat) for "hinge".

    returns: float32 scalar, ln 2 at zero logits ("logistic", non-saturating, ours).
    raises:  ValueError on another kind.
    """
    fake = logits_fake.float()
    if kind == "logistic":
        return F.softplus(-fake).mean()
    if kind == "hinge":
        return -fake.mean()
    raise ValueError(f"kind must be 'logistic' or 'hinge', got {kind!r}")


@torch.compiler.set_stance("force_eager")  # torch.compile has no second backward
def r1_penalty(discriminator, x, gamma=10.0):
    """R1 = gamma/2 * mean_b ||grad_x D(x)||^2 on real images (ours; not in the paper).

    x:       (B, 3, H, W) real images. Logits that are maps are summed over their patches.
    returns: float32 scalar, with a graph for the second backward; computed in float32 outside autocast.
    The caller applies it every 16th step and multiplies by 16 (lazy regularisation).
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.detach().float().requires_grad_(True)
        (grad,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)  # (B, 3, H, W)
        return gamma / 2 * grad.square().sum(dim=(1, 2, 3)).mean()


def adaptive_weight(loss_rec, loss_adv, last_weight):
    """VQGAN's weight for L_adv: |grad loss_rec| / (|grad loss_adv| + 1e-4) at the decoder's last weight.

    loss_rec, loss_adv: scalars with graphs, which are kept; loss_rec is L1 + L_per.
    last_weight:        weight of the decoder's last convolution.
    returns:            float32 scalar in [0, 1e4], detached.
    An option (ours): the default is a constant weight. Each process sees its own value.
    """
    (grad_rec,) = torch.autograd.grad(loss_rec, last_weight, retain_graph=True)
    (grad_adv,) = torch.autograd.grad(loss_adv, last_weight, retain_graph=True)
    return (grad_rec.float().norm() / (grad_adv.float().norm() + 1e-4)).clamp(0, 1e4).detach()


# ---------------------------------------------------------------------------------------------------
# Metrics, which nothing is trained on. The Frechet distance and its relatives are torch-fidelity's


class ResNet(nn.Module):
    """A narrow ResNet classifier, the scorer: Frechet distances in its features (ours; for small images).

    Another family than the VGG judge, so that no tokenizer is scored by the network that trained it.
    A 3x3 convolution, four stages of one of torchvision's basic blocks with (1, 2, 4, 8) * width channels,
    each but the first halving the side; global average; one linear layer. Same members as a VGG.
    """

    def __init__(self, width=32, num_classes=10):
        from torchvision.models.resnet import BasicBlock

        def block(a, b, stride):
            shortcut = None
            if stride > 1:
                shortcut = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), GlobalBatchNorm(b))
            return BasicBlock(a, b, stride, shortcut, norm_layer=GlobalBatchNorm)

        super().__init__()
        stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), GlobalBatchNorm(width), nn.ReLU()]
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        stages = [block(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(widths)]
        self.features, self.avgpool = nn.Sequential(*stem, *stages), nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(8 * width, num_classes)

    def forward(self, x):  # (B, 3, H, W), normalised by `normalize_images` -> (B, num_classes)
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def register_scorer(network, name="classifier"):
    """Makes a classifier of ours (VGG or ResNet) known to torch-fidelity under `name`; returns the extractor.

    It takes (B, 3, H, W) uint8 and gives "pool", the input of the classifier's first linear layer, and
    "logits". Images are not resized: give it the size that it was trained on.
    """
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

    class Scorer(FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            self.network = network

        @staticmethod
        def get_provided_features_list():
            return "pool", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "pool"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, x):
            x = normalize_images(x.float() / 127.5 - 1)
            pool = self.network.avgpool(self.network.features(x)).flatten(1)
            out = {"pool": pool, "logits": self.network.classifier(pool)}
            return tuple(out[layer] for layer in self.features_list)

    FEATURE_EXTRACTORS_REGISTRY.pop(name, None)
    register_feature_extractor(name, Scorer)
    return Scorer(name, ["pool", "logits"]).eval()


def fidelity(features, logits, reference, subset=10_000):
    """FID, IS, KID, precision and recall of generated images, all computed by torch-fidelity.

    features:  (n, F) float32 of the generated images, logits (n, C), both on the CPU
    reference: dict of `reference_statistics`: mu, sigma of all real images, `features` of at most `subset`
    returns:   dict of floats. KID takes 100 subsets of at most 1,000 images, precision and recall take the
               first `subset` generated images, 3 neighbours, and the features of the reference.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real = reference["features"]
    statistics = {name: reference[name].numpy() for name in ("mu", "sigma")}
    values = fid_statistics_to_metric(fid_features_to_statistics(features), statistics, False)
    values |= isc_features_to_metric(logits)
    size = min(1000, len(features), len(real))
    values |= kid_features_to_metric(features, real, kid_subset_size=size, verbose=False)
    values |= prc_features_to_metric(features[:subset], real, save_cpu_ram=True, verbose=False)
    short = dict(fid="frechet_inception_distance", inception_score="inception_score_mean",
                 kid="kernel_inception_distance_mean", precision="precision", recall="recall")
    return {name: values[key] for name, key in short.items()}


def reference_statistics(features, subset=10_000):
    """What `fidelity` compares with: mu and sigma of (n, F) features of real images, and `subset` of them."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    statistics = fid_features_to_statistics(features)
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:subset].sort().values
    return dict(mu=torch.from_numpy(statistics["mu"]), sigma=torch.from_numpy(statistics["sigma"]),
                features=features[chosen].clone())


def ssim(x, x_hat):
    """Structural similarity of each pair of uint8 images (B, 3, H, W): (B,) float64, 1 for equal images.

    Wang et al. 2004 as it is usually computed: Gaussian window of 11 pixels and deviation 1.5, K1 = 0.01,
    K2 = 0.03, range 255, the mean over colours and over all places where the window fits.
    raises: ValueError if a side is below 11
    """
    if min(x.shape[2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11x11 pixels, got {tuple(x.shape)}")
    window = torch.exp(-((torch.arange(11.0, device=x.device, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = window / window.sum()

    def blur(y):
        y = F.conv2d(y.flatten(0, 1)[:, None], window.view(1, 1, 11, 1))  # (B * 3, 1, H - 10, W)
        return F.conv2d(y, window.view(1, 1, 1, 11)).view(*y.shape[:1], -1).unflatten(0, x.shape[:2])

    a, b = x.double(), x_hat.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance, c1, c2 = blur(a * b) - mean_a * mean_b, (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2))


def lpips_like(vgg, x, x_hat):
    """LPIPS-style distance of each image pair, (B,) float32, for reports only: never trained on.

    As in LPIPS, features are normalised to unit length over channels at each position and squared
    differences are averaged over positions; unlike LPIPS, layers carry no learned weights and `vgg` may be
    a judge of one's own, so values compare with each other and with nothing published.
    """
    with torch.no_grad():
        a, b = vgg(x, LAYERS), vgg(x_hat, LAYERS)
    unit = [(F.normalize(a[name].float(), dim=1), F.normalize(b[name].float(), dim=1)) for name in LAYERS]
    return sum((u - v).square().sum(1).mean((1, 2)) for u, v in unit)


# ---------------------------------------------------------------------------------------------------
# FQGAN's two further losses (arXiv 2411.16681)


def disentanglement(codes):
    """How alike the codes of different sub-codebooks are: mean over pairs, images and positions of
    (q_a . q_b)^2 with q of unit length (Eq. 7 of FQGAN), in [0, 1]; 0 for orthogonal codes, and for k = 1.

    codes:  list of k straight-through maps (B, n_z, h, w), so that the gradient reaches the encoder's
            branches and not the codebooks
    raises: ValueError for widths that differ
    """
    if len({q.shape for q in codes}) > 1:
        raise ValueError(f"sub-codebooks must have equal widths, got {[q.shape[1] for q in codes]}")
    with torch.autocast(codes[0].device.type, enabled=False):
        units = [F.normalize(q.float(), dim=1) for q in codes]
        pairs = [(a * b).sum(1).square().mean() for a, b in itertools.combinations(units, 2)]
    return sum(pairs) / len(pairs) if pairs else units[0].new_zeros(())


def representation_loss(features, targets):
    """One-directional InfoNCE over the local batch (I22): student i should be most like teacher i. The other
    images of a micro-batch are the negatives, so --micro-batch and the number of processes change it.

    features: (B, W) of the student; targets: (B, W) of the frozen teacher; no temperature
    returns:  float32 scalar: ln B for equal similarities, 0 for B = 1
    raises:   ValueError for widths that differ
    """
    if features.shape != targets.shape:
        shapes = tuple(features.shape), tuple(targets.shape)
        raise ValueError(f"student and teacher differ in shape: {shapes[0]} and {shapes[1]}")
    with torch.autocast(features.device.type, enabled=False):  # similarities near 1 need float32
        a, b = F.normalize(features.float(), dim=1), F.normalize(targets.detach().float(), dim=1)
        return F.cross_entropy(a @ b.T, torch.arange(len(a), device=a.device))


class Teacher(nn.Module):
    """A frozen network image -> (B, width) that a sub-codebook learns from. Any module of this form will do.

    network: (B, 3, 224, 224), normalised by mean and std of [0, 1] pixels -> (B, width)
    """

    def __init__(self, network, width, mean, std):
        super().__init__()
        self.network, self.width = network.requires_grad_(False).eval(), width
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    @torch.no_grad()
    def forward(self, x):  # (B, 3, H, W) in [-1, 1]
        x = F.interpolate(x.float() / 2 + 0.5, size=(224, 224), mode="nearest")
        return self.network((x - self.mean) / self.std)


class JudgeTeacher(nn.Module):
    """For machines without downloads: a VGG of --stage vgg, its relu5_3 averaged over positions (ours)."""

    def __init__(self, judge):
        super().__init__()
        self.judge = judge
        self.width = [m for m in judge.modules() if isinstance(m, nn.Conv2d)][-1].out_channels

    @torch.no_grad()
    def forward(self, x):
        return self.judge(x, ["relu5_3"])["relu5_3"].float().mean((2, 3))


class DinoBlock(nn.Module):
    """A pre-norm block with LayerScale; the names are those of DINOv2's files."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width)))
        self.ls1, self.ls2 = (nn.ParameterDict(dict(gamma=nn.Parameter(torch.ones(width)))) for _ in range(2))

    def forward(self, x):  # (B, T, width), heads of 64
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.ls1["gamma"] * self.attn["proj"](h)
        return x + self.ls2["gamma"] * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Dino(nn.Module):
    """DINOv2's vision transformer as far as its class token needs it, sized by a state dict of its files."""

    def __init__(self, state):
        super().__init__()
        width, patch = state["cls_token"].shape[2], state["patch_embed.proj.weight"].shape[2]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # in the file, of no use here
        self.pos_embed = nn.Parameter(torch.zeros(state["pos_embed"].shape))
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, width, patch, patch)))
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        self.blocks = nn.Sequential(*[DinoBlock(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.load_state_dict(state, strict=True)

    def forward(self, x):  # (B, 3, H, W) -> (B, width), the normalised class token
        x = self.patch_embed["proj"](x)  # (B, width, h, w)
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        grid = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = [(n + 0.1) / side for n in x.shape[2:]]  # the published models' 0.1
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, (x + grid).flatten(2).transpose(1, 2)], 1)
        return self.norm(self.blocks(x))[:, 0]


DINO_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"
TEACHERS = {"clip-vit-l-14": 1024, "clip-vit-b-16": 768, "dinov2-vit-s-14": 384}  # name -> width


def is_torchscript(path):
    return zipfile.is_zipfile(path) and any("constants.pkl" in n for n in zipfile.ZipFile(path).namelist())


def load_teacher(source):
    """FQGAN's teachers: the class token of CLIP's last layer before the final norm (width 1024 or 768), or of
    DINOv2-S after it (384).

    source:  one of TEACHERS, downloaded once (CLIP's hash is checked, DINOv2 publishes none); or a local
             file of theirs, CLIP's TorchScript archive or DINOv2's state dict. Where a file's name ends in
             eight or more hex digits its sha256 must begin with them.
    raises:  ValueError for another name, or a file that is missing, damaged or foreign; RuntimeError if a
             download fails
    """
    if source not in TEACHERS and not Path(source).is_file():
        raise ValueError(f"teacher {source}: no such file, and not one of {', '.join(TEACHERS)}")
    try:
        if source not in TEACHERS:
            digits = re.search("[0-9a-f]{8,64}$", Path(source).stem)
            with open(source, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digits and not digest.startswith(digits[0]):
                raise ValueError(f"its sha256 begins with {digest[:8]}, so it is damaged")
        if source == "dinov2-vit-s-14":
            state = torch.hub.load_state_dict_from_url(DINO_URL, map_location="cpu", weights_only=True)
        elif source in TEACHERS or is_torchscript(source):
            from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP

            name, file = (source, None) if source in TEACHERS else ("clip-vit-l-14", str(source))
            visual = FeatureExtractorCLIP(name, ["clip"], feature_extractor_weights_path=file).model.visual
            width, visual.ln_post, visual.proj = visual.ln_post.normalized_shape[0], nn.Identity(), None
            return Teacher(visual, width, (0.48145466, 0.4578275, 0.40821073),
                           (0.26862954, 0.26130258, 0.27577711))
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
        return Teacher(Dino(state), state["cls_token"].shape[2], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    except OSError as error:
        raise RuntimeError(f"teacher {source} could not be fetched ({_one_line(error)}); fetch its file "
                           "elsewhere and name it in teachers") from None
    except Exception as error:  # a file of something else
        raise ValueError(f"teacher {source} cannot be read: {_one_line(error)}") from None
