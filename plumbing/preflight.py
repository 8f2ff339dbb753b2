"""What the stages of a command would refuse, found before the first of them begins."""

import difflib
import json
from dataclasses import fields

import torch

from plumbing.errors import UserError, as_user_error
from plumbing.files import is_checkpoint, newest_intact, read_checkpoint
from plumbing.models import classes_of, earlier_tokenizer, new_discriminator, new_prior, refuse_unread
from plumbing.processes import on_rank0, print0, world
from plumbing.stages import SECTION
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
        kind = types[key]
        if kind is tuple:
            right = isinstance(value, list | tuple) and all(type(n) is int and n >= 0 for n in value)
        elif kind is int:
            right = type(value) is int and value >= 0
        else:
            right = isinstance(value, kind) or kind is float and type(value) is int
        if not right:
            raise ValueError(f"tokenizer.{key} must be {KINDS[list if kind is tuple else kind]}, got "
                             f"{json.dumps(value)}")


def check_perception(config, phases):
    """raises: ValueError where a phase wants LPIPS of another VGG than torchvision's"""
    for phase in phases:
        if config[phase]["layers"] == "lpips" and (config["vgg"] == "own" or is_checkpoint(config["vgg"])):
            raise ValueError(f"{phase}.layers=lpips needs torchvision's VGG-16, --vgg imagenet or a .pth "
                             f"file of it; {config['vgg']} is another")


def with_vgg(run, stages):
    """`stages`, after the stage vgg where a phase needs the run's own VGG and that is not finished."""
    if run.config["vgg"] != "own" or "vgg" in stages or not {"phase1", "phase2"} & {*stages}:
        return stages
    own = on_rank0(lambda: newest_intact(run.out / "vgg.pt"))
    if own and read_checkpoint(own, ["vgg"])["step"] >= run.steps("vgg"):
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
        check_later(run, stage)
    given = run.args.tokenizer
    if "phase1" in stages and given:
        with as_user_error():  # the shapes: nothing is copied
            networks["phase1"].load_state_dict(read_checkpoint(given, ("phase1",))["model"], assign=True)
    elif "phase1" in stages and run.config["phase1"]["init"] and not (run.out / "phase1.pt").exists():
        raise UserError("this preset starts from an ImageNet phase 1 (Table 9): pass --tokenizer FILE")


def check_later(run, stage):
    """raises: UserError where more steps of a stage would part it from what the folder has made of it"""
    file = on_rank0(lambda: newest_intact(run.out / f"{stage}.pt"))
    if not file or read_checkpoint(file, [stage])["step"] >= run.steps(stage):
        return
    for later in dict(vgg=("phase1", "phase2"), phase1=("phase2", "ar", "nar")).get(stage, ()):
        if (made := run.out / f"{later}.pt").exists():
            raise UserError(f"{file} would go on to {run.steps(stage)} steps, and {made} was made from it as "
                            f"it is; move that and {later}.previous.pt away, or use another --out")


def check_batch(run, stage):
    """raises: UserError for a batch that the processes cannot share; notes name odd micro-batches and
    a learning rate that never decays"""
    c, count = run.config[SECTION[stage]], world()
    batch, micro = c["batch"], run.args.micro_batch or 4
    if batch % count:
        raise UserError(f"{SECTION[stage]}.batch={batch} cannot be split over {count} processes; use a "
                        f"multiple of {count}")
    if c["schedule"] != "constant" and c["lr_start"] >= max(1, c["steps"]):
        name = f"{SECTION[stage]}.lr_start"
        print0(f"note: {stage}: the learning rate does not decay in {c['steps']} steps; that would begin at "
               f"{name}={c['lr_start']}")
    if stage not in ("phase1", "phase2") or run.config["discriminator"]["kind"] != "style":
        return
    if c["adv_weight"] and (batch // count % 4 or micro % 4):
        print0(f"note: {stage}: the style discriminator compares groups of 4 images; the batch of a process "
               "and --micro-batch should be multiples of 4")


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
