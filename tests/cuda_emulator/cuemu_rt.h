// cuemu_rt.h - host side of the emulation: CUDA runtime, cuBLAS(Lt) and NCCL entry points a GPT-2
// trainer uses.
#pragma once
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNotSupported = 801
};
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
enum cudaDeviceAttr { cudaDevAttrMemoryClockRate = 36, cudaDevAttrGlobalMemoryBusWidth = 37 };
enum {
    cudaStreamNonBlocking = 1,
    cudaEventDisableTiming = 2,
    cudaHostAllocDefault = 0,
    cudaHostAllocWriteCombined = 4,
    cudaEnableDefault = 0,
    cudaMemAdviseSetPreferredLocation = 3,
    cudaMemLocationTypeHost = 2,
    cudaStreamDefault = 0
};
struct cudaMemLocation {
    int type, id;
};
constexpr int cudaCpuDeviceId = -1;
struct CuemuStream {
    int id;
};
typedef CuemuStream* cudaStream_t;
struct CuemuEvent {
    std::chrono::steady_clock::time_point t;
};
typedef CuemuEvent* cudaEvent_t;
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int major, minor, multiProcessorCount, maxThreadsPerMultiProcessor, maxThreadsPerBlock,
        warpSize, l2CacheSize, regsPerBlock;
};
inline const char* cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess ? "no error"
           : e == 1         ? "invalid argument"
           : e == 2         ? "out of memory"
           : e == 9         ? "invalid configuration argument"
                            : "error";
}
inline const char* cudaGetErrorName(cudaError_t e) { return cudaGetErrorString(e); }
inline cudaError_t cudaGetLastError() {
    auto e = (cudaError_t)cuemu::last_error;
    cuemu::last_error = 0;
    return e;
}
inline cudaError_t cudaPeekAtLastError() { return (cudaError_t)cuemu::last_error; }
template <class T>
cudaError_t cudaMalloc(T** p, size_t n) {
    void* v = nullptr;
    if (n > (64ull << 30) || posix_memalign(&v, 256, n ? n : 1)) return cudaErrorMemoryAllocation;
    memset(v, 0xff, n);
    *p = (T*)v;
    return cudaSuccess;
}  // NaN poison
inline cudaError_t cudaFree(void* p) {
    free(p);
    return cudaSuccess;
}
template <class T>
cudaError_t cudaMallocHost(T** p, size_t n, unsigned = 0) {
    return cudaMalloc(p, n);
}
template <class T>
cudaError_t cudaHostAlloc(T** p, size_t n, unsigned) {
    return cudaMalloc(p, n);
}
template <class T>
cudaError_t cudaMallocManaged(T** p, size_t n, unsigned = 1) {
    return cudaMalloc(p, n);
}
template <class T>
cudaError_t cudaMallocAsync(T** p, size_t n, cudaStream_t) {
    return cudaMalloc(p, n);
}
inline cudaError_t cudaFreeHost(void* p) {
    free(p);
    return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* p, cudaStream_t) {
    free(p);
    return cudaSuccess;
}
template <class... A>
cudaError_t cudaMemAdvise(A...) {
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) {
    memmove(d, s, n);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind k,
                                   cudaStream_t = nullptr) {
    return cudaMemcpy(d, s, n, k);
}
inline cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w,
                                     size_t h, cudaMemcpyKind, cudaStream_t = nullptr) {
    for (size_t i = 0; i < h; i++) memmove((char*)d + i * dp, (const char*)s + i * sp, w);
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void* d, int v, size_t n) {
    memset(d, v, n);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t = nullptr) {
    return cudaMemset(d, v, n);
}
template <class T>
cudaError_t cudaMemcpyToSymbol(T& s, const void* p, size_t n, size_t o = 0,
                               cudaMemcpyKind = cudaMemcpyHostToDevice) {
    memcpy((char*)&s + o, p, n);
    return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
    *f = *t = 8ull << 30;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaPeekAtLastError(); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamCreate(cudaStream_t* s) {
    *s = new CuemuStream{1};
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) {
    return cudaStreamCreate(s);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t s) {
    delete s;
    return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0) {
    return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* e, unsigned = 0) {
    *e = new CuemuEvent{};
    return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return cudaEventCreate(e); }
inline cudaError_t cudaEventDestroy(cudaEvent_t e) {
    delete e;
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t = nullptr) {
    e->t = std::chrono::steady_clock::now();
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
    *ms = std::chrono::duration<float, std::milli>(b->t - a->t).count();
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* n) {
    *n = 1;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* d) {
    *d = 0;
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "cuemu CPU");
    p->totalGlobalMem = 8ull << 30;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 227 << 10;
    p->sharedMemPerMultiprocessor = 228 << 10;
    p->major = 9;
    p->multiProcessorCount = cuemu::envi("CUEMU_SMS", 4);
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxThreadsPerBlock = 1024;
    p->warpSize = 32;
    p->l2CacheSize = 50 << 20;
    p->regsPerBlock = 65536;
    return cudaSuccess;
}
// 8 GB/s, about a core's share of a laptop's memory
inline cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr attribute, int) {
    *v = attribute == cudaDevAttrMemoryClockRate ? 1000000 : 32;
    return cudaSuccess;
}
template <class F>
cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute a, int v) {
    if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        if (v > (227 << 10)) return cudaErrorInvalidValue;
        cuemu::smem_optin = std::max(cuemu::smem_optin, (size_t)v);
    }
    return cudaSuccess;
}
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, F, int bs, size_t) {
    *n = 2048 / bs;
    return cudaSuccess;
}
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* s, void** f, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* = nullptr) {
    *f = !strcmp(s, "cuTensorMapEncodeTiled") ? (void*)&cuTensorMapEncodeTiled : nullptr;
    return *f ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaProfilerStart() { return cudaSuccess; }
inline cudaError_t cudaProfilerStop() { return cudaSuccess; }
#define nvtxRangePush(x) 0
#define nvtxRangePop() 0
#define nvtxNameCudaStreamA(a, b) 0
#define nvtxNameCudaEventA(a, b) 0
// ---------------------------------------------------------------- cuBLAS and cuBLASLt
// (column-major, float accumulate)
enum cudaDataType { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
typedef cudaDataType cudaDataType_t;
typedef cudaDataType cublasDataType_t;
enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_NOT_SUPPORTED = 15
};
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_FAST_TF32 = 77 };
enum cublasMath_t { CUBLAS_DEFAULT_MATH, CUBLAS_TF32_TENSOR_OP_MATH = 3 };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT = -1, CUBLAS_GEMM_DEFAULT_TENSOR_OP = 99 };
typedef void *cublasHandle_t, *cublasLtHandle_t;
namespace cuemu {
inline float ld(const void* p, size_t i, cudaDataType t) {
    return t == CUDA_R_32F ? ((const float*)p)[i] : (float)((const __nv_bfloat16*)p)[i];
}
inline void st(void* p, size_t i, cudaDataType t, float v) {
    if (t == CUDA_R_32F)
        ((float*)p)[i] = v;
    else
        ((__nv_bfloat16*)p)[i] = v;
}
template <class Epi>
void gemm(bool ta, bool tb, int M, int N, int K, float al, const void* A, cudaDataType At,
          int64_t lda, const void* B, cudaDataType Bt, int64_t ldb, float be, const void* C,
          void* D, cudaDataType Dt, int64_t ldd, Epi epi) {
    std::vector<float> a((size_t)M * K), b((size_t)K), acc(M);
    for (int k = 0; k < K; k++)
        for (int m = 0; m < M; m++)
            a[(size_t)k * M + m] = ld(A, ta ? (size_t)m * lda + k : (size_t)k * lda + m, At);
    for (int n = 0; n < N; n++) {
        for (int k = 0; k < K; k++)
            b[k] = ld(B, tb ? (size_t)k * ldb + n : (size_t)n * ldb + k, Bt);
        std::fill(acc.begin(), acc.end(), 0.f);
        float* ac = acc.data();
        for (int k = 0; k < K; k++) {
            float x = b[k];
            const float* ar = &a[(size_t)k * M];
            for (int m = 0; m < M; m++) ac[m] += x * ar[m];
        }
        for (int m = 0; m < M; m++) {
            size_t i = (size_t)n * ldd + m;
            float v = al * ac[m] + (be != 0 ? be * ld(C, i, Dt) : 0.f);
            st(D, i, Dt, epi(m, n, v));
        }
    }
}
inline float gelu(float x) {
    return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
}
inline float dgelu(float x) {
    float t = tanhf(0.7978845608f * (x + 0.044715f * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * 0.7978845608f * (1 + 3 * 0.044715f * x * x);
}
}  // namespace cuemu
inline cublasStatus_t cublasCreate(cublasHandle_t* h) {
    *h = (void*)1;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasDestroy(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) {
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t) {
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSetWorkspace(cublasHandle_t, void*, size_t) {
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const void* al,
    const void* A, cudaDataType At, int lda, long long sa, const void* B, cudaDataType Bt, int ldb,
    long long sb, const void* be, void* C, cudaDataType Ct, int ldc, long long sc, int batch,
    cublasComputeType_t, cublasGemmAlgo_t) {
    auto at = [](const void* p, cudaDataType t, long long i) {
        return (char*)p + i * (t == CUDA_R_32F ? 4 : 2);
    };
    for (int i = 0; i < batch; i++)
        cuemu::gemm(ta == CUBLAS_OP_T, tb == CUBLAS_OP_T, m, n, k, *(const float*)al,
                    at(A, At, sa * i), At, lda, at(B, Bt, sb * i), Bt, ldb, *(const float*)be,
                    at(C, Ct, sc * i), at(C, Ct, sc * i), Ct, ldc,
                    [](int, int, float v) { return v; });
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb,
                                   int m, int n, int k, const void* al, const void* A,
                                   cudaDataType At, int lda, const void* B, cudaDataType Bt,
                                   int ldb, const void* be, void* C, cudaDataType Ct, int ldc,
                                   cublasComputeType_t c, cublasGemmAlgo_t g) {
    return cublasGemmStridedBatchedEx(h, ta, tb, m, n, k, al, A, At, lda, 0, B, Bt, ldb, 0, be, C,
                                      Ct, ldc, 0, 1, c, g);
}
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_COMPUTE_TYPE,
    CUBLASLT_MATMUL_DESC_SCALE_TYPE,
    CUBLASLT_MATMUL_DESC_POINTER_MODE,
    CUBLASLT_MATMUL_DESC_TRANSA,
    CUBLASLT_MATMUL_DESC_TRANSB,
    CUBLASLT_MATMUL_DESC_EPILOGUE,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD,
    CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE,
    CUEMU_NDESC
};
enum cublasLtEpilogue_t {
    CUBLASLT_EPILOGUE_DEFAULT = 1,
    CUBLASLT_EPILOGUE_BIAS = 4,
    CUBLASLT_EPILOGUE_GELU = 32,
    CUBLASLT_EPILOGUE_GELU_AUX = 160,
    CUBLASLT_EPILOGUE_GELU_BIAS = 36,
    CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 164,
    CUBLASLT_EPILOGUE_DGELU = 192,
    CUBLASLT_EPILOGUE_BGRADB = 512,
    CUBLASLT_EPILOGUE_BGRADA = 256
};
struct cublasLtMatmulDescOpaque {
    int64_t v[CUEMU_NDESC] = {0};
};
typedef cublasLtMatmulDescOpaque* cublasLtMatmulDesc_t;
enum cublasLtMatrixLayoutAttribute_t {
    CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
    CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET
};
struct cublasLtMatrixLayoutOpaque {
    cudaDataType t;
    uint64_t rows, cols;
    int64_t ld;
    int64_t v[2] = {1, 0};
};
typedef cublasLtMatrixLayoutOpaque* cublasLtMatrixLayout_t;
enum cublasLtMatmulPreferenceAttributes_t { CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES };
struct cublasLtMatmulPreferenceOpaque {};
typedef cublasLtMatmulPreferenceOpaque* cublasLtMatmulPreference_t;
struct cublasLtMatmulAlgo_t {
    int id;
};
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
};
#define CUEMU_OK                      \
    {                                 \
        return CUBLAS_STATUS_SUCCESS; \
    }
inline size_t cublasLtGetVersion() { return 0; }
inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* h) {
    *h = (void*)1;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t)
CUEMU_OK
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t,
                                               cudaDataType) {
    *d = new cublasLtMatmulDescOpaque;
    (*d)->v[CUBLASLT_MATMUL_DESC_EPILOGUE] = 1;
    (*d)->v[CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE] = -1;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d,
                                                     cublasLtMatmulDescAttributes_t a,
                                                     const void* p, size_t n) {
    d->v[a] = 0;
    memcpy(&d->v[a], p, n);
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
    delete d;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* l, cudaDataType t,
                                                 uint64_t r, uint64_t c, int64_t ld) {
    *l = new cublasLtMatrixLayoutOpaque{t, r, c, ld};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
    delete l;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l,
                                                       cublasLtMatrixLayoutAttribute_t a,
                                                       const void* p, size_t n) {
    l->v[a] = 0;
    memcpy(&l->v[a], p, n);
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) {
    *p = new cublasLtMatmulPreferenceOpaque;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    delete p;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t,
                                                           cublasLtMatmulPreferenceAttributes_t,
                                                           const void*, size_t)
