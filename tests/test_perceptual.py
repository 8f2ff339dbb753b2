"""Claims about perceptual.py: VGG taps, Eq. 4, the discriminators and their losses. CPU, no network."""

import copy
import functools
import hashlib
import itertools
import math
from urllib.error import URLError

import pytest
import torch
from helpers import Bomb
import torch.nn.functional as F
from torch import nn

import plumbing.weights
import perceptual as P

SMALL = {"width": 8, "num_classes": 10, "hidden": 16}
ALL_LAYERS = [*P.LAYERS, P.LOGIT]


@pytest.fixture(scope="module")
def taps():
    torch.manual_seed(0)
    return P.VGGTaps(plumbing.weights.build_vgg16(**SMALL))


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(2, 2, 3, 32, 32, generator=generator) * 2 - 1).unbind(0)


@pytest.fixture
def small_build(monkeypatch):
    monkeypatch.setattr(
        plumbing.weights, "build_vgg16", functools.partial(plumbing.weights.build_vgg16, **SMALL)
    )


def tiny_discriminator():
    torch.manual_seed(0)
    return P.StyleDiscriminator(image_size=16, max_width=8)


def count(module):
    return sum(p.numel() for p in module.parameters())


def d(taps, pair, weights):
    return P.perceptual_loss(taps, *pair, weights).item()


# ---------------------------------------------------------------- layers and weights


def test_alpha_0_is_low_1_is_sem_and_relu5_3_weighs_1_for_every_alpha():
    assert (P.layer_weights(0), P.layer_weights(1)) == (P.LAYER_SETS["low"], P.LAYER_SETS["sem"])
    for alpha in (0, 0.1, 0.2, 0.4, 0.6, 0.8, 1):
        assert P.layer_weights(alpha)["relu5_3"] == 1.0
    middle = P.layer_weights(0.4)
    assert middle["logit"] == 0.4 and all(middle[f"relu{s}"] == 0.6 for s in ("1_2", "2_2", "3_3", "4_3"))
    for alpha in (-0.01, 1.01, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            P.layer_weights(alpha)


def test_loss_is_affine_in_alpha(taps, pair):
    low, sem = d(taps, pair, P.layer_weights(0)), d(taps, pair, P.layer_weights(1))
    for alpha in (0.25, 0.5, 0.8):
        expected = alpha * sem + (1 - alpha) * low
        assert d(taps, pair, P.layer_weights(alpha)) == pytest.approx(expected, rel=1e-5)


def test_table_6_sets_name_their_layers():
    spelled = {"low": "1_2 2_2 3_3 4_3 5_3", "A": "1_2 2_2 3_3 4_3 5_3 logit", "B": "2_2 3_3 4_3 5_3 logit"}
    spelled |= {"C": "3_3 4_3 5_3 logit", "D": "4_3 5_3 logit", "sem": "5_3 logit", "E": "logit"}
    spelled |= {"L4": "1_2 2_2 3_3 4_3"}  # of the arena, not of the table
    for name, layers in spelled.items():
        names = [layer if layer == "logit" else f"relu{layer}" for layer in layers.split()]
        assert P.LAYER_SETS[name] == dict.fromkeys(names, 1.0)
    assert P.LAYER_SETS.keys() == {*spelled, "L4"}  # the last one is ours


def test_table_6_sets_are_the_sums_of_their_layers(taps, pair):
    terms = {name: term.item() for name, term in P.perceptual_terms(taps, *pair, ALL_LAYERS).items()}
    for name, weights in P.LAYER_SETS.items():
        assert d(taps, pair, weights) == pytest.approx(sum(terms[layer] for layer in weights), rel=1e-5), name


# ---------------------------------------------------------------- VGG-16: build, fold, load


def test_default_vgg_is_torchvisions():
    from torchvision.models import vgg16

    with torch.device("meta"):
        ours, theirs = plumbing.weights.build_vgg16(), vgg16(init_weights=False)
    assert count(ours) == 138_357_544
    shapes = [{key: value.shape for key, value in vgg.state_dict().items()} for vgg in (ours, theirs)]
    assert shapes[0] == shapes[1] and str(ours.features) == str(theirs.features)
    assert str(ours.classifier) == str(theirs.classifier) and ours.avgpool.output_size == 7


def test_taps_are_relus_with_the_published_channels_and_strides():
    with torch.device("meta"):
        taps = P.VGGTaps(plumbing.weights.build_vgg16())
        out = taps(torch.zeros(1, 3, 256, 256), ALL_LAYERS)
    assert all(isinstance(taps.vgg.features[index], nn.ReLU) for index in (3, 8, 15, 22, 29))
    assert list(P.LAYERS.values()) == [3, 8, 15, 22, 29]
    shapes = [tuple(out[name].shape[1:]) for name in P.LAYERS]
    assert shapes == [(64, 256, 256), (128, 128, 128), (256, 64, 64), (512, 32, 32), (512, 16, 16)]
    assert out["logit"].shape == (1, 1000)


def test_taps_equal_features_computed_without_in_place_relus(taps, pair):
    x = pair[0]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    y = ((x.movedim(1, -1) / 2 + 0.5 - mean) / std).movedim(-1, 1)
    expected = {}
    for index, module in enumerate(taps.vgg.features):
        y = F.relu(y) if isinstance(module, nn.ReLU) else module(y)
        expected.update({name: y.clone() for name, i in P.LAYERS.items() if i == index})
    linear = [module for module in taps.vgg.classifier if isinstance(module, nn.Linear)]
    expected["logit"] = linear[2](F.relu(linear[1](F.relu(linear[0](y.mean(dim=(2, 3)))))))
    out = taps(x, ALL_LAYERS)
    for name in ALL_LAYERS:
        torch.testing.assert_close(out[name], expected[name], rtol=1e-4, atol=1e-4)


def test_vgg_runs_only_as_deep_as_the_deepest_layer(taps, pair):
    ran = []
    hooks = [m.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, m in enumerate(taps.vgg.features)]
    taps(pair[0], ["relu2_2", "relu1_2"])
    for hook in hooks:
        hook.remove()
    assert ran == list(range(9))


def test_folding_batch_norm_changes_nothing(pair):
    torch.manual_seed(0)
    vgg = plumbing.weights.build_vgg16(**SMALL, batch_norm=True)
    for module in vgg.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    folded = plumbing.weights.fold_batch_norm(vgg.train())
    assert vgg.training and not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(pair[0]), vgg.eval()(pair[0]), rtol=1e-5, atol=1e-5)
    P.VGGTaps(folded)  # the taps are again at the indices of LAYERS
    with pytest.raises(ValueError, match="fold_batch_norm"):
        P.VGGTaps(vgg)


