"""The numbers of docs/bugs.md: PYTHONPATH=. python tests/bugs/measure.py [NAME ...]

Copies the tree, measures in the copy, first as it is, then with the patch of each bug NAME (all: five
CPU-minutes). Prints a line for each number of the code as it is, and for each that a bug changes.
"""

import contextlib
import io
import os
import re
import runpy
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._dynamo
import torchvision.models.vgg  # noqa: F401  (slow to import: here once, not in every child)
from torch.nn import functional as F

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from test_bugs import copy_tree, patch
else:  # in a child and the copy
    import perceptual as P
    import train
    from helpers import call, rows, write_pictures
    from plumbing.dataset import batches
    from plumbing.images import psnr, to_float, to_uint8
    from plumbing.parallel import begin_step
    from plumbing.shapes import Shapes
    from plumbing.slices import generate_images, generate_tokens
    from plumbing.weights import build_vgg16, vgg_from_state_dict
    from prior_ar import ARPrior, PriorConfig, sample_logits, top_p_filter
    from prior_nar import NARPrior, decode_counts, mask_tokens
    from studies.distances import ssim
    from test_prior_ar import tiny_prior
    from test_tokenizer import images, tiny_tokenizer
    from tokenizer import TokenizerConfig, VectorQuantizer, VQTokenizer

TOY = dict(image_size=16, base_width=8, channel_mult=(1, 2, 2), codebook_size=64, codebook_dim=8)
RULE = (torch.arange(33) * 5 + 3) % 16  # of the chains of tokens


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def shapes():
    """256 images, (256, 3, 16, 16) in [-1, 1]; the seed is 0 after that."""
    data = Shapes("train", 256, 16)
    x = to_float(torch.stack([data.view(i) for i in range(256)]), "cpu")
    torch.manual_seed(0)
    return x


def written(file, pattern, **values):
    """The value of an expression as the copy writes it, for what stands in the middle of a function."""
    return eval(re.search(pattern, Path(file).read_text())[1], values)


def fit(optimizer, steps, loss_of):
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss


def toy(codebook):
    x = shapes()
    model = VQTokenizer(TokenizerConfig(**TOY, num_res_blocks=1, num_mid_blocks=0, codebook=codebook))

    def loss_of(step):
        batch = x[torch.randint(256, (16,), generator=seeded(step))]
        x_hat, _, latent = model(batch)
        return (x_hat - batch).abs().mean() + written(
            "train.py", r"loss = \(loss_rec \+ (\(.*\))\n", c=dict(beta=0.25, gamma=0.1),
            **{"loss_entropy": 0.0} | latent)

    loss = fit(torch.optim.Adam(model.parameters(), 2e-3), 100, loss_of)
    x_hat, tokens, latent = model.eval()(x[:128])
    share = tokens.flatten().bincount(minlength=64).double() / tokens.numel()
    norms = model.quantizer.codebook.weight.norm(dim=1)
    return {"L1": (x_hat - x[:128]).abs().mean(), "codes used": (share > 0).sum(), "loss": loss,
            "perplexity": torch.special.entr(share).sum().exp(), "codebook's term": latent["loss_codebook"],
            "least norm of a code": norms.min(), "largest norm of a code": norms.max()}


def quantizer():
    found = {}
    for kind, shape, sizes in [("plain", (4, 8, 16, 16), dict(codebook="plain")),
                               ("bf16", (8, 32, 16, 16), dict(codebook_size=1024, codebook_dim=32))]:
        torch.manual_seed(0)
        model = VectorQuantizer(TokenizerConfig(**TOY | sizes))
        torch.nn.init.normal_(model.codebook.weight)
        z_hat = torch.randn(shape)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            z_st, indices, latent = model(z_hat)
        found |= {f"{kind}, {name}": value for name, value in latent.items()} | {
            f"{kind}, squared distance": F.mse_loss(z_st, z_hat),
            f"{kind}, share of other tokens than encode's": indices != model.quantize(z_hat)}
    x = shapes()[:16]
    model = VQTokenizer(TokenizerConfig(**TOY))
    torch.nn.init.normal_(model.quantizer.codebook.weight, std=0.3)
    gradients = []
    for size in (16, 1):
        run = SimpleNamespace(micro=lambda x, size=size: x.split(size), autocast=contextlib.nullcontext())
        micro = begin_step(run, model, None, x, 0)
        model.zero_grad()
        loss = sum(model(part)[2]["loss_entropy"] for part in micro) / len(micro)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    return found | {"16 parts, loss_entropy": loss, "16 parts, error of its gradient": error}


