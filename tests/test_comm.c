/* Ranks that are threads of one process: their exchanges and messages are right, and no rank hangs when another fails.
   Variants: asan tsan */
#include "tests/check.h"
#include "llm.h"
#include "tests/common.h"
#include "tests/ranks.h"

enum { ROWS = 5, STRIDE = 70, WIDTH = 61, ROUNDS = 200 };

static unsigned char byte_of(int round, int row, int column) { return (unsigned char)(round * 31 + row * 7 + column); }

/* The rank that holds a column. A unit has 6 columns. */
static int owner_of(int column, int size) {
    int n_units = (WIDTH + 5) / 6, rank = 0;
    while (column / 6 >= n_units * (rank + 1) / size) rank++;
    return rank;
}

static void check_exchange(llm_comm *comm, int round) {
    unsigned char data[ROWS][STRIDE];
    llm_error err;
    unsigned flags = comm->rank == round % comm->size ? 4u : 0;
    llm_exchange x = {data, ROWS, STRIDE, WIDTH, 6, (WIDTH + 5) / 6, NULL, 0};
    memset(data, 0xEE, sizeof data);
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < WIDTH; i++)
            if (owner_of(i, comm->size) == comm->rank) data[row][i] = byte_of(round, row, i);
    RANK_CHECK(comm->exchange(comm, &x, &flags, &err) == LLM_OK, err.message);
    RANK_CHECK(flags == 4, "a flag was lost");
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < STRIDE; i++)
            RANK_CHECK(data[row][i] == (i < WIDTH ? byte_of(round, row, i) : 0xEE), "an exchange gave the wrong value");
}

/* Exchanges rows that each lie on one rank only. */
static void check_tokens(llm_comm *comm, int round) {
    int32_t tokens[ROWS], rows[ROWS];
    llm_error err;
    unsigned flags = 0;
    llm_exchange x = {rows, ROWS, sizeof *rows, sizeof *rows, sizeof *rows, 10, tokens, 3};
    for (int row = 0; row < ROWS; row++) {
        tokens[row] = (round * 11 + row * 5) % 30;
        int unit = tokens[row] / 3, rank = 0;
        while (unit >= 10 * (rank + 1) / comm->size) rank++;
        rows[row] = rank == comm->rank ? 1000 * round + tokens[row] : -1;
    }
    RANK_CHECK(comm->exchange(comm, &x, &flags, &err) == LLM_OK, err.message);
    for (int row = 0; row < ROWS; row++)
        RANK_CHECK(rows[row] == 1000 * round + tokens[row], "a row came from the wrong rank");
}

static void exchange(llm_comm *comm, void *arg) {
    llm_comm *other = NULL;
    llm_error err;
    (void)arg;
    RANK_CHECK(comm->duplicate(comm, &other, &err) == LLM_OK, err.message);
    RANK_CHECK(other->rank == comm->rank && other->size == comm->size, "the duplicate has the wrong rank or size");
    for (int round = 0; round < ROUNDS; round++) {
        check_exchange(round % 3 ? comm : other, round);
        check_tokens(comm, round);
    }
    llm_comm_free(other);
}

static void test_exchange(void **state) {
    (void)state;
    for (int n = 1; n <= MOST_RANKS; n++) on_ranks(n, NULL, exchange, NULL);
}

/* Passes messages around a ring. Two messages are in transit at any time. */
static void ring(llm_comm *comm, void *arg) {
    int next = (comm->rank + 1) % comm->size, before = (comm->rank + comm->size - 1) % comm->size;
    int buffers[2][100], got[100];
    llm_error err;
    (void)arg;
    for (int round = 0; round <= ROUNDS; round++) {
        int n = 1 + round % 100;
        RANK_CHECK(comm->drain(comm, next, 1, &err) == LLM_OK, err.message);
        for (int i = 0; i < n; i++) buffers[round % 2][i] = comm->rank * 100000 + round * 100 + i;
        RANK_CHECK(comm->send(comm, next, buffers[round % 2], (size_t)n * sizeof(int), &err) == LLM_OK, err.message);
        if (round == 0) continue; /* messages arrive one round later */
        n = 1 + (round - 1) % 100;
        RANK_CHECK(comm->receive(comm, before, got, (size_t)n * sizeof(int), &err) == LLM_OK, err.message);
        for (int i = 0; i < n; i++)
            RANK_CHECK(got[i] == before * 100000 + (round - 1) * 100 + i, "a message was changed");
    }
    RANK_CHECK(comm->receive(comm, before, got, (1 + ROUNDS % 100) * sizeof(int), &err) == LLM_OK, err.message);
    RANK_CHECK(comm->drain(comm, next, 0, &err) == LLM_OK, err.message);
}

static void test_messages(void **state) {
    (void)state;
    for (int n = 2; n <= MOST_RANKS; n++) on_ranks(n, NULL, ring, NULL);
}

/* ---- Failures ---- */

typedef struct trouble {
    enum { LEAVES, HANGS, ABORTS, OTHER_CALL, LONG_MESSAGE, NEVER_RECEIVES, TROUBLES } kind;
    const char *word; /* expected in the error message of the other ranks */
    int n_told;       /* ranks that got an error; atomic */
    int n_done;       /* atomic */
} trouble;

static const char *const WORDS[TROUBLES] = {"has left",       "in time",    "enough of this",
                                            "different call", "wrong size", "in time"};

