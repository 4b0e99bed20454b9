#!/usr/bin/env python3
"""Writes tests/golden/tokenizers/llama-3-meta: a small tokenizer.model in the format of Meta's Llama 3, trained by
`tiktoken`, and texts with the ids of `tiktoken`, which uses the rule and the special tokens of
https://github.com/meta-llama/llama-models/blob/main/models/llama3/tokenizer.py

    pip install tiktoken==0.14.0 tokenizers sentencepiece gguf protobuf unicodedataplus==16.0.0.post1
    python3 tokenizer/meta.py tests/golden/tokenizers

families.py describes the lines of llama-3-meta.jsonl.
"""
import base64
import json
import pathlib
import sys

import tiktoken
from tiktoken._educational import bpe_train

import families
import reference

NAMED = ("begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id step_id start_header_id "
         "end_header_id eom_id eot_id python_tag image").split()
SPECIAL = [f"<|{name}|>" for name in NAMED + [f"reserved_special_token_{i}" for i in range(2, 246)]]


def encoding(ranks):
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    return tiktoken.Encoding(name="llama-3", pat_str=reference.LLAMA3, mergeable_ranks=ranks, special_tokens=special)


def main(directory):
    directory = pathlib.Path(directory)
    ranks = bpe_train("\n".join(reference.LINES), 420, reference.LLAMA3, visualise=None)
    for piece in (" dog", "jumps", "qu"):  # no merge produces these
        ranks.setdefault(piece.encode(), len(ranks))
    folder = directory / "llama-3-meta"
    folder.mkdir(exist_ok=True)
    lines = [f"{base64.b64encode(piece).decode()} {rank}\n" for piece, rank in ranks.items()]
    (folder / "tokenizer.model").write_text("".join(lines), newline="\n")
    (folder / "params.json").write_text(json.dumps({"vocab_size": len(ranks) + len(SPECIAL)}) + "\n", newline="\n")
    model = encoding(ranks)
    bos = model.encode_single_token("<|begin_of_text|>")

    def encode(text):
        ids = model.encode(text, allowed_special="all")
        plain = model.encode(text, disallowed_special=())
        shown = model.decode(ids)
        return ids, plain, [bos] + ids, model.decode([i for i in ids if i < len(ranks)]), shown

    few = ["<|begin_of_text|>", "<|eot_id|>", "<|python_tag|>", "<|reserved_special_token_245|>"]
    texts = families.extra_texts(few) + reference.texts(600, few, seed=3, size=4)[75:][:: 525 // families.COUNT]
    texts = [text for text in dict.fromkeys(texts) if len(text) < 120]
    texts += [" " * 300 + "x", "abc" * 100 + "1" * 100, "\n" * 100 + "\t" * 100]
    families.write_lines(directory / "llama-3-meta.jsonl", texts, encode)


if __name__ == "__main__":
    main(*sys.argv[1:])
