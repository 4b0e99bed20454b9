/*  cuda_watch.h - checks every memory access of kernels that run on the CPU with cuda_runtime.h.

    With -fsanitize=thread, the compiler inserts a function call for each memory access. This file defines these
    functions, instead of ThreadSanitizer's own library. They report these faults:

    - a race in shared memory: two threads access the same byte, at least one writes it, and no __syncthreads (or, in
      one warp, no __syncwarp) lies between the accesses;
    - an access too early: before it waits for the kernels before it, a kernel writes, or reads data that they wrote;
    - an access to memory of another device that this device has no access to;
    - a misaligned access to memory of the GPU (for uint2 and uint4, cuda_runtime.h checks this). */
#ifndef CUDA_HOST_WATCH_H
#define CUDA_HOST_WATCH_H

#include <link.h>

namespace cuda_host_watch {

/* An access: the thread that made it, and the number of barriers the thread had passed. */
struct access {
    unsigned block = 0; /* number of the block, over all kernels; 0: no access yet */
    int thread = 0, barriers = 0, syncs = 0;
    bool atomic = false;
};

/* The last accesses to a byte of shared memory: the last writer, and the last two threads that read it. */
struct shared_byte {
    access writer, readers[2];
};

/* __shared__ variables are thread_local here, so shared memory is the program's thread-local storage. It lies below the
   thread pointer. */
struct shared_memory {
    uintptr_t begin = 0, end = 0;
    shared_byte *bytes = nullptr;
};

inline int find_segment(dl_phdr_info *info, size_t, void *size) {
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto &header = info->dlpi_phdr[i];
        if (header.p_type == PT_TLS)
            *(size_t *)size = (header.p_memsz + header.p_align - 1) / header.p_align * header.p_align;
    }
    return 1; /* the program itself comes first */
}

inline bool is_on = true; /* false while the functions below run, so that their own accesses are not checked */
inline thread_local unsigned n_blocks = 1;

CUDA_HOST_SWITCH shared_memory &shared() {
    static thread_local shared_memory m;
    static thread_local std::vector<shared_byte> bytes;
    uintptr_t end = (uintptr_t)__builtin_thread_pointer();
    if (m.end == end) return m;
    size_t size = 0;
    dl_iterate_phdr(find_segment, &size);
    m.begin = end - size;
    m.end = end;
    bytes.assign(size, shared_byte());
    m.bytes = bytes.data();
    return m;
}

/* True if nothing orders two accesses. In this run, `before` happened first. */
CUDA_HOST_SWITCH bool unordered(const access &before, const access &now) {
    if (before.block != now.block || before.thread == now.thread || before.barriers != now.barriers) return false;
    if (before.thread / 32 == now.thread / 32 && before.syncs < now.syncs) return false;
    return !(before.atomic && now.atomic);
}

CUDA_HOST_SWITCH void look_at_shared(shared_memory &m, uintptr_t at, size_t size, bool writes, const access &now) {
    for (size_t i = 0; i < size && at + i < m.end; i++) {
        shared_byte &byte = m.bytes[at + i - m.begin];
        bool races = unordered(byte.writer, now);
        for (const access &reader : byte.readers) races |= writes && unordered(reader, now);
        if (races) cuda_host_fault("a race in shared memory");
        if (writes) byte.writer = now;
        else {
            if (byte.readers[0].thread != now.thread) byte.readers[1] = byte.readers[0];
            byte.readers[0] = now;
        }
    }
}

CUDA_HOST_SWITCH void look_at_global(const cuda_host_memory &memory, uintptr_t offset, size_t size, bool writes,
                                     bool waited) {
    const cuda_host_kernel &kernel = cuda_host_current;
    bool early = kernel.overlaps && !waited;
    if (early && writes) cuda_host_fault("a kernel writes before it waits for earlier kernels");
    for (size_t i = offset / 2; (early || writes) && i <= (offset + size - 1) / 2 && 2 * i < memory.size; i++) {
        if (early && !writes && memory.writers[i] >= kernel.first_ahead)
            cuda_host_fault("a kernel reads an earlier kernel's output before it waits");
        if (writes) memory.writers[i] = kernel.number;
    }
}

