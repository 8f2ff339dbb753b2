"""Claims about FQGAN (arXiv 2411.16681): sizes, tokens, what k = 1 is, losses, teachers, priors, a run."""

import copy
import functools
import json
import math
import sys
import types
from urllib.error import URLError

import pytest
import torch
import forks.fqgan.figures
import forks.fqgan.teachers
import recipes.options
from helpers import call, earlier, open_run, refusal, rows, study
from PIL import Image
from torch import nn
from torch_fidelity.feature_extractor_clip import CLIPVisual

import sample
import train
import visualize
from forks.fqgan.losses import disentanglement, representation_loss
from forks.fqgan.teachers import TEACHERS, Teacher, load_teacher
from forks.fqgan.prior import FactorizedAR, FactorizedNAR, rotary_angles, rotate
from forks.fqgan.prior import FactorizedConfig as PriorConfig
from forks.guidance import guide
from plumbing.errors import UserError
from forks.fqgan.tokenizer import Branch, FactorizedConfig, FactorizedQuantizer, FactorizedTokenizer
from plumbing.images import psnr
from plumbing.shapes import Shapes
from plumbing.codes import codebook_usage, count_codes
from prior_ar import ARPrior
from tokenizer import TokenizerConfig, VectorQuantizer

TINY = dict(image_size=32, base_width=8, channel_mult=(1, 2), codebook_size=16, codebook_dim=4)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("preset, total, heads", [
    ("fqgan-dual", 111_294_355, 39_115_776), ("fqgan-triple", 131_657_883, 5_575_296 + 22_062_336)])
def test_the_reference_sizes_and_recipes_are_those_of_the_article(preset, total, heads):
    c = recipes.options.find_preset(preset)
    with torch.device("meta"):
        tokenizer = FactorizedTokenizer(FactorizedConfig(image_size=256, **c["tokenizer"]))
    k = tokenizer.config.num_codebooks
    assert count(tokenizer.encoder.trunk) == 28_117_248
    assert count(tokenizer.encoder.branches[0].adapter) == 19_047_424
    assert count(tokenizer.decoder) == 42_449_795 + (8 * k * 256 + 256)
    assert count(tokenizer.quantizer.heads) == heads and count(tokenizer) - heads == total
    wanted = dict(rec="l2", layers="lpips", gan="hinge", adv_weight=0.5, betas=[0.9, 0.95], gamma=0.03,
                  disentangle=0.1, represent=0.5, clip=1.0)
    first = c["phase1"]
    assert wanted.items() <= first.items() and first["adv_start"] * first["steps"] == 20_000


@pytest.mark.parametrize("k", [1, 3])
def test_tokens_have_an_axis_for_the_codebooks_and_decode_as_forward_does(k):
    torch.manual_seed(0)
    tokenizer = FactorizedTokenizer(FactorizedConfig(num_codebooks=k, **TINY)).eval()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    tokens = tokenizer.encode(x)
    assert tokens.shape == (2, 256, k) and 0 <= tokens.min() and tokens.max() < 16
    x_hat, same, losses = tokenizer(x)
    assert torch.equal(tokens, same)
    torch.testing.assert_close(tokenizer.decode(tokens), x_hat, atol=1e-5, rtol=1e-4)
    assert (losses["loss_disentangle"] > 0) == (k > 1) and losses["loss_represent"] == 0
    assert all(value.ndim == 0 for value in losses.values())
    with pytest.raises(ValueError, match="tokens must be"):
        tokenizer.decode(tokens[..., None])


def test_every_codebook_matters_and_they_are_joined_in_index_order():
    tokenizer = FactorizedTokenizer(FactorizedConfig(num_codebooks=3, **TINY)).eval()
    tokens = tokenizer.encode(torch.rand(1, 3, 32, 32))
    codes = tokenizer.quantizer.lookup(tokens.unflatten(1, (16, 16)))
    for i, part in enumerate(tokenizer.quantizer.parts):
        assert torch.equal(codes[:, 4 * i : 4 * i + 4], part.lookup(tokens[..., i].unflatten(1, (16, 16))))
        other = tokens.clone()
        other[..., i] = (other[..., i] + 1) % 16
        assert not torch.allclose(tokenizer.decode(other), tokenizer.decode(tokens))


