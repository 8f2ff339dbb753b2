"""Claims about public tokenizers: their published files open as ours, token for token.

The other side of each comparison is written down here by the published names of the weights alone: a network
that makes up its weights as it asks for them, so that a file of the published form comes with what it means.
"""

import json
import os

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import command, study

import forks
import plumbing.models
import recipes.options
import sample
import train
import visualize
from forks.maskgit import MaskGITDecoder, MaskGITEncoder
from plumbing.files import read_checkpoint
from plumbing.hashes import latent_hash, weights_hash
from plumbing.models import load_model

K, N_Z, CHANNELS = 16, 8, [32, 64]  # codes, their width, the stages' widths: f = 2, one block a stage


class Published:
    """Layers by the published names of their weights."""

    def __init__(self):
        self.state, self.draw = {}, torch.Generator().manual_seed(0)

    def get(self, key, *shape, mean=0.0):
        if key not in self.state:
            fan = torch.Size(shape[1:]).numel() if len(shape) > 1 else 25
            self.state[key] = mean + torch.randn(shape, generator=self.draw) / fan**0.5
        return self.state[key]

    def conv(self, x, key, out, k=3, bias=True, stride=1):
        weight = self.get(f"{key}.weight", out, x.shape[1], k, k)
        offset = self.get(f"{key}.bias", out) if bias else None
        return F.conv2d(x, weight, offset, stride, 0 if stride == 2 else k // 2)

    def norm(self, x, key):
        c = x.shape[1]
        return F.group_norm(x, 32, self.get(f"{key}.weight", c, mean=1), self.get(f"{key}.bias", c), 1e-6)

    def act(self, x, key):
        return F.silu(self.norm(x, key))

    def block(self, x, key, out):
        h = self.conv(self.act(x, f"{key}.norm1"), f"{key}.conv1", out)
        h = self.conv(self.act(h, f"{key}.norm2"), f"{key}.conv2", out)
        return h + (x if x.shape[1] == out else self.conv(x, f"{key}.nin_shortcut", out, 1))

    def attention(self, x, key):
        h, c = self.norm(x, f"{key}.norm"), x.shape[1]
        q, k, v = (self.conv(h, f"{key}.{one}", c, 1).flatten(2) for one in "qkv")
        seen = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / c**0.5, 2)
        h = torch.einsum("bij,bcj->bci", seen, v).view(x.shape)
        return x + self.conv(h, f"{key}.proj_out", c, 1)

    def nearest(self, z, normal=False):
        codes, z = self.get("quantize.embedding.weight", K, N_Z), z.movedim(1, -1)
        if normal:
            codes, z = F.normalize(codes, dim=-1), F.normalize(z, dim=-1)
        tokens = (z[..., None, :] - codes).norm(dim=-1).argmin(-1)
        return tokens.flatten(1), codes[tokens].movedim(-1, 1)


def vqgan(x, block, down, up_block, up, middle, normal=False, order=lambda i: i):
    """(state dict, tokens, images) of VQGAN's family; block and so on: the forms of names"""
    p, (a, b) = Published(), CHANNELS
    blocks, attention = block

    def mid(h, side):
        for kind, name in zip("bab", middle, strict=True):
            h = p.block(h, f"{side}.{name}", b) if kind == "b" else p.attention(h, f"{side}.{name}")
        return h

    h = p.block(p.conv(x, "encoder.conv_in", a), "encoder." + blocks.format(0, 0), a)
    h = p.conv(F.pad(h, (0, 1, 0, 1)), "encoder." + down.format(0) + ".conv", a, stride=2)
    h = p.block(h, "encoder." + blocks.format(1, 0), b)
    h = mid(p.attention(h, "encoder." + attention.format(1, 0)), "encoder")
    h = p.conv(p.conv(p.act(h, "encoder.norm_out"), "encoder.conv_out", 24), "quant_conv", N_Z, 1)
    tokens, z_q = p.nearest(h, normal)
    h = mid(p.conv(p.conv(z_q, "post_quant_conv", 24, 1), "decoder.conv_in", b), "decoder")
    blocks, attention = up_block
    for j in range(2):
        h = p.block(h, "decoder." + blocks.format(order(0), j), b)
        h = p.attention(h, "decoder." + attention.format(order(0), j))
    h = p.conv(F.interpolate(h, scale_factor=2.0), "decoder." + up.format(order(0)) + ".conv", b)
    for j in range(2):
        h = p.block(h, "decoder." + blocks.format(order(1), j), a)
    return p.state, tokens, p.conv(p.act(h, "decoder.norm_out"), "decoder.conv_out", 3)


