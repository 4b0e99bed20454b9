/*  server.c - answers many users at once through an API like OpenAI's.

    build/server -m MODEL            listens on 127.0.0.1:8080
    build/server --help              all options

    POST /v1/chat/completions, POST /v1/completions    with or without "stream"
    GET  /v1/models, GET /health, GET /metrics         the last for Prometheus

    There are two threads: libmicrohttpd's thread reads requests and sends answers, the main thread computes. One lock
    protects the data that they share. A request waits in a queue until one of the --parallel places is free. Then its
    stream takes part in every pass until the answer ends. A client that hangs up loses its place, also in the queue.
    After SIGTERM, accepted requests finish and new ones are refused; a second SIGTERM ends the program at once.

    A request to /v1/completions may have several prompts. Each has its own stream and place. Waiting requests take
    turns, one prompt at a time, so that a request with many prompts does not hold up the others. With "echo" and
    "logprobs", the answer has the prompt's tokens with their log-probabilities, for programs that evaluate models.

    A chat may have tools. A grammar ensures that calls can be parsed and that their arguments match the tools' schemas
    if tool_choice demands a call, if a tool is "strict", or if response_format is given. Without a grammar the model
    may make mistakes; text that cannot be parsed as calls is returned as text. A stream gets whole calls at the end of
    the answer.

    Beside OpenAI's options, these of llama.cpp's and vLLM's servers work: top_k, min_p, typical_p, top_n_sigma,
    repetition_penalty, repeat_penalty, repeat_last_n, ignore_eos, and chat_template_kwargs, whose members become
    variables of the chat template. Options of OpenAI's API that do not change the answer, such as "user", are ignored.
    All others are refused, and the error names them.
    Without --key, everyone who can reach the port can use the server. There is no encryption: to serve other machines,
    put a proxy in front of it.
*/
#define LLM_IMPLEMENTATION
#include "llm.h"

#include "examples/arrays.h"

#include <argp.h>
#include <arpa/inet.h>
#include <float.h>
#include <jansson.h>
#include <math.h>
#include <microhttpd.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---- Options ------------------------------------------------------------------------------------------------- */

typedef struct options {
    const char *model, *host, *key, *name;
    int port, parallel, n_ctx, n_cache, n_threads, queue, step, most_body, keep_free;
    llm_dtype dtype;
} options;

enum {
    KEY_HOST = 256,
    KEY_KEY,
    KEY_NAME,
    KEY_PARALLEL,
    KEY_CTX,
    KEY_CACHE,
    KEY_QUEUE,
    KEY_STEP,
    KEY_BODY,
    KEY_DTYPE,
    KEY_FREE
};

static const struct argp_option OPTIONS[] = {
    {"model", 'm', "FILE", 0, "the model", 0},
    {"name", KEY_NAME, "NAME", 0, "what /v1/models calls it (the file's name)", 0},
    {"dtype", KEY_DTYPE, "TYPE", 0, "type of the weights: f32, f16, bf16, int8, int4, file (file)", 0},
    {"threads", 't', "N", 0, "compute threads (one per physical core)", 0},
    {"host", KEY_HOST, "ADDRESS", 0, "address to listen on (127.0.0.1: only this machine)", 1},
    {"port", 'p', "N", 0, "port; 0: a free one, which is printed (8080)", 1},
    {"key", KEY_KEY, "KEY", 0, "clients must send 'Authorization: Bearer KEY'", 1},
    {"parallel", KEY_PARALLEL, "N", 0, "answers generated at the same time (8)", 2},
    {"queue", KEY_QUEUE, "N", 0, "requests that may wait; more get error 429 (64)", 2},
    {"max-body", KEY_BODY, "BYTES", 0, "max size of a request; larger ones get error 413 (1048576)", 2},
    {"ctx", KEY_CTX, "N", 0, "max tokens of a prompt and its answer (the model's limit, at most 4096)", 3},
    {"cache", KEY_CACHE, "N", 0,
     "max tokens of all prompts and answers together, and of kept prefixes (ctx * parallel)", 3},
    {"keep-free", KEY_FREE, "N", 0,
     "leave out the oldest turns of a chat so that N tokens of --ctx are free for the answer; 0: a chat that does not "
     "fit gets error 400, as from OpenAI's API (0)",
     3},
    {"step", KEY_STEP, "N", 0, "max tokens per pass: small values give smooth answers, large ones fast prompts (128)",
     3},
    {0}};

static int parse_number(struct argp_state *state, const char *text, int least, int most) {
    char *end;
    long value = strtol(text, &end, 10);
    if (end == text || *end || value < least || value > most)
        argp_error(state, "'%s' is not an integer from %d to %d", text, least, most);
    return (int)value;
}

