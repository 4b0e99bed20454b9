#!/usr/bin/env python3
"""Compares grammars in GBNF with llama.cpp, whose source this reads. The library must load each file of its grammars/, and each grammar
of tests/test-json-schema-to-grammar.cpp and tests/test-grammar-parser.cpp; it must allow the strings that
tests/test-grammar-integration.cpp says pass, and none of those that fail; and it must refuse the grammars that llama.cpp refuses.
The exceptions are in REFUSED and LOADED. Prints TAP.

    make test-gbnf         or, with jsonschema installed:  tests/gbnf.py build/libllm.so LLAMA.CPP

LLAMA.CPP is the folder of llama.cpp's source."""

import ctypes
import json
import pathlib
import re
import sys

import schemas

# Some texts for each file of grammars/, and others that it does not allow.
TEXTS = {
    "arithmetic.gbnf": (["1 +2 = 3\n", "(a-4)*22/b = (c)\n2=2\n"], ["1 + = 3\n", "1 = 2"]),
    "c.gbnf": (["int main(){return 1+f(x);}", "int f(int a){int b = 1;while(b<3){b = b*2;}}", ""], ["int main() {}", "int f({}"]),
    "chess.gbnf": (["1. e4 e5\n2. Nf3 Nc6\n", "1. d4 d5\n2. O-O-O exd8=Q+\n"], ["1. e4 e5\n", "e4"]),
    "english.gbnf": (["A text, \"quoted\" & (short): 1 + 1 = 2!"], ["caf\u00e9", ""]),
    "japanese.gbnf": (["\u3053\u3093\u306b\u3061\u306f\u3001\u4e16\u754c", "\u30a2 \u6f22"], ["a", "\u3053 ", ""]),
    "json.gbnf": (["{\"a\": [1, -2.5e3, true, null, \"\\u00e9\\n\"]}", "{}"], ["[1]", "{\"a\": 01}", "{'a': 1}"]),
    "json_arr.gbnf": (["[\n1,\n{\"a\": \"b\"}]", "[\n]"], ["[1]", "{}"]),
    "list.gbnf": (["- a\n- b c\n"], ["a\n", "- a"]),
}
# Grammars that only llama.cpp loads, by a part of the library's message: the manual says that tokens are not supported.
REFUSED = ("tokens as in <[1]>",)
# What only llama.cpp refuses, by a part of the grammar, and why the library need not.
LOADED = {
    "root ::= \"a\" | root \"a\"": "left recursion is allowed",
    "asdf ::= \"a\" | asdf \"a\"": "left recursion is allowed",
    "asdf ::= \"a\" | foo \"b\"": "left recursion is allowed",
    "\"a\"{5000": "llama.cpp's limit is 2000 repetitions",
    "[^x]*){0,99}": "llama.cpp's limit is 2000 repetitions",
}

PART = re.compile(r'R"""\((?P<raw>.*?)\)"""|"(?P<text>(?:[^"\\]|\\.)*)"|//[^\n]*|(?P<brace>[{}])', re.S)


def parts(text):
    """Yields the strings of C++ in a text, and the braces around and between them."""
    for found in PART.finditer(text):
        if found["raw"] is not None:
            yield "string", found["raw"]
        elif found["text"] is not None:
            yield "string", json.loads(f'"{found["text"]}"')
        elif found["brace"]:
            yield found["brace"], None


def calls(text, name):
    """Yields the text of each call of a function at the beginning of a line."""
    for found in re.finditer(rf"^ +{name}\((.*?)^ *\}}?\);", text, re.M | re.S):
        yield found[1]


class Ours(schemas.Ours):
    def compile(self, grammar):
        """Returns the grammar and "", or None and the message."""
        found, err = ctypes.c_void_p(), schemas.Error()
        status = self.library.llm_grammar_from_gbnf(ctypes.byref(found), self.tokenizer, grammar.encode(), None, ctypes.byref(err))
        return (None, err.message.decode()) if status else (found, "")


