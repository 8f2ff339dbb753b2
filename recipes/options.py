"""The command lines of train.py, sample.py and visualize.py, without torch: --help and a wrong flag answer at
once. Presets are those of paper.py and small.py, and of the forks as NAME or FORK.NAME."""

import json
import sys

import forks
from plumbing.console import steady_process
from plumbing.paths import expanded
from recipes import paper, small
from recipes.ablations import TABLES, expand_ablation
from recipes.flags import PRESETS, STAGES, new_parser, read, unread
from recipes.values import KINDS, check_values, hint

FIGURES = dict(
    view="input, reconstruction, prediction and hits of one or several ar.pt (Fig. 3)",
    fig1b="AR predictions of several ar.pt", fig3="one image step by step, of an ar.pt",
    fig4="reconstructions and AR predictions, a row for each ar.pt", fig5a="AR predictions, by alpha",
    fig7a="samples of a nar.pt or ar.pt decoded by phase 1 and phase 2",
    fig8="tokens with and without noise, of several phase1.pt",
    fig9="as fig7a, of several priors, enlarged", fig10="validation losses of several ar.pt or nar.pt",
    fig11="reconstructions and AR predictions of several ar.pt, image by image")
TRAIN = ("stage preset data val out.train tokenizer.train vgg steps batch micro_batch alpha ablation arch "
         "seed limit set quick workers device timeout precision compile log_every eval_every save_every "
         "explain memory")
NAR = "nar_steps token_temperature choice_temperature confidence_space guidance"
SAMPLING = f"tokenizer classes seed.sample temperature top_k top_p {NAR} precision.sample"
SAMPLE = f"ckpt num reconstruct images format scale out {SAMPLING} batch.sample device"
DRAW = "figure ckpt.figure tokenizer.figure num images wide pdf out device"
UNREAD = {  # flags that a stage, a kind of picture or a figure does not read
    **dict.fromkeys(("vgg", "resnet"), "tokenizer vgg alpha ablation micro_batch"),
    **dict.fromkeys((*STAGES[1:], "all"), "arch"),
    "samples": "data", "--reconstruct": SAMPLING.replace(".sample", ""),
    **dict.fromkeys(("fig7a", "fig9"), "data"), "fig8": "tokenizer",
    "fig3": "wide", "fig10": "tokenizer data num wide"}
MOVED = {  # what sample.py and visualize.py once did, and the study that does it now
    "--metrics": "metrics", "--sweep": "sweep", "--edit": "edit", "claims": "arena", "forks": "arena",
    **{name: name for name in (*TABLES, "metrics", "balance", "compare", "report")}}


def begin(script):
    """What `main` of a script that was started takes. The script is known by its name from then on, so that
    no study imports it a second time."""
    steady_process()
    sys.modules[script] = sys.modules["__main__"]
    return dict(train=train_args, sample=sample_args, visualize=visualize_args)[script]()


def about():
    """What --help of a script prints above its flags."""
    return sys.modules["__main__"].__doc__


def find_preset(name):
    """raises: ValueError if neither recipes nor forks have it"""
    preset = PRESETS.get(name) or forks.preset(name)
    if preset is None:
        own = [f"{fork}.{one}" for fork in forks.names() for one in forks.shown(fork, ["PRESETS"])]
        there = f"there are {', '.join(PRESETS)}, and FORK.NAME of {', '.join(forks.names())}"
        raise ValueError(f"there is no preset {name}; {hint(name, [*PRESETS, 'demo-fq', *own], there)}")
    return preset


def train_args(words=None):
    """Command line to (args, config): config is the preset with every flag and --set applied."""
    parser = new_parser(about(), TRAIN)
    args = read(parser, words)
    if not (args.stage or args.explain):
        parser.error("--stage is missing. To see the whole method work: python train.py --stage all")
    if args.arch == "resnet":
        if args.stage != "vgg":
            parser.error("--arch resnet belongs to --stage vgg")
        args.stage = "resnet"
    refuse(parser, args, args.stage)
    if args.memory and not args.explain:
        parser.error("--memory belongs to --explain, which says what fits")
    try:
        return args, build_config(args)
    except ValueError as error:
        parser.error(str(error))


def refuse(parser, args, use):
    """Ends a command with a flag that its stage, kind of picture or figure does not read."""
    if found := unread(args, UNREAD.get(use, "")):
        parser.error(f"{found} does nothing for {use}, which does not read it; leave it out")