static error_t parse_option(int key, char *arg, struct argp_state *state) {
    options *o = (options *)state->input;
    switch (key) {
    case 'm': o->model = arg; break;
    case KEY_NAME: o->name = arg; break;
    case KEY_HOST: o->host = arg; break;
    case KEY_KEY: o->key = arg; break;
    case 'p': o->port = parse_number(state, arg, 0, 65535); break;
    case 't': o->n_threads = parse_number(state, arg, 1, 1024); break;
    case KEY_PARALLEL: o->parallel = parse_number(state, arg, 1, 1024); break;
    case KEY_QUEUE: o->queue = parse_number(state, arg, 0, 100000); break;
    case KEY_BODY: o->most_body = parse_number(state, arg, 1, 1 << 28); break;
    case KEY_CTX: o->n_ctx = parse_number(state, arg, 1, 1 << 24); break;
    case KEY_CACHE: o->n_cache = parse_number(state, arg, 1, 1 << 28); break;
    case KEY_FREE: o->keep_free = parse_number(state, arg, 0, 1 << 24); break;
    case KEY_STEP: o->step = parse_number(state, arg, 1, 1 << 16); break;
    case KEY_DTYPE:
        o->dtype = llm_dtype_from_name(arg);
        if (!o->dtype) argp_error(state, "'%s' is not one of f32, f16, bf16, int8, int4, file", arg);
        break;
    case ARGP_KEY_END:
        if (!o->model) argp_error(state, "give a model with -m");
        if (!o->name) o->name = strrchr(o->model, '/') ? strrchr(o->model, '/') + 1 : o->model;
        break;
    default: return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

/* ---- Shared data ---------------------------------------------------------------------------------------------- */

enum { MOST_STOPS = 16, MOST_BIASES = 1024, MOST_PROMPTS = 1024, MOST_TOOLS = 128 };

/* One prompt of a request, and its answer. */
typedef struct prompt {
    struct prompt *next; /* in the list of running prompts */
    struct request *request;
    int index;           /* number of the prompt in the request */
    const json_t *given; /* as sent by the client */
    llm_token *ids; /* [n_ids]; NULL for a chat, which only has n_ids; with --keep-free the tokens that must stay */
    int n_ids;
    llm_sampler sampler;
    llm_stream *stream; /* used by the main thread only */
    char *text;         /* stb_ds array: the answer's text; if streaming, the part not sent yet */
    json_t *log_probs;  /* of the tokens since the last piece, see add_log_prob */
    json_t *choice;     /* the complete answer, if not streaming */
    bool said_role;     /* the first piece of a chat was sent */
    bool said_text;     /* some text was sent */
} prompt;

typedef struct request {
    struct request *next; /* in the queue */
    struct server *server;
    struct MHD_Connection *connection;
    char *body; /* stb_ds array */
    /* The request: */
    json_t *json;
    bool is_chat, streams, wants_usage, echoes, ignores_end;
    char *messages;     /* JSON */
    char *variables;    /* of the chat template; JSON, or NULL */
    char *tools;        /* JSON, or NULL */
    llm_tool_form form; /* how tools are called; LLM_TOOL_FORM_NONE: no tools */
    bool one_call;
    prompt *prompts; /* [n_prompts] */
    int n_prompts, max_tokens, n_stops;
    const char *stops[MOST_STOPS];
    int n_log_probs;     /* number of most likely tokens to report with each token; -1: no log-probabilities */
    llm_sampler sampler; /* each prompt has a copy */
    llm_logit_bias biases[MOST_BIASES];
    llm_grammar *grammar;
    /* The answer: */
    char id[48];
    int64_t created;
    int n_begun, n_ended;                /* prompts whose streams have begun; prompts whose answers are complete */
    int n_prompt, n_reused, n_generated; /* tokens of the complete answers */
    int code;                            /* HTTP status, if not streaming */
    char *out;                           /* stb_ds array; the first n_sent bytes are sent */
    size_t n_sent;
    bool accepted;  /* the request was passed to the main thread */
    bool finished;  /* nothing will be added to `out` */
    bool suspended; /* the connection waits for more output */
    bool closed;    /* the connection is closed */
} request;

typedef struct server {
    options opt;
    llm_model *model;
    llm_context *ctx;
    pthread_mutex_t lock;
    pthread_cond_t work;
    request *queue;
    prompt *running;
    int n_queued, n_running, n_live; /* n_live: accepted requests that are not both closed and finished */
    int n_signals;
    int64_t swept_at; /* when the queue was last searched for clients that have hung up, in tenths of a second */
    uint64_t n_ids, n_call_ids;
    /* Counters for /metrics: */
    uint64_t n_answers, n_refused, n_hung_up, n_failed, n_shortened, n_prompt, n_reused, n_generated;
} server;

/* With the lock held. Frees a request if both threads are done with it. */
static void let_go(request *r) {
    if (!r->closed || (r->accepted && !r->finished)) return;
    if (r->accepted && !--r->server->n_live) pthread_cond_signal(&r->server->work);
    for (int i = 0; i < r->n_prompts; i++) {
        json_decref(r->prompts[i].log_probs);
        json_decref(r->prompts[i].choice);
        free(r->prompts[i].ids);
        arrfree(r->prompts[i].text);
    }
    json_decref(r->json);
    llm_grammar_free(r->grammar);
    free(r->prompts);
    arrfree(r->body);
    free(r->messages);
    free(r->variables);
    free(r->tools);
    arrfree(r->out);
    free(r);
}

static void put(char **to, const char *text, size_t n) { memcpy(arraddnptr(*to, n), text, n); }

/* With the lock held. Resumes the connection. */
static void wake(request *r) {
    if (!r->suspended) return;
    r->suspended = false;
    MHD_resume_connection(r->connection);
}

/* With the lock held. Suspends the connection until the main thread has more output. */
static void suspend(request *r) {
    r->suspended = true;
    MHD_suspend_connection(r->connection);
}

/* Returns a value as text. 15 digits are what a double surely keeps of a decimal number. */
static char *write_json(const json_t *value) {
    char *text = value ? json_dumps(value, JSON_COMPACT | JSON_REAL_PRECISION(15)) : NULL;
    if (!text) out_of_memory();
    return text;
}

/* With the lock held. Adds a value to the output, as an event of a stream or as a complete answer, and frees it. */
static void put_json(request *r, json_t *value, bool event) {
    char *text = write_json(value);
    if (event) put(&r->out, "data: ", 6);
    put(&r->out, text, strlen(text));
    put(&r->out, event ? "\n\n" : "\n", event ? 2 : 1);
    free(text);
    json_decref(value);
}

static json_t *error_json(int code, const char *message) {
    const char *type = code == 401   ? "authentication_error"
                       : code == 429 ? "rate_limit_error"
                       : code < 500  ? "invalid_request_error"
                                     : "server_error";
    return json_pack("{s:{s:s, s:s, s:n, s:i}}", "error", "message", message, "type", type, "param", "code", code);
}

/* ---- Answers --------------------------------------------------------------------------------------------------- */

static const char *finish_reason(llm_stop stop) {
    return stop == LLM_STOP_LENGTH || stop == LLM_STOP_CONTEXT || stop == LLM_STOP_CACHE ? "length" : "stop";
}

static json_t *usage_json(const request *r) {
    return json_pack("{s:i, s:i, s:i, s:{s:i}}", "prompt_tokens", r->n_prompt, "completion_tokens", r->n_generated,
                     "total_tokens", r->n_prompt + r->n_generated, "prompt_tokens_details", "cached_tokens",
                     r->n_reused);
}

static json_t *answer_json(const request *r, const char *object, json_t *choices) {
    return json_pack("{s:s, s:s, s:I, s:s, s:o}", "id", r->id, "object", object, "created", (json_int_t)r->created,
                     "model", r->server->opt.name, "choices", choices);
}

/* Makes {"token", "logprob", "bytes"}. The name of a token with incomplete characters shows its bytes. */
static json_t *log_prob_json(const llm_tokenizer *tokenizer, llm_log_prob of) {
    static const char digits[] = "0123456789abcdef";
    size_t n = 0;
    const char *bytes = llm_token_bytes(tokenizer, of.token, &n);
    json_t *text = json_stringn(bytes, n), *list = json_array();
    char name[6 + 4 * 256] = "bytes:", *end = name + 6;
    for (size_t i = 0; i < n; i++) json_array_append_new(list, json_integer((unsigned char)bytes[i]));
    for (size_t i = 0; i < n && i < 256 && !text; i++, end += 4) {
        const char byte[4] = {'\\', 'x', digits[(unsigned char)bytes[i] / 16], digits[(unsigned char)bytes[i] % 16]};
        memcpy(end, byte, 4);
    }
    if (!text) text = json_stringn(name, (size_t)(end - name));
    double value = isfinite(of.log_prob) ? of.log_prob : -9999; /* OpenAI's value for impossible tokens */
    return json_pack("{s:o, s:f, s:o}", "token", text, "logprob", value, "bytes", list);
}

/* With the lock held. Keeps a token's log-probability for the next piece of the answer. */
static void add_log_prob(prompt *p, json_t *entry, json_t *top) {
    json_object_set_new(entry, "top_logprobs", top);
    if (!p->log_probs) p->log_probs = json_array();
    json_array_append_new(p->log_probs, entry);
}

static void on_log_probs(void *user, llm_log_prob chosen, const llm_log_prob *top, int n_top) {
    prompt *p = (prompt *)user;
    request *r = p->request;
    const llm_tokenizer *tokenizer = llm_model_tokenizer(r->server->model);
    json_t *entry = log_prob_json(tokenizer, chosen), *list = json_array();
    for (int i = 0; i < n_top; i++) json_array_append_new(list, log_prob_json(tokenizer, top[i]));
    pthread_mutex_lock(&r->server->lock);
    add_log_prob(p, entry, list);
    pthread_mutex_unlock(&r->server->lock);
}

/* With the lock held. Begins the answer with the prompt. Its first token has null instead of a log-probability, because
   nothing predicts it. */
static void put_echo(prompt *p) {
    const request *r = p->request;
    const llm_tokenizer *tokenizer = llm_model_tokenizer(r->server->model);
    llm_text_stream stream = {.flags = LLM_TOKENS_SPECIAL};
    if (json_is_string(p->given)) put(&p->text, json_string_value(p->given), json_string_length(p->given));
    for (int i = 0; i <= p->n_ids && !json_is_string(p->given); i++) {
        llm_token token = i < p->n_ids ? p->ids[i] : -1; /* -1: the end */
        size_t n = llm_stream_token(tokenizer, &stream, token, NULL, 0);
        llm_stream_token(tokenizer, &stream, token, arraddnptr(p->text, n + 1), n + 1);
        arrsetlen(p->text, arrlenu(p->text) - 1); /* without the NUL */
    }
    if (r->n_log_probs < 0) return;
    json_t *entry = log_prob_json(tokenizer, (llm_log_prob){p->ids[0], 0});
    json_object_set_new(entry, "logprob", json_null());
    add_log_prob(p, entry, json_null());
}

/* With the lock held. Returns the log-probabilities since the last piece, in the form of a chat or as lists for a plain
   text; null if none were requested. */
static json_t *take_log_probs(prompt *p) {
    const request *r = p->request;
    json_t *entries = p->log_probs ? p->log_probs : json_array(), *entry;
    size_t i, j;
    p->log_probs = NULL;
    if (r->n_log_probs >= 0 && r->is_chat) return json_pack("{s:o}", "content", entries);
    json_t *tokens = json_array(), *values = json_array(), *tops = json_array();
    json_array_foreach(entries, i, entry) {
        json_t *list = json_object_get(entry, "top_logprobs"), *one, *top = json_object();
        json_array_append(tokens, json_object_get(entry, "token"));
        json_array_append(values, json_object_get(entry, "logprob"));
        json_array_foreach(list, j, one) {
            json_object_set(top, json_string_value(json_object_get(one, "token")), json_object_get(one, "logprob"));
        }
        json_array_append_new(tops, json_is_null(list) ? json_null() : json_incref(top));
        json_decref(top);
    }
    json_decref(entries);
    json_t *lists = json_pack("{s:o, s:o, s:o}", "tokens", tokens, "token_logprobs", values, "top_logprobs", tops);
    if (r->n_log_probs >= 0) return lists;
    json_decref(lists);
    return json_null();
}

/* With the lock held. Sends a piece of a streamed answer with the next n bytes of its text. calls and reason may be
   NULL. */
static void put_piece(prompt *p, size_t n, json_t *calls, const char *reason) {
    request *r = p->request;
    json_t *choice =
        json_pack("{s:i, s:o, s:s?}", "index", p->index, "logprobs", take_log_probs(p), "finish_reason", reason);
    json_t *string = n ? json_stringn(p->text, n) : NULL;
    if (n) arrdeln(p->text, 0, n);
    p->said_text = p->said_text || n;
    if (r->is_chat) {
        json_t *delta = json_object();
        if (!p->said_role) json_object_set_new(delta, "role", json_string("assistant"));
        p->said_role = true;
        if (string) json_object_set_new(delta, "content", string);
        if (calls) json_object_set_new(delta, "tool_calls", calls);
        json_object_set_new(choice, "delta", delta);
    } else json_object_set_new(choice, "text", string ? string : json_string(""));
    put_json(r, answer_json(r, r->is_chat ? "chat.completion.chunk" : "text_completion", json_pack("[o]", choice)),
             true);
}

static bool is_blank(char c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; }

/* Returns the length without white space at the end. */
static size_t trim(const char *text, size_t n) {
    while (n && is_blank(text[n - 1])) n--;
    return n;
}

/* Returns the length of the text before the first tool call. An incomplete mark at the end counts as the beginning of a
   call. Without a mark, returns the length of the whole text. */
static size_t find_calls(const prompt *p) {
    static const char *const marks[] = {"<tool_call>", "<|python_tag|>", "[TOOL_CALLS]"};
    const char *text = p->text;
    size_t n = arrlenu(text), at = 0;
    while (at < n && is_blank(text[at])) at++;
    if (p->request->form == LLM_TOOL_FORM_LLAMA && !p->said_text && at < n && text[at] == '{') return at;
    for (; at < n; at++)
        for (int i = 0; i < 3; i++) {
            size_t length = strlen(marks[i]);
            if (!memcmp(text + at, marks[i], length < n - at ? length : n - at)) return at;
        }
    return n;
}

static bool on_text(void *user, const char *text, size_t n) {
    prompt *p = (prompt *)user;
    request *r = p->request;
    pthread_mutex_lock(&r->server->lock);
    put(&p->text, text, n);
    if (r->streams) {
        n = r->form ? trim(p->text, find_calls(p)) : arrlenu(p->text);
        if (n) put_piece(p, n, NULL, NULL);
        if (n) wake(r);
    }
    bool wanted = !r->closed;
    pthread_mutex_unlock(&r->server->lock);
    return wanted;
}

/* With the lock held. Ends the output of a request. */
static void finish(request *r, int code) {
    r->code = code;
    r->finished = true;
    wake(r);
    let_go(r);
}

/* With the lock held. Ends a request with an error, which is sent to the client. */
static void fail(request *r, int code, const char *message) {
    r->server->n_failed++;
    put_json(r, error_json(code, message), r->streams);
    finish(r, code);
}

/* With the lock held. Returns the calls in a complete answer; NULL if there are none or they cannot be parsed.
   *n_before is set to the length of the text before them. */
static json_t *read_calls(prompt *p, size_t *n_before) {
    request *r = p->request;
    server *s = r->server;
    llm_tool_calls *read = NULL;
    if (!r->form || find_calls(p) == arrlenu(p->text)) return NULL;
    if (llm_tool_calls_read(&read, p->text, arrlenu(p->text), NULL, NULL)) return NULL;
    json_t *calls = read->n_calls ? json_array() : NULL;
    for (int i = 0; i < read->n_calls && (!i || !r->one_call); i++) {
        const llm_tool_call *call = &read->calls[i];
        char id[10]; /* nine letters and digits, as Mistral's templates require */
        uint64_t number = (uint64_t)r->created << 20 | (s->n_call_ids++ & 0xFFFFF);
        for (int j = 0; j < 9; j++, number /= 36) id[j] = "0123456789abcdefghijklmnopqrstuvwxyz"[number % 36];
        id[9] = 0;
        json_t *one = json_pack("{s:s, s:s, s:{s:s, s:s}}", "id", call->id ? call->id : id, "type", "function",
                                "function", "name", call->name, "arguments", call->arguments);
        if (one && r->streams) json_object_set_new(one, "index", json_integer(i));
        if (json_array_append_new(calls, one)) { /* fails if the text is not UTF-8 */
            json_decref(calls);
            calls = NULL;
            break;
        }
    }
    if (calls) *n_before = trim(read->text, read->n_bytes);
    llm_tool_calls_free(read);
    return calls;
}

/* With the lock held. Called when the text of one prompt is complete. */
static void end_text(prompt *p, const llm_stats *stats) {
    request *r = p->request;
    size_t n = arrlenu(p->text);
    json_t *calls = read_calls(p, &n);
    const char *reason = calls ? "tool_calls" : finish_reason(stats->stop);
    r->n_ended++;
    r->server->n_shortened += stats->n_left_out > 0;
    r->n_prompt += stats->n_prompt;
    r->n_reused += stats->n_reused;
    r->n_generated += stats->n_generated;
    if (r->streams) {
        if (calls) put_piece(p, n, calls, NULL);
        put_piece(p, calls ? 0 : n, NULL, reason);
        wake(r);
        return;
    }
    json_t *text = calls && !n ? json_null() : json_stringn(p->text ? p->text : "", n);
    p->choice = json_pack("{s:i, s:o, s:s}", "index", p->index, "logprobs", take_log_probs(p), "finish_reason", reason);
    if (!r->is_chat) json_object_set_new(p->choice, "text", text);
    else
        json_object_set_new(p->choice, "message",
                            json_pack("{s:s, s:o, s:o*}", "role", "assistant", "content", text, "tool_calls", calls));
}

/* With the lock held. Called when all texts of a request are complete. */
static void complete(request *r) {
    server *s = r->server;
    s->n_answers++;
    s->n_prompt += (uint64_t)r->n_prompt;
    s->n_reused += (uint64_t)r->n_reused;
    s->n_generated += (uint64_t)r->n_generated;
    if (r->streams) {
        json_t *last = r->wants_usage
                           ? answer_json(r, r->is_chat ? "chat.completion.chunk" : "text_completion", json_array())
                           : NULL;
        if (last) json_object_set_new(last, "usage", usage_json(r));
        if (last) put_json(r, last, true);
        put(&r->out, "data: [DONE]\n\n", 14);
    } else {
        json_t *choices = json_array();
        for (int i = 0; i < r->n_prompts; i++) json_array_append(choices, r->prompts[i].choice);
        json_t *whole = answer_json(r, r->is_chat ? "chat.completion" : "text_completion", choices);
        json_object_set_new(whole, "usage", usage_json(r));
        put_json(r, whole, false);
    }
    finish(r, 200);
}

/* ---- The main thread ------------------------------------------------------------------------------------------- */

static llm_chat_desc chat_of(const request *r) {
    return (llm_chat_desc){
        .messages_json = r->messages, .tools_json = r->tools, .variables_json = r->variables, .open_answer = true};
}

static llm_status begin(prompt *p, llm_error *err) {
    request *r = p->request;
    llm_chat_desc chat = chat_of(r);
    bool tells = r->n_log_probs >= 0;
    llm_generate_desc desc = {.chat = r->is_chat ? &chat : NULL,
                              .tokens = p->ids,
                              .n_tokens = p->n_ids,
                              .keep_free = r->is_chat ? r->server->opt.keep_free : 0,
                              .seq = LLM_SEQ_ANY,
                              .max_tokens = r->max_tokens,
                              .prompt_only = !r->is_chat && !r->max_tokens,
                              .sampler = &p->sampler,
                              .stop_strings = r->stops,
                              .n_stop_strings = r->n_stops,
                              .ignore_end = r->ignores_end,
                              .grammar = r->grammar,
                              .on_text = on_text,
                              .text_has_marks = r->form != LLM_TOOL_FORM_NONE,
                              .on_log_probs = tells ? on_log_probs : NULL,
                              .n_top_log_probs = tells ? r->n_log_probs : 0,
                              .log_probs_from = tells && r->echoes,
                              .log_probs_of_end = !r->is_chat,
                              .user = p};
    return llm_stream_begin(&p->stream, r->server->ctx, &desc, err);
}

/* With the lock held. While a connection is suspended, libmicrohttpd does not notice that the client hangs up, so this
   function checks the socket. */
static bool has_hung_up(const request *r) {
    if (r->closed || !r->suspended) return r->closed;
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(r->connection, MHD_CONNECTION_INFO_CONNECTION_FD);
    struct pollfd at = {.fd = info ? info->connect_fd : -1, .events = POLLRDHUP};
    return at.fd >= 0 && poll(&at, 1, 0) > 0 && (at.revents & (POLLRDHUP | POLLHUP | POLLERR));
}

/* With the lock held. Frees the streams of a request and removes it from the queue. */
static void drop(server *s, const request *r) {
    for (prompt **at = &s->running; *at;) {
        prompt *p = *at;
        if (p->request == r) {
            *at = p->next;
            llm_stream_free(p->stream);
            s->n_running--;
        } else at = &p->next;
    }
    for (request **at = &s->queue; *at; at = &(*at)->next)
        if (*at == r) {
            *at = r->next;
            s->n_queued--;
            return;
        }
}

/* With the lock held. Ends a request whose client has hung up. */
static void hang_up(server *s, request *r) {
    drop(s, r);
    s->n_hung_up++;
    finish(r, 499);
}

/* With the lock held. Adds a request at the end of the queue. */
static void put_in_queue(server *s, request *r) {
    request **last = &s->queue;
    while (*last) last = &(*last)->next;
    *last = r;
    r->next = NULL;
    s->n_queued++;
}

/* With the lock held. Removes requests from the queue whose clients have hung up. It asks the system for each, so it
   does this only ten times a second. */
static void sweep_queue(server *s) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    int64_t tenth = 10 * (int64_t)now.tv_sec + now.tv_nsec / 100000000;
    if (tenth == s->swept_at) return;
    s->swept_at = tenth;
    for (request **at = &s->queue, *r; (r = *at);) {
        if (has_hung_up(r)) hang_up(s, r); /* *at becomes the next one */
        else at = &r->next;
    }
}

/* With the lock held. Gives free places to waiting prompts: one of the first request, which then goes to the end of the
   queue if it has more. */
static void take_from_queue(server *s) {
    sweep_queue(s);
    while (s->queue && s->n_running < s->opt.parallel) {
        request *r = s->queue;
        prompt *p = &r->prompts[r->n_begun];
        llm_error err;
        llm_status status = begin(p, &err);
        if (status == LLM_ERROR_CONTEXT_FULL && s->n_running) return; /* try again when an answer ends */
        if (status) {
            drop(s, r);
            fail(r, status == LLM_ERROR_MEMORY ? 500 : 400, err.message);
            continue;
        }
        if (r->echoes) put_echo(p);
        p->next = s->running;
        s->running = p;
        s->n_running++;
        s->queue = r->next;
        s->n_queued--;
        if (++r->n_begun < r->n_prompts) put_in_queue(s, r);
    }
}

/* With the lock held. Handles streams that have ended and clients that have hung up. */
static void settle(server *s) {
    for (prompt **at = &s->running, *p; (p = *at);) {
        request *r = p->request;
        llm_stats stats;
        llm_error err;
        bool ended = !llm_stream_is_running(p->stream), gone = has_hung_up(r);
        if (!ended && !gone) {
            at = &p->next;
            continue;
        }
        llm_status status = llm_stream_result(p->stream, &stats, &err);
        if (gone || status) {
            if (gone) {
                hang_up(s, r);
            } else {
                drop(s, r);
                fail(r, 500, err.message);
            }
            at = &s->running; /* other prompts of the request were removed, too */
            continue;
        }
        *at = p->next;
        llm_stream_free(p->stream);
        s->n_running--;
        end_text(p, &stats);
        if (r->n_ended == r->n_prompts) complete(r);
    }
}

static void work(server *s) {
    pthread_mutex_lock(&s->lock);
    while (!s->n_signals || s->n_live) {
        take_from_queue(s);
        if (!s->running) {
            pthread_cond_wait(&s->work, &s->lock);
            continue;
        }
        pthread_mutex_unlock(&s->lock);
        llm_step(s->ctx, s->opt.step, NULL, NULL); /* errors are in the streams' results */
        pthread_mutex_lock(&s->lock);
        settle(s);
    }
    pthread_mutex_unlock(&s->lock);
}

/* ---- Reading a request ----------------------------------------------------------------------------------------- */

/* These functions return NULL, or an error message. */

static const char *read_number(const json_t *json, const char *name, double least, double most, double *value) {
    static __thread char why[120];
    const json_t *given = json_object_get(json, name);
    if (!given || json_is_null(given)) return NULL;
    *value = json_number_value(given);
    if (json_is_number(given) && *value >= least && *value <= most) return NULL;
    snprintf(why, sizeof why, "%s must be a number from %g to %g", name, least, most);
    return why;
}

static const char *read_bool(const json_t *json, const char *name, bool *value) {
    static __thread char why[60];
    const json_t *given = json_object_get(json, name);
    if (!given || json_is_null(given)) return NULL;
    *value = json_is_true(given);
    if (json_is_boolean(given)) return NULL;
    snprintf(why, sizeof why, "%s must be true or false", name);
    return why;
}

/* Joins content that comes in parts to one text. */
static const char *join_parts(json_t *message) {
    json_t *content = json_object_get(message, "content"), *part;
    size_t i, n = 0;
    if (!json_is_array(content)) return NULL;
    json_array_foreach(content, i, part) {
        const char *type = json_string_value(json_object_get(part, "type"));
        if (!type || strcmp(type, "text") || !json_is_string(json_object_get(part, "text")))
            return "content may only have parts of type text";
        n += json_string_length(json_object_get(part, "text"));
    }
    char *text = (char *)resize(NULL, n + 1), *at = text;
    json_array_foreach(content, i, part) {
        const json_t *piece = json_object_get(part, "text");
        memcpy(at, json_string_value(piece), json_string_length(piece));
        at += json_string_length(piece);
    }
    json_object_set_new(message, "content", json_stringn(text, n));
    free(text);
    return NULL;
}

static prompt *add_prompts(request *r, size_t n) {
    r->prompts = (prompt *)resize(NULL, n * sizeof *r->prompts);
    r->n_prompts = (int)n;
    memset(r->prompts, 0, n * sizeof *r->prompts);
    return r->prompts;
}

/* Reads a call in an earlier answer. Templates expect its arguments as an object. */
static const char *read_earlier_call(json_t *call) {
    json_t *function = json_object_get(call, "function"), *arguments = json_object_get(function, "arguments");
    const char *type = json_string_value(json_object_get(call, "type"));
    json_error_t where;
    if (!json_is_string(json_object_get(call, "id"))) return "each entry of tool_calls needs an id";
    if (!type || strcmp(type, "function")) return "each entry of tool_calls must have the type function";
    if (!json_is_string(json_object_get(function, "name")))
        return "each entry of tool_calls needs a function with a name";
    if (!json_is_string(arguments)) return "the arguments of tool_calls must be text";
    json_t *object =
        json_loadb(json_string_value(arguments), json_string_length(arguments), JSON_REJECT_DUPLICATES, &where);
    if (!json_is_object(object)) {
        json_decref(object);
        return "the arguments of tool_calls must be a JSON object";
    }
    json_object_set_new(function, "arguments", object);
    return NULL;
}

/* Reads one message. `ids` holds the ids of earlier calls. */
static const char *read_message(json_t *message, json_t *ids) {
    const char *role = json_string_value(json_object_get(message, "role"));
    json_t *calls = json_object_get(message, "tool_calls"), *call;
    size_t i;
    if (!role) return "each message needs a role";
    if (!strcmp(role, "tool")) {
        const char *id = json_string_value(json_object_get(message, "tool_call_id"));
        if (!id || !json_object_get(ids, id))
            return "the tool_call_id of a tool's message does not match an earlier call";
        if (json_is_null(json_object_get(message, "content")) || !json_object_get(message, "content"))
            return "a tool's message needs content";
    }
    if (calls && !json_is_null(calls) && (!json_is_array(calls) || strcmp(role, "assistant")))
        return "tool_calls must be a list, in an assistant's message";
    json_array_foreach(calls, i, call) {
        const char *why = read_earlier_call(call);
        if (why) return why;
        json_object_set_new(ids, json_string_value(json_object_get(call, "id")), json_true());
    }
    return join_parts(message);
}

/* Max tokens of a prompt. */
static int most_tokens(const request *r) {
    return llm_context_n_ctx(r->server->ctx) - (r->is_chat ? r->server->opt.keep_free : 0);
}

static bool has_role(const json_t *messages, size_t i, const char *role) {
    return !strcmp(json_string_value(json_object_get(json_array_get(messages, i), "role")), role);
}

/* Returns the tokens of what --keep-free never leaves out, or -1: the system messages at the beginning and the last
   turn. */
static int64_t count_kept(const request *r, const json_t *messages, llm_error *err) {
    size_t n = json_array_size(messages), i = 0;
    json_t *kept = json_array();
    for (; i < n && has_role(messages, i, "system"); i++) json_array_append(kept, json_array_get(messages, i));
    size_t last = i;
    for (; i < n; i++)
        if (has_role(messages, i, "user")) last = i;
    for (i = last; i < n; i++) json_array_append(kept, json_array_get(messages, i));
    llm_chat_desc desc = chat_of(r);
    char *text = write_json(kept);
    desc.messages_json = text;
    int64_t n_tokens = llm_chat_encode(llm_model_tokenizer(r->server->model), &desc, NULL, 0, err);
    free(text);
    json_decref(kept);
    return n_tokens;
}

static const char *read_messages(request *r, llm_error *err) {
    json_t *messages = json_object_get(r->json, "messages"), *message, *ids = json_object();
    size_t i;
    const char *why = json_array_size(messages) ? NULL : "messages must be a list with at least one message";
    json_array_foreach(messages, i, message) {
        if (!why) why = read_message(message, ids);
    }
    json_decref(ids);
    if (why) return why;
    r->messages = write_json(messages);
    llm_chat_desc desc = chat_of(r);
    int64_t n = llm_chat_encode(llm_model_tokenizer(r->server->model), &desc, NULL, 0, err);
    if (n > most_tokens(r) && r->server->opt.keep_free) n = count_kept(r, messages, err);
    add_prompts(r, 1)->n_ids = n > INT32_MAX ? INT32_MAX : (int)n;
    return n < 0 ? err->message : NULL;
}

/* A text, or a list of token ids. */
static const char *read_one_prompt(const request *r, const json_t *given, prompt *p, llm_error *err) {
    const llm_tokenizer *tokenizer = llm_model_tokenizer(r->server->model);
    p->given = given;
    size_t n_bytes = json_string_length(given), n = json_is_string(given) ? 4 * n_bytes + 8 : json_array_size(given);
    if (!json_is_string(given) && !json_is_array(given))
        return "prompt must be a text, a list of token ids, or a list of texts or of such lists";
    if (!n) return "a prompt has no tokens";
    p->ids = (llm_token *)resize(NULL, n * sizeof *p->ids);
    if (json_is_string(given)) {
        int64_t n_ids = llm_encode(tokenizer, json_string_value(given), n_bytes, LLM_TOKENS_ENDS | LLM_TOKENS_SPECIAL,
                                   p->ids, n, err);
        p->n_ids = (int)n_ids;
        if (n_ids > 0) p->ids = (llm_token *)resize(p->ids, (size_t)n_ids * sizeof *p->ids);
        return n_ids < 0 ? err->message : n_ids ? NULL : "a prompt has no tokens";
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_array_get(given, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= llm_tokenizer_n_vocab(tokenizer))
            return "prompt contains an element that is not a token id";
        p->ids[i] = (llm_token)json_integer_value(id);
    }
    p->n_ids = (int)n;
    return NULL;
}

static const char *read_prompts(request *r, llm_error *err) {
    const json_t *given = json_object_get(r->json, "prompt"), *first = json_array_get(given, 0);
    bool several = json_is_string(first) || json_is_array(first);
    size_t n = several ? json_array_size(given) : 1;
    if (n > MOST_PROMPTS) return "prompt has more than 1024 prompts";
    if (n > 1 && r->grammar) return "response_format allows only one prompt";
    add_prompts(r, n);
    for (size_t i = 0; i < n; i++) {
        const char *why = read_one_prompt(r, several ? json_array_get(given, i) : given, &r->prompts[i], err);
        if (why) return why;
    }
    return NULL;
}

static const char *read_stops(request *r) {
    const json_t *stop = json_object_get(r->json, "stop");
    size_t n = json_array_size(stop);
    if (json_is_string(stop)) r->stops[r->n_stops++] = json_string_value(stop);
    else if (stop && !json_is_null(stop) && !json_is_array(stop)) return "stop must be a text or a list of texts";
    if (n > MOST_STOPS) return "stop has more than 16 texts";
    for (size_t i = 0; i < n; i++) {
        r->stops[r->n_stops] = json_string_value(json_array_get(stop, i));
        if (!r->stops[r->n_stops++]) return "stop must be a text or a list of texts";
    }
    return NULL;
}

static const char *read_biases(request *r) {
    json_t *biases = json_object_get(r->json, "logit_bias"), *bias;
    const char *key;
    if (json_object_size(biases) > MOST_BIASES) return "logit_bias has more than 1024 tokens";
    if (biases && !json_is_null(biases) && !json_is_object(biases)) return "logit_bias must be an object";
    json_object_foreach(biases, key, bias) {
        char *end;
        long token = strtol(key, &end, 10);
        if (!*key || *end || token < 0 || token >= llm_tokenizer_n_vocab(llm_model_tokenizer(r->server->model)))
            return "a key of logit_bias is not a token id";
        if (!json_is_number(bias)) return "the values of logit_bias must be numbers";
        r->biases[r->sampler.n_biases].token = (llm_token)token;
        r->biases[r->sampler.n_biases++].bias = (float)json_number_value(bias);
    }
    r->sampler.biases = r->biases;
    return NULL;
}

/* A chat has {"logprobs": true, "top_logprobs": 5}, a plain text {"logprobs": 5}. */
static const char *read_log_probs(request *r) {
    const json_t *given = json_object_get(r->json, "logprobs");
    double n_top = 0;
    r->n_log_probs = -1;
    const char *why = read_number(r->json, r->is_chat ? "top_logprobs" : "logprobs", 0, LLM_LOG_PROBS_MAX, &n_top);
    if (r->is_chat && given && !json_is_boolean(given) && !json_is_null(given)) why = "logprobs must be true or false";
    bool wanted = r->is_chat ? json_is_true(given) : given && !json_is_null(given);
    if (!wanted && n_top > 0) why = "top_logprobs needs logprobs";
    if (wanted) r->n_log_probs = (int)n_top;
    return why;
}

/* Reads {"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {...}}}. *schema
   is set to the schema as text, which the caller frees, or to NULL. */
static const char *read_format(const request *r, char **schema) {
    const json_t *format = json_object_get(r->json, "response_format"),
                 *given = json_object_get(json_object_get(format, "json_schema"), "schema");
    const char *type = json_string_value(json_object_get(format, "type"));
    if (!format || json_is_null(format) || (type && !strcmp(type, "text"))) return NULL;
    bool any = type && !strcmp(type, "json_object");
    if (!any && (!type || strcmp(type, "json_schema")))
        return "the type of response_format must be text, json_object or json_schema";
    if (!any && !json_is_object(given)) return "response_format has no schema in json_schema";
    json_t *object = any ? json_pack("{s:s}", "type", "object") : NULL;
    *schema = write_json(any ? object : given);
    json_decref(object);
    return NULL;
}

/* {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}} */
static const char *check_tool(const json_t *tool, json_t *names, bool *strict) {
    const json_t *function = json_object_get(tool, "function"), *name = json_object_get(function, "name"),
                 *parameters = json_object_get(function, "parameters"),
                 *description = json_object_get(function, "description"), *exact = json_object_get(function, "strict");
    static const char chars[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-";
    const char *type = json_string_value(json_object_get(tool, "type")), *text = json_string_value(name);
    if (!type || strcmp(type, "function")) return "each tool must have the type function";
    if (!text || !*text || strlen(text) > 64 || json_string_length(name) != strspn(text, chars))
        return "each tool needs a function with a name of up to 64 letters, digits, _ and -";
    if (json_object_get(names, text)) return "two tools have the same name";
    if (description && !json_is_null(description) && !json_is_string(description))
        return "the description of a tool must be text";
    if (parameters && !json_is_null(parameters) && !json_is_object(parameters))
        return "the parameters of a tool must be a JSON schema";
    if (exact && !json_is_null(exact) && !json_is_boolean(exact)) return "strict must be true or false";
    *strict = *strict || json_is_true(exact);
    json_object_set_new(names, text, json_true());
    return NULL;
}

/* Reads the tools, and whether the model may or must call them. `schema` is the schema of an answer without calls, or
   NULL. */
static const char *read_tools(request *r, const char *schema, llm_error *err) {
    const llm_tokenizer *tokenizer = llm_model_tokenizer(r->server->model);
    const json_t *tools = json_object_get(r->json, "tools"), *choice = json_object_get(r->json, "tool_choice"),
                 *parallel = json_object_get(r->json, "parallel_tool_calls"), *tool;
    const char *word = json_string_value(choice), *type = json_string_value(json_object_get(choice, "type")),
               *name = json_string_value(json_object_get(json_object_get(choice, "function"), "name")), *why = NULL;
    bool required = word && !strcmp(word, "required"), none = word && !strcmp(word, "none");
    bool strict = false, is_free = !choice || json_is_null(choice) || (word && !strcmp(word, "auto"));
    size_t i;
    if (tools && !json_is_null(tools) && !json_is_array(tools)) return "tools must be a list";
    if (json_array_size(tools) > MOST_TOOLS) return "tools has more than 128 tools";
    if (parallel && !json_is_null(parallel) && !json_is_boolean(parallel))
        return "parallel_tool_calls must be true or false";
    if (!is_free && !none && !required && !(type && !strcmp(type, "function") && name))
        return "tool_choice must be none, auto, required, or a function with its name";
    json_t *names = json_object();
    json_array_foreach(tools, i, tool) {
        if (!why) why = check_tool(tool, names, &strict);
    }
    if (!why && name && !json_object_get(names, name)) why = "tool_choice names a function that is not in tools";
    json_decref(names);
    if (why) return why;
    if (!json_array_size(tools)) return required ? "tool_choice needs tools" : NULL;
    if (none) return NULL; /* the prompt does not mention the tools */
    r->form = llm_tool_form_of(tokenizer);
    if (!r->form) return "the model's chat template takes no tools, or its form of calls is unknown";
    r->tools = write_json(tools);
    r->one_call = json_is_false(parallel);
    if (is_free && !schema && !strict) return NULL;
    llm_tools_desc desc = {.form = r->form,
                           .tools_json = r->tools,
                           .name = name,
                           .one = r->one_call,
                           .text = is_free && !schema,
                           .answer_schema = is_free ? schema : NULL};
    return llm_grammar_from_tools(&r->grammar, tokenizer, &desc, NULL, err) ? err->message : NULL;
}

/* Reads the required form of the answer: response_format and tools. */
static const char *read_form(request *r, llm_error *err) {
    char *schema = NULL;
    const char *why = read_format(r, &schema);
    if (!why && r->is_chat) why = read_tools(r, schema, err);
    if (!why && schema && !r->grammar &&
        llm_grammar_from_json_schema(&r->grammar, llm_model_tokenizer(r->server->model), schema, NULL, err))
        why = err->message;
    free(schema);
    return why;
}

/* The options of both kinds of requests, of chats, and of texts; those that never change an answer; and values with
   which other options change nothing. */
static const char *const COMMON_OPTIONS[] = {"frequency_penalty",
                                             "ignore_eos",
                                             "logit_bias",
                                             "logprobs",
                                             "max_completion_tokens",
                                             "max_tokens",
                                             "min_p",
                                             "presence_penalty",
                                             "repeat_last_n",
                                             "repeat_penalty",
                                             "repetition_penalty",
                                             "response_format",
                                             "seed",
                                             "stop",
                                             "stream",
                                             "stream_options",
                                             "temperature",
                                             "top_k",
                                             "top_n_sigma",
                                             "top_p",
                                             "typical_p",
                                             NULL};
static const char *const CHAT_OPTIONS[] = {
    "chat_template_kwargs", "messages", "parallel_tool_calls", "tool_choice", "tools", "top_logprobs", NULL};
static const char *const TEXT_OPTIONS[] = {"echo", "prompt", NULL};
static const char *const HARMLESS_OPTIONS[] = {"cache_prompt",
                                               "metadata",
                                               "model",
                                               "prediction",
                                               "prompt_cache_key",
                                               "prompt_cache_retention",
                                               "request_id",
                                               "safety_identifier",
                                               "service_tier",
                                               "store",
                                               "user",
                                               NULL};
static const struct {
    const char *name, *values; /* values: a JSON list */
} HARMLESS_VALUES[] = {{"add_generation_prompt", "[true]"},
                       {"best_of", "[1]"},
                       {"continue_final_message", "[false]"},
                       {"dry_multiplier", "[0]"},
                       {"echo", "[false]"},
                       {"function_call", "[\"auto\", \"none\"]"},
                       {"functions", "[[]]"},
                       {"include_stop_str_in_output", "[false]"},
                       {"length_penalty", "[1]"},
                       {"min_tokens", "[0]"},
                       {"mirostat", "[0]"},
                       {"modalities", "[[\"text\"]]"},
                       {"n", "[1]"},
                       {"n_probs", "[0]"},
                       {"parallel_tool_calls", "[true, false]"},
                       {"return_progress", "[false]"},
                       {"skip_special_tokens", "[true]"},
                       {"spaces_between_special_tokens", "[true]"},
                       {"stop_token_ids", "[[]]"},
                       {"suffix", "[\"\"]"},
                       {"timings_per_token", "[false]"},
                       {"tool_choice", "[\"auto\", \"none\"]"},
                       {"tools", "[[]]"},
                       {"use_beam_search", "[false]"},
                       {"xtc_probability", "[0]"}};

static bool is_one_of(const char *name, const char *const *names) {
    while (*names && strcmp(name, *names)) names++;
    return *names;
}

/* The values with which an option that is not supported changes nothing; NULL if there are none. */
static const char *harmless_values(const char *name) {
    for (size_t i = 0; i < sizeof HARMLESS_VALUES / sizeof *HARMLESS_VALUES; i++)
        if (!strcmp(name, HARMLESS_VALUES[i].name)) return HARMLESS_VALUES[i].values;
    return NULL;
}

/* True if a JSON list has this value. The number 1.0 equals 1. */
static bool has_value(const char *text, const json_t *value) {
    json_t *list = json_loads(text, 0, NULL), *one;
    bool found = false;
    size_t i;
    if (!list) out_of_memory();
    json_array_foreach(list, i, one) {
        bool numbers = json_is_number(one) && json_is_number(value);
        found = found || (numbers ? json_number_value(one) == json_number_value(value) : json_equal(one, value));
    }
    json_decref(list);
    return found;
}

/* Refuses options that are not supported, unless their value changes nothing. */
static const char *refuse_others(const request *r) {
    static __thread char why[120];
    json_t *value;
    const char *name;
    json_object_foreach(r->json, name, value) {
        if (is_one_of(name, COMMON_OPTIONS) || is_one_of(name, r->is_chat ? CHAT_OPTIONS : TEXT_OPTIONS) ||
            is_one_of(name, HARMLESS_OPTIONS) || json_is_null(value))
            continue;
        const char *values = harmless_values(name);
        if (values && has_value(values, value)) continue;
        int n = (int)strlen(name);
        if (n > 60) /* cut between two characters */
            for (n = 60; (name[n] & 0xC0) == 0x80;) n--;
        snprintf(why, sizeof why, "%.*s is not supported%s", n, name, values ? " with this value" : "");
        return why;
    }
    return NULL;
}

/* Reads the sampler's settings except the seed and the biases. */
static const char *read_sampler(request *r) {
    double temperature = 1, top_p = 1, top_k = 0, min_p = 0, typical_p = 1, sigma = 0, presence = 0, frequency = 0;
    double repetition = 1, repeat = 1, last = 64;
    const char *why = read_number(r->json, "temperature", 0, 100, &temperature);
    if (!why) why = read_number(r->json, "top_p", 0, 1, &top_p);
    if (!why) why = read_number(r->json, "top_k", -1, 1e6, &top_k);
    if (!why) why = read_number(r->json, "min_p", 0, 1, &min_p);
    if (!why) why = read_number(r->json, "typical_p", 0, 1, &typical_p);
    if (!why) why = read_number(r->json, "top_n_sigma", -1, 1e6, &sigma);
    if (!why) why = read_number(r->json, "presence_penalty", -2, 2, &presence);
    if (!why) why = read_number(r->json, "frequency_penalty", -2, 2, &frequency);
    if (!why) why = read_number(r->json, "repetition_penalty", 0.01, 100, &repetition);
    if (!why) why = read_number(r->json, "repeat_penalty", 0.01, 100, &repeat);
    if (!why) why = read_number(r->json, "repeat_last_n", -1, 1 << 24, &last);
    if (!why && repetition != 1 && repeat != 1) why = "repetition_penalty and repeat_penalty cannot be combined";
    if (why) return why;
    r->sampler.temperature = (float)temperature;
    r->sampler.top_p = top_p > 0 ? (float)top_p : FLT_MIN; /* only the best; 0 would mean all */
    r->sampler.top_k = top_k > 0 ? (int)top_k : 0;
    r->sampler.min_p = (float)min_p;
    r->sampler.typical_p = typical_p > 0 ? (float)typical_p : FLT_MIN;
    r->sampler.top_n_sigma = sigma > 0 ? (float)sigma : 0;
    r->sampler.presence_penalty = (float)presence;
    r->sampler.frequency_penalty = (float)frequency;
    /* vLLM's penalty looks at the whole text, llama.cpp's at repeat_last_n tokens; there 0 means none and -1 all. */
    bool whole = repetition != 1 || last < 0;
    r->sampler.repeat_penalty = (float)(repetition != 1 ? repetition : last ? repeat : 1);
    r->sampler.repeat_window = whole ? llm_context_n_ctx(r->server->ctx) : (int)last;
    return NULL;
}

/* Reads variables of the chat template, like {"enable_thinking": false}. */
static const char *read_variables(request *r) {
    const json_t *given = json_object_get(r->json, "chat_template_kwargs");
    if (!given || json_is_null(given)) return NULL;
    if (!json_is_object(given)) return "chat_template_kwargs must be an object";
    r->variables = write_json(given);
    return NULL;
}

static const char *read_request(request *r, llm_error *err) {
    json_error_t where;
    double most = -1, seed = -1;
    struct timespec now;
    r->json = json_loadb(r->body ? r->body : "", arrlenu(r->body), JSON_REJECT_DUPLICATES, &where);
    if (!json_is_object(r->json)) return "the body is not a JSON object";
    clock_gettime(CLOCK_REALTIME, &now);
    const json_t *stream = json_object_get(r->json, "stream_options");
    const char *why = refuse_others(r);
    if (!why) why = read_sampler(r);
    if (!why) why = read_number(r->json, "seed", -9e15, 9e15, &seed);
    if (!why) why = read_number(r->json, "max_tokens", r->is_chat ? 1 : 0, 1e9, &most);
    if (!why) why = read_number(r->json, "max_completion_tokens", 1, 1e9, &most);
    if (!why) why = read_bool(r->json, "stream", &r->streams);
    if (!why) why = read_bool(r->json, "echo", &r->echoes);
    if (!why) why = read_bool(r->json, "ignore_eos", &r->ignores_end);
    if (!why && stream && !json_is_null(stream) && !json_is_object(stream)) why = "stream_options must be an object";
    if (!why) why = read_bool(stream, "include_usage", &r->wants_usage);
    if (!why) why = read_stops(r);
    if (!why) why = read_biases(r);
    if (!why) why = read_log_probs(r);
    if (!why) why = read_form(r, err);
    if (!why) why = read_variables(r);
    if (!why) why = r->is_chat ? read_messages(r, err) : read_prompts(r, err);
    if (why) return why;
    bool seeded = json_is_number(json_object_get(r->json, "seed"));
    r->sampler.seed = seeded ? (uint64_t)(int64_t)seed : (uint64_t)now.tv_sec * 1000000007u + (uint64_t)now.tv_nsec;
    r->max_tokens = most < 0 ? r->is_chat ? 0 : 16 : (int)most;
    r->created = now.tv_sec;
    for (int i = 0; i < r->n_prompts; i++) {
        prompt *p = &r->prompts[i];
        p->request = r;
        p->index = i;
        p->sampler = r->sampler;
        if (!seeded) p->sampler.seed += (uint64_t)i;
        if (p->n_ids <= most_tokens(r)) continue;
        snprintf(err->message, sizeof err->message, "the prompt has %d tokens; the limit is %d", p->n_ids,
                 most_tokens(r));
        return err->message;
    }
    return NULL;
}

/* ---- HTTP ------------------------------------------------------------------------------------------------------ */

static enum MHD_Result send_text(struct MHD_Connection *c, int code, const char *type, const char *text, size_t n) {
    struct MHD_Response *response = MHD_create_response_from_buffer(n, (void *)(uintptr_t)text, MHD_RESPMEM_MUST_COPY);
    if (!response) return MHD_NO;
    MHD_add_response_header(response, "Content-Type", type);
    if (code == 429) MHD_add_response_header(response, "Retry-After", "1");
    if (code == 401) MHD_add_response_header(response, "WWW-Authenticate", "Bearer");
    enum MHD_Result queued = MHD_queue_response(c, (unsigned)code, response);
    MHD_destroy_response(response);
    return queued;
}

static enum MHD_Result send_json(struct MHD_Connection *c, int code, json_t *value) {
    char *text = value ? json_dumps(value, JSON_COMPACT) : NULL;
    json_decref(value);
    if (!text) return MHD_NO;
    enum MHD_Result queued = send_text(c, code, "application/json", text, strlen(text));
    free(text);
    return queued;
}

static enum MHD_Result send_error(request *r, int code, const char *message) {
    pthread_mutex_lock(&r->server->lock);
    r->server->n_refused++;
    pthread_mutex_unlock(&r->server->lock);
    return send_json(r->connection, code, error_json(code, message));
}

static enum MHD_Result send_metrics(server *s, struct MHD_Connection *c) {
    char text[2000];
    pthread_mutex_lock(&s->lock);
    const struct {
        const char *name, *type, *help;
        uint64_t value;
    } all[] = {
        {"requests_answered_total", "counter", "requests that were answered", s->n_answers},
        {"requests_refused_total", "counter", "requests that were invalid or too many", s->n_refused},
        {"requests_failed_total", "counter", "requests that failed after they were accepted", s->n_failed},
        {"requests_hung_up_total", "counter", "clients that hung up before the end", s->n_hung_up},
        {"chats_shortened_total", "counter", "chats whose oldest turns were left out", s->n_shortened},
        {"requests_running", "gauge", "answers being generated", (uint64_t)s->n_running},
        {"requests_waiting", "gauge", "requests in the queue", (uint64_t)s->n_queued},
        {"prompt_tokens_total", "counter", "tokens of prompts", s->n_prompt},
        {"prompt_tokens_reused_total", "counter", "tokens of prompts that were reused from the cache", s->n_reused},
        {"generated_tokens_total", "counter", "tokens of answers", s->n_generated}};
    int n = 0;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        n +=
            snprintf(text + n, sizeof text - (size_t)n, "# HELP llm_%s %s\n# TYPE llm_%s %s\nllm_%s %llu\n",
                     all[i].name, all[i].help, all[i].name, all[i].type, all[i].name, (unsigned long long)all[i].value);
    pthread_mutex_unlock(&s->lock);
    return send_text(c, 200, "text/plain; version=0.0.4", text, (size_t)n);
}

/* libmicrohttpd calls this to get the next bytes of a stream. */
static ssize_t read_stream(void *user, uint64_t at, char *to, size_t most) {
    request *r = (request *)user;
    pthread_mutex_lock(&r->server->lock);
    size_t left = arrlenu(r->out) - r->n_sent, n = left < most ? left : most;
    bool ended = !n && r->finished;
    (void)at;
    if (n) memcpy(to, r->out + r->n_sent, n);
    r->n_sent += n;
    if (n == left) {
        arrsetlen(r->out, 0);
        r->n_sent = 0;
    }
    if (!n && !ended) suspend(r);
    pthread_mutex_unlock(&r->server->lock);
    return ended ? MHD_CONTENT_READER_END_OF_STREAM : (ssize_t)n;
}

static enum MHD_Result send_stream(request *r) {
    struct MHD_Response *response = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 4096, read_stream, r, NULL);
    if (!response) return MHD_NO;
    MHD_add_response_header(response, "Content-Type", "text/event-stream");
    MHD_add_response_header(response, "Cache-Control", "no-cache");
    enum MHD_Result queued = MHD_queue_response(r->connection, 200, response);
    MHD_destroy_response(response);
    return queued;
}

/* Called when the body is complete. */
static enum MHD_Result accept_request(request *r) {
    server *s = r->server;
    llm_error err;
    const char *why = read_request(r, &err);
    if (why) return send_error(r, 400, why);
    pthread_mutex_lock(&s->lock);
    int code = s->n_signals ? 503 : s->n_queued + s->n_running >= s->opt.queue + s->opt.parallel ? 429 : 0;
    if (!code) {
        put_in_queue(s, r);
        r->accepted = true;
        s->n_live++;
        snprintf(r->id, sizeof r->id, "%s-%llx-%llu", r->is_chat ? "chatcmpl" : "cmpl", (unsigned long long)r->created,
                 (unsigned long long)++s->n_ids);
        if (!r->streams) suspend(r);
        pthread_cond_signal(&s->work);
    }
    pthread_mutex_unlock(&s->lock);
    if (code) return send_error(r, code, code == 429 ? "too many requests are waiting" : "the server is shutting down");
    return r->streams ? send_stream(r) : MHD_YES;
}

/* The time of the comparison does not depend on where the keys differ. */
static bool has_key(const server *s, struct MHD_Connection *c) {
    const char *given = MHD_lookup_connection_value(c, MHD_HEADER_KIND, "Authorization"), *key = s->opt.key;
    unsigned char differs = 0;
    if (!key) return true;
    if (!given || strncmp(given, "Bearer ", 7) || strlen(given + 7) != strlen(key)) return false;
    for (size_t i = 0; key[i]; i++) differs |= (unsigned char)(given[7 + i] ^ key[i]);
    return !differs;
}

static enum MHD_Result answer_get(server *s, struct MHD_Connection *c, const char *url) {
    if (!strcmp(url, "/health")) return send_json(c, 200, json_pack("{s:s}", "status", "ok"));
    if (!has_key(s, c)) return send_json(c, 401, error_json(401, "the key is missing or wrong"));
    if (!strcmp(url, "/metrics")) return send_metrics(s, c);
    if (!strcmp(url, "/v1/models"))
        return send_json(c, 200,
                         json_pack("{s:s, s:[{s:s, s:s, s:i, s:s}]}", "object", "list", "data", "id", s->opt.name,
                                   "object", "model", "created", 0, "owned_by", "local"));
    return send_json(c, 404, error_json(404, "unknown address"));
}

/* libmicrohttpd calls this after the headers, for each part of the body, after the body, and when a connection is
   resumed. */
static enum MHD_Result handle(void *user, struct MHD_Connection *c, const char *url, const char *method,
                              const char *version, const char *data, size_t *n_data, void **state) {
    server *s = (server *)user;
    request *r = (request *)*state;
    (void)version;
    if (!strcmp(method, "GET")) return answer_get(s, c, url);
    if (!r) {
        r = (request *)calloc(1, sizeof *r);
        if (!r) return MHD_NO;
        r->server = s;
        r->connection = c;
        r->is_chat = !strcmp(url, "/v1/chat/completions");
        *state = r;
        return MHD_YES;
    }
    if (*n_data) { /* the rest of a body that is too long is ignored */
        size_t n = *n_data;
        *n_data = 0;
        if (arrlenu(r->body) <= (size_t)s->opt.most_body) put(&r->body, data, n);
        return MHD_YES;
    }
    if (r->accepted) { /* the connection was resumed: the complete answer is ready */
        pthread_mutex_lock(&s->lock);
        bool finished = r->finished;
        pthread_mutex_unlock(&s->lock);
        return finished ? send_text(c, r->code, "application/json", r->out ? r->out : "", arrlenu(r->out)) : MHD_YES;
    }
    const char *type = MHD_lookup_connection_value(c, MHD_HEADER_KIND, "Content-Type");
    if (!has_key(s, c)) return send_error(r, 401, "the key is missing or wrong");
    if (!r->is_chat && strcmp(url, "/v1/completions")) return send_error(r, 404, "unknown address");
    if (strcmp(method, "POST")) return send_error(r, 405, "this address requires POST");
    /* A web page in a user's browser cannot send this type to another site without its permission. */
    if (!type || strncasecmp(type, "application/json", 16))
        return send_error(r, 415, "the type must be application/json");
    if (arrlenu(r->body) > (size_t)s->opt.most_body) return send_error(r, 413, "the request is too large");
    return accept_request(r);
}

/* libmicrohttpd calls this when a request is answered or its client has hung up. */
static void completed(void *user, struct MHD_Connection *c, void **state, enum MHD_RequestTerminationCode why) {
    server *s = (server *)user;
    request *r = (request *)*state;
    (void)c, (void)why;
    if (!r) return;
    *state = NULL;
    pthread_mutex_lock(&s->lock);
    r->closed = true;
    let_go(r);
    pthread_mutex_unlock(&s->lock);
}

static struct MHD_Daemon *listen_on(server *s, llm_error *err) {
    struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICHOST};
    struct addrinfo *address = NULL;
    char port[8];
    snprintf(port, sizeof port, "%d", s->opt.port);
    if (getaddrinfo(s->opt.host, port, &hints, &address)) {
        snprintf(err->message, sizeof err->message, "'%s' is not an address", s->opt.host);
        return NULL;
    }
    unsigned flags = MHD_USE_POLL | MHD_USE_INTERNAL_POLLING_THREAD | MHD_ALLOW_SUSPEND_RESUME |
                     (address->ai_family == AF_INET6 ? MHD_USE_IPv6 : 0u);
    struct MHD_Daemon *daemon = MHD_start_daemon(
        flags, 0, NULL, NULL, handle, s, MHD_OPTION_SOCK_ADDR, address->ai_addr, MHD_OPTION_NOTIFY_COMPLETED, completed,
        s, MHD_OPTION_CONNECTION_LIMIT, (unsigned)(s->opt.queue + s->opt.parallel + 64), MHD_OPTION_CONNECTION_TIMEOUT,
        60u, MHD_OPTION_LISTENING_ADDRESS_REUSE, 1u, MHD_OPTION_END);
    freeaddrinfo(address);
    if (!daemon) snprintf(err->message, sizeof err->message, "cannot listen on %s:%d", s->opt.host, s->opt.port);
    return daemon;
}

