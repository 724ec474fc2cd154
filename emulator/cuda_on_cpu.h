// cuda_on_cpu.h - runs the kernels of a .cu file on the CPU, every CUDA thread of a block as a fiber.
//
//     g++ -std=c++17 -O1 -g -x c++ -include emulator/cuda_on_cpu.h file.cu -o file
//         ... -fopenmp                        blocks side by side
//         ... -fsanitize=address,undefined    out-of-bounds accesses, with file and line
//         ... -fsanitize=thread               races between the threads of a block
//         ... and traffic.cpp                 what each line costs in sectors of global and banks of shared memory
//
// The file stays CUDA: nvcc compiles the same text. It keeps to these conventions, which it defines for nvcc itself:
//
//     LAUNCH(kernel, grid, block, shared, stream, arguments...)    kernel<<<grid, block, shared, stream>>>(arguments...)
//     LAUNCH_CLUSTERS(size, kernel, ...)                           the same with clusters of so many blocks, side by side in x
//     DYNAMIC_SHARED(type, name)                                   extern __shared__ type name[]
//     inline PTX stands in functions of an instruction or two each, which section 7 has as well, with the register layouts of
//     the PTX ISA: mma_bf16, mma_tf32, ldmatrix_x4, …, copy16_async, copy_commit, copy_wait, wgmma_bf16, wgmma_tf32, barrier_wait, …
//
// What it notices by itself, in every build, named by kernel, block and thread:
//     barriers that not all threads of the block reach; warp operations whose lanes do not meet; phases that never end
//     operands of wgmma, and sums, that are touched while it runs; asynchronous copies that were not shown to it
//     accesses beyond an allocation or the dynamic shared memory that reach the next page, and writes that do not
//     host code that follows a device pointer; kernels that are given a host pointer; copies that overrun
//     launches beyond a limit of the GPU; memory freed twice or never; what a stream's capture does not allow
// What shows as NaN or a different result:
//     fresh global and shared memory, and what cp.async or bulk_copy are about to overwrite, read as NaN (integers as -1)
//     the threads between two barriers, and the blocks, run in an order that can be chosen; at random, a warp may run ahead
//
// It is one CPU's idea of a GPU: speed, real concurrency and the last bits of expf are not its business. Tensor maps, wmma,
// cooperative groups and blocks that wait for each other, but for those of a cluster, are not there. A kernel may not return
// early while other threads of its block still meet in barriers (on a GPU it may, since Volta).
//
// Environment
//     CUDA_ORDER=forward|reverse|random[:seed]   of threads and blocks; a result that depends on it is a race
//     CUDA_ASYNC=1             kernels and asynchronous copies run when somebody waits for them, not before
//     CUDA_MEMORY=64M          bytes of device memory (4G)          CUDA_DEVICES=0      a machine without a GPU
//     CUDA_CAPABILITY=80       what the device says it is (90)      CUDA_DRIVER=11080   version of the driver
//     CUDA_HOST_ACCESS=allow   host code may follow device pointers
//     CUDA_LEAKS=fail|ignore   memory that is alive at exit: exit status 1, or no word about it (a line on stderr)
//     CUDA_TRACE=1             a line for each launch               CUDA_STATS=1        a table of the kernels at exit
//
// gdb: compile with -O0 -ggdb3, then "break file.cu:120 if threadIdx.x == 5", "next" stays on this thread across
// barriers, "call emu::where()" tells where every thread of the block is.
//
// Contents
//     1. The language
//     2. Fibers
//     3. Barriers and warp operations
//     4. Memory
//     5. Launches
//     6. Numbers
//     7. Instructions: mma, ldmatrix, cp.async, wgmma, mbarrier
//     8. The runtime's functions

#ifndef CUDA_ON_CPU_H
#define CUDA_ON_CPU_H
#define CUDA_ON_CPU 1

#include <elf.h>
#include <link.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#pragma GCC diagnostic ignored "-Wunknown-pragmas"               // #pragma unroll

#ifdef EMU_TRAFFIC                                               // the sanitizer's calls, not the sanitizer: see traffic.cpp
#undef __SANITIZE_THREAD__
#elif defined(__has_feature)                                     // clang says it this way
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1
#endif
#endif
#if defined(_OPENMP) && (defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__))
#error "the sanitizers watch one block at a time: build without -fopenmp"
#endif

// ============================================================== 1. The language

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))

// A shared array is one for all fibers of an OS thread. thread_local also marks it in the symbol table, where
// fill_shared finds it. The sanitizers know thread-local arrays less well than static ones, which they surround with
// forbidden zones. A kernel with clusters, whose blocks run together, has its shared memory in dynamic arrays.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif
#define DYNAMIC_SHARED(type, name) type *name = (type *)emu::E->self->block->dynamic

// kernel may stand in parentheses, as it must when its template arguments have commas.
#define LAUNCH(...) LAUNCH_CLUSTERS(1, __VA_ARGS__)
#define LAUNCH_CLUSTERS(size, kernel, grid, block, shared_bytes, stream, ...) \
    emu::launch(#kernel, __FILE__, __LINE__, size, grid, block, shared_bytes, stream, kernel, ##__VA_ARGS__)

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
#define EMU_VECTORS(type, name)                                                                                    \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                                       \
    struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; };                    \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                               \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMU_VECTORS(float, float)
EMU_VECTORS(double, double)
EMU_VECTORS(int, int)
EMU_VECTORS(unsigned, uint)
EMU_VECTORS(short, short)
EMU_VECTORS(unsigned short, ushort)
EMU_VECTORS(signed char, char)
EMU_VECTORS(unsigned char, uchar)
EMU_VECTORS(long long, longlong)
EMU_VECTORS(unsigned long long, ulonglong)
struct float3 { float x, y, z; };
struct int3 { int x, y, z; };
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

#define threadIdx (emu::E->self->thread)
#define blockIdx (emu::E->self->block->at)
#define blockDim (emu::E->launch->block)
#define gridDim (emu::E->launch->grid)
const int warpSize = 32;

// ============================================================== 2. Fibers

// A switch saves the registers that a called function must preserve on the stack, and takes those of the other stack.
#if defined(__x86_64__) && defined(__ELF__) && !defined(EMU_UCONTEXT)
#define EMU_SAVED 6
asm(".pushsection .text\n.local emu_switch\n.type emu_switch,@function\nemu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\nmovq %rsp,(%rdi)\n"
    "movq %rsi,%rsp\npopq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size emu_switch,.-emu_switch\n.popsection\n");
#elif defined(__aarch64__) && defined(__ELF__) && !defined(EMU_UCONTEXT)
#define EMU_SAVED 20
asm(".pushsection .text\n.local emu_switch\n.type emu_switch,%function\nemu_switch:\nsub sp,sp,#160\n"
    "stp x19,x20,[sp]\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\nstp x25,x26,[sp,#48]\nstp x27,x28,[sp,#64]\n"
    "stp x29,x30,[sp,#80]\nstp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\nstp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\n"
    "mov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
    "ldp x19,x20,[sp]\nldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\nldp x25,x26,[sp,#48]\nldp x27,x28,[sp,#64]\n"
    "ldp x29,x30,[sp,#80]\nldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\nldp d12,d13,[sp,#128]\nldp d14,d15,[sp,#144]\n"
    "add sp,sp,#160\nret\n.size emu_switch,.-emu_switch\n.popsection\n");
#else
#include <ucontext.h>
#endif
#ifdef EMU_SAVED
extern "C" void emu_switch(void **save, void *load);
#endif

#ifdef __SANITIZE_ADDRESS__
extern "C" {
void __sanitizer_start_switch_fiber(void **fake_stack, const void *stack, size_t bytes);
void __sanitizer_finish_switch_fiber(void *fake_stack, const void **old_stack, size_t *old_bytes);
void __asan_poison_memory_region(const volatile void *, size_t);
void __asan_unpoison_memory_region(const volatile void *, size_t);
}
#endif
#ifdef __SANITIZE_THREAD__
extern "C" {
void *__tsan_get_current_fiber(void);
void *__tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void *, unsigned);
void __tsan_acquire(void *);
void __tsan_release(void *);
}
#define EMU_ACQUIRE(tag) __tsan_acquire(tag)
#define EMU_RELEASE(tag) __tsan_release(tag)
#else
#define EMU_ACQUIRE(tag) ((void)(tag))
#define EMU_RELEASE(tag) ((void)(tag))
#endif
// The emulator's own accesses to what the threads have in common are none of the sanitizers' business.
#if defined(__clang__) && defined(__SANITIZE_THREAD__)           // which else counts calls that never return
#define EMU_UNWATCHED __attribute__((noinline, disable_sanitizer_instrumentation))
#elif defined(__SANITIZE_THREAD__)
#define EMU_UNWATCHED __attribute__((noinline, no_sanitize_thread))
#else
#define EMU_UNWATCHED __attribute__((noinline, no_sanitize_address))
#endif
#ifdef EMU_TRAFFIC                                               // the emulator's own accesses do not count
#define EMU_UNTRACED __attribute__((noinline, no_sanitize_thread))
#else
#define EMU_UNTRACED
#endif
#ifdef _OPENMP
#define EMU_PER_THREAD thread_local
#else
#define EMU_PER_THREAD
#endif
// The caller's place, as last parameters of what people call in a kernel or on the host.
#define EMU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace emu {

const int MOST_THREADS = 1024, MOST_BLOCKS = 8;                  // of a block, of a cluster

enum State { READY, AT_BARRIER, AT_CLUSTER, IN_WARP_OPERATION, AT_PHASE, RETURNED };

typedef void Operation(void **arguments, unsigned mask);        // does a warp operation for all its lanes

struct Copy { void *to; const void *from; int bytes, group; };  // a cp.async on its way; from NULL: zeros

// What a thread has of the wgmma that run: sums of its own, which are NaN until it waits, and the parts of the operands that it
// watches over.
struct Wgmma {
    struct Sum { float *d, value[128]; int group; };
    struct Part { const void *at; unsigned char bytes[16]; int group; };
    std::vector<Sum> sums;
    std::vector<Part> parts;
    int group;                                                   // of the next products
    bool started, shown;                                         // by wgmma_start; by wgmma_show, what cp.async brought
};

// A barrier in shared memory (mbarrier), and the copies on their way to it. A phase ends when nobody is left to arrive, and no
// byte to come; then the next begins.
struct Phases {
    uint64_t *at;
    struct Block *block;
    int count, left;                                             // threads that arrive in a phase, and that still must
    long bytes, phase;                                           // expected minus come
    std::vector<Copy> copies;
    char tag[2];                                                 // of even and odd phases, see section 3
};

struct Block {                                                   // of the cluster that runs
    uint3 at;                                                    // blockIdx
    int rank, returned;                                          // in the cluster; threads that ended
    char *dynamic;                                               // its shared memory
    char *shared_end;                                            // behind it, where forbidden pages begin
    int any, all, count;                                         // of the last votes
    char tag[2], warp_tag[32][9][2];                             // see section 3
};

struct Thread {
    uint3 thread;                                                // threadIdx
    Block *block;
    int index, lane;                                             // in the block, in the warp
    State state;
    const char *what, *file;                                     // where it waits
    int line;
    unsigned mask;                                               // the warp operation it waits in
    void *argument;
    Operation *operation;
    int vote;                                                    // its argument of __syncthreads_or and the like
    Phases *phases;                                              // the barrier in shared memory whose phase it waits for
    std::vector<Copy> *copies;
    int group;                                                   // of the next cp.async
    Wgmma *wgmma;
    unsigned char barriers, clusters, operations[9];             // met so far: their last bits choose a tag; 8: warpgroups'
    char *stack;
    size_t stack_bytes;
    void *tsan, *fake_stack;
#ifdef EMU_SAVED
    void *sp;
#else
    ucontext_t context;
#endif
};

struct Body {                                                    // a kernel and its arguments
    virtual ~Body() {}
    virtual void call() const = 0;
};
template <class... P>
struct Call : Body {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
    template <class... A>
    Call(void (*kernel)(P...), A &&...given) : kernel(kernel), arguments(std::forward<A>(given)...) {}
    void call() const override { call(std::index_sequence_for<P...>()); }
    template <size_t... I> __attribute__((always_inline)) void call(std::index_sequence<I...>) const {
        kernel(std::get<I>(arguments)...);
    }
};

struct Launch {
    const char *kernel, *file;
    int line, cluster;                                           // cluster: how many blocks run together
    dim3 grid, block;
    size_t shared_bytes;
    std::shared_ptr<Body> body;
    long number;                                                 // of all launches
};

// What an OS thread that runs blocks has.
struct Engine {
    const Launch *launch;
    Block blocks[MOST_BLOCKS];                                   // of the cluster; mostly it has one
    Thread *threads, scheduler, *self, *before;                  // self runs, and before did before it
    int n, all, most, returned;                                  // threads of a block, of all, stacks, threads that ended
    int order[MOST_THREADS];                                     // in which some of them run from barrier to barrier
    int ordered, at;                                             // how many; place in it
    int ahead;                                                   // in random order, the first of a warp that runs alone, or -1
    std::list<Phases> *phases;                                   // of these blocks
    char start_tag, end_tag, cluster_tag[2];                     // see section 3
    uint64_t random;
    long switches;
    bool warned;                                                 // of this launch's float atomics
};
inline EMU_PER_THREAD Engine *E;

