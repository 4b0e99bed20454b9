/*  bench.c - measures how fast a model runs, and the limits of the machine.

    build/bench -m MODEL [-p 512] [-n 128] [-d 0,2048] [--dtype bf16,int8,int4] [-t 1,2] [-r 5]
                        [-o md|csv|json|gpt-fast]

    Measures each type, thread count and depth: the median rates of prefill (p tokens after d others), of decode (n
    tokens after d others, one llm_forward each) and of llm_generate, which also samples, interleaved over r rounds.
    Without -t the thread counts are one per physical core, and one more, which shows the cost of too many threads.
    --temp sets llm_generate's temperature, with top-k 40, top-p 0.95 and min-p 0.05. --keep-zeros stores matrices with
    2:4 sparsity like all others. The limits are measured in the same run with the same threads: the bytes per second
    when the threads only read the weights (MBU is the share of it that decoding reaches, with the bytes of the cache),
    and the operations per second on data in the L1 cache (MFU is the share of it that prefill reaches).

    build/bench -m MODEL --draft lookup,self:int4 TEXT...      (bench/prompts has some)

    Compares plain and speculative decoding of n tokens in alternating rounds, for each text and draft. Prints the
    median rates and the share of right guesses. Fails if the tokens differ. --draft-max limits the guesses of a pass;
    --temp is the temperature.

    build/bench -m MODEL --rows 1,2,4,8

    Measures the cost of checking guesses: the median time of passes with these numbers of rows, which alternate, and
    the ratio to the first.

    build/bench -m MODEL -b 1,8,32 [-p 32] [-n 128]

    Measures several users at once with llm_step. Each stream has its own prompt of p tokens and generates n tokens.
    Prints the median rates of all streams together, in alternating rounds: for reading the prompts, and for generating.

    build/bench -m MODEL --grammars [-n 128]

    Measures what a grammar costs: n tokens are generated with and without it in alternating runs, for a JSON schema, a
    GBNF and a regular expression whose texts are long. Each run with a grammar makes it anew, so no mask is stored yet.
    Prints the median rates, from the call of llm_generate to its end, and the median of the ratios.

    mpirun -n 4 build/mpi/bench -m MODEL --tp 2 --pp 2

    Prints the first table for a model that several processes share. -t is the number of threads of each. MB/token, MBU
    and the limits are those of the first rank. MFU is relative to that rank's limit times the number of ranks. csv and
    json also have the time of a meeting, in which the ranks exchange one byte each, and the rate at which a rank
    receives data.

    build/bench -m MODEL --flops-table [-o md|csv]

    Prints the operations per second that the layers reach in one pass, for several numbers and lengths of sequences.
    This tells how many tokens a batch should have (min_tokens of LLM_SCHEDULE_DP). bench/flops-table.py draws it. */
#define LLM_IMPLEMENTATION
#include "llm.h"

#include "examples/ranks.h"

#include <argp.h>

enum {
    MOST = 16,
    MOST_ROWS = 64,
    MOST_STREAMS = 256,
    KEY_DTYPE = 256,
    KEY_RANDOM,
    KEY_SPARSE,
    KEY_KEEP_ZEROS,
    KEY_CACHE,
    KEY_DRAFT,
    KEY_DRAFT_MAX,
    KEY_TEMP,
    KEY_ROWS,
    KEY_GRAMMARS,
    KEY_FLOPS_TABLE,
    KEY_TP,
    KEY_PP
};

typedef struct options {
    const char *model, *random, *format;
    bool sparse, keep_zeros, grammars;
    int flops_table; /* max tokens in a batch; 0: no table */
    int n_prefill, n_decode, n_rounds;
    int depths[MOST], n_depths, threads[MOST], n_threads;
    llm_dtype dtypes[MOST], cache; /* cache: 0 for the library's choice */
    int n_dtypes;
    const char *drafts[MOST], *texts[MOST];
    int n_drafts, n_texts, draft_max, rows[MOST], n_rows, streams[MOST], n_streams;
    float temperature; /* of texts from llm_generate */
    ranks ranks;
} options;

typedef struct result {
    const char *dtype, *isa;
    int threads, depth;
    double prefill, decode, generate, mfu, mbu, load_seconds, peak_mib, megabytes_per_token, bandwidth, flops;
    double meeting, link; /* seconds per meeting of the ranks, and bytes per second between them; 0 for one rank */
} result;

/* ---- Options ---- */

static const struct argp_option OPTIONS[] = {
    {"model", 'm', "FILE", 0, "the model", 0},
    {"random", KEY_RANDOM, "SHAPE", 0,
     "instead of -m: random weights of a published shape: llama2-7b, tinyllama-1.1b, llama3.2-1b or smollm2-135m", 0},
    {"sparse", KEY_SPARSE, 0, 0, "with --random: 2:4 sparsity in the layers", 0},
    {"keep-zeros", KEY_KEEP_ZEROS, 0, 0, "store matrices with 2:4 sparsity like all others", 2},
    {"prefill", 'p', "N", 0, "tokens of a prompt (512; with -b: 32)", 1},
    {"decode", 'n', "N", 0, "tokens decoded after the prompt (128)", 1},
    {"depth", 'd', "LIST", 0, "tokens in the cache before the prompt (0)", 1},
    {"dtype", KEY_DTYPE, "LIST", 0, "types of the weights: f32, f16, bf16, int8, int4, file (bf16)", 2},
    {"cache", KEY_CACHE, "TYPE", 0, "type of the cache: f32, bf16, int8 (bf16; f32 with weights of f32 or f16)", 2},
    {"threads", 't', "LIST", 0, "threads (one per physical core; in the first table also one more)", 2},
    {"flops-table", KEY_FLOPS_TABLE, "N", OPTION_ARG_OPTIONAL,
     "instead of the first table: batches of several sequences, up to N tokens in all, with the first type and thread "
     "count",
     1},
    {"rounds", 'r', "N", 0, "rounds; results are medians over them (5)", 3},
    {"draft", KEY_DRAFT, "LIST", 0, "drafts to continue the texts with: lookup, self:int8, self:int4 or a model's file",
     4},
    {"draft-max", KEY_DRAFT_MAX, "N", 0, "max guesses in a pass (15)", 4},
    {"temp", KEY_TEMP, "T", 0, "temperature of llm_generate; small models repeat themselves at 0 (0)", 4},
    {"rows", KEY_ROWS, "LIST", 0, "compare passes of these numbers of tokens, up to 64", 4},
    {"grammars", KEY_GRAMMARS, 0, 0, "compare texts with and without grammars", 4},
    {"streams", 'b', "LIST", 0, "instead of the first table: numbers of texts generated at the same time", 1},
    {"tp", KEY_TP, "N", 0, "processes that share each layer (1)", 2},
    {"pp", KEY_PP, "N", 0, "groups of processes that share the layers (1)", 2},
    {"output", 'o', "FORMAT", 0, "md, csv, json, or gpt-fast: lines for scripts that parse gpt-fast's output (md)", 3},
    {0}};

