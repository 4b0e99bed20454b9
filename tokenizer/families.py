#!/usr/bin/env python3
"""Writes tests/golden/tokenizers: small vocabularies of each kind, saved by Hugging Face's `tokenizers` and `sentencepiece`,
and texts with the ids that these programs give.

    python3 tokenizer/families.py tests/golden/tokenizers

NAME/ is a directory in the form in which it is published with a model. NAME.jsonl has lines
[text, ids, plain ids, whole ids, decoded, shown]:
    ids         with special tokens recognised (null: not known)
    plain ids   without (`encode_special_tokens`; null: the same)
    whole ids   with the tokens that the file's post-processor adds (null: the same)
    decoded     the text of the ids without special tokens (null: equal to text)
    shown       the text of the ids with special tokens (null: equal to decoded)
decoded and shown are false if the reference shows a character that was not in the text: for an unknown token, or an added
token that could be mistaken for bytes.
"""

import io
import json
import os
import sys

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.processors import TemplateProcessing

import reference

COUNT = 100
LATIN = reference.LINES[:3] + reference.LINES[17:23]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def dump(value, path):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")


def learn(pre_tokenizer, normalizer, size, alphabet):
    """Learns a vocabulary and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(reference.LINES * 2, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, limit_alphabet=len(alphabet) or 150, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def byte_level(pre, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), added=(), bos=None, eos=None, ignore_merges=None, unseen=()):
    """`unseen`: pieces that no merge produces."""
    pre_tokenizer, normalizer, ignores = reference.PRE_TOKENIZERS[pre] if isinstance(pre, str) else (pre, None, False)
    vocab, merges = learn(pre_tokenizer, normalizer, 420, sorted(ByteLevel.alphabet()))
    for piece in unseen:
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignores if ignore_merges is None else ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    return finish(tokenizer, special, added, bos, eos)


def characters(normalizer, pre_tokenizer, special=("<unk>", "<s>", "</s>"), added=(), fallback=True, fuse=True, bos="<s>", eos=None):
    vocab, merges = learn(pre_tokenizer or Metaspace("▁"), None, 330, [])
    tokens = list(special) + (BYTES if fallback else []) + sorted(vocab, key=vocab.get)
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=fuse, byte_fallback=fallback))
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return finish(tokenizer, special, added, bos, eos)


def finish(tokenizer, special, added, bos, eos):
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    for token in added:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    around = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token]
    if around:
        tokenizer.post_processor = TemplateProcessing(single=f"{bos or ''} $A {eos or ''}".strip(), special_tokens=around)
    return tokenizer


LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
FLAGS = [
    AddedToken("<mask>", lstrip=True, normalized=False, special=True),
    AddedToken("<|user|>", rstrip=True, normalized=False, special=True),
    AddedToken("<both>", lstrip=True, rstrip=True, normalized=False),
    AddedToken("word", single_word=True, normalized=False),
    AddedToken("the", normalized=False),
    AddedToken("<é>", normalized=True),
    AddedToken("<|im", normalized=True),
    AddedToken("    ", normalized=False),
]
FAMILIES = {
    "gpt-2": lambda: byte_level("gpt-2"),
    "mpt": lambda: byte_level("mpt"),
    "smollm": lambda: byte_level("smollm"),
    "llama-3": lambda: byte_level("llama-bpe", bos="<|endoftext|>", unseen=["Ġdog", "jumps", "qu"]),
    "qwen2": lambda: byte_level("qwen2"),
    "gpt-4o": lambda: byte_level("gpt-4o"),
    "tekken": lambda: byte_level("tekken", bos="<|im_start|>", eos="<|im_end|>"),
    "falcon": lambda: byte_level("falcon"),
    "deepseek-coder": lambda: byte_level("deepseek-coder"),
    "prefix-space": lambda: byte_level(ByteLevel(add_prefix_space=True)),
    "added": lambda: byte_level("qwen2", added=FLAGS),
    "llama-2": lambda: characters(LEGACY, None),
    "llama-2-added": lambda: characters(LEGACY, None, added=[token for token in FLAGS if token.content != "<é>"], eos="</s>"),
    "llama-2-first": lambda: characters(None, Metaspace("▁", prepend_scheme="first", split=False)),
    "metaspace": lambda: characters(None, Metaspace("▁")),
    "unknown": lambda: characters(LEGACY, None, fallback=False),
    "unknown-each": lambda: characters(None, Metaspace("▁", prepend_scheme="never"), fallback=False, fuse=False),
}
SPM = {
    "spm": {"byte_fallback": True},
    "spm-symbols": {"byte_fallback": True, "user_defined_symbols": ["<u>", "▁▁▁▁", "fox", "<u>x"], "control_symbols": ["<c>"]},
    "spm-plain": {"byte_fallback": False, "add_dummy_prefix": False, "bos_id": -1, "unk_id": 3, "eos_id": 0},
}


def extra_texts(tokens):
    words = [" word ", "sword word", "word", "x<mask> y", "a  <mask>", "<|user|>  a", " <both> ", "the other", "<e\u0301>", "<é>", "<|imx", "<|im_start|>",
             "        x", "<u>", "a<u>xb", "fox<u>", " <u>", "▁▁▁▁▁x", "<c>", "a\u0338b", "x日y日", "日日X", "<s>a", "a<s> b</s>"]
    return words + [f"{a}{token}{b}" for token in tokens[:6] for a, b in (("", "a"), ("a ", " b"))]


def write_lines(path, texts, encode):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for text in texts:
            ids, plain, whole, decoded, shown = encode(text)
            if "\ufffd" in decoded + (shown or "") or "⁇" in decoded:
                decoded = shown = False
            same = [None if a == b else a for a, b in ((plain, ids), (whole, ids or plain), (decoded, text), (shown, decoded))]
            line = [text, ids] + same
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")


def hugging_face(name, directory):
    tokenizer = FAMILIES[name]()
    os.makedirs(os.path.join(directory, name), exist_ok=True)
    saved = json.loads(tokenizer.to_str())
    if name in ("gpt-2", "llama-2"):  # as older files have them
        saved["model"]["merges"] = [" ".join(merge) for merge in saved["model"]["merges"]]
    dump(saved, os.path.join(directory, name, "tokenizer.json"))

    def encode(text):
        tokenizer.encode_special_tokens = True
        plain = tokenizer.encode(text, add_special_tokens=False).ids
        tokenizer.encode_special_tokens = False
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        whole = tokenizer.encode(text).ids
        return ids, plain, whole, tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=False)

    tokens = [token["content"] for token in saved["added_tokens"]]
    texts = list(dict.fromkeys(extra_texts(tokens) + reference.texts(600, tokens, seed=3, size=4)[75:][:: 525 // COUNT]))
    write_lines(os.path.join(directory, name + ".jsonl"), [text for text in texts if len(text) < 120], encode)


def sentence_piece(name, directory):
    os.makedirs(os.path.join(directory, name), exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LATIN), model_writer=model, model_type="bpe", vocab_size=480 if SPM[name]["byte_fallback"] else 220,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98, minloglevel=2,
        allow_whitespace_only_pieces=True, **SPM[name])
    with open(os.path.join(directory, name, "tokenizer.model"), "wb") as file:
        file.write(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())

    def encode(text):
        ids = processor.encode(text)
        bos = processor.bos_id()
        return None, ids, ([bos] if bos >= 0 else []) + ids, processor.decode(ids), None

    texts = list(dict.fromkeys(extra_texts([]) + reference.texts(600, ["<u>", "fox"], seed=3, size=4)[75:][:: 525 // COUNT]))
    write_lines(os.path.join(directory, name + ".jsonl"), [text for text in texts if len(text) < 120], encode)


def main(directory):
    for name in FAMILIES:
        hugging_face(name, directory)
    for name in SPM:
        sentence_piece(name, directory)


if __name__ == "__main__":
    main(*sys.argv[1:])
