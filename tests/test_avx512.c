/* Tests the kernels for AVX-512, AVX512_BF16 and the matrix unit on machines without them: test_kernels.c and the small
   models of test_hash.c, with these instructions in plain C or by AVX2. Only gcc compiles this, and only for x86-64. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include "tests/avx512.h"
#include "tests/tiles.h"
#define LLM_IMPLEMENTATION
#define main test_the_kernels
#include "tests/test_kernels.c"
#undef main
#define main test_the_hashes
#include "tests/test_hash.c"
#undef main

static int this_machine_runs(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2");
}
#else
static int this_machine_runs(void) { return 0; }
static int test_the_kernels(void) { return 0; }
static int test_the_hashes(void) { return 0; }
#endif

#include "tests/check.h"

static void test_nothing(void **state) {
    (void)state;
    print_message("skipped: the kernels of AVX-512 can be tested on x86-64 with AVX2, compiled by gcc\n");
    skip();
}

int main(void) {
    const struct CMUnitTest none[] = {cmocka_unit_test(test_nothing)};
    if (!this_machine_runs()) return cmocka_run_group_tests(none, NULL, NULL);
    return test_the_kernels() + test_the_hashes();
}
