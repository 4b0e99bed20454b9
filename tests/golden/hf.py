#!/usr/bin/env python3
"""Writes small random models as Hugging Face directories and as GGUF files, and the logits that transformers computes.

    python3 hf.py hf          writes hf/NAME/, hf/NAME.gguf and hf/NAME.logits for every model, and hf/blocks.bin

Each directory is written by save_pretrained. The logits are computed in float32 by the model that from_pretrained loads
from it. The GGUF file is written with the gguf package: tensors are named, permuted and completed (rope_freqs) as in
llama.cpp's convert_hf_to_gguf.py. Weights are integers from -7 to 7 times a power of two, so every type represents them
exactly and both files are the same model.

NAME.logits, little-endian, four bytes a field:
    i32 n_tokens, n_rows, n_vocab
    i32 token[n_tokens]
    i32 row[n_rows]                    positions whose logits are kept, ascending
    f32 logits[n_rows][n_vocab]

blocks.bin, for each of the types with blocks: random blocks and the gguf package's weights for them:
    i32 type, n_blocks, block_bytes, block_weights
    u8  block[n_blocks][block_bytes]
    f32 weight[n_blocks][block_weights]
"""
import json
import os
import shutil
import struct
import sys

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

Type = gguf.GGMLQuantizationType
N_VOCAB, HIDDEN = 48, 32
COMMON = dict(vocab_size=N_VOCAB, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=1024, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)


def rope(kind, theta=100.0, **more):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **more))


LLAMA3 = rope("llama3", 1000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = rope("yarn", 1000.0, factor=4.0, original_max_position_embeddings=256, beta_fast=16.0, beta_slow=1.0)
YARN_GIVEN = rope("yarn", 1000.0, factor=4.0, original_max_position_embeddings=256, attention_factor=1.25)
YARN_MSCALE = rope("yarn", 1000.0, factor=4.0, original_max_position_embeddings=256, mscale=0.7, mscale_all_dim=1.3, truncate=False)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)

# name: configuration, type of the safetensors, type of the GGUF (None: GGUF cannot represent it), further settings
MODELS = {
    "llama": (LlamaConfig(**{**COMMON, "num_key_value_heads": 2}), "float32", Type.Q4_1, {}),
    "gqa": (LlamaConfig(**{**COMMON, **HEADS, "num_hidden_layers": 2}, tie_word_embeddings=True), "bfloat16", Type.F16, {}),
    "llama3": (LlamaConfig(**COMMON, **LLAMA3), "float16", Type.F32, {}),
    "linear": (LlamaConfig(**COMMON, **rope("linear", factor=4.0)), "bfloat16", Type.Q8_0, {"old": True}),
    "yarn": (LlamaConfig(**COMMON, **YARN), "bfloat16", Type.Q5_0, {}),
    "yarn-mscale": (LlamaConfig(**COMMON, **YARN_MSCALE), "bfloat16", None, {}),
    "mistral": (MistralConfig(**{**COMMON, **HEADS, "num_hidden_layers": 2}, sliding_window=100), "bfloat16", Type.Q5_1, {"n_tokens": 700}),
    "qwen2": (Qwen2Config(**COMMON), "bfloat16", Type.Q4_0, {}),
    "qwen2-yarn": (Qwen2Config(**COMMON, **YARN_GIVEN, tie_word_embeddings=True), "bfloat16", Type.Q4_0, {"old": True}),
    "qwen3": (Qwen3Config(**{**COMMON, **HEADS, "num_hidden_layers": 2}, head_dim=16, tie_word_embeddings=True), "bfloat16", Type.BF16, {}),
    "sharded": (LlamaConfig(**COMMON), "bfloat16", Type.BF16, {"shards": 4}),
    "int8": (LlamaConfig(**COMMON), "bfloat16", Type.BF16, {"int8": True}),
}

# ---- weights ---------------------------------------------------------------------------------------------------------


def fill(model, rng):
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            q = torch.from_numpy(rng.integers(-7, 8, tensor.shape).astype(np.float32))
            if name.endswith("norm.weight"):
                tensor.copy_(1 + q / 16)
            else:
                tensor.copy_(q / (4 if name.endswith("bias") else 16))


def quantized(state, rng):
    """Makes int8 weights with one scale per output, as compressed-tensors stores them. All are exact in bf16."""
    out = {}
    for name, tensor in state.items():
        if name.endswith("_proj.weight"):
            q = torch.from_numpy(rng.integers(-127, 128, tensor.shape).astype(np.int8))
            out[name] = q
            out[name + "_scale"] = torch.from_numpy(rng.choice([1.0, 0.5, 0.25], (len(q), 1)) / 256).to(torch.bfloat16)
        else:
            out[name] = tensor
    return out


