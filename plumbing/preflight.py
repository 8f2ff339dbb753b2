"""What the stages of a command would refuse, found before the first of them begins."""

import difflib
import json
from dataclasses import fields

import torch

from plumbing.drawing import new_figure
from plumbing.errors import UserError, as_user_error
from plumbing.files import header, intact, is_checkpoint, read_checkpoint
from plumbing.models import classes_of, earlier_tokenizer, new_discriminator, new_prior, refuse_unread
from plumbing.processes import on_rank0, print0, world
from plumbing.stages import DEPENDS, SECTION, needs_vgg, refuse_other_config, refuse_other_images
from plumbing.weights import ResNet, build_vgg16
from recipes.options import KINDS, STAGES


def stages_of(args, config):
    """The stages that a command trains, in their order (a preset may have its own); of --explain all."""
    if args.stage not in (None, "all") and not args.explain:
        return [args.stage]
    return [stage for stage in config.get("stages", STAGES) if stage != "vgg" or config["vgg"] == "own"]


def build_on_meta(config, stages, given=None):
    """The networks of `stages` without their weights, so that sizes which do not fit are refused at once.

    given:   checkpoint of the tokenizer that --tokenizer names, where it counts and not the preset's
    returns: dict of what the stages build: vgg, resnet, phase1, phase2, disc, ar, nar, on the meta device
    raises:  UserError for what a network refuses
    """
    import torchvision.models  # noqa: F401  now: with the meta device set, PyTorch before 2.10 cannot import it

    own = classes_of(config)["tokenizer"]  # now too: tensors that a fork makes as it is imported are real
    Tokenizer, sizes = own, dict(config["tokenizer"], image_size=config["image_size"])
    if given:
        Tokenizer, sizes = classes_of(given["config"])["tokenizer"], given["model_config"]
    found, phases, vgg = {}, {"phase1", "phase2"} & {*stages}, config["classifier"]
    with as_user_error(), torch.device("meta"):
        if "vgg" in stages or phases and config["vgg"] == "own":
            found["vgg"] = build_vgg16(vgg["width"], 10, vgg["hidden"], True, vgg["skip_pools"])
        if "resnet" in stages:
            found["resnet"] = ResNet(vgg["width"])
        if not {*stages} - {"vgg", "resnet"}:
            return found
        check_tokenizer_values(config["tokenizer"], own.Config)
        refuse_unread(own, own.Config(**config["tokenizer"] | dict(image_size=config["image_size"])))
        found["phase1"] = Tokenizer(Tokenizer.Config(**sizes))
        if "phase2" in stages:
            found["phase2"] = Tokenizer(Tokenizer.Config(**sizes))
            found["phase2"].add_attention()
        if phases:
            found["disc"] = new_discriminator(config)
            check_perception(config, phases)
        if "phase1" in phases and hasattr(Tokenizer, "check"):
            Tokenizer.check(config)
        for stage in {"ar", "nar"} & {*stages}:
            found[stage] = new_prior(config, stage, found["phase1"], 1000)
    return found


def given_tokenizer(args, config):
    """(checkpoint of --tokenizer for stages that use it as it is, else None; configuration)

    Phase 2 of another project's tokenizer takes fork and sizes from the file, and the recipe from the preset.
    raises: UserError for a preset of a fork there, and for a size that the command line sets
    """
    stages = dict(phase2=("phase1",), ar=("phase1", "phase2"), nar=("phase1", "phase2")).get(args.stage)
    if not stages or not args.tokenizer or args.explain:
        return None, config
    given = read_checkpoint(args.tokenizer, stages)
    if args.stage != "phase2" or given["fingerprint"]:  # of the images of a run of ours
        return given, config
    if config["fork"]:
        raise UserError(f"--preset {args.preset} is of the fork {config['fork']}, and {args.tokenizer} of "
                        f"{given['config']['fork']}; name a preset without a fork, as imagenet")
    for name in (*args.set, *getattr(args, "expanded", ())):
        if name.startswith(("tokenizer.", "image_size")):
            raise UserError(f"{name.partition('=')[0]} comes from {args.tokenizer} here; leave it out")
    return given, dict(config, **{key: given["config"][key] for key in ("fork", "tokenizer", "image_size")})


def check_tokenizer_values(values, Config):
    """raises: ValueError for a key of the preset's tokenizer section that there is not, or another type"""
    types = {field.name: field.type for field in fields(Config) if field.name != "image_size"}
    for key, value in values.items():
        if key not in types:
            close = difflib.get_close_matches(key, types, 1)
            raise ValueError(f"tokenizer.{key}: a tokenizer has no such value"
                             + (f"; did you mean tokenizer.{close[0]}?" if close else ""))
        numbers = value if types[key] is tuple and isinstance(value, list | tuple) else [value]
        right = isinstance(value, types[key]) or types[key] is tuple and isinstance(value, list)
        right = right or types[key] is float and type(value) is int
        if types[key] in (int, tuple):
            right = right and all(type(n) is int and n >= 0 for n in numbers)
        if not right:
            wanted = {int: "a whole number from 0 on", tuple: "a list of whole numbers from 0 on"}
            raise ValueError(f"tokenizer.{key} must be {wanted.get(types[key]) or KINDS[types[key]]}, "
                             f"got {json.dumps(value)}")


