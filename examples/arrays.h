/*  arrays.h - arrays that grow (stb_ds.h: arrput, arrlen, arrfree, ...). If memory runs out, they end the program with
    a message. */
#ifndef ARRAYS_H
#define ARRAYS_H

#include <stdio.h>
#include <stdlib.h>

static inline void out_of_memory(void) {
    fputs("out of memory\n", stderr);
    exit(EXIT_FAILURE);
}

static inline void *resize(void *memory, size_t size) {
    memory = realloc(memory, size);
    if (!memory) out_of_memory();
    return memory;
}

#define STBDS_REALLOC(context, memory, size) resize(memory, size)
#define STBDS_FREE(context, memory) free(memory)
#define STB_DS_IMPLEMENTATION
#include <stb/stb_ds.h>

#endif
