/*  cuda_runtime.h - enough of CUDA for a C++ compiler to build llm_cuda.cu and run its kernels on the CPU.

    It replaces the toolkit's header of that name. Memory "on the GPU" is host memory, filled with NaN when it is
    allocated. Each device has its own memory. Another device needs access to it first, and another process must open it
    first. Streams are queues of closures that run when somebody waits for them, so a host that reuses a buffer too
    early is caught. A query of a stream or of its event starts a thread that runs the queue; so does the recording of
    an event that other processes can open. Graphs are recorded queues.

    A kernel's blocks run one after the other. The threads of a block are fibers of the calling thread, which switch
    only at barriers and warp operations. There a fiber waits until all other threads of the barrier have arrived. If no
    fiber can continue, the program ends with a message. Tests can make the n-th call fail, run the threads of a block
    in reverse order, and count what was not freed. */
#ifndef CUDA_HOST_RUNTIME_H
#define CUDA_HOST_RUNTIME_H

#include <atomic>
#include <boost/context/detail/fcontext.hpp>
#include <chrono>
#include <fcntl.h>
#include <functional>
#include <map>
#include <math.h>
#include <memory>
#include <mutex>
#include <set>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_HOST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_HOST_ASAN 1
#endif
#endif
#ifdef CUDA_HOST_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

/* For functions that the sanitizers skip: they switch fibers, or are called very often. */
#define CUDA_HOST_SWITCH __attribute__((no_sanitize("address", "undefined", "thread"))) inline

#define __host__
#define __device__
#define __global__
#define __shared__ static thread_local
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

/* Vectors may only be copied from and to addresses that are multiples of their size. */
static inline void cuda_host_check_alignment(const void *at, size_t size);

struct alignas(8) uint2 {
    uint32_t x, y;
    uint2() = default;
    uint2(const uint2 &from) : x(from.x), y(from.y) { cuda_host_check_alignment(&from, 8); }
    uint2 &operator=(const uint2 &from) {
        cuda_host_check_alignment(this, 8);
        cuda_host_check_alignment(&from, 8);
        x = from.x, y = from.y;
        return *this;
    }
};

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
    uint4() = default;
    uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) : x(x), y(y), z(z), w(w) {}
    uint4(const uint4 &from) : x(from.x), y(from.y), z(from.z), w(from.w) { cuda_host_check_alignment(&from, 16); }
    uint4 &operator=(const uint4 &from) {
        cuda_host_check_alignment(this, 16);
        cuda_host_check_alignment(&from, 16);
        x = from.x, y = from.y, z = from.z, w = from.w;
        return *this;
    }
};

struct alignas(8) float2 {
    float x, y;
};

