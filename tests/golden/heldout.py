#!/usr/bin/env python3
"""Writes heldout.txt: 50 kB of English prose in the public domain, for measuring perplexity.

    python3 heldout.py alice29.txt lcet10.txt jargon.txt heldout.txt

One third each is from a novel, the report of a conference, and an essay on how programmers write. README.md says
where the three files are from. Each paragraph becomes one line, with an empty line between two paragraphs, and each
third ends with a complete paragraph.
"""
import re
import sys

TOTAL = 51200

# The text at which each third begins in its file, after title pages and tables of contents.
STARTS = ["CHAPTER VII\n", "SESSION I.  CONTENT IN A NEW FORM", "Hacker Writing Style\n\n   We"]


def paragraphs(text):
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        if line and not re.search(r"\+\+\+|\* \*|\*\*\*", line):  # ruled boxes of keywords, rows of stars
            yield line.replace("{", "").replace("}", "")         # the Jargon File's mark for a cross-reference


def excerpt(path, start, limit):
    with open(path, encoding="utf-8") as f:  # text mode: line ends become \n
        text = f.read()
    out = ""
    for line in paragraphs(text[text.index(start):]):
        if len((out + line).encode()) + 2 > limit:
            return out
        out += line + "\n\n"
    return out


def main():
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    out = ""
    for i, (path, start) in enumerate(zip(sys.argv[1:4], STARTS), 1):
        out += excerpt(path, start, TOTAL * i // 3 - len(out.encode()))
    with open(sys.argv[4], "w", encoding="utf-8", newline="\n") as f:
        f.write(out.rstrip("\n") + "\n")


if __name__ == "__main__":
    main()
