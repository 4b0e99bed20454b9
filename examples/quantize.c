/*  quantize.c - write a model with weights of another type.

    build/quantize IN OUT              a Hugging Face directory to one with int8 weights
    build/quantize IN OUT.gguf TYPE    a GGUF file, or a Hugging Face directory, to a GGUF file; TYPE is for example Q8_0
    build/quantize --sparse 2:4 IN OUT [bf16|int8]    a Hugging Face directory to one in which, of each four weights, the
                                                      two of smaller magnitude are zero

    See llm_quantize_directory, llm_quantize_gguf and llm_prune_directory in llm.h for what is written. */
#define LLM_IMPLEMENTATION
#include "llm.h"

#include <stdio.h>
#include <string.h>

int main(int argc, char **argv) {
    llm_quantize_desc desc = {.type = argc == 4 ? argv[3] : NULL};
    llm_error err;
    bool sparse = argc >= 5 && argc <= 6 && !strcmp(argv[1], "--sparse") && !strcmp(argv[2], "2:4");
    llm_dtype dtype = argc == 6 ? llm_dtype_from_name(argv[5]) : LLM_DTYPE_BF16;
    if (argc != 3 && argc != 4 && !sparse) {
        fprintf(stderr, "usage: %s IN OUT, or %s IN OUT.gguf TYPE, or %s --sparse 2:4 IN OUT [bf16|int8]\n", argv[0],
                argv[0], argv[0]);
        return 1;
    }
    llm_status status = sparse      ? llm_prune_directory(argv[3], argv[4], dtype, NULL, &err)
                        : desc.type ? llm_quantize_gguf(argv[1], argv[2], &desc, &err)
                                    : llm_quantize_directory(argv[1], argv[2], NULL, &err);
    if (status) fprintf(stderr, "quantize: %s\n", err.message);
    return status != LLM_OK;
}
