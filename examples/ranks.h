/*  ranks.h - several processes run one model: functions for the programs.

    mpirun -n 2 build/mpi/repl -m MODEL --tp 2        or  srun -n 2 ...

    The ranks of one tensor group have consecutive numbers: rank = (replica * pp + stage) * tp + shard. Rank 0 reads
    input and prints. A program built without LLM_MPI has one rank, and refuses options that need more. */
#ifndef RANKS_H
#define RANKS_H

#include <stdio.h>
#include <string.h>
#include <time.h>

typedef struct ranks {
    int tp, pp, dp;              /* ranks that share each layer; groups that share the layers; copies of the model */
    int rank, replica;           /* this rank's number among all ranks; number of its copy of the model            */
    llm_comm *tensor, *pipeline; /* NULL if they would have one rank                                               */
#ifdef LLM_MPI
    MPI_Comm world, group; /* all ranks; the ranks of this copy of the model */
#endif
} ranks;

/* ---- A trace of waits ---- */

/* The trace has one line per wait: rank, begin and end in seconds, and the reason. Each received message has a line.
   Waits before sending have a line only if they are longer than LEAST_WAIT. */
static const double LEAST_WAIT = 20e-6; /* seconds */

typedef struct trace {
    FILE *file;
    int rank;
    llm_status (*drain)(llm_comm *comm, int to, int most, llm_error *err);
    llm_status (*receive)(llm_comm *comm, int from, void *data, size_t n, llm_error *err);
    llm_status (*duplicate)(llm_comm *comm, llm_comm **out, llm_error *err);
} trace;

static __thread trace waits; /* of the rank that this thread is */

static inline double clock_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t); /* the same on all processes of a machine */
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline llm_status traced_receive(llm_comm *comm, int from, void *data, size_t n, llm_error *err) {
    double begin = clock_seconds();
    llm_status status = waits.receive(comm, from, data, n, err);
    const char *what = from < comm->rank ? "rows" : "results"; /* from the previous stage; from the last stage */
    fprintf(waits.file, "%d,%.6f,%.6f,%s\n", waits.rank, begin, clock_seconds(), what);
    return status;
}

static inline llm_status traced_drain(llm_comm *comm, int to, int most, llm_error *err) {
    double begin = clock_seconds();
    llm_status status = waits.drain(comm, to, most, err);
    double end = clock_seconds();
    if (end - begin > LEAST_WAIT) fprintf(waits.file, "%d,%.6f,%.6f,room\n", waits.rank, begin, end);
    return status;
}

static inline void trace_comm(llm_comm *comm) {
    comm->receive = traced_receive;
    comm->drain = traced_drain;
}

static inline llm_status traced_duplicate(llm_comm *comm, llm_comm **out, llm_error *err) {
    llm_status status = waits.duplicate(comm, out, err);
    if (!status) trace_comm(*out);
    return status;
}

/* From now on, waits for messages of the pipeline are written to the file, in contexts that are created later. For one
   that exists, call trace_comm, too. */
static inline void ranks_trace(ranks *r, FILE *file) {
    if (!r->pipeline || !file) return;
    waits.file = file;
    waits.rank = r->rank;
    waits.drain = r->pipeline->drain;
    waits.receive = r->pipeline->receive;
    waits.duplicate = r->pipeline->duplicate;
    r->pipeline->duplicate = traced_duplicate;
}

/* ---- Processes ---- */

#ifdef LLM_MPI
/* Makes a comm for the ranks with the same color, in order. *out stays NULL if there is only one. */
static llm_status ranks_split(ranks *r, int color, int size, llm_comm **out, llm_error *err) {
    MPI_Comm part;
    if (size == 1) return LLM_OK;
    MPI_Comm_split(r->world, color, r->rank, &part);
    llm_status status = llm_comm_mpi(out, part, NULL, err);
    MPI_Comm_free(&part);
    return status;
}

