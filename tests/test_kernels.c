/* Every kernel of every instruction set gives the same bits as the scalar one, which defines the results. Shapes are
   random and mostly odd.
   Variants: cross */
#define LLM_IMPLEMENTATION
#include "llm.h"
#include "tests/tiny.h"

#include <setjmp.h>
#include <cmocka.h>

enum { ROUNDS = 300, ROOM = 8192, PRODUCT_ROWS = 120, PRODUCT_BLOCKS = 14 };

static const llm__kernels *scalar;
static uint32_t seed = 1;

static uint32_t random_int(uint32_t below) {
    seed = seed * 1664525u + 1013904223u;
    return (seed >> 8) % below;
}

/* Mostly near 1, some tiny, some large, some zero. */
static float random_float(void) {
    static const float scales[] = {1, 1, 1, 1, 1e-3f, 30, 1e-30f, 0};
    return ((float)random_int(1 << 20) / (1 << 19) - 1) * scales[random_int(8)];
}

static float *random_floats(float *to, int n) {
    for (int i = 0; i < n; i++) to[i] = random_float();
    return to;
}

static void check_same(const char *what, const void *a, const void *b, size_t n) {
    if (memcmp(a, b, n)) fail_msg("%s differs from the scalar kernel", what);
}

static float x[PRODUCT_ROWS * (32 * PRODUCT_BLOCKS + 8)], w[ROOM], a[PRODUCT_ROWS * 100], b[PRODUCT_ROWS * 100];
static uint8_t tile[(LLM__RUN_K + 192) * 64], tiles[2 * sizeof tile], full[sizeof tile], full_tiles[sizeof tiles];

/* Of a 2:4 kind, the kind that stores the zeros, too; otherwise the kind itself. */
static llm__weight_type full_kind(llm__weight_type kind) {
    return kind == LLM__W_BF16_2_4 ? LLM__W_BF16 : kind == LLM__W_INT8_2_4 ? LLM__W_INT8 : kind;
}

/* Sets at least two of each four weights of a tile to zero. Some zeros are negative. */
static void thin_out(llm__weight_type kind, int k) {
    for (size_t lane = 0; lane < 16; lane++)
        for (size_t i = 0; i < (size_t)k; i++) {
            static const uint8_t kept[] = {3, 5, 6, 9, 10, 12, 0, 1, 4, 8};
            static uint8_t places;
            if (i % 4 == 0) places = kept[random_int(sizeof kept)];
            if (places >> i % 4 & 1) continue;
            size_t at = llm__matrix_tile_index(LLM__W_BF16, lane, i, (size_t)k);
            if (kind == LLM__W_INT8) tile[i * 16 + lane] = 0;
            else llm__matrix_tile_set(LLM__W_BF16, tile, at, random_int(2) ? 0 : -0.0f);
        }
}

/* Fills `tile` with random weights: integers with scales, or floats. For a 2:4 kind, `full` is the same tile with its
   zeros. */
static void random_tile(llm__weight_type kind, int k) {
    if (llm__matrix_is_2_4(kind)) {
        random_tile(full_kind(kind), k);
        thin_out(full_kind(kind), k);
        memcpy(full, tile, sizeof full);
        llm__pack_2_4_tile(kind, full, (size_t)k, tile);
        return;
    }
    size_t bytes = llm__matrix_tile_bytes(kind, k), n = (size_t)k / 32;
    for (size_t i = 0; i < bytes; i++) tile[i] = (uint8_t)random_int(256);
    bool floats = kind == LLM__W_F32 || kind == LLM__W_F16 || kind == LLM__W_BF16;
    for (size_t i = 0; i < (size_t)k * 16 && floats; i++) llm__matrix_tile_set(kind, tile, i, random_float());
    if (kind == LLM__W_INT8) random_floats((float *)(void *)(tile + k * 16), 16);
    if (!llm__matrix_has_groups(kind)) return;
    uint8_t *scales = tile + n * LLM__NUMBER_BYTES(kind), *end = tile + bytes;
    if (llm__kernel_forms[kind].k) scales += n * LLM__SCALE_BYTES(kind);
    for (; scales < end; scales += 2) {
        uint16_t half = llm__f32_to_f16(random_float() * 0.01f);
        memcpy(scales, &half, 2);
    }
}

static llm__kernel_group lines[2][PRODUCT_ROWS * (LLM__RUN_K / 32 + 6)];

/* Activations are quantized to the same integers, also with NaN, infinity, and blocks of zeros. */
static void check_quantize(const llm__kernels *k) {
    int n = 32 * (1 + (int)random_int(6));
    random_floats(x, n);
    if (random_int(8) == 0) x[random_int((uint32_t)n)] = random_int(2) ? NAN : -INFINITY;
    if (random_int(8) == 0) memset(x, 0, 32 * sizeof *x);
    scalar->quantize(x, n, lines[0]);
    k->quantize(x, n, lines[1]);
    for (int i = 0; i < n / 32; i++) /* NaNs may have different bits */
        if (lines[0][0].scale != lines[0][0].scale) memcpy(&lines[1][i].scale, &lines[0][i].scale, 16);
    check_same("quantize", lines[0], lines[1], (size_t)(n / 32) * sizeof *lines[0]);
}

