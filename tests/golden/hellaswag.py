#!/usr/bin/env python3
"""Reference for scoring: the questions of tests/hellaswag.jsonl, prepared and tokenized by the LM evaluation harness, and
the log-likelihoods of their endings from a float64 forward pass.

    pip install --no-deps lm-eval==0.4.13
    pip install numpy tqdm jinja2 pyyaml tokenizers sentencepiece gguf protobuf unicodedataplus==16.0.0.post1
    python3 hellaswag.py MODEL.gguf ../hellaswag.jsonl hellaswag.golden

The texts come from the harness's process_docs, the ids from its _encode_pair with Hugging Face `tokenizers`, and the
probabilities from logits.py. Each line of the file is a question,

    {"query", "choices", "gold", "context": [ids], "endings": [[ids] * 4], "log_likelihoods": [4]}

and the last line has the accuracies as the harness computes them: {"acc", "acc_norm"} in percent.
"""
import importlib.util
import json
import os
import sys
import types

import numpy as np

import logits

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", "..", "tokenizer"))
sys.modules["datasets"] = types.ModuleType("datasets")  # the harness only mentions one of its types
sys.modules["datasets"].Dataset = list

from lm_eval.api.model import TemplateLM  # noqa: E402
import reference  # noqa: E402


class Documents(list):
    """The part of a Hugging Face data set that process_docs needs."""

    def map(self, function):
        return [function(document) for document in self]


def harness_task():
    path = os.path.join(os.path.dirname(importlib.util.find_spec("lm_eval").origin), "tasks", "hellaswag", "utils.py")
    spec = importlib.util.spec_from_file_location("hellaswag_utils", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Encoder:
    """The part of a model that _encode_pair needs."""

    backend = "causal"

    def __init__(self, path):
        self.tokenizer = reference.byte_level(reference.Vocabulary(path))

    def tok_encode(self, text, **_):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def pair(self, context, continuation):
        return TemplateLM._encode_pair(self, context, continuation)


def load_once(load):
    decoded = {}

    def loaded(tensors, name):
        if name not in decoded:
            decoded[name] = load(tensors, name)
        return decoded[name]

    return loaded


def log_likelihood(meta, tensors, context, ending):
    tokens = (context + ending)[:-1]
    rows = logits.forward(meta, tensors, tokens)[len(context) - 1:]
    top = rows.max(axis=1, keepdims=True)
    log_sums = top[:, 0] + np.log(np.exp(rows - top).sum(axis=1))
    return float((rows[np.arange(len(ending)), ending] - log_sums).sum())


def main(model, questions, target):
    with open(questions, encoding="utf-8") as file:
        documents = harness_task().process_docs(Documents(json.loads(line) for line in file))
    encoder = Encoder(model)
    meta, tensors = logits.read_gguf(model)
    logits.load = load_once(logits.load)
    right = right_norm = 0
    with open(target, "w", encoding="utf-8", newline="\n") as out:
        for document in documents:
            pairs = [encoder.pair(document["query"], " " + choice) for choice in document["choices"]]
            sums = np.array([log_likelihood(meta, tensors, *pair) for pair in pairs])
            lengths = np.array([float(len(choice)) for choice in document["choices"]])
            right += int(np.argmax(sums) == document["gold"])
            right_norm += int(np.argmax(sums / lengths) == document["gold"])
            out.write(json.dumps({**document, "context": pairs[0][0], "endings": [ids for _, ids in pairs],
                                  "log_likelihoods": sums.tolist()}, ensure_ascii=False) + "\n")
        out.write(json.dumps({"acc": 100 * right / len(documents), "acc_norm": 100 * right_norm / len(documents)}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
