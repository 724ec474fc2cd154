// selftest.cu - does cuda_on_cpu.h run kernels as a GPU does, and does it notice what is wrong with others?
//
//     g++ -std=c++17 -O1 -g -x c++ -include emulator/cuda_on_cpu.h emulator/selftest.cu -o selftest && ./selftest
//     make CUDA=1 build/selftest-cuda && build/selftest-cuda         the first half, on a GPU
//     make ptx-selftest                                              by nvcc, and run by ptx_on_cpu.cpp
//
// 1. Everything that is emulated, each result computed a second time by plain loops. A GPU must pass these as well: in
//    particular what mma, ldmatrix and wgmma expect where.
// 2. Mistakes, each in a process of its own, with the words that must appear about it. In a build with a sanitizer
//    others appear than without, and ptx_on_cpu.cpp has its own. RUN_WITH="qemu-aarch64 -L /usr/aarch64-linux-gnu" in the environment when this program
//    needs another one to run it.

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define DYNAMIC_SHARED(type, name)                                        \
    extern __shared__ __align__(1024) unsigned char name##_as_bytes[];    \
    type *name = (type *)name##_as_bytes
#endif
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

typedef __nv_bfloat16 bf16;

#ifdef __CUDACC__
__device__ void mma_bf16(float *d, const unsigned *a, const unsigned *b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ void mma_tf32(float *d, const unsigned *a, const unsigned *b) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ unsigned to_tf32(float x) {
    unsigned u;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(u) : "f"(x));
    return u;
}
#define LDMATRIX1(name, qualifiers)                                                                         \
    __device__ void name(unsigned *r, const void *row) {                                                    \
        asm volatile("ldmatrix.sync.aligned.m8n8.x1" qualifiers ".shared.b16 {%0}, [%1];"                   \
                     : "=r"(r[0]) : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");               \
    }
#define LDMATRIX2(name, qualifiers)                                                                         \
    __device__ void name(unsigned *r, const void *row) {                                                    \
        asm volatile("ldmatrix.sync.aligned.m8n8.x2" qualifiers ".shared.b16 {%0,%1}, [%2];"                \
                     : "=r"(r[0]), "=r"(r[1]) : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");   \
    }
#define LDMATRIX4(name, qualifiers)                                                                         \
    __device__ void name(unsigned *r, const void *row) {                                                    \
        asm volatile("ldmatrix.sync.aligned.m8n8.x4" qualifiers ".shared.b16 {%0,%1,%2,%3}, [%4];"          \
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                       \
                     : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");                            \
    }
LDMATRIX1(ldmatrix_x1, "")
LDMATRIX2(ldmatrix_x2, "")
LDMATRIX4(ldmatrix_x4, "")
LDMATRIX1(ldmatrix_x1_trans, ".trans")
LDMATRIX2(ldmatrix_x2_trans, ".trans")
LDMATRIX4(ldmatrix_x4_trans, ".trans")
__device__ void copy16_async(void *shared, const void *global, bool real = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global), "r"(real ? 16 : 0) : "memory");
}
__device__ void copy4_async(void *shared, const void *global, bool real = true) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global), "r"(real ? 4 : 0) : "memory");
}
__device__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// As in cuda_metala.cu, once more, so that this file stands alone.
#ifdef METALA_WGMMA
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define ASM_90A(...) asm volatile(__VA_ARGS__)
#else
#define ASM_90A(...) __trap()                                  // compiled for other GPUs as well, where test_wgmma does nothing
#endif
#define D_8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D_64(i) D_8(i), D_8(i + 8), D_8(i + 16), D_8(i + 24), D_8(i + 32), D_8(i + 40), D_8(i + 48), D_8(i + 56)
#define D_128 D_64(0), D_64(64)
#define D_NAMES                                                                                             \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"   \
    "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"  \
    "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,"  \
    "%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,"     \
    "%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,"  \
    "%121,%122,%123,%124,%125,%126,%127}"
__device__ void wgmma_bf16(float *d, uint64_t a, uint64_t b) {
    ASM_90A("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " D_NAMES ",%128,%129,1,1,1,0,0;" : D_128 : "l"(a), "l"(b));
}
__device__ void wgmma_tf32(float *d, uint64_t a, uint64_t b) {
    ASM_90A("wgmma.mma_async.sync.aligned.m64n256k8.f32.tf32.tf32 " D_NAMES ",%128,%129,1,1,1;" : D_128 : "l"(a), "l"(b));
}
__device__ void wgmma_hold(float *d) { asm volatile("" : D_128 : : "memory"); }
__device__ void wgmma_start() { ASM_90A("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void wgmma_commit() { ASM_90A("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ void wgmma_wait() { ASM_90A("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
__device__ void wgmma_show() { ASM_90A("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ uint64_t wgmma_operand(const void *rows, unsigned bytes) {
    uint64_t address = (unsigned)__cvta_generic_to_shared(rows) + bytes;
    return (address & 0x3FFFF) >> 4 | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
__device__ void barrier_init(uint64_t *barrier, unsigned count) {
    ASM_90A("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"((unsigned)__cvta_generic_to_shared(barrier)), "r"(count) : "memory");
}
__device__ void barrier_arrive(uint64_t *barrier) {
    ASM_90A("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"((unsigned)__cvta_generic_to_shared(barrier)) : "memory");
}
__device__ void barrier_expect(uint64_t *barrier, unsigned bytes) {
    ASM_90A("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"((unsigned)__cvta_generic_to_shared(barrier)),
            "r"(bytes) : "memory");
}
__device__ void barrier_wait(uint64_t *barrier, unsigned phase) {
    unsigned ended = 0;
    while (!ended)
        ASM_90A("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                : "=r"(ended) : "r"((unsigned)__cvta_generic_to_shared(barrier)), "r"(phase) : "memory");
}
__device__ void bulk_copy(void *shared, const void *global, unsigned bytes, uint64_t *barrier) {
    ASM_90A("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
            ::"r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global), "r"(bytes),
              "r"((unsigned)__cvta_generic_to_shared(barrier)) : "memory");
}
__device__ void barrier_show() { ASM_90A("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ unsigned cluster_size() {
    unsigned size = 1;
    ASM_90A("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
__device__ unsigned cluster_rank() {
    unsigned rank = 0;
    ASM_90A("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ void cluster_wait() {
    ASM_90A("barrier.cluster.arrive.release.aligned;" ::: "memory");
    ASM_90A("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ void barrier_arrive_at(uint64_t *barrier, unsigned rank) {
    ASM_90A("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
            " mbarrier.arrive.shared::cluster.b64 _, [there]; }"
            ::"r"((unsigned)__cvta_generic_to_shared(barrier)), "r"(rank) : "memory");
}
__device__ void bulk_copy_to(unsigned blocks, void *shared, const void *global, unsigned bytes, uint64_t *barrier) {
    ASM_90A("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
            ::"r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global), "r"(bytes),
              "r"((unsigned)__cvta_generic_to_shared(barrier)), "h"((uint16_t)blocks) : "memory");
}
template <class... Parameters, class... Arguments>
void launch_clusters(unsigned size, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
    cudaLaunchAttribute clusters = {};
    cudaLaunchConfig_t launch = {};
    clusters.id = cudaLaunchAttributeClusterDimension;
    clusters.val.clusterDim.x = size, clusters.val.clusterDim.y = clusters.val.clusterDim.z = 1;
    launch.gridDim = grid, launch.blockDim = block, launch.dynamicSmemBytes = shared;
    launch.attrs = &clusters, launch.numAttrs = 1;
    cudaLaunchKernelEx(&launch, kernel, Parameters(arguments)...);
}
#define LAUNCH_CLUSTERS(size, kernel, grid, block, shared, stream, ...) \
    launch_clusters(size, kernel, grid, block, shared, __VA_ARGS__)
#endif
#endif

namespace {

int passed, failed;
void check(const char *name, bool good, const char *detail = "") {
    printf("%-52s %s%s%s\n", name, good ? "ok" : "FAILED", *detail ? "  " : "", detail);
    fflush(stdout);                                              // in a file as well, should the next one hang
    (good ? passed : failed)++;
}
#define CHECK(call)                                                                                          \
    do {                                                                                                     \
        cudaError_t error_ = call;                                                                           \
        if (error_ == cudaSuccess) break;                                                                    \
        fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_));           \
        exit(1);                                                                                             \
    } while (0)

// Memory on the device, and copies of it.
template <class T> T *device(size_t n) {
    T *p;
    CHECK(cudaMalloc(&p, n * sizeof(T)));
    return p;
}
template <class T> T *upload(const std::vector<T> &host) {
    T *p = device<T>(host.size());
    CHECK(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}
template <class T> std::vector<T> download(T *p, size_t n) {     // and frees it
    std::vector<T> host(n);
    CHECK(cudaMemcpy(host.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    CHECK(cudaFree(p));
    return host;
}

// ============================================================== 1. What is emulated

__global__ void indices_kernel(int *out) {
    size_t block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * (size_t)blockIdx.z);
    size_t thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * (size_t)threadIdx.z);
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = (int)(1000 * block + thread);
}
void test_indices() {
    int *out = device<int>(24 * 60);
    LAUNCH(indices_kernel, dim3(2, 3, 4), dim3(5, 4, 3), 0, 0, out);
    CHECK(cudaGetLastError());
    std::vector<int> host = download(out, 24 * 60);
    bool good = true;
    for (int i = 0; i < 24 * 60; i++) good = good && host[i] == 1000 * (i / 60) + i % 60;
    check("grid and block of three dimensions", good);
}

__global__ void votes_kernel(int *out) {                         // 70 threads: the last warp has 6
    int t = threadIdx.x, a = __syncthreads_count(t % 3 == 0), b = __syncthreads_or(t == 69),
        c = __syncthreads_or(t == 70);
    int d = __syncthreads_and(t < 70), e = __syncthreads_and(t < 69);
    out[t] = a * 10000 + b * 1000 + c * 100 + d * 10 + e;
}
void test_votes() {
    int *out = device<int>(70);
    LAUNCH(votes_kernel, 1, 70, 0, 0, out);
    bool good = true;
    for (int v : download(out, 70)) good = good && v == 24 * 10000 + 1000 + 10;
    check("__syncthreads_count, _or, _and", good);
}

template <class T>
__global__ void shuffles_kernel(T *out, int width) {
    int lane = threadIdx.x;
    T x = (T)(100 + lane);
    out[lane] = __shfl_sync(0xFFFFFFFFu, x, 5, width);
    out[32 + lane] = __shfl_xor_sync(0xFFFFFFFFu, x, 3, width);
    out[64 + lane] = __shfl_down_sync(0xFFFFFFFFu, x, 3, width);
    out[96 + lane] = __shfl_up_sync(0xFFFFFFFFu, x, 3, width);
    out[128 + lane] = 0;
    if (lane % 2) out[128 + lane] = __shfl_xor_sync(0xAAAAAAAAu, x, 2, width);                    // the odd lanes alone
}
template <class T>
bool shuffles_are_right(int width) {
    T *out = device<T>(160);
    LAUNCH(shuffles_kernel<T>, 1, 32, 0, 0, out, width);
    std::vector<T> host = download(out, 160);
    bool good = true;
    for (int lane = 0; lane < 32; lane++) {
        int first = lane / width * width, in = lane - first;
        good = good && host[lane] == (T)(100 + first + 5 % width) &&
               host[32 + lane] == (T)(100 + ((in ^ 3) < width ? lane ^ 3 : lane)) &&
               host[64 + lane] == (T)(100 + (in + 3 < width ? lane + 3 : lane)) &&
               host[96 + lane] == (T)(100 + (in >= 3 ? lane - 3 : lane)) &&
               host[128 + lane] == (T)(lane % 2 ? 100 + (lane ^ 2) : 0);
    }
    return good;
}
void test_shuffles() {
    bool good = true;
    for (int width = 4; width <= 32; width *= 2)
        good = good && shuffles_are_right<int>(width) && shuffles_are_right<float>(width) &&
               shuffles_are_right<double>(width);
    check("shuffles of int, float, double; width 4 to 32", good);
}

__global__ void warp_votes_kernel(unsigned *out) {
    int t = threadIdx.x, lane = t % 32;
    unsigned half = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u, all = 0xFFFFFFFFu, x = (unsigned)t;
    unsigned *to = out + 12 * t;
    to[0] = __ballot_sync(all, lane % 3 == 0), to[1] = __ballot_sync(half, lane % 3 == 0);
    to[2] = __any_sync(half, lane == 20), to[3] = __all_sync(half, lane != 20);
    to[4] = __reduce_add_sync(all, x), to[5] = __reduce_add_sync(half, x);
    to[6] = __reduce_max_sync(all, x), to[7] = (unsigned)__reduce_min_sync(all, -t),
    to[8] = __reduce_or_sync(half, 1u << lane);
    to[9] = __match_any_sync(all, t % 4), to[10] = __reduce_xor_sync(all, x), to[11] = __reduce_and_sync(all, x | 1);
}
void test_warp_votes() {
    unsigned *out = device<unsigned>(64 * 12);
    LAUNCH(warp_votes_kernel, 1, 64, 0, 0, out);
    std::vector<unsigned> host = download(out, 64 * 12);
    bool good = true;
    for (int t = 0; t < 64; t++) {
        int lane = t % 32, low = lane < 16, base = t / 32 * 32;
        const unsigned third = 0x49249249u, half = low ? 0x0000FFFFu : 0xFFFF0000u, *x = &host[12 * t];
        unsigned add_half = low ? 120 + 16 * (unsigned)base : 376 + 16 * (unsigned)base;
        good = good && x[0] == third && x[1] == (third & half) && x[2] == !low && x[3] == (unsigned)low &&
               x[4] == 496 + 32 * (unsigned)base && x[5] == add_half && x[6] == (unsigned)base + 31 &&
               x[7] == (unsigned)-(base + 31) && x[8] == half && x[9] == 0x11111111u << t % 4 && x[10] == 0 &&
               x[11] == ((unsigned)base | 1);
    }
    check("ballot, any, all, match, reduce; halves of a warp", good);
}

template <int TILE>
__global__ void transpose_kernel(float *to, const float *from, int n) {
    __shared__ float tile[TILE][TILE + 1];
    DYNAMIC_SHARED(float, copy);
    int x = threadIdx.x, y = threadIdx.y, column = blockIdx.x * TILE + x, row = blockIdx.y * TILE + y;
    if (row < n && column < n) tile[y][x] = from[row * n + column];
    __syncthreads();
    copy[y * TILE + x] = tile[x][y];
    __syncthreads();
    column = blockIdx.y * TILE + x, row = blockIdx.x * TILE + y;
    if (row < n && column < n) to[row * n + column] = copy[y * TILE + x];
}
void test_shared() {
    const int n = 37;
    std::vector<float> from(n * n);
    for (int i = 0; i < n * n; i++) from[i] = (float)i;
    float *a = upload(from), *b = device<float>(n * n), *c = device<float>(n * n);
    LAUNCH(transpose_kernel<16>, dim3(3, 3), dim3(16, 16), 16 * 16 * 4, 0, b, a, n);
    LAUNCH((transpose_kernel<8>), dim3(5, 5), dim3(8, 8), 8 * 8 * 4, 0, c, b, n);
    CHECK(cudaGetLastError());
    check("shared memory, static in a template and dynamic", download(c, n * n) == from);
    CHECK(cudaFree(a));
    CHECK(cudaFree(b));
}

// One warp: d[16][8] += a[16][K] b[K][8] with operands straight from global memory.
__global__ void mma_kernel(float *d16, float *d8, const float *a, const float *b) {
    int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    unsigned x[4], y[2];
    float d[4] = {1, 2, 3, 4};
    for (int r = 0; r < 4; r++) {
        const float *p = a + (g + r % 2 * 8) * 16 + 2 * t + r / 2 * 8;
        __nv_bfloat162 pair = __floats2bfloat162_rn(p[0], p[1]);
        memcpy(&x[r], &pair, 4);
    }
    for (int r = 0; r < 2; r++) {
        const float *p = b + (2 * t + 8 * r) * 8 + g;
        __nv_bfloat162 pair = __floats2bfloat162_rn(p[0], p[8]);
        memcpy(&y[r], &pair, 4);
    }
    mma_bf16(d, x, y);
    for (int i = 0; i < 4; i++) d16[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i] - (float)(i + 1), d[i] = 0;
    for (int r = 0; r < 4; r++) x[r] = to_tf32(a[(g + r % 2 * 8) * 16 + t + r / 2 * 4]);
    for (int r = 0; r < 2; r++) y[r] = to_tf32(b[(t + 4 * r) * 8 + g]);
    mma_tf32(d, x, y);
    for (int i = 0; i < 4; i++) d8[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}
void test_mma() {
    std::vector<float> a(256), b(128);
    for (int i = 0; i < 256; i++) a[i] = (float)(i * 37 % 61 - 30);                               // exact in 8 bits
    for (int i = 0; i < 128; i++) b[i] = (float)(i * 29 % 53 - 26);
    float *x = upload(a), *y = upload(b), *d16 = device<float>(128), *d8 = device<float>(128);
    LAUNCH(mma_kernel, 1, 32, 0, 0, d16, d8, x, y);
    CHECK(cudaGetLastError());
    std::vector<float> of16 = download(d16, 128), of8 = download(d8, 128);
    bool good16 = true, good8 = true;
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 8; column++) {
            float sum = 0;
            for (int k = 0; k < 16; k++) {
                sum += a[row * 16 + k] * b[k * 8 + column];
                if (k == 7) good8 = good8 && of8[row * 8 + column] == sum;
            }
            good16 = good16 && of16[row * 8 + column] == sum;
        }
    check("mma m16n8k16 of bfloat16", good16);
    check("mma m16n8k8 of tf32", good8);
    CHECK(cudaFree(x));
    CHECK(cudaFree(y));
}

#if !defined(__CUDACC__) || defined(METALA_WGMMA)
// Four warps: d[64][256] = a[64] b[256]ᵀ, rows of 128 bytes, 64 numbers in bfloat16 or 32 in tf32.
enum { NOTHING, NOT_SHOWN, NOT_STARTED, OVERWRITTEN, READ_EARLY, WRITTEN_EARLY, NOT_COMMITTED, NOT_ALIGNED, BEYOND, NO_SWIZZLE,
       THREE_WARPS, TWO_OPERANDS };
template <bool BFLOAT16>
__global__ void wgmma_kernel(float *d, const uint4 *a, const uint4 *b, int bug) {
    DYNAMIC_SHARED(uint4, rows);
    const unsigned thread = threadIdx.x, lane = thread % 32;
    float sum[128] = {};
#ifdef __CUDACC__
    bug = NOTHING;                                               // and sum stays in registers
#endif
    for (unsigned n = thread; n < 320 * 8; n += 128)             // the 16 bytes p of row i at place p ^ i%8
        copy16_async(rows + n / 8 * 8 + (n % 8 ^ n / 8 % 8), n < 64 * 8 ? a + n : b + n - 64 * 8, true);
    copy_commit();
    copy_wait<0>();
    if (bug != NOT_SHOWN) wgmma_show();
    __syncthreads();
    if (bug == THREE_WARPS && thread >= 96) return;
    wgmma_hold(sum);
    if (bug != NOT_STARTED) wgmma_start();
    for (unsigned part = 0; part < 4; part++) {
        uint64_t left = wgmma_operand(rows + (bug == NOT_ALIGNED ? 8 : bug == BEYOND ? 264 * 8 : 0), 32 * part),
                 right = wgmma_operand(rows + 64 * 8, 32 * (bug == TWO_OPERANDS && thread >= 64 ? 0 : part));
        if (bug == NO_SWIZZLE) left &= ~((uint64_t)3 << 62);
        if (BFLOAT16) wgmma_bf16(sum, left, right);
        else wgmma_tf32(sum, left, right);
    }
    if (bug != NOT_COMMITTED) wgmma_commit();
    if (bug == OVERWRITTEN) rows[thread] = make_uint4(0, 0, 0, 0);
    float early = bug == READ_EARLY ? sum[5] : 0;
    if (bug == WRITTEN_EARLY) sum[5] = 1;
    wgmma_wait<0>();
    wgmma_hold(sum);
    for (unsigned i = 0; i < 128; i++)
        d[(thread / 32 * 16 + lane / 4 + i % 4 / 2 * 8) * 256 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sum[i] + early;
}
template <bool BFLOAT16>
bool multiply_by_warpgroup(int bug) {
    const int K = BFLOAT16 ? 64 : 32, bytes = 128 / K;
    std::vector<unsigned char> x(320 * 128);
    auto number = [](int row, int k) { return (float)((row * 37 + k * 11) % 61 - 30); };           // exact in 8 bits
    for (int i = 0; i < 320; i++)
        for (int k = 0; k < K; k++) {
            float value = number(i, k);
            memcpy(&x[i * 128 + k * bytes], (char *)&value + 4 - bytes, bytes);                    // of bfloat16 the upper half
        }
    uint4 *rows = (uint4 *)upload(x);
    float *d = device<float>(64 * 256);
    LAUNCH(wgmma_kernel<BFLOAT16>, 1, 128, 320 * 128, 0, d, rows, rows + 64 * 8, bug);
    CHECK(cudaGetLastError());
    std::vector<float> got = download(d, 64 * 256);
    CHECK(cudaFree(rows));
    for (int i = 0; i < 64; i++)
        for (int j = 0; j < 256; j++) {
            float sum = 0;
            for (int k = 0; k < K; k++) sum += number(i, k) * number(64 + j, k);
            if (got[i * 256 + j] != sum) return false;
        }
    return true;
}

// A thread of its own has pieces of 64 numbers brought, two ahead of two warps that add them up: out[t] = Σ_p x[64 p + t].
enum { NO_WAIT_FOR_COPIES = 1, NO_WAIT_FOR_ROOM, TOO_MUCH_EXPECTED, NO_BARRIER, ONE_TOO_MANY, MADE_TWICE,
       ODD_SIZE, BEYOND_NUMBERS };
__global__ void relay_kernel(float *out, const float *x, unsigned pieces, int bug) {
    __shared__ __align__(128) float piece[2][64];
    __shared__ uint64_t full[2], empty[2];
#ifdef __CUDACC__
    bug = NOTHING;
#endif
    if (threadIdx.x < 2) {
        if (bug != NO_BARRIER) barrier_init(full + threadIdx.x, 1);
        if (bug == MADE_TWICE) barrier_init(full + threadIdx.x, 1);
        barrier_init(empty + threadIdx.x, 2);
        wgmma_show();
    }
    __syncthreads();
    if (threadIdx.x < 64) {
        float sum = 0;
        for (unsigned p = 0; p < pieces; p++) {
            if (bug != NO_WAIT_FOR_COPIES) barrier_wait(full + p % 2, p / 2 % 2);
            sum += piece[p % 2][threadIdx.x];
            __syncwarp();
            if (threadIdx.x % 32 == 0 || bug == ONE_TOO_MANY) barrier_arrive(empty + p % 2);
        }
        out[threadIdx.x] = sum;
    } else if (threadIdx.x == 64)
        for (unsigned p = 0; p < pieces; p++) {
            if (bug != NO_WAIT_FOR_ROOM) barrier_wait(empty + p % 2, p / 2 % 2 ^ 1);
            barrier_expect(full + p % 2, bug == TOO_MUCH_EXPECTED ? 272 : 256);
            bulk_copy(piece[p % 2], x + 64 * (p + (bug == BEYOND_NUMBERS)), bug == ODD_SIZE ? 252 : 256, full + p % 2);
        }
}
bool relay(int bug) {
    const unsigned pieces = 7;
    std::vector<float> numbers(64 * pieces);
    for (size_t i = 0; i < numbers.size(); i++) numbers[i] = (float)(i * i % 101);
    float *x = upload(numbers), *out = device<float>(64);
    LAUNCH(relay_kernel, 1, 96, 0, 0, out, x, pieces, bug);
    CHECK(cudaGetLastError());
    std::vector<float> got = download(out, 64);
    CHECK(cudaFree(x));
    for (unsigned t = 0; t < 64; t++) {
        float sum = 0;
        for (unsigned p = 0; p < pieces; p++) sum += numbers[64 * p + t];
        if (got[t] != sum) return false;
    }
    return true;
}

// The same by two blocks of a cluster, each with its threads and all of the numbers, of which it has one half brought to both.
// Two such clusters; the second one begins a piece later.
enum { HERE_ALONE = 20, TO_ONE, NO_LAST_MEETING, NOT_ALL_MEET, NO_SUCH_BLOCK, STATIC_BARRIER, NO_FIRST_MEETING };
__global__ void cluster_kernel(float *out, const float *x, unsigned pieces, int bug) {
    DYNAMIC_SHARED(float, memory);                               // piece[2][64], full[2], empty[2]
    __shared__ uint64_t here[2];
    uint64_t *full = (uint64_t *)(memory + 2 * 64), *empty = full + 2;
    const unsigned rank = cluster_rank(), blocks = cluster_size();
#ifdef __CUDACC__
    bug = NOTHING;
#endif
    if (bug == STATIC_BARRIER) empty = here;
    if (threadIdx.x < 2) {
        barrier_init(full + threadIdx.x, 1);
        barrier_init(empty + threadIdx.x, 2 * blocks);
        wgmma_show(), barrier_show();
    }
    if (bug == NO_FIRST_MEETING) __syncthreads();
    else cluster_wait();
    x += blockIdx.x / blocks * 64;
    if (threadIdx.x < 64) {
        float sum = 0;
        for (unsigned p = 0; p < pieces; p++) {
            barrier_wait(full + p % 2, p / 2 % 2);
            sum += memory[p % 2 * 64 + threadIdx.x];
            __syncwarp();
            if (threadIdx.x % 32 < (bug == HERE_ALONE ? 1 : blocks))
                barrier_arrive_at(empty + p % 2, bug == HERE_ALONE ? rank : threadIdx.x % 32 + (bug == NO_SUCH_BLOCK));
        }
        out[blockIdx.x * 64 + threadIdx.x] = sum;
    } else {
        for (unsigned p = 0; p < pieces && threadIdx.x == 64; p++) {
            barrier_wait(empty + p % 2, p / 2 % 2 ^ 1);
            barrier_expect(full + p % 2, 256);
            const unsigned half = rank * 32;
            bulk_copy_to(bug == TO_ONE ? 1u << rank : 3, memory + p % 2 * 64 + half, x + 64 * p + half, 128, full + p % 2);
        }
        __syncwarp();
    }
    if (bug != NO_LAST_MEETING && (bug != NOT_ALL_MEET || threadIdx.x < 64)) cluster_wait();
}
bool relay_in_clusters(int bug, unsigned size = 2, unsigned grid = 4) {
    const unsigned pieces = 7;
    std::vector<float> numbers(64 * (pieces + 1));
    for (size_t i = 0; i < numbers.size(); i++) numbers[i] = (float)(i * i % 101);
    float *x = upload(numbers), *out = device<float>(4 * 64);
    LAUNCH_CLUSTERS(size, cluster_kernel, grid, 96, 2 * 64 * 4 + 4 * 8, 0, out, x, pieces, bug);
    CHECK(cudaGetLastError());
    std::vector<float> got = download(out, 4 * 64);
    CHECK(cudaFree(x));
    for (unsigned t = 0; t < 4 * 64; t++) {
        float sum = 0;
        for (unsigned p = 0; p < pieces; p++) sum += numbers[64 * (p + t / 128) + t % 64];
        if (got[t] != sum) return false;
    }
    return true;
}
void test_wgmma() {
    int major;
    CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    if (major != 9) return (void)puts("wgmma: not on this GPU");
    check("wgmma m64n256k16 of bfloat16, four steps of k", multiply_by_warpgroup<true>(NOTHING));
    check("wgmma m64n256k8 of tf32, four steps of k", multiply_by_warpgroup<false>(NOTHING));
    check("mbarrier and copies in bulk", relay(NOTHING));
    check("clusters: arrivals and copies in bulk at two blocks", relay_in_clusters(NOTHING));
}
#else
void test_wgmma() { puts("wgmma: not compiled"); }
#endif

__global__ void ldmatrix_kernel(unsigned *out) {                 // matrix m, row i, column j is 1000m + 10i + j
    __shared__ __align__(16) uint16_t rows[32][8];
    int lane = threadIdx.x;
    for (int j = 0; j < 8; j++) rows[lane][j] = (uint16_t)(1000 * (lane / 8) + 10 * (lane % 8) + j);
    __syncwarp();
    unsigned r[14];
    ldmatrix_x4(r, rows[lane]);
    ldmatrix_x4_trans(r + 4, rows[lane]);
    ldmatrix_x2(r + 8, rows[lane % 16]);
    ldmatrix_x2_trans(r + 10, rows[lane % 16]);
    ldmatrix_x1(r + 12, rows[lane % 8]);
    ldmatrix_x1_trans(r + 13, rows[lane % 8]);
    for (int i = 0; i < 14; i++) out[lane * 14 + i] = r[i];
}
void test_ldmatrix() {
    unsigned *out = device<unsigned>(32 * 14);
    LAUNCH(ldmatrix_kernel, 1, 32, 0, 0, out);
    std::vector<unsigned> host = download(out, 32 * 14);
    bool good = true;
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, t = lane % 4;
        auto pair = [](int a, int b) { return (unsigned)a | (unsigned)b << 16; };
        const int matrix_of[14] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 0, 1, 0, 0},
                  transposed[14] = {0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 1};
        for (int i = 0; i < 14; i++) {
            int m = 1000 * matrix_of[i];
            unsigned expected = transposed[i] ? pair(m + 20 * t + g, m + 20 * t + 10 + g)
                                              : pair(m + 10 * g + 2 * t, m + 10 * g + 2 * t + 1);
            good = good && host[lane * 14 + i] == expected;
        }
    }
    check("ldmatrix x1, x2, x4, straight and transposed", good);
}

// Sums n strips of 128 numbers; three stages, each thread loads 16 bytes of a strip and reads others' numbers.
__global__ void pipeline_kernel(float *sums, const float *x, int n, int bug) {
    __shared__ __align__(16) float strip[3][128];
    int t = threadIdx.x;
    float sum = 0;
    auto load = [&](int s) {
        if (s < n) copy16_async(&strip[s % 3][4 * t], x + s * 128 + 4 * t, t < 31);               // the last 4 as zeros
        copy_commit();
    };
    load(0);
    load(1);
    for (int s = 0; s < n; s++) {
        if (bug == 1) copy_wait<2>();                            // one stage short
        else copy_wait<1>();
        if (bug == 2) load(s + 2);                               // into the stage that others may still read
        __syncthreads();
        if (bug != 2) load(s + 2);
        for (int i = 0; i < 4; i++) sum += strip[s % 3][(32 * i + t + 7) % 128];
    }
    sums[t] = sum;
}
bool pipeline(int bug) {
    const int n = 9;
    std::vector<float> x(n * 128), expected(32);
    for (int i = 0; i < n * 128; i++) x[i] = (float)(i % 97);
    for (int s = 0; s < n; s++)
        for (int t = 0; t < 32; t++)
            for (int i = 0; i < 4; i++)
                if (int at = (32 * i + t + 7) % 128; at < 124) expected[t] += x[s * 128 + at];
    float *from = upload(x), *sums = device<float>(32);
    LAUNCH(pipeline_kernel, 1, 32, 0, 0, sums, from, n, bug);
    CHECK(cudaFree(from));
    return download(sums, 32) == expected;
}
void test_pipeline() { check("cp.async in three stages, with zeros beyond the end", pipeline(0)); }

__global__ void atomics_kernel(int *counter, unsigned *most, unsigned long long *sum, int *once) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(counter, 1);
    atomicMax(most, i * 7919 % 1009);
    atomicAdd(sum, (unsigned long long)i);
    if (atomicCAS(once, 0, 1) == 0) atomicAdd(once, 10);
    atomicSub(counter, (int)(i % 2));
}
void test_atomics() {
    int *counter = upload(std::vector<int>{0}), *once = upload(std::vector<int>{0});
    unsigned *most = upload(std::vector<unsigned>{0});
    unsigned long long *sum = upload(std::vector<unsigned long long>{0});
    LAUNCH(atomics_kernel, 10, 100, 0, 0, counter, most, sum, once);
    unsigned highest = 0;
    for (unsigned i = 0; i < 1000; i++) highest = i * 7919 % 1009 > highest ? i * 7919 % 1009 : highest;
    check("atomics on integers", download(counter, 1)[0] == 500 && download(most, 1)[0] == highest &&
                                     download(sum, 1)[0] == 499500 && download(once, 1)[0] == 11);
}

// Rounding, by the definition: the nearest of the two neighbours, the even one when both are as near.
__global__ void numbers_kernel(unsigned *out, const float *x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    bf16 b = __float2bfloat16(x[i]);
    __half h = __float2half(x[i]);
    uint16_t b_bits, h_bits;
    memcpy(&b_bits, &b, 2);
    memcpy(&h_bits, &h, 2);
    float back = __half2float(h);
    out[4 * i] = b_bits, out[4 * i + 1] = h_bits, out[4 * i + 2] = to_tf32(x[i]) & 0xFFFFE000u;
    memcpy(&out[4 * i + 3], &back, 4);
}
bool rounds_to(double x, double got, int digits, double least_step) { // got has so many binary digits, or is a multiple
    double step = std::fmax(std::ldexp(1, std::ilogb(x == 0 ? 1 : x) + 1 - digits), least_step),
           below = std::floor(x / step) * step;
    double up = below + step - x, down = x - below;
    return up < down   ? got == below + step
           : down < up ? got == below
                       : std::fmod(got / step, 2) == 0 && std::fabs(got - x) == up;
}
void test_numbers() {
    std::vector<float> x = {
        0, 1, -1, 1.00390625f, 1.01171875f, 65504, 1e-7f, 5.9604645e-08f, 8.9406967e-08f, 6.1e-05f, 3.1415927f};
    for (unsigned i = 0; i < 2000; i++)
        x.push_back(std::ldexp((float)(i * 2654435761u >> 8) - 8388608.f, (int)(i % 36) - 43));
    const unsigned unwritten = 0xFFFFFFFFu;                          // a NaN, and must remain one
    x.push_back(0), memcpy(&x.back(), &unwritten, 4);
    float *from = upload(x);
    unsigned *out = device<unsigned>(4 * x.size());
    LAUNCH(numbers_kernel, (unsigned)(x.size() + 63) / 64, 64, 0, 0, out, from, (int)x.size());
    std::vector<unsigned> bits = download(out, 4 * x.size());
    bool b = true, h = true, t = true, n = false;
    for (size_t i = 0; i < x.size(); i++) {
        float as_bf16, as_tf32, as_half;
        unsigned u = bits[4 * i] << 16, half = bits[4 * i + 1];
        memcpy(&as_bf16, &u, 4);
        memcpy(&as_tf32, &bits[4 * i + 2], 4);
        memcpy(&as_half, &bits[4 * i + 3], 4);
        if (x[i] != x[i]) {
            n = as_bf16 != as_bf16 && as_tf32 != as_tf32 && as_half != as_half;
            continue;
        }
        int exponent = half >> 10 & 31;
        double of_bits = (exponent ? std::ldexp(1024 + (half & 1023), exponent - 25) : std::ldexp(half & 1023, -24)) *
                         (half >> 15 ? -1 : 1);
        b = b && rounds_to(x[i], as_bf16, 8, 0);
        t = t && std::fabs(as_tf32 - x[i]) <= std::ldexp(1, std::ilogb(x[i] == 0 ? 1 : x[i]) - 11);
        if (std::fabs(x[i]) < 65520) h = h && rounds_to(x[i], as_half, 11, std::ldexp(1, -24)) && of_bits == as_half;
    }
    check("bfloat16 rounds to nearest even", b);
    check("half rounds to nearest even, denormals too", h);
    check("tf32 rounds to nearest", t);
    check("what nobody wrote stays a NaN when it is rounded", n);
    CHECK(cudaFree(from));
}

__constant__ float factors[3];
__global__ void scale_kernel(float *x, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] *= factors[i % 3];
}
__global__ void sum_big_kernel(float *to, int n) {               // needs more than 48 KB
    DYNAMIC_SHARED(float, x);
    for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] = 1;
    __syncthreads();
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[n - 1 - i];
    to[threadIdx.x] = sum;
}
void test_runtime() {
    const float three[3] = {2, 3, 5};
    std::vector<float> x(30, 1);
    float *p = upload(x), *grid = device<float>(20), ms = -1, small_copy[3];
    CHECK(cudaMemcpyToSymbol(factors, three, sizeof three));
    cudaStream_t stream;
    cudaEvent_t start, stop;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&stop));
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    LAUNCH(scale_kernel, 1, 32, 0, stream, p, 30);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&ready, graph, 0));
    CHECK(cudaEventRecord(start, stream));
    for (int i = 0; i < 3; i++) CHECK(cudaGraphLaunch(ready, stream));
    CHECK(cudaEventRecord(stop, stream));
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    x = download(p, 30);
    check("a captured graph runs three times, events, a constant", x[0] == 8 && x[1] == 27 && x[29] == 125 && ms >= 0);
    CHECK(cudaGraphExecDestroy(ready));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    check("what waits spoils a capture", cudaMemcpy(small_copy, p, sizeof small_copy, cudaMemcpyDeviceToHost) != cudaSuccess &&
          cudaStreamEndCapture(stream, &graph) != cudaSuccess && !graph && cudaGetLastError() != cudaSuccess);
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    float *more = nullptr;
    cudaError_t allocated = cudaMalloc(&more, 4), freed = cudaFree(p);
    LAUNCH(scale_kernel, 1, 32, 0, 0, p, 30);
    check("a capture: memory taken and freed, and another stream", allocated == cudaErrorStreamCaptureUnsupported && freed &&
          cudaGetLastError() == cudaErrorStreamCaptureImplicit && cudaStreamEndCapture(stream, &graph) != cudaSuccess && !graph);
    cudaGetLastError();
    check("the default stream is not captured", cudaStreamBeginCapture(0, cudaStreamCaptureModeThreadLocal) != cudaSuccess &&
          cudaGetLastError() != cudaSuccess);
    CHECK(cudaEventDestroy(start));
    CHECK(cudaEventDestroy(stop));
    CHECK(cudaStreamDestroy(stream));

    std::vector<float> small = {1, 2, 3, 4, 5, 6}, wide(20);     // 2×3 into 4×5
    CHECK(cudaMemset(grid, 0, 80));
    CHECK(cudaMemcpy2D(grid + 6, 20, small.data(), 12, 12, 2, cudaMemcpyHostToDevice));
    wide = download(grid, 20);
    check("copies of rows",
          wide[6] == 1 && wide[8] == 3 && wide[9] == 0 && wide[11] == 4 && wide[13] == 6 && wide[0] == 0);

    const int n = 20000;
    float *sums = device<float>(256), *managed, *pinned;
    CHECK(cudaFuncSetAttribute(sum_big_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n * 4));
    LAUNCH(sum_big_kernel, 1, 256, n * 4, 0, sums, n);
    CHECK(cudaGetLastError());
    float total = 0;
    for (float s : download(sums, 256)) total += s;
    check("80 kB of shared memory, after cudaFuncSetAttribute", total == n);

    CHECK(cudaMallocManaged(&managed, 4));
    CHECK(cudaMallocHost(&pinned, 4));
    *managed = 1, *pinned = 7;
    LAUNCH(scale_kernel, 1, 1, 0, 0, managed, 1);
    CHECK(cudaDeviceSynchronize());
    check("managed and pinned memory are the host's as well", *managed == 2 && *pinned == 7);
    CHECK(cudaFree(managed));
    CHECK(cudaFreeHost(pinned));

    void *much = &much;
    size_t free_bytes, all_bytes;
    CHECK(cudaMemGetInfo(&free_bytes, &all_bytes));
    cudaError_t error = cudaMalloc(&much, all_bytes + 1);
    check("out of memory is an error, once",
          error == cudaErrorMemoryAllocation && cudaGetLastError() == error && cudaGetLastError() == 0 &&
              !strcmp(cudaGetErrorName(error), "cudaErrorMemoryAllocation") && free_bytes <= all_bytes);
}

// ============================================================== 2. Mistakes

#if !defined(__CUDACC__) || defined(PTX_ON_CPU)
// Each prints "wrong result" when the result shows the mistake.
void result(bool right) {
    if (!right) fprintf(stderr, "wrong result\n");
}
bool all_equal(const std::vector<float> &x, float y) {
    for (float v : x)
        if (!(v == y)) return false;
    return true;
}

enum { N = 64 };                                                 // threads of the blocks below

__global__ void neighbour_kernel(float *to, int bug) {
    __shared__ float x[N];
    int t = threadIdx.x;
    float sum = 0;
    for (int round = 0; round < 3; round++) {
        x[t] = (float)(t * round);
        if (bug != 1) __syncthreads();
        sum += x[(t + 1) % N] - x[t] * (t == N - 1 ? 0 : 1);
        if (bug != 2) __syncthreads();
    }
    to[t] = t == N - 1 ? 3 : sum;
}
void run_neighbour(int bug) {
    float *to = device<float>(N);
    LAUNCH(neighbour_kernel, 1, N, 0, 0, to, bug);
    result(all_equal(download(to, N), 3));
}
// A barrier is missing between two warps, but each of them meets itself so often that they keep step unless one runs ahead.
__global__ void keep_step_kernel(float *to) {
    __shared__ float x[N];
    float sum = 0;
    x[threadIdx.x] = 1;
    __syncthreads();
    for (int round = 0; round < 40; round++) sum += __shfl_xor_sync(~0u, sum, 1);
    sum += x[(threadIdx.x + 32) % N];
    for (int round = 0; round < 40; round++) sum += 0 * __shfl_xor_sync(~0u, sum, 1);
    x[threadIdx.x] = 2;
    to[threadIdx.x] = sum;
}
void no_barrier_between_warps_in_step() {
    float *to = device<float>(N);
    LAUNCH(keep_step_kernel, 1, N, 0, 0, to);
    result(all_equal(download(to, N), 1));
}
void no_barrier_after_write() { run_neighbour(1); }
void no_barrier_before_overwrite() { run_neighbour(2); }

__global__ void barrier_kernel(int *to, int bug) {
    int t = threadIdx.x;
    if (bug == 2 && t == 63) return;
    if (bug == 1 && t < 32) __syncthreads();
    for (int i = 0; bug == 3 && i < 1 + t / 32; i++) __syncthreads();
    if (bug == 4 && t % 2) __syncthreads();
    else if (bug == 4) to[t] = __shfl_xor_sync(0xFFFFFFFFu, t, 1);
    __syncthreads();
    to[t] = t;
}
void run_barrier(int bug) {
    int *to = device<int>(N);
    LAUNCH(barrier_kernel, 1, N, 0, 0, to, bug);
}
void barrier_in_a_branch() { run_barrier(1); }
void return_before_a_barrier() { run_barrier(2); }
void barrier_in_an_uneven_loop() { run_barrier(3); }
void shuffle_against_barrier() { run_barrier(4); }

__global__ void lanes_kernel(int *to, int bug) {
    int t = threadIdx.x, lane = t % 32;
    if (bug == 1 && lane < 16) to[t] = __shfl_down_sync(0xFFFFFFFFu, t, 1);
    if (bug == 2) to[t] = __shfl_xor_sync(0x0000FFFFu, t, 1);
    if (bug == 3 && lane < 16) to[t] = __shfl_xor_sync(0x0000FFFFu, t, 16);
    if (bug == 4) to[t] = lane < 16 ? __shfl_xor_sync(0xFFFFFFFFu, t, 1) : __ballot_sync(0xFFFFFFFFu, 1);
    if (bug == 5) to[t] = __shfl_xor_sync(0xFFFFFFFFu, t, 1, 12);
}
void run_lanes(int bug, int threads) {
    int *to = device<int>(N);
    LAUNCH(lanes_kernel, 1, threads, 0, 0, to, bug);
}
void shuffle_in_half_a_warp() { run_lanes(1, N); }
void mask_without_the_caller() { run_lanes(2, N); }
void shuffle_from_beyond_the_mask() { run_lanes(3, N); }
void different_operations() { run_lanes(4, N); }
void odd_width() { run_lanes(5, N); }
void full_mask_in_a_part_of_a_warp() { run_lanes(1, 48); }

__global__ void warp_sum_kernel(float *to) {                     // as before Volta: lanes are taken to move as one
    __shared__ float x[32];
    int t = threadIdx.x;
    x[t] = 1;
    for (int d = 16; d > 0; d /= 2)
        if (t < d) x[t] += x[t + d];
    to[t] = x[0];
}
void no_syncwarp() {
    float *to = device<float>(32);
    LAUNCH(warp_sum_kernel, 1, 32, 0, 0, to);
    result(all_equal(download(to, 32), 32));
}

__global__ void unwritten_kernel(float *to, const float *from, int bug) {
    __shared__ float x[N + 1];
    int t = threadIdx.x;
    x[t] = 1;
    __syncthreads();
    to[t] = bug ? x[t + 1] : from[t];
}
void unwritten_shared_memory() {
    float *to = device<float>(N), *from = device<float>(N);
    LAUNCH(unwritten_kernel, 1, N, 0, 0, to, from, 1);
    result(all_equal(download(to, N), 1));
}
void unwritten_global_memory() {
    float *to = device<float>(N), *from = device<float>(N);
    LAUNCH(unwritten_kernel, 1, N, 0, 0, to, from, 0);
    result(all_equal(download(to, N), 0));
}

__global__ void beyond_kernel(float *to, int bug, int by) {
    __shared__ float fixed[N];
    DYNAMIC_SHARED(float, x);
    int t = threadIdx.x;
    x[t] = 1;
    float *first = fixed;                                        // which UBSan does not know to be N long
    first[(bug == 1 ? by : 0) + t] = 2;
    if (bug == 2) x[t + by] = 3;
    if (bug == 3) to[t + by] = 4;
    if (bug == 4) to[t] = to[t + by];
    if (bug != 3) to[t] = fixed[t] + x[t];
}
void run_beyond(int bug, int by) {
    float *to = device<float>(N);
    LAUNCH(beyond_kernel, 1, N, bug ? N * 4 : N * 4 - 4, 0, to, bug, by);
}
void beyond_static_shared_memory() { run_beyond(1, 1); }
void beyond_dynamic_shared_memory() { run_beyond(2, 8); }
void right_behind_dynamic_shared_memory() { run_beyond(0, 1); }  // one float less than the threads write
void right_behind_an_allocation() {
    float *to = device<float>(N - 1);
    LAUNCH(beyond_kernel, 1, N, N * 4, 0, to, 0, 0);
}
void far_behind_an_allocation() { run_beyond(3, 2000); }
void before_an_allocation() { run_beyond(4, -2000); }

__global__ void add_one_kernel(float *x) { x[threadIdx.x] += 1; }
void host_follows_a_device_pointer() {
    volatile float *x = device<float>(N);
    printf("%g\n", x[3]);
}
void kernel_follows_a_host_pointer() {
    static float x[N];
    LAUNCH(add_one_kernel, 1, N, 0, 0, x);
}
void copy_overruns() {
    float host[N] = {}, *x = device<float>(N);
    cudaMemcpy(x + 1, host, sizeof host, cudaMemcpyHostToDevice);
}
void copy_the_wrong_way() {
    float host[N] = {}, *x = device<float>(N);
    cudaMemcpy(x, host, sizeof host, cudaMemcpyDeviceToHost);
}
void free_twice() {
    float *x = device<float>(N);
    cudaFree(x);
    cudaFree(x);
}
void free_the_middle() { cudaFree(device<float>(N) + 4); }
void use_after_free() {
    float *x = device<float>(N);
    CHECK(cudaFree(x));
    LAUNCH(add_one_kernel, 1, N, 0, 0, x);
}
void never_freed() { device<float>(N); }
void too_many_threads() { LAUNCH(add_one_kernel, 1, 1025, 0, 0, device<float>(N)); }
void too_large_a_grid() { LAUNCH(add_one_kernel, dim3(1, 1, 65536), 1, 0, 0, device<float>(N)); }
void too_much_shared_memory() { LAUNCH(add_one_kernel, 1, 1, 50000, 0, device<float>(N)); }
void a_stream_that_is_gone() {
    cudaStream_t s = 0;
    CHECK(cudaStreamCreate(&s));
    CHECK(cudaStreamDestroy(s));
    LAUNCH(add_one_kernel, 1, 1, 0, s, device<float>(N));
}

void wait_one_stage_short() { result(pipeline(1)); }
void load_what_is_still_read() { result(pipeline(2)); }
__global__ void ldmatrix_bug_kernel(unsigned *to, const uint16_t *from, int bug) {
    __shared__ __align__(16) uint16_t rows[33][8];
    unsigned r[4];
    for (int i = 0; i < 8; i++) rows[threadIdx.x][i] = 1;
    __syncwarp();
    ldmatrix_x4(r, bug ? from : rows[threadIdx.x] + 1);
    to[threadIdx.x] = r[0];
}
void ldmatrix_not_aligned() { LAUNCH(ldmatrix_bug_kernel, 1, 32, 0, 0, device<unsigned>(32), device<uint16_t>(64), 0); }
void ldmatrix_from_global_memory() {
    LAUNCH(ldmatrix_bug_kernel, 1, 32, 0, 0, device<unsigned>(32), device<uint16_t>(64), 1);
}

#ifndef __CUDACC__                                               // nvcc's wgmma_kernel has no bugs
void wgmma_before_copies_are_shown() { multiply_by_warpgroup<true>(NOT_SHOWN); }
void wgmma_without_a_start() { multiply_by_warpgroup<true>(NOT_STARTED); }
void wgmma_operand_overwritten() { multiply_by_warpgroup<false>(OVERWRITTEN); }
void wgmma_sum_read_before_the_wait() { result(multiply_by_warpgroup<true>(READ_EARLY)); }
void wgmma_sum_written_before_the_wait() { multiply_by_warpgroup<true>(WRITTEN_EARLY); }
void wgmma_operand_beyond_shared_memory() { multiply_by_warpgroup<true>(BEYOND); }
void wgmma_operand_without_swizzle() { multiply_by_warpgroup<true>(NO_SWIZZLE); }
void wgmma_on_an_older_gpu() { emu::heap.capability = 86, multiply_by_warpgroup<true>(NOTHING); }
void wgmma_without_a_commit() { result(multiply_by_warpgroup<true>(NOT_COMMITTED)); }
void wgmma_operand_not_aligned() { multiply_by_warpgroup<true>(NOT_ALIGNED); }
void wgmma_by_three_warps() { multiply_by_warpgroup<true>(THREE_WARPS); }
void wgmma_of_two_operands() { multiply_by_warpgroup<true>(TWO_OPERANDS); }
void copies_not_waited_for() { relay(NO_WAIT_FOR_COPIES); }
void copies_over_what_is_read() { relay(NO_WAIT_FOR_ROOM); }
void phase_that_never_ends() { relay(TOO_MUCH_EXPECTED); }
void barrier_that_nobody_made() { relay(NO_BARRIER); }
void more_arrive_than_expected() { relay(ONE_TOO_MANY); }
void barrier_made_twice() { relay(MADE_TWICE); }
void copy_in_bulk_of_an_odd_size() { relay(ODD_SIZE); }
void copy_in_bulk_from_beyond() { relay(BEYOND_NUMBERS); }
void barrier_on_an_older_gpu() { emu::heap.capability = 86, relay(NOTHING); }
void arrival_at_one_block_of_two() { relay_in_clusters(HERE_ALONE); }
void copy_to_one_block_of_two() { relay_in_clusters(TO_ONE); }
void blocks_that_end_too_early() { relay_in_clusters(NO_LAST_MEETING); }
void blocks_that_begin_too_early() { relay_in_clusters(NO_FIRST_MEETING); }
void meeting_without_a_warp() { relay_in_clusters(NOT_ALL_MEET); }
void arrival_at_no_block() { relay_in_clusters(NO_SUCH_BLOCK); }
void static_barrier_in_a_cluster() { relay_in_clusters(STATIC_BARRIER); }
void clusters_that_do_not_fit_the_grid() { relay_in_clusters(NOTHING, 2, 3); }
void clusters_on_an_older_gpu() { emu::heap.capability = 86, relay_in_clusters(NOTHING); }
#endif

__global__ void chain_kernel(float *x) {                         // block b needs what block b - 1 wrote
    if (blockIdx.x) x[blockIdx.x] = x[blockIdx.x - 1] + 1;
}
void blocks_that_need_each_other() {
    std::vector<float> host(9);
    float *x = upload(host);
    LAUNCH(chain_kernel, 9, 1, 0, 0, x);
    result(download(x, 9)[8] == 8);
}
__global__ void float_atomics_kernel(float *x) { atomicAdd(x, 1.f); }
void float_atomics() {
    LAUNCH(float_atomics_kernel, 1, N, 0, 0, upload(std::vector<float>{0}));
}
void no_synchronisation() {                                      // CUDA_ASYNC=1
    float *pinned, *x = upload(std::vector<float>{0});
    CHECK(cudaMallocHost(&pinned, 4));
    LAUNCH(add_one_kernel, 1, 1, 0, 0, x);
    CHECK(cudaMemcpyAsync(pinned, x, 4, cudaMemcpyDeviceToHost, 0));
    result(*pinned == 1);
}
__global__ void divide_kernel(int *x, int by) { x[threadIdx.x] = 100 / by; }
void division_by_zero() { LAUNCH(divide_kernel, 1, 1, 0, 0, device<int>(1), 0); }
__device__ int deep(volatile int *x, int n) {
    volatile int room[500];
    room[n % 500] = *x;
    return n ? deep(room, n - 1) + room[n % 500] : 0;
}
__global__ void deep_kernel(int *x) { x[0] = deep(x, 2000); }
void stack_overflow() { LAUNCH(deep_kernel, 1, 1, 0, 0, device<int>(1)); }

#if defined(__x86_64__) || defined(__i386__)
#define TRAPS(words) words
#else
#define TRAPS(words) NULL                                        // other processors divide by zero and go on
#endif
// What must be said without a sanitizer, by the address sanitizer, by the thread sanitizer, by ptx_on_cpu.cpp; NULL: nothing, as
// it cannot be seen there, or is allowed.
const struct {
    void (*run)();
    const char *name, *plain, *address, *thread, *ptx;
} mistakes[] = {
#define M(name, ...) {name, #name, __VA_ARGS__}
    M(no_barrier_after_write, "wrong result", "wrong result", "data race", "a race"),
    M(no_barrier_before_overwrite, "wrong result", "wrong result", "data race", "a race"),
    M(no_barrier_between_warps_in_step, "wrong result", "wrong result", "data race", "a race"),
    M(barrier_in_a_branch, "barrier divergence", "barrier divergence", "barrier divergence", "at different barriers"),
    M(return_before_a_barrier, "threads 63: have returned", "threads 63: have returned", "threads 63: have returned", NULL),
    M(barrier_in_an_uneven_loop, "barrier divergence", "barrier divergence", "barrier divergence", "at different barriers"),
    M(shuffle_against_barrier, "lanes of its mask that never come", "lanes of its mask", "lanes of its mask", "never come"),
    M(shuffle_in_half_a_warp, "lanes of its mask that never come", "lanes of its mask", "lanes of its mask", "have ended"),
    M(mask_without_the_caller, "leaves the caller out", "leaves the caller out", "leaves the caller out", "leaves out a lane"),
    M(shuffle_from_beyond_the_mask, "which is not in the mask", "which is not in the mask", "which is not in the mask", "is not in the mask"),
    M(different_operations, "different operations", "different operations", "different operations", "never come"),
    M(odd_width, "a shuffle of width 12", "a shuffle of width 12", "a shuffle of width 12", NULL),
    M(full_mask_in_a_part_of_a_warp, "this warp has 16 threads", "this warp has 16", "this warp has 16", "or never were"),
    M(no_syncwarp, "wrong result", "wrong result", "data race", "a race"),
    M(unwritten_shared_memory, "wrong result", NULL, NULL, "wrong result"),      // the sanitizers' shared arrays are not filled
    M(unwritten_global_memory, "wrong result", "wrong result", "wrong result", "wrong result"),
    M(beyond_static_shared_memory, NULL, "address 0x", NULL, NULL),
    M(beyond_dynamic_shared_memory, "of dynamic shared memory", "heap-buffer-overflow", NULL, "of shared memory"),
    M(right_behind_dynamic_shared_memory, "wrote behind the 252 bytes", "heap-buffer-overflow", "wrote behind", "of shared memory"),
    M(right_behind_an_allocation, "before or behind allocation 1 (252", "heap-buffer-overflow", "wrote right", "nobody has allocated"),
    M(far_behind_an_allocation, "byte 8000 of allocation 1 (256 bytes", "AddressSanitizer", NULL, "nobody has allocated"),
    M(before_an_allocation, "byte -8000 of allocation 1 (256 bytes", "AddressSanitizer", NULL, "nobody has allocated"),
    M(host_follows_a_device_pointer, "host code reads or writes device memory, byte 12", "host code reads", NULL, NULL),
    M(kernel_follows_a_host_pointer, "argument 1 is no pointer to device", "argument 1 is no", "argument 1 is no", "nobody has allocated"),
    M(copy_overruns, "256 bytes at byte 4 of the destination", "256 bytes at byte 4", "256 bytes at byte 4", NULL),
    M(copy_the_wrong_way, "the destination is device memory", "the destination is device", "the destination is device", NULL),
    M(free_twice, "freed already", "cudaFree(", "freed already", NULL),
    M(free_the_middle, "not the start", "not the start", "not the start", NULL),
    M(use_after_free, "argument 1 is no pointer to device memory", "argument 1 is no", "argument 1 is no", "nobody has allocated"),
    M(never_freed, "never freed, first allocation 1 (256 bytes, emulator/", "never freed", "never freed", NULL),
    M(too_many_threads, "block (1025,1,1)", "block (1025,1,1)", "block (1025,1,1)", NULL),
    M(too_large_a_grid, "grid (1,1,65536)", "grid (1,1,65536)", "grid (1,1,65536)", NULL),
    M(too_much_shared_memory, "50000 bytes of dynamic shared memory; the limit is 49152", "50000 bytes", "50000 bytes", NULL),
    M(a_stream_that_is_gone, "there is no such stream", "there is no such stream", "there is no such stream", NULL),
    M(wait_one_stage_short, "wrong result", "wrong result", "wrong result", "a race"),
    M(load_what_is_still_read, "wrong result", "wrong result", "data race", "a race"),
    M(ldmatrix_not_aligned, "rows start at multiples of 16 bytes", "rows start at", "rows start at", "not a multiple of 16"),
    M(ldmatrix_from_global_memory, "which is not in shared memory", NULL, NULL, "of shared memory"),
#ifndef __CUDACC__
    M(wgmma_before_copies_are_shown, "no wgmma_show followed", "no wgmma_show", "no wgmma_show", NULL),
    M(wgmma_without_a_start, "wgmma without wgmma_start", "without wgmma_start", "without wgmma_start", NULL),
    M(wgmma_operand_overwritten, "was written while wgmma read it", "was written while", "was written while", NULL),
    M(wgmma_sum_read_before_the_wait, "wrong result", "wrong result", "wrong result", NULL),
    M(wgmma_sum_written_before_the_wait, "a sum was written while", "a sum was written", "a sum was written", NULL),
    M(wgmma_operand_beyond_shared_memory, "at byte 40960 of 40960", "at byte 40960", "at byte 40960", NULL),
    M(wgmma_operand_without_swizzle, "only swizzles of 128 bytes", "only swizzles", "only swizzles", NULL),
    M(wgmma_on_an_older_gpu, "only compute capability 9.0", "only compute", "only compute", NULL),
    M(wgmma_without_a_commit, "wrong result", "wrong result", "wrong result", NULL),
    M(wgmma_operand_not_aligned, "at multiples of 1024", "at multiples of 1024", "at multiples of 1024", NULL),
    M(wgmma_by_three_warps, "for wgmma four warps", "for wgmma four warps", "for wgmma four warps", NULL),
    M(wgmma_of_two_operands, "other operands in thread 64", "other operands in", "other operands in", NULL),
    M(copies_not_waited_for, "more threads arrive", "more threads arrive", "more threads arrive", NULL),
    M(copies_over_what_is_read, "more threads arrive", "more threads arrive", "more threads arrive", NULL),
    M(phase_that_never_ends, "and 16 bytes come", "and 16 bytes come", "and 16 bytes come", NULL),
    M(barrier_that_nobody_made, "barrier_init has not made", "barrier_init has not made", "barrier_init has not made", NULL),
    M(barrier_made_twice, "which is a barrier already", "is a barrier already", "is a barrier already", NULL),
    M(copy_in_bulk_of_an_odd_size, "a bulk copy of 252 bytes", "a bulk copy of 252", "a bulk copy of 252", NULL),
    M(copy_in_bulk_from_beyond, "which is not in global memory", "not in global memory", "not in global memory", NULL),
    M(barrier_on_an_older_gpu, "only on compute capability 9.0", "only on compute", "only on compute", NULL),
    M(more_arrive_than_expected, "never ends: 1 threads", "never ends: 1 threads", "never ends: 1 threads", NULL),
    M(arrival_at_one_block_of_two, "threads must still arrive, and 0 bytes", "must still arrive", "must still arrive", NULL),
    M(copy_to_one_block_of_two, "0 threads must still arrive, and 128 bytes", "and 128 bytes", "and 128 bytes", NULL),
    M(blocks_that_end_too_early, "of the cluster has ended", "of the cluster has ended", "of the cluster has ended", NULL),
    M(blocks_that_begin_too_early, "barrier_init has not made", "barrier_init has not made", "barrier_init has not made", NULL),
    M(meeting_without_a_warp, "each cluster_wait by those of the cluster", "each cluster_wait", "each cluster_wait", NULL),
    M(arrival_at_no_block, "there is no block 2 in a cluster of 2", "there is no block 2", "there is no block 2", NULL),
    M(static_barrier_in_a_cluster, "which is a barrier already", "is a barrier already", "is a barrier already", NULL),
    M(clusters_that_do_not_fit_the_grid, "clusters of 2 blocks, and 3 in x", "and 3 in x", "and 3 in x", NULL),
    M(clusters_on_an_older_gpu, "clusters of 2 blocks, and 4 in x", "clusters of 2", "clusters of 2", NULL),
#endif
    M(blocks_that_need_each_other, "wrong result", "wrong result", "wrong result", "wrong result"),
    M(float_atomics, "adds floats atomically", "adds floats atomically", "adds floats atomically", NULL),
    M(no_synchronisation, "wrong result", "wrong result", "wrong result", NULL),
    M(division_by_zero, TRAPS("integer division by zero"), TRAPS("division by zero"), NULL, "division by zero"),
    M(stack_overflow, "its stack of 128 kB is too small", "stack-overflow", NULL, NULL),
};

// Runs this program again for one mistake, in the three orders of threads, until the words appear.
bool noticed(const char *program, const char *name, const char *words, std::string *said) {
    for (const char *order : {"forward", "reverse", "random"}) {
        const char *with = getenv("RUN_WITH");
        std::string command = std::string("CUDA_ASYNC=1 CUDA_ORDER=") + order + " " + (with ? with : "") + " '" +
                              program + "' --mistake " + name + " 2>&1";
        FILE *f = popen(command.c_str(), "r");
        char line[1000];
        said->clear();
        while (f && fgets(line, sizeof line, f)) *said += line;
        if (f) pclose(f);
        if (said->find(words) != std::string::npos) return true;
    }
    return false;
}
int run_mistake(const char *name) {
    for (auto &m : mistakes)
        if (!strcmp(m.name, name)) {
            m.run();
            cudaDeviceSynchronize();
            return 0;
        }
    fprintf(stderr, "selftest: there is no mistake %s\n", name);
    return 2;
}
void test_mistakes(const char *program) {
    for (auto &m : mistakes) {
#if defined(__SANITIZE_ADDRESS__)
        const char *words = m.address;
#elif defined(__SANITIZE_THREAD__)
        const char *words = m.thread;
#elif defined(__CUDACC__)
        const char *words = m.ptx;
#else
        const char *words = m.plain;
#endif
        if (!words) continue;
        std::string name = m.name, said;
        for (char &c : name)
            if (c == '_') c = ' ';
        bool good = noticed(program, m.name, words, &said);
        check(name.c_str(), good, words);
        if (!good) printf("    again: CUDA_ASYNC=1 %s --mistake %s; it said:\n%s", program, m.name, said.c_str());
    }
}
#endif

#ifdef EMU_TRAFFIC
// A warp writes words that lie `stride` words apart to shared memory, or reads them from global memory.
template <class Word, bool SHARED>
__global__ void traffic_kernel(Word *to, const Word *from, int stride) {
    DYNAMIC_SHARED(Word, memory);
    if (SHARED) memory[threadIdx.x * stride] = to[0] = Word();
    else to[0] = from[threadIdx.x * stride];
}
template <class Word, bool SHARED>
void test_cost(const char *name, int stride, double paid, double least) {
    const char *kernel = "(traffic_kernel<Word, SHARED>)";       // the text of the launch
    double before[2], now[2];
    Word *memory = device<Word>(32 * 32);
    emu::traffic_of(kernel, SHARED, &before[0], &before[1]);
    LAUNCH((traffic_kernel<Word, SHARED>), 1, 32, SHARED ? 32 * 32 * sizeof(Word) : 0, 0, memory, memory, stride);
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaFree(memory));
    emu::traffic_of(kernel, SHARED, &now[0], &now[1]);
    check(name, now[0] - before[0] == paid && now[1] - before[1] == least);
}
void test_traffic() {
    test_cost<float, true>("32 words side by side: a cycle", 1, 1, 1);
    test_cost<float, true>("32 words 2 apart: 2 cycles", 2, 2, 1);
    test_cost<float, true>("32 words 3 apart: a cycle", 3, 1, 1);
    test_cost<float, true>("32 words in one bank: 32 cycles", 32, 32, 1);
    test_cost<float, true>("one word for all: a cycle", 0, 1, 1);
    test_cost<float2, true>("32 float2 side by side: 2 cycles", 1, 2, 2);
    test_cost<float4, true>("32 float4 side by side: 4 cycles", 1, 4, 4);
    test_cost<float4, true>("32 float4 in four banks: 32 cycles", 8, 32, 4);
    const double write = 1;                                      // of to[0], in one sector
    test_cost<float, false>("32 floats side by side: 4 sectors", 1, 4 + write, 4 + write);
    test_cost<float, false>("32 floats 2 apart: 8 sectors", 2, 8 + write, 4 + write);
    test_cost<float, false>("32 floats 8 apart: 32 sectors", 8, 32 + write, 4 + write);
    test_cost<float4, false>("32 float4 side by side: 16 sectors", 1, 16 + write, 16 + write);
}
#endif

}  // namespace

int main(int argc, char **argv) {
#if !defined(__CUDACC__) || defined(PTX_ON_CPU)
    if (argc == 3 && !strcmp(argv[1], "--mistake")) return run_mistake(argv[2]);
#endif
    if (argc > 1) {
        fprintf(stderr, "usage: %s\n", argv[0]);
        return 2;
    }
#ifdef EMU_TRAFFIC
    test_traffic();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
#endif
    test_indices();
    test_votes();
    test_shuffles();
    test_warp_votes();
    test_shared();
    test_mma();
    test_wgmma();
    test_ldmatrix();
    test_pipeline();
    test_atomics();
    test_numbers();
    test_runtime();
#if !defined(__CUDACC__) || defined(PTX_ON_CPU)
    test_mistakes(argv[0]);
#endif
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
