/*  llm.h 1.0.0 - run Llama-family language models from one C file.               MIT licence, at the end of this file

    Put this file beside your program. In ONE source file write

        #define LLM_IMPLEMENTATION
        #include "llm.h"

    and elsewhere just include it. Link with -lm and -lpthread; nothing else is needed. Compile with -O2: without
    optimisation everything is five times as slow. This comment is the manual: a program that runs, the same step by
    step, what is promised, recipes to copy, limits, options, and where to find what in this file.

    QUICK START

        static bool print(void *user, const char *text, size_t n_bytes) {
            (void)user;
            fwrite(text, 1, n_bytes, stdout);
            return fflush(stdout) == 0;                         // false stops the answer
        }

        int main(int argc, char **argv) {
            llm_model *model = NULL;
            llm_context *ctx = NULL;
            llm_error err;
            llm_generate_desc desc = {.prompt = "Hello, my name is", .max_tokens = 200, .on_text = print};
            if (llm_model_load(&model, argc > 1 ? argv[1] : "model.gguf", NULL, &err) ||
                llm_context_create(&ctx, model, NULL, &err) || llm_generate(ctx, &desc, NULL, &err))
                fprintf(stderr, "%s\n", err.message);
            llm_context_free(ctx);
            llm_model_free(model);
        }

    STEP BY STEP

    1. Get a model: a .gguf file, or a directory with config.json, *.safetensors and tokenizer.json, as published on
       Hugging Face. README.md lists the architectures and types. llm_model_read_info says what a file holds and
       llm_memory_estimate how much memory it would take, without loading it.

    2. Load it with llm_model_load. The weights stay as the file has them: a quantised file keeps its numbers and about
       its size, and F32, F16 and BF16 become bf16. llm_model_desc.dtype converts all of them to one type instead:
       LLM_DTYPE_INT4 takes about a third of the memory of bf16 and is two to three times as fast. The model never
       changes afterwards; all threads may share it.

    3. Create a context with llm_context_create: the memory of the conversations (the KV cache) and the threads that
       compute. One context holds n_seq sequences. A sequence is a list of tokens that the model has read; n_ctx limits
       its length. All that a forward pass needs is allocated here.

    4. Ask with llm_generate: a text to continue (.prompt), a conversation (.messages), or token ids (.tokens). It
       turns the question into tokens, runs those that no sequence holds yet through the model (prefill), then
       picks one token after the other (decode) by the rules in .sampler, and gives the text to .on_text as whole UTF-8
       characters. It stops at the model's own end, at max_tokens, at a stop string, or when a callback says so;
       llm_stats tells which, and how fast it was.

    5. Ask again. The longest prefix that the new prompt shares with any sequence of the context is not computed again, so
       each turn of a conversation costs only its new tokens. (An answer may become other tokens when it comes back as a
       message. Then it is computed again from the first token that differs.)

    6. To do more yourself, use the parts of llm_generate: llm_encode and llm_chat_encode make tokens, llm_forward
       runs any mix of tokens of any sequences in one pass, llm_logits and llm_sample turn the result into the next
       token, llm_stream_token turns tokens into text. examples/loop.c is such a loop, as a whole program.

    7. Answer many at the same time with llm_stream_begin and llm_step, which are llm_generate in steps.
       examples/server.c is an HTTP server made of them.

    8. Free streams first, then contexts and drafts, then the model.

    THE OBJECTS

        llm_model      weights, hyperparameters, tokenizer. Immutable once loaded; any number of threads may share it.
        llm_context    a static KV cache, scratch space and logits for up to n_seq sequences, and the threads that
                       compute. One thread at a time may use it; many contexts of one model may run in parallel.
        llm_batch      a packed, ragged list of tokens, each with its sequence. Prefill, decode and several users at
                       once are the same call with different batches. There is no padding.
        llm_sampler    settings and the state of a random generator; plain data, copied by assignment.
        llm_stream     a text that is being written beside others.
        llm_draft      guesses how a text goes on. That makes decoding faster and does not change the text.

    WHAT EVERY FUNCTION PROMISES

        It never exits, aborts, prints or throws. A function that can fail returns an llm_status, or -1 in place of a
        count, and explains the failure in an llm_error, which may be NULL: what went wrong, where, and what to do. If a
        load fails, everything it allocated is freed. A forward pass allocates nothing. There are no mutable globals.
        Functions that take a const object may be called from many threads at once.
        Settings structs may be zero ({0}) or NULL for defaults. Free with the matching llm_*_free; NULL is allowed.
        Strings are UTF-8. A pointer that a function returns belongs to the object that was passed in. It is valid until
        that object is freed, or for as long as the declaration says.
        Callbacks run on the thread that made the call. They must not use the context, and should not throw or longjmp.
        llm_stream_free alone is allowed.

    ONE ARITHMETIC

        CPU logits are the same bits on every instruction set, with every compiler and its flags, and for any number of
        threads and ranks. They do not depend on the other tokens in the batch, on how a prompt was cut into passes, or
        on whether a prefix was computed or came from a fork or a saved cache. See section 12.

    RECIPES

    Functions to copy; a test compiles and runs each of them.

    RECIPE: a chat with its history. Each turn reuses the cache of the turns before.

        static bool append(void *user, const char *text, size_t n_bytes) {
            char *answer = (char *)user;
            size_t n = strlen(answer);
            if (n + n_bytes >= 4096) return false;              // no room: stop the answer
            memcpy(answer + n, text, n_bytes + 1);              // with its NUL
            return true;
        }

        static llm_status chat(llm_context *ctx, llm_message *messages, int *n, char answer[4096], llm_error *err) {
            llm_generate_desc desc = {.messages = messages, .n_messages = *n, .max_tokens = 300, .on_text = append,
                                      .user = answer};
            answer[0] = 0;
            llm_status status = llm_generate(ctx, &desc, NULL, err);
            messages[*n].role = "assistant";
            messages[(*n)++].content = answer;                  // the host adds the user's next message
            return status;
        }

    RECIPE: your own loop. The first batch is the prompt, the others are one token each.

        static llm_status loop(llm_context *ctx, const char *prompt, llm_sampler *sampler, llm_error *err) {
            const llm_tokenizer *tokenizer = llm_model_tokenizer(llm_context_model(ctx));
            llm_text_stream stream = {.started = true};         // the output continues the prompt
            llm_token ids[512], token;
            char text[512];
            int64_t n = llm_encode(tokenizer, prompt, strlen(prompt), LLM_TOKENS_ENDS, ids, 512, err);
            if (n < 0 || n > 512) return LLM_ERROR_ARGUMENT;
            llm_batch batch = {.n_tokens = (int)n, .tokens = ids};
            for (int i = 0; i < 50; i++) {
                llm_status status = llm_forward(ctx, &batch, err);
                if (status) return status;
                token = llm_sample(ctx, batch.n_tokens - 1, 0, sampler);
                if (llm_token_is_end(tokenizer, token)) break;
                fwrite(text, 1, llm_stream_token(tokenizer, &stream, token, text, sizeof text), stdout);
                batch.tokens = &token;
                batch.n_tokens = 1;
            }
            return LLM_OK;
        }

    RECIPE: several users at the same time. More may begin between any two steps. The context was created with n_seq and
    n_logits of at least n_users, which is at most 64 here.

        static llm_status answer_all(llm_context *ctx, const char *const *prompts, char (*answers)[4096], int n_users,
                                     llm_error *err) {
            llm_stream *streams[64] = {NULL};
            llm_status status = LLM_OK;
            int n_running = 1;
            for (int u = 0; u < n_users && !status; u++) {
                llm_generate_desc desc = {.prompt = prompts[u], .seq = LLM_SEQ_ANY, .max_tokens = 50, .on_text = append,
                                          .user = answers[u]};
                answers[u][0] = 0;
                status = llm_stream_begin(&streams[u], ctx, &desc, err);
            }
            while (!status && n_running) status = llm_step(ctx, 0, &n_running, err);
            for (int u = 0; u < n_users; u++) {
                if (!status) status = llm_stream_result(streams[u], NULL, err);
                llm_stream_free(streams[u]);
            }
            return status;
        }

    RECIPE: fork and truncate. All sequences begin with one text, which is computed and stored once.

        static llm_status share(llm_context *ctx, const char *prefix, llm_error *err) {
            llm_generate_desc desc = {.prompt = prefix};
            llm_status status = llm_prefill(ctx, &desc, NULL, err);             // into sequence 0
            int length = llm_seq_length(ctx, 0) / LLM_CACHE_BLOCK * LLM_CACHE_BLOCK;    // whole blocks cost nothing
            for (int seq = 1; seq < llm_context_n_seq(ctx) && !status; seq++)
                status = llm_seq_fork(ctx, seq, 0, length, err);
            return status ? status : llm_seq_truncate(ctx, 0, length, err);     // forget what came after
        }

    RECIPE: speculative decoding. The text is the same, and is faster where it repeats its prompt. The context was
    created with n_logits = LLM_DRAFT_MAX + 1. llm_draft_model makes a draft of a small model instead.

        static llm_status faster(llm_context *ctx, const char *prompt, llm_stats *stats, llm_error *err) {
            llm_draft draft = llm_draft_lookup();
            llm_generate_desc desc = {.prompt = prompt, .max_tokens = 100, .draft = &draft};
            llm_status status = llm_generate(ctx, &desc, stats, err);
            llm_draft_free(&draft);
            return status;                                      // stats->draft.speedup above 1: it was worth it
        }

    RECIPE: cancel from another thread, which sets *stop. The answer ends before the next layer is computed.

        static bool is_set(void *user) { return __atomic_load_n((bool *)user, __ATOMIC_RELAXED); }

        static bool until_stopped(llm_context *ctx, const char *prompt, bool *stop, llm_error *err) {
            llm_generate_desc desc = {.prompt = prompt, .cancel = is_set, .user = stop};
            llm_stats stats;
            return !llm_generate(ctx, &desc, &stats, err) && stats.stop == LLM_STOP_CALLBACK;
        }

    RECIPE: the host's allocator and threads. A real host keeps its threads instead of starting them for each pass.

        static void *count_alloc(void *user, size_t size) {
            __atomic_add_fetch((int *)user, 1, __ATOMIC_RELAXED);
            return malloc(size);
        }

        static void count_free(void *user, void *ptr) {
            __atomic_sub_fetch((int *)user, 1, __ATOMIC_RELAXED);
            free(ptr);
        }

        typedef struct share_of_work {
            void (*task)(void *arg, int i);
            void *arg;
            int i;
        } share_of_work;

        static void *run_share(void *arg) {
            share_of_work *s = (share_of_work *)arg;
            s->task(s->arg, s->i);
            return NULL;
        }

        static void run_all(void *user, int n, void (*task)(void *arg, int i), void *arg) {
            pthread_t threads[16];
            share_of_work shares[16];
            (void)user;
            for (int i = 0; i < n; i++) {
                shares[i].task = task, shares[i].arg = arg, shares[i].i = i;
                if (pthread_create(&threads[i], NULL, run_share, &shares[i])) abort();
            }
            for (int i = 0; i < n; i++) pthread_join(threads[i], NULL);
        }

        static llm_status open_own(llm_context **ctx, const llm_model *model, int *n_blocks, llm_error *err) {
            llm_context_desc desc = {.n_threads = 2, .parallel = run_all,
                                     .host = {.alloc = count_alloc, .free = count_free, .user = n_blocks}};
            return llm_context_create(ctx, model, &desc, err);
        }

    RECIPE: save a sequence and restore it, here or in another process with the same model.

        static llm_status copy(llm_context *from, llm_context *to, llm_error *err) {
            size_t size = llm_seq_save_size(from, 0);
            void *bytes = malloc(size);
            if (!bytes) return LLM_ERROR_MEMORY;
            llm_status status = llm_seq_save(from, 0, bytes, size, err);        // a file could be written here
            if (!status) status = llm_seq_restore(to, 0, bytes, size, err);
            free(bytes);
            return status;
        }

    RECIPE: score. Which of two endings is the likelier? One call may have any number of questions.

        static int likelier(llm_context *ctx, const char *context, const char *const text[2], llm_error *err) {
            const llm_tokenizer *tokenizer = llm_model_tokenizer(llm_context_model(ctx));
            llm_token ids[2][256];
            const llm_token *endings[2];
            int n_ending[2];
            int64_t n_context = 0;
            double log_likelihoods[2];
            for (int e = 0; e < 2; e++) {
                unsigned flags = LLM_TOKENS_ENDS | LLM_TOKENS_SPECIAL;
                int64_t n = llm_encode_pair(tokenizer, context, text[e], flags, ids[e], 256, &n_context, err);
                if (n < 0 || n > 256) return -1;
                endings[e] = ids[e] + n_context;
                n_ending[e] = (int)(n - n_context);
            }
            llm_question question = {ids[0], (int)n_context, 2, endings, n_ending};
            if (llm_score(ctx, &question, 1, NULL, log_likelihoods, NULL, err)) return -1;
            return log_likelihoods[1] > log_likelihoods[0];
        }

    RECIPE: errors. A full cache is found before any work is done, so that room can be made and the call repeated.

        static llm_status answer(llm_context *ctx, const llm_generate_desc *desc, int old_seq, llm_error *err) {
            llm_status status = llm_generate(ctx, desc, NULL, err);
            if (status == LLM_ERROR_CONTEXT_FULL) {
                llm_seq_truncate(ctx, old_seq, 0, NULL);
                status = llm_generate(ctx, desc, NULL, err);
            }
            if (status) fprintf(stderr, "%s: %s\n", llm_status_name(status), err->message);
            return status;
        }

    RECIPE: find the largest type of weights that fits into a limit of memory, before loading.

        static llm_dtype largest_type(const char *path, uint64_t max_bytes) {
            const llm_dtype types[] = {LLM_DTYPE_BF16, LLM_DTYPE_INT8, LLM_DTYPE_INT4};
            for (int i = 0; i < 3; i++) {
                llm_model_desc desc = {.dtype = types[i]};
                llm_model_info info;
                llm_memory memory;
                if (llm_model_read_info(path, &desc, &info, NULL) || llm_memory_estimate(&info, NULL, &memory, NULL))
                    return LLM_DTYPE_DEFAULT;
                if (memory.weights + memory.cache + memory.scratch <= max_bytes) return types[i];
            }
            return LLM_DTYPE_DEFAULT;
        }

    LIMITS

        Compilers: gcc and clang, on Windows MinGW; C99 to C23, C++17 and later. Others stop at an #error.
        Machines: little-endian (an #error elsewhere), tested on x86-64 and aarch64. 32-bit ones are not tested.
        Systems: Linux and Windows. Other POSIX systems should work but are not tested.
        Models: decoder-only transformers of the Llama family, as README.md lists them; no mixture of experts, no
        images or sound, no encoders, no embeddings, no LoRA adapters, no training. If a file needs something that this
        library lacks, loading fails and the message names it.
        Chat templates: the part of Jinja that published templates use. A template that needs more is refused, and the
        message names it. Tool calls in an answer are not parsed.
        Sampling: no grammars. To constrain a text, change llm_sampler.biases in on_token, or write your own loop.
        A full sequence cannot be shifted: after old messages were left out (keep_free), the others are computed again.

    COMPILE-TIME OPTIONS, defined before the include

        LLM_IMPLEMENTATION      compile the implementation here
        LLM_STATIC              make everything private to this source file (not with LLM_CUDA)
        LLM_API                 put before each public function; default: extern. For a Windows DLL use
                                __declspec(dllexport)
        LLM_HEADER_FILENAME     this file's name if it is not "llm.h" (it includes itself once per instruction set)
        LLM_NO_THREADS          compile without threads (n_threads is then always 1)
        LLM_NO_SIMD             compile the plain C kernels only: small, slow, the same bits
        LLM_CUDA                declare the GPU backend that llm_cuda.cu holds
        LLM_MPI                 declare llm_comm_mpi, for ranks that are processes; compile with mpicc

    CONTENTS, in the order of the file. Search for "---- NAME" in the declarations, "==== NUMBER" in the implementation.

        declarations: Errors . Host callbacks . Ranks . Model . Tokenizer . Chat . Context . Generation . Streams
               . Sequences . Forward pass . Sampler . Speculative decoding . Scoring . NVIDIA GPU
        BACKENDS: NOT FOR HOSTS
         1 Base
         2 Files
         3 JSON reader: Members of objects
         4 Number formats
         5 Checkpoints: GGUF . Hugging Face directories
         6 Hyperparameters: GGUF . config.json
         7 Unicode: Normalisation form C
         8 Jinja: Lexer . Parser . Values . Strings . Values as text . Functions . Running
         9 Tokenizer: Hash tables . Merging . Pre-tokenizers . Words of ASCII . Encoding . Decoding . Building a
               tokenizer
        10 Tokenizer files: The pre-tokenizers that are known . Tokenizers in GGUF files . tokenizer.json .
               tokenizer.model . Directories as published on Hugging Face . Tokenizers alone
        11 Chat templates
        12 CPU kernels
        13 Weights
        14 The CPU backend: threads and weights: How many cores there are . The model on the CPU
        15 Communication: Threads of one process . MPI
        16 KV cache
        17 Forward pass
        18 The CPU context: The limit of decoding
        19 Models: Metadata as text . Loading . What a file's header says . A directory with int8 weights
        20 Contexts and sequences: Calls of the host . Sequences . llm_forward
        21 Sampler
        22 Speculative decoding: How many guesses are worth it . A generation's rounds . Prompt lookup . A model as
               the draft
        23 Generation: Bursts
        23b Streams: Beginning . A pass . After the pass . What hosts call
        24 Scoring: Text . The batch being filled . The packed schedule . Rectangles . llm_score
        25 Kernel text: Products of many rows . Products with groups . Products on the matrix unit
*/
#ifndef LLM_H
#define LLM_H

#define LLM_VERSION "1.0.0"
#define LLM_VERSION_NUMBER 10000 /* 10000 * major + 100 * minor + patch */

#if defined(LLM_IMPLEMENTATION) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* for mmap and threads under -std=c99 */
#endif
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#ifdef LLM_MPI
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#endif

#if defined(LLM_STATIC) && defined(LLM_CUDA)
#error "llm_cuda.cu calls functions of llm.h, so LLM_CUDA cannot be combined with LLM_STATIC"
#elif defined(LLM_STATIC) && defined(LLM_API)
#error "define LLM_STATIC or LLM_API, not both"
#endif
#if !defined(LLM_API) && !defined(LLM_STATIC)
#define LLM_API extern
#elif !defined(LLM_API) && (defined(__GNUC__) || defined(__clang__))
#define LLM_API static __attribute__((unused))
#elif !defined(LLM_API)
#define LLM_API static
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The version that was compiled: LLM_VERSION_NUMBER, for programs that load the library at run time. */
LLM_API int llm_version(void);

/* ---- Errors -------------------------------------------------------------------------------------------------- */

typedef enum llm_status {
    LLM_OK = 0,
    LLM_ERROR_ARGUMENT,     /* the caller passed something invalid                                   */
    LLM_ERROR_IO,           /* a file cannot be opened, read or written                              */
    LLM_ERROR_FORMAT,       /* a file is damaged or contradicts itself                               */
    LLM_ERROR_UNSUPPORTED,  /* a file is sound but needs a feature that this library does not have   */
    LLM_ERROR_MEMORY,       /* an allocation failed                                                  */
    LLM_ERROR_CONTEXT_FULL, /* the KV cache has no room; found before any work is done               */
    LLM_ERROR_CANCELLED,    /* a callback stopped the work                                           */
    LLM_ERROR_DEVICE        /* the backend's device failed                                           */
} llm_status;

/* Every function that takes an llm_error fills it in; after a success with LLM_OK and "". */
typedef struct llm_error {
    llm_status code;
    char message[500]; /* what, where, and what to do; always NUL-terminated, whole UTF-8 characters */
} llm_error;

/* The constant's name, "LLM_ERROR_IO"; NULL if there is no such status. */
LLM_API const char *llm_status_name(llm_status status);

/* ---- Host callbacks ------------------------------------------------------------------------------------------ */

/* Functions that the host program gives to the library. All may be NULL; alloc and free must be given together. The
   memory that alloc returns must be aligned like malloc's and need not be cleared. A model, a tokenizer and a context
   each keep a copy of this struct. If several threads use objects with the same allocator, it must be thread-safe.

   Every callback in this file runs on the thread that called the library, and before that call returns. It must not use
   or free the context that called it. It may only call llm_seq_length, llm_seq_tokens, llm_logits, llm_stream_result,
   llm_stream_free and the getters; all other functions fail with LLM_ERROR_ARGUMENT. It should return. If a C++
   exception or a longjmp leaves it instead, the next call on the context ends the interrupted call and frees its memory,
   and drops from the sequences all tokens that were not final. A model or context that was being loaded or created is
   lost, with its memory. */
typedef struct llm_host {
    void *(*alloc)(void *user, size_t size);   /* returns NULL if there is no memory                            */
    void (*free)(void *user, void *ptr);       /* ptr is never NULL                                             */
    void (*log)(void *user, const char *line); /* one line of information, such as the time a load took          */
    bool (*progress)(void *user, float done);  /* while loading, from 0 to 1; return false to cancel            */
    void *user;                                /* the first argument of all four                                */
} llm_host;

/* ---- Ranks --------------------------------------------------------------------------------------------------- */

/* Several ranks can run one model together. They are threads of one process or, with LLM_MPI, processes on one machine
   or many. Each loads its own part of the model and has its own contexts. In tensor parallel each rank has a share of
   the outputs of every matrix; in pipeline parallel it has some of the layers. All ranks make the same calls with the
   same arguments in the same order, and all get the same results: on the CPU the same bits as one rank alone. Every
   rank calls its own callbacks, so a host should print on one rank only.

   If one rank fails, is cancelled, has left, or makes another call than the others, the call fails on all ranks. */

/* Rows that the ranks exchange in place: before the call each rank has its own share of every row, afterwards all have
   the whole rows. A row consists of n_units units, the last of which may be shorter. Rank i has the units u with
   n_units * i / size <= u < n_units * (i + 1) / size. */
typedef struct llm_exchange {
    void *data;
    size_t n_rows, stride, row_bytes, unit_bytes; /* rows are `stride` bytes apart                                */
    int n_units;
    /* With `tokens` a whole row comes from one rank: the one that has unit tokens[row] / tokens_per_unit. */
    const int32_t *tokens; /* [n_rows]; NULL: each rank has its share of each row                                  */
    int tokens_per_unit;
} llm_exchange;

/* Connects a rank with the others. llm_comm_threads and llm_comm_mpi create it; a host may implement another one. One
   thread at a time may use it. */
typedef struct llm_comm llm_comm;
struct llm_comm {
    int rank, size;
    double patience; /* seconds to wait for another rank before the call fails; default 8, a host may change it  */
    void *user;
    /* Returns when all ranks have made this call. *flags becomes the OR of all ranks' flags. */
    llm_status (*exchange)(llm_comm *comm, const llm_exchange *x, unsigned *flags, llm_error *err);
    /* Begins to send n bytes. They must stay unchanged until they are received. Messages to a rank arrive in order. At
       most 64 messages to a rank can be on their way: send waits until there is room for one more, drain waits until at
       most `most` are left. */
    llm_status (*send)(llm_comm *comm, int to, const void *data, size_t n, llm_error *err);
    llm_status (*drain)(llm_comm *comm, int to, int most, llm_error *err);
    llm_status (*receive)(llm_comm *comm, int from, void *data, size_t n, llm_error *err);
    /* Makes another comm for the same ranks, independent of this one. All ranks make this call. */
    llm_status (*duplicate)(llm_comm *comm, llm_comm **out, llm_error *err);
    void (*abort)(llm_comm *comm, const char *why); /* from now on all calls fail, on all ranks                   */
    void (*close)(llm_comm *comm);
};

/* Creates the comms of `size` ranks that are threads of this process: out[i] is rank i's. `host` only gives the
   memory. */
LLM_API llm_status llm_comm_threads(llm_comm **out, int size, const llm_host *host, llm_error *err);
#ifdef LLM_MPI
/* Creates a comm for the processes of an MPI communicator. Call MPI_Init_thread before it, with MPI_THREAD_MULTIPLE if
   several contexts work at the same time, and MPI_Finalize after llm_comm_free. All ranks make this call. */
LLM_API llm_status llm_comm_mpi(llm_comm **out, MPI_Comm comm, const llm_host *host, llm_error *err);
#endif
LLM_API void llm_comm_abort(llm_comm *comm, const char *why);
LLM_API void llm_comm_free(llm_comm *comm); /* after the models that use it; every rank frees its own comm          */

/* ---- Model --------------------------------------------------------------------------------------------------- */

typedef struct llm_model llm_model;
typedef struct llm_tokenizer llm_tokenizer;
typedef struct llm_backend llm_backend;

/* The type of the weights in memory. LLM_DTYPE_FILE keeps that of the file: a tensor in blocks (Q4_0, Q4_1, Q5_0, Q5_1,
   Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS) keeps its exact numbers and about its size, int8 per channel stays as it is, and
   F32, F16 and BF16 become bf16. So one model may have several types. The other values convert every matrix to one
   type. */
typedef enum llm_dtype {
    LLM_DTYPE_DEFAULT = 0, /* LLM_DTYPE_FILE on the CPU, bf16 on a GPU                                    */
    LLM_DTYPE_F32,
    LLM_DTYPE_BF16,
    LLM_DTYPE_INT8, /* per output channel: q = round(127 w / max|row|)                             */
    LLM_DTYPE_INT4, /* in groups of 32 with scale and minimum; blocks of up to 4 bits, and Q8_0, stay      */
    LLM_DTYPE_F16,  /* on the CPU activations stay f32                                             */
    LLM_DTYPE_FILE  /* as in the file; the same as bf16 if no tensor is in blocks or int8                  */
} llm_dtype;

/* "f32", "bf16", "int8", "int4", "f16", "file". NULL or LLM_DTYPE_DEFAULT if there is no such type. */
LLM_API const char *llm_dtype_name(llm_dtype dtype);
LLM_API llm_dtype llm_dtype_from_name(const char *name);

typedef struct llm_model_desc {
    llm_dtype dtype;
    int n_threads;              /* threads that convert while loading; 0: one per physical core               */
    const char *isa;            /* "scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon"; NULL: the fastest */
    const llm_backend *backend; /* what computes; NULL: the CPU. See llm_cuda_backend                         */
    /* `tensor` connects the ranks that share each layer, `pipeline` those that have the other layers. NULL: there are
       no others. Both must outlive the model. With ranks, create contexts one at a time, in the same order on all
       ranks. */
    llm_comm *tensor, *pipeline;
    llm_host host;
} llm_model_desc;

typedef struct llm_model_info {
    char name[64];         /* from the file, may be empty                                                     */
    char architecture[32]; /* "llama", ...                                                                    */
    llm_dtype dtype; /* LLM_DTYPE_FILE if weights are in blocks, or have several types, as in the file            */
    char held[96];   /* the types of the matrices in memory: "bf16", "Q4_K 71 %, Q6_K 29 %" (of the parameters)   */
    const char *isa; /* the instruction set in use                                                            */
    const llm_backend *backend;
    int n_vocab, n_layers, n_embd, n_ff, n_heads, n_kv_heads, head_dim, rope_dim, n_ctx_train;
    uint64_t n_params;
    uint64_t weight_bytes;           /* memory for the weights; with ranks, for this rank's part               */
    uint64_t weight_bytes_per_token; /* how much of it is read to decode one token                             */
    uint64_t cache_bytes_per_token;  /* KV cache of one position; with ranks, on this rank                     */
    uint64_t fingerprint; /* of weights and hyperparameters: equal ones can share saved sequences; 0: not loaded */
    int n_own_layers, n_own_kv_heads; /* n_layers and n_kv_heads; with ranks, those of this rank                */
} llm_model_info;

/* Copies n_bytes at `offset` of a file to `to`; returns false if it cannot. */
typedef bool (*llm_read_fn)(void *user, uint64_t offset, void *to, size_t n_bytes);

/* Loads a model from a GGUF file (for a split model, its first part), or from a Hugging Face directory (or its
   config.json) with safetensors. If the file needs a feature this library lacks, loading fails and the message names
   the feature. *out is NULL after a failure. Free it after its contexts. */
LLM_API llm_status llm_model_load(llm_model **out, const char *path, const llm_model_desc *desc, llm_error *err);

/* The same for a whole GGUF file in memory. The memory is not used after this returns. */
LLM_API llm_status llm_model_load_memory(llm_model **out, const void *data, size_t size, const llm_model_desc *desc,
                                         llm_error *err);

/* The same for a GGUF file of `size` bytes that `read` provides: first the header, then each tensor. */
LLM_API llm_status llm_model_load_callback(llm_model **out, llm_read_fn read, void *user, uint64_t size,
                                           const llm_model_desc *desc, llm_error *err);

LLM_API void llm_model_free(llm_model *model);
LLM_API llm_model_info llm_model_get_info(const llm_model *model);

/* The tokenizer belongs to the model and is valid until llm_model_free. */
LLM_API const llm_tokenizer *llm_model_tokenizer(const llm_model *model);

/* The file's metadata as text: GGUF's values, or those of config.json, whose nested ones have keys like
   "rope_scaling.factor". Arrays are left out. NULL if there is no such key, or no i-th one. The strings belong to the
   model and are valid until llm_model_free. */
LLM_API const char *llm_model_meta(const llm_model *model, const char *key);
LLM_API const char *llm_model_meta_key(const llm_model *model, int i);

/* These read only the file's header, and tell what llm_model_load, llm_model_load_memory and llm_model_load_callback
   would load. Like those they fail if the model is damaged or not supported, but do not read the weights and the
   tokenizer. */
LLM_API llm_status llm_model_read_info(const char *path, const llm_model_desc *desc, llm_model_info *info,
                                       llm_error *err);
LLM_API llm_status llm_model_read_info_memory(const void *data, size_t size, const llm_model_desc *desc,
                                              llm_model_info *info, llm_error *err);
LLM_API llm_status llm_model_read_info_callback(llm_read_fn read, void *user, uint64_t size, const llm_model_desc *desc,
                                                llm_model_info *info, llm_error *err);

/* Makes a model's weights int8 once, so that loading them as LLM_DTYPE_INT8 needs no conversion. `from` is a Hugging
   Face directory with weights of F32, F16 or BF16; `to` is a new directory of the same kind. The matrices inside the
   layers (..._proj.weight) become int8 with one f32 scale per output, named as compressed-tensors does; everything else
   is copied. Loaded as int8, `to` gives the same bits as `from`. A failure may leave a part of `to` behind. */
LLM_API llm_status llm_quantize_directory(const char *from, const char *to, const llm_host *host, llm_error *err);

/* ---- Tokenizer ----------------------------------------------------------------------------------------------- */

typedef int32_t llm_token;

/* Flags for text to tokens and back. */
enum {
    /* Encoding: add the tokens that the model's file wants at the beginning (BOS) and the end (EOS) of a text, unless
       they are there already. Usual for a prompt, wrong for a rendered chat. */
    LLM_TOKENS_ENDS = 1,
    /* Encoding: text like "<|im_end|>" becomes the special token; without this flag it is plain text. Decoding: show
       special tokens; without this flag they are left out. */
    LLM_TOKENS_SPECIAL = 2
};

/* Loads a tokenizer alone: from a GGUF file, which needs no weights; from a directory with tokenizer.json or
   tokenizer.model as published on Hugging Face; or from one of these files, which is read with those beside it. */
LLM_API llm_status llm_tokenizer_load(llm_tokenizer **out, const char *path, const llm_host *host, llm_error *err);

/* The same from a GGUF file in memory, or from a function; see llm_model_load_memory, llm_model_load_callback. */
LLM_API llm_status llm_tokenizer_load_memory(llm_tokenizer **out, const void *data, size_t size, const llm_host *host,
                                             llm_error *err);
LLM_API llm_status llm_tokenizer_load_callback(llm_tokenizer **out, llm_read_fn read, void *user, uint64_t size,
                                               const llm_host *host, llm_error *err);

/* Only for tokenizers from llm_tokenizer_load and its variants; a model frees its own. */
LLM_API void llm_tokenizer_free(llm_tokenizer *tokenizer);

/* Functions that fill a buffer count like snprintf: they write what fits into `capacity` and return the size of the
   whole result. If that is above the capacity (for text: not below it, because of the NUL), the result was cut; call
   again with more room. */

/* Text to token ids. A capacity of 4 * n_bytes + 8 always suffices; n_bytes + 8 does for valid UTF-8 and ordinary
   vocabularies. Returns -1 and explains in *err if memory runs out. The text need not be NUL-terminated and may hold
   any bytes; each byte that is not part of valid UTF-8 counts as U+FFFD. Characters without a token become the unknown
   token, or are dropped if there is none. */
LLM_API int64_t llm_encode(const llm_tokenizer *tokenizer, const char *text, size_t n_bytes, unsigned flags,
                           llm_token *ids, size_t capacity, llm_error *err);

/* Token ids to text and a NUL; returns the bytes of the whole text without the NUL. Ids outside the vocabulary are
   skipped. The text may begin or end inside a character: for output that comes token by token use a stream. */
LLM_API size_t llm_decode(const llm_tokenizer *tokenizer, const llm_token *ids, size_t n_ids, unsigned flags,
                          char *text, size_t capacity);

/* Turns a stream of tokens into whole UTF-8 characters. Start with all zero. */
typedef struct llm_text_stream {
    unsigned flags; /* LLM_TOKENS_SPECIAL: show special tokens                                                     */
    bool started;   /* false until the first token; then the space that SentencePiece puts before a text is dropped */
    unsigned char pending[4]; /* the first bytes of a character that is not complete yet                             */
    int n_pending;
} llm_text_stream;

/* Writes the characters that `token` completes, and a NUL; returns their bytes without the NUL. If the result is not
   below `capacity`, nothing was written and the stream is unchanged; call again with more room. Token -1 ends the text.
   A byte that cannot be part of a character is shown as U+FFFD. */
LLM_API size_t llm_stream_token(const llm_tokenizer *tokenizer, llm_text_stream *stream, llm_token token, char *text,
                                size_t capacity);

/* The bytes of one token, not NUL-terminated and not always whole UTF-8 characters; NULL for an id outside the
   vocabulary. They belong to the tokenizer. n_bytes may be NULL. */
LLM_API const char *llm_token_bytes(const llm_tokenizer *tokenizer, llm_token id, size_t *n_bytes);
LLM_API bool llm_token_is_special(const llm_tokenizer *tokenizer, llm_token id);
LLM_API bool llm_token_is_end(const llm_tokenizer *tokenizer, llm_token id); /* ends a text or a turn          */
LLM_API int llm_tokenizer_n_vocab(const llm_tokenizer *tokenizer);
LLM_API llm_token llm_tokenizer_bos(const llm_tokenizer *tokenizer); /* -1 if there is none                    */
LLM_API llm_token llm_tokenizer_eos(const llm_tokenizer *tokenizer); /* -1 if there is none                    */

/* ---- Chat ---------------------------------------------------------------------------------------------------- */

typedef struct llm_message {
    const char *role; /* "system", "user", "assistant", or another one that the template knows */
    const char *content;
} llm_message;

typedef struct llm_chat_desc {
    const llm_message *messages; /* [n_messages]                                                                  */
    int n_messages;
    /* Instead of messages: a JSON list of them in the form that OpenAI's API and transformers use, with tool_calls,
       tool_call_id, name, reasoning_content and whatever else the template looks at. */
    const char *messages_json;
    const char *tools_json;     /* a JSON list of the tools that the model may call; NULL: none                  */
    const char *variables_json; /* a JSON object: more variables of the template, as {"enable_thinking": false}  */
    bool open_answer;           /* end with the start of the assistant's turn                                    */
} llm_chat_desc;

/* The ids of a conversation, as llm_generate makes them from its messages: rendered with the model's chat template,
   which is a program in Jinja and is run as transformers runs it. The text of a special token inside a message, a tool
   or a variable stays plain text. Returns how many ids there are, or -1 and an explanation in *err, as llm_encode
   does; LLM_ERROR_ARGUMENT if the template refuses the messages. */
LLM_API int64_t llm_chat_encode(const llm_tokenizer *tokenizer, const llm_chat_desc *desc, llm_token *ids,
                                size_t capacity, llm_error *err);

/* The same as text and a NUL; returns the bytes of the whole text without the NUL, or -1. Encode it with
   LLM_TOKENS_SPECIAL but without LLM_TOKENS_ENDS, since the template writes BOS itself. Then the text of a special
   token inside a message becomes that token: use llm_chat_encode for text that you do not trust. */
LLM_API int64_t llm_chat_render(const llm_tokenizer *tokenizer, const llm_chat_desc *desc, char *text, size_t capacity,
                                llm_error *err);

/* The template's text; NULL if the model's file has none. Valid as long as the tokenizer. */
LLM_API const char *llm_chat_template_text(const llm_tokenizer *tokenizer);

/* ---- Context ------------------------------------------------------------------------------------------------- */

typedef struct llm_context llm_context;

enum { LLM_CACHE_BLOCK = 32 }; /* the KV cache is handed out in blocks of this many positions */

typedef struct llm_context_desc {
    int n_ctx; /* positions a sequence can hold; 0: what the model was trained for, at most 4096 */
    int n_seq; /* sequences; 0: 1                                                                */
    /* Cache positions of all sequences; 0: n_ctx * n_seq. See llm_context_n_free. */
    int n_cache;
    /* Max tokens of one pass; longer batches take several; 0: 512. On a GPU the logits of a token depend a little on
       the size of its pass if that is above 16 tokens; n_batch = 16 prevents it. */
    int n_batch;
    int n_logits;          /* rows of logits one llm_forward can return; 0: n_seq                             */
    int n_threads;         /* 0: one per physical core                                                        */
    llm_dtype cache_dtype; /* f32, bf16 or int8; 0: bf16, but f32 on the CPU if weights are f32 or f16        */
    /* Polled between layers; true makes llm_forward return LLM_ERROR_CANCELLED, and ends llm_generate unless its own
       `cancel` is set. */
    bool (*cancel)(void *user);
    void *cancel_user;
    /* Uses the host's threads instead of ours. It must run task(arg, i) for i = 0 .. n-1, all at the same time since
       they wait for each other, and return when all have returned. `user` is host.user. */
    void (*parallel)(void *user, int n, void (*task)(void *arg, int i), void *arg);
    llm_host host; /* zero: the model's */
} llm_context_desc;

/* The model must stay until the context is freed. */
LLM_API llm_status llm_context_create(llm_context **out, const llm_model *model, const llm_context_desc *desc,
                                      llm_error *err);
LLM_API void llm_context_free(llm_context *ctx);

/* The settings of the context, with defaults filled in. */
LLM_API const llm_model *llm_context_model(const llm_context *ctx);
LLM_API int llm_context_n_ctx(const llm_context *ctx);
LLM_API int llm_context_n_seq(const llm_context *ctx);
LLM_API int llm_context_n_cache(const llm_context *ctx);
LLM_API int llm_context_n_batch(const llm_context *ctx);
LLM_API int llm_context_n_logits(const llm_context *ctx);
LLM_API int llm_context_n_threads(const llm_context *ctx); /* fewer than wanted if the system gave no more */

/* Free positions of the cache. A sequence takes whole blocks of LLM_CACHE_BLOCK positions, so one of 33 tokens takes
   64. A fork shares its parent's blocks. If it begins in the middle of a block, it takes one more when it first grows;
   fork at a multiple of LLM_CACHE_BLOCK to avoid that. Truncating a sequence frees the blocks after its new end. */
LLM_API int llm_context_n_free(const llm_context *ctx);

typedef struct llm_memory {
    uint64_t weights, cache, scratch; /* bytes */
} llm_memory;

/* The memory that a model and one context take. *info comes from llm_model_read_info, which loads nothing, or from
   llm_model_get_info. */
LLM_API llm_status llm_memory_estimate(const llm_model_info *info, const llm_context_desc *desc, llm_memory *out,
                                       llm_error *err);

/* ---- Generation ---------------------------------------------------------------------------------------------- */

typedef struct llm_sampler llm_sampler; /* see Sampler              */
typedef struct llm_draft llm_draft;     /* see Speculative decoding */

typedef enum llm_stop {
    LLM_STOP_NONE = 0,
    LLM_STOP_END,     /* the model ended its text or turn                           */
    LLM_STOP_LENGTH,  /* max_tokens                                                 */
    LLM_STOP_CONTEXT, /* the sequence is full: it has n_ctx tokens                  */
    LLM_STOP_CACHE,   /* the cache of all sequences is full: no block is free       */
    LLM_STOP_TOKEN,   /* one of stop_tokens                                         */
    LLM_STOP_STRING,  /* one of stop_strings                                        */
    LLM_STOP_CALLBACK /* on_text or on_token returned false, or `cancel` true       */
} llm_stop;

typedef struct llm_generate_desc {
    /* The question: set exactly one of prompt, messages, chat and tokens. The longest prefix that any sequence of the
       context holds is reused; the rest of this sequence is discarded. */
    const char *prompt;          /* text to continue                                                              */
    const llm_message *messages; /* a conversation, rendered with the model's chat template and an open answer    */
    int n_messages;
    const llm_chat_desc *chat; /* a conversation with tools or variables                                        */
    const llm_token *tokens;   /* ids, used as they are                                                             */
    int n_tokens;

    /* Above 0: if the messages leave fewer tokens than this free of n_ctx, the oldest turns are left out. A turn begins
       with a message of "user". The "system" messages at the beginning and the last turn stay. More turns are left out
       than needed, up to half of n_ctx, because the others must be computed again: so this is rarely needed. */
    int keep_free;

    int seq;                         /* the sequence to use, or LLM_SEQ_ANY */
    int max_tokens;                  /* 0 or less: until the model ends or there is no more room */
    llm_sampler *sampler;            /* NULL: greedy                                                              */
    const char *const *stop_strings; /* none of them is shown                                                     */
    int n_stop_strings;
    const llm_token *stop_tokens;
    int n_stop_tokens;
    bool ignore_end; /* go on after the model's end-of-text tokens                                                */

    llm_draft *draft; /* speculative decoding; the context's n_logits must be above 1                             */
    int draft_max;    /* max guesses in a pass, up to LLM_DRAFT_MAX and the context's n_logits - 1; 0: that many  */
    /* Matters at a temperature above 0. If true, a seed gives the same text as without a draft: a guess is right only
       if it is the token that the model draws. If false, guesses are checked by rejection sampling: more of them are
       right, but the text depends on how many there were, and so on timing. */
    bool draft_keeps_text;

    bool (*on_text)(void *user, const char *text, size_t n_bytes); /* whole UTF-8 characters, NUL-terminated      */
    bool (*on_token)(void *user, llm_token token, const char *bytes, size_t n_bytes); /* raw, as they come        */
    bool (*cancel)(void *user); /* polled between layers, so also within a long prompt; NULL: the context's */
    void *user;
} llm_generate_desc;

enum { LLM_DRAFT_MAX = 15 }; /* max guesses that one pass can check */

/* Instead of a sequence's number in llm_generate_desc: the library picks one that is empty or that it picked before and
   nobody uses now. What such a sequence holds is kept, so that prompts that begin like it start from there. When room
   is needed, the one that was used the longest time ago is cut from its end. A sequence that the host names in a call
   is the host's, and is not touched. */
enum { LLM_SEQ_ANY = -2 };

typedef struct llm_draft_stats {
    int n_passes;                         /* passes that checked guesses                                       */
    int n_proposed, n_accepted;           /* guesses that were checked; that were right                        */
    int n_by_accepted[LLM_DRAFT_MAX + 1]; /* [k]: passes in which k guesses were right                         */
    double tokens_per_pass;               /* in passes that checked guesses                                    */
    double draft_seconds, pass_seconds;   /* time in the draft; in all passes                                  */
    double speedup; /* over plain decoding, whose time comes from plain passes in between; 0: there were none  */
    bool failed;    /* the draft failed and was not used again                                                 */
} llm_draft_stats;

typedef struct llm_stats {
    llm_stop stop;
    int stop_index;      /* which of stop_strings or stop_tokens                                                   */
    int n_prompt;        /* tokens of the prompt                                                                   */
    int n_left_out;      /* messages left out, see keep_free                                                          */
    int n_reused;        /* how many of them were not computed, since this or another sequence held them           */
    int n_shared;        /* how many of these came from another sequence                                           */
    int seq;             /* the sequence                                                                           */
    int n_generated;     /* tokens shown; an end token, or one of stop_tokens, is not counted */
    int n_decode_passes; /* forward passes after the prompt's                               */
    double prefill_seconds, decode_seconds; /* until the first token's logits; after it                        */
    uint64_t decode_bytes;                  /* weights and cache read while decoding                           */
    llm_draft_stats draft;
} llm_stats;

/* Runs the prompt and generates. stats may be NULL. Cancellation is not an error: it is stats->stop. Afterwards the
   sequence holds the prompt and the n_generated tokens, except the last one, which has not been fed to the model yet.
   If an end token or one of stop_tokens ended the text, all of them are there, and that token is not. If the prompt was
   cancelled or failed, the sequence holds what its finished passes (of n_batch tokens) computed, and the same call goes
   on from there. A token may be any bytes, so a text that is encoded again need not give the tokens that were drawn: to
   continue it without computing it again, pass `tokens`. A sampler that leaves no token (all forbidden) is
   LLM_ERROR_ARGUMENT, and a logit that is NaN LLM_ERROR_FORMAT. */
LLM_API llm_status llm_generate(llm_context *ctx, const llm_generate_desc *desc, llm_stats *stats, llm_error *err);

/* Runs the prompt only, so that a later llm_generate with a prompt that begins like this one answers at once.
   Afterwards the logits of the prompt's last token are llm_logits(ctx, stats->n_prompt - stats->n_reused - 1). */
LLM_API llm_status llm_prefill(llm_context *ctx, const llm_generate_desc *desc, llm_stats *stats, llm_error *err);

/* ---- Streams ------------------------------------------------------------------------------------------------- */

/* A stream is what llm_generate does, for many texts at the same time: one pass computes the next token of all of them,
   which takes little longer than for one. On the CPU each text is the same as from llm_generate alone, except with a
   draft whose guesses are checked by rejection sampling. A text does not change when others begin, end, fail or are
   cancelled. */
typedef struct llm_stream llm_stream;

/* Begins a text; llm_step then computes it. The description is that of llm_generate. The sampler, its biases, the draft
   and `user` must be valid until llm_stream_free; all else that it points at is copied. Two streams may share a draft,
   but not a sampler with a temperature above 0. Between steps the host may use the context's other sequences, also with
   llm_generate. The stream's own sequence can be read and forked; other calls that name it fail. llm_score fails while
   a stream is running. This call fails with LLM_ERROR_CONTEXT_FULL if no sequence is free or the cache has no room for
   the prompt. Then, and after any other failure, *out is NULL and the other streams go on. */
LLM_API llm_status llm_stream_begin(llm_stream **out, llm_context *ctx, const llm_generate_desc *desc, llm_error *err);

/* Computes one pass for all streams that are running, and calls their callbacks. The pass has the next token of each
   text. The rest of its n_tokens tokens (at most n_batch) are shared among the prompts that are still being read, so a
   long prompt does not stop the other texts. n_tokens 0: n_batch while only prompts are read, else 128. If n_tokens or
   the context's n_logits is below the number of streams, they take turns.
   *n_running becomes the number of streams that are still running; n_running may be NULL. An error means that the pass
   failed, and with it all streams in it. An error of one stream alone is returned by llm_stream_result. If a callback
   leaves by longjmp or an exception, its stream ends with LLM_STOP_CALLBACK, and the others go on. */
LLM_API llm_status llm_step(llm_context *ctx, int n_tokens, int *n_running, llm_error *err);

LLM_API bool llm_stream_is_running(const llm_stream *stream);

/* Returns LLM_OK, or why the stream failed. stats->stop is LLM_STOP_NONE while it is running and after a failure. The
   times are wall-clock times, so they include the work for other streams. stats may be NULL. */
LLM_API llm_status llm_stream_result(const llm_stream *stream, llm_stats *stats, llm_error *err);

/* Frees a stream, and ends it if it is running; its sequence holds what was computed. Must come before
   llm_context_free. This is also allowed inside a callback: the stream then calls nothing any more. */
LLM_API void llm_stream_free(llm_stream *stream);

/* ---- Sequences ----------------------------------------------------------------------------------------------- */

/* A sequence is a list of tokens whose keys and values are in the cache. It is named by a number below n_seq and is
   empty at first. */
LLM_API int llm_seq_length(const llm_context *ctx, int seq);

/* [llm_seq_length] tokens. The pointer stays valid until the context is freed, but what it points at changes with the
   sequence. */
LLM_API const llm_token *llm_seq_tokens(const llm_context *ctx, int seq);

/* Keeps the first `length` tokens and frees the cache of the others, see llm_context_n_free. */
LLM_API llm_status llm_seq_truncate(llm_context *ctx, int seq, int length, llm_error *err);

/* Replaces `seq` by the first `length` tokens of `parent`. Both then share the cache of these tokens; only later ones
   are stored separately. The parent may be continued, truncated or replaced. */
LLM_API llm_status llm_seq_fork(llm_context *ctx, int seq, int parent, int length, llm_error *err);

/* A sequence's cache as bytes, for llm_seq_restore into a context of the same model, backend and cache type. The format
   may change with the version. A buffer smaller than llm_seq_save_size is an error. */
LLM_API size_t llm_seq_save_size(const llm_context *ctx, int seq);
LLM_API llm_status llm_seq_save(const llm_context *ctx, int seq, void *buffer, size_t size, llm_error *err);
LLM_API llm_status llm_seq_restore(llm_context *ctx, int seq, const void *buffer, size_t size, llm_error *err);

/* ---- Forward pass -------------------------------------------------------------------------------------------- */

typedef struct llm_batch {
    int n_tokens;
    const llm_token *tokens; /* [n_tokens]                                                                        */
    const int *seqs;         /* [n_tokens] the sequence each is appended to; NULL: sequence 0                     */
    const bool *logits;      /* [n_tokens] whose logits are wanted; NULL: the last of each sequence               */
} llm_batch;

/* Appends the batch's tokens to their sequences. Everything is checked before anything is done; if it is cancelled or
   fails, the sequences are as they were before, also if the batch took several passes. */
LLM_API llm_status llm_forward(llm_context *ctx, const llm_batch *batch, llm_error *err);

/* The logits [n_vocab] of the batch's i-th token, valid until the context's next pass; NULL if they were not wanted. */
LLM_API const float *llm_logits(const llm_context *ctx, int i);

/* Bytes per second that this context's threads reach when they only read the model's weights: the limit of decoding. */
LLM_API double llm_measure_bandwidth(llm_context *ctx);

/* Floating-point operations per second that they reach when they do nothing else: the limit of prefill. */
LLM_API double llm_measure_flops(llm_context *ctx);

/* ---- Sampler ------------------------------------------------------------------------------------------------- */

typedef struct llm_logit_bias {
    llm_token token;
    float bias; /* added to the logit; -INFINITY forbids the token, INFINITY forces it, at any temperature */
} llm_logit_bias;

struct llm_sampler {
    float temperature;    /* 0: greedy                                                                            */
    int top_k;            /* keep the k most likely; 0: all                                                       */
    float top_p;          /* keep the most likely until their sum reaches p; 0: all                               */
    float min_p;          /* keep those at least min_p times as likely as the most likely; 0: all                 */
    float repeat_penalty; /* divides (multiplies, if negative) the logits of recent tokens; 0: off                */
    int repeat_window;    /* how many recent tokens; 0: 64                                                        */
    const llm_logit_bias *biases; /* the host's; they must stay while the sampler is used                         */
    int n_biases;
    uint64_t seed;
    uint64_t n_drawn; /* the state: how many random numbers were used                                             */
};

/* Picks a token by the logits of the batch's i-th token, which belongs to sequence `seq`: its last tokens are the
   recent ones. The order is: biases, repetition penalty, temperature, top-k, top-p, min-p. The same seed gives the same
   tokens on every machine. Ties go to the lower id. A NULL sampler is greedy. Returns -1 if there is nothing to pick:
   logits i were not wanted, one of them is NaN, all tokens are forbidden, n_biases is above 0 but biases is NULL, or
   ctx is inside one of its callbacks. To constrain the text, the host may change the biases between calls and in
   on_token; on a GPU this only works if n_biases is above 0 from the start. */
LLM_API llm_token llm_sample(llm_context *ctx, int i, int seq, llm_sampler *sampler);

/* ---- Speculative decoding ------------------------------------------------------------------------------------ */

/* A draft guesses how a text goes on. llm_generate has the model check several guesses in one pass, which costs little
   more than a pass for one token, and keeps those that are right (Leviathan et al. 2023, arXiv:2211.17192). Guesses
   change the speed, never the text: at temperature 0, and with guesses that come without probabilities, the text is
   that of plain decoding, token for token; with probabilities it is another draw from the same distribution. The number
   of guesses follows from how often they were right and from the measured times of passes and guesses; where guessing
   does not pay, decoding is plain. */

enum { LLM_DRAFT_KINDS = 8 }; /* kinds of guesses a draft may tell apart by how much it trusts them */

typedef struct llm_draft_request {
    llm_context *ctx; /* the one that generates; its sequence `seq` holds the text without the last token            */
    int seq;
    const llm_token *tokens; /* [n_tokens] the text so far                                                           */
    int n_tokens;
    const int *n_wanted;        /* [LLM_DRAFT_KINDS] how many guesses of each kind pay off now; may be 0             */
    const llm_sampler *sampler; /* the model's: a copy of it draws the first guess as the model would                */
    bool (*cancel)(void *user); /* to be polled, may be NULL; if true, return LLM_ERROR_CANCELLED                    */
    void *cancel_user;
} llm_draft_request;

typedef struct llm_draft_guesses {
    int n; /* 0: no idea                                                                                             */
    llm_token tokens[LLM_DRAFT_MAX];
    int kind; /* that of all guesses, 0 to LLM_DRAFT_KINDS - 1; a higher one is trusted more. Ignored with has_q     */
    /* True: guess i was drawn from the distribution q[i], which sums to 1, with random numbers that the model's own
       draws do not use. False: a guess is right if the model draws the same token. A draft must set it always or never.
       Once a guess is drawn, it must stay among the guesses, whatever it is. Whether another one is drawn may depend on
       those before it and on q: a draft may stop after an end of text, or before a q without a likely token. If there
       is no room for q (at temperature 0, or with draft_keeps_text), has_q counts as false. */
    bool has_q;
    float *q[LLM_DRAFT_MAX]; /* [n_vocab of the model] each, room to fill; NULL where probabilities are not wanted  */
} llm_draft_guesses;

/* What llm_generate has learnt about a draft, from one text to the next. A host only sets it to zero. */
enum {
    LLM_DRAFT_LEARNT_SIZES = 5, /* passes have 1, 2, 4, 8 or 16 rows                                                 */
    LLM_DRAFT_LEARNT_TIMES = 5  /* timing samples kept per size                                                      */
};

typedef struct llm_draft_learnt_times {
    float recent[LLM_DRAFT_LEARNT_TIMES]; /* seconds                                                                 */
    int n, age;                           /* samples; passes since the last                                          */
} llm_draft_learnt_times;

typedef struct llm_draft_learnt {
    /* Of the guesses of a kind at a place, given that all before them were right, n_right of n_known were right. Both
       decay over time. */
    float n_right[LLM_DRAFT_KINDS][LLM_DRAFT_MAX];
    float n_known[LLM_DRAFT_KINDS][LLM_DRAFT_MAX];
    llm_draft_learnt_times passes[LLM_DRAFT_LEARNT_SIZES], guess; /* a pass of each size; one guess                  */
    int n_in_step;                 /* rounds in a row that used it, up to 2                                          */
    double seconds, trial_seconds; /* of decoding; how much of that tried guesses that did not seem to pay           */
} llm_draft_learnt;

/* A draft: one of the library's, see below, or a host's own. Streams of one context may share it. */
struct llm_draft {
    const char *name;
    /* Fills *guesses, which come zeroed but for q, with at most n_wanted of their kind. A failure here does not fail
       the generation: it goes on without the draft. */
    llm_status (*propose)(void *user, const llm_draft_request *request, llm_draft_guesses *guesses, llm_error *err);
    void (*close)(void *user); /* for llm_draft_free, may be NULL                                                    */
    void *user;
    llm_draft_learnt learnt; /* zero at first                                                                        */
};

/* Prompt lookup: finds the text's last tokens earlier in the text and guesses that it goes on as it did there. It needs
   no model, costs next to nothing, and is right where a text repeats its prompt: summaries, edits, quotations. */
LLM_API llm_draft llm_draft_lookup(void);

/* A model as the draft of what `ctx` generates. Its vocabulary must be the same, but may be shorter or longer (padded).
   The same weights in another type (the file loaded twice, say with LLM_DTYPE_INT4) read the context's own KV cache, so
   that they take no cache and no time for the prompt; another model has its own cache for as many sequences, and reads
   the prompt before its first guess. The draft works on the context's threads, and must be freed before the context and
   the model. */
LLM_API llm_status llm_draft_model(llm_draft *out, llm_context *ctx, const llm_model *model, llm_error *err);
LLM_API void llm_draft_free(llm_draft *draft);

/* ---- Scoring ------------------------------------------------------------------------------------------------- */

/* How likely is each of some endings after a context? The log-likelihood of an ending is the sum of the logarithms of
   its tokens' probabilities, each given all that stands before it. */
typedef struct llm_question {
    const llm_token *context; /* [n_context], at least one                                                        */
    int n_context;
    int n_endings;
    const llm_token *const *endings; /* [n_endings] of [n_ending[e]] tokens, at least one each                    */
    const int *n_ending;
} llm_question;

/* The tokens of a context and of one ending, one behind the other, as the LM evaluation harness has them: white space
   at the context's end is moved to the ending; the context's tokens are those of the context alone, the ending's those
   of the whole text without the first *n_context. An empty context is the BOS token or, if there is none, EOS. Flags
   and result are those of llm_encode; the harness sets both flags. */
LLM_API int64_t llm_encode_pair(const llm_tokenizer *tokenizer, const char *context, const char *ending, unsigned flags,
                                llm_token *ids, size_t capacity, int64_t *n_context, llm_error *err);

/* How the questions are cut into batches. Use LLM_SCHEDULE_PACKED. The others are the schedules of other programs, for
   comparison. On the CPU all give the same bits. */
typedef enum llm_schedule {
    LLM_SCHEDULE_PACKED = 0, /* passes full of needed tokens: no padding, no token computed twice                  */
    LLM_SCHEDULE_FIXED,      /* baseline: a fixed number of texts at a time, in order, padded to the longest       */
    LLM_SCHEDULE_DP          /* baseline: texts by length, cut into padded batches by dynamic programming          */
} llm_schedule;

typedef struct llm_score_desc {
    llm_schedule schedule;
    bool recompute_context; /* baseline: each ending computes the context again, instead of all from one cache     */
    int batch;              /* LLM_SCHEDULE_FIXED: texts in a batch; 0: 32. LLM_SCHEDULE_DP: if above 0, dynamic
                               programming cuts only the contexts, and a batch has this many endings */
    int batch_context;      /* LLM_SCHEDULE_FIXED: contexts in a batch; 0: as many as texts                        */
    int min_tokens;         /* LLM_SCHEDULE_DP: min tokens of a batch of endings, where possible; 0: 512           */
    int min_context_tokens; /* ... of a batch of contexts; 0: 4096                                                 */
    int mini_batch;         /* not packed: max. tokens of contexts in a pass, so that in a pipeline they take as long
                               as endings do; 0: the context's n_batch */
    /* Called for each question once it is answered, with its [n_endings] log-likelihoods. Returning false stops the
       work with LLM_ERROR_CANCELLED. */
    bool (*on_question)(void *user, int question, const double *log_likelihoods);
    void *user;
} llm_score_desc;

typedef struct llm_score_stats {
    int n_questions;     /* answered                                                                               */
    int64_t n_passes;    /* forward passes                                                                         */
    int64_t n_computed;  /* tokens computed; these include the next two                                            */
    int64_t n_padded;    /* padding                                                                                */
    int64_t n_redundant; /* tokens of a context, or first tokens common to all endings, that were computed again   */
    int64_t n_shared;    /* tokens of a context that were not computed, because an earlier context begins alike    */
    int64_t n_predicted; /* rows that went through the head                                                        */
    double seconds;
} llm_score_stats;

/* Fills log_likelihoods: the first question's [n_endings], then the second's, and so on. All sequences of the context
   are dropped. Its n_ctx must be enough for the longest text, and its n_seq for the question with the most endings;
   with more sequences and cache, batches become larger. A pass has at most n_batch tokens. A prefix common to all
   endings is moved into the context, and a prefix common to contexts that are close together is computed once. Tokens
   from which nothing is predicted are skipped, and the last layer and the head run only at scored positions. If
   log_likelihoods is NULL, nothing is computed, but stats tell what would be. */
LLM_API llm_status llm_score(llm_context *ctx, const llm_question *questions, int n_questions,
                             const llm_score_desc *desc, double *log_likelihoods, llm_score_stats *stats,
                             llm_error *err);

/* ---- NVIDIA GPU ---------------------------------------------------------------------------------------------- */

#ifdef LLM_CUDA
/* In llm_cuda.cu: compile that with nvcc, link with -lcublas, and set llm_model_desc.backend to one of these. Without a
   usable GPU llm_model_load fails with LLM_ERROR_DEVICE or LLM_ERROR_UNSUPPORTED; the host may then load for the CPU.
   In llm_generate the GPU picks the tokens itself, unless the sampler has biases or a penalty. A seed then gives the
   same text on every run on that GPU, and llm_logits returns NULL afterwards. With LLM_CUDA_EAGER the host picks.

   A model is loaded to the GPU that is current in the calling thread. With ranks, this holds only if that is not the
   first GPU. Otherwise rank r (tensor rank + number of tensor ranks * pipeline rank) takes GPU r modulo the number of
   GPUs that its process sees. In passes of up to 16 rows the bits are the same for any number of ranks. Ranks exchange
   their data through the host's memory. So several GPUs hold larger models, and a pipeline scores faster than one GPU,
   but tensor parallel decodes slower than one GPU that has room for the whole model. */
typedef enum llm_cuda_mode {
    LLM_CUDA_GRAPH = 0, /* passes of up to 16 rows run the fused kernels, launched as one recorded graph          */
    LLM_CUDA_FUSED,     /* the same kernels, launched one by one                                                  */
    LLM_CUDA_EAGER      /* one plain kernel per operation, launched one by one                                    */
} llm_cuda_mode;

LLM_API const llm_backend *llm_cuda_backend(void); /* the fastest, LLM_CUDA_GRAPH */
LLM_API const llm_backend *llm_cuda_backend_mode(llm_cuda_mode mode);
#endif

/* ==== BACKENDS: NOT FOR HOSTS ===================================================================================

   A program that uses the library needs nothing from here to the end of the declarations. This is the interface between
   llm.h and llm_cuda.cu: a backend stores weights and cache and computes on them. Everything else (tokens, sequences,
   sampling) is the same for all backends. The CPU's is built in. */

typedef struct llm_backend_shape {
    int n_vocab, n_layers, n_embd, n_ff, n_heads, n_kv_heads, head_dim, rope_dim;
    float rms_eps;
    const double *rope_frequencies; /* [rope_dim / 2] radians per position, for the pair (i, i + rope_dim / 2)    */
    float rope_scale;               /* sines and cosines are multiplied by it                                     */
    int window;                     /* positions a token attends to, itself included; 0: all before it            */
    bool tied_head;                 /* the head is the embedding                                                  */
    bool qkv_bias, qk_norm;         /* whether the model has these weights, see below                             */
    uint64_t weight_bytes;          /* the memory that the backend will need for them; 0: not known               */
} llm_backend_shape;

/* The n items from `first` on. */
typedef struct llm_backend_range {
    int first, n;
} llm_backend_range;

/* The part of a model that a rank has. It is given only these rows of each weight, and w.layer counts from its first
   layer. The ranks of a tensor group exchange whole units of these lengths, as the weights are cut at units too. A key
   head may be on two ranks, because each rank has the key heads that its query heads read. */
typedef struct llm_backend_ranks {
    llm_backend_shape shape; /* with its own layers, heads and key heads; all else is of the whole model          */
    llm_backend_range layers, heads, key_heads, embd, ff, vocab;
    int embd_unit, ff_unit, vocab_unit;
} llm_backend_ranks;

/* `tensor` and `pipeline` may be NULL; only their rank and size are read. */
LLM_API llm_backend_ranks llm_backend_find_ranks(const llm_backend_shape *whole, const llm_comm *tensor,
                                                 const llm_comm *pipeline);

typedef enum llm_backend_weight_kind {
    LLM_WEIGHT_EMBEDDING,      /* [n_vocab][n_embd], also the head if that is tied                                */
    LLM_WEIGHT_ATTENTION_NORM, /* [1][n_embd]                                                                     */
    LLM_WEIGHT_QKV,            /* [(n_heads + 2 * n_kv_heads) * head_dim][n_embd]: queries, keys, values          */
    LLM_WEIGHT_QKV_BIAS,       /* [(n_heads + 2 * n_kv_heads) * head_dim][1], if qkv_bias: added to QKV's results */
    LLM_WEIGHT_Q_NORM,         /* [1][head_dim], if qk_norm: each head's queries and keys go through an RMSNorm   */
    LLM_WEIGHT_K_NORM,         /* [1][head_dim]  before they are rotated                                          */
    LLM_WEIGHT_ATTENTION_OUT,  /* [n_embd][n_heads * head_dim]                                                    */
    LLM_WEIGHT_FFN_NORM,       /* [1][n_embd]                                                                     */
    LLM_WEIGHT_GATE_UP,        /* [2 * n_ff][n_embd]: gates, ups                                                  */
    LLM_WEIGHT_DOWN,           /* [n_embd][n_ff]                                                                  */
    LLM_WEIGHT_OUTPUT_NORM,    /* [1][n_embd]                                                                     */
    LLM_WEIGHT_HEAD            /* [n_vocab][n_embd]                                                               */
} llm_backend_weight_kind;

typedef struct llm_backend_weight {
    llm_backend_weight_kind kind;
    int layer, rows, cols;
    const void *source;
    void (*read_row)(const struct llm_backend_weight *weight, int row,
                     float *out); /* out[cols]; any thread may call it  */
    const void *(*raw_row)(const struct llm_backend_weight *weight, int row,
                           int *type); /* as the file has it; GGUF's type */
    float (*row_scale)(const struct llm_backend_weight *weight,
                       int row); /* by which a raw row of type I8 is multiplied     */
    bool has_q8_0;               /* some of its rows are of that type                                               */
    int n_parts, part_rows[3], part_types[3]; /* the tensors it is made of, one after the other; GGUF's types */
} llm_backend_weight;

typedef struct llm_backend_group {
    int8_t q[32];            /* of LLM_DTYPE_INT4: 0 .. 15 but for weights with has_q8_0                          */
    uint16_t scale, minimum; /* f16: w = q * scale + minimum                                                      */
} llm_backend_group;

/* A weight's row as LLM_DTYPE_INT4 holds it: ceil(cols / 32) groups. `scratch` has room for 32 floats of each. */
LLM_API void llm_backend_weight_groups(const llm_backend_weight *weight, int row, float *scratch,
                                       llm_backend_group *groups);

/* One forward pass. Rows of one sequence stand together, in order of position. */
typedef struct llm_backend_pass {
    int n_rows;
    const llm_token *tokens; /* [n_rows]                                                                      */
    const int *positions;    /* [n_rows]                                                                      */
    const int *seqs;         /* [n_rows]                                                                      */
    int n_logits;
    const int *logit_rows; /* [n_logits] ascending                                                          */
    int first_logits;      /* where in the context's logits the first of them goes                          */
    /* If there are targets, no logits are kept; only the logarithms of these tokens' probabilities are wanted. */
    int n_targets;
    const llm_token *targets; /* [n_targets]                                                                 */
    const int *target_rows;   /* [n_targets] ascending: index of the logit_rows entry that each one follows    */
    float *log_probs;         /* [n_targets] the results                                                     */
    const int *blocks; /* [n_seq][blocks_per_seq] which cache block holds LLM_CACHE_BLOCK positions of a sequence */
    int blocks_per_seq;
    bool (*cancel)(void *user);
    void *cancel_user;
    bool more; /* another pass of the same call follows                                                            */
    /* Not NULL while a batch is scored in a pipeline. Then only the last stage has the results, and it sets *stopped if
       a stage wants to stop. */
    bool *stopped;
} llm_backend_pass;

/* Tokens of one sequence that the device picks by itself: the first from the logits of the last pass, which had one row
   of them, every other one from those of the token before it. All but the last go through the model. */
typedef struct llm_backend_burst {
    int n;             /* tokens, at most LLM_BACKEND_BURST                                                      */
    int position;      /* of the first of them                                                           */
    const int *blocks; /* the sequence's, with room for all                                              */
    const llm_sampler *sampler; /* without biases and penalty; draws go on from n_drawn                           */
    bool (*on_token)(void *user, llm_token token); /* as soon as each is known; false: no more are wanted         */
    void *user;
} llm_backend_burst;

enum { LLM_BACKEND_BURST = 64 };

typedef struct llm_backend_desc {
    int n_seq, blocks_per_seq; /* of every pass's block tables                                                  */
    int n_cache_blocks, n_batch, n_logits, n_threads;
    llm_dtype dtype, cache_dtype; /* of the weights, and of the cache                                           */
    const char *isa;              /* the model's, see llm_model_desc                                            */
    void (*parallel)(void *user, int n, void (*task)(void *arg, int i), void *arg);
    llm_host host;
    /* Another context whose threads this one uses and, with share_cache, its cache. The lender is idle while this one
       works, and outlives it. A backend that does not support this returns LLM_ERROR_UNSUPPORTED. */
    void *lender;
    bool share_cache;
    llm_comm *tensor, *pipeline; /* of this context, or NULL                                                    */
} llm_backend_desc;

struct llm_backend {
    const char *name;
    /* Opens a model on the device; its weights follow one by one. close frees *out, also after a failure. */
    llm_status (*open)(void **out, const llm_backend_shape *shape, const llm_model_desc *desc, llm_error *err);
    llm_status (*upload)(void *model, const llm_backend_weight *weight, llm_error *err);
    void (*close)(void *model);
    uint64_t (*weight_bytes)(llm_dtype dtype, const llm_backend_weight *weight);
    uint64_t (*block_bytes)(const llm_backend_shape *shape, llm_dtype cache_dtype);
    uint64_t (*scratch_bytes)(const llm_backend_shape *shape, const llm_backend_desc *desc);
    llm_status (*context_create)(void **out, void *model, const llm_backend_desc *desc, llm_error *err);
    void (*context_free)(void *context);
    llm_status (*forward)(void *context, const llm_backend_pass *pass, llm_error *err);
    const float *(*logits)(void *context, int i);
    llm_status (*copy_block)(void *context, int to, int from, llm_error *err);
    llm_status (*read_block)(void *context, int block, void *bytes, llm_error *err);
    llm_status (*write_block)(void *context, int block, const void *bytes, llm_error *err);
    double (*measure_bandwidth)(void *context);
    double (*measure_flops)(void *context);
    /* May be NULL. The device goes on with the next tokens while the host handles one, so it never waits for the
       host. */
    llm_status (*burst)(void *context, const llm_backend_burst *burst, llm_error *err);
};

#ifdef __cplusplus
}
#endif
#endif /* LLM_H */

/* ============================================================================================================== */

#if defined(LLM_IMPLEMENTATION) && !defined(LLM__IMPLEMENTED) && !defined(LLM__KERNEL_PASS)

#if !defined(__GNUC__) && !defined(__clang__)
#error "llm.h is for gcc and clang (on Windows: MinGW); it uses their vector types, attributes and atomics"
#elif !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "llm.h is for little-endian machines: it reads model files as they are"
#endif

#include <errno.h>
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__SSE2__) && !defined(LLM_NO_SIMD)
#include <emmintrin.h>
#elif defined(__aarch64__) && !defined(LLM_NO_SIMD)
#include <arm_neon.h>
#endif

#if defined(_WIN32)
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#endif

/* The arithmetic of section 12 is exact to the bit: -ffast-math and contraction end here. */
#if defined(__clang__)
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wignored-pragmas" /* clang 14 for aarch64 does not have float_control */
#pragma float_control(push)
#pragma float_control(precise, on)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("no-fast-math", "fp-contract=off")
#endif

/* ==== 1 Base ====================================================================================================

   Memory, errors and text, used by everything below.

   Each object owns a pool of allocations; freeing the pool frees the object and all it owns. Work that can fail runs
   inside llm__env_run. When something goes wrong at any depth, llm__fail fills in the error and unwinds to
   llm__env_run with longjmp, and llm__alloc fails this way when memory runs out. So loaders do not check every step.
   The rule that makes this safe: code that runs there keeps no resource outside the pool. */

typedef struct llm__pool_block {
    struct llm__pool_block *prev, *next;
    size_t size;
    void *raw;                   /* the host's pointer; this block starts at the first aligned address in it */
    void (*release)(void *data); /* runs before the block is freed, for example to unmap a file; may be NULL */
} llm__pool_block;

typedef struct llm__pool {
    llm_host host;
    llm__pool_block *blocks;
} llm__pool;

typedef struct llm__env {
    llm__pool *pool;
    llm_error *err;
    llm_status status;
    const char *file; /* prefix of error messages, may be NULL */
    jmp_buf unwind;
} llm__env;

/* With host == NULL the pool uses malloc and free. */
static void llm__pool_init(llm__pool *pool, const llm_host *host) {
    memset(pool, 0, sizeof *pool);
    if (host) pool->host = *host;
}

static void llm__env_init(llm__env *env, llm__pool *pool, llm_error *err, const char *file) {
    env->pool = pool;
    env->err = err;
    env->file = file;
}

enum { LLM__ALIGN = 64 };

/* The host's allocator. (free) is in brackets because a host may have made a macro of it. */
static void *llm__alloc_raw(const llm_host *host, size_t size) {
    return host->alloc ? host->alloc(host->user, size) : malloc(size);
}

static void llm__alloc_raw_free(const llm_host *host, void *ptr) {
    if (host->alloc) (host->free)(host->user, ptr);
    else (free)(ptr);
}

/* Length in bytes of the well-formed character at p < end, or 0 if there is none. */
static size_t llm__utf8_length(const uint8_t *p, const uint8_t *end) {
    if (p[0] < 0x80) return 1;
    size_t n = p[0] >= 0xF0 ? 4 : p[0] >= 0xE0 ? 3 : 2;
    if (p[0] < 0xC2 || p[0] > 0xF4 || n > (size_t)(end - p)) return 0;
    for (size_t i = 1; i < n; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    if (p[0] == 0xE0 && p[1] < 0xA0) return 0; /* overlong          */
    if (p[0] == 0xED && p[1] > 0x9F) return 0; /* surrogates        */
    if (p[0] == 0xF0 && p[1] < 0x90) return 0; /* overlong          */
    if (p[0] == 0xF4 && p[1] > 0x8F) return 0; /* beyond U+10FFFF   */
    return n;
}

/* Drops an incomplete UTF-8 character at the end of text and replaces every other invalid byte by '?'. */
static void llm__utf8_trim(char *text) {
    size_t n = strlen(text), back = 0;
    while (back < n && back < 3 && ((unsigned char)text[n - 1 - back] & 0xC0) == 0x80) back++;
    unsigned char lead = back < n ? (unsigned char)text[n - 1 - back] : 0;
    size_t need = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC0 ? 2 : 1;
    if (need > back + 1) text[n - 1 - back] = 0;
    uint8_t *p = (uint8_t *)text, *end = p + strlen(text);
    while (p < end) {
        size_t length = llm__utf8_length(p, end);
        if (!length) *p = '?';
        p += length ? length : 1;
    }
}

#define LLM__PRINTF(f, a) __attribute__((format(printf, f, a)))
#define LLM__NORETURN __attribute__((noreturn))
#define LLM__NOINLINE __attribute__((noinline))
#define LLM__UNUSED __attribute__((unused))

static llm_status llm__error_v(llm_error *err, llm_status code, const char *file, const char *format, va_list args) {
    if (!err) return code;
    int n = file ? snprintf(err->message, sizeof err->message, "%s: ", file) : 0;
    if (n < 0 || (size_t)n >= sizeof err->message) n = 0;
    vsnprintf(err->message + n, sizeof err->message - (size_t)n, format, args);
    llm__utf8_trim(err->message);
    err->code = code;
    return code;
}

/* Fills *err and returns the code, so that callers can write `return llm__error(...)`. */
LLM__PRINTF(3, 4) static llm_status llm__error(llm_error *err, llm_status code, const char *format, ...) {
    va_list args;
    va_start(args, format);
    llm__error_v(err, code, NULL, format, args);
    va_end(args);
    return code;
}

/* Ends a public function. After a success *err says so, too. */
static llm_status llm__error_done(llm_error *err, llm_status status) {
    if (status || !err) return status;
    err->code = LLM_OK;
    err->message[0] = 0;
    return status;
}

/* Half an allocator would free one's memory with the other. */
static llm_status llm__host_check(const llm_host *host, llm_error *err) {
    if (!host || !host->alloc == !host->free) return LLM_OK;
    return llm__error(err, LLM_ERROR_ARGUMENT, "host.alloc and host.free must be given together, or neither");
}

LLM_API int llm_version(void) { return LLM_VERSION_NUMBER; }

LLM_API const char *llm_status_name(llm_status status) {
    static const char *const names[] = {"LLM_OK",
                                        "LLM_ERROR_ARGUMENT",
                                        "LLM_ERROR_IO",
                                        "LLM_ERROR_FORMAT",
                                        "LLM_ERROR_UNSUPPORTED",
                                        "LLM_ERROR_MEMORY",
                                        "LLM_ERROR_CONTEXT_FULL",
                                        "LLM_ERROR_CANCELLED",
                                        "LLM_ERROR_DEVICE"};
    return status >= LLM_OK && status <= LLM_ERROR_DEVICE ? names[status] : NULL;
}

/* Fills the error and unwinds to llm__env_run. Does not return. */
LLM__NORETURN LLM__PRINTF(3, 4) static void llm__fail(llm__env *env, llm_status code, const char *format, ...) {
    va_list args;
    va_start(args, format);
    llm__error_v(env->err, code, env->file, format, args);
    va_end(args);
    env->status = code;
    longjmp(env->unwind, 1);
}

/* Runs body(env, arg). Returns LLM_OK, or the status of the llm__fail that ended it. */
static llm_status llm__env_run(llm__env *env, void (*body)(llm__env *env, void *arg), void *arg) {
    env->status = LLM_OK;
    if (setjmp(env->unwind)) return env->status;
    body(env, arg);
    return LLM_OK;
}

LLM__PRINTF(2, 3) static void llm__log(const llm_host *host, const char *format, ...) {
    char line[400];
    if (!host->log) return;
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    llm__utf8_trim(line);
    host->log(host->user, line);
}

static void llm__env_progress(llm__env *env, float done) {
    const llm_host *host = &env->pool->host;
    if (host->progress && !host->progress(host->user, done))
        llm__fail(env, LLM_ERROR_CANCELLED, "loading was cancelled");
}

/* Allocates count * size bytes, aligned to LLM__ALIGN and not cleared. Returns NULL if that fails. */
static void *llm__alloc_try(llm__pool *pool, size_t count, size_t size) {
    size_t room = sizeof(llm__pool_block) + LLM__ALIGN;
    if (size && count > (SIZE_MAX - room) / size) return NULL;
    void *raw = llm__alloc_raw(&pool->host, count * size + room);
    if (!raw) return NULL;
    uintptr_t at = ((uintptr_t)raw + room) & ~(uintptr_t)(LLM__ALIGN - 1);
    llm__pool_block *block = (llm__pool_block *)at - 1;
    block->prev = NULL;
    block->next = pool->blocks;
    block->size = count * size;
    block->raw = raw;
    block->release = NULL;
    if (pool->blocks) pool->blocks->prev = block;
    pool->blocks = block;
    return (void *)at;
}

static void *llm__alloc(llm__env *env, size_t count, size_t size) {
    void *ptr = llm__alloc_try(env->pool, count, size);
    if (!ptr)
        llm__fail(env, LLM_ERROR_MEMORY, "out of memory: could not allocate %llu bytes",
                  (unsigned long long)count * size);
    return ptr;
}

static void *llm__alloc_zero(llm__env *env, size_t count, size_t size) {
    return memset(llm__alloc(env, count, size), 0, count * size);
}

static void llm__free(llm__pool *pool, void *ptr) {
    if (!ptr) return;
    llm__pool_block *block = (llm__pool_block *)ptr - 1;
    if (block->release) block->release(ptr);
    if (block->prev) block->prev->next = block->next;
    else pool->blocks = block->next;
    if (block->next) block->next->prev = block->prev;
    llm__alloc_raw_free(&pool->host, block->raw);
}

static void llm__pool_free(llm__pool *pool) {
    while (pool->blocks) llm__free(pool, pool->blocks + 1);
}

/* Sets the function that runs before the block is freed. */
static void llm__pool_on_free(void *ptr, void (*release)(void *data)) {
    ((llm__pool_block *)ptr - 1)->release = release;
}

static void llm__pool_release(void *data) { llm__pool_free((llm__pool *)data); }

/* Creates a pool inside env->pool for temporary memory. Callers may point env->pool at it for a while. */
static llm__pool *llm__pool_inner(llm__env *env) {
    llm__pool *pool = (llm__pool *)llm__alloc_zero(env, 1, sizeof *pool);
    pool->host = env->pool->host;
    llm__pool_on_free(pool, llm__pool_release);
    return pool;
}

/* Makes room for one more item in an array of `*capacity` items. Returns the array, which may have moved. */
static void *llm__alloc_grow(llm__env *env, void *items, size_t count, size_t *capacity, size_t size) {
    if (count < *capacity) return items;
    size_t wanted = *capacity ? *capacity * 2 : 16;
    void *moved = llm__alloc(env, wanted, size);
    if (count) memcpy(moved, items, count * size);
    llm__free(env->pool, items);
    *capacity = wanted;
    return moved;
}

/* Copies n bytes and adds a NUL. */
static char *llm__str_copy(llm__env *env, const char *text, size_t n) {
    char *copy = (char *)llm__alloc(env, n + 1, 1);
    if (n) memcpy(copy, text, n);
    copy[n] = 0;
    return copy;
}

/* A string of n bytes without a terminating NUL. */
typedef struct llm__str {
    const char *at;
    size_t n;
} llm__str;

static bool llm__str_is(llm__str s, const char *text) { return s.n == strlen(text) && !memcmp(s.at, text, s.n); }
static bool llm__str_equal(llm__str a, llm__str b) { return a.n == b.n && (a.n == 0 || !memcmp(a.at, b.at, a.n)); }

static int llm__str_compare(llm__str a, llm__str b) {
    int order = memcmp(a.at, b.at, a.n < b.n ? a.n : b.n);
    return order ? order : (a.n > b.n) - (a.n < b.n);
}

/* Writes a code point as UTF-8 and returns its length, 1 to 4 bytes. */
static size_t llm__utf8_encode(uint32_t c, uint8_t *out) {
    if (c < 0x80) {
        out[0] = (uint8_t)c;
        return 1;
    }
    size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6) out[i] = (uint8_t)(0x80 | (c & 0x3F));
    out[0] = (uint8_t)((0xF00u >> n & 0xF0) | c);
    return n;
}

/* Finds the first byte that is not part of a well-formed character; returns end if all are. */
static const uint8_t *llm__utf8_check(const uint8_t *p, const uint8_t *end) {
    while (p < end) {
        uint64_t eight;
        while (end - p >= 8 && (memcpy(&eight, p, 8), !(eight & 0x8080808080808080u))) p += 8;
        if (p == end) break;
        size_t n = llm__utf8_length(p, end);
        if (!n) break;
        p += n;
    }
    return p;
}

/* Decodes the well-formed character at p; *next becomes the address of the next one. */
static uint32_t llm__utf8_decode(const uint8_t *p, const uint8_t **next) {
    uint32_t c = p[0];
    if (c < 0x80) {
        *next = p + 1;
        return c;
    }
    int n = c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : 2;
    c &= 0x7Fu >> n;
    for (int i = 1; i < n; i++) c = c << 6 | (p[i] & 0x3F);
    *next = p + n;
    return c;
}

/* The start of the well-formed character that ends at p. */
static const uint8_t *llm__utf8_before(const uint8_t *p) {
    for (p--; (*p & 0xC0) == 0x80;) p--;
    return p;
}

/* Copies the text with U+FFFD for each byte that is not part of well-formed UTF-8. */
static uint8_t *llm__utf8_repair(llm__env *env, const uint8_t *p, const uint8_t *end, size_t *n) {
    uint8_t *out = (uint8_t *)llm__alloc(env, (size_t)(end - p), 3);
    for (*n = 0; p < end;) {
        size_t length = llm__utf8_length(p, end);
        memcpy(out + *n, length ? p : (const uint8_t *)"\xEF\xBF\xBD", length ? length : 3);
        *n += length ? length : 3;
        p += length ? length : 1;
    }
    return out;
}

/* The text as valid UTF-8: the text itself, or a copy; *end is adjusted. */
static const uint8_t *llm__utf8_valid(llm__env *env, const uint8_t *p, const uint8_t **end) {
    size_t n;
    if (llm__utf8_check(p, *end) == *end) return p;
    p = llm__utf8_repair(env, p, *end, &n);
    *end = p + n;
    return p;
}

/* How many bytes of a text to show in a message: at most 80, in whole characters. */
static int llm__str_shown(llm__str s) {
    size_t n = s.n < 80 ? s.n : 80;
    while (n && n < s.n && ((uint8_t)s.at[n] & 0xC0) == 0x80) n--;
    return (int)n;
}
/* The two arguments of a `%.*s` that shows text from a file. Long hostile names are cut so they cannot flood a
   message. */
#define LLM__SHOW(s) llm__str_shown(s), (s).at

/* Seconds on a clock that never goes back. */
static double llm__clock_now(void) {
#if defined(_WIN32)
    LARGE_INTEGER t, f;
    QueryPerformanceCounter(&t);
    QueryPerformanceFrequency(&f);
    return (double)t.QuadPart / (double)f.QuadPart;
#elif defined(CLOCK_MONOTONIC)
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#else /* -std=c99, and the host included system headers before this file could define _GNU_SOURCE */
    struct timeval t;
    gettimeofday(&t, NULL);
    return (double)t.tv_sec + 1e-6 * (double)t.tv_usec;
#endif
}

/* Little-endian integers at any alignment. */
static uint16_t llm__bytes_u16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
static uint32_t llm__bytes_u32(const uint8_t *p) { return llm__bytes_u16(p) | (uint32_t)llm__bytes_u16(p + 2) << 16; }
static uint64_t llm__bytes_u64(const uint8_t *p) { return llm__bytes_u32(p) | (uint64_t)llm__bytes_u32(p + 4) << 32; }

/* ==== 2 Files ===================================================================================================

   A file is one read-only range of bytes. Files with a path are memory-mapped, so nothing is read twice or copied. Of
   a file behind a read callback only the first LLM__FILE_START bytes are kept in memory. */

typedef struct llm__file {
    const uint8_t *data;
    uint64_t size, have; /* size of the file; number of bytes available at data */
    bool mapped;
    llm_read_fn read; /* reads the rest if the file is not mapped */
    void *user;
} llm__file;

#ifndef LLM__FILE_START
#define LLM__FILE_START (64u << 20) /* bytes kept in memory of a file that is not mapped; GGUF headers are shorter */
#endif

#if defined(_WIN32)
enum { LLM__SLASH = '\\' }; /* allowed in paths beside '/' */
#else
enum { LLM__SLASH = '/' };
#endif

static void llm__file_close(void *data) {
    llm__file *file = (llm__file *)data;
    if (!file->mapped) return;
#if defined(_WIN32)
    UnmapViewOfFile(file->data);
#else
    munmap((void *)(uintptr_t)file->data, (size_t)file->size);
#endif
}

#if defined(_WIN32)
/* Sets data and size. Returns NULL, or a description of the problem. */
static const char *llm__file_map(llm__file *file, const char *path) {
    wchar_t wide[1024];
    if (!MultiByteToWideChar(CP_UTF8, 0, path, -1, wide, 1024)) return "the path is too long or not UTF-8";
    HANDLE handle = CreateFileW(wide, GENERIC_READ, FILE_SHARE_READ, NULL, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, NULL);
    if (handle == INVALID_HANDLE_VALUE) {
        DWORD code = GetLastError();
        bool absent = code == ERROR_FILE_NOT_FOUND || code == ERROR_PATH_NOT_FOUND;
        return absent ? "no such file" : code == ERROR_ACCESS_DENIED ? "access is denied" : "cannot be opened";
    }
    LARGE_INTEGER size;
    const char *problem = NULL;
    HANDLE mapping = NULL;
    if (!GetFileSizeEx(handle, &size) || size.QuadPart <= 0) problem = "is empty";
    else if (!(mapping = CreateFileMappingW(handle, NULL, PAGE_READONLY, 0, 0, NULL))) problem = "cannot be mapped";
    else if (!(file->data = (const uint8_t *)MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0)))
        problem = "cannot be mapped";
    else file->size = (uint64_t)size.QuadPart;
    if (mapping) CloseHandle(mapping);
    CloseHandle(handle);
    return problem;
}
#else
/* A descriptor for reading that the host's child programs do not get; -1 and errno if there is none. */
static int llm__file_descriptor(const char *path) {
    const int flags = O_RDONLY | O_NONBLOCK; /* nobody waits for the other end of a pipe */
#if defined(O_CLOEXEC)
    return open(path, flags | O_CLOEXEC);
#else /* the host's headers are strict C99 */
    int fd = open(path, flags);
    if (fd >= 0) fcntl(fd, F_SETFD, FD_CLOEXEC);
    return fd;
#endif
}

static const char *llm__file_map(llm__file *file, const char *path) {
    int fd = llm__file_descriptor(path);
    if (fd < 0) return strerror(errno);
    struct stat st;
    const char *problem = NULL;
    if (fstat(fd, &st)) problem = strerror(errno);
    else if (!S_ISREG(st.st_mode)) problem = "is not a regular file";
    else if (st.st_size <= 0) problem = "is empty";
    else if ((uint64_t)st.st_size > SIZE_MAX) problem = "is too large for this machine's addresses";
    if (!problem) {
        void *data = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (data == MAP_FAILED) problem = strerror(errno);
        file->data = (const uint8_t *)data;
        file->size = (uint64_t)st.st_size;
    }
    close(fd);
    return problem;
}
#endif

/* Maps a file; it stays mapped until the returned object is freed. */
static llm__file *llm__file_open(llm__env *env, const char *path) {
    llm__file *file = (llm__file *)llm__alloc_zero(env, 1, sizeof *file);
    const char *problem = llm__file_map(file, path);
    if (problem) llm__fail(env, LLM_ERROR_IO, "the file cannot be read: %s", problem);
    file->mapped = true;
    file->have = file->size;
    llm__pool_on_free(file, llm__file_close);
    return file;
}

/* Makes a file of bytes that the host holds in memory. */
static llm__file *llm__file_memory(llm__env *env, const void *data, size_t size) {
    llm__file *file = (llm__file *)llm__alloc_zero(env, 1, sizeof *file);
    file->data = (const uint8_t *)data;
    file->size = file->have = size;
    return file;
}

/* Tells the system that n bytes of a mapped file are wanted soon, or (`done`) that it may drop them from this process;
   reading them again then takes them from the page cache. Works on whole pages, so the neighbours at both ends are
   affected, too. */
static void llm__file_advise(const llm__file *file, const uint8_t *data, uint64_t n, bool done) {
#if defined(MADV_WILLNEED) && defined(MADV_DONTNEED)
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)data & ~(page - 1);
    if (file->mapped && n)
        madvise((void *)first, (size_t)((uintptr_t)data + n - first), done ? MADV_DONTNEED : MADV_WILLNEED);
#else
    (void)file, (void)data, (void)n, (void)done;
#endif
}

/* Reads n bytes through the callback into newly allocated memory. */
static uint8_t *llm__file_read(llm__env *env, const llm__file *file, uint64_t offset, uint64_t n) {
    if (n > SIZE_MAX)
        llm__fail(env, LLM_ERROR_MEMORY, "out of memory: could not allocate %llu bytes", (unsigned long long)n);
    uint8_t *data = (uint8_t *)llm__alloc(env, (size_t)n, 1);
    if (n && !file->read(file->user, offset, data, (size_t)n))
        llm__fail(env, LLM_ERROR_IO, "the read callback failed to read %llu bytes at offset %llu",
                  (unsigned long long)n, (unsigned long long)offset);
    return data;
}

static llm__file *llm__file_function(llm__env *env, llm_read_fn read, void *user, uint64_t size) {
    llm__file *file = (llm__file *)llm__alloc_zero(env, 1, sizeof *file);
    file->read = read;
    file->user = user;
    file->size = size;
    file->have = size < LLM__FILE_START ? size : LLM__FILE_START;
    file->data = llm__file_read(env, file, 0, file->have);
    return file;
}

/* Where a model's file comes from: one of three. */
typedef struct llm__file_source {
    const char *path;
    const void *data;
    llm_read_fn read;
    void *user;
    uint64_t size; /* of data, or of what read reads */
} llm__file_source;

/* *source from a path, if there is one, or bytes or a function; what is missing is the caller's fault. */
static llm_status llm__file_check_source(const llm__file_source *source, llm_error *err) {
    if (source->path || source->data || source->read) return LLM_OK;
    return llm__error(err, LLM_ERROR_ARGUMENT, "there is nothing to load: the path, data or read function is NULL");
}

/* A file that is a single one. */
static llm__file *llm__file_open_source(llm__env *env, const llm__file_source *source) {
    if (source->data) return llm__file_memory(env, source->data, (size_t)source->size);
    if (source->read) return llm__file_function(env, source->read, source->user, source->size);
    return llm__file_open(env, source->path);
}

typedef enum llm__path_kind { LLM__NOTHING, LLM__REGULAR, LLM__DIRECTORY } llm__path_kind;

static llm__path_kind llm__path_find(const char *path) {
#if defined(_WIN32)
    wchar_t wide[1024];
    if (!MultiByteToWideChar(CP_UTF8, 0, path, -1, wide, 1024)) return LLM__NOTHING;
    DWORD attributes = GetFileAttributesW(wide);
    if (attributes == INVALID_FILE_ATTRIBUTES) return LLM__NOTHING;
    return attributes & FILE_ATTRIBUTE_DIRECTORY ? LLM__DIRECTORY : LLM__REGULAR;
#else
    struct stat st;
    if (stat(path, &st)) return LLM__NOTHING;
    return S_ISDIR(st.st_mode) ? LLM__DIRECTORY : LLM__REGULAR;
#endif
}

/* Returns the last component of a path. */
static const char *llm__path_name(const char *path) {
    const char *name = path;
    for (; *path; path++)
        if (*path == '/' || *path == LLM__SLASH) name = path + 1;
    return name;
}

static char *llm__path_join(llm__env *env, const char *directory, const char *name) {
    size_t n = strlen(directory), m = strlen(name);
    char *path = (char *)llm__alloc(env, n + m + 2, 1);
    bool slash = n && llm__path_name(directory) != directory + n;
    memcpy(path, directory, n);
    path[n] = '/';
    memcpy(path + n + slash, name, m + 1);
    return path;
}

/* A read position in a file. Reading past the end of the file fails with an error. */
typedef struct llm__cursor {
    llm__env *env;
    const uint8_t *data;
    uint64_t size, have, at; /* as in llm__file */
    const char *what;        /* what is being read, for messages */
    llm__str name;           /* its name, if it has one */
} llm__cursor;

static const uint8_t *llm__cursor_bytes(llm__cursor *r, uint64_t n) {
    if (n > r->size - r->at)
        llm__fail(r->env, LLM_ERROR_FORMAT, "the file ends inside %s%.*s: %llu bytes wanted at offset %llu of %llu",
                  r->what, LLM__SHOW(r->name), (unsigned long long)n, (unsigned long long)r->at,
                  (unsigned long long)r->size);
    if (n > r->have - r->at)
        llm__fail(r->env, LLM_ERROR_UNSUPPORTED,
                  "%s%.*s goes on at offset %llu: longer headers are only read from files by path", r->what,
                  LLM__SHOW(r->name), (unsigned long long)r->at);
    const uint8_t *p = r->data + r->at;
    r->at += n;
    return p;
}

static uint32_t llm__cursor_u32(llm__cursor *r) { return llm__bytes_u32(llm__cursor_bytes(r, 4)); }
static uint64_t llm__cursor_u64(llm__cursor *r) { return llm__bytes_u64(llm__cursor_bytes(r, 8)); }

static llm__str llm__cursor_str(llm__cursor *r) {
    llm__str s;
    uint64_t n = llm__cursor_u64(r);
    s.at = (const char *)llm__cursor_bytes(r, n);
    s.n = (size_t)n;
    return s;
}

/* ==== 3 JSON reader =============================================================================================

   Parses a JSON text (RFC 8259) into a tree. Strings without escapes point into the text, so the text must outlive the
   tree. */

typedef enum llm__json_type {
    LLM__JSON_NULL,
    LLM__JSON_FALSE,
    LLM__JSON_TRUE,
    LLM__JSON_NUMBER,
    LLM__JSON_STRING,
    LLM__JSON_ARRAY,
    LLM__JSON_OBJECT
} llm__json_type;

typedef struct llm__json {
    llm__json_type type;
    llm__str key;    /* of an object's member */
    llm__str string; /* the text of a string, or a number as written */
    double number;
    struct llm__json *first; /* first item of an array, first member of an object */
    struct llm__json *next;  /* the next item or member */
    size_t n;                /* number of items or members */
} llm__json;

enum { LLM__JSON_DEPTH = 64, LLM__JSON_CHUNK = 200 }; /* maximum nesting; nodes per allocation */

typedef struct llm__json_reader {
    llm__env *env;
    const char *start, *at, *end;
    llm__json *nodes;
    size_t n_nodes; /* nodes of the current chunk in use */
} llm__json_reader;

static llm__json *llm__json_node(llm__json_reader *r) {
    if (r->n_nodes == LLM__JSON_CHUNK || !r->nodes) {
        r->nodes = (llm__json *)llm__alloc_zero(r->env, LLM__JSON_CHUNK, sizeof *r->nodes);
        r->n_nodes = 0;
    }
    return &r->nodes[r->n_nodes++];
}

LLM__NORETURN static void llm__json_fail(llm__json_reader *r, const char *problem) {
    size_t line = 1, column = 1;
    for (const char *p = r->start; p < r->at; p++, column++) {
        if (*p != '\n') continue;
        line++;
        column = 0;
    }
    llm__fail(r->env, LLM_ERROR_FORMAT, "line %llu, column %llu of the JSON text: %s", (unsigned long long)line,
              (unsigned long long)column, problem);
}

static char llm__json_peek(llm__json_reader *r) {
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\t' || *r->at == '\n' || *r->at == '\r')) r->at++;
    return r->at < r->end ? *r->at : 0;
}

static void llm__json_expect(llm__json_reader *r, char wanted, const char *problem) {
    if (llm__json_peek(r) != wanted) llm__json_fail(r, problem);
    r->at++;
}

static uint32_t llm__json_hex(llm__json_reader *r) {
    uint32_t value = 0;
    for (int i = 0; i < 4; i++, r->at++) {
        char c = r->at < r->end ? *r->at : 0;
        if (c >= '0' && c <= '9') value = value * 16 + (uint32_t)(c - '0');
        else if ((c | 32) >= 'a' && (c | 32) <= 'f') value = value * 16 + (uint32_t)((c | 32) - 'a' + 10);
        else llm__json_fail(r, "\\u needs four hexadecimal digits");
    }
    return value;
}

/* Decodes the escape after a backslash. Returns the number of bytes written. */
static size_t llm__json_escape(llm__json_reader *r, char *out) {
    static const char letters[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    char c = r->at < r->end ? *r->at++ : 0;
    const char *found = c ? strchr(letters, c) : NULL;
    if (found) {
        *out = meanings[found - letters];
        return 1;
    }
    if (c != 'u') llm__json_fail(r, "an unknown escape");
    uint32_t code = llm__json_hex(r);
    if (code >= 0xD800 && code < 0xDC00 && r->end - r->at >= 6 && r->at[0] == '\\' && r->at[1] == 'u') {
        r->at += 2;
        uint32_t low = llm__json_hex(r);
        if (low < 0xDC00 || low > 0xDFFF) llm__json_fail(r, "half of a surrogate pair");
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    if (code >= 0xD800 && code < 0xE000) llm__json_fail(r, "half of a surrogate pair");
    return llm__utf8_encode(code, (uint8_t *)out);
}

static llm__str llm__json_string(llm__json_reader *r) {
    llm__str s;
    bool escaped = false;
    llm__json_expect(r, '"', "a string is expected");
    const char *start = r->at;
    for (; r->at < r->end && *r->at != '"'; r->at++) {
        if ((unsigned char)*r->at < 0x20) llm__json_fail(r, "a control character in a string");
        if (*r->at != '\\') continue;
        escaped = true;
        if (++r->at == r->end) break;
    }
    if (r->at >= r->end) llm__json_fail(r, "the text ends inside a string");
    s.at = start;
    s.n = (size_t)(r->at - start);
    r->at++;
    if (!escaped) return s;
    const char *after = r->at, *end = r->end;
    char *copy = (char *)llm__alloc(r->env, s.n, 1);
    size_t n = 0;
    r->end = after - 1;
    for (r->at = start; r->at < r->end;) {
        if (*r->at != '\\') {
            copy[n++] = *r->at++;
            continue;
        }
        r->at++;
        n += llm__json_escape(r, copy + n);
    }
    r->at = after;
    r->end = end;
    s.at = copy;
    s.n = n;
    return s;
}

static size_t llm__json_digits(llm__json_reader *r) {
    const char *start = r->at;
    while (r->at < r->end && *r->at >= '0' && *r->at <= '9') r->at++;
    return (size_t)(r->at - start);
}

/* Converts a well-formed number. Exact if its digits and its power of ten fit a double, otherwise within a few
   roundings. The largest doubles may become infinite, and the smallest keep fewer digits. */
static double llm__json_value(llm__str s) {
    uint64_t digits = 0;
    int power = 0, written = 0;
    size_t i = s.at[0] == '-';
    bool point = false;
    for (; i < s.n && (s.at[i] | 32) != 'e'; i++) {
        if (s.at[i] == '.') {
            point = true;
            continue;
        }
        if (digits < 1000000000000000000u) {
            digits = digits * 10 + (uint64_t)(s.at[i] - '0');
            power -= point;
        } else {
            power += !point;
        }
    }
    if (i < s.n) {
        bool negative = s.at[++i] == '-';
        for (i += s.at[i] == '-' || s.at[i] == '+'; i < s.n && written < 10000; i++)
            written = written * 10 + (s.at[i] - '0');
        power += negative ? -written : written;
    }
    double value = (double)digits;
    bool down = power < 0;
    int left = down ? -power : power;
    while (left && value > 0 && value < HUGE_VAL) {
        int step = left < 256 ? left : 256; /* so that no power of ten is infinite */
        double factor = 1, ten = 10;
        for (int p = step; p; p >>= 1, ten *= ten)
            if (p & 1) factor *= ten;
        value = down ? value / factor : value * factor;
        left -= step;
    }
    return s.at[0] == '-' ? -value : value;
}

static void llm__json_number(llm__json_reader *r, llm__json *v) {
    const char *start = r->at;
    r->at += *r->at == '-';
    bool zero = r->at < r->end && *r->at == '0';
    size_t n = llm__json_digits(r);
    if (!n || (zero && n > 1)) llm__json_fail(r, "a value is expected");
    if (r->at < r->end && *r->at == '.') {
        r->at++;
        if (!llm__json_digits(r)) llm__json_fail(r, "a digit is missing after the point");
    }
    if (r->at < r->end && (*r->at | 32) == 'e') {
        r->at++;
        if (r->at < r->end && (*r->at == '-' || *r->at == '+')) r->at++;
        if (!llm__json_digits(r)) llm__json_fail(r, "an exponent without digits");
    }
    v->type = LLM__JSON_NUMBER;
    v->string.at = start;
    v->string.n = (size_t)(r->at - start);
    v->number = llm__json_value(v->string);
}

static void llm__json_word(llm__json_reader *r, llm__json *v) {
    static const struct {
        const char *word;
        llm__json_type type;
    } words[] = {{"null", LLM__JSON_NULL}, {"false", LLM__JSON_FALSE}, {"true", LLM__JSON_TRUE}};
    for (int i = 0; i < 3; i++) {
        size_t n = strlen(words[i].word);
        if ((size_t)(r->end - r->at) < n || memcmp(r->at, words[i].word, n)) continue;
        v->type = words[i].type;
        r->at += n;
        return;
    }
    llm__json_fail(r, "a value is expected");
}

static void llm__json_read(llm__json_reader *r, llm__json *v, int depth) {
    char open = llm__json_peek(r);
    if (open == '"') {
        v->type = LLM__JSON_STRING;
        v->string = llm__json_string(r);
    } else if (open == '-' || (open >= '0' && open <= '9')) {
        llm__json_number(r, v);
    } else if (open != '[' && open != '{') {
        llm__json_word(r, v);
    } else {
        char close = open == '[' ? ']' : '}';
        llm__json **last = &v->first;
        if (depth == LLM__JSON_DEPTH) llm__json_fail(r, "deeper than 64 levels");
        v->type = open == '[' ? LLM__JSON_ARRAY : LLM__JSON_OBJECT;
        r->at++;
        if (llm__json_peek(r) == close) {
            r->at++;
            return;
        }
        do {
            llm__json *item = llm__json_node(r);
            if (open == '{') {
                item->key = llm__json_string(r);
                llm__json_expect(r, ':', "a colon is expected");
            }
            llm__json_read(r, item, depth + 1);
            *last = item;
            last = &item->next;
            v->n++;
        } while (llm__json_peek(r) == ',' && r->at++);
        llm__json_expect(r, close, open == '[' ? "a comma or ] is expected" : "a comma or } is expected");
    }
}

static llm__json *llm__json_parse(llm__env *env, const void *text, size_t n) {
    llm__json_reader r = {env, (const char *)text, (const char *)text, (const char *)text + n, NULL, 0};
    llm__json *v = llm__json_node(&r);
    llm__json_read(&r, v, 0);
    llm__json_peek(&r);
    if (r.at < r.end) llm__json_fail(&r, "unexpected text after the value");
    return v;
}

/* Finds a member of an object. Returns NULL if it is absent; the last of duplicate keys wins. */
static const llm__json *llm__json_find(const llm__json *object, const char *key) {
    const llm__json *found = NULL;
    if (object->type != LLM__JSON_OBJECT) return NULL;
    for (const llm__json *m = object->first; m; m = m->next)
        if (llm__str_is(m->key, key)) found = m;
    return found;
}

/* The same, but also returns NULL for a JSON null. */
static const llm__json *llm__json_get(const llm__json *object, const char *key) {
    const llm__json *found = llm__json_find(object, key);
    return found && found->type != LLM__JSON_NULL ? found : NULL;
}

/* ---- Members of objects, checked ----
   Messages name a member by its object's key and its own, as in "rope_scaling.factor". */

#define LLM__SHOW_KEY(object, key) LLM__SHOW((object)->key), (object)->key.n ? "." : "", key

static const char *llm__json_type_name(llm__json_type type) {
    static const char *const names[] = {"null", "false", "true", "a number", "a string", "an array", "an object"};
    return names[type];
}

/* A member of this type, or NULL if it is absent or null. */
static const llm__json *llm__json_get_type(llm__env *env, const llm__json *object, const char *key,
                                           llm__json_type type) {
    const llm__json *v = llm__json_get(object, key);
    if (v && v->type != type)
        llm__fail(env, LLM_ERROR_FORMAT, "%.*s%s%s is %s, not %s", LLM__SHOW_KEY(object, key),
                  llm__json_type_name(v->type), llm__json_type_name(type));
    return v;
}

/* A member of this type; fails if it is absent or null. */
static const llm__json *llm__json_need(llm__env *env, const llm__json *object, const char *key, llm__json_type type) {
    const llm__json *v = llm__json_get_type(env, object, key, type);
    if (!v) llm__fail(env, LLM_ERROR_FORMAT, "%.*s%s%s is missing", LLM__SHOW_KEY(object, key));
    return v;
}

/* A string, empty if absent. */
static llm__str llm__json_get_str(llm__env *env, const llm__json *object, const char *key) {
    llm__str none = {"", 0};
    const llm__json *v = llm__json_get_type(env, object, key, LLM__JSON_STRING);
    return v ? v->string : none;
}

static bool llm__json_get_bool(llm__env *env, const llm__json *object, const char *key, bool missing) {
    const llm__json *v = llm__json_get(object, key);
    if (v && v->type != LLM__JSON_TRUE && v->type != LLM__JSON_FALSE)
        llm__fail(env, LLM_ERROR_FORMAT, "%.*s%s%s is %s, not true or false", LLM__SHOW_KEY(object, key),
                  llm__json_type_name(v->type));
    return v ? v->type == LLM__JSON_TRUE : missing;
}

/* A number in [min, max], or `missing` if absent. */
static double llm__json_get_number(llm__env *env, const llm__json *object, const char *key, double missing, double min,
                                   double max) {
    const llm__json *v = llm__json_get_type(env, object, key, LLM__JSON_NUMBER);
    if (!v) return missing;
    if (!(v->number >= min && v->number <= max))
        llm__fail(env, LLM_ERROR_FORMAT, "%.*s%s%s is %g, not from %g to %g", LLM__SHOW_KEY(object, key), v->number,
                  min, max);
    return v->number;
}

/* An integer in [min, max], or `missing` if absent. A negative `missing` makes the key required. */
static int llm__json_get_int(llm__env *env, const llm__json *object, const char *key, int missing, int min, int max) {
    double d = llm__json_get_number(env, object, key, missing, min, max);
    if (missing < 0) llm__json_need(env, object, key, LLM__JSON_NUMBER);
    if (d != (double)(int)d)
        llm__fail(env, LLM_ERROR_FORMAT, "%.*s%s%s is %g, not a whole number", LLM__SHOW_KEY(object, key), d);
    return (int)d;
}

/* ==== 4 Number formats ==========================================================================================

   How files store numbers, and how rows of them are read as f32. Every conversion is exact or rounded once, to nearest
   even. Integer operations are used wherever compiler flags could change a floating-point result. */

static uint32_t llm__f32_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static float llm__f32_from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static float llm__bf16_to_f32(uint16_t h) { return llm__f32_from_bits((uint32_t)h << 16); }

/* Rounds to nearest even. NaN stays NaN; denormals become zero, because matrix units treat them as zero. */
static uint16_t llm__f32_to_bf16(float x) {
    uint32_t u = llm__f32_bits(x);
    if ((u & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(u >> 16 | 0x40);
    if ((u & 0x7F800000) == 0) return (uint16_t)(u >> 16 & 0x8000);
    return (uint16_t)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

static float llm__f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3FF;
    if (exponent == 31) return llm__f32_from_bits(sign | 0x7F800000 | mantissa << 13);
    if (exponent) return llm__f32_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    if (!mantissa) return llm__f32_from_bits(sign);
    for (exponent = 113; !(mantissa & 0x400); exponent--) mantissa <<= 1; /* a denormal f16 becomes a normal f32 */
    return llm__f32_from_bits(sign | exponent << 23 | (mantissa & 0x3FF) << 13);
}

/* Rounds to nearest even; numbers beyond the range become infinite. */
static uint16_t llm__f32_to_f16(float x) {
    uint32_t u = llm__f32_bits(x), sign = u >> 16 & 0x8000, rest = u & 0x7FFFFFFF;
    if (rest > 0x7F800000) return (uint16_t)(sign | 0x7E00);
    if (rest >= 0x47800000) return (uint16_t)(sign | 0x7C00);
    if (rest >= 0x38800000) return (uint16_t)(sign | ((rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13));
    if (rest < 0x33000000) return (uint16_t)sign;
    uint32_t shift = 126 - (rest >> 23), mantissa = (rest & 0x7FFFFF) | 0x800000; /* a denormal: mantissa * 2^-shift */
    return (uint16_t)(sign | ((mantissa + (1u << (shift - 1)) - 1 + (mantissa >> shift & 1)) >> shift));
}

/* Tensor types, numbered as in GGUF. The table below also names types that this library refuses. */
typedef enum llm__file_type {
    LLM__F32 = 0,
    LLM__F16 = 1,
    LLM__Q4_0 = 2,
    LLM__Q4_1 = 3,
    LLM__Q5_0 = 6,
    LLM__Q5_1 = 7,
    LLM__Q8_0 = 8,
    LLM__Q2_K = 10,
    LLM__Q3_K = 11,
    LLM__Q4_K = 12,
    LLM__Q5_K = 13,
    LLM__Q6_K = 14,
    LLM__IQ4_NL = 20,
    LLM__IQ4_XS = 23,
    LLM__I8 = 24,
    LLM__BF16 = 30,
    LLM__NO_GGUF = 1000 /* this and larger numbers do not occur in GGUF */
} llm__file_type;

static void llm__decode_f32(const uint8_t *src, size_t n, float *dst) {
    for (size_t i = 0; i < n; i++) dst[i] = llm__f32_from_bits(llm__bytes_u32(src + 4 * i));
}

static void llm__decode_f16(const uint8_t *src, size_t n, float *dst) {
    for (size_t i = 0; i < n; i++) dst[i] = llm__f16_to_f32(llm__bytes_u16(src + 2 * i));
}

static void llm__decode_bf16(const uint8_t *src, size_t n, float *dst) {
    for (size_t i = 0; i < n; i++) dst[i] = llm__bf16_to_f32(llm__bytes_u16(src + 2 * i));
}

/* 32 weights: f16 scale d, then 16 bytes. Their low halves are weights 0-15, their high halves 16-31: (q - 8) * d. */
static void llm__decode_q4_0(const uint8_t *src, size_t n, float *dst) {
    for (; n; n -= 32, src += 18, dst += 32) {
        float d = llm__f16_to_f32(llm__bytes_u16(src));
        for (int i = 0; i < 16; i++) {
            dst[i] = (float)((src[2 + i] & 15) - 8) * d;
            dst[i + 16] = (float)((src[2 + i] >> 4) - 8) * d;
        }
    }
}

/* 32 weights: f16 scale d and minimum m, then as above: q * d + m. The product is exact, so the result is rounded once
   whether or not the compiler fuses the two operations. */
static void llm__decode_q4_1(const uint8_t *src, size_t n, float *dst) {
    for (; n; n -= 32, src += 20, dst += 32) {
        float d = llm__f16_to_f32(llm__bytes_u16(src)), m = llm__f16_to_f32(llm__bytes_u16(src + 2));
        for (int i = 0; i < 16; i++) {
            dst[i] = (float)(src[4 + i] & 15) * d + m;
            dst[i + 16] = (float)(src[4 + i] >> 4) * d + m;
        }
    }
}

/* 32 weights: f16 scale d, 32 fifth bits, then half bytes as above: (q - 16) * d. */
static void llm__decode_q5_0(const uint8_t *src, size_t n, float *dst) {
    for (; n; n -= 32, src += 22, dst += 32) {
        float d = llm__f16_to_f32(llm__bytes_u16(src));
        uint32_t high = llm__bytes_u32(src + 2);
        for (int i = 0; i < 16; i++) {
            dst[i] = (float)((src[6 + i] & 15) + (int)(high >> i & 1) * 16 - 16) * d;
            dst[i + 16] = (float)((src[6 + i] >> 4) + (int)(high >> (i + 16) & 1) * 16 - 16) * d;
        }
    }
}

/* 32 weights: f16 scale d and minimum m, then as above: q * d + m. */
static void llm__decode_q5_1(const uint8_t *src, size_t n, float *dst) {
    for (; n; n -= 32, src += 24, dst += 32) {
        float d = llm__f16_to_f32(llm__bytes_u16(src)), m = llm__f16_to_f32(llm__bytes_u16(src + 2));
        uint32_t high = llm__bytes_u32(src + 4);
        for (int i = 0; i < 16; i++) {
            dst[i] = (float)((src[8 + i] & 15) + (int)(high >> i & 1) * 16) * d + m;
            dst[i + 16] = (float)((src[8 + i] >> 4) + (int)(high >> (i + 16) & 1) * 16) * d + m;
        }
    }
}

/* 32 weights: f16 scale d, then 32 signed bytes: q * d. */
static void llm__decode_q8_0(const uint8_t *src, size_t n, float *dst) {
    for (; n; n -= 32, src += 34, dst += 32) {
        float d = llm__f16_to_f32(llm__bytes_u16(src));
        int8_t q[32]; /* a copy that cannot alias dst, so that compilers can vectorise the loop */
        memcpy(q, src + 2, 32);
        for (int i = 0; i < 32; i++) dst[i] = (float)q[i] * d;
    }
}

/* The K formats: 256 weights share two f16 numbers, d and m. Each 16 or 32 weights have a small integer scale (and
   minimum), which is multiplied by d (and m). We read the weights in 8 groups of 32. The bits of several groups lie
   side by side in one byte. All products are exact, so each weight is rounded at most once. */

/* 16 bytes with a scale in the low half and a minimum in the high half, 64 bytes with 2 bits per weight, d, m. */
static void llm__decode_q2_k(const uint8_t *src, size_t n, float *dst) {
    for (; n; n -= 256, src += 84, dst += 256) {
        float d = llm__f16_to_f32(llm__bytes_u16(src + 80)), m = llm__f16_to_f32(llm__bytes_u16(src + 82));
        for (int i = 0; i < 256; i++) {
            int q = src[16 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3, scale = src[i / 16];
            dst[i] = d * (float)(scale & 15) * (float)q - m * (float)(scale >> 4);
        }
    }
}

/* 32 bytes of third bits, 64 bytes with 2 bits per weight, 16 scales of 6 bits in 12 bytes, d. */
static void llm__decode_q3_k(const uint8_t *src, size_t n, float *dst) {
    for (; n; n -= 256, src += 110, dst += 256) {
        const uint8_t *scales = src + 96;
        float d = llm__f16_to_f32(llm__bytes_u16(src + 108));
        for (int i = 0; i < 256; i++) {
            int low = src[32 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3, high = src[i % 32] >> (i / 32) & 1;
            int j = i / 16, scale = scales[j % 8] >> (j / 8 * 4) & 15;
            scale += (scales[8 + j % 4] >> (j / 4 * 2) & 3) * 16;
            dst[i] = d * (float)(scale - 32) * (float)(low + high * 4 - 4);
        }
    }
}

/* The 6-bit scale and minimum of group j, from the 12 bytes that hold those of all 8 groups. */
static void llm__decode_k_scale(const uint8_t *s, int j, int *scale, int *minimum) {
    *scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6 << 4);
    *minimum = j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) | (s[j] >> 6 << 4);
}

/* d, m, 12 bytes of scales and minimums, 128 bytes with 4 bits per weight. */
static void llm__decode_q4_k(const uint8_t *src, size_t n, float *dst) {
    for (; n; n -= 256, src += 144, dst += 256) {
        float d = llm__f16_to_f32(llm__bytes_u16(src)), m = llm__f16_to_f32(llm__bytes_u16(src + 2));
        for (int j = 0, scale, minimum; j < 8; j++) {
            llm__decode_k_scale(src + 4, j, &scale, &minimum);
            for (int i = 0; i < 32; i++) {
                int q = src[16 + j / 2 * 32 + i] >> (j % 2 * 4) & 15;
                dst[j * 32 + i] = d * (float)scale * (float)q - m * (float)minimum;
            }
        }
    }
}

/* d, m, 12 bytes of scales and minimums, 32 bytes of fifth bits, 128 bytes with 4 bits per weight. */
static void llm__decode_q5_k(const uint8_t *src, size_t n, float *dst) {
    for (; n; n -= 256, src += 176, dst += 256) {
        float d = llm__f16_to_f32(llm__bytes_u16(src)), m = llm__f16_to_f32(llm__bytes_u16(src + 2));
        for (int j = 0, scale, minimum; j < 8; j++) {
            llm__decode_k_scale(src + 4, j, &scale, &minimum);
            for (int i = 0; i < 32; i++) {
                int q = (src[48 + j / 2 * 32 + i] >> (j % 2 * 4) & 15) + (src[16 + i] >> j & 1) * 16;
                dst[j * 32 + i] = d * (float)scale * (float)q - m * (float)minimum;
            }
        }
    }
}

/* 128 bytes with 4 bits per weight, 64 bytes with 2 more, 16 signed scales, d. */
static void llm__decode_q6_k(const uint8_t *src, size_t n, float *dst) {
    for (; n; n -= 256, src += 210, dst += 256) {
        float d = llm__f16_to_f32(llm__bytes_u16(src + 208));
        for (int i = 0; i < 256; i++) {
            int low = src[i / 128 * 64 + i % 64] >> (i / 64 % 2 * 4) & 15;
            int high = src[128 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
            dst[i] = d * (float)(int8_t)src[192 + i / 16] * (float)(low + high * 16 - 32);
        }
    }
}

/* The 16 values of the IQ4 types, which four bits select. They are closer together near zero, where most weights are. */
static const int8_t llm__iq4_numbers[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* 32 weights: f16 scale d, then 16 bytes as in Q4_0 that hold indexes into llm__iq4_numbers: number * d. */
static void llm__decode_iq4_nl(const uint8_t *src, size_t n, float *dst) {
    for (; n; n -= 32, src += 18, dst += 32) {
        float d = llm__f16_to_f32(llm__bytes_u16(src));
        for (int i = 0; i < 16; i++) {
            dst[i] = (float)llm__iq4_numbers[src[2 + i] & 15] * d;
            dst[i + 16] = (float)llm__iq4_numbers[src[2 + i] >> 4] * d;
        }
    }
}

/* The 6-bit scale of group j of an IQ4_XS block, from -32 to 31. */
static int llm__decode_iq4_scale(const uint8_t *src, int j) {
    return ((src[4 + j / 2] >> (j % 2 * 4) & 15) | (llm__bytes_u16(src + 2) >> (2 * j) & 3) << 4) - 32;
}

/* 256 weights in 8 groups of 32: d, the upper 2 bits of 8 scales in 2 bytes, their lower 4 bits in 4 bytes, then the
   groups' 16 bytes each as above. */
static void llm__decode_iq4_xs(const uint8_t *src, size_t n, float *dst) {
    for (; n; n -= 256, src += 136, dst += 256) {
        float d = llm__f16_to_f32(llm__bytes_u16(src));
        for (int i = 0; i < 256; i++) {
            int q = src[8 + i / 32 * 16 + i % 16] >> (i / 16 % 2 * 4) & 15;
            dst[i] = d * (float)llm__decode_iq4_scale(src, i / 32) * (float)llm__iq4_numbers[q];
        }
    }
}

static void llm__decode_i8(const uint8_t *src, size_t n, float *dst) {
    for (size_t i = 0; i < n; i++) dst[i] = (float)(int8_t)src[i];
}

typedef struct llm__file_type_info {
    uint32_t type;
    const char *name;
    uint32_t block_weights, block_bytes;                      /* a row consists of whole blocks */
    void (*decode)(const uint8_t *src, size_t n, float *dst); /* NULL if this library cannot read the type */
} llm__file_type_info;

static const llm__file_type_info llm__file_types[] = {
    {LLM__F32, "F32", 1, 4, llm__decode_f32},
    {LLM__F16, "F16", 1, 2, llm__decode_f16},
    {LLM__BF16, "BF16", 1, 2, llm__decode_bf16},
    {LLM__Q4_0, "Q4_0", 32, 18, llm__decode_q4_0},
    {LLM__Q4_1, "Q4_1", 32, 20, llm__decode_q4_1},
    {LLM__Q5_0, "Q5_0", 32, 22, llm__decode_q5_0},
    {LLM__Q5_1, "Q5_1", 32, 24, llm__decode_q5_1},
    {LLM__Q8_0, "Q8_0", 32, 34, llm__decode_q8_0},
    {LLM__Q2_K, "Q2_K", 256, 84, llm__decode_q2_k},
    {LLM__Q3_K, "Q3_K", 256, 110, llm__decode_q3_k},
    {LLM__Q4_K, "Q4_K", 256, 144, llm__decode_q4_k},
    {LLM__Q5_K, "Q5_K", 256, 176, llm__decode_q5_k},
    {LLM__Q6_K, "Q6_K", 256, 210, llm__decode_q6_k},
    {LLM__IQ4_NL, "IQ4_NL", 32, 18, llm__decode_iq4_nl},
    {LLM__IQ4_XS, "IQ4_XS", 256, 136, llm__decode_iq4_xs},
    {LLM__I8, "I8", 1, 1, llm__decode_i8},
    {9, "Q8_1", 32, 36, NULL},
    {15, "Q8_K", 256, 292, NULL},
    {16, "IQ2_XXS", 256, 66, NULL},
    {17, "IQ2_XS", 256, 74, NULL},
    {18, "IQ3_XXS", 256, 98, NULL},
    {19, "IQ1_S", 256, 50, NULL},
    {21, "IQ3_S", 256, 110, NULL},
    {22, "IQ2_S", 256, 82, NULL},
    {25, "I16", 1, 2, NULL},
    {26, "I32", 1, 4, NULL},
    {27, "I64", 1, 8, NULL},
    {28, "F64", 1, 8, NULL},
    {29, "IQ1_M", 256, 56, NULL},
    {34, "TQ1_0", 256, 54, NULL},
    {35, "TQ2_0", 256, 66, NULL},
    {39, "MXFP4", 32, 17, NULL},
    {40, "NVFP4", 64, 36, NULL},
    {41, "Q1_0", 128, 18, NULL},
    {42, "Q2_0", 64, 18, NULL},
    {LLM__NO_GGUF, "BOOL", 1, 1, NULL},
    {LLM__NO_GGUF, "U8", 1, 1, NULL},
    {LLM__NO_GGUF, "U16", 1, 2, NULL},
    {LLM__NO_GGUF, "U32", 1, 4, NULL},
    {LLM__NO_GGUF, "U64", 1, 8, NULL},
    {LLM__NO_GGUF, "F8_E4M3", 1, 1, NULL},
    {LLM__NO_GGUF, "F8_E5M2", 1, 1, NULL},
    {LLM__NO_GGUF, "F8_E8M0", 1, 1, NULL},
};

enum { LLM__N_TYPES = sizeof llm__file_types / sizeof *llm__file_types };

/* Returns NULL for an unknown number. */
static const llm__file_type_info *llm__file_type_find(uint32_t type) {
    for (size_t i = 0; i < LLM__N_TYPES; i++)
        if (llm__file_types[i].type == type && type < LLM__NO_GGUF) return &llm__file_types[i];
    return NULL;
}

/* Finds an unblocked type by its name in safetensors files. Returns NULL if there is none. */
static const llm__file_type_info *llm__file_type_find_plain(llm__str name) {
    for (size_t i = 0; i < LLM__N_TYPES; i++)
        if (llm__file_types[i].block_weights == 1 && llm__str_is(name, llm__file_types[i].name))
            return &llm__file_types[i];
    return NULL;
}

/* ==== 5 Checkpoints =============================================================================================

   A checkpoint is a list of named tensors plus hyperparameters: key-value pairs in GGUF, config.json in a Hugging Face
   directory. Both point into the mapped files. Files are not trusted: every count and offset is checked against the
   size of the file before it is used. */

typedef struct llm__tensor {
    llm__str name;
    const llm__file_type_info *type;
    uint64_t cols, rows; /* a row holds the weights of one output; a vector is one row */
    uint64_t row_bytes;
    const llm__file *file;
    uint64_t offset;                  /* in the file */
    const uint8_t *data;              /* NULL if the bytes are not in memory; see llm__tensor_bytes */
    const struct llm__tensor *scales; /* int8 tensors: one scale per row; NULL for other types */
} llm__tensor;

enum llm__gguf_type {
    LLM__GGUF_U8,
    LLM__GGUF_I8,
    LLM__GGUF_U16,
    LLM__GGUF_I16,
    LLM__GGUF_U32,
    LLM__GGUF_I32,
    LLM__GGUF_F32,
    LLM__GGUF_BOOL,
    LLM__GGUF_STRING,
    LLM__GGUF_ARRAY,
    LLM__GGUF_U64,
    LLM__GGUF_I64,
    LLM__GGUF_F64,
    LLM__GGUF_N_TYPES
};

typedef struct llm__gguf_value {
    llm__str key;
    uint32_t type; /* enum llm__gguf_type; for an array the type of its items */
    bool is_array;
    uint64_t count;      /* number of items of an array, otherwise 1 */
    const uint8_t *data; /* the first item; a string is its length in 8 bytes, then its bytes */
} llm__gguf_value;

typedef enum llm__checkpoint_format { LLM__GGUF, LLM__HUGGING_FACE } llm__checkpoint_format;

typedef struct llm__checkpoint {
    llm__checkpoint_format format;
    llm__gguf_value *values; /* of a GGUF file */
    size_t n_values;
    const char *directory;   /* of a Hugging Face directory */
    const char *config_path; /* path of its config.json, for messages */
    const llm__json *config;
    llm__tensor *tensors; /* sorted by name */
    size_t n_tensors, tensor_room;
    bool *used; /* [n_tensors] true for those that llm__tensor_get has returned */
} llm__checkpoint;

static void llm__tensor_add(llm__env *env, llm__checkpoint *ck, const llm__tensor *t) {
    ck->tensors = (llm__tensor *)llm__alloc_grow(env, ck->tensors, ck->n_tensors, &ck->tensor_room, sizeof *t);
    ck->tensors[ck->n_tensors++] = *t;
}

/* a * b and a + b for sizes that come from a file. They fail instead of wrapping around. */
static uint64_t llm__tensor_mul(llm__env *env, llm__str tensor, uint64_t a, uint64_t b) {
    if (b && a > UINT64_MAX / b)
        llm__fail(env, LLM_ERROR_FORMAT, "tensor %.*s: %llu * %llu overflows 64 bits", LLM__SHOW(tensor),
                  (unsigned long long)a, (unsigned long long)b);
    return a * b;
}

static uint64_t llm__tensor_plus(llm__env *env, llm__str tensor, uint64_t a, uint64_t b) {
    if (a > UINT64_MAX - b)
        llm__fail(env, LLM_ERROR_FORMAT, "tensor %.*s: %llu + %llu overflows 64 bits", LLM__SHOW(tensor),
                  (unsigned long long)a, (unsigned long long)b);
    return a + b;
}

/* Checks a tensor's size and offset against the file and points the tensor at its bytes. */
static void llm__tensor_place(llm__env *env, llm__tensor *t, const llm__file *file, uint64_t offset) {
    uint64_t bytes = llm__tensor_mul(env, t->name, t->rows, t->row_bytes);
    if (offset > file->size || bytes > file->size - offset)
        llm__fail(env, LLM_ERROR_FORMAT,
                  "tensor %.*s, %llu x %llu of type %s, needs %llu bytes at offset %llu, but the file ends at %llu",
                  LLM__SHOW(t->name), (unsigned long long)t->rows, (unsigned long long)t->cols, t->type->name,
                  (unsigned long long)bytes, (unsigned long long)offset, (unsigned long long)file->size);
    t->file = file;
    t->offset = offset;
    t->data = offset + bytes <= file->have ? file->data + offset : NULL;
    t->scales = NULL;
}

static int llm__tensor_compare_names(const void *a, const void *b) {
    return llm__str_compare(((const llm__tensor *)a)->name, ((const llm__tensor *)b)->name);
}

static int llm__tensor_compare_places(const void *a, const void *b) {
    const llm__tensor *x = (const llm__tensor *)a, *y = (const llm__tensor *)b;
    if (x->file != y->file) return (uintptr_t)x->file > (uintptr_t)y->file ? 1 : -1;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

static void llm__tensor_sort(llm__env *env, llm__checkpoint *ck) {
    ck->used = (bool *)llm__alloc_zero(env, ck->n_tensors + 1, sizeof *ck->used);
    if (!ck->n_tensors) return;
    qsort(ck->tensors, ck->n_tensors, sizeof *ck->tensors, llm__tensor_compare_places);
    for (size_t i = 1; i < ck->n_tensors; i++) {
        const llm__tensor *a = &ck->tensors[i - 1], *b = &ck->tensors[i];
        if (a->file == b->file && b->offset < a->offset + a->rows * a->row_bytes)
            llm__fail(env, LLM_ERROR_FORMAT, "tensors %.*s and %.*s overlap at offset %llu", LLM__SHOW(a->name),
                      LLM__SHOW(b->name), (unsigned long long)b->offset);
    }
    qsort(ck->tensors, ck->n_tensors, sizeof *ck->tensors, llm__tensor_compare_names);
    for (size_t i = 1; i < ck->n_tensors; i++)
        if (llm__str_equal(ck->tensors[i - 1].name, ck->tensors[i].name))
            llm__fail(env, LLM_ERROR_FORMAT, "tensor %.*s occurs twice", LLM__SHOW(ck->tensors[i].name));
}

static const llm__tensor *llm__tensor_find(const llm__checkpoint *ck, const char *name) {
    llm__tensor wanted;
    memset(&wanted, 0, sizeof wanted);
    wanted.name.at = name;
    wanted.name.n = strlen(name);
    if (!ck->n_tensors) return NULL;
    return (const llm__tensor *)bsearch(&wanted, ck->tensors, ck->n_tensors, sizeof wanted, llm__tensor_compare_names);
}

static void llm__tensor_use(const llm__checkpoint *ck, const llm__tensor *t) { ck->used[t - ck->tensors] = true; }

/* The row scales of an int8 tensor, by the names that compressed-tensors uses. */
static const llm__tensor *llm__tensor_find_scales(llm__env *env, const llm__checkpoint *ck, const llm__tensor *t) {
    static const char suffix[] = "_scale";
    char *name = (char *)llm__alloc(env, t->name.n + sizeof suffix, 1);
    memcpy(name, t->name.at, t->name.n);
    memcpy(name + t->name.n, suffix, sizeof suffix);
    llm__str shown = {name, strlen(name)};
    const llm__tensor *scales = ck->format == LLM__HUGGING_FACE ? llm__tensor_find(ck, name) : NULL; /* GGUF has none */
    if (!scales)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "tensor %.*s is of type I8, but there is no tensor %.*s",
                  LLM__SHOW(t->name), LLM__SHOW(shown));
    if (scales->rows * scales->cols != t->rows || scales->type->block_weights != 1 || !scales->type->decode ||
        scales->type->type == LLM__I8)
        llm__fail(env, LLM_ERROR_UNSUPPORTED,
                  "tensor %.*s is %llu x %llu of type %s; this library supports one number for each of "
                  "the %llu rows it belongs to, of type F32, F16 or BF16",
                  LLM__SHOW(shown), (unsigned long long)scales->rows, (unsigned long long)scales->cols,
                  scales->type->name, (unsigned long long)t->rows);
    llm__tensor_use(ck, scales);
    return scales;
}

/* Finds a tensor and checks that it has this shape and a readable type. */
static llm__tensor llm__tensor_get(llm__env *env, const llm__checkpoint *ck, const char *name, uint64_t rows,
                                   uint64_t cols) {
    const llm__tensor *found = llm__tensor_find(ck, name);
    if (!found) llm__fail(env, LLM_ERROR_FORMAT, "tensor %s is missing", name);
    llm__tensor t = *found;
    if (t.rows != rows || t.cols != cols)
        llm__fail(env, LLM_ERROR_FORMAT, "tensor %s is %llu x %llu, but the hyperparameters require %llu x %llu", name,
                  (unsigned long long)t.rows, (unsigned long long)t.cols, (unsigned long long)rows,
                  (unsigned long long)cols);
    if (!t.type->decode)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "tensor %s is of type %s, which this library does not read", name,
                  t.type->name);
    llm__tensor_use(ck, found);
    if (t.type->type == LLM__I8) t.scales = llm__tensor_find_scales(env, ck, found);
    return t;
}

/* Fails if the file has tensors that nothing used: they belong to a feature that we would silently leave out. */
static void llm__tensor_refuse_unused(llm__env *env, const llm__checkpoint *ck) {
    static const char *const known[] = {"rotary_emb.inv_freq"}; /* a table in older files that nothing needs */
    for (size_t i = 0; i < ck->n_tensors; i++) {
        llm__str name = ck->tensors[i].name;
        bool ignored = ck->used[i];
        for (size_t j = 0; j < sizeof known / sizeof *known && !ignored; j++) {
            size_t n = strlen(known[j]);
            ignored = name.n >= n && !memcmp(name.at + name.n - n, known[j], n);
        }
        if (!ignored)
            llm__fail(env, LLM_ERROR_UNSUPPORTED,
                      "tensor %.*s is there, which is no part of the models this library runs", LLM__SHOW(name));
    }
}

/* A tensor's bytes, read into new memory if they are not in memory already. The caller frees them in that case. */
static uint8_t *llm__tensor_bytes(llm__env *env, llm__tensor *t) {
    if (t->data) return NULL;
    uint8_t *bytes = llm__file_read(env, t->file, t->offset, t->rows * t->row_bytes);
    t->data = bytes;
    return bytes;
}

/* ---- GGUF ----
   https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: magic, version, counts, key-value pairs, tensor
   descriptions, padding, data; all little-endian. A split model is several such files, each with some of the
   tensors. */

static uint32_t llm__gguf_size(uint32_t type) { /* 0 for strings, which have no fixed size */
    static const uint8_t sizes[LLM__GGUF_N_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return sizes[type];
}

/* Reads a name. Messages about what follows it mention it. */
static llm__str llm__gguf_read_name(llm__cursor *r, const char *anonymous, const char *named) {
    r->what = anonymous;
    r->name.n = 0;
    r->name = llm__cursor_str(r);
    r->what = named;
    return r->name;
}

/* Checks that the file is long enough for `count` items of at least `size` bytes each. */
static void llm__gguf_check_count(llm__cursor *r, uint64_t count, uint64_t size) {
    if (count > (r->size - r->at) / size)
        llm__fail(r->env, LLM_ERROR_FORMAT, "%s%.*s is to have %llu entries at offset %llu, but the file ends at %llu",
                  r->what, LLM__SHOW(r->name), (unsigned long long)count, (unsigned long long)r->at,
                  (unsigned long long)r->size);
}

static llm__gguf_value llm__gguf_read_value(llm__cursor *r) {
    llm__gguf_value v;
    v.key = llm__gguf_read_name(r, "a metadata key", "metadata ");
    v.type = llm__cursor_u32(r);
    v.is_array = v.type == LLM__GGUF_ARRAY;
    v.count = 1;
    if (v.is_array) {
        v.type = llm__cursor_u32(r);
        v.count = llm__cursor_u64(r);
    }
    if (v.type >= LLM__GGUF_N_TYPES || v.type == LLM__GGUF_ARRAY)
        llm__fail(r->env, LLM_ERROR_FORMAT, "metadata %.*s has the unknown type %lu", LLM__SHOW(v.key),
                  (unsigned long)v.type);
    v.data = r->data + r->at;
    uint32_t size = llm__gguf_size(v.type);
    llm__gguf_check_count(r, v.count, size ? size : 8);
    if (size) {
        llm__cursor_bytes(r, v.count * size);
    } else {
        for (uint64_t i = 0; i < v.count; i++) llm__cursor_str(r);
    }
    return v;
}

static const llm__gguf_value *llm__gguf_find(const llm__checkpoint *ck, const char *key) {
    for (size_t i = 0; i < ck->n_values; i++)
        if (llm__str_is(ck->values[i].key, key)) return &ck->values[i];
    return NULL;
}

/* Converts any numeric type to double; exact up to 2^53. */
static double llm__gguf_value_number(const llm__gguf_value *v, uint64_t i) {
    const uint8_t *p = v->data + i * llm__gguf_size(v->type);
    uint64_t bits;
    double d;
    switch (v->type) {
    case LLM__GGUF_U8:
    case LLM__GGUF_BOOL: return p[0];
    case LLM__GGUF_I8: return (int8_t)p[0];
    case LLM__GGUF_U16: return llm__bytes_u16(p);
    case LLM__GGUF_I16: return (int16_t)llm__bytes_u16(p);
    case LLM__GGUF_U32: return llm__bytes_u32(p);
    case LLM__GGUF_I32: return (int32_t)llm__bytes_u32(p);
    case LLM__GGUF_F32: return llm__f32_from_bits(llm__bytes_u32(p));
    case LLM__GGUF_U64: return (double)llm__bytes_u64(p);
    case LLM__GGUF_I64: return (double)(int64_t)llm__bytes_u64(p);
    default:
        bits = llm__bytes_u64(p);
        memcpy(&d, &bits, 8);
        return d;
    }
}

/* A single number, or `missing` if the key is absent. */
static double llm__gguf_number(llm__env *env, const llm__checkpoint *ck, const char *key, double missing) {
    const llm__gguf_value *v = llm__gguf_find(ck, key);
    if (!v) return missing;
    if (v->is_array || v->type == LLM__GGUF_STRING)
        llm__fail(env, LLM_ERROR_FORMAT, "metadata %s is not a number", key);
    return llm__gguf_value_number(v, 0);
}

/* An integer in [least, most], or `missing` if the key is absent. A negative `missing` makes the key required. */
static int64_t llm__gguf_int(llm__env *env, const llm__checkpoint *ck, const char *key, int64_t missing, int64_t least,
                             int64_t most) {
    double d = llm__gguf_number(env, ck, key, -1e300);
    if (d == -1e300) {
        if (missing < 0) llm__fail(env, LLM_ERROR_FORMAT, "metadata %s is missing", key);
        return missing;
    }
    if (!(d >= (double)least && d <= (double)most) || d != (double)(int64_t)d)
        llm__fail(env, LLM_ERROR_FORMAT, "metadata %s is %g, not a whole number from %lld to %lld", key, d,
                  (long long)least, (long long)most);
    return (int64_t)d;
}

/* A string, empty if the key is absent. */
static llm__str llm__gguf_str(llm__env *env, const llm__checkpoint *ck, const char *key) {
    llm__str s = {"", 0};
    const llm__gguf_value *v = llm__gguf_find(ck, key);
    if (!v) return s;
    if (v->is_array || v->type != LLM__GGUF_STRING)
        llm__fail(env, LLM_ERROR_FORMAT, "metadata %s is not a string", key);
    s.n = (size_t)llm__bytes_u64(v->data);
    s.at = (const char *)v->data + 8;
    return s;
}

/* An array of strings in new memory; NULL and *n = 0 if the key is absent. */
static llm__str *llm__gguf_strings(llm__env *env, const llm__checkpoint *ck, const char *key, size_t *n) {
    const llm__gguf_value *v = llm__gguf_find(ck, key);
    *n = 0;
    if (!v) return NULL;
    if (!v->is_array || v->type != LLM__GGUF_STRING)
        llm__fail(env, LLM_ERROR_FORMAT, "metadata %s is not an array of strings", key);
    llm__str *list = (llm__str *)llm__alloc(env, (size_t)v->count, sizeof *list);
    const uint8_t *p = v->data;
    for (uint64_t i = 0; i < v->count; i++) {
        list[i].n = (size_t)llm__bytes_u64(p);
        list[i].at = (const char *)p + 8;
        p += 8 + list[i].n;
    }
    *n = (size_t)v->count;
    return list;
}

static llm__tensor llm__gguf_read_tensor(llm__cursor *r, uint64_t *offset) {
    llm__tensor t;
    llm__env *env = r->env;
    memset(&t, 0, sizeof t);
    t.name = llm__gguf_read_name(r, "a tensor's name", "tensor ");
    uint32_t n_dims = llm__cursor_u32(r);
    if (n_dims < 1 || n_dims > 4)
        llm__fail(env, LLM_ERROR_FORMAT, "tensor %.*s has %lu dimensions", LLM__SHOW(t.name), (unsigned long)n_dims);
    t.cols = llm__cursor_u64(r);
    t.rows = 1;
    for (uint32_t i = 1; i < n_dims; i++) t.rows = llm__tensor_mul(env, t.name, t.rows, llm__cursor_u64(r));
    uint32_t type = llm__cursor_u32(r);
    *offset = llm__cursor_u64(r);
    t.type = llm__file_type_find(type);
    if (!t.type)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "tensor %.*s has the unknown type number %lu", LLM__SHOW(t.name),
                  (unsigned long)type);
    if (!t.cols || !t.rows || t.cols % t.type->block_weights)
        llm__fail(env, LLM_ERROR_FORMAT, "tensor %.*s has %llu columns and %llu rows of type %s", LLM__SHOW(t.name),
                  (unsigned long long)t.cols, (unsigned long long)t.rows, t.type->name);
    t.row_bytes = llm__tensor_mul(env, t.name, t.cols / t.type->block_weights, t.type->block_bytes);
    return t;
}

static void llm__gguf_read_tensors(llm__cursor *r, llm__checkpoint *ck, const llm__file *file, uint64_t n_tensors,
                                   uint64_t alignment) {
    llm__env *env = r->env;
    r->what = "the list of tensors";
    r->name.n = 0;
    llm__gguf_check_count(r, n_tensors, 8 + 4 + 8 + 4 + 8);
    for (uint64_t i = 0; i < n_tensors; i++) {
        uint64_t offset;
        llm__tensor t = llm__gguf_read_tensor(r, &offset);
        t.offset = offset; /* relative to the start of the data until the tensor is placed */
        llm__tensor_add(env, ck, &t);
    }
    uint64_t start = (r->at + alignment - 1) / alignment * alignment;
    for (size_t i = ck->n_tensors - (size_t)n_tensors; i < ck->n_tensors; i++) {
        llm__tensor *t = &ck->tensors[i];
        if (t->offset % alignment || t->offset > file->size)
            llm__fail(env, LLM_ERROR_FORMAT,
                      "tensor %.*s has offset %llu, not a multiple of %llu in a file of %llu bytes", LLM__SHOW(t->name),
                      (unsigned long long)t->offset, (unsigned long long)alignment, (unsigned long long)file->size);
        llm__tensor_place(env, t, file, llm__tensor_plus(env, t->name, start, t->offset));
    }
}

/* Reads one file and adds its values and tensors to the checkpoint. */
static void llm__gguf_read_part(llm__env *env, llm__checkpoint *ck, const llm__file *file) {
    llm__cursor r = {env, file->data, file->size, file->have, 0, "the header", {"", 0}};
    if (memcmp(llm__cursor_bytes(&r, 4), "GGUF", 4))
        llm__fail(env, LLM_ERROR_FORMAT,
                  "this is not a GGUF file (what Hugging Face publishes is loaded by its directory)");
    uint32_t version = llm__cursor_u32(&r);
    if (version != 2 && version != 3)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "this is GGUF version %lu; versions 2 and 3 are supported",
                  (unsigned long)version);
    uint64_t n_tensors = llm__cursor_u64(&r), n_values = llm__cursor_u64(&r);
    size_t room = 0;
    r.what = "the metadata";
    llm__gguf_check_count(&r, n_values, 8 + 4 + 1);
    for (uint64_t i = 0; i < n_values; i++) {
        ck->values = (llm__gguf_value *)llm__alloc_grow(env, ck->values, ck->n_values, &room, sizeof *ck->values);
        ck->values[ck->n_values] = llm__gguf_read_value(&r);
        ck->n_values++;
    }
    int64_t alignment = llm__gguf_int(env, ck, "general.alignment", 32, 1, 1 << 20);
    if (alignment & (alignment - 1))
        llm__fail(env, LLM_ERROR_FORMAT, "general.alignment is %lld, not a power of two", (long long)alignment);
    llm__gguf_read_tensors(&r, ck, file, n_tensors, (uint64_t)alignment);
}

/* Reads one file, which may be the first part of a split model. */
static llm__checkpoint *llm__gguf_read_first(llm__env *env, const llm__file *file) {
    llm__checkpoint *ck = (llm__checkpoint *)llm__alloc_zero(env, 1, sizeof *ck);
    llm__gguf_read_part(env, ck, file);
    llm__tensor_sort(env, ck);
    return ck;
}

/* Reads a model from memory or a callback. It must be in one part, since the other parts cannot be found. */
static llm__checkpoint *llm__gguf_read_whole(llm__env *env, const llm__file *file) {
    llm__checkpoint *ck = llm__gguf_read_first(env, file);
    int count = (int)llm__gguf_int(env, ck, "split.count", 1, 0, 65535);
    if (count > 1)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "this is one of the %d parts of a split file, which is loaded by path",
                  count);
    return ck;
}

/* The path of part `number` of a split model; NULL if the first part's path does not end in -00001-of-0000N.gguf. */
static char *llm__gguf_split_path(llm__env *env, const char *path, int number, int count) {
    char ending[40];
    size_t n = strlen(path), m = (size_t)snprintf(ending, sizeof ending, "-00001-of-%05d.gguf", count);
    if (n < m || strcmp(path + n - m, ending)) return NULL;
    char *other = llm__str_copy(env, path, n);
    snprintf(ending, sizeof ending, "-%05d-of-%05d.gguf", number, count);
    memcpy(other + n - m, ending, m);
    return other;
}

/* Opens a file, and the other parts if it is the first part of a split model. */
static llm__checkpoint *llm__gguf_open(llm__env *env, const char *path) {
    llm__checkpoint *ck = (llm__checkpoint *)llm__alloc_zero(env, 1, sizeof *ck);
    llm__gguf_read_part(env, ck, llm__file_open(env, path));
    int count = (int)llm__gguf_int(env, ck, "split.count", 1, 0, 65535);
    int no = (int)llm__gguf_int(env, ck, "split.no", 0, 0, 65535);
    if (count > 1 && (no || !llm__gguf_split_path(env, path, 1, count)))
        llm__fail(env, LLM_ERROR_ARGUMENT,
                  "this is part %d of %d: the first is to be loaded, its name ends in -00001-of-%05d.gguf", no + 1,
                  count, count);
    for (int i = 1; i < count; i++) {
        llm__checkpoint part;
        memset(&part, 0, sizeof part);
        env->file = llm__gguf_split_path(env, path, i + 1, count);
        llm__gguf_read_part(env, &part, llm__file_open(env, env->file));
        if (llm__gguf_int(env, &part, "split.no", -1, 0, 65535) != i ||
            llm__gguf_int(env, &part, "split.count", -1, 0, 65535) != count)
            llm__fail(env, LLM_ERROR_FORMAT, "split.no and split.count do not say that this is part %d of %d", i + 1,
                      count);
        for (size_t j = 0; j < part.n_tensors; j++) llm__tensor_add(env, ck, &part.tensors[j]);
    }
    env->file = path;
    uint64_t wanted = (uint64_t)llm__gguf_int(env, ck, "split.tensors.count", (int64_t)ck->n_tensors, 0, INT32_MAX);
    if (wanted != ck->n_tensors)
        llm__fail(env, LLM_ERROR_FORMAT, "split.tensors.count is %llu, but the %d parts hold %llu tensors",
                  (unsigned long long)wanted, count, (unsigned long long)ck->n_tensors);
    llm__tensor_sort(env, ck);
    return ck;
}

/* ---- Hugging Face directories ----
   config.json and tensors, either in model.safetensors or in the files that model.safetensors.index.json lists. A
   safetensors file (https://github.com/huggingface/safetensors) is the length of a JSON text in 8 bytes, then the
   text, then data:
     {"NAME": {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [begin, end]}, ..., "__metadata__": {...}} */

/* An unsigned integer in the header. Sizes of files that this machine can map are below 2^53. */
static uint64_t llm__safetensors_number(llm__env *env, llm__str tensor, const llm__json *v) {
    if (v->type != LLM__JSON_NUMBER || !(v->number >= 0 && v->number <= 9007199254740992.0) ||
        v->number != (double)(uint64_t)v->number)
        llm__fail(env, LLM_ERROR_FORMAT, "tensor %.*s: \"%.*s\" in its shape or data_offsets is no size",
                  LLM__SHOW(tensor), LLM__SHOW(v->string));
    return (uint64_t)v->number;
}

static llm__tensor llm__safetensors_tensor(llm__env *env, const llm__file *file, uint64_t start,
                                           const llm__json *entry) {
    llm__tensor t;
    const llm__json *dtype = llm__json_get(entry, "dtype"), *shape = llm__json_get(entry, "shape");
    const llm__json *offsets = llm__json_get(entry, "data_offsets");
    memset(&t, 0, sizeof t);
    t.name = entry->key;
    if (!dtype || dtype->type != LLM__JSON_STRING || !shape || shape->type != LLM__JSON_ARRAY || !offsets ||
        offsets->type != LLM__JSON_ARRAY || offsets->n != 2)
        llm__fail(env, LLM_ERROR_FORMAT, "tensor %.*s lacks a dtype, a shape or two data_offsets", LLM__SHOW(t.name));
    t.type = llm__file_type_find_plain(dtype->string);
    if (!t.type)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "tensor %.*s has the unknown dtype %.*s", LLM__SHOW(t.name),
                  LLM__SHOW(dtype->string));
    t.rows = t.cols = 1;
    for (const llm__json *d = shape->first; d; d = d->next) {
        t.rows = llm__tensor_mul(env, t.name, t.rows, t.cols);
        t.cols = llm__safetensors_number(env, t.name, d);
    }
    t.row_bytes = llm__tensor_mul(env, t.name, t.cols, t.type->block_bytes);
    uint64_t begin = llm__safetensors_number(env, t.name, offsets->first);
    uint64_t end = llm__safetensors_number(env, t.name, offsets->first->next);
    if (end < begin || end - begin != llm__tensor_mul(env, t.name, t.rows, t.row_bytes))
        llm__fail(env, LLM_ERROR_FORMAT, "tensor %.*s is %llu x %llu of %s, but its data_offsets are %llu and %llu",
                  LLM__SHOW(t.name), (unsigned long long)t.rows, (unsigned long long)t.cols, t.type->name,
                  (unsigned long long)begin, (unsigned long long)end);
    llm__tensor_place(env, &t, file, llm__tensor_plus(env, t.name, start, begin));
    return t;
}

/* Adds the tensors of one file, whose path is env->file. */
static void llm__safetensors_read(llm__env *env, llm__checkpoint *ck) {
    const llm__file *file = llm__file_open(env, env->file);
    uint64_t n = file->size < 8 ? 0 : llm__bytes_u64(file->data);
    if (file->size < 8 || n > file->size - 8)
        llm__fail(env, LLM_ERROR_FORMAT, "the header is said to be %llu bytes long, but the file has %llu",
                  (unsigned long long)n, (unsigned long long)file->size);
    const llm__json *header = llm__json_parse(env, file->data + 8, (size_t)n);
    if (header->type != LLM__JSON_OBJECT) llm__fail(env, LLM_ERROR_FORMAT, "the header is not a JSON object");
    for (const llm__json *entry = header->first; entry; entry = entry->next) {
        if (llm__str_is(entry->key, "__metadata__")) continue;
        llm__tensor t = llm__safetensors_tensor(env, file, 8 + n, entry);
        llm__tensor_add(env, ck, &t);
    }
}

static const llm__json *llm__hf_open_json(llm__env *env, const char *directory, const char *name) {
    env->file = llm__path_join(env, directory, name);
    const llm__file *file = llm__file_open(env, env->file);
    const llm__json *v = llm__json_parse(env, file->data, (size_t)file->size);
    if (v->type != LLM__JSON_OBJECT) llm__fail(env, LLM_ERROR_FORMAT, "this is not a JSON object");
    return v;
}

/* Reads the files that an index names. Its weight_map maps each tensor to a file. */
static void llm__safetensors_read_shards(llm__env *env, llm__checkpoint *ck, const llm__json *index,
                                         const char *index_path) {
    const llm__json *map = llm__json_get(index, "weight_map");
    if (!map || map->type != LLM__JSON_OBJECT) llm__fail(env, LLM_ERROR_FORMAT, "weight_map is not an object");
    llm__str *names = (llm__str *)llm__alloc(env, map->n + 1, sizeof *names);
    size_t n = 0;
    for (const llm__json *entry = map->first; entry; entry = entry->next) {
        llm__str name = entry->string;
        if (entry->type != LLM__JSON_STRING || !name.n || memchr(name.at, '/', name.n) ||
            memchr(name.at, '\\', name.n) || memchr(name.at, 0, name.n))
            llm__fail(env, LLM_ERROR_FORMAT,
                      "weight_map: %.*s is in \"%.*s\", which is not the name of a file in the same directory",
                      LLM__SHOW(entry->key), LLM__SHOW(name));
        size_t i = 0;
        while (i < n && !llm__str_equal(names[i], name)) i++;
        names[i] = name;
        if (i < n) continue;
        n++;
        env->file = llm__path_join(env, ck->directory, llm__str_copy(env, name.at, name.n));
        llm__safetensors_read(env, ck);
        env->file = index_path;
    }
}

static llm__checkpoint *llm__hf_open(llm__env *env, const char *directory) {
    const char *path = env->file;
    llm__checkpoint *ck = (llm__checkpoint *)llm__alloc_zero(env, 1, sizeof *ck);
    ck->format = LLM__HUGGING_FACE;
    ck->directory = directory;
    ck->config = llm__hf_open_json(env, directory, "config.json");
    ck->config_path = env->file;
    env->file = llm__path_join(env, directory, "model.safetensors");
    if (llm__path_find(env->file) == LLM__REGULAR) {
        llm__safetensors_read(env, ck);
    } else {
        const char *name = "model.safetensors.index.json";
        env->file = path;
        if (llm__path_find(llm__path_join(env, directory, name)) != LLM__REGULAR)
            llm__fail(env, LLM_ERROR_IO, "there is neither model.safetensors nor %s in this directory", name);
        const llm__json *index = llm__hf_open_json(env, directory, name);
        llm__safetensors_read_shards(env, ck, index, env->file);
    }
    env->file = path;
    llm__tensor_sort(env, ck);
    return ck;
}

/* If path is a directory, or the config.json in one, returns that directory; otherwise NULL. */
static const char *llm__hf_directory(llm__env *env, const char *path) {
    const char *name = llm__path_name(path);
    if (llm__path_find(path) == LLM__DIRECTORY) return path;
    if (strcmp(name, "config.json")) return NULL;
    return name == path ? "." : llm__str_copy(env, path, (size_t)(name - path));
}

static llm__checkpoint *llm__checkpoint_open(llm__env *env, const llm__file_source *source) {
    if (!source->path) return llm__gguf_read_whole(env, llm__file_open_source(env, source));
    const char *directory = llm__hf_directory(env, source->path);
    return directory ? llm__hf_open(env, directory) : llm__gguf_open(env, source->path);
}

/* ==== 6 Hyperparameters =========================================================================================

   The numbers that define a model's shape, checked here once. A setting that we do not implement is refused by name,
   because ignoring it would only show up as bad output. */

enum { LLM__MOST_HEAD = 4096 }; /* largest head_dim */

/* The meaning of config.json's sliding_window. */
typedef enum llm__hparams_window_rule {
    LLM__NO_WINDOW,
    LLM__WINDOW_ALWAYS,
    LLM__WINDOW_IF_USED
} llm__hparams_window_rule;

typedef struct llm__hparams_architecture {
    const char *gguf, *hugging_face, *class_name; /* gguf is NULL if GGUF files use another architecture's name */
    bool
        interleaved_rope; /* GGUF stores the rows of Q and K so that RoPE pairs are (2i, 2i + 1) instead of (i, i + rope_dim / 2) */
    bool qkv_bias, qk_norm;
    llm__hparams_window_rule window;
} llm__hparams_architecture;

static const llm__hparams_architecture llm__hparams_architectures[] = {
    {"llama", "llama", "LlamaForCausalLM", true, false, false, LLM__NO_WINDOW},
    {NULL, "mistral", "MistralForCausalLM", true, false, false, LLM__WINDOW_ALWAYS},
    {"qwen2", "qwen2", "Qwen2ForCausalLM", false, true, false, LLM__WINDOW_IF_USED},
    {"qwen3", "qwen3", "Qwen3ForCausalLM", false, false, true, LLM__WINDOW_IF_USED},
};

enum { LLM__N_ARCHITECTURES = sizeof llm__hparams_architectures / sizeof *llm__hparams_architectures };

/* RoPE scaling. Each pair of dimensions rotates at its own frequency; `turns` is how often it goes round within the
   context length of the original training. To extend the context, slow pairs are slowed down further by a factor, and
   fast pairs are left alone:
     linear   all pairs are slowed down
     llama3   between the two, a blend that is linear in the number of turns
     yarn     between the two, a blend that is linear in the pair's index (arXiv:2309.00071); also scales sines and cosines */
typedef enum llm__hparams_rope_kind {
    LLM__ROPE_PLAIN,
    LLM__ROPE_LINEAR,
    LLM__ROPE_LLAMA3,
    LLM__ROPE_YARN
} llm__hparams_rope_kind;

typedef struct llm__hparams_rope {
    llm__hparams_rope_kind kind;
    double base, factor;
    double n_original; /* context length of the original training */
    double few_turns, many_turns;
    bool whole_pairs;            /* yarn: round the limits to whole pairs */
    double scale;                /* factor for sines and cosines; 0: computed as in yarn, */
    double growth, growth_below; /* as (1 + growth * log(factor) / 10) / (1 + growth_below * log(factor) / 10) */
} llm__hparams_rope;

typedef struct llm__hparams {
    llm__str name, architecture;
    int n_vocab, n_layers, n_embd, n_ff, n_heads, n_kv_heads, head_dim, rope_dim, n_ctx_train;
    int window; /* sliding window in positions; 0: none */
    float rms_eps;
    llm__hparams_rope rope;
    bool interleaved_rope, qkv_bias, qk_norm, tied_head;
} llm__hparams;

static void llm__hparams_set_architecture(llm__hparams *h, const llm__hparams_architecture *a,
                                          llm__checkpoint_format format) {
    h->interleaved_rope = a->interleaved_rope && format == LLM__GGUF;
    h->qkv_bias = a->qkv_bias;
    h->qk_norm = a->qk_norm;
}

/* Smallest base of RoPE's frequencies. */
#define LLM__LEAST_BASE 2.0
#define LLM__MOST_BASE 1e15

/* Checks that apply to both file formats. */
static void llm__hparams_check(llm__env *env, const llm__hparams *h) {
    if (h->n_heads % h->n_kv_heads)
        llm__fail(env, LLM_ERROR_FORMAT, "%d query heads cannot share %d key heads", h->n_heads, h->n_kv_heads);
    if (h->n_heads / h->n_kv_heads > 64)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "%d query heads share a key head; at most 64 can",
                  h->n_heads / h->n_kv_heads);
    if (h->rope_dim % 2 || h->rope_dim > h->head_dim)
        llm__fail(env, LLM_ERROR_FORMAT, "RoPE over %d of a head's %d dimensions", h->rope_dim, h->head_dim);
    if (h->rope.kind != LLM__ROPE_PLAIN && h->rope.kind != LLM__ROPE_LINEAR && h->rope.few_turns >= h->rope.many_turns)
        llm__fail(env, LLM_ERROR_FORMAT, "RoPE is scaled between %g and %g turns", h->rope.few_turns,
                  h->rope.many_turns);
}

/* ---- GGUF ---- */

/* Keys that begin with the architecture's name, such as "llama.block_count". */
typedef struct llm__gguf_arch_key {
    char text[128];
} llm__gguf_arch_key;

static llm__gguf_arch_key llm__gguf_make_arch_key(llm__env *env, const llm__checkpoint *ck, const char *key) {
    llm__gguf_arch_key full;
    llm__str arch = llm__gguf_str(env, ck, "general.architecture");
    snprintf(full.text, sizeof full.text, "%.*s.%s", LLM__SHOW(arch), key);
    return full;
}

static int llm__gguf_arch_int(llm__env *env, const llm__checkpoint *ck, const char *key, int64_t missing,
                              int64_t most) {
    return (int)llm__gguf_int(env, ck, llm__gguf_make_arch_key(env, ck, key).text, missing, missing == 0 ? 0 : 1, most);
}

static double llm__gguf_arch_number(llm__env *env, const llm__checkpoint *ck, const char *key, double missing,
                                    double least, double most) {
    llm__gguf_arch_key full = llm__gguf_make_arch_key(env, ck, key);
    if (!llm__gguf_find(ck, full.text)) return missing;
    double d = llm__gguf_number(env, ck, full.text, 0);
    if (!(d >= least && d <= most))
        llm__fail(env, LLM_ERROR_FORMAT, "metadata %s is %g, not from %g to %g", full.text, d, least, most);
    return d;
}

static void llm__gguf_refuse(llm__env *env, const llm__checkpoint *ck) {
    static const struct {
        const char *key;
        double harmless;
    } keys[] = {
        {"expert_count", 0},
        {"attention.scale", 0},
        {"logit_scale", 0},
        {"residual_scale", 0},
        {"embedding_scale", 0},
        {"attn_logit_softcapping", 0},
        {"final_logit_softcapping", 0},
        {"attention.clamp_kqv", 0},
        {"attention.causal", 1},
        {"attention.sliding_window_pattern", 0},
        {"rope.scaling.attn_factor", 1},
        {"rope.scaling.yarn_ext_factor", 1},
        {"rope.scaling.yarn_log_multiplier", 0},
        {"rope.scaling.alpha", 0},
        {"rope.dimension_sections", 0},
    };
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        llm__gguf_arch_key key = llm__gguf_make_arch_key(env, ck, keys[i].key);
        const llm__gguf_value *v = llm__gguf_find(ck, key.text);
        if (!v || (!v->is_array && v->type != LLM__GGUF_STRING && llm__gguf_value_number(v, 0) == keys[i].harmless))
            continue;
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "metadata %s is set, which this library does not support", key.text);
    }
}

static llm__hparams_rope llm__gguf_rope(llm__env *env, const llm__checkpoint *ck, int n_ctx_train) {
    llm__hparams_rope r;
    memset(&r, 0, sizeof r);
    r.base = llm__gguf_arch_number(env, ck, "rope.freq_base", 10000, LLM__LEAST_BASE, LLM__MOST_BASE);
    r.factor = llm__gguf_arch_number(env, ck, "rope.scaling.factor",
                                     llm__gguf_arch_number(env, ck, "rope.scale_linear", 0, 0, 1e6), 0, 1e6);
    r.scale = 1;
    llm__gguf_arch_key key = llm__gguf_make_arch_key(env, ck, "rope.scaling.type");
    llm__str type = llm__gguf_str(env, ck, key.text);
    if (llm__str_is(type, "yarn")) {
        r.kind = LLM__ROPE_YARN;
        if (r.factor == 0)
            llm__fail(env, LLM_ERROR_FORMAT, "metadata %s is yarn, but rope.scaling.factor is missing", key.text);
        r.n_original = llm__gguf_arch_number(env, ck, "rope.scaling.original_context_length", n_ctx_train, 1, 1 << 28);
        r.few_turns = llm__gguf_arch_number(env, ck, "rope.scaling.yarn_beta_slow", 1, 1e-3, 1e6);
        r.many_turns = llm__gguf_arch_number(env, ck, "rope.scaling.yarn_beta_fast", 32, 1e-3, 1e6);
        r.whole_pairs = true;
        r.scale = llm__gguf_arch_number(env, ck, "rope.scaling.yarn_attn_factor", 0, 1e-3, 1e3);
        r.growth = 1;
    } else if (type.n && !llm__str_is(type, "linear") && !llm__str_is(type, "none")) {
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "metadata %s is \"%.*s\"; this library supports none, linear and yarn",
                  key.text, LLM__SHOW(type));
    } else if (r.factor != 0 && !llm__str_is(type, "none")) {
        r.kind = LLM__ROPE_LINEAR;
    }
    return r;
}

static llm__hparams llm__hparams_from_gguf(llm__env *env, const llm__checkpoint *ck) {
    llm__hparams h;
    memset(&h, 0, sizeof h);
    h.name = llm__gguf_str(env, ck, "general.name");
    h.architecture = llm__gguf_str(env, ck, "general.architecture");
    const llm__hparams_architecture *a = llm__hparams_architectures;
    while (a < llm__hparams_architectures + LLM__N_ARCHITECTURES && !(a->gguf && llm__str_is(h.architecture, a->gguf)))
        a++;
    if (a == llm__hparams_architectures + LLM__N_ARCHITECTURES)
        llm__fail(env, LLM_ERROR_UNSUPPORTED,
                  "the architecture is \"%.*s\"; this library supports llama, qwen2 and qwen3",
                  LLM__SHOW(h.architecture));
    llm__hparams_set_architecture(&h, a, ck->format);
    llm__gguf_refuse(env, ck);
    const llm__tensor *embd = llm__tensor_find(ck, "token_embd.weight");
    if (!embd) llm__fail(env, LLM_ERROR_FORMAT, "tensor token_embd.weight is missing");
    if (embd->rows > 1 << 24)
        llm__fail(env, LLM_ERROR_FORMAT, "tensor token_embd.weight has %llu rows", (unsigned long long)embd->rows);
    h.n_vocab = (int)embd->rows;
    h.n_layers = llm__gguf_arch_int(env, ck, "block_count", -1, 4096);
    h.n_embd = llm__gguf_arch_int(env, ck, "embedding_length", -1, 1 << 20);
    h.n_ff = llm__gguf_arch_int(env, ck, "feed_forward_length", -1, 1 << 22);
    h.n_heads = llm__gguf_arch_int(env, ck, "attention.head_count", -1, 4096);
    h.n_kv_heads = llm__gguf_arch_int(env, ck, "attention.head_count_kv", h.n_heads, 4096);
    h.n_ctx_train = llm__gguf_arch_int(env, ck, "context_length", -1, 1 << 28);
    h.head_dim = llm__gguf_arch_int(env, ck, "attention.key_length", h.n_embd / h.n_heads ? h.n_embd / h.n_heads : 1,
                                    LLM__MOST_HEAD);
    int value_length = llm__gguf_arch_int(env, ck, "attention.value_length", h.head_dim, LLM__MOST_HEAD);
    if (value_length != h.head_dim)
        llm__fail(env, LLM_ERROR_UNSUPPORTED,
                  "attention.value_length is %d and attention.key_length %d; this library supports equal ones",
                  value_length, h.head_dim);
    h.rope_dim = llm__gguf_arch_int(env, ck, "rope.dimension_count", h.head_dim, 4096);
    h.window = llm__gguf_arch_int(env, ck, "attention.sliding_window", 0, 1 << 28);
    h.rms_eps = (float)llm__gguf_arch_number(env, ck, "attention.layer_norm_rms_epsilon", 1e-5, 1e-12, 1);
    h.rope = llm__gguf_rope(env, ck, h.n_ctx_train);
    h.tied_head = !llm__tensor_find(ck, "output.weight");
    return h;
}

/* ---- config.json ---- */

static const llm__hparams_architecture *llm__config_architecture(llm__env *env, const llm__json *config,
                                                                 llm__str type) {
    const llm__hparams_architecture *a = llm__hparams_architectures;
    while (a < llm__hparams_architectures + LLM__N_ARCHITECTURES && !llm__str_is(type, a->hugging_face)) a++;
    if (a == llm__hparams_architectures + LLM__N_ARCHITECTURES)
        llm__fail(env, LLM_ERROR_UNSUPPORTED,
                  "model_type is \"%.*s\"; this library supports llama, mistral, qwen2 and qwen3", LLM__SHOW(type));
    const llm__json *classes = llm__json_get(config, "architectures");
    for (const llm__json *c = classes ? classes->first : NULL; c; c = c->next)
        if (!llm__str_is(c->string, a->class_name))
            llm__fail(env, LLM_ERROR_UNSUPPORTED,
                      "architectures names \"%.*s\"; of model_type %s this library supports %s", LLM__SHOW(c->string),
                      a->hugging_face, a->class_name);
    return a;
}

/* int8 weights as compressed-tensors writes them, with one scale per output channel. */
static void llm__config_check_quantization(llm__env *env, const llm__json *q) {
    if (!q) return;
    llm__str method = llm__json_get_str(env, q, "quant_method"), format = llm__json_get_str(env, q, "format");
    if (!llm__str_is(method, "compressed-tensors") ||
        (!llm__str_is(format, "int-quantized") && !llm__str_is(format, "naive-quantized")))
        llm__fail(env, LLM_ERROR_UNSUPPORTED,
                  "%.*s: quant_method is \"%.*s\" and format \"%.*s\"; this library supports compressed-tensors "
                  "as int-quantized and naive-quantized",
                  LLM__SHOW(q->key), LLM__SHOW(method), LLM__SHOW(format));
    if (llm__json_get(q, "kv_cache_scheme"))
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "%.*s.kv_cache_scheme is set, which this library does not support",
                  LLM__SHOW(q->key));
    const llm__json *groups = llm__json_get_type(env, q, "config_groups", LLM__JSON_OBJECT);
    for (const llm__json *g = groups ? groups->first : NULL; g; g = g->next) {
        const llm__json *w = llm__json_get_type(env, g, "weights", LLM__JSON_OBJECT);
        llm__str own = llm__json_get_str(env, g, "format");
        if (!w || (own.n && !llm__str_equal(own, format)) || llm__json_get_int(env, w, "num_bits", 0, 1, 64) != 8 ||
            !llm__str_is(llm__json_get_str(env, w, "type"), "int") || !llm__json_get_bool(env, w, "symmetric", false) ||
            !llm__str_is(llm__json_get_str(env, w, "strategy"), "channel"))
            llm__fail(env, LLM_ERROR_UNSUPPORTED,
                      "config_groups.%.*s: the weights are not num_bits 8, type int, symmetric, strategy channel "
                      "and of the whole's format, which is what this library runs",
                      LLM__SHOW(g->key));
    }
}

static void llm__config_refuse(llm__env *env, const llm__json *config, const llm__hparams_architecture *a) {
    static const char *const flags[] = {"attention_bias", "mlp_bias"};
    llm__str act = llm__json_get_str(env, config, "hidden_act");
    if (act.n && !llm__str_is(act, "silu") && !llm__str_is(act, "swish"))
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "hidden_act is \"%.*s\"; this library supports silu", LLM__SHOW(act));
    /* Architectures that always have these biases ignore the flags. */
    for (size_t i = 0; i < sizeof flags / sizeof *flags && !a->qkv_bias; i++)
        if (llm__json_get_bool(env, config, flags[i], false))
            llm__fail(env, LLM_ERROR_UNSUPPORTED, "%s is true, which this library does not support", flags[i]);
    llm__config_check_quantization(env, llm__json_get_type(env, config, "quantization_config", LLM__JSON_OBJECT));
    llm__config_check_quantization(env, llm__json_get_type(env, config, "compression_config", LLM__JSON_OBJECT));
}

static void llm__config_check_rotary_part(llm__env *env, const llm__json *object) {
    double part = llm__json_get_number(env, object, "partial_rotary_factor", 1, 0, 1);
    if (part != 1) llm__fail(env, LLM_ERROR_UNSUPPORTED, "partial_rotary_factor is %g; this library supports 1", part);
}

/* Reads rope_scaling. Newer files call it rope_parameters and put rope_theta into it. If both have a setting,
   rope_scaling wins, as in transformers. */
static llm__hparams_rope llm__config_rope(llm__env *env, const llm__json *config, int n_ctx_train) {
    llm__hparams_rope r;
    const llm__json *o = llm__json_get_type(env, config, "rope_scaling", LLM__JSON_OBJECT);
    memset(&r, 0, sizeof r);
    r.scale = 1;
    r.base = llm__json_get_number(env, config, "rope_theta", 10000, LLM__LEAST_BASE, LLM__MOST_BASE);
    llm__config_check_rotary_part(env, config);
    if (!o || !o->n) /* an empty object sets nothing */
        o = llm__json_get_type(env, config, "rope_parameters", LLM__JSON_OBJECT);
    if (!o) return r;
    llm__config_check_rotary_part(env, o);
    for (const llm__json *m = o->first; m; m = m->next)
        if (m->type == LLM__JSON_OBJECT || m->type == LLM__JSON_ARRAY)
            llm__fail(env, LLM_ERROR_UNSUPPORTED, "%.*s.%.*s is set, which this library does not support",
                      LLM__SHOW(o->key), LLM__SHOW(m->key));
    r.base = llm__json_get_number(env, o, "rope_theta", r.base, LLM__LEAST_BASE, LLM__MOST_BASE);
    llm__str type = llm__json_get_str(env, o, llm__json_get(o, "rope_type") ? "rope_type" : "type");
    if (!type.n || llm__str_is(type, "default")) return r;
    r.n_original = llm__json_get_number(env, o, "original_max_position_embeddings", n_ctx_train, 1, 1 << 28);
    if (llm__str_is(type, "linear")) {
        r.kind = LLM__ROPE_LINEAR;
    } else if (llm__str_is(type, "llama3")) {
        r.kind = LLM__ROPE_LLAMA3;
        r.few_turns = llm__json_get_number(env, o, "low_freq_factor", 1, 1e-3, 1e6);
        r.many_turns = llm__json_get_number(env, o, "high_freq_factor", 4, 1e-3, 1e6);
    } else if (llm__str_is(type, "yarn")) {
        r.kind = LLM__ROPE_YARN;
        r.few_turns = llm__json_get_number(env, o, "beta_slow", 1, 1e-3, 1e6);
        r.many_turns = llm__json_get_number(env, o, "beta_fast", 32, 1e-3, 1e6);
        r.whole_pairs = llm__json_get_bool(env, o, "truncate", true);
        r.scale = llm__json_get_number(env, o, "attention_factor", 0, 1e-3, 1e3);
        r.growth = llm__json_get_number(env, o, "mscale", 0, 0, 1e3);
        r.growth_below = llm__json_get_number(env, o, "mscale_all_dim", 0, 0, 1e3);
        if (r.growth == 0 || r.growth_below == 0) { /* one without the other has no meaning */
            r.growth = 1;
            r.growth_below = 0;
        }
    } else {
        llm__fail(env, LLM_ERROR_UNSUPPORTED,
                  "%.*s is of type \"%.*s\"; this library supports default, linear, llama3 and yarn", LLM__SHOW(o->key),
                  LLM__SHOW(type));
    }
    if (r.kind != LLM__ROPE_YARN && !llm__json_get(o, "factor"))
        llm__fail(env, LLM_ERROR_FORMAT, "%.*s.factor is missing", LLM__SHOW(o->key));
    r.factor = llm__json_get_number(env, o, "factor", n_ctx_train / r.n_original, 1e-3, 1e6);
    return r;
}

/* The sliding window in positions, 0 for none. It must be the same in all layers, otherwise the file is refused. */
static int llm__config_window(llm__env *env, const llm__json *config, const llm__hparams_architecture *a,
                              int n_layers) {
    const llm__json *types = llm__json_get(config, "layer_types");
    bool used = a->window == LLM__WINDOW_ALWAYS ||
                (a->window == LLM__WINDOW_IF_USED && llm__json_get_bool(env, config, "use_sliding_window", false));
    int n = 0;
    for (const llm__json *t = types ? types->first : NULL; t; t = t->next) {
        if (!llm__str_is(t->string, "sliding_attention") && !llm__str_is(t->string, "full_attention"))
            llm__fail(env, LLM_ERROR_UNSUPPORTED,
                      "layer_types names \"%.*s\"; this library supports full_attention and sliding_attention",
                      LLM__SHOW(t->string));
        n += llm__str_is(t->string, "sliding_attention");
    }
    if (types && types->n != (size_t)n_layers)
        llm__fail(env, LLM_ERROR_FORMAT, "layer_types has %llu entries for %d layers", (unsigned long long)types->n,
                  n_layers);
    if (!types && a->window == LLM__WINDOW_ALWAYS) n = n_layers;
    if (!types && a->window == LLM__WINDOW_IF_USED && used) {
        int full = llm__json_get_int(env, config, "max_window_layers", 28, 0, 1 << 28);
        n = full < n_layers ? n_layers - full : 0;
    }
    if (n == 0) return 0;
    if (n != n_layers || !used)
        llm__fail(env, LLM_ERROR_UNSUPPORTED,
                  "%d of %d layers have a sliding window; this library supports it in all layers or none", n, n_layers);
    return llm__json_get_int(env, config, "sliding_window", llm__json_find(config, "sliding_window") ? 0 : 4096, 1,
                             1 << 28);
}

static bool llm__config_tied_head(llm__env *env, const llm__checkpoint *ck) {
    const llm__tensor *embedding = llm__tensor_find(ck, "model.embed_tokens.weight");
    const llm__tensor *head = llm__tensor_find(ck, "lm_head.weight");
    bool tied = llm__json_get_bool(env, ck->config, "tie_word_embeddings", !head);
    if (!tied && !head)
        llm__fail(env, LLM_ERROR_FORMAT, "tie_word_embeddings is false, but there is no tensor lm_head.weight");
    if (!tied || !head) return tied;
    if (!embedding || head->type != embedding->type || head->rows != embedding->rows || head->cols != embedding->cols ||
        memcmp(head->data, embedding->data, (size_t)(head->rows * head->row_bytes)))
        llm__fail(env, LLM_ERROR_FORMAT,
                  "tie_word_embeddings is true, but tensor lm_head.weight is not model.embed_tokens.weight");
    llm__tensor_use(ck, head);
    return true;
}

static llm__hparams llm__hparams_from_config(llm__env *env, const llm__checkpoint *ck) {
    llm__hparams h;
    const llm__json *config = ck->config;
    const char *path = env->file;
    memset(&h, 0, sizeof h);
    env->file = ck->config_path;
    h.name = llm__json_get_str(env, config, "_name_or_path");
    h.architecture = llm__json_get_str(env, config, "model_type");
    const llm__hparams_architecture *a = llm__config_architecture(env, config, h.architecture);
    llm__hparams_set_architecture(&h, a, ck->format);
    llm__config_refuse(env, config, a);
    h.n_vocab = llm__json_get_int(env, config, "vocab_size", -1, 1, 1 << 24);
    h.n_layers = llm__json_get_int(env, config, "num_hidden_layers", -1, 1, 4096);
    h.n_embd = llm__json_get_int(env, config, "hidden_size", -1, 1, 1 << 20);
    h.n_ff = llm__json_get_int(env, config, "intermediate_size", -1, 1, 1 << 22);
    h.n_heads = llm__json_get_int(env, config, "num_attention_heads", -1, 1, 4096);
    h.n_kv_heads = llm__json_get_int(env, config, "num_key_value_heads", h.n_heads, 1, 4096);
    h.n_ctx_train = llm__json_get_int(env, config, "max_position_embeddings", -1, 1, 1 << 28);
    int usual = a->qk_norm ? 128 : h.n_embd / h.n_heads;
    h.head_dim = llm__json_get_int(env, config, "head_dim", usual ? usual : 1, 1, LLM__MOST_HEAD);
    h.rope_dim = h.head_dim;
    h.window = llm__config_window(env, config, a, h.n_layers);
    h.rms_eps = (float)llm__json_get_number(env, config, "rms_norm_eps", 1e-6, 1e-12, 1);
    h.rope = llm__config_rope(env, config, h.n_ctx_train);
    h.tied_head = llm__config_tied_head(env, ck);
    llm__hparams_check(env, &h);
    env->file = path;
    return h;
}

static llm__hparams llm__hparams_read(llm__env *env, const llm__checkpoint *ck) {
    if (ck->format == LLM__HUGGING_FACE) return llm__hparams_from_config(env, ck);
    llm__hparams h = llm__hparams_from_gguf(env, ck);
    llm__hparams_check(env, &h);
    return h;
}

/* ==== 7 Unicode =================================================================================================

   What the tokenizer must know of Unicode: the class of each code point, for the pre-tokenizers, and normalisation
   form C. Both come from compact tables that tokenizer/unicode.py prints and that are unpacked when a tokenizer is
   built. */

enum { /* classes of code points for the pre-tokenizers: the general category in one bit; a space is any White_Space */
       LLM__UPPER = 1,    /* Lu, Lt */
       LLM__LOWER = 2,    /* Ll     */
       LLM__CASELESS = 4, /* Lm, Lo */
       LLM__LETTER = 7,
       LLM__MARK = 8,
       LLM__NUMBER = 16,
       LLM__PUNCTUATION = 32,
       LLM__SYMBOL = 64,
       LLM__SPACE = 128
};

/* Generated by tokenizer/unicode.py from here to the next function: classes as runs. Each run is a letter, which names
   a class, and a length, as llm__unicode_build_classes reads them. The letter A stands for pairs of an upper and a
   lower case letter. */
static const char *const llm__unicode_class_runs[] = {
    ".9s5.18sp3yp6yp4n10p2y3p2U26p3ypyl26pypy.6s.26spy5py2opy.y4n2ylp2ynopn3pU23yU7l24yl8A27Ul2A7Ul2A23U2lAUl3U2lA",
    "U2lU3l2U4lU2lU3l3U2lU2lA2U2lUl2AU2lU3lAU2l2oUl3o4U2lU2lU2lA7Ul2A8Ul2U2lAU3lA28Ul7U2lU2l2AU4lA3Ul69ol27o18y4o12",
    "y14o5y7oyoy17m112A2oyA.2ol3pU.4y2UpU3.U.U2lU17.U9l35Ul2U3l3A11Ul5AyAU2l2U51l48A17ym7A27U2lA5Ul2A48.U38.2op6l41",
    "p2.2y3.m45pmpm2pm2pm.8o27.4o4p2.17y3p2yp2y2m11p.p3o43m21n10p4o2mo99pom7.ym6o2m2ym4o2n10o3y2op14.2omo30m27.2o89",
    "m11o.14n10o33m9o2yp3o.2my2o22m4om9om3om5.2p15.o25m3.2p.o11.5o24yo6.8m9o42m24.m33o54m3om18om7o10m2p2n10po16m3.",
    "o8.2o2.2o22.o7.o.3o4.2mom7.2m2.2m3o.8m.4o2.o3m2.2n10o2y2n6y2opm.2m3.o6.4o2.2o22.o7.o2.o2.o2.2m.m5.4m2.2m3.3m.7",
    "o4.o.7n10m2o3mp.10m3.o9.o3.o22.o7.o2.o5.2mom8.m3.m3.2o.15o2m2.2n10py.7om6.m3.o8.2o2.2o22.o7.o2.o5.2mom7.2m2.2",
    "m3.7m3.4o2.o3m2.2n10yon6.10mo.o6.3o3.o4.3o2.o.o2.3o2.3o3.3o12.4m5.3m3.m4.2o.6m.14n13y8.5m5o8.o3.o23.o16.2mom7.",
    "m3.m4.7m2.o3.2o.2o2m2.2n10.7pn7yom3po8.o3.o23.o10.o5.2mom7.m3.m4.7m2.6o2.o2m2.2n10.o2m.12m4o9.o3.o41m2om7.m3.",
    "m4oy.4o3mn7o3m2.2n19yo6.m3.o18.3o24.o9.o.2o7.3m.4m6.m.m8.6n10.2m2p.12o48mo2m7.4yo7m8pn10p2.37o2.o.o5.o24.o.o10",
    "mo2m9o.2o5.o.m7.n10.2o4.32oy3p15ypy3m2y6n20ymymymp4m2o8.o36.4m20pm2o5m11.m36.y8my6.y2p5y4p2.37o43m20on10p6o6m4",
    "o4m3om3o2m7o3m4o13m12omn10m4y2U38.U.5U.2l43pol3o329.o4.2o7.o.o4.2o41.o4.2o33.o4.2o7.o.o4.2o15.o57.o4.2o67.2m3",
    "p9n20.3o16y10.6U86.2l6.2po620ypo17so26p2.3o75p3n3o8.7o18m4.9o19m3p2.9o18m2.12o13.o3.m2.12o52m32p3op3yom.2n10.6",
    "n10.6p11m3.mn10.6o89.7o5m2o34mo.5o70.10o31.m12.4m12.4y.3p2n10o30.2o5.11o44.4o26.6n11.3y34o23m5.2p2o53m10.m29.2",
    "mn10.6n10.6p7op6.2m31.49m5o47m17o8.p2n10p7y10m9y9p3m3o30m13o2n10o44m14.8p4o36m20.3p5n10.3o3n10o36p2l9A.5U43.2",
    "U3p8.8m3pm21o4mo6mo2m3o.5l44o63l13ol34o37m64A74Ul9A48Ul9U8l6.2U6.2l8U8l8U8l6.2U6.2l8.U.U.U.Ul8U8l14.2l8U8l8U8",
    "l8U8l5.l2U5yly3l3.l2U5y3l4.2l2U4.y3l8U5y3.2l3.l2U5y2.s11.5p24s2.5sp20yp13yp12s.16no.2n6y3p2on10y3p2.o13.3y33",
    ".15m33.15y2Uy4Uy2lU3l2U3lyUy3U5y6UyUyUyU4ylU4lo4ly2l2U2y5Ul4y4lyn51An5y2.4y376p4y29p2y255.22y11.21n60y78n22",
    "y616p14n30y49p2y31p10y403p22y63p4y32p2y374.2y32.y105U48l48AU3l2A3U4lUl2Ul6o2U3lA48Ul2y6A2m3A.5p4np2l38.l.5l.2",
    "o56.7op.14mo23.9o7.o7.o7.o7.o7.o7.o7.o7.m32p47op32y2p12.34y26.y89.12y214.26y16sp3yo2np10y2p12yn9m6po5y2n3o2py2",
    ".o86.2m2y2o3po90po4.5o43.o94.y2n4y10o32y38.9yo16y31.n10y30n8yn15y32n10y39n15y320o6592y64o22157.3y55.9o46p2o269",
    "p3o16n10o2.20A23om4pm10poA14o2m2o70n10m2p6.8y23o9y2A6Ul3A31ol8A2U2lA4oy2A2oAUl3A10U5lU5lA7U4lAU2l.2A.l.lA3U.21",
    "o3Ao3lo7mo3mo4mo23m5y4m.3n6y4.6o52p4.8m2o50m18.8p2n10.6m18o6p3opo2mn10o28m8p2o23m13.11po29.3m4o47m14p13.on10.4",
    "p2o5mo10n10o5.o41m14.9o3mo8m2.2n10.2p4o23y3om3o50mom3o2m2o5m2omo.24o3p2o11m5p2o3m2.10o6.2o6.2o6.9o7.o7.l43yo4",
    "l9oy2.4l80o35m8pm2.2n10.6o11172.12o23.4o49.8452o366.2o106.38l7.12l5.5omo10yo13.o5.o.o2.o2.o108y17.16o363p2y16",
    "o64.2o54.7y.32o12y4m16p10.6m16p35.p14ypy3.pyp2.4o5.o135.4p3yp6yp4n10p2y3p2U26p3ypyl26pypyp7o89.3o6.2o6.2o6.2o3",
    ".3y7.y7.13y2.2o12.o26.o19.o2.o15.2o14.34o123.5p3.4n45.3y9n57y17n2y3.y13.3y.47y45m.130o29.3o49.15mn27.4o32n4.9",
    "o20no8n.5o38m5.5o30.po36.4o8pn5.42U40l40o78.2n10.6U36.4l36.4o40.8o52.11pU11.U15.U7.U2.l11.l15.l7.l2.3o52.12",
    "o311.9o22.10o8.24o6.o42.o9.69o6.2o.o44.o2.3o.2o23.pn8o23y2n7o31.8n9.48o19.o2.5n5o22n6.3po26.5p.64o56.4n2o2n16",
    ".2n46om3.m2.5m4o4.o3.o29.2m3.4mn9.7p9.7o29n2po29n3.32o8yo28m2.4n5p7.9o54.3p7o22.2n8o19.5n8o18.7p4.12n7.80o73",
    ".55U51.13l51.7n6o36m4.8n10.6n10o6U22.3m5pol22.8y2.208n31.o42.m2p.2o2.16o3.55m4o29n10o.8o22m11n4p5.22o18m4p4.38",
    "o21n7.20o23.9m3o53m15p7.4n30mo2m2o.9m4o45m11p2.p4m.13o25.7n10.6m3o36m14.n10p4om2o.8o35mp2o.9m3o48m14o4p4m4pm2",
    "n10opop3.n20.11o18.o25m12p6mo2m.62o7.o.o4.o15.o10p.6o47m12.5n10.6m4.o8.2o2.2o22.o7.o2.o5.m2om7.2m2.2m3.2o.6m.5",
    "o5m2.2m7.3m5.11o10.o.2o.o38.om9.m.2m.m4.m5omop2.p2.8m2.29o53m18o4p5n10p2.pmo3.30o48m20o2po.8n10.166o47m7.2m9",
    "p23o4m2.34o48m17p3o.11n10.6p13.19o43m13op.6n10.6n20.28o27.2m15.4n12p3yo7.185o44m15p.100U32l32n19.12o8.2o.2o8.",
    "o2.o24m6.m2.2m4omom2p3.9n10.70o8.2o39m7.2m7opom.27om10o40m7om4p8m.8om11o46m16p3op5.13o73.7p10.182o33p.14n10.6",
    "o9.o37m8.m8op5.10n29.3p2o30.2m22.m14.73o7.o2.o38m6.3m.m2.m7om.8n10.6o6.o2.o32m5.m2.m5o.7n10.310o19m4p2.7m2om",
    "o13.o34m7.3m5p13n10m.85o.15n21y29.13po922.102n111.p5.11o196.2636o97p2.13o1072.16mo6m15.10o3995.5o583.6841o30",
    "m18n10.1734o569.7o31.n10.4p2o79.n10.6o30.2m5p.10o48m7p5y4o4py.10n10.n7.o21.5o19.432o45p3n10.198U32l32n23p4.101",
    "o75.4mom55.7m4o13.64o2pom.11m2.14o6136.8o1238.41o10.8935o4.o7.o2.o291.15o.29o3.2o.14o4.8o396.2308o107.5o13.3o9",
    ".7o10.2ym2p.3936y240n10.6y436.76m46.2m23.9y116.60y246.10y39.2y60m5y3m6.8m8y2m7y30m4y61.21y66m3y.122n20.12n20",
    ".12y87.9n25.135U26l26U26l7.l18U26l26U.U2.2U.2U2.2U4.U8l4.l.l7.l11U26l26U2.U4.2U8.U7.l26U2.U4.U5.U.3U7.l26U26",
    "l26U26l26U26l26U26l26U26l26U26l28.2U25yl25yl6U25yl25yl6U25yl25yl6U25yl25yl6U25yl25yl6A.2n50y512m55y4m50y8my14m",
    "y2p5.15m5.m15.1104l10ol20.6l6.213m7.m17.2m7.m2.m5.5o62.33m.112o45.3m7o7.2n10.4oy.320o30m.17o44m4n10.5y.464o28",
    "m4n10.214o30m2on10.4p.480o7.o4.o2.o15.o197.2n9m7.41U34l34m7o.4n10.4p2.785n59yn3yn4.76n45yn15.194o4.o27.o2.o.2o",
    ".o10.o4.o.o.6o.4o.o.o.o3.o2.o.2o.o.o.o.o.o2.o.2o4.o7.o4.o4.o.o10.o17.5o3.o5.o17.52y2.270y44.4y100.12y15.2y15.",
    "y15.y37.10n13y161.56y29.13y44.4y9.7y2.14y6.154y984.4y17.3y13.3y119.4y95.6y12.4y.15y12.4y56.8y10.6y40.8y30.2y12",
    ".4y2.62y340.12y14.2y13.3y10.5y56.7y15.2y11.6y9.7y147.y92n10.1030o42720.32o4154.6o222.2o5762.14o7473.15o622",
    ".2466o542.1506o4939.5o4192.712016m240.196112",
    NULL};

/* The classes of all code points in pages of 128. Equal pages are stored once. Page 0 is ASCII. */
enum { LLM__N_PAGES = 0x110000 / 128, LLM__MAX_PAGES = 320 };

typedef struct llm__unicode_classes {
    uint8_t page[LLM__MAX_PAGES][128];
    uint16_t index[LLM__N_PAGES];
    int n_pages;
} llm__unicode_classes;

static uint16_t llm__unicode_page_index(llm__unicode_classes *c, const uint8_t *page) {
    for (int i = c->n_pages; i-- > 0;)
        if (!memcmp(c->page[i], page, 128)) return (uint16_t)i;
    memcpy(c->page[c->n_pages], page, 128);
    return (uint16_t)c->n_pages++;
}

static unsigned llm__unicode_class_of_letter(char letter) {
    switch (letter) {
    case 'A':
    case 'U': return LLM__UPPER;
    case 'l': return LLM__LOWER;
    case 'o': return LLM__CASELESS;
    case 'm': return LLM__MARK;
    case 'n': return LLM__NUMBER;
    case 'p': return LLM__PUNCTUATION;
    case 'y': return LLM__SYMBOL;
    case 's': return LLM__SPACE;
    default: return 0;
    }
}

static llm__unicode_classes *llm__unicode_build_classes(llm__env *env) {
    llm__unicode_classes *c = (llm__unicode_classes *)llm__alloc(env, 1, sizeof *c);
    uint8_t page[128];
    uint32_t code = 0;
    c->n_pages = 0;
    for (int line = 0; llm__unicode_class_runs[line]; line++) {
        for (const char *p = llm__unicode_class_runs[line]; *p;) {
            char letter = *p++;
            uint32_t n = 0;
            while (*p >= '0' && *p <= '9') n = 10 * n + (uint32_t)(*p++ - '0');
            if (!n) n = 1;
            if (letter == 'A') n *= 2;
            int whole = -1; /* index of the page if the run fills it completely, otherwise -1 */
            for (uint32_t i = 0, step; i < n; i += step, code += step) { /* one step per page that the run touches */
                uint32_t at = code % 128;
                step = n - i < 128 - at ? n - i : 128 - at;
                if (step == 128 && whole >= 0) {
                    c->index[code / 128] = (uint16_t)whole;
                    continue;
                }
                memset(page + at, (int)llm__unicode_class_of_letter(letter), step);
                for (uint32_t j = 0; letter == 'A' && j < step; j++)
                    if ((i + j) % 2) page[at + j] = LLM__LOWER;
                if (at + step == 128) c->index[code / 128] = llm__unicode_page_index(c, page);
                if (step == 128) whole = c->index[code / 128];
            }
        }
    }
    return c;
}

static unsigned llm__unicode_class_at(const llm__unicode_classes *classes, const uint8_t *p, const uint8_t **next) {
    if (*p < 0x80) {
        *next = p + 1;
        return classes->page[0][*p];
    }
    uint32_t c = llm__utf8_decode(p, next);
    return classes->page[classes->index[c / 128]][c % 128];
}

/* Skips the code points whose class is in `mask` (or is not, with `in` false) and returns where they end. */
static const uint8_t *llm__unicode_skip(const llm__unicode_classes *c, const uint8_t *p, const uint8_t *end,
                                        unsigned mask, bool in) {
    const uint8_t *next;
    for (; p < end; p = next)
        if (((llm__unicode_class_at(c, p, &next) & mask) != 0) != in) break;
    return p;
}

/* ---- Normalisation form C ----
   Generated by tokenizer/unicode.py from here to the next banner: the tables of normalisation form C.

   Each canonical decomposition is three numbers. The first is twice the distance from the previous code point, plus 1
   if the decomposition is never composed again. The second is the distance of its first part from the previous first
   part, zigzag-coded (0, -1, 1, -2, ...). The third is its second part counted from U+02FF, or 0 if it has none. Each
   run of one combining class is three numbers, too: the gap before it, its length, the class.

   Numbers are written in base 45, lowest digit first. There are 90 characters; a digit from the upper half says that
   another digit follows. Hangul is computed. The data is Unicode 9.0, which Hugging Face's normaliser uses and the
   models were trained with: marks that came later stay where they are. */
static const char *const llm__nfc_decompositions[] = {
    "j+z%$%#%%#&%#'%#,%#.''L%'$%#%%#&%#,%+$%#%%#&%#,'-'%%$%#%%#&%#'%#,)/$%#%%#&%#,%+%)3$%#%%#&%#'%#,%#.''L%'$%#%%#&",
    "%#,%+$%#%%#&%#,'-'%%$%#%%#&%#'%#,)/$%#%%#&%#,%+%'#,%g%(%e$(%d$*%e$*%d$M%e$M%`$%%e$%%d$&%e$&%d$+%e$+%d$0%e$0",
    "%b$0%e$0)b$(%e$(%d$*%e$*%d$+%e$+%d$M%e$M%d$0%e$0%`$&%e$&%d$*%e$*%d$+%e$+%d$L%e$L%b$&%e$&)b$'%e$'%d$(%e$(%d$*",
    "%e$*%d$M%e$M%d$++%&%e$&%b$L%e$L'b$%%e$%%d$L%e$L%d$0%e$0-`$%%e$%%d$L%e$L%d$0%e$0+b$(%e$(%d$*%e$*%d$/%e$/)^$%",
    "%e$%%d$L%e$L%d$0%e$0%b$%%e$%%d$&%e$&%d$L%e$L%d$0%e$0%b$L%e$L%d$0%e$0)b$'%e$'%d$(%e$(%d$*%e$*%d$.%e$.%d$/%e$/",
    "%d$M%e$M%`$&%e$&%`$&%e$&%d$,%%%%e$%%d$+%e$+%d$0%e$0i$z$@%e$@@W$@%e$@_$_%0%e$0%S$0%e$0%W$0%e$0%W$0%e$0%l'(%e$(",
    "%d$%%e$%%d$0%e$0%d$$%e$$'g%(%e$(%`1(%%(%p2(%e$()S*0%e$0%[$0%e$0%[$M%e$M%x3(%%(%_%0%s,0%i;0+j$%%e$%)U$$%e$$%y&%",
    "%e$%%b$%%e$%%>%%e$%%V+3%e$3%d$5%e$5%[$3%e$3%d$5%e$5%[$3%e$3%d$5%e$5%W$3%e$3%d$5%e$5%^$3%e$3%d$5%e$5%^$3%e$3",
    "%d$5%e$5%h$K%e$K%b$K%e$K)|$0%e$01r$+%e$+%[$L%e$L%R((%e$(%f$(%e$(%b*+%e$+%y6(%%(%y7(%e$(~.t@#&%#(H#&8%X%h&#8a@#",
    "1x'%%VE%&eD#%nD%%'%%'%'/%'/%%+%%g$%X$X%,%;,%;%%+%%'%%'%%H%X$G,%;,%.%%/%%+%-5%%#,}$~%$%#,'&%+<,-L%%&$%9*98*",
    "e$e$*R$($%#,'&%+k$,-[$%%&$%9*T$Y%3%%3_&Z'*%e$*@p$*%e$*%d$,%e$,)Y$*%e$*)]*,%%,%o+,%e$,%b$,%e$,)b$(%e$(%d$,%e$,",
    "%W$,%e$,)k*,%%,%a+,%e$,%x$(%e$(%d$,%e$,%d$/%e$/%[$,%e$,)[$,%e$,Z0X8|5%#}5%g$}5%f$~5%k$}5x)Y)}5'K}5FF}5l=l=hG",
    "33hG))hGn$`$hG&%hG&%hG&-hG&-hG&%hG&5hG&+hGv't)cJ%#|JEp$aJ&%aJ(=aJt&w(YM*/YMl$h$YM&%YM&-YM*BYMd-n/fS$)#{R$%#gS$",
    "Ep$yR$&%yR$f%~'`V$d%`%tU$%%tU$%$`V$i(q(WY$a(c(}[$11}[$%#~[$'#j[$%+}[$o(i(__$%%__$%$x_$`)j)db$'#ib$%)db$%(yb$",
    "z2S3bm$87bm$.-bm$.-bm$.-bm$>Y$`m$8Y%wk$(#yk$&z%Wl$(%Wl$6{%Wl$Ig$bm$87bm$.-bm$.-bm$.-bm$>Y$`m$x'n)Qp$ss%ss%sS&",
    "''sS&''sS&''sS&''sS&++sS&w$w$sS&''sS&)'sS&%%sS&')sS&XC[w)J%e$J%b$+%e$+%d$H%e$H%d$V$%e$V$%h'%%e$%%[*+%e$+%d$H",
    "%e$H%d$V$%e$V$%d$L%e$L%d$R$%e$R$%s*$%%$%$%%%%%W,R$%e$R$%d$U$%e$U$%S7*%%*%f8+%e$+%b$(%e$(%b$+%e$+%d$H%e$H%d$,",
    "%e$,%d$L%e$L%d$S$%e$S$%b$U$%e$U$%j'%%e$%%^*%%e$%%d$H%e$H%d$V$%e$V$%b$H%e$H%|i*(%%(%ck*V$%e$V$%d$R$%e$R$%b$%",
    "%e$%%d$+%e$+%d$H%e$H%b$+%e$+%d$H%e$H%d$V$%e$V$%d$R$%e$R$%l'%%e$%%d$,%e$,%y&$%%$%$%%%%%[.%%e$%%d$+%e$+%`$+%e$+",
    "%d$H%e$H%^k*(%%(%rl*V$%e$V$%b$+%e$+%d$H%e$H%^-+%%+%-+%%+%Qa*+%%+%~l*+%e$+%d$H%e$H%d$V$%e$V$%d$R$%e$R$%b$I%e$I",
    "%d$U$%e$U$%d$R$%e$R$%v-%%%%%%,%%,%_/'%e$'%d$H%e$H%b$$%e$$%d$%%e$%%d$,%e$,%d$+%e$+%d$H%e$H%b$+%e$+%d$,%e$,%b$+",
    "%e$+%b$&%e$&%d$H%e$H%d$V$%e$V$%GV$%;,%).%'.'o.+-V1H%e$H%d$-%e$-%`'%%e$%%d$$%e$$%d$-%e$-%d$'%e$'%di*&%%&%Qh*%",
    "%%%%$$%%$%$-%%-%$'%%'%|g**%%*%dp*H%e$H%d$-%e$-%d$'%e$'%h'%%e$%%d$$%e$$%d$-%e$-%d$'%e$'%Vj*&%%&%_q*-%e$-%d$H",
    "%e$H%W$H%e$H%d$-%e$-%h'%%e$%%d$$%e$$%d$-%e$-%d$'%e$'%kj*&%%&%|b*%%%%%$$%%$%$-%%-%$'%%'%$H%%H%s1H%e$H%d$-%e$-",
    "%}0%%%%%$$%%$%$-%%-%$'%%'%$H%%H%[2$%e$$%d$H%e$H%d$-%e$-%d$'%e$'1nH7%#8%rz)$%%$%$%%%%%$h$%%h$%X|)7%#8%h|)$%%$",
    "%$%%%%%$h$%%h$%{z)7%#8%]{)$%%$%$%%%%)q|)7%#8%R})$%%$%$%%%%)j{)7%#8%y{)$%%$%$%%%%%$h$%%h$%`})7%#8%o})$%%$%$%%%%",
    "%$h$%%h$%X|)7%#8%h|)$%%$%$%%%%%$h$%%h$%|})7%#8%^~)$%%$%$%%%%%$h$%%h$%m|)7%#8%||)$%%$%$%%%%)c~)7%#8%r~)$%%$%$%",
    "%%%)S})7%#8%c})$%%$%$%%%%%$h$%%h$'w~)8'ZQ*$'#%'#h$%l})7%#8%{})$%%$%$%%%%%$h$%%h$%bQ*7%#8%qQ*$%%$%$%%%%%$h$%%h$",
    "%bQ*$&,#%5$&2#%7$&4#%9$&6#%D$&=#%0$&3#%*$&-#)ey)k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$",
    "%Fk$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%Y%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$%%k$",
    "%%k$%%k$%%k$%%k$%%k$%nQ**%#(%qQ*k$%pQ*k$%,k$'-h$%vT*k$%ZV**%#(%#$&8#%9k$(u$#)yFh$%du*k$%lQ*k$%4k$'5h$%]U*k$",
    "%sV*$&<#%B$&>#%@k$%bV*$%#%%#h$%wT**%#(%F$&k%#)w$h$%Fh$%X%*%#(%#$&A#'sY*$%#%%#h$%UW**%#(%/$&Y$#%F7%#8%+h$%/h$",
    "%p$*%#(%#$&Q$#%J8%vE$&lD#&tG#)}x*k$%WQ*k$%-k$',h$%lV*k$%eX*$&I#%_$$&W$#%X$k$&nE#*Y{*#&%#S0kX*#,_J#&e(#|'V_+^$",
    "%'^$J'^$c$p%^$%+^$%&^$b%Y%^$--^$))^$T$T$^$''^$Z$R$^$)1^$)'^$')^$R$`m+^$'fn+^$9K^$%lm+^$%'^$%jn+^$%%^$)=^$%%^$",
    "))^$%%^$1)^$%%^$)1^$%%^$))^$%%^$k$Z$^$%/^$%%^$%'^$Y%T%^$%%^$%L^$%%^$1e$^$%%^$%%^$%%^$q%mb&#&%#l|$w_$^$",
    "yb$ub$et(''et(''et(''et(''et(''et(''et(''et(''et(''et(''et(''et())et(''et(''et(11et(%#ft(')et(%#ft(')et(%#ft(",
    "')et(%#ft(')et(%#ft(R$a%et(7y&et(@@et(''et(''et(''et(''et(''et(''et(''et(''et(''et(''et(''et())et(''et(''et(",
    "11et(%#ft(')et(%#ft(')et(%#ft(')et(%#ft(')et(%#ft(R$a%et()]&et(%%et(%%et(%%et(+9et(pkV$rT:#&qe,#&]T-#&w9#&{k*#",
    "&W]+#&xe$#&gW6#&##&tt4#&x^1#&|[2#&rN#&tY%#&pX(#&o_%#&jq$#&x3#&W1#&b{$#&ms,#&]G#&lN#&bF#&^W'#&{`&#&RX%#&]T6#",
    "&`]$#&S}(#&pu$#&bT(#&dS)#&`c3#&qq'#&~i(#&xL#&[t,#&cx*#&el$#&]f-#&fU%#&}l$#&cd$#&_j*#&sh3#&|;#&V0#&oi'#&|i$#",
    "&bw$#&T[$#&k_%#&hi$#&w&#&Y{$#&ca%#&[T$#&|@#&xf,#&v-#&~R$#&Uk$#&_x&#&nz%#&p}'#&gn/#&{j$#&Se*#&xR$#&ik&#&zm$#",
    "&ZS(#&Wl%#&uq2#&^L#&uf&#&~N#&s0#&rk&#&s.#&}T)#&pS4#&[k.#&Wv.#&C#&pY-#&aM#&jk$#&pp'#&ot%#&}^-#&{v$#&_a+#&db2#",
    "&of&#&eS$#&c{'#&s8#&up+#&Vl,#&We-#&TR'#&af'#&wt*#&bx$#&]~(#&qf-#&dX$#&ls*#&Vb&#&lm$#&~v*#&XU,#&~y+#&id%#&~S+#",
    "&tz*#&Yh'#&gu,#&TC#&^'#&hs(#&UX(#&|c$#&eV%#&it$#&Uz2#&v1#&T`$#&^c$#&{r$#&`l%#&b`%#&dZ*#&{Y$#&iS$#&f%#&}]6#",
    "&gU(#&cY$#&pT,#&qb/#&cG#&~'#&mA#&yo%#&f;#&~H#&u`$#&cS$#&[@#&er&#&]l%#&iw%#&yG#&vg3#&[)#&{:#&TU*#&vS)#&q8#&[U.#",
    "&a0#&UL#&_T%#&fY'#&|Z%#&R],#&}R%#&U]$#&t7#&V>#&x|'#&W+#&aw%#&o*#&Qj'#&WZ$#&o&#&],#&fa5#&eo-#&aT)#&T^$#&km0#",
    "&wn'#&h=#&Sv%#&m&#&db%#&YV$#&r}$#&pV$#&kr&#&xz%#&ev&#&sd1#&WS/#&nU4#&`_(#&a(#&ba$#&e2#&sb$#&|1#&|F#&xX$#&pz)#",
    "&W|4#&n['#&|Z0#&xt4#&V^&#&a]'#&`d+#&vR/#&m6#&or$#&Wz%#&Yx+#&v^4#&m8#&xU%#&Wf%#&Q1#&c2#&[T$#&Vv$#&X8#&Ve%#&[b%#",
    "&H#&g]%#&y^$#&jU4#&p|)#&ur)#&{h*#&oC#&uc'#&kZ'#&ze$#&}<#&V{0#&lk$#&xT(#&{u$#&u&#&f3#&rg%#&g;#&`t)#&d`2#&z]0#",
    "&`c/#&]%#&mY&#&iS$#&}k)#&Se+#&[f'#&}m$#&V]-#&ys$#&aj&#&W[&#&Rv-#&ee&#&ZW$#*mA#(fk&#*ZZ(#&xd+#&]M#&w>#&i$#&1#",
    "&y$#&vi*#&kr)#&UF#(Sm$#(s[$#*s`$#&t+#,dQ%#&=#&}$#&sW$#&R]&#&jg$#&Z}4#&{0#&j'#&z3#&Z$#&x'#&W=#&p'#&b'#&~7#&n'#",
    "&hN#&7#&ZS$#&e,#&q$#&f'#&^J#&j)#&u*#&[9#&^]$#&]*#&s.#&W=#&d+#&b9#&fV$#&q*#&9#&$#&3#&/#&1#&W%#&%#&{*#&z%#&Y1#",
    "&T<#&N#&h%#&k0#&j)#&q8#&[)#&##&]8#&sY$#&}(#&W3#&h%#&[5#&b%#&hB#&u(#&yp$#&n/#&p%#&kU1#&g~q%#&sgi%#*QW0#&hL#&d&#",
    "&p8#&W7#&n%#&j1#&^%#&QB#&Y&#&R&#&]&#&U@#&}&#&f)#&D#&Q/#&v+#&qM#&1#&d)#&R&#&_0#&](#&U&#&}(#&R%#&h)#&|%#&u4#&{&#",
    "&d%#&k.#&r/#&]*#&+#&n%#&TS$#&z%#&c4#&[5#&C#&y&#&Z.#&|1#&vk$#&|b$#&e(#&g(#&j1#&n)#&b%#&S-#&'#&m*#&F#&V$#&w&#&6#",
    "&m4#&k8#&S/#&`+#&},#&v)#&p1#&x+#&kI#&~)#&^L#&^7#&T&#&D#&Z0#&j%#&~$#&d%#&(#&E#&c&#&m&#&~3#&z;#&}0#&V0#&w,#&uQ$#",
    "&l'#&V(#&{(#&m$#&;#&W%#&`D#&oW$#&w^Z%#&.#&m{%#&ygw%#&~V$#&g$#&|Q~%#&uo%#&~l+#&a]q%#&a&#S&wxJd2(V$g2:4q2&#r2",
    "&wRc$q2&#r2&{Sc$g2&#h2&#l2&%l2&%l2&%l2&%l2&%l2&%l2('l2&%l2&%l2&%l2&%l2('l2('l2&%l2('l2&%l2('l2&%l2&%l2&%l2&%l2",
    "&Mi2&*o2&7o2&5o2`c(jeh$gUF''gUFB7gUFw([)zWF%%zWFQ;q:udF%#aeF`3f3[mF%#QmF'#_mFZ.a.prF%%prF{eS$peS$jf_$&%jf_$",
    "&1sf_$&#tf_$&#uf_$&#vf_$&#wf_$z&Q'jf_$&%jf_$&%sf_$&%sf_$&$tf_$&%tf_$|co$w}X%#&,#&5#&}|e%#&Ype%#&g&#&=#&X&#&a(#",
    "&c$#&g&#&S$#&sV*#&mrm%#&[gf%#&1#&D#&J#&pWf%#&pdm%#&`]*#&q$#&uXf%#&`Xf%#&=#&aD#&rD#&5#&gp[&#&mm[&#&@#&jb*#&Se*#",
    "&9#&}$#&-#&_e*#&yh*#&'#&Z$#&P#&9#&%#&F#&[%#&3#&5#&V$#&7#&'#&##&##&X{f%#&xl_%#&|[*#&N#&rVg%#&XVg%#&/#&N#&t)#",
    "&i'#&D#&e$#&l%#&s&#&X$#&~%#&D#&g$#&##&N#&H#&3#&B#&V2#&T/#&W/#&u+#&k$#&aV$#&js$#&u/#&q$#&V$#&t(#&e*#&$#&g(#",
    "&[`h%#&U]h%#&-#&B#&L#&3#&x%#&[lh%#&|%#&Qih%#&U%#&;#&h&#&`)#&j}+#&@#&WV,#&d%#&##&nzh%#&qth%#&N#&B#&;#&iSi%#",
    "&}Ri%#&1#&kI#&_H#&s],#&i`,#&@#&o&#&]%#&hmi%#&cei%#&hei%#&kci%#&(#&F#&h'#&%#&{i,#&Wk,#&{$#&N#&}$#&om,#&Zps%#",
    "&Ros%#&po,#&)#&)#&L#&Qx]&#&pu]&#&Raj%#&##&oga%#&sv+#&##&cq,#&h{w%#&^{.#&hTz%#&5#&cs,#&hu,#&^%#&7#&i$#&S)#&y{,#",
    "&`$#&T~,#&bxj%#&Tvj%#&s(#&+#&'#&&#&S%#&L#&m$#&>#&9#&U%#&L#&+#&X$#&9#&|%#&s&#&k$#&i(#&][k%#&T]k%#&y%#&v'#&Z$#",
    "&`'#&x_k%#&T]k%#&V'#&[$#&|g-#&hp-#&N#&c$#&p$#&an-#&}w-#&_$#&S}k%#&swk%#&`/#&t*#&b{-#&l~-#&`Q.#&l$#&Ss(#&)#",
    "&qd(#&e'#&ll)#&Tc2#&~z+#&+#&/#&r%#&8#&tdl%#&vjw%#&h_.#&Y(#&V,#&^%#&r^l%#&_^l%#&{'#&z-#&^h.#&aj.#&`'#&X&#&f+#",
    "&k_l%#&^]l%#&Rw.#&Xz.#&Vql%#&wnl%#&Qz.#&b{.#&Q%#&Z$#&%#&yQm%#&rf*#&lk*#&X~l%#&Yem%#&W`m%#&@#&i'#&u*#&u$#&j%#",
    "&c%#&u$#&B#&=#&rZm%#&__m%#&X.#&v%#&Vf/#&^j/#&*#&s`m%#&yim%#&l3#&l_m%#&W%#&u]m%#&V(#&Y$#&(#&ut/#&zv/#&^%#&.#",
    "&d%#&}]^%#&YV^%#&Qmm%#&Vim%#&rwm%#&gqm%#&=#&Z$#&m]n%#&fZn%#&N#&{gn%#&{,#&ngn%#&F#&jb0#&rc0#&Xc0#&##&cj0#&N#&N#",
    "&L#&T&#&uk0#&vo0#&sUo%#&kTo%#&pXo%#&eVo%#&u]d%#&oUd%#&Wso%#&R$#&[)#&ok}%#&;#&zy0#&Rxo%#&$#&s$#&X$#&~xo%#&%#&##",
    "&{$#&i{0#&e~0#&w}0#&k&#&mc~%#&n_p%#&t%#&x%#&VW1#&aw~%#&Skp%#&[pp%#&{$#&lop%#&U'#&ha1#&_e1#&7#&-#&}Wq%#&_0#&##",
    "&X_q%#&nc1#&c|Q&#&Vaq%#&)#&rk1#&ZVR&#&p^q%#&Vr1#&Vs1#&,#&_$#&SQr%#&nzq%#&]t1#&rx1#&n%#&~%#&R|1#&m^S&#&c$#",
    "&`^S&#&wdS&#&pZr%#&Y`r%#&}^r%#&h'#&9#&`lr%#&]&#&hkr%#&eqr%#&qpr%#&l}e%#&V_u%#&hc2#&m&#&pd2#&`g2#&es,#&rr|%#&@#",
    "&WY0#&5#&fne%#&)#&te&#&lQ6#&Vr2#&.#&H#&WV/#&SW/#&'#&7#&w$#&Ygs%#&Zgs%#&h%#&V&#&_&#&V)#&x)#&y$#&~'#&j.#&_(#&'#",
    "&D#&bgs%#&s0#&o)#&qgU&#&mV3#&'#&k$#&nTu%#&WQu%#&nws%#&URV&#&+#&xWV&#&x/#&[eV&#&bd3#&;#&9#&'#&x%#&f$#&}(#&|$#",
    "&r)#&l&#&~%#&Z$#&`m3#&cq3#&e$#&^q3#&iu3#&)#&vzt%#&nut%#&1#&ex3#&qy3#&i_8#&jn]&#&Y+#&t]X&#&5#&}W4#&e&#&~)#&R,#",
    "&Thu%#&[du%#&P#&Q'#&U'#&|wu%#&xVB#&`nV%#&A#&`%#&cvV%#&[lV%#&f'#&hTw%#&Z$#&Ztv%#&W'#&e$#&||v%#&g|v%#&p/#&T*#&%#",
    "&T'#&|3#&]$#&Zdw%#&kRw%#&]Z6#&[]6#&kbw%#&Xj]&#&je6#&^e1#&ki1#&p}w%#&g,#&yk^&#&3#&vk6#&ugx%#&z~^&#&WW_&#&Tlx%#",
    "&##&a$#&kwx%#&`ox%#&xn6#&Rr6#&m(#&Z$#&p%#&lt6#&ni`&#&sgy%#&e0#&d+#&_^7#&c$#&oa7#&W`z%#&^oa&#&sqa&#&u.#&w(#",
    "&Sez%#&Tl7#&xn7#&-#&1#&7#&1#&o$#&fX{%#",
    NULL};

static const char *const llm__nfc_combining_runs[] = {
    "T48V(#$X(#'z'#$X(#$v'#(z'#%h'#'z'#%h'#.z'#($#'z'#+V(#$a(#$V(#&z'#&V(#%z'$&V(#'z'#$V(#$X(#%z'#$V(#$Y(#%Z(#$Y(",
    "#%Z(#$Y(#0V(V)(V(z($z'#'V(#$z'#&V(#$|'#$z'#)V(#)z'#%V(#$z'#%V(#$|'#$T(#$V(#$-#$.#$/#$0#$1#$2#$3#$4#$5#%6#$7#$8",
    "#$9$$:$$;#$<$$V(#$z'$$5m$+V(#$B#$C#$DT$$>#$@#$A#$B#$C#$D#$E#$F#%V(#%z'#(V(#$z'#%V(#$z'3$G]%*V(%'V(#$z'#$V(%%V(",
    "$$z'#%V(#$z'G$HB$V(#$z'#%V(#$z'#%V(#&z'#$V(#%z'#$V(#$z'#&V(#$z'#$V(#$z'#$V(#$z'#$V(#$z'#%V(k&*V(#$z'#$V(F'V(",
    "$,V($&V($(V(O&z'p%1V($$z'#%V(#$z'#%V(#$z'#&V(#&z'#$>#$@#$A#&V(#$z'#%V(#%z'#(V(a$$*3$,&$V(#$z'#%V(_%$*3$,f%$*",
    "3$,f%$*3$,f%$*3$,w%$,w%$,*$y$#$R%]%$*3$,w%$,t%$,e%%_%#$,0'c%d%%n%1'r%q$%z'>$z'$$z'$$v'[$$y%#$z%$$|%('z%%$z%",
    "$%V(#$,$%V(c$$z'h%$*$%,w$$z'~2&V(T8$,C$,h&$,-$V(i'$T(Y&$|'#$V(#$z'y'$V(#$z'l$$,7+V(%$z'T$(V(#)z'#%V(#$z'n%$*",
    "2$,J$V(#$z'#*V(Z$%,_$$*.%,h$$*c&&V($$$#(z'#%V(#'z'#$V($*$'$z')$V(&%V(d'%V(#$z'#*V(#$z'#%V(#$Z(#$t'#$z'#$h'#IV(",
    "($V(#$Y(#$z'#$V(#$z'Q3%V(#%$#'V(#&$#%V('$V(&%$#$V(#$z'#$V(#%$#'z'#$V([i$&V(W&$,W%DV(`/$x'#$T(#$X(#$|'#%~'a%%+",
    "`z1$V('-V(D%V(u$%V(W)$,Z'$,>5V(^$&z'I$,V%$*/$,`($V($%V(#$z'%%V((%V($$V(X$$,g($,hQ-$=U4*V(#*z'#%V(n8$z'R($z'",
    "`&(V(cI$z'$$V(L$V(#$$#$z''$,p&$V(#$z'kB$,]$$,^$$,#$*j$&V(T$%,c$$*q$$,,$*b%$,#$*}&$*#$,v$$*3$,;*V(&(V(k'$,&$*",
    "s%$,#$*l($,#$*v%$,n%$,#$*k%$,y@$,o|,($`$*V(U_-$$Yn%%v'#&$&$R(#(v'++z'%(V(#%z'B'V(_&&V(Vs$*V($4V(%*V($%V($(V(",
    "YU$*z'e%)V(#$*",
    NULL};

typedef struct llm__nfc_decomposition {
    uint32_t code, first, second;
    bool composes;
} llm__nfc_decomposition;

typedef struct llm__nfc_combining_run {
    uint32_t begin, end;
    uint8_t value;
} llm__nfc_combining_run;

enum { LLM__MAX_DECOMPOSITIONS = 2200, LLM__MAX_COMBINING_RUNS = 500 };

typedef struct llm__nfc {
    llm__nfc_decomposition by_code[LLM__MAX_DECOMPOSITIONS], by_parts[LLM__MAX_DECOMPOSITIONS];
    llm__nfc_combining_run runs[LLM__MAX_COMBINING_RUNS];
    size_t n_by_code, n_by_parts, n_runs;
    bool page_changes[LLM__N_PAGES]; /* true if NFC may change a code point of the page or join it to the one before */
} llm__nfc;

enum {
    LLM__HANGUL = 0xAC00,
    LLM__HANGUL_L = 0x1100,
    LLM__HANGUL_V = 0x1161,
    LLM__HANGUL_T = 0x11A7,
    LLM__HANGUL_NL = 19,
    LLM__HANGUL_NV = 21,
    LLM__HANGUL_NT = 28,
    LLM__N_HANGUL = 11172
};

/* Reads the next number of a table, 0 at the end. *line and *at hold the read position. */
static uint32_t llm__nfc_next_number(const char *const *table, int *line, const char **at) {
    uint32_t value = 0, scale = 1;
    if (!**at) {
        if (!table[*line + 1]) return 0;
        *at = table[++*line];
    }
    for (;; scale *= 45) {
        int c = *(*at)++, digit = c - 35 - (c > 63) - (c > 92);
        value += scale * (uint32_t)(digit % 45);
        if (digit < 45) return value;
    }
}

static int llm__nfc_compare_parts(const void *a, const void *b) {
    const llm__nfc_decomposition *x = (const llm__nfc_decomposition *)a, *y = (const llm__nfc_decomposition *)b;
    if (x->first != y->first) return x->first < y->first ? -1 : 1;
    return (x->second > y->second) - (x->second < y->second);
}

static void llm__nfc_read_decompositions(llm__nfc *nfc) {
    int line = 0;
    const char *at = llm__nfc_decompositions[0];
    uint32_t step, code = 0, first = 0;
    while ((step = llm__nfc_next_number(llm__nfc_decompositions, &line, &at)) != 0) {
        uint32_t zigzag = llm__nfc_next_number(llm__nfc_decompositions, &line, &at);
        llm__nfc_decomposition *d = &nfc->by_code[nfc->n_by_code++];
        d->code = code += step / 2;
        d->first = first += zigzag & 1 ? 0u - (zigzag + 1) / 2 : zigzag / 2;
        d->second = llm__nfc_next_number(llm__nfc_decompositions, &line, &at);
        if (d->second) d->second += 0x2FF;
        d->composes = step % 2 == 0;
        if (d->composes) nfc->by_parts[nfc->n_by_parts++] = *d;
        nfc->page_changes[(d->composes ? d->second : code) / 128] = true;
    }
    qsort(nfc->by_parts, nfc->n_by_parts, sizeof *nfc->by_parts, llm__nfc_compare_parts);
}

static void llm__nfc_read_combining_runs(llm__nfc *nfc) {
    int line = 0;
    const char *at = llm__nfc_combining_runs[0];
    uint32_t code = 0;
    while (*at || llm__nfc_combining_runs[line + 1]) {
        llm__nfc_combining_run *run = &nfc->runs[nfc->n_runs++];
        run->begin = code += llm__nfc_next_number(llm__nfc_combining_runs, &line, &at);
        run->end = code += llm__nfc_next_number(llm__nfc_combining_runs, &line, &at);
        run->value = (uint8_t)llm__nfc_next_number(llm__nfc_combining_runs, &line, &at);
        for (uint32_t c = run->begin; c < run->end; c++) nfc->page_changes[c / 128] = true;
    }
}

static llm__nfc *llm__nfc_build(llm__env *env) {
    llm__nfc *nfc = (llm__nfc *)llm__alloc_zero(env, 1, sizeof *nfc);
    llm__nfc_read_decompositions(nfc);
    llm__nfc_read_combining_runs(nfc);
    nfc->page_changes[LLM__HANGUL_V / 128] = nfc->page_changes[LLM__HANGUL_T / 128] = true;
    return nfc;
}

static uint8_t llm__nfc_combining(const llm__nfc *nfc, uint32_t code) {
    size_t lo = 0, hi = nfc->n_runs;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (code >= nfc->runs[mid].end) lo = mid + 1;
        else hi = mid;
    }
    return lo < nfc->n_runs && code >= nfc->runs[lo].begin ? nfc->runs[lo].value : 0;
}

/* The composition of first and second, or 0 if they do not compose. */
static uint32_t llm__nfc_compose(const llm__nfc *nfc, uint32_t first, uint32_t second) {
    uint32_t l = first - LLM__HANGUL_L, v = second - LLM__HANGUL_V, s = first - LLM__HANGUL, t = second - LLM__HANGUL_T;
    if (l < LLM__HANGUL_NL && v < LLM__HANGUL_NV) return LLM__HANGUL + (l * LLM__HANGUL_NV + v) * LLM__HANGUL_NT;
    if (s < LLM__N_HANGUL && s % LLM__HANGUL_NT == 0 && t - 1 < LLM__HANGUL_NT - 1) return first + t;
    size_t lo = 0, hi = nfc->n_by_parts;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        const llm__nfc_decomposition *d = &nfc->by_parts[mid];
        if (d->first == first && d->second == second) return d->code;
        if (d->first < first || (d->first == first && d->second < second)) lo = mid + 1;
        else hi = mid;
    }
    return 0;
}

/* A stretch of text being normalised. Each item is combining class << 56 | position << 21 | code point. So sorting by
   class keeps the order of marks of the same class. */
typedef struct llm__nfc_marks {
    llm__env *env;
    const llm__nfc *nfc;
    uint64_t *items;
    size_t n, room;
} llm__nfc_marks;

#define LLM__MARK_CODE(item) ((uint32_t)(item)&0x1FFFFF)
#define LLM__MARK_CLASS(item) ((unsigned)((item) >> 56))

static void llm__nfc_marks_add(llm__nfc_marks *m, uint32_t code) {
    m->items = (uint64_t *)llm__alloc_grow(m->env, m->items, m->n, &m->room, sizeof *m->items);
    m->items[m->n] = (uint64_t)llm__nfc_combining(m->nfc, code) << 56 | (uint64_t)m->n << 21 | code;
    m->n++;
}

static void llm__nfc_decompose(llm__nfc_marks *m, uint32_t code) {
    uint32_t s = code - LLM__HANGUL;
    size_t lo = 0, hi = m->nfc->n_by_code;
    if (s < LLM__N_HANGUL) {
        llm__nfc_marks_add(m, LLM__HANGUL_L + s / (LLM__HANGUL_NV * LLM__HANGUL_NT));
        llm__nfc_marks_add(m, LLM__HANGUL_V + s / LLM__HANGUL_NT % LLM__HANGUL_NV);
        if (s % LLM__HANGUL_NT) llm__nfc_marks_add(m, LLM__HANGUL_T + s % LLM__HANGUL_NT);
        return;
    }
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (m->nfc->by_code[mid].code < code) lo = mid + 1;
        else hi = mid;
    }
    if (lo == m->nfc->n_by_code || m->nfc->by_code[lo].code != code) {
        llm__nfc_marks_add(m, code);
        return;
    }
    llm__nfc_decompose(m, m->nfc->by_code[lo].first);
    if (m->nfc->by_code[lo].second) llm__nfc_decompose(m, m->nfc->by_code[lo].second);
}

static int llm__nfc_compare_u64(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void llm__nfc_sort_marks(llm__nfc_marks *m) {
    for (size_t i = 0; i < m->n;) {
        size_t begin = i;
        bool sorted = true;
        for (; i < m->n && LLM__MARK_CLASS(m->items[i]); i++)
            if (i > begin && LLM__MARK_CLASS(m->items[i]) < LLM__MARK_CLASS(m->items[i - 1])) sorted = false;
        if (!sorted) qsort(m->items + begin, i - begin, sizeof *m->items, llm__nfc_compare_u64);
        if (i == begin) i++;
    }
}

static void llm__nfc_compose_marks(llm__nfc_marks *m) {
    size_t n = 0, starter = SIZE_MAX;
    for (size_t i = 0; i < m->n; i++) {
        unsigned c = LLM__MARK_CLASS(m->items[i]);
        bool blocked = starter == SIZE_MAX || (n > starter + 1 && LLM__MARK_CLASS(m->items[n - 1]) >= c);
        uint32_t joined =
            blocked ? 0 : llm__nfc_compose(m->nfc, LLM__MARK_CODE(m->items[starter]), LLM__MARK_CODE(m->items[i]));
        if (joined) {
            m->items[starter] = joined;
            continue;
        }
        if (!c) starter = n;
        m->items[n++] = m->items[i];
    }
    m->n = n;
}

/* The text in form C: either the text itself, or new memory that the caller frees. Only code points that may change,
   and the one before each, are processed. */
static uint8_t *llm__nfc_apply(llm__env *env, const llm__nfc *nfc, const uint8_t *p, const uint8_t *end, size_t *n) {
    llm__nfc_marks m;
    memset(&m, 0, sizeof m);
    m.env = env;
    m.nfc = nfc;
    uint8_t *out = NULL;
    size_t n_out = 0;
    const uint8_t *done = p, *before = p, *next;
    for (; p < end; before = p, p = next) {
        uint64_t eight;
        while (end - p > 8 && (memcpy(&eight, p, 8), !(eight & 0x8080808080808080u))) p += 8, before = p - 1;
        next = p + 1;
        if (*p < 0xCC) { /* nothing below U+0300 changes */
            if (*p >= 0x80) next++;
            continue;
        }
        if (!nfc->page_changes[llm__utf8_decode(p, &next) / 128]) continue;
        if (!out) out = (uint8_t *)llm__alloc(env, (size_t)(end - done), 3); /* NFC grows a text at most threefold */
        memcpy(out + n_out, done, (size_t)(before - done));
        n_out += (size_t)(before - done);
        m.n = 0;
        for (p = before; p < end; p = next) {
            uint32_t code = llm__utf8_decode(p, &next);
            if (p != before && !nfc->page_changes[code / 128]) break;
            llm__nfc_decompose(&m, code);
        }
        llm__nfc_sort_marks(&m);
        llm__nfc_compose_marks(&m);
        for (size_t i = 0; i < m.n; i++) n_out += llm__utf8_encode(LLM__MARK_CODE(m.items[i]), out + n_out);
        done = next = p;
    }
    llm__free(env->pool, m.items);
    if (!out) return NULL;
    memcpy(out + n_out, done, (size_t)(end - done));
    *n = n_out + (size_t)(end - done);
    return out;
}

/* ==== 8 Jinja ===================================================================================================

   A chat template is a program in Jinja (https://jinja.palletsprojects.com). This section parses and runs the language
   that chat templates use, and gives the text that jinja2 gives with the settings of Hugging Face transformers:
   trim_blocks, lstrip_blocks, loop controls, raise_exception, strftime_now, tojson with its own spacing, and generation
   blocks. A template that needs more is refused when it is parsed, with a message that names what is missing.

   Each byte of a string remembers whether it came from the host's messages or from the template. The mark survives
   concatenation, slices and filters. Special tokens are recognised only in bytes of the template, so that what a user
   types cannot end a turn and speak as the assistant.

   Templates are not trusted. The number of steps, the nesting, the memory and the output are limited. */

typedef enum llm__jinja_type {
    LLM__J_UNDEFINED,
    LLM__J_NONE,
    LLM__J_BOOL,
    LLM__J_INT,
    LLM__J_FLOAT,
    LLM__J_STR,
    LLM__J_LIST,
    LLM__J_DICT,
    LLM__J_LOOP,
    LLM__J_MACRO,
    LLM__J_FUNCTION /* one of llm__jinja_functions */
} llm__jinja_type;

typedef struct llm__jinja_value {
    llm__jinja_type type;
    bool is_tuple;     /* LLM__J_LIST: its text is (1, 2) instead of [1, 2]                    */
    bool is_lazy;      /* LLM__J_LIST: a generator in Python: it can be looped over, but has no length and no text */
    bool is_markup;    /* LLM__J_STR: from the filter `safe`; strings appended to it are escaped as HTML */
    bool is_namespace; /* LLM__J_DICT: from namespace(); its attributes can be set             */
    union {
        int64_t i; /* an integer, a boolean, or the number of a function */
        double f;
        struct {
            const char *at; /* UTF-8 */
            size_t n;
            const uint8_t *host; /* [n] 1: the byte came from the host; NULL: none did */
        } s;
        struct llm__jinja_list *list;
        struct llm__jinja_dict *dict;
        struct llm__jinja_loop *loop;
        const struct llm__jinja_node *macro;
        llm__str name; /* LLM__J_UNDEFINED: the name that is undefined, for messages */
    } u;
} llm__jinja_value;

typedef struct llm__jinja_list {
    llm__jinja_value *items;
    size_t n, room;
} llm__jinja_list;

typedef struct llm__jinja_dict {
    llm__jinja_value *items; /* key, value, key, value, ... in the order in which the keys were added */
    size_t n, room;          /* n counts keys and values */
} llm__jinja_dict;

typedef struct llm__jinja_loop {
    const llm__jinja_list *list;
    size_t index;
} llm__jinja_loop;

typedef enum llm__jinja_kind {
    LLM__J_TEXT, /* statements */
    LLM__J_OUTPUT,
    LLM__J_IF,
    LLM__J_FOR,
    LLM__J_SET,
    LLM__J_SET_BLOCK,
    LLM__J_FILTER_BLOCK,
    LLM__J_WITH,
    LLM__J_DEFINE,
    LLM__J_BREAK,
    LLM__J_CONTINUE,
    LLM__J_CONST, /* expressions */
    LLM__J_NAME,
    LLM__J_MAKE_LIST,
    LLM__J_MAKE_TUPLE,
    LLM__J_MAKE_DICT,
    LLM__J_ATTRIBUTE,
    LLM__J_INDEX,
    LLM__J_SLICE,
    LLM__J_CALL,
    LLM__J_FILTER,
    LLM__J_TEST,
    LLM__J_NOT,
    LLM__J_NEGATE,
    LLM__J_PLUS,
    LLM__J_BINARY,
    LLM__J_COMPARE,
    LLM__J_AND,
    LLM__J_OR,
    LLM__J_CHOICE
} llm__jinja_kind;

typedef struct llm__jinja_node {
    llm__jinja_kind kind;
    int op;   /* an operator's first characters, or the number of a filter, test or method */
    int line; /* in the template, for messages */
    bool negated;
    llm__str name;
    llm__jinja_value value;                           /* LLM__J_CONST, LLM__J_TEXT                          */
    struct llm__jinja_node *a, *b, *c, *body, *other; /* operands; statements inside; statements of an else */
    struct llm__jinja_node *args;                     /* arguments, items or targets, in order              */
    struct llm__jinja_node *next;                     /* the next node of the list that this one is in      */
} llm__jinja_node;

/* ---- Lexer ---- */

typedef enum llm__jinja_token_type {
    LLM__J_END,
    LLM__J_DATA,      /* text outside of tags                        */
    LLM__J_BLOCK,     /* {%                                          */
    LLM__J_BLOCK_END, /* %}                                          */
    LLM__J_PRINT,     /* {{                                          */
    LLM__J_PRINT_END, /* }}                                          */
    LLM__J_WORD,
    LLM__J_NUMBER,
    LLM__J_STRING,
    LLM__J_OPERATOR /* one or two characters                       */
} llm__jinja_token_type;

typedef struct llm__jinja_token {
    llm__jinja_token_type type;
    llm__str text; /* as the template has it */
    int line;
} llm__jinja_token;

typedef struct llm__jinja_parser {
    llm__env *env;
    const char *at, *end, *begin;
    bool inside;       /* the position is inside a tag                */
    bool closes_block; /* that tag is {% %}, not {{ }}                */
    bool strip_next;   /* the last tag ended with '-'                 */
    bool trim_next;    /* the last tag strips the newline after it    */
    int line, depth, loops;
    int open;                      /* open brackets inside the tag; }} does not end it before they are closed */
    llm__jinja_token token;        /* the current one */
    struct llm__jinja_node *nodes; /* an array of 64, the first n_nodes of which are in use */
    size_t n_nodes;
} llm__jinja_parser;

enum { LLM__JINJA_DEPTH = 100, LLM__JINJA_STEPS = 4000000, LLM__JINJA_RANGE = 100000 };
#define LLM__JINJA_MEMORY ((size_t)256 << 20)

LLM__NORETURN LLM__PRINTF(2, 3) static void llm__jinja_fail(llm__jinja_parser *p, const char *format, ...) {
    char text[300];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    llm__fail(p->env, LLM_ERROR_UNSUPPORTED, "the chat template, line %d: %s", p->line, text);
}

static bool llm__jinja_is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
static bool llm__jinja_is_digit(char c) { return c >= '0' && c <= '9'; }
static bool llm__jinja_is_word(char c) {
    return c == '_' || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || llm__jinja_is_digit(c);
}

static bool llm__jinja_here(const llm__jinja_parser *p, const char *text) {
    size_t n = strlen(text);
    return (size_t)(p->end - p->at) >= n && !memcmp(p->at, text, n);
}

static void llm__jinja_skip(llm__jinja_parser *p, const char *to) {
    for (; p->at < to; p->at++) p->line += *p->at == '\n';
}

/* Call this after a tag: "-" strips all white space that follows; otherwise a block or a comment strips one newline. */
static void llm__jinja_after_tag(llm__jinja_parser *p, char control, bool takes_newline) {
    p->strip_next = control == '-';
    p->trim_next = takes_newline && control != '+';
}

/* Skips a comment, which begins at p->at with {#. */
static void llm__jinja_comment(llm__jinja_parser *p) {
    const char *q = p->at + 2;
    while (q + 1 < p->end && !(q[0] == '#' && q[1] == '}')) q++;
    if (q + 1 >= p->end) llm__jinja_fail(p, "a comment does not end");
    llm__jinja_after_tag(p, q[-1], true);
    llm__jinja_skip(p, q + 2);
}

/* Lexes the text up to the next tag or comment, and drops the white space that the tags around it strip. */
static void llm__jinja_lex_data(llm__jinja_parser *p) {
    const char *from = p->at, *q;
    if (p->strip_next)
        while (from < p->end && llm__jinja_is_space(*from)) from++;
    else if (p->trim_next && from < p->end && *from == '\n') from++;
    llm__jinja_skip(p, from);
    p->strip_next = p->trim_next = false;
    p->token.line = p->line;
    for (q = from; q < p->end; q++)
        if (*q == '{' && q + 1 < p->end && (q[1] == '{' || q[1] == '%' || q[1] == '#')) break;
    const char *end = q;
    char control = q + 2 < p->end ? q[2] : 0;
    if (q < p->end && control == '-') {
        while (end > from && llm__jinja_is_space(end[-1])) end--;
    } else if (q < p->end && q[1] != '{' && control != '+') { /* lstrip_blocks */
        const char *start = q;
        while (start > from && (start[-1] == ' ' || start[-1] == '\t' || start[-1] == '\f' || start[-1] == '\v'))
            start--;
        if (start == p->begin || start[-1] == '\n') end = start;
    }
    p->token.type = LLM__J_DATA;
    p->token.text.at = from;
    p->token.text.n = (size_t)(end - from);
    llm__jinja_skip(p, q);
    if (q < p->end && q[1] == '#') llm__jinja_comment(p);
}

static void llm__jinja_lex_string(llm__jinja_parser *p) {
    char quote = *p->at;
    const char *from = p->at, *q = from + 1;
    while (q < p->end && *q != quote) q += *q == '\\' && q + 1 < p->end ? 2 : 1;
    if (q >= p->end) llm__jinja_fail(p, "a string does not end");
    p->token.type = LLM__J_STRING;
    p->token.text.at = from;
    p->token.text.n = (size_t)(q + 1 - from);
    llm__jinja_skip(p, q + 1);
}

/* Lexes a token inside a tag: a word, a number, a string, an operator, or the end of the tag. */
static void llm__jinja_lex_tag(llm__jinja_parser *p) {
    static const char *const two[] = {"**", "//", "==", "!=", "<=", ">="};
    const char *q = p->at;
    while (q < p->end && llm__jinja_is_space(*q)) q++;
    llm__jinja_skip(p, q);
    p->token.line = p->line;
    p->token.text.at = q;
    if (q == p->end) llm__jinja_fail(p, "a tag does not end");
    const char *close = p->closes_block ? "%}" : "}}";
    char control = *q == '-' || *q == '+' ? *q : 0;
    if (p->open == 0 && (llm__jinja_here(p, close) || (control && q + 2 < p->end && q[1] == close[0] && q[2] == '}'))) {
        if (control == '+' && !p->closes_block) llm__jinja_fail(p, "+}} is not Jinja");
        p->token.type = p->closes_block ? LLM__J_BLOCK_END : LLM__J_PRINT_END;
        llm__jinja_skip(p, q + (control ? 3 : 2));
        p->inside = false;
        llm__jinja_after_tag(p, control, p->closes_block);
        return;
    }
    size_t n = 1;
    if (*q == '"' || *q == '\'') {
        llm__jinja_lex_string(p);
        return;
    }
    if (llm__jinja_is_digit(*q)) {
        p->token.type = LLM__J_NUMBER;
        while (q + n < p->end &&
               (llm__jinja_is_word(q[n]) || (q[n] == '.' && q + n + 1 < p->end && llm__jinja_is_digit(q[n + 1])) ||
                ((q[n] == '-' || q[n] == '+') && (q[n - 1] | 32) == 'e')))
            n++;
    } else if (llm__jinja_is_word(*q)) {
        p->token.type = LLM__J_WORD;
        while (q + n < p->end && llm__jinja_is_word(q[n])) n++;
    } else {
        if (!strchr("+-*/%~=<>!()[]{}.,:|", *q) || !*q) llm__jinja_fail(p, "unexpected character '%c'", *q);
        p->token.type = LLM__J_OPERATOR;
        if (strchr("([{", *q)) p->open++;
        if (strchr(")]}", *q) && p->open) p->open--;
        for (size_t i = 0; i < sizeof two / sizeof *two; i++)
            if (llm__jinja_here(p, two[i])) n = 2;
    }
    p->token.text.n = n;
    llm__jinja_skip(p, q + n);
}

static void llm__jinja_lex(llm__jinja_parser *p) {
    if (p->inside) {
        llm__jinja_lex_tag(p);
    } else if (p->at == p->end) {
        p->token.type = LLM__J_END;
        p->token.text.n = 0;
        p->token.line = p->line;
    } else if (llm__jinja_here(p, "{%") || llm__jinja_here(p, "{{")) {
        p->token.line = p->line;
        p->closes_block = p->at[1] == '%';
        p->token.type = p->closes_block ? LLM__J_BLOCK : LLM__J_PRINT;
        p->inside = true;
        p->open = 0;
        p->strip_next = p->trim_next = false;
        p->at += 2;
        if (p->at < p->end && (*p->at == '-' || (*p->at == '+' && p->closes_block))) p->at++;
    } else {
        llm__jinja_lex_data(p);
    }
}

/* ---- Parser ---- */

static bool llm__jinja_is(const llm__jinja_parser *p, const char *text) {
    return (p->token.type == LLM__J_OPERATOR || p->token.type == LLM__J_WORD) && llm__str_is(p->token.text, text);
}

static bool llm__jinja_take(llm__jinja_parser *p, const char *text) {
    if (!llm__jinja_is(p, text)) return false;
    llm__jinja_lex(p);
    return true;
}

static void llm__jinja_expect(llm__jinja_parser *p, const char *text) {
    if (!llm__jinja_take(p, text)) llm__jinja_fail(p, "expected '%s', found '%.*s'", text, LLM__SHOW(p->token.text));
}

static void llm__jinja_expect_type(llm__jinja_parser *p, llm__jinja_token_type type, const char *what) {
    if (p->token.type != type) llm__jinja_fail(p, "expected %s, found '%.*s'", what, LLM__SHOW(p->token.text));
    llm__jinja_lex(p);
}

static llm__str llm__jinja_word(llm__jinja_parser *p) {
    llm__str word = p->token.text;
    llm__jinja_expect_type(p, LLM__J_WORD, "a name");
    return word;
}

static llm__jinja_node *llm__jinja_new(llm__jinja_parser *p, llm__jinja_kind kind) {
    enum { CHUNK = 64 };
    if (!p->nodes || p->n_nodes == CHUNK) {
        p->nodes = (llm__jinja_node *)llm__alloc_zero(p->env, CHUNK, sizeof *p->nodes);
        p->n_nodes = 0;
    }
    llm__jinja_node *node = &p->nodes[p->n_nodes++];
    node->kind = kind;
    node->line = p->token.line;
    return node;
}

/* Appends a node to a list that ends at *last. Returns the address of the new end. */
static llm__jinja_node **llm__jinja_append(llm__jinja_node **last, llm__jinja_node *node) {
    *last = node;
    return &node->next;
}

static int llm__jinja_find(const char *const *names, llm__str name) {
    for (int i = 0; names[i]; i++)
        if (llm__str_is(name, names[i])) return i;
    return -1;
}

/* The supported filters, tests, methods and functions: for each a list of names, and enumerators in the same order. */
/* clang-format off */
#define LLM__JINJA_FILTERS(X)                                                                                 \
    X(trim) X(tojson) X(length) X(count) X(upper) X(lower) X(title) X(capitalize) X(replace) X(join) X(first) \
    X(last) X(list) X(map) X(select) X(reject) X(selectattr) X(rejectattr) X(default) X(d) X(safe) X(string)  \
    X(int) X(float) X(items) X(dictsort) X(sort) X(unique) X(reverse) X(indent) X(abs) X(round) X(sum) X(min) \
    X(max)
#define X(name) #name,
static const char *const llm__jinja_filters[] = {LLM__JINJA_FILTERS(X) NULL};
#undef X
#define X(name) LLM__JF_##name,
enum { LLM__JINJA_FILTERS(X) LLM__JF_END };
#undef X

#define LLM__JINJA_TESTS(X)                                                                                     \
    X(defined) X(undefined) X(none) X(string) X(mapping) X(sequence) X(iterable) X(number) X(integer) X(float)  \
    X(boolean) X(true) X(false) X(equalto) X(eq) X(ne) X(gt) X(greaterthan) X(ge) X(lt) X(lessthan) X(le) X(in) \
    X(even) X(odd) X(divisibleby) X(callable) X(sameas) X(lower) X(upper)
#define X(name) #name,
static const char *const llm__jinja_tests[] = {LLM__JINJA_TESTS(X) NULL};
#undef X
#define X(name) LLM__JT_##name,
enum { LLM__JINJA_TESTS(X) LLM__JT_END };
#undef X

#define LLM__JINJA_METHODS(X)                                                                              \
    X(strip) X(lstrip) X(rstrip) X(split) X(rsplit) X(startswith) X(endswith) X(replace) X(upper) X(lower) \
    X(title) X(capitalize) X(find) X(rfind) X(count) X(join) X(splitlines) X(removeprefix) X(removesuffix) \
    X(isdigit) X(isspace) X(items) X(keys) X(values) X(get) X(index) X(cycle) X(format)
#define X(name) #name,
static const char *const llm__jinja_methods[] = {LLM__JINJA_METHODS(X) NULL};
#undef X
#define X(name) LLM__JM_##name,
enum { LLM__JINJA_METHODS(X) LLM__JM_END };
#undef X

#define LLM__JINJA_FUNCTIONS(X) X(raise_exception) X(strftime_now) X(range) X(namespace) X(dict)
#define X(name) #name,
static const char *const llm__jinja_functions[] = {LLM__JINJA_FUNCTIONS(X) NULL};
#undef X
#define X(name) LLM__JG_##name,
enum { LLM__JINJA_FUNCTIONS(X) LLM__JG_END };
#undef X
/* clang-format on */

/* Declared early, because operands contain expressions. */
static llm__jinja_node *llm__jinja_expression(llm__jinja_parser *p);

static int llm__jinja_hex_digit(char c) {
    if (llm__jinja_is_digit(c)) return c - '0';
    return (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
}

static int llm__jinja_hex(llm__jinja_parser *p, const char *q, const char *end, int n, uint32_t *code) {
    *code = 0;
    if (end - q < n) llm__jinja_fail(p, "an escape in a string is too short");
    for (int i = 0; i < n; i++) {
        int digit = llm__jinja_hex_digit(q[i]);
        if (digit < 0) llm__jinja_fail(p, "an escape in a string needs hexadecimal digits");
        *code = *code * 16 + (uint32_t)digit;
    }
    return n;
}

/* Writes the text of a string literal to `out` and returns its bytes. Escapes are Python's; \N is refused. */
static size_t llm__jinja_unescape(llm__jinja_parser *p, llm__str literal, char *out) {
    static const char letters[] = "ntr\\'\"abfv", meanings[] = "\n\t\r\\'\"\a\b\f\v";
    const char *q = literal.at + 1, *end = literal.at + literal.n - 1;
    size_t n = 0;
    while (q < end) {
        if (*q != '\\' || q + 1 == end) {
            out[n++] = *q++;
            continue;
        }
        char c = q[1];
        const char *found = c ? strchr(letters, c) : NULL;
        uint32_t code;
        q += 2;
        if (found) {
            out[n++] = meanings[found - letters];
        } else if (c == 'x' || c == 'u' || c == 'U') {
            q += llm__jinja_hex(p, q, end, c == 'x' ? 2 : c == 'u' ? 4 : 8, &code);
            if (code > 0x10FFFF || (code >= 0xD800 && code < 0xE000))
                llm__jinja_fail(p, "an escape in a string is not a valid character");
            n += llm__utf8_encode(code, (uint8_t *)out + n);
        } else if (c >= '0' && c <= '7') {
            code = (uint32_t)(c - '0');
            for (int i = 0; i < 2 && q < end && *q >= '0' && *q <= '7'; i++) code = code * 8 + (uint32_t)(*q++ - '0');
            n += llm__utf8_encode(code, (uint8_t *)out + n);
        } else if (c == 'N') {
            llm__jinja_fail(p, "\\N in a string is not supported");
        } else if (c != '\n') {
            out[n++] = '\\';
            out[n++] = c;
        }
    }
    return n;
}

static llm__jinja_node *llm__jinja_string(llm__jinja_parser *p) {
    llm__jinja_node *node = llm__jinja_new(p, LLM__J_CONST);
    char *text = NULL;
    size_t n = 0;
    while (p->token.type == LLM__J_STRING) { /* adjacent literals form one string */
        char *longer = (char *)llm__alloc(p->env, n + p->token.text.n, 1);
        if (n) memcpy(longer, text, n);
        llm__free(p->env->pool, text);
        text = longer;
        n += llm__jinja_unescape(p, p->token.text, text + n);
        llm__jinja_lex(p);
    }
    node->value.type = LLM__J_STR;
    node->value.u.s.at = text;
    node->value.u.s.n = n;
    return node;
}

static llm__jinja_node *llm__jinja_number(llm__jinja_parser *p) {
    llm__jinja_node *node = llm__jinja_new(p, LLM__J_CONST);
    llm__str s = p->token.text;
    bool is_float = false;
    char digits[64];
    size_t n = 0;
    for (size_t i = 0; i < s.n; i++) {
        if (s.at[i] == '_') continue;
        if (!llm__jinja_is_digit(s.at[i])) is_float = true;
        if (n == sizeof digits - 1) llm__jinja_fail(p, "the number %.*s is too long", LLM__SHOW(s));
        digits[n++] = s.at[i];
    }
    llm__json_reader r = {p->env, digits, digits, digits + n, NULL, 0};
    llm__json v;
    llm__json_number(&r, &v);
    if (r.at != r.end || (!is_float && n > 18)) llm__jinja_fail(p, "the number %.*s is not supported", LLM__SHOW(s));
    node->value.type = is_float ? LLM__J_FLOAT : LLM__J_INT;
    if (is_float) node->value.u.f = v.number;
    else
        for (size_t i = 0; i < n; i++) node->value.u.i = node->value.u.i * 10 + (digits[i] - '0');
    llm__jinja_lex(p);
    return node;
}

/* Parses the arguments of a call, filter or test, after its "(". NAME=value becomes a node with that name. */
static llm__jinja_node *llm__jinja_arguments(llm__jinja_parser *p) {
    llm__jinja_node *first = NULL, **last = &first;
    while (!llm__jinja_take(p, ")")) {
        if (first) llm__jinja_expect(p, ",");
        if (first && llm__jinja_take(p, ")")) break;
        if (llm__jinja_is(p, "*") || llm__jinja_is(p, "**")) llm__jinja_fail(p, "* and ** in calls are not supported");
        llm__jinja_node *argument = llm__jinja_expression(p);
        if (argument->kind == LLM__J_NAME && llm__jinja_take(p, "=")) {
            llm__str name = argument->name;
            argument = llm__jinja_new(p, LLM__J_PLUS); /* a node of its own, as the expression may use `name` itself */
            argument->op = '=';
            argument->name = name;
            argument->a = llm__jinja_expression(p);
        }
        last = llm__jinja_append(last, argument);
    }
    return first;
}

/* Parses the items of a list or dictionary up to the closing bracket. */
static llm__jinja_node *llm__jinja_items(llm__jinja_parser *p, llm__jinja_kind kind, const char *close) {
    llm__jinja_node *node = llm__jinja_new(p, kind), **last = &node->args;
    while (!llm__jinja_take(p, close)) {
        if (node->args) llm__jinja_expect(p, ",");
        if (node->args && llm__jinja_take(p, close)) break;
        last = llm__jinja_append(last, llm__jinja_expression(p));
        if (kind == LLM__J_MAKE_DICT) {
            llm__jinja_expect(p, ":");
            last = llm__jinja_append(last, llm__jinja_expression(p));
        }
    }
    return node;
}

/* Parses what follows "(": an expression, a tuple if there is a comma, or an empty tuple. */
static llm__jinja_node *llm__jinja_parenthesis(llm__jinja_parser *p) {
    llm__jinja_node *tuple = llm__jinja_new(p, LLM__J_MAKE_TUPLE), **last = &tuple->args;
    bool comma = false;
    if (llm__jinja_take(p, ")")) return tuple;
    do {
        if (comma && llm__jinja_is(p, ")")) break;
        last = llm__jinja_append(last, llm__jinja_expression(p));
        if (llm__jinja_is(p, ",")) comma = true;
    } while (llm__jinja_take(p, ","));
    llm__jinja_expect(p, ")");
    return comma ? tuple : tuple->args;
}

static llm__jinja_node *llm__jinja_atom(llm__jinja_parser *p) {
    static const char *const constants[] = {"true", "True", "false", "False", "none", "None", NULL};
    if (p->token.type == LLM__J_STRING) return llm__jinja_string(p);
    if (p->token.type == LLM__J_NUMBER) return llm__jinja_number(p);
    if (llm__jinja_take(p, "(")) return llm__jinja_parenthesis(p);
    if (llm__jinja_take(p, "[")) return llm__jinja_items(p, LLM__J_MAKE_LIST, "]");
    if (llm__jinja_take(p, "{")) return llm__jinja_items(p, LLM__J_MAKE_DICT, "}");
    if (p->token.type != LLM__J_WORD) llm__jinja_fail(p, "expected a value, found '%.*s'", LLM__SHOW(p->token.text));
    int constant = llm__jinja_find(constants, p->token.text);
    llm__jinja_node *node = llm__jinja_new(p, constant < 0 ? LLM__J_NAME : LLM__J_CONST);
    if (constant >= 0) {
        node->value.type = constant < 4 ? LLM__J_BOOL : LLM__J_NONE;
        node->value.u.i = constant < 2;
    }
    node->name = p->token.text;
    llm__jinja_lex(p);
    return node;
}

/* Parses what follows "[": an index or a slice of `object`. */
static llm__jinja_node *llm__jinja_subscript(llm__jinja_parser *p, llm__jinja_node *object) {
    llm__jinja_node *node = llm__jinja_new(p, LLM__J_INDEX);
    node->a = object;
    if (!llm__jinja_is(p, ":")) node->b = llm__jinja_expression(p);
    if (llm__jinja_take(p, ":")) {
        node->kind = LLM__J_SLICE;
        if (!llm__jinja_is(p, ":") && !llm__jinja_is(p, "]")) node->c = llm__jinja_expression(p);
        if (llm__jinja_take(p, ":") && !llm__jinja_is(p, "]")) node->args = llm__jinja_expression(p);
    }
    llm__jinja_expect(p, "]");
    return node;
}

static llm__jinja_node *llm__jinja_apply_filter(llm__jinja_parser *p, llm__jinja_node *object) {
    llm__jinja_node *node = llm__jinja_new(p, LLM__J_FILTER);
    node->a = object;
    node->name = llm__jinja_word(p);
    node->op = llm__jinja_find(llm__jinja_filters, node->name);
    if (node->op < 0) llm__jinja_fail(p, "the filter %.*s is not supported", LLM__SHOW(node->name));
    if (llm__jinja_take(p, "(")) node->args = llm__jinja_arguments(p);
    return node;
}

/* Parses an atom and the attributes, subscripts and calls after it. */
static llm__jinja_node *llm__jinja_postfix(llm__jinja_parser *p) {
    llm__jinja_node *node = llm__jinja_atom(p);
    for (;;) {
        llm__jinja_node *object = node;
        if (llm__jinja_take(p, ".")) {
            node = llm__jinja_new(p, LLM__J_ATTRIBUTE);
            node->a = object;
            node->name = llm__jinja_word(p);
        } else if (llm__jinja_take(p, "[")) {
            node = llm__jinja_subscript(p, object);
        } else if (llm__jinja_take(p, "(")) {
            node = llm__jinja_new(p, LLM__J_CALL);
            node->a = object;
            if (object->kind == LLM__J_ATTRIBUTE) {
                node->op = llm__jinja_find(llm__jinja_methods, object->name);
                if (node->op < 0) llm__jinja_fail(p, "the method %.*s is not supported", LLM__SHOW(object->name));
            } else if (object->kind != LLM__J_NAME) {
                llm__jinja_fail(p, "only names and methods can be called");
            }
            node->args = llm__jinja_arguments(p);
        } else {
            return node;
        }
    }
}

static void llm__jinja_enter(llm__jinja_parser *p) {
    if (++p->depth > LLM__JINJA_DEPTH) llm__jinja_fail(p, "more than %d levels of nesting", LLM__JINJA_DEPTH);
}

static llm__jinja_node *llm__jinja_test(llm__jinja_parser *p, llm__jinja_node *object) {
    llm__jinja_node *node = llm__jinja_new(p, LLM__J_TEST);
    node->a = object;
    node->negated = llm__jinja_take(p, "not");
    node->name = p->token.text;
    llm__jinja_expect_type(p, LLM__J_WORD, "the name of a test");
    node->op = llm__jinja_find(llm__jinja_tests, node->name);
    if (llm__str_is(node->name, "None")) node->op = LLM__JT_none;
    if (node->op < 0) llm__jinja_fail(p, "the test %.*s is not supported", LLM__SHOW(node->name));
    bool value = p->token.type == LLM__J_STRING || p->token.type == LLM__J_NUMBER || llm__jinja_is(p, "[") ||
                 llm__jinja_is(p, "{") ||
                 (p->token.type == LLM__J_WORD && !llm__jinja_is(p, "else") && !llm__jinja_is(p, "or") &&
                  !llm__jinja_is(p, "and") && !llm__jinja_is(p, "is") && !llm__jinja_is(p, "if") &&
                  !llm__jinja_is(p, "not") && !llm__jinja_is(p, "in"));
    if (llm__jinja_take(p, "(")) node->args = llm__jinja_arguments(p);
    else if (value) node->args = llm__jinja_postfix(p);
    return node;
}

static llm__jinja_node *llm__jinja_unary(llm__jinja_parser *p, bool with_filters) {
    llm__jinja_node *node;
    llm__jinja_enter(p);
    bool minus = llm__jinja_is(p, "-");
    if (minus || llm__jinja_is(p, "+")) {
        node = llm__jinja_new(p, minus ? LLM__J_NEGATE : LLM__J_PLUS);
        llm__jinja_lex(p);
        node->a = llm__jinja_unary(p, false);
    } else {
        node = llm__jinja_postfix(p);
    }
    while (with_filters) {
        if (llm__jinja_take(p, "|")) node = llm__jinja_apply_filter(p, node);
        else if (llm__jinja_take(p, "is")) node = llm__jinja_test(p, node);
        else if (llm__jinja_take(p, "(")) llm__jinja_fail(p, "only names and methods can be called");
        else break;
    }
    p->depth--;
    return node;
}

/* Binary operators by level, the loosest first. Filters and tests bind tighter than all of them. */
static llm__jinja_node *llm__jinja_binary(llm__jinja_parser *p, int level) {
    static const char *const operators[4][5] = {
        {"+", "-", NULL}, {"~", NULL}, {"*", "/", "//", "%", NULL}, {"**", NULL}};
    if (level == 4) return llm__jinja_unary(p, true);
    llm__jinja_node *node = llm__jinja_binary(p, level + 1);
    for (;;) {
        int op = p->token.type == LLM__J_OPERATOR ? llm__jinja_find(operators[level], p->token.text) : -1;
        if (op < 0) return node;
        llm__jinja_node *binary = llm__jinja_new(p, LLM__J_BINARY);
        binary->op = p->token.text.n == 1 ? *p->token.text.at : level == 3 ? 'p' : 'f'; /* p: **, f: // */
        llm__jinja_lex(p);
        binary->a = node;
        binary->b = llm__jinja_binary(p, level + 1);
        node = binary;
    }
}

/* Parses a comparison, perhaps a chain such as a < b < c: node->a is a, and args are b and c, each with its
   operator. */
static llm__jinja_node *llm__jinja_comparison(llm__jinja_parser *p) {
    static const char *const operators[] = {"==", "!=", "<", "<=", ">", ">=", "in", NULL};
    static const char codes[] = "=!<l>gi";
    if (llm__jinja_is(p, "not")) {
        llm__jinja_node *node = llm__jinja_new(p, LLM__J_NOT);
        llm__jinja_lex(p);
        llm__jinja_enter(p);
        node->a = llm__jinja_comparison(p);
        p->depth--;
        return node;
    }
    llm__jinja_node *first = llm__jinja_binary(p, 0), *node = NULL, **last = NULL;
    for (;;) {
        int op = llm__jinja_is(p, "not") ? 7
                 : p->token.type == LLM__J_WORD || p->token.type == LLM__J_OPERATOR
                     ? llm__jinja_find(operators, p->token.text)
                     : -1;
        if (op < 0) return node ? node : first;
        if (!node) {
            node = llm__jinja_new(p, LLM__J_COMPARE);
            node->a = first;
            last = &node->args;
        }
        llm__jinja_node *operand = llm__jinja_new(p, LLM__J_PLUS);
        llm__jinja_lex(p);
        if (op == 7) llm__jinja_expect(p, "in");
        operand->op = op == 7 ? 'n' : codes[op];
        operand->a = llm__jinja_binary(p, 0);
        last = llm__jinja_append(last, operand);
    }
}

static llm__jinja_node *llm__jinja_logic(llm__jinja_parser *p, bool is_or) {
    llm__jinja_node *node = is_or ? llm__jinja_logic(p, false) : llm__jinja_comparison(p);
    while (llm__jinja_is(p, is_or ? "or" : "and")) {
        llm__jinja_node *both = llm__jinja_new(p, is_or ? LLM__J_OR : LLM__J_AND);
        llm__jinja_lex(p);
        both->a = node;
        both->b = is_or ? llm__jinja_logic(p, false) : llm__jinja_comparison(p);
        node = both;
    }
    return node;
}

static llm__jinja_node *llm__jinja_expression(llm__jinja_parser *p) {
    llm__jinja_enter(p);
    llm__jinja_node *node = llm__jinja_logic(p, true);
    while (llm__jinja_is(p, "if")) {
        llm__jinja_node *choice = llm__jinja_new(p, LLM__J_CHOICE);
        llm__jinja_lex(p);
        choice->a = node;
        choice->b = llm__jinja_logic(p, true);
        if (llm__jinja_take(p, "else")) choice->c = llm__jinja_expression(p);
        node = choice;
    }
    p->depth--;
    return node;
}

/* Parses an expression, or a tuple without parentheses as in {% set a, b = 1, 2 %}. */
static llm__jinja_node *llm__jinja_expression_list(llm__jinja_parser *p) {
    llm__jinja_node *first = llm__jinja_expression(p);
    if (!llm__jinja_is(p, ",")) return first;
    llm__jinja_node *tuple = llm__jinja_new(p, LLM__J_MAKE_TUPLE), **last = &tuple->args;
    last = llm__jinja_append(last, first);
    while (llm__jinja_take(p, ",") && p->token.type != LLM__J_BLOCK_END && p->token.type != LLM__J_PRINT_END)
        last = llm__jinja_append(last, llm__jinja_expression(p));
    return tuple;
}

/* Parses the names to which a `for` or a `set` assigns. */
static llm__jinja_node *llm__jinja_targets(llm__jinja_parser *p, bool attributes) {
    llm__jinja_node *first = NULL, **last = &first;
    bool parenthesis = llm__jinja_take(p, "(");
    do {
        if (p->token.type != LLM__J_WORD || llm__jinja_is(p, "in")) break;
        llm__jinja_node *node = llm__jinja_new(p, LLM__J_NAME);
        node->name = llm__jinja_word(p);
        if (attributes && llm__jinja_take(p, ".")) {
            llm__jinja_node *attribute = llm__jinja_new(p, LLM__J_ATTRIBUTE);
            attribute->a = node;
            attribute->name = llm__jinja_word(p);
            node = attribute;
        }
        last = llm__jinja_append(last, node);
    } while (llm__jinja_take(p, ","));
    if (parenthesis) llm__jinja_expect(p, ")");
    if (!first) llm__jinja_fail(p, "expected a name, found '%.*s'", LLM__SHOW(p->token.text));
    return first;
}

static void llm__jinja_end_tag(llm__jinja_parser *p) { llm__jinja_expect_type(p, LLM__J_BLOCK_END, "%}"); }

/* Parses statements up to a tag that begins with one of the words in `ends`, separated by spaces. That word is then the
   current token. */
static llm__jinja_node *llm__jinja_statements(llm__jinja_parser *p, const char *ends);

static bool llm__jinja_is_one_of(const llm__jinja_parser *p, const char *words) {
    for (const char *w = words; *w;) {
        size_t n = strcspn(w, " ");
        if (p->token.type == LLM__J_WORD && p->token.text.n == n && !memcmp(w, p->token.text.at, n)) return true;
        w += n + (w[n] == ' ');
    }
    return false;
}

static void llm__jinja_if(llm__jinja_parser *p, llm__jinja_node *node) {
    node->a = llm__jinja_expression_list(p);
    llm__jinja_end_tag(p);
    node->body = llm__jinja_statements(p, "elif else endif");
    if (llm__jinja_is(p, "elif")) {
        llm__jinja_node *rest = llm__jinja_new(p, LLM__J_IF);
        llm__jinja_lex(p);
        llm__jinja_enter(p);
        llm__jinja_if(p, rest);
        p->depth--;
        node->other = rest;
        return;
    }
    if (llm__jinja_take(p, "else")) {
        llm__jinja_end_tag(p);
        node->other = llm__jinja_statements(p, "endif");
    }
    llm__jinja_expect(p, "endif");
    llm__jinja_end_tag(p);
}

static void llm__jinja_for(llm__jinja_parser *p, llm__jinja_node *node) {
    node->args = llm__jinja_targets(p, false);
    llm__jinja_expect(p, "in");
    node->a = llm__jinja_logic(p, true);
    if (llm__jinja_take(p, "if")) node->b = llm__jinja_expression(p);
    if (llm__jinja_is(p, "recursive")) llm__jinja_fail(p, "recursive loops are not supported");
    llm__jinja_end_tag(p);
    p->loops++;
    node->body = llm__jinja_statements(p, "else endfor");
    p->loops--;
    if (llm__jinja_take(p, "else")) {
        llm__jinja_end_tag(p);
        node->other = llm__jinja_statements(p, "endfor");
    }
    llm__jinja_expect(p, "endfor");
    llm__jinja_end_tag(p);
}

static void llm__jinja_set(llm__jinja_parser *p, llm__jinja_node *node) {
    node->args = llm__jinja_targets(p, true);
    if (llm__jinja_take(p, "=")) {
        node->a = llm__jinja_expression_list(p);
        llm__jinja_end_tag(p);
        return;
    }
    node->kind = LLM__J_SET_BLOCK;
    node->a = llm__jinja_new(p, LLM__J_CONST); /* stands for the block's text, to which the filters are applied */
    while (llm__jinja_take(p, "|")) node->a = llm__jinja_apply_filter(p, node->a);
    llm__jinja_end_tag(p);
    node->body = llm__jinja_statements(p, "endset");
    llm__jinja_expect(p, "endset");
    llm__jinja_end_tag(p);
}

static void llm__jinja_filter_block(llm__jinja_parser *p, llm__jinja_node *node) {
    node->a = llm__jinja_apply_filter(p, llm__jinja_new(p, LLM__J_CONST));
    while (llm__jinja_take(p, "|")) node->a = llm__jinja_apply_filter(p, node->a);
    llm__jinja_end_tag(p);
    node->body = llm__jinja_statements(p, "endfilter");
    llm__jinja_expect(p, "endfilter");
    llm__jinja_end_tag(p);
}

/* Parses a macro. Its parameters become nodes with a name, and with the default in `a` if there is one. */
static void llm__jinja_macro(llm__jinja_parser *p, llm__jinja_node *node) {
    llm__jinja_node **last = &node->args;
    int loops = p->loops;
    node->name = llm__jinja_word(p);
    llm__jinja_expect(p, "(");
    while (!llm__jinja_take(p, ")")) {
        if (node->args) llm__jinja_expect(p, ",");
        llm__jinja_node *parameter = llm__jinja_new(p, LLM__J_NAME);
        parameter->name = llm__jinja_word(p);
        if (llm__jinja_take(p, "=")) parameter->a = llm__jinja_expression(p);
        last = llm__jinja_append(last, parameter);
    }
    llm__jinja_end_tag(p);
    p->loops = 0;
    node->body = llm__jinja_statements(p, "endmacro");
    p->loops = loops;
    llm__jinja_expect(p, "endmacro");
    if (p->token.type == LLM__J_WORD) llm__jinja_lex(p);
    llm__jinja_end_tag(p);
}

static void llm__jinja_with(llm__jinja_parser *p, llm__jinja_node *node) {
    llm__jinja_node **last = &node->args;
    while (p->token.type == LLM__J_WORD) {
        llm__jinja_node *assignment = llm__jinja_new(p, LLM__J_NAME);
        assignment->name = llm__jinja_word(p);
        llm__jinja_expect(p, "=");
        assignment->a = llm__jinja_expression(p);
        last = llm__jinja_append(last, assignment);
        if (!llm__jinja_take(p, ",")) break;
    }
    llm__jinja_end_tag(p);
    node->body = llm__jinja_statements(p, "endwith");
    llm__jinja_expect(p, "endwith");
    llm__jinja_end_tag(p);
}

/* Parses {% raw %}: everything up to {% endraw %} is text. */
static llm__jinja_node *llm__jinja_raw(llm__jinja_parser *p) {
    const char *from = p->at;
    if (p->strip_next)
        while (from < p->end && llm__jinja_is_space(*from)) from++;
    else if (p->trim_next && from < p->end && *from == '\n') from++;
    for (const char *q = from; q + 1 < p->end; q++) {
        if (q[0] != '{' || q[1] != '%') continue;
        const char *r = q + 2, *end = q;
        bool strip = r < p->end && *r == '-';
        r += r < p->end && (*r == '-' || *r == '+');
        while (r < p->end && llm__jinja_is_space(*r)) r++;
        if ((size_t)(p->end - r) < 6 || memcmp(r, "endraw", 6)) continue;
        while (strip && end > from && llm__jinja_is_space(end[-1])) end--;
        llm__jinja_node *node = llm__jinja_new(p, LLM__J_TEXT);
        node->value.type = LLM__J_STR;
        node->value.u.s.at = from;
        node->value.u.s.n = (size_t)(end - from);
        llm__jinja_skip(p, r + 6);
        p->inside = p->closes_block = true;
        llm__jinja_lex(p);
        llm__jinja_end_tag(p);
        return node;
    }
    llm__jinja_fail(p, "{%% endraw %%} is missing");
}

/* Parses a block, whose first word is the current token. */
static llm__jinja_node *llm__jinja_block(llm__jinja_parser *p) {
    static const char *const names[] = {"if",    "for",      "set",        "macro", "filter", "with",
                                        "break", "continue", "generation", "raw",   NULL};
    static const llm__jinja_kind kinds[] = {LLM__J_IF,           LLM__J_FOR,  LLM__J_SET,   LLM__J_DEFINE,
                                            LLM__J_FILTER_BLOCK, LLM__J_WITH, LLM__J_BREAK, LLM__J_CONTINUE,
                                            LLM__J_IF,           LLM__J_TEXT};
    llm__str name = p->token.text;
    int which = p->token.type == LLM__J_WORD ? llm__jinja_find(names, name) : -1;
    if (which < 0) llm__jinja_fail(p, "the tag '%.*s' is not supported here", LLM__SHOW(name));
    llm__jinja_node *node = llm__jinja_new(p, kinds[which]);
    llm__jinja_lex(p);
    if (which == 9) {
        if (p->token.type != LLM__J_BLOCK_END) llm__jinja_fail(p, "expected %%} after raw");
        return llm__jinja_raw(p);
    }
    switch (kinds[which]) {
    case LLM__J_FOR: llm__jinja_for(p, node); break;
    case LLM__J_SET: llm__jinja_set(p, node); break;
    case LLM__J_DEFINE: llm__jinja_macro(p, node); break;
    case LLM__J_FILTER_BLOCK: llm__jinja_filter_block(p, node); break;
    case LLM__J_WITH: llm__jinja_with(p, node); break;
    case LLM__J_BREAK:
    case LLM__J_CONTINUE:
        if (!p->loops) llm__jinja_fail(p, "%.*s outside of a loop", LLM__SHOW(name));
        llm__jinja_end_tag(p);
        break;
    default:
        if (which == 0) {
            llm__jinja_if(p, node);
            break;
        }
        llm__jinja_end_tag(p); /* `generation` marks the assistant's text for training; we only show it */
        node->a = llm__jinja_new(p, LLM__J_CONST);
        node->a->value.type = LLM__J_BOOL;
        node->a->value.u.i = 1;
        node->body = llm__jinja_statements(p, "endgeneration");
        llm__jinja_expect(p, "endgeneration");
        llm__jinja_end_tag(p);
    }
    return node;
}

static llm__jinja_node *llm__jinja_statements(llm__jinja_parser *p, const char *ends) {
    llm__jinja_node *first = NULL, **last = &first;
    llm__jinja_enter(p);
    for (;;) {
        llm__jinja_node *node;
        if (p->token.type == LLM__J_END) {
            if (*ends) llm__jinja_fail(p, "the template ends inside a block (%s is missing)", ends);
            break;
        }
        if (p->token.type == LLM__J_DATA) {
            node = llm__jinja_new(p, LLM__J_TEXT);
            node->value.type = LLM__J_STR;
            node->value.u.s.at = p->token.text.at;
            node->value.u.s.n = p->token.text.n;
            llm__jinja_lex(p);
        } else if (p->token.type == LLM__J_PRINT) {
            node = llm__jinja_new(p, LLM__J_OUTPUT);
            llm__jinja_lex(p);
            node->a = llm__jinja_expression_list(p);
            llm__jinja_expect_type(p, LLM__J_PRINT_END, "}}");
        } else {
            llm__jinja_expect_type(p, LLM__J_BLOCK, "{%");
            if (llm__jinja_is_one_of(p, ends)) break;
            node = llm__jinja_block(p);
        }
        last = llm__jinja_append(last, node);
    }
    p->depth--;
    return first;
}

/* Parses a template. The text must be UTF-8, with \n at the ends of lines, and must outlive the nodes, which point into
   it. */
static llm__jinja_node *llm__jinja_parse(llm__env *env, const char *text, size_t n) {
    llm__jinja_parser p;
    memset(&p, 0, sizeof p);
    p.env = env;
    p.begin = p.at = text;
    p.end = text + n - (n && text[n - 1] == '\n');
    p.line = 1;
    llm__jinja_lex(&p);
    return llm__jinja_statements(&p, "");
}

/* ---- Values ---- */

typedef struct llm__jinja_scope {
    struct llm__jinja_scope *parent;
    llm__jinja_dict variables;
} llm__jinja_scope;

typedef struct llm__jinja_buffer {
    char *text;
    uint8_t *host; /* as in a value */
    size_t n, room;
} llm__jinja_buffer;

typedef struct llm__jinja_run {
    llm__env *env;
    const llm__unicode_classes *classes;
    const llm__jinja_node *at; /* the node being run, for messages */
    llm__jinja_scope *scope, *top;
    llm__jinja_buffer out;
    bool breaks, continues; /* a break or continue in the innermost loop is being carried out */
    int depth;
    size_t steps, memory;
} llm__jinja_run;

LLM__NORETURN LLM__PRINTF(2, 3) static void llm__jinja_error(llm__jinja_run *r, const char *format, ...) {
    char text[400];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    llm__utf8_trim(text);
    llm__fail(r->env, LLM_ERROR_ARGUMENT, "the chat template, line %d: %s", r->at ? r->at->line : 0, text);
}

static void *llm__jinja_alloc(llm__jinja_run *r, size_t count, size_t size) {
    if (size && count > LLM__JINJA_MEMORY / size) r->memory = LLM__JINJA_MEMORY;
    else r->memory += count * size + 128;
    if (r->memory >= LLM__JINJA_MEMORY)
        llm__jinja_error(r, "rendering needs more than %d MB", (int)(LLM__JINJA_MEMORY >> 20));
    return llm__alloc(r->env, count, size);
}

/* Counts n steps of work, and fails when a template has used too many. */
static void llm__jinja_step(llm__jinja_run *r, size_t n) {
    r->steps += n;
    if (r->steps > LLM__JINJA_STEPS) llm__jinja_error(r, "rendering needs more than %d steps", LLM__JINJA_STEPS);
}

static llm__jinja_value llm__jinja_make(llm__jinja_type type) {
    llm__jinja_value v;
    memset(&v, 0, sizeof v);
    v.type = type;
    return v;
}

static llm__jinja_value llm__jinja_undefined(llm__str name) {
    llm__jinja_value v = llm__jinja_make(LLM__J_UNDEFINED);
    v.u.name = name;
    return v;
}

static llm__jinja_value llm__jinja_bool(bool b) {
    llm__jinja_value v = llm__jinja_make(LLM__J_BOOL);
    v.u.i = b;
    return v;
}

static llm__jinja_value llm__jinja_int(int64_t i) {
    llm__jinja_value v = llm__jinja_make(LLM__J_INT);
    v.u.i = i;
    return v;
}

static llm__jinja_value llm__jinja_float(double f) {
    llm__jinja_value v = llm__jinja_make(LLM__J_FLOAT);
    v.u.f = f;
    return v;
}

/* Makes a string of the template. It points at `text`, which must outlive it. */
static llm__jinja_value llm__jinja_text(const char *text, size_t n) {
    llm__jinja_value v = llm__jinja_make(LLM__J_STR);
    v.u.s.at = text;
    v.u.s.n = n;
    return v;
}

static llm__str llm__jinja_str(const llm__jinja_value *v) {
    llm__str s;
    s.at = v->u.s.at;
    s.n = v->u.s.n;
    return s;
}

static void llm__jinja_put(llm__jinja_run *r, llm__jinja_buffer *b, const char *text, size_t n, const uint8_t *host) {
    if (b->room - b->n < n) {
        size_t room = b->room * 2 > b->n + n ? b->room * 2 : b->n + n + 32;
        char *longer = (char *)llm__jinja_alloc(r, room, 1);
        uint8_t *marks = (uint8_t *)llm__jinja_alloc(r, room, 1);
        if (b->n) {
            memcpy(longer, b->text, b->n);
            memcpy(marks, b->host, b->n);
        }
        llm__free(r->env->pool, b->text);
        llm__free(r->env->pool, b->host);
        b->text = longer;
        b->host = marks;
        b->room = room;
    }
    if (!n) return;
    memcpy(b->text + b->n, text, n);
    if (host) memcpy(b->host + b->n, host, n);
    else memset(b->host + b->n, 0, n);
    b->n += n;
    llm__jinja_step(r, n / 64);
}

static void llm__jinja_put_text(llm__jinja_run *r, llm__jinja_buffer *b, const char *text) {
    llm__jinja_put(r, b, text, strlen(text), NULL);
}

static void llm__jinja_put_part(llm__jinja_run *r, llm__jinja_buffer *b, const llm__jinja_value *s, size_t from,
                                size_t to) {
    llm__jinja_put(r, b, s->u.s.at + from, to - from, s->u.s.host ? s->u.s.host + from : NULL);
}

static llm__jinja_value llm__jinja_finish(const llm__jinja_buffer *b) {
    llm__jinja_value v = llm__jinja_text(b->text ? b->text : "", b->n);
    v.u.s.host = b->host;
    return v;
}

/* Bytes `from` to `to` of a string. They are not copied. */
static llm__jinja_value llm__jinja_part(const llm__jinja_value *s, size_t from, size_t to) {
    llm__jinja_value v = llm__jinja_text(s->u.s.at + from, to - from);
    v.u.s.host = s->u.s.host ? s->u.s.host + from : NULL;
    return v;
}

/* Makes a string of the host: invalid UTF-8 is replaced, and every byte is marked. */
static llm__jinja_value llm__jinja_host_text(llm__jinja_run *r, const char *text, size_t n) {
    const uint8_t *p = (const uint8_t *)text, *end = p + n;
    p = llm__utf8_valid(r->env, p, &end);
    llm__jinja_value v = llm__jinja_text((const char *)p, (size_t)(end - p));
    uint8_t *host = (uint8_t *)llm__jinja_alloc(r, v.u.s.n + 1, 1);
    memset(host, 1, v.u.s.n + 1);
    v.u.s.host = host;
    return v;
}

static llm__jinja_value llm__jinja_new_list(llm__jinja_run *r) {
    llm__jinja_value v = llm__jinja_make(LLM__J_LIST);
    v.u.list = (llm__jinja_list *)memset(llm__jinja_alloc(r, 1, sizeof *v.u.list), 0, sizeof *v.u.list);
    return v;
}

static llm__jinja_value llm__jinja_new_dict(llm__jinja_run *r) {
    llm__jinja_value v = llm__jinja_make(LLM__J_DICT);
    v.u.dict = (llm__jinja_dict *)memset(llm__jinja_alloc(r, 1, sizeof *v.u.dict), 0, sizeof *v.u.dict);
    return v;
}

/* Makes room for two more items. */
static llm__jinja_value *llm__jinja_grow(llm__jinja_run *r, llm__jinja_value *items, size_t n, size_t *room) {
    if (n + 2 <= *room) return items;
    size_t wanted = *room ? *room * 2 : 8;
    llm__jinja_value *moved = (llm__jinja_value *)llm__jinja_alloc(r, wanted, sizeof *moved);
    if (n) memcpy(moved, items, n * sizeof *moved);
    *room = wanted;
    return moved;
}

static void llm__jinja_add(llm__jinja_run *r, llm__jinja_list *list, llm__jinja_value v) {
    llm__jinja_step(r, 1);
    list->items = llm__jinja_grow(r, list->items, list->n, &list->room);
    list->items[list->n++] = v;
}

static bool llm__jinja_is_number(const llm__jinja_value *v) {
    return v->type == LLM__J_INT || v->type == LLM__J_FLOAT || v->type == LLM__J_BOOL;
}
static double llm__jinja_as_double(const llm__jinja_value *v) {
    return v->type == LLM__J_FLOAT ? v->u.f : (double)v->u.i;
}

static bool llm__jinja_equal(llm__jinja_run *r, const llm__jinja_value *a, const llm__jinja_value *b, int depth) {
    llm__jinja_step(r, 1);
    if (depth > LLM__JINJA_DEPTH) llm__jinja_error(r, "a value is nested too deeply");
    if (llm__jinja_is_number(a) && llm__jinja_is_number(b))
        return a->type == LLM__J_FLOAT || b->type == LLM__J_FLOAT ? llm__jinja_as_double(a) == llm__jinja_as_double(b)
                                                                  : a->u.i == b->u.i;
    if (a->type != b->type) return false;
    switch (a->type) {
    case LLM__J_UNDEFINED:
    case LLM__J_NONE: return true;
    case LLM__J_STR: return llm__str_equal(llm__jinja_str(a), llm__jinja_str(b));
    case LLM__J_LIST:
        if (a->u.list->n != b->u.list->n || a->is_tuple != b->is_tuple) return false;
        for (size_t i = 0; i < a->u.list->n; i++)
            if (!llm__jinja_equal(r, &a->u.list->items[i], &b->u.list->items[i], depth + 1)) return false;
        return true;
    case LLM__J_DICT:
        if (a->u.dict->n != b->u.dict->n) return false;
        for (size_t i = 0; i < a->u.dict->n; i += 2) {
            bool found = false;
            for (size_t j = 0; j < b->u.dict->n && !found; j += 2)
                found = llm__jinja_equal(r, &a->u.dict->items[i], &b->u.dict->items[j], depth + 1) &&
                        llm__jinja_equal(r, &a->u.dict->items[i + 1], &b->u.dict->items[j + 1], depth + 1);
            if (!found) return false;
        }
        return true;
    case LLM__J_MACRO: return a->u.macro == b->u.macro;
    default: return a->u.i == b->u.i;
    }
}

/* Finds a key in a dictionary. Returns the address of its value, or NULL. */
static llm__jinja_value *llm__jinja_lookup(llm__jinja_run *r, const llm__jinja_dict *d, const llm__jinja_value *key) {
    for (size_t i = 0; i < d->n; i += 2)
        if (llm__jinja_equal(r, &d->items[i], key, 0)) return &d->items[i + 1];
    return NULL;
}

static void llm__jinja_store(llm__jinja_run *r, llm__jinja_dict *d, llm__jinja_value key, llm__jinja_value v) {
    llm__jinja_value *at = llm__jinja_lookup(r, d, &key);
    if (at) {
        *at = v;
        return;
    }
    d->items = llm__jinja_grow(r, d->items, d->n, &d->room);
    d->items[d->n] = key;
    d->items[d->n + 1] = v;
    d->n += 2;
}

static void llm__jinja_assign(llm__jinja_run *r, llm__str name, llm__jinja_value v) {
    llm__jinja_store(r, &r->scope->variables, llm__jinja_text(name.at, name.n), v);
}

static bool llm__jinja_truth(const llm__jinja_value *v) {
    switch (v->type) {
    case LLM__J_UNDEFINED:
    case LLM__J_NONE: return false;
    case LLM__J_BOOL:
    case LLM__J_INT: return v->u.i != 0;
    case LLM__J_FLOAT: return v->u.f != 0;
    case LLM__J_STR: return v->u.s.n != 0;
    case LLM__J_LIST: return v->u.list->n != 0;
    case LLM__J_DICT: return v->is_namespace || v->u.dict->n != 0;
    default: return true;
    }
}

static const char *llm__jinja_type_name(const llm__jinja_value *v) {
    static const char *const names[] = {"undefined", "none",         "a boolean", "an integer", "a float",   "a string",
                                        "a list",    "a dictionary", "a loop",    "a macro",    "a function"};
    return names[v->type];
}

LLM__NORETURN static void llm__jinja_type_error(llm__jinja_run *r, const char *what, const llm__jinja_value *v) {
    if (v->type == LLM__J_UNDEFINED) llm__jinja_error(r, "'%.*s' is undefined", LLM__SHOW(v->u.name));
    llm__jinja_error(r, "%s does not accept %s", what, llm__jinja_type_name(v));
}

/* Returns -1, 0 or 1. Numbers can be compared with numbers, strings with strings, lists with lists. */
static int llm__jinja_order(llm__jinja_run *r, const llm__jinja_value *a, const llm__jinja_value *b, int depth) {
    llm__jinja_step(r, 1);
    if (depth > LLM__JINJA_DEPTH) llm__jinja_error(r, "a value is nested too deeply");
    if (llm__jinja_is_number(a) && llm__jinja_is_number(b)) {
        if (a->type != LLM__J_FLOAT && b->type != LLM__J_FLOAT) return (a->u.i > b->u.i) - (a->u.i < b->u.i);
        double x = llm__jinja_as_double(a), y = llm__jinja_as_double(b);
        return (x > y) - (x < y);
    }
    if (a->type == LLM__J_STR && b->type == LLM__J_STR) {
        int order = llm__str_compare(llm__jinja_str(a), llm__jinja_str(b));
        return (order > 0) - (order < 0);
    }
    if (a->type == LLM__J_LIST && b->type == LLM__J_LIST) {
        for (size_t i = 0; i < a->u.list->n && i < b->u.list->n; i++) {
            int order = llm__jinja_order(r, &a->u.list->items[i], &b->u.list->items[i], depth + 1);
            if (order) return order;
        }
        return (a->u.list->n > b->u.list->n) - (a->u.list->n < b->u.list->n);
    }
    llm__jinja_type_error(r, "a comparison", llm__jinja_is_number(a) || a->type == LLM__J_STR ? b : a);
}

/* ---- Strings, as Python has them ---- */

static size_t llm__jinja_length(const llm__jinja_value *s) {
    size_t n = 0;
    for (size_t i = 0; i < s->u.s.n; i++) n += ((uint8_t)s->u.s.at[i] & 0xC0) != 0x80;
    return n;
}

/* The byte at which a character begins, by its index. */
static size_t llm__jinja_byte_of(const llm__jinja_value *s, size_t index) {
    size_t at = 0;
    for (; at < s->u.s.n; at++)
        if (((uint8_t)s->u.s.at[at] & 0xC0) != 0x80 && !index--) break;
    return at;
}

/* Finds `what` in s, from byte `from` on. Returns its first byte, or SIZE_MAX. */
static size_t llm__jinja_search(llm__jinja_run *r, const llm__jinja_value *s, const llm__jinja_value *what,
                                size_t from) {
    size_t n = what->u.s.n;
    for (size_t i = from; i + n <= s->u.s.n; i++) {
        if (n && s->u.s.at[i] != what->u.s.at[0]) continue;
        if (i % 64 == 0) llm__jinja_step(r, 1);
        if (!n || !memcmp(s->u.s.at + i, what->u.s.at, n)) return i;
    }
    llm__jinja_step(r, s->u.s.n / 64);
    return SIZE_MAX;
}

static bool llm__jinja_in_set(const uint8_t *p, const uint8_t *end, const llm__jinja_value *set) {
    size_t n = (size_t)(end - p);
    for (size_t i = 0; i + n <= set->u.s.n; i++)
        if (((uint8_t)set->u.s.at[i] & 0xC0) != 0x80 && !memcmp(set->u.s.at + i, p, n)) return true;
    return false;
}

/* strip(), lstrip() and rstrip(): removes white space, or the characters of `set`. */
static llm__jinja_value llm__jinja_strip(llm__jinja_run *r, const llm__jinja_value *s, const llm__jinja_value *set,
                                         bool left, bool right) {
    const uint8_t *begin = (const uint8_t *)s->u.s.at, *p = begin, *end = p + s->u.s.n, *next;
    while (left && p < end) {
        bool space = (llm__unicode_class_at(r->classes, p, &next) & LLM__SPACE) || (*p >= 0x1C && *p <= 0x1F);
        if (set ? !llm__jinja_in_set(p, next, set) : !space) break;
        p = next;
    }
    while (right && end > p) {
        const uint8_t *last = llm__utf8_before(end);
        bool space = (llm__unicode_class_at(r->classes, last, &next) & LLM__SPACE) || (*last >= 0x1C && *last <= 0x1F);
        if (set ? !llm__jinja_in_set(last, end, set) : !space) break;
        end = last;
    }
    llm__jinja_step(r, s->u.s.n / 64);
    return llm__jinja_part(s, (size_t)(p - begin), (size_t)(end - begin));
}

/* Returns a code point in the other case, or the same one if it has no other. Returns UINT32_MAX for letters beyond
   Latin, Greek and Cyrillic, and for those whose other case is not one letter or depends on the word: we refuse to
   guess. */
static uint32_t llm__jinja_recase(uint32_t code, unsigned is, bool upper) {
    static const struct {
        uint32_t first, last; /* upper case */
        uint32_t step;        /* to lower case; 1: pairs of upper and lower case */
    } rows[] = {{'A', 'Z', 32},     {0xC0, 0xD6, 32},   {0xD8, 0xDE, 32},  {0x100, 0x12E, 1},  {0x132, 0x136, 1},
                {0x139, 0x147, 1},  {0x14A, 0x176, 1},  {0x179, 0x17D, 1}, {0x391, 0x3A1, 32}, {0x3A4, 0x3AB, 32},
                {0x400, 0x40F, 80}, {0x410, 0x42F, 32}, {0x460, 0x480, 1}, {0x48A, 0x4BE, 1},  {0x4D0, 0x52E, 1}};
    if (!(is & (upper ? LLM__LOWER : LLM__UPPER))) return code;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        uint32_t step = rows[i].step, first = rows[i].first, from = upper ? code - step : code;
        if (from < first || from > rows[i].last || (step == 1 && (from - first) % 2)) continue;
        return upper ? from : from + step;
    }
    return UINT32_MAX;
}

/* how: 'u'pper, 'l'ower, 'c'apitalize, 't'itle as the method, 'T'itle as the filter. */
static llm__jinja_value llm__jinja_case(llm__jinja_run *r, const llm__jinja_value *s, char how) {
    llm__jinja_buffer b = {NULL, NULL, 0, 0};
    const uint8_t *begin = (const uint8_t *)s->u.s.at, *end = begin + s->u.s.n, *next;
    bool starts = true;
    for (const uint8_t *p = begin; p < end; p = next) {
        unsigned is = llm__unicode_class_at(r->classes, p, &next);
        uint8_t bytes[4], host[4];
        uint32_t code = llm__jinja_recase(llm__utf8_decode(p, &next), is, how == 'u' || (how != 'l' && starts));
        if (code == UINT32_MAX)
            llm__jinja_error(r, "the other case of a letter in \"%.*s\" is not supported",
                             LLM__SHOW(llm__jinja_str(s)));
        memset(host, s->u.s.host ? s->u.s.host[p - begin] : 0, sizeof host);
        llm__jinja_put(r, &b, (const char *)bytes, llm__utf8_encode(code, bytes), host);
        if (how == 'c') starts = false;
        else if (how == 't') starts = !(is & LLM__LETTER);
        else if (how == 'T') starts = (is & LLM__SPACE) || (*p && *p < 0x80 && strchr("-({[<", (char)*p));
    }
    return llm__jinja_finish(&b);
}

static llm__jinja_value llm__jinja_replace(llm__jinja_run *r, const llm__jinja_value *s, const llm__jinja_value *from,
                                           const llm__jinja_value *to, int64_t most) {
    llm__jinja_buffer b = {NULL, NULL, 0, 0};
    size_t at = 0;
    if (!from->u.s.n) llm__jinja_error(r, "replacing the empty string is not supported");
    for (; most != 0; most--) {
        size_t found = llm__jinja_search(r, s, from, at);
        if (found == SIZE_MAX) break;
        llm__jinja_put_part(r, &b, s, at, found);
        llm__jinja_put_part(r, &b, to, 0, to->u.s.n);
        at = found + from->u.s.n;
    }
    llm__jinja_put_part(r, &b, s, at, s->u.s.n);
    return llm__jinja_finish(&b);
}

/* split() at white space, split(separator, most) and rsplit(separator, most); `most` is the max number of cuts. */
static llm__jinja_value llm__jinja_split(llm__jinja_run *r, const llm__jinja_value *s,
                                         const llm__jinja_value *separator, int64_t most, bool from_right) {
    llm__jinja_value list = llm__jinja_new_list(r);
    size_t at = 0, end = s->u.s.n;
    if (!separator) {
        if (most >= 0) llm__jinja_error(r, "split at white space with a maximum is not supported");
        const uint8_t *base = (const uint8_t *)s->u.s.at, *p = base, *last = base + end;
        while (p < last) {
            p = llm__unicode_skip(r->classes, p, last, LLM__SPACE, true);
            const uint8_t *word = p;
            p = llm__unicode_skip(r->classes, p, last, LLM__SPACE, false);
            if (p > word) llm__jinja_add(r, list.u.list, llm__jinja_part(s, (size_t)(word - base), (size_t)(p - base)));
        }
        return list;
    }
    if (!separator->u.s.n) llm__jinja_error(r, "split with an empty separator");
    if (from_right && most >= 0) { /* cuts only at the last `most` separators, and skips those before them */
        size_t total = 0, found, skip = 0;
        for (size_t i = 0; (found = llm__jinja_search(r, s, separator, i)) != SIZE_MAX; i = found + separator->u.s.n)
            total++;
        if (total > (uint64_t)most) skip = total - (size_t)most;
        for (size_t i = 0, k = 0; k <= skip && skip; k++) {
            found = llm__jinja_search(r, s, separator, i);
            if (k == skip || found == SIZE_MAX) break;
            i = found + separator->u.s.n;
            at = i;
        }
        if (skip) { /* the first part ends at the first separator that is not skipped */
            found = llm__jinja_search(r, s, separator, at);
            size_t stop = found == SIZE_MAX ? end : found;
            llm__jinja_add(r, list.u.list, llm__jinja_part(s, 0, stop));
            if (found == SIZE_MAX) return list;
            at = stop + separator->u.s.n;
        }
        most = -1;
    }
    for (size_t found; most != 0 && (found = llm__jinja_search(r, s, separator, at)) != SIZE_MAX; most--) {
        llm__jinja_add(r, list.u.list, llm__jinja_part(s, at, found));
        at = found + separator->u.s.n;
    }
    llm__jinja_add(r, list.u.list, llm__jinja_part(s, at, end));
    return list;
}

/* ---- Values as text ---- */

/* A float as Python writes it: the fewest digits that read back as the same number. */
static void llm__jinja_put_float(llm__jinja_run *r, llm__jinja_buffer *b, double f, bool json) {
    char text[40];
    int precision = 1, exponent;
    if (f != f || f - f != 0) {
        llm__jinja_put_text(r, b,
                            f != f  ? (json ? "NaN" : "nan")
                            : f > 0 ? (json ? "Infinity" : "inf")
                            : json  ? "-Infinity"
                                    : "-inf");
        return;
    }
    do snprintf(text, sizeof text, "%.*e", precision - 1, f);
    while (strtod(text, NULL) != f && ++precision < 18);
    const char *e = strchr(text, 'e');
    exponent = atoi(e + 1);
    char digits[24];
    int n = 0;
    for (const char *p = text; p < e; p++)
        if (llm__jinja_is_digit(*p)) digits[n++] = *p;
    digits[n] = 0;
    if (f < 0 || (f == 0 && *text == '-')) llm__jinja_put_text(r, b, "-");
    if (exponent < -4 || exponent >= 16) {
        llm__jinja_put(r, b, digits, 1, NULL);
        if (n > 1) {
            llm__jinja_put_text(r, b, ".");
            llm__jinja_put_text(r, b, digits + 1);
        }
        snprintf(text, sizeof text, "e%c%02d", exponent < 0 ? '-' : '+', exponent < 0 ? -exponent : exponent);
        llm__jinja_put_text(r, b, text);
        return;
    }
    if (exponent < 0) llm__jinja_put_text(r, b, "0.");
    for (int i = -1; i > exponent; i--) llm__jinja_put_text(r, b, "0");
    for (int i = 0; i < n || i <= exponent + 1; i++) {
        if (i == exponent + 1 && exponent >= 0) llm__jinja_put_text(r, b, ".");
        if (i < n) llm__jinja_put(r, b, digits + i, 1, NULL);
        else if (i <= exponent || (i == exponent + 1 && exponent >= 0)) llm__jinja_put_text(r, b, "0");
    }
}

static void llm__jinja_put_int(llm__jinja_run *r, llm__jinja_buffer *b, int64_t i) {
    char text[24];
    snprintf(text, sizeof text, "%lld", (long long)i);
    llm__jinja_put_text(r, b, text);
}

/* Python's repr of a string. */
static void llm__jinja_put_repr(llm__jinja_run *r, llm__jinja_buffer *b, const llm__jinja_value *s) {
    bool single = memchr(s->u.s.at, '\'', s->u.s.n) && !memchr(s->u.s.at, '"', s->u.s.n);
    const char *quote = single ? "\"" : "'";
    llm__jinja_put_text(r, b, quote);
    for (size_t i = 0; i < s->u.s.n; i++) {
        char c = s->u.s.at[i], text[8];
        if (c == '\\' || c == *quote) snprintf(text, sizeof text, "\\%c", c);
        else if (c == '\n') snprintf(text, sizeof text, "\\n");
        else if (c == '\r') snprintf(text, sizeof text, "\\r");
        else if (c == '\t') snprintf(text, sizeof text, "\\t");
        else if ((uint8_t)c < 0x20 || c == 0x7F) snprintf(text, sizeof text, "\\x%02x", (unsigned)c);
        else {
            llm__jinja_put_part(r, b, s, i, i + 1);
            continue;
        }
        llm__jinja_put_text(r, b, text);
    }
    llm__jinja_put_text(r, b, quote);
}

/* str() of a value, or inside of a list or dictionary its repr(). */
static void llm__jinja_put_value(llm__jinja_run *r, llm__jinja_buffer *b, const llm__jinja_value *v, int depth) {
    llm__jinja_step(r, 1);
    if (depth > LLM__JINJA_DEPTH) llm__jinja_error(r, "a value is nested too deeply");
    switch (v->type) {
    case LLM__J_UNDEFINED:
        if (depth) llm__jinja_put_text(r, b, "Undefined");
        return;
    case LLM__J_NONE: llm__jinja_put_text(r, b, "None"); return;
    case LLM__J_BOOL: llm__jinja_put_text(r, b, v->u.i ? "True" : "False"); return;
    case LLM__J_INT: llm__jinja_put_int(r, b, v->u.i); return;
    case LLM__J_FLOAT: llm__jinja_put_float(r, b, v->u.f, false); return;
    case LLM__J_STR:
        if (depth) llm__jinja_put_repr(r, b, v);
        else llm__jinja_put_part(r, b, v, 0, v->u.s.n);
        return;
    case LLM__J_LIST:
        if (v->is_lazy) break;
        llm__jinja_put_text(r, b, v->is_tuple ? "(" : "[");
        for (size_t i = 0; i < v->u.list->n; i++) {
            if (i) llm__jinja_put_text(r, b, ", ");
            llm__jinja_put_value(r, b, &v->u.list->items[i], depth + 1);
        }
        llm__jinja_put_text(r, b, !v->is_tuple ? "]" : v->u.list->n == 1 ? ",)" : ")");
        return;
    case LLM__J_DICT:
        if (v->is_namespace) break;
        llm__jinja_put_text(r, b, "{");
        for (size_t i = 0; i < v->u.dict->n; i += 2) {
            if (i) llm__jinja_put_text(r, b, ", ");
            llm__jinja_put_value(r, b, &v->u.dict->items[i], depth + 1);
            llm__jinja_put_text(r, b, ": ");
            llm__jinja_put_value(r, b, &v->u.dict->items[i + 1], depth + 1);
        }
        llm__jinja_put_text(r, b, "}");
        return;
    default: break;
    }
    llm__jinja_error(r, "%s cannot be shown", llm__jinja_type_name(v));
}

static llm__jinja_value llm__jinja_as_text(llm__jinja_run *r, const llm__jinja_value *v) {
    if (v->type == LLM__J_STR) return *v;
    llm__jinja_buffer b = {NULL, NULL, 0, 0};
    llm__jinja_put_value(r, &b, v, 0);
    return llm__jinja_finish(&b);
}

/* How json.dumps lays out its text. */
typedef struct llm__jinja_layout {
    llm__jinja_value comma, colon;
    int64_t indent; /* -1: one line */
    bool ascii, sorted;
} llm__jinja_layout;

static void llm__jinja_put_json_string(llm__jinja_run *r, llm__jinja_buffer *b, const llm__jinja_value *s, bool ascii) {
    static const char from[] = "\"\\\n\r\t\b\f", to[] = "\"\\nrtbf";
    const uint8_t *p = (const uint8_t *)s->u.s.at, *begin = p, *end = p + s->u.s.n, *next;
    llm__jinja_put_text(r, b, "\"");
    for (; p < end; p = next) {
        char text[16];
        uint32_t code = llm__utf8_decode(p, &next);
        const char *found = code && code < 0x80 ? strchr(from, (char)code) : NULL;
        if (found) snprintf(text, sizeof text, "\\%c", to[found - from]);
        else if (code < 0x20 || (ascii && code >= 0x7F && code != 0x7F && code < 0x10000))
            snprintf(text, sizeof text, "\\u%04x", (unsigned)code);
        else if (ascii && code >= 0x10000)
            snprintf(text, sizeof text, "\\u%04x\\u%04x", 0xD7C0u + (unsigned)(code >> 10),
                     0xDC00u + (unsigned)(code & 0x3FF));
        else {
            llm__jinja_put_part(r, b, s, (size_t)(p - begin), (size_t)(next - begin));
            continue;
        }
        llm__jinja_put_text(r, b, text);
    }
    llm__jinja_put_text(r, b, "\"");
}

static void llm__jinja_put_newline(llm__jinja_run *r, llm__jinja_buffer *b, const llm__jinja_layout *l, int depth) {
    if (l->indent < 0) return;
    llm__jinja_put_text(r, b, "\n");
    for (int64_t i = 0; i < l->indent * depth; i++) llm__jinja_put_text(r, b, " ");
}

/* The index of the key that is next in sorted order after the first `done`. Looks at all keys, as there are few. */
static void llm__jinja_sort_keys(llm__jinja_run *r, const llm__jinja_dict *d, size_t *order) {
    for (size_t i = 0; i < d->n / 2; i++) {
        size_t j = i;
        for (; j && llm__jinja_order(r, &d->items[2 * i], &d->items[2 * order[j - 1]], 0) < 0; j--)
            order[j] = order[j - 1];
        order[j] = i;
    }
}

static void llm__jinja_put_json(llm__jinja_run *r, llm__jinja_buffer *b, const llm__jinja_value *v,
                                const llm__jinja_layout *l, int depth) {
    llm__jinja_step(r, 1);
    if (depth > LLM__JINJA_DEPTH) llm__jinja_error(r, "a value is nested too deeply");
    size_t n = v->type == LLM__J_LIST ? v->u.list->n : v->type == LLM__J_DICT ? v->u.dict->n / 2 : 0;
    switch (v->type) {
    case LLM__J_NONE: llm__jinja_put_text(r, b, "null"); return;
    case LLM__J_BOOL: llm__jinja_put_text(r, b, v->u.i ? "true" : "false"); return;
    case LLM__J_INT: llm__jinja_put_int(r, b, v->u.i); return;
    case LLM__J_FLOAT: llm__jinja_put_float(r, b, v->u.f, true); return;
    case LLM__J_STR: llm__jinja_put_json_string(r, b, v, l->ascii); return;
    case LLM__J_LIST:
        if (v->is_lazy) llm__jinja_type_error(r, "tojson", v);
        llm__jinja_put_text(r, b, "[");
        for (size_t i = 0; i < n; i++) {
            if (i) llm__jinja_put_part(r, b, &l->comma, 0, l->comma.u.s.n);
            llm__jinja_put_newline(r, b, l, depth + 1);
            llm__jinja_put_json(r, b, &v->u.list->items[i], l, depth + 1);
        }
        if (n) llm__jinja_put_newline(r, b, l, depth);
        llm__jinja_put_text(r, b, "]");
        return;
    case LLM__J_DICT: {
        size_t *order = (size_t *)llm__jinja_alloc(r, n + 1, sizeof *order);
        for (size_t i = 0; i < n; i++) order[i] = i;
        if (l->sorted) llm__jinja_sort_keys(r, v->u.dict, order);
        llm__jinja_put_text(r, b, "{");
        for (size_t i = 0; i < n; i++) {
            const llm__jinja_value *item = &v->u.dict->items[2 * order[i]];
            if (i) llm__jinja_put_part(r, b, &l->comma, 0, l->comma.u.s.n);
            llm__jinja_put_newline(r, b, l, depth + 1);
            if (item->type == LLM__J_STR) {
                llm__jinja_put_json_string(r, b, item, l->ascii);
            } else {
                llm__jinja_put_text(r, b, "\"");
                llm__jinja_put_json(r, b, item, l, depth + 1);
                llm__jinja_put_text(r, b, "\"");
            }
            llm__jinja_put_part(r, b, &l->colon, 0, l->colon.u.s.n);
            llm__jinja_put_json(r, b, item + 1, l, depth + 1);
        }
        if (n) llm__jinja_put_newline(r, b, l, depth);
        llm__jinja_put_text(r, b, "}");
        return;
    }
    default: llm__jinja_type_error(r, "tojson", v);
    }
}

/* ---- Functions, methods, filters and tests ---- */

enum { LLM__JINJA_MAX_ARGS = 16 };

/* Evaluated arguments. The named ones come last. */
typedef struct llm__jinja_args {
    int n, n_positional;
    unsigned used; /* bit i: argument i has been used */
    llm__jinja_value values[LLM__JINJA_MAX_ARGS];
    llm__str names[LLM__JINJA_MAX_ARGS];
} llm__jinja_args;

/* Finds an argument by its place or its name. Returns NULL if it was not given. */
static const llm__jinja_value *llm__jinja_arg(llm__jinja_args *a, int place, const char *name) {
    if (place >= 0 && place < a->n_positional) {
        a->used |= 1u << place;
        return &a->values[place];
    }
    for (int i = a->n_positional; i < a->n && name; i++)
        if (llm__str_is(a->names[i], name)) {
            a->used |= 1u << i;
            return &a->values[i];
        }
    return NULL;
}

static const llm__jinja_value *llm__jinja_need_arg(llm__jinja_run *r, llm__jinja_args *a, int place, const char *name) {
    const llm__jinja_value *v = llm__jinja_arg(a, place, name);
    if (!v) llm__jinja_error(r, "the argument '%s' is missing", name);
    return v;
}

static bool llm__jinja_flag_arg(llm__jinja_args *a, int place, const char *name, bool missing) {
    const llm__jinja_value *v = llm__jinja_arg(a, place, name);
    return v ? llm__jinja_truth(v) : missing;
}

static int64_t llm__jinja_int_arg(llm__jinja_run *r, llm__jinja_args *a, int place, const char *name, int64_t missing) {
    const llm__jinja_value *v = llm__jinja_arg(a, place, name);
    if (!v || v->type == LLM__J_NONE) return missing;
    if (v->type != LLM__J_INT && v->type != LLM__J_BOOL) llm__jinja_type_error(r, "this argument", v);
    return v->u.i;
}

/* A string argument; NULL if it is missing or is `none`. */
static const llm__jinja_value *llm__jinja_str_arg(llm__jinja_run *r, llm__jinja_args *a, int place, const char *name) {
    const llm__jinja_value *v = llm__jinja_arg(a, place, name);
    if (!v || v->type == LLM__J_NONE) return NULL;
    if (v->type != LLM__J_STR) llm__jinja_type_error(r, "this argument", v);
    return v;
}

static void llm__jinja_args_done(llm__jinja_run *r, const llm__jinja_args *a) {
    for (int i = 0; i < a->n; i++)
        if (!(a->used >> i & 1)) {
            if (i < a->n_positional) llm__jinja_error(r, "too many arguments");
            llm__jinja_error(r, "the argument '%.*s' is not supported", LLM__SHOW(a->names[i]));
        }
}

/* What a loop iterates over: the items of a list, the keys of a dictionary, or the characters of a string. */
static llm__jinja_list *llm__jinja_iterate(llm__jinja_run *r, const llm__jinja_value *v) {
    if (v->type == LLM__J_LIST) return v->u.list;
    llm__jinja_list *list = llm__jinja_new_list(r).u.list;
    if (v->type == LLM__J_DICT && !v->is_namespace) {
        for (size_t i = 0; i < v->u.dict->n; i += 2) llm__jinja_add(r, list, v->u.dict->items[i]);
    } else if (v->type == LLM__J_STR) {
        const uint8_t *p = (const uint8_t *)v->u.s.at, *begin = p, *end = p + v->u.s.n, *next;
        for (; p < end; p = next) {
            llm__utf8_decode(p, &next);
            llm__jinja_add(r, list, llm__jinja_part(v, (size_t)(p - begin), (size_t)(next - begin)));
        }
    } else if (v->type != LLM__J_UNDEFINED) {
        llm__jinja_type_error(r, "a loop", v);
    }
    return list;
}

static llm__jinja_value llm__jinja_loop_attribute(const llm__jinja_loop *loop, llm__str name) {
    static const char *const names[] = {"index",     "index0", "first",  "last",     "length",   "revindex",
                                        "revindex0", "depth",  "depth0", "previtem", "nextitem", NULL};
    int64_t i = (int64_t)loop->index, n = (int64_t)loop->list->n;
    switch (llm__jinja_find(names, name)) {
    case 0: return llm__jinja_int(i + 1);
    case 1: return llm__jinja_int(i);
    case 2: return llm__jinja_bool(i == 0);
    case 3: return llm__jinja_bool(i == n - 1);
    case 4: return llm__jinja_int(n);
    case 5: return llm__jinja_int(n - i);
    case 6: return llm__jinja_int(n - i - 1);
    case 7: return llm__jinja_int(1); /* loops are not recursive */
    case 8: return llm__jinja_int(0);
    case 9: return i ? loop->list->items[i - 1] : llm__jinja_undefined(name);
    case 10: return i + 1 < n ? loop->list->items[i + 1] : llm__jinja_undefined(name);
    default: return llm__jinja_undefined(name);
    }
}

static llm__jinja_value llm__jinja_attribute(llm__jinja_run *r, const llm__jinja_value *v, llm__str name) {
    llm__jinja_value key = llm__jinja_text(name.at, name.n);
    if (v->type == LLM__J_UNDEFINED) llm__jinja_type_error(r, "an attribute", v);
    if (v->type == LLM__J_LOOP) return llm__jinja_loop_attribute(v->u.loop, name);
    llm__jinja_value *found = v->type == LLM__J_DICT ? llm__jinja_lookup(r, v->u.dict, &key) : NULL;
    return found ? *found : llm__jinja_undefined(name);
}

/* v[key]. */
static llm__jinja_value llm__jinja_item(llm__jinja_run *r, const llm__jinja_value *v, const llm__jinja_value *key) {
    static const llm__str nothing = {"an item", 7};
    if (v->type == LLM__J_UNDEFINED) llm__jinja_type_error(r, "a subscript", v);
    if (key->type == LLM__J_STR && v->type != LLM__J_DICT) return llm__jinja_attribute(r, v, llm__jinja_str(key));
    if (v->type == LLM__J_DICT) {
        llm__jinja_value *found = llm__jinja_lookup(r, v->u.dict, key);
        return found ? *found : llm__jinja_undefined(key->type == LLM__J_STR ? llm__jinja_str(key) : nothing);
    }
    if (key->type != LLM__J_INT && key->type != LLM__J_BOOL) return llm__jinja_undefined(nothing);
    if ((v->type != LLM__J_LIST || v->is_lazy) && v->type != LLM__J_STR) return llm__jinja_undefined(nothing);
    int64_t n = (int64_t)(v->type == LLM__J_LIST ? v->u.list->n : llm__jinja_length(v)),
            i = key->u.i < 0 ? key->u.i + n : key->u.i;
    if (i < 0 || i >= n) return llm__jinja_undefined(nothing);
    if (v->type == LLM__J_LIST) return v->u.list->items[i];
    return llm__jinja_part(v, llm__jinja_byte_of(v, (size_t)i), llm__jinja_byte_of(v, (size_t)i + 1));
}

/* A bound of a slice of n items, by Python's rules. */
static int64_t llm__jinja_bound(llm__jinja_run *r, const llm__jinja_value *v, int64_t n, int64_t step,
                                int64_t missing) {
    if (v->type == LLM__J_NONE) return missing;
    if (v->type != LLM__J_INT) llm__jinja_type_error(r, "a slice", v);
    int64_t i = v->u.i < 0 ? v->u.i + n : v->u.i, low = step < 0 ? -1 : 0, high = step < 0 ? n - 1 : n;
    return i < low ? low : i > high ? high : i;
}

static llm__jinja_value llm__jinja_slice(llm__jinja_run *r, const llm__jinja_value *v,
                                         const llm__jinja_value bounds[3]) {
    int64_t step = bounds[2].type == LLM__J_NONE ? 1 : bounds[2].u.i;
    if ((v->type != LLM__J_LIST || v->is_lazy) && v->type != LLM__J_STR) llm__jinja_type_error(r, "a slice", v);
    if (bounds[2].type != LLM__J_NONE && bounds[2].type != LLM__J_INT) llm__jinja_type_error(r, "a slice", &bounds[2]);
    if (step == 0 || step > INT32_MAX || step < -INT32_MAX) llm__jinja_error(r, "a slice's step is 0 or too large");
    int64_t n = (int64_t)(v->type == LLM__J_LIST ? v->u.list->n : llm__jinja_length(v));
    int64_t from = llm__jinja_bound(r, &bounds[0], n, step, step < 0 ? n - 1 : 0);
    int64_t to = llm__jinja_bound(r, &bounds[1], n, step, step < 0 ? -1 : n);
    if (v->type == LLM__J_STR && step == 1) {
        size_t begin = llm__jinja_byte_of(v, (size_t)from),
               end = llm__jinja_byte_of(v, (size_t)(to > from ? to : from));
        return llm__jinja_part(v, begin, end);
    }
    const llm__jinja_list *items = llm__jinja_iterate(r, v);
    llm__jinja_value list = llm__jinja_new_list(r);
    llm__jinja_buffer b = {NULL, NULL, 0, 0};
    list.is_tuple = v->is_tuple;
    for (int64_t i = from; step < 0 ? i > to : i < to; i += step) {
        if (v->type == LLM__J_LIST) llm__jinja_add(r, list.u.list, items->items[i]);
        else llm__jinja_put_part(r, &b, &items->items[i], 0, items->items[i].u.s.n);
    }
    return v->type == LLM__J_LIST ? list : llm__jinja_finish(&b);
}

static bool llm__jinja_contains(llm__jinja_run *r, const llm__jinja_value *v, const llm__jinja_value *item) {
    if (v->type == LLM__J_STR) {
        if (item->type != LLM__J_STR) llm__jinja_type_error(r, "'in' a string", item);
        return llm__jinja_search(r, v, item, 0) != SIZE_MAX;
    }
    const llm__jinja_list *list = llm__jinja_iterate(r, v);
    for (size_t i = 0; i < list->n; i++)
        if (llm__jinja_equal(r, &list->items[i], item, 0)) return true;
    return false;
}

static llm__jinja_value llm__jinja_pairs(llm__jinja_run *r, const llm__jinja_value *v) {
    llm__jinja_value list = llm__jinja_new_list(r);
    list.is_lazy = true;
    if (v->type == LLM__J_UNDEFINED) return list;
    if (v->type != LLM__J_DICT) llm__jinja_type_error(r, "items", v);
    for (size_t i = 0; i < v->u.dict->n; i += 2) {
        llm__jinja_value pair = llm__jinja_new_list(r);
        pair.is_tuple = true;
        llm__jinja_add(r, pair.u.list, v->u.dict->items[i]);
        llm__jinja_add(r, pair.u.list, v->u.dict->items[i + 1]);
        llm__jinja_add(r, list.u.list, pair);
    }
    return list;
}

static llm__jinja_value llm__jinja_join(llm__jinja_run *r, const llm__jinja_list *list,
                                        const llm__jinja_value *between) {
    llm__jinja_buffer b = {NULL, NULL, 0, 0};
    for (size_t i = 0; i < list->n; i++) {
        if (i && between) llm__jinja_put_part(r, &b, between, 0, between->u.s.n);
        llm__jinja_put_value(r, &b, &list->items[i], 0);
    }
    return llm__jinja_finish(&b);
}

static llm__jinja_value llm__jinja_range(llm__jinja_run *r, llm__jinja_args *a) {
    llm__jinja_value list = llm__jinja_new_list(r);
    int64_t first = llm__jinja_int_arg(r, a, 0, NULL, 0), end = llm__jinja_int_arg(r, a, 1, NULL, first),
            step = llm__jinja_int_arg(r, a, 2, NULL, 1);
    if (a->n_positional < 1) llm__jinja_error(r, "range needs a number");
    if (a->n_positional == 1) first = 0;
    if (step == 0) llm__jinja_error(r, "range with a step of 0");
    for (int64_t i = first; step > 0 ? i < end : i > end;) {
        if (list.u.list->n == LLM__JINJA_RANGE)
            llm__jinja_error(r, "range gives more than %d numbers", LLM__JINJA_RANGE);
        llm__jinja_add(r, list.u.list, llm__jinja_int(i));
        if (step > 0 ? end - i <= step : i - end <= -step) break;
        i += step;
    }
    return list;
}

#if !defined(_WIN32) && !defined(__cplusplus)
struct tm *localtime_r(const time_t *time, struct tm *date); /* hidden by -std=c99 if the host included time.h first */
#endif

static llm__jinja_value llm__jinja_strftime(llm__jinja_run *r, const llm__jinja_value *format) {
    char text[256], copy[128];
    time_t now = time(NULL);
    struct tm date;
#if defined(_WIN32)
    localtime_s(&date, &now);
#else
    localtime_r(&now, &date);
#endif
    if (format->type != LLM__J_STR || format->u.s.n >= sizeof copy)
        llm__jinja_error(r, "strftime_now needs a short format");
    memcpy(copy, format->u.s.at, format->u.s.n);
    copy[format->u.s.n] = 0;
    size_t n = strftime(text, sizeof text, copy, &date);
    llm__jinja_buffer b = {NULL, NULL, 0, 0};
    llm__jinja_put(r, &b, text, n, NULL);
    return llm__jinja_finish(&b);
}

static llm__jinja_value llm__jinja_call_function(llm__jinja_run *r, int number, llm__jinja_args *a) {
    switch (number) {
    case LLM__JG_raise_exception: {
        const llm__jinja_value *v = llm__jinja_need_arg(r, a, 0, "message");
        llm__jinja_value text = llm__jinja_as_text(r, v);
        llm__fail(r->env, LLM_ERROR_ARGUMENT, "the chat template refuses these messages: %.*s",
                  (int)(text.u.s.n < 300 ? text.u.s.n : 300), text.u.s.at);
    }
    case LLM__JG_strftime_now: return llm__jinja_strftime(r, llm__jinja_need_arg(r, a, 0, "format"));
    case LLM__JG_range: return llm__jinja_range(r, a);
    default: { /* namespace and dict */
        llm__jinja_value d = llm__jinja_new_dict(r);
        const llm__jinja_value *from = llm__jinja_arg(a, 0, NULL);
        d.is_namespace = number == LLM__JG_namespace;
        if (from && from->type != LLM__J_DICT) llm__jinja_type_error(r, "dict", from);
        for (size_t i = 0; from && i < from->u.dict->n; i += 2)
            llm__jinja_store(r, d.u.dict, from->u.dict->items[i], from->u.dict->items[i + 1]);
        for (int i = a->n_positional; i < a->n; i++) {
            a->used |= 1u << i;
            llm__jinja_store(r, d.u.dict, llm__jinja_text(a->names[i].at, a->names[i].n), a->values[i]);
        }
        return d;
    }
    }
}

/* "{} {0} {name}".format(...), without format specifications. */
static llm__jinja_value llm__jinja_format(llm__jinja_run *r, const llm__jinja_value *s, llm__jinja_args *a) {
    llm__jinja_buffer b = {NULL, NULL, 0, 0};
    int next = 0, n_numbered = 0;
    for (size_t i = 0, end; i < s->u.s.n; i = end) {
        char c = s->u.s.at[i];
        end = i + 1;
        if ((c == '{' || c == '}') && end < s->u.s.n && s->u.s.at[end] == c) {
            end++;
        } else if (c == '{') {
            while (end < s->u.s.n && llm__jinja_is_word(s->u.s.at[end])) end++;
            if (end == s->u.s.n || s->u.s.at[end] != '}') llm__jinja_error(r, "format takes {}, {0} and {name} only");
            llm__str name = {s->u.s.at + i + 1, end - i - 1};
            const llm__jinja_value *v = NULL;
            if (!name.n) v = llm__jinja_arg(a, next++, NULL);
            else if (name.n == 1 && llm__jinja_is_digit(*name.at)) v = llm__jinja_arg(a, *name.at - '0', NULL);
            for (int k = a->n_positional; k < a->n && !v; k++)
                if (llm__str_equal(a->names[k], name)) v = &a->values[k];
            n_numbered += name.n == 1 && llm__jinja_is_digit(*name.at);
            if (next && n_numbered) llm__jinja_error(r, "format cannot mix {} and {0}");
            if (!v) llm__jinja_error(r, "format has no argument for {%.*s}", LLM__SHOW(name));
            llm__jinja_put_value(r, &b, v, 0);
            end++;
            continue;
        } else if (c == '}') {
            llm__jinja_error(r, "format takes {}, {0} and {name} only");
        }
        llm__jinja_put_part(r, &b, s, i, i + 1);
    }
    a->used = ~0u;
    return llm__jinja_finish(&b);
}

static llm__jinja_value llm__jinja_string_method(llm__jinja_run *r, int number, const llm__jinja_value *s,
                                                 llm__jinja_args *a) {
    const llm__jinja_value *x = NULL;
    switch (number) {
    case LLM__JM_strip: return llm__jinja_strip(r, s, llm__jinja_str_arg(r, a, 0, NULL), true, true);
    case LLM__JM_lstrip: return llm__jinja_strip(r, s, llm__jinja_str_arg(r, a, 0, NULL), true, false);
    case LLM__JM_rstrip: return llm__jinja_strip(r, s, llm__jinja_str_arg(r, a, 0, NULL), false, true);
    case LLM__JM_split:
    case LLM__JM_rsplit: {
        const llm__jinja_value *separator = llm__jinja_str_arg(r, a, 0, "sep");
        return llm__jinja_split(r, s, separator, llm__jinja_int_arg(r, a, 1, "maxsplit", -1), number == LLM__JM_rsplit);
    }
    case LLM__JM_startswith:
    case LLM__JM_endswith: {
        x = llm__jinja_need_arg(r, a, 0, "prefix");
        const llm__jinja_value *items = x;
        size_t n = 1;
        if (x->type == LLM__J_LIST && x->is_tuple) {
            items = x->u.list->items;
            n = x->u.list->n;
        }
        for (size_t i = 0; i < n; i++) {
            if (items[i].type != LLM__J_STR) llm__jinja_type_error(r, "startswith or endswith", &items[i]);
            size_t m = items[i].u.s.n;
            if (m <= s->u.s.n &&
                !memcmp(s->u.s.at + (number == LLM__JM_startswith ? 0 : s->u.s.n - m), items[i].u.s.at, m))
                return llm__jinja_bool(true);
        }
        return llm__jinja_bool(false);
    }
    case LLM__JM_replace: {
        x = llm__jinja_str_arg(r, a, 0, "old");
        const llm__jinja_value *to = llm__jinja_str_arg(r, a, 1, "new");
        if (!x || !to) llm__jinja_error(r, "replace needs two strings");
        return llm__jinja_replace(r, s, x, to, llm__jinja_int_arg(r, a, 2, "count", -1));
    }
    case LLM__JM_format: return llm__jinja_format(r, s, a);
    case LLM__JM_upper: return llm__jinja_case(r, s, 'u');
    case LLM__JM_lower: return llm__jinja_case(r, s, 'l');
    case LLM__JM_title: return llm__jinja_case(r, s, 't');
    case LLM__JM_capitalize: return llm__jinja_case(r, s, 'c');
    case LLM__JM_find:
    case LLM__JM_rfind:
    case LLM__JM_count: {
        x = llm__jinja_str_arg(r, a, 0, "sub");
        if (!x || !x->u.s.n) llm__jinja_error(r, "find and count need a non-empty string");
        int64_t count = 0, place = -1;
        for (size_t at = 0, found; (found = llm__jinja_search(r, s, x, at)) != SIZE_MAX;
             at = number == LLM__JM_count ? found + x->u.s.n : found + 1) {
            llm__jinja_value before = llm__jinja_part(s, 0, found);
            count++;
            place = (int64_t)llm__jinja_length(&before);
            if (number == LLM__JM_find) break;
        }
        return llm__jinja_int(number == LLM__JM_count ? count : place);
    }
    case LLM__JM_join: {
        const llm__jinja_list *list = llm__jinja_iterate(r, llm__jinja_need_arg(r, a, 0, "iterable"));
        for (size_t i = 0; i < list->n; i++)
            if (list->items[i].type != LLM__J_STR) llm__jinja_type_error(r, "join", &list->items[i]);
        return llm__jinja_join(r, list, s);
    }
    case LLM__JM_splitlines: {
        llm__jinja_value list = llm__jinja_new_list(r);
        bool keep = llm__jinja_flag_arg(a, 0, "keepends", false);
        for (size_t at = 0; at < s->u.s.n;) {
            size_t end = at;
            while (end < s->u.s.n && s->u.s.at[end] != '\n' && s->u.s.at[end] != '\r') end++;
            size_t next =
                end + (end < s->u.s.n) + (end + 1 < s->u.s.n && s->u.s.at[end] == '\r' && s->u.s.at[end + 1] == '\n');
            llm__jinja_add(r, list.u.list, llm__jinja_part(s, at, keep ? next : end));
            at = next;
        }
        return list;
    }
    case LLM__JM_removeprefix:
    case LLM__JM_removesuffix: {
        x = llm__jinja_str_arg(r, a, 0, NULL);
        if (!x) llm__jinja_error(r, "removeprefix and removesuffix need a string");
        bool prefix = number == LLM__JM_removeprefix;
        size_t m = x->u.s.n, n = s->u.s.n;
        if (m > n || memcmp(s->u.s.at + (prefix ? 0 : n - m), x->u.s.at, m)) return *s;
        return llm__jinja_part(s, prefix ? m : 0, prefix ? n : n - m);
    }
    case LLM__JM_isdigit:
    case LLM__JM_isspace:
        for (size_t i = 0; i < s->u.s.n; i++) {
            char c = s->u.s.at[i];
            if ((uint8_t)c >= 0x80) llm__jinja_error(r, "isdigit and isspace are supported for ASCII only");
            if (number == LLM__JM_isdigit ? !llm__jinja_is_digit(c) : !llm__jinja_is_space(c))
                return llm__jinja_bool(false);
        }
        return llm__jinja_bool(s->u.s.n != 0);
    default: llm__jinja_type_error(r, "this method", s);
    }
}

static llm__jinja_value llm__jinja_call_method(llm__jinja_run *r, int number, const llm__jinja_value *v,
                                               llm__jinja_args *a) {
    llm__jinja_value list;
    if (v->type == LLM__J_STR) return llm__jinja_string_method(r, number, v, a);
    if (v->type == LLM__J_DICT && number == LLM__JM_items) return llm__jinja_pairs(r, v);
    if (v->type == LLM__J_DICT && (number == LLM__JM_keys || number == LLM__JM_values)) {
        list = llm__jinja_new_list(r);
        list.is_lazy = true;
        for (size_t i = number == LLM__JM_values; i < v->u.dict->n; i += 2)
            llm__jinja_add(r, list.u.list, v->u.dict->items[i]);
        return list;
    }
    if (v->type == LLM__J_DICT && number == LLM__JM_get) {
        const llm__jinja_value *key = llm__jinja_need_arg(r, a, 0, "key"), *missing = llm__jinja_arg(a, 1, "default");
        llm__jinja_value *found = llm__jinja_lookup(r, v->u.dict, key);
        return found ? *found : missing ? *missing : llm__jinja_make(LLM__J_NONE);
    }
    if (v->type == LLM__J_LIST && (number == LLM__JM_index || number == LLM__JM_count)) {
        const llm__jinja_value *item = llm__jinja_need_arg(r, a, 0, "value");
        int64_t count = 0;
        for (size_t i = 0; i < v->u.list->n; i++) {
            if (!llm__jinja_equal(r, &v->u.list->items[i], item, 0)) continue;
            if (number == LLM__JM_index) return llm__jinja_int((int64_t)i);
            count++;
        }
        if (number == LLM__JM_index) llm__jinja_error(r, "the value is not in the list");
        return llm__jinja_int(count);
    }
    if (v->type == LLM__J_LOOP && number == LLM__JM_cycle && a->n_positional) {
        a->used = ~0u;
        return a->values[v->u.loop->index % (size_t)a->n_positional];
    }
    llm__jinja_type_error(r, "this method", v);
}

/* Looks up an attribute by a path such as "function.name", for map, sort and selectattr. */
static llm__jinja_value llm__jinja_path(llm__jinja_run *r, const llm__jinja_value *v, const llm__jinja_value *path) {
    llm__jinja_value at = *v;
    if (path->type == LLM__J_INT) return llm__jinja_item(r, v, path);
    if (path->type != LLM__J_STR) llm__jinja_type_error(r, "an attribute's name", path);
    for (size_t from = 0; from <= path->u.s.n;) {
        size_t to = from;
        while (to < path->u.s.n && path->u.s.at[to] != '.') to++;
        llm__jinja_value key = llm__jinja_part(path, from, to);
        if (key.u.s.n && llm__jinja_is_digit(*key.u.s.at)) key = llm__jinja_int(*key.u.s.at - '0');
        at = llm__jinja_item(r, &at, &key);
        from = to + 1;
    }
    return at;
}

static bool llm__jinja_run_test(llm__jinja_run *r, int number, const llm__jinja_value *v, llm__jinja_args *a) {
    const llm__jinja_value *x = llm__jinja_arg(a, 0, NULL);
    bool needs = (number >= LLM__JT_equalto && number <= LLM__JT_in) || number == LLM__JT_divisibleby ||
                 number == LLM__JT_sameas;
    if (needs && !x) llm__jinja_error(r, "this test needs an argument");
    switch (number) {
    case LLM__JT_defined: return v->type != LLM__J_UNDEFINED;
    case LLM__JT_undefined: return v->type == LLM__J_UNDEFINED;
    case LLM__JT_none: return v->type == LLM__J_NONE;
    case LLM__JT_string: return v->type == LLM__J_STR;
    case LLM__JT_mapping: return v->type == LLM__J_DICT && !v->is_namespace;
    case LLM__JT_sequence:
        return v->type == LLM__J_LIST || v->type == LLM__J_STR || (v->type == LLM__J_DICT && !v->is_namespace) ||
               v->type == LLM__J_UNDEFINED;
    case LLM__JT_iterable:
        return v->type == LLM__J_LIST || v->type == LLM__J_STR || (v->type == LLM__J_DICT && !v->is_namespace) ||
               v->type == LLM__J_UNDEFINED || v->type == LLM__J_LOOP;
    case LLM__JT_number: return llm__jinja_is_number(v);
    case LLM__JT_integer: return v->type == LLM__J_INT;
    case LLM__JT_float: return v->type == LLM__J_FLOAT;
    case LLM__JT_boolean: return v->type == LLM__J_BOOL;
    case LLM__JT_true: return v->type == LLM__J_BOOL && v->u.i;
    case LLM__JT_false: return v->type == LLM__J_BOOL && !v->u.i;
    case LLM__JT_equalto:
    case LLM__JT_eq: return llm__jinja_equal(r, v, x, 0);
    case LLM__JT_ne: return !llm__jinja_equal(r, v, x, 0);
    case LLM__JT_gt:
    case LLM__JT_greaterthan: return llm__jinja_order(r, v, x, 0) > 0;
    case LLM__JT_ge: return llm__jinja_order(r, v, x, 0) >= 0;
    case LLM__JT_lt:
    case LLM__JT_lessthan: return llm__jinja_order(r, v, x, 0) < 0;
    case LLM__JT_le: return llm__jinja_order(r, v, x, 0) <= 0;
    case LLM__JT_in: return llm__jinja_contains(r, x, v);
    case LLM__JT_even:
    case LLM__JT_odd:
        if (v->type != LLM__J_INT) llm__jinja_type_error(r, "even or odd", v);
        return (v->u.i % 2 != 0) == (number == LLM__JT_odd);
    case LLM__JT_divisibleby:
        if (v->type != LLM__J_INT || x->type != LLM__J_INT || !x->u.i)
            llm__jinja_error(r, "divisibleby needs two integers");
        return x->u.i == -1 || v->u.i % x->u.i == 0;
    case LLM__JT_callable: return v->type == LLM__J_MACRO || v->type == LLM__J_FUNCTION;
    case LLM__JT_sameas:
        if (v->type != x->type) return false;
        if (v->type == LLM__J_LIST || v->type == LLM__J_DICT) return (const void *)v->u.list == (const void *)x->u.list;
        return llm__jinja_equal(r, v, x, 0);
    default: { /* lower, upper: as str.islower and str.isupper */
        llm__jinja_value s = llm__jinja_as_text(r, v),
                         other = llm__jinja_case(r, &s, number == LLM__JT_lower ? 'u' : 'l');
        llm__jinja_value same = llm__jinja_case(r, &s, number == LLM__JT_lower ? 'l' : 'u');
        return llm__jinja_equal(r, &s, &same, 0) && !llm__jinja_equal(r, &s, &other, 0);
    }
    }
}

/* The arguments from place `first` on, as arguments of their own. */
static llm__jinja_args llm__jinja_args_from(llm__jinja_args *a, int first) {
    llm__jinja_args rest;
    memset(&rest, 0, sizeof rest);
    for (int i = first; i < a->n; i++) {
        rest.values[rest.n] = a->values[i];
        rest.names[rest.n] = a->names[i];
        rest.n++;
    }
    rest.n_positional = a->n_positional > first ? a->n_positional - first : 0;
    a->used = ~0u;
    return rest;
}

/* select, reject, selectattr, rejectattr. */
static llm__jinja_value llm__jinja_select(llm__jinja_run *r, int number, const llm__jinja_list *items,
                                          llm__jinja_args *a) {
    bool by_attribute = number == LLM__JF_selectattr || number == LLM__JF_rejectattr;
    bool keep = number == LLM__JF_select || number == LLM__JF_selectattr;
    llm__jinja_value list = llm__jinja_new_list(r), none = llm__jinja_make(LLM__J_NONE);
    list.is_lazy = true;
    const llm__jinja_value *attribute = by_attribute ? llm__jinja_need_arg(r, a, 0, "attribute") : &none;
    const llm__jinja_value *name = llm__jinja_str_arg(r, a, by_attribute, NULL);
    int test = name ? llm__jinja_find(llm__jinja_tests, llm__jinja_str(name)) : -1;
    if (name && test < 0 && llm__str_is(llm__jinja_str(name), "==")) test = LLM__JT_eq;
    if (name && test < 0 && llm__str_is(llm__jinja_str(name), "!=")) test = LLM__JT_ne;
    if (name && test < 0) llm__jinja_error(r, "the test %.*s is not supported", LLM__SHOW(llm__jinja_str(name)));
    llm__jinja_args rest = llm__jinja_args_from(a, by_attribute + 1);
    for (size_t i = 0; i < items->n; i++) {
        llm__jinja_value v = by_attribute ? llm__jinja_path(r, &items->items[i], attribute) : items->items[i];
        bool holds = name ? llm__jinja_run_test(r, test, &v, &rest) : llm__jinja_truth(&v);
        if (holds == keep) llm__jinja_add(r, list.u.list, items->items[i]);
    }
    return list;
}

static llm__jinja_value llm__jinja_fold(llm__jinja_run *r, const llm__jinja_value *v, bool case_sensitive) {
    return v->type == LLM__J_STR && !case_sensitive ? llm__jinja_case(r, v, 'l') : *v;
}

/* sort: stable insertion sort; ignores the case of strings unless case_sensitive. */
static llm__jinja_value llm__jinja_sort(llm__jinja_run *r, const llm__jinja_list *items, bool reverse,
                                        bool case_sensitive, const llm__jinja_value *attribute) {
    llm__jinja_value list = llm__jinja_new_list(r), keys = llm__jinja_new_list(r);
    for (size_t i = 0; i < items->n; i++) {
        llm__jinja_value key = attribute ? llm__jinja_path(r, &items->items[i], attribute) : items->items[i];
        llm__jinja_add(r, keys.u.list, llm__jinja_fold(r, &key, case_sensitive));
        llm__jinja_add(r, list.u.list, items->items[i]);
        llm__jinja_value *k = keys.u.list->items, *x = list.u.list->items;
        for (size_t j = i; j; j--) {
            int order = llm__jinja_order(r, &k[j], &k[j - 1], 0);
            if (reverse ? order <= 0 : order >= 0) break;
            llm__jinja_value t = k[j];
            k[j] = k[j - 1];
            k[j - 1] = t;
            t = x[j];
            x[j] = x[j - 1];
            x[j - 1] = t;
        }
    }
    return list;
}

static llm__jinja_value llm__jinja_to_number(llm__jinja_run *r, const llm__jinja_value *v, bool integer,
                                             const llm__jinja_value *missing) {
    double d = 0;
    if (v->type == LLM__J_STR) {
        llm__jinja_value s = llm__jinja_strip(r, v, NULL, true, true);
        const char *p = s.u.s.at, *end = p + s.u.s.n;
        bool minus = p < end && *p == '-';
        p += p < end && (*p == '-' || *p == '+');
        llm__json_reader reader = {r->env, p, p, end, NULL, 0};
        llm__json number;
        size_t digits = 0;
        while (p + digits < end && llm__jinja_is_digit(p[digits])) digits++;
        bool whole = digits && p + digits == end;
        if (whole && integer && digits <= 18) {
            int64_t i = 0;
            for (; p < end; p++) i = i * 10 + (*p - '0');
            return llm__jinja_int(minus ? -i : i);
        }
        bool plain = digits && (p[0] != '0' || digits == 1);
        for (size_t i = digits; plain && p + i < end; i++)
            plain = llm__jinja_is_digit(p[i]) || p[i] == '.' || (p[i] | 32) == 'e' ||
                    ((p[i] == '-' || p[i] == '+') && (p[i - 1] | 32) == 'e');
        if (plain &&
            (p[s.u.s.n - (size_t)(p - s.u.s.at) - 1] == '.' ||
             (p + digits < end && p[digits] == '.' && !(p + digits + 1 < end && llm__jinja_is_digit(p[digits + 1])))))
            plain = false;
        if (!plain) return missing ? *missing : integer ? llm__jinja_int(0) : llm__jinja_float(0);
        llm__json_number(&reader, &number);
        if (reader.at != end) return missing ? *missing : integer ? llm__jinja_int(0) : llm__jinja_float(0);
        d = minus ? -number.number : number.number;
    } else if (llm__jinja_is_number(v)) {
        if (integer && v->type != LLM__J_FLOAT) return llm__jinja_int(v->u.i);
        d = llm__jinja_as_double(v);
    } else if (v->type == LLM__J_UNDEFINED) {
        llm__jinja_type_error(r, "a number", v);
    } else {
        return missing ? *missing : integer ? llm__jinja_int(0) : llm__jinja_float(0);
    }
    if (!integer) return llm__jinja_float(d);
    if (!(d > -9e18 && d < 9e18)) llm__jinja_error(r, "%g does not fit an integer", d);
    return llm__jinja_int((int64_t)d);
}

static llm__jinja_value llm__jinja_tojson(llm__jinja_run *r, const llm__jinja_value *v, llm__jinja_args *a) {
    llm__jinja_layout l;
    llm__jinja_buffer b = {NULL, NULL, 0, 0};
    l.ascii = llm__jinja_flag_arg(a, 0, "ensure_ascii", false);
    l.indent = llm__jinja_int_arg(r, a, 1, "indent", -1);
    if (l.indent > 64) llm__jinja_error(r, "tojson with an indent above 64");
    l.comma = l.indent < 0 ? llm__jinja_text(", ", 2) : llm__jinja_text(",", 1);
    l.colon = llm__jinja_text(": ", 2);
    const llm__jinja_value *separators = llm__jinja_arg(a, 2, "separators");
    if (separators && separators->type != LLM__J_NONE) {
        if (separators->type != LLM__J_LIST || separators->u.list->n != 2 ||
            separators->u.list->items[0].type != LLM__J_STR || separators->u.list->items[1].type != LLM__J_STR)
            llm__jinja_error(r, "separators must be two strings");
        l.comma = separators->u.list->items[0];
        l.colon = separators->u.list->items[1];
    }
    l.sorted = llm__jinja_flag_arg(a, 3, "sort_keys", false);
    llm__jinja_put_json(r, &b, v, &l, 0);
    return llm__jinja_finish(&b);
}

static llm__jinja_value llm__jinja_indent(llm__jinja_run *r, const llm__jinja_value *s, llm__jinja_args *a) {
    llm__jinja_buffer b = {NULL, NULL, 0, 0};
    const llm__jinja_value *width = llm__jinja_arg(a, 0, "width");
    bool first = llm__jinja_flag_arg(a, 1, "first", false), blank = llm__jinja_flag_arg(a, 2, "blank", false);
    llm__jinja_value fill = llm__jinja_text("                                                                ", 4);
    if (width && width->type == LLM__J_STR) fill = *width;
    else if (width) {
        if (width->type != LLM__J_INT || width->u.i < 0 || width->u.i > 64)
            llm__jinja_error(r, "indent takes a width from 0 to 64");
        fill.u.s.n = (size_t)width->u.i;
    }
    for (size_t at = 0, line = 0; at <= s->u.s.n; line++) {
        size_t end = at;
        while (end < s->u.s.n && s->u.s.at[end] != '\n') end++;
        if (line ? end > at || blank : first) llm__jinja_put_part(r, &b, &fill, 0, fill.u.s.n);
        llm__jinja_put_part(r, &b, s, at, end < s->u.s.n ? end + 1 : end);
        at = end + 1;
    }
    return llm__jinja_finish(&b);
}

static llm__jinja_value llm__jinja_run_filter(llm__jinja_run *r, int number, const llm__jinja_value *v,
                                              llm__jinja_args *a);

static llm__jinja_value llm__jinja_map(llm__jinja_run *r, const llm__jinja_list *items, llm__jinja_args *a) {
    llm__jinja_value list = llm__jinja_new_list(r);
    list.is_lazy = true;
    const llm__jinja_value *attribute = llm__jinja_arg(a, -1, "attribute"), *missing = llm__jinja_arg(a, -1, "default");
    const llm__jinja_value *name = attribute ? NULL : llm__jinja_str_arg(r, a, 0, NULL);
    int filter = name ? llm__jinja_find(llm__jinja_filters, llm__jinja_str(name)) : -1;
    if (!attribute && filter < 0) llm__jinja_error(r, "map needs an attribute or a supported filter");
    for (size_t i = 0; i < items->n; i++) {
        llm__jinja_value v;
        if (attribute) {
            v = llm__jinja_path(r, &items->items[i], attribute);
            if (v.type == LLM__J_UNDEFINED && missing) v = *missing;
        } else {
            llm__jinja_args rest = llm__jinja_args_from(a, 1);
            v = llm__jinja_run_filter(r, filter, &items->items[i], &rest);
        }
        llm__jinja_add(r, list.u.list, v);
    }
    return list;
}

static llm__jinja_value llm__jinja_run_filter(llm__jinja_run *r, int number, const llm__jinja_value *v,
                                              llm__jinja_args *a) {
    static const llm__str nothing = {"an item", 7};
    llm__jinja_value s, list, empty = llm__jinja_undefined(nothing);
    const llm__jinja_value *x;
    bool flag;
    if (++r->depth > 2 * LLM__JINJA_DEPTH) llm__jinja_error(r, "more than %d levels of nesting", 2 * LLM__JINJA_DEPTH);
    switch (number) {
    case LLM__JF_trim:
        s = llm__jinja_as_text(r, v);
        s = llm__jinja_strip(r, &s, llm__jinja_str_arg(r, a, 0, "chars"), true, true);
        break;
    case LLM__JF_tojson: s = llm__jinja_tojson(r, v, a); break;
    case LLM__JF_length:
    case LLM__JF_count:
        if ((v->type != LLM__J_LIST || v->is_lazy) && v->type != LLM__J_DICT && v->type != LLM__J_STR &&
            v->type != LLM__J_UNDEFINED)
            llm__jinja_type_error(r, "length", v);
        s = llm__jinja_int((int64_t)(v->type == LLM__J_LIST   ? v->u.list->n
                                     : v->type == LLM__J_DICT ? v->u.dict->n / 2
                                     : v->type == LLM__J_STR  ? llm__jinja_length(v)
                                                              : 0));
        break;
    case LLM__JF_upper:
    case LLM__JF_lower:
    case LLM__JF_title:
    case LLM__JF_capitalize:
        s = llm__jinja_as_text(r, v);
        s = llm__jinja_case(r, &s,
                            number == LLM__JF_upper   ? 'u'
                            : number == LLM__JF_lower ? 'l'
                            : number == LLM__JF_title ? 'T'
                                                      : 'c');
        break;
    case LLM__JF_replace: {
        llm__jinja_value old = llm__jinja_as_text(r, llm__jinja_need_arg(r, a, 0, "old")),
                         with = llm__jinja_as_text(r, llm__jinja_need_arg(r, a, 1, "new"));
        s = llm__jinja_as_text(r, v);
        s = llm__jinja_replace(r, &s, &old, &with, llm__jinja_int_arg(r, a, 2, "count", -1));
        break;
    }
    case LLM__JF_join: {
        x = llm__jinja_arg(a, 0, "d");
        llm__jinja_value between = x ? llm__jinja_as_text(r, x) : llm__jinja_text("", 0);
        const llm__jinja_value *attribute = llm__jinja_arg(a, 1, "attribute");
        list = llm__jinja_new_list(r);
        const llm__jinja_list *items = llm__jinja_iterate(r, v);
        for (size_t i = 0; i < items->n; i++)
            llm__jinja_add(r, list.u.list,
                           attribute ? llm__jinja_path(r, &items->items[i], attribute) : items->items[i]);
        s = llm__jinja_join(r, list.u.list, &between);
        break;
    }
    case LLM__JF_first:
    case LLM__JF_last: {
        const llm__jinja_list *items = llm__jinja_iterate(r, v);
        s = items->n ? items->items[number == LLM__JF_first ? 0 : items->n - 1] : llm__jinja_undefined(nothing);
        break;
    }
    case LLM__JF_list: {
        const llm__jinja_list *items = llm__jinja_iterate(r, v);
        s = llm__jinja_new_list(r);
        for (size_t i = 0; i < items->n; i++) llm__jinja_add(r, s.u.list, items->items[i]);
        break;
    }
    case LLM__JF_map: s = llm__jinja_map(r, llm__jinja_iterate(r, llm__jinja_truth(v) ? v : &empty), a); break;
    case LLM__JF_select:
    case LLM__JF_reject:
    case LLM__JF_selectattr:
    case LLM__JF_rejectattr:
        s = llm__jinja_select(r, number, llm__jinja_iterate(r, llm__jinja_truth(v) ? v : &empty), a);
        break;
    case LLM__JF_default:
    case LLM__JF_d:
        x = llm__jinja_arg(a, 0, "default_value");
        flag = llm__jinja_flag_arg(a, 1, "boolean", false) && !llm__jinja_truth(v);
        s = v->type != LLM__J_UNDEFINED && !flag ? *v : x ? *x : llm__jinja_text("", 0);
        break;
    case LLM__JF_safe:
        s = llm__jinja_as_text(r, v);
        s.is_markup = true;
        break;
    case LLM__JF_string: s = llm__jinja_as_text(r, v); break;
    case LLM__JF_int:
    case LLM__JF_float: s = llm__jinja_to_number(r, v, number == LLM__JF_int, llm__jinja_arg(a, 0, "default")); break;
    case LLM__JF_items: s = llm__jinja_pairs(r, v); break;
    case LLM__JF_dictsort: {
        llm__jinja_value place = llm__jinja_int(0);
        bool sensitive = llm__jinja_flag_arg(a, 0, "case_sensitive", false);
        x = llm__jinja_str_arg(r, a, 1, "by");
        if (x && llm__str_is(llm__jinja_str(x), "value")) place.u.i = 1;
        list = llm__jinja_pairs(r, v);
        s = llm__jinja_sort(r, list.u.list, llm__jinja_flag_arg(a, 2, "reverse", false), sensitive, &place);
        break;
    }
    case LLM__JF_sort: {
        bool reverse = llm__jinja_flag_arg(a, 0, "reverse", false),
             sensitive = llm__jinja_flag_arg(a, 1, "case_sensitive", false);
        x = llm__jinja_arg(a, 2, "attribute");
        s = llm__jinja_sort(r, llm__jinja_iterate(r, v), reverse, sensitive, x && x->type != LLM__J_NONE ? x : NULL);
        break;
    }
    case LLM__JF_unique: {
        const llm__jinja_list *items = llm__jinja_iterate(r, v);
        bool sensitive = llm__jinja_flag_arg(a, 0, "case_sensitive", false);
        x = llm__jinja_arg(a, 1, "attribute");
        list = llm__jinja_new_list(r);
        s = llm__jinja_new_list(r);
        for (size_t i = 0; i < items->n; i++) {
            llm__jinja_value key = x ? llm__jinja_path(r, &items->items[i], x) : items->items[i];
            key = llm__jinja_fold(r, &key, sensitive);
            if (llm__jinja_contains(r, &list, &key)) continue;
            llm__jinja_add(r, list.u.list, key);
            llm__jinja_add(r, s.u.list, items->items[i]);
        }
        break;
    }
    case LLM__JF_reverse: {
        llm__jinja_value bounds[3] = {llm__jinja_make(LLM__J_NONE), llm__jinja_make(LLM__J_NONE), llm__jinja_int(-1)};
        s = llm__jinja_slice(r, v, bounds);
        break;
    }
    case LLM__JF_indent:
        s = llm__jinja_as_text(r, v);
        s = llm__jinja_indent(r, &s, a);
        break;
    case LLM__JF_abs:
        if (!llm__jinja_is_number(v)) llm__jinja_type_error(r, "abs", v);
        s = v->type == LLM__J_FLOAT ? llm__jinja_float(fabs(v->u.f))
                                    : llm__jinja_int(v->u.i < 0 && v->u.i > INT64_MIN ? -v->u.i : v->u.i);
        break;
    case LLM__JF_round: {
        int64_t precision = llm__jinja_int_arg(r, a, 0, "precision", 0);
        x = llm__jinja_str_arg(r, a, 1, "method");
        if (!llm__jinja_is_number(v) || precision < 0 || precision > 15)
            llm__jinja_error(r, "round takes a number and a precision from 0 to 15");
        double power = 1, d = llm__jinja_as_double(v);
        for (int64_t i = 0; i < precision; i++) power *= 10;
        bool up = x && llm__str_is(llm__jinja_str(x), "ceil"), down = x && llm__str_is(llm__jinja_str(x), "floor");
        s = llm__jinja_float((up ? ceil(d * power) : down ? floor(d * power) : nearbyint(d * power)) / power);
        break;
    }
    case LLM__JF_sum: {
        const llm__jinja_list *items = llm__jinja_iterate(r, v);
        x = llm__jinja_arg(a, 0, "attribute");
        const llm__jinja_value *start = llm__jinja_arg(a, 1, "start");
        s = start ? *start : llm__jinja_int(0);
        for (size_t i = 0; i < items->n; i++) {
            llm__jinja_value item = x ? llm__jinja_path(r, &items->items[i], x) : items->items[i];
            if (!llm__jinja_is_number(&item) || !llm__jinja_is_number(&s)) llm__jinja_type_error(r, "sum", &item);
            if (s.type == LLM__J_FLOAT || item.type == LLM__J_FLOAT)
                s = llm__jinja_float(llm__jinja_as_double(&s) + llm__jinja_as_double(&item));
            else if ((item.u.i > 0 && s.u.i > INT64_MAX - item.u.i) || (item.u.i < 0 && s.u.i < INT64_MIN - item.u.i))
                llm__jinja_error(r, "an integer is too large");
            else s = llm__jinja_int(s.u.i + item.u.i);
        }
        break;
    }
    default: { /* min, max */
        const llm__jinja_list *items = llm__jinja_iterate(r, v);
        bool sensitive = llm__jinja_flag_arg(a, 0, "case_sensitive", false);
        x = llm__jinja_arg(a, 1, "attribute");
        s = llm__jinja_undefined(nothing);
        llm__jinja_value best = s;
        for (size_t i = 0; i < items->n; i++) {
            llm__jinja_value key = x ? llm__jinja_path(r, &items->items[i], x) : items->items[i];
            key = llm__jinja_fold(r, &key, sensitive);
            int order = i ? llm__jinja_order(r, &key, &best, 0) : 0;
            if (i && (number == LLM__JF_min ? order >= 0 : order <= 0)) continue;
            best = key;
            s = items->items[i];
        }
    }
    }
    r->depth--;
    return s;
}

/* ---- Running ---- */

static llm__jinja_value llm__jinja_eval(llm__jinja_run *r, const llm__jinja_node *node);
static void llm__jinja_exec(llm__jinja_run *r, const llm__jinja_node *list);

static void llm__jinja_eval_args(llm__jinja_run *r, const llm__jinja_node *node, llm__jinja_args *a) {
    memset(a, 0, sizeof *a);
    for (; node; node = node->next) {
        bool named = node->kind == LLM__J_PLUS && node->op == '=';
        if (a->n == LLM__JINJA_MAX_ARGS) llm__jinja_error(r, "more than %d arguments", LLM__JINJA_MAX_ARGS);
        if (!named && a->n > a->n_positional) llm__jinja_error(r, "a positional argument after a named one");
        a->names[a->n] = node->name;
        a->values[a->n++] = llm__jinja_eval(r, named ? node->a : node);
        a->n_positional += !named;
    }
}

static llm__jinja_value llm__jinja_variable(llm__jinja_run *r, llm__str name) {
    llm__jinja_value key = llm__jinja_text(name.at, name.n);
    for (llm__jinja_scope *s = r->scope; s; s = s->parent) {
        llm__jinja_value *found = llm__jinja_lookup(r, &s->variables, &key);
        if (found) return *found;
    }
    int function = llm__jinja_find(llm__jinja_functions, name);
    if (function < 0) return llm__jinja_undefined(name);
    llm__jinja_value v = llm__jinja_make(LLM__J_FUNCTION);
    v.u.i = function;
    return v;
}

static llm__jinja_value llm__jinja_call_macro(llm__jinja_run *r, const llm__jinja_node *macro, llm__jinja_args *a) {
    llm__jinja_scope scope, *outside = r->scope;
    llm__jinja_buffer out = r->out;
    int place = 0;
    memset(&scope, 0, sizeof scope);
    memset(&r->out, 0, sizeof r->out);
    scope.parent = r->top;
    r->scope = &scope;
    for (const llm__jinja_node *parameter = macro->args; parameter; parameter = parameter->next, place++) {
        const llm__jinja_value *given = NULL;
        if (place < a->n_positional) given = llm__jinja_arg(a, place, NULL);
        for (int i = a->n_positional; i < a->n && !given; i++)
            if (llm__str_equal(a->names[i], parameter->name)) {
                given = &a->values[i];
                a->used |= 1u << i;
            }
        llm__jinja_assign(r, parameter->name,
                          given          ? *given
                          : parameter->a ? llm__jinja_eval(r, parameter->a)
                                         : llm__jinja_undefined(parameter->name));
    }
    llm__jinja_args_done(r, a);
    llm__jinja_exec(r, macro->body);
    llm__jinja_value v = llm__jinja_finish(&r->out);
    r->out = out;
    r->scope = outside;
    return v;
}

static llm__jinja_value llm__jinja_call(llm__jinja_run *r, const llm__jinja_node *node) {
    llm__jinja_args a;
    llm__jinja_value v = llm__jinja_eval(r, node->a->kind == LLM__J_ATTRIBUTE ? node->a->a : node->a), result;
    llm__jinja_eval_args(r, node->args, &a);
    r->at = node;
    if (node->a->kind == LLM__J_ATTRIBUTE) {
        result = llm__jinja_call_method(r, node->op, &v, &a);
    } else if (v.type == LLM__J_MACRO) {
        return llm__jinja_call_macro(r, v.u.macro, &a);
    } else if (v.type == LLM__J_FUNCTION) {
        result = llm__jinja_call_function(r, (int)v.u.i, &a);
    } else {
        llm__jinja_type_error(r, "a call", &v);
    }
    llm__jinja_args_done(r, &a);
    return result;
}

static llm__jinja_value llm__jinja_repeat(llm__jinja_run *r, const llm__jinja_value *v, int64_t times) {
    llm__jinja_value list = llm__jinja_new_list(r);
    llm__jinja_buffer b = {NULL, NULL, 0, 0};
    for (int64_t k = 0; k < times; k++) {
        llm__jinja_step(r, 1);
        if (v->type == LLM__J_STR) llm__jinja_put_part(r, &b, v, 0, v->u.s.n);
        else
            for (size_t i = 0; i < v->u.list->n; i++) llm__jinja_add(r, list.u.list, v->u.list->items[i]);
    }
    return v->type == LLM__J_STR ? llm__jinja_finish(&b) : list;
}

/* Appends a string. With `escape` the characters that are special in HTML are escaped. */
static void llm__jinja_put_escaped(llm__jinja_run *r, llm__jinja_buffer *b, const llm__jinja_value *s, bool escape) {
    static const char special[] = "&<>'\"";
    static const char *const escapes[] = {"&amp;", "&lt;", "&gt;", "&#39;", "&#34;"};
    size_t from = 0;
    for (size_t i = 0; i < s->u.s.n && escape; i++) {
        const char *found = s->u.s.at[i] ? strchr(special, s->u.s.at[i]) : NULL;
        if (!found) continue;
        llm__jinja_put_part(r, b, s, from, i);
        llm__jinja_put_text(r, b, escapes[found - special]);
        from = i + 1;
    }
    llm__jinja_put_part(r, b, s, from, s->u.s.n);
}

static llm__jinja_value llm__jinja_arithmetic(llm__jinja_run *r, int op, const llm__jinja_value *a,
                                              const llm__jinja_value *b) {
    if (op == '+' && a->type == LLM__J_STR && b->type == LLM__J_STR) {
        llm__jinja_buffer joined = {NULL, NULL, 0, 0};
        bool markup = a->is_markup || b->is_markup;
        llm__jinja_put_escaped(r, &joined, a, markup && !a->is_markup);
        llm__jinja_put_escaped(r, &joined, b, markup && !b->is_markup);
        llm__jinja_value v = llm__jinja_finish(&joined);
        v.is_markup = markup;
        return v;
    }
    if (op == '+' && a->type == LLM__J_LIST && b->type == LLM__J_LIST && a->is_tuple == b->is_tuple) {
        llm__jinja_value list = llm__jinja_new_list(r);
        list.is_tuple = a->is_tuple;
        for (size_t i = 0; i < a->u.list->n; i++) llm__jinja_add(r, list.u.list, a->u.list->items[i]);
        for (size_t i = 0; i < b->u.list->n; i++) llm__jinja_add(r, list.u.list, b->u.list->items[i]);
        return list;
    }
    if (op == '*' && b->type == LLM__J_INT && (a->type == LLM__J_STR || a->type == LLM__J_LIST))
        return llm__jinja_repeat(r, a, b->u.i);
    if (op == '*' && a->type == LLM__J_INT && (b->type == LLM__J_STR || b->type == LLM__J_LIST))
        return llm__jinja_repeat(r, b, a->u.i);
    if (!llm__jinja_is_number(a)) llm__jinja_type_error(r, "arithmetic", a);
    if (!llm__jinja_is_number(b)) llm__jinja_type_error(r, "arithmetic", b);
    double x = llm__jinja_as_double(a), y = llm__jinja_as_double(b);
    bool whole = a->type != LLM__J_FLOAT && b->type != LLM__J_FLOAT;
    if ((op == '/' || op == 'f' || op == '%') && y == 0) llm__jinja_error(r, "division by zero");
    if (!whole || op == '/') {
        switch (op) {
        case '+': return llm__jinja_float(x + y);
        case '-': return llm__jinja_float(x - y);
        case '*': return llm__jinja_float(x * y);
        case '/': return llm__jinja_float(x / y);
        case 'f': return llm__jinja_float(floor(x / y));
        case '%': return llm__jinja_float(x - y * floor(x / y));
        default: return llm__jinja_float(pow(x, y));
        }
    }
    int64_t i = a->u.i, j = b->u.i, k = 1;
    bool overflow = false;
    switch (op) {
    case '+': overflow = __builtin_add_overflow(i, j, &k); break;
    case '-': overflow = __builtin_sub_overflow(i, j, &k); break;
    case '*': overflow = __builtin_mul_overflow(i, j, &k); break;
    case 'p':
        if (j < 0) return llm__jinja_float(pow(x, y));
        for (; j && !overflow; j--) {
            overflow = __builtin_mul_overflow(k, i, &k);
            llm__jinja_step(r, 1);
        }
        break;
    default: /* // and %, which round down */
        if (j == -1) {
            overflow = __builtin_sub_overflow((int64_t)0, i, &k);
            return op == '%' ? llm__jinja_int(0) : overflow ? llm__jinja_float(-x) : llm__jinja_int(k);
        }
        k = i / j;
        if (i % j != 0 && (i < 0) != (j < 0)) k--;
        if (op == '%') k = i - k * j;
    }
    if (overflow) llm__jinja_error(r, "an integer is too large");
    return llm__jinja_int(k);
}

static bool llm__jinja_compare(llm__jinja_run *r, int op, const llm__jinja_value *a, const llm__jinja_value *b) {
    switch (op) {
    case '=': return llm__jinja_equal(r, a, b, 0);
    case '!': return !llm__jinja_equal(r, a, b, 0);
    case '<': return llm__jinja_order(r, a, b, 0) < 0;
    case 'l': return llm__jinja_order(r, a, b, 0) <= 0;
    case '>': return llm__jinja_order(r, a, b, 0) > 0;
    case 'g': return llm__jinja_order(r, a, b, 0) >= 0;
    case 'i': return llm__jinja_contains(r, b, a);
    default: return !llm__jinja_contains(r, b, a);
    }
}

static llm__jinja_value llm__jinja_eval_compare(llm__jinja_run *r, const llm__jinja_node *node) {
    llm__jinja_value left = llm__jinja_eval(r, node->a);
    for (const llm__jinja_node *operand = node->args; operand; operand = operand->next) {
        llm__jinja_value right = llm__jinja_eval(r, operand->a);
        r->at = node;
        if (!llm__jinja_compare(r, operand->op, &left, &right)) return llm__jinja_bool(false);
        left = right;
    }
    return llm__jinja_bool(true);
}

static llm__jinja_value llm__jinja_eval_collection(llm__jinja_run *r, const llm__jinja_node *node) {
    bool dict = node->kind == LLM__J_MAKE_DICT;
    llm__jinja_value v = dict ? llm__jinja_new_dict(r) : llm__jinja_new_list(r);
    v.is_tuple = node->kind == LLM__J_MAKE_TUPLE;
    for (const llm__jinja_node *item = node->args; item; item = item->next) {
        llm__jinja_value x = llm__jinja_eval(r, item);
        if (dict) {
            item = item->next;
            llm__jinja_store(r, v.u.dict, x, llm__jinja_eval(r, item));
        } else {
            llm__jinja_add(r, v.u.list, x);
        }
    }
    return v;
}

static llm__jinja_value llm__jinja_eval_node(llm__jinja_run *r, const llm__jinja_node *node) {
    llm__jinja_value v, w, bounds[3];
    llm__jinja_args args;
    switch (node->kind) {
    case LLM__J_CONST: return node->value;
    case LLM__J_NAME: return llm__jinja_variable(r, node->name);
    case LLM__J_MAKE_LIST:
    case LLM__J_MAKE_TUPLE:
    case LLM__J_MAKE_DICT: return llm__jinja_eval_collection(r, node);
    case LLM__J_ATTRIBUTE:
        v = llm__jinja_eval(r, node->a);
        r->at = node;
        return llm__jinja_attribute(r, &v, node->name);
    case LLM__J_INDEX:
        v = llm__jinja_eval(r, node->a);
        w = llm__jinja_eval(r, node->b);
        r->at = node;
        return llm__jinja_item(r, &v, &w);
    case LLM__J_SLICE:
        v = llm__jinja_eval(r, node->a);
        bounds[0] = node->b ? llm__jinja_eval(r, node->b) : llm__jinja_make(LLM__J_NONE);
        bounds[1] = node->c ? llm__jinja_eval(r, node->c) : llm__jinja_make(LLM__J_NONE);
        bounds[2] = node->args ? llm__jinja_eval(r, node->args) : llm__jinja_make(LLM__J_NONE);
        r->at = node;
        return llm__jinja_slice(r, &v, bounds);
    case LLM__J_CALL: return llm__jinja_call(r, node);
    case LLM__J_FILTER:
    case LLM__J_TEST:
        v = llm__jinja_eval(r, node->a);
        llm__jinja_eval_args(r, node->args, &args);
        r->at = node;
        w = node->kind == LLM__J_FILTER ? llm__jinja_run_filter(r, node->op, &v, &args)
                                        : llm__jinja_bool(llm__jinja_run_test(r, node->op, &v, &args) != node->negated);
        llm__jinja_args_done(r, &args);
        return w;
    case LLM__J_NOT: v = llm__jinja_eval(r, node->a); return llm__jinja_bool(!llm__jinja_truth(&v));
    case LLM__J_NEGATE:
    case LLM__J_PLUS:
        v = llm__jinja_eval(r, node->a);
        w = llm__jinja_int(0);
        r->at = node;
        if (v.type == LLM__J_FLOAT) return llm__jinja_float(node->kind == LLM__J_PLUS ? v.u.f : -v.u.f);
        return llm__jinja_arithmetic(r, node->kind == LLM__J_PLUS ? '+' : '-', &w, &v);
    case LLM__J_BINARY:
        v = llm__jinja_eval(r, node->a);
        w = llm__jinja_eval(r, node->b);
        r->at = node;
        if (node->op == '~') {
            v = llm__jinja_as_text(r, &v);
            w = llm__jinja_as_text(r, &w);
            v.is_markup = w.is_markup = false; /* ~ escapes nothing */
            return llm__jinja_arithmetic(r, '+', &v, &w);
        }
        return llm__jinja_arithmetic(r, node->op, &v, &w);
    case LLM__J_COMPARE: return llm__jinja_eval_compare(r, node);
    case LLM__J_AND: v = llm__jinja_eval(r, node->a); return llm__jinja_truth(&v) ? llm__jinja_eval(r, node->b) : v;
    case LLM__J_OR: v = llm__jinja_eval(r, node->a); return llm__jinja_truth(&v) ? v : llm__jinja_eval(r, node->b);
    default: /* LLM__J_CHOICE */
        v = llm__jinja_eval(r, node->b);
        if (llm__jinja_truth(&v)) return llm__jinja_eval(r, node->a);
        return node->c ? llm__jinja_eval(r, node->c) : llm__jinja_undefined(node->name);
    }
}

static llm__jinja_value llm__jinja_eval(llm__jinja_run *r, const llm__jinja_node *node) {
    if (++r->depth > 2 * LLM__JINJA_DEPTH) llm__jinja_error(r, "more than %d levels of nesting", 2 * LLM__JINJA_DEPTH);
    llm__jinja_step(r, 1);
    r->at = node;
    llm__jinja_value v = llm__jinja_eval_node(r, node);
    r->depth--;
    return v;
}

/* Assigns a value to one name, or the items of a value to several names. */
static void llm__jinja_assign_targets(llm__jinja_run *r, const llm__jinja_node *targets, const llm__jinja_value *v) {
    const llm__jinja_list *items = NULL;
    size_t i = 0;
    if (targets->next) {
        size_t n = 0;
        for (const llm__jinja_node *t = targets; t; t = t->next) n++;
        items = llm__jinja_iterate(r, v);
        if (items->n != n)
            llm__jinja_error(r, "%llu values are assigned to %llu names", (unsigned long long)items->n,
                             (unsigned long long)n);
    }
    for (const llm__jinja_node *t = targets; t; t = t->next, i++) {
        llm__jinja_value item = items ? items->items[i] : *v;
        if (t->kind == LLM__J_NAME) {
            llm__jinja_assign(r, t->name, item);
            continue;
        }
        llm__jinja_value object = llm__jinja_variable(r, t->a->name);
        if (object.type != LLM__J_DICT || !object.is_namespace)
            llm__jinja_error(r, "attributes can only be set on a namespace");
        llm__jinja_store(r, object.u.dict, llm__jinja_text(t->name.at, t->name.n), item);
    }
}

static void llm__jinja_exec_for(llm__jinja_run *r, const llm__jinja_node *node) {
    llm__jinja_value v = llm__jinja_eval(r, node->a), list = llm__jinja_new_list(r);
    llm__jinja_scope scope, *outside = r->scope;
    llm__jinja_loop loop;
    memset(&scope, 0, sizeof scope);
    r->at = node;
    const llm__jinja_list *items = llm__jinja_iterate(r, &v);
    scope.parent = outside;
    for (size_t i = 0; i < items->n && node->b; i++) { /* the items that the loop's `if` lets through */
        scope.variables.n = 0;
        r->scope = &scope;
        llm__jinja_assign_targets(r, node->args, &items->items[i]);
        llm__jinja_value holds = llm__jinja_eval(r, node->b);
        if (llm__jinja_truth(&holds)) llm__jinja_add(r, list.u.list, items->items[i]);
    }
    r->scope = outside;
    if (node->b) items = list.u.list;
    if (!items->n) {
        llm__jinja_exec(r, node->other);
        return;
    }
    memset(&loop, 0, sizeof loop);
    loop.list = items;
    llm__jinja_value self = llm__jinja_make(LLM__J_LOOP);
    self.u.loop = &loop;
    llm__str name = {"loop", 4};
    for (; loop.index < items->n && !r->breaks; loop.index++) {
        scope.variables.n = 0;
        r->scope = &scope;
        r->continues = false;
        llm__jinja_assign(r, name, self);
        llm__jinja_assign_targets(r, node->args, &items->items[loop.index]);
        llm__jinja_exec(r, node->body);
    }
    r->breaks = r->continues = false;
    r->scope = outside;
}

/* Runs the body of a block, captures its text as a string, and applies the filters of the block to it. */
static llm__jinja_value llm__jinja_captured(llm__jinja_run *r, const llm__jinja_node *node) {
    llm__jinja_buffer out = r->out;
    llm__jinja_args args;
    memset(&r->out, 0, sizeof r->out);
    llm__jinja_exec(r, node->body);
    llm__jinja_value v = llm__jinja_finish(&r->out);
    r->out = out;
    const llm__jinja_node *filters[16], *f = node->a;
    int n = 0;
    for (; f->kind == LLM__J_FILTER; f = f->a) {
        if (n == 16) llm__jinja_error(r, "more than 16 filters");
        filters[n++] = f;
    }
    while (n--) {
        llm__jinja_eval_args(r, filters[n]->args, &args);
        r->at = filters[n];
        v = llm__jinja_run_filter(r, filters[n]->op, &v, &args);
        llm__jinja_args_done(r, &args);
    }
    return v;
}

static void llm__jinja_exec_node(llm__jinja_run *r, const llm__jinja_node *node) {
    llm__jinja_value v;
    llm__jinja_scope scope, *outside = r->scope;
    switch (node->kind) {
    case LLM__J_TEXT: llm__jinja_put(r, &r->out, node->value.u.s.at, node->value.u.s.n, NULL); break;
    case LLM__J_OUTPUT:
        v = llm__jinja_eval(r, node->a);
        r->at = node;
        llm__jinja_put_value(r, &r->out, &v, 0);
        break;
    case LLM__J_IF:
        v = llm__jinja_eval(r, node->a);
        llm__jinja_exec(r, llm__jinja_truth(&v) ? node->body : node->other);
        break;
    case LLM__J_FOR: llm__jinja_exec_for(r, node); break;
    case LLM__J_SET:
        v = llm__jinja_eval(r, node->a);
        r->at = node;
        llm__jinja_assign_targets(r, node->args, &v);
        break;
    case LLM__J_SET_BLOCK:
        v = llm__jinja_captured(r, node);
        llm__jinja_assign_targets(r, node->args, &v);
        break;
    case LLM__J_FILTER_BLOCK:
        v = llm__jinja_captured(r, node);
        llm__jinja_put_value(r, &r->out, &v, 0);
        break;
    case LLM__J_WITH:
        memset(&scope, 0, sizeof scope);
        scope.parent = outside;
        for (const llm__jinja_node *a = node->args; a; a = a->next) {
            r->scope = outside;
            v = llm__jinja_eval(r, a->a);
            r->scope = &scope;
            llm__jinja_assign(r, a->name, v);
        }
        r->scope = &scope;
        llm__jinja_exec(r, node->body);
        r->scope = outside;
        break;
    case LLM__J_DEFINE:
        v = llm__jinja_make(LLM__J_MACRO);
        v.u.macro = node;
        llm__jinja_assign(r, node->name, v);
        break;
    case LLM__J_BREAK: r->breaks = true; break;
    default: r->continues = true; break;
    }
}

static void llm__jinja_exec(llm__jinja_run *r, const llm__jinja_node *list) {
    if (++r->depth > 2 * LLM__JINJA_DEPTH) llm__jinja_error(r, "more than %d levels of nesting", 2 * LLM__JINJA_DEPTH);
    for (; list && !r->breaks && !r->continues; list = list->next) {
        llm__jinja_step(r, 1);
        r->at = list;
        llm__jinja_exec_node(r, list);
    }
    r->depth--;
}

/* Makes a value from JSON. Its strings count as the host's. */
static llm__jinja_value llm__jinja_from_json(llm__jinja_run *r, const llm__json *v) {
    llm__jinja_value value;
    llm__jinja_step(r, 1);
    switch (v->type) {
    case LLM__JSON_NULL: return llm__jinja_make(LLM__J_NONE);
    case LLM__JSON_TRUE:
    case LLM__JSON_FALSE: return llm__jinja_bool(v->type == LLM__JSON_TRUE);
    case LLM__JSON_STRING: return llm__jinja_host_text(r, v->string.at, v->string.n);
    case LLM__JSON_NUMBER: {
        bool whole = v->string.n <= 18;
        for (size_t i = 0; i < v->string.n; i++)
            whole = whole && (llm__jinja_is_digit(v->string.at[i]) || v->string.at[i] == '-');
        return whole ? llm__jinja_int((int64_t)v->number) : llm__jinja_float(v->number);
    }
    case LLM__JSON_ARRAY:
        value = llm__jinja_new_list(r);
        for (const llm__json *item = v->first; item; item = item->next)
            llm__jinja_add(r, value.u.list, llm__jinja_from_json(r, item));
        return value;
    default:
        value = llm__jinja_new_dict(r);
        for (const llm__json *item = v->first; item; item = item->next)
            llm__jinja_store(r, value.u.dict, llm__jinja_host_text(r, item->key.at, item->key.n),
                             llm__jinja_from_json(r, item));
        return value;
    }
}

/* Sets a variable of the template. */
static void llm__jinja_set_variable(llm__jinja_run *r, const char *name, llm__jinja_value v) {
    llm__str key = {name, strlen(name)};
    llm__jinja_assign(r, key, v);
}

/* Prepares a run. Set the variables after this and before llm__jinja_exec. */
static void llm__jinja_begin(llm__jinja_run *r, llm__env *env, const llm__unicode_classes *classes) {
    memset(r, 0, sizeof *r);
    r->env = env;
    r->classes = classes;
    r->scope = r->top = (llm__jinja_scope *)llm__alloc_zero(env, 1, sizeof *r->top);
}

/* ==== 9 Tokenizer ===============================================================================================

   From text to tokens, in four steps. Special tokens are cut out of the text. The text between them is normalised if
   the tokenizer does that (NFC, a space in front), and special tokens that are matched in normalised text are cut out,
   too. The pre-tokenizer's rules split the rest into words. Each word is merged: starting from single bytes
   (byte-level BPE) or characters (SentencePiece), the two neighbours whose merge has the lowest rank are joined, the
   leftmost of equals first, until no neighbours merge.

   Two hash tables do the work: one from the bytes of a piece to its id, one from two ids to the rank and the id of
   their merge. Most words are a single piece. At build time we mark the pieces that merging their own bytes
   reproduces, so such a word costs one lookup. Other words are first split between bytes that are adjacent in no
   piece, since no merge can cross there. Short words are merged by scanning, long ones with a heap, so the time is O(n
   log n) for any text.

   A vocabulary comes from GGUF, from tokenizer.json (Hugging Face) or from tokenizer.model (SentencePiece). Each
   reader fills in an llm__vocab_source, from which the tokenizer is built.

   SentencePiece writes a space as U+2581 in its pieces. Here they are stored with plain spaces, and U+2581 in a text
   counts as a space. Text need not be valid UTF-8: each byte that is not part of a well-formed sequence (table 3-7 of
   the Unicode standard) becomes U+FFFD. */

typedef enum llm__vocab_token_type { /* numbered as in GGUF */
                                     LLM__TYPE_NORMAL = 1,
                                     LLM__TYPE_UNKNOWN,
                                     LLM__TYPE_CONTROL,
                                     LLM__TYPE_USER_DEFINED,
                                     LLM__TYPE_UNUSED,
                                     LLM__TYPE_BYTE
} llm__vocab_token_type;

enum { /* flags of a token */
       LLM__TYPE_MASK = 7,
       LLM__WHOLE_PIECE = 8,   /* merging the piece's own bytes gives the piece */
       LLM__END = 16,          /* ends a text or a turn                                                              */
       LLM__LSTRIP = 32,       /* in a text, the token includes the white space before it */
       LLM__RSTRIP = 64,       /* in a text, the token includes the white space after it */
       LLM__SINGLE_WORD = 128, /* only recognised where no letter, mark, number or underscore touches it */
       LLM__NORMALIZED = 256,  /* recognised in the normalised text */
       LLM__IN_MODEL = 512     /* not a normal token, but merges may still produce it */
};

/* Where a space is added in front of the text, so that its first word looks like the others. */
typedef enum llm__vocab_prefix {
    LLM__NO_PREFIX,
    LLM__PREFIX_STRETCH,  /* before each stretch of text between special tokens */
    LLM__PREFIX_UNSPACED, /* the same, unless the stretch begins with a space */
    LLM__PREFIX_FIRST     /* at the start of the text, unless it begins with a space */
} llm__vocab_prefix;

typedef enum llm__pre_rule_kind {
    LLM__NO_RULE,
    LLM__RULE_RUN,
    LLM__RULE_GPT2,
    LLM__RULE_LLAMA3,
    LLM__RULE_CASED,
    LLM__RULE_METASPACE
} llm__pre_rule_kind;

/* A pre-tokenizer is a list of rules. Each one cuts the pieces that the rule before it left whole. */
typedef struct llm__pre_rule {
    llm__pre_rule_kind kind;
    unsigned classes;       /* classes of the code points in a run */
    int least, most;        /* code points in a run; `most` is also the maximum of digits in a number */
    bool space;             /* a run may begin with white space */
    bool to_end;            /* a run must end where the text ends */
    bool contractions;      /* a word may end in 's and the like */
    const uint32_t *ranges; /* [n_ranges][2] first and last of more code points that a run may hold, sorted */
    size_t n_ranges;
} llm__pre_rule;

enum { LLM__MAX_RULES = 8, LLM__MAX_RANGES = 256, LLM__NONE = -1 };

typedef struct llm__bpe_merge_text {
    llm__str left, right;
} llm__bpe_merge_text;

/* The input from which a vocabulary is built, in a form common to all file formats. The strings must stay valid during
   the build only. */
typedef struct llm__vocab_source {
    bool sentencepiece; /* pieces consist of characters, and of bytes written as "<0x0A>"; otherwise byte-level BPE */
    const char *pieces_name, *scores_name, *types_name, *merges_name; /* names of the file's fields, for messages */
    size_t n_pieces, n_merges;
    const llm__str *pieces; /* [n_pieces] as in the file, where spaces and bytes are written as other characters */
    const float *scores;    /* [n_pieces] order of the merges if there is no list of merges; otherwise NULL */
    const int32_t *types;   /* [n_pieces] llm__vocab_token_type; NULL: all normal */
    const uint16_t *traits; /* [n_pieces] flags LLM__END to LLM__IN_MODEL; NULL: none */
    const llm__bpe_merge_text *merges; /* [n_merges] in order of rank */
    llm__pre_rule rules[LLM__MAX_RULES];
    int n_rules;
    bool nfc, ignore_merges;
    bool fuse_unk; /* a run of unknown characters becomes one token */
    llm__vocab_prefix prefix;
    bool strip_prefix;       /* decoding removes a space at the start of the text */
    llm_token bos, eos, unk; /* LLM__NONE if absent */
    bool add_bos, add_eos;
    llm__str chat_template;
} llm__vocab_source;

typedef struct llm__vocab_piece_slot {
    uint64_t head; /* the piece as a number if it has up to 8 bytes, otherwise its hash */
    uint32_t n;    /* bytes in the piece */
    llm_token id;  /* LLM__NONE: the slot is free */
} llm__vocab_piece_slot;

typedef struct llm__bpe_pair_slot {
    llm_token left, right, merged; /* left is LLM__NONE if the slot is free */
    uint32_t rank;
} llm__bpe_pair_slot;

#define LLM__NO_RANK UINT32_MAX

typedef struct llm__bpe_merge_to {
    llm_token merged;
    uint32_t rank; /* LLM__NO_RANK: the two do not merge */
} llm__bpe_merge_to;

typedef struct llm__special {
    llm__str text;
    llm_token id;
    int32_t prefix; /* index of the longest special that is a prefix of this one, or LLM__NONE */
} llm__special;

enum { LLM__FEW_FIRSTS = 8 };

/* Tokens that are recognised in a text before it is split into words. */
typedef struct llm__special_set {
    llm__special *items; /* sorted by their texts */
    int n;
    uint8_t kinds;       /* union of the values in starts */
    uint8_t firsts[256]; /* [n_firsts] the bytes with which they start */
    int n_firsts;
    uint8_t starts[256]; /* bit 1: a user-defined token starts with this byte; bit 2: another special token does */
} llm__special_set;

struct llm_tokenizer {
    llm__pool own; /* holds the tokenizer if it was loaded alone */
    llm_host host;
    llm__unicode_classes *classes;
    llm__nfc *nfc; /* NULL if the text is not normalised */
    bool sentencepiece, add_bos, add_eos, ignore_merges, fuse_unk, strip_prefix;
    llm__vocab_prefix prefix;
    int n_vocab;
    llm_token bos, eos, unk;
    uint16_t *flags;   /* [n_vocab]                                                      */
    uint32_t *offsets; /* [n_vocab + 1] into bytes                                       */
    uint8_t *bytes;
    llm__vocab_piece_slot *pieces;
    size_t piece_mask, longest_piece;
    llm__bpe_pair_slot *pairs;
    size_t pair_mask, n_pairs;
    uint8_t *pair_filter;          /* [pair_mask + 1] 8 bits per slot, by hash; 0: no pair has this hash */
    llm_token first_byte;          /* the lowest of byte_tokens, which are usually 256 ids in a row */
    llm__bpe_merge_to *byte_pairs; /* [256][256] the merges of two ids from first_byte on; NULL: not used */
    uint32_t n_ranks;
    bool spaces_cut;         /* no merge crosses the front of a space after another character */
    uint8_t joined[256][32]; /* [byte][byte / 8] one bit per pair of bytes that are adjacent in some piece */
    llm_token byte_tokens[256];
    llm_token ascii_tokens[128];      /* the pieces of one character of ASCII */
    llm__special_set raw, normalized; /* recognised in the raw text, and in the normalised text */
    llm__pre_rule rules[LLM__MAX_RULES + 1];
    char *chat_template;           /* its source text; NULL if the file has none */
    llm__jinja_node *chat_program; /* the template, parsed                       */
    char *chat_problem;            /* why it cannot be run; NULL: it can         */
};

static llm__str llm__vocab_piece(const llm_tokenizer *t, llm_token id) {
    llm__str s;
    s.at = (const char *)t->bytes + t->offsets[id];
    s.n = t->offsets[id + 1] - t->offsets[id];
    return s;
}

static int llm__vocab_type_of(const llm_tokenizer *t, llm_token id) { return t->flags[id] & LLM__TYPE_MASK; }

/* ---- Hash tables: open addressing, at most two thirds full ---- */

static uint64_t llm__load_tail(const uint8_t *p,
                               size_t n) { /* n <= 8 bytes as a number; different bytes give different numbers */
    uint64_t lo = 0, hi = 0;
    if (n >= 4) {
        memcpy(&lo, p, 4);
        memcpy(&hi, p + n - 4, 4);
        return lo | hi << 32;
    }
    return n ? (uint64_t)p[0] | (uint64_t)p[n / 2] << 8 | (uint64_t)p[n - 1] << 16 : 0;
}

static uint64_t llm__hash_mix(uint64_t h) {
    h = (h ^ h >> 32) * 0x9E3779B97F4A7C15u;
    return h ^ h >> 29;
}

static uint64_t llm__hash_bytes(const uint8_t *p, size_t n) {
    uint64_t h = llm__hash_mix(n + 1), eight;
    for (; n > 8; p += 8, n -= 8) {
        memcpy(&eight, p, 8);
        h = llm__hash_mix(h ^ eight) * 0xD6E8FEB86659FD93u;
    }
    return llm__hash_mix((h ^ llm__load_tail(p, n)) * 0xD6E8FEB86659FD93u);
}

/* The slot that holds these bytes, or the free slot where they belong. *head is what identifies them there: most pieces
   are short, and comparing them needs no other memory than the slot. */
static llm__vocab_piece_slot *llm__vocab_slot_of(const llm_tokenizer *t, const uint8_t *p, size_t n, uint64_t *head,
                                                 size_t *probes) {
    uint64_t h = llm__hash_bytes(p, n);
    *head = n <= 8 ? llm__load_tail(p, n) : h;
    for (size_t i = h & t->piece_mask;; i = (i + 1) & t->piece_mask, ++*probes) {
        llm__vocab_piece_slot *slot = &t->pieces[i];
        if (slot->id == LLM__NONE) return slot;
        if (slot->head != *head || slot->n != n) continue;
        if (n <= 8 || !memcmp(llm__vocab_piece(t, slot->id).at, p, n)) return slot;
    }
}

static llm_token llm__vocab_find(const llm_tokenizer *t, const uint8_t *p, size_t n) {
    uint64_t head;
    size_t probes = 0;
    return n && n <= t->longest_piece ? llm__vocab_slot_of(t, p, n, &head, &probes)->id : LLM__NONE;
}

static uint64_t llm__bpe_pair_hash(llm_token left, llm_token right) {
    return llm__hash_mix(((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0xD6E8FEB86659FD93u);
}

static llm__bpe_pair_slot *llm__bpe_pair_slot_of(const llm_tokenizer *t, llm_token left, llm_token right,
                                                 size_t *probes) {
    uint64_t h = llm__bpe_pair_hash(left, right);
    for (size_t i = h & t->pair_mask;; i = (i + 1) & t->pair_mask, ++*probes) {
        llm__bpe_pair_slot *slot = &t->pairs[i];
        if ((slot->left == left && slot->right == right) || slot->left == LLM__NONE) return slot;
    }
}

/* Which bit of the filter is this pair's. */
static size_t llm__bpe_pair_bit(const llm_tokenizer *t, llm_token left, llm_token right) {
    return (size_t)(llm__bpe_pair_hash(left, right) >> 32) & (8 * t->pair_mask + 7);
}

static void llm__bpe_filter_pair(llm_tokenizer *t, llm_token left, llm_token right) {
    size_t bit = llm__bpe_pair_bit(t, left, right);
    t->pair_filter[bit / 8] |= (uint8_t)(1 << bit % 8);
}

/* The merge of two tokens. Most pairs do not merge, and for most of those the filter, which fits the second-level
   cache, says so. */
static llm__bpe_merge_to llm__bpe_find_pair(const llm_tokenizer *t, llm_token left, llm_token right) {
    llm__bpe_merge_to merge = {LLM__NONE, LLM__NO_RANK};
    uint32_t i = (uint32_t)left - (uint32_t)t->first_byte, j = (uint32_t)right - (uint32_t)t->first_byte;
    if ((i | j) < 256 && t->byte_pairs) return t->byte_pairs[i * 256 + j];
    size_t probes = 0, bit = llm__bpe_pair_bit(t, left, right);
    if (!(t->pair_filter[bit / 8] >> bit % 8 & 1)) return merge;
    const llm__bpe_pair_slot *slot = llm__bpe_pair_slot_of(t, left, right, &probes);
    if (slot->left == LLM__NONE) return merge;
    merge.merged = slot->merged;
    merge.rank = slot->rank;
    return merge;
}

/* ---- Merging ---- */

typedef struct llm__bpe_symbol {
    llm_token id, merged;    /* merged: the id if this symbol is joined with the next */
    uint32_t rank;           /* of that merge; LLM__NO_RANK if there is none */
    uint32_t previous, next; /* indices of the neighbours; LLM__NO_PLACE at the ends */
} llm__bpe_symbol;

enum { LLM__SHORT_WORD = 32 };
#define LLM__NO_PLACE UINT32_MAX

/* The pair that was looked up last: in a run of one letter it comes again and again. */
typedef struct llm__bpe_recent {
    llm_token left, right;
    llm__bpe_merge_to merge;
} llm__bpe_recent;

static void llm__bpe_rank_symbol(const llm_tokenizer *t, llm__bpe_symbol *s, const llm__bpe_symbol *next,
                                 llm__bpe_recent *recent) {
    s->rank = LLM__NO_RANK;
    s->merged = LLM__NONE;
    if (!next) return;
    if (recent->left != s->id || recent->right != next->id) {
        recent->left = s->id;
        recent->right = next->id;
        recent->merge = llm__bpe_find_pair(t, s->id, next->id);
    }
    s->rank = recent->merge.rank;
    s->merged = recent->merge.merged;
}

/* Does all merges of the lowest rank from left to right, stopping early if a merge enables one of lower rank. Returns
   the number of symbols that remain; *n_merged is the number of merges done. */
static size_t llm__bpe_merge_lowest(const llm_tokenizer *t, llm__bpe_symbol *s, size_t n, size_t *n_merged) {
    llm__bpe_recent recent[2] = {{LLM__NONE, LLM__NONE, {0, 0}}, {LLM__NONE, LLM__NONE, {0, 0}}};
    uint32_t rank = LLM__NO_RANK;
    size_t j = 0;
    *n_merged = 0;
    for (size_t i = 0; i < n; i++) rank = s[i].rank < rank ? s[i].rank : rank;
    if (rank == LLM__NO_RANK) return n;
    bool lower = false;
    for (size_t i = 0; i < n; j++) {
        s[j] = s[i++];
        while (!lower) {
            if (j && s[j - 1].rank == rank) j--; /* s[j + 1] has become part of s[j] */
            else if (s[j].rank == rank) i++;     /* s[i - 1] has become part of it */
            else break;
            ++*n_merged;
            s[j].id = s[j].merged;
            llm__bpe_rank_symbol(t, &s[j], i < n ? &s[i] : NULL, &recent[0]);
            if (j) llm__bpe_rank_symbol(t, &s[j - 1], &s[j], &recent[1]);
            lower = s[j].rank < rank || (j && s[j - 1].rank < rank);
        }
    }
    return j;
}

/* For long words: a heap of the places that can merge, ordered by rank, then by place. Entries go stale when a place
   changes; a stale entry is recognised because the symbol's rank has changed. */
typedef struct llm__bpe_heap {
    llm__env *env;
    uint64_t *items; /* rank << 32 | place */
    size_t n, room;
} llm__bpe_heap;

static void llm__bpe_heap_push(llm__bpe_heap *h, const llm__bpe_symbol *symbols, uint32_t place) {
    if (symbols[place].rank == LLM__NO_RANK) return;
    uint64_t item = (uint64_t)symbols[place].rank << 32 | place;
    h->items = (uint64_t *)llm__alloc_grow(h->env, h->items, h->n, &h->room, sizeof *h->items);
    size_t i = h->n++;
    for (; i && h->items[(i - 1) / 2] > item; i = (i - 1) / 2) h->items[i] = h->items[(i - 1) / 2];
    h->items[i] = item;
}

static uint64_t llm__bpe_heap_pop(llm__bpe_heap *h) {
    uint64_t top = h->items[0], item = h->items[--h->n];
    size_t i = 0, child;
    while ((child = 2 * i + 1) < h->n) {
        if (child + 1 < h->n && h->items[child + 1] < h->items[child]) child++;
        if (h->items[child] >= item) break;
        h->items[i] = h->items[child];
        i = child;
    }
    h->items[i] = item;
    return top;
}

static size_t llm__bpe_merge_by_heap(llm__env *env, const llm_tokenizer *t, llm__bpe_symbol *s, size_t n) {
    llm__bpe_heap h = {env, NULL, 0, 0};
    llm__bpe_recent recent = {LLM__NONE, LLM__NONE, {0, 0}};
    size_t count = 0;
    if (n > UINT32_MAX / 2) llm__fail(env, LLM_ERROR_UNSUPPORTED, "a word of %llu bytes", (unsigned long long)n);
    for (uint32_t i = 0; i < n; i++) {
        s[i].previous = i ? i - 1 : LLM__NO_PLACE;
        s[i].next = i + 1 < n ? i + 1 : LLM__NO_PLACE;
        llm__bpe_heap_push(&h, s, i);
    }
    while (h.n) {
        uint64_t top = llm__bpe_heap_pop(&h);
        uint32_t place = (uint32_t)top, right = s[place].next, previous = s[place].previous;
        if (s[place].rank != top >> 32) continue;
        s[right].rank = LLM__NO_RANK; /* it has become part of s[place] */
        s[place].id = s[place].merged;
        s[place].next = s[right].next;
        if (s[right].next != LLM__NO_PLACE) s[s[right].next].previous = place;
        llm__bpe_rank_symbol(t, &s[place], s[place].next == LLM__NO_PLACE ? NULL : &s[s[place].next], &recent);
        llm__bpe_heap_push(&h, s, place);
        if (previous == LLM__NO_PLACE) continue;
        llm__bpe_rank_symbol(t, &s[previous], &s[place], &recent);
        llm__bpe_heap_push(&h, s, previous);
    }
    llm__free(env->pool, h.items);
    for (uint32_t i = 0; i != LLM__NO_PLACE; i = s[i].next) s[count++] = s[i];
    return count;
}

/* Merges n symbols and returns how many remain. The heap bounds the time for long words, but is slow. If many places
   share one rank, as in a run of one letter, going over the word rank by rank is much faster. */
static size_t llm__bpe_merge(llm__env *env, const llm_tokenizer *t, llm__bpe_symbol *s, size_t n) {
    llm__bpe_recent recent[2] = {{LLM__NONE, LLM__NONE, {0, 0}}, {LLM__NONE, LLM__NONE, {0, 0}}};
    size_t n_merged = 1;
    for (size_t i = 0; i < n; i++) llm__bpe_rank_symbol(t, &s[i], i + 1 < n ? &s[i + 1] : NULL, &recent[i % 2]);
    for (int patience = 8; patience && n_merged;) {
        n = llm__bpe_merge_lowest(t, s, n, &n_merged);
        if (n_merged < n / 64) patience--;
    }
    return n_merged ? llm__bpe_merge_by_heap(env, t, s, n) : n;
}

/* True if a merge may cross the boundary between p[-1] and p[0]. */
static bool llm__bpe_may_join(const llm_tokenizer *t, const uint8_t *p) {
    if (t->sentencepiece && (*p & 0xC0) == 0x80) return true; /* characters are never split */
    return t->joined[p[-1]][*p / 8] >> *p % 8 & 1;
}

/* The symbols that merging starts from: one token per byte or, for SentencePiece, per character. A character without a
   token becomes its bytes, or the unknown token. If those do not exist either, it is dropped, as in Hugging Face's
   tokenizers. */
static size_t llm__bpe_first_symbols(const llm_tokenizer *t, const uint8_t *p, size_t n, llm__bpe_symbol *s) {
    const uint8_t *end = p + n;
    size_t count = 0;
    for (; !t->sentencepiece && p < end; p++) {
        llm_token id = t->byte_tokens[*p] != LLM__NONE ? t->byte_tokens[*p] : t->unk;
        if (id != LLM__NONE) s[count++].id = id;
    }
    while (p < end) {
        size_t length = llm__utf8_length(p, end), n_bytes = 0;
        llm_token id = length == 1 ? t->ascii_tokens[*p] : llm__vocab_find(t, p, length);
        if (id == LLM__NONE)
            while (n_bytes < length && t->byte_tokens[p[n_bytes]] != LLM__NONE) n_bytes++;
        if (id == LLM__NONE && n_bytes < length) id = t->unk;
        if (id != LLM__NONE) s[count++].id = id;
        else
            for (size_t i = 0; i < n_bytes && n_bytes == length; i++) s[count++].id = t->byte_tokens[p[i]];
        p += length;
    }
    return count;
}

/* ---- Pre-tokenizers: the regular expressions of the models' own tokenizers, by hand ---- */

/* Length in bytes of a contraction 's 't 're 've 'm 'll 'd at p, or 0. With `folded` case does not matter, and a long
   s counts as an s. */
static size_t llm__pre_contraction(const uint8_t *p, const uint8_t *end, bool folded) {
    size_t n = (size_t)(end - p);
    if (n < 2 || *p != '\'') return 0;
    int a = p[1], b = n > 2 ? p[2] : 0;
    if (folded) {
        if (a == 0xC5 && b == 0xBF) return 3;
        if (a >= 'A' && a <= 'Z') a += 'a' - 'A';
        if (b >= 'A' && b <= 'Z') b += 'a' - 'A';
    }
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    return ((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

/* \s+(?!\S)|\s+ at p, which is white space. A run of white space leaves its last character to the word after it. */
static const uint8_t *llm__pre_space_word(const llm__unicode_classes *c, const uint8_t *p, const uint8_t *end) {
    const uint8_t *last = p, *q = p, *next;
    for (; q < end && (llm__unicode_class_at(c, q, &next) & LLM__SPACE); q = next) last = q;
    return q == end || last == p ? q : last;
}

/* 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
static const uint8_t *llm__pre_gpt2_word(const llm__unicode_classes *c, const uint8_t *p, const uint8_t *end) {
    const uint8_t *q = p + (*p == ' ' && p + 1 < end), *next;
    size_t n = llm__pre_contraction(p, end, false);
    if (n) return p + n;
    unsigned first = llm__unicode_class_at(c, q, &next);
    if (first & LLM__SPACE) return llm__pre_space_word(c, p, end);
    if (first & LLM__LETTER) return llm__unicode_skip(c, next, end, LLM__LETTER, true);
    if (first & LLM__NUMBER) return llm__unicode_skip(c, next, end, LLM__NUMBER, true);
    return llm__unicode_skip(c, next, end, LLM__SPACE | LLM__LETTER | LLM__NUMBER, false);
}

/* \p{N}{1,most}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+ at p, where no word of letters begins. With
   `slash`, [\r\n/]* takes the place of [\r\n]*. */
static const uint8_t *llm__pre_wordless(const llm__unicode_classes *c, const llm__pre_rule *rule, const uint8_t *p,
                                        const uint8_t *end, bool slash) {
    const uint8_t *q, *after, *newline = NULL;
    unsigned first = llm__unicode_class_at(c, p, &q);
    if (first & LLM__NUMBER) {
        for (int i = 1; i < rule->most && q < end && (llm__unicode_class_at(c, q, &after) & LLM__NUMBER); i++)
            q = after;
        return q;
    }
    unsigned second = q < end ? llm__unicode_class_at(c, q, &after) : (unsigned)LLM__SPACE;
    if (!(first & LLM__SPACE) || (*p == ' ' && !(second & (LLM__SPACE | LLM__LETTER | LLM__NUMBER)))) {
        q = llm__unicode_skip(c, q, end, LLM__SPACE | LLM__LETTER | LLM__NUMBER, false);
        while (q < end && (*q == '\r' || *q == '\n' || (slash && *q == '/'))) q++;
        return q;
    }
    for (q = p; q < end && (llm__unicode_class_at(c, q, &after) & LLM__SPACE); q = after)
        if (*q == '\r' || *q == '\n') newline = q;
    return newline ? newline + 1 : llm__pre_space_word(c, p, end);
}

/* (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|... */
static const uint8_t *llm__pre_llama3_word(const llm__unicode_classes *c, const llm__pre_rule *rule, const uint8_t *p,
                                           const uint8_t *end) {
    const uint8_t *q, *after;
    size_t n = llm__pre_contraction(p, end, true);
    if (n) return p + n;
    unsigned first = llm__unicode_class_at(c, p, &q);
    if (first & LLM__LETTER) return llm__unicode_skip(c, q, end, LLM__LETTER, true);
    if (!(first & LLM__NUMBER) && *p != '\r' && *p != '\n' && q < end &&
        (llm__unicode_class_at(c, q, &after) & LLM__LETTER))
        return llm__unicode_skip(c, after, end, LLM__LETTER, true);
    return llm__pre_wordless(c, rule, p, end, false);
}

/* [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+ at p, or with + and * swapped if `upper`. Returns NULL if
   it does not match. If no lower case follows, the first part gives back characters that the second can begin with. */
static const uint8_t *llm__pre_cased_letters(const llm__unicode_classes *c, const uint8_t *p, const uint8_t *end,
                                             bool upper) {
    const unsigned either = LLM__CASELESS | LLM__MARK;
    const uint8_t *q = p, *given = NULL, *next;
    for (unsigned seen; q < end && ((seen = llm__unicode_class_at(c, q, &next)) & (LLM__UPPER | either)); q = next)
        if (seen & either) given = next;
    const uint8_t *lower = llm__unicode_skip(c, q, end, LLM__LOWER | either, true);
    if (lower > q) return upper && q == p ? NULL : lower;
    return upper ? (q > p ? q : NULL) : given;
}

/* Words in which case matters: upper case cannot follow lower case. Like the rule above, except for
   [^\r\n\p{L}\p{N}]?<cased letters>(?i:'s|...)? */
static const uint8_t *llm__pre_cased_word(const llm__unicode_classes *c, const llm__pre_rule *rule, const uint8_t *p,
                                          const uint8_t *end) {
    const uint8_t *second, *q = NULL;
    unsigned first = llm__unicode_class_at(c, p, &second);
    bool skips = !(first & (LLM__LETTER | LLM__NUMBER)) && *p != '\r' && *p != '\n';
    for (int upper = 0; upper < 2 && !q; upper++) {
        if (skips) q = llm__pre_cased_letters(c, second, end, upper);
        if (!q) q = llm__pre_cased_letters(c, p, end, upper);
    }
    if (!q) return llm__pre_wordless(c, rule, p, end, true);
    return q + (rule->contractions ? llm__pre_contraction(q, end, true) : 0);
}

static bool llm__pre_in_run(const llm__unicode_classes *c, const llm__pre_rule *rule, const uint8_t *p,
                            const uint8_t **next) {
    if (llm__unicode_class_at(c, p, next) & rule->classes) return true;
    uint32_t code = rule->n_ranges ? llm__utf8_decode(p, next) : 0;
    for (size_t i = 0; i < rule->n_ranges && rule->ranges[2 * i] <= code; i++)
        if (code <= rule->ranges[2 * i + 1]) return true;
    return false;
}

/* The end of the run at p, or NULL if the run is too short. */
static const uint8_t *llm__pre_run_end(const llm__unicode_classes *c, const llm__pre_rule *rule, const uint8_t *p,
                                       const uint8_t *end) {
    const uint8_t *next;
    int n = 0;
    for (; p < end && n < rule->most && llm__pre_in_run(c, rule, p, &next); p = next) n++;
    return n < rule->least ? NULL : p;
}

static const uint8_t *llm__pre_find_run(const llm__unicode_classes *c, const llm__pre_rule *rule, const uint8_t *p,
                                        const uint8_t *end, const uint8_t **from) {
    const uint8_t *next, *q = NULL;
    if (!rule->space && !rule->n_ranges)
        p = llm__unicode_skip(c, p, end, rule->classes, false); /* skips most of the text quickly */
    for (; p < end; p = next) {
        bool space = llm__unicode_class_at(c, p, &next) & LLM__SPACE;
        q = rule->space && space ? llm__pre_run_end(c, rule, next, end) : NULL;
        if (!q) q = llm__pre_run_end(c, rule, p, end);
        if (q && (q == end || !rule->to_end)) break;
        if (q) next = q;
    }
    *from = p;
    return p < end ? q : end;
}

/* Finds the next word from p on. Returns its end; *from is its start. */
static const uint8_t *llm__pre_find_word(const llm__unicode_classes *c, const llm__pre_rule *rule, const uint8_t *p,
                                         const uint8_t *end, const uint8_t **from) {
    const uint8_t *space;
    *from = p;
    switch (rule->kind) {
    case LLM__RULE_RUN: return llm__pre_find_run(c, rule, p, end, from);
    case LLM__RULE_GPT2: return llm__pre_gpt2_word(c, p, end);
    case LLM__RULE_LLAMA3: return llm__pre_llama3_word(c, rule, p, end);
    case LLM__RULE_CASED: return llm__pre_cased_word(c, rule, p, end);
    case LLM__RULE_METASPACE: /* a word includes the space before it */
        space = (const uint8_t *)memchr(p + 1, ' ', (size_t)(end - p) - 1);
        return space ? space : end;
    default: return end;
    }
}

/* ---- Words of ASCII, found in 64 bytes at a time ---- */

/* The kinds of 64 bytes of text: bit i of a mask is about byte i. */
typedef struct llm__pre_block {
    uint64_t letters, upper, digits, spaces, blanks, newlines; /* of ASCII; some are parts of others; blank: ' ' */
    uint64_t high;                                             /* bytes of other characters */
} llm__pre_block;

enum { LLM__BLOCK = 64, LLM__BLOCK_READ = LLM__BLOCK + 16, LLM__BLOCK_LAST = LLM__BLOCK - 2 };

#if defined(__SSE2__) && !defined(LLM_NO_SIMD)
static inline llm__pre_block llm__pre_classify(const uint8_t *p) {
#define LLM__IN(c, first, n)                                                                  \
    _mm_cmpeq_epi8(_mm_min_epu8(_mm_sub_epi8(c, _mm_set1_epi8(first)), _mm_set1_epi8((n)-1)), \
                   _mm_sub_epi8(c, _mm_set1_epi8(first)))
#define LLM__BITS(mask) ((uint64_t)(unsigned)_mm_movemask_epi8(mask) << i)
    llm__pre_block b = {0, 0, 0, 0, 0, 0, 0};
    for (int i = 0; i < LLM__BLOCK; i += 16) {
        __m128i c = _mm_loadu_si128((const __m128i *)(const void *)(p + i));
        __m128i folded = _mm_or_si128(c, _mm_set1_epi8(32));
        b.letters |= LLM__BITS(LLM__IN(folded, 'a', 26));
        b.upper |= LLM__BITS(LLM__IN(c, 'A', 26));
        b.digits |= LLM__BITS(LLM__IN(c, '0', 10));
        b.blanks |= LLM__BITS(_mm_cmpeq_epi8(c, _mm_set1_epi8(' ')));
        b.spaces |= LLM__BITS(_mm_or_si128(_mm_cmpeq_epi8(c, _mm_set1_epi8(' ')), LLM__IN(c, '\t', 5)));
        b.newlines |= LLM__BITS(_mm_cmpeq_epi8(c, _mm_set1_epi8('\n')));
        b.newlines |= LLM__BITS(_mm_cmpeq_epi8(c, _mm_set1_epi8('\r')));
        b.high |= LLM__BITS(c);
    }
    return b;
#undef LLM__IN
#undef LLM__BITS
}
#elif defined(__aarch64__) && !defined(LLM_NO_SIMD)
/* One bit per byte of four vectors of 0 or 255. */
static inline uint64_t llm__pre_bits(const uint8x16_t m[4]) {
    static const uint8_t weights[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint8x16_t w = vld1q_u8(weights);
    uint8x16_t lo = vpaddq_u8(vandq_u8(m[0], w), vandq_u8(m[1], w));
    uint8x16_t hi = vpaddq_u8(vandq_u8(m[2], w), vandq_u8(m[3], w));
    lo = vpaddq_u8(lo, hi);
    return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(lo, lo)), 0);
}
static inline llm__pre_block llm__pre_classify(const uint8_t *p) {
#define LLM__IN(c, first, n) vcltq_u8(vsubq_u8(c, vdupq_n_u8(first)), vdupq_n_u8(n))
    uint8x16_t letters[4], upper[4], digits[4], spaces[4], blanks[4], newlines[4], high[4];
    for (int i = 0; i < 4; i++) {
        uint8x16_t c = vld1q_u8(p + 16 * i);
        letters[i] = LLM__IN(vorrq_u8(c, vdupq_n_u8(32)), 'a', 26);
        upper[i] = LLM__IN(c, 'A', 26);
        digits[i] = LLM__IN(c, '0', 10);
        blanks[i] = vceqq_u8(c, vdupq_n_u8(' '));
        spaces[i] = vorrq_u8(blanks[i], LLM__IN(c, '\t', 5));
        newlines[i] = vorrq_u8(vceqq_u8(c, vdupq_n_u8('\n')), vceqq_u8(c, vdupq_n_u8('\r')));
        high[i] = vcgeq_u8(c, vdupq_n_u8(0x80));
    }
    llm__pre_block b = {llm__pre_bits(letters), llm__pre_bits(upper),    llm__pre_bits(digits), llm__pre_bits(spaces),
                        llm__pre_bits(blanks),  llm__pre_bits(newlines), llm__pre_bits(high)};
    return b;
#undef LLM__IN
}
#else
static inline llm__pre_block llm__pre_classify(const uint8_t *p) {
    llm__pre_block b = {0, 0, 0, 0, 0, 0, 0};
    for (int i = 0; i < LLM__BLOCK; i++) {
        unsigned c = p[i];
        b.letters |= (uint64_t)((c | 32) - 'a' < 26) << i;
        b.upper |= (uint64_t)(c - 'A' < 26) << i;
        b.digits |= (uint64_t)(c - '0' < 10) << i;
        b.spaces |= (uint64_t)(c == ' ' || c - '\t' < 5) << i;
        b.blanks |= (uint64_t)(c == ' ') << i;
        b.newlines |= (uint64_t)(c == '\n' || c == '\r') << i;
        b.high |= (uint64_t)(c >= 0x80) << i;
    }
    return b;
}
#endif

/* Where the ones from bit i < 64 on end; at most 63. */
static inline unsigned llm__pre_ones_end(uint64_t mask, unsigned i) {
    return i + (unsigned)__builtin_ctzll(~(mask >> i) | (uint64_t)1 << (63 - i));
}

/* The characters that a word of letters may begin with, besides letters. */
static inline uint64_t llm__pre_before(const llm__pre_rule *rule, const llm__pre_block *b) {
    return rule->kind == LLM__RULE_GPT2 ? b->blanks : ~(b->letters | b->digits | b->newlines | b->high);
}

/* The end of the word at p[i], in a block at p of which LLM__BLOCK_READ bytes can be read, by the same rules as
   llm__pre_find_word. Returns i if the block does not show the end: the word has other characters, or is too long.
   `before` is from llm__pre_before. */
static inline unsigned llm__pre_block_word(const llm__pre_rule *rule, const llm__pre_block *b, uint64_t before,
                                           const uint8_t *p, unsigned i) {
    const bool gpt2 = rule->kind == LLM__RULE_GPT2, cased = rule->kind == LLM__RULE_CASED;
    const uint64_t marks = ~(b->letters | b->digits | b->spaces | b->high);
    unsigned from = i + (unsigned)(before >> i & 1), end;
    if (p[i] == '\'' && !cased) {
        size_t n = llm__pre_contraction(p + i, p + LLM__BLOCK_READ, !gpt2);
        if (n) return i + (unsigned)n;
    }
    if (b->letters >> from & 1) {
        end = cased ? llm__pre_ones_end(b->letters & ~b->upper, llm__pre_ones_end(b->upper, from))
                    : llm__pre_ones_end(b->letters, from);
        if (end > LLM__BLOCK_LAST || (b->high >> end & 1)) return i;
        if (cased && rule->contractions) end += (unsigned)llm__pre_contraction(p + end, p + LLM__BLOCK_READ, true);
        return end;
    }
    from = i + (p[i] == ' ');
    if (marks >> from & 1) {
        end = llm__pre_ones_end(marks, from);
        while (!gpt2 && end <= LLM__BLOCK_LAST && (p[end] == '\n' || p[end] == '\r' || (cased && p[end] == '/'))) end++;
        return end > LLM__BLOCK_LAST || (b->high >> end & 1) ? i : end;
    }
    if (!gpt2) from = i;
    if (b->digits >> from & 1) {
        end = llm__pre_ones_end(b->digits, from);
        if (!gpt2 && end - from > (unsigned)rule->most) return from + (unsigned)rule->most;
        return end > LLM__BLOCK_LAST || (b->high >> end & 1) ? i : end;
    }
    end = llm__pre_ones_end(b->spaces, i);
    if (end == i || end > LLM__BLOCK_LAST || (b->high >> end & 1)) return i;
    uint64_t newlines = gpt2 ? 0 : b->newlines >> i & (((uint64_t)1 << (end - i)) - 1);
    if (newlines) return i + 64 - (unsigned)__builtin_clzll(newlines);
    return end == i + 1 ? end : end - 1;
}

/* ---- Encoding ---- */

typedef struct llm__enc_span {
    size_t begin, end;
} llm__enc_span;

typedef struct llm__enc_job {
    llm__env *env;
    const llm_tokenizer *t;
    const uint8_t *text, *end;
    unsigned flags;
    const llm__enc_span *plain; /* stretches of the text, in order, in which special tokens are plain text */
    size_t n_plain;
    llm_token *ids;
    size_t capacity, count;
    llm_token last;
    bool after_bos;               /* only the BOS that the file asks for has been emitted so far */
    struct llm__enc_known *known; /* [2^known_bits][2]; NULL: no words are remembered */
    int known_bits;
} llm__enc_job;

static void llm__enc_emit(llm__enc_job *job, llm_token id) {
    bool twice = job->after_bos && id == job->t->bos;
    job->after_bos = false;
    if (twice) return;
    if (job->count < job->capacity) job->ids[job->count] = id;
    job->count++;
    job->last = id;
}

/* *unknown: the word so far ends in an unknown token. */
static void llm__enc_merge_word(llm__enc_job *job, const uint8_t *p, size_t n, bool *unknown) {
    const llm_tokenizer *t = job->t;
    llm__bpe_symbol few[LLM__SHORT_WORD], *s = few;
    if (n > LLM__SHORT_WORD) s = (llm__bpe_symbol *)llm__alloc(job->env, n, sizeof *s);
    size_t count = llm__bpe_merge(job->env, t, s, llm__bpe_first_symbols(t, p, n, s));
    for (size_t i = 0; i < count; i++) {
        bool before = *unknown;
        *unknown = s[i].id == t->unk;
        if (!(before && *unknown && t->fuse_unk)) llm__enc_emit(job, s[i].id);
    }
    if (s != few) llm__free(job->env->pool, s);
}

/* Emits the token that equals all these bytes, if there is one and merging would produce it. */
static bool llm__enc_whole(llm__enc_job *job, const uint8_t *p, const uint8_t *end, bool anyhow) {
    llm_token id = llm__vocab_find(job->t, p, (size_t)(end - p));
    if (id == LLM__NONE || !(anyhow || (job->t->flags[id] & LLM__WHOLE_PIECE))) return false;
    llm__enc_emit(job, id);
    return true;
}

static void llm__enc_word(llm__enc_job *job, const uint8_t *p, const uint8_t *end) {
    bool unknown = false;
    if (llm__enc_whole(job, p, end, job->t->ignore_merges)) return;
    for (const uint8_t *begin = p; p < end;) {
        const uint8_t *q = p + 1;
        while (q < end && llm__bpe_may_join(job->t, q)) q++;
        if (!(p == begin && q == end) && llm__enc_whole(job, p, q, false)) unknown = false;
        else llm__enc_merge_word(job, p, (size_t)(q - p), &unknown);
        p = q;
    }
}

/* A word of up to 15 bytes and its tokens, if they are at most 3. */
typedef struct llm__enc_known {
    uint64_t key[2]; /* the bytes, zeros, and the length in the last byte; all 0: the slot is free */
    llm_token ids[3], count;
} llm__enc_known;

enum { LLM__KNOWN_LENGTH = 15, LLM__KNOWN_TEXT = 8192, LLM__KNOWN_MAX_BITS = 15 };

/* Most words of a long text have occurred in it before. So a call with LLM__KNOWN_TEXT bytes or more remembers words in
   a table of up to 2 MB, most of which stays in the second-level cache. The table belongs to the call, so a tokenizer
   stays const. If the table cannot be allocated, encoding is only slower. */
static void llm__enc_remember_words(llm__enc_job *job) {
    size_t n = (size_t)(job->end - job->text);
    int bits = 9;
    if (n < LLM__KNOWN_TEXT) return;
    while (bits < LLM__KNOWN_MAX_BITS && n >> bits > 16) bits++;
    job->known = (llm__enc_known *)llm__alloc_try(job->env->pool, (size_t)1 << bits, 2 * sizeof *job->known);
    if (job->known) memset(job->known, 0, 2 * sizeof *job->known << bits);
    job->known_bits = bits;
}

/* Encodes a word that no slot holds, and puts it into this set of two if it fits: the newest word comes first. */
static void llm__enc_new_word(llm__enc_job *job, const uint8_t *p, const uint8_t *end, llm__enc_known *set,
                              const uint64_t key[2]) {
    llm__enc_job alone = *job;
    llm__enc_known word = {{key[0], key[1]}, {0, 0, 0}, 0};
    alone.ids = word.ids;
    alone.capacity = 3;
    alone.count = 0;
    alone.after_bos = false;
    llm__enc_word(&alone, p, end);
    if (!alone.count || alone.count > 3) {
        llm__enc_word(job, p, end);
        return;
    }
    word.count = (llm_token)alone.count;
    for (size_t i = 0; i < alone.count; i++) llm__enc_emit(job, word.ids[i]);
    set[1] = set[0];
    set[0] = word;
}

/* A word and where it is to be looked up. */
typedef struct llm__enc_seen {
    const uint8_t *p;
    size_t n;
    uint64_t key[2];
    llm__enc_known *set; /* NULL: the word is not looked up */
} llm__enc_seen;

/* Prepares the look-up of the word of n bytes at p, where 16 bytes can be read. */
static inline llm__enc_seen llm__enc_see(const llm__enc_job *job, const uint8_t *p, size_t n) {
    static const uint8_t ones[32] = {255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
    llm__enc_seen w = {p, n, {0, 0}, NULL};
    uint64_t mask[2];
    if (n > LLM__KNOWN_LENGTH || !job->known) return w;
    memcpy(w.key, p, 16);
    memcpy(mask, ones + 16 - n, 16);
    w.key[0] &= mask[0];
    w.key[1] = (w.key[1] & mask[1]) | (uint64_t)n << 56;
    uint64_t hash = (w.key[0] ^ w.key[1] * 0xD6E8FEB86659FD93u) * 0x9E3779B97F4A7C15u;
    w.set = &job->known[hash >> (64 - job->known_bits) << 1];
    __builtin_prefetch(w.set);
    return w;
}

static inline void llm__enc_seen_word(llm__enc_job *job, const llm__enc_seen *w) {
    if (!w->set) {
        llm__enc_word(job, w->p, w->p + w->n);
        return;
    }
    llm__enc_known *slot = w->set;
    slot += ((slot->key[0] ^ w->key[0]) | (slot->key[1] ^ w->key[1])) != 0;
    if ((slot->key[0] ^ w->key[0]) | (slot->key[1] ^ w->key[1])) {
        llm__enc_new_word(job, w->p, w->p + w->n, w->set, w->key);
        return;
    }
    size_t count = (size_t)slot->count;
    if (job->after_bos || job->count + 3 > job->capacity) {
        for (size_t i = 0; i < count; i++) llm__enc_emit(job, slot->ids[i]);
        return;
    }
    /* We copy all 3, which takes no branch. The next word overwrites those that do not count. */
    memcpy(job->ids + job->count, slot->ids, sizeof slot->ids);
    job->count += count;
    job->last = slot->ids[count - 1];
}

/* Encodes words of the last rule from p on as long as blocks show their ends, and returns the end of the last one. The
   words of a block are first found, then looked up, so that the memory they are looked up in is there by then. Where the
   next bytes are not all ASCII, a block would probably show nothing. */
static const uint8_t *llm__enc_blocks(llm__enc_job *job, const llm__pre_rule *rule, const uint8_t *p,
                                      const uint8_t *end) {
    llm__enc_seen words[LLM__BLOCK];
    uint64_t eight;
    while (end - p >= LLM__BLOCK_READ && (memcpy(&eight, p, 8), !(eight & 0x8080808080808080u))) {
        llm__pre_block b = llm__pre_classify(p);
        uint64_t before = llm__pre_before(rule, &b);
        unsigned i = 0, to, n = 0;
        for (; i < LLM__BLOCK_LAST && (to = llm__pre_block_word(rule, &b, before, p, i)) != i; i = to)
            words[n++] = llm__enc_see(job, p + i, to - i);
        if (!n) break;
        for (unsigned k = 0; k < n; k++) llm__enc_seen_word(job, &words[k]);
        p += i;
    }
    return p;
}

static void llm__enc_one_word(llm__enc_job *job, const uint8_t *p, const uint8_t *to, const uint8_t *end) {
    if (end - p < 16) {
        llm__enc_word(job, p, to);
        return;
    }
    llm__enc_seen word = llm__enc_see(job, p, (size_t)(to - p));
    llm__enc_seen_word(job, &word);
}

/* Encodes a text that needs no rules, where no merge crosses the front of the first space in a run. It is cut there, so
   that words can be remembered. */
static void llm__enc_spaced(llm__enc_job *job, const uint8_t *p, const uint8_t *end) {
    llm__enc_seen words[LLM__BLOCK];
    const uint8_t *from = p;
    for (; end - p >= LLM__BLOCK_READ; p += LLM__BLOCK) {
        unsigned n = 0;
        uint64_t blanks = llm__pre_classify(p).blanks, cuts = blanks & ~(blanks << 1);
        if (p == from || p[-1] == ' ') cuts &= ~(uint64_t)1;
        for (; cuts; cuts &= cuts - 1) {
            const uint8_t *to = p + __builtin_ctzll(cuts);
            words[n++] = llm__enc_see(job, from, (size_t)(to - from));
            from = to;
        }
        for (unsigned k = 0; k < n; k++) llm__enc_seen_word(job, &words[k]);
    }
    for (const uint8_t *to = p > from ? p : from + 1; to < end; to++) {
        if (*to != ' ' || to[-1] == ' ') continue;
        llm__enc_one_word(job, from, to, end);
        from = to;
    }
    llm__enc_one_word(job, from, end, end);
}

static void llm__enc_split(llm__enc_job *job, const llm__pre_rule *rule, const uint8_t *p, const uint8_t *end) {
    if (rule->kind == LLM__NO_RULE && job->t->spaces_cut) {
        llm__enc_spaced(job, p, end);
        return;
    }
    bool is_last = rule[0].kind == LLM__NO_RULE || rule[1].kind == LLM__NO_RULE;
    bool blocks = is_last && rule->kind >= LLM__RULE_GPT2 && rule->kind <= LLM__RULE_CASED;
    while (p < end) {
        if (blocks && (p = llm__enc_blocks(job, rule, p, end)) == end) break;
        const uint8_t *from, *to = llm__pre_find_word(job->t->classes, rule, p, end, &from);
        if (from > p) llm__enc_split(job, rule + 1, p, from);
        if (to == from) break; /* the text ends */
        if (!is_last) llm__enc_split(job, rule + 1, from, to);
        else llm__enc_one_word(job, from, to, end);
        p = to;
    }
}

static bool llm__unicode_is_word_char(const llm__unicode_classes *c, const uint8_t *p) {
    const uint8_t *next;
    return *p == '_' || (llm__unicode_class_at(c, p, &next) & (LLM__LETTER | LLM__MARK | LLM__NUMBER));
}

/* True if the token may stand at p in a text from `begin` to `end`. A control token must also end before
   `control_end`. */
static bool llm__special_fits(const llm_tokenizer *t, const llm__special *s, const uint8_t *begin, const uint8_t *p,
                              const uint8_t *end, const uint8_t *control_end) {
    const uint8_t *after = p + s->text.n;
    bool control = llm__vocab_type_of(t, s->id) != LLM__TYPE_USER_DEFINED;
    if (control && (control_end <= p || s->text.n > (size_t)(control_end - p))) return false;
    if (!(t->flags[s->id] & LLM__SINGLE_WORD)) return true;
    return (p == begin || !llm__unicode_is_word_char(t->classes, llm__utf8_before(p))) &&
           (after == end || !llm__unicode_is_word_char(t->classes, after));
}

/* The longest special token at p, or NULL. */
static const llm__special *llm__special_at(const llm_tokenizer *t, const llm__special_set *set, const uint8_t *begin,
                                           const uint8_t *p, const uint8_t *end, const uint8_t *control_end) {
    int lo = 0, hi = set->n;
    size_t n = (size_t)(end - p), same = 0;
    while (lo < hi) { /* finds the first that sorts after the text; every prefix of the text sorts before it */
        int mid = (lo + hi) / 2;
        llm__str s = set->items[mid].text;
        int order = memcmp(s.at, p, s.n < n ? s.n : n);
        if (order < 0 || (order == 0 && s.n <= n)) lo = mid + 1;
        else hi = mid;
    }
    if (!lo) return NULL;
    llm__str nearest = set->items[lo - 1].text;
    while (same < n && same < nearest.n && (uint8_t)nearest.at[same] == p[same]) same++;
    for (int i = lo - 1; i != LLM__NONE; i = set->items[i].prefix)
        if (set->items[i].text.n <= same && llm__special_fits(t, &set->items[i], begin, p, end, control_end))
            return &set->items[i];
    return NULL;
}

/* Up to where, from p on, control tokens are recognised. *span is the first plain stretch that ends after p. */
static const uint8_t *llm__special_control_end(const llm__enc_job *job, const uint8_t *p, size_t *span) {
    size_t at = (size_t)(p - job->text);
    if (!(job->flags & LLM_TOKENS_SPECIAL)) return p;
    while (*span < job->n_plain && job->plain[*span].end <= at) ++*span;
    if (*span == job->n_plain) return job->end;
    return at >= job->plain[*span].begin ? p : job->text + job->plain[*span].begin;
}

/* The first byte from p on with which a special token of these kinds starts, or end. There are few such bytes, so we let
   memchr find them, in pieces of the text that bound the time for a byte that never comes. */
static const uint8_t *llm__special_start(const llm__special_set *set, unsigned wanted, const uint8_t *p,
                                         const uint8_t *end) {
    while (set->n_firsts <= LLM__FEW_FIRSTS && p < end) {
        size_t n = end - p > 4096 ? 4096 : (size_t)(end - p), found = n;
        for (int i = 0; i < set->n_firsts; i++) {
            const void *at = set->starts[set->firsts[i]] & wanted ? memchr(p, set->firsts[i], found) : NULL;
            if (at) found = (size_t)((const uint8_t *)at - p);
        }
        p += found;
        if (found < n) return p;
    }
    while (p < end && !(set->starts[*p] & wanted)) p++;
    return p;
}

typedef struct llm__special_match {
    llm_token id;
    const uint8_t *begin, *end; /* including the white space that the token swallows */
} llm__special_match;

/* Finds the next special token from `from` on in a text that begins at `begin`. `span` is as in
   llm__special_control_end; NULL restricts the search to user-defined tokens. */
static bool llm__special_next(const llm__enc_job *job, const llm__special_set *set, const uint8_t *begin,
                              const uint8_t *from, const uint8_t *end, size_t *span, llm__special_match *m) {
    const llm_tokenizer *t = job->t;
    unsigned wanted = span && (job->flags & LLM_TOKENS_SPECIAL) ? 3 : 1;
    if (!(set->kinds & wanted)) return false;
    for (const uint8_t *p = from; (p = llm__special_start(set, wanted, p, end)) < end; p++) {
        const llm__special *s =
            llm__special_at(t, set, begin, p, end, span ? llm__special_control_end(job, p, span) : p);
        if (!s) continue;
        m->id = s->id;
        m->begin = p;
        m->end = p + s->text.n;
        if (t->flags[s->id] & LLM__LSTRIP) {
            const uint8_t *next;
            while (m->begin > from &&
                   (llm__unicode_class_at(t->classes, llm__utf8_before(m->begin), &next) & LLM__SPACE))
                m->begin = llm__utf8_before(m->begin);
        }
        if (t->flags[s->id] & LLM__RSTRIP) m->end = llm__unicode_skip(t->classes, m->end, end, LLM__SPACE, true);
        return true;
    }
    return false;
}

/* Encodes text between special tokens. If a space may have to be added, the caller has left room for it. */
static void llm__enc_plain(llm__enc_job *job, const uint8_t *p, const uint8_t *end, bool first) {
    llm__vocab_prefix prefix = job->t->prefix;
    if (p == end) return;
    if (*p != ' ' && (prefix == LLM__PREFIX_UNSPACED || (prefix == LLM__PREFIX_FIRST && first))) {
        p--;
        *(uint8_t *)(uintptr_t)p = ' ';
    }
    llm__enc_split(job, job->t->rules, p, end);
}

static void llm__enc_normalized(llm__enc_job *job, const uint8_t *p, const uint8_t *end, bool first) {
    llm__special_match m;
    const uint8_t *from = p;
    for (; llm__special_next(job, &job->t->normalized, p, from, end, NULL, &m); from = m.end) {
        llm__enc_plain(job, from, m.begin, first && from == p);
        llm__enc_emit(job, m.id);
    }
    llm__enc_plain(job, from, end, first && from == p);
}

/* Copies the text with a space in front. With `marks`, U+2581 becomes a space. */
static uint8_t *llm__enc_to_spaces(llm__env *env, bool marks, const uint8_t *p, const uint8_t *end, size_t *n) {
    uint8_t *out = (uint8_t *)llm__alloc(env, (size_t)(end - p) + 1, 1);
    out[0] = ' ';
    for (*n = 1; p < end;) {
        const uint8_t *q = marks ? (const uint8_t *)memchr(p, 0xE2, (size_t)(end - p)) : NULL;
        size_t plain = (size_t)((q ? q : end) - p);
        memcpy(out + *n, p, plain);
        *n += plain;
        p += plain;
        if (p == end) break;
        bool mark = !memcmp(p, "\xE2\x96\x81", 3); /* the text is well formed, so all three bytes are there */
        out[(*n)++] = mark ? ' ' : *p;
        p += mark ? 3 : 1;
    }
    return out;
}

static void llm__enc_stretch(llm__enc_job *job, const uint8_t *p, const uint8_t *end) {
    const llm_tokenizer *t = job->t;
    bool first = p == job->text;
    size_t n = 0;
    uint8_t *composed = NULL, *spaced = NULL;
    if (p == end) return;
    if (t->nfc) composed = llm__nfc_apply(job->env, t->nfc, p, end, &n);
    if (composed) {
        p = composed;
        end = composed + n;
    }
    if (t->sentencepiece || t->prefix) {
        spaced = llm__enc_to_spaces(job->env, t->sentencepiece, p, end, &n);
        p = spaced + (t->prefix != LLM__PREFIX_STRETCH);
        end = spaced + n;
    }
    llm__enc_normalized(job, p, end, first);
    llm__free(job->env->pool, spaced);
    llm__free(job->env->pool, composed);
}

static void llm__enc_text(llm__enc_job *job) {
    const uint8_t *from = job->text;
    llm__special_match m;
    size_t span = 0;
    for (; llm__special_next(job, &job->t->raw, job->text, from, job->end, &span, &m); from = m.end) {
        llm__enc_stretch(job, from, m.begin);
        llm__enc_emit(job, m.id);
    }
    llm__enc_stretch(job, from, job->end);
}

static void llm__enc_body(llm__env *env, void *arg) {
    llm__enc_job *job = (llm__enc_job *)arg;
    bool ends = (job->flags & LLM_TOKENS_ENDS) != 0;
    job->env = env;
    job->text = llm__utf8_valid(env, job->text, &job->end);
    llm__enc_remember_words(job);
    if (ends && job->t->add_bos && job->t->bos != LLM__NONE) {
        llm__enc_emit(job, job->t->bos);
        job->after_bos = true;
    }
    llm__enc_text(job);
    if (ends && job->t->add_eos && job->t->eos != LLM__NONE && job->last != job->t->eos)
        llm__enc_emit(job, job->t->eos);
}

static llm__enc_job llm__enc_job_init(const llm_tokenizer *t, const char *text, size_t n_bytes, unsigned flags,
                                      llm_token *ids, size_t capacity) {
    llm__enc_job job;
    memset(&job, 0, sizeof job);
    job.t = t;
    job.text = (const uint8_t *)(text ? text : "");
    job.end = job.text + (text ? n_bytes : 0);
    job.flags = flags;
    job.ids = ids;
    job.capacity = ids ? capacity : 0;
    job.last = LLM__NONE;
    return job;
}

/* llm_encode inside llm__env_run. `spans` are stretches in which special tokens are plain text; with spans the text
   must be valid UTF-8. */
static size_t llm__enc_spans(llm__env *env, const llm_tokenizer *t, const char *text, size_t n_bytes, unsigned flags,
                             const llm__enc_span *plain, size_t n_plain, llm_token *ids, size_t capacity) {
    llm__enc_job job = llm__enc_job_init(t, text, n_bytes, flags, ids, capacity);
    job.plain = plain;
    job.n_plain = n_plain;
    llm__enc_body(env, &job);
    return job.count;
}

LLM_API int64_t llm_encode(const llm_tokenizer *tokenizer, const char *text, size_t n_bytes, unsigned flags,
                           llm_token *ids, size_t capacity, llm_error *err) {
    llm__enc_job job = llm__enc_job_init(tokenizer, text, n_bytes, flags, ids, capacity);
    llm__pool pool;
    llm__env env;
    llm__pool_init(&pool, &tokenizer->host);
    llm__env_init(&env, &pool, err, NULL);
    llm_status status = llm__env_run(&env, llm__enc_body, &job);
    llm__pool_free(&pool);
    return llm__error_done(err, status) ? -1 : (int64_t)job.count;
}

/* ---- Decoding ---- */

LLM_API const char *llm_token_bytes(const llm_tokenizer *tokenizer, llm_token id, size_t *n_bytes) {
    llm__str s = {NULL, 0};
    if (id >= 0 && id < tokenizer->n_vocab) s = llm__vocab_piece(tokenizer, id);
    if (n_bytes) *n_bytes = s.n;
    return s.at;
}

LLM_API bool llm_token_is_special(const llm_tokenizer *tokenizer, llm_token id) {
    if (id < 0 || id >= tokenizer->n_vocab) return false;
    int type = llm__vocab_type_of(tokenizer, id);
    return type == LLM__TYPE_CONTROL || type == LLM__TYPE_UNKNOWN;
}

LLM_API bool llm_token_is_end(const llm_tokenizer *tokenizer, llm_token id) {
    return id >= 0 && id < tokenizer->n_vocab && (tokenizer->flags[id] & LLM__END);
}

LLM_API int llm_tokenizer_n_vocab(const llm_tokenizer *tokenizer) { return tokenizer->n_vocab; }
LLM_API llm_token llm_tokenizer_bos(const llm_tokenizer *tokenizer) { return tokenizer->bos; }
LLM_API llm_token llm_tokenizer_eos(const llm_tokenizer *tokenizer) { return tokenizer->eos; }

/* The text that a token adds, NULL if it is not shown. At the start of a text, the space that SentencePiece added is
   removed. */
static llm__str llm__dec_text(const llm_tokenizer *t, llm_token id, unsigned flags, bool text_begins) {
    llm__str s = {NULL, 0};
    if (id < 0 || id >= t->n_vocab || (llm_token_is_special(t, id) && !(flags & LLM_TOKENS_SPECIAL))) return s;
    s = llm__vocab_piece(t, id);
    if (text_begins && t->strip_prefix && s.n && s.at[0] == ' ') {
        s.at++;
        s.n--;
    }
    return s;
}

LLM_API size_t llm_decode(const llm_tokenizer *tokenizer, const llm_token *ids, size_t n_ids, unsigned flags,
                          char *text, size_t capacity) {
    size_t n = 0;
    bool begins = true;
    for (size_t i = 0; i < n_ids; i++) {
        llm__str s = llm__dec_text(tokenizer, ids[i], flags, begins);
        if (!s.at) continue;
        begins = false;
        if (n < capacity) memcpy(text + n, s.at, s.n < capacity - n ? s.n : capacity - n);
        n += s.n;
    }
    if (capacity) text[n < capacity ? n : capacity - 1] = 0;
    return n;
}

/* Looks at the bytes at p < end. True: they begin with a whole character of *n bytes. False: they begin with *n
   invalid bytes (1) to show as U+FFFD, or, with *n == 0, with a character that more bytes may complete. */
static bool llm__dec_next_character(const uint8_t *p, const uint8_t *end, size_t *n) {
    static const uint8_t completion[3][3] = {{0x80, 0x80, 0x80}, {0x90, 0x80, 0x80}, {0xA0, 0x80, 0x80}};
    uint8_t whole[8];
    size_t have = (size_t)(end - p);
    *n = llm__utf8_length(p, end);
    if (*n) return true;
    *n = 1;
    for (int i = 0; i < 3 && have < 4;
         i++) { /* one of the continuations 80, 90 or A0 completes every completable prefix */
        memcpy(whole, p, have);
        memcpy(whole + have, completion[i], 3);
        if (llm__utf8_length(whole, whole + have + 3) > have) *n = 0;
    }
    return false;
}

LLM_API size_t llm_stream_token(const llm_tokenizer *tokenizer, llm_text_stream *stream, llm_token token, char *text,
                                size_t capacity) {
    llm__str s = llm__dec_text(tokenizer, token, stream->flags, !stream->started);
    uint8_t head[8]; /* the pending bytes and the first bytes of the token */
    size_t n_out = 0, at = 0, n_pending = (size_t)stream->n_pending, total = n_pending + s.n;
    for (bool ends = token < 0; at < total;) {
        size_t n, n_head = 0;
        while (n_head < 4 && at + n_head < total) {
            size_t i = at + n_head;
            head[n_head++] = i < n_pending ? stream->pending[i] : (uint8_t)s.at[i - n_pending];
        }
        bool whole = llm__dec_next_character(head, head + n_head, &n);
        if (!n && !ends) break;
        if (!n) n = 1;
        const char *shown = whole ? (const char *)head : "\xEF\xBF\xBD";
        size_t n_shown = whole ? n : 3;
        if (n_out + n_shown < capacity) memcpy(text + n_out, shown, n_shown);
        n_out += n_shown;
        at += n;
    }
    if (n_out >= capacity) return n_out; /* nothing has changed: the caller can try again with more room */
    text[n_out] = 0;
    for (size_t i = 0; at + i < total; i++) /* at most three bytes; the ones that were pending move to the front */
        head[i] = at + i < n_pending ? stream->pending[at + i] : (uint8_t)s.at[at + i - n_pending];
    stream->n_pending = (int)(total - at);
    memcpy(stream->pending, head, total - at);
    if (s.at) stream->started = true;
    return n_out;
}

/* ---- Building a tokenizer ---- */

enum { LLM__MAX_PIECE = 65535, LLM__MAX_SPM_PIECE = 512, LLM__MAX_SPECIAL = 512, LLM__MAX_PROBES = 2000 };

static size_t llm__hash_slots(size_t least) {
    size_t n = 16;
    while (n < least) n *= 2;
    return n;
}

/* The byte that a code point stands for in byte-level pieces, or -1. Each byte is written as a visible character
   there. */
static int llm__vocab_byte_of_code(uint32_t c) {
    if ((c >= 33 && c <= 126) || (c >= 161 && c <= 172) || (c >= 174 && c <= 255)) return (int)c;
    if (c < 256 || c > 323) return -1;
    c -= 256; /* the others, in order: 0 to 32, 127 to 160, 173 */
    return c <= 32 ? (int)c : c <= 66 ? (int)(c - 33 + 127) : 173;
}

/* Writes the bytes that a byte-level piece stands for. False if it has a character that stands for no byte. */
static bool llm__vocab_unmap_bytes(llm__str s, uint8_t *out, size_t *n) {
    const uint8_t *p = (const uint8_t *)s.at, *end = p + s.n;
    for (*n = 0; p < end;) {
        int byte = llm__vocab_byte_of_code(llm__utf8_decode(p, &p));
        if (byte < 0) return false;
        out[(*n)++] = (uint8_t)byte;
    }
    return true;
}

static int llm__vocab_hex_digit(char c) {
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                  : -1;
}

/* "<0x0A>" gives 10; any other text gives -1. */
static int llm__vocab_byte_piece(llm__str s) {
    if (s.n != 6 || memcmp(s.at, "<0x", 3) || s.at[5] != '>') return -1;
    int hi = llm__vocab_hex_digit(s.at[3]), lo = llm__vocab_hex_digit(s.at[4]);
    return hi < 0 || lo < 0 ? -1 : 16 * hi + lo;
}

static llm__vocab_token_type llm__vocab_source_type(llm__env *env, const llm__vocab_source *v, size_t i) {
    if (v->types) {
        if (v->types[i] < LLM__TYPE_NORMAL || v->types[i] > LLM__TYPE_BYTE)
            llm__fail(env, LLM_ERROR_FORMAT, "%s[%llu] is %ld, not a type from 1 to 6", v->types_name,
                      (unsigned long long)i, (long)v->types[i]);
        return (llm__vocab_token_type)v->types[i];
    }
    if (v->sentencepiece && llm__vocab_byte_piece(v->pieces[i]) >= 0) return LLM__TYPE_BYTE;
    bool special = (llm_token)i == v->bos || (llm_token)i == v->eos;
    return (llm_token)i == v->unk ? LLM__TYPE_UNKNOWN : special ? LLM__TYPE_CONTROL : LLM__TYPE_NORMAL;
}

static void llm__vocab_check_piece(llm__env *env, const char *name, size_t i, llm__str s, size_t most) {
    const uint8_t *p = (const uint8_t *)s.at;
    if (!s.n) llm__fail(env, LLM_ERROR_FORMAT, "%s[%llu] is empty", name, (unsigned long long)i);
    if (s.n > most)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "%s[%llu] has %llu bytes; %llu are the most", name, (unsigned long long)i,
                  (unsigned long long)s.n, (unsigned long long)most);
    const uint8_t *bad = llm__utf8_check(p, p + s.n);
    if (bad != p + s.n)
        llm__fail(env, LLM_ERROR_FORMAT, "%s[%llu] is not UTF-8: byte %d is 0x%02X", name, (unsigned long long)i,
                  (int)(bad - p), *bad);
}

/* Adds a token to the hash table of pieces, in which words and merges are looked up. */
static void llm__vocab_index_piece(llm__env *env, llm_tokenizer *t, const llm__vocab_source *v, llm_token id) {
    llm__str s = llm__vocab_piece(t, id);
    uint64_t head;
    size_t probes = 0;
    llm__vocab_piece_slot *slot = llm__vocab_slot_of(t, (const uint8_t *)s.at, s.n, &head, &probes);
    if (slot->id != LLM__NONE)
        llm__fail(env, LLM_ERROR_FORMAT, "%s[%ld] and [%ld] are the same piece: \"%.*s\"", v->pieces_name,
                  (long)slot->id, (long)id, LLM__SHOW(v->pieces[id]));
    if (probes > LLM__MAX_PROBES)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "%s[%ld] collides with too many others", v->pieces_name, (long)id);
    slot->head = head;
    slot->n = (uint32_t)s.n;
    slot->id = id;
    if (s.n > t->longest_piece) t->longest_piece = s.n;
    for (size_t i = 1; i < s.n; i++) {
        uint8_t left = (uint8_t)s.at[i - 1], right = (uint8_t)s.at[i];
        t->joined[left][right / 8] |= (uint8_t)(1 << right % 8);
    }
}

/* Writes a SentencePiece text with plain spaces. */
static size_t llm__vocab_unmark_spaces(llm__str s, uint8_t *out) {
    size_t n = 0;
    for (size_t from = 0; from < s.n; n++) {
        bool mark = s.n - from >= 3 && !memcmp(s.at + from, "\xE2\x96\x81", 3);
        out[n] = mark ? ' ' : (uint8_t)s.at[from];
        from += mark ? 3 : 1;
    }
    return n;
}

/* Stores a piece as the bytes it stands for. Returns true if words can contain it. */
static bool llm__vocab_store_piece(llm__env *env, llm_tokenizer *t, const llm__vocab_source *v, size_t i) {
    llm__str s = v->pieces[i];
    uint8_t *out = t->bytes + t->offsets[i];
    size_t n = s.n;
    int type = llm__vocab_type_of(t, (llm_token)i), byte = llm__vocab_byte_piece(s);
    bool in_words = type == LLM__TYPE_NORMAL || (t->flags[i] & LLM__IN_MODEL);
    if (t->sentencepiece && type == LLM__TYPE_BYTE) {
        if (byte < 0)
            llm__fail(env, LLM_ERROR_FORMAT, "%s[%llu] is \"%.*s\", not a byte like \"<0x0A>\"", v->pieces_name,
                      (unsigned long long)i, LLM__SHOW(s));
        out[0] = (uint8_t)byte;
        n = 1;
        t->byte_tokens[byte] = (llm_token)i;
    } else if (t->sentencepiece) {
        n = llm__vocab_unmark_spaces(s, out);
    } else {
        in_words = in_words && llm__vocab_unmap_bytes(s, out, &n);
        if (type != LLM__TYPE_NORMAL) in_words = in_words && n == s.n; /* shown as written */
        if (!in_words) memcpy(out, s.at, n = s.n);
        else if (n == 1) t->byte_tokens[out[0]] = (llm_token)i;
    }
    t->offsets[i + 1] = t->offsets[i] + (uint32_t)n;
    return in_words;
}

static void llm__vocab_build_pieces(llm__env *env, llm_tokenizer *t, const llm__vocab_source *v) {
    uint64_t total = 0;
    t->flags = (uint16_t *)llm__alloc_zero(env, v->n_pieces, sizeof *t->flags);
    for (size_t i = 0; i < v->n_pieces; i++) {
        t->flags[i] = (uint16_t)(llm__vocab_source_type(env, v, i) | (v->traits ? v->traits[i] : 0));
        if (v->pieces[i].n || llm__vocab_type_of(t, (llm_token)i) != LLM__TYPE_UNUSED)
            llm__vocab_check_piece(env, v->pieces_name, i, v->pieces[i], LLM__MAX_PIECE);
        total += v->pieces[i].n;
    }
    if (total > UINT32_MAX)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "%s has %llu bytes", v->pieces_name, (unsigned long long)total);
    size_t room = llm__hash_slots(v->n_pieces + v->n_pieces / 2);
    t->offsets = (uint32_t *)llm__alloc_zero(env, v->n_pieces + 1, sizeof *t->offsets);
    t->bytes = (uint8_t *)llm__alloc(env, (size_t)total, 1);
    t->pieces = (llm__vocab_piece_slot *)llm__alloc(env, room, sizeof *t->pieces);
    t->piece_mask = room - 1;
    memset(t->pieces, 0xFF, room * sizeof *t->pieces);
    memset(t->byte_tokens, 0xFF, sizeof t->byte_tokens);
    for (size_t i = 0; i < v->n_pieces; i++)
        if (llm__vocab_store_piece(env, t, v, i)) llm__vocab_index_piece(env, t, v, (llm_token)i);
    for (int i = 0; i < 128; i++) {
        uint8_t c = (uint8_t)i;
        t->ascii_tokens[i] = llm__vocab_find(t, &c, 1);
    }
}

static void llm__bpe_pairs_resize(llm__env *env, llm_tokenizer *t, size_t room) {
    llm__bpe_pair_slot *old = t->pairs;
    size_t n_old = old ? t->pair_mask + 1 : 0, probes = 0;
    t->pairs = (llm__bpe_pair_slot *)llm__alloc(env, room, sizeof *t->pairs);
    memset(t->pairs, 0xFF, room * sizeof *t->pairs);
    t->pair_mask = room - 1;
    llm__free(env->pool, t->pair_filter);
    t->pair_filter = (uint8_t *)llm__alloc_zero(env, room, 1);
    for (size_t i = 0; i < n_old; i++) {
        if (old[i].left == LLM__NONE) continue;
        *llm__bpe_pair_slot_of(t, old[i].left, old[i].right, &probes) = old[i];
        llm__bpe_filter_pair(t, old[i].left, old[i].right);
    }
    llm__free(env->pool, old);
}

/* A pair that occurs twice gets the rank of its last occurrence, as in Hugging Face's tokenizers. */
static void llm__bpe_add_pair(llm__env *env, llm_tokenizer *t, llm_token left, llm_token right, llm_token merged,
                              uint32_t rank) {
    if (3 * (t->n_pairs + 1) > 2 * (t->pair_mask + 1)) llm__bpe_pairs_resize(env, t, 2 * (t->pair_mask + 1));
    size_t probes = 0;
    llm__bpe_pair_slot *slot = llm__bpe_pair_slot_of(t, left, right, &probes);
    if (slot->left == LLM__NONE) t->n_pairs++;
    if (probes > LLM__MAX_PROBES) llm__fail(env, LLM_ERROR_UNSUPPORTED, "too many merges collide");
    slot->left = left;
    slot->right = right;
    slot->merged = merged;
    slot->rank = rank;
    llm__bpe_filter_pair(t, left, right);
}

/* Merging in byte-level vocabularies begins with pairs of bytes, so these have a table of their own. */
static void llm__bpe_build_byte_pairs(llm__env *env, llm_tokenizer *t) {
    llm_token first = INT32_MAX;
    for (int i = 0; i < 256; i++)
        if (t->byte_tokens[i] != LLM__NONE && t->byte_tokens[i] < first) first = t->byte_tokens[i];
    if (t->sentencepiece || first > INT32_MAX - 256) return;
    llm__bpe_merge_to *table = (llm__bpe_merge_to *)llm__alloc(env, 256 * 256, sizeof *table);
    for (int i = 0; i < 256 * 256; i++) table[i] = llm__bpe_find_pair(t, first + i / 256, first + i % 256);
    t->first_byte = first;
    t->byte_pairs = table;
}

static size_t llm__bpe_unmap_merge(llm__env *env, const llm__vocab_source *v, size_t i, llm__str s, uint8_t *out) {
    size_t n;
    llm__vocab_check_piece(env, v->merges_name, i, s, LLM__MAX_PIECE);
    if (v->sentencepiece) return llm__vocab_unmark_spaces(s, out);
    if (!llm__vocab_unmap_bytes(s, out, &n))
        llm__fail(env, LLM_ERROR_FORMAT, "%s[%llu]: \"%.*s\" is not made of byte characters", v->merges_name,
                  (unsigned long long)i, LLM__SHOW(s));
    return n;
}

static llm_token llm__bpe_merge_token(llm__env *env, const llm_tokenizer *t, const llm__vocab_source *v, size_t i,
                                      const uint8_t *p, size_t n, llm__str shown) {
    llm_token id = llm__vocab_find(t, p, n);
    if (id == LLM__NONE)
        llm__fail(env, LLM_ERROR_FORMAT, "%s[%llu] needs \"%.*s\", which is not in %s", v->merges_name,
                  (unsigned long long)i, LLM__SHOW(shown), v->pieces_name);
    return id;
}

static void llm__bpe_build_merges(llm__env *env, llm_tokenizer *t, const llm__vocab_source *v) {
    uint8_t *joined = (uint8_t *)llm__alloc(env, 2, LLM__MAX_PIECE);
    for (size_t i = 0; i < v->n_merges; i++) {
        llm__str left = v->merges[i].left, right = v->merges[i].right;
        size_t n_left = llm__bpe_unmap_merge(env, v, i, left, joined);
        size_t n_right = llm__bpe_unmap_merge(env, v, i, right, joined + n_left);
        llm_token a = llm__bpe_merge_token(env, t, v, i, joined, n_left, left);
        llm_token b = llm__bpe_merge_token(env, t, v, i, joined + n_left, n_right, right);
        llm_token ab = llm__vocab_find(t, joined, n_left + n_right);
        if (ab == LLM__NONE)
            llm__fail(env, LLM_ERROR_FORMAT, "%s[%llu] makes \"%.*s%.*s\", which is not in %s", v->merges_name,
                      (unsigned long long)i, LLM__SHOW(left), LLM__SHOW(right), v->pieces_name);
        llm__bpe_add_pair(env, t, a, b, ab, (uint32_t)i);
    }
    t->n_ranks = (uint32_t)v->n_merges;
    llm__free(env->pool, joined);
}

typedef struct llm__bpe_scored {
    float score;
    llm_token id;
} llm__bpe_scored;

static int llm__bpe_compare_scores(const void *a, const void *b) { /* highest score first */
    float x = ((const llm__bpe_scored *)a)->score, y = ((const llm__bpe_scored *)b)->score;
    return (x < y) - (x > y);
}

/* SentencePiece merges any two neighbours whose concatenation is a piece, the highest score first. So every way to cut
   a piece into two pieces is a merge; equal scores have the same rank. */
static void llm__bpe_build_scored(llm__env *env, llm_tokenizer *t, const llm__vocab_source *v) {
    llm__bpe_scored *order = (llm__bpe_scored *)llm__alloc(env, v->n_pieces, sizeof *order);
    size_t n = 0;
    for (size_t i = 0; i < v->n_pieces; i++) {
        if (llm__vocab_type_of(t, (llm_token)i) != LLM__TYPE_NORMAL && !(t->flags[i] & LLM__IN_MODEL)) continue;
        if (v->scores[i] != v->scores[i])
            llm__fail(env, LLM_ERROR_FORMAT, "%s[%llu] is not a number", v->scores_name, (unsigned long long)i);
        llm__vocab_check_piece(env, v->pieces_name, i, v->pieces[i], LLM__MAX_SPM_PIECE);
        order[n].score = v->scores[i];
        order[n++].id = (llm_token)i;
    }
    qsort(order, n, sizeof *order, llm__bpe_compare_scores);
    for (size_t i = 0; i < n; i++) {
        if (i && order[i].score != order[i - 1].score) t->n_ranks++;
        llm__str s = llm__vocab_piece(t, order[i].id);
        const uint8_t *p = (const uint8_t *)s.at, *end = p + s.n, *q = p;
        while (llm__utf8_decode(q, &q), q < end) {
            llm_token left = llm__vocab_find(t, p, (size_t)(q - p)), right = llm__vocab_find(t, q, (size_t)(end - q));
            if (left != LLM__NONE && right != LLM__NONE)
                llm__bpe_add_pair(env, t, left, right, order[i].id, t->n_ranks);
        }
    }
    t->n_ranks++;
    llm__free(env->pool, order);
}

/* Marks the pieces that merging their own bytes reproduces. */
static void llm__bpe_mark_whole(llm__env *env, llm_tokenizer *t) {
    llm__bpe_symbol *s = (llm__bpe_symbol *)llm__alloc(env, t->longest_piece + 1, sizeof *s);
    for (llm_token id = 0; id < t->n_vocab; id++) {
        llm__str piece = llm__vocab_piece(t, id);
        const uint8_t *p = (const uint8_t *)piece.at;
        if (llm__vocab_find(t, p, piece.n) != id) continue;
        if (llm__bpe_merge(env, t, s, llm__bpe_first_symbols(t, p, piece.n, s)) == 1 && s[0].id == id)
            t->flags[id] |= LLM__WHOLE_PIECE;
    }
    llm__free(env->pool, s);
}

/* Texts are cut at spaces only where nothing but merging looks across: not if unknown characters on both sides of a space
   become one token, nor if a text that is a piece as a whole is not merged. */
static void llm__bpe_find_cuts(llm_tokenizer *t) {
    t->spaces_cut = t->sentencepiece && !t->ignore_merges;
    for (int i = 0; i < 256; i++) {
        if (i != ' ' && t->joined[i][' ' / 8] >> ' ' % 8 & 1) t->spaces_cut = false;
        if (t->fuse_unk && t->byte_tokens[i] == LLM__NONE) t->spaces_cut = false;
    }
}

static int llm__special_compare(const void *a, const void *b) {
    const llm__special *x = (const llm__special *)a, *y = (const llm__special *)b;
    int order = llm__str_compare(x->text, y->text);
    return order ? order
                 : (x->id < y->id) - (x->id > y->id); /* of two equal texts the lower id comes last and is found */
}

/* A special token as it appears in a text. If it is matched in normalised text, it is normalised itself. */
static llm__str llm__special_text(llm__env *env, const llm_tokenizer *t, const llm__vocab_source *v, llm_token id) {
    llm__str s = v->pieces[id], text;
    size_t n = s.n, space = 0;
    uint8_t *out = NULL, *composed = NULL;
    llm__vocab_check_piece(env, v->pieces_name, (size_t)id, s, LLM__MAX_SPECIAL);
    if (t->flags[id] & LLM__NORMALIZED) {
        const uint8_t *p = (const uint8_t *)s.at;
        if (t->nfc) composed = llm__nfc_apply(env, t->nfc, p, p + s.n, &n);
        space = t->prefix == LLM__PREFIX_STRETCH && !v->scores; /* a Hugging Face normaliser adds it there, too */
    }
    if (composed) {
        s.at = (const char *)composed;
        s.n = n;
    }
    out = (uint8_t *)llm__alloc(env, s.n + 1, 1);
    out[0] = ' ';
    if ((t->flags[id] & LLM__NORMALIZED) && t->sentencepiece) n = llm__vocab_unmark_spaces(s, out + space);
    else memcpy(out + space, s.at, n = s.n);
    llm__free(env->pool, composed);
    text.at = (const char *)out;
    text.n = n + space;
    return text;
}

static void llm__special_build(llm__env *env, llm_tokenizer *t, const llm__vocab_source *v, llm__special_set *set,
                               bool normalized) {
    for (int pass = 0; pass < 2; pass++) {
        if (pass) set->items = (llm__special *)llm__alloc(env, (size_t)set->n, sizeof *set->items);
        set->n = 0;
        for (llm_token id = 0; id < t->n_vocab; id++) {
            int type = llm__vocab_type_of(t, id), kind = type == LLM__TYPE_USER_DEFINED ? 1 : 2;
            if (kind == 2 && type != LLM__TYPE_CONTROL && type != LLM__TYPE_UNKNOWN) continue;
            if (((t->flags[id] & LLM__NORMALIZED) != 0) != normalized) continue;
            llm__special *s = pass ? &set->items[set->n] : NULL;
            set->n++;
            if (!s) continue;
            s->text = llm__special_text(env, t, v, id);
            s->id = id;
            uint8_t start = (uint8_t)s->text.at[0];
            if (!set->starts[start]) set->firsts[set->n_firsts++] = start;
            set->starts[start] |= (uint8_t)kind;
            set->kinds |= (uint8_t)kind;
        }
    }
    qsort(set->items, (size_t)set->n, sizeof *set->items, llm__special_compare);
    for (int i = 0; i < set->n; i++) {
        llm__str text = set->items[i].text;
        int32_t prefix = i - 1;
        while (prefix != LLM__NONE && (set->items[prefix].text.n > text.n ||
                                       memcmp(set->items[prefix].text.at, text.at, set->items[prefix].text.n)))
            prefix = set->items[prefix].prefix;
        set->items[i].prefix = prefix;
    }
}

static void llm__vocab_build_ends(llm_tokenizer *t, const llm__vocab_source *v) {
    static const char *const texts[] = {"<|im_end|>",
                                        "<|eot_id|>",
                                        "<|eom_id|>",
                                        "<|end_of_text|>",
                                        "<|endoftext|>",
                                        "<|end|>",
                                        "<|end_of_turn|>",
                                        "<end_of_turn>",
                                        "<|eot|>",
                                        "<|return|>",
                                        "<|end_of_sentence|>",
                                        "</s>",
                                        "<|EOT|>",
                                        "<\xEF\xBD\x9C\x65nd\xE2\x96\x81of\xE2\x96\x81sentence\xEF\xBD\x9C>"};
    if (v->eos != LLM__NONE) t->flags[v->eos] |= LLM__END;
    for (int i = 0; i < t->raw.n; i++) {
        llm_token id = t->raw.items[i].id;
        for (size_t k = 0; k < sizeof texts / sizeof *texts; k++)
            if (llm_token_is_special(t, id) && llm__str_is(v->pieces[id], texts[k])) t->flags[id] |= LLM__END;
    }
}

/* Copies the rules, since the tokenizer keeps nothing of the source. */
static void llm__pre_build_rules(llm__env *env, llm_tokenizer *t, const llm__vocab_source *v) {
    for (int i = 0; i < v->n_rules; i++) {
        llm__pre_rule *rule = &t->rules[i];
        *rule = v->rules[i];
        if (!rule->n_ranges) continue;
        size_t n = 2 * rule->n_ranges * sizeof *rule->ranges;
        rule->ranges = (const uint32_t *)memcpy(llm__alloc(env, n, 1), rule->ranges, n);
    }
}

/* Parses the template from a copy that is UTF-8 with \n at the ends of lines. */
static void llm__tokenizer_chat_body(llm__env *env, void *arg) {
    llm_tokenizer *t = (llm_tokenizer *)arg;
    const uint8_t *p = (const uint8_t *)t->chat_template, *end = p + strlen(t->chat_template);
    p = llm__utf8_valid(env, p, &end);
    char *text = llm__str_copy(env, (const char *)p, (size_t)(end - p));
    size_t n = 0;
    for (const char *q = text; *q; q++)
        if (*q != '\r') text[n++] = *q;
        else if (q[1] != '\n') text[n++] = '\n';
    t->chat_program = llm__jinja_parse(env, text, n);
}

/* A template that cannot be run does not keep a model from loading: what is wrong is logged now, and is the error of
   every chat. */
static void llm__tokenizer_parse_chat(llm__env *env, llm_tokenizer *t) {
    llm__env inner;
    llm_error err;
    if (!t->chat_template) return;
    llm__env_init(&inner, env->pool, &err, NULL);
    llm_status status = llm__env_run(&inner, llm__tokenizer_chat_body, t);
    if (status == LLM_ERROR_MEMORY) llm__fail(env, status, "%s", err.message);
    if (status == LLM_OK) return;
    t->chat_problem = llm__str_copy(env, err.message, strlen(err.message));
    llm__log(&env->pool->host, "%s", err.message);
}

static llm_tokenizer *llm__tokenizer_build(llm__env *env, const llm__vocab_source *v) {
    llm_tokenizer *t = (llm_tokenizer *)llm__alloc_zero(env, 1, sizeof *t);
    if (v->n_pieces < 1 || v->n_pieces > 1 << 24 || v->n_merges > 1 << 26)
        llm__fail(env, LLM_ERROR_FORMAT, "%s has %llu entries, %s %llu", v->pieces_name,
                  (unsigned long long)v->n_pieces, v->merges_name, (unsigned long long)v->n_merges);
    t->host = env->pool->host;
    t->sentencepiece = v->sentencepiece;
    t->ignore_merges = v->ignore_merges;
    t->fuse_unk = v->fuse_unk;
    t->prefix = v->prefix;
    t->strip_prefix = v->strip_prefix;
    t->n_vocab = (int)v->n_pieces;
    t->bos = v->bos;
    t->eos = v->eos;
    t->unk = v->unk;
    t->add_bos = v->add_bos;
    t->add_eos = v->add_eos;
    t->classes = llm__unicode_build_classes(env);
    if (v->nfc) t->nfc = llm__nfc_build(env);
    if (v->chat_template.n) t->chat_template = llm__str_copy(env, v->chat_template.at, v->chat_template.n);
    llm__tokenizer_parse_chat(env, t);
    llm__pre_build_rules(env, t, v);
    llm__vocab_build_pieces(env, t, v);
    llm__bpe_pairs_resize(env, t, llm__hash_slots(v->n_merges + v->n_merges / 2));
    if (v->scores) llm__bpe_build_scored(env, t, v);
    else llm__bpe_build_merges(env, t, v);
    llm__bpe_build_byte_pairs(env, t);
    llm__bpe_mark_whole(env, t);
    llm__bpe_find_cuts(t);
    llm__special_build(env, t, v, &t->raw, false);
    llm__special_build(env, t, v, &t->normalized, true);
    llm__vocab_build_ends(t, v);
    return t;
}

/* ==== 10 Tokenizer files ========================================================================================

   Vocabularies and pre-tokenizers from GGUF, tokenizer.json, tokenizer.model and the files beside them. */

/* ---- The pre-tokenizers that are known ----
   A pre-tokenizer is given as regular expressions. Those with several alternatives are recognised as a whole and
   matched by hand-written code. Simple ones that match a run of characters of one kind are parsed. */

#define LLM__RE_FOLDED "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#define LLM__RE_NUMBERS "\\p{N}"
#define LLM__RE_PUNCTUATION "[\\p{P}$+<=>\\^`|~]"
#define LLM__RE_THOUSANDS "[0-9][0-9][0-9]"
#define LLM__RE_SPACES "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define LLM__RE_GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
#define LLM__RE_LLAMA3(numbers) \
    LLM__RE_FOLDED "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" numbers "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*" LLM__RE_SPACES
#define LLM__RE_UP "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LLM__RE_LOW "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
#define LLM__RE_CASED(end, numbers)                                                                                  \
    "[^\\r\\n\\p{L}\\p{N}]?" LLM__RE_UP "*" LLM__RE_LOW "+" end "|[^\\r\\n\\p{L}\\p{N}]?" LLM__RE_UP "+" LLM__RE_LOW \
    "*" end "|" numbers "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*" LLM__RE_SPACES
#define LLM__RE_CJK "[\xE4\xB8\x80-\xE9\xBE\xA5\xE0\xA0\x80-\xE4\xB8\x80\xEA\xB0\x80-\xED\x9F\xBF]+"

static bool llm__pre_known_rule(llm__str regex, llm__pre_rule *rule) {
    static const struct {
        const char *regex;
        llm__pre_rule_kind kind;
        int most;
        bool contractions;
    } known[] = {{LLM__RE_GPT2, LLM__RULE_GPT2, 0, false},
                 {LLM__RE_LLAMA3("\\p{N}{1,3}"), LLM__RULE_LLAMA3, 3, false},
                 {LLM__RE_LLAMA3("\\p{N}"), LLM__RULE_LLAMA3, 1, false},
                 {LLM__RE_CASED(LLM__RE_FOLDED "?", "\\p{N}{1,3}"), LLM__RULE_CASED, 3, true},
                 {LLM__RE_CASED("", "\\p{N}"), LLM__RULE_CASED, 1, false}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (!llm__str_is(regex, known[i].regex)) continue;
        rule->kind = known[i].kind;
        rule->most = known[i].most;
        rule->contractions = known[i].contractions;
        return true;
    }
    return false;
}

/* A read position in a regular expression, which is well-formed UTF-8. */
typedef struct llm__regex {
    const uint8_t *at, *end;
} llm__regex;

static bool llm__regex_takes(llm__regex *r, const char *text) {
    size_t n = strlen(text);
    if ((size_t)(r->end - r->at) < n || memcmp(r->at, text, n)) return false;
    r->at += n;
    return true;
}

/* Reads \p{L} and the like. Returns its classes, or 0 if there is none. */
static unsigned llm__regex_class(llm__regex *r) {
    static const char letters[] = "LMNPS";
    static const unsigned classes[] = {LLM__LETTER, LLM__MARK, LLM__NUMBER, LLM__PUNCTUATION, LLM__SYMBOL};
    const uint8_t *p = r->at;
    if (llm__regex_takes(r, "\\s")) return LLM__SPACE;
    if (r->end - p < 5 || memcmp(p, "\\p{", 3) || p[4] != '}') return 0;
    const char *found = p[3] ? strchr(letters, p[3]) : NULL; /* strchr finds a NUL, too: behind the letters */
    if (!found) return 0;
    r->at += 5;
    return classes[found - letters];
}

/* Reads a character of a class, perhaps escaped. False if something else is there. */
static bool llm__regex_character(llm__regex *r, uint32_t *code) {
    if (r->at == r->end || *r->at == ']' || *r->at == '[') return false;
    bool escaped = *r->at == '\\';
    r->at += escaped;
    if (r->at == r->end) return false;
    *code = llm__utf8_decode(r->at, &r->at);
    if (!escaped) return *code != '&'; /* "&&" would be an intersection */
    if (*code == 'r' || *code == 'n' || *code == 't') *code = *code == 'r' ? '\r' : *code == 'n' ? '\n' : '\t';
    else if (*code < '!' || *code > '~' || (*code >= '0' && *code <= '9') ||
             ((*code | 32) >= 'a' && (*code | 32) <= 'z'))
        return false;
    return true;
}

static int llm__regex_compare_ranges(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Reads \p{L} or [...]. `ranges` has room for LLM__MAX_RANGES. */
static bool llm__regex_set(llm__regex *r, llm__pre_rule *rule, uint32_t *ranges) {
    if (*r->at != '[') return (rule->classes = llm__regex_class(r)) != 0;
    r->at++;
    if (r->at < r->end && *r->at == '^') return false;
    while (!llm__regex_takes(r, "]")) {
        uint32_t *range = ranges + 2 * rule->n_ranges;
        unsigned class_bits = llm__regex_class(r);
        rule->classes |= class_bits;
        if (class_bits) continue;
        if (rule->n_ranges == LLM__MAX_RANGES || !llm__regex_character(r, &range[0])) return false;
        range[1] = range[0];
        if (llm__regex_takes(r, "-") && (!llm__regex_character(r, &range[1]) || range[1] < range[0])) return false;
        rule->n_ranges++;
    }
    qsort(ranges, rule->n_ranges, 2 * sizeof *ranges, llm__regex_compare_ranges);
    rule->ranges = ranges;
    return rule->classes || rule->n_ranges;
}

/* Reads a set of characters that matches once, a fixed number of times, or with one of + {1,n} +$ after it. It may
   have \s? in front. */
static bool llm__pre_run_rule(llm__env *env, llm__str regex, llm__pre_rule *rule) {
    llm__regex r = {(const uint8_t *)regex.at, (const uint8_t *)regex.at + regex.n};
    uint32_t *ranges = (uint32_t *)llm__alloc(env, 2 * LLM__MAX_RANGES, sizeof *ranges);
    rule->kind = LLM__RULE_RUN;
    rule->least = rule->most = 1;
    rule->space = llm__regex_takes(&r, "\\s?");
    const uint8_t *set = r.at;
    if (r.at == r.end || !llm__regex_set(&r, rule, ranges)) return false;
    size_t n = (size_t)(r.at - set);
    for (; (size_t)(r.end - r.at) >= n && !memcmp(r.at, set, n) && rule->least < 9; r.at += n)
        rule->most = ++rule->least;
    if (rule->least > 1) return r.at == r.end;
    if (llm__regex_takes(&r, "+")) {
        rule->most = INT32_MAX;
        rule->to_end = llm__regex_takes(&r, "$");
    } else if (r.end - r.at == 5 && llm__regex_takes(&r, "{1,") && *r.at >= '1' && *r.at <= '9' && r.at[1] == '}') {
        rule->most = *r.at - '0';
        r.at += 2;
    }
    return r.at == r.end;
}

/* Adds the rule that a regular expression stands for. False if we do not know it. */
static bool llm__pre_add_rule(llm__env *env, llm__vocab_source *v, llm__str regex) {
    llm__pre_rule *rule = &v->rules[v->n_rules];
    const uint8_t *p = (const uint8_t *)regex.at;
    if (v->n_rules == LLM__MAX_RULES || llm__utf8_check(p, p + regex.n) != p + regex.n) return false;
    memset(rule, 0, sizeof *rule);
    if (!llm__pre_known_rule(regex, rule) && !llm__pre_run_rule(env, regex, rule)) return false;
    v->n_rules++;
    return true;
}

/* Sets the rules and the normalisation that a pre-tokenizer's name in GGUF stands for. */
static void llm__pre_use(llm__env *env, llm__vocab_source *v, llm__str name) {
    static const struct {
        const char *names; /* a comma after each */
        const char *rules[6];
        bool nfc, ignore_merges;
    } known[] = {
        {"gpt-2,phi-2,olmo,jais,mellum,exaone4,", {LLM__RE_GPT2}, false, false},
        {"mpt,", {LLM__RE_GPT2}, true, false},
        {"smollm,starcoder,refact,codeshell,exaone,minerva-7b,", {LLM__RE_NUMBERS, LLM__RE_GPT2}, false, false},
        {"command-r,", {LLM__RE_NUMBERS, LLM__RE_GPT2}, true, false},
        {"llama-bpe,llama3,llama-v3,falcon3,falcon-h1,pixtral,", {LLM__RE_LLAMA3("\\p{N}{1,3}")}, false, true},
        {"dbrx,smaug-bpe,", {LLM__RE_LLAMA3("\\p{N}{1,3}")}, false, false},
        {"qwen2,deepseek-r1-qwen,megrez,stablelm2,", {LLM__RE_LLAMA3("\\p{N}")}, true, false},
        {"gpt-4o,llama4,", {LLM__RE_CASED(LLM__RE_FOLDED "?", "\\p{N}{1,3}")}, false, false},
        {"tekken,", {LLM__RE_CASED("", "\\p{N}")}, false, true},
        {"falcon,", {LLM__RE_PUNCTUATION "+", LLM__RE_GPT2, LLM__RE_THOUSANDS}, false, false},
        {"deepseek-coder,", {"[\\r\\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", LLM__RE_CJK, LLM__RE_NUMBERS}, false, false}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        for (const char *p = known[i].names, *comma; (comma = strchr(p, ',')) != NULL; p = comma + 1) {
            if (name.n != (size_t)(comma - p) || memcmp(name.at, p, name.n)) continue;
            v->nfc = known[i].nfc;
            v->ignore_merges = known[i].ignore_merges;
            for (int k = 0; k < 6 && known[i].rules[k]; k++) {
                llm__str regex = {known[i].rules[k], strlen(known[i].rules[k])};
                llm__pre_add_rule(env, v, regex);
            }
            return;
        }
    }
    llm__fail(env, LLM_ERROR_UNSUPPORTED, "tokenizer.ggml.pre is \"%.*s\", which is not a supported pre-tokenizer",
              LLM__SHOW(name));
}

/* ---- Tokenizers in GGUF files ---- */

static llm_token llm__gguf_token(llm__env *env, const llm__checkpoint *ck, const char *key, size_t n_pieces) {
    if (!n_pieces || !llm__gguf_find(ck, key)) return LLM__NONE;
    return (llm_token)llm__gguf_int(env, ck, key, 0, 0, (int64_t)n_pieces - 1);
}

static bool llm__gguf_bool(llm__env *env, const llm__checkpoint *ck, const char *key, bool missing) {
    return llm__gguf_number(env, ck, key, missing) != 0;
}

/* An array of n numbers, or NULL if the key is absent. */
static const llm__gguf_value *llm__gguf_numbers(llm__env *env, const llm__checkpoint *ck, const char *key, size_t n) {
    const llm__gguf_value *v = llm__gguf_find(ck, key);
    if (!v) return NULL;
    if (!v->is_array || v->type == LLM__GGUF_STRING)
        llm__fail(env, LLM_ERROR_FORMAT, "metadata %s is not an array of numbers", key);
    if (v->count != n)
        llm__fail(env, LLM_ERROR_FORMAT, "metadata %s has %llu entries, tokenizer.ggml.tokens %llu", key,
                  (unsigned long long)v->count, (unsigned long long)n);
    return v;
}

static int32_t *llm__gguf_types(llm__env *env, const llm__checkpoint *ck, size_t n) {
    const llm__gguf_value *v = llm__gguf_numbers(env, ck, "tokenizer.ggml.token_type", n);
    if (!v) return NULL;
    int32_t *types = (int32_t *)llm__alloc(env, n, sizeof *types);
    for (size_t i = 0; i < n; i++) {
        double d = llm__gguf_value_number(v, i);
        if (!(d >= (double)LLM__TYPE_NORMAL && d <= (double)LLM__TYPE_BYTE))
            llm__fail(env, LLM_ERROR_FORMAT, "tokenizer.ggml.token_type[%llu] is %g, not a type from 1 to 6",
                      (unsigned long long)i, d);
        types[i] = (int32_t)d;
    }
    return types;
}

static float *llm__gguf_scores(llm__env *env, const llm__checkpoint *ck, size_t n) {
    const llm__gguf_value *v = llm__gguf_numbers(env, ck, "tokenizer.ggml.scores", n);
    if (!v) llm__fail(env, LLM_ERROR_FORMAT, "metadata tokenizer.ggml.scores is missing");
    float *scores = (float *)llm__alloc(env, n, sizeof *scores);
    for (size_t i = 0; i < n; i++) scores[i] = (float)llm__gguf_value_number(v, i);
    return scores;
}

/* Splits "left right". */
static llm__bpe_merge_text llm__bpe_split_merge(llm__env *env, const char *name, size_t i, llm__str line) {
    llm__bpe_merge_text merge;
    const char *space = line.n > 1 ? (const char *)memchr(line.at + 1, ' ', line.n - 1) : NULL;
    if (!space || space + 1 == line.at + line.n)
        llm__fail(env, LLM_ERROR_FORMAT, "%s[%llu] is \"%.*s\", not two pieces with a space between", name,
                  (unsigned long long)i, LLM__SHOW(line));
    merge.left.at = line.at;
    merge.left.n = (size_t)(space - line.at);
    merge.right.at = space + 1;
    merge.right.n = line.n - merge.left.n - 1;
    return merge;
}

static llm__bpe_merge_text *llm__gguf_merges(llm__env *env, const llm__checkpoint *ck, size_t *n) {
    llm__str *lines = llm__gguf_strings(env, ck, "tokenizer.ggml.merges", n);
    if (!lines) llm__fail(env, LLM_ERROR_FORMAT, "metadata tokenizer.ggml.merges is missing");
    llm__bpe_merge_text *merges = (llm__bpe_merge_text *)llm__alloc(env, *n, sizeof *merges);
    for (size_t i = 0; i < *n; i++) merges[i] = llm__bpe_split_merge(env, "tokenizer.ggml.merges", i, lines[i]);
    llm__free(env->pool, lines);
    return merges;
}

/* Tokens other than EOS that end a text or a turn. */
static uint16_t *llm__gguf_ends(llm__env *env, const llm__checkpoint *ck, size_t n) {
    static const char *const keys[] = {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"};
    uint16_t *traits = (uint16_t *)llm__alloc_zero(env, n, sizeof *traits);
    for (size_t i = 0; i < 2; i++) {
        llm_token id = llm__gguf_token(env, ck, keys[i], n);
        if (id != LLM__NONE) traits[id] |= LLM__END;
    }
    return traits;
}

static void llm__gguf_vocab(llm__env *env, const llm__checkpoint *ck, llm__vocab_source *v) {
    v->pieces_name = "tokenizer.ggml.tokens";
    v->scores_name = "tokenizer.ggml.scores";
    v->types_name = "tokenizer.ggml.token_type";
    v->merges_name = "tokenizer.ggml.merges";
    llm__str model = llm__gguf_str(env, ck, "tokenizer.ggml.model");
    v->sentencepiece = llm__str_is(model, "llama");
    if (!v->sentencepiece && !llm__str_is(model, "gpt2"))
        llm__fail(env, LLM_ERROR_UNSUPPORTED,
                  "tokenizer.ggml.model is \"%.*s\"; \"llama\" (SentencePiece BPE) and \"gpt2\" "
                  "(byte-level BPE) are supported",
                  LLM__SHOW(model));
    if (llm__gguf_find(ck, "tokenizer.ggml.precompiled_charsmap"))
        llm__fail(env, LLM_ERROR_UNSUPPORTED,
                  "tokenizer.ggml.precompiled_charsmap is set: such a normaliser is not supported");
    v->pieces = llm__gguf_strings(env, ck, "tokenizer.ggml.tokens", &v->n_pieces);
    if (!v->pieces) llm__fail(env, LLM_ERROR_FORMAT, "metadata tokenizer.ggml.tokens is missing");
    v->types = llm__gguf_types(env, ck, v->n_pieces);
    v->traits = llm__gguf_ends(env, ck, v->n_pieces);
    v->bos = llm__gguf_token(env, ck, "tokenizer.ggml.bos_token_id", v->n_pieces);
    v->eos = llm__gguf_token(env, ck, "tokenizer.ggml.eos_token_id", v->n_pieces);
    v->unk = LLM__NONE;
    v->fuse_unk = true;
    if (v->sentencepiece) {
        v->scores = llm__gguf_scores(env, ck, v->n_pieces);
        v->unk = (llm_token)llm__gguf_int(env, ck, "tokenizer.ggml.unknown_token_id", 0, 0, (int64_t)v->n_pieces - 1);
        v->strip_prefix = llm__gguf_bool(env, ck, "tokenizer.ggml.add_space_prefix", true);
        v->prefix = v->strip_prefix ? LLM__PREFIX_STRETCH : LLM__NO_PREFIX;
    } else {
        v->merges = llm__gguf_merges(env, ck, &v->n_merges);
        llm__pre_use(env, v, llm__gguf_str(env, ck, "tokenizer.ggml.pre"));
    }
    v->add_bos = llm__gguf_bool(env, ck, "tokenizer.ggml.add_bos_token", v->sentencepiece || v->ignore_merges);
    v->add_eos = llm__gguf_bool(env, ck, "tokenizer.ggml.add_eos_token", false);
    v->chat_template = llm__gguf_str(env, ck, "tokenizer.chat_template");
}

static llm_tokenizer *llm__tokenizer_from_gguf(llm__env *env, const llm__checkpoint *ck) {
    llm__vocab_source v;
    llm__pool *outer = env->pool, *inner = llm__pool_inner(env);
    memset(&v, 0, sizeof v);
    env->pool = inner;
    llm__gguf_vocab(env, ck, &v);
    env->pool = outer;
    llm_tokenizer *t = llm__tokenizer_build(env, &v);
    llm__free(outer, inner);
    return t;
}

/* ---- tokenizer.json, as Hugging Face's tokenizers write it ----
   {"added_tokens": [...], "normalizer": ..., "pre_tokenizer": ..., "post_processor": ..., "decoder": ...,
      "model": {"type": "BPE", "vocab": {PIECE: id, ...}, "merges": [...], ...}}

   Anything that we do not know here is refused by name. */

/* A vocabulary while it is being collected, indexed by id. */
typedef struct llm__vocab_parts {
    llm__str *pieces;
    int32_t *types; /* 0: no token has this id (yet) */
    uint16_t *traits;
    size_t n, room;
} llm__vocab_parts;

enum { LLM__MAX_GAP = 65536, LLM__MAX_MISPLACED = 1024 };

static llm_token llm__json_id(llm__env *env, const llm__json *v, const char *what, llm__str name) {
    if (v->type != LLM__JSON_NUMBER || !(v->number >= 0 && v->number < 1 << 24) ||
        v->number != (double)(llm_token)v->number)
        llm__fail(env, LLM_ERROR_FORMAT, "%s \"%.*s\" has the id %.*s, not a whole number from 0 to 16777215", what,
                  LLM__SHOW(name), LLM__SHOW(v->string));
    return (llm_token)v->number;
}

/* Makes room for token `id`. Ids may come in any order, but a file cannot claim much more room than it fills. */
static void llm__vocab_reserve(llm__env *env, llm__vocab_parts *parts, llm_token id, size_t n_known) {
    size_t n = (size_t)id + 1;
    if (n > n_known + LLM__MAX_GAP)
        llm__fail(env, LLM_ERROR_FORMAT, "a token has the id %ld, but there are only %llu tokens", (long)id,
                  (unsigned long long)n_known);
    if (n > parts->room) {
        size_t room = llm__hash_slots(n);
        llm__str *pieces = (llm__str *)llm__alloc_zero(env, room, sizeof *pieces);
        int32_t *types = (int32_t *)llm__alloc_zero(env, room, sizeof *types);
        uint16_t *traits = (uint16_t *)llm__alloc_zero(env, room, sizeof *traits);
        if (parts->n) {
            memcpy(pieces, parts->pieces, parts->n * sizeof *pieces);
            memcpy(types, parts->types, parts->n * sizeof *types);
            memcpy(traits, parts->traits, parts->n * sizeof *traits);
        }
        parts->pieces = pieces;
        parts->types = types;
        parts->traits = traits;
        parts->room = room;
    }
    if (n > parts->n) parts->n = n;
}

static void llm__vocab_put(llm__env *env, llm__vocab_parts *parts, llm_token id, llm__str text,
                           llm__vocab_token_type type, size_t n_known) {
    llm__vocab_reserve(env, parts, id, n_known);
    if (parts->types[id] && !llm__str_equal(parts->pieces[id], text))
        llm__fail(env, LLM_ERROR_FORMAT, "\"%.*s\" and \"%.*s\" both have the id %ld", LLM__SHOW(parts->pieces[id]),
                  LLM__SHOW(text), (long)id);
    if (parts->types[id] == LLM__TYPE_NORMAL) parts->traits[id] |= LLM__IN_MODEL;
    parts->types[id] = type;
    parts->pieces[id] = text;
}

/* Adds an entry of "added_tokens", or of "added_tokens_decoder", where the key is the id. */
static void llm__vocab_put_added(llm__env *env, llm__vocab_parts *parts, const llm__json *entry, llm_token id,
                                 size_t n_known) {
    static const struct {
        const char *key;
        uint16_t trait;
    } flags[] = {{"lstrip", LLM__LSTRIP},
                 {"rstrip", LLM__RSTRIP},
                 {"single_word", LLM__SINGLE_WORD},
                 {"normalized", LLM__NORMALIZED}};
    llm__str text = llm__json_need(env, entry, "content", LLM__JSON_STRING)->string;
    bool special = llm__json_get_bool(env, entry, "special", false);
    llm__vocab_put(env, parts, id, text, special ? LLM__TYPE_CONTROL : LLM__TYPE_USER_DEFINED, n_known);
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
        parts->traits[id] &= (uint16_t)~flags[i].trait;
        if (llm__json_get_bool(env, entry, flags[i].key, false)) parts->traits[id] |= flags[i].trait;
    }
    if (special)
        parts->traits[id] &=
            (uint16_t)~LLM__NORMALIZED; /* such tokens must not be forged, so they are matched in the raw text */
}

static void llm__hftok_tokens(llm__env *env, const llm__json *root, const llm__json *vocab, bool byte_fallback,
                              llm__vocab_parts *parts) {
    const llm__json *added = llm__json_get_type(env, root, "added_tokens", LLM__JSON_ARRAY);
    size_t n_known = vocab->n + (added ? added->n : 0);
    for (const llm__json *entry = vocab->first; entry; entry = entry->next) {
        bool byte = byte_fallback && llm__vocab_byte_piece(entry->key) >= 0;
        llm__vocab_put(env, parts, llm__json_id(env, entry, "token", entry->key), entry->key,
                       byte ? LLM__TYPE_BYTE : LLM__TYPE_NORMAL, n_known);
    }
    for (const llm__json *entry = added ? added->first : NULL; entry; entry = entry->next) {
        llm__str text = llm__json_need(env, entry, "content", LLM__JSON_STRING)->string;
        const llm__json *id = llm__json_need(env, entry, "id", LLM__JSON_NUMBER);
        llm__vocab_put_added(env, parts, entry, llm__json_id(env, id, "added token", text), n_known);
    }
}

static llm__bpe_merge_text *llm__hftok_merges(llm__env *env, const llm__json *merges) {
    llm__bpe_merge_text *pairs = (llm__bpe_merge_text *)llm__alloc(env, merges->n, sizeof *pairs);
    size_t i = 0;
    for (const llm__json *m = merges->first; m; m = m->next, i++) {
        bool pair = m->type == LLM__JSON_ARRAY && m->n == 2 && m->first->type == LLM__JSON_STRING &&
                    m->first->next->type == LLM__JSON_STRING;
        if (!pair && m->type != LLM__JSON_STRING)
            llm__fail(env, LLM_ERROR_FORMAT, "merges[%llu] is neither \"left right\" nor [\"left\", \"right\"]",
                      (unsigned long long)i);
        if (!pair) {
            pairs[i] = llm__bpe_split_merge(env, "merges", i, m->string);
            continue;
        }
        pairs[i].left = m->first->string;
        pairs[i].right = m->first->next->string;
    }
    return pairs;
}

/* The id of the token with this text, or LLM__NONE. */
static llm_token llm__vocab_find_part(const llm__vocab_parts *parts, llm__str text) {
    for (size_t id = parts->n; id-- > 0;)
        if (parts->types[id] && llm__str_equal(parts->pieces[id], text)) return (llm_token)id;
    return LLM__NONE;
}

static void llm__hftok_model(llm__env *env, const llm__json *root, llm__vocab_parts *parts, llm__vocab_source *v) {
    const llm__json *model = llm__json_need(env, root, "model", LLM__JSON_OBJECT),
                    *dropout = llm__json_get(model, "dropout");
    llm__str type = llm__json_get_str(env, model, "type"), unk = llm__json_get_str(env, model, "unk_token");
    if (type.n && !llm__str_is(type, "BPE"))
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "the model's type is \"%.*s\"; only \"BPE\" is supported",
                  LLM__SHOW(type));
    if (dropout && !(dropout->type == LLM__JSON_NUMBER && dropout->number == 0))
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "the model has a \"dropout\", which makes tokens random");
    if (llm__json_get_str(env, model, "continuing_subword_prefix").n ||
        llm__json_get_str(env, model, "end_of_word_suffix").n)
        llm__fail(env, LLM_ERROR_UNSUPPORTED,
                  "the model has a \"continuing_subword_prefix\" or an \"end_of_word_suffix\"");
    const llm__json *vocab = llm__json_need(env, model, "vocab", LLM__JSON_OBJECT);
    const llm__json *merges = llm__json_need(env, model, "merges", LLM__JSON_ARRAY);
    llm__hftok_tokens(env, root, vocab, llm__json_get_bool(env, model, "byte_fallback", false), parts);
    v->merges = llm__hftok_merges(env, merges);
    v->n_merges = merges->n;
    v->ignore_merges = llm__json_get_bool(env, model, "ignore_merges", false);
    v->fuse_unk = llm__json_get_bool(env, model, "fuse_unk", false);
    v->unk = unk.n ? llm__vocab_find_part(parts, unk) : LLM__NONE;
    if (unk.n && v->unk == LLM__NONE)
        llm__fail(env, LLM_ERROR_FORMAT, "unk_token is \"%.*s\", which is not in vocab", LLM__SHOW(unk));
}

#define LLM__SPACE_MARK "\xE2\x96\x81"

static void llm__hftok_normalizer(llm__env *env, const llm__json *n, llm__vocab_source *v) {
    llm__str type = llm__json_need(env, n, "type", LLM__JSON_STRING)->string;
    if (llm__str_is(type, "Sequence")) {
        const llm__json *list = llm__json_need(env, n, "normalizers", LLM__JSON_ARRAY);
        for (n = list->first; n; n = n->next) llm__hftok_normalizer(env, n, v);
    } else if (llm__str_is(type, "NFC")) {
        v->nfc = true;
    } else if (llm__str_is(type, "Prepend") && llm__str_is(llm__json_get_str(env, n, "prepend"), LLM__SPACE_MARK)) {
        v->prefix = LLM__PREFIX_STRETCH;
    } else if (llm__str_is(type, "Replace")) {
        const llm__json *pattern = llm__json_need(env, n, "pattern", LLM__JSON_OBJECT);
        if (!llm__str_is(llm__json_get_str(env, pattern, "String"), " ") ||
            !llm__str_is(llm__json_get_str(env, n, "content"), LLM__SPACE_MARK))
            llm__fail(env, LLM_ERROR_UNSUPPORTED, "the normalizer replaces something other than a space by U+2581");
        v->sentencepiece = true;
    } else {
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "the normalizer \"%.*s\" is not supported", LLM__SHOW(type));
    }
}

static void llm__hftok_add_rule(llm__env *env, llm__vocab_source *v, llm__str regex) {
    if (!llm__pre_add_rule(env, v, regex))
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "the pre_tokenizer splits by \"%.*s\", which is not a supported rule",
                  LLM__SHOW(regex));
}

static void llm__hftok_add_class(llm__env *env, llm__vocab_source *v, const char *once, const char *run,
                                 bool contiguous) {
    llm__str regex;
    regex.at = contiguous ? run : once;
    regex.n = strlen(regex.at);
    llm__hftok_add_rule(env, v, regex);
}

static void llm__hftok_split(llm__env *env, const llm__json *p, llm__vocab_source *v, bool bytes) {
    const llm__json *pattern = llm__json_need(env, p, "pattern", LLM__JSON_OBJECT);
    llm__str regex = llm__json_get_str(env, pattern, "Regex"), behavior = llm__json_get_str(env, p, "behavior");
    bool invert = llm__json_get_bool(env, p, "invert", false);
    if (!regex.n)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "the pre_tokenizer splits by a String; only Regex is supported");
    if (v->sentencepiece || (bytes && !llm__str_is(regex, LLM__RE_THOUSANDS)))
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "the pre_tokenizer splits by \"%.*s\" after %s", LLM__SHOW(regex),
                  bytes ? "ByteLevel" : "spaces have become U+2581");
    if (llm__str_is(behavior, invert ? "Removed" : "Isolated")) llm__hftok_add_rule(env, v, regex);
    else
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "the pre_tokenizer splits with behavior \"%.*s\"%s", LLM__SHOW(behavior),
                  invert ? ", inverted" : "");
}

static void llm__hftok_metaspace(llm__env *env, const llm__json *p, llm__vocab_source *v) {
    llm__str scheme = llm__json_get_str(env, p, "prepend_scheme");
    bool always = scheme.n ? llm__str_is(scheme, "always") : llm__json_get_bool(env, p, "add_prefix_space", true);
    if (!llm__str_is(llm__json_get_str(env, p, "replacement"), LLM__SPACE_MARK))
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "the pre_tokenizer Metaspace has another replacement than U+2581");
    if (v->prefix || v->n_rules)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "the pre_tokenizer Metaspace comes after something else");
    v->sentencepiece = true;
    v->prefix = llm__str_is(scheme, "first") ? LLM__PREFIX_FIRST : always ? LLM__PREFIX_UNSPACED : LLM__NO_PREFIX;
    if (llm__json_get_bool(env, p, "split", true)) v->rules[v->n_rules++].kind = LLM__RULE_METASPACE;
}

/* *bytes becomes true if the text has already been mapped to byte characters. */
static void llm__hftok_pre_tokenizer(llm__env *env, const llm__json *p, llm__vocab_source *v, bool *bytes) {
    llm__str type = llm__json_need(env, p, "type", LLM__JSON_STRING)->string;
    if (*bytes && !llm__str_is(type, "Split"))
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "the pre_tokenizer \"%.*s\" comes after ByteLevel", LLM__SHOW(type));
    if (llm__str_is(type, "Sequence")) {
        const llm__json *list = llm__json_need(env, p, "pretokenizers", LLM__JSON_ARRAY);
        for (p = list->first; p; p = p->next) llm__hftok_pre_tokenizer(env, p, v, bytes);
    } else if (llm__str_is(type, "ByteLevel")) {
        *bytes = true;
        if (llm__json_get_bool(env, p, "add_prefix_space", true)) {
            if (v->n_rules)
                llm__fail(env, LLM_ERROR_UNSUPPORTED, "ByteLevel adds a space to what other pre_tokenizers have cut");
            v->prefix = LLM__PREFIX_UNSPACED;
        }
        if (llm__json_get_bool(env, p, "use_regex", true)) llm__hftok_add_class(env, v, LLM__RE_GPT2, NULL, false);
    } else if (llm__str_is(type, "Split")) {
        llm__hftok_split(env, p, v, *bytes);
    } else if (llm__str_is(type, "Digits")) {
        llm__hftok_add_class(env, v, LLM__RE_NUMBERS, LLM__RE_NUMBERS "+",
                             !llm__json_get_bool(env, p, "individual_digits", false));
    } else if (llm__str_is(type, "Punctuation")) {
        llm__str behavior = llm__json_get_str(env, p, "behavior");
        bool contiguous = llm__str_is(behavior, "Contiguous");
        if (!contiguous && behavior.n && !llm__str_is(behavior, "Isolated"))
            llm__fail(env, LLM_ERROR_UNSUPPORTED, "the pre_tokenizer Punctuation has behavior \"%.*s\"",
                      LLM__SHOW(behavior));
        llm__hftok_add_class(env, v, LLM__RE_PUNCTUATION, LLM__RE_PUNCTUATION "+", contiguous);
    } else if (llm__str_is(type, "Metaspace")) {
        llm__hftok_metaspace(env, p, v);
    } else {
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "the pre_tokenizer \"%.*s\" is not supported", LLM__SHOW(type));
    }
    if (v->n_rules == LLM__MAX_RULES)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "the pre_tokenizer has more than %d rules", LLM__MAX_RULES - 1);
}

/* True if decoding removes the first space. */
static bool llm__hftok_strips(llm__env *env, const llm__json *decoder) {
    llm__str type = llm__json_get_str(env, decoder, "type");
    if (llm__str_is(type, "Sequence")) {
        const llm__json *list = llm__json_need(env, decoder, "decoders", LLM__JSON_ARRAY);
        for (decoder = list->first; decoder; decoder = decoder->next)
            if (llm__hftok_strips(env, decoder)) return true;
        return false;
    }
    if (llm__str_is(type, "Metaspace")) {
        llm__str scheme = llm__json_get_str(env, decoder, "prepend_scheme");
        return scheme.n ? !llm__str_is(scheme, "never") : llm__json_get_bool(env, decoder, "add_prefix_space", true);
    }
    return llm__str_is(type, "Strip") && llm__str_is(llm__json_get_str(env, decoder, "content"), " ");
}

/* One of the tokens that a post-processor adds before or after a text. */
static llm_token llm__hftok_template_token(llm__env *env, const llm__json *processor, const llm__json *item,
                                           size_t n_pieces) {
    const llm__json *tokens = llm__json_need(env, processor, "special_tokens", LLM__JSON_OBJECT);
    llm__str name = llm__json_need(env, item, "id", LLM__JSON_STRING)->string;
    for (const llm__json *token = tokens->first; token; token = token->next) {
        if (!llm__str_equal(token->key, name)) continue;
        const llm__json *ids = llm__json_need(env, token, "ids", LLM__JSON_ARRAY);
        if (ids->n != 1)
            llm__fail(env, LLM_ERROR_UNSUPPORTED, "the post_processor's \"%.*s\" is %llu tokens", LLM__SHOW(name),
                      (unsigned long long)ids->n);
        llm_token id = llm__json_id(env, ids->first, "the post_processor's", name);
        if ((size_t)id >= n_pieces)
            llm__fail(env, LLM_ERROR_FORMAT, "the post_processor's \"%.*s\" has the id %ld, which is no token's",
                      LLM__SHOW(name), (long)id);
        return id;
    }
    llm__fail(env, LLM_ERROR_FORMAT, "the post_processor's \"%.*s\" is not in its special_tokens", LLM__SHOW(name));
}

static void llm__hftok_post_processor(llm__env *env, const llm__json *p, llm__vocab_source *v) {
    llm__str type = llm__json_need(env, p, "type", LLM__JSON_STRING)->string;
    if (llm__str_is(type, "ByteLevel")) return;
    if (llm__str_is(type, "Sequence")) {
        const llm__json *list = llm__json_need(env, p, "processors", LLM__JSON_ARRAY);
        for (p = list->first; p; p = p->next) llm__hftok_post_processor(env, p, v);
        return;
    }
    if (!llm__str_is(type, "TemplateProcessing"))
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "the post_processor \"%.*s\" is not supported", LLM__SHOW(type));
    bool after = false;
    for (const llm__json *item = llm__json_need(env, p, "single", LLM__JSON_ARRAY)->first; item; item = item->next) {
        const llm__json *token = llm__json_get_type(env, item, "SpecialToken", LLM__JSON_OBJECT);
        if (!token) {
            llm__json_need(env, item, "Sequence", LLM__JSON_OBJECT);
            after = true;
            continue;
        }
        bool *add = after ? &v->add_eos : &v->add_bos;
        if (*add) llm__fail(env, LLM_ERROR_UNSUPPORTED, "the post_processor adds several tokens on one side of a text");
        *add = true;
        *(after ? &v->eos : &v->bos) = llm__hftok_template_token(env, p, token, v->n_pieces);
    }
}

static void llm__hftok_read(llm__env *env, const llm__json *root, llm__vocab_parts *parts, llm__vocab_source *v) {
    const llm__json *normalizer = llm__json_get_type(env, root, "normalizer", LLM__JSON_OBJECT);
    const llm__json *pre = llm__json_get_type(env, root, "pre_tokenizer", LLM__JSON_OBJECT);
    const llm__json *post = llm__json_get_type(env, root, "post_processor", LLM__JSON_OBJECT);
    const llm__json *decoder = llm__json_get_type(env, root, "decoder", LLM__JSON_OBJECT);
    bool bytes = false;
    v->pieces_name = "vocab";
    v->merges_name = "merges";
    llm__hftok_model(env, root, parts, v);
    if (normalizer) llm__hftok_normalizer(env, normalizer, v);
    if (pre) llm__hftok_pre_tokenizer(env, pre, v, &bytes);
    if (bytes == v->sentencepiece || (bytes && v->prefix == LLM__PREFIX_STRETCH))
        llm__fail(env, LLM_ERROR_UNSUPPORTED,
                  bytes ? "ByteLevel and U+2581 for spaces do not go together here"
                        : "neither a ByteLevel pre_tokenizer nor U+2581 for spaces: such a model is not supported");
    v->strip_prefix = decoder && llm__hftok_strips(env, decoder);
    v->n_pieces = parts->n;
    if (post) llm__hftok_post_processor(env, post, v);
}

/* ---- tokenizer.model, as SentencePiece writes it ----
   A protocol buffer is a list of fields. Each begins with a varint that holds its number and its wire type. The value
   follows: a varint (type 0), 8 bytes (1), a length and bytes (2) or 4 bytes (5).
   https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto */

typedef struct llm__proto {
    llm__cursor in;
    uint32_t field, wire;
    uint64_t number; /* a varint, or the bits of 4 bytes */
    llm__str bytes;
} llm__proto;

static llm__proto llm__proto_open(llm__env *env, const void *data, size_t n, const char *what) {
    llm__proto p;
    memset(&p, 0, sizeof p);
    p.in.env = env;
    p.in.data = (const uint8_t *)data;
    p.in.size = p.in.have = n;
    p.in.what = what;
    p.in.name.at = "";
    return p;
}

static uint64_t llm__proto_varint(llm__cursor *r) {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
        uint8_t byte = *llm__cursor_bytes(r, 1);
        value |= (uint64_t)(byte & 0x7F) << shift;
        if (byte < 0x80) return value;
    }
    llm__fail(r->env, LLM_ERROR_FORMAT, "%s: a number at offset %llu is too long", r->what, (unsigned long long)r->at);
}

/* Reads the next field. False at the end. */
static bool llm__proto_next(llm__proto *p) {
    llm__cursor *r = &p->in;
    if (r->at == r->size) return false;
    uint64_t key = llm__proto_varint(r);
    p->field = key >> 3 > UINT32_MAX ? 0 : (uint32_t)(key >> 3);
    p->wire = (uint32_t)(key & 7);
    p->bytes.at = "";
    p->bytes.n = 0;
    p->number = 0;
    switch (p->wire) {
    case 0: p->number = llm__proto_varint(r); break;
    case 1: llm__cursor_bytes(r, 8); break;
    case 2:
        p->number = llm__proto_varint(r);
        p->bytes.at = (const char *)llm__cursor_bytes(r, p->number);
        p->bytes.n = (size_t)p->number;
        break;
    case 5: p->number = llm__bytes_u32(llm__cursor_bytes(r, 4)); break;
    default:
        llm__fail(r->env, LLM_ERROR_FORMAT,
                  "%s: a field at offset %llu has the wire type %d: this is no SentencePiece model", r->what,
                  (unsigned long long)r->at, (int)p->wire);
    }
    return true;
}

static void llm__proto_read_piece(llm__env *env, llm__proto *model, llm__vocab_parts *parts, float *score) {
    llm__proto p = llm__proto_open(env, model->bytes.at, model->bytes.n, "a piece");
    llm__str text = {"", 0};
    llm_token id = (llm_token)parts->n;
    uint64_t type = LLM__TYPE_NORMAL;
    while (llm__proto_next(&p)) {
        if (p.field == 1 && p.wire == 2) text = p.bytes;
        if (p.field == 2 && p.wire == 5) *score = llm__f32_from_bits((uint32_t)p.number);
        if (p.field == 3 && p.wire == 0) type = p.number;
    }
    if (type < LLM__TYPE_NORMAL || type > LLM__TYPE_BYTE)
        llm__fail(env, LLM_ERROR_FORMAT, "pieces[%ld] has the type %llu, not one from 1 to 6", (long)id,
                  (unsigned long long)type);
    llm__vocab_put(env, parts, id, text, (llm__vocab_token_type)type, parts->n);
    if (type == LLM__TYPE_USER_DEFINED) parts->traits[id] |= LLM__NORMALIZED;
}

/* SentencePiece and GGUF number the types of tokens alike. */
static void llm__proto_read_pieces(llm__env *env, const llm__file *file, llm__vocab_parts *parts,
                                   llm__vocab_source *v) {
    llm__proto p = llm__proto_open(env, file->data, (size_t)file->size, "the model");
    float *scores = NULL;
    size_t room = 0;
    while (llm__proto_next(&p)) {
        if (p.field != 1 || p.wire != 2) continue;
        if (parts->n == 1 << 24)
            llm__fail(env, LLM_ERROR_UNSUPPORTED, "there are more than %llu pieces", (unsigned long long)parts->n);
        scores = (float *)llm__alloc_grow(env, scores, parts->n, &room, sizeof *scores);
        scores[parts->n] = 0;
        llm__proto_read_piece(env, &p, parts, &scores[parts->n]);
    }
    v->scores = scores;
}

static llm_token llm__proto_id(llm__env *env, const llm__vocab_parts *parts, const char *name, uint64_t number) {
    int64_t id = (int64_t)number; /* -1 means none */
    if (id < -1 || id >= (int64_t)parts->n)
        llm__fail(env, LLM_ERROR_FORMAT, "%s is %lld, but there are %llu pieces", name, (long long)id,
                  (unsigned long long)parts->n);
    return (llm_token)id;
}

static void llm__proto_read_trainer(llm__env *env, llm__str bytes, const llm__vocab_parts *parts,
                                    llm__vocab_source *v) {
    static const char *const kinds[] = {"?", "unigram", "BPE", "word", "char"};
    llm__proto p = llm__proto_open(env, bytes.at, bytes.n, "trainer_spec");
    uint64_t kind = 1;
    while (llm__proto_next(&p)) {
        if (p.wire) continue;
        if (p.field == 3) kind = p.number;
        if (p.field == 24 && p.number)
            llm__fail(env, LLM_ERROR_UNSUPPORTED, "treat_whitespace_as_suffix is set, which is not supported");
        if (p.field == 40) v->unk = llm__proto_id(env, parts, "unk_id", p.number);
        if (p.field == 41) v->bos = llm__proto_id(env, parts, "bos_id", p.number);
        if (p.field == 42) v->eos = llm__proto_id(env, parts, "eos_id", p.number);
    }
    if (kind != 2)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "model_type is %llu (%s); only 2 (BPE) is supported",
                  (unsigned long long)kind, kinds[kind < 5 ? kind : 0]);
}

static void llm__proto_read_normalizer(llm__env *env, llm__str bytes, llm__vocab_source *v) {
    llm__proto p = llm__proto_open(env, bytes.at, bytes.n, "normalizer_spec");
    bool remove_spaces = true, escape = true;
    while (llm__proto_next(&p)) {
        if (p.field == 2 && p.bytes.n)
            llm__fail(env, LLM_ERROR_UNSUPPORTED, "precompiled_charsmap is set: such a normaliser is not supported");
        if (p.field == 3 && !p.wire) v->prefix = p.number ? LLM__PREFIX_STRETCH : LLM__NO_PREFIX;
        if (p.field == 4 && !p.wire) remove_spaces = p.number != 0;
        if (p.field == 5 && !p.wire) escape = p.number != 0;
    }
    if (remove_spaces || !escape)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "%s, which is not supported",
                  escape ? "remove_extra_whitespaces is set" : "escape_whitespaces is not set");
}

static void llm__proto_read(llm__env *env, const llm__file *file, llm__vocab_parts *parts, llm__vocab_source *v) {
    llm__proto p = llm__proto_open(env, file->data, (size_t)file->size, "the model");
    llm__str trainer = {"", 0}, normalizer = {"", 0};
    v->pieces_name = "pieces";
    v->scores_name = "scores";
    v->types_name = "types";
    v->merges_name = "merges";
    v->sentencepiece = v->fuse_unk = v->add_bos = true;
    v->prefix = LLM__PREFIX_STRETCH;
    llm__proto_read_pieces(env, file, parts, v);
    while (llm__proto_next(&p)) {
        if (p.field == 2 && p.wire == 2) trainer = p.bytes;
        if (p.field == 3 && p.wire == 2) normalizer = p.bytes;
    }
    v->unk = parts->n > 0 ? 0 : LLM__NONE;
    v->bos = parts->n > 1 ? 1 : LLM__NONE;
    v->eos = parts->n > 2 ? 2 : LLM__NONE;
    llm__proto_read_trainer(env, trainer, parts, v);
    llm__proto_read_normalizer(env, normalizer, v);
    v->strip_prefix = v->prefix == LLM__PREFIX_STRETCH;
}

/* ---- Directories as published on Hugging Face ----
   The vocabulary is in tokenizer.json or tokenizer.model. The files beside it name the tokens that begin and end a
   text. */

/* Opens a JSON file in the directory, or returns NULL if it does not exist. Later messages name the file. */
static const llm__json *llm__hf_find_json(llm__env *env, const char *directory, const char *name) {
    env->file = llm__path_join(env, directory, name);
    return llm__path_find(env->file) == LLM__REGULAR ? llm__hf_open_json(env, directory, name) : NULL;
}

/* A token's text, given as a string or as the "content" of an object; empty if there is none. */
static llm__str llm__hf_named_text(llm__env *env, const llm__json *v, const char *key) {
    llm__str none = {"", 0};
    if (v && v->type == LLM__JSON_OBJECT) v = llm__json_need(env, v, "content", LLM__JSON_STRING);
    if (!v) return none;
    if (v->type != LLM__JSON_STRING)
        llm__fail(env, LLM_ERROR_FORMAT, "\"%s\" is %s, not a token's text", key, llm__json_type_name(v->type));
    return v->string;
}

/* LLM__NONE: none is named, or there is no such token. */
static llm_token llm__hf_named_token(llm__env *env, const llm__json *config, const char *key,
                                     const llm__vocab_parts *parts) {
    llm__str text = llm__hf_named_text(env, llm__json_get(config, key), key);
    return text.n ? llm__vocab_find_part(parts, text) : LLM__NONE;
}

/* Makes a named token special. One that is new gets the next id, if the model has a row for it: transformers adds it in
   any case, but cannot run it. */
static void llm__hf_add_named_token(llm__env *env, const llm__json *v, const char *key, size_t n_rows,
                                    llm__vocab_parts *parts) {
    llm__str text = llm__hf_named_text(env, v, key);
    llm_token id = text.n ? llm__vocab_find_part(parts, text) : LLM__NONE;
    if (!text.n || (id == LLM__NONE && parts->n >= n_rows)) return;
    if (id == LLM__NONE) id = (llm_token)parts->n;
    if ((size_t)id == parts->n || parts->types[id] == LLM__TYPE_NORMAL) {
        if (v->type == LLM__JSON_OBJECT) llm__vocab_put_added(env, parts, v, id, parts->n);
        else llm__vocab_put(env, parts, id, text, LLM__TYPE_CONTROL, parts->n);
    }
    if (parts->types[id] == LLM__TYPE_USER_DEFINED) parts->types[id] = LLM__TYPE_CONTROL;
    if (parts->types[id] == LLM__TYPE_CONTROL) parts->traits[id] &= (uint16_t)~LLM__NORMALIZED;
}

/* In the order in which transformers gives the new ones their ids. */
static void llm__hf_add_named_tokens(llm__env *env, const llm__json *config, size_t n_rows, llm__vocab_parts *parts) {
    static const char *const keys[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                       "pad_token", "cls_token", "mask_token"};
    static const char *const lists[] = {"additional_special_tokens", "extra_special_tokens"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        llm__hf_add_named_token(env, llm__json_get(config, keys[i]), keys[i], n_rows, parts);
    for (int i = 0; i < 2; i++) {
        const llm__json *list = llm__json_get(config, lists[i]);
        bool many = list && (list->type == LLM__JSON_ARRAY || list->type == LLM__JSON_OBJECT);
        if (many && list->n > LLM__MAX_MISPLACED)
            llm__fail(env, LLM_ERROR_FORMAT, "\"%s\" names %llu tokens", lists[i], (unsigned long long)list->n);
        for (const llm__json *item = many ? list->first : NULL; item; item = item->next)
            llm__hf_add_named_token(env, item, lists[i], n_rows, parts);
    }
}

static void llm__hf_named_tokens(llm__env *env, const llm__json *config, const llm__vocab_parts *parts,
                                 llm__vocab_source *v) {
    llm_token bos = llm__hf_named_token(env, config, "bos_token", parts),
              eos = llm__hf_named_token(env, config, "eos_token", parts);
    if (eos != LLM__NONE && v->add_eos && v->eos != LLM__NONE && v->eos != eos)
        llm__fail(env, LLM_ERROR_UNSUPPORTED,
                  "eos_token is token %ld, but the post_processor ends texts with token %ld", (long)eos, (long)v->eos);
    if (bos != LLM__NONE && !(v->add_bos && v->bos != LLM__NONE)) v->bos = bos;
    if (eos != LLM__NONE) v->eos = eos;
}

/* "eos_token_id" in config.json and generation_config.json is a number or a list of numbers. All of them end a text. */
static void llm__hf_end_ids(llm__env *env, const llm__json *config, const llm__vocab_parts *parts,
                            llm__vocab_source *v) {
    static const llm__str key = {"eos_token_id", 12};
    const llm__json *ids = llm__json_get(config, key.at), *bos = llm__json_get(config, "bos_token_id");
    bool list = ids && ids->type == LLM__JSON_ARRAY;
    for (const llm__json *item = list ? ids->first : ids; item; item = list ? item->next : NULL) {
        llm_token id = llm__json_id(env, item, "the token of", key);
        if ((size_t)id >= parts->n)
            llm__fail(env, LLM_ERROR_FORMAT, "eos_token_id is %ld, but the vocabulary has %llu tokens", (long)id,
                      (unsigned long long)parts->n);
        parts->traits[id] |= LLM__END;
        if (v->eos == LLM__NONE) v->eos = id;
    }
    if (v->bos == LLM__NONE && bos && bos->type == LLM__JSON_NUMBER && bos->number >= 0 &&
        bos->number < (double)parts->n)
        v->bos = (llm_token)bos->number;
}

/* "chat_template" is a string, or a list of named templates, of which we use "default". */
static llm__str llm__hf_chat_template(llm__env *env, const llm__json *config) {
    const llm__json *v = llm__json_get(config, "chat_template");
    llm__str none = {"", 0};
    if (!v) return none;
    if (v->type == LLM__JSON_STRING) return v->string;
    if (v->type == LLM__JSON_ARRAY)
        for (v = v->first; v; v = v->next)
            if (llm__str_is(llm__json_get_str(env, v, "name"), "default")) return llm__json_get_str(env, v, "template");
    return none;
}

static llm_token llm__hf_added_token_id(llm__env *env, llm__str key) {
    llm_token id = 0;
    for (size_t i = 0; i < key.n; i++) {
        char digit = key.at[i];
        if (digit < '0' || digit > '9' || i > 7)
            llm__fail(env, LLM_ERROR_FORMAT, "added_tokens_decoder has the id \"%.*s\"", LLM__SHOW(key));
        id = 10 * id + (digit - '0');
    }
    return id;
}

/* Tokens that a tokenizer.model itself does not have. */
static void llm__hf_added_tokens(llm__env *env, const llm__json *config, llm__vocab_parts *parts) {
    const llm__json *added = llm__json_get_type(env, config, "added_tokens_decoder", LLM__JSON_OBJECT);
    size_t n_known = parts->n + (added ? added->n : 0);
    for (const llm__json *entry = added ? added->first : NULL; entry; entry = entry->next)
        llm__vocab_put_added(env, parts, entry, llm__hf_added_token_id(env, entry->key), n_known);
}

typedef struct llm__hf_placed_token {
    llm_token id;
    const llm__json *entry;
} llm__hf_placed_token;

static int llm__hf_compare_placed_tokens(const void *a, const void *b) {
    llm_token x = ((const llm__hf_placed_token *)a)->id, y = ((const llm__hf_placed_token *)b)->id;
    return (x > y) - (x < y);
}

/* Tokens beside a tokenizer.json: their flags are those that count. As transformers does it, a token that is there
   keeps its id, and the others get the next ids, in the order of the ids that they have here. */
static void llm__hf_merge_added_tokens(llm__env *env, const llm__json *config, size_t n_rows, llm__vocab_parts *parts) {
    const llm__json *added = llm__json_get_type(env, config, "added_tokens_decoder", LLM__JSON_OBJECT);
    if (!added) return;
    llm__hf_placed_token *placed = (llm__hf_placed_token *)llm__alloc(env, added->n, sizeof *placed);
    size_t n = 0, n_misplaced = 0;
    for (const llm__json *entry = added->first; entry; entry = entry->next, n++) {
        placed[n].id = llm__hf_added_token_id(env, entry->key);
        placed[n].entry = entry;
    }
    qsort(placed, n, sizeof *placed, llm__hf_compare_placed_tokens);
    for (size_t i = 0; i < n; i++) {
        llm_token id = placed[i].id;
        llm__str text = llm__json_need(env, placed[i].entry, "content", LLM__JSON_STRING)->string;
        if ((size_t)id >= parts->n || !parts->types[id] || !llm__str_equal(parts->pieces[id], text)) {
            if (++n_misplaced > LLM__MAX_MISPLACED) /* each is looked for among all tokens */
                llm__fail(env, LLM_ERROR_UNSUPPORTED,
                          "added_tokens_decoder has more than %d tokens that are not at their ids in tokenizer.json",
                          LLM__MAX_MISPLACED);
            id = llm__vocab_find_part(parts, text);
        }
        if (!text.n || (id == LLM__NONE && parts->n >= n_rows)) continue;
        llm__vocab_put_added(env, parts, placed[i].entry, id == LLM__NONE ? (llm_token)parts->n : id, parts->n);
    }
}

static void llm__hf_tokenizer_config(llm__env *env, const llm__json *config, size_t n_rows, llm__vocab_parts *parts,
                                     llm__vocab_source *v) {
    if (!v->scores) {
        llm__hf_merge_added_tokens(env, config, n_rows, parts);
    } else {
        llm__hf_added_tokens(env, config, parts);
        if (v->prefix == LLM__PREFIX_STRETCH && !llm__json_get_bool(env, config, "legacy", true))
            v->prefix = LLM__PREFIX_FIRST;
    }
    v->chat_template = llm__hf_chat_template(env, config);
    llm__hf_add_named_tokens(env, config, n_rows, parts);
    llm__hf_named_tokens(env, config, parts, v);
    v->add_bos = llm__json_get_bool(env, config, "add_bos_token", v->add_bos);
    v->add_eos = llm__json_get_bool(env, config, "add_eos_token", v->add_eos);
}

static void llm__hf_read_configs(llm__env *env, const char *directory, llm__vocab_parts *parts, llm__vocab_source *v) {
    static const char *const ids[] = {"generation_config.json", "config.json"};
    const llm__json *config = llm__hf_find_json(env, directory, "config.json"),
                    *rows = config ? llm__json_get(config, "vocab_size") : NULL;
    bool known = rows && rows->type == LLM__JSON_NUMBER && rows->number >= 0 && rows->number <= INT32_MAX;
    size_t n_rows = known ? (size_t)rows->number : SIZE_MAX;
    config = llm__hf_find_json(env, directory, "tokenizer_config.json");
    if (config) llm__hf_tokenizer_config(env, config, n_rows, parts, v);
    if ((v->bos == LLM__NONE || v->eos == LLM__NONE) &&
        (config = llm__hf_find_json(env, directory, "special_tokens_map.json")) != NULL)
        llm__hf_named_tokens(env, config, parts, v);
    for (int i = 0; i < 2; i++)
        if ((config = llm__hf_find_json(env, directory, ids[i])) != NULL) llm__hf_end_ids(env, config, parts, v);
    env->file = llm__path_join(env, directory, "chat_template.jinja");
    if (llm__path_find(env->file) != LLM__REGULAR) return;
    const llm__file *file = llm__file_open(env, env->file);
    v->chat_template.at = (const char *)file->data;
    v->chat_template.n = (size_t)file->size;
}

/* Ids without a token stay in the vocabulary, but encoding never produces them. */
static void llm__vocab_finish(llm__env *env, llm__vocab_parts *parts, llm__vocab_source *v) {
    float *scores = v->scores ? (float *)llm__alloc_zero(env, parts->n + 1, sizeof *scores) : NULL;
    if (scores) memcpy(scores, v->scores, v->n_pieces * sizeof *scores);
    v->scores = scores;
    v->pieces = parts->pieces;
    v->types = parts->types;
    v->traits = parts->traits;
    v->n_pieces = parts->n;
    for (size_t id = 0; id < parts->n; id++) {
        if (parts->types[id]) continue;
        parts->types[id] = LLM__TYPE_UNUSED;
        parts->pieces[id].at = "";
    }
}

/* Reads path, which is a tokenizer.json or tokenizer.model, and the files beside it. */
static llm_tokenizer *llm__tokenizer_from_file(llm__env *env, const char *directory, const char *path) {
    llm__pool *outer = env->pool, *inner = llm__pool_inner(env);
    const char *file_before = env->file;
    llm__vocab_source v;
    llm__vocab_parts parts;
    memset(&v, 0, sizeof v);
    memset(&parts, 0, sizeof parts);
    v.bos = v.eos = v.unk = LLM__NONE;
    env->pool = inner;
    env->file = path;
    const llm__file *file = llm__file_open(env, path);
    size_t n = strlen(path);
    if (n > 6 && !strcmp(path + n - 6, ".model")) {
        llm__proto_read(env, file, &parts, &v);
    } else {
        const llm__json *root = llm__json_parse(env, file->data, (size_t)file->size);
        llm__hftok_read(env, root, &parts, &v);
    }
    v.n_pieces = parts.n;
    llm__hf_read_configs(env, directory, &parts, &v);
    llm__vocab_finish(env, &parts, &v);
    env->file = path;
    env->pool = outer;
    llm_tokenizer *t = llm__tokenizer_build(env, &v);
    env->file = file_before;
    llm__free(outer, inner);
    return t;
}

static llm_tokenizer *llm__tokenizer_from_directory(llm__env *env, const char *directory) {
    const char *json = llm__path_join(env, directory, "tokenizer.json"),
               *model = llm__path_join(env, directory, "tokenizer.model");
    const char *path = llm__path_find(json) == LLM__REGULAR ? json : model;
    if (llm__path_find(path) != LLM__REGULAR)
        llm__fail(env, LLM_ERROR_IO, "there is neither tokenizer.json nor tokenizer.model in this directory");
    return llm__tokenizer_from_file(env, directory, path);
}

/* ---- Tokenizers alone ---- */

typedef struct llm__tokenizer_load_job {
    llm__file_source source;
    llm_tokenizer *tokenizer;
} llm__tokenizer_load_job;

static llm_tokenizer *llm__tokenizer_load_gguf(llm__env *env, const llm__file_source *source) {
    llm__pool *outer = env->pool, *inner = llm__pool_inner(env);
    env->pool = inner;
    const llm__checkpoint *ck = llm__gguf_read_first(env, llm__file_open_source(env, source));
    env->pool = outer;
    llm_tokenizer *t = llm__tokenizer_from_gguf(env, ck);
    llm__free(outer, inner);
    return t;
}

static void llm__tokenizer_load_body(llm__env *env, void *arg) {
    llm__tokenizer_load_job *job = (llm__tokenizer_load_job *)arg;
    const char *path = job->source.path, *name = path ? llm__path_name(path) : "", *end = strrchr(name, '.');
    if (path && llm__path_find(path) == LLM__DIRECTORY) {
        job->tokenizer = llm__tokenizer_from_directory(env, path);
    } else if (end && (!strcmp(end, ".json") || !strcmp(end, ".model"))) {
        const char *directory = name == path ? "." : llm__str_copy(env, path, (size_t)(name - path));
        job->tokenizer = llm__tokenizer_from_file(env, directory, path);
    } else {
        job->tokenizer = llm__tokenizer_load_gguf(env, &job->source);
    }
}

static llm_status llm__tokenizer_load(llm_tokenizer **out, const llm__file_source *source, const llm_host *host,
                                      llm_error *err) {
    llm__pool pool;
    llm__env env;
    llm__tokenizer_load_job job;
    if (!out) return llm__error(err, LLM_ERROR_ARGUMENT, "out is NULL");
    *out = NULL;
    llm_status status = llm__file_check_source(source, err);
    if (!status) status = llm__host_check(host, err);
    if (status) return status;
    job.source = *source;
    job.tokenizer = NULL;
    llm__pool_init(&pool, host);
    llm__env_init(&env, &pool, err, source->path);
    status = llm__env_run(&env, llm__tokenizer_load_body, &job);
    if (status) {
        llm__pool_free(&pool);
        return status;
    }
    job.tokenizer->own = pool;
    *out = job.tokenizer;
    return llm__error_done(err, LLM_OK);
}

LLM_API llm_status llm_tokenizer_load(llm_tokenizer **out, const char *path, const llm_host *host, llm_error *err) {
    llm__file_source source = {path, NULL, NULL, NULL, 0};
    return llm__tokenizer_load(out, &source, host, err);
}

LLM_API llm_status llm_tokenizer_load_memory(llm_tokenizer **out, const void *data, size_t size, const llm_host *host,
                                             llm_error *err) {
    llm__file_source source = {NULL, data, NULL, NULL, size};
    return llm__tokenizer_load(out, &source, host, err);
}

LLM_API llm_status llm_tokenizer_load_callback(llm_tokenizer **out, llm_read_fn read, void *user, uint64_t size,
                                               const llm_host *host, llm_error *err) {
    llm__file_source source = {NULL, NULL, read, user, size};
    return llm__tokenizer_load(out, &source, host, err);
}

LLM_API void llm_tokenizer_free(llm_tokenizer *tokenizer) {
    if (!tokenizer) return;
    llm__pool pool = tokenizer->own; /* a copy, since the tokenizer itself lies in its pool */
    llm__pool_free(&pool);
}

/* ==== 11 Chat templates =========================================================================================

   A conversation becomes text by the model's chat template, which section 8 runs. Strings of the host's are marked byte
   by byte there; the marked stretches of the result are encoded without special tokens. */

typedef struct llm__chat_text {
    const char *text; /* [n] UTF-8 */
    size_t n;
    llm__enc_span *spans; /* [n_spans] stretches that came from the host */
    size_t n_spans;
} llm__chat_text;

/* A role is part of the template's language if it looks like a word: "<|" + role + "|>" may be a special token. */
static llm__jinja_value llm__chat_role(llm__jinja_run *r, const char *role, size_t n) {
    size_t i = 0;
    while (i < n && i < 32 && (llm__jinja_is_word(role[i]) || role[i] == '-')) i++;
    return n && i == n ? llm__jinja_text(role, n) : llm__jinja_host_text(r, role, n);
}

static void llm__chat_store(llm__jinja_run *r, const llm__jinja_value *dict, const char *key, llm__jinja_value v) {
    llm__jinja_store(r, dict->u.dict, llm__jinja_text(key, strlen(key)), v);
}

static llm__jinja_value llm__chat_messages(llm__jinja_run *r, const llm_chat_desc *d) {
    llm__jinja_value list = llm__jinja_new_list(r);
    if (d->n_messages < 1 || !d->messages)
        llm__fail(r->env, LLM_ERROR_ARGUMENT, "there are %d messages", d->messages ? d->n_messages : 0);
    for (int i = 0; i < d->n_messages; i++) {
        const llm_message *m = &d->messages[i];
        if (!m->role || !m->content) llm__fail(r->env, LLM_ERROR_ARGUMENT, "messages[%d] has no role or no content", i);
        llm__jinja_value message = llm__jinja_new_dict(r);
        llm__chat_store(r, &message, "role", llm__chat_role(r, m->role, strlen(m->role)));
        llm__chat_store(r, &message, "content", llm__jinja_host_text(r, m->content, strlen(m->content)));
        llm__jinja_add(r, list.u.list, message);
    }
    return list;
}

/* Reads a JSON text of the host's; `type` is what it must be. */
static const llm__json *llm__chat_json(llm__env *env, const char *text, const char *what, llm__json_type type) {
    const char *file = env->file;
    env->file = what;
    const llm__json *v = llm__json_parse(env, text, strlen(text));
    if (v->type != type)
        llm__fail(env, LLM_ERROR_FORMAT, "this is %s, not %s", llm__json_type_name(v->type), llm__json_type_name(type));
    env->file = file;
    return v;
}

/* Messages given as JSON, in the form that OpenAI's API and transformers use. */
static llm__jinja_value llm__chat_json_messages(llm__jinja_run *r, const char *text) {
    const llm__json *v = llm__chat_json(r->env, text, "messages_json", LLM__JSON_ARRAY);
    llm__jinja_value list = llm__jinja_from_json(r, v);
    size_t i = 0;
    for (const llm__json *message = v->first; message; message = message->next, i++) {
        const llm__json *role = llm__json_get(message, "role");
        if (!role || role->type != LLM__JSON_STRING)
            llm__fail(r->env, LLM_ERROR_ARGUMENT, "message %llu of messages_json has no role", (unsigned long long)i);
        llm__chat_store(r, &list.u.list->items[i], "role", llm__chat_role(r, role->string.at, role->string.n));
    }
    return list;
}

static void llm__chat_set_token(llm__jinja_run *r, const llm_tokenizer *t, const char *name, llm_token id) {
    if (id == LLM__NONE) return;
    llm__str piece = llm__vocab_piece(t, id);
    const uint8_t *p = (const uint8_t *)piece.at, *end = p + piece.n;
    p = llm__utf8_valid(r->env, p, &end);
    llm__jinja_set_variable(r, name, llm__jinja_text((const char *)p, (size_t)(end - p)));
}

/* The variables that transformers gives a template. */
static void llm__chat_set_variables(llm__jinja_run *r, const llm_tokenizer *t, const llm_chat_desc *d) {
    llm__jinja_value none = llm__jinja_make(LLM__J_NONE);
    llm__chat_set_token(r, t, "bos_token", t->bos);
    llm__chat_set_token(r, t, "eos_token", t->eos);
    llm__jinja_set_variable(r, "add_generation_prompt", llm__jinja_bool(d->open_answer));
    llm__jinja_set_variable(r, "documents", none);
    llm__jinja_set_variable(
        r, "tools",
        d->tools_json ? llm__jinja_from_json(r, llm__chat_json(r->env, d->tools_json, "tools_json", LLM__JSON_ARRAY))
                      : none);
    const llm__json *more =
        d->variables_json ? llm__chat_json(r->env, d->variables_json, "variables_json", LLM__JSON_OBJECT)->first : NULL;
    for (; more; more = more->next) llm__jinja_assign(r, more->key, llm__jinja_from_json(r, more));
    llm__jinja_set_variable(r, "messages",
                            d->messages_json ? llm__chat_json_messages(r, d->messages_json) : llm__chat_messages(r, d));
}

/* The stretches of the output that came from the host. */
static llm__chat_text llm__chat_finish(llm__env *env, const llm__jinja_buffer *out) {
    llm__chat_text text = {out->text ? out->text : "", out->n, NULL, 0};
    size_t room = 0;
    for (size_t i = 0; i < out->n; i++) {
        if (!out->host[i]) continue;
        if (!i || !out->host[i - 1]) {
            text.spans = (llm__enc_span *)llm__alloc_grow(env, text.spans, text.n_spans, &room, sizeof *text.spans);
            text.spans[text.n_spans++].begin = i;
        }
        text.spans[text.n_spans - 1].end = i + 1;
    }
    return text;
}

static llm__chat_text llm__chat_render(llm__env *env, const llm_tokenizer *t, const llm_chat_desc *d) {
    llm__jinja_run r;
    if (!t->chat_template)
        llm__fail(env, LLM_ERROR_UNSUPPORTED,
                  "the model's file has no chat template; render the messages as text yourself");
    if (t->chat_problem) llm__fail(env, LLM_ERROR_UNSUPPORTED, "%s", t->chat_problem);
    llm__jinja_begin(&r, env, t->classes);
    llm__chat_set_variables(&r, t, d);
    llm__jinja_exec(&r, t->chat_program);
    return llm__chat_finish(env, &r.out);
}

typedef struct llm__chat_job {
    const llm_tokenizer *t;
    const llm_chat_desc *desc;
    bool encode;
    char *text;     /* [capacity] if not encode */
    llm_token *ids; /* [capacity] if encode     */
    size_t capacity, n;
} llm__chat_job;

static void llm__chat_body(llm__env *env, void *arg) {
    llm__chat_job *job = (llm__chat_job *)arg;
    if (!job->desc) llm__fail(env, LLM_ERROR_ARGUMENT, "desc is NULL");
    llm__chat_text out = llm__chat_render(env, job->t, job->desc);
    if (job->encode) {
        job->n = llm__enc_spans(env, job->t, out.text, out.n, LLM_TOKENS_SPECIAL, out.spans, out.n_spans, job->ids,
                                job->capacity);
        return;
    }
    job->n = out.n;
    if (!job->capacity) return;
    size_t n_shown = out.n < job->capacity ? out.n : job->capacity - 1;
    memcpy(job->text, out.text, n_shown);
    job->text[n_shown] = 0;
}

static int64_t llm__chat_run(llm__chat_job *job, llm_error *err) {
    llm__pool pool;
    llm__env env;
    llm__pool_init(&pool, &job->t->host);
    llm__env_init(&env, &pool, err, NULL);
    llm_status status = llm__env_run(&env, llm__chat_body, job);
    llm__pool_free(&pool);
    return llm__error_done(err, status) ? -1 : (int64_t)job->n;
}

LLM_API int64_t llm_chat_encode(const llm_tokenizer *tokenizer, const llm_chat_desc *desc, llm_token *ids,
                                size_t capacity, llm_error *err) {
    llm__chat_job job = {tokenizer, desc, true, NULL, ids, capacity, 0};
    return llm__chat_run(&job, err);
}

LLM_API int64_t llm_chat_render(const llm_tokenizer *tokenizer, const llm_chat_desc *desc, char *text, size_t capacity,
                                llm_error *err) {
    llm__chat_job job = {tokenizer, desc, false, text, NULL, capacity, 0};
    return llm__chat_run(&job, err);
}

LLM_API const char *llm_chat_template_text(const llm_tokenizer *tokenizer) { return tokenizer->chat_template; }

#endif

/* ==== 12 CPU kernels ============================================================================================

   THE ONE ARITHMETIC. Everything that is computed on the CPU is defined here once, over vectors of 16 floats. Each
   instruction set supplies the vector operations, and section 25 is compiled once for each. The scalar set is the
   definition.

   A product of activations x and weights w comes in these kinds:

     f32    one chain:  y = fma(x[k], w[k], y)  for k = 0, 1, 2 ...   f16 weights likewise
     bf16   as the matrix unit's instruction TDPBF16PS sums: x and w are bf16; for each 32 consecutive k,
                e = fma(x[k], w[k], e) over the even k,  o likewise over the odd k,  both from 0;   y = y + (e + o).
     int8   the same sums over integers, which bf16 holds exactly, and at the end  y = y + sum * scale[output].
     groups x, rounded to bf16 as above, becomes integers in groups of 32: s = max|x| / 127, x = s * a. Weights are
                d * q + m; 32 or 16 consecutive k share d and m. Then  y = fma(d * s, sum of q * a, y),  and if
                there are minimums  y = fma(m, s * sum of a, y).  Sums of integers are exact in any order.

   k is padded with zeros to a multiple of 32. Weights are stored in tiles of 16 outputs. So a vector holds the same k
   of 16 outputs, and each lane computes one output in exactly this order:

     f32, f16  [k][16]          bf16   [k/2][16][2]            int8   [k][16], then f32 scale[16]
     groups    see llm__kernel_forms

   A block of the KV cache consists of such tiles: keys with k along the head, values with k along the positions. In an
   int8 cache each key and each value vector has one scale. The tiles of keys hold theirs. Those of the values are
   stored after their tiles, whose own scales are 1; they are multiplied into the softmax weights, which are then
   rounded to bf16 again.

   Other sums (RMSNorm, softmax) run in 16 lanes, element i in lane i % 16, and end in one tree: lane i adds lane i +
   8, then i + 4, i + 2, i + 1. Denormal results become zero. 2^x is the polynomial below, 1 / x the iteration. FMA is
   written where it is meant. The compiler must not form or split one, whatever flags the host uses.

   There is one known exception: a result that rounding lifts to the smallest normal number, 2^-126, is that number on
   x86 and zero on aarch64, which tests for denormals before it rounds. */

#if defined(LLM_IMPLEMENTATION) && !defined(LLM__IMPLEMENTED) && !defined(LLM__KERNEL_PASS)

typedef enum llm__weight_type {
    LLM__W_F32,
    LLM__W_BF16,
    LLM__W_INT8,
    LLM__W_F16,
    LLM__W_Q4, /* this one and all below are in groups */
    LLM__W_Q4_MIN,
    LLM__W_Q4_K,
    LLM__W_Q4_K16,
    LLM__W_Q5,
    LLM__W_Q5_MIN,
    LLM__W_Q5_K,
    LLM__W_Q6_K16,
    LLM__W_Q8,
    LLM__W_IQ4,
    LLM__W_IQ4_K,
    LLM__W_KINDS
} llm__weight_type;

/* How the kinds in groups store weights. A tile has first the numbers of all its groups, then all scales, then, for
   the K kinds, an f16 d[16] (and m[16]) per 8 groups. The numbers of a group are bytes [8][16][4]: four k of each of
   16 outputs. Numbers with fewer than 8 bits: [4][16][4] bytes hold the low four bits of [j] and [j + 4]; the
   remaining bits follow, those of [0] lowest, with five bits as [16][4] bytes for all 8, with six as [2][16][4] for
   four each. Scales of a group: f16 d[16], then m[16] if there are minimums. In the K kinds they are 8-bit integers,
   or two sets of 16 if 16 k share one; they are multiplied by d, and by -m. The IQ4 kinds hold indexes into
   llm__iq4_numbers. */
typedef struct llm__kernel_form {
    uint8_t bits, zero;       /* a weight is d * (number - zero) + m; 8-bit numbers are signed */
    bool minimum, k, sixteen; /* `k`: a K kind; `sixteen`: 16 k share a scale */
    bool table;               /* the numbers are those of llm__iq4_numbers */
} llm__kernel_form;

static const llm__kernel_form llm__kernel_forms[LLM__W_KINDS] = {
    {0, 0, false, false, false, false}, {0, 0, false, false, false, false}, {0, 0, false, false, false, false},
    {0, 0, false, false, false, false}, {4, 8, false, false, false, false}, {4, 0, true, false, false, false},
    {4, 0, true, true, false, false},   {4, 0, true, true, true, false},    {5, 16, false, false, false, false},
    {5, 0, true, false, false, false},  {5, 0, true, true, false, false},   {6, 32, false, true, true, false},
    {8, 0, false, false, false, false}, {4, 0, false, false, false, true},  {4, 0, false, true, false, true},
};

/* Bytes of a tile: of a group's numbers, of its scales, and of the d and m of 8 groups. */
#define LLM__NUMBER_BYTES(kind) ((size_t)llm__kernel_forms[kind].bits * 64)
#define LLM__SCALE_BYTES(kind)                     \
    ((size_t)(llm__kernel_forms[kind].k ? 16 : 32) \
     << (llm__kernel_forms[kind].minimum ? 1 : 0) << (llm__kernel_forms[kind].sixteen ? 1 : 0))
#define LLM__K_BYTES(kind) ((size_t)(llm__kernel_forms[kind].k ? 32 : 0) << (llm__kernel_forms[kind].minimum ? 1 : 0))

static int llm__math_round_up(int n, int step) { return (n + step - 1) / step * step; }

/* Bytes of a tile with k inputs. */
static size_t llm__matrix_tile_bytes(llm__weight_type kind, int k) {
    static const size_t block_bytes[LLM__W_Q4] = {2048, 1024, 512, 1024};
    size_t n = (size_t)llm__math_round_up(k, 32) / 32;
    if (kind < LLM__W_Q4) return n * block_bytes[kind] + (kind == LLM__W_INT8 ? 64 : 0);
    size_t bytes = n * (LLM__NUMBER_BYTES(kind) + LLM__SCALE_BYTES(kind)) + (n + 7) / 8 * LLM__K_BYTES(kind);
    return (bytes + 63) / 64 * 64;
}

static bool llm__matrix_has_groups(llm__weight_type kind) { return kind >= LLM__W_Q4; }

/* 32 activations as integers a: x = scale * a. The sums are over all 32 and over each half. */
typedef struct llm__kernel_group {
    int8_t a[32];
    float scale, scaled_sum, scaled_sums[2]; /* scale * n, scale * halves[] */
    int32_t n, halves[2], unused;
} llm__kernel_group;

#define LLM__LOG2_E 1.44269504f /* log2(e) */
#define LLM__WHOLE 12582912.0f  /* 1.5 * 2^23: adding it rounds a float to an integer */
#define LLM__INVERSE 0x7EF311C0 /* minus the bits of a number: approximately the bits of its inverse */
#define LLM__LEAST 1e-30f       /* a group of activations that are all smaller counts as 0 */

/* Multiplies `rows` activation rows x[row * x_stride + k] by n consecutive tiles and adds the outputs to y[row *
   y_stride + 0 .. 16 * n - 1]. */
typedef void llm__kernel_product_fn(const float *x, size_t x_stride, int rows, const void *tiles, int n, int k,
                                    float *y, size_t y_stride);

typedef enum llm__kernel_ending { LLM__STORE, LLM__ADD, LLM__SWIGLU } llm__kernel_ending;

/* A panel: n_rows packed activation rows times n_tiles tiles, and what to do with their sums. */
typedef struct llm__kernel_panel {
    const uint8_t *a;
    size_t line_step; /* of the rows, see llm__kernel_lines */
    int n_rows, k;
    llm__weight_type kind;
    const uint8_t *tiles, *ahead; /* `ahead`: tiles to prefetch, or NULL */
    size_t tile_bytes;
    int n_tiles;
    llm__kernel_ending ending;
    float *y; /* [n_rows][width] where the sums are stored or added */
    size_t y_stride;
    int width;       /* number of outputs, may be less than 16 * n_tiles */
    uint8_t *packed; /* with LLM__SWIGLU: rows of packed_k values that receive the results from `column` on */
    size_t packed_k;
    int column;
    float *c;          /* scratch [n_rows padded to 16][16 * n_tiles] for sums over a part of k */
    uint8_t *unpacked; /* scratch [2][LLM__TILE_BLOCKS][1024] */
} llm__kernel_panel;

/* Rows of a panel whose sums are complete, but not yet stored, added or turned into SwiGLU. */
typedef struct llm__kernel_ended {
    const llm__kernel_panel *panel;
    int tile, n_cols, row, n;
    float *at; /* [n][32] points into: */
    float sums[32 * 32] __attribute__((aligned(64)));
} llm__kernel_ended;

/* A product of many rows with one pair of tiles: c[16 * n_rows][16 * n_cols] = (or +=) the sums over n_blocks times 32
   k. */
typedef struct llm__kernel_tile_product {
    const uint8_t *a; /* [n_rows][a_blocks] blocks of 16 rows and 32 k of bf16, see llm__kernel_packed_row         */
    int n_rows, a_blocks;    /* n_rows counts groups of 16 rows */
    const uint8_t *const *b; /* [n_blocks] the first tile's blocks of 1 KB each: [16 pairs of k][16][2] */
    size_t b_next;           /* distance in bytes to the second tile's blocks */
    int n_blocks, n_cols;    /* n_cols: number of tiles, 1 or 2 */
    float *c;
    size_t c_stride;
    bool add;
    const uint8_t *ahead; /* data to prefetch meanwhile, in two runs that are ahead_next apart; or NULL */
    size_t ahead_bytes, ahead_next;
    llm__kernel_ended *ended; /* finished rows of the panel, which are stored meanwhile; or NULL */
    bool ends;                /* the sums of this call are complete and go to `ended`, not to c */
    int tile;                 /* number of the first tile in the panel */
} llm__kernel_tile_product;

enum {
    LLM__RUN_TILES = 4,    /* tiles multiplied with one run of activations before the next run */
    LLM__RUN_K = 2048,     /* length of a run; as pairs, 8 rows of it are 32 KB */
    LLM__STRIP_MOST = 96,  /* max rows of a strip, a multiple of LLM__STRIP_ROWS, ... */
    LLM__STRIP_BLOCKS = 6, /* ... and its number of blocks */
    LLM__TILE_ROWS = 16,   /* from this many query rows on, attention uses the packed kernels */
    LLM__GROUPS = 16,      /* groups of two tiles that are widened to bytes at once for many rows: 24 KB */
    LLM__TILE_BLOCKS = 18, /* blocks of 32 k of two tiles that stay in the L1 cache: 36 KB */
    LLM__PANEL_LEAST = 36, /* min rows for which widening two tiles to pairs of bf16 pays (Zen 4) */
    LLM__PANEL_TILES = 16, /* tiles, and rows, of a panel: its sums and activations stay in the L2 cache */
    LLM__PANEL_ROWS = 512,
    LLM__MAX_RUN = 128 /* tokens of the vocabulary that share one maximum in the sampler; a multiple of 16 */
};

/* A row of activations for products of many rows. It consists of lines of 32 bf16, `step` bytes apart. The order
   inside a line is the instruction set's own; only the functions below know it. */
typedef struct llm__kernel_lines {
    uint8_t *at;
    size_t step;
} llm__kernel_lines;

/* Where row r of packed rows of k values begins. Step 64: rows are contiguous. Step 1024 (matrix unit): groups of 16
   rows, interleaved line by line. */
static inline llm__kernel_lines llm__kernel_packed_row(size_t step, uint8_t *packed, size_t k, size_t r) {
    size_t in_turns = r & (step / 64 - 1);
    llm__kernel_lines row = {packed + (r - in_turns) * k * 2 + in_turns * 64, step};
    return row;
}

typedef struct llm__kernels {
    const char *name;
    llm__kernel_product_fn *product[LLM__W_Q4];
    /* The same for tiles of a kind in groups and rows of k / 32 llm__kernel_group, which `quantize` makes from k
       activations. If an activation is NaN or infinite, the scales of its row are NaN. */
    void (*group_product)(llm__weight_type kind, const llm__kernel_group *x, size_t x_stride, int rows,
                          const uint8_t *tiles, int n, int k, float *y, size_t y_stride);
    void (*quantize)(const float *x, int k, llm__kernel_group *lines);
    void (*unpack)(const uint8_t *w, int n_blocks,
                   uint8_t *to); /* converts int8 blocks to bf16, in the order of the kind's tiles */
    /* RMSNorm: factor = 1 / sqrt(mean(x * x) + eps); y = x * factor * w for n values, zeros up to a multiple of 32,
       rounded to bf16 if `round`. */
    float (*norm_factor)(const float *x, int n, float eps);
    void (*norm)(const float *x, const float *w, int n, float factor, bool round, float *y);
    /* y = silu(gate) * up = gate / (1 + 2^(-log2(e) gate)) * up. Gates and ups alternate in groups of 16. */
    void (*swiglu)(const float *gate_up, int n, bool round, float *y);
    /* Turns n scores into 2^(scale * s - max), with zeros up to `padded`. *max is the maximum of scale * s (scale >
       0), *sum the sum before rounding. */
    void (*softmax)(float *s, int n, int padded, float scale, bool round, float *max, float *sum);
    /* For the sampler: the maximum of each LLM__MAX_RUN of n values. Returns false if one of the values is NaN. */
    bool (*maxima)(const float *x, int n, float *maxima);
    /* p = 2^((x - top) * scale), or 0 below 2^-125.5, for n values of at most `top`, and zeros up to a multiple of 16;
       their maxima as above. Returns the sum. */
    float (*odds)(const float *x, int n, float top, float scale, float *p, float *maxima);
    /* Merges partial attention results into running ones. For each row (max, sum, out[n]) is the result so far; rows
       of out and of part are n apart. */
    void (*merge)(int rows, float *max, float *sum, float *out, const float *part_max, const float *part_sum,
                  const float *part, int n);
    /* y = x * factor, rounded to bf16 if `round`. */
    void (*scale)(const float *x, float factor, int n, bool round, float *y);
    void (*add)(float *y, const float *x, int n);   /* y += x */
    void (*weigh)(float *y, const float *x, int n); /* y = y * x, rounded to bf16; n is a multiple of 16 */
    /* Rotates the pairs (x[i], x[i + half]) by the angles whose cosines and sines are given. */
    void (*rope)(float *x, const float *cosines, const float *sines, int half);
    /* The limits that benchmarks compare with. `read` reads n bytes and ignores them. `multiply` does n times 2 * 16 *
       12 floating-point operations that depend on little else. The others do four times as many on bytes, twice as
       many on pairs of bf16, and on the matrix unit 2 * 4 * 16 * 16 * 32. The last two are NULL where they do not
       exist. */
    uint32_t (*read)(const void *p, size_t n);
    uint32_t (*multiply)(size_t n), (*multiply_bytes)(size_t n), (*multiply_pairs)(size_t n),
        (*tile_multiply)(size_t n);
    /* Kernels for many bf16 rows. NULL (and 0) in sets that use `product` for those, too. panel_rows: min rows for
       which `panel` is faster. */
    size_t line_step;
    int panel_rows;
    void (*tile_product)(const llm__kernel_tile_product *p);
    void (*panel)(const llm__kernel_panel *p); /* bf16 and int8 */
    /* The functions above, with rounded results written into a packed row from `column` on (a multiple of 16): x *
       factor for n values, and zeros up to n_padded; a norm, with zeros up to the end of its last line; a softmax of n
       scores, with zeros up to `padded`, a multiple of 32. */
    void (*pack_scale)(const float *x, float factor, int n, int n_padded, llm__kernel_lines row, int column);
    void (*pack_norm)(const float *x, const float *w, int n, float factor, llm__kernel_lines row);
    void (*pack_softmax)(const float *s, int n, int padded, float scale, llm__kernel_lines row, float *max, float *sum);
    /* Each thread must enter the matrix unit before using it. NULL where there is none. */
    void (*tiles_enter)(void), (*tiles_leave)(void);
} llm__kernels;

/* Sets the floating-point unit to round to nearest and to flush denormals. Returns the old setting. */
static uint64_t llm__fpu_enter(void) {
#if defined(__x86_64__)
    uint32_t old, wanted = 0x9FC0; /* flush to zero, denormals are zero, all exceptions masked */
    __asm__ volatile("stmxcsr %0" : "=m"(old));
    __asm__ volatile("ldmxcsr %0" : : "m"(wanted));
    return old;
#elif defined(__aarch64__)
    uint64_t old, wanted = 1u << 24;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    __asm__ volatile("msr fpcr, %0" : : "r"(wanted));
    return old;
#else
    return 0;
#endif
}

static void llm__fpu_leave(uint64_t old) {
#if defined(__x86_64__)
    uint32_t word = (uint32_t)old;
    __asm__ volatile("ldmxcsr %0" : : "m"(word));
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(old));
#else
    (void)old;
#endif
}

/* clang applies FP_CONTRACT neither to intrinsics nor in its back end, which may fuse a multiply and an add under
   -ffast-math. An empty asm keeps the two apart. `kind` is the constraint of the register. */
#if defined(__clang__) && defined(__FAST_MATH__)
#define LLM__HIDE(kind, x) __asm__("" : kind(x))
#if defined(__x86_64__)
#define LLM__HIDE_FLOAT(x) LLM__HIDE("+x", x)
#else
#define LLM__HIDE_FLOAT(x) LLM__HIDE("+w", x)
#endif
#else
#define LLM__HIDE_FLOAT(x) ((void)0)
#define LLM__HIDE(kind, x) ((void)0)
#endif

/* a * b + c, rounded once; denormals become zero. */
static inline float llm__math_fma(float a, float b, float c) {
#if defined(_WIN32) || (defined(__clang__) && defined(__FAST_MATH__))
    /* Not every Windows C library rounds fmaf correctly, and clang under -ffast-math may replace it. In double the
       product is exact. Rounding the sum to odd keeps the final rounding to float correct (Boldo and Melquiond,
       "Emulation of FMA and correctly rounded sums", 2008). */
    double p = (double)a * b, s = p + c, t = s - p, error = (p - (s - t)) + (c - t);
    uint64_t bits;
    memcpy(&bits, &s, 8);
    if (error != 0 && !(bits & 1)) bits += (error > 0) == (s > 0) ? 1 : (uint64_t)-1;
    memcpy(&s, &bits, 8);
    float r = (float)s;
#else
    float r = fmaf(a, b, c);
#endif
    return (llm__f32_bits(r) & 0x7F800000) ? r : llm__f32_from_bits(llm__f32_bits(r) & 0x80000000);
}

/* Square root of a positive number in fixed operations, because a compiler may replace a call by an estimate. */
static double llm__math_sqrt(double x) {
    uint64_t bits;
    double r;
    memcpy(&bits, &x, 8);
    bits = (bits >> 1) + 0x1FF7A3BEA91D9B1Bu; /* halves the exponent; the error is at most 4 % */
    memcpy(&r, &bits, 8);
    for (int i = 0; i < 5; i++) r = 0.5 * (r + x / r);
    return r;
}

/* AMX: eight tile registers of 16 rows of 64 bytes. The instructions are written as asm, because gcc 12's intrinsics
   do not declare that they touch memory. A test may define its own, to run on machines without the unit. */
#if defined(LLM__TILE_DOT) || (defined(__x86_64__) && defined(__linux__) && !defined(LLM_NO_SIMD))
#define LLM__HAVE_TILES
typedef struct llm__amx_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} llm__amx_config;
#endif
#if defined(LLM__HAVE_TILES) && !defined(LLM__TILE_DOT)
#include <cpuid.h>
#include <sys/syscall.h>
#define LLM__TILE_CONFIG(config) __asm__ volatile("ldtilecfg %0" : : "m"(config))
#define LLM__TILE_RELEASE() __asm__ volatile("tilerelease" : : : "memory")
#define LLM__TILE_ZERO(t) __asm__ volatile("tilezero %tmm" #t)
#define LLM__TILE_LOAD(t, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"((const void *)(from)), "r"((size_t)(stride)) : "memory")
/* The same, bypassing the L1 cache, for data that is used once. */
#define LLM__TILE_STREAM(t, from, stride) \
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #t::"r"((const void *)(from)), "r"((size_t)(stride)) : "memory")
#define LLM__TILE_STORE(t, to, stride) \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" : : "r"((void *)(to)), "r"((size_t)(stride)) : "memory")
#define LLM__TILE_DOT(c, a, b) __asm__ volatile("tdpbf16ps %tmm" #b ", %tmm" #a ", %tmm" #c)

/* Checks that the unit exists, that the system saves its registers, and that this process may use it. */
static bool llm__amx_allowed(void) {
    uint32_t a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false; /* OSXSAVE */
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low >> 17 & 3) != 3) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false; /* bf16, tiles */
    if (!__get_cpuid_count(0x1D, 1, &a, &b, &c, &d) || b >> 16 < 8 || (b & 0xFFFF) < 64 || (c & 0xFFFF) < 16)
        return false;
    long status; /* of the system call itself; libc declares no function for it if a host includes its headers first */
    __asm__ volatile("syscall"
                     : "=a"(status)
                     : "0"((long)SYS_arch_prctl), "D"(0x1023L /* ARCH_REQ_XCOMP_PERM */), "S"(18L /* tile data */)
                     : "rcx", "r11", "memory");
    return status == 0;
}
#endif

/* The kernels of each instruction set: the file includes itself, and only section 25 is compiled then. */
#ifndef LLM_HEADER_FILENAME
#define LLM_HEADER_FILENAME "llm.h"
#endif
#define LLM__JOIN2(a, b) a##b
#define LLM__JOIN(a, b) LLM__JOIN2(a, b)
#define LLM__FN(name) LLM__JOIN(LLM__KERNEL_PASS, name)

#define LLM__TARGET
#define LLM__KERNEL_PASS llm__scalar_
#include LLM_HEADER_FILENAME
#undef LLM__KERNEL_PASS
#undef LLM__TARGET

#if defined(__x86_64__) && !defined(LLM_NO_SIMD)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push /* gcc 12 warns of its own intrinsics in C++ */
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#define LLM__USE_AVX512
#define LLM__TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define LLM__KERNEL_PASS llm__avx512_
#include LLM_HEADER_FILENAME
#undef LLM__KERNEL_PASS
#undef LLM__TARGET

#define LLM__USE_BF16
#define LLM__TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,f16c")))
#define LLM__KERNEL_PASS llm__avx512_bf16_
#include LLM_HEADER_FILENAME
#undef LLM__KERNEL_PASS
#undef LLM__TARGET
#undef LLM__USE_BF16
#undef LLM__USE_AVX512

#define LLM__USE_AVX2
#define LLM__TARGET __attribute__((target("avx2,fma,f16c")))
#define LLM__KERNEL_PASS llm__avx2_
#include LLM_HEADER_FILENAME
#undef LLM__KERNEL_PASS
#undef LLM__TARGET
#undef LLM__USE_AVX2
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#if defined(__aarch64__) && !defined(LLM_NO_SIMD)
#include <arm_neon.h>
#define LLM__USE_NEON
#define LLM__TARGET
#define LLM__KERNEL_PASS llm__neon_
#include LLM_HEADER_FILENAME
#undef LLM__KERNEL_PASS
#undef LLM__TARGET
#undef LLM__USE_NEON
#endif

/* The best instruction set of this machine, or the named one; NULL if the machine lacks it. */
static const llm__kernels *llm__kernels_choose(const char *isa) {
#if defined(__x86_64__) && !defined(LLM_NO_SIMD)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); /* every such processor has f16c */
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#if defined(LLM__HAVE_TILES)
    if (bf16 && (!isa || !strcmp(isa, "amx")) && llm__amx_allowed()) return &llm__avx512_bf16_amx_kernels;
#endif
    if (bf16 && (!isa || !strcmp(isa, "avx512_bf16"))) return &llm__avx512_bf16_kernels;
    if (avx512 && (!isa || !strcmp(isa, "avx512"))) return &llm__avx512_kernels;
    if (avx2 && (!isa || !strcmp(isa, "avx2"))) return &llm__avx2_kernels;
#elif defined(__aarch64__) && !defined(LLM_NO_SIMD)
    if (!isa || !strcmp(isa, "neon")) return &llm__neon_kernels;
#endif
    return !isa || !strcmp(isa, "scalar") ? &llm__scalar_kernels : NULL;
}

/* ==== 13 Weights ================================================================================================

   From tensors in a file to matrices in the order of the kernels. */

/* A rank's share of n things that come in units. Without a comm, all of them. */
static llm_backend_range llm__ranks_share(const llm_comm *comm, int n, int unit) {
    llm_backend_range span = {0, n};
    if (!comm) return span;
    int64_t n_units = (n + unit - 1) / unit;
    int end = (int)(n_units * (comm->rank + 1) / comm->size) * unit;
    span.first = (int)(n_units * comm->rank / comm->size) * unit;
    if (span.first > n) span.first = n;
    span.n = (end < n ? end : n) - span.first;
    return span;
}

enum {
    LLM__EMBD_UNIT = 16, /* outputs that stay on one rank: a tile                                       */
    LLM__FF_UNIT = 32,   /* ... a line of packed rows, see llm__kernel_lines                                   */
    LLM__COLUMNS = 512   /* tokens of the vocabulary whose softmax is taken at once (of the arithmetic) */
};

/* Key heads go with the query heads that attend to them, so some may be on two ranks. */
static llm_backend_range llm__ranks_key_heads(const llm_comm *tensor, const llm_backend_shape *s) {
    llm_backend_range heads = llm__ranks_share(tensor, s->n_heads, 1), keys;
    int group = s->n_heads / s->n_kv_heads;
    keys.first = heads.first / group;
    keys.n = heads.n ? (heads.first + heads.n - 1) / group - keys.first + 1 : 0;
    return keys;
}

/* The layers of a stage of the pipeline. The last stage also has the head, which counts as half the layers that have as
   many weights: when texts are scored, only some rows go through it (70 % for HellaSwag), and of a prompt only one. */
static llm_backend_range llm__ranks_layers_of(const llm_backend_shape *s, int stage, int n_stages) {
    double q = (double)s->n_heads * s->head_dim, kv = (double)s->n_kv_heads * s->head_dim,
           layer = s->n_embd * (2 * q + 2 * kv + 3.0 * s->n_ff), head = (double)s->n_vocab * s->n_embd / 2,
           share = (s->n_layers + head / layer) / n_stages;
    int ends[2]; /* of the stage before, and of this one */
    for (int i = 0; i < 2; i++) {
        int rest = n_stages - (stage + i); /* stages behind, each with a layer at least */
        ends[i] = (int)(share * (stage + i) + 0.5);
        if (ends[i] > s->n_layers - rest || !rest) ends[i] = s->n_layers - rest;
        if (ends[i] < stage + i) ends[i] = stage + i;
    }
    llm_backend_range layers = {ends[0], ends[1] - ends[0]};
    return layers;
}

static bool llm__ranks_is_first_stage(const llm_comm *pipeline) { return !pipeline || pipeline->rank == 0; }
static bool llm__ranks_is_last_stage(const llm_comm *pipeline) {
    return !pipeline || pipeline->rank == pipeline->size - 1;
}

static llm_backend_range llm__ranks_own_layers(const llm_backend_shape *s, const llm_comm *pipeline) {
    return llm__ranks_layers_of(s, pipeline ? pipeline->rank : 0, pipeline ? pipeline->size : 1);
}

LLM_API llm_backend_ranks llm_backend_find_ranks(const llm_backend_shape *whole, const llm_comm *tensor,
                                                 const llm_comm *pipeline) {
    llm_backend_ranks r;
    r.layers = llm__ranks_own_layers(whole, pipeline);
    r.heads = llm__ranks_share(tensor, whole->n_heads, 1);
    r.key_heads = llm__ranks_key_heads(tensor, whole);
    r.embd = llm__ranks_share(tensor, whole->n_embd, LLM__EMBD_UNIT);
    r.ff = llm__ranks_share(tensor, whole->n_ff, LLM__FF_UNIT);
    r.vocab = llm__ranks_share(tensor, whole->n_vocab, LLM__COLUMNS);
    r.embd_unit = LLM__EMBD_UNIT;
    r.ff_unit = LLM__FF_UNIT;
    r.vocab_unit = LLM__COLUMNS;
    r.shape = *whole;
    r.shape.n_layers = r.layers.n;
    r.shape.n_heads = r.heads.n;
    r.shape.n_kv_heads = r.key_heads.n;
    return r;
}

/* The rows of part `part` of a weight, of which there are n, that a rank has. */
static llm_backend_range llm__ranks_rows(const llm_comm *tensor, const llm_backend_shape *s,
                                         llm_backend_weight_kind kind, int part, int n) {
    llm_backend_range rows = {0, n};
    switch (kind) {
    case LLM_WEIGHT_EMBEDDING:
    case LLM_WEIGHT_HEAD: return llm__ranks_share(tensor, n, LLM__COLUMNS);
    case LLM_WEIGHT_QKV:
    case LLM_WEIGHT_QKV_BIAS:
        rows = part ? llm__ranks_key_heads(tensor, s) : llm__ranks_share(tensor, s->n_heads, 1);
        rows.first *= s->head_dim;
        rows.n *= s->head_dim;
        return rows;
    case LLM_WEIGHT_GATE_UP: return llm__ranks_share(tensor, n, LLM__FF_UNIT);
    case LLM_WEIGHT_ATTENTION_OUT:
    case LLM_WEIGHT_DOWN: return llm__ranks_share(tensor, n, LLM__EMBD_UNIT);
    default: return rows;
    }
}

/* The rows of a weight come from up to three consecutive tensors. */
typedef struct llm__weight_source {
    llm__tensor parts[3];
    int n_parts;
    int first[3], n[3];   /* the rows of each that this rank has */
    int n_interleaved[3]; /* head length of parts whose RoPE pairs are (2i, 2i + 1), else 0 */
    int rope_dim;
    size_t *n_read; /* atomic: bytes handed out as raw rows */
} llm__weight_source;

enum { LLM__KEPT_BYTES = 8 << 20 }; /* bytes of a mapped file that stay in memory behind the read position */

/* The row of an interleaved tensor that holds dimension `row` of the halved order that we compute in. */
static int llm__weight_interleaved_row(int row, int head_dim, int rope_dim) {
    int head = row / head_dim, d = row % head_dim, half = rope_dim / 2;
    if (d >= rope_dim) return row;
    return head * head_dim + (d < half ? 2 * d : 2 * (d - half) + 1);
}

/* The tensor that a weight's row comes from; *row becomes the row's number in it. */
static const llm__tensor *llm__weight_find_row(const llm_backend_weight *weight, int *row) {
    const llm__weight_source *source = (const llm__weight_source *)weight->source;
    int part = 0;
    while (*row >= source->n[part]) *row -= source->n[part++];
    *row += source->first[part];
    if (source->n_interleaved[part])
        *row = llm__weight_interleaved_row(*row, source->n_interleaved[part], source->rope_dim);
    return &source->parts[part];
}

static float llm__tensor_row_scale(const llm__tensor *t, int row) {
    float scale = 1;
    if (t->scales) t->scales->type->decode(t->scales->data + (uint64_t)row * t->scales->type->block_bytes, 1, &scale);
    return scale;
}

static float llm__weight_row_scale(const llm_backend_weight *weight, int row) {
    const llm__tensor *t = llm__weight_find_row(weight, &row);
    return llm__tensor_row_scale(t, row);
}

static void llm__weight_read_row(const llm_backend_weight *weight, int row, float *out) {
    const llm__tensor *t = llm__weight_find_row(weight, &row);
    t->type->decode(t->data + (uint64_t)row * t->row_bytes, (size_t)t->cols, out);
    float scale = llm__tensor_row_scale(t, row);
    for (uint64_t i = 0; i < t->cols && t->scales; i++) out[i] *= scale;
}

/* Returns a row as the file has it. At regular intervals the file's pages are given back, so that the file does not
   stay in memory beside the packed weights. Rows that others still read come back from the page cache. */
static const void *llm__weight_raw_row(const llm_backend_weight *weight, int row, int *type) {
    const llm__weight_source *source = (const llm__weight_source *)weight->source;
    const llm__tensor *t = llm__weight_find_row(weight, &row);
    size_t before = __atomic_fetch_add(source->n_read, (size_t)t->row_bytes, __ATOMIC_RELAXED);
    if (before / LLM__KEPT_BYTES != (before + t->row_bytes) / LLM__KEPT_BYTES)
        for (int i = 0; i < source->n_parts; i++)
            llm__file_advise(source->parts[i].file, source->parts[i].data,
                             source->parts[i].rows * source->parts[i].row_bytes, true);
    *type = (int)t->type->type;
    return t->data + (uint64_t)row * t->row_bytes;
}

LLM_API const char *llm_dtype_name(llm_dtype dtype) {
    static const char *const names[] = {NULL, "f32", "bf16", "int8", "int4", "f16", "file"};
    return dtype >= LLM_DTYPE_DEFAULT && dtype <= LLM_DTYPE_FILE ? names[dtype] : NULL;
}

LLM_API llm_dtype llm_dtype_from_name(const char *name) {
    for (int i = LLM_DTYPE_F32; i <= LLM_DTYPE_FILE; i++)
        if (name && !strcmp(name, llm_dtype_name((llm_dtype)i))) return (llm_dtype)i;
    return LLM_DTYPE_DEFAULT;
}

/* A matrix in tiles of 16 outputs, see section 12. If the tensors of a weight are held in several kinds, their tiles
   follow each other, or alternate (gates and ups). */
typedef struct llm__matrix {
    llm__weight_type kind; /* of all tiles, or of the first one */
    int n, k;              /* outputs and inputs of the model; both are padded with zeros in memory */
    size_t tile_bytes;
    uint8_t *data;
    int first;   /* the matrix begins with this tile of data; see llm__matrix_part */
    int n_kinds; /* 0: all tiles are of one kind; otherwise tiles before ends[i] are of kinds[i] */
    llm__weight_type kinds[3];
    int ends[3];
    bool in_turns; /* tiles 0, 2, 4 ... are of kinds[0], the others of kinds[1] */
    bool panels;   /* products with many rows use panels, if the set has them */
    bool groups;   /* some tiles are in groups */
} llm__matrix;

/* Consecutive tiles of one kind. */
typedef struct llm__kernel_tiles {
    llm__weight_type kind;
    int n;
    size_t tile_bytes;
    uint8_t *at;
    size_t offset; /* of the first one in the matrix's data */
} llm__kernel_tiles;

/* The tiles from `tile` on that are of one kind, at most n. */
static llm__kernel_tiles llm__matrix_tiles(const llm__matrix *m, int tile, int n) {
    llm__kernel_tiles t = {m->kind, n, m->tile_bytes, NULL, 0};
    int begin = 0;
    tile += m->first;
    if (m->in_turns) {
        size_t bytes[2] = {llm__matrix_tile_bytes(m->kinds[0], m->k), llm__matrix_tile_bytes(m->kinds[1], m->k)};
        t.kind = m->kinds[tile % 2];
        t.n = 1;
        t.tile_bytes = bytes[tile % 2];
        t.offset = (size_t)(tile / 2) * (bytes[0] + bytes[1]) + (tile % 2 ? bytes[0] : 0);
        begin = tile;
    }
    for (int i = 0; i < m->n_kinds && !m->in_turns; begin = m->ends[i++]) {
        t.kind = m->kinds[i];
        t.tile_bytes = llm__matrix_tile_bytes(t.kind, m->k);
        if (tile < m->ends[i] || i == m->n_kinds - 1) {
            if (n > m->ends[i] - tile) t.n = m->ends[i] - tile;
            break;
        }
        t.offset += (size_t)(m->ends[i] - begin) * t.tile_bytes;
    }
    t.offset += (size_t)(tile - begin) * t.tile_bytes;
    if (m->data) t.at = m->data + t.offset; /* a matrix that is only described has no data */
    return t;
}

/* The kind that holds a tensor of a file's type best. Types in blocks keep their numbers. */
static llm__weight_type llm__kernel_kind_of_file(int type) {
    switch (type) {
    case LLM__Q4_0: return LLM__W_Q4;
    case LLM__Q4_1: return LLM__W_Q4_MIN;
    case LLM__Q5_0: return LLM__W_Q5;
    case LLM__Q5_1: return LLM__W_Q5_MIN;
    case LLM__Q8_0: return LLM__W_Q8;
    case LLM__Q2_K:
    case LLM__Q3_K: return LLM__W_Q4_K16;
    case LLM__Q4_K: return LLM__W_Q4_K;
    case LLM__Q5_K: return LLM__W_Q5_K;
    case LLM__Q6_K: return LLM__W_Q6_K16;
    case LLM__IQ4_NL: return LLM__W_IQ4;
    case LLM__IQ4_XS: return LLM__W_IQ4_K;
    case LLM__I8: return LLM__W_INT8;
    default: return LLM__W_BF16;
    }
}

static llm__weight_type llm__weight_type_for(llm_dtype dtype, int type) {
    llm__weight_type own = llm__kernel_kind_of_file(type);
    if (dtype == LLM_DTYPE_F32) return LLM__W_F32;
    if (dtype == LLM_DTYPE_F16) return LLM__W_F16;
    if (dtype == LLM_DTYPE_BF16) return LLM__W_BF16;
    if (dtype == LLM_DTYPE_INT8) return LLM__W_INT8;
    if (dtype == LLM_DTYPE_FILE) return own;
    return llm__kernel_forms[own].bits == 4 || own == LLM__W_Q8 ? own : LLM__W_Q4_MIN;
}

/* Position of an element in a tile of f32, f16 or bf16 with k inputs (padded). Blocks of the KV cache are such
   matrices. */
static size_t llm__matrix_tile_index(llm__weight_type kind, size_t output, size_t input, size_t k) {
    size_t tile = output / 16 * k * 16, lane = output % 16;
    return kind != LLM__W_BF16 ? tile + input * 16 + lane : tile + input / 2 * 32 + lane * 2 + input % 2;
}

static void llm__matrix_tile_set(llm__weight_type kind, void *tiles, size_t index, float value) {
    if (kind == LLM__W_F32) ((float *)tiles)[index] = value;
    else ((uint16_t *)tiles)[index] = kind == LLM__W_F16 ? llm__f32_to_f16(value) : llm__f32_to_bf16(value);
}

/* The number of input i (0 to 31) of a group, for output `lane`. */
static int llm__kernel_group_number(llm__weight_type kind, const uint8_t *q, size_t i, size_t lane) {
    const llm__kernel_form *form = &llm__kernel_forms[kind];
    size_t j = i / 4, at = lane * 4 + i % 4;
    if (form->bits == 8) return (int8_t)q[j * 64 + at];
    int number = q[j % 4 * 64 + at] >> (j / 4 * 4) & 15;
    if (form->table) return llm__iq4_numbers[number];
    if (form->bits == 5) number |= (q[256 + at] >> j & 1) << 4;
    if (form->bits == 6) number |= (q[256 + j / 4 * 64 + at] >> (j % 4 * 2) & 3) << 4;
    return number - form->zero;
}

/* The scale and minimum of input i (0 to 31). s: the group's scales; d: the f16 numbers of its eight groups. */
static void llm__kernel_group_scales(llm__weight_type kind, const uint8_t *s, const uint8_t *d, size_t i, size_t lane,
                                     float *scale, float *least) {
    const llm__kernel_form *form = &llm__kernel_forms[kind];
    size_t half = form->sixteen ? i / 16 : 0;
    const int8_t *small = (const int8_t *)s + half * 16 + lane;
    const uint8_t *halves = (form->k ? d : s) + 2 * lane;
    *scale = llm__f16_to_f32(llm__bytes_u16(halves)) * (form->k ? (float)*small : 1);
    *least = 0;
    if (!form->minimum) return;
    *least = llm__f16_to_f32(llm__bytes_u16(halves + 32));
    if (form->k) *least *= -(float)small[form->sixteen ? 32 : 16];
}

/* The weights of one output as floats. */
static void llm__matrix_get_row(const llm__matrix *m, size_t output, float *out) {
    const llm__kernel_tiles t = llm__matrix_tiles(m, (int)(output / 16), 1);
    size_t k = (size_t)llm__math_round_up(m->k, 32), lane = output % 16;
    const float *floats = (const float *)(const void *)t.at;
    const uint16_t *halves = (const uint16_t *)(const void *)t.at;
    const uint8_t *scales = t.at + k / 32 * LLM__NUMBER_BYTES(t.kind), *ds = scales + k / 32 * LLM__SCALE_BYTES(t.kind);
    for (size_t i = 0; i < (size_t)m->k; i++) {
        size_t at = llm__matrix_tile_index(t.kind, lane, i, k), g = i / 32;
        float scale, least;
        switch (t.kind) {
        case LLM__W_F32: out[i] = floats[at]; continue;
        case LLM__W_F16: out[i] = llm__f16_to_f32(halves[at]); continue;
        case LLM__W_BF16: out[i] = llm__bf16_to_f32(halves[at]); continue;
        case LLM__W_INT8: out[i] = (float)((const int8_t *)t.at)[at] * floats[k * 4 + lane]; continue;
        default:
            llm__kernel_group_scales(t.kind, scales + g * LLM__SCALE_BYTES(t.kind), ds + g / 8 * LLM__K_BYTES(t.kind),
                                     i % 32, lane, &scale, &least);
            int q = llm__kernel_group_number(t.kind, t.at + g * LLM__NUMBER_BYTES(t.kind), i % 32, lane);
            out[i] = llm__math_fma((float)q, scale, least);
        }
    }
}

/* A matrix without memory. */
static llm__matrix llm__matrix_init(llm__weight_type kind, int n, int k) {
    llm__matrix m;
    memset(&m, 0, sizeof m);
    m.kind = kind;
    m.n = n;
    m.k = k;
    m.tile_bytes = llm__matrix_tile_bytes(kind, k);
    m.panels = kind == LLM__W_BF16 || kind == LLM__W_INT8;
    m.groups = llm__matrix_has_groups(kind);
    return m;
}

/* Describes the matrix of a weight. If tensors of several kinds meet inside a tile, all of it is bf16. Gates and ups
   each fill whole tiles, so both are padded. */
static llm__matrix llm__matrix_describe(llm_dtype dtype, const llm_backend_weight *weight) {
    bool in_turns = weight->kind == LLM_WEIGHT_GATE_UP;
    int n = in_turns ? 2 * llm__math_round_up(weight->rows / 2, 16) : weight->rows, rows = 0;
    llm__matrix m = llm__matrix_init(llm__weight_type_for(dtype, weight->part_types[0]), n, weight->cols);
    bool alike = true, whole = true;
    for (int i = 0; i < weight->n_parts; i++) {
        m.kinds[i] = llm__weight_type_for(dtype, weight->part_types[i]);
        whole = whole && (in_turns || rows % 16 == 0);
        rows += weight->part_rows[i];
        m.ends[i] = llm__math_round_up(rows, 16) / 16;
        alike = alike && m.kinds[i] == m.kind;
    }
    if (alike) return m;
    if (!whole) return llm__matrix_init(LLM__W_BF16, n, weight->cols);
    m.n_kinds = weight->n_parts;
    m.in_turns = in_turns;
    m.panels = false;
    for (int i = 0; i < m.n_kinds; i++) m.groups = m.groups || llm__matrix_has_groups(m.kinds[i]);
    return m;
}

static size_t llm__matrix_bytes(const llm__matrix *m) {
    return llm__matrix_tiles(m, llm__math_round_up(m->n, 16) / 16, 0).offset;
}

static uint64_t llm__cpu_weight_bytes(llm_dtype dtype, const llm_backend_weight *weight) {
    llm__matrix m = llm__matrix_describe(dtype, weight);
    return llm__matrix_bytes(&m);
}

/* The bits of the largest magnitude of n numbers. As integers they are ordered, with infinities and NaNs after all
   numbers. Sixteen signed lanes, which compilers turn into vectors. */
static uint32_t llm__pack_largest_bits(const float *x, size_t n) {
    int32_t most[16] = {0}, bits[16];
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        memcpy(bits, x + i, sizeof bits);
        for (int j = 0; j < 16; j++) bits[j] &= 0x7FFFFFFF;
        for (int j = 0; j < 16; j++) most[j] = bits[j] > most[j] ? bits[j] : most[j];
    }
    for (; i < n; i++) {
        int32_t rest = (int32_t)(llm__f32_bits(x[i]) & 0x7FFFFFFF);
        most[0] = rest > most[0] ? rest : most[0];
    }
    for (int j = 1; j < 16; j++) most[0] = most[j] > most[0] ? most[j] : most[0];
    return (uint32_t)most[0];
}

/* Symmetric int8 of a whole row: q = round(127 w / max|row|) = floor(127 w / max|row| + 0.5). Returns the scale. It is
   NaN, which makes the row NaN, if a weight is not finite. */
static float llm__pack_quantize_row(const float *row, size_t n, int8_t *q, size_t step) {
    uint32_t bits = llm__pack_largest_bits(row, n);
    float most = bits < 0x7F800000 ? llm__f32_from_bits(bits) : NAN;
    bool finite = most >= 0;
    double inverse = most > 0 ? 127.0 / most : 0;
    for (size_t i = 0; i < n && finite; i++) {
        double x = row[i] * inverse + 0.5;
        int whole = (int)x; /* rounds towards zero; the next line makes it floor(x), which would be a function call */
        q[i * step] = (int8_t)(whole - (whole > x));
    }
    for (size_t i = 0; i < n && !finite; i++) q[i * step] = 0;
    return most / 127.0f;
}

static void llm__pack_int8_row(uint8_t *tile, size_t lane, const float *row, size_t k) {
    ((float *)(void *)(tile + k * 16))[lane] = llm__pack_quantize_row(row, k, (int8_t *)tile + lane, 16);
}

/* Copies k weights of a row that is int8 in the file, with zeros up to `padded`. */
static void llm__pack_copy_int8_row(uint8_t *tile, size_t lane, const int8_t *row, size_t k, size_t padded,
                                    float scale) {
    for (size_t i = 0; i < padded; i++) ((int8_t *)tile)[i * 16 + lane] = i < k ? row[i] : 0;
    ((float *)(void *)(tile + padded * 16))[lane] = scale;
}

/* The 4-bit group with the smallest weight as its minimum and the smallest error. A NaN makes the whole group NaN. */
static llm_backend_group llm__pack_quantize_group(const float *w) {
    llm_backend_group g;
    float least = w[0], most = w[0];
    for (int i = 1; i < 32; i++) {
        if (w[i] < least) least = w[i];
        if (w[i] > most) most = w[i];
    }
    g.minimum = llm__f32_to_f16(least);
    g.scale = llm__f32_to_f16((most - least) / 15);
    double d = llm__f16_to_f32(g.scale), m = llm__f16_to_f32(g.minimum);
    for (int i = 0; i < 32; i++) {
        double q = d > 0 ? floor((w[i] - m) / d + 0.5) : 0;
        if (q != q) q = 0, g.scale = 0x7E00;
        g.q[i] = (int8_t)(q < 0 ? 0 : q > 15 ? 15 : q);
    }
    return g;
}

/* Where the group of some rows lies in a tile: its numbers, its scales, and the d of its eight groups. */
typedef struct llm__pack_place {
    uint8_t *q, *s, *d;
} llm__pack_place;

/* The place of a group, from row `lane` of the tile on. */
static llm__pack_place llm__pack_find(llm__weight_type kind, uint8_t *tile, size_t n_groups, size_t group,
                                      size_t lane) {
    uint8_t *s = tile + n_groups * LLM__NUMBER_BYTES(kind), *d = s + n_groups * LLM__SCALE_BYTES(kind);
    llm__pack_place place = {tile + group * LLM__NUMBER_BYTES(kind) + lane * 4,
                             s + group * LLM__SCALE_BYTES(kind) + lane * (llm__kernel_forms[kind].k ? 1 : 2),
                             d + group / 8 * LLM__K_BYTES(kind) + lane * 2};
    return place;
}

/* The packing of a group is written for N rows at once, 16 or a single one, so that its loops become vectors. */
#define LLM__PACK_INLINE static inline __attribute__((always_inline))

/* Swaps the bits of x that `mask` selects with those `distance` above them. */
LLM__PACK_INLINE uint32_t llm__pack_swap_bits(uint32_t x, int distance, uint32_t mask) {
    uint32_t differ = (x ^ x >> distance) & mask;
    return x ^ differ ^ differ << distance;
}

/* Bit 4 j + i becomes bit 8 i + j, for j = 0 to 7 and i = 0 to 3: from the order of fifth bits in a file to that in a
   tile. Each step swaps two of the five bits of every bit's number: 4 and 1, 3 and 0, 2 and 1, 1 and 0. */
LLM__PACK_INLINE uint32_t llm__pack_turn_bits(uint32_t bits) {
    bits = llm__pack_swap_bits(bits, 14, 0x0000CCCC);
    bits = llm__pack_swap_bits(bits, 7, 0x00AA00AA);
    bits = llm__pack_swap_bits(bits, 2, 0x0C0C0C0C);
    return llm__pack_swap_bits(bits, 1, 0x22222222);
}

/* Loads n words of each row, from byte `at` of its block on. Compilers make no good code of this for 16 rows, so four
   words of four rows are turned at a time where there are vectors for it. */
LLM__PACK_INLINE void llm__pack_load(const int N, const uint8_t *const *block, size_t at, const int n,
                                     uint32_t (*words)[16]) {
#if (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)) && !defined(LLM_NO_SIMD)
    typedef uint32_t four __attribute__((vector_size(16)));
    for (int r = 0; r < N && N == 16 && n % 4 == 0; r += 4)
        for (int j = 0; j < n; j += 4) {
            four a, b, c, d;
            memcpy(&a, block[r] + at + 4 * j, 16);
            memcpy(&b, block[r + 1] + at + 4 * j, 16);
            memcpy(&c, block[r + 2] + at + 4 * j, 16);
            memcpy(&d, block[r + 3] + at + 4 * j, 16);
            four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
            a = __builtin_shufflevector(a, b, 2, 6, 3, 7);
            c = __builtin_shufflevector(c, d, 2, 6, 3, 7);
            b = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
            d = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
            memcpy(&words[j][r], &b, 16);
            memcpy(&words[j + 1][r], &d, 16);
            b = __builtin_shufflevector(a, c, 0, 1, 4, 5);
            d = __builtin_shufflevector(a, c, 2, 3, 6, 7);
            memcpy(&words[j + 2][r], &b, 16);
            memcpy(&words[j + 3][r], &d, 16);
        }
    if (N == 16 && n % 4 == 0) return;
#endif
    for (int r = 0; r < N; r++)
        for (int j = 0; j < n; j++) memcpy(&words[j][r], block[r] + at + 4 * j, 4);
}

/* Stores n words of each row in a tile, where word j of all 16 rows is one line. */
LLM__PACK_INLINE void llm__pack_store(const int N, uint32_t (*words)[16], const int n, uint8_t *to) {
    for (int j = 0; j < n; j++) memcpy(to + 64 * j, words[j], 4 * (size_t)N);
}

/* The numbers of group i of a K block. In a file, the bits of a group of 32 lie in 8 words, from some bit of each byte
   on. In a tile, words j and j + 4 share a word with their low four bits. */
LLM__PACK_INLINE void llm__pack_read_k_numbers(const int N, int type, const uint8_t *const *block, int i, uint8_t *to) {
    uint32_t low[8][16], high[8][16], above[2][16];
    bool two_bits = type == LLM__Q2_K || type == LLM__Q3_K;
    uint32_t mask = two_bits ? 0x33333333 : 0xFFFFFFFF;
    size_t first = type == LLM__Q5_K ? 48 : type == LLM__Q3_K ? 32 : type == LLM__Q6_K ? 0 : 16;
    int at = two_bits ? i % 4 * 2 : type == LLM__Q6_K ? i / 2 % 2 * 4 : i % 2 * 4;
    first += (size_t)(two_bits ? i / 4 * 32 : type == LLM__Q6_K ? i / 4 * 64 + i % 2 * 32 : i / 2 * 32);
    llm__pack_load(N, block, first, 8, low);
    for (int j = 0; j < 4; j++)
        for (int r = 0; r < N; r++)
            low[j][r] = ((low[j][r] >> at & 0x0F0F0F0Fu) | (low[j + 4][r] >> at & 0x0F0F0F0Fu) << 4) & mask;
    if (type == LLM__Q3_K) {
        llm__pack_load(N, block, 0, 8, high);
        for (int j = 0; j < 4; j++)
            for (int r = 0; r < N; r++)
                low[j][r] |= (high[j][r] >> i & 0x01010101u) << 2 | (high[j + 4][r] >> i & 0x01010101u) << 6;
    }
    llm__pack_store(N, low, 4, to);
    if (type == LLM__Q5_K) {
        llm__pack_load(N, block, 16, 8, high);
        for (int r = 0; r < N; r++) above[0][r] = 0;
        for (int j = 0; j < 8; j++)
            for (int r = 0; r < N; r++) above[0][r] |= (high[j][r] >> i & 0x01010101u) << j;
        llm__pack_store(N, above, 1, to + 256);
    }
    if (type == LLM__Q6_K) {
        llm__pack_load(N, block, 128 + (size_t)i / 4 * 32, 8, high);
        for (int h = 0; h < 2; h++) {
            for (int r = 0; r < N; r++) above[h][r] = 0;
            for (int j = 0; j < 4; j++)
                for (int r = 0; r < N; r++) above[h][r] |= (high[4 * h + j][r] >> (i % 4 * 2) & 0x03030303u) << (2 * j);
        }
        llm__pack_store(N, above, 2, to + 256);
    }
}

/* The scales of group i of a K block. Q3_K's d * (scale - 32) * (q - 4) is d * s * q - d * 4 * s. */
LLM__PACK_INLINE void llm__pack_read_k_scales(const int N, int type, const uint8_t *const *block, int i,
                                              llm__pack_place to) {
    int8_t numbers[4][16]; /* as in the tile */
    uint16_t d[2][16];
    const bool sixteen = type == LLM__Q2_K || type == LLM__Q3_K || type == LLM__Q6_K,
               minimum = type != LLM__Q6_K && type != LLM__IQ4_XS;
    const size_t d_at = type == LLM__Q2_K   ? 80
                        : type == LLM__Q3_K ? 108
                        : type == LLM__Q6_K ? 208
                                            : 0,
                 m_at = d_at + (type == LLM__Q3_K || !minimum ? 0 : 2);
    if (!sixteen && minimum)
        for (int r = 0, scale, least; r < N; r++) {
            llm__decode_k_scale(block[r] + 4, i, &scale, &least);
            numbers[0][r] = (int8_t)scale;
            numbers[1][r] = (int8_t)least;
        }
    if (!sixteen && !minimum)
        for (int r = 0; r < N; r++) numbers[0][r] = (int8_t)llm__decode_iq4_scale(block[r], i);
    for (int h = 0; h < 2 && sixteen; h++) {
        const int at = 2 * i + h;
        for (int r = 0; r < N && type == LLM__Q6_K; r++) numbers[h][r] = (int8_t)block[r][192 + at];
        for (int r = 0; r < N && type == LLM__Q2_K; r++) {
            numbers[h][r] = (int8_t)(block[r][at] & 15);
            numbers[2 + h][r] = (int8_t)(block[r][at] >> 4);
        }
        for (int r = 0; r < N && type == LLM__Q3_K; r++) {
            const uint8_t *s = block[r] + 96;
            numbers[h][r] = (int8_t)((s[at % 8] >> (at / 8 * 4) & 15) + (s[8 + at % 4] >> (at / 4 * 2) & 3) * 16 - 32);
            numbers[2 + h][r] = (int8_t)(4 * numbers[h][r]);
        }
    }
    for (int j = 0; j < (sixteen ? 2 : 1) * (minimum ? 2 : 1); j++) memcpy(to.s + 16 * j, numbers[j], (size_t)N);
    if (i % 8) return;
    for (int r = 0; r < N; r++) {
        d[0][r] = llm__bytes_u16(block[r] + d_at);
        d[1][r] = llm__bytes_u16(block[r] + m_at);
    }
    for (int j = 0; j < (minimum ? 2 : 1); j++) memcpy(to.d + 32 * j, d[j], 2 * (size_t)N);
}

/* Group i of the blocks of N rows of one type, as the kind that keeps its numbers holds it. */
LLM__PACK_INLINE void llm__pack_read_rows(const int N, int type, const uint8_t *const *block, int i,
                                          llm__pack_place to) {
    uint32_t words[8][16], fifth[1][16];
    uint16_t scales[2][16];
    bool minimum = type == LLM__Q4_1 || type == LLM__Q5_1, five = type == LLM__Q5_0 || type == LLM__Q5_1;
    size_t at = minimum ? 4 : 2;
    if (llm__file_type_find((uint32_t)type)->block_weights == 32) {
        for (int r = 0; r < N; r++) {
            scales[0][r] = llm__bytes_u16(block[r]);
            scales[1][r] = llm__bytes_u16(block[r] + 2);
        }
        for (int j = 0; j < 1 + minimum; j++) memcpy(to.s + 32 * j, scales[j], 2 * (size_t)N);
    } else llm__pack_read_k_scales(N, type, block, i, to);
    switch (type) {
    case LLM__Q8_0:
        llm__pack_load(N, block, at, 8, words);
        llm__pack_store(N, words, 8, to.q);
        break;
    case LLM__Q4_0:
    case LLM__Q4_1:
    case LLM__Q5_0:
    case LLM__Q5_1:
    case LLM__IQ4_NL:
    case LLM__IQ4_XS:
        if (type == LLM__IQ4_XS) at = 8 + 16 * (size_t)i;
        if (five) {
            llm__pack_load(N, block, at, 1, fifth);
            for (int r = 0; r < N; r++) fifth[0][r] = llm__pack_turn_bits(fifth[0][r]);
            llm__pack_store(N, fifth, 1, to.q + 256);
            at += 4;
        }
        llm__pack_load(N, block, at, 4, words);
        llm__pack_store(N, words, 4, to.q);
        break;
    default: llm__pack_read_k_numbers(N, type, block, i, to.q);
    }
}

/* Of a whole tile, and of one row. */
static void llm__pack_read_16(int type, const uint8_t *const *block, int i, llm__pack_place to) {
    llm__pack_read_rows(16, type, block, i, to);
}

static void llm__pack_read_1(int type, const uint8_t *block, int i, llm__pack_place to) {
    llm__pack_read_rows(1, type, &block, i, to);
}

/* Groups for LLM_DTYPE_INT4 as other backends hold them. Scales of Q4_K are rounded once. Other types are quantised
   anew. */
LLM_API void llm_backend_weight_groups(const llm_backend_weight *weight, int row, float *scratch,
                                       llm_backend_group *groups) {
    size_t n = (size_t)llm__math_round_up(weight->cols, 32) / 32;
    int type;
    const uint8_t *raw = (const uint8_t *)weight->raw_row(weight, row, &type);
    const llm__weight_type kind = llm__kernel_kind_of_file(type);
    const bool own = kind == LLM__W_Q8 || kind == LLM__W_Q4 || kind == LLM__W_Q4_MIN || kind == LLM__W_Q4_K;
    const llm__file_type_info *info = llm__file_type_find((uint32_t)type);
    const size_t in_block = own ? info->block_weights / 32 : 1;
    memset(scratch, 0, n * 32 * sizeof *scratch);
    if (!own) weight->read_row(weight, row, scratch);
    for (size_t i = 0; i < n; i++) {
        uint8_t q[512], s[64], d[64];
        llm__pack_place place = {q, s, d};
        if (!own) groups[i] = llm__pack_quantize_group(scratch + i * 32);
        if (!own) continue;
        const uint8_t *block = raw + i / in_block * info->block_bytes;
        llm__pack_read_1(type, block, (int)(i % in_block), place);
        for (int j = 0; j < 32; j++)
            groups[i].q[j] = kind == LLM__W_Q8 ? (int8_t)q[j / 4 * 64 + j % 4]
                                               : (int8_t)(q[j / 4 % 4 * 64 + j % 4] >> (j / 16 * 4) & 15);
        uint16_t half = kind == LLM__W_Q4_K ? llm__bytes_u16(block) : llm__bytes_u16(s);
        float scale = llm__f16_to_f32(half) * (kind == LLM__W_Q4_K ? (float)s[0] : 1);
        groups[i].scale = llm__f32_to_f16(scale);
        groups[i].minimum = kind == LLM__W_Q4_MIN ? llm__bytes_u16(s + 32) : 0;
        if (kind == LLM__W_Q4) groups[i].minimum = llm__f32_to_f16(-8 * scale);
        if (kind == LLM__W_Q4_K)
            groups[i].minimum = llm__f32_to_f16(-llm__f16_to_f32(llm__bytes_u16(block + 2)) * (float)s[16]);
    }
}

/* Quantises 32 weights of a row to a group. */
static void llm__pack_make_group(const float *w, llm__pack_place to) {
    const llm_backend_group made = llm__pack_quantize_group(w);
    for (int i = 0; i < 16; i++) to.q[i / 4 * 64 + i % 4] = (uint8_t)(made.q[i] | made.q[i + 16] << 4);
    memcpy(to.s, &made.scale, 2);
    memcpy(to.s + 32, &made.minimum, 2);
}

/* Packs a tile's groups. `raw` are rows of types that this kind holds (NULL rows are zero); if raw itself is NULL, the
   groups are made from `rows`. */
static void llm__pack_groups(llm__weight_type kind, uint8_t *tile, const uint8_t *const raw[16], const int types[16],
                             const float *rows, size_t k) {
    static const uint8_t nothing[256] = {0}; /* a block of any type */
    const size_t n = k / 32, in_block = llm__kernel_forms[kind].k ? 8 : 1,
                 used = (size_t)(llm__pack_find(kind, tile, n, n + 7, 0).d - tile);
    const llm__file_type_info *infos[16];
    const uint8_t *block[16];
    bool alike = raw != NULL;
    int type = -1; /* of a row that is there */
    for (size_t lane = 0; lane < 16 && raw; lane++)
        if (raw[lane]) type = types[lane];
    if (raw && type < 0) {
        memset(tile, 0, llm__matrix_tile_bytes(kind, (int)k));
        return;
    }
    for (size_t lane = 0; lane < 16 && raw; lane++) {
        infos[lane] = llm__file_type_find((uint32_t)(raw[lane] ? types[lane] : type));
        block[lane] = raw[lane] ? raw[lane] : nothing;
        alike = alike && infos[lane] == infos[0];
    }
    const size_t step = alike ? infos[0]->block_bytes / in_block : 0, ahead = 16 * n * step,
                 lines = (16 * step + 63) / 64;
    size_t next = 0;
    for (size_t i = 0; i < n; i++) {
        const int group = (int)(i % in_block);
        for (size_t j = 0; j < lines && alike; j++, next = (next + 1) % 16) /* of the tile after this one */
            __builtin_prefetch(block[next] + ahead + (size_t)group * step);
        if (alike) llm__pack_read_16(type, block, group, llm__pack_find(kind, tile, n, i, 0));
        for (size_t lane = 0; lane < 16 && !alike; lane++) {
            llm__pack_place place = llm__pack_find(kind, tile, n, i, lane);
            if (!raw) llm__pack_make_group(rows + lane * k + i * 32, place);
            else llm__pack_read_1((int)infos[lane]->type, block[lane], group, place);
        }
        for (size_t lane = 0; lane < 16 && raw && (size_t)group + 1 == in_block; lane++)
            if (raw[lane]) block[lane] += infos[lane]->block_bytes;
    }
    memset(tile + used, 0, llm__matrix_tile_bytes(kind, (int)k) - used);
}

/* Packs 16 rows of k into a bf16 tile. Even and odd k lie side by side, so the tile is written front to back. */
static void llm__pack_bf16_tile(const llm__kernels *kernels, uint8_t *tile, float *rows, size_t k) {
    uint64_t mode = llm__fpu_enter();
    for (size_t lane = 0; lane < 16; lane++) kernels->scale(rows + lane * k, 1.0f, (int)k, true, rows + lane * k);
    llm__fpu_leave(mode);
    for (size_t i = 0; i < k; i += 2)
        for (size_t lane = 0; lane < 16; lane++, tile += 4) {
            uint32_t even, odd;
            memcpy(&even, &rows[lane * k + i], 4);
            memcpy(&odd, &rows[lane * k + i + 1], 4);
            even = even >> 16 | odd;
            memcpy(tile, &even, 4);
        }
}

/* The same for rows that are bf16 in the file. They are copied, except that denormals and absent rows (NULL) become
   zero. */
static void llm__pack_copy_bf16_tile(uint8_t *tile, const uint8_t *const raw[16], size_t n, size_t k) {
    static const uint8_t nothing[4] = {0};
    for (size_t i = 0; i < k; i += 2)
        for (size_t lane = 0; lane < 16; lane++, tile += 4) {
            uint32_t pair = llm__bytes_u32(raw[lane] && i < n ? raw[lane] + 2 * i : nothing);
            if (!(pair & 0x7F80)) pair &= 0xFFFF8000;
            if (!(pair & 0x7F800000)) pair &= 0x8000FFFF;
            memcpy(tile, &pair, 4);
        }
}

/* Packs the rows of one tile; `rows` is scratch for 16 rows. Absent rows (-1) are zero. */
static void llm__pack_tile(const llm__kernels *kernels, const llm__matrix *m, int tile,
                           const llm_backend_weight *weight, const int numbers[16], float *rows) {
    const llm__kernel_tiles t = llm__matrix_tiles(m, tile, 1);
    size_t k = (size_t)llm__math_round_up(m->k, 32);
    const uint8_t *raw[16];
    int types[16];
    bool all_bf16 = t.kind == LLM__W_BF16 && m->k % 2 == 0, own = llm__matrix_has_groups(t.kind);
    for (size_t lane = 0; lane < 16; lane++) {
        types[lane] = LLM__F32;
        raw[lane] = NULL;
        if (numbers[lane] < 0) continue;
        raw[lane] = (const uint8_t *)weight->raw_row(weight, numbers[lane], &types[lane]);
        all_bf16 = all_bf16 && types[lane] == LLM__BF16;
        own = own && llm__kernel_kind_of_file(types[lane]) == t.kind;
    }
    if (all_bf16) {
        llm__pack_copy_bf16_tile(t.at, raw, (size_t)m->k, k);
        return;
    }
    if (!own) memset(rows, 0, 16 * k * sizeof *rows);
    for (size_t lane = 0; lane < 16 && !own; lane++)
        if (numbers[lane] >= 0) weight->read_row(weight, numbers[lane], rows + lane * k);
    if (t.kind == LLM__W_BF16) {
        llm__pack_bf16_tile(kernels, t.at, rows, k);
        return;
    }
    if (llm__matrix_has_groups(t.kind)) {
        llm__pack_groups(t.kind, t.at, own ? raw : NULL, types, rows, k);
        return;
    }
    for (size_t lane = 0; lane < 16; lane++) {
        const float *row = rows + lane * k;
        if (types[lane] == LLM__I8 && t.kind == LLM__W_INT8)
            llm__pack_copy_int8_row(t.at, lane, (const int8_t *)raw[lane], (size_t)m->k, k,
                                    weight->row_scale(weight, numbers[lane]));
        else if (t.kind == LLM__W_INT8) llm__pack_int8_row(t.at, lane, row, k);
        for (size_t i = 0; i < k && t.kind != LLM__W_INT8; i++)
            llm__matrix_tile_set(t.kind, t.at, llm__matrix_tile_index(t.kind, lane, i, k), row[i]);
    }
}

/* The rows of a weight that a tile holds. Gates and ups alternate tile by tile, so that they are computed together. */
static void llm__matrix_tile_rows(const llm_backend_weight *weight, int tile, int rows[16]) {
    bool paired = weight->kind == LLM_WEIGHT_GATE_UP;
    int n = paired ? weight->rows / 2 : weight->rows, first = paired ? tile / 2 * 16 : tile * 16;
    for (int i = 0; i < 16; i++) {
        rows[i] = first + i < n ? first + i : -1;
        if (paired && tile % 2 && rows[i] >= 0) rows[i] += n;
    }
}

/* 2^x, log2(x), sine and cosine in double, in fixed operations, so that every compiler gives the same bits. */
static double llm__math_log2(double x) {
    int exponent;
    double m = frexp(x, &exponent);
    if (m < 0.70710678118654752) {
        m *= 2;
        exponent--;
    }
    double s = (m - 1) / (m + 1), s2 = s * s, sum = 0;
    for (int i = 23; i >= 1; i -= 2) sum = sum * s2 + 1.0 / i; /* log(m) = 2 (s + s^3 / 3 + s^5 / 5 + ...) */
    return exponent + 2 * s * sum * 1.4426950408889634;
}

static double llm__math_exp2(double x) {
    double whole = floor(x + 0.5), r = (x - whole) * 0.69314718055994531, sum = 1;
    for (int i = 16; i >= 1; i--) sum = 1 + r / i * sum;
    return ldexp(sum, (int)whole);
}

static void llm__math_sincos(double x, float *sine, float *cosine) {
    double n = floor(x * 0.63661977236758134 + 0.5);
    double r = x - n * 1.5707963267341256 - n * 6.0771005063039655e-11 - n * 2.0222662487959506e-21;
    double r2 = r * r, s = 0, c = 0;
    for (int i = 15; i >= 3; i -= 2) s = -r2 / (i * (i - 1)) * (1 + s); /* sin r = r (1 + s), cos r = 1 + c */
    for (int i = 16; i >= 2; i -= 2) c = -r2 / (i * (i - 1)) * (1 + c);
    s = r * (1 + s);
    c = 1 + c;
    int quarter = (int)(n - 4 * floor(n / 4));
    *sine = (float)(quarter == 0 ? s : quarter == 1 ? c : quarter == 2 ? -s : -c);
    *cosine = (float)(quarter == 0 ? c : quarter == 1 ? -s : quarter == 2 ? -c : s);
}

/* ==== 14 The CPU backend: threads and weights ===================================================================

   A team is a set of threads that run one task together. The calling thread is member 0. Inside the task the members
   wait for each other at barriers. A member without a task spins for a short time, then sleeps, so an idle context uses
   no processor time. */

#ifndef LLM_NO_THREADS
#if defined(_WIN32)
typedef HANDLE llm__os_thread;
typedef CRITICAL_SECTION llm__os_mutex;
typedef CONDITION_VARIABLE llm__os_cond;
#define LLM__THREAD_RESULT DWORD WINAPI
static void llm__os_mutex_init(llm__os_mutex *m) { InitializeCriticalSection(m); }
static void llm__os_mutex_destroy(llm__os_mutex *m) { DeleteCriticalSection(m); }
static void llm__os_mutex_lock(llm__os_mutex *m) { EnterCriticalSection(m); }
static void llm__os_mutex_unlock(llm__os_mutex *m) { LeaveCriticalSection(m); }
static void llm__os_cond_init(llm__os_cond *c) { InitializeConditionVariable(c); }
static void llm__os_cond_destroy(llm__os_cond *c) { (void)c; }
static void llm__os_cond_wait(llm__os_cond *c, llm__os_mutex *m) { SleepConditionVariableCS(c, m, INFINITE); }
static void llm__os_cond_broadcast(llm__os_cond *c) { WakeAllConditionVariable(c); }
static bool llm__os_thread_start(llm__os_thread *t, DWORD(WINAPI *run)(void *), void *arg) {
    return (*t = CreateThread(NULL, 0, run, arg, 0, NULL)) != NULL;
}
static void llm__os_thread_join(llm__os_thread t) {
    WaitForSingleObject(t, INFINITE);
    CloseHandle(t);
}
static void llm__os_thread_yield(void) { SwitchToThread(); }
#else
#include <pthread.h>
#include <sched.h>
typedef pthread_t llm__os_thread;
typedef pthread_mutex_t llm__os_mutex;
typedef pthread_cond_t llm__os_cond;
#define LLM__THREAD_RESULT void *
static void llm__os_mutex_init(llm__os_mutex *m) { pthread_mutex_init(m, NULL); }
static void llm__os_mutex_destroy(llm__os_mutex *m) { pthread_mutex_destroy(m); }
static void llm__os_mutex_lock(llm__os_mutex *m) { pthread_mutex_lock(m); }
static void llm__os_mutex_unlock(llm__os_mutex *m) { pthread_mutex_unlock(m); }
static void llm__os_cond_init(llm__os_cond *c) { pthread_cond_init(c, NULL); }
static void llm__os_cond_destroy(llm__os_cond *c) { pthread_cond_destroy(c); }
static void llm__os_cond_wait(llm__os_cond *c, llm__os_mutex *m) { pthread_cond_wait(c, m); }
static void llm__os_cond_broadcast(llm__os_cond *c) { pthread_cond_broadcast(c); }
static bool llm__os_thread_start(llm__os_thread *t, void *(*run)(void *), void *arg) {
    return pthread_create(t, NULL, run, arg) == 0;
}
static void llm__os_thread_join(llm__os_thread t) { pthread_join(t, NULL); }
static void llm__os_thread_yield(void) { sched_yield(); }
#endif
#endif

typedef struct llm__team llm__team;

typedef struct llm__team_member {
    llm__team *team;
    int index;
#ifndef LLM_NO_THREADS
    llm__os_thread thread;
#endif
} llm__team_member;

/* A member's share of the pieces of a phase. Padded, so that no two shares are in one cache line. */
typedef struct llm__team_share {
    int n_taken; /* atomic */
    char pad[124];
} llm__team_share;

struct llm__team {
    /* These do not change during a task, so every member can keep them in its cache. */
    int n;
    void (*task)(void *arg, int index);
    void *arg;
    void (*parallel)(void *user, int n, void (*task)(void *arg, int i), void *arg); /* the host's, or NULL */
    void *user;
    llm__team_share *shares; /* [2][n] for even and for odd phases */
    bool running;            /* the caller has not returned from the current task yet */
    bool stop;
    llm__team_member *members; /* [n - 1], the caller is not among them */
    int n_started;
    /* Atomic, and padded into separate cache lines: waiting members read the round, arriving members write the
       number. */
    char before[128];
    int n_at_barrier;
    char between[124];
    unsigned barrier_round; /* counts barriers; may wrap around, as `job` may, which counts tasks */
    char after[124];
    unsigned job;
    int n_working;
#ifndef LLM_NO_THREADS
    int n_asleep; /* atomic: members that sleep at the barrier */
    llm__os_mutex mutex;
    llm__os_cond wake; /* signalled when there is a job, or when a barrier opens */
#endif
};

enum {
    LLM__SPINS = 256,   /* a waiting member only spins for this many pauses (6 us on Zen 4): most waits are shorter */
    LLM__YIELDS = 32,   /* then it yields every 32 pauses, since the late member may need this core */
    LLM__SLEEPY = 2048, /* after this many pauses at a barrier it sleeps */
    LLM__IDLE = 20000,  /* after this many pauses without a job it sleeps */
    LLM__NEIGHBOURS = 8 /* a member whose share is empty looks into the shares of this many others */
};

static void llm__team_spin_pause(unsigned round) {
#if defined(__x86_64__)
    __asm__ volatile("pause");
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
#ifndef LLM_NO_THREADS
    if (round >= LLM__SPINS && round % LLM__YIELDS == 0)
        llm__os_thread_yield(); /* there may be more threads than cores */
#else
    (void)round;
#endif
}

#ifndef LLM_NO_THREADS
/* Sleeps until the barrier of this round opens. */
static void llm__team_barrier_sleep(llm__team *team, unsigned round) {
    llm__os_mutex_lock(&team->mutex);
    /* Count first, then read the round: the member that opens the barrier writes the round, then reads the count. */
    __atomic_add_fetch(&team->n_asleep, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&team->barrier_round, __ATOMIC_SEQ_CST) == round)
        llm__os_cond_wait(&team->wake, &team->mutex);
    __atomic_sub_fetch(&team->n_asleep, 1, __ATOMIC_SEQ_CST);
    llm__os_mutex_unlock(&team->mutex);
}
#endif

/* Waits until all members have arrived. Afterwards each sees what the others wrote before. A member that is very late
   probably has no core, so the waiting members sleep and leave it one of theirs. */
static void llm__team_barrier(llm__team *team) {
    if (team->n == 1) return;
    unsigned round = __atomic_load_n(&team->barrier_round, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&team->n_at_barrier, 1, __ATOMIC_ACQ_REL) == team->n) {
        __atomic_store_n(&team->n_at_barrier, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&team->barrier_round, round + 1, __ATOMIC_SEQ_CST);
#ifndef LLM_NO_THREADS
        if (!__atomic_load_n(&team->n_asleep, __ATOMIC_SEQ_CST)) return;
        llm__os_mutex_lock(&team->mutex);
        llm__os_cond_broadcast(&team->wake);
        llm__os_mutex_unlock(&team->mutex);
#endif
        return;
    }
    for (unsigned i = 0; __atomic_load_n(&team->barrier_round, __ATOMIC_ACQUIRE) == round; i++) {
        llm__team_spin_pause(i);
#ifndef LLM_NO_THREADS
        if (i == LLM__SLEEPY) llm__team_barrier_sleep(team, round);
#endif
    }
}

/* One member's view of a task with phases. A phase consists of pieces 0 .. n-1 and ends in a barrier. Each member first
   takes the pieces of its own share, which is the index'th part of them; then it helps its neighbours. Its share is
   about the same rows or columns in every phase, so that it finds them in its cache. */
typedef struct llm__team_worker {
    llm__team *team;
    int index, n_done; /* n_done: empty shares so far, beginning with its own */
    int phase;         /* 0 or 1: which of the two sets of shares it uses */
} llm__team_worker;

/* The next piece of n; -1 if none is left. */
static int llm__team_take(llm__team_worker *w, int n) {
    const int n_members = w->team->n;
    for (; w->n_done < n_members && w->n_done <= LLM__NEIGHBOURS; w->n_done++) {
        int i = (w->index + w->n_done) % n_members;
        int first = (int)((int64_t)n * i / n_members), end = (int)((int64_t)n * (i + 1) / n_members);
        int *n_taken = &w->team->shares[w->phase * n_members + i].n_taken;
        if (__atomic_load_n(n_taken, __ATOMIC_RELAXED) >= end - first) continue;
        int piece = first + __atomic_fetch_add(n_taken, 1, __ATOMIC_RELAXED);
        if (piece < end) return piece;
    }
    return -1;
}

/* Ends a phase. There are two sets of shares, used in turn. All members have left the phase that used the next set, so
   each can refill its own share of that set before the barrier. */
static void llm__team_finish(llm__team_worker *w) {
    w->phase = 1 - w->phase;
    __atomic_store_n(&w->team->shares[w->phase * w->team->n + w->index].n_taken, 0, __ATOMIC_RELAXED);
    llm__team_barrier(w->team);
    w->n_done = 0;
}

/* Runs the task as one member. */
static void llm__team_member_task(void *arg, int index) {
    llm__team *team = (llm__team *)arg;
    team->task(team->arg, index);
    if (index) __atomic_sub_fetch(&team->n_working, 1, __ATOMIC_ACQ_REL);
}

#ifndef LLM_NO_THREADS
static bool llm__team_wait_for_job(llm__team *team, unsigned done) {
    for (unsigned i = 0; i < LLM__IDLE; i++) {
        if (__atomic_load_n(&team->job, __ATOMIC_ACQUIRE) != done) return !team->stop;
        llm__team_spin_pause(i);
    }
    llm__os_mutex_lock(&team->mutex);
    while (__atomic_load_n(&team->job, __ATOMIC_ACQUIRE) == done) llm__os_cond_wait(&team->wake, &team->mutex);
    llm__os_mutex_unlock(&team->mutex);
    return !team->stop;
}

static LLM__THREAD_RESULT llm__team_member_main(void *arg) {
    llm__team_member *member = (llm__team_member *)arg;
    llm__team *team = member->team;
    for (unsigned done = 0; llm__team_wait_for_job(team, done); done++) llm__team_member_task(team, member->index);
    return 0;
}

static void llm__team_wake(llm__team *team) {
    llm__os_mutex_lock(&team->mutex);
    __atomic_add_fetch(&team->job, 1, __ATOMIC_ACQ_REL);
    llm__os_cond_broadcast(&team->wake);
    llm__os_mutex_unlock(&team->mutex);
}

static void llm__team_stop(void *data) {
    llm__team *team = (llm__team *)data;
    team->stop = true;
    if (team->n_started) llm__team_wake(team);
    for (int i = 0; i < team->n_started; i++) llm__os_thread_join(team->members[i].thread);
    llm__os_cond_destroy(&team->wake);
    llm__os_mutex_destroy(&team->mutex);
}
#endif

typedef void llm__team_parallel_fn(void *user, int n, void (*task)(void *arg, int i), void *arg);

/* Creates a team of n. With `parallel` it uses the host's threads. Otherwise it starts its own, which end when the team
   is freed; if the system does not start all of them, the team is smaller. */
static llm__team *llm__team_create(llm__env *env, int n, llm__team_parallel_fn *parallel, void *user) {
    llm__team_member *members = (llm__team_member *)llm__alloc_zero(env, (size_t)n, sizeof *members);
    llm__team_share *shares = (llm__team_share *)llm__alloc_zero(env, (size_t)n * 2, sizeof *shares);
    llm__team *team = (llm__team *)llm__alloc_zero(env, 1, sizeof *team);
    team->n = parallel ? n : 1;
    team->parallel = parallel;
    team->user = user;
    team->members = members;
    team->shares = shares;
#ifndef LLM_NO_THREADS
    llm__os_mutex_init(&team->mutex);
    llm__os_cond_init(&team->wake);
    llm__pool_on_free(team, llm__team_stop);
    for (; team->n < n; team->n++) { /* no rounds if there is `parallel` */
        llm__team_member *member = &members[team->n - 1];
        member->team = team;
        member->index = team->n;
        if (!llm__os_thread_start(&member->thread, llm__team_member_main, member)) break;
        team->n_started++;
    }
#endif
    return team;
}

static void llm__team_free(llm__pool *pool, llm__team *team) {
    llm__team_member *members = team->members;
    llm__team_share *shares = team->shares;
    llm__free(pool, team);
    llm__free(pool, members);
    llm__free(pool, shares);
}

/* Waits until the other members have finished the task. */
static void llm__team_wait(llm__team *team) {
    for (unsigned i = 0; __atomic_load_n(&team->n_working, __ATOMIC_ACQUIRE) > 0; i++) llm__team_spin_pause(i);
    team->running = false;
}

static void llm__team_run(llm__team *team, void (*task)(void *arg, int index), void *arg) {
    for (int i = 0; i < 2 * team->n; i++) __atomic_store_n(&team->shares[i].n_taken, 0, __ATOMIC_RELAXED);
    team->task = task;
    team->arg = arg;
    team->running = true;
    __atomic_store_n(&team->n_working, team->n - 1, __ATOMIC_RELEASE);
    if (team->parallel) {
        team->parallel(team->user, team->n, llm__team_member_task, team);
    } else {
#ifndef LLM_NO_THREADS
        if (team->n_started) llm__team_wake(team);
#endif
        task(arg, 0);
    }
    llm__team_wait(team);
}

#if defined(__linux__) && !defined(LLM_NO_THREADS)

/* ---- How many cores there are ----

   Linux tells this in files. `root` is put before their paths: tests pass a directory, everything else "". */

enum { LLM__MOST_CPUS = 1024 };

/* Reads a small file as text. Returns false if there is none. */
static bool llm__cores_read(const char *root, const char *path, char *text, size_t size) {
    char whole[1024];
    if (snprintf(whole, sizeof whole, "%s%s", root, path) >= (int)sizeof whole) return false;
    int fd = llm__file_descriptor(whole);
    if (fd < 0) return false;
    ssize_t n = read(fd, text, size - 1);
    close(fd);
    text[n < 0 ? 0 : n] = 0;
    return n > 0;
}

/* A number that identifies the core to which processor `cpu` (a hardware thread) belongs. If the system does not tell,
   the processor counts as a core of its own. */
static int64_t llm__cores_name(const char *root, int cpu) {
    char path[96], text[32];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/core_id", cpu);
    if (!llm__cores_read(root, path, text, sizeof text)) return -1 - cpu;
    int64_t core = strtol(text, NULL, 10);
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/physical_package_id", cpu);
    int64_t package = llm__cores_read(root, path, text, sizeof text) ? strtol(text, NULL, 10) : 0;
    return core < 0 ? -1 - cpu : package << 32 | core;
}

/* The number of cores of which this process may use at least one hardware thread. Large and small cores count alike. */
static int llm__cores_allowed(const char *root, const uint8_t allowed[LLM__MOST_CPUS]) {
    int64_t names[LLM__MOST_CPUS];
    int n = 0;
    for (int cpu = 0; cpu < LLM__MOST_CPUS; cpu++) {
        if (!allowed[cpu]) continue;
        int at = 0;
        for (names[n] = llm__cores_name(root, cpu); names[at] != names[n];) at++;
        n += at == n;
    }
    return n;
}

/* The number of processors to which a control group limits its processes, rounded down but at least 1; LLM__MOST_CPUS
   if it sets no limit. Version 2 of control groups has "QUOTA PERIOD" in one file, version 1 has two files. */
static int llm__cores_quota(const char *root, const char *group, bool version_2) {
    char path[768], text[64];
    double quota = 0, period = 0;
    snprintf(path, sizeof path, version_2 ? "%s/cpu.max" : "%s/cpu.cfs_quota_us", group);
    if (!llm__cores_read(root, path, text, sizeof text)) return LLM__MOST_CPUS;
    int n = sscanf(text, "%lf %lf", &quota, &period); /* the file may also say "max" */
    if (!version_2) {
        snprintf(path, sizeof path, "%s/cpu.cfs_period_us", group);
        n += llm__cores_read(root, path, text, sizeof text) && sscanf(text, "%lf", &period) == 1;
    }
    if (n != 2 || !(quota > 0) || !(period > 0) || quota / period > (int)LLM__MOST_CPUS) return LLM__MOST_CPUS;
    return quota < period ? 1 : (int)(quota / period);
}

/* The lowest limit of this process's control group and of all groups above it. A container may not see some of these
   groups; the loop ends with the root of the mount, which it does see. */
static int llm__cores_group(const char *root) {
    char text[4096], group[512];
    int least = LLM__MOST_CPUS;
    if (!llm__cores_read(root, "/proc/self/cgroup", text, sizeof text)) return least;
    for (char *line = text, *next; line; line = next) { /* NUMBER:CONTROLLERS:PATH */
        next = strchr(line, '\n');
        if (next) *next++ = 0;
        char *controllers = strchr(line, ':'), *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path) continue;
        *path++ = 0;
        bool version_2 = !controllers[1];
        if (!version_2 && strncmp(controllers, ":cpu,", 5) && strcmp(controllers, ":cpu") &&
            !strstr(controllers, ",cpu,"))
            continue;
        const char *mount = version_2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
        if (snprintf(group, sizeof group, "%s%s", mount, path) >= (int)sizeof group) continue;
        for (size_t n = strlen(group); n >= strlen(mount); group[n] = 0) {
            int quota = llm__cores_quota(root, group, version_2);
            if (quota < least) least = quota;
            while (n > 0 && group[--n] != '/') continue;
        }
    }
    return least;
}

static int llm__cores_count(const char *root, const uint8_t allowed[LLM__MOST_CPUS]) {
    int cores = llm__cores_allowed(root, allowed), quota = llm__cores_group(root);
    return cores < quota ? cores : quota;
}
#endif

/* One thread per physical core that this process may use, but not more than its control groups allow. */
static int llm__team_default_threads(void) {
#if defined(LLM_NO_THREADS)
    return 1;
#elif defined(_WIN32)
    SYSTEM_LOGICAL_PROCESSOR_INFORMATION info[512];
    DWORD_PTR process, all;
    DWORD size = sizeof info;
    int n = 0;
    if (GetProcessAffinityMask(GetCurrentProcess(), &process, &all) && GetLogicalProcessorInformation(info, &size))
        for (DWORD i = 0; i < size / sizeof *info; i++)
            n += info[i].Relationship == RelationProcessorCore && (info[i].ProcessorMask & process) != 0;
    if (n) return n;
    SYSTEM_INFO system; /* the process uses several groups of 64 processors, for which the mask is 0 */
    GetSystemInfo(&system);
    return (int)system.dwNumberOfProcessors;
#else
    int n = (int)sysconf(_SC_NPROCESSORS_ONLN);
#if defined(__linux__)
    uint8_t allowed[LLM__MOST_CPUS];
    for (int i = 0; i < LLM__MOST_CPUS; i++) allowed[i] = i < n;
#if defined(CPU_ISSET) /* missing if the host included sched.h before llm.h without _GNU_SOURCE */
    cpu_set_t set;
    bool known = !sched_getaffinity(0, sizeof set, &set);
    for (int i = 0; known && i < LLM__MOST_CPUS; i++) allowed[i] = i < CPU_SETSIZE && CPU_ISSET(i, &set);
#endif
    n = llm__cores_count("", allowed);
#endif
    return n < 1 ? 1 : n > 256 ? 256 : n;
#endif
}

/* ---- The model on the CPU ---- */

typedef struct llm__cpu_layer {
    float *attention_norm, *ffn_norm; /* [n_embd] */
    float *qkv_bias;                  /* [(n_heads + 2 * n_kv_heads) * head_dim] or NULL */
    float *q_norm, *k_norm;           /* [head_dim] or NULL */
    llm__matrix qkv, attention_out, gate_up, down;
} llm__cpu_layer;

typedef struct llm__cpu_model {
    llm__pool pool;
    llm_backend_shape whole, shape; /* the whole model's; this rank's, with its own numbers of layers and heads */
    llm_backend_range layer_range, heads, key_heads, embd, ff, vocab; /* which part of the whole this rank has */
    bool is_last_stage;
    int group; /* query heads that share a key head, in the whole model */
    llm_dtype dtype;
    const llm__kernels *kernels;
    llm__team *team;     /* for loading; NULL afterwards */
    uint8_t *room, *end; /* the rest of the memory for matrices, which follow each other */
    llm__cpu_layer *layers;
    float *output_norm;
    llm__matrix embedding, head; /* both have the same data if tied */
} llm__cpu_model;

typedef struct llm__cpu_open_args {
    void **out;
    const llm_backend_shape *shape;
    const llm_model_desc *desc;
} llm__cpu_open_args;

static void llm__cpu_close(void *model) {
    if (!model) return;
    llm__pool pool = ((llm__cpu_model *)model)->pool;
    llm__pool_free(&pool);
}

/* Every token reads all weights and the cache. With pages of 2 MB, where the system has them, that takes fewer address
   translations, and the system provides the memory faster. */
enum { LLM__HUGE_PAGE = 1 << 21 };

static void llm__cpu_use_huge_pages(void *block, size_t size) {
#if defined(MADV_HUGEPAGE)
    uintptr_t first = ((uintptr_t)block + LLM__HUGE_PAGE - 1) & ~(uintptr_t)(LLM__HUGE_PAGE - 1),
              end = ((uintptr_t)block + size) & ~(uintptr_t)(LLM__HUGE_PAGE - 1);
    if (first < end) madvise((void *)first, end - first, MADV_HUGEPAGE);
#else
    (void)block;
    (void)size;
#endif
}

/* The pool is stored inside the object it owns. It is copied there at the end, once the object is complete. */
static void llm__cpu_open_body(llm__env *env, void *arg) {
    llm__cpu_open_args *args = (llm__cpu_open_args *)arg;
    llm__cpu_model *m = (llm__cpu_model *)llm__alloc_zero(env, 1, sizeof *m);
    m->whole = *args->shape;
    const llm_backend_ranks own = llm_backend_find_ranks(&m->whole, args->desc->tensor, args->desc->pipeline);
    m->shape = own.shape;
    m->layer_range = own.layers;
    m->is_last_stage = llm__ranks_is_last_stage(args->desc->pipeline);
    m->heads = own.heads;
    m->key_heads = own.key_heads;
    m->embd = own.embd;
    m->ff = own.ff;
    m->vocab = own.vocab;
    m->group = m->whole.n_heads / m->whole.n_kv_heads;
    m->dtype = args->desc->dtype;
    m->kernels = llm__kernels_choose(args->desc->isa);
    m->layers = (llm__cpu_layer *)llm__alloc_zero(env, (size_t)m->shape.n_layers, sizeof *m->layers);
    m->room = (uint8_t *)llm__alloc(env, (size_t)m->shape.weight_bytes, 1);
    m->end = m->room + m->shape.weight_bytes;
    llm__cpu_use_huge_pages(m->room, (size_t)m->shape.weight_bytes);
    m->team = llm__team_create(env, args->desc->n_threads, NULL, NULL);
    m->pool = *env->pool;
    *args->out = m;
}

static llm_status llm__cpu_open(void **out, const llm_backend_shape *shape, const llm_model_desc *desc,
                                llm_error *err) {
    llm__pool pool;
    llm__env env;
    llm__cpu_open_args args = {out, shape, desc};
    *out = NULL;
    llm__pool_init(&pool, &desc->host);
    llm__env_init(&env, &pool, err, NULL);
    llm_status status = llm__env_run(&env, llm__cpu_open_body, &args);
    if (status) llm__pool_free(&pool);
    return status;
}

typedef struct llm__cpu_upload_args {
    llm__cpu_model *model;
    const llm_backend_weight *weight;
    llm__matrix *matrix;
    float *rows; /* scratch: 16 rows for each thread */
} llm__cpu_upload_args;

static void llm__cpu_pack_task(void *arg, int index) {
    llm__cpu_upload_args *a = (llm__cpu_upload_args *)arg;
    int n_tiles = llm__math_round_up(a->matrix->n, 16) / 16, numbers[16];
    float *rows = a->rows + (size_t)index * 16 * (size_t)llm__math_round_up(a->matrix->k, 32);
    llm__team_worker w = {a->model->team, index, 0, 0};
    for (int tile; (tile = llm__team_take(&w, n_tiles)) >= 0;) {
        llm__matrix_tile_rows(a->weight, tile, numbers);
        llm__pack_tile(a->model->kernels, a->matrix, tile, a->weight, numbers, rows);
    }
}

static void llm__cpu_upload_matrix(llm__env *env, llm__cpu_model *model, const llm_backend_weight *weight,
                                   llm__matrix *matrix) {
    llm__cpu_upload_args args = {model, weight, matrix, NULL};
    *matrix = llm__matrix_describe(model->dtype, weight);
    size_t bytes = llm__matrix_bytes(matrix); /* a multiple of LLM__ALIGN */
    if (bytes <= (size_t)(model->end - model->room)) {
        matrix->data = model->room;
        model->room += bytes;
    } else matrix->data = (uint8_t *)llm__alloc(env, bytes, 1);
    args.rows = (float *)llm__alloc(env, (size_t)model->team->n * 16 * (size_t)llm__math_round_up(weight->cols, 32),
                                    sizeof(float));
    llm__team_run(model->team, llm__cpu_pack_task, &args);
    llm__free(env->pool, args.rows);
}

/* Copies a weight that is a single row or a single column. */
static float *llm__cpu_upload_vector(llm__env *env, const llm_backend_weight *weight) {
    float *v = (float *)llm__alloc(env, (size_t)weight->rows * (size_t)weight->cols, sizeof *v);
    for (int i = 0; i < weight->rows; i++) weight->read_row(weight, i, v + (size_t)i * (size_t)weight->cols);
    return v;
}

static void llm__cpu_upload_body(llm__env *env, void *arg) {
    llm__cpu_upload_args *a = (llm__cpu_upload_args *)arg;
    llm__cpu_model *m = a->model;
    const llm_backend_weight *w = a->weight;
    llm__cpu_layer *layer = &m->layers[w->layer];
    switch (w->kind) {
    case LLM_WEIGHT_EMBEDDING: llm__cpu_upload_matrix(env, m, w, &m->embedding); break;
    case LLM_WEIGHT_ATTENTION_NORM: layer->attention_norm = llm__cpu_upload_vector(env, w); break;
    case LLM_WEIGHT_QKV: llm__cpu_upload_matrix(env, m, w, &layer->qkv); break;
    case LLM_WEIGHT_QKV_BIAS: layer->qkv_bias = llm__cpu_upload_vector(env, w); break;
    case LLM_WEIGHT_Q_NORM: layer->q_norm = llm__cpu_upload_vector(env, w); break;
    case LLM_WEIGHT_K_NORM: layer->k_norm = llm__cpu_upload_vector(env, w); break;
    case LLM_WEIGHT_ATTENTION_OUT: llm__cpu_upload_matrix(env, m, w, &layer->attention_out); break;
    case LLM_WEIGHT_FFN_NORM: layer->ffn_norm = llm__cpu_upload_vector(env, w); break;
    case LLM_WEIGHT_GATE_UP: llm__cpu_upload_matrix(env, m, w, &layer->gate_up); break;
    case LLM_WEIGHT_DOWN:
        llm__cpu_upload_matrix(env, m, w, &layer->down);
        /* The panels of gate_up write packed rows, which only the panels of down can read. */
        if (!layer->down.panels) layer->gate_up.panels = false;
        break;
    case LLM_WEIGHT_OUTPUT_NORM: m->output_norm = llm__cpu_upload_vector(env, w); break;
    case LLM_WEIGHT_HEAD: llm__cpu_upload_matrix(env, m, w, &m->head); break;
    }
    if (w->kind == LLM_WEIGHT_EMBEDDING && m->shape.tied_head && m->is_last_stage) m->head = m->embedding;
    llm_backend_weight_kind last = !m->is_last_stage    ? LLM_WEIGHT_DOWN
                                   : m->shape.tied_head ? LLM_WEIGHT_OUTPUT_NORM
                                                        : LLM_WEIGHT_HEAD;
    if (w->kind != last || (!m->is_last_stage && w->layer != m->shape.n_layers - 1)) return;
    llm__team_free(env->pool, m->team);
    m->team = NULL;
}

static llm_status llm__cpu_upload(void *model, const llm_backend_weight *weight, llm_error *err) {
    llm__cpu_model *m = (llm__cpu_model *)model;
    llm__env env;
    llm__cpu_upload_args args = {m, weight, NULL, NULL};
    llm__env_init(&env, &m->pool, err, NULL);
    return llm__env_run(&env, llm__cpu_upload_body, &args);
}

/* ==== 15 Communication ==========================================================================================

   In tensor parallel each rank computes some of the outputs of every matrix. The next matrix needs all of them, so the
   ranks exchange their parts: the results of attention, those of the first half of the feed-forward network, and the
   residual stream after each of the two. Every output is computed as on one rank, so the bits are the same for any
   number of ranks.

   The other way is to share the inputs of every second matrix and to add the sums of all ranks. That takes 2 exchanges
   a layer instead of 4. But floating-point sums depend on how k is cut. For the same bits on up to 64 ranks, k would
   always be cut into 64 slices, and each exchange would carry the sums of all 64: for 2 ranks 32 times the data of an
   exchange here. If each rank added the slices of its own outputs, there would be 4 exchanges again. */

enum {
    LLM__RANKS_MOST = 1024,
    LLM__RANKS_VERSION = 2 /* increase it when ranks exchange different data, or share the weights in another way */
};

/* Rank `rank` has bytes *from to end - 1 of row `row`; returns end. It has none if end <= *from. */
static size_t llm__comm_part(const llm_exchange *x, int rank, int size, size_t row, size_t *from) {
    size_t n = (size_t)x->n_units, begin = n * (size_t)rank / (size_t)size, end = n * ((size_t)rank + 1) / (size_t)size;
    if (x->tokens) {
        size_t unit = (size_t)(x->tokens[row] / x->tokens_per_unit);
        *from = 0;
        return begin <= unit && unit < end ? x->row_bytes : 0;
    }
    *from = begin * x->unit_bytes < x->row_bytes ? begin * x->unit_bytes : x->row_bytes;
    return end * x->unit_bytes < x->row_bytes ? end * x->unit_bytes : x->row_bytes;
}

static uint64_t llm__hash_fnv(uint64_t hash, const void *bytes, size_t n) { /* FNV-1a, eight bytes at a time */
    const uint8_t *p = (const uint8_t *)bytes;
    for (; n >= 8; n -= 8, p += 8) hash = (hash ^ llm__bytes_u64(p)) * 0x100000001B3u;
    for (; n; n--, p++) hash = (hash ^ *p) * 0x100000001B3u;
    return hash;
}

static int llm__ranks_count(const llm_comm *comm) { return comm ? comm->size : 1; }

static bool llm__comm_same_call(const llm_exchange *a, const llm_exchange *b) {
    return a->n_rows == b->n_rows && a->row_bytes == b->row_bytes && a->unit_bytes == b->unit_bytes &&
           a->n_units == b->n_units && !a->tokens == !b->tokens;
}

/* Copies n bytes from rank `from` to all ranks. */
static llm_status llm__comm_broadcast(llm_comm *comm, int from, void *data, size_t n, llm_error *err) {
    unsigned flags = 0;
    const int32_t whose = from;
    llm_exchange x = {data, 1, n, n, n, comm->size, &whose, 1};
    return comm->exchange(comm, &x, &flags, err);
}

/* Every rank passes its status. A rank that failed returns its own. The others return that of the first rank that
   failed, and *err names this rank and has its message; they return LLM_OK if none failed. */
static llm_status llm__comm_agree(llm_comm *comm, llm_status status, llm_error *err) {
    int32_t all[LLM__RANKS_MOST];
    unsigned flags = 0;
    size_t n = sizeof *all * (size_t)comm->size;
    llm_exchange x = {all, 1, n, n, sizeof *all, comm->size, NULL, 0};
    llm_error first;
    int rank = 0;
    memset(&first, 0, sizeof first);
    if (status && err) first = *err;
    all[comm->rank] = (int32_t)status;
    llm_status failed = comm->exchange(comm, &x, &flags, status ? NULL : err);
    if (failed) return status ? status : failed;
    while (rank < comm->size && !all[rank]) rank++;
    if (rank == comm->size) return LLM_OK;
    failed = llm__comm_broadcast(comm, rank, &first, sizeof first, status ? NULL : err);
    if (status || failed) return status ? status : failed;
    return llm__error(err, (llm_status)all[rank], "rank %d: %s", rank, first.message);
}

/* The same for all ranks of a model. With `patient` they wait 100 times as long: they were loading or allocating, which
   takes some ranks longer than others. */
static llm_status llm__ranks_agree(llm_comm *tensor, llm_comm *pipeline, bool patient, llm_status status,
                                   llm_error *err) {
    llm_comm *comms[2] = {tensor, pipeline};
    for (int i = 0; i < 2; i++) {
        if (!comms[i]) continue;
        double patience = comms[i]->patience;
        if (patient) comms[i]->patience = 100 * patience;
        status = llm__comm_agree(comms[i], status, err);
        comms[i]->patience = patience;
    }
    return status;
}

/* Fails on all ranks if they do not all pass the same hash. */
static llm_status llm__ranks_agree_on_hash(llm_comm *tensor, llm_comm *pipeline, uint64_t hash, const char *what,
                                           llm_error *err) {
    llm_comm *comms[2] = {tensor, pipeline};
    llm_status status = LLM_OK;
    for (int i = 0; i < 2 && !status; i++) {
        uint64_t first = hash;
        if (!comms[i]) continue;
        status = llm__comm_broadcast(comms[i], 0, &first, sizeof first, err);
        if (status) return status;
        if (first != hash)
            status = llm__error(err, LLM_ERROR_ARGUMENT, "rank %d and rank 0 do not agree on %s", comms[i]->rank, what);
        status = llm__ranks_agree(tensor, pipeline, false, status, err);
    }
    return status;
}

/* Another comm for the same ranks. *out is NULL if there are no ranks. */
static llm_status llm__comm_duplicate(llm_comm *comm, llm_comm **out, llm_error *err) {
    *out = NULL;
    return comm ? comm->duplicate(comm, out, err) : LLM_OK;
}

/* Did any rank pass true? An exchange that fails here is not reported: the next pass fails, and says why. */
static bool llm__ranks_any(llm_comm *tensor, llm_comm *pipeline, bool said) {
    llm_comm *comms[2] = {tensor, pipeline};
    unsigned flags = said;
    for (int i = 0; i < 2; i++) {
        if (!comms[i]) continue;
        llm_exchange nothing = {NULL, 0, 0, 0, 0, comms[i]->size, NULL, 0};
        comms[i]->exchange(comms[i], &nothing, &flags, NULL);
    }
    return flags != 0;
}

/* Returns the first rank's `seconds` on all ranks, so that decisions that depend on time are the same on all. */
static double llm__ranks_first_seconds(llm_comm *tensor, llm_comm *pipeline, double seconds) {
    if (tensor) llm__comm_broadcast(tensor, 0, &seconds, sizeof seconds, NULL);
    if (pipeline) llm__comm_broadcast(pipeline, 0, &seconds, sizeof seconds, NULL);
    return seconds;
}

/* ---- Threads of one process ----

   The ranks share a hub, and each copies directly from the memory of the others. A rank that finds an error breaks the
   hub; from then on all calls on it fail. */

enum { LLM__COMM_SLOTS = 64 }; /* max messages that one rank has sent to another, and that are not received yet */

/* What one rank tells the others. Padded, so that no two seats are in one cache line. */
typedef struct llm__hub_seat {
    int64_t n_arrived; /* atomic: exchanges that this rank has begun                 */
    int64_t n_left;    /* atomic: exchanges in which it has read all that it needs   */
    int n_readers;     /* atomic: ranks that may be reading this rank's memory       */
    bool gone;         /* atomic: the rank has freed its comm                        */
    unsigned flags;
    llm_exchange exchange;
    char pad[64];
} llm__hub_seat;

/* The messages from one rank to another. They stay in the sender's memory until they are received. */
typedef struct llm__hub_link {
    int64_t n_sent, n_taken; /* atomic */
    const void *data[LLM__COMM_SLOTS];
    size_t n[LLM__COMM_SLOTS];
    char pad[64];
} llm__hub_link;

typedef struct llm__hub {
    llm__pool pool;
    int size, n_users; /* n_users is atomic                                                */
    int broken;        /* atomic: 1 while `why` is being written, 2 once it is complete    */
    char why[400];
    llm_comm *comms;      /* [size]       */
    llm__hub_seat *seats; /* [size]       */
    llm__hub_link *links; /* [size][size] */
} llm__hub;

/* One pause of a rank that waits for another. After LLM__SPINS of them it yields now and then, because the other rank
   may need this core. Returns true after a yield: time to look at the clock. */
static bool llm__comm_pause(unsigned round) {
    llm__team_spin_pause(round);
    return round >= LLM__SPINS && round % LLM__YIELDS == 0;
}

/* Fails with the reason why the hub is broken, once no other rank reads this rank's memory. */
static llm_status llm__hub_fail(llm_comm *comm, llm_error *err) {
    llm__hub *hub = (llm__hub *)comm->user;
    for (unsigned i = 0; __atomic_load_n(&hub->broken, __ATOMIC_SEQ_CST) != 2; i++) llm__comm_pause(i);
    for (unsigned i = 0; __atomic_load_n(&hub->seats[comm->rank].n_readers, __ATOMIC_SEQ_CST) > 0; i++)
        llm__comm_pause(i);
    return llm__error(err, LLM_ERROR_DEVICE, "%s", hub->why);
}

/* When it returns, no other rank reads this rank's memory any more, so what was being sent can be freed. */
static void llm__hub_abort(llm_comm *comm, const char *why) {
    llm__hub *hub = (llm__hub *)comm->user;
    int whole = 0;
    if (__atomic_compare_exchange_n(&hub->broken, &whole, 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
        snprintf(hub->why, sizeof hub->why, "%s", why);
        __atomic_store_n(&hub->broken, 2, __ATOMIC_SEQ_CST);
    }
    llm__hub_fail(comm, NULL);
}

static llm_status llm__hub_break(llm_comm *comm, llm_error *err, const char *format, int a, int b) {
    char why[200];
    snprintf(why, sizeof why, format, a, b);
    llm__hub_abort(comm, why);
    return llm__hub_fail(comm, err);
}

/* Waits until another rank's counter reaches `wanted`. */
static llm_status llm__hub_wait(llm_comm *comm, int other, const int64_t *counter, int64_t wanted, llm_error *err) {
    llm__hub *hub = (llm__hub *)comm->user;
    double start = 0;
    for (unsigned i = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < wanted; i++) {
        bool late = llm__comm_pause(i);
        /* The other rank may have come, and broken the hub after that, while this one paused: this call is complete. */
        if (__atomic_load_n(&hub->broken, __ATOMIC_ACQUIRE) && __atomic_load_n(counter, __ATOMIC_ACQUIRE) < wanted)
            return llm__hub_fail(comm, err);
        if (!late) continue;
        if (start == 0) start = llm__clock_now();
        if (__atomic_load_n(&hub->seats[other].gone, __ATOMIC_ACQUIRE) &&
            __atomic_load_n(counter, __ATOMIC_ACQUIRE) < wanted)
            return llm__hub_break(comm, err, "rank %d has left while rank %d waits for it", other, comm->rank);
        if (llm__clock_now() - start > comm->patience)
            return llm__hub_break(comm, err, "rank %d did not answer rank %d in time; it hangs, or makes other calls",
                                  other, comm->rank);
    }
    return LLM_OK;
}

/* Call this before reading another rank's memory, and do not read if it returns false. The other rank does not return
   from a broken hub, so its memory stays valid, until all its readers have called llm__hub_read_ends. */
static bool llm__hub_read_begins(llm__hub *hub, int other) {
    __atomic_add_fetch(&hub->seats[other].n_readers, 1, __ATOMIC_SEQ_CST);
    return !__atomic_load_n(&hub->broken, __ATOMIC_SEQ_CST);
}

static void llm__hub_read_ends(llm__hub *hub, int other) {
    __atomic_sub_fetch(&hub->seats[other].n_readers, 1, __ATOMIC_SEQ_CST);
}

/* Copies the part of a rank that has arrived. */
static llm_status llm__hub_copy(llm_comm *comm, int other, const llm_exchange *x, llm_error *err) {
    llm__hub *hub = (llm__hub *)comm->user;
    const llm_exchange *y = &hub->seats[other].exchange;
    if (!llm__comm_same_call(x, y))
        return llm__hub_break(comm, err, "rank %d makes another call than rank %d; all ranks must make the same calls",
                              other, comm->rank);
    bool allowed = llm__hub_read_begins(hub, other);
    for (size_t row = 0, from; row < x->n_rows && allowed; row++) {
        size_t end = llm__comm_part(x, other, comm->size, row, &from);
        if (end > from)
            memcpy((uint8_t *)x->data + row * x->stride + from, (const uint8_t *)y->data + row * y->stride + from,
                   end - from);
    }
    llm__hub_read_ends(hub, other);
    return allowed ? LLM_OK : llm__hub_fail(comm, err);
}

static llm_status llm__hub_exchange(llm_comm *comm, const llm_exchange *x, unsigned *flags, llm_error *err) {
    llm__hub *hub = (llm__hub *)comm->user;
    llm__hub_seat *seat = &hub->seats[comm->rank];
    int64_t n = seat->n_arrived + 1;
    unsigned all = *flags;
    if (__atomic_load_n(&hub->broken, __ATOMIC_SEQ_CST)) return llm__hub_fail(comm, err);
    seat->exchange = *x;
    seat->flags = *flags;
    __atomic_store_n(&seat->n_arrived, n, __ATOMIC_RELEASE);
    for (int i = 1; i < comm->size; i++) {
        int other = (comm->rank + i) % comm->size;
        llm_status status = llm__hub_wait(comm, other, &hub->seats[other].n_arrived, n, err);
        if (!status) status = llm__hub_copy(comm, other, x, err);
        if (status) return status;
        all |= hub->seats[other].flags;
    }
    __atomic_store_n(&seat->n_left, n, __ATOMIC_RELEASE);
    for (int i = 1; i < comm->size; i++) {
        int other = (comm->rank + i) % comm->size;
        llm_status status = llm__hub_wait(comm, other, &hub->seats[other].n_left, n, err);
        if (status) return status;
    }
    *flags = all;
    return LLM_OK;
}

static llm_status llm__hub_send(llm_comm *comm, int to, const void *data, size_t n, llm_error *err) {
    llm__hub *hub = (llm__hub *)comm->user;
    llm__hub_link *link = &hub->links[comm->rank * comm->size + to];
    if (__atomic_load_n(&hub->broken, __ATOMIC_SEQ_CST)) return llm__hub_fail(comm, err);
    llm_status status = llm__hub_wait(comm, to, &link->n_taken, link->n_sent + 1 - LLM__COMM_SLOTS, err);
    if (status) return status;
    link->data[link->n_sent % LLM__COMM_SLOTS] = data;
    link->n[link->n_sent % LLM__COMM_SLOTS] = n;
    __atomic_store_n(&link->n_sent, link->n_sent + 1, __ATOMIC_RELEASE);
    return LLM_OK;
}

static llm_status llm__hub_drain(llm_comm *comm, int to, int most, llm_error *err) {
    llm__hub_link *link = &((llm__hub *)comm->user)->links[comm->rank * comm->size + to];
    return llm__hub_wait(comm, to, &link->n_taken, link->n_sent - most, err);
}

static llm_status llm__hub_receive(llm_comm *comm, int from, void *data, size_t n, llm_error *err) {
    llm__hub *hub = (llm__hub *)comm->user;
    llm__hub_link *link = &hub->links[from * comm->size + comm->rank];
    int slot = (int)(link->n_taken % LLM__COMM_SLOTS);
    if (__atomic_load_n(&hub->broken, __ATOMIC_SEQ_CST)) return llm__hub_fail(comm, err);
    llm_status status = llm__hub_wait(comm, from, &link->n_sent, link->n_taken + 1, err);
    if (status) return status;
    if (link->n[slot] != n)
        return llm__hub_break(comm, err, "rank %d sent rank %d a message of the wrong size", from, comm->rank);
    bool allowed = llm__hub_read_begins(hub, from);
    if (allowed) memcpy(data, link->data[slot], n);
    llm__hub_read_ends(hub, from);
    if (!allowed) return llm__hub_fail(comm, err);
    __atomic_store_n(&link->n_taken, link->n_taken + 1, __ATOMIC_RELEASE);
    return LLM_OK;
}

static void llm__hub_close(llm_comm *comm) {
    llm__hub *hub = (llm__hub *)comm->user;
    __atomic_store_n(&hub->seats[comm->rank].gone, true, __ATOMIC_RELEASE);
    if (__atomic_sub_fetch(&hub->n_users, 1, __ATOMIC_ACQ_REL)) return;
    llm__pool pool = hub->pool;
    llm__pool_free(&pool);
}

typedef struct llm__hub_args {
    llm_comm **out; /* [size] */
    int size;
    llm_status (*duplicate)(llm_comm *comm, llm_comm **out, llm_error *err);
} llm__hub_args;

static void llm__hub_body(llm__env *env, void *arg) {
    llm__hub_args *args = (llm__hub_args *)arg;
    if (args->size < 1 || args->size > LLM__RANKS_MOST)
        llm__fail(env, LLM_ERROR_ARGUMENT, "size is %d; it must be 1 to %d ranks", args->size, (int)LLM__RANKS_MOST);
    size_t n = (size_t)args->size;
    llm__hub *hub = (llm__hub *)llm__alloc_zero(env, 1, sizeof *hub);
    hub->size = hub->n_users = args->size;
    hub->comms = (llm_comm *)llm__alloc_zero(env, n, sizeof *hub->comms);
    hub->seats = (llm__hub_seat *)llm__alloc_zero(env, n, sizeof *hub->seats);
    hub->links = (llm__hub_link *)llm__alloc_zero(env, n * n, sizeof *hub->links);
    for (int i = 0; i < args->size; i++) {
        llm_comm *comm = args->out[i] = &hub->comms[i];
        comm->rank = i;
        comm->size = args->size;
        comm->patience = 8;
        comm->user = hub;
        comm->exchange = llm__hub_exchange;
        comm->send = llm__hub_send;
        comm->drain = llm__hub_drain;
        comm->receive = llm__hub_receive;
        comm->duplicate = args->duplicate;
        comm->abort = llm__hub_abort;
        comm->close = llm__hub_close;
    }
    hub->pool = *env->pool;
}

static llm_status llm__hub_create(llm__hub_args *args, const llm_host *host, llm_error *err) {
    llm__pool pool;
    llm__env env;
    llm__pool_init(&pool, host);
    llm__env_init(&env, &pool, err, NULL);
    llm_status status = llm__env_run(&env, llm__hub_body, args);
    if (status) llm__pool_free(&pool);
    return status;
}

/* The first rank creates the new hub and sends its address to the others. */
static llm_status llm__hub_duplicate(llm_comm *comm, llm_comm **out, llm_error *err) {
    llm__hub *hub = (llm__hub *)comm->user;
    llm_comm *made[LLM__RANKS_MOST], *first = NULL;
    llm__hub_args args = {made, comm->size, llm__hub_duplicate};
    llm_status failed = LLM_OK;
    *out = NULL;
    if (comm->rank == 0) {
        failed = llm__hub_create(&args, &hub->pool.host, err);
        first = failed ? NULL : made[0];
    }
    llm_status status = llm__comm_broadcast(comm, 0, &first, sizeof first, err);
    if (status || failed) {
        for (int i = 0; first && i < comm->size && comm->rank == 0; i++) llm__hub_close(made[i]);
        return status ? status : failed;
    }
    if (!first) return llm__error(err, LLM_ERROR_MEMORY, "rank 0 is out of memory for another comm");
    *out = first + comm->rank;
    (*out)->patience = comm->patience;
    return LLM_OK;
}

LLM_API llm_status llm_comm_threads(llm_comm **out, int size, const llm_host *host, llm_error *err) {
    llm__hub_args args = {out, size, llm__hub_duplicate};
    if (!out) return llm__error(err, LLM_ERROR_ARGUMENT, "out is NULL");
    return llm__hub_create(&args, host, err);
}

/* ---- MPI ----

   Each rank sends its part to every other rank. A head in front of it says which call it belongs to. No MPI call
   blocks: this code polls its requests, and looks whether another rank has sent an abort message. */

#ifdef LLM_MPI
enum { LLM__MPI_EXCHANGE = 1, LLM__MPI_MESSAGE, LLM__MPI_ABORT };

typedef struct llm__mpi_head {
    uint64_t call;     /* a hash of the exchange's sizes */
    uint32_t flags, n; /* n counts exchanges */
} llm__mpi_head;

typedef struct llm__mpi {
    llm__pool pool;
    llm_comm comm;
    MPI_Comm ranks;
    bool broken;
    char why[400];
    uint32_t n_exchanges;
    uint8_t *sent, *received; /* [room], [size][room]: a head and a part, this rank's and those of all ranks */
    size_t room;
    MPI_Request *requests; /* [2 * size] those of an exchange: receives, then sends */
    MPI_Request *messages; /* [size][LLM__COMM_SLOTS] sends; LLM__COMM_SLOTS for each rank, used in turn */
    int *n_sent;           /* [size] number of messages sent to each rank */
} llm__mpi;

static llm_status llm__mpi_fail(llm__mpi *m, llm_error *err) { return llm__error(err, LLM_ERROR_DEVICE, "%s", m->why); }

/* Sends an abort message to all ranks. It is short, so MPI copies it at once and does not wait for its receiver, which
   may be dead. */
static void llm__mpi_abort(llm_comm *comm, const char *why) {
    llm__mpi *m = (llm__mpi *)comm->user;
    if (m->broken) return;
    m->broken = true;
    snprintf(m->why, sizeof m->why, "%s", why);
    for (int i = 0; i < comm->size; i++) {
        MPI_Request request;
        if (i == comm->rank) continue;
        MPI_Isend(m->why, (int)sizeof m->why, MPI_BYTE, i, LLM__MPI_ABORT, m->ranks, &request);
        MPI_Request_free(&request);
    }
}

static llm_status llm__mpi_break(llm__mpi *m, llm_error *err, const char *format, int a, int b) {
    char why[200];
    snprintf(why, sizeof why, format, a, b);
    llm__mpi_abort(&m->comm, why);
    return llm__mpi_fail(m, err);
}

static llm_status llm__mpi_check(llm__mpi *m, int code, llm_error *err) {
    char text[MPI_MAX_ERROR_STRING] = "", why[400];
    int n = 0, class_of = MPI_SUCCESS;
    if (code == MPI_SUCCESS) return LLM_OK;
    MPI_Error_class(code, &class_of);
    if (class_of == MPI_ERR_TRUNCATE)
        return llm__mpi_break(m, err,
                              "some rank makes another call than rank %d; all ranks must make the same calls (MPI "
                              "error %d)",
                              m->comm.rank, code);
    MPI_Error_string(code, text, &n);
    snprintf(why, sizeof why, "rank %d: MPI failed: %.300s", m->comm.rank, text);
    llm__mpi_abort(&m->comm, why);
    return llm__mpi_fail(m, err);
}

/* Has another rank sent an abort message? */
static bool llm__mpi_hears_abort(llm__mpi *m) {
    int there = 0;
    MPI_Status status;
    if (MPI_Iprobe(MPI_ANY_SOURCE, LLM__MPI_ABORT, m->ranks, &there, &status) != MPI_SUCCESS || !there) return false;
    MPI_Recv(m->why, (int)sizeof m->why, MPI_BYTE, status.MPI_SOURCE, LLM__MPI_ABORT, m->ranks, MPI_STATUS_IGNORE);
    m->why[sizeof m->why - 1] = 0;
    m->broken = true;
    return true;
}

/* Waits for n requests. After a failure they are cancelled; MPI may go on reading the memory of sends, so that is never
   freed. */
static llm_status llm__mpi_wait(llm__mpi *m, MPI_Request *requests, int n, llm_error *err) {
    double start = 0;
    llm_status failed = LLM_OK;
    int done = 0;
    for (unsigned i = 0; !failed; i++) {
        int code = MPI_Testall(n, requests, &done, MPI_STATUSES_IGNORE);
        if (code == MPI_ERR_IN_STATUS) code = MPI_ERR_TRUNCATE;
        failed = llm__mpi_check(m, code, err);
        if (failed || done) break;
        if (!llm__comm_pause(i)) continue;
        if (llm__mpi_hears_abort(m)) failed = llm__mpi_fail(m, err);
        if (failed) continue;
        if (start == 0) start = llm__clock_now();
        if (llm__clock_now() - start > m->comm.patience)
            failed =
                llm__mpi_break(m, err, "rank %d waited too long for another of the %d ranks; it hangs, or has ended",
                               m->comm.rank, m->comm.size);
    }
    for (int i = 0; failed && i < n; i++)
        if (requests[i] != MPI_REQUEST_NULL) {
            MPI_Cancel(&requests[i]);
            MPI_Request_free(&requests[i]);
        }
    return failed;
}

/* Makes room for a head and n more bytes from each rank. No exchange is under way here, so the old memory is unused. */
static bool llm__mpi_reserve(llm__mpi *m, size_t n) {
    if (n + sizeof(llm__mpi_head) <= m->room) return true;
    size_t room = 2 * n + 4096;
    uint8_t *sent = (uint8_t *)llm__alloc_try(&m->pool, room, 1),
            *received = (uint8_t *)llm__alloc_try(&m->pool, room, (size_t)m->comm.size);
    if (!sent || !received) {
        llm__free(&m->pool, sent);
        llm__free(&m->pool, received);
        return false;
    }
    llm__free(&m->pool, m->sent);
    llm__free(&m->pool, m->received);
    m->sent = sent;
    m->received = received;
    m->room = room;
    return true;
}

/* Copies a rank's part of the rows to `bytes`, or back with `unpack`; does neither if `bytes` is NULL. Returns the size
   of the part in bytes. */
static size_t llm__mpi_pack(const llm_exchange *x, int rank, int size, uint8_t *bytes, bool unpack) {
    size_t n = 0;
    for (size_t row = 0, from; row < x->n_rows; row++) {
        size_t end = llm__comm_part(x, rank, size, row, &from);
        if (end <= from) continue;
        uint8_t *at = (uint8_t *)x->data + row * x->stride + from;
        if (bytes && unpack) memcpy(at, bytes + n, end - from);
        else if (bytes) memcpy(bytes + n, at, end - from);
        n += end - from;
    }
    return n;
}

static llm_status llm__mpi_exchange(llm_comm *comm, const llm_exchange *x, unsigned *flags, llm_error *err) {
    llm__mpi *m = (llm__mpi *)comm->user;
    uint64_t sizes[5] = {x->n_rows, x->row_bytes, x->unit_bytes, (uint64_t)x->n_units, x->tokens != NULL};
    llm__mpi_head head = {llm__hash_fnv(0, sizes, sizeof sizes), *flags, m->n_exchanges++}, other;
    size_t most = 0;
    if (m->broken) return llm__mpi_fail(m, err);
    for (int i = 0; i < comm->size; i++) {
        size_t n = llm__mpi_pack(x, i, comm->size, NULL, false);
        if (n > most) most = n;
    }
    if (most > INT32_MAX / 4 || !llm__mpi_reserve(m, most)) {
        llm__mpi_break(m, NULL, "rank %d is out of memory for an exchange of %d ranks", comm->rank, comm->size);
        return llm__error(err, LLM_ERROR_MEMORY, "%s", m->why);
    }
    memcpy(m->sent, &head, sizeof head);
    int n = (int)(sizeof head + llm__mpi_pack(x, comm->rank, comm->size, m->sent + sizeof head, false)), n_requests = 0;
    for (int i = 0; i < comm->size; i++)
        if (i != comm->rank)
            MPI_Irecv(m->received + (size_t)i * m->room,
                      (int)(sizeof head + llm__mpi_pack(x, i, comm->size, NULL, false)), MPI_BYTE, i, LLM__MPI_EXCHANGE,
                      m->ranks, &m->requests[n_requests++]);
    for (int i = 1; i < comm->size; i++)
        MPI_Isend(m->sent, n, MPI_BYTE, (comm->rank + i) % comm->size, LLM__MPI_EXCHANGE, m->ranks,
                  &m->requests[n_requests++]);
    llm_status status = llm__mpi_wait(m, m->requests, n_requests, err);
    for (int i = 0; i < comm->size && !status; i++) {
        if (i == comm->rank) continue;
        const uint8_t *got = m->received + (size_t)i * m->room;
        memcpy(&other, got, sizeof other);
        if (other.call != head.call || other.n != head.n)
            return llm__mpi_break(m, err, "rank %d makes another call than rank %d; all ranks must make the same calls",
                                  i, comm->rank);
        *flags |= other.flags;
        llm__mpi_pack(x, i, comm->size, m->received + (size_t)i * m->room + sizeof head, true);
    }
    return status;
}

static llm_status llm__mpi_send(llm_comm *comm, int to, const void *data, size_t n, llm_error *err) {
    llm__mpi *m = (llm__mpi *)comm->user;
    MPI_Request *request = &m->messages[to * LLM__COMM_SLOTS + m->n_sent[to] % LLM__COMM_SLOTS];
    if (m->broken) return llm__mpi_fail(m, err);
    llm_status status = llm__mpi_wait(m, request, 1, err);
    if (status) return status;
    m->n_sent[to]++;
    return llm__mpi_check(
        m, MPI_Isend((void *)(uintptr_t)data, (int)n, MPI_BYTE, to, LLM__MPI_MESSAGE, m->ranks, request), err);
}

/* Slots are used in turn, so the oldest message that may still be on its way is in the slot of the next send. */
static llm_status llm__mpi_drain(llm_comm *comm, int to, int most, llm_error *err) {
    llm__mpi *m = (llm__mpi *)comm->user;
    int done;
    if (m->broken) return llm__mpi_fail(m, err);
    MPI_Testall(LLM__COMM_SLOTS, &m->messages[to * LLM__COMM_SLOTS], &done, MPI_STATUSES_IGNORE); /* lets MPI go on */
    for (int i = 0; i < LLM__COMM_SLOTS - most; i++) {
        int slot = (m->n_sent[to] + i) % LLM__COMM_SLOTS;
        llm_status status = llm__mpi_wait(m, &m->messages[to * LLM__COMM_SLOTS + slot], 1, err);
        if (status) return status;
    }
    return LLM_OK;
}

static llm_status llm__mpi_receive(llm_comm *comm, int from, void *data, size_t n, llm_error *err) {
    llm__mpi *m = (llm__mpi *)comm->user;
    MPI_Request request;
    if (m->broken) return llm__mpi_fail(m, err);
    llm_status status =
        llm__mpi_check(m, MPI_Irecv(data, (int)n, MPI_BYTE, from, LLM__MPI_MESSAGE, m->ranks, &request), err);
    return status ? status : llm__mpi_wait(m, &request, 1, err);
}

static void llm__mpi_close(llm_comm *comm) {
    llm__mpi *m = (llm__mpi *)comm->user;
    llm__pool pool = m->pool;
    while (!m->broken && llm__mpi_hears_abort(m)) {}
    if (m->broken) return; /* MPI may still read this memory */
    MPI_Comm_free(&m->ranks);
    llm__pool_free(&pool);
}

typedef struct llm__mpi_args {
    llm_comm **out;
    int rank, size;
    llm_status (*duplicate)(llm_comm *comm, llm_comm **out, llm_error *err);
} llm__mpi_args;

static void llm__mpi_body(llm__env *env, void *arg) {
    llm__mpi_args *args = (llm__mpi_args *)arg;
    size_t n = (size_t)args->size;
    llm__mpi *m = (llm__mpi *)llm__alloc_zero(env, 1, sizeof *m);
    llm_comm *comm = *args->out = &m->comm;
    m->requests = (MPI_Request *)llm__alloc(env, 2 * n, sizeof *m->requests);
    m->messages = (MPI_Request *)llm__alloc(env, n * LLM__COMM_SLOTS, sizeof *m->messages);
    m->n_sent = (int *)llm__alloc_zero(env, n, sizeof *m->n_sent);
    for (size_t i = 0; i < n * LLM__COMM_SLOTS; i++) m->messages[i] = MPI_REQUEST_NULL;
    comm->rank = args->rank;
    comm->size = args->size;
    comm->patience = 8;
    comm->user = m;
    comm->exchange = llm__mpi_exchange;
    comm->send = llm__mpi_send;
    comm->drain = llm__mpi_drain;
    comm->receive = llm__mpi_receive;
    comm->duplicate = args->duplicate;
    comm->abort = llm__mpi_abort;
    comm->close = llm__mpi_close;
    m->pool = *env->pool;
}

/* Makes a comm for the ranks of an MPI communicator. It works on a copy of that, so its messages do not mix with
   others. */
static llm_status llm__mpi_create(llm__mpi_args *args, MPI_Comm ranks, double patience, const llm_host *host,
                                  llm_error *err) {
    llm__pool pool;
    llm__env env;
    MPI_Request request = MPI_REQUEST_NULL;
    *args->out = NULL;
    if (MPI_Comm_rank(ranks, &args->rank) != MPI_SUCCESS || MPI_Comm_size(ranks, &args->size) != MPI_SUCCESS)
        return llm__error(err, LLM_ERROR_ARGUMENT, "comm is no MPI communicator, or MPI_Init_thread was not called");
    if (args->size > LLM__RANKS_MOST)
        return llm__error(err, LLM_ERROR_ARGUMENT, "there are %d ranks; the maximum is %d", args->size,
                          (int)LLM__RANKS_MOST);
    llm__pool_init(&pool, host);
    llm__env_init(&env, &pool, err, NULL);
    llm_status status = llm__env_run(&env, llm__mpi_body, args);
    if (status) {
        llm__pool_free(&pool);
        return status;
    }
    llm__mpi *m = (llm__mpi *)(*args->out)->user;
    MPI_Comm_set_errhandler(ranks, MPI_ERRORS_RETURN);
    m->ranks = ranks; /* abort messages go there until the copy exists */
    m->comm.patience = patience;
    MPI_Comm copy = MPI_COMM_NULL;
    status = llm__mpi_check(m, MPI_Comm_idup(ranks, &copy, &request), err);
    if (!status) status = llm__mpi_wait(m, &request, 1, err);
    m->ranks = copy;
    if (!status) status = llm__mpi_check(m, MPI_Comm_set_errhandler(copy, MPI_ERRORS_RETURN), err);
    if (status) *args->out = NULL; /* not freed: MPI may still read this memory */
    return status;
}

static llm_status llm__mpi_duplicate(llm_comm *comm, llm_comm **out, llm_error *err) {
    llm__mpi *m = (llm__mpi *)comm->user;
    llm__mpi_args args = {out, 0, 0, llm__mpi_duplicate};
    return llm__mpi_create(&args, m->ranks, comm->patience, &m->pool.host, err);
}

LLM_API llm_status llm_comm_mpi(llm_comm **out, MPI_Comm comm, const llm_host *host, llm_error *err) {
    llm__mpi_args args = {out, 0, 0, llm__mpi_duplicate};
    if (!out) return llm__error(err, LLM_ERROR_ARGUMENT, "out is NULL");
    return llm__mpi_create(&args, comm, 8, host, err);
}
#endif

LLM_API void llm_comm_abort(llm_comm *comm, const char *why) {
    if (comm) comm->abort(comm, why ? why : "a rank called llm_comm_abort");
}

LLM_API void llm_comm_free(llm_comm *comm) {
    if (comm) comm->close(comm);
}

/* ==== 16 KV cache ===============================================================================================

   Keys and values are stored in blocks of LLM_CACHE_BLOCK positions, all allocated when the context is created. A sequence
   is a length and a table of blocks. A fork shares its parent's blocks, which are reference-counted. Whoever appends
   to a shared block first copies it. This section keeps the books; the backend owns the blocks' contents. */

typedef struct llm__cache {
    int n_seq, n_ctx, blocks_per_seq, n_blocks, n_free;
    int *free_blocks;  /* [n_blocks] a stack                                    */
    int *n_users;      /* [n_blocks] sequences that hold the block              */
    int *origins;      /* [n_blocks] the block whose first positions it has, -1: none: a fork went on in the middle */
    int *n_copied;     /* [n_blocks] how many of them are still the same        */
    int *n_lent;       /* [n_blocks] the most positions another block has of it */
    int *tables;       /* [n_seq][blocks_per_seq]                               */
    int *lengths;      /* [n_seq]                                               */
    llm_token *tokens; /* [n_seq][n_ctx]                                        */
} llm__cache;

static int llm__cache_blocks_for(int n_positions) { return (n_positions + LLM_CACHE_BLOCK - 1) / LLM_CACHE_BLOCK; }

static void llm__cache_create(llm__env *env, llm__cache *cache, int n_seq, int n_ctx, int n_blocks) {
    cache->n_seq = n_seq;
    cache->n_ctx = n_ctx;
    cache->blocks_per_seq = llm__cache_blocks_for(n_ctx);
    cache->n_blocks = cache->n_free = n_blocks;
    cache->free_blocks = (int *)llm__alloc(env, (size_t)n_blocks, sizeof(int));
    cache->n_users = (int *)llm__alloc_zero(env, (size_t)n_blocks, sizeof(int));
    cache->origins = (int *)llm__alloc(env, (size_t)n_blocks, sizeof(int));
    cache->n_copied = (int *)llm__alloc_zero(env, (size_t)n_blocks, sizeof(int));
    cache->n_lent = (int *)llm__alloc_zero(env, (size_t)n_blocks, sizeof(int));
    cache->tables = (int *)llm__alloc_zero(env, (size_t)n_seq * (size_t)cache->blocks_per_seq, sizeof(int));
    cache->lengths = (int *)llm__alloc_zero(env, (size_t)n_seq, sizeof(int));
    cache->tokens = (llm_token *)llm__alloc(env, (size_t)n_seq * (size_t)n_ctx, sizeof(llm_token));
    for (int i = 0; i < n_blocks; i++)
        cache->free_blocks[i] = n_blocks - 1 - i; /* so that they are taken in ascending order */
}

static int *llm__cache_table(const llm__cache *cache, int seq) {
    return cache->tables + (size_t)seq * (size_t)cache->blocks_per_seq;
}

static llm_token *llm__cache_tokens(const llm__cache *cache, int seq) {
    return cache->tokens + (size_t)seq * (size_t)cache->n_ctx;
}

/* True if appending to this sequence must first copy its last block. */
static bool llm__cache_must_copy(const llm__cache *cache, int seq) {
    int length = cache->lengths[seq];
    return length % LLM_CACHE_BLOCK && cache->n_users[llm__cache_table(cache, seq)[length / LLM_CACHE_BLOCK]] > 1;
}

/* Number of free blocks that appending n tokens takes. */
static int llm__cache_needs(const llm__cache *cache, int seq, int n) {
    int length = cache->lengths[seq];
    return llm__cache_blocks_for(length + n) - llm__cache_blocks_for(length) + (n && llm__cache_must_copy(cache, seq));
}

static int llm__cache_take(llm__cache *cache) {
    int block = cache->free_blocks[--cache->n_free];
    cache->n_users[block] = 1;
    cache->origins[block] = -1;
    return block;
}

/* From position `place` on a block becomes another one: what was copied of that is no longer the same. */
static void llm__cache_change(llm__cache *cache, int block, int place) {
    if (place < cache->n_copied[block]) cache->n_copied[block] = place;
    if (place >= cache->n_lent[block]) return;
    cache->n_lent[block] = place;
    for (int i = 0; i < cache->n_blocks; i++)
        if (cache->origins[i] == block && cache->n_copied[i] > place) cache->n_copied[i] = place;
}

static void llm__cache_drop(llm__cache *cache, int block) {
    if (--cache->n_users[block]) return;
    llm__cache_change(cache, block, 0);
    cache->origins[block] = -1;
    cache->free_blocks[cache->n_free++] = block;
}

/* A sequence that is cut back to what it shared before it went on shares it again, and its own block is free. */
static void llm__cache_truncate(llm__cache *cache, int seq, int length) {
    int *table = llm__cache_table(cache, seq), last = length / LLM_CACHE_BLOCK, place = length % LLM_CACHE_BLOCK;
    for (int i = llm__cache_blocks_for(length); i < llm__cache_blocks_for(cache->lengths[seq]); i++)
        llm__cache_drop(cache, table[i]);
    cache->lengths[seq] = length;
    int own = place ? table[last] : 0, origin = place ? cache->origins[own] : -1;
    if (origin < 0 || place > cache->n_copied[own]) return;
    table[last] = origin;
    cache->n_users[origin]++;
    llm__cache_drop(cache, own);
}

/* Replaces a shared last block by a block of its own. Returns the shared block, from which the caller copies, or -1 if
   there is nothing to do. */
static int llm__cache_unshare(llm__cache *cache, int seq) {
    if (!llm__cache_must_copy(cache, seq)) return -1;
    int n = cache->lengths[seq] % LLM_CACHE_BLOCK;
    int *place = &llm__cache_table(cache, seq)[cache->lengths[seq] / LLM_CACHE_BLOCK], shared = *place;
    *place = llm__cache_take(cache);
    cache->origins[*place] = shared;
    cache->n_copied[*place] = n;
    if (cache->n_lent[shared] < n) cache->n_lent[shared] = n;
    llm__cache_drop(cache, shared);
    return shared;
}

/* Appends one token to a sequence whose last block is its own. The caller has checked that there is room. */
static void llm__cache_append(llm__cache *cache, int seq, llm_token token) {
    int at = cache->lengths[seq]++, *block = &llm__cache_table(cache, seq)[at / LLM_CACHE_BLOCK];
    if (at % LLM_CACHE_BLOCK == 0) *block = llm__cache_take(cache);
    else llm__cache_change(cache, *block, at % LLM_CACHE_BLOCK);
    llm__cache_tokens(cache, seq)[at] = token;
}

static void llm__cache_fork(llm__cache *cache, int seq, int parent, int length) {
    llm__cache_truncate(cache, seq, 0);
    for (int i = 0; i < llm__cache_blocks_for(length); i++) {
        int block = llm__cache_table(cache, parent)[i];
        llm__cache_table(cache, seq)[i] = block;
        cache->n_users[block]++;
    }
    memcpy(llm__cache_tokens(cache, seq), llm__cache_tokens(cache, parent), (size_t)length * sizeof(llm_token));
    cache->lengths[seq] = length;
}

/* ==== 17 Forward pass ===========================================================================================

   The Llama transformer: Touvron et al. 2023 (arXiv:2302.13971), with RMSNorm (1910.07467), rotary embeddings
   (2104.09864), SwiGLU (2002.05202), grouped-query attention (2305.13245). For rows x[n_embd] of all tokens at once:

       x = embedding[token]
       for each layer:   q, k, v = Wqkv norm(x) [+ bias];  q, k = rope([norm] q, [norm] k);  k, v go to the cache
                         x += Wo attention(q, cache);   x += Wdown (silu(Wgate norm(x)) * Wup norm(x))
       logits = Whead norm(x)

   Every member of the team runs llm__fwd_task; each phase of it is shared out in pieces and ends at a barrier. */

enum {
    LLM__CHUNK = 256, /* keys whose softmax is taken at once; chunks are merged in order (of the arithmetic) */
    LLM__SCORES = LLM__CHUNK + 16, /* a row of scores: rows a power of two apart would share few lines of the cache */
    LLM__QUERY_ROWS = 64, /* query rows, over the heads that share a key head, that meet a chunk together        */
    LLM__ROWS = LLM__STRIP_MOST, /* activation rows that meet a group of tiles while it is in the near cache */
    LLM__TILES = 4,         /* tiles in such a group                                                               */
    LLM__SPLIT_ROWS = 8,    /* rows of a sequence whose attention may be split over the keys                       */
    LLM__PART_ROWS = 128,   /* least rows that are a member's own in panels                                        */
    LLM__MESSAGE_HEAD = 16, /* floats in front of rows that go to the next stage; the first says whether to stop   */
    LLM__SCORED_ROWS = 128  /* rows whose logits, of so many columns, are there at once; a multiple of 16 */
};

/* Queries that are answered together: n entries of a row list from `first`, all of one sequence. */
typedef struct llm__fwd_queries {
    int first, n;
} llm__fwd_queries;

/* A product's activations. Many rows of bf16 go by panels; they are packed only, wherever that can be done at once. A single
   row is made ready by each member for itself, which takes less time than to meet. */
typedef struct llm__fwd_rows {
    float *x; /* [n_batch, or what is not packed][stride] */
    size_t stride;
    llm__kernel_group *lines; /* [n_batch][stride / 32] for weights in groups; all rows' are in one place */
    uint8_t *packed; /* [n_batch padded to 16][stride] bf16, see llm__kernel_packed_row; NULL: there are no panels */
} llm__fwd_rows;

typedef struct llm__cpu_context {
    llm__pool pool;
    const llm__cpu_model *model;
    llm_backend_desc desc;
    llm__team *team;
    bool round;       /* activations are rounded to bf16 before a product */
    bool round_cache; /* so are queries and softmax weights: the cache is bf16 or int8 */
    llm__weight_type cache_kind;
    int head_stride;          /* head_dim padded for products */
    float score_scale;        /* log2(e) / sqrt(head_dim): softmax is taken as powers of 2 */
    size_t cache_block_bytes; /* keys, or values, of one head in one block */
    uint8_t *cache;           /* see llm__cache_plane */
    size_t x_stride, qkv_stride;
    float *x, *qkv; /* [n_batch][stride]; in front of x is room for a message's head */
    llm__fwd_rows normed, attention, ffn;
    float *cosines, *sines; /* [n_batch][rope_dim / 2] */
    float *scratch;         /* [n_threads][scratch_floats] for attention */
    size_t scratch_floats;
    float *partials; /* [n_partials][partial_floats] of attention that is split, see llm__attn_split */
    size_t partial_floats;
    int n_partials;
    float *panels;  /* [n_threads][panel_floats] for llm__kernel_panel's c; NULL: there are no panels */
    int panel_rows; /* so many rows go by them, or more */
    uint8_t *tiles; /* [n_threads][tile_bytes] weights unpacked to bf16, or attention's queries and softmax weights */
    size_t panel_floats, tile_bytes;
    float *logits;                                /* [n_logits][n_vocab] */
    float *column_max, *column_sum;               /* [n_batch][n_vocab / LLM__COLUMNS] of a softmax in parts */
    int *all_rows;                                /* 0, 1, 2 ... */
    llm__fwd_queries *all_queries, *last_queries; /* of all rows; of the rows whose logits are wanted */
    int n_all_queries, n_last_queries;
    const llm_backend_pass *pass;
    llm_backend_pass
        own_pass; /* where it points: a callback may leave llm_forward while the other members still read it */
    bool cancelled;
    bool left;          /* by the thread that made the call: the others are to end without it */
    bool wants_to_stop; /* this rank; all know of it after they have met */
    bool stopped;       /* a pass of this call was cancelled; the stages behind hear of it with each message */
    float *outgoing[2]; /* [LLM__MESSAGE_HEAD + n_batch * x_stride] messages to the next stage */
    int n_sent;
    llm_status met; /* how the meetings of the ranks went */
    llm_error *err; /* of the pass */
} llm__cpu_context;

/* The cache is [n_cache_blocks / 8][n_layers][n_kv_heads][key, value][8] tiles of a block, the last 8 perhaps fewer: so a
   chunk's keys and values lie one behind the other, layer by layer, and memory is had only as a sequence grows. A plane is
   a layer's, head's keys or values. */
static int llm__cache_n_planes(const llm__cpu_context *c) {
    return 2 * c->model->shape.n_layers * c->model->shape.n_kv_heads;
}

static uint8_t *llm__cache_plane(const llm__cpu_context *c, int plane, int block) {
    const int some = (int)LLM__CHUNK / (int)LLM_CACHE_BLOCK;
    int first = block / some * some, n = c->desc.n_cache_blocks - first < some ? c->desc.n_cache_blocks - first : some;
    size_t at = (size_t)first * (size_t)llm__cache_n_planes(c) + (size_t)plane * (size_t)n + (size_t)(block - first);
    return c->cache + at * c->cache_block_bytes;
}

static uint8_t *llm__cache_block(const llm__cpu_context *c, int layer, int value, int head, int block) {
    return llm__cache_plane(c, (layer * c->model->shape.n_kv_heads + head) * 2 + value, block);
}

/* Do so many rows meet a matrix in panels? */
static bool llm__fwd_in_panels(const llm__cpu_context *c, const llm__matrix *m, int rows) {
    return c->panels && m->panels && rows >= c->panel_rows;
}

/* A few tiles against a few rows, the first of which is `row`: their sums, added to sums[rows][stride]. */
static void llm__fwd_tile_sums(const llm__cpu_context *c, const llm__matrix *m, int tile, int n_tiles,
                               const llm__fwd_rows *in, int row, int rows, float *sums, size_t stride) {
    const llm__kernels *kernels = c->model->kernels;
    int k = llm__math_round_up(m->k, 32);
    size_t n_lines = in->stride / 32;
    for (llm__kernel_tiles t; n_tiles > 0; tile += t.n, n_tiles -= t.n, sums += 16 * t.n) {
        t = llm__matrix_tiles(m, tile, n_tiles);
        if (llm__matrix_has_groups(t.kind))
            kernels->group_product(t.kind, in->lines + (size_t)row * n_lines, n_lines, rows, t.at, t.n, k, sums,
                                   stride);
        else kernels->product[t.kind](in->x + (size_t)row * in->stride, in->stride, rows, t.at, t.n, k, sums, stride);
    }
}

/* What becomes of a row's sums over some tiles, the first of which is `tile`. With LLM__SWIGLU they are pairs of gates
   and ups. */
static void llm__fwd_end_row(const llm__cpu_context *c, const llm__matrix *m, int tile, int n_tiles, const float *sums,
                             llm__kernel_ending ending, float *y) {
    const llm__kernels *kernels = c->model->kernels;
    int column = tile * 16, width = m->n - column < n_tiles * 16 ? m->n - column : n_tiles * 16;
    if (ending == LLM__ADD) kernels->add(y + column, sums, width);
    else if (ending == LLM__STORE) memcpy(y + column, sums, (size_t)width * sizeof(float));
    else kernels->swiglu(sums, n_tiles * 8, c->round, y + column / 2);
}

/* A few tiles against a few rows, the first of which is `row`. */
static void llm__linear_piece(const llm__cpu_context *c, const llm__matrix *m, int tile, int n_tiles,
                              const llm__fwd_rows *in, int row, int rows, llm__kernel_ending ending, float *y,
                              size_t y_stride) {
    float sums[LLM__ROWS][16 * LLM__TILES] __attribute__((aligned(64)));
    memset(sums, 0, (size_t)rows * sizeof *sums);
    llm__fwd_tile_sums(c, m, tile, n_tiles, in, row, rows, sums[0], 16 * LLM__TILES);
    for (int r = 0; r < rows; r++)
        llm__fwd_end_row(c, m, tile, n_tiles, sums[r], ending, y + (size_t)(row + r) * y_stride);
}

static llm__kernel_lines llm__fwd_lines_of(const llm__cpu_context *c, const llm__fwd_rows *rows, size_t r) {
    return llm__kernel_packed_row(c->model->kernels->line_step, rows->packed, rows->stride, r);
}

/* Rows of a piece: up to 16 are packed at once, if there are enough for all members. */
static int llm__fwd_row_step(const llm__cpu_context *c, const llm__matrix *m, int rows) {
    int share = (rows + c->team->n - 1) / c->team->n;
    return !llm__fwd_in_panels(c, m, rows) ? 1 : share < 16 ? share : 16;
}

/* What a product needs of its activations beside them: their whole numbers for weights in groups, or that they are
   packed for panels; a phase, unless there is nothing to do. `packed`: for panels they are packed already. Returns the
   rows for this member. */
static llm__fwd_rows llm__fwd_prepare_rows(llm__team_worker *w, const llm__cpu_context *c, const llm__matrix *m,
                                           const llm__fwd_rows *in, int rows, bool packed) {
    const llm__kernels *kernels = c->model->kernels;
    bool panels = llm__fwd_in_panels(c, m, rows);
    int step = llm__fwd_row_step(c, m, rows), n_pieces = (rows + step - 1) / step, k = (int)in->stride;
    llm__fwd_rows own = *in;
    if (!m->groups && (packed || !panels)) return own;
    if (rows == 1) {
        own.lines += w->index * (k / 32);
        kernels->quantize(own.x, k, own.lines);
        return own;
    }
    for (int piece; (piece = llm__team_take(w, n_pieces)) >= 0;)
        for (int r = piece * step; r < rows && r < (piece + 1) * step; r++) {
            const float *x = in->x + (size_t)r * in->stride;
            if (m->groups) kernels->quantize(x, k, in->lines + (size_t)r * (size_t)(k / 32));
            else kernels->pack_scale(x, 1, k, k, llm__fwd_lines_of(c, in, (size_t)r), 0);
        }
    llm__team_finish(w);
    return own;
}

/* A panel's tiles against the rows from `row` to `end`. */
static void llm__linear_panel(const llm__cpu_context *c, int index, const llm__matrix *m, int tile, int n_tiles,
                              const llm__fwd_rows *in, int row, int end, llm__kernel_ending ending, float *y,
                              size_t y_stride) {
    const llm__fwd_rows *ffn = &c->ffn;
    llm__kernel_panel p;
    int next = tile + n_tiles;
    p.line_step = c->model->kernels->line_step;
    p.k = llm__math_round_up(m->k, 32);
    p.kind = m->kind;
    p.tiles = llm__matrix_tiles(m, tile, n_tiles).at;
    p.ahead = next * 16 < m->n ? llm__matrix_tiles(m, next, 1).at : NULL;
    p.tile_bytes = m->tile_bytes;
    p.n_tiles = n_tiles;
    p.ending = ending;
    p.y_stride = y_stride;
    p.width = m->n - tile * 16;
    p.packed_k = ffn->stride;
    p.column = c->model->ff.first + tile * 8;
    p.c = c->panels + (size_t)index * c->panel_floats;
    p.unpacked = c->tiles + (size_t)index * c->tile_bytes;
    for (int first = row; first < end; first += LLM__PANEL_ROWS) {
        p.n_rows = end - first < LLM__PANEL_ROWS ? end - first : (int)LLM__PANEL_ROWS;
        p.a = in->packed + (size_t)first * in->stride * 2;
        p.y = ending == LLM__SWIGLU ? NULL : y + (size_t)first * y_stride + tile * 16;
        p.packed = ffn->packed + (size_t)first * ffn->stride * 2;
        c->model->kernels->panel(&p);
    }
}

/* Parts of the rows in which they meet a matrix. In panels: shared among the members as in other phases, if there are
   enough; then each reads all weights, but what it multiplies and adds to is in its cache. Else LLM__ROWS each, which meet
   the same tiles one part after the other. */
static int llm__fwd_row_parts(const llm__cpu_context *c, const llm__matrix *m, int rows) {
    if (!llm__fwd_in_panels(c, m, rows)) return (rows + LLM__ROWS - 1) / LLM__ROWS;
    int most = rows / LLM__PART_ROWS;
    return most < 1 ? 1 : most < c->team->n ? most : c->team->n;
}

/* The first row of a part; 16 stay together, see llm__fwd_row_step. */
static int llm__fwd_part_row(int rows, int part, int n_parts) {
    return part == n_parts ? rows : (int)((int64_t)((rows + 15) / 16) * part / n_parts) * 16;
}

/* Tiles in a piece of work: as many as serve the caches where that leaves enough pieces for the threads. If few rows had 4,
   one of two threads would wait for the other in a matrix of 36. */
static int llm__fwd_piece_tiles(const llm__cpu_context *c, int n_tiles, int n_parts, bool panels) {
    if (!panels) return n_parts > 1 ? LLM__TILES : 2;
    int n = n_tiles * n_parts / (8 * c->team->n) / 2 * 2;
    return n < 2 ? 2 : n > LLM__PANEL_TILES ? (int)LLM__PANEL_TILES : n;
}

/* y = W x, y += W x, or y = silu(gate) * up, which with panels goes to c->ffn packed; for all rows, which are prepared; a
   phase. */
static void llm__linear(llm__team_worker *w, const llm__cpu_context *c, const llm__matrix *m, const llm__fwd_rows *in,
                        int rows, llm__kernel_ending ending, float *y, size_t y_stride) {
    bool panels = llm__fwd_in_panels(c, m, rows);
    int n_parts = llm__fwd_row_parts(c, m, rows), n_tiles = llm__math_round_up(m->n, 16) / 16,
        step = llm__fwd_piece_tiles(c, n_tiles, n_parts, panels), n_columns = (n_tiles + step - 1) / step;
    for (int piece; (piece = llm__team_take(w, n_parts * n_columns)) >= 0;) {
        int column = panels ? piece % n_columns : piece / n_parts, part = panels ? piece / n_columns : piece % n_parts,
            first = column * step, n = n_tiles - first < step ? n_tiles - first : step;
        if (panels) {
            llm__linear_panel(c, w->index, m, first, n, in, llm__fwd_part_row(rows, part, n_parts),
                              llm__fwd_part_row(rows, part + 1, n_parts), ending, y, y_stride);
        } else {
            int row = part * LLM__ROWS, some = rows - row < LLM__ROWS ? rows - row : (int)LLM__ROWS;
            llm__linear_piece(c, m, first, n, in, row, some, ending, y, y_stride);
        }
    }
    llm__team_finish(w);
}

/* Brings together what the ranks have; a phase after which all members see it, and whether a rank wants to stop. */
static void llm__fwd_meet(llm__team_worker *w, llm__cpu_context *c, const llm_exchange *x) {
    llm_comm *tensor = c->desc.tensor;
    if (!tensor || c->left) return;
    if (w->index == 0) {
        unsigned flags = c->wants_to_stop;
        if (!c->met) c->met = tensor->exchange(tensor, x, &flags, c->err);
        c->cancelled = c->cancelled || c->met || flags;
    }
    llm__team_barrier(w->team);
}

/* Rows of numbers of `size` bytes, of each of which the ranks have shares in units. */
static llm_exchange llm__fwd_shared_rows(void *data, int rows, size_t stride, int n, int unit, size_t size) {
    llm_exchange x = {
        data, (size_t)rows, stride * size, (size_t)n * size, (size_t)unit * size, (n + unit - 1) / unit, NULL, 0};
    return x;
}

static void llm__fwd_meet_floats(llm__team_worker *w, llm__cpu_context *c, float *data, int rows, size_t stride, int n,
                                 int unit) {
    const llm_exchange x = llm__fwd_shared_rows(data, rows, stride, n, unit, sizeof *data);
    llm__fwd_meet(w, c, &x);
}

/* The same of rows whose owner is the rank that has a token's part of the vocabulary. */
static void llm__fwd_meet_tokens(llm__team_worker *w, llm__cpu_context *c, float *data, int rows, size_t stride, int n,
                                 const llm_token *tokens) {
    llm_exchange x = llm__fwd_shared_rows(data, rows, stride, n, n, sizeof *data);
    x.n_units = (c->model->whole.n_vocab + LLM__COLUMNS - 1) / LLM__COLUMNS;
    x.tokens = tokens;
    x.tokens_per_unit = LLM__COLUMNS;
    llm__fwd_meet(w, c, &x);
}

/* The same of a product's activations, n a row, wherever they are: of packed rows, those whose lines take turns go as
   one. */
static void llm__fwd_meet_rows(llm__team_worker *w, llm__cpu_context *c, const llm__fwd_rows *in, int rows, int n,
                               int unit, bool packed) {
    size_t together = c->model->kernels->line_step / 64;
    if (!packed) {
        llm__fwd_meet_floats(w, c, in->x, rows, in->stride, n, unit);
        return;
    }
    rows = (int)(((size_t)rows + together - 1) / together);
    const llm_exchange x =
        llm__fwd_shared_rows(in->packed, rows, in->stride, llm__math_round_up(n, 32), unit, 2 * together);
    llm__fwd_meet(w, c, &x);
}

/* One row of c->x, normed, becomes row `to` of c->normed. */
static void llm__fwd_norm_row(const llm__cpu_context *c, const float *weight, const llm__matrix *m, int row, int to) {
    const llm_backend_shape *s = &c->model->shape;
    const llm__kernels *kernels = c->model->kernels;
    size_t stride = c->normed.stride;
    float *out = c->normed.x + (size_t)to * stride;
    const float *x = c->x + (size_t)row * c->x_stride;
    kernels->norm(x, weight, s->n_embd, kernels->norm_factor(x, s->n_embd, s->rms_eps), c->round, out);
    if (m->groups) kernels->quantize(out, (int)stride, c->normed.lines + (size_t)to * (stride / 32));
}

/* Up to 16 rows of c->x, normed and packed. Each one's factor is one long chain, so all are computed first, at once. */
static void llm__fwd_pack_norms(const llm__cpu_context *c, const float *weight, int first, int end) {
    const llm_backend_shape *s = &c->model->shape;
    const llm__kernels *kernels = c->model->kernels;
    const float *x = c->x + (size_t)first * c->x_stride;
    float factors[16];
    for (int i = 0; i < end - first; i++)
        factors[i] = kernels->norm_factor(x + (size_t)i * c->x_stride, s->n_embd, s->rms_eps);
    for (int i = 0; i < end - first; i++, x += c->x_stride)
        kernels->pack_norm(x, weight, s->n_embd, factors[i], llm__fwd_lines_of(c, &c->normed, (size_t)(first + i)));
}

/* Norms the rows and prepares them for the matrix they are to meet; a phase, if there are several. Where there are targets,
   the head meets them one by one, too, see llm__fwd_log_prob. Returns the rows for this member. */
static llm__fwd_rows llm__fwd_norm_rows(llm__team_worker *w, const llm__cpu_context *c, const float *weight,
                                        const llm__matrix *m, int rows) {
    bool panels = llm__fwd_in_panels(c, m, rows), both = m == &c->model->head && c->pass->n_targets;
    int step = llm__fwd_row_step(c, m, rows), n_pieces = (rows + step - 1) / step;
    llm__fwd_rows own = c->normed;
    if (rows == 1 && !both) {
        llm__fwd_norm_row(c, weight, m, 0, w->index);
        own.x += (size_t)w->index * own.stride;
        own.lines += (size_t)w->index * (own.stride / 32);
        return own;
    }
    for (int piece; (piece = llm__team_take(w, n_pieces)) >= 0;) {
        int first = piece * step, end = first + step < rows ? first + step : rows;
        if (panels) llm__fwd_pack_norms(c, weight, first, end);
        for (int r = first; r < end && (!panels || both); r++) llm__fwd_norm_row(c, weight, m, r, r);
    }
    llm__team_finish(w);
    return own;
}

/* The cache's block for row r. */
static int llm__fwd_pass_block(const llm_backend_pass *pass, int r) {
    const int *table = pass->blocks + (size_t)pass->seqs[r] * (size_t)pass->blocks_per_seq;
    return table[pass->positions[r] / LLM_CACHE_BLOCK];
}

/* Zeros in a block of all layers: what is not stored there yet is multiplied by 0, which must not meet a NaN. */
static void llm__cache_clear_block(const llm__cpu_context *c, int block) {
    for (int plane = 0; plane < llm__cache_n_planes(c); plane++)
        memset(llm__cache_plane(c, plane, block), 0, c->cache_block_bytes);
}

/* Do row r, which begins a block of the cache, and those behind it fill the block? */
static bool llm__fwd_fills_block(const llm__cpu_context *c, int r) {
    int last = r + LLM_CACHE_BLOCK - 1;
    return c->head_stride == c->model->shape.head_dim && last < c->pass->n_rows &&
           c->pass->seqs[last] == c->pass->seqs[r];
}

/* The embeddings, and the angles by which RoPE turns each row. Rows that begin a block of the cache clear it. */
static void llm__fwd_embed_rows(llm__team_worker *w, const llm__cpu_context *c) {
    const llm_backend_pass *pass = c->pass;
    const llm_backend_shape *s = &c->model->shape;
    const llm__matrix *m = &c->model->embedding;
    size_t half = (size_t)s->rope_dim / 2;
    for (int r; (r = llm__team_take(w, pass->n_rows)) >= 0;) {
        float *x = c->x + (size_t)r * c->x_stride;
        int at = pass->positions[r];
        if (at % LLM_CACHE_BLOCK == 0 && !llm__fwd_fills_block(c, r))
            llm__cache_clear_block(c, llm__fwd_pass_block(pass, r));
        int token = pass->tokens[r] - c->model->vocab.first;
        if (token >= 0 && token < m->n) llm__matrix_get_row(m, (size_t)token, x);
        for (size_t i = (size_t)r * half, j = 0; j < half; i++, j++) {
            llm__math_sincos(at * s->rope_frequencies[j], &c->sines[i], &c->cosines[i]);
            c->sines[i] *= s->rope_scale;
            c->cosines[i] *= s->rope_scale;
        }
    }
    llm__team_finish(w);
}

static llm__weight_type llm__cache_weight_type(llm_dtype dtype) {
    return dtype == LLM_DTYPE_F32 ? LLM__W_F32 : dtype == LLM_DTYPE_INT8 ? LLM__W_INT8 : LLM__W_BF16;
}

/* The scales of a block of int8 values, one for each position. */
static float *llm__cache_value_scales(const llm__cpu_context *c, uint8_t *values) {
    return (float *)(void *)(values + c->cache_block_bytes) - LLM_CACHE_BLOCK;
}

/* A key is a row of a tile; a value is a column across the tiles of its block. */
static void llm__cache_store_int8(const llm__cpu_context *c, uint8_t *tiles, bool value, int place, const float *from) {
    size_t n = (size_t)c->model->shape.head_dim, lane = (size_t)place % 16;
    if (!value) {
        uint8_t *tile = tiles + (size_t)(place / 16) * llm__matrix_tile_bytes(LLM__W_INT8, c->head_stride);
        float scale = llm__pack_quantize_row(from, n, (int8_t *)tile + lane, 16);
        ((float *)(void *)(tile + (size_t)c->head_stride * 16))[lane] = scale;
        return;
    }
    int8_t q[LLM__MOST_HEAD];
    size_t bytes = llm__matrix_tile_bytes(LLM__W_INT8, LLM_CACHE_BLOCK);
    llm__cache_value_scales(c, tiles)[place] = llm__pack_quantize_row(from, n, q, 1);
    for (size_t d = 0; d < n; d++) ((int8_t *)tiles)[d / 16 * bytes + (size_t)place * 16 + d % 16] = q[d];
    for (size_t i = 0; i < (size_t)c->head_stride && place == 0;
         i++) /* the block's first position: others store theirs */
        ((float *)(void *)(tiles + i / 16 * bytes + LLM_CACHE_BLOCK * 16))[i % 16] = 1;
}

/* In tiles of bf16 a key is words of a column, a value halves of words in a row. */
static void llm__cache_store_bf16(const llm__cpu_context *c, uint8_t *tiles, bool value, int place, const float *from) {
    int n = c->model->shape.head_dim;
    float rounded[LLM__MOST_HEAD + 1];
    c->model->kernels->scale(from, 1, n, true, rounded);
    rounded[n] = 0;
    if (value) {
        uint16_t *to = (uint16_t *)(void *)tiles + place / 2 * 32 + place % 2;
        for (int d = 0; d < n; d++)
            to[d / 16 * 16 * LLM_CACHE_BLOCK + d % 16 * 2] = (uint16_t)(llm__f32_bits(rounded[d]) >> 16);
        return;
    }
    uint32_t *to = (uint32_t *)(void *)tiles + place / 16 * 8 * c->head_stride + place % 16;
    for (int d = 0; d < n; d += 2) to[d * 8] = llm__f32_bits(rounded[d]) >> 16 | llm__f32_bits(rounded[d + 1]);
}

static void llm__cache_store_f32(const llm__cpu_context *c, uint8_t *tiles, bool value, int place, const float *from) {
    float *to = (float *)(void *)tiles + (value ? place * 16 : place / 16 * 16 * c->head_stride + place % 16);
    for (int d = 0; d < c->model->shape.head_dim; d++)
        to[value ? d / 16 * 16 * LLM_CACHE_BLOCK + d % 16 : d * 16] = from[d];
}

/* Puts one head's key or value of one position into its block. */
static void llm__cache_store(const llm__cpu_context *c, int layer, int value, int head, int block, int place,
                             const float *from) {
    uint8_t *tiles = llm__cache_block(c, layer, value, head, block);
    if (c->cache_kind == LLM__W_INT8) llm__cache_store_int8(c, tiles, value, place, from);
    else if (c->cache_kind == LLM__W_BF16) llm__cache_store_bf16(c, tiles, value, place, from);
    else llm__cache_store_f32(c, tiles, value, place, from);
}

/* One head's RMSNorm in place; `scratch` holds a head, for the kernel writes a little more than it. */
static void llm__rope_norm_head(const llm__cpu_context *c, const float *weight, float *scratch, float *x) {
    const llm_backend_shape *s = &c->model->shape;
    const llm__kernels *kernels = c->model->kernels;
    kernels->norm(x, weight, s->head_dim, kernels->norm_factor(x, s->head_dim, s->rms_eps), false, scratch);
    memcpy(x, scratch, (size_t)s->head_dim * sizeof *x);
}

/* What becomes of some heads of a row of queries, keys and values: a bias, a norm, and the rotation by row `at`'s angles.
   The heads are numbered queries, keys, values. */
static void llm__rope_heads(const llm__cpu_context *c, int index, int layer, int row, int at, int first, int end) {
    const llm_backend_shape *s = &c->model->shape;
    const llm__cpu_layer *weights = &c->model->layers[layer];
    const llm__kernels *kernels = c->model->kernels;
    size_t half = (size_t)s->rope_dim / 2;
    float *qkv = c->qkv + (size_t)row * c->qkv_stride, *scratch = c->scratch + (size_t)index * c->scratch_floats;
    int start = first * s->head_dim;
    if (s->qkv_bias) kernels->add(qkv + start, weights->qkv_bias + start, (end - first) * s->head_dim);
    for (int h = first; h < end && h < s->n_heads + s->n_kv_heads; h++) {
        float *x = qkv + h * s->head_dim;
        if (s->qk_norm) llm__rope_norm_head(c, h < s->n_heads ? weights->q_norm : weights->k_norm, scratch, x);
        kernels->rope(x, c->cosines + (size_t)at * half, c->sines + (size_t)at * half, (int)half);
    }
}

/* The query heads that share a key head. Other ranks may have some of the first key head's, and of the last's. */
static llm_backend_range llm__attn_head_queries(const llm__cpu_model *m, int head) {
    llm_backend_range heads;
    int before = m->heads.first % m->group, end = (head + 1) * m->group - before;
    heads.first = head ? head * m->group - before : 0;
    heads.n = (end < m->heads.n ? end : m->heads.n) - heads.first;
    return heads;
}

/* Rotates a row's key of one head, and the queries that share it if they are there, and stores key and value. */
static void llm__rope_group(const llm__cpu_context *c, int index, int layer, int r, int head, bool queries) {
    const llm_backend_pass *pass = c->pass;
    const llm_backend_shape *s = &c->model->shape;
    const llm_backend_range shared = llm__attn_head_queries(c->model, head);
    int key = s->n_heads + head, value = key + s->n_kv_heads;
    int at = pass->positions[r], block = llm__fwd_pass_block(pass, r);
    const float *row = c->qkv + (size_t)r * c->qkv_stride;
    if (queries) llm__rope_heads(c, index, layer, r, r, shared.first, shared.first + shared.n);
    llm__rope_heads(c, index, layer, r, r, key, key + 1);
    llm__rope_heads(c, index, layer, r, r, value, value + 1);
    llm__cache_store(c, layer, 0, head, block, at % LLM_CACHE_BLOCK, row + key * s->head_dim);
    llm__cache_store(c, layer, 1, head, block, at % LLM_CACHE_BLOCK, row + value * s->head_dim);
}

/* The same for all heads of all rows; a phase. The heads of a single row are shared out, too. */
static void llm__rope_rows(llm__team_worker *w, const llm__cpu_context *c, int layer, bool queries) {
    int rows = c->pass->n_rows, step = llm__fwd_row_step(c, &c->model->layers[layer].qkv, rows),
        n_heads = c->model->shape.n_kv_heads, n_shares = rows == 1 ? n_heads : 1,
        n_pieces = (rows + step - 1) / step * n_shares;
    for (int piece; (piece = llm__team_take(w, n_pieces)) >= 0;) {
        int first = piece / n_shares * step;
        for (int r = first; r < rows && r < first + step; r++)
            for (int head = piece % n_shares; head < n_heads; head += n_shares)
                llm__rope_group(c, w->index, layer, r, head, queries);
    }
    llm__team_finish(w);
}

/* The query heads that share one key head, of a few rows of one sequence: n query rows, and room for what they meet. */
typedef struct llm__attn_work {
    int layer, head, n, padded; /* padded: rows there is room for                                          */
    int first_head, group;      /* such heads; the first of them                                           */
    const int *rows;            /* rows[i / group] is query i's row of the pass                            */
    int first_row, n_rows;      /* where in c->qkv and c->attention the first of them is; all rows there   */
    const int *blocks;          /* the sequence's                                                          */
    float *q, *scores;          /* [padded][head_stride], [padded][LLM__SCORES]                            */
    uint8_t *packed;            /* queries, then room for softmax weights; or NULL: there are few          */
} llm__attn_work;

/* What attention to some keys gives: [padded][head_stride] sums of values, then [padded] maxima and [padded] sums of
   softmax weights. */
static size_t llm__attn_partial_floats(const llm__cpu_context *c, int padded) {
    return (size_t)padded * (size_t)(c->head_stride + 2);
}

/* Whole tiles of rows where there are enough of them. */
static int llm__attn_padded_queries(int n) { return n < LLM__TILE_ROWS ? n : llm__math_round_up(n, 16); }

/* The first position that one at `position` attends to. */
static int llm__attn_first_key(const llm_backend_shape *s, int position) {
    return s->window && position >= s->window ? position - s->window + 1 : 0;
}

static int llm__attn_last_key(const llm__cpu_context *c, const llm__attn_work *a, int i) {
    return c->pass->positions[a->rows[i / a->group]];
}

/* The first position of the chunks that any of the queries attends to, and what is behind the last. */
static int llm__attn_first_chunk(const llm__cpu_context *c, const llm__attn_work *a) {
    return llm__attn_first_key(&c->model->shape, llm__attn_last_key(c, a, 0)) / LLM__CHUNK * LLM__CHUNK;
}

static int llm__attn_end_of_keys(const llm__cpu_context *c, const llm__attn_work *a) {
    return llm__attn_last_key(c, a, a->n - 1) + 1;
}

/* The sums of queries and keys, or of softmax weights and values, over the n cache blocks named. */
static void llm__attn_keys(const llm__cpu_context *c, const llm__attn_work *a, const int *blocks, int n) {
    const llm__kernels *kernels = c->model->kernels;
    size_t stride = (size_t)c->head_stride, tile = llm__matrix_tile_bytes(c->cache_kind, c->head_stride);
    if (!a->packed) memset(a->scores, 0, (size_t)a->n * LLM__SCORES * sizeof(float));
    for (int i = 0; i < n; i++) {
        const uint8_t *keys = llm__cache_block(c, a->layer, 0, a->head, blocks[i]), *parts[LLM__MOST_HEAD / 32];
        float *scores = a->scores + i * LLM_CACHE_BLOCK;
        if (a->packed) {
            int n_parts = c->head_stride / 32;
            for (int j = 0; j < n_parts; j++) parts[j] = keys + j * 1024;
            llm__kernel_tile_product p = {a->packed,   a->padded / 16, n_parts, parts, tile, n_parts, 2,     scores,
                                          LLM__SCORES, false,          NULL,    0,     0,    NULL,    false, 0};
            kernels->tile_product(&p);
            continue;
        }
        kernels->product[c->cache_kind](a->q, stride, a->n, keys, 2, c->head_stride, scores, LLM__SCORES);
    }
}

static void llm__attn_values(const llm__cpu_context *c, const llm__attn_work *a, const int *blocks, int n,
                             float *part) {
    const llm__kernels *kernels = c->model->kernels;
    size_t stride = (size_t)c->head_stride, tile = llm__matrix_tile_bytes(c->cache_kind, LLM_CACHE_BLOCK);
    if (a->packed) {
        const uint8_t *weights = a->packed + (size_t)a->padded * stride * 2;
        for (int d = 0; d < c->head_stride; d += 32) {
            const uint8_t *values[(int)LLM__CHUNK / (int)LLM_CACHE_BLOCK];
            for (int i = 0; i < n; i++)
                values[i] = llm__cache_block(c, a->layer, 1, a->head, blocks[i]) + (size_t)(d / 16) * tile;
            llm__kernel_tile_product p = {weights, a->padded / 16, n,    values, tile, n,    2,     part + d,
                                          stride,  false,          NULL, 0,      0,    NULL, false, 0};
            kernels->tile_product(&p);
        }
        return;
    }
    memset(part, 0, (size_t)a->n * stride * sizeof(float));
    for (int i = 0; i < n && c->cache_kind == LLM__W_INT8; i++) {
        const float *scales = llm__cache_value_scales(c, llm__cache_block(c, a->layer, 1, a->head, blocks[i]));
        for (int r = 0; r < a->n; r++) {
            float *weights = a->scores + (size_t)r * LLM__SCORES + i * LLM_CACHE_BLOCK;
            kernels->weigh(weights, scales, LLM_CACHE_BLOCK);
        }
    }
    for (int i = 0; i < n; i++)
        kernels->product[c->cache_kind](a->scores + i * LLM_CACHE_BLOCK, LLM__SCORES, a->n,
                                        llm__cache_block(c, a->layer, 1, a->head, blocks[i]), c->head_stride / 16,
                                        LLM_CACHE_BLOCK, part, stride);
}

/* Asks for a block of values, so that memory is not idle while softmax is taken of the scores. */
static void llm__attn_fetch_values(const llm__cpu_context *c, const llm__attn_work *a, int block) {
    const uint8_t *values = llm__cache_block(c, a->layer, 1, a->head, block);
    for (size_t i = 0; i < c->cache_block_bytes; i += 64) __builtin_prefetch(values + i, 0, 2);
}

/* The softmax weights of query i, for the keys from position `first` on. */
static void llm__attn_weigh_keys(const llm__cpu_context *c, const llm__attn_work *a, int i, int first, int n_blocks,
                                 float *max, float *sum) {
    const llm__kernels *kernels = c->model->kernels;
    float *scores = a->scores + (size_t)i * LLM__SCORES;
    int last = llm__attn_last_key(c, a, i), padded = n_blocks * LLM_CACHE_BLOCK,
        n = last + 1 - first < padded ? last + 1 - first : padded,
        hidden = llm__attn_first_key(&c->model->shape, last) - first; /* keys before the window */
    llm__kernel_lines row = {NULL, 0};
    if (a->packed)
        row = llm__kernel_packed_row(kernels->line_step, a->packed + (size_t)a->padded * (size_t)c->head_stride * 2,
                                     (size_t)padded, (size_t)i);
    if (a->packed && hidden <= 0 && n > 0) {
        kernels->pack_softmax(scores, n, padded, c->score_scale, row, max, sum);
        return;
    }
    /* Each of them adds 2^-125.5 to a sum of at least 1, which is nothing, and then is made 0. */
    for (int j = 0; j < hidden && j < n; j++) scores[j] = -INFINITY;
    if (n > 0 && n > hidden) kernels->softmax(scores, n, padded, c->score_scale, c->round_cache, max, sum);
    else hidden = padded;
    if (hidden > 0) memset(scores, 0, (size_t)hidden * sizeof(float));
    if (a->packed) kernels->pack_scale(scores, 1, padded, padded, row, 0);
}

/* One chunk of keys, from position `first` on. */
static void llm__attn_chunk(const llm__cpu_context *c, const llm__attn_work *a, int first, float *part) {
    int end = llm__attn_end_of_keys(c, a),
        n_blocks = llm__cache_blocks_for(end - first < LLM__CHUNK ? end - first : (int)LLM__CHUNK);
    const int *blocks = a->blocks + first / LLM_CACHE_BLOCK;
    float *max = part + (size_t)a->padded * (size_t)c->head_stride, *sum = max + a->padded;
    llm__attn_keys(c, a, blocks, n_blocks);
    for (int i = 0; i < a->n; i++) {
        if (i < n_blocks) llm__attn_fetch_values(c, a, blocks[i]);
        llm__attn_weigh_keys(c, a, i, first, n_blocks, &max[i], &sum[i]);
    }
    llm__attn_values(c, a, blocks, n_blocks, part);
}

/* Adds what the chunk from position `first` on gave to what the chunks before it gave. */
static void llm__attn_join_chunk(const llm__cpu_context *c, const llm__attn_work *a, int first, const float *part,
                                 float *known) {
    size_t stride = (size_t)c->head_stride, stats = (size_t)a->padded * stride, padded = (size_t)a->padded;
    size_t rows[2] = {0, 0}, n[2] = {0, 0}; /* where it begins, and where it goes on: two runs of rows */
    for (size_t i = 0; i < (size_t)a->n; i++) {
        int last = llm__attn_last_key(c, a, (int)i), first_key = llm__attn_first_key(&c->model->shape, last);
        bool begins = first <= first_key && first_key < first + LLM__CHUNK;
        if (!begins && (first <= first_key || last < first)) continue;
        if (!n[!begins]++) rows[!begins] = i;
    }
    const float *max = part + stats, *sum = max + padded;
    float *known_max = known + stats, *known_sum = known_max + padded;
    memcpy(known + rows[0] * stride, part + rows[0] * stride, n[0] * stride * sizeof *known);
    memcpy(known_max + rows[0], max + rows[0], n[0] * sizeof *known);
    memcpy(known_sum + rows[0], sum + rows[0], n[0] * sizeof *known);
    size_t r = rows[1];
    c->model->kernels->merge((int)n[1], known_max + r, known_sum + r, known + r * stride, max + r, sum + r,
                             part + r * stride, c->head_stride);
}

/* A thread's scratch: the work's q and scores, then a partial result, then another; returns the first of these. */
static float *llm__attn_start(const llm__cpu_context *c, int index, int layer, int head, const int *rows,
                              llm__fwd_queries queries, llm__attn_work *a) {
    const llm_backend_range shared = llm__attn_head_queries(c->model, head);
    size_t stride = (size_t)c->head_stride;
    a->layer = layer;
    a->head = head;
    a->first_head = shared.first;
    a->group = shared.n;
    a->n = queries.n * a->group;
    a->padded = llm__attn_padded_queries(a->n);
    a->rows = rows + queries.first;
    a->first_row = queries.first;
    a->n_rows = rows == c->all_rows ? c->pass->n_rows : c->pass->n_logits;
    a->blocks = c->pass->blocks + (size_t)c->pass->seqs[a->rows[0]] * (size_t)c->pass->blocks_per_seq;
    a->q = c->scratch + (size_t)index * c->scratch_floats;
    a->scores = a->q + (size_t)a->padded * stride;
    a->packed = NULL;
    return a->scores + (size_t)a->padded * LLM__SCORES;
}

static void llm__attn_gather_queries(const llm__cpu_context *c, int index, llm__attn_work *a) {
    const llm_backend_shape *s = &c->model->shape;
    const llm__kernels *kernels = c->model->kernels;
    size_t stride = (size_t)c->head_stride;
    if (c->panels && c->cache_kind == LLM__W_BF16 && a->n >= LLM__TILE_ROWS)
        a->packed = c->tiles + (size_t)index * c->tile_bytes;
    else memset(a->q, 0, (size_t)a->n * stride * sizeof *a->q);
    for (int i = 0; i < a->n; i++) {
        const float *from = c->qkv + (size_t)(a->first_row + i / a->group) * c->qkv_stride +
                            (a->first_head + i % a->group) * s->head_dim;
        if (a->packed)
            kernels->pack_scale(from, 1, s->head_dim, c->head_stride,
                                llm__kernel_packed_row(kernels->line_step, a->packed, stride, (size_t)i), 0);
        else kernels->scale(from, 1, s->head_dim, c->round_cache, a->q + (size_t)i * stride);
    }
}

/* Are heads whole halves of lines, so that each can be packed when it is known? Ranks exchange whole lines. */
static bool llm__attn_packs_heads(const llm__cpu_context *c) {
    return c->model->shape.head_dim % (c->desc.tensor ? 32 : 16) == 0;
}

static void llm__attn_end(const llm__cpu_context *c, const llm__attn_work *a, const float *known) {
    const llm__kernels *kernels = c->model->kernels;
    const llm__fwd_rows *out = &c->attention;
    size_t stride = (size_t)c->head_stride;
    const float *sums = known + (size_t)a->padded * (stride + 1);
    int n = c->model->shape.head_dim;
    bool packs =
        llm__fwd_in_panels(c, &c->model->layers[a->layer].attention_out, a->n_rows) && llm__attn_packs_heads(c);
    for (int i = 0; i < a->n; i++) {
        size_t row = (size_t)(a->first_row + i / a->group);
        const float *from = known + (size_t)i * stride;
        int column = (c->model->heads.first + a->first_head + i % a->group) * n;
        if (packs) kernels->pack_scale(from, 1.0f / sums[i], n, n, llm__fwd_lines_of(c, out, row), column);
        else kernels->scale(from, 1.0f / sums[i], n, c->round, out->x + row * out->stride + column);
    }
}

/* All chunks of keys, in order. */
static void llm__attn_run(const llm__cpu_context *c, int index, int layer, int head, const int *rows,
                          llm__fwd_queries queries) {
    llm__attn_work a;
    float *part = llm__attn_start(c, index, layer, head, rows, queries, &a),
          *known = part + llm__attn_partial_floats(c, a.padded);
    llm__attn_gather_queries(c, index, &a);
    for (int first = llm__attn_first_chunk(c, &a); first < llm__attn_end_of_keys(c, &a); first += LLM__CHUNK) {
        llm__attn_chunk(c, &a, first, part);
        llm__attn_join_chunk(c, &a, first, part, known);
    }
    llm__attn_end(c, &a, known);
}

/* Where few queries would leave threads idle, each chunk of keys is a piece of its own, and the joining another phase. */
static void llm__attn_split(llm__team_worker *w, const llm__cpu_context *c, int layer, const int *rows,
                            const llm__fwd_queries *queries, int n_pieces, int n_chunks) {
    int n_heads = c->model->shape.n_kv_heads, index = w->index;
    llm__attn_work a;
    for (int piece; (piece = llm__team_take(w, n_pieces * n_chunks)) >= 0;) {
        const llm__fwd_queries q = queries[piece % n_pieces / n_heads];
        llm__attn_start(c, index, layer, piece % n_pieces % n_heads, rows, q, &a);
        int first = llm__attn_first_chunk(c, &a) + piece / n_pieces * LLM__CHUNK;
        if (first >= llm__attn_end_of_keys(c, &a)) continue;
        llm__attn_gather_queries(c, index, &a);
        llm__attn_chunk(c, &a, first, c->partials + (size_t)piece * c->partial_floats);
    }
    llm__team_finish(w);
    for (int piece; (piece = llm__team_take(w, n_pieces)) >= 0;) {
        float *known = llm__attn_start(c, index, layer, piece % n_heads, rows, queries[piece / n_heads], &a);
        const float *part = c->partials + (size_t)piece * c->partial_floats;
        for (int first = llm__attn_first_chunk(c, &a); first < llm__attn_end_of_keys(c, &a);
             first += LLM__CHUNK, part += (size_t)n_pieces * c->partial_floats)
            llm__attn_join_chunk(c, &a, first, part, known);
        llm__attn_end(c, &a, known);
    }
    llm__team_finish(w);
}

/* The chunks of keys that attention is to be split into, or 0: when there are too few queries to share out and room for
   what the chunks give. */
static int llm__attn_count_chunks(const llm__cpu_context *c, const int *rows, const llm__fwd_queries *queries,
                                  int n_queries) {
    const llm_backend_shape *s = &c->model->shape;
    int most = 0, n_pieces = n_queries * s->n_kv_heads, n_rows = 0;
    if (c->team->n == 1 || n_pieces >= 4 * c->team->n) return 0;
    for (int i = 0; i < n_queries; i++) {
        int from = c->pass->positions[rows[queries[i].first]],
            to = c->pass->positions[rows[queries[i].first + queries[i].n - 1]];
        int n = to / LLM__CHUNK - llm__attn_first_key(s, from) / LLM__CHUNK + 1;
        if (n > most) most = n;
        if (queries[i].n > n_rows) n_rows = queries[i].n;
    }
    bool fits = n_rows <= LLM__SPLIT_ROWS && n_pieces * most <= c->n_partials;
    return most > 1 && fits ? most : 0;
}

/* A phase, or more. A pass of a single row comes here before its heads are rotated: who attends does that, too. */
static void llm__attn_rows(llm__team_worker *w, const llm__cpu_context *c, int layer, const int *rows,
                           const llm__fwd_queries *queries, int n_queries) {
    int n_heads = c->model->shape.n_kv_heads, n_pieces = n_queries * n_heads;
    int n_chunks = llm__attn_count_chunks(c, rows, queries, n_queries);
    bool single = c->pass->n_rows == 1;
    if (n_chunks) {
        if (single) llm__rope_rows(w, c, layer, true);
        llm__attn_split(w, c, layer, rows, queries, n_pieces, n_chunks);
        return;
    }
    for (int piece; (piece = llm__team_take(w, n_pieces)) >= 0;) {
        if (single) llm__rope_group(c, w->index, layer, 0, piece % n_heads, true);
        llm__attn_run(c, w->index, layer, piece % n_heads, rows, queries[piece / n_heads]);
    }
    llm__team_finish(w);
}

/* Some tiles of a matrix, as a matrix. */
static llm__matrix llm__matrix_part(const llm__matrix *m, int first_tile, int end_tile) {
    llm__matrix part = *m;
    part.first += first_tile;
    part.n = (end_tile * 16 < m->n ? end_tile * 16 : m->n) - first_tile * 16;
    return part;
}

/* The last layer needs keys and values of all rows; the rows whose logits are wanted then move to the front, and nothing
   else is computed for the others. */
static void llm__fwd_keep_rows(llm__team_worker *w, const llm__cpu_context *c, int layer, const llm__fwd_rows *in) {
    const llm_backend_shape *s = &c->model->shape;
    const llm__matrix *m = &c->model->layers[layer].qkv;
    int q = s->n_heads * s->head_dim, n_tiles = llm__math_round_up(m->n, 16) / 16, n = c->pass->n_logits;
    const llm__matrix keys = llm__matrix_part(m, q / 16, n_tiles), queries = llm__matrix_part(m, 0, (q + 15) / 16);
    llm__linear(w, c, &keys, in, c->pass->n_rows, LLM__STORE, c->qkv + q / 16 * 16, c->qkv_stride);
    llm__rope_rows(w, c, layer, false);
    if (w->index == 0)
        for (int i = 0; i < n; i++)
            memmove(c->x + (size_t)i * c->x_stride, c->x + (size_t)c->pass->logit_rows[i] * c->x_stride,
                    c->x_stride * sizeof(float));
    llm__team_barrier(w->team);
    const llm__fwd_rows normed = llm__fwd_norm_rows(w, c, c->model->layers[layer].attention_norm, &queries, n);
    llm__linear(w, c, &queries, &normed, n, LLM__STORE, c->qkv, c->qkv_stride);
    for (int i; (i = llm__team_take(w, n)) >= 0;)
        llm__rope_heads(c, w->index, layer, i, c->pass->logit_rows[i], 0, s->n_heads);
    llm__team_finish(w);
}

static int llm__fwd_n_columns(const llm__cpu_model *m) { return (m->whole.n_vocab + LLM__COLUMNS - 1) / LLM__COLUMNS; }

/* The head fused with log-softmax: a few rows against LLM__COLUMNS tokens of the vocabulary. Their logits are in the near
   cache only; maximum and sum are what stays of them. */
static void llm__fwd_score_columns(const llm__cpu_context *c, int index, int part, int first_row, int rows,
                                   int all_rows) {
    const llm__matrix *m = &c->model->head;
    const llm__kernels *kernels = c->model->kernels;
    int first = part * LLM__COLUMNS, n = m->n - first < LLM__COLUMNS ? m->n - first : (int)LLM__COLUMNS;
    int n_tiles = llm__math_round_up(n, 16) / 16, n_parts = llm__fwd_n_columns(c->model);
    size_t row = (size_t)first_row, stride = (size_t)n_tiles * 16;
    float *logits = c->scratch + (size_t)index * c->scratch_floats;
    if (llm__fwd_in_panels(c, m, all_rows)) {
        const llm__matrix columns = llm__matrix_part(m, first / 16, first / 16 + n_tiles);
        llm__fwd_rows some = c->normed;
        some.packed += row * some.stride * 2; /* a multiple of 16 rows */
        for (int tile = 0; tile < n_tiles; tile += LLM__PANEL_TILES) {
            int n_panel = n_tiles - tile < LLM__PANEL_TILES ? n_tiles - tile : (int)LLM__PANEL_TILES;
            llm__linear_panel(c, index, &columns, tile, n_panel, &some, 0, rows, LLM__STORE, logits, stride);
        }
    } else {
        memset(logits, 0, (size_t)rows * stride * sizeof(float));
        llm__fwd_tile_sums(c, m, first / 16, n_tiles, &c->normed, first_row, rows, logits, stride);
    }
    for (int r = 0; r < rows; r++) {
        size_t at = (row + (size_t)r) * (size_t)n_parts + (size_t)(c->model->vocab.first / LLM__COLUMNS + part);
        kernels->softmax(logits + (size_t)r * stride, n, (int)stride, LLM__LOG2_E, false, &c->column_max[at],
                         &c->column_sum[at]);
    }
}

/* log p = logit - log(2) (max + log2(sum over all tokens of 2^(log2(e) logit - max))); the one logit is computed once
   more. */
static float llm__fwd_log_prob(const llm__cpu_context *c, int row, llm_token token) {
    const llm__matrix *m = &c->model->head;
    int n_parts = llm__fwd_n_columns(c->model);
    const float *maxima = c->column_max + (size_t)row * (size_t)n_parts;
    const float *sums = c->column_sum + (size_t)row * (size_t)n_parts;
    float logits[16] = {0}, max = maxima[0];
    double sum = 0;
    llm__fwd_tile_sums(c, m, token / 16, 1, &c->normed, row, 1, logits, 16);
    for (int i = 1; i < n_parts; i++) max = maxima[i] > max ? maxima[i] : max;
    for (int i = 0; i < n_parts; i++) sum += sums[i] * llm__math_exp2((double)maxima[i] - max);
    return (float)((double)logits[token % 16] - (max + llm__math_log2(sum)) * 0.69314718055994531);
}

static void llm__fwd_score_rows(llm__team_worker *w, llm__cpu_context *c, int rows) {
    const llm_backend_range vocab = c->model->vocab;
    const llm_backend_pass *pass = c->pass;
    int n_parts = (vocab.n + LLM__COLUMNS - 1) / LLM__COLUMNS, n_all = llm__fwd_n_columns(c->model);
    for (int part; (part = llm__team_take(w, n_parts)) >= 0;)
        for (int r = 0; r < rows; r += LLM__SCORED_ROWS)
            llm__fwd_score_columns(c, w->index, part, r, rows - r < LLM__SCORED_ROWS ? rows - r : (int)LLM__SCORED_ROWS,
                                   rows);
    llm__team_finish(w);
    llm__fwd_meet_floats(w, c, c->column_max, rows, (size_t)n_all, n_all, 1);
    llm__fwd_meet_floats(w, c, c->column_sum, rows, (size_t)n_all, n_all, 1);
    for (int i; (i = llm__team_take(w, pass->n_targets)) >= 0;) {
        llm_token token = pass->targets[i] - vocab.first;
        if (token >= 0 && token < vocab.n) pass->log_probs[i] = llm__fwd_log_prob(c, pass->target_rows[i], token);
    }
    llm__team_finish(w);
    llm__fwd_meet_tokens(w, c, pass->log_probs, pass->n_targets, 1, 1, pass->targets);
}

/* A thread's settings for computing; returns what they were. */
static uint64_t llm__kernels_enter(const llm__kernels *kernels) {
    uint64_t mode = llm__fpu_enter();
    if (kernels->tiles_enter) kernels->tiles_enter();
    return mode;
}

static void llm__kernels_leave(const llm__kernels *kernels, uint64_t mode) {
    if (kernels->tiles_leave) kernels->tiles_leave();
    llm__fpu_leave(mode);
}

/* All know of it after the next phase, or where there are ranks, the next meeting. The host's function, which may leave
   by an exception, runs in its own settings. */
static void llm__fwd_poll_cancel(const llm__team_worker *w, llm__cpu_context *c, uint64_t mode) {
    llm_comm *pipeline = c->desc.pipeline;
    if (w->index) return;
    if (c->pass->cancel) {
        llm__kernels_leave(c->model->kernels, mode);
        c->wants_to_stop = c->pass->cancel(c->pass->cancel_user);
        llm__kernels_enter(c->model->kernels);
    }
    if (!c->desc.tensor) c->cancelled = c->cancelled || c->wants_to_stop;
    /* Waits for nothing, but moves on what is on its way. */
    if (c->outgoing[0] && !c->met) pipeline->drain(pipeline, pipeline->rank + 1, LLM__COMM_SLOTS, NULL);
}

static size_t llm__fwd_message_bytes(const llm__cpu_context *c, int rows) {
    return (LLM__MESSAGE_HEAD + (size_t)rows * c->x_stride) * sizeof(float);
}

/* The rows that the stage before has computed; a phase. */
static void llm__fwd_receive_rows(llm__team_worker *w, llm__cpu_context *c, int rows) {
    llm_comm *pipeline = c->desc.pipeline;
    if (llm__ranks_is_first_stage(pipeline) || c->left) return;
    if (w->index == 0) {
        float *message = c->x - LLM__MESSAGE_HEAD;
        if (!c->met)
            c->met = pipeline->receive(pipeline, pipeline->rank - 1, message, llm__fwd_message_bytes(c, rows), c->err);
        c->cancelled = c->cancelled || c->met || message[0] != 0;
    }
    llm__team_barrier(w->team);
}

/* Sends rows to the next stage, in the buffer whose message before the last has arrived. */
static void llm__fwd_send_rows(const llm__team_worker *w, llm__cpu_context *c, int rows) {
    llm_comm *pipeline = c->desc.pipeline;
    if (w->index || c->met) return;
    c->met = pipeline->drain(pipeline, pipeline->rank + 1, 1, c->err);
    if (c->met) return;
    float *message = c->outgoing[c->n_sent++ % 2];
    memcpy(message, c->x - LLM__MESSAGE_HEAD, llm__fwd_message_bytes(c, rows));
    message[0] = c->cancelled ? 1.0f : 0.0f;
    c->met = pipeline->send(pipeline, pipeline->rank + 1, message, llm__fwd_message_bytes(c, rows), c->err);
}

static void llm__fwd_task(void *arg, int index) {
    llm__cpu_context *c = (llm__cpu_context *)arg;
    llm__team_worker worker = {c->team, index, 0, 0}, *w = &worker;
    const llm__cpu_model *m = c->model;
    const int *rows = c->all_rows;
    int n = c->pass->n_rows, n_embd = m->shape.n_embd, head_dim = m->shape.head_dim;
    float *x = c->x + m->embd.first; /* what this rank adds to */
    uint64_t mode = llm__kernels_enter(m->kernels);
    llm__fwd_poll_cancel(w, c, mode);
    llm__fwd_embed_rows(w, c);
    if (llm__ranks_is_first_stage(c->desc.pipeline))
        llm__fwd_meet_tokens(w, c, c->x, n, c->x_stride, n_embd, c->pass->tokens);
    llm__fwd_receive_rows(w, c, n);
    for (int i = 0; i < m->shape.n_layers && n && !c->cancelled; i++) {
        const llm__cpu_layer *layer = &m->layers[i];
        bool last = m->is_last_stage && i == m->shape.n_layers - 1;
        llm__fwd_rows in = llm__fwd_norm_rows(w, c, layer->attention_norm, &layer->qkv, n);
        if (last && c->pass->n_logits < n) {
            llm__fwd_keep_rows(w, c, i, &in);
            rows = c->pass->logit_rows;
            n = c->pass->n_logits;
        } else {
            llm__linear(w, c, &layer->qkv, &in, n, LLM__STORE, c->qkv, c->qkv_stride);
            if (n > 1) llm__rope_rows(w, c, i, true);
        }
        llm__attn_rows(w, c, i, rows, last ? c->last_queries : c->all_queries,
                       last ? c->n_last_queries : c->n_all_queries);
        bool packs = llm__fwd_in_panels(c, &layer->attention_out, n) && llm__attn_packs_heads(c);
        llm__fwd_meet_rows(w, c, &c->attention, n, m->whole.n_heads * head_dim, head_dim, packs);
        in = llm__fwd_prepare_rows(w, c, &layer->attention_out, &c->attention, n, llm__attn_packs_heads(c));
        llm__linear(w, c, &layer->attention_out, &in, n, LLM__ADD, x, c->x_stride);
        llm__fwd_meet_floats(w, c, c->x, n, c->x_stride, n_embd, LLM__EMBD_UNIT);
        in = llm__fwd_norm_rows(w, c, layer->ffn_norm, &layer->gate_up, n);
        llm__linear(w, c, &layer->gate_up, &in, n, LLM__SWIGLU, c->ffn.x + m->ff.first, c->ffn.stride);
        llm__fwd_meet_rows(w, c, &c->ffn, n, m->shape.n_ff, LLM__FF_UNIT, llm__fwd_in_panels(c, &layer->gate_up, n));
        in = llm__fwd_prepare_rows(w, c, &layer->down, &c->ffn, n, true);
        llm__fwd_poll_cancel(w, c, mode);
        llm__linear(w, c, &layer->down, &in, n, LLM__ADD, x, c->x_stride);
        llm__fwd_meet_floats(w, c, c->x, n, c->x_stride, n_embd, LLM__EMBD_UNIT);
    }
    if (!m->is_last_stage) {
        llm__fwd_send_rows(w, c, n);
    } else if (n && !c->cancelled) {
        int n_vocab = m->shape.n_vocab;
        float *logits = c->logits + (size_t)c->pass->first_logits * (size_t)n_vocab;
        llm__fwd_rows in = llm__fwd_norm_rows(w, c, m->output_norm, &m->head, n);
        if (c->pass->n_targets) {
            llm__fwd_score_rows(w, c, n);
        } else {
            llm__linear(w, c, &m->head, &in, n, LLM__STORE, logits + m->vocab.first, (size_t)n_vocab);
            llm__fwd_meet_floats(w, c, logits, n, (size_t)n_vocab, n_vocab, LLM__COLUMNS);
        }
    }
    llm__kernels_leave(m->kernels, mode);
}

/* Cuts a list of rows into runs of one sequence that fit LLM__QUERY_ROWS; returns how many. */
static int llm__fwd_group_queries(const llm__cpu_context *c, const int *rows, int n, llm__fwd_queries *queries) {
    int most = LLM__QUERY_ROWS / c->model->group, n_queries = 0;
    for (int i = 0; i < n; i++) {
        llm__fwd_queries *q = n_queries ? &queries[n_queries - 1] : NULL;
        if (q && q->n < most && c->pass->seqs[rows[i]] == c->pass->seqs[rows[q->first]]) {
            q->n++;
        } else {
            queries[n_queries].first = i;
            queries[n_queries++].n = 1;
        }
    }
    return n_queries;
}

/* All stages get the logits of a call, and hear whether it was cancelled on any of them. */
static void llm__fwd_share_logits(llm__cpu_context *c) {
    llm_comm *pipeline = c->desc.pipeline;
    const int32_t last = pipeline->size - 1;
    unsigned flags = c->cancelled;
    size_t n = (size_t)(c->pass->first_logits + c->pass->n_logits) * (size_t)c->model->whole.n_vocab * sizeof(float);
    const llm_exchange x = {c->logits, 1, n, n, n, pipeline->size, &last, 1};
    c->met = pipeline->exchange(pipeline, &x, &flags, c->err);
    c->cancelled = flags != 0;
}

static llm_status llm__cpu_forward(void *context, const llm_backend_pass *pass, llm_error *err) {
    llm__cpu_context *c = (llm__cpu_context *)context;
    llm_comm *pipeline = c->desc.pipeline;
    c->own_pass = *pass;
    c->pass = &c->own_pass;
    c->cancelled = c->stopped;
    c->wants_to_stop = false;
    c->left = false;
    c->met = LLM_OK;
    c->err = err;
    c->n_all_queries = llm__fwd_group_queries(c, c->all_rows, pass->n_rows, c->all_queries);
    c->n_last_queries = llm__fwd_group_queries(c, pass->logit_rows, pass->n_logits, c->last_queries);
    llm__team_run(c->team, llm__fwd_task, c);
    c->stopped = pipeline && c->cancelled && pass->more; /* all stages end the call together */
    if (pass->stopped) *pass->stopped = c->cancelled;
    else if (!c->met && pipeline && !pass->more) llm__fwd_share_logits(c);
    if (c->met) return c->met;
    if (c->stopped || pass->stopped) return LLM_OK;
    return c->cancelled ? llm__error(err, LLM_ERROR_CANCELLED, "the forward pass was cancelled") : LLM_OK;
}

/* Where a callback left a pass, the other members wait at the next barrier: they are let go. */
static void llm__cpu_end_pass(llm__team *team) {
    if (!team->running || team->task != llm__fwd_task) return;
    ((llm__cpu_context *)team->arg)->cancelled = true;
    ((llm__cpu_context *)team->arg)->left = true;
    llm__team_barrier(team);
    llm__team_wait(team);
}

static const float *llm__cpu_logits(void *context, int i) {
    llm__cpu_context *c = (llm__cpu_context *)context;
    return c->logits + (size_t)i * (size_t)c->model->shape.n_vocab;
}

/* ==== 18 The CPU context ========================================================================================

   The CPU backend's contexts: scratch space, blocks of the cache, and the limits that benchmarks compare with. */

/* The keys, or the values with their scales, of one head in one block: the larger of the two. */
static size_t llm__cache_head_bytes(const llm_backend_shape *s, llm_dtype cache_dtype) {
    llm__weight_type kind = llm__cache_weight_type(cache_dtype);
    size_t values = (size_t)llm__math_round_up(s->head_dim, 32) / 16 * llm__matrix_tile_bytes(kind, LLM_CACHE_BLOCK);
    return values + (kind == LLM__W_INT8 ? LLM_CACHE_BLOCK * sizeof(float) : 0);
}

static uint64_t llm__cpu_block_bytes(const llm_backend_shape *s, llm_dtype cache_dtype) {
    return (uint64_t)s->n_layers * 2 * (uint64_t)s->n_kv_heads * llm__cache_head_bytes(s, cache_dtype);
}

static llm_status llm__cpu_copy_block(void *context, int to, int from, llm_error *err) {
    llm__cpu_context *c = (llm__cpu_context *)context;
    (void)err;
    for (int plane = 0; plane < llm__cache_n_planes(c); plane++)
        memcpy(llm__cache_plane(c, plane, to), llm__cache_plane(c, plane, from), c->cache_block_bytes);
    return LLM_OK;
}

/* Where in a block as bytes, which has the planes of all ranks, a plane of this rank's is. */
static size_t llm__cache_plane_offset(const llm__cpu_context *c, int plane) {
    const llm__cpu_model *m = c->model;
    int n = 2 * m->shape.n_kv_heads, layer = plane / n, rest = plane % n;
    layer += m->layer_range.first;
    return (size_t)(2 * (layer * m->whole.n_kv_heads + m->key_heads.first) + rest) * c->cache_block_bytes;
}

static llm_status llm__cpu_read_block(void *context, int block, void *bytes, llm_error *err) {
    llm__cpu_context *c = (llm__cpu_context *)context;
    llm_comm *tensor = c->desc.tensor;
    unsigned flags = 0;
    for (int plane = 0; plane < llm__cache_n_planes(c); plane++)
        memcpy((uint8_t *)bytes + llm__cache_plane_offset(c, plane), llm__cache_plane(c, plane, block),
               c->cache_block_bytes);
    /* Of key heads that two ranks have, either may give them: each has those that are its own by their number alone. */
    int n = c->model->whole.n_kv_heads;
    size_t layer_bytes = (size_t)n * 2 * c->cache_block_bytes;
    const llm_exchange x = llm__fwd_shared_rows((uint8_t *)bytes + (size_t)c->model->layer_range.first * layer_bytes,
                                                c->model->shape.n_layers, (size_t)n, n, 1, 2 * c->cache_block_bytes);
    llm_status status = tensor ? tensor->exchange(tensor, &x, &flags, err) : LLM_OK;
    for (int i = 0; i < llm__ranks_count(c->desc.pipeline) && c->desc.pipeline && !status; i++) {
        const llm_backend_range layers = llm__ranks_layers_of(&c->model->whole, i, c->desc.pipeline->size);
        status = llm__comm_broadcast(c->desc.pipeline, i, (uint8_t *)bytes + (size_t)layers.first * layer_bytes,
                                     (size_t)layers.n * layer_bytes, err);
    }
    return status;
}

static llm_status llm__cpu_write_block(void *context, int block, const void *bytes, llm_error *err) {
    llm__cpu_context *c = (llm__cpu_context *)context;
    (void)err;
    for (int plane = 0; plane < llm__cache_n_planes(c); plane++)
        memcpy(llm__cache_plane(c, plane, block), (const uint8_t *)bytes + llm__cache_plane_offset(c, plane),
               c->cache_block_bytes);
    return LLM_OK;
}

typedef struct llm__cpu_sizes {
    size_t x_stride, qkv_stride, attention_stride, ffn_stride, scratch_floats, n_parts, partial_floats;
    size_t panel_floats, tile_bytes; /* of each thread, see llm__cpu_context; or 0 */
    size_t ffn_floats;               /* rows of c->ffn that are there as floats: those that do not go by panels */
    size_t n_lines;                  /* of each row, if there are weights in groups */
    size_t n_rows;                   /* of c->normed, and of lines: a batch, or a single row for each thread */
    int head_stride, n_partials, panel_rows;
    bool panels;
} llm__cpu_sizes;

/* Are activations rounded to bf16 before a product? */
static bool llm__cpu_rounds_rows(llm_dtype weights) { return weights != LLM_DTYPE_F32 && weights != LLM_DTYPE_F16; }

/* May weights be in groups? */
static bool llm__cpu_may_group(llm_dtype weights) { return weights == LLM_DTYPE_INT4 || weights == LLM_DTYPE_FILE; }

static llm__cpu_sizes llm__cpu_find_sizes(const llm_backend_shape *s, const llm_backend_desc *d,
                                          const llm__kernels *kernels) {
    llm__cpu_sizes z;
    int group = s->n_heads / s->n_kv_heads, most = group > LLM__QUERY_ROWS ? group : (int)LLM__QUERY_ROWS,
        chunks = (d->blocks_per_seq * LLM_CACHE_BLOCK + LLM__CHUNK - 1) / LLM__CHUNK;
    size_t rows = (size_t)llm__math_round_up(most, 16), n_batch = (size_t)llm__math_round_up(d->n_batch, 16);
    z.head_stride = llm__math_round_up(s->head_dim, 32);
    z.x_stride = (size_t)llm__math_round_up(s->n_embd, 32);
    z.qkv_stride = (size_t)llm__math_round_up((s->n_heads + 2 * s->n_kv_heads) * s->head_dim, 16);
    z.attention_stride = (size_t)llm__math_round_up(s->n_heads * s->head_dim, 32);
    z.ffn_stride = (size_t)llm__math_round_up(s->n_ff, 32);
    z.n_lines = (z.ffn_stride > z.attention_stride ? z.ffn_stride : z.attention_stride) / 32;
    if (z.x_stride / 32 > z.n_lines) z.n_lines = z.x_stride / 32;
    if (!llm__cpu_may_group(d->dtype)) z.n_lines = 0;
    z.scratch_floats = rows * (3 * (size_t)z.head_stride + LLM__SCORES + 4);
    size_t scored = (size_t)LLM__SCORED_ROWS * LLM__COLUMNS;
    if (z.scratch_floats < scored) z.scratch_floats = scored;
    z.n_parts = (size_t)(s->n_vocab + LLM__COLUMNS - 1) / LLM__COLUMNS;
    /* Splitting pays up to 4 pieces a thread (see llm__attn_count_chunks), and is for one sequence at its full length. */
    int few = LLM__SPLIT_ROWS * group < LLM__QUERY_ROWS ? LLM__SPLIT_ROWS * group : most;
    z.partial_floats = (size_t)llm__attn_padded_queries(few) * (size_t)(z.head_stride + 2);
    z.n_partials = d->n_threads > 1 && chunks > 1 ? chunks * s->n_kv_heads : 0;
    z.panels = kernels->panel && llm__cpu_rounds_rows(d->dtype);
    z.panel_rows = kernels->panel_rows;
    z.ffn_floats = (size_t)(z.panels && !z.n_lines && z.panel_rows <= d->n_batch ? z.panel_rows - 1 : d->n_batch);
    z.n_rows = (size_t)(d->n_batch > d->n_threads ? d->n_batch : d->n_threads);
    if (n_batch > LLM__PANEL_ROWS) n_batch = LLM__PANEL_ROWS;
    z.panel_floats = z.panels ? n_batch * LLM__PANEL_TILES * 16 : 0;
    /* Of what is never there at once the most: attention's rows, and parts of two tiles for a panel. */
    size_t attention = rows * ((size_t)z.head_stride + LLM__CHUNK) * 2, parts = 2 * LLM__TILE_BLOCKS * 1024;
    z.tile_bytes = !z.panels ? 0 : attention > parts ? attention : parts;
    return z;
}

static uint64_t llm__cpu_scratch_bytes(const llm_backend_shape *s, const llm_backend_desc *d) {
    llm__cpu_sizes z = llm__cpu_find_sizes(s, d, llm__kernels_choose(d->isa));
    uint64_t n_batch = (uint64_t)d->n_batch, n_threads = (uint64_t)d->n_threads,
             row = z.x_stride + z.qkv_stride + z.attention_stride + (uint64_t)s->rope_dim + 2 * z.n_parts + 5,
             packed =
                 (uint64_t)llm__math_round_up(d->n_batch, 16) * 2 * (z.x_stride + z.attention_stride + z.ffn_stride);
    return 4 * (n_batch * row + z.n_rows * z.x_stride + z.ffn_floats * z.ffn_stride +
                (uint64_t)d->n_logits * (uint64_t)s->n_vocab + n_threads * (z.scratch_floats + z.panel_floats) +
                (uint64_t)z.n_partials * z.partial_floats) +
           n_threads * z.tile_bytes + z.n_rows * z.n_lines * sizeof(llm__kernel_group) + (z.panels ? packed : 0);
}

/* Rows of activations, of which the first n_floats are there as floats, too. */
static llm__fwd_rows llm__fwd_rows_create(llm__env *env, size_t n, size_t n_floats, size_t stride,
                                          llm__kernel_group *lines, bool panels) {
    llm__fwd_rows rows;
    rows.stride = stride;
    rows.lines = lines;
    rows.x = (float *)llm__alloc_zero(env, n_floats * stride, sizeof(float));
    rows.packed = panels ? (uint8_t *)llm__alloc_zero(env, (n + 15) / 16 * 16 * stride, 2) : NULL;
    return rows;
}

typedef struct llm__cpu_context_args {
    void **out;
    const llm__cpu_model *model;
    const llm_backend_desc *desc;
} llm__cpu_context_args;

static void llm__cpu_context_body(llm__env *env, void *arg) {
    llm__cpu_context_args *args = (llm__cpu_context_args *)arg;
    llm__cpu_context *c = (llm__cpu_context *)llm__alloc_zero(env, 1, sizeof *c);
    const llm_backend_shape *s = &args->model->shape;
    const llm__cpu_context *lender = (const llm__cpu_context *)args->desc->lender;
    llm__cpu_sizes z = llm__cpu_find_sizes(&args->model->whole, args->desc, args->model->kernels);
    size_t n_batch = (size_t)args->desc->n_batch, half = (size_t)s->rope_dim / 2;
    c->model = args->model;
    c->desc = *args->desc;
    c->round = llm__cpu_rounds_rows(c->desc.dtype);
    c->round_cache = c->desc.cache_dtype != LLM_DTYPE_F32;
    c->cache_kind = llm__cache_weight_type(c->desc.cache_dtype);
    c->head_stride = z.head_stride;
    c->score_scale = (float)(1.4426950408889634 / llm__math_sqrt(s->head_dim));
    c->cache_block_bytes = llm__cache_head_bytes(s, c->desc.cache_dtype);
    size_t n_blocks = (size_t)c->desc.n_cache_blocks,
           block_bytes = (size_t)llm__cpu_block_bytes(s, c->desc.cache_dtype);
    c->cache = c->desc.share_cache ? lender->cache : (uint8_t *)llm__alloc(env, n_blocks, block_bytes);
    if (!c->desc.share_cache) llm__cpu_use_huge_pages(c->cache, n_blocks * block_bytes);
    c->x_stride = z.x_stride;
    c->qkv_stride = z.qkv_stride;
    c->scratch_floats = z.scratch_floats;
    size_t message = LLM__MESSAGE_HEAD + n_batch * z.x_stride;
    c->x = (float *)llm__alloc_zero(env, message, sizeof(float)) + LLM__MESSAGE_HEAD;
    for (int i = 0; i < 2 && !args->model->is_last_stage; i++)
        c->outgoing[i] = (float *)llm__alloc(env, message, sizeof(float));
    c->qkv = (float *)llm__alloc_zero(env, n_batch * z.qkv_stride, sizeof(float));
    llm__kernel_group *lines = (llm__kernel_group *)llm__alloc_zero(env, z.n_rows * z.n_lines, sizeof *lines);
    c->normed = llm__fwd_rows_create(env, n_batch, z.n_rows, z.x_stride, lines, z.panels);
    c->attention = llm__fwd_rows_create(env, n_batch, n_batch, z.attention_stride, lines, z.panels);
    c->ffn = llm__fwd_rows_create(env, n_batch, z.ffn_floats, z.ffn_stride, lines, z.panels);
    c->cosines = (float *)llm__alloc(env, n_batch * half, sizeof(float));
    c->sines = (float *)llm__alloc(env, n_batch * half, sizeof(float));
    c->scratch = (float *)llm__alloc(env, (size_t)c->desc.n_threads * z.scratch_floats, sizeof(float));
    c->partial_floats = z.partial_floats;
    c->n_partials = z.n_partials;
    c->partials = (float *)llm__alloc(env, (size_t)z.n_partials * z.partial_floats, sizeof(float));
    if (z.panels) {
        c->panels = (float *)llm__alloc(env, (size_t)c->desc.n_threads * z.panel_floats, sizeof(float));
        c->panel_floats = z.panel_floats;
        c->panel_rows = z.panel_rows;
    }
    c->tiles = (uint8_t *)llm__alloc(env, (size_t)c->desc.n_threads * z.tile_bytes, 1);
    c->tile_bytes = z.tile_bytes;
    c->logits = (float *)llm__alloc(env, (size_t)c->desc.n_logits * (size_t)s->n_vocab, sizeof(float));
    c->column_max = (float *)llm__alloc(env, n_batch * z.n_parts, sizeof(float));
    c->column_sum = (float *)llm__alloc(env, n_batch * z.n_parts, sizeof(float));
    c->all_rows = (int *)llm__alloc(env, n_batch, sizeof(int));
    c->all_queries = (llm__fwd_queries *)llm__alloc(env, n_batch, sizeof(llm__fwd_queries));
    c->last_queries = (llm__fwd_queries *)llm__alloc(env, n_batch, sizeof(llm__fwd_queries));
    for (int i = 0; i < c->desc.n_batch; i++) c->all_rows[i] = i;
    c->team = lender ? lender->team : llm__team_create(env, c->desc.n_threads, c->desc.parallel, c->desc.host.user);
    c->pool = *env->pool;
    *args->out = c;
}

static llm_status llm__cpu_context_create(void **out, void *model, const llm_backend_desc *desc, llm_error *err) {
    llm__pool pool;
    llm__env env;
    llm__cpu_context_args args = {out, (const llm__cpu_model *)model, desc};
    *out = NULL;
    llm__pool_init(&pool, &desc->host);
    llm__env_init(&env, &pool, err, NULL);
    llm_status status = llm__env_run(&env, llm__cpu_context_body, &args);
    if (status) llm__pool_free(&pool);
    return status;
}

static void llm__cpu_context_free(void *context) {
    if (!context) return;
    llm__cpu_end_pass(((llm__cpu_context *)context)->team);
    llm__pool pool = ((llm__cpu_context *)context)->pool;
    llm__pool_free(&pool);
}

/* ---- The limit of decoding ---- */

typedef struct llm__cpu_bandwidth_args {
    llm__cpu_context *context;
    uint32_t sink;
} llm__cpu_bandwidth_args;

static void llm__cpu_bandwidth_matrix(llm__team_worker *w, llm__cpu_bandwidth_args *a, const llm__matrix *m) {
    int n_tiles = llm__math_round_up(m->n, 16) / 16, n = (n_tiles + LLM__TILES - 1) / LLM__TILES;
    for (int i; (i = llm__team_take(w, n)) >= 0;) {
        int first = i * LLM__TILES, some = n_tiles - first < LLM__TILES ? n_tiles - first : LLM__TILES;
        const uint8_t *from = llm__matrix_tiles(m, first, 1).at, *end = llm__matrix_tiles(m, first + some, 0).at;
        uint32_t got = a->context->model->kernels->read(from, (size_t)(end - from));
        __atomic_fetch_xor(&a->sink, got, __ATOMIC_RELAXED);
    }
    llm__team_finish(w);
}

static void llm__cpu_bandwidth_task(void *arg, int index) {
    llm__cpu_bandwidth_args *a = (llm__cpu_bandwidth_args *)arg;
    const llm__cpu_model *m = a->context->model;
    llm__team_worker worker = {a->context->team, index, 0, 0}, *w = &worker;
    for (int i = 0; i < m->shape.n_layers; i++) {
        llm__cpu_bandwidth_matrix(w, a, &m->layers[i].qkv);
        llm__cpu_bandwidth_matrix(w, a, &m->layers[i].attention_out);
        llm__cpu_bandwidth_matrix(w, a, &m->layers[i].gate_up);
        llm__cpu_bandwidth_matrix(w, a, &m->layers[i].down);
    }
    llm__cpu_bandwidth_matrix(w, a, &m->head);
}

/* The best of several passes over the weights, the first of which warms the caches. */
static double llm__cpu_measure_bandwidth(void *context) {
    llm__cpu_bandwidth_args args = {(llm__cpu_context *)context, 0};
    const llm__cpu_model *m = args.context->model;
    double bytes = (double)llm__matrix_bytes(&m->head), best = 0, start = llm__clock_now();
    for (int i = 0; i < m->shape.n_layers; i++) {
        const llm__matrix *all[4] = {&m->layers[i].qkv, &m->layers[i].attention_out, &m->layers[i].gate_up,
                                     &m->layers[i].down};
        for (int j = 0; j < 4; j++) bytes += (double)llm__matrix_bytes(all[j]);
    }
    for (int i = 0; i < 10 && (i < 3 || llm__clock_now() - start < 0.5); i++) {
        double before = llm__clock_now();
        llm__team_run(args.context->team, llm__cpu_bandwidth_task, &args);
        double rate = bytes / (llm__clock_now() - before);
        if (rate > best) best = rate;
    }
    return best;
}

enum { LLM__MULTIPLY_ROUNDS = 2000000 };

typedef struct llm__cpu_multiply_args {
    uint32_t (*multiply)(size_t n);
    uint32_t sink;
} llm__cpu_multiply_args;

static void llm__cpu_multiply_task(void *arg, int index) {
    llm__cpu_multiply_args *a = (llm__cpu_multiply_args *)arg;
    (void)index;
    __atomic_fetch_xor(&a->sink, a->multiply(LLM__MULTIPLY_ROUNDS), __ATOMIC_RELAXED);
}

/* In the way that the model's weights are multiplied. */
static double llm__cpu_measure_flops(void *context) {
    const llm__cpu_context *c = (const llm__cpu_context *)context;
    const llm__kernels *k = c->model->kernels;
    bool floats = c->model->dtype == LLM_DTYPE_F32 || c->model->dtype == LLM_DTYPE_F16;
    llm__cpu_multiply_args args = {k->multiply, 0};
    double best = 0, round = 2.0 * 16 * 12;
    if (c->model->head.groups) {
        args.multiply = k->multiply_bytes;
        round *= 4;
    } else if (k->tile_multiply && !floats) {
        args.multiply = k->tile_multiply;
        round = 2.0 * 16 * 4 * 16 * 32;
    } else if (k->multiply_pairs && !floats) {
        args.multiply = k->multiply_pairs;
        round *= 2;
    }
    for (int i = 0; i < 4; i++) {
        double before = llm__clock_now();
        llm__team_run(c->team, llm__cpu_multiply_task, &args);
        double rate = round * (double)LLM__MULTIPLY_ROUNDS * c->team->n / (llm__clock_now() - before);
        if (rate > best) best = rate;
    }
    return best;
}

static const llm_backend llm__cpu_backend = {
    "cpu",
    llm__cpu_open,
    llm__cpu_upload,
    llm__cpu_close,
    llm__cpu_weight_bytes,
    llm__cpu_block_bytes,
    llm__cpu_scratch_bytes,
    llm__cpu_context_create,
    llm__cpu_context_free,
    llm__cpu_forward,
    llm__cpu_logits,
    llm__cpu_copy_block,
    llm__cpu_read_block,
    llm__cpu_write_block,
    llm__cpu_measure_bandwidth,
    llm__cpu_measure_flops,
    NULL,
};

/* ==== 19 Models =================================================================================================

   Loading a model: from a checkpoint and its hyperparameters to weights on a backend. */

typedef struct llm__meta_entry {
    const char *key, *value;
} llm__meta_entry;

struct llm_model {
    llm__pool pool;
    const llm_backend *backend;
    void *device; /* the backend's model */
    llm_model_desc desc;
    llm_backend_shape shape;
    llm_model_info info;
    uint64_t source; /* fingerprint of the weights, the same for every type they are held in */
    llm_tokenizer *tokenizer;
    const llm__kernels *kernels; /* for what the host computes with any backend */
    llm__meta_entry *meta;       /* [n_meta] */
    size_t n_meta, meta_room;
};

typedef struct llm__model_load_args {
    llm_model **out;
    const llm__file_source *source;
    llm_model_desc desc;
    const llm_backend *backend;
    void *device; /* closed if loading fails after it was opened */
} llm__model_load_args;

/* The pair of dimensions (as a real number) that makes this many turns within the original context length. */
static double llm__rope_yarn_pair(const llm__hparams *h, double turns) {
    return h->rope_dim * llm__math_log2(h->rope.n_original / (turns * 6.2831853071795865)) /
           (2 * llm__math_log2(h->rope.base));
}

/* Which share of its frequency pair i keeps. 1: all of it; 0: it is divided by the factor. */
static double llm__rope_kept(const llm__hparams *h, int i, double frequency) {
    const llm__hparams_rope *r = &h->rope;
    double turns = r->n_original * frequency / 6.2831853071795865, kept;
    if (r->kind == LLM__ROPE_LLAMA3) {
        kept = (turns - r->few_turns) / (r->many_turns - r->few_turns);
    } else {
        double first = llm__rope_yarn_pair(h, r->many_turns), last = llm__rope_yarn_pair(h, r->few_turns);
        if (r->whole_pairs) {
            first = floor(first);
            last = ceil(last);
        }
        if (first < 0) first = 0;
        if (last > h->rope_dim - 1) last = h->rope_dim - 1;
        kept = 1 - (i - first) / (last == first ? 0.001 : last - first);
    }
    return kept < 0 ? 0 : kept > 1 ? 1 : kept;
}

/* The angle in radians by which pair i turns from one position to the next: base^(-2i / rope_dim), scaled. */
static double llm__rope_frequency(const llm__hparams *h, int i) {
    double f = llm__math_exp2(-2.0 * i / h->rope_dim * llm__math_log2(h->rope.base));
    if (h->rope.kind == LLM__ROPE_PLAIN) return f;
    double kept = h->rope.kind == LLM__ROPE_LINEAR ? 0 : llm__rope_kept(h, i, f);
    return f * kept + f / h->rope.factor * (1 - kept);
}

/* GGUF stores the effect of llama3's scaling as a tensor of divisors. */
static double *llm__rope_frequencies(llm__env *env, const llm__hparams *h, const llm__checkpoint *ck) {
    int half = h->rope_dim / 2;
    double *frequencies = (double *)llm__alloc(env, (size_t)half + 1, sizeof *frequencies);
    for (int i = 0; i < half; i++) frequencies[i] = llm__rope_frequency(h, i);
    if (ck->format != LLM__GGUF || !llm__tensor_find(ck, "rope_freqs.weight")) return frequencies;
    llm__tensor t = llm__tensor_get(env, ck, "rope_freqs.weight", 1, (uint64_t)half);
    uint8_t *bytes = llm__tensor_bytes(env, &t);
    float *divisors = (float *)llm__alloc(env, (size_t)half, sizeof *divisors);
    t.type->decode(t.data, (size_t)half, divisors);
    for (int i = 0; i < half; i++) {
        if (!(divisors[i] > 0 && divisors[i] < 1e6f))
            llm__fail(env, LLM_ERROR_FORMAT, "tensor rope_freqs.weight divides frequency %d by %g", i,
                      (double)divisors[i]);
        frequencies[i] /= divisors[i];
    }
    llm__free(env->pool, divisors);
    llm__free(env->pool, bytes);
    return frequencies;
}

static float llm__rope_scale(const llm__hparams_rope *r) {
    if (r->scale != 0) return (float)r->scale;
    if (r->kind != LLM__ROPE_YARN || r->factor <= 1) return 1;
    double grown = 0.1 * 0.69314718055994531 * llm__math_log2(r->factor);
    return (float)((1 + r->growth * grown) / (1 + r->growth_below * grown));
}

static llm_backend_shape llm__model_find_shape(llm__env *env, const llm__hparams *h, const llm__checkpoint *ck) {
    llm_backend_shape s;
    s.n_vocab = h->n_vocab;
    s.n_layers = h->n_layers;
    s.n_embd = h->n_embd;
    s.n_ff = h->n_ff;
    s.n_heads = h->n_heads;
    s.n_kv_heads = h->n_kv_heads;
    s.head_dim = h->head_dim;
    s.rope_dim = h->rope_dim;
    s.rms_eps = h->rms_eps;
    s.rope_frequencies = llm__rope_frequencies(env, h, ck);
    s.rope_scale = llm__rope_scale(&h->rope);
    s.window = h->window;
    s.tied_head = h->tied_head;
    s.qkv_bias = h->qkv_bias;
    s.qk_norm = h->qk_norm;
    return s;
}

/* Names of the tensors that make up a weight, in GGUF and in Hugging Face files. The names of a layer's tensors have a
   prefix. */
static const char *const llm__model_tensor_names[][2][3] = {
    {{"token_embd.weight", NULL, NULL}, {"model.embed_tokens.weight", NULL, NULL}},
    {{"attn_norm.weight", NULL, NULL}, {"input_layernorm.weight", NULL, NULL}},
    {{"attn_q.weight", "attn_k.weight", "attn_v.weight"},
     {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"}},
    {{"attn_q.bias", "attn_k.bias", "attn_v.bias"},
     {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"}},
    {{"attn_q_norm.weight", NULL, NULL}, {"self_attn.q_norm.weight", NULL, NULL}},
    {{"attn_k_norm.weight", NULL, NULL}, {"self_attn.k_norm.weight", NULL, NULL}},
    {{"attn_output.weight", NULL, NULL}, {"self_attn.o_proj.weight", NULL, NULL}},
    {{"ffn_norm.weight", NULL, NULL}, {"post_attention_layernorm.weight", NULL, NULL}},
    {{"ffn_gate.weight", "ffn_up.weight", NULL}, {"mlp.gate_proj.weight", "mlp.up_proj.weight", NULL}},
    {{"ffn_down.weight", NULL, NULL}, {"mlp.down_proj.weight", NULL, NULL}},
    {{"output_norm.weight", NULL, NULL}, {"model.norm.weight", NULL, NULL}},
    {{"output.weight", NULL, NULL}, {"lm_head.weight", NULL, NULL}},
};

/* Number of rows of each tensor that makes up a weight; 0 where there are fewer than three. */
static void llm__model_part_rows(const llm__hparams *h, llm_backend_weight_kind kind, int rows[3]) {
    int q = h->n_heads * h->head_dim, kv = h->n_kv_heads * h->head_dim;
    rows[0] = 1; /* a norm is one row */
    rows[1] = rows[2] = 0;
    switch (kind) {
    case LLM_WEIGHT_EMBEDDING:
    case LLM_WEIGHT_HEAD: rows[0] = h->n_vocab; break;
    case LLM_WEIGHT_QKV:
    case LLM_WEIGHT_QKV_BIAS:
        rows[0] = q;
        rows[1] = rows[2] = kv;
        break;
    case LLM_WEIGHT_GATE_UP: rows[0] = rows[1] = h->n_ff; break;
    case LLM_WEIGHT_ATTENTION_OUT:
    case LLM_WEIGHT_DOWN: rows[0] = h->n_embd; break;
    default: break;
    }
}

/* A bias is a row in the file. Here it is a column, with one number for each row of its matrix. */
static llm__tensor llm__model_get_column(llm__env *env, const llm__checkpoint *ck, const char *name, uint64_t rows) {
    llm__tensor t = llm__tensor_get(env, ck, name, 1, rows);
    if (t.type->block_weights != 1 || t.scales)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "tensor %s is of type %s; no bias is read from that", name, t.type->name);
    t.rows = rows;
    t.cols = 1;
    t.row_bytes = t.type->block_bytes;
    return t;
}

/* Calls visit for every weight of the model, in order of use. */
typedef struct llm__model_walk {
    llm__env *env;
    const llm__checkpoint *ck;
    const llm__hparams *h;
    void (*visit)(struct llm__model_walk *walk, const llm_backend_weight *weight);
    const llm_backend *backend;
    void *device;
    llm_dtype dtype;
    const llm_backend_shape *shape;
    const llm_comm *tensor, *pipeline; /* the ranks that share each weight, and those that have others, or NULL */
    uint64_t n_params, weight_bytes, weight_bytes_per_token;
    uint64_t fingerprint; /* the same for every dtype */
    struct {
        const char *name;
        uint64_t n_params;
    } held[LLM__N_TYPES]; /* matrices' parameters by the name of what holds them, up to the first NULL */
} llm__model_walk;

/* Describes a weight that consists of up to three tensors of the file, of whose rows a rank may have only some. */
static llm_backend_weight llm__model_make_weight(const llm__model_walk *walk, llm__weight_source *source,
                                                 llm_backend_weight_kind kind, int layer, int cols) {
    llm__env *env = walk->env;
    const llm__checkpoint *ck = walk->ck;
    const llm__hparams *h = walk->h;
    bool in_layer = kind != LLM_WEIGHT_EMBEDDING && kind != LLM_WEIGHT_OUTPUT_NORM && kind != LLM_WEIGHT_HEAD;
    bool rotated = kind == LLM_WEIGHT_QKV || kind == LLM_WEIGHT_QKV_BIAS;
    int rows[3];
    llm_backend_weight w;
    memset(&w, 0, sizeof w);
    w.kind = kind;
    w.layer = layer;
    w.cols = cols;
    w.source = source;
    w.read_row = llm__weight_read_row;
    w.raw_row = llm__weight_raw_row;
    w.row_scale = llm__weight_row_scale;
    memset(source, 0, sizeof *source);
    source->rope_dim = h->rope_dim;
    llm__model_part_rows(h, kind, rows);
    for (int i = 0; i < 3 && rows[i]; i++) {
        char name[80];
        uint64_t n = (uint64_t)rows[i];
        const char *prefix = ck->format == LLM__GGUF ? "blk" : "model.layers";
        const char *last = llm__model_tensor_names[kind][ck->format][i];
        if (in_layer) snprintf(name, sizeof name, "%s.%d.%s", prefix, layer, last);
        else snprintf(name, sizeof name, "%s", last);
        source->parts[i] = kind == LLM_WEIGHT_QKV_BIAS ? llm__model_get_column(env, ck, name, n)
                                                       : llm__tensor_get(env, ck, name, n, (uint64_t)cols);
        if (rotated && i < 2 && h->interleaved_rope) source->n_interleaved[i] = h->head_dim;
        const llm_backend_range share = llm__ranks_rows(walk->tensor, walk->shape, kind, i, rows[i]);
        source->first[i] = share.first;
        source->n[i] = share.n;
        source->n_parts++;
        w.rows += share.n;
        w.part_rows[w.n_parts] = share.n;
        w.part_types[w.n_parts++] = (int)source->parts[i].type->type;
        w.has_q8_0 = w.has_q8_0 || source->parts[i].type->type == LLM__Q8_0;
    }
    for (int i = 1; i < w.n_parts && kind == LLM_WEIGHT_QKV; i++)
        if (llm__ranks_count(walk->tensor) > 1 && h->head_dim % 16 &&
            llm__weight_type_for(walk->dtype, w.part_types[i]) != llm__weight_type_for(walk->dtype, w.part_types[0]))
            llm__fail(env, LLM_ERROR_UNSUPPORTED,
                      "the queries, keys and values of layer %d are of different types, and heads of %d numbers do not "
                      "fill tiles of 16: ranks cannot share them. Load the model as bf16 or int8, or in a pipeline",
                      layer, h->head_dim);
    return w;
}

static int llm__model_weight_cols(const llm__hparams *h, llm_backend_weight_kind kind) {
    if (kind == LLM_WEIGHT_ATTENTION_OUT) return h->n_heads * h->head_dim;
    if (kind == LLM_WEIGHT_QKV_BIAS) return 1;
    if (kind == LLM_WEIGHT_Q_NORM || kind == LLM_WEIGHT_K_NORM) return h->head_dim;
    return kind == LLM_WEIGHT_DOWN ? h->n_ff : h->n_embd;
}

/* What holds part i of a matrix: the file's type where it keeps its numbers, else the type it was made. */
static const char *llm__model_held_name(const llm__model_walk *walk, const llm_backend_weight *weight, int i) {
    static const char *const names[LLM__W_Q4] = {"f32", "bf16", "int8", "f16"};
    if (walk->backend != &llm__cpu_backend) return llm_dtype_name(walk->dtype);
    llm__matrix m = llm__matrix_describe(walk->dtype, weight);
    llm__weight_type kind = m.n_kinds ? m.kinds[i] : m.kind;
    if (!llm__matrix_has_groups(kind)) return names[kind];
    return llm__kernel_kind_of_file(weight->part_types[i]) == kind
               ? llm__file_type_find((uint32_t)weight->part_types[i])->name
               : "int4";
}

static void llm__model_count_held(llm__model_walk *walk, const llm_backend_weight *weight) {
    const llm__weight_source *source = (const llm__weight_source *)weight->source; /* with the rows of all ranks */
    for (int i = 0; i < weight->n_parts; i++) {
        const char *name = llm__model_held_name(walk, weight, i);
        size_t at = 0;
        while (walk->held[at].name && strcmp(walk->held[at].name, name)) at++;
        walk->held[at].name = name;
        walk->held[at].n_params += source->parts[i].rows * (uint64_t)weight->cols;
    }
}

/* "Q4_K 71 %, Q6_K 29 %", the largest share first; the name alone if there is one. */
static void llm__model_describe_held(const llm__model_walk *walk, char *text, size_t size) {
    uint64_t total = 0, left[LLM__N_TYPES]; /* parameters; 0 once a type is named */
    size_t n_types = 0;
    for (; n_types < LLM__N_TYPES && walk->held[n_types].name; n_types++)
        total += left[n_types] = walk->held[n_types].n_params;
    text[0] = 0;
    for (size_t n = 0; n < size;) {
        size_t next = 0;
        for (size_t i = 1; i < n_types; i++)
            if (left[i] > left[next]) next = i;
        if (!n_types || !left[next]) return;
        const uint64_t most = left[next];
        left[next] = 0;
        int written = most == total ? snprintf(text, size, "%s", walk->held[next].name)
                                    : snprintf(text + n, size - n, "%s%s %.3g %%", n ? ", " : "", walk->held[next].name,
                                               100.0 * (double)most / (double)total);
        n += (size_t)written;
    }
}

/* The fingerprint uses samples, because hashing everything would mean reading it. */
static uint64_t llm__model_sample_tensor(uint64_t hash, const llm__tensor *t) {
    uint64_t n = t->rows * t->row_bytes, step = n / 16;
    for (uint64_t at = 0; at < n; at += step ? step : 1)
        hash = llm__hash_fnv(hash, t->data + at, (size_t)(n - at < 64 ? n - at : 64));
    return hash;
}

/* Does this stage of the pipeline have a weight? */
static bool llm__model_has_weight(const llm__model_walk *walk, llm_backend_weight_kind kind, int layer) {
    const llm_backend_range layers = llm__ranks_own_layers(walk->shape, walk->pipeline);
    bool last = llm__ranks_is_last_stage(walk->pipeline);
    if (kind == LLM_WEIGHT_EMBEDDING) return llm__ranks_is_first_stage(walk->pipeline) || (last && walk->h->tied_head);
    if (kind == LLM_WEIGHT_OUTPUT_NORM || kind == LLM_WEIGHT_HEAD) return last;
    return layers.first <= layer && layer < layers.first + layers.n;
}

static void llm__model_walk_weight(llm__model_walk *walk, llm_backend_weight_kind kind, int layer) {
    llm__env *env = walk->env;
    llm__weight_source source;
    llm_backend_weight w = llm__model_make_weight(walk, &source, kind, layer, llm__model_weight_cols(walk->h, kind));
    uint8_t *brought[3] = {NULL, NULL, NULL};
    size_t n_read = 0;
    uint64_t rows = 0; /* of all ranks together */
    for (int i = 0; i < source.n_parts; i++) rows += source.parts[i].rows;
    bool vector = rows == 1 || w.cols == 1;
    uint64_t bytes = vector ? (uint64_t)w.rows * (uint64_t)w.cols * 4 : walk->backend->weight_bytes(walk->dtype, &w);
    bool own = llm__model_has_weight(walk, kind, layer),
         tied = walk->h->tied_head && llm__ranks_is_last_stage(walk->pipeline);
    walk->n_params += rows * (uint64_t)w.cols;
    if (!vector) llm__model_count_held(walk, &w);
    if (own) walk->weight_bytes += bytes;
    if (own && (kind != LLM_WEIGHT_EMBEDDING || tied)) walk->weight_bytes_per_token += bytes;
    if (!walk->visit) return;
    if (own && w.layer) w.layer -= llm__ranks_own_layers(walk->shape, walk->pipeline).first;
    for (int i = 0; i < source.n_parts; i++) {
        brought[i] = llm__tensor_bytes(env, &source.parts[i]);
        llm__file_advise(source.parts[i].file, source.parts[i].data, source.parts[i].rows * source.parts[i].row_bytes,
                         false);
        walk->fingerprint = llm__model_sample_tensor(walk->fingerprint, &source.parts[i]);
    }
    source.n_read = &n_read;
    if (own) walk->visit(walk, &w);
    for (int i = 0; i < source.n_parts; i++) {
        if (!brought[i])
            llm__file_advise(source.parts[i].file, source.parts[i].data,
                             source.parts[i].rows * source.parts[i].row_bytes, true);
        llm__free(env->pool, brought[i]);
    }
}

static void llm__model_walk_weights(llm__model_walk *walk) {
    const llm__hparams *h = walk->h;
    llm__model_walk_weight(walk, LLM_WEIGHT_EMBEDDING, 0);
    for (int i = 0; i < h->n_layers; i++) {
        for (int kind = LLM_WEIGHT_ATTENTION_NORM; kind <= LLM_WEIGHT_DOWN; kind++) {
            if (kind == LLM_WEIGHT_QKV_BIAS && !h->qkv_bias) continue;
            if ((kind == LLM_WEIGHT_Q_NORM || kind == LLM_WEIGHT_K_NORM) && !h->qk_norm) continue;
            llm__model_walk_weight(walk, (llm_backend_weight_kind)kind, i);
        }
    }
    llm__model_walk_weight(walk, LLM_WEIGHT_OUTPUT_NORM, 0);
    if (!h->tied_head) llm__model_walk_weight(walk, LLM_WEIGHT_HEAD, 0);
}

static void llm__model_upload_weight(llm__model_walk *walk, const llm_backend_weight *weight) {
    llm__env *env = walk->env;
    llm_status status = walk->backend->upload(walk->device, weight, env->err);
    if (status) {
        env->status = status;
        longjmp(env->unwind, 1);
    }
    bool behind_layers = weight->kind == LLM_WEIGHT_OUTPUT_NORM || weight->kind == LLM_WEIGHT_HEAD;
    llm__env_progress(env, (float)(behind_layers ? walk->h->n_layers : weight->layer) / (float)(walk->h->n_layers + 1));
}

/* Only the CPU has f32 caches. */
static llm_dtype llm__model_cache_dtype(const llm_backend *backend, llm_dtype weights) {
    bool exact = backend == &llm__cpu_backend && (weights == LLM_DTYPE_F32 || weights == LLM_DTYPE_F16);
    return exact ? LLM_DTYPE_F32 : LLM_DTYPE_BF16;
}

static llm_model_desc llm__model_defaults(llm__env *env, const llm_model_desc *desc) {
    llm_model_desc d = *desc;
    if (!d.backend) d.backend = &llm__cpu_backend;
    if (d.dtype == LLM_DTYPE_DEFAULT) d.dtype = d.backend == &llm__cpu_backend ? LLM_DTYPE_FILE : LLM_DTYPE_BF16;
    if (!llm__kernels_choose(d.isa))
        llm__fail(env, LLM_ERROR_ARGUMENT, "the instruction set \"%s\" is unknown, or not on this machine", d.isa);
    if (!llm_dtype_name(d.dtype))
        llm__fail(env, LLM_ERROR_ARGUMENT, "desc.dtype is %d, which is no type to run in", (int)d.dtype);
    if (d.n_threads < 0 || d.n_threads > 1024) llm__fail(env, LLM_ERROR_ARGUMENT, "desc.n_threads is %d", d.n_threads);
    if (d.n_threads == 0) d.n_threads = llm__team_default_threads();
    return d;
}

static void llm__model_copy_name(char *to, size_t size, llm__str from) {
    size_t n = from.n < size - 1 ? from.n : size - 1;
    memcpy(to, from.at, n);
    to[n] = 0;
    llm__utf8_trim(to);
}

/* Everything but the fingerprint. */
static llm_model_info llm__model_info(const llm__hparams *h, const llm__model_walk *walk,
                                      const llm_backend_shape *shape, const llm_model_desc *desc) {
    llm_model_info made, *info = &made;
    memset(info, 0, sizeof *info);
    llm__model_copy_name(info->name, sizeof info->name, h->name);
    llm__model_copy_name(info->architecture, sizeof info->architecture, h->architecture);
    info->dtype = walk->dtype;
    info->backend = walk->backend;
    info->n_vocab = h->n_vocab;
    info->n_layers = h->n_layers;
    info->n_embd = h->n_embd;
    info->n_ff = h->n_ff;
    info->n_heads = h->n_heads;
    info->n_kv_heads = h->n_kv_heads;
    info->head_dim = h->head_dim;
    info->rope_dim = h->rope_dim;
    info->n_ctx_train = h->n_ctx_train;
    info->n_params = walk->n_params;
    info->weight_bytes = walk->weight_bytes;
    info->weight_bytes_per_token = walk->weight_bytes_per_token;
    llm__model_describe_held(walk, info->held, sizeof info->held);
    info->isa = llm__kernels_choose(desc->isa)->name;
    const llm_backend_shape own = llm_backend_find_ranks(shape, desc->tensor, desc->pipeline).shape;
    info->n_own_layers = own.n_layers;
    info->n_own_kv_heads = own.n_kv_heads;
    info->cache_bytes_per_token =
        desc->backend->block_bytes(&own, llm__model_cache_dtype(desc->backend, desc->dtype)) / LLM_CACHE_BLOCK;
    return made;
}

static llm__model_walk llm__model_start_walk(llm__env *env, const llm__checkpoint *ck, const llm__hparams *h,
                                             const llm_backend_shape *shape, const llm_model_desc *desc) {
    llm__model_walk walk;
    memset(&walk, 0, sizeof walk);
    walk.env = env;
    walk.ck = ck;
    walk.h = h;
    walk.shape = shape;
    walk.backend = desc->backend;
    walk.dtype = desc->dtype;
    walk.tensor = desc->tensor;
    walk.pipeline = desc->pipeline;
    return walk;
}

/* Hashes what cached keys depend on, apart from the weights. */
static uint64_t llm__model_hash_shape(const llm_backend_shape *s) {
    int numbers[] = {s->n_vocab,    s->n_layers, s->n_embd,   s->n_ff,  s->n_heads,
                     s->n_kv_heads, s->head_dim, s->rope_dim, s->window};
    float floats[] = {s->rms_eps, s->rope_scale};
    uint64_t hash = llm__hash_fnv(0xCBF29CE484222325u, numbers, sizeof numbers);
    hash = llm__hash_fnv(hash, floats, sizeof floats);
    return llm__hash_fnv(hash, s->rope_frequencies, (size_t)(s->rope_dim / 2) * sizeof *s->rope_frequencies);
}

/* ---- Metadata as text ---- */

enum {
    LLM__META_MAX_KEY = 200
}; /* longer paths of keys are dropped, so that a small file cannot expand into a huge one */

static void llm__meta_add(llm__env *env, llm_model *model, llm__str key, llm__str value) {
    model->meta =
        (llm__meta_entry *)llm__alloc_grow(env, model->meta, model->n_meta, &model->meta_room, sizeof *model->meta);
    char *k = llm__str_copy(env, key.at, key.n), *v = llm__str_copy(env, value.at, value.n);
    llm__utf8_trim(k);
    llm__utf8_trim(v);
    model->meta[model->n_meta].key = k;
    model->meta[model->n_meta++].value = v;
}

/* Prints a floating-point number with the fewest digits that restore it, and with a point in every locale. */
static void llm__meta_print_float(char *to, size_t size, double number, bool single) {
    for (int digits = 6; digits <= 17; digits++) {
        snprintf(to, size, "%.*g", digits, number);
        for (char *p = to; *p; p++)
            if (*p == ',') *p = '.';
        llm__str text = {to, strlen(to)};
        double back = llm__json_value(text);
        if (single ? (float)back == (float)number : back == number) return;
    }
}

static void llm__meta_add_gguf(llm__env *env, llm_model *model, const llm__gguf_value *v) {
    char number[40];
    llm__str text = {number, 0};
    if (v->type == LLM__GGUF_STRING) {
        text.at = (const char *)v->data + 8;
        text.n = (size_t)llm__bytes_u64(v->data);
    } else {
        double d = llm__gguf_value_number(v, 0);
        if (v->type == LLM__GGUF_BOOL) snprintf(number, sizeof number, "%s", d != 0 ? "true" : "false");
        else if (v->type == LLM__GGUF_F32 || v->type == LLM__GGUF_F64)
            llm__meta_print_float(number, sizeof number, d, v->type == LLM__GGUF_F32);
        else if (v->type == LLM__GGUF_U64)
            snprintf(number, sizeof number, "%llu", (unsigned long long)llm__bytes_u64(v->data));
        else if (v->type == LLM__GGUF_I64) snprintf(number, sizeof number, "%lld", (long long)llm__bytes_u64(v->data));
        else snprintf(number, sizeof number, "%.0f", d);
        text.n = strlen(number);
    }
    llm__meta_add(env, model, v->key, text);
}

/* Adds the members of an object and of the objects inside it. Their keys follow `prefix`. */
static void llm__meta_add_json(llm__env *env, llm_model *model, llm__str prefix, const llm__json *object) {
    static const llm__str yes = {"true", 4}, no = {"false", 5}, null = {"null", 4};
    for (const llm__json *v = object->first; v; v = v->next) {
        char path[LLM__META_MAX_KEY];
        llm__str key = {path, prefix.n + (prefix.n != 0) + v->key.n};
        if (v->type == LLM__JSON_ARRAY || key.n > sizeof path) continue;
        if (prefix.n) memcpy(path, prefix.at, prefix.n);
        if (prefix.n) path[prefix.n] = '.';
        if (v->key.n) memcpy(path + key.n - v->key.n, v->key.at, v->key.n);
        if (v->type == LLM__JSON_OBJECT) llm__meta_add_json(env, model, key, v);
        else if (v->type == LLM__JSON_STRING || v->type == LLM__JSON_NUMBER) llm__meta_add(env, model, key, v->string);
        else llm__meta_add(env, model, key, v->type == LLM__JSON_TRUE ? yes : v->type == LLM__JSON_FALSE ? no : null);
    }
}

static void llm__meta_read(llm__env *env, llm_model *model, const llm__checkpoint *ck) {
    llm__str none = {"", 0};
    for (size_t i = 0; i < ck->n_values; i++)
        if (!ck->values[i].is_array && ck->values[i].key.n <= LLM__META_MAX_KEY)
            llm__meta_add_gguf(env, model, &ck->values[i]);
    if (ck->config) llm__meta_add_json(env, model, none, ck->config);
}

/* ---- Loading ---- */

/* A model found in files. All its weights exist and have the right shapes, and no tensor is left over. */
typedef struct llm__model_plan {
    llm__pool *pool; /* holds the files and everything that points into them */
    const llm__checkpoint *ck;
    llm__hparams h;
    llm_backend_shape shape;
    llm_dtype dtype;      /* as asked for, but LLM_DTYPE_FILE only if that is not bf16 throughout */
    llm__model_walk walk; /* totals of the weights */
} llm__model_plan;

static llm_dtype llm__model_plan_dtype(const llm__checkpoint *ck, llm_dtype dtype) {
    for (size_t i = 0; i < ck->n_tensors && dtype == LLM_DTYPE_FILE; i++)
        if (llm__kernel_kind_of_file((int)ck->tensors[i].type->type) != LLM__W_BF16) return LLM_DTYPE_FILE;
    return dtype == LLM_DTYPE_FILE ? LLM_DTYPE_BF16 : dtype;
}

static void llm__model_make_plan(llm__env *env, const llm__file_source *source, const llm_model_desc *desc,
                                 llm__model_plan *plan) {
    llm__pool *outer = env->pool;
    plan->pool = llm__pool_inner(env);
    env->pool = plan->pool;
    plan->ck = llm__checkpoint_open(env, source);
    plan->h = llm__hparams_read(env, plan->ck);
    env->pool = outer;
    plan->shape = llm__model_find_shape(env, &plan->h, plan->ck);
    if (llm__ranks_count(desc->pipeline) > plan->shape.n_layers)
        llm__fail(env, LLM_ERROR_ARGUMENT, "%d stages of a pipeline cannot share %d layers", desc->pipeline->size,
                  plan->shape.n_layers);
    plan->dtype = llm__model_plan_dtype(plan->ck, desc->dtype);
    plan->walk = llm__model_start_walk(env, plan->ck, &plan->h, &plan->shape, desc);
    plan->walk.dtype = plan->dtype;
    llm__model_walk_weights(&plan->walk);
    llm__tensor_refuse_unused(env, plan->ck);
}

static void llm__model_load_body(llm__env *env, void *arg) {
    llm__model_load_args *args = (llm__model_load_args *)arg;
    double start = llm__clock_now();
    llm_model *model = (llm_model *)llm__alloc_zero(env, 1, sizeof *model);
    llm_model_desc desc = llm__model_defaults(env, &args->desc);
    llm__model_plan plan;
    llm__model_make_plan(env, args->source, &desc, &plan);
    const llm__checkpoint *ck = plan.ck;
    desc.dtype = plan.dtype;
    model->backend = args->backend = desc.backend;
    model->shape = plan.shape;
    model->shape.weight_bytes = plan.walk.weight_bytes;
    model->tokenizer =
        ck->format == LLM__GGUF ? llm__tokenizer_from_gguf(env, ck) : llm__tokenizer_from_directory(env, ck->directory);
    if (llm_tokenizer_n_vocab(model->tokenizer) > plan.h.n_vocab)
        llm__fail(env, LLM_ERROR_FORMAT, "the vocabulary has %d tokens, but the embedding only %d rows",
                  llm_tokenizer_n_vocab(model->tokenizer), plan.h.n_vocab);
    llm__model_walk walk = llm__model_start_walk(env, ck, &plan.h, &model->shape, &desc);
    walk.fingerprint = llm__model_hash_shape(&model->shape);
    llm_status status = model->backend->open(&args->device, &model->shape, &desc, env->err);
    if (status) {
        env->status = status;
        longjmp(env->unwind, 1);
    }
    walk.device = args->device;
    walk.visit = llm__model_upload_weight;
    llm__model_walk_weights(&walk);
    model->info = llm__model_info(&plan.h, &walk, &model->shape, &desc);
    model->info.fingerprint = llm__hash_fnv(walk.fingerprint, &desc.dtype, sizeof desc.dtype);
    model->source = walk.fingerprint;
    model->kernels = llm__kernels_choose(desc.isa);
    llm__meta_read(env, model, ck);
    llm__free(env->pool, plan.pool); /* everything has been converted */
    model->device = args->device;
    model->desc = desc;
    model->pool = *env->pool;
    *args->out = model;
    llm__env_progress(env, 1);
    llm__log(&desc.host, "loaded %s: %s, %llu parameters as %s, %.0f MB, %s, in %.2f s",
             args->source->path ? args->source->path : "a model", model->info.architecture,
             (unsigned long long)walk.n_params, model->info.held, (double)walk.weight_bytes / 1e6, model->info.isa,
             llm__clock_now() - start);
}

/* All ranks must have the same weights and hyperparameters, and compute in the same way: what they exchange lies as the
   instruction set wants it. */
static uint64_t llm__model_hash_rank(const llm_model *model) {
    int n[] = {LLM__RANKS_VERSION, llm_tokenizer_n_vocab(model->tokenizer), llm__ranks_count(model->desc.tensor),
               llm__ranks_count(model->desc.pipeline)};
    uint64_t hash = llm__hash_fnv(model->info.fingerprint, n, sizeof n);
    return llm__hash_fnv(hash, model->kernels->name, strlen(model->kernels->name));
}

static llm_status llm__model_load(llm_model **out, const llm__file_source *source, const llm_model_desc *desc,
                                  llm_error *err) {
    llm__model_load_args args;
    llm__pool pool;
    llm__env env;
    memset(&args, 0, sizeof args);
    if (!out) return llm__error(err, LLM_ERROR_ARGUMENT, "out is NULL");
    *out = NULL;
    args.out = out;
    args.source = source;
    if (desc) args.desc = *desc;
    llm_status status = llm__file_check_source(source, err);
    if (!status) status = llm__host_check(&args.desc.host, err);
    if (status) return llm__ranks_agree(args.desc.tensor, args.desc.pipeline, true, status, err);
    llm__pool_init(&pool, &args.desc.host);
    llm__env_init(&env, &pool, err, source->path);
    status = llm__env_run(&env, llm__model_load_body, &args);
    status = llm__ranks_agree(args.desc.tensor, args.desc.pipeline, true, status, err);
    if (!status)
        status = llm__ranks_agree_on_hash(args.desc.tensor, args.desc.pipeline, llm__model_hash_rank(*out),
                                          "the model: file, type, instruction set, ranks or version differ", err);
    if (status) {
        *out = NULL;
        if (args.device) args.backend->close(args.device);
        llm__pool_free(&pool);
    }
    return llm__error_done(err, status);
}

LLM_API llm_status llm_model_load(llm_model **out, const char *path, const llm_model_desc *desc, llm_error *err) {
    llm__file_source source = {path, NULL, NULL, NULL, 0};
    return llm__model_load(out, &source, desc, err);
}

LLM_API llm_status llm_model_load_memory(llm_model **out, const void *data, size_t size, const llm_model_desc *desc,
                                         llm_error *err) {
    llm__file_source source = {NULL, data, NULL, NULL, size};
    return llm__model_load(out, &source, desc, err);
}

LLM_API llm_status llm_model_load_callback(llm_model **out, llm_read_fn read, void *user, uint64_t size,
                                           const llm_model_desc *desc, llm_error *err) {
    llm__file_source source = {NULL, NULL, read, user, size};
    return llm__model_load(out, &source, desc, err);
}

LLM_API void llm_model_free(llm_model *model) {
    if (!model) return;
    llm__pool pool = model->pool;
    model->backend->close(model->device);
    llm__pool_free(&pool);
}

LLM_API llm_model_info llm_model_get_info(const llm_model *model) { return model->info; }
LLM_API const llm_tokenizer *llm_model_tokenizer(const llm_model *model) { return model->tokenizer; }

LLM_API const char *llm_model_meta_key(const llm_model *model, int i) {
    return i >= 0 && (size_t)i < model->n_meta ? model->meta[i].key : NULL;
}

LLM_API const char *llm_model_meta(const llm_model *model, const char *key) {
    for (size_t i = 0; key && i < model->n_meta; i++)
        if (!strcmp(model->meta[i].key, key)) return model->meta[i].value;
    return NULL;
}

/* ---- What a file's header says ---- */

typedef struct llm__model_info_args {
    const llm__file_source *source;
    const llm_model_desc *desc;
    llm_model_info *out;
} llm__model_info_args;

static void llm__model_info_body(llm__env *env, void *arg) {
    llm__model_info_args *args = (llm__model_info_args *)arg;
    llm_model_desc desc = llm__model_defaults(env, args->desc);
    llm__model_plan plan;
    llm__model_make_plan(env, args->source, &desc, &plan);
    desc.dtype = plan.dtype;
    *args->out = llm__model_info(&plan.h, &plan.walk, &plan.shape, &desc);
}

static llm_status llm__model_read_info(const llm__file_source *source, const llm_model_desc *desc, llm_model_info *info,
                                       llm_error *err) {
    llm_model_desc zero;
    llm__pool pool;
    llm__env env;
    memset(&zero, 0, sizeof zero);
    if (!info) return llm__error(err, LLM_ERROR_ARGUMENT, "info is NULL");
    memset(info, 0, sizeof *info);
    llm__model_info_args args = {source, desc ? desc : &zero, info};
    llm_status status = llm__file_check_source(source, err);
    if (!status) status = llm__host_check(&args.desc->host, err);
    if (status) return status;
    llm__pool_init(&pool, &args.desc->host);
    llm__env_init(&env, &pool, err, source->path);
    status = llm__env_run(&env, llm__model_info_body, &args);
    llm__pool_free(&pool);
    return llm__error_done(err, status);
}

LLM_API llm_status llm_model_read_info(const char *path, const llm_model_desc *desc, llm_model_info *info,
                                       llm_error *err) {
    llm__file_source source = {path, NULL, NULL, NULL, 0};
    return llm__model_read_info(&source, desc, info, err);
}

LLM_API llm_status llm_model_read_info_memory(const void *data, size_t size, const llm_model_desc *desc,
                                              llm_model_info *info, llm_error *err) {
    llm__file_source source = {NULL, data, NULL, NULL, size};
    return llm__model_read_info(&source, desc, info, err);
}

LLM_API llm_status llm_model_read_info_callback(llm_read_fn read, void *user, uint64_t size, const llm_model_desc *desc,
                                                llm_model_info *info, llm_error *err) {
    llm__file_source source = {NULL, NULL, read, user, size};
    return llm__model_read_info(&source, desc, info, err);
}

/* ---- A directory with int8 weights ----
   The format is compressed-tensors "int-quantized": config.json describes it, and each matrix NAME is int8 with an f32
   scale per row in NAME_scale. */

typedef struct llm__quantize_args {
    const char *from, *to;
    const llm__checkpoint *ck;
} llm__quantize_args;

/* A file that is being written. It is closed, if still open, when its memory is freed. */
typedef struct llm__out {
    FILE *file;
} llm__out;

static void llm__out_release(void *data) {
    llm__out *out = (llm__out *)data;
    if (out->file) fclose(out->file);
}

static llm__out *llm__out_create(llm__env *env, const char *directory, const char *name) {
    const char *path = llm__path_join(env, directory, name);
    llm__out *out = (llm__out *)llm__alloc_zero(env, 1, sizeof *out);
    llm__pool_on_free(out, llm__out_release);
#if defined(_WIN32)
    wchar_t wide[1024];
    if (MultiByteToWideChar(CP_UTF8, 0, path, -1, wide, 1024)) out->file = _wfopen(wide, L"wb");
#else
    out->file = fopen(path, "wb");
#endif
    if (!out->file) llm__fail(env, LLM_ERROR_IO, "%s cannot be written: %s", path, strerror(errno));
    return out;
}

static void llm__out_put(llm__env *env, llm__out *out, const void *bytes, size_t n) {
    if (n && fwrite(bytes, 1, n, out->file) != n) llm__fail(env, LLM_ERROR_IO, "writing failed: %s", strerror(errno));
}

static void llm__out_close(llm__env *env, llm__out *out) {
    FILE *file = out->file;
    out->file = NULL;
    if (fclose(file)) llm__fail(env, LLM_ERROR_IO, "writing failed: %s", strerror(errno));
    llm__free(env->pool, out);
}

static void llm__path_create_directory(llm__env *env, const char *path) {
#if defined(_WIN32)
    wchar_t wide[1024];
    bool made = MultiByteToWideChar(CP_UTF8, 0, path, -1, wide, 1024) && CreateDirectoryW(wide, NULL);
    if (!made) llm__fail(env, LLM_ERROR_IO, "the directory %s cannot be created; it must not exist yet", path);
#else
    if (mkdir(path, 0777))
        llm__fail(env, LLM_ERROR_IO, "the directory %s cannot be created: %s", path, strerror(errno));
#endif
}

/* Copies a file if it exists. */
static void llm__quantize_copy(llm__env *env, const llm__quantize_args *a, const char *name) {
    const char *path = llm__path_join(env, a->from, name);
    if (llm__path_find(path) == LLM__NOTHING) return;
    env->file = path;
    llm__file *file = llm__file_open(env, path);
    env->file = a->from;
    llm__out *out = llm__out_create(env, a->to, name);
    llm__out_put(env, out, file->data, (size_t)file->size);
    llm__out_close(env, out);
    llm__free(env->pool, file);
}

/* Writes config.json with a new first member that describes the weights. */
static void llm__quantize_config(llm__env *env, const llm__quantize_args *a) {
    static const char added[] =
        "{\"quantization_config\": {\"quant_method\": \"compressed-tensors\", \"format\": \"int-quantized\", "
        "\"quantization_status\": \"compressed\", \"ignore\": [\"lm_head\"], \"config_groups\": {\"group_0\": "
        "{\"targets\": [\"Linear\"], \"format\": \"int-quantized\", \"input_activations\": null, "
        "\"output_activations\": null, \"weights\": {\"num_bits\": 8, \"type\": \"int\", \"symmetric\": true, "
        "\"strategy\": \"channel\", \"dynamic\": false, \"group_size\": null, \"block_structure\": null, "
        "\"actorder\": null, \"observer\": \"minmax\", \"observer_kwargs\": {}}}}},";
    llm__file *file = llm__file_open(env, a->ck->config_path);
    const uint8_t *brace = (const uint8_t *)memchr(file->data, '{', (size_t)file->size);
    if (!brace) llm__fail(env, LLM_ERROR_IO, "%s is no longer the JSON object that it was", a->ck->config_path);
    llm__out *out = llm__out_create(env, a->to, "config.json");
    llm__out_put(env, out, added, sizeof added - 1);
    llm__out_put(env, out, brace + 1, (size_t)(file->data + file->size - (brace + 1)));
    llm__out_close(env, out);
    llm__free(env->pool, file);
}

static bool llm__quantize_chooses(const llm__tensor *t) {
    static const char end[] = "_proj.weight";
    size_t n = sizeof end - 1;
    return t->rows > 1 && t->name.n > n && !memcmp(t->name.at + t->name.n - n, end, n);
}

/* The file has three parts, so that everything stays aligned: scales, copied tensors, int8 tensors. */
enum { LLM__QUANTIZE_SCALES, LLM__QUANTIZE_COPIES, LLM__QUANTIZE_INT8, LLM__QUANTIZE_PARTS };

static bool llm__quantize_is_in(const llm__tensor *t, int part) {
    return llm__quantize_chooses(t) == (part != LLM__QUANTIZE_COPIES);
}

/* Writes a tensor's entry of the header and returns its length. *at is the offset of its bytes; it advances past
   them. */
static size_t llm__quantize_describe(char *to, size_t room, const llm__tensor *t, int part, uint64_t *at) {
    uint64_t rows = t->rows, cols = part == LLM__QUANTIZE_SCALES ? 1 : t->cols, bytes = t->rows * t->row_bytes;
    if (part == LLM__QUANTIZE_SCALES) bytes = 4 * rows;
    if (part == LLM__QUANTIZE_INT8) bytes = rows * cols;
    char shape[64];
    if (rows > 1) snprintf(shape, sizeof shape, "%llu, %llu", (unsigned long long)rows, (unsigned long long)cols);
    else snprintf(shape, sizeof shape, "%llu", (unsigned long long)cols);
    const char *type = part == LLM__QUANTIZE_SCALES ? "F32" : part == LLM__QUANTIZE_INT8 ? "I8" : t->type->name;
    int n = snprintf(to, room, "%s\"%.*s%s\": {\"dtype\": \"%s\", \"shape\": [%s], \"data_offsets\": [%llu, %llu]}",
                     *at ? ", " : "", (int)t->name.n, t->name.at, part == LLM__QUANTIZE_SCALES ? "_scale" : "", type,
                     shape, (unsigned long long)*at, (unsigned long long)(*at + bytes));
    *at += bytes;
    return (size_t)n;
}

static void llm__quantize_header(llm__env *env, llm__out *out, const llm__checkpoint *ck) {
    size_t room = 16, n = 1;
    uint64_t at = 0;
    for (size_t i = 0; i < ck->n_tensors; i++) room += 2 * (ck->tensors[i].name.n + 160);
    char *text = (char *)llm__alloc(env, room, 1);
    text[0] = '{';
    for (int part = 0; part < LLM__QUANTIZE_PARTS; part++)
        for (size_t i = 0; i < ck->n_tensors; i++)
            if (llm__quantize_is_in(&ck->tensors[i], part))
                n += llm__quantize_describe(text + n, room - n, &ck->tensors[i], part, &at);
    text[n++] = '}';
    while (n % 8) text[n++] = ' ';
    uint64_t size = n;
    llm__out_put(env, out, &size, sizeof size);
    llm__out_put(env, out, text, n);
    llm__free(env->pool, text);
}

/* Writes a tensor's rows as int8, or the scales of its rows. */
static void llm__quantize_rows(llm__env *env, llm__out *out, const llm__tensor *t, bool scales) {
    float *row = (float *)llm__alloc(env, (size_t)t->cols, sizeof *row);
    int8_t *q = (int8_t *)llm__alloc(env, (size_t)t->cols, 1);
    for (uint64_t r = 0; r < t->rows; r++) {
        t->type->decode(t->data + r * t->row_bytes, (size_t)t->cols, row);
        float scale = llm__pack_quantize_row(row, (size_t)t->cols, q, 1);
        if (scales) llm__out_put(env, out, &scale, sizeof scale);
        else llm__out_put(env, out, q, (size_t)t->cols);
    }
    llm__free(env->pool, q);
    llm__free(env->pool, row);
}

static void llm__quantize_tensors(llm__env *env, const llm__quantize_args *a) {
    llm__out *out = llm__out_create(env, a->to, "model.safetensors");
    llm__quantize_header(env, out, a->ck);
    for (int part = 0; part < LLM__QUANTIZE_PARTS; part++)
        for (size_t i = 0; i < a->ck->n_tensors; i++) {
            const llm__tensor *t = &a->ck->tensors[i];
            if (!llm__quantize_is_in(t, part)) continue;
            if (part == LLM__QUANTIZE_COPIES) llm__out_put(env, out, t->data, (size_t)(t->rows * t->row_bytes));
            else llm__quantize_rows(env, out, t, part == LLM__QUANTIZE_SCALES);
        }
    llm__out_close(env, out);
}

static void llm__quantize_body(llm__env *env, void *arg) {
    static const char *const copied[] = {"tokenizer.json",
                                         "tokenizer.model",
                                         "tokenizer_config.json",
                                         "generation_config.json",
                                         "special_tokens_map.json",
                                         "added_tokens.json",
                                         "vocab.json",
                                         "merges.txt",
                                         "chat_template.jinja"};
    llm__quantize_args *a = (llm__quantize_args *)arg;
    if (llm__path_find(a->from) != LLM__DIRECTORY)
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "this is not a directory as Hugging Face publishes them");
    a->ck = llm__hf_open(env, a->from);
    for (size_t i = 0; i < a->ck->n_tensors; i++) {
        const llm__tensor *t = &a->ck->tensors[i];
        if (t->type->type != LLM__F32 && t->type->type != LLM__F16 && t->type->type != LLM__BF16)
            llm__fail(env, LLM_ERROR_UNSUPPORTED, "tensor %.*s is of type %s; only F32, F16 and BF16 can be quantized",
                      LLM__SHOW(t->name), t->type->name);
    }
    if (llm__json_get(a->ck->config, "quantization_config") || llm__json_get(a->ck->config, "compression_config"))
        llm__fail(env, LLM_ERROR_UNSUPPORTED, "the weights are quantized already");
    llm__path_create_directory(env, a->to);
    llm__quantize_config(env, a);
    for (size_t i = 0; i < sizeof copied / sizeof *copied; i++) llm__quantize_copy(env, a, copied[i]);
    llm__quantize_tensors(env, a);
}

LLM_API llm_status llm_quantize_directory(const char *from, const char *to, const llm_host *host, llm_error *err) {
    llm__quantize_args args = {from, to, NULL};
    llm__pool pool;
    llm__env env;
    if (!from || !to) return llm__error(err, LLM_ERROR_ARGUMENT, "from or to is NULL");
    llm_status status = llm__host_check(host, err);
    if (status) return status;
    llm__pool_init(&pool, host);
    llm__env_init(&env, &pool, err, from);
    status = llm__env_run(&env, llm__quantize_body, &args);
    llm__pool_free(&pool);
    return llm__error_done(err, status);
}

/* ==== 20 Contexts and sequences =================================================================================

   A context is a cache, scratch space and the threads that compute, for up to n_seq sequences. */

/* What sampling one row needs. */
typedef struct llm__sampler_scratch {
    float *probabilities;  /* [n_vocab padded to 16] */
    llm_token *candidates; /* [n_vocab] */
    float *maxima;         /* [n_vocab / LLM__MAX_RUN, rounded up] */
} llm__sampler_scratch;

/* What a scored batch predicts: after token i, the targets first[i] to first[i + 1] - 1. */
typedef struct llm__ctx_targets {
    const int *first;      /* [n_tokens + 1]                                                              */
    const llm_token *ids;  /* [first[n_tokens]]                                                           */
    bool count_only;       /* only count, compute nothing */
    int n;                 /* targets of the current pass, in order of its rows: */
    llm_token *pass_ids;   /* [n]                                                                         */
    int *pass_rows, *from; /* [n] index into the pass's logit_rows; index of the target above */
    float *log_probs;      /* [n] the results                                                             */
    bool stopped;          /* in a pipeline, some stage wants to stop                                     */
} llm__ctx_targets;

struct llm_context {
    llm__pool pool;
    const llm_model *model;
    llm_context_desc desc;
    llm_backend_desc backend_desc;
    void *device; /* the backend's context */
    llm__cache cache;
    /* The pass that is being built: the batch's tokens, ordered by sequence. */
    llm_token *tokens; /* [n_batch] */
    int *positions, *seqs, *logit_rows;
    int *batch_index;              /* [n_batch] the batch's token whose logits a row computes, -1: none */
    int *n_new;                    /* [n_seq] number of tokens the batch appends */
    int *first_row;                /* [n_seq + 1] first row of each sequence */
    int *old_lengths;              /* [n_seq] to restore if the call fails; see `unsettled` */
    int *logits_of;                /* [n_logits or n_batch] the batch's token that each row of logits belongs to */
    int n_logits;                  /* number of valid rows of logits */
    llm__ctx_targets *targets;     /* of a scored batch, which is a single pass; NULL: logits are wanted */
    llm__sampler_scratch *scratch; /* [n_scratch], so that as many rows can be sampled at the same time */
    int n_scratch;
    /* Sequences that the library picks, and streams; see section 23b. */
    uint64_t *picked_at;  /* [n_seq] when it last used a sequence that it had picked; 0: the host names it, or nobody */
    uint64_t clock;       /* counts these uses */
    bool *runs;           /* [n_seq] a running stream writes this sequence, and nobody else may */
    llm_stream *streams;  /* a list, the oldest first */
    llm_stream **sampled; /* [n_seq] those whose rows are sampled at the same time */
    llm_stream *turn;     /* the first to be served in the next pass; NULL: the oldest */
    llm_token *step_tokens; /* [llm__ctx_step_room] the batch that the streams make */
    int *step_seqs;
    bool *step_logits;
    llm_stream *own;    /* a stream of a call that has not returned it to the host, such as llm_generate's */
    llm_stream *acting; /* the stream whose callback may be running */
    /* The call in progress. A callback may leave it by longjmp or a C++ exception. The next call then ends it first. */
    llm__pool work;           /* memory of the call */
    uintptr_t callback;       /* frame of the code that called the host; 0: no callback is running */
    bool unsettled;           /* the sequences hold tokens that are not final */
    int burst_seq, burst_end; /* a burst has reserved places in this sequence up to here; 0: none */
    llm_context *borrower;    /* a draft that uses this context's cache, or NULL */
    bool (*cancel)(void *user);
    void *cancel_user;
};

/* In section 23b. */
static void llm__stream_settle(llm_context *ctx);
static void llm__stream_free_all(llm_context *ctx);

/* How many rows are sampled at the same time. */
static int llm__ctx_count_scratch(const llm_context_desc *d, const llm_backend *backend) {
    if (backend != &llm__cpu_backend) return 1;
    return d->n_threads < d->n_logits ? d->n_threads : d->n_logits;
}

/* The most tokens of a pass of streams, or of a whole prompt of llm_generate. */
static size_t llm__ctx_step_room(const llm_context_desc *d) {
    return (size_t)(d->n_batch > d->n_ctx ? d->n_batch : d->n_ctx);
}

static llm_context_desc llm__ctx_defaults(llm__env *env, const llm_model_info *info, const llm_backend *backend,
                                          const llm_host *model_host, const llm_context_desc *desc) {
    llm_context_desc d;
    memset(&d, 0, sizeof d);
    if (desc) d = *desc;
    if (d.n_ctx < 0 || d.n_seq < 0 || d.n_cache < 0 || d.n_batch < 0 || d.n_logits < 0 || d.n_threads < 0 ||
        d.n_threads > 1024)
        llm__fail(env, LLM_ERROR_ARGUMENT,
                  "llm_context_desc: a number is negative, or n_threads is above 1024: n_ctx %d, n_seq %d, n_cache %d, "
                  "n_batch %d, n_logits %d, n_threads %d",
                  d.n_ctx, d.n_seq, d.n_cache, d.n_batch, d.n_logits, d.n_threads);
    if (!d.n_ctx) d.n_ctx = info->n_ctx_train < 4096 ? info->n_ctx_train : 4096;
    if (!d.n_seq) d.n_seq = 1;
    if (!d.n_batch) d.n_batch = 512;
    if (!d.n_logits) d.n_logits = d.n_seq;
    if (!d.n_threads) d.n_threads = llm__team_default_threads();
    if (!d.cache_dtype) d.cache_dtype = llm__model_cache_dtype(backend, info->dtype);
    if (d.cache_dtype != LLM_DTYPE_F32 && d.cache_dtype != LLM_DTYPE_BF16 && d.cache_dtype != LLM_DTYPE_INT8)
        llm__fail(env, LLM_ERROR_ARGUMENT, "cache_dtype is %d, which no cache can have", (int)d.cache_dtype);
    if (d.n_ctx > 1 << 28 || d.n_seq > 1 << 20 || d.n_batch > 1 << 20 || d.n_logits > 1 << 20)
        llm__fail(env, LLM_ERROR_ARGUMENT,
                  "llm_context_desc: n_ctx is %d (at most 2^28), n_seq %d, n_batch %d, n_logits %d (at most 2^20)",
                  d.n_ctx, d.n_seq, d.n_batch, d.n_logits);
    uint64_t n_cache = d.n_cache ? (uint64_t)d.n_cache
                                 : (uint64_t)llm__cache_blocks_for(d.n_ctx) * LLM_CACHE_BLOCK * (uint64_t)d.n_seq;
    if (n_cache > 1 << 30)
        llm__fail(env, LLM_ERROR_ARGUMENT, "the cache would have %llu positions", (unsigned long long)n_cache);
    d.n_cache = (int)n_cache;
    if (!d.host.alloc && !d.host.free && !d.host.log && !d.host.progress && !d.host.user) d.host = *model_host;
    return d;
}

typedef struct llm__ctx_defaults_args {
    llm_context_desc *out;
    const llm_model_info *info;
    const llm_backend *backend;
    const llm_host *model_host;
    const llm_context_desc *desc;
} llm__ctx_defaults_args;

static void llm__ctx_defaults_body(llm__env *env, void *arg) {
    llm__ctx_defaults_args *a = (llm__ctx_defaults_args *)arg;
    *a->out = llm__ctx_defaults(env, a->info, a->backend, a->model_host, a->desc);
}

static llm_backend_desc llm__ctx_backend_desc(const llm_context_desc *d, llm_dtype dtype, const char *isa) {
    llm_backend_desc b;
    memset(&b, 0, sizeof b);
    b.n_seq = d->n_seq;
    b.blocks_per_seq = llm__cache_blocks_for(d->n_ctx);
    b.n_cache_blocks = llm__cache_blocks_for(d->n_cache);
    b.n_batch = d->n_batch;
    b.n_logits = d->n_logits;
    b.n_threads = d->n_threads;
    b.dtype = dtype;
    b.isa = isa;
    b.cache_dtype = d->cache_dtype;
    b.parallel = d->parallel;
    b.host = d->host;
    return b;
}

typedef struct llm__ctx_args {
    llm_context **out;
    const llm_model *model;
    llm_context_desc desc;
    const llm_context *lender; /* lends its threads, and its cache if share_cache; see llm_backend_desc */
    bool share_cache;
    llm_comm *tensor, *pipeline;
    void *device;
} llm__ctx_args;

static void llm__ctx_body(llm__env *env, void *arg) {
    llm__ctx_args *args = (llm__ctx_args *)arg;
    const llm_model *model = args->model;
    llm_context *ctx = (llm_context *)llm__alloc_zero(env, 1, sizeof *ctx);
    llm_context_desc d = args->desc;
    size_t n_batch = (size_t)d.n_batch, n_seq = (size_t)d.n_seq,
           n_rows = (size_t)(d.n_logits > d.n_batch ? d.n_logits : d.n_batch);
    llm__pool_init(&ctx->work, &d.host);
    ctx->model = model;
    ctx->desc = d;
    ctx->backend_desc = llm__ctx_backend_desc(&d, model->info.dtype, model->info.isa);
    ctx->backend_desc.lender = args->lender ? args->lender->device : NULL;
    ctx->backend_desc.share_cache = args->share_cache;
    ctx->backend_desc.tensor = args->tensor;
    ctx->backend_desc.pipeline = args->pipeline;
    if (!args->share_cache) llm__cache_create(env, &ctx->cache, d.n_seq, d.n_ctx, ctx->backend_desc.n_cache_blocks);
    ctx->tokens = (llm_token *)llm__alloc(env, n_batch, sizeof *ctx->tokens);
    ctx->positions = (int *)llm__alloc(env, n_batch, sizeof(int));
    ctx->seqs = (int *)llm__alloc(env, n_batch, sizeof(int));
    ctx->batch_index = (int *)llm__alloc(env, n_batch, sizeof(int));
    ctx->logit_rows = (int *)llm__alloc(env, n_rows, sizeof(int));
    ctx->n_new = (int *)llm__alloc_zero(env, n_seq, sizeof(int));
    ctx->first_row = (int *)llm__alloc(env, n_seq + 1, sizeof(int));
    ctx->logits_of = (int *)llm__alloc(env, n_rows, sizeof(int));
    ctx->old_lengths = (int *)llm__alloc(env, n_seq, sizeof(int));
    size_t n_vocab = (size_t)model->shape.n_vocab, step_room = llm__ctx_step_room(&d);
    ctx->n_scratch = llm__ctx_count_scratch(&d, model->backend);
    ctx->scratch = (llm__sampler_scratch *)llm__alloc(env, (size_t)ctx->n_scratch, sizeof *ctx->scratch);
    for (int i = 0; i < ctx->n_scratch; i++) {
        ctx->scratch[i].probabilities =
            (float *)llm__alloc(env, (size_t)llm__math_round_up((int)n_vocab, 16), sizeof(float));
        ctx->scratch[i].candidates = (llm_token *)llm__alloc(env, n_vocab, sizeof(llm_token));
        ctx->scratch[i].maxima = (float *)llm__alloc(env, n_vocab / LLM__MAX_RUN + 1, sizeof(float));
    }
    ctx->picked_at = (uint64_t *)llm__alloc_zero(env, n_seq, sizeof *ctx->picked_at);
    ctx->runs = (bool *)llm__alloc_zero(env, n_seq, sizeof *ctx->runs);
    ctx->sampled = (llm_stream **)llm__alloc_zero(env, n_seq, sizeof *ctx->sampled);
    ctx->step_tokens = (llm_token *)llm__alloc(env, step_room, sizeof *ctx->step_tokens);
    ctx->step_seqs = (int *)llm__alloc(env, step_room, sizeof *ctx->step_seqs);
    ctx->step_logits = (bool *)llm__alloc(env, step_room, sizeof *ctx->step_logits);
    llm_status status = model->backend->context_create(&args->device, model->device, &ctx->backend_desc, env->err);
    if (status) {
        env->status = status;
        longjmp(env->unwind, 1);
    }
    ctx->device = args->device;
    ctx->pool = *env->pool;
    *args->out = ctx;
}

/* What ranks must agree on. */
static uint64_t llm__ctx_hash(const llm_context_desc *d) {
    int n[] = {d->n_ctx, d->n_seq, d->n_cache, d->n_batch, d->n_logits, (int)d->cache_dtype};
    return llm__hash_fnv(0, n, sizeof n);
}

static llm_status llm__ctx_create(llm_context **out, const llm_model *model, const llm_context_desc *desc,
                                  const llm_context *lender, bool share_cache, llm_error *err) {
    llm__ctx_args args;
    llm__pool pool;
    llm__env env;
    memset(&args, 0, sizeof args);
    *out = NULL;
    args.out = out;
    args.model = model;
    args.lender = lender;
    args.share_cache = share_cache;
    llm__pool_init(&pool, &model->desc.host);
    llm__env_init(&env, &pool, err, NULL);
    llm__ctx_defaults_args defaults = {&args.desc, &model->info, model->backend, &model->desc.host, desc};
    llm_status status = llm__env_run(&env, llm__ctx_defaults_body, &defaults);
    if (status) return status;
    llm__pool_init(&pool, &args.desc.host);
    status = llm__comm_duplicate(model->desc.tensor, &args.tensor, err);
    if (!status) status = llm__comm_duplicate(model->desc.pipeline, &args.pipeline, err);
    if (!status) {
        status = llm__env_run(&env, llm__ctx_body, &args);
        status = llm__ranks_agree(args.tensor, args.pipeline, true, status, err);
    }
    if (!status)
        status = llm__ranks_agree_on_hash(args.tensor, args.pipeline, llm__ctx_hash(&args.desc),
                                          "the context: a number in llm_context_desc differs", err);
    if (status) {
        *out = NULL;
        model->backend->context_free(args.device);
        llm_comm_free(args.tensor);
        llm_comm_free(args.pipeline);
        llm__pool_free(&pool);
    }
    return status;
}

LLM_API llm_status llm_context_create(llm_context **out, const llm_model *model, const llm_context_desc *desc,
                                      llm_error *err) {
    if (!out || !model) return llm__error(err, LLM_ERROR_ARGUMENT, "out or model is NULL");
    *out = NULL;
    llm_status status = desc ? llm__host_check(&desc->host, err) : LLM_OK;
    if (!status) status = llm__ctx_create(out, model, desc, NULL, false, err);
    return llm__error_done(err, status);
}

/* Has a callback never returned to the call that made it? Then the ranks that work on that call must not wait. */
static bool llm__ctx_was_left(const llm_context *ctx) {
    const char *why = "a callback on one of the ranks did not return to its call";
    if (!ctx->callback && !ctx->unsettled && !ctx->targets && !ctx->work.blocks && !ctx->own && !ctx->acting)
        return false;
    llm_comm_abort(ctx->backend_desc.tensor, why);
    llm_comm_abort(ctx->backend_desc.pipeline, why);
    return true;
}

LLM_API void llm_context_free(llm_context *ctx) {
    if (!ctx) return;
    llm__ctx_was_left(ctx); /* what it had begun to send goes with its memory */
    llm__pool pool = ctx->pool;
    llm_comm *tensor = ctx->backend_desc.tensor, *pipeline = ctx->backend_desc.pipeline;
    llm__stream_free_all(ctx);
    ctx->model->backend->context_free(ctx->device);
    llm__pool_free(&ctx->work);
    llm_comm_free(tensor);
    llm_comm_free(pipeline);
    llm__pool_free(&pool);
}

LLM_API const llm_model *llm_context_model(const llm_context *ctx) { return ctx->model; }
LLM_API int llm_context_n_ctx(const llm_context *ctx) { return ctx->desc.n_ctx; }
LLM_API int llm_context_n_seq(const llm_context *ctx) { return ctx->desc.n_seq; }
LLM_API int llm_context_n_cache(const llm_context *ctx) { return ctx->desc.n_cache; }
LLM_API int llm_context_n_batch(const llm_context *ctx) { return ctx->desc.n_batch; }
LLM_API int llm_context_n_logits(const llm_context *ctx) { return ctx->desc.n_logits; }
LLM_API int llm_context_n_free(const llm_context *ctx) { return ctx->cache.n_free * LLM_CACHE_BLOCK; }
LLM_API int llm_context_n_threads(const llm_context *ctx) {
    if (ctx->model->backend != &llm__cpu_backend) return ctx->desc.n_threads;
    return ((llm__cpu_context *)ctx->device)->team->n;
}

/* ---- Calls of the host, and from it ---- */

/* These two enclose every call of a host function that could use the context. */
LLM__NOINLINE static void llm__ctx_begin_callback(llm_context *ctx) {
    ctx->callback = (uintptr_t)__builtin_frame_address(0);
}

static void llm__ctx_end_callback(llm_context *ctx) { ctx->callback = 0; }

static bool llm__ctx_poll_host(void *user) {
    llm_context *ctx = (llm_context *)user;
    llm__ctx_begin_callback(ctx);
    bool stop = ctx->cancel(ctx->cancel_user);
    llm__ctx_end_callback(ctx);
    return stop;
}

/* Restores the sequences to their last final state. */
static void llm__ctx_roll_back(llm_context *ctx) {
    if (!ctx->unsettled) return;
    for (int seq = 0; seq < ctx->desc.n_seq; seq++) llm__cache_truncate(&ctx->cache, seq, ctx->old_lengths[seq]);
    ctx->unsettled = false;
    ctx->n_logits = 0;
}

/* Releases the reserved places of a burst that hold no known token. */
static void llm__ctx_end_burst(llm_context *ctx) {
    if (!ctx->burst_end) return;
    int known = ctx->cache.lengths[ctx->burst_seq];
    ctx->cache.lengths[ctx->burst_seq] = ctx->burst_end;
    llm__cache_truncate(&ctx->cache, ctx->burst_seq, known);
    ctx->burst_end = 0;
    ctx->n_logits = 0; /* they belong to a later token */
}

/* Ends a call that a callback or an allocator never returned to. */
static void llm__ctx_settle(llm_context *ctx) {
    llm_context *borrower = ctx->borrower;
    if (ctx->model->backend == &llm__cpu_backend) llm__cpu_end_pass(((llm__cpu_context *)ctx->device)->team);
    ctx->callback = 0;
    ctx->targets = NULL;
    ctx->borrower = NULL;
    if (borrower) {
        llm__ctx_settle(borrower);
        ctx->cache = borrower->cache;
    }
    llm__ctx_end_burst(ctx);
    llm__ctx_roll_back(ctx);
    llm__stream_settle(ctx);
    llm__pool_free(&ctx->work);
}

/* Every public function that works with a context begins here; `frame` is its own stack frame. A function that a
   callback calls has a frame below the callback's. A frame above it shows that the callback never returned. In the
   normal case nothing is written, because several threads may save sequences of one context. */
static llm_status llm__ctx_enter(llm_context *ctx, const void *frame, llm_error *err) {
    if (ctx->callback && (uintptr_t)frame <= ctx->callback)
        return llm__error(err, LLM_ERROR_ARGUMENT,
                          "the context was used inside one of its own callbacks, which must return first");
    if (llm__ctx_was_left(ctx)) llm__ctx_settle(ctx);
    return LLM_OK;
}

#define LLM__ENTER(ctx, err) llm__ctx_enter(ctx, __builtin_frame_address(0), err)

LLM_API double llm_measure_bandwidth(llm_context *ctx) {
    return LLM__ENTER(ctx, NULL) ? 0 : ctx->model->backend->measure_bandwidth(ctx->device);
}

LLM_API double llm_measure_flops(llm_context *ctx) {
    return LLM__ENTER(ctx, NULL) ? 0 : ctx->model->backend->measure_flops(ctx->device);
}

/* The part of the shape that the sizes of cache and scratch depend on. */
static llm_backend_shape llm__ctx_shape_of(const llm_model_info *info) {
    llm_backend_shape s;
    memset(&s, 0, sizeof s);
    s.n_vocab = info->n_vocab;
    s.n_layers = info->n_layers;
    s.n_embd = info->n_embd;
    s.n_ff = info->n_ff;
    s.n_heads = info->n_heads;
    s.n_kv_heads = info->n_kv_heads;
    s.head_dim = info->head_dim;
    s.rope_dim = info->rope_dim;
    s.weight_bytes = info->weight_bytes;
    return s;
}

LLM_API llm_status llm_memory_estimate(const llm_model_info *info, const llm_context_desc *desc, llm_memory *out,
                                       llm_error *err) {
    llm_context_desc c;
    llm_host none;
    llm__pool pool;
    llm__env env;
    if (!out) return llm__error(err, LLM_ERROR_ARGUMENT, "out is NULL");
    memset(out, 0, sizeof *out);
    if (!info || !info->backend)
        return llm__error(err, LLM_ERROR_ARGUMENT, "info is NULL or empty; llm_model_read_info fills it");
    memset(&none, 0, sizeof none);
    llm__ctx_defaults_args args = {&c, info, info->backend, &none, desc};
    llm__pool_init(&pool, NULL);
    llm__env_init(&env, &pool, err, NULL);
    llm_status status = llm__env_run(&env, llm__ctx_defaults_body, &args);
    if (status) return status;
    llm_backend_shape shape = llm__ctx_shape_of(info);
    llm_backend_desc b = llm__ctx_backend_desc(&c, info->dtype, info->isa);
    llm_backend_shape own = shape;
    own.n_layers = info->n_own_layers;
    own.n_kv_heads = info->n_own_kv_heads;
    out->weights = info->weight_bytes;
    out->cache = (uint64_t)b.n_cache_blocks * info->backend->block_bytes(&own, b.cache_dtype);
    out->scratch = info->backend->scratch_bytes(&shape, &b) +
                   (uint64_t)shape.n_vocab * 8 * (uint64_t)llm__ctx_count_scratch(&c, info->backend) +
                   (uint64_t)llm__ctx_step_room(&c) * (sizeof(llm_token) + sizeof(int) + sizeof(bool)) +
                   (uint64_t)c.n_seq * ((uint64_t)c.n_ctx * 4 + (uint64_t)llm__cache_blocks_for(c.n_ctx) * 4);
    return llm__error_done(err, LLM_OK);
}

/* A call that fails on one rank alone, as memory does, must end it on all. */
static llm_status llm__ctx_tell_ranks(const llm_context *ctx, llm_status status) {
    if (status != LLM_ERROR_MEMORY) return status;
    llm_comm_abort(ctx->backend_desc.tensor, "another rank is out of memory");
    llm_comm_abort(ctx->backend_desc.pipeline, "another rank is out of memory");
    return status;
}

/* ---- Sequences ---- */

static llm_status llm__ctx_check_seq(const llm_context *ctx, int seq, llm_error *err) {
    if (seq >= 0 && seq < ctx->desc.n_seq) return LLM_OK;
    return llm__error(err, LLM_ERROR_ARGUMENT, "sequence %d was named, but the context has %d", seq, ctx->desc.n_seq);
}

/* The host names a sequence to change it: from now on it is the host's. */
static llm_status llm__ctx_claim_seq(llm_context *ctx, int seq, llm_error *err) {
    llm_status status = llm__ctx_check_seq(ctx, seq, err);
    if (status) return status;
    if (ctx->runs[seq])
        return llm__error(err, LLM_ERROR_ARGUMENT,
                          "a stream that is running writes sequence %d; end it first with llm_stream_free", seq);
    ctx->picked_at[seq] = 0;
    return LLM_OK;
}

/* How many of n tokens, from the first on, a sequence begins with. */
static int llm__seq_common(const llm_context *ctx, int seq, const llm_token *ids, int n) {
    const llm_token *own = llm__cache_tokens(&ctx->cache, seq);
    int same = 0;
    if (ctx->cache.lengths[seq] < n) n = ctx->cache.lengths[seq];
    while (same < n && own[same] == ids[same]) same++;
    return same;
}

/* Another sequence's prefix is taken if it is so many tokens longer. A fork in the middle of a block copies that block,
   which takes about as long as computing a few tokens. */
enum { LLM__SEQ_WORTH_SHARING = LLM_CACHE_BLOCK / 2 };

/* Makes a sequence the longest prefix of n tokens that any sequence holds, at least *own of which it held itself. */
static int llm__seq_start(llm_context *ctx, int seq, const llm_token *ids, int n, int *own) {
    int parent = seq, best = *own = llm__seq_common(ctx, seq, ids, n), least = best + LLM__SEQ_WORTH_SHARING;
    for (int other = 0; other < ctx->desc.n_seq; other++) {
        int same = other == seq ? 0 : llm__seq_common(ctx, other, ids, n);
        if (same < least || same <= best) continue;
        best = same;
        parent = other;
    }
    if (parent == seq) llm__cache_truncate(&ctx->cache, seq, best);
    else llm__cache_fork(&ctx->cache, seq, parent, best);
    return best;
}

/* The sequences that the library picked and that no stream writes are kept only as long as there is room. */
static bool llm__seq_may_drop(const llm_context *ctx, int seq) {
    return ctx->picked_at[seq] && !ctx->runs[seq] && ctx->cache.lengths[seq];
}

/* How many blocks would be free without these sequences. A block may have several users, so we count them down, and
   then up again. */
static int llm__seq_blocks_to_have(const llm_context *ctx) {
    const llm__cache *cache = &ctx->cache;
    int n = cache->n_free;
    for (int step = -1; step <= 1; step += 2)
        for (int seq = 0; seq < ctx->desc.n_seq; seq++)
            for (int i = 0; i < llm__cache_blocks_for(cache->lengths[seq]) && llm__seq_may_drop(ctx, seq); i++) {
                int *n_users = &cache->n_users[llm__cache_table(cache, seq)[i]];
                *n_users += step;
                n += step < 0 && *n_users == 0;
            }
    return n;
}

/* Cuts the last block off the sequence that was used the longest time ago. */
static void llm__seq_drop_oldest(llm_context *ctx) {
    int oldest = -1;
    for (int seq = 0; seq < ctx->desc.n_seq; seq++)
        if (llm__seq_may_drop(ctx, seq) && (oldest < 0 || ctx->picked_at[seq] < ctx->picked_at[oldest])) oldest = seq;
    if (oldest < 0) return;
    llm__cache_truncate(&ctx->cache, oldest, (ctx->cache.lengths[oldest] - 1) / LLM_CACHE_BLOCK * LLM_CACHE_BLOCK);
}

/* Sees to it that n blocks are free. Returns false, and drops nothing, if there cannot be so many. */
static bool llm__seq_make_room(llm_context *ctx, int64_t n) {
    if (n <= ctx->cache.n_free) return true;
    if (n > llm__seq_blocks_to_have(ctx)) return false;
    while (ctx->cache.n_free < n) llm__seq_drop_oldest(ctx);
    return true;
}

/* The sequence for a prompt of n tokens: the longest that the prompt goes on from, else an empty one, else the one that
   was used the longest time ago. -1: the host or streams have all of them. */
static int llm__seq_pick(const llm_context *ctx, const llm_token *ids, int n) {
    int whole = -1, oldest = -1;
    const int *lengths = ctx->cache.lengths;
    for (int seq = 0; seq < ctx->desc.n_seq; seq++) {
        uint64_t used = lengths[seq] ? ctx->picked_at[seq] : 0;
        if (ctx->runs[seq] || (lengths[seq] && !used)) continue;
        if (lengths[seq] && llm__seq_common(ctx, seq, ids, n) == lengths[seq] &&
            (whole < 0 || lengths[seq] > lengths[whole]))
            whole = seq;
        if (oldest < 0 || used < (lengths[oldest] ? ctx->picked_at[oldest] : 0)) oldest = seq;
    }
    return whole >= 0 ? whole : oldest;
}

LLM_API int llm_seq_length(const llm_context *ctx, int seq) {
    if (llm__ctx_check_seq(ctx, seq, NULL)) return 0;
    return ctx->unsettled ? ctx->old_lengths[seq] : ctx->cache.lengths[seq];
}

LLM_API const llm_token *llm_seq_tokens(const llm_context *ctx, int seq) {
    return llm__ctx_check_seq(ctx, seq, NULL) ? NULL : llm__cache_tokens(&ctx->cache, seq);
}

LLM_API llm_status llm_seq_truncate(llm_context *ctx, int seq, int length, llm_error *err) {
    llm_status status = LLM__ENTER(ctx, err);
    if (!status) status = llm__ctx_claim_seq(ctx, seq, err);
    if (status) return status;
    if (length < 0 || length > ctx->cache.lengths[seq])
        return llm__error(err, LLM_ERROR_ARGUMENT, "sequence %d has %d tokens; it cannot be cut to %d", seq,
                          ctx->cache.lengths[seq], length);
    llm__cache_truncate(&ctx->cache, seq, length);
    return llm__error_done(err, LLM_OK);
}

LLM_API llm_status llm_seq_fork(llm_context *ctx, int seq, int parent, int length, llm_error *err) {
    llm_status status = LLM__ENTER(ctx, err);
    if (!status) status = llm__ctx_check_seq(ctx, parent, err);
    if (!status) status = llm__ctx_claim_seq(ctx, seq, err);
    if (status) return status;
    if (length < 0 || length > ctx->cache.lengths[parent])
        return llm__error(err, LLM_ERROR_ARGUMENT, "sequence %d has %d tokens; there is no fork at %d", parent,
                          ctx->cache.lengths[parent], length);
    if (seq == parent) llm__cache_truncate(&ctx->cache, seq, length);
    else llm__cache_fork(&ctx->cache, seq, parent, length);
    return llm__error_done(err, LLM_OK);
}

/* A saved sequence is this struct, then its tokens, then its blocks in the backend's format. */
typedef struct llm__seq_saved {
    char magic[8];
    uint64_t fingerprint, hash; /* of model and cache type; of everything after this struct */
    uint64_t length, size;
} llm__seq_saved;

static uint64_t llm__seq_fingerprint(const llm_context *ctx) {
    uint64_t hash = llm__hash_fnv(ctx->model->info.fingerprint, &ctx->desc.cache_dtype, sizeof ctx->desc.cache_dtype);
    return llm__hash_fnv(hash, ctx->model->backend->name, strlen(ctx->model->backend->name));
}

static size_t llm__seq_saved_size(const llm_context *ctx, size_t length) {
    size_t block = (size_t)ctx->model->backend->block_bytes(&ctx->model->shape, ctx->desc.cache_dtype);
    return sizeof(llm__seq_saved) + length * sizeof(llm_token) + (size_t)llm__cache_blocks_for((int)length) * block;
}

LLM_API size_t llm_seq_save_size(const llm_context *ctx, int seq) {
    return llm__seq_saved_size(ctx, (size_t)llm_seq_length(ctx, seq));
}

LLM_API llm_status llm_seq_save(const llm_context *ctx, int seq, void *buffer, size_t size, llm_error *err) {
    llm_status status =
        LLM__ENTER((llm_context *)(uintptr_t)ctx, err); /* not const, since it may have to end an abandoned call */
    if (!status) status = llm__ctx_check_seq(ctx, seq, err);
    if (status) return status;
    int length = ctx->cache.lengths[seq];
    size_t needed = llm__seq_saved_size(ctx, (size_t)length),
           block = llm__seq_saved_size(ctx, 1) - llm__seq_saved_size(ctx, 0) - sizeof(llm_token);
    if (size < needed)
        return llm__error(err, LLM_ERROR_ARGUMENT, "saving takes %llu bytes, but the buffer has %llu",
                          (unsigned long long)needed, (unsigned long long)size);
    llm__seq_saved head;
    memset(&head, 0, sizeof head);
    memcpy(head.magic, "llmcach2", 8);
    head.fingerprint = llm__seq_fingerprint(ctx);
    head.length = (uint64_t)length;
    head.size = needed;
    uint8_t *at = (uint8_t *)buffer + sizeof head;
    memcpy(at, llm__cache_tokens(&ctx->cache, seq), (size_t)length * sizeof(llm_token));
    at += (size_t)length * sizeof(llm_token);
    for (int i = 0; i < llm__cache_blocks_for(length); i++, at += block) {
        status = ctx->model->backend->read_block(ctx->device, llm__cache_table(&ctx->cache, seq)[i], at, err);
        if (status) return status;
    }
    head.hash = llm__hash_fnv(0, (const uint8_t *)buffer + sizeof head, needed - sizeof head);
    memcpy(buffer, &head, sizeof head);
    return llm__error_done(err, LLM_OK);
}

static llm_status llm__seq_check_saved(llm_context *ctx, int seq, const void *buffer, size_t size, llm__seq_saved *head,
                                       llm_error *err) {
    if (size < sizeof *head || memcmp(buffer, "llmcach2", 8))
        return llm__error(err, LLM_ERROR_FORMAT, "the buffer does not hold a saved sequence");
    memcpy(head, buffer, sizeof *head);
    if (head->fingerprint != llm__seq_fingerprint(ctx))
        return llm__error(err, LLM_ERROR_FORMAT, "the sequence was saved with another model or another type of cache");
    if (head->length > (uint64_t)ctx->desc.n_ctx)
        return llm__error(err, LLM_ERROR_CONTEXT_FULL, "the saved sequence has %llu tokens; this context holds %d",
                          (unsigned long long)head->length, ctx->desc.n_ctx);
    if (head->size != llm__seq_saved_size(ctx, (size_t)head->length) || size < head->size ||
        head->hash != llm__hash_fnv(0, (const uint8_t *)buffer + sizeof *head, (size_t)head->size - sizeof *head))
        return llm__error(err, LLM_ERROR_FORMAT, "the saved sequence is damaged");
    int own = 0; /* blocks that dropping the sequence would free */
    for (int i = 0; i < llm__cache_blocks_for(ctx->cache.lengths[seq]); i++)
        own += ctx->cache.n_users[llm__cache_table(&ctx->cache, seq)[i]] == 1;
    if (!llm__seq_make_room(ctx, llm__cache_blocks_for((int)head->length) - own))
        return llm__error(
            err, LLM_ERROR_CONTEXT_FULL, "the saved sequence needs %d positions of the cache, but %d are free",
            llm__cache_blocks_for((int)head->length) * LLM_CACHE_BLOCK, (ctx->cache.n_free + own) * LLM_CACHE_BLOCK);
    return LLM_OK;
}

LLM_API llm_status llm_seq_restore(llm_context *ctx, int seq, const void *buffer, size_t size, llm_error *err) {
    llm__seq_saved head;
    llm_status status = LLM__ENTER(ctx, err);
    if (!status) status = llm__ctx_claim_seq(ctx, seq, err);
    if (!status) status = llm__seq_check_saved(ctx, seq, buffer, size, &head, err);
    if (status) return status;
    const uint8_t *at = (const uint8_t *)buffer + sizeof head;
    size_t block = llm__seq_saved_size(ctx, 1) - llm__seq_saved_size(ctx, 0) - sizeof(llm_token);
    for (uint64_t i = 0; i < head.length; i++) {
        uint32_t token = llm__bytes_u32(at + 4 * i);
        if (token >= (uint32_t)ctx->model->shape.n_vocab)
            return llm__error(err, LLM_ERROR_FORMAT, "the saved sequence holds token %lu", (unsigned long)token);
    }
    llm__cache_truncate(&ctx->cache, seq, 0);
    for (uint64_t i = 0; i < head.length; i++)
        llm__cache_append(&ctx->cache, seq, (llm_token)llm__bytes_u32(at + 4 * i));
    at += head.length * sizeof(llm_token);
    for (int i = 0; i < llm__cache_blocks_for((int)head.length) && !status; i++, at += block)
        status = ctx->model->backend->write_block(ctx->device, llm__cache_table(&ctx->cache, seq)[i], at, err);
    if (status) llm__cache_truncate(&ctx->cache, seq, 0);
    return llm__error_done(err, status);
}

/* ---- llm_forward ---- */

static int llm__ctx_batch_seq(const llm_batch *batch, int i) { return batch->seqs ? batch->seqs[i] : 0; }

/* Number of blocks that appending n_new tokens to each sequence takes. If several sequences that share their last
   block are appended to, all but one must copy it. So we simulate the copies by decrementing n_users, then restore
   it. */
static int64_t llm__ctx_blocks_needed(llm_context *ctx) {
    llm__cache *cache = &ctx->cache;
    int64_t blocks = 0;
    for (int seq = 0; seq < ctx->desc.n_seq; seq++) {
        int *left = &ctx->first_row[seq]; /* the block that this sequence copies, or -1 */
        bool copies = ctx->n_new[seq] && llm__cache_must_copy(cache, seq);
        blocks += llm__cache_needs(cache, seq, ctx->n_new[seq]);
        *left = copies ? llm__cache_table(cache, seq)[cache->lengths[seq] / LLM_CACHE_BLOCK] : -1;
        if (copies) cache->n_users[*left]--;
    }
    for (int seq = 0; seq < ctx->desc.n_seq; seq++)
        if (ctx->first_row[seq] >= 0) cache->n_users[ctx->first_row[seq]]++;
    return blocks;
}

/* Checks everything that could fail, before any work is done. Sets n_new of each sequence. */
static llm_status llm__ctx_check_batch(llm_context *ctx, const llm_batch *batch, llm_error *err) {
    llm__cache *cache = &ctx->cache;
    int n_logits = 0, n_touched = 0;
    if (batch->n_tokens <= 0 || !batch->tokens) return llm__error(err, LLM_ERROR_ARGUMENT, "the batch has no tokens");
    memset(ctx->n_new, 0, (size_t)ctx->desc.n_seq * sizeof(int));
    for (int i = 0; i < batch->n_tokens; i++) {
        llm_status status = llm__ctx_check_seq(ctx, llm__ctx_batch_seq(batch, i), err);
        if (status) return status;
        if (batch->tokens[i] < 0 || batch->tokens[i] >= ctx->model->shape.n_vocab)
            return llm__error(err, LLM_ERROR_ARGUMENT, "token %d of the batch is %ld; the vocabulary has %d", i,
                              (long)batch->tokens[i], ctx->model->shape.n_vocab);
        n_touched += ctx->n_new[llm__ctx_batch_seq(batch, i)]++ == 0;
        n_logits += batch->logits ? batch->logits[i] : 0;
    }
    if (!batch->logits) n_logits = n_touched;
    for (int seq = 0; seq < ctx->desc.n_seq; seq++)
        if ((int64_t)cache->lengths[seq] + ctx->n_new[seq] > ctx->desc.n_ctx)
            return llm__error(err, LLM_ERROR_CONTEXT_FULL,
                              "sequence %d has %d tokens and is to get %d more, but holds %d (n_ctx)", seq,
                              cache->lengths[seq], ctx->n_new[seq], ctx->desc.n_ctx);
    int64_t blocks = llm__ctx_blocks_needed(ctx);
    if (!llm__seq_make_room(ctx, blocks))
        return llm__error(err, LLM_ERROR_CONTEXT_FULL,
                          "the batch needs %lld positions of the cache, but %d are free (n_cache)",
                          (long long)blocks * LLM_CACHE_BLOCK, cache->n_free * LLM_CACHE_BLOCK);
    if (n_logits > ctx->desc.n_logits && !ctx->targets)
        return llm__error(err, LLM_ERROR_ARGUMENT,
                          "the logits of %d tokens are wanted; the context holds %d (n_logits)", n_logits,
                          ctx->desc.n_logits);
    return LLM_OK;
}

/* Appends tokens [first, first + n) of the batch to their sequences and orders them by sequence. n_new counts down, so
   that the last token of each sequence is known. */
static void llm__ctx_build_pass(llm_context *ctx, const llm_batch *batch, int first, int n, llm_backend_pass *pass) {
    int n_seq = ctx->desc.n_seq;
    memset(ctx->first_row, 0, (size_t)(n_seq + 1) * sizeof(int));
    for (int i = first; i < first + n; i++) ctx->first_row[llm__ctx_batch_seq(batch, i) + 1]++;
    for (int seq = 0; seq < n_seq; seq++) ctx->first_row[seq + 1] += ctx->first_row[seq];
    for (int i = first; i < first + n; i++) {
        int seq = llm__ctx_batch_seq(batch, i), row = ctx->first_row[seq]++;
        bool last = --ctx->n_new[seq] == 0;
        ctx->tokens[row] = batch->tokens[i];
        ctx->seqs[row] = seq;
        ctx->positions[row] = ctx->cache.lengths[seq];
        ctx->batch_index[row] = (batch->logits ? batch->logits[i] : last) ? i : -1;
        llm__cache_append(&ctx->cache, seq, batch->tokens[i]);
    }
    memset(pass, 0, sizeof *pass);
    pass->n_rows = n;
    pass->tokens = ctx->tokens;
    pass->positions = ctx->positions;
    pass->seqs = ctx->seqs;
    pass->logit_rows = ctx->logit_rows;
    pass->first_logits = ctx->n_logits;
    pass->blocks = ctx->cache.tables;
    pass->blocks_per_seq = ctx->cache.blocks_per_seq;
    for (int row = 0; row < n; row++) {
        if (ctx->batch_index[row] < 0) continue;
        ctx->logit_rows[pass->n_logits++] = row;
        ctx->logits_of[ctx->n_logits++] = ctx->batch_index[row];
    }
}

/* Orders the targets as llm__ctx_build_pass has ordered the rows. */
static void llm__ctx_place_targets(llm_context *ctx, llm_backend_pass *pass) {
    llm__ctx_targets *t = ctx->targets;
    t->n = 0;
    for (int row = 0; row < pass->n_logits; row++)
        for (int i = t->first[ctx->logits_of[row]]; i < t->first[ctx->logits_of[row] + 1]; i++) {
            t->pass_ids[t->n] = t->ids[i];
            t->pass_rows[t->n] = row;
            t->from[t->n++] = i;
        }
    pass->n_targets = t->n;
    pass->targets = t->pass_ids;
    pass->target_rows = t->pass_rows;
    pass->log_probs = t->log_probs;
    pass->stopped = ctx->backend_desc.pipeline ? &t->stopped : NULL;
}

static llm_status llm__ctx_forward_passes(llm_context *ctx, const llm_batch *batch, bool keep, llm_error *err) {
    const llm_backend *backend = ctx->model->backend;
    for (int seq = 0; seq < ctx->desc.n_seq; seq++) {
        int shared = ctx->n_new[seq] ? llm__cache_unshare(&ctx->cache, seq) : -1;
        if (shared < 0 || (ctx->targets && ctx->targets->count_only)) continue;
        int own = llm__cache_table(&ctx->cache, seq)[ctx->cache.lengths[seq] / LLM_CACHE_BLOCK];
        llm_status status = backend->copy_block(ctx->device, own, shared, err);
        if (status) return status;
    }
    for (int first = 0; first < batch->n_tokens; first += ctx->desc.n_batch) {
        llm_backend_pass pass;
        int n = batch->n_tokens - first < ctx->desc.n_batch ? batch->n_tokens - first : ctx->desc.n_batch;
        llm__ctx_build_pass(ctx, batch, first, n, &pass);
        pass.cancel = ctx->cancel ? llm__ctx_poll_host : NULL;
        pass.cancel_user = ctx;
        pass.more = first + n < batch->n_tokens;
        if (ctx->targets) llm__ctx_place_targets(ctx, &pass);
        if (ctx->targets && ctx->targets->count_only) continue;
        llm_status status = backend->forward(ctx->device, &pass, err);
        if (status) return status;
        /* A pipeline's passes of a call that was cancelled go on to its end, with nothing in them. */
        if (keep && !ctx->backend_desc.pipeline)
            memcpy(ctx->old_lengths, ctx->cache.lengths, (size_t)ctx->desc.n_seq * sizeof(int));
    }
    return LLM_OK;
}

/* `keep`: if it fails, the tokens of the finished passes stay in the sequences. */
static llm_status llm__ctx_forward(llm_context *ctx, const llm_batch *batch, bool keep, bool (*cancel)(void *user),
                                   void *user, llm_error *err) {
    llm_status status = llm__ctx_check_batch(ctx, batch, err);
    if (status) return status;
    memcpy(ctx->old_lengths, ctx->cache.lengths, (size_t)ctx->desc.n_seq * sizeof(int));
    ctx->unsettled = true;
    ctx->n_logits = 0;
    ctx->cancel = cancel;
    ctx->cancel_user = user;
    status = llm__ctx_forward_passes(ctx, batch, keep, err);
    if (status) llm__ctx_roll_back(ctx);
    ctx->unsettled = false;
    return status;
}

LLM_API llm_status llm_forward(llm_context *ctx, const llm_batch *batch, llm_error *err) {
    if (!ctx || !batch) return llm__error(err, LLM_ERROR_ARGUMENT, "ctx or batch is NULL");
    llm_status status = LLM__ENTER(ctx, err);
    for (int i = 0; i < batch->n_tokens && batch->tokens && !status; i++)
        status = llm__ctx_claim_seq(ctx, llm__ctx_batch_seq(batch, i), err);
    if (status) return status;
    return llm__error_done(err, llm__ctx_forward(ctx, batch, false, ctx->desc.cancel, ctx->desc.cancel_user, err));
}

LLM_API const float *llm_logits(const llm_context *ctx, int i) {
    for (int j = 0; j < ctx->n_logits; j++)
        if (ctx->logits_of[j] == i) return ctx->model->backend->logits(ctx->device, j);
    return NULL;
}

/* ==== 21 Sampler ================================================================================================

   Logits become a probability distribution, from which one token is drawn. The order is: biases, repetition penalty,
   temperature, top-k, top-p, min-p. All arithmetic is fixed, so a seed gives the same text everywhere. Top-p is from
   Holtzman et al. 2019 (arXiv:1904.09751), min-p from Nguyen et al. 2024 (2407.01082), the penalty from Keskar et al.
   2019 (1909.05858). */

static void llm__sampler_apply_biases(float *logits, int n_vocab, const llm_sampler *s) {
    for (int i = 0; i < s->n_biases; i++)
        if (s->biases[i].token >= 0 && s->biases[i].token < n_vocab) logits[s->biases[i].token] += s->biases[i].bias;
}

static bool llm__sampler_has_penalty(const llm_sampler *s) { return s->repeat_penalty > 0 && s->repeat_penalty != 1; }

/* Penalises each token once, however often it occurs in the window. `seen` [n_vocab] is scratch. */
static void llm__sampler_apply_penalty(float *logits, const llm_token *tokens, int n, const llm_sampler *s,
                                       llm_token *seen) {
    int window = s->repeat_window > 0 ? s->repeat_window : 64, first = n > window ? n - window : 0;
    for (int i = first; i < n; i++) seen[tokens[i]] = 0;
    for (int i = first; i < n; i++) {
        float *logit = &logits[tokens[i]];
        if (seen[tokens[i]]++) continue;
        *logit = *logit > 0 ? *logit / s->repeat_penalty : *logit * s->repeat_penalty;
    }
}

/* The token with the largest logit, the lower id of equals. Returns -1 if a logit is NaN. */
static llm_token llm__sampler_argmax(const llm__kernels *kernels, const float *logits, int n, float *maxima) {
    float largest = -INFINITY;
    int best = 0;
    if (!kernels->maxima(logits, n, maxima)) return -1;
    for (int i = 0; i * LLM__MAX_RUN < n; i++) {
        if (!(maxima[i] > largest)) continue;
        largest = maxima[i];
        best = i * LLM__MAX_RUN;
    }
    while (logits[best] != largest) best++;
    return best;
}

static void llm__sampler_swap_ids(llm_token *ids, int i, int j) {
    llm_token moved = ids[i];
    ids[i] = ids[j];
    ids[j] = moved;
}

/* Larger for the likelier token, and among equals for the one of the lower id. */
static uint64_t llm__sampler_key(const float *p, llm_token id) {
    return (uint64_t)llm__f32_bits(p[id]) << 32 | (uint32_t)~id;
}

/* Which of 1,024 bins a token is in: by ten bits of its key. */
static int llm__sampler_bin(const float *p, llm_token id, int shift) {
    return (int)(llm__sampler_key(p, id) >> shift & 1023);
}

/* Moves the most likely of the last n of `ids` [n_vocab] to the end: at most `most`, and as few as reach `mass`
   together. Returns how many. The last is the best, and the first the worst if `mass` is what ends them. Only the bin
   through which the cut goes is split again, by the next bits, until few tokens are left: sorting a whole vocabulary
   takes longer than a token of a small model. */
static int llm__sampler_keep_likeliest(const float *p, llm_token *ids, int n_vocab, int n, int most, double mass) {
    enum { FEW = 64 }; /* they are taken one by one */
    struct {
        double mass;
        int count;
    } bins[1024];
    int begin = n_vocab - n, end = n_vocab, kept = 0;
    double sum = 0;
    for (int shift = 52; end - begin > FEW && shift > 0; shift -= 10) { /* a p from 0 to 1 has 30 bits */
        int bin = 1023, left = end - begin;
        memset(bins, 0, sizeof bins);
        for (int i = begin; i < end; i++) {
            bins[llm__sampler_bin(p, ids[i], shift)].mass += p[ids[i]];
            bins[llm__sampler_bin(p, ids[i], shift)].count++;
        }
        for (; bins[bin].count < left && kept + bins[bin].count <= most && sum + bins[bin].mass < mass; bin--) {
            left -= bins[bin].count;
            kept += bins[bin].count;
            sum += bins[bin].mass;
        }
        int first = begin;
        for (int i = end - 1; i >= first; i--)
            if (llm__sampler_bin(p, ids[i], shift) > bin) llm__sampler_swap_ids(ids, i, --end);
        begin = end;
        for (int i = end - 1; i >= first; i--)
            if (llm__sampler_bin(p, ids[i], shift) == bin) llm__sampler_swap_ids(ids, i, --begin);
    }
    for (; begin < end && kept < most && sum < mass; kept++) {
        int best = begin;
        for (int i = begin + 1; i < end; i++)
            if (llm__sampler_key(p, ids[i]) > llm__sampler_key(p, ids[best])) best = i;
        llm__sampler_swap_ids(ids, best, --end);
        sum += p[ids[end]];
    }
    return kept;
}

/* The tokens that may be drawn, and their p, which sum to `total`. */
typedef struct llm__sampler_choice {
    float *p;            /* [n_vocab] */
    llm_token *ids;      /* [n_vocab] the last n are the candidates, the best of them last. Scratch if n is n_vocab */
    const float *maxima; /* [n_vocab / LLM__MAX_RUN, rounded up] an upper bound of the p of each run */
    int n_vocab, n;      /* n is 0 if no token can be drawn; see `status` */
    llm_token best;
    double total;
    llm_status status;
} llm__sampler_choice;

/* Token i of a choice. The best comes first, unless the choice holds all tokens. */
static llm_token llm__sampler_choice_id(const llm__sampler_choice *c, int i) {
    return c->n == c->n_vocab ? i : c->ids[c->n_vocab - 1 - i];
}

/* Moves the tokens with p >= `least` to the end of ids, the best one last, the others in order. Returns how many there
   are. */
static int llm__sampler_gather(const llm__sampler_choice *c, float least) {
    int n = 0;
    for (int run = (c->n_vocab - 1) / LLM__MAX_RUN; run >= 0; run--) {
        int first = run * LLM__MAX_RUN, end = first + LLM__MAX_RUN < c->n_vocab ? first + LLM__MAX_RUN : c->n_vocab;
        if (c->maxima[run] < least) continue;
        for (int i = end - 1; i >= first; i--) {
            c->ids[c->n_vocab - 1 - n] = i;
            n += c->p[i] >= least;
        }
    }
    for (int i = c->n_vocab - n; i < c->n_vocab; i++)
        if (c->ids[i] == c->best) llm__sampler_swap_ids(c->ids, i, c->n_vocab - 1);
    return n;
}

/* A bound for p that at least n tokens reach, and not many more: at least n runs have a maximum that reaches it.
   Returns 0 if there are fewer runs than that. */
static float llm__sampler_bound_of(const llm__sampler_choice *c, int n) {
    uint32_t bits = 0;
    for (uint32_t bit = 1u << 30; bit >= 1u << 18; bit >>= 1) { /* floats above 0 have the same order as their bits */
        float bound = llm__f32_from_bits(bits | bit);
        int n_runs = 0;
        for (int run = 0; run * LLM__MAX_RUN < c->n_vocab; run++) n_runs += c->maxima[run] >= bound;
        if (n_runs >= n) bits |= bit;
    }
    return llm__f32_from_bits(bits);
}

/* Gathers the most likely tokens: `most` of them or more, or as many as reach `mass` together, or all with p above 0
   and at least `least`. Most tokens of a vocabulary are far too unlikely, so the search starts with a high bound. */
static int llm__sampler_gather_likely(const llm__sampler_choice *c, int most, double mass, float least) {
    float bound = most < c->n_vocab ? llm__sampler_bound_of(c, most) : mass < INFINITY ? c->p[c->best] / 1024 : least;
    if (bound == 0) bound = c->p[c->best] / 1024;
    if (least < FLT_MIN) least = FLT_MIN;
    for (;; bound /= 1024) {
        double sum = 0;
        if (bound < least) bound = least;
        int n = llm__sampler_gather(c, bound);
        if (n >= most || bound == least) return n;
        for (int i = c->n_vocab - n; i < c->n_vocab && mass < INFINITY; i++) sum += c->p[c->ids[i]];
        if (sum > mass * (1 + 1e-12)) return n; /* true for any order of summation */
    }
}

/* The sum of all p. Eight partial sums keep an addition from waiting for the one before. */
static double llm__sampler_total_of(const float *p, int n) {
    double sums[8] = {0};
    int i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) sums[j] += p[i + j];
    for (; i < n; i++) sums[0] += p[i];
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

/* Reduces a choice of all tokens, whose p sum to `sum`, to those that may be drawn. */
static void llm__sampler_cut_candidates(llm__sampler_choice *c, const llm_sampler *s, double sum) {
    const float *p = c->p, best = p[c->best];
    int n_vocab = c->n_vocab;
    bool by_k = s->top_k > 0 && s->top_k < n_vocab;
    bool by_p = s->top_p > 0 && s->top_p < 1;
    bool by_min = s->min_p > 0;
    if (!by_k && !by_p && !by_min) {
        c->total = llm__sampler_total_of(p, n_vocab);
        return;
    }
    float least = by_min && !by_k ? s->min_p * best : 0;
    if (least > best) least = best;
    int n = llm__sampler_gather_likely(c, by_k ? s->top_k : n_vocab, by_p && !by_k ? (double)s->top_p * sum : INFINITY,
                                       least);
    if (by_k) n = llm__sampler_keep_likeliest(p, c->ids, n_vocab, n, s->top_k, INFINITY);
    if (by_k && by_p) { /* top-p applies to what top-k kept */
        sum = 0;
        for (int i = 1; i <= n; i++) sum += p[c->ids[n_vocab - i]];
    }
    if (by_p) n = llm__sampler_keep_likeliest(p, c->ids, n_vocab, n, n, (double)s->top_p * sum);
    c->n = 0;
    c->total = 0;
    for (int i = 1; i <= n; i++) {
        float next = p[c->ids[n_vocab - i]];
        if (by_min && next < (double)s->min_p * best && c->n) continue;
        c->total += next;
        llm__sampler_swap_ids(c->ids, n_vocab - i, n_vocab - ++c->n);
    }
}

/* A number in [0, 1) from the seed and a counter (splitmix64: Steele, Lea and Flood 2014). */
static double llm__sampler_random(llm_sampler *s) {
    uint64_t z = s->seed + ++s->n_drawn * 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (double)((z ^ z >> 31) >> 11) * (1.0 / 9007199254740992.0);
}

/* The token at which the sum of p, from the most likely on, first exceeds the fraction `at` of the total. */
static llm_token llm__sampler_draw(const llm__sampler_choice *c, double at) {
    double mass = nextafter(at * c->total, INFINITY);
    int n = c->n < c->n_vocab ? c->n : llm__sampler_gather_likely(c, c->n_vocab, mass, 0);
    int kept = llm__sampler_keep_likeliest(c->p, c->ids, c->n_vocab, n, n, mass);
    return kept ? c->ids[c->n_vocab - kept] : c->best; /* rounding left a little over */
}

static bool llm__sampler_is_greedy(const llm_sampler *sampler) { return !(sampler->temperature >= 1e-30f); }

/* A choice with this token alone. */
static llm__sampler_choice llm__sampler_choose_one(llm__sampler_choice c, llm_token token) {
    c.ids[c.n_vocab - 1] = c.best = token;
    c.p[token] = 1;
    c.n = 1;
    c.total = 1;
    return c;
}

/* The choice for the token after `tokens`, from its logits. Valid until the next choice with this scratch. */
static llm__sampler_choice llm__sampler_choose(const llm_context *ctx, const llm__sampler_scratch *scratch,
                                               const float *logits, const llm_token *tokens, int n_tokens,
                                               const llm_sampler *sampler, llm_error *err) {
    const llm__kernels *kernels = ctx->model->kernels;
    int n_vocab = ctx->model->shape.n_vocab;
    float *p = scratch->probabilities;
    llm__sampler_choice choice = {p, scratch->candidates, scratch->maxima, n_vocab, 0, 0, 0, LLM_OK};
    if (sampler->n_biases > 0 && !sampler->biases) {
        choice.status = llm__error(err, LLM_ERROR_ARGUMENT, "the sampler's n_biases is %d, but its biases are NULL",
                                   sampler->n_biases);
        return choice;
    }
    if (sampler->n_biases > 0 || llm__sampler_has_penalty(sampler)) {
        logits = (const float *)memcpy(p, logits, (size_t)n_vocab * sizeof *p);
        llm__sampler_apply_biases(p, n_vocab, sampler);
        if (llm__sampler_has_penalty(sampler))
            llm__sampler_apply_penalty(p, tokens, n_tokens, sampler, scratch->candidates);
    }
    choice.best = llm__sampler_argmax(kernels, logits, n_vocab, scratch->maxima);
    float top = choice.best < 0 ? NAN : logits[choice.best];
    if (choice.best < 0)
        choice.status = llm__error(err, LLM_ERROR_FORMAT,
                                   "after %d tokens a logit is not a number (NaN): the model's weights are damaged, or "
                                   "a bias is NaN, or +INFINITY and -INFINITY meet",
                                   n_tokens);
    else if (top == -INFINITY)
        choice.status =
            llm__error(err, LLM_ERROR_ARGUMENT,
                       "all tokens are forbidden after %d tokens: the sampler's biases are -INFINITY", n_tokens);
    if (choice.status) return choice;
    if (llm__sampler_is_greedy(sampler) || top == INFINITY) return llm__sampler_choose_one(choice, choice.best);
    uint64_t mode = llm__fpu_enter();
    float sum = kernels->odds(logits, n_vocab, top, LLM__LOG2_E / sampler->temperature, p, scratch->maxima);
    llm__fpu_leave(mode);
    choice.n = n_vocab;
    llm__sampler_cut_candidates(&choice, sampler, sum);
    return choice;
}

static llm_token llm__sampler_draw_choice(const llm__sampler_choice *c, llm_sampler *sampler) {
    if (llm__sampler_is_greedy(sampler)) return c->best;
    return llm__sampler_draw(c, llm__sampler_random(sampler));
}

LLM_API llm_token llm_sample(llm_context *ctx, int i, int seq, llm_sampler *sampler) {
    const float *logits = llm_logits(ctx, i);
    llm_sampler greedy;
    memset(&greedy, 0, sizeof greedy);
    if (!sampler) sampler = &greedy;
    if (!logits || LLM__ENTER(ctx, NULL)) return -1;
    llm__sampler_choice choice = llm__sampler_choose(ctx, ctx->scratch, logits, llm_seq_tokens(ctx, seq),
                                                     llm_seq_length(ctx, seq), sampler, NULL);
    return choice.n ? llm__sampler_draw_choice(&choice, sampler) : -1;
}

/* ==== 22 Speculative decoding ===================================================================================

   A pass for a few tokens reads the weights once, like a pass for one token. So guessed tokens can be checked almost
   for free. In each round the draft guesses some tokens, and the model computes the last token and the guesses in one
   pass. Tokens are drawn from its logits for as long as they equal the guesses. The remaining guesses are removed from
   the cache. Leviathan et al. 2023 (arXiv:2211.17192), Chen et al. 2023 (2302.01318); prompt lookup: Saxena 2023. */

/* ---- How many guesses are worth it ---- */

enum {
    LLM__DRAFT_PLAIN = 64,  /* every so many passes one is plain, to measure its time again */
    LLM__DRAFT_FORGET = 512 /* after so many passes the time of a size is forgotten */
};

static const int llm__spec_rows[LLM_DRAFT_LEARNT_SIZES] = {1, 2, 4, 8, 16};

static void llm__spec_add_time(llm_draft_learnt_times *t, double seconds) {
    t->recent[t->n % LLM_DRAFT_LEARNT_TIMES] = (float)seconds;
    t->n = t->n + 1 < 2 * LLM_DRAFT_LEARNT_TIMES ? t->n + 1 : (int)LLM_DRAFT_LEARNT_TIMES;
    t->age = 0;
}

/* The median of the recent times. With fewer than three it is the smallest, so that one interruption does not count as
   the usual time. */
static double llm__spec_usual_time(const llm_draft_learnt_times *t) {
    float sorted[LLM_DRAFT_LEARNT_TIMES];
    int n = t->n < LLM_DRAFT_LEARNT_TIMES ? t->n : (int)LLM_DRAFT_LEARNT_TIMES;
    for (int i = 0; i < n; i++) {
        int at = i;
        for (; at > 0 && sorted[at - 1] > t->recent[i]; at--) sorted[at] = sorted[at - 1];
        sorted[at] = t->recent[i];
    }
    return n ? (double)sorted[n < 3 ? 0 : n / 2] : 0;
}

/* Seconds of a pass of each size. A size that was not measured lately gets an estimate. */
static void llm__spec_pass_times(const llm_draft_learnt *s, double seconds[LLM_DRAFT_LEARNT_SIZES]) {
    static const double usual[LLM_DRAFT_LEARNT_SIZES] = {1, 1.1, 1.2, 1.5, 2.5};
    for (int i = 0; i < LLM_DRAFT_LEARNT_SIZES; i++)
        seconds[i] = s->passes[i].n ? llm__spec_usual_time(&s->passes[i]) : usual[i] * seconds[0];
}

/* The number of guesses of a kind, up to `most`, that gives the most tokens per second. The chance that a guess is
   right, if all before it are, is estimated from earlier guesses at the same place. With little data it is like that
   of the guess before it, and for the first guess like that of the kind below. */
static int llm__spec_best_guesses(const llm_draft_learnt *s, const double *pass_seconds, int kind, int most,
                                  double guess_seconds) {
    double chance = 0.1, all_right = 1, tokens = 1, best_rate = 1 / pass_seconds[0];
    int best = 0;
    for (int i = 0; i < kind; i++) chance = ((double)s->n_right[i][0] + 2 * chance) / ((double)s->n_known[i][0] + 2);
    for (int size = 1; size < LLM_DRAFT_LEARNT_SIZES && llm__spec_rows[size] - 1 <= most; size++) {
        int n = llm__spec_rows[size] - 1;
        for (int i = llm__spec_rows[size - 1] - 1; i < n; i++) {
            chance = ((double)s->n_right[kind][i] + 2 * chance) / ((double)s->n_known[kind][i] + 2);
            all_right *= chance;
            tokens += all_right;
        }
        double rate = tokens / (pass_seconds[size] + n * guess_seconds);
        if (rate <= 1.02 * best_rate) continue; /* less than 2 % is within the noise of the times */
        best_rate = rate;
        best = n;
    }
    return best;
}

/* ---- A generation's rounds ---- */

typedef struct llm__spec {
    llm_draft *draft; /* NULL if there is none, or if it failed */
    llm_context *ctx;
    int seq, most;
    llm_sampler *sampler;
    bool (*cancel)(void *user);
    void *cancel_user;
    llm_draft_guesses guesses;
    float *q[LLM_DRAFT_MAX]; /* room for guesses.q, or NULL */
    int n_checked;           /* number of guesses in the pass that the logits belong to */
    llm_draft_stats *stats;
} llm__spec;

/* Decides how many guesses of each kind to request. Returns false if guessing has not paid off so far. It is then
   tried again in two consecutive rounds (the time of the second one counts) whenever all trials took less than 1 % of
   the time. */
static bool llm__spec_plan_round(llm_draft_learnt *s, const double *pass_seconds, int most, int wanted[LLM_DRAFT_KINDS],
                                 bool *trial) {
    bool known = s->guess.n > 0;
    double guess_seconds = known ? llm__spec_usual_time(&s->guess) : pass_seconds[0] / 2;
    bool cheap = known && guess_seconds < 0.01 * pass_seconds[0], pays = false;
    for (int kind = 0; kind < LLM_DRAFT_KINDS; kind++) {
        wanted[kind] = llm__spec_best_guesses(s, pass_seconds, kind, most, guess_seconds);
        pays = pays || (wanted[kind] && s->n_known[kind][0] > 0); /* a kind that never occurred tells nothing */
    }
    *trial = !pays && !cheap;
    if (*trial && s->n_in_step != 1 && s->trial_seconds > 0.01 * s->seconds) return false;
    /* One more than will be checked: the text shows later whether it was right. */
    for (int kind = 0; kind < LLM_DRAFT_KINDS; kind++)
        if ((cheap || *trial) && wanted[kind] < most) wanted[kind]++;
    return true;
}

/* Cuts the draft's guesses to the number requested. `with_q`: room for probabilities was offered. The kind may depend
   on the draw, so it must not decide how many guesses drawn from q are checked. */
static void llm__spec_trim_guesses(llm_draft_guesses *g, const int *wanted, int n_vocab, bool with_q) {
    g->has_q = g->has_q && with_q;
    if (g->kind < 0 || g->kind >= LLM_DRAFT_KINDS || g->has_q) g->kind = 0;
    if (g->n > wanted[g->kind]) g->n = wanted[g->kind];
    for (int i = 0; i < g->n; i++)
        if (g->tokens[i] < 0 || g->tokens[i] >= n_vocab) g->n = i;
    if (g->n < 0) g->n = 0;
    for (int i = 0; i < g->n; i++) g->has_q = g->has_q && g->q[i];
}

static llm_status llm__spec_call_draft(llm__spec *sp, llm_token last, const int *wanted, llm_error *err) {
    llm_context *ctx = sp->ctx;
    llm_error why;
    int length = ctx->cache.lengths[sp->seq];
    llm_token *text = llm__cache_tokens(&ctx->cache, sp->seq);
    text[length] = last; /* there is room, and the pass will put it there anyway */
    llm_draft_request request = {ctx, sp->seq, text, length + 1, wanted, sp->sampler, sp->cancel, sp->cancel_user};
    memcpy(sp->guesses.q, sp->q, sizeof sp->q);
    memset(&why, 0, sizeof why);
    llm__ctx_begin_callback(ctx);
    llm_status status = sp->draft->propose(sp->draft->user, &request, &sp->guesses, &why);
    llm__ctx_end_callback(ctx);
    if (llm__ranks_any(ctx->backend_desc.tensor, ctx->backend_desc.pipeline, status == LLM_ERROR_CANCELLED))
        return llm__error(err, LLM_ERROR_CANCELLED, "the draft was cancelled");
    if (status) {
        llm__ctx_begin_callback(ctx);
        llm__log(&ctx->desc.host, "decoding goes on without the draft %s: %s", sp->draft->name, why.message);
        llm__ctx_end_callback(ctx);
        sp->draft = NULL;
        sp->guesses.n = 0;
        sp->stats->failed = true;
    }
    llm__spec_trim_guesses(&sp->guesses, wanted, ctx->model->shape.n_vocab, sp->q[0] != NULL);
    return LLM_OK;
}

/* Lets the draft guess what follows `last`, the token after the sequence, and sets n_checked: how many guesses the
   next pass checks, at most `most`. */
static llm_status llm__spec_guess(llm__spec *sp, llm_token last, int most, llm_error *err) {
    int wanted[LLM_DRAFT_KINDS];
    double pass_seconds[LLM_DRAFT_LEARNT_SIZES], start = llm__clock_now();
    bool trial;
    sp->n_checked = 0;
    memset(&sp->guesses, 0, sizeof sp->guesses);
    if (!sp->draft) return LLM_OK;
    llm_draft_learnt *s = &sp->draft->learnt;
    for (int i = 0; i < LLM_DRAFT_LEARNT_SIZES; i++)
        if (s->passes[i].age < LLM__DRAFT_FORGET) s->passes[i].age++;
        else if (i) s->passes[i].n = 0; /* times change, so measure again */
    if (most > sp->most) most = sp->most;
    /* Now and then a plain pass, to measure its time. */
    if (most < 1 || !s->passes[0].n || s->passes[0].age > LLM__DRAFT_PLAIN) return LLM_OK;
    llm__spec_pass_times(s, pass_seconds);
    if (!llm__spec_plan_round(s, pass_seconds, most, wanted, &trial)) {
        s->n_in_step = 0;
        return LLM_OK;
    }
    /* Guesses drawn from probabilities: the number to check is fixed before the first one is drawn. If it depended on
       the draws, the text would follow another distribution. */
    int planned = llm__spec_best_guesses(s, pass_seconds, 0, most, 0);
    llm_status status = llm__spec_call_draft(sp, last, wanted, err);
    double took = llm__ranks_first_seconds(sp->ctx->backend_desc.tensor, sp->ctx->backend_desc.pipeline,
                                           llm__clock_now() - start);
    sp->stats->draft_seconds += took;
    s->seconds += took;
    if (trial) s->trial_seconds += took;
    if (status) return status;
    /* After a pause the draft first had to catch up with the text, so that time is not counted. */
    if (s->n_in_step && sp->guesses.n) llm__spec_add_time(&s->guess, took / sp->guesses.n);
    s->n_in_step = s->n_in_step < 2 ? s->n_in_step + 1 : 2;
    if (sp->guesses.n < most) most = sp->guesses.n;
    if (sp->guesses.has_q) sp->n_checked = planned < most ? planned : most;
    else sp->n_checked = llm__spec_best_guesses(s, pass_seconds, sp->guesses.kind, most, 0);
    return LLM_OK;
}

/* Records the time of a pass. `usual`: it had no part of a prompt, so the next pass will take about as long. */
static void llm__spec_time_pass(llm__spec *sp, double seconds, bool usual) {
    int size = 0;
    sp->stats->pass_seconds += seconds;
    if (!sp->draft || !usual) return;
    seconds = llm__ranks_first_seconds(sp->ctx->backend_desc.tensor, sp->ctx->backend_desc.pipeline, seconds);
    while (llm__spec_rows[size] < sp->n_checked + 1) size++;
    llm__spec_add_time(&sp->draft->learnt.passes[size], seconds);
    sp->draft->learnt.seconds += seconds;
}

/* The probability of a token. */
static double llm__spec_choice_p(const llm__sampler_choice *c, llm_token token) {
    for (int i = 0; i < c->n; i++)
        if (llm__sampler_choice_id(c, i) == token) return c->p[token] / c->total;
    return 0;
}

/* Draws a token with probability proportional to max(0, p - q). */
static llm_token llm__spec_draw_rest(const llm__sampler_choice *c, const float *q, llm_sampler *sampler) {
    double sum = 0;
    for (int i = 0; i < c->n; i++) {
        llm_token id = llm__sampler_choice_id(c, i);
        double rest = c->p[id] / c->total - q[id];
        if (rest > 0) sum += rest;
    }
    double at = llm__sampler_random(sampler) * sum;
    for (int i = 0; i < c->n; i++) {
        llm_token id = llm__sampler_choice_id(c, i);
        double rest = c->p[id] / c->total - q[id];
        if (rest > 0) at -= rest;
        if (rest > 0 && at < 0) return id;
    }
    return c->best; /* nothing is left, or rounding left a little over */
}

/* Draws the token that follows position length - 1 of the sequence from the logits at `row`, counted from `first`, the
   first row of this sequence in the pass. *right: it equals the guess, so the next row's logits are valid, too. */
static llm_status llm__spec_draw_checked(llm__spec *sp, const llm__sampler_scratch *scratch, int first, int row,
                                         int length, llm_token *token, bool *right, llm_error *err) {
    const llm_draft_guesses *g = &sp->guesses;
    bool guessed = row < g->n;
    llm_token guess = guessed ? g->tokens[row] : -1;
    llm__sampler_choice choice = llm__sampler_choose(sp->ctx, scratch, llm_logits(sp->ctx, first + row),
                                                     llm_seq_tokens(sp->ctx, sp->seq), length, sp->sampler, err);
    if (choice.status) return choice.status;
    if (row < sp->n_checked && g->has_q && !llm__sampler_is_greedy(sp->sampler)) {
        *right = llm__sampler_random(sp->sampler) * g->q[row][guess] < llm__spec_choice_p(&choice, guess);
        *token = *right ? guess : llm__spec_draw_rest(&choice, g->q[row], sp->sampler);
    } else {
        *token = llm__sampler_draw_choice(&choice, sp->sampler);
        *right = guessed && *token == guess;
    }
    if (guessed && sp->draft) {
        float *n_right = &sp->draft->learnt.n_right[g->kind][row], *n_known = &sp->draft->learnt.n_known[g->kind][row];
        *n_right = 0.95f * *n_right + (*right ? 1.0f : 0.0f);
        *n_known = 0.95f * *n_known + 1.0f;
    }
    *right = *right && row < sp->n_checked;
    return LLM_OK;
}

static void llm__spec_count_pass(llm__spec *sp, int n_right) {
    llm_draft_stats *stats = sp->stats;
    if (!sp->n_checked) return;
    stats->n_passes++;
    stats->n_proposed += sp->n_checked;
    stats->n_accepted += n_right;
    stats->n_by_accepted[n_right]++;
    stats->tokens_per_pass = 1 + (double)stats->n_accepted / stats->n_passes;
}

/* Plain decoding would have needed a plain pass per token; all other costs would have been the same. */
static void llm__spec_find_speedup(const llm__spec *sp, int n_tokens, double seconds) {
    llm_draft_stats *stats = sp->stats;
    if (!sp->draft || !sp->draft->learnt.passes[0].n || n_tokens < 1) return;
    double rest = seconds - stats->draft_seconds - stats->pass_seconds;
    stats->speedup = (n_tokens * llm__spec_usual_time(&sp->draft->learnt.passes[0]) + rest) / seconds;
}

/* ---- Prompt lookup ---- */

enum { LLM__LOOKUP_MOST = 16 }; /* maximum length of a match */

/* Finds the longest suffix of the text that also occurs earlier in it, the last occurrence if there are several.
   Returns the position after that occurrence, or 0 if there is none. */
static int llm__lookup_find_match(const llm_token *text, int n, int *length) {
    int best = 0;
    *length = 0;
    for (int end = n - 1; end > 0 && *length < LLM__LOOKUP_MOST; end--) {
        int same = 0;
        while (same < LLM__LOOKUP_MOST && same < end && text[end - 1 - same] == text[n - 1 - same]) same++;
        if (same <= *length) continue;
        *length = same;
        best = end;
    }
    return best;
}

/* Longer matches are more reliable, so they are kinds of their own. If a match reaches the end of the text, the
   guesses continue with themselves. */
static llm_status llm__lookup_propose(void *user, const llm_draft_request *r, llm_draft_guesses *g, llm_error *err) {
    static const int kinds[LLM__LOOKUP_MOST + 1] = {0, 0, 1, 2, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 6, 7};
    int length, from = llm__lookup_find_match(r->tokens, r->n_tokens, &length);
    (void)user;
    (void)err;
    if (!length) return LLM_OK;
    g->kind = kinds[length];
    for (; g->n < r->n_wanted[g->kind]; g->n++) {
        int at = from + g->n;
        g->tokens[g->n] = at < r->n_tokens ? r->tokens[at] : g->tokens[at - r->n_tokens];
    }
    return LLM_OK;
}

LLM_API llm_draft llm_draft_lookup(void) {
    llm_draft draft;
    memset(&draft, 0, sizeof draft);
    draft.name = "lookup";
    draft.propose = llm__lookup_propose;
    return draft;
}

/* ---- A model as the draft ---- */

typedef struct llm__draft_model {
    llm__pool pool;
    llm_context *target, *ctx; /* the context it guesses for, and its own */
    bool shares_cache;         /* it uses the target's cache, which is lent to it for each proposal */
    int *starts; /* [n_seq] where its sequence begins in the text, since it may be too short for the whole text */
    int *seqs;   /* [n_ctx] for the tokens of a batch */
} llm__draft_model;

/* Cuts the draft's sequence to the part it has in common with the text. Moves its start forward if that leaves no room
   for `n_more` tokens. Returns how many tokens of the text it has not read yet. */
static int llm__draft_model_align(llm__draft_model *d, const llm_draft_request *r, int n_more) {
    int n_ctx = d->ctx->desc.n_ctx, *start = &d->starts[r->seq], same = 0;
    if (d->shares_cache) return 1;
    if (*start >= r->n_tokens || r->n_tokens - *start + n_more > n_ctx)
        *start = r->n_tokens + n_more > n_ctx ? r->n_tokens - n_ctx / 2 : 0;
    const llm_token *own = llm_seq_tokens(d->ctx, r->seq), *text = r->tokens + *start;
    while (same < r->n_tokens - *start - 1 && same < llm_seq_length(d->ctx, r->seq) && own[same] == text[same]) same++;
    llm__cache_truncate(&d->ctx->cache, r->seq, same);
    return r->n_tokens - *start - same;
}

/* Removes tokens that the target does not have. If the best one is among them, the next best becomes the last. */
static void llm__draft_model_drop_unknown(llm__sampler_choice *c, int n_known) {
    int n = c->n == c->n_vocab ? llm__sampler_gather_likely(c, c->n_vocab, INFINITY, 0) : c->n, kept = 0;
    c->total = 0;
    for (int i = c->n_vocab - 1; i >= c->n_vocab - n; i--) {
        if (c->ids[i] >= n_known) continue;
        c->total += c->p[c->ids[i]];
        llm__sampler_swap_ids(c->ids, i, c->n_vocab - ++kept);
    }
    c->n = kept;
    c->best = c->ids[c->n_vocab - 1];
}

/* Guesses the token after the draft's sequence from the last pass's logits. False if the target does not have it. */
static bool llm__draft_model_draw(llm__draft_model *d, int seq, const float *logits, llm_sampler *sampler,
                                  llm_draft_guesses *g) {
    int n_known = d->target->model->shape.n_vocab;
    llm__sampler_choice choice = llm__sampler_choose(d->ctx, d->ctx->scratch, logits, llm_seq_tokens(d->ctx, seq),
                                                     llm_seq_length(d->ctx, seq), sampler, NULL);
    float *q = g->q[g->n];
    if (choice.n && n_known < choice.n_vocab) llm__draft_model_drop_unknown(&choice, n_known);
    if (!choice.n) return false;
    g->tokens[g->n++] = llm__sampler_draw_choice(&choice, sampler);
    if (!q) return true;
    memset(q, 0, (size_t)n_known * sizeof *q);
    for (int i = 0; i < choice.n; i++) {
        llm_token id = llm__sampler_choice_id(&choice, i);
        q[id] = (float)(choice.p[id] / choice.total);
    }
    return true;
}

/* Reads the last n_new tokens of the text, then guesses tokens and reads each of them but the last. */
static llm_status llm__draft_model_run(llm__draft_model *d, const llm_draft_request *r, int n_new, llm_draft_guesses *g,
                                       llm_error *err) {
    llm_sampler sampler = *r->sampler;
    const llm_token *tokens = r->tokens + r->n_tokens - n_new;
    g->has_q = g->q[0] != NULL;
    if (g->has_q) sampler.seed = ~sampler.seed; /* random numbers that the target does not use */
    for (int i = 0; i < n_new; i++) {
        if (tokens[i] >= d->ctx->model->shape.n_vocab) return LLM_OK; /* it cannot read this token */
        d->seqs[i] = r->seq;
    }
    while (g->n < r->n_wanted[0]) {
        llm_batch batch = {n_new, tokens, d->seqs, NULL};
        llm_status status = llm__ctx_forward(d->ctx, &batch, false, r->cancel, r->cancel_user, err);
        if (status) return status;
        if (!llm__draft_model_draw(d, r->seq, llm_logits(d->ctx, n_new - 1), &sampler, g)) break;
        tokens = &g->tokens[g->n - 1];
        n_new = 1;
    }
    return LLM_OK;
}

static llm_status llm__draft_model_propose(void *user, const llm_draft_request *r, llm_draft_guesses *g,
                                           llm_error *err) {
    llm__draft_model *d = (llm__draft_model *)user;
    if (r->ctx != d->target) return llm__error(err, LLM_ERROR_ARGUMENT, "the draft was made for another context");
    llm__ctx_settle(d->ctx);
    if (d->shares_cache) {
        d->ctx->cache = d->target->cache;
        d->target->borrower = d->ctx;
        d->target->old_lengths[r->seq] = r->n_tokens - 1;
        d->target->unsettled = true;
    }
    llm_status status = llm__draft_model_run(d, r, llm__draft_model_align(d, r, r->n_wanted[0]), g, err);
    if (!d->shares_cache) return status;
    llm__cache_truncate(&d->ctx->cache, r->seq, r->n_tokens - 1);
    d->target->cache = d->ctx->cache;
    d->target->borrower = NULL;
    d->target->unsettled = false;
    return status;
}

static void llm__draft_model_close(void *user) {
    llm__draft_model *d = (llm__draft_model *)user;
    llm_context_free(d->ctx);
    llm__pool pool = d->pool;
    llm__pool_free(&pool);
}

/* Checks that two vocabularies agree as far as both go. The longer one may be padded. */
static llm_status llm__draft_check_vocabularies(const llm_tokenizer *a, const llm_tokenizer *b, llm_error *err) {
    int n_a = llm_tokenizer_n_vocab(a), n_b = llm_tokenizer_n_vocab(b);
    for (int i = 0; i < n_a && i < n_b; i++) {
        llm__str x, y;
        x.at = llm_token_bytes(a, i, &x.n);
        y.at = llm_token_bytes(b, i, &y.n);
        if (!llm__str_equal(x, y) || llm_token_is_special(a, i) != llm_token_is_special(b, i))
            return llm__error(err, LLM_ERROR_ARGUMENT,
                              "the draft has another vocabulary: its token %d is \"%.*s\"%s, the model's is \"%.*s\"%s",
                              i, LLM__SHOW(y), llm_token_is_special(b, i) ? " (special)" : "", LLM__SHOW(x),
                              llm_token_is_special(a, i) ? " (special)" : "");
    }
    return LLM_OK;
}

typedef struct llm__draft_model_args {
    llm_context *target;
    const llm_model *model;
    llm__draft_model *draft;
    llm_context *ctx; /* freed if something fails after it was created */
} llm__draft_model_args;

/* Creates the draft's context. It uses the target's cache if the two differ in nothing but the type of the weights. */
static llm_status llm__draft_model_context(llm__draft_model_args *a, bool *shares_cache, llm_error *err) {
    const llm_model *model = a->model;
    llm_context_desc desc = a->target->desc;
    bool same_backend = model->backend == a->target->model->backend;
    llm_status status = LLM_ERROR_UNSUPPORTED;
    const llm_model_desc *own = &model->desc, *target = &a->target->model->desc;
    *shares_cache = same_backend && model->source == a->target->model->source && own->tensor == target->tensor &&
                    own->pipeline == target->pipeline;
    desc.n_logits = 1;
    if (*shares_cache) {
        desc.n_batch = 1; /* it reads the last token, then its own guesses */
    } else {
        desc.cache_dtype = LLM_DTYPE_DEFAULT;
        desc.n_cache = 0;
        if (model->info.n_ctx_train > 0 && model->info.n_ctx_train < desc.n_ctx) desc.n_ctx = model->info.n_ctx_train;
    }
    if (same_backend) status = llm__ctx_create(&a->ctx, model, &desc, a->target, *shares_cache, err);
    if (status != LLM_ERROR_UNSUPPORTED) return status;
    *shares_cache = false;
    return llm__ctx_create(&a->ctx, model, &desc, NULL, false, err);
}

static void llm__draft_model_body(llm__env *env, void *arg) {
    llm__draft_model_args *a = (llm__draft_model_args *)arg;
    llm__draft_model *d = (llm__draft_model *)llm__alloc_zero(env, 1, sizeof *d);
    llm_status status = llm__draft_model_context(a, &d->shares_cache, env->err);
    if (status) {
        env->status = status;
        longjmp(env->unwind, 1);
    }
    d->target = a->target;
    d->ctx = a->ctx;
    d->starts = (int *)llm__alloc_zero(env, (size_t)d->ctx->desc.n_seq, sizeof(int));
    d->seqs = (int *)llm__alloc(env, (size_t)d->ctx->desc.n_ctx, sizeof(int));
    d->pool = *env->pool;
    a->draft = d;
}

LLM_API llm_status llm_draft_model(llm_draft *out, llm_context *ctx, const llm_model *model, llm_error *err) {
    llm__draft_model_args args = {ctx, model, NULL, NULL};
    llm__pool pool;
    llm__env env;
    if (!out || !ctx || !model) return llm__error(err, LLM_ERROR_ARGUMENT, "out, ctx or model is NULL");
    memset(out, 0, sizeof *out);
    llm_status status = LLM__ENTER(ctx, err);
    if (!status) status = llm__draft_check_vocabularies(ctx->model->tokenizer, model->tokenizer, err);
    if (status) return status;
    llm__pool_init(&pool, &ctx->desc.host);
    llm__env_init(&env, &pool, err, NULL);
    status = llm__env_run(&env, llm__draft_model_body, &args);
    if (status) {
        llm_context_free(args.ctx);
        llm__pool_free(&pool);
        return status;
    }
    out->name = llm_dtype_name(model->info.dtype);
    out->propose = llm__draft_model_propose;
    out->close = llm__draft_model_close;
    out->user = args.draft;
    return llm__error_done(err, LLM_OK);
}

LLM_API void llm_draft_free(llm_draft *draft) {
    if (!draft) return;
    if (draft->close) draft->close(draft->user);
    memset(draft, 0, sizeof *draft);
}

/* ==== 23 Generation =============================================================================================

   One text: its prompt as tokens, and what is done with each token that was drawn. Section 23b computes it, alone or
   beside others. */

/* Text on its way to the host. What may be the start of a stop string is held back until that is decided. */
typedef struct llm__gen_outbox {
    char *text; /* text that is held back */
    size_t n, capacity;
    llm_text_stream stream;
    int stop_index; /* index of the stop string that was found, or -1 */
    bool refused;   /* a callback returned false */
} llm__gen_outbox;

struct llm_stream {
    llm_stream *next; /* in the context's list */
    llm__pool pool;
    llm_context *ctx;
    llm_generate_desc desc; /* the host's; but the stops are copies, and seq is the sequence that was picked */
    llm_stats stats;
    llm_status status; /* why it failed, with err; LLM_OK: it did not */
    llm_error err;
    bool running;
    bool prefill_only; /* it ends after the prompt */
    bool bursts;       /* the device may pick its tokens */
    bool freed;        /* the host has freed it inside a callback, so that it goes when the call ends */
    llm_token *ids;    /* [n_ids] the prompt */
    int n_ids, n_read; /* the sequence has n_read of them */
    bool started;      /* some of the prompt was computed */
    llm_token token;   /* the last one drawn, which was not run yet */
    double since;      /* when it began, then when it had read its prompt */
    llm_sampler greedy, *sampler;
    llm__spec speculation;
    llm__gen_outbox box;
    /* In the current pass: */
    int n_rows, first;    /* its tokens, and where the first with logits stands in the batch; n_rows is 0 when done */
    bool cancelled;       /* its `cancel` has said so */
    bool is_drawn, right; /* `drawn` is there; it equals the guess */
    llm_token drawn;      /* the next token */
    llm_status drawing;   /* why there is none */
    uint64_t n_drawn;     /* the sampler's, before the pass */
    bool has_ticket;      /* one row of logits may be its */
};

/* Number of bytes at the end of the held text that may be the start of a stop string. */
static size_t llm__gen_possible_stop(const llm_stream *s) {
    const llm__gen_outbox *box = &s->box;
    for (size_t at = 0; at < box->n; at++)
        for (int i = 0; i < s->desc.n_stop_strings; i++) {
            const char *stop = s->desc.stop_strings[i];
            if (strlen(stop) > box->n - at && !memcmp(box->text + at, stop, box->n - at)) return box->n - at;
        }
    return 0;
}

/* Position of the first stop string in the held text; box.n if there is none. */
static size_t llm__gen_find_stop(llm_stream *s) {
    llm__gen_outbox *box = &s->box;
    for (size_t at = 0; at < box->n; at++)
        for (int i = 0; i < s->desc.n_stop_strings; i++) {
            size_t length = strlen(s->desc.stop_strings[i]);
            if (length && length <= box->n - at && !memcmp(box->text + at, s->desc.stop_strings[i], length)) {
                box->stop_index = i;
                return at;
            }
        }
    return box->n;
}

static void llm__gen_show(llm_stream *s, size_t n) {
    llm__gen_outbox *box = &s->box;
    char next = box->text[n];
    if (!n) return;
    box->text[n] = 0;
    llm__ctx_begin_callback(s->ctx);
    if (s->desc.on_text && !s->desc.on_text(s->desc.user, box->text, n)) box->refused = true;
    llm__ctx_end_callback(s->ctx);
    box->text[n] = next;
    memmove(box->text, box->text + n, box->n - n);
    box->n -= n;
}

/* Adds a token's text, or for token -1 what remains at the end, and shows what can be shown. */
static void llm__gen_outbox_add(llm__env *env, llm_stream *s, llm_token token) {
    const llm_tokenizer *tokenizer = s->ctx->model->tokenizer;
    llm__gen_outbox *box = &s->box;
    size_t n_bytes = 0;
    llm_token_bytes(tokenizer, token, &n_bytes);
    size_t wanted = box->n + 3 * n_bytes + 32; /* each invalid byte may become three */
    if (wanted > box->capacity) {
        char *grown = (char *)llm__alloc(env, wanted * 2, 1);
        if (box->n) memcpy(grown, box->text, box->n);
        llm__free(env->pool, box->text);
        box->text = grown;
        box->capacity = wanted * 2;
    }
    box->n += llm_stream_token(tokenizer, &box->stream, token, box->text + box->n, box->capacity - box->n);
    size_t safe = llm__gen_find_stop(s);
    if (safe == box->n && token >= 0) safe -= llm__gen_possible_stop(s);
    llm__gen_show(s, safe);
}

/* The tokens of a text or a rendered conversation in new memory. */
static llm_token *llm__gen_encode(llm__env *env, const llm_stream *s, const llm__chat_text *text, unsigned flags,
                                  int *n) {
    if (text->n > INT32_MAX / 8)
        llm__fail(env, LLM_ERROR_ARGUMENT, "the prompt has %llu bytes", (unsigned long long)text->n);
    llm_token *ids = (llm_token *)llm__alloc(env, 4 * text->n + 8, sizeof *ids);
    *n = (int)llm__enc_spans(env, s->ctx->model->tokenizer, text->text, text->n, flags, text->spans, text->n_spans, ids,
                             4 * text->n + 8);
    return ids;
}

/* The conversation without its oldest turns. */
typedef struct llm__gen_turns {
    llm_chat_desc chat; /* all of it */
    llm_message *left;  /* [n_messages] what is left */
    int n_kept, next;   /* the first n_kept messages stay, then those before `next` are left out: */
    size_t bytes;       /* so much content, */
    size_t step;        /* in steps of so much */
} llm__gen_turns;

/* Leaves out more: up to the first turn behind the next step. A turn begins with a message of the user. False if there
   is none. */
static bool llm__gen_drop_turn(llm__gen_turns *t) {
    size_t bytes = t->bytes, least = (bytes / t->step + 1) * t->step;
    for (int i = t->next; i < t->chat.n_messages; i++) {
        if (bytes >= least && i > t->n_kept && !strcmp(t->chat.messages[i].role, "user")) {
            t->next = i;
            t->bytes = bytes;
            return true;
        }
        bytes += strlen(t->chat.messages[i].content);
    }
    return false;
}

static llm_token *llm__gen_encode_turns(llm__env *env, llm_stream *s, const llm__gen_turns *t, int *n) {
    llm_chat_desc rest = t->chat;
    int n_left = t->chat.n_messages - t->next;
    memcpy(t->left + t->n_kept, t->chat.messages + t->next, (size_t)n_left * sizeof *t->left);
    rest.messages = t->left;
    rest.n_messages = t->n_kept + n_left;
    llm__chat_text text = llm__chat_render(env, s->ctx->model->tokenizer, &rest);
    s->stats.n_left_out = t->next - t->n_kept;
    return llm__gen_encode(env, s, &text, LLM_TOKENS_SPECIAL, n);
}

/* Leaves out the oldest turns until the conversation fits: if possible in steps of 2 * n_ctx bytes of content, about
   half of the sequence, else in smaller ones. So it begins at the same place for several turns, and what follows is
   reused. */
static llm_token *llm__gen_fit_turns(llm__env *env, llm_stream *s, const llm_chat_desc *chat, int *n) {
    int n_ctx = s->ctx->desc.n_ctx;
    const size_t steps[] = {2 * (size_t)n_ctx, (size_t)n_ctx / 2 + 1, 1};
    llm__gen_turns t;
    memset(&t, 0, sizeof t);
    t.chat = *chat;
    for (int i = 0; i < chat->n_messages; i++)
        if (!chat->messages[i].role || !chat->messages[i].content)
            llm__fail(env, LLM_ERROR_ARGUMENT, "message %d has no role or no content", i);
    while (t.n_kept < chat->n_messages && !strcmp(chat->messages[t.n_kept].role, "system")) t.n_kept++;
    t.left = (llm_message *)llm__alloc(env, (size_t)chat->n_messages, sizeof *t.left);
    memcpy(t.left, chat->messages, (size_t)t.n_kept * sizeof *t.left);
    for (int i = 0; i < 3; i++) {
        t.step = steps[i];
        t.next = t.n_kept;
        t.bytes = 0;
        do {
            llm_token *ids = llm__gen_encode_turns(env, s, &t, n);
            if (*n <= n_ctx - s->desc.keep_free) return ids;
            llm__free(env->pool, ids);
        } while (llm__gen_drop_turn(&t));
    }
    llm__fail(env, LLM_ERROR_CONTEXT_FULL,
              "the last turn alone has %d tokens; a sequence of this context holds %d (n_ctx), of which %d are to stay "
              "free (keep_free)",
              *n, n_ctx, s->desc.keep_free);
}

/* The tokens of the prompt in new memory. */
static llm_token *llm__gen_prompt_tokens(llm__env *env, llm_stream *s, int *n) {
    const llm_generate_desc *d = &s->desc;
    if ((d->prompt != NULL) + (d->messages != NULL) + (d->chat != NULL) + (d->tokens != NULL) != 1)
        llm__fail(env, LLM_ERROR_ARGUMENT, "exactly one of prompt, messages, chat and tokens must be given");
    if (d->keep_free < 0 || (d->keep_free && !d->messages && !(d->chat && d->chat->messages)))
        llm__fail(env, LLM_ERROR_ARGUMENT,
                  "keep_free is negative, or there are no messages of which some can be left out");
    if (d->tokens) {
        if (d->n_tokens <= 0)
            llm__fail(env, LLM_ERROR_ARGUMENT, "the prompt has no tokens: n_tokens is %d", d->n_tokens);
        llm_token *copy = (llm_token *)llm__alloc(env, (size_t)d->n_tokens, sizeof *copy);
        memcpy(copy, d->tokens, (size_t)d->n_tokens * sizeof *copy);
        *n = d->n_tokens;
        return copy;
    }
    if (d->prompt) {
        llm__chat_text text;
        memset(&text, 0, sizeof text);
        text.text = d->prompt;
        text.n = strlen(d->prompt);
        return llm__gen_encode(env, s, &text, LLM_TOKENS_SPECIAL | LLM_TOKENS_ENDS, n);
    }
    llm_chat_desc chat;
    memset(&chat, 0, sizeof chat);
    chat.messages = d->messages;
    chat.n_messages = d->n_messages;
    chat.open_answer = true;
    if (d->chat) chat = *d->chat;
    if (d->keep_free && chat.messages && chat.n_messages > 0) return llm__gen_fit_turns(env, s, &chat, n);
    llm__chat_text text = llm__chat_render(env, s->ctx->model->tokenizer, &chat);
    return llm__gen_encode(env, s, &text, LLM_TOKENS_SPECIAL, n);
}

static void llm__gen_check_prompt(llm__env *env, const llm_stream *s) {
    int n_vocab = s->ctx->model->shape.n_vocab, n_ctx = s->ctx->desc.n_ctx;
    if (s->n_ids == 0) llm__fail(env, LLM_ERROR_ARGUMENT, "the prompt has no tokens");
    if (s->n_ids > n_ctx)
        llm__fail(env, LLM_ERROR_CONTEXT_FULL,
                  "the prompt has %d tokens, but a sequence of this context holds %d (n_ctx)", s->n_ids, n_ctx);
    for (int i = 0; i < s->n_ids; i++)
        if (s->ids[i] < 0 || s->ids[i] >= n_vocab)
            llm__fail(env, LLM_ERROR_ARGUMENT, "token %d of the prompt is %ld; the vocabulary has %d", i,
                      (long)s->ids[i], n_vocab);
}

/* Lets the sequence begin with what is already computed of the prompt. At least one token is left to be run, since its
   logits are needed. */
static void llm__gen_reuse(llm_stream *s) {
    int own;
    s->n_read = llm__seq_start(s->ctx, s->desc.seq, s->ids, s->n_ids - 1, &own);
    s->stats.n_reused = s->n_read;
    s->stats.n_shared += s->n_read - own;
}

/* True if this token ends the generation. It is not shown. */
static bool llm__gen_token_stops(llm_stream *s, llm_token token) {
    if (!s->desc.ignore_end && llm_token_is_end(s->ctx->model->tokenizer, token)) {
        s->stats.stop = LLM_STOP_END;
        return true;
    }
    for (int i = 0; i < s->desc.n_stop_tokens; i++)
        if (s->desc.stop_tokens[i] == token) {
            s->stats.stop = LLM_STOP_TOKEN;
            s->stats.stop_index = i;
            return true;
        }
    return false;
}

/* Shows a token. Returns false if something about it ends the generation. */
static bool llm__gen_show_token(llm__env *env, llm_stream *s, llm_token token) {
    llm_stats *stats = &s->stats;
    llm__gen_outbox *box = &s->box;
    size_t n_bytes = 0;
    const char *bytes = llm_token_bytes(s->ctx->model->tokenizer, token, &n_bytes);
    stats->n_generated++;
    llm__ctx_begin_callback(s->ctx);
    if (s->desc.on_token && !s->desc.on_token(s->desc.user, token, bytes, n_bytes)) box->refused = true;
    llm__ctx_end_callback(s->ctx);
    if (!s->freed) llm__gen_outbox_add(env, s, token);
    box->refused = llm__ranks_any(s->ctx->backend_desc.tensor, s->ctx->backend_desc.pipeline, box->refused || s->freed);
    if (box->stop_index >= 0) {
        stats->stop = LLM_STOP_STRING;
        stats->stop_index = box->stop_index;
    } else if (box->refused) {
        stats->stop = LLM_STOP_CALLBACK;
    } else if (stats->n_generated == s->desc.max_tokens) {
        stats->stop = LLM_STOP_LENGTH;
    }
    return stats->stop == LLM_STOP_NONE;
}

/* Counts a decoded token. */
static void llm__gen_count_decode(llm_stream *s) {
    const llm_model *model = s->ctx->model;
    uint64_t length = (uint64_t)s->ctx->cache.lengths[s->desc.seq];
    uint64_t block_bytes = model->backend->block_bytes(&model->shape, s->ctx->desc.cache_dtype);
    s->stats.n_decode_passes++;
    s->stats.decode_bytes += model->info.weight_bytes_per_token + length * block_bytes / LLM_CACHE_BLOCK;
}

/* The largest number of guesses after a token, up to `most`, that sequence and cache have room for and that can be of
   use. */
static int llm__gen_most_guesses(const llm_stream *s, int most, int n_free) {
    int seq = s->desc.seq, left = s->ctx->desc.n_ctx - s->ctx->cache.lengths[seq] - 1;
    if (most > LLM_DRAFT_MAX) most = LLM_DRAFT_MAX;
    if (most > left) most = left;
    if (s->desc.max_tokens > 0 && s->desc.max_tokens - s->stats.n_generated - 1 < most)
        most = s->desc.max_tokens - s->stats.n_generated - 1;
    while (most > 0 && llm__cache_needs(&s->ctx->cache, seq, most + 1) > n_free) most--;
    return most;
}

static void llm__gen_start_speculation(llm__env *env, llm_stream *s) {
    const llm_generate_desc *d = &s->desc;
    const llm_context *ctx = s->ctx;
    llm__spec *sp = &s->speculation;
    int n_logits = ctx->desc.n_logits < ctx->desc.n_batch ? ctx->desc.n_logits : ctx->desc.n_batch;
    sp->draft = d->draft;
    sp->ctx = s->ctx;
    sp->sampler = s->sampler;
    sp->cancel = d->cancel ? d->cancel : ctx->desc.cancel;
    sp->cancel_user = d->cancel ? d->user : ctx->desc.cancel_user;
    sp->stats = &s->stats.draft;
    if (!d->draft) return;
    if (!d->draft->propose || d->draft_max < 0)
        llm__fail(env, LLM_ERROR_ARGUMENT, "the draft has no function, or draft_max is negative");
    if (n_logits < 2)
        llm__fail(env, LLM_ERROR_ARGUMENT,
                  "a draft is of use only in a context whose n_logits and n_batch are above 1: they are %d and %d",
                  ctx->desc.n_logits, ctx->desc.n_batch);
    sp->most = d->draft_max && d->draft_max < n_logits - 1 ? d->draft_max : n_logits - 1;
    if (sp->most > LLM_DRAFT_MAX) sp->most = LLM_DRAFT_MAX;
    for (int i = 0; i < sp->most && !d->draft_keeps_text && !llm__sampler_is_greedy(s->sampler); i++)
        sp->q[i] = (float *)llm__alloc(env, (size_t)ctx->model->shape.n_vocab, sizeof(float));
}

/* Checks that arrays with a count above 0 are not NULL. */
static void llm__gen_check_arrays(llm__env *env, const llm_generate_desc *d, const llm_sampler *sampler) {
    const char *name = d->n_stop_strings > 0 && !d->stop_strings   ? "stop_strings"
                       : d->n_stop_tokens > 0 && !d->stop_tokens   ? "stop_tokens"
                       : sampler->n_biases > 0 && !sampler->biases ? "biases"
                                                                   : NULL;
    if (name) llm__fail(env, LLM_ERROR_ARGUMENT, "n_%s is above 0, but %s is NULL", name, name);
    for (int i = 0; i < d->n_stop_strings; i++)
        if (!d->stop_strings[i]) llm__fail(env, LLM_ERROR_ARGUMENT, "stop_strings[%d] is NULL", i);
}

/* Copies what must outlive the call. */
static void llm__gen_copy_stops(llm__env *env, llm_generate_desc *d) {
    size_t n_strings = d->n_stop_strings > 0 ? (size_t)d->n_stop_strings : 0,
           n_tokens = d->n_stop_tokens > 0 ? (size_t)d->n_stop_tokens : 0;
    const char **strings = (const char **)llm__alloc(env, n_strings, sizeof *strings);
    llm_token *tokens = (llm_token *)llm__alloc(env, n_tokens, sizeof *tokens);
    for (size_t i = 0; i < n_strings; i++)
        strings[i] = llm__str_copy(env, d->stop_strings[i], strlen(d->stop_strings[i]));
    if (n_tokens) memcpy(tokens, d->stop_tokens, n_tokens * sizeof *tokens);
    d->stop_strings = strings;
    d->stop_tokens = tokens;
}

/* Shows the rest of a text that ends. A host that has refused or freed it does not want that. */
static void llm__gen_finish(llm__env *env, llm_stream *s) {
    if (s->n_read < s->n_ids) s->stats.prefill_seconds = llm__clock_now() - s->since;
    else if (!s->prefill_only) s->stats.decode_seconds = llm__clock_now() - s->since;
    if (s->freed) return;
    llm__spec_find_speedup(&s->speculation, s->stats.n_generated - 1, s->stats.decode_seconds);
    if (s->stats.stop == LLM_STOP_STRING || s->box.refused || s->prefill_only) return;
    llm__gen_outbox_add(env, s, -1);
    if (s->box.stop_index < 0) return;
    s->stats.stop = LLM_STOP_STRING; /* in the U+FFFD that ends the text */
    s->stats.stop_index = s->box.stop_index;
}

/* ---- Bursts ---- */

typedef struct llm__gen_burst_args {
    llm__env *env;
    llm_stream *s;
    llm_backend_burst burst;
    int n_known;     /* number of its tokens known so far */
    llm_token token; /* the last known token */
    llm_status status;
} llm__gen_burst_args;

/* How many tokens the device may pick. All but the last need a place in the cache. */
static int llm__gen_burst_size(const llm_stream *s) {
    const llm_context *ctx = s->ctx;
    const llm__cache *cache = &ctx->cache;
    const llm_sampler *sampler = s->sampler;
    int seq = s->desc.seq, left = s->desc.max_tokens - s->stats.n_generated, n = LLM_BACKEND_BURST;
    bool plain = sampler->n_biases == 0 && !llm__sampler_has_penalty(sampler);
    if (!s->bursts || s->speculation.draft || ctx->backend_desc.pipeline || !ctx->model->backend->burst || !plain)
        return 0;
    if (s->desc.max_tokens > 0 && left < n) n = left;
    if (ctx->desc.n_ctx - cache->lengths[seq] + 1 < n) n = ctx->desc.n_ctx - cache->lengths[seq] + 1;
    if (llm__cache_must_copy(cache, seq)) return 1;
    while (n > 1 && llm__cache_needs(cache, seq, n - 1) > cache->n_free) n--;
    return n;
}

static bool llm__gen_poll_cancel(const llm_stream *s) {
    llm_context *ctx = s->ctx;
    ctx->cancel = s->desc.cancel ? s->desc.cancel : ctx->desc.cancel;
    ctx->cancel_user = s->desc.cancel ? s->desc.user : ctx->desc.cancel_user;
    return ctx->cancel && llm__ctx_poll_host(ctx);
}

/* Handles the next token of the burst. */
static void llm__gen_burst_token_body(llm__env *env, void *arg) {
    llm__gen_burst_args *b = (llm__gen_burst_args *)arg;
    llm_stream *s = b->s;
    llm__cache *cache = &s->ctx->cache;
    bool is_last = ++b->n_known == b->burst.n;
    if (b->token < 0 || b->token >= s->ctx->model->shape.n_vocab)
        llm__fail(env, LLM_ERROR_FORMAT, "a logit is not a number (NaN): the model's weights are damaged");
    if (b->n_known > 1) llm__gen_count_decode(s);
    if (!llm__sampler_is_greedy(s->sampler)) s->sampler->n_drawn++;
    if (llm__gen_token_stops(s, b->token) || !llm__gen_show_token(env, s, b->token) || is_last) return;
    if (llm__ranks_any(s->ctx->backend_desc.tensor, NULL, llm__gen_poll_cancel(s))) {
        s->stats.stop = LLM_STOP_CALLBACK;
        return;
    }
    llm__cache_tokens(cache, s->desc.seq)[cache->lengths[s->desc.seq]++] = b->token;
}

/* If memory runs out here, the device first finishes its work; then the error is raised. */
static bool llm__gen_burst_token(void *user, llm_token token) {
    llm__gen_burst_args *b = (llm__gen_burst_args *)user;
    llm__env env;
    llm__env_init(&env, b->env->pool, b->env->err, NULL);
    b->token = token;
    b->status = llm__env_run(&env, llm__gen_burst_token_body, b);
    return !b->status && b->s->stats.stop == LLM_STOP_NONE;
}

/* Lets the device pick n tokens. Their places in the cache are reserved beforehand; meanwhile the sequence's length is
   that of its known tokens. */
static void llm__gen_run_burst(llm__env *env, llm_stream *s, int n) {
    llm_context *ctx = s->ctx;
    llm__gen_burst_args b = {env, s, {n, 0, NULL, NULL, llm__gen_burst_token, NULL}, 0, -1, LLM_OK};
    int seq = s->desc.seq, *length = &ctx->cache.lengths[seq], before = *length;
    llm_sampler start = *s->sampler; /* a copy, since n_drawn advances while the device draws */
    b.burst.sampler = &start;
    b.burst.position = before;
    b.burst.blocks = llm__cache_table(&ctx->cache, seq);
    b.burst.user = &b;
    for (int i = 1; i < n; i++) llm__cache_append(&ctx->cache, seq, 0);
    *length = before;
    ctx->burst_seq = seq;
    ctx->burst_end = before + n - 1;
    ctx->unsettled = false; /* llm__ctx_end_burst does instead what llm__ctx_roll_back does */
    llm_status status = ctx->model->backend->burst(ctx->device, &b.burst, env->err);
    llm__ctx_end_burst(ctx);
    ctx->old_lengths[seq] = *length;
    s->token = b.token;
    env->status = status ? status : b.status;
    if (env->status == LLM_ERROR_CANCELLED) s->stats.stop = LLM_STOP_CALLBACK;
    else if (env->status) longjmp(env->unwind, 1);
}

/* ==== 23b Streams ===============================================================================================

   Several texts are written at the same time. A pass reads the weights once for all of them: it has the last token of
   each text that is being written, perhaps with guesses, and as much of the prompts as there is room for. llm_generate
   is a stream that has its passes for itself.

   After the pass the rows are sampled, on all threads, and then each stream in turn shows its token and may call the
   host. If a callback does not return, what the others have computed in that pass is forgotten and will be computed
   again: their sequences are cut to old_lengths, and their samplers go back to n_drawn. */

enum { LLM__STREAM_PASS = 128 }; /* default bound on the tokens of a pass while some text is being written */

/* The pass that is being made. */
typedef struct llm__stream_pass {
    llm_context *ctx;
    llm_stream *only; /* NULL: all streams take part */
    int n, most;      /* tokens in the batch, and the most */
    int n_spare;      /* rows with logits that guesses may have */
    int n_promised;   /* blocks that streams take in this pass, or will take for the rest of their prompts */
    bool has_prompt;  /* some of the tokens are of prompts */
    int n_sampled;    /* streams in ctx->sampled, whose rows are sampled at the same time */
    int n_threads;    /* by so many threads */
} llm__stream_pass;

static bool llm__stream_takes_part(const llm__stream_pass *p, const llm_stream *s) {
    return s->running && !s->freed && (!p->only || s == p->only);
}

static bool llm__stream_is_reading(const llm_stream *s) { return s->n_read < s->n_ids; }

/* Its sequence is finished: it stays for prompts that begin like it, for as long as there is room. */
static void llm__stream_stop(llm_stream *s, llm_status status) {
    llm_context *ctx = s->ctx;
    s->running = false;
    s->n_rows = 0;
    s->status = llm__ctx_tell_ranks(ctx, status);
    ctx->runs[s->desc.seq] = false;
    if (ctx->picked_at[s->desc.seq]) ctx->picked_at[s->desc.seq] = ++ctx->clock;
}

static void llm__stream_unlink(llm_stream *s) {
    llm_stream **at = &s->ctx->streams;
    while (*at != s) at = &(*at)->next;
    *at = s->next;
    if (s->ctx->turn == s) s->ctx->turn = s->next;
    if (s->running) llm__stream_stop(s, LLM_OK);
    llm__pool pool = s->pool;
    llm__pool_free(&pool);
}

static void llm__stream_free_all(llm_context *ctx) {
    while (ctx->streams) llm__stream_unlink(ctx->streams);
}

/* Streams that the host has freed in a callback. */
static void llm__stream_free_those_freed(llm_context *ctx) {
    for (llm_stream *s = ctx->streams, *next; s; s = next) {
        next = s->next;
        if (s->freed) llm__stream_unlink(s);
    }
}

/* After a call that a callback never returned to. The stream whose callback it was is at its end. */
static void llm__stream_settle(llm_context *ctx) {
    if (ctx->acting && ctx->acting->running) {
        ctx->acting->stats.stop = LLM_STOP_CALLBACK;
        llm__stream_stop(ctx->acting, LLM_OK);
    }
    for (llm_stream *s = ctx->streams; s; s = s->next) {
        if (s->n_rows && !s->freed && s != ctx->own) s->sampler->n_drawn = s->n_drawn;
        s->n_rows = 0;
    }
    if (ctx->own) llm__stream_unlink(ctx->own);
    ctx->own = ctx->acting = NULL;
    llm__stream_free_those_freed(ctx);
}

/* Does something for one stream that may fail or call the host. A failure is the end of this stream alone. */
static void llm__stream_act(llm_stream *s, void (*body)(llm__env *env, void *arg)) {
    llm__env env;
    llm__env_init(&env, &s->pool, &s->err, NULL);
    s->ctx->acting = s;
    llm_status status = llm__env_run(&env, body, s);
    s->ctx->acting = NULL;
    if (status) llm__stream_stop(s, status);
}

static void llm__stream_finish_body(llm__env *env, void *arg) {
    llm_stream *s = (llm_stream *)arg;
    llm__gen_finish(env, s);
    llm__stream_stop(s, LLM_OK);
}

static void llm__stream_finish(llm_stream *s, llm_stop stop) {
    s->stats.stop = stop;
    llm__stream_act(s, llm__stream_finish_body);
}

/* ---- Beginning ---- */

/* Blocks that the running streams will take for the rest of their prompts. */
static int64_t llm__stream_promised(const llm_context *ctx) {
    int64_t n = 0;
    for (const llm_stream *s = ctx->streams; s; s = s->next)
        if (s->running) n += llm__cache_needs(&ctx->cache, s->desc.seq, s->n_ids - s->n_read);
    return n;
}

/* A sampler's random numbers are those of one text. */
static void llm__stream_check_sampler(llm__env *env, const llm_stream *s) {
    for (const llm_stream *other = s->ctx->streams; other; other = other->next)
        if (other->running && other->sampler == s->sampler && !llm__sampler_is_greedy(s->sampler))
            llm__fail(env, LLM_ERROR_ARGUMENT, "another stream that is running uses this sampler; give each its own");
}

static void llm__stream_take_sequence(llm__env *env, llm_stream *s) {
    llm_context *ctx = s->ctx;
    int *seq = &s->desc.seq;
    bool any = *seq == LLM_SEQ_ANY;
    if (any) *seq = llm__seq_pick(ctx, s->ids, s->n_ids - 1);
    if (*seq < 0) /* llm__ctx_claim_seq has refused other negative numbers */
        llm__fail(env, LLM_ERROR_CONTEXT_FULL,
                  "no sequence is free: running streams or the host have all %d of them (n_seq)", ctx->desc.n_seq);
    s->stats.seq = s->speculation.seq = *seq;
    s->stats.n_prompt = s->n_ids;
    ctx->picked_at[*seq] = any ? ++ctx->clock : 0;
    llm__gen_reuse(s);
    int64_t needed = llm__cache_needs(&ctx->cache, *seq, s->n_ids - s->n_read), promised = llm__stream_promised(ctx);
    ctx->runs[*seq] = true; /* so that it is not dropped to make room for itself */
    bool room = llm__seq_make_room(ctx, needed + promised);
    ctx->runs[*seq] = room;
    if (!room)
        llm__fail(env, LLM_ERROR_CONTEXT_FULL,
                  "the prompt needs %lld positions of the cache, but %lld are free (n_cache)",
                  (long long)needed * LLM_CACHE_BLOCK,
                  (long long)(llm__seq_blocks_to_have(ctx) - promised) * LLM_CACHE_BLOCK);
}

typedef struct llm__stream_args {
    llm_context *ctx;
    const llm_generate_desc *desc;
    bool prefill_only;
    llm_stream *s;
} llm__stream_args;

static void llm__stream_begin_body(llm__env *env, void *arg) {
    llm__stream_args *a = (llm__stream_args *)arg;
    llm_stream *s = (llm_stream *)llm__alloc_zero(env, 1, sizeof *s), **last = &a->ctx->streams;
    s->ctx = a->ctx;
    s->since = llm__clock_now();
    s->desc = *a->desc;
    s->prefill_only = a->prefill_only;
    s->sampler = s->desc.sampler ? s->desc.sampler : &s->greedy;
    s->box.stop_index = -1;
    /* What continues a prompt is not the start of a text, so its first space is shown. */
    s->box.stream.started = !s->desc.messages && !s->desc.chat;
    llm__gen_check_arrays(env, &s->desc, s->sampler);
    llm__stream_check_sampler(env, s);
    llm__gen_copy_stops(env, &s->desc);
    llm__gen_start_speculation(env, s);
    s->ids = llm__gen_prompt_tokens(env, s, &s->n_ids);
    llm__gen_check_prompt(env, s);
    llm__stream_take_sequence(env, s);
    s->running = true;
    s->pool = *env->pool;
    env->pool->blocks = NULL; /* they are the stream's now */
    while (*last) last = &(*last)->next;
    *last = a->s = s;
}

static llm_status llm__stream_begin(llm_stream **out, llm_context *ctx, const llm_generate_desc *desc,
                                    bool prefill_only, llm_error *err) {
    llm__stream_args args = {ctx, desc, prefill_only, NULL};
    llm__env env;
    if (desc->seq != LLM_SEQ_ANY) {
        llm_status status = llm__ctx_claim_seq(ctx, desc->seq, err);
        if (status) return status;
    }
    llm__env_init(&env, &ctx->work, err, NULL);
    llm_status status = llm__env_run(&env, llm__stream_begin_body, &args);
    llm__pool_free(&ctx->work);
    *out = args.s;
    return llm__ctx_tell_ranks(ctx, status);
}

/* ---- A pass ---- */

/* True if the stream waits for an older one, which is about to compute what both prompts begin with. */
static bool llm__stream_waits(const llm_stream *s) {
    if (s->started) return false;
    for (const llm_stream *older = s->ctx->streams; older != s; older = older->next) {
        int same = 0, most = older->n_ids < s->n_ids - 1 ? older->n_ids : s->n_ids - 1;
        if (!older->running || !llm__stream_is_reading(older)) continue;
        while (same < most && older->ids[same] == s->ids[same]) same++;
        if (same > older->n_read && same >= s->n_read + LLM__SEQ_WORTH_SHARING) return true;
    }
    return false;
}

/* Ends what has no room for its next token, and finds out what the others need. */
static void llm__stream_check_room(llm__stream_pass *p) {
    llm_context *ctx = p->ctx;
    for (llm_stream *s = ctx->streams; s; s = s->next) {
        if (!s->running || !llm__stream_is_reading(s)) continue;
        if (!s->started && llm__stream_takes_part(p, s)) llm__gen_reuse(s); /* more may be there than when it began */
        int needed = llm__cache_needs(&ctx->cache, s->desc.seq, s->n_ids - s->n_read);
        if (llm__seq_make_room(ctx, (int64_t)p->n_promised + needed)) {
            p->n_promised += needed;
            continue;
        }
        llm__error(&s->err, LLM_ERROR_CONTEXT_FULL, "the host has taken the cache that the prompt needs");
        llm__stream_stop(s, LLM_ERROR_CONTEXT_FULL);
    }
    for (llm_stream *s = ctx->streams; s; s = s->next) {
        if (!llm__stream_takes_part(p, s) || llm__stream_is_reading(s)) continue;
        int needed = llm__cache_needs(&ctx->cache, s->desc.seq, 1);
        if (ctx->cache.lengths[s->desc.seq] == ctx->desc.n_ctx) llm__stream_finish(s, LLM_STOP_CONTEXT);
        else if (!llm__seq_make_room(ctx, (int64_t)p->n_promised + needed)) llm__stream_finish(s, LLM_STOP_CACHE);
        else p->n_promised += needed;
    }
}

/* The streams take turns where there are not rows for all: whoever gets none is the first next time. */
static void llm__stream_give_tickets(llm__stream_pass *p) {
    llm_context *ctx = p->ctx;
    llm_stream *start = ctx->turn && !p->only ? ctx->turn : ctx->streams, *s = start;
    int left = ctx->desc.n_logits < p->most ? ctx->desc.n_logits : p->most;
    for (bool around = false; s && !(around && s == start);) {
        s->has_ticket = false;
        if (llm__stream_takes_part(p, s) && !(llm__stream_is_reading(s) && llm__stream_waits(s))) {
            s->has_ticket = left > 0;
            if (left-- == 0 && !p->only) ctx->turn = s;
        }
        s = s->next;
        if (s || around) continue;
        around = true;
        s = ctx->streams;
    }
    if (left >= 0 && !p->only) ctx->turn = NULL;
    p->n_spare = left > 0 ? left : 0;
}

static void llm__stream_push(llm__stream_pass *p, llm_stream *s, llm_token token, bool logits) {
    llm_context *ctx = p->ctx;
    if (!s->n_rows++) s->n_drawn = s->sampler->n_drawn;
    ctx->step_tokens[p->n] = token;
    ctx->step_seqs[p->n] = s->desc.seq;
    ctx->step_logits[p->n++] = logits;
}

/* The last tokens of the texts, with guesses where rows are to spare. */
static void llm__stream_push_texts(llm__stream_pass *p) {
    llm_context *ctx = p->ctx;
    int n_drafted = 0;
    for (llm_stream *s = ctx->streams; s; s = s->next)
        n_drafted += s->has_ticket && !llm__stream_is_reading(s) && s->speculation.draft;
    for (llm_stream *s = ctx->streams; s; s = s->next) {
        llm__spec *sp = &s->speculation;
        if (!s->has_ticket || s->freed || llm__stream_is_reading(s)) continue;
        bool drafted = sp->draft != NULL;
        int n_free = ctx->cache.n_free - p->n_promised + llm__cache_needs(&ctx->cache, s->desc.seq, 1);
        int most = drafted ? llm__gen_most_guesses(s, p->n_spare / n_drafted, n_free) : 0;
        n_drafted -= drafted;
        ctx->acting = s;
        llm_status status = llm__spec_guess(sp, s->token, most, &s->err);
        ctx->acting = NULL;
        if (status == LLM_ERROR_CANCELLED) llm__stream_finish(s, LLM_STOP_CALLBACK);
        else if (status) llm__stream_stop(s, status);
        if (status || s->freed) continue;
        p->n_promised += llm__cache_needs(&ctx->cache, s->desc.seq, 1 + sp->n_checked) -
                         llm__cache_needs(&ctx->cache, s->desc.seq, 1);
        p->n_spare -= sp->n_checked;
        s->first = p->n;
        llm__stream_push(p, s, s->token, true);
        for (int i = 0; i < sp->n_checked; i++) llm__stream_push(p, s, sp->guesses.tokens[i], true);
    }
}

/* The stream with the shortest rest of a prompt among those that may read and have no part yet. */
static llm_stream *llm__stream_shortest_prompt(const llm_context *ctx, int *n) {
    llm_stream *shortest = NULL;
    *n = 0;
    for (llm_stream *s = ctx->streams; s; s = s->next) {
        if (!s->has_ticket || s->freed || s->n_rows || !llm__stream_is_reading(s)) continue;
        if (!shortest || s->n_ids - s->n_read < shortest->n_ids - shortest->n_read) shortest = s;
        ++*n;
    }
    return shortest;
}

/* Parts of the prompts, which share the room that is left. What a short one does not need goes to the others. */
static void llm__stream_push_prompts(llm__stream_pass *p) {
    int n_left;
    for (llm_stream *s; p->n < p->most && (s = llm__stream_shortest_prompt(p->ctx, &n_left));) {
        int n = (p->most - p->n + n_left - 1) / n_left;
        if (n > s->n_ids - s->n_read) n = s->n_ids - s->n_read;
        for (int i = s->n_read; i < s->n_read + n; i++) llm__stream_push(p, s, s->ids[i], i == s->n_ids - 1);
        s->first = p->n - 1;
        s->started = p->has_prompt = true;
    }
}

/* Asks each stream of the pass whether it wants to stop. The pass itself stops if all do. */
static bool llm__stream_poll(void *user) {
    llm_context *ctx = (llm_context *)user;
    bool all = true;
    for (llm_stream *s = ctx->streams; s; s = s->next) {
        bool (*cancel)(void *user) = s->desc.cancel ? s->desc.cancel : ctx->desc.cancel;
        if (!s->n_rows) continue;
        ctx->acting = s;
        if (!s->cancelled && !s->freed && cancel)
            s->cancelled = cancel(s->desc.cancel ? s->desc.user : ctx->desc.cancel_user);
        all = all && (s->cancelled || s->freed);
    }
    ctx->acting = NULL;
    return all;
}

static llm_status llm__stream_forward(llm__stream_pass *p, llm_error *err) {
    llm_context *ctx = p->ctx;
    llm_batch batch = {p->n, ctx->step_tokens, ctx->step_seqs, ctx->step_logits};
    bool polled = false;
    for (llm_stream *s = ctx->streams; s; s = s->next) {
        s->cancelled = s->is_drawn = false;
        polled = polled || (s->n_rows && (s->desc.cancel || ctx->desc.cancel));
    }
    /* A prompt of llm_generate may take several passes. Those that were finished stay. */
    llm_status status = llm__ctx_forward(ctx, &batch, p->only != NULL, polled ? llm__stream_poll : NULL, ctx, err);
    if (status) return status;
    /* Until each stream has dealt with its rows, they can be taken back. */
    for (llm_stream *s = ctx->streams; s; s = s->next)
        if (s->n_rows && p->only) ctx->old_lengths[s->desc.seq] -= s->speculation.n_checked;
    ctx->unsettled = true;
    return LLM_OK;
}

/* The pass was cancelled, or failed: so did all streams in it. */
static void llm__stream_end_all(llm__stream_pass *p, llm_status status, const llm_error *err) {
    for (llm_stream *s = p->ctx->streams; s; s = s->next) {
        if (!s->n_rows) continue;
        s->n_rows = 0;
        if (status == LLM_ERROR_CANCELLED) {
            llm__stream_finish(s, LLM_STOP_CALLBACK);
            continue;
        }
        s->err = *err;
        llm__stream_stop(s, status);
    }
}

/* ---- After the pass ---- */

/* Draws the token after a row of a text's last pass. Each row of a pass is sampled here. */
static void llm__stream_draw(llm_stream *s, const llm__sampler_scratch *scratch, int row, int length) {
    uint64_t mode = llm__fpu_enter();
    s->drawing = llm__spec_draw_checked(&s->speculation, scratch, s->first, row, length, &s->drawn, &s->right, &s->err);
    llm__fpu_leave(mode);
    s->is_drawn = true;
}

static void llm__stream_sample_task(void *arg, int index) {
    const llm__stream_pass *p = (const llm__stream_pass *)arg;
    llm_context *ctx = p->ctx;
    for (int i = index; i < p->n_sampled && index < p->n_threads; i += p->n_threads)
        llm__stream_draw(ctx->sampled[i], &ctx->scratch[index], 0, ctx->cache.lengths[ctx->sampled[i]->desc.seq]);
}

/* Draws the next token of all that do not have guesses, which are drawn one after the other: what is right for one
   follows from the one before. */
static void llm__stream_sample(llm__stream_pass *p) {
    llm_context *ctx = p->ctx;
    for (llm_stream *s = ctx->streams; s; s = s->next) {
        bool read = s->n_read + s->n_rows >= s->n_ids;
        if (s->n_rows && read && !s->cancelled && !s->prefill_only && !s->speculation.draft && !llm__gen_burst_size(s))
            ctx->sampled[p->n_sampled++] = s;
    }
    p->n_threads = 1;
    if (ctx->model->backend == &llm__cpu_backend && p->n_sampled > 1) {
        llm__team *team = ((llm__cpu_context *)ctx->device)->team;
        p->n_threads = team->n < ctx->n_scratch ? team->n : ctx->n_scratch;
        llm__team_run(team, llm__stream_sample_task, p);
    } else llm__stream_sample_task(p, 0);
}

/* Shows the token that was drawn, and another for each guess that was right. False if something ends the text. */
static bool llm__stream_take_tokens(llm__env *env, llm_stream *s) {
    llm__spec *sp = &s->speculation;
    llm_context *ctx = s->ctx;
    int seq = s->desc.seq, length = ctx->cache.lengths[seq] - sp->n_checked, row = 0;
    bool goes_on;
    do {
        ctx->old_lengths[seq] = length + row;
        if (row || !s->is_drawn) llm__stream_draw(s, ctx->scratch, row, length + row);
        if (s->drawing) {
            env->status = s->drawing;
            longjmp(env->unwind, 1);
        }
        s->token = s->drawn;
        if (!s->right) llm__cache_truncate(&ctx->cache, seq, length + row);
        goes_on = !llm__gen_token_stops(s, s->token) && llm__gen_show_token(env, s, s->token);
        row += s->right;
    } while (s->right && goes_on);
    if (s->freed) return false;
    llm__spec_count_pass(sp, row);
    if (s->right) llm__cache_truncate(&ctx->cache, seq, length + row - 1); /* the end was guessed */
    return goes_on;
}

/* Deals with a stream's rows of the pass. */
static void llm__stream_take_body(llm__env *env, void *arg) {
    llm_stream *s = (llm_stream *)arg;
    llm_context *ctx = s->ctx;
    llm__spec *sp = &s->speculation;
    bool goes_on = false, was_reading = llm__stream_is_reading(s);
    int n_burst = 0;
    ctx->old_lengths[s->desc.seq] = ctx->cache.lengths[s->desc.seq] - sp->n_checked;
    if (was_reading) {
        s->n_read += s->n_rows;
        s->n_rows = 0;
        if (llm__stream_is_reading(s) && !s->cancelled) return;
        s->stats.prefill_seconds = llm__clock_now() - s->since;
        s->since += s->stats.prefill_seconds;
    } else llm__gen_count_decode(s);
    s->n_rows = 0;
    if (s->cancelled) s->stats.stop = LLM_STOP_CALLBACK;
    else if (!s->prefill_only) n_burst = llm__gen_burst_size(s);
    if (n_burst) {
        llm__gen_run_burst(env, s, n_burst);
        goes_on = s->stats.stop == LLM_STOP_NONE;
    } else if (!s->cancelled && !s->prefill_only) goes_on = llm__stream_take_tokens(env, s);
    if (!goes_on) llm__stream_finish_body(env, s);
}

static void llm__stream_take(llm__stream_pass *p, double seconds) {
    llm_context *ctx = p->ctx;
    for (llm_stream *s = ctx->streams; s; s = s->next) {
        if (!s->n_rows) continue;
        int *length = &ctx->old_lengths[s->desc.seq];
        if (p->only) s->cancelled = s->freed; /* if it were cancelled, the pass would be */
        else
            s->cancelled =
                llm__ranks_any(ctx->backend_desc.tensor, ctx->backend_desc.pipeline, s->cancelled || s->freed);
        if (!llm__stream_is_reading(s)) llm__spec_time_pass(&s->speculation, seconds, !p->has_prompt);
        llm__stream_act(s, llm__stream_take_body);
        if (!s->running && *length < ctx->cache.lengths[s->desc.seq]) /* guesses that were not checked */
            llm__cache_truncate(&ctx->cache, s->desc.seq, *length);
        *length = ctx->cache.lengths[s->desc.seq];
    }
    ctx->unsettled = false;
}

/* One pass for all streams, or for one of them. */
static llm_status llm__stream_step(llm_context *ctx, llm_stream *only, int most, llm_error *err) {
    llm__stream_pass pass, *p = &pass;
    llm_error why;
    bool writes = false;
    memset(p, 0, sizeof *p);
    p->ctx = ctx;
    p->only = only;
    for (llm_stream *s = ctx->streams; s; s = s->next) writes = writes || (s->running && !llm__stream_is_reading(s));
    if (!most) most = writes ? (int)LLM__STREAM_PASS : ctx->desc.n_batch;
    p->most = only ? (int)llm__ctx_step_room(&ctx->desc) : most < ctx->desc.n_batch ? most : ctx->desc.n_batch;
    llm__stream_check_room(p);
    llm__stream_give_tickets(p);
    memcpy(ctx->old_lengths, ctx->cache.lengths, (size_t)ctx->desc.n_seq * sizeof(int));
    llm__stream_push_texts(p);
    llm__stream_push_prompts(p);
    llm_status status = LLM_OK;
    if (p->n) {
        double start = llm__clock_now();
        status = llm__stream_forward(p, &why);
        if (status) {
            llm__stream_end_all(p, status, &why);
        } else {
            double seconds = llm__clock_now() - start;
            llm__stream_sample(p);
            llm__stream_take(p, seconds);
        }
    }
    llm__stream_free_those_freed(ctx);
    if (status == LLM_ERROR_CANCELLED) status = LLM_OK;
    if (status && err) *err = why;
    return status;
}

/* ---- What hosts call ---- */

static llm_status llm__stream_run(llm_context *ctx, const llm_generate_desc *desc, llm_stats *stats, bool prefill_only,
                                  llm_error *err) {
    llm_stream *s = NULL;
    if (!ctx || !desc) return llm__error(err, LLM_ERROR_ARGUMENT, "ctx or desc is NULL");
    llm_status status = LLM__ENTER(ctx, err);
    if (stats) memset(stats, 0, sizeof *stats);
    if (!status) status = llm__stream_begin(&s, ctx, desc, prefill_only, err);
    if (status) return status;
    ctx->own = s;
    s->bursts = true;
    while (s->running) llm__stream_step(ctx, s, 0, NULL);
    status = s->status;
    if (stats) *stats = s->stats;
    if (status && err) *err = s->err;
    ctx->own = NULL;
    llm__stream_unlink(s);
    return llm__error_done(err, status);
}

LLM_API llm_status llm_generate(llm_context *ctx, const llm_generate_desc *desc, llm_stats *stats, llm_error *err) {
    return llm__stream_run(ctx, desc, stats, false, err);
}

LLM_API llm_status llm_prefill(llm_context *ctx, const llm_generate_desc *desc, llm_stats *stats, llm_error *err) {
    return llm__stream_run(ctx, desc, stats, true, err);
}

LLM_API llm_status llm_stream_begin(llm_stream **out, llm_context *ctx, const llm_generate_desc *desc, llm_error *err) {
    if (!out || !ctx || !desc) return llm__error(err, LLM_ERROR_ARGUMENT, "out, ctx or desc is NULL");
    *out = NULL;
    llm_status status = LLM__ENTER(ctx, err);
    if (!status) status = llm__stream_begin(out, ctx, desc, false, err);
    return llm__error_done(err, status);
}

LLM_API llm_status llm_step(llm_context *ctx, int n_tokens, int *n_running, llm_error *err) {
    int n = 0;
    if (!ctx || n_tokens < 0) return llm__error(err, LLM_ERROR_ARGUMENT, "ctx is NULL, or n_tokens negative");
    llm_status status = LLM__ENTER(ctx, err);
    if (!status) status = llm__stream_step(ctx, NULL, n_tokens, err);
    for (const llm_stream *s = ctx->streams; s; s = s->next) n += s->running;
    if (n_running) *n_running = n;
    return llm__error_done(err, status);
}

LLM_API bool llm_stream_is_running(const llm_stream *stream) { return stream->running; }

LLM_API llm_status llm_stream_result(const llm_stream *stream, llm_stats *stats, llm_error *err) {
    if (stats) *stats = stream->stats;
    if (stream->status && err) *err = stream->err;
    return llm__error_done(err, stream->status);
}

LLM_API void llm_stream_free(llm_stream *stream) {
    if (!stream) return;
    if (LLM__ENTER(stream->ctx, NULL)) stream->freed = true;
    else llm__stream_unlink(stream);
}

/* ==== 24 Scoring ================================================================================================

   llm_score computes how likely endings are after their contexts. The text of a question with one ending is its
   context followed by that ending. All texts of a question share a prefix: the context and the first tokens that all
   endings have in common. A token is computed if another one is predicted from it, which is true for all but the last
   of each text. Only rows that predict a token of an ending go through the last layer and the head.

   The packed schedule makes the prefix one sequence and the endings forks of it. It fills every pass to the last
   token: first with endings of questions whose prefix an earlier pass has computed, then with prefixes of further
   questions. A question whose context begins like that of another one, such as with the same instruction, starts from
   that one's sequence. While the other is still being computed it waits for it. The prefixes of questions that are
   answered stay for this until their room is needed.

   The other schedules make rectangular batches, as libraries without ragged batches must, and really do compute the
   padding. They are those of H. Kim and J. Ryu, "Samsung Computer Engineering Challenge 2023, Round 1 Report" (Team
   H). */

/* ---- Text ---- */

/* Length in bytes of the white space at the end of a text, by the rules of Python's str.rstrip. */
static size_t llm__pair_trailing_space(const char *text, size_t n) {
    static const char wide[][4] = {"\xC2\x85",     "\xC2\xA0",     "\xE1\x9A\x80", "\xE2\x80\x80", "\xE2\x80\x81",
                                   "\xE2\x80\x82", "\xE2\x80\x83", "\xE2\x80\x84", "\xE2\x80\x85", "\xE2\x80\x86",
                                   "\xE2\x80\x87", "\xE2\x80\x88", "\xE2\x80\x89", "\xE2\x80\x8A", "\xE2\x80\xA8",
                                   "\xE2\x80\xA9", "\xE2\x80\xAF", "\xE2\x81\x9F", "\xE3\x80\x80"};
    size_t left = n;
    for (size_t length = 1; length && left; left -= length) {
        unsigned char last = (unsigned char)text[left - 1];
        length = last == ' ' || (last >= 9 && last <= 13) || (last >= 28 && last <= 31);
        for (size_t i = 0; i < sizeof wide / sizeof *wide && !length; i++)
            if (strlen(wide[i]) <= left && !memcmp(text + left - strlen(wide[i]), wide[i], strlen(wide[i])))
                length = strlen(wide[i]);
    }
    return n - left;
}

typedef struct llm__pair {
    const llm_tokenizer *tokenizer;
    const char *context, *ending;
    unsigned flags;
    llm_token *ids;
    size_t capacity, n_context, n;
} llm__pair;

static void llm__pair_body(llm__env *env, void *arg) {
    llm__pair *p = (llm__pair *)arg;
    const llm_tokenizer *t = p->tokenizer;
    size_t n_context = strlen(p->context), n_ending = strlen(p->ending);
    size_t n_kept = n_context - llm__pair_trailing_space(p->context, n_context);
    char *whole = (char *)llm__alloc(env, n_context + n_ending + 1, 1);
    memcpy(whole, p->context, n_context);
    memcpy(whole + n_context, p->ending, n_ending + 1);
    if (n_kept) { /* first the ids of the whole text, then the context's ids over their beginning */
        p->n = llm__enc_spans(env, t, whole, n_context + n_ending, p->flags, NULL, 0, p->ids, p->capacity);
        p->n_context = llm__enc_spans(env, t, whole, n_kept, p->flags, NULL, 0, p->ids, p->capacity);
        if (p->n < p->n_context) p->n = p->n_context; /* a merge across the border left no token for the ending */
        return;
    }
    llm_token first = t->bos >= 0 ? t->bos : t->eos;
    if (first < 0) llm__fail(env, LLM_ERROR_ARGUMENT, "the context is empty, and there is no BOS token to begin with");
    if (p->capacity && p->ids) p->ids[0] = first;
    p->n_context = 1;
    p->n = 1 + llm__enc_spans(env, t, whole, n_context + n_ending, p->flags & ~(unsigned)LLM_TOKENS_ENDS, NULL, 0,
                              p->ids ? p->ids + 1 : NULL, p->capacity ? p->capacity - 1 : 0);
}

LLM_API int64_t llm_encode_pair(const llm_tokenizer *tokenizer, const char *context, const char *ending, unsigned flags,
                                llm_token *ids, size_t capacity, int64_t *n_context, llm_error *err) {
    llm__pair pair = {tokenizer, context ? context : "", ending ? ending : "", flags, ids, ids ? capacity : 0, 0, 0};
    llm__pool pool;
    llm__env env;
    llm__pool_init(&pool, &tokenizer->host);
    llm__env_init(&env, &pool, err, NULL);
    llm_status status = llm__env_run(&env, llm__pair_body, &pair);
    llm__pool_free(&pool);
    *n_context = (int64_t)pair.n_context;
    return llm__error_done(err, status) ? -1 : (int64_t)pair.n;
}

/* ---- The batch being filled ---- */

/* A question that the packed schedule is working on. */
typedef struct llm__score_slot {
    int question; /* -1: the slot is free */
    int ending;   /* the ending being computed; -1: the prefix */
    int at;       /* its first token that is not in a batch yet */
} llm__score_slot;

/* A batch whose results are to come: in a pipeline the last stage has them, and the others begin more batches
   meanwhile. */
typedef struct llm__score_pending {
    int n;
    float *log_probs; /* [1 + n_batch * most_endings] behind a number that says whether to stop            */
    size_t *credits;  /* [n_batch * most_endings] the first result that a prediction is part of            */
    int *n_credits;   /* [n_batch * most_endings] how many, one after the other                            */
} llm__score_pending;

/* A question whose last tokens are in a batch. */
typedef struct llm__score_done {
    int question, batch;
} llm__score_done;

typedef struct llm__scorer {
    llm__env *env;
    llm_context *ctx;
    const llm_question *questions;
    int n_questions, most_endings;
    const llm_score_desc *desc_given; /* may be NULL */
    llm_score_desc desc;
    llm_score_stats *stats;
    double *results;      /* NULL: only count what would be computed */
    size_t *first_result; /* [n_questions]                                                            */
    int *prefixes;        /* [n_questions] length of the prefix that all texts of a question share */
    int *unfinished;      /* [n_questions] endings not computed yet */
    bool *begun;          /* [n_questions] has or had a slot of the packed schedule */
    int first_unbegun;    /* all questions before it are begun */
    int n;                /* tokens in the batch                                                      */
    llm_token *tokens;    /* [n_batch]                                                                */
    int *seqs;            /* [n_batch]                                                                */
    bool *logits;         /* [n_batch]                                                                */
    int *first_target;    /* [n_batch + 1]                                                            */
    llm_token *ids;       /* [n_batch * most_endings] the predicted tokens */
    size_t *credits;      /* [n_batch * most_endings] the first result that a prediction counts for */
    int *n_credits;       /* [n_batch * most_endings] for how many consecutive results */
    llm__ctx_targets targets;
    llm__score_pending *pending; /* [n_ahead + 1] the last batches                                        */
    int n_ahead;                 /* batches begun before the results of one are settled; 0 but in a pipeline */
    int n_begun, n_settled;      /* batches                                                               */
    llm__score_done *finished;   /* [n_questions]                                                         */
    int n_finished;              /* questions that are in batches to the end; those answered are in stats  */
    bool wants_to_stop;          /* a callback of this rank                                               */
    llm__score_slot *slots;      /* [n_slots] slot i has the sequences from i * most_endings on              */
    int n_slots;
} llm__scorer;

static void llm__score_check(llm__scorer *s, llm_status status) {
    if (!status) return;
    s->env->status = status;
    longjmp(s->env->unwind, 1);
}

static bool llm__score_cancel(void *user) {
    llm__scorer *s = (llm__scorer *)user;
    const llm_context_desc *d = &s->ctx->desc;
    return s->wants_to_stop || (d->cancel && d->cancel(d->cancel_user));
}

/* The last stage sends the results of a batch to the others, and with them whether to stop. All stages begin as many
   batches before they hear of it, so that they stop together. */
static void llm__score_send_results(llm__scorer *s, llm__score_pending *p) {
    llm_comm *pipeline = s->ctx->backend_desc.pipeline;
    p->log_probs[0] = s->targets.stopped;
    for (int i = 0; i < pipeline->size - 1; i++)
        llm__score_check(s, pipeline->send(pipeline, i, p->log_probs, (1 + (size_t)p->n) * sizeof(float), s->env->err));
}

/* The oldest batch's results, waited for; says whether to stop. */
static bool llm__score_take_results(llm__scorer *s, llm__score_pending **oldest) {
    llm_comm *pipeline = s->ctx->backend_desc.pipeline;
    llm__score_pending *p = *oldest = &s->pending[s->n_settled++ % (s->n_ahead + 1)];
    if (!s->n_ahead) return false;
    if (!llm__ranks_is_last_stage(pipeline))
        llm__score_check(s, pipeline->receive(pipeline, pipeline->size - 1, p->log_probs,
                                              (1 + (size_t)p->n) * sizeof(float), s->env->err));
    return p->log_probs[0] != 0;
}

/* All messages have arrived: their memory can go. */
static void llm__score_drain_results(llm__scorer *s) {
    llm_comm *pipeline = s->ctx->backend_desc.pipeline;
    for (int i = 0; s->n_ahead && llm__ranks_is_last_stage(pipeline) && i < pipeline->size - 1; i++)
        llm__score_check(s, pipeline->drain(pipeline, i, 0, s->env->err));
}

/* A question is answered. In a pipeline, that a callback wants to stop goes along with the next batch. */
static void llm__score_answered(llm__scorer *s, int question) {
    s->stats->n_questions++;
    if (!s->results) return;
    llm__ctx_begin_callback(s->ctx);
    bool stop =
        s->desc.on_question && !s->desc.on_question(s->desc.user, question, s->results + s->first_result[question]);
    llm__ctx_end_callback(s->ctx);
    if (!llm__ranks_any(s->ctx->backend_desc.tensor, NULL, stop)) return;
    s->wants_to_stop = true;
    if (!s->n_ahead)
        llm__fail(s->env, LLM_ERROR_CANCELLED, "scoring was stopped after %d questions", s->stats->n_questions);
}

/* Adds up the results of the oldest batch. A text's predictions come in order, so its sum is the same in all schedules.
   */
static void llm__score_settle_batch(llm__scorer *s) {
    llm__score_pending *p;
    int batch = s->n_settled;
    if (llm__score_take_results(s, &p)) {
        while (s->n_settled < s->n_begun) llm__score_take_results(s, &p);
        llm__score_drain_results(s);
        llm__fail(s->env, LLM_ERROR_CANCELLED, "scoring was stopped after %d questions", s->stats->n_questions);
    }
    for (int i = 0; i < p->n && s->results; i++)
        for (int j = 0; j < p->n_credits[i]; j++) s->results[p->credits[i] + (size_t)j] += (double)p->log_probs[1 + i];
    while (s->stats->n_questions < s->n_finished && s->finished[s->stats->n_questions].batch == batch)
        llm__score_answered(s, s->finished[s->stats->n_questions].question);
}

/* Computes the batch and begins another. */
static void llm__score_batch(llm__scorer *s) {
    llm_context *ctx = s->ctx;
    llm__score_pending *p = &s->pending[s->n_begun % (s->n_ahead + 1)];
    llm_batch batch = {s->n, s->tokens, s->seqs, s->logits};
    if (s->n == 0) return;
    s->targets.log_probs = p->log_probs + 1;
    ctx->targets = &s->targets;
    llm_status status = llm__ctx_forward(ctx, &batch, false, llm__score_cancel, s, s->env->err);
    ctx->targets = NULL;
    ctx->n_logits = 0;
    llm__score_check(s, status);
    p->n = s->targets.n;
    for (int i = 0; i < p->n; i++) {
        p->credits[i] = s->credits[s->targets.from[i]];
        p->n_credits[i] = s->n_credits[s->targets.from[i]];
    }
    s->stats->n_passes++;
    s->n = 0;
    s->n_begun++;
    if (s->n_ahead && llm__ranks_is_last_stage(ctx->backend_desc.pipeline)) llm__score_send_results(s, p);
    while (s->n_begun - s->n_settled > s->n_ahead) llm__score_settle_batch(s);
}

/* Appends a token to a sequence. The caller has checked that the batch has room. */
static void llm__score_push(llm__scorer *s, int seq, llm_token token) {
    s->tokens[s->n] = token;
    s->seqs[s->n] = seq;
    s->logits[s->n] = false;
    s->first_target[s->n + 1] = s->first_target[s->n];
    s->n++;
    s->stats->n_computed++;
}

/* Says that `token`, which follows the last token pushed, is part of n endings. */
static void llm__score_expect(llm__scorer *s, llm_token token, size_t result, int n) {
    int target = s->first_target[s->n]++;
    s->ids[target] = token;
    s->credits[target] = result;
    s->n_credits[target] = n;
    s->stats->n_predicted += !s->logits[s->n - 1];
    s->logits[s->n - 1] = true;
}

static llm_token llm__score_text_at(const llm_question *q, int ending, int i) {
    return i < q->n_context ? q->context[i] : q->endings[ending][i - q->n_context];
}

/* Number of tokens of a text from which another one is predicted. */
static int llm__score_text_length(const llm_question *q, int ending) { return q->n_context + q->n_ending[ending] - 1; }

/* Pushes token i of a text and what it predicts. With ending -1 it is a token of the shared prefix. */
static void llm__score_token(llm__scorer *s, int seq, int question, int ending, int i) {
    const llm_question *q = &s->questions[question];
    size_t result = s->first_result[question];
    llm__score_push(s, seq, llm__score_text_at(q, ending < 0 ? 0 : ending, i));
    if (ending > 0 && i < s->prefixes[question]) s->stats->n_redundant++;
    if (i + 1 < q->n_context) return;
    if (ending >= 0) llm__score_expect(s, llm__score_text_at(q, ending, i + 1), result + (size_t)ending, 1);
    else if (i + 1 < s->prefixes[question]) llm__score_expect(s, llm__score_text_at(q, 0, i + 1), result, q->n_endings);
    else
        for (int e = 0; e < q->n_endings; e++)
            llm__score_expect(s, llm__score_text_at(q, e, i + 1), result + (size_t)e, 1);
}

/* One more ending of a question is in a batch to its end. */
static void llm__score_finished(llm__scorer *s, int question) {
    if (--s->unfinished[question]) return;
    llm__score_done finished = {question, s->n_begun - 1};
    s->finished[s->n_finished++] = finished;
    if (!s->n_ahead) llm__score_answered(s, question);
}

static void llm__score_drop(llm__scorer *s, int first_seq, int n) {
    for (int seq = first_seq; seq < first_seq + n; seq++) llm__cache_truncate(&s->ctx->cache, seq, 0);
}

/* ---- The packed schedule ---- */

static int llm__score_shared_prefix(const llm__scorer *s, int question) {
    return s->desc.recompute_context ? 0 : s->prefixes[question];
}

/* The most cache blocks that a question can take. */
static int64_t llm__score_question_blocks(const llm__scorer *s, int question) {
    const llm_question *q = &s->questions[question];
    int prefix = llm__score_shared_prefix(s, question);
    int64_t blocks = llm__cache_blocks_for(prefix);
    for (int e = 0; e < q->n_endings; e++)
        if (llm__score_text_length(q, e) > prefix)
            blocks += llm__cache_blocks_for(llm__score_text_length(q, e)) - prefix / LLM_CACHE_BLOCK;
    return blocks;
}

/* Adds as many of the slot's tokens as the batch has room for. */
static void llm__score_fill_from_slot(llm__scorer *s, int index) {
    llm__score_slot *slot = &s->slots[index];
    const llm_question *q = &s->questions[slot->question];
    int seq = index * s->most_endings, prefix = llm__score_shared_prefix(s, slot->question),
        room = s->ctx->desc.n_batch;
    if (slot->ending < 0) {
        for (; slot->at < prefix && s->n < room; slot->at++) llm__score_token(s, seq, slot->question, -1, slot->at);
        return;
    }
    for (; slot->ending < q->n_endings; slot->ending++, slot->at = prefix) {
        int length = llm__score_text_length(q, slot->ending);
        for (; slot->at < length && s->n < room; slot->at++)
            llm__score_token(s, seq + slot->ending, slot->question, slot->ending, slot->at);
        if (slot->at < length) return;
    }
}

/* After a pass: forks a prefix that is complete, and frees the slot of a question that is complete. */
static void llm__score_settle_slot(llm__scorer *s, int index) {
    llm__score_slot *slot = &s->slots[index];
    const llm_question *q = &s->questions[slot->question];
    int seq = index * s->most_endings, prefix = llm__score_shared_prefix(s, slot->question), question = slot->question;
    if (slot->ending < 0 && slot->at == prefix) {
        for (int e = 1; e < q->n_endings; e++) /* the first ending continues in the prefix's own sequence */
            if (llm__score_text_length(q, e) > prefix) llm__cache_fork(&s->ctx->cache, seq + e, seq, prefix);
        slot->ending = 0;
    } else if (slot->ending == q->n_endings) {
        llm__score_drop(s, seq + 1, q->n_endings - 1);
        llm__cache_truncate(&s->ctx->cache, seq, prefix);
        s->ctx->picked_at[seq] = ++s->ctx->clock; /* kept while there is room */
        slot->question = -1;
        for (int e = 0; e < q->n_endings; e++) llm__score_finished(s, question);
    }
}

/* True if a question that is being computed has more in common with this one than any sequence holds by now. The last
   token of a context is never common, since it predicts. */
static bool llm__score_waits(const llm__scorer *s, int question) {
    const llm_question *q = &s->questions[question];
    int held = 0, coming = 0;
    if (s->desc.recompute_context) return false;
    for (int i = 0; i < s->n_slots; i++) {
        int same = llm__seq_common(s->ctx, i * s->most_endings, q->context, q->n_context - 1);
        if (same > held) held = same;
        if (s->slots[i].question < 0 || s->slots[i].ending >= 0) continue;
        const llm_question *other = &s->questions[s->slots[i].question];
        for (same = 0; same < q->n_context - 1 && same < other->n_context; same++)
            if (q->context[same] != other->context[same]) break;
        if (same > coming) coming = same;
    }
    return coming >= held + LLM__SEQ_WORTH_SHARING;
}

/* The next question to begin, if the cache has room for the whole of it. One that waits is passed over, but only by the
   next few. Returns -1 if there is none. */
static int llm__score_next_question(llm__scorer *s, int64_t blocks_left) {
    enum { FEW = 16 };
    while (s->first_unbegun < s->n_questions && s->begun[s->first_unbegun]) s->first_unbegun++;
    for (int i = s->first_unbegun; i < s->n_questions && i < s->first_unbegun + FEW; i++) {
        if (s->begun[i]) continue;
        if (llm__score_question_blocks(s, i) > blocks_left) return -1;
        if (!llm__score_waits(s, i)) return i;
    }
    return -1;
}

/* Takes a question into a free slot. */
static void llm__score_begin_question(llm__scorer *s, int index, int question) {
    const llm_question *q = &s->questions[question];
    llm__score_slot *slot = &s->slots[index];
    int seq = index * s->most_endings, own;
    bool shares = llm__score_shared_prefix(s, question) > 0;
    s->begun[question] = true;
    s->ctx->picked_at[seq] = 0;
    slot->question = question;
    slot->ending = shares ? -1 : 0;
    slot->at = llm__seq_start(s->ctx, seq, q->context, shares ? q->n_context - 1 : 0, &own);
    s->stats->n_shared += slot->at;
}

static void llm__score_packed(llm__scorer *s) {
    int64_t blocks_left = s->ctx->cache.n_blocks;
    int n_batch = s->ctx->desc.n_batch;
    while (s->n_finished < s->n_questions) {
        for (int i = 0; i < s->n_slots; i++)
            if (s->slots[i].question >= 0) llm__score_fill_from_slot(s, i);
        for (int i = 0; i < s->n_slots && s->n < n_batch; i++) {
            if (s->slots[i].question >= 0) continue;
            int question = llm__score_next_question(s, blocks_left);
            if (question < 0) break;
            blocks_left -= llm__score_question_blocks(s, question);
            llm__score_begin_question(s, i, question);
            llm__score_fill_from_slot(s, i);
        }
        llm__score_batch(s);
        for (int i = 0; i < s->n_slots; i++) {
            int question = s->slots[i].question;
            if (question < 0) continue;
            llm__score_settle_slot(s, i);
            if (s->slots[i].question < 0) blocks_left += llm__score_question_blocks(s, question);
        }
    }
}

/* ---- Rectangles ---- */

/* A text, or with ending -1 the shared prefix of a question, and the number of its tokens to compute. */
typedef struct llm__score_text {
    int length, question, ending;
} llm__score_text;

static int llm__score_compare_texts(const void *a, const void *b) {
    const llm__score_text *x = (const llm__score_text *)a, *y = (const llm__score_text *)b;
    if (x->length != y->length) return x->length < y->length ? -1 : 1;
    if (x->question != y->question) return x->question < y->question ? -1 : 1;
    return (x->ending > y->ending) - (x->ending < y->ending);
}

/* What a batch may use: sequences, and cache blocks beside those of the `base` tokens that are already there. */
typedef struct llm__score_room {
    int n_seq, n_blocks, base;
} llm__score_room;

static int llm__score_most_texts(const llm__score_room *room, int length) {
    int blocks = llm__cache_blocks_for(room->base + length) - room->base / LLM_CACHE_BLOCK;
    int most = blocks && room->n_blocks / blocks < room->n_seq ? room->n_blocks / blocks : room->n_seq;
    return most < 1 ? 1 : most;
}

/* Cuts the texts, in the given order, into batches of `size`, or fewer where there is no room. Writes where each ends
   and returns the number of batches. */
static int llm__score_cut_fixed(const llm__score_text *texts, int n, int size, const llm__score_room *room, int *ends) {
    int n_batches = 0, from = 0, longest = 0;
    for (int i = 0; i < n; i++) {
        if (texts[i].length > longest) longest = texts[i].length;
        if (i > from && (i - from == size || i - from + 1 > llm__score_most_texts(room, longest))) {
            ends[n_batches++] = from = i;
            longest = texts[i].length;
        }
    }
    ends[n_batches++] = n;
    return n_batches;
}

/* Equations 3 and 4 of the report. For texts in order of length l, D[i] is the smallest waste of batches that hold the
   first i texts:

     D[i] = min over j < i of  D[j] + l_i (i - j) - sum of l_k, k = j+1 .. i       if l_i (i - j) >= theta
     D[i] = min over j < i of  D[j] + sum of l_k - l_(j+1) (i - j)                 if l_(j+1) (i - j) >= theta

   The first is for texts padded to the longest, the second for contexts cut to the shortest. Where theta cannot be
   reached, there are as few batches below theta as possible: such a batch counts as a waste that outweighs all
   others. */
static int llm__score_cut_by_waste(llm__env *env, const llm__score_text *texts, int n, bool to_shortest, int theta,
                                   const llm__score_room *room, int *ends) {
    const int64_t below_theta = (int64_t)1 << 40;
    int64_t *least = (int64_t *)llm__alloc(env, (size_t)n + 1, sizeof *least);
    int64_t *total = (int64_t *)llm__alloc(env, (size_t)n + 1, sizeof *total);
    int *from = (int *)llm__alloc(env, (size_t)n + 1, sizeof *from), n_batches = 0;
    least[0] = total[0] = 0;
    for (int i = 1; i <= n; i++) {
        int most = llm__score_most_texts(room, texts[i - 1].length);
        total[i] = total[i - 1] + texts[i - 1].length;
        least[i] = INT64_MAX;
        for (int j = i - 1; j >= 0 && i - j <= most; j--) {
            int64_t area = (int64_t)texts[to_shortest ? j : i - 1].length * (i - j), sum = total[i] - total[j];
            int64_t waste = least[j] + (to_shortest ? sum - area : area - sum) + (area < theta ? below_theta : 0);
            if (waste > least[i]) continue;
            least[i] = waste;
            from[i] = j;
        }
    }
    for (int i = n; i > 0; i = from[i]) n_batches++;
    for (int i = n, batch = n_batches; i > 0; i = from[i]) ends[--batch] = i;
    llm__free(env->pool, from);
    llm__free(env->pool, total);
    llm__free(env->pool, least);
    return n_batches;
}

/* Cuts the texts into batches and returns where each ends, in new memory. */
static int *llm__score_cut_batches(llm__scorer *s, llm__score_text *texts, int n, bool to_shortest,
                                   const llm__score_room *room, int *n_batches) {
    int *ends = (int *)llm__alloc(s->env, (size_t)n + 1, sizeof *ends);
    bool fixed = s->desc.schedule == LLM_SCHEDULE_FIXED;
    int size = fixed && to_shortest && s->desc.batch_context ? s->desc.batch_context : s->desc.batch;
    if (fixed || (size && !to_shortest)) {
        *n_batches = llm__score_cut_fixed(texts, n, size, room, ends);
        return ends;
    }
    qsort(texts, (size_t)n, sizeof *texts, llm__score_compare_texts);
    *n_batches = llm__score_cut_by_waste(s->env, texts, n, to_shortest,
                                         to_shortest ? s->desc.min_context_tokens : s->desc.min_tokens, room, ends);
    return ends;
}

/* Computes tokens [from, to) of n texts, each in its sequence, at most `most` in a pass; those that are shorter are
   padded. */
static void llm__score_rectangle(llm__scorer *s, const llm__score_text *texts, int n, int first_seq, int from, int to,
                                 int most) {
    for (int text = 0; text < n; text++)
        for (int i = from; i < to; i++) {
            if (s->n == most) llm__score_batch(s);
            if (i < from + texts[text].length) {
                llm__score_token(s, first_seq + text, texts[text].question, texts[text].ending, i);
            } else {
                llm__score_push(s, first_seq + text, 0);
                s->stats->n_padded++;
            }
        }
    llm__score_batch(s);
}

static int llm__score_longest_text(const llm__score_text *texts, int n) {
    int longest = 0;
    for (int i = 0; i < n; i++)
        if (texts[i].length > longest) longest = texts[i].length;
    return longest;
}

/* Lists the texts of n questions without their first `base` tokens, and without texts of which nothing remains. */
static int llm__score_list_texts(const llm__scorer *s, const llm__score_text *questions, int n, int base,
                                 llm__score_text *texts) {
    int n_texts = 0;
    for (int i = 0; i < n; i++)
        for (int e = 0; e < s->questions[questions[i].question].n_endings; e++) {
            llm__score_text text = {llm__score_text_length(&s->questions[questions[i].question], e) - base,
                                    questions[i].question, e};
            if (text.length > 0) texts[n_texts++] = text;
        }
    return n_texts;
}

/* Without a shared cache: computes every text from its first token on. */
static void llm__score_whole_texts(llm__scorer *s, llm__score_text *prefixes, llm__score_text *texts) {
    llm__score_room room = {s->ctx->desc.n_seq, s->ctx->cache.n_blocks, 0};
    int n_batches, n = llm__score_list_texts(s, prefixes, s->n_questions, 0, texts);
    int *ends = llm__score_cut_batches(s, texts, n, false, &room, &n_batches);
    for (int batch = 0, from = 0; batch < n_batches; from = ends[batch++]) {
        int some = ends[batch] - from;
        llm__score_rectangle(s, texts + from, some, 0, 0, llm__score_longest_text(texts + from, some),
                             s->ctx->desc.n_batch);
        llm__score_drop(s, 0, some);
        for (int i = from; i < from + some; i++) llm__score_finished(s, texts[i].question);
    }
    llm__free(s->env->pool, ends);
}

/* Computes the endings of questions of whose prefixes the first n sequences hold `base` tokens each. */
static void llm__score_endings(llm__scorer *s, const llm__score_text *prefixes, int n, int base,
                               llm__score_text *texts) {
    llm__score_room room = {s->ctx->desc.n_seq - n, s->ctx->cache.n_free, base};
    int n_batches, n_texts = llm__score_list_texts(s, prefixes, n, base, texts);
    int *ends = llm__score_cut_batches(s, texts, n_texts, false, &room, &n_batches);
    for (int batch = 0, from = 0; batch < n_batches && n_texts; from = ends[batch++]) {
        int some = ends[batch] - from;
        for (int i = 0; i < some; i++) {
            int parent = 0;
            while (prefixes[parent].question != texts[from + i].question) parent++;
            llm__cache_fork(&s->ctx->cache, n + i, parent, base);
        }
        llm__score_rectangle(s, texts + from, some, n, base, base + llm__score_longest_text(texts + from, some),
                             s->ctx->desc.n_batch);
        llm__score_drop(s, n, some);
    }
    llm__free(s->env->pool, ends);
}

/* Tokens of the passes in which a number of them is computed: all passes about the same. */
static int llm__score_mini_batch(const llm__scorer *s, int n_tokens) {
    int most = s->ctx->desc.n_batch;
    if (s->desc.mini_batch && s->desc.mini_batch < most) most = s->desc.mini_batch;
    int n_parts = (n_tokens + most - 1) / most;
    return (n_tokens + n_parts - 1) / n_parts;
}

/* Contexts in batches, cut to the shortest of each; then, batch by batch, what follows. */
static void llm__score_shared_prefixes(llm__scorer *s, llm__score_text *prefixes, llm__score_text *texts) {
    int n_blocks = s->ctx->cache.n_blocks, longest = 0, n_batches;
    for (int i = 0; i < s->n_questions; i++)
        for (int e = 0; e < s->questions[i].n_endings; e++)
            if (llm__score_text_length(&s->questions[i], e) > longest)
                longest = llm__score_text_length(&s->questions[i], e);
    int kept = llm__cache_blocks_for(longest) > n_blocks / 2 ? llm__cache_blocks_for(longest)
                                                             : n_blocks / 2; /* for the endings */
    llm__score_room room = {s->ctx->desc.n_seq / 2, n_blocks - kept, 0};
    int *ends = llm__score_cut_batches(s, prefixes, s->n_questions, true, &room, &n_batches);
    for (int batch = 0, from = 0; batch < n_batches; from = ends[batch++]) {
        llm__score_text *group = prefixes + from;
        int n = ends[batch] - from, shortest = group[0].length;
        for (int i = 1; i < n; i++)
            if (group[i].length < shortest) shortest = group[i].length;
        llm__score_rectangle(s, group, n, 0, 0, shortest, llm__score_mini_batch(s, n * shortest));
        llm__score_endings(s, group, n, shortest, texts);
        llm__score_drop(s, 0, n);
        for (int i = 0; i < n; i++)
            for (int e = 0; e < s->questions[group[i].question].n_endings; e++)
                llm__score_finished(s, group[i].question);
    }
    llm__free(s->env->pool, ends);
}

static void llm__score_rectangles(llm__scorer *s, size_t n_texts) {
    llm__score_text *prefixes = (llm__score_text *)llm__alloc(s->env, (size_t)s->n_questions, sizeof *prefixes);
    llm__score_text *texts = (llm__score_text *)llm__alloc(s->env, n_texts, sizeof *texts);
    for (int i = 0; i < s->n_questions; i++) {
        llm__score_text prefix = {s->prefixes[i], i, -1};
        prefixes[i] = prefix;
    }
    if (s->desc.recompute_context) llm__score_whole_texts(s, prefixes, texts);
    else llm__score_shared_prefixes(s, prefixes, texts);
}

/* ---- llm_score ---- */

static void llm__score_check_tokens(const llm__scorer *s, int question, const char *what, const llm_token *tokens,
                                    int n) {
    int n_vocab = s->ctx->model->shape.n_vocab;
    if (n <= 0 || !tokens) llm__fail(s->env, LLM_ERROR_ARGUMENT, "question %d: %s has no tokens", question, what);
    for (int i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= n_vocab)
            llm__fail(s->env, LLM_ERROR_ARGUMENT, "question %d: token %d of %s is %ld; the vocabulary has %d", question,
                      i, what, (long)tokens[i], n_vocab);
}

/* Checks everything that could fail later. */
static void llm__score_check_question(llm__scorer *s, int question) {
    const llm_question *q = &s->questions[question];
    const llm_context_desc *d = &s->ctx->desc;
    llm__score_check_tokens(s, question, "its context", q->context, q->n_context);
    if (q->n_endings <= 0 || !q->endings || !q->n_ending)
        llm__fail(s->env, LLM_ERROR_ARGUMENT, "question %d has no endings", question);
    if (q->n_endings > d->n_seq)
        llm__fail(s->env, LLM_ERROR_CONTEXT_FULL, "question %d has %d endings, but the context %d sequences (n_seq)",
                  question, q->n_endings, d->n_seq);
    for (int e = 0; e < q->n_endings; e++) {
        llm__score_check_tokens(s, question, "an ending", q->endings[e], q->n_ending[e]);
        if ((int64_t)q->n_context + q->n_ending[e] - 1 > d->n_ctx)
            llm__fail(s->env, LLM_ERROR_CONTEXT_FULL,
                      "question %d with its ending %d has %lld tokens to compute, but a sequence holds %d (n_ctx)",
                      question, e, (long long)q->n_context + q->n_ending[e] - 1, d->n_ctx);
    }
}

/* Length of the prefix that all texts share. At least one token of each ending is not part of it. */
static int llm__score_common_prefix(const llm_question *q) {
    int n = q->n_ending[0] - 1;
    for (int e = 1; e < q->n_endings; e++) {
        int same = 0;
        while (same < n && same < q->n_ending[e] - 1 && q->endings[e][same] == q->endings[0][same]) same++;
        n = same;
    }
    return q->n_context + n;
}

static llm_score_desc llm__score_defaults(llm__env *env, const llm_score_desc *desc) {
    llm_score_desc d;
    memset(&d, 0, sizeof d);
    if (desc) d = *desc;
    if (d.schedule < LLM_SCHEDULE_PACKED || d.schedule > LLM_SCHEDULE_DP)
        llm__fail(env, LLM_ERROR_ARGUMENT, "desc.schedule is %d, which is none", (int)d.schedule);
    if (d.batch < 0 || d.batch_context < 0 || d.min_tokens < 0 || d.min_context_tokens < 0 || d.mini_batch < 0)
        llm__fail(env, LLM_ERROR_ARGUMENT, "a number in llm_score_desc is negative");
    if (!d.batch && d.schedule == LLM_SCHEDULE_FIXED) d.batch = 32;
    if (!d.min_tokens)
        d.min_tokens = 512; /* two cores with AVX-512 reach 90 % of their best rate there: bench --flops-table */
    if (!d.min_context_tokens)
        d.min_context_tokens = 4096; /* larger is better, since it gives the endings more choice */
    return d;
}

/* In a pipeline of p stages the last has a batch's results when the first begins the p-th after it; twice that leaves
   room for stages that are late. No more than messages can be on their way. */
static int llm__score_batches_ahead(const llm_comm *pipeline) {
    if (!pipeline) return 0;
    return 2 * pipeline->size < LLM__COMM_SLOTS - 2 ? 2 * pipeline->size : LLM__COMM_SLOTS - 2;
}

static void llm__score_alloc(llm__scorer *s) {
    size_t n_batch = (size_t)s->ctx->desc.n_batch, n_targets = n_batch * (size_t)s->most_endings;
    llm__env *env = s->env;
    s->tokens = (llm_token *)llm__alloc(env, n_batch, sizeof *s->tokens);
    s->seqs = (int *)llm__alloc(env, n_batch, sizeof *s->seqs);
    s->logits = (bool *)llm__alloc(env, n_batch, sizeof *s->logits);
    s->first_target = (int *)llm__alloc_zero(env, n_batch + 1, sizeof *s->first_target);
    s->ids = (llm_token *)llm__alloc(env, n_targets, sizeof *s->ids);
    s->n_ahead = s->results ? llm__score_batches_ahead(s->ctx->backend_desc.pipeline) : 0;
    s->pending = (llm__score_pending *)llm__alloc_zero(env, (size_t)s->n_ahead + 1, sizeof *s->pending);
    for (int i = 0; i <= s->n_ahead; i++) {
        s->pending[i].log_probs = (float *)llm__alloc(env, n_targets + 1, sizeof(float));
        s->pending[i].credits = (size_t *)llm__alloc(env, n_targets, sizeof(size_t));
        s->pending[i].n_credits = (int *)llm__alloc(env, n_targets, sizeof(int));
    }
    s->begun = (bool *)llm__alloc_zero(env, (size_t)s->n_questions, sizeof *s->begun);
    s->finished = (llm__score_done *)llm__alloc(env, (size_t)s->n_questions, sizeof *s->finished);
    s->credits = (size_t *)llm__alloc(env, n_targets, sizeof *s->credits);
    s->n_credits = (int *)llm__alloc(env, n_targets, sizeof *s->n_credits);
    s->targets.first = s->first_target;
    s->targets.ids = s->ids;
    s->targets.count_only = !s->results;
    s->targets.pass_ids = (llm_token *)llm__alloc(env, n_targets, sizeof *s->targets.pass_ids);
    s->targets.pass_rows = (int *)llm__alloc(env, n_targets, sizeof *s->targets.pass_rows);
    s->targets.from = (int *)llm__alloc(env, n_targets, sizeof *s->targets.from);
    s->n_slots = s->ctx->desc.n_seq / s->most_endings;
    s->slots = (llm__score_slot *)llm__alloc(env, (size_t)s->n_slots, sizeof *s->slots);
    for (int i = 0; i < s->n_slots; i++) s->slots[i].question = -1;
}

static void llm__score_body(llm__env *env, void *arg) {
    llm__scorer *s = (llm__scorer *)arg;
    size_t n_texts = 0, n = (size_t)s->n_questions;
    double start = llm__clock_now();
    s->env = env;
    s->desc = llm__score_defaults(env, s->desc_given);
    s->first_result = (size_t *)llm__alloc(env, n, sizeof *s->first_result);
    s->prefixes = (int *)llm__alloc(env, n, sizeof *s->prefixes);
    s->unfinished = (int *)llm__alloc(env, n, sizeof *s->unfinished);
    for (int i = 0; i < s->n_questions; i++) {
        llm__score_check_question(s, i);
        s->first_result[i] = n_texts;
        s->prefixes[i] = llm__score_common_prefix(&s->questions[i]);
        s->unfinished[i] = s->questions[i].n_endings;
        n_texts += (size_t)s->questions[i].n_endings;
        if (s->questions[i].n_endings > s->most_endings) s->most_endings = s->questions[i].n_endings;
        if (llm__score_question_blocks(s, i) > s->ctx->cache.n_blocks)
            llm__fail(env, LLM_ERROR_CONTEXT_FULL,
                      "question %d needs %lld positions of the cache, which has %d (n_cache)", i,
                      (long long)llm__score_question_blocks(s, i) * LLM_CACHE_BLOCK,
                      s->ctx->cache.n_blocks * LLM_CACHE_BLOCK);
    }
    for (size_t i = 0; i < n_texts && s->results; i++) s->results[i] = 0;
    llm__score_drop(s, 0, s->ctx->desc.n_seq);
    memset(s->ctx->picked_at, 0, (size_t)s->ctx->desc.n_seq * sizeof *s->ctx->picked_at);
    llm__score_alloc(s);
    if (s->desc.schedule == LLM_SCHEDULE_PACKED) llm__score_packed(s);
    else llm__score_rectangles(s, n_texts);
    while (s->n_settled < s->n_begun) llm__score_settle_batch(s);
    llm__score_drain_results(s);
    /* A callback may have wanted to stop when no batch was left to go along with. */
    if (s->n_ahead && llm__ranks_any(NULL, s->ctx->backend_desc.pipeline, s->wants_to_stop))
        llm__fail(env, LLM_ERROR_CANCELLED, "scoring was stopped after %d questions", s->stats->n_questions);
    s->stats->seconds = llm__clock_now() - start;
}

LLM_API llm_status llm_score(llm_context *ctx, const llm_question *questions, int n_questions,
                             const llm_score_desc *desc, double *log_likelihoods, llm_score_stats *stats,
                             llm_error *err) {
    llm_score_stats unwanted;
    llm__scorer scorer;
    llm__env env;
    if (!ctx || n_questions < 0 || (n_questions && !questions))
        return llm__error(err, LLM_ERROR_ARGUMENT, "ctx or questions is NULL, or n_questions negative");
    llm_status status = LLM__ENTER(ctx, err);
    for (int seq = 0; seq < ctx->desc.n_seq && !status; seq++)
        if (ctx->runs[seq]) status = llm__ctx_claim_seq(ctx, seq, err);
    if (status) return status;
    memset(&scorer, 0, sizeof scorer);
    scorer.ctx = ctx;
    scorer.questions = questions;
    scorer.n_questions = n_questions;
    scorer.most_endings = 1;
    scorer.desc_given = desc;
    scorer.results = log_likelihoods;
    scorer.stats = stats ? stats : &unwanted;
    memset(scorer.stats, 0, sizeof *scorer.stats);
    llm__env_init(&env, &ctx->work, err, NULL);
    status = llm__env_run(&env, llm__score_body, &scorer);
    if (scorer.tokens) llm__score_drop(&scorer, 0, ctx->desc.n_seq);
    memset(ctx->picked_at, 0, (size_t)ctx->desc.n_seq * sizeof *ctx->picked_at);
    llm__pool_free(&ctx->work);
    return llm__error_done(err, llm__ctx_tell_ranks(ctx, status));
}

#if defined(__clang__)
#pragma STDC FP_CONTRACT DEFAULT
#pragma float_control(pop)
#pragma clang diagnostic pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#define LLM__IMPLEMENTED
#endif /* LLM_IMPLEMENTATION */

/*
MIT License

Copyright (c) 2026 llm.h authors

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
*/

/* ==== 25 Kernel text ============================================================================================

   The text of the kernels. Section 12 includes this file once for each instruction set, and each time only what follows
   is compiled. */

#ifdef LLM__KERNEL_PASS /* compiled once for each instruction set */

#define LLM__INLINE static inline __attribute__((always_inline)) LLM__TARGET
#define V LLM__FN(v)
#define v_load LLM__FN(v_load)
#define v_store LLM__FN(v_store)
#define v_splat LLM__FN(v_splat)
#define v_add LLM__FN(v_add)
#define v_sub LLM__FN(v_sub)
#define v_mul LLM__FN(v_mul)
#define v_fma LLM__FN(v_fma)
#define v_max LLM__FN(v_max)
#define v_min LLM__FN(v_min)
#define v_even LLM__FN(v_even)
#define v_odd LLM__FN(v_odd)
#define v_round_bf16 LLM__FN(v_round_bf16)
#define v_int8 LLM__FN(v_int8)
#define v_half LLM__FN(v_half)
#define v_store_bytes LLM__FN(v_store_bytes)
#define v_bytes LLM__FN(v_bytes)
#define v_ints LLM__FN(v_ints)
#define v_load_bytes LLM__FN(v_load_bytes)
#define v_save_bytes LLM__FN(v_save_bytes)
#define v_low LLM__FN(v_low)
#define v_high LLM__FN(v_high)
#define v_above LLM__FN(v_above)
#define v_look_up LLM__FN(v_look_up)
#define v_splat_int LLM__FN(v_splat_int)
#define v_dot_bytes LLM__FN(v_dot_bytes)
#define v_of_ints LLM__FN(v_of_ints)
#define v_times_pow2 LLM__FN(v_times_pow2)
#define v_guess_inverse LLM__FN(v_guess_inverse)
#define v_pair LLM__FN(v_pair)
#define v_dot LLM__FN(v_dot)
#define v_input LLM__FN(v_input)
#define v_exp2 LLM__FN(v_exp2)
#define v_inverse LLM__FN(v_inverse)
#define v_sum LLM__FN(v_sum)
#define v_hmax LLM__FN(v_hmax)

/* Sums stay in registers only if the loops over them are unrolled. clang accepts GCC's pragma without a warning and
   ignores it. */
#if !defined(LLM__USE_AVX512) && !defined(LLM__USE_AVX2) && !defined(LLM__USE_NEON)
#define LLM__UNROLL
#elif defined(__clang__)
#define LLM__UNROLL _Pragma("clang loop unroll(full)")
#else
#define LLM__UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(LLM__USE_AVX512)

typedef __m512 V;
LLM__INLINE V v_load(const float *p) { return _mm512_loadu_ps(p); }
LLM__INLINE void v_store(float *p, V a) { _mm512_storeu_ps(p, a); }
LLM__INLINE V v_splat(float x) { return _mm512_set1_ps(x); }
LLM__INLINE V v_add(V a, V b) { return a + b; }
LLM__INLINE V v_sub(V a, V b) { return a - b; }
LLM__INLINE V v_mul(V a, V b) {
    V r = a * b;
    LLM__HIDE("+v", r);
    return r;
}
LLM__INLINE V v_fma(V a, V b, V c) {
    V r = _mm512_fmadd_ps(a, b, c);
    LLM__HIDE("+v", r);
    return r;
}
LLM__INLINE V v_max(V a, V b) { return _mm512_max_ps(a, b); }
LLM__INLINE V v_min(V a, V b) { return _mm512_min_ps(a, b); }
LLM__INLINE V v_even(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512((const void *)p), 16));
}
LLM__INLINE V v_odd(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512((const void *)p), _mm512_set1_epi32(-65536)));
}
LLM__INLINE V v_int8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}
LLM__INLINE V v_half(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
LLM__INLINE void v_store_bytes(V a, int8_t *to) {
    _mm_storeu_si128((__m128i *)(void *)to, _mm512_cvtepi32_epi8(_mm512_castps_si512(a)));
}
typedef __m512i v_bytes, v_ints;
LLM__INLINE v_bytes v_load_bytes(const uint8_t *p) { return _mm512_loadu_si512((const void *)p); }
LLM__INLINE void v_save_bytes(uint8_t *p, v_bytes a) { _mm512_storeu_si512((void *)p, a); }
LLM__INLINE v_bytes v_low(v_bytes a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
LLM__INLINE v_bytes v_high(v_bytes a) { return v_low(_mm512_srli_epi16(a, 4)); }
LLM__INLINE v_bytes v_above(v_bytes a, v_bytes bits, const int MASK, const int AT) {
    v_bytes up = AT < 4 ? _mm512_slli_epi16(bits, AT < 4 ? 4 - AT : 0) : _mm512_srli_epi16(bits, AT < 4 ? 0 : AT - 4);
    return _mm512_or_si512(a, _mm512_and_si512(up, _mm512_set1_epi8((char)(MASK << 4))));
}
LLM__INLINE v_bytes v_look_up(v_bytes a) {
    const __m128i numbers = _mm_loadu_si128((const __m128i *)(const void *)llm__iq4_numbers);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(numbers), a);
}
LLM__INLINE v_ints v_splat_int(int32_t x) { return _mm512_set1_epi32(x); }
LLM__INLINE V v_of_ints(v_ints a) { return _mm512_cvtepi32_ps(a); }
LLM__INLINE v_ints v_dot_bytes(const bool SIGNED, v_ints sum, v_bytes w, int32_t x) {
    v_bytes xs = _mm512_set1_epi32(x);
#if defined(LLM__USE_BF16) /* and VNNI; signed numbers have 128 added */
    (void)SIGNED;
    return _mm512_dpbusd_epi32(sum, w, xs);
#else
    if (SIGNED) xs = _mm512_mask_sub_epi8(xs, _mm512_movepi8_mask(w), _mm512_setzero_si512(), xs);
    if (SIGNED) w = _mm512_abs_epi8(w);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(w, xs), _mm512_set1_epi16(1)));
#endif
}
LLM__INLINE V v_round_bf16(V a) {
    __m512i u = _mm512_castps_si512(a);
    __m512i up =
        _mm512_add_epi32(_mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7FFF));
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_add_epi32(u, up), _mm512_set1_epi32(-65536)));
}
LLM__INLINE V v_times_pow2(V a, V n) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
}
LLM__INLINE V v_guess_inverse(V a) {
    return _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32(LLM__INVERSE), _mm512_castps_si512(a)));
}

#elif defined(LLM__USE_AVX2)

typedef struct V {
    __m256 lo, hi;
} V;
#define LLM__BOTH(l, h) \
    V r;                \
    r.lo = l;           \
    r.hi = h;           \
    return r
LLM__INLINE V v_load(const float *p) { LLM__BOTH(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
LLM__INLINE void v_store(float *p, V a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
LLM__INLINE V v_splat(float x) { LLM__BOTH(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
LLM__INLINE V v_add(V a, V b) { LLM__BOTH(a.lo + b.lo, a.hi + b.hi); }
LLM__INLINE V v_sub(V a, V b) { LLM__BOTH(a.lo - b.lo, a.hi - b.hi); }
LLM__INLINE V v_mul(V a, V b) {
    __m256 lo = a.lo * b.lo, hi = a.hi * b.hi;
    LLM__HIDE("+x", lo);
    LLM__HIDE("+x", hi);
    LLM__BOTH(lo, hi);
}
LLM__INLINE V v_fma(V a, V b, V c) {
    __m256 lo = _mm256_fmadd_ps(a.lo, b.lo, c.lo), hi = _mm256_fmadd_ps(a.hi, b.hi, c.hi);
    LLM__HIDE("+x", lo);
    LLM__HIDE("+x", hi);
    LLM__BOTH(lo, hi);
}
LLM__INLINE V v_max(V a, V b) { LLM__BOTH(_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)); }
LLM__INLINE V v_min(V a, V b) { LLM__BOTH(_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)); }
LLM__INLINE __m256i LLM__FN(half_round)(__m256i u) {
    __m256i up =
        _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7FFF));
    return _mm256_and_si256(_mm256_add_epi32(u, up), _mm256_set1_epi32(-65536));
}
LLM__INLINE __m256i LLM__FN(half_load)(const uint16_t *p) {
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}
LLM__INLINE V v_even(const uint16_t *p) {
    LLM__BOTH(_mm256_castsi256_ps(_mm256_slli_epi32(LLM__FN(half_load)(p), 16)),
              _mm256_castsi256_ps(_mm256_slli_epi32(LLM__FN(half_load)(p + 16), 16)));
}
LLM__INLINE V v_odd(const uint16_t *p) {
    __m256i high = _mm256_set1_epi32(-65536);
    LLM__BOTH(_mm256_castsi256_ps(_mm256_and_si256(LLM__FN(half_load)(p), high)),
              _mm256_castsi256_ps(_mm256_and_si256(LLM__FN(half_load)(p + 16), high)));
}
LLM__INLINE __m256 LLM__FN(half_int8)(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)));
}
LLM__INLINE V v_int8(const int8_t *p) { LLM__BOTH(LLM__FN(half_int8)(p), LLM__FN(half_int8)(p + 8)); }
LLM__INLINE V v_half(const uint16_t *p) {
    LLM__BOTH(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p)),
              _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p + 8))));
}
LLM__INLINE void v_store_bytes(V a, int8_t *to) {
    const __m256i low = _mm256_set1_epi32(255);
    __m256i words = _mm256_packus_epi32(_mm256_and_si256(_mm256_castps_si256(a.lo), low),
                                        _mm256_and_si256(_mm256_castps_si256(a.hi), low));
    words = _mm256_permute4x64_epi64(words, 0xD8);
    _mm_storeu_si128((__m128i *)(void *)to,
                     _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
typedef struct v_ints {
    __m256i lo, hi;
} v_ints, v_bytes;
#define LLM__BOTH_INTS(l, h) \
    v_ints r;                \
    r.lo = l;                \
    r.hi = h;                \
    return r
LLM__INLINE v_bytes v_load_bytes(const uint8_t *p) {
    LLM__BOTH_INTS(_mm256_loadu_si256((const __m256i *)(const void *)p),
                   _mm256_loadu_si256((const __m256i *)(const void *)(p + 32)));
}
LLM__INLINE void v_save_bytes(uint8_t *p, v_bytes a) {
    _mm256_storeu_si256((__m256i *)(void *)p, a.lo);
    _mm256_storeu_si256((__m256i *)(void *)(p + 32), a.hi);
}
LLM__INLINE v_bytes v_low(v_bytes a) {
    const __m256i mask = _mm256_set1_epi8(15);
    LLM__BOTH_INTS(_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask));
}
LLM__INLINE v_bytes v_high(v_bytes a) {
    a.lo = _mm256_srli_epi16(a.lo, 4);
    a.hi = _mm256_srli_epi16(a.hi, 4);
    return v_low(a);
}
LLM__INLINE __m256i LLM__FN(half_above)(__m256i a, __m256i bits, const int MASK, const int AT) {
    __m256i up = AT < 4 ? _mm256_slli_epi16(bits, AT < 4 ? 4 - AT : 0) : _mm256_srli_epi16(bits, AT < 4 ? 0 : AT - 4);
    return _mm256_or_si256(a, _mm256_and_si256(up, _mm256_set1_epi8((char)(MASK << 4))));
}
LLM__INLINE v_bytes v_above(v_bytes a, v_bytes bits, const int MASK, const int AT) {
    LLM__BOTH_INTS(LLM__FN(half_above)(a.lo, bits.lo, MASK, AT), LLM__FN(half_above)(a.hi, bits.hi, MASK, AT));
}
LLM__INLINE v_bytes v_look_up(v_bytes a) {
    const __m256i numbers =
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)llm__iq4_numbers));
    LLM__BOTH_INTS(_mm256_shuffle_epi8(numbers, a.lo), _mm256_shuffle_epi8(numbers, a.hi));
}
LLM__INLINE v_ints v_splat_int(int32_t x) { LLM__BOTH_INTS(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
LLM__INLINE V v_of_ints(v_ints a) { LLM__BOTH(_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)); }
LLM__INLINE __m256i LLM__FN(half_dot)(const bool SIGNED, __m256i sum, __m256i w, __m256i x) {
    __m256i pairs =
        SIGNED ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)) : _mm256_maddubs_epi16(w, x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
LLM__INLINE v_ints v_dot_bytes(const bool SIGNED, v_ints sum, v_bytes w, int32_t x) {
    __m256i xs = _mm256_set1_epi32(x);
    LLM__BOTH_INTS(LLM__FN(half_dot)(SIGNED, sum.lo, w.lo, xs), LLM__FN(half_dot)(SIGNED, sum.hi, w.hi, xs));
}
LLM__INLINE V v_round_bf16(V a) {
    LLM__BOTH(_mm256_castsi256_ps(LLM__FN(half_round)(_mm256_castps_si256(a.lo))),
              _mm256_castsi256_ps(LLM__FN(half_round)(_mm256_castps_si256(a.hi))));
}
LLM__INLINE __m256 LLM__FN(half_times_pow2)(__m256 a, __m256 n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}
LLM__INLINE V v_times_pow2(V a, V n) {
    LLM__BOTH(LLM__FN(half_times_pow2)(a.lo, n.lo), LLM__FN(half_times_pow2)(a.hi, n.hi));
}
LLM__INLINE V v_guess_inverse(V a) {
    __m256i start = _mm256_set1_epi32(LLM__INVERSE);
    LLM__BOTH(_mm256_castsi256_ps(_mm256_sub_epi32(start, _mm256_castps_si256(a.lo))),
              _mm256_castsi256_ps(_mm256_sub_epi32(start, _mm256_castps_si256(a.hi))));
}

#elif defined(LLM__USE_NEON)

typedef struct V {
    float32x4_t q[4];
} V;
#define LLM__QUARTERS(expression)                                  \
    V r;                                                           \
    LLM__UNROLL for (int i = 0; i < 4; i++) r.q[i] = (expression); \
    return r
LLM__INLINE V v_load(const float *p) { LLM__QUARTERS(vld1q_f32(p + 4 * i)); }
LLM__INLINE void v_store(float *p, V a) { LLM__UNROLL for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.q[i]); }
LLM__INLINE V v_splat(float x) { LLM__QUARTERS(vdupq_n_f32(x)); }
LLM__INLINE V v_add(V a, V b) { LLM__QUARTERS(a.q[i] + b.q[i]); }
LLM__INLINE V v_sub(V a, V b) { LLM__QUARTERS(a.q[i] - b.q[i]); }
LLM__INLINE float32x4_t LLM__FN(rounded)(float32x4_t a) {
    LLM__HIDE("+w", a);
    return a;
}
LLM__INLINE V v_mul(V a, V b) { LLM__QUARTERS(LLM__FN(rounded)(a.q[i] * b.q[i])); }
LLM__INLINE V v_fma(V a, V b, V c) { LLM__QUARTERS(LLM__FN(rounded)(vfmaq_f32(c.q[i], a.q[i], b.q[i]))); }
LLM__INLINE V v_max(V a, V b) { LLM__QUARTERS(vbslq_f32(vcgtq_f32(a.q[i], b.q[i]), a.q[i], b.q[i])); }
LLM__INLINE V v_min(V a, V b) { LLM__QUARTERS(vbslq_f32(vcltq_f32(a.q[i], b.q[i]), a.q[i], b.q[i])); }
LLM__INLINE V v_even(const uint16_t *p) {
    LLM__QUARTERS(vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(vld1q_u16(p + 8 * i)), 16)));
}
LLM__INLINE V v_odd(const uint16_t *p) {
    const uint32x4_t high = vdupq_n_u32(0xFFFF0000);
    LLM__QUARTERS(vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u16(vld1q_u16(p + 8 * i)), high)));
}
LLM__INLINE V v_int8(const int8_t *p) {
    int8x16_t bytes = vld1q_s8(p);
    int16x8_t lo = vmovl_s8(vget_low_s8(bytes)), hi = vmovl_s8(vget_high_s8(bytes));
    LLM__QUARTERS(vcvtq_f32_s32(vmovl_s16(i % 2 ? vget_high_s16(i < 2 ? lo : hi) : vget_low_s16(i < 2 ? lo : hi))));
}
LLM__INLINE V v_half(const uint16_t *p) { LLM__QUARTERS(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)))); }
LLM__INLINE void v_store_bytes(V a, int8_t *to) {
    uint16x4_t words[4];
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) words[i] = vmovn_u32(vreinterpretq_u32_f32(a.q[i]));
    uint8x8_t low = vmovn_u16(vcombine_u16(words[0], words[1])), high = vmovn_u16(vcombine_u16(words[2], words[3]));
    vst1q_s8(to, vreinterpretq_s8_u8(vcombine_u8(low, high)));
}
typedef struct v_bytes {
    uint8x16_t q[4];
} v_bytes;
typedef struct v_ints {
    int32x4_t q[4];
} v_ints;
#define LLM__QUARTER_BYTES(expression)                                         \
    v_bytes r;                                                                 \
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) r.q[i] = (expression); \
    return r
LLM__INLINE v_bytes v_load_bytes(const uint8_t *p) { LLM__QUARTER_BYTES(vld1q_u8(p + 16 * i)); }
LLM__INLINE void v_save_bytes(uint8_t *p, v_bytes a) {
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, a.q[i]);
}
LLM__INLINE v_bytes v_low(v_bytes a) { LLM__QUARTER_BYTES(vandq_u8(a.q[i], vdupq_n_u8(15))); }
LLM__INLINE v_bytes v_high(v_bytes a) { LLM__QUARTER_BYTES(vshrq_n_u8(a.q[i], 4)); }
LLM__INLINE v_bytes v_above(v_bytes a, v_bytes bits, const int MASK, const int AT) {
    LLM__QUARTER_BYTES(vorrq_u8(
        a.q[i], vandq_u8(vshlq_u8(bits.q[i], vdupq_n_s8((int8_t)(4 - AT))), vdupq_n_u8((uint8_t)(MASK << 4)))));
}
LLM__INLINE v_bytes v_look_up(v_bytes a) {
    const uint8x16_t numbers = vreinterpretq_u8_s8(vld1q_s8(llm__iq4_numbers));
    LLM__QUARTER_BYTES(vqtbl1q_u8(numbers, a.q[i]));
}
LLM__INLINE v_ints v_splat_int(int32_t x) {
    v_ints r;
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) r.q[i] = vdupq_n_s32(x);
    return r;
}
LLM__INLINE V v_of_ints(v_ints a) { LLM__QUARTERS(vcvtq_f32_s32(a.q[i])); }
LLM__INLINE v_ints v_dot_bytes(const bool SIGNED, v_ints sum, v_bytes w, int32_t x) {
    const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(x));
    (void)SIGNED; /* unsigned ones have at most 6 bits */
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
        int8x16_t ws = vreinterpretq_s8_u8(w.q[i]);
        int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(ws), vget_low_s8(xs))),
                  high = vpaddlq_s16(vmull_s8(vget_high_s8(ws), vget_high_s8(xs)));
        sum.q[i] = vaddq_s32(sum.q[i], vpaddq_s32(low, high));
    }
    return sum;
}
LLM__INLINE uint32x4_t LLM__FN(quarter_round)(uint32x4_t u) {
    uint32x4_t up = vaddq_u32(vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1)), vdupq_n_u32(0x7FFF));
    return vandq_u32(vaddq_u32(u, up), vdupq_n_u32(0xFFFF0000));
}
LLM__INLINE V v_round_bf16(V a) {
    LLM__QUARTERS(vreinterpretq_f32_u32(LLM__FN(quarter_round)(vreinterpretq_u32_f32(a.q[i]))));
}
LLM__INLINE V v_times_pow2(V a, V n) {
    LLM__QUARTERS(vreinterpretq_f32_u32(
        vaddq_u32(vreinterpretq_u32_f32(a.q[i]), vshlq_n_u32(vreinterpretq_u32_f32(n.q[i]), 23))));
}
LLM__INLINE V v_guess_inverse(V a) {
    LLM__QUARTERS(vreinterpretq_f32_u32(vsubq_u32(vdupq_n_u32(LLM__INVERSE), vreinterpretq_u32_f32(a.q[i]))));
}

#else /* scalar: the definition */

typedef struct V {
    float f[16];
} V;
#define LLM__LANES(expression)                          \
    V r;                                                \
    for (int i = 0; i < 16; i++) r.f[i] = (expression); \
    return r
LLM__INLINE float LLM__FN(flush)(float x) {
    LLM__HIDE_FLOAT(x);
    return (llm__f32_bits(x) & 0x7F800000) ? x : llm__f32_from_bits(llm__f32_bits(x) & 0x80000000);
}
LLM__INLINE V v_load(const float *p) { LLM__LANES(p[i]); }
LLM__INLINE void v_store(float *p, V a) {
    for (int i = 0; i < 16; i++) p[i] = a.f[i];
}
LLM__INLINE V v_splat(float x) { LLM__LANES(x); }
LLM__INLINE V v_add(V a, V b) { LLM__LANES(LLM__FN(flush)(a.f[i] + b.f[i])); }
LLM__INLINE V v_sub(V a, V b) { LLM__LANES(LLM__FN(flush)(a.f[i] - b.f[i])); }
LLM__INLINE V v_mul(V a, V b) { LLM__LANES(LLM__FN(flush)(a.f[i] * b.f[i])); }
LLM__INLINE V v_fma(V a, V b, V c) { LLM__LANES(llm__math_fma(a.f[i], b.f[i], c.f[i])); }
LLM__INLINE V v_max(V a, V b) { LLM__LANES(a.f[i] > b.f[i] ? a.f[i] : b.f[i]); }
LLM__INLINE V v_min(V a, V b) { LLM__LANES(a.f[i] < b.f[i] ? a.f[i] : b.f[i]); }
LLM__INLINE V v_even(const uint16_t *p) { LLM__LANES(llm__bf16_to_f32(p[2 * i])); }
LLM__INLINE V v_odd(const uint16_t *p) { LLM__LANES(llm__bf16_to_f32(p[2 * i + 1])); }
LLM__INLINE V v_int8(const int8_t *p) { LLM__LANES(p[i]); }
LLM__INLINE V v_half(const uint16_t *p) { LLM__LANES(llm__f16_to_f32(p[i])); }
LLM__INLINE void v_store_bytes(V a, int8_t *to) {
    for (int i = 0; i < 16; i++) to[i] = (int8_t)(llm__f32_bits(a.f[i]) & 255);
}
typedef struct v_bytes {
    uint8_t b[64];
} v_bytes;
typedef struct v_ints {
    int32_t i[16];
} v_ints;
#define LLM__LANES_OF(type, n, member, expression)          \
    type r;                                                 \
    for (int i = 0; i < n; i++) r.member[i] = (expression); \
    return r
LLM__INLINE v_bytes v_load_bytes(const uint8_t *p) { LLM__LANES_OF(v_bytes, 64, b, p[i]); }
LLM__INLINE void v_save_bytes(uint8_t *p, v_bytes a) { memcpy(p, a.b, 64); }
LLM__INLINE v_bytes v_low(v_bytes a) { LLM__LANES_OF(v_bytes, 64, b, a.b[i] & 15); }
LLM__INLINE v_bytes v_high(v_bytes a) { LLM__LANES_OF(v_bytes, 64, b, (uint8_t)(a.b[i] >> 4)); }
LLM__INLINE v_bytes v_above(v_bytes a, v_bytes bits, const int MASK, const int AT) {
    LLM__LANES_OF(v_bytes, 64, b, (uint8_t)(a.b[i] | (bits.b[i] >> AT & MASK) << 4));
}
LLM__INLINE v_bytes v_look_up(v_bytes a) { LLM__LANES_OF(v_bytes, 64, b, (uint8_t)llm__iq4_numbers[a.b[i]]); }
LLM__INLINE v_ints v_splat_int(int32_t x) { LLM__LANES_OF(v_ints, 16, i, x); }
LLM__INLINE V v_of_ints(v_ints a) { LLM__LANES((float)a.i[i]); }
LLM__INLINE v_ints v_dot_bytes(const bool SIGNED, v_ints sum, v_bytes w, int32_t x) {
    int8_t xs[4];
    memcpy(xs, &x, 4);
    for (int i = 0; i < 64; i++) sum.i[i / 4] += (SIGNED ? (int8_t)w.b[i] : w.b[i]) * xs[i % 4];
    return sum;
}
LLM__INLINE V v_round_bf16(V a) {
    LLM__LANES(llm__f32_from_bits((llm__f32_bits(a.f[i]) + 0x7FFF + (llm__f32_bits(a.f[i]) >> 16 & 1)) & 0xFFFF0000));
}
LLM__INLINE V v_times_pow2(V a, V n) {
    LLM__LANES(llm__f32_from_bits(llm__f32_bits(a.f[i]) + (llm__f32_bits(n.f[i]) << 23)));
}
LLM__INLINE V v_guess_inverse(V a) { LLM__LANES(llm__f32_from_bits(LLM__INVERSE - llm__f32_bits(a.f[i]))); }

#endif

/* v_bytes is [16][4], v_ints [16]. v_above moves the bits of MASK, from bit AT on, above a number's low four.
   v_look_up takes the numbers of llm__iq4_numbers. v_dot_bytes adds four products with the four integers x to each
   sum. v_store_bytes stores the lowest byte of each of 16 words. v_round_bf16 must not get a NaN or a denormal.
   v_times_pow2 multiplies by 2^n for n + LLM__WHOLE; neither n nor the result may be out of range. v_guess_inverse is
   within 5.1 % of 1 / a. */

/* The scalar set is not meant to be fast, but should stay small. */
#if defined(LLM__USE_AVX512) || defined(LLM__USE_AVX2) || defined(LLM__USE_NEON)
#define LLM__LONG LLM__INLINE
#else
#define LLM__LONG static __attribute__((noinline))
#endif

/* 2^x for x up to 127, but at least 2^-125.5. Relative error below 2e-7: 2^n times a polynomial on |r| <= 1/2, the one
   of its degree that is 1 at 0 and has the smallest relative error. */
LLM__LONG V v_exp2(V x) {
    x = v_max(x, v_splat(-125.5f));
    V n = v_add(x, v_splat(LLM__WHOLE)), r = v_sub(x, v_sub(n, v_splat(LLM__WHOLE)));
    V p = v_splat(0.001326472731f);
    p = v_fma(p, r, v_splat(0.009671512991f));
    p = v_fma(p, r, v_splat(0.05550733581f));
    p = v_fma(p, r, v_splat(0.2402224243f));
    p = v_fma(p, r, v_splat(0.6931470037f));
    p = v_fma(p, r, v_splat(1.0f));
    return v_times_pow2(p, n);
}

/* 1 / a for a = 1 .. 2^125, relative error below 1e-7: two Newton steps from an estimate, the first one with the next
   term of its series. This is faster than a division. */
LLM__INLINE V v_inverse(V a) {
    V minus_a = v_sub(v_splat(0), a), y = v_guess_inverse(a);
    V error = v_fma(minus_a, y, v_splat(1.0f));
    y = v_fma(y, v_fma(error, error, error), y);
    return v_fma(y, v_fma(minus_a, y, v_splat(1.0f)), y);
}

#if defined(LLM__USE_AVX512)

LLM__INLINE float v_sum(V a) {
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

LLM__INLINE float v_hmax(V a) {
    __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

#else

LLM__INLINE float v_sum(V a) {
    float f[16];
    v_store(f, a);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) f[i] = f[i] + f[i + width];
    return f[0];
}

LLM__INLINE float v_hmax(V a) {
    float f[16];
    v_store(f, a);
    for (int width = 8; width; width /= 2) /* the same tree, since 0 and -0 are equal and the order decides */
        for (int i = 0; i < width; i++) f[i] = f[i] > f[i + width] ? f[i] : f[i + width];
    return f[0];
}

#endif

/* MOST_ROWS: rows whose sums fit the registers. Sets with few registers compute many rows in strips of STRIP_ROWS. */
#if defined(LLM__USE_AVX512)
#define LLM__MOST_ROWS 8
#define LLM__GROUP_ROWS 4
#define LLM__GROUP_TILES 2
#elif defined(LLM__USE_AVX2)
#define LLM__MOST_ROWS 4
#define LLM__STRIP_ROWS 6
#define LLM__GROUP_ROWS 4
#define LLM__GROUP_TILES 1
#elif defined(LLM__USE_NEON)
#define LLM__MOST_ROWS 2
#define LLM__STRIP_ROWS 6
#define LLM__GROUP_ROWS 4
#define LLM__GROUP_TILES 1
#else
#define LLM__MOST_ROWS 1
#define LLM__GROUP_ROWS 1
#define LLM__GROUP_TILES 1
#endif

/* ROWS rows at once, so that a weight that has been loaded serves all of them. ROWS is a constant after inlining. */
LLM__INLINE void LLM__FN(float_rows)(const int ROWS, const bool HALF, const float *x, size_t x_stride, const void *w,
                                     int k, float *y, size_t y_stride) {
    V sum[LLM__MOST_ROWS];
    LLM__UNROLL for (int r = 0; r < ROWS; r++) sum[r] = v_load(y + (size_t)r * y_stride);
    for (int i = 0; i < k; i++) {
        V wi = HALF ? v_half((const uint16_t *)w + (size_t)i * 16) : v_load((const float *)w + (size_t)i * 16);
        LLM__UNROLL for (int r = 0; r < ROWS; r++) sum[r] =
            v_fma(v_splat(x[(size_t)r * x_stride + (size_t)i]), wi, sum[r]);
    }
    LLM__UNROLL for (int r = 0; r < ROWS; r++) v_store(y + (size_t)r * y_stride, sum[r]);
}

/* Weight J of eight, for each kind. */
LLM__INLINE V LLM__FN(weight)(const llm__weight_type KIND, const uint8_t *w, const int J) {
    if (KIND != LLM__W_BF16) return v_int8((const int8_t *)w + J * 16);
    return J % 2 ? v_odd((const uint16_t *)w + J / 2 * 32) : v_even((const uint16_t *)w + J / 2 * 32);
}

/* Bytes of a block in a tile. */
LLM__INLINE size_t LLM__FN(block_bytes)(const llm__weight_type KIND) { return KIND == LLM__W_BF16 ? 1024 : 512; }

/* 16 words of two bf16: a in the lower halves, b in the upper. */
LLM__INLINE void LLM__FN(store_words)(V a, V b, uint8_t *to) {
#if defined(LLM__USE_BF16)
    const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512((void *)to, _mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh(b, a)));
#else
    float f[32];
    v_store(f, v_round_bf16(a));
    v_store(f + 16, v_round_bf16(b));
    for (int i = 0; i < 16; i++) {
        uint32_t word = llm__f32_bits(f[i]) >> 16 | llm__f32_bits(f[i + 16]);
        memcpy(to + 4 * i, &word, 4);
    }
#endif
}

LLM__TARGET static void LLM__FN(unpack)(const uint8_t *w, int n_blocks, uint8_t *to) {
    for (int i = 0; i < n_blocks * 4; i++, w += 128) {
        LLM__UNROLL for (int j = 0; j < 8; j += 2, to += 64)
            LLM__FN(store_words)(LLM__FN(weight)(LLM__W_INT8, w, j), LLM__FN(weight)(LLM__W_INT8, w, j + 1), to);
    }
}

#if defined(LLM__USE_BF16)

/* VDPBF16PS multiplies pairs of bf16: sum = fma(lower, lower, fma(upper, upper, sum)). So two steps of a chain of even
   (or odd) k are one such product, with k in the upper half of a word and k + 2 in the lower. */
LLM__INLINE V v_dot(uint32_t x, V w, V sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32((int)x), (__m512bh)_mm512_castps_si512(w));
}

/* Keeps the upper half of each word of a and moves that of b to the lower half. */
LLM__INLINE V v_pair(V a, V b) {
    return _mm512_castsi512_ps(
        _mm512_mask_mov_epi16(_mm512_castps_si512(a), 0x55555555, _mm512_srli_epi32(_mm512_castps_si512(b), 16)));
}

/* For each fourth k: x[k] and x[k + 2] become pairs[k / 2], x[k + 1] and x[k + 3] become pairs[k / 2 + 1]. */
LLM__INLINE void LLM__FN(pair_row)(const float *x, int k, uint32_t *pairs) {
    static const uint16_t halves[32] = {5,  1,  7,  3,  13, 9,  15, 11, 21, 17, 23, 19, 29, 25, 31, 27,
                                        37, 33, 39, 35, 45, 41, 47, 43, 53, 49, 55, 51, 61, 57, 63, 59};
    const __m512i order = _mm512_loadu_si512((const void *)halves);
    for (int i = 0; i < k; i += 32) {
        __m512i a = _mm512_castps_si512(v_load(x + i)), b = _mm512_castps_si512(v_load(x + i + 16));
        _mm512_storeu_si512((void *)(pairs + i / 2), _mm512_permutex2var_epi16(a, order, b));
    }
}

/* Operands for VDPBF16PS from eight k: *even holds weights 2J and 2J + 2, *odd 2J + 1 and 2J + 3 (J = 0 or 2). */
LLM__INLINE void LLM__FN(weights)(const llm__weight_type KIND, const bool WIDE, const uint8_t *w, const int J, V *even,
                                  V *odd) {
    const float *words = (const float *)(const void *)w + J * 16;
    if (WIDE) {
        *even = v_load(words);
        *odd = v_load(words + 16);
    } else if (KIND == LLM__W_BF16) {
        V a = v_load(words), b = v_load(words + 16);
        __asm__("" : "+v"(a), "+v"(b)); /* or gcc would load them again for each use */
        __m512i up = _mm512_slli_epi32(_mm512_castps_si512(a), 16);
        *even = _mm512_castsi512_ps(_mm512_mask_mov_epi16(up, 0x55555555, _mm512_castps_si512(b)));
        *odd = v_pair(a, b);
    } else {
        const int8_t *q = (const int8_t *)w + J * 32;
        *even = v_pair(v_int8(q), v_int8(q + 32));
        *odd = v_pair(v_int8(q + 16), v_int8(q + 48));
    }
}

/* The type of a product's activations, and their number in a block. */
typedef uint32_t v_input;
enum { LLM__FN(inputs) = 16 };

#else

LLM__INLINE V v_dot(float x, V w, V sum) { return v_fma(v_splat(x), w, sum); }

LLM__INLINE void LLM__FN(weights)(const llm__weight_type KIND, const bool WIDE, const uint8_t *w, const int J, V *even,
                                  V *odd) {
    (void)WIDE;
    *even = LLM__FN(weight)(KIND, w, J);
    *odd = LLM__FN(weight)(KIND, w, J + 1);
}

typedef float v_input;
enum { LLM__FN(inputs) = 32 };

#endif

/* The sums over one block of TILES tiles that are w_next apart, with even and odd weights as two chains. With several
   rows the products take so long that the hardware prefetcher falls behind. So we prefetch 16 KiB ahead into the L2
   cache; 4 rows of bf16 then take as long as one (Zen 4, two cores). Integers take longer, too: for them we prefetch 8
   KiB ahead, and 2 KiB ahead into the L1 cache (a tenth faster on Granite Rapids). */
LLM__INLINE void LLM__FN(block)(const int ROWS, const int TILES, const llm__weight_type KIND, const bool WIDE,
                                const v_input *x, size_t x_stride, const uint8_t *w, size_t w_next, V *sum) {
    V even[LLM__MOST_ROWS], odd[LLM__MOST_ROWS], we[2], wo[2];
    LLM__UNROLL for (int i = 0; i < ROWS * TILES; i++) even[i] = odd[i] = v_splat(0);
    const size_t bytes = WIDE ? 1024 : LLM__FN(block_bytes)(KIND), quarter = bytes / 256 * 64,
                 fetched = WIDE ? 0 : quarter, later = KIND == LLM__W_BF16 ? 16384 : 8192;
    for (const uint8_t *end = w + 4 * quarter; w < end; w += quarter, x += LLM__FN(inputs) / 4) {
        LLM__UNROLL for (size_t line = 0; line < fetched; line += 64) {
            __builtin_prefetch(w + line + later, 0, 2);
            if (KIND != LLM__W_BF16) __builtin_prefetch(w + line + 2048);
        }
        LLM__UNROLL for (int j = 0; j < LLM__FN(inputs) / 4; j += 2) {
            LLM__UNROLL for (int t = 0; t < TILES; t++)
                LLM__FN(weights)(KIND, WIDE, w + (size_t)t * w_next, j, &we[t], &wo[t]);
            LLM__UNROLL for (int i = 0; i < ROWS * TILES; i++) {
                const v_input *xj = x + (size_t)(i / TILES) * x_stride + j;
                even[i] = v_dot(xj[0], we[i % TILES], even[i]);
                odd[i] = v_dot(xj[1], wo[i % TILES], odd[i]);
            }
        }
    }
    LLM__UNROLL for (int i = 0; i < ROWS * TILES; i++) sum[i] = v_add(even[i], odd[i]);
}

/* Adds the sums over n blocks to totals[ROWS][TILES]. */
LLM__INLINE void LLM__FN(blocks)(const int ROWS, const int TILES, const llm__weight_type KIND, const bool WIDE,
                                 const v_input *x, size_t x_stride, const uint8_t *w, size_t w_next, int n, V *totals) {
    const size_t bytes = WIDE ? 1024 : LLM__FN(block_bytes)(KIND);
    V total[LLM__MOST_ROWS], sum[LLM__MOST_ROWS];
    LLM__UNROLL for (int i = 0; i < ROWS * TILES; i++) total[i] = totals[i];
    for (int b = 0; b < n; b++, x += LLM__FN(inputs), w += bytes) {
        LLM__FN(block)(ROWS, TILES, KIND, WIDE, x, x_stride, w, w_next, sum);
        LLM__UNROLL for (int i = 0; i < ROWS * TILES; i++) total[i] = v_add(total[i], sum[i]);
    }
    LLM__UNROLL for (int i = 0; i < ROWS * TILES; i++) totals[i] = total[i];
}

/* Up to LLM__RUN_TILES tiles. */
LLM__INLINE void LLM__FN(block_rows)(const int ROWS, const llm__weight_type KIND, const float *x, size_t x_stride,
                                     const uint8_t *w, size_t tile_bytes, int n, int k, float *y, size_t y_stride) {
    const size_t bytes = LLM__FN(block_bytes)(KIND);
    V total[LLM__RUN_TILES][LLM__MOST_ROWS];
    for (int t = 0; t < n; t++) {
        LLM__UNROLL for (int r = 0; r < ROWS; r++) total[t][r] =
            KIND == LLM__W_INT8 ? v_splat(0) : v_load(y + (size_t)r * y_stride + 16 * t);
    }
    for (int i = 0; i < k; i += LLM__RUN_K) {
        int some = k - i < LLM__RUN_K ? k - i : (int)LLM__RUN_K;
#if defined(LLM__USE_BF16)
        uint32_t pairs[LLM__MOST_ROWS][LLM__RUN_K / 2] __attribute__((aligned(64)));
        for (int r = 0; r < ROWS; r++) LLM__FN(pair_row)(x + (size_t)r * x_stride + i, some, pairs[r]);
        const uint32_t *run = pairs[0];
        const size_t run_stride = LLM__RUN_K / 2;
#else
        const float *run = x + i;
        const size_t run_stride = x_stride;
#endif
        const uint8_t *part = w + (size_t)i / 32 * bytes;
        for (int t = 0; t < n; t++, part += tile_bytes)
            LLM__FN(blocks)(ROWS, 1, KIND, false, run, run_stride, part, 0, some / 32, total[t]);
    }
    for (int t = 0; t < n; t++) {
        LLM__UNROLL for (int r = 0; r < ROWS; r++) {
            float *yr = y + (size_t)r * y_stride + 16 * t;
            V scale = v_load((const float *)(const void *)(w + (size_t)(t + 1) * tile_bytes) - 16); /* of int8 */
            if (KIND == LLM__W_INT8) total[t][r] = v_add(v_load(yr), v_mul(total[t][r], scale));
            v_store(yr, total[t][r]);
        }
    }
}

LLM__INLINE void LLM__FN(some_rows)(const int ROWS, const llm__weight_type KIND, const float *x, size_t x_stride,
                                    const uint8_t *w, int n, int k, float *y, size_t y_stride) {
    const bool FLOATS = KIND == LLM__W_F32 || KIND == LLM__W_F16;
    const size_t block_bytes = LLM__FN(block_bytes)(KIND), end_bytes = KIND == LLM__W_INT8 ? 64 : 0;
    const size_t float_bytes = KIND == LLM__W_F16 ? 32 : 64;
    const size_t tile_bytes = FLOATS ? (size_t)k * float_bytes : (size_t)k / 32 * block_bytes + end_bytes;
    const int STEP = FLOATS ? 1 : LLM__RUN_TILES;
    for (int t = 0; t < n; t += STEP, w += (size_t)STEP * tile_bytes, y += 16 * STEP) {
        int some = n - t < STEP ? n - t : STEP;
        if (FLOATS) LLM__FN(float_rows)(ROWS, KIND == LLM__W_F16, x, x_stride, w, k, y, y_stride);
        else LLM__FN(block_rows)(ROWS, KIND, x, x_stride, w, tile_bytes, some, k, y, y_stride);
    }
}

#if defined(LLM__STRIP_ROWS)

/* ---- Products of many rows ----
   Floor: 32 FMAs for a row and a tile over 32 k. Even k go first, then odd: with only one of the two chains in
   registers there is room for sums of more rows or tiles, so that FMAs outnumber loads. A few blocks of weights are
   converted to floats once for all rows and stay in the L1 cache (12 KB a tile). */

/* Converts a block to floats: its even k, then its odd k. */
LLM__INLINE void LLM__FN(strip_weights)(const llm__weight_type KIND, const uint8_t *w, float *to) {
    for (int i = 0; i < 4; i++, w += LLM__FN(block_bytes)(KIND) / 4, to += 64) {
        LLM__UNROLL for (int j = 0; j < 4; j++) {
            v_store(to + j * 16, LLM__FN(weight)(KIND, w, 2 * j));
            v_store(to + 256 + j * 16, LLM__FN(weight)(KIND, w, 2 * j + 1));
        }
    }
}

/* The sums of one chain from k on. Unrolled further, gcc (4 k at once) or clang (16) would keep sums in memory. */
LLM__INLINE void LLM__FN(strip_chain)(const float *const *rows, size_t k, const float *w, V *sum) {
    LLM__UNROLL for (int i = 0; i < LLM__STRIP_ROWS; i++) sum[i] = v_splat(0);
    for (const float *end = w + 256; w < end; w += 32, k += 4) {
        LLM__UNROLL for (int j = 0; j < 2; j++) {
            V wj = v_load(w + j * 16);
            LLM__UNROLL for (int i = 0; i < LLM__STRIP_ROWS; i++) sum[i] =
                v_fma(v_splat(rows[i][k + (size_t)j * 2]), wj, sum[i]);
        }
    }
}

/* n blocks of a tile for all rows; their number is a multiple of LLM__STRIP_ROWS. */
LLM__TARGET static __attribute__((noinline)) void
LLM__FN(strip_blocks)(const float *x, size_t x_stride, int rows, const float *w, int n, float *y, size_t y_stride) {
    enum { N = LLM__STRIP_ROWS };
    for (; rows > 0; rows -= N, x += N * x_stride, y += N * y_stride) {
        const float *from[N];
        LLM__UNROLL for (size_t i = 0; i < N; i++) {
            from[i] = x + i * x_stride;
            __asm__("" : "+r"(from[i])); /* or gcc would compute them again for each load */
        }
        for (int b = 0; b < n; b++) {
            V even[N], odd[N];
            LLM__FN(strip_chain)(from, (size_t)b * 32, w + b * 512, even);
            LLM__FN(strip_chain)(from, (size_t)b * 32 + 1, w + b * 512 + 256, odd);
            LLM__UNROLL for (size_t i = 0; i < N; i++) even[i] =
                v_add(v_load(y + i * y_stride), v_add(even[i], odd[i]));
            LLM__UNROLL for (size_t i = 0; i < N; i++) v_store(y + i * y_stride, even[i]);
        }
    }
}

/* All k of a tile. */
LLM__INLINE void LLM__FN(strip_tile)(llm__weight_type kind, const float *x, size_t x_stride, int rows, const uint8_t *w,
                                     int k, float *y, size_t y_stride) {
    float wide[LLM__STRIP_BLOCKS * 512] __attribute__((aligned(64)));
    const size_t bytes = LLM__FN(block_bytes)(kind);
    for (int left = k / 32, n; left; left -= n, x += n * 32) {
        n = left < LLM__STRIP_BLOCKS ? left : LLM__STRIP_BLOCKS;
        for (int b = 0; b < n; b++, w += bytes) {
            if (kind == LLM__W_BF16) LLM__FN(strip_weights)(LLM__W_BF16, w, wide + b * 512);
            else LLM__FN(strip_weights)(LLM__W_INT8, w, wide + b * 512);
        }
        LLM__FN(strip_blocks)(x, x_stride, rows, wide, n, y, y_stride);
    }
}

/* bf16 or int8. Sums over int8 weights are scaled before they are added. */
LLM__TARGET static __attribute__((noinline)) void LLM__FN(strip_product)(llm__weight_type kind, const float *x,
                                                                         size_t x_stride, int rows, const uint8_t *w,
                                                                         int n, int k, float *y, size_t y_stride) {
    const bool scaled = kind == LLM__W_INT8;
    const size_t tile_bytes = (size_t)k / 32 * LLM__FN(block_bytes)(kind) + (scaled ? 64 : 0);
    float sums[LLM__STRIP_MOST][16] __attribute__((aligned(64)));
    for (int t = 0; t < n; t++, w += tile_bytes, y += 16) {
        if (scaled) memset(sums, 0, (size_t)rows * sizeof *sums);
        LLM__FN(strip_tile)(kind, x, x_stride, rows, w, k, scaled ? sums[0] : y, scaled ? 16 : y_stride);
        if (!scaled) continue;
        V scale = v_load((const float *)(const void *)(w + tile_bytes) - 16);
        for (int r = 0; r < rows; r++)
            v_store(y + r * y_stride, v_add(v_load(y + r * y_stride), v_mul(v_load(sums[r]), scale)));
    }
}

#endif

/* N rows at a time while there are that many. */
#define LLM__ROWS_BY(N)                                                    \
    for (; rows >= (N); rows -= (N), x += (N)*x_stride, y += (N)*y_stride) \
        LLM__FN(some_rows)((N), KIND, x, x_stride, tiles, n, k, y, y_stride);

/* As many rows at once as the registers hold sums for, then fewer. */
LLM__INLINE void LLM__FN(product)(const llm__weight_type KIND, const float *x, size_t x_stride, int rows,
                                  const uint8_t *tiles, int n, int k, float *y, size_t y_stride) {
    const bool CACHED = KIND != LLM__W_F16;
#if defined(LLM__USE_BF16)
    if (KIND == LLM__W_INT8 && rows == 1) { /* pairs cost more than they save */
        llm__avx512_product_int8(x, x_stride, rows, tiles, n, k, y, y_stride);
        return;
    }
#endif
#if defined(LLM__STRIP_ROWS)
    /* With fewer rows, converting the weights to floats does not pay. */
    for (int n_rows; (KIND == LLM__W_BF16 || KIND == LLM__W_INT8) && rows >= 2 * LLM__STRIP_ROWS; rows -= n_rows) {
        n_rows = rows < LLM__STRIP_MOST ? rows / LLM__STRIP_ROWS * LLM__STRIP_ROWS : (int)LLM__STRIP_MOST;
        LLM__FN(strip_product)(KIND, x, x_stride, n_rows, tiles, n, k, y, y_stride);
        x += (size_t)n_rows * x_stride;
        y += (size_t)n_rows * y_stride;
    }
#endif
    if (LLM__MOST_ROWS > 4) LLM__ROWS_BY(8)
    if (LLM__MOST_ROWS > 2) LLM__ROWS_BY(4)
    if (LLM__MOST_ROWS > 2 && CACHED) LLM__ROWS_BY(3) /* the number of query heads per key head in the default model */
    if (LLM__MOST_ROWS > 1) LLM__ROWS_BY(2)
    LLM__ROWS_BY(1)
}
#undef LLM__ROWS_BY

#define LLM__PRODUCT(name, KIND)                                                                                      \
    LLM__TARGET static void LLM__FN(name)(const float *x, size_t x_stride, int rows, const void *tiles, int n, int k, \
                                          float *y, size_t y_stride) {                                                \
        LLM__FN(product)(KIND, x, x_stride, rows, (const uint8_t *)tiles, n, k, y, y_stride);                         \
    }
LLM__PRODUCT(product_bf16, LLM__W_BF16)
LLM__PRODUCT(product_int8, LLM__W_INT8)

/* ---- Products with groups ----
   Floor: 8 products of bytes for a row and a tile over 32 k. A single row waits for memory, so its weights are used as
   they are read. For more rows, a few groups of one or two tiles are first widened to bytes, which stay in the L1
   cache, and their scales to floats; then LLM__GROUP_ROWS rows are multiplied with them at once. */

/* VPDPBUSD takes unsigned bytes: 128 is added to signed numbers here and removed through `zero`. */
#if defined(LLM__USE_BF16)
#define LLM__SIGN 128
#else
#define LLM__SIGN 0
#endif

/* Are the numbers signed bytes once they are widened? */
LLM__INLINE bool LLM__FN(is_signed)(const llm__weight_type KIND) {
    return llm__kernel_forms[KIND].bits == 8 || llm__kernel_forms[KIND].table;
}

/* Kinds whose groups are alike once they are bytes share a kernel. They differ in `zero`. */
LLM__INLINE int LLM__FN(zero)(llm__weight_type kind) {
    return LLM__FN(is_signed)(kind) ? LLM__SIGN : llm__kernel_forms[kind].zero;
}

/* Adds LLM__SIGN to signed bytes. */
LLM__INLINE v_bytes LLM__FN(signed_bytes)(v_bytes a) {
#if defined(LLM__USE_BF16)
    return _mm512_xor_si512(a, _mm512_set1_epi8(-128));
#else
    return a;
#endif
}

/* The numbers of a group with k = 4 J .. 4 J + 3, J = 0 .. 7. WIDE: they have been widened to bytes. */
LLM__INLINE v_bytes LLM__FN(numbers)(const llm__weight_type KIND, const bool WIDE, const uint8_t *q, const int J) {
    const int BITS = llm__kernel_forms[KIND].bits;
    if (WIDE) return v_load_bytes(q + J * 64);
    if (BITS == 8) return LLM__FN(signed_bytes)(v_load_bytes(q + J * 64));
    v_bytes a = J < 4 ? v_low(v_load_bytes(q + J * 64)) : v_high(v_load_bytes(q + (J - 4) * 64));
    if (llm__kernel_forms[KIND].table) return LLM__FN(signed_bytes)(v_look_up(a));
    if (BITS == 5) return v_above(a, v_load_bytes(q + 256), 1, J);
    if (BITS == 6) return v_above(a, v_load_bytes(q + 256 + J / 4 * 64), 3, J % 4 * 2);
    return a;
}

/* The scales of a group from s and the d of its eight groups, or from their widened form: of all 32 k (H is 0), or of
   each 16. */
LLM__INLINE void LLM__FN(scales)(const llm__weight_type KIND, const bool WIDE, const uint8_t *s, const uint8_t *d,
                                 const int H, V *scale, V *least) {
    const llm__kernel_form FORM = llm__kernel_forms[KIND];
    const float *wide = (const float *)(const void *)s + H * 16;
    const int8_t *small = (const int8_t *)s + H * 16;
    const uint16_t *halves = (const uint16_t *)(const void *)(FORM.k ? d : s);
    *scale = WIDE ? v_load(wide) : v_half(halves);
    if (!WIDE && FORM.k) *scale = v_mul(*scale, v_int8(small));
    *least = v_splat(0);
    if (!FORM.minimum) return;
    *least = WIDE ? v_load(wide + 32) : v_half(halves + 16);
    if (!WIDE && FORM.k) *least = v_mul(v_sub(v_splat(0), *least), v_int8(small + (FORM.sixteen ? 32 : 16)));
}

/* A widened group: its numbers as bytes, then scales [2][16] and minimums [2][16] as floats. */
enum { LLM__FN(wide_bytes) = 768 };

LLM__INLINE void LLM__FN(widen_group)(const llm__weight_type KIND, const uint8_t *q, const uint8_t *s, const uint8_t *d,
                                      uint8_t *to) {
    float *scales = (float *)(void *)(to + 512);
    LLM__UNROLL for (int j = 0; j < 8; j++) v_save_bytes(to + j * 64, LLM__FN(numbers)(KIND, false, q, j));
    LLM__UNROLL for (int h = 0; h < 1 + llm__kernel_forms[KIND].sixteen; h++) {
        V scale, least;
        LLM__FN(scales)(KIND, false, s, d, h, &scale, &least);
        v_store(scales + h * 16, scale);
        v_store(scales + 32 + h * 16, least);
    }
}

/* One group of TILES tiles (q, s and d of each) and one llm__kernel_group of each of ROWS rows: total[ROWS][TILES] +=
   their products. */
LLM__INLINE void LLM__FN(group)(const int ROWS, const int TILES, const llm__weight_type KIND, const bool WIDE, int zero,
                                const llm__kernel_group *const *x, const uint8_t *const *q, const uint8_t *const *s,
                                const uint8_t *d, V *total) {
    const llm__kernel_form FORM = llm__kernel_forms[KIND];
    const int STEP = FORM.sixteen ? 4 : 8;
    LLM__UNROLL for (int h = 0; h < 8 / STEP; h++) {
        v_ints sum[LLM__GROUP_ROWS * LLM__GROUP_TILES];
        V scale[LLM__GROUP_TILES], least[LLM__GROUP_TILES];
        LLM__UNROLL for (int i = 0; i < ROWS * TILES; i++) {
            const llm__kernel_group *xi = x[i / TILES];
            sum[i] = v_splat_int(FORM.minimum ? 0 : -zero * (FORM.sixteen ? xi->halves[h] : xi->n));
        }
        LLM__UNROLL for (int j = h * STEP; j < h * STEP + STEP; j++) {
            v_bytes w[LLM__GROUP_TILES];
            LLM__UNROLL for (int t = 0; t < TILES; t++) w[t] = LLM__FN(numbers)(KIND, WIDE, q[t], j);
            LLM__UNROLL for (int r = 0; r < ROWS; r++) {
                int32_t four;
                memcpy(&four, x[r]->a + 4 * j, 4);
                LLM__UNROLL for (int t = 0; t < TILES; t++) sum[r * TILES + t] =
                    v_dot_bytes(LLM__FN(is_signed)(KIND), sum[r * TILES + t], w[t], four);
            }
        }
        LLM__UNROLL for (int t = 0; t < TILES; t++) LLM__FN(scales)(KIND, WIDE, s[t], d, h, &scale[t], &least[t]);
        LLM__UNROLL for (int i = 0; i < ROWS * TILES; i++) {
            const llm__kernel_group *xi = x[i / TILES];
            total[i] = v_fma(v_mul(scale[i % TILES], v_splat(xi->scale)), v_of_ints(sum[i]), total[i]);
            if (FORM.minimum)
                total[i] =
                    v_fma(least[i % TILES], v_splat(FORM.sixteen ? xi->scaled_sums[h] : xi->scaled_sum), total[i]);
        }
    }
}

/* A single row. Prefetches 8 KiB ahead into the L2 cache and 2 KiB ahead into the L1 cache. */
LLM__INLINE void LLM__FN(group_row)(const llm__weight_type KIND, const llm__kernel_group *x, const uint8_t *tile,
                                    int n_groups, float *y) {
    const uint8_t *q = tile, *s = q + (size_t)n_groups * LLM__NUMBER_BYTES(KIND),
                  *d = s + (size_t)n_groups * LLM__SCALE_BYTES(KIND);
    V total = v_load(y);
    for (int g = 0; g < n_groups; g++, x++, q += LLM__NUMBER_BYTES(KIND), s += LLM__SCALE_BYTES(KIND)) {
        LLM__UNROLL for (size_t line = 0; line < LLM__NUMBER_BYTES(KIND); line += 64) {
            __builtin_prefetch(q + line + 8192, 0, 2);
            __builtin_prefetch(q + line + 2048);
        }
        LLM__FN(group)
        (1, 1, KIND, false, LLM__FN(zero)(KIND), &x, &q, &s, d + (size_t)(g / 8) * LLM__K_BYTES(KIND), &total);
    }
    v_store(y, total);
}

/* All rows and n widened groups of LLM__GROUP_TILES tiles (or of one, used twice: right is 0). If too few rows remain,
   the last one is used several times. */
LLM__INLINE void LLM__FN(wide_rows)(const llm__weight_type KIND, int zero, const llm__kernel_group *x, size_t x_stride,
                                    int rows, const uint8_t *wide, size_t wide_next, int n, float *y, size_t y_stride,
                                    size_t right) {
    enum { R = LLM__GROUP_ROWS, T = LLM__GROUP_TILES };
    for (int row = 0; row < rows; row += R) {
        const llm__kernel_group *xs[R];
        const uint8_t *q[T], *s[T];
        float *ys[R];
        V total[R * T];
        LLM__UNROLL for (int r = 0; r < R; r++) {
            size_t at = (size_t)(row + r < rows ? row + r : rows - 1);
            xs[r] = x + at * x_stride;
            ys[r] = y + at * y_stride;
        }
        LLM__UNROLL for (size_t t = 0; t < T; t++) {
            q[t] = wide + t * wide_next;
            s[t] = q[t] + 512;
        }
        LLM__UNROLL for (int i = 0; i < R * T; i++) total[i] = v_load(ys[i / T] + (size_t)(i % T) * right);
        for (int g = 0; g < n; g++) {
            LLM__FN(group)(R, T, KIND, true, zero, xs, q, s, NULL, total);
            LLM__UNROLL for (int r = 0; r < R; r++) xs[r]++;
            LLM__UNROLL for (int t = 0; t < T; t++) q[t] += LLM__FN(wide_bytes), s[t] += LLM__FN(wide_bytes);
        }
        LLM__UNROLL for (int i = 0; i < R * T; i++) v_store(ys[i / T] + (size_t)(i % T) * right, total[i]);
    }
}

LLM__TARGET static __attribute__((noinline)) void
LLM__FN(wide_product)(llm__weight_type kind, const llm__kernel_group *x, size_t x_stride, int rows, const uint8_t *wide,
                      size_t wide_next, int n, float *y, size_t y_stride, size_t right) {
#define LLM__WIDE_ROWS(KIND) \
    LLM__FN(wide_rows)(KIND, LLM__FN(zero)(kind), x, x_stride, rows, wide, wide_next, n, y, y_stride, right)
    if (LLM__FN(is_signed)(kind)) LLM__WIDE_ROWS(LLM__W_Q8);
    else if (kind == LLM__W_Q6_K16) LLM__WIDE_ROWS(LLM__W_Q6_K16);
    else if (kind == LLM__W_Q4_K16) LLM__WIDE_ROWS(LLM__W_Q4_K16);
    else if (llm__kernel_forms[kind].minimum) LLM__WIDE_ROWS(LLM__W_Q4_MIN);
    else LLM__WIDE_ROWS(LLM__W_Q4);
#undef LLM__WIDE_ROWS
}

LLM__TARGET static __attribute__((noinline)) void LLM__FN(widen_groups)(llm__weight_type kind, const uint8_t *tile,
                                                                        int n_groups, int first, int n, uint8_t *to) {
    const uint8_t *q = tile + (size_t)first * LLM__NUMBER_BYTES(kind),
                  *s = tile + (size_t)n_groups * LLM__NUMBER_BYTES(kind) + (size_t)first * LLM__SCALE_BYTES(kind),
                  *ds = tile + (size_t)n_groups * (LLM__NUMBER_BYTES(kind) + LLM__SCALE_BYTES(kind));
    for (int g = first; g < first + n; g++, q += LLM__NUMBER_BYTES(kind), s += LLM__SCALE_BYTES(kind)) {
        const uint8_t *d = ds + (size_t)(g / 8) * LLM__K_BYTES(kind);
        switch (kind) {
#define LLM__WIDEN(KIND) \
    case KIND: LLM__FN(widen_group)(KIND, q, s, d, to + (size_t)(g - first) * LLM__FN(wide_bytes)); break;
            LLM__WIDEN(LLM__W_Q4)
            LLM__WIDEN(LLM__W_Q4_MIN)
            LLM__WIDEN(LLM__W_Q4_K)
            LLM__WIDEN(LLM__W_Q4_K16)
            LLM__WIDEN(LLM__W_Q5)
            LLM__WIDEN(LLM__W_Q5_MIN)
            LLM__WIDEN(LLM__W_Q5_K)
            LLM__WIDEN(LLM__W_Q6_K16)
            LLM__WIDEN(LLM__W_IQ4)
            LLM__WIDEN(LLM__W_IQ4_K)
        default: LLM__FN(widen_group)(LLM__W_Q8, q, s, d, to + (size_t)(g - first) * LLM__FN(wide_bytes));
#undef LLM__WIDEN
        }
    }
}

LLM__TARGET static __attribute__((noinline)) void
LLM__FN(row_product)(llm__weight_type kind, const llm__kernel_group *x, const uint8_t *tile, int n_groups, float *y) {
    switch (kind) {
#define LLM__GROUP_ROW(KIND) \
    case KIND: LLM__FN(group_row)(KIND, x, tile, n_groups, y); break;
        LLM__GROUP_ROW(LLM__W_Q4)
        LLM__GROUP_ROW(LLM__W_Q4_MIN)
        LLM__GROUP_ROW(LLM__W_Q4_K)
        LLM__GROUP_ROW(LLM__W_Q4_K16)
        LLM__GROUP_ROW(LLM__W_Q5)
        LLM__GROUP_ROW(LLM__W_Q5_MIN)
        LLM__GROUP_ROW(LLM__W_Q5_K)
        LLM__GROUP_ROW(LLM__W_Q6_K16)
        LLM__GROUP_ROW(LLM__W_IQ4)
        LLM__GROUP_ROW(LLM__W_IQ4_K)
    default: LLM__FN(group_row)(LLM__W_Q8, x, tile, n_groups, y);
#undef LLM__GROUP_ROW
    }
}

LLM__TARGET static void LLM__FN(group_product)(llm__weight_type kind, const llm__kernel_group *x, size_t x_stride,
                                               int rows, const uint8_t *tiles, int n, int k, float *y,
                                               size_t y_stride) {
    enum { T = LLM__GROUP_TILES };
    uint8_t wide[T][(int)LLM__GROUPS * LLM__FN(wide_bytes)] __attribute__((aligned(64)));
    const size_t bytes = llm__matrix_tile_bytes(kind, k);
    const int n_groups = k / 32;
    for (int t = 0; t < n && rows == 1; t++)
        LLM__FN(row_product)(kind, x, tiles + (size_t)t * bytes, n_groups, y + 16 * t);
    for (int t = 0; t < n && rows > 1; t += T) {
        const int some = n - t < T ? n - t : T;
        for (int first = 0; first < n_groups; first += LLM__GROUPS) {
            const int part = n_groups - first < LLM__GROUPS ? n_groups - first : (int)LLM__GROUPS;
            for (int i = 0; i < some; i++)
                LLM__FN(widen_groups)(kind, tiles + (size_t)(t + i) * bytes, n_groups, first, part, wide[i]);
            LLM__FN(wide_product)
            (kind, x + first, x_stride, rows, wide[0], some < T ? 0 : sizeof *wide, part, y + 16 * t, y_stride,
             some < T ? 0 : 16);
        }
    }
}

/* Converts 32 activations at a time to integers. */
LLM__TARGET static void LLM__FN(quantize)(const float *x, int k, llm__kernel_group *lines) {
    const V zero = v_splat(0), whole = v_splat(LLM__WHOLE);
    V all = zero;
    for (int i = 0; i < k; i += 16) all = v_fma(v_load(x + i), zero, all);
    const float none = v_sum(all); /* 0, or NaN */
    for (llm__kernel_group *line = lines; line < lines + k / 32; line++, x += 32) {
        V a = v_load(x), b = v_load(x + 16);
        float most = v_hmax(v_max(v_max(a, v_sub(zero, a)), v_max(b, v_sub(zero, b))));
        bool any = most > LLM__LEAST && none == 0;
        V inverse = v_splat(any ? 127.0f / most : 0);
        line->scale = any ? most / 127.0f : none;
        if (none != 0) a = b = zero;
        a = v_fma(a, inverse, whole);
        b = v_fma(b, inverse, whole);
        v_store_bytes(a, line->a);
        v_store_bytes(b, line->a + 16);
        float low = v_sum(v_sub(a, whole)), high = v_sum(v_sub(b, whole));
        line->scaled_sum = line->scale * (low + high);
        line->scaled_sums[0] = line->scale * low;
        line->scaled_sums[1] = line->scale * high;
        line->halves[0] = (int32_t)low;
        line->halves[1] = (int32_t)high;
        line->n = (int32_t)(low + high);
        line->unused = 0;
    }
}

LLM__TARGET static uint32_t LLM__FN(multiply_bytes)(size_t n) {
    uint8_t start[80];
    for (int i = 0; i < 80; i++) start[i] = (uint8_t)(i % 16);
    v_ints sum[12];
    V total = v_splat(0);
    LLM__UNROLL for (int i = 0; i < 12; i++) sum[i] = v_splat_int(i);
    for (; n; n--) {
        __asm__ volatile("" : : "r"(start) : "memory"); /* or the products would be computed once only */
        LLM__UNROLL for (int i = 0; i < 12; i++) sum[i] =
            v_dot_bytes(false, sum[i], v_load_bytes(start + i), 0x01FF01FF);
    }
    LLM__UNROLL for (int i = 0; i < 12; i++) total = v_add(total, v_of_ints(sum[i]));
    return llm__f32_bits(v_sum(total));
}

#if defined(LLM__USE_BF16) /* everything else is shared with AVX-512 */
#define LLM__SHARED(name) llm__avx512_##name
#else
#define LLM__SHARED(name) LLM__FN(name)

LLM__PRODUCT(product_f32, LLM__W_F32)
LLM__PRODUCT(product_f16, LLM__W_F16)

/* Load and store the last, partial vector of a row. Missing elements are zero. */
LLM__LONG V LLM__FN(load_part)(const float *p, int n) {
    if (n >= 16) return v_load(p);
    float f[16] = {0};
    for (int i = 0; i < n; i++) f[i] = p[i];
    return v_load(f);
}

LLM__LONG void LLM__FN(store_part)(float *p, V a, int n, bool round) {
    if (round) a = v_round_bf16(a);
    if (n >= 16) {
        v_store(p, a);
        return;
    }
    float f[16];
    v_store(f, a);
    for (int i = 0; i < n; i++) p[i] = f[i];
}

LLM__TARGET static float LLM__FN(norm_factor)(const float *x, int n, float eps) {
    V squares = v_splat(0);
    for (int i = 0; i < n; i += 16) {
        V xi = LLM__FN(load_part)(x + i, n - i);
        squares = v_fma(xi, xi, squares);
    }
    return (float)(1.0 / llm__math_sqrt(v_sum(squares) / (float)n + eps));
}

LLM__TARGET static void LLM__FN(norm)(const float *x, const float *w, int n, float factor, bool round, float *y) {
    V factors = v_splat(factor);
    int i = 0;
    for (; i < n; i += 16) {
        V xi = v_mul(LLM__FN(load_part)(x + i, n - i), factors);
        LLM__FN(store_part)(y + i, v_mul(xi, LLM__FN(load_part)(w + i, n - i)), 16, round);
    }
    if (i & 16) v_store(y + i, v_splat(0));
}

/* silu(gate) * up */
LLM__INLINE V LLM__FN(silu)(V gate, V up) {
    V x = v_min(v_mul(gate, v_splat(-LLM__LOG2_E)), v_splat(120.0f));
    return v_mul(v_mul(gate, v_inverse(v_add(v_splat(1.0f), v_exp2(x)))), up);
}

LLM__TARGET static void LLM__FN(swiglu)(const float *gate_up, int n, bool round, float *y) {
    for (int i = 0; i < n; i += 16) {
        V silu = LLM__FN(silu)(v_load(gate_up + 2 * i), v_load(gate_up + 2 * i + 16));
        LLM__FN(store_part)(y + i, silu, n - i, round);
    }
}

LLM__TARGET static void LLM__FN(softmax)(float *s, int n, int padded, float scale, bool round, float *max, float *sum) {
    V most = v_splat(-3.0e38f), total = v_splat(0), factor = v_splat(scale);
    for (int i = n; i % 16; i++) s[i] = -3.0e38f;
    for (int i = (n + 15) / 16 * 16; i < padded; i++) s[i] = 0;
    for (int i = 0; i < n; i += 16) most = v_max(most, v_load(s + i));
    *max = v_hmax(most) * scale;
    for (int i = 0; i < n; i += 16) {
        V p = v_exp2(v_fma(v_load(s + i), factor, v_splat(-*max)));
        if (i + 16 > n) {
            v_store(s + i, p);
            for (int j = n > i ? n : i; j < i + 16; j++) s[j] = 0;
            p = v_load(s + i);
        }
        total = v_add(total, p);
        v_store(s + i, round ? v_round_bf16(p) : p);
    }
    *sum = v_sum(total);
}

/* Integers find a NaN whatever the compiler's flags are. */
typedef int32_t LLM__FN(bits) __attribute__((vector_size(64)));

LLM__TARGET static bool LLM__FN(maxima)(const float *x, int n, float *maxima) {
    LLM__FN(bits) nan = {0}, bits;
    float last[16];
    int32_t any = 0;
    for (int j = 0; j < 16; j++) last[j] = j < n % 16 ? x[n - n % 16 + j] : -INFINITY;
    for (int first = 0; first < n; first += LLM__MAX_RUN) {
        V most = v_splat(-INFINITY);
        for (int i = first; i < n && i < first + LLM__MAX_RUN; i += 16) {
            const float *at = i + 16 <= n ? x + i : last;
            memcpy(&bits, at, sizeof bits);
            nan |= (bits & 0x7FFFFFFF) > 0x7F800000;
            most = v_max(most, v_load(at));
        }
        *maxima++ = v_hmax(most);
    }
    for (int j = 0; j < 16; j++) any |= nan[j];
    return any == 0;
}

/* v_exp2's smallest result is subtracted, so that a forbidden token's p is exactly 0. A p above 2^-100 does not
   change. */
LLM__TARGET static float LLM__FN(odds)(const float *x, int n, float top, float scale, float *p, float *maxima) {
    V total = v_splat(0), tops = v_splat(top), factor = v_splat(scale), least = v_exp2(v_splat(-125.5f));
    for (int first = 0; first < n; first += LLM__MAX_RUN) {
        V most = v_splat(0);
        for (int i = first; i < n && i < first + LLM__MAX_RUN; i += 16) {
            V power = v_exp2(v_mul(v_sub(LLM__FN(load_part)(x + i, n - i), tops), factor));
            v_store(p + i, v_sub(power, least));
            for (int j = n; j < i + 16; j++) p[j] = 0;
            V pi = v_load(p + i);
            total = v_add(total, pi);
            most = v_max(most, pi);
        }
        *maxima++ = v_hmax(most);
    }
    return v_sum(total);
}

LLM__TARGET static void LLM__FN(merge)(int rows, float *max, float *sum, float *out, const float *part_max,
                                       const float *part_sum, const float *part, int n) {
    for (int first = 0; first < rows; first += 16) {
        float old_factors[16], new_factors[16];
        int left = rows - first;
        V old_max = LLM__FN(load_part)(max + first, left), new_max = LLM__FN(load_part)(part_max + first, left);
        V most = v_max(old_max, new_max), old_factor = v_exp2(v_sub(old_max, most)),
          new_factor = v_exp2(v_sub(new_max, most));
        V new_sum = v_mul(LLM__FN(load_part)(part_sum + first, left), new_factor);
        new_sum = v_fma(LLM__FN(load_part)(sum + first, left), old_factor, new_sum);
        LLM__FN(store_part)(sum + first, new_sum, left, false);
        LLM__FN(store_part)(max + first, most, left, false);
        v_store(old_factors, old_factor);
        v_store(new_factors, new_factor);
        for (int r = 0; r < left && r < 16; r++, out += n, part += n)
            for (int i = 0; i < n; i += 16) {
                V p = v_mul(LLM__FN(load_part)(part + i, n - i), v_splat(new_factors[r]));
                p = v_fma(LLM__FN(load_part)(out + i, n - i), v_splat(old_factors[r]), p);
                LLM__FN(store_part)(out + i, p, n - i, false);
            }
    }
}

LLM__TARGET static void LLM__FN(scale)(const float *x, float factor, int n, bool round, float *y) {
    for (int i = 0; i < n; i += 16)
        LLM__FN(store_part)(y + i, v_mul(LLM__FN(load_part)(x + i, n - i), v_splat(factor)), n - i, round);
}

LLM__TARGET static void LLM__FN(add)(float *y, const float *x, int n) {
    for (int i = 0; i < n; i += 16) LLM__FN(store_part)
    (y + i, v_add(LLM__FN(load_part)(y + i, n - i), LLM__FN(load_part)(x + i, n - i)), n - i, false);
}

LLM__TARGET static void LLM__FN(weigh)(float *y, const float *x, int n) {
    for (int i = 0; i < n; i += 16) v_store(y + i, v_round_bf16(v_mul(v_load(y + i), v_load(x + i))));
}

LLM__TARGET static void LLM__FN(rope)(float *x, const float *cosines, const float *sines, int half) {
    for (int i = 0; i < half; i += 16) {
        V a = LLM__FN(load_part)(x + i, half - i), b = LLM__FN(load_part)(x + half + i, half - i);
        V c = LLM__FN(load_part)(cosines + i, half - i), s = LLM__FN(load_part)(sines + i, half - i);
        V minus_b = v_sub(v_splat(0), b);
        LLM__FN(store_part)(x + i, v_fma(minus_b, s, v_mul(a, c)), half - i, false);
        LLM__FN(store_part)(x + half + i, v_fma(a, s, v_mul(b, c)), half - i, false);
    }
}

LLM__TARGET static uint32_t LLM__FN(read)(const void *p, size_t n) {
    const float *f = (const float *)p;
    V a = v_splat(0), b = a, c = a, d = a;
    for (size_t i = 0; i + 64 <= n / 4; i += 64) {
        a = v_max(a, v_load(f + i));
        b = v_max(b, v_load(f + i + 16));
        c = v_max(c, v_load(f + i + 32));
        d = v_max(d, v_load(f + i + 48));
    }
    return llm__f32_bits(v_hmax(v_max(v_max(a, b), v_max(c, d))));
}

#endif
#undef LLM__PRODUCT

/* The values do not matter, but lanes must differ, or the compiler computes only half of them. */
LLM__TARGET static uint32_t LLM__FN(multiply)(size_t n) {
    const v_input x = 0x3F003F00;
    float start[16];
    for (int i = 0; i < 16; i++) start[i] = (float)i;
    V sum[12], w = v_load(start), total = v_splat(0);
    LLM__UNROLL for (int i = 0; i < 12; i++) sum[i] = v_add(w, v_splat((float)i));
    for (; n; n--) {
        LLM__UNROLL for (int i = 0; i < 12; i++) sum[i] = v_dot(x, w, sum[i]);
    }
    LLM__UNROLL for (int i = 0; i < 12; i++) total = v_add(total, sum[i]);
    return llm__f32_bits(v_sum(total));
}

#if defined(LLM__USE_BF16)

/* ---- Products of many rows ----
   Floor: 16 products of pairs, one a cycle, for a row and a tile over 32 k. Each needs one load of activations and one
   of weights, and there is one load a cycle. So 4 rows are multiplied with 2 tiles: 6 loads for 8 products. The
   weights of two tiles are widened once for all rows, in parts that stay in the L1 cache (36 KB), and the next two
   tiles are prefetched meanwhile. */

/* Stores values i .. i + 15 of a row. Lines that are rows of the matrix unit hold their values in order; contiguous
   lines hold pairs, as pair_row makes them. */
LLM__INLINE void LLM__FN(store_half)(llm__kernel_lines row, int i, V a) {
    const __m256i pairs = _mm256_set_epi16(13, 15, 12, 14, 9, 11, 8, 10, 5, 7, 4, 6, 1, 3, 0, 2);
    __m256i half = (__m256i)_mm512_cvtneps_pbh(a);
    if (row.step == 64) half = _mm256_permutexvar_epi16(pairs, half);
    _mm256_storeu_si256((__m256i *)(void *)(row.at + (size_t)i / 32 * row.step + (size_t)i % 32 * 2), half);
}

LLM__TARGET static void LLM__FN(pack_scale)(const float *x, float factor, int n, int n_padded, llm__kernel_lines row,
                                            int column) {
    for (int i = 0; i < n_padded; i += 16)
        LLM__FN(store_half)(row, column + i, v_mul(LLM__SHARED(load_part)(x + i, n - i), v_splat(factor)));
}

LLM__TARGET static void LLM__FN(pack_norm)(const float *x, const float *w, int n, float factor, llm__kernel_lines row) {
    V factors = v_splat(factor);
    int i = 0;
    for (; i < n; i += 16) {
        V xi = v_mul(LLM__SHARED(load_part)(x + i, n - i), factors);
        LLM__FN(store_half)(row, i, v_mul(xi, LLM__SHARED(load_part)(w + i, n - i)));
    }
    if (i & 16) LLM__FN(store_half)(row, i, v_splat(0));
}

LLM__TARGET static void LLM__FN(pack_softmax)(const float *s, int n, int padded, float scale, llm__kernel_lines row,
                                              float *max, float *sum) {
    V most = v_splat(-3.0e38f), total = v_splat(0), factor = v_splat(scale);
    int i = 0, whole = n / 16 * 16;
    __mmask16 rest = (__mmask16)((1u << (n - whole)) - 1);
    for (; i < whole; i += 16) most = v_max(most, v_load(s + i));
    if (rest) most = _mm512_mask_max_ps(most, rest, most, v_load(s + i));
    *max = v_hmax(most) * scale;
    const V minus_max = v_splat(-*max);
    for (i = 0; i < n; i += 16) {
        V p = v_exp2(v_fma(v_load(s + i), factor, minus_max));
        if (i == whole) p = _mm512_maskz_mov_ps(rest, p);
        LLM__FN(store_half)(row, i, p);
        total = v_add(total, p);
    }
    for (; i < padded; i += 16) LLM__FN(store_half)(row, i, v_splat(0));
    *sum = v_sum(total);
}

/* Sums over int8 weights times their scales. */
LLM__INLINE void LLM__FN(scale_rows)(const llm__kernel_panel *p, int tile, int n_cols, int n, float *sums) {
    const uint8_t *end = p->tiles + (size_t)(tile + 1) * p->tile_bytes;
    for (int i = 0; i < n_cols; i++, end += p->tile_bytes) {
        V scale = v_load((const float *)(const void *)end - 16);
        for (float *at = sums + 16 * i; at < sums + n * 32; at += 32)
            v_store(at, v_add(v_splat(0), v_mul(v_load(at), scale)));
    }
}

/* Finishes n rows of complete sums, [n][32]: stores, adds, or computes SwiGLU. */
LLM__TARGET static void LLM__FN(end_rows)(const llm__kernel_panel *p, int tile, int n_cols, int row, int n,
                                          float *sums) {
    const int width = p->width - tile * 16 < n_cols * 16 ? p->width - tile * 16 : n_cols * 16;
    const float *end = sums + n * 32;
    if (p->kind == LLM__W_INT8) LLM__FN(scale_rows)(p, tile, n_cols, n, sums);
    if (p->ending == LLM__SWIGLU) {
        for (; sums < end; sums += 32, row++) {
            llm__kernel_lines to = llm__kernel_packed_row(p->line_step, p->packed, p->packed_k, (size_t)row);
            LLM__FN(store_half)(to, p->column + tile * 8, LLM__SHARED(silu)(v_load(sums), v_load(sums + 16)));
        }
        return;
    }
    float *y = p->y + (size_t)row * p->y_stride + tile * 16;
    for (; sums < end; sums += 32, y += p->y_stride) {
        if (width < 32 && p->ending == LLM__ADD) LLM__SHARED(add)(y, sums, width);
        else if (width < 32) memcpy(y, sums, (size_t)width * sizeof *y);
        else {
            V a = v_load(sums), b = v_load(sums + 16);
            if (p->ending == LLM__ADD) a = v_add(v_load(y), a);
            if (p->ending == LLM__ADD) b = v_add(v_load(y + 16), b);
            v_store(y, a);
            v_store(y + 16, b);
        }
    }
}

/* Finishes at most n of the waiting rows. */
LLM__INLINE void LLM__FN(end_some)(llm__kernel_ended *e, int n) {
    if (n > e->n) n = e->n;
    LLM__FN(end_rows)(e->panel, e->tile, e->n_cols, e->row, n, e->at);
    e->at += n * 32;
    e->row += n;
    e->n -= n;
}

/* Returns the buffer for n finished rows from `row` on. They count as waiting once the caller has filled it. */
LLM__INLINE float *LLM__FN(begin_end)(const llm__kernel_tile_product *p, int row, int n) {
    llm__kernel_ended *e = p->ended;
    e->tile = p->tile;
    e->n_cols = p->n_cols;
    e->row = row;
    e->n = e->panel->n_rows - row < n ? e->panel->n_rows - row : n;
    e->at = e->sums;
    return e->sums;
}

/* Widens a block for the products: its pairs of even and of odd k alternate. */
LLM__INLINE void LLM__FN(widen)(const uint8_t *w, uint8_t *to) {
    float *pairs = (float *)(void *)to;
    for (int i = 0; i < 8; i++, pairs += 32) {
        V even, odd;
        LLM__FN(weights)(LLM__W_BF16, false, w + (size_t)(i / 2) * 256, i % 2 * 2, &even, &odd);
        v_store(pairs, even);
        v_store(pairs + 16, odd);
    }
}

/* Prefetches the part of the following data that belongs to rows [row, row + step) of a pass over n_rows. */
LLM__INLINE void LLM__FN(fetch_ahead)(const uint8_t *ahead, size_t bytes, int row, int step, int n_rows) {
    size_t share = (bytes / 64 + 1) * (size_t)step / (size_t)(n_rows + step - 1) + 1;
    size_t first = share * (size_t)(row / step) * 64;
    for (size_t i = first; i < first + share * 64 && i < bytes; i += 64)
        _mm_prefetch((const char *)(ahead + i), _MM_HINT_T1);
}

/* Up to LLM__TILE_BLOCKS blocks. A tile without a neighbour is computed twice. */
LLM__TARGET static void LLM__FN(some_pairs)(const llm__kernel_tile_product *p) {
    uint8_t wide[2][LLM__TILE_BLOCKS * 1024] __attribute__((aligned(64)));
    const size_t stride = (size_t)p->a_blocks * 16, next = p->n_cols > 1 ? p->b_next : 0,
                 right = p->n_cols > 1 ? 16 : 0;
    const int n_rows = p->ended ? (p->ended->panel->n_rows + 3) / 4 * 4 : p->n_rows * 16;
    for (int i = 0; i < p->n_blocks; i++) {
        LLM__FN(widen)(p->b[i], wide[0] + i * 1024);
        LLM__FN(widen)(p->b[i] + next, wide[1] + i * 1024);
    }
    for (int row = 0; row < n_rows; row += 4) {
        const uint32_t *x = (const uint32_t *)(const void *)p->a + (size_t)row * stride;
        float *c = p->c + (size_t)row * p->c_stride, *to = p->ends ? p->ended->sums : c;
        const size_t to_stride = p->ends ? 32 : p->c_stride;
        V total[8];
        LLM__UNROLL for (size_t i = 0; i < 8; i++) {
            total[i] = p->add ? v_load(c + i / 2 * p->c_stride + i % 2 * right) : v_splat(0);
        }
        if (p->ahead) LLM__FN(fetch_ahead)(p->ahead, p->ahead_bytes, row, 4, n_rows);
        if (p->ahead && p->ahead_next) LLM__FN(fetch_ahead)(p->ahead + p->ahead_next, p->ahead_bytes, row, 4, n_rows);
        LLM__FN(blocks)(4, 2, LLM__W_BF16, true, x, stride, wide[0], sizeof *wide, p->n_blocks, total);
        LLM__UNROLL for (size_t i = 0; i < 8; i++) v_store(to + i / 2 * to_stride + i % 2 * right, total[i]);
        if (!p->ends) continue;
        int left = p->ended->panel->n_rows - row;
        LLM__FN(end_rows)(p->ended->panel, p->tile, p->n_cols, row, left < 4 ? left : 4, to);
    }
}

/* Long heads have more blocks than are widened at once. */
LLM__TARGET static void LLM__FN(pair_product)(const llm__kernel_tile_product *p) {
    llm__kernel_tile_product part = *p;
    for (int left = p->n_blocks; left > 0; left -= LLM__TILE_BLOCKS, part.add = true) {
        part.n_blocks = left < LLM__TILE_BLOCKS ? left : (int)LLM__TILE_BLOCKS;
        LLM__FN(some_pairs)(&part);
        part.a += LLM__TILE_BLOCKS * 64;
        part.b += LLM__TILE_BLOCKS;
    }
}

/* Describes the blocks [first, first + n) of two tiles (or of the last one) for all rows. */
LLM__INLINE llm__kernel_tile_product LLM__FN(panel_product)(const llm__kernel_panel *p, int tile, int first, int n,
                                                            const uint8_t **b) {
    const size_t bytes = LLM__FN(block_bytes)(p->kind);
    const uint8_t *w = p->tiles + (size_t)tile * p->tile_bytes + (size_t)first * bytes;
    llm__kernel_tile_product product;
    product.a = p->a + (size_t)first * p->line_step;
    product.n_rows = (p->n_rows + 15) / 16;
    product.a_blocks = p->k / 32;
    product.b = b;
    product.b_next = p->kind == LLM__W_BF16 ? p->tile_bytes : LLM__TILE_BLOCKS * 1024;
    product.n_blocks = n;
    product.n_cols = p->n_tiles - tile < 2 ? 1 : 2;
    product.c = p->c + tile * 16;
    product.c_stride = (size_t)p->n_tiles * 16;
    product.add = first > 0;
    product.ends = first + n == p->k / 32;
    product.tile = tile;
    /* Prefetch first the same part of the next two tiles, then the next part of the first two, then another panel. */
    if (tile + 2 < p->n_tiles) product.ahead = w + 2 * p->tile_bytes;
    else if (!product.ends) product.ahead = p->tiles + (size_t)(first + n) * bytes;
    else product.ahead = p->ahead;
    product.ahead_bytes = (size_t)n * bytes;
    product.ahead_next = tile + 3 == p->n_tiles || p->n_tiles == 1 ? 0 : p->tile_bytes;
    for (int i = 0; i < n; i++) b[i] = p->kind == LLM__W_BF16 ? w + i * 1024 : p->unpacked + i * 1024;
    for (int i = 0; i < product.n_cols && p->kind != LLM__W_BF16; i++)
        LLM__FN(unpack)(w + (size_t)i * p->tile_bytes, n, p->unpacked + (size_t)i * product.b_next);
    return product;
}

/* A few blocks of two tiles at a time, for all rows: as many as LLM__TILE_BLOCKS allows, in equal parts. */
LLM__INLINE void LLM__FN(run_panel)(const llm__kernel_panel *p, void (*product_fn)(const llm__kernel_tile_product *p)) {
    const uint8_t *b[LLM__TILE_BLOCKS];
    llm__kernel_ended ended;
    int n_blocks = p->k / 32, n_parts = (n_blocks + LLM__TILE_BLOCKS - 1) / LLM__TILE_BLOCKS,
        step = (n_blocks + n_parts - 1) / n_parts;
    ended.panel = p;
    ended.n = 0;
    for (int first = 0; first < n_blocks; first += step)
        for (int tile = 0; tile < p->n_tiles; tile += 2) {
            llm__kernel_tile_product product =
                LLM__FN(panel_product)(p, tile, first, n_blocks - first < step ? n_blocks - first : step, b);
            product.ended = &ended;
            product_fn(&product);
        }
    if (ended.n) LLM__FN(end_some)(&ended, ended.n);
}

LLM__TARGET static void LLM__FN(pair_panel)(const llm__kernel_panel *p) {
    LLM__FN(run_panel)(p, LLM__FN(pair_product));
}

#endif

#if defined(LLM__USE_BF16) && defined(LLM__HAVE_TILES)

/* ---- Products on the matrix unit ----
   Floor: 16 cycles for 16 x 16 sums over 32 k. Two by two tiles of sums need two loads of 1 KB from each side for four
   such products: 64 cycles, in which the L1 cache delivers at least twice these 4 KB. So the two tiles of weights stay
   in L1 (36 KB), while all rows of the panel are streamed past it from L2, 32 bytes a cycle. Weights come from memory
   once for 256 rows: 4 bytes a cycle, prefetched a little with each product. Everything that is not a product is done
   between products, when the vector units get one of their two ports. The panels of one thread alone reach 60 % of the
   unit's rate at 576 k, and 53 % at 2,048, where sums over a part of k are stored and reloaded (84 and 60 % if the
   sums are dropped; Granite Rapids). */

static void LLM__FN(tiles_enter)(void) {
    llm__amx_config config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) {
        config.rows[i] = 16;
        config.row_bytes[i] = 64;
    }
    LLM__TILE_CONFIG(config);
}

static void LLM__FN(tiles_leave)(void) { LLM__TILE_RELEASE(); }

/* One square of 2 x 2 tiles of sums, or a part of it; the size is a constant after inlining. Each product takes 16
   cycles, in which the vector units have time to prefetch `lines` of the following data and to finish the square
   before. */
LLM__INLINE void LLM__FN(square)(const int ROWS, const int COLS, const llm__kernel_tile_product *p, int row,
                                 const uint8_t *ahead, size_t lines) {
    const size_t c_bytes = p->c_stride * 4, a_next = (size_t)p->a_blocks * 1024;
    const uint8_t *a = p->a + (size_t)row * a_next;
    float *c = p->c + (size_t)row * 16 * p->c_stride, *low = c + 16 * p->c_stride;
    if (p->add) {
        LLM__TILE_LOAD(0, c, c_bytes);
        if (COLS > 1) LLM__TILE_LOAD(1, c + 16, c_bytes);
        if (ROWS > 1) LLM__TILE_LOAD(2, low, c_bytes);
        if (ROWS > 1 && COLS > 1) LLM__TILE_LOAD(3, low + 16, c_bytes);
    } else {
        LLM__TILE_ZERO(0);
        if (COLS > 1) LLM__TILE_ZERO(1);
        if (ROWS > 1) LLM__TILE_ZERO(2);
        if (ROWS > 1 && COLS > 1) LLM__TILE_ZERO(3);
    }
    const int due = p->ended ? (p->ended->n + p->n_blocks - 1) / p->n_blocks : 0;
    for (int i = 0; i < p->n_blocks; i++, a += 1024) {
        LLM__TILE_STREAM(4, a, 64);
        LLM__TILE_LOAD(6, p->b[i], 64);
        LLM__TILE_DOT(0, 4, 6);
        if (ROWS > 1) LLM__TILE_STREAM(5, a + a_next, 64);
        if (ROWS > 1) LLM__TILE_DOT(2, 5, 6);
        if (COLS > 1) LLM__TILE_LOAD(7, p->b[i] + p->b_next, 64);
        if (COLS > 1) LLM__TILE_DOT(1, 4, 7);
        if (ROWS > 1 && COLS > 1) LLM__TILE_DOT(3, 5, 7);
        for (size_t j = 0; j < lines; j++, ahead += 64) {
            _mm_prefetch((const char *)ahead, _MM_HINT_T1);
            _mm_prefetch((const char *)ahead + p->ahead_next, _MM_HINT_T1);
        }
        if (due) LLM__FN(end_some)(p->ended, due);
    }
    float *to = p->ends ? LLM__FN(begin_end)(p, row * 16, ROWS * 16) : c;
    const size_t to_bytes = p->ends ? 128 : c_bytes;
    low = to + to_bytes * 4;
    LLM__TILE_STORE(0, to, to_bytes);
    if (COLS > 1) LLM__TILE_STORE(1, to + 16, to_bytes);
    if (ROWS > 1) LLM__TILE_STORE(2, low, to_bytes);
    if (ROWS > 1 && COLS > 1) LLM__TILE_STORE(3, low + 16, to_bytes);
}

LLM__TARGET static void LLM__FN(tile_product)(const llm__kernel_tile_product *p) {
    const size_t n_steps = (size_t)((p->n_rows + 1) / 2) * (size_t)p->n_blocks,
                 lines = p->ahead ? (p->ahead_bytes / 64 + n_steps - 1) / n_steps : 0;
    const uint8_t *ahead = lines ? p->ahead : p->a;
    for (int row = 0; row < p->n_rows; row += 2, ahead += (size_t)p->n_blocks * lines * 64) {
        if (p->n_cols == 1 && row + 1 == p->n_rows) LLM__FN(square)(1, 1, p, row, ahead, lines);
        else if (p->n_cols == 1) LLM__FN(square)(2, 1, p, row, ahead, lines);
        else if (row + 1 == p->n_rows) LLM__FN(square)(1, 2, p, row, ahead, lines);
        else LLM__FN(square)(2, 2, p, row, ahead, lines);
    }
}

LLM__TARGET static void LLM__FN(tile_panel)(const llm__kernel_panel *p) {
    LLM__FN(run_panel)(p, LLM__FN(tile_product));
}

/* On varied numbers, as in a real product. With zeros or constants the unit runs a quarter faster than it ever can in
   use. */
LLM__TARGET static uint32_t LLM__FN(tile_multiply)(size_t n) {
    uint16_t numbers[8 * 512] __attribute__((aligned(64)));
    float c[16];
    for (uint32_t i = 0, bits = 1; i < 8 * 512; i++, bits = bits * 1664525u + 1013904223u)
        numbers[i] = (uint16_t)(0x3C00 | (bits >> 16 & 0x83FF)); /* 2^-7 to 2, of both signs */
    LLM__FN(tiles_enter)();
    LLM__TILE_ZERO(0);
    LLM__TILE_ZERO(1);
    LLM__TILE_ZERO(2);
    LLM__TILE_ZERO(3);
    for (; n; n--) {
        const uint16_t *two = numbers + n % 4 * 1024, *others = numbers + (n + 1) % 4 * 1024;
        LLM__TILE_LOAD(4, two, 64);
        LLM__TILE_LOAD(6, others, 64);
        LLM__TILE_DOT(0, 4, 6);
        LLM__TILE_LOAD(5, two + 512, 64);
        LLM__TILE_DOT(2, 5, 6);
        LLM__TILE_LOAD(7, others + 512, 64);
        LLM__TILE_DOT(1, 4, 7);
        LLM__TILE_DOT(3, 5, 7);
    }
    LLM__TILE_STORE(0, c, 0);
    LLM__FN(tiles_leave)();
    return llm__f32_bits(c[0]);
}

#endif

#if defined(LLM__USE_BF16)
#define LLM__MULTIPLY_PAIRS LLM__FN(multiply)
#define LLM__PACK LLM__FN(pack_scale), LLM__FN(pack_norm), LLM__FN(pack_softmax)
#define LLM__MANY_ROWS 64, LLM__PANEL_LEAST, LLM__FN(pair_product), LLM__FN(pair_panel), LLM__PACK
#else
#define LLM__MULTIPLY_PAIRS NULL
#define LLM__MANY_ROWS 0, 0, NULL, NULL, NULL, NULL, NULL
#endif

/* FN: LLM__FN, or LLM__SHARED if these products belong to another set. */
#define LLM__KERNEL_TABLE(FN)                                                                                         \
    {LLM__SHARED(product_f32), FN(product_bf16), FN(product_int8), LLM__SHARED(product_f16)}, LLM__FN(group_product), \
        LLM__FN(quantize), LLM__FN(unpack), LLM__SHARED(norm_factor), LLM__SHARED(norm), LLM__SHARED(swiglu),         \
        LLM__SHARED(softmax), LLM__SHARED(maxima), LLM__SHARED(odds), LLM__SHARED(merge), LLM__SHARED(scale),         \
        LLM__SHARED(add), LLM__SHARED(weigh), LLM__SHARED(rope), LLM__SHARED(read), LLM__SHARED(multiply),            \
        LLM__FN(multiply_bytes), LLM__MULTIPLY_PAIRS

static const llm__kernels LLM__FN(kernels) = {
#if defined(LLM__USE_BF16)
    "avx512_bf16",
#elif defined(LLM__USE_AVX512)
    "avx512",
#elif defined(LLM__USE_AVX2)
    "avx2",
#elif defined(LLM__USE_NEON)
    "neon",
#else
    "scalar",
#endif
    LLM__KERNEL_TABLE(LLM__FN),
    NULL,
    LLM__MANY_ROWS,
    NULL,
    NULL};

#if defined(LLM__USE_BF16) && defined(LLM__HAVE_TILES)
/* On processors with a matrix unit, VDPBF16PS takes two cycles of one port. FMA on both ports is never slower, and a
   third faster for 8 rows of groups. Other kinds use the unit from 5 rows on; it takes as long for these as for 16,
   but less time than FMA (Granite Rapids). */
static const llm__kernels LLM__FN(amx_kernels) = {
    "amx",
    LLM__KERNEL_TABLE(LLM__SHARED),
    LLM__FN(tile_multiply),
    1024,
    5,
    LLM__FN(tile_product),
    LLM__FN(tile_panel),
    LLM__PACK,
    LLM__FN(tiles_enter),
    LLM__FN(tiles_leave),
};
#endif

#undef V
#undef v_load
#undef v_store
#undef v_splat
#undef v_add
#undef v_sub
#undef v_mul
#undef v_fma
#undef v_max
#undef v_min
#undef v_even
#undef v_odd
#undef v_round_bf16
#undef v_int8
#undef v_half
#undef v_store_bytes
#undef v_bytes
#undef v_ints
#undef v_load_bytes
#undef v_save_bytes
#undef v_low
#undef v_high
#undef v_above
#undef v_look_up
#undef v_splat_int
#undef v_dot_bytes
#undef v_of_ints
#undef v_times_pow2
#undef v_guess_inverse
#undef v_pair
#undef v_dot
#undef v_input
#undef v_exp2
#undef v_inverse
#undef v_sum
#undef v_hmax
#undef LLM__LANES
#undef LLM__LANES_OF
#undef LLM__BOTH
#undef LLM__BOTH_INTS
#undef LLM__QUARTER_BYTES
#undef LLM__QUARTERS
#undef LLM__INLINE
#undef LLM__UNROLL
#undef LLM__MOST_ROWS
#undef LLM__STRIP_ROWS
#undef LLM__GROUP_ROWS
#undef LLM__GROUP_TILES
#undef LLM__SIGN
#undef LLM__KERNEL_TABLE
#undef LLM__SHARED
#undef LLM__MULTIPLY_PAIRS
#undef LLM__MANY_ROWS
#undef LLM__PACK
#undef LLM__LONG

#endif /* LLM__KERNEL_PASS */
