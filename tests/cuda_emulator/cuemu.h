// cuemu.h - run CUDA C kernels on the CPU, for tests without a GPU. Plain g++/clang++ -std=c++17,
// no CUDA toolkit. One fiber per CUDA thread, scheduled cooperatively inside a block; blocks run
// one after another (or on CUEMU_THREADS OS threads). A kernel thread only ever switches at a
// collective (barrier, shuffle, mma, mbarrier wait). The .cu text goes through rewrite.py first:
// k<<<g,b,s,st>>>(a) -> cuemu::launch(cuemu::Cfg{g,b,s,st},[&]{k(a);}) and "extern __shared__ T
// x[];" -> "T* x = (T*)cuemu::dynsmem();".  Environment:
//   CUEMU_ORDER=0|1|2  thread order inside a block: forward, reverse, shuffled (results must not
//   depend on it) CUEMU_THREADS=n    OS threads over blocks      CUEMU_SMS=n  multiProcessorCount
//   reported (default 4) CUEMU_STATS=1      per-process totals on exit
#pragma once
#define CUEMU 1
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>
#include <sys/mman.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define CUEMU_ASAN 1
extern "C" __attribute__((weak, used)) const char* __asan_default_options() {
    return "detect_leaks=0";
}
#endif
// ---------------------------------------------------------------- keywords
#define __global__
#define __device__
#define __host__
#define __constant__ static
#ifdef CUEMU_ASAN
#define __shared__ static  // red zones around shared arrays; CUEMU_THREADS is ignored
#else
#define __shared__ static thread_local
#endif
#define __managed__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define CUDART_VERSION 13000
#define __CUDA_ARCH_EMU__ 900
#define CUDART_CB
// ---------------------------------------------------------------- vector types
#define CUEMU_V(T, N)                                                               \
    struct alignas(2 * sizeof(T)) N##2 { T x, y; };                                 \
    struct N##3 { T x, y, z; };                                                     \
    struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) N##4 { T x, y, z, w; }; \
    inline N##2 make_##N##2(T x, T y) { return {x, y}; }                            \
    inline N##3 make_##N##3(T x, T y, T z) { return {x, y, z}; }                    \
    inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUEMU_V(float, float)
CUEMU_V(double, double) CUEMU_V(int, int) CUEMU_V(unsigned, uint) CUEMU_V(short, short)
    CUEMU_V(unsigned short, ushort) CUEMU_V(signed char, char) CUEMU_V(unsigned char, uchar)
        CUEMU_V(long long, longlong) struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
    dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
// ---------------------------------------------------------------- bfloat16 (round to nearest even,
// one rounding per op)
inline float __uint_as_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline uint32_t __float_as_uint(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}
inline float __int_as_float(int u) { return __uint_as_float((uint32_t)u); }
inline int __float_as_int(float f) { return (int)__float_as_uint(f); }
typedef _Float16 half;
typedef _Float16 __half;  // fp16 is not used by the trainer; enough to compile
inline half __float2half(float f) { return (half)f; }
inline half __float2half_rn(float f) { return (half)f; }
inline float __half2float(half h) { return (float)h; }
struct __nv_bfloat16_raw {
    unsigned short x;
};
struct alignas(2) __nv_bfloat16 {
    uint16_t x_;
    static uint16_t rn(float f) {
        uint32_t u = __float_as_uint(f);
        if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
        return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
    }
    __nv_bfloat16() = default;
    __nv_bfloat16(__nv_bfloat16_raw r) : x_(r.x) {}
    template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
    __nv_bfloat16(T v) : x_(rn((float)v)) {}
    operator float() const { return __uint_as_float((uint32_t)x_ << 16); }
    explicit operator bool() const { return (x_ & 0x7fff) != 0; }
};
typedef __nv_bfloat16 nv_bfloat16;
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
typedef __nv_bfloat162 nv_bfloat162;
#define CUEMU_B(op)                                                              \
    inline __nv_bfloat16 operator op(__nv_bfloat16 a, __nv_bfloat16 b) {         \
        return __nv_bfloat16((float)a op(float) b);                              \
    }                                                                            \
    inline __nv_bfloat16& operator op## = (__nv_bfloat16 & a, __nv_bfloat16 b) { \
        return a = a op b;                                                       \
    }                                                                            \
    inline __nv_bfloat162 operator op(__nv_bfloat162 a, __nv_bfloat162 b) {      \
        return {a.x op b.x, a.y op b.y};                                         \
    }
