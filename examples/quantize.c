/*  quantize.c - make a model's weights int8, once, so that loading them as int8 needs no conversion.

    build/quantize IN OUT

    IN is a directory as Hugging Face has them, with weights of F32, F16 or BF16. OUT is a new directory of the same kind:
    the matrices inside the layers (..._proj.weight) are int8 with one f32 scale for each output, in the naming of
    compressed-tensors ("int-quantized"), all else is as it was. Loaded with LLM_DTYPE_INT8 it is, to the bit, what IN is
    when it is loaded so. */
#define LLM_IMPLEMENTATION
#include "llm.h"

#include <sys/stat.h>

static const char CONFIG[] =
    "{\"quantization_config\": {\"quant_method\": \"compressed-tensors\", \"format\": \"int-quantized\", "
    "\"quantization_status\": \"compressed\", \"ignore\": [\"lm_head\"], \"config_groups\": {\"group_0\": "
    "{\"targets\": [\"Linear\"], \"format\": \"int-quantized\", \"input_activations\": null, \"output_activations\": null, "
    "\"weights\": {\"num_bits\": 8, \"type\": \"int\", \"symmetric\": true, \"strategy\": \"channel\", \"dynamic\": false, "
    "\"group_size\": null, \"block_structure\": null, \"actorder\": null, \"observer\": \"minmax\", \"observer_kwargs\": {}}}}},";

static const char *const COPIED[] = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json",
                                     "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                                     "chat_template.jinja"};

typedef struct job {
    const char *in, *out;
} job;

/* NULL if it is to be read and does not exist. */
static FILE *open_file(llm__env *env, const char *directory, const char *name, const char *mode) {
    FILE *file = fopen(llm__path_join(env, directory, name), mode);
    if (!file && (*mode == 'w' || errno != ENOENT))
        llm__fail(env, LLM_ERROR_IO, "%s/%s cannot be %s: %s", directory, name, *mode == 'w' ? "written" : "read", strerror(errno));
    return file;
}

static void put(llm__env *env, FILE *file, const void *bytes, size_t n) {
    if (n && fwrite(bytes, 1, n, file) != n) llm__fail(env, LLM_ERROR_IO, "writing failed: %s", strerror(errno));
}

static void close_file(llm__env *env, FILE *file) {
    if (fclose(file)) llm__fail(env, LLM_ERROR_IO, "writing failed: %s", strerror(errno));
}

/* Copies a file that may be missing; `begin` takes the place of its first `skip` bytes. */
static void copy_file(llm__env *env, const job *job, const char *name, const char *begin, size_t skip) {
    char buffer[4096];
    FILE *from = open_file(env, job->in, name, "rb");
    if (!from) return;
    FILE *to = open_file(env, job->out, name, "wb");
    bool failed = fseek(from, (long)skip, SEEK_SET) != 0;
    put(env, to, begin, strlen(begin));
    for (size_t n; !failed && (n = fread(buffer, 1, sizeof buffer, from)) > 0;) put(env, to, buffer, n);
    if (failed || ferror(from)) llm__fail(env, LLM_ERROR_IO, "%s/%s cannot be read: %s", job->in, name, strerror(errno));
    fclose(from);
    close_file(env, to);
}

/* config.json with one thing more: what the weights now are. */
static void write_config(llm__env *env, const job *job, const llm__checkpoint *ck) {
    int c;
    if (llm__json_get(ck->config, "quantization_config") || llm__json_get(ck->config, "compression_config"))
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "the weights are quantised already");
    FILE *file = open_file(env, job->in, "config.json", "rb");
    while (file && (c = fgetc(file)) != EOF && c != '{') {}
    long skip = file ? ftell(file) : -1;
    if (skip < 1 || feof(file) || ferror(file))
        llm__fail(env, LLM_ERROR_IO, "%s/config.json cannot be read any more, or is no longer what it was", job->in);
    fclose(file);
    copy_file(env, job, "config.json", CONFIG, (size_t)skip);
}

static bool is_quantized(const llm__tensor *t) {
    static const char end[] = "_proj.weight";
    size_t n = sizeof end - 1;
    return t->rows > 1 && t->name.n > n && !memcmp(t->name.at + t->name.n - n, end, n);
}

static void check_type(llm__env *env, const llm__tensor *t) {
    int type = (int)t->type->type;
    if (type != LLM__F32 && type != LLM__F16 && type != LLM__BF16)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "tensor %.*s is of type %s; F32, F16 and BF16 are quantised", LLM__SHOW(t->name),
                  t->type->name);
}

/* One tensor's entry, of a vector if rows is 0; *at is where its bytes begin, and then where they end. Returns the
   characters written. */