/* Products of rows with tiles of weights in groups; shapes as in check_product. */
static void check_group_product(const llm__kernels *k, llm__weight_type kind) {
    bool deep = random_int(16) == 0, many = !deep && random_int(8) == 0;
    int rows = 1 + (int)random_int(deep ? 3 : many ? PRODUCT_ROWS : 8), n_tiles = 1 + (int)random_int(deep ? 2 : 6);
    int n = 32 * (1 + (int)random_int(many ? PRODUCT_BLOCKS : 6) + (deep ? LLM__RUN_K / 32 : 0)),
        n_lines = n / 32 + (int)random_int(3), y_stride = 16 * n_tiles + (int)random_int(5);
    if (llm__kernel_forms[kind].k) n = llm__math_round_up(n, 256), n_lines = n / 32;
    if (rows * n_lines > (int)(sizeof lines[0] / sizeof *lines[0]))
        rows = (int)(sizeof lines[0] / sizeof *lines[0]) / n_lines;
    for (int r = 0; r < rows; r++) {
        random_floats(x, n);
        scalar->quantize(x, n, lines[0] + r * n_lines);
    }
    for (int i = n_tiles; i--;) {
        random_tile(kind, n);
        memcpy(tiles + (size_t)i * llm__matrix_tile_bytes(kind, n), tile, llm__matrix_tile_bytes(kind, n));
    }
    random_floats(a, rows * y_stride);
    memcpy(b, a, sizeof a);
    llm__kernel_product p = {.kind = kind,
                             .n_rows = rows,
                             .n_tiles = n_tiles,
                             .k = n,
                             .groups = lines[0],
                             .x_stride = (size_t)n_lines,
                             .y_stride = (size_t)y_stride,
                             .tiles = tiles,
                             .y = a};
    scalar->group_product(&p);
    p.y = b;
    k->group_product(&p);
    check_same("group_product", a, b, sizeof a);
}

/* Products of rows with tiles. Mostly k and the number of rows are small; sometimes there are many rows, or more k than
   one run (LLM__RUN_K). */
static void check_product(const llm__kernels *k, llm__weight_type kind) {
    bool deep = random_int(16) == 0, many = !deep && random_int(8) == 0;
    int rows = 1 + (int)random_int(deep ? 3 : many ? PRODUCT_ROWS : 20), n_tiles = 1 + (int)random_int(deep ? 2 : 6);
    int n = 32 * (1 + (int)random_int(many ? PRODUCT_BLOCKS : 6) + (deep ? LLM__RUN_K / 32 : 0)),
        stride = n + (int)random_int(9), y_stride = 16 * n_tiles + (int)random_int(5);
    random_floats(x, rows * stride);
    const size_t bytes = llm__matrix_tile_bytes(kind, n), full_bytes = llm__matrix_tile_bytes(full_kind(kind), n);
    for (int i = n_tiles; i--;) {
        random_tile(kind, n);
        memcpy(tiles + (size_t)i * bytes, tile, bytes);
        memcpy(full_tiles + (size_t)i * full_bytes, llm__matrix_is_2_4(kind) ? full : tile, full_bytes);
    }
    random_floats(a, rows * y_stride);
    memcpy(b, a, sizeof a);
    for (int i = 0; i < rows * stride && kind != LLM__W_F32; i++) x[i] = llm__bf16_to_f32(llm__f32_to_bf16(x[i]));
    bool finite = !llm__matrix_is_2_4(kind) || random_int(8) > 0;
    if (!finite)
        x[(int)random_int((uint32_t)rows) * stride + (int)random_int((uint32_t)n)] = random_int(2) ? NAN : INFINITY;
    llm__kernel_product p = {.kind = full_kind(kind),
                             .n_rows = rows,
                             .n_tiles = n_tiles,
                             .k = n,
                             .x = x,
                             .x_stride = (size_t)stride,
                             .y_stride = (size_t)y_stride,
                             .tiles = full_tiles,
                             .y = a};
    scalar->product[p.kind](&p);
    p.kind = kind;
    p.tiles = tiles;
    p.y = b;
    k->product[kind](&p);
    for (int i = 0; i < rows * y_stride && !finite; i++) /* NaNs may have different bits */
        if (a[i] != a[i] && b[i] != b[i]) b[i] = a[i];
    check_same("product", a, b, sizeof a);
}

