"""The stages: their sections of a preset, and what a checkpoint of each may be continued with."""

from plumbing.data import is_folder
from plumbing.errors import UserError
from plumbing.files import is_checkpoint, read_checkpoint

SECTION = dict(  # stage -> preset section
    vgg="classifier", resnet="classifier", phase1="phase1", phase2="phase2", ar="ar", nar="nar")
DEPENDS = dict(  # what a checkpoint of a stage was made with; a run with other values must not continue it
    vgg=["classifier"], resnet=["classifier"], phase1=["fork", "tokenizer", "discriminator", "vgg", "phase1"],
    phase2=["fork", "discriminator", "vgg", "phase2"],
    ar=["fork", "prior", "ar", "conditional", "code_variants"],
    nar=["fork", "prior", "nar", "conditional", "code_variants"])


def refuse_other_config(path, keys, old, new):
    """A checkpoint is continued only by the configuration that began it; the number of steps may change, and
    so may the place of a folder of images: `refuse_other_images` compares these."""
    different = []
    places = [] if is_folder(old.get("data")) and is_folder(new["data"]) else ["data", "val"]
    for key in [*places, "limit", "image_size", "seed", "precision", *keys]:
        a, b = old.get(key), new.get(key)
        pairs = [(key, a, b)]
        if isinstance(a, dict):
            pairs = [(f"{key}.{k}", a.get(k), b.get(k)) for k in sorted({*a, *b})]
        different += [f"{name} = {was}, not {now}" for name, was, now in pairs
                      if was != now and not name.endswith(".steps")]
    if different:
        raise UserError(f"{path} was made with {', and '.join(different)} as here; use another --out")


def refuse_other_images(path, ckpt, run):
    """A checkpoint is continued only on the images that it was made with, wherever their folder lies now."""
    if ckpt["fingerprint"] != run.fingerprint or ckpt["class_names"] != run.train.class_names:
        was, now = (fingerprint[0][0] for fingerprint in (ckpt["fingerprint"], run.fingerprint))
        raise UserError(f"the images changed since {path} was written (training images: {was} then, {now} "
                        "now); restore them or use another --out")


def vgg_sizes(config):
    """{width, skip_pools, ...} of the VGG that a configuration names, of one in a file too."""
    source = config["vgg"]
    if is_checkpoint(source):
        return read_checkpoint(source, ["vgg"])["config"]["classifier"]
    return config["classifier"] if source == "own" else dict(width=64, skip_pools=0)
