/* tokenize -m MODEL: text to token ids and back.

   Standard input is one text or, with --json, a JSON string per line. Ids are separated by spaces, one line per text.
   With -d each line of ids is converted back to text: plain text, or with --json a JSON string per line.

   With --chat each line is a conversation: a JSON list of messages, or an object with the members messages, tools and
   variables (the last two are optional). The output is the text that the model's chat template makes of it, as a JSON
   string per line, or with --ids the ids. The answer is open unless the variable add_generation_prompt is false. */
#define LLM_IMPLEMENTATION
#include "llm.h"

#include "examples/arrays.h"

#include <argp.h>
#include <jansson.h>
#include <string.h>

typedef struct options {
    const char *model;
    int json, decode, chat, ids;
    unsigned flags;
} options;

enum { OPTION_JSON = 256, OPTION_BOS, OPTION_SPECIAL, OPTION_CHAT, OPTION_IDS };

static error_t parse_option(int key, char *value, struct argp_state *state) {
    options *o = (options *)state->input;
    switch (key) {
    case 'm': o->model = value; return 0;
    case 'd': o->decode = 1; return 0;
    case OPTION_JSON: o->json = 1; return 0;
    case OPTION_CHAT: o->chat = 1; return 0;
    case OPTION_IDS: o->ids = 1; return 0;
    case OPTION_BOS: o->flags |= LLM_TOKENS_ENDS; return 0;
    case OPTION_SPECIAL: o->flags |= LLM_TOKENS_SPECIAL; return 0;
    case ARGP_KEY_ARG: argp_error(state, "unexpected argument \"%s\"; text comes from standard input", value); return 0;
    case ARGP_KEY_END:
        if (!o->model) argp_error(state, "which model? Give -m MODEL");
        if (o->chat && (o->json || o->decode || o->flags)) argp_error(state, "--chat goes with --ids only");
        if (o->ids && !o->chat) argp_error(state, "--ids goes with --chat");
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

/* ---- Encoding and decoding ---- */

static void print_ids(const llm_token *ids, int64_t n) {
    for (int64_t i = 0; i < n; i++) printf(i ? " %ld" : "%ld", (long)ids[i]);
    printf("\n");
}

static void print_string(const char *text, size_t n_bytes) {
    json_t *string = json_stringn_nocheck(text, n_bytes);
    if (!string) out_of_memory();
    json_dumpf(string, stdout, JSON_ENCODE_ANY);
    json_decref(string);
    printf("\n");
}

static int encode(const llm_tokenizer *tokenizer, const options *o, const char *text, size_t n_bytes) {
    llm_error err;
    llm_token *ids = NULL;
    int64_t n = (int64_t)n_bytes + 8;
    while (n > arrlen(ids)) {
        arrsetlen(ids, n);
        n = llm_encode(tokenizer, text, n_bytes, o->flags, ids, arrlenu(ids), &err);
    }
    if (n < 0) fprintf(stderr, "tokenize: %s\n", err.message);
    print_ids(ids, n);
    arrfree(ids);
    return n < 0;
}

/* JSON can only hold whole characters. Other bytes become U+FFFD, as in a stream of tokens. Returns an stb_ds array. */
static char *decode_characters(const llm_tokenizer *tokenizer, const llm_token *ids, size_t n_ids, unsigned flags) {
    llm_text_stream stream = {.flags = flags};
    char *text = NULL;
    for (size_t i = 0; i <= n_ids; i++) {
        llm_token token = i < n_ids ? ids[i] : -1;
        if (i < n_ids && token < 0) continue;
        size_t n = llm_stream_token(tokenizer, &stream, token, NULL, 0);
        llm_stream_token(tokenizer, &stream, token, arraddnptr(text, n + 1), n + 1);
        arrsetlen(text, arrlenu(text) - 1); /* without the NUL */
    }
    return text;
}

static int decode(const llm_tokenizer *tokenizer, const options *o, const char *line) {
    llm_token *ids = NULL;
    char *end, *text = NULL;
    for (;; line = end) {
        long id = strtol(line, &end, 10);
        if (end == line) break;
        arrput(ids, id < 0 || id > INT32_MAX ? -1 : (llm_token)id);
    }
    while (*line == ' ' || *line == '\n' || *line == '\r') line++;
    if (*line) {
        fprintf(stderr, "tokenize: \"%.20s\" is not a token id\n", line);
        arrfree(ids);
        return 1;
    }
    if (o->json) {
        text = decode_characters(tokenizer, ids, arrlenu(ids), o->flags);
        print_string(text, arrlenu(text));
    } else {
        size_t n_bytes = llm_decode(tokenizer, ids, arrlenu(ids), o->flags, NULL, 0);
        arrsetlen(text, n_bytes + 1);
        llm_decode(tokenizer, ids, arrlenu(ids), o->flags, text, n_bytes + 1);
        fwrite(text, 1, n_bytes, stdout);
    }
    arrfree(text);
    arrfree(ids);
    return 0;
}

/* ---- Conversations ---- */

/* The end of a value in JSON that is known to be valid. */
static char *skip_value(char *at) {
    int depth = 0;
    do {
        if (*at == '"')
            while (*++at != '"') at += *at == '\\';
        if (*at == '[' || *at == '{') depth++;
        if (*at == ']' || *at == '}') depth--;
        at++;
    } while (depth > 0 || !strchr(" \t\r\n,:]}", *at));
    return at;
}

static char *skip_blanks(char *at) { return at + strspn(at, " \t\r\n"); }

/* Finds the members in the text of an object, and cuts it there, so that numbers stay as they are written. Returns
   whether there are no others. */
static int find_members(char *text, llm_chat_desc *desc) {
    for (char *at = skip_blanks(text + 1), last = *at; last != '}';) {
        char *name = at, *name_end = skip_value(name), *value = skip_blanks(skip_blanks(name_end) + 1);
        char *value_end = skip_value(value), *after = skip_blanks(value_end);
        *name_end = 0;
        const char **place = !strcmp(name, "\"messages\"")    ? &desc->messages_json
                             : !strcmp(name, "\"tools\"")     ? &desc->tools_json
                             : !strcmp(name, "\"variables\"") ? &desc->variables_json
                                                              : NULL;
        if (!place) {
            fprintf(stderr, "tokenize: a conversation has no member %.60s\n", name);
            return 0;
        }
        *place = value;
        last = *after;
        *value_end = 0;
        at = skip_blanks(after + 1);
    }
    if (!desc->messages_json) fprintf(stderr, "tokenize: a conversation needs messages\n");
    return desc->messages_json != NULL;
}

static int render(const llm_tokenizer *tokenizer, const options *o, const llm_chat_desc *desc) {
    llm_error err;
    size_t capacity = 0;
    llm_token *ids = NULL;
    char *text = NULL;
    int64_t n;
    for (int attempt = 0; attempt < 2; attempt++) {
        n = o->ids ? llm_chat_encode(tokenizer, desc, ids, capacity, &err)
                   : llm_chat_render(tokenizer, desc, text, capacity, &err);
        if (n < 0 || attempt) break;
        capacity = (size_t)n + 1;
        if (o->ids) ids = (llm_token *)resize(NULL, capacity * sizeof *ids);
        else text = (char *)resize(NULL, capacity);
    }
    if (n < 0) fprintf(stderr, "tokenize: %s\n", err.message);
    else if (o->ids) print_ids(ids, n);
    else print_string(text, (size_t)n);
    free(ids);
    free(text);
    return n < 0;
}

/* Renders a line. Its end is cut off. */
static int chat(const llm_tokenizer *tokenizer, const options *o, char *line, size_t n) {
    llm_chat_desc desc = {.open_answer = true};
    json_error_t err;
    json_t *json = json_loadb(line, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL | JSON_DECODE_INT_AS_REAL, &err);
    int object = json_is_object(json), failed = !json;
    if (failed) fprintf(stderr, "tokenize: a line is not a list or object in JSON: %s\n", err.text);
    json_decref(json);
    line = skip_blanks(line);
    if (object) failed = !find_members(line, &desc);
    else desc.messages_json = line;
    return failed || render(tokenizer, o, &desc);
}

/* ---- Standard input ---- */

/* Reads a line with its newline, or everything if `all`, and appends a NUL. Returns an stb_ds array, or NULL at the
   end. The text may contain any bytes, also 0. */
static char *read_input(int all) {
    char *text = NULL;
    int c;
    while ((c = getc(stdin)) != EOF) {
        arrput(text, (char)c);
        if (c == '\n' && !all) break;
    }
    if (text || all) arrput(text, 0);
    return text;
}

static int encode_json(const llm_tokenizer *tokenizer, const options *o, const char *line, size_t n) {
    json_error_t err;
    json_t *string = json_loadb(line, n, JSON_DECODE_ANY | JSON_ALLOW_NUL, &err);
    int failed = !json_is_string(string);
    if (failed) fprintf(stderr, "tokenize: a line is not a JSON string: %s\n", string ? line : err.text);
    else failed = encode(tokenizer, o, json_string_value(string), json_string_length(string));
    json_decref(string);
    return failed;
}

static int run(const llm_tokenizer *tokenizer, const options *o) {
    char *text;
    int failed = 0, all = !o->json && !o->decode && !o->chat;
    while (!failed && (text = read_input(all)) != NULL) {
        size_t n = arrlenu(text) - 1;
        if (o->chat) failed = chat(tokenizer, o, text, n);
        else if (o->decode) failed = decode(tokenizer, o, text);
        else failed = o->json ? encode_json(tokenizer, o, text, n) : encode(tokenizer, o, text, n);
        arrfree(text);
        if (all) break;
    }
    if (fflush(stdout)) failed = 1;
    return failed;
}

int main(int argc, char **argv) {
    static const struct argp_option list[] = {
        {"model", 'm', "FILE", 0, "the model, its directory, or a file with only its vocabulary", 0},
        {"decode", 'd', NULL, 0, "lines of ids in, text out", 0},
        {"json", OPTION_JSON, NULL, 0, "texts are JSON strings, one per line", 0},
        {"chat", OPTION_CHAT, NULL, 0, "render each line, a conversation in JSON, with the model's chat template", 0},
        {"ids", OPTION_IDS, NULL, 0, "with --chat: print ids", 0},
        {"bos", OPTION_BOS, NULL, 0, "add BOS and EOS as the model's file says", 0},
        {"special", OPTION_SPECIAL, NULL, 0, "recognise special tokens in the text, and show them with -d", 0},
        {0}};
    static const struct argp argp = {list, parse_option, NULL, "Text to token ids and back.", NULL, NULL, NULL};
    options o = {NULL, 0, 0, 0, 0, 0};
    llm_tokenizer *tokenizer = NULL;
    llm_error err;
    argp_parse(&argp, argc, argv, 0, NULL, &o);
    if (llm_tokenizer_load(&tokenizer, o.model, NULL, &err)) {
        fprintf(stderr, "tokenize: %s\n", err.message);
        return 1;
    }
    int failed = run(tokenizer, &o);
    llm_tokenizer_free(tokenizer);
    return failed;
}
