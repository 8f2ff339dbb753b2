"""Claims about tokenizer.py: sizes, quantizer and its gradients, K-means, windowed attention, phase 2."""

import contextlib
import math
import types

import pytest
import torch
import torch.nn.functional as F

import tokenizer as module
from forks.fqgan.tokenizer import FactorizedConfig, FactorizedTokenizer
from plumbing.codes import codebook_usage
from plumbing.kmeans import OfflineKMeans, kmeans
from plumbing.parallel import begin_step, mean_probs, wrap
from tokenizer import (
    ALLOWED, BlockAttention, Downsample, KMeansQuantizer, TokenizerConfig, VQTokenizer,
    VectorQuantizer, average_probs, code_distances, entropy_loss, from_windows, group_norm,
    to_windows, windowed_attention,
)

CODEBOOKS = ALLOWED["codebook"]
TINY = dict(image_size=16, base_width=8, channel_mult=(1, 2, 2), codebook_size=16, codebook_dim=4)  # f = 4


def tiny_tokenizer(seed=0, **changes):
    """A VQTokenizer whose codes are random encoder outputs, so that a batch uses many of them."""
    torch.manual_seed(seed)
    tokenizer = VQTokenizer(TokenizerConfig(**{**TINY, **changes}))
    with torch.no_grad():
        z_hat = tokenizer.encoder(images(8, 32, seed + 1))
        vectors = z_hat.permute(0, 2, 3, 1).reshape(-1, z_hat.shape[1])
        chosen = torch.randperm(len(vectors))[: TINY["codebook_size"]]
        tokenizer.quantizer.codebook.weight.copy_(vectors[chosen])
    return tokenizer


def tiny_quantizer(seed=0, **changes):
    torch.manual_seed(seed)
    Quantizer = KMeansQuantizer if changes.get("codebook") == "kmeans" else VectorQuantizer
    quantizer = Quantizer(TokenizerConfig(**{**TINY, **changes}))
    torch.nn.init.normal_(quantizer.codebook.weight)
    return quantizer


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images(batch_size, side=16, seed=0):
    return torch.rand(batch_size, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def count(model):
    return sum(p.numel() for p in model.parameters())


def brute_force_indices(z_hat, codes):
    """(B, n_z, h, w) -> (B, h, w): every pair compared in float64, one by one."""
    z = z_hat.double().permute(0, 2, 3, 1)[..., None, :]
    return (z - codes.double()).square().sum(-1).argmin(-1)


# Sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, expected, printed", [
    (dict(), 54_532_867, 54.5), (dict(num_attention=1), 57_948_419, 57.9),
    (dict(num_attention=2), 61_363_971, 61.4),
    (dict(decoder_extra_blocks=2), 69_878_531, 69.9),  # the paper prints 70.0, which stays unexplained
    (dict(bias=True, num_attention=2), 61_393_667, 61.4),
    (dict(bias=True, latent_kernel=3), 56_644_355, 56.6),
    (dict(codebook="fn", codebook_dim=32, codebook_size=8192), 54_303_267, 54.3),
    (dict(codebook="kmeans"), 54_532_867, 54.5)])  # the reservoir is a buffer
def test_parameter_totals_are_exact(changes, expected, printed):
    with torch.device("meta"):
        model = VQTokenizer(TokenizerConfig(**changes))
    assert count(model) == expected and round(expected / 1e6, 1) == printed


def test_parameters_and_shapes_of_encoder_decoder_and_codebook_are_exact():
    with torch.device("meta"):
        model, x = VQTokenizer(TokenizerConfig()), torch.empty(2, 3, 256, 256)
        second = VQTokenizer(TokenizerConfig(num_attention=1))
        z_hat = model.encoder(x)
        assert z_hat.shape == (2, 256, 16, 16) and model.decoder(z_hat).shape == x.shape
    assert count(model.encoder) == count(second.encoder) == 27_135_872
    assert count(model.quantizer) == count(second.quantizer) == 262_144
    assert (count(model.decoder), count(second.decoder)) == (27_134_851, 30_550_403)
    assert (model.grid_size, model.codebook_size, model.config.downsample) == (16, 1024, 16)


