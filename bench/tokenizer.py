#!/usr/bin/env python3
"""Compares tokenizers on one thread of one core, with published vocabularies and texts of several kinds (vocabularies.py, texts.py).

    make bench-tokenizer [FILL=100] [TEXTS="FILE ..."]      or, with the packages named in the Makefile:
    bench/tokenizer.py build/libllm.so MODEL.gguf [FILE ...] [--vocabularies "Qwen 2,GPT-2"] [--texts code,Chinese] [--fill MB]

Three tables follow. Encoding: MB/s of this library, gigatoken and quicktok, medians of alternating rounds, then of tiktoken and Hugging
Face's `tokenizers` on a sample, since they are slow. gigatoken remembers words from one call for the next, so each round makes a new
tokenizer: its first call is compared, and its second shown. This library keeps nothing between calls. Loading: from GGUF and from
tokenizer.json. Last, a megabyte of texts that slow tokenizers down is compared with a megabyte of prose. Texts have at most 10 MB; with
--fill they have as many as it says. All times are CPU times of the process, so other programs do not count.
"""

import argparse
import contextlib
import ctypes
import io
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
import unicodedata

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
if hasattr(os, "sched_setaffinity"): # must come before the libraries count the cores
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import gigatoken  # noqa: E402
import numpy  # noqa: E402
import quicktok  # noqa: E402
import tiktoken  # noqa: E402
import tokenizers  # noqa: E402

import texts  # noqa: E402
import vocabularies  # noqa: E402
from vocabularies import TOP, reference  # noqa: E402

ROUNDS = 5
LOADS = 25
TRIES = 11 # of which the best counts
MB = 10
SAMPLE = 300000 # bytes of a text for the slow ones
UNITS = ["a", " ", "ab"]
MOST_RATIO = 3
MOST_MS = {"GGUF": 15, "tokenizer.json": 60}
SPEEDS = ["llm.h", "gigatoken", "later", "quicktok", "tiktoken", "tokenizers"]
KNOWN_BITS = 16 # a text of 1 MB remembers words in a table of 2^16 lines
TIKTOKEN_WORDS = {
    "GPT-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "SmolLM": r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+",
    "Llama 3": reference.LLAMA3,
    "Qwen 2": reference.QWEN2,
    "Tekken": reference.TEKKEN,
}


class Ours:
    """The caller provides the memory for the results. It has been written before, as in a program that encodes many texts."""

    def __init__(self, library, path):
        self.library, self.tokenizer = library, ctypes.c_void_p()
        self.ids, self.text = numpy.ones(0, numpy.int32), numpy.ones(0, numpy.uint8)
        message = ctypes.create_string_buffer(504)
        if library.llm_tokenizer_load(ctypes.byref(self.tokenizer), os.fsencode(path), None, message):
            sys.exit(message.raw[4:].split(b"\0")[0].decode())

    def free(self):
        self.library.llm_tokenizer_free(self.tokenizer)

    def encode(self, text):
        if len(self.ids) < len(text) + 8:
            self.ids = numpy.ones(len(text) + 8, numpy.int32)
        n = self.library.llm_encode(self.tokenizer, text, ctypes.c_size_t(len(text)), 0, self.ids.ctypes.data_as(ctypes.c_void_p),
                                    ctypes.c_size_t(len(self.ids)), None)
        return self.ids[:n]

    def decode(self, ids):
        if len(self.text) < 16 * len(ids):
            self.text = numpy.ones(16 * len(ids), numpy.uint8)
        n = self.library.llm_decode(self.tokenizer, ids.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(len(ids)), 0,
                                    self.text.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(len(self.text)))
        return self.text[:n]


def load_library(path):
    library = ctypes.CDLL(os.path.abspath(path))
    library.llm_encode.restype = ctypes.c_int64
    library.llm_decode.restype = ctypes.c_size_t
    library.llm_tokenizer_free.restype = None
    return library


def timed(function, *arguments):
    begin = time.process_time()
    result = function(*arguments)
    return time.process_time() - begin, result


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


def header(cells):
    print("| " + " | ".join(cells) + " |\n|" + " --- |" * len(cells), flush=True)


