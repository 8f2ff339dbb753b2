"""Models by name: the classes of a preset, which its fork may replace, and models from checkpoints."""

import json
from dataclasses import fields
from pathlib import Path

import torch

import forks
from perceptual import LAYERS, LOGIT, PatchDiscriminator, StyleDiscriminator, VGGTaps
from plumbing.errors import UserError, as_user_error, of_fork, one_line, warn
from plumbing.files import FOREIGN, FORMAT, is_checkpoint, newest_intact, read_checkpoint
from plumbing.hashes import latent_hash, not_finite
from plumbing.kmeans import SCHEDULE, OfflineKMeans
from plumbing.processes import on_rank0, rank
from plumbing.stages import DEPENDS, refuse_other_config, refuse_other_images
from plumbing.weights import ResNet, fold_batch_norm, load_vgg16_of, scale_taps, vgg_from_state_dict
from prior_ar import ARPrior
from prior_nar import NARPrior
from recipes import paper
from tokenizer import KMeansQuantizer, VectorQuantizer, VQTokenizer


def classes_of(config):
    """{"tokenizer", "ar", "nar": class} of a preset: ours, or those of its fork.  raises: UserError"""
    ours, fork = dict(tokenizer=VQTokenizer, ar=ARPrior, nar=NARPrior), config.get("fork")
    with as_user_error():
        return ours | (forks.load(fork).parts() if fork is not None else {})


def refuse_unread(Tokenizer, config):
    """raises: ValueError for a setting that differs from its default and that this tokenizer does not read

    A quantizer names in READS which of `codebook`, `distance`, `entropy_set` it reads; `OfflineKMeans` reads
    `warm_start` and `kmeans_...`. A tokenizer names in UNREAD what its encoder and decoder do not read.
    """
    Quantizer, codebook = Tokenizer.Quantizer, f"codebook={config.codebook}"
    Quantizer = KMeansQuantizer if Quantizer is VectorQuantizer else Quantizer  # which takes its place
    unread = dict.fromkeys(getattr(Tokenizer, "UNREAD", ()), Tokenizer.__name__)
    if config.codebook != "entropy":
        unread |= dict.fromkeys(("distance", "entropy_set"), codebook)
    kmeans = config.codebook == "kmeans"
    if issubclass(Quantizer, OfflineKMeans):
        unread |= dict.fromkeys(SCHEDULE[:1] if kmeans else SCHEDULE[1:], codebook)
    else:
        unread |= dict.fromkeys(("codebook", *SCHEDULE) if kmeans else SCHEDULE, Quantizer.__name__)
    reads = getattr(Quantizer, "READS", ())
    unread |= {name: Quantizer.__name__ for name in VectorQuantizer.READS if name not in reads}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in unread and value != field.default:
            raise ValueError(f"{unread[field.name]} does not read tokenizer.{field.name}, here {value}; pass "
                             f"--set tokenizer.{field.name}={json.dumps(field.default)}")


def check_losses(tokenizer, losses, papers):
    """raises: UserError unless `forward` returned all losses of WEIGHTS, and else only the paper's

    losses: what `forward` returned;  papers: the names that Eq. 2 weights
    In phase 2 and before a K-means start, none need be there.
    """
    kind, own = type(tokenizer).__name__, tokenizer.WEIGHTS.keys()
    for name in own & set(papers):
        raise UserError(f"{kind}.WEIGHTS name {name}, which Eq. 2 weights already; call that loss otherwise")
    for name in losses.keys() - own - set(papers):
        raise UserError(f"{kind}.forward returns {name}, but its WEIGHTS do not name it")
    early = tokenizer.frozen or getattr(tokenizer.quantizer, "bypass", False)
    for name in () if early else own - losses.keys():
        raise UserError(f"{kind}.WEIGHTS name {name}, but its forward does not return it")


def new_discriminator(config):
    """The discriminator of a preset.  raises: ValueError for sides or widths that it cannot have"""
    c, S = dict(config["discriminator"]), config["image_size"]
    if c.pop("kind") == "patch":
        return PatchDiscriminator()
    if S & (S - 1):
        raise ValueError(f"image_size={S}: the style discriminator needs a power of two from 32 on; "
                         "--set discriminator.kind=patch takes other sides")
    return StyleDiscriminator(S, **c)


