"""Published vocabularies, made from packages of PyPI: each as a folder with tokenizer.json, as Hugging Face writes it, and as a GGUF file.

The packages, which the Makefile installs or unpacks: dashscope (Qwen), mistral-common (Tekken, and the SentencePiece vocabulary of the
first Mistral), and the source of llama-cpp-python (GPT-2 and Llama 3, as GGUF files).
"""

import base64
import importlib.metadata
import json
import pathlib
import sys

import gguf
from sentencepiece import sentencepiece_model_pb2

TOP = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(TOP / "tokenizer"))

import reference  # noqa: E402

QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_SIZE = 151936 # with unused tokens at the end, as in published GGUF files


def resource(package, path):
    return pathlib.Path(importlib.metadata.distribution(package).locate_file(path))


def qwen_ranks():
    """Returns the bytes of each token, in the order of their ids."""
    lines = resource("dashscope", "dashscope/resources/qwen.tiktoken").read_text().splitlines()
    return [base64.b64decode(line.split()[0]) for line in lines if line]


def byte_alphabet():
    """Returns the character that represents each byte in byte-level pieces."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def split_of(token, ranks):
    """Returns the two pieces whose merge makes a token: those that remain after all merges of lower rank."""
    parts = [token[i:i + 1] for i in range(len(token))]
    own = ranks[token]
    while len(parts) > 2:
        found = [(ranks.get(a + b, own), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
        rank, i = min(found)
        if rank >= own:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


class Ranked(reference.Vocabulary):
    """A byte-level vocabulary that is published as a list of tokens, whose order is that of the merges, and special tokens before and
    after them."""

    def __init__(self, pre, tokens, before=(), after=()):
        ranks, alphabet = {token: i for i, token in enumerate(tokens)}, byte_alphabet()
        pairs = [split_of(token, ranks) for token in tokens if len(token) > 1]
        self.model, self.pre, self.unk, self.scores = "gpt2", pre, 0, []
        self.tokens = [*before, *("".join(alphabet[b] for b in token) for token in tokens), *after]
        self.types = [reference.CONTROL] * len(before) + [reference.NORMAL] * len(tokens) + [reference.CONTROL] * len(after)
        self.merges = [" ".join("".join(alphabet[b] for b in part) for part in pair) for pair in pairs if pair]


class Scored(reference.Vocabulary):
    """A vocabulary in a tokenizer.model of SentencePiece."""

    def __init__(self, path):
        model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
        self.model, self.pre, self.unk, self.merges = "llama", None, model.trainer_spec.unk_id, []
        self.tokens = [piece.piece for piece in model.pieces]
        self.scores = [piece.score for piece in model.pieces]
        self.types = [piece.type for piece in model.pieces]


def qwen(_):
    return Ranked("qwen2", qwen_ranks(), after=QWEN_SPECIALS)


def tekken(_):
    file = json.loads(resource("mistral-common", "mistral_common/data/tekken_240911.json").read_text())
    n_special, n_all = file["config"]["default_num_special_tokens"], file["config"]["default_vocab_size"]
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in file["vocab"][: n_all - n_special]]
    return Ranked("tekken", tokens, before=[f"<SPECIAL_{i}>" for i in range(n_special)])


def llama_cpp():
    """Returns the folder of llama.cpp's source."""
    return next((TOP / "build/peers").glob("llama_cpp_python-*/vendor/llama.cpp"))


MAKERS = { # from a GGUF file with SmolLM's vocabulary
    "GPT-2": lambda _: reference.Vocabulary(llama_cpp() / "models/ggml-vocab-gpt-2.gguf"),
    "SmolLM": reference.Vocabulary,
    "Llama 3": lambda _: reference.Vocabulary(llama_cpp() / "models/ggml-vocab-llama-bpe.gguf"),
    "Qwen 2": qwen,
    "Tekken": tekken,
    "SentencePiece": lambda _: Scored(resource("mistral-common", "mistral_common/data/tokenizer.model.v1")),
}
NAMES = list(MAKERS)


def hugging_face(vocabulary):
    return reference.byte_level(vocabulary) if vocabulary.model == "gpt2" else reference.characters(vocabulary)


def write_gguf(vocabulary, path, n_tokens):
    """Writes a GGUF file without weights; more than the vocabulary's tokens are unused ones."""
    more = n_tokens - len(vocabulary.tokens)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens + [f"[PAD{len(vocabulary.tokens) + i}]" for i in range(more)])
    writer.add_token_types(vocabulary.types + [reference.UNUSED] * more)
    if vocabulary.model == "gpt2":
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores + [0.0] * more)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def folder_of(name, model=None):
    """Returns the folder with a vocabulary as tokenizer.json and vocabulary.gguf, which are made if they are not there. `model` is only
    needed for SmolLM's."""
    folder = TOP / "build/vocabularies" / name.replace(" ", "-")
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary = MAKERS[name](model)
        write_gguf(vocabulary, folder / "vocabulary.gguf", QWEN_SIZE if name == "Qwen 2" else len(vocabulary.tokens))
        hugging_face(vocabulary).save(str(folder / "tokenizer.json"))
    return folder
