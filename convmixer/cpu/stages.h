// The two halves of a block, on a tile: a few rows of a feature map.
//
// LANES channels, one vector, lie side by side. A feature map is (blocks, height, width, LANES), where blocks * LANES
// is the number of channels, rounded up. A tile is (groups, blocks, ROWS, LANES): a group is the pixels of one product,
// ROWS at most. Arrays that hold vectors are aligned to 64 bytes.

#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "vectors.h"

constexpr int PAD = KERNEL / 2;

// A convolution, the activation after it, and batch norm as scale and shift.
struct Stage {
    const void* weight;
    const float *bias, *scale, *shift;  // scale is half of what it says where the activation is GELU
    // int8 only. An output channel's weights are its integers times weight_scale, and weight_sum is Int8::ZERO times
    // the sum of its integers: VNNI wants unsigned activations, so that 128 is added to each.
    const float* weight_scale;
    const int32_t* weight_sum;
};

// How a product multiplies: one 32-bit Word of a pixel holds PACK neighbouring channels, and one vector of weights the
// same channels for LANES output channels.
struct Float32 {
    static constexpr int PACK = 1;
    typedef float Word;
    typedef Vector Sum;
    INLINE Sum add(Sum sum, Word word, Vector weights) { return sum + word * weights; }
};
#if NUMBER == 1
struct Bfloat16 {
    static constexpr int PACK = 2;
    typedef int32_t Word;
    typedef Vector Sum;
    INLINE Sum add(Sum sum, Word word, Vector weights) {
        return (Sum)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(word), (__m512bh)weights);
    }
};
typedef Bfloat16 Format;
#elif NUMBER == 2
struct Int8 {
    typedef int32_t Word;
    typedef Integers Sum;
#if defined(__AVX512VNNI__)
    static constexpr int PACK = 4, LARGEST = 127, ZERO = 128;  // of a pixel's integers
    INLINE Sum add(Sum sum, Word word, Vector weights) {
        return (Sum)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(word), (__m512i)weights);
    }
    INLINE void put(void* packed, int64_t index, Integers values) {
        ((__m128i*)packed)[index] = _mm512_cvtepi32_epi8((__m512i)values);
    }
#else
    // The 8-bit instructions of before would overflow: weights of 8 bits in 16, and activations of 12. 8,000
    // channels add up in 32 bits.
    static constexpr int PACK = 2, LARGEST = 2047, ZERO = 0;
    // Else the compiler adds in another order, and has more sums than registers.
    INLINE Sum kept(Sum sum) {
        asm("" : "+v"(sum));
        return sum;
    }
#if defined(__AVX512F__)
    INLINE Sum add(Sum sum, Word word, Vector weights) {
        return kept(sum + (Sum)_mm512_madd_epi16(_mm512_set1_epi32(word), (__m512i)weights));
    }
    INLINE void put(void* packed, int64_t index, Integers values) {
        ((__m256i*)packed)[index] = _mm512_cvtepi32_epi16((__m512i)values);
    }
#else
    INLINE Sum add(Sum sum, Word word, Vector weights) {
        return kept(sum + (Sum)_mm256_madd_epi16(_mm256_set1_epi32(word), (__m256i)weights));
    }
    INLINE void put(void* packed, int64_t index, Integers values) {
        const __m256i all = (__m256i)values;
        ((__m128i*)packed)[index] = _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    }
#endif
#endif
};
typedef Int8 Format;
#else
typedef Float32 Format;
#endif

// A tile and what belongs to its pixels. With int8, `values` is what quantize() reads, `peak` has LANES largest
// absolute values for each pixel, and `step` is what a step of its integers is worth.
struct Tile {
    int pixels, groups;
    float* values;
    void* packed;  // what the products read
    float *peak, *step;
    int32_t* place;  // of each pixel's vector in block 0

    int begin(int group) const { return group * (pixels / groups) + std::min(group, pixels % groups); }
    void set_places(int64_t blocks) {
        for (int group = 0; group < groups; group++)
            for (int p = begin(group); p < begin(group + 1); p++) place[p] = group * blocks * ROWS + p - begin(group);
    }
};

// Where the results of a product go.
struct Target {
    float* map;    // of the tile's first pixel and the first output channel
    size_t plane;  // floats from one block of channels to the next
    bool relu;
};

