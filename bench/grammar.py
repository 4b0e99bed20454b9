#!/usr/bin/env python3
"""Compares JSON schemas as grammars with xgrammar and llguidance, on one thread: the time to compile each schema, and the time of each
mask while a valid answer is read token by token. The vocabulary is Qwen's (151,646 tokens), from the package dashscope. llm.h applies
the mask to floats, as the sampler needs it; the others only fill bits, so the time to apply them would have to be added. Each schema
begins without stored masks. Times are CPU times, so other programs do not count.

    make bench-grammar [SCHEMAS=FOLDER]      or, with the packages named in the Makefile:
    bench/grammar.py build/libllm.so [--schemas FOLDER] [--sets Github_easy,Github_medium] [--sample 300] [--seconds 300]
                     [--refused] [--slow]

FOLDER is a checkout of https://github.com/guidance-ai/jsonschemabench. Then its schemas follow, with the values that its maskbench has
for each: how many are accepted, how long they take, and which of the values are allowed. All schemas of a set are read by us, a sample
by all three, so that the table has two lines for us. If a sample takes one of them more than --seconds, the rest is left out. --refused lists why we refuse, --slow which schemas take us longest.
"""

import argparse
import collections
import ctypes
import importlib.metadata
import json
import os
import pathlib
import random
import re
import statistics
import sys
import time

if hasattr(os, "sched_setaffinity"): # must come before the libraries count the cores
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import llguidance  # noqa: E402
import llguidance.numpy  # noqa: E402
import numpy  # noqa: E402
import xgrammar  # noqa: E402

import vocabularies  # noqa: E402

TEXT = "A longer text with commas, digits 0123456789, \u00e9\u00e8 and \u65e5\u672c\u8a9e: nothing in it needs an escape."

STRING, WHOLE, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}


def record(**properties):
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


PERSON = record(first_name={"type": "string", "maxLength": 30}, last_name=STRING, age={"type": "integer", "minimum": 0, "maximum": 130},
                email={"type": "string", "pattern": "^[\\w.]+@[\\w.]+\\.[a-z]{2,8}$"}, registered=FLAG)
CASES = { # schema, answer
    "person": (PERSON, {"first_name": "Anna", "last_name": "Huber", "age": 34, "email": "anna.huber@example.org", "registered": True}),
    "people": ({"type": "array", "items": PERSON, "minItems": 1, "maxItems": 5},
               [{"first_name": f"Name {i}", "last_name": TEXT, "age": i, "email": f"a{i}@b.com", "registered": False} for i in range(3)]),
    "order": (record(id={"type": "string", "pattern": "^[A-Z]{3}-\\d{6}$"}, state={"enum": ["open", "paid", "sent", "returned"]},
                     lines={"type": "array", "items": record(article=STRING, count={"type": "integer", "minimum": 1, "maximum": 999},
                                                             price={"type": "number", "minimum": 0})}),
              {"id": "ABC-123456", "state": "sent", "lines": [{"article": "Chair", "count": 4, "price": 49.95},
                                                              {"article": "Table, oak", "count": 1, "price": 399.5}]}),
    "any JSON": ({}, {"a": [1, 2.5e3, None, {"b": TEXT}], "c d": {"e": [True, False, "\u00e9\n"]}}),
    "tree": ({"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {
        "name": STRING, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}}, "required": ["name"],
        "additionalProperties": False}}}, {"name": "root", "children": [{"name": "left"}, {"name": "right", "children": [{"name": "x"}]}]}),
    "call": ({"anyOf": [record(name={"const": "search"}, arguments=record(query=STRING, limit=WHOLE)),
                        record(name={"const": "weather"}, arguments=record(city=STRING, days={"enum": [1, 3, 7]}))]},
             {"name": "weather", "arguments": {"city": "Z\u00fcrich", "days": 3}}),
    "optional": ({"type": "object", "properties": {f"field_{i}": STRING if i % 2 else WHOLE for i in range(20)}},
                 {f"field_{i}": TEXT if i % 2 else i * i for i in range(0, 20, 3)}),
    "map": ({"type": "object", "additionalProperties": {"type": "array", "items": {"type": "number"}}},
            {f"key {i}": [i / 4, i, -i] for i in range(6)}),
}


class Refused(Exception):
    """A schema is not accepted."""


