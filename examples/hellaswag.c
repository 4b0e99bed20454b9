/*  hellaswag.c - score a model on HellaSwag (Zellers et al. 2019, arXiv:1905.07830).

    build/hellaswag -m MODEL [--data FILE] [--limit N] [--results FILE]
    build/hellaswag --help           all options
    make build/gpu/hellaswag         the same on an NVIDIA GPU (LLM_CUDA); use passes of thousands of tokens there:
                                     --batch 4096
    mpirun -n 4 build/mpi/hellaswag --pp 2 --dp 2 ...    several processes: see --tp, --pp and --dp

    A question is a context and four endings, one of which is right. The model's answer is the ending with the largest
    log-likelihood (acc), or the largest log-likelihood per character (acc_norm). The result goes to standard output,
    progress to standard error. With --results each answer is written to the file at once. After any interruption, the
    same command resumes.

    This program uses a few private functions of llm.h (llm__...), such as its clock. Other programs should not, because
    these may change.

    TEXT AND TOKENS are those of the LM evaluation harness (0.4.13):

    A .jsonl file is the data set as its authors publish it. From it come
        context  clean(activity_label + ": " + ctx_a + " " + Capitalised(ctx_b))       without the label: --no-label
        ending   clean(ending)
    where clean strips white space, replaces " [title]" by ". ", removes text in [brackets], and replaces double spaces
    by single ones. A .txt file is the one that llama.cpp uses, with six lines per question: "label: context", the
    number of the right ending, and four endings. Its texts are cleaned already (ctx_b is not capitalised) and are used
    unchanged. Both kinds of file may be compressed (.bz2).

    The model sees context + " " + ending. The context's tokens are the n tokens of the context alone, without white
    space at its end. The ending's tokens are those of the whole text after the first n. See llm_encode_pair. An
    ending's characters are its code points without the space. If two endings are equally likely, the first wins.
*/
#define LLM_IMPLEMENTATION
#include "llm.h"

#include "examples/arrays.h"
#include "examples/ranks.h"

#include <argp.h>
#include <bzlib.h>
#include <jansson.h>
#include <locale.h>
#include <signal.h>
#include <wctype.h>

enum { ENDINGS = 4 };

/* ---- Options ------------------------------------------------------------------------------------------------- */

typedef struct options {
    const char *model, *data, *results, *format;
    int limit, n_threads, n_batch, n_ranks[3]; /* tensor, pipeline, data parallel */
    llm_dtype dtype;
    llm_score_desc score;
    bool no_label, count;
    const char *trace;
} options;

enum {
    KEY_LIMIT = 256,
    KEY_SCHEDULE,
    KEY_NO_SHARE,
    KEY_NO_LABEL,
    KEY_DTYPE,
    KEY_BATCH,
    KEY_RESULTS,
    KEY_COUNT,
    KEY_TP,
    KEY_PP,
    KEY_DP,
    KEY_MINI_BATCH,
    KEY_TRACE,
    KEY_ENDING_BATCH
};

static const struct argp_option option_list[] = {
    {"model", 'm', "MODEL", 0, "the model's file or directory", 1},
    {"data", 'd', "FILE", 0,
     "the questions (default: hellaswag_val.jsonl or hellaswag_val_full.txt in $LLM_DATA; may be .bz2)", 1},
    {"limit", KEY_LIMIT, "N", 0, "only use the first N questions", 1},
    {"no-label", KEY_NO_LABEL, NULL, 0, "leave the activity label out", 1},
    {"results", KEY_RESULTS, "FILE", 0, "write answers to this file; if it has answers, resume", 1},
    {"schedule", KEY_SCHEDULE, "NAME", 0,
     "packed (default); fixed:N or fixed:N,CONTEXTS: N endings and CONTEXTS contexts per batch; dp, dp:TOKENS or "
     "dp:TOKENS,CONTEXT_TOKENS: min tokens in a batch of endings and of contexts",
     2},
    {"ending-batch", KEY_ENDING_BATCH, "N", 0, "with dp: N endings at a time", 2},
    {"no-share", KEY_NO_SHARE, NULL, 0, "compute the context again for each ending", 2},
    {"batch", KEY_BATCH, "N", 0, "max tokens in a pass (default: 512)", 2},
    {"count", KEY_COUNT, NULL, 0, "only count the tokens to compute", 2},
    {"threads", 't', "N", 0, "threads (default: one per core)", 3},
    {"dtype", KEY_DTYPE, "TYPE", 0, "hold the weights as f32, bf16, int8 or int4 (default: file, the file's types)", 3},
    {"output", 'o', "FORMAT", 0, "text or csv (default: text)", 3},
    {"tp", KEY_TP, "N", 0, "processes that share each layer", 4},
    {"pp", KEY_PP, "N", 0, "groups of processes that share the layers", 4},
    {"dp", KEY_DP, "N", 0, "copies of the model that share the questions", 4},
    {"mini-batch", KEY_MINI_BATCH, "N", 0,
     "tokens of contexts in one pass of fixed:N and dp, so that in a pipeline they take as long as endings do "
     "(default: --batch)",
     4},
    {"trace", KEY_TRACE, "FILE", 0, "record when each stage of the pipeline waits; bench/gantt.py draws it", 4},
    {0}};

