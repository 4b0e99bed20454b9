"""Writes hf/meta-1, hf/meta-2 and hf/meta-3: tiny models in the format of Meta's checkpoints, saved by torch.save. The first
two are like Llama 2, in one and two files; the third is like Llama 3.1, with grouped heads, scaled RoPE and Llama 3's kind
of tokenizer. logits.bin has the number of tokens and the vocabulary's size (int32), the tokens (int32), and the logits
(float32) of a NumPy float64 forward pass. Needs torch. Usage: python meta.py"""
import json
import pathlib
import shutil

import numpy as np
import torch

DIM, LAYERS, HEADS, FF = 16, 2, 2, 48
EPS = 1e-5


def scaled(frequencies, factor):
    """The same as apply_scaling of llama-models."""
    wave = 2 * np.pi / frequencies
    smooth = (8192 / wave - 1) / (4 - 1)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    return np.where(wave < 8192 / 4, frequencies, np.where(wave > 8192, frequencies / factor, between))


def forward(w, tokens, params):
    """Returns the logits of all positions. w: name -> float64 array. RoPE rotates the pairs (2i, 2i + 1)."""
    x = w["tok_embeddings.weight"][tokens]
    n, d = len(tokens), DIM // HEADS
    frequencies = params.get("rope_theta", 10000.0) ** (-np.arange(0, d, 2) / d)
    if params.get("use_scaled_rope"):
        frequencies = scaled(frequencies, params["rope_scaling_factor"])
    angle = np.outer(np.arange(n), frequencies)
    turn = np.exp(1j * angle)[:, None]

    def norm(v, g):
        return v / np.sqrt((v * v).mean(-1, keepdims=True) + EPS) * g

    def rotate(v):
        c = (v[..., 0::2] + 1j * v[..., 1::2]) * turn
        return np.stack([c.real, c.imag], -1).reshape(v.shape)

    for i in range(LAYERS):
        p = f"layers.{i}."
        h = norm(x, w[p + "attention_norm.weight"])
        q, k, v = ((h @ w[p + f"attention.w{c}.weight"].T).reshape(n, -1, d) for c in "qkv")
        k, v = (np.repeat(t, HEADS // t.shape[1], 1) for t in (k, v))
        s = np.einsum("ihd,jhd->hij", rotate(q), rotate(k)) / np.sqrt(d)
        s[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        s = np.exp(s - s.max(-1, keepdims=True))
        s /= s.sum(-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", s, v).reshape(n, DIM) @ w[p + "attention.wo.weight"].T
        h = norm(x, w[p + "ffn_norm.weight"])
        g, u = h @ w[p + "feed_forward.w1.weight"].T, h @ w[p + "feed_forward.w3.weight"].T
        x = x + (g / (1 + np.exp(-g)) * u) @ w[p + "feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


def main():
    golden = pathlib.Path(__file__).parent
    plain = {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "multiple_of": 16, "norm_eps": EPS, "vocab_size": -1}
    llama3 = {**plain, "n_kv_heads": 1, "rope_theta": 500000.0, "use_scaled_rope": True, "rope_scaling_factor": 8, "vocab_size": 679}
    torch.manual_seed(1)
    for name, files, dtype, tokenizer, vocab, params in (("meta-1", 1, torch.bfloat16, "spm-plain", 220, plain),
                                                         ("meta-2", 2, torch.float16, "spm-plain", 220, plain),
                                                         ("meta-3", 1, torch.bfloat16, "llama-3-meta", 679, llama3)):
        out = golden / "hf" / name
        out.mkdir(exist_ok=True)
        shapes = {"tok_embeddings.weight": (vocab, DIM), "norm.weight": (DIM,), "output.weight": (vocab, DIM)}
        for i in range(LAYERS):
            p = f"layers.{i}."
            kv = DIM // HEADS * params.get("n_kv_heads", HEADS)
            shapes.update({p + f"attention.w{c}.weight": (kv if c in "kv" else DIM, DIM) for c in "qkvo"})
            shapes.update({p + "feed_forward.w1.weight": (FF, DIM), p + "feed_forward.w3.weight": (FF, DIM)})
            shapes.update({p + "feed_forward.w2.weight": (DIM, FF)})
            shapes.update({p + "attention_norm.weight": (DIM,), p + "ffn_norm.weight": (DIM,)})
        w = {name: (torch.randn(s) * (0.4 if len(s) == 2 else 0.1) + (len(s) == 1)).to(dtype) for name, s in shapes.items()}
        for f in range(files):
            part = {}
            for name, t in w.items():
                columns = any(c in name for c in ("wo.", "w2.", "tok_embeddings"))
                part[name] = t if t.dim() == 1 else t.chunk(files, 1 if columns else 0)[f].clone()
            torch.save(part, out / f"consolidated.{f:02}.pth")
        (out / "params.json").write_text(json.dumps(params) + "\n")
        shutil.copy(golden / "tokenizers" / tokenizer / "tokenizer.model", out / "tokenizer.model")
        tokens = np.array([1, 5, 9, 3, 7, 2, 8], np.int32)
        logits = forward({k: v.double().numpy() for k, v in w.items()}, tokens, params)
        head = np.array([len(tokens), vocab], np.int32)
        (out / "logits.bin").write_bytes(head.tobytes() + tokens.tobytes() + logits.astype(np.float32).tobytes())


main()
