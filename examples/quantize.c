/*  quantize.c - converts a model to another type of weights.

    build/quantize IN OUT              a Hugging Face directory to one with int8 weights
    build/quantize [--calibrate TEXT] IN OUT.gguf TYPE
                                       a GGUF file or Hugging Face directory to a GGUF file; TYPE is for example Q8_0.
                                       Only GGUF files hold weights in blocks
    build/quantize --sparse 2:4 [--calibrate TEXT] IN OUT [bf16|int8]
                                       a Hugging Face directory to one in which, of each four weights, the two of
                                       smaller magnitude are zero
    build/quantize --pack IN OUT [DTYPE]    any model to a packed file, which loads in a few milliseconds; DTYPE is the
                                            type of the weights in memory (f32, f16, bf16, int8, int4 or file);
                                            default: that of IN
    build/quantize --check FILE             checks that a packed file is unchanged since it was written

    With --calibrate, the model first reads a text file in UTF-8. Rounding then favours the weights whose inputs were
    large, and --sparse multiplies magnitudes by the size of the inputs. Use about 50 kB of text of the kind that the
    model is for.

    For the written files, see llm_quantize_directory, llm_quantize_gguf, llm_prune_directory, llm_calibrate and
    llm_model_save_packed in llm.h. */
#define LLM_IMPLEMENTATION
#include "llm.h"

#include "examples/arrays.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int usage(const char *name) {
    fprintf(stderr,
            "usage: %s IN OUT\n"
            "       %s [--calibrate TEXT] IN OUT.gguf TYPE\n"
            "       %s --sparse 2:4 [--calibrate TEXT] IN OUT [bf16|int8]\n"
            "       %s --pack IN OUT [DTYPE]\n"
            "       %s --check FILE\n",
            name, name, name, name, name);
    return 1;
}

static llm_status explain(llm_error *err, llm_status code, const char *what, const char *path) {
    snprintf(err->message, sizeof err->message, "%s: %s", path, what);
    return err->code = code;
}

/* Appends a whole file to *text, an stb_ds array. */
static llm_status read_text(const char *path, char **text, llm_error *err) {
    enum { PIECE = 1 << 16 };
    FILE *file = fopen(path, "rb");
    for (size_t got = PIECE; file && got == PIECE;) {
        got = fread(arraddnptr(*text, PIECE), 1, PIECE, file);
        arrsetlen(*text, arrlenu(*text) - PIECE + got);
    }
    const bool failed = !file || ferror(file);
    if (file) fclose(file);
    return failed ? explain(err, LLM_ERROR_IO, "this file cannot be read", path) : LLM_OK;
}

/* Lets the model at `from` read the text at `path`. Without a path there is no importance. */
static llm_status calibrate(llm_importance **out, const char *from, const char *path, llm_error *err) {
    llm_model *model = NULL;
    char *text = NULL;
    *out = NULL;
    if (!path) return LLM_OK;
    llm_status status = read_text(path, &text, err);
    if (!status) status = llm_model_load(&model, from, NULL, err);
    if (!status) status = llm_calibrate(out, model, text, arrlenu(text), NULL, err);
    if (!status) printf("calibrated with %lld tokens of %s\n", (long long)llm_importance_n_tokens(*out), path);
    llm_model_free(model);
    arrfree(text);
    return status;
}

/* OUT must not exist. The library checks that, too, but only when the calibration is over. */
static llm_status check_absent(const char *to, llm_error *err) {
    FILE *file = fopen(to, "rb"); /* which on some systems also opens a directory */
    const bool exists = file || errno != ENOENT;
    if (file) fclose(file);
    return exists ? explain(err, LLM_ERROR_IO, "this exists already, and is not replaced", to) : LLM_OK;
}