#ifdef __SANITIZE_ADDRESS__
const size_t STACK = 512 * 1024;
#else
const size_t STACK = 128 * 1024;
#endif
inline const size_t PAGE = (size_t)sysconf(_SC_PAGESIZE);

inline bool running() { return E && E->self && E->self != &E->scheduler; }

// Prints what runs: "matmul.cu:120: kernel matmul_kernel, block (0,1,0), thread (5,0,0): ".
EMU_UNWATCHED inline void print_place(bool with_thread) {
    fflush(stdout);
    fprintf(stderr, "cuda_on_cpu: ");
    if (!running() && !(E && E->launch)) return;
    const uint3 &at = running() ? E->self->block->at : E->blocks[0].at;
    fprintf(stderr, "%s:%d: kernel %s, block (%u,%u,%u)", E->launch->file, E->launch->line, E->launch->kernel, at.x, at.y, at.z);
    if (with_thread && running())
        fprintf(stderr, ", thread (%u,%u,%u)", E->self->thread.x, E->self->thread.y, E->self->thread.z);
    fprintf(stderr, ": ");
}

// Where the threads are, of a cluster counted through: a line for each place with the threads that are there. For gdb, too.
EMU_UNWATCHED inline void where() {
    static const char *const states[] = {"ready to run", "wait in", "wait in", "wait in", "wait in", "have returned"};
    std::vector<std::pair<std::string, std::string>> groups;
    for (int i = 0; i < E->all;) {
        char place[300];
        int end = i;
        auto describe = [&](const Thread &t) {
            int n = snprintf(place, sizeof place, "%s", &t == E->self ? "runs" : states[t.state]);
            if (t.state != READY && t.state != RETURNED)
                n += snprintf(place + n, sizeof place - n, " %s, %s:%d", t.what, t.file, t.line);
            if (t.state == IN_WARP_OPERATION) snprintf(place + n, sizeof place - n, ", for the lanes 0x%08x", t.mask);
            return std::string(place);
        };
        std::string here = describe(E->threads[i]), range;
        while (end < E->all && describe(E->threads[end]) == here) end++;
        range = end - i == 1 ? std::to_string(i) : std::to_string(i) + "-" + std::to_string(end - 1);
        i = end;
        size_t g = 0;
        while (g < groups.size() && groups[g].first != here) g++;
        if (g == groups.size()) groups.push_back({here, range});
        else if (groups[g].second.size() < 200) groups[g].second += "," + range;
        else if (groups[g].second.back() != '.') groups[g].second += ",...";
    }
    for (auto &g : groups) fprintf(stderr, "    threads %s: %s\n", g.second.c_str(), g.first.c_str());
    fflush(stderr);
}

// A kernel that cannot go on.
[[noreturn]] EMU_UNWATCHED inline void stop(bool with_thread, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    print_place(with_thread);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    if (E && E->threads) where();
    abort();
}

EMU_UNWATCHED inline void switch_to(Thread *to) {
    Thread *from = E->self;
    E->before = from, E->self = to, E->switches++;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(from->state == RETURNED ? nullptr : &from->fake_stack, to->stack, to->stack_bytes);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(to->tsan, 1);                         // 1: what ran before is no reason to run after
#endif
#ifdef EMU_SAVED
    emu_switch(&from->sp, to->sp);
#else
    swapcontext(&from->context, &to->context);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

// The next thread of this round that can run, or the scheduler when there is none.
EMU_UNWATCHED inline Thread *next_ready() {
    while (++E->at < E->ordered)
        if (E->threads[E->order[E->at]].state == READY) return &E->threads[E->order[E->at]];
    return &E->scheduler;
}
EMU_UNWATCHED inline void yield() { switch_to(next_ready()); }

void check_end();                                                // section 7
EMU_UNWATCHED inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
    const void *stack;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
    if (E->before == &E->scheduler) E->scheduler.stack = (char *)stack, E->scheduler.stack_bytes = bytes;
#endif
    EMU_ACQUIRE(&E->start_tag);
    E->launch->body->call();
    EMU_RELEASE(&E->end_tag);
    E->self->state = RETURNED;
    E->returned++;
    if (++E->self->block->returned == E->n) check_end();
    yield();
    abort();
}

EMU_UNWATCHED inline void prepare(Thread &t) {                   // so that switch_to(&t) enters fiber_main
#ifdef EMU_SAVED
    void **top = (void **)(t.stack + STACK);
    memset(top - EMU_SAVED - 2, 0, (EMU_SAVED + 2) * sizeof *top);
#ifdef __x86_64__
    top[-2] = (void *)fiber_main;                                // where ret goes; above it: fiber_main has no caller
    t.sp = top - EMU_SAVED - 2;
#else
    top[-EMU_SAVED + 11] = (void *)fiber_main;                   // x30
    t.sp = top - EMU_SAVED;
#endif
#else
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack, t.context.uc_stack.ss_size = STACK, t.context.uc_link = nullptr;
    makecontext(&t.context, fiber_main, 0);
#endif
}

inline void *map_pages(size_t bytes) {
    void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        perror("cuda_on_cpu: mmap");
        abort();
    }
    return p;
}

// The engine of this OS thread, with stacks for n threads. Under each stack is a page that nobody may touch.
inline void ready_engine(int n) {
    if (!E) {
        E = new Engine();
        E->phases = new std::list<Phases>();
        E->threads = (Thread *)calloc(MOST_BLOCKS * MOST_THREADS, sizeof(Thread));
        E->self = &E->scheduler;
        stack_t alternate = {};                                  // for the report about a stack that is too small
        alternate.ss_sp = map_pages(64 * 1024), alternate.ss_size = 64 * 1024;
        sigaltstack(&alternate, nullptr);
#ifdef __SANITIZE_THREAD__
        E->scheduler.tsan = __tsan_get_current_fiber();
#endif
    }
    for (; E->most < n; E->most++) {
        Thread &t = E->threads[E->most];
        char *pages = (char *)map_pages(PAGE + STACK);
        mprotect(pages, PAGE, PROT_NONE);
        t.stack = pages + PAGE, t.stack_bytes = STACK;
        t.copies = new std::vector<Copy>(), t.wgmma = new Wgmma();
#ifdef __SANITIZE_THREAD__
        t.tsan = __tsan_create_fiber(0);
#endif
    }
}

// ============================================================== 3. Barriers and warp operations

// For the thread sanitizer, whoever arrives gives to a tag what it did, and whoever leaves takes it from there.
// Meetings that follow one another have different tags, or a thread that ran ahead into the next would hide a race.

EMU_UNWATCHED inline void barrier(const char *what, const char *file, int line, int vote) {
    Thread &t = *E->self;
    char *tag = &t.block->tag[t.barriers++ & 1];
    t.what = what, t.file = file, t.line = line, t.vote = vote, t.state = AT_BARRIER;
    EMU_RELEASE(tag);
    yield();
    EMU_ACQUIRE(tag);
}
EMU_UNWATCHED inline void barrier_of_cluster(const char *file, int line) {
    Thread &t = *E->self;
    char *tag = &E->cluster_tag[t.clusters++ & 1];
    t.what = "cluster_wait", t.file = file, t.line = line, t.state = AT_CLUSTER;
    EMU_RELEASE(tag);
    yield();
    EMU_ACQUIRE(tag);
}

// Do these threads all wait in the same barrier, that of a block or of the cluster? Then they go on.
EMU_UNWATCHED inline bool release_together(Thread *threads, int n, State barrier) {
    Block &b = *threads->block;
    int any = 0, all = 1, count = 0;
    for (Thread *t = threads; t < threads + n; t++) {
        if (t->state != barrier || t->line != threads->line || strcmp(t->file, threads->file)) return false;
        any |= t->vote != 0, all &= t->vote != 0, count += t->vote != 0;
    }
    b.any = any, b.all = all, b.count = count;
    for (Thread *t = threads; t < threads + n; t++) t->state = READY;
    return true;
}

// Nobody can run, and there is a mistake.
[[noreturn]] EMU_UNWATCHED inline void stop_all() {
    for (int i = 0; i < E->all; i++) {
        Thread &t = E->threads[i];
        if (t.state == IN_WARP_OPERATION)
            stop(false,
                 "a warp operation waits for lanes of its mask that never come; all lanes that the mask names, for wgmma"
                 " four warps, must reach the same call");
        if (t.state == AT_PHASE)
            stop(false, "a phase of a barrier in shared memory never ends: %d threads must still arrive, and %ld bytes come",
                 t.phases->left, t.phases->bytes);
    }
    stop(false, "barrier divergence: these threads never meet; each __syncthreads must be reached by all threads of the block,"
                " and each cluster_wait by those of the cluster, or by none");
}

// All lanes of the mask meet here. The last one that comes does the operation for all.
EMU_UNWATCHED inline void warp_operation(const char *what, unsigned mask, void *argument, Operation *operation,
                                         const char *file, int line) {
    Thread &t = *E->self, *warp = &t - t.lane;
    int lanes = E->n - warp->index, hash = mask == ~0u ? 0 : 1 + mask % 7;
    char *tag = &t.block->warp_tag[t.index / 32][hash][t.operations[hash]++ & 1];
    t.what = what, t.file = file, t.line = line, t.mask = mask, t.argument = argument, t.operation = operation;
    if (!(mask >> t.lane & 1))
        stop(true, "%s:%d: %s with mask 0x%08x, which leaves the caller out", file, line, what, mask);
    if (lanes < 32 && mask >> lanes)
        stop(true,
             "%s:%d: %s with mask 0x%08x, but this warp has %d threads; make blocks of whole warps, or fit the mask",
             file, line, what, mask, lanes);
    t.state = IN_WARP_OPERATION;
    EMU_RELEASE(tag);
    void *arguments[32];
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        if (warp[i].state != IN_WARP_OPERATION || warp[i].mask != mask) {
            yield();
            EMU_ACQUIRE(tag);
            return;
        }
        arguments[i] = warp[i].argument;
    }
    for (int i = 0; i < 32; i++)
        if ((mask >> i & 1) && (warp[i].operation != operation || warp[i].line != line ||
                                (warp[i].file != file && strcmp(warp[i].file, file))))
            stop(false, "the lanes of one warp are in different operations");
    operation(arguments, mask);
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) warp[i].state = READY;
    EMU_ACQUIRE(tag);
}

// All 128 threads of four warps meet here. The last one that comes does the operation for all.
EMU_UNWATCHED inline void warpgroup_operation(const char *what, void *argument, Operation *operation, const char *file,
                                              int line) {
    Thread &t = *E->self, *group = &t - t.index % 128;
    char *tag = &t.block->warp_tag[group->index / 32][8][t.operations[8]++ & 1];
    if (group->index + 128 > E->n)
        stop(true, "%s:%d: %s by a block of %d threads; it takes four warps, from a multiple of four on", file, line, what,
             E->n);
    t.what = what, t.file = file, t.line = line, t.mask = ~0u, t.argument = argument, t.operation = operation;
    t.state = IN_WARP_OPERATION;
    EMU_RELEASE(tag);
    void *arguments[128];
    for (int i = 0; i < 128; i++) {
        if (group[i].state != IN_WARP_OPERATION || group[i].operation != operation || group[i].line != line) {
            yield();
            EMU_ACQUIRE(tag);
            return;
        }
        arguments[i] = group[i].argument;
    }
    operation(arguments, ~0u);
    for (int i = 0; i < 128; i++) group[i].state = READY;
    EMU_ACQUIRE(tag);
}

struct Exchange {                                                // argument of shuffles and votes
    uint64_t in, out;
    int from;
};
EMU_UNWATCHED inline void operate_shuffle(void **x, unsigned mask) {
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        Exchange *e = (Exchange *)x[i];
        if (!(mask >> e->from & 1)) stop(false, "lane %d reads from lane %d, which is not in the mask", i, e->from);
        e->out = ((Exchange *)x[e->from])->in;
    }
}
EMU_UNWATCHED inline void operate_ballot(void **x, unsigned mask) {
    uint64_t bits = 0;
    for (int i = 0; i < 32; i++)
        if ((mask >> i & 1) && ((Exchange *)x[i])->in) bits |= 1u << i;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) ((Exchange *)x[i])->out = bits;
}
EMU_UNWATCHED inline void operate_match(void **x, unsigned mask) {
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        Exchange *e = (Exchange *)x[i];
        e->out = 0;
        for (int j = 0; j < 32; j++)
            if ((mask >> j & 1) && ((Exchange *)x[j])->in == e->in) e->out |= 1u << j;
    }
}
EMU_UNWATCHED inline void operate_nothing(void **, unsigned) {}

template <class T, class Combine>
EMU_UNWATCHED inline void operate_reduce(void **x, unsigned mask) {
    uint64_t total = 0;
    bool first = true;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) total = (uint32_t)(first ? (T)((Exchange *)x[i])->in
                                                    : Combine()((T)total, (T)((Exchange *)x[i])->in)), first = false;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) ((Exchange *)x[i])->out = total;
}

template <class T>
T shuffle(const char *what, unsigned mask, T value, int from, const char *file, int line) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    Exchange e = {0, 0, from};
    memcpy(&e.in, &value, sizeof value);
    warp_operation(what, mask, &e, operate_shuffle, file, line);
    memcpy(&value, &e.out, sizeof value);
    return value;
}
inline uint64_t exchange(const char *what, unsigned mask, uint64_t in, Operation *operation, const char *file,
                         int line) {
    Exchange e = {in, 0, 0};
    warp_operation(what, mask, &e, operation, file, line);
    return e.out;
}

