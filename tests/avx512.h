/* AVX-512 with AVX512_BF16 and AVX512_VNNI on processors that only have AVX2: most instructions by SIMDe, the others
   here. Include it before llm.h, which then offers "avx512" and "avx512_bf16" on every machine with AVX2. The results
   are those of the hardware. Source: Intel, "Intrinsics Guide". */
#ifndef AVX512_H
#define AVX512_H

#pragma GCC target("avx2,fma,f16c")
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#include <stdint.h>
#include <string.h>

/* llm.h gives its functions the instruction sets that they need, and asks the processor what it has. */
#define target(sets) target("avx2,fma,f16c")
#define __builtin_cpu_supports(set) __builtin_cpu_supports("avx2")

/* Without AVX-512 no register holds 512 bits, so statements that keep a value in a register are left out. Those with
   instructions are written `__asm__ volatile`, which is not this macro. */
#define __asm__(...)

/* Defines an instruction that computes 16 lanes independently: lane i of the result is `value`, which uses a[i], lane i of
   the argument. */
#define AVX512_LANES(name, RESULT, R, ARGUMENT, A, value) \
    static inline RESULT name(ARGUMENT from) {            \
        A a[16];                                          \
        R r[16];                                          \
        RESULT to;                                        \
        memcpy(a, &from, sizeof a);                       \
        for (int i = 0; i < 16; i++) r[i] = value;        \
        memcpy(&to, r, sizeof r);                         \
        return to;                                        \
    }

/* Rounds to nearest, ties to even. Denormals become zero, and NaNs quiet. */
static inline uint16_t avx512_bf16(uint32_t bits) {
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(bits >> 16 | 0x40);
    if (!(bits & 0x7F800000)) return (uint16_t)(bits >> 16 & 0x8000);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

AVX512_LANES(avx512_cvtepi32_ps, __m512, float, __m512i, int32_t, (float)a[i])
AVX512_LANES(avx512_cvtepi8_epi32, __m512i, int32_t, __m128i, int8_t, a[i])
AVX512_LANES(avx512_cvtepi32_epi8, __m128i, int8_t, __m512i, int32_t, (int8_t)a[i])
AVX512_LANES(avx512_cvtneps_pbh, __m256i, uint16_t, __m512, uint32_t, avx512_bf16(a[i]))

static inline __m512 avx512_cvtph_ps(__m256i a) {
    __m128i halves[2];
    __m256 wide[2];
    __m512 to;
    memcpy(halves, &a, sizeof a);
    for (int i = 0; i < 2; i++) wide[i] = _mm256_cvtph_ps(halves[i]);
    memcpy(&to, wide, sizeof to);
    return to;
}

static inline __m256 avx512_extractf32x8_ps(__m512 a, int half) {
    __m256 halves[2];
    memcpy(halves, &a, sizeof a);
    return halves[half];
}

/* Lane i becomes one of the four lanes around it, chosen by the lowest bits of place i. */
static inline __m512 avx512_permutevar_ps(__m512 a, __m512i places) {
    float from[16], to[16];
    uint32_t place[16];
    memcpy(from, &a, sizeof a);
    memcpy(place, &places, sizeof places);
    for (int i = 0; i < 16; i++) to[i] = from[i / 4 * 4 + place[i] % 4];
    memcpy(&a, to, sizeof a);
    return a;
}

/* The lower half of the result is made from `low`. */
static inline __m512i avx512_cvtne2ps_pbh(__m512 high, __m512 low) {
    const __m256i halves[2] = {avx512_cvtneps_pbh(low), avx512_cvtneps_pbh(high)};
    __m512i to;
    memcpy(&to, halves, sizeof to);
    return to;
}

/* sum += a * b for pairs of bf16: two FMAs, first of the upper halves, then of the lower ones. */
static inline __m512 avx512_dpbf16_ps(__m512 sum, __m512i a, __m512i b) {
    float sums[16], xs[32], ys[32];
    uint16_t as[32], bs[32];
    memcpy(sums, &sum, sizeof sums);
    memcpy(as, &a, sizeof as);
    memcpy(bs, &b, sizeof bs);
    for (int i = 0; i < 32; i++) {
        const uint32_t x = (uint32_t)as[i] << 16, y = (uint32_t)bs[i] << 16;
        memcpy(&xs[i], &x, 4);
        memcpy(&ys[i], &y, 4);
    }
    for (int i = 31; i >= 0; i--)
        sums[i / 2] = _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(xs[i]), _mm_set_ss(ys[i]), _mm_set_ss(sums[i / 2])));
    memcpy(&sum, sums, sizeof sum);
    return sum;
}

#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtneps_pbh
#undef _mm512_cvtph_ps
#undef _mm512_extractf32x8_ps
#undef _mm512_permutevar_ps
#undef _mm512_cvtne2ps_pbh
#undef _mm512_dpbf16_ps
#undef _mm512_madd_epi16 /* SIMDe 0.7.4 defines it with too many arguments */
#define _mm512_cvtepi32_ps avx512_cvtepi32_ps
#define _mm512_cvtepi8_epi32 avx512_cvtepi8_epi32
#define _mm512_cvtepi32_epi8 avx512_cvtepi32_epi8
#define _mm512_cvtneps_pbh avx512_cvtneps_pbh
#define _mm512_cvtph_ps avx512_cvtph_ps
#define _mm512_extractf32x8_ps avx512_extractf32x8_ps
#define _mm512_permutevar_ps avx512_permutevar_ps
#define _mm512_cvtne2ps_pbh avx512_cvtne2ps_pbh
#define _mm512_dpbf16_ps(sum, a, b) avx512_dpbf16_ps(sum, (__m512i)(a), (__m512i)(b))
#define _mm512_madd_epi16 simde_mm512_madd_epi16

#endif
