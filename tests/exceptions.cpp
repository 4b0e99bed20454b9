// Callbacks that leave llm_generate by a C++ exception: from each poll of `cancel`, while other threads wait, and from
// each piece of text. The next call must give the usual text. The same holds for llm_step, where the other stream must
// continue. If an exception leaves one of two ranks, the other rank and the next call of this one must get an error
// that says so. llm_calibrate frees all memory when its callback leaves by an exception.
// For tests/test_builds.sh:  exceptions MODEL
#define LLM_IMPLEMENTATION
#include "llm.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

struct host {
    std::string text;
    int calls, last; // calls so far; the call that throws (0: none)
};

static void count(host *h) {
    if (++h->calls == h->last) throw std::runtime_error("the host has enough");
}

static bool on_cancel(void *user) {
    count(static_cast<host *>(user));
    return false;
}

static bool on_text(void *user, const char *text, size_t size) {
    host *h = static_cast<host *>(user);
    h->text.append(text, size);
    if (h->last) count(h);
    return true;
}

// Runs two streams, one of which throws at call number `last`. Returns the text of the other.
static std::string beside_a_thrower(llm_context *ctx, int last, bool by_cancel, int *n_thrown, llm_error *err) {
    host hosts[2] = {{"", 0, last}, {"", 0, 0}};
    llm_stream *streams[2];
    int n_running = 2;
    for (int i = 0; i < 2; i++) {
        llm_generate_desc desc = {};
        desc.prompt = "a b a b b a a b";
        desc.max_tokens = 8;
        desc.ignore_end = true;
        desc.seq = LLM_SEQ_ANY;
        desc.user = &hosts[i];
        desc.on_text = on_text;
        if (i == 0 && by_cancel) {
            desc.on_text = nullptr;
            desc.cancel = on_cancel;
        }
        if (llm_stream_begin(&streams[i], ctx, &desc, err)) return err->message;
    }
    while (n_running) try {
            if (llm_step(ctx, 0, &n_running, err)) return err->message;
        } catch (const std::runtime_error &) {
            ++*n_thrown;
        }
    for (llm_stream *stream : streams) llm_stream_free(stream);
    return hosts[1].text;
}

// One of two ranks, whose callback throws at call number `last`. The rank then calls again, or frees everything.
struct rank {
    const char *file;
    llm_comm *comm;
    bool staged, by_cancel, calls_again; // staged: a pipeline; else tensor parallel
    int last;
    bool thrown;
    llm_status status; // of the last call that returned
    llm_error err;
};

static void generate_on(rank *r) {
    llm_model_desc model_desc = {};
    llm_context_desc context_desc = {};
    llm_model *model = nullptr;
    llm_context *ctx = nullptr;
    host thrower = {"", 0, r->last};
    model_desc.n_threads = context_desc.n_threads = 1;
    (r->staged ? model_desc.pipeline : model_desc.tensor) = r->comm;
    r->comm->patience = 8;
    r->status = llm_model_load(&model, r->file, &model_desc, &r->err);
    if (!r->status) r->status = llm_context_create(&ctx, model, &context_desc, &r->err);
    if (!r->status) {
        llm_generate_desc desc = {};
        desc.prompt = "a b a b b a a b";
        desc.max_tokens = 60;
        desc.ignore_end = true;
        desc.user = &thrower;
        if (r->by_cancel) desc.cancel = on_cancel;
        else desc.on_text = on_text;
        try {
            r->status = llm_generate(ctx, &desc, nullptr, &r->err);
        } catch (const std::runtime_error &) {
            r->thrown = true;
            desc.cancel = nullptr;
            desc.on_text = nullptr;
            if (r->calls_again) r->status = llm_generate(ctx, &desc, nullptr, &r->err);
        }
    }
    llm_context_free(ctx);
    llm_model_free(model);
    llm_comm_free(r->comm);
}

static bool throws_on_a_rank(const char *file) {
    for (int i = 0; i < 16; i++) {
        llm_comm *comms[2];
        rank ranks[2];
        llm_error err;
        int who = i & 1;
        if (llm_comm_threads(comms, 2, nullptr, &err)) {
            std::puts(err.message);
            return false;
        }
        for (int j = 0; j < 2; j++)
            ranks[j] = {file, comms[j], (i & 2) != 0, (i & 4) != 0, (i & 8) != 0, j == who ? 3 : 0, false, LLM_OK, {}};
        std::thread second(generate_on, &ranks[1]);
        generate_on(&ranks[0]);
        second.join();
        for (int j = 0; j < 2; j++) {
            bool told = ranks[j].status && std::strstr(ranks[j].err.message, "did not return");
            if (ranks[j].thrown == (j == who) && (told || (j == who && !ranks[j].calls_again && !ranks[j].status)))
                continue;
            std::printf("rank %d, exception on rank %d, case %d: %s\n", j, who, i,
                        ranks[j].status ? ranks[j].err.message : "no error");
            return false;
        }
    }
    return true;
}