/* Parses a list such as "0,2048". */
static int parse_list(struct argp_state *state, char *text, int least, int *list) {
    int n = 0;
    for (char *at = text, *end; n < MOST; at = end + 1) {
        long value = strtol(at, &end, 10);
        if (end == at || value < least || value > 1 << 20 || (*end && *end != ',')) break;
        list[n++] = (int)value;
        if (!*end) return n;
    }
    argp_error(state, "'%s' is not a list of up to %d integers from %d on", text, MOST, least);
    return 0;
}

static int parse_number(struct argp_state *state, char *text, int least) {
    int list[MOST];
    if (parse_list(state, text, least, list) != 1) argp_error(state, "'%s' is not one number", text);
    return list[0];
}

static int parse_dtypes(struct argp_state *state, char *text, llm_dtype *list) {
    int n = 0;
    for (char *name = strtok(text, ","); name; name = strtok(NULL, ",")) {
        if (n == MOST || !llm_dtype_from_name(name))
            argp_error(state, "'%s' is not one of f32, f16, bf16, int8, int4, file", name);
        list[n++] = llm_dtype_from_name(name);
    }
    return n;
}

static error_t parse_option(int key, char *arg, struct argp_state *state) {
    options *opt = (options *)state->input;
    switch (key) {
    case 'm': opt->model = arg; break;
    case KEY_RANDOM: opt->random = arg; break;
    case KEY_SPARSE: opt->sparse = true; break;
    case KEY_KEEP_ZEROS: opt->keep_zeros = true; break;
    case KEY_FLOPS_TABLE: opt->flops_table = arg ? parse_number(state, arg, 1) : 1 << 20; break;
    case 'p': opt->n_prefill = parse_number(state, arg, 1); break;
    case 'n': opt->n_decode = parse_number(state, arg, 1); break;
    case 'd': opt->n_depths = parse_list(state, arg, 0, opt->depths); break;
    case KEY_DTYPE: opt->n_dtypes = parse_dtypes(state, arg, opt->dtypes); break;
    case KEY_CACHE:
        opt->cache = llm_dtype_from_name(arg);
        if (opt->cache != LLM_DTYPE_F32 && opt->cache != LLM_DTYPE_BF16 && opt->cache != LLM_DTYPE_INT8)
            argp_error(state, "'%s' is not one of f32, bf16, int8", arg);
        break;
    case 't': opt->n_threads = parse_list(state, arg, 1, opt->threads); break;
    case 'r': opt->n_rounds = parse_number(state, arg, 1); break;
    case KEY_DRAFT:
        for (char *name = strtok(arg, ","); name; name = strtok(NULL, ",")) {
            if (opt->n_drafts == MOST) argp_error(state, "at most %d drafts are possible", MOST);
            opt->drafts[opt->n_drafts++] = name;
        }
        break;
    case KEY_DRAFT_MAX: opt->draft_max = parse_number(state, arg, 1); break;
    case KEY_TEMP:
        if (sscanf(arg, "%f", &opt->temperature) != 1 || !(opt->temperature >= 0))
            argp_error(state, "'%s' is not a temperature", arg);
        break;
    case KEY_TP: opt->ranks.tp = parse_number(state, arg, 1); break;
    case KEY_PP: opt->ranks.pp = parse_number(state, arg, 1); break;
    case 'b': opt->n_streams = parse_list(state, arg, 1, opt->streams); break;
    case KEY_GRAMMARS: opt->grammars = true; break;
    case KEY_ROWS: opt->n_rows = parse_list(state, arg, 1, opt->rows); break;
    case ARGP_KEY_ARG:
        if (opt->n_texts == MOST) argp_error(state, "at most %d texts are possible", MOST);
        opt->texts[opt->n_texts++] = arg;
        break;
    case 'o':
        if (strcmp(arg, "md") && strcmp(arg, "csv") && strcmp(arg, "json") && strcmp(arg, "gpt-fast"))
            argp_error(state, "'%s' is not one of md, csv, json, gpt-fast", arg);
        opt->format = arg;
        break;
    case ARGP_KEY_END:
        if (!opt->n_threads)
            opt->n_threads =
                opt->n_drafts || opt->n_rows || opt->n_streams || opt->grammars || opt->flops_table ? 1 : 2;
        if (!opt->n_prefill) opt->n_prefill = opt->n_streams ? 32 : 512;
        if (!opt->model == !opt->random) argp_error(state, "give either -m or --random");
        if (opt->sparse && !opt->random) argp_error(state, "--sparse needs --random");
        if (!opt->n_drafts != !opt->n_texts)
            argp_error(state, "--draft needs texts to continue, and texts need --draft");
        if (opt->n_drafts && !opt->model) argp_error(state, "random weights cannot continue texts: --draft needs -m");
        if (opt->grammars && !opt->model) argp_error(state, "random weights have no vocabulary: --grammars needs -m");
        if (opt->grammars && (opt->n_drafts || opt->n_rows || opt->n_streams))
            argp_error(state, "--grammars cannot be combined with -b, --draft or --rows");
        for (int i = 0; i < opt->n_rows; i++)
            if (opt->rows[i] > MOST_ROWS) argp_error(state, "--rows: at most %d", MOST_ROWS);
        for (int i = 0; i < opt->n_streams; i++)
            if (opt->streams[i] > MOST_STREAMS) argp_error(state, "-b: at most %d", MOST_STREAMS);
        if ((opt->ranks.tp > 1 || opt->ranks.pp > 1) &&
            (opt->n_drafts || opt->n_rows || opt->n_streams || opt->grammars || opt->flops_table))
            argp_error(state, "--tp and --pp cannot be combined with -b, --draft, --rows, --grammars or --flops-table");
        if (opt->flops_table && !strcmp(opt->format, "json"))
            argp_error(state, "--flops-table can only be printed as md or csv");
        break;
    default: return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

/* ---- Memory ---- */

typedef struct memory {
    size_t now, peak;
} memory;

/* An allocator that counts bytes. Each block's size is stored before it. */
static void *count_alloc(void *user, size_t size) {
    memory *m = (memory *)user;
    size_t *block = (size_t *)malloc(size + 2 * sizeof *block);
    if (!block) return NULL;
    block[0] = size;
    m->now += size;
    if (m->now > m->peak) m->peak = m->now;
    return block + 2;
}

static void count_free(void *user, void *ptr) {
    size_t *block = (size_t *)ptr - 2;
    ((memory *)user)->now -= block[0];
    free(block);
}

/* ---- Random models ---- */

typedef struct shape {
    const char *name;
    llm_backend_shape shape;
    int n_ctx;
} shape;

static const shape SHAPES[] = {
    {"llama2-7b", {32000, 32, 4096, 11008, 32, 32, 128, 128, 1e-5f, NULL, 1, 0, false, false, false, 0}, 4096},
    {"tinyllama-1.1b", {32000, 22, 2048, 5632, 32, 4, 64, 64, 1e-5f, NULL, 1, 0, false, false, false, 0}, 2048},
    {"llama3.2-1b", {128256, 16, 2048, 8192, 32, 8, 64, 64, 1e-5f, NULL, 1, 0, true, false, false, 0}, 131072},
    {"smollm2-135m", {49152, 30, 576, 1536, 9, 3, 64, 64, 1e-5f, NULL, 1, 0, true, false, false, 0}, 8192}};

/* Rows are different windows of one array of random numbers, which is fast. */
enum { RANDOM_RUN = 1 << 16 };

static void random_row(const llm_backend_weight *weight, int row, float *out) {
    const float *run = (const float *)weight->source;
    size_t at = ((size_t)row * 7919 + (size_t)weight->layer * 104729 + (size_t)weight->kind * 1299709) % RANDOM_RUN;
    for (int i = 0; i < weight->cols; i++, at = (at + 1) % RANDOM_RUN) out[i] = weight->rows == 1 ? 1 : run[at];
}

/* The same with 2:4 sparsity. */
static void random_sparse_row(const llm_backend_weight *weight, int row, float *out) {
    random_row(weight, row, out);
    for (int i = 0; i < weight->cols && weight->rows > 1; i++)
        if ((i + i / 4 + row) % 4 < 2) out[i] = 0;
}

static const void *no_raw_row(const llm_backend_weight *weight, int row, int *type) {
    (void)weight, (void)row;
    *type = LLM__F32;
    return NULL;
}

typedef struct random_args {
    const shape *shape;
    llm_model_desc desc;
    bool sparse;
    const float *run;
    llm_model *model;
} random_args;

/* Counts the bytes of a weight or, once the device is open, uploads the weight. A rank has some of the rows, and a
   stage of a pipeline some of the layers, as in llm__model_walk_weight. */
static void random_weight(llm__env *env, random_args *a, llm_backend_weight_kind kind, int layer) {
    const llm_backend_shape *s = &a->shape->shape;
    const llm__hparams h = {.tied_head = s->tied_head};
    const llm__model_walk walk = {.h = &h, .shape = s, .pipeline = a->desc.pipeline};
    bool own = llm__model_has_weight(&walk, kind, layer),
         tied = s->tied_head && llm__ranks_is_last_stage(a->desc.pipeline);
    int q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim;
    llm_backend_weight w = {.kind = kind,
                            .layer = layer,
                            .rows = 1,
                            .cols = s->n_embd,
                            .source = a->run,
                            .read_row = random_row,
                            .raw_row = no_raw_row};
    int parts[3] = {1, 0, 0};
    if (a->sparse && kind != LLM_WEIGHT_EMBEDDING && kind != LLM_WEIGHT_HEAD) {
        w.read_row = random_sparse_row;
        w.is_2_4 = !a->desc.keep_zeros;
    }
    if (kind == LLM_WEIGHT_EMBEDDING || kind == LLM_WEIGHT_HEAD) parts[0] = s->n_vocab;
    if (kind == LLM_WEIGHT_QKV) parts[0] = q, parts[1] = parts[2] = kv;
    if (kind == LLM_WEIGHT_GATE_UP) parts[0] = parts[1] = s->n_ff;
    if (kind == LLM_WEIGHT_ATTENTION_OUT || kind == LLM_WEIGHT_DOWN) parts[0] = s->n_embd;
    w.rows = 0;
    for (int i = 0; i < 3; i++) w.rows += llm__ranks_rows(a->desc.tensor, s, kind, i, parts[i]).n;
    if (kind == LLM_WEIGHT_ATTENTION_OUT) w.cols = q;
    if (kind == LLM_WEIGHT_DOWN) w.cols = s->n_ff;
    uint64_t bytes = parts[0] == 1 ? 4 * (uint64_t)w.cols : a->model->backend->weight_bytes(a->desc.dtype, &w);
    if (!a->model->device) a->model->info.n_params += (uint64_t)(parts[0] + parts[1] + parts[2]) * (uint64_t)w.cols;
    if (!own) return;
    if (a->model->device) {
        if (layer) w.layer -= llm__ranks_own_layers(s, a->desc.pipeline).first;
        if (a->model->backend->upload(a->model->device, &w, env->err))
            llm__fail(env, env->err->code, "%s", env->err->message);
        return;
    }
    a->model->info.weight_bytes += bytes;
    if (kind != LLM_WEIGHT_EMBEDDING || tied) a->model->info.weight_bytes_per_token += bytes;
}

static void random_weights(llm__env *env, random_args *a) {
    static const llm_backend_weight_kind kinds[] = {LLM_WEIGHT_ATTENTION_NORM, LLM_WEIGHT_QKV,
                                                    LLM_WEIGHT_ATTENTION_OUT,  LLM_WEIGHT_FFN_NORM,
                                                    LLM_WEIGHT_GATE_UP,        LLM_WEIGHT_DOWN};
    random_weight(env, a, LLM_WEIGHT_EMBEDDING, 0);
    for (int i = 0; i < a->shape->shape.n_layers; i++)
        for (size_t j = 0; j < sizeof kinds / sizeof *kinds; j++) random_weight(env, a, kinds[j], i);
    random_weight(env, a, LLM_WEIGHT_OUTPUT_NORM, 0);
    if (!a->shape->shape.tied_head) random_weight(env, a, LLM_WEIGHT_HEAD, 0);
}

static void random_body(llm__env *env, void *arg) {
    random_args *a = (random_args *)arg;
    llm_model *m = a->model = (llm_model *)llm__alloc_zero(env, 1, sizeof *m);
    const llm_backend_shape *s = &a->shape->shape;
    double *frequencies = (double *)llm__alloc(env, (size_t)s->rope_dim / 2, sizeof *frequencies);
    for (int i = 0; i < s->rope_dim / 2; i++)
        frequencies[i] = llm__math_exp2(-2.0 * i / s->rope_dim * llm__math_log2(10000));
    m->tokenizer = (llm_tokenizer *)llm__alloc_zero(env, 1, sizeof *m->tokenizer); /* it has no tokens */
    m->backend = &llm__cpu_backend;
    m->desc = a->desc;
    m->shape = *s;
    m->shape.rope_frequencies = frequencies;
    m->kernels = llm__kernels_choose(NULL);
    m->info.isa = m->kernels->name;
    m->info.n_vocab = s->n_vocab;
    m->info.n_ctx_train = a->shape->n_ctx;
    m->info.dtype = a->desc.dtype;
    const llm_backend_shape own = llm_backend_find_ranks(s, a->desc.tensor, a->desc.pipeline).shape;
    m->info.n_own_layers = own.n_layers;
    m->info.n_own_kv_heads = own.n_kv_heads;
    m->info.cache_bytes_per_token =
        m->backend->block_bytes(&own, llm__model_cache_dtype(m->backend, a->desc.dtype)) / LLM_CACHE_BLOCK;
    random_weights(env, a);
    m->shape.weight_bytes = m->info.weight_bytes;
    if (m->backend->open(&m->device, &m->shape, &a->desc, env->err))
        llm__fail(env, env->err->code, "%s", env->err->message);
    random_weights(env, a);
    m->pool = *env->pool;
}

static llm_status load_random(llm_model **out, const options *opt, const llm_model_desc *desc, llm_error *err) {
    random_args args = {NULL, *desc, opt->sparse, NULL, NULL};
    const char *name = opt->random;
    llm__pool pool = {desc->host, NULL};
    llm__env env;
    float *run = (float *)malloc(RANDOM_RUN * sizeof *run);
    if (!run) return llm__error(err, LLM_ERROR_MEMORY, "out of memory");
    for (uint32_t i = 0, x = 1; i < RANDOM_RUN; i++, x = x * 1664525u + 1013904223u)
        run[i] = (float)(int32_t)x * (0.03f / 2147483648.0f);
    for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++)
        if (!strcmp(SHAPES[i].name, name)) args.shape = &SHAPES[i];
    if (!args.shape) {
        free(run);
        return llm__error(err, LLM_ERROR_ARGUMENT, "unknown shape '%s'; see --help", name);
    }
    if (!args.desc.n_threads) args.desc.n_threads = llm__team_default_threads();
    args.run = run;
    env.pool = &pool;
    env.err = err;
    env.file = name;
    llm_status status = llm__env_run(&env, random_body, &args);
    free(run);
    if (status) {
        if (args.model) llm__cpu_backend.close(args.model->device);
        llm__pool_free(&pool);
        return status;
    }
    *out = args.model;
    return LLM_OK;
}

/* ---- Measuring ---- */

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n) {
    qsort(values, (size_t)n, sizeof *values, compare_doubles);
    return (values[(n - 1) / 2] + values[n / 2]) / 2;
}