// The source lane when the warp is cut into segments of `width` lanes; beyond the segment it is the lane itself.
inline int segment_check(int width, const char *file, int line) {
    if (width < 1 || width > 32 || (width & (width - 1)))
        stop(true, "%s:%d: a shuffle of width %d; it must be 1, 2, 4, 8, 16 or 32", file, line, width);
    return E->self->lane & ~(width - 1);
}

}  // namespace emu

inline void __syncthreads(EMU_HERE) { emu::barrier("__syncthreads", file, line, 0); }
inline int __syncthreads_or(int p, EMU_HERE) {
    return emu::barrier("__syncthreads_or", file, line, p), emu::E->self->block->any;
}
inline int __syncthreads_and(int p, EMU_HERE) {
    return emu::barrier("__syncthreads_and", file, line, p), emu::E->self->block->all;
}
inline int __syncthreads_count(int p, EMU_HERE) {
    return emu::barrier("__syncthreads_count", file, line, p), emu::E->self->block->count;
}
inline void __syncwarp(unsigned mask = ~0u, EMU_HERE) {
    emu::warp_operation("__syncwarp", mask, nullptr, emu::operate_nothing, file, line);
}
template <class T> T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMU_HERE) {
    int first = emu::segment_check(width, file, line);
    return emu::shuffle("__shfl_sync", mask, value, first + (lane & (width - 1)), file, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMU_HERE) {
    int first = emu::segment_check(width, file, line), lane = emu::E->self->lane, from = lane ^ bits;
    return emu::shuffle("__shfl_xor_sync", mask, value, from < first + width ? from & 31 : lane, file, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, EMU_HERE) {
    int first = emu::segment_check(width, file, line), lane = emu::E->self->lane;
    return emu::shuffle("__shfl_down_sync", mask, value, lane + by < (unsigned)(first + width) ? lane + (int)by : lane,
                        file, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, EMU_HERE) {
    int first = emu::segment_check(width, file, line), lane = emu::E->self->lane;
    return emu::shuffle("__shfl_up_sync", mask, value, by <= (unsigned)(lane - first) ? lane - (int)by : lane, file,
                        line);
}
inline unsigned __ballot_sync(unsigned mask, int p, EMU_HERE) {
    return (unsigned)emu::exchange("__ballot_sync", mask, p != 0, emu::operate_ballot, file, line);
}
inline int __any_sync(unsigned mask, int p, EMU_HERE) {
    return emu::exchange("__any_sync", mask, p != 0, emu::operate_ballot, file, line) != 0;
}
inline int __all_sync(unsigned mask, int p, EMU_HERE) {
    return emu::exchange("__all_sync", mask, p != 0, emu::operate_ballot, file, line) == mask;
}
template <class T> unsigned __match_any_sync(unsigned mask, T value, EMU_HERE) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return (unsigned)emu::exchange("__match_any_sync", mask, bits, emu::operate_match, file, line);
}
#define EMU_REDUCE(name, type, combine)                                                                             \
    inline type name(unsigned mask, type value, EMU_HERE) {                                                         \
        struct Combine { type operator()(type a, type b) { return combine; } };                                     \
        return (type)emu::exchange(#name, mask, (uint32_t)value, emu::operate_reduce<type, Combine>, file, line);   \
    }
EMU_REDUCE(__reduce_add_sync, unsigned, a + b)
EMU_REDUCE(__reduce_add_sync, int, (int)((unsigned)a + (unsigned)b))
EMU_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
EMU_REDUCE(__reduce_min_sync, int, a < b ? a : b)
EMU_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
EMU_REDUCE(__reduce_max_sync, int, a > b ? a : b)
EMU_REDUCE(__reduce_and_sync, unsigned, a & b)
EMU_REDUCE(__reduce_or_sync, unsigned, a | b)
EMU_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ============================================================== 4. Memory

namespace emu {

// ---- Shared memory

// The arrays that __shared__ made, of this OS thread: thread-local symbols of functions, found in the program's symbol
// table, which has their distance from the start of the program's thread-local block.
struct SharedArray { char *memory; size_t bytes; };

inline std::vector<std::pair<size_t, size_t>> read_symbols() {   // offset in the thread-local block, size
    std::vector<std::pair<size_t, size_t>> found;
    FILE *f = fopen("/proc/self/exe", "rb");
    ElfW(Ehdr) header;
    if (!f || fread(&header, sizeof header, 1, f) != 1 || header.e_shentsize != sizeof(ElfW(Shdr))) return found;
    std::vector<ElfW(Shdr)> sections(header.e_shnum);
    auto read = [&](size_t at, void *to, size_t bytes) {
        return bytes == 0 || (fseek(f, (long)at, SEEK_SET) == 0 && fread(to, bytes, 1, f) == 1);
    };
    if (read(header.e_shoff, sections.data(), sections.size() * sizeof(ElfW(Shdr))))
        for (const ElfW(Shdr) &s : sections) {
            if (s.sh_type != SHT_SYMTAB || s.sh_link >= sections.size()) continue;
            std::vector<ElfW(Sym)> symbols(s.sh_size / sizeof(ElfW(Sym)));
            std::vector<char> names(sections[s.sh_link].sh_size + 1);
            if (!read(s.sh_offset, symbols.data(), symbols.size() * sizeof(ElfW(Sym))) ||
                !read(sections[s.sh_link].sh_offset, names.data(), names.size() - 1)) continue;
            for (const ElfW(Sym) &symbol : symbols)              // _ZZ: a name inside a function
                if ((symbol.st_info & 15) == STT_TLS && symbol.st_size && symbol.st_name < names.size() &&
                    !strncmp(&names[symbol.st_name], "_ZZ", 3) && strncmp(&names[symbol.st_name], "_ZZN3emu", 8))
                    found.push_back({symbol.st_value, symbol.st_size});
        }
    fclose(f);
    return found;
}

inline const std::vector<SharedArray> &shared_arrays() {
    static const std::vector<std::pair<size_t, size_t>> symbols = read_symbols();
    static EMU_PER_THREAD std::vector<SharedArray> *arrays;
    if (arrays) return *arrays;
    arrays = new std::vector<SharedArray>();
    char *block = nullptr;
    dl_iterate_phdr([](dl_phdr_info *info, size_t, void *to) {   // the program itself comes first
        *(void **)to = info->dlpi_tls_data;
        return 1;
    }, &block);
    if (block)
        for (auto &symbol : symbols) arrays->push_back({block + symbol.first, symbol.second});
    return *arrays;
}

EMU_UNWATCHED inline bool in_shared_memory(const void *p, size_t bytes) {
    const char *at = (const char *)p;
    const char *dynamic = E->self->block->dynamic;
    if (at >= dynamic && at + bytes <= dynamic + E->launch->shared_bytes) return true;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    return true;                                                 // who knows: static arrays are not listed
#else
    for (const SharedArray &a : shared_arrays())
        if (at >= a.memory && at + bytes <= a.memory + a.bytes) return true;
    return shared_arrays().empty();
#endif
}

// Dynamic shared memory ends where its page ends, up to the alignment of 128 bytes, and the next page is forbidden. (It
// begins at a multiple of 1024, as wgmma needs it, when it has a multiple of 1024 bytes, or under the address sanitizer.)
// What lies between is filled and looked at after each block. The address sanitizer gets it as an allocation of its
// own.
const size_t SHARED_ALIGN = 128, WGMMA_ALIGN = 1024, SHARED_ROOM = 256 * 1024, FORBIDDEN = 1 << 20;
const unsigned char UNWRITTEN = 0xFF;                            // in all bytes: NaN in every floating type

EMU_UNWATCHED inline void fill_shared(Block &b) {
    for (const SharedArray &a : shared_arrays()) memset(a.memory, UNWRITTEN, a.bytes);
    size_t bytes = E->launch->shared_bytes;
#ifdef __SANITIZE_ADDRESS__
    free(b.dynamic);
    b.dynamic = nullptr;
    if (bytes && posix_memalign((void **)&b.dynamic, WGMMA_ALIGN, bytes)) abort();
    if (bytes) memset(b.dynamic, UNWRITTEN, bytes);
#else
    size_t whole = (bytes + SHARED_ALIGN - 1) / SHARED_ALIGN * SHARED_ALIGN;
    if (!b.shared_end) {
        b.shared_end = (char *)map_pages(SHARED_ROOM + FORBIDDEN) + SHARED_ROOM;
        mprotect(b.shared_end, FORBIDDEN, PROT_NONE);
    }
    b.dynamic = b.shared_end - whole;
    memset(b.dynamic, UNWRITTEN, whole);
#endif
}

EMU_UNWATCHED inline void check_shared(const Block &b) {
    (void)b;
#ifndef __SANITIZE_ADDRESS__
    size_t bytes = E->launch->shared_bytes;
    for (size_t i = bytes; i % SHARED_ALIGN; i++)
        if ((unsigned char)b.dynamic[i] != UNWRITTEN)
            stop(false, "somebody wrote behind the %zu bytes of dynamic shared memory, at byte %zu", bytes, i);
#endif
}

// ---- Device memory

enum Kind { DEVICE, MANAGED, PINNED };                           // cudaMalloc, cudaMallocManaged, cudaMallocHost

// Each allocation has pages of its own, aligned to the end up to 256 bytes, between forbidden ones of 1 MB. Host code
// can touch device memory only while a copy or a kernel runs. Under the address sanitizer it is ordinary memory, which
// is poisoned while it may not be touched.
struct Allocation {
    char *memory, *pages;
    size_t bytes, page_bytes;
    Kind kind;
    bool registered;                                             // cudaHostRegister: the memory is somebody else's
    int number, line;
    const char *file;
};
const size_t ALIGN = 256;

struct Heap {
    std::map<uintptr_t, Allocation> alive;                       // by address
    std::deque<Allocation> freed;                                // the last ones: their addresses stay forbidden
    size_t used = 0, limit = (size_t)4 << 30;
    long launches = 0;
    int count = 0, error = 0, driver = 13000, devices = 1, capability = 90, device = 0;
    bool host_access = false, async = false, trace = false, spoiled = false;   // spoiled: the capture
    const char *leaks = "report";
    std::deque<std::function<void()>> queue;                     // of CUDA_ASYNC
    const void *capturing = nullptr;                             // the stream
    std::vector<std::function<void()>> *graph = nullptr;         // what a capture collects
    std::set<const void *> streams;
    std::map<const void *, size_t> dynamic_limit;                // set by cudaFuncSetAttribute
    Heap();
    ~Heap();
};
inline Heap heap;

inline bool open_for_host(const Allocation &a) { return a.kind != DEVICE || heap.host_access; }

EMU_UNWATCHED inline void set_access(const Allocation &a, bool allowed) {
    if (open_for_host(a)) return;
#ifdef __SANITIZE_ADDRESS__
    if (allowed) __asan_unpoison_memory_region(a.memory, a.bytes);
    else __asan_poison_memory_region(a.memory, a.bytes);
#else
    mprotect(a.pages, a.page_bytes, allowed ? PROT_READ | PROT_WRITE : PROT_NONE);
#endif
}

// The allocation that has this address, or whose forbidden pages have it; nullptr when there is none.
inline const Allocation *find(const void *p, bool around = false) {
    uintptr_t at = (uintptr_t)p;
    auto next = heap.alive.upper_bound(at);
    if (next != heap.alive.begin()) {
        const Allocation &a = std::prev(next)->second;
        if (at <= (uintptr_t)a.memory + a.bytes) return &a;
        if (around && at < (uintptr_t)a.memory + a.bytes + FORBIDDEN) return &a;
    }
    if (around && next != heap.alive.end() && at + FORBIDDEN >= next->first) return &next->second;
    return nullptr;
}
inline const Allocation *find_freed(const void *p) {
    for (const Allocation &a : heap.freed)
        if ((const char *)p >= a.pages && (const char *)p < a.pages + a.page_bytes) return &a;
    return nullptr;
}

// "allocation 3 (4096 bytes, model.cu:12)"
inline std::string name_of(const Allocation &a) {
    char text[300];
    snprintf(text, sizeof text, "allocation %d (%zu bytes, %s:%d)", a.number, a.bytes, a.file, a.line);
    return text;
}

// Complains about what the host did, and gives the error that its call returns.
inline int complain(int error, const char *file, int line, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fflush(stdout);
    fprintf(stderr, "cuda_on_cpu: %s:%d: ", file, line);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    return heap.error = error;
}

// While a stream is captured nothing may wait for it, or take or free memory, and what goes to another stream was probably meant
// for this one (the capture on a GPU fails only for streams that wait for each other). The capture is spoiled by it.
inline int breaks_capture(const char *name, const void *stream, bool waits, const char *file, int line) {
    if (!heap.capturing || (!waits && stream == heap.capturing)) return 0;
    heap.spoiled = true;
    return waits ? complain(900, file, line, "%s while a stream is captured", name)
                 : complain(906, file, line, "%s in another stream than the one that is captured", name);
}

inline int allocate(void **p, size_t bytes, Kind kind, const char *file, int line) {
    *p = nullptr;
    if (!bytes) return 0;
    if (int e = breaks_capture("an allocation", nullptr, true, file, line)) return e;
    if (heap.used > heap.limit || bytes > heap.limit - heap.used) return heap.error = 2;
    Allocation a = {nullptr, nullptr, bytes, 0, kind, false, ++heap.count, line, file};
#ifdef __SANITIZE_ADDRESS__
    if (posix_memalign((void **)&a.memory, ALIGN, bytes)) return heap.error = 2;
    memset(a.memory, UNWRITTEN, bytes);
    a.pages = a.memory, a.page_bytes = bytes;
#else
    size_t whole = (bytes + ALIGN - 1) / ALIGN * ALIGN;
    a.page_bytes = (whole + PAGE - 1) / PAGE * PAGE;
    char *pages = (char *)mmap(nullptr, a.page_bytes + 2 * FORBIDDEN, PROT_NONE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) return heap.error = 2;
    a.pages = pages + FORBIDDEN, a.memory = a.pages + a.page_bytes - whole;
    mprotect(a.pages, a.page_bytes, PROT_READ | PROT_WRITE);
    memset(a.pages, UNWRITTEN, a.page_bytes);
#endif
    heap.alive[(uintptr_t)a.memory] = a;
    set_access(a, false);
    if (kind != PINNED) heap.used += bytes;
    *p = a.memory;
    return 0;
}

// Nothing may have changed right before and behind the allocation, as far as its pages go. They must be accessible.
inline bool intact(const Allocation &a) {
    const char *first = a.memory - ALIGN < a.pages ? a.pages : a.memory - ALIGN, *last = a.pages + a.page_bytes;
    for (const char *p = first; p < a.memory; p++)
        if ((unsigned char)*p != UNWRITTEN) return false;
    for (const char *p = a.memory + a.bytes; p < last; p++)
        if ((unsigned char)*p != UNWRITTEN) return false;
    return true;
}

// Of an allocation, its last so many bytes, from an aligned place on: what is beyond them is forbidden.
inline void *last_bytes(void *memory, size_t bytes) {
    auto at = heap.alive.find((uintptr_t)memory);
    return at == heap.alive.end() ? memory : (char *)memory + (at->second.bytes - bytes) / ALIGN * ALIGN;
}

void drain();
inline int release(void *p, bool pinned, const char *name, const char *file, int line) {
    if (!p) return 0;
    if (int e = breaks_capture(name, nullptr, true, file, line)) return e;
    drain();
    auto at = heap.alive.find((uintptr_t)p);
    if (at == heap.alive.end() || at->second.registered || (at->second.kind == PINNED) != pinned) {
        const Allocation *a = find_freed(p), *inside = find(p);
        const char *why = a ? "freed already: " : inside ? "not the start, or not the kind, of " : "never allocated";
        return complain(1, file, line, "%s(%p): %s%s", name, p, why,
                        a ? name_of(*a).c_str() : inside ? name_of(*inside).c_str() : "");
    }
    Allocation a = at->second;
    heap.alive.erase(at);
    if (a.kind != PINNED) heap.used -= a.bytes;
    set_access(a, true);
    if (!intact(a)) complain(700, file, line, "somebody wrote right before or behind %s", name_of(a).c_str());
#ifdef __SANITIZE_ADDRESS__
    free(a.memory);
#else
    heap.freed.push_back(a);
    mmap(a.pages, a.page_bytes, PROT_NONE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (heap.freed.size() > 1000) {
        munmap(heap.freed[0].pages - FORBIDDEN, heap.freed[0].page_bytes + 2 * FORBIDDEN);
        heap.freed.pop_front();
    }
#endif
    return 0;
}

// What the memory protection, or an arithmetic trap, says. The same instruction then runs again and ends the program,
// so that gdb and core files show it.
EMU_UNWATCHED inline void on_signal(int signal_number, siginfo_t *info, void *) {
    const char *p = (const char *)info->si_addr;
    const Allocation *a = find(p, true), *gone = find_freed(p);
    signal(signal_number, SIG_DFL);
    print_place(true);
    if (signal_number == SIGFPE) fprintf(stderr, "integer division by zero\n");
    else if (!running() && a && a->kind == DEVICE)
        fprintf(stderr, "host code reads or writes device memory, byte %ld of %s; cudaMemcpy brings it to the host\n",
                (long)(p - a->memory), name_of(*a).c_str());
    else if (!running()) fprintf(stderr, "host code reads or writes address %p%s%s\n", (const void *)p,
                                 gone ? " of device memory freed before, " : "", gone ? name_of(*gone).c_str() : "");
    else if (p < E->self->stack && p >= E->self->stack - PAGE)
        fprintf(stderr, "its stack of %zu kB is too small\n", STACK / 1024);
    else if (const Block &b = *E->self->block; b.shared_end && p >= b.shared_end && p < b.shared_end + FORBIDDEN)
        fprintf(stderr, "access to byte %ld of %zu bytes of dynamic shared memory\n", (long)(p - b.dynamic),
                E->launch->shared_bytes);
    else if (a) fprintf(stderr, "access to byte %ld of %s\n", (long)(p - a->memory), name_of(*a).c_str());
    else if (gone) fprintf(stderr, "access to byte %ld of memory freed before, %s\n", (long)(p - gone->memory),
                           name_of(*gone).c_str());
    else fprintf(stderr, "access to address %p, which is no device memory, or a vector access that is not aligned\n",
                 (const void *)p);
    fprintf(stderr, "    gdb shows the line, as does a build with -fsanitize=address,undefined\n");
}

// The address sanitizer calls this after its report.
#ifdef __SANITIZE_ADDRESS__
extern "C" void *__asan_get_report_address(void);
extern "C" void __asan_set_error_report_callback(void (*)(const char *));
EMU_UNWATCHED inline void on_report(const char *) {
    const char *p = (const char *)__asan_get_report_address();
    const Allocation *a = find(p, true);
    print_place(true);
    if (a && !running() && a->kind == DEVICE && p < a->memory + a->bytes)
        fprintf(stderr, "host code reads or writes device memory, byte %ld of %s; cudaMemcpy brings it to the host\n",
                (long)(p - a->memory), name_of(*a).c_str());
    else if (a) fprintf(stderr, "access to byte %ld of %s\n", (long)(p - a->memory), name_of(*a).c_str());
    else fprintf(stderr, "see the report above\n");
}
#endif

inline size_t number_of(const char *name, size_t otherwise) {   // 100, 64k, 16M, 4G
    const char *text = getenv(name);
    char *end;
    if (!text || !*text) return otherwise;
    size_t n = strtoull(text, &end, 10);
    return *end == 'k' || *end == 'K' ? n << 10 : *end == 'M' ? n << 20 : *end == 'G' ? n << 30 : n;
}
inline bool is_set(const char *name, const char *value) { return getenv(name) && !strcmp(getenv(name), value); }

inline Heap::Heap() {
    limit = number_of("CUDA_MEMORY", limit);
    driver = (int)number_of("CUDA_DRIVER", driver);
    devices = (int)number_of("CUDA_DEVICES", 1);
    capability = (int)number_of("CUDA_CAPABILITY", 90);
    host_access = is_set("CUDA_HOST_ACCESS", "allow");
    async = is_set("CUDA_ASYNC", "1");
    trace = is_set("CUDA_TRACE", "1");
    if (getenv("CUDA_LEAKS")) leaks = getenv("CUDA_LEAKS");
#if defined(__SANITIZE_ADDRESS__)
    __asan_set_error_report_callback(on_report);
#elif !defined(__SANITIZE_THREAD__)
    struct sigaction action = {};
    action.sa_sigaction = on_signal, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int s : {SIGSEGV, SIGBUS, SIGFPE}) sigaction(s, &action, nullptr);
#endif
}
inline Heap::~Heap() {
    size_t bytes = 0, count = 0;
    const Allocation *first = nullptr;
    for (auto &entry : alive)
        if (!entry.second.registered) {
            count++, bytes += entry.second.bytes;
            if (!first || entry.second.number < first->number) first = &entry.second;
        }
    if (!count || !strcmp(leaks, "ignore")) return;
    fflush(stdout);
    fprintf(stderr, "cuda_on_cpu: %zu allocations with %zu bytes were never freed, first %s\n", count, bytes,
            name_of(*first).c_str());
    if (!strcmp(leaks, "fail")) _exit(1);
}

// ============================================================== 5. Launches

inline uint64_t next_random(uint64_t *state) {                   // splitmix64
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

enum Order { FORWARD, REVERSE, RANDOM };
struct Policy {
    Order order = FORWARD;
    uint64_t seed = 1;
    Policy() {
        const char *s = getenv("CUDA_ORDER");
        if (!s || !*s || !strcmp(s, "forward")) return;
        if (!strcmp(s, "reverse")) order = REVERSE;
        else if (!strncmp(s, "random", 6) && (!s[6] || s[6] == ':'))
            order = RANDOM, seed = s[6] ? strtoull(s + 7, nullptr, 10) : 1;
        else {
            fprintf(stderr, "cuda_on_cpu: CUDA_ORDER=%s: must be forward, reverse, random or random:seed\n", s);
            exit(2);
        }
    }
};
inline const Policy policy;

EMU_UNWATCHED inline void arrange(int *order, int n, uint64_t *random) {
    for (int i = 0; i < n; i++) order[i] = policy.order == REVERSE ? n - 1 - i : i;
    if (policy.order == RANDOM)
        for (int i = n - 1; i > 0; i--) {
            int j = (int)(next_random(random) % (uint64_t)(i + 1)), t = order[i];
            order[i] = order[j], order[j] = t;
        }
}

bool bring_copies();                                             // section 7

// n threads in an order, each until it waits or returns. Could any run?
EMU_UNWATCHED inline bool run_round(int first, int n) {
    arrange(E->order, n, &E->random);
    for (int i = 0; i < n; i++) E->order[i] += first;
    E->ordered = n, E->at = -1;
    Thread *t = next_ready();
    if (t == &E->scheduler) return false;
    return switch_to(t), true;
}

// In random order now and then a warp alone, until it waits for others. Otherwise one of the blocks: a round, or the end of its
// barrier; so one block runs ahead of the others as far as it can without them.
EMU_UNWATCHED inline bool run_some_block() {
    int ranks[MOST_BLOCKS];
    if (policy.order == RANDOM) {
        auto run_ahead = [] { return E->ahead >= 0 && run_round(E->ahead, std::min(32, E->n - E->ahead % E->n)); };
        if (run_ahead()) return true;
        const int warps = (E->n + 31) / 32, pick = (int)(next_random(&E->random) % (uint64_t)(2 * warps * E->launch->cluster));
        E->ahead = pick % 2 ? -1 : pick / 2 / warps * E->n + pick / 2 % warps * 32;
        if (run_ahead()) return true;
    }
    arrange(ranks, E->launch->cluster, &E->random);
    for (int k = 0; k < E->launch->cluster; k++) {
        const int first = ranks[k] * E->n;
        if (run_round(first, E->n) || release_together(E->threads + first, E->n, AT_BARRIER)) return true;
    }
    return false;
}

// All threads of one cluster, which mostly is a block.
EMU_UNWATCHED inline void run_cluster(uint3 at) {
    const dim3 &size = E->launch->block;
    E->returned = 0, E->ahead = -1, E->all = E->n * E->launch->cluster, E->phases->clear();
    for (int rank = 0; rank < E->launch->cluster; rank++, at.x++) {
        E->blocks[rank].at = at, E->blocks[rank].rank = rank, E->blocks[rank].returned = 0;
        fill_shared(E->blocks[rank]);
    }
    for (int n = 0; n < E->all; n++) {
        Thread &t = E->threads[n];
        const int i = n % E->n;
        t.block = &E->blocks[n / E->n];
        t.index = i, t.lane = i % 32, t.state = READY, t.group = 0, t.barriers = t.clusters = 0, t.fake_stack = nullptr;
        t.copies->clear(), *t.wgmma = {{}, {}, 0, false, true};
        memset(t.operations, 0, sizeof t.operations);
        t.thread = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
        prepare(t);
    }
    EMU_RELEASE(&E->start_tag);
    while (E->returned < E->all) {
        if (policy.order == RANDOM && next_random(&E->random) % 4 == 0) bring_copies();          // or as late as they can
        if (!run_some_block() && !release_together(E->threads, E->all, AT_CLUSTER) && !bring_copies()) stop_all();
    }
    EMU_ACQUIRE(&E->end_tag);
    for (int rank = 0; rank < E->launch->cluster; rank++) check_shared(E->blocks[rank]);
}

struct Statistics { long launches, blocks, threads, switches; double seconds; };
struct Table : std::map<std::string, Statistics> {
    ~Table() {
        if (!is_set("CUDA_STATS", "1")) return;
        fprintf(stderr, "%-48s %9s %9s %9s %10s %10s\n", "kernel", "launches", "blocks", "threads", "switches", "ms");
        for (auto &k : *this)
            fprintf(stderr, "%-48.48s %9ld %9ld %9ld %10ld %10.3f\n", k.first.c_str(), k.second.launches,
                    k.second.blocks, k.second.threads, k.second.switches, 1e3 * k.second.seconds);
    }
};
inline Table statistics;

inline void run(const Launch &launch) {
    auto start = std::chrono::steady_clock::now();
    int n = (int)(launch.block.x * launch.block.y * launch.block.z);
    long blocks = (long)launch.grid.x * launch.grid.y * launch.grid.z, switches = 0;
    static uint64_t launched;
    uint64_t random = policy.seed * 1000003 + launched++;
    std::vector<int> order(blocks / launch.cluster);
    arrange(order.data(), (int)order.size(), &random);
    for (auto &entry : heap.alive) set_access(entry.second, true);
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) reduction(+ : switches)
#endif
    for (size_t k = 0; k < order.size(); k++) {
        unsigned i = (unsigned)(order[k] * launch.cluster);
        ready_engine(n * launch.cluster);
        E->launch = &launch, E->n = n, E->switches = 0, E->random = random + i;
        run_cluster({i % launch.grid.x, i / launch.grid.x % launch.grid.y, i / launch.grid.x / launch.grid.y});
        switches += E->switches;
        E->launch = nullptr;
    }
    for (auto &entry : heap.alive) {
        if (entry.second.kind == DEVICE && !intact(entry.second)) {
            complain(700, launch.file, launch.line, "kernel %s wrote right before or behind %s", launch.kernel,
                     name_of(entry.second).c_str());
            abort();
        }
        set_access(entry.second, false);
    }
    Statistics &s = statistics[launch.kernel];
    s.launches++, s.blocks += blocks, s.threads += blocks * n, s.switches += switches;
    s.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Now, or when somebody waits for it, or as a node of the graph that is being captured.
inline void enqueue(std::function<void()> work) {
    if (heap.capturing) heap.graph->push_back(work);
    else if (heap.async) heap.queue.push_back(work);
    else work();
}
inline void drain() {
    while (!heap.queue.empty()) {
        std::function<void()> work = heap.queue.front();
        heap.queue.pop_front();
        work();
    }
}

// Kernels can follow device, managed and pinned pointers. Those in a struct are not looked at.
template <class T> bool host_pointer(T) { return false; }
template <class T> bool host_pointer(T *p) { return p && !std::is_function<T>::value && !find((const void *)p); }

inline size_t shared_limit() {                                   // of a block, after cudaFuncSetAttribute
    return (heap.capability == 80 || heap.capability == 87   ? 163
            : heap.capability < 90 || heap.capability >= 120 ? 99
                                                             : 227) *
           1024;
}
inline bool known_stream(const void *stream) { return !stream || heap.streams.count(stream); }

template <class... P, class... A>
void launch(const char *kernel, const char *file, int line, int cluster, dim3 grid, dim3 block, size_t shared_bytes,
            const void *stream, void (*function)(P...), A &&...given) {
    auto body = std::make_shared<Call<P...>>(function, std::forward<A>(given)...);
    size_t threads = (size_t)block.x * block.y * block.z, limit = 48 * 1024;
    static_assert(sizeof(std::tuple<P...>) <= 4096, "a kernel takes 4096 bytes of arguments at most");
    auto set = heap.dynamic_limit.find((const void *)function);
    if (set != heap.dynamic_limit.end()) limit = set->second;
    if (heap.trace)
        fprintf(stderr, "cuda_on_cpu: %s:%d: %s, grid (%u,%u,%u), block (%u,%u,%u), %zu bytes of shared memory\n", file,
                line, kernel, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared_bytes);
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535) {
        complain(9, file, line, "kernel %s: grid (%u,%u,%u); x must be 1 to 2147483647, y and z 1 to 65535", kernel,
                 grid.x, grid.y, grid.z);
        return;
    }
    if (cluster < 1 || cluster > MOST_BLOCKS || grid.x % (unsigned)cluster || (cluster > 1 && heap.capability < 90)) {
        complain(912, file, line, "kernel %s: clusters of %d blocks, and %u in x; there may be %d that divide x, from compute"
                 " capability 9.0 on", kernel, cluster, grid.x, MOST_BLOCKS);
        return;
    }
    if (!threads || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64) {
        complain(9, file, line, "kernel %s: block (%u,%u,%u); a block has 1 to 1024 threads, z at most 64", kernel,
                 block.x, block.y, block.z);
        return;
    }
    if (shared_bytes > limit) {
        complain(1, file, line, "kernel %s: %zu bytes of dynamic shared memory; the limit is %zu, cudaFuncSetAttribute"
                 " raises it to %zu at most", kernel, shared_bytes, limit, shared_limit());
        return;
    }
    if (!known_stream(stream)) {
        complain(400, file, line, "kernel %s: there is no such stream, or no longer", kernel);
        return;
    }
    if (breaks_capture(kernel, stream, false, file, line)) return;
    int number = 0, wrong = 0;
    std::apply([&](auto... a) { ((++number, !wrong && host_pointer(a) ? wrong = number : 0), ...); }, body->arguments);
    if (wrong && !heap.host_access) {
        complain(700, file, line, "kernel %s: argument %d is no pointer to device memory", kernel, wrong);
        return;
    }
    Launch l = {kernel, file, line, cluster, grid, block, shared_bytes, body, ++heap.launches};
    enqueue([=] { run(l); });
}

// A float sum by atomics depends on the order of the threads: worth a word, once for each kernel.
EMU_UNWATCHED inline void warn_of_float_atomics(const char *file, int line) {
    static std::set<std::string> *warned = new std::set<std::string>();
    if (!running() || !warned->insert(E->launch->kernel).second) return;
    fprintf(stderr,
            "cuda_on_cpu: %s:%d: kernel %s adds floats atomically; the order of the sum, and so its last bits, will"
            " differ from run to run\n",
            file, line, E->launch->kernel);
}

}  // namespace emu

// ============================================================== 6. Numbers

// ---- Atomics. Blocks may run side by side, so these are atomic on the CPU too.
template <class T, class Combine>
T emu_atomic(T *p, Combine combine) {
    T old, next;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do next = combine(old);
    while (!__atomic_compare_exchange(p, &old, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}
template <class T> struct emu_same { typedef T type; };          // so that atomicAdd(&counter, 1) takes any counter
template <class T> T atomicAdd(T *p, typename emu_same<T>::type x, EMU_HERE) {
    if (std::is_floating_point<T>::value) emu::warn_of_float_atomics(file, line);
    return emu_atomic(p, [=](T old) { return (T)(old + x); });
}
template <class T> T atomicSub(T *p, typename emu_same<T>::type x) {
    return emu_atomic(p, [=](T old) { return (T)(old - x); });
}
template <class T> T atomicMin(T *p, typename emu_same<T>::type x) {
    return emu_atomic(p, [=](T old) { return x < old ? x : old; });
}
template <class T> T atomicMax(T *p, typename emu_same<T>::type x) {
    return emu_atomic(p, [=](T old) { return old < x ? x : old; });
}
template <class T> T atomicAnd(T *p, typename emu_same<T>::type x) {
    return emu_atomic(p, [=](T old) { return (T)(old & x); });
}
template <class T> T atomicOr(T *p, typename emu_same<T>::type x) {
    return emu_atomic(p, [=](T old) { return (T)(old | x); });
}
template <class T> T atomicXor(T *p, typename emu_same<T>::type x) {
    return emu_atomic(p, [=](T old) { return (T)(old ^ x); });
}
template <class T> T atomicExch(T *p, typename emu_same<T>::type x) { return emu_atomic(p, [=](T) { return x; }); }
template <class T> T atomicCAS(T *p, typename emu_same<T>::type expected, typename emu_same<T>::type x) {
    return emu_atomic(p, [=](T old) { return old == expected ? x : old; });
}

// ---- Scalar functions. The C library has expf, expm1f, log1pf, fmaf and the rest.
template <class A, class B> typename std::common_type<A, B>::type min(A a, B b) { return b < a ? b : a; }
template <class A, class B> typename std::common_type<A, B>::type max(A a, B b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __saturatef(float x) { return x > 1 ? 1 : x > 0 ? x : 0; }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return expf(x * 2.302585093f); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fmaf_ieee_rn(float x, float y, float z) { return fmaf(x, y, z); }
// These are not to be contracted into a multiply-add, whatever the compiler's flags are.
inline float __fmul_rn(float x, float y) { volatile float z = x * y; return z; }
inline float __fadd_rn(float x, float y) { volatile float z = x + y; return z; }
inline float __fsub_rn(float x, float y) { volatile float z = x - y; return z; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1 / sqrtf(x); }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline float __int2float_rn(int x) { return (float)x; }
inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
inline float __int_as_float(int u) { return __uint_as_float((unsigned)u); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}
inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned)((uint64_t)x * y >> 32); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    uint64_t both = (uint64_t)y << 32 | x;
    unsigned z = 0;
    for (int i = 0; i < 4; i++) z |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return z;
}
template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> void __stcs(T *p, T x) { *p = x; }
template <class T> void __stcg(T *p, T x) { *p = x; }
inline long long clock64() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
[[noreturn]] inline void __trap() { emu::stop(true, "__trap()"); }

// ---- bfloat16 and half: rounded to nearest, ties to even
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {
        unsigned u = __float_as_uint(x);
        bits = (uint16_t)(x != x ? 0x7FFF : (u + 0x7FFF + (u >> 16 & 1)) >> 16);
    }
    operator float() const { return __uint_as_float((unsigned)bits << 16); }
};
struct __half {
    uint16_t bits;
    __half() = default;
    __half(float x) {
        float a = fabsf(x);
        unsigned u = __float_as_uint(a), h;
        if (x != x) h = 0x7FFF;
        else if (a >= 65520) h = 0x7C00;                         // infinity
        else if (a < 6.103515625e-05f)
            h = (unsigned)rintf(a * 16777216);                   // denormal: multiples of 2^-24
        else h = (u - (112u << 23) + 0xFFF + (u >> 13 & 1)) >> 13;
        bits = (uint16_t)(h | (x == x && signbit(x) ? 0x8000 : 0));
    }
    operator float() const {
        unsigned exponent = bits >> 10 & 31, fraction = bits & 1023;
        float x = exponent == 31 ? (fraction ? NAN : INFINITY)
                  : exponent     ? ldexpf(1024.f + (float)fraction, (int)exponent - 25)
                                 : ldexpf((float)fraction, -24);
        return bits & 0x8000 ? -x : x;
    }
};
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct alignas(4) __half2 { __half x, y; };
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;
typedef __half half;
typedef __half2 half2;
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
inline float __low2float(__nv_bfloat162 v) { return v.x; }
inline float __high2float(__nv_bfloat162 v) { return v.y; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { __nv_bfloat16 x; x.bits = u; return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }

// ============================================================== 7. Instructions: mma, ldmatrix, cp.async, wgmma, mbarrier

// Under the register layouts of the PTX ISA ("Matrix fragments"); lane = 4g + t, g = 0…7, t = 0…3. Products are exact
// and summed in double, then rounded to float once: tensor cores keep fewer digits, in an order of their own.

namespace emu {

struct Multiply { float *d; const unsigned *a, *b; };            // d += a b
__forceinline__ float low_half(unsigned u) { return __uint_as_float(u << 16); }
__forceinline__ float high_half(unsigned u) { return __uint_as_float(u & 0xFFFF0000u); }
__forceinline__ float tf32(unsigned u) { return __uint_as_float(u & 0xFFFFE000u); }      // the low 13 bits are not read

// D, for m16n8: d[i] is row g + 8(i/2), column 2t + i%2.
template <int K>
EMU_UNWATCHED inline void multiply_add(void **x, const float (*A)[K], const float (*B)[8]) {
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            double sum = ((Multiply *)x[lane])->d[i];
            for (int k = 0; k < K; k++) sum += (double)A[row][k] * B[k][column];
            ((Multiply *)x[lane])->d[i] = (float)sum;
        }
}

// m16n8k16, bfloat16: a[r] is row g + 8(r%2), columns 2t + 8(r/2) and the next; b[r] is rows 2t + 8r and the next,
// column g. The lower half of a register comes first.
EMU_UNWATCHED inline void operate_mma_bf16(void **x, unsigned) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const Multiply *m = (Multiply *)x[lane];
        int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; r++) {
            float *to = &A[g + r % 2 * 8][2 * t + r / 2 * 8];
            to[0] = low_half(m->a[r]), to[1] = high_half(m->a[r]);
        }
        for (int r = 0; r < 2; r++)
            B[2 * t + 8 * r][g] = low_half(m->b[r]), B[2 * t + 8 * r + 1][g] = high_half(m->b[r]);
    }
    multiply_add<16>(x, A, B);
}

// m16n8k8, tf32: a[r] is row g + 8(r%2), column t + 4(r/2); b[r] is row t + 4r, column g.
EMU_UNWATCHED inline void operate_mma_tf32(void **x, unsigned) {
    float A[16][8], B[8][8];
    for (int lane = 0; lane < 32; lane++) {
        const Multiply *m = (Multiply *)x[lane];
        int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; r++) A[g + r % 2 * 8][t + r / 2 * 4] = tf32(m->a[r]);
        for (int r = 0; r < 2; r++) B[t + 4 * r][g] = tf32(m->b[r]);
    }
    multiply_add<8>(x, A, B);
}

