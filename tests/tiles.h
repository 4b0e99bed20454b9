/* The matrix unit (AMX) in plain C, for machines without one: the tile instructions with the arithmetic of the
   hardware, and checks that they are used as the hardware requires. Include it before llm.h, which then offers "amx" on
   every machine with AVX-512. Source: Intel, "Architecture Instruction Set Extensions Programming Reference", chapter
   on AMX. */
#ifndef TILES_H
#define TILES_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct tile_unit {
    bool configured;
    struct {
        int rows, row_bytes;
        uint8_t bytes[16][64];
    } tile[8];
} tile_unit;

static __thread tile_unit the_unit;

static void tile_check(bool good, const char *what) {
    if (good) return;
    fprintf(stderr, "the matrix unit faults: %s\n", what);
    abort();
}

/* `config` has 64 bytes: palette, start row, 14 reserved bytes, 16 row lengths of 2 bytes, 16 numbers of rows. */
static void tile_config(const void *config) {
    const uint8_t *c = (const uint8_t *)config;
    tile_check(c[0] == 1, "ldtilecfg with a palette other than 1");
    for (int i = 1; i < 16; i++) tile_check(c[i] == 0, "ldtilecfg with a start row or reserved bytes");
    the_unit.configured = true;
    for (int t = 0; t < 16; t++) {
        int row_bytes = c[16 + 2 * t] | c[17 + 2 * t] << 8, rows = c[48 + t];
        if (t >= 8) tile_check(!row_bytes && !rows, "ldtilecfg of a tile beyond the eighth");
        else {
            tile_check(row_bytes <= 64 && rows <= 16 && !row_bytes == !rows, "ldtilecfg of an impossible shape");
            memset(&the_unit.tile[t], 0, sizeof the_unit.tile[t]);
            the_unit.tile[t].row_bytes = row_bytes;
            the_unit.tile[t].rows = rows;
        }
    }
}

static void tile_use(int t) {
    tile_check(the_unit.configured, "a tile is used without a configuration");
    tile_check(the_unit.tile[t].rows > 0, "a tile without a shape is used");
}

static void tile_zero(int t) {
    tile_use(t);
    memset(the_unit.tile[t].bytes, 0, sizeof the_unit.tile[t].bytes);
}

static void tile_load(int t, const void *from, size_t stride) {
    tile_zero(t);
    for (int r = 0; r < the_unit.tile[t].rows; r++)
        memcpy(the_unit.tile[t].bytes[r], (const uint8_t *)from + (size_t)r * stride,
               (size_t)the_unit.tile[t].row_bytes);
}

static void tile_store(int t, void *to, size_t stride) {
    tile_use(t);
    for (int r = 0; r < the_unit.tile[t].rows; r++)
        memcpy((uint8_t *)to + (size_t)r * stride, the_unit.tile[t].bytes[r], (size_t)the_unit.tile[t].row_bytes);
}

/* Denormal inputs and results become zero. */
static inline float tile_flush(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = bits & 0x7F800000 ? bits : bits & 0x80000000;
    memcpy(&x, &bits, 4);
    return x;
}

static inline float tile_bf16(const uint8_t *at) {
    uint32_t bits = (uint32_t)at[0] << 16 | (uint32_t)at[1] << 24;
    float x;
    memcpy(&x, &bits, 4);
    return tile_flush(x);
}

/* TDPBF16PS: for each sum, the even and the odd products are two chains that begin with zero. Then the two chains are
   added, and their sum is added to c. */
__attribute__((target("fma"))) static void tile_dot(int c, int a, int b) {
    tile_use(a), tile_use(b), tile_use(c);
    int pairs = the_unit.tile[a].row_bytes / 4, columns = the_unit.tile[c].row_bytes / 4;
    float weights[16][32];
    tile_check(a != b && a != c && b != c, "tdpbf16ps of a tile with itself");
    tile_check(the_unit.tile[a].rows == the_unit.tile[c].rows && the_unit.tile[b].rows == pairs &&
                   the_unit.tile[b].row_bytes == the_unit.tile[c].row_bytes,
               "tdpbf16ps of shapes that do not fit");
    for (int k = 0; k < pairs; k++)
        for (int n = 0; n < 2 * columns; n++) weights[k][n] = tile_bf16(the_unit.tile[b].bytes[k] + 2 * n);
    for (int m = 0; m < the_unit.tile[c].rows; m++) {
        float sums[32] = {0}, sum;
        for (int k = 0; k < pairs; k++) {
            float x[2] = {tile_bf16(the_unit.tile[a].bytes[m] + 4 * k),
                          tile_bf16(the_unit.tile[a].bytes[m] + 4 * k + 2)};
            for (int n = 0; n < 2 * columns; n++)
                sums[n] = tile_flush(__builtin_fmaf(x[n % 2], weights[k][n], sums[n]));
        }
        for (int n = 0; n < columns; n++) {
            memcpy(&sum, the_unit.tile[c].bytes[m] + 4 * n, 4);
            sum = tile_flush(tile_flush(sum) + tile_flush(sums[2 * n] + sums[2 * n + 1]));
            memcpy(the_unit.tile[c].bytes[m] + 4 * n, &sum, 4);
        }
    }
}

static bool llm__amx_allowed(void) { return true; }

#define LLM__TILE_CONFIG(config) tile_config(&(config))
#define LLM__TILE_RELEASE() (the_unit.configured = false)
#define LLM__TILE_ZERO(t) tile_zero(t)
#define LLM__TILE_LOAD(t, from, stride) tile_load(t, from, stride)
#define LLM__TILE_STREAM(t, from, stride) tile_load(t, from, stride)
#define LLM__TILE_STORE(t, to, stride) tile_store(t, to, stride)
#define LLM__TILE_DOT(c, a, b) tile_dot(c, a, b)

#endif