static void fail(const llm_error *err) {
    fprintf(stderr, "bench: %s\n", err->message);
    exit(1);
}

/* Appends n tokens, in passes of at most `step`. Returns the seconds it took. */
static double run(llm_context *ctx, int n, int step) {
    static llm_token tokens[1 << 20];
    llm_error err;
    double start = llm__clock_now();
    for (int i = 0; i < n; i += step) {
        int some = n - i < step ? n - i : step;
        for (int j = 0; j < some; j++) tokens[j] = (llm_token)((i + j) * 37 % 5000 + 10);
        llm_batch batch = {some, tokens, NULL, NULL};
        if (llm_forward(ctx, &batch, &err)) fail(&err);
    }
    return llm__clock_now() - start;
}

/* Counts the operations of a prefill of n tokens after d others: products, and attention to all earlier keys. */
static double prefill_operations(const llm_model *model, int n, int d) {
    const llm_backend_shape *s = &model->shape;
    double q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim;
    double weights = (double)s->n_layers * s->n_embd * (2 * q + 2 * kv + 3.0 * s->n_ff);
    double keys = (double)n * d + (double)n * (n + 1) / 2;
    return 2 * weights * n + 4 * q * keys * s->n_layers + 2.0 * s->n_vocab * s->n_embd;
}

