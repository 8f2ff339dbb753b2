"""Every flag of every command, once. Each command lists the keys of FLAGS that it reads.

A key is the name of the flag, followed by a dot and its use where the same word means another thing
elsewhere. Nothing here imports torch: --help and a wrong flag answer at once.
"""

import argparse

import forks
from plumbing.console import print_error
from plumbing.paths import as_path, expanded
from recipes import paper, small
from recipes.ablations import TABLES
from recipes.values import check_values, hint

STAGES = ("vgg", "phase1", "phase2", "ar", "nar")
PRESETS = paper.PRESETS | small.PRESETS
OFFERED = {"guidance": "; --preset guidance.demo trains priors that do"}  # where a setting is read
SAMPLER = dict(  # settings of a sampler that are numbers: type
    temperature=float, top_k=int, top_p=float, nar_steps=int, token_temperature=float,
    choice_temperature=float, guidance=float)
ROWS = dict.fromkeys(row.name for table in TABLES.values() for row in table["rows"] if "=" not in row.name)
FILE, SOURCE = as_path, expanded  # a path; a path or a word such as 'imagenet'
ENTRIES = {  # a flag: type, choices or bool; help; default; further arguments, `names` for another spelling
    # training
    "stage": ((*STAGES, "all"), "what to train"),
    "preset": (str, f"recipe: {', '.join(PRESETS)}, or one of a fork, for instance demo-fq "
               f"({', '.join(forks.names())}: FORK.NAME) (default: demo)", "demo"),
    "data": (SOURCE, "folder of images (with class sub-folders or without), 'DIR/*.tar', 'cifar10' or "
             "'shapes'"),
    "val": (SOURCE, "folder of validation images (default: DATA/val beside DATA/train, else a 5 %% split)"),
    "out.train": (FILE, "run folder (default: runs/<preset>)"),
    "tokenizer.train": (FILE, "tokenizer checkpoint for phase2, ar, nar; first weights of phase1"),
    "vgg": (SOURCE, "perceptual network: 'imagenet', a torchvision .pth, a vgg.pt of ours or its exported "
            "folder, 'own' (this run's, trained first) or 'random'"),
    "steps": (int, "optimizer steps of this stage"),
    "batch": (int, "global batch of this stage, over all processes"),
    "micro_batch": (int, "largest batch per process and forward pass; the rest is accumulated"),
    "alpha": (float, "semantic ratio of Eq. 4 in phase1"),
    "ablation": (str, f"a row of a table: alpha=NUMBER or {', '.join(ROWS)}"),
    "arch": (("vgg", "resnet"), "of --stage vgg: VGG, or a FID classifier", "vgg"),
    "seed": (int, "seed of everything (default 0)"),
    "limit": (int, "use only LIMIT training images, drawn by the seed"),
    "quick": (bool, "a test run of minutes: all schedules of the preset scaled down"),
    "set": (str, "change one preset value", [], dict(action="append", metavar="SECTION.KEY=VALUE")),
    "workers": (int, "data loading processes per rank (0: in the training process)", 0),
    "device": (str, "cuda, cpu, auto, or mps, which nobody has tried", "auto"),
    "timeout": (float, "seconds until processes give up a dead or hung one", 1800),
    "precision": (("bf16", "fp32"), "autocast type (default: bf16, on a CPU without its instructions fp32)"),
    "compile": (bool, "torch.compile the networks"),
    "log_every": (int, "steps between metrics lines", 20),
    "eval_every": (int, "steps between validations, 0: none (default: a fifth of the run)"),
    "save_every": (int, "steps between checkpoints (default: a tenth, at most 2000)"),
    "explain": (bool, "print modules, sizes and recipe of the preset, then stop"),
    "memory": (float, "with --explain: GB of a GPU, for the largest --micro-batch of each stage"),
    # samples and reconstructions
    "ckpt": (FILE, "ar.pt, nar.pt, or phase1.pt, phase2.pt for reconstructions", None, dict(required=True)),
    "tokenizer": (FILE, "tokenizer that decodes (default: that beside CKPT)"),
    "num": (int, "number of images (default: sample.py 80, metrics 50,000, edits 8, else up to 64)", None,
            dict(names=["--num", "--count"])),
    "classes": (str, "names or numbers, separated by commas (default: all, in turn)"),
    "reconstruct": (bool, "reconstruct validation images instead of sampling"),
    "images": (SOURCE, "folder of images (default: those of the run)", None, dict(names=["--data"])),
    "format": (("sheet", "files", "npz"), "one picture, PNG files, or npz", "sheet"),
    "scale": (int, "how many times a sheet is enlarged (default: pictures to 64 pixels at least)"),
    "out": (FILE, "file or folder to write (default: beside what it is made of)"),
    "seed.sample": (int, "seed of the samples (default 0)", 0),
    "temperature": (float, "AR: softmax temperature, 0 takes the argmax"),
    "top_k": (int, "AR: only the K likeliest tokens, 0 for all"),
    "top_p": (float, "AR: nucleus (Table 10)"),
    "nar_steps": (int, "NAR: decoding steps (Table 10)", None, dict(names=["--steps"], dest="nar_steps")),
    "token_temperature": (float, "NAR: softmax temperature of the candidates"),
    "choice_temperature": (float, "NAR: noise of the choice (Table 10; decision I18)"),
    "confidence_space": (("prob", "log"), "NAR: score is the probability or its logarithm"),
    "guidance": (float, "scale of classifier-free guidance, for priors of guidance.demo; 1 is none"),
    "batch.sample": (int, "images per forward pass (default 32)", 32),
    "precision.sample": (("fp32", "bf16"), "of the weights that sample (default: fp32)", "fp32"),
    # figures
    "figure": (str, "one of the figures above", None, dict(names=["figure"], metavar="FIGURE")),
    "ckpt.figure": (FILE, "checkpoints of the figure", [], dict(nargs="+")),
    "tokenizer.figure": (FILE, "one per CKPT (default: found beside each); fig7a, fig9: that of phase 1 and "
                         "that of phase 2", [], dict(nargs="+")),
    "wide": (bool, "lay the images side by side instead of one below the other"),
    "pdf": (bool, "write a PDF too"),
    # editing
    "image": (FILE, "a part of this image is redrawn", None, dict(names=["edit"], metavar="IMAGE")),
    "box": (str, "what is redrawn, in pixels of the image", None, dict(metavar="X,Y,W,H")),
    "mask": (FILE, "an image of the same form, white where it is redrawn"),
    "onto": (str, "lay the image on this square, draw the rest", None, dict(metavar="X,Y,SIDE")),
    "format.edit": (("sheet", "files"), "one picture, or PNG files", "sheet"),
    # measuring
    "results": (FILE, "JSON files to print side by side, instead of measuring", None,
                dict(names=["files"], metavar="RESULT", nargs="*")),
    "ckpt.metrics": (FILE, "samples of ar.pt, nar.pt, reconstructions of phase1.pt, phase2.pt are measured"),
    "perturb": (bool, "of phase1.pt, phase2.pt: swap half of the tokens for near codes (p-FD)"),
    "interpolate": (bool, "of phase1.pt, phase2.pt: half of the tokens from the nearest other image (iFD)"),
    "extractor": (SOURCE, "features: 'inception' (downloaded), 'lite0' (two packages), or what --stage "
                  "vgg trained, .pt or exported", "inception"),
    "lpips": (SOURCE, "VGG-16 of LPIPS: 'imagenet' (downloaded), a .pth file or 'none'", "imagenet"),
    "references": (FILE, "cache of reference statistics", as_path("runs/references")),
    "reference": (FILE, "npz with mu and sigma, as ADM's, to compare with instead of the images"),
    "sweep": (str, "a setting of the sampler and its values", None,
              dict(names=["sweep"], metavar="NAME=V1,V2,...")),
    # tokens
    "ckpt.tokens": (FILE, "phase1.pt, phase2.pt or a public tokenizer", None, dict(required=True)),
    "decode": (FILE, "write the images of this file of tokens, instead of the tokens of images"),
    # tables, the arena and comparisons
    "run": (bool, "train and measure what is missing, row by row"),
    "stages": (str, "what --run makes (default phase1,ar,nar)", "phase1,ar,nar"),
    "samples": (int, "images that a prior draws (default: demo 2,000, cifar10, arena 10,000, else 50,000)"),
    "nproc": (int, "processes of each command, by torchrun (default 1)", 1),
    "extractor.table": (SOURCE, "features, see metrics (default: those of a classifier that --run trains)"),
    "out.rows": (FILE, "folder of all rows (default: runs/PRESET-tables, runs/arena)"),
    "pilot": (bool, "the phase 2 that the experiment takes, chosen before its first row"),
    "rows": (str, "with --run: these configurations (default: all)", None, dict(metavar="A0,A1")),
    "seeds": (str, "with --run: these seeds (default: all)", None, dict(metavar="0-3,6")),
    "workers.rows": (int, "rows at a time, of one thread each (default 1)", 1),
    "tokenizers": (FILE, "phase1.pt or phase2.pt", None, dict(names=["files"], metavar="CKPT", nargs="+")),
    "steps.probe": (int, "training steps of the probe (default 400)"),
    "samples.probe": (int, "training images of the probe (default 5,000)"),
    "ckpt.balance": (FILE, "phase1.pt or phase2.pt", None, dict(names=["ckpt"], metavar="CKPT", nargs="+")),
    "vgg.balance": (SOURCE, "perceptual network, as train.py (default: that of the run)"),
    # runs
    "folder": (FILE, "the folder of a run; export: or a checkpoint", None,
               dict(names=["run"], metavar="RUN")),
    "out.export": (FILE, "a folder to write", None, dict(required=True)),
    "half": (bool, "round matrices and kernels to float16"),
    "to": (("tensorboard", "wandb"), "what shows it (default: tensorboard)", "tensorboard"),
    "every": (float, "seconds between two looks (default 5)", 5.0),
    "once": (bool, "hand on what is there and end"),
}


