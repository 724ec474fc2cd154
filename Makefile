# metala.c - a C compiler, make and libc are all that is needed.
#
#   make                the programs: ./train ./run ./test data/stories data/tasks
#   make demo           a corpus of stories, two minutes of training, a story told
#   make test           all checks             make test64   the same in double precision, with tighter tolerances
#   make asan           all checks under the address and undefined-behaviour sanitizers; then each allocation is refused once
#   make test-programs  tries every flag and every error of the programs
#   make mutants        plants faults in metala.c and requires that the checks notice each (COUNT=6 for a sample)
#   make bench          speed of every kernel, as a share of what this machine can do, and of training steps
#   make bench-peers    a training step in turn with PyTorch's, where python3 has torch; with LLAMA2C=folder decoding with
#                       llama2.c's, with LLMC=folder training with llm.c's, built there (bench/peers.sh says what they need)
#   make CUDA=1         with the kernels of cuda_metala.cu, for --device cuda; without nvcc the CPU's programs alone
#   make bench-cuda     speed of the GPU's kernels, as a share of what it does in a large product or copy (with CUDA=1)
#   make gpu-report     all that only a GPU can say, in one go: checks, sanitizers, speed, PyTorch's where it is (with CUDA=1)
#   make test-cuda      the GPU against the CPU: every kernel, models, golden files (make CUDA=1 test-cuda)
#   make test-emu       the kernels of cuda_metala.cu on the CPU, without nvcc or a GPU (make -j2 test-emu, needs a C++
#                       compiler); make emu-thread looks for races with the thread sanitizer, which takes long
#   make test-ptx       what nvcc made of those kernels, run on the CPU in place of a GPU (make -j2 test-ptx, needs nvcc, g++)
#   make emu-traffic    what each line of the kernels costs in sectors of global memory and banks of shared memory, in one step
#                       (needs g++)
#   make cuda-mutants   plants faults in cuda_metala.cu and requires that test-emu notices each; make ptx-mutants faults that
#                       only nvcc sees
#   make clean
#
#   make CC=clang       another compiler       make PORTABLE=1   for any machine with this instruction set
#   make OPENMP=0       one thread             make CFLAGS=...   flags of your own in place of all those below
#   make CUDA=1 CUDA_ARCH="80 90a"  the GPUs to compile for; newer ones translate the last. 90a: an H100's own products (wgmma)
#   make CUDA=1 CUBLAS=1            matrix products by cuBLAS, to compare with
#   make GOLDEN=DIR test   compare with the golden files in DIR (default ../shared/golden, skipped when not there)

# What this compiler understands is tried, not guessed: $(call works,flags) is "flags" or nothing.
TRIAL := build/trial
$(shell mkdir -p build; printf '#ifdef _OPENMP\n#include <omp.h>\n#endif\nint main(void) { return 0; }\n' > $(TRIAL).c)
works = $(shell $(CC) -Werror $(1) -o $(TRIAL) $(TRIAL).c >/dev/null 2>&1 && echo '$(1)')

# -march=native     the widest vector instructions of this machine (-mcpu on ARM compilers without it)
# -ffp-contract     a·b + c as one fused instruction; clang and gcc then agree about it
# -fno-math-errno   sqrt as an instruction; nothing here reads errno after mathematics
# -fno-trapping-math  lets selects like x < 0 ? a : b become vector instructions. NaN and infinity stay what they are.
WARNINGS := $(call works,-std=c99 -pedantic -Wall -Wextra)
FAST     := $(call works,-O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math)
ifndef PORTABLE
NATIVE   := $(or $(call works,-march=native),$(call works,-mcpu=native))
endif
ifneq ($(OPENMP),0)
THREADS  := $(or $(call works,-fopenmp),$(call works,-Xpreprocessor -fopenmp -lomp))
endif
CFLAGS   := $(or $(WARNINGS),-std=c99) $(or $(FAST),-O2) $(NATIVE) $(THREADS)
LDLIBS   := -lm

# nvcc is looked for in PATH, $CUDA_HOME and /usr/local/cuda.
CUDA_ARCH ?= 80 90a
NVCC_FOUND = $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc))
ifneq ($(filter-out 0,$(CUDA)),)
NVCC := $(NVCC_FOUND)
ifdef NVCC
CUDA_LIB  := $(dir $(NVCC))../lib64
NVCCFLAGS := -std=c++17 -O3 $(foreach a,$(filter-out $(if $(filter 90a,$(CUDA_ARCH)),90),$(CUDA_ARCH)),-gencode arch=compute_$(a),code=sm_$(a)) \
             $(foreach a,$(patsubst %a,%,$(lastword $(CUDA_ARCH))),-gencode arch=compute_$(a),code=compute_$(a))
