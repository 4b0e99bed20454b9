#!/usr/bin/env python3
"""Writes tests/golden/beside.jsonl: how transformers uses the tokens in tokenizer_config.json together with tokenizer.json.

    pip install transformers==5.24.0
    python3 tokenizer/beside.py tests/golden/beside.jsonl

The first line is the tokenizer.json. Each other line has a tokenizer_config.json and texts with their ids."""

import json
import pathlib
import sys
import tempfile

from transformers import AutoTokenizer


def token(content, **flags):
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True, **flags}


LETTERS = "abcnostuvwx<>|/!"
VOCABULARY = [*LETTERS, "\u0120", "\u010a", "no", "not"]
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [{"id": 20, **token("<|n|>")}], "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
              "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
              "vocab": {piece: i for i, piece in enumerate(VOCABULARY)}, "merges": ["n o", "no t"]},
}
CONFIGS = [
    {},
    {"bos_token": "", "eos_token": ""},
    {"bos_token": None, "eos_token": "<|n|>"},
    {"bos_token": "<s>"},
    {"pad_token": "<t>", "bos_token": "<s>", "unk_token": "<u>"},
    {"additional_special_tokens": ["<s>", "<|n|>", "<t>"], "pad_token": "<t>"},
    {"extra_special_tokens": ["<s>"]},
    {"eos_token": "not"},
    {"eos_token": token("not", rstrip=True, __type="AddedToken")},
    {"eos_token": token("<|n|>", rstrip=True, __type="AddedToken")},
    {"added_tokens_decoder": {"20": token("<|n|>"), "21": token("<s>", special=False), "22": token("<t>")}},
    {"added_tokens_decoder": {"20": token("<|n|>", rstrip=True)}},
    {"added_tokens_decoder": {"20": token("<|n|>", special=False, lstrip=True)}},
    {"added_tokens_decoder": {"22": token("<t>", single_word=True), "21": token("<s>", lstrip=True)}},
    {"added_tokens_decoder": {"400": token("<t>"), "300": token("<s>")}, "bos_token": "<u>"},
    {"added_tokens_decoder": {"300": token("<|n|>", rstrip=True)}},
    {"added_tokens_decoder": {"20": token("<s>")}},
    {"added_tokens_decoder": {"19": token("not", special=False)}},
    {"added_tokens_decoder": {"300": token("not", special=False)}},
]
TEXTS = ["ab <s>  <t> \n<u>", "not a<|n|>  b", "no <|n|>\n\nnot", "x<t>x <s>not <|n|>not"]


def main(output):
    with tempfile.TemporaryDirectory() as folder, open(output, "w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(TOKENIZER, separators=(",", ":")) + "\n")
        (pathlib.Path(folder) / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        for config in CONFIGS:
            whole = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
            (pathlib.Path(folder) / "tokenizer_config.json").write_text(json.dumps(whole))
            tokenizer = AutoTokenizer.from_pretrained(folder)
            line = {"config": whole, "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "n_vocab": len(tokenizer),
                    "texts": [[text, tokenizer.encode(text, add_special_tokens=False)] for text in TEXTS]}
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