static inline float2 make_float2(float x, float y) { return float2{x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return uint4(x, y, z, w); }

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

/* ---- Settings and counters for tests ---- */

struct cuda_host_settings {
    int fail_at = 0;      /* n: the n-th call from now on fails; 0: none does             */
    bool reverse = false; /* true: the threads of a block run in reverse order            */
    size_t n_bytes = 0;   /* bytes not yet freed, on the GPUs and pinned                  */
    int n_live = 0;       /* allocations, streams, events and graphs not yet freed        */
    int n_devices = 1, major = 9, ptx_version = 90, shared_bytes = 228 << 10;
    int n_launches = 0, n_graph_launches = 0; /* kernels launched outside graphs; graphs launched   */
    int n_overlapping = 0;                    /* launches that may begin before the previous kernel ends      */
    bool keeps_faults = false;                /* true: faults of kernels go to `faults`; false: they abort    */
    std::set<std::string> faults;
    bool has_peers = true;         /* devices can be given access to each other's memory              */
    int lost_device = -1;          /* this device's streams stop; waiting for them is an error        */
    int refusing_device = -1;      /* this device fails to launch kernels and graphs                  */
    bool can_record = true;        /* false: streams cannot be captured                               */
    bool failed_recording = false; /* the call that `fail_at` made fail was recording a graph         */
    bool has_ipc = false;          /* GPU memory allocated from now on has handles for other processes */
    int first_bus = 0;             /* the GPU of the machine that is this process's device 0           */
    int n_refused_handles = 0;     /* counts down: while it is positive, opening a handle fails          */
};

inline cuda_host_settings cuda_host;
inline thread_local bool cuda_host_records = false; /* this thread is recording, so some calls are forbidden */
inline thread_local int cuda_host_device = 0;       /* this thread's current device                          */

/* One thread at a time uses the GPUs. A kernel that waits for another device releases the lock for a while. */
struct cuda_host_mutex {
    std::recursive_mutex mutex;
    static inline thread_local int depth = 0; /* how many times this thread has locked it */
    CUDA_HOST_SWITCH void lock() {
        mutex.lock();
        depth++;
    }
    CUDA_HOST_SWITCH void unlock() {
        depth--;
        mutex.unlock();
    }
    CUDA_HOST_SWITCH void yield() {
        int n = depth;
        for (int i = 0; i < n; i++) unlock();
        std::this_thread::yield();
        for (int i = 0; i < n; i++) lock();
    }
};

inline cuda_host_mutex cuda_host_lock;

/* ---- Threads of a block ---- */

namespace cuda_host_fibers {

using boost::context::detail::fcontext_t;
using boost::context::detail::transfer_t;

/* STAGGER: stacks end at different offsets in a page. Otherwise they would all compete for the same few cache lines. */
enum { MOST_THREADS = 1024, STACK = 192 << 10, STAGGER = 192, LANE = 48 };

struct meeting { /* where threads wait for each other */
    int n_here = 0, round = 0;
};

/* A copy to shared memory that a thread has started. to == nullptr marks the end of a group of copies. */
struct copy {
    void *to;
    const void *from;
    int bytes, all; /* of `all` bytes, the first `bytes` are copied and the rest zeroed */
};

struct fiber {
    std::unique_ptr<uint8_t[]> memory;
    const void *stack = nullptr;
    size_t stack_size = 0;
    fcontext_t context = nullptr; /* where it continues */
    void *fake_stack = nullptr;
    const meeting *awaited = nullptr; /* the fiber waits until this meeting is past `round` */
    int round = 0;
    int n_syncs = 0;     /* number of __syncwarp calls passed                    */
    bool waited = false; /* the fiber has waited for the kernels before this one */
    bool done = true;
    std::vector<copy> copies; /* copies it has not waited for yet */
};

struct block {
    fiber scheduler, fibers[MOST_THREADS];
    meeting all, warps[MOST_THREADS / 32];
    alignas(16) uint8_t lanes[2][MOST_THREADS / 32][32 * LANE]; /* data of warp operations, double-buffered */
    int parity[MOST_THREADS];
    const std::function<void()> *body = nullptr;
    int n = 0, n_done = 0, current = 0;
    bool closing = false; /* fibers end instead of waiting for the next block */

    ~block();
};

CUDA_HOST_SWITCH block &here() {
    static thread_local std::unique_ptr<block> b;
    if (!b) b.reset(new block);
    return *b;
}

/* Runs on a fiber after a switch to it. Saves the context of the fiber that was left. */
CUDA_HOST_SWITCH void arrive(transfer_t from, void *fake_stack) {
    fiber &left = *(fiber *)from.data;
    left.context = from.fctx;
#ifdef CUDA_HOST_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, &left.stack, &left.stack_size);
#else
    (void)fake_stack;
#endif
}

/* Switches from `self`, the running fiber, to `next`. Returns when something switches back to `self`. */
CUDA_HOST_SWITCH void go(fiber &self, const fiber &next) {
#ifdef CUDA_HOST_ASAN
    __sanitizer_start_switch_fiber(&self.fake_stack, next.stack, next.stack_size);
#endif
    arrive(boost::context::detail::jump_fcontext(next.context, &self), self.fake_stack);
}

/* Switches to `next` for good: `self` ends. */
[[noreturn]] CUDA_HOST_SWITCH void leave(fiber &self, const fiber &next) {
#ifdef CUDA_HOST_ASAN
    __sanitizer_start_switch_fiber(nullptr, next.stack, next.stack_size);
#endif
    boost::context::detail::jump_fcontext(next.context, &self);
    abort(); /* not reached: nothing switches back to `self` */
}

/* Switches to the first thread of the warp that can run, starting at this lane; if none can, to the scheduler. */
CUDA_HOST_SWITCH void go_on(block &b, fiber &self, int warp, int lane) {
    int first = warp * 32, lanes = b.n - first < 32 ? b.n - first : 32, step = cuda_host.reverse ? lanes - 1 : 1;
    for (int j = 0; j < lanes; j++, lane = (lane + step) % lanes) {
        const fiber &f = b.fibers[first + lane];
        if (f.done || (f.awaited && f.awaited->round == f.round)) continue;
        int i = b.current = first + lane;
        threadIdx = dim3((unsigned)i % blockDim.x, (unsigned)i / blockDim.x % blockDim.y,
                         (unsigned)i / blockDim.x / blockDim.y);
        go(self, f);
        return;
    }
    if (&self != &b.scheduler) go(self, b.scheduler);
}

/* Lets other fibers run. Returns when something switches back. */
CUDA_HOST_SWITCH void wait(block &b) {
    int i = b.current, lanes = b.n - i / 32 * 32 < 32 ? b.n - i / 32 * 32 : 32;
    go_on(b, b.fibers[i], i / 32, (i % 32 + (cuda_host.reverse ? lanes - 1 : 1)) % lanes);
}

/* A fiber is reused from block to block. */
inline void fiber_main(transfer_t from) {
    arrive(from, nullptr);
    block &b = here();
    for (;;) {
        (*b.body)();
        for (const copy &c : b.fibers[b.current].copies)
            if (c.to) {
                fprintf(stderr, "cuda_host: a thread ends without waiting for its copies\n");
                abort();
            }
        b.fibers[b.current].copies.clear();
        b.fibers[b.current].done = true;
        b.n_done++;
        wait(b);
        if (b.closing) leave(b.fibers[b.current], b.scheduler);
    }
}

/* Ends all fibers. The address sanitizer keeps memory for each fiber until the fiber ends, so without this a few
   hundred threads that launch kernels and end would use up all memory. */
inline block::~block() {
    closing = true;
    for (int i = 0; i < MOST_THREADS; i++)
        if (fibers[i].memory) current = i, go(scheduler, fibers[i]);
}

/* Waits until n threads have arrived. */
CUDA_HOST_SWITCH void meet(block &b, meeting &m, int n) {
    fiber &f = b.fibers[b.current];
    if (++m.n_here == n) {
        m.n_here = 0;
        m.round++;
        return;
    }
    f.awaited = &m;
    f.round = m.round;
    wait(b);
    f.awaited = nullptr;
}

inline void begin(fiber &f, int i) {
    if (!f.memory) {
        f.memory.reset(new uint8_t[STACK]);
        f.stack = f.memory.get();
        f.stack_size = STACK - (size_t)i * STAGGER % 4096;
        f.context = boost::context::detail::make_fcontext(f.memory.get() + f.stack_size, f.stack_size, fiber_main);
    }
    f.n_syncs = 0;
    f.waited = false;
    f.done = false;
}

/* Runs a block of n threads, warp by warp, since the stacks of one warp fit into the L1 cache. */
inline void run_block(const std::function<void()> &body, int n) {
    block &b = here();
    b.body = &body;
    b.n = n;
    b.n_done = 0;
    b.all = meeting();
    for (meeting &m : b.warps) m = meeting();
    for (int i = 0; i < n; i++) begin(b.fibers[i], i), b.parity[i] = 0;
    while (b.n_done < n) {
        b.current = -1;
        for (int j = 0, warps = (n + 31) / 32; j < warps; j++)
            go_on(b, b.scheduler, cuda_host.reverse ? warps - 1 - j : j, 0);
        if (b.current >= 0) continue;
        fprintf(stderr, "cuda_host: the threads of a block wait for each other for ever\n");
        abort();
    }
    b.current = -1; /* no thread of a block runs: what follows is host code */
}

/* Exchanges one value per lane. All lanes of the warp must take part. Returns the values, valid until the next exchange
   of this warp. */
template <typename T> CUDA_HOST_SWITCH const T *warp_values(const T &value) {
    block &b = here();
    int i = b.current, warp = i / 32, parity = b.parity[i] ^= 1, lanes = b.n - warp * 32 < 32 ? b.n - warp * 32 : 32;
    static_assert(sizeof(T) <= LANE, "a value must fit into LANE bytes");
    T *values = (T *)(void *)b.lanes[parity][warp];
    values[i % 32] = value;
    meet(b, b.warps[warp], lanes);
    return values;
}

template <typename T> CUDA_HOST_SWITCH T exchange(T value, int source) { return warp_values(value)[source % 32]; }

} // namespace cuda_host_fibers

static inline void __syncthreads() {
    cuda_host_fibers::block &b = cuda_host_fibers::here();
    cuda_host_fibers::meet(b, b.all, b.n);
}

static inline void __syncwarp() {
    cuda_host_fibers::exchange(0, 0);
    cuda_host_fibers::here().fibers[cuda_host_fibers::here().current].n_syncs++;
}

template <typename T> static CUDA_HOST_SWITCH T __shfl_sync(unsigned, T value, int lane) {
    return cuda_host_fibers::exchange(value, lane);
}

template <typename T> static CUDA_HOST_SWITCH T __shfl_xor_sync(unsigned, T value, int mask) {
    return cuda_host_fibers::exchange(value, cuda_host_fibers::here().current % 32 ^ mask);
}

template <typename T> static CUDA_HOST_SWITCH T __shfl_up_sync(unsigned, T value, int step) {
    int lane = cuda_host_fibers::here().current % 32;
    return cuda_host_fibers::exchange(value, lane < step ? lane : lane - step);
}

/* Not in CUDA: for the C versions of operations that a whole warp executes together. */
template <typename T> static CUDA_HOST_SWITCH const T *cuda_host_warp(const T &value) {
    return cuda_host_fibers::warp_values(value);
}

/* The running kernel. Kernels are numbered. Until this one waits, the output of kernels from `first_ahead` on may be
   missing. */
struct cuda_host_kernel {
    unsigned number = 0, first_ahead = 0;
    bool overlaps = false, runs = false;
    int n_waits = 0; /* threads that have waited */
};

inline thread_local cuda_host_kernel cuda_host_current; /* this thread's kernel       */
inline unsigned cuda_host_n_kernels = 0;                /* protected by cuda_host_lock */

/* A fault of a kernel ends the program, or is recorded for a test that causes it on purpose. */
CUDA_HOST_SWITCH void cuda_host_fault(const char *what) {
    if (cuda_host.keeps_faults) {
        cuda_host.faults.insert(what);
        return;
    }
    fprintf(stderr, "cuda_host: %s (thread %u, block %u)\n", what, threadIdx.x, blockIdx.x);
    abort();
}

static inline void cuda_host_check_alignment(const void *at, size_t size) {
    uintptr_t address = (uintptr_t)at;
    __asm__("" : "+r"(address)); /* else the compiler assumes the type's alignment and drops the check */
    if (address % size) cuda_host_fault("an access is not aligned");
}

/* Memory on a GPU, or pinned host memory, which all devices may use. With CUDA_HOST_WATCH, writers[i] is the number of
   the last kernel that wrote bytes 2 i and 2 i + 1. */
enum { CUDA_HOST_PINNED = -1 };

struct cuda_host_memory {
    uintptr_t begin = 0;
    size_t size = 0;
    int device = CUDA_HOST_PINNED;
    unsigned *writers = nullptr;
    int file = -1;       /* the file that holds memory with a handle, or opened memory; -1: none */
    bool opened = false; /* the memory belongs to another process                                */
};

inline std::map<uintptr_t, cuda_host_memory> cuda_host_memories; /* by address; protected by cuda_host_lock */
inline cuda_host_memory cuda_host_last_memory;                   /* result of the last lookup               */

CUDA_HOST_SWITCH const cuda_host_memory *cuda_host_find_memory(uintptr_t at) {
    cuda_host_memory &last = cuda_host_last_memory;
    if (at - last.begin < last.size) return &last;
    auto found = cuda_host_memories.upper_bound(at);
    if (found == cuda_host_memories.begin()) return nullptr;
    --found;
    if (at - found->first >= found->second.size) return nullptr;
    last = found->second;
    return &last;
}

static inline void cuda_host_add_memory(void *begin, size_t size, int device, int file = -1, bool opened = false) {
    std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
    cuda_host_memory memory;
    memory.device = device;
    memory.file = file;
    memory.opened = opened;
    memory.begin = (uintptr_t)begin;
    memory.size = size;
#ifdef CUDA_HOST_WATCH
    memory.writers = (unsigned *)calloc((size + 1) / 2, sizeof(unsigned));
#endif
    cuda_host_memories[memory.begin] = memory;
    cuda_host.n_bytes += size;
}

static inline cuda_host_memory cuda_host_remove_memory(void *begin) {
    std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
    auto found = cuda_host_memories.find((uintptr_t)begin);
    if (found == cuda_host_memories.end()) return cuda_host_memory();
    cuda_host_memory removed = found->second;
    free(removed.writers);
    cuda_host.n_bytes -= removed.size;
    cuda_host_memories.erase(found);
    cuda_host_last_memory = cuda_host_memory();
    return removed;
}

inline std::set<std::pair<int, int>> cuda_host_peers; /* (a, b): device a may use memory of device b */

CUDA_HOST_SWITCH bool cuda_host_reaches(const cuda_host_memory &memory) {
    return memory.device == CUDA_HOST_PINNED || memory.device == cuda_host_device ||
           cuda_host_peers.count(std::make_pair(cuda_host_device, memory.device)) > 0;
}

/* True if this thread's device may use this memory. Unregistered memory is host memory. */
static inline bool cuda_host_may_use(const void *at) {
    std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
    const cuda_host_memory *memory = cuda_host_find_memory((uintptr_t)at);
    return !memory || cuda_host_reaches(*memory);
}

/* Not in CUDA: a kernel waits for the kernels before it. */
CUDA_HOST_SWITCH void cuda_host_wait() {
    cuda_host_fibers::here().fibers[cuda_host_fibers::here().current].waited = true;
    cuda_host_current.n_waits++;
}

/* Not in CUDA: checks a prefetch. */
static inline void cuda_host_prefetch(const void *from, size_t size) {
    uintptr_t at = (uintptr_t)from;
    const cuda_host_memory *memory = cuda_host_find_memory(at);
    if (at % 16 || size % 16 || size == 0) cuda_host_fault("a prefetch is not aligned to 16 bytes");
    if (!memory || at - memory->begin + size > memory->size) cuda_host_fault("a prefetch reaches beyond its memory");
}

#ifdef CUDA_HOST_WATCH
#include "cuda_watch.h"
#else
static inline void cuda_host_watch_block() {}
static inline void cuda_host_watch_atomic(unsigned *) {}
static inline void cuda_host_watch_access(const void *, size_t, bool) {}
#endif

/* Not in CUDA: starts an asynchronous copy to shared memory. To catch wrong uses, the old data are destroyed at once
   and the new data appear as late as possible: when the thread waits for the copy. */
static inline void cuda_host_copy(void *to, const void *from, int bytes, int all) {
    cuda_host_check_alignment(to, (size_t)all);
    cuda_host_check_alignment(from, (size_t)all);
    cuda_host_fibers::here().fibers[cuda_host_fibers::here().current].copies.push_back({to, from, bytes, all});
    cuda_host_watch_access(from, (size_t)bytes, false);
    cuda_host_watch_access(to, (size_t)all, true);
    memset(to, 0xFF, (size_t)all);
}

static inline void cuda_host_group_copies() {
    cuda_host_fibers::here().fibers[cuda_host_fibers::here().current].copies.push_back({nullptr, nullptr, 0, 0});
}

/* Waits for all copies (n_groups = 0), or for those before the last n_groups groups. */
static inline void cuda_host_wait_for_copies(int n_groups) {
    std::vector<cuda_host_fibers::copy> &copies =
        cuda_host_fibers::here().fibers[cuda_host_fibers::here().current].copies;
    size_t end = copies.size();
    for (int ends = 0; end > 0 && n_groups > 0; end--)
        if (!copies[end - 1].to && ++ends > n_groups) break;
    for (size_t i = 0; i < end; i++) {
        if (!copies[i].to) continue;
        memcpy(copies[i].to, copies[i].from, (size_t)copies[i].bytes);
        memset((uint8_t *)copies[i].to + copies[i].bytes, 0, (size_t)(copies[i].all - copies[i].bytes));
        cuda_host_watch_access(copies[i].to, (size_t)copies[i].all, true);
    }
    copies.erase(copies.begin(), copies.begin() + (std::ptrdiff_t)end);
}

/* Not in CUDA: flags through which devices signal each other, and a clock. Reading a flag lets other threads use the
   GPUs. */
static CUDA_HOST_SWITCH void cuda_host_set_flag(unsigned *at, unsigned value) {
    const cuda_host_memory *memory = cuda_host_find_memory((uintptr_t)at);
    if (memory && !cuda_host_reaches(*memory)) cuda_host_fault("a kernel uses memory of another device");
    __atomic_store_n(at, value, __ATOMIC_RELEASE);
}

static CUDA_HOST_SWITCH unsigned cuda_host_get_flag(const unsigned *at) {
    cuda_host_lock.yield();
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}

static inline uint64_t cuda_host_nanoseconds() {
    return (uint64_t)std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <typename T> static inline T __ldcg(const T *from) { return *from; }

CUDA_HOST_SWITCH unsigned atomicAdd(unsigned *at, unsigned value) {
    unsigned old = *at;
    *at += value;
    cuda_host_watch_atomic(at);
    return old;
}

static inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* ---- Calls ---- */

enum cudaError_t {
    cudaSuccess,
    cudaErrorInvalidValue,
    cudaErrorMemoryAllocation,
    cudaErrorNoDevice,
    cudaErrorStreamCaptureUnsupported,
    cudaErrorNotReady,
    cudaErrorPeerAccessAlreadyEnabled
};

enum { cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventDisableTiming = 2, cudaEventInterprocess = 4 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr {
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor,
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMemoryClockRate,
    cudaDevAttrGlobalMemoryBusWidth,
    cudaDevAttrL2CacheSize,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
    cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };

typedef std::vector<std::function<void()>> cuda_host_queue;

struct cuda_host_stream {
    /* Protected by cuda_host_lock: */
    cuda_host_queue queue, before; /* before: was queued before recording began                         */
    size_t n_run = 0;              /* work at the begin of the queue that was run                       */
    bool recording = false;        /* recorded work goes to the queue                                   */
    bool busy = false;             /* a thread runs the queue: `runner`                                 */
    bool done = true;              /* `thread` has finished                                             */
    std::thread::id runner;
    /* Protected by `joining`, which is never locked by a thread that has cuda_host_lock: */
    std::thread thread; /* runs the queue */
    std::mutex joining;
    const int device = cuda_host_device;
};

/* How many times an event was recorded, and the last time that has come. Both are atomic. */
struct cuda_host_counts {
    unsigned recorded = 0, come = 0;
};

struct cuda_host_event {
    cuda_host_stream *stream = nullptr; /* that it was last recorded in */
    int device = cuda_host_device;
    int file = -1;                            /* the file that holds the counts of an event with a handle; -1: none */
    bool opened = false;                      /* the event belongs to another process                                */
    bool has_handle = false;                  /* other processes can open it */
    std::shared_ptr<cuda_host_counts> counts; /* queued work may outlive the event                                   */
};

typedef cuda_host_stream *cudaStream_t;
typedef cuda_host_event *cudaEvent_t;
typedef cuda_host_queue *cudaGraph_t, *cudaGraphExec_t;

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};

/* Every call that can fail calls this first. True: fail_at says that it must fail. */
static inline bool cuda_host_fails(bool records = cuda_host_records) {
    std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
    bool fails = cuda_host.fail_at && --cuda_host.fail_at == 0;
    if (fails) cuda_host.failed_recording = records;
    return fails;
}

static inline void cuda_host_count(int n) {
    std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
    cuda_host.n_live += n;
}

static inline void cuda_host_count_launch(int *counter) {
    std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
    ++*counter;
}

template <typename T> static inline cudaError_t cuda_host_new(T **out, bool records = cuda_host_records) {
    if (cuda_host_fails(records)) return cudaErrorMemoryAllocation;
    *out = new T;
    cuda_host_count(1);
    return cudaSuccess;
}

template <typename T> static inline cudaError_t cuda_host_delete(T *object) {
    delete object;
    cuda_host_count(-1);
    return cudaSuccess;
}

static inline cudaError_t cuda_host_enqueue(cudaStream_t stream, std::function<void()> work) {
    if (cuda_host_fails() || stream->device != cuda_host_device) return cudaErrorInvalidValue;
    std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
    stream->queue.push_back(std::move(work));
    return cudaSuccess;
}

static inline void cuda_host_run(cuda_host_queue &queue) {
    std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
    for (auto &work : queue) work();
}

/* Has an event come that was recorded this many times? */
static inline bool cuda_host_has_come(const cuda_host_counts &counts, unsigned number) {
    return (int)(__atomic_load_n(&counts.come, __ATOMIC_ACQUIRE) - number) >= 0;
}

/* Runs the queue of a stream on the calling thread, all of it or until an event has come. If another thread runs it
   already, waits for that. */
static inline void cuda_host_run_stream(cudaStream_t stream, const cuda_host_counts *event = nullptr,
                                        unsigned number = 0) {
    std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
    auto has_come = [=] { return event && cuda_host_has_come(*event, number); };
    if (!has_come() && stream->busy && stream->runner == std::this_thread::get_id()) {
        fprintf(stderr, "cuda_host: two streams wait for each other for ever\n");
        abort();
    }
    while (stream->busy && !has_come()) cuda_host_lock.yield();
    if (has_come()) return;
    int device = cuda_host_device;
    cuda_host_device = stream->device;
    stream->busy = true;
    stream->runner = std::this_thread::get_id();
    cuda_host_queue &queue = stream->recording ? stream->before : stream->queue;
    while (stream->n_run < queue.size() && !has_come()) {
        std::function<void()> work = std::move(queue[stream->n_run++]);
        work();
    }
    if (stream->n_run == queue.size()) {
        queue.clear();
        stream->n_run = 0;
    }
    stream->busy = false;
    cuda_host_device = device;
}

/* Waits for the thread of a stream. */
static inline void cuda_host_join(cudaStream_t stream) {
    std::lock_guard<std::mutex> guard(stream->joining);
    if (stream->thread.joinable()) stream->thread.join();
}

/* Starts a thread that runs the queue, unless there is one. */
static inline void cuda_host_start(cudaStream_t stream) {
    std::lock_guard<std::mutex> joining(stream->joining);
    {
        std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
        if (!stream->done) return;
        stream->done = false;
    }
    if (stream->thread.joinable()) stream->thread.join();
    stream->thread = std::thread([stream] {
        std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
        cuda_host_run_stream(stream);
        stream->done = true;
    });
}

/* Shared libraries find these functions by name. This one queues work(arg), which may run several times. After the last
   time it calls forget(arg). */
extern "C" __attribute__((used)) inline int cuda_host_queue_work(cudaStream_t stream, void (*work)(void *arg),
                                                                 void *arg, void (*forget)(void *arg)) {
    std::shared_ptr<void> held(arg, forget);
    return cuda_host_enqueue(stream, [=] { work(held.get()); });
}

extern "C" __attribute__((used)) inline bool cuda_host_is_recording() { return cuda_host_records; }

/* Lets other threads use the GPUs for a while. */
extern "C" __attribute__((used)) inline void cuda_host_yield() { cuda_host_lock.yield(); }

static inline cudaError_t cudaGetLastError() { return cudaErrorNoDevice; }
static inline const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorNoDevice ? "no device" : "a failure made by the test";
}

static inline cudaError_t cudaGetDeviceCount(int *n) {
    *n = cuda_host.n_devices;
    return cuda_host_fails() ? cudaErrorNoDevice : cudaSuccess;
}

static inline cudaError_t cudaGetDevice(int *device) {
    *device = cuda_host_device;
    return cudaSuccess;
}

static inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= cuda_host.n_devices) return cudaErrorInvalidValue;
    cuda_host_device = device;
    return cudaSuccess;
}