def test_scaling_multiplies_every_tap_by_its_own_number_and_nothing_else(taps, pair):
    scale = dict(zip(ALL_LAYERS, (2.0, 0.25, 3.0, 1.0, 0.5, 7.0), strict=True))
    vgg = copy.deepcopy(taps.vgg)
    for name, parameter in vgg.named_parameters():  # a bias of zero would hide that it is scaled
        if name.endswith("bias"):
            nn.init.uniform_(parameter, -0.5, 0.5)
    before = P.VGGTaps(copy.deepcopy(vgg))(pair[0], ALL_LAYERS)
    scaled = plumbing.weights.scale_taps(
        vgg, {index: scale[name] for name, index in P.LAYERS.items()}, scale[P.LOGIT])
    after = P.VGGTaps(scaled)(pair[0], ALL_LAYERS)
    for name in ALL_LAYERS:
        torch.testing.assert_close(after[name], before[name] * scale[name], rtol=1e-4, atol=1e-5)
    assert scaled.logit_scale == 7.0  # by which a softmax divides


@pytest.mark.parametrize("skipped, sides", [(0, (32, 16, 8, 4, 2)), (1, (32, 32, 16, 8, 4)),
                                            (2, (32, 32, 32, 16, 8))])
def test_pools_left_out_from_the_front_make_all_later_features_finer(pair, skipped, sides):
    vgg = P.VGGTaps(plumbing.weights.build_vgg16(**SMALL, skip_pools=skipped))
    features = vgg(pair[0], ALL_LAYERS)  # the taps are where they were
    assert tuple(features[name].shape[-1] for name in P.LAYERS) == sides
    assert features[P.LOGIT].shape == (2, 10)
    smallest = 32 >> skipped
    vgg(pair[0][..., :smallest, :smallest], [P.LOGIT])
    with pytest.raises(ValueError, match=f"at least {smallest}x{smallest}"):
        vgg(pair[0][..., : smallest - 1, : smallest - 1], [P.LOGIT])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip format", "format of 2017"])
