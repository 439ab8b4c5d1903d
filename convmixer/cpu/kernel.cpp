// ConvMixer's forward pass on the CPU, from the pictures to the pooled features, in one call.
//
// kernel.py compiles this file for the machine it runs on, once for each depthwise kernel size and number format:
//   KERNEL  the side of the depthwise convolution, odd
//   NUMBER  what the 1x1 convolutions multiply: 0 float32, 1 bfloat16, 2 int8; they add up in float32 or int32
//
// Why not PyTorch's operators: between two convolutions a ConvMixer has an activation, a batch norm and an addition, each
// a pass over a feature map that is larger than the cache, in memory that is fresh from the system. Here a tile of a few
// rows goes through depthwise convolution, activation, norm and addition while it is in registers, and through the 1x1
// convolution (nearly all of the arithmetic), activation and norm while it is in the level-2 cache. Nothing else is
// written but the block's result.
//
// Memory: LANES channels, one vector register, lie side by side. A feature map is (blocks, height, width + KERNEL - 1,
// LANES), where blocks * LANES is the number of channels, rounded up; the columns left and right of the picture are the
// zeros of "same" padding. A tile is (blocks, pixels, LANES). Arrays that hold vectors are aligned to 64 bytes.

#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#if defined(__AVX512F__)
#include <immintrin.h>
// A product of 12 pixels and 2 vectors of channels has 24 sums in 32 registers: 14 loads for 24 multiply-adds, of which
// these processors do two in a cycle. A row of SPAN pixels needs SPAN sums and KERNEL weights in registers.
constexpr int LANES = 16, ROWS = 12, SPAN = 16;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8, ROWS = 6, SPAN = 8;  // 16 registers
#else
#error "needs AVX2 and FMA"
#endif
#if NUMBER == 1 && !defined(__AVX512BF16__)
#error "bfloat16 needs AVX-512 BF16"
#elif NUMBER == 2 && !defined(__AVX512VNNI__)
#error "int8 needs AVX-512 VNNI"
#endif

constexpr int COLUMNS = 2;  // vectors of output channels in one product; blocks is a multiple of it
constexpr int PAD = KERNEL / 2;
// Larger tiles read the weights less often, until they fall out of the level-2 cache.
constexpr int TILE_PIXELS = 128;
constexpr size_t OWN_MAPS = 8 << 20;  // bytes of feature maps that a thread may have of its own

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 64")

// A convolution, the activation after it, and batch norm as scale and shift.
struct Stage {
    const void* weight;
    const float *bias, *scale, *shift;
    // int8 only. An output channel's weights are its integers times weight_scale, and weight_sum is 128 times the sum of
    // its integers: the instruction wants unsigned activations, so that 128 is added to each.
    const float* weight_scale;
    const int32_t* weight_sum;
};

struct Network {
    int64_t in_chans, patch, dim, blocks, depth, relu;
    Stage stem;  // always float32
    const Stage *depthwise, *pointwise;
};

static int64_t stem_blocks(const Network& net) { return (net.in_chans * net.patch * net.patch + LANES - 1) / LANES; }

// The sizes of one call.
struct Shape {
    int height, width;         // of a feature map, in pixels
    int64_t blocks;            // of channels
    size_t row, plane, map;    // floats
    int rows, tiles;           // rows of a tile, tiles of a picture
    // Pictures that one thread takes through all of the network, so that nobody waits for anybody. The threads share the
    // tiles of the others, `together` at a time.
    int64_t whole, together;
    size_t maps_bytes;

    Shape(const Network& net, int picture_height, int picture_width, int64_t count, int threads)
        : height(picture_height / net.patch), width(picture_width / net.patch), blocks(net.blocks) {
        row = (size_t)(width + 2 * PAD) * LANES;
        plane = row * height;
        map = plane * blocks;
        rows = std::max(1, std::min(height, TILE_PIXELS / width));
        whole = 2 * map * 4 <= OWN_MAPS ? count / threads * threads : 0;
        const int64_t shared = count - whole;
        if (0 < shared && shared < threads) rows = std::min<int64_t>(rows, (height * shared + threads - 1) / threads);
        tiles = (height + rows - 1) / rows;
        // Enough tiles at a time that threads seldom wait for the last one.
        together = std::max<int64_t>(1, std::min<int64_t>(shared, 8 * threads / tiles));
        maps_bytes = 2 * map * 4 * std::max<int64_t>(together, whole ? threads : 0);
    }
};

