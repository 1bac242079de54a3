/*
Runs the kernels of train_gpt2.cu on the CPU, for tests without a GPU: g++ on x86-64 is enough.

    python rewrite.py train_gpt2.cu > train_gpt2.cpp
    g++ -std=c++20 -O2 -Ishim train_gpt2.cpp

A CUDA thread is a fiber with a stack of its own. Blocks run one after another; in a block, a thread
runs until it waits: at a barrier for the block, at a shuffle, ldmatrix or mma for its warp, at
wgmma for its warpgroup. The last one to arrive does the work of all. What a GPU leaves open is
chosen by the environment:

    CUEMU_ORDER=0     threads and blocks forward; asynchronous copies land when they are waited for,
                      asynchronous products (wgmma) are computed when they are waited for
    CUEMU_ORDER=1     backward; copies land at once, products as in 0
    CUEMU_ORDER=2     threads shuffled; copies as in 0, products are computed at once
    CUEMU_WITHOUT_BARRIER=N     the __syncthreads() in line N does nothing
    CUEMU_LAST_EPILOGUE=N       cuBLASLt has no epilogues of a higher number: 1 plain, 4 bias
    CUEMU_FASTEST=N             cuBLASLt's algorithm N, 0 or 1, is faster than the other

Not covered: speed, bank conflicts, the order of memory accesses, fences, streams that run side by
side.
*/
#pragma once
#define CUEMU 1
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <type_traits>
#include <vector>
#include <sys/mman.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
extern "C" __attribute__((weak, used)) const char* __asan_default_options() {
    return "detect_leaks=0";
}
#endif

// ---- Keywords and types -------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

// The upper half of a float; conversion rounds to nearest, ties to even.
struct alignas(2) __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    template <class Number, class = std::enable_if_t<std::is_arithmetic_v<Number>>>
    __nv_bfloat16(Number number) {
        uint32_t whole = __float_as_uint((float)number);
        bool is_nan = (whole & 0x7FFFFFFFu) > 0x7F800000u;
        bits = is_nan ? 0x7FFF : (whole + 0x7FFF + (whole >> 16 & 1)) >> 16;
    }
    operator float() const { return __uint_as_float((uint32_t)bits << 16); }
};
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
    return a > b ? a : b;
}
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
    return a < b ? a : b;
}

// ---- Fibers -------------------------------------------------------------------------------------

