"""Claims about prior_ar.py: sizes, causality, cache, and draws that depend on (logits, u) alone."""

import math

import pytest
import torch
import torch.nn.functional as F

from plumbing.compiling import compile_network
from plumbing.fast import KVCache
from prior_ar import ARPrior, Block, PriorConfig, Transformer, sample_logits, top_p_filter
from prior_nar import NARPrior

TINY = dict(codebook_size=32, num_tokens=12, num_classes=3, n_layer=2, n_head=2, n_embd=32, dropout=0.0)


def tiny_prior(kind=ARPrior, sharpen=1.0, **changes):
    """A prior in eval mode; `sharpen` scales the weights so that logits differ clearly."""
    torch.manual_seed(0)
    prior = kind(PriorConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(sharpen)
    return prior


def random_tokens(batch_size, num_tokens=12):
    return torch.randint(32, (batch_size, num_tokens), generator=torch.Generator().manual_seed(0))


def uniforms(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("sizes, expected, printed", [
    (dict(), 171_096_832, 171), (dict(num_classes=1000), 171_864_832, 172),
    (dict(num_classes=1000, n_embd=1024), 304_650_240, 305)])
def test_parameter_totals_are_exact_and_round_to_the_printed_ones(sizes, expected, printed):
    with torch.device("meta"):
        model = Transformer(PriorConfig(**sizes), causal=True)
    assert count(model) == expected and round(expected / 1e6) == printed


def test_a_block_is_a_pre_norm_transformer_layer_with_exact_gelu():
    torch.manual_seed(0)
    block = Block(PriorConfig(n_head=4, n_embd=32, dropout=0.0), causal=True)
    plain = torch.nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
    state = {name: torch.randn_like(value) * 0.3 for name, value in block.state_dict().items()}
    block.load_state_dict(state)
    matrices = [value for value in state.values() if value.ndim == 2]  # qkv, out, up, down
    vectors = [value for value in state.values() if value.ndim == 1]
    names = ("norm1.weight", "norm1.bias", "self_attn.in_proj_bias", "self_attn.out_proj.bias",
             "norm2.weight", "norm2.bias", "linear1.bias", "linear2.bias")
    copied = dict(zip(names, vectors, strict=True))
    names = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    plain.load_state_dict(copied | dict(zip(names, matrices, strict=True)))
    x, mask = torch.randn(2, 6, 32), torch.nn.Transformer.generate_square_subsequent_mask(6)
    torch.testing.assert_close(block(x), plain(x, mask, is_causal=True), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", ["embedding", "attention", "branches"])
def test_dropout_is_where_table_10_has_it(place):
    model = (prior := tiny_prior(sharpen=5.0, dropout=0.5)).train().transformer
    model.drop.p = 0.5 * (place == "embedding")
    for block in model.blocks:
        block.drop.p, block.attn.dropout = 0.5 * (place == "branches"), 0.5 * (place == "attention")
    assert not torch.equal(*(prior(random_tokens(2)) for _ in range(2)))
    assert torch.equal(*(prior.eval()(random_tokens(2)) for _ in range(2)))


def test_initial_weights_are_normal_002_with_zero_biases():
    prior = tiny_prior(n_embd=64)
    for name, parameter in prior.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 1000:
            assert 0.018 < parameter.std().item() < 0.022, name


@pytest.mark.parametrize("changed", [0, 4, 10, 11])
def test_a_token_changes_no_output_up_to_its_own_and_changes_a_later_one(changed):
    prior, tokens = tiny_prior(sharpen=5.0), random_tokens(2)
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % 32
    before, after = prior(tokens), prior(other)
    assert torch.equal(before[:, : changed + 1], after[:, : changed + 1])
    later = (before != after)[:, changed + 1 :].any()
    assert later == (changed < 11)  # the last token is a target only


def test_first_output_depends_on_the_condition_only():
    prior = tiny_prior(sharpen=5.0)
    labels = torch.tensor([0, 0, 1])
    first = prior(random_tokens(3), labels)[:, 0]
    torch.testing.assert_close(first[0], first[1])
    assert not torch.allclose(first[0], first[2])
    assert not torch.allclose(first[0], prior(random_tokens(1))[0, 0])  # the null condition has its own row


def test_loss_is_the_mean_negative_log_probability_of_all_n_positions():
    prior, tokens = tiny_prior(sharpen=5.0), random_tokens(3)
    logits = prior(tokens)
    log_probs = logits.double().log_softmax(dim=2)
    expected = -sum(log_probs[b, i, tokens[b, i]] for b in range(3) for i in range(12)) / 36
    loss, accuracy = prior.loss(logits, tokens)
    assert loss.ndim == accuracy.ndim == 0 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert accuracy.item() == pytest.approx((logits.argmax(2) == tokens).float().mean().item())
    rounded = logits.bfloat16()
    assert torch.equal(prior.loss(rounded, tokens)[0], prior.loss(rounded.float(), tokens)[0])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_cached_equals_uncached_greedy_decoding_twice_in_a_row(batch_size):
    prior = tiny_prior(sharpen=5.0)
    labels = torch.arange(batch_size) % 3
    noise = uniforms(batch_size, 12)
    uncached = torch.zeros(batch_size, 12, dtype=torch.int64)
    for i in range(12):  # a whole forward pass for each token
        uncached[:, i] = prior(uncached, labels)[:, i].argmax(1)
    assert uncached.unique().numel() > 2  # a constant sequence would prove nothing
    for _ in range(2):
        assert torch.equal(prior.generate(labels, noise, temperature=0), uncached)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_sees_every_cached_key_and_nothing_of_what_is_not_filled(dtype):
    torch.manual_seed(0)
    cache, (q, k, v) = KVCache(40), torch.randn(3, 2, 3, 40, 6).to(dtype)  # more than one block of positions
    for i in range(40):
        found = cache.attend(*(t[:, :, i : i + 1] for t in (q, k, v)))
        exact = (q[:, :, i : i + 1].float(), k[:, :, : i + 1].float(), v[:, :, : i + 1].float())
        torch.testing.assert_close(found, F.scaled_dot_product_attention(*exact).to(dtype))
    with pytest.raises(ValueError, match="KVCache"):  # more positions than it holds
        cache.attend(*(t[:, :, :1] for t in (q, k, v)))


@pytest.mark.slow
def test_compiled_blocks_of_a_prior_share_one_graph(monkeypatch):
    real, graphs = torch.compile, []

    def backend(graph, inputs):  # instead of inductor
        graphs.append(len(inputs))
        return graph

    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend=backend))
    torch.compiler.reset()
    prior, tokens = tiny_prior(n_layer=5).train(), random_tokens(2)
    expected = prior(tokens)
    compile_network(prior)
    torch.testing.assert_close(prior(tokens), expected)
    torch.compiler.reset()
    assert graphs == [1 + 12]  # x, and the parameters of one block


def noise_of(prior, batch_size):
    return uniforms(batch_size, *prior.noise_shape(prior.SAMPLER | dict(nar_steps=5)))


@pytest.mark.parametrize("kind", [ARPrior, NARPrior])
def test_an_image_is_the_same_alone_and_in_a_batch_of_four(kind):
    prior, labels = tiny_prior(kind, sharpen=5.0), torch.tensor([0, 1, 2, 0])
    noise, settings = noise_of(prior, 4), dict(top_p=0.92) if kind is ARPrior else {}
    together = prior.generate(labels, noise, **settings)
    for i in range(4):
        assert torch.equal(prior.generate(labels[i : i + 1], noise[i : i + 1], **settings)[0], together[i])


@pytest.mark.parametrize("kind", [ARPrior, NARPrior])
def test_generate_ignores_dropout_and_restores_the_mode(kind):
    prior = tiny_prior(kind, sharpen=5.0, dropout=0.5)
    expected = prior.generate(None, noise := noise_of(prior, 2))
    prior.train()
    assert torch.equal(prior.generate(None, noise), expected) and prior.training


@pytest.mark.parametrize("kind", [ARPrior, NARPrior])
def test_untrained_loss_is_near_ln_k(kind):
    prior, tokens = tiny_prior(kind, codebook_size=1024), 32 * random_tokens(8)
    inputs, mask = prior.inputs(tokens, uniforms(8, 13))
    assert abs(prior.loss(prior(inputs), tokens, mask)[0].item() - math.log(1024)) < 0.5


def test_noise_changes_the_sample_and_only_from_its_own_position_on():
    prior, noise = tiny_prior(), uniforms(1, 12)
    other = noise.clone()
    other[0, 6] = (other[0, 6] + 0.5) % 1
    a, b = prior.generate(None, noise), prior.generate(None, other)
    assert torch.equal(a[:, :6], b[:, :6]) and a[0, 6] != b[0, 6]


def test_head_is_tied_to_the_code_rows_plus_a_bias():
    prior = tiny_prior(n_layer=0)
    model = prior.transformer
    with torch.no_grad():
        model.head_bias.normal_()
        x = torch.randn(1, 5, 32)
        hidden = model.norm(x + model.position_table.weight[:5])
        expected = hidden @ model.token_table.weight[:32].T + model.head_bias
        torch.testing.assert_close(model.logits(model.hidden(x)), expected)


@pytest.mark.parametrize("p, kept", [(0.92, 3), (0.5, 1), (0.0, 1), (1e-6, 1), (0.51, 2), (0.96, 4), (1, 4)])
def test_top_p_keeps_the_code_that_crosses_p(p, kept):
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    filtered = top_p_filter(probs, p)
    assert (filtered > 0).sum().item() == kept
    torch.testing.assert_close(filtered[:, :kept], probs[:, :kept] / probs[:, :kept].sum())


def test_top_p_one_keeps_even_a_code_after_the_sum_rounds_to_one():
    probs = torch.tensor([[1.0, 1e-9, 1e-12]])
    assert torch.equal(top_p_filter(probs, 1.0), probs)


def test_draws_follow_the_inverse_cdf_over_descending_probabilities():
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    u = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 0.94, 0.96, 1 - 2**-24])
    assert sample_logits(logits.repeat(8, 1), u).tolist() == [1, 1, 3, 3, 0, 0, 2, 2]
    assert sample_logits(torch.zeros(2, 2), torch.tensor([0.5, 0.5 - 2**-24])).tolist() == [1, 0]