/* A 2:4 tile holds the same numbers as the tile it was made from, and unpacks to the same bf16 blocks. */
static void check_2_4(const llm__kernels *k, llm__weight_type kind) {
    static uint8_t wide[sizeof tile], expected[sizeof tile];
    int n = 32 * (1 + (int)random_int(40));
    float got[32 * 40], exact[32 * 40];
    random_tile(kind, n);
    llm__matrix m = llm__matrix_init(kind, 16, n), all = llm__matrix_init(full_kind(kind), 16, n);
    m.data = tile;
    all.data = full;
    for (size_t lane = 0; lane < 16; lane++) {
        llm__matrix_get_row(&m, lane, got);
        llm__matrix_get_row(&all, lane, exact);
        for (int i = 0; i < n; i++) assert_true(got[i] == exact[i]);
    }
    if (kind == LLM__W_INT8_2_4) scalar->unpack(LLM__W_INT8, full, n / 32, expected);
    else memcpy(expected, full, (size_t)n * 32);
    k->unpack(kind, tile, n / 32, wide);
    for (int i = 0; i < n * 16; i++)
        assert_true(llm__bf16_to_f32(((uint16_t *)(void *)wide)[i]) ==
                    llm__bf16_to_f32(((uint16_t *)(void *)expected)[i]));
}

static void check_rows(const llm__kernels *k) {
    int n = 1 + (int)random_int(300);
    bool round = random_int(2);
    float sum[2], max[2], factor = random_float();
    random_floats(x, n);
    random_floats(w, 2 * llm__math_round_up(n, 16));
    memset(a, 0, sizeof a);
    memset(b, 0, sizeof b);
    sum[0] = scalar->norm_factor(x, n, 1e-5f);
    sum[1] = k->norm_factor(x, n, 1e-5f);
    check_same("norm_factor", &sum[0], &sum[1], sizeof *sum);
    scalar->norm(x, w, n, factor, round, a);
    k->norm(x, w, n, factor, round, b);
    check_same("norm", a, b, sizeof a);
    scalar->swiglu(w, n, round, a);
    k->swiglu(w, n, round, b);
    check_same("swiglu", a, b, sizeof a);
    scalar->scale(x, factor, n, round, a);
    k->scale(x, factor, n, round, b);
    check_same("scale", a, b, sizeof a);
    scalar->add(a, w, n);
    k->add(b, w, n);
    check_same("add", a, b, sizeof a);
    for (int round = 0; round < 2; round++) {
        scalar->weigh(a, w, n / 16 * 16, round);
        k->weigh(b, w, n / 16 * 16, round);
        check_same("weigh", a, b, sizeof a);
    }
    int rows = 1 + (int)random_int(20), width = 1 + n % 16;
    float maxima[3][20], totals[3][20];
    for (int i = 0; i < 3; i++)
        for (int r = 0; r < rows; r++) {
            maxima[i][r] = i == 1 ? maxima[0][r] : random_float();
            totals[i][r] = i == 1 ? totals[0][r] : 1 + (float)random_int(100);
        }
    const llm__kernel_attended part = {w, maxima[2], totals[2]};
    scalar->merge(rows, width, (llm__kernel_attended){a, maxima[0], totals[0]}, part);
    k->merge(rows, width, (llm__kernel_attended){b, maxima[1], totals[1]}, part);
    check_same("merge", a, b, sizeof a);
    check_same("merge's maxima", maxima[0], maxima[1], (size_t)rows * 4);
    check_same("merge's sums", totals[0], totals[1], (size_t)rows * 4);
    int padded = llm__math_round_up(n, 16) + 16 * (int)random_int(3);
    memcpy(a, x, sizeof a);
    memcpy(b, x, sizeof b);
    scalar->softmax(a, n, padded, 0.3f, round, &max[0], &sum[0]);
    k->softmax(b, n, padded, 0.3f, round, &max[1], &sum[1]);
    check_same("softmax", a, b, (size_t)padded * 4);
    assert_true(max[0] == max[1] && sum[0] == sum[1]);
    memcpy(a, x, sizeof a);
    memcpy(b, x, sizeof b);
    scalar->rope(a, w, w + n / 2, n / 2);
    k->rope(b, w, w + n / 2, n / 2);
    check_same("rope", a, b, sizeof a);
    float runs[2][300 / LLM__MAX_RUN + 1], top = x[0];
    size_t n_runs = (size_t)((n + LLM__MAX_RUN - 1) / LLM__MAX_RUN);
    for (int i = 1; i < n; i++) top = x[i] > top ? x[i] : top;
    if (n > 1) x[random_int((uint32_t)n - 1)] = -INFINITY;
    assert_true(scalar->maxima(x, n, runs[0]) && k->maxima(x, n, runs[1]));
    check_same("maxima", runs[0], runs[1], n_runs * 4);
    sum[0] = scalar->odds(x, n, top, 3, a, runs[0]);
    sum[1] = k->odds(x, n, top, 3, b, runs[1]);
    check_same("odds", a, b, (size_t)llm__math_round_up(n, 16) * 4);
    check_same("odds' maxima", runs[0], runs[1], n_runs * 4);
    assert_true(sum[0] == sum[1]);
    for (int i = 0; i < n; i++) assert_true(x[i] == -INFINITY ? a[i] == 0 : a[i] >= 0 && a[i] <= 1);
    x[random_int((uint32_t)n)] = NAN;
    assert_true(!scalar->maxima(x, n, runs[0]) && !k->maxima(x, n, runs[1]));
}

