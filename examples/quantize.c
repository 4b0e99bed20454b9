/*  quantize.c - write a model with weights of another type.

    build/quantize IN OUT              a Hugging Face directory to one with int8 weights
    build/quantize IN OUT.gguf TYPE    a GGUF file to another one; TYPE is for example Q8_0

    See llm_quantize_directory and llm_quantize_gguf in llm.h for what is written. */
#define LLM_IMPLEMENTATION
#include "llm.h"

#include <stdio.h>

int main(int argc, char **argv) {
    llm_quantize_desc desc = {.type = argc == 4 ? argv[3] : NULL};
    llm_error err;
    if (argc != 3 && argc != 4) {
        fprintf(stderr, "usage: %s IN OUT, or %s IN.gguf OUT.gguf TYPE\n", argv[0], argv[0]);
        return 1;
    }
    llm_status status = desc.type ? llm_quantize_gguf(argv[1], argv[2], &desc, &err)
                                  : llm_quantize_directory(argv[1], argv[2], NULL, &err);
    if (status) fprintf(stderr, "quantize: %s\n", err.message);
    return status != LLM_OK;
}
