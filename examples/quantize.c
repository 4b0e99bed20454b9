/*  quantize.c - make a model's weights int8, once, so that loading them as int8 needs no conversion.

    build/quantize IN OUT

    IN is a directory as Hugging Face publishes them, with weights of F32, F16 or BF16. OUT is a new directory of the same
    kind; see llm_quantize_directory in llm.h for what it holds. */
#define LLM_IMPLEMENTATION
#include "llm.h"

#include <stdio.h>

int main(int argc, char **argv) {
    llm_error err;
    if (argc != 3) {
        fprintf(stderr, "usage: %s IN OUT\n", argv[0]);
        return 1;
    }
    llm_status status = llm_quantize_directory(argv[1], argv[2], NULL, &err);
    if (status) fprintf(stderr, "quantize: %s\n", err.message);
    return status != LLM_OK;
}
