"""The command lines of train.py, sample.py and visualize.py, without torch: --help and a wrong flag answer at
once. Presets are those of paper.py and small.py, and of the forks as NAME or FORK.NAME."""

import argparse
import difflib
import importlib
import json
import os
import sys
from pathlib import Path

import forks
from plumbing.console import steady_process
from plumbing.paths import as_path, expanded
from recipes import paper, small
from recipes.ablations import TABLES, expand_ablation
from recipes.values import KINDS, check_values

STAGES = ("vgg", "phase1", "phase2", "ar", "nar")
PRESETS = paper.PRESETS | small.PRESETS
FIGURES = dict(
    view="input, reconstruction, prediction and hits of one or several ar.pt (Fig. 3)",
    fig1b="AR predictions of several ar.pt", fig3="one image step by step, of an ar.pt",
    fig4="reconstructions and AR predictions, a row for each ar.pt", fig5a="AR predictions, by alpha",
    fig7a="samples of a nar.pt or ar.pt decoded by phase 1 and phase 2",
    fig8="tokens with and without noise, of several phase1.pt",
    fig9="as fig7a, of several priors, enlarged", fig10="validation losses of several ar.pt or nar.pt",
    fig11="reconstructions and AR predictions of several ar.pt, image by image",
    metrics="results of sample.py --metrics side by side",
    balance="sizes and gradients of the perceptual loss's layers beside L1's, of several phase1.pt",
    positions="nats at each position, of several ar.pt",
    compare="a probe of tokenizers, phase1.pt or phase2.pt",
    report="one HTML page of a run folder")
STUDIES = dict(  # of these and of the tables: what answers, module and function of the folder studies/
    metrics="tables.compare_metrics", balance="balance.balance", positions="positions.positions",
    compare="probe.compare", report="report.report", claims="claims.claims", forks="fork_table.fork_table")
SAMPLER = dict(  # flags of sample.py and --sweep: type
    temperature=float, top_k=int, top_p=float, nar_steps=int, token_temperature=float,
    choice_temperature=float, guidance=float)


def begin(script):
    """What `main` of a script that was started takes. The script is known by its name from then on, so that
    no study imports it a second time."""
    steady_process()
    sys.modules[script] = sys.modules["__main__"]
    return dict(train=train_args, sample=sample_args, visualize=visualize_args)[script]()


def new_parser():
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    try:
        importlib.import_module("tqdm")  # reads variables named TQDM_...
    except ValueError as error:
        names = ", ".join(name for name in os.environ if name.startswith("TQDM_"))
        parser.error(f"the environment's {names} cannot be read by tqdm: {error}")
    return parser, parser.add_argument


def find_preset(name):
    """raises: ValueError if neither recipes nor forks have it"""
    preset = PRESETS.get(name) or forks.preset(name)
    if preset is None:
        raise ValueError(f"--preset {name}: not one of {', '.join(PRESETS)}, nor of the forks "
                         f"{', '.join(forks.names())} (as FORK.NAME)")
    return preset