def taming(x):
    state, *found = vqgan(
        x, ("down.{}.block.{}", "down.{}.attn.{}"), "down.{}.downsample", ("up.{}.block.{}", "up.{}.attn.{}"),
        "up.{}.upsample", ("mid.block_1", "mid.attn_1", "mid.block_2"), order=lambda i: 1 - i)
    losses = {"loss.discriminator.main.0.weight": torch.zeros(3), "loss.logvar": torch.zeros(())}
    return {"state_dict": state | losses, "epoch": 3}, *found


def llamagen(x):
    forms = "conv_blocks.{}.res.{}", "conv_blocks.{}.attn.{}"
    state, *found = vqgan(x, forms, "conv_blocks.{}.downsample", forms, "conv_blocks.{}.upsample",
                          ("mid.0", "mid.1", "mid.2"), normal=True)
    return {"model": state | {"quantize.codebook_used": torch.zeros(9)}}, *found


def maskgit(x):
    p, (a, b) = Published(), CHANNELS

    def block(h, key, out):
        y = p.conv(p.act(h, f"{key}.norm1"), f"{key}.conv1", out, bias=False)
        y = p.conv(p.act(y, f"{key}.norm2"), f"{key}.conv2", out, bias=False)
        return y + (h if h.shape[1] == out else p.conv(y, f"{key}.nin_shortcut", out, 1, bias=False))

    h = block(p.conv((x + 1) / 2, "encoder.conv_in", a, bias=False), "encoder.down.0.block.0", a)
    h = block(block(F.avg_pool2d(h, 2), "encoder.down.1.block.0", b), "encoder.mid.0", b)
    tokens, z_q = p.nearest(p.conv(p.act(h, "encoder.norm_out"), "encoder.conv_out", N_Z, 1))
    h = block(p.conv(z_q, "decoder.conv_in", b), "decoder.mid.0", b)
    h = block(h, "decoder.up.1.block.0", b)
    h = p.conv(F.interpolate(h, scale_factor=2.0), "decoder.up.1.upsample_conv", b)
    h = block(h, "decoder.up.0.block.0", a)
    return p.state, tokens, 2 * p.conv(p.act(h, "decoder.norm_out"), "decoder.conv_out", 3) - 1


FAMILIES = dict(taming=taming, llamagen=llamagen, maskgit=maskgit)