static int parse_number(struct argp_state *state, const char *text, const char **end) {
    char *after;
    long value = strtol(text, &after, 10);
    if (after == text || value < 1 || value > 1 << 30)
        argp_error(state, "'%s' does not begin with a positive integer", text);
    *end = after;
    return (int)value;
}

static int parse_whole(struct argp_state *state, const char *text) {
    const char *end;
    int value = parse_number(state, text, &end);
    if (*end) argp_error(state, "'%s' is not an integer", text);
    return value;
}

static void parse_schedule(struct argp_state *state, const char *text, llm_score_desc *d) {
    const char *end = text + strcspn(text, ":");
    if (!strcmp(text, "packed")) {
        d->schedule = LLM_SCHEDULE_PACKED;
    } else if (!strncmp(text, "fixed:", 6)) {
        d->schedule = LLM_SCHEDULE_FIXED;
        d->batch = parse_number(state, text + 6, &end);
        if (*end == ',') d->batch_context = parse_whole(state, end + 1);
        else if (*end) argp_error(state, "'%s' is not fixed:N,CONTEXTS", text);
    } else if (!strcmp(text, "dp") || !strncmp(text, "dp:", 3)) {
        d->schedule = LLM_SCHEDULE_DP;
        if (*end) d->min_tokens = parse_number(state, end + 1, &end);
        if (*end == ',') d->min_context_tokens = parse_whole(state, end + 1);
        else if (*end) argp_error(state, "'%s' is not dp:TOKENS,CONTEXT_TOKENS", text);
    } else {
        argp_error(state, "--schedule: '%s' is not one of packed, fixed:N, dp", text);
    }
}