namespace cuemu {

[[noreturn]] inline void die(const char* message) {
    fflush(stdout);
    fprintf(stderr, "emulator: %s\n", message);
    abort();
}

inline int setting(const char* name) {
    const char* value = getenv(name);
    return value != NULL ? atoi(value) : 0;
}

struct Thread;
struct Fiber {
    void* stack_pointer;
    char* stack;
    Thread* thread;             // which it runs; NULL: none yet
    void* fake_stack;           // the address sanitizer's
};

#ifdef __SANITIZE_ADDRESS__
const size_t STACK_BYTES = 512 << 10;
#else
const size_t STACK_BYTES = 128 << 10;
#endif

#ifndef __x86_64__
#error "the emulator switches fibers on x86-64 only; run DEVICE=1 on a GPU instead"
#endif
// Saves the registers that a function must keep, and goes on where `to` was left.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*from*/, void* /*to*/) {
    asm volatile("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
                 "movq %rsp, (%rdi); movq %rsi, %rsp;"
                 "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

// ---- A block of threads -------------------------------------------------------------------------

struct Copy { void* to; const void* from; int valid, group; };      // a cp.async on its way
struct Box { const void* barrier; std::function<void()> land; };    // a copy by TMA on its way
struct Product { int group; std::function<void()> compute; };       // a wgmma on its way
typedef void (*Collective)(void** arguments);       // one of each lane; NULL: it is not there

// Threads that work together: the 32 of a warp, or the 128 of a warpgroup
struct Warp {
    Thread* lanes[128];
    void* arguments[128];                   // NULL but while a lane waits
    int n_lanes, n_alive, n_arrived;
    Collective collective;
    std::vector<Product> products;
};

struct Thread {
    uint3 index;
    int lane;                               // in its warp
    Warp *warp, *warpgroup;
    Fiber* fiber;
    bool done;
    const char* waits_in;
    int line;
    std::vector<Copy> copies;
    int copy_group, product_group;
};

struct Block {
    dim3 grid, size;
    uint3 index;
    int n, n_started, n_alive, order = setting("CUEMU_ORDER");
    void (*run)(void*);
    void* kernel;
    std::vector<Thread> threads;
    std::vector<Warp> warps, warpgroups;
    std::vector<int> starts;                // in which order threads start
    std::deque<Thread*> ready;              // what they waited for is there
    std::vector<Thread*> at_barrier;
    std::vector<std::pair<const void*, Thread*>> at_mbarriers;
    std::vector<Box> boxes;
    std::vector<Fiber*> idle;
    Fiber main, *running;
    size_t main_stack_bytes = STACK_BYTES;
    std::vector<char> memory;
    char* shared;
    std::mt19937 random{1234};
};
inline Block block;
inline Thread* current;

inline void jump(Fiber* to) {
    Fiber* from = block.running;
    block.running = to, current = to->thread;
#ifdef __SANITIZE_ADDRESS__
    size_t bytes = to == &block.main ? block.main_stack_bytes : STACK_BYTES;
    __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, bytes);
    switch_stacks(&from->stack_pointer, to->stack_pointer);
    __sanitizer_finish_switch_fiber(from->fake_stack, NULL, NULL);
#else
    switch_stacks(&from->stack_pointer, to->stack_pointer);
#endif
}

inline void run_threads();

// A fiber that begins run_threads(), below a page that must not be touched
inline Fiber* new_fiber() {
    Fiber* fiber;
    if (!block.idle.empty()) {
        fiber = block.idle.back();
        block.idle.pop_back();
    } else {
        void* stack = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED || mprotect(stack, 4096, PROT_NONE) != 0) { die("no memory"); }
        fiber = new Fiber{NULL, (char*)stack, NULL, NULL};
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fiber->stack + 4096, STACK_BYTES - 4096);
    fiber->fake_stack = NULL;
#endif
    void** top = (void**)(fiber->stack + STACK_BYTES);
    *--top = NULL, *--top = (void*)&run_threads;
    for (int i = 0; i < 6; i++) { *--top = NULL; }      // the registers
    fiber->stack_pointer = top, fiber->thread = NULL;
    return fiber;
}

// The next to go on: one that is ready, else one that has not begun, else nobody
inline Fiber* next_fiber() {
    if (block.ready.empty()) { return block.n_started < block.n ? new_fiber() : &block.main; }
    size_t last = block.ready.size() - 1;
    size_t i = block.order == 0 ? 0 : block.order == 1 ? last : block.random() % (last + 1);
    Thread* thread = block.ready[i];
    if (i == 0) {
        block.ready.pop_front();
    } else {
        std::swap(block.ready[i], block.ready.back());
        block.ready.pop_back();
    }
    return thread->fiber;
}

inline void wait(const char* where, int line) {
    current->waits_in = where, current->line = line;
    jump(next_fiber());
}

inline void wake(Thread* thread) {
    if (thread != current && !thread->done) { block.ready.push_back(thread); }
}

inline void open_barrier() {
    std::vector<Thread*> waiting;
    waiting.swap(block.at_barrier);
    for (Thread* thread : waiting) { wake(thread); }
}

inline void barrier(int line) {
    block.at_barrier.push_back(current);
    (int)block.at_barrier.size() == block.n_alive ? open_barrier() : wait("__syncthreads", line);
}