static inline cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = cuda_host.has_peers && device != peer;
    return cuda_host_fails() ? cudaErrorInvalidValue : cudaSuccess;
}

static inline cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned) {
    std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
    if (cuda_host_fails() || !cuda_host.has_peers || peer == cuda_host_device || peer >= cuda_host.n_devices)
        return cudaErrorInvalidValue;
    return cuda_host_peers.insert(std::make_pair(cuda_host_device, peer)).second ? cudaSuccess
                                                                                 : cudaErrorPeerAccessAlreadyEnabled;
}

static inline cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
    snprintf(id, (size_t)size, "0000:%02X:00.0", (unsigned)(cuda_host.first_bus + device));
    return cuda_host_fails() ? cudaErrorInvalidValue : cudaSuccess;
}

struct cudaUUID_t {
    char bytes[16];
};

struct cudaDeviceProp {
    cudaUUID_t uuid;
};

static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *out, int device) {
    memset(out, 0, sizeof *out);
    out->uuid.bytes[0] = (char)(1 + cuda_host.first_bus + device);
    return cuda_host_fails() ? cudaErrorInvalidValue : cudaSuccess;
}

static inline cudaError_t cudaDeviceGetByPCIBusId(int *device, const char *id) {
    unsigned bus = 0;
    if (cuda_host_fails() || sscanf(id, "0000:%2X:00.0", &bus) != 1) return cudaErrorInvalidValue;
    if ((int)bus < cuda_host.first_bus || (int)bus >= cuda_host.first_bus + cuda_host.n_devices)
        return cudaErrorInvalidValue;
    *device = (int)bus - cuda_host.first_bus;
    return cudaSuccess;
}