/* Returns the bytes that this rank reads per token, on average over n tokens after d others. */
static double decode_bytes(const llm_context *ctx, int n, int d) {
    const llm_model *model = llm_context_model(ctx);
    llm_backend_shape own = model->shape;
    own.n_layers = model->info.n_own_layers;
    own.n_kv_heads = model->info.n_own_kv_heads;
    double cache = (double)model->backend->block_bytes(&own, llm_context_cache_dtype(ctx)) / LLM_CACHE_BLOCK;
    return (double)model->info.weight_bytes_per_token + cache * (d + n / 2.0);
}

/* Generates n + 1 tokens with llm_generate. Returns the seconds after the first one. */
static double generate(llm_context *ctx, const options *opt, int n) {
    int depth = llm_seq_length(ctx, 0);
    llm_token *prompt = (llm_token *)calloc((size_t)depth + 1, sizeof *prompt);
    llm_sampler sampler = {.temperature = opt->temperature, .top_k = 40, .top_p = 0.95f, .min_p = 0.05f, .seed = 1};
    llm_generate_desc desc = {
        .tokens = prompt, .n_tokens = depth + 1, .max_tokens = n + 1, .sampler = &sampler, .ignore_end = true};
    llm_stats stats;
    llm_error err;
    if (!prompt) exit(1);
    if (depth) memcpy(prompt, llm_seq_tokens(ctx, 0), (size_t)depth * sizeof *prompt);
    prompt[depth] = 10;
    if (llm_generate(ctx, &desc, &stats, &err)) fail(&err);
    free(prompt);
    return stats.decode_seconds;
}

/* Returns the median time in seconds of exchanges in which each rank gives n bytes to all others. */
static double time_exchange(llm_comm *comm, size_t n) {
    enum { TIMES = 201 };
    double seconds[TIMES];
    size_t row = n * (size_t)comm->size;
    uint8_t *data = (uint8_t *)calloc(1, row + 1);
    llm_exchange x = {data, 1, row, row, n, comm->size, NULL, 0};
    llm_error err;
    if (!data) exit(1);
    for (int i = 0; i < TIMES; i++) {
        unsigned flags = 0;
        double start = llm__clock_now();
        if (comm->exchange(comm, &x, &flags, &err)) fail(&err);
        seconds[i] = llm__clock_now() - start;
    }
    free(data);
    return median(seconds, TIMES);
}

static void measure(llm_context *ctx, const options *opt, const memory *mem, double load_seconds, result *results) {
    const llm_model *model = llm_context_model(ctx);
    int n_rates = MOST * opt->n_rounds, n_ranks = opt->ranks.tp * opt->ranks.pp;
    double *prefill = (double *)calloc((size_t)(3 * n_rates), sizeof *prefill), *decode = prefill + n_rates,
           *whole = decode + n_rates;
    double bandwidth = llm_measure_bandwidth(ctx), flops = llm_measure_flops(ctx), meeting = 0, link = 0;
    llm_comm *comm = opt->ranks.tensor ? opt->ranks.tensor : opt->ranks.pipeline;
    if (!prefill) exit(1);
    if (comm) {
        const size_t n = 256 << 10;
        meeting = time_exchange(comm, 1);
        link = (double)n * (comm->size - 1) / (time_exchange(comm, n) - meeting);
    }
    run(ctx, opt->n_prefill, opt->n_prefill); /* warm-up with a full prompt, as in bench/peers */
    for (int round = 0; round < opt->n_rounds; round++)
        for (int i = 0; i < opt->n_depths; i++) {
            llm_seq_truncate(ctx, 0, 0, NULL);
            run(ctx, opt->depths[i], 512);
            prefill[i * opt->n_rounds + round] = opt->n_prefill / run(ctx, opt->n_prefill, opt->n_prefill);
            llm_seq_truncate(ctx, 0, opt->depths[i], NULL);
            decode[i * opt->n_rounds + round] = opt->n_decode / run(ctx, opt->n_decode, 1);
            llm_seq_truncate(ctx, 0, opt->depths[i], NULL);
            whole[i * opt->n_rounds + round] = opt->n_decode / generate(ctx, opt, opt->n_decode);
        }
    double again = llm_measure_bandwidth(ctx); /* other programs disturb this, so the better result is used */
    if (again > bandwidth) bandwidth = again;
    for (int i = 0; i < opt->n_depths; i++) {
        result r = {llm_dtype_name(model->info.dtype),
                    model->info.isa,
                    llm_context_n_threads(ctx),
                    opt->depths[i],
                    0,
                    0,
                    0,
                    0,
                    0,
                    load_seconds,
                    (double)mem->peak / 1048576,
                    0,
                    bandwidth,
                    flops,
                    meeting,
                    link};
        r.prefill = median(prefill + i * opt->n_rounds, opt->n_rounds);
        r.decode = median(decode + i * opt->n_rounds, opt->n_rounds);
        r.generate = median(whole + i * opt->n_rounds, opt->n_rounds);
        r.megabytes_per_token = decode_bytes(ctx, opt->n_decode, r.depth) / 1e6;
        r.mfu = prefill_operations(model, opt->n_prefill, r.depth) * r.prefill / opt->n_prefill / (n_ranks * flops);
        r.mbu = r.megabytes_per_token * 1e6 * r.decode / bandwidth;
        results[i] = r;
    }
    free(prefill);
}

