"""train.py --compile: networks under torch.compile."""

import torch

from plumbing.errors import UserError


def check_compiler(device):
    """Compiles a tiny function, as --compile will compile the networks in their first step.

    raises: UserError if that fails, mostly for want of a compiler: C++ on a CPU, C on a GPU (for Triton)
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds, with dozens of lines
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0]).strip()
        raise UserError(f"--compile does not work here: {reason}. Install a compiler (CPU: g++ or what CXX "
                        "names; GPU: gcc or what CC names), or leave --compile out") from None


def compile_network(model):
    """Compiles a prior block by block, as one graph that all its equal blocks share: that of the whole took
    three times as long to compile and ran no faster (docs/speed.md). Another network is compiled whole."""
    if hasattr(model, "transformer"):
        for block in model.transformer.blocks:
            block.compile()
        return
    if hasattr(model, "quantizer"):  # random keys, collectives, branches on the step, products without TF32
        for name in ("forward", "quantize", "lookup"):
            setattr(model.quantizer, name, torch.compiler.disable(getattr(model.quantizer, name)))
    model.compile()
