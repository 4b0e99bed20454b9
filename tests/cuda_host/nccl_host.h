/* Settings and functions of the libnccl.so.2 that nccl.cpp builds. */
#ifndef NCCL_HOST_H
#define NCCL_HOST_H

#include <stddef.h>

struct nccl_host_settings {
    int version = 22707;
    bool refuses_start = false;
    int fail_at = 0;                   /* reports an error after this many operations; 0: never */
    int n_busy = 0;                    /* polls to be answered with "in progress" while NCCL is idle */
    void (*on_queued)() = nullptr;     /* called once, after operations were queued on the stream */
    int n_reduced = 0, n_gathered = 0; /* operations completed                                  */
    int n_live = 0;                    /* communicators neither destroyed nor aborted           */
};

struct ncclComm;

struct ncclUniqueId {
    char internal[128];
};

struct ncclConfig {
    size_t size;
    unsigned magic, version;
    int blocking;
};

extern "C" {
extern nccl_host_settings nccl_host;
int ncclGetVersion(int *version);
const char *ncclGetErrorString(int result);
int ncclGetUniqueId(ncclUniqueId *id);
int ncclCommInitRankConfig(ncclComm **comm, int size, ncclUniqueId id, int rank, ncclConfig *config);
int ncclCommGetAsyncError(ncclComm *comm, int *result);
int ncclGroupStart();
int ncclGroupEnd();
int ncclAllReduce(const void *from, void *to, size_t n, int type, int operation, ncclComm *comm, void *stream);
int ncclAllGather(const void *from, void *to, size_t n, int type, ncclComm *comm, void *stream);
int ncclCommFinalize(ncclComm *comm);
int ncclCommDestroy(ncclComm *comm);
int ncclCommAbort(ncclComm *comm);
}

#endif