/* ---- Speculative decoding ---- */

static void load_model(const options *opt, const llm_model_desc *desc, llm_model **model) {
    llm_error err;
    if (opt->random ? load_random(model, opt, desc, &err) : llm_model_load(model, opt->model, desc, &err)) fail(&err);
}

static char *read_text(const char *path) {
    FILE *f = fopen(path, "rb");
    char *text = (char *)calloc(1, 1 << 20);
    if (!f || !text || !fread(text, 1, (1 << 20) - 1, f)) {
        fprintf(stderr, "bench: %s: the text cannot be read\n", path);
        exit(1);
    }
    fclose(f);
    return text;
}

typedef struct tokens {
    llm_token ids[1 << 14];
    int n;
} tokens;

static bool keep_token(void *user, llm_token token, const char *bytes, size_t n_bytes) {
    tokens *t = (tokens *)user;
    (void)bytes, (void)n_bytes;
    if (t->n < 1 << 14) t->ids[t->n++] = token;
    return true;
}

/* Continues a text. Returns tokens per second, not counting the first token. */
static double continue_text(llm_context *ctx, const options *opt, const char *text, llm_draft *draft, tokens *out,
                            llm_stats *stats) {
    llm_sampler sampler = {.temperature = opt->temperature, .seed = 1};
    llm_generate_desc desc = {.prompt = text,
                              .sampler = &sampler,
                              .draft_keeps_text = true,
                              .max_tokens = opt->n_decode,
                              .ignore_end = true,
                              .draft = draft,
                              .draft_max = opt->draft_max,
                              .on_token = keep_token,
                              .user = out};
    llm_error err;
    out->n = 0;
    llm_seq_truncate(ctx, 0, 0, NULL);
    if (llm_generate(ctx, &desc, stats, &err)) fail(&err);
    return (stats->n_generated - 1) / stats->decode_seconds;
}

static void open_draft(llm_context *ctx, const options *opt, const char *name, llm_model_desc desc, llm_model **model,
                       llm_draft *draft) {
    bool self = !strncmp(name, "self:", 5);
    llm_error err;
    *model = NULL;
    *draft = llm_draft_lookup();
    if (!strcmp(name, "lookup")) return;
    desc.dtype = self ? llm_dtype_from_name(name + 5) : LLM_DTYPE_DEFAULT;
    if (self && !desc.dtype) {
        fprintf(stderr, "bench: %s: unknown type\n", name);
        exit(1);
    }
    if (llm_model_load(model, self ? opt->model : name, &desc, &err) || llm_draft_model(draft, ctx, *model, &err))
        fail(&err);
}

/* Continues each text without and with the draft, in alternating rounds. The draft learns over all rounds of a text. */
static void compare_draft(llm_context *ctx, const options *opt, const char *name, const llm_model_desc *desc) {
    llm_model *model;
    llm_draft draft;
    tokens *plain = (tokens *)calloc(2, sizeof *plain), *quick = plain + 1;
    double *rates = (double *)calloc((size_t)opt->n_rounds * 2, sizeof *rates);
    if (!plain || !rates) exit(1);
    open_draft(ctx, opt, name, *desc, &model, &draft);
    for (int i = 0; i < opt->n_texts; i++) {
        char *text = read_text(opt->texts[i]);
        llm_stats stats;
        memset(&draft.learnt, 0, sizeof draft.learnt);      /* forgets other texts */
        continue_text(ctx, opt, text, NULL, plain, &stats); /* warm-up */
        for (int round = 0; round < opt->n_rounds; round++) {
            rates[round] = continue_text(ctx, opt, text, NULL, plain, &stats);
            rates[opt->n_rounds + round] = continue_text(ctx, opt, text, &draft, quick, &stats);
            if (plain->n != quick->n || memcmp(plain->ids, quick->ids, (size_t)plain->n * sizeof(llm_token))) {
                fprintf(stderr, "bench: %s: with draft %s the text differs\n", opt->texts[i], name);
                exit(1);
            }
        }
        double before = median(rates, opt->n_rounds), after = median(rates + opt->n_rounds, opt->n_rounds);
        const char *slash = strrchr(opt->texts[i], '/');
        if (!strcmp(opt->format, "gpt-fast")) {
            printf("Average tokens/sec: %.2f\n", after);
            free(text);
            continue;
        }
        printf("| %s | %s | %s | %d | %d | %.1f | %.1f | %.2f | %.0f %% of %d | %.2f |\n",
               slash ? slash + 1 : opt->texts[i], llm_dtype_name(desc->dtype), name, llm_context_n_threads(ctx),
               stats.n_prompt, before, after, after / before,
               stats.draft.n_proposed ? 100.0 * stats.draft.n_accepted / stats.draft.n_proposed : 0.0,
               stats.draft.n_proposed, (double)(stats.n_generated - 1) / stats.n_decode_passes);
        fflush(stdout);
        free(text);
    }
    llm_draft_free(&draft);
    llm_model_free(model);
    free(rates);
    free(plain);
}

/* Alternates passes of different numbers of rows after the same `depth` tokens. */
static void compare_rows(llm_context *ctx, const options *opt, int depth) {
    llm_token ids[MOST_ROWS];
    bool logits[MOST_ROWS];
    double *seconds = (double *)calloc((size_t)(MOST * opt->n_rounds), sizeof *seconds), first = 0;
    llm_error err;
    if (!seconds) exit(1);
    for (int i = 0; i < MOST_ROWS; i++) {
        ids[i] = i * 37 % 5000 + 10;
        logits[i] = true;
    }
    llm_seq_truncate(ctx, 0, 0, NULL);
    run(ctx, depth + 8, 512); /* warm-up */
    llm_seq_truncate(ctx, 0, depth, NULL);
    for (int round = 0; round < opt->n_rounds; round++)
        for (int i = 0; i < opt->n_rows; i++) {
            llm_batch batch = {opt->rows[i], ids, NULL, logits};
            double start = llm__clock_now();
            if (llm_forward(ctx, &batch, &err)) fail(&err);
            seconds[i * opt->n_rounds + round] = llm__clock_now() - start;
            llm_seq_truncate(ctx, 0, depth, NULL);
        }
    for (int i = 0; i < opt->n_rows; i++) {
        double usual = median(seconds + i * opt->n_rounds, opt->n_rounds);
        if (!i) first = usual;
        printf("| %s | %d | %d | %d | %.2f | %.2f |\n", llm_dtype_name(llm_context_model(ctx)->info.dtype),
               llm_context_n_threads(ctx), depth, opt->rows[i], 1e3 * usual, usual / first);
    }
    fflush(stdout);
    free(seconds);
}

