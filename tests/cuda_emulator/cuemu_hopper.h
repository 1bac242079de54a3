/*
What GPUs of compute capability 9.0 have beyond those before them: mbarriers, copies of boxes by
TMA, and wgmma. Layouts and rules are those of the PTX manual and of CUTLASS's descriptors
(include/cute/atom/mma_traits_sm90_gmma.hpp).
*/
#pragma once
#define LINE int line = __builtin_LINE()

// ---- mbarriers ----------------------------------------------------------------------------------

namespace cuemu {

// A phase ends when `pending` arrivals and `bytes` of copies are both 0; then the next one begins.
struct Mbarrier { uint16_t count, pending : 15, phase : 1; int32_t bytes; };
static_assert(sizeof(Mbarrier) == 8);

inline void wake_at(const void* barrier) {
    std::vector<std::pair<const void*, Thread*>> others;
    for (auto& [at, thread] : block.at_mbarriers) {
        if (at == barrier) { wake(thread); } else { others.push_back({at, thread}); }
    }
    block.at_mbarriers.swap(others);
}

// The thread goes on later if another one is ready; with CUEMU_ORDER=1 that is the one woken last.
inline void let_others_run() {
    block.ready.push_front(current);
    Fiber* next = next_fiber();
    if (next != current->fiber) { jump(next); }
}

// `arrivals` and `bytes` are what comes in.
inline void count_down(uint64_t* barrier, int arrivals, int bytes) {
    Mbarrier* state = (Mbarrier*)barrier;
    if (arrivals > state->pending) { die("more arrivals at an mbarrier than it counts"); }
    state->pending -= arrivals, state->bytes -= bytes;
    if (state->pending == 0 && state->bytes == 0) {
        state->phase ^= 1, state->pending = state->count;
        wake_at(barrier);
    }
}

// Lands the boxes on their way whose bytes this mbarrier counts; true if there were any.
inline bool land_boxes(const void* barrier) {
    std::vector<Box> landing, others;
    for (Box& box : block.boxes) { (box.barrier == barrier ? landing : others).push_back(box); }
    block.boxes.swap(others);
    for (Box& box : landing) { box.land(); }
    return !landing.empty();
}
}  // namespace cuemu

inline void mbarrier_init(uint64_t* barrier, int count) {
    *(cuemu::Mbarrier*)barrier = {(uint16_t)count, (uint16_t)count, 0, 0};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint64_t* barrier) {
    cuemu::count_down(barrier, 1, 0);
    cuemu::let_others_run();
}
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
    cuemu::count_down(barrier, 0, -bytes);
    cuemu::count_down(barrier, 1, 0);
}
inline void mbarrier_wait(uint64_t* barrier, int parity, LINE) {
    while (((cuemu::Mbarrier*)barrier)->phase == parity) {
        if (cuemu::land_boxes(barrier)) { continue; }
        cuemu::block.at_mbarriers.push_back({barrier, cuemu::current});
        cuemu::wait("mbarrier_wait", line);
    }
}

inline void __syncwarp(LINE) {
    int nothing;
    cuemu::collective(&nothing, [](void**) {}, "__syncwarp", line);
}

// ---- TMA ----------------------------------------------------------------------------------------

enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
struct alignas(64) CUtensorMap { const char* start; int64_t sizes[3], strides[3]; int box[3]; };

// Of bf16 with three dimensions and a swizzle of 128 bytes; refuses what the driver refuses.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t dimensions,
                                       void* start, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave,
                                       CUtensorMapSwizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
    bool aligned = (uintptr_t)start % 16 == 0 && strides[0] % 16 == 0 && strides[1] % 16 == 0;
    if (dimensions != 3 || !aligned || box[0] * 2 > 128) { return CUDA_ERROR_INVALID_VALUE; }
    *map = {(const char*)start, {}, {2, (int64_t)strides[0], (int64_t)strides[1]}, {}};
    for (int i = 0; i < 3; i++) {
        if (sizes[i] == 0 || box[i] == 0 || box[i] > 256 || steps[i] != 1) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        map->sizes[i] = sizes[i], map->box[i] = box[i];
    }
    return CUDA_SUCCESS;
}

// Of dynamic shared memory only; on a GPU, static shared memory lies before it.
inline uint32_t shared_address(const void* pointer) {
    return (uint32_t)((const char*)pointer - cuemu::block.shared);
}

namespace cuemu {
// Where the hardware looks for the byte at `address` of a matrix with a swizzle of 128 bytes
inline char* swizzled(uint32_t address) {
    return block.shared + (address ^ (address / 128 % 8 * 16));
}

inline void land(const CUtensorMap& map, uint32_t to, int x, int y, int z) {
    for (int i = 0; i < map.box[0] * map.box[1] * map.box[2]; i++, to += 2) {
        int64_t at[3] = {x + i % map.box[0], y + i / map.box[0] % map.box[1],
                         z + i / map.box[0] / map.box[1]};
        const char* from = map.start;
        bool inside = true;
        for (int k = 0; k < 3; k++) {
            inside = inside && at[k] >= 0 && at[k] < map.sizes[k];
            from += at[k] * map.strides[k];
        }
        if (inside) { memcpy(swizzled(to), from, 2); } else { memset(swizzled(to), 0, 2); }
    }
}
}  // namespace cuemu

