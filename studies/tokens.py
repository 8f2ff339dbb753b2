"""Tokens as a file, and back to images: `python -m studies tokens`.

A safetensors file: `tokens` (n, N) or (n, N, k), int16 or int32, in raster order, and `labels` (n,) int64
where the images have classes. `about` in its header is JSON: tokenizer (the hash of what decides tokens),
tokens_hash, codebook_size, image_size, class_names, names (of the images), images_hash (of their pixels),
data (their fingerprint) and note. A file of one's own needs `tokens` and `tokenizer` alone.
"""

import json
import os
import shutil

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from plumbing.data import images_of
from plumbing.errors import UserError
from plumbing.fast import in_slices
from plumbing.files import writable
from plumbing.hashes import digests, latent_hash, weights_hash
from plumbing.images import to_float, to_uint8
from plumbing.models import load_model
from plumbing.processes import mix, on_rank0, print0, setup_device
from plumbing.slices import collect, decode, my_chunks
from sample import write_files
from studies.export import write_bytes
from studies.references import joint_hash


def tokens(args):
    device = setup_device(args.device)
    tokenizer, ckpt = load_model(args.ckpt, ("phase1", "phase2"), device)
    (write_images if args.decode else write_tokens)(args, tokenizer, ckpt, device)


def read_tokens(path):
    """(tokens, what the header says).  raises: UserError for another file, and for a damaged one"""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            tokens, hashed = file.get_tensor("tokens"), about.get("tokens_hash")
        if "tokenizer" not in about or hashed not in (None, weights_hash(dict(tokens=tokens))):
            raise ValueError
    except (OSError, ValueError, AttributeError, SafetensorError):
        raise UserError(f"{path} is damaged or no file of python -m studies tokens; name another one"
                        ) from None
    return tokens, about


def write_tokens(args, tokenizer, ckpt, device):
    """One file of all validation images of the run, or of --data. An interrupted call goes on.

    raises: UserError for images that are not there, and where --out is a file of another kind
    """
    out = args.out or args.ckpt.with_name(f"tokens_{args.ckpt.stem}.safetensors")
    on_rank0(lambda: read_tokens(out) if os.path.exists(out) else writable(out, suffix=".safetensors"))
    data = images_of(args.ckpt, ckpt["config"], args.data)[1]
    K = tokenizer.codebook_size
    about = dict(tokenizer=latent_hash(tokenizer), codebook_size=K, image_size=data.image_size,
                 class_names=data.class_names, data=data.fingerprint, note=ckpt["note"])

    def chunks(done):
        for indices in my_chunks(len(data), args.batch, done):
            x = torch.stack([data.view(i) for i in indices])
            found = in_slices(tokenizer.encode, to_float(x, device)).cpu()
            yield indices[0], dict(
                tokens=found.to(torch.int16 if K <= 2**15 else torch.int32), digests=digests(x),
                labels=torch.tensor([data.label(i) for i in indices]),
                files=torch.tensor([data.readable(i) for i in indices]))  # where one cannot be read, the next

    parts = out.with_name(f".{out.stem}.{mix(sorted(about.items()), args.batch):016x}")
    rows = collect(chunks, parts, "tokens", len(data))

    def finish():
        names = [data.name(i).split(os.sep)[-2 if data.class_names else -1 :] for i in rows["files"].tolist()]
        header = about | dict(
            names=["/".join(name) for name in names], images_hash=joint_hash(rows["digests"]),
            tokens_hash=weights_hash(dict(tokens=rows["tokens"])))
        tensors = {key: rows[key] for key in ("tokens", *["labels"] * bool(data.class_names))}
        write_bytes(save(tensors, dict(about=json.dumps(header))), out)  # one key: their order is by chance
        shutil.rmtree(parts)
        print0(f"wrote {out}: {tuple(rows['tokens'].shape)} tokens of {len(data):,} images")

    on_rank0(finish)


def write_images(args, tokenizer, ckpt, device):
    """A PNG for each image of the file, 000000.png first. A folder that was begun is completed.

    raises: UserError for tokens of another tokenizer, and for those that it cannot decode
    """
    tokens, about = read_tokens(args.decode)
    if about["tokenizer"] != latent_hash(tokenizer):
        raise UserError(f"{args.decode} holds tokens of another tokenizer; pass the right one with --ckpt")
    shape, K, whole = tokenizer.token_shape, tokenizer.codebook_size, tokens.long()
    fits = tokens.shape[1:] == shape and len(tokens) and not tokens.is_floating_point()
    if not fits or whole.min() < 0 or whole.max() >= K:
        raise UserError(f"{args.decode} holds {tokens.dtype} of shape {tuple(tokens.shape)}; this tokenizer "
                        f"decodes whole numbers from 0 to {K - 1} of shape (images, *{tuple(shape)})")
    out = args.out or args.decode.with_name(f"{args.decode.stem}_images")
    on_rank0(lambda: writable(out / "info.json"))
    info = dict(made_from="tokens", tokenizer=about["tokenizer"], decoder=weights_hash(tokenizer),
                tokens=weights_hash(dict(tokens=tokens)), batch=args.batch, note=ckpt["note"])

    def chunks(done):
        for indices in my_chunks(len(tokens), args.batch, done):
            part = whole[indices.start : indices.stop].to(device)
            yield indices[0], to_uint8(decode(tokenizer, part))

    write_files(chunks, info, out, len(tokens))
    print0(f"wrote {out}: {len(tokens):,} images" + f" ({ckpt['note']})" * bool(ckpt["note"]))
