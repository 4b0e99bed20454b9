/*  repl.c - talk to a model in a terminal, or ask it one thing from a script.

    build/repl -m MODEL              chat; /help lists the commands
    build/repl -m MODEL -p TEXT      one answer
    build/repl --help                all options
    mpirun -n 2 build/mpi/repl --tp 2 ...    a model shared by two processes; the first reads and prints

    The model's text goes to standard output and everything else to standard error. Ctrl-C stops an answer; a second
    one, before the first takes effect, ends the program. The exit code is 1 after an error, 2 after a wrong option and
    130 if the answer of -p was stopped.

    When a chat fills the context, its oldest turns are left out.
*/
#define LLM_IMPLEMENTATION
#include "llm.h"

#include "examples/arrays.h"
#include "examples/ranks.h"

#include <argp.h>
#include <errno.h>
#include <histedit.h>
#include <langinfo.h>
#include <limits.h>
#include <locale.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---- Options ------------------------------------------------------------------------------------------------- */

typedef struct options {
    const char *model, *prompt, *system, *draft;
    const char *constraint; /* a file; with KEY_REGEX the expression itself */
    int constraint_key;     /* KEY_JSON_SCHEMA, KEY_GRAMMAR or KEY_REGEX; 0: the answer may be anything */
    bool raw, ids, temp_given, seed_given;
    int max_tokens, n_threads, n_ctx, draft_max;
    llm_dtype dtype;
    llm_sampler sampler;
    int tp, pp;
    bool mirostat;
    const char *breakers[16]; /* the sampler's dry_breakers */
    const char *tools;        /* a file */
    const char *sets[32];     /* [n_sets] NAME=VALUE */
    int n_sets;
} options;

enum {
    KEY_RAW = 256,
    KEY_TP,
    KEY_PP,
    KEY_IDS,
    KEY_TEMP,
    KEY_TOP_K,
    KEY_TOP_P,
    KEY_MIN_P,
    KEY_SEED,
    KEY_DTYPE,
    KEY_CTX,
    KEY_SYSTEM,
    KEY_DRAFT,
    KEY_DRAFT_MAX,
    KEY_JSON_SCHEMA,
    KEY_GRAMMAR,
    KEY_REGEX,
    KEY_TOP_N_SIGMA,
    KEY_TYPICAL,
    KEY_MIROSTAT,
    KEY_MIROSTAT_TAU,
    KEY_MIROSTAT_ETA,
    KEY_XTC_PROBABILITY,
    KEY_XTC_THRESHOLD,
    KEY_DRY_MULTIPLIER,
    KEY_DRY_BASE,
    KEY_DRY_ALLOWED_LENGTH,
    KEY_DRY_LAST_N,
    KEY_DRY_BREAKER,
    KEY_TOOLS,
    KEY_SET
};