def train_args(words=None):
    """Command line to (args, config): config is the preset with every flag and --set applied."""
    parser, add = new_parser()
    add("--stage", choices=(*STAGES, "all"), help="what to train")
    add("--preset", default="demo", help=f"recipe: {', '.join(PRESETS)}, or one of a fork, for instance "
        f"demo-fq ({', '.join(forks.names())}: FORK.NAME) (default: demo)")
    add("--data", type=expanded, help="folder of images (with class sub-folders or without), 'DIR/*.tar', "
        "'cifar10' or 'shapes'")
    add("--val", type=expanded, help="folder of validation images (default: DATA/val beside DATA/train, else "
        "a 5 %% split)")
    add("--out", type=as_path, help="run folder (default: runs/<preset>)")
    add("--tokenizer", type=as_path, help="tokenizer checkpoint for phase2, ar, nar; first weights of phase1")
    add("--vgg", type=expanded, help="perceptual network: 'imagenet', a torchvision .pth, a vgg.pt of ours, "
        "'own' (this run's, trained first) or 'random'")
    add("--steps", type=int, help="optimizer steps of this stage")
    add("--batch", type=int, help="global batch of this stage, over all processes")
    add("--micro-batch", type=int, help="largest batch per process and forward pass; the rest is accumulated")
    add("--alpha", type=float, help="semantic ratio of Eq. 4 in phase1")
    add("--ablation", help="a row of a table: alpha=NUMBER or " + ", ".join(dict.fromkeys(
        row.name for table in TABLES.values() for row in table["rows"] if "=" not in row.name)))
    add("--arch", choices=("vgg", "resnet"), default="vgg", help="of --stage vgg: VGG, or a FID classifier")
    add("--seed", type=int, help="seed of everything (default 0)")
    add("--limit", type=int, help="use only LIMIT training images, drawn by the seed")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one preset value")
    add("--workers", type=int, default=0, help="data loading processes per rank (0: in the training process)")
    add("--device", default="auto", help="cuda, cpu or auto")
    add("--timeout", type=float, default=1800, help="seconds until processes give up a dead or hung one")
    add("--precision", choices=("bf16", "fp32"), help="autocast type (default: bf16)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--log-every", type=int, default=20, help="steps between metrics lines")
    add("--eval-every", type=int, help="steps between validations, 0: none (default: a fifth of the run)")
    add("--save-every", type=int, help="steps between checkpoints (default: a tenth, at most 2000)")
    add("--explain", action="store_true", help="print modules, sizes and recipe of the preset, then stop")
    args, unknown = parser.parse_known_args(words)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {close[0]}?" if close else ""))
    if not (args.stage or args.explain):
        parser.error("--stage is missing. To see the whole method work: python train.py --stage all")
    if args.arch == "resnet":
        if args.stage != "vgg":
            parser.error("--arch resnet belongs to --stage vgg")
        args.stage = "resnet"
    try:
        return args, build_config(args)
    except ValueError as error:
        parser.error(str(error))


def flag(key):
    return "--" + key.removeprefix("nar_").replace("_", "-")


def put(config, item):
    """One --set SECTION.KEY=VALUE into the configuration."""
    place, _, text = item.partition("=")
    *section, key = place.split(".")
    target = config[section[0]] if section and isinstance(config.get(section[0]), dict) else config
    known = key in target or section == ["tokenizer"]
    wrong = not known or key == "fork" or isinstance(target.get(key), dict)  # a section as a whole
    if not text or len(section) > 1 or (section and target is config) or wrong:
        raise ValueError(f"--set {item}: expected SECTION.KEY=VALUE with a key of the preset")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    old = target.get(key)
    if old is not None and type(value) is not type(old) and (type(old), type(value)) != (float, int):
        raise ValueError(f"--set {item}: expected {KINDS.get(type(old), 'one value of this section')}")
    if key in ("data", "val") and not isinstance(value, str):
        raise ValueError(f"--set {item}: expected a word")
    target[key] = expanded(value) if key in ("data", "val", "vgg", "teachers") else value


def refuse_ignored(config, preset):
    """raises: ValueError for a value that was changed and that nothing reads"""
    unread = [("phase2", name, "phase 2 trains on fixed tokens, without the losses of phase 1")
              for name in ("beta", "gamma")]
    if config["discriminator"]["kind"] == "patch":
        unread += [("discriminator", name, "PatchGAN has its own widths")
                   for name in ("channel_multiplier", "max_width")]
    for section, name, why in unread:
        if config[section].get(name) != preset[section].get(name):
            raise ValueError(f"{section}.{name} changes nothing: {why}; leave it out")