// Counts the blocks that are not freed yet.
static void *allocate(void *user, size_t size) {
    ++*static_cast<std::atomic<int> *>(user);
    return std::malloc(size);
}

static void release(void *user, void *ptr) {
    --*static_cast<std::atomic<int> *>(user);
    std::free(ptr);
}

static int calls_left;

static bool on_progress(void *, float) {
    if (!--calls_left) throw std::runtime_error("the host has enough");
    return true;
}

static bool calibration_is_freed(const llm_model *model) {
    const std::string text = "a b a b b a a b a b a b b a a b a b a b b a a b";
    std::atomic<int> n_blocks(0);
    for (int last = 1, thrown = 1; thrown; last++) {
        llm_calibrate_desc desc = {};
        llm_importance *made = nullptr;
        llm_error err;
        desc.n_ctx = 8;
        desc.n_threads = 3;
        desc.host.alloc = allocate;
        desc.host.free = release;
        desc.host.progress = on_progress;
        desc.host.user = &n_blocks;
        calls_left = last;
        thrown = 0;
        try {
            if (llm_calibrate(&made, model, text.data(), text.size(), &desc, &err)) {
                std::puts(err.message);
                return false;
            }
        } catch (const std::runtime_error &) {
            thrown = 1;
        }
        llm_importance_free(made);
        if (n_blocks || (last == 1 && !thrown)) {
            std::printf("exception %d out of llm_calibrate leaves %d blocks\n", last, n_blocks.load());
            return false;
        }
    }
    return true;
}

int main(int, char **argv) {
    llm_model_desc model_desc = {};
    llm_context_desc context_desc = {};
    llm_model *model;
    llm_context *ctx;
    llm_error err;
    int n_thrown = 0;
    context_desc.n_threads = 3;
    context_desc.n_batch = 4;
    context_desc.n_seq = 3;
    if (llm_model_load(&model, argv[1], &model_desc, &err) || llm_context_create(&ctx, model, &context_desc, &err)) {
        std::puts(err.message);
        return 1;
    }
    std::string usual;
    for (bool by_cancel : {true, false})
        for (int last = 0, n_calls = 1; last <= n_calls && last < 60; last++) {
            host thrower = {"", 0, last}, calm = {"", 0, 0};
            llm_generate_desc desc = {};
            desc.prompt = "a b a b b a a b";
            desc.max_tokens = 8;
            desc.ignore_end = true;
            if (last) {
                desc.user = &thrower;
                desc.on_text = on_text;
                if (by_cancel) {
                    desc.on_text = nullptr;
                    desc.cancel = on_cancel;
                }
                bool thrown = false;
                try {
                    llm_generate(ctx, &desc, nullptr, &err);
                } catch (const std::runtime_error &) {
                    thrown = true;
                    n_thrown++;
                }
                n_calls = thrown ? last + 1 : last;
                desc.cancel = nullptr;
            }
            desc.user = &calm;
            desc.on_text = on_text;
            if (llm_generate(ctx, &desc, nullptr, &err)) {
                std::puts(err.message);
                return 1;
            }
            if (!last) usual = calm.text;
            if (usual.empty() || calm.text != usual) {
                std::printf("after exception %d the text is \"%s\", not \"%s\"\n", last, calm.text.c_str(),
                            usual.c_str());
                return 1;
            }
        }
    for (bool by_cancel : {true, false})
        for (int last = 1, before = -1; before != n_thrown && last < 60; last++) {
            before = n_thrown;
            std::string text = beside_a_thrower(ctx, last, by_cancel, &n_thrown, &err);
            if (text == usual) continue;
            std::printf("beside exception %d the text is \"%s\", not \"%s\"\n", last, text.c_str(), usual.c_str());
            return 1;
        }
    llm_context_free(ctx);
    const bool freed = calibration_is_freed(model);
    llm_model_free(model);
    std::printf("%d exceptions\n", n_thrown);
    return n_thrown < 10 || !freed || !throws_on_a_rank(argv[1]);
}
