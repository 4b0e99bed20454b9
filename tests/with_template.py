#!/usr/bin/env python3
"""with_template.py MODEL TEMPLATE OUT [OLD=NEW ...]: copies a GGUF file, replaces its chat template by the one in the file
TEMPLATE, and renames tokens."""
import struct
import sys

STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def read_string(file):
    return file.read(struct.unpack("<Q", file.read(8))[0])


def string(data):
    return struct.pack("<Q", len(data)) + data


def copy(file, kind, change):
    """Returns the bytes of one value; change(text) is called for each string."""
    if kind == STRING:
        return string(change(read_string(file)))
    if kind == ARRAY:
        head = file.read(12)
        of, n = struct.unpack("<IQ", head)
        return head + (file.read(SIZES[of] * n) if of in SIZES else b"".join(copy(file, of, change) for _ in range(n)))
    return file.read(SIZES[kind])


def main(model, template, out, *names):
    renamed = dict(name.encode().split(b"=", 1) for name in names)
    with open(template, "rb") as file:
        text = file.read()
    changes = {b"tokenizer.chat_template": lambda _: text, b"tokenizer.ggml.tokens": lambda old: renamed.get(old, old)}
    with open(model, "rb") as file:
        magic, version, n_tensors, n_keys = struct.unpack("<4sIQQ", file.read(24))
        if magic != b"GGUF" or version not in (2, 3):
            sys.exit(f"{model} is not a GGUF file of version 2 or 3")
        head, alignment = struct.pack("<4sIQQ", magic, version, n_tensors, n_keys), 32
        for _ in range(n_keys):
            key = read_string(file)
            kind = file.read(4)
            value = copy(file, struct.unpack("<I", kind)[0], changes.get(key, lambda old: old))
            if key == b"general.alignment":
                alignment = struct.unpack("<I", value)[0]
            head += string(key) + kind + value
        for _ in range(n_tensors):
            head += string(read_string(file))
            dims = file.read(4)
            head += dims + file.read(8 * struct.unpack("<I", dims)[0] + 12)
        file.seek(-file.tell() % alignment, 1)
        with open(out, "wb") as copied:
            copied.write(head + bytes(-len(head) % alignment))
            while data := file.read(1 << 20):
                copied.write(data)


if __name__ == "__main__":
    main(*sys.argv[1:])