def test_downsampling_pads_a_zero_row_and_column_at_the_bottom_and_right():
    down = Downsample(1, 1)
    torch.nn.init.ones_(down.conv.weight)
    torch.nn.init.zeros_(down.conv.bias)
    assert down(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[9, 6], [6, 4]]


def test_block_sides_and_heads_are_the_documented_ones():
    with torch.device("meta"):
        stages = VQTokenizer(TokenizerConfig(num_attention=1)).decoder.stages
    assert [stage.attention[0].block for stage in stages] == [4, 8, 8, 16, 16]
    assert [stage.attention[0].heads for stage in stages] == [8, 4, 4, 4, 4]
    assert [layer.kind for layer in stages[0].attention] == ["regional", "dilated"]


@pytest.mark.parametrize(
    "channels, groups", [(3, 1), (6, 1), (8, 2), (34, 2), (48, 12), (64, 16), (128, 32), (256, 32), (512, 32)]
)
def test_group_norm_has_at_most_32_groups_of_at_least_4_channels(channels, groups):
    assert group_norm(channels).num_groups == groups


# Shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("height, width", [(4, 4), (20, 20), (8, 24)])
def test_tokens_of_any_divisible_resolution_decode_to_the_reconstruction(codebook, height, width):
    model = tiny_tokenizer(codebook=codebook)
    x = images(2, 32)[:, :, :height, :width]
    x_hat, tokens, _ = model(x)
    assert x_hat.shape == x.shape and x_hat.dtype == torch.float32
    assert tokens.shape == (2, height * width // 16) and tokens.dtype == torch.int64
    assert 0 <= tokens.min() and tokens.max() < model.codebook_size
    assert torch.equal(model.encode(x), tokens)
    if height == width:
        assert torch.equal(model.decode(tokens), x_hat)
    assert tokens.unique().numel() > 3 or height == 4  # a constant map would prove nothing


def test_tokens_are_in_raster_order():
    model, x = tiny_tokenizer().eval(), images(1, 32)
    tokens, grid = model.encode(x), model.quantizer.quantize(model.encoder(x))
    assert torch.equal(tokens, grid.reshape(1, -1))
    assert torch.equal(tokens[0, 8:16], grid[0, 1])
    assert not torch.equal(tokens[0, 8:16], grid[0, :, 1])


def test_forward_and_encode_give_the_same_tokens_for_either_distance():
    """The root of nearly equal float32 distances makes ties; they must not decide the index."""
    for distance in ("squared", "l2"):
        quantizer = VectorQuantizer(TokenizerConfig(distance=distance, codebook_dim=16))
        z_hat = normal(8, 16, 16, 16)
        assert torch.equal(quantizer(z_hat)[1], quantizer.quantize(z_hat)), distance


def test_encoding_has_no_gradient_and_decoding_reaches_the_codebook():
    model = tiny_tokenizer()
    tokens = model.encode(images(2).requires_grad_())
    assert not tokens.requires_grad
    model.decode(tokens).sum().backward()
    assert model.quantizer.codebook.weight.grad.any()
    assert all(p.grad is None for p in model.encoder.parameters())


# Wrong inputs ---------------------------------------------------------------------------------------------


def test_images_and_tokens_of_wrong_shape_are_refused():
    model = tiny_tokenizer()
    for shape in ((1, 3, 18, 16), (1, 3, 16, 18), (1, 1, 16, 16), (3, 16, 16)):
        for call in (model, model.encode):
            with pytest.raises(ValueError, match="divisible by 4"):
                call(torch.zeros(shape))
    for shape in ((1, 15), (2, 4, 4), (2, 1, 16), (16,)):
        with pytest.raises(ValueError, match="square"):
            model.decode(torch.zeros(shape, dtype=torch.int64))


def test_attention_on_a_map_that_its_blocks_do_not_tile_is_refused():
    model, x = tiny_tokenizer(image_size=16), images(1, 12)  # a 3x3 grid; the blocks of 4x4 are 2x2
    assert model(x)[0].shape == x.shape
    model.add_attention()
    with pytest.raises(ValueError, match="3x3 map needs sides divisible by its block side 2"):
        model(x)
    with pytest.raises(ValueError, match="6 channels cannot be split into 4"):
        BlockAttention(6, 16, "regional")
    with pytest.raises(ValueError, match="6x6 map needs sides divisible by its block side 4"):
        BlockAttention(8, 6, "regional")


@pytest.mark.parametrize("changes, message", [
    (dict(image_size=100, channel_mult=(1, 1, 1, 1, 1)), "nearest sides are 96 and 112"),
    (dict(codebook="vq"), "'plain', 'entropy', 'fn', 'kmeans'"), (dict(channel_mult=()), "no width"),
    (dict(latent_kernel=2), r"\(1, 3\)"),
    (dict(codebook="kmeans", kmeans_every=0), "kmeans_every must be at least 1"),
    (dict(codebook="kmeans", kmeans_warmup=9, kmeans_last=8), "there would be no K-means"),
    (dict(codebook_size=20_000, warm_start=2), "16,384 vectors")])
def test_sizes_that_make_no_tokenizer_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VQTokenizer(TokenizerConfig(**{**TINY, **changes}))


# Quantizer: indices, straight-through, Eq. 2 --------------------------------------------------------------


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_index_is_the_brute_force_nearest_code(codebook):
    quantizer, z_hat = tiny_quantizer(codebook=codebook), normal(3, 4, 5, 6, seed=1)
    expected = brute_force_indices(F.normalize(z_hat, dim=1) if codebook == "fn" else z_hat, quantizer.codes)
    assert expected.unique().numel() > 8
    assert torch.equal(quantizer.quantize(z_hat), expected)
    assert torch.equal(quantizer(z_hat)[1], expected)


def test_distances_are_the_euclidean_ones_squared_up_to_a_constant_of_each_row():
    z, codes = normal(7, 4, dtype=torch.float64), normal(5, 4, seed=1, dtype=torch.float64)
    true = torch.cdist(z, codes)
    squared = code_distances(z, codes) + z.square().sum(1, keepdim=True)
    torch.testing.assert_close(squared, true.square())
    quantizer = VectorQuantizer(TokenizerConfig(**TINY, distance="l2"))
    torch.testing.assert_close(quantizer.softmax_distances(code_distances(z, codes), z), true)


@pytest.mark.parametrize("codebook", ["plain", "entropy", "kmeans"])
def test_straight_through_is_exactly_the_code_forwards_and_the_identity_backwards(codebook):
    quantizer, z_hat = tiny_quantizer(codebook=codebook), normal(2, 4, 3, 3, seed=1).requires_grad_()
    z_st, indices, _ = quantizer(z_hat)
    assert torch.equal(z_st, quantizer.lookup(indices))
    upstream = normal(*z_st.shape, seed=2)
    z_st.backward(upstream)
    assert torch.equal(z_hat.grad, upstream)
    assert quantizer.codebook.weight.grad is None  # the decoder's path never moves the codes


def test_codebook_term_moves_the_codes_only_and_commitment_the_encoder_only():
    quantizer, z_hat = tiny_quantizer(codebook="plain"), normal(2, 4, 3, 3, seed=1).requires_grad_()
    indices, losses = quantizer(z_hat)[1:]
    variables = (z_hat, quantizer.codebook.weight)
    to_z, to_codes = torch.autograd.grad(losses["loss_codebook"], variables, allow_unused=True)
    difference = (quantizer.lookup(indices) - z_hat).detach()
    assert to_z is None
    expected = torch.zeros(16, 4).index_add_(
        0, indices.flatten(), difference.permute(0, 2, 3, 1).reshape(-1, 4) * 2 / difference.numel()
    )
    torch.testing.assert_close(to_codes, expected)
    to_z, to_codes = torch.autograd.grad(losses["loss_commit"], variables, allow_unused=True)
    assert to_codes is None
    torch.testing.assert_close(to_z, -2 * difference / difference.numel())


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_only_the_codebook_of_sec_3_4_has_an_entropy_term(codebook):
    model, x = tiny_tokenizer(codebook=codebook, kmeans_warmup=0), images(2)
    has_entropy = codebook == "entropy"
    expected = {"loss_codebook", "loss_commit"} | ({"loss_entropy"} if has_entropy else set())
    losses = model(x)[2]
    assert set(losses) == expected
    assert all(value.dtype == torch.float32 and value.ndim == 0 for value in losses.values())
    assert (mean_probs(model, [x, x]) is not None) == has_entropy


def test_uniform_initial_codes_lie_within_one_over_k():
    codes = VectorQuantizer(TokenizerConfig(codebook_size=64, codebook_dim=32)).codebook.weight
    assert codes.abs().max() <= 1 / 64 and codes.std().item() == pytest.approx(1 / 64 / 3**0.5, rel=0.1)


def test_the_quantizer_computes_in_float32_under_bfloat16_autocast(monkeypatch):
    quantizer, z_hat = tiny_quantizer(), normal(2, 4, 5, 5, seed=1)
    expected, types = quantizer(z_hat), []

    def spy(z, codes):
        distances = code_distances(z, codes)
        types.extend((z.dtype, codes.dtype, distances.dtype))
        return distances

    monkeypatch.setattr(module, "code_distances", spy)
    with torch.autocast("cpu", torch.bfloat16):
        z_st, indices, losses = quantizer(z_hat)
        assert torch.equal(quantizer.quantize(z_hat), indices)
        probs = quantizer.probs(z_hat)
        model_tokens = tiny_tokenizer()(images(1))[1]  # bfloat16 convolutions in front of the quantizer
    assert set(types) == {torch.float32}
    assert model_tokens.dtype == torch.int64
    assert torch.equal(z_st, expected[0]) and torch.equal(indices, expected[1])
    assert losses == expected[2] and z_st.dtype == probs.dtype == quantizer.codes.dtype == torch.float32
    distances = code_distances(quantizer.flatten(z_hat), quantizer.codes)
    torch.testing.assert_close(probs, average_probs(distances))


# Entropy term ---------------------------------------------------------------------------------------------


def test_entropy_term_is_zero_for_even_use_ln_k_for_one_code_and_never_negative():
    assert entropy_loss(average_probs(torch.full((6, 16), 3.0))).item() == pytest.approx(0, abs=1e-6)
    one_code = F.one_hot(torch.tensor(3), 16).float()
    assert entropy_loss(one_code).item() == pytest.approx(math.log(16), rel=1e-6)
    for seed in range(20):
        term = entropy_loss(average_probs(10 * normal(30, 16, seed=seed))).item()
        assert 0 < term < math.log(16)


def test_entropy_term_is_ln_k_minus_the_entropy_of_the_mean_assignment():
    quantizer, z_hat = tiny_quantizer(), normal(3, 4, 2, 2, seed=1)
    z = z_hat.double().permute(0, 2, 3, 1).reshape(-1, 4)
    mean = torch.cdist(z, quantizer.codes.double()).square().neg().softmax(1).mean(0)
    expected = math.log(16) + (mean * mean.log()).sum().item()
    assert quantizer(z_hat)[2]["loss_entropy"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("entropy_set", ["batch", "image"])
@pytest.mark.parametrize("distance", ["squared", "l2"])
@pytest.mark.parametrize("which", ["codes", "encoder"])
def test_a_gradient_step_on_the_entropy_term_raises_the_entropy(which, distance, entropy_set):
    quantizer = tiny_quantizer(distance=distance, entropy_set=entropy_set)
    z_hat = (normal(3, 4, 4, 4, seed=1) + 1).requires_grad_()
    moved = quantizer.codebook.weight if which == "codes" else z_hat

    def entropy():  # by its definition: the sign of the term is what is tested
        z = quantizer.flatten(z_hat)
        probs = (-quantizer.softmax_distances(code_distances(z, quantizer.codes), z)).softmax(1)
        means = probs.unflatten(0, (3, -1)).mean(1) if entropy_set == "image" else probs.mean(0)
        return torch.special.entr(means).sum(-1).mean().item()

    (gradient,) = torch.autograd.grad(quantizer(z_hat)[2]["loss_entropy"], moved)
    before = entropy()
    with torch.no_grad():
        moved -= 0.01 * gradient / gradient.norm()
    assert entropy() > before + 1e-5


def test_the_average_per_image_is_the_mean_of_the_terms_of_single_images():
    quantizer, z_hat = tiny_quantizer(entropy_set="image"), normal(3, 4, 2, 2, seed=1)
    single = [quantizer(z_hat[i : i + 1])[2]["loss_entropy"].item() for i in range(3)]
    together = quantizer(z_hat)[2]["loss_entropy"].item()
    assert together == pytest.approx(sum(single) / 3, rel=1e-5)
    assert together > tiny_quantizer()(z_hat)[2]["loss_entropy"].item() + 0.1  # the entropy is concave


@pytest.mark.parametrize("factorized", [False, True])
def test_accumulated_micro_batches_give_the_gradients_of_the_whole_batch(factorized):
    torch.manual_seed(0)
    model = FactorizedTokenizer(FactorizedConfig(**TINY, num_codebooks=2)) if factorized else tiny_tokenizer()
    x = images(4)
    x[2:] = x[2:] * 0.1 + 0.5

    def gradients(size, alone=False):
        run = types.SimpleNamespace(micro=lambda x: x.split(size), autocast=contextlib.nullcontext())
        micro = begin_step(run, model, None, x, 0)
        if alone:  # as if each micro-batch were the batch
            model.quantizer.global_probs = None
        model.zero_grad()
        for part in micro:
            (model(part)[2]["loss_entropy"] / len(micro)).backward()
        moved = (*model.encoder.parameters(), *model.quantizer.parameters())
        return torch.cat([p.grad.flatten() for p in moved])

    def gap(some, others):
        return ((some - others).norm() / others.norm()).item()

    full = gradients(4)
    assert gap(gradients(2), full) < 1e-4 and model.quantizer.global_probs is not None
    assert gap(gradients(2, alone=True), full) > 1e-2
    torch.testing.assert_close(gradients(4), full)  # the next step's batch in one piece: its own mean again
    whole = model.quantizer.probs(model.encoder(x)).detach()
    assert not [name for name in model.state_dict() if "global_probs" in name]
    for parts in (x.split(2), x.split(3)):  # micro-batches of 2 and 2, of 3 and 1: each image counts alike
        torch.testing.assert_close(mean_probs(model, parts), whole)


# Normalised mode ------------------------------------------------------------------------------------------


def test_normalised_codes_have_norm_one_and_distances_of_the_angle():
    quantizer, z_hat = tiny_quantizer(codebook="fn"), normal(2, 4, 3, 3, seed=1)
    z, codes = quantizer.flatten(z_hat), quantizer.codes
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(16))
    distances = code_distances(z, codes) + z.square().sum(1, keepdim=True)
    torch.testing.assert_close(distances, 2 - 2 * F.cosine_similarity(z[:, None], codes[None], dim=2))
    assert distances.min() >= -1e-6 and distances.max() <= 4 + 1e-6
    z_st = quantizer(z_hat)[0]
    torch.testing.assert_close(z_st.norm(dim=1), torch.ones(2, 3, 3))  # the decoder gets the normalised code


# K-means --------------------------------------------------------------------------------------------------


def test_kmeans_finds_exactly_k_distinct_points_without_error():
    points = torch.randperm(6**4, generator=torch.Generator().manual_seed(0))[:16]
    points = torch.stack([points // 6**i % 6 for i in range(4)], 1).float()
    x = points.repeat_interleave(torch.arange(1, 17), 0)  # clusters of very different sizes
    for seed in range(3):
        centres = kmeans(x, 16, seed)
        distances = torch.cdist(x, centres)
        assert distances.min(1).values.max() == 0
        counts = torch.bincount(distances.argmin(1), minlength=16)
        assert codebook_usage(counts)[0] == 1
        assert sorted(map(tuple, centres.tolist())) == sorted(map(tuple, points.tolist()))


def test_kmeans_centres_are_the_means_of_the_points_nearest_to_them():
    x = normal(60, 3)
    centres = kmeans(x, 4, seed=0, iterations=50)
    nearest = torch.cdist(x, centres).argmin(1)
    torch.testing.assert_close(centres, torch.stack([x[nearest == i].mean(0) for i in range(4)]))


def test_kmeans_depends_on_its_seed_only_and_survives_fewer_distinct_points_than_centres():
    first = kmeans(normal(60, 3), 5, seed=7)
    torch.manual_seed(2)
    again, other = (kmeans(normal(60, 3), 5, seed=seed) for seed in (7, 8))
    assert torch.equal(again, first) and not torch.equal(other, first)
    assert kmeans(torch.ones(9, 3), 4, seed=0).eq(1).all()


def overwrites(quantizer, step):
    """Whether the step begins with a new codebook, which is then the one parameter named."""
    named = quantizer.start_step(step)
    assert not named or named[0] is quantizer.codebook.weight and len(named) == 1
    return bool(named)


def test_start_step_names_the_codebook_exactly_when_it_was_overwritten():
    quantizer = tiny_quantizer(codebook="kmeans", kmeans_warmup=2, kmeans_every=3, kmeans_last=9).train()
    overwritten, bypassed = [], []
    for step in range(13):
        before = quantizer.codebook.weight.clone()
        told = overwrites(quantizer, step)
        assert told == (not torch.equal(before, quantizer.codebook.weight))
        overwritten += [step] * told
        bypassed += [step] * quantizer.bypass
        quantizer(normal(2, 4, 4, 4, seed=step))
    assert overwritten == [2, 5, 8] and bypassed == [0, 1]
    assert (quantizer.reservoir_keys == -1).all()  # nothing is collected after the last re-estimation


def test_without_kmeans_start_step_does_nothing_and_there_is_no_reservoir():
    model = tiny_tokenizer(codebook="entropy")
    assert not any(model.start_step(step) for step in range(5))
    assert type(model.quantizer) is VectorQuantizer
    assert set(model.quantizer.state_dict()) == {"codebook.weight"}


def test_reestimation_waits_for_k_vectors_and_empties_the_reservoir():
    quantizer = tiny_quantizer(codebook="kmeans", kmeans_warmup=1, kmeans_every=1, kmeans_last=9).train()
    before = quantizer.codebook.weight.clone()
    quantizer.start_step(0)
    quantizer(normal(1, 4, 3, 5))  # 15 of the 16
    assert not overwrites(quantizer, 1)
    assert torch.equal(quantizer.codebook.weight, before)
    quantizer(normal(1, 4, 1, 1, seed=1))  # kept: the skipped ones still count
    assert overwrites(quantizer, 2) and not overwrites(quantizer, 3)


def test_quantizing_in_parts_gives_the_same_tokens(monkeypatch):
    quantizer, z_hat = tiny_quantizer(), normal(2, 4, 5, 5)
    whole = quantizer.quantize(z_hat)
    monkeypatch.setattr(VectorQuantizer, "MOST_DISTANCES", 16 * 7)  # seven vectors at a time
    assert torch.equal(quantizer.quantize(z_hat), whole)


def test_the_reservoir_is_a_uniform_sample_of_everything_seen(monkeypatch):
    monkeypatch.setattr(OfflineKMeans, "RESERVOIR", 200)
    quantizer = tiny_quantizer(codebook="kmeans", codebook_dim=1).train()
    quantizer.start_step(0)
    for i in range(20):
        quantizer(torch.full((1, 1, 10, 10), float(i)))  # 2000 vectors, 100 of each number
    counts = torch.bincount(quantizer.reservoir[:, 0].long(), minlength=20)
    assert counts.sum() == 200 and (quantizer.reservoir_keys >= 0).all()
    assert counts[:10].sum() > 70 and counts[10:].sum() > 70 and counts.min() >= 1


def test_vectors_that_are_not_finite_never_reach_the_codebook():
    quantizer = tiny_quantizer(codebook="kmeans", kmeans_warmup=1, kmeans_every=1, kmeans_last=1).train()
    quantizer.start_step(0)
    z_hat = normal(2, 4, 4, 4)
    z_hat[0, 1, 2, 3], z_hat[1, 0, 0, 0] = math.nan, math.inf
    quantizer(z_hat)
    assert (quantizer.reservoir_keys >= 0).sum() == 30
    assert overwrites(quantizer, 1) and quantizer.codebook.weight.isfinite().all()


def test_while_warming_up_the_decoder_gets_the_encoder_output_and_the_losses_are_zero():
    model, x = tiny_tokenizer(codebook="kmeans", kmeans_warmup=2).train(), images(2)
    model.quantizer.start_step(0)
    x_hat, tokens, losses = model(x)
    assert torch.equal(x_hat, model.decoder(model.encoder(x)))
    assert torch.equal(tokens, model.encode(x))
    assert losses == {"loss_codebook": 0, "loss_commit": 0}
    (x_hat.mean() + sum(losses.values())).backward()
    assert not model.quantizer.codebook.weight.grad.any()  # zero but there, as DDP wants it
    assert model.encoder.conv_in.weight.grad.any()
    model.eval()
    assert torch.equal(model(x)[0], model.decode(tokens))  # evaluation quantizes


@pytest.mark.slow
def test_a_compiled_tokenizer_gives_what_the_module_gives_while_codes_are_bypassed_and_after(monkeypatch):
    # compiled as a whole, the random keys of the warm start break its graph and bf16 then raises
    def compile(module):
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    model, x = tiny_tokenizer(codebook="entropy", warm_start=2).train(), images(4)
    model, x = (part.to(memory_format=torch.channels_last) for part in (model, x))
    for step in (0, 3):
        model.quantizer.start_step(step)
        torch.compiler.reset()
        with torch.autocast("cpu", torch.bfloat16) as autocast:
            model._compiled_call_impl = None
            expected = model(x)
            found = wrap(model, (x,), x.device, autocast, compiled=True)(x)
        assert model._compiled_call_impl is not None
        for name in ("forward", "quantize", "lookup"):  # products without TF32
            assert getattr(model.quantizer, name)._torchdynamo_disable
        torch.testing.assert_close(found, expected)
        found[0].float().sum().backward()
        assert model.encoder.conv_in.weight.grad.isfinite().all()


@pytest.mark.parametrize("settings, steps, expected", [
    (dict(warm_start=100), 550, [100]), (dict(warm_start=100), 101, [100]), (dict(warm_start=100), 100, [20]),
    (dict(warm_start=100), 12, [2]), (dict(warm_start=100), 2, [1]), (dict(warm_start=0), 12, [0]),
    (dict(codebook="kmeans"), 550, [*range(110, 331, 22)]),
    (dict(codebook="kmeans", kmeans_warmup=2, kmeans_last=8, kmeans_every=3), 6, [2, 5, 8])])
def test_a_run_that_ends_before_its_first_kmeans_quantizes_all_the_same(settings, steps, expected, capsys):
    """A schedule in steps that a short run never reaches; it follows from the configuration alone."""
    quantizer = tiny_tokenizer(**{"codebook": "entropy", **settings}).quantizer
    planned = getattr(quantizer, "reestimations", range(1))
    if hasattr(quantizer, "fit"):
        quantizer.fit(steps)
    found = getattr(quantizer, "reestimations", range(1))
    assert [*found] == expected and (capsys.readouterr().out.count("note: ") == (planned != found))
    assert not (steps > 1 and found[0] >= steps)


def test_warm_start_gives_the_entropy_codebook_one_kmeans_and_then_its_usual_losses():
    model, x = tiny_tokenizer(codebook="entropy", warm_start=3).train(), images(4)
    told, names = [], []
    for step in range(6):
        told.append(overwrites(model.quantizer, step))
        names.append("loss_entropy" in model(x)[2])
    assert told == [False, False, False, True, False, False]
    assert names == [False, False, False, True, True, True]
    assert (model.quantizer.reservoir_keys == -1).all()


def test_usage_of_a_constant_map_is_one_over_k_and_of_an_even_one_is_one():
    assert codebook_usage(torch.bincount(torch.full((50,), 3), minlength=16)) == (1 / 16, pytest.approx(1))
    assert codebook_usage(torch.full((16,), 5)) == (1, pytest.approx(16))
    assert codebook_usage(torch.tensor([5, 5, 0, 0])) == (0.5, pytest.approx(2))


# Windowed attention ---------------------------------------------------------------------------------------


def seen_pixels(function, row, column, seed=0):
    """(16, 16) bool: the input pixels with a gradient from the output at (row, column)."""
    x = normal(1, 2, 4, 16, 16, seed=seed, dtype=torch.float64).requires_grad_()
    weights = normal(2, 4, seed=seed + 1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((function(x)[0, :, :, row, column] * weights).sum(), x)
    return gradient[0].abs().sum((0, 1)) > 0


def attend(kind, block=4):
    return lambda x: windowed_attention(x, x.flip(2), x.roll(1, 2), block, kind)


@pytest.mark.parametrize("row, column", [(0, 0), (5, 10), (15, 3)])
def test_receptive_sets_are_the_block_the_grid_and_of_both_in_a_row_everything(row, column):
    rows, columns = torch.arange(16)[:, None], torch.arange(16)[None, :]
    own_block = (rows // 4 == row // 4) & (columns // 4 == column // 4)
    own_grid = (rows % 4 == row % 4) & (columns % 4 == column % 4)
    assert torch.equal(seen_pixels(attend("regional"), row, column), own_block)
    assert torch.equal(seen_pixels(attend("dilated"), row, column), own_grid)
    assert own_block.sum() == own_grid.sum() == 16
    assert seen_pixels(lambda x: attend("dilated")(attend("regional")(x)), row, column).sum() == 256


@pytest.mark.parametrize("kind", ["regional", "dilated"])
@pytest.mark.parametrize("height, width, block", [(16, 16, 4), (8, 8, 8), (8, 8, 1), (4, 12, 2), (6, 9, 3)])
def test_cutting_into_windows_and_joining_them_are_inverse(kind, height, width, block):
    x = normal(2, 3, 4, height, width)
    windows = to_windows(x, block, kind)
    positions = block**2 if kind == "regional" else height * width // block**2
    assert windows.shape == (2 * height * width // positions, 3, positions, 4)
    assert torch.equal(from_windows(windows, block, kind, height, width), x)
    assert torch.equal(to_windows(from_windows(windows, block, kind, height, width), block, kind), windows)


@pytest.mark.parametrize("kind, block", [("regional", 8), ("dilated", 1)])
def test_one_window_over_the_whole_map_is_full_attention(kind, block):
    q, k, v = (normal(2, 3, 4, 8, 8, seed=seed, dtype=torch.float64) for seed in range(3))
    scores = torch.einsum("bhdn,bhdm->bhnm", q.flatten(3), k.flatten(3)) / 4**0.5
    expected = torch.einsum("bhnm,bhdm->bhdn", scores.softmax(3), v.flatten(3)).view(2, 3, 4, 8, 8)
    torch.testing.assert_close(windowed_attention(q, k, v, block, kind), expected)


# Second phase ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [0, 2])
def test_new_units_leave_the_reconstruction_bit_equal_and_the_weights_load_again(there):
    model, x = tiny_tokenizer(num_attention=there).eval(), images(2)
    for parameter in model.decoder.stages[0].attention.parameters():
        torch.nn.init.normal_(parameter)  # units of phase 1 were trained; the new ones come behind them
    before, size = model(x)[0], count(model)
    model.add_attention()
    widths = model.config.widths
    assert count(model) - size == sum(8 * width**2 + 6 * width for width in widths)
    assert torch.equal(model(x)[0], before) and model.config.num_attention == there + 1
    again = VQTokenizer(model.config)
    again.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_phase_2_moves_the_decoder_and_leaves_encoder_codebook_and_tokens_bit_identical(codebook):
    model, x = tiny_tokenizer(codebook=codebook), images(4)
    model.add_attention()
    model.freeze_latent_space()
    frozen = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("decoder.")}
    tokens, before = model.encode(x), {k: v.clone() for k, v in model.decoder.state_dict().items()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"decoder.{name}" for name, _ in model.decoder.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step in range(3):
        model.train()
        assert model.start_step(step) == []
        x_hat, seen, losses = model(x)
        assert losses == {} and torch.equal(seen, tokens)
        optimizer.zero_grad()
        (x - x_hat).abs().mean().backward()
        optimizer.step()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())
    assert torch.equal(model.encode(x), tokens)
    assert not any(torch.equal(before[name], value) for name, value in model.decoder.state_dict().items())


def test_phase_2_takes_images_that_are_not_square():
    model, x = tiny_tokenizer().eval(), images(1, 32)[:, :, :16]
    model.add_attention()
    before = model(x)[0]
    torch.testing.assert_close(model.freeze_latent_space()(x)[0], before)


def test_after_freezing_encoder_and_codebook_stay_in_eval_mode_without_gradients():
    model = tiny_tokenizer().train()
    model.freeze_latent_space()
    assert model.train() is model
    assert model.decoder.training and not model.encoder.training and not model.quantizer.training
    model(images(2))[0].sum().backward()
    assert all(p.grad is None for part in (model.encoder, model.quantizer) for p in part.parameters())
    assert mean_probs(model, [images(2), images(2)]) is None
