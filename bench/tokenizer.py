#!/usr/bin/env python3
"""Compares tokenizers on one thread of one core: MB/s of this library, gigatoken, quicktok, Hugging Face's `tokenizers` and `tiktoken`,
in alternating rounds, on HellaSwag's text and other files. Then compares a megabyte of texts that slow tokenizers down with a megabyte
of prose. gigatoken keeps a cache between calls, so its first call has its own line; this library keeps nothing between calls.

    make bench-tokenizer        or, with the packages named in the Makefile:  bench/tokenizer.py build/libllm.so MODEL.gguf [TEXT ...]
"""

import bz2
import ctypes
import os
import pathlib
import statistics
import sys
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
if hasattr(os, "sched_setaffinity"): # must come before the libraries count the cores
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
TOP = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(TOP / "tokenizer"))

import gigatoken  # noqa: E402
import numpy  # noqa: E402
import quicktok  # noqa: E402
import tiktoken  # noqa: E402

import reference  # noqa: E402

REPEATS = 3
FILE = "hellaswag_val_full.txt"
URL = "https://raw.githubusercontent.com/klosax/hellaswag_text_data/main/" + FILE
UNITS = ["a", " ", "ab"]
MOST_RATIO = 3
KNOWN_BITS = 16 # a text of 1 MB remembers words in a table of 2^16 lines


def hellaswag():
    folder = pathlib.Path(os.environ.get("LLM_DATA", "."))
    for path in (folder / FILE, folder / f"{FILE}.bz2"):
        if path.exists():
            data = path.read_bytes()
            return bz2.decompress(data) if path.suffix == ".bz2" else data
    sys.exit(f"HellaSwag's text is needed: LLM_DATA names the folder with {FILE} or {FILE}.bz2. To get it:\n"
             f"    curl -LO {URL}")


class Ours:
    def __init__(self, library, path):
        self.library, self.tokenizer = library, ctypes.c_void_p()
        message = ctypes.create_string_buffer(504)
        if library.llm_tokenizer_load(ctypes.byref(self.tokenizer), os.fsencode(path), None, message):
            sys.exit(message.raw[4:].split(b"\0")[0].decode())

    def encode(self, text):
        room = len(text) + 8
        ids = (ctypes.c_int32 * room)()
        begin = time.perf_counter()
        n = self.library.llm_encode(self.tokenizer, text, ctypes.c_size_t(len(text)), 0, ids, ctypes.c_size_t(room), None)
        return time.perf_counter() - begin, ids[:n]


def load_library(path):
    library = ctypes.CDLL(os.path.abspath(path))
    library.llm_encode.restype = ctypes.c_int64
    return library


def timed(encode, text):
    begin = time.perf_counter()
    ids = encode(text)
    return time.perf_counter() - begin, ids


def tiktoken_of(vocabulary):
    """Makes a tiktoken encoding with the same merges and words. Pieces are ranked by their ids, which must be in the order of the
    merges."""
    byte_of = {c: b for b, c in enumerate(reference_alphabet())}
    specials = set(vocabulary.of_type(reference.CONTROL, reference.UNKNOWN))
    ranks = {bytes(byte_of[c] for c in token): i for i, token in enumerate(vocabulary.tokens) if token not in specials}
    words = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
    for byte in range(256): # tiktoken needs all bytes, also those that the vocabulary lacks
        ranks.setdefault(bytes([byte]), len(vocabulary.tokens) + byte)
    return tiktoken.Encoding("model", pat_str=words, mergeable_ranks=ranks, special_tokens={})