static size_t describe(char *to, size_t room, const llm__tensor *t, const char *more, const char *type, uint64_t rows,
                       uint64_t cols, uint64_t bytes, uint64_t *at) {
    char shape[64];
    int start = rows ? snprintf(shape, sizeof shape, "%llu, ", (unsigned long long)rows) : 0;
    snprintf(shape + start, sizeof shape - (size_t)start, "%llu", (unsigned long long)cols);
    int n = snprintf(to, room, "%s\"%.*s%s\": {\"dtype\": \"%s\", \"shape\": [%s], \"data_offsets\": [%llu, %llu]}",
                     *at ? ", " : "", (int)t->name.n, t->name.at, more, type, shape, (unsigned long long)*at,
                     (unsigned long long)(*at + bytes));
    *at += bytes;
    return (size_t)n;
}

/* Scales first, so that all stay aligned; the same order as the bytes are written in. */
static void write_header(llm__env *env, FILE *file, const llm__checkpoint *ck) {
    size_t room = 16, n = 0;
    uint64_t at = 0;
    for (size_t i = 0; i < ck->n_tensors; i++) room += 2 * (ck->tensors[i].name.n + 160);
    char *text = (char *)llm__alloc(env, room, 1);
    text[n++] = '{';
    for (int pass = 0; pass < 3; pass++)
        for (size_t i = 0; i < ck->n_tensors; i++) {
            const llm__tensor *t = &ck->tensors[i];
            bool quantized = is_quantized(t);
            if (pass == 0 && quantized) n += describe(text + n, room - n, t, "_scale", "F32", t->rows, 1, 4 * t->rows, &at);
            if (pass == 1 && !quantized)
                n += describe(text + n, room - n, t, "", t->type->name, t->rows > 1 ? t->rows : 0, t->cols,
                              t->rows * t->row_bytes, &at);
            if (pass == 2 && quantized) n += describe(text + n, room - n, t, "", "I8", t->rows, t->cols, t->rows * t->cols, &at);
        }
    text[n++] = '}';
    while (n % 8) text[n++] = ' ';
    uint8_t size[8];
    for (int i = 0; i < 8; i++) size[i] = (uint8_t)((uint64_t)n >> 8 * i);
    put(env, file, size, 8);
    put(env, file, text, n);
    llm__free(env->pool, text);
}

/* The rows of a tensor as int8, or, if `scales`, the number for each by which they are to be multiplied. */
static void write_rows(llm__env *env, FILE *file, const llm__tensor *t, bool scales) {
    float *row = (float *)llm__alloc(env, (size_t)t->cols, sizeof *row);
    int8_t *q = (int8_t *)llm__alloc(env, (size_t)t->cols, 1);
    for (uint64_t r = 0; r < t->rows; r++) {
        t->type->decode(t->data + r * t->row_bytes, (size_t)t->cols, row);
        float scale = llm__pack_quantize_row(row, (size_t)t->cols, q, 1);
        if (scales) put(env, file, &scale, sizeof scale);
        else put(env, file, q, (size_t)t->cols);
    }
    llm__free(env->pool, q);
    llm__free(env->pool, row);
}

static void write_tensors(llm__env *env, FILE *file, const llm__checkpoint *ck) {
    for (int pass = 0; pass < 3; pass++)
        for (size_t i = 0; i < ck->n_tensors; i++) {
            llm__tensor t = ck->tensors[i];
            if (is_quantized(&t) != (pass != 1)) continue;
            uint8_t *bytes = llm__tensor_bytes(env, &t);
            if (pass == 1) put(env, file, t.data, (size_t)(t.rows * t.row_bytes));
            else write_rows(env, file, &t, pass == 0);
            llm__free(env->pool, bytes);
        }
}

static void quantize(llm__env *env, void *arg) {
    const job *job = (const struct job *)arg;
    llm_model_desc desc = {.dtype = LLM_DTYPE_INT8};
    const llm__checkpoint *ck = llm__checkpoint_open(env, job->in, &desc);
    if (ck->format != LLM__HUGGING_FACE) llm__fail(env, LLM_ERROR_UNSUPPORTED, "it is no directory as Hugging Face has them");
    for (size_t i = 0; i < ck->n_tensors; i++) check_type(env, &ck->tensors[i]);
    if (mkdir(job->out, 0777)) llm__fail(env, LLM_ERROR_IO, "the directory %s cannot be made: %s", job->out, strerror(errno));
    write_config(env, job, ck);
    for (size_t i = 0; i < sizeof COPIED / sizeof *COPIED; i++) copy_file(env, job, COPIED[i], "", 0);
    FILE *file = open_file(env, job->out, "model.safetensors", "wb");
    write_header(env, file, ck);
    write_tensors(env, file, ck);
    close_file(env, file);
}

int main(int argc, char **argv) {
    llm__pool pool;
    llm__env env;
    llm_error err;
    if (argc != 3) {
        fprintf(stderr, "usage: %s IN OUT\n", argv[0]);
        return 1;
    }
    job job = {argv[1], argv[2]};
    memset(&pool, 0, sizeof pool);
    env.pool = &pool;
    env.err = &err;
    env.file = argv[1];
    llm_status status = llm__env_run(&env, quantize, &job);
    llm__pool_free(&pool);
    if (status) fprintf(stderr, "quantize: %s\n", err.message);
    return status != LLM_OK;
}
