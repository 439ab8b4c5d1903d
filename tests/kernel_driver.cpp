// Runs kernel.cpp on what test_cpu_targets.py writes to stdin, where no Python runs: for processors that are emulated.
//
// in: Network's six numbers, the pictures' count, height and width, stages and threads, all int64; then arrays, each its
// size in bytes (int64) and its content: the pictures, and weight, bias, scale and shift of the stem and of the two
// halves of each block. out: convmixer_lanes() as int64, pooled, features.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../convmixer/cpu/kernel.cpp"

static void read(void* to, size_t bytes) {
    if (std::fread(to, 1, bytes, stdin) != bytes) std::exit(1);
}

static float* read_array() {
    int64_t bytes;
    read(&bytes, 8);
    void* array = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    read(array, bytes);
    return (float*)array;
}

static Stage read_stage() {
    Stage stage{};
    stage.weight = read_array(), stage.bias = read_array(), stage.scale = read_array(), stage.shift = read_array();
    return stage;
}

int main() {
    Network net{};
    int64_t sizes[5];
    read(&net, 6 * 8);
    read(sizes, sizeof sizes);
    const auto [count, height, width, stages, threads] = sizes;
    const float* pictures = read_array();
    net.stem = read_stage();
    std::vector<Stage> depthwise, pointwise;
    for (int64_t i = 0; i < net.depth; i++) depthwise.push_back(read_stage()), pointwise.push_back(read_stage());
    net.depthwise = depthwise.data(), net.pointwise = pointwise.data();
    std::vector<float> pooled(count * net.dim);
    std::vector<float> features(stages * count * net.dim * (height / net.patch) * (width / net.patch));
    std::vector<char> memory(convmixer_memory(&net, count, height, width, threads) + 64);
    char* aligned = memory.data() + (64 - (uintptr_t)memory.data() % 64);
    convmixer_forward(&net, pictures, count, height, width, pooled.data(), features.data(), stages, threads, aligned);
    const int64_t lanes = convmixer_lanes();
    std::fwrite(&lanes, 8, 1, stdout);
    std::fwrite(pooled.data(), 4, pooled.size(), stdout);
    std::fwrite(features.data(), 4, features.size(), stdout);
}