/* Runs n streams. seconds[0] is the time until each has its first token, seconds[1] the time after that. Returns the
   number of tokens generated in seconds[1]. */
static int run_streams(llm_context *ctx, const options *opt, int n, double *seconds) {
    static llm_stream *streams[MOST_STREAMS];
    static llm_sampler samplers[MOST_STREAMS];
    llm_token *prompt = (llm_token *)calloc((size_t)opt->n_prefill, sizeof *prompt);
    llm_error err;
    if (!prompt) exit(1);
    double start = llm__clock_now();
    for (int i = 0; i < n; i++) {
        llm_generate_desc desc = {.tokens = prompt,
                                  .n_tokens = opt->n_prefill,
                                  .seq = i,
                                  .max_tokens = opt->n_decode,
                                  .sampler = &samplers[i],
                                  .ignore_end = true};
        samplers[i] = (llm_sampler){
            .temperature = opt->temperature, .top_k = 40, .top_p = 0.95f, .min_p = 0.05f, .seed = (uint64_t)i};
        for (int j = 0; j < opt->n_prefill; j++) prompt[j] = (llm_token)((i * 7 + j) * 37 % 5000 + 10);
        llm_seq_truncate(ctx, i, 0, NULL);
        if (llm_stream_begin(&streams[i], ctx, &desc, &err)) fail(&err);
    }
    seconds[0] = 0;
    int n_left = 0;
    for (int n_running = n; n_running;) {
        if (llm_step(ctx, 0, &n_running, &err)) fail(&err);
        if (seconds[0] > 0) continue;
        bool all = true;
        n_left = n * opt->n_decode;
        for (int i = 0; i < n; i++) {
            llm_stats stats;
            if (llm_stream_result(streams[i], &stats, &err)) fail(&err);
            all = all && stats.n_generated;
            n_left -= stats.n_generated;
        }
        if (all) seconds[0] = llm__clock_now() - start;
    }
    seconds[1] = llm__clock_now() - start - seconds[0];
    for (int i = 0; i < n; i++) llm_stream_free(streams[i]);
    free(prompt);
    return n_left;
}

static void compare_streams(llm_context *ctx, const options *opt) {
    double *rates = (double *)calloc((size_t)(2 * MOST * opt->n_rounds), sizeof *rates), first = 0;
    if (!rates) exit(1);
    for (int round = -1; round < opt->n_rounds; round++) /* the first round is a warm-up */
        for (int i = 0; i < opt->n_streams; i++) {
            double seconds[2], *at = rates + 2 * i * opt->n_rounds + (round < 0 ? 0 : round);
            int n_left = run_streams(ctx, opt, opt->streams[i], seconds);
            at[0] = opt->streams[i] * opt->n_prefill / seconds[0];
            at[opt->n_rounds] = n_left / seconds[1];
        }
    for (int i = 0; i < opt->n_streams; i++) {
        double reading = median(rates + 2 * i * opt->n_rounds, opt->n_rounds),
               writing = median(rates + (2 * i + 1) * opt->n_rounds, opt->n_rounds);
        if (!i) first = writing;
        printf("| %s | %d | %d | %.0f | %.1f | %.1f | %.2f |\n", llm_dtype_name(llm_context_model(ctx)->info.dtype),
               llm_context_n_threads(ctx), opt->streams[i], reading, writing, writing / opt->streams[i],
               writing / first);
    }
    fflush(stdout);
    free(rates);
}

/* Their texts cannot end early, and most of their tokens are free. */
static const struct {
    const char *name, *text;
    llm_status (*make)(llm_grammar **, const llm_tokenizer *, const char *, const llm_host *, llm_error *);
} GRAMMARS[] = {
    {"JSON schema",
     "{\"type\":\"array\",\"minItems\":1000,\"items\":{\"type\":\"object\",\"properties\":{\"title\":{\"type\":"
     "\"string\"},\"text\":{\"type\":\"string\",\"minLength\":100},\"score\":{\"type\":\"number\"}},\"required\":["
     "\"title\",\"text\",\"score\"],\"additionalProperties\":false}}",
     llm_grammar_from_json_schema},
    {"GBNF", "root ::= line{1000}\nline ::= \"- \" word (\" \" word){9,} \".\\n\"\nword ::= [A-Za-z] [a-z,;'0-9-]*\n",
     llm_grammar_from_gbnf},
    {"regex", "([A-Z][^.!?\\n]{30,}[.!?] ){1000}", llm_grammar_from_regex}};

/* Continues a short prompt by n_decode tokens. Returns tokens per second. */
static double write_text(llm_context *ctx, const options *opt, llm_grammar *grammar) {
    llm_sampler sampler = {.temperature = opt->temperature, .seed = 1};
    llm_generate_desc desc = {.prompt = "Here is a long list of facts about the sea:\n",
                              .sampler = &sampler,
                              .grammar = grammar,
                              .max_tokens = opt->n_decode,
                              .ignore_end = true};
    llm_stats stats;
    llm_error err;
    llm_seq_truncate(ctx, 0, 0, NULL);
    double start = llm__clock_now();
    if (llm_generate(ctx, &desc, &stats, &err)) fail(&err);
    if (stats.n_generated != opt->n_decode) {
        fprintf(stderr, "bench: the text ended after %d tokens\n", stats.n_generated);
        exit(1);
    }
    return stats.n_generated / (llm__clock_now() - start);
}

static void compare_grammars(llm_context *ctx, const options *opt) {
    double *values = (double *)calloc((size_t)(4 * opt->n_rounds), sizeof *values);
    if (!values) exit(1);
    double *plain = values, *rates = plain + opt->n_rounds, *ratios = rates + opt->n_rounds,
           *compile = ratios + opt->n_rounds;
    for (size_t i = 0; i < sizeof GRAMMARS / sizeof *GRAMMARS; i++) {
        for (int round = -1; round < opt->n_rounds; round++) { /* the first round is a warm-up */
            int at = round < 0 ? 0 : round;
            llm_grammar *grammar = NULL;
            llm_error err;
            double start = llm__clock_now();
            if (GRAMMARS[i].make(&grammar, llm_model_tokenizer(llm_context_model(ctx)), GRAMMARS[i].text, NULL, &err))
                fail(&err);
            compile[at] = 1e3 * (llm__clock_now() - start);
            plain[at] = write_text(ctx, opt, NULL);
            rates[at] = write_text(ctx, opt, grammar);
            ratios[at] = rates[at] / plain[at];
            llm_grammar_free(grammar);
        }
        printf("| %s | %s | %d | %.1f | %.1f | %.1f | %.3f |\n", GRAMMARS[i].name,
               llm_dtype_name(llm_context_model(ctx)->info.dtype), llm_context_n_threads(ctx),
               median(compile, opt->n_rounds), median(plain, opt->n_rounds), median(rates, opt->n_rounds),
               median(ratios, opt->n_rounds));
        fflush(stdout);
    }
    free(values);
}

