#!/usr/bin/env python3
"""Writes greedy continuations of 20 texts by llama.cpp, for comparison token by token.

    pip install llama-cpp-python numpy
    python3 greedy.py MODEL.gguf greedy.txt

The weights are expanded to float32, the KV cache is float32 and flash attention is off, so that only the order of
additions can differ. The text is used unchanged: without a chat template, without recognising special tokens, and
with BOS only if the file's metadata says so.

greedy.txt has comments, which begin with '#' (the one before each prompt shows its text as a JSON string), and for
each prompt one line of numbers separated by single spaces:

    n_prompt id ... id   n_new id gap ... id gap

An id is a decimal integer. A gap is a decimal fraction: the difference between the two largest logits at the step
that chose the preceding id. If it is tiny, another correct implementation may choose the other token, and from then
on the two texts differ. n_new is 100, or less if the model ended its text; then the last token is the one that ended
it.
"""
import ctypes
import json
import os
import sys
import tempfile

import llama_cpp as lc
import numpy as np

N_NEW = 100
GGML_TYPE_F32 = 0

PROMPTS = [
    "The old bridge across the river had been closed since the flood, and",
    "In 1687, Isaac Newton published",
    "Once upon a time, in a village at the edge of a great forest, there lived a clockmaker who",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "#include <stdio.h>\n\nint main(int argc, char **argv) {\n    for (int i = 1; i < argc; i++) {\n",
    "SELECT name, COUNT(*) AS orders\nFROM customers\n",
    "Shopping list:\n- bread\n- butter\n- eggs\n-",
    "Anna: Did you hear the noise last night?\nBen: No, what was it?\nAnna:",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "The temperatures this week were 12.5, 14.0, 13.2, 15.8 and 11.9 degrees. The average is",
    "La Révolution française commence en 1789, lorsque",
    "Der schnelle braune Fuchs springt über den faulen Hund. Danach",
    "東京は日本の首都であり、",
    "I got the job! 🎉🎉 My first day is Monday and I am so 😊",
    "# Baking bread at home\n\n## Ingredients\n\n",
    "{\"name\": \"Ada\", \"born\": 1815, \"languages\": [\"English\", \"French\"], \"",
    "Q: Why is the sky blue?\nA:",
    "Dear Mr. Thompson,\n\nThank you for your letter of 3 May. I am writing to",
    "WARNING!!! DO NOT OPEN THIS DOOR   WHILE",
    "x",
]


def expand_to_f32(source, target):
    """Writes the model with every weight as float32."""
    params = lc.llama_model_quantize_default_params()
    params.ftype = lc.LLAMA_FTYPE_ALL_F32
    params.allow_requantize = True
    if lc.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        sys.exit(f"{source} could not be expanded to float32")


def open_model(path):
    params = lc.llama_model_default_params()
    params.n_gpu_layers = 0
    return lc.llama_model_load_from_file(path.encode(), params)


def open_context(model):
    params = lc.llama_context_default_params()
    params.n_ctx = 512
    params.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.type_k = params.type_v = GGML_TYPE_F32
    params.n_threads = params.n_threads_batch = os.cpu_count()
    return lc.llama_init_from_model(model, params)


def encode(vocab, text):
    data = text.encode()
    ids = (lc.llama_token * (len(data) + 1))()
    add_bos = lc.llama_vocab_get_add_bos(vocab)
    n = lc.llama_tokenize(vocab, data, len(data), ids, len(ids), add_bos, False)
    return list(ids[:n])


def next_logits(context, vocab, ids):
    """Appends ids to the context and returns the logits after the last of them."""
    tokens = (lc.llama_token * len(ids))(*ids)
    if lc.llama_decode(context, lc.llama_batch_get_one(tokens, len(ids))):
        sys.exit("llama_decode failed")
    n_vocab = lc.llama_vocab_n_tokens(vocab)
    return np.ctypeslib.as_array(lc.llama_get_logits_ith(context, -1), (n_vocab,))


def continue_greedily(context, vocab, prompt):
    """Returns a list of (id, gap)."""
    lc.llama_memory_clear(lc.llama_get_memory(context), True)
    new, ids = [], prompt
    while len(new) < N_NEW:
        logits = next_logits(context, vocab, ids)
        second, best = np.partition(logits, -2)[-2:]
        token = int(logits.argmax())
        new.append((token, best - second))
        if lc.llama_vocab_is_eog(vocab, token):
            break
        ids = [token]
    return new


def write_golden(path, model):
    vocab, context = lc.llama_model_get_vocab(model), open_context(model)
    with open(path, "w", encoding="utf-8") as f:
        f.write("# n_prompt id ... id n_new id gap ... id gap; made by greedy.py, which says more\n")
        for text in PROMPTS:
            prompt = encode(vocab, text)
            new = continue_greedily(context, vocab, prompt)
            fields = [len(prompt), *prompt, len(new)]
            fields += [f"{token} {gap:.6f}" for token, gap in new]
            f.write(f"# {json.dumps(text, ensure_ascii=False)}\n{' '.join(map(str, fields))}\n")
    lc.llama_free(context)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    lc.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        f32 = os.path.join(folder, "f32.gguf")
        expand_to_f32(sys.argv[1], f32)
        model = open_model(f32)
        write_golden(sys.argv[2], model)
        lc.llama_model_free(model)


if __name__ == "__main__":
    main()
