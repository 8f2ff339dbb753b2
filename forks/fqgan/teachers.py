"""FQGAN's teachers: frozen networks image -> (B, width), and where their weights come from."""

import hashlib
import math
import re
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.errors import as_user_error, one_line
from plumbing.files import load_torch
from plumbing.processes import fetched
from plumbing.stages import vgg_sizes


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
            state = load_torch(source)
        return Teacher(Dino(state), state["cls_token"].shape[2], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    except OSError as error:
        raise RuntimeError(f"teacher {source} could not be fetched ({one_line(error)}); fetch its file "
                           "elsewhere and name it in teachers") from None
    except Exception as error:  # a file of something else
        raise ValueError(f"teacher {source} cannot be read: {one_line(error)}") from None


def chosen(config):
    """(names, widths) of the sub-codebooks that have a teacher, in their order."""
    widths = [width for width in config["tokenizer"].get("teacher_widths", []) if width]
    return [name for name in config["phase1"].get("teachers", []) if name], widths


def check_teachers(config):
    """raises: ValueError where the teachers of a preset do not fit its tokenizer"""
    names, widths = chosen(config)
    if len(names) != len(widths):
        raise ValueError(f"{len(names)} teachers, but tokenizer.teacher_widths names {len(widths)} widths")
    places = [[bool(entry) for entry in config[section].get(key, [])]
              for section, key in (("phase1", "teachers"), ("tokenizer", "teacher_widths"))]
    if names and places[0] != places[1]:
        raise ValueError("phase1.teachers must be null where tokenizer.teacher_widths is 0, and nowhere else")
    known = dict(TEACHERS)
    if "vgg" in names:
        known["vgg"] = 8 * vgg_sizes(config)["width"]
    for name, width in zip(names, widths, strict=True):
        if name != "vgg" and name not in TEACHERS and not Path(str(name)).is_file():
            raise ValueError(f"teacher {name}: no such file, and not one of vgg, {', '.join(TEACHERS)}")
        check_width(name, known.get(name, width), width)


def check_width(name, has, width):
    if has != width:
        raise ValueError(f"teacher {name} gives {has} features, not the {width} of tokenizer.teacher_widths")


def load_teachers(run):
    """The networks that `phase1.teachers` names.  raises: UserError for one of another width"""
    names, widths = chosen(run.config)

    def load():
        with as_user_error():
            return [VGGTeacher(run.vgg) if name == "vgg" else load_teacher(name) for name in names]

    found = load() if set(names) <= {"vgg"} else fetched(load)
    with as_user_error():
        for name, teacher, width in zip(names, found, widths, strict=True):
            check_width(name, teacher.width, width)
    return [teacher.to(run.device) for teacher in found]