def check_perception(config, phases):
    """raises: ValueError where the VGG and the layers of a preset do not fit together"""
    own = config["vgg"] == "own" or is_checkpoint(config["vgg"])
    for phase in sorted(phases):
        if config[phase]["layers"] == "lpips" and own:
            raise ValueError(f"{phase}.layers=lpips needs torchvision's VGG-16, --vgg imagenet or a .pth "
                             f"file of it; {config['vgg']} is another")


def with_vgg(run, stages):
    """`stages`, after the stage vgg where a phase needs the run's own VGG and that is not finished."""
    if "vgg" in stages or not {"phase1", "phase2"} & {*stages} or not needs_vgg(run):
        return stages
    if "phase1" not in stages:  # refused before the VGG takes its minutes
        earlier_tokenizer(run, ("phase1",), "discriminator")
    print0(f"note: the perceptual loss needs a VGG and {run.out / 'vgg.pt'} is not finished: training it "
           "first")
    return ["vgg", *stages]


def check_stages(run, stages, networks):
    """What the stages need of the data, of the processes and of the run folder; nothing is written.

    networks: of `build_on_meta`
    raises:   UserError for what any of the stages would refuse, before the first of them begins
    """
    for stage in stages:
        check_batch(run, stage)
        check_labels(run, stage)
    given = run.args.tokenizer
    if "phase1" in stages and given:
        with as_user_error():  # the shapes: nothing is copied
            networks["phase1"].load_state_dict(read_checkpoint(given, ("phase1",))["model"], assign=True)
    elif "phase1" in stages and run.config["phase1"]["init"] and not (run.out / "phase1.pt").exists():
        raise UserError("this preset starts from an ImageNet phase 1 (Table 9): pass --tokenizer FILE")
    on_rank0(lambda: check_folder(run, stages))
    if run.args.stage == "all":
        new_figure(1, 1)  # the summary draws some


def check_batch(run, stage):
    """raises: UserError for a batch that the processes cannot share; notes name odd micro-batches and
    a learning rate that never decays"""
    c, count = run.config[SECTION[stage]], world()
    batch = c["batch"]
    if batch % count:
        nearest = " or ".join(str(n) for n in (batch // count * count, (batch // count + 1) * count) if n)
        raise UserError(f"batch {batch} cannot be split over {count} processes; use {nearest}")
    if c["schedule"] != "constant" and c["lr_start"] >= max(1, c["steps"]):
        name = f"{SECTION[stage]}.lr_start"
        print0(f"note: {stage}: the learning rate does not decay in {c['steps']} steps; that would begin at "
               f"{name}={c['lr_start']}")
    if stage in ("phase1", "phase2") and run.config["discriminator"]["kind"] == "style" and c["adv_weight"]:
        odd = odd_groups(batch // count, run.args.micro_batch)
        if odd:
            print0(f"note: {stage}: {odd}")


def odd_groups(share, micro):
    """What to say of micro-batches that change the groups of `minibatch_stddev`, or "".

    share: images of a process in a step;  micro: --micro-batch or None
    """
    micro = min(micro or share, share)
    sizes = sorted({micro, share % micro or micro})
    groups = sorted({max(g for g in (1, 2, 3, 4) if size % g == 0) for size in sizes})
    if groups == [4]:
        return ""
    images, four = (" and ".join(map(str, numbers)) for numbers in (sizes, groups))
    return (f"in micro-batches of {images} images the style discriminator compares groups of {four} images, "
            "not of 4; batch per process and --micro-batch should be multiples of 4")


def check_labels(run, stage):
    """raises: UserError for a stage that learns from classes where the data has none"""
    if run.train.class_names:
        return
    if stage in ("vgg", "resnet"):
        raise UserError("--stage vgg needs labels, one sub-folder per class; for images without classes pass "
                        "--vgg imagenet --set conditional=false")
    if stage in ("ar", "nar") and run.config["conditional"]:
        raise UserError("this preset's priors are class-conditional and the data has no class sub-folders; "
                        "sort the images into folders or pass --set conditional=false")


def check_folder(run, stages):
    """raises: UserError for a checkpoint of a later stage that this run's values or images cannot continue"""
    for stage in stages[1:]:  # the first one's is looked at, and set aside if damaged, when it starts
        path = run.out / f"{stage}.pt"
        try:
            ckpt = header(path) if path.is_file() else {}
        except UserError:
            if intact(path):
                raise
            continue
        if {"config", "fingerprint", "class_names"} <= ckpt.keys():
            refuse_other_config(path, DEPENDS[stage], ckpt["config"], run.config)
            refuse_other_images(path, ckpt, run)