CUDA_HOST_SWITCH void look(const void *from, size_t size, bool writes, bool atomic = false) {
    if (!is_on || !cuda_host_current.runs || size == 0) return;
    is_on = false;
    cuda_host_fibers::block &b = cuda_host_fibers::here();
    uintptr_t at = (uintptr_t)from;
    shared_memory &m = shared();
    const cuda_host_memory *memory = nullptr;
    if (b.current >= 0) {
        const cuda_host_fibers::fiber &f = b.fibers[b.current];
        if (at >= m.begin && at < m.end)
            look_at_shared(m, at, size, writes, access{n_blocks, b.current, b.all.round, f.n_syncs, atomic});
        else if ((memory = cuda_host_find_memory(at)) != nullptr)
            look_at_global(*memory, at - memory->begin, size, writes, f.waited);
        if (memory && !cuda_host_reaches(*memory)) cuda_host_fault("a kernel uses memory of another device");
        if ((memory || (at >= m.begin && at < m.end)) && size <= 8 && at % size)
            cuda_host_fault("an access is not aligned");
    }
    is_on = true;
}

} // namespace cuda_host_watch

static inline void cuda_host_watch_block() { cuda_host_watch::n_blocks++; }
CUDA_HOST_SWITCH void cuda_host_watch_atomic(unsigned *at) { cuda_host_watch::look(at, 4, true, true); }
CUDA_HOST_SWITCH void cuda_host_watch_access(const void *at, size_t size, bool writes) {
    for (size_t i = 0; i < size; i += 2) cuda_host_watch::look((const uint8_t *)at + i, 2, writes);
}

#define CUDA_HOST_CALLED extern "C" __attribute__((used, no_sanitize("thread"))) inline
#define CUDA_HOST_ACCESS(n)                                                                           \
    CUDA_HOST_CALLED void __tsan_read##n(void *at) { cuda_host_watch::look(at, n, false); }           \
    CUDA_HOST_CALLED void __tsan_write##n(void *at) { cuda_host_watch::look(at, n, true); }           \
    CUDA_HOST_CALLED void __tsan_unaligned_read##n(void *at) { cuda_host_watch::look(at, n, false); } \
    CUDA_HOST_CALLED void __tsan_unaligned_write##n(void *at) { cuda_host_watch::look(at, n, true); }

CUDA_HOST_ACCESS(1)
CUDA_HOST_ACCESS(2)
CUDA_HOST_ACCESS(4)
CUDA_HOST_ACCESS(8)
CUDA_HOST_ACCESS(16)
CUDA_HOST_CALLED void __tsan_read_range(void *at, size_t size) { cuda_host_watch::look(at, size, false); }
CUDA_HOST_CALLED void __tsan_write_range(void *at, size_t size) { cuda_host_watch::look(at, size, true); }
CUDA_HOST_CALLED unsigned char __tsan_atomic8_load(const volatile unsigned char *at, int) {
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}
CUDA_HOST_CALLED void __tsan_atomic8_store(volatile unsigned char *at, unsigned char value, int) {
    __atomic_store_n(at, value, __ATOMIC_RELEASE);
}
CUDA_HOST_CALLED int __tsan_atomic32_load(const volatile int *at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
CUDA_HOST_CALLED void __tsan_atomic32_store(volatile int *at, int value, int) {
    __atomic_store_n(at, value, __ATOMIC_RELEASE);
}
CUDA_HOST_CALLED int __tsan_atomic32_fetch_add(volatile int *at, int value, int) {
    return __atomic_fetch_add(at, value, __ATOMIC_ACQ_REL);
}
CUDA_HOST_CALLED int __tsan_atomic32_fetch_sub(volatile int *at, int value, int) {
    return __atomic_fetch_sub(at, value, __ATOMIC_ACQ_REL);
}
CUDA_HOST_CALLED void __tsan_init() {}
CUDA_HOST_CALLED void __tsan_func_entry(void *) {}
CUDA_HOST_CALLED void __tsan_func_exit() {}
CUDA_HOST_CALLED void __tsan_vptr_read(void **) {}
CUDA_HOST_CALLED void __tsan_vptr_update(void **at, void *value) { (void)at, (void)value; }

#endif