INLINE Vector load(const float* from) { return *(const Vector*)from; }
INLINE void store(float* to, Vector value) { *(Vector*)to = value; }
INLINE Vector broadcast(float value) { return value - Vector{}; }

// x times the normal distribution's P(X <= x) = 0.5 + x * p(x * x) / q(x * x). p and q were fitted to it between -5.3 and
// 5.3 by weighted least squares, for the smallest largest error. Outside, it is 0 or 1, exactly: a trained network may
// have inputs in the hundreds, and a batch norm after them that magnifies whatever is wrong. GELU is off by 1.3e-6 at
// most (PyTorch's, in float32, by 1.2e-6): tests/test_engine.py.
INLINE Vector gelu(Vector x) {
    const Vector u = x * x;
    Vector p = -1.76112315e-08f * u + 6.02292585e-06f;
    p = p * u + 0.000465565396f;
    p = p * u + 0.0064298596f;
    p = p * u + 0.0653256514f;
    p = p * u + 0.398941596f;
    Vector q = 0.000156661661f * u + 0.00356640073f;
    q = q * u + 0.0462052696f;
    q = q * u + 0.330402536f;
    q = q * u + 1.0f;
    Vector share = x * (p / q) + 0.5f;
    share = x > 5.3f ? broadcast(1) : share;
    share = x < -5.3f ? Vector{} : share;
    return x * share;
}

INLINE Vector activate(Vector x, bool relu) { return relu ? (x < 0.0f ? Vector{} : x) : gelu(x); }  // NaN stays NaN

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

// Where the results of a product go.
struct Target {
    float* map;             // of the first output channel of the network
    size_t plane;           // floats from one block of channels to the next
    const int32_t* offset;  // floats from a plane's start, for each pixel of the tile
    const float* scale;     // int8 only: what a step of each pixel's integers is worth
    bool relu;
};

