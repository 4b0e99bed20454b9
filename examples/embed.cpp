/*  embed.cpp - llm.h in a C++17 program: RAII, errors as exceptions, an answer as a std::string.

    build/embed MODEL [QUESTION]

    This file sees only the declarations; embed_llm.cpp holds the implementation.
*/
#include "llm.h"

#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>

struct Free {
    void operator()(llm_model *model) const { llm_model_free(model); }
    void operator()(llm_context *ctx) const { llm_context_free(ctx); }
};
using Model = std::unique_ptr<llm_model, Free>;
using Context = std::unique_ptr<llm_context, Free>;

static void check(llm_status status, const llm_error &err) {
    if (status != LLM_OK) throw std::runtime_error(err.message);
}

static Model load(const std::string &path) {
    llm_model *model = nullptr;
    llm_error err;
    check(llm_model_load(&model, path.c_str(), nullptr, &err), err);
    return Model(model);
}

static Context make_context(const Model &model) {
    llm_context *ctx = nullptr;
    llm_error err;
    check(llm_context_create(&ctx, model.get(), nullptr, &err), err);
    return Context(ctx);
}

static std::string ask(const Context &ctx, const std::string &question, int max_tokens) {
    std::string answer;
    llm_message message = {"user", question.c_str()};
    llm_generate_desc desc = {};
    desc.messages = &message;
    desc.n_messages = 1;
    desc.max_tokens = max_tokens;
    desc.user = &answer;
    /* The library is C: nothing may be thrown through it. Running out of memory here stops the answer instead. */
    desc.on_text = [](void *user, const char *text, size_t n_bytes) -> bool {
        try {
            static_cast<std::string *>(user)->append(text, n_bytes);
            return true;
        } catch (const std::bad_alloc &) {
            return false;
        }
    };
    llm_error err;
    check(llm_generate(ctx.get(), &desc, nullptr, &err), err);
    return answer;
}

int main(int argc, char **argv) try {
    Model model = load(argc > 1 ? argv[1] : "model.gguf");
    Context ctx = make_context(model);
    std::cout << ask(ctx, argc > 2 ? argv[2] : "What is the capital of France?", 200) << std::endl;
    return 0;
} catch (const std::exception &error) {
    std::cerr << error.what() << std::endl;
    return 1;
}
