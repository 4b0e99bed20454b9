/* Runs private functions that can fail, and builds a SentencePiece vocabulary of eight pieces with any chat template.
   Needs the implementation of llm.h. */
#ifndef TESTS_SMALL_H
#define TESTS_SMALL_H

/* Runs `body`. Its allocations stay in the pool; they come from the host if it is not NULL. */
static inline llm_status guarded(llm__pool *pool, const llm_host *host, void (*body)(llm__env *env, void *arg),
                                 void *arg, llm_error *err) {
    llm__env env;
    llm__pool_init(pool, host);
    llm__env_init(&env, pool, err, NULL);
    return llm__env_run(&env, body, arg);
}

typedef struct small_job {
    const char *chat_template;
    size_t n_template;
    llm_tokenizer *tokenizer;
} small_job;

/* arg is a small_job. */
static inline void build_small(llm__env *env, void *arg) {
    static const char *const texts[] = {"<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "\xE2\x96\x81", "a", "b"};
    static const int32_t types[] = {LLM__TYPE_UNKNOWN, LLM__TYPE_CONTROL, LLM__TYPE_CONTROL, LLM__TYPE_CONTROL,
                                    LLM__TYPE_CONTROL, LLM__TYPE_NORMAL,  LLM__TYPE_NORMAL,  LLM__TYPE_NORMAL};
    static const float scores[8] = {0, 0, 0, 0, 0, -1, -2, -3};
    small_job *job = (small_job *)arg;
    llm__str pieces[8];
    llm__vocab_source v;
    memset(&v, 0, sizeof v);
    for (int i = 0; i < 8; i++) {
        pieces[i].at = texts[i];
        pieces[i].n = strlen(texts[i]);
    }
    v.sentencepiece = true;
    v.pieces_name = v.scores_name = v.types_name = v.merges_name = "test";
    v.n_pieces = 8;
    v.pieces = pieces;
    v.scores = scores;
    v.types = types;
    v.unk = 0;
    v.bos = 1;
    v.eos = 2;
    v.add_bos = v.strip_prefix = v.fuse_unk = true;
    v.prefix = LLM__PREFIX_STRETCH;
    v.chat_template.at = job->chat_template;
    v.chat_template.n = job->n_template;
    job->tokenizer = llm__tokenizer_build(env, &v);
}

#endif