def test_one_codebook_without_adapter_is_the_plain_normalised_quantizer():
    config = FactorizedConfig(**TINY)
    torch.manual_seed(0)
    one, plain = FactorizedQuantizer(config), VectorQuantizer(TokenizerConfig(**dict(TINY, codebook="fn")))
    plain.load_state_dict(one.parts[0].state_dict())
    z = torch.randn(2, 4, 5, 5)
    z_st, indices, losses = one(z)
    z_plain, indices_plain, losses_plain = plain(z)
    assert torch.equal(indices[..., 0], indices_plain) and torch.equal(z_st, z_plain)
    for name, value in losses_plain.items():
        assert torch.equal(losses[name], value)
    assert torch.equal(one.quantize(z), indices)
    assert torch.equal(one.lookup(indices), plain.lookup(indices_plain))
    torch.testing.assert_close(z_st.norm(dim=1), torch.ones(2, 5, 5))


def test_losses_are_sums_over_codebooks_and_the_entropy_is_maskgit_s():
    config = FactorizedConfig(num_codebooks=2, **TINY)
    torch.manual_seed(0)
    quantizer, z = FactorizedQuantizer(config), torch.randn(2, 8, 5, 5)
    _, _, losses = quantizer(z)
    parts = [part(half)[2] for part, half in zip(quantizer.parts, z.chunk(2, 1), strict=True)]
    for name in ("loss_codebook", "loss_commit", "loss_entropy"):
        torch.testing.assert_close(losses[name], parts[0][name] + parts[1][name])
    expected = 0.0
    for part, half in zip(quantizer.parts, z.chunk(2, 1), strict=True):
        distances = torch.cdist(part.flatten(half), part.codes).square()
        p = (-distances / 0.01).softmax(1)
        mean = p.mean(0)
        expected += torch.special.entr(p).sum(1).mean() - torch.special.entr(mean).sum() + math.log(16)
    torch.testing.assert_close(losses["loss_entropy"], expected, atol=1e-4, rtol=1e-4)


def test_disentanglement_is_0_for_orthogonal_1_for_equal_or_opposite_codes_and_a_mean_over_pairs():
    a, b = torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)
    a[:, 0], b[:, 1] = 2.0, 3.0
    assert disentanglement([a, b]) == 0 == disentanglement([a])
    assert disentanglement([a, a]) == disentanglement([a, -5 * a]) == 1
    assert disentanglement([a, a, b]).item() == pytest.approx(1 / 3)
    assert disentanglement([a, a / 2 + math.sqrt(3) * b / 3]).item() == pytest.approx(1 / 4)  # 60 degrees


def test_representation_loss_is_ln_b_for_equal_similarities_0_for_one_image_and_lower_when_pairs_align():
    same = torch.ones(5, 3)
    assert representation_loss(same, same).item() == pytest.approx(math.log(5))
    one = torch.randn(1, 3, requires_grad=True)
    assert representation_loss(one, torch.randn(1, 3)) == 0
    student, teacher = torch.eye(4, requires_grad=True), torch.eye(4, requires_grad=True)
    aligned, turned = representation_loss(student, teacher), representation_loss(student, teacher.roll(1, 0))
    assert aligned < math.log(4) < turned
    aligned.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_both_losses_reach_the_branches_no_codebook_and_a_student_without_a_teacher_weighs_nothing():
    """Without one, as in the passes before DDP's first step, students stay in the graph."""
    tokenizer = FactorizedTokenizer(FactorizedConfig(num_codebooks=2, teacher_widths=(0, 16), **TINY))
    x, convs = torch.rand(3, 3, 32, 32), [branch.conv2 for branch in tokenizer.encoder.branches]
    loss = tokenizer(x)[2]["loss_represent"]
    loss.backward()
    assert loss == 0 and tokenizer.quantizer.heads[1].class_vector.grad.abs().sum() == 0
    tokenizer.teachers = [lambda x: torch.randn(len(x), 16)]
    tokenizer(x)[2]["loss_represent"].backward()
    assert convs[1].weight.grad.abs().sum() > 0 == convs[0].weight.grad.abs().sum()
    tokenizer(x)[2]["loss_disentangle"].backward()
    assert convs[0].weight.grad.abs().sum() > 0
    assert all(part.codebook.weight.grad is None for part in tokenizer.quantizer.parts)