def test_temperature_divides_the_logits_and_zero_is_argmax():
    logits, u = torch.randn(64, 20, generator=torch.Generator().manual_seed(0)), uniforms(64)
    assert torch.equal(sample_logits(logits, u, temperature=0), logits.argmax(1))
    assert torch.equal(sample_logits(logits, u, temperature=1e-4), logits.argmax(1))
    assert torch.equal(sample_logits(logits, u, temperature=2.0), sample_logits(logits / 2, u))


def test_top_k_draws_only_the_k_likeliest():
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)).repeat(500, 1)
    drawn = sample_logits(logits, uniforms(500), temperature=5.0, top_k=3)
    assert set(drawn.tolist()) == set(logits[0].topk(3).indices.tolist())
    assert torch.equal(sample_logits(logits, uniforms(500), top_k=1), logits.argmax(1))
    assert torch.equal(sample_logits(logits, uniforms(500), top_k=99), sample_logits(logits, uniforms(500)))


def test_top_p_reaches_the_draw():
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().repeat(500, 1)
    assert set(sample_logits(logits, uniforms(500), top_p=0.92).tolist()) == {1, 2, 3}
    assert set(sample_logits(logits, uniforms(500), top_p=0.0).tolist()) == {1}


def test_a_code_of_probability_zero_is_never_drawn():
    logits = torch.full((3, 1024), -math.inf)
    logits[:, 7], logits[:, 1000] = 0.0, 1.0
    assert set(sample_logits(logits, torch.tensor([0.0, 0.9, 1 - 2**-24])).tolist()) <= {7, 1000}