def losses():
    pictures = shapes()
    sizes = dict(width=8, num_classes=10, hidden=16)
    vgg, x = build_vgg16(**sizes), F.interpolate(pictures[:16], scale_factor=2)
    x_hat, taps = F.avg_pool2d(x, 3, 1, 1), P.VGGTaps(vgg)
    found = {f"term of {name}": v for name, v in P.perceptual_terms(taps, x, x_hat, [*P.LAYERS]).items()}
    state = vgg.state_dict()
    state["features.28.kernel"] = state.pop("features.28.weight")
    with contextlib.suppress(ValueError):  # the code as it is refuses the file
        loaded = P.VGGTaps(vgg_from_state_dict(state, **sizes))
        found["term of relu5_3, misnamed"] = P.perceptual_terms(loaded, x, x_hat, ["relu5_3"])["relu5_3"]
    torch.manual_seed(0)
    model = P.StyleDiscriminator(16, max_width=64)
    with torch.autocast("cpu", torch.bfloat16):
        r1 = P.r1_penalty(model, pictures[:32])
    r1.backward()
    gradients = model.blocks[0].conv1.weight.grad.flatten()[:4]
    return found | {f"R1's gradient {i}": gradient for i, gradient in enumerate(gradients)} | {
        "R1 in bf16": r1, "deviation of VGG's input": P.normalize_images(x).std(),
        "negative share of relu5_3": taps(x, ["relu5_3"])["relu5_3"] < 0}


def discriminator():
    pictures = shapes()
    model, zeros = P.StyleDiscriminator(16, max_width=16), torch.zeros(2, 4, requires_grad=True)
    printed = []

    def loss_of(step):
        x = pictures[torch.randint(256, (16,), generator=seeded(step))]
        printed.append(P.disc_loss(model(x), model(F.avg_pool2d(x, 3, 1, 1))))
        return printed[-1] if step % 16 else written(
            "train.py", r"loss = (loss \+ .*r1_penalty.*)", loss=printed[-1], r1_penalty=P.r1_penalty, x=x,
            disc_net=model, c=dict(r1_every=16, r1_gamma=1.0))

    fit(torch.optim.Adam(model.parameters(), 1e-3, betas=(0.0, 0.99)), 80, loss_of)
    real, fake = model(pictures[:128]), model(F.avg_pool2d(pictures[:128], 3, 1, 1))
    P.disc_loss(*zeros).backward()
    return {"loss": printed[-1], "logit of images": real.mean(), "logit of blurred ones": fake.mean(),
            "share of pairs in order": real[:, None] > fake[None],
            "R1": P.r1_penalty(model, pictures[:64], 2.0), "gradient of real logits": zeros.grad[0].sum(),
            "gradient of fake logits": zeros.grad[1].sum()}


def adversarial():
    train.build_perceptual = lambda run, c: lambda x, x_hat: x_hat.new_zeros(())
    with tempfile.TemporaryDirectory() as out:
        call("phase1", Path(out), write_pictures(Path(out, "data")), "--vgg", "random",
             phase1__steps=40, phase1__per_weight=0.0, phase1__adv_start=0.0, phase1__adv_ramp=0.0,
             phase1__adv_weight=1.0, phase1__r1_gamma=0.0)
        found = rows(Path(out), "phase1")
    tail = [row for row in found if "loss_rec" in row][-10:]
    return {name: sum(row[name] for row in tail) / 10 for name in ("loss_adv", "loss_disc")} | {
        "L1": found[-1]["val_l1"]}


