// traffic.cpp - how a warp's accesses to memory fall together: sectors of global memory, banks of shared memory.
//
// Linked with a .cu file that was compiled with -DEMU_TRAFFIC and -fsanitize=thread, by which the compiler calls __tsan_read4 and
// the like before each access; they are defined here in place of the sanitizer's (make emu-traffic). The accesses that the 32
// threads of a warp make at one place in the program, the first time, the second time …, count as one request, as on a GPU:
//
//     global memory   a request costs the sectors of 32 bytes that it touches; the least is the bytes it wants / 32
//     shared memory   lanes are served together, 32 of 4 bytes, 16 of 8 or 8 of 16; a group costs the most different words that
//                     one of the 32 banks has to give, the least is 1
//
// At exit two tables: of the kernels by name; and of their lines, dearest first, sectors and cycles of banks in one list:
// requests, what they cost, the least, and the ratio. A line of a function that several others call stands for all of them, and
// a kernel's name is the text of its launch. Caches are not there, so that a thread which reads 32 bytes in eight requests
// costs eight sectors, of which a GPU's L1 has seven. Lanes that go different ways are put together by how often they came
// by; nvcc may join or move what the compiler of the CPU did not; what wgmma reads is not counted. Lines are found by addr2line.
//
//     TRAFFIC=20     how many lines are shown (20)         TRAFFIC_KERNEL=scan     of kernels whose name contains this

#include <algorithm>

namespace {

struct Place {                                                   // in the program: an address, or a line that the header knows
    const void *pc;
    const char *file;
    int line;
    bool shared, write;
    bool operator<(const Place &o) const {
        return std::tie(pc, file, line, shared, write) < std::tie(o.pc, o.file, o.line, o.shared, o.write);
    }
};
struct Request {
    uintptr_t at[32];
    unsigned lanes;
    int bytes;
};
struct Cost { double requests, paid, least; };

std::map<std::pair<std::string, Place>, Cost> costs;
std::map<std::pair<int, Place>, std::vector<Request>> requests;  // of this block, by warp: the first, the second, …
std::map<std::pair<int, Place>, size_t> times;                   // by thread
const char *kernel;                                              // whose block it is,
long launched;                                                   // in which launch,
uint3 block;                                                     // and which block

void price(const Request &r, bool shared, Cost *to) {
    to->requests++;
    std::set<uintptr_t> sectors, bytes;
    if (!shared) {
        for (int lane = 0; lane < 32; lane++)
            for (int b = 0; b < r.bytes && (r.lanes >> lane & 1); b++) bytes.insert(r.at[lane] + b), sectors.insert((r.at[lane] + b) / 32);
        to->paid += (double)sectors.size(), to->least += (double)((bytes.size() + 31) / 32);
        return;
    }
    const int together = r.bytes <= 4 ? 32 : r.bytes <= 8 ? 16 : 8;
    for (int first = 0; first < 32; first += together) {
        std::set<uintptr_t> words[32];
        size_t most = 0;
        for (int lane = first; lane < first + together; lane++)
            for (int b = 0; b < r.bytes && (r.lanes >> lane & 1); b++) words[(r.at[lane] + b) / 4 % 32].insert((r.at[lane] + b) / 4);
        for (auto &w : words) most = std::max(most, w.size());
        to->paid += (double)most, to->least += most != 0;
    }
}

void flush() {
    for (auto &r : requests)
        for (const Request &each : r.second) price(each, r.first.second.shared, &costs[{kernel, r.first.second}]);
    requests.clear();
    times.clear();
}

void note(const void *p, int bytes, bool write, Place place) {
    static bool busy;                                            // what is called from here is watched as well
    if (busy) return;
    busy = true;
    if (!emu::running()) {
        busy = false;
        return;
    }
    const emu::Engine &e = *emu::E;
    const emu::Block &b = *e.self->block;
    const char *at = (const char *)p, *dynamic = b.dynamic;
    bool shared = dynamic && at >= dynamic && at < dynamic + e.launch->shared_bytes;
    for (const emu::SharedArray &a : emu::shared_arrays()) shared = shared || (at >= a.memory && at < a.memory + a.bytes);
    if (shared || emu::find(p)) {
        if (launched != e.launch->number || memcmp(&block, &e.blocks[0].at, sizeof block)) {     // of the cluster
            flush();
            kernel = e.launch->kernel, launched = e.launch->number, block = e.blocks[0].at;
        }
        place.shared = shared, place.write = write;
        const int index = b.rank * emu::MOST_THREADS + e.self->index;
        std::vector<Request> &list = requests[{index / 32, place}];
        size_t n = times[{index, place}]++;
        if (list.size() <= n) list.resize(n + 1, Request());
        list[n].at[e.self->lane] = (uintptr_t)p, list[n].lanes |= 1u << e.self->lane, list[n].bytes = bytes;
    }
    busy = false;
}

// The line of the .cu file at an address of the program, by addr2line: the innermost that is not in the header.
std::string line_of(const void *pc) {
    static char *base = nullptr;
    if (!base) dl_iterate_phdr([](dl_phdr_info *info, size_t, void *) { return base = (char *)info->dlpi_addr, 1; }, nullptr);
    char command[200], text[1000];
    snprintf(command, sizeof command, "addr2line -i -e /proc/%d/exe 0x%zx", (int)getpid(), (size_t)((char *)pc - base) - 1);
    FILE *f = popen(command, "r");
    std::string found = "?";
    while (f && fgets(text, sizeof text, f)) {
        std::string s = text;
        if (s.find("cuda_on_cpu.h") != std::string::npos || s[0] == '?') continue;
        s = s.substr(0, s.find_first_of(" \n"));
        found = s.substr(s.rfind('/') + 1);
        break;
    }
    if (f) pclose(f);
    return found;
}

struct Report {
    long most = 20;
    const char *only = getenv("TRAFFIC_KERNEL");
    Report() {
        const char *shown = getenv("TRAFFIC");
        char *end = nullptr;
        if (shown && *shown && ((most = strtol(shown, &end, 10)) < 0 || *end)) {
            fprintf(stderr, "traffic: TRAFFIC=%s: must be a number of lines\n", shown);
            _exit(2);
        }
    }
    ~Report() {
        flush();
        std::map<std::tuple<std::string, std::string, bool, bool>, Cost> lines;
        std::map<std::pair<std::string, bool>, Cost> kernels;
        auto add = [](Cost *to, const Cost &c) { to->requests += c.requests, to->paid += c.paid, to->least += c.least; };
        for (auto &c : costs) {
            const Place &p = c.first.second;
            if (only && c.first.first.find(only) == std::string::npos) continue;
            std::string line = p.file ? std::string(strrchr(p.file, '/') ? strrchr(p.file, '/') + 1 : p.file) + ":" + std::to_string(p.line)
                                      : line_of(p.pc);
            add(&lines[{c.first.first, line, p.shared, p.write}], c.second);
            add(&kernels[{c.first.first, p.shared}], c.second);
        }
        if (kernels.empty()) {
            fprintf(stderr, "traffic: no kernel%s%s has run\n", only ? " whose name contains " : "", only ? only : "");
            return;
        }
        printf("%-48s %-7s %12s %12s %12s %6s\n", "kernel", "memory", "requests", "paid", "least", "ratio");
        for (auto &k : kernels)
            printf("%-48.48s %-7s %12.0f %12.0f %12.0f %6.2f\n", k.first.first.c_str(), k.first.second ? "shared" : "global",
                   k.second.requests, k.second.paid, k.second.least, k.second.paid / k.second.least);
        std::vector<std::pair<double, decltype(lines)::const_iterator>> order;
        for (auto l = lines.cbegin(); l != lines.cend(); ++l) order.push_back({-l->second.paid, l});
        std::sort(order.begin(), order.end(), [](auto &a, auto &b) { return a.first < b.first; });
        printf("\n%-40s %-24s %-13s %12s %12s %12s %6s\n", "kernel", "line", "", "requests", "paid", "least", "ratio");
        long left = most;
        for (auto &o : order) {
            if (left-- <= 0) break;
            auto &[name, line, shared, write] = o.second->first;
            const Cost &c = o.second->second;
            printf("%-40.40s %-24s %-6s %-6s %12.0f %12.0f %12.0f %6.2f\n", name.c_str(), line.c_str(), shared ? "shared" : "global",
                   write ? "write" : "read", c.requests, c.paid, c.least, c.paid / c.least);
        }
    }
} report;

}  // namespace