/* Joins the other ranks. r->tp, pp and dp say how many there are of each kind; 0 counts as 1. */
static inline llm_status ranks_open(ranks *r, llm_error *err) {
    int size, got;
    r->tp += !r->tp, r->pp += !r->pp, r->dp += !r->dp;
    MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &got);
    MPI_Comm_dup(MPI_COMM_WORLD, &r->world);
    MPI_Comm_rank(r->world, &r->rank);
    MPI_Comm_size(r->world, &size);
    if (size != r->tp * r->pp * r->dp) {
        err->code = LLM_ERROR_ARGUMENT;
        snprintf(
            err->message, sizeof err->message,
            "--tp %d, --pp %d and --dp %d need %d processes, but there are %d: start them with mpirun -n %d, or srun",
            r->tp, r->pp, r->dp, r->tp * r->pp * r->dp, size, r->tp * r->pp * r->dp);
        return err->code;
    }
    r->replica = r->rank / (r->tp * r->pp);
    MPI_Comm_split(r->world, r->replica, r->rank, &r->group);
    llm_status status = ranks_split(r, r->rank / r->tp, r->tp, &r->tensor, err);
    return status ? status : ranks_split(r, r->replica * r->tp + r->rank % r->tp, r->pp, &r->pipeline, err);
}

/* Copies n bytes from rank 0 to all ranks. It sleeps while it waits, because rank 0 may be waiting for a user to
   type. */
static inline void ranks_share(ranks *r, void *data, size_t n) {
    MPI_Request request;
    int done = 0;
    if (r->tp * r->pp * r->dp == 1) return;
    MPI_Ibcast(data, (int)n, MPI_BYTE, 0, r->world, &request);
    for (int i = 0; !done; i++) {
        MPI_Test(&request, &done, MPI_STATUS_IGNORE);
        if (!done && i > 1000) nanosleep(&(struct timespec){0, 1000000}, NULL);
    }
}

/* ---- Copies of a model share work ----

   The first rank of each copy asks rank 0 for work and sends it results. Rank 0 answers in ranks_serve, which it must
   call now and then. */

enum {
    RANKS_ASK = 1, /* tags of messages */
    RANKS_WORK,
    RANKS_RESULT,
    RANKS_LEAST = 8 /* min items in a piece, if that many are left: enough questions to fill a pass */
};

typedef struct work {
    int next, end;    /* [next, end): items that no copy has taken yet             */
    int n_unfinished; /* other copies that have not been told that no work is left */
} work;

/* Takes the next items. Pieces are small enough that no copy waits long for another at the end. But the last batches of
   a piece are small, and stages of a pipeline wait there, so a single copy takes all items at once. */
static inline int ranks_take(const ranks *r, work *w, int *first) {
    int n = (w->end - w->next) / (2 * r->dp);
    if (n < RANKS_LEAST) n = RANKS_LEAST;
    if (w->end - w->next < n || r->dp == 1) n = w->end - w->next;
    *first = w->next;
    w->next += n;
    return n;
}

/* On rank 0: answers requests for work, and passes the results that have arrived, `size` bytes each, to on_result. */
static inline void ranks_serve(const ranks *r, work *w, size_t size, void (*on_result)(void *user, const void *result),
                               void *user) {
    char result[256];
    MPI_Status from;
    for (int there = 1; there && w->n_unfinished;) {
        MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, r->world, &there, &from);
        if (!there) return;
        MPI_Recv(result, from.MPI_TAG == RANKS_RESULT ? (int)size : 0, MPI_BYTE, from.MPI_SOURCE, from.MPI_TAG,
                 r->world, MPI_STATUS_IGNORE);
        if (from.MPI_TAG == RANKS_RESULT) {
            on_result(user, result);
            continue;
        }
        int piece[2] = {0, 0};
        piece[1] = ranks_take(r, w, &piece[0]);
        w->n_unfinished -= !piece[1];
        MPI_Send(piece, 2, MPI_INT, from.MPI_SOURCE, RANKS_WORK, r->world);
    }
}