// ldmatrix: lane 8m + i gives the address of row i of matrix m, 8 numbers of 16 bits; r[m] of a lane is row g, columns
// 2t and 2t + 1 of matrix m, or with .trans rows 2t and 2t + 1, column g.
struct LoadMatrix { unsigned *r; const uint16_t *row; };
template <int MATRICES, bool TRANSPOSED>
EMU_UNWATCHED EMU_UNTRACED inline void operate_ldmatrix(void **x, unsigned) {
    for (int lane = 0; lane < 32; lane++)
        for (int m = 0; m < MATRICES; m++) {
            int g = lane / 4, t = lane % 4;
            unsigned value[2];
            for (int e = 0; e < 2; e++)
                value[e] = TRANSPOSED ? ((LoadMatrix *)x[8 * m + 2 * t + e])->row[g]
                                      : ((LoadMatrix *)x[8 * m + g])->row[2 * t + e];
            ((LoadMatrix *)x[lane])->r[m] = value[0] | value[1] << 16;
        }
}

// Word by word, so that the sanitizers see who reads and writes what. from NULL: the same word everywhere.
typedef volatile unsigned __attribute__((may_alias)) Word;
EMU_UNTRACED inline void look_at(const void *p, int bytes) {
    for (int i = 0; i < bytes / 4; i++) (void)((const Word *)p)[i];
}
EMU_UNTRACED inline void move_words(void *to, const void *from, unsigned word, int bytes) {
    for (int i = 0; i < bytes / 4; i++) ((Word *)to)[i] = from ? ((const Word *)from)[i] : word;
}