GPU       := build/cuda_metala.o
CUDA_LIBS := -lcudart_static -lstdc++ -lpthread -ldl -lrt
DEFINES   := -DMETALA_CUDA $(if $(filter 90a,$(CUDA_ARCH)),-DMETALA_WGMMA)
NVCCFLAGS += $(if $(filter 90a,$(CUDA_ARCH)),,-diag-suppress 177)          # what only those products use
ifneq ($(filter-out 0,$(CUBLAS)),)
DEFINES   += -DMETALA_CUBLAS
NVCCFLAGS += -diag-suppress 177              # the kernels that it replaces stay in the file, unused
CUDA_LIBS := -lcublas -Wl,-rpath,$(CUDA_LIB) $(CUDA_LIBS)
endif
LDLIBS    += -L$(CUDA_LIB) $(CUDA_LIBS)
endif
endif

FOUND := $(notdir $(CC)), $(or $(NATIVE),any machine of this kind), OpenMP: $(if $(THREADS),yes,no)$(if \
         $(filter-out 0,$(CUDA)),$(if $(NVCC),$(strip , CUDA: $(NVCC) for $(CUDA_ARCH)),$(strip , CUDA: no nvcc in \
         PATH, CUDA_HOME/bin or /usr/local/cuda/bin; building for the CPU)))
BUILT_WITH = $(CC) $(CFLAGS) $(LDFLAGS)$(if $(GPU), $(NVCC) $(NVCCFLAGS) $(DEFINES)), $(CXX)
LINK  = $(CC) $(CFLAGS) $(LDFLAGS) -o $@ $(filter %.o,$^) $(LDLIBS)

all: train run build/test data/stories data/tasks

build/%.o: %.c metala.h build/flags
	$(CC) $(CFLAGS) $(DEFINES) -c -o $@ $<
build/%.o: %.cu metala.h build/flags
	$(NVCC) $(NVCCFLAGS) $(DEFINES) -c -o $@ $<
train: build/train.o build/metala.o $(GPU)
	$(LINK)
run: build/run.o build/metala.o $(GPU)
	$(LINK)
build/test: build/test.o build/metala.o $(GPU)   # and ./test: the name "test" is the target below
	$(LINK)
	cp $@ test
data/stories data/tasks: %: %.c data/common.h build/flags
	$(CC) $(CFLAGS) $(LDFLAGS) -o $@ $<

# Rewritten when the compiler or its flags change; everything is then built anew.
build/flags: FORCE
	@echo '$(BUILT_WITH)' | cmp -s - $@ || { echo '$(FOUND)'; echo '$(BUILT_WITH)' > $@; }
FORCE:

GOLDEN ?= ../shared/golden
WITH_GOLDEN = $(if $(filter-out file,$(origin GOLDEN))$(wildcard $(GOLDEN)),--golden $(GOLDEN))
test: build/test
	./test $(WITH_GOLDEN)

test-cuda: build/test
	./test --device cuda $(WITH_GOLDEN)

test64: build/flags
	$(CC) $(CFLAGS) -DMETALA_FLOAT64 $(LDFLAGS) -o build/test64 test.c metala.c $(LDLIBS)
	build/test64 $(WITH_GOLDEN)

SANITIZE = $(or $(WARNINGS),-std=c99) -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
asan: build/flags
	$(CC) $(SANITIZE) $(LDFLAGS) -o build/test-asan test.c metala.c $(LDLIBS)
	$(CC) $(SANITIZE) $(LDFLAGS) -I. -o build/memory-asan tests/memory.c $(LDLIBS)
	ASAN_OPTIONS=allocator_may_return_null=1 build/memory-asan
	ASAN_OPTIONS=allocator_may_return_null=1 build/test-asan $(WITH_GOLDEN)

test-programs: all build/train-failing
	tests/programs.sh
build/train-failing: tests/failing.c train.c build/metala.o $(GPU)
	$(CC) $(CFLAGS) $(DEFINES) $(LDFLAGS) -I. -o $@ tests/failing.c build/metala.o $(GPU) $(LDLIBS)

