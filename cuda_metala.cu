// cuda_metala.cu - the kernels of metala.c once more, for an NVIDIA GPU (compute capability 8.0 or newer).
//
// The file mirrors sections 2 to 6 of metala.c: the same functions in the same order under the same names, with the
// same arguments, and the kernel behind `name` is called `name_kernel`. What a function computes stands above its twin
// in metala.c; the comments here say how the work is shared out over threads. The model itself is not here: metala.c
// calls whatever backend table its context has, and this file fills one.
//
// Contents
//     1. Context: errors, memory, launches
//     2. Scalar functions; sums over warps and blocks
//     3. Matrix products
//     4. The kernels around the scan
//     5. The decay scan
//     6. The backend table
//
// To write a kernel of your own, put it in place of one here and ask
//
//     make CUDA=1 && ./test --device cuda --kernel rms_forward       on a GPU
//     make test-emu                                                  without one; with nvcc, make test-ptx
//
// which compare it with its CPU twin on random and edge shapes. So that it also runs without a GPU, where
// emulator/cuda_on_cpu.h makes every thread a fiber of the CPU, three conventions hold:
//
//     LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)      in place of kernel<<<...>>>(...)
//     DYNAMIC_SHARED(type, name)                                           in place of extern __shared__ type name[]
//     inline PTX only in the functions under "Instructions" below, one instruction each, or two that belong together
//
// and RUN_EARLY is for kernels that call wait_for_before ahead of all that they write or that others wrote (test-ptx sees it).
//
// Bits: the order of every sum follows from the shapes alone. There are no atomics on floats; where blocks share a sum,
// each leaves its part in scratch memory and a second kernel adds the parts in order.

#include "metala.h"

#include <atomic>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <type_traits>

#ifdef METALA_FLOAT64
#error "the GPU's kernels compute in float: build without -DMETALA_FLOAT64"
#endif

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#ifdef METALA_CUBLAS
#include <cublas_v2.h>
#endif
#define LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define DYNAMIC_SHARED(type, name)                                        \
    extern __shared__ __align__(1024) unsigned char name##_as_bytes[];    \
    type *name = (type *)name##_as_bytes
#endif

