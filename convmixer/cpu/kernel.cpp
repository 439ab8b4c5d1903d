// ConvMixer's forward pass on the CPU, from the pictures to the pooled features, in one call.
//
// compiler.py compiles this file, once for each
//   KERNEL  the side of the depthwise convolution, odd
//   NUMBER  what the 1x1 convolutions multiply: 0 float32, 1 bfloat16, 2 int8; they add up in float32 or int32
//
// Why not a framework's operators: between two convolutions a ConvMixer has an activation, a batch norm and an
// addition, each a pass over a feature map that is larger than the cache, in memory that is fresh from the system. Here
// a tile of a few rows goes through depthwise convolution, activation, norm and addition while it is in registers, and
// through the 1x1 convolution (nearly all of the arithmetic), activation and norm while it is in the level-2 cache.
// Nothing else is written but the block's result.

#include "stages.h"
#include "threads.h"

struct Network {
    int64_t in_chans, patch, dim, blocks, depth, relu;
    Stage stem;  // always float32
    const Stage *depthwise, *pointwise;

    int64_t stem_blocks() const { return (in_chans * patch * patch + LANES - 1) / LANES; }
};

constexpr size_t OWN_MAPS = 8 << 20;  // bytes of feature maps that a thread may have of its own

// The sizes of one call, and a thread's share of its memory.
struct Shape {
    int height, width;       // of a feature map, in pixels
    size_t pixels, plane, map;  // plane, map: floats
    int rows, tiles;         // rows of a tile, tiles of a picture
    // Pictures that one thread takes through all of the network, so that nobody waits for anybody. The threads share
    // the tiles of the others, `together` at a time.
    int64_t whole, together;
    size_t maps_bytes, values_bytes, packed_bytes, vectors_bytes, thread_bytes;

    Shape(const Network& net, int picture_height, int picture_width, int64_t count, int threads)
        : height(picture_height / net.patch), width(picture_width / net.patch), pixels((size_t)height * width) {
        plane = pixels * LANES;
        map = plane * net.blocks;
        rows = std::max(1, std::min(height, TILE_PIXELS / width));
        whole = 2 * map * 4 <= OWN_MAPS ? count / threads * threads : 0;
        const int64_t shared = count - whole;
        if (0 < shared && shared < threads)  // two tiles for each thread at least
            rows = std::min<int64_t>(rows, (height * shared + 2 * threads - 1) / (2 * threads));
        tiles = (height + rows - 1) / rows;
        // Enough tiles at a time that threads seldom wait for the last one.
        together = std::max<int64_t>(1, std::min<int64_t>(shared, 8 * threads / tiles));
        maps_bytes = 2 * map * 4 * std::max<int64_t>(together, whole ? threads : 0);

        const size_t most = (size_t)groups(rows * width) * ROWS;  // pixels of a tile, with the gaps of its groups
        values_bytes = most * std::max(net.blocks, net.stem_blocks()) * LANES * 4;
        packed_bytes = NUMBER ? most * net.blocks * LANES * 2 : 0;
        vectors_bytes = most * LANES * 4;
        thread_bytes = values_bytes + packed_bytes + 3 * vectors_bytes;
    }
    static int groups(int pixels) { return (pixels + ROWS - 1) / ROWS; }

    Tile tile(char* memory, int thread, int tile_pixels) const {
        char* own = memory + maps_bytes + thread * thread_bytes;
        char *packed = own + values_bytes, *vectors = packed + packed_bytes;
        float *peak = (float*)vectors, *step = (float*)(vectors + vectors_bytes);
        int32_t* place = (int32_t*)(vectors + 2 * vectors_bytes);
        return {tile_pixels, groups(tile_pixels), (float*)own, packed, peak, step, place};
    }
};

// The patches of rows first to last of a picture (in_chans, height, width) as a float32 tile.
static void patches(const Network& net, const float* picture, int height, int width, int first, int last,
                    const Tile& tile) {
    const int across = width / net.patch;
    const int64_t blocks = net.stem_blocks();
    for (int p = 0; p < tile.pixels; p++)  // taps that fill the last block
        store(tile.values + (tile.place[p] + (blocks - 1) * ROWS) * LANES, Vector{});
    int64_t tap = 0;
    for (int64_t chan = 0; chan < net.in_chans; chan++)
        for (int64_t py = 0; py < net.patch; py++)
            for (int64_t px = 0; px < net.patch; px++, tap++) {
                float* to = tile.values + tap / LANES * ROWS * LANES + tap % LANES;
                const int32_t* place = tile.place;
                for (int y = first; y < last; y++) {
                    const float* from = picture + (chan * height + y * net.patch + py) * width + px;
                    for (int x = 0; x < across; x++) to[*place++ * LANES] = from[x * net.patch];
                }
            }
}

// `pixels` pixels of a feature map from pixel `first` as (dim, height, width).
static void write_features(const Network& net, const float* map, size_t plane, int first, int pixels, float* features) {
    for (int64_t c = 0; c < net.dim; c++) {
        const float* from = map + c / LANES * plane + first * LANES + c % LANES;
        float* to = features + c * (plane / LANES) + first;
        for (int p = 0; p < pixels; p++) to[p] = from[p * LANES];
    }
}

