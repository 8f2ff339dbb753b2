"""Every flag of every command, once: {key: arguments of add_argument}. Each command lists the keys it reads.

A key is the name of the flag, followed by a dot and its use where the same word means another thing
elsewhere. Nothing here imports torch: --help and a wrong flag answer at once.
"""

import argparse
import difflib
import importlib
import os
from pathlib import Path

import forks
from plumbing.paths import as_path, expanded
from recipes import paper, small
from recipes.ablations import TABLES
from recipes.values import check_values

STAGES = ("vgg", "phase1", "phase2", "ar", "nar")
PRESETS = paper.PRESETS | small.PRESETS
SAMPLER = dict(  # settings of a sampler that are numbers: type
    temperature=float, top_k=int, top_p=float, nar_steps=int, token_temperature=float,
    choice_temperature=float, guidance=float)
SETS = dict(names=["--set"], action="append", default=[], metavar="SECTION.KEY=VALUE")
WHOLE, NUMBER, YES = dict(type=int), dict(type=float), dict(action="store_true")
FILE, SOURCE = dict(type=as_path), dict(type=expanded)  # a path; a path or a word such as 'imagenet'

FLAGS = {  # without `names` a flag is its key up to the dot
    # training
    "stage": dict(choices=(*STAGES, "all"), help="what to train"),
    "preset": dict(default="demo", help=f"recipe: {', '.join(PRESETS)}, or one of a fork, for instance "
                   f"demo-fq ({', '.join(forks.names())}: FORK.NAME) (default: demo)"),
    "data": SOURCE | dict(help="folder of images (with class sub-folders or without), 'DIR/*.tar', 'cifar10' "
                          "or 'shapes'"),
    "val": SOURCE | dict(help="folder of validation images (default: DATA/val beside DATA/train, else a 5 %% "
                         "split)"),
    "out.train": FILE | dict(help="run folder (default: runs/<preset>)"),
    "tokenizer.train": FILE | dict(help="tokenizer checkpoint for phase2, ar, nar; first weights of phase1"),
    "vgg": SOURCE | dict(help="perceptual network: 'imagenet', a torchvision .pth, a vgg.pt of ours or its "
                         "exported folder, 'own' (this run's, trained first) or 'random'"),
    "steps": WHOLE | dict(help="optimizer steps of this stage"),
    "batch": WHOLE | dict(help="global batch of this stage, over all processes"),
    "micro_batch": WHOLE | dict(help="largest batch per process and forward pass; the rest is accumulated"),
    "alpha": NUMBER | dict(help="semantic ratio of Eq. 4 in phase1"),
    "ablation": dict(help="a row of a table: alpha=NUMBER or " + ", ".join(dict.fromkeys(
        row.name for table in TABLES.values() for row in table["rows"] if "=" not in row.name))),
    "arch": dict(choices=("vgg", "resnet"), default="vgg", help="of --stage vgg: VGG, or a FID classifier"),
    "seed": WHOLE | dict(help="seed of everything (default 0)"),
    "limit": WHOLE | dict(help="use only LIMIT training images, drawn by the seed"),
    "set": SETS | dict(help="change one preset value"),
    "workers": WHOLE | dict(default=0, help="data loading processes per rank (0: in the training process)"),
    "device": dict(default="auto", help="cuda, cpu, auto, or mps, which nobody has tried"),
    "timeout": NUMBER | dict(default=1800, help="seconds until processes give up a dead or hung one"),
    "precision": dict(choices=("bf16", "fp32"), help="autocast type (default: bf16, but on a CPU without "
                      "bf16 instructions fp32)"),
    "compile": YES | dict(help="torch.compile the networks"),
    "log_every": WHOLE | dict(default=20, help="steps between metrics lines"),
    "eval_every": WHOLE | dict(help="steps between validations, 0: none (default: a fifth of the run)"),
    "save_every": WHOLE | dict(help="steps between checkpoints (default: a tenth, at most 2000)"),
    "explain": YES | dict(help="print modules, sizes and recipe of the preset, then stop"),
    "memory": NUMBER | dict(help="with --explain: GB of a GPU, for the largest --micro-batch of each stage"),
    # samples and reconstructions
    "ckpt": FILE | dict(required=True, help="checkpoint: ar.pt, nar.pt, or phase1.pt, phase2.pt for "
                        "reconstructions"),
    "tokenizer": FILE | dict(help="tokenizer that decodes (default: that beside CKPT)"),
    "num": WHOLE | dict(names=["--num", "--count"], help="number of images (default: samples 80, to measure "
                        "50,000, edits 8, else at most 64)"),
    "classes": dict(help="names or numbers, separated by commas (default: all, in turn)"),
    "reconstruct": YES | dict(help="reconstruct validation images instead of sampling"),
    "images": SOURCE | dict(names=["--data"], help="folder of images (default: those of the run)"),
    "format": dict(choices=("sheet", "files", "npz"), default="sheet", help="one picture, PNG files, or npz"),
    "out": FILE | dict(help="file or folder to write (default: beside what it is made of)"),
    "seed.sample": WHOLE | dict(default=0, help="seed of the samples (default 0)"),
    "temperature": NUMBER | dict(help="AR: softmax temperature, 0 takes the argmax"),
    "top_k": WHOLE | dict(help="AR: only the K likeliest tokens, 0 for all"),
    "top_p": NUMBER | dict(help="AR: nucleus (Table 10)"),
    "nar_steps": WHOLE | dict(names=["--steps"], dest="nar_steps", help="NAR: decoding steps (Table 10)"),
    "token_temperature": NUMBER | dict(help="NAR: softmax temperature of the candidates"),
    "choice_temperature": NUMBER | dict(help="NAR: noise of the choice (Table 10; decision I18)"),
    "confidence_space": dict(choices=("prob", "log"), help="NAR: score is the probability or its logarithm"),
    "guidance": NUMBER | dict(help="scale of classifier-free guidance of a fork that has it; 1 is none"),
    "batch.sample": WHOLE | dict(default=32, help="images per forward pass (default 32)"),
    "precision.sample": dict(choices=("fp32", "bf16"), default="fp32", help="of the weights that sample; "
                             "bf16 is twice as fast (default: fp32)"),
    "compile.sample": YES | dict(help="torch.compile what samples; on a GPU also as CUDA graphs"),
    # figures
    "figure": dict(names=["figure"], metavar="FIGURE", help="one of the figures above"),
    "ckpt.figure": FILE | dict(nargs="+", default=[], help="checkpoints of the figure"),
    "tokenizer.figure": FILE | dict(nargs="+", default=[], help="one per CKPT (default: found beside each); "
                                    "fig7a, fig9: that of phase 1 and that of phase 2"),
    "pdf": YES | dict(help="write a PDF too"),
    # editing
    "image": FILE | dict(names=["edit"], metavar="IMAGE", help="a part of this image is redrawn"),
    "box": dict(metavar="X,Y,W,H", help="what is redrawn, in pixels of the image"),
    "mask": FILE | dict(help="an image of the same form, white where it is redrawn"),
    "onto": dict(metavar="X,Y,SIDE", help="lay the image on this square, draw the rest"),
    "format.edit": dict(choices=("sheet", "files"), default="sheet", help="one picture, or PNG files"),
    # measuring
    "results": FILE | dict(names=["files"], metavar="RESULT", nargs="*", help="JSON files to print side by "
                           "side, instead of measuring"),
    "ckpt.metrics": FILE | dict(help="what is measured: samples of ar.pt, nar.pt; reconstructions of "
                                "phase1.pt, phase2.pt (rFD)"),
    "predict": YES | dict(help="of ar.pt: measure the teacher-forced view"),
    "perturb": YES | dict(help="of phase1.pt, phase2.pt: swap half of the tokens for near codes (p-FD)"),
    "interpolate": YES | dict(help="of phase1.pt, phase2.pt: take half of the tokens from the nearest other "
                                   "image (iFD)"),
    "extractor": SOURCE | dict(default="inception", help="features: 'inception' (downloaded), a file of its "
                               "weights, 'lite0' (two packages), or what --stage vgg trained, .pt or "
                               "exported"),
    "lpips": SOURCE | dict(default="imagenet", help="of reconstructions: VGG-16 of LPIPS: 'imagenet' "
                           "(downloaded), a .pth file or 'none'"),
    "references": FILE | dict(default=Path("runs/references"), help="cache of reference statistics"),
    "reference": FILE | dict(help="one file of that cache to compare with, without the data, or an npz with "
                             "mu and sigma, as ADM's"),
    "sweep": dict(names=["sweep"], metavar="NAME=V1,V2,...", help="a setting of the sampler and its values"),
    # tokens
    "ckpt.tokens": FILE | dict(required=True, help="phase1.pt, phase2.pt or a public tokenizer"),
    "decode": FILE | dict(help="write the images of this file of tokens, instead of the tokens of images"),
    # tables and comparisons
    "run": YES | dict(help="train and measure what is missing, row by row"),
    "stages": dict(default="phase1,ar,nar", help="what --run makes (default phase1,ar,nar)"),
    "samples": WHOLE | dict(help="images a prior draws (default: demo 2,000, cifar10 10,000, else 50,000)"),
    "nproc": WHOLE | dict(default=1, help="processes of each command, by torchrun (default 1)"),
    "extractor.table": SOURCE | dict(help="features, see metrics (default: those of a classifier that --run "
                                     "trains)"),
    "out.table": FILE | dict(help="folder of all rows (default: runs/PRESET-tables)"),
    "pilot": YES | dict(help="the phase 2 that the experiment takes, chosen before its first row"),
    "rows": dict(metavar="A0,A1", help="with --run: these configurations (default: all)"),
    "seeds": dict(metavar="0-3,6", help="with --run: these seeds (default: all)"),
    "workers.arena": WHOLE | dict(default=1, help="rows at a time, of one thread each (default 1)"),
    "samples.arena": WHOLE | dict(help="images that a prior draws (default 10,000)"),
    "out.arena": FILE | dict(help="folder of the runs (default: runs/arena)"),
    "tokenizers": FILE | dict(names=["files"], metavar="CKPT", nargs="+", help="phase1.pt or phase2.pt"),
    "steps.probe": WHOLE | dict(help="training steps of the probe (default 400)"),
    "samples.probe": WHOLE | dict(help="training images of the probe (default 5,000)"),
    "ckpt.balance": FILE | dict(names=["ckpt"], metavar="CKPT", nargs="+", help="phase1.pt or phase2.pt"),
    "vgg.balance": SOURCE | dict(help="perceptual network, as train.py (default: that of the run)"),
    # runs
    "folder": FILE | dict(names=["run"], metavar="RUN", help="the folder of a run"),
    "watch": YES | dict(help="write it again whenever the run has news"),
    "out.export": FILE | dict(required=True, help="a folder to write"),
    "folder.export": FILE | dict(names=["run"], metavar="RUN", help="the folder of a run, or a checkpoint"),
    "half": YES | dict(help="round matrices and kernels to float16"),
    "decoder": YES | dict(help="the decoder as a torch.export program too"),
    "to": dict(choices=("tensorboard", "wandb"), default="tensorboard", help="what shows it (default: "
               "tensorboard)"),
    "every": NUMBER | dict(default=5.0, help="seconds between two looks (default 5)"),
    "once": YES | dict(help="hand on what is there and end"),
}


def new_parser(text, keys, prog=None):
    """A parser of some of FLAGS. text: what --help prints above them;  keys: of FLAGS, separated by blanks"""
    parser = argparse.ArgumentParser(prog=prog, description=text, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    for key in keys.split():
        names = FLAGS[key].get("names") or ["--" + key.partition(".")[0].replace("_", "-")]
        parser.add_argument(*names, **{k: v for k, v in FLAGS[key].items() if k != "names"})
    try:
        importlib.import_module("tqdm")  # reads variables named TQDM_...
    except ValueError as error:
        names = ", ".join(name for name in os.environ if name.startswith("TQDM_"))
        parser.error(f"the environment's {names} cannot be read by tqdm: {error}")
    return parser


def read(parser, words):
    """The values of all flags, and `given`, {name: flag} of those that stand in the command line."""
    actions = [action for action in parser._actions if action.dest != "help"]
    defaults = {action.dest: action.default for action in actions}
    for action in actions:
        action.default = argparse.SUPPRESS
    found, unknown = parser.parse_known_args(words)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        parser.error(f"unknown argument {unknown[0]}; "
                     + (f"did you mean {close[0]}?" if close else "--help shows what there is"))
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
