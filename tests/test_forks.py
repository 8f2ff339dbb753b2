"""Claims about forks: one file of at most 15 lines goes through every command, and nothing else is touched.

`forks/mine.py` is the example of docs/forking.md, written to a folder on PYTHONPATH; the commands are tiny
processes on one thread.
"""

import contextlib
import re
import shutil
import sys
import types

import pytest
import torch
from helpers import few, ROOT, TINY, command, contents, open_run, rows, script
from torch import nn

import forks
import recipes.options
import studies.cost
import train
from forks.lfq import LFQTokenizer
from forks.noattention import PlainDecoderTokenizer
from plumbing.errors import UserError
from plumbing.files import read_checkpoint
from plumbing.hashes import latent_hash
from plumbing.models import load_model
from plumbing.preflight import build_on_meta
from plumbing.processes import one_line_errors
from recipes.small import variant
from tokenizer import TokenizerConfig, VQTokenizer

BLOCK = re.compile(r"^```python\n(# forks/mine\.py.*?)^```", re.M | re.S)
EXAMPLE, SHORT = (BLOCK.search((ROOT / page).read_text())[1] for page in ("docs/forking.md", "README.md"))
SETS = {key: value for key, value in TINY.items() if "codebook" not in key and "warm_start" not in key}


TINY_SIZES = dict(base_width=8, channel_mult=[1, 2], codebook_dim=4, codebook_size=8, image_size=16)


def train_words(stage, out, data, preset, *more):
    words = command(stage, out, data, "--preset", preset, *more)
    kept = [i for i, word in enumerate(words) if word == "--set" and words[i + 1].split("=")[0] not in SETS]
    return [word for i, word in enumerate(words) if i not in kept and i - 1 not in kept]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of somebody's own forks, that of the documentation among them."""
    root = tmp_path_factory.mktemp("ideas")
    (root / "forks").mkdir()
    (root / "forks" / "mine.py").write_text(EXAMPLE)
    return root


@pytest.fixture(scope="module")
def mine(folder, data, tmp_path_factory):
    """A run folder of mine.demo as `--stage all` leaves it."""
    out = tmp_path_factory.mktemp("mine")
    code, _, error = script("train.py", *train_words("all", out, data, "mine.demo"), path=folder)
    assert code == 0, error
    return out


# A fork of one's own --------------------------------------------------------------------------------------


def test_the_example_of_the_documentation_is_a_whole_fork_in_at_most_15_lines():
    assert len(EXAMPLE.splitlines()) <= 15 and "LookupFreeQuantizer" in EXAMPLE
    assert not (ROOT / "forks" / "mine.py").exists()


def test_the_readme_s_example_is_the_same_fork():
    full, short = {}, {}
    exec(EXAMPLE, full)
    exec(SHORT, short)
    assert len(SHORT.splitlines()) <= 15 and full["PRESETS"] == short["PRESETS"]
    classes = [names["parts"]()["tokenizer"] for names in (full, short)]
    assert classes[0].Quantizer is classes[1].Quantizer
    assert classes[0].__bases__ == classes[1].__bases__