mutants: build/flags
	CC='$(CC)' CFLAGS='$(WARNINGS) -O1 $(NATIVE)' tests/mutants.sh $(COUNT)

# The kernels of cuda_metala.cu on the CPU, where emulator/cuda_on_cpu.h makes each of their threads a fiber: in three orders
# of threads and blocks, in the three kinds of arithmetic, under the sanitizers for addresses and undefined behaviour, and on
# GPUs without the instructions for warpgroups (compute capability 8.0) or with as little shared memory as those for desktops
# have (8.6).
EMU_WITH_address := -fsanitize=address,undefined -fno-sanitize-recover=all
EMU_WITH_thread  := -fsanitize=thread
EMU_WITH_gdb     := -O0 -ggdb3
EMU_C  = $(CC) $(or $(WARNINGS),-std=c99) -O1 -g $(NATIVE) -DMETALA_CUDA -I.
EMU_CU = $(CXX) -std=c++17 -Wall -Wextra -Wno-unknown-pragmas -Wno-pass-failed -O1 -g $(NATIVE) -I. -x c++ -include emulator/cuda_on_cpu.h
build/emu-%/test: test.c metala.c metala.h cuda_metala.cu emulator/cuda_on_cpu.h build/flags
	@mkdir -p $(@D)
	$(EMU_C) $(EMU_WITH_$*) -c -o $(@D)/test.o test.c
	$(EMU_C) $(EMU_WITH_$*) -c -o $(@D)/metala.o metala.c
	$(EMU_CU) $(EMU_WITH_$*) -c -o $(@D)/cuda_metala.o cuda_metala.cu
	$(CXX) $(EMU_WITH_$*) -o $@ $(@D)/test.o $(@D)/metala.o $(@D)/cuda_metala.o
build/emu-%/selftest: emulator/selftest.cu emulator/cuda_on_cpu.h build/flags
	@mkdir -p $(@D)
	$(EMU_CU) $(EMU_WITH_$*) -o $@ emulator/selftest.cu

EMU_RUNS := emu-forward emu-reverse emu-random emu-tf32 emu-bf16 emu-address
emu-forward: ORDER = forward
emu-reverse: ORDER = reverse
emu-reverse: CAPABILITY = 86
emu-tf32:    CAPABILITY = 80
emu-tf32:    MATH = tf32
emu-bf16:    MATH = bf16
emu-address: KIND = address
emu-thread:  KIND = thread
KIND  = plain
ORDER = random
MATH  = exact
CAPABILITY = 90
test-emu: $(EMU_RUNS)
emu-address: build/emu-address/test build/emu-address/selftest
emu-thread: build/emu-thread/test build/emu-thread/selftest
$(filter-out emu-address,$(EMU_RUNS)): build/emu-plain/test build/emu-plain/selftest
$(EMU_RUNS) emu-thread:
	@build/emu-$(KIND)/selftest > build/$@.log 2>&1 && CUDA_ORDER=$(ORDER) CUDA_ASYNC=1 CUDA_LEAKS=fail CUDA_CAPABILITY=$(CAPABILITY) \
	    ASAN_OPTIONS=allocator_may_return_null=1 build/emu-$(KIND)/test --device cuda --math $(MATH) $(WITH_GOLDEN) \
	    >> build/$@.log 2>&1 || { grep -a -A 6 -E 'FAILED|cuda_on_cpu|Sanitizer' build/$@.log | head -n 60; tail -n 3 build/$@.log; exit 1; }
	@echo "$@ ($(KIND), $(ORDER) order, $(MATH), $(CAPABILITY)): $$(tail -n 1 build/$@.log)"

# The kernels as nvcc compiles them, for compute capability 8.0 and with an H100's own instructions (90a), executed on the CPU by
# emulator/ptx_on_cpu.cpp, which is linked in place of the CUDA runtime. ptx-90-tf32: on a device that says it is a 9.0, in tf32.
NVCC_NEEDED = $(or $(NVCC_FOUND),$(error no nvcc in PATH, CUDA_HOME/bin or /usr/local/cuda/bin))
PTX_NVCC = $(NVCC_NEEDED) -std=c++17 -O3 --no-compress -lineinfo \
           -diag-suppress 177 $(foreach a,80 90a,-gencode arch=compute_$(a),code=compute_$(a)) -DMETALA_WGMMA -DMETALA_CUDA -DPTX_ON_CPU