// The means of one block's channels over all pixels.
static void pool_block(const Network& net, const float* map, const Shape& shape, int64_t block, float* pooled) {
    Vector sum = {};
    for (size_t p = 0; p < shape.pixels; p++) sum += load(map + block * shape.plane + p * LANES);
    for (int64_t c = 0; c < std::min<int64_t>(LANES, net.dim - block * LANES); c++)
        pooled[block * LANES + c] = sum[c] / shape.pixels;
}

// One call: pictures in, pooled features out, and the feature maps of the last `stages` stages.
struct Call {
    const Network& net;
    const float* pictures;
    int64_t count;
    int height, width;
    float *pooled, *features;
    int64_t stages;
    char* memory;
    Shape shape;

    // One tile of what follows stage `stage` of one picture: -1 is the stem, the others are the blocks.
    void run_tile(int64_t stage, int64_t image, int64_t number, const float* from, float* to, int thread) const {
        const int first = number * shape.rows, last = std::min(shape.height, first + shape.rows);
        Tile tile = shape.tile(memory, thread, (last - first) * shape.width);
        const Target target{to + (size_t)first * shape.width * LANES, shape.plane, net.relu != 0};
        if (stage < 0) {
            tile.packed = tile.values;
            tile.set_places(net.stem_blocks());
            patches(net, pictures + image * net.in_chans * height * width, height, width, first, last, tile);
            pointwise<Float32>(tile, net.stem_blocks(), net.blocks, net.stem, target);
        } else {
            if (Format::PACK == 1) tile.packed = tile.values;
            tile.set_places(net.blocks);
            const Stage& mixing = net.depthwise[stage];
            depthwise(from, net.blocks, shape.height, shape.width, first, last, mixing, target.relu, tile);
            pointwise<Format>(tile, net.blocks, net.blocks, net.pointwise[stage], target);
        }
        const int64_t wanted = stage + stages - net.depth;  // its place among the stages that are asked for
        if (wanted < 0) return;
        float* all = features + (wanted * count + image) * net.dim * shape.pixels;
        write_features(net, to, shape.plane, first * shape.width, tile.pixels, all);
    }

    void run_whole(int64_t image, int thread) const {
        float *from = (float*)memory + 2 * thread * shape.map, *to = from + shape.map;
        for (int64_t stage = -1; stage < net.depth; stage++, std::swap(from, to))
            for (int64_t tile = 0; tile < shape.tiles; tile++) run_tile(stage, image, tile, from, to, thread);
        for (int64_t block = 0; block < net.blocks; block++)
            pool_block(net, from, shape, block, pooled + image * net.dim);
    }

    void run(int threads) const {
        const int64_t each = net.depth + 2;  // phases of pictures that are together: the stages, and pooling
        const int64_t sets = (count - shape.whole + shape.together - 1) / shape.together;
        const auto images = [&](int64_t phase) {
            return std::min(shape.together, count - shape.whole - (phase - 1) / each * shape.together);
        };
        const auto size = [&](int64_t phase) {
            if (phase == 0) return shape.whole;
            return images(phase) * ((phase - 1) % each == each - 1 ? net.blocks : shape.tiles);
        };
        in_phases(threads, 1 + sets * each, size, [&](int64_t phase, int64_t item, int thread) {
            if (phase == 0) return run_whole(item, thread);
            const int64_t start = shape.whole + (phase - 1) / each * shape.together, stage = (phase - 1) % each - 1;
            const int64_t items = stage == net.depth ? net.blocks : shape.tiles, image = item / items;
            float *from = (float*)memory + 2 * image * shape.map, *to = from + shape.map;
            if (stage % 2) std::swap(from, to);
            if (stage == net.depth)
                pool_block(net, from, shape, item % items, pooled + (start + image) * net.dim);
            else
                run_tile(stage, start + image, item % items, from, to, thread);
        });
    }
};

extern "C" {
int convmixer_lanes() { return LANES; }
int convmixer_pack() { return Format::PACK; }  // input channels that share 32 bits

// The bytes of memory that convmixer_forward needs; what is in them does not matter.
int64_t convmixer_memory(const Network* net, int64_t count, int height, int width, int threads) {
    const Shape shape(*net, height, width, count, threads);
    return shape.maps_bytes + threads * shape.thread_bytes;
}

// pictures (count, in_chans, height, width) to pooled (count, dim) and, if stages > 0, features (stages, count, dim,
// height / patch, width / patch): of the last stages, where the stem is the first and each block is one more.
void convmixer_forward(const Network* net, const float* pictures, int64_t count, int height, int width, float* pooled,
                       float* features, int64_t stages, int threads, char* memory) {
    const Shape shape(*net, height, width, count, threads);
    Call{*net, pictures, count, height, width, pooled, features, stages, memory, shape}.run(threads);
}
}
