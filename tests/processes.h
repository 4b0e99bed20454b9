/* Ranks as processes: fork, memory that they share, and a comm that exchanges data through that memory. Include it
   after llm.h, tests/check.h and tests/ranks.h. A failed check on a rank ends its process, and the parent reports
   it. */
#ifndef TESTS_PROCESSES_H
#define TESTS_PROCESSES_H

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

enum {
    PROCESS_COMMS = 16,
    PROCESS_ROOM = 8 << 20,
    PROCESS_SLOTS = 8,
    PROCESS_MESSAGE = 128 << 10,
    PROCESS_SECONDS = 300
};

/* Allocates memory that processes forked later share. It is zeroed. */
static inline void *shared_by_processes(size_t size) {
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail_msg("shared memory cannot be allocated");
    return memory;
}

/* The data that one rank gives to the others. n_begun and n_read are atomic. */
typedef struct process_seat {
    int n_begun, n_read; /* exchanges the rank has begun; exchanges in which it has read all other ranks' data */
    unsigned flags;
    llm_exchange call;
    unsigned char bytes[PROCESS_ROOM]; /* its rows without gaps */
} process_seat;

/* The messages from one rank to another. n_sent and n_taken are atomic. */
typedef struct process_link {
    int n_sent, n_taken;
    size_t n[PROCESS_SLOTS];
    unsigned char bytes[PROCESS_SLOTS][PROCESS_MESSAGE];
} process_link;

typedef struct process_hub {
    int broken; /* atomic: 1 while `why` is written, then 2 */
    char why[400];
    process_seat seats[4];
    process_link links[4][4]; /* [from][to] */
} process_hub;

/* Duplicates use the next hub. All ranks duplicate in the same order. */
typedef struct process_comm {
    llm_comm comm;
    process_hub *hubs;
    int hub, *n_hubs; /* n_hubs: number of hubs this process has used */
} process_comm;

static inline process_hub *hub_of(llm_comm *comm) {
    process_comm *p = (process_comm *)comm->user;
    return &p->hubs[p->hub];
}

