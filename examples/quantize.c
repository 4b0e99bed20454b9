/*  quantize.c - write a model with weights of another type.

    build/quantize IN OUT              a Hugging Face directory to one with int8 weights
    build/quantize IN OUT.gguf TYPE    a GGUF file, or a Hugging Face directory, to a GGUF file; TYPE is for example Q8_0
    build/quantize --sparse 2:4 IN OUT [bf16|int8]    a Hugging Face directory to one in which, of each four weights, the
                                                      two of smaller magnitude are zero
    build/quantize --pack IN OUT [DTYPE]    any model to a packed file, which loads in a few milliseconds; DTYPE is the
                                            type of the weights in memory (f32, f16, bf16, int8, int4 or file);
                                            without it IN's
    build/quantize --check FILE             is a packed file as it was written?

    See llm_quantize_directory, llm_quantize_gguf, llm_prune_directory and llm_model_save_packed in llm.h for what is
    written. */
#define LLM_IMPLEMENTATION
#include "llm.h"

#include <stdio.h>
#include <string.h>

static int usage(const char *name) {
    fprintf(stderr,
            "usage: %s IN OUT\n"
            "       %s IN OUT.gguf TYPE\n"
            "       %s --sparse 2:4 IN OUT [bf16|int8]\n"
            "       %s --pack IN OUT [DTYPE]\n"
            "       %s --check FILE\n",
            name, name, name, name, name);
    return 1;
}

static llm_status pack(const char *from, const char *to, llm_dtype dtype, llm_error *err) {
    llm_model_desc desc = {.dtype = dtype};
    llm_model *model = NULL;
    llm_status status = llm_model_load(&model, from, &desc, err);
    if (!status) status = llm_model_save_packed(model, to, NULL, err);
    llm_model_free(model);
    return status;
}

static llm_status check(const char *path, llm_error *err) {
    llm_model_desc desc = {.check = true};
    llm_model *model = NULL;
    llm_status status = llm_model_load(&model, path, &desc, err);
    if (!status) printf("%s is as it was written: %s\n", path, llm_model_get_info(model).held);
    llm_model_free(model);
    return status;
}

int main(int argc, char **argv) {
    const char *option = argc > 1 && !strncmp(argv[1], "--", 2) ? argv[1] : "";
    llm_error err;
    llm_status status;
    if (!strcmp(option, "--sparse") && (argc == 5 || argc == 6) && !strcmp(argv[2], "2:4")) {
        llm_dtype dtype = argc == 6 ? llm_dtype_from_name(argv[5]) : LLM_DTYPE_BF16;
        if (!dtype) return usage(argv[0]);
        status = llm_prune_directory(argv[3], argv[4], dtype, NULL, &err);
    } else if (!strcmp(option, "--pack") && (argc == 4 || argc == 5)) {
        llm_dtype dtype = argc == 5 ? llm_dtype_from_name(argv[4]) : LLM_DTYPE_DEFAULT;
        if (argc == 5 && !dtype) return usage(argv[0]);
        status = pack(argv[2], argv[3], dtype, &err);
    } else if (!strcmp(option, "--check") && argc == 3) {
        status = check(argv[2], &err);
    } else if (!*option && argc == 3) {
        status = llm_quantize_directory(argv[1], argv[2], NULL, &err);
    } else if (!*option && argc == 4) {
        llm_quantize_desc desc = {.type = argv[3]};
        status = llm_quantize_gguf(argv[1], argv[2], &desc, &err);
    } else {
        return usage(argv[0]);
    }
    if (status) fprintf(stderr, "quantize: %s\n", err.message);
    return status != LLM_OK;
}