def described(kind, help, default=None, more=None):
    """Arguments of add_argument. kind: a type; a tuple of choices; or bool, a flag without a value"""
    if kind is bool:
        return dict(action="store_true", help=help)
    known = {"choices" if isinstance(kind, tuple) else "type": kind, "help": help, "default": default}
    return known | (more or {})


FLAGS = {key: described(*entry) for key, entry in ENTRIES.items()}


def spelled(key):
    """How a flag of FLAGS is written."""
    return FLAGS[key].get("names") or ["--" + key.partition(".")[0].replace("_", "-")]


def new_parser(text, keys, prog=None):
    """A parser of some of FLAGS. text: what --help prints above them;  keys: of FLAGS, separated by blanks"""
    parser = argparse.ArgumentParser(prog=prog, description=text, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(print_error(message) or 2)
    for key in keys.split():
        parser.add_argument(*spelled(key), **{k: v for k, v in FLAGS[key].items() if k != "names"})
    return parser


def read(parser, words):
    """The values of all flags, and `given`, {name: flag} of those that stand in the command line."""
    actions = [action for action in parser._actions if action.dest != "help"]
    defaults = {action.dest: action.default for action in actions}
    for action in actions:
        action.default = argparse.SUPPRESS
    found, unknown = parser.parse_known_args(words)
    if unknown:
        there = parser._option_string_actions
        parser.error(f"unknown argument {unknown[0]}; {hint(unknown[0].partition('=')[0], there)}")
    given = {action.dest: (action.option_strings or [action.metavar])[0] for action in actions
             if action.dest in found}
    args = argparse.Namespace(**defaults | vars(found), given=given)
    try:
        check_values(vars(args), flag)
    except ValueError as error:
        parser.error(str(error))
    return args


def unread(args, names):
    """The first flag of the command line that is in `names`, keys up to the dot; None if there is none."""
    return next((flag for name, flag in args.given.items() if name in names.split()), None)


def flag(key):
    """How messages call a value of the namespace."""
    return "--" + key.removeprefix("nar_").replace("_", "-")