struct cudaFuncAttributes {
    int ptxVersion;
};

template <typename Kernel> static inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *out, Kernel *) {
    out->ptxVersion = cuda_host.ptx_version;
    return cuda_host_fails() ? cudaErrorInvalidValue : cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

template <typename Kernel> static inline cudaError_t cudaFuncSetAttribute(Kernel *, cudaFuncAttribute, int bytes) {
    return cuda_host_fails() || bytes > cuda_host.shared_bytes - 1024 ? cudaErrorInvalidValue : cudaSuccess;
}

static inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor             ? cuda_host.major
             : attribute == cudaDevAttrComputeCapabilityMinor           ? 0
             : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? cuda_host.shared_bytes
             : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin     ? cuda_host.shared_bytes - 1024
                                                                        : 3;
    return cuda_host_fails() ? cudaErrorInvalidValue : cudaSuccess;
}

/* ---- Memory that other processes can open ----

   Such memory is an unnamed file. While its owner has it open, other processes find it in /proc. Its first page holds
   the number of processes that have opened it. */

enum { CUDA_HOST_PAGE = 4096, CUDA_IPC_HANDLE_SIZE = 64, cudaIpcMemLazyEnablePeerAccess = 1 };

struct cudaIpcMemHandle_t {
    char reserved[CUDA_IPC_HANDLE_SIZE];
};

