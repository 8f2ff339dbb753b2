"""Claims about the forks that quantize in other ways: each has the property that its article is about."""

import dataclasses
import itertools
import math

import pytest
import torch
from helpers import few
from torch.utils._python_dispatch import TorchDispatchMode

import forks
import train
from forks.fsq import FSQTokenizer
from forks.ibq import IBQTokenizer
from forks.lfq import LFQTokenizer
from forks.rotation import RotationTokenizer, rotate
from forks.simvq import SimVQTokenizer
from plumbing.codes import nearest_others
from plumbing.kmeans import SCHEDULE, kmeans
from plumbing.models import refuse_unread
from plumbing.processes import full_float32
from tokenizer import TokenizerConfig, VectorQuantizer, VQTokenizer

SIZES = dict(codebook_size=24, codebook_dim=8, codebook="plain")


def quantizer(kind, **sizes):
    torch.manual_seed(0)
    return kind.Quantizer(kind.Config(**SIZES | sizes))


def latents(n_z=8, scale=1.0):
    z = scale * torch.randn(3, n_z, 4, 4, generator=torch.Generator().manual_seed(1))
    return z.requires_grad_()


@pytest.mark.parametrize("kind, sizes", [
    (FSQTokenizer, dict(levels=[4, 6], codebook_dim=2)), (SimVQTokenizer, {}), (RotationTokenizer, {}),
    (IBQTokenizer, {})])
def test_training_and_encoding_give_the_same_tokens_and_decoding_the_same_codes(kind, sizes):
    q = quantizer(kind, **sizes)
    z = latents(sizes.get("codebook_dim", 8))
    z_st, indices, losses = q(z)
    assert torch.equal(indices, q.quantize(z)) and indices.min() >= 0 and indices.max() < 24
    torch.testing.assert_close(z_st, q.lookup(indices), rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):  # codes stay float32
        torch.testing.assert_close(z_st, q.lookup(indices), rtol=0, atol=1e-6)
    assert set(losses) <= {*train.LATENT, *kind.WEIGHTS} and all(loss.dim() == 0 for loss in losses.values())
    (z_st.square().sum() + sum(losses.values())).backward()
    assert z.grad.isfinite().all() and (z.grad != 0).any()


def test_the_codes_of_fsq_are_the_whole_grid_and_the_bounds_are_reached_evenly():
    q = quantizer(FSQTokenizer, levels=[4, 6], codebook_dim=2)
    codes = q.lookup(torch.arange(24).view(1, 4, 6)).flatten(2)[0].T
    grid = itertools.product([-1, -0.5, 0, 0.5], [-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3])
    torch.testing.assert_close(torch.tensor(sorted(codes.tolist())), torch.tensor(sorted(grid)))
    far = torch.tensor([-50.0, 50.0]).view(2, 1, 1, 1).expand(2, 2, 1, 1)  # far out the outermost levels
    outermost = torch.tensor([[-1, -1], [0.5, 2 / 3]])
    torch.testing.assert_close(q.lookup(q.quantize(far)).flatten(1), outermost)
    z = torch.randn(1, 2, 200, 200)
    assert q.quantize(z).unique().tolist() == list(range(24))  # nothing has to be learned to use them all