// What traffic.cpp counts of instructions that take more than a word from each thread.
#ifdef EMU_TRAFFIC
void traffic(const void *p, int bytes, bool write, const char *file, int line);
void traffic_of(const char *kernel, bool shared, double *paid, double *least);                // until now
#else
inline void traffic(const void *, int, bool, const char *, int) {}
#endif

template <int MATRICES, bool TRANSPOSED>
void load_matrices(unsigned *r, const void *row, const char *file, int line) {
    if (E->self->lane < 8 * MATRICES) {
        if ((uintptr_t)row % 16)
            stop(true, "%s:%d: ldmatrix from %p; rows start at multiples of 16 bytes", file, line, row);
        if (!in_shared_memory(row, 16))
            stop(true, "%s:%d: ldmatrix from %p, which is not in shared memory", file, line, row);
        look_at(row, 16);
        traffic(row, 16, false, file, line);
    }
    LoadMatrix l = {r, (const uint16_t *)row};
    warp_operation("ldmatrix", ~0u, &l, operate_ldmatrix<MATRICES, TRANSPOSED>, file, line);
}

// cp.async: from now on the destination is undefined (NaN), until the thread waits for the copy's group.
inline void copy_async(void *to, const void *from, int bytes, bool real, const char *file, int line) {
    if ((uintptr_t)to % bytes || (real && (uintptr_t)from % bytes))
        stop(true, "%s:%d: cp.async of %d bytes to %p from %p; both must be multiples of %d", file, line, bytes, to,
             from, bytes);
    if (!in_shared_memory(to, bytes))
        stop(true, "%s:%d: cp.async to %p, which is not in shared memory", file, line, to);
    const Allocation *a = real ? find(from) : nullptr;
    if (real && (!a || (const char *)from + bytes > a->memory + a->bytes))
        stop(true, "%s:%d: cp.async of %d bytes from %p, which is not in global memory", file, line, bytes, from);
    if (real) look_at(from, bytes), traffic(from, bytes, false, file, line);
    move_words(to, nullptr, ~0u, bytes);
    traffic(to, bytes, true, file, line);
    E->self->copies->push_back({to, real ? from : nullptr, bytes, E->self->group});
}
inline void wait_async(int pending) {                            // until at most so many groups are on their way
    Thread &t = *E->self;
    size_t left = 0;
    for (const Copy &c : *t.copies) {
        if (c.group >= t.group - pending) (*t.copies)[left++] = c;
        else move_words(c.to, c.from, 0, c.bytes), t.wgmma->shown = false;
    }
    t.copies->resize(left);
}