/* Unpacks a packed row to floats. If step is 64, each four values are stored in the order third, first, fourth,
   second. */
static void unpack_row(llm__kernel_lines row, int n, float *to) {
    static const int place[] = {1, 3, 0, 2};
    for (int i = 0; i < n; i++) {
        int at = row.step == 64 ? i % 32 / 4 * 4 + place[i % 4] : i % 32;
        uint16_t bits;
        memcpy(&bits, row.at + (size_t)i / 32 * row.step + (size_t)at * 2, 2);
        to[i] = llm__bf16_to_f32(bits);
    }
}

static void pack_rows(const llm__kernels *k, const float *from, int rows, int n, uint8_t *packed) {
    for (int r = 0; r < rows; r++)
        k->pack_scale(from + r * n, 1, n, n, llm__kernel_packed_row(k->line_step, packed, (size_t)n, (size_t)r), 0);
}

/* Kernels that write packed rows give the same values as those that write floats. */
static void check_packs(const llm__kernels *k) {
    static uint8_t packed[32 * 1024 * 2];
    int n = 1 + (int)random_int(300), whole = llm__math_round_up(n, 16), padded = llm__math_round_up(n, 32),
        column = 16 * (int)random_int(4);
    float sum[2], max[2], factor = random_float();
    llm__kernel_lines row = llm__kernel_packed_row(k->line_step, packed, 512, random_int(32));
    random_floats(x, 512);
    random_floats(w, 2 * whole);
    memset(packed, 0x55, sizeof packed);
    memset(a, 0, sizeof a);
    scalar->scale(x, factor, n, true, a);
    k->pack_scale(x, factor, n, whole, row, column);
    unpack_row(row, column + whole, b);
    check_same("pack_scale", a, b + column, (size_t)n * 4);
    for (int i = n; i < whole; i++) assert_true(b[column + i] == 0); /* +0 or -0 */
    memset(a, 0, sizeof a);
    scalar->norm(x, w, n, factor, true, a);
    k->pack_norm(x, w, n, factor, row);
    unpack_row(row, padded, b);
    check_same("pack_norm", a, b, (size_t)padded * 4);
    random_floats(x, 512);
    memcpy(a, x, sizeof a);
    padded += 32 * (int)random_int(3);
    scalar->softmax(a, n, padded, 0.3f, true, &max[0], &sum[0]);
    k->pack_softmax(x, n, padded, 0.3f, NULL, row, &max[1], &sum[1]);
    unpack_row(row, padded, b);
    check_same("pack_softmax", a, b, (size_t)padded * 4);
    assert_true(max[0] == max[1] && sum[0] == sum[1]);
    random_floats(w, padded);
    for (int i = 0; i < padded; i++) w[i] = fabsf(w[i]);
    scalar->weigh(a, w, padded, true);
    k->pack_softmax(x, n, padded, 0.3f, w, row, &max[1], &sum[1]);
    unpack_row(row, padded, b);
    check_same("pack_softmax with scales", a, b, (size_t)padded * 4);
    assert_true(max[0] == max[1] && sum[0] == sum[1]);
}

/* y[rows][..y_stride] += products of x[rows][k] with one tile. */
static void scalar_product(llm__weight_type kind, int rows, int k, const float *x, const uint8_t *from, float *y,
                           int y_stride) {
    const llm__kernel_product p = {.kind = kind,
                                   .n_rows = rows,
                                   .n_tiles = 1,
                                   .k = k,
                                   .x = x,
                                   .x_stride = (size_t)k,
                                   .y_stride = (size_t)y_stride,
                                   .tiles = from,
                                   .y = y};
    scalar->product[kind](&p);
}

