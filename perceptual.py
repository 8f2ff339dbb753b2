"""What compares images: VGG-16 features (Eq. 4, Table 6) and a discriminator (Eq. 2).

Equation, section and table numbers are those of arXiv 2212.03185. Images are float tensors (B, 3, H, W)
in [-1, 1]. Every loss is an unweighted float32 scalar; `train.py` weights and adds them.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.fast import FixedConv
from plumbing.processes import GlobalBatchNorm

# Index in torchvision's `vgg16().features` of the ReLU behind each tap; "logit" is the classifier's output.
LAYERS = {"relu1_2": 3, "relu2_2": 8, "relu3_3": 15, "relu4_3": 22, "relu5_3": 29}
LOGIT = "logit"
NAMES = [*LAYERS, LOGIT]

# The rows of Table 6: "low", then ever fewer low-level layers beside the logit. All weights are 1.
LAYER_SETS = {"low": dict.fromkeys(LAYERS, 1.0)}
LAYER_SETS |= {name: dict.fromkeys(NAMES[i:], 1.0) for i, name in enumerate(["A", "B", "C", "D", "sem", "E"])}
LAYER_SETS["L4"] = dict.fromkeys(NAMES[:4], 1.0)  # ours: relu1_2 to relu4_3


def layer_weights(alpha):
    """Layer weights of L_per(alpha) = alpha * L_sem + (1 - alpha) * L_low (Eq. 4, Sec. 3.3.1).

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


def normalize_images(x):
    """(B, 3, H, W) in [-1, 1] to the input that VGG-16 was trained on: ImageNet's mean and deviation.

    returns: float32, of bf16 images too: in bf16 the rounding of a pixel would be part of the loss
    """
    x = x.float()
    mean, std = x.new_tensor([0.485, 0.456, 0.406]), x.new_tensor([0.229, 0.224, 0.225])
    return ((x + 1) / 2 - mean[:, None, None]) / std[:, None, None]


class VGGTaps(nn.Module):
    """A frozen VGG-16, always in eval mode, that returns features by name (Table 6).

    vgg:    a plain VGG-16, frozen in place (plumbing/weights.py). The logit sees the image as it is, through
            VGG's adaptive pool (I14).
    raises: ValueError if the taps are not where `LAYERS` says.
    """

    def __init__(self, vgg):
        super().__init__()
        kinds = [type(module) for module in vgg.features]
        if len(kinds) != 31 or any(kinds[index] is not nn.ReLU for index in LAYERS.values()):
            raise ValueError("VGGTaps needs a plain VGG-16; call fold_batch_norm first")
        self.vgg = vgg.requires_grad_(False)
        self.random_weights = getattr(vgg, "random_weights", False)
        self.eval()

    def train(self, mode=True):
        return super().train(False)  # dropout stays off, whatever the parent does

    def forward(self, x, layers):
        """Features after the activation, and the logit before the softmax; VGG runs as deep as they are.

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
        wanted = {LAYERS.get(name, 30): name for name in layers}  # 30 is the last max-pool, before the logit
        modules = self.vgg.features[: max(wanted) + 1]
        side = 2 ** sum(isinstance(module, nn.MaxPool2d) for module in modules)
        if min(x.shape[2:]) < side:
            raise ValueError(f"these layers need images of at least {side}x{side}, got {tuple(x.shape)}")
        x, out = normalize_images(x), {}
        for index, module in enumerate(modules):
            x = module(x)  # the in-place ReLUs overwrite convolution outputs only, never a tapped tensor
            if index in wanted:
                out[wanted[index]] = x
        if LOGIT in out:  # (B, 512, h, w) -> (B, 512, 7, 7) -> (B, 25088) -> (B, 1000)
            out[LOGIT] = self.vgg.classifier(self.vgg.avgpool(out[LOGIT]).flatten(1))
        return {name: out[name] for name in layers}


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
    """L_per = sum_l w_l * d_l (Sec. 3.3.1; Eq. 4: `layer_weights(alpha)`, Table 6: `LAYER_SETS[name]`).

    weights: dict layer -> weight, at least one; see `perceptual_terms` for the rest.
    returns: float32 scalar.
    """
    terms = perceptual_terms(vgg, x, x_hat, weights)
    return sum(weights[name] * term for name, term in terms.items())


def lpips_like(vgg, x, x_hat):
    """LPIPS-style distance of each image pair, (B,) float32, for reports only: never trained on.

    As in LPIPS, features are normalised to unit length over channels at each position and squared
    differences are averaged over positions; unlike LPIPS, layers carry no learned weights and `vgg` may be
    a VGG of one's own, so values compare with each other and with nothing published.
    """
    with torch.no_grad():
        a, b = vgg(x, LAYERS), vgg(x_hat, LAYERS)
    unit = [(F.normalize(a[name].float(), dim=1), F.normalize(b[name].float(), dim=1)) for name in LAYERS]
    return sum((u - v).square().sum(1).mean((1, 2)) for u, v in unit)


# ----------------------------------------------------------------------------------------------------------
# The style-based discriminator
# ----------------------------------------------------------------------------------------------------------


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


class Blur(nn.Module):
    """Depthwise low-pass filter, outer product of [1, 3, 3, 1], normalised to sum 1; same as F.conv2d."""

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
    """The residual discriminator of StyleGAN2 (Sec. 6.1: style-based, as in ViT-VQGAN; details ours).

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


# ----------------------------------------------------------------------------------------------------------
# The losses of both players (Eq. 2)
# ----------------------------------------------------------------------------------------------------------


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


def r1_penalty(discriminator, x, gamma=10.0):
    """R1 = gamma/2 * mean_b ||grad_x D(x)||^2 on real images (ours; not in the paper).

    x:       (B, 3, H, W) real images. Logits that are maps are summed over their patches.
    returns: float32 scalar, with a graph for the second backward; computed in float32 outside autocast.
    The caller applies it every 16th step and multiplies by 16 (lazy regularisation).
    """
    eager = torch.compiler.set_stance("force_eager")  # torch.compile has no second backward
    with eager, torch.autocast(x.device.type, enabled=False):
        x = x.detach().float().requires_grad_(True)
        (grad,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)  # (B, 3, H, W)
        return gamma / 2 * grad.square().sum(dim=(1, 2, 3)).mean()