// PIXELS pixels of a tile times COLUMNS vectors of output channels, from channel `first`, over all input channels; then
// bias, activation and norm. Meanwhile it asks for the next weights, `lines` cache lines from `ahead` for each block, so
// that they are in the level-2 cache in time.
template <typename F, int PIXELS>
static void product(const char* tile, size_t stride, const char* weights, int64_t blocks, const Stage& stage,
                    int64_t first, const Target& target, int pixel, const char* ahead, int lines) {
    typedef typename F::Word Word;
    constexpr int WORDS = LANES / F::PACK;
    const Word* words = (const Word*)tile + pixel * WORDS;
    const float* w = (const float*)weights;
    typename F::Sum sum[PIXELS][COLUMNS] = {};
    for (int64_t block = 0; block < blocks; block++, words += stride * WORDS) {
        for (int line = 0; line < lines; line++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 4
        for (int k = 0; k < WORDS; k++, w += COLUMNS * LANES) {
            Vector column[COLUMNS];
            UNROLL for (int c = 0; c < COLUMNS; c++) column[c] = load(w + c * LANES);
            UNROLL for (int p = 0; p < PIXELS; p++) {
                const Word word = words[p * WORDS + k];
                UNROLL for (int c = 0; c < COLUMNS; c++) sum[p][c] = F::add(sum[p][c], word, column[c]);
            }
        }
    }
    UNROLL for (int c = 0; c < COLUMNS; c++) {
        const int64_t channel = first + c * LANES;
        const Vector bias = load(stage.bias + channel);
        const Vector scale = load(stage.scale + channel), shift = load(stage.shift + channel);
        float* map = target.map + channel / LANES * target.plane;
        UNROLL for (int p = 0; p < PIXELS; p++) {
            Vector value;
            if constexpr (F::PACK == 4) {
                const Integers exact = sum[p][c] - *(const Integers*)(stage.weight_sum + channel);
                value = __builtin_convertvector(exact, Vector) * target.scale[pixel + p];
                value = value * load(stage.weight_scale + channel) + bias;
            } else {
                value = sum[p][c] + bias;
            }
            store(map + target.offset[pixel + p], activate(value, target.relu) * scale + shift);
        }
    }
}

// product() with the number of pixels known only now.
template <typename F, int PIXELS = ROWS, typename... Arguments>
static void product_of(int pixels, Arguments... arguments) {
    if (pixels == PIXELS) return product<F, PIXELS>(arguments...);
    if constexpr (PIXELS > 1) product_of<F, PIXELS - 1>(pixels, arguments...);
}

// The 1x1 convolution of a tile of `pixels` pixels.
template <typename F>
static void pointwise(const void* tile, int pixels, int64_t in_blocks, int64_t out_blocks, const Stage& stage,
                      const Target& target) {
    const int groups = (pixels + ROWS - 1) / ROWS, even = pixels / groups, larger = pixels % groups;
    const size_t panel = in_blocks * LANES / F::PACK * COLUMNS * LANES * 4;  // bytes of weights for COLUMNS vectors
    const int lines = (LANES / F::PACK * COLUMNS * LANES * 4 / 64 + groups - 1) / groups;
    const char* weights = (const char*)stage.weight;
    for (int64_t block = 0; block < out_blocks; block += COLUMNS, weights += panel) {
        int pixel = 0;
        for (int group = 0; group < groups; group++) {
            const int size = even + (group < larger);
            const char* ahead = weights + panel + (size_t)group * lines * in_blocks * 64;
            product_of<F>(size, (const char*)tile, (size_t)pixels, weights, in_blocks, std::cref(stage), block * LANES,
                          std::cref(target), pixel, ahead, lines);
            pixel += size;
        }
    }
}

// A tile as the products want it. With int8, `values` is the float32 tile that quantize() reads, and `peak` has LANES
// largest absolute values for each pixel.
struct Tile {
    float* values;
    void* packed;
    float* peak;
};

// A thread's own memory.
struct Scratch {
    Tile tile;
    int32_t* offset;
    float* scale;

    Scratch(char* memory, const Network& net, const Shape& shape) {
        const size_t pixels = (size_t)shape.rows * shape.width;
        tile.values = (float*)memory;
        memory += values_bytes(net, shape);
        tile.packed = Format::PACK == 1 ? (void*)tile.values : memory;
        memory += pixels * shape.blocks * LANES * 2;
        tile.peak = (float*)memory;
        memory += pixels * LANES * 4;
        offset = (int32_t*)memory;
        scale = (float*)(memory + pixels * LANES * 4);
    }
    static size_t values_bytes(const Network& net, const Shape& shape) {
        return (size_t)shape.rows * shape.width * std::max(shape.blocks, stem_blocks(net)) * LANES * 4;
    }
    static size_t bytes(const Network& net, const Shape& shape) {
        const size_t pixels = (size_t)shape.rows * shape.width;
        return values_bytes(net, shape) + pixels * (shape.blocks * 2 + 3 * 4) * LANES;
    }
};

INLINE void put(const Tile& tile, size_t index, int pixel, Vector value) {
#if NUMBER == 1
    ((__m256i*)tile.packed)[index] = (__m256i)_mm512_cvtneps_pbh((__m512)value);
#else
    store(tile.values + index * LANES, value);
#endif
#if NUMBER == 2
    const Vector size = value < 0.0f ? -value : value, before = load(tile.peak + pixel * LANES);
    store(tile.peak + pixel * LANES, size > before ? size : before);
#endif
}

#if NUMBER == 2
// Each pixel's channels as integers from 1 to 255, where 128 is zero and the largest absolute value lies 127 from it.
static void quantize(const Tile& tile, int64_t blocks, int pixels, float* scale) {
    for (int p = 0; p < pixels; p++) {
        const float peak = _mm512_reduce_max_ps(_mm512_load_ps(tile.peak + p * LANES));
        scale[p] = peak / 127;
        tile.peak[p * LANES] = peak > 0 ? 127 / peak : 0;
    }
    __m128i* to = (__m128i*)tile.packed;
    for (int64_t i = 0, block = 0; block < blocks; block++)
        for (int p = 0; p < pixels; p++, i++) {
            const __m512 inverse = _mm512_set1_ps(tile.peak[p * LANES]);
            const __m512 value = _mm512_mul_ps(_mm512_load_ps(tile.values + i * LANES), inverse);
            to[i] = _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(value), _mm512_set1_epi32(128)));
        }
}
#endif

// One row of one block of channels, for the depthwise convolution.
struct Row {
    const float *input, *center, *taps;  // input: kernel row `top`; center: the pixels themselves
    size_t stride;                       // floats from one row of the feature map to the next
    int top, bottom;                     // the rows of the kernel that lie inside the picture
    Vector bias, scale, shift;
    bool relu;
};