/* A TYPE means a GGUF file, and no TYPE a directory. The name of OUT must say the same. */
static llm_status check_name(const char *to, const char *type, llm_error *err) {
    const char *end = strrchr(to, '.');
    const bool is_gguf = end && !strcmp(end, ".gguf");
    if (type && !is_gguf)
        return explain(
            err, LLM_ERROR_ARGUMENT,
            "with a TYPE the output is a GGUF file, whose name must end in .gguf. A directory with safetensors "
            "cannot hold blocks such as Q4_K; without a TYPE its weights become int8",
            to);
    if (!type && is_gguf)
        return explain(err, LLM_ERROR_ARGUMENT,
                       "the output is a directory with safetensors here; a GGUF file needs a TYPE, such as Q4_K_M", to);
    return LLM_OK;
}

static llm_status quantize_directory(const char *from, const char *to, llm_error *err) {
    llm_status status = check_name(to, NULL, err);
    return status ? status : llm_quantize_directory(from, to, NULL, err);
}

static llm_status prune(const char *from, const char *to, llm_dtype dtype, const char *text, llm_error *err) {
    llm_importance *importance = NULL;
    llm_status status = check_name(to, NULL, err);
    if (!status && text) status = check_absent(to, err);
    if (!status) status = calibrate(&importance, from, text, err);
    if (!status) status = llm_prune_directory(from, to, dtype, importance, NULL, err);
    llm_importance_free(importance);
    return status;
}

static bool stop(void *user, float done) {
    (void)user, (void)done;
    return false;
}

static llm_status write_gguf(const char *from, const char *to, const char *type, const char *text, llm_error *err) {
    llm_quantize_desc desc = {.type = type};
    llm_importance *importance = NULL;
    llm_status status = check_name(to, type, err);
    if (!status && text) { /* before a calibration of minutes: is anything wrong with OUT or TYPE? */
        desc.host.progress = stop;
        status = llm_quantize_gguf(from, to, &desc, err);
        if (status == LLM_ERROR_CANCELLED) status = LLM_OK;
        desc.host.progress = NULL;
    }
    if (!status) status = calibrate(&importance, from, text, err);
    desc.importance = importance;
    if (!status) status = llm_quantize_gguf(from, to, &desc, err);
    llm_importance_free(importance);
    return status;
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
    if (!status) printf("%s is unchanged since it was written: %s\n", path, llm_model_get_info(model).held);
    llm_model_free(model);
    return status;
}

int main(int argc, char **argv) {
    const char *name = argv[0], *option = argc > 1 && !strncmp(argv[1], "--", 2) ? argv[1] : "", *text = NULL;
    const bool sparse = argc > 2 && !strcmp(option, "--sparse") && !strcmp(argv[2], "2:4");
    llm_error err;
    llm_status status;
    if (sparse) argc -= 2, argv += 2;
    if ((sparse || !strcmp(option, "--calibrate")) && argc > 2 && !strcmp(argv[1], "--calibrate")) {
        text = argv[2];
        argc -= 2, argv += 2;
    }
    if (sparse && (argc == 3 || argc == 4)) {
        llm_dtype dtype = argc == 4 ? llm_dtype_from_name(argv[3]) : LLM_DTYPE_BF16;
        if (!dtype) return usage(name);
        status = prune(argv[1], argv[2], dtype, text, &err);
    } else if (!strcmp(option, "--pack") && (argc == 4 || argc == 5)) {
        llm_dtype dtype = argc == 5 ? llm_dtype_from_name(argv[4]) : LLM_DTYPE_DEFAULT;
        if (argc == 5 && !dtype) return usage(name);
        status = pack(argv[2], argv[3], dtype, &err);
    } else if (!strcmp(option, "--check") && argc == 3) {
        status = check(argv[2], &err);
    } else if (!*option && argc == 3) {
        status = quantize_directory(argv[1], argv[2], &err);
    } else if ((!*option || text) && argc == 4) {
        status = write_gguf(argv[1], argv[2], argv[3], text, &err);
    } else {
        return usage(name);
    }
    if (status) fprintf(stderr, "quantize: %s\n", err.message);
    return status != LLM_OK;
}
