#!/usr/bin/env python3
"""Writes a small random model as a Hugging Face directory, the same with two of each four weights zero, and the latter in
compressed-tensors' sparse-24-bitmask format.

    python3 sparse.py hf sparse      writes sparse/NAME/ for every NAME below; hf/ has the configurations and the tokenizer

dense           F32 matrices in the layers: random weights with ties, zeros of both signs and denormals
bf16            dense, pruned by NumPy and rounded to bf16 by torch
int8            dense, pruned and quantised by NumPy, q = floor(127 w / max|row| + 0.5)
bf16-bitmask    bf16 and int8, compressed by compressed-tensors; the script checks that they decompress to the same
int8-bitmask
"""
import json
import os
import shutil
import sys

import numpy as np
import torch
from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import Sparse24BitMaskTensor
from compressed_tensors.config import Sparse24BitMaskConfig
from safetensors.torch import load_file, save_file

SPARSITY = json.loads(Sparse24BitMaskConfig(targets=["Linear"], ignore=["lm_head"]).model_dump_json())


def is_matrix(name):
    return name.endswith("_proj.weight")


def random_weights(shape, rng):
    w = rng.standard_normal(shape).astype(np.float32)
    ties = rng.integers(-2, 3, shape).astype(np.float32)  # with many equal magnitudes, and zeros
    w = np.where(rng.random(shape) < 0.4, ties, w)
    w = np.where(rng.random(shape) < 0.05, np.float32(-0.0), w)
    w = np.where(rng.random(shape) < 0.05, np.float32(-1e-41), w)
    w[0] = 0
    return w


def prune(w):
    """Keeps the two largest of each four weights; of equal ones, the first."""
    fours = w.reshape(-1, 4)
    order = np.argsort(-np.abs(fours), axis=1, kind="stable")
    out = np.zeros_like(fours)
    rows = np.arange(len(fours))[:, None]
    out[rows, order[:, :2]] = fours[rows, order[:, :2]]
    return out.reshape(w.shape)


def to_int8(w):
    most = np.abs(w).max(axis=1, keepdims=True)
    inverse = np.divide(127.0, most, out=np.zeros(most.shape), where=most > 0)  # in double
    return np.floor(w * inverse + 0.5).astype(np.int8), (most / np.float32(127)).astype(np.float32)


def to_bf16(w):
    out = torch.from_numpy(w).to(torch.bfloat16)
    tiny = out.abs() < torch.finfo(torch.bfloat16).smallest_normal
    return torch.where(tiny, torch.zeros_like(out), out)  # llm.h treats denormals as zero


def compressed(state):
    out = {}
    for name, tensor in state.items():
        if not is_matrix(name):
            out[name] = tensor
            continue
        sparse = Sparse24BitMaskTensor.from_dense(tensor)
        assert torch.equal(sparse.decompress(), tensor)
        out.update(sparse.dict(name_prefix=name))
    return out


def write(folder, source, config, state):
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    shutil.copy(f"{source}/tokenizer.json", folder)
    with open(f"{folder}/config.json", "w") as f:
        json.dump(config, f, indent=1)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, f"{folder}/model.safetensors", {"format": "pt"})


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, out = f"{sys.argv[1]}/llama", sys.argv[2]
    with open(f"{source}/config.json") as f:
        config = json.load(f)
    with open(f"{sys.argv[1]}/int8/config.json") as f:
        int8_config = json.load(f)["quantization_config"]
    rng = np.random.default_rng(24)
    dense = {}
    for name, tensor in sorted(load_file(f"{source}/model.safetensors").items()):
        dense[name] = torch.from_numpy(random_weights(tensor.shape, rng)) if is_matrix(name) else tensor.to(torch.bfloat16)
    bf16, int8 = dict(dense), dict(dense)
    for name in filter(is_matrix, dense):
        pruned = prune(dense[name].numpy())
        bf16[name] = to_bf16(pruned)
        q, scale = to_int8(pruned)
        int8[name], int8[name + "_scale"] = torch.from_numpy(q), torch.from_numpy(scale)
    zeros = {"quant_method": "compressed-tensors", "quantization_status": "frozen", "config_groups": {}, "format": "dense",
             "sparsity_config": SPARSITY}
    write(f"{out}/dense", source, config, dense)
    write(f"{out}/bf16", source, config, bf16)
    write(f"{out}/int8", source, {**config, "quantization_config": int8_config}, int8)
    write(f"{out}/bf16-bitmask", source, {**config, "quantization_config": zeros}, compressed(bf16))
    write(f"{out}/int8-bitmask", source, {**config, "quantization_config": {**int8_config, "sparsity_config": SPARSITY}}, compressed(int8))


if __name__ == "__main__":
    main()
