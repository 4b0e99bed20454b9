#!/usr/bin/env python3
"""Measures gpt-fast's technique in PyTorch, for comparison with llm_cuda.cu: random weights, batch 1, a static KV cache, a
pass of one token without compilation (eager) and compiled with torch.compile(mode="reduce-overhead", fullgraph=True), which
records it as a CUDA graph, and int8 per output channel. The settings are those of gpt-fast's generate.py:
coordinate_descent_tuning, without which the compiler does not fuse the conversion of int8 into the product; unique kernel
names; the cache of compiled graphs; and attention in plain operations, which the compiler fuses better than a library's
kernel. The products are also gpt-fast's: one for queries, keys and values, two for gates and ups. The next token is the most
likely one, whereas gpt-fast draws one of the best 200, which takes longer. For comparison, gpt-fast's README reports 104.9
tokens per second (bf16) and 155.6 (int8) for Llama-2-7B on an A100 with 80 GB and a power limit of 330 W.

    gptfast.py [--shape Llama-2-7B] [--weights bf16 int8] [--depth 6] [--read-gbs 4000]

Prints lines like bench/gpu.cpp: model, weights, mode, what, tokens per second, % of the limit. The limit is --read-gbs, the
bandwidth that bench/gpu.cpp measured on the same GPU; without it the percentage is omitted. To try the program without a GPU,
use --device cpu --shape smallest. Needs PyTorch 2.3 or newer, and no network."""
import argparse
import sys
import time

import torch
import torch._dynamo.config
import torch._inductor.config
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

torch._inductor.config.coordinate_descent_tuning = True
torch._inductor.config.triton.unique_kernel_names = True
torch._inductor.config.fx_graph_cache = True

# Tokens per second that gpt-fast's README reports for an A100.
PUBLISHED = {("Llama-2-7B", "bf16"): 104.9, ("Llama-2-7B", "int8"): 155.58}

# Layers, n_embd, n_ff, heads, key heads, head_dim, n_vocab, as in bench/gpu.cpp.
SHAPES = {
    "Llama-2-7B": (32, 4096, 11008, 32, 32, 128, 32000),
    "Llama-3.1-8B": (32, 4096, 14336, 32, 8, 128, 128256),
    "TinyLlama-1.1B": (22, 2048, 5632, 32, 4, 64, 32000),
    "smallest": (2, 64, 96, 4, 2, 16, 300),
}
NEW_TOKENS = 200


class Linear(nn.Module):
    """y = W x without a bias; the weights are bf16."""

    def __init__(self, n, k):
        super().__init__()
        self.register_buffer("weight", torch.empty(n, k).uniform_(-0.03, 0.03))

    def forward(self, x):
        return F.linear(x, self.weight)


class Int8Linear(nn.Module):
    """The same with int8 weights and one scale per output."""

    def __init__(self, n, k):
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (n, k), dtype=torch.int8))
        self.register_buffer("scales", torch.full((n,), 0.03 / 127))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype)) * self.scales


class Norm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.register_buffer("weight", torch.ones(n))

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


def rotate(x, cosines, sines):
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cosines - b * sines, a * sines + b * cosines), -1).type_as(x)