inline void tma_copy(void* to, const CUtensorMap* map, int x, int y, int z, uint64_t* barrier) {
    uint32_t address = shared_address(to);
    if (address % 1024 != 0) { cuemu::die("TMA to an address not aligned to 1024"); }
    CUtensorMap copy = *map;
    auto land = [=] {
        cuemu::land(copy, address, x, y, z);
        cuemu::count_down(barrier, 0, 2 * copy.box[0] * copy.box[1] * copy.box[2]);
    };
    if (cuemu::block.order == 1) { return land(); }
    cuemu::block.boxes.push_back({barrier, land});
    cuemu::wake_at(barrier);            // one that waits there lands it
}

// ---- wgmma --------------------------------------------------------------------------------------

namespace cuemu {

// Element (i, k) of a matrix by its descriptor. i counts rows of A or columns of B, k those that a
// product sums over. K-major: 64 neighbours in memory have the same i. MN-major: the same k.
inline float element(uint64_t descriptor, int i, int k, bool k_major) {
    if (descriptor >> 62 != 1) { die("wgmma without the swizzle of 128 bytes"); }
    uint32_t start = (descriptor & 0x3FFF) * 16, leading = (descriptor >> 16 & 0x3FFF) * 16;
    uint32_t stride = (descriptor >> 32 & 0x3FFF) * 16;
    uint32_t address = start;
    if (k_major) { address += i / 8 * stride + i % 8 * 128 + k * 2; }
    else { address += i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128; }
    uint16_t bits;
    memcpy(&bits, swizzled(address), 2);
    return __uint_as_float((uint32_t)bits << 16);
}

// Of each thread: its part of C (64, N), and of A (64, 16) if it is in registers
struct Wgmma { float* c; const uint32_t* a; uint64_t a_descriptor, b_descriptor; bool add; };

// C (64, N) += A (64, 16) B (16, N). Warp w has rows 16 w … of A and C, spread as in mma.sync. A in
// shared memory is K-major, and B is then, too; with A in registers B is MN-major.
template <int N> void compute(const std::vector<Wgmma>& threads) {
    static float a[64][16], b[16][N];
    bool in_registers = threads[0].a != NULL;
    for (int k = 0; k < 16; k++) {
        for (int n = 0; n < N; n++) {
            b[k][n] = element(threads[0].b_descriptor, n, k, !in_registers);
        }
        for (int m = 0; m < 64 && !in_registers; m++) {
            a[m][k] = element(threads[0].a_descriptor, m, k, true);
        }
    }
    for (int i = 0; i < 128 * 8 && in_registers; i++) {
        int thread = i / 8, r = i % 8 / 2, row = thread / 32 * 16 + thread % 32 / 4 + r % 2 * 8;
        a[row][thread % 4 * 2 + r / 2 * 8 + i % 2] = bf16_half(threads[thread].a[r], i % 2);
    }
    for (int m = 0; m < 64; m++) {
        float sum[N] = {};
        for (int k = 0; k < 16; k++) {
            for (int n = 0; n < N; n++) { sum[n] += a[m][k] * b[k][n]; }
        }
        for (int n = 0; n < N; n++) {
            const Wgmma& owner = threads[m / 16 * 32 + m % 8 * 4 + n % 8 / 2];
            float* c = owner.c + n / 8 * 4 + m % 16 / 8 * 2 + n % 2;
            *c = (owner.add ? *c : 0.0f) + sum[n];
        }
    }
}

template <int N> void wgmma(Wgmma mine, int line) {
    int lane = (int)(current - block.threads.data()) % 128;
    collective(current->warpgroup, lane, &mine, [](void** lanes) {
        std::vector<Wgmma> threads;
        for (int i = 0; i < 128; i++) {
            if (lanes[i] == NULL) { die("wgmma without all threads of a warpgroup"); }
            threads.push_back(*(Wgmma*)lanes[i]);
            if (threads[i].a_descriptor != threads[0].a_descriptor ||
                threads[i].b_descriptor != threads[0].b_descriptor) {
                die("wgmma whose threads give different descriptors");
            }
        }
        if (block.order == 2) { return compute<N>(threads); }
        current->warpgroup->products.push_back(
            {current->product_group, [=] { compute<N>(threads); }});
    }, "wgmma", line);
}
}  // namespace cuemu

template <int N>
void wgmma_shared(float (&c)[N / 8][4], uint64_t a, uint64_t b, bool add, LINE) {
    cuemu::wgmma<N>({c[0], NULL, a, b, add}, line);
}
template <int N>
void wgmma_registers(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b, LINE) {
    cuemu::wgmma<N>({c[0], a, 0, b, true}, line);
}
template <int N> void wgmma_fence(float (&)[N][4]) {}
inline void wgmma_commit() { cuemu::current->product_group++; }

// The first thread to wait computes for its warpgroup; the others may not read before they wait.
template <int N> void wgmma_wait(float (&)[N][4]) {
    std::vector<cuemu::Product>& products = cuemu::current->warpgroup->products;
    size_t n = 0;
    for (cuemu::Product& product : products) {
        if (product.group < cuemu::current->product_group) { product.compute(); }
        else { products[n++] = product; }
    }
    products.resize(n);
}

// The number of registers limits nothing here.
template <int N> void give_registers() {}
template <int N> void take_registers() {}

#undef LINE