/* A panel of up to a hundred rows, and each ending of its sums, compared with scalar products of its tiles. */
static void check_panel(const llm__kernels *k, llm__weight_type kind) {
    enum { MOST_ROWS = 112, MOST_TILES = 6, MOST_K = 1216, STRIDE = MOST_TILES * 16 + 5 };
    static float px[MOST_ROWS * MOST_K], scratch[MOST_ROWS * MOST_TILES * 16], y[MOST_ROWS * STRIDE],
        expected[MOST_ROWS * STRIDE], sums[MOST_ROWS * MOST_TILES * 16];
    static uint8_t tiles[MOST_TILES * MOST_K * 64], packed[MOST_ROWS * MOST_K * 2], results[MOST_ROWS * 256],
        unpacked[2 * LLM__TILE_BLOCKS * 1024], wide[MOST_K * 32], one[MOST_K * 32];
    llm__kernel_ending ending = (llm__kernel_ending)random_int(3);
    int rows = 1 + (int)random_int(100), n_tiles = 1 + (int)random_int(MOST_TILES),
        n = 32 * (1 + (int)random_int(random_int(8) ? 6 : MOST_K / 32));
    if (ending == LLM__SWIGLU) n_tiles += n_tiles % 2;
    int width = n_tiles * 16 - (int)random_int(16), column = ending == LLM__SWIGLU ? 16 * (int)random_int(3) : 0;
    size_t bytes = llm__matrix_tile_bytes(kind, n);
    for (int i = 0; i < rows * n; i++) px[i] = llm__bf16_to_f32(llm__f32_to_bf16(random_float()));
    for (int i = 0; i < n_tiles; i++) {
        random_tile(kind, n);
        memcpy(tiles + (size_t)i * bytes, tile, bytes);
    }
    random_floats(y, rows * STRIDE);
    memcpy(expected, y, sizeof y);
    pack_rows(k, px, rows, n, packed);
    llm__kernel_panel panel = {packed, k->line_step, rows,    n,       kind,   tiles, random_int(2) ? tiles : NULL,
                               bytes,  n_tiles,      ending,  y,       STRIDE, width, results,
                               128,    column,       scratch, unpacked};
    k->panel(&panel);
    memset(sums, 0, sizeof sums);
    for (int i = 0; i < n_tiles; i++) {
        const uint8_t *from = tiles + (size_t)i * bytes;
        if (kind == LLM__W_INT8) {
            scalar->unpack(kind, from, n / 32, wide);
            k->unpack(kind, from, n / 32, one);
            check_same("unpack", wide, one, (size_t)n * 32);
        }
        scalar_product(kind, rows, n, px, from, sums + 16 * i, n_tiles * 16);
    }
    for (int r = 0; r < rows; r++) {
        float *to = expected + r * STRIDE, got[128];
        const float *from = sums + r * n_tiles * 16;
        if (ending == LLM__STORE) memcpy(to, from, (size_t)width * 4);
        if (ending == LLM__ADD) scalar->add(to, from, width);
        if (ending != LLM__SWIGLU) continue;
        scalar->swiglu(from, n_tiles * 8, true, a);
        unpack_row(llm__kernel_packed_row(k->line_step, results, 128, (size_t)r), column + n_tiles * 8, got);
        check_same("panel with swiglu", a, got + column, (size_t)n_tiles * 32);
    }
    check_same("panel", y, expected, (size_t)rows * STRIDE * 4);
}

/* One or two tiles whose blocks are not contiguous, as in a cache. */
static void check_tile_product(const llm__kernels *k) {
    static uint8_t packed[112 * 256 * 2];
    const uint8_t *blocks[40];
    bool deep = random_int(8) == 0;
    int rows = 1 + (int)random_int(deep ? 5 : 20), n = 32 * (1 + (int)random_int(deep ? 40 : 8)),
        cols = 1 + (int)random_int(2), stride = cols * 16 + (int)random_int(9);
    llm__weight_type kind = llm__kernel_tile_kind(random_int(2) ? LLM__W_INT8 : LLM__W_BF16, k->line_step);
    size_t next = llm__matrix_tile_bytes(kind, n);
    random_floats(x, rows * n);
    for (int i = 0; i < rows * n; i++) x[i] = llm__bf16_to_f32(llm__f32_to_bf16(x[i]));
    for (int i = 0; i < 2; i++) {
        random_tile(kind, n);
        for (int j = 0; j < 16 && kind == LLM__W_INT8; j++) /* scales are not part of this product */
            ((float *)(void *)(tile + next))[j - 16] = 1;
        memcpy(tiles + (size_t)i * next, tile, next);
    }
    for (int i = 0; i < n / 32; i++) blocks[i] = tiles + i * llm__kernel_block_bytes[kind];
    random_floats(a, 32 * stride);
    pack_rows(k, x, rows, n, packed);
    bool add =
        kind == LLM__W_BF16 && random_int(2); /* the scalar kernel adds sums over int8 only when they are whole */
    for (int i = 0; i < rows * stride && !add; i++)
        if (i % stride < cols * 16) a[i] = 0;
    memcpy(b, a, sizeof a);
    llm__kernel_tile_product p = {packed,
                                  (rows + 15) / 16,
                                  n / 32,
                                  blocks,
                                  next,
                                  n / 32,
                                  cols,
                                  a,
                                  (size_t)stride,
                                  add,
                                  NULL,
                                  0,
                                  0,
                                  NULL,
                                  false,
                                  0,
                                  kind};
    k->tile_product(&p);
    for (int i = 0; i < cols; i++) scalar_product(kind, rows, n, x, tiles + (size_t)i * next, b + 16 * i, stride);
    check_same("tile_product", a, b, (size_t)(rows * stride) * 4);
}

