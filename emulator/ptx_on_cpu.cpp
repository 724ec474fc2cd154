// ptx_on_cpu.cpp - the CUDA runtime for a machine without a GPU: what nvcc made of the kernels runs on the CPU.
//
//     nvcc --no-compress -lineinfo -gencode arch=compute_80,code=compute_80 -c file.cu
//     g++ -std=c++17 -O2 -march=native -I/usr/local/cuda/include -c emulator/ptx_on_cpu.cpp
//     g++ file.o ptx_on_cpu.o -o file                               in place of -lcudart
//
// cuda_on_cpu.h compiles the text of a .cu file with the CPU's compiler. What it cannot see is what only nvcc reads: inline
// PTX, the text behind #ifdef __CUDACC__, what the optimiser makes of both, and its expf. This file takes the PTX that
// nvcc left in the object file, translates each kernel into a list of instructions when it is first launched, and executes
// them, 32 lanes of a warp at a time. The instructions are those that the kernels here, and selftest.cu, need; others are
// refused by name. Their meaning is that of the PTX ISA (docs.nvidia.com/cuda/parallel-thread-execution).
//
// A warp has one program counter. Where a branch divides its lanes, those further back in the program go first, and join
// the others where they meet. Blocks, or clusters of them, run one after the other, their warps in turn, each until it waits in a
// barrier.
//
// What it notices, with kernel, block, thread, line of the .cu file and instruction:
//     accesses beyond an allocation, shared memory, local memory or the parameters, and addresses not aligned to their size
//     two threads that use a word of shared memory, one of them writing, without a barrier (or __syncwarp) between them
//     barriers, shuffles, votes and products that some of the lanes do not reach, and wrong masks; division by zero
//     phases of mbarriers that never end; kernels launched early that write, end, or read what may still be written, before they
//     have waited for the one before
//     what a stream's capture does not allow
// Fresh memory, global, shared and local, and what cp.async, also in bulk, is about to overwrite, is filled with ones: NaN. Copies
// and the sums of wgmma arrive when they are waited for, those in bulk when nobody can go on, not before; operands of wgmma are
// read at once (that nobody overwrites them meanwhile is cuda_on_cpu.h's to say). Stricter than the ISA: a mask must not name
// lanes that have ended; bytes of one word count as one place.
//
// Environment: CUDA_ORDER=reverse   of warps and blocks         CUDA_CAPABILITY=86   what the device is (as the newest PTX)
//              CUDA_MEMORY=64M      of the device (4G)          CUDA_STATS=1         what was executed, at exit
//
// Contents
//     1. Programs and warps
//     2. Memory
//     3. Arithmetic
//     4. Operations of warps and blocks
//     5. Tensor cores
//     6. From text to programs
//     7. Launches
//     8. The runtime's functions

#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <type_traits>
#include <unordered_set>
#include <utility>
#include <vector>

using std::string;
using std::vector;

namespace {

[[noreturn]] void die(const string &what) {
    fflush(stdout);
    fprintf(stderr, "ptx_on_cpu: %s\n", what.c_str());
    exit(3);
}

// ============================================================== 1. Programs and warps

struct Warp;
struct Instruction;
typedef void (*Execute)(Warp &, const Instruction &);

// Operands are slots: where, in the registers of a warp, the 32 values lie. Constants have slots as well. What the other
// numbers mean stands with each function.
struct Instruction {
    Execute run = nullptr;
    int guard = -1;                                              // slot of a predicate; -1: none
    bool unless = false, control = false;                        // the predicate is negated; run looks at it itself
    int d = 0, a = 0, b = 0, c = 0;
    int64_t offset = 0;
    int mode = 0, target = 0;
    vector<int> list, widths;                                    // slots of {…}, and how many bytes a lane has in each
    int line = 0;                                                // of the PTX, from 0
    string name;
};

struct Parameter { string name; size_t at, bytes; };
struct Constant { int slot; vector<unsigned char> lanes; };

enum { SPECIAL = 14 };              // %tid, %ntid, %ctaid, %nctaid, each with .x, .y, .z; %cluster_ctarank, %cluster_nctarank

struct Kernel {
    string shown;                                                // its name in C++
    size_t body = 0;                                             // the first token
    int max_threads = 1024, max_dynamic = 0;                     // .maxntid; cudaFuncSetAttribute
    vector<Parameter> parameters;
    size_t parameter_bytes = 0, register_bytes = 0, local_bytes = 0, shared_bytes = 0;
    vector<Instruction> code;                                    // empty until it is first launched
    vector<Constant> constants;
    int special[SPECIAL] = {0};                                  // slots of %tid.x …
    uint64_t launches = 0;
    vector<uint64_t> counts;                                     // how often a warp has executed each instruction
};

struct Path { int pc; uint32_t mask; bool parked; };             // parked: it waits for other lanes of its warp
struct Copy { uint64_t to, from; int bytes, real; };
struct Copies { vector<Copy> open; std::deque<vector<Copy>> groups; };

struct Phases { int count, left; int64_t bytes; unsigned phase; vector<Copy> copies; };    // an mbarrier and the copies to it

struct Use {                                                     // of four bytes of shared memory
    uint16_t writer, reader;                                     // thread + 1
    bool lanes, warps;                                           // several lanes of the reader's warp; several warps
    uint32_t write_time, read_time, write_sync, read_sync;       // in barriers of the block, from 1; in those of the warp
};

struct Block {
    Kernel *kernel;
    dim3 grid, size, at;
    vector<unsigned char> parameters, shared;
    vector<Use> uses;
    std::map<uint64_t, Phases> phases;                           // by place in shared memory
    uint64_t steps = 0;                                          // what has happened to them
    bool early = false;                                          // launched before the kernel before may have ended
    vector<uint32_t> waited;                                     // lanes of each warp that have waited for it
    vector<Warp> warps;
    uint32_t time = 1;                                           // barriers so far
    int threads = 0, live = 0;
    int arrived = 0, sum = 0, in_cluster = 0;                    // in the barrier; in that of the cluster
    unsigned rank = 0;
    vector<Block> *cluster = nullptr;                            // which runs together
};

struct Warp {
    Block *block = nullptr;
    int index = 0, pc = 0;                                       // pc: the next instruction
    uint32_t mask = 0, live = 0, on[32];                         // lanes of this path, also one by one; lanes that have not ended
    bool full = true;                                            // this path has all living lanes
    int stop = INT32_MAX;                                        // where the next other path is that is not parked, or INT32_MAX
    vector<Path> others;
    bool waiting = false;                                        // in the barrier
    bool stuck = false;                                          // has just been told that a phase has not ended
    uint32_t syncs = 1;                                          // __syncwarp so far
    unsigned char *registers = nullptr;
    vector<unsigned char> local;
    uint32_t carry[32];
    Copies copies[32];
    struct Sum { vector<float> value; int group; };
    std::map<int, Sum> sums;                                     // of wgmma, by slot, until they are waited for
    int group = 0;                                               // of the next products
    int products = 0;                                            // of a warpgroup, which its four warps make together