inline void complete(Warp* warp) {
    warp->n_arrived = 0;
    warp->collective(warp->arguments);
    for (int lane = 0; lane < warp->n_lanes; lane++) {
        if (warp->arguments[lane] != NULL) { wake(warp->lanes[lane]); }
        warp->arguments[lane] = NULL;
    }
}

// All lanes of the warp bring an argument; the last one works on all.
inline void collective(Warp* warp, int lane, void* argument, Collective work, const char* name,
                       int line) {
    if (warp->n_arrived > 0 && warp->collective != work) {
        fprintf(stderr, "emulator: line %d: lane %d of a warp is in %s, others are elsewhere\n",
                line, lane, name);
        abort();
    }
    warp->collective = work, warp->arguments[lane] = argument;
    ++warp->n_arrived == warp->n_alive ? complete(warp) : wait(name, line);
}
inline void collective(void* argument, Collective work, const char* name, int line) {
    collective(current->warp, current->lane, argument, work, name, line);
}

// A thread that returns no longer counts where others wait.
inline void finish(Thread* thread) {
    thread->done = true, thread->copies.clear();
    Warp* warp = thread->warp;
    block.n_alive--, warp->n_alive--;
    if (warp->n_arrived > 0 && warp->n_arrived == warp->n_alive) { complete(warp); }
    bool last = !block.at_barrier.empty() && (int)block.at_barrier.size() == block.n_alive;
    if (last) { open_barrier(); }
}

// What a fiber does: threads that never wait follow each other on one.
inline void run_threads() {
#ifdef __SANITIZE_ADDRESS__
    const void* stack;
    size_t bytes;
    __sanitizer_finish_switch_fiber(NULL, &stack, &bytes);
    if (block.main.stack == NULL) {         // the first fiber comes from there
        block.main.stack = (char*)stack, block.main_stack_bytes = bytes;
    }
#endif
    Fiber* fiber = block.running;
    while (block.n_started < block.n && block.ready.empty()) {
        current = &block.threads[block.starts[block.n_started++]];
        current->fiber = fiber, fiber->thread = current;
        block.run(block.kernel);
        finish(current);
    }
    fiber->thread = NULL;
    Fiber* next = next_fiber();
    block.idle.push_back(fiber);
    jump(next);
    __builtin_trap();
}

inline void report_deadlock() {
    fprintf(stderr, "emulator: deadlock in block (%u, %u, %u):", block.index.x, block.index.y,
            block.index.z);
    for (Thread& thread : block.threads) {
        if (thread.done) { continue; }
        fprintf(stderr, " %s in line %d", thread.waits_in, thread.line);
        break;
    }
    fprintf(stderr, ", %d of %d threads wait\n", block.n_alive, block.n);
    abort();
}

inline void run_block(uint3 index, size_t shared_bytes) {
    dim3 size = block.size;
    block.index = index, block.n_started = 0, block.n_alive = block.n;
    block.boxes.clear();
    for (Warp& warp : block.warps) { warp.n_lanes = 32, warp.n_alive = 0; }
    for (Warp& warp : block.warpgroups) {
        warp.n_lanes = 128, warp.n_alive = 0, warp.products.clear();
    }
    for (int i = 0; i < block.n; i++) {
        Thread& thread = block.threads[i];
        thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
        thread.lane = i % 32, thread.warp = &block.warps[i / 32];
        thread.warp->lanes[thread.lane] = &thread, thread.warp->n_alive++;
        thread.warpgroup = &block.warpgroups[i / 128];
        thread.warpgroup->lanes[i % 128] = &thread, thread.warpgroup->n_alive++;
        thread.done = false, thread.copy_group = thread.product_group = 0;
        block.starts[i] = block.order == 1 ? block.n - 1 - i : i;
    }
    if (block.order == 2) { std::shuffle(block.starts.begin(), block.starts.end(), block.random); }
    memset(block.shared, 0xFF, shared_bytes);       // NaN, in fp32 and bf16
    block.running = &block.main;
    while (block.n_alive > 0) {
        Fiber* next = next_fiber();
        if (next == &block.main) { report_deadlock(); }
        jump(next);
    }
}