struct cuda_host_handle {
    int process, file, bus;
    size_t size;
};
static_assert(sizeof(cuda_host_handle) <= CUDA_IPC_HANDLE_SIZE, "a handle");

static inline void *cuda_host_map(int file, size_t size) {
    void *page = mmap(NULL, CUDA_HOST_PAGE + size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    return page == MAP_FAILED ? NULL : (uint8_t *)page + CUDA_HOST_PAGE;
}

static inline int *cuda_host_openers(const cuda_host_memory &memory) { return (int *)(memory.begin - CUDA_HOST_PAGE); }

static inline void cuda_host_unmap(const cuda_host_memory &memory) {
    munmap((void *)(memory.begin - CUDA_HOST_PAGE), CUDA_HOST_PAGE + memory.size);
    close(memory.file);
}

static inline void *cuda_host_make_shared(size_t size, int *file) {
    *file = memfd_create("cuda_host", MFD_CLOEXEC);
    if (*file < 0) return NULL;
    void *memory = ftruncate(*file, (off_t)(CUDA_HOST_PAGE + size)) ? NULL : cuda_host_map(*file, size);
    if (!memory) close(*file);
    return memory;
}

static inline cudaError_t cuda_host_allocate(void **out, size_t size, int device) {
    int file = -1;
    if (cuda_host_records) return cudaErrorStreamCaptureUnsupported;
    if (cuda_host_fails()) return cudaErrorMemoryAllocation;
    if (cuda_host.has_ipc && device != CUDA_HOST_PINNED) *out = cuda_host_make_shared(size, &file);
    else *out = aligned_alloc(256, (size + 255) / 256 * 256);
    if (!*out) return cudaErrorMemoryAllocation;
    memset(*out, 0xFF, size);
    cuda_host_count(1);
    cuda_host_add_memory(*out, size, device, file);
    return cudaSuccess;
}

static inline cudaError_t cudaMalloc(void **out, size_t size) {
    return cuda_host_allocate(out, size, cuda_host_device);
}

static inline cudaError_t cudaFree(void *ptr) {
    if (ptr) cuda_host_count(-1);
    cuda_host_memory memory = cuda_host_remove_memory(ptr);
    if (memory.file < 0) {
        free(ptr);
        return cudaSuccess;
    }
    if (__atomic_load_n(cuda_host_openers(memory), __ATOMIC_ACQUIRE))
        cuda_host_fault("memory is freed that another process has opened");
    cuda_host_unmap(memory);
    return cudaSuccess;
}

static inline cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *out, void *ptr) {
    std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
    const cuda_host_memory *memory = cuda_host_find_memory((uintptr_t)ptr);
    memset(out, 0, sizeof *out);
    if (cuda_host_fails() || !memory || memory->begin != (uintptr_t)ptr || memory->file < 0 || memory->opened)
        return cudaErrorInvalidValue;
    cuda_host_handle handle = {(int)getpid(), memory->file, cuda_host.first_bus + memory->device, memory->size};
    memcpy(out, &handle, sizeof handle);
    return cudaSuccess;
}