// Hidden from other files, as `static` hides them in C; kernels of a template cannot be static.
namespace {

// ---- Instructions. One each, in the register layouts of the PTX ISA; the emulator has its own.

#ifdef __CUDACC__
// D += A B on tensor cores by a warp: D 16×8 in float, A 16×16 and B 16×8 in bfloat16, or 16×8 and 8×8 in tf32. With
// g = lane/4, t = lane%4:  d[i] is row g + 8(i/2), column 2t + i%2;  tf32: a[r] is row g + 8(r%2), column t + 4(r/2),
// b[r] row t + 4r, column g;  bfloat16: two to a register, columns 2t + 8(r/2) and the next of A, rows 2t + 8r of B.
#define MMA(kind)                                                                                                           \
    asm volatile("mma.sync.aligned." kind " {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"                             \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
__device__ __forceinline__ void mma_bf16(float *d, const unsigned *a, const unsigned *b) {
    MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
__device__ __forceinline__ void mma_tf32(float *d, const unsigned *a, const unsigned *b) {
    MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
// A float rounded to tf32, 10 bits of fraction.
__device__ __forceinline__ unsigned to_tf32(float x) {
    unsigned u;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(u) : "f"(x));
    return u;
}
// Four matrices of 8 rows of 16 bytes each: lane 8m + i points to row i of matrix m, and r[m] becomes the t-th four
// bytes of its row g.
__device__ __forceinline__ void ldmatrix_x4(unsigned *r, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
}
// Copies from global to shared memory that the thread does not wait for; zeros when not `real`. copy_commit makes a
// group of those so far, copy_wait<n> waits until at most the last n groups are on their way.
__device__ __forceinline__ void copy16_async(void *shared, const void *global, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
                 "l"(global), "r"(real ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// D += A Bᵀ by a warpgroup, four warps, on the tensor cores of compute capability 9.0, which read both operands from shared
// memory: D 64×256 in float, A 64 rows and B 256 rows of 32 bytes, which are 8 numbers in tf32 or 16 in bfloat16. d[4j + i]
// is row 16w + g + 8(i/2), column 8j + 2t + i%2, of warp w. It runs on its own, from wgmma_start, before the first product,
// over wgmma_commit, which makes a group of those so far, to wgmma_wait<PENDING>, after which at most so many groups go on.
// wgmma_hold(d) tells the compiler that the 128 numbers of d are in their registers now, so that it moves no use of them
// across: before wgmma_start and after the last wait. What threads wrote, or copied, to shared memory they show by
// wgmma_show before the barrier; what bulk_copy brought needs none.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define ASM_90A(...) asm volatile(__VA_ARGS__)
#else
#define ASM_90A(...) __trap()                                    // in the code for other GPUs, where nobody launches it
#endif
#define D_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D_8(i) D_4(i), D_4(i + 4)
#define D_64(i) D_8(i), D_8(i + 8), D_8(i + 16), D_8(i + 24), D_8(i + 32), D_8(i + 40), D_8(i + 48), D_8(i + 56)
#define D_128 D_64(0), D_64(64)
#define D_NAMES                                                                                             \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"   \
    "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"  \
    "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,"  \
    "%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,"     \
    "%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,"  \
    "%121,%122,%123,%124,%125,%126,%127}"
__device__ __forceinline__ void wgmma_bf16(float *d, uint64_t a, uint64_t b) {
    ASM_90A("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " D_NAMES ",%128,%129,1,1,1,0,0;" : D_128 : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma_tf32(float *d, uint64_t a, uint64_t b) {
    ASM_90A("wgmma.mma_async.sync.aligned.m64n256k8.f32.tf32.tf32 " D_NAMES ",%128,%129,1,1,1;" : D_128 : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma_hold(float *d) { ASM_90A("" : D_128 : : "memory"); }
__device__ __forceinline__ void wgmma_start() { ASM_90A("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { ASM_90A("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    ASM_90A("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void wgmma_show() { ASM_90A("fence.proxy.async.shared::cta;" ::: "memory"); }
// All threads of a warpgroup have COUNT registers each from here on, a multiple of 8 from 24 to 256. What one warpgroup of the
// block gives back another may take, and waits for it; together they cannot have more than the block was launched with.
template <int COUNT> __device__ __forceinline__ void give_registers() {
    ASM_90A("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT) : "memory");
}
template <int COUNT> __device__ __forceinline__ void take_registers() {
    ASM_90A("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT) : "memory");
}
// An operand in shared memory: rows of 128 bytes, from a multiple of 1024 on, of which `bytes`, 0, 32, 64 or 96, come before
// those to be read; the 16 bytes number p of row i lie at place p ^ i%8 ("128-byte swizzle"). Bits 0 to 13: address/16;
// 16 to 29: 1, without meaning here; 32 to 45: the 1024 bytes from 8 rows to the next 8, /16; 62: this swizzle.
__device__ __forceinline__ uint64_t wgmma_operand(const void *rows, unsigned bytes) {
    uint64_t address = (unsigned)__cvta_generic_to_shared(rows) + bytes;
    return (address & 0x3FFFF) >> 4 | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

// Barriers in shared memory, 8 bytes each (mbarrier). A phase ends when `count` threads have arrived and all expected bytes have
// come; then the next begins. barrier_wait(b, p) returns once the latest phase of parity p has ended. Phases have the parities 0,
// 1, 0, …; of a new barrier, parity 1 counts as ended. barrier_expect arrives and announces bytes. After barrier_init:
// wgmma_show, for copies, and barrier_show, for other blocks, then __syncthreads or cluster_wait. bulk_copy: one thread calls it
// for all; addresses and size are multiples of 16.
__device__ __forceinline__ void barrier_init(uint64_t *barrier, unsigned count) {
    ASM_90A("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"((unsigned)__cvta_generic_to_shared(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_show() { ASM_90A("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(uint64_t *barrier, unsigned bytes) {
    ASM_90A("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"((unsigned)__cvta_generic_to_shared(barrier)),
            "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t *barrier, unsigned phase) {
    unsigned ended = 0;
    while (!ended)
        ASM_90A("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                : "=r"(ended) : "r"((unsigned)__cvta_generic_to_shared(barrier)), "r"(phase) : "memory");
}
__device__ __forceinline__ void bulk_copy(void *shared, const void *global, unsigned bytes, uint64_t *barrier) {
    ASM_90A("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
            ::"r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global),
              "r"(bytes), "r"((unsigned)__cvta_generic_to_shared(barrier)) : "memory");
}

// Blocks that follow each other in a grid may form clusters, which run together and reach each other's shared memory: of how many,
// which one this is, a barrier for all their threads. The last thing they do is to meet there, or one might end while others still
// reach for its memory. barrier_arrive_at is for the barrier at the same place in block `rank`; what the thread wrote before, the
// other block need not see. bulk_copy_to brings the same numbers to the same place in all `blocks`, one bit each, and tells the
// barrier at the same place in each: they are read once.
__device__ __forceinline__ unsigned cluster_size() {
    unsigned size = 1;
    ASM_90A("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank = 0;
    ASM_90A("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_wait() {
    ASM_90A("barrier.cluster.arrive.release.aligned;" ::: "memory");
    ASM_90A("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive_at(uint64_t *barrier, unsigned rank) {
    ASM_90A("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
            " mbarrier.arrive.shared::cluster.b64 _, [there]; }"
            ::"r"((unsigned)__cvta_generic_to_shared(barrier)), "r"(rank) : "memory");
}
__device__ __forceinline__ void bulk_copy_to(unsigned blocks, void *shared, const void *global, unsigned bytes,
                                             uint64_t *barrier) {
    ASM_90A("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
            ::"r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global), "r"(bytes),
              "r"((unsigned)__cvta_generic_to_shared(barrier)), "h"((uint16_t)blocks) : "memory");
}
#endif

#ifdef __CUDACC__
// A pointer to global memory. Of one that only conditional loads use, nvcc would do the arithmetic again for each of them.
template <class Number>
__device__ __forceinline__ const Number *computed_once(const Number *pointer) {
    asm volatile("" : "+l"(pointer));
    __builtin_assume(__isGlobal(pointer));
    return pointer;
}
#endif

// Kernels that follow each other, from compute capability 9.0 on (programmatic dependent launch): one launched by RUN_EARLY
// may begin as soon as all blocks of the one before have said next_may_begin, or ended. Before wait_for_before it must not write,
// nor read what an earlier kernel may still write. Behind it the kernel before has ended; and all earlier ones, because that one
// has waited, too. So every early kernel must wait, whatever its shapes, even if it needs nothing.
std::atomic<bool> runs_early;                                    // does this GPU's code have them? metala_cuda has asked
#ifdef __CUDACC__
__device__ __forceinline__ void next_may_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Early, and in clusters of so many blocks.
template <class... Parameters, class... Arguments>
void launch_early(unsigned cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                  Arguments... arguments) {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t launch = {};
    launch.gridDim = grid, launch.blockDim = block, launch.dynamicSmemBytes = shared, launch.stream = stream;
    launch.attrs = attributes;
    if (runs_early) {
        cudaLaunchAttribute &early = attributes[launch.numAttrs++];
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        cudaLaunchAttribute &clusters = attributes[launch.numAttrs++];
        clusters.id = cudaLaunchAttributeClusterDimension;
        clusters.val.clusterDim.x = cluster, clusters.val.clusterDim.y = clusters.val.clusterDim.z = 1;
    }
    cudaLaunchKernelEx(&launch, kernel, Parameters(arguments)...);       // its error stays for who asks for the last one
}
#define LAUNCH_EARLY_CLUSTERS(size, kernel, grid, block, shared, stream, ...) \
    launch_early(size, kernel, grid, dim3(block), shared, stream, __VA_ARGS__)
#else
#define LAUNCH_EARLY_CLUSTERS LAUNCH_CLUSTERS                    // nothing begins early there
#endif
#define LAUNCH_EARLY(...) LAUNCH_EARLY_CLUSTERS(1, __VA_ARGS__)
#define LAUNCH_PAIRS(...) LAUNCH_EARLY_CLUSTERS(2, __VA_ARGS__)

// ============================================================== 1. Context: errors, memory, launches

enum { WARP = 32, THREADS = 256, WARPS = THREADS / WARP };       // of a block, unless a kernel says otherwise

// Values of cudaError_t that have an advice of their own.
enum { OUT_OF_MEMORY = 2, OLD_DRIVER = 35, NO_DEVICE = 100, NO_IMAGE = 209, ILLEGAL_ADDRESS = 700,
       LAUNCH_FAILED = 719 };

const char *advice(int error) {
    switch (error) {
    case OUT_OF_MEMORY: return "try a smaller batch, context or model";
    case OLD_DRIVER: return "there is no NVIDIA driver, or it is older than this program's CUDA: install or update it";
    case NO_DEVICE: return "nvidia-smi lists the GPUs; CUDA_VISIBLE_DEVICES hides them";
    case NO_IMAGE: return "build again with the CUDA_ARCH of this GPU, as in make CUDA=1 CUDA_ARCH=90a for an H100";
    case ILLEGAL_ADDRESS:
    case LAUNCH_FAILED: return "compute-sanitizer names the kernel, as does CUDA_LAUNCH_BLOCKING=1";
    default: return "CUDA_LAUNCH_BLOCKING=1 shows which call it was";
    }
}

// Marks the context when a call of the runtime has failed; true when all is well.
bool check(metala_context *ctx, cudaError_t error, const char *what, const char *file, int line) {
    if (error == cudaSuccess) return true;
    cudaGetLastError();                                          // the error is reported, so it is over, if it can be
    metala_context_fail(ctx, "%s:%d: %s: CUDA error %d, %s; %s", file, line, what, (int)error,
                        cudaGetErrorString(error), advice((int)error));
    return false;
}
#define CHECK(call) check(ctx, call, #call, __FILE__, __LINE__)

void *cuda_alloc(size_t bytes) {
    void *memory = NULL;
    if (cudaMalloc(&memory, bytes ? bytes : 1) != cudaSuccess || cudaMemset(memory, 0, bytes) != cudaSuccess) {
        cudaGetLastError();                                      // the caller says what was wanted
        cudaFree(memory);
        return NULL;
    }
    return memory;
}

void cuda_free(void *memory) { cudaFree(memory); }

// Kernels and copies are in one stream and so in order: the default one, but for what is recorded. A copy to the host waits for
// all that came before it, and is where an error inside a kernel shows. download of 0 bytes only waits.
thread_local cudaStream_t stream = 0;

void cuda_upload(metala_context *ctx, void *to, const void *host, size_t bytes) {
    if (bytes) CHECK(cudaMemcpy(to, host, bytes, cudaMemcpyHostToDevice));
}
void cuda_download(metala_context *ctx, void *host, const void *from, size_t bytes) {
    if (bytes) CHECK(cudaMemcpy(host, from, bytes, cudaMemcpyDeviceToHost));
    else CHECK(cudaStreamSynchronize(stream));
}
void cuda_copy(metala_context *ctx, void *to, const void *from, size_t bytes) {
    if (bytes) CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream));
}
void cuda_zero(metala_context *ctx, void *memory, size_t bytes) {
    if (bytes) CHECK(cudaMemsetAsync(memory, 0, bytes, stream));
}

// What is recorded becomes a graph of CUDA. Only a stream of its own can be captured, and nothing runs in that one: the graph
// does, in the default stream, like all else.
int cuda_begin_recording(metala_context *) {
    cudaStream_t own = NULL;
    if (cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking) == cudaSuccess) {
        if (cudaStreamBeginCapture(own, cudaStreamCaptureModeThreadLocal) == cudaSuccess) {
            stream = own;
            return 0;
        }
        cudaStreamDestroy(own);
    }
    cudaGetLastError();
    return -1;
}
void *cuda_end_recording(metala_context *) {
    cudaGraph_t graph = NULL;
    cudaGraphExec_t recording = NULL;
    if (cudaStreamEndCapture(stream, &graph) != cudaSuccess ||
        cudaGraphInstantiateWithFlags(&recording, graph, 0) != cudaSuccess) {
        cudaGetLastError();
        recording = NULL;
    }
    if (graph) cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    stream = 0;
    return recording;
}
void cuda_replay(metala_context *ctx, void *recording) { CHECK(cudaGraphLaunch((cudaGraphExec_t)recording, stream)); }
void cuda_forget(void *recording) { cudaGraphExecDestroy((cudaGraphExec_t)recording); }

// Memory for the duration of one call, as in metala.c; the context has it. Kernels of the next call may reuse it while
// those of this one still wait in the stream: they run after them.
float *scratch(metala_context *ctx, size_t floats) {
    float *memory = (float *)metala_context_scratch(ctx, floats * sizeof(float));
#ifndef __CUDACC__                                               // the emulator shows who reads what nobody wrote, or goes too far
    memory = (float *)emu::last_bytes(memory, floats * sizeof(float));
    if (memory) cudaMemsetAsync(memory, 0xFF, floats * sizeof(float), stream);
#endif
    return memory;
}

struct extent {                                                  // of a grid, in blocks, before it is known to fit
    size_t x, y, z;
    extent(size_t x, size_t y = 1, size_t z = 1) : x(x), y(y), z(z) {}
};

// Does a launch keep to the limits of the GPU? A grid without blocks has nothing to do. More than 48 KB of shared
// memory must be asked for, which fails when the GPU has less.
template <class Kernel>
bool fits(metala_context *ctx, Kernel *kernel, const char *name, extent grid, size_t shared, const char *file,
          int line) {
    if (!grid.x || !grid.y || !grid.z) return false;
    if (grid.x > INT_MAX || grid.y > 65535 || grid.z > 65535) {
        metala_context_fail(ctx, "%s:%d: %s needs a grid of %zu x %zu x %zu blocks, CUDA allows %d x 65535 x 65535;"
                            " try a smaller batch or fewer heads", file, line, name, grid.x, grid.y, grid.z, INT_MAX);
        return false;
    }
    if (shared <= 48 * 1024) return true;
    if (shared <= INT_MAX &&
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared) == cudaSuccess)
        return true;
    cudaGetLastError();
    metala_context_fail(ctx, "%s:%d: %s needs %zu bytes of shared memory in a block, more than this GPU has; use more"
                        " heads, so that each is smaller", file, line, name, shared);
    return false;
}

// Bytes of shared memory that a block can have: 227 KB on an H100, 163 KB on an A100, 99 KB on GPUs for desktops. Where a
// kernel would want more, a smaller or slower one is taken.
size_t shared_room() {
    int device = 0, bytes = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
        cudaGetLastError();                                      // the launch will say more
    return (size_t)bytes;
}

// For kernels whose blocks go from one piece of work to the next.
size_t multiprocessors() {
    int device = 0, count = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
        cudaGetLastError();
    return count > 0 ? (size_t)count : 1;
}

// RUN(kernel, grid, block, shared bytes, arguments...): checks the limits, launches, checks the launch.
#define RUN(...) RUN_BY(LAUNCH, __VA_ARGS__)
#define RUN_EARLY(...) RUN_BY(LAUNCH_EARLY, __VA_ARGS__)
#define RUN_PAIRS(...) RUN_BY(LAUNCH_PAIRS, __VA_ARGS__)          // also early, clusters of two blocks
#define RUN_BY(HOW, kernel, grid, block, shared, ...)                                 \
    do {                                                                              \
        extent grid_ = grid;                                                          \
        size_t shared_ = shared;                                                      \
        if (fits(ctx, kernel, #kernel, grid_, shared_, __FILE__, __LINE__)) {         \
            dim3 blocks_((unsigned)grid_.x, (unsigned)grid_.y, (unsigned)grid_.z);    \
            HOW(kernel, blocks_, block, shared_, stream, __VA_ARGS__);                \
            check(ctx, cudaGetLastError(), #kernel, __FILE__, __LINE__);              \
        }                                                                             \
    } while (0)

__host__ __device__ constexpr size_t ceil_div(size_t n, size_t unit) { return n / unit + (n % unit != 0); }
__host__ __device__ constexpr size_t least(size_t a, size_t b) { return a < b ? a : b; }
__host__ __device__ constexpr size_t greatest(size_t a, size_t b) { return a > b ? a : b; }
__host__ __device__ constexpr size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// Blocks for n independent numbers or rows. Each thread, or warp, takes one and then every so many further on, so that
// the grid stays small whatever n is: very small in the emulator, which tries these loops on small shapes.
#ifdef __CUDACC__
enum { MOST_BLOCKS = 65535 };                                    // as many as CUDA allows in y
#else
enum { MOST_BLOCKS = 7 };
#endif
size_t blocks_for(size_t n, size_t in_block) {
    return least(ceil_div(n, in_block), MOST_BLOCKS);
}
#define FOR_EACH(i, n) \
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (n); i += (size_t)gridDim.x * blockDim.x)
#define FOR_EACH_ROW(row, rows) for (size_t row = blockIdx.x; row < (rows); row += gridDim.x)
#define FOR_EACH_WARP(row, rows) \
    for (size_t row = blockIdx.x * (size_t)WARPS + threadIdx.x / WARP; row < (rows); row += (size_t)gridDim.x * WARPS)

// What bounds a kernel that only reads and writes is how much of it is on its way at a time. So a thread loads several numbers
// before it stores one: no load moves up across a store, which might change what is to be loaded.

// store(i, load(i)) for a thread's numbers i, i + THREADS, …, FEW of them, below n.
enum { FEW = 4 };
template <class Load, class Store>
__device__ __forceinline__ void few(size_t first, size_t n, Load load, Store store) {
    decltype(load(first)) loaded[FEW];
#pragma unroll
    for (int j = 0; j < FEW; j++)
        if (first + j * THREADS < n) loaded[j] = load(first + j * THREADS);
#pragma unroll
    for (int j = 0; j < FEW; j++)
        if (first + j * THREADS < n) store(first + j * THREADS, loaded[j]);
}
#define FOR_EACH_FEW(first, n)                                                                   \
    for (size_t first = blockIdx.x * (size_t)(FEW * THREADS) + threadIdx.x; first < (n);         \
         first += (size_t)gridDim.x * (FEW * THREADS))

// A row, or head, of a warp: each lane holds HELD of its numbers at a time, d, d + 32, …. A row of up to 32·HELD is held whole,
// and needs no second reading when a sum over it is there; of a longer one each stretch is loaded anew. The macros
// use the HELD of where they stand.
#define FOR_EACH_STRETCH(d, width) for (size_t d = threadIdx.x % WARP; d < (width); d += HELD * WARP)
#define FOR_EACH_HELD(j, d, width) \
    _Pragma("unroll") for (unsigned j = 0; j < HELD; j++) if (j * WARP < left_of(d, width, HELD * WARP))
__device__ __forceinline__ unsigned left_of(size_t d, size_t width, unsigned most) {
    return d < width ? (unsigned)least(width - d, most) : 0;
}
template <int HELD>
__device__ __forceinline__ void load_held(float (&x)[HELD], const float *row, size_t d, size_t width) {
    FOR_EACH_HELD(j, d, width) x[j] = row[d + j * WARP];
}
// run(HELD) with the least that holds a row whole, or with the most: a row of the model, or one of its heads.
enum { HELD_OF_HEAD = 8, HELD_OF_ROW = 32 };
template <int MOST, int HELD = 4, class Run>
void by_width(size_t width, Run run) {
    if constexpr (HELD < MOST)
        if (width > HELD * WARP) return by_width<MOST, 2 * HELD>(width, run);
    run(std::integral_constant<int, HELD>());
}

// ============================================================== 2. Scalar functions; sums over warps and blocks

// expf, log1pf and expm1f of the CUDA library are right to one or two units of the last place (no -use_fast_math).

// σ(x) = 1/(1+e^-x), with the exponential of -|x|.
__device__ float sigmoid(float x) {
    float e = expf(-fabsf(x)), s = 1 / (1 + e);
    return x < 0 ? e * s : s;
}
// log σ(z) = min(z,0) - log(1 + e^-|z|)
__device__ float log_sigmoid(float z) { return (z < 0 ? z : 0) - log1pf(expf(-fabsf(z))); }
// silu(x) = x σ(x) and its derivative σ(x)(1 + x(1 - σ(x))).
__device__ float silu(float x) { return x * sigmoid(x); }
__device__ float silu_slope(float x) {
    float s = sigmoid(x);
    return s * (1 + x * (1 - s));
}
// y = silu(a) b, and from its gradient dy those of a and b.
struct gated { float y, da, db; };
__device__ gated silu_gate(float a, float b, float dy) {
    const float s = sigmoid(a);
    return {a * s * b, dy * b * s * (1 + a * (1 - s)), dy * a * s};
}
// weight (softmax(logits) - onehot(target)) of class i, lse the logarithm of the sum of all exponentials; 0 where ignored.
__device__ float logit_gradient(float logit, float lse, int target, size_t i, float weight) {
    const float p = weight * expf(logit - lse) - ((size_t)target == i ? weight : 0);
    return target == METALA_IGNORE ? 0 : p;
}

const unsigned ALL_LANES = 0xFFFFFFFFu;

// The sum over the 32 lanes of a warp, in every lane: pairs, then pairs of pairs, …
template <class Number>
__device__ Number warp_sum(Number x) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

// The sum over a block of so many warps, in every thread.
template <int COUNT = WARPS, class Number>
__device__ Number block_sum(Number x) {
    __shared__ Number part[COUNT];
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0;
    for (int warp = 0; warp < COUNT; warp++) x += part[warp];
    __syncthreads();                                             // part may be written again
    return x;
}

// to[i] (+)= Σ_p parts[p·stride + i] in order: the second stage of a sum that blocks share.
__global__ void sum_parts_kernel(float *to, const float *parts, size_t count, size_t stride, size_t n, int accumulate) {
    FOR_EACH(i, n) {
        float sum = 0;
#pragma unroll 32
        for (size_t p = 0; p < count; p++) sum += parts[p * stride + i];             // few threads: many loads at a time
        to[i] = accumulate ? to[i] + sum : sum;
    }
}

// ============================================================== 3. Matrix products

// C = A B in float, on the ordinary multipliers. A block of 256 threads computes a TILE × TILE piece of C; for every 16
// values of k it brings a strip of A and one of B to shared memory, and each thread multiplies an outer product of R
// numbers of A with R of B, R = TILE/16, which stay in registers: 2R loads for R² multiply-adds. While it does, the
// next strips are on their way from global memory.
//
//   A(i,k) = a[i·a_row + k·a_k]      B(k,j) = b.at(k,j)      bias [N] and base (M,N), perhaps C itself, are added; or NULL
//   A_BY_K, B_BY_K: k is what is contiguous in memory, so that threads side by side must read k side by side
//
// gridDim.z > 1 shares out k: block z sums k from z·k_each on and leaves its part in c + z·M·N.

enum { STRIP = 16 };

// From how many tiles on the larger ones are taken: all multiprocessors should have one. The emulator takes them early, so
// that small shapes try them.
#ifdef __CUDACC__
enum { LARGE_FROM = 64, WIDE_FROM = 128 };
#else
enum { LARGE_FROM = 4, WIDE_FROM = 2 };
#endif

// Which tile a block computes. Blocks that run at the same time should share operands, which then come from the cache:
// a group of 8 tiles in height is gone through column by column.
struct place { size_t i, j; };
__device__ place place_of(unsigned block, size_t M, size_t N, size_t tile_rows, size_t tile_columns) {
    const unsigned rows = (unsigned)ceil_div(M, tile_rows), columns = (unsigned)ceil_div(N, tile_columns);
    const unsigned first = block / (8 * columns) * 8, height = rows - first < 8 ? rows - first : 8, n = block - first * columns;
    place p = {(first + n % height) * tile_rows, n / height * tile_columns};
    return p;
}

// Weights of some type: one number; or, of row j from k on, WIDE numbers at a time in two steps: first what lies in memory, which
// must be aligned to its size, later the numbers that it stands for.
struct real_weights {
    const float *w;
    size_t k_step, column_step;
    __device__ float at(size_t k, size_t j) const { return w[k * k_step + j * column_step]; }
    enum { WIDE = 4 };
    typedef float4 wide;
    __device__ const wide *wides(size_t k, size_t j) const { return computed_once((const wide *)(w + j * column_step + k)); }
    __device__ static void unpack(float *to, wide x) { to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w; }
};

// Quantized weights, W'[j][k] as metala.c explains them: the upper halves of floats, or scaled bytes.
struct bfloat16_weights {
    const uint16_t *w;
    size_t in;
    __device__ static float real(unsigned bits) { return __uint_as_float(bits << 16); }
    __device__ float at(size_t k, size_t j) const { return real(w[j * in + k]); }
    enum { WIDE = 8 };
    typedef uint4 wide;
    __device__ const wide *wides(size_t k, size_t j) const { return computed_once((const wide *)(w + j * in + k)); }
    __device__ static void unpack(float *to, wide x) {
        const unsigned pairs[] = {x.x, x.y, x.z, x.w};
        for (int i = 0; i < WIDE; i++) to[i] = real(i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xFFFF);
    }
};

struct int8_weights {
    const int8_t *q;
    const float *scales;
    size_t in, groups;
    __device__ float at(size_t k, size_t j) const {
        return scales[j * groups + k / METALA_GROUP] * (float)q[j * in + k];
    }
    enum { WIDE = 8 };
    struct wide { uint2 bytes; float scale; };
    struct row {                                                 // from a lane's first place on; i: multiples of WARP, so that
        const uint2 *bytes;                                      // the groups, which each have a scale, are as many further on
        const float *scales;
        static_assert(WARP * WIDE % METALA_GROUP == 0, "from one number of a lane to its next, whole groups");
        __device__ wide operator[](unsigned i) const { return {bytes[i], scales[i * WIDE / METALA_GROUP]}; }
    };
    __device__ row wides(size_t k, size_t j) const {
        return {computed_once((const uint2 *)(q + j * in + k)), computed_once(scales + j * groups + k / METALA_GROUP)};
    }
    __device__ static void unpack(float *to, wide x) {
        for (int i = 0; i < WIDE; i++) to[i] = x.scale * (float)(int8_t)((i < 4 ? x.bytes.x : x.bytes.y) >> 8 * (i % 4) & 0xFF);
    }
};

template <int TILE, bool A_BY_K, bool B_BY_K, class Weights>
__global__ void __launch_bounds__(THREADS)
matrix_multiply_kernel(float *c, const float *a, size_t a_row, size_t a_k, Weights b, const float *bias,
                       const float *base, size_t M, size_t N, size_t K, size_t k_each) {
    enum { R = TILE / 16, PITCH = TILE + 4 };
    alignas(16) __shared__ float a_strip[STRIP][PITCH], b_strip[STRIP][PITCH];
    const unsigned thread = threadIdx.x, row = thread / 16 * 4, column = thread % 16 * 4;
    const place tile = place_of(blockIdx.x, M, N, TILE, TILE);
    const size_t i0 = tile.i, j0 = tile.j;
    const size_t first = blockIdx.z * k_each, last = least(K, first + k_each);
    float next_a[R], next_b[R], sum[R][R] = {};

    auto fetch = [&](size_t k0) {
#pragma unroll
        for (int e = 0; e < R; e++) {
            unsigned n = e * THREADS + thread;
            size_t i = i0 + (A_BY_K ? n / STRIP : n % TILE), k = k0 + (A_BY_K ? n % STRIP : n / TILE);
            next_a[e] = i < M && k < last ? a[i * a_row + k * a_k] : 0;
            size_t j = j0 + (B_BY_K ? n / STRIP : n % TILE);
            k = k0 + (B_BY_K ? n % STRIP : n / TILE);
            next_b[e] = j < N && k < last ? b.at(k, j) : 0;
        }
    };
    fetch(first);
    for (size_t k0 = first; k0 < last; k0 += STRIP) {
#pragma unroll
        for (int e = 0; e < R; e++) {
            unsigned n = e * THREADS + thread;
            a_strip[A_BY_K ? n % STRIP : n / TILE][A_BY_K ? n / STRIP : n % TILE] = next_a[e];
            b_strip[B_BY_K ? n % STRIP : n / TILE][B_BY_K ? n / STRIP : n % TILE] = next_b[e];
        }
        __syncthreads();
        if (k0 + STRIP < last) fetch(k0 + STRIP);
#pragma unroll
        for (int k = 0; k < STRIP; k++) {
            float x[R], y[R];
#pragma unroll
            for (int e = 0; e < R; e += 4) {                     // rows row…row+3, and 64 further on
                float4 p = *(const float4 *)&a_strip[k][row + 16 * e];
                float4 q = *(const float4 *)&b_strip[k][column + 16 * e];
                x[e] = p.x, x[e + 1] = p.y, x[e + 2] = p.z, x[e + 3] = p.w;
                y[e] = q.x, y[e + 1] = q.y, y[e + 2] = q.z, y[e + 3] = q.w;
            }
#pragma unroll
            for (int i = 0; i < R; i++)
#pragma unroll
                for (int j = 0; j < R; j++) sum[i][j] += x[i] * y[j];
        }
        __syncthreads();
    }
    float *to = c + blockIdx.z * M * N;
    const bool whole = gridDim.z == 1, fours = N % 4 == 0 && (uintptr_t)to % 16 == 0 && (uintptr_t)base % 16 == 0;
#pragma unroll
    for (int i = 0; i < R; i++) {                                // of a row first all loads: after a store they would wait for it
        const size_t at_i = i0 + row + 64 * (i / 4) + i % 4;
#pragma unroll
        for (int j = 0; j < R; j += 4) {
            const size_t at_j = j0 + column + 16 * j;
            const size_t at = at_i * N + at_j;
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (whole && bias && at_j + e < N) sum[i][j + e] += bias[at_j + e];
            if (whole && base && fours && at_i < M && at_j < N) {
                const float4 old = *(const float4 *)(base + at);
                sum[i][j] += old.x, sum[i][j + 1] += old.y, sum[i][j + 2] += old.z, sum[i][j + 3] += old.w;
            } else
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (whole && base && at_i < M && at_j + e < N) sum[i][j + e] += base[at + e];
        }
#pragma unroll
        for (int j = 0; j < R; j += 4) {
            const size_t at_j = j0 + column + 16 * j;
            float *here = to + at_i * N + at_j;
            if (fours && at_i < M && at_j < N) *(float4 *)here = make_float4(sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]);
            else
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (at_i < M && at_j + e < N) here[e] = sum[i][j + e];
        }
    }
}

// C = Σ_z parts[z] + bias + base
__global__ void sum_splits_kernel(float *c, const float *parts, const float *bias, const float *base, size_t splits, size_t M,
                                  size_t N) {
    next_may_begin(), wait_for_before();
    FOR_EACH(i, M * N) {
        float sum = 0;
        for (size_t z = 0; z < splits; z++) sum += parts[z * M * N + i];
        c[i] = sum + (bias ? bias[i % N] : 0) + (base ? base[i] : 0);
    }
}

// A long sum with few tiles, as dW has, is cut into parts so that the GPU is full: 128 blocks or more where there are at
// least 512 values of k for each part. Only the shape decides, or the bits would differ with a GPU's number of multiprocessors.
size_t splits_of(size_t tiles, size_t K) {
    size_t most = K / 512, wanted = tiles && tiles < 128 ? ceil_div(128, tiles) : 1, splits = least(wanted, most);
    return splits ? splits : 1;
}

// ---- The same on tensor cores, in two steps. First each operand is copied to scratch memory so that its rows run along k:
// turned over where k is not what lies contiguous, rounded to tf32 (4 bytes) or bfloat16 (2 bytes), and filled up with zeros
// to whole lines of 128 bytes. Then one kernel does all products, whatever their form and alignment, and for bfloat16 moves
// half of what floats would take.
//
// The lines number n of all rows lie together, row by row, so that those of a tile are one piece of memory. In the line of row i
// the 16 bytes number p lie at place p ^ i%8: what the lanes of ldmatrix read at a time is then in different banks of shared
// memory. It is also what wgmma expects.

enum { LINE = 128, LINE_PARTS = LINE / 16, LINE_FLOATS = LINE / 4 };
template <metala_math MATH>
constexpr size_t numbers_of_line = LINE / (MATH == METALA_BFLOAT16 ? 2 : 4);
template <metala_math MATH>
__host__ __device__ constexpr size_t lines_of(size_t k) { return ceil_div(k, numbers_of_line<MATH>); }

struct operand { uint4 *memory; size_t rows, lines; };
// The first 16 bytes of a line. cuBLAS wants whole rows, one behind the other, with nothing exchanged.
#ifdef METALA_CUBLAS
const unsigned SWIZZLE_ROWS = 1;
__host__ __device__ uint4 *line_of(operand x, size_t row, size_t line) { return x.memory + (row * x.lines + line) * LINE_PARTS; }
#else
const unsigned SWIZZLE_ROWS = 8;
__host__ __device__ uint4 *line_of(operand x, size_t row, size_t line) { return x.memory + (line * x.rows + row) * LINE_PARTS; }
#endif
operand from_line(operand x, size_t line) { return {line_of(x, 0, line), x.rows, x.lines}; }
uint4 *end_of(operand x) { return x.memory + x.rows * x.lines * LINE_PARTS; }

// Two floats as bfloat16 in one register, the first in the lower half.
__device__ unsigned pack(float first, float second) {
    __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return (unsigned)__bfloat16_as_ushort(both.y) << 16 | __bfloat16_as_ushort(both.x);
}

// 16 bytes of rounded numbers, which lie `stride` apart: 4 of tf32 or 8 of bfloat16.
template <metala_math MATH>
__device__ uint4 rounded(const float *x, unsigned stride) {
    unsigned to[4];
#pragma unroll
    for (unsigned e = 0; e < 4; e++)
        to[e] = MATH == METALA_BFLOAT16 ? pack(x[2 * e * stride], x[(2 * e + 1) * stride]) : to_tf32(x[e * stride]);
    return make_uint4(to[0], to[1], to[2], to[3]);
}

// What is rounded: numbers as they are, or what is first computed from them, which then needs no array of floats: from READS
// arrays x (rows,columns) MAKES others, whose number at a place follows from those of x there. Beyond the edges x counts as
// zeros, of which zeros must come.
struct as_they_are {
    enum { READS = 1, MAKES = 1 };
    const float *x[READS];
    __device__ void make(float *, unsigned, unsigned) const {}
};
struct gate_products {                                           // silu(a) ⊙ b of a and b
    enum { READS = 2, MAKES = 1 };
    const float *x[READS];
    __device__ void make(float *n, unsigned, unsigned) const { n[0] = silu_gate(n[0], n[1], 0).y; }
};
struct gate_gradients {                                          // h = silu(a) ⊙ b, da and db of a, b and dh
    enum { READS = 3, MAKES = 3 };
    const float *x[READS];
    __device__ void make(float *n, unsigned, unsigned) const {
        const gated g = silu_gate(n[0], n[1], n[2]);
        n[0] = g.y, n[1] = g.da, n[2] = g.db;
    }
};
struct logit_gradients {                                         // dlogits of logits
    enum { READS = 1, MAKES = 1 };
    const float *x[READS], *lse;                                 // lse, targets (rows)
    const int *targets;
    float weight;
    unsigned rows, classes;
    __device__ void make(float *n, unsigned row, unsigned i) const {
        n[0] = row < rows && i < classes ? logit_gradient(n[0], lse[row], targets[row], i, weight) : 0;
    }
};

// straight[i][j] = turned[j][i] = y[i][j] rounded, up to whole lines zeros; plain[i][j] = y[i][j]; for each y of MAKES. NULL, or
// with memory NULL, is what is not wanted.
//   x, y, plain (rows,columns)   straight (rows, lines of columns)   turned (columns, lines of rows), both perhaps with more lines
// A block has a square of as many rows as a line has numbers, in PIECES of 32 × 32 of which a thread takes 4 numbers; what is
// turned goes through shared memory.
struct copies { operand straight, turned; float *plain; };
template <int MAKES> struct all_copies { copies of[MAKES]; };
template <metala_math MATH, class Numbers>
__global__ void __launch_bounds__(THREADS)
round_operands_kernel(all_copies<Numbers::MAKES> to, Numbers numbers, unsigned rows, unsigned columns) {
    enum { SIDE = numbers_of_line<MATH>, PIECE = 32, PIECES = SIDE / PIECE, EACH = SIDE / LINE_PARTS, PARTS = THREADS / SIDE };
    __shared__ float tile[SIDE][SIDE + 1];
    const unsigned line = blockIdx.x, i = threadIdx.x / 8, j = threadIdx.x % 8 * 4;
    uintptr_t addresses = 0;
    for (const float *x : numbers.x) addresses |= (uintptr_t)x;
    for (const copies &y : to.of) addresses |= (uintptr_t)y.plain;
    const bool fours = columns % 4 == 0 && addresses % 16 == 0;
    next_may_begin(), wait_for_before();
    for (unsigned i0 = blockIdx.y * SIDE; i0 < rows; i0 += gridDim.y * SIDE) {
        float number[Numbers::READS][PIECES * PIECES][4] = {};
#pragma unroll
        for (unsigned n = 0; n < Numbers::READS; n++)
#pragma unroll
            for (unsigned p = 0; p < PIECES * PIECES; p++) {
                const unsigned row = i0 + p / PIECES * PIECE + i, column = line * SIDE + p % PIECES * PIECE + j;
                const float *from = numbers.x[n] + (size_t)row * columns + column;
                float *here = number[n][p];
                if (fours && row < rows && column < columns) {
                    const float4 four = *(const float4 *)from;
                    here[0] = four.x, here[1] = four.y, here[2] = four.z, here[3] = four.w;
                } else if (row < rows)
#pragma unroll
                    for (unsigned e = 0; e < 4; e++)
                        if (column + e < columns) here[e] = from[e];
            }
#pragma unroll
        for (unsigned p = 0; p < PIECES * PIECES; p++) {
            const unsigned row = i0 + p / PIECES * PIECE + i, column = line * SIDE + p % PIECES * PIECE + j;
#pragma unroll
            for (unsigned e = 0; e < 4; e++) {
                float at_place[Numbers::READS];
#pragma unroll
                for (unsigned n = 0; n < Numbers::READS; n++) at_place[n] = number[n][p][e];
                numbers.make(at_place, row, column + e);
#pragma unroll
                for (unsigned n = 0; n < Numbers::MAKES; n++) number[n][p][e] = at_place[n];
            }
        }
#pragma unroll
        for (unsigned n = 0; n < Numbers::MAKES; n++) {
            const operand straight = to.of[n].straight, turned = to.of[n].turned;
            float *const plain = to.of[n].plain;
#pragma unroll
            for (unsigned p = 0; p < PIECES * PIECES; p++) {
                const unsigned row = i0 + p / PIECES * PIECE + i, column = p % PIECES * PIECE + j;
                const float *y = number[n][p];
                if (straight.memory && row < rows) {
                    uint4 *here = line_of(straight, row, line) + (column / EACH ^ row % SWIZZLE_ROWS);
                    if (MATH == METALA_BFLOAT16) ((uint2 *)here)[column / 4 % 2] = make_uint2(pack(y[0], y[1]), pack(y[2], y[3]));
                    else *here = make_uint4(to_tf32(y[0]), to_tf32(y[1]), to_tf32(y[2]), to_tf32(y[3]));
                }
                if (plain && row < rows) {
                    float *here = plain + (size_t)row * columns + line * SIDE + column;
                    if (fours && line * SIDE + column < columns) *(float4 *)here = make_float4(y[0], y[1], y[2], y[3]);
                    else
                        for (unsigned e = 0; e < 4; e++)
                            if (line * SIDE + column + e < columns) here[e] = y[e];
                }
                if (turned.memory)
#pragma unroll
                    for (unsigned e = 0; e < 4; e++) tile[p / PIECES * PIECE + i][column + e] = y[e];
            }
            if (!turned.memory) continue;
            __syncthreads();                                         // the tile is there for all
            const unsigned column = threadIdx.x / PARTS, row = line * SIDE + column;
#pragma unroll
            for (unsigned part = threadIdx.x % PARTS; part < LINE_PARTS; part += PARTS)
                if (row < columns)
                    line_of(turned, row, i0 / SIDE)[part ^ row % SWIZZLE_ROWS] =
                        rounded<MATH>(&tile[part * EACH][column], SIDE + 1);
            __syncthreads();                                         // the tile may be written again
        }
    }
}

// What a warp has of C leaves it as sum + bias + base: four pieces of 16 × 64, the first at row i0, column j0, each DOWN rows and
// ACROSS columns behind the one before. Of the numbers of a lane, sum[n][j][0] and [1] are neighbours in row lane/4, column
// 8j + lane%4·2 of piece n, and [2] and [3] so 8 rows further down. To have neighbours stored by neighbouring lanes, a piece goes
// through the warp's own EXCHANGE floats of shared memory; there, 8 numbers from column 8j on are at 8(j ^ row%4), so that lanes
// do not meet in banks. Its registers are free then: base of the next piece comes into them before this one is stored.
enum { EXCHANGE = 16 * 64 };                                     // c, base (M,N)   bias [N]; NULL for none, base may be c
template <unsigned DOWN, unsigned ACROSS>
__device__ __forceinline__ void store_pieces(float *c, const float (*sum)[8][4], float *exchange, const float *bias,
                                             const float *base, unsigned i0, unsigned j0, unsigned M, unsigned N) {
    const unsigned lane = threadIdx.x % WARP, row = lane / 16, column = lane % 16 * 4;
    const unsigned pair = lane / 4 * 64 + lane / 4 % 4 * 8 + lane % 4 * 2;
    const bool fours = N % 4 == 0 && ((uintptr_t)c | (uintptr_t)base) % 16 == 0;
    const size_t at = ((size_t)(i0 + row) * N + j0 + column) / 4, step = N / 4;      // in fours: else nvcc would part them
    const float4 *from = computed_once((const float4 *)base + at);                   // or it would forget that this is global
    auto whole = [&](unsigned n) { return fours && (size_t)i0 + n * DOWN + 16 <= M && (size_t)j0 + n * ACROSS + 64 <= N; };
    float4 old[2][8] = {};                                           // of base, for this piece and the next
    auto load = [&](unsigned n) {
        if (n < 4 && base && whole(n))
#pragma unroll
            for (unsigned r = 0; r < 8; r++) old[n % 2][r] = from[(n * DOWN + 2 * r) * step + n * ACROSS / 4];
    };
    load(0);
#pragma unroll
    for (unsigned n = 0; n < 4; n++) {
#pragma unroll
        for (unsigned j = 0; j < 8; j++) {
            float *to = exchange + (pair ^ j % 4 * 8) + j / 4 * 32;
            *(float2 *)to = make_float2(sum[n][j][0], sum[n][j][1]);
            *(float2 *)(to + 8 * 64) = make_float2(sum[n][j][2], sum[n][j][3]);
        }
        __syncwarp();                                                // the piece is there for all lanes
        if (whole(n)) {
            float4 add = {};
            if (bias) {
                const float *these = bias + j0 + n * ACROSS + column;
                add = make_float4(these[0], these[1], these[2], these[3]);
            }
            load(n + 1);                                             // before stores, for which loads would wait
#pragma unroll
            for (unsigned r = 0; r < 8; r++) {
                const float4 y = *(const float4 *)(exchange + (2 * r + row) * 64 + (column ^ (2 * r + row) % 4 * 8));
                const float4 z = old[n % 2][r];
                ((float4 *)c)[at + (n * DOWN + 2 * r) * step + n * ACROSS / 4] =
                    make_float4(y.x + add.x + z.x, y.y + add.y + z.y, y.z + add.z + z.z, y.w + add.w + z.w);
            }
        } else
#pragma unroll 1
            for (unsigned e = lane; e < EXCHANGE; e += WARP) {
                const unsigned r = e / 64, of = e % 64, i = i0 + n * DOWN + r, j = j0 + n * ACROSS + of;
                const size_t here = (size_t)i * N + j;
                if (i < M && j < N)
                    c[here] = exchange[r * 64 + (of ^ r % 4 * 8)] + (bias ? bias[j] : 0) + (base ? base[here] : 0);
            }
        __syncwarp();                                                // the next piece may be written
    }
}

// C = A Bᵀ + bias + base of two such copies, sums in float, in two ways. This one uses what each GPU has from compute capability
// 8.0 on. A block has a warp for each 64 × 64 of a tile of 128 × COLUMNS, COLUMNS threads: the wider one is more work for what it
// reads. Lines come by asynchronous copies, AHEAD of them on their way while one is used.
//
// gridDim.z > 1: block z sums lines from z·lines_each on and leaves its part in c + z·M·N.
enum { PRODUCT_ROWS = 128, PRODUCT_STAGES = 3 };

// Of the line, as many rows from i0 on; beyond the last, zeros.
template <int ROWS, int BLOCK_THREADS>
__device__ void copy_line(uint4 *strip, operand x, size_t line, size_t i0) {
    const uint4 *from = line_of(x, i0, line);
#pragma unroll
    for (unsigned n = threadIdx.x; n < ROWS * LINE_PARTS; n += BLOCK_THREADS) {
        const bool real = i0 + n / LINE_PARTS < x.rows;
        copy16_async(strip + n, real ? from + n : x.memory, real);
    }
}

// 16 rows and the 32 bytes of one mma, 8 values of k in tf32 or 16 in bfloat16: the left operand r, or two right ones of 8
// columns each, r[0] with r[2] and r[1] with r[3]. Rows have PARTS times 16 bytes, those of a line or of a chunk of the scan.
template <unsigned PARTS>
__device__ unsigned place_of_part(unsigned row, unsigned part) { return row * PARTS + (part ^ row % (PARTS < 8 ? PARTS : 8)); }
template <unsigned PARTS = LINE_PARTS>
__device__ void load_operand(unsigned *r, const uint4 *strip, unsigned row, unsigned mma) {
    const unsigned lane = threadIdx.x % WARP;
    ldmatrix_x4(r, strip + place_of_part<PARTS>(row + lane % 16, 2 * mma + lane / 16));
}
// sum += A Bᵀ of one line by a warp, 64 rows of A with 64 of B.
template <metala_math MATH>
__device__ __forceinline__ void multiply_line(float (*sum)[8][4], const uint4 *a, const uint4 *b) {
#pragma unroll
    for (unsigned mma = 0; mma < LINE / 32; mma++) {
        unsigned left[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++) load_operand(left[i], a, 16 * i, mma);
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            unsigned both[4];
            load_operand(both, b, 8 * j, mma);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const unsigned right[2] = {both[half], both[half + 2]};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (MATH == METALA_BFLOAT16) mma_bf16(sum[i][j + half], left[i], right);
                    else mma_tf32(sum[i][j + half], left[i], right);
                }
            }
        }
    }
}

template <metala_math MATH, int COLUMNS>
__global__ void __launch_bounds__(COLUMNS, 256 / COLUMNS)
tensor_multiply_kernel(float *c, operand a, operand b, const float *bias, const float *base, size_t lines_each) {
    enum { STAGE = (PRODUCT_ROWS + COLUMNS) * LINE_PARTS, AHEAD = PRODUCT_STAGES - 1 };
    DYNAMIC_SHARED(uint4, memory);
    const unsigned warp = threadIdx.x / WARP, row = warp % 2 * 64, column = warp / 2 * 64;       // of the warp's 64 × 64
    const size_t M = a.rows, N = b.rows;
    const place tile = place_of(blockIdx.x, M, N, PRODUCT_ROWS, COLUMNS);
    const size_t first = blockIdx.z * lines_each, last = least(a.lines, first + lines_each);
    float sum[4][8][4] = {};                                         // four pieces of 16 × 64
    next_may_begin(), wait_for_before();

    auto fetch = [&](size_t line, unsigned stage) {                  // an empty group beyond the end keeps the count
        uint4 *to = memory + stage * STAGE;
        if (line < last) {
            copy_line<PRODUCT_ROWS, COLUMNS>(to, a, line, tile.i);
            copy_line<COLUMNS, COLUMNS>(to + PRODUCT_ROWS * LINE_PARTS, b, line, tile.j);
        }
        copy_commit();
    };
    for (unsigned stage = 0; stage < AHEAD; stage++) fetch(first + stage, stage);
    unsigned stage = 0;
    for (size_t line = first; line < last; line++, stage = (stage + 1) % PRODUCT_STAGES) {
        const uint4 *of_a = memory + stage * STAGE, *of_b = of_a + PRODUCT_ROWS * LINE_PARTS;
        copy_wait<AHEAD - 1>();
        __syncthreads();                                             // this line is there for all, and a stage free
        fetch(line + AHEAD, (stage + AHEAD) % PRODUCT_STAGES);
        multiply_line<MATH>(sum, of_a + row * LINE_PARTS, of_b + column * LINE_PARTS);
    }
    __syncthreads();                                                 // no warp reads a line any more
    const bool alone = gridDim.z == 1;
    store_pieces<16, 0>(c + blockIdx.z * M * N, sum, (float *)memory + warp * EXCHANGE, alone ? bias : NULL,
                        alone ? base : NULL, (unsigned)tile.i + row, (unsigned)tile.j + column, (unsigned)M, (unsigned)N);
}

// The same on an H100: two warpgroups multiply 64 × 256 each, and the first thread of a third, which gives most registers to them,
// has the lines brought, GROUP_STAGES ahead. Each stage has two barriers: `full`, when its lines have come, and `empty`, when all
// warps have used them. A block stays on its multiprocessor and takes one tile after the other: while C is written, the lines of
// the next tile come already.
//
// What would limit this is the L2 cache: 384 lines for 128 × 256. So two blocks form a cluster and take tiles below each other,
// with the same lines of B: each has half of them brought to both. A stage is empty when the warps of both blocks have used it.
//
// The parts of a sum are tiles as well: tile number n + z·(tiles of C) sums lines from z·lines_each on.
enum { GROUP_COLUMNS = 256, GROUP_STAGES = 4, GROUP_WARPS = 8, GROUP_THREADS = (GROUP_WARPS + 4) * WARP };
enum { GROUP_STAGE = (PRODUCT_ROWS + GROUP_COLUMNS) * LINE_PARTS };
enum { FEW_REGISTERS = 40, MANY_REGISTERS = 232, REGISTERS = 65536 / GROUP_THREADS / 8 * 8 };      // of a thread; as launched
static_assert(4 * FEW_REGISTERS + GROUP_WARPS * MANY_REGISTERS <= GROUP_THREADS / WARP * REGISTERS, "or who takes waits for ever");
const size_t GROUP_BYTES =                                           // barriers at the end; the emulator wants whole KB
    GROUP_STAGES * GROUP_STAGE * sizeof(uint4) + GROUP_WARPS * EXCHANGE * sizeof(float) + 1024;

template <metala_math MATH>
__global__ void __launch_bounds__(GROUP_THREADS, 1)
warpgroup_multiply_kernel(float *c, operand a, operand b, const float *bias, const float *base, unsigned lines_each,
                          unsigned splits) {
    DYNAMIC_SHARED(uint4, memory);
    float *exchange = (float *)(memory + GROUP_STAGES * GROUP_STAGE);
    uint64_t *full = (uint64_t *)(exchange + GROUP_WARPS * EXCHANGE), *empty = full + GROUP_STAGES;
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, lines = (unsigned)a.lines;
    const unsigned blocks = cluster_size(), rank = cluster_rank(), cluster = blockIdx.x / blocks, clusters = gridDim.x / blocks;
    const size_t rows = blocks * PRODUCT_ROWS, my_row = rank * PRODUCT_ROWS;     // of a cluster's tile; the block's first in it
    const unsigned tiles = (unsigned)(ceil_div(a.rows, rows) * ceil_div(b.rows, GROUP_COLUMNS));
    if (threadIdx.x < GROUP_STAGES) {
        barrier_init(full + threadIdx.x, 1);
        barrier_init(empty + threadIdx.x, GROUP_WARPS * blocks);
        wgmma_show(), barrier_show();                                // to copies, and to the other block
    }
    cluster_wait();                                                  // both blocks have their barriers
    next_may_begin(), wait_for_before();
    unsigned stage = 0, phase = 0;
    auto step = [&] { phase ^= ++stage == GROUP_STAGES, stage %= GROUP_STAGES; };

    if (warp >= GROUP_WARPS) {
        give_registers<FEW_REGISTERS>();
        const unsigned share = GROUP_COLUMNS / blocks, my_share = rank * share;
        for (unsigned n = cluster; n < tiles * splits && warp == GROUP_WARPS && lane == 0; n += clusters) {
            const place tile = place_of(n % tiles, a.rows, b.rows, rows, GROUP_COLUMNS);
            const unsigned first = n / tiles * lines_each, last = least(lines, first + lines_each);
            const size_t row = tile.i + my_row, column = tile.j + my_share;
            const unsigned of_a = row < a.rows ? LINE * (unsigned)least(PRODUCT_ROWS, a.rows - row) : 0;
            const unsigned of_b = LINE * (unsigned)least(GROUP_COLUMNS, b.rows - tile.j);
            const unsigned of_share = column < b.rows ? LINE * (unsigned)least(share, b.rows - column) : 0;
            for (unsigned line = first; line < last; line++, step()) {
                uint4 *to = memory + stage * GROUP_STAGE, *to_b = to + (PRODUCT_ROWS + my_share) * LINE_PARTS;
                barrier_wait(empty + stage, phase ^ 1);
                barrier_expect(full + stage, of_a + of_b);
                if (of_a) bulk_copy(to, line_of(a, row, line), of_a, full + stage);
                if (blocks == 1) bulk_copy(to_b, line_of(b, column, line), of_share, full + stage);
                else if (of_share) bulk_copy_to((1u << blocks) - 1, to_b, line_of(b, column, line), of_share, full + stage);
            }
        }
    } else {
        take_registers<MANY_REGISTERS>();
        for (unsigned n = cluster; n < tiles * splits; n += clusters) {
            const unsigned first = n / tiles * lines_each, last = least(lines, first + lines_each);
            float sum[4][8][4] = {};                                 // 16 × 256
            unsigned before = 0;                                     // the stage of the line before
            for (unsigned line = first; line < last; line++, step()) {
                const uint4 *of_a = memory + stage * GROUP_STAGE + warp / 4 * 64 * LINE_PARTS;
                const uint4 *of_b = memory + stage * GROUP_STAGE + PRODUCT_ROWS * LINE_PARTS;
                barrier_wait(full + stage, phase);
                wgmma_hold(sum[0][0]);
                wgmma_start();
#pragma unroll
                for (unsigned k = 0; k < LINE; k += 32) {
                    if (MATH == METALA_BFLOAT16) wgmma_bf16(sum[0][0], wgmma_operand(of_a, k), wgmma_operand(of_b, k));
                    else wgmma_tf32(sum[0][0], wgmma_operand(of_a, k), wgmma_operand(of_b, k));
                }
                wgmma_commit();
                wgmma_wait<1>();                                     // this one goes on, so that the cores never idle
                if (line > first && lane < blocks) barrier_arrive_at(empty + before, lane);
                before = stage;
            }
            wgmma_wait<0>();
            wgmma_hold(sum[0][0]);
            if (first < last && lane < blocks) barrier_arrive_at(empty + before, lane);
            const place tile = place_of(n % tiles, a.rows, b.rows, rows, GROUP_COLUMNS);
            store_pieces<0, 64>(c + n / tiles * a.rows * b.rows, sum, exchange + warp * EXCHANGE, splits == 1 ? bias : NULL,
                                splits == 1 ? base : NULL, (unsigned)(tile.i + my_row) + warp * 16, (unsigned)tile.j,
                                (unsigned)a.rows, (unsigned)b.rows);
        }
    }
    __syncwarp();
    cluster_wait();                                                  // nobody needs this block's memory any more
}

// ---- C = A B + bias + base, with A(i,k) = a[i·a_row + k·a_k] and B(k,j) = b.at(k,j); bias or base may be NULL, base C.
template <bool A_BY_K, bool B_BY_K, class Weights>
void matrix_multiply(metala_context *ctx, float *c, const float *a, size_t a_row, size_t a_k, Weights b,
                     const float *bias, const float *base, size_t M, size_t N, size_t K) {
    if (M == 0 || N == 0) return;
    bool large = ceil_div(M, 128) * ceil_div(N, 128) >= LARGE_FROM;
    size_t tile = large ? 128 : 64, splits = splits_of(ceil_div(M, tile) * ceil_div(N, tile), K);
    size_t k_each = round_up(ceil_div(K, splits), STRIP);
    splits = K ? ceil_div(K, k_each) : 1;
    float *to = splits > 1 ? scratch(ctx, splits * M * N) : c;
    if (!to) return;
    extent grid(ceil_div(M, tile) * ceil_div(N, tile), 1, splits);
    if (large) RUN((matrix_multiply_kernel<128, A_BY_K, B_BY_K, Weights>), grid, THREADS, 0, to, a, a_row, a_k, b, bias,
                   base, M, N, K, k_each);
    else RUN((matrix_multiply_kernel<64, A_BY_K, B_BY_K, Weights>), grid, THREADS, 0, to, a, a_row, a_k, b, bias, base,
             M, N, K, k_each);
    if (splits > 1)
        RUN_EARLY(sum_splits_kernel, blocks_for(M * N, THREADS), THREADS, 0, c, to, bias, base, splits, M, N);
}

#ifdef METALA_CUBLAS
// ---- The same by the library of the CUDA Toolkit (make CUDA=1 CUBLAS=1), to compare with: of the operands as they are, or of
// their rounded copies. Its handle outlives the call: each thread makes its own and keeps it.
__global__ void start_kernel(float *c, const float *bias, const float *base, size_t M, size_t N) {
    FOR_EACH(i, M * N) c[i] = (bias ? bias[i % N] : 0) + (base ? base[i] : 0);
}
void library_multiply(metala_context *ctx, metala_math math, float *c, const void *a, size_t a_step, bool a_by_k,
                      const void *b, size_t b_step, bool b_by_k, const float *bias, const float *base, size_t M, size_t N,
                      size_t K) {
    static thread_local cublasHandle_t handle = NULL;
    const float one = 1, start = bias || base ? 1.0f : 0.0f;
    if (M == 0 || N == 0) return;
    if (M > INT_MAX || N > INT_MAX || K > INT_MAX || a_step > INT_MAX || b_step > INT_MAX) {
        metala_context_fail(ctx, "%s:%d: cuBLAS takes sizes up to %d; use a smaller batch", __FILE__, __LINE__,
                            INT_MAX);
        return;
    }
    if (bias || (base && base != c)) RUN(start_kernel, blocks_for(M * N, THREADS), THREADS, 0, c, bias, base, M, N);
    cublasStatus_t status = handle ? CUBLAS_STATUS_SUCCESS : cublasCreate(&handle);
    const cudaDataType type = math == METALA_BFLOAT16 ? CUDA_R_16BF : CUDA_R_32F;
    // Its matrices are stored by columns: our C is its Cᵀ = Bᵀ Aᵀ.
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasGemmEx(handle, b_by_k ? CUBLAS_OP_T : CUBLAS_OP_N, a_by_k ? CUBLAS_OP_N : CUBLAS_OP_T, (int)N,
                              (int)M, (int)K, &one, b, type, (int)(b_step ? b_step : 1), a, type,
                              (int)(a_step ? a_step : 1), &start, c, CUDA_R_32F, (int)N,
                              math == METALA_TF32       ? CUBLAS_COMPUTE_32F_FAST_TF32
                              : math == METALA_BFLOAT16 ? CUBLAS_COMPUTE_32F
                                                        : CUBLAS_COMPUTE_32F_PEDANTIC,
                              CUBLAS_GEMM_DEFAULT);
    if (status != CUBLAS_STATUS_SUCCESS)
        metala_context_fail(ctx, "%s:%d: cuBLAS error %d, %s; build without CUBLAS=1", __FILE__, __LINE__, (int)status,
                            cublasGetStatusString(status));
}
#endif

// C = A B + bias + base in float.  A(i,k) = a[i·a_step + k] when A_BY_K, else a[k·a_step + i];  B(k,j) = b[j·b_step + k]
// when B_BY_K, else b[k·b_step + j].      c, base (M,N)   bias [N]
template <bool A_BY_K, bool B_BY_K>
void exact_multiply(metala_context *ctx, float *c, const float *a, size_t a_step, const float *b, size_t b_step,
                    const float *bias, const float *base, size_t M, size_t N, size_t K) {
#ifdef METALA_CUBLAS
    library_multiply(ctx, METALA_EXACT, c, a, a_step, A_BY_K, b, b_step, B_BY_K, bias, base, M, N, K);
#else
    real_weights weights = {b, B_BY_K ? 1 : b_step, B_BY_K ? b_step : 1};
    matrix_multiply<A_BY_K, B_BY_K>(ctx, c, a, A_BY_K ? a_step : 1, A_BY_K ? 1 : a_step, weights, bias, base, M, N, K);
#endif
}

#if defined(METALA_WGMMA) || !defined(__CUDACC__)
const bool HAS_WGMMA = true;                                     // compiled for sm_90a, among others, or for the emulator
#else
const bool HAS_WGMMA = false;
#endif
std::atomic<bool> runs_wgmma;                                    // so is the code that this GPU runs: metala_cuda has asked it
bool by_warpgroups() { return HAS_WGMMA && runs_wgmma; }

// One block in a cluster, or two, which have tiles below each other?
size_t blocks_of_cluster(size_t M) { return M > PRODUCT_ROWS ? 2 : 1; }

// How the lines of a row are shared out: `each` to one part, `count` parts, and the floats that these take. Warpgroups have one
// tile for each multiprocessor at a time, on an H100 132, so that the last ones may leave many idle: as many parts as take least
// time, for which a tile costs its lines and about as much as 8 more. (132 on other GPUs, too: only the shape decides.)
struct portions { size_t each, count, floats; };
template <metala_math MATH>
portions portions_of(size_t M, size_t N, size_t lines) {
    portions p = {lines, 1, 0};
#ifndef METALA_CUBLAS
    size_t splits = splits_of(ceil_div(M, PRODUCT_ROWS) * ceil_div(N, 128), lines * numbers_of_line<MATH>);
    if (by_warpgroups()) {
        const size_t blocks = blocks_of_cluster(M), most = lines * numbers_of_line<MATH> / 512;
        const size_t tiles = ceil_div(M, blocks * PRODUCT_ROWS) * ceil_div(N, GROUP_COLUMNS);
        size_t least_time = SIZE_MAX;
        splits = 1;
        for (size_t n = 1; n <= least(most, 16); n++) {
            const size_t time = ceil_div(tiles * n, 132 / blocks) * (ceil_div(lines, n) + 8);
            if (time < least_time) least_time = time, splits = n;
        }
    }
    p.each = ceil_div(lines, splits);
    p.count = lines ? ceil_div(lines, p.each) : 1;
    p.floats = p.count > 1 ? p.count * M * N : 0;
#endif
    return p;
}

// C = A Bᵀ + bias + base of rounded copies of as many lines. The wide tile of warps is taken where there are enough of them, at
// most an eighth more of C to compute, and room for its stages; it does not change the order of a sum. HAS_WGMMA: nothing is
// compiled that nobody can run.
template <metala_math MATH>
void tensor_multiply(metala_context *ctx, float *c, operand a, operand b, float *parts, const float *bias, const float *base) {
    const size_t M = a.rows, N = b.rows;
#ifdef METALA_CUBLAS
    const size_t step = a.lines * numbers_of_line<MATH>;
    library_multiply(ctx, MATH, c, a.memory, step, true, b.memory, step, true, bias, base, M, N, step);
#else
    const portions p = portions_of<MATH>(M, N, a.lines);
    const size_t down = ceil_div(M, PRODUCT_ROWS), across = ceil_div(N, 128), across_wide = ceil_div(N, GROUP_COLUMNS);
    auto shared = [=](int columns) { return (size_t)PRODUCT_STAGES * LINE * (PRODUCT_ROWS + columns); };
    const bool wide = !by_warpgroups() && down * across_wide >= WIDE_FROM && 16 * across_wide <= 9 * across
                      && shared_room() >= shared(256);
    float *to = p.count > 1 ? parts : c;
    if constexpr (HAS_WGMMA) {
        const size_t blocks = blocks_of_cluster(M), tiles = ceil_div(M, blocks * PRODUCT_ROWS) * across_wide * p.count;
        const size_t grid = blocks * least(tiles, greatest(multiprocessors() / blocks, 1));
#define ARGUMENTS to, a, b, bias, base, (unsigned)p.each, (unsigned)p.count
        if (by_warpgroups() && blocks == 2)
            RUN_PAIRS((warpgroup_multiply_kernel<MATH>), grid, GROUP_THREADS, GROUP_BYTES, ARGUMENTS);
        else if (by_warpgroups()) RUN_EARLY((warpgroup_multiply_kernel<MATH>), grid, GROUP_THREADS, GROUP_BYTES, ARGUMENTS);
#undef ARGUMENTS
    }
    if (wide)
        RUN_EARLY((tensor_multiply_kernel<MATH, 256>), extent(down * across_wide, 1, p.count), 256, shared(256), to, a, b,
                  bias, base, p.each);
    else if (!by_warpgroups())
        RUN_EARLY((tensor_multiply_kernel<MATH, 128>), extent(down * across, 1, p.count), 128, shared(128), to, a, b, bias,
                  base, p.each);
    if (p.count > 1)
        RUN_EARLY(sum_splits_kernel, blocks_for(M * N, THREADS), THREADS, 0, c, parts, bias, base, p.count, M, N);
#endif
}

// The rounded copies of numbers (rows,columns), or of x. Rows and columns fit in 32 bits: for more nobody would have had room.
template <metala_math MATH, class Numbers>
void round_operands(metala_context *ctx, all_copies<Numbers::MAKES> to, Numbers numbers, size_t rows, size_t columns) {
    const extent grid(lines_of<MATH>(columns), blocks_for(lines_of<MATH>(rows), 1));
    RUN_EARLY((round_operands_kernel<MATH, Numbers>), grid, THREADS, 0, to, numbers, (unsigned)rows, (unsigned)columns);
}
template <metala_math MATH>
void round_operand(metala_context *ctx, operand straight, operand turned, const float *x, size_t rows, size_t columns) {
    round_operands<MATH, as_they_are>(ctx, {{{straight, turned, NULL}}}, {{x}}, rows, columns);
}

// Scratch memory for the operands, which know their rows and lines, one behind the other, and for so many floats behind them.
bool place_operands(metala_context *ctx, std::initializer_list<operand *> operands, float **parts, size_t floats) {
    for (const operand *x : operands) floats += x->rows * x->lines * LINE_FLOATS;
    uint4 *at = (uint4 *)scratch(ctx, floats);
    if (floats && !at) return false;
    for (operand *x : operands) x->memory = at, at = end_of(*x);
    *parts = (float *)at;
    return true;
}

// Linear layers y = x Wᵀ + bias + residual for a few rows of x, as in generation: memory is the limit, each weight is read once.
// blockIdx.y is the layer, 2^split warps of a block share an output: each takes `share` of the inputs, and the first warp adds
// their sums in order. WIDE: rows of x and W are aligned for as many numbers at a time as Weights has. SWIGLU: the layers are W_1
// and W_2, half of a block's warps for each, y = silu(W_1 n + bias) ⊙ (W_2 n + bias), and n = x r (rms_forward) is made last:
// W n = r (W x), with the squares of x summed along.
enum { FEW_ROWS = 4, TOGETHER = 5 };                             // TOGETHER: layers of one launch
template <class Weights>
struct few_rows_layer {
    float *y;
    const float *bias, *residual;
    Weights w;
    unsigned out;
};
template <class Weights>
struct few_rows_layers { few_rows_layer<Weights> of[TOGETHER]; };
template <bool WIDE, class Weights> struct few_rows_lane {       // what a lane loads at once, and how often before it waits
    enum { EACH = WIDE ? (int)Weights::WIDE : 1, AHEAD = WIDE ? 32 / EACH : 8 };
};

// ROWS: at least as many as there are; of one that is missing, the last one's numbers are taken for nothing. First AHEAD loads of
// weights, then their use with SOME of x at a time: to keep the memory busy, each multiprocessor must have some ten kilobytes on
// their way. The first weights are on theirs before x is there. That is safe only because something that is not launched early
// lies between who writes weights and here: a copy, the zeroing after AdamW, or embedding_forward and patch_forward, which must
// stay RUN. (One kernel between would not do: an early one lets the next begin before it has itself waited.)
template <int ROWS, bool WIDE, bool SWIGLU, class Weights>
__global__ void __launch_bounds__(THREADS, ROWS == 1 ? 4 : 3)
matmul_few_rows_kernel(const few_rows_layers<Weights> layers, const float *x, unsigned rows, unsigned in, unsigned share,
                       unsigned split, float eps) {
    typedef few_rows_lane<WIDE, Weights> lane;
    enum { EACH = lane::EACH, STEP = WARP * EACH, AHEAD = lane::AHEAD, SOME = WIDE ? 2 : AHEAD };
    __shared__ float dots[ROWS][WARPS], squares[ROWS][WARPS];
    const unsigned bits = (SWIGLU ? 2 : 3) - split, outs = 1u << bits, warp = threadIdx.x / WARP, place = warp >> split;
    const few_rows_layer<Weights> &l = layers.of[SWIGLU ? place >> bits : blockIdx.y];
    const unsigned o = blockIdx.x * outs + (place & (outs - 1)), start = (warp & ((1u << split) - 1)) * share;
    const unsigned end = o < l.out ? least(in, start + share) : 0;
    const bool begins = threadIdx.x % WARP == 0 && start == 0 && o < l.out;          // has the first number of an output's sum
    next_may_begin();
    float dot[ROWS] = {}, square[ROWS] = {};
    for (unsigned k0 = 0; k0 < share || k0 == 0; k0 += AHEAD * STEP) {
        const size_t from = start + k0 + threadIdx.x % WARP * EACH;
        const unsigned left = left_of(from, end, AHEAD * STEP);
        const auto wides = l.w.wides(from, o);
        typename std::conditional<WIDE, typename Weights::wide, float>::type loaded[AHEAD];
#pragma unroll
        for (unsigned a = 0; a < AHEAD; a++)
            if (a * STEP < left) {
                if constexpr (WIDE) loaded[a] = wides[a * WARP];
                else loaded[a] = l.w.at(from + a * STEP, o);
            }
        wait_for_before();
        __syncwarp();                                                // or each load would move down to its use, and none be ahead
        if (!SWIGLU && k0 == 0 && begins)
            for (unsigned row = 0; row < ROWS; row++)
                dot[row] = (l.bias ? l.bias[o] : 0) + (l.residual && row < rows ? l.residual[(size_t)row * l.out + o] : 0);
#pragma unroll
        for (unsigned a0 = 0; a0 < AHEAD; a0 += SOME)
#pragma unroll
            for (unsigned row = 0; row < ROWS; row++) {
                const float *own = computed_once(x + (ROWS == 1 || row < rows ? row : rows - 1) * (size_t)in + from);
                float number[SOME][EACH], weight[EACH];
#pragma unroll
                for (unsigned i = 0; i < SOME; i++)
                    if (const unsigned a = a0 + i; a * STEP < left) {
                        if constexpr (WIDE)
                            for (unsigned e = 0; e < EACH; e += 4)
                                real_weights::unpack(number[i] + e, *(const float4 *)(own + a * STEP + e));
                        else number[i][0] = own[a * STEP];
                    }
#pragma unroll
                for (unsigned i = 0; i < SOME; i++)
                    if (const unsigned a = a0 + i; a * STEP < left) {
                        if constexpr (WIDE) Weights::unpack(weight, loaded[a]);
                        else weight[0] = loaded[a];
#pragma unroll
                        for (int e = 0; e < EACH; e++) {
                            dot[row] += number[i][e] * weight[e];
                            if (SWIGLU) square[row] += number[i][e] * number[i][e];
                        }
                    }
            }
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        const float all = warp_sum(dot[row]), norm = SWIGLU ? warp_sum(square[row]) : 0;
        if (threadIdx.x % WARP == 0) dots[row][warp] = all, squares[row][warp] = norm;
    }
    __syncthreads();                                                 // the sums are there
    const unsigned row = threadIdx.x >> bits, nth = threadIdx.x & (outs - 1), first = nth << split, y_o = blockIdx.x * outs + nth;
    if (row >= rows || y_o >= l.out) return;                         // a thread of the first warp for each y
    float sum = 0, other = 0, norm = 0;
    for (unsigned part = first; part < first + (1u << split); part++) {
        sum += dots[row][part];
        if (SWIGLU) other += dots[row][WARPS / 2 + part], norm += squares[row][part];
    }
    if (SWIGLU) {
        const float r = 1 / sqrtf(norm / (float)in + eps), *bias_1 = l.bias, *bias_2 = layers.of[1].bias;
        sum = silu(r * sum + (bias_1 ? bias_1[y_o] : 0)) * (r * other + (bias_2 ? bias_2[y_o] : 0));
    }
    l.y[(size_t)row * l.out + y_o] = sum;
}

// weights_of(layer): its Weights. SWIGLU: y of two layers, whose own are not written.
template <bool SWIGLU, class Of>
void matmul_few_rows(metala_context *ctx, float *y, const metala_linear *layers, int count, const float *x, size_t rows, size_t in,
                     float eps, Of weights_of) {
    typedef decltype(weights_of(layers)) Weights;
    for (int first = 0; first < count; first += TOGETHER) {
        few_rows_layers<Weights> some = {};
        const int layers_here = count - first < TOGETHER ? count - first : TOGETHER;
        size_t outs = 0;
        bool wide = in % Weights::WIDE == 0 && (uintptr_t)x % 16 == 0;
        for (int i = 0; i < layers_here; i++) {
            const metala_linear *l = &layers[first + i];
            some.of[i] = {SWIGLU ? y : l->y, l->bias, l->residual, weights_of(l), (unsigned)l->out};
            outs = greatest(outs, l->out);
            wide = wide && (uintptr_t)l->w % 16 == 0;
        }
        auto launch = [&](auto ROWS, auto WIDE) {
            typedef few_rows_lane<WIDE, Weights> lane;
            const size_t most = SWIGLU ? WARPS / 2 : WARPS, at_once = WARP * lane::EACH * lane::AHEAD;
            unsigned split = 0;                                      // until a warp loads all of its share before it waits
            while (most >> split > 1 && at_once << split < in) split++;
            const size_t share = round_up(ceil_div(in, (size_t)1 << split), WARP * lane::EACH);
            const extent grid(ceil_div(outs, most >> split), SWIGLU ? 1 : layers_here);
            RUN_EARLY((matmul_few_rows_kernel<ROWS, WIDE, SWIGLU, Weights>), grid, THREADS, 0, some, x, (unsigned)rows,
                      (unsigned)in, (unsigned)share, split, eps);
        };
        typedef std::integral_constant<int, 1> one;
        typedef std::integral_constant<int, FEW_ROWS> several;
        if (wide && rows == 1) launch(one(), std::true_type());
        else if (wide) launch(several(), std::true_type());
        else if (rows == 1) launch(one(), std::false_type());
        else launch(several(), std::false_type());
    }
}

// call(weights_of(layer)) for the kind of weights.
template <class Call>
void with_weights(metala_dtype type, size_t in, Call call) {
    const size_t groups = ceil_div(in, METALA_GROUP);
    if (type == METALA_I8)
        call([=](const metala_linear *l) { return int8_weights{(const int8_t *)l->w, l->scales, in, groups}; });
    else if (type == METALA_BF16) call([=](const metala_linear *l) { return bfloat16_weights{(const uint16_t *)l->w, in}; });
    else call([=](const metala_linear *l) { return real_weights{(const float *)l->w, 1, in}; });
}

// Linear layers of one x:  y = x Wᵀ + bias + residual.    y, residual (rows,out)   x (rows,in)   w [out,in]   bias [out] or NULL
template <metala_math MATH, class Numbers>
void rounded_forward(metala_context *ctx, const metala_linear *layers, int count, Numbers x, size_t rows, size_t in) {
    const size_t lines = lines_of<MATH>(in);
    operand of_x = {NULL, rows, lines}, of_w = {NULL, 0, lines};
    float *parts;
    size_t most_parts = 0;
    for (int i = 0; i < count; i++) {
        of_w.rows = greatest(of_w.rows, layers[i].out);
        most_parts = greatest(most_parts, portions_of<MATH>(rows, layers[i].out, lines).floats);
    }
    if (!place_operands(ctx, {&of_x, &of_w}, &parts, most_parts)) return;
    round_operands<MATH, Numbers>(ctx, {{{of_x, {}, NULL}}}, x, rows, in);
    for (const metala_linear *l = layers; l < layers + count; l++) {
        of_w.rows = l->out;
        round_operand<MATH>(ctx, of_w, {}, (const float *)l->w, l->out, in);
        tensor_multiply<MATH>(ctx, l->y, of_x, of_w, parts, l->bias, l->residual);
    }
}
template <metala_math MATH>
void matmul_forward(metala_context *ctx, const metala_linear *layers, int count, const float *x, size_t rows, size_t in) {
    if (rows <= FEW_ROWS)
        with_weights(METALA_F32, in, [=](auto weights_of) {
            matmul_few_rows<false>(ctx, NULL, layers, count, x, rows, in, 0, weights_of);
        });
    else if constexpr (MATH == METALA_EXACT)
        for (const metala_linear *l = layers; l < layers + count; l++)
            exact_multiply<true, true>(ctx, l->y, x, in, (const float *)l->w, in, l->bias, l->residual, rows, l->out, in);
    else rounded_forward<MATH, as_they_are>(ctx, layers, count, {{x}}, rows, in);
}

// sums[j] += Σ_row a[row][j], the gradient of a bias: strips of rows, then the strips.
enum { ROWS_OF_STRIP = 64 };
__global__ void column_sums_kernel(float *parts, const float *a, size_t rows, size_t columns) {
    FOR_EACH(i, ceil_div(rows, ROWS_OF_STRIP) * columns) {
        size_t strip = i / columns, j = i % columns, end = (strip + 1) * ROWS_OF_STRIP;
        float sum = 0;
        for (size_t row = strip * ROWS_OF_STRIP; row < rows && row < end; row++) sum += a[row * columns + j];
        parts[i] = sum;
    }
}

// sums (+)= Σ_rows a. parts: columns of floats for each strip.
void column_sums(metala_context *ctx, float *sums, float *parts, const float *a, size_t rows, size_t columns,
                 int accumulate) {
    size_t strips = ceil_div(rows, ROWS_OF_STRIP);
    RUN(column_sums_kernel, blocks_for(strips * columns, THREADS), THREADS, 0, parts, a, rows, columns);
    RUN(sum_parts_kernel, blocks_for(columns, THREADS), THREADS, 0, sums, parts, strips, columns, columns, accumulate);
}

void add_column_sums(metala_context *ctx, float *sums, const float *a, size_t rows, size_t columns) {
    float *parts = scratch(ctx, ceil_div(rows, ROWS_OF_STRIP) * columns);
    if (parts) column_sums(ctx, sums, parts, a, rows, columns, 1);
}

// dx = Σ_layers dy W (or dx += that)      dW += dyᵀ x      dbias += Σ_rows dy
//   dx, x (rows,in)   dw [out,in]   dbias [out]   dy (rows,out); NULL for what is not wanted
// The rounded copies of all dy, dy_of(layer), lie side by side, as those of all Wᵀ: dx is then one product, and its sum stays in
// registers.
template <metala_math MATH, class Of>
void rounded_backward(metala_context *ctx, float *dx, const metala_linear_gradient *layers, int count, Of dy_of, const float *x,
                      size_t rows, size_t in, int accumulate) {
    size_t by_rows = 0, by_out = 0, most_out = 0, most_parts = 0;
    float *parts;
    for (const metala_linear_gradient *l = layers; l < layers + count; l++) {
        if (dx) by_out += lines_of<MATH>(l->out);
        if (!l->dw) continue;
        by_rows = lines_of<MATH>(rows), most_out = greatest(most_out, l->out);
        most_parts = greatest(most_parts, portions_of<MATH>(l->out, in, by_rows).floats);
    }
    if (dx) most_parts = greatest(most_parts, portions_of<MATH>(rows, in, by_out).floats);
    operand of_dy = {NULL, rows, by_out}, of_w = {NULL, in, by_out}, of_x = {NULL, in, by_rows};
    operand turned = {NULL, most_out, by_rows};
    if (!place_operands(ctx, {&of_dy, &of_w, &of_x, &turned}, &parts, most_parts)) return;
    if (by_rows) round_operand<MATH>(ctx, {}, of_x, x, rows, in);
    size_t at = 0;                                                   // of this layer's lines of of_dy and of_w
    for (const metala_linear_gradient *l = layers; l < layers + count; l++) {
        turned.rows = l->out;
        if (dx || l->dw)
            round_operands<MATH, decltype(dy_of(l))>(
                ctx, {{{dx ? from_line(of_dy, at) : operand{}, l->dw ? turned : operand{}, NULL}}}, dy_of(l), rows, l->out);
        if (dx) round_operand<MATH>(ctx, {}, from_line(of_w, at), l->w, l->out, in);
        if (l->dw) tensor_multiply<MATH>(ctx, l->dw, turned, of_x, parts, NULL, l->dw);
        at += lines_of<MATH>(l->out);
    }
    if (dx) tensor_multiply<MATH>(ctx, dx, of_dy, of_w, parts, NULL, accumulate ? dx : NULL);
}
template <metala_math MATH>
void matmul_backward(metala_context *ctx, float *dx, const metala_linear_gradient *layers, int count, const float *x, size_t rows,
                     size_t in, int accumulate) {
    if constexpr (MATH != METALA_EXACT)
        rounded_backward<MATH>(ctx, dx, layers, count, [](const metala_linear_gradient *l) { return as_they_are{{l->dy}}; }, x,
                               rows, in, accumulate);
    else
        for (const metala_linear_gradient *l = layers; l < layers + count; l++) {
            const float *so_far = accumulate || l > layers ? dx : NULL;
            if (dx) exact_multiply<true, false>(ctx, dx, l->dy, l->out, l->w, in, NULL, so_far, rows, in, l->out);
            if (l->dw) exact_multiply<false, false>(ctx, l->dw, l->dy, l->out, x, in, NULL, l->dw, l->out, in, rows);
        }
    for (const metala_linear_gradient *l = layers; l < layers + count; l++)
        if (l->dbias) add_column_sums(ctx, l->dbias, l->dy, rows, l->out);
}

// y = x W'ᵀ + bias + residual of quantized weights.    w [out,in]   scales [out,groups] of int8, NULL of bfloat16; all layers
// alike
void matmul_quantized(metala_context *ctx, const metala_linear *layers, int count, const float *x, size_t rows, size_t in) {
    with_weights(layers->scales ? METALA_I8 : METALA_BF16, in, [=](auto weights_of) {
        if (rows <= FEW_ROWS) matmul_few_rows<false>(ctx, NULL, layers, count, x, rows, in, 0, weights_of);
        else
            for (const metala_linear *l = layers; l < layers + count; l++)
                matrix_multiply<true, true>(ctx, l->y, x, in, 1, weights_of(l), l->bias, l->residual, rows, l->out, in);
    });
}

// ============================================================== 4. The kernels around the scan

// x_row = scale · E[token_row]          x (rows,D)   E [N,D]: a block for each row.
__global__ void embedding_forward_kernel(float *x, const int *tokens, const float *E, size_t rows, size_t D,
                                         float scale) {
    FOR_EACH_ROW(row, rows) {
        const float *from = E + (size_t)tokens[row] * D;
        for (size_t d = threadIdx.x; d < D; d += THREADS) x[row * D + d] = scale * from[d];
    }
}
void embedding_forward(metala_context *ctx, float *x, const int *tokens, const float *E, size_t rows, size_t D,
                       double scale) {
    RUN(embedding_forward_kernel, blocks_for(rows, 1), THREADS, 0, x, tokens, E, rows, D, (float)scale);
}

// dE[token] += scale · dx, but nothing for the padding token. A token may come often, and its rows are to be added in order:
// so rows are sorted by token, those of one token in their order, and the block of the first adds up all. To sort by a digit
// of the token, block x, which writes those whose digit is x, counts how many come before: a warp takes one part of the rows.
struct token_row { int token, row; };
enum { DIGIT_BITS = 8, DIGITS = 1 << DIGIT_BITS, TOKEN_BITS = 32, ROWS_AHEAD = 8 };

__global__ void sort_tokens_kernel(token_row *to, const token_row *from, const int *tokens, size_t rows, int shift) {
    __shared__ unsigned counts[WARPS];
    const size_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const size_t each = ceil_div(rows, WARPS), first = least(rows, warp * each), count = least(rows - first, each);
    auto get = [=](size_t i) { return from ? from[i] : token_row{tokens[i], (int)i}; };
    auto digit = [=](token_row x) { return (unsigned)x.token >> shift & (DIGITS - 1); };
    constexpr int HELD = 8;
    unsigned before = 0, own = 0;
    FOR_EACH_STRETCH(i, count) {
        token_row x[HELD];
        FOR_EACH_HELD(j, i, count) x[j] = get(first + i + j * WARP);
        FOR_EACH_HELD(j, i, count) before += digit(x[j]) < blockIdx.x, own += digit(x[j]) == blockIdx.x;
    }
    own = warp_sum(own);
    if (lane == 0) counts[warp] = own;
    unsigned at = block_sum(before);
    for (size_t earlier = 0; earlier < warp; earlier++) at += counts[earlier];
    for (size_t i = lane; i - lane < count && own > 0; i += WARP) {
        const token_row x = i < count ? get(first + i) : token_row();
        const bool mine = i < count && digit(x) == blockIdx.x;
        const unsigned all = __ballot_sync(ALL_LANES, mine);
        if (mine) to[at + __popc(all & ((1u << lane) - 1))] = x;
        at += __popc(all);
    }
}

// A block for each place in the sorted list; blockIdx.y: 256 columns each. A warp looks at 32 places at a time.
__global__ void embedding_backward_kernel(float *dE, const float *dx, const token_row *sorted, size_t rows, size_t D,
                                          float scale, int pad_token_id) {
    const size_t place = blockIdx.x, d = blockIdx.y * (size_t)THREADS + threadIdx.x;
    const int token = sorted[place].token;
    if (token == pad_token_id || (place > 0 && sorted[place - 1].token == token)) return;
    const float *column = dx + least(d, D - 1);                  // threads beyond the last one read it too
    float sum = d < D ? dE[(size_t)token * D + d] : 0;
    for (unsigned base = 0, same = WARP; same == WARP; base += WARP) {
        const size_t own = place + base + threadIdx.x % WARP;
        const token_row x = own < rows ? sorted[own] : token_row();
        same = __popc(__ballot_sync(ALL_LANES, own < rows && x.token == token));
        for (unsigned i = 0; i < same; i += ROWS_AHEAD) {
            float loaded[ROWS_AHEAD];
#pragma unroll
            for (unsigned j = 0; j < ROWS_AHEAD; j++) {
                const size_t row = __shfl_sync(ALL_LANES, x.row, i + j);
                if (i + j < same) loaded[j] = column[row * D];
            }
#pragma unroll
            for (unsigned j = 0; j < ROWS_AHEAD; j++)
                if (i + j < same) sum += scale * loaded[j];
        }
    }
    if (d < D) dE[(size_t)token * D + d] = sum;
}
void embedding_backward(metala_context *ctx, float *dE, const float *dx, const int *tokens, size_t rows, size_t D,
                        double scale, int pad_token_id) {
    token_row *to = (token_row *)scratch(ctx, 4 * rows), *other = to + rows, *from = NULL;
    if (!to) return;
    for (int shift = 0; shift < TOKEN_BITS; shift += DIGIT_BITS) {
        RUN(sort_tokens_kernel, rows ? DIGITS : 0, THREADS, 0, to, from, tokens, rows, shift);
        from = to, to = other, other = from;
    }
    RUN(embedding_backward_kernel, extent(rows, ceil_div(D, THREADS)), THREADS, 0, dE, dx, from, rows, D, (float)scale,
        pad_token_id);
}

// Patches:  x = bytes/255      x, bytes (n)
__global__ void patch_forward_kernel(float *x, const int *bytes, size_t n) { FOR_EACH(i, n) x[i] = (float)bytes[i] / 255; }
void patch_forward(metala_context *ctx, float *x, const int *bytes, size_t n) {
    RUN(patch_forward_kernel, blocks_for(n, THREADS), THREADS, 0, x, bytes, n);
}

// RMS norm:  n = m x r,  r = (mean_D(x²) + eps)^(-1/2)
//   n, x (rows,D)   r (rows)   mask m (rows) of 0 and 1, or NULL: a warp for each row.
template <int HELD>
__global__ void rms_forward_kernel(float *n, float *r, const float *x, const uint8_t *mask, size_t rows, size_t D,
                                   float eps) {
    next_may_begin(), wait_for_before();
    FOR_EACH_WARP(row, rows) {
        const bool kept = !mask || mask[row];
        float in[HELD], sum = 0;
        FOR_EACH_STRETCH(d, D) {
            load_held(in, x + row * D, d, D);
            FOR_EACH_HELD(j, d, D) sum += in[j] * in[j];
        }
        float scale = 1 / sqrtf(warp_sum(sum) / (float)D + eps);
        if (threadIdx.x % WARP == 0) r[row] = scale;
        if (!kept) scale = 0;
        FOR_EACH_STRETCH(d, D) {
            if (D > HELD * WARP) load_held(in, x + row * D, d, D);
            FOR_EACH_HELD(j, d, D) n[row * D + d + j * WARP] = in[j] * scale;
        }
    }
}
void rms_forward(metala_context *ctx, float *n, float *r, const float *x, const uint8_t *mask, size_t rows, size_t D,
                 double eps) {
    by_width<HELD_OF_ROW>(D, [=](auto HELD) {
        RUN_EARLY(rms_forward_kernel<HELD>, blocks_for(rows, WARPS), THREADS, 0, n, r, x, mask, rows, D, (float)eps);
    });
}

// dx += r (m dn - x̂ mean_D(m dn ⊙ x̂)),  x̂ = x r         dx, dn (rows,D)   r (rows): a warp for each row.
template <int HELD>
__global__ void __launch_bounds__(THREADS, 2)
rms_backward_kernel(float *dx, const float *dn, const float *x, const float *r, const uint8_t *mask, size_t rows, size_t D) {
    FOR_EACH_WARP(row, rows) {
        const bool kept = !mask || mask[row];
        float in[HELD], gradient[HELD], scale = r[row], sum = 0;
        auto load = [&](size_t d) { load_held(in, x + row * D, d, D), load_held(gradient, dn + row * D, d, D); };
        FOR_EACH_STRETCH(d, D) {
            load(d);
            FOR_EACH_HELD(j, d, D) sum += gradient[j] * in[j];
        }
        float mean = scale * warp_sum(sum) / (float)D;
        if (kept)
            FOR_EACH_STRETCH(d, D) {
                if (D > HELD * WARP) load(d);
                FOR_EACH_HELD(j, d, D) dx[row * D + d + j * WARP] += scale * (gradient[j] - in[j] * scale * mean);
            }
    }
}
void rms_backward(metala_context *ctx, float *dx, const float *dn, const float *x, const float *r, const uint8_t *mask,
                  size_t rows, size_t D) {
    by_width<HELD_OF_ROW>(D, [=](auto HELD) {
        RUN(rms_backward_kernel<HELD>, blocks_for(rows, WARPS), THREADS, 0, dx, dn, x, r, mask, rows, D);
    });
}

// Short causal convolution and SiLU:  c_t = Σ_j w[:,j] ⊙ n_{t-3+j},  u_t = silu(c_t)
//   u, c, n (B,T,D)   w [D,1,4]   tail (B,4,D) of which the last 3 are read and then all replaced, NULL for zeros. With u
// NULL the convolution alone. A thread takes one channel through a run of tokens of one sequence, with the last inputs in
// registers and the next four on their way. The thread of the first run, which alone reads the tail, also replaces it.
enum { RUN_TOKENS = 32, TOKENS_AHEAD = 4, REACH = METALA_CONV - 1 };
__global__ void conv_forward_kernel(float *u, float *c, const float *n, const float *w, float *tail, size_t B, size_t T,
                                    size_t D) {
    const size_t runs = ceil_div(T, RUN_TOKENS);
    next_may_begin(), wait_for_before();
    FOR_EACH(i, B * runs * D) {
        size_t d = i % D, b = i / D / runs, t0 = i / D % runs * RUN_TOKENS, end = least(T, t0 + RUN_TOKENS);
        float taps[METALA_CONV], near[METALA_CONV] = {};         // near: n of t-3, t-2, t-1, t
        for (size_t j = 0; j < METALA_CONV; j++) taps[j] = w[d * METALA_CONV + j];
        for (size_t j = 1; j < METALA_CONV; j++) {
            if (t0 + j >= METALA_CONV) near[j] = n[(b * T + t0 + j - METALA_CONV) * D + d];
            else if (tail) near[j] = tail[(b * METALA_CONV + t0 + j) * D + d];
        }
        for (size_t base = t0, at = (b * T + t0) * D + d; base < end; base += TOKENS_AHEAD) {
            float in[TOKENS_AHEAD];
#pragma unroll
            for (size_t t = 0; t < TOKENS_AHEAD; t++)
                if (base + t < end) in[t] = n[at + t * D];
#pragma unroll
            for (size_t t = 0; t < TOKENS_AHEAD; t++, at += D) {
                if (base + t >= end) break;
                near[0] = near[1], near[1] = near[2], near[2] = near[3], near[3] = in[t];
                float sum = 0;
                for (size_t j = 0; j < METALA_CONV; j++) sum += taps[j] * near[j];
                c[at] = sum;
                if (u) u[at] = silu(sum);
            }
        }
        for (size_t j = 0; tail && t0 == 0 && j < METALA_CONV; j++)
            tail[(b * METALA_CONV + j) * D + d] = end == T ? near[j] : n[(b * T + T - METALA_CONV + j) * D + d];
    }
}
void conv_forward(metala_context *ctx, float *u, float *c, const float *n, const float *w, float *tail, size_t B, size_t T,
                  size_t D) {
    RUN_EARLY(conv_forward_kernel, blocks_for(B * ceil_div(T, RUN_TOKENS) * D, THREADS), THREADS, 0, u, c, n, w, tail, B, T, D);
}

// One token:  n = rms(x), then the convolution and SiLU; the tail is shifted and n is its last.       x, u (B,D)   tail (B,4,D)
// A thread takes a channel; each block needs the squares of the whole row.
__global__ void conv_step_kernel(float *u, float *tail, const float *x, const float *w, size_t D, float eps) {
    const size_t b = blockIdx.x, d = blockIdx.y * (size_t)THREADS + threadIdx.x;
    const float *row = x + b * D;
    float taps[METALA_CONV], near[METALA_CONV], sum = 0, own = 0;
    next_may_begin();
    if (d < D)
        for (size_t j = 0; j < METALA_CONV; j++) taps[j] = w[d * METALA_CONV + j];
    wait_for_before();                                               // weights may come earlier, see matmul_few_rows_kernel
    if (d < D) {
        own = row[d];
        for (size_t j = 0; j < REACH; j++) near[j] = tail[(b * METALA_CONV + j + 1) * D + d];
    }
#pragma unroll 8
    for (size_t i = threadIdx.x; i < D; i += THREADS) sum += row[i] * row[i];
    near[REACH] = own * (1 / sqrtf(block_sum(sum) / (float)D + eps));
    if (d >= D) return;
    sum = 0;
    for (size_t j = 0; j < METALA_CONV; j++) {
        sum += taps[j] * near[j];
        tail[(b * METALA_CONV + j) * D + d] = near[j];
    }
    u[b * D + d] = silu(sum);
}
void conv_step(metala_context *ctx, float *u, float *tail, const float *x, const float *w, size_t B, size_t D, double eps) {
    RUN_EARLY(conv_step_kernel, extent(B, ceil_div(D, THREADS)), THREADS, 0, u, tail, x, w, D, (float)eps);
}

// dc = du ⊙ silu'(c), or du where c is NULL      dn_t = Σ_j w[:,j] ⊙ dc_{t+3-j}  (dc beyond the end is 0)
// dw[:,j] += Σ_{b,t} n_t ⊙ dc_{t+3-j}, t from -3 on where there is a tail
// A thread takes one channel through a run of tokens of one sequence, from the last to the first, with dc of the next
// three in registers and what four take on its way, and leaves the run's part of dw in parts (runs,D,4).
__global__ void conv_backward_kernel(float *dn, float *parts, const float *du, const float *c, const float *n,
                                     const float *w, const float *tail, size_t B, size_t T, size_t D) {
    const size_t runs = ceil_div(T, RUN_TOKENS);
    FOR_EACH(i, B * runs * D) {
        size_t d = i % D, b = i / D / runs, t0 = i / D % runs * RUN_TOKENS, end = least(T, t0 + RUN_TOKENS);
        float taps[METALA_CONV], later[METALA_CONV] = {}, sum[METALA_CONV] = {};     // later: dc of t, t+1, t+2, t+3
        for (size_t j = 0; j < METALA_CONV; j++) taps[j] = w[d * METALA_CONV + j];
        auto shift = [&](float dc) { later[3] = later[2], later[2] = later[1], later[1] = later[0], later[0] = dc; };
        const size_t first = (b * T + t0) * D + d;
        const unsigned own = (unsigned)(end - t0), there = (unsigned)(least(T, end + REACH) - t0);
        for (unsigned left = there; left > 0; left -= (unsigned)least(left, TOKENS_AHEAD)) {
            float gradient[TOKENS_AHEAD], before[TOKENS_AHEAD], in[TOKENS_AHEAD];
#pragma unroll
            for (unsigned s = 0; s < TOKENS_AHEAD; s++) {
                const unsigned t = left - 1 - s;                 // larger than all when none is left
                if (t < there) gradient[s] = du[first + t * D];
                if (t < there && c) before[s] = c[first + t * D];
                if (t < own) in[s] = n[first + t * D];
            }
#pragma unroll
            for (unsigned s = 0; s < TOKENS_AHEAD; s++) {
                const unsigned t = left - 1 - s;
                if (t < there) shift(c ? gradient[s] * silu_slope(before[s]) : gradient[s]);
                if (t >= own) continue;                          // the next run's, only looked at
                dn[first + t * D] = taps[3] * later[0] + taps[2] * later[1] + taps[1] * later[2] + taps[0] * later[3];
                for (size_t j = 0; j < METALA_CONV; j++) sum[j] += in[s] * later[REACH - j];
            }
        }
        for (size_t t = REACH; tail && t0 == 0 && t > 0; t--) {
            shift(0);
            for (size_t j = 0; j < METALA_CONV; j++) sum[j] += tail[(b * METALA_CONV + t) * D + d] * later[REACH - j];
        }
        *(float4 *)&parts[i * METALA_CONV] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    }
}
void conv_backward(metala_context *ctx, float *dn, float *dw, const float *du, const float *c, const float *n,
                   const float *w, const float *tail, size_t B, size_t T, size_t D) {
    size_t runs = B * ceil_div(T, RUN_TOKENS), taps = D * METALA_CONV;
    float *parts = scratch(ctx, runs * taps);
    if (!parts) return;
    RUN(conv_backward_kernel, blocks_for(runs * D, THREADS), THREADS, 0, dn, parts, du, c, n, w, tail, B, T, D);
    RUN(sum_parts_kernel, blocks_for(taps, THREADS), THREADS, 0, dw, parts, runs, taps, taps, 1);
}

// x_row = m_row x_row, in place; its own backward. x (rows,D), m (rows): a block for each row.
__global__ void mask_rows_kernel(float *x, const uint8_t *mask, size_t rows, size_t D) {
    FOR_EACH_ROW(row, rows)
        if (!mask[row])
            for (size_t d = threadIdx.x; d < D; d += THREADS) x[row * D + d] = 0;
}
void mask_rows(metala_context *ctx, float *x, const uint8_t *mask, size_t rows, size_t D) {
    RUN(mask_rows_kernel, blocks_for(rows, 1), THREADS, 0, x, mask, rows, D);
}

// a = log σ(z) / τ,  α = e^a,  k = 1 - α        alpha, k, z: n numbers; k NULL when the key is not tied to the decay.
__global__ void gate_forward_kernel(float *alpha, float *k, const float *z, size_t n, float inverse_tau) {
    FOR_EACH_FEW(first, n)
        few(first, n, [=](size_t i) { return z[i]; }, [=](size_t i, float z) {
            float a = log_sigmoid(z) * inverse_tau;
            alpha[i] = expf(a);
            if (k) k[i] = -expm1f(a);
        });
}
void gate_forward(metala_context *ctx, float *alpha, float *k, const float *z, size_t n, double tau) {
    RUN(gate_forward_kernel, blocks_for(n, FEW * THREADS), THREADS, 0, alpha, k, z, n, (float)(1 / tau));
}

// dz = (da - α dk) σ(-z) / τ      da is the gradient in a = log α, dk that of the tied key, NULL when it is not tied.
__global__ void gate_backward_kernel(float *dz, const float *da, const float *dk, const float *z, const float *alpha,
                                     size_t n, float inverse_tau) {
    FOR_EACH(i, n) {
        float gradient = da[i];
        if (dk) gradient -= alpha[i] * dk[i];
        dz[i] = gradient * sigmoid(-z[i]) * inverse_tau;
    }
}
void gate_backward(metala_context *ctx, float *dz, const float *da, const float *dk, const float *z, const float *alpha,
                   size_t n, double tau) {
    RUN(gate_backward_kernel, blocks_for(n, THREADS), THREADS, 0, dz, da, dk, z, alpha, n, (float)(1 / tau));
}

// Self-augmentation:  p_t = o_t + σ(w_t v_t),  w_t = Σ_i q_{t,i} k_{t,i} b_i        per head
//   p, o, v (rows,H,V)   q, k (rows,H,K)   b [H·K]: a warp for each row and head.
template <int HELD>
__global__ void augment_forward_kernel(float *p, const float *o, const float *q, const float *k, const float *v,
                                       const float *b, size_t rows, size_t H, size_t K, size_t V) {
    FOR_EACH_WARP(r, rows * H) {
        const float *bh = b + r % H * K;
        float query[HELD], key[HELD], balance[HELD], value[HELD], out[HELD], w = 0;
        auto load = [&](size_t j) { load_held(value, v + r * V, j, V), load_held(out, o + r * V, j, V); };
        if (V <= HELD * WARP) load(threadIdx.x % WARP);          // on its way together with what makes w
        FOR_EACH_STRETCH(i, K) {
            load_held(query, q + r * K, i, K), load_held(key, k + r * K, i, K), load_held(balance, bh, i, K);
            FOR_EACH_HELD(e, i, K) w += query[e] * key[e] * balance[e];
        }
        w = warp_sum(w);
        FOR_EACH_STRETCH(j, V) {
            if (V > HELD * WARP) load(j);
            FOR_EACH_HELD(e, j, V) p[r * V + j + e * WARP] = out[e] + sigmoid(w * value[e]);
        }
    }
}
void augment_forward(metala_context *ctx, float *p, const float *o, const float *q, const float *k, const float *v,
                     const float *b, size_t rows, size_t H, size_t K, size_t V) {
    by_width<HELD_OF_HEAD>(greatest(K, V), [=](auto HELD) {
        RUN(augment_forward_kernel<HELD>, blocks_for(rows * H, WARPS), THREADS, 0, p, o, q, k, v, b, rows, H, K, V);
    });
}

// With e = σ(w v), t = dp ⊙ e ⊙ (1 - e):   do = dp (the same memory serves both)     dw = Σ_V t ⊙ v
//   dv += w t     dq += dw (k ⊙ b)     dk += dw (q ⊙ b)     db += Σ_rows dw (q ⊙ k)
// A warp for each row and head, which leaves dw (rows,H); then db in strips of rows.
template <int HELD>
__global__ void augment_backward_kernel(float *dq, float *dk, float *dv, float *dw, const float *dp, const float *q,
                                        const float *k, const float *v, const float *b, size_t rows, size_t H, size_t K,
                                        size_t V) {
    FOR_EACH_WARP(r, rows * H) {
        const float *bh = b + r % H * K;
        float query[HELD], key[HELD], balance[HELD], value[HELD], gradient[HELD], so_far[HELD], of_key[HELD], w = 0, sum = 0;
        auto load_keys = [&](size_t i) {
            load_held(query, q + r * K, i, K), load_held(key, k + r * K, i, K), load_held(balance, bh, i, K);
        };
        auto load_values = [&](size_t j) {
            load_held(value, v + r * V, j, V), load_held(gradient, dp + r * V, j, V), load_held(so_far, dv + r * V, j, V);
        };
        if (V <= HELD * WARP) load_values(threadIdx.x % WARP);   // on their way together with what makes w
        FOR_EACH_STRETCH(i, K) {
            load_keys(i);
            FOR_EACH_HELD(e, i, K) w += query[e] * key[e] * balance[e];
        }
        w = warp_sum(w);
        FOR_EACH_STRETCH(j, V) {
            if (V > HELD * WARP) load_values(j);
            FOR_EACH_HELD(e, j, V) {
                float open = sigmoid(w * value[e]), t = gradient[e] * open * (1 - open);
                dv[r * V + j + e * WARP] = so_far[e] + w * t;
                sum += t * value[e];
            }
        }
        sum = warp_sum(sum);
        FOR_EACH_STRETCH(i, K) {
            if (K > HELD * WARP) load_keys(i);
            load_held(so_far, dq + r * K, i, K), load_held(of_key, dk + r * K, i, K);
            FOR_EACH_HELD(e, i, K) {
                dq[r * K + i + e * WARP] = so_far[e] + sum * key[e] * balance[e];
                dk[r * K + i + e * WARP] = of_key[e] + sum * query[e] * balance[e];
            }
        }
        if (threadIdx.x % WARP == 0) dw[r] = sum;
    }
}
__global__ void augment_balance_kernel(float *parts, const float *dw, const float *q, const float *k, size_t rows,
                                       size_t H, size_t K) {
    FOR_EACH(i, ceil_div(rows, ROWS_OF_STRIP) * H * K) {
        size_t strip = i / (H * K), channel = i % (H * K), end = (strip + 1) * ROWS_OF_STRIP;
        float sum = 0;
        for (size_t row = strip * ROWS_OF_STRIP; row < rows && row < end; row++)
            sum += dw[row * H + channel / K] * q[row * H * K + channel] * k[row * H * K + channel];
        parts[i] = sum;
    }
}
void augment_backward(metala_context *ctx, float *dq, float *dk, float *dv, float *db, const float *dp, const float *q,
                      const float *k, const float *v, const float *b, size_t rows, size_t H, size_t K, size_t V) {
    size_t strips = ceil_div(rows, ROWS_OF_STRIP);
    float *dw = scratch(ctx, rows * H + strips * H * K);
    if (!dw) return;
    float *parts = dw + rows * H;
    by_width<HELD_OF_HEAD>(greatest(K, V), [=](auto HELD) {
        RUN(augment_backward_kernel<HELD>, blocks_for(rows * H, WARPS), THREADS, 0, dq, dk, dv, dw, dp, q, k, v, b, rows, H, K, V);
    });
    RUN(augment_balance_kernel, blocks_for(strips * H * K, THREADS), THREADS, 0, parts, dw, q, k, rows, H, K);
    RUN(sum_parts_kernel, blocks_for(H * K, THREADS), THREADS, 0, db, parts, strips, H * K, H * K, 1);
}

// n = (p - μ) ρ,  ρ = (mean((p-μ)²) + eps)^(-1/2)      y = silu(g) ⊙ n, with g NULL no y: a warp for each head.
//   y, n, p, g (rows,H,V)   ρ (rows,H)
template <int HELD>
__global__ void head_norm_forward_kernel(float *y, float *n, float *rho, const float *p, const float *g, size_t heads, size_t V,
                                         float eps) {
    FOR_EACH_WARP(r, heads) {
        float in[HELD], gate[HELD], sum = 0, square = 0;
        auto load = [&](size_t j) {
            load_held(in, p + r * V, j, V);
            if (g) load_held(gate, g + r * V, j, V);
        };
        FOR_EACH_STRETCH(j, V) {
            load(j);
            FOR_EACH_HELD(e, j, V) sum += in[e];
        }
        float mean = warp_sum(sum) / (float)V;
        FOR_EACH_STRETCH(j, V) {
            if (V > HELD * WARP) load(j);
            FOR_EACH_HELD(e, j, V) square += (in[e] - mean) * (in[e] - mean);
        }
        float scale = 1 / sqrtf(warp_sum(square) / (float)V + eps);
        FOR_EACH_STRETCH(j, V) {
            if (V > HELD * WARP) load(j);
            FOR_EACH_HELD(e, j, V) {
                const size_t at = r * V + j + e * WARP;
                float normal = (in[e] - mean) * scale;
                n[at] = normal;
                if (g) y[at] = silu(gate[e]) * normal;
            }
        }
        if (threadIdx.x % WARP == 0) rho[r] = scale;
    }
}
void head_norm_forward(metala_context *ctx, float *y, float *n, float *rho, const float *p, const float *g, size_t rows, size_t H,
                       size_t V, double eps) {
    by_width<HELD_OF_HEAD>(V, [=](auto HELD) {
        RUN(head_norm_forward_kernel<HELD>, blocks_for(rows * H, WARPS), THREADS, 0, y, n, rho, p, g, rows * H, V, (float)eps);
    });
}

// dn = dy ⊙ silu(g), or dy with g NULL      dp = ρ (dn - mean(dn) - n mean(dn ⊙ n))      dg = dy ⊙ n ⊙ silu'(g)
// A warp for each head; dn is made twice, which takes fewer registers than to keep it.
template <int HELD>
__global__ void head_norm_backward_kernel(float *dp, float *dg, const float *dy, const float *n, const float *rho, const float *g,
                                          size_t heads, size_t V) {
    FOR_EACH_WARP(r, heads) {
        float gradient[HELD], normal[HELD], gate[HELD], sum = 0, product = 0, scale = rho[r];
        auto load = [&](size_t j) {
            load_held(gradient, dy + r * V, j, V), load_held(normal, n + r * V, j, V);
            if (g) load_held(gate, g + r * V, j, V);
        };
        FOR_EACH_STRETCH(j, V) {
            load(j);
            FOR_EACH_HELD(e, j, V) {
                float dn = g ? gradient[e] * silu(gate[e]) : gradient[e];
                sum += dn;
                product += dn * normal[e];
            }
        }
        float mean = warp_sum(sum) / (float)V, along = warp_sum(product) / (float)V;
        FOR_EACH_STRETCH(j, V) {
            if (V > HELD * WARP) load(j);
            FOR_EACH_HELD(e, j, V) {
                const size_t at = r * V + j + e * WARP;
                if (g) dg[at] = gradient[e] * normal[e] * silu_slope(gate[e]);
                dp[at] = scale * ((g ? gradient[e] * silu(gate[e]) : gradient[e]) - mean - normal[e] * along);
            }
        }
    }
}
void head_norm_backward(metala_context *ctx, float *dp, float *dg, const float *dy, const float *n, const float *rho,
                        const float *g, size_t rows, size_t H, size_t V) {
    by_width<HELD_OF_HEAD>(V, [=](auto HELD) {
        RUN(head_norm_backward_kernel<HELD>, blocks_for(rows * H, WARPS), THREADS, 0, dp, dg, dy, n, rho, g, rows * H, V);
    });
}

// Gated product:  y = silu(a) ⊙ b, n numbers.
__global__ void silu_gate_forward_kernel(float *y, const float *a, const float *b, size_t n) {
    next_may_begin(), wait_for_before();
    FOR_EACH_FEW(first, n)
        few(first, n, [=](size_t i) { return make_float2(a[i], b[i]); },
            [=](size_t i, float2 ab) { y[i] = silu_gate(ab.x, ab.y, 0).y; });
}
void silu_gate_forward(metala_context *ctx, float *y, const float *a, const float *b, size_t n) {
    RUN_EARLY(silu_gate_forward_kernel, blocks_for(n, FEW * THREADS), THREADS, 0, y, a, b, n);
}

// da = dy ⊙ b ⊙ silu'(a)      db = dy ⊙ silu(a)      and y once more, or NULL
__global__ void silu_gate_backward_kernel(float *da, float *db, float *y, const float *dy, const float *a, const float *b,
                                          size_t n) {
    FOR_EACH_FEW(first, n)
        few(first, n, [=](size_t i) { return make_float3(a[i], b[i], dy[i]); }, [=](size_t i, float3 in) {
            const gated g = silu_gate(in.x, in.y, in.z);
            da[i] = g.da, db[i] = g.db;
            if (y) y[i] = g.y;
        });
}
void silu_gate_backward(metala_context *ctx, float *da, float *db, float *y, const float *dy, const float *a, const float *b,
                        size_t n) {
    RUN(silu_gate_backward_kernel, blocks_for(n, FEW * THREADS), THREADS, 0, da, db, y, dy, a, b, n);
}

// a = W_1 n + β_1     b = W_2 n + β_2     h = silu(a) ⊙ b     y = W_3 h + β_3 + residual: of more than a few rows, and by weights
// that are floats, h is never written on tensor cores, but for its rounded copy.
template <metala_math MATH>
void swiglu_forward(metala_context *ctx, const metala_linear *layers, metala_dtype weights, float *h, const float *n, size_t rows,
                    size_t in) {
    const float *a = layers[0].y, *b = layers[1].y;
    const size_t F = layers->out;
    auto products = weights == METALA_F32 ? matmul_forward<MATH> : matmul_quantized;
    products(ctx, layers, 2, n, rows, in);
    if constexpr (MATH != METALA_EXACT)
        if (weights == METALA_F32 && rows > FEW_ROWS) {
            rounded_forward<MATH, gate_products>(ctx, layers + 2, 1, {{a, b}}, rows, F);
            return;
        }
    silu_gate_forward(ctx, h, a, b, rows * F);
    products(ctx, layers + 2, 1, h, rows, F);
}

// dh = dy W_3     da = dh ⊙ b ⊙ silu'(a)     db = dh ⊙ silu(a)     dn = db W_2 + da W_1     and of each dW += dyᵀ x
// On tensor cores one kernel makes all rounded copies of h, da and db that the products need; floats only for dβ.
template <metala_math MATH>
void rounded_swiglu_backward(metala_context *ctx, float *dn, const metala_linear_gradient *layers, float *dh, float *da, float *db,
                             const float *a, const float *b, const float *n, size_t rows, size_t in) {
    const size_t F = layers->out, out = layers[2].out, by_F = lines_of<MATH>(F), by_out = lines_of<MATH>(out);
    const size_t by_rows = lines_of<MATH>(rows);
    size_t most_parts = 0;
    for (const portions &p : {portions_of<MATH>(rows, F, by_out), portions_of<MATH>(out, F, by_rows),
                              portions_of<MATH>(F, in, by_rows), portions_of<MATH>(rows, in, 2 * by_F)})
        most_parts = greatest(most_parts, p.floats);
    operand dy = {NULL, rows, by_out}, w_3 = {NULL, F, by_out}, dy_turned = {NULL, out, by_rows}, h_turned = {NULL, F, by_rows};
    operand of_h = {NULL, rows, 2 * by_F}, w = {NULL, in, 2 * by_F};             // db and da, W_2 and W_1, side by side
    operand da_turned = h_turned, db_turned = h_turned, n_turned = {NULL, in, by_rows};
    float *parts;
    if (!place_operands(ctx, {&dy, &w_3, &dy_turned, &h_turned, &of_h, &w, &da_turned, &db_turned, &n_turned}, &parts, most_parts))
        return;
    round_operand<MATH>(ctx, dy, dy_turned, layers[2].dy, rows, out);
    round_operand<MATH>(ctx, {}, w_3, layers[2].w, out, F);
    tensor_multiply<MATH>(ctx, dh, dy, w_3, parts, NULL, NULL);
    round_operands<MATH, gate_gradients>(ctx, {{{{}, h_turned, NULL},
                                                {from_line(of_h, by_F), da_turned, layers[0].dbias ? da : NULL},
                                                {of_h, db_turned, layers[1].dbias ? db : NULL}}}, {{a, b, dh}}, rows, F);
    tensor_multiply<MATH>(ctx, layers[2].dw, dy_turned, h_turned, parts, NULL, layers[2].dw);
    round_operand<MATH>(ctx, {}, n_turned, n, rows, in);
    tensor_multiply<MATH>(ctx, layers[0].dw, da_turned, n_turned, parts, NULL, layers[0].dw);
    tensor_multiply<MATH>(ctx, layers[1].dw, db_turned, n_turned, parts, NULL, layers[1].dw);
    round_operand<MATH>(ctx, {}, from_line(w, by_F), layers[0].w, F, in);
    round_operand<MATH>(ctx, {}, w, layers[1].w, F, in);
    tensor_multiply<MATH>(ctx, dn, of_h, w, parts, NULL, NULL);
    const float *const gradients[] = {da, db, layers[2].dy};
    for (int i = 0; i < 3; i++)
        if (layers[i].dbias) add_column_sums(ctx, layers[i].dbias, gradients[i], rows, layers[i].out);
}
template <metala_math MATH>
void swiglu_backward(metala_context *ctx, float *dn, const metala_linear_gradient *layers, float *h, float *dh, float *da,
                     float *db, const float *a, const float *b, const float *n, size_t rows, size_t in) {
    const size_t F = layers->out;
    if constexpr (MATH != METALA_EXACT)
        if (dn && layers[0].dw && layers[1].dw && layers[2].dw) {
            rounded_swiglu_backward<MATH>(ctx, dn, layers, dh, da, db, a, b, n, rows, in);
            return;
        }
    metala_linear_gradient of_h = layers[2], of_w = layers[2], two[2] = {layers[1], layers[0]};
    of_h.dw = of_h.dbias = NULL;
    matmul_backward<MATH>(ctx, dh, &of_h, 1, NULL, rows, F, 0);
    silu_gate_backward(ctx, da, db, h, dh, a, b, rows * F);
    matmul_backward<MATH>(ctx, NULL, &of_w, 1, h, rows, F, 0);
    two[0].dy = db, two[1].dy = da;
    matmul_backward<MATH>(ctx, dn, two, 2, n, rows, in, 0);
}

// y = silu(W_1 n + β_1) ⊙ (W_2 n + β_2),  n = rms(x): of a few rows one kernel, of more the three.
template <metala_math MATH>
void swiglu_step(metala_context *ctx, float *y, const metala_linear *layers, metala_dtype weights, float *n, float *r,
                 const float *x, size_t rows, size_t in, double eps) {
    if (rows <= FEW_ROWS) {
        with_weights(weights, in, [=](auto weights_of) {
            matmul_few_rows<true>(ctx, y, layers, 2, x, rows, in, (float)eps, weights_of);
        });
        return;
    }
    rms_forward(ctx, n, r, x, NULL, rows, in, eps);
    if (weights == METALA_F32) matmul_forward<MATH>(ctx, layers, 2, n, rows, in);
    else matmul_quantized(ctx, layers, 2, n, rows, in);
    silu_gate_forward(ctx, y, layers[0].y, layers[1].y, rows * layers->out);
}

// Sum:  y = a + b, n numbers; y may be a or b.
__global__ void add_kernel(float *y, const float *a, const float *b, size_t n) { FOR_EACH(i, n) y[i] = a[i] + b[i]; }
void add(metala_context *ctx, float *y, const float *a, const float *b, size_t n) {
    RUN(add_kernel, blocks_for(n, THREADS), THREADS, 0, y, a, b, n);
}

// ---- Kernels of the other rows of the general form.

// sums[j] += Σ_row term.at(row,j), the gradient of a parameter that all rows share: strips of rows, in
// the type of the terms, then the strips.
template <class Term>
__global__ void strip_sums_kernel(float *parts, Term term, size_t rows, size_t columns) {
    FOR_EACH(i, ceil_div(rows, ROWS_OF_STRIP) * columns) {
        size_t strip = i / columns, j = i % columns, end = least(rows, (strip + 1) * ROWS_OF_STRIP);
        decltype(term.at(0, 0)) sum = 0;
        for (size_t row = strip * ROWS_OF_STRIP; row < end; row++) sum += term.at(row, j);
        parts[i] = (float)sum;
    }
}
template <class Term>
void add_sums(metala_context *ctx, float *sums, Term term, size_t rows, size_t columns) {
    size_t strips = ceil_div(rows, ROWS_OF_STRIP);
    float *parts = scratch(ctx, strips * columns);
    if (!parts) return;
    RUN(strip_sums_kernel<Term>, blocks_for(strips * columns, THREADS), THREADS, 0, parts, term, rows, columns);
    RUN(sum_parts_kernel, blocks_for(columns, THREADS), THREADS, 0, sums, parts, strips, columns, columns, 1);
}

// Token shift:  y_t = μ ⊙ n_t + (1-μ) ⊙ n_{t-1}        n_{-1} from previous (B,D), NULL for zeros
//   y, n (B,T,D)   mu [D]: a block for each row.
__device__ float token_before(const float *n, const float *previous, size_t row, size_t d, size_t T, size_t D) {
    if (row % T) return n[(row - 1) * D + d];
    return previous ? previous[row / T * D + d] : 0;
}

__global__ void shift_forward_kernel(float *y, const float *n, const float *mu, const float *previous, size_t B,
                                     size_t T, size_t D) {
    FOR_EACH_ROW(row, B * T)
        for (size_t d = threadIdx.x; d < D; d += THREADS)
            y[row * D + d] = mu[d] * n[row * D + d] + (1 - mu[d]) * token_before(n, previous, row, d, T, D);
}
void shift_forward(metala_context *ctx, float *y, const float *n, const float *mu, const float *previous, size_t B,
                   size_t T, size_t D) {
    RUN(shift_forward_kernel, blocks_for(B * T, 1), THREADS, 0, y, n, mu, previous, B, T, D);
}

// dn_t += μ dy_t + (1-μ) dy_{t+1}  (dy beyond the end is 0)        dmu += Σ_{b,t} dy_t ⊙ (n_t - n_{t-1})
__global__ void shift_backward_kernel(float *dn, const float *dy, const float *mu, size_t B, size_t T, size_t D) {
    FOR_EACH_ROW(row, B * T)
        for (size_t d = threadIdx.x; d < D; d += THREADS) {
            float later = row % T + 1 < T ? dy[(row + 1) * D + d] : 0;
            dn[row * D + d] += mu[d] * dy[row * D + d] + (1 - mu[d]) * later;
        }
}
struct shift_mu {
    const float *dy, *n, *previous;
    size_t T, D;
    __device__ float at(size_t row, size_t d) const {
        return dy[row * D + d] * (n[row * D + d] - token_before(n, previous, row, d, T, D));
    }
};
void shift_backward(metala_context *ctx, float *dn, float *dmu, const float *dy, const float *n, const float *mu,
                    const float *previous, size_t B, size_t T, size_t D) {
    shift_mu term = {dy, n, previous, T, D};
    add_sums(ctx, dmu, term, B * T, D);
    RUN(shift_backward_kernel, blocks_for(B * T, 1), THREADS, 0, dn, dy, mu, B, T, D);
}

// to = x_{T-1}          to (B,D)   x (B,T,D): a block for each sequence.
__global__ void last_token_kernel(float *to, const float *x, size_t B, size_t T, size_t D) {
    FOR_EACH_ROW(b, B)
        for (size_t d = threadIdx.x; d < D; d += THREADS) to[b * D + d] = x[(b * T + T - 1) * D + d];
}
void last_token(metala_context *ctx, float *to, const float *x, size_t B, size_t T, size_t D) {
    if (T) RUN(last_token_kernel, blocks_for(B, 1), THREADS, 0, to, x, B, T, D);
}

// Feature map, n numbers:  y = f(x),  f(x) = x, silu(x) or elu(x) + 1.
__global__ void map_forward_kernel(float *y, const float *x, size_t n, metala_map map) {
    FOR_EACH(i, n) {
        float in = x[i];
        y[i] = map == METALA_MAP_SILU ? silu(in) : map == METALA_MAP_ELU1 ? (in > 0 ? in + 1 : expf(in)) : in;
    }
}
void map_forward(metala_context *ctx, float *y, const float *x, size_t n, metala_map map) {
    RUN(map_forward_kernel, blocks_for(n, THREADS), THREADS, 0, y, x, n, map);
}

// dx = dy f'(x); dx may be dy.
__global__ void map_backward_kernel(float *dx, const float *dy, const float *x, size_t n, metala_map map) {
    FOR_EACH(i, n) {
        float slope = map == METALA_MAP_SILU ? silu_slope(x[i]) : map == METALA_MAP_ELU1 && x[i] <= 0 ? expf(x[i]) : 1;
        dx[i] = dy[i] * slope;
    }
}
void map_backward(metala_context *ctx, float *dx, const float *dy, const float *x, size_t n, metala_map map) {
    RUN(map_backward_kernel, blocks_for(n, THREADS), THREADS, 0, dx, dy, x, n, map);
}

// Taylor feature map:  y = [1, x d^{-1/4}, x_i x_j / (√2 √d)]        x (rows,H,d)   y (rows,H,1+d+d²)
// A warp for each row and head.
__global__ void taylor_forward_kernel(float *y, const float *x, size_t heads, unsigned d, float root, float pair) {
    FOR_EACH_WARP(r, heads) {
        const float *in = x + r * d;
        float *out = y + r * (1 + d + (size_t)d * d);
        if (threadIdx.x % WARP == 0) out[0] = 1;
        for (unsigned i = threadIdx.x % WARP; i < d; i += WARP) out[1 + i] = in[i] * root;
        for (unsigned i = threadIdx.x % WARP; i < d * d; i += WARP) out[1 + d + i] = in[i / d] * in[i % d] * pair;
    }
}
void taylor_forward(metala_context *ctx, float *y, const float *x, size_t rows, size_t H, size_t d) {
    RUN(taylor_forward_kernel, blocks_for(rows * H, WARPS), THREADS, 0, y, x, rows * H, (unsigned)d,
        (float)pow((double)d, -0.25), (float)(1 / sqrt(2.0 * (double)d)));
}

// dx_i = dy_i d^{-1/4} + Σ_j (dy_ij + dy_ji) x_j / (√2 √d): a warp for each row and head, a lane for each i.
__global__ void taylor_backward_kernel(float *dx, const float *dy, const float *x, size_t heads, unsigned d, float root,
                                       float pair) {
    FOR_EACH_WARP(r, heads) {
        const float *in = x + r * d, *first = dy + r * (1 + d + (size_t)d * d) + 1, *second = first + d;
        for (unsigned i = threadIdx.x % WARP; i < d; i += WARP) {
            float sum = 0;
            for (unsigned j = 0; j < d; j++) sum += (second[i * d + j] + second[j * d + i]) * in[j];
            dx[r * d + i] = first[i] * root + sum * pair;
        }
    }
}
void taylor_backward(metala_context *ctx, float *dx, const float *dy, const float *x, size_t rows, size_t H, size_t d) {
    RUN(taylor_backward_kernel, blocks_for(rows * H, WARPS), THREADS, 0, dx, dy, x, rows * H, (unsigned)d,
        (float)pow((double)d, -0.25), (float)(1 / sqrt(2.0 * (double)d)));
}

// Phase:  y = x e^{±iθ(position+t)}, the numbers 2i and 2i+1 of a head being one complex number; y may be x
//   y, x (B,T,H,K)   theta [H,K/2], [K/2] when shared   turns (T,H,K/2,2) or (T,K/2,2): cosines and sines, in scratch
// The angle in double, so that it is right at any position.
__global__ void turns_kernel(float *turns, const float *theta, size_t T, size_t angles, uint64_t position) {
    FOR_EACH(i, T * angles) {
        double sine, cosine;
        sincos(fmod((double)theta[i % angles], 6.283185307179586477) * (double)(position + i / angles), &sine, &cosine);
        turns[2 * i] = (float)cosine;
        turns[2 * i + 1] = (float)sine;
    }
}

// A block for each row; sign: of the angle.
__global__ void rotate_kernel(float *y, const float *x, const float *turns, size_t rows, size_t T, size_t pairs,
                              size_t angles, float sign) {
    FOR_EACH_ROW(row, rows) {
        const float *of_token = turns + row % T * angles * 2;
        for (unsigned p = threadIdx.x; p < pairs; p += THREADS) {
            size_t at = 2 * (row * pairs + p), of = 2 * (p % (unsigned)angles);
            float re = x[at], im = x[at + 1], cosine = of_token[of], sine = sign * of_token[of + 1];
            y[at] = re * cosine - im * sine;
            y[at + 1] = re * sine + im * cosine;
        }
    }
}
void rotate(metala_context *ctx, float *y, const float *x, const float *theta, size_t B, size_t T, size_t H, size_t K,
            int shared, uint64_t position, float sign) {
    size_t pairs = H * (K / 2), angles = shared ? K / 2 : pairs;
    float *turns = scratch(ctx, 2 * T * angles);
    if (!turns) return;
    RUN(turns_kernel, blocks_for(T * angles, THREADS), THREADS, 0, turns, theta, T, angles, position);
    RUN(rotate_kernel, blocks_for(B * T, 1), THREADS, 0, y, x, turns, B * T, T, pairs, angles, sign);
}
void rotate_forward(metala_context *ctx, float *y, const float *x, const float *theta, size_t B, size_t T, size_t H,
                    size_t K, int shared, uint64_t position, int negative) {
    rotate(ctx, y, x, theta, B, T, H, K, shared, position, negative ? -1.0f : 1.0f);
}

// dx = dy turned back, may be dy      dtheta += ± Σ (position+t)(dy_{2i+1} y_{2i} - dy_{2i} y_{2i+1}), NULL: not learned
struct rotate_theta {
    const float *dy, *y;
    size_t T, heads, angles;             // heads: rows of the sum to a token
    uint64_t position;
    float sign;
    __device__ double at(size_t row, size_t i) const {
        const size_t p = 2 * (row * angles + i);
        return sign * (double)(position + row / heads % T) * (double)(dy[p + 1] * y[p] - dy[p] * y[p + 1]);
    }
};
void rotate_backward(metala_context *ctx, float *dx, float *dtheta, const float *dy, const float *y, const float *theta,
                     size_t B, size_t T, size_t H, size_t K, int shared, uint64_t position, int negative) {
    size_t heads = shared ? H : 1, angles = shared ? K / 2 : H * (K / 2);
    rotate_theta term = {dy, y, T, heads, angles, position, negative ? -1.0f : 1.0f};
    if (dtheta) add_sums(ctx, dtheta, term, B * T * heads, angles);
    rotate(ctx, dx, dy, theta, B, T, H, K, shared, position, -term.sign);
}

// Bounded gate:  α = γ + (1-γ) σ(z),  k = 1 - α = (1-γ) σ(-z)        alpha, k, z (rows,n)   gamma [n]   k may be NULL
// A block for each row.
__global__ void bounded_gate_forward_kernel(float *alpha, float *k, const float *z, const float *gamma, size_t rows,
                                            size_t n) {
    FOR_EACH_ROW(row, rows)
        for (size_t i = threadIdx.x; i < n; i += THREADS) {
            alpha[row * n + i] = gamma[i] + (1 - gamma[i]) * sigmoid(z[row * n + i]);
            if (k) k[row * n + i] = (1 - gamma[i]) * sigmoid(-z[row * n + i]);
        }
}
void bounded_gate_forward(metala_context *ctx, float *alpha, float *k, const float *z, const float *gamma, size_t rows,
                          size_t n) {
    RUN(bounded_gate_forward_kernel, blocks_for(rows, 1), THREADS, 0, alpha, k, z, gamma, rows, n);
}

// da is the gradient in a = log α, dk that of k, or NULL. With ratio = (1-γ)σ(z)/α, 1 where both are 0:
//   dz = σ(-z) (da ratio - dk (1-γ)σ(z))      dgamma += Σ_rows σ(-z) (da/max(α,1e-30) - dk), or NULL
__global__ void bounded_gate_backward_kernel(float *dz, const float *da, const float *dk, const float *z,
                                             const float *gamma, size_t rows, size_t n) {
    FOR_EACH_ROW(row, rows)
        for (size_t i = threadIdx.x; i < n; i += THREADS) {
            float x = z[row * n + i], open = (1 - gamma[i]) * sigmoid(x), alpha = gamma[i] + open;
            float gradient = da[row * n + i] * (alpha > 0 ? open / alpha : 1);
            if (dk) gradient -= dk[row * n + i] * open;
            dz[row * n + i] = sigmoid(-x) * gradient;
        }
}
struct gate_gamma {
    const float *da, *dk, *z, *gamma;
    size_t n;
    __device__ float at(size_t row, size_t i) const {
        float x = z[row * n + i], alpha = gamma[i] + (1 - gamma[i]) * sigmoid(x);
        return sigmoid(-x) * (da[row * n + i] / fmaxf(alpha, 1e-30f) - (dk ? dk[row * n + i] : 0));
    }
};
void bounded_gate_backward(metala_context *ctx, float *dz, float *dgamma, const float *da, const float *dk,
                           const float *z, const float *gamma, size_t rows, size_t n) {
    gate_gamma term = {da, dk, z, gamma, n};
    if (dgamma) add_sums(ctx, dgamma, term, rows, n);
    RUN(bounded_gate_backward_kernel, blocks_for(rows, 1), THREADS, 0, dz, da, dk, z, gamma, rows, n);
}

// Lower bounds:  p = softmax over the L layers of G,  gamma_l = Σ_{1<=m<=l} p_m         gamma, G (L,n)
// A thread for each of the n columns, in double.
struct column_softmax {
    const float *G;
    size_t n;
    double most, total;
    __device__ column_softmax(const float *G, size_t L, size_t n) : G(G), n(n), most(G[0]), total(0) {
        for (size_t l = 1; l < L; l++) most = fmax(most, (double)G[l * n]);
        for (size_t l = 0; l < L; l++) total += exp((double)G[l * n] - most);
    }
    __device__ double at(size_t l) const { return exp((double)G[l * n] - most) / total; }
};
__global__ void bounds_forward_kernel(float *gamma, const float *G, size_t L, size_t n) {
    FOR_EACH(i, n) {
        column_softmax p(G + i, L, n);
        double sum = 0;
        for (size_t l = 0; l < L; l++) {
            if (l) sum += p.at(l);
            gamma[l * n + i] = (float)fmin(sum, 1.0);
        }
    }
}
void bounds_forward(metala_context *ctx, float *gamma, const float *G, size_t L, size_t n) {
    if (L) RUN(bounds_forward_kernel, blocks_for(n, THREADS), THREADS, 0, gamma, G, L, n);
}

// dp_m = Σ_{l>=m} dgamma_l, dp_0 = 0      dG_m += p_m (dp_m - Σ_l p_l dp_l)
__global__ void bounds_backward_kernel(float *dG, const float *dgamma, const float *G, size_t L, size_t n) {
    FOR_EACH(i, n) {
        column_softmax p(G + i, L, n);
        double later = 0, mean = 0;
        for (size_t l = L; l-- > 1;) {
            later += (double)dgamma[l * n + i];
            mean += p.at(l) * later;
        }
        dG[i] -= (float)(p.at(0) * mean);
        for (size_t l = 1; l < L; l++) {
            dG[l * n + i] += (float)(p.at(l) * (later - mean));
            later -= (double)dgamma[l * n + i];
        }
    }
}
void bounds_backward(metala_context *ctx, float *dG, const float *dgamma, const float *G, size_t L, size_t n) {
    if (L) RUN(bounds_backward_kernel, blocks_for(n, THREADS), THREADS, 0, dG, dgamma, G, L, n);
}

// Constants of a diagonal complex state-space model, of the kinds LRU, ZOH and DSS; see metala.c for the equations.
//   decay, phase, alpha, theta [H,N]   step [H]   b [H,N,2] complex: a thread for each channel, in double
typedef struct { double re, im; } complex_number;
__device__ complex_number complex_of(double re, double im) { complex_number z = {re, im}; return z; }
__device__ complex_number complex_times(complex_number a, complex_number b) {
    return complex_of(a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re);
}
__device__ complex_number complex_over(complex_number a, complex_number b) {
    double size = b.re * b.re + b.im * b.im;
    return complex_of((a.re * b.re + a.im * b.im) / size, (a.im * b.re - a.re * b.im) / size);
}
// e^z - 1, exact near 0.
__device__ complex_number complex_expm1(complex_number z) {
    double half = sin(z.im / 2), grown = expm1(z.re);
    return complex_of(grown * cos(z.im) - 2 * half * half, (grown + 1) * sin(z.im));
}
// Exponents are kept where nothing overflows, 1/λ² included.
__device__ double bounded_exp(float x) { return exp(x < -20 ? -20 : x > 40 ? 40 : (double)x); }
__device__ double bounded_phase(double x) { return x < -1e30 ? -1e30 : x > 1e30 ? 1e30 : x; }

__global__ void ssm_forward_kernel(metala_ssm kind, float *alpha, float *theta, float *b, const float *decay,
                                   const float *phase, const float *step, size_t H, size_t N, size_t length) {
    FOR_EACH(i, H * N) {
        double delta = bounded_exp(step[i / N]);
        complex_number factor = {delta, 0};
        if (kind == METALA_SSM_LRU) {
            alpha[i] = (float)exp(-bounded_exp(decay[i]));
            theta[i] = (float)bounded_exp(phase[i]);
        } else {
            complex_number lambda = {-bounded_exp(decay[i]), bounded_phase((double)phase[i])};
            complex_number z = {lambda.re * delta, bounded_phase(lambda.im * delta)};
            complex_number all = {z.re * (double)length, z.im * (double)length};
            alpha[i] = (float)exp(z.re);
            theta[i] = (float)z.im;
            factor = complex_over(complex_expm1(z), lambda);
            if (kind == METALA_SSM_DSS) factor = complex_over(factor, complex_expm1(all));
        }
        b[2 * i] = (float)factor.re;
        b[2 * i + 1] = (float)factor.im;
    }
}
void ssm_forward(metala_context *ctx, metala_ssm kind, float *alpha, float *theta, float *b, const float *decay,
                 const float *phase, const float *step, size_t H, size_t N, size_t length) {
    RUN(ssm_forward_kernel, blocks_for(H * N, THREADS), THREADS, 0, kind, alpha, theta, b, decay, phase, step, H, N,
        length);
}

// ∂b/∂λ and ∂b/∂Δ as in metala.c: a warp for each h, whose lanes have the n, since dstep is a sum over them.
__device__ complex_number zoh_slope(complex_number z) {              // (z e^z - (e^z - 1))/z², near 0 its power series
    complex_number grown = complex_expm1(z), sum = {0, 0};
    if (z.re * z.re + z.im * z.im > 0.25) {
        complex_number e = {grown.re + 1, grown.im}, top = complex_times(z, e);
        return complex_over(complex_of(top.re - grown.re, top.im - grown.im), complex_times(z, z));
    }
    for (int n = 15; n >= 0; n--) {                                  // Σ_n z^n (n+1)/(n+2)!
        double term = n + 1;
        for (int m = n + 2; m > 1; m--) term /= m;
        sum = complex_times(sum, z);
        sum.re += term;
    }
    return sum;
}

__device__ complex_number softmax_slope(complex_number w) {          // e^w/(e^w - 1) - 1/w, near 0 its power series
    const double series[] = {1.0 / 12, -1.0 / 720, 1.0 / 30240, -1.0 / 1209600, 1.0 / 47900160,
                             -691.0 / 1307674368000.0};
    if (w.re * w.re + w.im * w.im > 0.25) {
        complex_number grown = complex_expm1(w), inverse = complex_over(complex_of(1, 0), w);
        complex_number ratio = complex_over(complex_of(grown.re + 1, grown.im), grown);
        return complex_of(ratio.re - inverse.re, ratio.im - inverse.im);
    }
    complex_number square = complex_times(w, w), sum = {0, 0};
#pragma unroll
    for (int n = 5; n >= 0; n--) {
        sum = complex_times(sum, square);
        sum.re += series[n];
    }
    sum = complex_times(sum, w);
    return complex_of(sum.re + 0.5, sum.im);
}

__global__ void ssm_backward_kernel(metala_ssm kind, float *ddecay, float *dphase, float *dstep, const float *da,
                                    const float *dtheta, const float *db, const float *decay, const float *phase,
                                    const float *step, size_t H, size_t N, size_t length) {
    FOR_EACH_WARP(h, H) {
        double delta = bounded_exp(step[h]), ddelta = 0;
        for (size_t i = h * N + threadIdx.x % WARP; i < (h + 1) * N; i += WARP) {
            double gradient_a = (double)da[i], gradient_theta = (double)dtheta[i], rate = bounded_exp(decay[i]);
            complex_number gradient = {(double)db[2 * i], (double)db[2 * i + 1]};
            if (kind == METALA_SSM_LRU) {
                ddecay[i] += (float)(-rate * gradient_a);
                dphase[i] += (float)(gradient_theta * bounded_exp(phase[i]));
                ddelta += gradient.re;
                continue;
            }
            complex_number lambda = {-rate, bounded_phase((double)phase[i])};
            complex_number z = {lambda.re * delta, bounded_phase(lambda.im * delta)};
            complex_number grown = complex_expm1(z), in_lambda, in_delta;
            if (kind == METALA_SSM_ZOH) {
                in_lambda = complex_times(complex_of(delta * delta, 0), zoh_slope(z));
                in_delta = complex_of(grown.re + 1, grown.im);
            } else {
                complex_number all = {z.re * (double)length, z.im * (double)length};
                complex_number near = softmax_slope(z), far = softmax_slope(all);
                complex_number slope = {(double)length * far.re - near.re, (double)length * far.im - near.im};
                complex_number inverse = complex_over(complex_of(1, 0), lambda);
                complex_number b = complex_times(complex_over(grown, complex_expm1(all)), inverse);
                in_lambda = complex_times(b, complex_of(-inverse.re - delta * slope.re, -inverse.im - delta * slope.im));
                in_delta = complex_times(complex_times(b, lambda), complex_of(-slope.re, -slope.im));
            }
            double re = gradient.re * in_lambda.re + gradient.im * in_lambda.im + gradient_a * delta;
            double im = gradient.im * in_lambda.re - gradient.re * in_lambda.im + gradient_theta * delta;
            ddecay[i] += (float)(re * lambda.re);
            dphase[i] += (float)im;
            ddelta += gradient.re * in_delta.re + gradient.im * in_delta.im + gradient_a * lambda.re +
                      gradient_theta * lambda.im;
        }
        ddelta = warp_sum(ddelta);
        if (threadIdx.x % WARP == 0) dstep[h] += (float)(ddelta * delta);
    }
}
void ssm_backward(metala_context *ctx, metala_ssm kind, float *ddecay, float *dphase, float *dstep, const float *da,
                  const float *dtheta, const float *db, const float *decay, const float *phase, const float *step,
                  size_t H, size_t N, size_t length) {
    RUN(ssm_backward_kernel, blocks_for(H, WARPS), THREADS, 0, kind, ddecay, dphase, dstep, da, dtheta, db, decay, phase,
        step, H, N, length);
}

// Complex factor, pairs of numbers being complex:  y = b ⊙ x         y, x (rows,n,2)   b [n,2]: a block for each row.
__global__ void scale_pairs_forward_kernel(float *y, const float *x, const float *b, size_t rows, size_t n) {
    FOR_EACH_ROW(row, rows)
        for (size_t i = threadIdx.x; i < n; i += THREADS) {
            size_t at = 2 * (row * n + i);
            float re = x[at], im = x[at + 1];
            y[at] = b[2 * i] * re - b[2 * i + 1] * im;
            y[at + 1] = b[2 * i] * im + b[2 * i + 1] * re;
        }
}
void scale_pairs_forward(metala_context *ctx, float *y, const float *x, const float *b, size_t rows, size_t n) {
    RUN(scale_pairs_forward_kernel, blocks_for(rows, 1), THREADS, 0, y, x, b, rows, n);
}

// dx = conj(b) dy      db += Σ_rows conj(x) dy
__global__ void scale_pairs_backward_kernel(float *dx, const float *dy, const float *b, size_t rows, size_t n) {
    FOR_EACH_ROW(row, rows)
        for (size_t i = threadIdx.x; i < n; i += THREADS) {
            size_t at = 2 * (row * n + i);
            float re = dy[at], im = dy[at + 1];
            dx[at] = b[2 * i] * re + b[2 * i + 1] * im;
            dx[at + 1] = b[2 * i] * im - b[2 * i + 1] * re;
        }
}
struct scale_pairs_b {
    const float *dy, *x;
    size_t n;
    __device__ float at(size_t row, size_t i) const {                // i: real parts are even, imaginary ones odd
        const float *gradient = dy + 2 * row * n, *in = x + 2 * row * n;
        return i % 2 ? in[i - 1] * gradient[i] - in[i] * gradient[i - 1]
                     : in[i] * gradient[i] + in[i + 1] * gradient[i + 1];
    }
};
void scale_pairs_backward(metala_context *ctx, float *dx, float *db, const float *dy, const float *x, const float *b,
                          size_t rows, size_t n) {
    scale_pairs_b term = {dy, x, n};
    add_sums(ctx, db, term, rows, 2 * n);
    RUN(scale_pairs_backward_kernel, blocks_for(rows, 1), THREADS, 0, dx, dy, b, rows, n);
}

// Selective decay:  Δ = softplus(z),  α = exp(-Δ exp(A)),  v = Δ x        v, z, x (rows,C)   alpha (rows,C,N)   A [C,N]
// A block for each row.
__device__ float rate(float A) { return expf(fminf(A, 80)); }     // e^A, finite
__device__ float softplus(float z) { return (z > 0 ? z : 0) + log1pf(expf(-fabsf(z))); }

__global__ void selective_forward_kernel(float *alpha, float *v, const float *z, const float *x, const float *A,
                                         size_t rows, unsigned C, unsigned N) {
    FOR_EACH_ROW(row, rows) {
        for (unsigned i = threadIdx.x; i < C * N; i += THREADS)
            alpha[row * C * N + i] = expf(-softplus(z[row * C + i / N]) * rate(A[i]));
        for (unsigned c = threadIdx.x; c < C; c += THREADS) v[row * C + c] = softplus(z[row * C + c]) * x[row * C + c];
    }
}
void selective_forward(metala_context *ctx, float *alpha, float *v, const float *z, const float *x, const float *A,
                       size_t rows, size_t C, size_t N) {
    RUN(selective_forward_kernel, blocks_for(rows, 1), THREADS, 0, alpha, v, z, x, A, rows, (unsigned)C, (unsigned)N);
}

// da is the gradient in log α:  dΔ = Σ_n -e^A da + dv x,  dz = dΔ σ(z),  dx = Δ dv,  dA += Σ_rows -Δ e^A da
__global__ void selective_backward_kernel(float *dz, float *dx, const float *da, const float *dv, const float *z,
                                          const float *x, const float *A, size_t rows, size_t C, size_t N) {
    FOR_EACH_ROW(row, rows)
        for (size_t c = threadIdx.x; c < C; c += THREADS) {
            size_t at = row * C + c;
            float sum = 0, in = x[at], gradient = dv[at];
            for (size_t n = 0; n < N; n++) sum += rate(A[c * N + n]) * da[at * N + n];
            dz[at] = (gradient * in - sum) * sigmoid(z[at]);
            dx[at] = softplus(z[at]) * gradient;
        }
}
struct selective_A {
    const float *da, *z, *A;
    size_t C, N;
    __device__ float at(size_t row, size_t i) const {
        return -softplus(z[row * C + i / N]) * (rate(A[i]) * da[row * C * N + i]);
    }
};
void selective_backward(metala_context *ctx, float *dz, float *dx, float *dA, const float *da, const float *dv,
                        const float *z, const float *x, const float *A, size_t rows, size_t C, size_t N) {
    selective_A term = {da, z, A, C, N};
    add_sums(ctx, dA, term, rows, C * N);
    RUN(selective_backward_kernel, blocks_for(rows, 1), THREADS, 0, dz, dx, da, dv, z, x, A, rows, C, N);
}

// The same for each head:  y_h = x          y (rows,H,K)   x (rows,K): a block for each row.
__global__ void copy_heads_forward_kernel(float *y, const float *x, size_t rows, unsigned H, unsigned K) {
    FOR_EACH_ROW(row, rows)
        for (unsigned i = threadIdx.x; i < H * K; i += THREADS) y[row * H * K + i] = x[row * K + i % K];
}
void copy_heads_forward(metala_context *ctx, float *y, const float *x, size_t rows, size_t H, size_t K) {
    RUN(copy_heads_forward_kernel, blocks_for(rows, 1), THREADS, 0, y, x, rows, (unsigned)H, (unsigned)K);
}

// dx = Σ_h dy_h. A block for each 32 channels of a row: its warps share out the heads, and their sums are added in order.
__global__ void copy_heads_backward_kernel(float *dx, const float *dy, size_t rows, size_t H, size_t K) {
    __shared__ float part[WARPS][WARP];
    const unsigned lane = threadIdx.x % WARP, group = threadIdx.x / WARP;
    const size_t tiles = ceil_div(K, WARP);
    FOR_EACH_ROW(tile, rows * tiles) {
        size_t row = tile / tiles, i = tile % tiles * WARP + lane;
        float sum = 0;
        for (size_t h = group; h < H && i < K; h += WARPS) sum += dy[(row * H + h) * K + i];
        part[group][lane] = sum;
        __syncthreads();
        for (unsigned g = 1; g < WARPS && group == 0; g++) sum += part[g][lane];
        if (group == 0 && i < K) dx[row * K + i] = sum;
        __syncthreads();
    }
}
void copy_heads_backward(metala_context *ctx, float *dx, const float *dy, size_t rows, size_t H, size_t K) {
    RUN(copy_heads_backward_kernel, blocks_for(rows * ceil_div(K, WARP), 1), THREADS, 0, dx, dy, rows, H, K);
}

// RWKV-4's exponentials, kept below 1; see metala.c for the equations.
//   q, key, alpha, bonus, k (B,T,D)   w, u [D]   mask (B,T) or NULL   previous (B,2,D): k and M of the token before, NULL
//   at the start: a thread for each channel of a sequence, from the first token to the last.
const float NOTHING = -1e30f;            // the logarithm of no weight at all
__device__ float wkv_bounded(float x) { return fminf(fmaxf(x, -1e28f), 1e28f); }
__device__ float wkv_decay(float w) { return expf(fminf(w, 60)); }

__global__ void wkv_forward_kernel(float *q, float *key, float *alpha, float *bonus, const float *k, const float *w,
                                   const float *u, const uint8_t *mask, float *previous, size_t B, size_t T, size_t D,
                                   int at_start) {
    FOR_EACH(i, B * D) {
        const size_t b = i / D, d = i % D;
        float *kept = previous ? previous + b * 2 * D + d : NULL;
        const float decay = wkv_decay(w[d]), first = wkv_bounded(u[d]);
        float before = kept && !at_start ? kept[0] : NOTHING, M = kept && !at_start ? kept[D] : NOTHING;
        for (size_t t = 0; t < T; t++) {
            const size_t at = (b * T + t) * D + d;
            const float now = !mask || mask[b * T + t] ? wkv_bounded(k[at]) : NOTHING, own = first + now;
            if (t == 0 && at_start) {
                q[at] = key[at] = alpha[at] = 0;
                bonus[at] = 1;
            } else {
                float most = fmaxf(M - decay, before), p = fmaxf(most, own);
                alpha[at] = expf(M - decay - most);
                key[at] = expf(before - most);
                q[at] = expf(most - p);
                bonus[at] = expf(own - p);
                M = most;
            }
            before = now;
        }
        if (kept) kept[0] = before, kept[D] = M;
    }
}
void wkv_forward(metala_context *ctx, float *q, float *key, float *alpha, float *bonus, const float *k, const float *w,
                 const float *u, const uint8_t *mask, float *previous, size_t B, size_t T, size_t D, uint64_t position) {
    RUN(wkv_forward_kernel, blocks_for(B * D, THREADS), THREADS, 0, q, key, alpha, bonus, k, w, u, mask, previous, B, T,
        D, position == 0);
}

// dk_t = dbonus_t bonus_t + dkey_{t+1} key_{t+1} (0 beyond the end), 0 where masked: a block for each row
//   dw += Σ -e^w da_t      du += Σ dbonus_t bonus_t
__global__ void wkv_backward_kernel(float *dk, const float *dkey, const float *dbonus, const float *key,
                                    const float *bonus, const uint8_t *mask, size_t B, size_t T, size_t D) {
    FOR_EACH_ROW(row, B * T)
        for (size_t d = threadIdx.x; d < D; d += THREADS) {
            const size_t at = row * D + d;
            float gradient = dbonus[at] * bonus[at];
            if (row % T + 1 < T) gradient += dkey[at + D] * key[at + D];
            dk[at] = mask && !mask[row] ? 0 : gradient;
        }
}
struct wkv_w {
    const float *da, *w;
    size_t D;
    __device__ float at(size_t row, size_t d) const { return -wkv_decay(w[d]) * da[row * D + d]; }
};
struct wkv_u {
    const float *dbonus, *bonus;
    size_t D;
    __device__ float at(size_t row, size_t d) const { return dbonus[row * D + d] * bonus[row * D + d]; }
};
void wkv_backward(metala_context *ctx, float *dk, float *dw, float *du, const float *dkey, const float *da,
                  const float *dbonus, const float *key, const float *bonus, const float *w, const uint8_t *mask, size_t B,
                  size_t T, size_t D) {
    wkv_w of_w = {da, w, D};
    wkv_u of_u = {dbonus, bonus, D};
    add_sums(ctx, dw, of_w, B * T, D);
    add_sums(ctx, du, of_u, B * T, D);
    RUN(wkv_backward_kernel, blocks_for(B * T, 1), THREADS, 0, dk, dkey, dbonus, key, bonus, mask, B, T, D);
}

// A channel of ones for the normaliser:  y_t = m_t [v_t, 1];  delayed: [v_{t-1}, 1], and v_{-1} = previous, NULL for zeros
//   y (B,T,H,V+1)   v (B,T,H,V)   mask (B,T) or NULL   previous (B,H,V): a block for each row.
__global__ void extend_forward_kernel(float *y, const float *v, const uint8_t *mask, const float *previous, int delayed,
                                      size_t B, size_t T, unsigned H, unsigned V) {
    const unsigned wide = V + 1, width = H * V;
    FOR_EACH_ROW(row, B * T) {
        const bool seen = delayed || !mask || mask[row];
        for (unsigned i = threadIdx.x; i < H * wide; i += THREADS) {
            const unsigned j = i % wide, at = i / wide * V + j;
            float value = j == V    ? 1
                          : delayed ? token_before(v, previous, row, at, T, width)
                                    : v[row * width + at];
            y[row * H * wide + i] = seen ? value : 0;
        }
    }
}
void extend_forward(metala_context *ctx, float *y, const float *v, const uint8_t *mask, const float *previous,
                    int delayed, size_t B, size_t T, size_t H, size_t V) {
    RUN(extend_forward_kernel, blocks_for(B * T, 1), THREADS, 0, y, v, mask, previous, delayed, B, T, (unsigned)H,
        (unsigned)V);
}

// dv_t = m_t dy_t, or dy_{t+1} when delayed (0 beyond the end), without the channel of ones.
__global__ void extend_backward_kernel(float *dv, const float *dy, const uint8_t *mask, int delayed, size_t B, size_t T,
                                       unsigned H, unsigned V) {
    FOR_EACH_ROW(row, B * T) {
        const size_t from = delayed ? row + 1 : row;
        const bool used = delayed ? row % T + 1 < T : !mask || mask[row];
        for (unsigned i = threadIdx.x; i < H * V; i += THREADS)
            dv[row * H * V + i] = used ? dy[(from * H + i / V) * (V + 1) + i % V] : 0;
    }
}
void extend_backward(metala_context *ctx, float *dv, const float *dy, const uint8_t *mask, int delayed, size_t B,
                     size_t T, size_t H, size_t V) {
    RUN(extend_backward_kernel, blocks_for(B * T, 1), THREADS, 0, dv, dy, mask, delayed, B, T, (unsigned)H, (unsigned)V);
}

// Normaliser:  y_j = (o_j + b v_j) / (o_V + b + eps)      o (rows,H,V+1)   y, v (rows,H,V)   bonus b (rows,H), NULL for 0
// A warp for each row and head.
__global__ void normalise_forward_kernel(float *y, const float *o, const float *bonus, const float *v, size_t heads,
                                         size_t V, float eps) {
    FOR_EACH_WARP(r, heads) {
        const float *in = o + r * (V + 1), b = bonus ? bonus[r] : 0, ones = in[V] + b + eps;
        for (size_t j = threadIdx.x % WARP; j < V; j += WARP)
            y[r * V + j] = (in[j] + (bonus ? b * v[r * V + j] : 0)) / ones;
    }
}
void normalise_forward(metala_context *ctx, float *y, const float *o, const float *bonus, const float *v, size_t rows,
                       size_t H, size_t V, double eps) {
    RUN(normalise_forward_kernel, blocks_for(rows * H, WARPS), THREADS, 0, y, o, bonus, v, rows * H, V, (float)eps);
}

// dO_j = dy_j / (o_V + b + eps)      dO_V = -Σ_j dO_j y_j      dbonus = Σ_j dO_j v_j + dO_V      dv_j = b dO_j
// without bonus no dbonus and no dv. A warp for each row and head.
__global__ void normalise_backward_kernel(float *dO, float *dbonus, float *dv, const float *dy, const float *y,
                                          const float *o, const float *bonus, const float *v, size_t heads, size_t V,
                                          float eps) {
    FOR_EACH_WARP(r, heads) {
        float *out = dO + r * (V + 1), b = bonus ? bonus[r] : 0, ones = o[r * (V + 1) + V] + b + eps, along = 0, own = 0;
        for (size_t j = threadIdx.x % WARP; j < V; j += WARP) {
            float gradient = dy[r * V + j] / ones;
            along += gradient * y[r * V + j];
            out[j] = gradient;
            if (!bonus) continue;
            own += gradient * v[r * V + j];
            dv[r * V + j] = b * gradient;
        }
        along = warp_sum(along), own = warp_sum(own);
        if (threadIdx.x % WARP) continue;
        out[V] = -along;
        if (bonus) dbonus[r] = own - along;
    }
}
void normalise_backward(metala_context *ctx, float *dO, float *dbonus, float *dv, const float *dy, const float *y,
                        const float *o, const float *bonus, const float *v, size_t rows, size_t H, size_t V, double eps) {
    RUN(normalise_backward_kernel, blocks_for(rows * H, WARPS), THREADS, 0, dO, dbonus, dv, dy, y, o, bonus, v, rows * H,
        V, (float)eps);
}

// Skip:  y = o + d ⊙ x          y, o, x (rows,n)   d [n]; y may be o: a block for each row.
__global__ void skip_forward_kernel(float *y, const float *o, const float *x, const float *d, size_t rows, size_t n) {
    FOR_EACH_ROW(row, rows)
        for (size_t i = threadIdx.x; i < n; i += THREADS) y[row * n + i] = o[row * n + i] + d[i] * x[row * n + i];
}
void skip_forward(metala_context *ctx, float *y, const float *o, const float *x, const float *d, size_t rows, size_t n) {
    RUN(skip_forward_kernel, blocks_for(rows, 1), THREADS, 0, y, o, x, d, rows, n);
}

// do = dy (the same memory serves both)      dx += d ⊙ dy      dd += Σ_rows dy ⊙ x
__global__ void skip_backward_kernel(float *dx, const float *dy, const float *d, size_t rows, size_t n) {
    FOR_EACH_ROW(row, rows)
        for (size_t i = threadIdx.x; i < n; i += THREADS) dx[row * n + i] += d[i] * dy[row * n + i];
}
struct skip_d {
    const float *dy, *x;
    size_t n;
    __device__ float at(size_t row, size_t i) const { return dy[row * n + i] * x[row * n + i]; }
};
void skip_backward(metala_context *ctx, float *dx, float *dd, const float *dy, const float *x, const float *d,
                   size_t rows, size_t n) {
    skip_d term = {dy, x, n};
    add_sums(ctx, dd, term, rows, n);
    RUN(skip_backward_kernel, blocks_for(rows, 1), THREADS, 0, dx, dy, d, rows, n);
}

// Product:  y = a ⊙ b, n numbers.
__global__ void multiply_forward_kernel(float *y, const float *a, const float *b, size_t n) {
    FOR_EACH(i, n) y[i] = a[i] * b[i];
}
void multiply_forward(metala_context *ctx, float *y, const float *a, const float *b, size_t n) {
    RUN(multiply_forward_kernel, blocks_for(n, THREADS), THREADS, 0, y, a, b, n);
}

// da = dy ⊙ b      db = dy ⊙ a, may be dy
__global__ void multiply_backward_kernel(float *da, float *db, const float *dy, const float *a, const float *b,
                                         size_t n) {
    FOR_EACH(i, n) {
        float gradient = dy[i];
        da[i] = gradient * b[i];
        db[i] = gradient * a[i];
    }
}
void multiply_backward(metala_context *ctx, float *da, float *db, const float *dy, const float *a, const float *b,
                       size_t n) {
    RUN(multiply_backward_kernel, blocks_for(n, THREADS), THREADS, 0, da, db, dy, a, b, n);
}

// Gated product:  y = σ(a) ⊙ b, n numbers.
__global__ void sigmoid_gate_forward_kernel(float *y, const float *a, const float *b, size_t n) {
    FOR_EACH(i, n) y[i] = sigmoid(a[i]) * b[i];
}
void sigmoid_gate_forward(metala_context *ctx, float *y, const float *a, const float *b, size_t n) {
    RUN(sigmoid_gate_forward_kernel, blocks_for(n, THREADS), THREADS, 0, y, a, b, n);
}

// da = dy ⊙ b ⊙ σ(a) σ(-a)      db = dy ⊙ σ(a)
__global__ void sigmoid_gate_backward_kernel(float *da, float *db, const float *dy, const float *a, const float *b,
                                             size_t n) {
    FOR_EACH(i, n) {
        float s = sigmoid(a[i]), gradient = dy[i];
        da[i] = gradient * b[i] * s * sigmoid(-a[i]);
        db[i] = gradient * s;
    }
}
void sigmoid_gate_backward(metala_context *ctx, float *da, float *db, const float *dy, const float *a, const float *b,
                           size_t n) {
    RUN(sigmoid_gate_backward_kernel, blocks_for(n, THREADS), THREADS, 0, da, db, dy, a, b, n);
}

// Softmax attention:  o_t = Σ_{j<=past+t} softmax_j(s q_t·k_j) v_j, without masked j; nothing to look at: o_t = 0
//   o (B,T,H,V)   lse (B,T,H): log of the sum of exponentials, for the backward   q (B,T,H,K)
//   k, v (B,past+T,H,K) and (B,past+T,H,V), mask (B,past+T) or NULL: sequence b starts at row b·stride of them
//
// Tiles of SIDE keys for 16·R queries: a block makes the map of one tile and adds tile times v to its rows of o, COLUMNS
// of them, so that the T×T map is never stored. A row's sum of exponentials is relative to the largest logit so far, and
// is scaled whenever a larger one comes. Thread (row group, lane) of 16×16 has R rows, R·group + i. Of the map, it has
// columns lane + 16j, which 16 threads side by side read from different banks; of o, columns 4·lane + 64c + 0 … 3. Two
// blocks at a time have room on a multiprocessor.
enum { SIDE = 64, LANES = 16, ACROSS = SIDE / LANES, CHANNELS = 32, CHANNELS_PITCH = CHANNELS + 4, MAP_PITCH = SIDE + 4 };

// `all` rows of x from global to shared memory, zeros beyond the last row and column.
template <int WIDTH, int TO_PITCH>
__device__ void load_vectors(float *to, const float *x, size_t step, size_t rows, size_t columns, unsigned all) {
#pragma unroll 4
    for (unsigned n = threadIdx.x; n < all * WIDTH; n += THREADS) {
        unsigned i = n / WIDTH, j = n % WIDTH;
        to[i * TO_PITCH + j] = i < rows && j < columns ? x[i * step + j] : 0;
    }
}

// map = x yᵀ of 16·R rows of x and SIDE rows of y, `length` channels each, which go through shared memory 32 at a time.
template <int R>
__device__ void tile_map(float map[R][ACROSS], float *strips, const float *x, size_t x_step, size_t x_rows,
                         const float *y, size_t y_step, size_t y_rows, size_t length) {
    const unsigned lane = threadIdx.x % LANES, row = threadIdx.x / LANES * R;
    float *of_x = strips, *of_y = strips + LANES * R * CHANNELS_PITCH;
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
        for (int j = 0; j < ACROSS; j++) map[i][j] = 0;
    for (size_t c0 = 0; c0 < length; c0 += CHANNELS) {
        load_vectors<CHANNELS, CHANNELS_PITCH>(of_x, x + c0, x_step, x_rows, length - c0, LANES * R);
        load_vectors<CHANNELS, CHANNELS_PITCH>(of_y, y + c0, y_step, y_rows, length - c0, SIDE);
        __syncthreads();                                             // the strips are there
#pragma unroll 1
        for (unsigned c = 0; c < CHANNELS; c += 4) {
            float4 a[R], b[ACROSS];
#pragma unroll
            for (int i = 0; i < R; i++) a[i] = *(const float4 *)&of_x[(row + i) * CHANNELS_PITCH + c];
#pragma unroll
            for (int j = 0; j < ACROSS; j++) b[j] = *(const float4 *)&of_y[(lane + LANES * j) * CHANNELS_PITCH + c];
#pragma unroll
            for (int i = 0; i < R; i++)
#pragma unroll
                for (int j = 0; j < ACROSS; j++)
                    map[i][j] += a[i].x * b[j].x + a[i].y * b[j].y + a[i].z * b[j].z + a[i].w * b[j].w;
        }
        __syncthreads();                                             // the strips are done with
    }
}

// sum += map v: the map in shared memory, v SIDE rows of COLUMNS numbers.
template <int R, int COLUMNS>
__device__ void tile_values(float sum[R][COLUMNS / LANES], const float *map, const float *v) {
    const unsigned lane = threadIdx.x % LANES, row = threadIdx.x / LANES * R;
#pragma unroll 1
    for (unsigned j = 0; j < SIDE; j += 4) {
        float weight[R][4];
#pragma unroll
        for (int i = 0; i < R; i++) *(float4 *)weight[i] = *(const float4 *)&map[(row + i) * MAP_PITCH + j];
#pragma unroll
        for (int e = 0; e < 4; e++)
#pragma unroll
            for (int c = 0; c < COLUMNS / SIDE; c++) {
                float4 x = *(const float4 *)&v[(j + e) * COLUMNS + SIDE * c + 4 * lane];
#pragma unroll
                for (int i = 0; i < R; i++) {
                    sum[i][4 * c] += weight[i][e] * x.x, sum[i][4 * c + 1] += weight[i][e] * x.y;
                    sum[i][4 * c + 2] += weight[i][e] * x.z, sum[i][4 * c + 3] += weight[i][e] * x.w;
                }
            }
    }
}

// Shared memory of a block: strips for tile_map, later the map itself; and the tile of v.
template <int R, int COLUMNS>
constexpr size_t attention_shared() {
    static_assert(LANES * R * MAP_PITCH <= (LANES * R + SIDE) * CHANNELS_PITCH, "the map has room where the strips were");
    return ((LANES * R + SIDE) * CHANNELS_PITCH + SIDE * COLUMNS) * sizeof(float);
}

// Largest number, and sum, of the 16 lanes that share rows.
__device__ float most_of_lanes(float x) {
    for (int distance = LANES / 2; distance > 0; distance /= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}
__device__ float sum_of_lanes(float x) {
    for (int distance = LANES / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

// Blocks: tiles of queries, those with most keys first; heads of sequences; tiles of columns, which repeat the map.
template <int R, int COLUMNS>
__global__ void __launch_bounds__(THREADS, 2)
attention_forward_kernel(float *o, float *lse, const float *q, const float *k, const float *v, const uint8_t *mask,
                         size_t T, size_t past, size_t stride, size_t H, size_t K, size_t V, float scale) {
    DYNAMIC_SHARED(float, memory);
    float *map = memory, *values = memory + (LANES * R + SIDE) * CHANNELS_PITCH;
    const unsigned lane = threadIdx.x % LANES, row = threadIdx.x / LANES * R;
    const size_t b = blockIdx.y / H, h = blockIdx.y % H, j0 = blockIdx.z * (size_t)COLUMNS;
    const size_t t0 = (gridDim.x - 1 - blockIdx.x) * (size_t)(LANES * R), t_end = least(T, t0 + LANES * R);
    const size_t first_query = (b * T + t0) * H + h, keys = past + t_end;
    float sum[R][COLUMNS / LANES] = {}, most[R], total[R];
#pragma unroll
    for (int i = 0; i < R; i++) most[i] = -FLT_MAX, total[i] = 0;

    for (size_t s0 = 0; s0 < keys; s0 += SIDE) {
        const size_t first_key = (b * stride + s0) * H + h, rows = keys - s0;
        float own[R][ACROSS];
        load_vectors<COLUMNS, COLUMNS>(values, v + first_key * V + j0, H * V, rows, V - j0, SIDE);
        tile_map<R>(own, memory, q + first_query * K, H * K, t_end - t0, k + first_key * K, H * K, rows, K);
#pragma unroll
        for (int i = 0; i < R; i++) {
            bool seen[ACROSS];
            const size_t visible = least(keys, past + t0 + row + i + 1);
            float larger = most[i];
#pragma unroll
            for (int j = 0; j < ACROSS; j++) {
                const size_t key = s0 + lane + LANES * j;
                seen[j] = key < visible && (!mask || mask[b * stride + key]);
                own[i][j] *= scale;
                if (seen[j]) larger = fmaxf(larger, own[i][j]);
            }
            larger = most_of_lanes(larger);
            const float factor = expf(most[i] - larger);
            most[i] = larger, total[i] *= factor;
#pragma unroll
            for (int c = 0; c < COLUMNS / LANES; c++) sum[i][c] *= factor;
#pragma unroll
            for (int j = 0; j < ACROSS; j++) {
                float weight = seen[j] ? expf(own[i][j] - larger) : 0;
                total[i] += weight;
                map[(row + i) * MAP_PITCH + lane + LANES * j] = weight;
            }
        }
        __syncthreads();                                             // the map is there
        tile_values<R, COLUMNS>(sum, map, values);
        __syncthreads();                                             // the map and the values are done with
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
        const size_t at = first_query + (row + i) * H;
        const float all = sum_of_lanes(total[i]), inverse = all > 0 ? 1 / all : 0;
        if (t0 + row + i >= T) continue;
        if (j0 == 0 && lane == 0) lse[at] = all > 0 ? most[i] + logf(all) : 0;
#pragma unroll
        for (int c = 0; c < COLUMNS / LANES; c++) {
            const size_t j = j0 + c / 4 * SIDE + 4 * lane + c % 4;
            if (j < V) o[at * V + j] = sum[i][c] * inverse;
        }
    }
}
void attention_forward(metala_context *ctx, float *o, float *lse, const float *q, const float *k, const float *v,
                       const uint8_t *mask, size_t B, size_t T, size_t past, size_t stride, size_t H, size_t K, size_t V,
                       double scale) {
#define FORWARD(R, COLUMNS)                                                                                       \
    RUN((attention_forward_kernel<R, COLUMNS>), extent(ceil_div(T, LANES * R), B * H, ceil_div(V, COLUMNS)),      \
        THREADS, (attention_shared<R, COLUMNS>()), o, lse, q, k, v, mask, T, past, stride, H, K, V, (float)scale)
    if (T <= LANES && V <= 64) FORWARD(1, 64);
    else if (T <= LANES) FORWARD(1, 128);
    else if (V <= 64) FORWARD(4, 64);
    else FORWARD(4, 128);
#undef FORWARD
}

// With p = e^{s q·k - lse}, δ_t = Σ_j do_tj o_tj and dlogit = p (do·v - δ):
//   dv_j = Σ_t p_tj do_t      dq_t = s Σ_j dlogit_tj k_j      dk_j = s Σ_t dlogit_tj q_t
// Each is a map times vectors. A block has a tile of the rows of one of the three, `own`, and goes through the `other`
// side's tiles, whose maps it makes again: rows are queries for dq, keys for dk and dv.
enum gradient { OF_Q, OF_K, OF_V };

__global__ void attention_delta_kernel(float *delta, const float *dO, const float *o, size_t heads, size_t V) {
    FOR_EACH_WARP(r, heads) {
        float sum = 0;
        for (size_t j = threadIdx.x % WARP; j < V; j += WARP) sum += dO[r * V + j] * o[r * V + j];
        sum = warp_sum(sum);
        if (threadIdx.x % WARP == 0) delta[r] = sum;
    }
}

template <gradient OF, int COLUMNS>
__global__ void __launch_bounds__(THREADS, 2)
attention_backward_kernel(float *to, const float *dO, const float *lse, const float *delta, const float *q,
                          const float *k, const float *v, const uint8_t *mask, size_t T, size_t H, size_t K, size_t V,
                          float scale) {
    enum { R = SIDE / LANES };
    DYNAMIC_SHARED(float, memory);
    float *map = memory, *values = memory + (LANES * R + SIDE) * CHANNELS_PITCH;
    const unsigned lane = threadIdx.x % LANES, row = threadIdx.x / LANES * R;
    const size_t b = blockIdx.y / H, first = blockIdx.y / H * T * H + blockIdx.y % H, j0 = blockIdx.z * (size_t)COLUMNS;
    const size_t width = OF == OF_V ? V : K, tile = OF == OF_Q ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const size_t own0 = tile * SIDE, own_at = first + own0 * H, own_rows = least(SIDE, T - own0);
    const size_t other_begin = OF == OF_Q ? 0 : own0, other_end = OF == OF_Q ? own0 + own_rows : T;
    const float *times = OF == OF_Q ? k : OF == OF_K ? q : dO;
    float sum[R][COLUMNS / LANES] = {};

    for (size_t other0 = other_begin; other0 < other_end; other0 += SIDE) {
        const size_t other_at = first + other0 * H, rows = least(SIDE, T - other0);
        float weight[R][ACROSS], product[R][ACROSS];
        load_vectors<COLUMNS, COLUMNS>(values, times + other_at * width + j0, H * width, rows, width - j0, SIDE);
        tile_map<R>(weight, memory, (OF == OF_Q ? q : k) + own_at * K, H * K, own_rows, (OF == OF_Q ? k : q) + other_at * K,
                    H * K, rows, K);
        if (OF != OF_V)
            tile_map<R>(product, memory, (OF == OF_Q ? dO : v) + own_at * V, H * V, own_rows,
                        (OF == OF_Q ? v : dO) + other_at * V, H * V, rows, V);
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int j = 0; j < ACROSS; j++) {
                const size_t mine = own0 + row + i, other = other0 + lane + LANES * j;
                const size_t query = OF == OF_Q ? mine : other, key = OF == OF_Q ? other : mine;
                float x = 0;
                if (query < T && key <= query && (!mask || mask[b * T + key])) {
                    x = expf(fminf(weight[i][j] * scale - lse[first + query * H], 0));
                    if (OF != OF_V) x *= (product[i][j] - delta[first + query * H]) * scale;
                }
                map[(row + i) * MAP_PITCH + lane + LANES * j] = x;
            }
        __syncthreads();                                             // the map of this tile is there
        tile_values<R, COLUMNS>(sum, map, values);
        __syncthreads();                                             // they are done with
    }
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
        for (int c = 0; c < COLUMNS / LANES; c++) {
            const size_t j = j0 + c / 4 * SIDE + 4 * lane + c % 4;
            if (row + i < own_rows && j < width) to[(own_at + (row + i) * H) * width + j] = sum[i][c];
        }
}
template <gradient OF>
void attention_backward_of(metala_context *ctx, float *to, const float *dO, const float *lse, const float *delta,
                           const float *q, const float *k, const float *v, const uint8_t *mask, size_t B, size_t T,
                           size_t H, size_t K, size_t V, double scale) {
    const size_t width = OF == OF_V ? V : K;
#define BACKWARD(COLUMNS)                                                                                             \
    RUN((attention_backward_kernel<OF, COLUMNS>), extent(ceil_div(T, SIDE), B * H, ceil_div(width, COLUMNS)),         \
        THREADS, (attention_shared<SIDE / LANES, COLUMNS>()), to, dO, lse, delta, q, k, v, mask, T, H, K, V,          \
        (float)scale)
    if (width <= 64) BACKWARD(64);
    else BACKWARD(128);
#undef BACKWARD
}
void attention_backward(metala_context *ctx, float *dq, float *dk, float *dv, const float *dO, const float *o,
                        const float *lse, const float *q, const float *k, const float *v, const uint8_t *mask, size_t B,
                        size_t T, size_t H, size_t K, size_t V, double scale) {
    float *delta = scratch(ctx, B * T * H);
    if (!delta) return;
    RUN(attention_delta_kernel, blocks_for(B * T * H, WARPS), THREADS, 0, delta, dO, o, B * T * H, V);
    attention_backward_of<OF_Q>(ctx, dq, dO, lse, delta, q, k, v, mask, B, T, H, K, V, scale);
    attention_backward_of<OF_K>(ctx, dk, dO, lse, delta, q, k, v, mask, B, T, H, K, V, scale);
    attention_backward_of<OF_V>(ctx, dv, dO, lse, delta, q, k, v, mask, B, T, H, K, V, scale);
}

// Softmax cross-entropy:  lse = log Σ_n e^{logit_n},  loss = lse - logit_target; 0 where the target is METALA_IGNORE
//   loss, lse (rows)   logits (rows,N). A block for each row reads it once: every thread keeps the largest logit that
//   it has met and the sum of exponentials relative to it, and these pairs are joined at the end.
__device__ void join_sums(float &most, float &sum, float other_most, float other_sum) {
    float larger = most > other_most ? most : other_most;
    sum = sum * expf(most - larger) + other_sum * expf(other_most - larger);
    most = larger;
}

__global__ void cross_entropy_forward_kernel(float *loss, float *lse, const float *logits, const int *targets,
                                             size_t rows, size_t N) {
    __shared__ float mosts[WARPS], sums[WARPS];
    FOR_EACH_ROW(row, rows) {
        const float *x = logits + row * N;
        float most = -FLT_MAX, sum = 0;
        for (size_t i = threadIdx.x; i < N; i += THREADS) {
            if (x[i] > most) {
                sum *= expf(most - x[i]);
                most = x[i];
            }
            sum += expf(x[i] - most);
        }
        for (int distance = WARP / 2; distance > 0; distance /= 2) {
            float other_most = __shfl_xor_sync(ALL_LANES, most, distance);
            float other_sum = __shfl_xor_sync(ALL_LANES, sum, distance);
            join_sums(most, sum, other_most, other_sum);
        }
        if (threadIdx.x % WARP == 0) mosts[threadIdx.x / WARP] = most, sums[threadIdx.x / WARP] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int warp = 1; warp < WARPS; warp++) join_sums(most, sum, mosts[warp], sums[warp]);
            float log_sum = logf(sum);
            lse[row] = most + log_sum;
            loss[row] = targets[row] == METALA_IGNORE ? 0 : most - x[targets[row]] + log_sum;
        }
        __syncthreads();
    }
}
void cross_entropy_forward(metala_context *ctx, float *loss, float *lse, const float *logits, const int *targets,
                           size_t rows, size_t N) {
    RUN(cross_entropy_forward_kernel, blocks_for(rows, 1), THREADS, 0, loss, lse, logits, targets, rows, N);
}

// dlogits = weight (softmax(logits) - onehot(target)), 0 where ignored; may overwrite the logits. A block for each row.
__global__ void cross_entropy_backward_kernel(float *dlogits, const float *logits, const float *lse, const int *targets,
                                              size_t rows, size_t N, float weight) {
    FOR_EACH_ROW(row, rows) {
        const int target = targets[row];
        const float base = lse[row];
        for (size_t first = threadIdx.x; first < N; first += FEW * THREADS)
            few(first, N, [=](size_t i) { return logits[row * N + i]; },
                [=](size_t i, float logit) { dlogits[row * N + i] = logit_gradient(logit, base, target, i, weight); });
    }
}
void cross_entropy_backward(metala_context *ctx, float *dlogits, const float *logits, const float *lse,
                            const int *targets, size_t rows, size_t N, double weight) {
    RUN(cross_entropy_backward_kernel, blocks_for(rows, 1), THREADS, 0, dlogits, logits, lse, targets, rows, N,
        (float)weight);
}

// dx = dlogits W      dW += dlogitsᵀ x: on tensor cores dlogits is never written, but for its rounded copies.
template <metala_math MATH>
void output_backward(metala_context *ctx, float *dx, float *dw, float *logits, const float *lse, const int *targets,
                     const float *x, const float *w, size_t rows, size_t N, size_t in, double weight) {
    const metala_linear_gradient layer = {dw, NULL, logits, w, N};
    if constexpr (MATH != METALA_EXACT)
        rounded_backward<MATH>(ctx, dx, &layer, 1, [=](const metala_linear_gradient *l) {
            return logit_gradients{{l->dy}, lse, targets, (float)weight, (unsigned)rows, (unsigned)N};
        }, x, rows, in, 0);
    else {
        cross_entropy_backward(ctx, logits, logits, lse, targets, rows, N, weight);
        matmul_backward<MATH>(ctx, dx, &layer, 1, x, rows, in, 0);
    }
}

// Σ x², for the global norm of the gradients: blocks of 4096 numbers, then one block adds up their sums in order.
enum { SQUARES = 4096 };
__global__ void sum_squares_kernel(double *parts, const float *x, size_t n) {
    FOR_EACH_ROW(part, ceil_div(n, SQUARES)) {
        size_t end = least(n, (part + 1) * SQUARES);
        float sum = 0;
        for (size_t i = part * SQUARES + threadIdx.x; i < end; i += THREADS) sum += x[i] * x[i];
        double all = block_sum((double)sum);
        if (threadIdx.x == 0) parts[part] = all;
    }
}
__global__ void sum_doubles_kernel(double *sum, const double *parts, size_t count) {
    double own = 0;
    for (size_t p = threadIdx.x; p < count; p += THREADS) own += parts[p];
    own = block_sum(own);
    if (threadIdx.x == 0) *sum = own;
}
double sum_squares(metala_context *ctx, const float *x, size_t n) {
    size_t count = ceil_div(n, SQUARES);
    double *parts = (double *)scratch(ctx, 2 * (count + 1)), sum = 0;
    if (!parts) return 0;
    RUN(sum_squares_kernel, blocks_for(count, 1), THREADS, 0, parts, x, n);
    RUN(sum_doubles_kernel, 1, THREADS, 0, parts + count, parts, count);
    cuda_download(ctx, &sum, parts + count, sizeof sum);
    return sum;
}

// AdamW, step = 1, 2, …:  g = gradient_scale · g;  θ *= 1 - lr·wd;  m = β₁m + (1-β₁)g;  v = β₂v + (1-β₂)g²
//                         θ -= lr/(1-β₁^step) · m / (√v / √(1-β₂^step) + eps)        a thread for each parameter
typedef struct { float scale, keep, beta1, beta2, eps, rate, root; } adamw_numbers;

__global__ void adamw_kernel(float *p, float *m, float *v, const float *g, size_t n, adamw_numbers a) {
    next_may_begin(), wait_for_before();
    FOR_EACH(i, n) {
        float gradient = a.scale * g[i], mean = m[i], square = v[i], old = p[i];     // all loads before the first store
        m[i] = mean = a.beta1 * mean + (1 - a.beta1) * gradient;
        v[i] = square = a.beta2 * square + (1 - a.beta2) * gradient * gradient;
        p[i] = a.keep * old - a.rate * mean / (sqrtf(square) * a.root + a.eps);
    }
}
void adamw(metala_context *ctx, float *p, float *m, float *v, const float *g, size_t n, const metala_adamw *adamw,
           uint64_t step, double gradient_scale, double weight_decay) {
    adamw_numbers a;
    a.scale = (float)gradient_scale;
    a.keep = (float)(1 - adamw->learning_rate * weight_decay);
    a.beta1 = (float)adamw->beta1, a.beta2 = (float)adamw->beta2, a.eps = (float)adamw->eps;
    a.rate = (float)(adamw->learning_rate / (1 - pow(adamw->beta1, (double)step)));
    a.root = (float)(1 / sqrt(1 - pow(adamw->beta2, (double)step)));
    RUN_EARLY(adamw_kernel, blocks_for(n, THREADS), THREADS, 0, p, m, v, g, n, a);
}

// ============================================================== 5. The decay scan

// For each sequence and head, see metala.c for the equations and their gradients:
//
//     S_t = diag(α_t) S_{t-1} + k_t v_tᵀ           S in R^{K×V}
//     o_t = s S_tᵀ q_t
//
//   o, v (B,T,H,V)   q, k, alpha (B,T,H,K)   S (B,H,K,V): initial state in, final state out, NULL for zeros and no
//   interest; states (B,H,ceil(T/64),K,V) receives the state before every 64th token, for the backward, or NULL;
//   shared: q or k (B,T,K), or both (T,H,K); alpha [H,K]
//
// The columns of S do not know of each other: a block of threads takes one head and a tile of columns, and walks
// through time. Forward, tiles have nothing to share. Backward, dq, dk and da are sums over all columns; each tile
// leaves its part of them in scratch memory.
//
// As in metala.c, decays over several tokens are products of α, each at most 1, and nothing is ever divided by one.

__host__ __device__ constexpr size_t chunks(size_t T) { return ceil_div(T, METALA_CHUNK); }

// Head b_h = b·H + h starts at this row of q, k, v, …, and its next token is H rows on.
__device__ size_t first_row(size_t b_h, size_t T, size_t H) { return b_h / H * T * H + b_h % H; }

// ---- Recurrent: the definition, token by token. Threads (32, GROUPS): lane l has column l of the tile, and group g
// the rows g, g + GROUPS, g + 2·GROUPS, … of S, ROWS of them, in registers. Generation reads and writes S once a token,
// and that is all that it does.

enum { RECURRENT_COLUMNS = WARP };

// The sum over the groups of x, at column `lane`, in order. part (GROUPS, 32). Group 0 gets it.
template <int GROUPS>
__device__ float sum_groups(float *part, float x) {
    part[threadIdx.y * WARP + threadIdx.x] = x;
    __syncthreads();
    float sum = 0;
    for (int g = 0; g < GROUPS && threadIdx.y == 0; g++) sum += part[g * WARP + threadIdx.x];
    __syncthreads();
    return sum;
}

template <int ROWS, int GROUPS>
__global__ void __launch_bounds__(WARP * GROUPS, 1)
recurrent_forward_kernel(float *o, float *S, float *states, const float *q, const float *k, const float *v,
                         const float *alpha, size_t T, size_t H, size_t K, size_t V, float scale) {
    __shared__ float part[GROUPS * WARP];
    const size_t b_h = blockIdx.y, j = blockIdx.x * (size_t)RECURRENT_COLUMNS + threadIdx.x, row = first_row(b_h, T, H);
    float s[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        size_t i = threadIdx.y + r * GROUPS;
        s[r] = S && i < K && j < V ? S[(b_h * K + i) * V + j] : 0;
    }
    for (size_t t = 0; t < T; t++) {
        const size_t at = row + t * H;
        const float vj = j < V ? v[at * V + j] : 0;
        float sum = 0;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            size_t i = threadIdx.y + r * GROUPS;
            if (i >= K) break;
            if (states && t % METALA_CHUNK == 0 && j < V)
                states[((b_h * chunks(T) + t / METALA_CHUNK) * K + i) * V + j] = s[r];
            s[r] = alpha[at * K + i] * s[r] + k[at * K + i] * vj;
            sum += q[at * K + i] * s[r];
        }
        sum = sum_groups<GROUPS>(part, sum);
        if (threadIdx.y == 0 && j < V) o[at * V + j] = scale * sum;
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        size_t i = threadIdx.y + r * GROUPS;
        if (S && i < K && j < V) S[(b_h * K + i) * V + j] = s[r];
    }
}

// As recurrent_backward of metala.c. before (heads,64,K,V): the states of one chunk, made again from its first. dq, dk,
// da: this tile's part, `tile_step` numbers from tile to tile. first_head: the heads of this launch begin there.
template <int ROWS, int GROUPS>
__global__ void __launch_bounds__(WARP * GROUPS, 1)
recurrent_backward_kernel(float *dq, float *dk, float *da, size_t tile_step, float *dv, float *dS, float *before,
                          const float *dO, const float *states, const float *q, const float *k, const float *v,
                          const float *alpha, size_t first_head, size_t T, size_t H, size_t K, size_t V, float scale) {
    __shared__ float part[GROUPS * WARP];
    const size_t b_h = first_head + blockIdx.y, j = blockIdx.x * (size_t)RECURRENT_COLUMNS + threadIdx.x;
    const size_t row = first_row(b_h, T, H), to = blockIdx.x * tile_step;
    float *own = before + blockIdx.y * METALA_CHUNK * K * V;
    float s[ROWS], g[ROWS];                                          // S and Γ, then G
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        size_t i = threadIdx.y + r * GROUPS;
        g[r] = dS && i < K && j < V ? dS[(b_h * K + i) * V + j] : 0;
    }
    for (size_t c = chunks(T); c-- > 0;) {
        const size_t t0 = c * METALA_CHUNK, n = least(T - t0, METALA_CHUNK);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {                             // forwards through the chunk: each row for itself
            size_t i = threadIdx.y + r * GROUPS;
            if (i >= K || j >= V) break;
            s[r] = states[((b_h * chunks(T) + c) * K + i) * V + j];
#pragma unroll 1
            for (size_t t = 0; t < n; t++) {
                const size_t at = row + (t0 + t) * H;
                own[(t * K + i) * V + j] = s[r];
                s[r] = alpha[at * K + i] * s[r] + k[at * K + i] * v[at * V + j];
            }
        }
        for (size_t t = n; t-- > 0;) {
            const size_t at = row + (t0 + t) * H;
            const float vj = j < V ? v[at * V + j] : 0, doj = j < V ? dO[at * V + j] : 0;
            float sum = 0;                                           // dv
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                size_t i = threadIdx.y + r * GROUPS;
                if (i >= K) break;                                   // all lanes of a warp together
                float a = alpha[at * K + i], ki = k[at * K + i], was = j < V ? own[(t * K + i) * V + j] : 0;
                float after = a * was + ki * vj;
                g[r] += scale * q[at * K + i] * doj;
                sum += g[r] * ki;
                float of_q = warp_sum(after * doj), of_k = warp_sum(g[r] * vj), of_a = warp_sum(g[r] * was);
                if (threadIdx.x == 0) {
                    dq[to + at * K + i] = scale * of_q;
                    dk[to + at * K + i] = of_k;
                    da[to + at * K + i] = a * of_a;
                }
                g[r] *= a;
            }
            sum = sum_groups<GROUPS>(part, sum);
            if (threadIdx.y == 0 && j < V) dv[at * V + j] = sum;
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        size_t i = threadIdx.y + r * GROUPS;
        if (dS && i < K && j < V) dS[(b_h * K + i) * V + j] = g[r];
    }
}

// ---- Chunkwise: products of matrices inside blocks of 16 tokens, the recurrence from block to block, as in metala.c.
// S stays in shared memory. With t and j inside a block, S_0 the state before it, p_t = Π_{r<=t} α_r and n its last
// token:
//
//     o_t = s S_0ᵀ (q_t ⊙ p_t) + Σ_{j<=t} A_tj v_j,       A_tj = s q_t · (k_j ⊙ Π_{j<r<=t} α_r)
//     S_n = diag(p_n) S_0 + Σ_j (k_j ⊙ Π_{j<r<=n} α_r) v_jᵀ
//
// Tokens beyond the end have q = k = v = do = 0 and α = 1, which changes nothing.

enum { BLOCK = 16, BLOCKS = METALA_CHUNK / BLOCK, A_PITCH = BLOCK + 4 };

// Distance of rows of q, k, α in shared memory: whole float4, and neighbours in other banks.
__host__ __device__ constexpr size_t row_pitch(size_t K) { return round_up(K, 4) + 4; }

// to (tokens, pitch) = n tokens of one head of x, `step` apart, their first `width` columns; `rest` beyond either, up to
// `columns`, a multiple of 4 as the pitch is. Where rows are aligned and whole fours, they are copied by fours without the thread
// waiting for any, so that all that a chunk needs is on its way at once: wait_for_tokens waits. Else a warp has a row.
// step < 2³²: metala_config_check sees to it.
__device__ void load_tokens(float *to, size_t pitch, size_t columns, const float *x, size_t step, size_t n,
                            size_t width, float rest, size_t tokens = BLOCK) {
    if (width % 4 == 0 && step % 4 == 0 && (uintptr_t)x % 16 == 0) {
        const unsigned across = (unsigned)columns / 4, to_step = (unsigned)pitch, from_step = (unsigned)step;
#pragma unroll 1
        for (unsigned task = threadIdx.x; task < (unsigned)tokens * across; task += THREADS) {
            const unsigned t = task / across, i = task % across * 4;
            const bool real = t < (unsigned)n && i < (unsigned)width;
            if (real) copy16_async(&to[t * to_step + i], &x[(size_t)t * from_step + i], true);
            else *(float4 *)&to[t * to_step + i] = make_float4(rest, rest, rest, rest);
        }
        return;
    }
#pragma unroll 1
    for (size_t t = threadIdx.x / WARP; t < tokens; t += WARPS)
#pragma unroll 1
        for (size_t i = threadIdx.x % WARP; i < columns; i += WARP)
            to[t * pitch + i] = t < n && i < width ? x[t * step + i] : rest;
}
// A barrier, behind which all threads see what all of them have loaded.
__device__ void wait_for_tokens() {
    copy_commit();
    copy_wait<0>();                                                  // what this thread has started
    __syncthreads();
}

// Over groups of 2·HALF lanes: lane t gets the sum of all lanes' x[t]. Two lanes exchange halves of what they have left, at each
// step, so that 31 shuffles do for the sums of 32. x is overwritten.
template <int HALF>
__device__ __forceinline__ float sum_for_each_lane(float *x) {
    if constexpr (HALF == 0) return x[0];
    else {
        const bool upper = threadIdx.x & HALF;
#pragma unroll
        for (int t = 0; t < HALF; t++) {
            const float kept = upper ? x[t + HALF] : x[t], given = upper ? x[t] : x[t + HALF];
            x[t] = kept + __shfl_xor_sync(ALL_LANES, given, HALF);
        }
        return sum_for_each_lane<HALF / 2>(x);
    }
}

// A[t][j] = s q_t · (k_j ⊙ Π_{j<r<=t} α_r) for j <= t, 0 above. A warp has two keys, j = w and 15 - w: both use the
// same q and α, and together they have 17 numbers of A, so that all warps do the same work. A lane carries every 32nd pair of
// channels of both from t = j on, multiplying by α_t, and the lanes add up their products; what pads K is 0. A thread returns one
// number of A, whose place is A + map_place(pitch of A).
__device__ unsigned map_place(unsigned pitch) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    return lane % BLOCK * pitch + (lane < BLOCK ? warp : BLOCK - 1 - warp);
}
__device__ __forceinline__ float block_map(const float *q, const float *k, const float *alpha, size_t K, size_t pitch,
                                           size_t alpha_pitch, float scale) {
    static_assert(2 * WARPS == BLOCK && 2 * BLOCK == WARP, "two keys for each warp, a lane for each of their products");
    const unsigned first = threadIdx.x / WARP, second = BLOCK - 1 - first, lane = threadIdx.x % WARP;
    const unsigned step = (unsigned)pitch, alpha_step = (unsigned)alpha_pitch;
    float sum[2 * BLOCK] = {};
#pragma unroll 1
    for (unsigned i = 2 * lane; i < (unsigned)K; i += 2 * WARP) {
        float2 key = *(const float2 *)&k[first * step + i], other = *(const float2 *)&k[second * step + i];
        float2 decay = make_float2(1, 1);
#pragma unroll
        for (unsigned t = 0; t < BLOCK; t++) {
            if (t < first) continue;
            const float2 query = *(const float2 *)&q[t * step + i];
            if (t + 1 < BLOCK) decay = *(const float2 *)&alpha[(t + 1) * alpha_step + i];
            sum[t] += query.x * key.x + query.y * key.y, key.x *= decay.x, key.y *= decay.y;
            if (t < BLOCK / 2 || t < second) continue;
            sum[BLOCK + t] += query.x * other.x + query.y * other.y, other.x *= decay.x, other.y *= decay.y;
        }
    }
    return scale * sum_for_each_lane<BLOCK>(sum);
}

// In place: q_t <- s q_t ⊙ p_t and k_j <- k_j ⊙ Π_{j<r<=n} α_r; total = p_n. q or k may be NULL. A thread for each
// channel, of several blocks one behind the other; it reads all tokens before it writes any, which would hold up the reads.
__device__ __forceinline__ void block_decay(float *q, float *k, const float *alpha, float *total, size_t K, size_t pitch,
                                            size_t alpha_pitch, float scale, size_t blocks = 1) {
    for (unsigned task = threadIdx.x; task < (unsigned)(blocks * K); task += THREADS) {
        const unsigned token = task / (unsigned)K * BLOCK, i = task % (unsigned)K, step = (unsigned)pitch;
        const unsigned at = token * step + i;
        float a[BLOCK], x[BLOCK], p = 1, rest = 1;
#pragma unroll
        for (unsigned t = 0; t < BLOCK; t++) {
            a[t] = alpha[(token + t) * (unsigned)alpha_pitch + i];
            x[t] = q ? q[at + t * step] : 0;
        }
#pragma unroll
        for (unsigned t = 0; t < BLOCK; t++) {
            p *= a[t];
            if (q) q[at + t * step] = x[t] * (scale * p);
        }
        total[task] = p;
        if (!k) continue;
#pragma unroll
        for (unsigned t = 0; t < BLOCK; t++) x[t] = k[at + t * step];
#pragma unroll
        for (unsigned t = BLOCK; t-- > 0;) {
            k[at + t * step] = x[t] * rest;
            rest *= a[t];
        }
    }
}

// S = diag(total) S + aᵀ b:   S (K, COLUMNS), rows s_pitch apart   a (BLOCK, K)   b (BLOCK, COLUMNS), b_pitch apart.
// A thread has 4 × 4 numbers of S at a time. K is a multiple of 4: rows are padded with zeros.
template <int COLUMNS>
__device__ void block_update(float *S, size_t s_pitch, const float *total, const float *a, size_t pitch, const float *b,
                             size_t b_pitch, size_t K) {
    for (size_t task = threadIdx.x; task < K / 4 * (COLUMNS / 4); task += THREADS) {
        size_t i = task / (COLUMNS / 4) * 4, j = task % (COLUMNS / 4) * 4;
        float sum[4][4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float4 x = *(const float4 *)&S[(i + e) * s_pitch + j];
            float p = total[i + e];
            sum[e][0] = p * x.x, sum[e][1] = p * x.y, sum[e][2] = p * x.z, sum[e][3] = p * x.w;
        }
#pragma unroll
        for (int t = 0; t < BLOCK; t++) {
            float4 x = *(const float4 *)&a[t * pitch + i], y = *(const float4 *)&b[t * b_pitch + j];
            const float of_a[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                sum[e][0] += of_a[e] * y.x, sum[e][1] += of_a[e] * y.y;
                sum[e][2] += of_a[e] * y.z, sum[e][3] += of_a[e] * y.w;
            }
        }
#pragma unroll
        for (int e = 0; e < 4; e++)
            *(float4 *)&S[(i + e) * s_pitch + j] = make_float4(sum[e][0], sum[e][1], sum[e][2], sum[e][3]);
    }
}

// A tile of a state between global memory, (K,V) with the tile's first column at `global` (NULL: zeros), and shared memory, (Kp,
// pitch). Its rows are loaded like tokens.
template <int COLUMNS>
__device__ void load_state(float *S, size_t pitch, const float *global, size_t Kp, size_t K, size_t V, size_t columns) {
    load_tokens(S, pitch, COLUMNS, global, V, global ? K : 0, columns, 0, Kp);
}
template <int COLUMNS>
__device__ void store_state(float *global, const float *S, size_t pitch, size_t K, size_t V, size_t columns) {
    for (size_t n = threadIdx.x; n < K * COLUMNS; n += THREADS) {
        size_t i = n / COLUMNS, j = n % COLUMNS;
        if (j < columns) global[i * V + j] = S[i * pitch + j];
    }
}

// Floats of shared memory: S, q, k, α, v, A and the block's total decay.
template <int COLUMNS>
size_t chunkwise_forward_shared(size_t K) {
    return round_up(K, 4) * (COLUMNS + 1) + 3 * BLOCK * row_pitch(K) + BLOCK * COLUMNS + BLOCK * A_PITCH;
}

template <int COLUMNS>
__global__ void __launch_bounds__(THREADS, 1)
chunkwise_forward_kernel(float *o, float *S, float *states, const float *q, const float *k, const float *v,
                         const float *alpha, size_t T, size_t H, size_t K, size_t V, float scale) {
    DYNAMIC_SHARED(float, memory);
    const size_t Kp = round_up(K, 4), pitch = row_pitch(K), b_h = blockIdx.y, j0 = blockIdx.x * (size_t)COLUMNS;
    const size_t columns = least(V - j0, COLUMNS), row = first_row(b_h, T, H);
    float *state = memory, *q_block = state + Kp * COLUMNS, *k_block = q_block + BLOCK * pitch;
    float *alpha_block = k_block + BLOCK * pitch, *v_block = alpha_block + BLOCK * pitch;
    float *total = v_block + BLOCK * COLUMNS, *A = total + Kp;

    load_state<COLUMNS>(state, COLUMNS, S ? S + b_h * K * V + j0 : NULL, Kp, K, V, columns);
    for (size_t t0 = 0; t0 < T; t0 += BLOCK) {
        const size_t n = least(T - t0, BLOCK), at = row + t0 * H;
        load_tokens(q_block, pitch, Kp, q + at * K, H * K, n, K, 0);
        load_tokens(k_block, pitch, Kp, k + at * K, H * K, n, K, 0);
        load_tokens(alpha_block, pitch, Kp, alpha + at * K, H * K, n, K, 1);
        load_tokens(v_block, COLUMNS, COLUMNS, v + at * V + j0, H * V, n, columns, 0);
        wait_for_tokens();
        if (states && t0 % METALA_CHUNK == 0)
            store_state<COLUMNS>(states + (b_h * chunks(T) + t0 / METALA_CHUNK) * K * V + j0, state, COLUMNS, K, V,
                                 columns);
        A[map_place(A_PITCH)] = block_map(q_block, k_block, alpha_block, K, pitch, pitch, scale);
        __syncthreads();
        block_decay(q_block, k_block, alpha_block, total, Kp, pitch, pitch, scale);
        __syncthreads();
        for (unsigned task = threadIdx.x; task < BLOCK * (COLUMNS / 4); task += THREADS) {     // o = qp S_0 + A v
            const unsigned t = task / (COLUMNS / 4), j = task % (COLUMNS / 4) * 4;
            float sum[4] = {};
            for (size_t i = 0; i < Kp; i++) {
                float x = q_block[t * pitch + i];
                float4 y = *(const float4 *)&state[i * COLUMNS + j];
                sum[0] += x * y.x, sum[1] += x * y.y, sum[2] += x * y.z, sum[3] += x * y.w;
            }
            for (unsigned l = 0; l <= t; l++) {
                float x = A[t * A_PITCH + l];
                float4 y = *(const float4 *)&v_block[l * COLUMNS + j];
                sum[0] += x * y.x, sum[1] += x * y.y, sum[2] += x * y.z, sum[3] += x * y.w;
            }
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (t < n && j + e < columns) o[(at + t * H) * V + j0 + j + e] = sum[e];
        }
        __syncthreads();                                             // the old state is read
        block_update<COLUMNS>(state, COLUMNS, total, k_block, pitch, v_block, COLUMNS, Kp);
        __syncthreads();                                             // the block's tokens are done with
    }
    if (S) store_state<COLUMNS>(S + b_h * K * V + j0, state, COLUMNS, K, V, columns);
}

// ---- Chunkwise, backward.
//
// Block by block from the last, see chunkwise_backward of metala.c. Γ is the gradient of the state after the block,
// D_tj = s do_t·v_j for j <= t, and over the columns of this tile:
//
//     dq_t = s p_t ⊙ (S_0 do_t) + Σ_{j<=t} D_tj (k_j ⊙ Π_{j<r<=t} α_r)
//     dk_j = Σ_{t>=j} D_tj (q_t ⊙ Π_{j<r<=t} α_r) + Π_{j<r<=n} α_r ⊙ (Γ v_j)
//     dv_j = Σ_{t>=j} A_tj do_t + Γᵀ (k_j ⊙ Π_{j<r<=n} α_r)
//     da_t = Σ_{r>=t} (q_r ⊙ dq_r - k_r ⊙ dk_r) + rowsum(Γ ⊙ S_n)
//     Γ   <- diag(p_n) Γ + s Σ_t (q_t ⊙ p_t) do_tᵀ
//
// The states between the blocks of a chunk are made again, and wait in global memory, `between` (heads,3,K,V).

// D[t][j] = s do_t·v_j for j <= t, 0 above: a thread for each.
__device__ void block_products(float *D, const float *dO, const float *v, size_t pitch, int columns, float scale) {
    const int t = threadIdx.x / BLOCK, j = threadIdx.x % BLOCK;
    float sum = 0;
    for (int l = 0; l < columns; l++) sum += dO[t * pitch + l] * v[j * pitch + l];
    D[t * A_PITCH + j] = j <= t ? scale * sum : 0;
}

// y[t][i] = Σ_l x[t][l] S[i][l]:   x (BLOCK, columns)   S (K, columns). One row of S and 4 tokens for each thread.
template <int COLUMNS>
__device__ void block_project(float *y, size_t pitch, const float *x, const float *S, size_t s_pitch, size_t K) {
    for (size_t task = threadIdx.x; task < K * (BLOCK / 4); task += THREADS) {
        size_t i = task % K, t = task / K * 4;
        float sum[4] = {};
        for (int l = 0; l < COLUMNS; l += 4) {
            float4 a = *(const float4 *)&S[i * s_pitch + l];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float4 b = *(const float4 *)&x[(t + e) * s_pitch + l];
                sum[e] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
            }
        }
        for (int e = 0; e < 4; e++) y[(t + e) * pitch + i] = sum[e];
    }
}

// dv_j = Σ_t A_tj do_t + Σ_i keys_ji Γ_i, to global memory, `step` from token to token, for n tokens and `columns`
// columns: 4 columns of a token for each thread.
template <int COLUMNS>
__device__ void block_values(float *dv, size_t step, size_t n, size_t columns, const float *A, const float *dO,
                             const float *keys, size_t pitch, const float *gamma, size_t g_pitch, size_t K) {
    for (unsigned task = threadIdx.x; task < BLOCK * (COLUMNS / 4); task += THREADS) {
        const unsigned j = task / (COLUMNS / 4), l = task % (COLUMNS / 4) * 4;
        float sum[4] = {};
        for (unsigned t = j; t < BLOCK; t++) {
            float x = A[t * A_PITCH + j];
            float4 y = *(const float4 *)&dO[t * g_pitch + l];
            sum[0] += x * y.x, sum[1] += x * y.y, sum[2] += x * y.z, sum[3] += x * y.w;
        }
        for (size_t i = 0; i < K; i++) {
            float x = keys[j * pitch + i];
            float4 y = *(const float4 *)&gamma[i * g_pitch + l];
            sum[0] += x * y.x, sum[1] += x * y.y, sum[2] += x * y.z, sum[3] += x * y.w;
        }
#pragma unroll
        for (unsigned e = 0; e < 4; e++)
            if (j < n && l + e < columns) dv[j * step + l + e] = sum[e];
    }
}

// One channel of dq_t = s p_t y_t + Σ_{j<=t} D_tj (k_j ⊙ Π_{j<r<=t} α_r), in the place of y: keys decay forwards.
__device__ void channel_dq(float *y, const float *k, const float *alpha, size_t pitch, size_t alpha_pitch, const float *D,
                           size_t d_pitch, float scale) {
    float key[BLOCK], p = 1;
#pragma unroll
    for (int t = 0; t < BLOCK; t++) {
        float a = alpha[t * alpha_pitch], sum;
        p *= a;
        sum = scale * p * y[t * pitch];
        key[t] = k[t * pitch];
#pragma unroll
        for (int j = 0; j < BLOCK; j++) {
            if (j < t) key[j] *= a;
            if (j <= t) sum += D[t * d_pitch + j] * key[j];
        }
        y[t * pitch] = sum;
    }
}

// One channel of dk_j = Π_{j<r<=n} α_r y_j + Σ_{t>=j} D_tj (q_t ⊙ Π_{j<r<=t} α_r), in the place of y: queries decay
// backwards.
__device__ void channel_dk(float *y, const float *q, const float *alpha, size_t pitch, size_t alpha_pitch, const float *D,
                           size_t d_pitch) {
    float query[BLOCK], rest = 1;
#pragma unroll
    for (int j = BLOCK - 1; j >= 0; j--) {
        float a = alpha[j * alpha_pitch], sum = rest * y[j * pitch];
        query[j] = q[j * pitch];
#pragma unroll
        for (int t = BLOCK - 1; t >= 0; t--)
            if (t >= j) sum += D[t * d_pitch + j] * query[t];
        y[j * pitch] = sum;
#pragma unroll
        for (int t = 0; t < BLOCK; t++)
            if (t >= j) query[t] *= a;
        rest *= a;
    }
}

// Floats of shared memory: S and Γ, five tensors (BLOCK, K), do and v, A and D, two vectors (K).
size_t chunkwise_backward_shared(size_t K, size_t columns) {
    K = round_up(K, 4);
    return 2 * K * (columns + 4 + 1) + 5 * BLOCK * row_pitch(K) + 2 * BLOCK * (columns + 4) +
           2 * BLOCK * A_PITCH;
}

template <int COLUMNS>
__global__ void __launch_bounds__(THREADS, 1)
chunkwise_backward_kernel(float *dq, float *dk, float *da, size_t tile_step, float *dv, float *dS, float *between,
                          const float *dO, const float *states, const float *q, const float *k, const float *v,
                          const float *alpha, size_t first_head, size_t T, size_t H, size_t K, size_t V, float scale) {
    enum { PITCH = COLUMNS + 4 };
    DYNAMIC_SHARED(float, memory);
    const size_t Kp = round_up(K, 4), pitch = row_pitch(K), b_h = first_head + blockIdx.y;
    const size_t j0 = blockIdx.x * (size_t)COLUMNS, columns = least(V - j0, COLUMNS);
    const size_t row = first_row(b_h, T, H), tile = blockIdx.x * tile_step;
    float *state = memory, *gamma = state + Kp * PITCH, *q_block = gamma + Kp * PITCH;
    float *k_block = q_block + BLOCK * pitch, *alpha_block = k_block + BLOCK * pitch;
    float *dq_block = alpha_block + BLOCK * pitch, *dk_block = dq_block + BLOCK * pitch;
    float *dO_block = dk_block + BLOCK * pitch, *v_block = dO_block + BLOCK * PITCH;
    float *total = v_block + BLOCK * PITCH, *along = total + Kp, *A = along + Kp, *D = A + BLOCK * A_PITCH;
    float *own = between + blockIdx.y * (BLOCKS - 1) * K * V + j0;

    load_state<COLUMNS>(gamma, PITCH, dS ? dS + b_h * K * V + j0 : NULL, Kp, K, V, columns);
    for (size_t c = chunks(T); c-- > 0;) {
        const size_t c0 = c * METALA_CHUNK, end = least(T, c0 + METALA_CHUNK);
        const size_t blocks = ceil_div(end - c0, BLOCK);
        const float *start = states + (b_h * chunks(T) + c) * K * V + j0;
        load_state<COLUMNS>(state, PITCH, start, Kp, K, V, columns);
        for (size_t b = 0; b < blocks; b++) {                        // forwards: the states between the blocks
            const size_t t0 = c0 + b * BLOCK, n = least(end - t0, BLOCK), at = row + t0 * H;
            load_tokens(k_block, pitch, Kp, k + at * K, H * K, n, K, 0);
            load_tokens(alpha_block, pitch, Kp, alpha + at * K, H * K, n, K, 1);
            load_tokens(v_block, PITCH, COLUMNS, v + at * V + j0, H * V, n, columns, 0);
            wait_for_tokens();
            if (b > 0) store_state<COLUMNS>(own + (b - 1) * K * V, state, PITCH, K, V, columns);
            block_decay(NULL, k_block, alpha_block, total, Kp, pitch, pitch, scale);
            __syncthreads();
            block_update<COLUMNS>(state, PITCH, total, k_block, pitch, v_block, PITCH, Kp);
            __syncthreads();
        }
        for (size_t b = blocks; b-- > 0;) {                          // backwards; `state` is now that after block b
            const size_t t0 = c0 + b * BLOCK, n = least(end - t0, BLOCK), at = row + t0 * H;
            for (size_t i = threadIdx.x; i < Kp; i += THREADS) {     // rowsum(Γ ⊙ S_n)
                float sum = 0;
                for (int l = 0; l < COLUMNS; l += 4) {
                    float4 x = *(const float4 *)&gamma[i * PITCH + l], y = *(const float4 *)&state[i * PITCH + l];
                    sum += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
                }
                along[i] = sum;
            }
            __syncthreads();
            load_state<COLUMNS>(state, PITCH, b ? own + (b - 1) * K * V : start, Kp, K, V, columns);
            load_tokens(q_block, pitch, Kp, q + at * K, H * K, n, K, 0);
            load_tokens(k_block, pitch, Kp, k + at * K, H * K, n, K, 0);
            load_tokens(alpha_block, pitch, Kp, alpha + at * K, H * K, n, K, 1);
            load_tokens(v_block, PITCH, COLUMNS, v + at * V + j0, H * V, n, columns, 0);
            load_tokens(dO_block, PITCH, COLUMNS, dO + at * V + j0, H * V, n, columns, 0);
            wait_for_tokens();
            A[map_place(A_PITCH)] = block_map(q_block, k_block, alpha_block, K, pitch, pitch, scale);
            block_products(D, dO_block, v_block, PITCH, COLUMNS, scale);
            block_project<COLUMNS>(dq_block, pitch, dO_block, state, PITCH, Kp);
            block_project<COLUMNS>(dk_block, pitch, v_block, gamma, PITCH, Kp);
            __syncthreads();
            for (size_t task = threadIdx.x; task < 2 * Kp; task += THREADS) {
                const size_t i = task % Kp;
                if (task < Kp) channel_dq(dq_block + i, k_block + i, alpha_block + i, pitch, pitch, D, A_PITCH, scale);
                else channel_dk(dk_block + i, q_block + i, alpha_block + i, pitch, pitch, D, A_PITCH);
            }
            __syncthreads();
            for (size_t i = threadIdx.x; i < K; i += THREADS) {
                float sum = along[i];
                for (int t = BLOCK - 1; t >= 0; t--) {
                    size_t here = t * pitch + i, there = tile + (at + t * H) * K + i;
                    sum += q_block[here] * dq_block[here] - k_block[here] * dk_block[here];
                    if ((size_t)t >= n) continue;
                    dq[there] = dq_block[here];
                    dk[there] = dk_block[here];
                    da[there] = sum;
                }
            }
            __syncthreads();
            block_decay(q_block, k_block, alpha_block, total, Kp, pitch, pitch, scale);
            __syncthreads();
            block_values<COLUMNS>(dv + at * V + j0, H * V, n, columns, A, dO_block, k_block, pitch, gamma, PITCH, Kp);
            __syncthreads();
            block_update<COLUMNS>(gamma, PITCH, total, q_block, pitch, dO_block, PITCH, Kp);
            __syncthreads();
        }
    }
    if (dS) store_state<COLUMNS>(dS + b_h * K * V + j0, gamma, PITCH, K, V, columns);
}

// ---- Small products on tensor cores, of operands in shared memory or in registers, which are rounded when they are
// loaded. With g = lane/4, t = lane%4, a 16×8 piece of a result has in x[e] row g + 8(e/2), column 2t + e%2. Of the 16 values
// of k of a product, a lane has four, which may be called 2t, 2t+1, 2t+8, 2t+9, as the columns of a result, or t, t+4, t+8,
// t+12, if both operands call them the same. Two of them, of row j of a left operand or column j of a right one, are

// x[j][k], x[j][k+1] for k = 2t      x[j][k], x[j][k+4] for k = t      x[k][j], x[k+4][j] for k = t
__device__ float2 along(const float *x, size_t pitch, unsigned k, unsigned j) {
    return *(const float2 *)&x[j * pitch + k];                       // pitch and k are even
}
__device__ float2 beside(const float *x, size_t pitch, unsigned k, unsigned j) {
    return make_float2(x[j * pitch + k], x[j * pitch + k + 4]);
}
__device__ float2 down(const float *x, size_t pitch, unsigned k, unsigned j) {
    return make_float2(x[k * pitch + j], x[(k + 4) * pitch + j]);
}
// for which the lanes of a warp read different banks where the pitch is 8 (along, down) or 4 (beside) modulo 32. What is
// read in several ways has 8, and costs beside twice.

typedef float2 two_of_k(const float *x, size_t pitch, unsigned k, unsigned j);

// 16 values of k of rows `row` and row + 8 of a left operand: all that a lane has of 16 × 16 when row = … + g.
template <two_of_k TWO>
__device__ __forceinline__ void load_left(float (*a)[4], const float *x, size_t pitch, unsigned k, unsigned row) {
#pragma unroll
    for (int part = 0; part < 2; part++) {
        const float2 upper = TWO(x, pitch, k + 8 * part, row), lower = TWO(x, pitch, k + 8 * part, row + 8);
        a[part][0] = upper.x, a[part][1] = upper.y, a[part][2] = lower.x, a[part][3] = lower.y;
    }
}
// The same of a column of a right operand.
template <two_of_k TWO>
__device__ __forceinline__ float4 load_right(const float *x, size_t pitch, unsigned k, unsigned column) {
    const float2 first = TWO(x, pitch, k, column), last = TWO(x, pitch, k + 8, column);
    return make_float4(first.x, first.y, last.x, last.y);
}
__device__ float4 times(float4 x, float4 y) { return make_float4(x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w); }
__device__ float4 times(float4 x, float y) { return make_float4(x.x * y, x.y * y, x.z * y, x.w * y); }

// Operands as mma takes them, rounded: in one part for bfloat16, in two for tf32, each with half of the values of k.
template <metala_math MATH> struct left_operand { unsigned part[MATH == METALA_BFLOAT16 ? 1 : 2][4]; };
template <metala_math MATH> struct right_operand { unsigned part[MATH == METALA_BFLOAT16 ? 1 : 2][2]; };
template <metala_math MATH>
__device__ __forceinline__ left_operand<MATH> round_left(const float (*a)[4]) {
    if constexpr (MATH == METALA_BFLOAT16)
        return {{{pack(a[0][0], a[0][1]), pack(a[0][2], a[0][3]), pack(a[1][0], a[1][1]), pack(a[1][2], a[1][3])}}};
    else
        return {{{to_tf32(a[0][0]), to_tf32(a[0][2]), to_tf32(a[0][1]), to_tf32(a[0][3])},
                 {to_tf32(a[1][0]), to_tf32(a[1][2]), to_tf32(a[1][1]), to_tf32(a[1][3])}}};
}
template <metala_math MATH>
__device__ __forceinline__ right_operand<MATH> round_right(float4 b) {
    if constexpr (MATH == METALA_BFLOAT16) return {{{pack(b.x, b.y), pack(b.z, b.w)}}};
    else return {{{to_tf32(b.x), to_tf32(b.y)}, {to_tf32(b.z), to_tf32(b.w)}}};
}

// D += A B:  16×8 += 16×16 times 16×8
template <metala_math MATH>
__device__ __forceinline__ void multiply_pieces(float *d, const left_operand<MATH> &a, const right_operand<MATH> &b) {
    if constexpr (MATH == METALA_BFLOAT16) mma_bf16(d, a.part[0], b.part[0]);
    else mma_tf32(d, a.part[0], b.part[0]), mma_tf32(d, a.part[1], b.part[1]);
}
template <metala_math MATH>
__device__ __forceinline__ void multiply_pieces(float *d, const left_operand<MATH> &a, float4 b) {
    multiply_pieces<MATH>(d, a, round_right<MATH>(b));
}

// Two right operands at once: the columns 2g and 2g + 1 of x from `column` on, so that of two results side by side a lane has
// the columns 4t to 4t+3, which it can store together. x[p] is that of column 2g + p.
__device__ __forceinline__ void load_right_pair(float4 *x, const float *from, size_t pitch, unsigned k, unsigned column) {
    float2 two[4];
#pragma unroll
    for (unsigned e = 0; e < 4; e++) two[e] = *(const float2 *)&from[(k + 4 * e) * pitch + column];
    x[0] = make_float4(two[0].x, two[1].x, two[2].x, two[3].x);
    x[1] = make_float4(two[0].y, two[1].y, two[2].y, two[3].y);
}
// Row g + 8h of two such results, to columns j to j+3 of `columns` of a row; in one store if rows are aligned for it.
__device__ __forceinline__ void store_pair(float *row, float (*d)[4], unsigned h, unsigned j, unsigned columns, bool aligned) {
    if (j >= columns) return;
    if (aligned) *(float4 *)&row[j] = make_float4(d[0][2 * h], d[1][2 * h], d[0][2 * h + 1], d[1][2 * h + 1]);
    else
#pragma unroll
        for (unsigned e = 0; e < 4; e++)
            if (j + e < columns) row[j + e] = d[e % 2][2 * h + e / 2];
}

// ---- Chunkwise on tensor cores (MATH tf32 or bfloat16, K up to 128). Most of the work does not need the state: one kernel does
// it for all chunks at the same time, and leaves rounded operands; another goes with them from chunk to chunk. In a chunk, token
// t lies in block I and token j in block J; p_t = Π α from I's first token to t, with it, r_j = Π α from behind j to J's last
// token, and P(a,b) = Π α over the blocks a…b-1. With S before the chunk and S_n behind it,
//
//     o_t = q̃_t S + Σ_{j<=t} A_tj v_j          q̃_t = s q_t ⊙ p_t ⊙ P(0,I)
//     S_n = diag(P(0,4)) S + Σ_j k̃_j v_jᵀ       k̃_j = k_j ⊙ r_j ⊙ P(J+1,4)
//     A_tj = s (q_t ⊙ p_t) · (k_j ⊙ r_j ⊙ P(J+1,I)) for J < I,
//
// and as above for J = I. S and A are float, and rounded once for each product.

// P(from,to) of channel i.
template <int MOST>
__device__ float decay_over(const float *total, unsigned from, unsigned to, unsigned i) {
    float p = 1;
    for (unsigned b = from; b < to; b++) p *= total[b * MOST + i];
    return p;
}
// Of the channels that `along` has of a right operand from i = 2t on.
template <int MOST>
__device__ float4 decays_over(const float *total, unsigned from, unsigned to, unsigned i) {
    float4 p = make_float4(1, 1, 1, 1);
#pragma unroll 1
    for (unsigned b = from; b < to; b++) p = times(p, load_right<along>(total, MOST, i, b));
    return p;
}

// A (64,64), but for blocks above the diagonal, of a chunk of q, k and α (64, MOST); q_t ⊙ p_t and k_j ⊙ r_j in their place, and
// total = P(J,J+1). A barrier before A is read is the caller's. Rows of α, which only threads side by side read, lie without gaps.
// A may take the place of α, so what is made while α is needed waits in registers.
enum { CHUNK_PITCH = METALA_CHUNK + 8 };
template <metala_math MATH, int MOST>
__device__ __forceinline__ void chunk_map(float *A, float *q, float *k, const float *alpha, float *total, size_t K, float scale) {
    enum { PITCH = MOST + 8 };
    const unsigned g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    float diagonal[BLOCKS];                                          // one number of each block there
#pragma unroll 1
    for (unsigned b = 0; b < BLOCKS; b++) {                          // the first moves up to its place
#pragma unroll
        for (unsigned e = 0; e + 1 < BLOCKS; e++) diagonal[e] = diagonal[e + 1];
        const unsigned from = b * BLOCK * PITCH;
        diagonal[BLOCKS - 1] = block_map(q + from, k + from, alpha + b * BLOCK * MOST, K, PITCH, MOST, scale);
    }
    __syncthreads();                                                 // q and k are read as they were
    block_decay(q, k, alpha, total, MOST, PITCH, MOST, 1, BLOCKS);
    __syncthreads();                                                 // decays are there, and α is done with
#pragma unroll
    for (unsigned b = 0; b < BLOCKS; b++) A[b * BLOCK * (CHUNK_PITCH + 1) + map_place(CHUNK_PITCH)] = diagonal[b];
    for (unsigned task = threadIdx.x / WARP; task < 12; task += WARPS) {         // those below, 16 × 8 at a time
        const unsigned pair = task / 2, I = pair < 1 ? 1 : pair < 3 ? 2 : 3, J = pair - I * (I - 1) / 2;
        const unsigned row = I * BLOCK + g, column = J * BLOCK + task % 2 * 8;
        float sum[4] = {}, a[2][4];
        for (unsigned i = 2 * t; i < MOST; i += 16) {
            load_left<along>(a, q, PITCH, i, row);
            multiply_pieces<MATH>(sum, round_left<MATH>(a), times(load_right<along>(k, PITCH, i, column + g),
                                                decays_over<MOST>(total, J + 1, I, i)));
        }
        for (unsigned e = 0; e < 4; e++) A[(row + e / 2 * 8) * CHUNK_PITCH + column + 2 * t + e % 2] = scale * sum[e];
    }
}

// What the state is not needed for, of a chunk of one head: numbers rounded, a row in parts of 16 bytes, which place_of_part
// exchanges so that load_operand finds them in different banks. A mma in tf32 calls the numbers 2t and 2t+1 of a row, which a
// lane has of a result, t and t+4: of each eight the even ones come first.
template <metala_math MATH>
__host__ __device__ constexpr unsigned parts_of(unsigned numbers) { return numbers / (MATH == METALA_BFLOAT16 ? 8 : 4); }
template <metala_math MATH, int MOST>
struct chunk_operands {
    uint4 q[METALA_CHUNK * parts_of<MATH>(MOST)];                    // q̃ (64, MOST)
    uint4 k[MOST * parts_of<MATH>(METALA_CHUNK)];                    // k̃ᵀ (MOST, 64)
    uint4 A[METALA_CHUNK * parts_of<MATH>(METALA_CHUNK)];            // (64, 64)
    float decay[MOST];                                               // P(0,4)
};
// Numbers 8 eight … of row `row`; a row has NUMBERS.
template <metala_math MATH, unsigned NUMBERS>
__device__ __forceinline__ void store_eight(uint4 *to, unsigned row, unsigned eight, const float *x) {
    enum { PARTS = parts_of<MATH>(NUMBERS), STEP = PARTS * 8 / NUMBERS };        // 1 part of bfloat16, 2 of tf32
#pragma unroll
    for (unsigned part = 0; part < STEP; part++)
        to[place_of_part<PARTS>(row, eight * STEP + part)] = rounded<MATH>(x + part, STEP);
}
// 16 rows of such an operand and the 16 numbers from 16 k on. As right operands, half 0 or 1: the rows are columns.
template <metala_math MATH, unsigned NUMBERS>
__device__ __forceinline__ left_operand<MATH> load_rows(const uint4 *x, unsigned row, unsigned k) {
    enum { PARTS = parts_of<MATH>(NUMBERS), STEP = PARTS * 8 / NUMBERS };
    left_operand<MATH> rows;
#pragma unroll
    for (unsigned part = 0; part < STEP; part++) load_operand<PARTS>(rows.part[part], x, row, k * STEP + part);
    return rows;
}
template <metala_math MATH>
__device__ __forceinline__ right_operand<MATH> half_of(const left_operand<MATH> &rows, unsigned half) {
    right_operand<MATH> columns;
#pragma unroll
    for (unsigned part = 0; part < sizeof(rows.part) / sizeof(rows.part[0]); part++)
        columns.part[part][0] = rows.part[part][half], columns.part[part][1] = rows.part[part][half + 2];
    return columns;
}

// The operands of a chunk of one head: the grid is (chunks, B·H). With K = 128, too, two blocks share an H100's multiprocessor:
// 106 KB of shared memory each.
template <int MOST>
constexpr size_t chunk_operands_shared() {                           // in floats: q, k; α, then A; decays
    return 2 * METALA_CHUNK * (MOST + 8) + METALA_CHUNK * greatest(MOST, CHUNK_PITCH) + 3 * BLOCKS * MOST;
}
template <metala_math MATH, int MOST>
__global__ void __launch_bounds__(THREADS, MOST <= 64 ? 3 : 2)
chunk_operands_kernel(chunk_operands<MATH, MOST> *chunk, const float *q, const float *k, const float *alpha, size_t c0, size_t T,
                      size_t H, size_t K, float scale) {
    enum { PITCH = MOST + 8 };
    DYNAMIC_SHARED(float, memory);
    const size_t b_h = blockIdx.y, t0 = (c0 + blockIdx.x) * METALA_CHUNK, n = least(T - t0, METALA_CHUNK);
    const size_t at = first_row(b_h, T, H) + t0 * H;
    float *q_chunk = memory, *k_chunk = q_chunk + METALA_CHUNK * PITCH, *alpha_chunk = k_chunk + METALA_CHUNK * PITCH;
    float *A = alpha_chunk, *total = alpha_chunk + METALA_CHUNK * greatest(MOST, CHUNK_PITCH);           // P(J,J+1)
    float *decay_before = total + BLOCKS * MOST, *decay_after = decay_before + BLOCKS * MOST;            // s P(0,J), P(J+1,4)
    float x[BLOCK];
    chunk += b_h * gridDim.x + blockIdx.x;

    load_tokens(q_chunk, PITCH, MOST, q + at * K, H * K, n, K, 0, METALA_CHUNK);
    load_tokens(k_chunk, PITCH, MOST, k + at * K, H * K, n, K, 0, METALA_CHUNK);
    load_tokens(alpha_chunk, MOST, MOST, alpha + at * K, H * K, n, K, 1, METALA_CHUNK);
    wait_for_tokens();
    chunk_map<MATH, MOST>(A, q_chunk, k_chunk, alpha_chunk, total, K, scale);
    for (unsigned task = threadIdx.x; task < BLOCKS * MOST; task += THREADS) {
        const unsigned J = task / MOST, i = task % MOST;
        decay_before[task] = scale * decay_over<MOST>(total, 0, J, i);
        decay_after[task] = decay_over<MOST>(total, J + 1, BLOCKS, i);
        if (J == 0) chunk->decay[i] = total[i] * decay_over<MOST>(total, 1, BLOCKS, i);
    }
    __syncthreads();                                                 // A and the decays are there
    for (unsigned task = threadIdx.x; task < METALA_CHUNK * MOST / 8; task += THREADS) {
        const unsigned token = task / (MOST / 8), eight = task % (MOST / 8);
#pragma unroll
        for (unsigned e = 0; e < 8; e++)
            x[e] = q_chunk[token * PITCH + 8 * eight + e] * decay_before[token / BLOCK * MOST + 8 * eight + e];
        store_eight<MATH, MOST>(chunk->q, token, eight, x);
    }
    for (unsigned task = threadIdx.x; task < BLOCKS * MOST; task += THREADS) {       // a channel of a block
        const unsigned J = task / MOST, i = task % MOST;
#pragma unroll
        for (unsigned e = 0; e < BLOCK; e++) x[e] = k_chunk[(J * BLOCK + e) * PITCH + i] * decay_after[task];
        store_eight<MATH, METALA_CHUNK>(chunk->k, i, 2 * J, x);
        store_eight<MATH, METALA_CHUNK>(chunk->k, i, 2 * J + 1, x + 8);
    }
    for (unsigned task = threadIdx.x; task < METALA_CHUNK * METALA_CHUNK / 8; task += THREADS) {
        const unsigned token = task / (METALA_CHUNK / 8), eight = task % (METALA_CHUNK / 8);
        const bool below = eight / 2 <= token / BLOCK;               // or on the diagonal
#pragma unroll
        for (unsigned e = 0; e < 8; e++) x[e] = below ? A[token * CHUNK_PITCH + 8 * eight + e] : 0;
        store_eight<MATH, METALA_CHUNK>(chunk->A, token, eight, x);
    }
}

// All rows of x, `step` apart, in groups of 16, and 16 columns, from global memory: of each group the rows 2t, 2t+1, 2t+8, 2t+9
// of the columns 2g and 2g+1. PAIRS: x is aligned for loads of two numbers.
template <bool PAIRS>
__device__ __forceinline__ void load_columns(float2 (*to)[4], const float *x, unsigned step, unsigned rows, unsigned columns) {
    const unsigned j = threadIdx.x % WARP / 4 * 2, t = threadIdx.x % 4;
    if (j >= columns) rows = 0;
    x += (size_t)step * (2 * t) + j;
#pragma unroll
    for (unsigned e = 0; e < 4 * BLOCKS; e++) {
        const unsigned i = e / 2 * 8 + e % 2;
        float2 two = make_float2(0, 0);
        if (PAIRS && 2 * t + i < rows) two = *(const float2 *)x;
        if (!PAIRS && 2 * t + i < rows) two = make_float2(x[0], j + 1 < columns ? x[1] : 0);
        to[e / 4][e % 4] = two;
        x += e % 2 ? 7 * (size_t)step : step;
    }
}

// o, and the state from chunk to chunk: S (heads, K, V): in, that before chunk c0, out, that behind the last; NULL for zeros and
// no interest; states (heads, all chunks, K, V), or NULL, = S before each. A warp has 16 columns of V, and their state never
// leaves its registers: transposed, as the product vᵀ k̃ has it, it is the right operand of q̃ S; and vᵀ as a left operand is v as
// a right one. The warps of a block share the operands of chunks, AHEAD of which are on their way; v is one chunk ahead, in
// registers, but for the largest heads in tf32, which leave none. The grid is (tiles of V, B·H).
enum { FORWARD_THREADS = 4 * WARP, FORWARD_COLUMNS = 16 };           // at most; of a warp
template <metala_math MATH, int MOST>
__host__ __device__ constexpr unsigned forward_stages() {            // as many as fit into 99 KB, but 2 to 4
    return (unsigned)greatest(2, least(4, 99 * 1024 / sizeof(chunk_operands<MATH, MOST>)));
}
template <metala_math MATH, int MOST>
__global__ void __launch_bounds__(FORWARD_THREADS, 2)
tensor_forward_kernel(float *o, float *S, float *states, const chunk_operands<MATH, MOST> *chunk, const float *v, size_t c0,
                      size_t c1, size_t T, size_t H, size_t K, size_t V) {
    enum { STAGES = forward_stages<MATH, MOST>(), AHEAD = STAGES - 1, PARTS = sizeof *chunk / sizeof(uint4) };
    const bool v_ahead = MATH == METALA_BFLOAT16 || MOST <= 64;
    DYNAMIC_SHARED(uint4, memory);
    const size_t b_h = blockIdx.y;
    const unsigned g = threadIdx.x % WARP / 4, t = threadIdx.x % 4, step = (unsigned)(H * V);
    const unsigned j0 = (blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP) * FORWARD_COLUMNS;
    const unsigned columns = j0 < V ? (unsigned)least(V - j0, FORWARD_COLUMNS) : 0;
    const unsigned count = (unsigned)(c1 - c0), left = (unsigned)(T - c0 * METALA_CHUNK);       // chunks; tokens from c0 on
    const size_t first = (first_row(b_h, T, H) + c0 * METALA_CHUNK * H) * V + j0;
    const bool twos = V % 2 == 0 && (uintptr_t)v % 8 == 0 && (uintptr_t)S % 8 == 0 && (uintptr_t)states % 8 == 0;
    const bool fours = V % 4 == 0 && (uintptr_t)o % 16 == 0;
    float s[MOST / 8][4] = {};                                       // [n][e]: channel 8n + 2t + e%2, column 2g + e/2
    float2 next[BLOCKS][4];
    chunk += b_h * count;
    if (states) states += (b_h * chunks(T) + c0) * K * V;

    auto start = [&](unsigned c) {                                   // an empty group beyond the end keeps the count
        const uint4 *from = (const uint4 *)(chunk + c);
        uint4 *to = memory + c % STAGES * PARTS;
        if (c < count)
#pragma unroll 4
            for (unsigned n = threadIdx.x; n < PARTS; n += blockDim.x) copy16_async(to + n, from + n, true);
        copy_commit();
    };
    auto load = [&](unsigned c) {                                    // v
        const unsigned t0 = c * METALA_CHUNK, n = c < count ? (unsigned)least(left - t0, METALA_CHUNK) : 0;
        const float *from = v + first + (size_t)step * t0;
        if (twos) load_columns<true>(next, from, step, n, columns);
        else load_columns<false>(next, from, step, n, columns);
    };
    auto store = [&](float *to) {                                    // S, (K,V)
        to += 2 * t * V + (j0 + 2 * g);
        const unsigned channels = 2 * g < columns ? (unsigned)K : 0;
        if (twos) {
#pragma unroll
            for (unsigned e = 0; e < MOST / 4; e++, to += e % 2 ? V : 7 * V)
                if (e / 2 * 8 + e % 2 + 2 * t < channels) *(float2 *)to = make_float2(s[e / 2][e % 2], s[e / 2][e % 2 + 2]);
        } else
#pragma unroll
            for (unsigned e = 0; e < MOST / 4; e++, to += e % 2 ? V : 7 * V) {
                if (e / 2 * 8 + e % 2 + 2 * t >= channels) continue;
                to[0] = s[e / 2][e % 2];
                if (2 * g + 1 < columns) to[1] = s[e / 2][e % 2 + 2];
            }
    };
    for (unsigned c = 0; c < AHEAD; c++) start(c);
    if (v_ahead) load(0);
#pragma unroll
    for (unsigned e = 0; e < MOST / 2; e++) {
        const unsigned i = e / 4 * 8 + 2 * t + e % 2, j = 2 * g + e % 4 / 2;
        if (S && i < (unsigned)K && j < columns) s[e / 4][e % 4] = S[(b_h * K + i) * V + j0 + j];
    }
#pragma unroll 1
    for (unsigned c = 0; c < count; c++) {
        const chunk_operands<MATH, MOST> *here = (const chunk_operands<MATH, MOST> *)(memory + c % STAGES * PARTS);
        left_operand<MATH> of_v[BLOCKS];                             // vᵀ
        if (!v_ahead) load(c);
#pragma unroll
        for (unsigned J = 0; J < BLOCKS; J++) {
            const float2 *two = next[J];
            const float a[2][4] = {{two[0].x, two[1].x, two[0].y, two[1].y}, {two[2].x, two[3].x, two[2].y, two[3].y}};
            of_v[J] = round_left<MATH>(a);
        }
        copy_wait<STAGES - 2>();
        __syncthreads();                                             // the chunk is there, the one before it done with
        start(c + AHEAD);
        if (v_ahead) load(c + 1);
        if (states) store(states + c * (K * V));
        float out[BLOCKS][2][4] = {};
#pragma unroll
        for (unsigned i = 0; i < MOST / 16; i++) {                   // 16 channels
            right_operand<MATH> of_S[2];
#pragma unroll
            for (unsigned p = 0; p < 2; p++) {
                const float *left = s[2 * i] + 2 * p, *right = s[2 * i + 1] + 2 * p;
                of_S[p] = round_right<MATH>(make_float4(left[0], left[1], right[0], right[1]));
            }
#pragma unroll
            for (unsigned e = 0; e < 8; e++) s[2 * i + e / 4][e % 4] *= here->decay[16 * i + e / 4 * 8 + 2 * t + e % 2];
#pragma unroll
            for (unsigned n = 0; n < BLOCKS; n++) {
                const left_operand<MATH> queries = load_rows<MATH, MOST>(here->q, n * BLOCK, i);
                const left_operand<MATH> keys = load_rows<MATH, METALA_CHUNK>(here->k, 16 * i, n);
#pragma unroll
                for (unsigned p = 0; p < 2; p++) {
                    multiply_pieces<MATH>(out[n][p], queries, of_S[p]);
                    multiply_pieces<MATH>(s[2 * i + p], of_v[n], half_of<MATH>(keys, p));
                }
            }
        }
#pragma unroll
        for (unsigned I = 0; I < BLOCKS; I++) {
#pragma unroll
            for (unsigned J = 0; J <= I; J++) {
                const left_operand<MATH> map = load_rows<MATH, METALA_CHUNK>(here->A, I * BLOCK, J);
#pragma unroll
                for (unsigned p = 0; p < 2; p++) multiply_pieces<MATH>(out[I][p], map, half_of<MATH>(of_v[J], p));
            }
#pragma unroll
            for (unsigned h = 0; h < 2; h++) {
                const unsigned token = c * METALA_CHUNK + I * BLOCK + 8 * h + g;
                if (token < left) store_pair(o + first + (size_t)step * token, out[I], h, 4 * t, columns, fours);
            }
        }
    }
    if (S) store(S + b_h * K * V);
}

// ---- Backward: all chunks at the same time, too, once tensor_carry_kernel has left the gradients of the states between them.
// S is the state before the chunk, Γ the gradient of that after it, D_tj = s do_t·v_j:
//
//     dq_t = p_t ⊙ ( s P(0,I) ⊙ (S do_t) + Σ_{j, J<I} D_tj (k_j ⊙ r_j ⊙ P(J+1,I)) ) + what is in its own block
//     dk_j = r_j ⊙ ( P(J+1,4) ⊙ (Γ v_j)  + Σ_{t, J<I} D_tj (q_t ⊙ p_t ⊙ P(J+1,I)) ) + what is in its own block
//     dv_j = Σ_{t>=j} A_tj do_t + Γᵀ (k_j ⊙ r_j ⊙ P(J+1,4))
//     da_t = Σ_{r>=t} (q_r ⊙ dq_r - k_r ⊙ dk_r), up to the end of the chunk, + rowsum(Γ ⊙ S_n),
//            rowsum(Γ ⊙ S_n) = P(0,4) ⊙ rowsum(Γ ⊙ S) + Σ_j k_j ⊙ r_j ⊙ P(J+1,4) ⊙ (Γ v_j)
//
// What is in its own block is computed as above, channel by channel in float.

// From the last chunk c1-1 to chunk c0: gammas (heads, chunks c0…c1-1, K, V) = Γ behind each; gamma (heads, K, V): in, Γ behind
// the last one, out, that before chunk c0. Block by block
//
//     Γ <- diag(p_n) Γ + s Σ_t (q_t ⊙ p_t) do_tᵀ
//
// A block of threads has 32 channels and 64 columns, a warp 16 × 16 of them, in registers; while it works on one chunk, the next
// one is on its way. The grid is (tiles, B·H): two blocks fit on a multiprocessor, and 64 heads of 64 × 128 fill 128.
enum { CARRY_CHANNELS = 32, CARRY_COLUMNS = 64, CARRY_Q_PITCH = CARRY_CHANNELS + 8, CARRY_DO_PITCH = CARRY_COLUMNS + 8,
       CARRY_CHUNK = METALA_CHUNK * (2 * CARRY_Q_PITCH + CARRY_DO_PITCH),         // floats of one chunk: q, α, do
       CARRY_SHARED = (2 * CARRY_CHUNK + BLOCKS * CARRY_CHANNELS) * sizeof(float) };
template <metala_math MATH>
__global__ void __launch_bounds__(THREADS, 2)
tensor_carry_kernel(float *gammas, float *gamma, const float *q, const float *dO, const float *alpha, size_t c0, size_t c1,
                    size_t T, size_t H, size_t K, size_t V, float scale) {
    DYNAMIC_SHARED(float, memory);
    const size_t b_h = blockIdx.y, K_tiles = ceil_div(K, CARRY_CHANNELS), count = c1 - c0;
    const size_t i0 = blockIdx.x % K_tiles * CARRY_CHANNELS, channels = least(K - i0, CARRY_CHANNELS);
    const size_t j0 = blockIdx.x / K_tiles * CARRY_COLUMNS, columns = least(V - j0, CARRY_COLUMNS);
    const unsigned g = threadIdx.x % WARP / 4, t = threadIdx.x % 4, warp = threadIdx.x / WARP;
    const unsigned row = warp % 2 * 16 + g, column = warp / 2 * 16;  // the lane's, and g + 8; the first one of the warp
    float *total = memory + 2 * CARRY_CHUNK;
    float s[2][4] = {};

    auto start = [&](size_t c, float *to) {                          // of chunk c
        const size_t t0 = c * METALA_CHUNK, n = least(T - t0, METALA_CHUNK), at = first_row(b_h, T, H) + t0 * H;
        float *to_alpha = to + METALA_CHUNK * CARRY_Q_PITCH, *to_dO = to_alpha + METALA_CHUNK * CARRY_Q_PITCH;
        load_tokens(to, CARRY_Q_PITCH, CARRY_CHANNELS, q + at * K + i0, H * K, n, channels, 0, METALA_CHUNK);
        load_tokens(to_alpha, CARRY_Q_PITCH, CARRY_CHANNELS, alpha + at * K + i0, H * K, n, channels, 1, METALA_CHUNK);
        load_tokens(to_dO, CARRY_DO_PITCH, CARRY_COLUMNS, dO + at * V + j0, H * V, n, columns, 0, METALA_CHUNK);
    };
    auto store = [&](float *to) {                                    // (K,V)
        const bool aligned = V % 4 == 0 && (uintptr_t)to % 16 == 0;
#pragma unroll
        for (unsigned h = 0; h < 2; h++)
            if (row + 8 * h < (unsigned)channels)
                store_pair(to + (i0 + row + 8 * h) * V + j0, s, h, column + 4 * t, (unsigned)columns, aligned);
    };
#pragma unroll
    for (unsigned e = 0; e < 8; e++) {                               // as store_pair has them
        const unsigned i = row + e / 4 * 8, j = column + 4 * t + e % 4;
        if (gamma && i < (unsigned)channels && j < (unsigned)columns)
            s[e % 2][e / 4 * 2 + e % 4 / 2] = gamma[(b_h * K + i0 + i) * V + j0 + j];
    }
    start(c1 - 1, memory);
    for (size_t step = 0; step < count; step++) {
        const size_t c = c1 - 1 - step;
        float *q_chunk = memory + step % 2 * CARRY_CHUNK, *alpha_chunk = q_chunk + METALA_CHUNK * CARRY_Q_PITCH;
        float *dO_chunk = alpha_chunk + METALA_CHUNK * CARRY_Q_PITCH;
        wait_for_tokens();                                           // the chunk is there, the one before it done with
        if (step + 1 < count) start(c - 1, memory + (step + 1) % 2 * CARRY_CHUNK);
        store(gammas + (b_h * count + c - c0) * K * V);
        block_decay(q_chunk, NULL, alpha_chunk, total, CARRY_CHANNELS, CARRY_Q_PITCH, CARRY_Q_PITCH, scale, BLOCKS);
        __syncthreads();                                             // q has decayed
#pragma unroll
        for (unsigned b = BLOCKS; b-- > 0;) {
            float a[2][4];
            float4 right[2];
            load_left<down>(a, q_chunk + b * BLOCK * CARRY_Q_PITCH, CARRY_Q_PITCH, t, row);
            load_right_pair(right, dO_chunk + b * BLOCK * CARRY_DO_PITCH, CARRY_DO_PITCH, t, column + 2 * g);
            const left_operand<MATH> left = round_left<MATH>(a);
#pragma unroll
            for (unsigned p = 0; p < 2; p++) {
#pragma unroll
                for (unsigned e = 0; e < 4; e++) s[p][e] *= total[b * CARRY_CHANNELS + row + e / 2 * 8];
                multiply_pieces<MATH>(s[p], left, right[p]);
            }
        }
    }
    if (gamma) store(gamma + b_h * K * V);
}

// All gradients of a chunk of one head: the grid is (chunks from c0 on, B·H). A block goes through V by tiles of 32 columns. Of dq
// and dk a warp has two blocks of tokens and a quarter of the channels, summed over the tiles in registers; of dv a block of
// tokens and half of a tile; of D a block of tokens t and half of the tokens j. With K up to 64 two blocks share a multiprocessor:
// 113 KB of shared memory each, in which D takes the place of A, and dq and dk those of the tiles; 128 registers for a thread.
enum { TILE_COLUMNS = 32, TILE_PITCH = TILE_COLUMNS + 8 };
template <int MOST>
constexpr size_t tensor_backward_shared() {                          // in floats: q, k, α; decays, three vectors;
    return METALA_CHUNK * (3 * MOST + 2 * 8) + (2 * BLOCKS + 3) * MOST + METALA_CHUNK * CHUNK_PITCH +    // A or D, in turn
           greatest(2 * (METALA_CHUNK + MOST) * TILE_PITCH, 2 * METALA_CHUNK * (MOST + 8));      // v, do, S, Γ, or dq and dk
}

// of += D (x ⊙ P(from,to)), or of Dᵀ, over one block of tokens: 16 rows from row - g on, with the channels of a warp.
//   of (pieces of 8 channels)   D (64,64) read by `beside`, its transpose by `down`   x (64, MOST) the keys or queries
template <metala_math MATH, int MOST, two_of_k TWO>
__device__ __forceinline__ void add_block(float (*of)[4], const float *D, unsigned row, const float *x, unsigned token,
                                          unsigned channel, const float *total, unsigned from, unsigned to) {
    float a[2][4];
    load_left<TWO>(a, D, CHUNK_PITCH, token, row);
    const left_operand<MATH> left = round_left<MATH>(a);
#pragma unroll
    for (unsigned p = 0; p < MOST / 32; p++) {
        const unsigned i = channel + 8 * p;
        multiply_pieces<MATH>(of[p], left, times(load_right<down>(x, MOST + 8, token, i), decay_over<MOST>(total, from, to, i)));
    }
}

// Up to which head size two blocks fit on a multiprocessor, and may have half of its registers each.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
enum { MOST_OF_TWO = 32 };                                       // an A100's has 164 KB of shared memory
#else
enum { MOST_OF_TWO = 64 };                                       // an H100's 228 KB
#endif
template <metala_math MATH, int MOST>
__global__ void __launch_bounds__(THREADS, MOST <= MOST_OF_TWO ? 2 : 1)
tensor_backward_kernel(float *dq, float *dk, float *da, float *dv, const float *gammas, const float *dO, const float *states,
                       const float *q, const float *k, const float *v, const float *alpha, size_t c0, size_t T, size_t H,
                       size_t K, size_t V, float scale) {
    enum { PITCH = MOST + 8, PIECES = MOST / 32 };                   // PIECES: 8 channels each, of the quarter that a warp has
    DYNAMIC_SHARED(float, memory);
    const size_t b_h = blockIdx.y, c = c0 + blockIdx.x, t0 = c * METALA_CHUNK, n = least(T - t0, METALA_CHUNK);
    const size_t at = first_row(b_h, T, H) + t0 * H;
    const float *state = states + (b_h * chunks(T) + c) * K * V, *gamma = gammas + (b_h * gridDim.x + blockIdx.x) * K * V;
    const unsigned g = threadIdx.x % WARP / 4, t = threadIdx.x % 4, warp = threadIdx.x / WARP;
    const unsigned half = warp % 2, quarter = warp / 2, channel = quarter * (MOST / 4);
    float *q_chunk = memory, *k_chunk = q_chunk + METALA_CHUNK * PITCH, *alpha_chunk = k_chunk + METALA_CHUNK * PITCH;
    float *total = alpha_chunk + METALA_CHUNK * MOST, *decay_after = total + BLOCKS * MOST;     // P(J,J+1), P(J+1,4)
    float *rowsum_states = decay_after + BLOCKS * MOST, *rowsum_keys = rowsum_states + MOST;
    float *A = rowsum_keys + 2 * MOST, *D = A, *v_tile = A + METALA_CHUNK * CHUNK_PITCH;
    float *dO_tile = v_tile + METALA_CHUNK * TILE_PITCH, *S_tile = dO_tile + METALA_CHUNK * TILE_PITCH;
    float *gamma_tile = S_tile + MOST * TILE_PITCH, *dq_chunk = v_tile, *dk_chunk = dq_chunk + METALA_CHUNK * PITCH;
    float a[2][4];

    // 1. A, and the decays.
    load_tokens(q_chunk, PITCH, MOST, q + at * K, H * K, n, K, 0, METALA_CHUNK);
    load_tokens(k_chunk, PITCH, MOST, k + at * K, H * K, n, K, 0, METALA_CHUNK);
    load_tokens(alpha_chunk, MOST, MOST, alpha + at * K, H * K, n, K, 1, METALA_CHUNK);
    for (unsigned i = threadIdx.x; i < MOST; i += THREADS) rowsum_states[i] = 0;
    wait_for_tokens();
    chunk_map<MATH, MOST>(A, q_chunk, k_chunk, alpha_chunk, total, K, scale);
    for (unsigned task = threadIdx.x; task < BLOCKS * MOST; task += THREADS)
        decay_after[task] = decay_over<MOST>(total, task / MOST + 1, BLOCKS, task % MOST);
    __syncthreads();                                                 // A and decay_after are there
    left_operand<MATH> keys[MOST / 16];                              // k_j ⊙ r_j ⊙ P(J+1,4) of block `quarter`
#pragma unroll
    for (unsigned i = 0; i < MOST; i += 16) {
        load_left<beside>(a, k_chunk, PITCH, i + t, quarter * BLOCK + g);
#pragma unroll
        for (unsigned e = 0; e < 8; e++) a[e / 4][e % 4] *= decay_after[quarter * MOST + i + t + 8 * (e / 4) + 4 * (e % 2)];
        keys[i / 16] = round_left<MATH>(a);
    }
    // 2. The tiles: dv, and sums of dq, dk and D.
    float of_q[2][PIECES][4] = {}, of_k[2][PIECES][4] = {};          // of the blocks 2 half and 2 half + 1, from `channel` on
    float of_D[4][4] = {};                                           // of block `quarter` with the tokens from 32 half on
#pragma unroll 1
    for (size_t j0 = 0; j0 < V; j0 += TILE_COLUMNS) {
        const size_t columns = least(V - j0, TILE_COLUMNS);
        __syncthreads();                                             // the tile is done with
        load_tokens(v_tile, TILE_PITCH, TILE_COLUMNS, v + at * V + j0, H * V, n, columns, 0, METALA_CHUNK);
        load_tokens(dO_tile, TILE_PITCH, TILE_COLUMNS, dO + at * V + j0, H * V, n, columns, 0, METALA_CHUNK);
        load_state<TILE_COLUMNS>(S_tile, TILE_PITCH, state + j0, MOST, K, V, columns);
        load_state<TILE_COLUMNS>(gamma_tile, TILE_PITCH, gamma + j0, MOST, K, V, columns);
        wait_for_tokens();
        for (unsigned task = threadIdx.x; task < 2 * MOST; task += THREADS) {    // rowsum(Γ ⊙ S), two threads for a row
            const unsigned from = task / 2 * TILE_PITCH + task % 2 * 4;
            float sum = 0;
            for (unsigned l = 0; l < TILE_COLUMNS; l += 8) {
                float4 x = *(const float4 *)&gamma_tile[from + l], y = *(const float4 *)&S_tile[from + l];
                sum += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
            }
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            if (task % 2 == 0) rowsum_states[task / 2] += sum;
        }
#pragma unroll 1
        for (unsigned l = 2 * t; l < TILE_COLUMNS; l += 16) {        // S do, Γ v, and do·v
            right_operand<MATH> of_S[PIECES], of_gamma[PIECES];
#pragma unroll
            for (unsigned p = 0; p < PIECES; p++) {
                of_S[p] = round_right<MATH>(load_right<along>(S_tile, TILE_PITCH, l, channel + 8 * p + g));
                of_gamma[p] = round_right<MATH>(load_right<along>(gamma_tile, TILE_PITCH, l, channel + 8 * p + g));
            }
#pragma unroll
            for (unsigned m = 0; m < 2; m++) {
                load_left<along>(a, dO_tile, TILE_PITCH, l, (2 * half + m) * BLOCK + g);
                const left_operand<MATH> of_do = round_left<MATH>(a);
                load_left<along>(a, v_tile, TILE_PITCH, l, (2 * half + m) * BLOCK + g);
                const left_operand<MATH> of_v = round_left<MATH>(a);
#pragma unroll
                for (unsigned p = 0; p < PIECES; p++) {
                    multiply_pieces<MATH>(of_q[m][p], of_do, of_S[p]);
                    multiply_pieces<MATH>(of_k[m][p], of_v, of_gamma[p]);
                }
            }
            load_left<along>(a, dO_tile, TILE_PITCH, l, quarter * BLOCK + g);
            const left_operand<MATH> left = round_left<MATH>(a);
#pragma unroll
            for (unsigned p = 0; p < 4; p++)
                if (half * 2 + p / 2 <= quarter)
                    multiply_pieces<MATH>(of_D[p], left, load_right<along>(v_tile, TILE_PITCH, l, half * 32 + 8 * p + g));
        }
        float of_dv[2][4] = {};                                      // of block `quarter`, 16 columns
#pragma unroll 1
        for (unsigned token = quarter * BLOCK + t; token < METALA_CHUNK; token += BLOCK) {
            load_left<down>(a, A, CHUNK_PITCH, token, quarter * BLOCK + g);
            const left_operand<MATH> left = round_left<MATH>(a);
#pragma unroll
            for (unsigned p = 0; p < 2; p++)
                multiply_pieces<MATH>(of_dv[p], left, load_right<down>(dO_tile, TILE_PITCH, token, half * 16 + 8 * p + g));
        }
#pragma unroll
        for (unsigned i = 0; i < MOST; i += 16)
#pragma unroll
            for (unsigned p = 0; p < 2; p++)
                multiply_pieces<MATH>(of_dv[p], keys[i / 16],
                                      load_right<down>(gamma_tile, TILE_PITCH, i + t, half * 16 + 8 * p + g));
        const bool pairs = V % 2 == 0 && (uintptr_t)dv % 8 == 0;
#pragma unroll
        for (unsigned e = 0; e < 4; e += 2) {
            const unsigned j = quarter * BLOCK + g + e / 2 * 8;
            float *row = dv + (at + j * H) * V + j0;
#pragma unroll
            for (unsigned p = 0; p < 2; p++) {
                const unsigned l = half * 16 + 8 * p + 2 * t;
                if (j >= n || l >= columns) continue;
                if (pairs) *(float2 *)&row[l] = make_float2(of_dv[p][e], of_dv[p][e + 1]);
                else {
                    row[l] = of_dv[p][e];
                    if (l + 1 < columns) row[l + 1] = of_dv[p][e + 1];
                }
            }
        }
    }
    // 3. D, and what dq and dk have from outside of the chunk.
    __syncthreads();                                                 // A is done with, and so is the tile
    for (unsigned p = 0; p < 4; p++)
        for (unsigned e = 0; e < 4; e++)
            D[(quarter * BLOCK + g + e / 2 * 8) * CHUNK_PITCH + half * 32 + 8 * p + 2 * t + e % 2] = scale * of_D[p][e];
#pragma unroll
    for (unsigned p = 0; p < PIECES; p++)
#pragma unroll
        for (unsigned e = 0; e < 2; e++) {
            const unsigned i = channel + 8 * p + 2 * t + e;
            float sum = 0;                                           // Σ_j k_j ⊙ r_j ⊙ P(J+1,4) ⊙ (Γ v_j)
#pragma unroll
            for (unsigned m = 0; m < 2; m++) {
                const unsigned block = 2 * half + m, row = block * BLOCK + g;
                const float before = scale * decay_over<MOST>(total, 0, block, i), behind = decay_after[block * MOST + i];
                of_q[m][p][e] *= before, of_q[m][p][e + 2] *= before;
                of_k[m][p][e] *= behind, of_k[m][p][e + 2] *= behind;
                sum += k_chunk[row * PITCH + i] * of_k[m][p][e] + k_chunk[(row + 8) * PITCH + i] * of_k[m][p][e + 2];
            }
            for (int distance = 4; distance < WARP; distance *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
            if (g == 0) rowsum_keys[half * MOST + i] = sum;
        }
    __syncthreads();                                                 // D is there
    // 4. What they have from the other blocks.
#pragma unroll
    for (unsigned m = 0; m < 2; m++) {
        const unsigned block = 2 * half + m, row = block * BLOCK + g;
#pragma unroll 1
        for (unsigned J = 0; J < block; J++)
            add_block<MATH, MOST, beside>(of_q[m], D, row, k_chunk, J * BLOCK + t, channel + g, total, J + 1, block);
#pragma unroll 1
        for (unsigned I = block + 1; I < BLOCKS; I++)
            add_block<MATH, MOST, down>(of_k[m], D, row, q_chunk, I * BLOCK + t, channel + g, total, block + 1, I);
#pragma unroll
        for (unsigned p = 0; p < PIECES; p++)
#pragma unroll
            for (unsigned h = 0; h < 2; h++) {
                const unsigned to = (row + 8 * h) * PITCH + channel + 8 * p + 2 * t;
                *(float2 *)&dq_chunk[to] = make_float2(of_q[m][p][2 * h], of_q[m][p][2 * h + 1]);
                *(float2 *)&dk_chunk[to] = make_float2(of_k[m][p][2 * h], of_k[m][p][2 * h + 1]);
            }
    }
    __syncthreads();                                                 // nobody reads the decayed q and k any more
    // 5. What they have from their own block, and da.
    load_tokens(q_chunk, PITCH, MOST, q + at * K, H * K, n, K, 0, METALA_CHUNK);
    load_tokens(k_chunk, PITCH, MOST, k + at * K, H * K, n, K, 0, METALA_CHUNK);
    wait_for_tokens();
#pragma unroll 1
    for (unsigned task = threadIdx.x; task < 2 * BLOCKS * MOST; task += THREADS) {
        const unsigned block = task / 2 / MOST, here = block * BLOCK * PITCH + task % MOST;
        const float *map = D + block * BLOCK * (CHUNK_PITCH + 1), *a = alpha_chunk + block * BLOCK * MOST + task % MOST;
        if (task / MOST % 2 == 0) channel_dq(dq_chunk + here, k_chunk + here, a, PITCH, MOST, map, CHUNK_PITCH, 1);
        else channel_dk(dk_chunk + here, q_chunk + here, a, PITCH, MOST, map, CHUNK_PITCH);
    }
    __syncthreads();
    // da sums over the tokens from the last one on: those of a block here, in the place of α, and below the blocks behind it.
    for (unsigned task = threadIdx.x; task < BLOCKS * MOST; task += THREADS) {
        float sum = 0;
#pragma unroll
        for (unsigned t = BLOCK; t-- > 0;) {
            const unsigned token = task / MOST * BLOCK + t, here = token * PITCH + task % MOST;
            sum += q_chunk[here] * dq_chunk[here] - k_chunk[here] * dk_chunk[here];
            alpha_chunk[token * MOST + task % MOST] = sum;
        }
    }
    for (unsigned i = threadIdx.x; i < MOST; i += THREADS)           // rowsum(Γ ⊙ S_n)
        rowsum_states[i] = decay_over<MOST>(total, 0, BLOCKS, i) * rowsum_states[i] + rowsum_keys[i] + rowsum_keys[MOST + i];
    __syncthreads();                                                 // what blocks add up to is there
    for (unsigned task = threadIdx.x; task < METALA_CHUNK * MOST; task += THREADS) {
        const unsigned token = task / MOST, i = task % MOST, here = token * PITCH + i;
        if (token >= n || i >= K) continue;
        float sum = rowsum_states[i] + alpha_chunk[token * MOST + i];
        for (unsigned b = token / BLOCK + 1; b < BLOCKS; b++) sum += alpha_chunk[b * BLOCK * MOST + i];
        const size_t there = (at + token * H) * K + i;
        dq[there] = dq_chunk[here];
        dk[there] = dk_chunk[here];
        da[there] = sum;
    }
}

// ---- All heads of all sequences.

// Those on tensor cores have room for K up to 128, the other chunkwise ones for 256, the backward with narrower tiles of V beyond
// 128, and for less where a block has less shared memory; the recurrent ones for 512, and do the work of all for what is left.
// The parallel form is the chunkwise one: its T×T map is for reading.
enum { WIDE = 64, NARROW = 32, MOST_WIDE_K = 128, MOST_CHUNKWISE_K = 256, MOST_TENSOR_K = 128, MOST_K = 512 };

// CALL(MOST) with the least of the sizes that the tensor cores' kernels are compiled for.
#define FOR_TENSOR_K(K, CALL)         \
    do {                              \
        if (K <= 32) CALL(32);        \
        else if (K <= 64) CALL(64);   \
        else CALL(MOST_TENSOR_K);     \
    } while (0)

bool head_fits(metala_context *ctx, size_t K) {
    if (K > MOST_K)
        metala_context_fail(ctx, "%s:%d: the scan has room for heads of %d key channels on the GPU, got %zu; use more"
                            " heads", __FILE__, __LINE__, MOST_K, K);
    return K <= MOST_K;
}

// CALL(ROWS, GROUPS) with as many rows of S for each thread as K takes.
#define FOR_ROWS(K, CALL)             \
    do {                              \
        if (K <= 8) CALL(1, 8);       \
        else if (K <= 32) CALL(4, 8); \
        else if (K <= 64) CALL(8, 8); \
        else if (K <= 128) CALL(16, 8); \
        else if (K <= 256) CALL(32, 8); \
        else CALL(32, 16);            \
    } while (0)

// The kernels read q, k and α of every token and head. What is shared is copied out for them, to `room`, B·T·H·K numbers each;
// returned is where that ends. The backward takes as many for the gradients, which are then added up.
template <metala_math MATH>
float *copy_shared(metala_context *ctx, const float **q, const float **k, const float **alpha, float *room, size_t B,
                   size_t T, size_t H, size_t K, int shared) {
    const float **const keys[] = {q, k};
    const int bits[] = {METALA_SHARED_QUERY, METALA_SHARED_KEY};
    for (int i = 0; i < 2; i++) {
        if (shared & bits[i]) copy_heads_forward(ctx, room, *keys[i], B * T, H, K);
        else if (shared & METALA_SHARED_SEQUENCES)
            for (size_t b = 0; b < B; b++) cuda_copy(ctx, room + b * T * H * K, *keys[i], T * H * K * sizeof(float));
        else continue;
        *keys[i] = room, room += B * T * H * K;
    }
    if (shared & METALA_CONSTANT_DECAY) {
        const metala_linear repeated = {room, *alpha, NULL, *alpha, NULL, H * K};    // α as the bias of no inputs
        matmul_forward<MATH>(ctx, &repeated, 1, *alpha, B * T, 0);
        *alpha = room, room += B * T * H * K;
    }
    return room;
}
size_t count_shared(int shared) {
    int q_or_b = METALA_SHARED_QUERY | METALA_SHARED_SEQUENCES, k_or_b = METALA_SHARED_KEY | METALA_SHARED_SEQUENCES;
    return !!(shared & q_or_b) + !!(shared & k_or_b) + !!(shared & METALA_CONSTANT_DECAY);
}

// Scratch memory, in floats for states and in chunks for their operands, above which fewer heads or chunks are taken at a time:
// 256 MB, and for heads of 128 channels 170 MB in bfloat16 or 340 MB in tf32.
#ifdef __CUDACC__
enum { MOST_STATES = 1 << 26, MOST_OPERANDS = 4096 };
#else
enum { MOST_STATES = 2000, MOST_OPERANDS = 5 };
#endif
size_t between_1_and(size_t most, size_t n) { return n < 1 ? 1 : least(n, most); }

// The two kernels of the forward on tensor cores, for the chunks c0…c1-1, and those of the backward. Where blocks of four warps
// would not fill half of the GPU, blocks of two get through a chunk sooner.
template <metala_math MATH, int MOST>
constexpr size_t tensor_forward_shared() {                           // in bytes
    return greatest(chunk_operands_shared<MOST>() * sizeof(float),
                    forward_stages<MATH, MOST>() * sizeof(chunk_operands<MATH, MOST>));
}
template <metala_math MATH, int MOST>
void tensor_forward_of_chunks(metala_context *ctx, float *o, float *S, float *states, void *room, const float *q, const float *k,
                              const float *v, const float *alpha, size_t c0, size_t c1, size_t B, size_t T, size_t H, size_t K,
                              size_t V, float scale) {
    chunk_operands<MATH, MOST> *chunk = (chunk_operands<MATH, MOST> *)room;
    const bool few = 2 * B * H * ceil_div(V, 4 * FORWARD_COLUMNS) < multiprocessors();
    const size_t tiles = ceil_div(V, FORWARD_COLUMNS), warps = least(tiles, few ? 2 : 4);
    RUN((chunk_operands_kernel<MATH, MOST>), extent(c1 - c0, B * H), THREADS, chunk_operands_shared<MOST>() * sizeof(float), chunk,
        q, k, alpha, c0, T, H, K, scale);
    RUN((tensor_forward_kernel<MATH, MOST>), extent(ceil_div(tiles, warps), B * H), (unsigned)(warps * WARP),
        (forward_stages<MATH, MOST>() * sizeof *chunk), o, S, states, chunk, v, c0, c1, T, H, K, V);
}
template <metala_math MATH, int MOST>
void tensor_backward_of_chunks(metala_context *ctx, float *dq, float *dk, float *da, float *dv, float *gamma, float *gammas,
                     const float *dO, const float *states, const float *q, const float *k, const float *v,
                     const float *alpha, size_t c0, size_t c1, size_t B, size_t T, size_t H, size_t K, size_t V, float scale) {
    const size_t tiles = ceil_div(K, CARRY_CHANNELS) * ceil_div(V, CARRY_COLUMNS);
    RUN(tensor_carry_kernel<MATH>, extent(tiles, B * H), THREADS, CARRY_SHARED, gammas, gamma, q, dO, alpha, c0, c1, T, H, K, V,
        scale);
    RUN((tensor_backward_kernel<MATH, MOST>), extent(c1 - c0, B * H), THREADS, tensor_backward_shared<MOST>() * sizeof(float),
        dq, dk, da, dv, gammas, dO, states, q, k, v, alpha, c0, T, H, K, V, scale);
}

// Scratch: copies of what is shared; on tensor cores the operands of some chunks, and S, which goes from these chunks to the next
// ones, if there are any and S is NULL.
template <metala_math MATH>
void scan_forward(metala_context *ctx, metala_form form, float *o, float *S, float *states, const float *q,
                  const float *k, const float *v, const float *alpha, size_t B, size_t T, size_t H, size_t K, size_t V,
                  double scale, int shared) {
    if (!head_fits(ctx, K) || !B || !T || !H || !V) return;
    const size_t most_shared = shared_room(), wanted = chunkwise_forward_shared<WIDE>(K) * sizeof(float);
    const size_t all_states = B * H * K * V;
    const bool recurrent = form == METALA_RECURRENT || K > MOST_CHUNKWISE_K || wanted > most_shared || T <= 1;
    size_t bytes = 0, chunk_bytes = 0;
#define SIZE(MOST) bytes = tensor_forward_shared<MATH, MOST>(), chunk_bytes = sizeof(chunk_operands<MATH, MOST>)
    if (MATH != METALA_EXACT) FOR_TENSOR_K(K, SIZE);
#undef SIZE
    const bool tensor = MATH != METALA_EXACT && !recurrent && K <= MOST_TENSOR_K && bytes <= most_shared;
    const size_t at_once = between_1_and(chunks(T), MOST_OPERANDS / (B * H));
    const bool stays = tensor && !S && at_once < chunks(T);
    const size_t of_chunks = tensor ? at_once * B * H * chunk_bytes / sizeof(float) : 0;
    const size_t wants = of_chunks + stays * all_states + count_shared(shared) * B * T * H * K;
    float *operands = NULL;
    if (wants) {
        operands = scratch(ctx, wants);
        if (!operands) return;
        float *room = copy_shared<MATH>(ctx, &q, &k, &alpha, operands + of_chunks, B, T, H, K, shared);
        if (stays) cuda_zero(ctx, S = room, all_states * sizeof(float));
    }
    if constexpr (MATH != METALA_EXACT)
        for (size_t c0 = 0, c1; tensor && c0 < chunks(T); c0 = c1) {
            c1 = least(c0 + at_once, chunks(T));
#define FORWARD(MOST) \
    tensor_forward_of_chunks<MATH, MOST>(ctx, o, S, states, operands, q, k, v, alpha, c0, c1, B, T, H, K, V, (float)scale)
            FOR_TENSOR_K(K, FORWARD);
#undef FORWARD
        }
    if (tensor) return;
    if (recurrent) {
#define FORWARD(ROWS, GROUPS)                                                                                     \
    RUN((recurrent_forward_kernel<ROWS, GROUPS>), extent(ceil_div(V, RECURRENT_COLUMNS), B * H), dim3(WARP, GROUPS), \
        0, o, S, states, q, k, v, alpha, T, H, K, V, (float)scale)
        FOR_ROWS(K, FORWARD);
#undef FORWARD
    } else
        RUN(chunkwise_forward_kernel<WIDE>, extent(ceil_div(V, WIDE), B * H), THREADS, wanted, o, S, states, q, k, v, alpha, T, H,
            K, V, (float)scale);
}

// Scratch: on tensor cores Γ of some chunks, and Γ itself if dS is NULL; otherwise `states_each` states of some heads, and the
// tiles' parts of dq, dk and da (tiles,3,B,T,H,K) when there are several; copies of what is shared, with their gradients. da
// may be NULL.
template <metala_math MATH>
void scan_backward(metala_context *ctx, metala_form form, float *dq, float *dk, float *dv, float *da, float *dS,
                   const float *dO, const float *states, const float *q, const float *k, const float *v,
                   const float *alpha, size_t B, size_t T, size_t H, size_t K, size_t V, double scale, int shared) {
    if (!head_fits(ctx, K) || !B || !T || !H) return;
    const size_t most_shared = shared_room(), all_states = B * H * K * V;
    auto chunkwise_fits = [=](size_t most_K, size_t columns) {
        return K <= most_K && chunkwise_backward_shared(K, columns) * sizeof(float) <= most_shared;
    };
    size_t tensor_shared = 0;
#define SIZE(MOST) tensor_shared = tensor_backward_shared<MOST>() * sizeof(float)
    FOR_TENSOR_K(K, SIZE);
#undef SIZE
    const bool wide = chunkwise_fits(MOST_WIDE_K, WIDE);
    const bool tensor = MATH != METALA_EXACT && form != METALA_RECURRENT && K <= MOST_TENSOR_K &&
                        greatest(tensor_shared, CARRY_SHARED) <= most_shared;
    const bool recurrent = form == METALA_RECURRENT || !(tensor || wide || chunkwise_fits(MOST_CHUNKWISE_K, NARROW));
    const size_t width = tensor ? V : recurrent ? (size_t)RECURRENT_COLUMNS : wide ? (size_t)WIDE : (size_t)NARROW;
    const size_t tiles = ceil_div(V, width), count = B * T * H * K, tile_step = tiles > 1 ? 3 * count : 0;
    const size_t states_each = recurrent ? METALA_CHUNK : METALA_CHUNK / BLOCK - 1;
    const size_t heads = between_1_and(B * H, MOST_STATES / (states_each * K * V));
    const size_t at_once = between_1_and(chunks(T), MOST_STATES / all_states);
    const size_t of_states = tensor ? (at_once + !dS) * all_states : heads * states_each * K * V;
    bool one_q = shared & METALA_SHARED_QUERY, one_k = shared & METALA_SHARED_KEY, one_a = shared & METALA_CONSTANT_DECAY;
    bool one_b = shared & METALA_SHARED_SEQUENCES;
    size_t copies = 2 * count_shared(shared) + (!da && !one_a), strips = one_a ? ceil_div(B * T, ROWS_OF_STRIP) : 0;
    float *between = scratch(ctx, of_states + tiles * tile_step + copies * count + strips * H * K);
    if (!between) return;
    float *parts = between + of_states;
    float *room = copy_shared<MATH>(ctx, &q, &k, &alpha, parts + tiles * tile_step, B, T, H, K, shared);
    float *all_q = dq, *all_k = dk, *all_a = da;
    if (one_q || one_b) all_q = room, room += count;
    if (one_k || one_b) all_k = room, room += count;
    if (one_a || !da) all_a = room, room += count;
    float *part_q = all_q, *part_k = all_k, *part_a = all_a;
    if (tiles > 1) part_q = parts, part_k = part_q + count, part_a = part_k + count;
    if constexpr (MATH != METALA_EXACT) {
        float *gamma = dS ? dS : between + at_once * all_states;
        if (tensor && !dS) cuda_zero(ctx, gamma, all_states * sizeof(float));
        for (size_t c1 = chunks(T), c0; tensor && c1 > 0; c1 = c0) {
            c0 = c1 > at_once ? c1 - at_once : 0;
#define BACKWARD(MOST)                                                                                                  \
    tensor_backward_of_chunks<MATH, MOST>(ctx, all_q, all_k, all_a, dv, gamma, between, dO, states, q, k, v, alpha, c0, c1, B, T, H, \
                                          K, V, (float)scale)
            FOR_TENSOR_K(K, BACKWARD);
#undef BACKWARD
        }
    }
    for (size_t first = 0; !tensor && first < B * H; first += heads) {
        extent grid(tiles, B * H - first < heads ? B * H - first : heads);
#define ARGUMENTS part_q, part_k, part_a, tile_step, dv, dS, between, dO, states, q, k, v, alpha, first, T, H, K, V, \
                  (float)scale
#define BACKWARD(ROWS, GROUPS) \
    RUN((recurrent_backward_kernel<ROWS, GROUPS>), grid, dim3(WARP, GROUPS), 0, ARGUMENTS)
        if (recurrent) FOR_ROWS(K, BACKWARD);
        else if (wide)
            RUN(chunkwise_backward_kernel<WIDE>, grid, THREADS, chunkwise_backward_shared(K, WIDE) * sizeof(float), ARGUMENTS);
        else
            RUN(chunkwise_backward_kernel<NARROW>, grid, THREADS, chunkwise_backward_shared(K, NARROW) * sizeof(float), ARGUMENTS);
#undef BACKWARD
#undef ARGUMENTS
    }
    float *const whole[] = {all_q, all_k, all_a}, *const part[] = {part_q, part_k, part_a};
    for (int i = 0; i < 3 && tiles > 1; i++)
        RUN(sum_parts_kernel, blocks_for(count, THREADS), THREADS, 0, whole[i], part[i], tiles, tile_step, count, 0);
    if (one_q) copy_heads_backward(ctx, dq, all_q, B * T, H, K);
    if (one_k) copy_heads_backward(ctx, dk, all_k, B * T, H, K);
    for (int i = 0; i < 2 && one_b; i++)
        RUN(sum_parts_kernel, blocks_for(count / B, THREADS), THREADS, 0, i ? dk : dq, i ? all_k : all_q, B, count / B,
            count / B, 0);
    if (one_a && da) column_sums(ctx, da, room, all_a, B * T, H * K, 0);
}

// ---- One token of MetaLA's mixer: α and k of z, the state's step, o, p, norm and gate, y. A block for each head of each
// sequence.
//
// A warp takes a task: 32 columns of S and every groups-th of its rows, from row `group` on; there are as many groups as leave
// each of the 32 warps one task at most, and if columns alone are more, a warp takes several tasks. Threads have 16 loads of S
// on their way, the first of them while α is computed, as all else that is read. part (groups,V): Σ q_i S_ij over the rows of a
// group.
enum { STEP_WARPS = 32, STEP_AHEAD = 16 };
__host__ __device__ size_t step_groups(size_t V) { return greatest(STEP_WARPS / ceil_div(V, WARP), 1); }

__global__ void __launch_bounds__(STEP_WARPS * WARP, 1)
mixer_step_kernel(float *y, float *S, const float *z, const float *q, const float *v, const float *g, const float *b, size_t H,
                  size_t K, size_t V, float inverse_tau, float scale, float eps) {
    DYNAMIC_SHARED(float, memory);
    float *alpha = memory, *key = alpha + K, *query = key + K, *part = query + K;
    const size_t head = blockIdx.x;
    const unsigned tiles = (unsigned)ceil_div(V, WARP), groups = (unsigned)step_groups(V), step = groups * (unsigned)V;
    const unsigned own = threadIdx.x, warp = own / WARP;
    float s[STEP_AHEAD], vj = 0, w = 0;
    auto column = [=](unsigned task) { return task % tiles * WARP + own % WARP; };
    auto fetch = [&](unsigned task, unsigned i0) {
        const float *row = computed_once(S + (head * K + i0) * V + column(task));
#pragma unroll
        for (unsigned a = 0; a < STEP_AHEAD; a++)
            if (i0 + a * groups < K) s[a] = row[a * step];
        vj = v[head * V + column(task)];
    };
    next_may_begin();
    const float own_b = b && own < K ? b[head % H * K + own] : 0;    // a weight: see matmul_few_rows_kernel
    wait_for_before();
    const float own_z = own < K ? z[head * K + own] : 0, own_q = own < K ? q[head * K + own] : 0;
    const float own_g = own < V ? g[head * V + own] : 0;
    if (warp < tiles * groups && column(warp) < V) fetch(warp, warp / tiles);
    for (size_t i = own; i < K; i += STEP_WARPS * WARP) {
        float a = log_sigmoid(i == own ? own_z : z[head * K + i]) * inverse_tau;
        alpha[i] = expf(a), key[i] = -expm1f(a), query[i] = i == own ? own_q : q[head * K + i];
        if (b) w += query[i] * key[i] * (i == own ? own_b : b[head % H * K + i]);
    }
    w = block_sum<STEP_WARPS>(w);                                    // its barriers show the above to all
    for (unsigned task = threadIdx.x / WARP; task < tiles * groups; task += STEP_WARPS) {
        const unsigned group = task / tiles, j = column(task);
        if (j >= V) continue;
        float sum = 0, *row = S + (head * K + group) * V + j;
        for (unsigned i0 = group; i0 < K; i0 += STEP_AHEAD * groups, row += STEP_AHEAD * step) {
            if (task > warp || i0 > group) fetch(task, i0);
#pragma unroll
            for (unsigned a = 0; a < STEP_AHEAD; a++)
                if (const unsigned i = i0 + a * groups; i < K) {
                    s[a] = alpha[i] * s[a] + key[i] * vj;
                    row[a * step] = s[a];
                    sum += query[i] * s[a];
                }
        }
        part[group * V + j] = sum;
    }
    __syncthreads();                                                 // all parts are there
    float sum = 0, square = 0;
    for (size_t j = threadIdx.x; j < V; j += STEP_WARPS * WARP) {    // from here on each column has one thread
        float o = 0;
        for (unsigned group = 0; group < groups; group++) o += part[group * V + j];
        part[j] = scale * o + (b ? sigmoid(w * v[head * V + j]) : 0);
        sum += part[j];
    }
    const float mean = block_sum<STEP_WARPS>(sum) / (float)V;
    for (size_t j = threadIdx.x; j < V; j += STEP_WARPS * WARP) square += (part[j] - mean) * (part[j] - mean);
    const float rho = 1 / sqrtf(block_sum<STEP_WARPS>(square) / (float)V + eps);
    for (size_t j = threadIdx.x; j < V; j += STEP_WARPS * WARP)
        y[head * V + j] = (part[j] - mean) * rho * silu(j == own ? own_g : g[head * V + j]);
}
void mixer_step(metala_context *ctx, float *y, float *S, const float *z, const float *q, const float *v, const float *g,
                const float *b, size_t B, size_t H, size_t K, size_t V, double tau, double scale, double eps) {
    RUN_EARLY(mixer_step_kernel, B * H, STEP_WARPS * WARP, (3 * K + step_groups(V) * V) * sizeof(float), y, S, z, q, v, g, b, H, K,
              V, (float)(1 / tau), (float)scale, (float)eps);
}

// ============================================================== 6. The backend table

#ifdef __CUDACC__
#define NAME "cuda"
#else
#define NAME "cuda, emulated"
#endif

template <metala_math MATH>
const metala_backend *backend() {
    static const metala_backend table = {
        MATH == METALA_TF32 ? NAME " tf32" : MATH == METALA_BFLOAT16 ? NAME " bf16" : NAME,
        (size_t)1 << 27,
        cuda_alloc, cuda_free, cuda_upload, cuda_download, cuda_copy, cuda_zero,
#ifdef METALA_CUBLAS
        NULL, NULL, NULL, NULL,                                      // it has a stream and memory of its own
#else
        cuda_begin_recording, cuda_end_recording, cuda_replay, cuda_forget,
#endif
        embedding_forward, embedding_backward, patch_forward,
        rms_forward, rms_backward,
        conv_forward, conv_backward, conv_step,
        matmul_forward<MATH>, matmul_backward<MATH>, matmul_quantized,
        mask_rows,
        gate_forward, gate_backward,
        scan_forward<MATH>, scan_backward<MATH>, mixer_step,
        augment_forward, augment_backward,
        head_norm_forward, head_norm_backward,
        silu_gate_forward, silu_gate_backward,
        swiglu_forward<MATH>, swiglu_backward<MATH>, swiglu_step<MATH>,
        add,
        shift_forward, shift_backward, last_token,
        map_forward, map_backward,
        taylor_forward, taylor_backward,
        rotate_forward, rotate_backward,
        bounded_gate_forward, bounded_gate_backward,
        bounds_forward, bounds_backward,
        ssm_forward, ssm_backward,
        scale_pairs_forward, scale_pairs_backward,
        selective_forward, selective_backward,
        copy_heads_forward, copy_heads_backward,
        wkv_forward, wkv_backward,
        extend_forward, extend_backward,
        normalise_forward, normalise_backward,
        skip_forward, skip_backward,
        multiply_forward, multiply_backward,
        sigmoid_gate_forward, sigmoid_gate_backward,
        attention_forward, attention_backward,
        cross_entropy_forward, cross_entropy_backward, output_backward<MATH>,
        sum_squares, adamw,
    };
    return &table;
}

enum { RUNS = 42, RUNS_EARLY = 43, RUNS_WGMMA = 44 };
__global__ void probe_kernel(int *answer) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    *answer = RUNS_WGMMA;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    *answer = RUNS_EARLY;
#else
    *answer = RUNS;
#endif
}

}  // namespace

// Is there a GPU on which these kernels run? The reason when there is none goes to `why`.
const metala_backend *metala_cuda(metala_math math, char *why, size_t size) {
    int count = 0, answer = 0, *memory = NULL;
    cudaDeviceProp gpu;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess && count < 1) error = (cudaError_t)NO_DEVICE;
    if (error == cudaSuccess) error = cudaGetDeviceProperties(&gpu, 0);
    if (error == cudaSuccess && gpu.major < 8) {
        snprintf(why, size, "%s has compute capability %d.%d, the kernels need 8.0 or newer", gpu.name, gpu.major,
                 gpu.minor);
        return NULL;
    }
    if (error == cudaSuccess) error = cudaMalloc(&memory, sizeof *memory);
    if (error == cudaSuccess) {                                      // was it built for this GPU?
        LAUNCH(probe_kernel, dim3(1), dim3(1), 0, 0, memory);
        error = cudaGetLastError();
    }
    if (error == cudaSuccess) error = cudaMemcpy(&answer, memory, sizeof answer, cudaMemcpyDeviceToHost);
    cudaFree(memory);
#ifndef __CUDACC__
    if (answer == RUNS && 10 * gpu.major + gpu.minor == 90) answer = RUNS_WGMMA;
#endif
    if (error != cudaSuccess || answer < RUNS || answer > RUNS_WGMMA) {
        cudaGetLastError();
        snprintf(why, size, "CUDA error %d, %s; %s", (int)error, cudaGetErrorString(error), advice((int)error));
        return NULL;
    }
    runs_wgmma = answer == RUNS_WGMMA, runs_early = answer > RUNS;       // only what has been seen to run: others may be at work
    return math == METALA_TF32 ? backend<METALA_TF32>() : math == METALA_BFLOAT16 ? backend<METALA_BFLOAT16>()
                                                                                   : backend<METALA_EXACT>();
}
