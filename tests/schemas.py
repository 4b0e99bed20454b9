#!/usr/bin/env python3
"""Compares JSON Schemas as grammars with the JSON-Schema-Test-Suite and Python's jsonschema. A schema that the library accepts must
allow exactly the valid values. Other schemas must be refused with a message that names one of their keywords, or says that no value is
valid. The values are those of the suite, each also with the other schemas of its file, and random answers that the grammar allows.
After the suite, random schemas are tested. Prints TAP and a table.

    make test-schema SUITE=FOLDER      or, with jsonschema 4 installed:
    tests/schemas.py build/libllm.so SUITE [--draft draft7] [--optional] [--refused] [--beside] [--answers 20] [--random 500] [--seed 1]

SUITE is a checkout of https://github.com/json-schema-org/JSON-Schema-Test-Suite, or an unpacked archive of it. By default make takes
$LLM_DATA/JSON-Schema-Test-Suite. --optional adds the suite's optional tests; --refused prints why schemas are refused; --beside also
prints the counts of xgrammar and llguidance, if they are installed; they do not affect the result.

A grammar allows only one order of an object's properties. So a value counts as allowed if one of its orders is allowed."""

import argparse
import collections
import ctypes
import decimal
import itertools
import json
import os
import pathlib
import random
import re
import sys
import tempfile

import jsonschema


def check_pattern(_validator, pattern, value, _schema):
    """Checks a pattern with ECMAScript's meaning of \\d and \\w."""
    if isinstance(value, str) and not re.search(pattern, value, re.ASCII):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


