/* Ranks as threads of this process. Include it after llm.h and tests/check.h. A failed check on a rank ends the test
   program, because cmocka's own checks only work on the main thread. */
#ifndef TESTS_RANKS_H
#define TESTS_RANKS_H

#include <pthread.h>
#include <time.h>

enum { MOST_RANKS = 8 };

static inline void rank_failed(const char *file, int line, const char *what) {
    fprintf(stderr, "%s:%d: %s\n", file, line, what);
    _exit(1);
}
#define RANK_CHECK(condition, what) ((condition) ? (void)0 : rank_failed(__FILE__, __LINE__, what))

typedef struct rank_thread {
    pthread_t thread;
    void (*run)(llm_comm *comm, void *arg);
    llm_comm *comm;
    void *arg;
} rank_thread;

static inline void *rank_main(void *arg) {
    rank_thread *r = (rank_thread *)arg;
    r->run(r->comm, r->arg);
    llm_comm_free(r->comm);
    return NULL;
}

/* Calls run(comm, arg) on n ranks at the same time. */
static inline void on_ranks(int n, const llm_host *host, void (*run)(llm_comm *comm, void *arg), void *arg) {
    llm_comm *comms[MOST_RANKS];
    rank_thread threads[MOST_RANKS];
    llm_error err;
    if (llm_comm_threads(comms, n, host, &err)) fail_msg("%s", err.message);
    for (int i = 0; i < n; i++) {
        threads[i].run = run;
        threads[i].comm = comms[i];
        threads[i].arg = arg;
        assert_int_equal(pthread_create(&threads[i].thread, NULL, rank_main, &threads[i]), 0);
    }
    for (int i = 0; i < n; i++) pthread_join(threads[i].thread, NULL);
}

static inline double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#endif