def put(config, item):
    """One --set SECTION.KEY=VALUE into the configuration.  raises: ValueError"""
    place, _, text = item.partition("=")
    section, _, key = place.rpartition(".")
    places = {key: config for key, value in config.items() if not isinstance(value, dict) and key != "fork"}
    for name in (name for name, value in config.items() if isinstance(value, dict)):
        places |= {f"{name}.{key}": config[name] for key in config[name]}
    if section == "tokenizer":  # whose fields its own class checks
        places[place] = config["tokenizer"]
    if not text or place not in places:
        raise ValueError(f"--set {item}: expected SECTION.KEY=VALUE with a key of the preset; "
                         f"{hint(place, places, '--explain prints them')}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    old = places[place].get(key)
    if old is not None and type(value) is not type(old) and (type(old), type(value)) != (float, int):
        raise ValueError(f"--set {item}: expected {KINDS.get(type(old), 'one value of this section')}")
    if key in ("data", "val") and not isinstance(value, str):
        raise ValueError(f"--set {item}: expected a word")
    places[place][key] = expanded(value) if key in ("data", "val", "vgg", "teachers") else value


def refuse_ignored(config, preset):
    """raises: ValueError for a value that was changed and that nothing reads"""
    unread = dict.fromkeys(("phase2.beta", "phase2.gamma"),
                           "phase 2 trains on fixed tokens, without the losses of phase 1")
    if config["discriminator"]["kind"] == "patch":
        unread |= dict.fromkeys(("discriminator.channel_multiplier", "discriminator.max_width"),
                                "PatchGAN has its own widths")
    own = forks.load(config["fork"]).parts().get("tokenizer") if config["fork"] else None
    reads = getattr(own.Quantizer, "READS", ()) if own else ("codebook", "entropy_set")
    codebook = config["tokenizer"].get("codebook", "entropy") if "codebook" in reads else "entropy"
    if "entropy_set" not in reads or codebook != "entropy":
        unread["phase1.gamma"] = "this codebook has no entropy term"
    for place, why in unread.items():
        section, key = place.split(".")
        if config[section].get(key) != preset[section].get(key):
            raise ValueError(f"{place} changes nothing: {why}; leave it out")


def build_config(args):
    """The preset of the command line with `--data`, `--steps`, ... and every `--set` written into it."""
    preset = find_preset(args.preset)
    config = small.quick(preset) if args.quick else paper.variant(preset)
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
            section, key = place.split(".")
            config[section][key] = value
    refuse_ignored(config, preset)
    guided = config["conditional"] and config["sample"].get("guidance", 1) != 1
    if guided and not config["prior"].get("class_dropout"):
        raise ValueError("sample.guidance needs priors that know the null class, as those of --preset "
                         "guidance.demo do")
    check_values(config, str)
    for section, values in config.items():
        if isinstance(values, dict):
            check_values(values, lambda key, section=section: f"{section}.{key}")
    return config


def sample_args(words=None):
    """Command line of sample.py."""
    parser = new_parser(about(), SAMPLE)
    words = sys.argv[1:] if words is None else [*words]
    refuse_moved(parser, [word for word in words if word.startswith("--")])
    args = read(parser, words)
    refuse(parser, args, "--reconstruct" if args.reconstruct else "samples")
    if args.scale and args.format != "sheet":
        parser.error(f"--scale enlarges a sheet; --format {args.format} writes images as they are")
    return args


def refuse_moved(parser, words):
    """Ends a command that is spelled as before the studies had a door of their own."""
    for word in words:
        if study := MOVED.get(word.partition("=")[0]):
            parser.error(f"{word} is no longer here; the command is now: python -m studies {study}")


def visualize_args(words=None):
    """Command line of visualize.py; the figures of forks are known by their names."""
    own = {name: fork for fork in forks.names() for name in forks.shown(fork, ["FIGURES"])}
    lines = [f"    {name:6s} {text}" for name, text in FIGURES.items()]
    lines = [about() or "", "figures:", *lines, f"    and those of forks: {', '.join(own)}"]
    parser = new_parser("\n".join(lines), DRAW)
    words = sys.argv[1:] if words is None else [*words]
    refuse_moved(parser, words[:1])
    args = read(parser, words)
    if args.figure not in {*FIGURES, *own}:
        parser.error(f"no figure {args.figure!r}; there are {', '.join([*FIGURES, *own])}")
    args.fork = own.get(args.figure)
    if not args.ckpt:
        text = FIGURES.get(args.figure) or forks.load(args.fork).FIGURES[args.figure]
        parser.error(f"{args.figure} needs --ckpt: {text}")
    refuse(parser, args, args.figure)
    if len(args.ckpt) > 1 and args.figure == "fig3":
        parser.error(f"fig3 is of one --ckpt, got {len(args.ckpt)}")
    wanted = 2 if args.figure in ("fig7a", "fig9") else len(args.ckpt)
    if args.tokenizer and len(args.tokenizer) != wanted:
        parser.error("--tokenizer needs one file per --ckpt (fig7a and fig9: two)")
    return args
