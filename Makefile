# metala.c - a C compiler, make and libc are all that is needed.
#
#   make                the programs: ./train ./run ./test data/stories
#   make demo           a corpus of stories, two minutes of training, a story told
#   make test           all checks             make test64   the same in double precision, with tighter tolerances
#   make asan           all checks under the address and undefined-behaviour sanitizers
#   make test-programs  tries every flag and every error of the programs
#   make mutants        plants faults in metala.c and requires that the checks notice each (COUNT=6 for a sample)
#   make bench          speed of every kernel, as a share of what this machine can do, and of training steps
#   make bench-peers    a training step in turn with PyTorch's, where python3 has torch
#   make clean
#
#   make CC=clang       another compiler       make PORTABLE=1   for any machine with this instruction set
#   make OPENMP=0       one thread             make CFLAGS=...   flags of your own in place of all those below
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

FOUND := $(notdir $(CC)), $(or $(NATIVE),any machine of this kind), OpenMP: $(if $(THREADS),yes,no)
LINK  = $(CC) $(CFLAGS) $(LDFLAGS) -o $@ $(filter %.o,$^) $(LDLIBS)

all: train run build/test data/stories

build/%.o: %.c metala.h build/flags
	$(CC) $(CFLAGS) -c -o $@ $<
train: build/train.o build/metala.o
	$(LINK)
run: build/run.o build/metala.o
	$(LINK)
build/test: build/test.o build/metala.o          # and ./test: the name "test" is the target below
	$(LINK)
	cp $@ test
data/stories: data/stories.c build/flags
	$(CC) $(CFLAGS) $(LDFLAGS) -o $@ $<

# Rewritten when the compiler or its flags change; everything is then built anew.
build/flags: FORCE
	@echo '$(CC) $(CFLAGS) $(LDFLAGS)' | cmp -s - $@ || { echo '$(FOUND)'; echo '$(CC) $(CFLAGS) $(LDFLAGS)' > $@; }
FORCE:

GOLDEN ?= ../shared/golden
test: build/test
	./test --golden $(GOLDEN)

test64: build/flags
	$(CC) $(CFLAGS) -DMETALA_FLOAT64 $(LDFLAGS) -o build/test64 test.c metala.c $(LDLIBS)
	build/test64 --golden $(GOLDEN)

SANITIZE = $(or $(WARNINGS),-std=c99) -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
asan: build/flags
	$(CC) $(SANITIZE) $(LDFLAGS) -o build/test-asan test.c metala.c $(LDLIBS)
	ASAN_OPTIONS=allocator_may_return_null=1 build/test-asan --golden $(GOLDEN)

test-programs: all
	tests/programs.sh

mutants: build/flags
	CC='$(CC)' CFLAGS='$(WARNINGS) -O1 $(NATIVE)' tests/mutants.sh $(COUNT)

build/bench: build/bench.o build/metala.o
	$(LINK)
build/bench.o: bench/bench.c metala.h build/flags
	$(CC) $(CFLAGS) -I. -c -o $@ $<
bench: build/bench train
	build/bench
	./train --bench
	./train --bench --width 512 --layers 8 --heads 8 --glu-dim 1408 --vocab 8192

bench-peers: train
	bench/bench.sh
	bench/bench.sh --width 512 --layers 8 --heads 8 --glu-dim 1408 --vocab 8192

demo: train run data/stories
	data/stories --bytes 4M > build/stories.txt
	./train build/stories.txt --out build/stories.safetensors --context 512 --batch 2 --heads 2 --gate-scale 16 --gate-mean 200 \
	    --learning-rate 0.003 --beta2 0.99 --max-seconds 110 --eval-batches 32 --sample-every 400 --sample-tokens 250 --prompt "One day, " --temperature 0.3 $(DEMO)
	./run build/stories.safetensors "One day, " --tokens 900 --temperature 0.3 --seed 1

clean:
	rm -rf build train run test data/stories

.PHONY: all test test64 asan test-programs mutants bench bench-peers demo clean FORCE