INT8_CONFIG = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"], "kv_cache_scheme": None,
    "config_groups": {"group_0": {"targets": ["Linear"], "format": "int-quantized", "input_activations": None, "output_activations": None, "weights": {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False, "group_size": None}}}}

# ---- directories -----------------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = ["<unk>", "<s>", "</s>"] + list(LETTERS) + ["\u0120", ".", ","]
MERGES = ["t h", "th e", "i n", "a n", "an d", "\u0120 the", "\u0120 a", "o f", "\u0120 of", "e r", "o n", "r e", "s t", "e n", "\u0120 and", "a t"]
PIECES += [merge.replace(" ", "") for merge in MERGES]
assert len(PIECES) == N_VOCAB and len(set(PIECES)) == N_VOCAB


def write_json(path, value):
    with open(path, "w") as f:
        json.dump(value, f, indent=1)


def write_tokenizer(folder):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = [{"id": i, "content": PIECES[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for i in range(3)]
    write_json(f"{folder}/tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {piece: i for i, piece in enumerate(PIECES)}, "merges": MERGES}})
    write_json(f"{folder}/tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": False, "model_max_length": 1024})


def old_config(folder):
    """Rewrites config.json in the form before transformers 5, which most published models have."""
    with open(f"{folder}/config.json") as f:
        config = json.load(f)
    scaling = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    config["rope_scaling"] = scaling
    config["transformers_version"] = "4.40.0"
    config.pop("layer_types", None)
    write_json(f"{folder}/config.json", config)


def write_directory(folder, config, dtype, more, rng):
    shutil.rmtree(folder, ignore_errors=True)
    model = AutoModelForCausalLM.from_config(config)
    fill(model, rng)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="9kB" if "shards" in more else "5GB")
    if "shards" in more:
        assert len([f for f in os.listdir(folder) if f.endswith(".safetensors")]) == more["shards"], os.listdir(folder)
    if more.get("old"):
        old_config(folder)
    if more.get("int8"):
        path = f"{folder}/model.safetensors"
        save_file(quantized(load_file(path), rng), path, {"format": "pt"})
        with open(f"{folder}/config.json") as f:
            written = json.load(f)
        write_json(f"{folder}/config.json", {**written, "quantization_config": INT8_CONFIG})
    write_tokenizer(folder)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def permute(weight, n_heads):
    """Reorders rows that pair dimension i with i + half, so that they pair 2i with 2i + 1, as llama.cpp expects for Llama."""
    return weight.reshape(n_heads, 2, len(weight) // n_heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def rope_freqs(config):
    p, dim = config.rope_parameters, config.head_dim
    factors = []
    for freq in 1.0 / (p["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float32) / dim)):
        wavelen, old = 2 * np.pi / freq, p["original_max_position_embeddings"]
        low, high = p["low_freq_factor"], p["high_freq_factor"]
        if wavelen < old / high:
            factors.append(1.0)
        elif wavelen > old / low:
            factors.append(p["factor"])
        else:
            smooth = (old / wavelen - low) / (high - low)
            factors.append(1 / ((1 - smooth) / p["factor"] + smooth))
    return np.array(factors, np.float32)


def halves(codes):
    return codes[:, :16] | codes[:, 16:] << 4


def encode(kind, weight):
    """Encodes weights exactly in blocks. The weights are integers from -7 to 7 times 1/16."""
    if kind == Type.F32:
        return weight.astype(np.float32)
    if kind == Type.F16:
        return weight.astype(np.float16)
    if kind == Type.BF16:
        return (weight.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    blocks = (weight * 16).astype(np.int8).reshape(-1, 32)

    def half(x):
        return np.full((len(blocks), 1), x, np.float16).view(np.uint8)
    d = half(1 / 16)
    if kind == Type.Q8_0:
        parts = [d, blocks.view(np.uint8)]
    elif kind == Type.Q4_0:
        parts = [d, halves((blocks + 8).view(np.uint8))]
    elif kind == Type.Q4_1:
        parts = [d, half(-8 / 16), halves((blocks + 8).view(np.uint8))]
    else:
        codes = (blocks + 16).view(np.uint8)
        high = np.packbits(codes >> 4, axis=1, bitorder="little")
        parts = [d] + ([half(-16 / 16)] if kind == Type.Q5_1 else []) + [high, halves(codes & 15)]
    return np.concatenate(parts, axis=1).reshape(len(weight), -1)


def load_weights(folder):
    state = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            state.update(load_file(f"{folder}/{name}"))
    weights = {}
    for name, tensor in state.items():
        if name + "_scale" in state:
            weights[name] = (tensor.float() * state[name + "_scale"].float()).numpy()
        elif not name.endswith("_scale"):
            weights[name] = tensor.float().numpy()
    return weights


def write_gguf(path, folder, config, kind, shards):
    arch = {"mistral": "llama"}.get(config.model_type, config.model_type)
    w = gguf.GGUFWriter(path, arch, split_max_tensors=5 if shards else 0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    w.add_name(os.path.basename(folder))
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_block_count(config.num_hidden_layers)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_vocab_size(N_VOCAB)
    if arch == "llama":
        w.add_rope_dimension_count(head_dim)
    if arch == "qwen3":
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
    if config.model_type == "mistral":
        w.add_sliding_window(config.sliding_window)
    p = config.rope_parameters
    w.add_rope_freq_base(p["rope_theta"])
    if p["rope_type"] in ("linear", "yarn"):
        w.add_rope_scaling_type(gguf.RopeScalingType(p["rope_type"]))
        w.add_rope_scaling_factor(p["factor"])
    if p["rope_type"] == "yarn":
        w.add_rope_scaling_orig_ctx_len(p["original_max_position_embeddings"])
        for key, add in (("attention_factor", w.add_rope_scaling_yarn_attn_factor), ("beta_fast", w.add_rope_scaling_yarn_beta_fast),
                         ("beta_slow", w.add_rope_scaling_yarn_beta_slow)):
            if key in p:
                add(p[key])
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(PIECES)
    w.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (N_VOCAB - 3))
    w.add_token_merges(MERGES)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_add_bos_token(False)

    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config.num_hidden_layers)
    if p["rope_type"] == "llama3":
        w.add_tensor("rope_freqs.weight", rope_freqs(config))
    for name, weight in load_weights(folder).items():
        if arch == "llama" and ".q_proj." in name:
            weight = permute(weight, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            weight = permute(weight, config.num_key_value_heads)
        new_name = names.get_name(name, (".weight", ".bias"))
        if weight.ndim == 1:
            w.add_tensor(new_name, weight)
            continue
        data = encode(kind, weight)
        assert (dequantize(data.view(np.uint8) if data.dtype == np.uint8 else data, kind).reshape(weight.shape) == weight).all(), name
        w.add_tensor(new_name, data, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


# ---- logits, blocks --------------------------------------------------------------------------------------------------


def write_logits(path, folder, n_tokens, rng):
    tokens = rng.integers(3, N_VOCAB, n_tokens).astype(np.int32)
    rows = np.unique(np.concatenate([np.arange(6), np.linspace(6, n_tokens - 1, 14).astype(int)])).astype(np.int32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)[None].long()).logits[0].numpy()[rows]
    with open(path, "wb") as f:
        f.write(struct.pack("<3i", n_tokens, len(rows), N_VOCAB) + tokens.tobytes() + rows.tobytes() + logits.astype("<f4").tobytes())
    return np.abs(logits).max()


def write_blocks(path, rng, n=3):
    with open(path, "wb") as f:
        for kind in (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K,
                     Type.IQ4_NL, Type.IQ4_XS):
            n_weights, n_bytes = gguf.GGML_QUANT_SIZES[kind]
            weights = np.full((1, 1), np.nan)
            while not np.isfinite(weights).all():
                blocks = rng.integers(0, 256, (n, n_bytes)).astype(np.uint8)
                weights = dequantize(blocks, kind)
            f.write(struct.pack("<4i", kind, n, n_bytes, n_weights) + blocks.tobytes() + weights.astype("<f4").tobytes())


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = sys.argv[1]
    os.makedirs(out, exist_ok=True)
    for i, (name, (config, dtype, kind, more)) in enumerate(MODELS.items()):
        rng = np.random.default_rng(1000 + i)
        folder = f"{out}/{name}"
        write_directory(folder, config, dtype, more, rng)
        peak = write_logits(f"{folder}.logits", folder, more.get("n_tokens", 40), rng)
        if kind is not None:
            write_gguf(f"{folder}.gguf", folder, config, kind, more.get("shards"))
        print(f"{name}: largest logit {peak:.3f}")
    write_blocks(f"{out}/blocks.bin", np.random.default_rng(1))


if __name__ == "__main__":
    main()