/* The last rank does something wrong in round 3. All others must get an error, and none may read freed memory. */
static void go_wrong(llm_comm *comm, void *arg) {
    trouble *t = (trouble *)arg;
    int *data = (int *)calloc((size_t)comm->size * 3000, sizeof *data);
    llm_exchange x = {data, 1, 0, (size_t)comm->size * 12000, 12000, comm->size, NULL, 0};
    llm_error err;
    llm_status status = LLM_OK;
    bool wrong = comm->rank == comm->size - 1;
    double start = seconds_now();
    comm->patience = 0.4;
    for (int round = 0; !status; round++) {
        unsigned flags = 0;
        if (round == 3 && wrong && t->kind == LEAVES) break;
        if (round == 3 && wrong && t->kind == HANGS)
            while (__atomic_load_n(&t->n_done, __ATOMIC_ACQUIRE) < comm->size - 1)
                nanosleep(&(struct timespec){0, 1000000}, NULL);
        if (round == 3 && wrong && t->kind == ABORTS) llm_comm_abort(comm, "rank 2 has had enough of this");
        if (round == 3 && wrong && t->kind == OTHER_CALL) x.row_bytes = 12000;
        if (round == 3 && t->kind == LONG_MESSAGE) {
            if (wrong) status = comm->send(comm, 0, data, 100, &err);
            else if (comm->rank == 0) status = comm->receive(comm, comm->size - 1, data, 99, &err);
        }
        for (int i = 0; round == 3 && t->kind == NEVER_RECEIVES && wrong && i < 70 && !status; i++)
            status = comm->send(comm, 0, data, 4, &err);
        if (!status) status = comm->exchange(comm, &x, &flags, &err);
    }
    free(data);
    if (status) {
        assert_explained(status, &err);
        RANK_CHECK(strstr(err.message, WORDS[t->kind]) != NULL, err.message);
        __atomic_add_fetch(&t->n_told, 1, __ATOMIC_ACQ_REL);
        /* All later calls fail at once with the same status. */
        RANK_CHECK(comm->send(comm, 0, NULL, 0, &err) == status && comm->receive(comm, 0, NULL, 0, &err) == status,
                   "a later call does not fail");
    }
    RANK_CHECK(seconds_now() - start < 10, "a rank waited for too long");
    __atomic_add_fetch(&t->n_done, 1, __ATOMIC_ACQ_REL);
}

static void test_failures(void **state) {
    (void)state;
    for (int kind = 0; kind < TROUBLES; kind++)
        for (int n = 2; n <= 4; n++) {
            trouble t = {0};
            t.kind = kind;
            on_ranks(n, NULL, go_wrong, &t);
            assert_int_equal(t.n_told, n - (kind == LEAVES));
        }
}

static void test_arguments(void **state) {
    llm_comm *comms[1];
    llm_error err;
    heap h;
    (void)state;
    assert_int_equal(llm_comm_threads(comms, 0, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_explained(LLM_ERROR_ARGUMENT, &err);
    assert_int_equal(llm_comm_threads(comms, 1 << 20, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_comm_threads(NULL, 1, NULL, &err), LLM_ERROR_ARGUMENT);
    llm_comm_free(NULL);
    llm_comm_abort(NULL, NULL);
    memset(&h, 0, sizeof h);
    llm_host host = heap_host(&h);
    on_ranks(3, &host, exchange, NULL);
    assert_all_returned(&h);
}

/* If an allocation fails on one rank, all ranks get an error. */
static void duplicate_starved(llm_comm *comm, void *arg) {
    heap *h = (heap *)arg;
    llm_comm *other;
    llm_error err;
    unsigned flags = 0;
    llm_exchange meet = {NULL, 0, 0, 0, 0, comm->size, NULL, 0};
    for (int k = 1; k <= 6; k++) {
        if (comm->rank == 0) h->n_calls = 0, h->fail_at = k;
        RANK_CHECK(comm->exchange(comm, &meet, &flags, &err) == LLM_OK, err.message);
        llm_status status = comm->duplicate(comm, &other, &err);
        RANK_CHECK(status == (k < 5 ? LLM_ERROR_MEMORY : LLM_OK), "a failed allocation is not reported");
        if (!status) llm_comm_free(other);
    }
}

static void test_starved(void **state) {
    heap h;
    (void)state;
    memset(&h, 0, sizeof h);
    llm_host host = heap_host(&h);
    on_ranks(3, &host, duplicate_starved, &h);
    assert_all_returned(&h);
}

/* Measures how long an exchange of two ranks takes if each has a core. With sanitizers it only checks that it works. */
static void many_exchanges(llm_comm *comm, void *arg) {
    char data[8192];
    llm_exchange x = {data, 1, 0, sizeof data, 16, sizeof data / 16, NULL, 0};
    double best = 1, start;
    memset(data, 0, sizeof data);
    for (int i = 0; i < (SANITIZED ? 1 : 20); i++) {
        start = seconds_now();
        for (int j = 0; j < 1000; j++) {
            unsigned flags = 0;
            RANK_CHECK(comm->exchange(comm, &x, &flags, NULL) == LLM_OK, "an exchange failed");
        }
        if (seconds_now() - start < best) best = seconds_now() - start;
    }
    if (comm->rank == 0) *(double *)arg = best * 1e3;
}

static void test_exchange_time(void **state) {
    double microseconds = 0;
    (void)state;
    on_ranks(2, NULL, many_exchanges, &microseconds);
    print_message("an exchange of 8 KB between 2 ranks: %.2f us\n", microseconds);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_exchange), cmocka_unit_test(test_messages),
                                       cmocka_unit_test(test_failures), cmocka_unit_test(test_arguments),
                                       cmocka_unit_test(test_starved),  cmocka_unit_test(test_exchange_time)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
