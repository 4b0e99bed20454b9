#!/usr/bin/env python3
"""Writes tests/golden/tokens-smollm2.jsonl: texts and their token ids by Hugging Face `tokenizers`, and
tests/golden/unicode.json: hashes of the classes and of the normalised forms of all code points.

A line is [text, ids], or [text, ids, plain ids] if the ids differ without special tokens. For a long text it is
{"unit", "times", "count", "hash"}: the text is `unit` repeated `times` times, `count` is the number of its ids, and `hash`
is FNV-1a over the ids as 32-bit numbers.

The hashes are FNV-1a over the class of each code point (see reference.BITS), and over the code points that the NFC
normaliser of `tokenizers` gives for each code point between two others (NFC_FRAMES).

    python3 tokenizer/golden.py models/SmolLM2-135M-Instruct.Q4_1.gguf tests/golden
"""

import json
import os
import sys

from tokenizers import normalizers

import reference

COUNT = 5400
LONG = [("a", 100000), (" ", 100000), ("ab", 50000), ("\n", 30000), ("é", 30000), ("aB3 ", 25000), ("x=1;\t", 20000),
        ("你好", 20000), ("the quick brown fox ", 5000), ("e\u0301", 20000), ("'s", 20000), ("👍🏽", 5000), ("!?", 30000)]


def fnv(ids):
    value = 0xCBF29CE484222325
    for i in ids:
        value = ((value ^ i) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def dump(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"


NFC_FRAMES = [("", ""), ("a", ""), ("", "\u0301"), ("\u0915", "\u093c"), ("e\u0323", "\u0302"), ("\u1100", "\u11a8"), ("\uac00", "\u1161")]


def code_points():
    return (chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)


def unicode_hashes():
    frames = []
    for before, after in NFC_FRAMES:
        texts = (normalizers.NFC().normalize_str(before + c + after) for c in code_points())
        frames.append({"before": before, "after": after, "hash": fnv(ord(c) for text in texts for c in text)})
    return {"classes": fnv(reference.class_bits(c) for c in code_points()), "nfc": frames}


def main(model, directory):
    vocabulary = reference.Vocabulary(model)
    tokenizer = reference.byte_level(vocabulary)
    with open(os.path.join(directory, "unicode.json"), "w", encoding="utf-8", newline="\n") as file:
        file.write(dump(unicode_hashes()))
    with open(os.path.join(directory, "tokens-smollm2.jsonl"), "w", encoding="utf-8", newline="\n") as file:
        for text in reference.texts(COUNT, vocabulary.of_type(reference.CONTROL), size=4):
            tokenizer.encode_special_tokens = False
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            tokenizer.encode_special_tokens = True
            plain = tokenizer.encode(text, add_special_tokens=False).ids
            file.write(dump([text, ids] if plain == ids else [text, ids, plain]))
        for unit, times in LONG:
            ids = tokenizer.encode(unit * times, add_special_tokens=False).ids
            file.write(dump({"unit": unit, "times": times, "count": len(ids), "hash": fnv(ids)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