DRAFTS = {"draft2020-12": ("https://json-schema.org/draft/2020-12/schema",
                           jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": check_pattern})),
          "draft7": ("http://json-schema.org/draft-07/schema#",
                     jsonschema.validators.extend(jsonschema.Draft7Validator, {"pattern": check_pattern}))}
ARGUMENT, FORMAT, UNSUPPORTED = 1, 3, 4 # llm_status
OTHER_KEYWORDS = ("$id", "$schema", "$anchor", "$dynamicAnchor", "then", "else", "minContains", "maxContains")
MOST_FORMS = 2000 # orders of a value's properties that are tried
END = "<|end|>"

# ---- Values --------------------------------------------------------------------------------------------------------------------


def number_forms(value):
    """Returns the ways to write a number that a grammar may require: without a point, without an exponent."""
    found = [json.dumps(value)]
    if isinstance(value, float) and value == int(value):
        found.append(str(int(value)))
    if "e" in found[0]:
        found.append(format(decimal.Decimal(found[0]), "f"))
    return found


def forms(value):
    """Yields the texts of a value, with all orders of its objects' properties."""
    if isinstance(value, dict):
        for order in itertools.permutations(value.items()):
            keys = [write(key) for key, _ in order]
            for values in itertools.product(*[list(itertools.islice(forms(v), MOST_FORMS)) for _, v in order]):
                yield "{" + ",".join(f"{k}:{v}" for k, v in zip(keys, values)) + "}"
    elif isinstance(value, list):
        for values in itertools.product(*[list(itertools.islice(forms(v), MOST_FORMS)) for v in value]):
            yield "[" + ",".join(values) + "]"
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield from number_forms(value)
    else:
        yield write(value)


def write(value):
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if re.search("[\ud800-\udfff]", text) else text


def unique_pairs(pairs):
    """Fails for duplicate names. A name that is not in the schema may occur twice, as the manual says. Validators do not notice that,
    so such answers are not counted."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def read_number(text):
    """Returns a float, except if rounding made it an integer."""
    if re.search("[eE]", text):
        return float(text)
    exact = decimal.Decimal(text)
    return exact if float(text).is_integer() and exact != exact.to_integral_value() else float(text)


# ---- The programs --------------------------------------------------------------------------------------------------------------


def byte_alphabet():
    """Returns the character that represents each byte in byte-level pieces."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def tokenizer_json():
    """Makes a vocabulary with one token per byte and one that ends the text."""
    vocab = {piece: i for i, piece in enumerate(byte_alphabet())}
    return json.dumps({"added_tokens": [{"id": 256, "content": END, "single_word": False, "lstrip": False, "rstrip": False,
                                         "normalized": False, "special": True}],
                       "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
                       "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}, "model": {"type": "BPE", "vocab": vocab, "merges": []}})


class Error(ctypes.Structure):
    """llm_error"""

    _fields_ = [("code", ctypes.c_int), ("message", ctypes.c_char * 500)]


class Ours:
    name = "llm.h"

    def __init__(self, path):
        self.library, self.tokenizer, err = ctypes.CDLL(os.path.abspath(path)), ctypes.c_void_p(), Error()
        self.library.llm_grammar_free.restype = None
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
            if self.library.llm_tokenizer_load(ctypes.byref(self.tokenizer), os.fsencode(folder), None, ctypes.byref(err)):
                raise SystemExit(err.message.decode())

    def compile(self, schema):
        """Returns the grammar and None, or None and (code, message)."""
        grammar, err = ctypes.c_void_p(), Error()
        status = self.library.llm_grammar_from_json_schema(ctypes.byref(grammar), self.tokenizer, schema.encode(), None,
                                                           ctypes.byref(err))
        return (None, (status, err.message.decode())) if status else (grammar, None)

    def check(self, grammar, data):
        return self.library.llm_grammar_check(grammar, data, ctypes.c_size_t(len(data)))

    def allows(self, grammar, text):
        return self.check(grammar, text.encode()) == 1

    def free(self, grammar):
        self.library.llm_grammar_free(grammar)


class XGrammar:
    name = "xgrammar"

    def __init__(self):
        import xgrammar

        self.module = xgrammar
        info = xgrammar.TokenizerInfo([bytes([b]) for b in range(256)] + [END.encode()], vocab_type=xgrammar.VocabType.RAW,
                                      vocab_size=257, stop_token_ids=[256])
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, schema):
        try:
            return self.compiler.compile_json_schema(schema, strict_mode=False), None
        except Exception as err: # of several types
            return None, (UNSUPPORTED, str(err))

    def allows(self, grammar, text):
        matcher = self.module.GrammarMatcher(grammar)
        return matcher.accept_string(text.encode()) and matcher.accept_token(256)

    def free(self, grammar):
        pass


class LLGuidance:
    name = "llguidance"

    def __init__(self):
        import llguidance

        self.module, self.tokenizer = llguidance, llguidance.LLTokenizer(tokenizer_json())

    def compile(self, schema):
        try:
            grammar = self.module.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": True})
            matcher = self.module.LLMatcher(self.tokenizer, grammar, log_level=0)
        except ValueError as err:
            return None, (UNSUPPORTED, str(err))
        return (None, (UNSUPPORTED, matcher.get_error())) if matcher.is_error() else (matcher, None)

    def allows(self, matcher, text):
        matcher.reset()
        data = list(text.encode())
        return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()

    def free(self, grammar):
        pass


# ---- Random answers ------------------------------------------------------------------------------------------------------------

COMMON = b'"' * 12 + b"}]" * 20 + b'{[:,tfn0123456789-.aboruebarfoxAB_ \\eEsl'


def random_answer(ours, grammar, draw):
    """Draws a text that the grammar allows, byte by byte. Returns None if it becomes too long."""
    text = b""
    while len(text) < 300:
        code = ours.check(grammar, text)
        if code == 1 and draw.random() < 0.5:
            return text
        choices = draw.sample(COMMON, len(COMMON)) + draw.sample(range(256), 256)
        found = next((b for b in choices if ours.check(grammar, text + bytes([b])) >= 0), None)
        if found is None:
            return text if code == 1 else b""
        text += bytes([found])
    return None


# ---- Random schemas ------------------------------------------------------------------------------------------------------------

NAMES = ["a", "b", "ab", "ca", ""]
STRINGS = ["", "a", "b", "ab", "ba", "abc", "\u00e9", "a\"b", "1"]
NUMBERS = [0, 1, -1, 2, 3, 6, 10, 0.5, -1.5, 2.5]
PATTERNS = ["^a", "b$", "^[ab]*$", "^$", "a|c", "^.{2}$", "[^a]"]


class Draw(random.Random):
    """Makes random schemas and values, with so few variants that values often match."""

    def chance(self, part):
        return self.random() < part

    def value(self, depth=2):
        kind = self.randrange(6 if depth else 4)
        if kind == 4:
            return [self.value(depth - 1) for _ in range(self.randrange(4))]
        if kind == 5:
            return {name: self.value(depth - 1) for name in self.sample(NAMES, self.randrange(4))}
        return self.choice(([None, True, False], NUMBERS, STRINGS, NUMBERS)[kind] if kind else [None, True, False])

    def schema(self, depth=3):
        if self.chance(0.08) or not depth:
            return self.choice((True, False, {}, {"type": self.choice(TYPES)}, {"const": self.value(0)}, {"enum": [self.value(0), self.value(0)]}))
        made = {}
        for _ in range(self.choice((1, 1, 1, 2, 2, 3))):
            made.update(self.keyword(depth - 1))
        return made

    def keyword(self, depth):
        several = [self.schema(depth) for _ in range(self.randint(1, 3))]
        one, key, count = several[0], self.choice(KEYWORDS), self.randrange(4)
        return {"type": {"type": self.choice(TYPES) if self.chance(0.7) else self.sample(TYPES, 2)},
                "const": {"const": self.value()}, "enum": {"enum": [self.value() for _ in range(self.randint(1, 3))]},
                "limit": {self.choice(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")): self.choice(NUMBERS)},
                "multipleOf": {"multipleOf": self.choice((1, 2, 3))},
                "length": {self.choice(("minLength", "maxLength", "minItems", "maxItems", "maxProperties")): count},
                "pattern": {"pattern": self.choice(PATTERNS)},
                "properties": {"properties": {name: self.schema(depth) for name in self.sample(NAMES, self.randint(1, 2))}},
                "required": {"required": self.sample(NAMES, self.randint(1, 2))},
                "additionalProperties": {"additionalProperties": one},
                "patternProperties": {"patternProperties": {p: self.schema(depth) for p in self.sample(PATTERNS, self.randint(1, 2))}},
                "propertyNames": {"propertyNames": self.choice(({"pattern": self.choice(PATTERNS)}, {"maxLength": count}, {"enum": NAMES[:2]},
                                                                {"not": {"enum": [self.choice(NAMES), 1]}}, {"anyOf": [{"const": "ab"}, {"pattern": "^a$"}]},
                                                                {"minLength": 1, "pattern": "^[ab]*$"}))},
                "dependentRequired": {"dependentRequired": {self.choice(NAMES): self.sample(NAMES, self.randint(1, 2))}},
                "dependentSchemas": {"dependentSchemas": {self.choice(NAMES): one}},
                "items": {"items": one}, "prefixItems": {"prefixItems": several},
                "contains": {"contains": one, **({"minContains": count} if self.chance(0.3) else {}),
                             **({"maxContains": self.randint(1, 3)} if self.chance(0.3) else {})},
                "uniqueItems": {"uniqueItems": True},
                "unevaluatedProperties": {"unevaluatedProperties": one}, "unevaluatedItems": {"unevaluatedItems": one},
                "uniqueFlags": {"uniqueItems": True, "items": {"enum": self.sample(NUMBERS, 2) + [self.value(1)]}},
                "not": {"not": one}, "allOf": {"allOf": several}, "anyOf": {"anyOf": several}, "oneOf": {"oneOf": several},
                "if": {"if": one, **({"then": several[-1]} if self.chance(0.7) else {}), **({"else": self.schema(depth)} if self.chance(0.5) else {})},
                "$ref": {"$ref": self.choice(("#", "#/$defs/a", "#/$defs/b"))}}[key]


TYPES = ["null", "boolean", "integer", "number", "string", "array", "object"]
KEYWORDS = ["type", "const", "enum", "limit", "limit", "multipleOf", "length", "length", "pattern", "properties", "properties", "required",
            "additionalProperties", "patternProperties", "propertyNames", "dependentRequired", "dependentSchemas", "items", "prefixItems",
            "contains", "uniqueItems", "uniqueFlags", "unevaluatedProperties", "unevaluatedItems", "not", "not", "allOf", "anyOf", "oneOf",
            "if", "$ref"]


def same_place(schema, root):
    """Returns the schemas that apply to the same value."""
    if not isinstance(schema, dict):
        return []
    found = [s for key in ("allOf", "anyOf", "oneOf") for s in schema.get(key, [])] + list(schema.get("dependentSchemas", {}).values())
    found += [schema[key] for key in ("not", "if", "then", "else") if key in schema]
    if "$ref" in schema:
        found.append(root["$defs"][schema["$ref"][-1]] if len(schema["$ref"]) > 1 else root)
    return found


def is_endless(schema, root, above=()):
    """True if a schema refers to itself for the same value, which makes validators recurse forever."""
    if any(schema is s for s in above):
        return True
    return any(is_endless(s, root, (*above, schema)) for s in same_place(schema, root))


def subschemas(schema):
    if isinstance(schema, (dict, list)):
        yield schema
        for inner in schema.values() if isinstance(schema, dict) else schema:
            yield from subschemas(inner)


def random_group(draw):
    """Makes a random schema with values, in the form of the suite."""
    schema = draw.schema()
    if not isinstance(schema, dict):
        return None
    schema = {"$schema": DRAFTS["draft2020-12"][0], **schema, "$defs": {"a": draw.schema(1), "b": draw.schema(2)}}
    if any(is_endless(s, schema) for s in subschemas(schema)):
        return None
    judge = DRAFTS["draft2020-12"][1](schema)
    values = [draw.value() for _ in range(40)]
    return {"description": "random", "schema": schema, "tests": [{"data": value, "valid": judge.is_valid(value)} for value in values]}


# ---- The comparison ------------------------------------------------------------------------------------------------------------


class Counts:
    def __init__(self):
        self.n = collections.Counter()
        self.wrong, self.refused = [], collections.Counter()


def check_group(engine, counts, draft, group, values, args, draw):
    """Checks one schema of the suite with its own values and with all values of its file."""
    n, (uri, validator) = counts.n, DRAFTS[draft]
    schema = group["schema"]
    if isinstance(schema, dict) and "$schema" not in schema:
        schema = {"$schema": uri, **schema}
    text, is_ours = json.dumps(schema, ensure_ascii=False), isinstance(engine, Ours)
    valid_values = [test["data"] for test in group["tests"] if test["valid"]]

    def fail(what):
        counts.wrong.append(f"{draft}, {group['description']}: {what}: {text}")

    n["schemas"] += 1
    grammar, refusal = engine.compile(text)
    if refusal:
        code, message = refusal
        none_fits = code == ARGUMENT and not valid_values
        n["no value fits" if none_fits else "refused"] += 1
        counts.refused[re.sub(r"^the JSON schema( \".*?\")?: ", "", message.split("\n")[0])] += not none_fits
        n["valid values of refused"] += len(valid_values)
        named = any(word in message for word in {*validator.VALIDATORS, *OTHER_KEYWORDS}) or "refers to itself" in message
        if is_ours and not none_fits and (code not in (FORMAT, UNSUPPORTED) or not named):
            fail(f"refused without a keyword: {message}")
        return
    n["accepted"] += 1
    judge = validator(schema)
    tests = [(test["data"], test["valid"]) for test in group["tests"]]
    n_own = len(tests)
    try:
        tests += [(value, judge.is_valid(value)) for value in values] if is_ours else []
    except Exception: # references that jsonschema would have to fetch
        tests = tests[:n_own]
    for i, (value, valid) in enumerate(tests):
        allowed = any(engine.allows(grammar, form) for form in itertools.islice(forms(value), MOST_FORMS))
        if i < n_own:
            n[f"{'valid' if valid else 'invalid'} values"] += 1
            n[f"{'valid' if valid else 'invalid'} values {'allowed' if allowed else 'forbidden'}"] += 1
        n["values"] += 1
        if is_ours and allowed != valid:
            fail(f"{write(value)} is {'valid' if valid else 'not valid'}")
    for _ in range(args.answers if is_ours else 0):
        answer = random_answer(engine, grammar, draw)
        if answer == b"":
            fail("an answer cannot be continued")
        try:
            value = json.loads(answer, object_pairs_hook=unique_pairs, parse_float=read_number) if answer else None
        except json.JSONDecodeError:
            fail(f"{answer} is not JSON")
            continue
        except ValueError:
            continue
        if answer:
            n["answers"] += 1
            try:
                valid = judge.is_valid(value)
            except Exception:
                break
            if not valid:
                fail(f"the answer {answer.decode()} is not valid")
    engine.free(grammar)


def check_suite(engine, draft, args):
    counts, draw = Counts(), random.Random(args.seed)
    folder = args.suite / "tests" / draft
    paths = sorted(folder.glob("*.json")) + (sorted(folder.glob("optional/*.json")) if args.optional else [])
    if not paths:
        sys.exit(f"no tests found in {folder}")
    for path in paths:
        groups = json.loads(path.read_text(encoding="utf-8"))
        values = [test["data"] for group in groups for test in group["tests"]]
        for group in groups:
            check_group(engine, counts, draft, group, values, args, draw)
    return counts


def check_random(engine, args):
    counts, draw = Counts(), Draw(args.seed)
    for _ in range(args.random):
        group = random_group(draw)
        if group:
            check_group(engine, counts, "draft2020-12", group, [], args, draw)
    return counts


def report(title, counts, args):
    for line in counts.wrong:
        print(f"# {line}")
    print(f"{'not ok' if counts.wrong else 'ok'} - {title}: {counts.n['schemas']} schemas, {counts.n['accepted']} accepted, "
          f"{counts.n['refused']} refused, {counts.n['no value fits']} that no value fits, {counts.n['values']} values, "
          f"{counts.n['answers']} answers, {len(counts.wrong)} wrong")
    if args.refused:
        for message, n in counts.refused.most_common():
            if n:
                print(f"# {n} refused: {message}")
    return bool(counts.wrong)


def table(rows):
    print("# | | schemas | accepted | refused | valid values allowed | invalid values forbidden | wrong answers |")
    print("# | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, draft, n in rows:
        wrong = n["valid values forbidden"] + n["invalid values allowed"]
        print(f"# | {name}, {draft} | {n['schemas']} | {n['accepted']} | {n['refused'] + n['no value fits']} | "
              f"{n['valid values allowed']} of {n['valid values']} | {n['invalid values forbidden']} of {n['invalid values']} | {wrong} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("suite", type=pathlib.Path)
    parser.add_argument("--draft", action="append", choices=sorted(DRAFTS))
    parser.add_argument("--optional", action="store_true")
    parser.add_argument("--refused", action="store_true")
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("--answers", type=int, default=20)
    parser.add_argument("--random", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    ours, rows, bad = Ours(args.library), [], 0
    engines = [ours] + ([XGrammar(), LLGuidance()] if args.beside else [])
    drafts = args.draft or list(DRAFTS)
    print(f"1..{len(drafts) + bool(args.random)}")
    for draft in drafts:
        for engine in engines:
            counts = check_suite(engine, draft, args)
            rows.append((engine.name, draft, counts.n))
            if engine is not ours:
                continue
            bad += report(draft, counts, args)
    if args.random:
        bad += report("random schemas", check_random(ours, args), args)
    table(rows)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
