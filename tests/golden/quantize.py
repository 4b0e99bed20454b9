"""Writes quantize.bin: weights, and the blocks that ggml's reference quantisers make from them.

    python quantize.py quantize.bin [libggml-base.so]

The `gguf` package (0.19.0) makes the types of 16 and 32 bits and those with blocks of 32. The library's quantize_row_*_ref
makes the K types, which are omitted without the library. For types that both can make, the results must agree.
The file: int32 n, n float32 weights, then for each type int32 type, int32 n_bytes and the bytes.
"""

import ctypes
import struct
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize

PLAIN = (Type.F16, Type.BF16)
SMALL = (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0)
LARGE = (Type.Q4_K, Type.Q5_K, Type.Q6_K)


def weights():
    rng = np.random.default_rng(21)
    x = rng.standard_normal((6, 256)).astype(np.float32)
    x[0] *= np.float32(0.02)
    x[1, ::37] *= 20  # outliers
    x[2, :64] = 0
    x[2, 64:] = np.abs(x[2, 64:]) + np.float32(0.5)  # the minimum is above 0
    x[3] = np.round(x[3] * 4) / 4  # ties
    steps = np.repeat(np.float32(2.0) ** np.arange(8), 32).astype(np.float32)
    x[4] *= np.float32(1e-5) * steps  # the scales are denormal as f16
    x[5] *= np.float32(1e4)
    return x


def reference(library, kind, x):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros(x.size // block * size, np.uint8)
    function = getattr(library, f"quantize_row_{kind.name.lower().replace('_k', '_K')}_ref")
    function(x.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(x.size))
    return out.tobytes()


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    library = ctypes.CDLL(sys.argv[2]) if len(sys.argv) == 3 else None
    x = weights()
    with open(sys.argv[1], "wb") as f:
        f.write(struct.pack("<i", x.size) + x.tobytes())
        for kind in PLAIN + SMALL + (LARGE if library else ()):
            data = reference(library, kind, x) if kind in LARGE else quantize(x, kind).tobytes()
            if library and kind in SMALL:
                assert data == reference(library, kind, x), kind
            f.write(struct.pack("<2i", kind, len(data)) + data)


main()