class Layer(nn.Module):
    def __init__(self, linear, n_ctx, n_embd, n_ff, n_heads, n_kv_heads, head_dim):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.attention_norm, self.ffn_norm = Norm(n_embd), Norm(n_embd)
        self.qkv = linear((n_heads + 2 * n_kv_heads) * head_dim, n_embd)
        self.out = linear(n_embd, n_heads * head_dim)
        self.gate, self.up, self.down = linear(n_ff, n_embd), linear(n_ff, n_embd), linear(n_embd, n_ff)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(1, n_kv_heads, n_ctx, head_dim))

    def forward(self, x, position, mask, cosines, sines):
        heads = self.qkv(self.attention_norm(x)).view(1, 1, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), 1)
        self.keys[:, :, position] = rotate(k, cosines, sines)
        self.values[:, :, position] = v
        group = self.n_heads // self.n_kv_heads
        keys, values = (c.repeat_interleave(group, 1) if group > 1 else c for c in (self.keys, self.values))
        attention = F.scaled_dot_product_attention(rotate(q, cosines, sines), keys, values, attn_mask=mask)
        x = x + self.out(attention.transpose(1, 2).reshape(1, 1, -1))
        normed = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Model(nn.Module):
    def __init__(self, linear, n_ctx, n_layers, n_embd, n_ff, n_heads, n_kv_heads, head_dim, n_vocab):
        super().__init__()
        self.register_buffer("embedding", torch.empty(n_vocab, n_embd).uniform_(-0.03, 0.03))
        self.layers = nn.ModuleList(Layer(linear, n_ctx, n_embd, n_ff, n_heads, n_kv_heads, head_dim) for _ in range(n_layers))
        self.norm, self.head = Norm(n_embd), linear(n_vocab, n_embd)
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.arange(n_ctx, dtype=torch.float64)[:, None] * frequencies
        self.register_buffer("cosines", angles.cos().float())
        self.register_buffer("sines", angles.sin().float())
        self.register_buffer("mask", torch.ones(n_ctx, n_ctx, dtype=torch.bool).tril())

    def forward(self, token, position):
        x, mask = F.embedding(token, self.embedding)[None], self.mask[position][None, None]
        for layer in self.layers:
            x = layer(x, position, mask, self.cosines[position], self.sines[position])
        return self.head(self.norm(x))[0, 0].argmax(-1, keepdim=True)


def weight_bytes(model):
    """Returns the bytes of weights that a token reads. The embedding does not count, because a token only reads one row of it."""
    return sum(b.numel() * b.element_size() for m in model.modules() if isinstance(m, (Linear, Int8Linear)) for b in m.buffers())


def build(shape, weights, n_ctx, device):
    with torch.device(device):
        model = Model(Int8Linear if weights == "int8" else Linear, n_ctx, *SHAPES[shape])
    for module in model.modules():
        for name, b in module.named_buffers(recurse=False):
            if b.dtype == torch.float32 and name not in ("cosines", "sines"):
                setattr(module, name, b.to(torch.bfloat16))
    return model.eval()


@torch.no_grad()
def measure(step, depth, device):
    """Returns tokens per second, without the first tokens, during which the pass is compiled and recorded."""
    token, position = torch.ones(1, dtype=torch.long, device=device), torch.tensor([depth - 6], device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def run(n):
        nonlocal token
        for _ in range(n):
            with sdpa_kernel(SDPBackend.MATH):
                token = step(token, position).clone()
            position.add_(1)

    run(6)
    wait()
    start = time.perf_counter()
    run(NEW_TOKENS)
    wait()
    return NEW_TOKENS / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Llama-2-7B")
    parser.add_argument("--weights", nargs="+", choices=("bf16", "int8"), default=("bf16", "int8"))
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--read-gbs", type=float, default=0)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    n_layers, _, _, _, n_kv_heads, head_dim, _ = SHAPES[args.shape]
    for weights in args.weights:
        if (args.shape, weights) in PUBLISHED:
            print(f"{args.shape},{weights},gpt-fast on an A100,decode at 6 (published),{PUBLISHED[args.shape, weights]:.1f},", flush=True)
        start = time.perf_counter()
        model = build(args.shape, weights, args.depth + NEW_TOKENS + 10, args.device)
        read = weight_bytes(model) + 4 * n_layers * n_kv_heads * head_dim * (args.depth + NEW_TOKENS // 2)
        for mode in ("torch eager", "torch.compile"):
            step = model if mode == "torch eager" else torch.compile(model, mode="reduce-overhead", fullgraph=True)
            rate = measure(step, args.depth, args.device)
            share = f"{100 * read * rate / (args.read_gbs * 1e9):.1f}" if args.read_gbs else ""
            print(f"{args.shape},{weights},{mode},decode at {args.depth},{rate:.1f},{share}", flush=True)
        print(f"gptfast.py: {weights} took {time.perf_counter() - start:.0f} s, most of it for compilation", file=sys.stderr, flush=True)
        del model
        torch.compiler.reset()


if __name__ == "__main__":
    main()