build/ptx_on_cpu.o: emulator/ptx_on_cpu.cpp build/flags
	$(CXX) -std=c++17 -Wall -Wextra -O2 -g $(NATIVE) -I$(dir $(NVCC_NEEDED))../include -c -o $@ $<
build/ptx/test: test.c metala.c metala.h cuda_metala.cu build/ptx_on_cpu.o build/flags
	@mkdir -p $(@D)
	$(EMU_C) -c -o $(@D)/test.o test.c
	$(EMU_C) -c -o $(@D)/metala.o metala.c
	$(PTX_NVCC) -c -o $(@D)/cuda_metala.o cuda_metala.cu
	$(CXX) -o $@ $(@D)/test.o $(@D)/metala.o $(@D)/cuda_metala.o build/ptx_on_cpu.o
build/ptx/selftest: emulator/selftest.cu build/ptx_on_cpu.o build/flags
	@mkdir -p $(@D)
	$(PTX_NVCC) -c -o $(@D)/selftest.o emulator/selftest.cu
	$(CXX) -o $@ $(@D)/selftest.o build/ptx_on_cpu.o

PTX_RUNS := ptx-90-exact ptx-90-tf32 ptx-90-bf16 ptx-80-tf32 ptx-80-bf16
test-ptx: ptx-selftest $(PTX_RUNS)
ptx-selftest: build/ptx/selftest
	@build/ptx/selftest > build/$@.log 2>&1 || { grep -a -A 6 FAILED build/$@.log; exit 1; }
	@echo "$@: $$(tail -n 1 build/$@.log)"
$(PTX_RUNS): PARTS = $(subst -, ,$@)
$(PTX_RUNS): build/ptx/test
	@CUDA_CAPABILITY=$(word 2,$(PARTS)) build/ptx/test --device cuda --math $(word 3,$(PARTS)) $(WITH_GOLDEN) > build/$@.log 2>&1 || \
	    { grep -a -A 6 -E 'FAILED|ptx_on_cpu' build/$@.log | head -n 60; tail -n 3 build/$@.log; exit 1; }
	@echo "$@: $$(tail -n 1 build/$@.log)"

ptx-mutants: build/ptx/test
	SOURCE=cuda_metala.cu LIST=tests/ptx_mutants.txt \
	BUILD='$(PTX_NVCC) -I. -c -o $$dir/cuda_metala.o $$dir/cuda_metala.cu && \
	    $(CXX) -o $$dir/test build/ptx/test.o build/ptx/metala.o $$dir/cuda_metala.o build/ptx_on_cpu.o' \
	CHECK='try() { ./test --device cuda --math $$1 --only "$$2" --stop || exit 1; }; \
	    try bf16 "kernel scan"; try bf16 "kernel matmul"; try tf32 "kernel matmul"; try exact recorded; try bf16 "kernel swiglu"; \
	    export CUDA_CAPABILITY=80; try bf16 "kernel matmul"; try tf32 "kernel matmul"' \
	tests/mutants.sh $(COUNT)

# The calls that the thread sanitizer has the compiler make before each access, answered by emulator/traffic.cpp.
# By g++ alone: -fno-tree-sra keeps a float4 one access of 16 bytes, for which clang has no such word. With DWARF 5 gcc 12 gives
# the lines of the header to the .cu file.
TRAFFIC_CU = $(EMU_CU) -gdwarf-4 -fno-tree-sra -DEMU_TRAFFIC
build/emu-traffic/train: train.c metala.c metala.h cuda_metala.cu emulator/cuda_on_cpu.h emulator/traffic.cpp build/flags
	@mkdir -p $(@D)
	$(EMU_C) -c -o $(@D)/train.o train.c
	$(EMU_C) -c -o $(@D)/metala.o metala.c
	$(TRAFFIC_CU) -fsanitize=thread -c -o $(@D)/cuda_metala.o cuda_metala.cu
	$(TRAFFIC_CU) -c -o $(@D)/traffic.o emulator/traffic.cpp
	$(CXX) -o $@ $(@D)/train.o $(@D)/metala.o $(@D)/cuda_metala.o $(@D)/traffic.o