/* Gets more work for this copy. All its ranks call this. Returns the number of items, from *first on; 0: none are
   left. */
static inline int ranks_ask(ranks *r, work *w, int *first) {
    int piece[2] = {0, 0};
    if (r->rank == 0) {
        piece[1] = ranks_take(r, w, &piece[0]);
    } else if (r->rank % (r->tp * r->pp) == 0) {
        MPI_Send(NULL, 0, MPI_BYTE, 0, RANKS_ASK, r->world);
        MPI_Recv(piece, 2, MPI_INT, 0, RANKS_WORK, r->world, MPI_STATUS_IGNORE);
    }
    MPI_Bcast(piece, 2, MPI_INT, 0, r->group);
    *first = piece[0];
    return piece[1];
}

/* Sends a result to rank 0, from the first rank of another copy. */
static inline void ranks_tell(const ranks *r, const void *result, size_t size) {
    MPI_Send(result, (int)size, MPI_BYTE, 0, RANKS_RESULT, r->world);
}

/* Adds up the values of the first ranks of all copies. Only rank 0 gets the sums. */
static inline void ranks_add(const ranks *r, int64_t *values, int n) {
    int64_t own[16], none[16] = {0};
    memcpy(own, values, (size_t)n * sizeof *own);
    MPI_Reduce(r->rank % (r->tp * r->pp) ? none : own, values, n, MPI_INT64_T, MPI_SUM, 0, r->world);
}

/* Adds up the values of all ranks. Only rank 0 gets the sums. */
static inline void ranks_sum(const ranks *r, double *values, int n) {
    double own[16];
    memcpy(own, values, (size_t)n * sizeof *own);
    MPI_Reduce(own, values, n, MPI_DOUBLE, MPI_SUM, 0, r->world);
}

/* If `failed`, ends all ranks at once instead of waiting for them. */
static void ranks_close(ranks *r, bool failed) {
    llm_comm_free(r->tensor);
    llm_comm_free(r->pipeline);
    int started = 0;
    MPI_Initialized(&started);
    if (!started) return;
    if (failed) MPI_Abort(MPI_COMM_WORLD, 1);
    MPI_Comm_free(&r->group);
    MPI_Comm_free(&r->world);
    MPI_Finalize();
}
#else
static inline llm_status ranks_open(ranks *r, llm_error *err) {
    if (r->tp <= 1 && r->pp <= 1 && r->dp <= 1) {
        r->tp = r->pp = r->dp = 1;
        return LLM_OK;
    }
    err->code = LLM_ERROR_UNSUPPORTED;
    snprintf(err->message, sizeof err->message,
             "several ranks need MPI: 'make mpi' builds programs with it into build/mpi");
    return err->code;
}

static inline void ranks_share(ranks *r, void *data, size_t n) { (void)r, (void)data, (void)n; }

typedef struct work {
    int next, end, n_unfinished;
} work;

/* The only rank takes all of the work. */
static inline int ranks_ask(ranks *r, work *w, int *first) {
    int n = w->end - w->next;
    (void)r;
    *first = w->next;
    w->next = w->end;
    return n;
}
static inline void ranks_serve(const ranks *r, work *w, size_t size, void (*on_result)(void *user, const void *result),
                               void *user) {
    (void)r, (void)w, (void)size, (void)on_result, (void)user;
}
static inline void ranks_tell(const ranks *r, const void *result, size_t size) { (void)r, (void)result, (void)size; }
static inline void ranks_add(const ranks *r, int64_t *values, int n) { (void)r, (void)values, (void)n; }
static inline void ranks_sum(const ranks *r, double *values, int n) { (void)r, (void)values, (void)n; }
static inline void ranks_close(ranks *r, bool failed) { (void)r, (void)failed; }
#endif

#endif
