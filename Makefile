# make help  says what there is to make.

MODEL    = $(SMOLLM2)
SMOLLM2 := models/SmolLM2-135M-Instruct.Q4_1.gguf

CFLAGS   = -O2
CXXFLAGS = -O2
WARNINGS = -Wall -Wextra -pedantic
LDLIBS   = $(if $(filter repl,$(@F)),-ledit) $(if $(filter tokenize test_tokenizer test_tokenizer_files test_chat,$(@F)),-ljansson) $(if $(filter test_%,$(@F)),-lcmocka) $(if $(filter test_cuda,$(@F)),-lboost_context) -lm -lpthread
PROGRAMS = build/repl build/hello build/tokenize build/embed build/quantize build/bench

# Every .c file is a program. build/NAME is made with your compiler and flags, build/VARIANT/NAME with these:
COMPILE_build              = $(CC) $(CFLAGS)
COMPILE_asan               = clang -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
COMPILE_tsan               = gcc -O1 -g -fsanitize=thread
COMPILE_gcc-O1             = gcc -O1
COMPILE_gcc-O3-fast-math   = gcc -O3 -ffast-math
COMPILE_clang-O1           = clang -O1
COMPILE_clang-O2           = clang -O2
COMPILE_clang-O3-fast-math = clang -O3 -ffast-math
MATRIX                     = gcc-O1 gcc-O3-fast-math clang-O1 clang-O2 clang-O3-fast-math

# Debian packages, each with what shows that it is there.
NEEDED_TO_RUN   = libedit-dev:histedit.h libstb-dev:stb/stb_ds.h
NEEDED_TO_BUILD = $(NEEDED_TO_RUN) libjansson-dev:jansson.h g++:g++
NEEDED_TO_TEST  = $(NEEDED_TO_BUILD) clang:clang libcmocka-dev:cmocka.h \
                  libclang-rt-dev:/usr/lib/llvm-*/lib/clang/*/lib/linux/libclang_rt.asan-x86_64.a \
                  libboost-context-dev:/usr/include/boost/context/detail/fcontext.hpp

MAKEFLAGS += --no-builtin-rules --no-print-directory --silent
vpath %.c examples tokenizer tests bench
vpath %.sh tests

.SECONDARY:
.PHONY: all run test test-cuda model deps clean help
all:
	.ci/need $(NEEDED_TO_BUILD)
	$(MAKE) $(PROGRAMS)

run:
	.ci/need $(NEEDED_TO_RUN)
	$(MAKE) build/repl $(filter $(SMOLLM2),$(MODEL))
	build/repl -m $(MODEL) --raw -p "Hello, my name is" -n 200

model: $(SMOLLM2)

$(SMOLLM2):
	examples/fetch-model.sh $@

# ---- Programs -------------------------------------------------------------------------------------------------------

define program
$1/%: %.c llm.h $$(wildcard tests/*.h)
	mkdir -p $$(@D)
	echo "  compile $$@"
	$$(COMPILE_$(notdir $1)) -std=c99 $$(WARNINGS) -I. $$(CPPFLAGS) -o $$@ $$< $$(LDFLAGS) $$(LDLIBS)
endef
$(foreach dir,build $(addprefix build/,asan tsan $(MATRIX)),$(eval $(call program,$(dir))))

build/embed: examples/embed.cpp examples/embed_llm.cpp llm.h
	mkdir -p $(@D)
	echo "  compile $@"
	$(CXX) $(CXXFLAGS) -std=c++17 $(WARNINGS) -I. $(CPPFLAGS) -o $@ $(filter %.cpp,$^) $(LDFLAGS) $(LDLIBS)

# Tests that include the program, or the test, that they test.
$(foreach dir,build build/asan,$(dir)/test_quantize): examples/quantize.c
$(foreach dir,build build/asan,$(dir)/test_kernels_amx): tests/test_kernels.c
$(foreach dir,build build/asan,$(dir)/test_hash_amx): tests/test_hash.c

# The GPU's kernels, run on the CPU.
$(foreach dir,build build/asan,$(dir)/test_cuda): tests/test_cuda.cpp llm_cuda.cu llm.h $(wildcard tests/*.h tests/cuda_host/*)
	mkdir -p $(@D)
	echo "  compile $@"
	$(if $(filter build/asan/%,$@),$(subst clang,clang++,$(COMPILE_asan)),$(CXX) $(CXXFLAGS)) -std=c++17 $(WARNINGS) -Wno-unknown-pragmas -fno-strict-aliasing \
		-Itests/cuda_host -I. $(CPPFLAGS) -o $@ -x c++ $(filter %.cpp %.cu,$^) -x none $(LDFLAGS) $(LDLIBS)

# ---- Tests ----------------------------------------------------------------------------------------------------------

# Every tests/test_NAME.c (cmocka), .cpp (the same) or .sh (printing TAP) is a test. It runs as it is and in the variants that its text
# names in a line "Variants: asan tsan matrix". A script finds the programs it tests beside itself.
SOURCES := $(wildcard tests/test_*.c tests/test_*.cpp tests/test_*.sh)
names    = $(basename $(notdir $1))
variant  = $(call names,$(shell grep -l 'Variants:.*\b$1\b' $(SOURCES) /dev/null))
ALL_TESTS    := $(call names,$(SOURCES))
ASAN_TESTS   := $(call variant,asan)
TSAN_TESTS   := $(call variant,tsan)
MATRIX_TESTS := $(call variant,matrix)
ALL_RUNS = $(ALL_TESTS:%=build/%) $(ASAN_TESTS:%=build/asan/%) $(TSAN_TESTS:%=build/tsan/%) \
           $(foreach dir,$(MATRIX),$(MATRIX_TESTS:%=build/$(dir)/%))
RUNS = $(if $T,$(foreach run,$(ALL_RUNS),$(if $(findstring $T,$(run)),$(run))),$(ALL_RUNS))

build/%: %.sh $(PROGRAMS)
	install $< $@

build/asan/%: %.sh build/asan/repl build/asan/hello build/asan/tokenize
	install $< $@

# T=tokenizer runs the tests with that in their name.
test:
	.ci/need $(NEEDED_TO_TEST)
	$(MAKE) $(SMOLLM2)
	$(MAKE) -k -j$$(nproc) $(RUNS) || true
	LLM_MODEL=$(SMOLLM2) tests/run.sh $(RUNS)

# llm_cuda.cu, without a GPU.
test-cuda:
	$(MAKE) test T=cuda

# ---- The rest -------------------------------------------------------------------------------------------------------

deps:
	.ci/need $(NEEDED_TO_TEST)

clean:
	rm -rf build

help:
	echo "make             build $(PROGRAMS)"
	echo "make run         fetch the default model once and let it continue a text; MODEL=path takes another"
	echo "make test        everything that is checked (about a quarter of an hour); T=name runs the tests of that name"
	echo "make test-cuda   of these, the ones for llm_cuda.cu; no GPU is needed"
	echo "make model       fetch the default model"
	echo "make deps        install what building and testing need (Debian)"
	echo "make clean       remove build/; models/ stays"
