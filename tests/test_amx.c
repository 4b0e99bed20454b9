/* test_kernels.c, and test_hash.c's small models, with the matrix unit in plain C: its kernels are tested where there is
   none, and give the same bits as the others.
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
