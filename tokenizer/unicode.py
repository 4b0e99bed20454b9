#!/usr/bin/env python3
"""Prints the Unicode tables of llm.h, sections 7 and 8. Replace the tables there by the output.

The classes are those of Unicode 16.0, and normalisation is that of Unicode 9.0, because the regular expressions and the
normaliser of Hugging Face `tokenizers` use these versions:

    pip install unicodedataplus==16.0.0.post1
    python3 tokenizer/unicode.py
"""

import unicodedataplus as unicode

WIDTH = 110
SPACES = {0x20, 0x85, 0xA0, 0x1680, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000, *range(9, 14), *range(0x2000, 0x200B)}
LETTERS = {"Lu": "U", "Lt": "U", "Ll": "l", "Lm": "o", "Lo": "o"}
OTHERS = {"M": "m", "N": "n", "P": "p", "S": "y"}


def symbol_class(code):
    category = unicode.category(chr(code))
    if code in SPACES:
        return "s"
    return LETTERS.get(category) or OTHERS.get(category[0], ".")


def lengths(items):
    """[a a b] -> [[a, 2], [b, 1]]"""
    runs = []
    for item in items:
        if runs and runs[-1][0] == item:
            runs[-1][1] += 1
        else:
            runs.append([item, 1])
    return runs


def class_words():
    """Run-length encodes the classes: a class's letter, and the number of code points if it is not one. "A3" means "UlUlUl"."""
    runs = lengths(symbol_class(code) for code in range(0x110000))
    words, i = [], 0
    while i < len(runs):
        pairs = 0
        while runs[i + 2 * pairs : i + 2 * pairs + 2] == [["U", 1], ["l", 1]]:
            pairs += 1
        letter, n = ("A", pairs) if pairs else runs[i]
        words.append(letter + (str(n) if n > 1 else ""))
        i += 2 * pairs or 1
    return words


DIGITS = [chr(c) for c in range(35, 127) if chr(c) not in "?\\"]


def number(value):
    """Writes a number in base 45, lowest digit first. All digits except the last are from the second half of the 90
    characters."""
    text = ""
    while value >= 45:
        text += DIGITS[45 + value % 45]
        value //= 45
    return text + DIGITS[value]


def zigzag(value):
    return 2 * value if value >= 0 else -2 * value - 1


def normalised(code):
    """True if Unicode 9.0 had the code point. Later code points are not normalised."""
    age = unicode.age(chr(code))
    return not 0xD800 <= code < 0xE000 and age[0].isdigit() and float(age) <= 9


def decomposition_words():
    """Encodes each canonical decomposition code -> first second as three numbers: the difference from the previous code
    (doubled; odd if it is never composed again), the difference of `first` from the previous one, and `second` (counted from
    U+0300; 0 if there is none)."""
    words, last_code, last_first = [], 0, 0
    for code in range(0x110000):
        mapping = unicode.decomposition(chr(code)) if normalised(code) else ""
        if not mapping or mapping.startswith("<"):
            continue
        first, second = ([int(part, 16) for part in mapping.split()] + [0])[:2]
        composed = unicode.normalize("NFC", chr(code)) == chr(code)
        step = 2 * (code - last_code) + (not composed)
        words.append(number(step) + number(zigzag(first - last_first)) + number(second and second - 0x2FF))
        last_code, last_first = code, first
    return words


def combining_words():
    """Encodes runs of code points with the same combining class other than 0: the gap before, the length, the class."""
    words, gap = [], 0
    for value, n in lengths(unicode.combining(chr(code)) if normalised(code) else 0 for code in range(0x110000)):
        if value:
            words.append(number(gap) + number(n) + number(value))
        gap = 0 if value else n
    return words


def print_digits():
    """The zeros of the decimal digits, which the digits 1 to 9 follow, and the ranges of other characters with a digit's value."""
    decimal = [code for code in range(0x110000) if unicode.decimal(chr(code), None) is not None]
    zeros = [code for code in decimal if unicode.decimal(chr(code)) == 0]
    assert decimal == [zero + i for zero in zeros for i in range(10)]
    others = [code for code in range(0x110000) if unicode.digit(chr(code), None) is not None and unicode.category(chr(code)) != "Nd"]
    firsts, lasts = ([code for code in others if code + step not in others] for step in (-1, 1))
    print("zeros:", ", ".join(f"0x{code:X}" for code in zeros))
    print("others:", ", ".join(f"{{0x{first:X}, 0x{last:X}}}" for first, last in zip(firsts, lasts)), "\n")


def table(name, words):
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > WIDTH:
            lines.append("")
        lines[-1] += word
    print(f"static const char *const {name}[] = {{")
    for line in lines:
        print(f'    "{line}",')
    print("    NULL};\n")


table("llm__unicode_class_runs", class_words())
table("llm__nfc_decompositions", decomposition_words())
table("llm__nfc_combining_runs", combining_words())
print_digits()
