/* Tests the kernels for the matrix unit (AMX) on machines without one, by simulating the unit in plain C. Runs
   test_kernels.c and the small models of test_hash.c, which must give the same bits as with other kernels.
   Variants: asan */
#include "tests/tiles.h"
#define LLM_IMPLEMENTATION
#define main test_the_kernels
#include "tests/test_kernels.c"
#undef main
#define main test_the_hashes
#include "tests/test_hash.c"
#undef main

int main(void) { return test_the_kernels() + test_the_hashes(); }