class Test:
    def __init__(self, ours):
        self.ours, self.n, self.n_failed, self.counts = ours, 0, 0, {"grammars": 0, "texts": 0, "refused": 0, "excepted": 0}

    def report(self, name, problems, remark=""):
        self.n += 1
        self.n_failed += bool(problems)
        print(f"{'not ok' if problems else 'ok'} {self.n} - {name}")
        for line in [*problems, *([remark] if remark else [])]:
            print("# " + line.replace("\n", "\n# "))

    def loads(self, name, grammar, passing=(), failing=()):
        found, message = self.ours.compile(grammar)
        if not found:
            excepted = any(part in message for part in REFUSED)
            self.counts["excepted"] += excepted
            self.report(name, [] if excepted else [f"refused: {message}", grammar], f"refused: {message}" if excepted else "")
            return
        problems = [f"does not allow {text!r}" for text in passing if not self.ours.allows(found, text)]
        problems += [f"allows {text!r}" for text in failing if self.ours.allows(found, text)]
        self.ours.free(found)
        self.counts["grammars"] += 1
        self.counts["texts"] += len(passing) + len(failing)
        self.report(name, problems + [grammar] if problems else [])

    def refuses(self, name, grammar):
        found, message = self.ours.compile(grammar)
        self.ours.free(found)
        why = next((LOADED[part] for part in LOADED if part in grammar), "")
        self.counts["excepted" if found else "refused"] += 1
        if found:
            self.report(name, [] if why else ["loaded", grammar], f"loaded: {why}")
        else:
            self.report(name, [f"refused, though {why}: {message}"] if why else [], f"refused: {message}")


def main(library, source):
    source = pathlib.Path(source)
    test = Test(Ours(library))
    for file in sorted((source / "grammars").glob("*.gbnf")):
        test.loads(file.name, file.read_text(encoding="utf-8"), *TEXTS.get(file.name, ((), ())))
    text = (source / "tests/test-grammar-integration.cpp").read_text(encoding="utf-8")
    for call in calls(text, "test_grammar"):
        found = list(parts(call))
        name, grammar = found[0][1], found[1][1]
        lists = []
        for kind, value in found[2:]:
            if kind == "{":
                lists.append([])
            elif kind == "string" and lists:
                lists[-1].append(value)
        test.loads(name, grammar, *(lists[:2] if "token(" not in call else ((), ())))
    for function in re.findall(r"^static void (test_failure_(?:missing_root|missing_reference|left_recursion)\(\).*?)^}", text, re.M | re.S):
        for kind, value in parts(function):
            if kind == "string" and "::=" in value:
                test.refuses(function[:function.index("(")], value)
    text = (source / "tests/test-grammar-parser.cpp").read_text(encoding="utf-8")
    main_text = text[text.index("int main()"):]
    for found in re.finditer(r"verify_(failure|parsing)\((R\"\"\".*?\"\"\")", main_text, re.S):
        grammar = next(parts(found[2]))[1]
        (test.refuses if found[1] == "failure" else test.loads)(f"test-grammar-parser: {' '.join(grammar.split())[:60]}", grammar)
    text = (source / "tests/test-json-schema-to-grammar.cpp").read_text(encoding="utf-8")
    for call in calls(text, "test"):
        strings = [value for kind, value in parts(call) if kind == "string"]
        if "SUCCESS" in call[:40]:
            test.loads(f"grammar of a schema: {strings[0]}", strings[-1])
    print(f"1..{test.n}")
    print(f"# {test.counts['grammars']} grammars are loaded, {test.counts['texts']} texts are allowed or not as in llama.cpp, {test.counts['refused']} "
          f"grammars are refused by both; {test.counts['excepted']} exceptions")
    print(f"# {test.n - test.n_failed} passed, {test.n_failed} failed")
    return test.n_failed > 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
