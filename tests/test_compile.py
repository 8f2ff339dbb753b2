"""Claims about --compile, with the real compiler: `pytest -m compile`, minutes, needs a C++ compiler."""

import pytest
import torch
from benchmarks.gpu import compiled_dropout
from helpers import STEPS, call, earlier, rows
from test_reliability import check_equal, killed_at

pytestmark = pytest.mark.compile
STAGES = ["phase1", "phase2", "ar", "nar"]


@pytest.fixture(autouse=True)
def compiled_anew():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def compiled(trained, data, tmp_path_factory):
    """stage -> its run folders, without --compile and with."""

    def run(stage):
        if stage not in found:
            for name, more in (("plain", []), ("compiled", ["--compile"])):
                out = earlier(trained, tmp_path_factory.mktemp("compile") / name, stage)
                call(stage, out, data, *more, prior__dropout=0.0)
                found[stage] = (*found.get(stage, ()), out)
        return found[stage]

    found = {}
    return run


@pytest.mark.parametrize("stage", STAGES)
def test_a_compiled_stage_with_r1_has_the_losses_of_the_plain_one(compiled, stage):
    # Equal before the first update and near after it; then rounding grows, in phase 1 by codes that change.
    plain, fast = ([row for row in rows(out, stage) if "lr" in row] for out in compiled(stage))
    names = {name for row in plain for name in row if name.startswith("loss")}
    assert len(plain) == len(fast) == STEPS and names
    for step, (a, b) in enumerate(zip(plain, fast, strict=True)):
        later = step > 1 and stage.startswith("phase")
        near = 1e-4 if step == 0 else 0.05 if later else 0.03
        for name in ["loss_rec"] if later else names & a.keys():
            assert b[name] == pytest.approx(a[name], rel=near, abs=near / 10), (step, name)


@pytest.mark.parametrize("stage", STAGES)
def test_a_compiled_stage_that_was_killed_ends_as_an_unbroken_one(compiled, trained, data, tmp_path, stage):
    out = earlier(trained, tmp_path / "broken", stage)
    killed_at(5, stage, out, data, "--compile", prior__dropout=0.0)
    call(stage, out, data, "--compile", prior__dropout=0.0)
    check_equal(compiled(stage)[1], out, stage)


def test_a_compiled_block_drops_its_share_of_the_attention_and_scales_the_rest():
    found = compiled_dropout(torch.device("cpu"))
    assert found == pytest.approx(dict(zeros=0.1, scale=1 / 0.9), rel=1e-2)
