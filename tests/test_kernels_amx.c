/* test_kernels.c with the matrix unit in plain C, so that its kernels are tested where there is none.
   Variants: asan */
#include "tests/tiles.h"
#define LLM_IMPLEMENTATION
#include "tests/test_kernels.c"