void emu::traffic_of(const char *name, bool shared, double *paid, double *least) {
    flush();
    *paid = *least = 0;
    for (auto &c : costs)
        if (c.first.first == name && c.first.second.shared == shared) *paid += c.second.paid, *least += c.second.least;
}
void emu::traffic(const void *p, int bytes, bool write, const char *file, int line) {
    note(p, bytes, write, {nullptr, file, line, false, false});
}

#define HERE Place{__builtin_return_address(0), nullptr, 0, false, false}
#define WATCH(n)                                                                                                 \
    void __tsan_read##n(void *p) { note(p, n, false, HERE); }                                                    \
    void __tsan_write##n(void *p) { note(p, n, true, HERE); }                                                    \
    void __tsan_unaligned_read##n(void *p) { note(p, n, false, HERE); }                                          \
    void __tsan_unaligned_write##n(void *p) { note(p, n, true, HERE); }                                          \
    void __tsan_volatile_read##n(void *p) { note(p, n, false, HERE); }                                           \
    void __tsan_volatile_write##n(void *p) { note(p, n, true, HERE); }
extern "C" {
WATCH(1) WATCH(2) WATCH(4) WATCH(8) WATCH(16)
void __tsan_read_range(void *p, size_t n) { note(p, (int)n, false, HERE); }
void __tsan_write_range(void *p, size_t n) { note(p, (int)n, true, HERE); }
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}
// Atomics, the emulator's and those of <memory>, are done and not counted.
#define ATOMIC(bits, type)                                                                                                  \
    type __tsan_atomic##bits##_load(const volatile type *p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }           \
    void __tsan_atomic##bits##_store(volatile type *p, type x, int) { __atomic_store_n(p, x, __ATOMIC_SEQ_CST); }           \
    type __tsan_atomic##bits##_exchange(volatile type *p, type x, int) { return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST); } \
    type __tsan_atomic##bits##_fetch_add(volatile type *p, type x, int) { return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST); } \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile type *p, type *was, type x, int, int) {                      \
        return __atomic_compare_exchange_n(p, was, x, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                               \
    }                                                                                                                       \
    int __tsan_atomic##bits##_compare_exchange_weak(volatile type *p, type *was, type x, int, int) {                        \
        return __atomic_compare_exchange_n(p, was, x, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                               \
    }
ATOMIC(8, char) ATOMIC(32, int) ATOMIC(64, long)
}