static void check_set(const char *isa) {
    const llm__kernels *k = llm__kernels_choose(isa);
    scalar = llm__kernels_choose("scalar");
    if (!k) {
        print_message("skipped: this machine does not have %s\n", isa);
        skip();
    }
    uint64_t mode = llm__fpu_enter();
    if (k->tiles_enter) k->tiles_enter();
    for (int i = 0; i < ROUNDS && k->panel; i++) {
        check_packs(k);
        check_tile_product(k);
        if (i % 8 == 0) /* panels are large, so fewer rounds */
            for (int kind = 0; kind < LLM__W_Q4; kind++)
                if (kind != LLM__W_F32 && kind != LLM__W_F16) check_panel(k, (llm__weight_type)kind);
    }
    if (k->tiles_leave) k->tiles_leave();
    for (int i = 0; i < ROUNDS; i++) {
        for (int kind = 0; kind < LLM__W_Q4; kind++) {
            bool plain = llm__matrix_is_2_4((llm__weight_type)kind) && i % 4 == 0;
            check_product(plain ? scalar : k, (llm__weight_type)kind);
        }
        for (int kind = LLM__W_Q4; kind < LLM__W_KINDS; kind++) check_group_product(k, (llm__weight_type)kind);
        for (int kind = LLM__W_BF16_2_4; kind <= LLM__W_INT8_2_4; kind++) check_2_4(k, (llm__weight_type)kind);
        check_quantize(k);
        check_rows(k);
    }
    llm__fpu_leave(mode);
}

#if defined(__aarch64__)
static void test_neon(void **state) {
    (void)state;
    check_set("neon");
}
#else
static void test_avx2(void **state) {
    (void)state;
    check_set("avx2");
}
static void test_avx512(void **state) {
    (void)state;
    check_set("avx512");
}
static void test_avx512_bf16(void **state) {
    (void)state;
    check_set("avx512_bf16");
}
static void test_amx(void **state) {
    (void)state;
    check_set("amx");
}
#endif

/* The scalar 2^x compared with libm's in double. */
static void test_exp2(void **state) {
    double worst = 0;
    (void)state;
    scalar = llm__kernels_choose("scalar");
    for (int i = 0; i < 100000; i++) {
        float s[16] = {(float)i * -0.001255f}, max, sum;
        s[1] = 0;
        scalar->softmax(s, 2, 16, 1.0f, false, &max, &sum);
        double error = fabs(s[0] / exp2((double)((float)i * -0.001255f)) - 1);
        if (error > worst) worst = error;
    }
    print_message("2^x: relative error %.2g\n", worst);
    assert_true(worst < 2e-7);
}

/* The scalar silu compared with libm's in double, and its limits. log2(e) * g is rounded before 2^x, so the error grows
   with |g|. */
static void test_silu(void **state) {
    double worst = 0;
    float pair[32] = {0}, y[16];
    (void)state;
    scalar = llm__kernels_choose("scalar");
    pair[16] = 1;
    for (float g = -80; g < 120; g += 0.0013f) {
        pair[0] = g;
        scalar->swiglu(pair, 1, false, y);
        double error = fabs(y[0] / (g / (1 + exp(-(double)g))) - 1);
        if (error > worst) worst = error;
        assert_true(error < 6e-7 + 8e-8 * fabs(g));
    }
    print_message("silu: relative error %.2g\n", worst);
    assert_true(worst < 5e-6);
    pair[0] = -3e38f;
    scalar->swiglu(pair, 1, false, y);
    assert_true(y[0] < 0 && y[0] > -1e3f);
    pair[0] = 3e38f;
    scalar->swiglu(pair, 1, false, y);
    assert_true(y[0] == 3e38f);
}

/* The library's own sine, cosine, 2^x, log2 and square root compared with libm's. */
static void test_functions(void **state) {
    (void)state;
    for (int i = 0; i < 200000; i++) {
        double v = i * 0.37;
        float s, c;
        llm__math_sincos(v, &s, &c);
        assert_true(fabs(s - sin(v)) < 1e-7 && fabs(c - cos(v)) < 1e-7);
        assert_true(fabs(llm__math_log2(v + 0.01) - log2(v + 0.01)) < 1e-14 * 20);
        assert_true(fabs(llm__math_exp2(-v / 1000) / exp2(-v / 1000) - 1) < 1e-15 * 4);
        assert_true(fabs(llm__math_sqrt(v + 1e-9) / sqrt(v + 1e-9) - 1) < 1e-15);
    }
}

