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
from helpers import call, differing, few, refusal, study

import forks
import plumbing.models
import recipes.options
import sample
import visualize
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


def vqgan(x, down, up, block, middle, normal=False):
    """(state dict, tokens, images) of VQGAN's family; down, up: its stages' names, block: a block's there"""
    p, (a, b) = Published(), CHANNELS

    def mid(h, side):
        first, attention, last = (f"{side}.{name}" for name in middle)
        return p.block(p.attention(p.block(h, first, b), attention), last, b)

    h = p.block(p.conv(x, "encoder.conv_in", a), f"encoder.{down[0]}.{block}.0", a)
    h = p.conv(F.pad(h, (0, 1, 0, 1)), f"encoder.{down[0]}.downsample.conv", a, stride=2)
    h = p.block(h, f"encoder.{down[1]}.{block}.0", b)
    h = mid(p.attention(h, f"encoder.{down[1]}.attn.0"), "encoder")
    h = p.conv(p.conv(p.act(h, "encoder.norm_out"), "encoder.conv_out", 24), "quant_conv", N_Z, 1)
    tokens, z_q = p.nearest(h, normal)
    h = mid(p.conv(p.conv(z_q, "post_quant_conv", 24, 1), "decoder.conv_in", b), "decoder")
    for j in range(2):
        h = p.block(h, f"decoder.{up[0]}.{block}.{j}", b)
        h = p.attention(h, f"decoder.{up[0]}.attn.{j}")
    h = p.conv(F.interpolate(h, scale_factor=2.0), f"decoder.{up[0]}.upsample.conv", b)
    for j in range(2):
        h = p.block(h, f"decoder.{up[1]}.{block}.{j}", a)
    return p.state, tokens, p.conv(p.act(h, "decoder.norm_out"), "decoder.conv_out", 3)


def taming(x):
    state, *found = vqgan(
        x, ["down.0", "down.1"], ["up.1", "up.0"], "block", ["mid.block_1", "mid.attn_1", "mid.block_2"])
    losses = {"loss.discriminator.main.0.weight": torch.zeros(3), "loss.logvar": torch.zeros(())}
    return {"state_dict": state | losses, "epoch": 3}, *found


def llamagen(x):
    stages = ["conv_blocks.0", "conv_blocks.1"]
    state, *found = vqgan(x, stages, stages, "res", ["mid.0", "mid.1", "mid.2"], normal=True)
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
        raw, *both = family(x)
        torch.save(raw, folder / f"{name}.pt")
        found[name] = folder / f"{name}.pt", x, *both
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
        model.add_attention()  # of phase 2, which begins with what was there
        torch.testing.assert_close(model.decode(tokens), x_hat, rtol=0, atol=1e-4)


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
        change(state)
        torch.save({**raw, "state_dict": state} if "state_dict" in raw else state, path)
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
    path, tensor = tmp_path / "x.pt", torch.zeros(2)
    for thing, told in (({"fc.weight": tensor}, "not a checkpoint of this project (it holds fc.weight)"),
                        ({"net": {"a.weight": tensor}, "step": 3}, "it holds net, step"),
                        ([1, 2], "not a checkpoint"),
                        ({"state_dict": os.system}, "save its state dict alone")):  # as Lightning's objects
        torch.save(thing, path)
        assert told in refused(capsys, path)


@pytest.fixture
def of_32_pixels(monkeypatch):
    """Published files are for 256; the tiny run leaves the sizes of a tokenizer to them."""
    monkeypatch.setattr(plumbing.models.as_checkpoint, "__defaults__", (32,))
    sizes = {key: value for key, value in helpers.TINY.items() if not key.startswith("tokenizer.")}
    monkeypatch.setattr(helpers, "TINY", sizes)


@pytest.mark.parametrize("family", few(FAMILIES, 1))
def test_phase_2_trains_the_decoder_of_a_public_tokenizer_and_leaves_its_tokens(
        family, published, of_32_pixels, trained, data, tmp_path):
    path, x, tokens, _ = published[family]
    words = "phase2", tmp_path, data / "train", "--val", data / "train", "--tokenizer", path
    words += "--vgg", trained / "vgg.pt", "--eval-every", 0
    call(*words, phase2__steps=4, phase2__batch=4)
    whole = read_checkpoint(tmp_path / "phase2.pt", ("phase2",))
    os.replace(tmp_path / "phase2.previous.pt", tmp_path / "phase2.pt")  # after two steps
    call(*words, phase2__steps=4, phase2__batch=4)
    assert not differing(whole, read_checkpoint(tmp_path / "phase2.pt", ("phase2",)))
    study("metrics", "--ckpt", tmp_path / "phase2.pt", "--extractor", trained / "vgg.pt", "--lpips", "none",
          "--references", tmp_path / "references", "--device", "cpu")
    study("export", tmp_path, "--out", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "from weights of" in card and family in card.lower() and "| rfd |" in card
    (begun, _), (model, _) = load_model(path, ("phase1",)), load_model(tmp_path / "out/phase2", ("phase2",))
    begun.add_attention()
    assert str(begun.decoder) == str(model.decoder) and latent_hash(begun) == latent_hash(model)
    assert torch.equal(model.encode(x), tokens)
    assert all(layer.out.weight.any() for stage in model.decoder.stages for layer in stage.attention)


@pytest.mark.parametrize("words, told", [
    (["--set", "tokenizer.codebook_size=64"], "tokenizer.codebook_size comes from "),
    (["--set", "image_size=64"], "image_size comes from "),
    (["--ablation", "+attention2"], "tokenizer.num_attention comes from "),
    (["--preset", "noattention.demo"], "name a preset without a fork")])
def test_sizes_and_forks_that_a_public_tokenizer_does_not_take_are_refused(
        words, told, published, of_32_pixels, data, tmp_path, capsys):
    error = refusal(capsys, "phase2", tmp_path, data, "--tokenizer", published["taming"][0], *words)
    assert told in error and "taming.pt" in error and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prior_is_trained_on_a_public_tokenizer_and_looked_at(
        family, published, of_32_pixels, data, tmp_path):
    path = published[family][0]
    call("ar", tmp_path, data, "--tokenizer", path, ar__steps=1, ar__batch=2, prior__n_embd=16)
    words = ["view", "--ckpt", tmp_path / "ar.pt", "--tokenizer", path, "--num", 2, "--device", "cpu"]
    visualize.main(recipes.options.visualize_args([*map(str, words)]))
    study("compare", path, "--steps", 2, "--samples", 20, "--data", data, "--out", tmp_path / "compare.json",
          "--device", "cpu")
    for words in (["--ckpt", tmp_path / "ar.pt", "--tokenizer", path, "--num", 2],
                  ["--ckpt", path, "--reconstruct", "--num", 2, "--data", data, "--out", tmp_path / "x.png"]):
        sample.main(recipes.options.sample_args(list(map(str, words))))
    assert (tmp_path / "view.png").exists() and (tmp_path / "x.png").exists()
    assert json.loads((tmp_path / "compare.json").read_text())[0]["num_tokens"] == 256