/* Runs --draft, --rows, -b and --grammars for one type and number of threads. */
static void compare(const options *opt, llm_dtype dtype, int n_threads) {
    llm_model_desc desc = {
        .dtype = dtype, .n_threads = n_threads, .isa = getenv("LLM_ISA"), .keep_zeros = opt->keep_zeros};
    llm_context_desc context_desc = {
        .n_logits = opt->n_rows ? MOST_ROWS : LLM_DRAFT_MAX + 1, .n_threads = n_threads, .cache_dtype = opt->cache};
    for (int i = 0; i < opt->n_streams; i++)
        if (opt->streams[i] > context_desc.n_seq) context_desc.n_logits = context_desc.n_seq = opt->streams[i];
    if (opt->n_streams) context_desc.n_ctx = opt->n_prefill + opt->n_decode;
    llm_model *model = NULL;
    llm_context *ctx = NULL;
    llm_error err;
    load_model(opt, &desc, &model);
    if (llm_context_create(&ctx, model, &context_desc, &err)) fail(&err);
    for (int i = 0; i < opt->n_drafts; i++) compare_draft(ctx, opt, opt->drafts[i], &desc);
    if (opt->n_streams) compare_streams(ctx, opt);
    if (opt->grammars) compare_grammars(ctx, opt);
    for (int i = 0; i < opt->n_depths && opt->n_rows; i++) compare_rows(ctx, opt, opt->depths[i]);
    llm_context_free(ctx);
    llm_model_free(model);
}

static void print_comparisons(const options *opt) {
    if (!strcmp(opt->format, "gpt-fast")) printf("Speculative decoding, text by text:\n");
    else if (opt->n_drafts)
        printf("| text | weights | draft | threads | prompt | plain tok/s | tok/s | ratio | right | tokens a pass |\n"
               "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n");
    else if (opt->n_streams)
        printf("| weights | threads | streams | read tok/s | write tok/s | each | ratio |\n"
               "| --- | --- | --- | --- | --- | --- | --- |\n");
    else if (opt->grammars)
        printf("| grammar | weights | threads | compile, ms | plain tok/s | tok/s | ratio |\n"
               "| --- | --- | --- | --- | --- | --- | --- |\n");
    else printf("| weights | threads | depth | rows | ms | ratio |\n| --- | --- | --- | --- | --- | --- |\n");
    for (int i = 0; i < opt->n_dtypes; i++)
        for (int t = 0; t < opt->n_threads; t++) compare(opt, opt->dtypes[i], opt->threads[t]);
}

/* ---- Printing ---- */

static void print_header(const char *format) {
    if (!strcmp(format, "json")) printf("[");
    if (!strcmp(format, "csv"))
        printf("dtype,isa,threads,depth,prefill_tok_s,decode_tok_s,prefill_mfu,decode_mbu,load_s,peak_mib,mb_per_token,"
               "bandwidth_gb_s,gflop_s,generate_tok_s,meeting_us,link_gb_s\n");
    if (!strcmp(format, "md"))
        printf("| weights | isa | threads | depth | prefill tok/s | MFU | decode tok/s | generate tok/s | MB/token | "
               "MBU | limits GB/s, GFLOP/s | load s | peak MiB |\n"
               "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n");
}

static void print_result(const char *format, const result *r, bool first) {
    if (!strcmp(format, "json"))
        printf("%s\n  {\"dtype\": \"%s\", \"isa\": \"%s\", \"threads\": %d, \"depth\": %d, \"prefill_tok_s\": %.2f, "
               "\"decode_tok_s\": %.2f, "
               "\"prefill_mfu\": %.4f, \"decode_mbu\": %.4f, \"load_s\": %.4f, \"peak_mib\": %.1f, \"mb_per_token\": "
               "%.2f, "
               "\"bandwidth_gb_s\": %.2f, \"gflop_s\": %.1f, \"generate_tok_s\": %.2f, \"meeting_us\": %.2f, "
               "\"link_gb_s\": %.2f}",
               first ? "" : ",", r->dtype, r->isa, r->threads, r->depth, r->prefill, r->decode, r->mfu, r->mbu,
               r->load_seconds, r->peak_mib, r->megabytes_per_token, r->bandwidth / 1e9, r->flops / 1e9, r->generate,
               1e6 * r->meeting, r->link / 1e9);
    if (!strcmp(format, "csv"))
        printf("%s,%s,%d,%d,%.2f,%.2f,%.4f,%.4f,%.4f,%.1f,%.2f,%.2f,%.1f,%.2f,%.2f,%.2f\n", r->dtype, r->isa,
               r->threads, r->depth, r->prefill, r->decode, r->mfu, r->mbu, r->load_seconds, r->peak_mib,
               r->megabytes_per_token, r->bandwidth / 1e9, r->flops / 1e9, r->generate, 1e6 * r->meeting,
               r->link / 1e9);
    if (!strcmp(format, "md"))
        printf("| %s | %s | %d | %d | %.0f | %.0f %% | %.1f | %.1f | %.1f | %.0f %% | %.1f, %.0f | %.2f | %.0f |\n",
               r->dtype, r->isa, r->threads, r->depth, r->prefill, 100 * r->mfu, r->decode, r->generate,
               r->megabytes_per_token, 100 * r->mbu, r->bandwidth / 1e9, r->flops / 1e9, r->load_seconds, r->peak_mib);
    fflush(stdout);
}

/* Prints this rank's figures and, on the first rank, the sums over all ranks. */
static void print_averages(const options *opt, const result *r) {
    double rates[2] = {r->megabytes_per_token * 1e-3 * r->decode, r->peak_mib * 1048576e-9};
    int n = opt->ranks.tp * opt->ranks.pp;
    if (n > 1) printf("rank %d: %.2f GB/s, %.2f GB\n", opt->ranks.rank, rates[0], rates[1]);
    fflush(stdout);
    ranks_sum(&opt->ranks, rates, 2);
    if (opt->ranks.rank) return;
    printf("Average tokens/sec: %.2f\nBandwidth achieved: %.2f GB/s\nMemory used: %.2f GB\n", r->decode, rates[0],
           rates[1]);
    fflush(stdout);
}