/* Rows of bf16 in a file give the same tile whether they are copied or converted via floats: denormals and missing rows
   become zero. */
static void test_bf16_tile(void **state) {
    (void)state;
    for (int round = 0; round < 20; round++) {
        size_t n = 2 * (1 + random_int(60)), k = (n + 31) / 32 * 32;
        static uint8_t rows[16][256], by_floats[128 * 64], copied[128 * 64];
        const uint8_t *raw[16];
        for (size_t lane = 0; lane < 16; lane++) {
            raw[lane] = random_int(8) ? rows[lane] : NULL;
            for (size_t i = 0; i < k; i++) {
                uint16_t half =
                    (uint16_t)(random_int(1 << 16) & (random_int(8) ? 0xFEFF : 0x807F)); /* finite, or denormal */
                memcpy(rows[lane] + 2 * i, &half, 2);
                x[lane * k + i] = raw[lane] && i < n ? llm__bf16_to_f32(half) : 0;
            }
        }
        llm__pack_bf16_tile(llm__kernels_choose("scalar"), by_floats, x, k);
        llm__pack_copy_bf16_tile(copied, raw, n, k);
        assert_memory_equal(copied, by_floats, k * 32);
    }
}

/* Quantized weights stay within half a step of the original; weights from files in groups are kept exactly. */
static void test_packing(void **state) {
    static const struct {
        uint32_t type;
        llm_dtype dtype;
        double steps;
    } cases[] = {{0, LLM_DTYPE_INT8, 0.5001 / 127},
                 {0, LLM_DTYPE_INT4, 0.55 / 15 * 2},
                 {2, LLM_DTYPE_INT4, 0},
                 {3, LLM_DTYPE_INT4, 0},
                 {8, LLM_DTYPE_INT4, 0},
                 {20, LLM_DTYPE_INT4, 0},
                 {0, LLM_DTYPE_F32, 0},
                 {0, LLM_DTYPE_BF16, 1.0 / 256},
                 {0, LLM_DTYPE_F16, 1.0 / 2048},
                 {1, LLM_DTYPE_F16, 0}};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tiny_spec spec = {1, 96, 64, 3, 1, 32, 64, 43, 0, cases[i].type, 5};
        llm_model_desc desc = {.dtype = cases[i].dtype, .n_threads = 1},
                       exact = {.dtype = LLM_DTYPE_F32, .n_threads = 1};
        size_t size;
        uint8_t *data = tiny_model(&spec, &size);
        llm_model *model = NULL, *reference = NULL;
        llm_error err;
        if (llm_model_load_memory(&model, data, size, &desc, &err) ||
            llm_model_load_memory(&reference, data, size, &exact, &err))
            fail_msg("%s", err.message);
        const llm__matrix *m = &((llm__cpu_model *)model->device)->layers[0].gate_up,
                          *r = &((llm__cpu_model *)reference->device)->layers[0].gate_up;
        for (size_t row = 0; row < (size_t)m->n; row++) {
            float held[96], exactly[96];
            double most = 0;
            llm__matrix_get_row(m, row, held);
            llm__matrix_get_row(r, row, exactly);
            for (size_t k = 0; k < 96; k++)
                if (fabs(exactly[k]) > most) most = fabs(exactly[k]);
            for (size_t k = 0; k < 96; k++) assert_true(fabs(held[k] - exactly[k]) <= cases[i].steps * most);
        }
        llm_model_free(model);
        llm_model_free(reference);
        free(data);
    }
}

/* Fills a row of k weights with random blocks, whose f16 numbers are finite. */
static void random_blocks(const llm__file_type_info *type, uint8_t *row, size_t k) {
    uint32_t id = type->type;
    size_t n = k / type->block_weights * type->block_bytes;
    for (size_t i = 0; i < n; i++) row[i] = (uint8_t)random_int(256);
    for (size_t at = 0; at < n; at += type->block_bytes) {
        size_t d = at + (id == LLM__Q2_K ? 80 : id == LLM__Q3_K ? 108 : id == LLM__Q6_K ? 208 : 0);
        for (size_t i = 0; i < 2; i++) { /* d, and m in types that have one */
            uint16_t half = llm__f32_to_f16(random_float());
            if (d + 2 * i + 2 <= at + type->block_bytes) memcpy(&row[d + 2 * i], &half, 2);
        }
    }
}