build/emu-traffic/selftest: emulator/selftest.cu emulator/cuda_on_cpu.h emulator/traffic.cpp build/flags
	@mkdir -p $(@D)
	$(TRAFFIC_CU) -fsanitize=thread -c -o $(@D)/selftest.o emulator/selftest.cu
	$(TRAFFIC_CU) -c -o $(@D)/traffic-of-selftest.o emulator/traffic.cpp
	$(CXX) -o $@ $(@D)/selftest.o $(@D)/traffic-of-selftest.o
emu-traffic: MATH = bf16
emu-traffic: build/emu-traffic/selftest build/emu-traffic/train data/stories
	TRAFFIC=0 TRAFFIC_KERNEL=traffic build/emu-traffic/selftest > build/emu-traffic.log || { cat build/emu-traffic.log; exit 1; }
	data/stories --bytes 20k > build/traffic.txt
	build/emu-traffic/train build/traffic.txt --device cuda --math $(MATH) --width 256 --layers 1 --heads 2 -T 128 -B 1 \
	    --max-steps 1 --val-fraction 0 --quiet --out build/traffic.safetensors

# Of the checks, those of single kernels; of the compiler's time, what debug information takes is saved.
cuda-mutants: build/emu-plain/test
	SOURCE=cuda_metala.cu LIST=tests/cuda_mutants.txt \
	BUILD='$(subst -g ,,$(EMU_CU)) -c -o $$dir/cuda_metala.o $$dir/cuda_metala.cu && \
	    $(CXX) -o $$dir/test build/emu-plain/test.o build/emu-plain/metala.o $$dir/cuda_metala.o' \
	CHECK='try() { CUDA_ORDER=$$1 ./test --device cuda --math $$2 --only "$$3" --stop || exit 1; }; \
	    export CUDA_CAPABILITY=86; try random bf16 "kernel scan"; try random tf32 "kernel matmul_forward B1 T2030"; \
	    export CUDA_CAPABILITY=80; try random tf32 "kernel matmul"; unset CUDA_CAPABILITY; \
	    try forward exact "kernel "; try reverse tf32 "kernel "; try random exact "kernel "; try random bf16 "kernel "; \
	    try reverse exact "kernel "; try forward exact scalar; try forward exact matmul; \
	    try forward exact adamw; try forward exact recorded' \
	tests/mutants.sh $(COUNT)

build/bench: build/bench.o build/metala.o $(GPU)
	$(LINK)
build/bench.o: bench/bench.c metala.h build/flags
	$(CC) $(CFLAGS) $(DEFINES) -I. -c -o $@ $<
bench: build/bench train
	build/bench
	./train --bench
	./train --bench --width 512 --layers 8 --heads 8 --glu-dim 1408 --vocab 8192

# All that only a GPU can say: checks, speed, and PyTorch's speed where it is installed; or our own speed alone.
gpu-report: build/test build/bench build/selftest-cuda train
	bench/gpu.sh $(WITH_GOLDEN)
bench-cuda: build/test build/bench train
	PARTS="bench train" bench/gpu.sh
build/selftest-cuda: emulator/selftest.cu build/flags
	$(if $(GPU),,$(error only with CUDA=1, and nvcc in PATH, CUDA_HOME/bin or /usr/local/cuda/bin))
	$(NVCC) $(NVCCFLAGS) $(DEFINES) -o $@ $<

bench-peers: train run
	bench/peers.sh
	bench/bench.sh
	bench/bench.sh --width 512 --layers 8 --heads 8 --glu-dim 1408 --vocab 8192

demo: train run data/stories
	data/stories --bytes 4M > build/stories.txt
	./train build/stories.txt --out build/stories.safetensors --context 512 --batch 2 --heads 2 \
	    --gate-scale 16 --gate-mean 200 --learning-rate 0.003 --beta2 0.99 --max-seconds 110 --eval-batches 32 \
	    --sample-every 400 --sample-tokens 250 --prompt "One day, " --temperature 0.3 $(DEMO)
	./run build/stories.safetensors "One day, " --tokens 900 --temperature 0.3 --seed 1

clean:
	rm -rf build train run test data/stories data/tasks

.PHONY: all test gpu-report bench-cuda test-cuda test64 asan test-programs mutants bench bench-peers demo clean FORCE
.PHONY: test-emu $(EMU_RUNS) emu-thread emu-traffic cuda-mutants
.PHONY: test-ptx ptx-selftest $(PTX_RUNS) ptx-mutants
.SECONDARY:
