/*  nccl.cpp - a libnccl.so.2 for tests, whose ranks exchange data through memory shared by processes.

    It implements the part of NCCL that llm_cuda.cu uses. Its work runs on the streams of cuda_runtime.h; the program
    must export that header's functions (-rdynamic). It behaves like NCCL: a non-blocking communicator finishes a call
    only after it has been polled several times, ranks that make different calls wait forever, and an abort ends the
    wait. Wrong uses that would crash or hang NCCL end the program with a message. Tests find `nccl_host` by name. */
#include <atomic>
#include <chrono>
#include <fcntl.h>
#include <memory>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "nccl_host.h"

extern "C" {
nccl_host_settings nccl_host;
int cuda_host_queue_work(void *stream, void (*work)(void *arg), void *arg, void (*forget)(void *arg));
bool cuda_host_is_recording();
void cuda_host_yield();
}

namespace {

enum { DONE = 0, CUDA_ERROR = 1, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, IN_PROGRESS = 7 };
enum { BYTES = 1, WORDS = 3, SUM = 0, MOST_RANKS = 8, ROOM = 4 << 20, POLLS = 3 };

/* The data that one rank gives to the others. Counters are atomic. */
struct seat {
    int n_begun, n_read; /* operations the rank has begun; operations in which it has read all other ranks' data */
    int gathers;
    size_t size;
    uint8_t bytes[ROOM];
};

struct hub {
    int n_joined, n_finalized;
    seat seats[MOST_RANKS];
};

[[noreturn]] void fault(const char *what) {
    fprintf(stderr, "nccl: %s\n", what);
    abort();
}

int load(const int *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }

struct communicator {
    hub *shared = nullptr;
    int rank = 0, size = 0, n_done = 0;
    std::atomic<bool> aborted{false};
    std::atomic<int> n_recorded{0}; /* operations in graphs */
    ~communicator() { munmap(shared, sizeof *shared); }
};

struct operation {
    std::shared_ptr<communicator> comm;
    bool gathers, recorded;
    const void *from;
    void *to;
    size_t size; /* bytes that each rank gives */
    void *stream;
};

/* Waits until a counter of all other ranks reaches n. Returns false if the communicator is aborted. */
bool await(communicator &c, int seat::*counter, int n) {
    for (int i = 0; i < c.size; i++)
        while (load(&(c.shared->seats[i].*counter)) < n && i != c.rank) {
            if (c.aborted) return false;
            cuda_host_yield();
        }
    return true;
}

void run(void *arg) {
    const operation &o = *(const operation *)arg;
    communicator &c = *o.comm;
    seat *seats = c.shared->seats, &own = seats[c.rank];
    int n = c.n_done + 1;
    if (c.aborted || !await(c, &seat::n_read, n - 1)) return;
    c.n_done = n;
    memcpy(own.bytes, o.from, o.size);
    own.gathers = o.gathers;
    own.size = o.size;
    __atomic_store_n(&own.n_begun, n, __ATOMIC_RELEASE);
    if (!await(c, &seat::n_begun, n)) return;
    for (int i = 0; i < c.size; i++)
        while ((seats[i].gathers != own.gathers || seats[i].size != own.size) && !c.aborted) cuda_host_yield();
    if (c.aborted) return;
    for (int i = 0; i < c.size; i++) {
        uint32_t *sums = (uint32_t *)o.to;
        const uint32_t *words = (const uint32_t *)(const void *)seats[i].bytes;
        if (o.gathers) memcpy((uint8_t *)o.to + (size_t)i * o.size, seats[i].bytes, o.size);
        for (size_t j = 0; j < o.size / 4 && !o.gathers; j++) sums[j] = (i ? sums[j] : 0) + words[j];
    }
    __atomic_store_n(&own.n_read, n, __ATOMIC_RELEASE);
    __atomic_add_fetch(o.gathers ? &nccl_host.n_gathered : &nccl_host.n_reduced, 1, __ATOMIC_RELAXED);
}

void forget(void *arg) {
    operation *o = (operation *)arg;
    if (o->recorded) o->comm->n_recorded--;
    delete o;
}

enum task { NOTHING, STARTING, QUEUEING, FINALIZING };

thread_local int depth = 0;
thread_local std::vector<operation> grouped;

} // namespace

struct ncclComm {
    std::shared_ptr<communicator> state;
    task now = NOTHING; /* the call in progress */
    int polls = 0;      /* polls left until it is done */
    std::vector<operation> operations;
};

namespace {

thread_local ncclComm *grouped_for = nullptr;

int begin(ncclComm *c, task what) {
    if (c->now != NOTHING) fault("a call begins while another one is in progress");
    c->now = what;
    c->polls = POLLS;
    return IN_PROGRESS;
}

int queue(ncclComm *c) {
    int result = DONE;
    for (operation &o : c->operations) {
        o.recorded = cuda_host_is_recording();
        if (o.recorded) c->state->n_recorded++;
        if (cuda_host_queue_work(o.stream, run, new operation(o), forget)) result = CUDA_ERROR;
    }
    c->operations.clear();
    if (nccl_host.on_queued) nccl_host.on_queued();
    nccl_host.on_queued = nullptr;
    return result;
}

int collect(ncclComm *c, const void *from, void *to, size_t size, bool gathers, void *stream) {
    if (size > ROOM || size == 0) return INVALID_ARGUMENT;
    ncclGroupStart();
    if (grouped_for && grouped_for != c) fault("a group with two communicators");
    grouped_for = c;
    grouped.push_back(operation{c->state, gathers, false, from, to, size, stream});
    return ncclGroupEnd();
}

void release(ncclComm *c) {
    __atomic_sub_fetch(&nccl_host.n_live, 1, __ATOMIC_RELAXED);
    delete c;
}

} // namespace

int ncclGetVersion(int *version) {
    *version = nccl_host.version;
    return DONE;
}

const char *ncclGetErrorString(int result) { return result == SYSTEM_ERROR ? "a system error" : "a failure"; }

/* The id is the path of a memory file of this process. */
int ncclGetUniqueId(ncclUniqueId *id) {
    int file = memfd_create("nccl", MFD_CLOEXEC);
    if (nccl_host.refuses_start || file < 0 || ftruncate(file, sizeof(hub))) return SYSTEM_ERROR;
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/proc/%d/fd/%d", (int)getpid(), file);
    return DONE;
}

int ncclCommInitRankConfig(ncclComm **out, int size, ncclUniqueId id, int rank, ncclConfig *config) {
    if (config->size != sizeof *config || config->magic != 0xCAFEBEEF || config->version < 21400 || config->blocking)
        fault("the configuration is invalid");
    if (size < 1 || size > MOST_RANKS || rank < 0 || rank >= size) return INVALID_ARGUMENT;
    *out = nullptr;
    if (nccl_host.refuses_start) return SYSTEM_ERROR;
    int file = open(id.internal, O_RDWR | O_CLOEXEC);
    void *memory = mmap(NULL, sizeof(hub), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
    if (file >= 0) close(file);
    if (memory == MAP_FAILED) return SYSTEM_ERROR;
    ncclComm *c = new ncclComm;
    c->state = std::make_shared<communicator>();
    c->state->shared = (hub *)memory;
    c->state->rank = rank;
    c->state->size = size;
    __atomic_add_fetch(&c->state->shared->n_joined, 1, __ATOMIC_ACQ_REL);
    __atomic_add_fetch(&nccl_host.n_live, 1, __ATOMIC_RELAXED);
    *out = c;
    return begin(c, STARTING);
}

int ncclCommGetAsyncError(ncclComm *c, int *result) {
    const hub *shared = c->state->shared;
    *result = DONE;
    if (nccl_host.fail_at && nccl_host.n_reduced + nccl_host.n_gathered >= nccl_host.fail_at) {
        *result = SYSTEM_ERROR;
        return DONE;
    }
    if (c->now == NOTHING) {
        if (nccl_host.n_busy > 0) nccl_host.n_busy--, *result = IN_PROGRESS;
        return DONE;
    }
    bool waits = (c->now == STARTING && load(&shared->n_joined) < c->state->size) ||
                 (c->now == FINALIZING && load(&shared->n_finalized) < c->state->size);
    *result = IN_PROGRESS;
    if (waits || --c->polls > 0) return DONE;
    *result = c->now == QUEUEING ? queue(c) : DONE;
    c->now = NOTHING;
    return DONE;
}

int ncclGroupStart() {
    depth++;
    return DONE;
}

int ncclGroupEnd() {
    if (depth == 0) fault("a group ends that did not begin");
    if (--depth || grouped.empty()) return DONE;
    ncclComm *c = grouped_for;
    grouped_for = nullptr;
    c->operations.swap(grouped);
    return begin(c, QUEUEING);
}

int ncclAllReduce(const void *from, void *to, size_t n, int type, int operation, ncclComm *comm, void *stream) {
    if (type != WORDS || operation != SUM) return INVALID_ARGUMENT;
    return collect(comm, from, to, n * 4, false, stream);
}

int ncclAllGather(const void *from, void *to, size_t n, int type, ncclComm *comm, void *stream) {
    if (type != BYTES || from != (uint8_t *)to + n * (size_t)comm->state->rank) return INVALID_ARGUMENT;
    return collect(comm, from, to, n, true, stream);
}

int ncclCommFinalize(ncclComm *c) {
    int result = begin(c, FINALIZING);
    __atomic_add_fetch(&c->state->shared->n_finalized, 1, __ATOMIC_ACQ_REL);
    return result;
}

int ncclCommDestroy(ncclComm *c) {
    if (c->now != NOTHING) fault("a communicator is destroyed in the middle of a call");
    if (c->state->n_recorded) fault("a communicator is destroyed before its graphs");
    release(c);
    return DONE;
}

int ncclCommAbort(ncclComm *c) {
    auto start = std::chrono::steady_clock::now();
    c->state->aborted = true;
    while (c->state->n_recorded) {
        if (std::chrono::steady_clock::now() - start > std::chrono::seconds(5))
            fault("a communicator is aborted before its graphs are destroyed, so the abort waits forever");
        std::this_thread::yield();
    }
    release(c);
    return DONE;
}