    template <class T> T *reg(int slot) { return (T *)(registers + slot); }
    size_t lane_bytes() const { return local.size() / 32; }
    void set(uint32_t m) {
        mask = m, full = m == live;
        for (int l = 0; l < 32; l++) on[l] = m >> l & 1;
    }
    // Takes in the other paths that stand `here`.
    void join(int here, bool parked) {
        for (size_t k = 0; k < others.size();)
            if (others[k].pc == here && (parked || !others[k].parked)) {
                set(mask | others[k].mask);
                others.erase(others.begin() + (long)k);
            } else k++;
        stop = INT32_MAX;
        for (Path &p : others)
            if (!p.parked) stop = std::min(stop, p.pc);
    }
    // Goes on with the path that is furthest back; false when there is none.
    bool next() {
        if (stop == INT32_MAX) return false;
        mask = 0, pc = stop;
        join(pc, false);
        return true;
    }
    // When this path has come to where another one stands, or beyond.
    void meet() {
        join(pc, false);
        if (pc > stop) others.push_back({pc, mask, false}), next();
    }
};

vector<string> ptx_lines;
vector<int> place_of_line;                                       // in source_places, or -1
vector<string> source_places;                                    // "file.cu:12"

[[noreturn]] void fail(const Warp &w, const Instruction &i, int lane, const string &what) {
    const Block &b = *w.block;
    unsigned t = (unsigned)(w.index * 32 + lane);
    char where[200];
    snprintf(where, sizeof where, ": block (%u,%u,%u), thread (%u,%u,%u): ", b.at.x, b.at.y, b.at.z, t % b.size.x,
             t / b.size.x % b.size.y, t / b.size.x / b.size.y);
    int place = place_of_line[(size_t)i.line];
    die(b.kernel->shown + where + what + (place >= 0 ? "\n    " + source_places[(size_t)place] : "") + "\n    PTX line " +
        std::to_string(i.line + 1) + ": " + ptx_lines[(size_t)i.line]);
}
int first_lane(const Warp &w) { return __builtin_ctz(w.mask); }

// Are the lanes here that an instruction needs together? If not, this path is parked, and comes here again with the others.
bool together(Warp &w, const Instruction &i, uint32_t need) {
    if (need & ~w.live) fail(w, i, first_lane(w), "lanes that have ended, or never were, are needed here");
    if ((w.mask & need) != need) w.join(w.pc - 1, true);
    if ((w.mask & need) == need) return true;
    if (w.stop == INT32_MAX) fail(w, i, first_lane(w), "lanes that are needed here never come");
    w.others.push_back({w.pc - 1, w.mask, true});
    w.mask = 0;
    return false;
}
bool whole(Warp &w, const Instruction &i) { return together(w, i, w.live); }

// ============================================================== 2. Memory

std::map<uint64_t, uint64_t> allocations;                        // from the first byte to the one behind the last
uint64_t last_from, last_to;                                     // the one that was used last
size_t memory_used, memory_limit = (size_t)4 << 30;

void *allocate(size_t bytes) {
    if (bytes > memory_limit - memory_used) return nullptr;
    char *p = (char *)aligned_alloc(256, (bytes / 256 + 1) * 256);
    if (!p) return nullptr;
    memset(p, 0xFF, bytes);
    allocations[(uint64_t)p] = (uint64_t)p + bytes, memory_used += bytes;
    return p;
}
bool release(void *p) {
    auto it = allocations.find((uint64_t)p);
    if (it == allocations.end()) return false;
    memory_used -= it->second - it->first;
    allocations.erase(it);
    last_from = last_to = 0;
    return free(p), true;
}
inline bool covers(uint64_t a, size_t n) {
    if (a >= last_from && a <= last_to && n <= last_to - a) return true;
    auto it = allocations.upper_bound(a);
    if (it == allocations.begin()) return false;
    --it;
    if (a > it->second || n > it->second - a) return false;
    last_from = it->first, last_to = it->second;
    return true;
}

// Was a word of shared memory used by another thread, with nothing since that orders the two?
[[noreturn]] void race(Warp &w, const Instruction &i, int lane, bool write, uint64_t word, int thread, const char *did) {
    fail(w, i, lane,
         string(write ? "writes" : "reads") + " the word at byte " + std::to_string(4 * word) +
             " of shared memory, which thread " + std::to_string(thread - 1) + did + " with no barrier since: a race");
}
inline void look_for_race(Warp &w, const Instruction &i, int lane, uint64_t word, bool write) {
    Use &u = w.block->uses[word];
    const int me = w.index * 32 + lane + 1;
    auto mine = [&](int thread) { return (thread - 1) / 32 == w.index; };
    const uint32_t time = w.block->time;
    if (u.write_time == time && u.writer != me && !(mine(u.writer) && u.write_sync < w.syncs))
        race(w, i, lane, write, word, u.writer, " wrote");
    bool read = u.read_time == time && !(mine(u.reader) && !u.warps && u.read_sync < w.syncs);
    if (write) {
        if (read && (u.warps || u.lanes || u.reader != me))
            race(w, i, lane, write, word, u.reader, u.warps || u.lanes ? " and others read" : " read");
        u.writer = (uint16_t)me, u.write_time = time, u.write_sync = w.syncs;
    } else {
        if (!read) u.reader = (uint16_t)me, u.lanes = u.warps = false;
        else if (!mine(u.reader)) u.warps = true;
        else if (u.reader != me) u.lanes = true;
        u.read_time = time, u.read_sync = w.syncs;
    }
}

enum Space { GLOBAL, SHARED, LOCAL, PARAM, GENERIC };
const uint64_t SHARED_WINDOW = 0x7F00000000000000, WINDOW_BYTES = 1 << 24;   // generic addresses of shared memory

[[noreturn]] void outside(Warp &w, const Instruction &i, int lane, uint64_t a, size_t n, bool write, size_t bytes,
                          const char *what) {
    fail(w, i, lane, string(write ? "writes " : "reads ") + std::to_string(n) + " bytes at byte " + std::to_string((int64_t)a) +
                         " of the " + std::to_string(bytes) + " of " + what);
}
// Lines of 128 bytes of global memory that kernels have written since the last copy, or from the last one on that was not launched
// early: until an early kernel has waited, it must read none of them.
std::unordered_set<uint64_t> written_lines;
uint64_t last_written_line;

// Where the n bytes at address a are, which must be there.
inline unsigned char *memory(Warp &w, const Instruction &i, int lane, Space space, uint64_t a, size_t n, bool write) {
    if (a & (n - 1)) fail(w, i, lane, "an address that is not a multiple of " + std::to_string(n));
    if (space == GENERIC) {
        space = a - SHARED_WINDOW < WINDOW_BYTES ? SHARED : GLOBAL;
        if (space == SHARED) a -= SHARED_WINDOW;
    }
    if (space == GLOBAL) {
        if (!covers(a, n)) fail(w, i, lane, string(write ? "writes" : "reads") + " global memory that nobody has allocated");
        if (write && a / 128 != last_written_line) written_lines.insert(last_written_line = a / 128);
        if (w.block->early && !(w.block->waited[w.index] >> lane & 1) && (write || written_lines.count(a / 128)))
            fail(w, i, lane, string(write ? "writes" : "reads what an earlier kernel has written") +
                                 " before griddepcontrol.wait, in a kernel that may begin before the one before has ended");
        return (unsigned char *)a;
    }
    Block &b = *w.block;
    size_t bytes = space == SHARED ? b.shared.size() : space == LOCAL ? w.lane_bytes() : b.kernel->parameter_bytes;
    if (a > bytes || n > bytes - a)
        outside(w, i, lane, a, n, write, bytes,
                space == SHARED  ? "shared memory"
                : space == LOCAL ? "local memory"
                                 : "the parameters");
    if (space == LOCAL) return w.local.data() + (size_t)lane * bytes + a;
    if (space == PARAM) return b.parameters.data() + a;
    for (uint64_t word = a / 4; word <= (a + n - 1) / 4; word++) look_for_race(w, i, lane, word, write);
    return b.shared.data() + a;
}

// ld and st of list.size() values of SIZE bytes. The address is a + offset, in registers of 8 bytes (mode & WIDE) or 4.
enum { SIGNED = 1, WIDE = 8 };
uint64_t address(Warp &w, const Instruction &i, int lane) {
    return i.mode & WIDE ? w.reg<uint64_t>(i.a)[lane] + (uint64_t)i.offset : w.reg<uint32_t>(i.a)[lane] + (uint32_t)i.offset;
}
int64_t extend(int64_t v, int bytes, bool is_signed) {
    int unused = 64 - 8 * bytes;
    return is_signed ? (int64_t)((uint64_t)v << unused) >> unused : (int64_t)((uint64_t)v << unused >> unused);
}
template <int SPACE, int SIZE> void load(Warp &w, const Instruction &i) {
    size_t n = i.list.size();
    for (int l = 0; l < 32; l++) {
        if (!w.on[l]) continue;
        const unsigned char *p = memory(w, i, l, (Space)SPACE, address(w, i, l), n * SIZE, false);
        for (size_t k = 0; k < n; k++) {
            if (i.widths[k] == SIZE) {
                memcpy(w.registers + i.list[k] + l * SIZE, p + k * SIZE, SIZE);
                continue;
            }
            int64_t v = 0;
            memcpy(&v, p + k * SIZE, SIZE);
            v = extend(v, SIZE, i.mode & SIGNED);
            memcpy(w.registers + i.list[k] + l * i.widths[k], &v, (size_t)i.widths[k]);
        }
    }
}
template <int SPACE, int SIZE> void store(Warp &w, const Instruction &i) {
    size_t n = i.list.size();
    for (int l = 0; l < 32; l++) {
        if (!w.on[l]) continue;
        unsigned char *p = memory(w, i, l, (Space)SPACE, address(w, i, l), n * SIZE, true);
        for (size_t k = 0; k < n; k++) memcpy(p + k * SIZE, w.registers + i.list[k] + l * i.widths[k], SIZE);
    }
}

// Atomics of global memory. target is the operation, d the old value (-1: not wanted), b the number; CAS puts c where b was.
enum Atomic { ADD, MAX, MIN, AND, OR, XOR, EXCHANGE, CAS };
template <class T> void atomic(Warp &w, const Instruction &i) {
    for (int l = 0; l < 32; l++) {
        if (!w.on[l]) continue;
        T *p = (T *)memory(w, i, l, GLOBAL, address(w, i, l), sizeof(T), true), old = *p, b = w.reg<T>(i.b)[l];
        switch (i.target) {
        case ADD: *p = old + b; break;
        case MAX: *p = std::max(old, b); break;
        case MIN: *p = std::min(old, b); break;
        case EXCHANGE: *p = b; break;
        case CAS: *p = old == b ? w.reg<T>(i.c)[l] : old; break;
        default:
            if constexpr (std::is_integral<T>::value) *p = i.target == AND ? old & b : i.target == OR ? old | b : old ^ b;
        }
        if (i.d >= 0) w.reg<T>(i.d)[l] = old;
    }
}

// cp.async: d + target in shared memory, a + offset in global, mode bytes, of which b are read (-1: all), the others zeros.
void copy_async(Warp &w, const Instruction &i) {
    for (int l = 0; l < 32; l++) {
        if (!w.on[l]) continue;
        uint64_t to = w.reg<uint32_t>(i.d)[l] + (uint32_t)i.target, from = w.reg<uint64_t>(i.a)[l] + (uint64_t)i.offset;
        int real = i.b >= 0 ? w.reg<int>(i.b)[l] : i.mode;
        size_t bytes = (size_t)i.mode;
        if (real < 0 || real > i.mode) fail(w, i, l, "more bytes to read than to copy");
        memset(memory(w, i, l, SHARED, to, bytes, true), 0xFF, bytes);
        if (real) memory(w, i, l, GLOBAL, from, bytes, false);
        w.copies[l].open.push_back({to, from, i.mode, real});
    }
}
void copy_commit(Warp &w, const Instruction &) {
    for (int l = 0; l < 32; l++)
        if (w.on[l]) w.copies[l].groups.push_back(std::move(w.copies[l].open)), w.copies[l].open.clear();
}
void copy_wait(Warp &w, const Instruction &i) {                  // until offset groups are left
    for (int l = 0; l < 32; l++)
        while (w.on[l] && w.copies[l].groups.size() > (size_t)i.offset) {
            for (Copy &c : w.copies[l].groups.front()) {
                unsigned char *p = memory(w, i, l, SHARED, c.to, (size_t)c.bytes, true);     // it may arrive as late as now
                memcpy(p, (const void *)c.from, (size_t)c.real);
                memset(p + c.real, 0, (size_t)(c.bytes - c.real));
            }
            w.copies[l].groups.pop_front();
        }
}

void wait_for_before(Warp &w, const Instruction &) { w.block->waited[(size_t)w.index] |= w.mask; }

// ---- mbarriers: of each as many threads as `count` arrive in a phase, and bytes come. The 8 bytes themselves are left alone.
uint64_t place_of_phases(Warp &w, const Instruction &i, int lane) {
    uint64_t at = w.reg<uint32_t>(i.a)[lane] + (uint64_t)i.offset;
    memory(w, i, lane, SHARED, at % WINDOW_BYTES, 8, false);
    return at;
}
// Another block of the cluster; its shared memory has addresses from (rank + 1)·WINDOW_BYTES on, those of one's own from 0.
Block &block_of(Warp &w, const Instruction &i, int lane, uint64_t rank) {
    vector<Block> &all = *w.block->cluster;
    const string block = "block " + std::to_string(rank);
    if (rank >= all.size()) fail(w, i, lane, "no " + block + " in a cluster of " + std::to_string(all.size()));
    if (!all[rank].live) fail(w, i, lane, block + " of the cluster has ended");
    return all[rank];
}
Phases &phases_of(Warp &w, const Instruction &i, int lane, uint64_t at) {
    Block &b = at < WINDOW_BYTES ? *w.block : block_of(w, i, lane, at / WINDOW_BYTES - 1);
    auto p = b.phases.find(at % WINDOW_BYTES);
    if (p == b.phases.end()) fail(w, i, lane, "no mbarrier is there");
    return p->second;
}
void map_address(Warp &w, const Instruction &i) {                // d: a in the shared memory of block b
    for (int l = 0; l < 32; l++)
        if (w.on[l]) w.reg<uint32_t>(i.d)[l] = (uint32_t)(w.reg<uint32_t>(i.a)[l] + (w.reg<uint32_t>(i.b)[l] + 1) * WINDOW_BYTES);
}
void end_phase(Phases &p) {
    if (!p.left && !p.bytes) p.left = p.count, p.phase++;
}
void begin_phases(Warp &w, const Instruction &i) {               // b: count
    for (int l = 0; l < 32; l++) {
        if (!w.on[l]) continue;
        int count = w.reg<int>(i.b)[l];
        if (count < 1 || !w.block->phases.insert({place_of_phases(w, i, l), {count, count, 0, 0, {}}}).second)
            fail(w, i, l, "an mbarrier for nobody, or for the second time");
    }
}
void arrive_in_phase(Warp &w, const Instruction &i) {            // b: bytes to expect as well, or -1
    for (int l = 0; l < 32; l++) {
        if (!w.on[l]) continue;
        Phases &p = phases_of(w, i, l, place_of_phases(w, i, l));
        w.block->steps++;
        if (!p.left) fail(w, i, l, "more threads arrive in a phase than there are");
        p.left--, p.bytes += i.b >= 0 ? w.reg<uint32_t>(i.b)[l] : 0;
        end_phase(p);
    }
}
void try_phase(Warp &w, const Instruction &i) {                  // d: has the phase that is b modulo 2 ended?
    for (int l = 0; l < 32; l++) {
        if (!w.on[l]) continue;
        bool ended = (phases_of(w, i, l, place_of_phases(w, i, l)).phase & 1) != (w.reg<uint32_t>(i.b)[l] & 1);
        w.reg<uint32_t>(i.d)[l] = ended;
        if (ended) w.block->steps++;
        else w.stuck = true;
    }
}
// cp.async.bulk: c bytes from a + offset to d + target in shared memory, for the mbarrier at b + mode; list: of which blocks.
void copy_in_bulk(Warp &w, const Instruction &i) {
    for (int l = 0; l < 32; l++) {
        if (!w.on[l]) continue;
        uint64_t to = w.reg<uint32_t>(i.d)[l] + (uint64_t)i.target, from = w.reg<uint64_t>(i.a)[l] + (uint64_t)i.offset;
        size_t bytes = w.reg<uint32_t>(i.c)[l];
        unsigned blocks = i.list.empty() ? 1u << w.block->rank : w.reg<uint16_t>(i.list[0])[l];
        if (to % 16 || from % 16 || bytes % 16) fail(w, i, l, "a copy in bulk that is not of multiples of 16");
        for (size_t n = 0; n < bytes; n += 16) {
            memory(w, i, l, GLOBAL, from + n, 16, false);
            memory(w, i, l, SHARED, to + n, 16, false);          // who may use it, the phase says
        }
        for (uint64_t rank = 0; blocks >> rank; rank++) {
            if (!(blocks >> rank & 1)) continue;
            memset(&block_of(w, i, l, rank).shared[to], 0xFF, bytes);
            uint64_t at = (rank + 1) * WINDOW_BYTES + w.reg<uint32_t>(i.b)[l] + (uint64_t)i.mode;
            phases_of(w, i, l, at).copies.push_back({to, from, (int)bytes, (int)bytes});
        }
    }
}
bool bring_copies(Block &b) {                                    // did any come?
    bool some = false;
    for (auto &at : b.phases) {
        Phases &p = at.second;
        for (const Copy &c : p.copies) memcpy(&b.shared[c.to], (const void *)c.from, (size_t)c.bytes), p.bytes -= c.bytes;
        some = some || !p.copies.empty();
        p.copies.clear();
        end_phase(p);
    }
    return some;
}

// ============================================================== 3. Arithmetic

// What the lanes that are not on have in their registers must stay, unless they have ended.
#define LANES(...)                                                                \
    if (w.full) {                                                                 \
        _Pragma("GCC ivdep") for (int l = 0; l < 32; l++) { __VA_ARGS__; }        \
    } else                                                                        \
        for (int l = 0; l < 32; l++)                                              \
            if (w.on[l]) { __VA_ARGS__; }
template <class D, class S, class F> void one(Warp &w, const Instruction &i) {
    D *d = w.reg<D>(i.d);
    const S *a = w.reg<S>(i.a);
    LANES(d[l] = (D)F::f(a[l]))
}
template <class D, class S, class F> void two(Warp &w, const Instruction &i) {
    D *d = w.reg<D>(i.d);
    const S *a = w.reg<S>(i.a), *b = w.reg<S>(i.b);
    LANES(d[l] = (D)F::f(a[l], b[l]))
}
template <class D, class S, class C, class F> void three(Warp &w, const Instruction &i) {
    D *d = w.reg<D>(i.d);
    const S *a = w.reg<S>(i.a), *b = w.reg<S>(i.b);
    const C *c = w.reg<C>(i.c);
    LANES(d[l] = (D)F::f(a[l], b[l], c[l]))
}
template <class T> struct wide;
template <> struct wide<int16_t> { typedef int32_t type; };
template <> struct wide<uint16_t> { typedef uint32_t type; };
template <> struct wide<int32_t> { typedef int64_t type; };
template <> struct wide<uint32_t> { typedef uint64_t type; };
template <> struct wide<int64_t> { typedef __int128 type; };
template <> struct wide<uint64_t> { typedef unsigned __int128 type; };
template <class T> using Wide = typename wide<T>::type;
template <class T> T high(T a, T b) { return (T)(((Wide<T>)a * b) >> 8 * sizeof(T)); }

#define OP1(name, ...) struct name { template <class T> static auto f(T a) { return __VA_ARGS__; } };
#define OP2(name, ...) struct name { template <class T> static auto f(T a, T b) { return __VA_ARGS__; } };
#define OP3(name, ...) struct name { template <class T, class C> static auto f(T a, T b, C c) { return __VA_ARGS__; } };
OP1(Move, a)
OP1(Negate, (T)-a)
OP1(Not, (T)~a)
OP1(NotPredicate, a ^ 1u)
OP1(Absolute, (T)(a < 0 ? -a : a))
OP1(AbsoluteReal, (T)fabs(a))
OP1(Root, (T)sqrt(a))
OP1(Reciprocal, (T)(1 / a))
OP1(PowerOfTwo, (T)exp2(a))
OP1(LeadingZeros, a ? __builtin_clzll((unsigned long long)a) - (int)(64 - 8 * sizeof(T)) : (int)(8 * sizeof(T)))
OP1(Ones, __builtin_popcountll((unsigned long long)a))
OP2(Add, (T)(a + b))
OP2(Subtract, (T)(a - b))
OP2(Multiply, (T)(a * b))
OP2(MultiplyHigh, high(a, b))
OP2(MultiplyWide, (Wide<T>)a * b)
OP2(Divide, (T)(a / b))
OP2(And, (T)(a & b))
OP2(Or, (T)(a | b))
OP2(Xor, (T)(a ^ b))
OP2(Least, a != a || b < a || (b == a && std::signbit((double)b)) ? b : a)       // the other one when one is NaN; -0 < 0
OP2(Most, a != a || b > a || (b == a && std::signbit((double)a)) ? b : a)
OP2(SignOf, (T)copysign(b, a))                                   // b with the sign of a
OP2(Equal, a == b)
OP2(NotEqual, a < b || a > b)                                    // false for NaN, as all but those that end in u
OP2(Less, a < b)
OP2(LessEqual, a <= b)
OP2(Greater, a > b)
OP2(GreaterEqual, a >= b)
OP2(EqualU, !(a < b || a > b))
OP2(NotEqualU, a != b)
OP2(LessU, !(a >= b))
OP2(LessEqualU, !(a > b))
OP2(GreaterU, !(a <= b))
OP2(GreaterEqualU, !(a < b))
OP2(Numbers, a == a && b == b)
OP2(NotNumbers, a != a || b != b)
OP3(MultiplyAdd, (T)(a * b + c))
OP3(MultiplyAddHigh, (T)(high(a, b) + c))
OP3(MultiplyAddWide, (Wide<T>)a * b + c)
OP3(Select, c ? a : b)
struct Fused {
    static float f(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
    static double f(double a, double b, double c) { return __builtin_fma(a, b, c); }
};
struct FusedDown {                                               // rounded downwards; exact unless the sum needs more than 53 bits
    static float f(float a, float b, float c) {
        double x = (double)a * b + c;
        float y = (float)x;
        return y > x ? nextafterf(y, -INFINITY) : y;
    }
};
struct AddTowardsZero {
    static float f(float a, float b) {
        double x = (double)a + b;
        float y = (float)x;
        return fabs((double)y) > fabs(x) ? nextafterf(y, 0) : y;
    }
};

template <class T, bool LEFT> void shift(Warp &w, const Instruction &i) {
    T *d = w.reg<T>(i.d);
    const T *a = w.reg<T>(i.a);
    const uint32_t *b = w.reg<uint32_t>(i.b), bits = 8 * sizeof(T);
    LANES(d[l] = b[l] >= bits ? (T)(!LEFT && a[l] < 0 ? -1 : 0) : LEFT ? (T)(a[l] << b[l]) : (T)(a[l] >> b[l]))
}
template <class T, bool REMAINDER> void divide(Warp &w, const Instruction &i) {
    for (int l = 0; l < 32; l++) {
        if (!w.on[l]) continue;
        T a = w.reg<T>(i.a)[l], b = w.reg<T>(i.b)[l];
        if (!b) fail(w, i, l, "division by zero");
        w.reg<T>(i.d)[l] = REMAINDER ? (T)(a % b) : (T)(a / b);
    }
}
void insert_bits(Warp &w, const Instruction &i) {                // bfi: list[1] bits of a at bit list[0] of b
    const uint32_t *a = w.reg<uint32_t>(i.a), *b = w.reg<uint32_t>(i.b), *at = w.reg<uint32_t>(i.list[0]),
                   *n = w.reg<uint32_t>(i.list[1]);
    uint32_t *d = w.reg<uint32_t>(i.d);
    LANES(uint32_t to = std::min(at[l] & 255, 63u); uint64_t m = ((1ull << std::min(n[l] & 255, 63u)) - 1) << to;
          d[l] = (uint32_t)((b[l] & ~m) | ((uint64_t)a[l] << to & m)))
}
void pick_bytes(Warp &w, const Instruction &i) {                 // prmt: byte n of d is that of b:a which digit n of list[0] says
    const uint32_t *a = w.reg<uint32_t>(i.a), *b = w.reg<uint32_t>(i.b), *digits = w.reg<uint32_t>(i.list[0]);
    uint32_t *d = w.reg<uint32_t>(i.d);
    LANES(uint64_t both = (uint64_t)b[l] << 32 | a[l]; uint32_t all = 0;
          for (unsigned n = 0; n < 4; n++) all |= (uint32_t)(both >> (digits[l] >> 4 * n & 7) * 8 & 255) << 8 * n;
          if (digits[l] & 0x8888) fail(w, i, l, "prmt of signs, which is not emulated");
          d[l] = all)
}
// add, sub, mul and mad of 32 bits that pass a carry on.
enum { TAKES = 1, GIVES = 2, SUBTRACTS = 4, LOW = 8, HIGH = 16 };
void with_carry(Warp &w, const Instruction &i) {
    for (int l = 0; l < 32; l++) {
        if (!w.on[l]) continue;
        uint64_t a = w.reg<uint32_t>(i.a)[l], b = w.reg<uint32_t>(i.b)[l], carry = i.mode & TAKES ? w.carry[l] : 0;
        if (i.mode & (LOW | HIGH)) a = i.mode & LOW ? (uint32_t)(a * b) : a * b >> 32, b = w.reg<uint32_t>(i.c)[l];
        uint64_t sum = i.mode & SUBTRACTS ? a - b - carry : a + b + carry;
        w.reg<uint32_t>(i.d)[l] = (uint32_t)sum;
        if (i.mode & GIVES) w.carry[l] = sum >> 32 & 1;
    }
}
template <bool PACK> void pieces(Warp &w, const Instruction &i) { // mov between d or a of mode bytes, and {list}
    for (int l = 0; l < 32; l++) {
        unsigned char *whole = w.registers + (PACK ? i.d : i.a) + l * i.mode;
        for (size_t k = 0; w.on[l] && k < i.list.size(); whole += i.widths[k++]) {
            unsigned char *part = w.registers + i.list[k] + l * i.widths[k];
            memcpy(PACK ? whole : part, PACK ? part : whole, (size_t)i.widths[k]);
        }
    }
}

// cvt. Rounded to whole numbers, of a float or an integer type, as mode says.
enum { NEAREST, ZERO, DOWN, UP, WHOLE = 4, SATURATE = 8 };
double to_whole(double x, int mode) {
    return mode == NEAREST ? nearbyint(x) : mode == ZERO ? trunc(x) : mode == DOWN ? floor(x) : ceil(x);
}
template <class D, class S> void convert(Warp &w, const Instruction &i) {
    D *d = w.reg<D>(i.d);
    const S *a = w.reg<S>(i.a);
    LANES(d[l] = (D)a[l])
}
template <class D, class S> void convert_to_integer(Warp &w, const Instruction &i) {
    typedef std::numeric_limits<D> limits;                       // NaN becomes 0, or the highest bit where 64 bits are involved
    const D none = sizeof(S) == 8 || sizeof(D) == 8 ? (D)1 << (8 * sizeof(D) - 1) : 0;
    for (int l = 0; l < 32; l++) {
        if (!w.on[l]) continue;
        double x = to_whole((double)w.reg<S>(i.a)[l], i.mode & 3);
        w.reg<D>(i.d)[l] = x != x                       ? none
                           : x <= (double)limits::min() ? limits::min()
                           : x >= (double)limits::max() ? limits::max()
                                                        : (D)x;
    }
}
template <class D, class S> void convert_to_real(Warp &w, const Instruction &i) {
    for (int l = 0; l < 32; l++) {
        if (!w.on[l]) continue;
        D x = (D)w.reg<S>(i.a)[l];
        if (i.mode & WHOLE) x = (D)to_whole((double)x, i.mode & 3);
        if (i.mode & SATURATE) x = x > 0 ? std::min(x, (D)1) : 0;
        w.reg<D>(i.d)[l] = x;
    }
}
// Between integers whose registers are wider than they are: list and widths of the source and the destination.
void convert_narrow(Warp &w, const Instruction &i) {
    for (int l = 0; l < 32; l++) {
        if (!w.on[l]) continue;
        int64_t v = 0;
        memcpy(&v, w.registers + i.a + l * i.widths[0], (size_t)i.widths[0]);
        v = extend(v, i.list[0], i.mode & 1);
        v = extend(v, i.list[1], i.mode & 2);
        memcpy(w.registers + i.d + l * i.widths[1], &v, (size_t)i.widths[1]);
    }
}
void to_tf32(Warp &w, const Instruction &i) {                    // to nearest, halves away from zero
    const uint32_t *a = w.reg<uint32_t>(i.a);
    uint32_t *d = w.reg<uint32_t>(i.d);
    LANES(d[l] = (~a[l] & 0x7F800000 ? a[l] + 0x1000 : a[l]) & 0xFFFFE000)
}
uint32_t bf16_bits(uint32_t u) { return (u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFF : (u + 0x7FFF + (u >> 16 & 1)) >> 16; }
void to_bf16(Warp &w, const Instruction &i) {
    const uint32_t *a = w.reg<uint32_t>(i.a);
    uint16_t *d = w.reg<uint16_t>(i.d);
    LANES(d[l] = (uint16_t)bf16_bits(a[l]))
}
void to_half(Warp &w, const Instruction &i) {
    const float *a = w.reg<float>(i.a);
    uint16_t *d = w.reg<uint16_t>(i.d);
    auto bits = [](float x) {
        int e = std::max(x > 0 ? ilogbf(x) : -14, -14);
        return x != x ? 0x7FFF : x >= 65520 ? 0x7C00 : (e + 14) * 1024 + (int)nearbyint(ldexp(x, 10 - e));
    };
    LANES(d[l] = (uint16_t)(bits(fabsf(a[l])) | (std::signbit(a[l]) ? 0x8000 : 0)))
}
void from_half(Warp &w, const Instruction &i) {
    const uint16_t *a = w.reg<uint16_t>(i.a);
    float *d = w.reg<float>(i.d);
    auto value = [](int e, int m) {
        return e == 31 ? m ? NAN : INFINITY : ldexpf((float)(e ? m + 1024 : m), std::max(e, 1) - 25);
    };
    LANES(d[l] = copysignf(value(a[l] >> 10 & 31, a[l] & 1023), a[l] & 0x8000 ? -1.f : 1.f))
}
void to_bf16_pair(Warp &w, const Instruction &i) {               // a becomes the upper half
    const uint32_t *a = w.reg<uint32_t>(i.a), *b = w.reg<uint32_t>(i.b);
    uint32_t *d = w.reg<uint32_t>(i.d);
    LANES(d[l] = bf16_bits(a[l]) << 16 | bf16_bits(b[l]))
}

// ============================================================== 4. Operations of warps and blocks

uint32_t predicate(Warp &w, int slot, bool negated) {            // one bit for each lane
    const uint32_t *p = w.reg<uint32_t>(slot);
    uint32_t m = 0;
    for (int l = 0; l < 32; l++) m |= (p[l] & 1) << l;
    return negated ? ~m : m;
}
uint32_t guarded(Warp &w, const Instruction &i) { return i.guard < 0 ? w.mask : w.mask & predicate(w, i.guard, i.unless); }

void branch(Warp &w, const Instruction &i) {
    uint32_t taken = guarded(w, i);
    if (!taken) return;
    if (taken != w.mask) {
        w.others.push_back({w.pc, w.mask & ~taken, false});
        w.stop = std::min(w.stop, w.pc);
        w.set(taken);
    }
    w.pc = i.target;
}
void end(Warp &w, const Instruction &i) {
    uint32_t ended = guarded(w, i);
    w.live &= ~ended, w.block->live -= __builtin_popcount(ended);
    w.set(w.mask & ~ended);
    for (Path &p : w.others) p.parked = false, w.stop = std::min(w.stop, p.pc);  // perhaps it was these lanes that they waited for
}
void trap(Warp &w, const Instruction &i) { fail(w, i, first_lane(w), "a trap"); }
void nothing(Warp &, const Instruction &) {}

// bar.sync and bar.red, number 0: red gives d, from the predicate a: in how many threads it is true, in all, in any.
enum { SYNC, COUNT, ALL, ANY };
void barrier(Warp &w, const Instruction &i) {
    if (!whole(w, i)) return;
    if (i.mode) w.block->sum += __builtin_popcount(w.mask & predicate(w, i.a, i.unless));
    w.block->arrived += __builtin_popcount(w.mask);
    w.waiting = true;
}
void cluster_barrier(Warp &w, const Instruction &i) {            // barrier.cluster.wait; arrive, right before it, does nothing
    if (!whole(w, i)) return;
    w.block->in_cluster += __builtin_popcount(w.mask);
    w.waiting = true;
}
void open_barrier(vector<Block> &cluster) {                      // the same
    for (Block &b : cluster)
        if (!b.in_cluster || b.in_cluster < b.live) return;
    for (Block &b : cluster) {
        for (Warp &w : b.warps) w.waiting = false;
        b.in_cluster = 0;
        b.time++;
    }
}
void open_barrier(Block &b) {                                    // when all living threads have reached it
    if (!b.arrived || b.arrived < b.live) return;
    int pc = -1;
    for (Warp &w : b.warps) {
        if (!w.waiting) continue;
        const Instruction &i = b.kernel->code[(size_t)w.pc - 1];
        if (pc >= 0 && w.pc != pc) fail(w, i, first_lane(w), "the warps of a block wait at different barriers");
        w.waiting = false, pc = w.pc;
        for (int l = 0; i.mode && l < 32; l++)
            if (w.on[l])
                w.reg<uint32_t>(i.d)[l] = (uint32_t)(i.mode == COUNT ? b.sum : i.mode == ALL ? b.sum == b.live : b.sum > 0);
    }
    b.arrived = b.sum = 0;
    b.time++;
}

// The lanes of the mask in a slot meet; other lanes that are here, with masks of their own, come afterwards.
bool meeting(Warp &w, const Instruction &i, int slot) {
    const uint32_t *masks = w.reg<uint32_t>(slot), need = masks[first_lane(w)];
    if (!together(w, i, need)) return false;
    for (int l = 0; l < 32; l++) {
        if (w.on[l] && !(masks[l] >> l & 1)) fail(w, i, l, "a mask that leaves out a lane that is here");
        if (need >> l & 1 && masks[l] != need) fail(w, i, l, "another mask than in other lanes of it");
    }
    if (w.mask != need) {
        w.others.push_back({w.pc - 1, w.mask & ~need, false});
        w.stop = std::min(w.stop, w.pc - 1);
        w.set(need);
    }
    return true;
}
void warp_barrier(Warp &w, const Instruction &i) {
    if (meeting(w, i, i.a) && w.full) w.syncs++;                 // of a part of the warp: as if it ordered nothing
}
// shfl of a by the lanes list[0], within the borders list[1], of the mask list[2]; target: a predicate, or 0, which is %tid.x.
enum { FROM_BELOW, FROM_ABOVE, BUTTERFLY, INDEXED };
void shuffle(Warp &w, const Instruction &i) {
    if (!meeting(w, i, i.list[2])) return;
    uint32_t from[32];
    memcpy(from, w.reg<uint32_t>(i.a), sizeof from);
    for (int l = 0; l < 32; l++) {
        if (!w.on[l]) continue;
        int b = w.reg<int>(i.list[0])[l] & 31, borders = w.reg<int>(i.list[1])[l], fixed = borders >> 8 & 31;
        int most = (l & fixed) | (borders & 31 & ~fixed), j = l;
        j = i.mode == FROM_BELOW ? l - b : i.mode == FROM_ABOVE ? l + b : i.mode == BUTTERFLY ? l ^ b : (l & fixed) | (b & ~fixed);
        bool good = i.mode == FROM_BELOW ? j >= most : j <= most;
        if (!good) j = l;
        if (!w.on[j]) fail(w, i, l, "the value of a lane that is not in the mask");
        w.reg<uint32_t>(i.d)[l] = from[j];
        if (i.target) w.reg<uint32_t>(i.target)[l] = good;
    }
}
// vote, redux and match of a by the lanes of the mask b.
enum { BALLOT, VOTE_ANY, VOTE_ALL, VOTE_UNIFORM, MATCH,
       SUM, CONJUNCTION, DISJUNCTION, PARITY, LEAST, MOST, LEAST_SIGNED, MOST_SIGNED };
void vote(Warp &w, const Instruction &i) {
    if (!meeting(w, i, i.b)) return;
    const uint32_t *a = w.reg<uint32_t>(i.a), mask = w.mask;
    uint32_t yes = mask & predicate(w, i.a, i.unless), r = a[first_lane(w)];
    for (int l = first_lane(w) + 1; l < 32; l++) {
        if (!w.on[l]) continue;
        switch (i.mode) {
        case SUM: r += a[l]; break;
        case CONJUNCTION: r &= a[l]; break;
        case DISJUNCTION: r |= a[l]; break;
        case PARITY: r ^= a[l]; break;
        case LEAST: r = std::min(r, a[l]); break;
        case MOST: r = std::max(r, a[l]); break;
        case LEAST_SIGNED: r = (uint32_t)std::min((int)r, (int)a[l]); break;
        case MOST_SIGNED: r = (uint32_t)std::max((int)r, (int)a[l]); break;
        }
    }
    if (i.mode <= VOTE_UNIFORM)
        r = i.mode == BALLOT ? yes : i.mode == VOTE_ANY ? yes != 0 : yes == mask || (i.mode == VOTE_UNIFORM && !yes);
    uint32_t out[32];
    for (int l = 0; l < 32; l++) {
        out[l] = r;
        if (i.mode != MATCH) continue;
        out[l] = 0;
        for (int j = 0; j < 32; j++) out[l] |= (uint32_t)(w.on[j] && a[j] == a[l]) << j;
    }
    for (int l = 0; l < 32; l++)
        if (w.on[l]) w.reg<uint32_t>(i.d)[l] = out[l];
}

// ============================================================== 5. Tensor cores

bool full_warp(Warp &w, const Instruction &i) {
    if (!whole(w, i)) return false;
    if (w.mask != ~0u) fail(w, i, first_lane(w), "an instruction of whole warps in a part of one");
    return true;
}
float bf16(uint32_t pair, int half) {
    uint32_t u = half ? pair & 0xFFFF0000 : pair << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
float tf32(uint32_t u) {
    u &= 0xFFFFE000;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
// mma.m16n8k16 (bf16) and m16n8k8 (tf32): list has 4 slots of D, 4 of A, 2 of B, 4 of C. With g = lane/4, t = lane%4,
// registers r: D and C row g + 8(r/2), column 2t + r%2; A row g + 8(r%2); B column g; A and B along k from t + 4(r/2) or, two
// to a register, 2t + 8(r/2), where B has r in place of r/2.
template <bool BF16> void mma(Warp &w, const Instruction &i) {
    if (!full_warp(w, i)) return;
    const int depth = BF16 ? 16 : 8;
    float A[16][16], B[16][8], C[16][8];
    auto fill = [&](uint32_t u, float *to, int stride, int t, int r) {
        if (BF16) to[(2 * t + 8 * r) * stride] = bf16(u, 0), to[(2 * t + 8 * r + 1) * stride] = bf16(u, 1);
        else to[(t + 4 * r) * stride] = tf32(u);
    };
    for (int l = 0; l < 32; l++) {
        int g = l / 4, t = l % 4;
        for (int r = 0; r < 4; r++) fill(w.reg<uint32_t>(i.list[(size_t)(4 + r)])[l], A[g + 8 * (r % 2)], 1, t, r / 2);
        for (int r = 0; r < 2; r++) fill(w.reg<uint32_t>(i.list[(size_t)(8 + r)])[l], &B[0][g], 8, t, r);
        for (int r = 0; r < 4; r++) C[g + 8 * (r / 2)][2 * t + r % 2] = w.reg<float>(i.list[(size_t)(10 + r)])[l];
    }
    for (int m = 0; m < 16; m++) {
        double sum[8] = {0};
        for (int k = 0; k < depth; k++)
            for (int n = 0; n < 8; n++) sum[n] += (double)A[m][k] * B[k][n];
        for (int n = 0; n < 8; n++) C[m][n] = (float)(C[m][n] + sum[n]);
    }
    for (int l = 0; l < 32; l++)
        for (int r = 0; r < 4; r++) w.reg<float>(i.list[(size_t)r])[l] = C[l / 4 + 8 * (r / 2)][2 * (l % 4) + r % 2];
}
// ldmatrix of list.size() matrices of 8×8 numbers of 16 bits; target: transposed.
void ldmatrix(Warp &w, const Instruction &i) {
    if (!full_warp(w, i)) return;
    uint16_t m[4][8][8];
    for (int l = 0; l < 8 * (int)i.list.size(); l++)
        memcpy(m[l / 8][l % 8], memory(w, i, l, SHARED, address(w, i, l), 16, false), 16);
    for (size_t k = 0; k < i.list.size(); k++)
        for (int l = 0; l < 32; l++) {
            int g = l / 4, t = 2 * (l % 4);
            w.reg<uint32_t>(i.list[k])[l] =
                i.target ? m[k][t][g] | (uint32_t)m[k][t + 1][g] << 16 : m[k][g][t] | (uint32_t)m[k][g][t + 1] << 16;
        }
}
// wgmma.m64n256: list has 128 slots of D, a and b are the descriptors of A and B, c is the predicate "add to D". Of the rows of
// D a warp has 16, which it computes when it comes here; d[4j + r] is row g + 8(r/2), column 8j + 2t + r%2.
uint32_t wgmma_word(Warp &w, const Instruction &i, uint64_t descriptor, int row, int word) {
    if (descriptor >> 62 != 1) fail(w, i, 0, "an operand without the swizzle of 128 bytes");
    if (descriptor >> 49 & 7 || descriptor & 0x38) fail(w, i, 0, "an operand that does not begin in the first of 8 rows");
    if ((size_t)(w.index | 3) >= w.block->warps.size()) fail(w, i, 0, "there are no four warps for this product");
    uint64_t start = (descriptor & 0x3FFF) << 4, group = (descriptor >> 32 & 0x3FFF) << 4;
    uint64_t at = start + (uint64_t)(row / 8) * group + (uint64_t)(row % 8) * 128 + (uint64_t)word * 4;
    uint32_t u;
    memcpy(&u, memory(w, i, 0, SHARED, at ^ (at >> 7 & 7) << 4, 4, false), 4);
    return u;
}
template <bool BF16> void wgmma(Warp &w, const Instruction &i) {
    if (!full_warp(w, i)) return;
    uint64_t a = w.reg<uint64_t>(i.a)[0], b = w.reg<uint64_t>(i.b)[0];
    for (int l = 0; l < 32; l++)
        if (w.reg<uint64_t>(i.a)[l] != a || w.reg<uint64_t>(i.b)[l] != b) fail(w, i, l, "other operands than in lane 0");
    const int depth = BF16 ? 16 : 8;
    float A[16][16], B[16][256];
    for (int word = 0; word < 8; word++)
        for (int n = 0; n < 16 + 256; n++) {
            uint32_t u = n < 16 ? wgmma_word(w, i, a, w.index % 4 * 16 + n, word) : wgmma_word(w, i, b, n - 16, word);
            float *to = n < 16 ? &A[n][BF16 ? 2 * word : word] : &B[BF16 ? 2 * word : word][n - 16];
            if (BF16) to[0] = bf16(u, 0), to[n < 16 ? 1 : 256] = bf16(u, 1);
            else to[0] = tf32(u);
        }
    bool add = w.reg<uint32_t>(i.c)[0] & 1;
    for (int r = 0; r < 128; r++) {
        float *now = w.reg<float>(i.list[(size_t)r]);
        Warp::Sum &of = w.sums.insert({i.list[(size_t)r], {vector<float>(now, now + 32), 0}}).first->second;
        float *sum = of.value.data();
        of.group = w.group;
        for (int l = 0; l < 32; l++) {
            int row = l / 4 + 8 * (r % 4 / 2), column = 8 * (r / 4) + 2 * (l % 4) + r % 2;
            double x = 0;
            for (int k = 0; k < depth; k++) x += (double)A[row][k] * B[k][column];
            sum[l] = (float)(x + (add ? sum[l] : 0));
            now[l] = NAN;
        }
    }
    w.products++;
}
void wgmma_commit(Warp &w, const Instruction &) { w.group++; }
void wgmma_wait(Warp &w, const Instruction &i) {                 // until at most i.offset groups go on
    for (auto s = w.sums.begin(); s != w.sums.end();)
        if (s->second.group < w.group - i.offset) {
            memcpy(w.reg<float>(s->first), s->second.value.data(), 32 * sizeof(float));
            s = w.sums.erase(s);
        } else s++;
}
// From one turn of a loop to the next, sums on their way may change names, for which the assembler has no instruction.
void move_word(Warp &w, const Instruction &i) {
    one<float, float, Move>(w, i);
    if (w.sums.empty() || i.d == i.a) return;
    auto s = w.sums.find(i.a);
    if (s != w.sums.end()) w.sums[i.d] = Warp::Sum(s->second);
    else w.sums.erase(i.d);
}

// ============================================================== 6. From text to programs

struct Token { string s; int line; };
vector<Token> tokens;

// Notes the lines as well, and of which line of the source each is (.loc, .file).
void tokenize(const string &text) {
    auto in_word = [](char c) { return isalnum((unsigned char)c) || strchr("_$%.", c); };
    std::map<int, string> files;
    std::map<string, int> known;
    int place = -1;
    for (size_t p = 0, q; p < text.size(); p = q + 1) {
        q = std::min(text.find('\n', p), text.size());
        string line = text.substr(p, q - p), word;
        int number, column, file, n = (int)ptx_lines.size();
        char name[1000];
        if (sscanf(line.c_str(), " .file %d \"%999[^\"]\"", &file, name) == 2) {
            const char *slash = strrchr(name, '/');
            files[file] = slash ? slash + 1 : name;
        } else if (sscanf(line.c_str(), " .loc %d %d %d", &file, &number, &column) == 3) {
            auto it = known.insert({std::to_string(file) + ":" + std::to_string(number), (int)source_places.size()});
            if (it.second) source_places.push_back(std::to_string(file) + ":" + std::to_string(number));
            place = it.first->second;
        } else if (line.compare(0, 8, ".version") && line.compare(0, 7, ".target") && line.compare(0, 13, ".address_size"))
            for (size_t c = 0; c < line.size();) {
                size_t from = c++;
                if (isspace((unsigned char)line[from])) continue;
                if (line[from] == '/' && line[c] == '/') break;
                if (line[from] == '"') c = line.find('"', c) + 1;
                else if (in_word(line[from]) || (line[from] == '-' && isdigit((unsigned char)line[c])))
                    while (c < line.size() && (in_word(line[c]) || (line[c] == ':' && (line[c + 1] == ':' || line[c - 1] == ':'))))
                        c++;
                tokens.push_back({line.substr(from, c - from), n});
            }
        ptx_lines.push_back(line), place_of_line.push_back(place);
    }
    for (string &s : source_places) s = files[atoi(s.c_str())] + s.substr(s.find(':'));
}

struct Symbol {
    enum { REGISTER, PARAMETER, STACK, STATIC, DYNAMIC, VARIABLE } kind;
    int slot, width;                                             // of a register, bytes a lane
    uint64_t at;                                                 // otherwise, where it is
};
struct Function { size_t body; vector<string> parameters; string result; };
struct Shared { size_t bytes, align; bool dynamic; };

std::map<string, Symbol> variables;                              // of the module, as are:
std::map<string, Shared> shared_variables;
std::map<string, Function> functions;
std::map<string, Kernel *> kernels;

int bytes_of(const string &type) {                               // 0 for what is no type
    if (type == "pred") return 4;
    if (type.size() < 2 || !strchr("busf", type[0])) return 0;
    int bits = atoi(type.c_str() + 1);
    return bits == 8 || bits == 16 || bits == 32 || bits == 64 ? bits / 8 : 0;
}
size_t up_to(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }
bool literal(const string &s, uint64_t *bits) {
    if (s[0] == '0' && s.size() > 1 && strchr("fFdD", s[1])) *bits = strtoull(s.c_str() + 2, nullptr, 16);
    else if (s[0] == '-') *bits = (uint64_t)strtoll(s.c_str(), nullptr, 0);
    else if (isdigit((unsigned char)s[0])) *bits = strtoull(s.c_str(), nullptr, 0);
    else return false;
    return true;
}

// ---- What computes numbers from numbers: names without type, .rn, .approx and .ftz.
Execute found(const std::map<string, Execute> &table, const string &name) {
    auto it = table.find(name);
    return it == table.end() ? nullptr : it->second;
}
#define COMPARISONS(T)                                                                                                       \
    {"setp.eq", two<uint32_t, T, Equal>}, {"setp.lt", two<uint32_t, T, Less>}, {"setp.le", two<uint32_t, T, LessEqual>},     \
        {"setp.gt", two<uint32_t, T, Greater>}, {"setp.ge", two<uint32_t, T, GreaterEqual>}
template <class T> Execute integer(const string &name) {
    typedef std::make_unsigned_t<T> U;
    static const std::map<string, Execute> table = {
        {"mov", one<U, U, Move>}, {"neg", one<U, U, Negate>}, {"not", one<U, U, Not>}, {"abs", one<T, T, Absolute>},
        {"clz", one<uint32_t, U, LeadingZeros>}, {"popc", one<uint32_t, U, Ones>},
        {"add", two<U, U, Add>}, {"sub", two<U, U, Subtract>},
        {"mul.lo", two<U, U, Multiply>}, {"mul.hi", two<T, T, MultiplyHigh>}, {"mul.wide", two<Wide<T>, T, MultiplyWide>},
        {"mad.lo", three<U, U, U, MultiplyAdd>}, {"mad.hi", three<T, T, T, MultiplyAddHigh>},
        {"mad.wide", three<Wide<T>, T, Wide<T>, MultiplyAddWide>}, {"div", divide<T, false>}, {"rem", divide<T, true>},
        {"min", two<T, T, Least>}, {"max", two<T, T, Most>}, {"and", two<U, U, And>}, {"or", two<U, U, Or>},
        {"xor", two<U, U, Xor>}, {"shl", shift<U, true>}, {"shr", shift<T, false>}, {"selp", three<U, U, uint32_t, Select>},
        {"setp.ne", two<uint32_t, T, NotEqualU>}, COMPARISONS(T)};
    return found(table, name);
}
template <class T> Execute real(const string &name) {
    static const std::map<string, Execute> table = {
        {"mov", one<T, T, Move>}, {"neg", one<T, T, Negate>}, {"abs", one<T, T, AbsoluteReal>}, {"sqrt", one<T, T, Root>},
        {"rcp", one<T, T, Reciprocal>}, {"ex2", one<T, T, PowerOfTwo>}, {"add", two<T, T, Add>}, {"sub", two<T, T, Subtract>},
        {"mul", two<T, T, Multiply>}, {"div", two<T, T, Divide>}, {"min", two<T, T, Least>}, {"max", two<T, T, Most>},
        {"copysign", two<T, T, SignOf>}, {"fma", three<T, T, T, Fused>}, {"selp", three<T, T, uint32_t, Select>},
        {"setp.ne", two<uint32_t, T, NotEqual>}, {"setp.equ", two<uint32_t, T, EqualU>},
        {"setp.neu", two<uint32_t, T, NotEqualU>}, {"setp.ltu", two<uint32_t, T, LessU>},
        {"setp.leu", two<uint32_t, T, LessEqualU>}, {"setp.gtu", two<uint32_t, T, GreaterU>},
        {"setp.geu", two<uint32_t, T, GreaterEqualU>}, {"setp.num", two<uint32_t, T, Numbers>},
        {"setp.nan", two<uint32_t, T, NotNumbers>}, COMPARISONS(T)};
    return found(table, name);
}
Execute of_predicates(const string &name) {
    static const std::map<string, Execute> table = {
        {"mov", one<uint32_t, uint32_t, Move>}, {"not", one<uint32_t, uint32_t, NotPredicate>},
        {"and", two<uint32_t, uint32_t, And>}, {"or", two<uint32_t, uint32_t, Or>}, {"xor", two<uint32_t, uint32_t, Xor>}};
    return found(table, name);
}
Execute arithmetic(const string &name, const string &type) {
    if (type == "f32" && name == "fma.rm") return three<float, float, float, FusedDown>;
    if (type == "f32" && name == "add.rz") return two<float, float, AddTowardsZero>;
    if (type == "f32") return name == "mov" ? move_word : real<float>(name);
    if (type == "f64") return real<double>(name);
    if (type[0] == 'f') return nullptr;
    if (type == "pred") return of_predicates(name);
    bool is_signed = type[0] == 's';
    switch (bytes_of(type)) {
    case 2: return is_signed ? integer<int16_t>(name) : integer<uint16_t>(name);
    case 4: return is_signed ? integer<int32_t>(name) : integer<uint32_t>(name);
    case 8: return is_signed ? integer<int64_t>(name) : integer<uint64_t>(name);
    default: return nullptr;
    }
}

#define BY_SIZE(f, space, n) (n == 1 ? f<space, 1> : n == 2 ? f<space, 2> : n == 4 ? f<space, 4> : f<space, 8>)
template <int SPACE> Execute access(bool is_load, int n) { return is_load ? BY_SIZE(load, SPACE, n) : BY_SIZE(store, SPACE, n); }
Execute atomic_of(const string &type) {
    return type == "f32"         ? atomic<float>
           : type == "f64"       ? atomic<double>
           : type == "s32"       ? atomic<int32_t>
           : type == "s64"       ? (Execute)atomic<int64_t>
           : bytes_of(type) == 4 ? atomic<uint32_t>
           : bytes_of(type) == 8 ? (Execute)atomic<uint64_t>
                                 : nullptr;
}

template <class D> Execute conversion_from(const string &s) {
    if constexpr (std::is_integral<D>::value) {
        if (s == "f32") return convert_to_integer<D, float>;
        if (s == "f64") return convert_to_integer<D, double>;
    } else {
        if (s == "f32") return convert_to_real<D, float>;
        if (s == "f64") return convert_to_real<D, double>;
    }
    return s == "u16"   ? convert<D, uint16_t>
           : s == "s16" ? convert<D, int16_t>
           : s == "u32" ? convert<D, uint32_t>
           : s == "s32" ? convert<D, int32_t>
           : s == "u64" ? convert<D, uint64_t>
           : s == "s64" ? (Execute)convert<D, int64_t>
                        : nullptr;
}
Execute conversion(const string &d, const string &s) {
    return d == "f32"   ? conversion_from<float>(s)
           : d == "f64" ? conversion_from<double>(s)
           : d == "u16" ? conversion_from<uint16_t>(s)
           : d == "s16" ? conversion_from<int16_t>(s)
           : d == "u32" ? conversion_from<uint32_t>(s)
           : d == "s32" ? conversion_from<int32_t>(s)
           : d == "u64" ? conversion_from<uint64_t>(s)
           : d == "s64" ? conversion_from<int64_t>(s)
                        : nullptr;
}

// ---- One kernel. Functions that it calls are put in place of the calls.
struct Operand {
    enum { ONE, LIST, ADDRESS } kind = ONE;
    vector<string> names;                                        // of an address the base
    int64_t offset = 0;
    bool negated = false;
    string second;                                               // behind |
};

struct Translator {
    Kernel &k;
    size_t at;                                                   // the next token
    int line = 0;                                                // of the current instruction
    vector<std::map<string, Symbol>> scopes;
    std::map<string, Symbol> shared;
    std::map<std::pair<int, uint64_t>, int> constants;           // by width and bits
    size_t dynamic_align = 1;                                    // what dynamic shared memory asks for
    int dynamic[2] = {-1, -1};                                   // slots of the address of dynamic shared memory, in 4 and 8 bytes
    struct Frame { std::map<string, int> labels; vector<std::pair<int, string>> jumps; vector<int> returns; };
    vector<Frame> frames;

    Translator(Kernel &k) : k(k), at(k.body) {}

    [[noreturn]] void refuse(const string &what) {
        die(k.shown + ", PTX line " + std::to_string(line + 1) + ": " + what + ":" + ptx_lines[(size_t)line]);
    }
    const string &peek() { return tokens[at].s; }
    const string &take() { return tokens[at++].s; }
    bool taken(const char *s) { return peek() == s ? at++, true : false; }
    void expect(const char *s) {
        if (!taken(s)) refuse(string("expected ") + s + ", got " + peek());
    }
    int number() { return (int)strtol(take().c_str(), nullptr, 0); }

    int new_slot(int width) {
        size_t slot = up_to(k.register_bytes, 64);
        k.register_bytes = slot + 32 * (size_t)width;
        return (int)slot;
    }
    void set_constant(int slot, uint64_t bits, int width) {
        vector<unsigned char> lanes;
        for (int l = 0; l < 32; l++) lanes.insert(lanes.end(), (unsigned char *)&bits, (unsigned char *)&bits + width);
        k.constants.push_back({slot, lanes});
    }
    int constant(uint64_t bits, int width) {
        if (width < 8) bits &= ((uint64_t)1 << 8 * width) - 1;
        auto it = constants.find({width, bits});
        if (it != constants.end()) return it->second;
        int slot = constants[{width, bits}] = new_slot(width);
        set_constant(slot, bits, width);
        return slot;
    }
    Symbol *find(const string &name) {
        for (size_t s = scopes.size(); s-- > 0;) {
            auto it = scopes[s].find(name);
            if (it != scopes[s].end()) return &it->second;
        }
        auto s = shared.find(name);
        if (s != shared.end()) return &s->second;
        auto m = shared_variables.find(name);
        if (m != shared_variables.end()) return add_shared(name, m->second);
        auto v = variables.find(name);
        return v == variables.end() ? nullptr : &v->second;
    }
    Symbol known(const string &name) {
        Symbol *s = find(name);
        if (!s) refuse("unknown name " + name);
        return *s;
    }
    Symbol *add_shared(const string &name, Shared s) {
        if (s.dynamic) {
            dynamic_align = std::max(dynamic_align, s.align);
            return &(shared[name] = {Symbol::DYNAMIC, 0, 0, 0});
        }
        uint64_t from = up_to(k.shared_bytes, s.align);
        k.shared_bytes = from + s.bytes;
        return &(shared[name] = {Symbol::STATIC, 0, 0, from});
    }
    // The slot of an operand. A register has the width of the instruction, or says which it has.
    int slot(const string &name, int width, int *own = nullptr) {
        uint64_t bits;
        if (own) *own = width;
        if (literal(name, &bits)) return constant(bits, width);
        static const char *const special[] = {"%tid.", "%ntid.", "%ctaid.", "%nctaid.", "%cluster_ctarank", "%cluster_nctarank"};
        for (int s = 0; s < SPECIAL; s++)
            if (name == (s < 12 ? special[s / 3] + string(1, "xyz"[s % 3]) : special[s - 8])) return k.special[s];
        const Symbol s = known(name);
        if (s.kind == Symbol::REGISTER) {
            if (own) *own = s.width;
            else if (s.width != width) refuse(name + " has " + std::to_string(s.width) + " bytes, not " + std::to_string(width));
            return s.slot;
        }
        if (s.kind != Symbol::DYNAMIC) return constant(s.at, width);
        int &d = dynamic[width == 8];
        return d < 0 ? d = new_slot(width) : d;
    }

    Operand operand() {
        Operand o;
        o.negated = taken("!");
        if (taken("{")) {
            o.kind = Operand::LIST;
            while (!taken("}"))
                if (!taken(",")) o.names.push_back(take());
        } else if (taken("[")) {
            o.kind = Operand::ADDRESS;
            o.names.push_back(take());
            if (!taken("]")) taken("+"), o.offset = strtoll(take().c_str(), nullptr, 0), expect("]");
        } else {
            o.names.push_back(take());
            if (taken("|")) o.second = take();
        }
        taken(",");
        return o;
    }

    void declaration() {                                         // .reg .shared .local .param
        string kind = take();
        size_t align = 1;
        if (taken(".align")) align = (size_t)number();
        int width = bytes_of(take().substr(1));
        if (!width) refuse("unknown type");
        do {
            string name = take();
            size_t n = 1;
            if (kind == ".reg") {
                bool many = taken("<");
                int count = many ? number() : 1;
                if (many) expect(">");
                for (int r = 0; r < count; r++)
                    scopes.back()[many ? name + std::to_string(r) : name] = {Symbol::REGISTER, new_slot(std::max(width, 2)),
                                                                             std::max(width, 2), 0};
                continue;
            }
            if (taken("[")) n = (size_t)number(), expect("]");
            Shared s = {n * (size_t)width, std::max(align, (size_t)width), false};
            if (kind == ".shared") add_shared(name, s);
            else {
                k.local_bytes = up_to(k.local_bytes, s.align);
                scopes.back()[name] = {Symbol::STACK, 0, 0, k.local_bytes};
                k.local_bytes += s.bytes;
            }
        } while (taken(","));
        expect(";");
    }
    void body() {                                                // from behind the opening brace to behind the closing one
        scopes.push_back({});
        while (!taken("}")) {
            line = tokens[at].line;
            const string &t = peek();
            if (t == ";") at++;
            else if (t == "{") at++, body();
            else if (t == ".reg" || t == ".shared" || t == ".local" || t == ".param") declaration();
            else if (t == ".pragma") at += 3;
            else if (tokens[at + 1].s == ":") frames.back().labels[t] = (int)k.code.size(), at += 2;
            else instruction();
        }
        scopes.pop_back();
    }
    void function_body() {                                       // returns jump behind it
        frames.push_back({});
        body();
        Frame &f = frames.back();
        for (auto &j : f.jumps) {
            auto label = f.labels.find(j.second);
            if (label == f.labels.end()) refuse("no label " + j.second);
            k.code[(size_t)j.first].target = label->second;
        }
        for (int r : f.returns) k.code[(size_t)r].target = (int)k.code.size();
        frames.pop_back();
    }
    void call() {                                                // call.uni (result), name, (parameters);
        auto group = [&] {
            vector<string> names;
            expect("(");
            while (!taken(")"))
                if (!taken(",")) names.push_back(take());
            return names;
        };
        vector<string> result, given;
        if (peek() == "(") result = group(), expect(",");
        auto f = functions.find(take());
        if (f == functions.end()) refuse("a call of what is not in the module");
        if (taken(",")) given = group();
        expect(";");
        std::map<string, Symbol> names;
        for (size_t p = 0; p < given.size(); p++) names[f->second.parameters[p]] = known(given[p]);
        if (!result.empty()) names[f->second.result] = known(result[0]);
        scopes.push_back(names);
        size_t back = at;
        at = f->second.body;
        function_body();
        at = back;
        scopes.pop_back();
    }
    void kernel() {
        for (int &s : k.special) s = new_slot(4);
        scopes.push_back({});
        for (Parameter &p : k.parameters) scopes.back()[p.name] = {Symbol::PARAMETER, 0, 0, p.at};
        function_body();
        Instruction last;
        last.run = end, last.control = true;
        k.code.push_back(last);
        k.counts.resize(k.code.size());
        k.shared_bytes = up_to(k.shared_bytes, dynamic_align);   // and no better aligned than that
        if (dynamic_align > 1 && dynamic_align < 1024) k.shared_bytes |= dynamic_align;
        for (int s = 0; s < 2; s++)
            if (dynamic[s] >= 0) set_constant(dynamic[s], k.shared_bytes, s ? 8 : 4);
    }

    void instruction();
    bool access_to_memory(Instruction &i, const string &op, const string &type, vector<Operand> &o);
    bool change_of_type(Instruction &i, vector<Operand> &o);
    bool of_a_warp(Instruction &i, const string &op, const string &type, vector<Operand> &o);
    vector<string> parts;                                        // of the current instruction's name, between the points
    bool has(const char *part) { return std::find(parts.begin(), parts.end(), part) != parts.end(); }
    int which(const std::map<string, int> &names) {
        for (const string &p : parts)
            if (names.count(p)) return names.at(p);
        refuse("unknown");
    }
    void slots(Instruction &i, const Operand &o, int width) {    // of a list, with their widths
        for (const string &n : o.names) {
            int own, s = slot(n, width, &own);
            i.list.push_back(s), i.widths.push_back(own);
        }
    }
};

bool Translator::access_to_memory(Instruction &i, const string &op, const string &type, vector<Operand> &o) {
    bool is_load = op == "ld";
    if (!is_load && op != "st" && op != "atom" && op != "red") return false;
    const Operand &where = o[op == "ld" || op == "atom"];
    int bytes = bytes_of(type), width;
    int space = which({{"global", GLOBAL},
                       {"const", GLOBAL},
                       {"shared", SHARED},
                       {"shared::cta", SHARED},
                       {"local", LOCAL},
                       {"param", PARAM},
                       {type, GENERIC}});
    Symbol *s = find(where.names[0]);
    if (space == PARAM && s && s->kind == Symbol::STACK) space = LOCAL;          // of a call
    i.a = slot(where.names[0], 8, &width), i.offset = where.offset;
    i.mode = (width == 8 ? WIDE : 0) | (type[0] == 's' ? SIGNED : 0);
    if (op == "atom" || op == "red") {
        size_t first = op == "atom" ? 2 : 1;
        i.target = which(
            {{"add", ADD}, {"max", MAX}, {"min", MIN}, {"and", AND}, {"or", OR}, {"xor", XOR}, {"exch", EXCHANGE}, {"cas", CAS}});
        i.d = first == 2 ? slot(o[0].names[0], bytes) : -1;
        i.b = slot(o[first].names[0], bytes);
        if (i.target == CAS) i.c = slot(o[first + 1].names[0], bytes);
        i.run = space == GLOBAL ? atomic_of(type) : nullptr;
        return true;
    }
    slots(i, o[!is_load], bytes);
    i.run = space == GLOBAL   ? access<GLOBAL>(is_load, bytes)
            : space == SHARED ? access<SHARED>(is_load, bytes)
            : space == LOCAL  ? access<LOCAL>(is_load, bytes)
            : space == PARAM  ? access<PARAM>(is_load, bytes)
                              : access<GENERIC>(is_load, bytes);
    return true;
}

bool Translator::change_of_type(Instruction &i, vector<Operand> &o) {
    const string &d = parts[parts.size() - 2], &s = parts.back();
    if (d == "tf32" && has("rna")) return i.d = slot(o[0].names[0], 4), i.a = slot(o[1].names[0], 4), i.run = to_tf32, true;
    if ((d == "bf16" || d == "f16") && s == "f32" && has("rn"))
        return i.d = slot(o[0].names[0], 2), i.a = slot(o[1].names[0], 4), i.run = d == "bf16" ? to_bf16 : to_half, true;
    if (d == "f32" && s == "f16") return i.d = slot(o[0].names[0], 4), i.a = slot(o[1].names[0], 2), i.run = from_half, true;
    if (d == "bf16x2" && s == "f32" && has("rn")) {
        i.d = slot(o[0].names[0], 4), i.a = slot(o[1].names[0], 4), i.b = slot(o[2].names[0], 4), i.run = to_bf16_pair;
        return true;
    }
    int to = bytes_of(d), from = bytes_of(s), own_to, own_from;
    if (!to || !from) return false;
    i.d = slot(o[0].names[0], to, &own_to), i.a = slot(o[1].names[0], from, &own_from);
    if (d[0] != 'f' && s[0] != 'f') {
        if (has("sat")) return false;
        if (own_to == to && own_from == from) return (i.run = conversion(d, s)) != nullptr;
        i.list = {from, to}, i.widths = {own_from, own_to}, i.mode = (s[0] == 's') | (d[0] == 's') << 1, i.run = convert_narrow;
        return true;
    }
    if (own_to != to || own_from != from || has("rz") || has("rm") || has("rp")) return false;
    static const char *const whole_numbers[] = {"rni", "rzi", "rmi", "rpi"};
    for (int m = 0; m < 4; m++)
        if (has(whole_numbers[m])) i.mode = m | WHOLE;
    if (has("sat")) i.mode |= SATURATE;
    return (i.run = conversion(d, s)) != nullptr;
}

bool Translator::of_a_warp(Instruction &i, const string &op, const string &type, vector<Operand> &o) {
    auto one = [&](size_t n, int width = 4) { return slot(o[n].names[0], width); };
    if (op == "bar" && has("warp")) return i.run = warp_barrier, i.a = one(0), true;
    if (op == "bar" && has("red")) {
        i.run = barrier, i.mode = which({{"popc", COUNT}, {"and", ALL}, {"or", ANY}});
        i.d = one(0), i.a = one(2), i.unless = o[2].negated;
        return o[1].names[0] == "0" && o.size() == 3 && i.guard < 0;
    }
    if (op == "bar") return i.run = barrier, o[0].names[0] == "0" && o.size() == 1 && i.guard < 0;
    if (op == "shfl") {
        i.run = shuffle, i.mode = which({{"up", FROM_BELOW}, {"down", FROM_ABOVE}, {"bfly", BUTTERFLY}, {"idx", INDEXED}});
        i.d = one(0), i.a = one(1), i.list = {one(2), one(3), one(4)};
        if (!o[0].second.empty()) i.target = slot(o[0].second, 4);
        return true;
    }
    if (op == "vote" || op == "redux" || op == "match") {
        bool is_signed = type == "s32";
        i.run = vote;
        if (op == "vote") i.mode = which({{"ballot", BALLOT}, {"any", VOTE_ANY}, {"all", VOTE_ALL}, {"uni", VOTE_UNIFORM}});
        else if (op == "match") i.mode = MATCH;
        else
            i.mode = which({{"add", SUM},
                            {"and", CONJUNCTION},
                            {"or", DISJUNCTION},
                            {"xor", PARITY},
                            {"min", is_signed ? LEAST_SIGNED : LEAST},
                            {"max", is_signed ? MOST_SIGNED : MOST}});
        i.d = one(0), i.a = one(1), i.b = one(2), i.unless = o[1].negated;
        return i.guard < 0 && !(op == "match" && !has("any"));
    }
    if (op == "ldmatrix") {
        i.run = ldmatrix, i.target = has("trans");
        slots(i, o[0], 4);
        int width;
        i.a = slot(o[1].names[0], 4, &width), i.mode = width == 8 ? WIDE : 0, i.offset = o[1].offset;
        return has("m8n8") && has("b16");
    }
    if (op == "mma" || (op == "wgmma" && has("mma_async"))) {
        bool is_bf16 = has("bf16"), warpgroup = op == "wgmma";
        string name;
        for (const string &p : parts) name += p + ".";
        const char *const known[] = {
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32.", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32.",
            "wgmma.mma_async.sync.aligned.m64n256k8.f32.tf32.tf32.", "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16."};
        if (name != known[2 * warpgroup + is_bf16]) return false;
        if (!warpgroup) {
            for (size_t n = 0; n < 4; n++) slots(i, o[n], 4);
            i.run = is_bf16 ? mma<true> : mma<false>;
            return i.list.size() == 14;
        }
        slots(i, o[0], 4);
        i.a = one(1, 8), i.b = one(2, 8), i.c = one(3), i.run = is_bf16 ? wgmma<true> : wgmma<false>;
        for (size_t n = 4; n < o.size(); n++)                    // no factors -1, nothing transposed
            if (o[n].names[0] != (n < 6 ? "1" : "0")) return false;
        return i.list.size() == 128 && o.size() == (is_bf16 ? 8 : 6);
    }
    return false;
}

void Translator::instruction() {
    Instruction i;
    i.line = line;
    if (taken("@")) i.unless = taken("!"), i.guard = slot(take(), 4);
    string text = take();
    parts.clear();
    for (size_t p = 0, q; p <= text.size(); p = q + 1) {
        q = std::min(text.find('.', p), text.size());
        parts.push_back(text.substr(p, q - p));
    }
    const string op = parts[0], type = parts.back();
    i.name = text;
    if (op == "call") return i.guard < 0 ? call() : refuse("a call under a predicate");
    vector<Operand> o;
    while (!taken(";")) o.push_back(operand());

    const int here = (int)k.code.size();
    bool carry = has("cc") || op == "addc" || op == "subc" || op == "madc", known = true;
    if (op == "bra") i.run = branch, i.control = true, frames.back().jumps.push_back({here, o[0].names[0]});
    else if (op == "exit" || (op == "ret" && frames.size() == 1)) i.run = end, i.control = true;
    else if (op == "ret") i.run = branch, i.control = true, frames.back().returns.push_back(here);
    else if (op == "trap") i.run = trap;
    else if (text == "griddepcontrol.wait") i.run = wait_for_before;
    else if (op == "membar" || op == "fence" || op == "setmaxnreg" || text == "griddepcontrol.launch_dependents"
             || (op == "wgmma" && has("fence")))
        i.run = nothing;
    else if (op == "wgmma" && has("commit_group")) i.run = wgmma_commit;
    else if (op == "wgmma" && has("wait_group")) i.run = wgmma_wait, i.offset = atoi(o[0].names[0].c_str());
    else if (text == "cp.async.commit_group") i.run = copy_commit;
    else if (text == "cp.async.wait_group") i.run = copy_wait, i.offset = atoi(o[0].names[0].c_str());
    else if (op == "mbarrier") {
        bool tries = has("try_wait"), inits = has("init"), expects = has("expect_tx");
        const Operand &place = o[inits ? 0 : 1];
        i.run = tries ? try_phase : inits ? begin_phases : arrive_in_phase;
        i.a = slot(place.names[0], 4), i.offset = place.offset, i.b = inits || tries || expects ? slot(o.back().names[0], 4) : -1;
        if (tries) i.d = slot(o[0].names[0], 4);
        known = text == "mbarrier.init.shared::cta.b64" || text == "mbarrier.try_wait.parity.shared::cta.b64" ||
                text == "mbarrier.arrive.shared::cta.b64" || text == "mbarrier.arrive.expect_tx.shared::cta.b64" ||
                text == "mbarrier.arrive.shared::cluster.b64";
        known = known && (tries || inits || o[0].names[0] == "_");
    } else if (text == "mapa.shared::cluster.u32") {
        i.run = map_address, i.d = slot(o[0].names[0], 4), i.a = slot(o[1].names[0], 4), i.b = slot(o[2].names[0], 4);
    } else if (text == "barrier.cluster.arrive.release.aligned") i.run = nothing;
    else if (text == "barrier.cluster.wait.acquire.aligned") i.run = cluster_barrier;
    else if (text == "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes" ||
             text == "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster") {
        i.run = copy_in_bulk, i.d = slot(o[0].names[0], 4), i.target = (int)o[0].offset, i.a = slot(o[1].names[0], 8);
        i.offset = o[1].offset, i.c = slot(o[2].names[0], 4), i.b = slot(o[3].names[0], 4), i.mode = (int)o[3].offset;
        if (o.size() > 4) i.list.push_back(slot(o[4].names[0], 2));
    } else if (op == "cp" && o.size() >= 3) {
        i.run = copy_async, i.mode = atoi(o[2].names[0].c_str());
        i.d = slot(o[0].names[0], 4), i.target = (int)o[0].offset, i.a = slot(o[1].names[0], 8), i.offset = o[1].offset;
        i.b = o.size() > 3 ? slot(o[3].names[0], 4) : -1;
        known = has("async") && has("shared") && has("global") && !has("bulk") && o.size() <= 4 &&
                (o.size() < 4 || o[3].names[0].compare(0, 2, "%p"));
    } else if (op == "cp") known = false;
    else if (op == "cvt") known = change_of_type(i, o);
    else if (op == "cvta") {                                     // those of global memory are what they are
        i.run = two<uint64_t, uint64_t, Add>, i.d = slot(o[0].names[0], 8), i.a = slot(o[1].names[0], 8);
        i.b = constant(!has("shared") ? 0 : has("to") ? 0 - SHARED_WINDOW : SHARED_WINDOW, 8);
        known = has("shared") || has("global");
    } else if (op == "mov" && (o[0].kind == Operand::LIST || o[1].kind == Operand::LIST)) {
        bool pack = o[1].kind == Operand::LIST;
        i.run = pack ? pieces<true> : pieces<false>, i.mode = bytes_of(type);
        (pack ? i.d : i.a) = slot(o[!pack].names[0], i.mode);
        slots(i, o[pack], i.mode / (int)o[pack].names.size());
    } else if (op == "bfi") {
        i.run = insert_bits, i.d = slot(o[0].names[0], 4), i.a = slot(o[1].names[0], 4), i.b = slot(o[2].names[0], 4);
        i.list = {slot(o[3].names[0], 4), slot(o[4].names[0], 4)};
        known = type == "b32";
    } else if (op == "prmt") {
        i.run = pick_bytes, i.d = slot(o[0].names[0], 4), i.a = slot(o[1].names[0], 4), i.b = slot(o[2].names[0], 4);
        i.list = {slot(o[3].names[0], 4)};
        known = text == "prmt.b32";
    } else if (!access_to_memory(i, op, type, o) && !of_a_warp(i, op, type, o)) {
        string name = text.substr(0, text.size() - type.size() - 1);
        for (const char *usual : {".rn", ".approx", ".ftz"})
            if (size_t p = name.find(usual); p != string::npos) name.erase(p, strlen(usual));
        i.run = carry ? with_carry : arithmetic(name, type);
        if (carry)
            i.mode = (op.back() == 'c' ? TAKES : 0) | (has("cc") ? GIVES : 0) | (op.compare(0, 3, "sub") ? 0 : SUBTRACTS) |
                     (op.compare(0, 3, "mad") ? 0 : has("lo") ? LOW : HIGH);
        int width = bytes_of(type), wide = has("wide") ? 2 * width : width, *to[] = {&i.d, &i.a, &i.b, &i.c};
        known = i.run && width && o.size() <= 4 && (!carry || type == "u32") && (!has("ftz") || op == "ex2");
        for (size_t n = 0; known && n < o.size(); n++) {
            bool narrow = (n == 0 && (op == "setp" || op == "clz" || op == "popc")) ||
                          (n == 2 && (op == "shl" || op == "shr")) || (n == 3 && op == "selp");
            *to[n] = slot(o[n].names[0], narrow ? 4 : n == 0 || n == 3 ? wide : width);
            if (type == "pred" && o[n].names[0] == "-1") *to[n] = constant(1, 4);
            known = !o[n].negated && o[n].second.empty();
        }
    }
    if (!known || !i.run) refuse("not an instruction that is emulated");
    k.code.push_back(i);
}

// ---- A module. Of kernels and functions only their places are noted.
void read_module(const string &text) {
    size_t at = 0;
    tokenize(text);
    auto t = [&]() -> const string & { return tokens[at].s; };
    auto number = [&] { return (size_t)strtoull(tokens[at++].s.c_str(), nullptr, 0); };
    auto skip_braces = [&] {
        int depth = 0;
        do depth += t() == "{" ? 1 : t() == "}" ? -1 : 0, at++;
        while (depth);
    };
    auto variable = [&](const string &kind) {                    // .align 4 .b8 name[64] = {1, 2, …};
        size_t align = 1, n = 1;
        if (t() == ".align") at++, align = number();
        size_t width = (size_t)bytes_of(t().substr(1));
        string name = (at += 2, tokens[at - 1].s);
        bool dynamic = false;
        if (t() == "[") {
            at++, dynamic = t() == "]", n = dynamic ? 0 : number();
            at++;
        }
        if (kind == ".shared") shared_variables[name] = {n * width, std::max(align, width), dynamic};
        else {
            unsigned char *p = (unsigned char *)allocate(n * width);
            if (!p) die("no memory for " + name);
            memset(p, 0, n * width);
            variables[name] = {Symbol::VARIABLE, 0, 0, (uint64_t)p};
            for (uint64_t bits; t() != ";"; at++)
                if (literal(t(), &bits)) memcpy(p, &bits, width), p += width;
                else if (!strchr("={},", t()[0])) die("initial values that are not numbers: " + name);
        }
        at++;
    };
    auto parameters = [&](Kernel &k) {                           // (.param .align 8 .b8 name[16], .param .u64 .ptr .align 1 name)
        for (at++; t() != ")";) {
            size_t align = 1, width = 0, n = 1;
            string name;
            for (; t() != ")" && t() != ","; ) {
                int bytes = bytes_of(t().substr(1));
                if (t() == ".align") at++, align = std::max(align, number());
                else if (t() == "[") at++, n = number(), at++;
                else if (t()[0] != '.') name = tokens[at++].s;
                else if (bytes && !width) width = (size_t)bytes, align = std::max(align, width), at++;
                else at++;
            }
            k.parameter_bytes = up_to(k.parameter_bytes, align);
            k.parameters.push_back({name, k.parameter_bytes, n * width});
            k.parameter_bytes += n * width;
            if (t() == ",") at++;
        }
        at++;
    };
    while (at < tokens.size()) {
        string kind = tokens[at++].s;
        if (kind == ".visible" || kind == ".extern" || kind == ".weak" || kind == ".common") continue;
        if (kind == ".section") {
            while (t() != "{") at++;
            skip_braces();
        } else if (kind == ".shared" || kind == ".global" || kind == ".const") variable(kind);
        else if (kind == ".func" || kind == ".entry") {
            Kernel result, *k = new Kernel;
            if (t() == "(") parameters(result);
            string name = tokens[at++].s;
            if (t() == "(") parameters(*k);
            for (; t() != "{" && t() != ";"; at++)
                if (t() == ".maxntid") k->max_threads = atoi(tokens[at + 1].s.c_str());
            k->body = at + 1;
            if (t() == ";") at++;
            else skip_braces();
            if (tokens[k->body - 1].s == ";") continue;
            if (kind == ".entry") {
                char *shown = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, nullptr);
                k->shown = shown ? shown : name;
                free(shown);
                for (const char *part : {"(anonymous namespace)::", "void "})   // void f<(kind)1>(float *) becomes f<(kind)1>
                    for (size_t p; (p = k->shown.find(part)) != string::npos;) k->shown.erase(p, strlen(part));
                size_t angle = k->shown.find(">("), round = angle == string::npos ? k->shown.find('(') : angle + 1;
                k->shown.resize(std::min(round, k->shown.size()));
                kernels[name] = k;
                continue;
            }
            Function &f = functions[name] = {k->body, {}, result.parameters.empty() ? "" : result.parameters[0].name};
            for (Parameter &p : k->parameters) f.parameters.push_back(p.name);
            delete k;
        } else die("PTX line " + std::to_string(tokens[at - 1].line + 1) + ": unknown: " + ptx_lines[(size_t)tokens[at - 1].line]);
    }
}

// ============================================================== 7. Launches

bool reverse_order;

void run_warp(Warp &w) {                                         // until it waits in a barrier or has ended
    const Instruction *code = w.block->kernel->code.data();
    uint64_t *counts = w.block->kernel->counts.data();
    while (!w.waiting) {
        counts[w.pc]++;
        const Instruction &i = code[w.pc++];
        uint32_t all = w.mask, on = i.control ? all : guarded(w, i);
        if (on == all) i.run(w, i);
        else if (on) {
            w.set(on);
            i.run(w, i);
            if (w.mask != on) fail(w, i, __builtin_ctz(on), "lanes that wait for others under a predicate: not emulated");
            w.set(all);
        }
        if (w.waiting) break;
        if (w.stuck) {                                           // others first, and then it asks again
            if (w.pc >= w.stop) w.meet();
            break;
        }
        if (!w.mask) {
            if (w.next()) continue;
            for (Path &p : w.others) fail(w, code[p.pc], __builtin_ctz(p.mask), "lanes that are needed here never come");
            break;
        }
        if (w.pc >= w.stop) w.meet();
    }
}

void begin_block(Block &b) {
    std::fill(b.shared.begin(), b.shared.end(), 0xFF);
    std::fill(b.uses.begin(), b.uses.end(), Use());
    b.time = 1, b.live = b.threads, b.arrived = b.sum = b.in_cluster = 0, b.phases.clear();
    std::fill(b.waited.begin(), b.waited.end(), 0);
    for (Warp &w : b.warps) {
        int lanes = std::min(32, b.threads - 32 * w.index);
        w.live = ~0u >> (32 - lanes);
        w.pc = 0, w.waiting = w.stuck = false, w.syncs = 1, w.stop = INT32_MAX, w.products = w.group = 0;
        w.others.clear(), w.sums.clear();
        std::fill(w.local.begin(), w.local.end(), 0xFF);
        w.set(w.live);
        for (Copies &c : w.copies) c.open.clear(), c.groups.clear();
        for (unsigned l = 0; l < 32; l++) {
            unsigned t = 32 * (unsigned)w.index + l;
            unsigned values[SPECIAL] = {t % b.size.x, t / b.size.x % b.size.y, t / b.size.x / b.size.y, b.size.x, b.size.y, b.size.z,
                                        b.at.x, b.at.y, b.at.z, b.grid.x, b.grid.y, b.grid.z, b.rank, (unsigned)b.cluster->size()};
            for (int s = 0; s < SPECIAL; s++) w.reg<uint32_t>(b.kernel->special[s])[l] = values[s];
        }
    }
}
void run_cluster(vector<Block> &cluster) {
    const vector<Instruction> &code = cluster[0].kernel->code;
    auto alive = [](const Block &b) { return b.live > 0; };
    for (Block &b : cluster) begin_block(b);
    while (std::any_of(cluster.begin(), cluster.end(), alive)) {
        bool moved = false;
        for (size_t m = 0; m < cluster.size(); m++) {
            Block &b = cluster[reverse_order ? cluster.size() - 1 - m : m];
            uint64_t steps = b.steps;
            size_t n = b.warps.size();
            for (size_t m = 0; m < n; m++) {
                Warp &w = b.warps[reverse_order ? n - 1 - m : m];
                if (w.waiting || !w.live) continue;
                w.stuck = false;
                run_warp(w);
                if (!w.stuck) moved = true;
            }
            open_barrier(b);
            moved = moved || b.steps != steps;
        }
        open_barrier(cluster);
        if (moved) continue;
        for (Block &b : cluster) moved = bring_copies(b) || moved;
        for (Block &b : cluster)
            for (Warp &w : b.warps) {
                if (moved || !w.live) continue;
                if (w.stuck) fail(w, code[(size_t)w.pc - 1], first_lane(w), "a phase of an mbarrier that never ends");
                if (w.waiting) fail(w, code[(size_t)w.pc - 1], first_lane(w), "a barrier that some threads never reach");
            }
    }
    for (Block &b : cluster) {
        for (auto &at : b.phases)
            if (!at.second.copies.empty())
                fail(b.warps[0], code.back(), 0, "the block ends while copies into its shared memory are on their way");
        for (Warp &w : b.warps)
            if (w.products != b.warps[(size_t)w.index & ~(size_t)3].products)
                fail(w, code.back(), 0, "wgmma by a part of a warpgroup");
    }
}

void forget_written_lines() { written_lines.clear(), last_written_line = 0; }
void run_grid(Kernel &k, dim3 grid, dim3 size, unsigned blocks, vector<unsigned char> parameters, size_t dynamic, bool early) {
    vector<Block> cluster(blocks);
    bool some = false;
    if (!early) forget_written_lines();
    vector<vector<unsigned char>> registers;
    for (Block &b : cluster) {
        b.early = early, b.cluster = &cluster, b.rank = (unsigned)(&b - &cluster[0]);
        b.kernel = &k, b.grid = grid, b.size = size, b.parameters = parameters;
        b.threads = (int)(size.x * size.y * size.z);
        b.shared.resize(k.shared_bytes + dynamic);
        b.uses.resize(b.shared.size() / 4 + 1);
        b.warps.resize((size_t)(b.threads + 31) / 32);
        b.waited.resize(b.warps.size());
        for (Warp &w : b.warps) {
            registers.emplace_back(k.register_bytes + 64);
            w.block = &b, w.index = (int)(&w - &b.warps[0]);
            w.registers = (unsigned char *)up_to((uintptr_t)registers.back().data(), 64);
            for (Constant &c : k.constants) memcpy(w.registers + c.slot, c.lanes.data(), c.lanes.size());
            w.local.resize(32 * up_to(k.local_bytes, 16));
        }
    }
    size_t clusters = (size_t)grid.x * grid.y * grid.z / blocks;
    for (size_t n = 0; n < clusters; n++) {
        for (Block &b : cluster) {
            size_t m = (reverse_order ? clusters - 1 - n : n) * blocks + b.rank;
            b.at = dim3((unsigned)(m % grid.x), (unsigned)(m / grid.x % grid.y), (unsigned)(m / grid.x / grid.y));
        }
        run_cluster(cluster);
        for (const Block &b : cluster)
            for (uint32_t lanes : b.waited) some = some || lanes;
    }
    if (early && !some)
        die("no thread of " + k.shown + " waited for the kernel before, and who comes next waits for this one alone");
    k.launches++;
}

// ============================================================== 8. The runtime's functions

cudaError_t last_error = cudaSuccess;
cudaError_t result(cudaError_t e) { return e ? last_error = e : e; }

// ---- The program registers its kernels before main, perhaps before the constructors of this file: noted, read when one is wanted.
void *program;
struct { const void *here; const char *name; } registered[4096], variables_here[64];
int registered_count, variable_count, capability;
std::map<const void *, Kernel *> kernel_at;

// What was executed, in instructions of a warp: by kernel, by instruction, and the lines of the source with the most. A GPU's own
// instructions are others: most of mov and cvta are none there, those of 64 bits are two.
void statistics() {
    typedef std::pair<uint64_t, string> row;
    vector<row> by_kernel, by_name, by_line;
    std::map<string, uint64_t> names;
    uint64_t total = 0, never = 0;
    for (auto &named : kernels) {
        Kernel &k = *named.second;
        std::map<int, uint64_t> lines;
        uint64_t sum = 0;
        for (size_t pc = 0; pc < k.counts.size(); pc++) {
            sum += k.counts[pc], names[k.code[pc].name] += k.counts[pc];
            lines[place_of_line[(size_t)k.code[pc].line]] += k.counts[pc];
        }
        for (auto &l : lines) by_line.push_back({l.second, (l.first < 0 ? "" : source_places[(size_t)l.first]) + "  " + k.shown});
        by_kernel.push_back({sum, std::to_string(k.launches) + " launches  " + k.shown});
        total += sum, never += !k.launches;
    }
    for (auto &n : names) by_name.push_back({n.second, n.first});
    for (auto table : {&by_kernel, &by_name, &by_line}) {
        std::sort(table->rbegin(), table->rend());
        if (table != &by_kernel) table->resize(std::min(table->size(), (size_t)40));
        for (row &r : *table)
            if (r.first)
                fprintf(stderr, "%14llu %5.1f %%  %s\n", (unsigned long long)r.first, 100. * (double)r.first / (double)total,
                        r.second.c_str());
        fprintf(stderr, "\n");
    }
    fprintf(stderr, "%llu instructions of a warp; %llu of %zu kernels were never launched\n", (unsigned long long)total,
            (unsigned long long)never, kernels.size());
}

// nvcc's object has a "fat binary": a header of 16 bytes, then entries for each architecture, of kind 1 when they are PTX. The
// newest that the device can run is taken.
void read_program() {
    static bool done;
    if (done) return;
    done = true;
    const char *order = getenv("CUDA_ORDER"), *memory = getenv("CUDA_MEMORY"), *says = getenv("CUDA_CAPABILITY");
    reverse_order = order && !strcmp(order, "reverse");
    if (memory) {
        char *end;
        memory_limit = strtoull(memory, &end, 10);
        memory_limit <<= *end == 'G' ? 30 : *end == 'M' ? 20 : *end == 'k' ? 10 : 0;
    }
    if (!program) return;
    const unsigned char *p = *(const unsigned char *const *)((const char *)program + 8), *end;
    string text;
    uint64_t bytes, flags;
    if (memcpy(&bytes, p + 8, 8), *(const uint32_t *)p != 0xBA55ED50) die("the kernels are not as nvcc 12 and 13 write them");
    for (p += 16, end = p + bytes; p < end;) {
        uint16_t kind;
        uint32_t header, architecture;
        memcpy(&kind, p, 2), memcpy(&header, p + 4, 4), memcpy(&bytes, p + 8, 8), memcpy(&architecture, p + 28, 4),
            memcpy(&flags, p + 40, 8);
        if (kind == 1 && (int)architecture >= capability && (!says || (int)architecture <= atoi(says))) {
            if (flags & 0xF000) die("the PTX is compressed: compile with nvcc --no-compress");
            text.assign((const char *)p + header, strnlen((const char *)p + header, bytes));
            capability = (int)architecture;
        }
        p += header + bytes;
    }
    if (text.empty()) die("no PTX for this device in the program: compile with -gencode arch=compute_80,code=compute_80");
    if (says) capability = atoi(says);
    read_module(text);
    for (int n = 0; n < registered_count; n++) {
        if (!kernels.count(registered[n].name)) die(string("no PTX of ") + registered[n].name);
        kernel_at[registered[n].here] = kernels[registered[n].name];
    }
    if (getenv("CUDA_STATS")) atexit(statistics);
}
Kernel &kernel_of(const void *here) {
    read_program();
    if (!kernel_at.count(here)) die("a kernel that is not in this program");
    Kernel &k = *kernel_at[here];
    if (k.code.empty()) Translator(k).kernel();
    return k;
}
size_t shared_limit() {
    read_program();
    return (capability == 80 || capability == 87                        ? 163u
            : capability == 86 || capability == 89 || capability >= 120 ? 99u
                                                                        : 227u) *
           1024;
}

// ---- Streams: what is asked is done at once, or noted in the graph that the stream is captured into. Meanwhile what waits, takes
// or frees memory, or goes to another stream, is an error that spoils the graph.
struct Graph { vector<std::function<void()>> nodes; };
std::map<cudaStream_t, int> streams;
cudaStream_t captured;
Graph *graph;
bool spoiled;

cudaError_t not_captured(cudaError_t error) { return captured ? spoiled = true, result(error) : cudaSuccess; }
cudaError_t enqueue(cudaStream_t stream, std::function<void()> what) {
    if (captured && stream != captured) return not_captured(cudaErrorStreamCaptureImplicit);
    if (captured) graph->nodes.push_back(what);
    else what();
    return cudaSuccess;
}

struct Configuration { dim3 grid, block; size_t shared; cudaStream_t stream; };
vector<Configuration> configurations;

cudaError_t launch(Kernel &k, dim3 grid, dim3 block, void **arguments, size_t dynamic, cudaStream_t stream, bool early = false,
                   unsigned cluster = 1) {
    uint64_t threads = (uint64_t)block.x * block.y * block.z,
             room = std::max<uint64_t>(48 * 1024, k.shared_bytes + (size_t)k.max_dynamic);
    if (stream && !streams.count(stream)) return result(cudaErrorInvalidResourceHandle);
    if (!threads || threads > (uint64_t)k.max_threads || block.z > 64 || !grid.x || !grid.y || !grid.z || grid.x > INT32_MAX ||
        grid.y > 65535 || grid.z > 65535 || k.shared_bytes + dynamic > room)
        return result(cudaErrorInvalidConfiguration);
    if (!cluster || cluster > 8 || grid.x % cluster || (cluster > 1 && capability < 90))
        return result(cudaErrorInvalidClusterSize);
    vector<unsigned char> parameters(k.parameter_bytes);
    for (size_t p = 0; p < k.parameters.size(); p++) memcpy(&parameters[k.parameters[p].at], arguments[p], k.parameters[p].bytes);
    return enqueue(stream, [=, &k] { run_grid(k, grid, block, cluster, parameters, dynamic, early); });
}

struct Event { struct timespec time; bool recorded; };
const struct { cudaError_t code; const char *name, *text;
} errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit", "operation would depend on a capturing stream"},
};
cudaError_t misplaced(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {   // is one of them not where the kind says?
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    return bytes && ((from_device && !covers((uint64_t)from, bytes)) || (to_device && !covers((uint64_t)to, bytes)))
               ? result(cudaErrorInvalidValue)
               : cudaSuccess;
}

} // namespace

extern "C" {

// ---- What nvcc's host code calls.
void **__cudaRegisterFatBinary(void *binary) {
    if (program) die("kernels in several files: not emulated");
    return program = binary, &program;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *here, char *, const char *name, int, uint3 *, uint3 *, dim3 *, dim3 *, int *) {
    if (registered_count == (int)(sizeof registered / sizeof *registered)) die("too many kernels");
    registered[registered_count++] = {here, name};
}
void __cudaRegisterVar(void **, char *here, char *, const char *name, int, size_t, int, int) {
    if (variable_count == (int)(sizeof variables_here / sizeof *variables_here)) die("too many variables");
    variables_here[variable_count++] = {here, name};
}
char __cudaInitModule(void **) { return 1; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    return configurations.push_back({grid, block, shared, stream}), 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    Configuration c = configurations.back();
    configurations.pop_back();
    return *grid = c.grid, *block = c.block, *shared = c.shared, *(cudaStream_t *)stream = c.stream, cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *here) {
    return *kernel = (cudaKernel_t)&kernel_of(here), cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch(*(Kernel *)kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernel(const void *here, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch(kernel_of(here), grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *here, void **arguments) {
    bool early = false;                                          // if it says so; here nothing begins before its time
    unsigned cluster = 1;
    for (unsigned n = 0; n < how->numAttrs; n++) {
        const cudaLaunchAttribute &a = how->attrs[n];
        early = early || a.id == cudaLaunchAttributeProgrammaticStreamSerialization;
        if (a.id == cudaLaunchAttributeClusterDimension)
            cluster = a.val.clusterDim.y * a.val.clusterDim.z == 1 ? a.val.clusterDim.x : 0;
    }
    return launch(kernel_of(here), how->gridDim, how->blockDim, arguments, how->dynamicSmemBytes, how->stream, early, cluster);
}

// ---- Devices, errors
cudaError_t cudaGetLastError() {
    cudaError_t e = last_error;
    return last_error = cudaSuccess, e;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char *cudaGetErrorName(cudaError_t e) {
    for (auto &known : errors)
        if (known.code == e) return known.name;
    return "an error";
}
const char *cudaGetErrorString(cudaError_t e) {
    for (auto &known : errors)
        if (known.code == e) return known.text;
    return "an error";
}
cudaError_t cudaGetDeviceCount(int *n) { return *n = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *n) { return *n = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return not_captured(cudaErrorStreamCaptureUnsupported); }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "CPU (ptx_on_cpu.cpp)");
    p->sharedMemPerBlock = 48 * 1024, p->sharedMemPerBlockOptin = shared_limit(),
    p->sharedMemPerMultiprocessor = shared_limit() + 1024;
    p->totalGlobalMem = memory_limit, p->major = capability / 10, p->minor = capability % 10, p->multiProcessorCount = 4,
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->regsPerBlock = 65536;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = INT32_MAX, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    cudaGetDeviceProperties(&p, device);
    switch ((int)attribute) {
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    default: return result(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *here, cudaFuncAttribute attribute, int value) {
    Kernel &k = kernel_of(here);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || k.shared_bytes + (size_t)value > shared_limit()) return result(cudaErrorInvalidValue);
    return k.max_dynamic = value, cudaSuccess;
}

// ---- Memory. The host may follow all pointers, as if all memory were managed.
cudaError_t cudaMalloc(void **p, size_t bytes) {
    *p = nullptr;
    read_program();
    if (captured) return not_captured(cudaErrorStreamCaptureUnsupported);
    return *p = allocate(bytes), *p ? cudaSuccess : result(cudaErrorMemoryAllocation);
}
cudaError_t cudaMallocManaged(void **p, size_t bytes, unsigned) { return cudaMalloc(p, bytes); }
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) { return cudaMalloc(p, bytes); }
cudaError_t cudaFree(void *p) {
    if (captured) return not_captured(cudaErrorStreamCaptureUnsupported);
    return !p || release(p) ? cudaSuccess : result(cudaErrorInvalidValue);
}
cudaError_t cudaFreeHost(void *p) { return cudaFree(p); }
cudaError_t cudaMemGetInfo(size_t *available, size_t *all) {
    return *available = memory_limit - memory_used, *all = memory_limit, cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    if (captured) return not_captured(cudaErrorStreamCaptureImplicit);
    cudaError_t e = misplaced(to, from, bytes, kind);
    return e ? e : (memmove(to, from, bytes), forget_written_lines(), cudaSuccess);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    cudaError_t e = misplaced(to, from, bytes, kind);
    return e ? e : enqueue(stream, [=] { memmove(to, from, bytes), forget_written_lines(); });
}
cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                         cudaMemcpyKind kind) {
    cudaError_t e = cudaSuccess;
    for (size_t y = 0; y < height && !e; y++)
        e = cudaMemcpy((char *)to + y * to_pitch, (const char *)from + y * from_pitch, width, kind);
    return e;
}
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes, size_t offset, cudaMemcpyKind) {
    read_program();
    for (int n = 0; n < variable_count; n++)
        if (variables_here[n].here == symbol)
            return cudaMemcpy((char *)variables.at(variables_here[n].name).at + offset, from, bytes, cudaMemcpyHostToDevice);
    return result(cudaErrorInvalidSymbol);
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    if (bytes && !covers((uint64_t)to, bytes)) return result(cudaErrorInvalidValue);
    return enqueue(stream, [=] { memset(to, value, bytes), forget_written_lines(); });
}
cudaError_t cudaMemset(void *to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, 0); }

// ---- Streams, graphs, events
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) {
    return *s = (cudaStream_t)malloc(1), streams[*s] = 1, cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithFlags(s, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t s) {
    return streams.erase(s) ? free((void *)s), cudaSuccess : result(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return not_captured(cudaErrorStreamCaptureUnsupported); }
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    if (!s || captured) return result(cudaErrorStreamCaptureUnsupported);
    return streams.count(s)               ? captured = s, graph = new Graph, spoiled = false,
                              cudaSuccess : result(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *to) {
    *to = nullptr;
    if (!captured || s != captured) return result(cudaErrorInvalidValue);
    captured = nullptr;
    if (spoiled) return delete graph, result(cudaErrorStreamCaptureInvalidated);
    return *to = (cudaGraph_t)graph, cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *to, cudaGraph_t from, unsigned long long) {
    return *to = (cudaGraphExec_t) new Graph(*(Graph *)from), cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *to, cudaGraph_t from, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(to, from, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t g, cudaStream_t stream) {
    return enqueue(stream, [=] { for (auto &node : ((Graph *)g)->nodes) node(); });
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) { return delete (Graph *)g, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g) { return delete (Graph *)g, cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { return *e = (cudaEvent_t) new Event(), cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete (Event *)e, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) {
    return timespec_get(&((Event *)e)->time, TIME_UTC), ((Event *)e)->recorded = true, cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    const Event &a = *(Event *)from, &b = *(Event *)to;
    if (!a.recorded || !b.recorded) return result(cudaErrorInvalidResourceHandle);
    return *ms = (float)((double)(b.time.tv_sec - a.time.tv_sec) * 1e3 + (double)(b.time.tv_nsec - a.time.tv_nsec) * 1e-6),
           cudaSuccess;
}
}
