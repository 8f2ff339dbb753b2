"""FQGAN's teachers: frozen networks image -> (B, width). CLIP's and DINOv2's are those of timm (optional)."""

import itertools
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.errors import UserError, as_user_error, one_line
from plumbing.files import check_digest, load_torch
from plumbing.processes import fetched
from plumbing.stages import vgg_sizes

TEACHERS = {  # name -> (timm's name, width)
    "clip-vit-l-14": ("vit_large_patch14_clip_quickgelu_224.openai", 1024),
    "clip-vit-b-16": ("vit_base_patch16_clip_quickgelu_224.openai", 768),
    "dinov2-vit-s-14": ("vit_small_patch14_dinov2.lvd142m", 384)}


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


class VGGTeacher(nn.Module):
    """For machines without downloads: a VGG of --stage vgg, its relu5_3 averaged over positions (ours)."""

    def __init__(self, vgg):
        super().__init__()
        self.vgg = vgg
        self.width = [m for m in vgg.modules() if isinstance(m, nn.Conv2d)][-1].out_channels

    @torch.no_grad()
    def forward(self, x):
        return self.vgg(x, ["relu5_3"])["relu5_3"].float().mean((2, 3))


def load_teacher(source):
    """FQGAN's teachers: the class token of CLIP's last layer before the final norm, or of DINOv2-S after it.

    source:  one of TEACHERS, which timm fetches from Hugging Face; or a local file of theirs as published:
             CLIP's TorchScript archive or DINOv2's state dict (see `check_digest`)
    raises:  UserError without timm; ValueError for a file that is damaged or foreign; RuntimeError for one
             that is not there, and where a download fails
    """
    try:
        import timm
    except ImportError:
        raise UserError(f"teacher {source} needs a package: pip install timm") from None
    try:
        name, given = source, {}
        if source not in TEACHERS:
            given = dict(state_dict=read(source))
            name = whose(given["state_dict"])
        network = timm.create_model(
            TEACHERS[name][0], pretrained=True, pretrained_cfg_overlay=given, img_size=224)
    except OSError as error:
        raise RuntimeError(f"teacher {source} could not be fetched ({one_line(error)}); fetch its file "
                           "elsewhere and name it in teachers") from None
    except Exception as error:  # a file of something else
        raise ValueError(f"teacher {source} cannot be read: {one_line(error)}") from None
    network.reset_classifier(0)  # CLIP's projection
    if name.startswith("clip"):
        network.norm = nn.Identity()
    return Teacher(network, TEACHERS[name][1], network.pretrained_cfg["mean"], network.pretrained_cfg["std"])


def read(path):
    """The state dict of a published file."""
    check_digest(path)
    if zipfile.is_zipfile(path) and any("constants.pkl" in name for name in zipfile.ZipFile(path).namelist()):
        return torch.jit.load(path, map_location="cpu").state_dict()
    return load_torch(path)


def whose(state):
    """The name of the teacher that has a class token of this width.  raises: ValueError if none has"""
    tokens = state.get("visual.class_embedding"), state.get("cls_token")  # (W,) of CLIP, (1, 1, W) of DINOv2
    widths = [token.shape[-1] for token in tokens if token is not None]
    for name, (_, width) in TEACHERS.items():
        if width in widths:
            return name
    raise ValueError(f"no network of {', '.join(TEACHERS)}")


def chosen(config):
    """[(name, width)] of the sub-codebooks that have a teacher.

    raises: ValueError where a sub-codebook has a teacher without a width, or a width without a teacher
    """
    names, widths = config["phase1"].get("teachers", []), config["tokenizer"].get("teacher_widths", [])
    pairs = list(itertools.zip_longest(names, widths))
    if any(bool(name) != bool(width) for name, width in pairs):
        raise ValueError("phase1.teachers must be null where tokenizer.teacher_widths is 0, and nowhere else")
    return [(name, width) for name, width in pairs if name]


def check_teachers(config):
    """raises: ValueError where the teachers of a preset do not fit its tokenizer"""
    for name, width in chosen(config):
        if name == "vgg":
            check_width(name, 8 * vgg_sizes(config)["width"], width)
        elif name in TEACHERS:
            check_width(name, TEACHERS[name][1], width)
        elif not Path(str(name)).is_file():
            raise ValueError(f"teacher {name}: no such file, and not one of vgg, {', '.join(TEACHERS)}")


def check_width(name, has, width):
    if has != width:
        raise ValueError(f"teacher {name} gives {has} features, not the {width} of tokenizer.teacher_widths")


def load_teachers(run):
    """The networks that `phase1.teachers` names.  raises: UserError for one of another width"""
    def load():
        return [VGGTeacher(run.vgg) if name == "vgg" else load_teacher(name) for name, _ in pairs]

    with as_user_error():
        pairs = chosen(run.config)
        found = load() if {name for name, _ in pairs} <= {"vgg"} else fetched(load)
        for (name, width), teacher in zip(pairs, found, strict=True):
            check_width(name, teacher.width, width)
    return [teacher.to(run.device) for teacher in found]
