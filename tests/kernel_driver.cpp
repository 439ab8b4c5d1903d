// Runs kernel.cpp on what test_cpu_targets.py writes to stdin, where no Python runs: for processors that are emulated.
//
// in: six numbers of Network, the picture's count, height, width, the stages and threads, all int64; then for the stem
// and the two halves of each block weight, bias, scale and shift, each its size in bytes (int64) and its content; then
// the pictures in the same way. out: convmixer_lanes() as int64, pooled, features.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../convmixer/cpu/kernel.cpp"

static int64_t read_number() {
    int64_t number;
    if (std::fread(&number, 8, 1, stdin) != 1) std::exit(1);
    return number;
}

static float* read_array() {
    const size_t bytes = read_number();
    float* array = (float*)std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (std::fread(array, 1, bytes, stdin) != bytes) std::exit(1);
    return array;
}

int main() {
    Network net{};
    for (int64_t* number : {&net.in_chans, &net.patch, &net.dim, &net.blocks, &net.depth, &net.relu})
        *number = read_number();
    const int64_t count = read_number(), height = read_number(), width = read_number(), stages = read_number();
    const int threads = read_number();
    std::vector<Stage> halves[2];
    for (int64_t i = 0; i < 1 + 2 * net.depth; i++) {
        Stage stage{};
        stage.weight = read_array(), stage.bias = read_array(), stage.scale = read_array(), stage.shift = read_array();
        if (i)
            halves[(i - 1) % 2].push_back(stage);
        else
            net.stem = stage;
    }
    net.depthwise = halves[0].data(), net.pointwise = halves[1].data();
    const float* pictures = read_array();
    std::vector<float> pooled(count * net.dim);
    std::vector<float> features(stages * count * net.dim * (height / net.patch) * (width / net.patch));
    const size_t bytes = convmixer_memory(&net, count, height, width, threads);
    char* memory = (char*)std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    convmixer_forward(&net, pictures, count, height, width, pooled.data(), features.data(), stages, threads, memory);
    const int64_t lanes = convmixer_lanes();
    std::fwrite(&lanes, 8, 1, stdout);
    std::fwrite(pooled.data(), 4, pooled.size(), stdout);
    std::fwrite(features.data(), 4, features.size(), stdout);
}