def training():
    model = tiny_tokenizer().freeze_latent_space().train()
    tokens, mode = model.encode(images(8)), model.encoder.training
    c = dict(lr=3e-4, lr_end=0.0, lr_start=0, steps=60000, warmup=0, schedule="cosine")
    rate = written("train.py", r"= next\(stream\), (lr_at\(.*?\)),", lr_at=train.lr_at, step=45000,
                   start=30000, c=c)
    data, seen, get = Shapes("train", 200, 8), set(), Shapes.__getitem__
    places = [[data.shuffled(200 * epoch + i) for i in range(200)] for epoch in range(2)]
    Shapes.__getitem__ = lambda self, place: seen.add(self.shuffled(place)) or get(self, place)
    for start, count in ((0, 13), (13, 12)):
        stream = batches(data, 8, start, 0)
        for _ in range(count):
            next(stream)
        stream.close()
    return {"frozen encoder in training mode": mode, "images seen of 200": len(seen), "rate": rate,
            "tokens that change": (tokens != model.eval().encode(images(8))).sum(),
            "share of images in their old place": sum(map(int.__eq__, *places)) / 200}


def chains(count, seed):
    """(count, 12) int64 in [0, 16)."""
    generator = seeded(seed)
    tokens = torch.randint(16, (count, 1), generator=generator)
    for _ in range(11):
        other = torch.randint(16, (count, 1), generator=generator)
        follows = torch.rand(count, 1, generator=generator) < 0.9
        tokens = torch.cat([tokens, torch.where(follows, RULE[tokens[:, -1:]], other)], 1)
    return tokens


def prior(kind, dropout=0.0):
    kind, rounds = dict(ar=ARPrior, nar=NARPrior)[kind], []
    torch.manual_seed(0)
    sizes = dict(codebook_size=32, num_tokens=12, n_layer=2, n_head=2, n_embd=64)
    model = kind(PriorConfig(**sizes, dropout=float(dropout)))

    def loss_of(step, count=32, seed=None):
        tokens = chains(count, step)
        inputs, mask = model.inputs(tokens, torch.rand(count, 13, generator=seeded(seed or step)))
        return model.loss(model(inputs), tokens, mask)[0]

    loss = fit(torch.optim.AdamW(model.parameters(), 4e-3), 250, loss_of)
    model.eval()
    val, again = [loss_of(10**6, 256, 1) for _ in range(2)]
    shape = model.noise_shape(model.SAMPLER | dict(nar_steps=6))
    noise = torch.rand(256, *shape, generator=seeded(2))
    tokens = model.train().generate(None, noise)
    model.transformer.token_table.register_forward_pre_hook(lambda _, seen: rounds.append(seen[0].clone()))
    second = model.generate(None, noise)
    found = {"loss": loss, "validation": val, "validation again": again,
             "share of steps by the rule": tokens[:, 1:] == RULE[tokens[:, :-1]],
             "tokens an image that differ in a second call": (tokens != second).sum() / 256}
    if kind is NARPrior:
        changed = [((old != model.mask_id) & (old != new)).sum()
                   for old, new in zip(rounds, [*rounds[1:], second], strict=True)]
        found |= {"fixed tokens an image that change": sum(changed) / 256,
                  "share of the mask": tokens == model.mask_id}
    return found


def sampling():
    torch.manual_seed(0)
    model = NARPrior(PriorConfig(codebook_size=32, num_tokens=12, n_layer=1, n_head=2, n_embd=32, dropout=0))
    found = {"share of images with index K": (model.generate(None, torch.rand(512, 4, 2, 12)) == 32).any(1)}
    noise = torch.rand(2000, 257, generator=seeded(0))
    noise[0, 0] = 0
    masked = mask_tokens(torch.zeros(2000, 256, dtype=torch.int64), 1, noise)[1].float().mean(1)
    sure = torch.tensor([[0.95, 0.03, 0.02]])
    for name, probs in [("4", torch.tensor([[0.5, 0.3, 0.15, 0.05]])), ("a sure one", sure), (
            "1,024", torch.randn(500, 1024, generator=seeded(0)).mul(2).softmax(1).sort(1)[0].flip(1))]:
        kept = top_p_filter(probs, 0.92) > 0
        found |= {f"codes of {name}": kept.sum(1), f"mass of {name}": (kept * probs).sum(1)}
    try:
        sample_logits(sure.log(), torch.tensor([0.5]), top_p=0.92)
    except RuntimeError as error:
        found["the draw ends"] = error
    gumbel = written("prior_nar.py", r"gumbel = (.*)", torch=torch, t=0,
                     noise=torch.rand(1, 1, 1, 10**6, generator=seeded(0)))
    ar, ones = tiny_prior(), torch.ones(64, dtype=torch.int64)
    whole, *parts = [generate_tokens(ar, ones[: len(i)], 0, i, ar.SAMPLER)
                     for i in (range(64), *(range(start, start + 16) for start in (0, 16, 32, 48)))]
    ar = tiny_prior(num_tokens=16, codebook_size=15)  # of the 16 of the tokenizer
    return found | {
        "masked at r = 0": masked[0], "masked on average": masked, "mean of the Gumbel noise": gumbel,
        "holes after 12 rounds": decode_counts(256, 12)[-1],
        "share of equal images": (whole == torch.cat(parts)).all(1),
        "images of 50": len(generate_images(ar, tiny_tokenizer(), 50, None, 0, ar.SAMPLER, batch=16))}


