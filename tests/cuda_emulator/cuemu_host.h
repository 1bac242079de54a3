/*
The host's side: of the CUDA runtime, cuBLASLt and NCCL what train_gpt2.cu calls. Streams run at
once. New memory holds NaNs. Ranks are processes that share a file in memory.
*/
#pragma once
#include <atomic>
#include <fcntl.h>
#include <sched.h>
#include <sys/stat.h>
#include <unistd.h>
#include "cuemu_fp8.h"

// ---- CUDA runtime -------------------------------------------------------------------------------

#define CUDART_VERSION 13000
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation,
                   cudaErrorInvalidConfiguration = 9 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMemoryClockRate = 36, cudaDevAttrGlobalMemoryBusWidth = 37 };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };
struct cudaDeviceProp { char name[256]; int major, minor; };
typedef struct CuemuStream {}* cudaStream_t;
typedef struct CuemuEvent { std::chrono::steady_clock::time_point time; }* cudaEvent_t;

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation       ? "out of memory"
           : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                                    : "invalid argument";
}
inline cudaError_t cudaGetLastError() {
    cudaError_t error = (cudaError_t)cuemu::last_error;
    cuemu::last_error = cudaSuccess;
    return error;
}

const size_t CUEMU_MEMORY_BYTES = (size_t)8 << 30;
template <class T> cudaError_t cudaMalloc(T** pointer, size_t bytes) {
    if (bytes > CUEMU_MEMORY_BYTES) { return cudaErrorMemoryAllocation; }
    *pointer = (T*)aligned_alloc(256, (bytes / 256 + 1) * 256);
    memset((void*)*pointer, 0xFF, bytes);
    return cudaSuccess;
}
template <class T> cudaError_t cudaMallocHost(T** pointer, size_t bytes) {
    return cudaMalloc(pointer, bytes);
}
inline cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
    *free_bytes = *total = CUEMU_MEMORY_BYTES;
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    memmove(to, from, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t) {
    return cudaMemcpy(to, from, bytes, kind);
}
inline cudaError_t cudaFree(void* pointer) {
    free(pointer);
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    memset(to, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
    return cudaMemset(to, value, bytes);
}

inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = new CuemuStream;
    return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
    *event = new CuemuEvent;
    return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    return cudaEventCreate(event);
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}
inline std::chrono::seconds cuemu_wasted{0};        // by slow kernels, on the clock of events alone
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
    event->time = std::chrono::steady_clock::now() + cuemu_wasted;
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
    *ms = std::chrono::duration<float, std::milli>(end->time - begin->time).count();
    return cudaSuccess;
}

inline cudaError_t cudaGetDeviceCount(int* n) {
    *n = 1;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* device, int) {
    int capability = cuemu::setting("CUEMU_CAPABILITY");        // 0: that of an H100
    *device = {"CPU, emulating a GPU", 9, 0};
    if (capability > 0) { device->major = capability / 10, device->minor = capability % 10; }
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMemoryClockRate ? 1000000 : 32;        // 8 GB/s
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int shared_bytes) {
    if (shared_bytes > 227 << 10) { return cudaErrorInvalidValue; }         // sm_90's
    cuemu::most_shared_bytes = std::max(cuemu::most_shared_bytes, (size_t)shared_bytes);
    return cudaSuccess;
}

template <class T> cudaError_t cudaMemcpyFromSymbol(void* to, const T& symbol, size_t bytes) {
    return cudaMemcpy(to, &symbol, bytes, cudaMemcpyDeviceToHost);
}

// The driver's only function that is asked for
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
    *function = (void*)cuTensorMapEncodeTiled, *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// ---- cuBLASLt -----------------------------------------------------------------------------------

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7,
                      CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14, CUDA_R_8F_E4M3 = 28, CUDA_R_8F_E5M2 = 29 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cublasLtEpilogue_t { CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4,
                          CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 164, CUBLASLT_EPILOGUE_DGELU = 192 };
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB, CUBLASLT_MATMUL_DESC_EPILOGUE,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
    CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, CUBLASLT_MATMUL_DESC_FAST_ACCUM, CUEMU_ATTRIBUTES };
