"""What makes networks faster: norms, attention, fixed convolutions, memory.

On a CPU some change a result: attention in bf16 rounds its scores to bf16, and a fixed convolution's gradient
and cached keys are summed in float32.
"""

import contextlib
import ctypes
import os
import sys

import torch
import torch.nn.functional as F
from torch import nn


class GroupNorm(nn.GroupNorm):
    """GroupNorm that reads and writes the type of its input; its statistics are float32 either way. Under
    autocast on a GPU PyTorch's writes float32: 18 % more time and 48 % more memory in phase 1 on an H100."""

    def forward(self, x):
        if not x.is_cuda:
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def attention(q, k, v, dropout=0.0, causal=False):
    """softmax(q k^T / sqrt(d)) v, (B, heads, T, d) each: F.scaled_dot_product_attention but on a CPU.

    There bf16 trains two to seven times as fast by plain products (docs/speed.md), which keep the weights
    that fused attention computes again; they go slice by slice, so without gradients little memory is held.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
    T, out = q.shape[2], []
    hidden = torch.full((T, T), -torch.inf if causal else 0.0, dtype=q.dtype).triu(1)
    rows = (t.flatten(0, 1).split(max(1, 2**22 // T**2)) for t in (q, k, v))  # 8 MiB of scores
    for q_rows, k_rows, v_rows in zip(*rows, strict=True):
        scores = torch.baddbmm(hidden, q_rows, k_rows.transpose(1, 2), alpha=q.shape[3] ** -0.5)
        out.append(F.dropout(scores.softmax(dim=2), dropout) @ v_rows)
    return torch.cat(out).unflatten(0, q.shape[:2])


class KVCache:
    """Keys and values of one layer for the positions seen so far: only the speed of sampling changes.

    On a CPU they are float32, and multiplied as such but under autocast. Their buffers grow by 32 positions:
    the product with a whole one takes half the time of that with its beginning.
    """

    def __init__(self, num_tokens):
        self.num_tokens, self.length = num_tokens, 0
        self.keys = self.values = self.hidden = None  # hidden: 0 at a filled position, else -inf

    def attend(self, q, k, v):
        """q, k, v: (B, heads, 1, d) of the next position -> (B, heads, 1, d), attention to all up to it.

        raises: ValueError for more than one position, and when it is full
        """
        batch, heads, length, d = k.shape
        if length != 1 or self.length == self.num_tokens:
            full = f"{self.length} of {self.num_tokens} positions"
            raise ValueError(f"KVCache takes one position at a time: it holds {full}, got {length} more")
        cpu = q.device.type == "cpu"
        if self.keys is None:
            self.keys = (k.float() if cpu else k).new_zeros(batch, heads, 0, d)
            self.values, self.hidden = self.keys, self.keys.new_zeros(0)
        if self.length == len(self.hidden):
            more = min(32, self.num_tokens - self.length) if cpu else self.num_tokens
            self.keys, self.values = (F.pad(t, (0, 0, 0, more)) for t in (self.keys, self.values))
            self.hidden = F.pad(self.hidden, (0, more), value=-torch.inf)
        self.keys[:, :, self.length] = k[:, :, 0]
        self.values[:, :, self.length] = v[:, :, 0]
        self.length += 1
        if not cpu:
            return F.scaled_dot_product_attention(
                q, self.keys[:, :, : self.length], self.values[:, :, : self.length])
        self.hidden[self.length - 1] = 0
        scores = q.float() @ self.keys.transpose(2, 3)  # (B, heads, 1, positions of the buffer)
        weights = torch.add(self.hidden, scores, alpha=d**-0.5).softmax(dim=3)
        return (weights @ self.values).to(q.dtype)


class FixedConv(torch.autograd.Function):
    """Depthwise convolution with one kernel that does not learn, (B, C, H, W) -> (B, C, H', W').

    Its gradient is the transposed convolution, whose gradient is again this one. With F.conv2d R1 would also
    compute the gradient of the kernel: 6 s instead of 2 s for 32 images of 256x256 on an H100.
    """

    @staticmethod
    def forward(ctx, x, kernel, stride, padding, transposed):
        ctx.save_for_backward(kernel)
        ctx.rest = stride, padding, not transposed
        conv, channels = F.conv_transpose2d if transposed else F.conv2d, x.shape[1]
        slow = transposed and stride > 1 and x.dtype == torch.bfloat16 and x.device.type == "cpu"
        dtype = torch.float32 if slow else x.dtype  # on a CPU bf16 takes ten times as long there
        kernel = kernel.to(dtype).expand(channels, 1, *kernel.shape)
        return conv(x.to(dtype), kernel, stride=stride, padding=padding, groups=channels).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return FixedConv.apply(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None


def keep_freed_memory():
    """Tells glibc to keep freed memory for the next tensor, on a CPU: without it the page faults of large
    tensors make a training step take 1.3 times as long. MALLOC_TRIM_THRESHOLD_ in the environment switches
    this off."""
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        with contextlib.suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give back nothing below 2 GiB


@torch.no_grad()
def in_slices(function, x):
    """function(x) over slices of one size, the last one filled up: the result for a row, to the last bit,
    then does not depend on how many rows there are.

    x: images (B, 3, H, W), latents (B, n_z, h, w), tokens (B, N) or (B, N, k). A slice has 8 rows on a CPU.
       On a GPU, where so few mean waiting for the host, it has up to 256 that hold two million pixels; a
       token or latent counts as 16 x 16.
    """
    places = x[0, 0].numel() if x.dim() == 4 else x.shape[1]
    pixels = places if x.dim() == 4 and x.shape[1] == 3 else 256 * places
    size = 8 if x.device.type == "cpu" else max(8, min(256, 2**21 // pixels))
    filled = torch.cat([x, x[:1].expand(-len(x) % size, *x.shape[1:])])
    return torch.cat([function(part) for part in filled.split(size)])[: len(x)]
