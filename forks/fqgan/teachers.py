"""FQGAN's teachers: frozen networks image -> (B, width), and where their weights come from."""

import itertools
import math
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VisionTransformer

from plumbing.errors import as_user_error, one_line
from plumbing.files import check_digest, load_torch
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


def vision_transformer(state):
    """DINOv2's network for 224x224 pixels as torchvision's; it gives the normalised class token, (B, width).

    state:  state dict of DINOv2's files, which fixes width, depth and patches; heads have 64 channels
    raises: KeyError or RuntimeError for other names or shapes
    LayerScale is multiplied into the layers before it, and the positions are interpolated here, once.
    """
    state, (count, width) = dict(state), state["pos_embed"].shape[1:]
    del state["mask_token"]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    patch, side = state["patch_embed.proj.weight"].shape[2], math.isqrt(count - 1)
    for i, (scale, layer) in itertools.product(range(depth), (("ls1", "attn.proj"), ("ls2", "mlp.fc2"))):
        gamma, scaled = state.pop(f"blocks.{i}.{scale}.gamma"), f"blocks.{i}.{layer}"
        state[f"{scaled}.weight"] = state[f"{scaled}.weight"] * gamma[:, None]
        state[f"{scaled}.bias"] = state[f"{scaled}.bias"] * gamma
    first, grid = state["pos_embed"].split([1, count - 1], 1)
    grid = F.interpolate(grid.unflatten(1, (side, side)).permute(0, 3, 1, 2), mode="bicubic",
                         scale_factor=(224 // patch + 0.1) / side)  # the published models' 0.1
    state["pos_embed"] = torch.cat([first, grid.flatten(2).transpose(1, 2)], 1)
    for theirs, torchvision in DINO_NAMES.items():
        state = {name.replace(theirs, torchvision): value for name, value in state.items()}
    network = VisionTransformer(224, patch, depth, width // 64, width, 4 * width)
    network.heads = nn.Identity()
    network.load_state_dict(state, strict=True)
    return network


DINO_NAMES = {  # in this order: what the last one finds is the norm at the end
    "patch_embed.proj": "conv_proj", "cls_token": "class_token", "pos_embed": "encoder.pos_embedding",
    "blocks.": "encoder.layers.encoder_layer_", "norm1": "ln_1", "norm2": "ln_2", "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3", "attn.qkv.": "self_attention.in_proj_", "attn.proj": "self_attention.out_proj",
    "norm.": "encoder.ln."}
DINO_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"
TEACHERS = {"clip-vit-l-14": 1024, "clip-vit-b-16": 768, "dinov2-vit-s-14": 384}  # name -> width


def is_torchscript(path):
    return zipfile.is_zipfile(path) and any("constants.pkl" in n for n in zipfile.ZipFile(path).namelist())


def load_teacher(source):
    """FQGAN's teachers: the class token of CLIP's last layer before the final norm (width 1024 or 768), or of
    DINOv2-S after it (384).

    source:  one of TEACHERS, downloaded once (CLIP's hash is checked, DINOv2 publishes none); or a local
             file of theirs, CLIP's TorchScript archive or DINOv2's state dict (see `check_digest`)
    raises:  ValueError for a file that is damaged or foreign; RuntimeError for one that is not there, and
             where a download fails
    """
    try:
        if source not in TEACHERS:
            check_digest(source)
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
        return Teacher(vision_transformer(state), state["cls_token"].shape[2], (0.485, 0.456, 0.406),
                       (0.229, 0.224, 0.225))
    except OSError as error:
        raise RuntimeError(f"teacher {source} could not be fetched ({one_line(error)}); fetch its file "
                           "elsewhere and name it in teachers") from None
    except Exception as error:  # a file of something else
        raise ValueError(f"teacher {source} cannot be read: {one_line(error)}") from None


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
        if name not in ("vgg", *TEACHERS) and not Path(str(name)).is_file():
            raise ValueError(f"teacher {name}: no such file, and not one of vgg, {', '.join(TEACHERS)}")
        own = 8 * vgg_sizes(config)["width"] if name == "vgg" else TEACHERS.get(name, width)
        check_width(name, own, width)


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