def new_prior(config, stage, tokenizer, num_classes):
    """A prior of a preset over the tokens of `tokenizer`.  raises: ValueError for sizes that do not fit"""
    Prior, shape = classes_of(config)[stage], tokenizer.token_shape
    try:
        sizes = Prior.Config(tokenizer.codebook_size, *shape, num_classes=num_classes, **config["prior"])
    except TypeError as error:  # k sub-tokens at a position, say
        raise ValueError(f"the prior of this preset does not take tokens (B, {', '.join(map(str, shape))}), "
                         f"one of the tokenizer's own fork may ({of_fork(error) or error})") from error
    return Prior(sizes)


def load_model(path, stages, device="cpu", config=None):
    """(model in eval mode, checkpoint) of any stage; averaged weights where the run kept them.

    config: of a run whose fork's tokenizer this phase 1 becomes; without one it stays its own fork's
    """
    ckpt = read_checkpoint(path, stages)
    weights, sizes = ckpt["ema"] or ckpt["model"], dict(ckpt["model_config"])
    if ckpt["stage"] == "vgg":
        scale = sizes.pop("scale", None)  # older ones have none
        vgg = fold_batch_norm(vgg_from_state_dict(weights, str(path), **sizes))
        if scale:
            scale_taps(vgg, {index: scale[name] for name, index in LAYERS.items()}, scale[LOGIT])
        model = VGGTaps(vgg)
    elif ckpt["stage"] == "resnet":
        model = ResNet(**sizes)
        model.load_state_dict(weights, strict=True)
    else:
        kind = "tokenizer" if ckpt["stage"] in ("phase1", "phase2") else ckpt["stage"]
        Model = classes_of(config or ckpt["config"])[kind]
        with as_user_error():  # a fork may have changed since
            model = Model(Model.Config(**sizes))
            model.load_state_dict(weights, strict=True)
    # channels_last: a quarter faster on a CPU too, as long as nothing goes backward
    return model.to(device, memory_format=torch.channels_last).eval(), ckpt


def load_tokenizer_of(prior_path, prior_ckpt, given=None, device="cpu"):
    """The tokenizer whose tokens a prior models: `given`, else phase2.pt or phase1.pt beside the prior."""
    names = [stage + Path(prior_path).suffix for stage in ("phase2", "phase1")]  # none: an exported folder
    beside = [Path(prior_path).with_name(name) for name in names]
    path = given or next((p for p in beside if p.exists()), None)
    if path is None:
        raise UserError(f"no phase2.pt or phase1.pt beside {prior_path}; pass --tokenizer FILE")
    tokenizer, ckpt = load_model(path, ("phase1", "phase2"), device)
    if latent_hash(tokenizer) != prior_ckpt["tokenizer_hash"]:
        raise UserError(
            f"{path} (hash {latent_hash(tokenizer)}) is not the tokenizer that {prior_path} was trained on "
            f"(hash {prior_ckpt['tokenizer_hash']}); pass the right one with --tokenizer")
    return tokenizer, ckpt


def earlier_tokenizer(run, stages, *also):
    """(tokenizer, checkpoint): --tokenizer FILE, else the last of `stages` in the run folder.

    also: sections of the preset besides `tokenizer` that must be as they were in this folder
    The run takes over the tokenizer's phase1 section, so that later stages record its alpha. With --stage all
    FILE gave phase 1 its first weights, and later stages build on what became of them.
    """
    given = run.args.tokenizer if run.args.stage != "all" else None
    found = on_rank0(lambda: [run.out / f"{s}.pt" for s in stages if (run.out / f"{s}.pt").exists()])
    if not given and not found:
        raise UserError(f"no {run.out / 'phase1.pt'}: run --stage phase1 first, or pass --tokenizer FILE")
    path = given or on_rank0(lambda: newest_intact(found[-1]))
    goes_on = stages == ("phase1",)  # phase 2 may be of a fork where phase 1 is not
    tokenizer, ckpt = load_model(path, stages, run.device, run.config if goes_on else None)
    run.note = run.note or ckpt["note"]
    if not given:
        refuse_other_config(found[-1], ["tokenizer", *also], ckpt["config"], run.config)
        refuse_other_images(found[-1], ckpt, run)
        if ckpt["step"] < run.steps(ckpt["stage"]) and rank() == 0:
            warn(f"stage {ckpt['stage']} ended at step {ckpt['step']} of {run.steps(ckpt['stage'])}")
    if tokenizer.config.image_size != run.config["image_size"]:
        raise UserError(f"{given} is for {tokenizer.config.image_size}-pixel images, this preset for others")
    alpha = ckpt["config"]["phase1"]["alpha"]
    if run.args.alpha not in (None, alpha) and run.args.stage != "all" and rank() == 0:
        warn(f"--alpha {run.args.alpha:g} changes nothing here: the tokenizer was trained with {alpha:g}")
    run.config = dict(run.config, phase1=ckpt["config"]["phase1"])
    return tokenizer, ckpt