def reference_alphabet():
    """Returns the character that represents each byte in byte-level pieces."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for i, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    print()


def quicktok_of(path, folder):
    quicktok.import_tokenizer(path, "model", data_dir=folder)
    return quicktok.Tokenizer("model", folder)


def others(vocabulary, theirs):
    """Returns the encode functions of the other tokenizers, by name. Some cannot read every vocabulary."""
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tokenizer.json")
        theirs.save(path)
        for name, make in {
            "gigatoken": lambda: gigatoken.Tokenizer(path).encode,
            "quicktok": lambda: quicktok_of(path, folder).encode_ordinary,
            "tiktoken": lambda: tiktoken_of(vocabulary).encode_ordinary,
        }.items():
            try:
                made[name] = make()
            except Exception as error:
                print(f"{name} cannot read this vocabulary: {str(error).splitlines()[0]}")
    return made


def compare(library, model, name, data):
    text = data.decode()
    lines = text.splitlines(keepends=True)
    vocabulary = reference.Vocabulary(model)
    ours, theirs = Ours(library, model), reference.byte_level(vocabulary)
    contestants = {
        "llm.h": lambda: ours.encode(data),
        "tokenizers, the whole text": lambda: timed(lambda t: theirs.encode(t).ids, text),
        "tokenizers, by lines": lambda: timed(lambda t: [i for line in t for i in theirs.encode(line).ids], lines),
    }
    for other, encode in others(vocabulary, theirs).items():
        contestants[other] = lambda encode=encode, text=data if other == "gigatoken" else text: timed(encode, text)
    seconds, ids = {}, {}
    if "gigatoken" in contestants:
        took, ids["gigatoken, first call"] = contestants["gigatoken"]()
        seconds["gigatoken, first call"] = [took]
    for _ in range(REPEATS):
        for contestant, run in contestants.items():
            took, ids[contestant] = run()
            seconds.setdefault(contestant, []).append(took)
    rows = [["one thread", "MB/s, median", "slowest", "fastest", "tokens", "ids as ours"]]
    for contestant, list_ in seconds.items():
        speeds = [len(data) / s / 1e6 for s in list_]
        same = "yes" if numpy.array_equal(ids[contestant], ids["llm.h"]) else "no"
        count = str(len(ids[contestant]))
        rows.append([contestant, f"{statistics.median(speeds):.1f}", f"{min(speeds):.1f}", f"{max(speeds):.1f}", count, same])
    print(f"{name}, {len(data) / 1e6:.2f} MB, {os.path.basename(model)}\n")
    table(rows)


def best(ours, text):
    return min(ours.encode(text)[0] for _ in range(REPEATS))


def random_words(n):
    """Returns n words of a space and 7 random letters each, as an array [n, 8] of bytes."""
    letters = numpy.random.default_rng(1).integers(ord("a"), ord("z") + 1, (n, 7), dtype=numpy.uint8)
    return numpy.hstack([numpy.full((n, 1), ord(" "), numpy.uint8), letters])


def all_different(n_bytes):
    """Words that occur once, so that the library's memory of words never helps."""
    words = numpy.unique(random_words(n_bytes // 8 + 1000).view("<u8"))
    return numpy.random.default_rng(2).permutation(words).tobytes()[:n_bytes]


def on_one_line(n_bytes):
    """Few words, which all belong into the same line of the memory of words, which has room for two: each puts out another one. The
    hash is that of llm__enc_see in llm.h."""
    words = random_words(1 << 21)
    key = words.view("<u8").ravel() ^ numpy.uint64((8 << 56) * 0xD6E8FEB86659FD93 % 2**64)
    lines = (key * numpy.uint64(0x9E3779B97F4A7C15)) >> numpy.uint64(64 - KNOWN_BITS)
    words = words[lines == numpy.bincount(lines.astype(numpy.int64)).argmax()].tobytes()
    return (words * (n_bytes // len(words) + 1))[:n_bytes]


def linear(library, model, prose):
    """Prints the time for 1 MB of texts that are hard in one way, relative to 1 MB of prose."""
    folders = [path.parent for path in sorted((TOP / "tests/golden/tokenizers").glob("*/tokenizer.*"))]
    repeated = {f'"{unit}"': (unit.encode() * len(prose))[: len(prose)] for unit in UNITS}
    words = {"all words differ": all_different(len(prose)), "words on one line": on_one_line(len(prose))}
    rows, worst = [["tokenizer", "prose, ms", *repeated, *words]], 0
    for path in [model, *folders]:
        ours = Ours(library, path)
        base = best(ours, prose)
        ratios = [best(ours, text) / base for text in [*repeated.values(), *words.values()]]
        worst = max(worst, *ratios[: len(repeated)])
        rows.append([os.path.basename(path), f"{1e3 * base:.1f}"] + [f"{ratio:.2f}" for ratio in ratios])
    print(f"Time for 1 MB of one repeated text (at most {MOST_RATIO}), and of random words, relative to 1 MB of prose\n")
    table(rows)
    if worst > MOST_RATIO:
        sys.exit(f"{worst:.2f} times the time of prose is too much.")


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    library, model, prose = load_library(sys.argv[1]), sys.argv[2], hellaswag()
    compare(library, model, FILE, prose)
    for path in sys.argv[3:]:
        compare(library, model, os.path.basename(path), pathlib.Path(path).read_bytes())
    linear(library, model, prose[: 1 << 20])


main()