def test_the_gradient_passes_the_rounding_of_fsq_as_that_of_the_bound():
    q, z, g = quantizer(FSQTokenizer, levels=[4, 6], codebook_dim=2), latents(2), torch.randn(3, 2, 4, 4)
    q(z)[0].backward(g)
    found, z.grad = z.grad, None
    (q.bound(z) / (q.levels // 2)).backward(g)
    torch.testing.assert_close(found, z.grad)


def test_the_most_levels_of_fsq_reach_both_ends_and_levels_that_do_not_fit_are_refused():
    """An index outside [0, K), from a bound that rounds to a level too many."""
    q = quantizer(FSQTokenizer, levels=[1000, 999], codebook_dim=2, codebook_size=999_000)
    far = torch.tensor([-50.0, 50.0]).view(2, 1, 1, 1).expand(2, 2, 1, 1)
    assert q.quantize(far).flatten().tolist() == [0, 998_999]
    for levels in ([1001], [4, 6], [2, 32], [4, 4, 4]):  # of two levels, the upper one is hardly ever reached
        with pytest.raises(ValueError, match="codebook_dim levels, 3 to 1000"):
            FSQTokenizer.Config(codebook_size=64, codebook_dim=2, levels=levels)


def test_the_table_of_simvq_stays_and_one_step_moves_every_code():
    q = quantizer(SimVQTokenizer)
    table, codes = q.codebook.weight.clone(), q.codes.detach().clone()
    z_st, indices, losses = q(latents())
    assert len(indices.unique()) < 24  # not all are in use
    trained = [p for p in q.parameters() if p.requires_grad]
    assert [p.shape for p in trained] == [(8, 8)]
    (losses["loss_codebook"]).backward()
    torch.optim.SGD(trained, lr=0.1).step()
    assert torch.equal(q.codebook.weight, table) and ((q.codes - codes).norm(dim=1) > 1e-4).all()


def test_the_rotation_takes_the_latent_to_its_code_and_its_gradient_keeps_the_angle():
    g = torch.Generator().manual_seed(0)
    z, q, upstream = (torch.randn(50, 8, generator=g) for _ in range(3))
    z.requires_grad_()
    out = rotate(z, q)
    torch.testing.assert_close(out, q)
    out.backward(upstream)
    cos = torch.cosine_similarity
    torch.testing.assert_close(cos(z.grad, z.detach()), cos(upstream, q), rtol=0, atol=1e-5)
    longer = q.norm(dim=1) / z.detach().norm(dim=1)
    torch.testing.assert_close(z.grad.norm(dim=1), longer * upstream.norm(dim=1))
    z.grad = None
    rotate(z, 3 * z.detach()).backward(upstream)  # in the same direction nothing turns
    torch.testing.assert_close(z.grad, 3 * upstream)
    q, z, upstream = quantizer(RotationTokenizer), latents(), torch.randn(3, 8, 4, 4)
    q(z)[0].backward(upstream)
    code = q.lookup(q.quantize(z))
    torch.testing.assert_close(cos(z.grad, z.detach()), cos(upstream, code), rtol=0, atol=1e-5)


def test_the_gradient_of_ibq_reaches_the_encoder_from_the_first_step():
    """A softmax over codes that start near 0 is flat: the encoder would get 1e-5 of the gradient."""
    q, g = quantizer(IBQTokenizer, codebook_size=256, codebook_dim=64), torch.Generator().manual_seed(1)
    z = torch.randn(8, 64, 8, 8, generator=g).requires_grad_()
    z_st = q(z)[0]
    upstream = torch.randn(z_st.shape, generator=g)
    z_st.backward(upstream)
    assert 0.5 < (z.grad.norm() / upstream.norm()).item() < 10


def test_the_gradient_of_ibq_reaches_every_code_and_that_of_nearest_codes_does_not():
    q = quantizer(IBQTokenizer)
    z_st, indices, losses = q(latents())
    assert len(indices.unique()) < 24
    z_st.backward(torch.randn_like(z_st))
    assert (q.codebook.weight.grad.abs().sum(1) > 0).all()
    other = quantizer(SimVQTokenizer.__mro__[1])  # VQTokenizer
    z_st, indices, losses = other(latents(scale=0.02))
    losses["loss_codebook"].backward()
    assert len(indices.unique()) < 24
    reached = other.codebook.weight.grad.abs().sum(1) > 0
    assert reached.nonzero().flatten().tolist() == indices.unique().tolist()


def test_the_entropy_falls_for_sure_vectors_and_for_even_use_of_whole_codes():
    def loss(z):
        return lfq(z)[2]["loss_entropy"].item()

    lfq = LFQTokenizer.Quantizer(LFQTokenizer.Config(codebook_size=64, codebook_dim=6))
    z = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 6, 1, 1)  # every bit even, but 2 codes of 64
    assert loss(z) == pytest.approx(math.log(64 / 2), abs=1e-3)
    assert loss(z[:1]) == pytest.approx(math.log(64), abs=1e-3)
    assert loss(0 * z) == pytest.approx(math.log(64), abs=1e-3)  # even, but sure of nothing
    assert loss(lfq.lookup(torch.arange(64).view(1, 8, 8))) == pytest.approx(0, abs=1e-3)


def test_more_codes_than_k_means_can_take_are_refused_only_where_it_is_used():
    sizes = dict(codebook="entropy", codebook_size=20_000, codebook_dim=2)
    assert quantizer(RotationTokenizer, warm_start=0, **sizes).codes.shape == (20_000, 2)
    with pytest.raises(ValueError, match="set warm_start=0 or fewer codes"):
        quantizer(RotationTokenizer, warm_start=1, **sizes)


@pytest.mark.parametrize("kind, K, n_z", [(LFQTokenizer, 16, 4), (IBQTokenizer, 24, 8)])
def test_the_entropy_of_micro_batches_is_that_of_the_whole_batch(kind, K, n_z):
    q = quantizer(kind, codebook="entropy", codebook_size=K, codebook_dim=n_z)
    parts = [0.01 * i * q.lookup(q.quantize(latents(n_z))).detach() for i in (1, 2)]
    whole = torch.cat(parts).requires_grad_()
    q(whole)[2]["loss_entropy"].backward()
    probs = sum(q.probs(part) for part in parts) / 2
    for i, part in enumerate(parts):
        part, q.global_probs = part.clone().requires_grad_(), probs
        (q(part)[2]["loss_entropy"] / 2).backward()
        torch.testing.assert_close(part.grad, whole.grad[3 * i : 3 * i + 3], rtol=1e-3, atol=1e-7)
    assert whole.grad.abs().max() > 1e-4


# Every tokenizer: its settings, its products --------------------------------------------------------------

TOKENIZERS = {"none": VQTokenizer} | {
    name: found for name in forks.names() if (found := forks.load(name).parts().get("tokenizer"))}
SMALL = dict(image_size=32, base_width=32, channel_mult=[1, 2], num_res_blocks=1, codebook_size=64,
             codebook_dim=8)
OWN = dict(fsq=dict(codebook_dim=3, levels=[4, 4, 4]), lfq=dict(codebook_dim=6))
CHANGES = dict(
    image_size=64, base_width=64, channel_mult=[1, 1], num_res_blocks=2, num_mid_blocks=1, num_attention=1,
    decoder_extra_blocks=1, codebook="plain", codebook_size=32, codebook_dim=16, distance="l2",
    entropy_set="image", kmeans_warmup=3, kmeans_every=5, kmeans_last=50_000, warm_start=7, bias=True,
    latent_kernel=3)
QUANTIZERS = [*VectorQuantizer.READS, *SCHEDULE]


def alone(name, **sizes):
    """The quantizer of a tokenizer, built with it but without its networks, and latents for it."""
    light = dict.fromkeys(("Encoder", "Decoder"), staticmethod(lambda config: torch.nn.Identity()))
    Tokenizer = type("Light", (TOKENIZERS[name],), light)
    config = Tokenizer.Config(**SMALL | OWN.get(name, {}) | sizes)
    refuse_unread(Tokenizer, config)
    torch.manual_seed(0)
    q = Tokenizer(config).quantizer
    for table in (module.codebook.weight for module in q.modules() if hasattr(module, "codebook")):
        table.data.normal_()
    return q, latents(config.codebook_dim * len(getattr(q, "parts", [q])))


def made(name, key, value, codebook):
    """What a setting makes of a quantizer, None if it is refused: its schedule, codes and losses."""
    try:
        q, z = alone(name, **{"codebook": codebook, key: value})
    except ValueError:
        return None
    z_st, _, losses = q(z)
    found = {key: value.item() for key, value in losses.items() if key.startswith("loss")}
    return getattr(q, "reestimations", None), z_st.sum().item(), found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_setting_of_a_quantizer_changes_it_or_is_refused(name):
    """A setting that a fork accepts and does not read, as `warm_start` was."""
    for codebook in ("entropy", "plain", "fn", "kmeans"):
        plain = made(name, "codebook", codebook, codebook)
        assert plain or codebook != "entropy"
        for key in QUANTIZERS if plain else ():
            found = CHANGES[key] != codebook and made(name, key, CHANGES[key], codebook)
            assert not found or found != plain, (codebook, key)


@pytest.mark.parametrize("name", few(["none", "vqgan", "maskgit", "frozen", "fqgan"], 0, 1))
def test_every_setting_of_the_networks_changes_them_or_is_refused(name):
    assert CHANGES.keys() == {field.name for field in dataclasses.fields(TokenizerConfig)}
    shapes = []
    for key in [None, *(key for key in CHANGES if key not in QUANTIZERS)]:
        try:
            config = TOKENIZERS[name].Config(**SMALL | ({key: CHANGES[key]} if key else {}))
            refuse_unread(TOKENIZERS[name], config)
        except ValueError:
            assert key
            continue
        with torch.device("meta"):
            model = TOKENIZERS[name](config)
        shapes.append([key, model.token_shape, {name: t.shape for name, t in model.state_dict().items()}])
        assert shapes[-1][1:] != shapes[0][1:] or not key, key


def test_what_the_quantizer_of_seq_gan_reads_is_not_refused_and_a_refusal_says_what_to_do():
    for settings in (dict(warm_start=7), dict(distance="l2", entropy_set="image"), dict(codebook="plain"),
                     dict(codebook="kmeans", kmeans_warmup=3), dict(bias=True)):
        refuse_unread(VQTokenizer, TokenizerConfig(**settings))
        refuse_unread(RotationTokenizer, TokenizerConfig(**settings))
    with pytest.raises(ValueError, match="LookupFreeQuantizer does not read tokenizer.warm_start, here 7; "
                       "pass --set tokenizer.warm_start=0"):
        alone("lfq", warm_start=7)


class Products(TorchDispatchMode):
    """Records of each product of matrices whether TF32 was allowed, and its type."""

    NAMES = ("addmm", "mm", "bmm", "baddbmm", "linear", "_cdist_forward", "_euclidean_dist")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.NAMES:
            self.seen.append((torch.backends.cuda.matmul.allow_tf32, args[1].dtype))
        return function(*args, **kwargs or {})


@pytest.fixture
def tf32():
    """As `setup_device` leaves a GPU."""
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    given_back, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    assert given_back


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_product_that_chooses_codes_is_rounded_to_tf32(name, tf32):
    """On a GPU that changes a code in a thousand. Here, without one, the flag is looked at."""
    q, z = alone(name)
    if name == "crt":  # a network of its own, which may be rounded
        q.predictor.forward = lambda z: z[:, 1:]
    with Products() as products, torch.autocast("cpu", torch.bfloat16):
        q(z)
        q.lookup(q.quantize(z))
        if hasattr(q, "probs"):
            q.probs(z)
    assert set(products.seen) == ({(False, torch.float32)} if name != "fsq" else set())


def test_no_product_of_k_means_and_of_the_nearest_codes_is_rounded_to_tf32(tf32):
    with Products() as products:
        centres = kmeans(torch.randn(100, 8), 30, seed=0)
        nearest_others(centres, 4)
        with pytest.raises(ValueError), full_float32(centres):
            raise ValueError
    assert len(products.seen) >= 11 and {allowed for allowed, _ in products.seen} == {False}