static bool run_dtype(const options *opt, llm_dtype dtype, bool first) {
    for (int t = 0; t < opt->n_threads; t++) {
        memory mem = {0, 0};
        llm_model_desc desc = {.dtype = dtype,
                               .n_threads = opt->threads[t],
                               .isa = getenv("LLM_ISA"),
                               .keep_zeros = opt->keep_zeros,
                               .host = {.alloc = count_alloc, .free = count_free, .user = &mem},
                               .tensor = opt->ranks.tensor,
                               .pipeline = opt->ranks.pipeline};
        int most = 0;
        for (int i = 0; i < opt->n_depths; i++) most = opt->depths[i] > most ? opt->depths[i] : most;
        llm_context_desc context_desc = {.n_ctx = most + opt->n_prefill + opt->n_decode,
                                         .n_batch = opt->n_prefill,
                                         .n_threads = opt->threads[t],
                                         .cache_dtype = opt->cache};
        llm_model *model = NULL;
        llm_context *ctx = NULL;
        result results[MOST];
        llm_error err;
        double start = llm__clock_now();
        load_model(opt, &desc, &model);
        double load_seconds = llm__clock_now() - start;
        if (llm_context_create(&ctx, model, &context_desc, &err)) fail(&err);
        measure(ctx, opt, &mem, load_seconds, results);
        for (int i = 0; i < opt->n_depths && !strcmp(opt->format, "gpt-fast"); i++) print_averages(opt, &results[i]);
        for (int i = 0; i < opt->n_depths && !opt->ranks.rank; i++, first = false)
            print_result(opt->format, &results[i], first);
        llm_context_free(ctx);
        llm_model_free(model);
    }
    return first;
}

/* ---- Batches of several sequences ---- */

enum { BATCHES = 6, LENGTHS = 9 };
static const int table_batches[BATCHES] = {1, 2, 4, 8, 16, 32},
                 table_lengths[LENGTHS] = {1, 2, 4, 8, 16, 32, 64, 128, 170};

/* Counts the operations of the layers: products, and attention to all earlier tokens. Of the last layer, only queries,
   keys and values count, because no logits are requested. */
static double layer_operations(const llm_model *model, double batch, double length) {
    const llm_backend_shape *s = &model->shape;
    double q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim;
    double inputs = s->n_embd * (q + 2 * kv), rest = s->n_embd * (q + 3.0 * s->n_ff);
    return batch * (2 * length * (s->n_layers * inputs + (s->n_layers - 1) * rest) +
                    4 * q * length * (length + 1) / 2 * (s->n_layers - 1));
}

/* Returns the shortest time in seconds of passes of this size, which are repeated for 0.1 s. */
static double time_rectangle(llm_context *ctx, int batch, int length) {
    static llm_token tokens[32 * 170];
    static int seqs[32 * 170];
    static bool logits[32 * 170]; /* all false: no logits */
    double best = 1e9;
    llm_error err;
    for (int i = 0; i < batch * length; i++) {
        tokens[i] = (llm_token)(i * 37 % 5000 + 10);
        seqs[i] = i / length;
    }
    for (double start = llm__clock_now(); best == 1e9 || llm__clock_now() - start < 0.1;) {
        llm_batch all = {batch * length, tokens, seqs, logits};
        for (int seq = 0; seq < batch; seq++) llm_seq_truncate(ctx, seq, 0, NULL);
        double before = llm__clock_now();
        if (llm_forward(ctx, &all, &err)) fail(&err);
        if (llm__clock_now() - before < best) best = llm__clock_now() - before;
    }
    return best;
}

static void print_flops_table(const options *opt, double rates[LENGTHS][BATCHES], double limit) {
    double best = 0;
    bool csv = !strcmp(opt->format, "csv");
    printf(csv ? "length,batch,gflop_s,limit_gflop_s\n"
               : "GFLOP/s by number of sequences (columns) and their length (rows); the limit is %.0f\n\n|  |",
           limit / 1e9);
    for (int b = 0; b < BATCHES && !csv; b++) printf(" %d |", table_batches[b]);
    for (int b = 0; b <= BATCHES && !csv; b++) printf(b ? " ---: |" : "\n| ---: |");
    for (int l = 0; l < LENGTHS; l++) {
        if (!csv) printf("\n| %d |", table_lengths[l]);
        for (int b = 0; b < BATCHES; b++) {
            if (rates[l][b] == 0) printf(csv ? "" : "  |");
            else if (csv)
                printf("%d,%d,%.2f,%.1f\n", table_lengths[l], table_batches[b], rates[l][b] / 1e9, limit / 1e9);
            else printf(" %.1f |", rates[l][b] / 1e9);
            if (rates[l][b] > best) best = rates[l][b];
        }
    }
    for (int n = 1; n <= 32 * 170 && !csv; n++) {
        bool measured = false, fast = true;
        for (int l = 0; l < LENGTHS; l++)
            for (int b = 0; b < BATCHES; b++)
                if (rates[l][b] > 0 && table_lengths[l] * table_batches[b] == n) {
                    measured = true;
                    fast = fast && rates[l][b] >= 0.9 * best;
                }
        if (!measured || !fast) continue;
        printf("\n\nBatches of %d tokens reach 90 %% of the best rate in every shape.\n", n);
        break;
    }
}

static void run_flops_table(const options *opt) {
    llm_model_desc desc = {
        .dtype = opt->dtypes[0], .n_threads = opt->threads[0], .isa = getenv("LLM_ISA"), .keep_zeros = opt->keep_zeros};
    llm_context_desc context_desc = {
        .n_ctx = 192, .n_seq = 32, .n_batch = 32 * 170, .n_logits = 1, .n_threads = opt->threads[0]};
    double rates[LENGTHS][BATCHES] = {{0}}; /* 0: not measured */
    llm_model *model = NULL;
    llm_context *ctx = NULL;
    llm_error err;
    load_model(opt, &desc, &model);
    if (llm_context_create(&ctx, model, &context_desc, &err)) fail(&err);
    double limit = llm_measure_flops(ctx);
    for (int l = 0; l < LENGTHS; l++)
        for (int b = 0; b < BATCHES && table_lengths[l] * table_batches[b] <= opt->flops_table; b++)
            rates[l][b] = layer_operations(model, table_batches[b], table_lengths[l]) /
                          time_rectangle(ctx, table_batches[b], table_lengths[l]);
    print_flops_table(opt, rates, limit);
    llm_context_free(ctx);
    llm_model_free(model);
}

int main(int argc, char **argv) {
    options opt = {.format = "md",
                   .n_decode = 128,
                   .n_rounds = 5,
                   .n_depths = 1,
                   .n_dtypes = 1,
                   .dtypes = {LLM_DTYPE_BF16},
                   .threads = {llm__team_default_threads(), llm__team_default_threads() + 1}};
    const struct argp argp = {
        OPTIONS, parse_option, "[TEXT...]", "Measures how fast a model runs, and the limits of the machine.",
        NULL,    NULL,         NULL};
    argp_parse(&argp, argc, argv, 0, NULL, &opt);
    if (opt.n_drafts || opt.n_rows || opt.n_streams || opt.grammars) {
        print_comparisons(&opt);
        return 0;
    }
    if (opt.flops_table) {
        run_flops_table(&opt);
        return 0;
    }
    bool first = true;
    llm_error err;
    if (ranks_open(&opt.ranks, &err)) fail(&err);
    if (!opt.ranks.rank) print_header(opt.format);
    for (int i = 0; i < opt.n_dtypes; i++) first = run_dtype(&opt, opt.dtypes[i], first);
    if (!strcmp(opt.format, "json") && !opt.ranks.rank) printf("\n]\n");
    ranks_close(&opt.ranks, false);
    return 0;
}
