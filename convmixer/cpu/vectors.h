// The vectors of the processor that this is compiled for, and what is computed on single vectors.

#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#if NUMBER == 1 && !defined(__AVX512BF16__)
#error "bfloat16 needs AVX-512 BF16"
#elif NUMBER == 2 && !defined(__AVX2__)
#error "int8 needs AVX2"
#endif

// LANES floats are a vector. A product of ROWS pixels and COLUMNS vectors of output channels keeps its sums in
// registers: 24 of 32, or 12 of 16. So does a row of SPAN pixels of the depthwise convolution, beside KERNEL vectors of
// weights. Tiles of more than TILE_PIXELS read the weights less often, until they fall out of the level-2 cache.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12, SPAN = 16, TILE_PIXELS = 128;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8, ROWS = 6, SPAN = 8, TILE_PIXELS = 64;
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 12, SPAN = 16, TILE_PIXELS = 64;
#else
constexpr int LANES = 4, ROWS = 6, SPAN = 8, TILE_PIXELS = 64;
#endif
constexpr int COLUMNS = 2;  // Network::blocks is a multiple of it

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

INLINE Vector load(const float* from) { return *(const Vector*)from; }
INLINE void store(float* to, Vector value) { *(Vector*)to = value; }
#if NUMBER == 2
INLINE Integers rounded(Vector x) {
#if defined(__AVX512F__)
    return (Integers)_mm512_cvtps_epi32((__m512)x);
#else
    return (Integers)_mm256_cvtps_epi32((__m256)x);
#endif
}
#endif
INLINE Vector magnitude(Vector x) { return (Vector)((Integers)x & 0x7fffffff); }

// Twice GELU: x + |x| - |x| * erfc(|x| / sqrt(2)), with 1 / q(|x|)^16 for erfc. q was fitted by weighted least squares,
// for the smallest largest error. GELU is off by 5e-7 at most (PyTorch's, in float32, by 1.2e-6), and where it vanishes
// this is exactly 0: a trained network may have inputs in the hundreds, and a batch norm after them that magnifies
// whatever is wrong. Who multiplies next has the half.
INLINE Vector twice_gelu(Vector x) {
    const Vector size = magnitude(x);
    Vector q = 6.332423708954593e-06f * size + 4.1388077079318464e-05f;
    q = q * size + 5.9706093452405185e-05f;
    q = q * size + 0.0032493306789547205f;
    q = q * size + 0.021157288923859596f;
    q = q * size + 0.049864139407873154f;
    q = q * size + 1.0f;
    q *= q;
    q *= q;
    q *= q;
    q *= q;
    return x + size - size / q;
}

// ReLU, or twice GELU. NaN stays NaN.
INLINE Vector activate(Vector x, bool relu) { return relu ? (x < 0.0f ? Vector{} : x) : twice_gelu(x); }