@pytest.mark.slow
def test_a_fork_goes_through_all_stages_with_its_own_quantizer(mine):
    for stage in ("phase1", "phase2", "ar", "nar"):
        ckpt = read_checkpoint(mine / f"{stage}.pt", [stage])
        assert ckpt["config"]["fork"] == "mine" and ckpt["step"] == 6
    names = read_checkpoint(mine / "phase1.pt", ["phase1"])["model"]
    assert "quantizer.powers" in names and not any("codebook" in name for name in names)
    assert {"loss_entropy", "loss_commit"} <= rows(mine, "phase1")[0].keys()
    assert (mine / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("words, made", [
    ("sample.py --ckpt RUN/ar.pt --num 4 --out OUT/a.png", "a.png"),
    ("sample.py --ckpt RUN/nar.pt --num 4 --format npz --out OUT/n.npz", "n.npz"),
    ("sample.py --ckpt RUN/phase2.pt --reconstruct --num 4 --out OUT/r.png", "r.png"),
    ("visualize.py view --ckpt RUN/ar.pt --num 4 --out OUT/v.png", "v.json"),
    ("-m studies compare RUN/phase1.pt --steps 2 --samples 20 --out OUT/c.json", "c.json"),
    ("-m studies report RUN --num 4 --out OUT/r.html", "r.html"),
])
def test_every_command_opens_its_checkpoints_without_being_told(mine, folder, tmp_path, words, made):
    words = [word.replace("RUN", str(mine)).replace("OUT", str(tmp_path)) for word in words.split()]
    code, _, error = script(*words, path=folder)
    assert code == 0, error
    assert any(path.name.startswith(made) for path in tmp_path.iterdir())


# Bad input ------------------------------------------------------------------------------------------------

BROKEN = {
    "raises": "import torch\n1 / 0\n", "syntax": "def parts(:\n", "empty": "PRESETS = {}\n",
    "wrong": "from recipes.small import DEMO, variant\nPRESETS = dict(demo=variant(DEMO, fork='wrong'))\n"
             "def parts():\n    return dict(tokenizer=1)\n",
}


@pytest.mark.parametrize("preset, told", few([
    ("raises.demo", "fork raises cannot be imported: raises.py:2: ZeroDivisionError"),
    ("syntax.demo", "fork syntax cannot be imported: syntax.py:1: SyntaxError"),
    ("empty.demo", "has no function parts()"), ("nobody.demo", "there is no fork 'nobody'"),
    ("mine.other", "no preset mine.other"), ("nothing", "no preset nothing"),
    ("../mine.demo", "no plain word"), ("os.path.demo", "no plain word"), ("a b.demo", "no plain word"),
], 0, 3, 6))
def test_a_fork_that_is_missing_or_broken_is_one_line(folder, tmp_path, preset, told):
    root = tmp_path / "more"
    shutil.copytree(folder, root)
    for name, text in BROKEN.items():
        (root / "forks" / f"{name}.py").write_text(text)
    code, out, error = script("train.py", "--stage", "phase1", "--preset", preset, "--out", tmp_path / "x",
                              path=root)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and told in error, error
    assert not (tmp_path / "x").exists()


CRASH = """import torch
from recipes.small import DEMO, variant
from tokenizer import TokenizerConfig, VQTokenizer
class Crash(VQTokenizer):
    def __init__(self, config):
        super().__init__(config)
        if config.codebook_dim == 11: torch.zeros(2) + torch.zeros(3)
        if config.codebook_dim == 12: config.nothing
        if config.codebook_dim == 13: torch.nn.GroupNorm(3, 4)
        if config.codebook_dim == 14: TokenizerConfig(channel_mult=[])
    def forward(self, x, *rest):
        return super().forward(x[0], *rest)
    @staticmethod
    def check(config):
        if config["tokenizer"]["codebook_dim"] == 15: raise ValueError("15 is odd")
        if config["tokenizer"]["codebook_dim"] == 16: a, b = ()
def parts():
    return dict(tokenizer=Crash)
PRESETS = dict(demo=variant(DEMO, fork="crash"))
"""


@pytest.fixture
def crash(tmp_path, monkeypatch):
    """The configuration of a fork whose parts raise exceptions, for a number of channels each."""
    (tmp_path / "forks").mkdir()
    (tmp_path / "forks" / "crash.py").write_text(CRASH)
    monkeypatch.setattr(forks, "__path__", [*forks.__path__, str(tmp_path / "forks")])
    yield lambda n: variant(recipes.options.find_preset("crash.demo"), tokenizer=dict(codebook_dim=n))
    del sys.modules["forks.crash"]


@pytest.mark.parametrize("channels, told", [
    (11, "crash.py:7: RuntimeError: "), (12, "crash.py:8: AttributeError: "),
    (13, "crash.py:9: ValueError: num_channels"),
    (14, "crash.py:10: ValueError: base_width 128, channel_mult"), (15, "crash.py:15: ValueError: 15 is odd"),
    (16, "crash.py:16: ValueError: not enough values")])
def test_an_exception_that_passed_through_a_fork_keeps_file_and_line(crash, channels, told):
    with pytest.raises(UserError, match=f"^{told}"):
        build_on_meta(crash(channels), ["phase1"])


def test_an_exception_in_a_fork_s_forward_is_one_line_and_a_whole_traceback_on_demand(
        crash, capsys, monkeypatch):
    tokenizer = forks.load("crash").parts()["tokenizer"](TokenizerConfig(**TINY_SIZES))
    for traceback in ("", "1"):
        monkeypatch.setenv("SEQGAN_TRACEBACK", traceback)
        with pytest.raises(SystemExit) as stop, one_line_errors():
            tokenizer(torch.zeros(1, 3, 16, 16))
        *before, last = capsys.readouterr().err.splitlines()
        assert stop.value.code == 1 and last.startswith("error: crash.py:12: ValueError: images must be")
        assert ("Traceback (most recent call last):" in before) == bool(before) == bool(traceback)


@pytest.mark.parametrize("name", ["../x", "os.path", "a b", "", None, "__init__ "])
def test_a_name_that_is_no_plain_word_is_refused_before_anything_is_imported(name):
    before = set(sys.modules)
    with pytest.raises(ValueError, match="no plain word"):
        forks.load(name)
    assert set(sys.modules) == before


@pytest.mark.slow
def test_a_checkpoint_can_name_a_fork_only_and_one_that_is_there(mine, tmp_path):
    ckpt, before = torch.load(mine / "ar.pt", weights_only=True), contents(mine)
    for name, told in (("mine", "error: there is no fork 'mine' in "), ("os.path", "no plain word"),
                       ("../outside", "no plain word"), (["os"], "no plain word")):
        torch.save(dict(ckpt, config=dict(ckpt["config"], fork=name)), tmp_path / "ar.pt")
        code, _, error = script("sample.py", "--ckpt", tmp_path / "ar.pt", "--out", tmp_path / "x.png")
        assert code == 2 and told in error and error.count("\n") == 1
    assert contents(mine) == before


def test_set_cannot_change_the_fork(tmp_path):
    code, _, error = script("train.py", "--stage", "phase1", "--set", "fork=lfq", "--out", tmp_path / "x")
    assert code == 2 and "--set fork=lfq" in error and error.count("\n") == 1


@pytest.mark.parametrize("returned, frozen, bypass, told", [
    (["loss_codebook"], False, False, "WEIGHTS name loss_mine, but its forward does not return it"),
    (["loss_codebook", "loss_mine", "loss_commit", "loss_entropy"], False, False, ""),
    (["loss_mine", "loss_mime"], False, False, "forward returns loss_mime, but its WEIGHTS do not name it"),
    (["loss_mine"], False, False, ""), ([], True, False, ""), (["loss_codebook"], False, True, "")])
def test_losses_and_weights_that_do_not_name_the_same_are_an_error(returned, frozen, bypass, told):
    """A misspelt loss was never trained. Phase 2 has none, and a K-means start not all of them."""
    mine = types.SimpleNamespace(WEIGHTS={"loss_mine": 2.0}, frozen=frozen,
                                 quantizer=types.SimpleNamespace(bypass=bypass))
    losses = dict.fromkeys(returned, 1.0)
    with pytest.raises(UserError, match=told) if told else contextlib.nullcontext():
        assert train.fork_loss(losses, mine, {}) == 2.0 * ("loss_mine" in returned)


def test_a_fork_cannot_weight_a_loss_that_eq_2_weights_already():
    """It would count twice. A weight may be the name of a value of the phase."""
    mine = types.SimpleNamespace(WEIGHTS={"loss_commit": 0.5}, frozen=False, quantizer=None)
    with pytest.raises(UserError, match="WEIGHTS name loss_commit, which Eq. 2 weights already"):
        train.fork_loss({"loss_commit": 1.0}, mine, {})
    mine.WEIGHTS = {"loss_mine": "eta"}
    assert train.fork_loss({"loss_commit": 1.0, "loss_mine": 3.0}, mine, dict(eta=0.5)) == 1.5


# The forks that exist -------------------------------------------------------------------------------------


def test_lookup_free_codes_are_their_own_indices_and_their_gradient_is_that_of_the_latent():
    tokenizer = LFQTokenizer(TokenizerConfig(**TINY_SIZES | dict(codebook_size=64, codebook_dim=6)))
    quantizer, indices = tokenizer.quantizer, torch.arange(64).view(1, 8, 8)
    assert torch.equal(quantizer.quantize(quantizer.lookup(indices)), indices)
    z, x = torch.randn(2, 6, 3, 3, requires_grad=True), torch.rand(4, 3, 16, 16) * 2 - 1
    z_st, indices, _ = quantizer(z)
    torch.testing.assert_close(z_st, quantizer.lookup(indices))
    upstream = torch.randn_like(z_st)
    z_st.backward(upstream)
    assert torch.equal(z.grad, upstream)
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(x)), tokenizer(x)[0])
    with pytest.raises(ValueError, match="LFQ has 2"):
        LFQTokenizer(TokenizerConfig(codebook_dim=6, codebook_size=63))


