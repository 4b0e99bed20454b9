#!/usr/bin/env python3
"""Lets the LM evaluation harness score build/server on HellaSwag, and compares the accuracy with that of build/hellaswag.

    make test-harness      or, with the packages named in the Makefile:  tests/harness.py SERVER HELLASWAG MODEL DATA [QUESTIONS]

MODEL is a GGUF file with a byte-level vocabulary that tokenizer/reference.py knows. DATA is hellaswag_val_full.txt or its .bz2: for each
question the context, the number of the right ending, and four endings, one per line. QUESTIONS is the number of questions (100). The
harness asks the server for the log-probabilities of given texts (`echo`). Prints TAP.
"""
import bz2
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # nothing is downloaded
os.environ["TQDM_DISABLE"] = "1"  # no progress bars

TOP = pathlib.Path(__file__).parent.parent
sys.path += [str(TOP / "bench"), str(TOP / "tokenizer")]

import lm_eval  # noqa: E402
import reference  # noqa: E402
import serve_beside  # noqa: E402

PORT = 18084


def questions(path, n):
    """Yields the first n questions."""
    with (bz2.open if path.endswith(".bz2") else open)(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    for i in range(0, 6 * n, 6):
        yield {"query": lines[i], "label": int(lines[i + 1]), "choices": lines[i + 2:i + 6]}


def write_tokenizer(model, folder):
    """Writes the vocabulary of a GGUF file as transformers reads it."""
    vocabulary = reference.Vocabulary(model)
    reference.byte_level(vocabulary).save(str(pathlib.Path(folder, "tokenizer.json")))
    end = vocabulary.tokens[vocabulary.get("tokenizer.ggml.eos_token_id")]
    pathlib.Path(folder, "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}))


def by_harness(server, model, data, n):
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(model, folder)
        asked = pathlib.Path(folder, "questions.jsonl")
        asked.write_text("".join(json.dumps(question) + "\n" for question in questions(data, n)))
        task = {"task": "hellaswag_text", "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(asked)}},
                "output_type": "multiple_choice", "validation_split": "validation", "test_split": None, "num_fewshot": 0,
                "doc_to_text": "{{query}}", "doc_to_target": "{{label}}", "doc_to_choice": "choices",
                "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]}
        process = serve_beside.start([server, "-m", model, "-p", str(PORT)], PORT)
        try:
            found = lm_eval.simple_evaluate(model="local-completions", tasks=[task], model_args={
                "model": "any", "base_url": f"http://127.0.0.1:{PORT}/v1/completions", "tokenizer": folder, "num_concurrent": 4,
                "tokenized_requests": False})
        finally:
            process.terminate()
            process.wait()
    figures = found["results"]["hellaswag_text"]
    return [100 * figures[f"{name},none"] for name in ("acc", "acc_norm")]


def by_hellaswag(program, model, data, n):
    output = subprocess.run([program, "-m", model, "--data", data, "--limit", str(n)], check=True, capture_output=True, text=True).stdout
    print("\n".join("# " + line for line in output.splitlines()))
    return [float(re.search(rf"\b{name} +(\d+\.\d+)", output)[1]) for name in ("acc", "acc_norm")]


def main(server, program, model, data, n="100"):
    harness, own = by_harness(server, model, data, int(n)), by_hellaswag(program, model, data, int(n))
    print("1..2")
    for number, (name, theirs, ours) in enumerate(zip(("acc", "acc_norm"), harness, own), 1):
        print(f"{'ok' if abs(theirs - ours) < .01 else 'not ok'} {number} - {name}: {theirs:.2f} by the harness, {ours:.2f} by hellaswag")
    return any(abs(theirs - ours) >= .01 for theirs, ours in zip(harness, own))


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
