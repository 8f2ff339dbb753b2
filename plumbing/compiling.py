"""--compile: networks under torch.compile, and AR sampling as one graph that serves every position."""

import torch
import torch.nn.functional as F
from torch import nn

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
        wanted = "C++ compiler (g++, or what CXX names)"
        if device.type == "cuda":
            wanted = "C compiler (gcc, or what CC names)"
        raise UserError(f"--compile does not work here: {reason}. Install a {wanted}, or leave --compile "
                        "out") from None


def compile_network(model):
    """Compiles a prior block by block, as one graph that all its equal blocks share: that of the whole took
    three times as long to compile and ran no faster (docs/speed.md). Another network is compiled whole."""
    transformer = getattr(model, "transformer", None)
    if transformer is not None:
        for block in transformer.blocks:
            block.compile()
        return
    quantizer = getattr(model, "quantizer", None)
    if quantizer is not None:  # random keys, collectives, branches on the step, products without TF32
        for name in ("forward", "quantize", "lookup"):
            setattr(quantizer, name, torch.compiler.disable(getattr(quantizer, name)))
    model.compile()


def compile_sampling(prior):
    """Compiles what draws tokens: the step of an AR prior, the blocks of another one."""
    if hasattr(prior, "step"):
        prior.step = CompiledStep(prior)
    else:
        compile_network(prior)


class FixedCache(nn.Module):
    """A KVCache whose keys and values have room for all positions and stay in one place, so that one graph
    serves each position. They are buffers, which is how the compiler knows that a CUDA graph may write them.

    position: (1,) int64, of the next token
    """

    def __init__(self, position, batch, num_tokens, config, dtype):
        super().__init__()
        shape = batch, config.n_head, num_tokens, config.n_embd // config.n_head
        self.register_buffer("position", position)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=position.device))

    def attend(self, q, k, v):
        """As KVCache.attend."""
        self.keys.index_copy_(2, self.position, k)
        self.values.index_copy_(2, self.position, v)
        seen = torch.arange(self.keys.shape[2], device=k.device) <= self.position[:, None]  # (1, N)
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=seen)


class CompiledStep:
    """ARPrior.step, compiled; on a GPU a CUDA graph, so that a token costs one launch and not hundreds.

    It keeps its own keys and values from call to call and does not read the caches that `generate` brings.
    """

    def __init__(self, prior):
        self.prior, self.caches = prior, {}
        self.step = torch.compile(type(prior).step, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def __call__(self, x, i, noise, caches, sampler):
        config, rows = self.prior.config, (len(x), x.dtype)
        if rows not in self.caches:
            position = torch.zeros(1, dtype=torch.int64, device=x.device)
            self.caches[rows] = nn.ModuleList(FixedCache(position, len(x), config.num_tokens, config, x.dtype)
                                              for _ in caches)
        caches = self.caches[rows]
        position = caches[0].position.fill_(i)
        torch.compiler.cudagraph_mark_step_begin()
        tokens, x = self.step(self.prior, x, position, noise.contiguous(), caches, sampler)
        return tokens.clone(), x.clone()  # the next call writes over them