def test_phase_2_without_attention_has_the_decoder_of_phase_1():
    counts = {}
    for kind in (VQTokenizer, PlainDecoderTokenizer):
        tokenizer = kind(TokenizerConfig(**TINY_SIZES))
        before = sum(p.numel() for p in tokenizer.parameters())
        tokenizer.add_attention()
        counts[kind] = sum(p.numel() for p in tokenizer.parameters()) - before
    assert counts[VQTokenizer] > 0 == counts[PlainDecoderTokenizer]
    tokenizer.freeze_latent_space()
    trained = {name.split(".")[0] for name, p in tokenizer.named_parameters() if p.requires_grad}
    assert trained == {"decoder"} and tokenizer.config.num_attention == 0


@pytest.mark.slow
def test_guided_priors_run_on_the_same_interface(data, tmp_path):
    out = tmp_path / "out"
    code, _, error = script("train.py", *train_words("all", out, data, "guidance.demo"))
    assert code == 0, error
    for words in ("sample.py --ckpt OUT/ar.pt --num 2", "sample.py --ckpt OUT/nar.pt --num 2",
                  "visualize.py view --ckpt OUT/ar.pt --num 2"):
        code, _, error = script(*[word.replace("OUT", str(out)) for word in words.split()])
        assert code == 0, error