static const struct argp_option option_list[] = {
    {"model", 'm', "MODEL", 0, "the model's file (GGUF)", 1},
    {"prompt", 'p', "TEXT", 0, "answer this and end; without it, chat", 1},
    {"system", KEY_SYSTEM, "TEXT", 0, "the system message (default: the one in the model's chat template, if any)", 1},
    {"tools", KEY_TOOLS, "FILE", 0, "a JSON list of tools for the chat template", 1},
    {"set", KEY_SET, "NAME=VALUE", 0,
     "a variable of the chat template, e.g. enable_thinking=false; VALUE is JSON or a text; may be repeated", 1},
    {"raw", KEY_RAW, NULL, 0, "continue the text as it is, without a chat template", 1},
    {"tokens", 'n', "N", 0, "generate at most N tokens (default: until the model ends)", 1},
    {"ids", KEY_IDS, NULL, 0, "print token ids instead of text", 1},
    {"temp", KEY_TEMP, "T", 0, "temperature; 0 is greedy (default: 0.8 in a chat, 0 with -p or --raw)", 2},
    {"top-k", KEY_TOP_K, "K", 0, "choose from the K most likely tokens, 0 from all (default: 40)", 2},
    {"top-p", KEY_TOP_P, "P", 0, "choose from the most likely tokens whose sum reaches P (default: 0.95)", 2},
    {"min-p", KEY_MIN_P, "P", 0, "drop tokens less likely than P times the best (default: 0.05)", 2},
    {"top-n-sigma", KEY_TOP_N_SIGMA, "N", 0, "drop logits more than N standard deviations below the best", 2},
    {"typical", KEY_TYPICAL, "P", 0, "choose from the tokens of typical surprise whose sum exceeds P", 2},
    {"mirostat", KEY_MIROSTAT, NULL, 0, "use mirostat 2 instead of the other rules that drop tokens", 2},
    {"mirostat-tau", KEY_MIROSTAT_TAU, "BITS", 0, "mirostat's target surprise per token (default: 5)", 2},
    {"mirostat-eta", KEY_MIROSTAT_ETA, "ETA", 0, "how fast mirostat corrects itself (default: 0.1)", 2},
    {"xtc-probability", KEY_XTC_PROBABILITY, "P", 0, "the probability of dropping the most likely tokens", 2},
    {"xtc-threshold", KEY_XTC_THRESHOLD, "P", 0,
     "drop tokens of at least this probability, except the least likely of them (default: 0.1)", 2},
    {"dry-multiplier", KEY_DRY_MULTIPLIER, "M", 0,
     "penalize tokens that continue a repetition of N tokens by M * B^(N-L)", 2},
    {"dry-base", KEY_DRY_BASE, "B", 0, "(default: 1.75)", 2},
    {"dry-allowed-length", KEY_DRY_ALLOWED_LENGTH, "L", 0, "no penalty for shorter repetitions (default: 2)", 2},
    {"dry-last-n", KEY_DRY_LAST_N, "N", 0, "only check the last N tokens (default: all)", 2},
    {"dry-breaker", KEY_DRY_BREAKER, "TEXT", 0,
     "repetitions end at this text; may be given up to 16 times (default: a line break, ':', '\"', '*')", 2},
    {"seed", KEY_SEED, "S", 0, "same seed, same text (default: from the clock)", 2},
    {"threads", 't', "N", 0, "threads (default: one per core)", 3},
    {"dtype", KEY_DTYPE, "TYPE", 0,
     "hold the weights as f32, f16, bf16, int8 or int4 (default: file, the file's types)", 3},
    {"json-schema", KEY_JSON_SCHEMA, "FILE", 0, "each answer is JSON that matches this JSON Schema", 2},
    {"grammar", KEY_GRAMMAR, "FILE", 0, "each answer matches this grammar in GBNF", 2},
    {"regex", KEY_REGEX, "REGEX", 0, "each answer matches this regular expression", 2},
    {"draft", KEY_DRAFT, "DRAFT", 0,
     "guess tokens and check several at once: lookup (in the text so far), self:int8 or self:int4 (the model with that "
     "type), or another model's file; the text stays the same",
     3},
    {"draft-max", KEY_DRAFT_MAX, "N", 0, "check at most N guesses at once (default: 15)", 3},
    {"ctx", KEY_CTX, "N", 0,
     "tokens that the model sees; the oldest turns of a longer chat are left out (default: the model's limit, at most "
     "4096)",
     3},
    {"tp", KEY_TP, "N", 0, "N processes share each layer", 4},
    {"pp", KEY_PP, "N", 0, "N groups of processes share the layers", 4},
    {0}};

static long long parse_integer(struct argp_state *state, const char *name, const char *text, long long min,
                               long long max) {
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (end == text || *end || errno || value < min || value > max)
        argp_error(state, "%s: '%s' is not an integer from %lld to %lld", name, text, min, max);
    return value;
}

static float parse_real(struct argp_state *state, const char *name, const char *text, double max) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= 0 && value <= max))
        argp_error(state, "%s: '%s' is not a number from 0 to %g", name, text, max);
    return (float)value;
}

static llm_dtype parse_dtype(struct argp_state *state, const char *text) {
    llm_dtype dtype = llm_dtype_from_name(text);
    if (!dtype) argp_error(state, "--dtype: '%s' is not one of f32, f16, bf16, int8, int4, file", text);
    return dtype;
}

static const char *check_draft(struct argp_state *state, const char *draft) {
    llm_dtype dtype = !strncmp(draft, "self:", 5) ? llm_dtype_from_name(draft + 5) : LLM_DTYPE_INT8;
    if (dtype != LLM_DTYPE_INT8 && dtype != LLM_DTYPE_INT4)
        argp_error(state, "--draft: '%s' is neither self:int8 nor self:int4", draft);
    return draft;
}

