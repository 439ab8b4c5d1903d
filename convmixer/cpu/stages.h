// The two halves of a block, on a tile: a few rows of a feature map.
//
// LANES channels, one vector, lie side by side. A feature map is (blocks, height, width, LANES), where blocks * LANES is
// the number of channels, rounded up. A tile is (groups, blocks, ROWS, LANES): a group is the pixels of one product, ROWS
// at most. Arrays that hold vectors are aligned to 64 bytes.

#pragma once

#include <algorithm>
#include <cstring>

#include "vectors.h"
#ifndef NOPF
#define NOPF
#endif

constexpr int PAD = KERNEL / 2;

// A convolution, the activation after it, and batch norm as scale and shift.
struct Stage {
    const void* weight;
    const float *bias, *scale, *shift;  // scale is half of what it says where the activation is GELU
    // int8 only. An output channel's weights are its integers times weight_scale, and weight_sum is 128 times the sum of
    // its integers: the instruction wants unsigned activations, so that 128 is added to each.
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
    static constexpr int PACK = 4;
    typedef int32_t Word;
    typedef Integers Sum;
    INLINE Sum add(Sum sum, Word word, Vector weights) {
        return (Sum)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(word), (__m512i)weights);
    }
};
typedef Int8 Format;
#else
typedef Float32 Format;
#endif

// A tile and what belongs to its pixels. With int8, `values` is what quantize() reads, `peak` has LANES largest absolute
// values for each pixel, and `step` is what a step of its integers is worth.
struct Tile {
    int pixels, groups;
    float* values;
    void* packed;  // what the products read
    float *peak, *step;
    char* partial;   // sums of the groups' products
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

// A product of one group over some of the input channels: those of `blocks` blocks.
struct Part {
    const char *tile, *weights, *ahead;
    int64_t blocks, lines;  // lines: to be asked for from `ahead` for each block, so that the next weights are in the level-2 cache in time
    bool first, last;
    char* partial;
};

// PIXELS pixels from `pixel` times COLUMNS vectors of output channels from `channel`; and after the last part bias,
// activation and norm.
template <typename F, int PIXELS>
static void product(Part part, const Stage& stage, int64_t channel, const Tile& tile, int pixel, const Target& target) {
    typedef typename F::Word Word;
    typedef typename F::Sum Sum;
    constexpr int WORDS = LANES / F::PACK;
    const Word* words = (const Word*)part.tile;
    const float* w = (const float*)part.weights;
    Sum sum[PIXELS][COLUMNS] = {};
    Sum* partial = (Sum*)part.partial;
    if (!part.first)
        UNROLL for (int i = 0; i < PIXELS * COLUMNS; i++) sum[i / COLUMNS][i % COLUMNS] = partial[i];
    for (int64_t block = 0; block < part.blocks; block++, words += ROWS * WORDS) {
        for (int line = 0; line < part.lines NOPF; line++, part.ahead += 64) __builtin_prefetch(part.ahead, 0, 2);
        UNROLL for (int k = 0; k < WORDS; k++, w += COLUMNS * LANES) {
            Vector column[COLUMNS];
            UNROLL for (int c = 0; c < COLUMNS; c++) column[c] = load(w + c * LANES);
            UNROLL for (int p = 0; p < PIXELS; p++) {
                const Word word = words[p * WORDS + k];
                UNROLL for (int c = 0; c < COLUMNS; c++) sum[p][c] = F::add(sum[p][c], word, column[c]);
            }
        }
    }
    if (!part.last) {
        UNROLL for (int i = 0; i < PIXELS * COLUMNS; i++) partial[i] = sum[i / COLUMNS][i % COLUMNS];
        return;
    }
    UNROLL for (int c = 0; c < COLUMNS; c++, channel += LANES) {
        const Vector bias = load(stage.bias + channel);
        const Vector scale = load(stage.scale + channel), shift = load(stage.shift + channel);
        float* map = target.map + channel / LANES * target.plane + pixel * LANES;
        UNROLL for (int p = 0; p < PIXELS; p++) {
            Vector value;
            if constexpr (F::PACK == 4) {
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
template <typename F, int PIXELS = ROWS>
static void product_of(int pixels, const Part& part, const Stage& stage, int64_t channel, const Tile& tile, int pixel,
                       const Target& target) {
    if (pixels == PIXELS) return product<F, PIXELS>(part, stage, channel, tile, pixel, target);
    if constexpr (PIXELS > 1) product_of<F, PIXELS - 1>(pixels, part, stage, channel, tile, pixel, target);
}

// The 1x1 convolution of a tile.
template <typename F>
static void pointwise(const Tile& tile, int64_t in_blocks, int64_t out_blocks, const Stage& stage, const Target& target) {
    constexpr int64_t BLOCK = LANES / F::PACK * COLUMNS * LANES * 4;  // bytes of weights: a block of inputs, COLUMNS vectors
    constexpr int64_t CHUNK = std::max<int64_t>(1, CHUNK_BYTES / BLOCK);
    const char* weights = (const char*)stage.weight;
    for (int64_t out = 0; out < out_blocks; out += COLUMNS)
        for (int64_t in = 0, blocks; in < in_blocks; in += blocks, weights += blocks * BLOCK) {
            blocks = std::min(CHUNK, in_blocks - in);
            for (int group = 0; group < tile.groups; group++) {
                const char* first = (const char*)tile.packed + (group * in_blocks + in) * ROWS * LANES / F::PACK * 4;
                const int64_t lines = BLOCK / 64, asked = group * lines / tile.groups;
                const char* ahead = weights + blocks * (BLOCK + asked * 64);
                const Part part{first, weights, ahead, blocks, (group + 1) * lines / tile.groups - asked, in == 0, in + blocks == in_blocks,
                                tile.partial + group * ROWS * COLUMNS * LANES * 4};
                const int pixel = tile.begin(group), pixels = tile.begin(group + 1) - pixel;
                product_of<F>(pixels, part, stage, out * LANES, tile, pixel, target);
            }
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
// Each pixel's channels as integers from 1 to 255, where 128 is zero and the largest absolute value lies 127 from it.
static void quantize(const Tile& tile, int64_t blocks) {
    for (int p = 0; p < tile.pixels; p++) {
        const float peak = _mm512_reduce_max_ps(_mm512_load_ps(tile.peak + p * LANES));
        tile.step[p] = peak / 127;
        const __m512 inverse = _mm512_set1_ps(peak > 0 ? 127 / peak : 0);
        for (int64_t block = 0, i = tile.place[p]; block < blocks; block++, i += ROWS) {
            const __m512 value = _mm512_mul_ps(_mm512_load_ps(tile.values + i * LANES), inverse);
            const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(value), _mm512_set1_epi32(128));
            ((__m128i*)tile.packed)[i] = _mm512_cvtepi32_epi8(whole);
        }
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