static error_t parse_option(int key, char *arg, struct argp_state *state) {
    options *opt = (options *)state->input;
    switch (key) {
    case 'm': opt->model = arg; break;
    case 'd': opt->data = arg; break;
    case 't': opt->n_threads = parse_whole(state, arg); break;
    case 'o':
        if (strcmp(arg, "text") && strcmp(arg, "csv")) argp_error(state, "'%s' is not text or csv", arg);
        opt->format = arg;
        break;
    case KEY_TP:
    case KEY_PP:
    case KEY_DP: opt->n_ranks[key - KEY_TP] = parse_whole(state, arg); break;
    case KEY_MINI_BATCH: opt->score.mini_batch = parse_whole(state, arg); break;
    case KEY_ENDING_BATCH: opt->score.batch = parse_whole(state, arg); break;
    case KEY_TRACE: opt->trace = arg; break;
    case KEY_LIMIT: opt->limit = parse_whole(state, arg); break;
    case KEY_BATCH: opt->n_batch = parse_whole(state, arg); break;
    case KEY_NO_LABEL: opt->no_label = true; break;
    case KEY_RESULTS: opt->results = arg; break;
    case KEY_SCHEDULE: parse_schedule(state, arg, &opt->score); break;
    case KEY_NO_SHARE: opt->score.recompute_context = true; break;
    case KEY_COUNT: opt->count = true; break;
    case KEY_DTYPE:
        opt->dtype = llm_dtype_from_name(arg);
        if (!opt->dtype) argp_error(state, "--dtype: '%s' is not one of f32, bf16, int8, int4, file", arg);
        break;
    case ARGP_KEY_ARG: argp_error(state, "'%s' is not an option", arg); break;
    case ARGP_KEY_END:
        if (!opt->model) argp_error(state, "no model: name its file with -m");
        break;
    default: return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static const struct argp option_parser = {
    .options = option_list,
    .parser = parse_option,
    .args_doc = "-m MODEL",
    .doc = "Scores a language model on HellaSwag.\vThe data is published at "
           "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl\n\n"
           "LLM_ISA in the environment forces an instruction set."};

/* Prints an error and ends the program. */
static void give_up(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "hellaswag: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

static void *must_alloc(size_t size) {
    void *memory = calloc(1, size ? size : 1);
    if (!memory) give_up("out of memory");
    return memory;
}

/* ---- The data -------------------------------------------------------------------------------------------------- */

typedef struct question {
    char *context, *endings[ENDINGS]; /* the texts that the model reads */
    int label;
    llm_token *tokens[ENDINGS]; /* the context's, then the ending's */
    int n_context, n_ending[ENDINGS], n_characters[ENDINGS];
    bool known; /* true: answered, now or by an earlier run; then these are set: */
    double log_likelihoods[ENDINGS];
} question;

typedef struct task {
    options opt;
    const char *data;    /* the file's path */
    question *questions; /* stb_ds array [n] */
    int n;
    llm_tokenizer *tokenizer;
    int next;    /* atomic: the next question to tokenize */
    bool failed; /* atomic: tokenizing failed */
    llm_error err;
    /* questions that are not answered yet */
    int *left, n_left;
    llm_question *to_score;
    FILE *results;
    int64_t n_tokens, n_done; /* tokens of all these questions, and of those answered so far */
    double start, shown;
    ranks ranks;
    work work;
    int first; /* index in to_score of the first question of the current llm_score call */
} task;

/* A result from another copy of the model. */
typedef struct answer {
    int question; /* index in to_score */
    double log_likelihoods[ENDINGS];
} answer;

/* Reads a whole file, which may be compressed, and appends a NUL. Returns an stb_ds array. */
static char *read_file(const char *path) {
    enum { PIECE = 1 << 16 };
    FILE *file = fopen(path, "rb");
    size_t n = strlen(path), got = PIECE;
    bool compressed = n > 4 && !strcmp(path + n - 4, ".bz2");
    char *text = NULL;
    int status = BZ_OK;
    if (!file) give_up("%s: %s", path, strerror(errno));
    BZFILE *packed = compressed ? BZ2_bzReadOpen(&status, file, 0, 0, NULL, 0) : NULL;
    while (status == BZ_OK && got) {
        char *to = arraddnptr(text, PIECE);
        got = compressed ? (size_t)BZ2_bzRead(&status, packed, to, PIECE) : fread(to, 1, PIECE, file);
        arrsetlen(text, arrlenu(text) - PIECE + got);
    }
    if (compressed ? status != BZ_STREAM_END : ferror(file)) give_up("%s cannot be read", path);
    if (compressed) BZ2_bzReadClose(&status, packed);
    fclose(file);
    arrput(text, 0);
    return text;
}

/* Replaces every `from` in the text by `to`, which must not be longer. */
static void replace(char *text, const char *from, const char *to) {
    for (char *at = strstr(text, from); at; at = strstr(at + strlen(to), from)) {
        memcpy(at, to, strlen(to));
        memmove(at + strlen(to), at + strlen(from), strlen(at + strlen(from)) + 1);
    }
}

/* Returns the number of bytes of white space at the beginning of a text, as defined by Python's str.strip. */
static size_t leading_space(const char *text) {
    size_t n = 0;
    for (size_t length = 1; length && text[n]; n += length) {
        for (length = 1; (text[n + length] & 0xC0) == 0x80;) length++;
        if (llm__pair_trailing_space(text + n, length) < length) length = 0;
    }
    return n;
}

/* The same as the harness's `preprocess`. */
static char *clean(char *text) {
    size_t n = strlen(text);
    text[n - llm__pair_trailing_space(text, n)] = 0;
    char *begin = text + leading_space(text);
    memmove(text, begin, strlen(begin) + 1);
    replace(text, " [title]", ". ");
    for (char *open = strchr(text, '['); open; open = strchr(open, '[')) {
        size_t inside = strcspn(open, "]\n");
        if (open[inside] == ']') memmove(open, open + inside + 1, strlen(open + inside + 1) + 1);
        else open++;
    }
    replace(text, "  ", " ");
    return text;
}

/* For a letter that becomes several letters in title case, returns them with a 0 at the end. Otherwise returns NULL. */
static const uint16_t *several_letters(uint32_t letter) {
    /* clang-format off */
    static const uint16_t titles[][5] = {
        {0xDF, 'S', 's'}, {0x149, 0x2BC, 'N'}, {0x1F0, 'J', 0x30C}, {0x390, 0x399, 0x308, 0x301},
        {0x3B0, 0x3A5, 0x308, 0x301}, {0x587, 0x535, 0x582}, {0x1E96, 'H', 0x331}, {0x1E97, 'T', 0x308},
        {0x1E98, 'W', 0x30A}, {0x1E99, 'Y', 0x30A}, {0x1E9A, 'A', 0x2BE}, {0x1F50, 0x3A5, 0x313},
        {0x1F52, 0x3A5, 0x313, 0x300}, {0x1F54, 0x3A5, 0x313, 0x301}, {0x1F56, 0x3A5, 0x313, 0x342},
        {0x1FB2, 0x1FBA, 0x345}, {0x1FB4, 0x386, 0x345}, {0x1FB6, 0x391, 0x342}, {0x1FB7, 0x391, 0x342, 0x345},
        {0x1FC2, 0x1FCA, 0x345}, {0x1FC4, 0x389, 0x345}, {0x1FC6, 0x397, 0x342}, {0x1FC7, 0x397, 0x342, 0x345},
        {0x1FD2, 0x399, 0x308, 0x300}, {0x1FD3, 0x399, 0x308, 0x301}, {0x1FD6, 0x399, 0x342},
        {0x1FD7, 0x399, 0x308, 0x342}, {0x1FE2, 0x3A5, 0x308, 0x300}, {0x1FE3, 0x3A5, 0x308, 0x301},
        {0x1FE4, 0x3A1, 0x313}, {0x1FE6, 0x3A5, 0x342}, {0x1FE7, 0x3A5, 0x308, 0x342}, {0x1FF2, 0x1FFA, 0x345},
        {0x1FF4, 0x38F, 0x345}, {0x1FF6, 0x3A9, 0x342}, {0x1FF7, 0x3A9, 0x342, 0x345}, {0xFB00, 'F', 'f'},
        {0xFB01, 'F', 'i'}, {0xFB02, 'F', 'l'}, {0xFB03, 'F', 'f', 'i'}, {0xFB04, 'F', 'f', 'l'}, {0xFB05, 'S', 't'},
        {0xFB06, 'S', 't'}, {0xFB13, 0x544, 0x576}, {0xFB14, 0x544, 0x565}, {0xFB15, 0x544, 0x56B},
        {0xFB16, 0x54E, 0x576}, {0xFB17, 0x544, 0x56D}};
    /* clang-format on */
    for (size_t i = 0; i < sizeof titles / sizeof *titles; i++)
        if (titles[i][0] == letter) return titles[i] + 1;
    return NULL;
}

static bool has_case(uint32_t c) { return towlower(c) != c || towupper(c) != c || iswupper(c) || iswlower(c); }

/* Sets a UTF-8 locale, so that the next functions know the letters of all languages. */
static void know_letters(void) {
    if (!setlocale(LC_CTYPE, "C.UTF-8") && !setlocale(LC_CTYPE, "en_US.UTF-8"))
        give_up("neither the locale C.UTF-8 nor en_US.UTF-8 is installed; one of them is needed for upper-case and "
                "lower-case "
                "letters");
}

/* Characters that can be part of a word but are not letters: marks, apostrophes and others. */
static bool is_in_word(uint32_t c) {
    static const uint16_t ranges[][2] = {
        {'\'', '\''},     {'.', '.'},       {':', ':'},       {'^', '^'},       {'`', '`'},       {0xA8, 0xA8},
        {0xAD, 0xAD},     {0xAF, 0xAF},     {0xB4, 0xB4},     {0xB7, 0xB8},     {0x2B0, 0x2FF},   {0x374, 0x375},
        {0x37A, 0x37A},   {0x384, 0x385},   {0x387, 0x387},   {0x1FBD, 0x1FBD}, {0x1FBF, 0x1FC1}, {0x1FFD, 0x1FFE},
        {0x200B, 0x200F}, {0x2018, 0x2019}, {0x2024, 0x2024}, {0x2027, 0x2027}, {0x2060, 0x2064}};
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        if (c >= ranges[i][0] && c <= ranges[i][1]) return true;
    return iswctype(c, wctype("combining"));
}

/* True if a capital sigma at text[i] ends a word: there is a letter before it, and none after it. */
static bool ends_word(const uint32_t *text, size_t n, size_t i) {
    size_t before = i, behind = i + 1;
    while (before && is_in_word(text[before - 1])) before--;
    while (behind < n && is_in_word(text[behind])) behind++;
    return before && has_case(text[before - 1]) && !(behind < n && has_case(text[behind]));
}

/* Python's capitalize: returns a new string with the first letter in title case and the others in lower case. */
static char *capitalised(const char *text) {
    size_t n_bytes = strlen(text), n = 0, n_out = 0;
    const uint8_t *p = (const uint8_t *)text, *end = p + n_bytes;
    uint32_t *letters = (uint32_t *)must_alloc((n_bytes + 1) * sizeof *letters);
    char *out = (char *)must_alloc(6 * n_bytes + 1); /* a letter becomes at most 6 bytes */
    while (p < end) letters[n++] = llm__utf8_decode(p, &p);
    for (size_t i = 0; i < n; i++) {
        static const uint16_t dotted_i[] = {'i', 0x307, 0};
        const uint16_t *several = i ? (letters[i] == 0x130 ? dotted_i : NULL) : several_letters(letters[i]);
        bool final_sigma = i && letters[i] == 0x3A3 && ends_word(letters, n, i);
        uint32_t one = !i ? towctrans(letters[i], wctrans("totitle")) : final_sigma ? 0x3C2 : towlower(letters[i]);
        if (!several) n_out += llm__utf8_encode(one, (uint8_t *)out + n_out);
        for (; several && *several; several++) n_out += llm__utf8_encode(*several, (uint8_t *)out + n_out);
    }
    out[n_out] = 0;
    free(letters);
    return out;
}

static char *must_copy(const char *text) {
    char *copy = (char *)must_alloc(strlen(text) + 1);
    return strcpy(copy, text);
}

static const char *string_of(const json_t *line, const char *key, const char *path, int number) {
    const char *value = json_string_value(json_object_get(line, key));
    if (!value) give_up("%s, line %d has no \"%s\"", path, number, key);
    return value;
}

static void read_json_question(const char *path, int number, const char *text, size_t n, bool no_label, question *q) {
    json_error_t problem;
    json_t *line = json_loadb(text, n, 0, &problem);
    if (!line) give_up("%s, line %d: %s", path, number, problem.text);
    json_t *label = json_object_get(line, "label"), *endings = json_object_get(line, "endings");
    const char *activity = string_of(line, "activity_label", path, number), *a = string_of(line, "ctx_a", path, number);
    char *b = capitalised(string_of(line, "ctx_b", path, number));
    size_t room = strlen(activity) + strlen(a) + strlen(b) + 4;
    q->context = (char *)must_alloc(room);
    snprintf(q->context, room, "%s%s%s %s", no_label ? "" : activity, no_label ? "" : ": ", a, b);
    clean(q->context);
    q->label = json_is_string(label)    ? atoi(json_string_value(label))
               : json_is_integer(label) ? (int)json_integer_value(label)
                                        : -1;
    for (size_t e = 0; e < ENDINGS; e++) {
        const char *ending = json_string_value(json_array_get(endings, e));
        if (!ending) give_up("%s, line %d does not have four endings", path, number);
        q->endings[e] = clean(must_copy(ending));
    }
    free(b);
    json_decref(line);
}

/* Returns the next line without its newline, or NULL at the end of the text. */
static char *take_line(char **at) {
    char *line = *at, *end = strchr(line, '\n');
    if (!*line) return NULL;
    *at = end ? end + 1 : line + strlen(line);
    if (end) *end = 0;
    return line;
}

static bool read_text_question(const char *path, int number, char **at, bool no_label, question *q) {
    char *lines[2 + ENDINGS];
    for (int i = 0; i < 2 + ENDINGS; i++) {
        lines[i] = take_line(at);
        if (!lines[0]) return false;
        if (!lines[i]) give_up("%s: question %d does not have six lines", path, number);
    }
    char *label_end = no_label ? strstr(lines[0], ": ") : NULL;
    q->context = must_copy(label_end ? label_end + 2 : lines[0]);
    q->label = lines[1][0] >= '0' && lines[1][0] <= '9' ? atoi(lines[1]) : -1;
    for (int e = 0; e < ENDINGS; e++) q->endings[e] = must_copy(lines[2 + e]);
    return true;
}

static void read_questions(task *t) {
    char *text = read_file(t->data), *at = text;
    bool json = *text == '{';
    while (!t->opt.limit || t->n < t->opt.limit) {
        question q = {0};
        if (json) {
            char *line = take_line(&at);
            if (!line) break;
            read_json_question(t->data, t->n + 1, line, strlen(line), t->opt.no_label, &q);
        } else if (!read_text_question(t->data, t->n + 1, &at, t->opt.no_label, &q)) {
            break;
        }
        if (q.label < 0 || q.label >= ENDINGS)
            give_up("%s: question %d does not say which ending is right", t->data, t->n + 1);
        arrput(t->questions, q);
        t->n++;
    }
    arrfree(text);
    if (!t->n) give_up("%s has no questions", t->data);
}

static const char *find_data(const options *opt) {
    static const char *const names[] = {"hellaswag_val.jsonl", "hellaswag_val.jsonl.bz2", "hellaswag_val_full.txt",
                                        "hellaswag_val_full.txt.bz2"};
    static char path[4096];
    const char *directory = getenv("LLM_DATA");
    if (opt->data) return opt->data;
    for (size_t i = 0; directory && i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", directory, names[i]);
        if (!access(path, R_OK)) return path;
    }
    give_up("no data. Fetch https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl\n"
            "and name it with --data, or put it into a directory and set LLM_DATA to that directory.");
    return NULL;
}

/* ---- Tokenizing, while the model is loaded ---------------------------------------------------------------------- */

static int count_characters(const char *text) {
    int n = 0;
    for (; *text; text++) n += ((unsigned char)*text & 0xC0) != 0x80;
    return n;
}

static bool tokenize_question(const llm_tokenizer *tokenizer, question *q, llm_error *err) {
    for (int e = 0; e < ENDINGS; e++) {
        size_t n_bytes = strlen(q->endings[e]), room = 4 * (strlen(q->context) + n_bytes + 1) + 8;
        char *spaced = (char *)must_alloc(n_bytes + 2);
        int64_t n_context;
        spaced[0] = ' ';
        memcpy(spaced + 1, q->endings[e], n_bytes);
        q->tokens[e] = (llm_token *)must_alloc(room * sizeof(llm_token));
        int64_t n = llm_encode_pair(tokenizer, q->context, spaced, LLM_TOKENS_ENDS | LLM_TOKENS_SPECIAL, q->tokens[e],
                                    room, &n_context, err);
        free(spaced);
        if (n < 0) return false;
        q->tokens[e] = (llm_token *)resize(q->tokens[e], (size_t)(n + 1) * sizeof(llm_token));
        q->n_context = (int)n_context;
        q->n_ending[e] = (int)(n - n_context);
        q->n_characters[e] = count_characters(q->endings[e]);
    }
    return true;
}

static void *tokenize(void *arg) {
    task *t = (task *)arg;
    llm_error err;
    for (int i; (i = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED)) < t->n;)
        if (!tokenize_question(t->tokenizer, &t->questions[i], &err) &&
            !__atomic_exchange_n(&t->failed, true, __ATOMIC_ACQ_REL))
            t->err = err;
    return NULL;
}

/* ---- Results in a file ------------------------------------------------------------------------------------------ */

/* Writes a line that identifies everything the answers depend on: the model, its types in memory, and the tokens of the
   questions. */
static void describe_run(const task *t, const llm_model_info *info, char *line, size_t size) {
    uint64_t hash = 0;
    for (int i = 0; i < t->n; i++)
        for (int e = 0; e < ENDINGS; e++)
            hash = llm__hash_fnv(hash, t->questions[i].tokens[e],
                                 (size_t)(t->questions[i].n_context + t->questions[i].n_ending[e]) * sizeof(llm_token));
    snprintf(line, size, "hellaswag model %016llx %s questions %d %016llx\n", (unsigned long long)info->fingerprint,
             llm_dtype_name(info->dtype), t->n, (unsigned long long)hash);
}

/* Parses a complete line, "17 -0x1.8p+4 ...". Hexadecimal numbers keep all bits. */
static bool read_answer(const char *line, task *t) {
    char *at;
    long i = strtol(line, &at, 10);
    double values[ENDINGS];
    for (int e = 0; e < ENDINGS; e++) values[e] = strtod(at, &at);
    if (at == line || *at || i < 0 || i >= t->n) return false;
    memcpy(t->questions[i].log_likelihoods, values, sizeof values);
    t->questions[i].known = true;
    return true;
}

/* Reads the answers in the file. If its last line is incomplete because a run was killed, removes that line. */
static void open_results(task *t, const llm_model_info *info) {
    char wanted[200];
    const char *path = t->opt.results;
    if (!path || t->ranks.rank) return;
    describe_run(t, info, wanted, sizeof wanted);
    if (access(path, F_OK)) {
        t->results = fopen(path, "w");
        if (!t->results || fputs(wanted, t->results) < 0 || fflush(t->results))
            give_up("%s: %s", path, strerror(errno));
        return;
    }
    char *text = read_file(path), *at = text + strlen(wanted), *end;
    if (strncmp(text, wanted, strlen(wanted)))
        give_up("%s is not of this model, type of weights, and questions; remove it or name another file", path);
    for (int number = 2; (end = strchr(at, '\n')); at = end + 1, number++) {
        *end = 0;
        if (!read_answer(at, t)) give_up("%s, line %d is damaged; remove it", path, number);
    }
    if (truncate(path, at - text) || !(t->results = fopen(path, "a"))) give_up("%s: %s", path, strerror(errno));
    arrfree(text);
}

/* ---- Scoring ---------------------------------------------------------------------------------------------------- */

static volatile sig_atomic_t stopped;

static void on_signal(int sig) {
    (void)sig;
    stopped = 1;
}

/* Returns the number of tokens of a question's context and endings, as a measure of work. */
static int64_t tokens_of(const question *q) {
    int64_t n = q->n_context;
    for (int e = 0; e < ENDINGS; e++) n += q->n_ending[e];
    return n;
}

static void show_progress(task *t) {
    char bar[41];
    double now = llm__clock_now(), done = (double)t->n_done / (double)t->n_tokens,
           left = (now - t->start) * (1 / done - 1);
    if (t->ranks.rank || (now - t->shown < 0.2 && t->n_done < t->n_tokens)) return;
    t->shown = now;
    for (int i = 0; i < 40; i++) bar[i] = i < (int)(40 * done) ? '#' : '.';
    bar[40] = 0;
    fprintf(stderr, "\r[%s] %3.0f %%, %.0f s, %.0f s left ", bar, 100 * done, now - t->start, left);
    if (t->n_done == t->n_tokens) fprintf(stderr, "\n");
}

/* Stores an answer, and writes it to the results file if there is one. Returns false if writing fails. */
static bool take_answer(task *t, int index, const double *log_likelihoods) {
    question *q = &t->questions[t->left[index]];
    memcpy(q->log_likelihoods, log_likelihoods, sizeof q->log_likelihoods);
    q->known = true;
    t->n_done += tokens_of(q);
    show_progress(t);
    if (!t->results) return true;
    const double *l = log_likelihoods;
    bool written =
        fprintf(t->results, "%d %a %a %a %a\n", t->left[index], l[0], l[1], l[2], l[3]) > 0 && !fflush(t->results);
    if (!written) fprintf(stderr, "\nhellaswag: %s: %s\n", t->opt.results, strerror(errno));
    return written;
}

static void on_answer(void *user, const void *result) {
    answer a;
    memcpy(&a, result, sizeof a);
    if (!take_answer((task *)user, a.question, a.log_likelihoods)) stopped = 1;
}

/* The context's cancel callback, called between layers. Rank 0 also serves the other copies of the model here. */
static bool is_stopped(void *user) {
    task *t = (task *)user;
    if (!t->ranks.rank) ranks_serve(&t->ranks, &t->work, sizeof(answer), on_answer, t);
    return stopped;
}

static bool on_question(void *user, int index, const double *log_likelihoods) {
    task *t = (task *)user;
    if (!t->ranks.replica) return take_answer(t, t->first + index, log_likelihoods);
    answer a;
    memset(&a, 0, sizeof a);
    a.question = t->first + index;
    memcpy(a.log_likelihoods, log_likelihoods, sizeof a.log_likelihoods);
    if (t->ranks.rank % (t->ranks.tp * t->ranks.pp) == 0) ranks_tell(&t->ranks, &a, sizeof a);
    return true;
}

static void list_questions(task *t) {
    for (int i = 0; i < t->n; i++) ranks_share(&t->ranks, &t->questions[i].known, sizeof t->questions[i].known);
    t->left = (int *)must_alloc((size_t)t->n * sizeof *t->left);
    t->to_score = (llm_question *)must_alloc((size_t)t->n * sizeof *t->to_score);
    for (int i = 0; i < t->n; i++) {
        question *q = &t->questions[i];
        const llm_token **endings = (const llm_token **)must_alloc(ENDINGS * sizeof *endings);
        for (int e = 0; e < ENDINGS; e++) endings[e] = q->tokens[e] + q->n_context;
        llm_question to_score = {q->tokens[0], q->n_context, ENDINGS, endings, q->n_ending};
        if (q->known) {
            free(endings);
            continue;
        }
        t->to_score[t->n_left] = to_score;
        t->left[t->n_left++] = i;
        t->n_tokens += tokens_of(q);
    }
}

/* Creates a context for 256 sequences and thousands of tokens, large enough for batches of every schedule. */
static llm_context *create_context(const task *t, const llm_model *model) {
    llm_context_desc desc = {.n_seq = 256,
                             .n_batch = t->opt.n_batch,
                             .n_threads = t->opt.n_threads,
                             .n_logits = 1,
                             .cancel = is_stopped,
                             .cancel_user = (void *)(uintptr_t)t};
    llm_context *ctx;
    llm_error err;
    for (int i = 0; i < t->n; i++)
        for (int e = 0; e < ENDINGS; e++)
            if (t->questions[i].n_context + t->questions[i].n_ending[e] > desc.n_ctx)
                desc.n_ctx = t->questions[i].n_context + t->questions[i].n_ending[e];
    desc.n_cache = 8192 + 8 * t->opt.n_batch;
    if (llm_context_create(&ctx, model, &desc, &err)) give_up("%s", err.message);
    return ctx;
}

/* ---- The result ------------------------------------------------------------------------------------------------- */

typedef struct result {
    double acc, acc_norm, seconds, load_seconds, mfu;
    int n_known, n_threads;
    llm_score_stats stats;
} result;

static int best_of(const double *values) {
    int best = 0;
    for (int e = 1; e < ENDINGS; e++)
        if (values[e] > values[best]) best = e;
    return best;
}

static void rate_answers(const task *t, result *r) {
    for (int i = 0; i < t->n; i++) {
        const question *q = &t->questions[i];
        double normed[ENDINGS];
        if (!q->known) continue;
        for (int e = 0; e < ENDINGS; e++)
            normed[e] = q->log_likelihoods[e] / (q->n_characters[e] ? q->n_characters[e] : 1);
        r->n_known++;
        r->acc += best_of(q->log_likelihoods) == q->label;
        r->acc_norm += best_of(normed) == q->label;
    }
    r->acc *= 100.0 / r->n_known;
    r->acc_norm *= 100.0 / r->n_known;
}

/* Counts the necessary operations, without padding and repetitions: the products of the layers and the head. In the
   last layer, rows that do not go through the head only count with their queries, keys and values. Attention, 3 % at
   these lengths, is not counted. */
static double useful_operations(const llm_model_info *m, const llm_score_stats *s) {
    double needed = (double)(s->n_computed - s->n_padded - s->n_redundant), q = m->n_heads * m->head_dim,
           kv = m->n_kv_heads * m->head_dim;
    double projections = m->n_embd * (q + 2 * kv), rest = m->n_embd * (q + 3.0 * m->n_ff);
    return 2 * (needed * (m->n_layers * projections + (m->n_layers - 1) * rest) +
                (double)s->n_predicted * (rest + (double)m->n_embd * m->n_vocab));
}

static void print_result(const task *t, const llm_model_info *info, const result *r) {
    const llm_score_stats *s = &r->stats;
    double rate = s->seconds > 0 ? (double)s->n_computed / s->seconds : 0;
    if (!strcmp(t->opt.format, "csv")) {
        printf("questions,acc,acc_norm,seconds,load_seconds,tokens,padded,redundant,through_head,passes,tok_s,mfu,"
               "dtype,threads\n");
        printf("%d,%.2f,%.2f,%.2f,%.2f,%lld,%lld,%lld,%lld,%lld,%.1f,%.4f,%s,%d\n", r->n_known, r->acc, r->acc_norm,
               s->seconds, r->load_seconds, (long long)s->n_computed, (long long)s->n_padded, (long long)s->n_redundant,
               (long long)s->n_predicted, (long long)s->n_passes, rate, r->mfu, llm_dtype_name(info->dtype),
               r->n_threads);
        return;
    }
    if (!t->opt.count) printf("%d questions: acc %.2f %%, acc_norm %.2f %%\n", r->n_known, r->acc, r->acc_norm);
    printf(
        "%lld tokens computed in %lld passes: %lld needed, %lld padded, %lld redundant; %lld rows through the head\n",
        (long long)s->n_computed, (long long)s->n_passes, (long long)(s->n_computed - s->n_padded - s->n_redundant),
        (long long)s->n_padded, (long long)s->n_redundant, (long long)s->n_predicted);
    if (s->seconds > 0 && !t->opt.count)
        printf("%.1f s (and %.1f s to load), %.0f tokens/s, MFU %.0f %%\n", s->seconds, r->load_seconds, rate,
               100 * r->mfu);
}

/* Prints the number of tokens. Two kinds need not be computed: the last token of an ending, and first tokens that all
   endings share (except once). */
static void print_count(const task *t, const llm_score_stats *s) {
    int64_t contexts = 0, endings = 0, needed = s->n_computed - s->n_padded - s->n_redundant;
    for (int i = 0; i < t->n; i++) {
        contexts += t->questions[i].n_context;
        endings += tokens_of(&t->questions[i]) - t->questions[i].n_context;
    }
    printf(
        "%lld tokens: %lld of contexts, %lld of endings. Of the endings' tokens, %lld are the last of an ending, from\n"
        "which nothing is predicted, and %lld are first tokens that the question's endings have in common\n",
        (long long)(contexts + endings), (long long)contexts, (long long)endings, (long long)t->n * ENDINGS,
        (long long)(contexts + endings - needed) - (long long)t->n * ENDINGS);
}

/* ---- Main ------------------------------------------------------------------------------------------------------- */

/* Loads the model and tokenizes at the same time. */
static llm_model *prepare(task *t) {
    llm_model_desc desc = {.dtype = t->opt.dtype,
                           .n_threads = t->opt.n_threads,
                           .isa = getenv("LLM_ISA"),
                           .tensor = t->ranks.tensor,
                           .pipeline = t->ranks.pipeline};
#ifdef LLM_CUDA
    desc.backend = llm_cuda_backend();
#endif
    llm_model *model;
    pthread_t threads[4];
    int n = 0;
    if (llm_tokenizer_load(&t->tokenizer, t->opt.model, NULL, &t->err)) give_up("%s", t->err.message);
    for (; n < 4 && n < llm__team_default_threads(); n++)
        if (pthread_create(&threads[n], NULL, tokenize, t)) break;
    llm_status status = llm_model_load(&model, t->opt.model, &desc, &t->err);
    if (status) give_up("%s", t->err.message);
    if (!n) tokenize(t);
    for (int i = 0; i < n; i++) pthread_join(threads[i], NULL);
    if (t->failed) give_up("%s", t->err.message);
    return model;
}

/* Opens one file on all ranks. Each rank appends whole lines. */
static void open_trace(task *t) {
    if (!t->ranks.rank) remove(t->opt.trace);
    ranks_share(&t->ranks, &t->n, sizeof t->n); /* the other ranks wait until the old file is removed */
    FILE *file = fopen(t->opt.trace, "a");
    if (!file || setvbuf(file, NULL, _IOLBF, BUFSIZ)) give_up("%s: %s", t->opt.trace, strerror(errno));
    ranks_trace(&t->ranks, file);
}

/* Scores the remaining questions, in pieces if there are several copies of the model. */
static llm_status score(task *t, llm_context *ctx, llm_score_stats *stats, llm_error *err) {
    double *log_likelihoods = t->opt.count ? NULL : (double *)must_alloc((size_t)t->n * ENDINGS * sizeof(double));
    llm_status status = LLM_OK;
    t->work.end = t->n_left;
    t->work.n_unfinished = t->ranks.dp - 1;
    t->opt.score.on_question = on_question;
    t->opt.score.user = t;
    t->start = llm__clock_now();
    for (int n; !status && (n = ranks_ask(&t->ranks, &t->work, &t->first)) > 0;) {
        llm_score_stats piece;
        status = llm_score(ctx, t->to_score + t->first, n, &t->opt.score, log_likelihoods, &piece, err);
        stats->n_questions += piece.n_questions;
        stats->n_passes += piece.n_passes;
        stats->n_computed += piece.n_computed;
        stats->n_padded += piece.n_padded;
        stats->n_redundant += piece.n_redundant;
        stats->n_predicted += piece.n_predicted;
    }
    while (!status && !t->ranks.rank && t->work.n_unfinished && !is_stopped(t)) {}
    int64_t counts[] = {stats->n_passes, stats->n_computed, stats->n_padded, stats->n_redundant, stats->n_predicted};
    if (!status) ranks_add(&t->ranks, counts, 5);
    stats->n_passes = counts[0];
    stats->n_computed = counts[1];
    stats->n_padded = counts[2];
    stats->n_redundant = counts[3];
    stats->n_predicted = counts[4];
    stats->seconds = llm__clock_now() - t->start;
    free(log_likelihoods);
    return status;
}

int main(int argc, char **argv) {
    static task t = {.opt = {.format = "text", .n_batch = 512}};
    result r;
    llm_error err;
    memset(&r, 0, sizeof r);
    argp_parse(&option_parser, argc, argv, 0, NULL, &t.opt);
    t.ranks.tp = t.opt.n_ranks[0];
    t.ranks.pp = t.opt.n_ranks[1];
    t.ranks.dp = t.opt.n_ranks[2];
    if (ranks_open(&t.ranks, &err)) give_up("%s", err.message);
    t.data = find_data(&t.opt);
    know_letters();
    double start = llm__clock_now();
    read_questions(&t);
    llm_model *model = prepare(&t);
    llm_model_info info = llm_model_get_info(model);
    if (!t.opt.count) open_results(&t, &info);
    list_questions(&t);
    if (t.opt.trace) open_trace(&t);
    llm_context *ctx = create_context(&t, model);
    r.load_seconds = llm__clock_now() - start;
    r.n_threads = llm_context_n_threads(ctx) * t.ranks.tp * t.ranks.pp * t.ranks.dp;
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    llm_status status = score(&t, ctx, &r.stats, &err);
    if (status == LLM_ERROR_CANCELLED && stopped && !t.ranks.rank)
        fprintf(stderr, "\nStopped.%s\n", t.opt.results ? " Run the same command to resume." : "");
    if (status && status != LLM_ERROR_CANCELLED) give_up("%s", err.message);
    if (!status) {
        double flops = t.opt.count || !t.n_left ? 0 : llm_measure_flops(ctx) * t.ranks.tp * t.ranks.pp * t.ranks.dp;
        r.mfu = flops > 0 ? useful_operations(&info, &r.stats) / r.stats.seconds / flops : 0;
        if (!t.ranks.rank) {
            rate_answers(&t, &r);
            print_result(&t, &info, &r);
            if (t.opt.count) print_count(&t, &r.stats);
        }
    }
    llm_context_free(ctx);
    llm_model_free(model);
    llm_tokenizer_free(t.tokenizer);
    ranks_close(&t.ranks, status != LLM_OK);
    return status ? 130 : 0;
}