/* A tile may hold rows of two types with the same packed form, and missing rows between them. */
static void test_mixed_blocks(void **state) {
    enum { ROWS = 16, K = 512 };
    static uint8_t file[ROWS][K];
    const uint8_t *raw[ROWS];
    int types[ROWS];
    (void)state;
    for (int r = 0; r < ROWS; r++) {
        raw[r] = r % 5 ? file[r] : NULL;
        types[r] = r % 5 == 0 ? LLM__F32 : r % 2 ? LLM__Q2_K : LLM__Q3_K;
        if (raw[r]) random_blocks(llm__file_type_find((uint32_t)types[r]), file[r], K);
    }
    memset(tile, 1, sizeof tile);
    llm__matrix m = llm__matrix_init(LLM__W_Q4_K16, ROWS, K);
    m.data = tile;
    llm__pack_groups(m.kind, tile, raw, types, NULL, K);
    for (size_t r = 0; r < ROWS; r++) {
        float held[K], exact[K] = {0};
        if (raw[r]) llm__file_type_find((uint32_t)types[r])->decode(file[r], K, exact);
        llm__matrix_get_row(&m, r, held);
        for (size_t i = 0; i < K; i++) assert_true(held[i] == exact[i]);
        raw[r] = NULL;
    }
    llm__pack_groups(m.kind, tile, raw, types, NULL, K); /* all rows are missing */
    for (size_t i = 0; i < m.tile_bytes; i++) assert_int_equal(tile[i], 0);
    assert_int_equal(tile[m.tile_bytes], 1);
}

/* Random blocks of every type, with finite f16 numbers. The packed weights must be exactly those that the file's type
   defines, and the scalar product must be the sum of weights times integer activations. */
static void test_blocks(void **state) {
    enum { ROWS = 16, K = 512 };
    static uint8_t file[ROWS][K * 4];
    (void)state;
    scalar = llm__kernels_choose("scalar");
    uint64_t mode = llm__fpu_enter();
    for (size_t t = 0; t < LLM__N_TYPES; t++) {
        const llm__file_type_info *type = &llm__file_types[t];
        if (!type->decode || type->block_weights == 1) continue;
        llm__weight_type kind = llm__kernel_kind_of_file((int)type->type);
        const uint8_t *raw[ROWS];
        int types[ROWS];
        assert_true(llm__matrix_has_groups(kind));
        for (size_t r = 0; r < ROWS; r++) {
            raw[r] = file[r];
            types[r] = (int)type->type;
            random_blocks(type, file[r], K);
        }
        llm__matrix m = llm__matrix_init(kind, ROWS, K);
        m.data = tile;
        llm__pack_groups(kind, tile, raw, types, NULL, K);
        float y[16] = {0}, held[ROWS][K], exact[K];
        random_floats(x, K);
        scalar->quantize(x, K, lines[0]);
        const llm__kernel_product p = {.kind = kind,
                                       .n_rows = 1,
                                       .n_tiles = 1,
                                       .k = K,
                                       .groups = lines[0],
                                       .x_stride = K / 32,
                                       .y_stride = 16,
                                       .tiles = tile,
                                       .y = y};
        scalar->group_product(&p);
        for (size_t r = 0; r < ROWS; r++) {
            double sum = 0, size = 0;
            type->decode(file[r], K, exact);
            llm__matrix_get_row(&m, r, held[r]);
            for (size_t i = 0; i < K; i++) {
                if (held[r][i] != exact[i])
                    fail_msg("%s: weight %zu is %.9g instead of %.9g", type->name, i, (double)held[r][i],
                             (double)exact[i]);
                double product = (double)exact[i] * lines[0][i / 32].a[i % 32] * lines[0][i / 32].scale;
                sum += product;
                size += fabs(product);
            }
            if (!(fabs(y[r] - sum) <= 2e-5 * size))
                fail_msg("%s: a product is %.9g instead of %.9g", type->name, (double)y[r], sum);
        }
    }
    llm__fpu_leave(mode);
}

/* Every f16 survives conversion to f32 and back, and values in between round to nearest even. */
static void test_f16(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        if ((h & 0x7C00) == 0x7C00 && (h & 0x3FF)) continue;
        assert_int_equal(llm__f32_to_f16(llm__f16_to_f32((uint16_t)h)), h);
        if ((h & 0x7FFF) >= 0x7BFF) continue;
        double low = llm__f16_to_f32((uint16_t)h), high = llm__f16_to_f32((uint16_t)(h + 1));
        assert_int_equal(llm__f32_to_f16((float)((low + high) / 2)), h + (h & 1));
        assert_int_equal(llm__f32_to_f16((float)(low * 0.51 + high * 0.49)), h);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
#if defined(__aarch64__)
        cmocka_unit_test(test_neon),
#else
        cmocka_unit_test(test_avx2),
        cmocka_unit_test(test_avx512),
        cmocka_unit_test(test_avx512_bf16),
        cmocka_unit_test(test_amx),
#endif
        cmocka_unit_test(test_exp2),
        cmocka_unit_test(test_silu),
        cmocka_unit_test(test_functions),
        cmocka_unit_test(test_bf16_tile),
        cmocka_unit_test(test_packing),
        cmocka_unit_test(test_blocks),
        cmocka_unit_test(test_mixed_blocks),
        cmocka_unit_test(test_f16)
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