// wgmma, m64n256: 64 rows of A and 256 rows of B, k being contiguous in both, with 32 bytes of each; 16 rows of D to a warp, in
// pieces of 8 columns that lie in registers as those of mma. That wgmma_show follows what was written is asked of cp.async alone.
//
// An operand, in 64 bits: 0 to 13 its address in shared memory / 16; 32 to 45 the distance from 8 rows to the next / 16; 49 to
// 51 zero, as rows start at a multiple of 1024; 62 and 63 how it is swizzled, 1: bits 7 to 9 of the address of each byte, the
// row modulo 8, are XORed into bits 4 to 6.
EMU_UNWATCHED inline const char *wgmma_part(uint64_t operand, int row, int part, const char *file, int line) {
    size_t at = (operand & 0x3FFF) << 4, step = (operand >> 32 & 0x3FFF) << 4, end = E->launch->shared_bytes;
    if (operand >> 62 != 1 || (operand >> 49 & 7))
        stop(true, "%s:%d: wgmma with the operand 0x%016llx; only swizzles of 128 bytes are there", file, line,
             (unsigned long long)operand);
    at += row / 8 * step + row % 8 * 128 + part * 16;
    at ^= at / 128 % 8 * 16;
    if (at + 16 > end)
        stop(true, "%s:%d: wgmma reads row %d of an operand at byte %zu of %zu bytes of dynamic shared memory", file, line, row,
             at, end);
    return E->self->block->dynamic + at;
}

struct Product { float *sum; uint64_t a, b; };
template <bool BFLOAT16>
EMU_UNWATCHED EMU_UNTRACED inline void operate_wgmma(void **x, unsigned) {
    enum { EACH = BFLOAT16 ? 8 : 4, K = 2 * EACH };              // numbers in 16 bytes
    const Product *first = (Product *)x[0];
    float A[64][K], B[256][K];
    for (int i = 0; i < 64 + 256; i++)
        for (int part = 0; part < 2; part++) {
            const int row = i < 64 ? i : i - 64;
            float *to = (i < 64 ? A[row] : B[row]) + part * EACH;
            unsigned word[4];
            memcpy(word, wgmma_part(i < 64 ? first->a : first->b, row, part, E->self->file, E->self->line), 16);
            for (int e = 0; e < EACH; e++)
                to[e] = !BFLOAT16 ? tf32(word[e]) : e % 2 ? high_half(word[e / 2]) : low_half(word[e / 2]);
        }
    for (int i = 0; i < 128; i++) {
        const Product *p = (Product *)x[i];
        if (p->a != first->a || p->b != first->b) stop(false, "wgmma with other operands in thread %d of the warpgroup", i);
        for (int n = 0; n < 128; n++) {
            int row = i / 32 * 16 + i % 32 / 4 + n % 4 / 2 * 8, column = n / 4 * 8 + i % 4 * 2 + n % 2;
            double sum = p->sum[n];
            for (int k = 0; k < K; k++) sum += (double)A[row][k] * B[column][k];
            p->sum[n] = (float)sum;
        }
    }
}
template <bool BFLOAT16>
EMU_UNTRACED void wgmma(float *d, uint64_t a, uint64_t b, const char *file, int line) {
    Thread &t = *E->self;
    if (heap.capability != 90) stop(true, "%s:%d: wgmma; only compute capability 9.0 has it", file, line);
    if (!t.wgmma->started) stop(true, "%s:%d: wgmma without wgmma_start since the last wait", file, line);
    for (int i = 0; i < E->n; i++)
        if (!(&t - t.index)[i].wgmma->shown)
            stop(true, "%s:%d: wgmma while copies of thread %d have come that no wgmma_show followed", file, line, i);
    for (int part = 0; part < 6; part++) {                       // each thread watches over a row of A and two of B
        const int row = part < 2 ? t.index % 64 : t.index % 128 + part / 4 * 128;
        const char *at = wgmma_part(part < 2 ? a : b, row, part % 2, file, line);
        Wgmma::Part p = {at, {}, t.wgmma->group};
        look_at(at, 16);
        memcpy(p.bytes, at, 16);
        t.wgmma->parts.push_back(p);
    }
    size_t s = 0;
    std::vector<Wgmma::Sum> &sums = t.wgmma->sums;
    while (s < sums.size() && sums[s].d != d) s++;
    if (s == sums.size()) {
        sums.push_back({d, {}, 0});
        memcpy(sums[s].value, d, sizeof sums[s].value);
        memset(d, UNWRITTEN, sizeof sums[s].value);
    }
    sums[s].group = t.wgmma->group;
    Product p = {sums[s].value, a, b};
    warpgroup_operation("wgmma", &p, operate_wgmma<BFLOAT16>, file, line);
}
EMU_UNWATCHED inline void wgmma_wait(int pending, const char *file, int line) {      // until at most so many groups go on
    Wgmma &of = *E->self->wgmma;
    size_t left = 0;
    for (const Wgmma::Part &p : of.parts) {
        if (memcmp(p.at, p.bytes, 16))
            stop(true, "%s:%d: shared memory at byte %ld was written while wgmma read it", file, line,
                 (long)((const char *)p.at - E->self->block->dynamic));
        if (p.group >= of.group - pending) of.parts[left++] = p;
    }
    of.parts.resize(left);
    left = 0;
    for (const Wgmma::Sum &s : of.sums) {
        for (size_t i = 0; i < sizeof s.value; i++)
            if (((unsigned char *)s.d)[i] != UNWRITTEN) stop(true, "%s:%d: a sum was written while wgmma computed it", file, line);
        if (s.group < of.group - pending) memcpy(s.d, s.value, sizeof s.value);
        else of.sums[left++] = s;
    }
    of.sums.resize(left);
    of.started = false;
    warp_operation("wgmma_wait", ~0u, nullptr, operate_nothing, file, line);
}

// The barrier at that place; it is there from barrier_init on.
EMU_UNWATCHED inline Phases &phases_at(const char *what, const uint64_t *barrier, const char *file, int line) {
    for (Phases &p : *E->phases)
        if (p.at == barrier) return p;
    stop(true, "%s:%d: %s of %p, which barrier_init has not made a barrier", file, line, what, (const void *)barrier);
}
EMU_UNWATCHED inline void begin_phases(uint64_t *barrier, unsigned count, const char *file, int line) {
    if (heap.capability != 90)
        stop(true, "%s:%d: barrier_init; the kernels here use it only on compute capability 9.0", file, line);
    if ((uintptr_t)barrier % 8 || !in_shared_memory(barrier, 8) || !count)
        stop(true, "%s:%d: barrier_init of %p for %u threads; it takes 8 aligned bytes of shared memory, and a thread", file, line,
             (void *)barrier, count);
    for (Phases &p : *E->phases)
        if (p.at == barrier) stop(true, "%s:%d: barrier_init of %p, which is a barrier already", file, line, (void *)barrier);
    E->phases->push_back({barrier, E->self->block, (int)count, (int)count, 0, 0, {}, {}});
}
EMU_UNWATCHED inline void end_phase(Phases &p) {                 // if all is there
    if (p.left || p.bytes) return;
    p.left = p.count, p.phase++;
    for (int i = 0; i < E->all; i++)
        if (E->threads[i].state == AT_PHASE && E->threads[i].phases == &p) E->threads[i].state = READY;
}
EMU_UNWATCHED inline void arrive_in_phase(Phases &p, long bytes, const char *file, int line) {
    if (!p.left) stop(true, "%s:%d: more threads arrive in a phase than the %d of barrier_init", file, line, p.count);
    EMU_RELEASE(&p.tag[p.phase & 1]);
    p.left--, p.bytes += bytes;
    end_phase(p);
}
EMU_UNWATCHED inline void wait_for_phase(Phases &p, unsigned phase, const char *file, int line) {
    Thread &t = *E->self;
    while ((p.phase & 1) == (phase & 1)) {
        t.what = "barrier_wait", t.file = file, t.line = line, t.phases = &p, t.state = AT_PHASE;
        yield();
    }
    EMU_ACQUIRE(&p.tag[phase & 1]);
}
// The place in the shared memory of another block of the cluster.
template <class T>
T *of_block(T *mine, unsigned rank, const char *what, const char *file, int line) {
    if (rank >= (unsigned)E->launch->cluster)
        stop(true, "%s:%d: %s: there is no block %u in a cluster of %d", file, line, what, rank, E->launch->cluster);
    const char *from = E->self->block->dynamic;
    if (E->launch->cluster > 1 && ((const char *)mine < from || (const char *)mine >= from + E->launch->shared_bytes))
        stop(true, "%s:%d: %s of %p; what the blocks of a cluster share lies in dynamic shared memory", file, line, what,
             (const void *)mine);
    if (E->blocks[rank].returned == E->n)
        stop(true, "%s:%d: %s: block %u of the cluster has ended, and with it its shared memory", file, line, what, rank);
    return (T *)((char *)mine + (E->blocks[rank].dynamic - from));
}
// From now on the destination is undefined (NaN), until the phase has ended, which it does as late as it can: when nobody can run.
inline void copy_in_bulk(void *to, const void *from, unsigned bytes, uint64_t *barrier, unsigned blocks, const char *file,
                         int line) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16)
        stop(true, "%s:%d: a bulk copy of %u bytes to %p from %p; all must be multiples of 16", file, line, bytes, to, from);
    if (!in_shared_memory(to, bytes)) stop(true, "%s:%d: a bulk copy to %p, which is not in shared memory", file, line, to);
    const Allocation *a = find(from);
    if (!a || (const char *)from + bytes > a->memory + a->bytes)
        stop(true, "%s:%d: a bulk copy of %u bytes from %p, which is not in global memory", file, line, bytes, from);
    look_at(from, (int)bytes);
    traffic(from, (int)bytes, false, file, line);                // into shared memory it goes without conflicts
    for (unsigned rank = 0; blocks >> rank; rank++) {
        if (!(blocks >> rank & 1)) continue;
        Phases &p = phases_at("bulk_copy", of_block(barrier, rank, "bulk_copy", file, line), file, line);
        void *there = of_block((char *)to, rank, "bulk_copy", file, line);
        move_words(there, nullptr, ~0u, (int)bytes);
        EMU_RELEASE(&p.tag[p.phase & 1]);
        p.copies.push_back({there, from, (int)bytes, 0});
    }
}
inline bool bring_copies() {                                     // did any come?
    bool some = false;
    for (Phases &p : *E->phases) {
        if (p.copies.empty()) continue;
        char *tag = &p.tag[p.phase & 1];
        EMU_ACQUIRE(tag);
        for (const Copy &c : p.copies) move_words(c.to, c.from, 0, c.bytes), p.bytes -= c.bytes;
        EMU_RELEASE(tag);
        p.copies.clear();
        end_phase(p);
        some = true;
    }
    return some;
}
EMU_UNWATCHED inline void check_end() {                          // of the last thread of a block
    for (Phases &p : *E->phases)
        if (p.block == E->self->block && !p.copies.empty())
            stop(true, "the block ends while copies into its shared memory are on their way");
}

}  // namespace emu

