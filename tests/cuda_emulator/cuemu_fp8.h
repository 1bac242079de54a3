/*
The numbers of 8 bits: e4m3 has 4 bits of exponent, 3 of mantissa, no infinities, and is at most
448; e5m2 has 5 and 2, and is at most 57344. What cuda_fp8.h calls them, and their values.
*/
#pragma once

enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };
enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
typedef uint8_t __nv_fp8_storage_t;
typedef uint16_t __nv_fp8x2_storage_t;

namespace cuemu {
struct Fp8Format { int mantissa, bias, largest_code; };
inline Fp8Format fp8_format(__nv_fp8_interpretation_t kind) {
    return kind == __NV_E4M3 ? Fp8Format{3, 7, 0x7E} : Fp8Format{2, 15, 0x7B};
}

// Codes from 0 upward are 0, the subnormal numbers, then those of each exponent in turn; so a
// mantissa that is rounded up to a power of two becomes the next exponent's first number.
inline float fp8_value(uint8_t code, __nv_fp8_interpretation_t kind) {
    Fp8Format f = fp8_format(kind);
    int magnitude = code & 0x7F, exponent = magnitude >> f.mantissa;
    int digits = magnitude & ((1 << f.mantissa) - 1);
    if (exponent > 0) { digits += 1 << f.mantissa; }
    float value = ldexpf(digits, std::max(exponent, 1) - f.bias - f.mantissa);
    if (magnitude > f.largest_code) { value = NAN; }
    if (kind == __NV_E5M2 && magnitude == 0x7C) { value = INFINITY; }
    return code & 0x80 ? -value : value;
}
}  // namespace cuemu

// To the nearest, ties to even; beyond the largest number, to the largest number
inline __nv_fp8_storage_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t saturation,
                                                __nv_fp8_interpretation_t kind) {
    if (saturation != __NV_SATFINITE) { cuemu::die("a conversion to 8 bits that may overflow"); }
    cuemu::Fp8Format f = cuemu::fp8_format(kind);
    uint8_t sign = __float_as_uint(x) >> 31 << 7;
    float magnitude = fabsf(x);
    if (std::isnan(x)) { return 0x7F; }
    if (magnitude > cuemu::fp8_value(f.largest_code, kind)) { return sign | f.largest_code; }
    int least = 1 - f.bias, exponent = magnitude > 0 ? std::max(ilogbf(magnitude), least) : least;
    int digits = (int)nearbyint(ldexp(magnitude, f.mantissa - exponent));
    return sign | ((exponent - least << f.mantissa) + digits);
}
inline __nv_fp8x2_storage_t __nv_cvt_float2_to_fp8x2(float2 pair, __nv_saturation_t saturation,
                                                     __nv_fp8_interpretation_t kind) {
    return __nv_cvt_float_to_fp8(pair.x, saturation, kind) |
           __nv_cvt_float_to_fp8(pair.y, saturation, kind) << 8;
}
