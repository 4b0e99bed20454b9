/* Scoring's dynamic programming finds a way to cut a list of texts into batches with the least waste. */
#include "tests/check.h"
#define LLM_IMPLEMENTATION
#define LLM_NO_SIMD /* nothing is computed here */
#include "llm.h"

static uint32_t draw(uint32_t *state, uint32_t n) {
    *state = *state * 1664525u + 1013904223u;
    return (uint32_t)((uint64_t)*state * n >> 32);
}

/* Finds the least waste by trying all cuts. */
static int64_t least_waste(const llm__score_text *texts, int n, bool to_shortest, int theta,
                           const llm__score_room *room) {
    int64_t least = n ? INT64_MAX : 0;
    for (int size = 1; size <= n && size <= llm__score_most_texts(room, texts[n - 1].length); size++) {
        const llm__score_text *batch = texts + n - size;
        int64_t waste = least_waste(texts, n - size, to_shortest, theta, room),
                area = batch[to_shortest ? 0 : size - 1].length * size;
        for (int i = 0; i < size; i++)
            waste += to_shortest ? batch[i].length - batch[0].length : batch[size - 1].length - batch[i].length;
        waste += area < theta ? (int64_t)1 << 40 : 0;
        if (waste < least) least = waste;
    }
    return least;
}

static void test_cuts(void **state) {
    llm__env env;
    llm__pool pool;
    uint32_t random = 3;
    (void)state;
    llm__pool_init(&pool, NULL);
    llm__env_init(&env, &pool, NULL, NULL);
    for (int round = 0; round < 300; round++) {
        llm__score_text texts[12];
        llm__score_room room = {1 + (int)draw(&random, 12), 4 + (int)draw(&random, 30), (int)draw(&random, 40)};
        int n = 1 + (int)draw(&random, 12), theta = (int)draw(&random, 200), ends[13];
        bool to_shortest = round % 2;
        memset(texts, 0, sizeof texts);
        for (int i = 0; i < n; i++) texts[i].length = (i ? texts[i - 1].length : 1) + (int)draw(&random, 30);
        int n_batches = llm__score_cut_by_waste(&env, texts, n, to_shortest, theta, &room, ends);
        int64_t waste = 0;
        for (int batch = 0, from = 0; batch < n_batches; from = ends[batch++]) {
            int size = ends[batch] - from, edge = texts[to_shortest ? from : ends[batch] - 1].length;
            assert_true(size >= 1 && size <= llm__score_most_texts(&room, texts[ends[batch] - 1].length));
            for (int i = from; i < ends[batch]; i++) waste += abs(texts[i].length - edge);
            waste += edge * size < theta ? (int64_t)1 << 40 : 0;
        }
        assert_int_equal(ends[n_batches - 1], n);
        assert_true(waste == least_waste(texts, n, to_shortest, theta, &room));
    }
    llm__pool_free(&pool);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_cuts)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