CUEMU_B(+) CUEMU_B(-) CUEMU_B(*) CUEMU_B(/) inline __nv_bfloat16 operator-(__nv_bfloat16 a) {
    a.x_ ^= 0x8000;
    return a;
}
#define CUEMU_C(op) \
    inline bool operator op(__nv_bfloat16 a, __nv_bfloat16 b) { return (float)a op(float) b; }
CUEMU_C(<)
CUEMU_C(>) CUEMU_C(<=) CUEMU_C(>=) CUEMU_C(==) CUEMU_C(!=) inline __nv_bfloat16
    __float2bfloat16(float f) {
    return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return f; }
inline float __bfloat162float(__nv_bfloat16 b) { return b; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 a) { return {a.x, a.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline float __low2float(__nv_bfloat162 a) { return a.x; }
inline float __high2float(__nv_bfloat162 a) { return a.y; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.x_; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) {
    return __nv_bfloat16(__nv_bfloat16_raw{u});
}
inline __nv_bfloat16 __hadd(__nv_bfloat16 a, __nv_bfloat16 b) { return a + b; }
inline __nv_bfloat16 __hmul(__nv_bfloat16 a, __nv_bfloat16 b) { return a * b; }
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
    return __nv_bfloat16(fmaf(a, b, c));
}
// ---------------------------------------------------------------- engine
namespace cuemu {
[[noreturn]] inline void die(const char* msg) {
    fflush(stdout);
    fprintf(stderr, "cuemu: %s\n", msg);
    abort();
}
struct Lane;
struct Engine;
struct Fiber {
    void* sp = nullptr;
    char* stack = nullptr;
    Lane* lane = nullptr;
    void* fake = nullptr;
};
typedef void (*Op)(void** args, uint32_t mask);
struct Group {
    uint32_t mask = 0, arrived = 0;
    Op op = nullptr;
    void* arg[32];
};
struct Warp {
    uint32_t exist = 0, exited = 0;
    Lane* lanes[32];
    Group g[6];
};
struct CpOp {
    void* dst;
    const void* src;
    int bytes, zfill;
    int group;
};
struct Lane {
    uint3 tid;
    unsigned lane = 0, lin = 0;
    Warp* warp = nullptr;
    Fiber* fib = nullptr;
    const char* wait = nullptr;
    int line = 0, cpgroup = 0;
    bool done = false;
    std::vector<CpOp> cp;
};
struct Bar {
    std::vector<Lane*> w;
    int acc = 0, res = 0;
};  // named barrier, __syncthreads is number 0
struct WgGroup {
    std::vector<Lane*> w;
    std::vector<void*> arg;
};
constexpr size_t kStack =
#ifdef CUEMU_ASAN
    512 << 10;
#else
    128 << 10;
#endif
inline int envi(const char* n, int d) {
    const char* s = getenv(n);
    return s ? atoi(s) : d;
}
inline std::atomic<uint64_t> n_threads{0}, n_switch{0}, n_blocks{0}, n_launch{0};
inline std::atomic<uint64_t> ns_total{0};

#if defined(__x86_64__)
__attribute__((naked, noinline)) inline void ctx_switch(void** /*save*/, void* /*to*/) {
    asm volatile(
        "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15; movq %rsp,(%rdi); "
        "movq %rsi,%rsp;"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
#elif defined(__aarch64__)
__attribute__((naked, noinline)) inline void ctx_switch(void**, void*) {
    asm volatile(
        "sub sp,sp,#160; stp x19,x20,[sp]; stp x21,x22,[sp,#16]; stp x23,x24,[sp,#32]; stp "
        "x25,x26,[sp,#48]; stp x27,x28,[sp,#64];"
        "stp x29,x30,[sp,#80]; stp d8,d9,[sp,#96]; stp d10,d11,[sp,#112]; stp d12,d13,[sp,#128]; "
        "stp d14,d15,[sp,#144]; mov x9,sp; str x9,[x0]; mov sp,x1;"
        "ldp x19,x20,[sp]; ldp x21,x22,[sp,#16]; ldp x23,x24,[sp,#32]; ldp x25,x26,[sp,#48]; ldp "
        "x27,x28,[sp,#64];"
        "ldp x29,x30,[sp,#80]; ldp d8,d9,[sp,#96]; ldp d10,d11,[sp,#112]; ldp d12,d13,[sp,#128]; "
        "ldp d14,d15,[sp,#144]; add sp,sp,#160; ret");
}
#else
#error "cuemu: add ctx_switch for this processor"
#endif

inline thread_local Lane* cur = nullptr;
inline thread_local Engine* eng = nullptr;

struct Engine {
    dim3 grid, block;
    uint3 bid;
    void (*fn)(void*) = nullptr;
    void* fnarg = nullptr;
    std::vector<Lane> lanes;
    std::vector<Warp> warps;
    std::vector<int> perm;
    std::vector<Lane*> ready;
    size_t rhead = 0;
    std::vector<Fiber*> idle;
    Fiber mainf;
    Fiber* running = nullptr;
    int N = 0, next_new = 0, live = 0, order = envi("CUEMU_ORDER", 0);
    uint64_t spins = 0;
    Bar bar[16];
    std::vector<char> dynbuf;
    char* dyn = nullptr;
    size_t dynsz = 0;
    std::mt19937 rng{1234};
    uint64_t sw = 0;
    std::map<int, WgGroup> wg;
    struct Tma {
        uint64_t* bar;
        std::function<void()> go;
    };
    std::vector<Tma> tma;

    void jump(Fiber* to) {  // leave `running`, continue `to`
        Fiber* from = running;
        running = to;
        if (to->lane) cur = to->lane;
        sw++;
#ifdef CUEMU_ASAN
        __sanitizer_start_switch_fiber(&from->fake, to == &mainf ? mb : to->stack,
                                       to == &mainf ? ms : kStack);
        ctx_switch(&from->sp, to->sp);
        __sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);
#else
        ctx_switch(&from->sp, to->sp);
#endif
    }
#ifdef CUEMU_ASAN
    const void* mb = nullptr;
    size_t ms = 0;
#endif
    static void entry() {
#ifdef CUEMU_ASAN
        const void* ob;
        size_t os;
        __sanitizer_finish_switch_fiber(nullptr, &ob, &os);
        if (!eng->mb) {
            eng->mb = ob;
            eng->ms = os;
        }  // the first fiber is entered from the main stack
#endif
        eng->worker(eng->running);
    }
    Fiber*
    fiber() {  // always enters entry() afresh, so no thread-local address is kept across OS threads
        Fiber* f;
        if (!idle.empty()) {
            f = idle.back();
            idle.pop_back();
        } else {
            f = new Fiber;
            f->stack = (char*)mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (f->stack == MAP_FAILED) die("no memory for a fiber stack");
            mprotect(f->stack, 4096,
                     PROT_NONE);  // guard page: a kernel that overflows its stack faults
        }
#ifdef CUEMU_ASAN
        __asan_unpoison_memory_region(f->stack + 4096, kStack - 4096);
        f->fake = nullptr;
#endif
        void** p = (void**)(((uintptr_t)f->stack + kStack) & ~(uintptr_t)63);
#if defined(__x86_64__)
        *--p = nullptr;
        *--p = (void*)&Engine::entry;
        for (int i = 0; i < 6; i++) *--p = nullptr;
#else
        p -= 20;
        memset(p, 0, 160);
        p[11] = (void*)&Engine::entry;
#endif
        f->sp = p;
        f->lane = nullptr;
        return f;
    }
    Fiber* next() {  // ready threads first, then not-yet-started ones
        if (rhead < ready.size()) {
            size_t k = order == 0   ? rhead
                       : order == 1 ? ready.size() - 1
                                    : rhead + rng() % (ready.size() - rhead);
            if (order == 0) {
                Lane* l = ready[rhead++];
                if (rhead == ready.size()) {
                    ready.clear();
                    rhead = 0;
                }
                return l->fib;
            }
            Lane* l = ready[k];
            ready[k] = ready.back();
            ready.pop_back();
            return l->fib;
        }
        return next_new < N ? fiber() : nullptr;
    }
    __attribute__((noinline)) void worker(
        Fiber* f) {  // threads that never wait run one after another on one fiber
        while (next_new < N && rhead >= ready.size()) {
            Lane* l = &lanes[perm[next_new++]];
            l->fib = f;
            f->lane = l;
            cur = l;
            fn(fnarg);
            finish(l);
        }
        f->lane = nullptr;
        Fiber* n = next();
        idle.push_back(f);
        jump(n ? n : &mainf);
        __builtin_trap();
    }
    void wake(Lane* l) {
        if (l != cur && !l->done) ready.push_back(l);
    }
    void park(const char* what, int line) {
        Lane* me = cur;
        me->wait = what;
        me->line = line;
        Fiber* n = next();
        jump(n ? n : &mainf);
        me->wait = nullptr;
    }
    void yield() {  // for spin waits (mbarrier): go to the back of the queue
        Lane* me = cur;
        if (++spins > 50u * 1000 * 1000) die("livelock: a spin wait never ends");
        me->wait = "spin";
        ready.push_back(me);
        if (order == 1) std::swap(ready[rhead], ready.back());
        Fiber* n = next();
        if (n != me->fib) jump(n);
        me->wait = nullptr;
    }
    bool complete(Warp& w, Group& g) {
        if (!g.arrived || g.arrived != (g.mask & w.exist & ~w.exited)) return false;
        uint32_t m = g.arrived;
        g.arrived = 0;
        Op op = g.op;
        g.op = nullptr;
        if (op) op(g.arg, m);
        for (int i = 0; i < 32; i++)
            if (m >> i & 1) wake(w.lanes[i]);
        return true;
    }
    void collective(uint32_t mask, void* arg, Op op, const char* what, int line) {
        Lane* me = cur;
        Warp& w = *me->warp;
        uint32_t bit = 1u << me->lane;
        Group* g = nullptr;
        if (!(mask & bit)) die("warp collective: calling lane is not in its own mask");
        for (auto& x : w.g)
            if (x.arrived && x.mask == mask) {
                g = &x;
                break;
            }
        if (!g)
            for (auto& x : w.g)
                if (!x.arrived) {
                    g = &x;
                    g->mask = mask;
                    g->op = op;
                    break;
                }
        if (!g) die("warp collective: too many different masks in flight in one warp");
        if (g->op != op) {
            fprintf(stderr,
                    "cuemu: block (%u,%u,%u) thread %u: %s line %d meets a different collective of "
                    "the same warp\n",
                    bid.x, bid.y, bid.z, me->lin, what, line);
            abort();
        }
        g->arg[me->lane] = arg;
        g->arrived |= bit;
        if (!complete(w, *g)) park(what, line);
    }
    void release(Bar& b) {
        b.res = b.acc;
        b.acc = 0;
        std::vector<Lane*> t;
        t.swap(b.w);
        for (Lane* l : t) wake(l);
        t.clear();
        if (b.w.empty()) b.w.swap(t);
    }
    int barrier(int id, int expected, int v,
                int line) {  // expected 0: every thread that has not exited
        Bar& b = bar[id];
        b.w.push_back(cur);
        b.acc += v;
        if ((int)b.w.size() == (expected ? expected : live))
            release(b);
        else
            park(id ? "bar.sync" : "__syncthreads", line);
        return b.res;
    }
    void wgcollective(void* arg, void (*op)(void**, Lane**), const char* what,
                      int line) {  // 128 consecutive threads
        WgGroup& g = wg[cur->lin / 128];
        g.w.push_back(cur);
        g.arg.push_back(arg);
        if (g.w.size() == 128) {
            op(g.arg.data(), g.w.data());
            auto t = g.w;
            g.w.clear();
            g.arg.clear();
            for (Lane* l : t) wake(l);
        } else
            park(what, line);
    }
    void finish(Lane* l) {
        l->done = true;
        live--;
        l->warp->exited |= 1u << l->lane;
        l->cp.clear();
        for (auto& g : l->warp->g) complete(*l->warp, g);
        if (live && !bar[0].w.empty() && (int)bar[0].w.size() == live) release(bar[0]);
    }
    void run_block(uint3 b) {
        eng = this;
        bid = b;
        next_new = 0;
        live = N;
        ready.clear();
        rhead = 0;
        spins = 0;
        tma.clear();
        for (auto& w : warps) {
            w.exist = w.exited = 0;
            for (auto& g : w.g) g.arrived = 0;
        }
        for (int i = 0; i < N; i++) {
            Lane& l = lanes[i];
            l.lin = i;
            l.lane = i & 31;
            l.warp = &warps[i >> 5];
            l.warp->exist |= 1u << l.lane;
            l.warp->lanes[l.lane] = &l;
            l.done = false;
            l.cpgroup = 0;
            l.cp.clear();
            l.wait = nullptr;
            l.tid = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
            perm[i] = order == 1 ? N - 1 - i : i;
        }
        if (order == 2) std::shuffle(perm.begin(), perm.end(), rng);
        if (dynsz) memset(dyn, 0xff, dynsz);  // NaN in float and bf16
        running = &mainf;
        mainf.lane = nullptr;
        while (live) {
            Fiber* n = next();
            if (!n) deadlock();
            jump(n);
            cur = nullptr;
        }
    }
    void deadlock() {
        fprintf(stderr, "cuemu: deadlock in block (%u,%u,%u):", bid.x, bid.y, bid.z);
        int k = 0;
        for (auto& l : lanes)
            if (!l.done && k++ < 8)
                fprintf(stderr, " [thread %u waits in %s, line %d]", l.lin, l.wait ? l.wait : "?",
                        l.line);
        fprintf(stderr, " ... %d of %d threads left\n", live, N);
        abort();
    }
    void setup(dim3 g, dim3 b, size_t smem, void (*f)(void*), void* a) {
        grid = g;
        block = b;
        N = (int)(b.x * b.y * b.z);
        fn = f;
        fnarg = a;
        dynsz = smem;
        lanes.resize(N);
        perm.resize(N);
        warps.resize((N + 31) / 32);
        if (dynbuf.size() < smem + 2048) dynbuf.resize(smem + 2048);
        dyn = (char*)(((uintptr_t)dynbuf.data() + 1023) & ~(uintptr_t)1023);
    }
};
inline std::mutex pool_mu;
inline std::vector<Engine*> pool;
inline Engine* get_engine() {
    std::lock_guard<std::mutex> l(pool_mu);
    if (pool.empty()) return new Engine;
    Engine* e = pool.back();
    pool.pop_back();
    return e;
}
inline void put_engine(Engine* e) {
    std::lock_guard<std::mutex> l(pool_mu);
    pool.push_back(e);
}
inline char* dynsmem() { return eng->dyn; }
inline int last_error = 0;
inline size_t smem_optin = 48 << 10;
struct Cfg {
    dim3 g, b;
    size_t smem;
    void* st;
    Cfg(dim3 g_, dim3 b_, size_t s = 0, const void* st_ = nullptr)
        : g(g_), b(b_), smem(s), st((void*)st_) {}
};
struct Stats {
    ~Stats() {
        if (envi("CUEMU_STATS", 0))
            fprintf(stderr,
                    "cuemu: %llu launches, %llu blocks, %llu threads, %llu switches, %.3f s in "
                    "kernels (%.2f M threads/s)\n",
                    (unsigned long long)n_launch, (unsigned long long)n_blocks,
                    (unsigned long long)n_threads, (unsigned long long)n_switch, ns_total * 1e-9,
                    n_threads * 1e3 / (double)(ns_total + 1));
    }
};
inline Stats stats;
template <class F>
void launch(const Cfg& c, F&& f) {
    uint64_t th = (uint64_t)c.b.x * c.b.y * c.b.z, nb = (uint64_t)c.g.x * c.g.y * c.g.z;
    if (!th || !nb || th > 1024 || c.b.z > 64 || c.g.y > 65535 || c.g.z > 65535 ||
        c.smem > smem_optin) {
        last_error = c.smem > smem_optin ? 1 : 9;
        return;
    }
    if (cur) die("kernel launched from a kernel");
    auto t0 = std::chrono::steady_clock::now();
    auto call = [](void* p) { (*(std::remove_reference_t<F>*)p)(); };
    int T = (int)std::min<uint64_t>(nb, (uint64_t)std::max(1, envi("CUEMU_THREADS", 1)));
#ifdef CUEMU_ASAN
    T = 1;
#endif
    std::atomic<uint64_t> nextb{0};
    auto work = [&] {
        Engine& e = *get_engine();
        e.setup(c.g, c.b, c.smem, call, (void*)&f);
        uint64_t s0 = e.sw;
        for (uint64_t i; (i = nextb++) < nb;) {
            uint64_t k = e.order == 1 ? nb - 1 - i : i;
            e.run_block({(unsigned)(k % c.g.x), (unsigned)(k / c.g.x % c.g.y),
                         (unsigned)(k / c.g.x / c.g.y)});
        }
        cur = nullptr;
        eng = nullptr;
        n_switch += e.sw - s0;
        put_engine(&e);
    };
    if (T == 1)
        work();
    else {
        std::vector<std::thread> v;
        for (int i = 0; i < T; i++) v.emplace_back(work);
        for (auto& t : v) t.join();
    }
    n_threads += th * nb;
    n_blocks += nb;
    n_launch++;
    ns_total +=
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - t0)
            .count();
}
}  // namespace cuemu
#define threadIdx (cuemu::cur->tid)
#define blockIdx (cuemu::eng->bid)
#define blockDim (cuemu::eng->block)
#define gridDim (cuemu::eng->grid)
constexpr int warpSize = 32;
// ---------------------------------------------------------------- barriers and warp collectives
#define CUEMU_L int line = __builtin_LINE()
inline void __syncthreads(CUEMU_L) {
    static const int without = cuemu::envi("CUEMU_WITHOUT_BARRIER", 0);
    if (line != without) cuemu::eng->barrier(0, 0, 0, line);
}
inline int __syncthreads_count(int p, CUEMU_L) { return cuemu::eng->barrier(0, 0, p != 0, line); }
inline int __syncthreads_or(int p, CUEMU_L) { return cuemu::eng->barrier(0, 0, p != 0, line) != 0; }
inline int __syncthreads_and(int p, CUEMU_L) {
    return cuemu::eng->barrier(0, 0, p == 0, line) == 0;
}
inline void named_bar_sync(int id, int nthreads, CUEMU_L) {
    cuemu::eng->barrier(id, nthreads, 0, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUEMU_L) {
    cuemu::eng->collective(mask, nullptr, [](void**, uint32_t) {}, "__syncwarp", line);
}
template <class T>
struct CuemuShfl {
    T v, r;
    int src;
};
template <class T>
T cuemu_shfl(unsigned mask, T v, int src, const char* what, int line) {
    CuemuShfl<T> a{v, v, src};
    cuemu::eng->collective(
        mask, &a,
        [](void** p, uint32_t m) {
            for (int i = 0; i < 32; i++)
                if (m >> i & 1) {
                    auto* x = (CuemuShfl<T>*)p[i];
                    if (m >> x->src & 1) x->r = ((CuemuShfl<T>*)p[x->src])->v;
                }
        },
        what, line);
    return a.r;
}
#define CUEMU_LANE ((int)cuemu::cur->lane)
template <class T>
T __shfl_sync(unsigned m, T v, int s, int w = 32, CUEMU_L) {
    return cuemu_shfl(m, v, (CUEMU_LANE & ~(w - 1)) | (s & (w - 1)), "__shfl_sync", line);
}
template <class T>
T __shfl_xor_sync(unsigned m, T v, int x, int w = 32, CUEMU_L) {
    int s = CUEMU_LANE ^ x;
    if ((s & ~(w - 1)) > (CUEMU_LANE & ~(w - 1))) s = CUEMU_LANE;
    return cuemu_shfl(m, v, s, "__shfl_xor_sync", line);
}
template <class T>
T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32, CUEMU_L) {
    int s = CUEMU_LANE + (int)d;
    if ((CUEMU_LANE & (w - 1)) + (int)d >= w) s = CUEMU_LANE;
    return cuemu_shfl(m, v, s, "__shfl_down_sync", line);
}
template <class T>
T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32, CUEMU_L) {
    int s = CUEMU_LANE - (int)d;
    if ((CUEMU_LANE & (w - 1)) < (int)d) s = CUEMU_LANE;
    return cuemu_shfl(m, v, s, "__shfl_up_sync", line);
}
inline unsigned __ballot_sync(unsigned m, int pred, CUEMU_L) {
    unsigned a = pred != 0;
    cuemu::eng->collective(
        m, &a,
        [](void** p, uint32_t mm) {
            unsigned r = 0;
            for (int i = 0; i < 32; i++)
                if (mm >> i & 1) r |= *(unsigned*)p[i] << i;
            for (int i = 0; i < 32; i++)
                if (mm >> i & 1) *(unsigned*)p[i] = r;
        },
        "__ballot_sync", line);
    return a;
}
inline int __any_sync(unsigned m, int p, CUEMU_L) { return __ballot_sync(m, p, line) != 0; }
inline int __all_sync(unsigned m, int p, CUEMU_L) { return __ballot_sync(m, !p, line) == 0; }
template <class T, class F>
T cuemu_reduce(unsigned m, T v, F f, int line) {
    T r = v;
    bool first = true;
    for (int i = 0; i < 32; i++) {
        T x = cuemu_shfl(m, v, i, "__reduce_sync", line);
        if (m >> i & 1) {
            r = first ? x : f(r, x);
            first = false;
        }
    }
    return r;
}
inline int __reduce_add_sync(unsigned m, int v, CUEMU_L) {
    return cuemu_reduce(m, v, [](int a, int b) { return a + b; }, line);
}
inline int __reduce_max_sync(unsigned m, int v, CUEMU_L) {
    return cuemu_reduce(m, v, [](int a, int b) { return a > b ? a : b; }, line);
}
inline unsigned __activemask() { return cuemu::cur->warp->exist & ~cuemu::cur->warp->exited; }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { cuemu::eng->yield(); }
// ---------------------------------------------------------------- atomics (real ones: blocks may
// run on several OS threads)
template <class U, class T, class F>
T cuemu_rmw(T* p, F f) {
    U o = __atomic_load_n((U*)p, __ATOMIC_RELAXED), n;
    T ov;
    do {
        memcpy(&ov, &o, sizeof o);
        T nv = f(ov);
        memcpy(&n, &nv, sizeof n);
    } while (!__atomic_compare_exchange_n((U*)p, &o, n, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return ov;
}
inline float atomicAdd(float* p, float v) {
    return cuemu_rmw<uint32_t>(p, [=](float o) { return o + v; });
}
inline double atomicAdd(double* p, double v) {
    return cuemu_rmw<uint64_t>(p, [=](double o) { return o + v; });
}
inline __nv_bfloat16 atomicAdd(__nv_bfloat16* p, __nv_bfloat16 v) {
    return cuemu_rmw<uint16_t>(p, [=](__nv_bfloat16 o) { return o + v; });
}
inline __nv_bfloat162 atomicAdd(__nv_bfloat162* p, __nv_bfloat162 v) {
    return cuemu_rmw<uint32_t>(p, [=](__nv_bfloat162 o) { return o + v; });
}
inline int atomicAdd(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* p, unsigned v) {
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) {
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
template <class T>
std::enable_if_t<std::is_integral_v<T>, T> atomicMax(T* p, T v) {
    return cuemu_rmw<std::make_unsigned_t<T>>(p, [=](T o) { return o > v ? o : v; });
}
template <class T>
std::enable_if_t<std::is_integral_v<T>, T> atomicMin(T* p, T v) {
    return cuemu_rmw<std::make_unsigned_t<T>>(p, [=](T o) { return o < v ? o : v; });
}
inline unsigned atomicInc(unsigned* p, unsigned m) {
    return cuemu_rmw<uint32_t>(p, [=](unsigned o) { return o >= m ? 0u : o + 1; });
}
template <class T>
T atomicOr(T* p, T v) {
    return __atomic_fetch_or(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicExch(T* p, T v) {
    return cuemu_rmw<std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>(p,
                                                                             [=](T) { return v; });
}
template <class T>
T atomicCAS(T* p, T c, T v) {
    __atomic_compare_exchange_n(p, &c, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return c;
}
// ---------------------------------------------------------------- math, bits, cached loads
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __powf(a, b) powf(a, b)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __frsqrt_rn(float a) { return rsqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __saturatef(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
T __ldcs(const T* p) {
    return *p;
}
template <class T>
T __ldcg(const T* p) {
    return *p;
}
template <class T>
T __ldlu(const T* p) {
    return *p;
}
template <class T>
void __stcs(T* p, T v) {
    *p = v;
}
template <class T>
void __stcg(T* p, T v) {
    *p = v;
}
template <class T>
void __stwt(T* p, T v) {
    *p = v;
}
template <class A, class B>
constexpr std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>,
                           std::common_type_t<A, B>>
max(A a, B b) {
    using C = std::common_type_t<A, B>;
    return (C)a > (C)b ? (C)a : (C)b;
}
template <class A, class B>
constexpr std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>,
                           std::common_type_t<A, B>>
min(A a, B b) {
    using C = std::common_type_t<A, B>;
    return (C)a < (C)b ? (C)a : (C)b;
}
inline long long clock64() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
inline void __trap() { cuemu::die("__trap()"); }
#include "cuemu_ptx.h"
#include "cuemu_rt.h"