def pixels():
    x, generator, levels = shapes(), seeded(0), torch.arange(256)
    y, near = (x + sigma * torch.randn(x.shape, generator=generator) for sigma in (0.05, 0.002))
    inside = y.abs() <= 1
    double = [F.interpolate(to_uint8(images).float(), scale_factor=2).byte() for images in (x, y)]
    return {"share of values outside": ~inside, "PSNR": psnr(x, y), "PSNR of a near copy": psnr(x, near),
            "SSIM": ssim(*double), "error in levels": (to_uint8(y) - (y + 1) * 127.5)[inside],
            "share of levels that survive": to_uint8(levels / 127.5 - 1) == levels}


MEASURES = {
    "toy plain": "beta_on_the_codebook codebook_term_after_straight_through both_terms_detached_alike"
                 " straight_through_reaches_codes flattened_without_permute",
    "toy fn": "codes_not_normalised", "toy entropy": "entropy_sign mean_of_entropies",
    "quantizer": "flattened_without_permute entropy_of_each_part distances_in_bf16",
    "losses": "images_not_normalised taps_before_the_relu weights_not_loaded r1_under_autocast",
    "discriminator": "logits_as_labels fakes_called_real lazy_r1_without_its_factor",
    "adversarial": "discriminator_gradients_pile_up fakes_not_detached",
    "training": "frozen_encoder_in_training_mode rate_restarts_on_resume images_repeat_after_resume"
                " every_epoch_in_one_order",
    "prior ar": "target_in_the_input no_causal_mask cache_without_positions",
    "prior nar": "mask_is_a_code loss_on_visible_tokens fixed_tokens_change",
    "prior nar 0.1": "dropout_of_attention_in_eval sampling_in_training_mode",
    "sampling": "head_predicts_mask masked_share_inverted top_p_drops_the_crossing_code top_p_keeps_none"
                " gumbel_sign holes_are_left one_seed_a_batch last_batch_dropped",
    "pixels": "pixels_wrap_around pixels_truncated psnr_of_unrounded_images ssim_of_the_wrong_range"}


def child(measure, copy):
    """{number: its mean} of a measure in the copy, whose modules are imported here and nowhere else."""
    os.chdir(copy)
    sys.path[:0] = [str(copy), str(copy / "tests")]
    name, *words = measure.split()
    with contextlib.redirect_stdout(io.StringIO()):
        found = runpy.run_path("tests/bugs/measure.py")[name](*words)
    return {key: value if isinstance(value, Exception) else f"{torch.as_tensor(value).double().mean():.5g}"
            for key, value in found.items()}


def run(*arguments):
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(child, *arguments).result()


def main(names):
    if unknown := {*names} - {*" ".join(MEASURES.values()).split()}:
        print(f"error: no measure of {', '.join(sorted(unknown))}; name bugs of docs/bugs.md with values",
              file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as work:
        copy = copy_tree(Path(work, "copy"))
        for measure, caught in MEASURES.items():
            bugs = [bug for bug in caught.split() if bug in names or not names]
            clean = run(measure, copy) if bugs else {}
            for number, value in clean.items():
                print(f"as it is, {measure}: {number} {value}", flush=True)
            for bug in bugs:
                patch(copy, bug).check_returncode()
                for number, value in run(measure, copy).items():
                    if value != clean.get(number):
                        print(f"{bug}: {number} {value} instead of {clean.get(number, 'none')}", flush=True)
                patch(copy, bug, "--reverse").check_returncode()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