def vgg_of(run):
    """The frozen VGG of a run's perceptual loss: ImageNet's, a file, random, or the run's own vgg.pt."""
    source = run.config["vgg"]
    own = run.out / "vgg.pt" if source == "own" else Path(source)
    if is_checkpoint(own):
        vgg, ckpt = load_model(own, ("vgg",), run.device)
        if source == "own":
            refuse_other_config(own, DEPENDS["vgg"], ckpt["config"], run.config)
            refuse_other_images(own, ckpt, run)
        return vgg.to(memory_format=torch.channels_last)
    return VGGTaps(load_vgg16_of(source)).to(run.device, memory_format=torch.channels_last)


def find_vgg(path, ckpt, device, names=None):
    """The VGG of the run that a checkpoint belongs to, or None; with `names` one of these classes only."""
    places = [Path(path).with_name("vgg" + Path(path).suffix), Path(ckpt["config"]["vgg"])]
    found = next((p for p in places if p.exists() and is_checkpoint(p)), None)
    vgg, about = load_model(found, ("vgg",), device) if found else (None, {})
    return None if names is not None and about.get("class_names") != names else vgg


# ----------------------------------------------------------------------------------------------------------
# Checkpoints of other projects
# ----------------------------------------------------------------------------------------------------------


def as_checkpoint(fork, sizes, weights, family, image_size=256):
    """What `read_checkpoint` gives, as of a phase 1 that ended.

    fork, sizes: its tokenizer is built with these;  weights: {our name: tensor};  family: whose they are
    The recipe is that of the paper's preset, but for the tokenizer. Where images are, --data says.
    raises: UserError for a name that lacks or is too many, for another shape, and for a tensor not finite
    """
    Tokenizer = classes_of(dict(fork=fork))["tokenizer"]
    with torch.device("meta"):
        expected = Tokenizer(Tokenizer.Config(image_size=image_size, **sizes))
    try:
        expected.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"these are no weights of {family}: {one_line(error)}") from None
    if bad := not_finite(weights):
        raise UserError(f"{bad[1:]} holds a nan or an infinity; fetch the file again, or another one")
    config = paper.variant(paper.IMAGENET, fork=fork, image_size=image_size, phase1=dict(layers="lpips"))
    config["tokenizer"] = sizes
    return dict(format=FORMAT, stage="phase1", step=0, config=config, model=weights, ema=None, train={},
                model_config=dict(sizes, image_size=image_size), class_names=[], tokenizer_hash=None,
                fingerprint=None, note=f"from weights of {family}", world=1, seconds=0.0, skips=0)


def opened(raw, path):
    """A checkpoint of a family that some fork opens, in our form, else None.

    raises: UserError for one of such a family whose keys are not all there, or too many, or of other shapes
            or not finite
    """
    for state in states(raw):
        for name in forks.names():
            try:
                found = getattr(forks.load(name), "opened", lambda state: None)(state)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            except ValueError:  # somebody's own fork that cannot be imported
                continue
            if found:
                return found
    return None


def states(raw):
    """The state dicts in what a public file holds, averaged ones first: also those below the usual words, and
    without the usual prefixes of names."""
    if not isinstance(raw, dict):
        return
    for word in ("ema", "state_dict", "model"):
        yield from states(raw.get(word))
    state = {key: value for key, value in raw.items() if isinstance(key, str) and torch.is_tensor(value)}
    for prefix in ("", "module.", "_orig_mod.", "first_stage_model.") * 2:  # one may stand before another
        inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        state = inner or state
    yield state


FOREIGN.append(opened)