def test_histograms_and_usage_are_taken_for_each_sub_codebook():
    tokens = torch.tensor([[[0, 3], [1, 3]], [[2, 3], [3, 3]]])  # (2, 2, 2)
    counts = count_codes(tokens, 4)
    assert counts.tolist() == [[1, 1, 1, 1], [0, 0, 0, 4]]
    assert codebook_usage(counts) == (pytest.approx((1 + 0.25) / 2), pytest.approx((4 + 1) / 2))
    assert torch.equal(count_codes(tokens[..., 0], 4), counts[0])


def test_an_adapter_gets_positions_in_raster_order_and_gives_them_back_so():
    torch.manual_seed(0)
    branch, h = Branch(FactorizedConfig(**TINY, adapter_layers=1)), torch.randn(2, 16, 16, 16)
    seen = []
    branch.adapter.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    branch.adapter.norm_in, branch.adapter.blocks, branch.adapter.norm_out = (nn.Identity() for _ in range(3))
    nn.init.zeros_(branch.adapter.positions)
    with_adapter = branch(h)
    assert torch.equal(seen[0][:, 5 * 16 + 3], h[:, :, 5, 3])
    branch.adapter = None
    torch.testing.assert_close(branch(h), with_adapter)


# Teachers -------------------------------------------------------------------------------------------------


@pytest.fixture
def timm(monkeypatch):
    """timm, whose networks have the published widths and two layers. Optional: .ci/run installs it."""
    import timm

    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=2))
    return timm


def dino_file(path, timm):
    """A random network in the format of DINOv2's files, for images of 518 pixels."""
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2", img_size=518)
    state = network.state_dict() | {"mask_token": torch.zeros(1, 384)}
    torch.save({name: torch.randn(tensor.shape) * 0.1 for name, tensor in state.items()}, path)