// WIDTH pixels from pixel x: depthwise convolution, activation, norm, and the residual, into the tile at `index`. Each
// input is loaded once for all the outputs that it belongs to.
template <int WIDTH>
INLINE void segment(const Row& row, int x, const Tile& tile, size_t index, int pixel) {
    Vector sum[WIDTH];
    UNROLL for (int i = 0; i < WIDTH; i++) sum[i] = row.bias;
    const float* input = row.input + x * LANES;
    for (int y = row.top; y < row.bottom; y++, input += row.stride) {
        Vector tap[KERNEL];
        UNROLL for (int k = 0; k < KERNEL; k++) tap[k] = load(row.taps + (y * KERNEL + k) * LANES);
        UNROLL for (int i = 0; i < WIDTH + KERNEL - 1; i++) {
            const Vector value = load(input + i * LANES);
            UNROLL for (int k = 0; k < KERNEL; k++)
                if (i >= k && i - k < WIDTH) sum[i - k] += value * tap[k];
        }
    }
    const float* center = row.center + x * LANES;
    UNROLL for (int i = 0; i < WIDTH; i++) {
        const Vector normed = activate(sum[i], row.relu) * row.scale + row.shift;
        put(tile, index + i, pixel + i, normed + load(center + i * LANES));
    }
}