def build_config(args):
    """The preset of the command line with `--data`, `--steps`, ... and every `--set` written into it."""
    check_values(vars(args), flag)
    preset = find_preset(args.preset)
    config = paper.variant(preset)
    for item in args.set:
        put(config, item)
    for key in ("data", "val", "vgg", "seed", "limit", "precision"):
        if getattr(args, key) is not None:
            config[key] = getattr(args, key)
    for key in ("steps", "batch"):
        if getattr(args, key) is not None:
            if args.stage in (None, "all"):
                raise ValueError(f"--{key} belongs to one stage; use --set phase1.{key}=... with --stage all")
            config["classifier" if args.stage in ("vgg", "resnet") else args.stage][key] = getattr(args, key)
    if args.alpha is not None:
        if config["phase1"]["layers"]:
            raise ValueError(f"--alpha does nothing beside phase1.layers = {config['phase1']['layers']}; "
                             "--ablation alpha=NUMBER puts it in their place")
        config["phase1"]["alpha"] = args.alpha
    if args.ablation:
        if args.alpha is not None:
            raise ValueError("--ablation sets alpha itself; leave --alpha out")
        own = [] if config["fork"] is None else getattr(forks.load(config["fork"]), "TABLES", {}).values()
        args.expanded = expand_ablation(args.ablation, config, own)
        for place, value in args.expanded.items():
            *section, key = place.split(".")
            (config[section[0]] if section else config)[key] = value
    refuse_ignored(config, preset)
    guided = config["conditional"] and config["sample"].get("guidance", 1) != 1
    if guided and not config["prior"].get("class_dropout"):
        raise ValueError("sample.guidance needs a prior that knows the null class: --set "
                         "prior.class_dropout=0.1 too")
    check_values(config, str)
    for section, values in config.items():
        if isinstance(values, dict):
            check_values(values, lambda key, section=section: f"{section}.{key}")
    return config