/* Opens the file behind a handle. Returns -1 if it cannot. */
static inline int cuda_host_open(const cuda_host_handle &handle) {
    char path[64];
    if (cuda_host.n_refused_handles && cuda_host.n_refused_handles--) return -1;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.process, handle.file);
    return open(path, O_RDWR | O_CLOEXEC);
}

/* Only the device that opens memory may use it. */
static inline cudaError_t cudaIpcOpenMemHandle(void **out, cudaIpcMemHandle_t from, unsigned flags) {
    cuda_host_handle handle;
    memcpy(&handle, &from, sizeof handle);
    bool other = handle.bus != cuda_host.first_bus + cuda_host_device;
    if (cuda_host_fails() || !handle.size || handle.process == (int)getpid()) return cudaErrorInvalidValue;
    if (other && (!cuda_host.has_peers || flags != cudaIpcMemLazyEnablePeerAccess)) return cudaErrorInvalidValue;
    int file = cuda_host_open(handle);
    void *ptr = file < 0 ? NULL : cuda_host_map(file, handle.size);
    if (!ptr) {
        if (file >= 0) close(file);
        return cudaErrorInvalidValue;
    }
    cuda_host_count(1);
    cuda_host_add_memory(ptr, handle.size, cuda_host_device, file, true);
    __atomic_add_fetch(cuda_host_openers(*cuda_host_find_memory((uintptr_t)ptr)), 1, __ATOMIC_ACQ_REL);
    *out = ptr;
    return cudaSuccess;
}

