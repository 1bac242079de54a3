/*
Pretraining of GPT-2 and of dN, the modern recipe, in CUDA C++. Shards, checkpoints, flags and log
lines are those of train_gpt2.py.

    make train_gpt2cu
    ./train_gpt2cu --model gpt2 --data data/fineweb --out runs/gpt2                        # 1 GPU
    torchrun --standalone --nproc_per_node=8 --no-python \
        ./train_gpt2cu --model d24 --data data/fineweb --out runs/d24                      # 8 GPUs

    in:  <data>/…_train_….bin, …_val_….bin, index.json, token_bytes.npy, tokenizer for samples;
         <core_dir>/hellaswag.bin, which python eval.py hellaswag writes
    out: <run>/model.safetensors, config.json, log.jsonl, state/ for --resume

Map. To learn CUDA, read §2 … §10. From §3 on, each section has the equations of one kind of layer,
its forward and backward kernels, and the functions that launch them. §13 builds the model from
them. The rest is plumbing.
    §1 types, failures, launches, --profile      §11 ranks: torchrun's environment, NCCL
    §2 reductions, 128-bit loads, tensor cores   §12 tensor table
    §3 embedding                                 §13 model: forward, backward, update
    §4 sums over rows                            §14 files: JSON, safetensors, checkpoints
    §5 residual + norms                          §15 data: shards and the order of their rows
    §6 matmuls: cuBLASLt                         §16 flags
    §7 attention, rotary positions               §17 the log and saved states
    §8 GELU, ReLU²                               §18 questions and samples
    §9 classifier: softmax and cross-entropy     §19 main
    §10 AdamW, Muon, the gradient's norm

Four figures show the layouts that are hard to see in code: the registers of a tensor-core multiply
(§2), the swizzle of shared memory, the double buffer of key and value tiles, and the ring of tiles
between the warps of a block on Hopper (all §7).

Numerics: weights and activations are bf16 (floatX); sums and statistics are computed in fp32. Each
rank keeps fp32 master weights and optimizer states of its 1/world_size of the parameters (ZeRO-1,
arXiv 1910.02054). A rank owns the matrices that Muon trains by whole layers, as in training.py.
Gradients of parameters are fp32 and accumulate over micro-steps. Gradients of activations are bf16
and overwrite what was there, except along the residual stream, where they add up. With --fp8 1 the
layers' matmuls have 8-bit operands while the model trains (§6). With -DFP32 everything is fp32, for
cards before sm_80 and for tests. There are no floating-point atomics: the same run gives the same
bits. With --deterministic 0 this is true of a resumed run only.

Memory: matrices are stored as in HF's GPT-2, (in, out), so that files and memory hold the same.

Sizes: B rows, T positions, C channels, V vocabulary, Vp V rounded up to a multiple of 64, L layers,
NH heads, HS = C / NH channels a head, BT = B * T tokens, OC output channels. "Moves 3 BTC" above a
kernel means that it reads and writes 3 * B * T * C elements of floatX in all. "Grid 12 x 256" means
12 blocks of 256 threads. 1 GB is 1e9 bytes.

Papers: GPT-2 (Radford et al. 2019), FlashAttention-2 (arXiv 2307.08691), online softmax
(1805.02867), AdamW (1711.05101), stochastic rounding (2010.06192); for dN, those of model.py and
training.py.
Differs from the papers: FlashAttention-2 adds up dQ with atomics. Here a second kernel computes dQ,
so that every sum has a fixed order. The backward pass has 7 matmuls instead of 5.
Differs from train_gpt2.py: HellaSwag is the only task of CORE that is evaluated. Bits per byte of a
text are not compared with gzip and xz.
*/
#include <algorithm>
#include <arpa/inet.h>
#include <cublasLt.h>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <math.h>
#include <netdb.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <thread>
#include <time.h>
#include <unistd.h>
#include <vector>
#ifdef MULTI_GPU
#include <nccl.h>
#endif

// ---- §1 Types, failures, launches ---------------------------------------------------------------

#ifdef FP32
typedef float floatX;
const cudaDataType_t CUBLAS_X = CUDA_R_32F;
#else
typedef __nv_bfloat16 floatX;
const cudaDataType_t CUBLAS_X = CUDA_R_16BF;
#endif
const bool BF16 = sizeof(floatX) == 2;

// Ends the run with one line: what is wrong with what was found, then what to do.
[[noreturn]] static void die(const char* format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    exit(1);
}

static void check_cuda(cudaError_t error, int line) {
    if (error == cudaSuccess) { return; }
    die("train_gpt2.cu:%d: CUDA reports \"%s\"; run nvidia-smi to check the GPU and its driver, "
        "then continue with --resume", line, cudaGetErrorString(error));
}

static void check_cublas(cublasStatus_t status, int line) {
    if (status == CUBLAS_STATUS_SUCCESS) { return; }
    die("train_gpt2.cu:%d: cuBLASLt returned status %d; run make check to see whether nvcc and "
        "cuBLASLt come from the same CUDA release", line, (int)status);
}

#define CHECK_CUDA(call) check_cuda(call, __LINE__)
#define CHECK_CUBLAS(call) check_cublas(call, __LINE__)

// Allocates GPU memory and fills it with zeros.
static void* allocate(size_t bytes) {
    void* pointer = NULL;
    if (cudaMalloc(&pointer, bytes) != cudaSuccess) {
        size_t free_bytes = 0;
        size_t all_bytes = 0;
        CHECK_CUDA(cudaMemGetInfo(&free_bytes, &all_bytes));
        die("out of GPU memory: %.2f GB requested, %.2f of %.2f GB free; halve --batch_size, or "
            "try --recompute 2", bytes / 1e9, free_bytes / 1e9, all_bytes / 1e9);
    }
    CHECK_CUDA(cudaMemset(pointer, 0, bytes));
    return pointer;
}

template <class Number> __host__ __device__ constexpr Number ceil_div(Number a, Number b) {
    return (a + b - 1) / b;
}

// The least that one launch has to do: bytes to move and FLOP to compute. --profile compares it
// with the time that the launch takes.
struct Work { const char* name; double bytes, flops = 0; };

// In a profiled step, one event is recorded before each launch and one after it. add_times sums the
// times between them for each name of work.
struct KernelTime { char name[64]; int calls; double ms, bytes, flops; };
struct Launch { int kernel; cudaEvent_t begin, end; };
static struct {
    bool on;
    KernelTime kernels[96];
    Launch* launches;                   // of one step; the next step uses their events again
    int n_kernels, n_launches, capacity, n_steps;
    double ms;                          // of all profiled steps
} profile;

static int kernel_row(const char* name) {
    for (int i = 0; i < profile.n_kernels; i++) {
        if (strcmp(profile.kernels[i].name, name) == 0) { return i; }
    }
    snprintf(profile.kernels[profile.n_kernels].name, 64, "%s", name);
    return profile.n_kernels++;
}

static void begin_work(Work work, cudaStream_t stream) {
    if (!profile.on) { return; }
    int row = kernel_row(work.name);
    profile.kernels[row].calls++;
    profile.kernels[row].bytes += work.bytes;
    profile.kernels[row].flops += work.flops;
    if (profile.n_launches == profile.capacity) {
        profile.capacity++;
        profile.launches = (Launch*)realloc(profile.launches, profile.capacity * sizeof(Launch));
        CHECK_CUDA(cudaEventCreate(&profile.launches[profile.n_launches].begin));
        CHECK_CUDA(cudaEventCreate(&profile.launches[profile.n_launches].end));
    }
    profile.launches[profile.n_launches].kernel = row;
    CHECK_CUDA(cudaEventRecord(profile.launches[profile.n_launches].begin, stream));
}

static void end_work(Work work, cudaStream_t stream) {
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
        die("CUDA reports \"%s\" after the launch of %s; run nvidia-smi to check the GPU and its "
            "driver, then continue with --resume", cudaGetErrorString(error), work.name);
    }
    if (!profile.on) { return; }
    CHECK_CUDA(cudaEventRecord(profile.launches[profile.n_launches].end, stream));
    profile.n_launches++;
}

// Where a launch runs: blocks of threads, on a stream, with dynamic shared memory for each block.
struct Grid { dim3 blocks, threads; cudaStream_t stream; size_t shared_bytes = 0; };

// At least n threads, in blocks of 256. Threads from number n on have to return early.
static Grid one_thread_each(int64_t n, cudaStream_t stream) {
    return {(unsigned)ceil_div(n, (int64_t)256), 256, stream};
}

// Launches a kernel: launch(work, grid, kernel, the arguments of the kernel …).
template <class... Parameters, class... Arguments>
static void launch(Work work, Grid grid, void (*kernel)(Parameters...), Arguments... arguments) {
    begin_work(work, grid.stream);
    kernel<<<grid.blocks, grid.threads, grid.shared_bytes, grid.stream>>>(arguments...);
    end_work(work, grid.stream);
}

// Adds the times of one profiled step. Call it once the GPU has finished the step.
static void add_times(double step_ms) {
    for (int i = 0; i < profile.n_launches; i++) {
        float ms = 0.0f;
        CHECK_CUDA(cudaEventElapsedTime(&ms, profile.launches[i].begin, profile.launches[i].end));
        profile.kernels[profile.launches[i].kernel].ms += ms;
    }
    profile.n_launches = 0;
    profile.n_steps++;
    profile.ms += step_ms;
}

// Prints one row for each name of work, the longest time first. "of bound" is the time that memory
// or tensor cores would need at their peak rate, as a share of the time taken. A peak rate of 0
// means that it is unknown. The rate is that of bf16: a matmul in 8 bits may take half the time.
static void print_profile(double bytes_per_s, double flops_per_s) {
    int steps = profile.n_steps;
    double rest_ms = profile.ms;
    std::sort(profile.kernels, profile.kernels + profile.n_kernels,
              [](const KernelTime& a, const KernelTime& b) { return a.ms > b.ms; });
    printf("%-44s  calls  ms a step  share   MB a step    GB/s  TFLOP/s  of bound\n", "kernel");
    for (int i = 0; i < profile.n_kernels; i++) {
        KernelTime k = profile.kernels[i];
        double ms = fmax(k.ms, 1e-9);
        double bound = 0;               // seconds
        if (bytes_per_s > 0) { bound = k.bytes / bytes_per_s; }
        if (flops_per_s > 0) { bound = fmax(bound, k.flops / flops_per_s); }
        rest_ms -= k.ms;
        printf("%-44s %6d %10.3f %5.1f%% %11.3f %7.1f %8.2f %8.1f%%\n", k.name, k.calls / steps,
               k.ms / steps, 100 * k.ms / profile.ms, k.bytes / 1e6 / steps, k.bytes / 1e6 / ms,
               k.flops / 1e9 / ms, 1e5 * bound / ms);
    }
    printf("%-44s %6s %10.3f %5.1f%%\n", "the rest: gaps, copies, other ranks", "",
           rest_ms / steps, 100 * rest_ms / profile.ms);
    printf("a step %.3f ms; at best %.0f GB/s, %.0f TFLOP/s\n", profile.ms / steps,
           bytes_per_s / 1e9, flops_per_s / 1e12);
}

// ---- §2 Reductions, 128-bit loads, tensor cores -------------------------------------------------
//
// A kernel is a function that many threads run at once: a grid of blocks, each of up to 1024
// threads. 32 threads of a block form a warp, which executes one instruction at a time; a thread's
// number in its warp is its lane. Each thread has its own registers. Threads of a warp can read one
// another's registers by shuffles. Threads of a block share some memory on the chip, and wait for
// one another at a barrier, __syncthreads(). Blocks run in any order and do not communicate.

const int WARP = 32;

__device__ int64_t thread_in_grid() { return (int64_t)blockIdx.x * blockDim.x + threadIdx.x; }

// Memory bandwidth is used best when each thread moves 16 bytes at once. So a thread works on a
// Pack: PACK neighbouring elements of a row, 8 in bf16 or 4 in fp32. Rows have a multiple of PACK
// elements. Arithmetic on a Pack is in fp32.
const int PACK = 16 / sizeof(floatX);
struct alignas(16) Pack {
    floatX values[PACK];
    __device__ float operator[](int i) const { return (float)values[i]; }
    __device__ void set(int i, float value) { values[i] = (floatX)value; }
};

__device__ Pack load(const floatX* address) { return *(const Pack*)address; }
__device__ void store(floatX* address, Pack pack) { *(Pack*)address = pack; }

// Returns the sum over a warp to every lane. In each of five steps a lane adds the value of the
// lane whose number differs in one bit (16, 8, 4, 2, 1). Both lanes of a pair compute the same sum,
// so all lanes end with the same bits.
__device__ float warp_sum(float value) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(~0u, value, offset);
    }
    return value;
}

__device__ float warp_max(float value) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
    }
    return value;
}

// Returns the sum over a block of up to 1024 threads to every thread. Each warp leaves its sum in
// shared memory. After the first barrier all of these are there, and each warp adds up the 32 or
// fewer sums. The second barrier is for kernels that call this twice: a fast warp must not
// overwrite sums that a slow one still reads.
__device__ float block_sum(float value) {
    __shared__ float of_warp[WARP];
    int lane = threadIdx.x % WARP;
    int warp = threadIdx.x / WARP;
    int n_warps = blockDim.x / WARP;
    value = warp_sum(value);
    if (lane == 0) { of_warp[warp] = value; }
    __syncthreads();
    value = warp_sum(lane < n_warps ? of_warp[lane] : 0.0f);
    __syncthreads();
    return value;
}

// The same for the maximum. A kernel may call this only once: it has no second barrier.
__device__ float block_max(float value) {
    __shared__ float of_warp[WARP];
    int lane = threadIdx.x % WARP;
    int warp = threadIdx.x / WARP;
    int n_warps = blockDim.x / WARP;
    value = warp_max(value);
    if (lane == 0) { of_warp[warp] = value; }
    __syncthreads();
    return warp_max(lane < n_warps ? of_warp[lane] : -INFINITY);
}

// Raises *largest to the largest of a warp's magnitudes; all lanes of the warp take part. As bits,
// numbers of at least 0 have the same order as the numbers. A maximum is the same in any order, so
// this atomic keeps the promise of the same bits. *largest only grows: if the copy of it in the L1
// cache is old, the only loss is an atomic that changes nothing.
__device__ void raise_largest(unsigned* largest, float magnitude) {
    unsigned bits = __float_as_uint(warp_max(magnitude));
    if (threadIdx.x % WARP == 0 && bits > *largest) { atomicMax(largest, bits); }
}

// Tensor cores multiply small matrices that lie in the registers of a warp. The instruction used
// here is C += A B with C (16, 8) in fp32, A (16, 16) and B (16, 8) in bf16. Figure 1 shows which
// lane (L0 … L31) holds which elements, and in which register. A register of A or B holds two
// neighbouring bf16.
//
//     A   columns   0,1  2,3  4,5  6,7 │ 8,9   …  14,15      C   columns   0,1  2,3  4,5  6,7
//       row 0       L0   L1   L2   L3  │ L0   L1   L2   L3     row 0       L0   L1   L2   L3
//       row 1       L4   L5   L6   L7  │ L4   L5   L6   L7     row 1       L4   L5   L6   L7
//       …                a[0]          │      a[2]             …             c[0], c[1]
//       row 7       L28  L29  L30  L31 │ L28  L29  L30  L31    row 7       L28  L29  L30  L31
//       ────────────────────────────────────────────────       ─────────────────────────────────
//       row 8       L0   L1   L2   L3  │ L0   L1   L2   L3     row 8       L0   L1   L2   L3
//       …                a[1]          │      a[3]             …             c[2], c[3]
//       row 15      L28  L29  L30  L31 │ L28  L29  L30  L31    row 15      L28  L29  L30  L31
//
//     The transpose of B, (8, 16), is spread like the upper half of A, rows 0 … 7: b[0] has the
//     place of a[0], and b[1] that of a[2].
//
// So lane L owns two neighbours in row L / 4 of the result and two in row L / 4 + 8. Each row is
// spread over four neighbouring lanes, a quad. Two C's side by side are spread like one A, so that
// a result can be the left factor of the next product without leaving its registers (multiply_add
// in §7).

// This and §7's part for Hopper have all inline PTX. tests/cuda_emulator has functions of the same
// names for the CPU.
#if !defined(CUEMU) && !defined(FP32)
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

// c (16, 8) += a (16, 16) b (16, 8), as in Figure 1. All lanes of the warp take part.
__device__ __forceinline__ void mma_m16n8k16_bf16(float c[4], const uint32_t a[4],
                                                  const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads four 8 x 8 matrices from shared memory: lane i gives the address of row i % 8 of matrix
// i / 8, and gets in r[j] its part of matrix j, spread like a quarter of Figure 1's A.
__device__ __forceinline__ void ldmatrix_x4(uint32_t r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)) : "memory");
}

// The same, but each 8 x 8 matrix is transposed on its way into the registers.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)) : "memory");
}

// Starts a copy of 16 bytes to shared memory, which bypasses the registers, and returns at once.
// Only the first `valid` bytes are read; the others become zeros.
__device__ __forceinline__ void cp_async16(void* to, const void* from, int valid) {
    asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(valid) : "memory");
}

// Makes one group of all copies that this thread has started since the last call.
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all groups of this thread are complete, except the PENDING newest ones. What other
// threads copied can be read only after a barrier.
template <int PENDING> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}
#endif

// ---- §3 Embedding -------------------------------------------------------------------------------
//
//   out[b, t] = wte[token[b, t]] + wpe[t]              out (B, T, C), wte (Vp, C), wpe (T, C)
//   dwte[v] += Σ dout[b, t] where token[b, t] = v      dwpe[t] += Σ_b dout[b, t]

// One thread: one Pack of one token. Grid BT*C/PACK/256 x 256. Moves 3 BTC; bound by memory.
__global__ void embedding_forward_kernel(floatX* out, const int* tokens, const floatX* wte,
                                         const floatX* wpe, int BT, int T, int C) {
    int64_t at = thread_in_grid() * PACK;
    if (at >= (int64_t)BT * C) { return; }
    int bt = at / C;
    int c = at % C;
    Pack token = load(wte + (int64_t)tokens[bt] * C + c);
    Pack position = load(wpe + bt % T * C + c);
    Pack sum;
    for (int i = 0; i < PACK; i++) { sum.set(i, token[i] + position[i]); }
    store(out + at, sum);
}

// The positions of a batch, grouped by their token. Several positions add to one row of dwte. If
// they did so atomically, the order would vary and each run would give other bits. With this index
// one block sums a row, always in the same order.
struct TokenIndex {
    int* positions;     // (BT) indices into (B, T), grouped by token, ascending within a group
    int* starts;        // (n_groups + 1) where each group begins in `positions`
    int* tokens;        // (n_groups) the token of each group
    int n_groups;       // how many different tokens the batch has
};

// One block of 32 x 8: one token, 32 Packs of its channels. Each of the 8 rows of threads, a warp,
// sums every 8th position of the token. After the barrier, when all 8 sums are there, the first row
// adds them up. The lane is the last index of `sums`, so that a warp writes to 32 different banks
// of shared memory. Grid (n_groups, C/PACK/32). Reads BTC once, and reads and writes one fp32 row
// for each different token; bound by memory.
__global__ void wte_backward_kernel(float* dwte, const floatX* dout, TokenIndex index, int C) {
    __shared__ float sums[8][PACK][WARP];
    int c = (blockIdx.y * WARP + threadIdx.x) * PACK;
    float sum[PACK] = {};
    if (c < C) {
        int end = index.starts[blockIdx.x + 1];
        for (int i = index.starts[blockIdx.x] + threadIdx.y; i < end; i += 8) {
            Pack gradient = load(dout + (int64_t)index.positions[i] * C + c);
            for (int k = 0; k < PACK; k++) { sum[k] += gradient[k]; }
        }
    }
    for (int k = 0; k < PACK; k++) { sums[threadIdx.y][k][threadIdx.x] = sum[k]; }
    __syncthreads();
    if (threadIdx.y > 0 || c >= C) { return; }
    float* row = dwte + (int64_t)index.tokens[blockIdx.x] * C + c;
    for (int k = 0; k < PACK; k++) {
        for (int y = 1; y < 8; y++) { sum[k] += sums[y][k][threadIdx.x]; }
        row[k] += sum[k];
    }
}

// One thread: one Pack of one position t, summed over all rows b. Grid T*C/PACK/256 x 256. Reads
// BTC once; bound by memory.
__global__ void wpe_backward_kernel(float* dwpe, const floatX* dout, int B, int T, int C) {
    int64_t at = thread_in_grid() * PACK;
    if (at >= (int64_t)T * C) { return; }
    float sum[PACK] = {};
    for (int b = 0; b < B; b++) {
        Pack gradient = load(dout + (int64_t)b * T * C + at);
        for (int k = 0; k < PACK; k++) { sum[k] += gradient[k]; }
    }
    for (int k = 0; k < PACK; k++) { dwpe[at + k] += sum[k]; }
}

static void embedding_forward(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe,
                              int B, int T, int C, cudaStream_t stream) {
    launch({"embedding_forward", 3.0 * B * T * C * sizeof(floatX)},
           one_thread_each((int64_t)B * T * C / PACK, stream), embedding_forward_kernel, out,
           tokens, wte, wpe, B * T, T, C);
}

static void wte_backward(float* dwte, const floatX* dout, TokenIndex index, int BT, int C,
                         cudaStream_t stream) {
    dim3 grid(index.n_groups, ceil_div(C, PACK * WARP));
    dim3 block(WARP, 8);
    double bytes = (double)BT * C * sizeof(floatX) + 8.0 * index.n_groups * C;
    launch({"wte_backward", bytes}, {grid, block, stream}, wte_backward_kernel, dwte, dout, index,
           C);
}

static void wpe_backward(float* dwpe, const floatX* dout, int B, int T, int C,
                         cudaStream_t stream) {
    double bytes = (double)B * T * C * sizeof(floatX) + 8.0 * T * C;
    launch({"wpe_backward", bytes}, one_thread_each(T * C / PACK, stream), wpe_backward_kernel,
           dwpe, dout, B, T, C);
}

// ---- §4 Sums over rows --------------------------------------------------------------------------
//
//   gradient[c] += Σ_rows matrix[row, c]
//
// A matrix has many more rows than columns. If one block summed whole columns, there would be too
// few blocks for the GPU. So there are two steps, each with a fixed order: blocks sum shares of the
// rows into `partials` (n_partials, width), then add_partials_kernel sums these.

const int ROW_SPLITS = 64;

// One block of 32 x 8: 32 Packs of columns, and every ROW_SPLITS-th group of 8 rows. The barrier
// and the layout of `sums` are those of wte_backward_kernel. Grid (OC/PACK/32, ROW_SPLITS). Reads
// the matrix once; bound by memory.
__global__ void row_sum_kernel(float* partials, const floatX* matrix, int rows, int OC) {
    __shared__ float sums[8][PACK][WARP];
    int c = (blockIdx.x * WARP + threadIdx.x) * PACK;
    float sum[PACK] = {};
    if (c < OC) {
#pragma unroll 4                        // four loads are on their way at once; the order stays
        for (int row = blockIdx.y * 8 + threadIdx.y; row < rows; row += gridDim.y * 8) {
            Pack values = load(matrix + (int64_t)row * OC + c);
            for (int k = 0; k < PACK; k++) { sum[k] += values[k]; }
        }
    }
    for (int k = 0; k < PACK; k++) { sums[threadIdx.y][k][threadIdx.x] = sum[k]; }
    __syncthreads();
    if (threadIdx.y > 0 || c >= OC) { return; }
    for (int k = 0; k < PACK; k++) {
        for (int y = 1; y < 8; y++) { sum[k] += sums[y][k][threadIdx.x]; }
        partials[(int64_t)blockIdx.y * OC + c + k] = sum[k];
    }
}

// One block of 32 x 16: 32 columns; each of the 16 rows of threads sums every 16th partial sum, and
// the first row adds up the 16 results. Grid columns/32. Bound by latency: there is little to read.
__global__ void add_partials_kernel(float* gradient, const float* partials, int n_partials,
                                    int width, int columns) {
    __shared__ float sums[16][WARP];
    int c = blockIdx.x * WARP + threadIdx.x;
    float sum = 0.0f;
    if (c < columns) {
        for (int i = threadIdx.y; i < n_partials; i += 16) {
            sum += partials[(int64_t)i * width + c];
        }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || c >= columns) { return; }
    for (int y = 1; y < 16; y++) { sum += sums[y][threadIdx.x]; }
    gradient[c] += sum;
}

// gradient (columns) += Σ_i partials[i, 0 … columns - 1], where partials is (n_partials, width)
static void add_partials(float* gradient, const float* partials, int n_partials, int width,
                         int columns, cudaStream_t stream) {
    launch({"add_partials", 4.0 * (n_partials + 2) * columns},
           {ceil_div(columns, WARP), dim3(WARP, 16), stream}, add_partials_kernel, gradient,
           partials, n_partials, width, columns);
}

// dbias (OC) += Σ_rows dout (BT, OC); partials (ROW_SPLITS, OC) is workspace.
static void bias_backward(float* dbias, float* partials, const floatX* dout, int BT, int OC,
                          cudaStream_t stream) {
    dim3 grid(ceil_div(OC, PACK * WARP), ROW_SPLITS);
    dim3 block(WARP, 8);
    double bytes = (double)BT * OC * sizeof(floatX) + 4.0 * ROW_SPLITS * OC;
    launch({"row_sum", bytes}, {grid, block, stream}, row_sum_kernel, partials, dout, BT, OC);
    add_partials(dbias, partials, ROW_SPLITS, OC, OC, stream);
}

// ---- §5 Residual + norms ------------------------------------------------------------------------
//
// GPT-2 has LayerNorm. Each norm first adds b, the output of the branch before it, to the residual
// stream a. One kernel does both, so that the sum x is not read from memory again.
//
//   x = a + b    mean = Σ x / C    rstd = 1 / sqrt(Σ (x - mean)² / C + 1e-5)
//   n = (x - mean) rstd    out = n weight + bias
//   dn = dout weight    dx += (dn - Σ dn / C - n Σ (dn n) / C) rstd
//   dweight += Σ_rows dout n    dbias += Σ_rows dout

const int NORM_WARPS = 4;                        // warps of a block; each has one row at a time
const float RMS_EPSILON = 1.1920929e-7f;         // fp32's epsilon, as in PyTorch's rms_norm

// Shapes are (BT, C) unless a comment says otherwise. A pointer may be NULL if its default is NULL.
struct LayerNormForward {
    const floatX* a;
    const floatX* b = NULL;             // NULL: x is a, and is not written
    const floatX *weight, *bias;        // (C)
    floatX* x = NULL;
    floatX* out;
    float *mean, *rstd;                 // (BT)
    unsigned* largest = NULL;           // raised to the largest |out| for --fp8 1 (§6)
    int BT, C;
};

// One warp: one row. The row stays in shared memory between two passes: the first sums x, and the
// second sums (x - mean)². (Σ x² / C - mean² would take one pass but lose digits.) No barrier is
// needed, because a lane reads only what it wrote itself. It writes whole Packs: 32 lanes that each
// wrote single floats, PACK floats apart, would wait for the same banks of shared memory. Grid BT/4
// x 128. Moves 4 BTC, or 2 BTC without b; bound by memory.
__global__ void layernorm_forward_kernel(LayerNormForward norm) {
    extern __shared__ Pack rows[];      // (NORM_WARPS, C/PACK)
    int C = norm.C;
    int lane = threadIdx.x % WARP;
    int warp = threadIdx.x / WARP;
    int64_t bt = (int64_t)blockIdx.x * NORM_WARPS + warp;
    if (bt >= norm.BT) { return; }
    Pack* row = rows + warp * (C / PACK);
    float sum = 0.0f;
    for (int c = lane * PACK; c < C; c += WARP * PACK) {
        Pack value = load(norm.a + bt * C + c);
        if (norm.b != NULL) {
            Pack other = load(norm.b + bt * C + c);
            for (int i = 0; i < PACK; i++) { value.set(i, value[i] + other[i]); }
            store(norm.x + bt * C + c, value);
        }
        row[c / PACK] = value;
        for (int i = 0; i < PACK; i++) { sum += value[i]; }
    }
    float mean = warp_sum(sum) / C;
    float square_sum = 0.0f;
    for (int c = lane * PACK; c < C; c += WARP * PACK) {
        Pack x = row[c / PACK];
        for (int i = 0; i < PACK; i++) { square_sum += (x[i] - mean) * (x[i] - mean); }
    }
    float rstd = rsqrtf(warp_sum(square_sum) / C + 1e-5f);
    float magnitude = 0.0f;
    for (int c = lane * PACK; c < C; c += WARP * PACK) {
        Pack weight = load(norm.weight + c);
        Pack bias = load(norm.bias + c);
        Pack x = row[c / PACK];
        Pack out;
        for (int i = 0; i < PACK; i++) {
            out.set(i, (x[i] - mean) * rstd * weight[i] + bias[i]);
            magnitude = fmaxf(magnitude, fabsf(out[i]));
        }
        store(norm.out + bt * C + c, out);
    }
    if (norm.largest != NULL) { raise_largest(norm.largest, magnitude); }
    if (lane == 0) {
        norm.mean[bt] = mean;
        norm.rstd[bt] = rstd;
    }
}

struct LayerNormBackward {
    const floatX *dout, *x, *weight;
    const float *mean, *rstd;           // (BT)
    floatX* dx;                         // added to
    float *dweight, *dbias;             // (C), added to
    float* partials;                    // (NORM_PARTIALS, 2C): dweight, then dbias
    unsigned* largest = NULL;           // raised to the largest |dx| for --fp8 1
    int BT, C;
};

const int NORM_PARTIALS = 256;  // most blocks of layernorm_backward_kernel
const int NORM_ROWS = 2;        // rows in one iteration, which share its two barriers

// One block: every gridDim-th pair of rows. One thread: a Pack of channels, whose dweight and dbias
// it sums over all these rows in registers. Grid n_partials x C/PACK. Moves 4 BTC; bound by memory.
// The sums over a row go through of_warp. After the first barrier every warp's sums are there. The
// second one keeps a fast warp from writing sums of the next rows before all warps have read these.
__global__ void layernorm_backward_kernel(LayerNormBackward norm) {
    __shared__ float of_warp[2][NORM_ROWS][WARP];       // Σ dn and Σ (dn n) of each warp
    int C = norm.C;
    int lane = threadIdx.x % WARP;
    int warp = threadIdx.x / WARP;
    int n_warps = blockDim.x / WARP;
    int c = threadIdx.x * PACK;
    bool active = c < C;
    float dweight[PACK] = {};
    float dbias[PACK] = {};
    float magnitude = 0.0f;
    Pack weight = load(norm.weight + (active ? c : 0));
    for (int first = blockIdx.x * NORM_ROWS; first < norm.BT; first += gridDim.x * NORM_ROWS) {
        float n[NORM_ROWS][PACK] = {};
        float dn[NORM_ROWS][PACK] = {};
        float rstd[NORM_ROWS] = {};
        Pack dx[NORM_ROWS];             // loaded early, so that no thread waits after the barrier
        for (int r = 0; r < NORM_ROWS; r++) {
            int64_t bt = first + r;
            float sum_dn = 0.0f;
            float sum_dn_n = 0.0f;
            if (active && bt < norm.BT) {
                Pack dout = load(norm.dout + bt * C + c);
                Pack x = load(norm.x + bt * C + c);
                dx[r] = load(norm.dx + bt * C + c);
                float mean = norm.mean[bt];
                rstd[r] = norm.rstd[bt];
                for (int i = 0; i < PACK; i++) {
                    n[r][i] = (x[i] - mean) * rstd[r];
                    dn[r][i] = dout[i] * weight[i];
                    dweight[i] += dout[i] * n[r][i];
                    dbias[i] += dout[i];
                    sum_dn += dn[r][i];
                    sum_dn_n += dn[r][i] * n[r][i];
                }
            }
            sum_dn = warp_sum(sum_dn);
            sum_dn_n = warp_sum(sum_dn_n);
            if (lane == 0) {
                of_warp[0][r][warp] = sum_dn;
                of_warp[1][r][warp] = sum_dn_n;
            }
        }
        __syncthreads();
        for (int r = 0; r < NORM_ROWS; r++) {
            int64_t bt = first + r;
            float mean_dn = warp_sum(lane < n_warps ? of_warp[0][r][lane] : 0.0f) / C;
            float mean_dn_n = warp_sum(lane < n_warps ? of_warp[1][r][lane] : 0.0f) / C;
            if (active && bt < norm.BT) {
                for (int i = 0; i < PACK; i++) {
                    float here = (dn[r][i] - mean_dn - n[r][i] * mean_dn_n) * rstd[r];
                    dx[r].set(i, dx[r][i] + here);
                    magnitude = fmaxf(magnitude, fabsf(dx[r][i]));
                }
                store(norm.dx + bt * C + c, dx[r]);
            }
        }
        __syncthreads();
    }
    if (norm.largest != NULL) { raise_largest(norm.largest, magnitude); }
    if (!active) { return; }
    float* partial = norm.partials + (int64_t)blockIdx.x * 2 * C + c;
    for (int i = 0; i < PACK; i++) {
        partial[i] = dweight[i];
        partial[C + i] = dbias[i];
    }
}

static void layernorm_forward(LayerNormForward norm, cudaStream_t stream) {
    size_t shared_bytes = sizeof(floatX) * NORM_WARPS * norm.C;
    double moved = norm.b != NULL ? 4.0 : 2.0;
    launch({"layernorm_forward", moved * norm.BT * norm.C * sizeof(floatX)},
           {ceil_div(norm.BT, NORM_WARPS), NORM_WARPS * WARP, stream, shared_bytes},
           layernorm_forward_kernel, norm);
}

static void layernorm_backward(LayerNormBackward norm, cudaStream_t stream) {
    int C = norm.C;
    int blocks = min(NORM_PARTIALS, ceil_div(norm.BT, NORM_ROWS));
    int threads = ceil_div(C, PACK * WARP) * WARP;
    double bytes = 4.0 * norm.BT * C * sizeof(floatX) + 8.0 * blocks * C;
    launch({"layernorm_backward", bytes}, {blocks, threads, stream}, layernorm_backward_kernel,
           norm);
    add_partials(norm.dweight, norm.partials, blocks, 2 * C, C, stream);
    add_partials(norm.dbias, norm.partials + C, blocks, 2 * C, C, stream);
}

// dN has RMSNorm, without a mean, a weight or a bias. Before the norm, two learned numbers for each
// layer, λ and μ, mix the residual stream x with e, the embedding at the start of the stream. The
// last norm instead subtracts e, the stream after the middle layer, times μ ("backout"). So μ has a
// sign ±, and λ is 1 there. Without e, s is x.
//
//   x = a + b    s = λ x ± μ e    rstd = 1 / sqrt(Σ s² / C + 1.19e-7)    out = n = s rstd
//   ds = dx + (dout - n Σ (dout n) / C) rstd       where dx on the right comes from later uses of s
//   dλ += Σ ds x    dμ += ± Σ ds e    dx = λ ds    de += ± μ ds

struct Mix {
    const floatX* e;                    // (BT, C); NULL: no mix
    const float* lambda;                // NULL: 1
    const float* mu;
    float sign;                         // 1 or -1, the sign of μ
};

// The Pack of s for a Pack of x, which is at offset `at` in (BT, C)
__device__ Pack mixed(Pack x, Mix mix, int64_t at) {
    if (mix.e == NULL) { return x; }
    float lambda = mix.lambda != NULL ? *mix.lambda : 1.0f;
    float mu = mix.sign * *mix.mu;
    Pack e = load(mix.e + at);
    Pack s;
    for (int i = 0; i < PACK; i++) { s.set(i, lambda * x[i] + mu * e[i]); }
    return s;
}

// Shapes are (BT, C) unless a comment says otherwise. x and s are written if they are not NULL.
struct RmsNormForward {
    const floatX* a;                    // with tokens: a table (Vp, C)
    const int* tokens = NULL;           // (BT), the rows of a to take
    const floatX* b = NULL;
    Mix mix = {};                       // mix.e may be x
    floatX* x = NULL;
    floatX* s = NULL;
    floatX* out;
    float* rstd;                        // (BT)
    unsigned* largest = NULL;           // raised to the largest |out| for --fp8 1
    int BT, C;
};

// One warp: one row, held in shared memory between the passes, as in layernorm_forward_kernel. Grid
// BT/4 x 128. Moves up to 6 BTC; bound by memory.
__global__ void rmsnorm_forward_kernel(RmsNormForward norm) {
    extern __shared__ Pack rows[];      // (NORM_WARPS, C/PACK)
    int C = norm.C;
    int lane = threadIdx.x % WARP;
    int warp = threadIdx.x / WARP;
    int64_t bt = (int64_t)blockIdx.x * NORM_WARPS + warp;
    if (bt >= norm.BT) { return; }
    const floatX* a = norm.a + (norm.tokens != NULL ? norm.tokens[bt] : bt) * C;
    Pack* row = rows + warp * (C / PACK);
    float square_sum = 0.0f;
    for (int c = lane * PACK; c < C; c += WARP * PACK) {
        Pack value = load(a + c);
        if (norm.b != NULL) {
            Pack other = load(norm.b + bt * C + c);
            for (int i = 0; i < PACK; i++) { value.set(i, value[i] + other[i]); }
        }
        if (norm.x != NULL) { store(norm.x + bt * C + c, value); }
        value = mixed(value, norm.mix, bt * C + c);
        if (norm.s != NULL) { store(norm.s + bt * C + c, value); }
        row[c / PACK] = value;
        for (int i = 0; i < PACK; i++) { square_sum += value[i] * value[i]; }
    }
    float rstd = rsqrtf(warp_sum(square_sum) / C + RMS_EPSILON);
    float magnitude = 0.0f;
    for (int c = lane * PACK; c < C; c += WARP * PACK) {
        Pack s = row[c / PACK];
        Pack out;
        for (int i = 0; i < PACK; i++) {
            out.set(i, s[i] * rstd);
            magnitude = fmaxf(magnitude, fabsf(out[i]));
        }
        store(norm.out + bt * C + c, out);
    }
    if (norm.largest != NULL) { raise_largest(norm.largest, magnitude); }
    if (lane == 0) { norm.rstd[bt] = rstd; }
}

struct RmsNormBackward {
    const floatX* dout;
    const floatX* x;                    // with tokens: a table (Vp, C)
    const int* tokens = NULL;           // (BT), the rows of x
    const float* rstd;                  // (BT)
    Mix mix = {};
    floatX* dx;                         // in: the gradient of s from its later uses; out: of x
    floatX* de = NULL;                  // added to
    float* dlambda = NULL;              // one number, added to
    float* dmu = NULL;                  // one number, added to
    float* partials = NULL;             // (RMS_PARTIALS, 2): dλ, dμ; only with a mix
    unsigned* largest = NULL;           // raised to the largest |dx| for --fp8 1
    int BT, C;
};

const int RMS_PARTIALS = 1024;  // most blocks of rmsnorm_backward_kernel

// One warp: every n-th row, where n is the number of warps in the grid. It reads a row twice, the
// second time from the L1 cache. Grid up to RMS_PARTIALS x 128. Moves 4 BTC, or 7 BTC with a mix;
// bound by memory.
__global__ void rmsnorm_backward_kernel(RmsNormBackward norm) {
    Mix mix = norm.mix;
    int C = norm.C;
    int lane = threadIdx.x % WARP;
    int warp = threadIdx.x / WARP;
    float lambda = mix.lambda != NULL ? *mix.lambda : 1.0f;
    float mu = mix.e != NULL ? mix.sign * *mix.mu : 0.0f;
    float dlambda = 0.0f;
    float dmu = 0.0f;
    float magnitude = 0.0f;
    for (int64_t bt = blockIdx.x * NORM_WARPS + warp; bt < norm.BT; bt += gridDim.x * NORM_WARPS) {
        const floatX* from = norm.x + (norm.tokens != NULL ? norm.tokens[bt] : bt) * C;
        float rstd = norm.rstd[bt];
        float sum = 0.0f;
        for (int c = lane * PACK; c < C; c += WARP * PACK) {
            Pack s = mixed(load(from + c), mix, bt * C + c);
            Pack dout = load(norm.dout + bt * C + c);
            for (int i = 0; i < PACK; i++) { sum += dout[i] * s[i]; }
        }
        float mean = warp_sum(sum) * rstd / C;          // Σ (dout n) / C
        for (int c = lane * PACK; c < C; c += WARP * PACK) {
            Pack x = load(from + c);
            Pack s = mixed(x, mix, bt * C + c);
            Pack dout = load(norm.dout + bt * C + c);
            Pack dx = load(norm.dx + bt * C + c);
            Pack e;
            Pack de;
            if (mix.e != NULL) {
                e = load(mix.e + bt * C + c);
                de = load(norm.de + bt * C + c);
            }
            for (int i = 0; i < PACK; i++) {
                float ds = dx[i] + (dout[i] - s[i] * rstd * mean) * rstd;
                dx.set(i, lambda * ds);
                magnitude = fmaxf(magnitude, fabsf(dx[i]));
                if (mix.e == NULL) { continue; }
                dlambda += ds * x[i];
                dmu += mix.sign * ds * e[i];
                de.set(i, de[i] + mu * ds);
            }
            store(norm.dx + bt * C + c, dx);
            if (mix.e != NULL) { store(norm.de + bt * C + c, de); }
        }
    }
    if (norm.largest != NULL) { raise_largest(norm.largest, magnitude); }
    if (mix.e == NULL) { return; }
    dlambda = block_sum(dlambda);
    dmu = block_sum(dmu);
    if (threadIdx.x > 0) { return; }
    norm.partials[2 * blockIdx.x] = dlambda;
    norm.partials[2 * blockIdx.x + 1] = dmu;
}

static void rmsnorm_forward(RmsNormForward norm, cudaStream_t stream) {
    size_t shared_bytes = sizeof(floatX) * NORM_WARPS * norm.C;
    double moved = 2;                   // (BT, C) matrices: a, out, and each that is not NULL
    if (norm.b != NULL) { moved++; }
    if (norm.mix.e != NULL) { moved++; }
    if (norm.x != NULL) { moved++; }
    if (norm.s != NULL) { moved++; }
    launch({"rmsnorm_forward", moved * norm.BT * norm.C * sizeof(floatX)},
           {ceil_div(norm.BT, NORM_WARPS), NORM_WARPS * WARP, stream, shared_bytes},
           rmsnorm_forward_kernel, norm);
}

static void rmsnorm_backward(RmsNormBackward norm, cudaStream_t stream) {
    int blocks = min(RMS_PARTIALS, ceil_div(norm.BT, NORM_WARPS));
    double moved = norm.mix.e != NULL ? 7.0 : 4.0;
    launch({"rmsnorm_backward", moved * norm.BT * norm.C * sizeof(floatX)},
           {blocks, NORM_WARPS * WARP, stream}, rmsnorm_backward_kernel, norm);
    if (norm.dlambda != NULL) { add_partials(norm.dlambda, norm.partials, blocks, 2, 1, stream); }
    if (norm.dmu != NULL) { add_partials(norm.dmu, norm.partials + 1, blocks, 2, 1, stream); }
}

// sum += other. One thread: one Pack. Grid n/PACK/256 x 256. Moves 3n; bound by memory.
__global__ void add_kernel(floatX* sum, const floatX* other, int64_t n) {
    int64_t at = thread_in_grid() * PACK;
    if (at >= n) { return; }
    Pack a = load(sum + at);
    Pack b = load(other + at);
    for (int i = 0; i < PACK; i++) { a.set(i, a[i] + b[i]); }
    store(sum + at, a);
}

static void add_to(floatX* sum, const floatX* other, int64_t n, cudaStream_t stream) {
    launch({"add", 3.0 * n * sizeof(floatX)}, one_thread_each(n / PACK, stream), add_kernel, sum,
           other, n);
}

// ---- §6 Matmuls: cuBLASLt -----------------------------------------------------------------------
//
//   y = x w + bias            x (rows, C), w (C, OC), y (rows, OC)
//   dx = dy wᵀ                dw += xᵀ dy
//
// cuBLAS stores matrices by columns, we by rows. So it takes our (rows, C) for the transpose,
// (C, rows). Each product is therefore computed as its own transpose, yᵀ = wᵀ xᵀ, where A is w, B
// is x and D is y. No matrix is ever moved.

enum Transpose { NEITHER, TRANSPOSE_A, TRANSPOSE_B };
enum Epilogue { PLAIN, ADD_BIAS, ADD_BIAS_GELU, TIMES_DGELU };

// D (m, n) = op(A) (m, k) op(B) (k, n), in cuBLAS's order of dimensions
struct Matmul {
    int m, n, k;
    Transpose transpose = NEITHER;
    bool accumulate = false;    // D is fp32 and is added to
    Epilogue epilogue = PLAIN;
    int batch = 1;              // number of products; their matrices follow one another in memory
    cudaDataType_t a_type = CUBLAS_X, b_type = CUBLAS_X;
    bool fast_sums = false;     // of 8-bit operands: sums with fewer digits than fp32's
    bool operator==(const Matmul&) const = default;
};

// cuBLASLt has several kernels ("algorithms") for a Matmul and proposes the one that its heuristic
// takes for the fastest. With --deterministic 0 the first use of a Matmul times MAX_CANDIDATES of
// them. These differ in the order of their sums, and which is the fastest may differ from one run
// to the next, so a saved state holds the choices (§17), and a resumed run makes the same.
const int MAX_CANDIDATES = 8;

// Plans are kept, since choosing takes longer than a small matmul.
struct MatmulPlan {
    Matmul matmul;
    char name[64];
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, d;
    int n_candidates;           // 0: cuBLASLt has no kernel; 1: it is chosen
    cublasLtMatmulAlgo_t candidates[MAX_CANDIDATES];
};

// A choice of an earlier run
struct Choice { Matmul matmul; cublasLtMatmulAlgo_t algorithm; };

const int MAX_PLANS = 64;                       // a model has about 30
static struct {
    cublasLtHandle_t handle;
    void* workspace;
    MatmulPlan plans[MAX_PLANS];
    int n_plans;
    Choice choices[MAX_PLANS];
    int n_choices;
    bool times_candidates;
} cublas;
const size_t WORKSPACE_BYTES = 32 << 20;        // what NVIDIA recommends for Hopper

static void start_cublas() {
    CHECK_CUBLAS(cublasLtCreate(&cublas.handle));
    cublas.workspace = allocate(WORKSPACE_BYTES);
}

template <class Value> static void set(cublasLtMatmulDesc_t operation,
                                       cublasLtMatmulDescAttributes_t attribute, Value value) {
    CHECK_CUBLAS(cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof value));
}

// An epilogue changes D before it is written. `bias` (m) is added. `aux` (m, n) is the input of
// GELU, which ADD_BIAS_GELU writes and TIMES_DGELU reads. Each is NULL if the epilogue has none.
static void set_epilogue(cublasLtMatmulDesc_t operation, Matmul mm, const floatX* bias,
                         floatX* aux) {
    const cublasLtEpilogue_t epilogues[] = {
        CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
        CUBLASLT_EPILOGUE_DGELU};
    set(operation, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogues[mm.epilogue]);
    if (bias != NULL) { set(operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias); }
    if (aux != NULL) {
        set(operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux);
        set(operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)mm.m);
    }
}

// Operands of 8 bits have one scale each, a number in the GPU's memory that multiplies the product.
struct Scales { const float *a, *b; };

static void set_scales(cublasLtMatmulDesc_t operation, Scales scales) {
    if (scales.a == NULL) { return; }
    set(operation, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, scales.a);
    set(operation, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, scales.b);
}

static cublasLtMatrixLayout_t layout(cudaDataType_t type, int rows, int columns, int batch) {
    cublasLtMatrixLayout_t made;
    int64_t stride = (int64_t)rows * columns;
    CHECK_CUBLAS(cublasLtMatrixLayoutCreate(&made, type, rows, columns, rows));
    CHECK_CUBLAS(cublasLtMatrixLayoutSetAttribute(made, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch,
                                                  sizeof batch));
    CHECK_CUBLAS(cublasLtMatrixLayoutSetAttribute(
        made, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride));
    return made;
}

// True: an earlier run chose for this plan, and its choice is now the only candidate.
static bool take_choice(MatmulPlan* plan) {
    for (int i = 0; i < cublas.n_choices; i++) {
        if (cublas.choices[i].matmul != plan->matmul) { continue; }
        cublasLtMatmulHeuristicResult_t result;
        cublasStatus_t status = cublasLtMatmulAlgoCheck(
            cublas.handle, plan->operation, plan->a, plan->b, plan->d, plan->d,
            &cublas.choices[i].algorithm, &result);
        if (status != CUBLAS_STATUS_SUCCESS || result.workspaceSize > WORKSPACE_BYTES) {
            die("the saved kernel for a %s cannot run on this GPU; delete the matmuls_*.json of "
                "the saved state, so that kernels are chosen again", plan->name);
        }
        plan->candidates[0] = cublas.choices[i].algorithm;
        plan->n_candidates = 1;
        return true;
    }
    return false;
}

static void find_candidates(MatmulPlan* plan) {
    if (take_choice(plan)) { return; }
    cublasLtMatmulPreference_t preference;
    CHECK_CUBLAS(cublasLtMatmulPreferenceCreate(&preference));
    CHECK_CUBLAS(cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES,
        sizeof WORKSPACE_BYTES));
    cublasLtMatmulHeuristicResult_t results[MAX_CANDIDATES];
    int found = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        cublas.handle, plan->operation, plan->a, plan->b, plan->d, plan->d, preference,
        cublas.times_candidates ? MAX_CANDIDATES : 1, results, &found);
    if (status != CUBLAS_STATUS_NOT_SUPPORTED) { CHECK_CUBLAS(status); }
    if (status == CUBLAS_STATUS_SUCCESS) { plan->n_candidates = found; }
    for (int i = 0; i < plan->n_candidates; i++) { plan->candidates[i] = results[i].algo; }
    CHECK_CUBLAS(cublasLtMatmulPreferenceDestroy(preference));
}

static MatmulPlan* plan_matmul(Matmul mm, const floatX* bias = NULL, floatX* aux = NULL,
                               Scales scales = {}) {
    for (int i = 0; i < cublas.n_plans; i++) {
        if (cublas.plans[i].matmul == mm) { return &cublas.plans[i]; }
    }
    if (cublas.n_plans == MAX_PLANS) {
        die("a model needs more than %d shapes of matmuls; raise MAX_PLANS in train_gpt2.cu",
            MAX_PLANS);
    }
    MatmulPlan* plan = &cublas.plans[cublas.n_plans++];
    plan->matmul = mm;
    const char* epilogues[] = {"", " + bias", " + bias, gelu", " * gelu'"};
    snprintf(plan->name, sizeof plan->name, "matmul %d x %d x %d%s%s", mm.m, mm.n, mm.k,
             mm.accumulate ? " += fp32" : "", epilogues[mm.epilogue]);
    if (mm.batch > 1) { snprintf(plan->name + strlen(plan->name), 16, " x %d", mm.batch); }
    if (mm.a_type != CUBLAS_X) { strcat(plan->name, ", 8 bits"); }

    bool a_is_transposed = mm.transpose == TRANSPOSE_A;
    bool b_is_transposed = mm.transpose == TRANSPOSE_B;
    CHECK_CUBLAS(cublasLtMatmulDescCreate(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set(plan->operation, CUBLASLT_MATMUL_DESC_TRANSA, a_is_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(plan->operation, CUBLASLT_MATMUL_DESC_TRANSB, b_is_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set_epilogue(plan->operation, mm, bias, aux);
    set_scales(plan->operation, scales);
    set(plan->operation, CUBLASLT_MATMUL_DESC_FAST_ACCUM, (int8_t)mm.fast_sums);
    plan->a = layout(mm.a_type, mm.m, mm.k, mm.batch);
    plan->b = layout(mm.b_type, mm.k, mm.n, mm.batch);
    if (a_is_transposed) { plan->a = layout(mm.a_type, mm.k, mm.m, mm.batch); }
    if (b_is_transposed) { plan->b = layout(mm.b_type, mm.n, mm.k, mm.batch); }
    plan->d = layout(mm.accumulate ? CUDA_R_32F : CUBLAS_X, mm.m, mm.n, mm.batch);
    find_candidates(plan);
    return plan;
}

// False: cuBLASLt has no kernel for these sizes with this epilogue, so that a kernel of our own has
// to do the epilogue's work after a plainer matmul.
static bool has_kernel(Matmul mm, const floatX* bias, floatX* aux = NULL, Scales scales = {}) {
    return plan_matmul(mm, bias, aux, scales)->n_candidates > 0;
}

// D = alpha op(A) op(B) + beta C, where C has D's shape
struct Operands {
    const void *a, *b;
    float alpha = 1.0f;
    const void* c = NULL;       // NULL: D itself
    float beta = 0.0f;
};

static cublasStatus_t start_matmul(MatmulPlan* plan, int candidate, void* d, Operands x,
                                   cudaStream_t stream) {
    const void* c = x.c != NULL ? x.c : d;
    return cublasLtMatmul(cublas.handle, plan->operation, &x.alpha, x.a, plan->a, x.b, plan->b,
                          &x.beta, c, plan->d, d, plan->d, &plan->candidates[candidate],
                          cublas.workspace, WORKSPACE_BYTES, stream);
}

// The milliseconds of three runs after a first one; INFINITY: the candidate cannot run.
static float matmul_ms(MatmulPlan* plan, int candidate, void* d, Operands x, cudaStream_t stream) {
    cudaEvent_t begin, end;
    float ms = INFINITY;
    if (start_matmul(plan, candidate, d, x, stream) != CUBLAS_STATUS_SUCCESS) { return ms; }
    CHECK_CUDA(cudaEventCreate(&begin));
    CHECK_CUDA(cudaEventCreate(&end));
    CHECK_CUDA(cudaEventRecord(begin, stream));
    for (int i = 0; i < 3; i++) {
        CHECK_CUBLAS(start_matmul(plan, candidate, d, x, stream));
    }
    CHECK_CUDA(cudaEventRecord(end, stream));
    CHECK_CUDA(cudaEventSynchronize(end));
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    CHECK_CUDA(cudaEventDestroy(begin));
    CHECK_CUDA(cudaEventDestroy(end));
    return ms;
}

// Leaves the fastest candidate alone. They are timed on D itself, which the matmul that follows
// overwrites, or, where it would be added to, on other memory.
static void choose_fastest(MatmulPlan* plan, void* d, Operands x, cudaStream_t stream) {
    Matmul mm = plan->matmul;
    void* to = mm.accumulate ? allocate(sizeof(float) * mm.m * mm.n * mm.batch) : d;
    CHECK_CUDA(cudaDeviceSynchronize());        // `allocate` has written its zeros
    int fastest = 0;
    float least_ms = INFINITY;
    for (int i = 0; i < plan->n_candidates; i++) {
        float ms = matmul_ms(plan, i, to, x, stream);
        if (ms < least_ms) {
            least_ms = ms;
            fastest = i;
        }
    }
    if (mm.accumulate) { CHECK_CUDA(cudaFree(to)); }
    plan->candidates[0] = plan->candidates[fastest];
    plan->n_candidates = 1;
}

static void run_matmul(MatmulPlan* plan, void* d, Operands x, cudaStream_t stream) {
    Matmul mm = plan->matmul;
    if (plan->n_candidates > 1) { choose_fastest(plan, d, x, stream); }
    if (plan->n_candidates == 0 && mm.a_type != CUBLAS_X) {
        die("cuBLASLt has no kernel for a %d x %d x %d matmul in 8 bits; leave --fp8 out, or "
            "update CUDA", mm.m, mm.n, mm.k);
    }
    if (plan->n_candidates == 0) {
        die("cuBLASLt has no kernel for a %d x %d x %d matmul; choose an n_embd that is a multiple "
            "of 64, such as --config n_embd=768 n_head=12", mm.m, mm.n, mm.k);
    }
    double m = mm.m, n = mm.n, k = mm.k;
    double bytes = (m * k + k * n) * (mm.a_type == CUBLAS_X ? sizeof(floatX) : 1);
    bytes += m * n * (mm.accumulate ? 2 * sizeof(float) : sizeof(floatX));
    if (mm.epilogue == ADD_BIAS_GELU || mm.epilogue == TIMES_DGELU) {
        bytes += m * n * sizeof(floatX);
    }
    Work work = {plan->name, mm.batch * bytes, mm.batch * 2 * m * n * k};
    begin_work(work, stream);
    CHECK_CUBLAS(start_matmul(plan, 0, d, x, stream));
    end_work(work, stream);
}

// D = op(A) op(B), or D += op(A) op(B) with mm.accumulate; bias and aux are for the epilogue.
static void matmul(void* d, const void* a, const void* b, Matmul mm, cudaStream_t stream,
                   const floatX* bias = NULL, floatX* aux = NULL, Scales scales = {}) {
    MatmulPlan* plan = plan_matmul(mm, bias, aux, scales);
    set_epilogue(plan->operation, mm, bias, aux);
    set_scales(plan->operation, scales);
    run_matmul(plan, d, {.a = a, .b = b, .beta = mm.accumulate ? 1.0f : 0.0f}, stream);
}

// y (rows, OC) += bias (OC), where no kernel of cuBLASLt adds it. One thread: one Pack. Grid
// rows*OC/PACK/256 x 256. Moves 2 rows*OC; bound by memory.
__global__ void add_bias_kernel(floatX* y, const floatX* bias, int64_t n, int OC) {
    int64_t at = thread_in_grid() * PACK;
    if (at >= n) { return; }
    Pack value = load(y + at);
    Pack shift = load(bias + at % OC);
    for (int i = 0; i < PACK; i++) { value.set(i, value[i] + shift[i]); }
    store(y + at, value);
}

// D = op(A) op(B) + bias; bias may be NULL
static void matmul_with_bias(floatX* d, const void* a, const void* b, Matmul mm,
                             cudaStream_t stream, const floatX* bias, Scales scales = {}) {
    Matmul with_bias = mm;
    with_bias.epilogue = ADD_BIAS;
    if (bias == NULL) {
        matmul(d, a, b, mm, stream, NULL, NULL, scales);
    } else if (has_kernel(with_bias, bias, NULL, scales)) {
        matmul(d, a, b, with_bias, stream, bias, NULL, scales);
    } else {
        int64_t size = (int64_t)mm.m * mm.n;
        matmul(d, a, b, mm, stream, NULL, NULL, scales);
        launch({"add_bias", 2.0 * size * sizeof(floatX)}, one_thread_each(size / PACK, stream),
               add_bias_kernel, d, bias, size, mm.m);
    }
}

struct LinearSizes { int rows, C, OC; };

// With --fp8 1 the matrices of the layers multiply in 8 bits while the model trains, with the
// numerics of Fp8Matmul in precision.py: e4m3 has 3 bits of mantissa and serves x and w; e5m2 has 2
// and the range that gradients need.
//
//   scale = max |x| / (largest number of the format)    x8 = x / scale in 8 bits    x ≈ scale x8
//   y = x8 w8    dx = dy8 w8ᵀ    dw += x8ᵀ dy8, each times the scales of its two operands
//
// Tensor cores take 8-bit operands only if the numbers that are summed over are contiguous in both.
// The rows of a matrix are so, its columns are not. Each tensor is therefore kept twice, as it is
// and transposed:
//
//   product        summed over    A                     B
//   y  = x w       C              w.columns (OC, C)     x.rows (rows, C)
//   dx = dy wᵀ     OC             w.rows (C, OC)        dy.rows (rows, OC)
//   dw += xᵀ dy    rows           dy.columns (OC, rows) x.columns (C, rows)
//
// The scale is taken from the tensor itself, so the whole tensor must exist before its first number
// can be rounded. A kernel that produces a tensor therefore writes it in bf16 and measures it as it
// does so (raise_largest). fp8_quantise_kernel then reads it, rounds it and transposes it. What
// attention returns is measured by a kernel of its own, and so are the weights, once a step. GELU
// and ReLU² are computed from their input twice, to be measured and to be rounded, and are never
// written in bf16.

const int FP8_UNIT = 16;            // sizes of 8-bit operands are multiples of this
const int FP8_LEAST_SIZE = 128;     // smaller matrices multiply in bf16, as in model.py

struct Fp8Tensor {
    uint8_t *rows, *columns;        // x8 (M, K), and its transpose (K, M)
    unsigned* largest;              // the bits of max |x| as a float
    float* scale;
    bool measured;                  // by the kernel that produces x; else fp8_quantise does it
};

// The 8-bit operands of one matrix of a layer, in its three products
struct Fp8Linear { Fp8Tensor x, w, dy; };

// Where the kernel that produces x, or dy, leaves the largest magnitude; NULL: it does not measure.
static unsigned* largest_x(const Fp8Linear* fp8) {
    return fp8 != NULL && fp8->x.measured ? fp8->x.largest : NULL;
}
static unsigned* largest_dy(const Fp8Linear* fp8) {
    return fp8 != NULL && fp8->dy.measured ? fp8->dy.largest : NULL;
}

// What is measured and rounded is a function of what is in memory: itself, or a class of §8.
struct Itself { static __device__ float forward(float x) { return x; } };

template <class Function> __device__ float rounded(float x) {
    return (float)(floatX)Function::forward(x);         // as if it had been in memory
}
template <> __device__ float rounded<Itself>(float x) { return x; }

// One thread: Packs that are as far apart as the grid has threads. Grid up to 1024 x 256. Reads n;
// bound by memory.
template <class Function>
__global__ void fp8_measure_kernel(unsigned* largest, const floatX* x, int64_t n) {
    float magnitude = 0.0f;
    for (int64_t at = thread_in_grid() * PACK; at < n;
         at += (int64_t)gridDim.x * blockDim.x * PACK) {
        Pack value = load(x + at);
        for (int i = 0; i < PACK; i++) {
            magnitude = fmaxf(magnitude, fabsf(rounded<Function>(value[i])));
        }
    }
    raise_largest(largest, magnitude);
}

struct alignas(8) Bytes8 { uint32_t words[2]; };
struct alignas(16) Bytes16 { uint32_t words[4]; };

// x / scale, where inverse is 1 / scale rounded to the nearest float. The remainder, x - quotient
// scale, has no rounding error. So one correction makes the quotient the nearest float, which is
// also what PyTorch gives (Markstein, IBM J. Res. Dev. 34, 1990), and is cheaper than to divide.
__device__ float divided(float x, float scale, float inverse) {
    float quotient = x * inverse;
    return fmaf(fmaf(-quotient, scale, x), inverse, quotient);
}

// 8 floats / scale → 8 bits each. The GPU's conversion takes two numbers at a time. GPUs before
// compute capability 8.9 have none, so find_gpu refuses --fp8 1.
template <__nv_fp8_interpretation_t FORMAT>
__device__ Bytes8 divided(const float* x, float scale, float inverse) {
    Bytes8 result = {};
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
    for (int i = 0; i < 8; i += 2) {
        float2 pair = {divided(x[i], scale, inverse), divided(x[i + 1], scale, inverse)};
        uint32_t two = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, FORMAT);
        result.words[i / 4] |= two << 8 * (i % 4);
    }
#endif
    return result;
}

// x (rows, columns) → to.rows and to.columns, with the scale that follows from *to.largest.
// One thread: 16 rows of 8 columns, which are 16 stores of 8 bytes in to.rows and 8 stores of 16
// bytes in to.columns. A warp has 4 threads side by side and 8 one below the other, a block 4 such
// warps side by side: 128 x 128 numbers. So a warp reads 64 neighbouring bytes of each row and
// writes 32 of it, and 128 of each column. Grid (columns/128, rows/128) x 128. Moves 4 bytes for
// each number of x; bound by memory.
template <__nv_fp8_interpretation_t FORMAT, class Function>
__global__ void __launch_bounds__(128) fp8_quantise_kernel(Fp8Tensor to, const floatX* x, int rows,
                                                           int columns) {
    int lane = threadIdx.x % WARP;
    int warp = threadIdx.x / WARP;
    int64_t row = (blockIdx.y * 8 + lane / 4) * 16;
    int64_t column = (blockIdx.x * 16 + warp * 4 + lane % 4) * 8;
    const float FORMAT_LARGEST = FORMAT == __NV_E4M3 ? 448.0f : 57344.0f;
    float scale = __fdiv_rn(fmaxf(__uint_as_float(*to.largest), 1e-12f), FORMAT_LARGEST);
    float inverse = __fdiv_rn(1.0f, scale);
    if (row == 0 && column == 0) { *to.scale = scale; }
    if (row >= rows || column >= columns) { return; }
    Pack loaded[16][8 / PACK];          // all loads first, so that they wait for memory together
    for (int r = 0; r < 16; r++) {
        for (int k = 0; k < 8; k += PACK) {
            loaded[r][k / PACK] = load(x + (row + r) * columns + column + k);
        }
    }
    Bytes8 across[16];                  // in registers only if the loops are unrolled
#pragma unroll
    for (int r = 0; r < 16; r++) {
        float values[8];
        for (int i = 0; i < 8; i++) {
            values[i] = rounded<Function>(loaded[r][i / PACK][i % PACK]);
        }
        across[r] = divided<FORMAT>(values, scale, inverse);
        *(Bytes8*)(to.rows + (row + r) * columns + column) = across[r];
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        Bytes16 down = {};
#pragma unroll
        for (int r = 0; r < 16; r++) {
            uint32_t byte = across[r].words[i / 4] >> 8 * (i % 4) & 255;
            down.words[r / 4] |= byte << 8 * (r % 4);
        }
        *(Bytes16*)(to.columns + (column + i) * rows + row) = down;
    }
}

// *to.largest must be 0, unless to.measured. rows and columns are multiples of 16.
template <__nv_fp8_interpretation_t FORMAT, class Function = Itself>
static void fp8_quantise(Fp8Tensor to, const floatX* x, int rows, int columns,
                         cudaStream_t stream) {
    int64_t n = (int64_t)rows * columns;
    int64_t blocks = min(ceil_div(n, (int64_t)256 * PACK), (int64_t)1024);
    if (!to.measured) {
        launch({"fp8_measure", (double)n * sizeof(floatX)}, {(unsigned)blocks, 256, stream},
               fp8_measure_kernel<Function>, to.largest, x, n);
    }
    dim3 grid(ceil_div(columns, 128), ceil_div(rows, 128));
    launch({"fp8_quantise", n * (sizeof(floatX) + 2.0)}, {grid, 128, stream},
           fp8_quantise_kernel<FORMAT, Function>, to, x, rows, columns);
}

// y = x w + bias. The weights are already in f->w, and if x is NULL, x is already in f->x. As in
// precision.py, only this product has fast sums. Unlike there, y is rounded to bf16 once, after the
// bias is added.
static void fp8_linear_forward(floatX* y, const Fp8Linear* f, const floatX* x, const floatX* bias,
                               LinearSizes n, cudaStream_t stream) {
    Matmul mm = {.m = n.OC, .n = n.rows, .k = n.C, .transpose = TRANSPOSE_A,
                 .a_type = CUDA_R_8F_E4M3, .b_type = CUDA_R_8F_E4M3, .fast_sums = true};
    if (x != NULL) { fp8_quantise<__NV_E4M3>(f->x, x, n.rows, n.C, stream); }
    matmul_with_bias(y, f->w.columns, f->x.rows, mm, stream, bias, {f->w.scale, f->x.scale});
}

// dx = dy wᵀ, after fp8_linear_backward_weight, which leaves dy in f->dy
static void fp8_linear_backward_input(floatX* dx, const Fp8Linear* f, LinearSizes n,
                                      cudaStream_t stream) {
    Matmul mm = {.m = n.C, .n = n.rows, .k = n.OC, .transpose = TRANSPOSE_A,
                 .a_type = CUDA_R_8F_E4M3, .b_type = CUDA_R_8F_E5M2};
    matmul(dx, f->w.rows, f->dy.rows, mm, stream, NULL, NULL, {f->w.scale, f->dy.scale});
}

// dw += xᵀ dy, where x is still in f->x. Unlike precision.py's, the product is not rounded to bf16
// before it is added.
static void fp8_linear_backward_weight(float* dw, const Fp8Linear* f, const floatX* dy,
                                       LinearSizes n, cudaStream_t stream) {
    Matmul mm = {.m = n.OC, .n = n.C, .k = n.rows, .transpose = TRANSPOSE_A, .accumulate = true,
                 .a_type = CUDA_R_8F_E5M2, .b_type = CUDA_R_8F_E4M3};
    fp8_quantise<__NV_E5M2>(f->dy, dy, n.rows, n.OC, stream);
    matmul(dw, f->dy.columns, f->x.columns, mm, stream, NULL, NULL, {f->dy.scale, f->x.scale});
}

// Of the functions below, those with a parameter `fp8` multiply in 8 bits if it is not NULL.

// y = x w + bias; bias may be NULL
static void linear_forward(floatX* y, const floatX* x, const floatX* w, const floatX* bias,
                           LinearSizes n, cudaStream_t stream, const Fp8Linear* fp8 = NULL) {
    if (fp8 != NULL) { return fp8_linear_forward(y, fp8, x, bias, n, stream); }
    matmul_with_bias(y, w, x, {.m = n.OC, .n = n.rows, .k = n.C}, stream, bias);
}

// dx = dy wᵀ
static void linear_backward_input(floatX* dx, const floatX* dy, const floatX* w, LinearSizes n,
                                  cudaStream_t stream, const Fp8Linear* fp8 = NULL) {
    if (fp8 != NULL) { return fp8_linear_backward_input(dx, fp8, n, stream); }
    matmul(dx, w, dy, {.m = n.C, .n = n.rows, .k = n.OC, .transpose = TRANSPOSE_A}, stream);
}

// dw += xᵀ dy    dbias += Σ_rows dy; dbias may be NULL
static void linear_backward_weight(float* dw, float* dbias, float* partials, const floatX* x,
                                   const floatX* dy, LinearSizes n, cudaStream_t stream,
                                   const Fp8Linear* fp8 = NULL) {
    Matmul mm = {.m = n.OC, .n = n.C, .k = n.rows, .transpose = TRANSPOSE_B, .accumulate = true};
    if (fp8 != NULL) {
        fp8_linear_backward_weight(dw, fp8, dy, n, stream);
    } else {
        matmul(dw, dy, x, mm, stream);
    }
    if (dbias != NULL) { bias_backward(dbias, partials, dy, n.rows, n.OC, stream); }
}

// ---- §7 Attention -------------------------------------------------------------------------------
//
// For each head, with scale = sharpness / sqrt(HS), where sharpness is 1 in GPT-2 and 1.44 in dN:
//
//   S[t, s] = q[t]·k[s] scale for t - window ≤ s ≤ t    P = softmax of each row of S
//   y[t] = Σ_s P[t, s] v[s]
//   dP[t, s] = dy[t]·v[s]    delta[t] = dy[t]·y[t]    dS[t, s] = P[t, s] (dP[t, s] - delta[t])
//   dv[s] = Σ_t P[t, s] dy[t]    dq[t] = scale Σ_s dS[t, s] k[s]    dk[s] = scale Σ_t dS[t, s] q[t]
//
// qkv (B, T, 3, NH, HS), y (B, T, NH, HS). S and P, (T, T) each, are never in memory. The forward
// pass keeps only lse (B, NH, T), the logarithm of the sum of exponentials of each row of S, and
// with it the backward pass computes P again. The GPU's instruction computes powers of 2, so lse is
// a logarithm to base 2: P[t, s] = 2^(S[t, s] / ln 2 - lse[t]). In the code a score is S / ln 2.
//
// Online softmax: a query takes its keys one by one (or tile by tile) and keeps the highest score
// so far, Σ 2^(score - highest) and Σ 2^(score - highest) v. When the highest score grows, both
// sums are multiplied by 2^(old highest - new highest).
//
// The plain kernels come first: they are the specification. In bf16, heads of 64 and 128 channels
// use the fast kernels, FlashAttention-2, which compute the same on tensor cores.

struct AttentionSizes {
    int B, T, NH, HS, window;
    float sharpness;
    double bytes() const { return (double)B * T * NH * HS * sizeof(floatX); }     // of y
    double flops() const {              // of one product: 2 for each channel of each pair t, s
        return (double)B * window * (2 * T - window) * NH * HS;
    }
};

// What turned dN's q and k into q' and k' (the equations stand below, with rotary_forward_kernel):
// cosines and sines (T, HS/2); rstd (BT, 2, NH) of q and k. NULL in GPT-2.
struct Rotary { float *cosines, *sines, *rstd; };

// With width 3, where the first q of a head is in qkv; its k and v are C and 2C later. With width
// 1, where the first row of a head is in y.
__device__ int64_t head_start(int b, int h, int T, int NH, int HS, int width) {
    return (int64_t)b * T * width * NH * HS + h * HS;
}

// The plain kernels serve fp32, and head sizes other than 64 and 128. A warp has one query or key
// of one head in registers; a lane has its channels lane, lane + 32, …. Each query reads each of
// its keys. These reads, most of which the L2 cache serves, bound the kernels.

const int LANE_CHANNELS = 8;        // channels of a lane; so HS is at most 256

// The row of a head that a warp works on
struct HeadRow {
    int b, h, t;
    bool exists;
    __device__ HeadRow(AttentionSizes sizes) {
        int64_t row = thread_in_grid() / WARP;      // (B, NH, T)
        exists = row < (int64_t)sizes.B * sizes.NH * sizes.T;
        b = row / ((int64_t)sizes.NH * sizes.T);
        h = row / sizes.T % sizes.NH;
        t = row % sizes.T;
    }
};

__device__ void load_channels(float (&channels)[LANE_CHANNELS], const floatX* row, int HS) {
    for (int i = 0; i < LANE_CHANNELS; i++) {
        int c = threadIdx.x % WARP + WARP * i;
        channels[i] = c < HS ? (float)row[c] : 0.0f;
    }
}

__device__ void store_channels(floatX* row, const float (&channels)[LANE_CHANNELS], float scale,
                               int HS) {
    for (int i = 0; i < LANE_CHANNELS; i++) {
        int c = threadIdx.x % WARP + WARP * i;
        if (c < HS) { row[c] = (floatX)(channels[i] * scale); }
    }
}

__device__ float dot(const float (&a)[LANE_CHANNELS], const float (&b)[LANE_CHANNELS]) {
    float sum = 0.0f;
    for (int i = 0; i < LANE_CHANNELS; i++) { sum += a[i] * b[i]; }
    return warp_sum(sum);
}

__device__ void add_scaled(float (&sum)[LANE_CHANNELS], float factor,
                           const float (&a)[LANE_CHANNELS]) {
    for (int i = 0; i < LANE_CHANNELS; i++) { sum[i] += factor * a[i]; }
}

const float LOG2_E = 1.44269504f;   // 1 / ln 2

// One warp: y and lse of one query. Grid B*NH*T/4 x 128. 2 BT²C FLOP if no window limits the keys.
__global__ void plain_attention_forward_kernel(floatX* y, float* lse, const floatX* qkv,
                                               AttentionSizes sizes) {
    HeadRow at(sizes);
    if (!at.exists) { return; }
    int T = sizes.T, NH = sizes.NH, HS = sizes.HS, C = NH * HS;
    const floatX* from = qkv + head_start(at.b, at.h, T, NH, HS, 3);
    float q[LANE_CHANNELS];
    float k[LANE_CHANNELS];
    float v[LANE_CHANNELS];
    float sum[LANE_CHANNELS] = {};
    float highest = -INFINITY;
    float total = 0.0f;
    float to_base_2 = rsqrtf((float)HS) * LOG2_E * sizes.sharpness;
    load_channels(q, from + (int64_t)at.t * 3 * C, HS);
    for (int s = max(0, at.t - sizes.window); s <= at.t; s++) {
        load_channels(k, from + (int64_t)s * 3 * C + C, HS);
        load_channels(v, from + (int64_t)s * 3 * C + 2 * C, HS);
        float score = dot(q, k) * to_base_2;
        float new_highest = fmaxf(highest, score);
        float shrink = exp2f(highest - new_highest);
        float p = exp2f(score - new_highest);
        highest = new_highest;
        total = total * shrink + p;
        for (int i = 0; i < LANE_CHANNELS; i++) { sum[i] = sum[i] * shrink + p * v[i]; }
    }
    floatX* to = y + head_start(at.b, at.h, T, NH, HS, 1) + (int64_t)at.t * C;
    store_channels(to, sum, 1.0f / total, HS);
    if (threadIdx.x % WARP == 0) {
        lse[((int64_t)at.b * NH + at.h) * T + at.t] = highest + log2f(total);
    }
}

// One warp: delta of one token and head. Grid BT*NH/4 x 128. Reads 2 BTC; bound by memory.
__global__ void attention_delta_kernel(float* delta, const floatX* y, const floatX* dy,
                                       AttentionSizes sizes) {
    int T = sizes.T, NH = sizes.NH, HS = sizes.HS;
    int lane = threadIdx.x % WARP;
    int64_t row = thread_in_grid() / WARP;          // (B, T, NH)
    if (row >= (int64_t)sizes.B * T * NH) { return; }
    float sum = 0.0f;
    for (int c = lane; c < HS; c += WARP) {
        sum += (float)y[row * HS + c] * (float)dy[row * HS + c];
    }
    sum = warp_sum(sum);
    unsigned token = (unsigned)row / NH;            // in 32 bits, as in HeadVector
    int b = token / T;
    int t = token % T;
    int h = (unsigned)row % NH;
    if (lane == 0) { delta[((int64_t)b * NH + h) * T + t] = sum; }
}

// One warp. If KEYS is false: dq of one query, from the keys that it sees. If KEYS is true: dk and
// dv of one key, from the queries that see it. Grid B*NH*T/4 x 128.
template <bool KEYS>
__global__ void plain_attention_backward_kernel(floatX* dqkv, const floatX* qkv, const floatX* dy,
                                                const float* lse, const float* delta,
                                                AttentionSizes sizes) {
    HeadRow at(sizes);
    if (!at.exists) { return; }
    int T = sizes.T, NH = sizes.NH, HS = sizes.HS, C = NH * HS;
    int64_t start = head_start(at.b, at.h, T, NH, HS, 3);
    int64_t row = ((int64_t)at.b * NH + at.h) * T;
    const floatX* from = qkv + start;
    const floatX* dy_from = dy + head_start(at.b, at.h, T, NH, HS, 1);
    float q[LANE_CHANNELS];
    float k[LANE_CHANNELS];
    float v[LANE_CHANNELS];
    float dy_row[LANE_CHANNELS];
    float dq_or_dk[LANE_CHANNELS] = {};
    float dv[LANE_CHANNELS] = {};
    float scale = rsqrtf((float)HS) * sizes.sharpness;
    float to_base_2 = scale * LOG2_E;
    int begin = KEYS ? at.t : max(0, at.t - sizes.window);
    int end = KEYS ? min(T, at.t + sizes.window + 1) : at.t + 1;
    for (int other = begin; other < end; other++) {
        int query = KEYS ? other : at.t;
        int key = KEYS ? at.t : other;
        load_channels(q, from + (int64_t)query * 3 * C, HS);
        load_channels(k, from + (int64_t)key * 3 * C + C, HS);
        load_channels(v, from + (int64_t)key * 3 * C + 2 * C, HS);
        load_channels(dy_row, dy_from + (int64_t)query * C, HS);
        float p = exp2f(dot(q, k) * to_base_2 - lse[row + query]);
        float ds = p * (dot(dy_row, v) - delta[row + query]);
        add_scaled(dv, p, dy_row);
        add_scaled(dq_or_dk, ds, KEYS ? q : k);
    }
    floatX* to = dqkv + start + (int64_t)at.t * 3 * C;
    store_channels(to + (KEYS ? C : 0), dq_or_dk, scale, HS);
    if (KEYS) { store_channels(to + 2 * C, dv, 1.0f, HS); }
}

#ifndef FP32
// The fast kernels. A block has 64 queries (or keys) of a head and walks over tiles of keys (or
// queries), which its 4 warps share. So a tile is read from memory once for 64 rows.
//
// A tile is a number of rows of HS channels in shared memory. A row is cut into chunks of 8
// channels, 16 bytes. Figure 2, the swizzle: chunk i of row r lies in slot i ^ (r % 8) of its row.
// For HS = 64, the slots hold these chunks:
//
//     slot     0  1  2  3  4  5  6  7      Shared memory has 32 banks of 4 bytes, and a slot covers
//     row 0    0  1  2  3  4  5  6  7      4 of them. ldmatrix reads the same chunk of 8 rows at
//     row 1    1  0  3  2  5  4  7  6      once. With the swizzle each row has it in another slot
//     row 2    2  3  0  1  6  7  4  5      (chunk 0 goes down the diagonal), so the 8 reads use all
//     row 3    3  2  1  0  7  6  5  4      32 banks. Without it they would all use the banks of one
//     …                                    slot and wait for one another. When a tile is filled, 8
//     row 7    7  6  5  4  3  2  1  0      threads write the 8 slots of a row: no conflict either.

const int TILE = 64;                    // rows of a tile
const int ATTENTION_THREADS = 128;      // 4 warps of 16 rows each

template <int HS> __device__ floatX* chunk_at(floatX* tile, int row, int chunk) {
    return tile + row * HS + (chunk ^ (row % 8)) * 8;
}

// Begins to copy rows first … first + ROWS - 1 of a matrix into a tile; rows from T on become
// zeros. `stride` is the distance of two rows in memory. 8 (or 16, if HS is 128) neighbouring
// threads copy a row, which is contiguous in memory; a thread copies the same chunk of every
// STEP-th row. Since STEP is a multiple of 8, that chunk has the same slot in all of these rows, so
// the addresses differ by constants, and one addition makes each instead of ten instructions.
template <int HS, int ROWS>
__device__ void load_tile(floatX* tile, const floatX* from, int64_t stride, int first, int T) {
    constexpr int CHUNKS = HS / 8;                          // of a row
    constexpr int STEP = ATTENTION_THREADS / CHUNKS;        // rows that all threads copy at once
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0);
    int row = threadIdx.x / CHUNKS;
    int chunk = threadIdx.x % CHUNKS;
    floatX* to = chunk_at<HS>(tile, row, chunk);
    const floatX* source = from + (first + row) * stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP) {
        int valid = first + row + i < T ? 16 : 0;           // of a row that is not there, 0 bytes
        cp_async16(to + i * HS, source + i * stride, valid);
    }
}

// product (16, N) = a[row … row + 15] bᵀ for a warp, where a and b (N, HS) are tiles. product[j]
// has columns 8 j … 8 j + 7, spread over the lanes like C in Figure 1. A row of the tile b is a
// column of bᵀ, and by Figure 1 a register holds two neighbours of a column of B. So ldmatrix need
// not transpose.
template <int HS, int N>
__device__ void multiply_transposed(float (&product)[N / 8][4], floatX* a, int row, floatX* b) {
    int lane = threadIdx.x % WARP;
    for (auto& part : product) {
        for (float& element : part) { element = 0.0f; }
    }
#pragma unroll
    for (int k = 0; k < HS; k += 16) {
        uint32_t left[4];
        ldmatrix_x4(left, chunk_at<HS>(a, row + lane % 16, k / 8 + lane / 16));
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t right[4];          // two B's, which are 16 columns of bᵀ
            ldmatrix_x4(right, chunk_at<HS>(b, n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
            mma_m16n8k16_bf16(product[n / 8], left, right);
            mma_m16n8k16_bf16(product[n / 8 + 1], left, right + 2);
        }
    }
}

__device__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

// sum (16, HS) += a b for a warp, where a (16, K) is a product of multiply_transposed, still in
// registers, and b (K, HS) is a tile. By Figure 1 a C is spread like the left half of an A, and the
// next C like its right half. So a only has to be rounded to bf16; no lane needs another's part.
template <int HS, int K>
__device__ void multiply_add(float (&sum)[HS / 8][4], const float (&a)[K / 8][4], floatX* b) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        const float* near = a[k / 8];
        const float* far = a[k / 8 + 1];
        uint32_t left[4] = {pack_bf16(near[0], near[1]), pack_bf16(near[2], near[3]),
                            pack_bf16(far[0], far[1]), pack_bf16(far[2], far[3])};
#pragma unroll
        for (int n = 0; n < HS; n += 16) {
            uint32_t right[4];
            ldmatrix_x4_trans(right, chunk_at<HS>(b, k + lane % 16, n / 8 + lane / 16));
            mma_m16n8k16_bf16(sum[n / 8], left, right);
            mma_m16n8k16_bf16(sum[n / 8 + 1], left, right + 2);
        }
    }
}

// Writes a warp's rows (16, HS) to rows first … first + 15 of a matrix, but not to rows from T on.
// A lane has parts of rows lane/4 and lane/4 + 8, which it multiplies by scale_0 and scale_8.
template <int HS>
__device__ void store_rows(floatX* to, int64_t stride, int first, int T,
                           const float (&rows)[HS / 8][4], float scale_0, float scale_8) {
    int lane = threadIdx.x % WARP;
    int t = first + lane / 4;
#pragma unroll
    for (int n = 0; n < HS / 8; n++) {
        int c = n * 8 + lane % 4 * 2;
        if (t < T) {
            *(uint32_t*)(to + t * stride + c) =
                pack_bf16(rows[n][0] * scale_0, rows[n][1] * scale_0);
        }
        if (t + 8 < T) {
            *(uint32_t*)(to + (t + 8) * stride + c) =
                pack_bf16(rows[n][2] * scale_8, rows[n][3] * scale_8);
        }
    }
}

// The maximum and the sum over a quad. A row of Figure 1's C is spread over these four lanes.
__device__ float quad_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
    return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}

__device__ float quad_sum(float value) {
    value += __shfl_xor_sync(~0u, value, 1);
    return value + __shfl_xor_sync(~0u, value, 2);
}

// Where the highest score starts. It is below every score. It is finite, because a row may see no
// key of a tile: -INFINITY - -INFINITY would be NaN.
const float LOWEST = -1e30f;

// True if key ≤ query ≤ key + window. For a later key query - key is negative, which as an unsigned
// number is larger than any window.
__device__ bool sees(int query, int key, int window) {
    return (unsigned)(query - key) <= (unsigned)window;
}

// The first tile that has a key which `query` sees. Later queries see no earlier tile.
__device__ int first_key_tile(int query, int window) { return max(0, query - window) / TILE; }

// Shared memory has room for two tiles of keys and two of values. Figure 3, the double buffer:
// while the warps multiply by one tile, the next tile is copied into the other half.
//
//     half 0   copy tile 0 │ multiply by 0 │ copy tile 2   │ multiply by 2 │ copy tile 4   │ …
//     half 1               │ copy tile 1   │ multiply by 1 │ copy tile 3   │ multiply by 3 │ …
//                          │ j = 0         │ j = 1         │ j = 2         │ j = 3         │ …
//
// Each iteration has two barriers. Before the first one, each thread waits for the copies that it
// began itself, so that after the barrier the whole tile j is there. The second one comes after the
// products: then no warp reads tile j any more, and the next iteration may overwrite it.
//
// This function begins to copy tile j of the keys and values of a head into half j % 2.
template <int HS>
__device__ void load_keys(floatX* k, floatX* v, const floatX* from, int64_t C, int j, int T) {
    int half = j % 2 * TILE * HS;
    load_tile<HS, TILE>(k + half, from + C, 3 * C, j * TILE, T);
    load_tile<HS, TILE>(v + half, from + 2 * C, 3 * C, j * TILE, T);
    cp_async_commit();
}

// Sets elements of a product to -∞ where the query does not see the key. If KEYS is false, rows are
// queries, as in q kᵀ; if it is true, rows are keys, as in k qᵀ. `row` is the first of the lane's
// two.
template <bool KEYS, int N>
__device__ void hide_unseen(float (&p)[N][4], int row, int first_column, int window) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int column = first_column + n * 8 + threadIdx.x % 4 * 2 + i % 2;
            int query = KEYS ? column : row + i / 2 * 8;
            int key = KEYS ? row + i / 2 * 8 : column;
            if (!sees(query, key, window)) { p[n][i] = -INFINITY; }
        }
    }
}

// The state of the softmax of a lane's two rows, lane/4 and lane/4 + 8
template <int HS> struct OnlineSoftmax {
    float highest[2] = {LOWEST, LOWEST};    // of the row's scores so far
    float total[2] = {};                    // Σ 2^(score - highest), over this lane's columns

    // p: in q kᵀ for 8 N keys, out 2^(score - highest). Where a row has a new highest score, the
    // row of sum, Σ 2^(score - highest) v, and total shrink.
    template <int N>
    __device__ void add_tile(float (&p)[N][4], float (&sum)[HS / 8][4], float to_base_2) {
        float of_tile[2] = {-INFINITY, -INFINITY};      // the highest of q kᵀ
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) { of_tile[i / 2] = fmaxf(of_tile[i / 2], p[n][i]); }
        }
        for (int r = 0; r < 2; r++) {
            float new_highest = fmaxf(highest[r], quad_max(of_tile[r]) * to_base_2);
            float shrink = exp2f(highest[r] - new_highest);
            highest[r] = new_highest;
            total[r] *= shrink;
            for (auto& part : sum) {
                part[2 * r] *= shrink;
                part[2 * r + 1] *= shrink;
            }
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                p[n][i] = exp2f(p[n][i] * to_base_2 - highest[i / 2]);
                total[i / 2] += p[n][i];
            }
        }
    }
};

// y and lse. One block: 64 queries of a head; a warp has 16 of them, with their scores and sums in
// its registers. These are laid out like C in Figure 1: a lane has parts of rows lane/4 and
// lane/4 + 8. The block walks over the tiles of keys that its queries see. Grid (T/64, NH, B) x
// 128; the blocks with the most keys come first, so that the last ones to run are short. 2 BT²C
// FLOP; bound by tensor cores.
template <int HS> __global__ void __launch_bounds__(ATTENTION_THREADS)
attention_forward_kernel(floatX* y, float* lse, const floatX* qkv, AttentionSizes sizes) {
    extern __shared__ float4 shared[];
    floatX* q = (floatX*)shared;            // one tile
    floatX* k = q + TILE * HS;              // two tiles
    floatX* v = k + 2 * TILE * HS;          // two tiles
    int T = sizes.T, NH = sizes.NH;
    int lane = threadIdx.x % WARP;
    int warp = threadIdx.x / WARP;
    int h = blockIdx.y;
    int b = blockIdx.z;
    int last = gridDim.x - 1 - blockIdx.x;  // the tile of queries, and the last tile of keys
    int64_t C = (int64_t)NH * HS;
    const floatX* from = qkv + head_start(b, h, T, NH, HS, 3);
    float sum[HS / 8][4] = {};              // Σ 2^(score - highest) v
    OnlineSoftmax<HS> softmax;
    float to_base_2 = rsqrtf((float)HS) * LOG2_E * sizes.sharpness;
    int query = last * TILE + warp * 16 + lane / 4;     // the first of this lane's two
    int first = first_key_tile(last * TILE, sizes.window);

    load_tile<HS, TILE>(q, from, 3 * C, last * TILE, T);
    load_keys<HS>(k, v, from, C, first, T);
    for (int j = first; j <= last; j++) {
        floatX* k_tile = k + j % 2 * TILE * HS;
        floatX* v_tile = v + j % 2 * TILE * HS;
        if (j < last) {
            load_keys<HS>(k, v, from, C, j + 1, T);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
        float p[TILE / 8][4];
        multiply_transposed<HS, TILE>(p, q, warp * 16, k_tile);
        hide_unseen<false>(p, query, j * TILE, sizes.window);
        softmax.add_tile(p, sum, to_base_2);
        multiply_add<HS, TILE>(sum, p, v_tile);
        __syncthreads();
    }
    for (int r = 0; r < 2; r++) {
        softmax.total[r] = quad_sum(softmax.total[r]);
        int t = query + 8 * r;
        if (lane % 4 == 0 && t < T) {
            lse[((int64_t)b * NH + h) * T + t] = softmax.highest[r] + log2f(softmax.total[r]);
        }
    }
    store_rows<HS>(y + head_start(b, h, T, NH, HS, 1), C, last * TILE + warp * 16, T, sum,
                   1.0f / softmax.total[0], 1.0f / softmax.total[1]);
}

// Where rows of q or k are: t of the first one in a warp's 16, their b and h, and 0 for q, 1 for k
struct Place { int t, b, h, part; };

// In dN: rows (16, HS) of a warp, in dq' or dk', out dq or dk, as by rotary_backward_kernel.
// chunk(r, n) is where chunk n of row r of q' or k' lies in shared memory. A lane has both channels
// of each pair that is turned, because they are HS/2 apart, a multiple of 8. Only the sum over a
// row needs the quad.
template <int HS, class Chunk>
__device__ void turn_back(float (&rows)[HS / 8][4], Chunk chunk, Place at, Rotary rotary,
                          AttentionSizes sizes) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = lane / 4 + 8 * r;
        int t = at.t + row;
        float product = 0.0f;
#pragma unroll
        for (int n = 0; n < HS / 8; n++) {
            const floatX* turned = chunk(row, n) + lane % 4 * 2;
            for (int i = 0; i < 2; i++) { product += rows[n][2 * r + i] * (float)turned[i]; }
        }
        float mean = quad_sum(product) / HS;
        if (t >= sizes.T) { continue; }     // it is not stored, and has no cosines
        int64_t bt = (int64_t)at.b * sizes.T + t;
        float rstd = rotary.rstd[(bt * 2 + at.part) * sizes.NH + at.h];
#pragma unroll
        for (int n = 0; n < HS / 16; n++) {
            int c = n * 8 + lane % 4 * 2;
            const floatX* low = chunk(row, n) + lane % 4 * 2;
            const floatX* high = chunk(row, n + HS / 16) + lane % 4 * 2;
            for (int i = 0; i < 2; i++) {
                float* d_low = &rows[n][2 * r + i];
                float* d_high = &rows[n + HS / 16][2 * r + i];
                float cosine = rotary.cosines[t * (HS / 2) + c + i];
                float sine = rotary.sines[t * (HS / 2) + c + i];
                float dr1 = (*d_low - (float)low[i] * mean) * rstd;
                float dr2 = (*d_high - (float)high[i] * mean) * rstd;
                *d_low = dr1 * cosine - dr2 * sine;
                *d_high = dr2 * cosine + dr1 * sine;
            }
        }
    }
}

// The queries of a tile in attention_backward_keys_kernel, as many as fit into the registers
template <int HS> constexpr int QUERY_TILE = HS == 64 ? 64 : 32;

// dk and dv. One block: 64 keys of a head; a warp has 16 of them, with their dk and dv in its
// registers. The block walks over the tiles of queries that see its keys, which are double-buffered
// as in Figure 3. S, P, dP and dS are computed transposed, (keys, queries), so that Pᵀ and dSᵀ can
// be the left factors of dv += Pᵀ dy and dk += dSᵀ q without leaving the registers. TURNS, which
// dN sets: dk' is turned back before it is written. Grid (T/64, NH, B) x 128. 4 BT²C FLOP; bound by
// tensor cores.
template <int HS, bool TURNS> __global__ void __launch_bounds__(ATTENTION_THREADS)
attention_backward_keys_kernel(floatX* dqkv, const floatX* qkv, const floatX* dy, const float* lse,
                               const float* delta, Rotary rotary, AttentionSizes sizes) {
    constexpr int QUERIES = QUERY_TILE<HS>;
    extern __shared__ float4 shared[];
    floatX* k = (floatX*)shared;                                // one tile
    floatX* v = k + TILE * HS;                                  // one tile
    floatX* q = v + TILE * HS;                                  // two tiles of QUERIES rows
    floatX* dy_tiles = q + 2 * QUERIES * HS;                    // two
    float* lse_tiles = (float*)(dy_tiles + 2 * QUERIES * HS);   // two
    float* delta_tiles = lse_tiles + 2 * QUERIES;               // two
    int T = sizes.T, NH = sizes.NH;
    int lane = threadIdx.x % WARP;
    int warp = threadIdx.x / WARP;
    int h = blockIdx.y;
    int b = blockIdx.z;
    int key_0 = blockIdx.x * TILE;
    int64_t C = (int64_t)NH * HS;
    int64_t row = ((int64_t)b * NH + h) * T;
    const floatX* from = qkv + head_start(b, h, T, NH, HS, 3);
    const floatX* dy_from = dy + head_start(b, h, T, NH, HS, 1);
    float dk[HS / 8][4] = {};
    float dv[HS / 8][4] = {};
    float scale = rsqrtf((float)HS) * sizes.sharpness;
    float to_base_2 = scale * LOG2_E;
    int end = min(T, key_0 + TILE + sizes.window);      // later queries see none of the keys

    auto load_queries = [&](int first, int which) {
        load_tile<HS, QUERIES>(q + which * QUERIES * HS, from, 3 * C, first, T);
        load_tile<HS, QUERIES>(dy_tiles + which * QUERIES * HS, dy_from, C, first, T);
        cp_async_commit();
        if (threadIdx.x < QUERIES) {        // for queries from T on, P becomes 2^-inf = 0
            int t = first + threadIdx.x;
            int at = which * QUERIES + threadIdx.x;
            lse_tiles[at] = t < T ? lse[row + t] : INFINITY;
            delta_tiles[at] = t < T ? delta[row + t] : 0.0f;
        }
    };
    load_tile<HS, TILE>(k, from + C, 3 * C, key_0, T);
    load_tile<HS, TILE>(v, from + 2 * C, 3 * C, key_0, T);
    load_queries(key_0, 0);
    int which = 0;                          // half of the double buffer
    for (int first = key_0; first < end; first += QUERIES) {
        if (first + QUERIES < end) {
            load_queries(first + QUERIES, which ^ 1);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
        floatX* q_tile = q + which * QUERIES * HS;
        floatX* dy_tile = dy_tiles + which * QUERIES * HS;
        float p[QUERIES / 8][4];            // Sᵀ = k qᵀ, then Pᵀ
        float ds[QUERIES / 8][4];           // dPᵀ = v dyᵀ, then dSᵀ
        multiply_transposed<HS, QUERIES>(p, k, warp * 16, q_tile);
        multiply_transposed<HS, QUERIES>(ds, v, warp * 16, dy_tile);
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int column = n * 8 + lane % 4 * 2 + i % 2;
                int at = which * QUERIES + column;
                int key = key_0 + warp * 16 + lane / 4 + i / 2 * 8;
                float power = p[n][i] * to_base_2 - lse_tiles[at];
                p[n][i] = sees(first + column, key, sizes.window) ? exp2f(power) : 0.0f;
                ds[n][i] = p[n][i] * (ds[n][i] - delta_tiles[at]);
            }
        }
        multiply_add<HS, QUERIES>(dv, p, dy_tile);
        multiply_add<HS, QUERIES>(dk, ds, q_tile);
        __syncthreads();
        which ^= 1;
    }
    floatX* to = dqkv + head_start(b, h, T, NH, HS, 3);
    int t = key_0 + warp * 16;
    auto chunk = [&](int r, int n) { return chunk_at<HS>(k, warp * 16 + r, n); };
    if (TURNS) { turn_back<HS>(dk, chunk, {t, b, h, 1}, rotary, sizes); }
    store_rows<HS>(to + C, 3 * C, t, T, dk, scale, scale);
    store_rows<HS>(to + 2 * C, 3 * C, t, T, dv, 1.0f, 1.0f);
}

// dq. One block: 64 queries of a head, 16 for each warp. It walks over the tiles of keys as in the
// forward pass. dq, and lse and delta of a lane's two rows, are in registers. TURNS: dq' is turned
// back before it is written. Grid (T/64, NH, B) x 128. 3 BT²C FLOP; bound by tensor cores.
template <int HS, bool TURNS> __global__ void __launch_bounds__(ATTENTION_THREADS)
attention_backward_queries_kernel(floatX* dqkv, const floatX* qkv, const floatX* dy,
                                  const float* lse, const float* delta, Rotary rotary,
                                  AttentionSizes sizes) {
    extern __shared__ float4 shared[];
    floatX* q = (floatX*)shared;            // one tile
    floatX* dy_tile = q + TILE * HS;        // one tile
    floatX* k = dy_tile + TILE * HS;        // two tiles
    floatX* v = k + 2 * TILE * HS;          // two tiles
    int T = sizes.T, NH = sizes.NH;
    int lane = threadIdx.x % WARP;
    int warp = threadIdx.x / WARP;
    int h = blockIdx.y;
    int b = blockIdx.z;
    int last = gridDim.x - 1 - blockIdx.x;
    int64_t C = (int64_t)NH * HS;
    int64_t row = ((int64_t)b * NH + h) * T;
    const floatX* from = qkv + head_start(b, h, T, NH, HS, 3);
    float dq[HS / 8][4] = {};
    float lse_of[2];
    float delta_of[2];
    float scale = rsqrtf((float)HS) * sizes.sharpness;
    float to_base_2 = scale * LOG2_E;
    int query = last * TILE + warp * 16 + lane / 4;
    int first = first_key_tile(last * TILE, sizes.window);
    for (int r = 0; r < 2; r++) {
        int t = query + 8 * r;
        lse_of[r] = t < T ? lse[row + t] : INFINITY;
        delta_of[r] = t < T ? delta[row + t] : 0.0f;
    }
    load_tile<HS, TILE>(q, from, 3 * C, last * TILE, T);
    load_tile<HS, TILE>(dy_tile, dy + head_start(b, h, T, NH, HS, 1), C, last * TILE, T);
    load_keys<HS>(k, v, from, C, first, T);
    for (int j = first; j <= last; j++) {
        floatX* k_tile = k + j % 2 * TILE * HS;
        floatX* v_tile = v + j % 2 * TILE * HS;
        if (j < last) {
            load_keys<HS>(k, v, from, C, j + 1, T);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
        float p[TILE / 8][4];               // S = q kᵀ
        float ds[TILE / 8][4];              // dP = dy vᵀ, then dS
        multiply_transposed<HS, TILE>(p, q, warp * 16, k_tile);
        multiply_transposed<HS, TILE>(ds, dy_tile, warp * 16, v_tile);
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int key = j * TILE + n * 8 + lane % 4 * 2 + i % 2;
                float power = p[n][i] * to_base_2 - lse_of[i / 2];
                bool seen = sees(query + i / 2 * 8, key, sizes.window);
                ds[n][i] = seen ? exp2f(power) * (ds[n][i] - delta_of[i / 2]) : 0.0f;
            }
        }
        multiply_add<HS, TILE>(dq, ds, k_tile);
        __syncthreads();
    }
    floatX* to = dqkv + head_start(b, h, T, NH, HS, 3);
    int t = last * TILE + warp * 16;
    auto chunk = [&](int r, int n) { return chunk_at<HS>(q, warp * 16 + r, n); };
    if (TURNS) { turn_back<HS>(dq, chunk, {t, b, h, 0}, rotary, sizes); }
    store_rows<HS>(to, 3 * C, t, T, dq, scale, scale);
}

// Allows blocks of a kernel more than 48 KB of dynamic shared memory, which CUDA otherwise refuses.
template <class Kernel> static void allow_shared_bytes(Kernel kernel, size_t bytes) {
    CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)bytes));
}

template <int HS> static void flash_forward(floatX* y, float* lse, const floatX* qkv,
                                            AttentionSizes sizes, cudaStream_t stream) {
    dim3 grid(ceil_div(sizes.T, TILE), sizes.NH, sizes.B);
    size_t bytes = sizeof(floatX) * 5 * TILE * HS;
    allow_shared_bytes(attention_forward_kernel<HS>, bytes);
    launch({"attention_forward", 4 * sizes.bytes(), 2 * sizes.flops()},
           {grid, ATTENTION_THREADS, stream, bytes}, attention_forward_kernel<HS>, y, lse, qkv,
           sizes);
}

template <int HS, bool TURNS>
static void flash_backward(floatX* dqkv, const floatX* qkv, const floatX* dy, const float* lse,
                           const float* delta, Rotary rotary, AttentionSizes sizes,
                           cudaStream_t stream) {
    dim3 grid(ceil_div(sizes.T, TILE), sizes.NH, sizes.B);
    size_t queries = QUERY_TILE<HS>;
    size_t bytes = sizeof(floatX) * HS * (2 * TILE + 4 * queries) + sizeof(float) * 4 * queries;
    allow_shared_bytes(attention_backward_keys_kernel<HS, TURNS>, bytes);
    launch({"attention_backward_keys", 6 * sizes.bytes(), 4 * sizes.flops()},
           {grid, ATTENTION_THREADS, stream, bytes}, attention_backward_keys_kernel<HS, TURNS>,
           dqkv, qkv, dy, lse, delta, rotary, sizes);
    bytes = sizeof(floatX) * 6 * TILE * HS;
    allow_shared_bytes(attention_backward_queries_kernel<HS, TURNS>, bytes);
    launch({"attention_backward_queries", 5 * sizes.bytes(), 3 * sizes.flops()},
           {grid, ATTENTION_THREADS, stream, bytes}, attention_backward_queries_kernel<HS, TURNS>,
           dqkv, qkv, dy, lse, delta, rotary, sizes);
}

// ---- §7, on Hopper: wgmma, TMA, mbarriers -------------------------------------------------------
//
// The same three kernels for GPUs of compute capability 9.0 (H100, H200). --attention mma does
// without them. They use what only these GPUs have:
//
//   wgmma     Four warps, a warpgroup, multiply together: C (64, N) += A (64, 16) B (16, N). B is
//             read from shared memory, once for all four. A is there, too, or in registers. The
//             products are asynchronous: threads start some, and wait for them later.
//   TMA       One thread starts the copy of a box of a matrix into shared memory. The hardware
//             computes all addresses, swizzles, and writes zeros for rows from T on.
//   mbarrier  A counter in shared memory of arrivals of threads, and of bytes that TMA copies. When
//             all have come, its phase ends and the next one begins. A phase has a parity, 0 or 1
//             in turn, and threads wait until the phase of some parity has ended.
//
// A block has 128 rows, queries or keys: 64 for each of two warpgroups, the consumers. One warp of
// a third warpgroup is the producer: it copies the tiles by which they multiply into a ring of two
// places, each with two mbarriers. Figure 4, from left to right in time:
//
//     producer    copy 0 │ copy 1 │ wait for empty[0] │ copy 2 │ wait for empty[1] │ copy 3 │ …
//     full[0]     ends when tile 0 is there, then when tile 2 is there, …
//     consumer    wait for full[0] │ multiply by 0 │ wait for full[1] │ multiply by 1 │ …
//     empty[0]    ends when all warps of the consumers have finished with tile 0, then with 2, …
//
// The warpgroups do not wait for one another, so one computes powers of 2 while the other one
// multiplies. Masks are applied only in tiles where a query does not see a key, and a warpgroup
// skips tiles where none of its queries sees any key.
//
// A Panel is 64 rows of 64 channels of a head, swizzled as in Figure 2 by TMA. A tile of 128 rows
// has two panels one below the other. A head of 128 channels has two such columns of panels, the
// first 64 channels first. C is spread over each warp as in Figure 1, with 16 rows a warp, and so
// is A if it is in registers.
//
// The layouts and rules are those of the PTX manual, "Asynchronous Warpgroup Level Matrix
// Instructions", and of CUTLASS's mma_traits_sm90_gmma.hpp.

const int PANEL = 64;                       // rows and channels of a Panel
const int BLOCK_ROWS = 2 * PANEL;
const int STAGES = 2;                       // places in the ring
const int CONSUMER_WARPS = 8;
const int HOPPER_THREADS = (CONSUMER_WARPS + 4) * WARP;

struct alignas(1024) Panel { floatX rows[PANEL][PANEL]; };
template <int HS, int ROWS> constexpr int PANELS = (HS / PANEL) * (ROWS / PANEL);      // of a tile

// Rows of the tiles that a block walks over, forward and backward: as many as the registers allow
template <int HS> constexpr int KEY_TILE = HS == 64 ? 64 : 128;
template <int HS> constexpr int BACKWARD_TILE = HS == 64 ? 128 : 64;

// Blocks of the forward kernel on a multiprocessor at a time. With small tiles there are two, which
// together keep the tensor cores busier than one.
template <int HS> constexpr int FORWARD_BLOCKS = HS * KEY_TILE<HS> == 64 * 64 ? 2 : 1;

// The 65536 registers of a multiprocessor are 168 a thread for one block, or 80 for two. The
// producer's warpgroup keeps 24, the fewest that are allowed, and the consumers take the others.
template <int BLOCKS> constexpr int CONSUMER_REGISTERS = BLOCKS == 1 ? 240 : 104;

struct Ring { uint64_t full[STAGES], empty[STAGES]; };      // mbarriers

// Device code for Hopper alone is compiled for sm_90a, not for sm_90. choose_attention asks the GPU
// which of the two it runs.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(CUEMU)
#define SM_90A
__device__ int compiled_for_sm_90a = 1;
#else
__device__ int compiled_for_sm_90a = 0;
#endif

#ifndef CUEMU
// Each has its twin of the same name in tests/cuda_emulator.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;"
                 :: "r"(shared_address(barrier)), "r"(count) : "memory");
}

// Makes new mbarriers known to TMA.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];"
                 :: "r"(shared_address(barrier)) : "memory");
}

// Arrives, and lets this phase also wait for so many bytes of copies.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;"
                 :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Waits until the phase of this parity has ended. Before the first phase, parity 1 has.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
    uint32_t ended = 0;
    while (ended == 0) {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p,[%1],%2; "
                     "selp.u32 %0,1,0,p;}"
                     : "=r"(ended) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    }
}

// Starts the copy of the box at (x, y, z) of a matrix. The mbarrier counts its bytes.
__device__ __forceinline__ void tma_copy(void* to, const CUtensorMap* matrix, int x, int y, int z,
                                         uint64_t* barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0],[%1,{%3,%4,%5}],[%2];"
                 :: "r"(shared_address(to)), "l"(matrix), "r"(shared_address(barrier)), "r"(x),
                    "r"(y), "r"(z) : "memory");
}

// The compiler may not move reads or writes of these registers past this point.
template <int N> __device__ __forceinline__ void pin(float (&c)[N][4]) {
    for (auto& part : c) {
        for (float& element : part) { asm volatile("" : "+f"(element) :: "memory"); }
    }
}

// Products that start after this may use registers which were written before it.
template <int N> __device__ __forceinline__ void wgmma_fence(float (&c)[N][4]) {
    pin(c);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Makes one group of all products started since the last call.
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for all groups. Only then may c be read, and what they read be overwritten.
template <int N> __device__ __forceinline__ void wgmma_wait(float (&c)[N][4]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    pin(c);
}

// Changes the number of registers that each thread of a warpgroup has. All of its warps must call
// it.
template <int N> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N));
}

template <int N> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N));
}

#define C4(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define C32(c, n) C4(c, n), C4(c, n + 1), C4(c, n + 2), C4(c, n + 3), \
                  C4(c, n + 4), C4(c, n + 5), C4(c, n + 6), C4(c, n + 7)
#define NAMES_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
                 "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_64 NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48," \
                 "%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// Starts c (64, N) = a (64, 16) b (16, N), or c += a b if `add`. Both are in shared memory, where
// rows of a and columns of b are contiguous ("K-major": 0, 0 at the end of the instruction).
template <int N>
__device__ __forceinline__ void wgmma_shared(float (&c)[N / 8][4], uint64_t a, uint64_t b,
                                             bool add) {
    static_assert(N == 64 || N == 128);
    if constexpr (N == 64) {
        asm volatile("{.reg .pred p; setp.ne.b32 p,%34,0; "
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                     "{" NAMES_32 "},%32,%33,p,1,1,0,0;}"
                     : C32(c, 0) : "l"(a), "l"(b), "r"((int)add));
    } else {
        asm volatile("{.reg .pred p; setp.ne.b32 p,%66,0; "
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                     "{" NAMES_64 "},%64,%65,p,1,1,0,0;}"
                     : C32(c, 0), C32(c, 8) : "l"(a), "l"(b), "r"((int)add));
    }
}

// Starts c (64, N) += a (64, 16) b (16, N). a is in registers. b is in shared memory, where its
// rows are contiguous ("MN-major": 1 at the end of the instruction).
template <int N>
__device__ __forceinline__ void wgmma_registers(float (&c)[N / 8][4], const uint32_t (&a)[4],
                                                uint64_t b) {
    static_assert(N == 64 || N == 128);
    if constexpr (N == 64) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                     "{" NAMES_32 "},{%32,%33,%34,%35},%36,1,1,1,1;"
                     : C32(c, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else {
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                     "{" NAMES_64 "},{%64,%65,%66,%67},%68,1,1,1,1;"
                     : C32(c, 0), C32(c, 8)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
}
#endif

// A shuffle tells the compiler that all lanes get the same number. So it computes addresses once
// for the warp.
__device__ int warp_number() { return __shfl_sync(~0u, threadIdx.x / WARP, 0); }

// How wgmma finds a matrix in panels: where it starts, how far it is to the next 64 channels and to
// the next 8 rows, all in units of 16 bytes, and 1 for the swizzle of 128 bytes. In a K-major
// matrix the 16 channels of a product are in one panel, so the first distance is not used.
__device__ uint64_t matrix_descriptor(const floatX* start, int panels_to_next_channels) {
    uint64_t address = shared_address(start) / 16;
    uint64_t next_channels = panels_to_next_channels * sizeof(Panel) / 16;
    uint64_t next_rows = 8 * PANEL * sizeof(floatX) / 16;
    return address | next_channels << 16 | next_rows << 32 | (uint64_t)1 << 62;
}

// Starts product (64, N) = a bᵀ for a warpgroup, where a is its 64 rows of a tile of BLOCK_ROWS,
// and b is a tile of N rows.
template <int HS, int N>
__device__ void start_multiply_transposed(float (&product)[N / 8][4], const Panel* a,
                                          const Panel* b) {
#pragma unroll
    for (int k = 0; k < HS; k += 16) {
        const Panel* left = a + k / PANEL * (BLOCK_ROWS / PANEL);
        const Panel* right = b + k / PANEL * (N / PANEL);
        wgmma_shared<N>(product, matrix_descriptor(&left->rows[0][k % PANEL], 0),
                        matrix_descriptor(&right->rows[0][k % PANEL], 0), k > 0);
    }
}

// Where chunk n of row r of a warpgroup's 64 rows lies in a tile of BLOCK_ROWS
__device__ const floatX* chunk_in_panels(const Panel* group, int r, int n) {
    const Panel* panel = group + n / 8 * (BLOCK_ROWS / PANEL);
    return &panel->rows[r][(n % 8 ^ r % 8) * 8];
}

// The left factor of start_multiply_add: a product rounded to bf16. See multiply_add.
template <int N>
__device__ void round_product(uint32_t (&left)[N / 2][4], const float (&product)[N][4]) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
        const float* near = product[k];
        const float* far = product[k + 1];
        left[k / 2][0] = pack_bf16(near[0], near[1]);
        left[k / 2][1] = pack_bf16(near[2], near[3]);
        left[k / 2][2] = pack_bf16(far[0], far[1]);
        left[k / 2][3] = pack_bf16(far[2], far[3]);
    }
}

// Starts sum (64, HS) += a b for a warpgroup, where a (64, K) is in registers and b is a tile of K
// rows.
template <int HS, int K>
__device__ void start_multiply_add(float (&sum)[HS / 8][4], const uint32_t (&a)[K / 16][4],
                                   const Panel* b) {
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        const floatX* right = b[k / PANEL].rows[k % PANEL];
        wgmma_registers<HS>(sum, a[k / 16], matrix_descriptor(right, K / PANEL));
    }
}

// One thread: starts to copy rows first … first + ROWS - 1 of row b of the batch into a tile.
// `channel` is where the head begins.
template <int HS, int ROWS>
__device__ void copy_tile(Panel* tile, const CUtensorMap* matrix, int channel, int first, int b,
                          uint64_t* barrier) {
    for (int c = 0; c < HS; c += PANEL) {
        for (int r = 0; r < ROWS; r += PANEL) {
            tma_copy(tile, matrix, channel + c, first + r, b, barrier);
            tile++;
        }
    }
}

// A place in the ring is full after `arrivals` and its bytes, and empty after all consumers' warps.
__device__ void init_ring(Ring* ring, uint64_t* rows_here, int arrivals) {
    if (threadIdx.x == 0) {
        mbarrier_init(rows_here, 1);
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(&ring->full[i], arrivals);
            mbarrier_init(&ring->empty[i], CONSUMER_WARPS);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
}

// The n-th tile of a block lies in place n % STAGES of the ring, as the n / STAGES-th one there.
__device__ void wait_until_empty(Ring* ring, int n) {
    mbarrier_wait(&ring->empty[n % STAGES], n / STAGES % 2 ^ 1);
}

__device__ void wait_until_full(Ring* ring, int n) {
    mbarrier_wait(&ring->full[n % STAGES], n / STAGES % 2);
}

__device__ void leave_place(Ring* ring, int n) {
    __syncwarp();
    if (threadIdx.x % WARP == 0) { mbarrier_arrive(&ring->empty[n % STAGES]); }
}

// The producer of the kernels that walk over keys: copies tiles first … last of k and v.
template <int HS, int KEYS>
__device__ void copy_keys(Panel* k, Panel* v, const CUtensorMap* qkv, Ring* ring, int C, int h,
                          int b, int first, int last) {
    for (int n = 0; n <= last - first; n++) {
        int tile = n % STAGES * PANELS<HS, KEYS>;
        int key = (first + n) * KEYS;
        uint64_t* full = &ring->full[n % STAGES];
        wait_until_empty(ring, n);
        mbarrier_arrive_expect(full, 2 * PANELS<HS, KEYS> * sizeof(Panel));
        copy_tile<HS, KEYS>(k + tile, qkv, C + h * HS, key, b, full);
        copy_tile<HS, KEYS>(v + tile, qkv, 2 * C + h * HS, key, b, full);
    }
}

// True if one of n_queries, from `query` on, sees one of n_keys, from `key` on
__device__ bool sees_any(int query, int n_queries, int key, int n_keys, int window) {
    return key < query + n_queries && query - (key + n_keys - 1) <= window;
}

// True if each of them sees each of the keys
__device__ bool sees_all(int query, int n_queries, int key, int n_keys, int window) {
    return key + n_keys - 1 <= query && query + n_queries - 1 - key <= window;
}

// y and lse. One block: 128 queries of a head, 64 for each warpgroup of consumers, which has their
// scores and sums in its registers. It walks over the tiles of keys that its queries see. Grid
// (T/128, NH, B) x 384, blocks with the most keys first. Reads k and v T/128 times, mostly from L2.
// 2 BT²C FLOP; bound by tensor cores.
template <int HS> __global__ void __launch_bounds__(HOPPER_THREADS, FORWARD_BLOCKS<HS>)
hopper_attention_forward_kernel(floatX* y, float* lse, const __grid_constant__ CUtensorMap qkv,
                                AttentionSizes sizes) {
#ifdef SM_90A
    constexpr int KEYS = KEY_TILE<HS>;
    extern __shared__ Panel panels[];
    __shared__ Ring ring;
    __shared__ uint64_t q_here;
    Panel* q = panels;                              // one tile
    Panel* k = q + PANELS<HS, BLOCK_ROWS>;          // STAGES tiles
    Panel* v = k + STAGES * PANELS<HS, KEYS>;       // STAGES tiles
    int T = sizes.T, NH = sizes.NH;
    int lane = threadIdx.x % WARP;
    int warp = warp_number();
    int h = blockIdx.y;
    int b = blockIdx.z;
    int C = NH * HS;
    int block_query = (gridDim.x - 1 - blockIdx.x) * BLOCK_ROWS;
    int first = max(0, block_query - sizes.window) / KEYS;          // tiles of keys
    int last = min(T - 1, block_query + BLOCK_ROWS - 1) / KEYS;
    init_ring(&ring, &q_here, 1);

    if (warp >= CONSUMER_WARPS) {                   // the producer
        give_registers<24>();
        if (threadIdx.x != CONSUMER_WARPS * WARP) { return; }
        mbarrier_arrive_expect(&q_here, PANELS<HS, BLOCK_ROWS> * sizeof(Panel));
        copy_tile<HS, BLOCK_ROWS>(q, &qkv, h * HS, block_query, b, &q_here);
        copy_keys<HS, KEYS>(k, v, &qkv, &ring, C, h, b, first, last);
        return;
    }
    take_registers<CONSUMER_REGISTERS<FORWARD_BLOCKS<HS>>>();
    int group = warp / 4;                           // the warpgroup
    int group_query = block_query + group * PANEL;
    int query = group_query + warp % 4 * 16 + lane / 4;     // the first of this lane's two
    float sum[HS / 8][4] = {};                      // Σ 2^(score - highest) v
    OnlineSoftmax<HS> softmax;
    float to_base_2 = rsqrtf((float)HS) * LOG2_E * sizes.sharpness;
    mbarrier_wait(&q_here, 0);
    for (int n = 0; n <= last - first; n++) {
        Panel* k_tile = k + n % STAGES * PANELS<HS, KEYS>;
        Panel* v_tile = v + n % STAGES * PANELS<HS, KEYS>;
        int key = (first + n) * KEYS;
        wait_until_full(&ring, n);
        if (sees_any(group_query, PANEL, key, KEYS, sizes.window)) {
            float p[KEYS / 8][4];
            uint32_t rounded[KEYS / 16][4];
            wgmma_fence(p);
            start_multiply_transposed<HS, KEYS>(p, q + group, k_tile);
            wgmma_commit();
            wgmma_wait(p);
            if (!sees_all(group_query, PANEL, key, KEYS, sizes.window)) {
                hide_unseen<false>(p, query, key, sizes.window);
            }
            softmax.add_tile(p, sum, to_base_2);
            round_product(rounded, p);
            wgmma_fence(sum);
            start_multiply_add<HS, KEYS>(sum, rounded, v_tile);
            wgmma_commit();
            wgmma_wait(sum);
        }
        leave_place(&ring, n);
    }
    for (int r = 0; r < 2; r++) {
        softmax.total[r] = quad_sum(softmax.total[r]);
        int t = query + 8 * r;
        if (lane % 4 == 0 && t < T) {
            lse[((int64_t)b * NH + h) * T + t] = softmax.highest[r] + log2f(softmax.total[r]);
        }
    }
    store_rows<HS>(y + head_start(b, h, T, NH, HS, 1), C, group_query + warp % 4 * 16, T, sum,
                   1.0f / softmax.total[0], 1.0f / softmax.total[1]);
#endif
}

// dk and dv. One block: 128 keys of a head, 64 for each warpgroup of consumers, which has their dk
// and dv in its registers. It walks over the tiles of queries that see its keys; all lanes of the
// producer also copy their lse and delta. S, P, dP and dS are transposed, and TURNS turns dk' back,
// as in attention_backward_keys_kernel. Grid (T/128, NH, B) x 384. Reads q and dy T/128 times,
// mostly from L2. 4 BT²C FLOP; bound by tensor cores.
template <int HS, bool TURNS> __global__ void __launch_bounds__(HOPPER_THREADS, 1)
hopper_attention_backward_keys_kernel(floatX* dqkv, const float* lse, const float* delta,
                                      const __grid_constant__ CUtensorMap qkv,
                                      const __grid_constant__ CUtensorMap dy, Rotary rotary,
                                      AttentionSizes sizes) {
#ifdef SM_90A
    constexpr int QUERIES = BACKWARD_TILE<HS>;
    extern __shared__ Panel panels[];
    __shared__ Ring ring;
    __shared__ uint64_t keys_here;
    __shared__ float lse_tiles[STAGES][QUERIES];
    __shared__ float delta_tiles[STAGES][QUERIES];
    Panel* k = panels;                              // one tile
    Panel* v = k + PANELS<HS, BLOCK_ROWS>;          // one tile
    Panel* q = v + PANELS<HS, BLOCK_ROWS>;          // STAGES tiles
    Panel* dy_tiles = q + STAGES * PANELS<HS, QUERIES>;     // STAGES tiles
    int T = sizes.T, NH = sizes.NH;
    int lane = threadIdx.x % WARP;
    int warp = warp_number();
    int h = blockIdx.y;
    int b = blockIdx.z;
    int C = NH * HS;
    int block_key = blockIdx.x * BLOCK_ROWS;
    int first = block_key / QUERIES;                // tiles of queries
    int last = (min(T, block_key + BLOCK_ROWS + sizes.window) - 1) / QUERIES;
    init_ring(&ring, &keys_here, WARP);

    if (warp >= CONSUMER_WARPS) {                   // the producer
        give_registers<24>();
        if (warp != CONSUMER_WARPS) { return; }
        int64_t row = ((int64_t)b * NH + h) * T;
        if (lane == 0) {
            mbarrier_arrive_expect(&keys_here, 2 * PANELS<HS, BLOCK_ROWS> * sizeof(Panel));
            copy_tile<HS, BLOCK_ROWS>(k, &qkv, C + h * HS, block_key, b, &keys_here);
            copy_tile<HS, BLOCK_ROWS>(v, &qkv, 2 * C + h * HS, block_key, b, &keys_here);
        }
        for (int n = 0; n <= last - first; n++) {
            int place = n % STAGES;
            int query = (first + n) * QUERIES;
            uint64_t* full = &ring.full[place];
            wait_until_empty(&ring, n);
            for (int i = lane; i < QUERIES; i += WARP) {    // from T on, P becomes 2^-inf = 0
                int t = query + i;
                lse_tiles[place][i] = t < T ? lse[row + t] : INFINITY;
                delta_tiles[place][i] = t < T ? delta[row + t] : 0.0f;
            }
            if (lane != 0) {
                mbarrier_arrive(full);
                continue;
            }
            mbarrier_arrive_expect(full, 2 * PANELS<HS, QUERIES> * sizeof(Panel));
            copy_tile<HS, QUERIES>(q + place * PANELS<HS, QUERIES>, &qkv, h * HS, query, b, full);
            copy_tile<HS, QUERIES>(dy_tiles + place * PANELS<HS, QUERIES>, &dy, h * HS, query, b,
                                   full);
        }
        return;
    }
    take_registers<CONSUMER_REGISTERS<1>>();
    int group = warp / 4;                           // the warpgroup
    int group_key = block_key + group * PANEL;
    int key = group_key + warp % 4 * 16 + lane / 4;         // the first of this lane's two
    float dk[HS / 8][4] = {};
    float dv[HS / 8][4] = {};
    float scale = rsqrtf((float)HS) * sizes.sharpness;
    float to_base_2 = scale * LOG2_E;
    mbarrier_wait(&keys_here, 0);
    for (int n = 0; n <= last - first; n++) {
        int place = n % STAGES;
        Panel* q_tile = q + place * PANELS<HS, QUERIES>;
        Panel* dy_tile = dy_tiles + place * PANELS<HS, QUERIES>;
        int query = (first + n) * QUERIES;
        wait_until_full(&ring, n);
        if (sees_any(query, QUERIES, group_key, PANEL, sizes.window)) {
            float p[QUERIES / 8][4];                // Sᵀ = k qᵀ, then Pᵀ
            float ds[QUERIES / 8][4];               // dPᵀ = v dyᵀ, then dSᵀ
            uint32_t p_rounded[QUERIES / 16][4];
            uint32_t ds_rounded[QUERIES / 16][4];
            wgmma_fence(p);
            wgmma_fence(ds);
            start_multiply_transposed<HS, QUERIES>(p, k + group, q_tile);
            start_multiply_transposed<HS, QUERIES>(ds, v + group, dy_tile);
            wgmma_commit();
            wgmma_wait(p);
            wgmma_wait(ds);
            if (!sees_all(query, QUERIES, group_key, PANEL, sizes.window)) {
                hide_unseen<true>(p, key, query, sizes.window);
            }
#pragma unroll
            for (int m = 0; m < QUERIES / 8; m++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int column = m * 8 + lane % 4 * 2 + i % 2;
                    p[m][i] = exp2f(p[m][i] * to_base_2 - lse_tiles[place][column]);
                    ds[m][i] = p[m][i] * (ds[m][i] - delta_tiles[place][column]);
                }
            }
            round_product(p_rounded, p);
            round_product(ds_rounded, ds);
            wgmma_fence(dv);
            wgmma_fence(dk);
            start_multiply_add<HS, QUERIES>(dv, p_rounded, dy_tile);
            start_multiply_add<HS, QUERIES>(dk, ds_rounded, q_tile);
            wgmma_commit();
            wgmma_wait(dv);
            wgmma_wait(dk);
        }
        leave_place(&ring, n);
    }
    floatX* to = dqkv + head_start(b, h, T, NH, HS, 3);
    int warp_row = warp % 4 * 16;
    int warp_key = group_key + warp_row;
    auto chunk = [&](int r, int n) { return chunk_in_panels(k + group, warp_row + r, n); };
    if (TURNS) { turn_back<HS>(dk, chunk, {warp_key, b, h, 1}, rotary, sizes); }
    store_rows<HS>(to + C, 3 * C, warp_key, T, dk, scale, scale);
    store_rows<HS>(to + 2 * C, 3 * C, warp_key, T, dv, 1.0f, 1.0f);
#endif
}

// dq. One block: 128 queries of a head, 64 for each warpgroup of consumers, which has their dq, lse
// and delta in its registers. It walks over the tiles of keys as in the forward pass. TURNS: dq' is
// turned back before it is written. Grid (T/128, NH, B) x 384. Reads k and v T/128 times, mostly
// from L2. 3 BT²C FLOP; bound by tensor cores.
template <int HS, bool TURNS> __global__ void __launch_bounds__(HOPPER_THREADS, 1)
hopper_attention_backward_queries_kernel(floatX* dqkv, const float* lse, const float* delta,
                                         const __grid_constant__ CUtensorMap qkv,
                                         const __grid_constant__ CUtensorMap dy, Rotary rotary,
                                         AttentionSizes sizes) {
#ifdef SM_90A
    constexpr int KEYS = BACKWARD_TILE<HS>;
    extern __shared__ Panel panels[];
    __shared__ Ring ring;
    __shared__ uint64_t queries_here;
    Panel* q = panels;                              // one tile
    Panel* dy_tile = q + PANELS<HS, BLOCK_ROWS>;    // one tile
    Panel* k = dy_tile + PANELS<HS, BLOCK_ROWS>;    // STAGES tiles
    Panel* v = k + STAGES * PANELS<HS, KEYS>;       // STAGES tiles
    int T = sizes.T, NH = sizes.NH;
    int lane = threadIdx.x % WARP;
    int warp = warp_number();
    int h = blockIdx.y;
    int b = blockIdx.z;
    int C = NH * HS;
    int block_query = (gridDim.x - 1 - blockIdx.x) * BLOCK_ROWS;
    int first = max(0, block_query - sizes.window) / KEYS;          // tiles of keys
    int last = min(T - 1, block_query + BLOCK_ROWS - 1) / KEYS;
    init_ring(&ring, &queries_here, 1);

    if (warp >= CONSUMER_WARPS) {                   // the producer
        give_registers<24>();
        if (threadIdx.x != CONSUMER_WARPS * WARP) { return; }
        mbarrier_arrive_expect(&queries_here, 2 * PANELS<HS, BLOCK_ROWS> * sizeof(Panel));
        copy_tile<HS, BLOCK_ROWS>(q, &qkv, h * HS, block_query, b, &queries_here);
        copy_tile<HS, BLOCK_ROWS>(dy_tile, &dy, h * HS, block_query, b, &queries_here);
        copy_keys<HS, KEYS>(k, v, &qkv, &ring, C, h, b, first, last);
        return;
    }
    take_registers<CONSUMER_REGISTERS<1>>();
    int group = warp / 4;                           // the warpgroup
    int group_query = block_query + group * PANEL;
    int query = group_query + warp % 4 * 16 + lane / 4;     // the first of this lane's two
    int64_t row = ((int64_t)b * NH + h) * T;
    float dq[HS / 8][4] = {};
    float lse_of[2];
    float delta_of[2];
    float scale = rsqrtf((float)HS) * sizes.sharpness;
    float to_base_2 = scale * LOG2_E;
    for (int r = 0; r < 2; r++) {
        int t = query + 8 * r;
        lse_of[r] = t < T ? lse[row + t] : INFINITY;
        delta_of[r] = t < T ? delta[row + t] : 0.0f;
    }
    mbarrier_wait(&queries_here, 0);
    for (int n = 0; n <= last - first; n++) {
        Panel* k_tile = k + n % STAGES * PANELS<HS, KEYS>;
        Panel* v_tile = v + n % STAGES * PANELS<HS, KEYS>;
        int key = (first + n) * KEYS;
        wait_until_full(&ring, n);
        if (sees_any(group_query, PANEL, key, KEYS, sizes.window)) {
            float p[KEYS / 8][4];                   // S = q kᵀ
            float ds[KEYS / 8][4];                  // dP = dy vᵀ, then dS
            uint32_t rounded[KEYS / 16][4];
            wgmma_fence(p);
            wgmma_fence(ds);
            start_multiply_transposed<HS, KEYS>(p, q + group, k_tile);
            start_multiply_transposed<HS, KEYS>(ds, dy_tile + group, v_tile);
            wgmma_commit();
            wgmma_wait(p);
            wgmma_wait(ds);
            if (!sees_all(group_query, PANEL, key, KEYS, sizes.window)) {
                hide_unseen<false>(p, query, key, sizes.window);
            }
#pragma unroll
            for (int m = 0; m < KEYS / 8; m++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float power = p[m][i] * to_base_2 - lse_of[i / 2];
                    ds[m][i] = exp2f(power) * (ds[m][i] - delta_of[i / 2]);
                }
            }
            round_product(rounded, ds);
            wgmma_fence(dq);
            start_multiply_add<HS, KEYS>(dq, rounded, k_tile);
            wgmma_commit();
            wgmma_wait(dq);
        }
        leave_place(&ring, n);
    }
    floatX* to = dqkv + head_start(b, h, T, NH, HS, 3);
    int warp_row = warp % 4 * 16;
    auto chunk = [&](int r, int n) { return chunk_in_panels(q + group, warp_row + r, n); };
    if (TURNS) { turn_back<HS>(dq, chunk, {group_query + warp_row, b, h, 0}, rotary, sizes); }
    store_rows<HS>(to, 3 * C, group_query + warp_row, T, dq, scale, scale);
#endif
}

static bool use_wgmma;          // choose_attention sets it (§19)

// A matrix (B, T, channels), from which TMA copies boxes of 64 rows of 64 channels
static CUtensorMap tensor_map(const floatX* matrix, AttentionSizes sizes, int channels) {
    static decltype(cuTensorMapEncodeTiled)* encode;        // of the driver; -lcuda is not needed
    if (encode == NULL) {
        cudaDriverEntryPointQueryResult found;
        CHECK_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void**)&encode,
                                                    12000, cudaEnableDefault, &found));
        if (found != cudaDriverEntryPointSuccess) {
            die("the driver cannot describe matrices to TMA; update it, or use --attention mma");
        }
    }
    CUtensorMap map;
    cuuint64_t lengths[3] = {(cuuint64_t)channels, (cuuint64_t)sizes.T, (cuuint64_t)sizes.B};
    cuuint64_t row_bytes = channels * sizeof(floatX);
    cuuint64_t strides[2] = {row_bytes, row_bytes * sizes.T};       // of t and of b
    cuuint32_t box[3] = {PANEL, PANEL, 1};
    cuuint32_t steps[3] = {1, 1, 1};
    CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void*)matrix, lengths,
                             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        die("the driver returned error %d for a tensor map of attention; continue with --resume "
            "--attention mma", (int)result);
    }
    return map;
}

template <int HS> static void hopper_forward(floatX* y, float* lse, const floatX* qkv,
                                             AttentionSizes sizes, cudaStream_t stream) {
    dim3 grid(ceil_div(sizes.T, BLOCK_ROWS), sizes.NH, sizes.B);
    size_t n_panels = PANELS<HS, BLOCK_ROWS> + 2 * STAGES * PANELS<HS, KEY_TILE<HS>>;
    size_t bytes = n_panels * sizeof(Panel);
    allow_shared_bytes(hopper_attention_forward_kernel<HS>, bytes);
    launch({"hopper_attention_forward", 4 * sizes.bytes(), 2 * sizes.flops()},
           {grid, HOPPER_THREADS, stream, bytes}, hopper_attention_forward_kernel<HS>, y, lse,
           tensor_map(qkv, sizes, 3 * sizes.NH * HS), sizes);
}

template <int HS, bool TURNS>
static void hopper_backward(floatX* dqkv, const floatX* qkv, const floatX* dy, const float* lse,
                            const float* delta, Rotary rotary, AttentionSizes sizes,
                            cudaStream_t stream) {
    dim3 grid(ceil_div(sizes.T, BLOCK_ROWS), sizes.NH, sizes.B);
    size_t n_panels = 2 * PANELS<HS, BLOCK_ROWS> + 2 * STAGES * PANELS<HS, BACKWARD_TILE<HS>>;
    size_t bytes = n_panels * sizeof(Panel);
    CUtensorMap qkv_map = tensor_map(qkv, sizes, 3 * sizes.NH * HS);
    CUtensorMap dy_map = tensor_map(dy, sizes, sizes.NH * HS);
    allow_shared_bytes(hopper_attention_backward_keys_kernel<HS, TURNS>, bytes);
    launch({"hopper_attention_backward_keys", 6 * sizes.bytes(), 4 * sizes.flops()},
           {grid, HOPPER_THREADS, stream, bytes}, hopper_attention_backward_keys_kernel<HS, TURNS>,
           dqkv, lse, delta, qkv_map, dy_map, rotary, sizes);
    allow_shared_bytes(hopper_attention_backward_queries_kernel<HS, TURNS>, bytes);
    launch({"hopper_attention_backward_queries", 5 * sizes.bytes(), 3 * sizes.flops()},
           {grid, HOPPER_THREADS, stream, bytes},
           hopper_attention_backward_queries_kernel<HS, TURNS>, dqkv, lse, delta, qkv_map, dy_map,
           rotary, sizes);
}

template <int HS, bool TURNS>
static void fast_backward(floatX* dqkv, const floatX* qkv, const floatX* dy, const float* lse,
                          const float* delta, Rotary rotary, AttentionSizes sizes,
                          cudaStream_t stream) {
    auto* backward = use_wgmma ? hopper_backward<HS, TURNS> : flash_backward<HS, TURNS>;
    backward(dqkv, qkv, dy, lse, delta, rotary, sizes, stream);
}

#endif

// Which heads have fast kernels
static bool is_fast(AttentionSizes sizes) { return BF16 && (sizes.HS == 64 || sizes.HS == 128); }

static void attention_forward(floatX* y, float* lse, const floatX* qkv, AttentionSizes sizes,
                              cudaStream_t stream) {
#ifndef FP32
    if (use_wgmma && sizes.HS == 64) { return hopper_forward<64>(y, lse, qkv, sizes, stream); }
    if (use_wgmma && sizes.HS == 128) { return hopper_forward<128>(y, lse, qkv, sizes, stream); }
    if (sizes.HS == 64) { return flash_forward<64>(y, lse, qkv, sizes, stream); }
    if (sizes.HS == 128) { return flash_forward<128>(y, lse, qkv, sizes, stream); }
#endif
    Grid grid = {ceil_div(sizes.B * sizes.NH * sizes.T, 4), 4 * WARP, stream};
    launch({"plain_attention_forward", 4 * sizes.bytes(), 2 * sizes.flops()}, grid,
           plain_attention_forward_kernel, y, lse, qkv, sizes);
}

// Writes dqkv. delta (B, NH, T) is workspace. The fast kernels also turn dN's dq and dk back.
static void attention_backward(floatX* dqkv, float* delta, const floatX* dy, const floatX* y,
                               const float* lse, const floatX* qkv, Rotary rotary,
                               AttentionSizes sizes, cudaStream_t stream) {
    Grid grid = {ceil_div(sizes.B * sizes.NH * sizes.T, 4), 4 * WARP, stream};
    launch({"attention_delta", 2 * sizes.bytes()}, grid, attention_delta_kernel, delta, y, dy,
           sizes);
#ifndef FP32
    if (is_fast(sizes)) {
        bool turns = rotary.rstd != NULL;
        auto* fast = turns ? fast_backward<64, true> : fast_backward<64, false>;
        if (sizes.HS == 128) {
            fast = turns ? fast_backward<128, true> : fast_backward<128, false>;
        }
        return fast(dqkv, qkv, dy, lse, delta, rotary, sizes, stream);
    }
#endif
    launch({"plain_attention_backward_queries", 5 * sizes.bytes(), 3 * sizes.flops()}, grid,
           plain_attention_backward_kernel<false>, dqkv, qkv, dy, lse, delta, sizes);
    launch({"plain_attention_backward_keys", 6 * sizes.bytes(), 4 * sizes.flops()}, grid,
           plain_attention_backward_kernel<true>, dqkv, qkv, dy, lse, delta, sizes);
}

// dN rotates q and k by angles that grow with the position t, and then normalises each to a root
// mean square of 1. In every second layer it adds to v an embedding of the token, E[token], times a
// gate g for each head.
//
//   r1 = q1 cos + q2 sin    r2 = q2 cos - q1 sin    rstd = 1 / sqrt(Σ r² / HS + 1.19e-7)
//   q' = r rstd
//   v' = v + g E[token]    g = 3 σ(z)    z = Σ_j n[j] Wg[h, j], j < 12
//   dr = (dq' - q' Σ (dq' q') / HS) rstd    dq1 = dr1 cos - dr2 sin    dq2 = dr2 cos + dr1 sin
//   dv = dv'    dE[token] += g dv'    dz = g (1 - g / 3) Σ (dv' E[token])
//   dWg[h, j] += Σ_tokens dz n[j]    dn[j] += Σ_h dz Wg[h, j]
//
// q1 and q2 are channels i and i + HS/2 of a head, and their angle is t 100000^(-2i/HS) radians. k
// is treated like q. n (BT, C) is the input of the attention; the gate reads its first 12 channels.

const int GATE_INPUTS = 12;
const int GATE_PARTIALS = 256;

struct ValueEmbed {
    const floatX* table;                // E (Vp, C); NULL: this layer has none
    const floatX* gate_weight;          // Wg (NH, 12)
    const floatX* n;                    // (BT, C)
    const int* tokens;                  // (BT)
    float* gate;                        // (BT, NH)
};

// The q, k or v of one token and head, of which a thread works on a part. Only parts `first_part`
// and later are worked on, `parts` of them. HS/2/PACK neighbouring threads share such a vector.
// Each has the Pack at channel c and the Pack HS/2 channels later, since these two are rotated
// together.
//
// Indices are divided as 32-bit numbers, because the GPU has no instruction that divides, and its
// code for 64 bits is longer. 2³² threads would need a qkv of 137 GB.
struct HeadVector {
    int64_t bt;
    int t;
    int part;                           // 0 q, 1 k, 2 v
    int h, c;
    int lanes;                          // threads of a vector, a power of two up to 32
    bool exists;
    __device__ HeadVector(AttentionSizes sizes, int parts, int first_part = 0) {
        lanes = sizes.HS / 2 / PACK;
        unsigned thread = thread_in_grid();
        unsigned vector = thread / lanes;           // (BT, parts, NH)
        exists = vector < (unsigned)sizes.B * sizes.T * parts * sizes.NH;
        if (!exists) { vector = 0; }    // the thread still has to take part in shuffles
        unsigned row = vector / sizes.NH;           // (BT, parts)
        unsigned token = row / parts;
        bt = token;
        t = token % sizes.T;
        part = first_part + row % parts;
        h = vector % sizes.NH;
        c = thread % lanes * PACK;
    }
    __device__ int64_t in_qkv(AttentionSizes sizes) const {
        return ((bt * 3 + part) * sizes.NH + h) * sizes.HS + c;
    }
    __device__ float sum(float value) const {       // over the vector's threads
        for (int offset = lanes / 2; offset > 0; offset /= 2) {
            value += __shfl_xor_sync(~0u, value, offset);
        }
        return value;
    }
};

// HS/2/PACK threads: the q or k of one token and head, in place; with E, also the v. Grid
// BT*NH*2*lanes/256 x 256, or with E 3 instead of 2. Moves 4 BTC, or 7 BTC with E; bound by memory.
__global__ void rotary_forward_kernel(floatX* qkv, Rotary rotary, ValueEmbed embed,
                                      AttentionSizes sizes) {
    HeadVector at(sizes, embed.table != NULL ? 3 : 2);
    int NH = sizes.NH, HS = sizes.HS, half = HS / 2, C = NH * HS;
    floatX* to = qkv + at.in_qkv(sizes);
    Pack low = load(to);
    Pack high = load(to + half);
    float r1[PACK];
    float r2[PACK];
    float square_sum = 0.0f;
    if (at.part < 2) {
        const float* cosine = rotary.cosines + at.t * half + at.c;
        const float* sine = rotary.sines + at.t * half + at.c;
        for (int i = 0; i < PACK; i++) {
            r1[i] = low[i] * cosine[i] + high[i] * sine[i];
            r2[i] = high[i] * cosine[i] - low[i] * sine[i];
            square_sum += r1[i] * r1[i] + r2[i] * r2[i];
        }
    } else {
        float z = 0.0f;
        for (int j = 0; j < GATE_INPUTS; j++) {
            z += (float)embed.n[at.bt * C + j] * (float)embed.gate_weight[at.h * GATE_INPUTS + j];
        }
        float gate = 3.0f / (1.0f + expf(-z));
        const floatX* e = embed.table + (int64_t)embed.tokens[at.bt] * C + at.h * HS + at.c;
        Pack e_low = load(e);
        Pack e_high = load(e + half);
        for (int i = 0; i < PACK; i++) {
            r1[i] = low[i] + gate * e_low[i];
            r2[i] = high[i] + gate * e_high[i];
        }
        if (at.c == 0) { embed.gate[at.bt * NH + at.h] = gate; }
    }
    float rstd = rsqrtf(at.sum(square_sum) / HS + RMS_EPSILON);     // a shuffle of all lanes
    if (!at.exists) { return; }
    if (at.part == 2) {
        rstd = 1.0f;
    } else if (at.c == 0) {
        rotary.rstd[(at.bt * 2 + at.part) * NH + at.h] = rstd;
    }
    for (int i = 0; i < PACK; i++) {
        low.set(i, r1[i] * rstd);
        high.set(i, r2[i] * rstd);
    }
    store(to, low);
    store(to + half, high);
}

// HS/2/PACK threads: the dq' or dk' of one token and head, in place, where plain kernels wrote it.
// Grid BT*NH*2*lanes/256 x 256. Moves 6 BTC; bound by memory.
__global__ void rotary_backward_kernel(floatX* dqkv, const floatX* qkv, Rotary rotary,
                                       AttentionSizes sizes) {
    HeadVector at(sizes, 2);
    int NH = sizes.NH, HS = sizes.HS, half = HS / 2;
    floatX* to = dqkv + at.in_qkv(sizes);
    const floatX* turned = qkv + at.in_qkv(sizes);
    Pack low = load(to);
    Pack high = load(to + half);
    Pack t_low = load(turned);
    Pack t_high = load(turned + half);
    float product = 0.0f;
    for (int i = 0; i < PACK; i++) { product += low[i] * t_low[i] + high[i] * t_high[i]; }
    float mean = at.sum(product) / HS;
    if (!at.exists) { return; }
    const float* cosine = rotary.cosines + at.t * half + at.c;
    const float* sine = rotary.sines + at.t * half + at.c;
    float rstd = rotary.rstd[(at.bt * 2 + at.part) * NH + at.h];
    for (int i = 0; i < PACK; i++) {
        float dr1 = (low[i] - t_low[i] * mean) * rstd;
        float dr2 = (high[i] - t_high[i] * mean) * rstd;
        low.set(i, dr1 * cosine[i] - dr2 * sine[i]);
        high.set(i, dr2 * cosine[i] + dr1 * sine[i]);
    }
    store(to, low);
    store(to + half, high);
}

// HS/2/PACK threads: the v of one token and head. dqkv stays as it is, because dv = dv'. dembed
// (BT, C) = g dv', which is added to dE later, and dz (BT, NH) are written. Grid
// BT*NH*lanes/256 x 256. Moves 3 BTC; bound by memory.
__global__ void value_embed_backward_kernel(floatX* dembed, float* dz, const floatX* dqkv,
                                            ValueEmbed embed, AttentionSizes sizes) {
    HeadVector at(sizes, 1, 2);
    int NH = sizes.NH, HS = sizes.HS, half = HS / 2, C = NH * HS;
    const floatX* dv = dqkv + at.in_qkv(sizes);
    const floatX* e = embed.table + (int64_t)embed.tokens[at.bt] * C + at.h * HS + at.c;
    Pack low = load(dv);
    Pack high = load(dv + half);
    Pack e_low = load(e);
    Pack e_high = load(e + half);
    float product = 0.0f;
    for (int i = 0; i < PACK; i++) { product += low[i] * e_low[i] + high[i] * e_high[i]; }
    product = at.sum(product);
    if (!at.exists) { return; }
    float gate = embed.gate[at.bt * NH + at.h];
    for (int i = 0; i < PACK; i++) {
        low.set(i, gate * low[i]);
        high.set(i, gate * high[i]);
    }
    floatX* to = dembed + at.bt * C + at.h * HS + at.c;
    store(to, low);
    store(to + half, high);
    if (at.c == 0) { dz[at.bt * NH + at.h] = product * gate * (1.0f - gate / 3.0f); }
}

// One thread: one weight of the gates, summed over every 256th token; add_partials adds up the 256
// sums. Grid (GATE_PARTIALS, NH*12/128) x 128. Reads 12 of the C channels of each token; bound by
// memory.
__global__ void gate_backward_weight_kernel(float* partials, const float* dz, const floatX* n,
                                            int BT, int NH, int C) {
    int i = blockIdx.y * blockDim.x + threadIdx.x;
    int h = i / GATE_INPUTS;
    int j = i % GATE_INPUTS;
    if (h >= NH) { return; }
    float sum = 0.0f;
    for (int64_t bt = blockIdx.x; bt < BT; bt += gridDim.x) {
        sum += dz[bt * NH + h] * (float)n[bt * C + j];
    }
    partials[blockIdx.x * NH * GATE_INPUTS + i] = sum;
}

// One thread: dn of one of the 12 channels of a token that the gates read, summed over all heads.
// Grid BT*12/256 x 256. Bound by memory.
__global__ void gate_backward_input_kernel(floatX* dn, const float* dz, const floatX* gate_weight,
                                           int BT, int NH, int C) {
    int64_t i = thread_in_grid();
    int64_t bt = i / GATE_INPUTS;
    int j = i % GATE_INPUTS;
    if (bt >= BT) { return; }
    float sum = (float)dn[bt * C + j];
    for (int h = 0; h < NH; h++) {
        sum += dz[bt * NH + h] * (float)gate_weight[h * GATE_INPUTS + j];
    }
    dn[bt * C + j] = (floatX)sum;
}

// The threads of a HeadVector
static Grid head_vectors(AttentionSizes sizes, int parts, cudaStream_t stream) {
    int64_t vectors = (int64_t)sizes.B * sizes.T * sizes.NH * parts;
    return one_thread_each(vectors * (sizes.HS / 2 / PACK), stream);
}

static void rotary_forward(floatX* qkv, Rotary rotary, ValueEmbed embed, AttentionSizes sizes,
                           cudaStream_t stream) {
    double moved = embed.table != NULL ? 7.0 : 4.0;
    int parts = embed.table != NULL ? 3 : 2;
    launch({"rotary_forward", moved * sizes.bytes()}, head_vectors(sizes, parts, stream),
           rotary_forward_kernel, qkv, rotary, embed, sizes);
}

// Turns dq and dk back, unless attention_backward has done so.
static void rotary_backward(floatX* dqkv, const floatX* qkv, Rotary rotary, AttentionSizes sizes,
                            cudaStream_t stream) {
    if (is_fast(sizes)) { return; }
    launch({"rotary_backward", 6 * sizes.bytes()}, head_vectors(sizes, 2, stream),
           rotary_backward_kernel, dqkv, qkv, rotary, sizes);
}

static void value_embed_backward(floatX* dembed, float* dz, const floatX* dqkv, ValueEmbed embed,
                                 AttentionSizes sizes, cudaStream_t stream) {
    launch({"value_embed_backward", 3 * sizes.bytes()}, head_vectors(sizes, 1, stream),
           value_embed_backward_kernel, dembed, dz, dqkv, embed, sizes);
}

// dn += …, dgate_weight += …; partials (GATE_PARTIALS, NH, 12)
static void gate_backward(floatX* dn, float* dgate_weight, float* partials, const float* dz,
                          ValueEmbed embed, AttentionSizes sizes, cudaStream_t stream) {
    int BT = sizes.B * sizes.T, NH = sizes.NH, C = NH * sizes.HS;
    int n_weights = NH * GATE_INPUTS;
    dim3 grid(GATE_PARTIALS, ceil_div(n_weights, 128));
    double bytes = (4.0 * NH + sizeof(floatX) * GATE_INPUTS) * BT;      // of dz and n
    launch({"gate_backward_weight", bytes + 4.0 * GATE_PARTIALS * n_weights}, {grid, 128, stream},
           gate_backward_weight_kernel, partials, dz, embed.n, BT, NH, C);
    add_partials(dgate_weight, partials, GATE_PARTIALS, n_weights, n_weights, stream);
    launch({"gate_backward_input", bytes + sizeof(floatX) * GATE_INPUTS * BT},
           one_thread_each(BT * GATE_INPUTS, stream), gate_backward_input_kernel, dn, dz,
           embed.gate_weight, BT, NH, C);
}

// ---- §8 GELU, ReLU² -----------------------------------------------------------------------------
//
// In bf16, cuBLASLt computes GELU and its derivative in the epilogues of matmuls (§6), if it has
// such a kernel for the sizes. The kernels here serve other sizes, fp32, --recompute, --fp8 1, and
// dN's ReLU².

// GPT-2: u = sqrt(2/π) (x + 0.044715 x³)    y = x (1 + tanh u) / 2
//        dx = dy ((1 + tanh u) / 2 + x (1 - tanh² u) u' / 2)
struct Gelu {
    static constexpr const char* FORWARD = "gelu_forward";
    static constexpr const char* BACKWARD = "gelu_backward";
    static constexpr float SCALE = 0.7978845608f;       // sqrt(2/π)
    static __device__ float forward(float x) {
        float u = SCALE * (x + 0.044715f * x * x * x);
        return 0.5f * x * (1.0f + tanhf(u));
    }
    static __device__ float backward(float dy, float x) {
        float t = tanhf(SCALE * (x + 0.044715f * x * x * x));
        float du = SCALE * (1.0f + 3.0f * 0.044715f * x * x);
        return dy * 0.5f * (1.0f + t + x * (1.0f - t * t) * du);
    }
};

// dN: y = relu(x)²    dx = 2 dy relu(x)
struct Relu2 {
    static constexpr const char* FORWARD = "relu2_forward";
    static constexpr const char* BACKWARD = "relu2_backward";
    static __device__ float forward(float x) { return fmaxf(x, 0.0f) * fmaxf(x, 0.0f); }
    static __device__ float backward(float dy, float x) { return 2.0f * dy * fmaxf(x, 0.0f); }
};

// One thread: one Pack. Grid n/PACK/256 x 256. Moves 2n; bound by memory.
template <class Activation>
__global__ void activation_forward_kernel(floatX* y, const floatX* x, int64_t n) {
    int64_t at = thread_in_grid() * PACK;
    if (at >= n) { return; }
    Pack value = load(x + at);
    for (int i = 0; i < PACK; i++) { value.set(i, Activation::forward(value[i])); }
    store(y + at, value);
}

// dy → dx in place. One thread: one Pack. Grid n/PACK/256 x 256. Moves 3n; bound by memory. If
// `largest` is not NULL, it is raised to the largest |dx|, and n must fill whole warps.
template <class Activation>
__global__ void activation_backward_kernel(floatX* dy, const floatX* x, int64_t n,
                                           unsigned* largest) {
    int64_t at = thread_in_grid() * PACK;
    if (at >= n) { return; }
    Pack gradient = load(dy + at);
    Pack value = load(x + at);
    float magnitude = 0.0f;
    for (int i = 0; i < PACK; i++) {
        gradient.set(i, Activation::backward(gradient[i], value[i]));
        magnitude = fmaxf(magnitude, fabsf(gradient[i]));
    }
    store(dy + at, gradient);
    if (largest != NULL) { raise_largest(largest, magnitude); }
}

template <class Activation>
static void activation_forward(floatX* y, const floatX* x, int64_t n, cudaStream_t stream) {
    launch({Activation::FORWARD, 2.0 * n * sizeof(floatX)}, one_thread_each(n / PACK, stream),
           activation_forward_kernel<Activation>, y, x, n);
}

template <class Activation>
static void activation_backward(floatX* dy, const floatX* x, int64_t n, cudaStream_t stream,
                                unsigned* largest = NULL) {
    launch({Activation::BACKWARD, 3.0 * n * sizeof(floatX)}, one_thread_each(n / PACK, stream),
           activation_backward_kernel<Activation>, dy, x, n, largest);
}

// u = x w + bias, y = gelu(u)
static void linear_gelu_forward(floatX* y, floatX* u, const floatX* x, const floatX* w,
                                const floatX* bias, LinearSizes n, cudaStream_t stream) {
    Matmul mm = {.m = n.OC, .n = n.rows, .k = n.C, .epilogue = ADD_BIAS_GELU};
    if (BF16 && has_kernel(mm, bias, u)) {
        matmul(y, w, x, mm, stream, bias, u);
    } else {
        linear_forward(u, x, w, bias, n, stream);
        activation_forward<Gelu>(y, u, (int64_t)n.rows * n.OC, stream);
    }
}

// du = dy wᵀ gelu'(u): back through a linear layer, then through the GELU that made its input
static void linear_gelu_backward_input(floatX* du, const floatX* dy, const floatX* w, floatX* u,
                                       LinearSizes n, cudaStream_t stream) {
    Matmul mm = {.m = n.C, .n = n.rows, .k = n.OC, .transpose = TRANSPOSE_A,
                 .epilogue = TIMES_DGELU};
    if (BF16 && has_kernel(mm, NULL, u)) {
        matmul(du, w, dy, mm, stream, NULL, u);
    } else {
        linear_backward_input(du, dy, w, n, stream);
        activation_backward<Gelu>(du, u, (int64_t)n.rows * n.C, stream);
    }
}

// ---- §9 Classifier ------------------------------------------------------------------------------
//
//   y = z, or with a softcap s: y = s tanh(z / s)    dy/dz = 1, or 1 - (y / s)²
//   loss = ln Σ exp(y) - y[target]    dz = (softmax(y) - onehot(target)) share dy/dz
//
// z (Vp) are the logits of a token. `share` is 1 / BT, since the loss is a mean over BT tokens. A
// target of -1 has no loss and no gradient. Logits V … Vp - 1, of the rows that pad wte, are not in
// the sum and have no gradient.

__host__ __device__ float capped(float z, float softcap) {
    return softcap > 0.0f ? softcap * tanhf(z / softcap) : z;
}

// One block: the logits of one token, which it overwrites with their gradient, so that memory never
// holds both. In the first pass each thread computes an online softmax of its part, as in §7, and
// the block combines the parts. The second pass reads the row once more, from the L2 cache. Grid:
// one block a token, of up to 512 threads. Moves 2 Vp a token, or Vp without the gradient; bound by
// memory.
__global__ void classifier_kernel(floatX* logits, float* losses, const int* targets, float share,
                                  float softcap, int V, int Vp, bool write_gradient) {
    floatX* row = logits + (int64_t)blockIdx.x * Vp;
    int target = targets[blockIdx.x];
    float of_target = target >= 0 ? capped((float)row[target], softcap) : 0.0f;
    float highest = -INFINITY;
    float sum = 0.0f;                           // Σ exp(y - highest) over this thread's part
    for (int c = threadIdx.x * PACK; c < V; c += blockDim.x * PACK) {
        Pack z = load(row + c);
        float before = highest;
        float y[PACK];
        for (int i = 0; i < PACK; i++) { y[i] = capped(z[i], softcap); }
        for (int i = 0; i < PACK && c + i < V; i++) { highest = fmaxf(highest, y[i]); }
        sum *= expf(before - highest);
        for (int i = 0; i < PACK && c + i < V; i++) { sum += expf(y[i] - highest); }
    }
    float top = block_max(highest);
    // A thread without logits has highest = -INFINITY.
    sum = block_sum(highest == -INFINITY ? 0.0f : sum * expf(highest - top));
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = target >= 0 ? logf(sum) + top - of_target : 0.0f;
    }
    if (!write_gradient) { return; }
    for (int c = threadIdx.x * PACK; c < Vp; c += blockDim.x * PACK) {
        Pack z = load(row + c);
        for (int i = 0; i < PACK; i++) {
            float y = capped(z[i], softcap);
            float onehot = c + i == target ? 1.0f : 0.0f;
            float dz = (expf(y - top) / sum - onehot) * share;
            if (softcap > 0.0f) { dz *= 1.0f - (y / softcap) * (y / softcap); }
            z.set(i, target >= 0 && c + i < V ? dz : 0.0f);
        }
        store(row + c, z);
    }
}

// *sum += all losses, in fp64 and always in the same order. One block. After the barrier, the first
// thread adds up the sums of all 256 threads. Grid 1 x 256.
__global__ void loss_sum_kernel(double* sum, const float* losses, int n) {
    __shared__ double sums[256];
    double mine = 0.0;
    for (int i = threadIdx.x; i < n; i += 256) { mine += losses[i]; }
    sums[threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 0; i < 256; i++) { *sum += sums[i]; }
    }
}

// ---- §10 AdamW, Muon, and the gradient's norm ---------------------------------------------------
//
//   m += (1 - β₁)(g - m)    v += (1 - β₂)(g² - v)
//   p ← p (1 - lr decay) - lr m / (1 - β₁ᵗ) / (sqrt(v / (1 - β₂ᵗ)) + ε)
//
// g is the gradient of a parameter p, m and v are its moments, and t is the step's number, from 1.

// How AdamW trains a bucket of parameters. lr is a multiple of the run's learning rate.
struct AdamGroup { float lr, beta_1, beta_2, epsilon, weight_decay; };
const AdamGroup GPT2_ADAM = {1.0f, 0.9f, 0.95f, 1e-8f, 0.1f};

// nanochat's values, tuned at d12 with a learning rate of 0.02 for Muon
const AdamGroup LM_HEAD_ADAM = {0.008f / 0.02f, 0.8f, 0.96f, 1e-10f, 0.01f};
const AdamGroup WTE_ADAM = {0.3f / 0.02f, 0.8f, 0.995f, 1e-10f, 0.001f};
const AdamGroup VALUE_EMBED_ADAM = {0.15f / 0.02f, 0.8f, 0.995f, 1e-10f, 0.01f};
const AdamGroup RESID_ADAM = {0.005f / 0.02f, 0.8f, 0.95f, 1e-10f, 0.05f};
const AdamGroup X0_ADAM = {0.5f / 0.02f, 0.96f, 0.95f, 1e-10f, 0.0f};
const AdamGroup BACKOUT_ADAM = {0.2f / 0.02f, 0.8f, 0.95f, 1e-10f, 0.0f};

// fp32 → floatX by stochastic rounding. bf16 keeps the upper 16 bits of an fp32 number. Before the
// lower 16 bits are dropped, a random number below 2¹⁶ is added. So the value is rounded away from
// zero with a probability equal to the dropped fraction. It is right on average, and small updates
// are not lost. The "random" number depends only on the step and the parameter, so that a run
// repeats on any number of ranks. At step 0, before training, values are rounded to nearest.
__device__ floatX round_parameter(float value, int64_t index, unsigned step) {
    if (!BF16 || step == 0) { return (floatX)value; }
    unsigned bits = (unsigned)index * 0x9E3779B1u ^ (unsigned)(index >> 32) ^ step * 0x85EBCA77u;
    bits = (bits ^ bits >> 16) * 0x7FEB352Du;           // a mixer of the "lowbias32" kind
    bits = (bits ^ bits >> 15) * 0x846CA68Bu;
    bits = __float_as_uint(value) + ((bits ^ bits >> 16) & 0xFFFFu);
    return (floatX)__uint_as_float(bits & 0xFFFF0000u);
}

// n parameters that this rank trains, and their optimizer states. `index` is the place of the first
// one among all parameters of the model.
struct Slice {
    floatX* parameters;
    float* masters;             // the parameters in fp32
    float *m, *v;               // Adam's moments; or Muon's momentum, and a variance for each line
    const float* gradients;
    int64_t n, index;
};

struct AdamStep {
    AdamGroup group;
    float lr, decay, grad_scale, correction_1, correction_2;    // corrections: 1 - βᵗ
    unsigned step;
};

// One thread: one parameter. Those from decay_end on do not decay. Grid n/256 x 256. Moves 30 bytes
// a parameter (fp32: masters, m and v are read and written, g is read; bf16: the parameter is
// written); bound by memory.
__global__ void adamw_kernel(Slice slice, int64_t decay_end, AdamStep adam) {
    int64_t i = thread_in_grid();
    if (i >= slice.n) { return; }
    float *masters = slice.masters, *m = slice.m, *v = slice.v;
    float g = slice.gradients[i] * adam.grad_scale;
    m[i] += (1.0f - adam.group.beta_1) * (g - m[i]);
    v[i] += (1.0f - adam.group.beta_2) * (g * g - v[i]);
    float m_hat = m[i] / adam.correction_1;
    float v_hat = v[i] / adam.correction_2;
    float decay = slice.index + i < decay_end ? adam.decay : 0.0f;
    masters[i] = masters[i] * (1.0f - adam.lr * decay) -
                 adam.lr * m_hat / (sqrtf(v_hat) + adam.group.epsilon);
    slice.parameters[i] = round_parameter(masters[i], slice.index + i, adam.step);
}

// masters → parameters, rounded as in adamw_kernel and muon_kernel at `step`. One thread: one
// parameter. Grid n/256 x 256. Moves 6 bytes a parameter; bound by memory.
__global__ void round_parameters_kernel(Slice slice, unsigned step) {
    int64_t i = thread_in_grid();
    if (i >= slice.n) { return; }
    slice.parameters[i] = round_parameter(slice.masters[i], slice.index + i, step);
}

const int NORM_BLOCKS = 128;

// One block: sums[block] = the sum of squares of its share of n gradients. The CPU adds up the sums
// in order. Grid 128 x 256. Reads n once; bound by memory.
__global__ void square_sum_kernel(float* sums, const float* gradients, int64_t n) {
    float sum = 0.0f;
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = thread_in_grid(); i < n; i += step) { sum += gradients[i] * gradients[i]; }
    sum = block_sum(sum);
    if (threadIdx.x == 0) { sums[blockIdx.x] = sum; }
}

// Muon moves a matrix along the orthogonal factor of its momentum: P Qᵀ, if the SVD is P S Qᵀ. Five
// steps of an iteration approximate it, with the coefficients a, b, c of Polar Express. NorMuon
// then evens out the lines of the result. A line is a row of a tall matrix (more rows than
// columns), else a column; so it has as many values, n, as the shorter side. In a square matrix a
// line has the weights of one output.
//
//   m += (1 - μ)(g - m)    X = g + μ (m - g)    X ← X / (1.01 ‖X‖)
//   five times: X ← a X + (b A + c A²) X with A = X Xᵀ
//               X ← a X + X (b A + c A²) with A = Xᵀ X, the same result, if X is tall
//   v += 0.1 (Σ X² / n - v) for each line    U = X / sqrt(v), scaled so that ‖U‖ = ‖X‖
//   w ← w - lr (U + decay w) where U w ≥ 0    w ← w - lr U elsewhere

const float POLAR_EXPRESS[5][3] = {         // each step moves the singular values towards 1
    {8.156554524902461f, -22.48329292557795f, 15.878769915207462f},
    {4.042929935166739f, -2.808917465908714f, 0.5000178451051316f},
    {3.8916678022926607f, -2.772484153217685f, 0.5060648178503393f},
    {3.285753657755655f, -2.3681294933425376f, 0.46449024233003106f},
    {2.3465413258596377f, -1.7097828382687081f, 0.42323551169305323f}};

// A tensor of n matrices side by side; c_attn has three, for q, k and v. In X the matrices follow
// one another, and each is padded with zeros to multiples of 8 rows and columns, for which cuBLASLt
// is fast.
struct Matrices {
    int n, rows, columns;
    bool by_row;                // true if NorMuon's lines are rows, false if they are columns
    __host__ __device__ int padded_rows() const { return ceil_div(rows, 8) * 8; }
    __host__ __device__ int padded_columns() const { return ceil_div(columns, 8) * 8; }
    __host__ __device__ int in_x(int which, int row, int column) const {
        return (which * padded_rows() + row) * padded_columns() + column;
    }
    __host__ __device__ int padded_size() const { return in_x(1, 0, 0); }
    __host__ __device__ int lines() const { return by_row ? rows : columns; }
    __host__ __device__ int line_size() const { return by_row ? columns : rows; }
};

struct MuonStep { float lr, decay, momentum, grad_scale; unsigned step; };

// Updates the momentum m and writes X before its normalisation. One thread: one element of X or of
// its padding. Grid elements/256 x 256. Moves 14 bytes an element; bound by memory.
__global__ void momentum_kernel(floatX* X, float* momentum, const float* gradients, Matrices matrix,
                                MuonStep muon) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    int size = matrix.padded_size();
    if (i >= matrix.n * size) { return; }
    int which = i / size;
    int row = i % size / matrix.padded_columns();
    int c = i % matrix.padded_columns();
    float nesterov = 0.0f;
    if (row < matrix.rows && c < matrix.columns) {
        int at = (row * matrix.n + which) * matrix.columns + c;
        float g = gradients[at] * muon.grad_scale;
        float m = momentum[at];
        m += (1.0f - muon.momentum) * (g - m);
        momentum[at] = m;
        nesterov = g + muon.momentum * (m - g);
    }
    X[i] = (floatX)nesterov;
}

// sums (n, lines) = Σ X² over each line. One block of 32 x 8: 32 lines of one matrix. Each of the 8
// rows of threads sums every 8th element of the lines, and after the barrier the first row adds up
// the 8 sums. Grid (lines/32, n). Reads X once; bound by memory.
__global__ void line_square_sum_kernel(float* sums, const floatX* X, Matrices matrix) {
    __shared__ float of_part[8][WARP];
    int line = blockIdx.x * WARP + threadIdx.x;
    int which = blockIdx.y;
    float sum = 0.0f;
    if (line < matrix.lines()) {
        for (int i = threadIdx.y; i < matrix.line_size(); i += 8) {
            float x = (float)X[matrix.by_row ? matrix.in_x(which, line, i)
                                             : matrix.in_x(which, i, line)];
            sum += x * x;
        }
    }
    of_part[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || line >= matrix.lines()) { return; }
    for (int y = 1; y < 8; y++) { sum += of_part[y][threadIdx.x]; }
    sums[which * matrix.lines() + line] = sum;
}

// X /= 1.01 ‖X‖. One block: a share of one matrix. Every block computes the norm again from the
// sums of the lines. Grid (up to 128, n) x 256. Reads and writes X once; bound by memory.
__global__ void normalise_kernel(floatX* X, const float* sums, Matrices matrix) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < matrix.lines(); i += blockDim.x) {
        sum += sums[blockIdx.y * matrix.lines() + i];
    }
    float scale = 1.0f / (1.01f * sqrtf(block_sum(sum)) + 1e-6f);
    floatX* x = X + blockIdx.y * matrix.padded_size();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < matrix.padded_size();
         i += gridDim.x * blockDim.x) {
        x[i] = (floatX)((float)x[i] * scale);
    }
}

// Updates the variances (n, lines) from sums (n, lines), which hold Σ X² of each line, and then
// overwrites each sum with the factor that turns its line of X into one of U. One block: one
// matrix. Grid n x 1024. Bound by latency.
__global__ void normuon_kernel(float* sums, float* variance, Matrices matrix) {
    sums += blockIdx.x * matrix.lines();
    variance += blockIdx.x * matrix.lines();
    float before = 0.0f;
    float after = 0.0f;
    for (int i = threadIdx.x; i < matrix.lines(); i += blockDim.x) {
        variance[i] += 0.1f * (sums[i] / matrix.line_size() - variance[i]);
        before += sums[i];
        after += sums[i] / fmaxf(variance[i], 1e-10f);
    }
    before = block_sum(before);
    after = block_sum(after);
    float ratio = sqrtf(before) / fmaxf(sqrtf(after), 1e-12f);
    for (int i = threadIdx.x; i < matrix.lines(); i += blockDim.x) {
        sums[i] = ratio * rsqrtf(fmaxf(variance[i], 1e-10f));
    }
}

// w -= lr (U + decay w where U w ≥ 0). One thread: one weight; factors (n, lines) are those of
// normuon_kernel. Grid n/256 x 256. Moves 12 bytes a weight; bound by memory.
__global__ void muon_kernel(Slice slice, const floatX* X, const float* factors, Matrices matrix,
                            MuonStep muon) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= slice.n) { return; }
    int c = i % matrix.columns;
    int which = i / matrix.columns % matrix.n;
    int row = i / matrix.columns / matrix.n;
    int line = matrix.by_row ? row : c;
    float u = (float)X[matrix.in_x(which, row, c)] * factors[which * matrix.lines() + line];
    float w = slice.masters[i];
    w -= muon.lr * (u + (u * w >= 0.0f ? muon.decay * w : 0.0f));
    slice.masters[i] = w;
    slice.parameters[i] = round_parameter(w, slice.index + i, muon.step);
}

struct MuonWorkspace { floatX *x, *next, *a, *b; float* sums; };

// Approximates the orthogonal factor of X (n, rows, columns), which is in space.x. Returns the
// place of the result, space.x or space.next.
static floatX* polar(MuonWorkspace space, Matrices matrix, cudaStream_t stream) {
    int rows = matrix.padded_rows();
    int columns = matrix.padded_columns();
    int small = min(rows, columns);
    bool tall = rows > columns;             // A is XᵀX; else XXᵀ. To cuBLAS, X is (columns, rows).
    MatmulPlan* a_plan = plan_matmul({.m = small, .n = small, .k = max(rows, columns),
                                      .transpose = tall ? TRANSPOSE_B : TRANSPOSE_A,
                                      .batch = matrix.n});
    MatmulPlan* b_plan = plan_matmul({.m = small, .n = small, .k = small, .batch = matrix.n});
    MatmulPlan* x_plan = plan_matmul({.m = columns, .n = rows, .k = small, .batch = matrix.n});
    floatX *x = space.x, *next = space.next, *A = space.a, *B = space.b;
    for (auto [a, b, c] : POLAR_EXPRESS) {
        run_matmul(a_plan, A, {.a = x, .b = x}, stream);
        run_matmul(b_plan, B, {.a = A, .b = A, .alpha = c, .c = A, .beta = b}, stream);
        Operands update = {.a = x, .b = B, .c = x, .beta = a};
        if (tall) { update = {.a = B, .b = x, .c = x, .beta = a}; }
        run_matmul(x_plan, next, update, stream);
        std::swap(x, next);
    }
    return x;
}

static void line_square_sum(float* sums, const floatX* X, Matrices matrix, cudaStream_t stream) {
    dim3 grid(ceil_div(matrix.lines(), WARP), matrix.n);
    double bytes = (double)sizeof(floatX) * matrix.n * matrix.padded_size();
    launch({"line_square_sum", bytes}, {grid, dim3(WARP, 8), stream}, line_square_sum_kernel, sums,
           X, matrix);
}

// One step of Muon for one tensor
static void muon_update(Slice slice, MuonWorkspace space, Matrices matrix, MuonStep muon,
                        cudaStream_t stream) {
    double n = slice.n;
    launch({"momentum", (12.0 + sizeof(floatX)) * n},
           one_thread_each(matrix.n * matrix.padded_size(), stream), momentum_kernel, space.x,
           slice.m, slice.gradients, matrix, muon);
    line_square_sum(space.sums, space.x, matrix, stream);
    int blocks = min(128, ceil_div(matrix.padded_size(), 4096));
    launch({"normalise", 2.0 * sizeof(floatX) * n}, {dim3(blocks, matrix.n), 256, stream},
           normalise_kernel, space.x, space.sums, matrix);
    floatX* U = polar(space, matrix, stream);
    line_square_sum(space.sums, U, matrix, stream);
    launch({"normuon", 16.0 * matrix.n * matrix.lines()}, {matrix.n, 1024, stream}, normuon_kernel,
           space.sums, slice.v, matrix);
    launch({"muon", (8.0 + 2 * sizeof(floatX)) * n}, one_thread_each(slice.n, stream), muon_kernel,
           slice, U, space.sums, matrix, muon);
}

// ---- §11 Ranks: torchrun's environment, NCCL; a single process is rank 0 of 1 -------------------
//
// A rank is a process with one GPU. torchrun starts the ranks and tells each its number in
// environment variables. The twin is Ranks in training.py, which asks torch.distributed for what
// NCCL does here. A build without NCCL has the same functions; for its one rank they do nothing.

struct Ranks {
    int rank, world_size, local_rank;
    cudaStream_t stream;            // collectives run here, beside the backward pass
    cudaEvent_t ready;              // marks what a collective or the next kernel must wait for
#ifdef MULTI_GPU
    ncclComm_t comm;
    double* buffer;                 // on the GPU, for ranks_sum
#endif
};

// An integer from the environment, where torchrun leaves RANK, WORLD_SIZE, LOCAL_RANK, MASTER_PORT.
static int environment(const char* name, int fallback) {
    const char* value = getenv(name);
    return value != NULL ? atoi(value) : fallback;
}

#ifdef MULTI_GPU
#define CHECK_NCCL(call) check_nccl(call, __LINE__)
static void check_nccl(ncclResult_t result, int line) {
    if (result == ncclSuccess) { return; }
    die("train_gpt2.cu:%d: NCCL failed: %s, perhaps because another rank ended; look at what that "
        "rank printed, then continue with --resume", line, ncclGetErrorString(result));
}

// Rank 0 of share_id: gives the id to each other rank that connects.
static void send_id(const ncclUniqueId* id, const addrinfo* address, const char* port,
                    int world_size) {
    int server = socket(AF_INET, SOCK_STREAM, 0);
    int yes = 1;                        // a run may begin right after another on the same port
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(server, address->ai_addr, address->ai_addrlen) != 0 || listen(server, 1024) != 0) {
        die("port %s, which is MASTER_PORT + 1, is taken; give torchrun another --master_port",
            port);
    }
    for (int others = 1; others < world_size; others++) {
        int client = accept(server, NULL, NULL);
        if (write(client, id, sizeof *id) != (ssize_t)sizeof *id) {
            die("another rank ended while the ranks were starting; look at what it printed");
        }
        close(client);
    }
    close(server);
}

// Every other rank of share_id: tries for a minute to reach rank 0, which may start later.
static void receive_id(ncclUniqueId* id, const addrinfo* address, const char* host,
                       const char* port) {
    const int TRIES = 1200;
    const int MICROSECONDS_APART = 50000;
    int client = socket(AF_INET, SOCK_STREAM, 0);
    int tries = 1;
    while (connect(client, address->ai_addr, address->ai_addrlen) != 0) {
        if (tries == TRIES) {
            die("rank 0 has not answered at %s:%s for a minute; look at what rank 0 printed", host,
                port);
        }
        close(client);                  // after a failure the socket cannot be used again
        usleep(MICROSECONDS_APART);
        client = socket(AF_INET, SOCK_STREAM, 0);
        tries++;
    }
    size_t have = 0;
    while (have < sizeof *id) {         // read may return a part
        ssize_t got = read(client, (char*)id + have, sizeof *id - have);
        if (got <= 0) {
            die("rank 0 ended while the ranks were starting; look at what it printed");
        }
        have += got;
    }
    close(client);
}

// NCCL's ranks find each other by an id that rank 0 makes. It goes to the others over TCP, on the
// port after MASTER_PORT, because torchrun listens on MASTER_PORT itself.
static void share_id(ncclUniqueId* id, int rank, int world_size) {
    const char* host = getenv("MASTER_ADDR") != NULL ? getenv("MASTER_ADDR") : "127.0.0.1";
    char port[16];
    snprintf(port, sizeof port, "%d", environment("MASTER_PORT", 29500) + 1);
    addrinfo hints = {};
    hints.ai_family = AF_INET;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = rank == 0 ? AI_PASSIVE : 0;
    addrinfo* address = NULL;
    if (getaddrinfo(rank == 0 ? NULL : host, port, &hints, &address) != 0) {
        die("the host %s of MASTER_ADDR cannot be found; start the ranks with torchrun", host);
    }
    if (rank == 0) {
        send_id(id, address, port, world_size);
    } else {
        receive_id(id, address, host, port);
    }
    freeaddrinfo(address);
}
#endif

// Takes this rank's GPU and joins the other ranks. Every rank must call it.
static Ranks start_ranks() {
    Ranks ranks = {};
    ranks.rank = environment("RANK", 0);
    ranks.world_size = environment("WORLD_SIZE", 1);
    ranks.local_rank = environment("LOCAL_RANK", 0);
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        die("no CUDA GPU was found; check that nvidia-smi lists one, or use python train_gpt2.py");
    }
    CHECK_CUDA(cudaSetDevice(ranks.local_rank % n_devices));
    CHECK_CUDA(cudaStreamCreateWithFlags(&ranks.stream, cudaStreamNonBlocking));
    CHECK_CUDA(cudaEventCreateWithFlags(&ranks.ready, cudaEventDisableTiming));
#ifdef MULTI_GPU
    if (ranks.world_size > 1) {
        ncclUniqueId id = {};
        if (ranks.rank == 0) { CHECK_NCCL(ncclGetUniqueId(&id)); }
        share_id(&id, ranks.rank, ranks.world_size);
        CHECK_NCCL(ncclCommInitRank(&ranks.comm, ranks.world_size, id, ranks.rank));
        ranks.buffer = (double*)allocate(sizeof(double) * 16);
    }
#else
    if (ranks.world_size > 1) {
        die("WORLD_SIZE is %d, but this binary was built without NCCL; install nvidia-nccl-cu13 "
            "and run make train_gpt2cu again", ranks.world_size);
    }
#endif
    return ranks;
}

// Replaces each of up to 16 numbers by its sum over all ranks. Every rank must call it.
static void ranks_sum(Ranks* ranks, double* values, int n) {
#ifdef MULTI_GPU
    if (ranks->world_size == 1) { return; }
    CHECK_CUDA(cudaMemcpyAsync(ranks->buffer, values, sizeof(double) * n, cudaMemcpyHostToDevice,
                               ranks->stream));
    CHECK_NCCL(ncclAllReduce(ranks->buffer, ranks->buffer, n, ncclFloat64, ncclSum, ranks->comm,
                             ranks->stream));
    CHECK_CUDA(cudaMemcpyAsync(values, ranks->buffer, sizeof(double) * n, cudaMemcpyDeviceToHost,
                               ranks->stream));
    CHECK_CUDA(cudaStreamSynchronize(ranks->stream));
#endif
}

// Waits until every rank has come here.
static void barrier(Ranks* ranks) {
    double nothing = 0;
    ranks_sum(ranks, &nothing, 1);
}

// The owner of a bucket (§12) is the number of one rank, or all ranks (each has the same copy), or
// the bucket is split: each rank owns a part, the first rank the first.
const int EVERY_RANK = -1;
const int SHARDED = -2;

// Sums n gradients over all ranks. The sums arrive at the owner; what the other ranks are left with
// has no meaning. NCCL starts when the stream `after` has done its work so far, and the call does
// not wait for it, so the backward pass of the next layer runs meanwhile.
static void reduce(Ranks* ranks, float* gradients, int64_t n, int owner, cudaStream_t after) {
#ifdef MULTI_GPU
    if (ranks->world_size == 1) { return; }
    int64_t part = n / ranks->world_size;
    CHECK_CUDA(cudaEventRecord(ranks->ready, after));
    CHECK_CUDA(cudaStreamWaitEvent(ranks->stream, ranks->ready, 0));
    if (owner == SHARDED) {
        CHECK_NCCL(ncclReduceScatter(gradients, gradients + ranks->rank * part, part, ncclFloat32,
                                     ncclSum, ranks->comm, ranks->stream));
    } else if (owner == EVERY_RANK) {
        CHECK_NCCL(ncclAllReduce(gradients, gradients, n, ncclFloat32, ncclSum, ranks->comm,
                                 ranks->stream));
    } else {
        CHECK_NCCL(ncclReduce(gradients, gradients, n, ncclFloat32, ncclSum, owner, ranks->comm,
                              ranks->stream));
    }
#endif
}

// The way back: of n bytes, in place, each rank receives what their owner has. It may be the values
// of parameters in any type. It starts after `after` and does not wait, as reduce does.
static void gather(Ranks* ranks, void* all, int64_t n_bytes, int owner, cudaStream_t after) {
#ifdef MULTI_GPU
    if (ranks->world_size == 1 || owner == EVERY_RANK) { return; }
    int64_t part = n_bytes / ranks->world_size;
    CHECK_CUDA(cudaEventRecord(ranks->ready, after));
    CHECK_CUDA(cudaStreamWaitEvent(ranks->stream, ranks->ready, 0));
    if (owner == SHARDED) {
        CHECK_NCCL(ncclAllGather((char*)all + ranks->rank * part, all, part, ncclInt8, ranks->comm,
                                 ranks->stream));
    } else {
        CHECK_NCCL(ncclBroadcast(all, all, n_bytes, ncclInt8, owner, ranks->comm, ranks->stream));
    }
#endif
}

// What is put on `stream` from now on waits for all collectives so far.
static void wait_for_ranks(Ranks* ranks, cudaStream_t stream) {
    CHECK_CUDA(cudaEventRecord(ranks->ready, ranks->stream));
    CHECK_CUDA(cudaStreamWaitEvent(stream, ranks->ready, 0));
}

// ---- §12 Tensor table ---------------------------------------------------------------------------
//
// The table lists each tensor's name, shape, initial values and place. It drives allocation,
// initialisation (§14), checkpoints (§14), training (§13) and tests. In model.py the modules of
// GPT do this; make_optimizer of training.py is the twin of the buckets' owners and AdamGroups.
//
// All parameters lie in one array, which is divided into buckets. A bucket is reduced over the
// ranks as soon as its backward pass is done, and one rule updates all of it.
//   - Most buckets are sharded: each rank owns one part and keeps its state (ZeRO-1).
//   - Muon needs whole matrices, so each layer's matrices are a bucket that one rank owns; the
//     ranks take turns.
//   - dN's few scalars are kept by every rank, in fp32.
//
//   GPT-2: | wte wpe ln_f | h.0: matrices, then vectors | h.1 … |
//   dN:    | wte | lm_head | resid | x0 | backout | h.0 matrices | value_embeds.0 | h.1 matrices …
//
// In GPT-2's buckets matrices come first because only they are decayed. Half of dN's layers have a
// value embedding: every second one, counted from the last.

struct Config {
    int block_size, vocab_size, n_layer, n_head, n_embd;
    bool modern;                // true: dN's recipe, with all of its parts; false: GPT-2
    double softcap;
    char windows[64];           // a letter a layer, repeated: L sees all before it, S a quarter
    bool has_value_embed(int layer) const { return modern && layer % 2 == (n_layer - 1) % 2; }
    int window(int layer) const {
        bool is_last = layer == n_layer - 1;        // the last layer always sees everything
        bool is_short = modern && !is_last && windows[layer % strlen(windows)] == 'S';
        return is_short ? block_size / 4 : block_size;
    }
};

// Tables with a row a token are padded to a multiple of 64 rows, which suits tensor cores.
static int padded_vocab(Config config) { return ceil_div(config.vocab_size, 64) * 64; }

// Indices into the table: of tensors that belong to no layer …
enum { WTE, WPE, LN_F_W, LN_F_B, GLOBAL_TENSORS };                      // GPT-2's
enum { LM_HEAD = 1, RESID_SCALARS, X0_SCALARS, BACKOUT_SCALAR };        // dN's, after WTE

// … and of a layer's, counted from its first.
enum { ATTN_W, ATTN_PROJ_W, FC_W, FC_PROJ_W, LN_1_W, LN_1_B, ATTN_B, ATTN_PROJ_B, LN_2_W, LN_2_B,
       FC_B, FC_PROJ_B, LAYER_TENSORS };
enum { VALUE_GATE = 4, VALUE_EMBED };                                   // dN's, after FC_PROJ_W

// Element i begins at mean + step · i + std · noise, where noise has variance 1 and is normal or,
// if is_uniform, uniform.
struct Init { float std, mean, step; bool is_uniform; };

struct Tensor {
    char name[96];              // as HF's GPT-2 names it
    int rows, columns;          // in memory; columns 0: a vector
    int file_rows;              // in a file: without the padding of the vocabulary
    Init init;
    int64_t offset;             // in the array of all parameters, in elements
    int64_t file_size() const { return (int64_t)file_rows * (columns > 0 ? columns : 1); }
};

struct Bucket {
    int64_t offset, size;       // in elements
    int64_t decay_end;          // elements before this one are decayed
    int owner;                  // a rank, EVERY_RANK or SHARDED
    int first_tensor, end_tensor;
    AdamGroup adam;             // how it is trained, unless that is Muon's task
    bool is_muon() const { return owner >= 0; }
};

struct Table {
    Config config;
    int world_size;
    int n_tensors, n_buckets;
    Tensor* tensors;
    Bucket* buckets;
    int *layer_tensors, *layer_buckets;     // (L + 1) each: where a layer's begin and the last end
    int64_t size, file_size;                // elements with and without padding
};

const int ALIGNMENT = 128;      // a tensor's offset is a multiple of this: 256 bytes in bf16

// A row of the two tables below
struct TensorRow { const char* name; int rows, columns; Init init; };

static bool starts_with(const char* text, const char* start) {
    return strncmp(text, start, strlen(start)) == 0;
}

// Appends a tensor to the table. Layer -1: it belongs to no layer, so its name has no "h.N.".
static void add_tensor(Table* table, int layer, TensorRow row) {
    Tensor* tensor = &table->tensors[table->n_tensors++];
    bool is_head = starts_with(row.name, "lm_head");
    bool has_row_a_token =
        is_head || starts_with(row.name, "wte") || starts_with(row.name, "value_embeds");
    int file_rows = has_row_a_token ? table->config.vocab_size : row.rows;
    *tensor = {"", row.rows, row.columns, file_rows, row.init, table->size};
    char of_layer[16] = "";
    if (layer >= 0) { snprintf(of_layer, sizeof of_layer, "h.%d.", layer); }
    snprintf(tensor->name, sizeof tensor->name, "%s%s%s", is_head ? "" : "transformer.", of_layer,
             row.name);
    int64_t size = (int64_t)row.rows * (row.columns > 0 ? row.columns : 1);
    table->size = ceil_div(table->size + size, (int64_t)ALIGNMENT) * ALIGNMENT;
    table->file_size += tensor->file_size();
}

// Appends a bucket of n tensors. A sharded one is padded so that all ranks' parts are equally long.
static Bucket* add_bucket(Table* table, int owner, AdamGroup adam, int layer, const TensorRow* rows,
                          int n) {
    Bucket* bucket = &table->buckets[table->n_buckets++];
    int64_t begin = table->size;
    *bucket = {begin, 0, begin, owner, table->n_tensors, table->n_tensors + n, adam};
    for (int i = 0; i < n; i++) {
        add_tensor(table, layer, rows[i]);
        if (rows[i].columns > 0) { bucket->decay_end = table->size; }
    }
    int64_t unit = owner == SHARDED ? ALIGNMENT * table->world_size : ALIGNMENT;
    bucket->size = ceil_div(table->size - begin, unit) * unit;
    table->size = begin + bucket->size;
    return bucket;
}

// Called before a layer's tensors are added, and once more after the last layer's.
static void begin_layer(Table* table, int layer) {
    table->layer_tensors[layer] = table->n_tensors;
    table->layer_buckets[layer] = table->n_buckets;
}

// GPT-2's initial values: N(0, 0.02²); residual projections are smaller by √(2L), because 2L of
// them add up in the residual stream.
static void add_gpt2_tensors(Table* table) {
    int C = table->config.n_embd, L = table->config.n_layer;
    Init normal = {0.02f}, proj = {0.02f / sqrtf(2.0f * L)}, one = {0, 1}, zero = {};
    const TensorRow globals[GLOBAL_TENSORS] = {
        {"wte.weight", padded_vocab(table->config), C, normal},
        {"wpe.weight", table->config.block_size, C, normal},
        {"ln_f.weight", C, 0, one}, {"ln_f.bias", C, 0, zero}};
    const TensorRow layer[LAYER_TENSORS] = {
        {"attn.c_attn.weight", C, 3 * C, normal}, {"attn.c_proj.weight", C, C, proj},
        {"mlp.c_fc.weight", C, 4 * C, normal}, {"mlp.c_proj.weight", 4 * C, C, proj},
        {"ln_1.weight", C, 0, one}, {"ln_1.bias", C, 0, zero}, {"attn.c_attn.bias", 3 * C, 0, zero},
        {"attn.c_proj.bias", C, 0, zero}, {"ln_2.weight", C, 0, one}, {"ln_2.bias", C, 0, zero},
        {"mlp.c_fc.bias", 4 * C, 0, zero}, {"mlp.c_proj.bias", C, 0, zero}};
    add_bucket(table, SHARDED, GPT2_ADAM, -1, globals, GLOBAL_TENSORS);
    for (int l = 0; l < L; l++) {
        begin_layer(table, l);
        add_bucket(table, SHARDED, GPT2_ADAM, l, layer, LAYER_TENSORS);
    }
}

// A bucket of one tensor, all of which is decayed. Rates of tables of tokens shrink with the width
// as in training.py; they were tuned at 768 channels.
static void add_single(Table* table, TensorRow row, int owner, AdamGroup adam) {
    if (row.columns > 0) { adam.lr *= sqrtf(768.0f / table->config.n_embd); }
    Bucket* bucket = add_bucket(table, owner, adam, -1, &row, 1);
    bucket->decay_end = table->size;
}

// dN's initial values: each block begins as the identity, because its output projections are zero;
// the other matrices are uniform with a standard deviation of 1/√C.
static void add_modern_tensors(Table* table) {
    Config config = table->config;
    int C = config.n_embd, L = config.n_layer, Vp = padded_vocab(config);
    int last = max(1, L - 1);
    float std = 1 / sqrtf(C);
    Init uniform = {std, 0, 0, true}, fc = {0.4f * std, 0, 0, true}, zero = {};
    Init gate = {0.02f / sqrtf(12), 0.01f, 0, true};                    // U(0, 0.02)
    add_single(table, {"wte.weight", Vp, C, {0.8f}}, SHARDED, WTE_ADAM);
    add_single(table, {"lm_head.weight", Vp, C, {0.001f}}, SHARDED, LM_HEAD_ADAM);
    add_single(table, {"resid_scalars", L, 0, {0, 1.15f, -0.10f / last}}, EVERY_RANK, RESID_ADAM);
    add_single(table, {"x0_scalars", L, 0, {0, 0.20f, -0.15f / last}}, EVERY_RANK, X0_ADAM);
    add_single(table, {"backout_scalar", 1, 0, {0, 0.2f}}, EVERY_RANK, BACKOUT_ADAM);
    const TensorRow layer[] = {
        {"attn.c_attn.weight", C, 3 * C, uniform}, {"attn.c_proj.weight", C, C, zero},
        {"mlp.c_fc.weight", C, 4 * C, fc}, {"mlp.c_proj.weight", 4 * C, C, zero},
        {"attn.value_gate.weight", config.n_head, GATE_INPUTS, gate}};
    for (int l = 0; l < L; l++) {
        begin_layer(table, l);
        bool has_value_embed = config.has_value_embed(l);
        int n = has_value_embed ? VALUE_GATE + 1 : VALUE_GATE;      // the gate is the last matrix
        add_bucket(table, l % table->world_size, {}, l, layer, n);
        if (!has_value_embed) { continue; }
        char name[64];
        snprintf(name, sizeof name, "value_embeds.%d.weight", l);
        add_single(table, {name, Vp, C, uniform}, SHARDED, VALUE_EMBED_ADAM);
    }
}

// The table for a number of ranks, on which the padding of sharded buckets and the owners of Muon's
// depend
static Table make_table(Config config, int world_size) {
    int L = config.n_layer;
    Table table = {config, world_size};
    table.tensors = (Tensor*)calloc(5 + L * LAYER_TENSORS, sizeof(Tensor));     // at most
    table.buckets = (Bucket*)calloc(5 + 2 * L, sizeof(Bucket));
    table.layer_tensors = (int*)calloc(L + 1, sizeof(int));
    table.layer_buckets = (int*)calloc(L + 1, sizeof(int));
    if (config.modern) {
        add_modern_tensors(&table);
    } else {
        add_gpt2_tensors(&table);
    }
    begin_layer(&table, L);
    return table;
}

// How Muon sees the `which`-th tensor of a layer: c_attn is three matrices, q, k, v, side by side.
// NorMuon keeps one variance for each place along the longer side, or along the outputs if both are
// equal. Outputs are columns, since files hold (in, out); only the gate is stored as (out, in).
static Matrices matrices_of(Tensor tensor, int which) {
    int n = which == ATTN_W ? 3 : 1;
    int rows = tensor.rows;
    int columns = tensor.columns / n;
    return {n, rows, columns, which == VALUE_GATE ? rows >= columns : rows > columns};
}

// What a rank owns of a bucket: `size` parameters, of which the first is parameter `first`. Its
// masters and momentum begin at `state` in the rank's arrays, its second moments at `v`. Adam has a
// second moment for each parameter, Muon one for each line of a matrix.
struct Part { int64_t first, size, state, v; };

// How many second moments a rank keeps that has `size` parameters of a bucket
static int64_t count_second_moments(Table table, Bucket bucket, int64_t size) {
    if (!bucket.is_muon() || size == 0) { return size; }
    int64_t lines = 0;
    for (int t = bucket.first_tensor; t < bucket.end_tensor; t++) {
        Matrices matrix = matrices_of(table.tensors[t], t - bucket.first_tensor);
        lines += matrix.n * matrix.lines();
    }
    return lines;
}

// A part for each bucket, and one more at the end, whose state and v are the sizes of the arrays.
static Part* make_parts(Table table, int rank, int world_size) {
    Part* parts = (Part*)calloc(table.n_buckets + 1, sizeof(Part));
    for (int i = 0; i < table.n_buckets; i++) {
        Bucket bucket = table.buckets[i];
        Part* part = &parts[i];
        part->first = bucket.offset;
        if (bucket.owner == SHARDED) {
            part->size = bucket.size / world_size;
            part->first += rank * part->size;
        } else if (bucket.owner == rank || bucket.owner == EVERY_RANK) {
            part->size = bucket.size;
        }
        parts[i + 1].state = part->state + part->size;
        parts[i + 1].v = part->v + count_second_moments(table, bucket, part->size);
    }
    return parts;
}

// ---- §13 Model ----------------------------------------------------------------------------------
//
// A layer of either recipe, where x and x_mid are the residual stream:
//
//   x_mid = x + attention(norm(x))    the next layer's x = x_mid + MLP(norm(x_mid))
//
// A layer does not add the output of its last matmul, the branch, to the stream. The norm that
// follows does, since it has to read both summands anyway (§5).

// What a layer's forward pass keeps for its backward pass
struct LayerActivations {
    floatX* x;                  // (BT, C) the residual stream before the layer
    floatX* ln_1;               // (BT, C) the first norm's output
    floatX* qkv;                // (BT, 3C)
    floatX* y;                  // (BT, C) attention's output
    floatX* x_mid;              // (BT, C) the residual stream between attention and MLP
    floatX* ln_2;               // (BT, C) the second norm's output
    floatX* fc;                 // (BT, 4C) the input of GELU or ReLU²
    floatX* act;                // (BT, 4C) its output
    float* lse;                 // (B, NH, T)
    float *ln_1_mean, *ln_1_rstd, *ln_2_mean, *ln_2_rstd;       // (BT)
    Mix mix;                    // only in dN: λ x + μ x0
    Rotary rotary;              // only in dN
    ValueEmbed embed;           // only in every second layer of dN
};

struct Model {
    Config config;
    int B, T, recompute;
    Table table;
    cudaStream_t stream;
    floatX* parameters;                     // all of them, on each rank
    float* gradients;                       // likewise
    float *masters, *m, *v;                 // of this rank's part of each bucket
    Part* parts;                            // what this rank owns of each bucket
    MuonWorkspace muon;

    LayerActivations* layers;
    floatX *x_last, *ln_f;                  // (BT, C) the stream after all layers, and its norm
    float *ln_f_mean, *ln_f_rstd;           // (BT)
    floatX* logits;                         // (HEAD_ROWS, Vp)
    float* losses;                          // (BT), in nats
    double* loss_sum;
    int *inputs, *targets;                  // (BT)
    int* index;                             // (3 BT + 1) the three arrays of a TokenIndex

    floatX *branch, *dbranch;               // (BT, C) what a branch adds to the stream
    floatX* dx;                             // (BT, C) the gradient of the residual stream
    floatX* dwide;                          // (BT, 4C) dact and dfc; later dqkv, then dembed
    float *partials, *delta, *square_sums;  // workspace: sums over rows, attention, gradient_norm

    Fp8Linear* fp8;                         // (L, 4) only with --fp8 1: of each layer's matrices
    unsigned* fp8_largest;                  // (L, 4, 3) what they measure

    // Only in dN, where x0 is layers[0].x
    floatX *s, *dx0, *dmiddle;              // (BT, C) s as in §5, d x0, and backout's gradient
    float *x0_rstd, *dgate;                 // (BT), (BT, NH)
    Mix backout;                            // what the last norm subtracts from the stream
};

const int HEAD_ROWS = 16384;                // tokens whose logits are in memory at the same time

// Where a tensor's parameters, or its gradients, are. `which` is a number of the tensor table.

static floatX* global_parameter(Model* model, int which) {
    return model->parameters + model->table.tensors[which].offset;
}
static float* global_gradient(Model* model, int which) {
    return model->gradients + model->table.tensors[which].offset;
}
static int64_t layer_offset(Model* model, int layer, int which) {
    return model->table.tensors[model->table.layer_tensors[layer] + which].offset;
}

// Upper bounds in bytes: *row for the activations of one row, *fixed for everything else
static void memory_bytes(Config config, int T, int recompute, int world_size, double* fixed,
                         double* row, bool fp8 = false) {
    double C = config.n_embd;
    double L = config.n_layer;
    double N = make_table(config, world_size).size;
    const double widths[] = {16, 12, 10};       // allocate_layer, in (BT, C), by recompute
    double width = widths[min(recompute, 2)];
    if (fp8) { width += recompute < 1 ? -1.5 : 0.5; }           // allocate_layer and allocate_fp8
    *row = T * (sizeof(floatX) * C * (width * L + 18) + 4 * (4 * config.n_head + 4) * (L + 1));
    *fixed = N * (sizeof(floatX) + 4 + 12.0 / world_size) + WORKSPACE_BYTES +
             (double)HEAD_ROWS * padded_vocab(config) * sizeof(floatX);
    if (config.modern) { *fixed += 14 * C * C * sizeof(floatX); }       // Muon's workspace
    if (fp8) {                                          // allocate_fp8
        *fixed += 24 * L * C * C;
        *row += T * C * 16;
    }
}

static floatX* allocate_x(int64_t n) { return (floatX*)allocate(n * sizeof(floatX)); }
static float* allocate_float(int64_t n) { return (float*)allocate(n * sizeof(float)); }
static int* allocate_int(int64_t n) { return (int*)allocate(n * sizeof(int)); }

static AttentionSizes attention_sizes(const Model* model, int l) {
    Config config = model->config;
    float sharpness = config.modern ? 1.2f * 1.2f : 1.0f;       // dN multiplies q and k by 1.2
    return {model->B, model->T, config.n_head, config.n_embd / config.n_head,
            min(config.window(l), model->T), sharpness};
}

// --recompute 1 computes act again in the backward pass; --recompute 2 also the outputs of the
// norms. What is computed again has memory in the first layer only, which all layers share. With
// --fp8 1 that is so for all that the backward pass needs in 8 bits alone (allocate_fp8).
static void allocate_layer(Model* model, int l) {
    int64_t BT = (int64_t)model->B * model->T;
    int64_t C = model->config.n_embd;
    LayerActivations* a = &model->layers[l];
    *a = model->layers[0];                  // shares what is not allocated below
    a->x = allocate_x(BT * C);
    a->qkv = allocate_x(BT * 3 * C);
    a->y = allocate_x(BT * C);
    a->x_mid = allocate_x(BT * C);
    a->fc = allocate_x(BT * 4 * C);
    bool fp8 = model->fp8 != NULL;
    if (l == 0 || (model->recompute < 1 && !fp8)) { a->act = allocate_x(BT * 4 * C); }
    if (l == 0 || model->recompute < 2) { a->ln_1 = allocate_x(BT * C); }
    if (l == 0 || (model->recompute < 2 && !fp8)) { a->ln_2 = allocate_x(BT * C); }
    a->lse = allocate_float(BT * model->config.n_head);
    a->ln_1_mean = allocate_float(BT);
    a->ln_1_rstd = allocate_float(BT);
    a->ln_2_mean = allocate_float(BT);
    a->ln_2_rstd = allocate_float(BT);
}

static void allocate_activations(Model* model) {
    Config config = model->config;
    int64_t BT = (int64_t)model->B * model->T;
    int64_t C = config.n_embd;
    model->layers = (LayerActivations*)calloc(config.n_layer, sizeof(LayerActivations));
    for (int l = 0; l < config.n_layer; l++) { allocate_layer(model, l); }
    model->x_last = allocate_x(BT * C);
    model->ln_f = allocate_x(BT * C);
    model->ln_f_mean = allocate_float(BT);
    model->ln_f_rstd = allocate_float(BT);
    model->logits = allocate_x(min(BT, (int64_t)HEAD_ROWS) * padded_vocab(config));
    model->losses = allocate_float(BT);
    model->loss_sum = (double*)allocate(sizeof(double));
    model->inputs = allocate_int(BT);
    model->targets = allocate_int(BT);
    model->index = allocate_int(3 * BT + 1);
    model->branch = allocate_x(BT * C);
    model->dbranch = allocate_x(BT * C);
    model->dx = allocate_x(BT * C);
    model->dwide = allocate_x(BT * 4 * C);
    model->partials = allocate_float(2 * max(NORM_PARTIALS * C, (int64_t)RMS_PARTIALS));
    model->delta = allocate_float(BT * config.n_head);
    model->square_sums = allocate_float((int64_t)model->table.n_buckets * NORM_BLOCKS);
}

// The cosines and sines (T, half) by which §7 turns q and k; half is HS/2
static Rotary make_rotary(int T, int half) {
    size_t bytes = sizeof(float) * T * half;
    Rotary rotary = {.cosines = allocate_float(T * half), .sines = allocate_float(T * half)};
    float* cosines = (float*)malloc(bytes);
    float* sines = (float*)malloc(bytes);
    for (int i = 0; i < T * half; i++) {
        float angle = i / half * powf(100000.0f, -(float)(i % half) / half);
        cosines[i] = cosf(angle);
        sines[i] = sinf(angle);
    }
    CHECK_CUDA(cudaMemcpy(rotary.cosines, cosines, bytes, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMemcpy(rotary.sines, sines, bytes, cudaMemcpyHostToDevice));
    free(cosines);
    free(sines);
    return rotary;
}

// Sets up what only dN has: the mix of each layer, rotary positions and value embeddings, backout,
// and Muon's workspace.
static void allocate_modern(Model* model) {
    Config config = model->config;
    int64_t BT = (int64_t)model->B * model->T;
    int64_t C = config.n_embd;
    int64_t NH = config.n_head;
    int L = config.n_layer;
    Rotary rotary = make_rotary(model->T, C / NH / 2);
    floatX* x0 = model->layers[0].x;
    auto scalars = [&](int which) { return model->masters + model->parts[which].state; };
    for (int l = 0; l < L; l++) {
        LayerActivations* a = &model->layers[l];
        a->mix = {x0, scalars(RESID_SCALARS) + l, scalars(X0_SCALARS) + l, 1.0f};
        a->rotary = {rotary.cosines, rotary.sines, allocate_float(BT * 2 * NH)};
        if (!config.has_value_embed(l)) { continue; }
        a->embed = {.table = model->parameters + layer_offset(model, l, VALUE_EMBED),
                    .gate_weight = model->parameters + layer_offset(model, l, VALUE_GATE),
                    .n = a->ln_1, .tokens = model->inputs, .gate = allocate_float(BT * NH)};
    }
    floatX* after_middle = L / 2 + 1 < L ? model->layers[L / 2 + 1].x : model->x_last;
    model->backout = {.e = after_middle, .mu = scalars(BACKOUT_SCALAR), .sign = -1.0f};
    model->s = allocate_x(BT * C);
    model->dx0 = allocate_x(BT * C);
    model->dmiddle = allocate_x(BT * C);
    model->x0_rstd = allocate_float(BT);
    model->dgate = allocate_float(BT * NH);
    model->muon = {.x = allocate_x(4 * C * C), .next = allocate_x(4 * C * C),
                   .a = allocate_x(3 * C * C), .b = allocate_x(3 * C * C),
                   .sums = allocate_float(4 * C)};
}

// Sets up the 8-bit operands. x.columns are kept for the backward pass, or, if --recompute computes
// x again, have memory in the first layer only. What only the next matmul reads has memory once:
// x.rows, dy.rows and dy.columns.
static void allocate_fp8(Model* model) {
    int64_t BT = (int64_t)model->B * model->T;
    int64_t C = model->config.n_embd;
    int n = model->config.n_layer * 4;
    auto allocate_8 = [](int64_t size) { return (uint8_t*)allocate(size); };
    uint8_t* rows = allocate_8(BT * 4 * C);
    uint8_t* columns = allocate_8(BT * 4 * C);
    unsigned* largest = (unsigned*)allocate(3 * n * sizeof(unsigned));
    float* scale = allocate_float(3 * n);
    Fp8Linear* fp8 = (Fp8Linear*)calloc(n, sizeof(Fp8Linear));
    model->fp8 = fp8;
    model->fp8_largest = largest;
    for (int i = 0; i < n; i++) {
        int l = i / 4;
        int which = i % 4;
        Tensor w = model->table.tensors[model->table.layer_tensors[l] + which];
        int64_t size = (int64_t)w.rows * w.columns;
        bool x_is_norm = which == ATTN_W || which == FC_W;
        bool x_again = (x_is_norm && model->recompute >= 2) ||
                       (which == FC_PROJ_W && model->recompute >= 1);
        uint8_t* x_columns = l > 0 && x_again ? fp8[which].x.columns : allocate_8(BT * w.rows);
        // dqkv comes from attention; backout adds to the gradient of the stream after the middle
        bool is_middle = model->config.modern && which == FC_PROJ_W &&
                         l == model->config.n_layer / 2;
        bool dy_measured = which != ATTN_W && !is_middle;
        fp8[i].x = {rows, x_columns, largest + 3 * i, scale + 3 * i, x_is_norm};
        fp8[i].w = {allocate_8(size), allocate_8(size), largest + 3 * i + 1, scale + 3 * i + 1};
        fp8[i].dy = {rows, columns, largest + 3 * i + 2, scale + 3 * i + 2, dy_measured};
    }
}

// The 8-bit operands of a layer's matrix `which`, or NULL. Evaluations multiply in bf16.
static const Fp8Linear* in_8_bits(const Model* model, int l, int which, bool train) {
    return train && model->fp8 != NULL ? &model->fp8[4 * l + which] : NULL;
}

// Where to leave the largest magnitude of the gradient of the stream after layer l
static unsigned* largest_of_stream(const Model* model, int l) {
    return l < 0 ? NULL : largest_dy(in_8_bits(model, l, FC_PROJ_W, true));
}

// act = GELU or ReLU² of fc. If a matmul in 8 bits reads it, it goes straight to fp8->x.
template <class Activation>
static void activate(const Model* model, LayerActivations* a, const Fp8Linear* fp8) {
    int BT = model->B * model->T;
    int width = 4 * model->config.n_embd;
    if (fp8 != NULL) {
        fp8_quantise<__NV_E4M3, Activation>(fp8->x, a->fc, BT, width, model->stream);
    } else {
        activation_forward<Activation>(a->act, a->fc, (int64_t)BT * width, model->stream);
    }
}

// For --recompute 2, after the norms were computed again: their outputs in 8 bits
static void quantise_norms(const Model* model, int l) {
    const LayerActivations* a = &model->layers[l];
    int BT = model->B * model->T;
    int C = model->config.n_embd;
    if (model->fp8 == NULL) { return; }
    fp8_quantise<__NV_E4M3>(model->fp8[4 * l + ATTN_W].x, a->ln_1, BT, C, model->stream);
    fp8_quantise<__NV_E4M3>(model->fp8[4 * l + FC_W].x, a->ln_2, BT, C, model->stream);
}

// Every tensor is measured anew.
static void forget_largest(Model* model) {
    size_t bytes = model->config.n_layer * 12 * sizeof(unsigned);
    CHECK_CUDA(cudaMemsetAsync(model->fp8_largest, 0, bytes, model->stream));
}

// Rounds all matrices of the layers to 8 bits, once a step.
static void quantise_weights(Model* model) {
    forget_largest(model);
    for (int l = 0; l < model->config.n_layer; l++) {
        for (int which = ATTN_W; which <= FC_PROJ_W; which++) {
            Tensor w = model->table.tensors[model->table.layer_tensors[l] + which];
            fp8_quantise<__NV_E4M3>(model->fp8[4 * l + which].w, model->parameters + w.offset,
                                    w.rows, w.columns, model->stream);
        }
    }
}

static Model make_model(Config config, int B, int T, int recompute, Ranks* ranks,
                        bool fp8 = false) {
    Model model = {};
    model.config = config;
    model.B = B;
    model.T = T;
    model.recompute = recompute;
    model.table = make_table(config, ranks->world_size);
    model.parts = make_parts(model.table, ranks->rank, ranks->world_size);
    Part all = model.parts[model.table.n_buckets];
    CHECK_CUDA(cudaStreamCreateWithFlags(&model.stream, cudaStreamNonBlocking));
    model.parameters = allocate_x(model.table.size);
    model.gradients = allocate_float(model.table.size);
    model.masters = allocate_float(all.state);
    model.m = allocate_float(all.state);
    model.v = allocate_float(all.v);
    if (fp8) { allocate_fp8(&model); }
    allocate_activations(&model);
    if (config.modern) { allocate_modern(&model); }
    start_cublas();
    CHECK_CUDA(cudaDeviceSynchronize());        // all zeros are written before a stream uses them
    return model;
}

// GPT-2's layer. In: the stream. Without a branch it is a->x. With a branch it is the previous
// layer's x_mid plus the branch, and the first norm writes it to a->x. Out: a->x_mid and
// model->branch, whose sum is the stream after the layer.
static void layer_forward(Model* model, int l, const floatX* branch, bool train) {
    LayerActivations* a = &model->layers[l];
    AttentionSizes sizes = attention_sizes(model, l);
    int C = model->config.n_embd;
    int BT = model->B * model->T;
    cudaStream_t stream = model->stream;
    auto p = [&](int which) { return model->parameters + layer_offset(model, l, which); };
    auto fp8 = [&](int which) { return in_8_bits(model, l, which, train); };
    const floatX* before = branch != NULL ? model->layers[l - 1].x_mid : a->x;
    layernorm_forward({.a = before, .b = branch, .weight = p(LN_1_W), .bias = p(LN_1_B),
                       .x = a->x, .out = a->ln_1, .mean = a->ln_1_mean, .rstd = a->ln_1_rstd,
                       .largest = largest_x(fp8(ATTN_W)), .BT = BT, .C = C},
                      stream);
    linear_forward(a->qkv, a->ln_1, p(ATTN_W), p(ATTN_B), {BT, C, 3 * C}, stream, fp8(ATTN_W));
    attention_forward(a->y, a->lse, a->qkv, sizes, stream);
    linear_forward(model->branch, a->y, p(ATTN_PROJ_W), p(ATTN_PROJ_B), {BT, C, C}, stream,
                   fp8(ATTN_PROJ_W));
    layernorm_forward({.a = a->x, .b = model->branch, .weight = p(LN_2_W), .bias = p(LN_2_B),
                       .x = a->x_mid, .out = a->ln_2, .mean = a->ln_2_mean, .rstd = a->ln_2_rstd,
                       .largest = largest_x(fp8(FC_W)), .BT = BT, .C = C}, stream);
    if (fp8(FC_W) == NULL) {
        linear_gelu_forward(a->act, a->fc, a->ln_2, p(FC_W), p(FC_B), {BT, C, 4 * C}, stream);
    } else {
        linear_forward(a->fc, a->ln_2, p(FC_W), p(FC_B), {BT, C, 4 * C}, stream, fp8(FC_W));
        activate<Gelu>(model, a, fp8(FC_PROJ_W));
    }
    const floatX* act = fp8(FC_PROJ_W) == NULL ? a->act : NULL;
    linear_forward(model->branch, act, p(FC_PROJ_W), p(FC_PROJ_B), {BT, 4 * C, C}, stream,
                   fp8(FC_PROJ_W));
}

// The backward pass of layer_forward. model->dx is, in: the gradient of the stream after the layer;
// out: of the stream before it.
static void layer_backward(Model* model, int l) {
    LayerActivations* a = &model->layers[l];
    AttentionSizes sizes = attention_sizes(model, l);
    int C = model->config.n_embd;
    int BT = model->B * model->T;
    cudaStream_t stream = model->stream;
    floatX *dx = model->dx, *dbranch = model->dbranch, *dwide = model->dwide;
    float* partials = model->partials;
    auto p = [&](int which) { return model->parameters + layer_offset(model, l, which); };
    auto fp8 = [&](int which) { return in_8_bits(model, l, which, true); };
    auto d = [&](int which) { return model->gradients + layer_offset(model, l, which); };
    if (model->recompute >= 1) { activate<Gelu>(model, a, fp8(FC_PROJ_W)); }
    if (model->recompute >= 2) {
        layernorm_forward({.a = a->x, .weight = p(LN_1_W), .bias = p(LN_1_B), .out = a->ln_1,
                           .mean = a->ln_1_mean, .rstd = a->ln_1_rstd, .BT = BT, .C = C}, stream);
        layernorm_forward({.a = a->x_mid, .weight = p(LN_2_W), .bias = p(LN_2_B), .out = a->ln_2,
                           .mean = a->ln_2_mean, .rstd = a->ln_2_rstd, .BT = BT, .C = C}, stream);
        quantise_norms(model, l);
    }
    linear_backward_weight(d(FC_PROJ_W), d(FC_PROJ_B), partials, a->act, dx, {BT, 4 * C, C},
                           stream, fp8(FC_PROJ_W));
    if (fp8(FC_W) == NULL) {
        linear_gelu_backward_input(dwide, dx, p(FC_PROJ_W), a->fc, {BT, 4 * C, C}, stream);
    } else {
        linear_backward_input(dwide, dx, p(FC_PROJ_W), {BT, 4 * C, C}, stream, fp8(FC_PROJ_W));
        activation_backward<Gelu>(dwide, a->fc, (int64_t)BT * 4 * C, stream,
                                  largest_dy(fp8(FC_W)));
    }
    linear_backward_weight(d(FC_W), d(FC_B), partials, a->ln_2, dwide, {BT, C, 4 * C}, stream,
                           fp8(FC_W));
    linear_backward_input(dbranch, dwide, p(FC_W), {BT, C, 4 * C}, stream, fp8(FC_W));
    layernorm_backward({.dout = dbranch, .x = a->x_mid, .weight = p(LN_2_W), .mean = a->ln_2_mean,
                        .rstd = a->ln_2_rstd, .dx = dx, .dweight = d(LN_2_W), .dbias = d(LN_2_B),
                        .partials = partials,
                        .largest = largest_dy(fp8(ATTN_PROJ_W)), .BT = BT, .C = C},
                       stream);
    linear_backward_weight(d(ATTN_PROJ_W), d(ATTN_PROJ_B), partials, a->y, dx, {BT, C, C}, stream,
                           fp8(ATTN_PROJ_W));
    linear_backward_input(dbranch, dx, p(ATTN_PROJ_W), {BT, C, C}, stream, fp8(ATTN_PROJ_W));
    attention_backward(dwide, model->delta, dbranch, a->y, a->lse, a->qkv, {}, sizes, stream);
    linear_backward_weight(d(ATTN_W), d(ATTN_B), partials, a->ln_1, dwide, {BT, C, 3 * C}, stream,
                           fp8(ATTN_W));
    linear_backward_input(dbranch, dwide, p(ATTN_W), {BT, C, 3 * C}, stream, fp8(ATTN_W));
    layernorm_backward({.dout = dbranch, .x = a->x, .weight = p(LN_1_W), .mean = a->ln_1_mean,
                        .rstd = a->ln_1_rstd, .dx = dx, .dweight = d(LN_1_W), .dbias = d(LN_1_B),
                        .partials = partials, .largest = largest_of_stream(model, l - 1),
                        .BT = BT, .C = C}, stream);
}

// dN's layer, in which s = λ x + μ x0 takes the place of x. The first layer finds x in a->x. In the
// others, the first norm adds the branch to the previous layer's x_mid and writes x.
static void modern_layer_forward(Model* model, int l, bool train) {
    LayerActivations* a = &model->layers[l];
    AttentionSizes sizes = attention_sizes(model, l);
    int C = model->config.n_embd;
    int BT = model->B * model->T;
    cudaStream_t stream = model->stream;
    floatX *s = model->s, *branch = model->branch;
    auto p = [&](int which) { return model->parameters + layer_offset(model, l, which); };
    auto fp8 = [&](int which) { return in_8_bits(model, l, which, train); };
    RmsNormForward ln_1 = {.a = a->x, .mix = a->mix, .s = s, .out = a->ln_1, .rstd = a->ln_1_rstd,
                           .largest = largest_x(fp8(ATTN_W)), .BT = BT, .C = C};
    if (l > 0) {
        ln_1.a = model->layers[l - 1].x_mid;
        ln_1.b = branch;
        ln_1.x = a->x;
    }
    rmsnorm_forward(ln_1, stream);
    linear_forward(a->qkv, a->ln_1, p(ATTN_W), NULL, {BT, C, 3 * C}, stream, fp8(ATTN_W));
    rotary_forward(a->qkv, a->rotary, a->embed, sizes, stream);
    attention_forward(a->y, a->lse, a->qkv, sizes, stream);
    linear_forward(branch, a->y, p(ATTN_PROJ_W), NULL, {BT, C, C}, stream, fp8(ATTN_PROJ_W));
    rmsnorm_forward({.a = s, .b = branch, .x = a->x_mid, .out = a->ln_2, .rstd = a->ln_2_rstd,
                     .largest = largest_x(fp8(FC_W)), .BT = BT, .C = C}, stream);
    linear_forward(a->fc, a->ln_2, p(FC_W), NULL, {BT, C, 4 * C}, stream, fp8(FC_W));
    activate<Relu2>(model, a, fp8(FC_PROJ_W));
    const floatX* act = fp8(FC_PROJ_W) == NULL ? a->act : NULL;
    linear_forward(branch, act, p(FC_PROJ_W), NULL, {BT, 4 * C, C}, stream, fp8(FC_PROJ_W));
}

// The backward pass of modern_layer_forward. model->dx is, in: the gradient of the stream after the
// layer; out: of x. To model->dx0 it adds the gradient of x0.
static void modern_layer_backward(Model* model, int l, TokenIndex index) {
    LayerActivations* a = &model->layers[l];
    AttentionSizes sizes = attention_sizes(model, l);
    int C = model->config.n_embd;
    int BT = model->B * model->T;
    cudaStream_t stream = model->stream;
    floatX *dx = model->dx, *dbranch = model->dbranch, *dwide = model->dwide;
    floatX* dembed = dwide + (int64_t)BT * 3 * C;       // follows dqkv
    float* partials = model->partials;
    auto p = [&](int which) { return model->parameters + layer_offset(model, l, which); };
    auto fp8 = [&](int which) { return in_8_bits(model, l, which, true); };
    auto d = [&](int which) { return model->gradients + layer_offset(model, l, which); };
    auto backward_weight = [&](int which, floatX* x, floatX* dy, LinearSizes n) {
        linear_backward_weight(d(which), NULL, partials, x, dy, n, stream, fp8(which));
    };
    if (model->recompute >= 1) { activate<Relu2>(model, a, fp8(FC_PROJ_W)); }
    if (model->recompute >= 2) {
        rmsnorm_forward({.a = a->x, .mix = a->mix, .out = a->ln_1, .rstd = a->ln_1_rstd, .BT = BT,
                         .C = C}, stream);
        rmsnorm_forward({.a = a->x_mid, .out = a->ln_2, .rstd = a->ln_2_rstd, .BT = BT, .C = C},
                        stream);
        quantise_norms(model, l);
    }
    backward_weight(FC_PROJ_W, a->act, dx, {BT, 4 * C, C});
    linear_backward_input(dwide, dx, p(FC_PROJ_W), {BT, 4 * C, C}, stream, fp8(FC_PROJ_W));
    activation_backward<Relu2>(dwide, a->fc, (int64_t)BT * 4 * C, stream,
                               largest_dy(fp8(FC_W)));
    backward_weight(FC_W, a->ln_2, dwide, {BT, C, 4 * C});
    linear_backward_input(dbranch, dwide, p(FC_W), {BT, C, 4 * C}, stream, fp8(FC_W));
    rmsnorm_backward({.dout = dbranch, .x = a->x_mid, .rstd = a->ln_2_rstd, .dx = dx,
                      .largest = largest_dy(fp8(ATTN_PROJ_W)), .BT = BT, .C = C},
                     stream);
    backward_weight(ATTN_PROJ_W, a->y, dx, {BT, C, C});
    linear_backward_input(dbranch, dx, p(ATTN_PROJ_W), {BT, C, C}, stream, fp8(ATTN_PROJ_W));
    attention_backward(dwide, model->delta, dbranch, a->y, a->lse, a->qkv, a->rotary, sizes,
                       stream);
    rotary_backward(dwide, a->qkv, a->rotary, sizes, stream);
    backward_weight(ATTN_W, a->ln_1, dwide, {BT, C, 3 * C});
    linear_backward_input(dbranch, dwide, p(ATTN_W), {BT, C, 3 * C}, stream, fp8(ATTN_W));
    if (a->embed.table != NULL) {
        value_embed_backward(dembed, model->dgate, dwide, a->embed, sizes, stream);
        wte_backward(d(VALUE_EMBED), dembed, index, BT, C, stream);
        gate_backward(dbranch, d(VALUE_GATE), partials, model->dgate, a->embed, sizes, stream);
    }
    rmsnorm_backward({.dout = dbranch, .x = a->x, .rstd = a->ln_1_rstd, .mix = a->mix, .dx = dx,
                      .de = model->dx0, .dlambda = global_gradient(model, RESID_SCALARS) + l,
                      .dmu = global_gradient(model, X0_SCALARS) + l, .partials = partials,
                      .largest = largest_of_stream(model, l - 1), .BT = BT, .C = C}, stream);
}

// Head and loss, for HEAD_ROWS tokens at a time, so that memory never holds all logits. Out: losses
// (BT). With `train`, the gradient of the logits overwrites them; dbranch = d ln_f, and the
// gradient of the head's weight (in GPT-2 it is wte) is added to.
static void head(Model* model, bool train) {
    int C = model->config.n_embd;
    int V = model->config.vocab_size;
    int Vp = padded_vocab(model->config);
    int BT = model->B * model->T;
    int threads = min(512, ceil_div(Vp, PACK * WARP) * WARP);
    int tensor = model->config.modern ? (int)LM_HEAD : (int)WTE;
    floatX *weight = global_parameter(model, tensor), *logits = model->logits;
    cudaStream_t stream = model->stream;
    for (int first = 0; first < BT; first += HEAD_ROWS) {
        int rows = min(HEAD_ROWS, BT - first);
        floatX* x = model->ln_f + (int64_t)first * C;
        floatX* dx = model->dbranch + (int64_t)first * C;
        matmul(logits, weight, x, {.m = Vp, .n = rows, .k = C, .transpose = TRANSPOSE_A}, stream);
        double bytes = (train ? 2.0 : 1.0) * rows * Vp * sizeof(floatX);
        launch({"classifier", bytes}, {rows, threads, stream}, classifier_kernel, logits,
               model->losses + first, model->targets + first, 1.0f / BT, model->config.softcap, V,
               Vp, train);
        if (!train) { continue; }
        matmul(dx, weight, logits, {.m = C, .n = rows, .k = Vp}, stream);
        Matmul to_weight = {.m = C, .n = Vp, .k = rows, .transpose = TRANSPOSE_B,
                            .accumulate = true};
        matmul(global_gradient(model, tensor), x, logits, to_weight, stream);
    }
}

// *model->loss_sum += Σ losses
static void sum_losses(Model* model) {
    int BT = model->B * model->T;
    launch({"loss_sum", 4.0 * BT}, {1, 256, model->stream}, loss_sum_kernel, model->loss_sum,
           model->losses, BT);
}

static void gpt2_forward(Model* model, bool train) {
    int C = model->config.n_embd;
    int L = model->config.n_layer;
    int BT = model->B * model->T;
    embedding_forward(model->layers[0].x, model->inputs, global_parameter(model, WTE),
                      global_parameter(model, WPE), model->B, model->T, C, model->stream);
    for (int l = 0; l < L; l++) {
        layer_forward(model, l, l > 0 ? model->branch : NULL, train);
    }
    layernorm_forward({.a = model->layers[L - 1].x_mid, .b = model->branch,
                       .weight = global_parameter(model, LN_F_W),
                       .bias = global_parameter(model, LN_F_B), .x = model->x_last,
                       .out = model->ln_f, .mean = model->ln_f_mean, .rstd = model->ln_f_rstd,
                       .BT = BT, .C = C}, model->stream);
}

// The stream begins with x0, the normalised embedding. The last norm first subtracts the stream
// after the middle layer, times a learned number (backout).
static void modern_forward(Model* model, bool train) {
    int C = model->config.n_embd;
    int L = model->config.n_layer;
    int BT = model->B * model->T;
    rmsnorm_forward({.a = global_parameter(model, WTE), .tokens = model->inputs,
                     .out = model->layers[0].x, .rstd = model->x0_rstd, .BT = BT, .C = C},
                    model->stream);
    for (int l = 0; l < L; l++) { modern_layer_forward(model, l, train); }
    rmsnorm_forward({.a = model->layers[L - 1].x_mid, .b = model->branch, .mix = model->backout,
                     .x = model->x_last, .out = model->ln_f, .rstd = model->ln_f_rstd, .BT = BT,
                     .C = C}, model->stream);
}

// inputs, targets → losses
static void forward(Model* model, bool train) {
    if (train && model->fp8 != NULL) { forget_largest(model); }
    if (model->config.modern) {
        modern_forward(model, train);
    } else {
        gpt2_forward(model, train);
    }
    head(model, train);
}

// Sums the gradients of buckets first … end - 1 over the ranks; each sum goes to its owner (§11).
static void send_gradients(Model* model, Ranks* ranks, int first, int end) {
    for (int i = first; i < end; i++) {
        Bucket bucket = model->table.buckets[i];
        reduce(ranks, model->gradients + bucket.offset, bucket.size, bucket.owner, model->stream);
    }
}

static void zero(floatX* matrix, int64_t n, cudaStream_t stream) {
    CHECK_CUDA(cudaMemsetAsync(matrix, 0, n * sizeof(floatX), stream));
}

// The backward pass of gpt2_forward. It calls layer_is_done(l) after the backward pass of layer l.
template <class Callback>
static void gpt2_backward(Model* model, TokenIndex index, Callback layer_is_done) {
    int C = model->config.n_embd;
    int BT = model->B * model->T;
    cudaStream_t stream = model->stream;
    zero(model->dx, (int64_t)BT * C, stream);
    layernorm_backward({.dout = model->dbranch, .x = model->x_last,
                        .weight = global_parameter(model, LN_F_W), .mean = model->ln_f_mean,
                        .rstd = model->ln_f_rstd, .dx = model->dx,
                        .dweight = global_gradient(model, LN_F_W),
                        .dbias = global_gradient(model, LN_F_B), .partials = model->partials,
                        .largest = largest_of_stream(model, model->config.n_layer - 1), .BT = BT,
                        .C = C}, stream);
    for (int l = model->config.n_layer - 1; l >= 0; l--) {
        layer_backward(model, l);
        layer_is_done(l);
    }
    wte_backward(global_gradient(model, WTE), model->dx, index, BT, C, stream);
    wpe_backward(global_gradient(model, WPE), model->dx, model->B, model->T, C, stream);
}

// The backward pass of modern_forward. dmiddle is the gradient that backout gives to the stream
// after the middle layer. x0 is mixed into each layer (dx0) and also begins the stream (dx), so its
// gradient is dx0 + dx.
template <class Callback>
static void modern_backward(Model* model, TokenIndex index, Callback layer_is_done) {
    int C = model->config.n_embd;
    int L = model->config.n_layer;
    int BT = model->B * model->T;
    int64_t n = (int64_t)BT * C;
    floatX *dx = model->dx, *dx0 = model->dx0, *dmiddle = model->dmiddle;
    cudaStream_t stream = model->stream;
    zero(dx, n, stream);
    zero(dx0, n, stream);
    zero(dmiddle, n, stream);
    rmsnorm_backward({.dout = model->dbranch, .x = model->x_last, .rstd = model->ln_f_rstd,
                      .mix = model->backout, .dx = dx, .de = dmiddle,
                      .dmu = global_gradient(model, BACKOUT_SCALAR), .partials = model->partials,
                      .largest = largest_of_stream(model, L - 1), .BT = BT, .C = C}, stream);
    for (int l = L - 1; l >= 0; l--) {
        if (l == L / 2) { add_to(dx, dmiddle, n, stream); }
        modern_layer_backward(model, l, index);
        layer_is_done(l);
    }
    add_to(dx0, dx, n, stream);
    zero(dx, n, stream);
    rmsnorm_backward({.dout = dx0, .x = global_parameter(model, WTE), .tokens = model->inputs,
                      .rstd = model->x0_rstd, .dx = dx, .BT = BT, .C = C}, stream);
    wte_backward(global_gradient(model, WTE), dx, index, BT, C, stream);
}

// Adds the gradients of this micro-batch to all gradients; call it after forward(model, true).
// n_groups is that of the TokenIndex in model->index. In the last micro-step, each bucket is sent
// to its owner as soon as its gradients are complete.
static void backward(Model* model, int n_groups, bool last_micro_step, Ranks* ranks) {
    int BT = model->B * model->T;
    const int* of_layer = model->table.layer_buckets;
    TokenIndex index = {.positions = model->index, .starts = model->index + BT,
                        .tokens = model->index + 2 * BT + 1, .n_groups = n_groups};
    auto send_layer = [&](int l) {
        if (last_micro_step) { send_gradients(model, ranks, of_layer[l], of_layer[l + 1]); }
    };
    if (model->config.modern) {
        modern_backward(model, index, send_layer);
    } else {
        gpt2_backward(model, index, send_layer);
    }
    if (last_micro_step) { send_gradients(model, ranks, 0, of_layer[0]); }
}

// The norm of the gradients, averaged over micro-steps and ranks. If every rank owns a bucket, only
// rank 0 counts it.
static double gradient_norm(Model* model, Ranks* ranks, int grad_accum_steps) {
    int n = model->table.n_buckets;
    size_t bytes = sizeof(float) * n * NORM_BLOCKS;
    float* sums = (float*)malloc(bytes);
    cudaStream_t stream = model->stream;
    wait_for_ranks(ranks, stream);
    for (int i = 0; i < n; i++) {
        Part part = model->parts[i];
        bool counted = model->table.buckets[i].owner != EVERY_RANK || ranks->rank == 0;
        launch({"square_sum", 4.0 * part.size}, {NORM_BLOCKS, 256, stream}, square_sum_kernel,
               model->square_sums + i * NORM_BLOCKS, model->gradients + part.first,
               counted ? part.size : 0);
    }
    CHECK_CUDA(cudaMemcpyAsync(sums, model->square_sums, bytes, cudaMemcpyDeviceToHost, stream));
    CHECK_CUDA(cudaStreamSynchronize(stream));
    double sum = 0.0;
    for (int i = 0; i < n * NORM_BLOCKS; i++) { sum += sums[i]; }
    free(sums);
    ranks_sum(ranks, &sum, 1);
    return sqrt(sum) / grad_accum_steps / ranks->world_size;
}

static void zero_gradients(Model* model) {
    Work work = {"zero_gradients", 4.0 * model->table.size};
    begin_work(work, model->stream);
    CHECK_CUDA(cudaMemsetAsync(model->gradients, 0, model->table.size * sizeof(float),
                               model->stream));
    end_work(work, model->stream);
}

// The settings of one step. decay_scale multiplies both the weight decay of each AdamGroup and
// muon_decay, the weight decay of Muon. `steps` is the number of this step, from 1.
struct Update { double lr, grad_scale, momentum, decay_scale, muon_decay; int steps; };

// What this rank owns of a bucket
static Slice slice_of(Model* model, Part part) {
    return {.parameters = model->parameters + part.first, .masters = model->masters + part.state,
            .m = model->m + part.state, .v = model->v + part.v,
            .gradients = model->gradients + part.first, .n = part.size, .index = part.first};
}

static void adamw_update(Model* model, Bucket bucket, Part part, Update update) {
    AdamGroup group = bucket.adam;
    AdamStep adam = {.group = group,
                     .lr = (float)update.lr * group.lr,
                     .decay = (float)update.decay_scale * group.weight_decay,
                     .grad_scale = (float)update.grad_scale,
                     .correction_1 = (float)(1 - pow(group.beta_1, update.steps)),
                     .correction_2 = (float)(1 - pow(group.beta_2, update.steps)),
                     .step = (unsigned)update.steps};
    launch({"adamw", (28.0 + sizeof(floatX)) * part.size},
           one_thread_each(part.size, model->stream), adamw_kernel, slice_of(model, part),
           bucket.decay_end, adam);
}

// In this rank's state, masters and momentum are laid out as the tensors are in their bucket. `v`
// has one number for each line of each tensor.
static void muon_bucket_update(Model* model, Bucket bucket, Part part, Update update) {
    for (int t = bucket.first_tensor; t < bucket.end_tensor; t++) {
        Tensor tensor = model->table.tensors[t];
        int which = t - bucket.first_tensor;
        Matrices matrix = matrices_of(tensor, which);
        float out_by_in = (float)matrix.columns / matrix.rows;
        if (which == VALUE_GATE) { out_by_in = 1 / out_by_in; }     // it is stored (out, in)
        MuonStep muon = {.lr = (float)update.lr * sqrtf(fmaxf(1, out_by_in)),
                         .decay = (float)(update.muon_decay * update.decay_scale),
                         .momentum = (float)update.momentum,
                         .grad_scale = (float)update.grad_scale,
                         .step = (unsigned)update.steps};
        Part of_tensor = {.first = tensor.offset, .size = (int64_t)tensor.rows * tensor.columns,
                          .state = part.state + tensor.offset - bucket.offset, .v = part.v};
        muon_update(slice_of(model, of_tensor), model->muon, matrix, muon, model->stream);
        part.v += matrix.n * matrix.lines();
    }
}

// Each rank sends the parameters of a bucket that it owns to the other ranks.
static void send_parameters(Model* model, Ranks* ranks, Bucket bucket) {
    gather(ranks, model->parameters + bucket.offset, bucket.size * sizeof(floatX), bucket.owner,
           model->stream);
}

// Updates what this rank owns of each bucket, sends it to the others, and zeroes the gradients.
static void optimizer_step(Model* model, Ranks* ranks, Update update) {
    for (int i = 0; i < model->table.n_buckets; i++) {
        Bucket bucket = model->table.buckets[i];
        Part part = model->parts[i];
        if (!bucket.is_muon()) {
            adamw_update(model, bucket, part, update);
        } else if (part.size > 0) {
            muon_bucket_update(model, bucket, part, update);
        }
        send_parameters(model, ranks, bucket);
    }
    wait_for_ranks(ranks, model->stream);
    zero_gradients(model);
}

// Computes the bf16 parameters from the masters, as they were after `steps` updates.
static void restore_parameters(Model* model, Ranks* ranks, int steps) {
    for (int i = 0; i < model->table.n_buckets; i++) {
        Part part = model->parts[i];
        if (part.size > 0) {
            launch({"round_parameters", (4.0 + sizeof(floatX)) * part.size},
                   one_thread_each(part.size, model->stream), round_parameters_kernel,
                   slice_of(model, part), (unsigned)steps);
        }
        send_parameters(model, ranks, model->table.buckets[i]);
    }
    wait_for_ranks(ranks, model->stream);
}

// ---- §14 Files: JSON, safetensors, checkpoints --------------------------------------------------
//
// Reads and writes the files that model.py's load_checkpoint and save_checkpoint read and write, so
// that either trainer continues with the other's models. There is no JSON parser: files of ours and
// of HF's GPT-2 have a known shape, in which searching for a key is enough.

// Opens a file to read it; -1: there is none. Others, like folders and pipes, end the run.
static int open_file(const char* path, struct stat* status) {
    int file = open(path, O_RDONLY | O_NONBLOCK);       // a pipe would wait for a writer
    if (file < 0) { return -1; }
    if (fstat(file, status) != 0 || !S_ISREG(status->st_mode)) {
        die("%s is not a regular file; remove it, and put the file itself there", path);
    }
    return file;
}

// A whole file, followed by zeros, or NULL if there is no such file.
static char* read_file(const char* path, size_t* bytes = NULL) {
    struct stat status = {};
    int number = open_file(path, &status);
    if (number < 0) { return NULL; }
    FILE* file = fdopen(number, "rb");
    size_t size = status.st_size;
    char* text = (char*)calloc(1, size + 64);       // zeros also end a file that was cut short
    if (bytes != NULL) { *bytes = size; }
    if (text == NULL || fread(text, 1, size, file) != size) {
        die("%s cannot be read to its end; check the disk, or copy the file again", path);
    }
    fclose(file);
    return text;
}

// Where in a JSON text the value of the first "key": begins, or NULL. Nesting is ignored: the first
// such key at any depth is taken.
static const char* json_find(const char* text, const char* key) {
    char quoted[96];
    snprintf(quoted, sizeof quoted, "\"%s\"", key);
    const char* at = strstr(text, quoted);
    while (at != NULL) {
        const char* value = at + strlen(quoted);
        value += strspn(value, " \n\t");
        if (*value == ':') { return value + 1 + strspn(value + 1, " \n\t"); }
        at = strstr(at + 1, quoted);        // it was a value like "key", not a key
    }
    return NULL;
}

// A number by its key, or the fallback where the key is missing
static double json_number(const char* text, const char* key, double fallback) {
    const char* value = json_find(text, key);
    return value != NULL ? strtod(value, NULL) : fallback;
}

// Whether n bytes are one JSON object, as far as its brackets show. One that was cut short is not.
static bool is_object(const char* text, size_t n) {
    size_t i = strspn(text, " \r\n\t");
    int depth = 0;
    bool in_string = false;
    if (text[i] != '{') { return false; }
    for (; i < n; i++) {
        char c = text[i];
        if (c == '\0') { return false; }
        if (in_string && c == '\\') { i++; }        // an escaped quote does not end the string
        if (c == '"') { in_string = !in_string; }
        if (in_string) { continue; }
        if (c == '{' || c == '[') { depth++; }
        if (c == '}' || c == ']') { depth--; }
        if (depth == 0) { return i + 1 + strspn(text + i + 1, " \r\n\t") == n; }
    }
    return false;
}

// A file that holds one JSON object, or NULL if there is no such file
static char* read_json(const char* path) {
    size_t bytes = 0;
    char* text = read_file(path, &bytes);
    if (text != NULL && !is_object(text, bytes)) {
        die("%s is damaged: it is not one whole JSON object; copy it again, or remove it", path);
    }
    return text;
}

// An integer by its key. A value that is missing, or is not an integer within bounds, ends the run.
static int64_t json_integer(const char* path, const char* text, const char* key, int64_t least,
                            int64_t most) {
    const char* value = json_find(text, key);
    char* end = NULL;
    if (value == NULL) { value = "nothing"; }
    int64_t found = strtoll(value, &end, 10);
    bool is_integer = end > value && strchr(",} \r\n\t", *end) != NULL;
    if (is_integer && found >= least && found <= most) { return found; }
    die("%s: %s must be an integer from %lld to %lld, got %.*s; copy this file again, or remove it",
        path, key, (long long)least, (long long)most, (int)strcspn(value, ",}\r\n"), value);
}

// folder/name. The strings of the last four calls stay valid.
static const char* joined(const char* folder, const char* name) {
    static char paths[4][4096];
    static int next;
    char* path = paths[next++ % 4];
    if (snprintf(path, sizeof paths[0], "%s/%s", folder, name) >= (int)sizeof paths[0]) {
        die("the path %.60s… has more than 4095 bytes; choose a shorter --out", folder);
    }
    return path;
}

// A folder that cannot be written to is the user's mistake.
[[noreturn]] static void die_uncreated(const char* path) {
    die("%s cannot be written: %s; choose another --out", path, strerror(errno));
}

// The disk is full, nearly always. The half that was written is deleted.
[[noreturn]] static void die_unwritten(const char* path) {
    const char* problem = strerror(errno);
    char part[4200];
    snprintf(part, sizeof part, "%s.part", path);
    unlink(part);
    die("%s cannot be written: %s; free disk space, then continue with --resume (what was saved "
        "before is kept)", path, problem);
}

static void write_all(FILE* file, const void* data, size_t bytes, const char* path) {
    if (fwrite(data, 1, bytes, file) != bytes) { die_unwritten(path); }
}

// A file is written as <path>.part and gets its name when all of it is on the disk, so a reader
// never sees half of a file. create_part begins one, finish ends it.
static FILE* create_part(const char* path) {
    char part[4200];
    snprintf(part, sizeof part, "%s.part", path);
    FILE* file = fopen(part, "wb");
    if (file == NULL) { die_uncreated(path); }
    return file;
}

static void finish(FILE* file, const char* path) {
    char part[4200];
    snprintf(part, sizeof part, "%s.part", path);
    bool is_written = fflush(file) == 0 && !ferror(file) && fsync(fileno(file)) == 0;
    if (!is_written || fclose(file) != 0 || rename(part, path) != 0) { die_unwritten(path); }
    *strrchr(part, '/') = '\0';         // the new name is on the disk once the folder is
    int folder = open(part, O_RDONLY);
    fsync(folder);
    close(folder);
}

// A safetensors file is 8 bytes with a number n, n bytes of JSON, and then the data:
//   {"wpe.weight": {"dtype": "F32", "shape": [1024, 768], "data_offsets": [0, 3145728]}, …}
// Offsets are bytes, counted from where the data begin.
struct SafeTensors {
    const char* path;
    const char* header;         // the JSON, which ends with a zero
    const char* data;           // in the map
    size_t data_size;           // in bytes
    void* map;                  // the whole file
    size_t size;
};

const uint64_t MAX_HEADER_BYTES = 1 << 24;      // a hundred times what GPT-2 XL needs

// Maps the file, so that tensors are read from the disk only when they are used.
static SafeTensors open_safetensors(const char* path) {
    struct stat status = {};
    uint64_t n = 0;
    int file = open_file(path, &status);
    bool is_readable = file >= 0 && read(file, &n, 8) == 8;
    if (!is_readable || n > MAX_HEADER_BYTES || n + 8 > (uint64_t)status.st_size) {
        die("%s is missing or cut short; copy it again, or train it again", path);
    }
    size_t size = status.st_size;
    char* map = (char*)mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, 0);
    if (map == MAP_FAILED) {
        die("%s cannot be mapped into memory: %s; check ulimit -v", path, strerror(errno));
    }
    close(file);
    char* header = (char*)calloc(1, n + 1);
    memcpy(header, map + 8, n);
    return {path, header, map + 8 + n, size - 8 - n, map, size};
}

static void close_safetensors(SafeTensors file) {
    free((void*)file.header);
    munmap(file.map, file.size);
}

// Bytes an element of the types that are read; 0: another type
static int bytes_of_dtype(const char* dtype) {
    if (starts_with(dtype, "\"F32\"")) { return 4; }
    if (starts_with(dtype, "\"BF16\"")) { return 2; }
    return 0;
}

// Copies n values of a tensor as fp32. OpenAI's names lack the "transformer." that others have.
static void read_tensor(SafeTensors file, const char* name, int64_t n, float* values) {
    const char* entry = json_find(file.header, name);
    if (entry == NULL && starts_with(name, "transformer.")) {
        entry = json_find(file.header, name + strlen("transformer."));
    }
    if (entry == NULL) {
        die("%s lacks the tensor %s that config.json asks for; take both files from one checkpoint",
            file.path, name);
    }
    char own[512];                      // the entry without those that follow
    snprintf(own, min(sizeof own, strcspn(entry, "}") + 1), "%s", entry);
    const char* dtype = json_find(own, "dtype");
    const char* offsets = json_find(own, "data_offsets");
    int width = dtype != NULL ? bytes_of_dtype(dtype) : 0;
    unsigned long long begin = 0;
    unsigned long long end = 0;
    bool has_place = offsets != NULL && sscanf(offsets, "[%llu ,%llu", &begin, &end) == 2;
    if (width == 0 || !has_place || begin > end || end > file.data_size ||
        end - begin != (size_t)n * width) {
        die("%s: the tensor %s is cut short, or does not hold the %lld values in F32 or BF16 that "
            "config.json asks for; take both files, complete, from one checkpoint", file.path, name,
            (long long)n);
    }
    const char* data = file.data + begin;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = 0;              // a bf16 is the upper half of an fp32
        memcpy((char*)&bits + 4 - width, data + i * width, width);
        memcpy(&values[i], &bits, 4);
        if (!isfinite(values[i])) {
            die("%s: the tensor %s has values that are not finite numbers; use another checkpoint",
                file.path, name);
        }
    }
}

// Sets masters and parameters from fill(tensor, values, first, end), which writes at least elements
// first … end - 1 of a tensor's values. One bucket at a time is in the CPU's memory. Each rank sets
// the masters of its own part, and receives the parameters from the owners.
template <class Fill> static void set_parameters(Model* model, Ranks* ranks, Fill fill) {
    for (int i = 0; i < model->table.n_buckets; i++) {
        Bucket bucket = model->table.buckets[i];
        Part part = model->parts[i];
        float* values = (float*)calloc(bucket.size, sizeof(float));
        for (int t = bucket.first_tensor; t < bucket.end_tensor; t++) {
            Tensor tensor = model->table.tensors[t];
            int64_t first = max(part.first - tensor.offset, (int64_t)0);
            int64_t end = min(part.first + part.size - tensor.offset, tensor.file_size());
            fill(tensor, values + tensor.offset - bucket.offset, first, end);
        }
        CHECK_CUDA(cudaMemcpy(model->masters + part.state, values + part.first - bucket.offset,
                              part.size * sizeof(float), cudaMemcpyHostToDevice));
        free(values);
    }
    CHECK_CUDA(cudaDeviceSynchronize());        // such a copy may return before it has arrived
    restore_parameters(model, ranks, 0);
}

const uint64_t GOLDEN_RATIO = 0x9E3779B97F4A7C15u;     // 2⁶⁴ over the golden ratio, made odd

// The output function of splitmix64 (Steele, Lea and Flood 2014). It can be inverted, so different
// inputs have different outputs, and each bit of the output depends on every bit of the input.
static uint64_t mix64(uint64_t z) {
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

// A random number in [0, 1) that depends on the seed and its place alone
static double uniform(uint64_t seed, uint64_t place) {
    uint64_t bits = mix64(seed * 0xD1342543DE82EF95u + (place + 1) * GOLDEN_RATIO);
    return (bits >> 11) * 0x1p-53;
}

// A standard normal number, by Box and Muller's formula
static float normal(uint64_t seed, uint64_t place) {
    double radius = sqrt(-2.0 * log(1.0 - uniform(seed, 2 * place)));
    return (float)(radius * cos(2.0 * M_PI * uniform(seed, 2 * place + 1)));
}

// Element i of a tensor; `place` is its number among all elements of the model.
static float first_value(Init init, int64_t i, uint64_t seed, uint64_t place) {
    float value = init.mean + init.step * i;
    if (init.is_uniform) {
        value += init.std * (float)((2.0 * uniform(seed, 2 * place) - 1.0) * sqrt(3.0));
    } else if (init.std != 0) {
        value += init.std * normal(seed, place);
    }
    return value;
}

// Calls task(i) for i from first to end - 1, on up to n_threads threads, each with at least 65,536
// of the numbers.
template <class Task>
static void for_each_in_threads(int64_t first, int64_t end, int n_threads, Task task) {
    n_threads = (int)max(min((int64_t)n_threads, (end - first) / 65536), (int64_t)1);
    int64_t share = ceil_div(end - first, (int64_t)n_threads);
    std::vector<std::thread> threads;
    for (int64_t begin = first; begin < end; begin += share) {
        threads.emplace_back([=] {
            for (int64_t i = begin; i < min(begin + share, end); i++) { task(i); }
        });
    }
    for (std::thread& thread : threads) { thread.join(); }
}

// Begins with the values of the tensor table. A value depends on the seed and its place alone, and
// a place counts elements without padding. So the values have the same bits for any number of
// threads and ranks. A normal number takes a core about 30 ns: 50 s for GPT-2 1558M.
static void initialise(Model* model, Ranks* ranks, int64_t seed) {
    int n_threads = std::thread::hardware_concurrency();        // 0: unknown
    uint64_t place = 0;
    set_parameters(model, ranks, [&](Tensor tensor, float* values, int64_t first, int64_t end) {
        for_each_in_threads(first, end, n_threads, [=](int64_t i) {
            values[i] = first_value(tensor.init, i, seed, place + i);
        });
        place += tensor.file_size();
    });
}

// Begins with the weights of a model.safetensors.
static void load_weights(Model* model, Ranks* ranks, const char* path) {
    SafeTensors file = open_safetensors(path);
    set_parameters(model, ranks, [&](Tensor tensor, float* values, int64_t, int64_t) {
        read_tensor(file, tensor.name, tensor.file_size(), values);
    });
    close_safetensors(file);
}

// How many bytes a character of UTF-8 has that begins with this one; 0: none does
static int utf8_length(uint8_t first) {
    if (first < 0x80) { return 1; }
    if (first < 0xC0) { return 0; }     // a continuation byte
    if (first < 0xE0) { return 2; }
    if (first < 0xF0) { return 3; }
    return 4;
}

// The length of the character at text, of which n bytes are left; 0: it is not valid UTF-8
static int valid_utf8(const char* text, size_t n) {
    const uint32_t LEAST[] = {0, 0, 0x80, 0x800, 0x10000};      // code of so many bytes
    int length = utf8_length(text[0]);
    if (length == 0 || (size_t)length > n) { return 0; }
    uint32_t code = (uint8_t)text[0] & (length == 1 ? 0x7F : 0x7F >> length);
    for (int k = 1; k < length; k++) {
        if ((text[k] & 0xC0) != 0x80) { return 0; }
        code = code << 6 | (text[k] & 0x3F);
    }
    bool is_surrogate = code >> 11 == 0x1B;
    return code < LEAST[length] || code > 0x10FFFF || is_surrogate ? 0 : length;
}

// Text as a JSON string. U+FFFD stands for each byte that is not valid UTF-8.
static void write_json_string(FILE* file, const char* text, size_t n) {
    fputc('"', file);
    size_t i = 0;
    while (i < n) {
        int length = valid_utf8(text + i, n - i);
        uint8_t first = text[i];
        if (length == 0) {
            fputs("\\ufffd", file);
        } else if (first < 0x20) {
            fprintf(file, "\\u%04x", first);
        } else {
            if (first == '"' || first == '\\') { fputc('\\', file); }
            fwrite(text + i, 1, length, file);
        }
        i += max(length, 1);
    }
    fputc('"', file);
}

// What write(file) prints, as a string that the caller frees
template <class Write> static char* to_string(Write write, size_t* bytes = NULL) {
    char* text = NULL;
    size_t size = 0;
    FILE* file = open_memstream(&text, bytes != NULL ? bytes : &size);
    write(file);
    fclose(file);
    return text;
}

// Fields of model.py's GPTConfig that are on in dN and off in GPT-2, and those that are the reverse
const char* const MODERN_FIELDS[] = {"rope", "rms_norm", "qk_norm", "relu2", "value_embeds",
                                     "residual_scalars", "backout"};
const char* const GPT2_FIELDS[] = {"bias", "tied_head"};
const int N_MODERN_FIELDS = (sizeof MODERN_FIELDS + sizeof GPT2_FIELDS) / sizeof(char*);

// Whether the value of a key begins with this text
static bool json_is(const char* text, const char* key, const char* expected) {
    const char* value = json_find(text, key);
    return value != NULL && starts_with(value, expected);
}

// How many fields of a config.json are as dN has them. Fields that are missing are GPT-2's.
static int count_modern_fields(const char* text) {
    int n = 0;
    for (const char* field : MODERN_FIELDS) {
        if (json_is(text, field, "true")) { n++; }
    }
    for (const char* field : GPT2_FIELDS) {
        if (json_is(text, field, "false")) { n++; }
    }
    return n;
}

// The config as model.py's GPTConfig writes it; fields of dN that GPT-2 leaves off are left out.
static void write_config(FILE* file, Config c) {
    fprintf(file, "{\"block_size\": %d, \"vocab_size\": %d, \"n_layer\": %d, \"n_head\": %d, "
            "\"n_embd\": %d", c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd);
    if (c.modern) {
        for (const char* field : MODERN_FIELDS) { fprintf(file, ", \"%s\": true", field); }
        for (const char* field : GPT2_FIELDS) { fprintf(file, ", \"%s\": false", field); }
        fprintf(file, ", \"softcap\": %.17g, \"windows\": \"%s\"", c.softcap, c.windows);
    }
    fprintf(file, "}");
}

// No model has so many layers, or so many of anything else: a number above is a mistake.
const int MAX_LAYERS = 1000;
const int MAX_SIZE = 1 << 22;

// Copies 1 to 63 letters S and L that `end` follows; false: the text has others.
static bool read_windows(const char* text, char end, char* windows) {
    size_t n = strspn(text, "SL");
    if (n < 1 || n > 63 || text[n] != end) { return false; }
    snprintf(windows, n + 1, "%s", text);
    return true;
}

// The config of a folder with a model of ours or of HF's. The kernels have GPT-2 and dN; mixtures,
// which model.py allows, are refused.
static Config read_config(const char* folder) {
    const char* path = joined(folder, "config.json");
    char* text = read_json(path);
    if (text == NULL) {
        die("%s/config.json does not exist; name a folder with config.json and model.safetensors "
            "with --init_from, or leave it out to train from scratch", folder);
    }
    int n_modern = count_modern_fields(text);
    bool is_gpt2 = n_modern == 0 && json_is(text, "model_type", "\"gpt2\"");
    bool is_modern = n_modern == N_MODERN_FIELDS && json_is(text, "model_type", "\"deepdive\"");
    if (!is_gpt2 && !is_modern) {
        die("%s has %d of dN's %d parts, but the CUDA trainer has only GPT-2, with none of them, "
            "and dN, with all; use python train_gpt2.py", folder, n_modern, N_MODERN_FIELDS);
    }
    if (json_find(text, "norm_scales") != NULL && !json_is(text, "norm_scales", "\"\"")) {
        die("%s has learned scales in its RMSNorms, but the CUDA trainer has none; use python "
            "train_gpt2.py", folder);
    }
    Config config = {};
    config.block_size = (int)json_integer(path, text, "n_positions", 1, MAX_SIZE);
    config.vocab_size = (int)json_integer(path, text, "vocab_size", 1, MAX_SIZE);
    config.n_layer = (int)json_integer(path, text, "n_layer", 1, MAX_LAYERS);
    config.n_head = (int)json_integer(path, text, "n_head", 1, MAX_SIZE);
    config.n_embd = (int)json_integer(path, text, "n_embd", 1, MAX_SIZE);
    config.modern = is_modern;
    if (is_modern) {
        const char* windows = json_find(text, "windows");
        config.softcap = json_number(text, "softcap", 0);
        bool is_cap = config.softcap >= 0 && config.softcap <= 1e6;
        if (!is_cap || windows == NULL || !read_windows(windows + 1, '"', config.windows)) {
            die("%s: softcap must be from 0 to 1000000, and windows 1 to 63 letters S and L; copy "
                "this file again, or remove it", path);
        }
    }
    free(text);
    return config;
}

// A tensor in a safetensors header. columns 0: a vector
struct Entry { const char* name; int64_t rows, columns; };

// The header of a safetensors file of n fp32 tensors, which entry_of(i) describes. Data follow each
// other without gaps.
template <class EntryOf> static void write_header(FILE* file, int n, EntryOf entry_of,
                                                  const char* path) {
    size_t size = 0;
    char* header = to_string([&](FILE* text) {
        fprintf(text, "{\"__metadata__\":{\"format\":\"pt\"}");
        int64_t begin = 0;              // bytes
        for (int i = 0; i < n; i++) {
            Entry entry = entry_of(i);
            fprintf(text, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[%lld", entry.name,
                    (long long)entry.rows);
            if (entry.columns > 0) { fprintf(text, ",%lld", (long long)entry.columns); }
            int64_t end = begin + 4 * entry.rows * max(entry.columns, (int64_t)1);
            fprintf(text, "],\"data_offsets\":[%lld,%lld]}", (long long)begin, (long long)end);
            begin = end;
        }
        fputc('}', text);
        while (ftell(text) % 8 != 0) { fputc(' ', text); }      // so that the data are aligned
    }, &size);
    uint64_t length = size;
    write_all(file, &length, 8, path);
    write_all(file, header, size, path);
    free(header);
}

// All ranks' masters → model.safetensors, which rank 0 writes. They are gathered in the memory of
// the gradients, which are zero between steps and are zero again afterwards.
static void save_weights(Model* model, Ranks* ranks, const char* path) {
    FILE* file = ranks->rank == 0 ? create_part(path) : NULL;
    const Table* table = &model->table;
    if (file != NULL) {
        write_header(file, table->n_tensors, [&](int i) {
            const Tensor* tensor = &table->tensors[i];
            return Entry{tensor->name, tensor->file_rows, tensor->columns};
        }, path);
    }
    for (int i = 0; i < table->n_buckets; i++) {
        Bucket bucket = table->buckets[i];
        Part part = model->parts[i];
        float* values = (float*)malloc(bucket.size * 4);
        CHECK_CUDA(cudaMemcpyAsync(model->gradients + part.first, model->masters + part.state,
                                   part.size * 4, cudaMemcpyDeviceToDevice, model->stream));
        gather(ranks, model->gradients + bucket.offset, bucket.size * 4, bucket.owner,
               model->stream);
        wait_for_ranks(ranks, model->stream);
        CHECK_CUDA(cudaMemcpyAsync(values, model->gradients + bucket.offset, bucket.size * 4,
                                   cudaMemcpyDeviceToHost, model->stream));
        CHECK_CUDA(cudaStreamSynchronize(model->stream));
        for (int t = bucket.first_tensor; t < bucket.end_tensor && file != NULL; t++) {
            Tensor tensor = table->tensors[t];      // in the order of the header
            write_all(file, values + tensor.offset - bucket.offset, 4 * tensor.file_size(), path);
        }
        free(values);
    }
    zero_gradients(model);
    if (file != NULL) { finish(file, path); }
}

// ---- §15 Data: shards of tokens, and the order of their rows ------------------------------------
//
// The twin of Shards, Loader and evaluate in train_gpt2.py, row for row. A shard, as shards.py
// writes it, is 256 int32 (magic, version, number of tokens, zeros) and then the tokens, of 2 bytes
// each in version 1 and of 4 in version 2.

struct Shard {
    const char* path;
    const uint8_t* tokens;          // mapped from the file
    int64_t n_tokens;
    int width;                      // bytes a token
};

struct Shards { Shard* files; int n; int64_t n_tokens; };

const int SHARD_MAGIC = 20240520;
const int SHARD_HEADER_BYTES = 1024;

// Maps a shard after its header and its size were checked.
static Shard open_shard(const char* path) {
    int file = open(path, O_RDONLY);
    struct stat status = {};
    int32_t header[SHARD_HEADER_BYTES / 4] = {};
    bool is_readable = file >= 0 && fstat(file, &status) == 0 &&
                       read(file, header, SHARD_HEADER_BYTES) == SHARD_HEADER_BYTES;
    int version = header[1];
    if (!is_readable || header[0] != SHARD_MAGIC || version < 1 || version > 2) {
        die("%s is not a shard of magic %d and version 1 or 2: it has magic %d and version %d; "
            "write it again with python prepare_fineweb.py tokenize", path, SHARD_MAGIC, header[0],
            version);
    }
    int width = version == 1 ? 2 : 4;
    int64_t expected = SHARD_HEADER_BYTES + (int64_t)header[2] * width;
    if (status.st_size != expected) {
        die("%s has %lld bytes, but its header promises %lld; delete it and run "
            "python prepare_fineweb.py tokenize again", path, (long long)status.st_size,
            (long long)expected);
    }
    uint8_t* map = (uint8_t*)mmap(NULL, expected, PROT_READ, MAP_PRIVATE, file, 0);
    if (map == MAP_FAILED) {
        die("%s cannot be mapped into memory: %s; check ulimit -v", path, strerror(errno));
    }
    close(file);
    return {strdup(path), map + SHARD_HEADER_BYTES, header[2], width};
}

// Whether a file's name ends in _{split}_DIGITS.bin or, as in llm.c's small data sets, in
// _{split}.bin. Only the end counts: the name of a data set may hold "train" or "val" itself.
static bool is_of_split(const char* path, const char* split) {
    const char* slash = strrchr(path, '/');
    const char* name = slash != NULL ? slash + 1 : path;
    size_t end = strlen(name);
    size_t length = strlen(split);
    if (end < 4 || strcmp(name + end - 4, ".bin") != 0) { return false; }
    end -= 4;
    size_t digits = end;            // where the digits at the end begin
    while (digits > 0 && name[digits - 1] >= '0' && name[digits - 1] <= '9') { digits--; }
    if (digits < end && digits > 0 && name[digits - 1] == '_') { end = digits - 1; }
    if (end < length || strncmp(name + end - length, split, length) != 0) { return false; }
    return end == length || name[end - length - 1] == '_';
}

// All shards of a split, "train" or "val", in the order of their names
static Shards open_shards(const char* data, const char* split) {
    glob_t found;
    int error = glob(joined(data, "*.bin"), 0, NULL, &found);
    size_t n_files = error == 0 ? found.gl_pathc : 0;
    Shards shards = {(Shard*)calloc(n_files + 1, sizeof(Shard)), 0, 0};
    for (size_t i = 0; i < n_files; i++) {
        if (!is_of_split(found.gl_pathv[i], split)) { continue; }
        shards.files[shards.n] = open_shard(found.gl_pathv[i]);
        shards.n_tokens += shards.files[shards.n].n_tokens;
        shards.n++;
    }
    if (error == 0) { globfree(&found); }
    if (shards.n_tokens < 2) {
        die("%s holds %lld tokens of the %s split, in %d shards named *_%s_000000.bin; run python "
            "shards.py --data %s --tokenizer DIR", data, (long long)shards.n_tokens, split,
            shards.n, split, data);
    }
    return shards;
}

// Token i of a shard, whose bytes are in little-endian order. A token that the model does not have
// would read outside of its tables, so it ends the run.
static int read_token(Shard shard, int64_t i, int V) {
    const uint8_t* at = shard.tokens + i * shard.width;
    uint32_t token = at[0] | at[1] << 8;
    if (shard.width == 4) { token |= (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24; }
    if (token >= (uint32_t)V) {
        die("%s holds token %u, but the vocabulary has only %d; use the shards and the model of "
            "one tokenizer", shard.path, token, V);
    }
    return (int)token;
}

// Tokens start … start + count - 1 of all shards, read as one sequence
static void read_tokens(Shards shards, int64_t start, int count, int* tokens, int V) {
    int done = 0;
    for (int i = 0; i < shards.n && done < count; i++) {
        Shard shard = shards.files[i];
        if (start >= shard.n_tokens) {
            start -= shard.n_tokens;
            continue;
        }
        while (start < shard.n_tokens && done < count) {
            tokens[done] = read_token(shard, start, V);
            done++;
            start++;
        }
        start = 0;                  // the next shard is read from its beginning
    }
}

// What rows are sorted by. No two rows of an epoch have the same key, because mix64 is invertible.
struct RowKey { uint64_t key; uint32_t row; };

// The rows 0 … n - 1 in the order of an epoch: sorted by a hash of (seed, epoch, row). It equals
// shuffled_rows of train_gpt2.py, so both trainers read the same rows.
static void shuffle_rows(uint64_t seed, uint64_t epoch, uint32_t* order, uint32_t n) {
    uint64_t start = mix64(mix64(seed) + epoch);
    RowKey* keys = (RowKey*)malloc(n * sizeof(RowKey));
    for (uint64_t i = 0; i < n; i++) {
        keys[i] = {mix64(start + (i + 1) * GOLDEN_RATIO), (uint32_t)i};
    }
    std::sort(keys, keys + n, [](RowKey a, RowKey b) { return a.key < b.key; });
    for (uint32_t i = 0; i < n; i++) { order[i] = keys[i].row; }
    free(keys);
}

// Rows of T + 1 tokens in a seeded order, each once an epoch. A position is the number of rows read
// before, so one integer says where a run is. While the GPU copies one staging buffer, the next
// batch is read into the other. A staging buffer is
//   inputs (BT) | targets (BT) | positions (BT) | starts (BT + 1) | tokens (BT)
// The last three are the index of the inputs, for the embedding's backward pass (§3).
struct Loader {
    Shards shards;
    int T, V;
    int64_t seed, n_rows;
    int64_t epoch;                  // whose order `order` is; -1: none yet
    uint32_t* order;                // (n_rows)
    int* staging[2];                // pinned
    cudaEvent_t sent[2];            // when the GPU has what a buffer held
    int turn;                       // the buffer that is filled next, or is full
    int64_t staged;                 // the position of the batch that staging[turn] holds; -1: none
    int n_groups;                   // distinct inputs in the batch that was read last
    int* counts;                    // (V), for index_tokens
};

// For batches of up to B rows of T tokens, from a vocabulary of V
static Loader make_loader(Shards shards, int B, int T, int V, int64_t seed) {
    Loader loader = {};
    loader.shards = shards;
    loader.T = T;
    loader.V = V;
    loader.seed = seed;
    loader.epoch = -1;
    loader.staged = -1;
    loader.n_rows = (shards.n_tokens - 1) / T;
    if (loader.n_rows < 1) {
        die("the shards hold %lld tokens, but a row needs %d; prepare more text, or lower "
            "--seq_len", (long long)shards.n_tokens, T + 1);
    }
    loader.order = (uint32_t*)malloc(loader.n_rows * sizeof(uint32_t));
    loader.counts = (int*)calloc(V, sizeof(int));
    for (int i = 0; i < 2; i++) {
        CHECK_CUDA(cudaMallocHost(&loader.staging[i], (5 * (size_t)B * T + 1) * sizeof(int)));
        CHECK_CUDA(cudaEventCreateWithFlags(&loader.sent[i], cudaEventDisableTiming));
    }
    return loader;
}

// Groups the places of a batch by their input, with a counting sort: group g is of the input
// tokens[g], and its places are positions[starts[g]] … positions[starts[g + 1] - 1].
//   inputs 7 3 7  →  tokens 3 7, starts 0 1 3, positions 1 0 2
// The backward pass of the embedding then adds up each group in one order, without atomics. Returns
// the number of groups.
static int index_tokens(const int* inputs, int BT, int* counts, int V, int* positions, int* starts,
                        int* tokens) {
    memset(counts, 0, V * sizeof(int));
    for (int i = 0; i < BT; i++) { counts[inputs[i]]++; }
    int n_groups = 0;
    int start = 0;
    for (int token = 0; token < V; token++) {
        int count = counts[token];
        counts[token] = start;          // from here on: where the token's next position goes
        if (count == 0) { continue; }
        starts[n_groups] = start;
        tokens[n_groups] = token;
        n_groups++;
        start += count;
    }
    starts[n_groups] = BT;
    for (int i = 0; i < BT; i++) { positions[counts[inputs[i]]++] = i; }
    return n_groups;
}

// Starts the copy of staging[turn] to the GPU, where evaluation ignores the index.
static void send_batch(Loader* loader, Model* model) {
    int BT = model->B * model->T;
    const int* inputs = loader->staging[loader->turn];
    const struct { int* to; const int* from; size_t n; } copies[] = {
        {model->inputs, inputs, (size_t)BT},
        {model->targets, inputs + BT, (size_t)BT},
        {model->index, inputs + 2 * BT, 3 * (size_t)BT + 1}};
    for (auto copy : copies) {
        CHECK_CUDA(cudaMemcpyAsync(copy.to, copy.from, copy.n * sizeof(int),
                                   cudaMemcpyHostToDevice, model->stream));
    }
    CHECK_CUDA(cudaEventRecord(loader->sent[loader->turn], model->stream));
    loader->turn ^= 1;
    loader->staged = -1;
}

// The buffer whose turn it is, once the GPU no longer needs what it held
static int* begin_batch(Loader* loader) {
    CHECK_CUDA(cudaEventSynchronize(loader->sent[loader->turn]));
    return loader->staging[loader->turn];
}

// Reads rows position … position + B - 1 into staging[turn], unless they are there already.
static void read_batch(Loader* loader, int B, int64_t position) {
    if (loader->staged == position) { return; }
    int T = loader->T;
    int BT = B * T;
    int* inputs = begin_batch(loader);
    int* targets = inputs + BT;
    int* index = targets + BT;
    int* row = (int*)malloc((T + 1) * sizeof(int));
    for (int b = 0; b < B; b++) {
        int64_t epoch = (position + b) / loader->n_rows;
        int64_t i = (position + b) % loader->n_rows;
        if (epoch != loader->epoch) {
            shuffle_rows(loader->seed, epoch, loader->order, loader->n_rows);
            loader->epoch = epoch;
        }
        read_tokens(loader->shards, (int64_t)loader->order[i] * T, T + 1, row, loader->V);
        memcpy(inputs + b * T, row, T * sizeof(int));
        memcpy(targets + b * T, row + 1, T * sizeof(int));
    }
    free(row);
    loader->n_groups = index_tokens(inputs, BT, loader->counts, loader->V, index, index + BT,
                                    index + 2 * BT + 1);
    loader->staged = position;
}

// Losses (BT) of the batch in staging[turn], on the CPU; 0 where the target is -1
static void batch_losses(Model* model, Loader* loader, float* losses) {
    send_batch(loader, model);
    forward(model, false);
    CHECK_CUDA(cudaMemcpyAsync(losses, model->losses,
                               (size_t)model->B * model->T * sizeof(float),
                               cudaMemcpyDeviceToHost, model->stream));
    CHECK_CUDA(cudaStreamSynchronize(model->stream));
}

const int64_t VAL_TOKENS = 1 << 20;     // per evaluation; the last one uses the whole split

struct ValLoss { double val_loss, val_bpb; };       // val_bpb 0: no token_bytes.npy

// The loss on the first tokens of a split in nats a token, and in bits per byte of text: total nats
// / (ln 2 · total bytes), where <|endoftext|>, of 0 bytes, counts in neither total. Rows are cut as
// in training, and the last may be short; ranks take batches in turns.
static ValLoss evaluate(Model* model, Loader* loader, Shards shards, const int* token_bytes,
                        int64_t max_tokens, Ranks* ranks) {
    int B = model->B, T = model->T;
    int BT = B * T;
    int64_t n = min(shards.n_tokens - 1, max_tokens);       // targets
    int64_t n_rows = ceil_div(n, (int64_t)T);
    // sums of floats over a whole split need doubles
    double nats = 0, tokens = 0, text_nats = 0, text_bytes = 0;
    float* losses = (float*)malloc(BT * sizeof(float));
    int* row = (int*)malloc((T + 1) * sizeof(int));
    for (int64_t first = ranks->rank * B; first < n_rows; first += (int64_t)B * ranks->world_size) {
        int* inputs = begin_batch(loader);
        int* targets = inputs + BT;
        for (int b = 0; b < B; b++) {
            int64_t start = (first + b) * T;
            int count = (int)max((int64_t)0, min(n - start, (int64_t)T));
            if (count > 0) { read_tokens(shards, start, count + 1, row, loader->V); }
            for (int t = 0; t < T; t++) {       // target -1: no loss
                inputs[b * T + t] = t < count ? row[t] : 0;
                targets[b * T + t] = t < count ? row[t + 1] : -1;
            }
        }
        batch_losses(model, loader, losses);
        for (int i = 0; i < BT; i++) {
            if (targets[i] < 0) { continue; }
            nats += losses[i];
            tokens++;
            int bytes = token_bytes != NULL ? token_bytes[targets[i]] : 0;
            text_bytes += bytes;
            if (bytes > 0) { text_nats += losses[i]; }
        }
    }
    free(losses);
    free(row);
    double sums[] = {nats, tokens, text_nats, text_bytes};
    ranks_sum(ranks, sums, 4);
    return {sums[0] / fmax(1, sums[1]), sums[2] / log(2) / fmax(1, sums[3])};
}

// <data>/token_bytes.npy: the number of bytes of each token, or NULL if there is no such file
static int* read_token_bytes(const char* data, int V) {
    const char* path = joined(data, "token_bytes.npy");
    size_t n_bytes = 0;
    char* npy = read_file(path, &n_bytes);
    if (npy == NULL) { return NULL; }
    // .npy: 8 bytes of magic and version, 2 of the header's size, the header, a Python dict; data
    uint16_t header_size;
    memcpy(&header_size, npy + 8, 2);
    char shape[64];
    snprintf(shape, sizeof shape, "'shape': (%d,)", V);
    bool is_valid = strstr(npy + 10, "<i4") != NULL && strstr(npy + 10, shape) != NULL;
    if (!is_valid || n_bytes != 10 + (size_t)header_size + 4 * (size_t)V) {
        die("%s is not an int32 array of %d numbers, one for each token; run python "
            "prepare_fineweb.py tokenize again", path, V);
    }
    int* bytes = (int*)malloc(V * sizeof(int));
    memcpy(bytes, npy + 10 + header_size, V * sizeof(int));
    free(npy);
    return bytes;
}

// ---- §16 Flags ----------------------------------------------------------------------------------
//
// The flags of train_gpt2.py, with their names and meanings, and --attention. One table drives
// parsing, --help and the header of the log.

// Defaults of 0 and NULL, and the -1 of max_steps, mean that no flag was given; plan_batch and main
// then choose a value.
struct Arguments {
    const char* model = "gpt2";
    const char* config = "";
    const char* data = NULL;
    const char* out = NULL;
    const char* init_from = NULL;
    const char* core_dir = NULL;
    bool resume = false;
    bool profile = false;
    int64_t max_steps = -1;
    int64_t total_batch_size = 0;       // tokens
    int64_t batch_size = 0;             // rows
    int64_t seq_len = 0;                // tokens
    int64_t eval_every = 250;           // steps
    int64_t save_every = 1000;          // steps
    int64_t seed = 1337;
    int64_t recompute = 0;
    int64_t fp8 = 0;
    int64_t deterministic = 1;
    const char* attention = NULL;
    double lr = 0;
    double gpu_hour_usd = 0;
};

// A flag's value goes to one of four places, by its type; the other three are NULL.
struct Flag {
    const char *name, *help;
    const char** text;
    int64_t* integer;
    double* real;
    bool* is_on;                // a switch, which has no value, like --resume
    double least, most;         // of a number
};

static Flag text_flag(const char* name, const char** text, const char* help) {
    return {name, help, text, NULL, NULL, NULL};
}
static Flag integer_flag(const char* name, int64_t* integer, int64_t least, int64_t most,
                         const char* help) {
    return {name, help, NULL, integer, NULL, NULL, (double)least, (double)most};
}
static Flag real_flag(const char* name, double* real, double least, double most, const char* help) {
    return {name, help, NULL, NULL, real, NULL, least, most};
}
static Flag switch_flag(const char* name, bool* is_on, const char* help) {
    return {name, help, NULL, NULL, NULL, is_on};
}

// Set once, before anything else runs; plan_batch fills in the rest.
static Arguments arguments;

const int64_t BILLION = 1000000000;
const int64_t MAX_BATCH_TOKENS = 1 << 28;       // kernels and buffers index a batch by ints

static const Flag FLAGS[] = {
    text_flag("model", &arguments.model, "gpt2, gpt2-medium, gpt2-large, gpt2-xl, or dN: N layers"),
    text_flag("config", &arguments.config, "other sizes: block_size=256 n_layer=2 n_head=2 …"),
    text_flag("data", &arguments.data, "folder with *_train_*.bin and *_val_*.bin"),
    text_flag("out", &arguments.out, "run folder"),
    switch_flag("resume", &arguments.resume, "continue from <out>/state, if there is one"),
    text_flag("init_from", &arguments.init_from,
              "begin with this model: a run's folder, or gpt2 … gpt2-xl"),
    integer_flag("max_steps", &arguments.max_steps, 0, BILLION,
                 "steps (default: by the model's size)"),
    integer_flag("total_batch_size", &arguments.total_batch_size, 1, MAX_BATCH_TOKENS,
                 "tokens a step, over all ranks"),
    integer_flag("batch_size", &arguments.batch_size, 1, BILLION, "rows at a time on one rank"),
    integer_flag("seq_len", &arguments.seq_len, 1, BILLION,
                 "tokens in a row (default, and at most: the model's block_size)"),
    real_flag("lr", &arguments.lr, 1e-38, 1e38, "peak learning rate of AdamW, or for dN of Muon"),
    integer_flag("eval_every", &arguments.eval_every, 1, BILLION, "steps between evaluations"),
    text_flag("core_dir", &arguments.core_dir, "eval_bundle folder: also evaluate HellaSwag"),
    integer_flag("save_every", &arguments.save_every, 1, BILLION, "steps between saved states"),
    real_flag("gpu_hour_usd", &arguments.gpu_hour_usd, 0, 1e9,
              "price of one GPU hour in dollars: show the run's cost"),
    integer_flag("seed", &arguments.seed, 0, 1ll << 62,
                 "seed of the initial weights and of the order of rows"),
    integer_flag("recompute", &arguments.recompute, 0, 2,
                 "to save memory, compute again in the backward pass: 1 GELU, 2 also the norms"),
    integer_flag("fp8", &arguments.fp8, 0, 1, "1: multiply in 8 bits (H100 or later)"),
    integer_flag("deterministic", &arguments.deterministic, 0, 1,
                 "1: the same run gives the same bits; 0: matmuls use the kernels that are fastest "
                 "when the run begins"),
    text_flag("attention", &arguments.attention,
              "tensor-core kernels of attention: wgmma or mma (default: wgmma if the GPU has it)"),
    switch_flag("profile", &arguments.profile, "time each kernel of steps 10-12"),
};

// The flag that a word like "--seed" names, or NULL
static const Flag* find_flag(const char* word) {
    if (!starts_with(word, "--")) { return NULL; }
    for (const Flag& flag : FLAGS) {
        if (strcmp(word + 2, flag.name) == 0) { return &flag; }
    }
    return NULL;
}

[[noreturn]] static void print_help() {
    for (const Flag& flag : FLAGS) { printf("--%-18s%s\n", flag.name, flag.help); }
    exit(0);
}

// --config takes all words up to the next flag, and joins them: "n_layer=2 n_head=2 ". Returns the
// index of the last of them.
static int parse_config(int argc, char** argv, int i) {
    static char config[1024];
    config[0] = '\0';
    while (i + 1 < argc && !starts_with(argv[i + 1], "--")) {
        i++;
        strncat(config, argv[i], sizeof config - strlen(config) - 2);
        strcat(config, " ");
    }
    arguments.config = config;
    return i;
}

// Stores the word after a flag; a number must be a number to its last letter, and within bounds.
static void parse_value(const Flag* flag, char* value) {
    char* end = NULL;           // where strtoll or strtod stopped
    if (flag->text != NULL) {
        *flag->text = value;
        return;
    }
    double number = strtod(value, &end);
    if (flag->integer != NULL) {
        *flag->integer = strtoll(value, &end, 10);
    } else {
        *flag->real = number;
    }
    if (*end != '\0' || end == value) {
        die("--%s must be a number, got %s; see --help", flag->name, value);
    }
    if (number > flag->most) {
        die("--%s must be at most %.10g, got %s; see --help", flag->name, flag->most, value);
    }
    if (!(number >= flag->least)) {             // also nan
        die("--%s must be at least %.10g, got %s; see --help", flag->name, flag->least, value);
    }
}

static void parse_arguments(int argc, char** argv) {
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0) { print_help(); }
        if (strcmp(argv[i], "--device") == 0) {
            die("--device is a flag of train_gpt2.py, not of the CUDA trainer; leave it out");
        }
        const Flag* flag = find_flag(argv[i]);
        if (flag == NULL) { die("%s is not a flag; see --help", argv[i]); }
        if (flag->is_on != NULL) {
            *flag->is_on = true;
            continue;
        }
        if (i + 1 == argc || starts_with(argv[i + 1], "--")) {
            die("%s has no value; see --help", argv[i]);
        }
        if (flag->text == &arguments.config) {
            i = parse_config(argc, argv, i);
        } else {
            i++;
            parse_value(flag, argv[i]);
        }
    }
    if (arguments.data == NULL || arguments.out == NULL) {
        die("--data or --out is missing; try --data data/fineweb --out runs/gpt2");
    }
}

// The number of key=number in a list like "n_layer=2 n_head=2 "
static int matched_integer(const char* text, const char* key, int fallback, int most) {
    char pattern[32];
    snprintf(pattern, sizeof pattern, "%s=", key);
    const char* found = strstr(text, pattern);
    if (found == NULL) { return fallback; }
    const char* digits = found + strlen(pattern);
    char* end = NULL;
    long long number = strtoll(digits, &end, 10);
    if (end == digits || (*end != ' ' && *end != '\0') || number < 1 || number > most) {
        die("--config %s must be an integer from 1 to %d, got %.*s; try --config %s=%d", key, most,
            (int)strcspn(digits, " "), digits, key, fallback);
    }
    return (int)number;
}

// Other fields of GPTConfig would need other kernels.
static void check_fields(const char* config, bool modern) {
    char words[1024];
    snprintf(words, sizeof words, "%s", config);
    for (char* word = strtok(words, " "); word != NULL; word = strtok(NULL, " ")) {
        bool is_known = modern && starts_with(word, "windows=");
        for (const char* key : {"block_size=", "n_layer=", "n_head=", "n_embd="}) {
            is_known = is_known || starts_with(word, key);
        }
        if (!is_known) {
            die("--config %s: the CUDA trainer has only the fields block_size, n_layer, n_head, "
                "n_embd and, for dN, windows; for others use python train_gpt2.py", word);
        }
    }
}

// The presets of model.py's GPTConfig
static Config preset(const char* name, int V) {
    const struct { const char* name; int n_layer, n_head, n_embd; } sizes[] = {
        {"gpt2", 12, 12, 768}, {"gpt2-medium", 24, 16, 1024}, {"gpt2-large", 36, 20, 1280},
        {"gpt2-xl", 48, 25, 1600}};
    for (auto size : sizes) {
        if (strcmp(name, size.name) != 0) { continue; }
        return {1024, V, size.n_layer, size.n_head, size.n_embd};
    }
    char* end = (char*)name;
    long depth = name[0] == 'd' ? strtol(name + 1, &end, 10) : 0;
    if (*end != '\0' || depth < 1 || depth > MAX_LAYERS) {
        die("the model %s does not exist; choose gpt2, gpt2-medium, gpt2-large, gpt2-xl, or d1, "
            "d2, … as in --model d12", name);
    }
    int NH = ceil_div(64 * (int)depth, 128);    // 64 channels a layer, in whole heads of 128
    return {2048, V, (int)depth, NH, 128 * NH, true, 15.0, "SSSL"};
}

// The config of a new model: --model, changed by --config
static Config choose_config(int V) {
    Config config = preset(arguments.model, V);
    const char* text = arguments.config;
    check_fields(text, config.modern);
    config.block_size = matched_integer(text, "block_size", config.block_size, MAX_SIZE);
    config.n_layer = matched_integer(text, "n_layer", config.n_layer, MAX_LAYERS);
    config.n_head = matched_integer(text, "n_head", config.n_head, MAX_SIZE);
    config.n_embd = matched_integer(text, "n_embd", config.n_embd, MAX_SIZE);
    const char* windows = strstr(text, "windows=");
    if (windows != NULL && !read_windows(windows + strlen("windows="), ' ', config.windows)) {
        die("--config windows must be 1 to 63 letters S and L; try --config windows=SSSL");
    }
    return config;
}

// The folder of --init_from. OpenAI's names mean the folders into which download.py puts them.
static const char* init_folder() {
    const char* name = arguments.init_from;
    if (arguments.config[0] != '\0') {
        die("--config %scannot change the model of --init_from %s; leave --config out (--seq_len "
            "makes rows shorter)", arguments.config, name);
    }
    if (!starts_with(name, "gpt2") || access(name, F_OK) == 0) { return name; }
    const char* folder = joined("data/openai", name);
    if (access(joined(folder, "model.safetensors"), F_OK) != 0) {
        die("%s does not hold OpenAI's weights yet; run python download.py %s", folder, name);
    }
    return strdup(folder);
}

// Ends the run unless the kernels can compute this model. A load is 128 bits wide, so C is a
// multiple of 8; a warp holds at most 256 channels of a head in registers (§7); norms hold four
// rows in 48 KB of shared memory, so in fp32 C is at most 3072 (§5); rotary positions and qk norms
// of dN share a head out among lanes, so its width is a power of two (§7).
// V is the size of the shards' vocabulary, T the length of a row.
static void check_config(Config config, int V, int64_t T) {
    int C = config.n_embd, NH = config.n_head;
    int HS = C / NH;
    if (config.vocab_size != V) {
        die("the model has %d tokens, but the tokenizer of the shards has %d; use the shards of "
            "the model's tokenizer", config.vocab_size, V);
    }
    if (C % NH != 0 || HS > WARP * LANE_CHANNELS || C % 8 != 0 || C > 3072) {
        die("n_embd must be a multiple of 8 and of n_head, at most 3072 and at most 256 a head, "
            "got n_embd %d and n_head %d; try --config n_embd=768 n_head=12", C, NH);
    }
    bool is_power_of_two = (HS & (HS - 1)) == 0;
    if (config.modern && (!is_power_of_two || HS < 2 * PACK)) {
        die("in dN, n_embd / n_head must be a power of two from %d to 256, got %d / %d = %d; "
            "try --config n_embd=768 n_head=6", 2 * PACK, C, NH, HS);
    }
    if (T < 1 || T > config.block_size) {
        die("--seq_len must be from 1 to the model's %d positions, got %lld; try --seq_len %d",
            config.block_size, (long long)T, config.block_size);
    }
}

// Whether the layers multiply in 8 bits. As in train_gpt2.py, matrices of fewer than 128 channels
// do not. Ends the run if the matrices have sizes that 8-bit operands cannot have.
static bool choose_fp8(Config config) {
    const Arguments& a = arguments;
    int64_t BT = a.batch_size * a.seq_len;
    if (!a.fp8 || config.n_embd < FP8_LEAST_SIZE) { return false; }
    if (config.n_embd % FP8_UNIT != 0 || BT % FP8_UNIT != 0) {
        die("with --fp8 1, n_embd and batch_size*seq_len must be multiples of %d, got %d and %lld; "
            "leave --fp8 out", FP8_UNIT, config.n_embd, (long long)BT);
    }
    return true;
}

// ---- §17 The log and saved states ---------------------------------------------------------------
//
// The twin of RunLog, save_run and load_state in training.py, and of is_spike in recipe.py:
//   <run>/lock                                       held while a process trains in the run
//   <run>/log.jsonl                                  JSON lines: the header, steps, samples
//   <run>/config.json, model.safetensors             the model, in fp32
//   <run>/state/step_000250/rank_00000.safetensors   masters and moments of a rank's parts
//   <run>/state/step_000250/state.json               step, position, settings, last losses
// The log and the model are those that Python writes. States have a layout of their own, because
// ranks own parts of buckets here and whole parameters there: a trainer resumes its own runs alone.

// `started`: on the clock of seconds_now
struct Log { FILE* file; int64_t max_steps; double started; bool is_main; };

// On a clock that never jumps, as the time of day may
static double seconds_now() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

// Like mkdir -p
static void make_folders(const char* path) {
    char part[4096];
    snprintf(part, sizeof part, "%s", path);
    for (char* at = part + 1; *at != '\0'; at++) {
        if (*at != '/') { continue; }
        *at = '\0';
        mkdir(part, 0777);
        *at = '/';
    }
    mkdir(part, 0777);
}

// Calls visit(path) for everything in a folder. In a pattern for glob, a * or [ in the name of the
// run's folder would have a meaning of its own.
template <class Visit> static void for_each_file(const char* folder, Visit visit) {
    DIR* entries = opendir(folder);
    if (entries == NULL) { return; }
    char path[4400];
    int n = snprintf(path, sizeof path, "%s/", folder);
    for (dirent* entry = readdir(entries); entry != NULL; entry = readdir(entries)) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) { continue; }
        snprintf(path + n, sizeof path - n, "%s", entry->d_name);
        visit(path);
    }
    closedir(entries);
}

// Copies the old log's lines up to the resumed step; those after it will be written again. Then the
// clock continues from the last line's seconds, so that they count time spent, not time passed.
// Lines that are not whole objects are damaged, and are left out.
static void keep_old_lines(Log* log, char* line, char* file_end, int64_t resume_step) {
    char* end = (char*)memchr(line, '\n', file_end - line);
    while (end != NULL) {
        *end = '\0';
        bool is_whole = is_object(line, end - line);
        if (is_whole && json_number(line, "step", 0) <= resume_step) {
            fprintf(log->file, "%s\n", line);
        }
        double seconds = json_number(line, "seconds", NAN);
        if (is_whole && isfinite(seconds)) { log->started = seconds_now() - seconds; }
        line = end + 1;
        end = (char*)memchr(line, '\n', file_end - line);
    }
}

// Begins <run>/log.jsonl, or continues it if the run is resumed.
static Log open_log(int64_t max_steps, int64_t resume_step, bool resumes, bool is_main) {
    Log log = {NULL, max_steps, seconds_now(), is_main};
    if (!is_main) { return log; }
    const char* path = joined(arguments.out, "log.jsonl");
    size_t bytes = 0;
    char* old = resumes ? read_file(path, &bytes) : NULL;
    log.file = create_part(path);
    if (old != NULL) { keep_old_lines(&log, old, old + bytes, resume_step); }
    finish(log.file, path);
    log.file = fopen(path, "a");
    if (log.file == NULL) { die_uncreated(path); }
    free(old);
    return log;
}

// Prints a line on the main rank and, with a row like "\"loss\": 1", adds it to log.jsonl.
static void say(Log* log, const char* line, const char* row) {
    if (!log->is_main) { return; }
    printf("%s\n", line);
    fflush(stdout);
    if (row == NULL) { return; }
    fprintf(log->file, "{%s, \"seconds\": %.3f}\n", row, seconds_now() - log->started);
    if (fflush(log->file) != 0) { die_unwritten(joined(arguments.out, "log.jsonl")); }
}

// A line alone, by printf's format
static void say_text(Log* log, const char* format, ...) {
    char line[4200];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    say(log, line, NULL);
}

// Two texts that grow together: "loss 3.421875" for the line, "\"loss\": 3.421875" for the row.
struct Row { char line[1024], row[1024]; };

// Adds a number; format is printf's, for the line
static void add(Row* row, const char* key, double value, const char* format) {
    size_t n = strlen(row->line);
    size_t m = strlen(row->row);
    n += snprintf(row->line + n, sizeof row->line - n, " | ");
    snprintf(row->line + n, sizeof row->line - n, format, value);
    snprintf(row->row + m, sizeof row->row - m, ", \"%s\": %.17g", key, value);
}

// Every line begins with "step  50/300", every row with "step": 50.
static Row begin_row(Log* log, int64_t step) {
    Row row = {};
    int width = snprintf(NULL, 0, "%lld", (long long)log->max_steps);
    snprintf(row.line, sizeof row.line, "step %*lld/%lld", width, (long long)step,
             (long long)log->max_steps);
    snprintf(row.row, sizeof row.row, "\"step\": %lld", (long long)step);
    return row;
}

// As Python prints a timedelta: "eta 1 day, 2:03:04"
static void add_eta(Row* row, double seconds) {
    int s = (int)seconds;
    int days = s / 86400;
    char eta[64] = "";
    if (days > 0) { snprintf(eta, sizeof eta, "%d day%s, ", days, days > 1 ? "s" : ""); }
    size_t n = strlen(eta);
    snprintf(eta + n, sizeof eta - n, "%d:%02d:%02d", s / 3600 % 24, s / 60 % 60, s % 60);
    add(row, "eta", seconds, "eta ");
    strcat(row->line, eta);
}

// The last losses or norms. A step is skipped if its loss or norm is a spike: more than 7 standard
// deviations above the mean of the last 128.
const int SPIKE_WINDOW = 128;
const double SPIKE_Z = 7.0;
struct Window { double values[SPIKE_WINDOW]; int n; };

// Never true before the window is full
static bool is_spike(const Window* window, double value) {
    if (window->n < SPIKE_WINDOW) { return false; }
    double mean = 0;
    double variance = 0;
    for (double v : window->values) { mean += v / SPIKE_WINDOW; }
    for (double v : window->values) { variance += (v - mean) * (v - mean) / SPIKE_WINDOW; }
    return value - mean > SPIKE_Z * sqrt(variance);
}

// Adds a value; a full window drops its oldest.
static void push(Window* window, double value) {
    if (window->n == SPIKE_WINDOW) {
        window->n--;
        memmove(window->values, window->values + 1, sizeof(double) * window->n);
    }
    window->values[window->n] = value;
    window->n++;
}

// The version of state.json. It grows whenever an older state would be resumed with another result,
// as when the order of the rows changed (2).
const int STATE_VERSION = 2;

// Where a run is, besides its weights and moments
struct State {
    int64_t step, position;         // position: rows read (§15)
    int64_t optimizer_steps;        // less than step by the skipped ones
    double usd;
    Window losses, norms;
};

// The flags that decide what is computed; a resumed run must have the same. --fp8 0 is not written,
// as in states from before there was this flag.
static void write_settings(FILE* file, Config config, int64_t n_tokens) {
    const Arguments& a = arguments;
    const char* fp8 = a.fp8 ? ", \"fp8\": 1" : "";
    fprintf(file, "\"settings\": {\"model\": ");
    write_config(file, config);
    fprintf(file, ", \"total_batch_size\": %lld, \"seq_len\": %lld, \"max_steps\": %lld, "
            "\"seed\": %lld, \"lr\": %.17g, \"n_tokens\": %lld, \"bf16\": %d%s}",
            (long long)a.total_batch_size, (long long)a.seq_len, (long long)a.max_steps,
            (long long)a.seed, a.lr, (long long)n_tokens, BF16, fp8);
}

// A window as a JSON list; %.17g and strtod keep every bit of a double.
static void write_window(FILE* file, const char* name, const Window* window) {
    fprintf(file, ",\n\"%s\": [", name);
    for (int i = 0; i < window->n; i++) {
        fprintf(file, "%s%.17g", i > 0 ? ", " : "", window->values[i]);
    }
    fprintf(file, "]");
}

static Window read_window(const char* path, const char* text, const char* name) {
    Window window = {};
    const char* list = json_find(text, name);
    const char* at = list != NULL ? list + 1 : "";
    while (*at != ']') {
        char* end = NULL;
        double value = strtod(at, &end);
        if (end == at || !isfinite(value) || window.n == SPIKE_WINDOW) {
            die("%s: %s must be a list of up to %d numbers; copy this file again, or remove it",
                path, name, SPIKE_WINDOW);
        }
        push(&window, value);
        at = end + strspn(end, ", ");
    }
    return window;
}

// config.json, as save_checkpoint of model.py writes it. All but the last entry is what HF's
// transformers reads; "deepdive" is what our own scripts read.
static void save_config(Config c, int64_t step, double val_bpb) {
    char* tokenizer = read_file(joined(arguments.data, "tokenizer/tokenizer.json"));
    double eot = tokenizer != NULL ? json_number(tokenizer, "<|endoftext|>", 50256) : 50256;
    free(tokenizer);
    const char* path = joined(arguments.out, "config.json");
    FILE* file = create_part(path);
    fprintf(file, "{\n \"vocab_size\": %d,\n \"n_layer\": %d,\n \"n_head\": %d,\n \"n_embd\": %d,\n"
            " \"model_type\": \"%s\",\n \"architectures\": [\"GPT2LMHeadModel\"],\n"
            " \"n_positions\": %d,\n \"activation_function\": \"gelu_new\",\n"
            " \"layer_norm_epsilon\": 1e-05,\n \"embd_pdrop\": 0.0,\n \"attn_pdrop\": 0.0,\n"
            " \"resid_pdrop\": 0.0,\n \"tie_word_embeddings\": %s,\n \"eos_token_id\": %.0f,\n",
            c.vocab_size, c.n_layer, c.n_head, c.n_embd, c.modern ? "deepdive" : "gpt2",
            c.block_size, c.modern ? "false" : "true", eot);
    fprintf(file, " \"deepdive\": {\n  \"format_version\": 1,\n  \"stage\": \"pretrain\",\n"
            "  \"step\": %lld,\n", (long long)step);
    if (val_bpb > 0) { fprintf(file, "  \"val_bpb\": %.17g,\n", val_bpb); }
    fprintf(file, "  \"model\": ");
    write_config(file, c);
    fprintf(file, "\n }\n}\n");
    finish(file, path);
}

// <run>/model.safetensors, config.json and the tokenizer, if there is one
static void save_checkpoint(Model* model, Ranks* ranks, int64_t step, double val_bpb) {
    save_weights(model, ranks, joined(arguments.out, "model.safetensors"));
    if (ranks->rank != 0) { return; }
    save_config(model->config, step, val_bpb);
    for (const char* name : {"tokenizer/tokenizer.json", "tokenizer/tokenizer.tiktoken"}) {
        char* text = read_file(joined(arguments.data, name));
        if (text == NULL) { continue; }
        const char* to = joined(arguments.out, strchr(name, '/') + 1);
        FILE* copy = create_part(to);
        write_all(copy, text, strlen(text), to);
        finish(copy, to);
        free(text);
    }
}

// A rank's state is three fp32 arrays in the order of its parts (§12): master weights, first
// moments m (Muon's momentum) and second moments v.
const char* const STATE_TENSORS[] = {"masters", "m", "v"};
enum { MASTERS, FIRST_MOMENTS, SECOND_MOMENTS, N_STATE_TENSORS };

// Elements of one of these arrays
static int64_t state_size(Table table, const Part* parts, int tensor) {
    Part end = parts[table.n_buckets];
    return tensor == SECOND_MOMENTS ? end.v : end.state;
}

static void state_folder(char* path, int64_t step) {
    snprintf(path, 4096, "%s/state/step_%06lld", arguments.out, (long long)step);
}

// One of this rank's arrays, in memory of the CPU that the caller frees
static float* copy_state(Model* model, int tensor) {
    const float* from[] = {model->masters, model->m, model->v};
    int64_t bytes = state_size(model->table, model->parts, tensor) * sizeof(float);
    float* values = (float*)malloc(bytes);
    CHECK_CUDA(cudaMemcpyAsync(values, from[tensor], bytes, cudaMemcpyDeviceToHost, model->stream));
    CHECK_CUDA(cudaStreamSynchronize(model->stream));
    return values;
}

// Writes this rank's arrays to <folder>/rank_N.safetensors.
static void save_shard(Model* model, Ranks* ranks, const char* folder) {
    char name[64];
    snprintf(name, sizeof name, "rank_%05d.safetensors", ranks->rank);
    const char* path = joined(folder, name);
    FILE* file = create_part(path);
    write_header(file, N_STATE_TENSORS, [&](int i) {
        return Entry{STATE_TENSORS[i], state_size(model->table, model->parts, i), 0};
    }, path);
    for (int i = 0; i < N_STATE_TENSORS; i++) {
        float* values = copy_state(model, i);
        write_all(file, values, state_size(model->table, model->parts, i) * sizeof(float), path);
        free(values);
    }
    finish(file, path);
}

// state.json: where the run is, its settings, and the windows that is_spike needs
static void write_state(Config config, Ranks* ranks, const State* state, int64_t n_tokens,
                        const char* path) {
    FILE* file = create_part(path);
    fprintf(file, "{\"format_version\": %d, \"step\": %lld, \"position\": %lld, "
            "\"optimizer_steps\": %lld, \"usd\": %.17g, \"world_size\": %d,\n", STATE_VERSION,
            (long long)state->step, (long long)state->position,
            (long long)state->optimizer_steps, state->usd, ranks->world_size);
    write_settings(file, config, n_tokens);
    write_window(file, "losses", &state->losses);
    write_window(file, "norms", &state->norms);
    fprintf(file, "}\n");
    finish(file, path);
}

// Deletes all states but the one in `folder`. An interrupted save leaves one without state.json.
static void delete_other_states(const char* folder) {
    for_each_file(joined(arguments.out, "state"), [&](const char* other) {
        bool is_state = starts_with(strrchr(other, '/') + 1, "step_");
        if (!is_state || strcmp(other, folder) == 0) { return; }
        for_each_file(other, [](const char* path) { unlink(path); });
        rmdir(other);
    });
}

// Ends the run if a master weight or a moment is not a finite number, before anything is written.
static void check_weights(Model* model, Ranks* ranks, int64_t step) {
    double n_broken = 0;
    for (int i = 0; i < N_STATE_TENSORS; i++) {
        float* values = copy_state(model, i);
        int64_t n = state_size(model->table, model->parts, i);
        for (int64_t k = 0; k < n; k++) {
            if (!isfinite(values[k])) { n_broken++; }
        }
        free(values);
    }
    ranks_sum(ranks, &n_broken, 1);
    if (n_broken == 0) { return; }
    die("step %lld: %.0f weights or moments are not finite, so nothing is saved; try a lower --lr "
        "in another --out (what was saved before is kept)", (long long)step, n_broken);
}

// With --deterministic 0, each rank saves beside its shard which kernel it chose for each matmul:
//   {"format_version": 1, "made_by": "NVIDIA H100 80GB HBM3, cuBLASLt 130100", "matmuls": [
//   {"sizes": [m, n, k, transpose, accumulate, epilogue, batch, a_type, b_type, fast_sums],
//    "algorithm": "128 hex digits"},
//   … ]}
// An algorithm is valid only for the GPU and the version of cuBLASLt that made it.

static const char* choices_path(const char* folder, int rank) {
    char name[64];
    snprintf(name, sizeof name, "matmuls_%05d.json", rank);
    return joined(folder, name);
}

// The GPU and the library, as a JSON string
static char* maker_of_choices() {
    int device = 0;
    cudaDeviceProp properties;
    CHECK_CUDA(cudaGetDevice(&device));
    CHECK_CUDA(cudaGetDeviceProperties(&properties, device));
    return to_string([&](FILE* file) {
        fprintf(file, "\"%s, cuBLASLt %zu\"", properties.name, cublasLtGetVersion());
    });
}

static void save_choices(const char* path) {
    char* maker = maker_of_choices();
    FILE* file = create_part(path);
    fprintf(file, "{\"format_version\": 1, \"made_by\": %s, \"matmuls\": [", maker);
    const char* separator = "\n";
    for (int i = 0; i < cublas.n_plans; i++) {
        Matmul mm = cublas.plans[i].matmul;
        if (cublas.plans[i].n_candidates != 1) { continue; }
        fprintf(file, "%s{\"sizes\": [%d, %d, %d, %d, %d, %d, %d, %d, %d, %d], \"algorithm\": \"",
                separator, mm.m, mm.n, mm.k, mm.transpose, mm.accumulate, mm.epilogue, mm.batch,
                mm.a_type, mm.b_type, mm.fast_sums);
        for (uint64_t word : cublas.plans[i].candidates[0].data) {
            fprintf(file, "%016llx", (unsigned long long)word);
        }
        fputs("\"}", file);
        separator = ",\n";
    }
    fputs("]}\n", file);
    finish(file, path);
    free(maker);
}

// Reads what save_choices wrote, if there is such a file.
static void load_choices(const char* path) {
    char* text = read_json(path);
    if (text == NULL) { return; }
    char* maker = maker_of_choices();
    bool is_known = json_number(text, "format_version", 0) == 1;
    if (!is_known || !json_is(text, "made_by", maker)) {
        printf("%s is not of %s, so the kernels of matmuls are chosen again\n", path, maker);
        free(text);
        free(maker);
        return;
    }
    const char* line = strchr(text, '\n');
    while (line != NULL && line[1] != '\0' && cublas.n_choices < MAX_PLANS) {
        Choice* choice = &cublas.choices[cublas.n_choices++];
        Matmul* mm = &choice->matmul;
        int transpose, accumulate, epilogue, a_type, b_type, fast_sums;
        char digits[129] = "";
        int end = 0;                    // stays 0 unless all of the line is as expected
        sscanf(line, " {\"sizes\": [%d, %d, %d, %d, %d, %d, %d, %d, %d, %d], \"algorithm\": "
               "\"%128[0-9a-f]\"}%n", &mm->m, &mm->n, &mm->k, &transpose, &accumulate, &epilogue,
               &mm->batch, &a_type, &b_type, &fast_sums, digits, &end);
        if (end == 0 || strlen(digits) != 128) {
            die("%s is damaged: it must be a list of sizes and algorithms; copy it again, or "
                "remove it, so that kernels are chosen again", path);
        }
        for (int i = 0; i < 8; i++) {
            sscanf(digits + 16 * i, "%16lx", &choice->algorithm.data[i]);
        }
        mm->transpose = (Transpose)transpose;
        mm->accumulate = accumulate != 0;
        mm->epilogue = (Epilogue)epilogue;
        mm->a_type = (cudaDataType_t)a_type;
        mm->b_type = (cudaDataType_t)b_type;
        mm->fast_sums = fast_sums != 0;
        line = strchr(line + 1, '\n');
    }
    free(text);
    free(maker);
}

// Saves the state of a step and the checkpoint. Each rank writes its shard into <run>/state/step_N;
// then the checkpoint is written; rank 0 writes state.json, without which the folder does not
// count, and deletes older states. So a run that is killed at any moment has the complete state of
// one step, and a checkpoint that is not older.
static void save_run(Model* model, Ranks* ranks, const State* state, int64_t n_tokens,
                     double val_bpb) {
    check_weights(model, ranks, state->step);
    char folder[4096];
    state_folder(folder, state->step);
    make_folders(folder);
    save_shard(model, ranks, folder);
    bool chose = cublas.times_candidates || cublas.n_choices > 0;
    if (chose) { save_choices(choices_path(folder, ranks->rank)); }
    barrier(ranks);                 // now every rank's shard is there
    save_checkpoint(model, ranks, state->step, val_bpb);
    if (ranks->rank == 0) {
        write_state(model->config, ranks, state, n_tokens, joined(folder, "state.json"));
        delete_other_states(folder);
    }
    barrier(ranks);
}

// Writes the checkpoint of a finished run again if it was deleted or is of another step.
static void repair_checkpoint(Log* log, Model* model, Ranks* ranks, int64_t step) {
    struct stat weights = {};
    size_t bytes = 0;
    char* config = read_file(joined(arguments.out, "config.json"), &bytes);
    bool has_weights = stat(joined(arguments.out, "model.safetensors"), &weights) == 0 &&
                       weights.st_size > 4 * model->table.file_size;
    bool has_config = config != NULL && is_object(config, bytes) &&
                      json_number(config, "step", -1) == step &&
                      json_is(config, "stage", "\"pretrain\"");
    free(config);
    double n_found = has_weights && has_config ? 1 : 0;
    ranks_sum(ranks, &n_found, 1);          // all ranks take part in writing
    if (n_found == ranks->world_size) { return; }
    save_checkpoint(model, ranks, step, 0);
    say_text(log, "the checkpoint of step %lld was missing and is written again", (long long)step);
}

// The newest step whose folder has a state.json, or -1
static int64_t newest_state() {
    int64_t newest = -1;
    for_each_file(joined(arguments.out, "state"), [&](const char* folder) {
        char expected[4096];
        const char* name = strrchr(folder, '/') + 1;
        if (!starts_with(name, "step_")) { return; }
        int64_t step = strtoll(name + strlen("step_"), NULL, 10);
        state_folder(expected, step);
        bool is_state = strcmp(folder, expected) == 0;
        if (is_state && access(joined(folder, "state.json"), F_OK) == 0) {
            newest = max(newest, step);
        }
    });
    return newest;
}

// Keeps other processes from training in this run, until this one ends or is killed. Rank 0 locks
// <run>/lock as training.py does, and never closes it.
static void lock_run(Ranks* ranks) {
    double n_refused = 0;
    if (ranks->rank == 0) {
        make_folders(arguments.out);
        const char* path = joined(arguments.out, "lock");
        int file = open(path, O_RDWR | O_CREAT, 0666);
        if (file < 0) { die_uncreated(path); }
        bool is_held = lockf(file, F_TLOCK, 0) != 0 && (errno == EACCES || errno == EAGAIN);
        if (is_held) { n_refused++; }       // other errors: this file system has no locks
    }
    ranks_sum(ranks, &n_refused, 1);
    if (n_refused > 0) {
        die("another process is training in %s; wait until it ends, or choose another --out",
            arguments.out);
    }
}

// Which elements of a bucket, counted from its first, a rank has of a state tensor; the first of
// them is element `at` of the rank's array. A Muon bucket's v has a count of its own.
struct Range { int64_t first, end, at; };

static Range state_range(Table table, const Part* parts, int b, int tensor) {
    Bucket bucket = table.buckets[b];
    Part part = parts[b];
    int64_t first = part.first - bucket.offset;
    if (tensor != SECOND_MOMENTS) { return {first, first + part.size, part.state}; }
    if (bucket.is_muon()) { first = 0; }
    return {first, first + parts[b + 1].v - part.v, part.v};
}

// Copies what a rank's array `to` and another's array `from` have in common, bucket by bucket. The
// other is of a run with another number of ranks, where a bucket has the same tensors, but perhaps
// another padding and other owners.
static void copy_overlap(float* to, Table table, const Part* parts, const float* from, Table old,
                         const Part* old_parts, int tensor) {
    for (int b = 0; b < table.n_buckets; b++) {
        Range here = state_range(table, parts, b, tensor);
        Range there = state_range(old, old_parts, b, tensor);
        int64_t begin = max(here.first, there.first);
        int64_t end = min(here.end, there.end);
        if (begin >= end) { continue; }
        memcpy(to + here.at + begin - here.first, from + there.at + begin - there.first,
               (end - begin) * sizeof(float));
    }
}

// Restores this rank's arrays from the shards of `old_ranks` ranks. If there are as many ranks as
// before, a rank reads its own shard alone, else all of them, one after another.
static void load_shards(Model* model, Ranks* ranks, const char* folder, int old_ranks) {
    Table table = model->table;
    Table old = make_table(model->config, old_ranks);
    float* to[] = {model->masters, model->m, model->v};
    for (int i = 0; i < N_STATE_TENSORS; i++) {
        int64_t n = state_size(table, model->parts, i);
        float* mine = (float*)calloc(n, sizeof(float));
        for (int r = 0; r < old_ranks; r++) {
            if (old_ranks == ranks->world_size && r != ranks->rank) { continue; }
            Part* old_parts = make_parts(old, r, old_ranks);
            int64_t old_n = state_size(old, old_parts, i);
            float* shard = (float*)malloc(old_n * sizeof(float));
            char name[64];
            snprintf(name, sizeof name, "rank_%05d.safetensors", r);
            SafeTensors file = open_safetensors(joined(folder, name));
            read_tensor(file, STATE_TENSORS[i], old_n, shard);
            copy_overlap(mine, table, model->parts, shard, old, old_parts, i);
            close_safetensors(file);
            free(shard);
            free(old_parts);
        }
        CHECK_CUDA(cudaMemcpy(to[i], mine, n * sizeof(float), cudaMemcpyHostToDevice));
        free(mine);
    }
    CHECK_CUDA(cudaDeviceSynchronize());        // such a copy may return before it has arrived
}

// Says which setting of a saved run is not the same any more.
[[noreturn]] static void die_changed(const char* text, const char* settings) {
    for (const char* key : {"total_batch_size", "seq_len", "max_steps", "seed", "lr", "n_tokens",
                            "bf16", "fp8"}) {
        double before = json_number(text, key, 0);
        double now = json_number(settings, key, 0);
        if (before == now) { continue; }
        die("%s was begun with %s %.10g, not %.10g; give the same flags, or choose another --out",
            arguments.out, key, before, now);
    }
    die("%s was begun with another --model or --config; give the same flags, or choose another "
        "--out", arguments.out);
}

// Restores what save_run wrote, for any number of ranks; false: there is nothing to resume.
static bool load_state(Model* model, Ranks* ranks, State* state, int64_t n_tokens) {
    int64_t step = newest_state();
    if (step >= 0 && !arguments.resume) {
        die("%s holds a saved run, which would be overwritten; add --resume to continue it, or "
            "choose another --out", arguments.out);
    }
    if (step < 0) {
        // a run that was killed in its first save has a folder state/; --resume begins it again
        bool begins_again = arguments.resume && access(joined(arguments.out, "state"), F_OK) == 0;
        bool has_model = access(joined(arguments.out, "config.json"), F_OK) == 0 ||
                         access(joined(arguments.out, "model.safetensors"), F_OK) == 0;
        if (!has_model || begins_again) { return false; }
        die("%s holds a model but no saved state, and training would overwrite the model; choose "
            "another --out", arguments.out);
    }
    char folder[4096];
    state_folder(folder, step);
    char path[4200];
    snprintf(path, sizeof path, "%s/state.json", folder);
    char* text = read_json(path);
    int version = (int)json_number(text, "format_version", 0);
    if (version != STATE_VERSION) {
        die("%s holds a saved state of format %d, but only format %d can be resumed, because the "
            "order of the rows has changed; train again in another --out", arguments.out, version,
            STATE_VERSION);
    }
    // settings are compared as text: the same settings are written as the same bytes
    char* settings = to_string([&](FILE* file) { write_settings(file, model->config, n_tokens); });
    if (strstr(text, settings) == NULL) { die_changed(text, settings); }
    int64_t position = step * (arguments.total_batch_size / arguments.seq_len);
    state->step = json_integer(path, text, "step", step, step);
    state->position = json_integer(path, text, "position", position, position);
    state->optimizer_steps = json_integer(path, text, "optimizer_steps", 0, step);
    state->usd = fmax(json_number(text, "usd", 0), 0);
    state->losses = read_window(path, text, "losses");
    state->norms = read_window(path, text, "norms");
    load_shards(model, ranks, folder, (int)json_integer(path, text, "world_size", 1, MAX_SIZE));
    load_choices(choices_path(folder, ranks->rank));
    free(text);
    free(settings);
    restore_parameters(model, ranks, (int)state->optimizer_steps);
    return true;
}

// ---- §18 Questions and samples ------------------------------------------------------------------
//
// Shows at evaluations what the model can do: HellaSwag, as run_task of eval.py asks it, and two
// continuations, as Engine of sample.py writes them, though without a cache.

// The same model for B rows of T tokens, which must fit in the memory of the model's own.
static Model shortened(const Model* model, int B, int T) {
    Model part = *model;
    part.B = B;
    part.T = T;
    return part;
}

// hellaswag.bin, as eval.py hellaswag writes it, is all int32: magic, version, vocabulary size, the
// number of int32s in the file, the number of questions; then for each question the index of its
// right answer and the number of answers; then for each answer the number n of its tokens, where
// the answer begins in them, and the n tokens: <|endoftext|>, question, answer.
struct HellaSwag { const int* data; int n_questions, longest; };

const int HELLASWAG_MAGIC = 20251121;

// Past an answer's two numbers and its tokens
static const int* next_answer(const int* answer) { return answer + 2 + answer[0]; }

// Reads the file and finds its longest answer, which decides how long rows must be.
static HellaSwag open_hellaswag(const char* core_dir, int V) {
    const char* path = joined(core_dir, "hellaswag.bin");
    size_t bytes = 0;
    const int* data = (const int*)read_file(path, &bytes);
    bool is_valid = data != NULL && data[0] == HELLASWAG_MAGIC && data[1] == 1 && data[2] == V &&
                    bytes == 4 * (size_t)data[3];
    if (!is_valid) {
        die("%s %s; run python eval.py hellaswag --core_dir %s --tokenizer %s/tokenizer", path,
            data == NULL ? "does not exist" : "is cut short or was made with another tokenizer",
            core_dir, arguments.data);
    }
    HellaSwag questions = {data + 5, data[4], 0};
    const int* at = questions.data;
    const int* end = data + data[3];
    auto check = [&](bool is_whole) {
        if (is_whole) { return; }
        die("%s is damaged; delete it and run python eval.py hellaswag again", path);
    };
    for (int q = 0; q < questions.n_questions; q++) {
        check(at + 2 <= end);
        int n_answers = at[1];
        at += 2;
        for (int i = 0; i < n_answers; i++) {
            check(at + 2 <= end && at[0] >= 2 && next_answer(at) <= end);
            for (int k = 0; k < at[0]; k++) { check(at[2 + k] >= 0 && at[2 + k] < V); }
            questions.longest = max(questions.longest, at[0]);
            at = next_answer(at);
        }
    }
    return questions;
}

// An answer's tokens → inputs (T) and targets (T), which are -1 outside of the answer itself. With
// two tokens q of a question, two of an answer, and E for <|endoftext|>, so n = 5 and begin = 3:
//   inputs   E  q  q  a  0 …
//   targets -1 -1  a  a -1 …
// If the tokens are too many, the beginning of the question is left out.
static void fill_row(const int* answer, int T, int* inputs, int* targets) {
    int cut = max(0, answer[0] - 1 - T);
    const int* ids = answer + 2 + cut;
    int n = answer[0] - cut;
    int start = max(1, answer[1] - cut);        // of the answer; the first token has no prediction
    for (int t = 0; t < T; t++) {
        bool exists = t + 1 < n;
        bool is_scored = exists && t + 1 >= start;
        inputs[t] = exists ? ids[t] : 0;
        targets[t] = is_scored ? ids[t + 1] : -1;
    }
}

struct Asked { int question; bool is_right; };      // whose answer a row is, and if the right one
struct Best { double loss; bool is_right; };        // mean loss a token of a question's best answer

// Answers that are scored together, a row each
struct Scoring {
    Model model;
    Loader* loader;
    int* inputs;                // the staging buffer that is being filled
    int n_rows;                 // of B
    Asked* rows;                // (B)
    Best* best;                 // (n_questions)
    float* losses;              // (B · T)
};

// Scores the rows that are filled, and begins with an empty buffer. Rows without an answer have no
// targets, so they cost time, but change nothing.
static void score_rows(Scoring* s) {
    int B = s->model.B, T = s->model.T;
    int* targets = s->inputs + B * T;
    for (int i = s->n_rows * T; i < B * T; i++) {
        s->inputs[i] = 0;
        targets[i] = -1;
    }
    batch_losses(&s->model, s->loader, s->losses);
    for (int row = 0; row < s->n_rows; row++) {
        double sum = 0;
        int n = 0;
        for (int i = row * T; i < (row + 1) * T; i++) {
            sum += s->losses[i];
            if (targets[i] >= 0) { n++; }
        }
        Asked asked = s->rows[row];
        Best* best = &s->best[asked.question];
        if (sum / n < best->loss) { *best = {sum / n, asked.is_right}; }
    }
    s->inputs = begin_batch(s->loader);
    s->n_rows = 0;
}

// HellaSwag's accuracy: the share of questions whose right answer has the highest mean log
// probability a token. Each rank takes every world_size-th question.
static double hellaswag(Model* model, Loader* loader, HellaSwag questions, Ranks* ranks) {
    int B = model->B;
    int T = min(model->T, ceil_div(questions.longest - 1, 64) * 64);    // whole tiles of attention
    Scoring scoring = {shortened(model, B, T), loader, begin_batch(loader)};
    scoring.rows = (Asked*)malloc(B * sizeof(Asked));
    scoring.best = (Best*)malloc(questions.n_questions * sizeof(Best));
    scoring.losses = (float*)malloc((size_t)B * T * sizeof(float));
    const int* at = questions.data;
    for (int q = 0; q < questions.n_questions; q++) {
        int right = at[0];
        int n_answers = at[1];
        at += 2;
        scoring.best[q] = {INFINITY, false};
        for (int i = 0; i < n_answers; i++) {
            const int* answer = at;
            at = next_answer(at);
            if (q % ranks->world_size != ranks->rank) { continue; }
            int* inputs = scoring.inputs + scoring.n_rows * T;
            fill_row(answer, T, inputs, inputs + B * T);
            scoring.rows[scoring.n_rows] = {q, i == right};
            scoring.n_rows++;
            if (scoring.n_rows == B) { score_rows(&scoring); }
        }
    }
    if (scoring.n_rows > 0) { score_rows(&scoring); }
    double sums[2] = {};                    // right, asked
    for (int q = ranks->rank; q < questions.n_questions; q += ranks->world_size) {
        if (scoring.best[q].is_right) { sums[0]++; }
        sums[1]++;
    }
    free(scoring.rows);
    free(scoring.best);
    free(scoring.losses);
    ranks_sum(ranks, sums, 2);
    return sums[0] / sums[1];
}

// The bytes of each token; n is 0 where the data have no tokenizer. Special tokens have 0 bytes.
struct Vocabulary { char** bytes; int *sizes, n, eot; };

// Decodes the text from `begin` to before `end` into bytes; returns their number.
static int decode_base64(const char* begin, const char* end, char* bytes) {
    const char* DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    int size = 0;
    int n_bits = 0;                         // how many of `bits`, the lowest, wait to be a byte
    uint32_t bits = 0;
    for (const char* c = begin; c < end && *c != '='; c++) {
        bits = bits << 6 | (uint32_t)(strchr(DIGITS, *c) - DIGITS);
        n_bits += 6;
        if (n_bits < 8) { continue; }
        n_bits -= 8;
        bytes[size] = (char)(bits >> n_bits);
        size++;
    }
    return size;
}

// tokenizer.tiktoken has a line for each token: its bytes in base64, a space, its number.
static Vocabulary read_vocabulary(const char* data, int V) {
    char* text = read_file(joined(data, "tokenizer/tokenizer.tiktoken"));
    const char* header_path = joined(data, "tokenizer/tokenizer.json");
    char* header = read_json(header_path);
    Vocabulary vocabulary = {};
    vocabulary.bytes = (char**)calloc(V, sizeof(char*));
    vocabulary.sizes = (int*)calloc(V, sizeof(int));
    if (text == NULL || header == NULL) { return vocabulary; }
    vocabulary.n = V;
    vocabulary.eot = (int)json_integer(header_path, header, "<|endoftext|>", 0, V - 1);
    for (char* line = strtok(text, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        char* space = strchr(line, ' ');
        int token = space != NULL ? atoi(space) : -1;
        if (token < 0 || token >= V) { continue; }
        vocabulary.bytes[token] = (char*)malloc(strlen(line));
        vocabulary.sizes[token] = decode_base64(line, space, vocabulary.bytes[token]);
    }
    free(text);
    free(header);
    return vocabulary;
}

// The token with these bytes, or -1. Slow, but it is asked for two prompts only.
static int find_token(const Vocabulary* vocabulary, const char* bytes, int size) {
    for (int i = 0; i < vocabulary->n; i++) {
        if (vocabulary->sizes[i] == size && memcmp(vocabulary->bytes[i], bytes, size) == 0) {
            return i;
        }
    }
    return -1;
}

// BPE on a word that the tokenizer's pattern does not split: merges the pair that makes the token
// with the lowest number, until no pair makes a token. Returns how many ids it wrote.
static int encode_word(const Vocabulary* vocabulary, const char* word, int size, int* ids) {
    int ends[64];                           // of the parts; each part begins where the last ends
    int n = size;
    for (int i = 0; i < n; i++) { ends[i] = i + 1; }
    while (true) {
        int lowest = INT32_MAX;
        int lowest_at = -1;
        for (int i = 0; i + 1 < n; i++) {
            int begin = i > 0 ? ends[i - 1] : 0;
            int token = find_token(vocabulary, word + begin, ends[i + 1] - begin);
            if (token < 0 || token >= lowest) { continue; }
            lowest = token;
            lowest_at = i;
        }
        if (lowest_at < 0) { break; }
        n--;
        memmove(ends + lowest_at, ends + lowest_at + 1, (n - lowest_at) * sizeof(int));
    }
    for (int i = 0; i < n; i++) {
        int begin = i > 0 ? ends[i - 1] : 0;
        ids[i] = find_token(vocabulary, word + begin, ends[i] - begin);
        if (ids[i] < 0) {
            die("%s/tokenizer/tokenizer.tiktoken has no token for the letter %c; copy the file "
                "again", arguments.data, word[begin]);
        }
    }
    return n;
}

const int MAX_CONTEXT = 64;             // tokens of a prompt and its continuation together
const int SAMPLE_TOKENS = 48;           // tokens of a continuation
const double TEMPERATURE = 0.8;

// Draws the next token from the softmax of logits (V) / temperature: the first token at which the
// cumulative probability exceeds a uniform random number.
static int draw(const floatX* logits, int V, uint64_t seed, uint64_t place) {
    double highest = -INFINITY;
    for (int i = 0; i < V; i++) { highest = fmax(highest, (float)logits[i]); }
    double sum = 0;
    for (int i = 0; i < V; i++) { sum += exp(((float)logits[i] - highest) / TEMPERATURE); }
    double left = uniform(seed, place) * sum;
    for (int i = 0; i < V; i++) {
        left -= exp(((float)logits[i] - highest) / TEMPERATURE);
        if (left < 0) { return i; }
    }
    return V - 1;
}

// The logits (Vp) that follow n tokens, with dN's soft cap; `model` is of one row.
static void next_logits(Model* model, Loader* loader, const int* ids, int n, floatX* logits) {
    int T = model->T;
    int Vp = padded_vocab(model->config);
    int* inputs = begin_batch(loader);
    int* targets = inputs + T;
    for (int t = 0; t < T; t++) {
        inputs[t] = t < n ? ids[t] : 0;
        targets[t] = -1;
    }
    send_batch(loader, model);
    forward(model, false);
    CHECK_CUDA(cudaMemcpyAsync(logits, model->logits + (int64_t)(n - 1) * Vp, Vp * sizeof(floatX),
                               cudaMemcpyDeviceToHost, model->stream));
    CHECK_CUDA(cudaStreamSynchronize(model->stream));
    for (int i = 0; i < model->config.vocab_size; i++) {
        logits[i] = (floatX)capped((float)logits[i], model->config.softcap);
    }
}

// Continues ids (MAX_CONTEXT), of which n are the prompt, up to <|endoftext|>; the model reads the
// whole row again for each token. Returns how many there are then.
static int continue_ids(Model* model, Loader* loader, int eot, uint64_t seed, int* ids, int n) {
    int end = min(n + SAMPLE_TOKENS, model->T);
    floatX* logits = (floatX*)malloc(padded_vocab(model->config) * sizeof(floatX));
    while (n < end) {
        next_logits(model, loader, ids, n, logits);
        ids[n] = draw(logits, model->config.vocab_size, seed, n);
        n++;
        if (ids[n - 1] == eot) { break; }
    }
    free(logits);
    return n;
}

// Logs "prompt" and its continuation; the text of a model may end within a character of UTF-8.
static void say_sample(Log* log, const char* prompt, const char* text, size_t bytes,
                       int64_t step) {
    char* line = to_string([&](FILE* file) {
        fprintf(file, "  sample: %s", prompt);
        write_json_string(file, text, bytes);
    });
    char* row = to_string([&](FILE* file) {
        fprintf(file, "\"step\": %lld, \"sample\": \"%s", (long long)step, prompt);
        fputs(strchr(line, '"') + 1, file);         // the prompts have no quotes
    });
    say(log, line, row);
    free(line);
    free(row);
}

// Two continuations, a line each, on one rank
static void say_samples(Log* log, Model* model, Loader* loader, const Vocabulary* vocabulary,
                        int64_t step) {
    Model part = shortened(model, 1, min(model->T, MAX_CONTEXT));
    const char* prompts[][2] = {{"The", ""}, {"Return", " the"}};       // word by word
    for (int which = 0; which < 2; which++) {
        int ids[MAX_CONTEXT] = {vocabulary->eot};
        int first = 1;
        for (const char* word : prompts[which]) {
            first += encode_word(vocabulary, word, strlen(word), ids + first);
        }
        int n = continue_ids(&part, loader, vocabulary->eot, which, ids, first);
        size_t bytes = 0;
        char* text = to_string([&](FILE* file) {
            for (int i = first; i < n; i++) {
                int size = vocabulary->sizes[ids[i]];
                if (size > 0) { fwrite(vocabulary->bytes[ids[i]], 1, size, file); }
            }
        }, &bytes);
        char prompt[64];
        snprintf(prompt, sizeof prompt, "%s%s", prompts[which][0], prompts[which][1]);
        say_sample(log, prompt, text, bytes, step);
        free(text);
    }
}

// ---- §19 Main -----------------------------------------------------------------------------------
//
// Schedules, the arithmetic of a step, and the training loop, as in recipe.py and train_gpt2.py.
// The constants of GPT-2 are llm.c's, those of dN are nanochat's; recipe.py names the sources.

// GPT-2's share of the peak learning rate: linear warm-up, then a cosine to 0
static double gpt2_schedule(int64_t step, int64_t max_steps) {
    int64_t warmup = min(max_steps / 10, (int64_t)700);
    if (step < warmup) { return (step + 1.0) / warmup; }
    int64_t rest = max(max_steps - warmup, (int64_t)1);
    return 0.5 * (1 + cos(M_PI * (step - warmup) / rest));
}

// Weights that multiply every token: the blocks' matrices and the head
static double matmul_parameters(Config config) {
    double C = config.n_embd;
    int n_gates = config.modern ? ceil_div(config.n_layer, 2) : 0;
    return 12.0 * config.n_layer * C * C + config.vocab_size * C +
           n_gates * config.n_head * GATE_INPUTS;
}

// Forward and backward, as PaLM counts (arXiv 2204.02311, appendix B): 6 for each weight, and 12·C
// for each key that a token sees, in each layer
static double flops_per_token(Config config, int T) {
    double keys = 0;
    for (int l = 0; l < config.n_layer; l++) { keys += min(config.window(l), T); }
    return 6 * matmul_parameters(config) + 12.0 * config.n_embd * keys;
}

const double D12_MATMUL_PARAMETERS = 110.1e6;   // where dN's decay and batch size were tuned
const double GPT2_MATMUL_PARAMETERS = 12.0 * 12 * 768 * 768 + 50257.0 * 768;    // of the 124M
const double TUNED_BATCH = 1 << 19;             // tokens a step, where dN's rates were tuned

// What the step after `step` steps multiplies its update by: for GPT-2, schedule and clipping; for
// dN, the schedules of rate, momentum and decay. The twin of schedule in recipe.py.
static Update plan_update(Config config, int64_t step, double norm) {
    const Arguments& a = arguments;
    int64_t n = a.max_steps;
    if (!config.modern) {                       // gradients are clipped at norm 1
        double clip = fmin(1.0, 1.0 / (norm + 1e-6));
        return {a.lr * gpt2_schedule(step, n), clip, 0, 1, 0};
    }
    // 40 steps of warm-up; during the last 65 % the rate falls linearly to 5 %
    int64_t warmup = max(min(n / 10, (int64_t)40), (int64_t)1);
    double left = fmin(1.0, (n - step) / (0.65 * n));
    double lr_scale = fmin(1.0, (step + 1.0) / warmup) * (0.05 + 0.95 * left);
    // Muon's momentum rises for 400 steps from 0.85 to 0.97 and falls with the rate to 0.90
    double momentum = 0.85 + 0.12 * fmin(1.0, step / 400.0);
    if (left < 1) { momentum = 0.90 + (momentum - 0.90) * left; }
    double decay_scale = 0.5 * (1 + cos(M_PI * step / n));
    double muon_decay = 0.28 * sqrt(a.total_batch_size / TUNED_BATCH) * D12_MATMUL_PARAMETERS /
                        matmul_parameters(config);
    // no clipping, which would never act in dN
    return {a.lr * lr_scale, 1, momentum, decay_scale, muon_decay};
}

// Tokens to train on: 8 a parameter for dN; for GPT-2 a power law through llm.c's runs, 10 billion
// tokens for 124M parameters and 33.6 billion for 1558M
static double default_tokens(Config config) {
    double size = matmul_parameters(config);
    return config.modern ? 8 * size : 1e10 * pow(size / GPT2_MATMUL_PARAMETERS, 0.48);
}

// Tokens a step, a power of two: 2¹⁹ for d12 and for 124M, more for larger models
static int64_t default_batch(Config config) {
    double size = matmul_parameters(config);
    double scale = config.modern ? pow(size / D12_MATMUL_PARAMETERS, 0.383)
                                 : pow(size / GPT2_MATMUL_PARAMETERS, 0.27);
    return 1 << lround(19 + log2(scale));
}

// default_lr of training.py, where the reasons stand: for dN it grows with the root of the batch
// from 2¹⁸ tokens on, and toys get more
static double default_lr(Config config, int64_t batch_tokens) {
    if (!config.modern) { return 6e-4; }
    if (batch_tokens < 1 << 16) { return 0.028; }
    return 0.02 * fmax(sqrt(batch_tokens / TUNED_BATCH), sqrt(0.5));
}

const double MOST_TOKENS = 65536;       // at a time by default: more make matmuls no faster

// The most rows at a time, up to MOST_TOKENS, that fit into 90 % of the free memory and divide a
// step's rows evenly
static int64_t default_rows(Config config, int world_size) {
    const Arguments& a = arguments;
    size_t free_bytes = 0;
    size_t all_bytes = 0;
    CHECK_CUDA(cudaMemGetInfo(&free_bytes, &all_bytes));
    double fixed, row;
    memory_bytes(config, a.seq_len, a.recompute, world_size, &fixed, &row, a.fp8);
    int64_t most = fmax(1.0, fmin(MOST_TOKENS / a.seq_len, (0.9 * free_bytes - fixed) / row));
    int64_t rows = a.total_batch_size / (a.seq_len * world_size);
    int64_t found = 0;
    for (int64_t n = 1; n <= most; n++) {
        if (rows % n == 0) { found = n; }
    }
    return found;
}

// Sets max_steps, total_batch_size, batch_size and lr where no flag did; returns grad_accum_steps:
//   total_batch_size = batch_size · seq_len · world_size · grad_accum_steps      tokens a step
// The first is a property of the model, the second is what fits in memory; the last follows.
static int64_t plan_batch(Config config, int world_size) {
    Arguments* a = &arguments;
    if (a->total_batch_size == 0) { a->total_batch_size = default_batch(config); }
    if (a->lr == 0) { a->lr = default_lr(config, a->total_batch_size); }
    if (a->batch_size == 0) { a->batch_size = default_rows(config, world_size); }
    int64_t micro_tokens = a->batch_size * a->seq_len * world_size;
    if (micro_tokens < 1 || a->total_batch_size % micro_tokens != 0) {
        double times = micro_tokens > 0 ? (double)a->total_batch_size / micro_tokens : 1;
        die("--total_batch_size %lld must be a multiple of batch_size*seq_len*world_size = %lld; "
            "try --total_batch_size %lld", (long long)a->total_batch_size, (long long)micro_tokens,
            max(llround(times), 1ll) * micro_tokens);
    }
    if (a->max_steps < 0) {
        a->max_steps = max(llround(default_tokens(config) / a->total_batch_size), 1ll);
    }
    return a->total_batch_size / micro_tokens;
}

// Dense bf16 FLOP/s as data sheets state them; 0: unknown, and no MFU is shown
static double peak_flops(const char* gpu) {
    const struct { const char* name; double flops; } known[] = {
        {"H100 PCIe", 756e12}, {"H100", 989e12}, {"H200", 989e12}, {"B200", 2250e12},
        {"A100", 312e12}, {"L40S", 362e12}, {"4090", 165e12}, {"3090", 71e12}};
    for (auto each : known) {
        if (BF16 && strstr(gpu, each.name) != NULL) { return each.flops; }
    }
    return 0;
}

// Bytes/s of this GPU's memory: clock times width, with two transfers a clock
static double peak_bandwidth() {
    int device = 0;
    int khz = 0;
    int bits = 0;
    CHECK_CUDA(cudaGetDevice(&device));
    CHECK_CUDA(cudaDeviceGetAttribute(&khz, cudaDevAttrMemoryClockRate, device));
    CHECK_CUDA(cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device));
    return 2.0 * 1000 * khz * bits / 8;
}

// The GPU that start_ranks chose
static cudaDeviceProp find_gpu() {
    int device = 0;
    cudaDeviceProp properties;
    CHECK_CUDA(cudaGetDevice(&device));
    CHECK_CUDA(cudaGetDeviceProperties(&properties, device));
    if (BF16 && properties.major < 8) {
        die("%s has no bf16 tensor cores, which came with compute capability 8.0; build with make "
            "train_gpt2cu PRECISION=FP32", properties.name);
    }
    if (arguments.fp8 && !BF16) {
        die("--fp8 1 takes a build in bf16; run make train_gpt2cu without PRECISION=FP32");
    }
    if (arguments.fp8 && properties.major * 10 + properties.minor < 89) {
        die("%s has no 8-bit tensor cores, which came with compute capability 8.9; leave --fp8 out",
            properties.name);
    }
    return properties;
}

// Sets which kernels attention uses for heads of 64 and 128. In fp32 there is no choice.
static void choose_attention(cudaDeviceProp gpu) {
    const char* wanted = arguments.attention;
    if (wanted != NULL && strcmp(wanted, "wgmma") != 0 && strcmp(wanted, "mma") != 0) {
        die("--attention must be wgmma or mma, got %s; see --help", wanted);
    }
#ifndef FP32
    int compiled = 0;
    CHECK_CUDA(cudaMemcpyFromSymbol(&compiled, compiled_for_sm_90a, sizeof compiled));
    bool is_here = gpu.major == 9 && compiled;
    if (wanted != NULL && strcmp(wanted, "wgmma") == 0 && !is_here) {
        die("--attention wgmma needs a GPU of compute capability 9.0, got %s, and a build for it; "
            "use make train_gpt2cu GPU_ARCHS=90a, or leave --attention out", gpu.name);
    }
    use_wgmma = is_here && (wanted == NULL || strcmp(wanted, "wgmma") == 0);
    arguments.attention = use_wgmma ? "wgmma" : "mma";
#endif
}

// After SIGTERM or SIGINT all ranks save and leave after the same step.
static volatile sig_atomic_t stop_asked;
static void on_signal(int) { stop_asked = 1; }

// All flags as JSON, with the values that were chosen for those not given
static void write_flags(FILE* file) {
    const char* separator = "{";
    for (const Flag& flag : FLAGS) {
        fprintf(file, "%s\"%s\": ", separator, flag.name);
        separator = ", ";
        if (flag.integer != NULL) {
            fprintf(file, "%lld", (long long)*flag.integer);
        } else if (flag.real != NULL) {
            fprintf(file, "%.15g", *flag.real);
        } else if (flag.is_on != NULL) {
            fprintf(file, "%d", *flag.is_on);
        } else if (*flag.text != NULL) {
            write_json_string(file, *flag.text, strlen(*flag.text));
        } else {
            fputs("null", file);
        }
    }
    fputc('}', file);
}

// What it takes to repeat the run: command, versions, device, flags; then the batch and the memory
static void say_header(Log* log, Model* model, Ranks* ranks, const char* gpu, const char* command,
                       int64_t n_tokens) {
    const Arguments& a = arguments;
    char* flags = to_string(write_flags);
    char cuda[64];
    snprintf(cuda, sizeof cuda, "%d.%d, cuBLASLt %zu, %s", CUDART_VERSION / 1000,
             CUDART_VERSION / 10 % 100, cublasLtGetVersion(), BF16 ? "bf16" : "fp32");
    long long params = model->table.file_size;
    char* row = to_string([&](FILE* file) {
        fprintf(file, "\"header\": {\"command\": ");
        write_json_string(file, command, strlen(command));
        fprintf(file, ", \"commit\": \"unknown\", \"cuda\": \"%s\", \"flags\": %s, \"params\": "
                "%lld, \"device\": \"%s\"}", cuda, flags, params, gpu);
    });
    int64_t T = model->T;
    int64_t grad_accum_steps = a.total_batch_size / (a.batch_size * T * ranks->world_size);
    double fixed, row_bytes;
    memory_bytes(model->config, T, a.recompute, ranks->world_size, &fixed, &row_bytes,
                 model->fp8 != NULL);
    char* lines = to_string([&](FILE* file) {
        fprintf(file, "command  %s\ncommit   unknown\ncuda     %s\nflags    %s\nparams   %lld\n"
                "device   %s\n", command, cuda, flags, params, gpu);
        fprintf(file, "%lld tokens a step = %lld rows x %lld tokens x %d ranks x %lld accumulated; "
                "%lld steps = %.2f epochs of %lld tokens\n", (long long)a.total_batch_size,
                (long long)a.batch_size, (long long)T, ranks->world_size,
                (long long)grad_accum_steps, (long long)a.max_steps,
                (double)a.max_steps * a.total_batch_size / n_tokens, (long long)n_tokens);
        fprintf(file, "%.0f parameters in matmuls, %.3g FLOP a token; memory about %.1f GB a rank, "
                "%.2f GB of it a row: if it does not fit, halve --batch_size",
                matmul_parameters(model->config), flops_per_token(model->config, T),
                (fixed + a.batch_size * row_bytes) / 1e9, row_bytes / 1e9);
    });
    say(log, lines, row);
    free(flags);
    free(row);
    free(lines);
}

// What evaluations read
struct Validation {
    Shards shards;
    int* token_bytes;           // (V) or NULL
    HellaSwag questions;        // none without --core_dir
    Vocabulary vocabulary;
};

// Opens everything before training begins, so that a missing file ends the run at once.
static Validation open_validation(int V) {
    Validation validation = {};
    validation.shards = open_shards(arguments.data, "val");
    validation.token_bytes = read_token_bytes(arguments.data, V);
    if (arguments.core_dir != NULL) {
        validation.questions = open_hellaswag(arguments.core_dir, V);
    }
    validation.vocabulary = read_vocabulary(arguments.data, V);
    return validation;
}

// A new model knows nothing, so its logits are noise of some variance v, and its loss is
// ln V + v / 2. GPT-2's logits sum over C channels of variance 1 times weights of standard
// deviation 0.02; those of dN are near 0. Any other loss means that a kernel is wrong.
static void check_first_loss(double val_loss, Config config) {
    double expected = log(config.vocab_size);
    if (!config.modern) { expected += 0.02 * 0.02 * config.n_embd / 2; }
    if (fabs(val_loss / expected - 1) <= 0.05) { return; }
    die("val_loss is %.4f before step 1, but an untrained model's is %.4f, about ln(%d), so a "
        "kernel is wrong on this GPU; run make test_train_gpt2cu", val_loss, expected,
        config.vocab_size);
}

// Logs val loss, HellaSwag and samples; returns bits per byte.
static double log_evaluation(Log* log, Model* model, Loader* loader, Ranks* ranks,
                             const Validation* validation, int64_t step) {
    bool is_last = step == arguments.max_steps;
    ValLoss val = evaluate(model, loader, validation->shards, validation->token_bytes,
                           is_last ? validation->shards.n_tokens : VAL_TOKENS, ranks);
    if (!isfinite(val.val_loss)) {
        die("step %lld: val_loss %f must be finite; try a lower --lr in another --out (what was "
            "saved is kept)", (long long)step, val.val_loss);
    }
    Row row = begin_row(log, step);
    add(&row, "val_loss", val.val_loss, "val_loss %.6f");
    if (val.val_bpb > 0) { add(&row, "val_bpb", val.val_bpb, "val_bpb %.4f"); }
    if (validation->questions.n_questions > 0) {
        double accuracy = hellaswag(model, loader, validation->questions, ranks);
        add(&row, "hellaswag", accuracy, "hellaswag %.4f");
    }
    say(log, row.line, row.row);
    if (step == 0 && arguments.init_from == NULL) {
        check_first_loss(val.val_loss, model->config);
    }
    if (ranks->rank == 0 && validation->vocabulary.n > 0) {
        say_samples(log, model, loader, &validation->vocabulary, step);
    }
    return val.val_bpb;
}

// Forward and backward of one step; returns the mean loss over all ranks. `stop`: a rank was asked
// to. Each batch is read while the GPU is busy with the one before, even the next step's first.
static double accumulate(Model* model, Loader* loader, Ranks* ranks, int64_t position,
                         int64_t grad_accum_steps, bool* stop) {
    int B = model->B, BT = B * model->T;
    CHECK_CUDA(cudaMemsetAsync(model->loss_sum, 0, sizeof(double), model->stream));
    position += ranks->rank * B;
    if (model->fp8 != NULL) { quantise_weights(model); }
    for (int64_t micro_step = 0; micro_step < grad_accum_steps; micro_step++) {
        read_batch(loader, B, position);
        send_batch(loader, model);
        forward(model, true);
        sum_losses(model);
        backward(model, loader->n_groups, micro_step == grad_accum_steps - 1, ranks);
        position += ranks->world_size * B;
        read_batch(loader, B, position);
    }
    double sums[2] = {0, (double)stop_asked};
    CHECK_CUDA(cudaMemcpyAsync(&sums[0], model->loss_sum, sizeof(double), cudaMemcpyDeviceToHost,
                               model->stream));
    CHECK_CUDA(cudaStreamSynchronize(model->stream));
    ranks_sum(ranks, sums, 2);
    *stop = sums[1] > 0;
    return sums[0] / BT / grad_accum_steps / ranks->world_size;
}

// A step whose gradients are thrown away; the batch counts as read.
static void say_skipped(Log* log, int64_t step, double loss, double norm) {
    char line[256], row[64];
    snprintf(line, sizeof line, "step %lld: skipped, loss %.4f or norm %.4f stands out of the last "
             "%d", (long long)step, loss, norm, SPIKE_WINDOW);
    snprintf(row, sizeof row, "\"step\": %lld, \"skipped\": true", (long long)step);
    say(log, line, row);
}

struct StepNumbers { double loss, lr, norm, seconds, mfu, usd, eta; };      // mfu, usd 0: unknown

// The line and the row of a step, with the grammar of RunLog
static void log_step(Log* log, int64_t step, StepNumbers n) {
    Row row = begin_row(log, step);
    add(&row, "loss", n.loss, "loss %.6f");
    add(&row, "lr", n.lr, "lr %.2e");
    add(&row, "norm", n.norm, "norm %.4f");
    add(&row, "ms", 1000 * n.seconds, "%.1f ms");
    add(&row, "tok_s", arguments.total_batch_size / n.seconds, "%.0f tok/s");
    if (n.mfu > 0) {
        add(&row, "mfu", n.mfu, "mfu ");        // per cent in the line, a fraction in the row
        snprintf(row.line + strlen(row.line), 16, "%.1f%%", 100 * n.mfu);
    }
    if (n.usd > 0) { add(&row, "usd", n.usd, "$%.2f"); }
    add_eta(&row, n.eta);
    say(log, row.line, row.row);
}

// The command line, which the caller frees
static char* join_words(int n, char** words) {
    return to_string([&](FILE* file) {
        for (int i = 0; i < n; i++) { fprintf(file, "%s%s", i > 0 ? " " : "", words[i]); }
    });
}

// shards.py leaves the vocabulary's size in index.json. llm.c's shards have no such file; they
// consist of GPT-2's tokens.
static int read_vocab_size(const char* data) {
    const char* path = joined(data, "index.json");
    char* index = read_json(path);
    if (index == NULL) { return 50257; }
    int V = (int)json_integer(path, index, "n_vocab", 1, MAX_SIZE);
    free(index);
    return V;
}

int main(int argc, char** argv) {
    // flags and data
    parse_arguments(argc, argv);
    const Arguments& a = arguments;
    signal(SIGTERM, on_signal);
    signal(SIGINT, on_signal);
    signal(SIGXFSZ, SIG_IGN);           // a file beyond ulimit -f is an error of write instead
    int V = read_vocab_size(a.data);
    Shards train_shards = open_shards(a.data, "train");
    Validation validation = open_validation(V);
    Ranks ranks = start_ranks();
    cudaDeviceProp gpu = find_gpu();
    choose_attention(gpu);

    // model: its shape, how a step is divided, its memory
    const char* init_from = a.init_from != NULL ? init_folder() : NULL;
    Config config = init_from != NULL ? read_config(init_from) : choose_config(V);
    if (a.seq_len == 0) { arguments.seq_len = config.block_size; }
    check_config(config, V, a.seq_len);
    cublas.times_candidates = !a.deterministic;
    int64_t grad_accum_steps = plan_batch(config, ranks.world_size);
    bool fp8 = choose_fp8(config);
    Model model = make_model(config, a.batch_size, a.seq_len, a.recompute, &ranks, fp8);
    Loader loader = make_loader(train_shards, a.batch_size, a.seq_len, V, a.seed);

    // weights: from a saved state, from another model, or random
    lock_run(&ranks);
    State state = {};
    bool resumed = load_state(&model, &ranks, &state, train_shards.n_tokens);
    if (!resumed && init_from != NULL) {
        load_weights(&model, &ranks, joined(init_from, "model.safetensors"));
    } else if (!resumed) {
        initialise(&model, &ranks, a.seed);
    }
    Log log = open_log(a.max_steps, state.step, resumed, ranks.rank == 0);
    if (resumed && state.step >= a.max_steps) {
        repair_checkpoint(&log, &model, &ranks, state.step);
        say_text(&log, "%s is trained: step %lld of %lld", a.out, (long long)state.step,
                 (long long)a.max_steps);
        return 0;
    }
    say_header(&log, &model, &ranks, gpu.name, join_words(argc, argv), train_shards.n_tokens);

    // the loop: evaluate, save, or end; then one step; then its line in the log
    double peak = peak_flops(gpu.name);
    double flops = flops_per_token(config, a.seq_len);
    double val_bpb = 0;
    double mean_seconds = 0;                    // a step, of about the last 20
    double started = seconds_now();
    double earlier_usd = state.usd;
    int64_t first_step = state.step;
    bool stop = false;
    while (true) {
        bool is_last = state.step == a.max_steps;
        int64_t done = state.step - first_step;     // steps since this start
        bool evaluates = state.step % a.eval_every == 0 || is_last;
        if (evaluates && (state.step == 0 || done > 0)) {
            val_bpb = log_evaluation(&log, &model, &loader, &ranks, &validation, state.step);
        }
        if (is_last || stop || (state.step % a.save_every == 0 && done > 0)) {
            save_run(&model, &ranks, &state, train_shards.n_tokens, val_bpb);
        }
        if (is_last || stop) { break; }

        profile.on = a.profile && ranks.rank == 0 && done >= 9 && done < 12;    // steps 10-12
        double tick = seconds_now();
        double loss = accumulate(&model, &loader, &ranks, state.position, grad_accum_steps, &stop);
        double norm = gradient_norm(&model, &ranks, grad_accum_steps);
        if (!isfinite(loss) || !isfinite(norm)) {
            die("step %lld: loss %f and norm %f must be finite; try a lower --lr in another --out "
                "(what was saved is kept)", (long long)state.step, loss, norm);
        }
        Update update = plan_update(config, state.step, norm);
        // gradients are sums over micro-steps and ranks; their mean is what is applied
        update.grad_scale = update.grad_scale / grad_accum_steps / ranks.world_size;
        state.step++;
        state.position += a.total_batch_size / a.seq_len;
        if (is_spike(&state.losses, loss) || is_spike(&state.norms, norm)) {
            say_skipped(&log, state.step, loss, norm);
            zero_gradients(&model);
        } else {
            state.optimizer_steps++;
            update.steps = state.optimizer_steps;
            optimizer_step(&model, &ranks, update);
        }
        CHECK_CUDA(cudaStreamSynchronize(model.stream));
        push(&state.losses, loss);
        push(&state.norms, norm);

        double seconds = fmax(seconds_now() - tick, 1e-9);      // it divides tok/s
        if (profile.on) {
            add_times(1000 * seconds);
            if (done == 11) { print_profile(peak_bandwidth(), peak); }
            profile.on = false;
        }
        mean_seconds = mean_seconds > 0 ? 0.95 * mean_seconds + 0.05 * seconds : seconds;
        double hours = (seconds_now() - started) / 3600;
        state.usd = earlier_usd + hours * a.gpu_hour_usd * ranks.world_size;
        double mfu = peak > 0
            ? flops * a.total_batch_size / seconds / peak / ranks.world_size : 0;
        log_step(&log, state.step, {loss, update.lr, norm, seconds, mfu, state.usd,
                                    mean_seconds * (a.max_steps - state.step)});
    }

    if (stop && state.step < a.max_steps) {
        say_text(&log, "stopped and saved at step %lld; continue with the same command and "
                 "--resume", (long long)state.step);
        return 130;
    }
    say_text(&log, "%s: stage pretrain, step %lld, %.0f s", a.out, (long long)state.step,
             seconds_now() - started);
    return 0;
}