class Archive(CLIPVisual):
    """A network of CLIP, which in its files has a scale besides."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.visual(x)


def clip_file(path):
    """A random network in the format of CLIP's files, a TorchScript archive; and what torch-fidelity computes
    of it, (B, 3, 224, 224) -> (B, 768) before the last norm."""
    torch.manual_seed(0)
    network = Archive(512, 224, 2, 768, 16).eval()
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3, 224, 224), check_trace=False), path)
    network.visual.ln_post, network.visual.proj = nn.Identity(), None
    return network.visual


def test_clip_s_class_token_before_the_last_norm_is_read_from_its_archive(tmp_path, timm):
    reference = clip_file(tmp_path / "clip.pt")
    teacher, pixels = load_teacher(str(tmp_path / "clip.pt")), torch.randn(2, 3, 224, 224)
    assert teacher.width == 768 and not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        torch.testing.assert_close(teacher.network(pixels), reference(pixels), atol=1e-4, rtol=1e-4)
    assert teacher.mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])


def test_dino_s_class_token_is_read_from_its_own_file_format_and_a_missing_weight_is_named(tmp_path, timm):
    dino_file(tmp_path / "dino.pth", timm)
    teacher, x = load_teacher(str(tmp_path / "dino.pth")), torch.rand(2, 3, 32, 32) * 2 - 1
    assert teacher.width == 384 and teacher(x).shape == (2, 384) and not teacher(x).requires_grad
    state = torch.load(tmp_path / "dino.pth")
    normed = (teacher(x) - state["norm.bias"]) / state["norm.weight"]  # after the last norm
    torch.testing.assert_close(normed.mean(1), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(normed.var(1, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    del state["blocks.1.norm2.bias"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(ValueError, match="blocks.1.norm2.bias"):
        load_teacher(str(tmp_path / "less.pth"))


def test_a_teacher_sees_pixels_from_0_to_1_less_its_mean_over_its_deviation():
    teacher = Teacher(nn.Flatten(), 3 * 224**2, (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    seen = teacher(torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)).view(3, -1)
    expected = torch.tensor([(0 - 0.1) / 0.5, (0.5 - 0.2) / 0.25, (1 - 0.3) / 2.0])
    torch.testing.assert_close(seen, expected[:, None].expand_as(seen))


def test_a_teacher_s_file_of_the_wrong_hash_or_kind_is_refused_and_a_failed_download_named(
        tmp_path, monkeypatch, timm):
    torch.save({"cls_token": torch.zeros(1, 1, 100)}, tmp_path / "other.pth")
    (tmp_path / "dino-0badc0de.pth").write_text("another content")
    (tmp_path / "text.pt").write_text("no network")
    for name, told in (("dino-0badc0de.pth", "sha256"), ("text.pt", "cannot be read"),
                       ("other.pth", "no network of clip-vit-l-14, ")):
        with pytest.raises(ValueError, match=told):
            load_teacher(str(tmp_path / name))

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match="dinov2.*fetch"):
        load_teacher("dinov2-vit-s-14")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="^teacher dinov2-vit-s-14 needs a package: pip install timm$"):
        load_teacher("dinov2-vit-s-14")


def test_the_names_of_the_teachers_are_those_of_timm_and_their_widths(timm):
    for name, width in TEACHERS.values():
        with torch.device("meta"):
            network = timm.create_model(name, img_size=224)
        assert network.embed_dim == width and network.patch_embed.num_patches in (196, 256)


# Priors ---------------------------------------------------------------------------------------------------

PRIOR = dict(codebook_size=16, num_tokens=9, num_classes=3, n_layer=2, n_head=2, n_embd=16, dropout=0.0,
             num_codebooks=2, head="ar", head_layers=2)


def tiny(kind=FactorizedAR, **changes):
    torch.manual_seed(0)
    prior = kind(PriorConfig(**{**PRIOR, **changes})).eval()
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.3)
    return prior


def some_tokens(batch=4, k=2):
    return torch.randint(0, 16, (batch, 9, k), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("preset, k, total, block", [
    ("fqgan-dual", 2, 417_104_896, 12_847_104), ("fqgan-triple", 3, 451_707_904, 12_847_104),
    ("fqgan-large", 2, 901_195_520, 20_318_720)])
def test_far_s_sizes_are_the_article_s(preset, k, total, block):
    sizes = recipes.options.find_preset(preset)["prior"]
    with torch.device("meta"):
        prior = FactorizedAR(PriorConfig(16_384, 256, k, 1000, **sizes))
    assert count(prior) == total and count(prior.transformer.blocks[0]) == block


@pytest.mark.parametrize("head", ["ar", "linear", "mlp"])
def test_a_sub_token_s_logits_depend_on_earlier_ones_alone(head):
    prior, tokens = tiny(head=head, num_codebooks=3), some_tokens(1, 3)
    labels = torch.tensor([1])
    before = prior(tokens, labels)
    for i in range(9):
        for j in range(3):
            other = tokens.clone()
            other[0, i, j] = (other[0, i, j] + 1) % 16
            moved = (prior(other, labels) - before).abs().amax(-1)[0] > 1e-6  # (N, k)
            wanted = torch.zeros(9, 3, dtype=torch.bool)
            wanted[i + 1 :] = True
            if head == "ar":
                wanted[i, j + 1 :] = True
            assert torch.equal(moved, wanted)


@pytest.mark.parametrize("head, k", [("ar", 1), ("ar", 2), ("linear", 2), ("mlp", 2)])
def test_an_untrained_head_starts_at_ln_k_exactly(head, k):
    prior, tokens = FactorizedAR(PriorConfig(**{**PRIOR, "head": head, "num_codebooks": k})), some_tokens(k=k)
    loss, _ = prior.loss(prior(tokens, torch.zeros(4, dtype=torch.int64)), tokens)
    assert loss.item() == pytest.approx(math.log(16), abs=1e-6)


@pytest.mark.parametrize("head", ["ar", "linear", "mlp"])
def test_sampling_sees_the_logits_of_teacher_forcing(head):
    prior, labels = tiny(head=head), torch.tensor([0, 1, 2, 0])
    seen, draw = [], prior.transformer.draw

    def spy(x, pick):
        return draw(x, lambda i, logits: (seen.append(logits), pick(i, logits))[1])

    prior.transformer.draw = spy
    noise = torch.rand(4, 9, 2, generator=torch.Generator().manual_seed(3))
    tokens = prior.generate(labels, noise)
    logits = torch.stack(seen, 1).view(4, 9, 2, 16)
    torch.testing.assert_close(logits, prior(tokens, labels), atol=1e-4, rtol=1e-4)


def test_guidance_is_linear_in_its_scale_1_is_conditional_and_0_unconditional():
    c, u = torch.randn(2, 3, 7).unbind(0)
    both = torch.cat([c, u])
    torch.testing.assert_close(guide(both, 1), c)
    torch.testing.assert_close(guide(both, 0), u)
    torch.testing.assert_close(guide(both, 2.5) - guide(both, 1.5), c - u)
    labels, noise = torch.tensor([0, 1, 2]), torch.rand(3, 9, 2, generator=torch.Generator().manual_seed(2))
    prior = tiny()
    drawn = {s: prior.generate(labels, noise, guidance=s) for s in (0.0, 1.0, 1.0 + 1e-7, 4.0)}
    assert torch.equal(drawn[0.0], prior.generate(None, noise))
    assert torch.equal(drawn[1.0], ARPrior.generate(prior, labels, noise))  # which knows of no guidance
    batches, draw = [], prior.transformer.draw
    prior.transformer.draw = lambda x, pick: (batches.append(len(x)), draw(x, pick))[1]
    for scale in (1.0, 4.0):
        prior.generate(labels, noise, guidance=scale)
    assert batches == [3] * 9 + [6] * 9  # scale 1 costs no null rows
    free = tiny(num_classes=0)
    assert torch.equal(free.generate(None, noise, guidance=3.0), free.generate(None, noise))
    assert torch.equal(drawn[1.0], drawn[1.0 + 1e-7]) and not torch.equal(drawn[1.0], drawn[4.0])
    masked, noise = tiny(FactorizedNAR), torch.rand(3, 4, 3, 9, generator=torch.Generator().manual_seed(2))
    assert torch.equal(masked.generate(labels, noise, guidance=0.0), masked.generate(None, noise))


def test_classes_are_dropped_in_training_alone():
    prior, labels = tiny(class_dropout=0.5), torch.ones(1000, dtype=torch.int64)
    table = prior.transformer.condition_table.weight
    assert torch.equal(prior.transformer.embed_condition(labels, 1000)[:, 0], table[1].expand(1000, -1))
    prior.train()
    found = prior.transformer.embed_condition(labels, 1000)[:, 0]
    null = (found == table[3]).all(1)
    assert 400 < null.sum() < 600 and (found[~null] == table[1]).all()


@pytest.mark.parametrize("head", ["ar", "linear"])
def test_the_masked_prior_hides_and_fills_all_sub_tokens_of_a_position_together(head):
    prior, tokens = tiny(FactorizedNAR, head=head), some_tokens()
    inputs, mask = prior.inputs(tokens, torch.rand(4, 10, generator=torch.Generator().manual_seed(0)))
    inputs, shown = inputs.chunk(2, 2)
    assert torch.equal(shown, tokens)  # which only the head of their own position sees
    assert torch.equal(mask[..., 0], mask[..., 1]) and (inputs[mask] == 16).all() and mask.any()
    labels = torch.zeros(4, dtype=torch.int64)
    logits = prior(torch.cat([inputs, tokens], 2), labels)
    assert logits.shape == (4, 9, 2, 16)
    other = tokens.clone()
    other[mask] = (other[mask] + 1) % 16  # what is hidden reaches at most the later slots of its own position
    moved = (prior(torch.cat([inputs, other], 2), labels) - logits).abs().amax(-1) > 1e-6
    assert not moved[..., 0].any() and torch.equal(moved[..., 1], mask[..., 0] & (head == "ar"))
    loss, _ = prior.loss(logits, tokens, mask)
    expected = nn.functional.cross_entropy(logits[mask], tokens[mask])
    torch.testing.assert_close(loss, expected)
    noise = torch.rand(4, 5, 3, 9, generator=torch.Generator().manual_seed(0))
    drawn, fixed_at = prior.generate(labels, noise, return_steps=True)
    assert drawn.shape == (4, 9, 2) and drawn.max() < 16 and fixed_at.shape == (4, 9)
    partial = torch.where(torch.arange(9)[None, :, None] < 4, drawn, 16)
    again, steps = prior.generate(labels, noise, partial, return_steps=True)
    assert torch.equal(again[:, :4], drawn[:, :4]) and again.max() < 16
    assert (steps[:, :4] == -1).all() and (steps[:, 4:] >= 0).all()


def test_rotary_products_depend_on_the_difference_of_places_and_the_origin_turns_nothing():
    q, k = torch.randn(2, 1, 1, 1, 16).unbind(0)

    def product(a, b):
        turned = [rotate(x, rotary_angles(torch.tensor([place]), 16)) for x, place in ((q, a), (k, b))]
        return (turned[0] * turned[1]).sum().item()

    assert product([3.0, 5.0], [1.0, 2.0]) == pytest.approx(product([7.0, 4.0], [5.0, 1.0]), abs=1e-5)
    assert product([3.0, 5.0], [1.0, 2.0]) != pytest.approx(product([3.0, 5.0], [1.0, 3.0]), abs=1e-3)
    assert torch.equal(rotate(q, rotary_angles(torch.zeros(1, 2), 16)), q)


@pytest.mark.parametrize("kind", [FactorizedAR, FactorizedNAR])
def test_the_place_of_a_token_matters(kind):
    prior, tokens = tiny(kind), some_tokens(1)
    other = tokens[:, [1, 0, *range(2, 9)]]  # two neighbours change places
    shown = [t if kind is FactorizedAR else torch.cat([t, tokens], 2) for t in (tokens, other)]
    logits = [prior(t)[:, -1, 0] for t in shown]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_sizes_that_do_not_fit_are_refused():
    for sizes, told in ((dict(head="tied"), "prior.head must be"), (dict(n_embd=12, n_head=2), "rotary")):
        with pytest.raises(ValueError, match=told):
            PriorConfig(16, 9, num_codebooks=2, **sizes)
    with pytest.raises(ValueError, match="3 codebooks need as many teacher_widths"):
        FactorizedConfig(num_codebooks=3, teacher_widths=(0, 8))


# A run ----------------------------------------------------------------------------------------------------

FQ = {"tokenizer__teacher_widths": [0, 32], "tokenizer__base_width": 16}


@pytest.fixture(scope="module")
def run(trained, data, tmp_path_factory):
    out = earlier(trained, tmp_path_factory.mktemp("fq"), "phase1")
    call("all", out, data, "--preset", "demo-fq", **FQ)
    return out


@pytest.mark.slow
def test_an_image_is_edited_in_all_sub_tokens_of_a_position(run, tmp_path):
    Image.fromarray(Shapes("val", 20, 32).view(3).permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
    study("edit", tmp_path / "x.png", "--ckpt", run / "nar.pt", "--box", "16,0,16,32", "--num", 3,
          "--classes", "star", "--device", "cpu", "--out", tmp_path / "y.png")
    info = json.loads((tmp_path / "y.json").read_text())
    tokens, given = torch.tensor(info["tokens"]), torch.tensor(info["input_tokens"])
    redrawn = torch.tensor(info["redrawn"]).bool().flatten()
    assert tokens.shape == (3, 16, 2) and redrawn.tolist() == [False, False, True, True] * 4
    assert (tokens[:, ~redrawn] == given[~redrawn]).all() and (tokens[:, redrawn] < 64).all()


@pytest.mark.slow
def test_all_stages_run_on_factorised_tokens(run):
    logged = rows(run, "phase1")[0]
    assert {"loss_disentangle", "loss_represent"} <= logged.keys()
    assert 0 <= logged["loss_disentangle"] <= 1 and logged["loss_represent"] < 2 * math.log(8)
    summary = json.loads((run / "summary.json").read_text())
    assert len(summary["usage_of_each"]) == 2 and 0 <= summary["cos_between_codebooks"] <= 1
    assert summary["phase2_tokens_changed"] == 0
    codes = torch.load(run / "codes.pt", weights_only=True)
    assert codes["train"].shape[2:] == (16, 2) and codes["val"].shape[1:] == (16, 2)


@pytest.mark.slow
def test_the_pictures_of_fqgan_and_the_view_run_and_hold_finite_numbers(run, tmp_path):
    for figure, ckpt in (("fq_alone", "phase1"), ("view", "ar"), ("fig3", "ar"), ("fig8", "phase1"),
                         ("fig7a", "nar")):
        path = tmp_path / f"{figure}.png"
        words = [figure, "--ckpt", run / f"{ckpt}.pt", "--num", 10, "--out", path]
        visualize.main(recipes.options.visualize_args([*map(str, words)]))
        assert path.stat().st_size > 1000 and "NaN" not in path.with_suffix(".json").read_text()
    study("report", run, "--out", tmp_path / "r.html", "--num", 8)
    study("compare", run / "phase1.pt", "--steps", 2, "--samples", 20, "--out", tmp_path / "c.json")


@pytest.mark.slow
def test_what_does_not_fit_together_is_one_line(run, trained, data, tmp_path, capsys):
    error = refusal(capsys, "phase1", tmp_path / "a", data, "--preset", "demo-fq",
                    **{**FQ, "tokenizer__teacher_widths": [0, 48]})
    assert "gives 32 features, not the 48" in error
    error = refusal(capsys, "phase1", tmp_path / "b", data, "--preset", "demo-fq",
                    **{**FQ, "phase1__teachers": [None, "nowhere.pth"]})
    assert "nowhere.pth: no such file" in error
    out = earlier(trained, tmp_path / "c", "ar")
    error = refusal(capsys, "ar", out, data, "--tokenizer", run / "phase1.pt")
    assert "does not take tokens (B, 16, 2)" in error

    with pytest.raises(SystemExit) as stop:
        sample.main(recipes.options.sample_args(
            ["--ckpt", str(trained / "ar.pt"), "--tokenizer", str(run / "phase1.pt"), "--device", "cpu"]))
    assert stop.value.code == 2 and "is not the tokenizer" in capsys.readouterr().err


def test_the_loss_weighs_fqgan_s_terms_as_the_preset_says():
    c = recipes.options.find_preset("fqgan-dual")["phase1"]
    terms = dict(loss_codebook=1.0, loss_commit=10.0, loss_entropy=1e2, loss_disentangle=1e3,
                 loss_represent=1e4)
    tokenizer = types.SimpleNamespace(WEIGHTS=FactorizedTokenizer.WEIGHTS, frozen=False, quantizer=None)
    assert train.fork_loss(terms, tokenizer, c) == pytest.approx(100 + 5000)
    assert (c["beta"], c["gamma"]) == (0.25, 0.03)


def test_gradients_are_clipped_to_the_norm_asked_for(trained, data, tmp_path):
    module = nn.Linear(4, 4)
    run = open_run("ar", earlier(trained, tmp_path / "out", "ar"), data)
    run.skips, optimizer = {}, torch.optim.SGD(module.parameters(), lr=1.0, fused=True)
    before = [p.detach().clone() for p in module.parameters()]
    for p in module.parameters():
        p.grad = torch.full_like(p, 10.0)
    run.update(optimizer, "test", clip=0.5)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, module.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("name, changes", [
    ("fq-1x", {"num_codebooks": 1, "teacher_widths": []}), ("fq-2x", {"codebook_size": 128}),
    ("fq-dis", {"teacher_widths": []})])
def test_the_rows_of_fqgan_s_table_3_change_what_they_name(name, changes):
    args, config = recipes.options.train_args(
        ["--stage", "phase1", "--preset", "demo-fq", "--ablation", name]
    )
    assert changes.items() <= config["tokenizer"].items() and config["phase1"]["teachers"] == []
    assert (config["phase1"]["disentangle"] > 0) == (name != "fq-none")


def test_one_sub_codebook_alone_is_the_decoder_on_zeros_for_the_others(monkeypatch):
    tokenizer = FactorizedTokenizer(FactorizedConfig(num_codebooks=2, **TINY)).eval()
    figures, pixels = forks.fqgan.figures, torch.stack([Shapes("val", 2, 32).view(i) for i in range(2)])
    monkeypatch.setattr(figures, "load_model", lambda *args: (tokenizer, dict(config={}, note="")))
    monkeypatch.setattr(figures, "load_images", lambda *args: (None, pixels))
    args = types.SimpleNamespace(ckpt=["x"], tokenizer=None, num=2, data=None, wide=False)
    found = figures.figure_alone(args, "cpu")[1]["psnr"]
    x = pixels / 127.5 - 1
    with torch.no_grad():
        maps = tokenizer.code_maps(tokenizer.encode(x))
        images = tokenizer.decoder(torch.cat([torch.zeros_like(maps[0]), maps[1]], 1))
    assert found["sub-codebook 1 alone"] == pytest.approx(psnr(x, images).mean().item(), abs=1e-4)
    assert len({round(value, 4) for value in found.values()}) == len(found) == 3


def test_a_teacher_stands_where_its_width_stands():
    config = copy.deepcopy(recipes.options.find_preset("demo-fq"))  # not the preset itself
    forks.fqgan.teachers.check_teachers(config)
    config["phase1"]["teachers"] = config["phase1"]["teachers"][::-1]
    with pytest.raises(ValueError, match="null where tokenizer.teacher_widths is 0"):
        forks.fqgan.teachers.check_teachers(config)