static inline void process_abort(llm_comm *comm, const char *why) {
    process_hub *hub = hub_of(comm);
    int whole = 0;
    if (!__atomic_compare_exchange_n(&hub->broken, &whole, 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return;
    snprintf(hub->why, sizeof hub->why, "%s", why);
    __atomic_store_n(&hub->broken, 2, __ATOMIC_SEQ_CST);
}

static inline llm_status process_fail(llm_comm *comm, llm_error *err) {
    while (__atomic_load_n(&hub_of(comm)->broken, __ATOMIC_SEQ_CST) != 2) sched_yield();
    if (err) snprintf(err->message, sizeof err->message, "%s", hub_of(comm)->why);
    if (err) err->code = LLM_ERROR_DEVICE;
    return LLM_ERROR_DEVICE;
}

/* Waits until a counter of another rank reaches n. */
static inline bool process_await(llm_comm *comm, int other, const int *counter, int n) {
    double start = seconds_now();
    while (__atomic_load_n(counter, __ATOMIC_ACQUIRE) < n) {
        char why[100];
        if (__atomic_load_n(&hub_of(comm)->broken, __ATOMIC_SEQ_CST)) return false;
        sched_yield();
        if (seconds_now() - start < comm->patience) continue;
        snprintf(why, sizeof why, "rank %d did not answer rank %d in time", other, comm->rank);
        process_abort(comm, why);
        return false;
    }
    return true;
}

/* The bytes [*from, returned end) of a row that a rank holds, see llm_exchange. */
static inline size_t process_part(const llm_exchange *x, int rank, int size, size_t row, size_t *from) {
    size_t n = (size_t)x->n_units, begin = n * (size_t)rank / (size_t)size, end = n * ((size_t)rank + 1) / (size_t)size;
    *from = 0;
    if (x->tokens) {
        size_t unit = (size_t)(x->tokens[row] / x->tokens_per_unit);
        return begin <= unit && unit < end ? x->row_bytes : 0;
    }
    *from = begin * x->unit_bytes < x->row_bytes ? begin * x->unit_bytes : x->row_bytes;
    return end * x->unit_bytes < x->row_bytes ? end * x->unit_bytes : x->row_bytes;
}

/* Copies a rank's part of all rows to or from its seat. */
static inline void process_copy(llm_comm *comm, int rank, const llm_exchange *x, bool gives) {
    unsigned char *bytes = hub_of(comm)->seats[rank].bytes;
    for (size_t row = 0, from; row < x->n_rows; row++) {
        size_t end = process_part(x, rank, comm->size, row, &from);
        unsigned char *data = (unsigned char *)x->data + row * x->stride + from, *there = bytes + row * x->row_bytes;
        if (end <= from) continue;
        RANK_CHECK((row + 1) * x->row_bytes <= PROCESS_ROOM, "the exchange is too large");
        if (gives) memcpy(there, data, end - from);
        else memcpy(data, there, end - from);
    }
}

static inline llm_status process_exchange(llm_comm *comm, const llm_exchange *x, unsigned *flags, llm_error *err) {
    process_seat *seats = hub_of(comm)->seats, *own = &seats[comm->rank];
    int n = own->n_begun + 1;
    if (__atomic_load_n(&hub_of(comm)->broken, __ATOMIC_SEQ_CST)) return process_fail(comm, err);
    process_copy(comm, comm->rank, x, true);
    own->flags = *flags;
    own->call = *x;
    __atomic_store_n(&own->n_begun, n, __ATOMIC_RELEASE);
    for (int i = 0; i < comm->size; i++) {
        if (!process_await(comm, i, &seats[i].n_begun, n)) return process_fail(comm, err);
        const llm_exchange *y = &seats[i].call;
        if (y->n_rows != x->n_rows || y->row_bytes != x->row_bytes || y->unit_bytes != x->unit_bytes)
            process_abort(comm, "a rank makes a different call");
        else if (i != comm->rank) process_copy(comm, i, x, false);
        *flags |= seats[i].flags;
    }
    __atomic_store_n(&own->n_read, n, __ATOMIC_RELEASE);
    for (int i = 0; i < comm->size; i++)
        if (!process_await(comm, i, &seats[i].n_read, n)) return process_fail(comm, err);
    return LLM_OK;
}

static inline void process_close(llm_comm *comm) { free(comm->user); }
static inline llm_status process_duplicate(llm_comm *comm, llm_comm **out, llm_error *err);

/* A message is copied when it is sent, as MPI does with short messages. So nothing remains to be drained, even if the
   other rank has not received it. */
static inline llm_status process_send(llm_comm *comm, int to, const void *data, size_t n, llm_error *err) {
    process_link *link = &hub_of(comm)->links[comm->rank][to];
    int i = link->n_sent % PROCESS_SLOTS;
    RANK_CHECK(n <= PROCESS_MESSAGE, "the message is too large");
    if (__atomic_load_n(&hub_of(comm)->broken, __ATOMIC_SEQ_CST)) return process_fail(comm, err);
    if (!process_await(comm, to, &link->n_taken, link->n_sent + 1 - PROCESS_SLOTS)) return process_fail(comm, err);
    memcpy(link->bytes[i], data, n);
    link->n[i] = n;
    __atomic_store_n(&link->n_sent, link->n_sent + 1, __ATOMIC_RELEASE);
    return LLM_OK;
}

static inline llm_status process_drain(llm_comm *comm, int to, int most, llm_error *err) {
    (void)to;
    (void)most;
    return __atomic_load_n(&hub_of(comm)->broken, __ATOMIC_SEQ_CST) ? process_fail(comm, err) : LLM_OK;
}

static inline llm_status process_receive(llm_comm *comm, int from, void *data, size_t n, llm_error *err) {
    process_link *link = &hub_of(comm)->links[from][comm->rank];
    int i = link->n_taken % PROCESS_SLOTS;
    if (__atomic_load_n(&hub_of(comm)->broken, __ATOMIC_SEQ_CST)) return process_fail(comm, err);
    if (!process_await(comm, from, &link->n_sent, link->n_taken + 1)) return process_fail(comm, err);
    RANK_CHECK(link->n[i] == n, "a message has the wrong size");
    memcpy(data, link->bytes[i], n);
    __atomic_store_n(&link->n_taken, link->n_taken + 1, __ATOMIC_RELEASE);
    return LLM_OK;
}

static inline llm_comm *make_process_comm(process_hub *hubs, int *n_hubs, int rank, int size, double patience) {
    process_comm *p = (process_comm *)calloc(1, sizeof *p);
    RANK_CHECK(p && *n_hubs < PROCESS_COMMS, "no more comms");
    p->hubs = hubs;
    p->hub = (*n_hubs)++;
    p->n_hubs = n_hubs;
    p->comm.rank = rank;
    p->comm.size = size;
    p->comm.patience = patience;
    p->comm.user = p;
    p->comm.exchange = process_exchange;
    p->comm.send = process_send;
    p->comm.drain = process_drain;
    p->comm.receive = process_receive;
    p->comm.duplicate = process_duplicate;
    p->comm.abort = process_abort;
    p->comm.close = process_close;
    return &p->comm;
}

static inline llm_status process_duplicate(llm_comm *comm, llm_comm **out, llm_error *err) {
    process_comm *p = (process_comm *)comm->user;
    (void)err;
    *out = make_process_comm(p->hubs, p->n_hubs, comm->rank, comm->size, comm->patience);
    return LLM_OK;
}

/* Calls run(comm, arg) in n processes at the same time. To return results, `arg` must be memory from
   shared_by_processes. statuses[i] is set to the wait status of rank i; if statuses is NULL, the test fails unless all
   ranks exit with 0. Ranks that take too long are killed. */
static inline void on_processes(int n, double patience, void (*run)(llm_comm *comm, void *arg), void *arg,
                                int *statuses) {
    process_hub *hubs = (process_hub *)shared_by_processes(PROCESS_COMMS * sizeof *hubs);
    pid_t pids[4];
    fflush(NULL);
    for (int i = 0; i < n; i++) {
        pids[i] = fork();
        if (pids[i]) continue;
        int n_hubs = 0;
        alarm(PROCESS_SECONDS);
        llm_comm *comm = make_process_comm(hubs, &n_hubs, i, n, patience);
        run(comm, arg);
        llm_comm_free(comm);
        fflush(NULL);
        _exit(0);
    }
    for (int i = 0; i < n; i++) {
        int status = -1;
        if (pids[i] < 0 || waitpid(pids[i], &status, 0) != pids[i])
            fail_msg("rank %d cannot be started or waited for", i);
        if (statuses) statuses[i] = status;
        else if (status) fail_msg("rank %d ended with status %d", i, status);
    }
    munmap(hubs, PROCESS_COMMS * sizeof *hubs);
}

#endif