// d += a b, with a 16×16 and b 16×8 in bfloat16, or 16×8 and 8×8 in tf32; d 16×8 in float.
inline void mma_bf16(float *d, const unsigned *a, const unsigned *b, EMU_HERE) {
    emu::Multiply m = {d, a, b};
    emu::warp_operation("mma_bf16", ~0u, &m, emu::operate_mma_bf16, file, line);
}
inline void mma_tf32(float *d, const unsigned *a, const unsigned *b, EMU_HERE) {
    emu::Multiply m = {d, a, b};
    emu::warp_operation("mma_tf32", ~0u, &m, emu::operate_mma_tf32, file, line);
}
inline unsigned to_tf32(float x) { return x != x ? 0x7FFFE000u : (__float_as_uint(x) + 0x1000u) & 0xFFFFE000u; }  // cvt.rna.tf32.f32

// 1, 2 or 4 matrices of 8×8 numbers of 16 bits.
inline void ldmatrix_x1(unsigned *r, const void *row, EMU_HERE) { emu::load_matrices<1, false>(r, row, file, line); }
inline void ldmatrix_x2(unsigned *r, const void *row, EMU_HERE) { emu::load_matrices<2, false>(r, row, file, line); }
inline void ldmatrix_x4(unsigned *r, const void *row, EMU_HERE) { emu::load_matrices<4, false>(r, row, file, line); }
inline void ldmatrix_x1_trans(unsigned *r, const void *row, EMU_HERE) {
    emu::load_matrices<1, true>(r, row, file, line);
}
inline void ldmatrix_x2_trans(unsigned *r, const void *row, EMU_HERE) {
    emu::load_matrices<2, true>(r, row, file, line);
}
inline void ldmatrix_x4_trans(unsigned *r, const void *row, EMU_HERE) {
    emu::load_matrices<4, true>(r, row, file, line);
}
inline void ldmatrix(unsigned *r, const void *row, EMU_HERE) { emu::load_matrices<4, false>(r, row, file, line); }
inline void ldmatrix_trans(unsigned *r, const void *row, EMU_HERE) { emu::load_matrices<4, true>(r, row, file, line); }

// cp.async of 16, 8 or 4 bytes; zeros when not real. Then commit_group, and wait_group<PENDING>.
inline void copy16_async(void *shared, const void *global, bool real = true, EMU_HERE) {
    emu::copy_async(shared, global, 16, real, file, line);
}
inline void copy8_async(void *shared, const void *global, bool real = true, EMU_HERE) {
    emu::copy_async(shared, global, 8, real, file, line);
}
inline void copy4_async(void *shared, const void *global, bool real = true, EMU_HERE) {
    emu::copy_async(shared, global, 4, real, file, line);
}
inline void copy_commit() { emu::E->self->group++; }
template <int PENDING> void copy_wait() { emu::wait_async(PENDING); }
inline void copy_wait_all() { copy_commit(), emu::wait_async(0); }

// d += a bᵀ by four warps, with operands in dynamic shared memory; d is there after wgmma_commit and wgmma_wait. Before: cp.async
// waited for, wgmma_show, barrier, wgmma_start.
inline void wgmma_bf16(float *d, uint64_t a, uint64_t b, EMU_HERE) { emu::wgmma<true>(d, a, b, file, line); }
inline void wgmma_tf32(float *d, uint64_t a, uint64_t b, EMU_HERE) { emu::wgmma<false>(d, a, b, file, line); }
inline void wgmma_hold(float *) {}                               // only nvcc must be told
inline void wgmma_start() { emu::E->self->wgmma->started = true; }
inline void wgmma_commit() { emu::E->self->wgmma->group++; }
template <int PENDING> void wgmma_wait(EMU_HERE) { emu::wgmma_wait(PENDING, file, line); }
inline void wgmma_show() { emu::E->self->wgmma->shown = true; }
template <int COUNT> void give_registers() { static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, ""); }
template <int COUNT> void take_registers() { give_registers<COUNT>(); }

template <class Number> const Number *computed_once(const Number *pointer) { return pointer; }        // as wgmma_hold
inline void next_may_begin() {}                                  // kernels run one after the other
inline void wait_for_before() {}

// Barriers in shared memory, and copies that arrive there (cp.async.bulk), as in cuda_metala.cu.
inline void barrier_init(uint64_t *barrier, unsigned count, EMU_HERE) { emu::begin_phases(barrier, count, file, line); }
inline void barrier_show() {}                                    // only others need it
inline void barrier_arrive(uint64_t *barrier, EMU_HERE) {
    emu::arrive_in_phase(emu::phases_at("barrier_arrive", barrier, file, line), 0, file, line);
}
inline void barrier_expect(uint64_t *barrier, unsigned bytes, EMU_HERE) {
    emu::arrive_in_phase(emu::phases_at("barrier_expect", barrier, file, line), bytes, file, line);
}
inline void barrier_wait(uint64_t *barrier, unsigned phase, EMU_HERE) {
    emu::wait_for_phase(emu::phases_at("barrier_wait", barrier, file, line), phase, file, line);
}
inline void bulk_copy(void *shared, const void *global, unsigned bytes, uint64_t *barrier, EMU_HERE) {
    emu::copy_in_bulk(shared, global, bytes, barrier, 1u << emu::E->self->block->rank, file, line);
}

// Blocks of a cluster: which one this is, all of their threads meet, arrive at the barrier of another one at the same place, copy
// to the same place in several, whose barriers at the same place count the bytes.
inline unsigned cluster_rank() { return (unsigned)emu::E->self->block->rank; }
inline unsigned cluster_size() { return (unsigned)emu::E->launch->cluster; }
inline void cluster_wait(EMU_HERE) { emu::barrier_of_cluster(file, line); }
inline void barrier_arrive_at(uint64_t *barrier, unsigned rank, EMU_HERE) {
    barrier_arrive(emu::of_block(barrier, rank, "barrier_arrive_at", file, line), file, line);
}
inline void bulk_copy_to(unsigned blocks, void *shared, const void *global, unsigned bytes, uint64_t *barrier, EMU_HERE) {
    emu::copy_in_bulk(shared, global, bytes, barrier, blocks, file, line);
}
inline uint64_t wgmma_operand(const void *rows, unsigned bytes, EMU_HERE) {
    size_t at = (size_t)((const char *)rows - emu::E->self->block->dynamic);
    if (((uintptr_t)rows | at) % emu::WGMMA_ALIGN)
        emu::stop(true, "%s:%d: rows for wgmma at byte %zu of dynamic shared memory; they start at multiples of %zu", file, line,
                  at, emu::WGMMA_ALIGN);
    return (at + bytes) >> 4 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

// ============================================================== 8. The runtime's functions

enum cudaError {
    cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35, cudaErrorNoDevice = 100, cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209, cudaErrorInvalidResourceHandle = 400, cudaErrorNotReady = 600,
    cudaErrorIllegalAddress = 700, cudaErrorLaunchFailure = 719, cudaErrorNotSupported = 801,
    cudaErrorStreamCaptureUnsupported = 900, cudaErrorStreamCaptureInvalidated = 901, cudaErrorStreamCaptureImplicit = 906
};
typedef enum cudaError cudaError_t;
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
};
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxGridDimX = 5,
    cudaDevAttrMaxGridDimY = 6,
    cudaDevAttrMaxGridDimZ = 7,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrClockRate = 13,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMemoryClockRate = 36,
    cudaDevAttrGlobalMemoryBusWidth = 37,
    cudaDevAttrL2CacheSize = 38,
    cudaDevAttrMaxThreadsPerMultiProcessor = 39,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrManagedMemory = 83,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventBlockingSync = 1,
       cudaEventDisableTiming = 2, cudaMemAttachGlobal = 1, cudaHostAllocDefault = 0, cudaHostRegisterDefault = 0 };
#define CUDART_VERSION 13000

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor, maxThreadsDim[3],
        maxGridSize[3], regsPerBlock, l2CacheSize, memoryBusWidth, integrated, managedMemory, concurrentManagedAccess;
};
struct cudaFuncAttributes {
    size_t sharedSizeBytes, localSizeBytes;
    int maxThreadsPerBlock, numRegs, maxDynamicSharedSizeBytes;
};
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
struct cudaPointerAttributes { cudaMemoryType type; int device; void *devicePointer, *hostPointer; };

struct EmuEvent { std::chrono::steady_clock::time_point time; bool recorded; };
struct EmuGraph { std::vector<std::function<void()>> nodes; };
typedef struct EmuStream *cudaStream_t;                          // a number
typedef EmuEvent *cudaEvent_t;
typedef EmuGraph *cudaGraph_t;
typedef EmuGraph *cudaGraphExec_t;