CUEMU_OK
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                                     cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                     cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                     cublasLtMatmulPreference_t, int,
                                                     cublasLtMatmulHeuristicResult_t* r, int* n) {
    memset((void*)r, 0, sizeof *r);
    *n = 1;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void* al,
                                     const void* A, cublasLtMatrixLayout_t la, const void* B,
                                     cublasLtMatrixLayout_t lb, const void* be, const void* C,
                                     cublasLtMatrixLayout_t, void* D, cublasLtMatrixLayout_t ldd,
                                     const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t) {
    bool ta = d->v[CUBLASLT_MATMUL_DESC_TRANSA] == CUBLAS_OP_T,
         tb = d->v[CUBLASLT_MATMUL_DESC_TRANSB] == CUBLAS_OP_T;
    int e = (int)d->v[CUBLASLT_MATMUL_DESC_EPILOGUE];
    int M = (int)ldd->rows, N = (int)ldd->cols, K = (int)(ta ? la->rows : la->cols);
    auto sz = [](cudaDataType t) { return t == CUDA_R_32F ? 4 : 2; };
    if ((int)(ta ? la->cols : la->rows) != M || (int)(tb ? lb->rows : lb->cols) != N ||
        (int)(tb ? lb->cols : lb->rows) != K)
        return CUBLAS_STATUS_INVALID_VALUE;
    auto* bias = (char*)d->v[CUBLASLT_MATMUL_DESC_BIAS_POINTER];
    auto bt = d->v[CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE] < 0
                  ? ldd->t
                  : (cudaDataType)d->v[CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE];
    auto* aux = (char*)d->v[CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER];
    int64_t auxld = d->v[CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD];
    bool hb = e == CUBLASLT_EPILOGUE_BIAS || e == CUBLASLT_EPILOGUE_GELU_BIAS ||
              e == CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
         hg = e == 32 || e == 36 || e == 160 || e == 164, ha = e == 160 || e == 164;
    if (e == CUBLASLT_EPILOGUE_BGRADA || e == CUBLASLT_EPILOGUE_BGRADB)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    for (int64_t i = 0; i < ldd->v[0]; i++)
        cuemu::gemm(ta, tb, M, N, K, *(const float*)al, (char*)A + i * la->v[1] * sz(la->t), la->t,
                    la->ld, (char*)B + i * lb->v[1] * sz(lb->t), lb->t, lb->ld, *(const float*)be,
                    (char*)C + i * ldd->v[1] * sz(ldd->t), (char*)D + i * ldd->v[1] * sz(ldd->t),
                    ldd->t, ldd->ld, [&](int m, int n, float v) {
                        if (hb) v += cuemu::ld(bias, m, bt);
                        if (ha) cuemu::st(aux, (size_t)n * auxld + m, ldd->t, v);
                        if (hg) v = cuemu::gelu(v);
                        if (e == CUBLASLT_EPILOGUE_DGELU)
                            v *= cuemu::dgelu(cuemu::ld(aux, (size_t)n * auxld + m, ldd->t));
                        return v;
                    });
    return CUBLAS_STATUS_SUCCESS;
}
// ---------------------------------------------------------------- NCCL: ranks are processes
// sharing one POSIX shared-memory file
#include <fcntl.h>
#include <sched.h>
#include <sys/stat.h>
#include <unistd.h>
enum ncclResult_t { ncclSuccess, ncclSystemError = 2, ncclInvalidArgument = 4, ncclInProgress = 7 };
enum ncclDataType_t { ncclInt8 = 0, ncclFloat32 = 7, ncclFloat64 = 8 };
enum ncclRedOp_t { ncclSum, ncclProd, ncclMax, ncclMin, ncclAvg };
struct ncclUniqueId {
    char internal[128];
};
constexpr int NCCL_UNIQUE_ID_BYTES = 128;
struct CuemuShm {
    std::atomic<int> n, gen;
    char data[1];
};
struct CuemuComm {
    int rank, n;
    CuemuShm* s;
    size_t slot;
    ncclUniqueId id;
};
typedef CuemuComm* ncclComm_t;
inline const char* ncclGetErrorString(ncclResult_t) { return "nccl error"; }
inline ncclResult_t ncclGetVersion(int* v) {
    *v = 0;
    return ncclSuccess;
}
inline ncclResult_t ncclGetUniqueId(ncclUniqueId* u) {
    static int k = 0;
    memset(u, 0, sizeof *u);
    snprintf(u->internal, 128, "/cuemu-%d-%d", (int)getpid(), k++);
    return ncclSuccess;
}
inline ncclResult_t ncclCommInitRank(ncclComm_t* c, int n, ncclUniqueId u, int rank) {
    size_t slot = 1 << 20, tot = 4096 + slot * n;
    int fd = shm_open(u.internal, O_CREAT | O_RDWR, 0600);
    if (fd < 0 || ftruncate(fd, (off_t)tot)) return ncclSystemError;
    void* p = mmap(nullptr, tot, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (p == MAP_FAILED) return ncclSystemError;
    *c = new CuemuComm{rank, n, (CuemuShm*)p, slot, u};
    return ncclSuccess;
}
inline void cuemu_nbar(ncclComm_t c) {
    int g = c->s->gen.load();
    if (c->s->n.fetch_add(1) + 1 == c->n) {
        c->s->n = 0;
        c->s->gen++;
    } else
        while (c->s->gen.load() == g) sched_yield();
}
inline ncclResult_t ncclCommDestroy(ncclComm_t c) {
    if (c->rank == 0) shm_unlink(c->id.internal);
    delete c;
    return ncclSuccess;
}
inline ncclResult_t ncclGroupStart() { return ncclSuccess; }
inline ncclResult_t ncclGroupEnd() { return ncclSuccess; }
inline size_t cuemu_nsz(ncclDataType_t t) { return t == ncclInt8 ? 1 : t == ncclFloat32 ? 4 : 8; }
// every rank reduces every element in rank order; out[] keeps [lo, lo+cnt)
inline ncclResult_t cuemu_nred(const void* s, void* r, size_t total, size_t lo, size_t cnt,
                               ncclDataType_t t, ncclRedOp_t op, ncclComm_t c) {
    size_t es = cuemu_nsz(t), chunk = c->slot / es;
    char* base = (char*)c->s + 4096;
    std::vector<char> tmp(cnt * es);
    for (size_t o = 0; o < total; o += chunk) {
        size_t m = std::min(chunk, total - o);
        memcpy(base + c->rank * c->slot, (const char*)s + o * es, m * es);
        cuemu_nbar(c);
        for (size_t i = std::max(o, lo); i < std::min(o + m, lo + cnt); i++) {
            double a = 0;
            for (int k = 0; k < c->n; k++) {
                char* q = base + k * c->slot + (i - o) * es;
                double v = t == ncclFloat32 ? *(float*)q : *(double*)q;
                a = !k              ? v
                    : op == ncclMax ? std::max(a, v)
                    : op == ncclMin ? std::min(a, v)
                                    : a + v;
            }
            if (op == ncclAvg) a /= c->n;
            char* w = tmp.data() + (i - lo) * es;
            if (t == ncclFloat32)
                *(float*)w = (float)a;
            else
                *(double*)w = a;
        }
        cuemu_nbar(c);
    }
    memcpy(r, tmp.data(), cnt * es);
    return ncclSuccess;
}
inline ncclResult_t ncclAllReduce(const void* s, void* r, size_t n, ncclDataType_t t,
                                  ncclRedOp_t op, ncclComm_t c, cudaStream_t) {
    return cuemu_nred(s, r, n, 0, n, t, op, c);
}
inline ncclResult_t ncclReduceScatter(const void* s, void* r, size_t n, ncclDataType_t t,
                                      ncclRedOp_t op, ncclComm_t c, cudaStream_t) {
    return cuemu_nred(s, r, n * c->n, n * c->rank, n, t, op, c);
}
inline ncclResult_t ncclAllGather(const void* s, void* r, size_t n, ncclDataType_t t, ncclComm_t c,
                                  cudaStream_t) {
    size_t es = cuemu_nsz(t), chunk = c->slot / es;
    char* base = (char*)c->s + 4096;
    for (size_t o = 0; o < n; o += chunk) {
        size_t m = std::min(chunk, n - o);
        memcpy(base + c->rank * c->slot, (const char*)s + o * es, m * es);
        cuemu_nbar(c);
        for (int k = 0; k < c->n; k++)
            memmove((char*)r + (k * n + o) * es, base + k * c->slot, m * es);
        cuemu_nbar(c);
    }
    return ncclSuccess;
}
inline ncclResult_t ncclBroadcast(const void* s, void* r, size_t n, ncclDataType_t t, int root,
                                  ncclComm_t c, cudaStream_t) {
    size_t es = cuemu_nsz(t), chunk = c->slot / es;
    char* base = (char*)c->s + 4096;
    for (size_t o = 0; o < n; o += chunk) {
        size_t m = std::min(chunk, n - o);
        if (c->rank == root) memcpy(base, (const char*)s + o * es, m * es);
        cuemu_nbar(c);
        memcpy((char*)r + o * es, base, m * es);
        cuemu_nbar(c);
    }
    return ncclSuccess;
}