// ---- Launches -----------------------------------------------------------------------------------

struct Launch {
    dim3 grid, block;
    size_t shared_bytes;
    Launch(dim3 grid, dim3 block, size_t shared_bytes, const void* /*stream*/)
        : grid(grid), block(block), shared_bytes(shared_bytes) {}
};
inline int last_error;                              // a cudaError_t
inline size_t most_shared_bytes = 48 << 10;         // more after cudaFuncSetAttribute

inline char* shared_memory() { return block.shared; }

template <class Kernel> void launch(const Launch& launch, Kernel kernel) {
    dim3 grid = launch.grid, size = launch.block;
    uint64_t n = (uint64_t)size.x * size.y * size.z, n_blocks = (uint64_t)grid.x * grid.y * grid.z;
    if (n == 0 || n > 1024 || n_blocks == 0 || grid.y > 65535 || grid.z > 65535 ||
        launch.shared_bytes > most_shared_bytes) {
        last_error = 9;
        return;
    }
    block.grid = grid, block.size = size, block.n = n;
    block.threads.resize(n), block.starts.resize(n), block.warps.resize((n + 31) / 32);
    block.warpgroups.resize((n + 127) / 128);
    block.run = [](void* kernel) { (*(Kernel*)kernel)(); };
    block.kernel = &kernel;
    block.memory.resize(std::max(block.memory.size(), launch.shared_bytes + 1024));
    block.shared = (char*)(((uintptr_t)block.memory.data() + 1023) & ~(uintptr_t)1023);
    for (uint64_t i = 0; i < n_blocks; i++) {
        uint64_t k = block.order == 1 ? n_blocks - 1 - i : i;
        run_block({(unsigned)(k % grid.x), (unsigned)(k / grid.x % grid.y),
                   (unsigned)(k / grid.x / grid.y)}, launch.shared_bytes);
    }
    current = NULL;
}
}  // namespace cuemu

#define threadIdx (cuemu::current->index)
#define blockIdx (cuemu::block.index)
#define blockDim (cuemu::block.size)
#define gridDim (cuemu::block.grid)

// ---- Barriers, shuffles, PTX --------------------------------------------------------------------

#define LINE int line = __builtin_LINE()

inline unsigned atomicMax(unsigned* address, unsigned value) {
    unsigned before = *address;
    *address = std::max(before, value);
    return before;
}

inline void __syncthreads(LINE) {
    static const int without = cuemu::setting("CUEMU_WITHOUT_BARRIER");
    if (line != without) { cuemu::barrier(line); }
}

inline float __shfl_xor_sync(unsigned, float value, int mask, LINE) {
    struct Shuffle { float value, result; int from; };
    Shuffle mine = {value, value, cuemu::current->lane ^ mask};
    cuemu::collective(&mine, [](void** lanes) {
        for (int i = 0; i < 32; i++) {
            Shuffle* one = (Shuffle*)lanes[i];
            if (one != NULL && lanes[one->from] != NULL) {
                one->result = ((Shuffle*)lanes[one->from])->value;
            }
        }
    }, "__shfl_xor_sync", line);
    return mine.result;
}

inline int __shfl_sync(unsigned, int value, int from, LINE) {
    struct Shuffle { int value, from; } mine = {value, from};
    cuemu::collective(&mine, [](void** lanes) {
        Shuffle old[32];
        for (int i = 0; i < 32; i++) {
            if (lanes[i] != NULL) { old[i] = *(Shuffle*)lanes[i]; }
        }
        for (int i = 0; i < 32; i++) {
            if (lanes[i] != NULL) { ((Shuffle*)lanes[i])->value = old[old[i].from].value; }
        }
    }, "__shfl_sync", line);
    return mine.value;
}

inline float bf16_half(uint32_t pair, int which) {
    return __uint_as_float(which ? pair & 0xFFFF0000u : pair << 16);
}