def row(cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def tiktoken_of(path, words):
    """Makes a tiktoken encoding from a tokenizer.json. Pieces are ranked by their ids, which must be in the order of the merges."""
    file = json.loads(pathlib.Path(path).read_text())
    byte_of = {c: b for b, c in enumerate(vocabularies.byte_alphabet())}
    added = {token["content"] for token in file["added_tokens"]}
    ranks = {bytes(byte_of[c] for c in piece): i for piece, i in file["model"]["vocab"].items() if piece not in added}
    encoding = tiktoken.Encoding("model", pat_str=words, mergeable_ranks=ranks, special_tokens={})
    composes = (file["normalizer"] or {}).get("type") == "NFC"
    return lambda text: encoding.encode_ordinary(unicodedata.normalize("NFC", text) if composes else text)


def quicktok_of(path):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        quicktok.import_tokenizer(path, "model", data_dir=folder)
        return quicktok.Tokenizer("model", folder)


class Contestants:
    """All tokenizers with one vocabulary; None for those that cannot read it."""

    def __init__(self, library, name, folder):
        self.name, self.folder, self.file = name, str(folder), str(folder / "tokenizer.json")
        self.ours, self.theirs = Ours(library, self.folder), tokenizers.Tokenizer.from_file(self.file)
        words = TIKTOKEN_WORDS.get(name)
        self.quicktok = self.made("quicktok", lambda: quicktok_of(self.file).encode_ordinary)
        self.tiktoken = self.made("tiktoken", lambda: tiktoken_of(self.file, words)) if words else None
        self.gigatoken = self.new_gigatoken if self.made("gigatoken", self.new_gigatoken) else None

    def made(self, other, make):
        try:
            return make()
        except Exception as error: # of many types
            print(f"{other} cannot read the vocabulary of {self.name}: {str(error).splitlines()[0][:90]}\n")
            return None

    def new_gigatoken(self):
        made = gigatoken.Tokenizer(self.file)
        made.encode(b"a") # its tables are made by the first call of a process
        return made.encode

    def row(self, name, data):
        """Prints a row of the table of encoding. Returns whether the ids are those of Hugging Face."""
        text, sample = data.decode(), data[:SAMPLE].decode(errors="ignore")
        seconds, speeds, differ = {}, {}, set()
        ids, part = self.ours.encode(data).copy(), self.ours.encode(sample.encode()).copy()
        self.ours.decode(ids)

        def run(who, expected, n_bytes, function, *arguments):
            took, result = timed(function, *arguments)
            seconds.setdefault(who, []).append(took)
            speeds[who] = n_bytes / statistics.median(seconds[who]) / 1e6
            if expected is not None and not numpy.array_equal(result, expected):
                differ.add(who)

        for _ in range(ROUNDS):
            run("llm.h", ids, len(data), self.ours.encode, data)
            if self.gigatoken:
                encode = self.gigatoken()
                run("gigatoken", ids, len(data), encode, data)
                run("later", ids, len(data), encode, data)
            if self.quicktok:
                run("quicktok", ids, len(data), self.quicktok, text)
            run("decode", None, len(data), self.ours.decode, ids)
        if self.tiktoken:
            run("tiktoken", part, len(sample.encode()), self.tiktoken, sample)
        run("tokenizers", part, len(sample.encode()), lambda: self.theirs.encode(sample, add_special_tokens=False).ids)
        ratios = [theirs / ours for theirs, ours in zip(seconds.get("gigatoken", []), seconds["llm.h"])]
        row([self.name, name] + [f"{speeds[who]:.3g}" if who in speeds else "" for who in SPEEDS]
            + [f"{statistics.median(ratios):.2f}" if ratios else "", "no: " + ", ".join(sorted(differ)) if differ else "yes",
               f"{speeds['decode'] / 1e3:.2f}"])
        return "tokenizers" not in differ


def encoding(all_contestants, data):
    """Prints the table of encoding. Returns whether all ids are those of Hugging Face."""
    print(f"MB/s, one thread; medians of {ROUNDS} rounds, tiktoken and tokenizers once with {SAMPLE / 1e6:.1f} MB: "
          + ", ".join(f"{name} {len(text) / 1e6:.1f} MB" for name, text in data.items()) + "\n")
    header(["vocabulary", "text", "llm.h", "gigatoken, first call", "later call", "quicktok", "tiktoken", "tokenizers",
            "llm.h / gigatoken", "same ids", "decoding, GB/s"])
    same = [contestants.row(name, text) for contestants in all_contestants for name, text in data.items()]
    print()
    return all(same)


def loading(library, all_contestants):
    """Prints how long loading takes, best and median."""
    print(f"Loading, ms, best and median of {LOADS} for llm.h and {ROUNDS} for the others (we want {MOST_MS['GGUF']} from GGUF and "
          f"{MOST_MS['tokenizer.json']} from tokenizer.json for Qwen 2)\n")
    header(["vocabulary", "llm.h, GGUF", "llm.h, tokenizer.json", "gigatoken", "tokenizers"])
    for one in all_contestants:
        makers = [lambda: Ours(library, one.folder + "/vocabulary.gguf"), lambda: Ours(library, one.folder),
                  one.gigatoken, lambda: tokenizers.Tokenizer.from_file(one.file)]
        seconds = [[], [], [], []]
        for i in range(LOADS):
            for list_, make in zip(seconds, makers if i < ROUNDS else makers[:2]):
                took, made = timed(make) if make else (0, None)
                list_.append(1e3 * took)
                if isinstance(made, Ours):
                    made.free()
        row([one.name] + [f"{min(list_):.1f}, {statistics.median(list_):.1f}" if make else "" for list_, make in zip(seconds, makers)])
    print()


def best(ours, text):
    ours.encode(text)
    return min(timed(ours.encode, text)[0] for _ in range(TRIES))


def linear(library, folders, prose):
    """Prints the time for 1 MB of texts that are hard in one way, relative to 1 MB of prose. Returns whether none takes too long."""
    golden = {path.parent.name: path.parent for path in sorted((TOP / "tests/golden/tokenizers").glob("*/tokenizer.*"))}
    repeated = {f'"{unit}"': (unit.encode() * len(prose))[: len(prose)] for unit in UNITS}
    words = {"all words differ": all_different(len(prose)), "words on one line": on_one_line(len(prose))}
    print(f"Time for 1 MB of one repeated text (at most {MOST_RATIO}), and of random words, relative to 1 MB of prose\n")
    header(["vocabulary", "prose, ms", *repeated, *words])
    worst = 0
    for name, path in [*folders.items(), *golden.items()]:
        ours = Ours(library, str(path))
        base = best(ours, prose)
        ratios = [best(ours, text) / base for text in [*repeated.values(), *words.values()]]
        worst = max(worst, *ratios[: len(repeated)])
        row([name, f"{1e3 * base:.1f}"] + [f"{ratio:.2f}" for ratio in ratios])
        ours.free()
    print()
    return worst <= MOST_RATIO


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("model")
    parser.add_argument("files", nargs="*", type=pathlib.Path)
    parser.add_argument("--vocabularies", default=",".join(vocabularies.NAMES))
    parser.add_argument("--texts", default=",".join(texts.NAMES))
    parser.add_argument("--fill", type=int, metavar="MB")
    args = parser.parse_args()
    library = load_library(args.library)
    folders = {name: vocabularies.folder_of(name, args.model) for name in args.vocabularies.split(",")}
    n_bytes = 1000000 * (args.fill or MB)
    data = {name: texts.text_of(name, n_bytes, bool(args.fill)) for name in args.texts.split(",")}
    data.update({path.name: path.read_bytes() for path in args.files})
    all_contestants = [Contestants(library, name, folder) for name, folder in folders.items()]
    same = encoding(all_contestants, data)
    loading(library, all_contestants)
    fast = linear(library, folders, texts.text_of("HellaSwag", 1 << 20, False))
    if not same:
        sys.exit("Some ids are not those of Hugging Face.")
    if not fast:
        sys.exit(f"A repeated text takes more than {MOST_RATIO} times as long as prose.")


main()