static inline cudaError_t cudaIpcCloseMemHandle(void *ptr) {
    cuda_host_memory memory = cuda_host_remove_memory(ptr);
    if (!memory.opened) return cudaErrorInvalidValue;
    cuda_host_count(-1);
    __atomic_sub_fetch(cuda_host_openers(memory), 1, __ATOMIC_ACQ_REL);
    cuda_host_unmap(memory);
    return cudaSuccess;
}

static inline cudaError_t cudaMallocHost(void **out, size_t size) {
    return cuda_host_allocate(out, size, CUDA_HOST_PINNED);
}
static inline cudaError_t cudaFreeHost(void *ptr) { return cudaFree(ptr); }

static inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind,
                                          cudaStream_t stream) {
    if (!cuda_host_may_use(to) || !cuda_host_may_use(from)) return cudaErrorInvalidValue;
    return cuda_host_enqueue(stream, [=] { memcpy(to, from, size); });
}

static inline cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    return cuda_host_enqueue(stream, [=] { memset(to, value, size); });
}

/* A copy between two devices. The stream belongs to either of them. */
static inline cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t size,
                                              cudaStream_t stream) {
    std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
    for (auto &end : {std::make_pair((const void *)to, to_device), std::make_pair(from, from_device)}) {
        const cuda_host_memory *memory = cuda_host_find_memory((uintptr_t)end.first);
        if (!memory || memory->device != end.second || !cuda_host_reaches(*memory)) return cudaErrorInvalidValue;
        if ((uintptr_t)end.first + size > memory->begin + memory->size) return cudaErrorInvalidValue;
    }
    return cuda_host_enqueue(stream, [=] { memcpy(to, from, size); });
}

inline std::set<cudaStream_t> cuda_host_streams; /* all that exist; protected by cuda_host_lock */

static inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned) {
    cudaError_t result = cuda_host_new(out);
    std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
    if (result == cudaSuccess) cuda_host_streams.insert(*out);
    return result;
}

static inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    cuda_host_join(stream);
    std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
    while (stream->busy) cuda_host_lock.yield();
    cuda_host_streams.erase(stream);
    return cuda_host_delete(stream);
}

static inline cudaError_t cudaStreamQuery(cudaStream_t stream) {
    if (cuda_host_records) return cudaErrorStreamCaptureUnsupported;
    if (stream->device == cuda_host.lost_device) return cudaErrorNoDevice;
    bool idle, empty;
    {
        std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
        idle = stream->done;
        empty = stream->queue.empty();
    }
    if (idle && !empty) cuda_host_start(stream);
    if (!idle || !empty) return cudaErrorNotReady;
    return cuda_host_fails() ? cudaErrorInvalidValue : cudaSuccess;
}

static inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (cuda_host_records) return cudaErrorStreamCaptureUnsupported;
    cuda_host_join(stream);
    if (stream->device == cuda_host.lost_device) return cudaErrorNoDevice;
    cuda_host_run_stream(stream);
    return cuda_host_fails() ? cudaErrorInvalidValue : cudaSuccess;
}

/* ---- Events ---- */

static inline std::shared_ptr<cuda_host_counts> cuda_host_map_counts(int file) {
    void *page = mmap(NULL, CUDA_HOST_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (page == MAP_FAILED) return nullptr;
    return std::shared_ptr<cuda_host_counts>((cuda_host_counts *)page, [](void *at) { munmap(at, CUDA_HOST_PAGE); });
}

static inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    if (event->file >= 0) close(event->file);
    return cuda_host_delete(event);
}

/* An event with a handle must have no time. It needs the same support as memory with a handle. */
static inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
    bool shared = flags & cudaEventInterprocess;
    if (shared && (!cuda_host.has_ipc || !(flags & cudaEventDisableTiming))) return cudaErrorInvalidValue;
    cudaError_t result = cuda_host_new(out);
    if (result != cudaSuccess) return result;
    if (!shared) {
        (*out)->counts = std::make_shared<cuda_host_counts>();
        return cudaSuccess;
    }
    (*out)->file = memfd_create("cuda_host", MFD_CLOEXEC);
    if ((*out)->file >= 0 && !ftruncate((*out)->file, CUDA_HOST_PAGE))
        (*out)->counts = cuda_host_map_counts((*out)->file);
    if ((*out)->counts) return cudaSuccess;
    if ((*out)->file >= 0) close((*out)->file);
    cuda_host_delete(*out);
    *out = nullptr;
    return cudaErrorMemoryAllocation;
}

/* A process can only record its own events. */
static inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    if (event->opened || event->device != stream->device) return cudaErrorInvalidValue;
    auto counts = event->counts;
    unsigned number = __atomic_load_n(&counts->recorded, __ATOMIC_RELAXED) + 1;
    cudaError_t result = cuda_host_enqueue(stream, [=] { __atomic_store_n(&counts->come, number, __ATOMIC_RELEASE); });
    if (result != cudaSuccess) return result;
    event->stream = stream;
    __atomic_store_n(&counts->recorded, number, __ATOMIC_RELEASE);
    if (event->has_handle) cuda_host_start(stream);
    return cudaSuccess;
}

static inline bool cuda_host_exists(cudaStream_t stream) {
    std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
    return cuda_host_streams.count(stream) > 0;
}

/* Until the event has come, lets its stream run. */
static inline cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (cuda_host_records) return cudaErrorStreamCaptureUnsupported;
    if (event->device == cuda_host.lost_device) return cudaErrorNoDevice;
    if (cuda_host_fails()) return cudaErrorInvalidValue;
    if (cuda_host_has_come(*event->counts, __atomic_load_n(&event->counts->recorded, __ATOMIC_ACQUIRE)))
        return cudaSuccess;
    if (cuda_host_exists(event->stream)) cuda_host_start(event->stream);
    return cudaErrorNotReady;
}

static inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    unsigned number = __atomic_load_n(&event->counts->recorded, __ATOMIC_ACQUIRE);
    if (cuda_host_records) return cudaErrorStreamCaptureUnsupported;
    if (event->device == cuda_host.lost_device) return cudaErrorNoDevice;
    if (cuda_host_exists(event->stream)) cuda_host_run_stream(event->stream, event->counts.get(), number);
    while (event->opened && !cuda_host_has_come(*event->counts, number)) std::this_thread::yield();
    return cuda_host_fails() ? cudaErrorInvalidValue : cudaSuccess;
}

/* Work that is queued from now on begins after the event has come. If another stream of this process has still to run
   for that, it runs then. */
static inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event) {
    auto counts = event->counts;
    cudaStream_t other = event->stream;
    unsigned number = __atomic_load_n(&counts->recorded, __ATOMIC_ACQUIRE);
    return cuda_host_enqueue(stream, [=] {
        if (cuda_host_streams.count(other)) cuda_host_run_stream(other, counts.get(), number);
        while (!cuda_host_has_come(*counts, number)) cuda_host_lock.yield();
    });
}

struct cudaIpcEventHandle_t {
    char reserved[CUDA_IPC_HANDLE_SIZE];
};

static inline cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t *out, cudaEvent_t event) {
    memset(out, 0, sizeof *out);
    if (cuda_host_fails() || event->file < 0 || event->opened) return cudaErrorInvalidValue;
    cuda_host_handle handle = {(int)getpid(), event->file, cuda_host.first_bus + event->device, 0};
    memcpy(out, &handle, sizeof handle);
    event->has_handle = true;
    return cudaSuccess;
}

static inline cudaError_t cudaIpcOpenEventHandle(cudaEvent_t *out, cudaIpcEventHandle_t from) {
    cuda_host_handle handle;
    memcpy(&handle, &from, sizeof handle);
    bool other = handle.bus != cuda_host.first_bus + cuda_host_device;
    if (handle.size || handle.process == (int)getpid() || (other && !cuda_host.has_peers)) return cudaErrorInvalidValue;
    int file = cuda_host_open(handle);
    if (file < 0) return cudaErrorInvalidValue;
    auto counts = cuda_host_map_counts(file);
    cudaError_t result = counts ? cuda_host_new(out) : cudaErrorMemoryAllocation;
    if (result != cudaSuccess) {
        close(file);
        return result;
    }
    (*out)->file = file;
    (*out)->opened = true;
    (*out)->counts = counts;
    return cudaSuccess;
}

static inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) {
    *ms = 1;
    return cuda_host_fails() ? cudaErrorInvalidValue : cudaSuccess;
}

static inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (cuda_host_fails(true) || !cuda_host.can_record) return cudaErrorStreamCaptureUnsupported;
    std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
    while (stream->busy) cuda_host_lock.yield();
    stream->before.swap(stream->queue);
    stream->recording = cuda_host_records = true;
    return cudaSuccess;
}

static inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out) {
    cuda_host_queue recorded;
    {
        std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
        while (stream->busy) cuda_host_lock.yield();
        stream->recording = cuda_host_records = false;
        recorded.swap(stream->queue);
        stream->queue.swap(stream->before);
    }
    cudaError_t result = cuda_host_new(out, true);
    if (result == cudaSuccess) (*out)->swap(recorded);
    return result;
}

static inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long) {
    cudaError_t result = cuda_host_new(out, true);
    if (result == cudaSuccess) **out = *graph;
    return result;
}

static inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cuda_host_delete(graph); }
static inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return cuda_host_delete(graph); }

static inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    if (stream->device == cuda_host.refusing_device) return cudaErrorInvalidValue;
    cuda_host_count_launch(&cuda_host.n_graph_launches);
    auto launched = std::make_shared<cuda_host_queue>(*graph); /* the graph may be destroyed before this runs */
    return cuda_host_enqueue(stream, [=] { cuda_host_run(*launched); });
}

static inline void cuda_host_run_grid(dim3 grid, dim3 block, bool overlaps, const std::function<void()> &thread) {
    cuda_host_kernel &kernel = cuda_host_current;
    gridDim = grid;
    blockDim = block;
    kernel.number = ++cuda_host_n_kernels;
    kernel.overlaps = overlaps;
    kernel.n_waits = 0;
    kernel.runs = true;
    if (!overlaps) kernel.first_ahead = kernel.number;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = dim3(x, y, z);
                cuda_host_watch_block();
                cuda_host_fibers::run_block(thread, (int)(block.x * block.y * block.z));
            }
    kernel.runs = false;
    if (overlaps && kernel.n_waits == 0)
        cuda_host_fault("no block of a kernel waits, so the next one could begin too early");
}

/* A kernel is loaded at its first launch, which must not happen while recording. */
static inline bool cuda_host_may_launch(const void *kernel, bool recording) {
    static std::set<const void *> loaded;
    std::lock_guard<cuda_host_mutex> guard(cuda_host_lock);
    if (!recording) loaded.insert(kernel);
    return loaded.count(kernel) > 0;
}

template <typename... Parameters, typename... Arguments>
static inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...),
                                             Arguments... arguments) {
    dim3 grid = config->gridDim, block = config->blockDim;
    unsigned n = block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || !n || n > 1024)
        return cudaErrorInvalidValue;
    if (config->stream->device == cuda_host.refusing_device) return cudaErrorInvalidValue;
    if (config->dynamicSmemBytes + 1024 > (size_t)cuda_host.shared_bytes) return cudaErrorInvalidValue;
    if (!cuda_host_may_launch((const void *)kernel, config->stream->recording))
        return cudaErrorStreamCaptureUnsupported;
    if (!config->stream->recording) cuda_host_count_launch(&cuda_host.n_launches);
    if (config->numAttrs) cuda_host_count_launch(&cuda_host.n_overlapping);
    bool overlaps = config->numAttrs > 0;
    return cuda_host_enqueue(config->stream,
                             [=] { cuda_host_run_grid(grid, block, overlaps, [=] { kernel(arguments...); }); });
}

#endif
