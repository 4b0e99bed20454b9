#!/usr/bin/env python3
"""Measures OpenVINO GenAI on the CPU: prints its rates of prefill and decode with a GGUF file, as JSON.

    genai.py MODEL.gguf --prompt 512 --new 128 --threads 2 --rounds 1
"""
import argparse
import json
import statistics

import numpy
import openvino
import openvino_genai


def tokens(n, first):
    """Returns n tokens. The first differs from run to run, because the pipeline reuses the cache of common prefixes."""
    ids = [(i * 37) % 5000 + 10 for i in range(n)]
    ids[0] = first
    ids = numpy.array([ids], dtype=numpy.int64)
    return openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))


def run(pipe, prompt, new, first):
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = new
    config.ignore_eos = True
    config.do_sample = False
    config.apply_chat_template = False
    return pipe.generate(tokens(prompt, first), config).perf_metrics


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    pipe = openvino_genai.LLMPipeline(args.model, "CPU", INFERENCE_NUM_THREADS=args.threads)
    run(pipe, args.prompt, 8, 9000)  # warm-up
    prefill, decode = [], []
    for i in range(args.rounds):
        prefill.append(args.prompt / run(pipe, args.prompt, 1, 9001 + 2 * i).get_ttft().mean * 1e3)
        decode.append(1e3 / run(pipe, 1, args.new + 1, 9002 + 2 * i).get_tpot().mean)
    print(json.dumps({"version": openvino_genai.__version__, "prefill_tok_s": statistics.median(prefill),
                      "decode_tok_s": statistics.median(decode)}))


if __name__ == "__main__":
    main()