// PIXELS pixels of a tile from `pixel`, whose words begin at `group`, times COLUMNS vectors of output channels from
// `channel`, over all input channels; then bias, activation and norm. Meanwhile it asks for the next weights, `lines`
// cache lines from `ahead` for each block, so that they are in the level-2 cache in time.
template <typename F, int PIXELS>
static void product(const char* group, const char* weights, int64_t blocks, const Stage& stage, int64_t channel,
                    const Tile& tile, int pixel, const Target& target, const char* ahead, int64_t lines) {
    typedef typename F::Word Word;
    constexpr int WORDS = LANES / F::PACK;
    const Word* words = (const Word*)group;
    const float* w = (const float*)weights;
    typename F::Sum sum[PIXELS][COLUMNS] = {};
    for (int64_t block = 0; block < blocks; block++, words += ROWS * WORDS) {
        for (int64_t line = 0; line < lines; line++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        UNROLL for (int k = 0; k < WORDS; k++, w += COLUMNS * LANES) {
            Vector column[COLUMNS];
            UNROLL for (int c = 0; c < COLUMNS; c++) column[c] = load(w + c * LANES);
            UNROLL for (int p = 0; p < PIXELS; p++) {
                const Word word = words[p * WORDS + k];
                UNROLL for (int c = 0; c < COLUMNS; c++) sum[p][c] = F::add(sum[p][c], word, column[c]);
            }
        }
    }
    UNROLL for (int c = 0; c < COLUMNS; c++, channel += LANES) {
        const Vector bias = load(stage.bias + channel);
        const Vector scale = load(stage.scale + channel), shift = load(stage.shift + channel);
        float* map = target.map + channel / LANES * target.plane + pixel * LANES;
        UNROLL for (int p = 0; p < PIXELS; p++) {
            Vector value;
            if constexpr (!std::is_same_v<typename F::Sum, Vector>) {
                const Integers exact = sum[p][c] - *(const Integers*)(stage.weight_sum + channel);
                value = __builtin_convertvector(exact, Vector) * tile.step[pixel + p];
                value = value * load(stage.weight_scale + channel) + bias;
            } else {
                value = sum[p][c] + bias;
            }
            store(map + p * LANES, activate(value, target.relu) * scale + shift);
        }
    }
}

// product() with the number of pixels known only now.
template <typename F, int PIXELS = ROWS, typename... Arguments>
static void product_of(int pixels, Arguments&&... arguments) {
    if (pixels == PIXELS) return product<F, PIXELS>(arguments...);
    if constexpr (PIXELS > 1) product_of<F, PIXELS - 1>(pixels, arguments...);
}

// The 1x1 convolution of a tile.
template <typename F>
static void pointwise(const Tile& tile, int64_t in_blocks, int64_t out_blocks, const Stage& stage,
                      const Target& target) {
    constexpr int64_t BLOCK = LANES / F::PACK * COLUMNS * LANES * 4;  // bytes of weights for a block of inputs
    const size_t group_bytes = in_blocks * ROWS * LANES / F::PACK * 4;
    const char* weights = (const char*)stage.weight;
    for (int64_t out = 0; out < out_blocks; out += COLUMNS, weights += in_blocks * BLOCK)
        for (int group = 0; group < tile.groups; group++) {
            const int64_t asked = group * (BLOCK / 64) / tile.groups;
            const int64_t lines = (group + 1) * (BLOCK / 64) / tile.groups - asked;
            const int pixel = tile.begin(group), pixels = tile.begin(group + 1) - pixel;
            const char *words = (const char*)tile.packed + group * group_bytes, *ahead = weights + in_blocks * BLOCK;
            product_of<F>(pixels, words, weights, in_blocks, stage, out * LANES, tile, pixel, target,
                          ahead + in_blocks * asked * 64, lines);
        }
}

INLINE void put(const Tile& tile, int64_t index, int pixel, Vector value) {
#if NUMBER == 1
    ((__m256i*)tile.packed)[index] = (__m256i)_mm512_cvtneps_pbh((__m512)value);
#else
    store(tile.values + index * LANES, value);
#endif
#if NUMBER == 2
    const Vector size = magnitude(value), before = load(tile.peak + pixel * LANES);
    store(tile.peak + pixel * LANES, size > before ? size : before);
#endif
}

#if NUMBER == 2
// Each pixel's channels as integers, of which the largest absolute value lies LARGEST from ZERO.
static void quantize(const Tile& tile, int64_t blocks) {
    for (int p = 0; p < tile.pixels; p++) {
        const float* peaks = tile.peak + p * LANES;
        const float peak = *std::max_element(peaks, peaks + LANES);
        tile.step[p] = peak / Format::LARGEST;
        const float inverse = peak > 0 ? Format::LARGEST / peak : 0;
        for (int64_t block = 0, i = tile.place[p]; block < blocks; block++, i += ROWS)
            Format::put(tile.packed, i, rounded(load(tile.values + i * LANES) * inverse) + Format::ZERO);
    }
}
#endif

// One row of one block of channels, for the depthwise convolution.
struct Row {
    const float *input, *center, *taps;  // input: kernel row `top`; center: the pixels themselves
    int width, top, bottom;              // top, bottom: the rows of the kernel that lie inside the picture
    Vector bias, scale, shift;
    bool relu;
};

// WIDTH pixels from pixel x: depthwise convolution, activation, norm, and the residual, into the tile's pixels from
// `pixel`. Each input is loaded once for all the outputs that it belongs to. EDGE: some lie outside the picture.
template <int WIDTH, bool EDGE>
INLINE void segment(const Row& row, int x, const Tile& tile, int64_t block, int pixel) {
    Vector sum[WIDTH];
    UNROLL for (int i = 0; i < WIDTH; i++) sum[i] = row.bias;
    const float* input = row.input + (x - PAD) * LANES;
    for (int y = row.top; y < row.bottom; y++, input += row.width * LANES) {
        Vector tap[KERNEL];
        UNROLL for (int k = 0; k < KERNEL; k++) tap[k] = load(row.taps + (y * KERNEL + k) * LANES);
        UNROLL for (int i = 0; i < WIDTH + KERNEL - 1; i++) {
            if (EDGE && (unsigned)(x + i - PAD) >= (unsigned)row.width) continue;
            const Vector value = load(input + i * LANES);
            UNROLL for (int k = 0; k < KERNEL; k++)
                if (i >= k && i - k < WIDTH) sum[i - k] += value * tap[k];
        }
    }
    const float* center = row.center + x * LANES;
    UNROLL for (int i = 0; i < WIDTH; i++) {
        const Vector normed = activate(sum[i], row.relu) * row.scale + row.shift;
        put(tile, tile.place[pixel + i] + block * ROWS, pixel + i, normed + load(center + i * LANES));
    }
}

// As many segments of WIDTH as fit into what is left of the row.
template <int WIDTH>
INLINE void segments(const Row& row, int& x, const Tile& tile, int64_t block, int& pixel) {
    for (; x + WIDTH <= row.width; x += WIDTH, pixel += WIDTH) {
        if (x < PAD || x + WIDTH + PAD > row.width)
            segment<WIDTH, true>(row, x, tile, block, pixel);
        else
            segment<WIDTH, false>(row, x, tile, block, pixel);
    }
}

// The first half of a block, for rows first to last of a feature map (blocks, height, width, LANES), into a tile.
static void depthwise(const float* map, int64_t blocks, int height, int width, int first, int last, const Stage& stage,
                      bool relu, const Tile& tile) {
    const size_t stride = (size_t)width * LANES, plane = stride * height;
    const int begin = std::max(0, first - PAD), end = std::min(height, last + PAD);
    const int lines = (end - begin) * stride * 4 / 64 / (last - first);  // of a block of channels, for each row
    if (NUMBER == 2) std::memset(tile.peak, 0, (size_t)tile.pixels * LANES * 4);
    Row row{};
    row.width = width;
    row.relu = relu;
    for (int64_t block = 0; block < blocks; block++, map += plane) {
        row.bias = load(stage.bias + block * LANES);
        row.scale = load(stage.scale + block * LANES);
        row.shift = load(stage.shift + block * LANES);
        row.taps = (const float*)stage.weight + block * KERNEL * KERNEL * LANES;
        const char* ahead = (const char*)(map + plane + begin * stride);  // the next block of channels
        int pixel = 0;
        for (int y = first; y < last; y++) {
            for (int line = 0; line < lines; line++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
            row.top = std::max(0, PAD - y);
            row.bottom = std::min(KERNEL, height + PAD - y);
            row.input = map + (y + row.top - PAD) * (int64_t)stride;
            row.center = map + y * stride;
            int x = 0;
            segments<SPAN>(row, x, tile, block, pixel);
            segments<4>(row, x, tile, block, pixel);
            segments<1>(row, x, tile, block, pixel);
        }
    }
#if NUMBER == 2
    quantize(tile, blocks);
#endif
}