// ---- Errors
namespace emu {
struct ErrorName { int code; const char *name, *text; };
const ErrorName error_names[] = {
    {0, "cudaSuccess", "no error"},
    {1, "cudaErrorInvalidValue", "invalid argument"},
    {2, "cudaErrorMemoryAllocation", "out of memory"},
    {9, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {35, "cudaErrorInsufficientDriver", "CUDA driver version is insufficient for CUDA runtime version"},
    {100, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {101, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {209, "cudaErrorNoKernelImageForDevice", "no kernel image is available for execution on the device"},
    {400, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {600, "cudaErrorNotReady", "device not ready"},
    {700, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {719, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {801, "cudaErrorNotSupported", "operation not supported"},
    {900, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {901, "cudaErrorStreamCaptureInvalidated", "operation failed due to a previous error during capture"},
    {906, "cudaErrorStreamCaptureImplicit", "operation would make the legacy stream depend on a capturing blocking stream"},
};
inline const ErrorName *error_name(int code) {
    for (const ErrorName &e : error_names)
        if (e.code == code) return &e;
    return nullptr;
}
inline cudaError_t result(int error) {
    if (error) heap.error = error;
    return (cudaError_t)error;
}
inline int no_device() { return heap.driver < CUDART_VERSION / 1000 * 1000 ? 35 : heap.devices < 1 ? 100 : 0; }
}  // namespace emu
inline const char *cudaGetErrorName(cudaError_t e) {
    return emu::error_name(e) ? emu::error_name(e)->name : "unrecognized error code";
}
inline const char *cudaGetErrorString(cudaError_t e) {
    return emu::error_name(e) ? emu::error_name(e)->text : "unrecognized error code";
}
inline cudaError_t cudaPeekAtLastError() { return (cudaError_t)emu::heap.error; }
inline cudaError_t cudaGetLastError() {
    cudaError_t e = (cudaError_t)emu::heap.error;
    emu::heap.error = 0;
    return e;
}

// ---- The device
inline cudaError_t cudaDriverGetVersion(int *version) { return *version = emu::heap.driver, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int *count) {
    *count = emu::no_device() ? 0 : emu::heap.devices;
    return emu::result(emu::no_device());
}
inline cudaError_t cudaSetDevice(int device) {
    if (emu::no_device()) return emu::result(emu::no_device());
    if (device < 0 || device >= emu::heap.devices) return emu::result(101);
    return emu::heap.device = device, cudaSuccess;
}
inline cudaError_t cudaGetDevice(int *device) { return *device = emu::heap.device, emu::result(emu::no_device()); }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    if (emu::no_device()) return emu::result(emu::no_device());
    if (device < 0 || device >= emu::heap.devices) return emu::result(101);
    *p = cudaDeviceProp();
    snprintf(p->name, sizeof p->name, "CPU (cuda_on_cpu.h)");
    p->totalGlobalMem = emu::heap.limit, p->sharedMemPerBlock = 48 * 1024,
    p->sharedMemPerBlockOptin = emu::shared_limit();
    p->sharedMemPerMultiprocessor = emu::shared_limit() + 1024;
    p->major = emu::heap.capability / 10, p->minor = emu::heap.capability % 10, p->multiProcessorCount = 4,
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->regsPerBlock = 65536;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7FFFFFFF, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->l2CacheSize = 1 << 20, p->memoryBusWidth = 64, p->managedMemory = p->concurrentManagedAccess = 1;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    cudaError_t e = cudaGetDeviceProperties(&p, device);
    if (e) return e;
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrManagedMemory: *value = 1; break;
    case cudaDevAttrClockRate: case cudaDevAttrMemoryClockRate: *value = 1000000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = p.memoryBusWidth; break;
    default: return emu::result(1);
    }
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize(EMU_HERE) {
    if (int e = emu::breaks_capture("cudaDeviceSynchronize", nullptr, true, file, line)) return (cudaError_t)e;
    return emu::drain(), emu::result(emu::no_device() ? emu::no_device() : emu::heap.error);
}
inline cudaError_t cudaDeviceReset() { return emu::drain(), cudaSuccess; }
inline cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *total = emu::heap.limit, *free = emu::heap.limit - emu::heap.used;
    return emu::result(emu::no_device());
}
template <class F> cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || (size_t)value > emu::shared_limit()) return emu::result(1);
    return emu::heap.dynamic_limit[(const void *)kernel] = (size_t)value, cudaSuccess;
}
template <class F> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, F *kernel) {
    *a = cudaFuncAttributes();
    a->maxThreadsPerBlock = 1024, a->maxDynamicSharedSizeBytes = 48 * 1024;
    if (emu::heap.dynamic_limit.count((const void *)kernel))
        a->maxDynamicSharedSizeBytes = (int)emu::heap.dynamic_limit[(const void *)kernel];
    return cudaSuccess;
}
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, F *, int threads, size_t shared) {
    size_t by_shared = shared ? (emu::shared_limit() + 1024) / (shared + 1024) : 32;
    *blocks = (int)min((size_t)(2048 / threads), by_shared);
    return cudaSuccess;
}

// ---- Memory
template <class T> cudaError_t cudaMalloc(T **p, size_t bytes, EMU_HERE) {
    if (emu::no_device()) return emu::result(emu::no_device());
    return (cudaError_t)emu::allocate((void **)p, bytes, emu::DEVICE, file, line);
}
template <class T> cudaError_t cudaMallocAsync(T **p, size_t bytes, cudaStream_t, EMU_HERE) {
    return cudaMalloc(p, bytes, file, line);
}
template <class T> cudaError_t cudaMallocManaged(T **p, size_t bytes, unsigned = cudaMemAttachGlobal, EMU_HERE) {
    if (emu::no_device()) return emu::result(emu::no_device());
    return (cudaError_t)emu::allocate((void **)p, bytes, emu::MANAGED, file, line);
}
template <class T> cudaError_t cudaMallocHost(T **p, size_t bytes, unsigned = 0, EMU_HERE) {
    if (emu::no_device()) return emu::result(emu::no_device());
    return (cudaError_t)emu::allocate((void **)p, bytes, emu::PINNED, file, line);
}
template <class T> cudaError_t cudaHostAlloc(T **p, size_t bytes, unsigned, EMU_HERE) {
    return cudaMallocHost(p, bytes, 0, file, line);
}
inline cudaError_t cudaFree(void *p, EMU_HERE) { return (cudaError_t)emu::release(p, false, "cudaFree", file, line); }
inline cudaError_t cudaFreeAsync(void *p, cudaStream_t, EMU_HERE) { return cudaFree(p, file, line); }
inline cudaError_t cudaFreeHost(void *p, EMU_HERE) {
    return (cudaError_t)emu::release(p, true, "cudaFreeHost", file, line);
}
inline cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned, EMU_HERE) {
    if (emu::find(p)) return emu::result(1);
    emu::heap.alive[(uintptr_t)p] = {(char *)p, (char *)p,         bytes, bytes, emu::PINNED,
                                     true,      ++emu::heap.count, line,  file};
    return cudaSuccess;
}
inline cudaError_t cudaHostUnregister(void *p) {
    emu::drain();
    return emu::result(emu::heap.alive.erase((uintptr_t)p) ? 0 : 1);
}
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *to, const void *p) {
    const emu::Allocation *a = emu::find(p);
    void *pointer = (void *)p;
    to->type = !a ? cudaMemoryTypeUnregistered : a->kind == emu::DEVICE ? cudaMemoryTypeDevice
             : a->kind == emu::MANAGED ? cudaMemoryTypeManaged : cudaMemoryTypeHost;
    to->device = 0, to->devicePointer = a ? pointer : nullptr,
    to->hostPointer = a && a->kind == emu::DEVICE ? nullptr : pointer;
    return cudaSuccess;
}

namespace emu {
// Is [p, p + bytes) on the side where a copy wants it, and inside one allocation?
inline int check_range(const char *name, const char *role, const void *p, size_t bytes, bool device, bool either,
                       const char *file, int line) {
    const Allocation *a = find(p), *gone = a ? nullptr : find_freed(p);
    if (gone) return complain(1, file, line, "%s: the %s was freed, %s", name, role, name_of(*gone).c_str());
    if (!p) return complain(1, file, line, "%s: the %s is NULL", name, role);
    if (!either && device && (!a || a->kind == PINNED))
        return complain(1, file, line, "%s: the %s %p is not device memory", name, role, p);
    if (!either && !device && a && a->kind == DEVICE)
        return complain(1, file, line, "%s: the %s is device memory, byte %ld of %s", name, role,
                        (long)((const char *)p - a->memory), name_of(*a).c_str());
    if (a && (const char *)p + bytes > a->memory + a->bytes)
        return complain(1, file, line, "%s: %zu bytes at byte %ld of the %s, which is %s", name, bytes,
                        (long)((const char *)p - a->memory), role, name_of(*a).c_str());
    return 0;
}
// Ranges of one allocation at a time are opened for the copy itself.
struct Opened {
    const Allocation *a;
    explicit Opened(const void *p) : a(find(p)) { if (a) set_access(*a, true); }
    ~Opened() { if (a) set_access(*a, false); }
};
inline void copy_rows(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height) {
    const Allocation *a = find(to), *b = find(from);
    Opened first(to), second(a == b ? nullptr : from);
    for (size_t i = 0; i < height; i++) memmove((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
}
inline cudaError_t copy(const char *name, void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                        size_t height, int kind, cudaStream_t stream, bool wait, const char *file, int line) {
    if (no_device()) return result(no_device());
    if (!width || !height) return cudaSuccess;
    if (!known_stream(stream))
        return (cudaError_t)complain(400, file, line, "%s: there is no such stream, or no longer", name);
    if (int e = breaks_capture(name, stream, wait, file, line)) return (cudaError_t)e;
    size_t to_bytes = (height - 1) * to_pitch + width, from_bytes = (height - 1) * from_pitch + width;
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    int e = check_range(name, "destination", to, to_bytes, to_device, kind == cudaMemcpyDefault, file, line);
    if (!e) e = check_range(name, "source", from, from_bytes, from_device, kind == cudaMemcpyDefault, file, line);
    if (e) return (cudaError_t)e;
    if (heap.async && !wait && !find(from)) {                    // pageable memory is read during the call, not later
        std::vector<char> now((const char *)from, (const char *)from + from_bytes);
        enqueue([=] { copy_rows(to, to_pitch, now.data(), from_pitch, width, height); });
    } else enqueue([=] { copy_rows(to, to_pitch, from, from_pitch, width, height); });
    if (wait) drain();
    return cudaSuccess;
}
inline cudaError_t set(const char *name, void *to, int value, size_t bytes, cudaStream_t stream, const char *file,
                       int line) {
    if (no_device()) return result(no_device());
    if (!bytes) return cudaSuccess;
    if (!known_stream(stream))
        return (cudaError_t)complain(400, file, line, "%s: there is no such stream, or no longer", name);
    if (int e = breaks_capture(name, stream, false, file, line)) return (cudaError_t)e;
    if (int e = check_range(name, "destination", to, bytes, true, false, file, line)) return (cudaError_t)e;
    enqueue([=] {
        Opened opened(to);
        memset(to, value, bytes);
    });
    return cudaSuccess;
}
}  // namespace emu
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, EMU_HERE) {
    return emu::copy("cudaMemcpy", to, bytes, from, bytes, bytes, 1, kind, nullptr, true, file, line);
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream = 0, EMU_HERE) {
    return emu::copy("cudaMemcpyAsync", to, bytes, from, bytes, bytes, 1, kind, stream, false, file, line);
}
inline cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                                size_t height, cudaMemcpyKind kind, EMU_HERE) {
    return emu::copy("cudaMemcpy2D", to, to_pitch, from, from_pitch, width, height, kind, nullptr, true, file, line);
}
inline cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                                     size_t height, cudaMemcpyKind kind, cudaStream_t stream = 0, EMU_HERE) {
    return emu::copy("cudaMemcpy2DAsync", to, to_pitch, from, from_pitch, width, height, kind, stream, false, file,
                     line);
}
template <class T> cudaError_t cudaMemcpyToSymbol(T &symbol, const void *from, size_t bytes, size_t offset = 0,
                                                  cudaMemcpyKind = cudaMemcpyHostToDevice, EMU_HERE) {
    if (offset + bytes > sizeof symbol)
        return (cudaError_t)emu::complain(1, file, line, "cudaMemcpyToSymbol: %zu bytes at byte %zu of %zu", bytes,
                                          offset, sizeof symbol);
    emu::drain();
    return memcpy((char *)&symbol + offset, from, bytes), cudaSuccess;
}
template <class T> cudaError_t cudaMemcpyFromSymbol(void *to, const T &symbol, size_t bytes, size_t offset = 0,
                                                    cudaMemcpyKind = cudaMemcpyDeviceToHost, EMU_HERE) {
    if (offset + bytes > sizeof symbol)
        return (cudaError_t)emu::complain(1, file, line, "cudaMemcpyFromSymbol: %zu bytes at byte %zu of %zu", bytes,
                                          offset, sizeof symbol);
    emu::drain();
    return memcpy(to, (const char *)&symbol + offset, bytes), cudaSuccess;
}
inline cudaError_t cudaMemset(void *to, int value, size_t bytes, EMU_HERE) {
    return emu::set("cudaMemset", to, value, bytes, nullptr, file, line);
}
inline cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream = 0, EMU_HERE) {
    return emu::set("cudaMemsetAsync", to, value, bytes, stream, file, line);
}

// ---- Streams and events: one queue for all streams, in the order of the calls
inline cudaError_t cudaStreamCreate(cudaStream_t *s) {
    if (emu::no_device()) return emu::result(emu::no_device());
    return emu::heap.streams.insert(*s = (cudaStream_t)(uintptr_t)(0x1000 + ++emu::heap.count)), cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) { return cudaStreamCreate(s); }
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned, int) { return cudaStreamCreate(s); }
inline cudaError_t cudaStreamDestroy(cudaStream_t s) {
    emu::drain();
    return emu::result(emu::heap.streams.erase(s) ? 0 : 400);
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t s, EMU_HERE) {
    if (int e = emu::breaks_capture("cudaStreamSynchronize", nullptr, true, file, line)) return (cudaError_t)e;
    if (!emu::known_stream(s)) return emu::result(400);
    return emu::drain(), emu::result(emu::heap.error);
}
inline cudaError_t cudaStreamQuery(cudaStream_t) { return emu::heap.queue.empty() ? cudaSuccess : cudaErrorNotReady; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0) { return cudaSuccess; }
inline cudaError_t cudaEventCreate(cudaEvent_t *e) { return *e = new EmuEvent(), emu::result(emu::no_device()); }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { return cudaEventCreate(e); }
inline cudaError_t cudaEventDestroy(cudaEvent_t e) { return emu::drain(), delete e, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t = 0) {
    emu::enqueue([=] { e->time = std::chrono::steady_clock::now(), e->recorded = true; });
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return emu::drain(), cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t) { return cudaStreamQuery(0); }
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    if (!from->recorded || !to->recorded) return emu::result(emu::heap.queue.empty() ? 400 : 600);
    return *ms = std::chrono::duration<float, std::milli>(to->time - from->time).count(), cudaSuccess;
}

// ---- Graphs: what is captured is kept and done again. The default stream cannot be captured.
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (!stream || emu::heap.capturing) return emu::result(stream ? 1 : 900);
    if (!emu::known_stream(stream)) return emu::result(400);
    emu::heap.capturing = stream, emu::heap.spoiled = false;
    return emu::heap.graph = new std::vector<std::function<void()>>(), cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *g) {
    *g = nullptr;
    if (!emu::heap.capturing || stream != emu::heap.capturing) return emu::result(1);
    if (!emu::heap.spoiled) *g = new EmuGraph{*emu::heap.graph};
    delete emu::heap.graph;
    emu::heap.capturing = nullptr, emu::heap.graph = nullptr;
    return emu::result(emu::heap.spoiled ? 901 : 0);
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *to, cudaGraph_t g, unsigned long long = 0) {
    return *to = new EmuGraph(*g), cudaSuccess;
}
inline cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *to, cudaGraph_t g, unsigned long long flags) {
    return cudaGraphInstantiate(to, g, flags);
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t g, cudaStream_t) {
    for (auto &node : g->nodes) emu::enqueue(node);
    return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t g) { return delete g, cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g) { return delete g, cudaSuccess; }

#endif