/* ---- Start and end --------------------------------------------------------------------------------------------- */

static void *wait_for_signals(void *user) {
    server *s = (server *)user;
    sigset_t set;
    int number;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    for (;;) {
        sigwait(&set, &number);
        pthread_mutex_lock(&s->lock);
        if (s->n_signals++) _exit(1);
        pthread_cond_signal(&s->work);
        pthread_mutex_unlock(&s->lock);
    }
    return NULL;
}

int main(int argc, char **argv) {
    static const struct argp argp = {
        OPTIONS, parse_option, NULL, "Answers many users at once through an API like OpenAI's.", NULL, NULL, NULL};
    static server s = {.opt = {.host = "127.0.0.1", .port = 8080, .parallel = 8, .queue = 64, .most_body = 1 << 20},
                       .lock = PTHREAD_MUTEX_INITIALIZER,
                       .work = PTHREAD_COND_INITIALIZER};
    struct MHD_Daemon *daemon = NULL;
    llm_error err = {LLM_OK, ""};
    pthread_t thread;
    sigset_t set;
    argp_parse(&argp, argc, argv, 0, NULL, &s.opt);
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set, NULL); /* in all threads; wait_for_signals receives them */
    signal(SIGPIPE, SIG_IGN);
    llm_model_desc model = {.dtype = s.opt.dtype, .n_threads = s.opt.n_threads};
    /* n_logits: with "echo" and "logprobs" all tokens of a pass need logits. */
    int step = s.opt.step ? s.opt.step : 128;
    /* n_seq: twice the number of places, because unused sequences keep prefixes. */
    llm_context_desc desc = {.n_ctx = s.opt.n_ctx,
                             .n_seq = 2 * s.opt.parallel,
                             .n_cache = s.opt.n_cache,
                             .n_logits = s.opt.parallel > step ? s.opt.parallel : step,
                             .n_threads = s.opt.n_threads};
    bool ready = !llm_model_load(&s.model, s.opt.model, &model, &err);
    if (ready && !desc.n_ctx) {
        int trained = llm_model_get_info(s.model).n_ctx_train;
        desc.n_ctx = trained < 4096 ? trained : 4096;
    }
    if (ready && !desc.n_cache) desc.n_cache = desc.n_ctx * s.opt.parallel;
    if (ready && s.opt.keep_free >= desc.n_ctx) {
        snprintf(err.message, sizeof err.message, "--keep-free %d leaves no room in a context of %d tokens",
                 s.opt.keep_free, desc.n_ctx);
        ready = false;
    }
    ready = ready && !llm_context_create(&s.ctx, s.model, &desc, &err) && (daemon = listen_on(&s, &err)) &&
            !pthread_create(&thread, NULL, wait_for_signals, &s);
    if (ready) {
        const union MHD_DaemonInfo *info = MHD_get_daemon_info(daemon, MHD_DAEMON_INFO_BIND_PORT);
        const char *problem = llm_chat_problem(llm_model_tokenizer(s.model));
        if (problem) fprintf(stderr, "server: /v1/chat/completions will fail: %s\n", problem);
        fprintf(stderr, "server: %s listens on http://%s:%d\n", s.opt.name, s.opt.host, info ? info->port : s.opt.port);
        work(&s);
    } else fprintf(stderr, "server: %s\n", err.message);
    if (daemon) MHD_stop_daemon(daemon);
    llm_context_free(s.ctx);
    llm_model_free(s.model);
    return !ready;
}