@pytest.mark.parametrize("labels, noise", [
    ([0, 3], (2, 12)), ([-1, 0], (2, 12)), ([0], (2, 12)), ([0.0, 1.0], (2, 12)), (None, (2, 11))])
def test_generate_rejects_bad_labels_and_noise(labels, noise):
    for u in (torch.zeros(noise), torch.ones(2, 12)):  # 1 is never right
        with pytest.raises(ValueError):
            tiny_prior().generate(labels and torch.tensor(labels), u)


def test_generate_rejects_settings_that_it_does_not_read():
    with pytest.raises(TypeError, match="no setting 'nar_steps', it has temperature, top_k, top_p"):
        tiny_prior().generate(None, torch.zeros(2, 12), nar_steps=0)


def test_forward_rejects_wrong_shapes_and_labels_without_classes():
    for tokens in (random_tokens(2)[:, :5], random_tokens(2).float()):
        with pytest.raises(ValueError, match="tokens"):
            tiny_prior()(tokens)
    with pytest.raises(ValueError, match="unconditional"):
        tiny_prior(num_classes=0)(random_tokens(2), torch.tensor([0, 0]))


def test_a_tiny_prior_overfits_four_sequences_and_repeats_them():
    prior, tokens = tiny_prior().train(), random_tokens(4)
    tokens[:, 0] = torch.arange(4)  # the first tokens tell the sequences apart
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    for _ in range(150):
        loss, _ = prior.loss(prior(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Nothing tells which of the four comes first: ln 4 for one of the 12 positions remains.
    assert loss.item() == pytest.approx(math.log(4) / 12, abs=0.05)
    sampled = prior.generate(None, torch.tensor([0.1, 0.35, 0.6, 0.9])[:, None].expand(4, 12), top_p=0.9)
    assert all((row == tokens).all(dim=1).any() for row in sampled)
