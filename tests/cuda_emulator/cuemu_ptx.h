// cuemu_ptx.h - warp- and warpgroup-collective stand-ins for inline PTX. The .cu file keeps every
// asm statement in a small wrapper of the same name inside #ifndef CUEMU ... #endif. Fragment
// layouts follow the PTX ISA tables.
#pragma once
inline float cuemu_bf(uint32_t r, int hi) {
    return __uint_as_float(hi ? r & 0xffff0000u : r << 16);
}
// D(16x8) += A(16x16,row) * B(16x8,col), bf16 in, f32 accumulate: the last lane to arrive computes
// for the whole warp
inline void mma_m16n8k16_bf16(float c[4], const uint32_t a[4], const uint32_t b[2], CUEMU_L) {
    struct X {
        float* c;
        const uint32_t *a, *b;
    } x{c, a, b};
    cuemu::eng->collective(
        0xffffffffu, &x,
        [](void** p, uint32_t m) {
            if (m != 0xffffffffu) cuemu::die("mma.sync: not all 32 lanes take part");
            float A[16][16], B[8][16];
            for (int l = 0; l < 32; l++) {
                auto* x = (X*)p[l];
                int g = l >> 2, t = (l & 3) * 2;
                for (int r = 0; r < 4; r++)
                    for (int h = 0; h < 2; h++)
                        A[g + (r & 1) * 8][t + (r >> 1) * 8 + h] = cuemu_bf(x->a[r], h);
                for (int r = 0; r < 2; r++)
                    for (int h = 0; h < 2; h++) B[g][t + r * 8 + h] = cuemu_bf(x->b[r], h);
            }
            for (int l = 0; l < 32; l++) {
                auto* x = (X*)p[l];
                int g = l >> 2, t = (l & 3) * 2;
                for (int r = 0; r < 4; r++) {
                    const float *ar = A[g + (r >> 1) * 8], *br = B[t + (r & 1)];
                    float s = 0;
                    for (int k = 0; k < 16; k++) s += ar[k] * br[k];
                    x->c[r] += s;
                }
            }
        },
        "mma.sync", line);
}
template <int NM, bool TR>
void cuemu_ldmatrix(uint32_t* r, const void* row, int line) {
    struct X {
        uint32_t* r;
        const void* row;
    } x{r, row};
    if ((uintptr_t)row & 15) cuemu::die("ldmatrix: row address is not 16-byte aligned");
    cuemu::eng->collective(
        0xffffffffu, &x,
        [](void** p, uint32_t) {
            for (int i = 0; i < NM; i++)
                for (int l = 0; l < 32; l++) {
                    uint16_t e[2];
                    for (int h = 0; h < 2; h++) {
                        int rr = TR ? (l & 3) * 2 + h : l >> 2, cc = TR ? l >> 2 : (l & 3) * 2 + h;
                        memcpy(&e[h], (const char*)((X*)p[i * 8 + rr])->row + cc * 2, 2);
                    }
                    ((X*)p[l])->r[i] = e[0] | (uint32_t)e[1] << 16;
                }
        },
        "ldmatrix", line);
}
inline void ldmatrix_x4(uint32_t r[4], const void* row, CUEMU_L) {
    cuemu_ldmatrix<4, false>(r, row, line);
}
inline void ldmatrix_x4_trans(uint32_t r[4], const void* row, CUEMU_L) {
    cuemu_ldmatrix<4, true>(r, row, line);
}
inline void ldmatrix_x2(uint32_t r[2], const void* row, CUEMU_L) {
    cuemu_ldmatrix<2, false>(r, row, line);
}
inline void ldmatrix_x2_trans(uint32_t r[2], const void* row, CUEMU_L) {
    cuemu_ldmatrix<2, true>(r, row, line);
}
// cp.async lands as LATE as the program allows (at wait_group), so a missing wait reads stale bytes
// here too
inline void cp_async16(void* s, const void* g, int valid = 16) {
    if (((uintptr_t)s | (uintptr_t)g) & 15) cuemu::die("cp.async: address is not 16-byte aligned");
    if (cuemu::eng->order == 1) {
        memset(s, 0, 16);
        memcpy(s, g, valid);
        return;
    }
    cuemu::cur->cp.push_back({s, g, valid, 16, cuemu::cur->cpgroup});
}
inline void cp_async_commit() { cuemu::cur->cpgroup++; }
template <int N>
void cp_async_wait() {
    auto& q = cuemu::cur->cp;
    size_t k = 0;
    for (auto& o : q)
        if (o.group < cuemu::cur->cpgroup - N) {
            memset(o.dst, 0, o.zfill);
            memcpy(o.dst, o.src, o.bytes);
        } else
            q[k++] = o;
    q.resize(k);
}
// ---------------------------------------------------------------- Hopper: mbarrier, TMA, wgmma
struct CuemuMbar {
    uint32_t phase : 1, pending : 15, count : 15, pad : 1;
    int32_t tx;
};
inline void cuemu_mb(uint64_t* b, int arrive, int tx) {
    auto* m = (CuemuMbar*)b;
    m->tx += tx;
    if (arrive) {
        if (!m->pending) cuemu::die("mbarrier: more arrivals than its count");
        m->pending--;
    }
    if (!m->pending && !m->tx) {
        m->phase ^= 1;
        m->pending = m->count;
    }
}
inline void mbar_init(uint64_t* b, int count) {
    auto* m = (CuemuMbar*)b;
    *m = CuemuMbar{};
    m->count = m->pending = count;
}
inline void mbar_fence_init() {}
inline void fence_async_shared() {}
inline void mbar_arrive(uint64_t* b) { cuemu_mb(b, 1, 0); }
inline void mbar_arrive_expect_tx(uint64_t* b, int bytes) { cuemu_mb(b, 1, bytes); }
inline void mbar_wait(uint64_t* b, int parity, CUEMU_L) {
    while ((int)((CuemuMbar*)b)->phase == parity) {
        bool any = false;
        auto& q = cuemu::eng->tma;
        for (size_t i = 0; i < q.size();)
            if (q[i].bar == b) {
                auto t = q[i];
                q.erase(q.begin() + i);
                t.go();
                any = true;
            } else
                i++;
        if (!any) {
            cuemu::cur->line = line;
            cuemu::eng->yield();
        }
    }
}
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle {
    CU_TENSOR_MAP_SWIZZLE_NONE,
    CU_TENSOR_MAP_SWIZZLE_32B,
    CU_TENSOR_MAP_SWIZZLE_64B,
    CU_TENSOR_MAP_SWIZZLE_128B
};
enum CUtensorMapL2promotion {
    CU_TENSOR_MAP_L2_PROMOTION_NONE,
    CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2,
    CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3
};
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
struct CUtensorMap {
    char* p;
    int rank, swz;
    uint64_t dim[5], stride[5];
    uint32_t box[5];
};
typedef int CUresult;
typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* m, CUtensorMapDataType, cuuint32_t rank,
                                       void* p, const cuuint64_t* dim, const cuuint64_t* stride,
                                       const cuuint32_t* box, const cuuint32_t*,
                                       CUtensorMapInterleave, CUtensorMapSwizzle s,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    m->p = (char*)p;
    m->rank = (int)rank;
    m->swz = s;
    m->stride[0] = 2;
    for (unsigned i = 0; i < rank; i++) {
        m->dim[i] = dim[i];
        m->box[i] = box[i];
        if (i) {
            m->stride[i] = stride[i - 1];
            if (stride[i - 1] % 16) return 1;
        }
        if (box[i] > 256) return 1;
    }
    return (uintptr_t)p % 16 || (s == CU_TENSOR_MAP_SWIZZLE_128B && box[0] * 2 > 128);
}
inline uint32_t cuemu_swz(uint32_t off, int mode) {
    return mode == 3   ? off ^ ((off >> 7 & 7) << 4)
           : mode == 2 ? off ^ ((off >> 7 & 3) << 4)
           : mode == 1 ? off ^ ((off >> 7 & 1) << 4)
                       : off;
}
inline void tma_load_2d(void* dst, const CUtensorMap* m, uint64_t* bar, int c0, int c1) {
    char* base = cuemu::eng->dyn;
    uint32_t off = (uint32_t)((char*)dst - base);
    if (off % 128) cuemu::die("TMA: shared address is not 128-byte aligned");
    CUtensorMap t = *m;  // by value: the issuing thread may exit first
    cuemu::eng->tma.push_back(
        {bar, [=] {
             for (uint32_t r = 0; r < t.box[1]; r++)
                 for (uint32_t c = 0; c < t.box[0]; c++) {
                     int64_t x = c0 + (int64_t)c, y = c1 + (int64_t)r;
                     uint16_t v = 0;
                     if (x >= 0 && y >= 0 && x < (int64_t)t.dim[0] && y < (int64_t)t.dim[1])
                         memcpy(&v, t.p + y * t.stride[1] + x * 2, 2);
                     memcpy(base + cuemu_swz(off + (r * t.box[0] + c) * 2, t.swz), &v, 2);
                 }
             cuemu_mb(bar, 0, -(int)(t.box[0] * t.box[1] * 2));
         }});
}
inline uint32_t smem_u32(const void* p) {
    return (uint32_t)((const char*)p - cuemu::eng->dyn);
}  // dynamic shared memory only
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int N>
void wgmma_wait() {}
template <int N>
void reg_alloc() {}
template <int N>
void reg_dealloc() {}
// D(64xN) = scale_d*D + A(64x16) * B(Nx16)^T, both K-major in swizzled shared memory (descriptor
// bits as in the PTX ISA)
template <int N>
void wgmma_m64k16_bf16(float* d, uint64_t da, uint64_t db, int scale_d, CUEMU_L) {
    struct X {
        float* d;
        uint64_t a, b;
        int s;
    } x{d, da, db, scale_d};
    cuemu::eng->wgcollective(
        &x,
        [](void** p, cuemu::Lane** ln) {
            static thread_local float A[64][16], B[N][16];
            auto* x0 = (X*)p[0];
            auto get = [](uint64_t ds, int r, int k) {
                int sw = (int)(ds >> 62);
                int mode = sw ? 4 - sw : 0;
                uint32_t pitch = mode == 3 ? 128 : mode == 2 ? 64 : 32;
                if (!mode) cuemu::die("wgmma: unswizzled layout not emulated");
                uint32_t off = (uint32_t)(ds & 0x3fff) * 16 +
                               (uint32_t)(r / 8) * (uint32_t)(ds >> 32 & 0x3fff) * 16 +
                               (uint32_t)(r % 8) * pitch + (uint32_t)k * 2;
                uint16_t v;
                memcpy(&v, cuemu::eng->dyn + cuemu_swz(off, mode), 2);
                return __uint_as_float((uint32_t)v << 16);
            };
            for (int i = 0; i < 128; i++)
                if (((X*)p[i])->a != x0->a || ((X*)p[i])->b != x0->b)
                    cuemu::die("wgmma: descriptors differ inside the warpgroup");
            for (int r = 0; r < 64; r++)
                for (int k = 0; k < 16; k++) A[r][k] = get(x0->a, r, k);
            for (int n = 0; n < N; n++)
                for (int k = 0; k < 16; k++) B[n][k] = get(x0->b, n, k);
            for (int i = 0; i < 128; i++) {
                auto* x = (X*)p[i];
                int t = ln[i]->lin & 127, w = t >> 5, g = (t & 31) >> 2, q = (t & 3) * 2;
                for (int j = 0; j < N / 8; j++)
                    for (int r = 0; r < 4; r++) {
                        const float *ar = A[w * 16 + g + (r >> 1) * 8],
                                    *br = B[j * 8 + q + (r & 1)];
                        float s = 0;
                        for (int k = 0; k < 16; k++) s += ar[k] * br[k];
                        float& o = x->d[j * 4 + r];
                        o = (x->s ? o : 0.0f) + s;
                    }
            }
        },
        "wgmma", line);
}
