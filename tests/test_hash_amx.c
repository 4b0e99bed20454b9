/* test_hash.c's small models with the matrix unit in plain C: the same bits as without one.
   Variants: asan */
#include "tests/tiles.h"
#define LLM_IMPLEMENTATION
#include "tests/test_hash.c"