class Ours:
    name = "llm.h"

    def __init__(self, library, folder):
        self.library, self.tokenizer = library, ctypes.c_void_p()
        self.message = ctypes.create_string_buffer(504)
        self.check(library.llm_tokenizer_load(ctypes.byref(self.tokenizer), os.fsencode(folder), None, self.message))
        self.n_vocab = library.llm_tokenizer_n_vocab(self.tokenizer)
        self.logits = numpy.zeros(self.n_vocab, numpy.float32)

    def check(self, status):
        if status:
            raise Refused(self.message.raw[4:].split(b"\0")[0].decode())

    def encode(self, text):
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        n = self.library.llm_encode(self.tokenizer, data, ctypes.c_size_t(len(data)), 0, ids, ctypes.c_size_t(len(ids)), None)
        return ids[:n]

    def compile(self, schema):
        grammar, text = ctypes.c_void_p(), schema.encode()
        begin = time.process_time()
        status = self.library.llm_grammar_from_json_schema(ctypes.byref(grammar), self.tokenizer, text, None, self.message)
        took = time.process_time() - begin
        self.check(status)
        return took, grammar

    def masks(self, grammar, ids):
        """Returns the seconds of each mask, and whether each allowed the next token. Stops at the first that did not."""
        tokens, times = (ctypes.c_int32 * len(ids))(*ids), []
        self.library.llm_grammar_begin(grammar, 0)
        address = self.logits.ctypes.data_as(ctypes.c_void_p)
        for i, token in enumerate(ids):
            self.logits[:] = 0
            begin = time.process_time()
            self.library.llm_grammar_mask(grammar, tokens, i, address, self.n_vocab)
            times.append(time.process_time() - begin)
            if self.logits[token] != 0:
                return times, False
        return times, True

    def free(self, grammar):
        self.library.llm_grammar_free(grammar)


class XGrammar:
    name = "xgrammar"

    def __init__(self, pieces):
        self.info = xgrammar.TokenizerInfo(pieces, vocab_type=xgrammar.VocabType.RAW, vocab_size=len(pieces),
                                           stop_token_ids=[len(pieces) - 3, len(pieces) - 1])

    def compile(self, schema):
        compiler = xgrammar.GrammarCompiler(self.info, max_threads=1, cache_enabled=False)
        begin = time.process_time()
        try:
            grammar = compiler.compile_json_schema(schema, strict_mode=False)
        except Exception as err:  # of several types
            raise Refused(str(err)) from err
        return time.process_time() - begin, grammar

    def masks(self, grammar, ids):
        matcher, times = xgrammar.GrammarMatcher(grammar), []
        bits = xgrammar.allocate_token_bitmask(1, self.info.vocab_size)
        for token in ids:
            begin = time.process_time()
            matcher.fill_next_token_bitmask(bits)
            accepted = matcher.accept_token(token)
            times.append(time.process_time() - begin)
            if not accepted:
                return times, False
        return times, matcher.is_completed() or matcher.accept_token(self.info.stop_token_ids[0])

    def free(self, grammar):
        pass


class LLGuidance:
    name = "llguidance"

    def __init__(self, text):
        self.tokenizer = llguidance.LLTokenizer(text)

    def compile(self, schema):
        begin = time.process_time()
        try:
            matcher = llguidance.LLMatcher(self.tokenizer, llguidance.LLMatcher.grammar_from_json_schema(schema), log_level=0)
        except ValueError as err:
            raise Refused(str(err)) from err
        took = time.process_time() - begin
        if matcher.is_error():
            raise Refused(matcher.get_error())
        return took, matcher

    def masks(self, matcher, ids):
        bits, times = llguidance.numpy.allocate_token_bitmask(1, self.tokenizer.vocab_size), []
        matcher.reset()
        for token in ids:
            begin = time.process_time()
            llguidance.numpy.fill_next_token_bitmask(matcher, bits, 0)
            accepted = matcher.consume_token(token)
            times.append(time.process_time() - begin)
            if not accepted:
                return times, False
        return times, matcher.is_accepting()

    def free(self, grammar):
        pass


def load_library(path):
    library = ctypes.CDLL(os.path.abspath(path))
    library.llm_encode.restype = ctypes.c_int64
    for name in ("llm_grammar_begin", "llm_grammar_free"):
        getattr(library, name).restype = None
    return library


def percentile(values, part):
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def version_of(name):
    return "" if name == "llm.h" else f" {importlib.metadata.version(name)}"