// The first half of a block, for rows first to last of a feature map, into a tile.
static void depthwise(const float* map, const Shape& shape, int first, int last, const Stage& stage, bool relu,
                      const Tile& tile) {
    const int begin = std::max(0, first - PAD), end = std::min(shape.height, last + PAD);
    const size_t bytes = (end - begin) * shape.row * 4;  // of a block of channels in the rows that are read
    const int lines = bytes / 64 / (last - first), pixels = (last - first) * shape.width;
    if (NUMBER == 2) std::memset(tile.peak, 0, (size_t)pixels * LANES * 4);
    Row row{};
    row.stride = shape.row;
    row.relu = relu;
    size_t index = 0;
    for (int64_t block = 0; block < shape.blocks; block++, map += shape.plane) {
        row.bias = load(stage.bias + block * LANES);
        row.scale = load(stage.scale + block * LANES);
        row.shift = load(stage.shift + block * LANES);
        row.taps = (const float*)stage.weight + block * KERNEL * KERNEL * LANES;
        const char* ahead = (const char*)(map + shape.plane + begin * shape.row);  // the next block of channels
        int pixel = 0;
        for (int y = first; y < last; y++) {
            for (int line = 0; line < lines; line++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
            row.top = std::max(0, PAD - y);
            row.bottom = std::min(KERNEL, shape.height + PAD - y);
            row.input = map + (y + row.top - PAD) * shape.row;
            row.center = map + y * shape.row + PAD * LANES;
            int x = 0;
            for (; x + SPAN <= shape.width; x += SPAN, pixel += SPAN, index += SPAN)
                segment<SPAN>(row, x, tile, index, pixel);
            for (; x + 4 <= shape.width; x += 4, pixel += 4, index += 4) segment<4>(row, x, tile, index, pixel);
            for (; x < shape.width; x++, pixel++, index++) segment<1>(row, x, tile, index, pixel);
        }
    }
}

// The patches of rows first to last of a picture (in_chans, height, width) as a float32 tile.
static void patches(const Network& net, const float* picture, int height, int width, const Shape& shape, int first,
                    int last, float* tile) {
    const int pixels = (last - first) * shape.width;
    const int64_t blocks = stem_blocks(net);
    std::memset(tile + (blocks - 1) * pixels * LANES, 0, (size_t)pixels * LANES * 4);  // taps that fill the last block
    int64_t tap = 0;
    for (int64_t chan = 0; chan < net.in_chans; chan++)
        for (int64_t py = 0; py < net.patch; py++)
            for (int64_t px = 0; px < net.patch; px++, tap++) {
                float* to = tile + tap / LANES * pixels * LANES + tap % LANES;
                for (int y = first; y < last; y++) {
                    const float* from = picture + (chan * height + y * net.patch + py) * width + px;
                    for (int x = 0; x < shape.width; x++, to += LANES) *to = from[x * net.patch];
                }
            }
}

// The columns of "same" padding, left and right, of one block of channels.
static void clear_padding(float* plane, const Shape& shape) {
    for (int y = 0; y < shape.height; y++, plane += shape.row) {
        std::memset(plane, 0, PAD * LANES * 4);
        std::memset(plane + shape.row - PAD * LANES, 0, PAD * LANES * 4);
    }
}

// One block's channels of a feature map: their means over all pixels, and the map itself as (dim, height, width) unless
// `features` is null.
static void pool(const Network& net, const float* map, const Shape& shape, int64_t block, float* pooled,
                 float* features) {
    const int channels = std::min<int64_t>(LANES, net.dim - block * LANES);
    const int pixels = shape.height * shape.width;
    Vector sum = {};
    for (int y = 0; y < shape.height; y++) {
        const float* from = map + block * shape.plane + y * shape.row + PAD * LANES;
        for (int x = 0; x < shape.width; x++) {
            const Vector value = load(from + x * LANES);
            sum += value;
            for (int c = 0; features && c < channels; c++)
                features[(block * LANES + c) * pixels + y * shape.width + x] = value[c];
        }
    }
    for (int c = 0; c < channels; c++) pooled[block * LANES + c] = sum[c] / pixels;
}

// One tile of what follows stage `stage` of one picture: -1 is the stem, the others are the blocks.
static void run_tile(const Network& net, const Shape& shape, int64_t stage, int64_t tile, const float* picture,
                     int height, int width, const float* from, float* to, const Scratch& own) {
    const int first = tile * shape.rows, last = std::min(shape.height, first + shape.rows);
    const int pixels = (last - first) * shape.width;
    for (int y = first, i = 0; y < last; y++)
        for (int x = 0; x < shape.width; x++, i++) own.offset[i] = y * shape.row + (PAD + x) * LANES;
    const Target target{to, shape.plane, own.offset, own.scale, net.relu != 0};
    if (stage < 0) {
        patches(net, picture, height, width, shape, first, last, own.tile.values);
        pointwise<Float32>(own.tile.values, pixels, stem_blocks(net), shape.blocks, net.stem, target);
        return;
    }
    depthwise(from, shape, first, last, net.depthwise[stage], target.relu, own.tile);
#if NUMBER == 2
    quantize(own.tile, shape.blocks, pixels, own.scale);
#endif
    pointwise<Format>(own.tile.packed, pixels, shape.blocks, shape.blocks, net.pointwise[stage], target);
}

static void forward(const Network& net, const float* pictures, int64_t count, int height, int width, float* pooled,
                    float* features, int threads, char* memory) {
    const Shape shape(net, height, width, count, threads);
    const size_t picture = net.in_chans * height * width, map = net.dim * shape.height * shape.width;
    float* maps = (float*)memory;
    const auto pool_one = [&](int64_t image, const float* from, int64_t block) {
        pool(net, from, shape, block, pooled + image * net.dim, features ? features + image * map : nullptr);
    };
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num();
        const Scratch own(memory + shape.maps_bytes + thread * Scratch::bytes(net, shape), net, shape);
#pragma omp for schedule(static)
        for (size_t plane = 0; plane < shape.maps_bytes / 4 / shape.plane; plane++)
            clear_padding(maps + plane * shape.plane, shape);

#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t image = 0; image < shape.whole; image++) {
            float *from = maps + 2 * thread * shape.map, *to = from + shape.map;
            for (int64_t stage = -1; stage < net.depth; stage++, std::swap(from, to))
                for (int64_t tile = 0; tile < shape.tiles; tile++)
                    run_tile(net, shape, stage, tile, pictures + image * picture, height, width, from, to, own);
            for (int64_t block = 0; block < shape.blocks; block++) pool_one(image, from, block);
        }
#pragma omp barrier
        for (int64_t start = shape.whole; start < count; start += shape.together) {
            const int64_t images = std::min<int64_t>(shape.together, count - start);
            float *from = maps, *to = maps + shape.map * shape.together;
            // Each of these loops ends with all threads waiting for the last one.
            for (int64_t stage = -1; stage < net.depth; stage++, std::swap(from, to)) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t item = 0; item < images * shape.tiles; item++) {
                    const int64_t image = item / shape.tiles, offset = image * shape.map;
                    run_tile(net, shape, stage, item % shape.tiles, pictures + (start + image) * picture, height, width,
                             from + offset, to + offset, own);
                }
            }
#pragma omp for schedule(static)
            for (int64_t item = 0; item < images * shape.blocks; item++) {
                const int64_t image = item / shape.blocks;
                pool_one(start + image, from + image * shape.map, item % shape.blocks);
            }
        }
    }
}

extern "C" {
int convmixer_lanes() { return LANES; }

// The bytes of memory that convmixer_forward needs; what is in them does not matter.
int64_t convmixer_memory(const Network* net, int64_t count, int height, int width, int threads) {
    const Shape shape(*net, height, width, count, threads);
    return shape.maps_bytes + Scratch::bytes(*net, shape) * threads;
}

// pictures (count, in_chans, height, width) to pooled (count, dim) and, unless it is null, features (count, dim,
// height / patch, width / patch).
void convmixer_forward(const Network* net, const float* pictures, int64_t count, int height, int width, float* pooled,
                       float* features, int threads, char* memory) {
    forward(*net, pictures, count, height, width, pooled, features, threads, memory);
}
}
