#!/usr/bin/env python3
"""Writes grammar.jsonl: texts that match or do not match a regular expression (by Python's re) or a JSON Schema (by jsonschema 4).

    pip install jsonschema; tests/golden/grammar.py >tests/golden/grammar.jsonl

A line is [kind, grammar, [[text, matches], ...]]. Values are written in the form that llm_grammar_from_json_schema allows:
properties in the order of the schema, without white space."""
import itertools
import json
import random
import re
import jsonschema

REGEXES = [
    "abc", "a|bc|", "a*", "(ab)+c?", "[a-c]{2,3}", "[^a-c]", ".", "a.c", r"\d+(\.\d+)?", r"[\w-]+@\w+\.(com|org)", "(a|b)*abb",
    "(a*)*b", "x{0}", "x{3}", "x{2,}", "(x{1,2}y){2}", "é+", "[à-ü]x", "日本?", "[^é]", r"\x41B", r"\[\]\\", "(?:a|b)c",
    "a{0,5}b{0,5}", "(|a)(|b)", r"\s\S", "[a\\-z]+", "😀{1,2}", "(a|ab)(c|bcd)(d*)", "[0-9]{4}-[0-9]{2}",
]
PIECES = "a b c ab abb x xx y xy é à ü 日 本 😀 0 1 2026 11 - . @ com org A AB [ ] \\ z \n".split(" ")
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10, 12, 100, 1.5, -2.25, "", "a", "ab", "abc", "ab1", "é", "日本語", "red", "a\"b\\\n",
    [], [1], [1, 2], [1, 2, 3], ["a"], ["a", 1], [[1], []], {}, {"a": 1}, {"a": "x"}, {"b": True}, {"a": 1, "b": True},
    {"a": 1, "b": False, "c": "x"}, {"c": 1}, {"a": {"b": [1]}}, {"kind": "n", "n": 3}, {"kind": "s", "s": "x"},
    -14, 14, 21, 25, 50, 75, 994, 1001, -21, 4, 6, 24, 36, -6, 4.5, -1000000, 12345678901234567890, 123456789012345678900,
    {"b": True, "c": 1}, {"a": 1, "c": 1}, {"b": True, "d": 1}, {"a": 1, "b": True, "d": 1}, {"a": 1, "b": True, "c": 1, "d": 1},
    {"c": 1, "d": 2}, {"ab": 1}, {"ba": 1, "b": 2},
]
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
AB = {"a": {"type": "integer"}, "b": {"type": "boolean"}}
SCHEMAS = [
    True, {}, {"type": "integer", "multipleOf": 3}, {"type": "number", "multipleOf": 5}, {"multipleOf": 2.0, "type": ["integer", "null"]},
    {"type": "integer", "multipleOf": 7, "minimum": -20, "maximum": 1000}, {"type": "integer", "multipleOf": 25, "exclusiveMinimum": 25},
    {"type": "integer", "multipleOf": 6, "exclusiveMaximum": 6}, {"allOf": [{"type": "integer", "multipleOf": 4}, {"multipleOf": 6, "minimum": 1}]},
    {"type": "integer", "multipleOf": 1}, {"enum": [1, 2, 3, 4.5, 10, "a", None], "multipleOf": 2}, {"type": "object", "minProperties": 1},
    {"type": "object", "maxProperties": 1}, {"type": "object", "maxProperties": 0}, {"properties": AB, "maxProperties": 2},
    {"type": "object", "properties": AB, "minProperties": 1, "maxProperties": 1},
    {"type": "object", "properties": {**AB, "c": True}, "minProperties": 2, "additionalProperties": False},
    {"type": "object", "properties": {**AB, "c": True, "d": True}, "required": ["b"], "minProperties": 2, "maxProperties": 3,
     "additionalProperties": False},
    {"type": "object", "patternProperties": {"^[ab]$": {"type": ["integer", "boolean"]}}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"a": {"type": "integer"}}, "additionalProperties": False, "maxProperties": 1},
    {"type": "object", "patternProperties": {}, "additionalProperties": {"type": "integer"}},
    {"type": "integer"}, {"type": "number"}, {"type": "string"}, {"type": ["null", "boolean"]}, {"type": "array"},
    {"type": "object"}, {"enum": ["red", 1, None, [1, 2]]}, {"const": {"a": 1}}, {"type": "integer", "minimum": 2, "maximum": 10},
    {"type": "integer", "exclusiveMinimum": -1, "exclusiveMaximum": 12}, {"type": "string", "minLength": 1, "maxLength": 2},
    {"type": "string", "pattern": "^[a-c]+[0-9]?$"}, {"type": "string", "pattern": "b"},
    {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
    {"type": "array", "prefixItems": [{"type": "string"}], "items": {"type": "integer"}},
    {"type": "array", "prefixItems": [{"const": "a"}, {"const": 1}], "items": False},
    {"type": "object", "properties": AB}, {"type": "object", "properties": AB, "required": ["b"]},
    {"type": "object", "properties": AB, "required": ["a", "b"], "additionalProperties": False},
    {"type": "object", "properties": AB, "additionalProperties": {"type": "string"}},
    {"anyOf": [{"type": "string", "maxLength": 1}, {"type": "integer", "minimum": 3}]},
    {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
    {"allOf": [{"type": "integer", "minimum": 1}, {"maximum": 7}]},
    {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}},
    {"$defs": {"x": {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}, "b": {"type": "array"}}}}, "$ref": "#/$defs/x"},
    {"anyOf": [{"type": "object", "properties": {"kind": {"const": "n"}, "n": {"type": "integer"}}, "required": ["kind", "n"]},
               {"type": "object", "properties": {"kind": {"const": "s"}, "s": {"type": "string"}}, "required": ["kind", "s"]}]},
    {"not": {"type": "string"}}, {"not": {"enum": [1, 2.5, "ab", None, True]}}, {"type": "integer", "not": {"minimum": 2, "maximum": 12}},
    {"allOf": [{"not": {"const": "ab"}}, {"not": {"enum": ["ab", "a"]}}]}, {"type": "string", "not": {"pattern": "b"}}, {"type": "string", "pattern": "a", "maxLength": 2}, {"not": {"type": "integer"}},
    {"type": "number", "not": {"type": "integer"}, "minimum": -2.5, "exclusiveMaximum": 4.5}, {"not": {"type": "integer"}, "minimum": 1.5},
    {"type": "string", "allOf": [{"pattern": "^a"}, {"pattern": "b"}]}, {"not": {"required": ["a"]}}, {"not": {"properties": {"a": {"type": "integer"}}}},
    {"type": "array", "not": {"items": {"type": "integer"}}}, {"type": "array", "contains": {"type": "integer"}},
    {"type": "array", "contains": {"type": "integer"}, "minContains": 2}, {"type": "array", "contains": {"type": "integer"}, "maxContains": 1},
    {"type": "array", "contains": {"const": 1}, "minContains": 0, "maxContains": 0}, {"items": {"enum": [1, 2, 3, "a"]}, "uniqueItems": True},
    {"items": {"type": "integer"}, "uniqueItems": True, "maxItems": 1}, {"uniqueItems": False}, {"propertyNames": {"maxLength": 1}},
    {"propertyNames": {"enum": ["a", "c"]}, "additionalProperties": {"type": "integer"}}, {"propertyNames": {"pattern": "^[ab]"}},
    {"patternProperties": {"^a": {"type": "integer"}, "b": True}, "additionalProperties": {"type": "boolean"}},
    {"properties": {"a": {"minimum": 1}}, "patternProperties": {"a": {"type": "integer"}}}, {"dependentRequired": {"a": ["b"]}},
    {"properties": {"a": True, "b": True}, "dependentSchemas": {"a": {"properties": {"b": {"const": True}}, "required": ["b"]}},
     "additionalProperties": False},
    {"if": {"properties": {"a": {"const": 1}}, "required": ["a"]}, "then": {"required": ["b"]}, "else": {"properties": {"b": {"const": True}}}},
    {"if": {"type": "string"}, "then": {"minLength": 2}}, {"if": {"minimum": 3}, "else": {"maximum": 0}},
    {"oneOf": [{"type": "integer"}, {"minimum": 2}]},
    {"oneOf": [{"required": ["a"]}, {"required": ["b"]}, {"type": "string"}], "properties": {"a": True, "b": True}, "additionalProperties": False},
    {"oneOf": [{"pattern": "a"}, {"pattern": "b"}, {"type": "null"}]}, {"enum": [1, 2, "ab", {"a": 1}], "not": {"type": "integer"}},
    {"not": {"$ref": "#/$defs/t"}, "$defs": {"t": {"type": ["array", "integer"], "items": {"$ref": "#/$defs/t"}}}},
    {"$schema": DRAFT_7, "dependencies": {"a": ["b"], "c": {"required": ["d"]}}},
    {"$schema": DRAFT_7, "type": "array", "items": [{"type": "string"}], "additionalItems": {"type": "integer"}},
    {"$schema": DRAFT_7, "type": "array", "items": {"type": "integer"}, "additionalItems": False},
    {"$schema": DRAFT_7, "type": "array", "items": [True, {"type": "integer"}], "minItems": 1},
    {"$schema": DRAFT_7, "definitions": {"x": {"type": "integer"}}, "properties": {"a": {"$ref": "#/definitions/x", "maximum": 0}}},
    {"$ref": "#n", "$defs": {"x": {"$anchor": "n", "type": "integer"}, "y": {"$id": "other", "$anchor": "n", "type": "string"}}},
    {"$id": "http://x.org/a/b?q", "$ref": "../c/./d", "$defs": {"x": {"$id": "/c/d", "$ref": "e#/$defs/z", "$defs": {"y": {
        "$id": "http://x.org/c/e", "$defs": {"z": {"type": ["array", "string"], "items": {"$ref": "//x.org/a/b?q#/$defs/w"}}}}}},
        "w": {"minimum": 2}}},
    {"$id": "urn:x:y", "type": ["integer", "array"], "items": {"$ref": "urn:x:y"}, "minItems": 1, "not": {"$ref": "#/$defs/a"},
     "$defs": {"a": {"const": 7}}},
    {"$schema": DRAFT_7, "properties": {"a": {"allOf": [{"$ref": "#n"}, {"$ref": "http://x.org/y"}]}},
     "definitions": {"x": {"$id": "#n", "type": "integer"}, "y": {"$id": "http://x.org/y", "items": {"$ref": "#"}, "type": ["array", "integer"]}}},
    {"$id": "http://x.org/t", "$ref": "list", "$defs": {"i": {"$dynamicAnchor": "item", "type": "integer"}, "l": {
        "$id": "list", "type": "array", "items": {"$dynamicRef": "#item"}, "$defs": {"any": {"$dynamicAnchor": "item", "type": "string"}}}}},
    {"properties": {"a": {"type": "integer"}}, "unevaluatedProperties": False},
    {"allOf": [{"properties": {"a": True}}, {"$ref": "#/$defs/b"}], "unevaluatedProperties": {"type": "integer"}, "$defs": {"b": {
        "properties": {"b": {"const": True}}}}},
    {"anyOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"properties": {"b": True}, "required": ["b"]},
               {"patternProperties": {"^[cd]": True}, "required": ["c"]}], "unevaluatedProperties": False},
    {"oneOf": [{"properties": {"a": True}, "required": ["a"]}, {"properties": {"b": True}, "required": ["b"]}, {"minimum": 3}],
     "unevaluatedProperties": {"type": "integer"}},
    {"if": {"properties": {"a": {"const": 1}}, "required": ["a"]}, "then": {"properties": {"b": True}}, "else": {"properties": {"c": True}},
     "unevaluatedProperties": False},
    {"properties": {"a": True}, "dependentSchemas": {"a": {"properties": {"b": True}}}, "unevaluatedProperties": False},
    {"prefixItems": [True], "anyOf": [{"prefixItems": [True, {"const": 2}]}, {"contains": {"const": 3}}], "unevaluatedItems": False},
    {"enum": [{"a": 1}, {"a": 1, "b": True}, [1], [1, 2], "ab"], "allOf": [{"properties": {"a": True}, "prefixItems": [True]}],
     "unevaluatedProperties": False, "unevaluatedItems": False},
    {"type": "object", "properties": AB, "required": ["a", "b"], "minProperties": 3},
    {"properties": {"a": True}, "if": {"required": ["a"]}, "else": {"properties": {"b": True}}, "unevaluatedProperties": False},
]


def line(kind, grammar, cases):
    print(json.dumps([kind, grammar, cases], ensure_ascii=False, separators=(",", ":")))


def main():
    draw = random.Random(1)
    for regex in REGEXES:
        texts = {"", "aabb", "xxyxy", "ab@ab.com", "3.14", "\x41B", "2026-11", "[]\\", " x", "日", "日本"}
        for n in range(1, 5):
            texts |= {"".join(draw.choices(PIECES, k=n)) for _ in range(12)}
        compiled = re.compile(regex, re.ASCII)  # \d and \w as in ECMAScript
        line("regex", regex, [[text, compiled.fullmatch(text) is not None] for text in sorted(texts)])
    for schema in SCHEMAS:
        validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)(schema)
        cases = [[json.dumps(v, ensure_ascii=False, separators=(",", ":")), validator.is_valid(v)] for v in VALUES]
        line("schema", json.dumps(schema, ensure_ascii=False), cases)


main()
