"""Claims about the forks that ask what makes tokens easy to generate: each does to them what it says."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, command, earlier

import forks
import recipes.options
import train
from forks.align import AlignedTokenizer
from forks.crt import CausalPredictor, CRTTokenizer
from forks.frozen import FrozenTokenizer
from forks.perturb import PerturbTokenizer
from forks.phase3 import PostTrainedTokenizer
from perceptual import VGGTaps
from plumbing.codes import nearest_others
from plumbing.errors import UserError
from plumbing.files import read_checkpoint
from plumbing.models import load_model
from plumbing.preflight import check_tokenizer_values
from plumbing.weights import build_vgg16

SIZES = dict(base_width=8, channel_mult=[1, 1, 2, 2], codebook_size=32, codebook_dim=16, image_size=32)


def tokenizer(kind, **sizes):
    torch.manual_seed(0)
    return kind(kind.Config(**SIZES | sizes)).train()


def images(count=4):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def small_vgg(width=4, skip_pools=1):
    torch.manual_seed(2)
    return VGGTaps(build_vgg16(width, 10, 16, skip_pools=skip_pools))


# perturb --------------------------------------------------------------------------------------------------


def test_neighbours_are_the_nearest_other_codes():
    codes = torch.randn(20, 5)
    found = nearest_others(codes, 4)
    for k in range(20):
        far = (codes - codes[k]).norm(dim=1)
        far[k] = float("inf")
        assert found[k].tolist() == far.argsort()[:4].tolist()
    assert nearest_others(codes[:3], 8).shape == (3, 2)  # no more than there are


@pytest.mark.parametrize("images, batch, count", [(0.1, 39, 3), (0.25, 400, 100), (0.1, 4, 1), (0.0, 16, 0)])
def test_a_share_of_the_tokens_of_so_many_images_is_drawn_from_the_codes_nearest_to_the_latent(
        images, batch, count):
    """int(beta B) images as published, but at least one; the own code is among the candidates."""
    q = tokenizer(PerturbTokenizer, perturb_rate=0.5, perturb_images=images, perturb_near=4).quantizer
    q.codebook.weight.data.normal_()
    z = torch.randn(batch, 16, 8, 8)
    indices = q.quantize(z)
    swapped = q.swap(z, indices)
    changed = swapped != indices
    hit = changed.flatten(1).any(1)
    assert hit.sum() == count
    if count >= 100:
        assert changed[hit].float().mean().item() == pytest.approx(0.5 * 3 / 4, abs=0.02)
    far = torch.cdist(z.movedim(1, -1)[changed], q.codes).argsort(1)[:, :4]
    picks = (far == swapped[changed][:, None]).float()
    assert (picks.sum(1) == 1).all() and not picks[:, 0].any()
    assert count < 100 or picks.mean(0)[1:].min() > 0.3  # each of the others as often


def test_the_decoder_sees_swapped_codes_in_phase_2_too_and_in_training_only():
    model = tokenizer(PerturbTokenizer, perturb_images=1.0, perturb_rate=1.0).freeze_latent_space()
    model.quantizer.codebook.weight.data.normal_()
    model.quantizer.bypass, x, seen = False, images(), []
    model.decoder.register_forward_pre_hook(lambda module, z: seen.append(model.quantizer.quantize(*z)))
    _, tokens, losses = model(x)
    assert losses == {} and torch.equal(tokens, model.encode(x))
    assert (seen[0].flatten(1) != tokens).float().mean() > 0.5
    model.eval()(x)
    assert torch.equal(seen[1].flatten(1), tokens)


def test_the_decoder_alone_sees_what_was_swapped():
    model = tokenizer(PerturbTokenizer, perturb_images=1.0, perturb_rate=1.0)
    model.quantizer.codebook.weight.data.normal_()
    model.quantizer.bypass = False
    z = torch.randn(4, 16, 4, 4, requires_grad=True)
    z_st, indices, losses = model.quantizer(z)
    model.quantizer.eval()
    plain, same, losses_plain = model.quantizer(z)
    assert torch.equal(indices, same) and losses == losses_plain
    seen = model.quantizer.quantize(z_st)
    assert (seen != indices).float().mean() > 0.7
    upstream = torch.randn_like(z)
    z_st.backward(upstream)
    assert torch.equal(z.grad, upstream)


# crt ------------------------------------------------------------------------------------------------------


def test_a_code_is_predicted_from_those_before_it():
    predictor = CausalPredictor(16, 8).eval()
    z = torch.randn(2, 16, 8)
    before = predictor(z)
    assert before.shape == (2, 15, 8)
    for j in (0, 5, 15):
        other = z.clone()
        other[:, j] += 1
        same = (predictor(other) - before).abs().amax((0, 2)) < 1e-5
        assert same[:j].all() and not same[j:].any()  # row i is the prediction of code i + 1


def test_the_causal_loss_moves_the_encoder_and_phase_2_knows_none_of_it():
    model = tokenizer(CRTTokenizer)
    losses = model(images())[2]
    losses["loss_causal"].backward()
    moved = {name.rpartition(".")[0] for name, p in model.named_parameters()
             if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"encoder.conv_in", "quantizer.predictor.head", "quantizer.predictor.embed"} <= moved
    assert not any(name.startswith("decoder") for name in moved) and "quantizer.codebook" not in moved
    assert model.freeze_latent_space()(images())[2] == {}


# align ----------------------------------------------------------------------------------------------------


def test_latents_that_point_where_the_features_point_cost_nothing():
    model, vgg = tokenizer(AlignedTokenizer, feature_width=32), small_vgg()
    model.prepare(types.SimpleNamespace(vgg=vgg))
    x = images()
    loss = model(x)[2]["loss_align"]
    z_hat = model.encoder(x)
    target = vgg(x, ["relu5_3"])["relu5_3"]
    assert target.shape[2:] == z_hat.shape[2:]
    expected = 1 - F.cosine_similarity(model.to_features(z_hat), target).mean()
    torch.testing.assert_close(loss, expected)
    model.to_features = torch.nn.Identity()
    model.encoder.forward = lambda x: 7 * target  # any length
    model.quantizer.forward = lambda z: (z[:, :16], torch.zeros(4, 4, 4).long(), {})
    assert model(x)[2]["loss_align"].item() == pytest.approx(0, abs=1e-5)


def test_the_vgg_of_the_alignment_is_neither_trained_nor_saved_and_its_loss_is_float32_under_autocast():
    model, vgg = tokenizer(AlignedTokenizer, feature_width=32), small_vgg()
    model.prepare(types.SimpleNamespace(vgg=vgg))
    expected = model(images())[2]["loss_align"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images())[2]["loss_align"]
    assert loss.dtype == torch.float32 and loss != loss.bfloat16().float()
    torch.testing.assert_close(loss, expected, rtol=0.01, atol=0)
    expected.backward()
    assert any(p.grad is not None for p in model.encoder.parameters())
    assert all(p.grad is None for p in vgg.parameters())
    assert not any("vgg" in name for name in model.state_dict())
    assert model.freeze_latent_space()(images())[2] == {}


# the commands ---------------------------------------------------------------------------------------------

OWN = {"frozen": ["tokenizer.codebook_dim=32"], "align": ["tokenizer.feature_width=32"],
       "lfq": ["tokenizer.codebook_dim=5"], "fsq": ["tokenizer.codebook_dim=3", "tokenizer.codebook_size=64"]}
FORKS = ["lfq", "fsq", "simvq", "rotation", "ibq", "perturb", "crt", "align", "frozen", "noattention",
         "phase3"]


@pytest.fixture(scope="module")
def runs(trained, data, tmp_path_factory):
    """The run folder of a fork, made when first asked for."""
    @functools.cache
    def made_by(fork):
        out = earlier(trained, tmp_path_factory.mktemp(fork), "phase1")
        order = recipes.options.find_preset(f"{fork}.demo").get("stages", recipes.options.STAGES)
        for stage in [stage for stage in order if stage not in ("vgg", "nar")]:
            words = command(stage, out, data, "--preset", f"{fork}.demo")
            more = [f"--set={item}" for item in (f"{stage}.steps=2", *OWN.get(fork, []))]
            train.main(*recipes.options.train_args([*words, *more]))
        return out

    return made_by


@pytest.mark.slow
@pytest.mark.parametrize("fork", FORKS)
def test_every_fork_is_a_screen_and_trains_on_the_interface(fork, runs):
    out = runs(fork)
    for stage in ("phase1", "phase2", "ar"):
        ckpt = read_checkpoint(out / f"{stage}.pt", (stage,))
        assert ckpt["step"] == 2 and ckpt["config"]["fork"] == fork
    model, _ = load_model(out / "phase2.pt", ("phase2",))
    assert type(model) is forks.load(fork).parts()["tokenizer"]
    assert len((ROOT / "forks" / f"{fork}.py").read_text().splitlines()) <= 60


@pytest.mark.slow
def test_the_tokens_of_frozen_are_those_of_the_vgg(runs):
    out = runs("frozen")
    model, _ = load_model(out / "phase1.pt", ("phase1",))
    vgg, _ = load_model(out / "vgg.pt", ("vgg",))
    x = images()
    assert isinstance(model, FrozenTokenizer)
    torch.testing.assert_close(model.encoder(x), vgg(x, ["relu5_3"])["relu5_3"], rtol=0, atol=0)
    fresh = tokenizer(FrozenTokenizer).named_parameters()
    trained = {name.split(".")[0] for name, p in fresh if p.requires_grad}
    assert trained == {"quantizer", "decoder"}


@pytest.mark.slow
def test_the_prior_of_phase_3_draws_the_share_that_is_not_kept(runs):
    out = runs("phase3")
    assert (out / "ar.pt").stat().st_mtime < (out / "phase2.pt").stat().st_mtime
    prior, vgg = load_model(out / "ar.pt", ("ar",))[0], load_model(out / "vgg.pt", ("vgg",))[0]
    model = load_model(out / "phase1.pt", ("phase1",))[0].freeze_latent_space().train()
    assert isinstance(model, PostTrainedTokenizer)
    model.helpers = [(prior, vgg)]
    x = images(64)
    tokens = model.encode(x)
    model.config.keep = 1.0
    assert torch.equal(model.draw(x, tokens), tokens)
    model.config.keep = 0.25
    kept = (model.draw(x, tokens) == tokens).float().mean().item()
    assert 0.25 < kept < 0.5  # the prior draws the true token now and then
    model.config.keep = 0.0
    torch.manual_seed(0)
    drawn = model.draw(x, tokens)
    other = tokens.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 32
    torch.manual_seed(0)
    assert torch.equal(model.draw(x, other)[:, :10], drawn[:, :10])  # given the true tokens before
    x_hat, given, losses = model(x)
    assert torch.equal(given, tokens) and losses == {}
    assert torch.equal(model.eval()(x)[0], model.decode(tokens))  # and measured on the true tokens


def test_phase_3_wants_its_prior_first(data, tmp_path, capsys):
    model = tokenizer(PostTrainedTokenizer).freeze_latent_space()
    with pytest.raises(UserError, match="train --stage ar first"):
        model.prepare(types.SimpleNamespace(out=tmp_path))


@pytest.mark.slow
def test_phase_3_refuses_a_prior_of_other_tokens_and_a_vgg_of_other_classes(runs):
    out = runs("phase3")
    model = load_model(out / "phase2.pt", ("phase2",))[0].freeze_latent_space()
    prior, _ = load_model(out / "ar.pt", ("ar",))
    run = types.SimpleNamespace(out=out, device="cpu", vgg=small_vgg())
    model.prepare(run)
    assert prior.config.num_classes == 10 and len(model.helpers) == 1
    run.vgg = VGGTaps(build_vgg16(4, 9, 16, skip_pools=1))
    with pytest.raises(UserError, match="has other classes than"):
        model.prepare(run)
    with torch.no_grad():
        model.quantizer.codebook.weight[0] += 1
    with pytest.raises(UserError, match="tokens of another tokenizer"):
        model.prepare(run)


@pytest.mark.parametrize("fork, item, told", [
    ("frozen", "classifier.width=3", "classifier.width=8"),
    ("frozen", "classifier.skip_pools=0", "skip_pools=1"),
    ("align", "classifier.width=16", "tokenizer.feature_width=128")])
def test_presets_that_do_not_fit_are_refused(fork, item, told):
    config = recipes.options.train_args(["--stage", "phase1", "--preset", f"{fork}.demo", "--set", item])[1]
    with pytest.raises(ValueError, match=told):
        forks.load(fork).parts()["tokenizer"].check(config)
    forks.load(fork).parts()["tokenizer"].check(recipes.options.find_preset(f"{fork}.demo"))


def test_the_width_of_a_vgg_in_a_file_is_that_of_the_file(trained):
    config = recipes.options.find_preset("align.demo") | dict(vgg=str(trained / "vgg.pt"))
    with pytest.raises(ValueError, match="relu5_3 has 32 channels"):
        AlignedTokenizer.check(config)
    AlignedTokenizer.check(config | dict(tokenizer=dict(feature_width=32)))
    config = recipes.options.find_preset("frozen.demo") | dict(vgg=config["vgg"])
    with pytest.raises(ValueError, match="relu5_3 of a VGG with classifier.width=8"):
        FrozenTokenizer.check(config)
    FrozenTokenizer.check(config | dict(tokenizer=dict(codebook_dim=32, channel_mult=[1, 1, 2, 2])))
    with pytest.raises(ValueError, match="with classifier.skip_pools=2"):  # a coarser grid than this VGG's
        FrozenTokenizer.check(config | dict(tokenizer=dict(codebook_dim=32, channel_mult=[1, 1, 2])))


def test_a_whole_number_is_a_number_for_a_setting_of_a_fork_and_true_is_none():
    check_tokenizer_values(dict(perturb_rate=1), PerturbTokenizer.Config)
    with pytest.raises(ValueError, match="tokenizer.perturb_rate must be a number"):
        check_tokenizer_values(dict(perturb_rate=True), PerturbTokenizer.Config)