def own_cases(contestants):
    compiled, times = {c.name: [] for c in contestants}, {c.name: [] for c in contestants}
    for _ in range(3):
        for schema, answer in CASES.values():
            schema, ids = json.dumps(schema), contestants[0].encode(json.dumps(answer, ensure_ascii=False))
            for contestant in contestants:
                took, grammar = contestant.compile(schema)
                compiled[contestant.name].append(took)
                masks, allowed = contestant.masks(grammar, ids)
                contestant.free(grammar)
                if not allowed:
                    sys.exit(f"{contestant.name} does not allow an answer")
                times[contestant.name] += masks
    print(f"{len(CASES)} schemas, {len(times['llm.h'])} masks\n")
    print("| one thread | compile, ms: median | max | mask, us: median | p99 | max |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in compiled:
        ms, us = [1e3 * t for t in compiled[name]], [1e6 * t for t in times[name]]
        print(f"| {name}{version_of(name)} | {statistics.median(ms):.1f} | {max(ms):.1f} | {statistics.median(us):.0f} | "
              f"{percentile(us, 0.99):.0f} | {max(us):.0f} |")


class Tally:
    """What one contestant does with some schemas."""

    def __init__(self):
        self.n, self.ms, self.us, self.refused, self.slow = collections.Counter(), [], [], collections.Counter(), []

    def read(self, contestant, encode, path):
        made = json.loads(path.read_text(encoding="utf-8"))
        self.n["schemas"] += 1
        try:
            took, grammar = contestant.compile(json.dumps(made["schema"], ensure_ascii=False))
        except Refused as err:
            message = str(err).splitlines()[0]
            self.refused[re.sub(r'^the JSON schema( ".*?")?: ', "", message)] += 1
            return
        self.ms.append(1e3 * took)
        worst = 0
        for test in made["tests"]:
            times, allowed = contestant.masks(grammar, encode(json.dumps(test["data"], ensure_ascii=False)))
            kind = "valid" if test["valid"] else "invalid"
            self.n[kind] += 1
            self.n[kind, allowed] += 1
            self.us += [1e6 * t for t in times]
            worst = max([worst, *times])
        self.slow.append((1e3 * took, 1e3 * worst, path.name))
        contestant.free(grammar)

    def row(self, title):
        n, ms, us = self.n, self.ms, self.us
        return (f"| {title} | {n['schemas']} | {len(ms)} | {statistics.median(ms):.1f} | {percentile(ms, 0.99):.1f} | {max(ms):.1f} | "
                f"{sum(t > 50 for t in ms)} | {statistics.median(us):.0f} | {percentile(us, 0.99):.0f} | {max(us) / 1e3:.1f} | "
                f"{sum(t > 1000 for t in us)} of {len(us)} | {n['valid', True]} of {n['valid']} | "
                f"{n['invalid', False]} of {n['invalid']} |")


def published_cases(contestants, args):
    ours = contestants[0]
    print("\n| one thread | schemas | accepted | compile, ms: median | p99 | max | above 50 | mask, us: median | p99 | max, ms | "
          "above 1 ms | valid values allowed | invalid values forbidden |\n" + "| --- |" + " ---: |" * 12)
    for name in args.sets.split(","):
        paths = sorted((args.schemas / "maskbench" / "data").glob(f"{name}---*.json"))
        if not paths:
            sys.exit(f"there are no schemas of {name} in {args.schemas}")
        whole = Tally()
        for path in paths:
            whole.read(ours, ours.encode, path)
        print(whole.row(f"{name}, {ours.name}"), flush=True)
        sample = random.Random(1).sample(paths, min(args.sample, len(paths)))
        for contestant in contestants if sample else []:
            tally, begin = Tally(), time.process_time()
            for path in sample:
                if time.process_time() - begin > args.seconds:
                    break
                tally.read(contestant, ours.encode, path)
            print(tally.row(f"{name}, a sample, {contestant.name}{version_of(contestant.name)}"), flush=True)
        for message, n in whole.refused.most_common() if args.refused else []:
            print(f"# {n} refused: {message[:160]}")
        for by in (0, 1) if args.slow else ():
            for row in sorted(whole.slow, key=lambda r: -r[by])[:10]:
                print(f"# compile {row[0]:.1f} ms, longest mask {row[1]:.2f} ms: {row[2]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--schemas", type=pathlib.Path)
    parser.add_argument("--sets", default="Github_easy,Github_medium")
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--refused", action="store_true")
    parser.add_argument("--slow", action="store_true")
    args = parser.parse_args()
    folder = vocabularies.folder_of("Qwen 2")
    ours = Ours(load_library(args.library), folder)
    pieces = vocabularies.qwen_ranks() + [special.encode() for special in vocabularies.QWEN_SPECIALS]
    text = (folder / "tokenizer.json").read_text()
    contestants = [ours, XGrammar(pieces), LLGuidance(text)]
    print(f"{len(pieces)} tokens")
    own_cases(contestants)
    if args.schemas:
        published_cases(contestants, args)


main()
