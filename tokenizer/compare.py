#!/usr/bin/env python3
"""Compares build/tokenize with the reference tokenizers on many texts, for any number of GGUF files.

    python3 tokenizer/compare.py [-n 20000] [--seed 7] [--tool build/tokenize] FILE.gguf ...
"""

import argparse
import json
import os
import subprocess
import sys

import reference


def run(tool, model, texts, *flags):
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    done = subprocess.run([tool, "-m", model, "--json", *flags], input=lines, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[:-1]


def compare(args, model):
    vocabulary = reference.Vocabulary(model)
    tokenizer = reference.make(vocabulary)
    specials = vocabulary.of_type(reference.CONTROL, reference.USER_DEFINED)[:200]
    texts = reference.texts(args.count, specials, seed=args.seed, size=12)
    wrong = 0
    for flags in (["--special"], []):
        ours = [[int(i) for i in line.split()] for line in run(args.tool, model, texts, *flags)]
        assert len(ours) == len(texts)
        for text, ids in zip(texts, ours):
            expected = tokenizer.encode(text, special=bool(flags))
            if ids != expected:
                wrong += 1
                if wrong <= args.show:
                    print(f"  {flags} {text!r}\n    ours     {ids}\n    expected {expected}")
    ids = [tokenizer.encode(text, special=True) for text in texts]
    lines = "".join(" ".join(map(str, line)) + "\n" for line in ids)
    done = subprocess.run([args.tool, "-m", model, "--json", "-d"], input=lines, capture_output=True, text=True, check=True)
    back = [json.loads(line) for line in done.stdout.split("\n")[:-1]]
    wrong_back = 0
    for line, ours in zip(ids, back):
        expected = tokenizer.decode(line)
        if ours != expected:
            wrong_back += 1
            if wrong_back <= args.show:
                print(f"  decode {line}\n    ours     {ours!r}\n    expected {expected!r}")
    print(f"{os.path.basename(model)}: {wrong} of {2 * len(texts)} encodings differ, {wrong_back} of {len(ids)} decodings", flush=True)
    return wrong + wrong_back


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--count", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--show", type=int, default=5)
    parser.add_argument("--tool", default="build/tokenize")
    parser.add_argument("models", nargs="+")
    args = parser.parse_args()
    sys.exit(1 if sum([compare(args, model) for model in args.models]) else 0)


if __name__ == "__main__":
    main()