@pytest.mark.slow
def test_explain_prints_the_counts_of_the_article_with_and_without_the_students(monkeypatch):
    monkeypatch.setattr(studies.cost, "cost", lambda *args: (1, 1))  # FLOPs take ten seconds
    code, out, error = script("train.py", "--explain", "--preset", "fqgan-dual")
    assert code == 0, error
    assert all(count in out for count in ("150,410,131", "111,294,355", "417,104,896")), out


def test_phase_2_of_a_fork_takes_a_phase_1_that_is_not_of_this_fork(trained, data, tmp_path):
    """The fork was left out without a word: noattention got its attention."""
    sizes, hashes = {}, set()
    for preset in ("demo", "noattention.demo"):
        words = ("--preset", preset, "--tokenizer", trained / "phase1.pt")
        tokenizer, _ = train.build_tokenizer(open_run("phase2", tmp_path / preset, data, *words), "phase2")
        sizes[preset] = sum(p.numel() for p in tokenizer.decoder.parameters())
        hashes.add(latent_hash(tokenizer))
    first, _ = load_model(trained / "phase1.pt", ("phase1",))
    hashes.add(latent_hash(first))
    plain = sum(p.numel() for p in first.decoder.parameters())
    assert sizes["noattention.demo"] == plain < sizes["demo"] and len(hashes) == 1


def test_presets_of_forks_are_found_by_their_names_and_carry_their_fork():
    assert recipes.options.find_preset("demo-fq") == recipes.options.find_preset("fqgan.demo-fq")
    assert recipes.options.find_preset("demo-fq")["fork"] == "fqgan"
    assert recipes.options.find_preset("demo")["fork"] is None  # that of recipes/, not lfq.demo
    assert set(forks.names()) >= {"fqgan", "guidance", "lfq", "noattention"}


@pytest.mark.slow
def test_every_preset_of_a_fork_builds_its_networks():
    for fork in sorted({path.stem for path in (ROOT / "forks").iterdir()} - {"__init__", "__pycache__"}):
        for name in forks.load(fork).PRESETS:
            config = recipes.options.find_preset(f"{fork}.{name}")
            networks = build_on_meta(config, recipes.options.STAGES)
            assert {"phase1", "phase2", "ar", "nar"} <= networks.keys()
            assert all(isinstance(network, nn.Module) for network in networks.values())
