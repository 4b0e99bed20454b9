#!/usr/bin/env python3
"""Makes heldout.txt: 50 kB of English prose in the public domain, to measure perplexity on.

    python3 heldout.py alice29.txt lcet10.txt jargon.txt heldout.txt

A third each of a novel, of the report of a conference and of an essay on how programmers write. README.md says
where the three files are from. A paragraph becomes one line, an empty line stands between two, and each third
ends with a paragraph.
"""
import re
import sys

TOTAL = 51200

# Where in its file each third begins, beyond the title pages and lists of contents.
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