def images(side=32, count=3):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{family: (file of the published form, images, tokens, images from the tokens)}"""
    folder, x, found = tmp_path_factory.mktemp("published"), images(), {}
    for name, family in FAMILIES.items():
        raw, tokens, x_hat = family(x)
        torch.save(raw, folder / f"{name}.pt")
        found[name] = folder / f"{name}.pt", x, tokens, x_hat
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_file_gives_the_published_tokens_and_images(family, published):
    path, x, tokens, x_hat = published[family]
    model, ckpt = load_model(path, ("phase1",))
    assert ckpt["config"]["fork"] == family and family[:4] in ckpt["note"].lower().replace("-", "")
    assert (model.codebook_size, model.config.downsample) == (K, 2)
    with torch.no_grad():
        assert torch.equal(model.encode(x), tokens) and len(tokens.unique()) > 4
        torch.testing.assert_close(model.decode(tokens), x_hat, rtol=0, atol=1e-4)


def test_images_of_maskgit_are_in_0_to_1_inside_and_ours_outside(published, monkeypatch):
    path, x, tokens, x_hat = published["maskgit"]
    model, _ = load_model(path, ("phase1",))
    for kind in (MaskGITEncoder, MaskGITDecoder):
        monkeypatch.setattr(kind, "unit", False)
    with torch.no_grad():
        assert torch.equal(model.encode((x + 1) / 2), tokens)
        torch.testing.assert_close(2 * model.decode(tokens) - 1, x_hat, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family, sizes, count", [
    ("taming", dict(channel_mult=[1, 1, 2, 2, 4], codebook_size=1024, codebook_dim=256), 72_141_699),
    ("llamagen", dict(channel_mult=[1, 1, 2, 2, 4], codebook_size=16384, codebook_dim=8), 71_883_403),
    ("llamagen", dict(channel_mult=[1, 2, 2, 4], codebook_size=16384, codebook_dim=8), 70_109_835),
    ("maskgit", dict(channel_mult=[1, 1, 2, 2, 4], codebook_size=1024, codebook_dim=256), 54_515_587)])
def test_the_published_sizes_have_the_published_counts(family, sizes, count):
    Tokenizer = forks.load(family).parts()["tokenizer"]
    with torch.device("meta"):
        model = Tokenizer(Tokenizer.Config(base_width=128, **sizes))
    assert sum(p.numel() for p in model.parameters()) == count


def refused(capsys, path):
    words = ["--ckpt", str(path), "--reconstruct"]
    return helpers.refused(capsys, lambda: sample.main(recipes.options.sample_args(words)))


@pytest.mark.parametrize("family", FAMILIES)
def test_files_that_lack_weights_or_have_strange_ones_are_refused(family, published, tmp_path, capsys):
    raw = torch.load(published[family][0], weights_only=True)
    inner = raw.get("state_dict", raw.get("model", raw))
    path = tmp_path / "x.pt"
    for change, told in (
            (lambda s: s.pop("decoder.conv_out.bias"), "decoder.conv_out.bias"),
            (lambda s: s.pop("quantize.embedding.weight"), "quantize.embedding.weight"),
            (lambda s: s.update({"encoder.extra.weight": torch.zeros(3)}), "encoder.extra.weight"),
            (lambda s: s["decoder.conv_in.bias"].fill_(torch.nan), "decoder.conv_in.bias holds a nan"),
            (lambda s: s.update({"decoder.conv_out.weight": torch.zeros(3, 5, 3, 3)}), "decoder.conv_out")):
        state = {key: value.clone() for key, value in inner.items()}
        whole = {**raw, "state_dict": state} if "state_dict" in raw else state
        change(whole.get("state_dict", whole))
        torch.save(whole, path)
        error = refused(capsys, path)
        assert told in error and str(path) in error


@pytest.mark.parametrize("family", FAMILIES)
def test_the_usual_words_and_prefixes_around_a_published_state_are_taken_off(family, published, tmp_path):
    file, path = published[family][0], tmp_path / "x.pt"
    raw, wanted = torch.load(file, weights_only=True), read_checkpoint(file, ["phase1"])
    inner = raw.get("state_dict", raw.get("model", raw))

    def named(prefix):
        return {prefix + key: value for key, value in inner.items()}

    for whole in ({"model": {}, "ema": inner, "step": 3}, {"model": inner}, {"state_dict": {"model": inner}},
                  named("module."), {"model": named("module._orig_mod.")}, named("_orig_mod.module."),
                  {"state_dict": {**named("first_stage_model."), "model.out.weight": torch.zeros(2)}}):
        torch.save(whole, path)
        assert weights_hash(read_checkpoint(path, ["phase1"])["model"]) == weights_hash(wanted["model"])


def test_a_published_file_without_images_asks_for_data_and_for_no_preset(published, capsys):
    error = refused(capsys, published["taming"][0])
    assert "pass --data" in error and "preset" not in error


def test_what_is_no_tokenizer_at_all_is_refused(tmp_path, capsys):
    path = tmp_path / "x.pt"
    torch.save({"fc.weight": torch.zeros(3, 3)}, path)
    assert "not a checkpoint of this project (it holds fc.weight)" in refused(capsys, path)
    torch.save({"net": {"a.weight": torch.zeros(2)}, "step": 3}, path)
    assert "it holds net of a.weight, step" in refused(capsys, path)
    torch.save([1, 2], path)
    assert "not a checkpoint" in refused(capsys, path)
    torch.save({"state_dict": os.system}, path)  # Lightning's files hold objects of its own
    assert "save its state dict alone" in refused(capsys, path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prior_is_trained_on_a_public_tokenizer_and_looked_at(
        family, published, data, tmp_path, monkeypatch):
    monkeypatch.setattr(plumbing.models.as_checkpoint, "__defaults__", (32,))  # published ones are for 256
    path = published[family][0]
    words = command("ar", tmp_path, data, "--tokenizer", path, ar__steps=1, ar__batch=2, prior__n_embd=16)
    train.main(*recipes.options.train_args(words))
    ckpt = read_checkpoint(tmp_path / "ar.pt", ("ar",))
    assert ckpt["tokenizer_hash"] == latent_hash(load_model(path, ("phase1",))[0])
    words = ["view", "--ckpt", tmp_path / "ar.pt", "--tokenizer", path, "--num", 2, "--device", "cpu"]
    visualize.main(recipes.options.visualize_args([*map(str, words)]))
    study("compare", path, "--steps", 2, "--samples", 20, "--data", data, "--out", tmp_path / "compare.json",
          "--device", "cpu")
    for words in (["--ckpt", tmp_path / "ar.pt", "--tokenizer", path, "--num", 2],
                  ["--ckpt", path, "--reconstruct", "--num", 2, "--data", data, "--out", tmp_path / "x.png"]):
        sample.main(recipes.options.sample_args(list(map(str, words))))
    assert (tmp_path / "view.png").exists() and (tmp_path / "x.png").exists()
    (row,) = json.loads((tmp_path / "compare.json").read_text())
    assert (row["codebook_size"], row["num_tokens"], row["layers"]) == (K, 256, "lpips")