def test_a_saved_file_loads_tensor_for_tensor(tmp_path, small_build, zipped):
    vgg = plumbing.weights.build_vgg16()
    torch.save(vgg.state_dict(), tmp_path / "vgg.pth", _use_new_zipfile_serialization=zipped)
    loaded = plumbing.weights.load_vgg16(str(tmp_path / "vgg.pth"))
    assert loaded.random_weights is False
    assert all(torch.equal(a, b) for a, b in zip(vgg.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("damage", ["missing", "renamed", "extra", "reshaped"])
def test_a_missing_renamed_extra_or_reshaped_weight_raises(tmp_path, small_build, damage):
    state = plumbing.weights.build_vgg16().state_dict()
    weight = state.pop("features.28.weight") if damage != "extra" else torch.zeros(1)
    if damage != "missing":
        key = "features.28.weight" if damage == "reshaped" else "features.28.kernel"
        state[key] = weight[:1] if damage == "reshaped" else weight
    torch.save(state, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match=r"features\.28\.") as caught:
        plumbing.weights.load_vgg16(tmp_path / "vgg.pth")
    assert "\n" not in str(caught.value)


def test_a_hash_in_the_file_name_is_checked(tmp_path, small_build):
    torch.save(plumbing.weights.build_vgg16().state_dict(), tmp_path / "vgg.pth")
    digest = hashlib.sha256((tmp_path / "vgg.pth").read_bytes()).hexdigest()
    right = (tmp_path / "vgg.pth").rename(tmp_path / f"vgg16-{digest[:8]}.pth")
    plumbing.weights.load_vgg16(right)
    with pytest.raises(ValueError, match="damaged"):
        plumbing.weights.load_vgg16(right.rename(tmp_path / "vgg16-397923af.pth"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content, told", [
    (b"", "https://"), (b"PK\x03\x04 cut short", "https://"), (None, "https://"),
    (torch.zeros(3), "no VGG-16"), ("code", "no readable state dict")])
def test_a_foreign_file_or_none_gives_one_line_and_code_is_not_executed(tmp_path, content, told):
    path, proof = tmp_path / "vgg.pth", tmp_path / "executed"
    if isinstance(content, str):
        torch.save({"features.0.weight": Bomb(proof)}, path)
    elif torch.is_tensor(content):
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=told) as caught:
        plumbing.weights.load_vgg16(path)
    assert "\n" not in str(caught.value) and not proof.exists()


def test_without_network_the_error_names_url_size_and_remedies(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(RuntimeError) as caught:
        plumbing.weights.load_vgg16()
    message = str(caught.value)
    for part in (plumbing.weights.VGG_URL, "528 MB", "--vgg FILE", "--vgg random", "no network"):
        assert part in message
    assert "\n" not in message and plumbing.weights.VGG_URL == "https://download.pytorch.org/models/vgg16-397923af.pth"


def test_random_weights_are_seeded_marked_and_leave_the_generator_alone(small_build):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = plumbing.weights.load_vgg16("random")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = plumbing.weights.load_vgg16("random")
    assert first.random_weights is True and P.VGGTaps(first).random_weights is True
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# ---------------------------------------------------------------- perceptual loss


@pytest.mark.parametrize("name", list(P.LAYER_SETS))
def test_loss_is_zero_for_equal_images_positive_otherwise_and_symmetric(taps, pair, name):
    (x, y), weights = pair, P.LAYER_SETS[name]
    assert d(taps, (x, x.clone()), weights) == 0 < d(taps, (x, y), weights)
    assert d(taps, (x, y), weights) == pytest.approx(d(taps, (y, x), weights), rel=1e-6)


def test_real_terms_are_element_means_of_the_taps(taps, pair):
    terms = P.perceptual_terms(taps, *pair, ALL_LAYERS)
    f, g = taps(pair[0], ALL_LAYERS), taps(pair[1], ALL_LAYERS)
    for name in ALL_LAYERS:
        mean = ((f[name] - g[name]) ** 2).sum().item() / f[name].numel()
        assert terms[name].item() == pytest.approx(mean, rel=1e-4)


def test_gradient_reaches_x_hat_only(taps, pair):
    x, x_hat = (image.clone().requires_grad_(True) for image in pair)
    P.perceptual_loss(taps, x, x_hat, P.layer_weights(0.5)).backward()
    assert x.grad is None and x_hat.grad.abs().sum() > 0 and torch.isfinite(x_hat.grad).all()
    assert all(not p.requires_grad and p.grad is None for p in taps.parameters())


def test_vgg_stays_in_eval_mode_under_a_training_parent(taps, pair):
    parent = nn.ModuleDict({"vgg": taps}).train()
    assert parent.training and not any(module.training for module in taps.modules())
    taps.train()
    assert not any(module.training for module in taps.modules())
    assert d(taps, pair, P.LAYER_SETS["sem"]) == d(taps, pair, P.LAYER_SETS["sem"])


def test_loss_is_float32_under_autocast(taps, pair):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert taps(pair[0], ["relu2_2"])["relu2_2"].dtype == torch.bfloat16
        terms = P.perceptual_terms(taps, *pair, ALL_LAYERS)
    assert all(term.dtype == torch.float32 and term.ndim == 0 for term in terms.values())


def test_wrong_names_and_shapes_are_refused(taps, pair):
    for layers in (["relu6_1"], []):
        with pytest.raises(ValueError, match="layers"):
            taps(pair[0], layers)
    for shape in ((3, 32, 32), (2, 1, 32, 32), (2, 3, 16, 16)):
        with pytest.raises(ValueError, match="images"):
            taps(torch.zeros(shape), ["logit"])
    with pytest.raises(ValueError, match="one shape"):
        P.perceptual_loss(taps, pair[0], pair[1][:1], P.LAYER_SETS["low"])


# ---------------------------------------------------------------- discriminators


def test_parameter_counts():
    with torch.device("meta"):
        assert count(P.StyleDiscriminator(256, 1)) == 24_001_089
        assert count(P.StyleDiscriminator(256, 2)) == 28_864_129
        assert count(P.PatchDiscriminator()) == 2_765_633


def test_the_style_discriminator_gives_one_logit_an_image_and_patch_gan_a_map_of_them():
    for size, batch in itertools.product((8, 16, 32), (1, 3, 5, 6)):
        assert P.StyleDiscriminator(size, max_width=8)(torch.randn(batch, 3, size, size)).shape == (batch,)
    assert P.PatchDiscriminator(width=8)(torch.randn(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    for disc, shape in ((tiny_discriminator(), (1, 3, 32, 32)), (P.PatchDiscriminator(8), (1, 1, 32, 32))):
        with pytest.raises(ValueError, match="expected"):
            disc(torch.zeros(shape))
    for size in (0, 4, 24, 100):
        with pytest.raises(ValueError, match="power of two"):
            P.StyleDiscriminator(size)


def test_blur_kernel_sums_to_1_and_halves_exactly():
    blur = P.Blur(padding=2)
    assert (blur.kernel[0] * 64).tolist() == [1, 3, 3, 1]
    assert blur.kernel.sum() == 1 and not tiny_discriminator().state_dict().keys() & {"blocks.0.blur.kernel"}
    for side in (8, 16, 32):
        x = torch.randn(1, 4, side, side)
        assert P.DiscriminatorBlock(4, 6)(x).shape == (1, 6, side // 2, side // 2)
    # A strided blur before the 1x1 convolution equals the 1x1 convolution of stride 2 after a full blur.
    full = P.Blur(padding=1)(x)
    torch.testing.assert_close(P.Blur(padding=1, stride=2)(x), full[:, :, ::2, ::2])
    assert torch.allclose(P.Blur(padding=0)(torch.ones(1, 2, 8, 8)), torch.ones(1, 2, 5, 5))


@pytest.mark.parametrize("padding, stride", [(2, 1), (1, 2), (0, 1)])
def test_the_blur_has_the_value_and_both_derivatives_of_a_grouped_convolution(padding, stride):
    blur = P.Blur(padding, stride).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)

    def grouped(x):
        return F.conv2d(x, blur.kernel.expand(3, 1, 4, 4), stride=stride, padding=padding, groups=3)

    def derivatives(function):
        y = function(x).square().sum()
        (once,) = torch.autograd.grad(y, x, create_graph=True)
        return y, once, *torch.autograd.grad(once.square().sum(), x)

    for ours, theirs in zip(derivatives(blur), derivatives(grouped), strict=True):
        torch.testing.assert_close(ours, theirs)
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(blur, x) and torch.autograd.gradgradcheck(blur, x)


def test_stddev_channel_vanishes_for_equal_images_and_is_the_group_mean_otherwise():
    x = torch.randn(1, 5, 4, 4).repeat(4, 1, 1, 1)
    assert P.minibatch_stddev(x)[:, 5].abs().max() <= 1.001e-4
    x = torch.randn(8, 5, 4, 4)
    out = P.minibatch_stddev(x)
    assert out.shape == (8, 6, 4, 4) and torch.equal(out[:, :5], x)
    for group in (slice(0, 4), slice(4, 8)):
        expected = x[group].var(dim=0, unbiased=False).add(1e-8).sqrt().mean()
        torch.testing.assert_close(out[group, 5], expected.expand(4, 4, 4))


def test_contiguous_halves_give_the_logits_of_the_whole_batch():
    net, x = tiny_discriminator(), torch.randn(8, 3, 16, 16)
    torch.testing.assert_close(torch.cat([net(x[:4]), net(x[4:])]), net(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(torch.cat([net(x[::2]), net(x[1::2])]), torch.cat([net(x)[::2], net(x)[1::2]]))


def test_equalised_layers_keep_unit_variance_at_init():
    torch.manual_seed(0)
    conv, linear = P.EqualConv2d(32, 64, 3), P.EqualLinear(256, 256)
    assert conv(torch.randn(8, 32, 10, 10)).var().item() == pytest.approx(1, abs=0.1)
    assert linear(torch.randn(256, 256)).var().item() == pytest.approx(1, abs=0.1)
    assert not conv.bias.any() and not linear.bias.any()
    block, x = P.DiscriminatorBlock(4, 6), torch.randn(2, 4, 8, 8)
    torch.nn.init.zeros_(block.conv2.weight)  # the shortcut alone, at half of its variance
    torch.testing.assert_close(block(x), block.skip(block.skip_blur(x)) * 0.5**0.5)
    assert P.lrelu(torch.randn(100_000)).square().mean().item() == pytest.approx(1.04, abs=0.03)


def test_discriminator_runs_under_bf16_autocast():
    net, x = tiny_discriminator(), torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = P.disc_loss(net(x), net(x.flip(0)))
    loss.backward()
    assert loss.dtype == torch.float32 and all(torch.isfinite(p.grad).all() for p in net.parameters())


# ---------------------------------------------------------------- losses


def test_logistic_losses_at_zero_logits():
    zero = torch.zeros(4)
    assert P.disc_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert P.adv_loss(zero).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", ["logistic", "hinge"])
def test_players_pull_the_logits_apart(kind):
    real, fake = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    P.disc_loss(real, fake, kind).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()
    fake.grad = None
    P.adv_loss(fake, kind).backward()
    assert (fake.grad < 0).all()


def test_hinge_values_and_no_other_kind():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert P.disc_loss(real, fake, "hinge").item() == 0.5 + 1.0
    assert P.adv_loss(fake, "hinge").item() == 1.0
    for loss, logits in ((P.disc_loss, (real, fake)), (P.adv_loss, (fake,))):
        with pytest.raises(ValueError, match="kind"):
            loss(*logits, "wgan")


def test_r1_of_a_linear_discriminator_is_half_gamma_w_squared():
    w = torch.randn(3, 8, 8)
    penalty = P.r1_penalty(lambda x: (x * w).sum(dim=(1, 2, 3)), torch.randn(5, 3, 8, 8), gamma=7.0)
    assert penalty.item() == pytest.approx(3.5 * w.square().sum().item(), rel=1e-5)


def test_r1_gives_finite_parameter_gradients_even_under_autocast():
    net, x, dtypes = tiny_discriminator(), torch.randn(4, 3, 16, 16), []
    net.conv.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    plain = P.r1_penalty(net, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = P.r1_penalty(net, x)
    assert penalty.dtype == torch.float32 and set(dtypes) == {torch.float32} and torch.equal(penalty, plain)
    penalty.backward()
    # The last bias shifts every logit alike, so it has no part in grad_x D.
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    layers = ("from_rgb", "blocks.0.conv1", "blocks.1.skip", "conv", "linear", "out")
    assert all(grads[f"{layer}.weight"].any() for layer in layers)


@pytest.mark.slow
def test_r1_of_a_compiled_discriminator_is_that_of_the_module_itself():
    # torch.compile has no second backward: r1_penalty runs the module uncompiled
    net, x = tiny_discriminator(), torch.randn(4, 3, 16, 16)

    def gradients():
        net.zero_grad()
        P.r1_penalty(net, x).backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None and p.grad.any()]

    expected = gradients()
    net.compile(backend="aot_eager")
    net(x).sum().backward()  # compiled, once
    found = gradients()
    assert len(found) > 3
    torch.testing.assert_close(found, expected)


def test_r1_gradients_are_finite_for_a_batch_of_equal_images():
    net, x = tiny_discriminator(), torch.zeros(4, 3, 16, 16)
    P.r1_penalty(net, x).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