def sample_args(words=None):
    """Command line of sample.py; `values` are the (name, value) of --sweep."""
    parser, add = new_parser()
    add("--ckpt", type=as_path, required=True, help="ar.pt, nar.pt; with --reconstruct phase1.pt, phase2.pt")
    add("--tokenizer", type=as_path, help="tokenizer that decodes (default: that beside CKPT)")
    add("--count", "--num", dest="num", type=int, help="number of images (default 80; --metrics: 50,000)")
    add("--classes", help="names or numbers, separated by commas (default: all, in turn)")
    add("--reconstruct", action="store_true", help="reconstruct validation images instead of sampling")
    add("--edit", type=as_path, metavar="IMAGE", help="of a nar.pt: redraw a part of this image")
    add("--box", metavar="X,Y,W,H", help="of --edit: what is redrawn, in pixels of the image")
    add("--mask", type=as_path, help="of --edit: an image of the same form, white where it is redrawn")
    add("--onto", metavar="X,Y,SIDE", help="of --edit: lay the image on this square, draw the rest")
    add("--data", type=expanded, help="of --reconstruct and --metrics: folder of images (default: the run's)")
    add("--format", choices=("sheet", "files", "npz"), default="sheet", help="one picture, PNG files, or npz")
    add("--out", type=as_path, help="file or, for --format files, folder to write (default: beside CKPT)")
    add("--metrics", action="store_true", help="measure; of phase1.pt, phase2.pt the reconstructions (rFD)")
    add("--predict", action="store_true", help="with --metrics, of ar.pt: measure the teacher-forced view")
    add("--perturb", action="store_true", help="with --metrics, of phase1.pt, phase2.pt: swap half of the "
        "tokens for near codes first (p-FD)")
    add("--extractor", type=expanded, default="inception", help="features: 'inception' (downloaded), a file "
        "of its weights, or a resnet.pt or vgg.pt of --stage vgg")
    add("--second", type=expanded, help="a second network of features for the same images, as --extractor; "
        "its numbers go to a file of their own, with _2 at the end of the name")
    add("--lpips", type=expanded, default="imagenet", help="VGG-16 of LPIPS: 'imagenet' (downloaded), a .pth "
        "file or 'none'")
    add("--references", type=as_path, default=Path("runs/references"), help="cache of reference statistics")
    add("--reference", type=as_path, help="one file of that cache to compare with, without the data, or "
        "an npz with mu and sigma, as ADM's")
    add("--sweep", metavar="NAME=V1,V2,...", help="--metrics for each value of a sampler setting; CSV, plot")
    add("--seed", type=int, default=0, help="seed of the samples (default 0)")
    add("--temperature", type=float, help="AR: softmax temperature, 0 takes the argmax")
    add("--top-k", type=int, help="AR: only the K likeliest tokens, 0 for all")
    add("--top-p", type=float, help="AR: nucleus (Table 10)")
    add("--steps", type=int, dest="nar_steps", help="NAR: decoding steps (Table 10)")
    add("--token-temperature", type=float, help="NAR: softmax temperature of the candidates")
    add("--choice-temperature", type=float, help="NAR: noise of the choice (Table 10; decision I18)")
    add("--confidence-space", choices=("prob", "log"), help="NAR: score is the probability or its logarithm")
    add("--guidance", type=float, help="scale of classifier-free guidance of a fork that has it; 1 is none")
    add("--batch", type=int, default=32, help="images per forward pass (default 32)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the weights that sample; bf16 is "
        "twice as fast (default: fp32)")
    add("--compile", action="store_true", help="torch.compile what samples; on a GPU also as CUDA graphs")
    add("--device", default="auto", help="cuda, cpu or auto")
    args, name = parser.parse_args(words), ""
    args.values = []
    if args.sweep:
        name, _, values = args.sweep.partition("=")
        name = name.replace("-", "_").removeprefix("nar_").replace("steps", "nar_steps")
        if name not in SAMPLER:
            parser.error(f"--sweep {args.sweep}: {name} is no setting of a sampler")
        try:
            args.values = [(name, SAMPLER[name](value)) for value in values.split(",")]
        except ValueError:
            parser.error(f"--sweep {args.sweep}: expected NAME=NUMBER,NUMBER,...")
    try:
        check_values(vars(args), flag)
        for _, value in args.values:
            check_values({name: value}, lambda key: f"--sweep {args.sweep}: {key}")
    except ValueError as error:
        parser.error(str(error))
    parts = [name for name in ("box", "mask", "onto") if getattr(args, name)]
    if bool(args.edit) != bool(parts):
        parser.error("--edit needs --box, --mask or --onto" if args.edit else f"--{parts[0]} is of --edit")
    if args.edit and (args.metrics or args.reconstruct or args.format == "npz"):
        parser.error("--edit draws; leave --metrics, --reconstruct and --format npz out")
    measuring = [name for name in ("sweep", "predict", "perturb", "second") if getattr(args, name)]
    if measuring and not args.metrics:
        parser.error(f"--{measuring[0]} measures: pass --metrics too")
    if args.compile and (args.edit or args.reconstruct):
        parser.error("--compile is for samples; leave it out with --edit and --reconstruct")
    if args.second and args.reference:
        parser.error("--reference holds features of one network; with --second use --references")
    if args.values and args.predict:
        parser.error("--predict draws no samples, so there is no sampler to sweep")
    return args


