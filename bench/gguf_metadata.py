#!/usr/bin/env python3
"""gguf_metadata.py MODEL OUT: copies the metadata of a GGUF file, without its tensors. The tokenizer can be loaded from OUT."""
import struct
import sys

STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def skip(file, kind):
    """Skips one value. `kind` is GGUF's number of its type."""
    if kind == STRING:
        file.seek(struct.unpack("<Q", file.read(8))[0], 1)
    elif kind == ARRAY:
        of, n = struct.unpack("<IQ", file.read(12))
        if of in SIZES:
            file.seek(SIZES[of] * n, 1)
        else:
            for _ in range(n):
                skip(file, of)
    else:
        file.seek(SIZES[kind], 1)


def main(model, out):
    with open(model, "rb") as file:
        magic, version, _, n_keys = struct.unpack("<4sIQQ", file.read(24))
        if magic != b"GGUF" or version not in (2, 3):
            sys.exit(f"{model} is not a GGUF file of version 2 or 3")
        for _ in range(n_keys):
            skip(file, STRING)
            skip(file, struct.unpack("<I", file.read(4))[0])
        size = file.tell()
        file.seek(24)
        keys = file.read(size - 24)
    with open(out, "wb") as file:
        file.write(struct.pack("<4sIQQ", magic, version, 0, n_keys) + keys)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