enum cublasLtMatrixLayoutAttribute_t { CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                                       CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET };
enum cublasLtMatmulPreferenceAttributes_t { CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES };
typedef void *cublasLtHandle_t, *cublasLtMatmulPreference_t;
typedef struct CuemuMatmul { int64_t attributes[CUEMU_ATTRIBUTES]; }* cublasLtMatmulDesc_t;
typedef struct CuemuLayout {
    cudaDataType_t type;
    int64_t rows, columns, stride, batch[2];        // how many, elements from one to the next
}* cublasLtMatrixLayout_t;
struct cublasLtMatmulAlgo_t { uint64_t data[8]; };      // the first word is its number
struct cublasLtMatmulHeuristicResult_t { cublasLtMatmulAlgo_t algo; size_t workspaceSize; };

inline size_t cublasLtGetVersion() { return 0; }
inline cublasStatus_t cublasLtCreate(cublasLtHandle_t*) { return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* matmul, cublasComputeType_t,
                                               cudaDataType_t) {
    *matmul = new CuemuMatmul{};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t matmul,
                                                     cublasLtMatmulDescAttributes_t attribute,
                                                     const void* value, size_t bytes) {
    memcpy(&matmul->attributes[attribute], value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout,
                                                 cudaDataType_t type, uint64_t rows,
                                                 uint64_t columns, int64_t stride) {
    *layout = new CuemuLayout{type, (int64_t)rows, (int64_t)columns, stride, {1, 0}};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                       cublasLtMatrixLayoutAttribute_t attribute,
                                                       const void* value, size_t bytes) {
    memcpy(&layout->batch[attribute], value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t*) {
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t,
                                                           cublasLtMatmulPreferenceAttributes_t,
                                                           const void*, size_t) {
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t) {
    return CUBLAS_STATUS_SUCCESS;
}
namespace cuemu {
inline bool is_fp8(cudaDataType_t type) { return type == CUDA_R_8F_E4M3 || type == CUDA_R_8F_E5M2; }

// What cuBLASLt asks of 8-bit operands on a GPU of compute capability 8.9 or 9.0: A transposed and
// B not, sizes that are multiples of 16, not both e5m2, C and D in bf16 or fp32. Of the epilogues
// its manual names for all of these types, train_gpt2.cu uses the bias.
inline bool is_supported(cublasLtMatmulDesc_t matmul, cublasLtMatrixLayout_t a,
                         cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                         cublasLtMatrixLayout_t d) {
    int64_t epilogue = matmul->attributes[CUBLASLT_MATMUL_DESC_EPILOGUE];
    int last_epilogue = setting("CUEMU_LAST_EPILOGUE");
    if (last_epilogue != 0 && epilogue > last_epilogue) { return false; }
    if (!is_fp8(a->type) && !is_fp8(b->type)) { return a->type == b->type; }
    cudaDeviceProp device;
    cudaGetDeviceProperties(&device, 0);
    bool is_tn = matmul->attributes[CUBLASLT_MATMUL_DESC_TRANSA] == CUBLAS_OP_T &&
                 matmul->attributes[CUBLASLT_MATMUL_DESC_TRANSB] == CUBLAS_OP_N;
    bool is_aligned = true;
    for (cublasLtMatrixLayout_t each : {a, b, c, d}) {
        is_aligned &= each->rows % 16 == 0 && each->columns % 16 == 0 && each->stride % 16 == 0;
    }
    return device.major * 10 + device.minor >= 89 && is_tn && is_aligned && is_fp8(a->type) &&
           is_fp8(b->type) && (a->type == CUDA_R_8F_E4M3 || b->type == CUDA_R_8F_E4M3) &&
           c->type == d->type && (d->type == CUDA_R_32F || d->type == CUDA_R_16BF) &&
           (epilogue == CUBLASLT_EPILOGUE_DEFAULT ||
            (epilogue == CUBLASLT_EPILOGUE_BIAS && d->type == CUDA_R_16BF));
}
}  // namespace cuemu

// Two algorithms, which sum upwards and downwards. CUEMU_FASTEST=N: the other takes a second more.
const int CUEMU_ALGORITHMS = 2;
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t matmul, cublasLtMatrixLayout_t a,
    cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
    cublasLtMatmulPreference_t, int most, cublasLtMatmulHeuristicResult_t* results, int* found) {
    *found = 0;
    if (!cuemu::is_supported(matmul, a, b, c, d)) { return CUBLAS_STATUS_NOT_SUPPORTED; }
    *found = std::min(most, CUEMU_ALGORITHMS);
    for (int i = 0; i < *found; i++) { results[i] = {{{(uint64_t)i}}, 0}; }
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulAlgoCheck(
    cublasLtHandle_t, cublasLtMatmulDesc_t matmul, cublasLtMatrixLayout_t a,
    cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
    const cublasLtMatmulAlgo_t* algorithm, cublasLtMatmulHeuristicResult_t* result) {
    bool exists = cuemu::is_supported(matmul, a, b, c, d) && algorithm->data[0] < CUEMU_ALGORITHMS;
    result->workspaceSize = 0;
    return exists ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

namespace cuemu {
inline float get(const void* matrix, int64_t i, cudaDataType_t type) {
    switch (type) {
        case CUDA_R_32F: return ((const float*)matrix)[i];
        case CUDA_R_16BF: return (float)((__nv_bfloat16*)matrix)[i];
        case CUDA_R_8F_E4M3: return fp8_value(((const uint8_t*)matrix)[i], __NV_E4M3);
        case CUDA_R_8F_E5M2: return fp8_value(((const uint8_t*)matrix)[i], __NV_E5M2);
    }
    die("a matrix of a type that the emulator lacks");
}
inline void put(void* matrix, int64_t i, cudaDataType_t type, float value) {
    if (type == CUDA_R_32F) { ((float*)matrix)[i] = value; }
    else { ((__nv_bfloat16*)matrix)[i] = value; }
}
// An operand as (outer, k) or, transposed, (k, outer), both row by row
inline std::vector<float> unpack(const void* matrix, CuemuLayout layout, bool transpose,
                                 int64_t which) {
    std::vector<float> values(layout.rows * layout.columns);
    int64_t first = which * layout.batch[1];
    for (int64_t column = 0, i = 0; column < layout.columns; column++) {
        for (int64_t row = 0; row < layout.rows; row++, i++) {
            int64_t at = transpose ? row * layout.columns + column : i;
            values[at] = get(matrix, first + column * layout.stride + row, layout.type);
        }
    }
    return values;
}
const float GELU = 0.7978845608f;
inline float gelu(float x) {
    return 0.5f * x * (1 + tanhf(GELU * (x + 0.044715f * x * x * x)));
}
inline float gelu_slope(float x) {
    float t = tanhf(GELU * (x + 0.044715f * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * GELU * (1 + 3 * 0.044715f * x * x);
}
}  // namespace cuemu

// D = alpha op(A) op(B) + beta C, matrices column by column; sums in fp32, k ascending in algorithm
// 0, descending in 1. Operands of 8 bits also have a scale each, one number.
inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t matmul,
                                     const void* alpha, const void* a,
                                     cublasLtMatrixLayout_t a_layout, const void* b,
                                     cublasLtMatrixLayout_t b_layout, const void* beta,
                                     const void* c, cublasLtMatrixLayout_t c_layout,
                                     void* d, cublasLtMatrixLayout_t d_layout,
                                     const cublasLtMatmulAlgo_t* algorithm, void*, size_t,
                                     cudaStream_t) {
    if (!cuemu::is_supported(matmul, a_layout, b_layout, c_layout, d_layout)) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    uint64_t number = algorithm->data[0];
    if (cuemu::setting("CUEMU_FASTEST") != (int)number) { cuemu_wasted += std::chrono::seconds(1); }
    int64_t* attributes = matmul->attributes;
    bool transpose_a = attributes[CUBLASLT_MATMUL_DESC_TRANSA] == CUBLAS_OP_T;
    bool transpose_b = attributes[CUBLASLT_MATMUL_DESC_TRANSB] == CUBLAS_OP_T;
    int64_t M = d_layout->rows, N = d_layout->columns, K = transpose_a ? a_layout->rows
                                                                       : a_layout->columns;
    if ((transpose_a ? a_layout->columns : a_layout->rows) != M ||
        (transpose_b ? b_layout->rows : b_layout->columns) != N ||
        (transpose_b ? b_layout->columns : b_layout->rows) != K) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    float factor = *(const float*)alpha;
    if (cuemu::is_fp8(a_layout->type)) {
        for (const void* operand : {a, b}) {
            if ((uintptr_t)operand % 16 != 0) { return CUBLAS_STATUS_NOT_SUPPORTED; }
        }
        for (auto each : {CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
                          CUBLASLT_MATMUL_DESC_B_SCALE_POINTER}) {
            if (attributes[each] != 0) { factor *= *(const float*)attributes[each]; }
        }
    }
    const void* bias = (const void*)attributes[CUBLASLT_MATMUL_DESC_BIAS_POINTER];
    void* aux = (void*)attributes[CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER];
    int64_t aux_stride = attributes[CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD];
    int64_t epilogue = attributes[CUBLASLT_MATMUL_DESC_EPILOGUE];
    cudaDataType_t type = d_layout->type;
    std::vector<float> left, right, sum(M);                             // (K, M), (N, K)
    for (int64_t i = 0; i < N * d_layout->batch[0]; i++) {
        int64_t which = i / N, n = i % N;
        if (n == 0) {
            left = cuemu::unpack(a, *a_layout, transpose_a, which);
            right = cuemu::unpack(b, *b_layout, transpose_b, which);
        }
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t step = 0; step < K; step++) {
            int64_t k = number == 0 ? step : K - 1 - step;
            float from_right = right[n * K + k], *column = &left[k * M];
            for (int64_t m = 0; m < M; m++) { sum[m] += from_right * column[m]; }
        }
        for (int64_t m = 0; m < M; m++) {
            int64_t at = which * d_layout->batch[1] + n * d_layout->stride + m;
            int64_t aux_at = n * aux_stride + m;
            float value = factor * sum[m];
            if (*(float*)beta != 0) { value += *(float*)beta * cuemu::get(c, at, type); }
            if (epilogue == CUBLASLT_EPILOGUE_BIAS || epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS) {
                value += cuemu::get(bias, m, type);
            }
            if (epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS) {
                cuemu::put(aux, aux_at, type, value);
                value = cuemu::gelu(value);
            } else if (epilogue == CUBLASLT_EPILOGUE_DGELU) {
                value *= cuemu::gelu_slope(cuemu::get(aux, aux_at, type));
            }
            cuemu::put(d, at, type, value);
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}

// ---- NCCL ---------------------------------------------------------------------------------------

enum ncclResult_t { ncclSuccess, ncclSystemError = 2 };
enum ncclDataType_t { ncclInt8 = 0, ncclFloat32 = 7, ncclFloat64 = 8 };
enum ncclRedOp_t { ncclSum };
struct ncclUniqueId { char internal[128]; };
struct CuemuMeeting { std::atomic<int> n_arrived, round; alignas(64) char data[1]; };
typedef struct CuemuComm { int rank, world_size; CuemuMeeting* meeting; }* ncclComm_t;
const size_t CUEMU_SLOT = 1 << 20;              // bytes of a rank at a time

inline const char* ncclGetErrorString(ncclResult_t) { return "no shared memory"; }
inline ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    snprintf(id->internal, sizeof id->internal, "/cuemu-%d", (int)getpid());
    return ncclSuccess;
}

inline void cuemu_meet(ncclComm_t comm) {
    CuemuMeeting* meeting = comm->meeting;
    int round = meeting->round;
    if (++meeting->n_arrived == comm->world_size) {
        meeting->n_arrived = 0;
        meeting->round++;
    }
    while (meeting->round == round) { sched_yield(); }
}

inline ncclResult_t ncclCommInitRank(ncclComm_t* comm, int world_size, ncclUniqueId id, int rank) {
    size_t bytes = sizeof(CuemuMeeting) + CUEMU_SLOT * world_size;
    int file = shm_open(id.internal, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, bytes) != 0) { return ncclSystemError; }
    void* memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) { return ncclSystemError; }
    *comm = new CuemuComm{rank, world_size, (CuemuMeeting*)memory};
    cuemu_meet(*comm);
    if (rank == 0) { shm_unlink(id.internal); }         // it goes with the last process
    return ncclSuccess;
}

// A piece of every rank's bytes at a time: take(piece of rank r, r, first byte, bytes)
template <class Take>
void cuemu_exchange(const void* from, size_t bytes, ncclComm_t comm, Take take) {
    char* data = comm->meeting->data;
    for (size_t first = 0; first < bytes; first += CUEMU_SLOT) {
        size_t n = std::min(CUEMU_SLOT, bytes - first);
        memcpy(data + comm->rank * CUEMU_SLOT, (const char*)from + first, n);
        cuemu_meet(comm);
        for (int r = 0; r < comm->world_size; r++) { take(data + r * CUEMU_SLOT, r, first, n); }
        cuemu_meet(comm);
    }
}

inline ncclResult_t ncclAllGather(const void* from, void* to, size_t n, ncclDataType_t,
                                  ncclComm_t comm, cudaStream_t) {
    cuemu_exchange(from, n, comm, [&](const char* piece, int r, size_t first, size_t bytes) {
        memcpy((char*)to + r * n + first, piece, bytes);
    });
    return ncclSuccess;
}

// Sums over ranks in their order, in fp64, of all n numbers
template <class T> std::vector<double> cuemu_sum(const void* from, size_t n, ncclComm_t comm) {
    std::vector<double> sum(n);
    auto add = [&](const char* piece, int, size_t first, size_t bytes) {
        double* at = &sum[first / sizeof(T)];
        for (size_t i = 0; i < bytes / sizeof(T); i++) { at[i] += ((const T*)piece)[i]; }
    };
    cuemu_exchange(from, n * sizeof(T), comm, add);
    return sum;
}
inline ncclResult_t ncclAllReduce(const void* from, void* to, size_t n, ncclDataType_t type,
                                  ncclRedOp_t, ncclComm_t comm, cudaStream_t) {
    std::vector<double> sum = type == ncclFloat64 ? cuemu_sum<double>(from, n, comm)
                                                  : cuemu_sum<float>(from, n, comm);
    if (type == ncclFloat64) { std::copy(sum.begin(), sum.end(), (double*)to); }
    else { std::copy(sum.begin(), sum.end(), (float*)to); }
    return ncclSuccess;
}
inline ncclResult_t ncclReduce(const void* from, void* to, size_t n, ncclDataType_t, ncclRedOp_t,
                               int owner, ncclComm_t comm, cudaStream_t) {
    std::vector<double> sum = cuemu_sum<float>(from, n, comm);
    if (comm->rank == owner) { std::copy(sum.begin(), sum.end(), (float*)to); }
    return ncclSuccess;
}
inline ncclResult_t ncclBroadcast(const void* from, void* to, size_t n, ncclDataType_t, int owner,
                                  ncclComm_t comm, cudaStream_t) {
    cuemu_exchange(from, n, comm, [&](const char* piece, int r, size_t first, size_t bytes) {
        if (r == owner) { memcpy((char*)to + first, piece, bytes); }
    });
    return ncclSuccess;
}
inline ncclResult_t ncclReduceScatter(const void* from, void* to, size_t n, ncclDataType_t,
                                      ncclRedOp_t, ncclComm_t comm, cudaStream_t) {
    std::vector<double> sum = cuemu_sum<float>(from, n * comm->world_size, comm);
    std::copy_n(sum.begin() + comm->rank * n, n, (float*)to);
    return ncclSuccess;
}