def visualize_args(words=None):
    """Command line of visualize.py; figures and tables of forks are known by their names."""
    parser, add = new_parser()
    add("figure", metavar="FIGURE", help="; ".join(
        [f"{name}: {text}" for name, text in FIGURES.items()]
        + [f"{', '.join(TABLES)}, claims, forks: that table",
           f"and the figures and tables of {', '.join(forks.names())}"]))
    add("files", type=as_path, nargs="*", help="metrics: JSON files; compare: tokenizers; report: a run")
    add("--ckpt", type=as_path, nargs="+", default=[], help="checkpoints of the figure")
    add("--tokenizer", type=as_path, nargs="+", default=[], help="one per CKPT (default: found beside each); "
        "fig7a, fig9: that of phase 1 and that of phase 2")
    add("--data", type=expanded, help="folder of images (default: the validation images of the first run)")
    add("--vgg", type=expanded, help="of balance: as train.py (default: that of the run)")
    add("--num", type=int, help="images for the numbers; the first few are drawn (default: 64 at most)")
    add("--pdf", action="store_true", help="figures: write a PDF too")
    add("--steps", type=int, help="of compare: training steps of the probe (default 400)")
    add("--preset", default="demo", help="of tables: what all rows vary, as train.py (default demo)")
    add("--watch", action="store_true", help="of report: write it again whenever the run has news")
    add("--run", action="store_true", help="of tables: train and measure what is missing, row by row")
    add("--stages", default="phase1,ar,nar", help="of tables: what --run makes (default phase1,ar,nar)")
    add("--samples", type=int, help="of tables: images a prior draws (default: demo 2,000, cifar10 and "
        "claims 10,000, else 50,000); of compare: training images of the probe (default 5,000)")
    add("--nproc", type=int, default=1, help="of tables: processes of each command, by torchrun (default 1)")
    add("--workers", type=int, default=0, help="of tables: data loading processes, for train.py")
    add("--extractor", type=expanded, help="of tables and compare: see sample.py (tables: a scorer that "
        "--run trains)")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="of tables: for train.py")
    add("--out", type=as_path, help="PNG to write, numbers go beside it (default: FIGURE.png beside CKPT); "
        "tables: folder of all rows (default: runs/PRESET-tables); report: the HTML file")
    add("--device", default="auto", help="cuda, cpu or auto")
    args = parser.parse_args(words)
    ours, args.fork = (*FIGURES, *TABLES, *STUDIES), None
    if args.figure not in ours:
        args.fork = next((fork for fork in forks.names() if args.figure in forks.shown(fork)), None)
        if args.fork is None:
            parser.error(f"no figure {args.figure!r}; there are {', '.join(ours)}, and those of the forks")
    figures = FIGURES | (getattr(forks.load(args.fork), "FIGURES", {}) if args.fork else {})
    listed, table = args.figure in ("metrics", "compare", "report"), args.figure not in figures
    if not listed and args.files:
        parser.error(f"{args.figure} takes no files, got {args.files[0]}; pass them with --ckpt")
    if listed and not args.files or not (listed or table or args.ckpt):
        parser.error(f"{args.figure} needs {'files' if listed else '--ckpt'}: {figures[args.figure]}")
    if not args.stages or not set(args.stages.split(",")) <= {"phase1", "ar", "nar"}:
        parser.error(f"--stages takes phase1, ar, nar, separated by commas, got {args.stages!r}")
    try:
        check_values(vars(args), flag)
        if args.steps == 0:
            parser.error("--steps must be at least 1")
        if table and find_preset(args.preset)["fork"] != args.fork and args.fork:
            parser.error(f"{args.figure} needs a preset of the fork {args.fork}, for instance --preset "
                         f"{list(forks.load(args.fork).PRESETS)[-1]}")
    except ValueError as error:
        parser.error(str(error))
    if args.figure in ("claims", "forks") and args.preset not in small.PRESETS:
        parser.error(f"{args.figure} trains its own VGG: --preset claims, demo or cifar10")
    if args.figure == "report" and len(args.files) > 1:
        parser.error(f"report is of one run, got {len(args.files)}")
    if args.tokenizer and args.figure in ("fig8", "fig10"):
        parser.error(f"{args.figure} reads no --tokenizer")
    if len(args.ckpt) > 1 and args.figure == "fig3":
        parser.error(f"fig3 is of one --ckpt, got {len(args.ckpt)}")
    if args.watch and args.figure != "report":
        parser.error(f"--watch is of report, not of {args.figure}")
    if args.vgg and args.figure != "balance":
        parser.error(f"--vgg is of balance, not of {args.figure}")
    unread = [name for name in ("ckpt", "tokenizer", "num", "steps") if getattr(args, name)]
    if table and unread:
        parser.error(f"--{unread[0]} is of figures; {args.figure} has --samples, and --set for training")
    wanted = 2 if args.figure in ("fig7a", "fig9") else len(args.ckpt)
    if args.tokenizer and len(args.tokenizer) != wanted:
        parser.error("--tokenizer needs one file per --ckpt (fig7a and fig9: two)")
    return args