// c (16 x 8) += a (16 x 16) b (16 x 8); the layout of lanes is that of the PTX manual, 9.7.15
inline void mma_m16n8k16_bf16(float c[4], const uint32_t a[4], const uint32_t b[2], LINE) {
    struct Mma { float* c; const uint32_t *a, *b; } mine = {c, a, b};
    cuemu::collective(&mine, [](void** lanes) {
        float a[16][16], b[8][16];          // b transposed
        for (int lane = 0; lane < 32; lane++) {
            Mma* one = (Mma*)lanes[lane];
            if (one == NULL) { cuemu::die("mma.sync without all lanes of a warp"); }
            int row = lane / 4, column = lane % 4 * 2;
            for (int i = 0; i < 8; i++) {
                float value = bf16_half(one->a[i / 2], i % 2);
                a[row + i / 2 % 2 * 8][column + i / 4 * 8 + i % 2] = value;
            }
            for (int i = 0; i < 4; i++) {
                b[row][column + i / 2 * 8 + i % 2] = bf16_half(one->b[i / 2], i % 2);
            }
        }
        for (int lane = 0; lane < 32; lane++) {
            for (int r = 0; r < 4; r++) {
                float *left = a[lane / 4 + r / 2 * 8], *right = b[lane % 4 * 2 + r % 2], sum = 0;
                for (int k = 0; k < 16; k++) { sum += left[k] * right[k]; }
                ((Mma*)lanes[lane])->c[r] += sum;
            }
        }
    }, "mma.sync", line);
}

// Four 8 x 8 matrices; lane i has brought the address of row i % 8 of matrix i / 8.
template <bool TRANSPOSED> void load_matrices(uint32_t r[4], const void* row, int line) {
    struct Load { uint32_t* r; const void* row; } mine = {r, row};
    if ((uintptr_t)row % 16 != 0) { cuemu::die("ldmatrix from an address not aligned to 16"); }
    cuemu::collective(&mine, [](void** lanes) {
        for (int i = 0; i < 128; i++) {
            int matrix = i / 32, lane = i % 32;
            uint16_t pair[2];
            for (int k = 0; k < 2; k++) {
                int row = TRANSPOSED ? lane % 4 * 2 + k : lane / 4;
                int column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + k;
                pair[k] = ((const uint16_t*)((Load*)lanes[matrix * 8 + row])->row)[column];
            }
            ((Load*)lanes[lane])->r[matrix] = pair[0] | (uint32_t)pair[1] << 16;
        }
    }, "ldmatrix", line);
}
inline void ldmatrix_x4(uint32_t r[4], const void* row, LINE) {
    load_matrices<false>(r, row, line);
}
inline void ldmatrix_x4_trans(uint32_t r[4], const void* row, LINE) {
    load_matrices<true>(r, row, line);
}

inline void land(const cuemu::Copy& copy) {
    memset(copy.to, 0, 16);
    memcpy(copy.to, copy.from, copy.valid);
}

inline void cp_async16(void* to, const void* from, int valid) {
    if (((uintptr_t)to | (uintptr_t)from) % 16 != 0) {
        cuemu::die("cp.async between addresses not aligned to 16");
    }
    cuemu::Copy copy = {to, from, valid, cuemu::current->copy_group};
    cuemu::block.order == 1 ? land(copy) : cuemu::current->copies.push_back(copy);
}

inline void cp_async_commit() { cuemu::current->copy_group++; }

template <int PENDING> void cp_async_wait() {
    std::vector<cuemu::Copy>& copies = cuemu::current->copies;
    int landed = cuemu::current->copy_group - PENDING;
    size_t n = 0;
    for (cuemu::Copy& copy : copies) {
        if (copy.group < landed) { land(copy); } else { copies[n++] = copy; }
    }
    copies.resize(n);
}

#undef LINE
#include "cuemu_hopper.h"
#include "cuemu_host.h"