static void finish_options(struct argp_state *state, options *opt) {
    if (!opt->model) argp_error(state, "no model: name its file with -m");
    if (opt->raw && opt->system) argp_error(state, "--system needs the chat template, which --raw does not use");
    if (opt->raw && (opt->tools || opt->n_sets))
        argp_error(state, "--tools and --set need the chat template, which --raw does not use");
    if (opt->draft_max && !opt->draft) argp_error(state, "--draft-max needs a --draft");
    if (opt->mirostat && opt->sampler.mirostat_tau == 0) opt->sampler.mirostat_tau = 5;
    if (!opt->mirostat && (opt->sampler.mirostat_tau > 0 || opt->sampler.mirostat_eta > 0))
        argp_error(state, "--mirostat-tau and --mirostat-eta need --mirostat");
    if (!opt->temp_given && (opt->prompt || opt->raw)) opt->sampler.temperature = 0;
    if (!opt->seed_given) opt->sampler.seed = (uint64_t)time(NULL);
}

static error_t parse_option(int key, char *arg, struct argp_state *state) {
    options *opt = state->input;
    switch (key) {
    case 'm': opt->model = arg; break;
    case 'p': opt->prompt = arg; break;
    case 'n': opt->max_tokens = (int)parse_integer(state, "-n", arg, 1, INT_MAX); break;
    case 't': opt->n_threads = (int)parse_integer(state, "-t", arg, 1, 1024); break;
    case KEY_SYSTEM: opt->system = arg; break;
    case KEY_RAW: opt->raw = true; break;
    case KEY_IDS: opt->ids = true; break;
    case KEY_TEMP:
        opt->sampler.temperature = parse_real(state, "--temp", arg, 100);
        opt->temp_given = true;
        break;
    case KEY_TOP_K: opt->sampler.top_k = (int)parse_integer(state, "--top-k", arg, 0, INT_MAX); break;
    case KEY_TOP_P: opt->sampler.top_p = parse_real(state, "--top-p", arg, 1); break;
    case KEY_MIN_P: opt->sampler.min_p = parse_real(state, "--min-p", arg, 1); break;
    case KEY_SEED:
        opt->sampler.seed = (uint64_t)parse_integer(state, "--seed", arg, 0, LLONG_MAX);
        opt->seed_given = true;
        break;
    case KEY_TOOLS: opt->tools = arg; break;
    case KEY_SET:
        if (*arg == '=' || !strchr(arg, '=')) argp_error(state, "--set: '%s' is not NAME=VALUE", arg);
        if (opt->n_sets == 32) argp_error(state, "--set: at most 32 are possible");
        opt->sets[opt->n_sets++] = arg;
        break;
    case KEY_TOP_N_SIGMA: opt->sampler.top_n_sigma = parse_real(state, "--top-n-sigma", arg, 1e6); break;
    case KEY_TYPICAL: opt->sampler.typical_p = parse_real(state, "--typical", arg, 1); break;
    case KEY_MIROSTAT: opt->mirostat = true; break;
    case KEY_MIROSTAT_TAU: opt->sampler.mirostat_tau = parse_real(state, "--mirostat-tau", arg, 100); break;
    case KEY_MIROSTAT_ETA: opt->sampler.mirostat_eta = parse_real(state, "--mirostat-eta", arg, 100); break;
    case KEY_XTC_PROBABILITY: opt->sampler.xtc_probability = parse_real(state, "--xtc-probability", arg, 1); break;
    case KEY_XTC_THRESHOLD: opt->sampler.xtc_threshold = parse_real(state, "--xtc-threshold", arg, 1); break;
    case KEY_DRY_MULTIPLIER: opt->sampler.dry_multiplier = parse_real(state, "--dry-multiplier", arg, 1e6); break;
    case KEY_DRY_BASE: opt->sampler.dry_base = parse_real(state, "--dry-base", arg, 1e6); break;
    case KEY_DRY_ALLOWED_LENGTH:
        opt->sampler.dry_allowed_length = (int)parse_integer(state, "--dry-allowed-length", arg, 1, INT_MAX);
        break;
    case KEY_DRY_LAST_N: opt->sampler.dry_last_n = (int)parse_integer(state, "--dry-last-n", arg, 1, INT_MAX); break;
    case KEY_DRY_BREAKER:
        if (!*arg || opt->sampler.n_dry_breakers == 16)
            argp_error(state, "--dry-breaker: at most 16 are possible, and none may be empty");
        opt->breakers[opt->sampler.n_dry_breakers++] = arg;
        opt->sampler.dry_breakers = opt->breakers;
        break;
    case KEY_TP: opt->tp = (int)parse_integer(state, "--tp", arg, 1, 1024); break;
    case KEY_PP: opt->pp = (int)parse_integer(state, "--pp", arg, 1, 1024); break;
    case KEY_DTYPE: opt->dtype = parse_dtype(state, arg); break;
    case KEY_DRAFT: opt->draft = check_draft(state, arg); break;
    case KEY_DRAFT_MAX: opt->draft_max = (int)parse_integer(state, "--draft-max", arg, 1, LLM_DRAFT_MAX); break;
    case KEY_JSON_SCHEMA:
    case KEY_GRAMMAR:
    case KEY_REGEX:
        if (opt->constraint_key) argp_error(state, "--json-schema, --grammar and --regex cannot be combined");
        opt->constraint_key = key;
        opt->constraint = arg;
        break;
    case KEY_CTX: opt->n_ctx = (int)parse_integer(state, "--ctx", arg, 1, INT_MAX); break;
    case ARGP_KEY_ARG: argp_error(state, "'%s' is not an option; text to answer goes after -p", arg); break;
    case ARGP_KEY_END: finish_options(state, opt); break;
    default: return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static const struct argp option_parser = {
    .options = option_list,
    .parser = parse_option,
    .args_doc = "-m MODEL",
    .doc = "Chat with a language model, or get one answer with -p.\vText goes to standard output, everything else to "
           "standard error. Ctrl-C stops the answer. In a chat, /help lists the commands.\n\n"
           "LLM_ISA in the environment forces an instruction set: scalar, avx2, avx512, avx512_bf16, amx, neon.",
};

/* ---- State ----------------------------------------------------------------------------------------------------- */

typedef struct repl {
    options opt;
    ranks ranks;
    llm_model *model;
    llm_context *ctx;
    llm_model *draft_model; /* NULL if the draft is not a model                                   */
    llm_draft draft;
    llm_grammar *grammar; /* NULL: the answer may be anything */
    double load_seconds;
    double bandwidth;      /* bytes per second; 0 until it is measured                            */
    llm_message *messages; /* stb_ds array: the conversation; owns the contents                   */
    char *tools;           /* JSON for the chat template, or NULL                                 */
    char *variables;       /* likewise; an stb_ds array                                           */
    char *answer;          /* stb_ds array: the text of the last answer                           */
    llm_stats stats;       /* of the last answer                                                  */
    const char *echo;      /* shown on standard error before the answer                           */
    bool started;          /* a part of the answer has been printed                               */
    bool said_left_out;    /* the user knows that the oldest turns are left out                   */
    EditLine *editor;      /* NULL if the input is not a terminal                                 */
    History *history;
    char *line; /* the last line read                                                  */
    size_t line_size;
} repl;

static volatile sig_atomic_t n_interrupts; /* since the last answer began */

static void on_interrupt(int sig) {
    if (n_interrupts++ == 0) return;
    signal(sig, SIG_DFL);
    raise(sig);
}

/* Without SA_RESTART, so that the signal also interrupts waiting for input. */
static void catch_interrupts(void) {
    struct sigaction action = {0};
    action.sa_handler = on_interrupt;
    sigaction(SIGINT, &action, NULL);
}

static int complain(const char *message) {
    fprintf(stderr, "repl: %s\n", message);
    return 1;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- Loading ------------------------------------------------------------------------------------------------- */

static bool show_progress(void *user, float done) {
    (void)user;
    fprintf(stderr, "\rloading %3.0f %%", (double)done * 100);
    return true;
}

/* Loads the draft's model: for self:TYPE the same file with another type, otherwise another file. */
static llm_status load_draft(repl *r, llm_model_desc desc, llm_error *err) {
    bool self = !strncmp(r->opt.draft, "self:", 5);
    r->draft = llm_draft_lookup();
    if (!strcmp(r->opt.draft, "lookup")) return LLM_OK;
    desc.dtype = self ? llm_dtype_from_name(r->opt.draft + 5) : LLM_DTYPE_DEFAULT;
    llm_status status = llm_model_load(&r->draft_model, self ? r->opt.model : r->opt.draft, &desc, err);
    return status ? status : llm_draft_model(&r->draft, r->ctx, r->draft_model, err);
}

/* Reads a text file of at most 16 MB. Returns new memory, or NULL on failure. */
static char *read_text(const char *path) {
    enum { MOST = 1 << 24 };
    FILE *file = fopen(path, "rb");
    char *text = file ? malloc(MOST + 1) : NULL;
    size_t n = text ? fread(text, 1, MOST + 1, file) : 0;
    bool failed = !text || n > MOST || ferror(file) || memchr(text, 0, n);
    if (file) fclose(file);
    if (failed) {
        free(text);
        return NULL;
    }
    text[n] = 0;
    return text;
}

static llm_status load_grammar(repl *r, llm_error *err) {
    const llm_tokenizer *tokenizer = llm_model_tokenizer(r->model);
    if (r->opt.constraint_key == KEY_REGEX)
        return llm_grammar_from_regex(&r->grammar, tokenizer, r->opt.constraint, NULL, err);
    char *text = read_text(r->opt.constraint);
    if (!text) {
        snprintf(err->message, sizeof err->message, "%s cannot be read as text of at most 16 MB", r->opt.constraint);
        return err->code = LLM_ERROR_IO;
    }
    llm_status status = r->opt.constraint_key == KEY_GRAMMAR
                            ? llm_grammar_from_gbnf(&r->grammar, tokenizer, text, NULL, err)
                            : llm_grammar_from_json_schema(&r->grammar, tokenizer, text, NULL, err);
    free(text);
    return status;
}

static void put_text(repl *r, const char *text, size_t n) { memcpy(arraddnptr(r->variables, n), text, n); }

/* Adds a text as a JSON string. */
static void put_string(repl *r, const char *text, size_t n) {
    char escape[8];
    put_text(r, "\"", 1);
    for (size_t i = 0; i < n; i++) {
        bool plain = (unsigned char)text[i] >= 0x20 && text[i] != '"' && text[i] != '\\';
        if (plain) put_text(r, text + i, 1);
        else put_text(r, escape, (size_t)snprintf(escape, sizeof escape, "\\u%04x", (unsigned char)text[i]));
    }
    put_text(r, "\"", 1);
}

/* True if this text is valid between `before` and `after` in the arguments of a tool call. */
static bool is_argument(const char *before, const char *text, const char *after) {
    static const char form[] = "<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": %s%s%s}}</tool_call>";
    size_t room = sizeof form + strlen(text) + 8;
    llm_tool_calls *calls = NULL;
    char *call = malloc(room);
    if (call) snprintf(call, room, form, before, text, after);
    bool valid = call && !llm_tool_calls_read(&calls, call, strlen(call), NULL, NULL);
    llm_tool_calls_free(calls);
    free(call);
    return valid;
}

/* True if the text is one JSON value. The check uses the library's parser for arguments of calls: several values could
   be valid as a member of an object ("1, \"y\": 2") or in a list ("1, 2"), but not as both. */
static bool is_json(const char *text) { return is_argument("", text, "") && is_argument("[", text, "]"); }

/* Converts --tools and --set to JSON for the chat template. */
static llm_status load_template_values(repl *r, llm_error *err) {
    if (r->opt.tools && !(r->tools = read_text(r->opt.tools))) {
        snprintf(err->message, sizeof err->message, "%s cannot be read as text of at most 16 MB", r->opt.tools);
        return err->code = LLM_ERROR_IO;
    }
    for (int i = 0; i < r->opt.n_sets; i++) {
        const char *name = r->opt.sets[i], *value = strchr(name, '=') + 1;
        put_text(r, i ? ", " : "{", i ? 2 : 1);
        put_string(r, name, (size_t)(value - 1 - name));
        put_text(r, ": ", 2);
        if (is_json(value)) put_text(r, value, strlen(value));
        else put_string(r, value, strlen(value));
    }
    if (r->opt.n_sets) put_text(r, "}", 2);
    return LLM_OK;
}

static llm_status load(repl *r, llm_error *err) {
    bool watched = isatty(STDERR_FILENO) && !r->ranks.rank;
    llm_model_desc model_desc = {.dtype = r->opt.dtype,
                                 .n_threads = r->opt.n_threads,
                                 .isa = getenv("LLM_ISA"),
                                 .tensor = r->ranks.tensor,
                                 .pipeline = r->ranks.pipeline};
#ifdef LLM_CUDA
    model_desc.backend = llm_cuda_backend();
#endif
    llm_context_desc context_desc = {.n_ctx = r->opt.n_ctx, .n_threads = r->opt.n_threads};
    if (watched) model_desc.host.progress = show_progress;
    if (r->opt.draft) context_desc.n_logits = LLM_DRAFT_MAX + 1;
    double start = now();
    llm_status status = llm_model_load(&r->model, r->opt.model, &model_desc, err);
    if (status == LLM_OK) status = llm_context_create(&r->ctx, r->model, &context_desc, err);
    if (status == LLM_OK && r->opt.draft) status = load_draft(r, model_desc, err);
    if (status == LLM_OK && r->opt.constraint_key) status = load_grammar(r, err);
    if (status == LLM_OK) status = load_template_values(r, err);
    if (watched) fputs("\r\033[K", stderr);
    r->load_seconds = now() - start;
    return status;
}

static void greet(const repl *r) {
    llm_model_info info = llm_model_get_info(r->model);
    fprintf(stderr, "%s: %.0f M parameters in %s, %s, %d threads, context of %d tokens. /help lists commands.\n",
            info.name[0] ? info.name : r->opt.model, (double)info.n_params * 1e-6, info.held, info.isa,
            llm_context_n_threads(r->ctx), llm_context_n_ctx(r->ctx));
}

/* ---- The conversation ---------------------------------------------------------------------------------------- */

static void push_message(repl *r, const char *role, const char *content, size_t n_bytes) {
    llm_message message = {role, strndup(content, n_bytes)};
    arrput(r->messages, message);
}

static void pop_message(repl *r) { free((char *)arrpop(r->messages).content); }

static void reset(repl *r) {
    while (arrlen(r->messages) > 0) pop_message(r);
    if (r->opt.system) push_message(r, "system", r->opt.system, strlen(r->opt.system));
    r->said_left_out = false;
}

/* ---- One answer ---------------------------------------------------------------------------------------------- */

static bool interrupted(void *user) {
    (void)user;
    return n_interrupts > 0;
}

static bool print(repl *r, const char *text, size_t n_bytes) {
    if (r->ranks.rank) return r->started = true;
    if (!r->started && r->echo) fputs(r->echo, stderr);
    r->started = true;
    return fwrite(text, 1, n_bytes, stdout) == n_bytes && fflush(stdout) == 0;
}

static bool on_text(void *user, const char *text, size_t n_bytes) {
    repl *r = user;
    memcpy(arraddnptr(r->answer, n_bytes), text, n_bytes);
    return r->opt.ids || print(r, text, n_bytes);
}

static bool on_token(void *user, llm_token token, const char *bytes, size_t n_bytes) {
    repl *r = user;
    char id[16];
    (void)bytes, (void)n_bytes;
    return !r->opt.ids || print(r, id, (size_t)snprintf(id, sizeof id, r->started ? " %d" : "%d", (int)token));
}

/* Answers the conversation, or continues `text`. The results are in r->answer and r->stats. */
static llm_status generate(repl *r, const char *text, llm_error *err) {
    llm_generate_desc desc = {.max_tokens = r->opt.max_tokens,
                              .sampler = &r->opt.sampler,
                              .grammar = r->grammar,
                              .on_text = on_text,
                              .on_token = on_token,
                              .text_has_marks = r->tools != NULL,
                              .cancel = interrupted,
                              .draft = r->opt.draft ? &r->draft : NULL,
                              .draft_max = r->opt.draft_max,
                              .draft_keeps_text = true,
                              .user = r};
    llm_chat_desc chat = {.messages = r->messages,
                          .n_messages = (int)arrlen(r->messages),
                          .tools_json = r->tools,
                          .variables_json = r->variables,
                          .open_answer = true};
    if (r->opt.raw) desc.prompt = text;
    else if (r->tools || r->variables) desc.chat = &chat;
    else desc.messages = r->messages;
    desc.n_messages = (int)arrlen(r->messages);
    r->echo = r->opt.raw && !r->opt.ids ? text : NULL;
    r->started = false;
    arrsetlen(r->answer, 0);
    n_interrupts = 0;
    /* In a chat, a quarter of the context is for the answer, unless the last turn alone needs more. */
    int most = llm_context_n_ctx(r->ctx) / 4;
    if (!r->opt.raw && !r->opt.prompt)
        desc.keep_free = desc.max_tokens > 0 && desc.max_tokens < most ? desc.max_tokens : most;
    llm_status status = llm_generate(r->ctx, &desc, &r->stats, err);
    if (status != LLM_ERROR_CONTEXT_FULL || desc.keep_free <= 1) return status;
    desc.keep_free = 1;
    return llm_generate(r->ctx, &desc, &r->stats, err);
}

/* Ends the last line of the answer. If the context is full, says so; once, if the oldest turns were left out. */
static void close_answer(repl *r) {
    bool ended = !r->opt.ids && arrlen(r->answer) && arrlast(r->answer) == '\n';
    if (r->started && !ended) print(r, "\n", 1);
    if (r->stats.stop == LLM_STOP_CONTEXT)
        fprintf(stderr, "The answer stops here: all %d positions of the context are used; increase --ctx.\n",
                llm_context_n_ctx(r->ctx));
    if (r->stats.n_left_out && !r->said_left_out && !r->ranks.rank)
        fputs("The chat no longer fits in the context (--ctx), so the model does not see its oldest turns.\n", stderr);
    r->said_left_out = r->said_left_out || r->stats.n_left_out;
}

/* Shows the calls of tools in the answer. */
static void show_calls(const repl *r) {
    llm_tool_calls *calls;
    llm_error err;
    if (llm_tool_calls_read(&calls, r->answer, (size_t)arrlen(r->answer), NULL, &err)) {
        fprintf(stderr, "A call of a tool in the answer cannot be read: %s\n", err.message);
        return;
    }
    for (int i = 0; i < calls->n_calls; i++)
        fprintf(stderr, "Call of %s with %s\n", calls->calls[i].name, calls->calls[i].arguments);
    llm_tool_calls_free(calls);
}

/* Answers one input of the user or of a tool. Returns 0, or 1 after a failure, which leaves the conversation
   unchanged. */
static int answer(repl *r, const char *role, const char *text) {
    llm_error err;
    if (!r->opt.raw) push_message(r, role, text, strlen(text));
    llm_status status = generate(r, text, &err);
    if (status == LLM_OK) close_answer(r);
    if (status == LLM_OK && r->tools && !r->ranks.rank) show_calls(r);
    bool nothing = status != LLM_OK || (r->stats.stop == LLM_STOP_CALLBACK && !arrlen(r->answer));
    if (!r->opt.raw && nothing) pop_message(r);
    else if (!r->opt.raw) push_message(r, "assistant", arrlen(r->answer) ? r->answer : "", (size_t)arrlen(r->answer));
    if (status != LLM_OK) complain(err.message);
    if (status == LLM_ERROR_CONTEXT_FULL && !r->opt.prompt) fputs("Shorten the line, or increase --ctx.\n", stderr);
    if (ferror(stdout)) return complain("standard output cannot be written");
    return status != LLM_OK;
}

/* ---- Figures ------------------------------------------------------------------------------------------------- */

static double ratio(double a, double b) { return b > 0 ? a / b : 0; }

/* The prompt's pass gives the first token, so n tokens need n - 1 decoding passes. */
static void print_figures(repl *r) {
    const llm_stats *stats = &r->stats;
    int n_passes = stats->n_generated > 1 ? stats->n_generated - 1 : 0;
    double bytes = (double)stats->decode_bytes;
    if (r->bandwidth == 0) r->bandwidth = llm_measure_bandwidth(r->ctx);
    if (r->ranks.rank) return;
    fprintf(stderr,
            "load %.2f s | prompt %d tokens, %.0f tok/s | generated %d, %.1f tok/s | %.1f MB/token | "
            "MBU %.0f %% of %.1f GB/s",
            r->load_seconds, stats->n_prompt, ratio(stats->n_prompt - stats->n_reused, stats->prefill_seconds),
            stats->n_generated, ratio(n_passes, stats->decode_seconds), ratio(bytes, n_passes) * 1e-6,
            100 * ratio(ratio(bytes, stats->decode_seconds), r->bandwidth), r->bandwidth * 1e-9);
    if (r->opt.draft)
        fprintf(stderr, " | draft %s: %d of %d guesses right, %.2f times plain", r->opt.draft, stats->draft.n_accepted,
                stats->draft.n_proposed, stats->draft.speedup);
    fputc('\n', stderr);
}

/* ---- Reading lines ------------------------------------------------------------------------------------------- */

static char *editor_prompt(EditLine *editor) {
    static char prompt[] = "> ";
    (void)editor;
    return prompt;
}

static void open_editor(repl *r) {
    HistEvent event;
    r->editor = el_init("repl", stdin, stderr, stderr);
    r->history = history_init();
    history(r->history, &event, H_SETSIZE, 1000);
    history(r->history, &event, H_SETUNIQUE, 1);
    el_set(r->editor, EL_PROMPT, editor_prompt);
    el_set(r->editor, EL_EDITOR, "emacs");
    el_set(r->editor, EL_HIST, history, r->history);
    el_set(r->editor, EL_SIGNAL, 1);
    /* While the user types a line, Ctrl-C is an ordinary key, which clears the line. */
    el_set(r->editor, EL_SETTY, "-d", "-isig", NULL);
    el_set(r->editor, EL_BIND, "^C", "em-kill-line", NULL);
    el_source(r->editor, NULL);
}

static char *edit_line(repl *r) {
    HistEvent event;
    int n_bytes;
    const char *typed = el_gets(r->editor, &n_bytes);
    if (!typed || n_bytes < 1) return NULL;
    if (*typed != '\n') history(r->history, &event, H_ENTER, typed);
    free(r->line);
    return r->line = strdup(typed);
}

/* Sends the line that the first rank has read to all ranks. */
static char *share_line(repl *r, char *line) {
    size_t n = line ? strlen(line) + 1 : 0;
    ranks_share(&r->ranks, &n, sizeof n);
    if (r->ranks.rank) {
        free(r->line);
        r->line = line = n ? (char *)malloc(n) : NULL;
    }
    if (line) ranks_share(&r->ranks, line, n);
    return line;
}

/* Reads the next line, without its newline. It is valid until the next call. NULL at the end of the input. */
static char *next_line(repl *r) {
    if (r->ranks.rank) return share_line(r, NULL);
    char *line = r->editor ? edit_line(r) : getline(&r->line, &r->line_size, stdin) >= 0 ? r->line : NULL;
    if (line) line[strcspn(line, "\r\n")] = 0;
    return share_line(r, line);
}

/* ---- Chat ---------------------------------------------------------------------------------------------------- */

static const char help[] = "/reset        forget the conversation\n"
                           "/tool RESULT  give the model the result of a tool that it has called\n"
                           "/stats        figures of the last answer\n"
                           "/help         this\n"
                           "/quit         end; Ctrl-D does too\n"
                           "Ctrl-C stops an answer, or clears the line being typed.\n";

/* Runs a line that begins with a slash. Returns false if the program should end. */
static bool command(repl *r, const char *line) {
    if (!strcmp(line, "/quit")) return false;
    if (!strcmp(line, "/reset")) reset(r);
    else if (r->ranks.rank && strcmp(line, "/stats")) return true;
    else if (!strcmp(line, "/help")) fputs(help, stderr);
    else if (strcmp(line, "/stats")) fprintf(stderr, "Unknown command %s; /help lists the commands.\n", line);
    else if (r->stats.n_prompt == 0) fputs("Nothing has been answered yet.\n", stderr);
    else print_figures(r);
    return true;
}

static int chat(repl *r) {
    int failed = 0;
    const char *line, *problem = llm_chat_problem(llm_model_tokenizer(r->model));
    if (problem && !r->opt.raw && !r->ranks.rank)
        fprintf(stderr, "This model cannot chat: %s. --raw continues texts.\n", problem);
    if (!r->ranks.rank && isatty(STDIN_FILENO) && isatty(STDERR_FILENO)) open_editor(r);
    if (r->editor) greet(r);
    while ((line = next_line(r)) && !ferror(stdout)) {
        if (!strncmp(line, "/tool ", 6) && !r->opt.raw) failed |= answer(r, "tool", line + 6);
        else if (*line == '/') {
            if (!command(r, line)) break;
        } else if (*line) failed |= answer(r, "user", line);
    }
    return r->editor ? 0 : failed;
}

static int answer_once(repl *r) {
    int failed = answer(r, "user", r->opt.prompt);
    if (!failed) print_figures(r);
    return failed ? failed : n_interrupts ? 130 : 0;
}

/* ---- Main ---------------------------------------------------------------------------------------------------- */

/* The line editor counts characters according to the locale, so it must be UTF-8, even if none is set. */
static void set_locale(void) {
    setlocale(LC_CTYPE, "");
    if (strcmp(nl_langinfo(CODESET), "UTF-8")) setlocale(LC_CTYPE, "C.UTF-8");
}

static void close_repl(repl *r) {
    if (r->editor) el_end(r->editor);
    if (r->history) history_end(r->history);
    while (arrlen(r->messages) > 0) pop_message(r);
    arrfree(r->messages);
    arrfree(r->answer);
    arrfree(r->variables);
    free(r->tools);
    free(r->line);
    llm_draft_free(&r->draft);
    llm_context_free(r->ctx);
    llm_grammar_free(r->grammar);
    llm_model_free(r->draft_model);
    llm_model_free(r->model);
}

int main(int argc, char **argv) {
    repl r = {.opt.sampler = {.temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .min_p = 0.05f, .xtc_threshold = 0.1f}};
    llm_error err;
    argp_err_exit_status = 2;
    argp_parse(&option_parser, argc, argv, 0, NULL, &r.opt);
    set_locale();
    r.ranks.tp = r.opt.tp;
    r.ranks.pp = r.opt.pp;
    bool failed = ranks_open(&r.ranks, &err) != LLM_OK;
    if (!failed) ranks_share(&r.ranks, &r.opt.sampler.seed, sizeof r.opt.sampler.seed);
    int code = failed || load(&r, &err) ? complain(err.message) : 0;
    if (!code) {
        catch_interrupts();
        reset(&r);
        code = r.opt.prompt ? answer_once(&r) : chat(&r);
    }
    close_repl(&r);
    ranks_close(&r.ranks, code == 1);
    return code;
}
