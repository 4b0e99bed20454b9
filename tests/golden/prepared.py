#!/usr/bin/env python3
"""Writes prepared.jsonl: questions with all kinds of letters, prepared by the LM evaluation harness as for HellaSwag.

    pip install --no-deps lm-eval==0.4.13
    python3 prepared.py prepared.jsonl

Each line is a question in the form of the data set, with the "query" and "choices" from the harness's process_docs.
"""
import importlib.util
import json
import os
import random
import sys
import types

sys.modules["datasets"] = types.ModuleType("datasets")  # the harness only mentions one of its types
sys.modules["datasets"].Dataset = list


class Documents(list):
    """The part of a Hugging Face data set that process_docs needs."""

    def map(self, function):
        return [function(document) for document in self]


SPACES = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
NO_SPACES = "\u180e\u200b\u2060\ufeff"
TITLES = [chr(c) for c in range(0x80, 0x20000) if not 0xD800 <= c < 0xE000 and len(chr(c).title()) > 1]
OTHERS = ["ǆ", "Ǆ", "ǅ", "ǉ", "ı", "İ", "ſ", "ÿ", "µ", "ⅷ", "ⓐ", "ꭰ", "Ꭰ", "ა", "Ა", "ⱥ", "Ⱥ", "K", "Å", "ᲀ", "𐐨", "𞤢", "ﬀ", "é", "e\u0301", "1", "中", "'", "ˀ", "ª", "ͅ"]
PIECES = ["Σ", "ΣΑΣ", "ς", "σ", "Α", "ά", "DER", "weg", "Ü", "ß", "ẞ", "ИВАН", "ы", "Ĳ", "ǆ", "İ", "I", "ﬃ", ".", "'", "’", ":", "\u0301", "\u00ad", "-", " ", "  ", "   ",
          "\u3000", "\xa0", "\x1f", " [title]", "[title]", "[step]", "[", "]", "[x\ny]", "\n", "[substeps] ", "中文", "日本", "ا", "ह", "1", "ʼ", "·", "，", "😀"]


def main(target):
    path = os.path.join(os.path.dirname(importlib.util.find_spec("lm_eval").origin), "tasks", "hellaswag", "utils.py")
    spec = importlib.util.spec_from_file_location("hellaswag_utils", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    random.seed(1)
    some = lambda n: "".join(random.choice(PIECES) for _ in range(random.randint(0, n)))  # noqa: E731
    texts = [letter + tail for letter in TITLES + OTHERS for tail in ("", letter + "ÀΣ")]
    texts += [space + "Ab " + space for space in SPACES + NO_SPACES] + [some(8) for _ in range(600)]
    questions = []
    for text in texts:
        questions.append({"activity_label": some(2), "ctx_a": some(3), "ctx_b": text, "endings": [text, some(4), some(4), some(4)], "label": 0})
    with open(target, "w", encoding="utf-8", newline="\n") as file:
        for question, done in zip(questions, module.process_docs(Documents(questions))):
            file.write(json.dumps({**question, "query": done["query"], "choices": done["choices"]}, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
