#!/usr/bin/env python3
"""Compares build/tokenize with the reference tokenizers on many texts, for any number of GGUF files.

    python3 tokenizer/compare.py [-n 20000] [--as WHAT] [--pre NAME] FILE.gguf ...

--as gguf           build/tokenize reads the GGUF file; SentencePiece vocabularies are compared with Hugging Face's tokenizers
     sentencepiece  the same, but compared with sentencepiece, which does not recognise special tokens in texts
     json           build/tokenize reads the tokenizer.json saved by Hugging Face's tokenizers
     first, split   the same for a SentencePiece vocabulary with Metaspace "first" or "split" instead of a normalizer
     model          build/tokenize reads a tokenizer.model, compared with sentencepiece
--pre               for --as json: a pre-tokenizer other than the file's
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

import reference


def run(tool, model, texts, *flags):
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    done = subprocess.run([tool, "-m", model, "--json", *flags], input=lines, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[:-1]


def prepare(args, path, vocabulary, directory):
    """Returns the path that build/tokenize reads, and the reference tokenizer."""
    if args.what in ("sentencepiece", "model"):
        model = reference.sentencepiece_model(vocabulary)
        if args.what == "model":
            path = os.path.join(directory, "tokenizer.model")
            with open(path, "wb") as file:
                file.write(model)
        return path, reference.SentencePiece(model)
    if vocabulary.model == "llama":
        tokenizer = reference.characters(vocabulary, args.what if args.what in ("first", "split") else "legacy")
    else:
        tokenizer = reference.byte_level(vocabulary, args.pre)
    if args.what != "gguf":
        path = directory
        tokenizer.save(os.path.join(directory, "tokenizer.json"))
    return path, reference.HuggingFace(tokenizer)


def compare(args, path, directory):
    vocabulary = reference.Vocabulary(path)
    model, tokenizer = prepare(args, path, vocabulary, directory)
    specials = vocabulary.of_type(reference.CONTROL, reference.USER_DEFINED)[:200]
    texts = reference.texts(args.count, specials, seed=args.seed, size=12)
    wrong = n_encoded = 0
    for flags in (["--special"], []):
        if flags and isinstance(tokenizer, reference.SentencePiece):
            continue
        ours = [[int(i) for i in line.split()] for line in run(args.tool, model, texts, *flags)]
        assert len(ours) == len(texts)
        for text, ids in zip(texts, ours):
            expected = tokenizer.encode(text, special=bool(flags))
            n_encoded += 1
            if ids != expected:
                wrong += 1
                if wrong <= args.show:
                    print(f"  {flags} {text!r}\n    ours     {ids}\n    expected {expected}")
    ids = [tokenizer.encode(text, special=isinstance(tokenizer, reference.HuggingFace)) for text in texts]
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
    name = " ".join([os.path.basename(path), "as", args.what] + ([args.pre] if args.pre else []))
    print(f"{name}: {wrong} of {n_encoded} encodings differ, {wrong_back} of {len(ids)} decodings", flush=True)
    return wrong + wrong_back


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--count", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--show", type=int, default=5)
    parser.add_argument("--tool", default="build/tokenize")
    parser.add_argument("--as", dest="what", default="gguf", choices=["gguf", "sentencepiece", "json", "first", "split", "model"])
    parser.add_argument("--pre", choices=sorted(reference.PRE_TOKENIZERS))
    parser.add_argument("models", nargs="+")
    args = parser.parse_args()
    wrong = 0
    for model in args.models:
        with tempfile.TemporaryDirectory() as directory:
            wrong += compare(args, model, directory)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
