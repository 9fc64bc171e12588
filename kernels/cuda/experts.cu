// A mixture of experts: every route, a token's way to one of its experts, is a row that is multiplied with that expert's
// weights, and a token's result is the weighted sum over its routes, in their order.
//
// Few tokens: a block has one route, and the weights are read once per route (gate_up_few, down_few). Many: the routes are
// sorted by expert and cut into tiles of rows that share their weights (sort, gate_up, down, combine). The number of
// tiles is known to the device alone, so there are blocks for as many as there can be. Both ways give the same bits.
#include "activation.cuh"
#include "tile.cuh"

constexpr int kThreads = 256;

// The weights of one expert: gate, up and down. Biases may be null.
struct ExpertEntry {
    const void* weight[3];
    const float* bias[3];
    uint32_t stride[3];
    uint32_t unused;
};
EXPORT_PARAMS(ExpertEntry, weight, bias, stride, unused)

enum Projection { kGate, kUp, kDown };

// Rows of a tile, one after the other among the sorted routes.
struct ExpertTile {
    uint32_t expert;
    uint32_t first;
    uint32_t rows;
};

// Of all kernels here.
struct ExpertsParams {
    const ExpertEntry* experts;  // [count]
    const uint32_t* chosen;      // [routes]: the expert of each
    const float* weights;        // [routes]
    const void* input;           // [tokens, width]
    void* inner;                 // [routes, inner_width]: what is between the layers
    void* outer;                 // [routes, width]: what the experts say
    void* out;                   // [tokens, width]
    uint32_t* sorted;            // [routes]: their numbers by expert, in order
    ExpertTile* tiles;           // as many as there can be
    uint32_t* tile_count;        // how many there are
    uint32_t tokens;
    uint32_t per_token;  // routes
    uint32_t count;
    uint32_t width;
    uint32_t inner_width;
    uint32_t tile_rows;
    uint32_t gating;
    float limit;
    float alpha;
};
EXPORT_PARAMS(ExpertsParams, experts, chosen, weights, input, inner, outer, out, sorted, tiles, tile_count, tokens, per_token,
              count, width, inner_width, tile_rows, gating, limit, alpha)

__device__ __forceinline__ float gate_one(const ExpertsParams& p, float gate, float up) {
    float result = 0.0f;
    with_gating(p.gating, p.limit, p.alpha, [&](auto gating) { result = gating(gate, up); });
    return result;
}
__device__ __forceinline__ float biased(const ExpertEntry& expert, Projection which, int output, float sum) {
    const float* bias = expert.bias[which];
    return bias ? sum + bias[output] : sum;
}
template <class T> __device__ __forceinline__ const T* weight_row(const ExpertEntry& expert, Projection which, int row) {
    return static_cast<const T*>(expert.weight[which]) + size_t(row) * expert.stride[which];
}
template <class T> __device__ __forceinline__ bool are_vectors(const ExpertEntry& expert, Projection which, const T* input, int width) {
    return is_vectorized<T>(input, width) && is_vectorized<T>(expert.weight[which], expert.stride[which]);
}

// ---------------------------------------------------------------------------------------------- sort

// Sorts the routes by expert, those of an expert stay in order, and cuts them into tiles. A warp has an expert. Every block
// counts all routes, so that none has to wait for another.
extern "C" __global__ void __launch_bounds__(kThreads) experts_sort(const __grid_constant__ ExpertsParams p) {
    auto* counts = reinterpret_cast<uint32_t*>(dynamic_shared);  // [count]
    const int count = p.count, routes = p.tokens * p.per_token, lane = threadIdx.x % 32;
    for (int i = threadIdx.x; i < count; i += kThreads) counts[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < routes; i += kThreads) atomicAdd(&counts[p.chosen[i]], 1u);
    __syncthreads();

    const int expert = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
    if (expert >= count) return;
    uint32_t first = 0, first_tile = 0;
    for (int i = lane; i < expert; i += 32) {
        first += counts[i];
        first_tile += (counts[i] + p.tile_rows - 1) / p.tile_rows;
    }
    first = __reduce_add_sync(0xffffffffu, first);
    first_tile = __reduce_add_sync(0xffffffffu, first_tile);
    const uint32_t rows = counts[expert], tiles = (rows + p.tile_rows - 1) / p.tile_rows;
    for (uint32_t i = lane; i < tiles; i += 32) {
        const uint32_t before = i * p.tile_rows;
        p.tiles[first_tile + i] = {uint32_t(expert), first + before, min(p.tile_rows, rows - before)};
    }
    if (expert == count - 1 && lane == 0) *p.tile_count = first_tile + tiles;

    constexpr int kAhead = 4;  // loads that are under way
    uint32_t* to = p.sorted + first;
    for (uint32_t at = 0, found = 0; found < rows; at += 32 * kAhead) {
        bool mine[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int route = at + i * 32 + lane;
            mine[i] = route < routes && p.chosen[route] == uint32_t(expert);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const uint32_t all = __ballot_sync(0xffffffffu, mine[i]);
            if (mine[i]) to[found + __popc(all & ((1u << lane) - 1))] = at + i * 32 + lane;
            found += __popc(all);
        }
    }
}
EXPORT_KERNEL(experts_sort)

// ---------------------------------------------------------------------------------------------- few tokens

// Rows with which a warp multiplies, of which one is there: tensor cores do 8 at once.
template <class T> constexpr int kRowsOfOne = sizeof(T) == 2 ? 8 : 1;

// Adds one row's products with 8 * tiles weights, a slice per warp, to [warps, kRowsOfOne, 8 * tiles] in shared memory.
template <class T, int tiles, class Weight>
__device__ __forceinline__ void multiply_one(float* partial, const T* input, int inputs, bool vectors, Weight weight) {
    const int warp = threadIdx.x / 32, begin = warp * slice_length(inputs), end = min(begin + slice_length(inputs), inputs);
    WarpSums<T, kRowsOfOne<T>, tiles> sums([&](int) { return input; });
    using Weights = Stream<T, tiles>;
    const Weights weights(reinterpret_cast<uint4*>(dynamic_shared) + warp * Weights::kRing, weight);
    if (vectors) {
        weights.add_to(sums, begin, end);
    } else {
        weights.add_elements_to(sums, begin, end);
    }
    sums.write(partial + warp * kRowsOfOne<T> * 8 * tiles);
    __syncthreads();
}

// A block has eight elements of a route's inner row: the gate is its first tile of weights, the other half the second.
template <class T> __device__ __forceinline__ void experts_gate_up_few(const ExpertsParams& p) {
    __shared__ float partial[kSlices * kRowsOfOne<T> * 16];
    const uint32_t route = blockIdx.y;
    const ExpertEntry& expert = p.experts[p.chosen[route]];
    const T* input = static_cast<const T*>(p.input) + size_t(route / p.per_token) * p.width;
    const int first = blockIdx.x * 8, last = p.inner_width - 1, width = p.width;
    const bool vectors = are_vectors(expert, kGate, input, width) && are_vectors(expert, kUp, input, width);
    multiply_one<T, 2>(partial, input, width, vectors, [&](int i) {
        return weight_row<T>(expert, i < 8 ? kGate : kUp, min(first + i % 8, last));
    });
    const int i = threadIdx.x, output = first + i;
    if (i >= 8 || output > last) return;
    const float gate = biased(expert, kGate, output, sum_slices(partial, kRowsOfOne<T> * 16, i));
    const float up = biased(expert, kUp, output, sum_slices(partial, kRowsOfOne<T> * 16, 8 + i));
    static_cast<T*>(p.inner)[size_t(route) * p.inner_width + output] = from_float<T>(gate_one(p, gate, up));
}
KERNELS(experts_gate_up_few, kThreads, ExpertsParams)

// A block has eight elements of a token, from one of its experts after the other.
template <class T> __device__ __forceinline__ void experts_down_few(const ExpertsParams& p) {
    constexpr int kSums = kRowsOfOne<T> * 8;
    __shared__ float partial[2][kSlices * kSums];  // in turns: one is read while the other is written
    const size_t token = blockIdx.y;
    const int first = blockIdx.x * 8, last = p.width - 1, inner_width = p.inner_width;
    const int i = threadIdx.x, output = first + i;
    float total = 0.0f;
    for (uint32_t place = 0; place < p.per_token; ++place) {
        const size_t route = token * p.per_token + place;
        const ExpertEntry& expert = p.experts[p.chosen[route]];
        const T* input = static_cast<const T*>(p.inner) + route * inner_width;
        float* sums = partial[place % 2];
        multiply_one<T, 1>(sums, input, inner_width, are_vectors(expert, kDown, input, inner_width),
                           [&](int i) { return weight_row<T>(expert, kDown, min(first + i, last)); });
        if (i >= 8 || output > last) continue;
        // Rounded as it is where it is stored.
        const T value = from_float<T>(biased(expert, kDown, output, sum_slices(sums, kSums, i)));
        total = fmaf(p.weights[route], to_float(value), total);
    }
    if (i < 8 && output <= last) static_cast<T*>(p.out)[token * p.width + output] = from_float<T>(total);
}
KERNELS(experts_down_few, kThreads, ExpertsParams)

// ---------------------------------------------------------------------------------------------- many tokens

// Routes of a tile, and the rows of `inputs` that they read: every `divisor` routes share one.
template <class T> struct TileRows {
    const uint32_t* routes;
    int rows;
    const T* inputs;
    uint32_t divisor;
    int width;

    __device__ __forceinline__ TileRows(const ExpertsParams& p, const ExpertTile& tile, const void* from, uint32_t shared_by, int width)
        : routes(p.sorted + tile.first), rows(tile.rows), inputs(static_cast<const T*>(from)), divisor(shared_by), width(width) {}
    __device__ __forceinline__ const T* operator()(int row) const { return inputs + size_t(routes[row] / divisor) * width; }
};

// [rows, 64] of the inner rows of a tile. Of the weights of each warp, the first half are of the gate.
template <class T, int rows> __device__ __forceinline__ void experts_gate_up(const ExpertsParams& p) {
    if (blockIdx.y >= *p.tile_count) return;
    using Block = Tile<T, rows>;
    constexpr int kHalf = Block::kWarpWeights / 2, kOutputs = kTileWeights / 2;
    const ExpertTile at = p.tiles[blockIdx.y];
    const ExpertEntry& expert = p.experts[at.expert];
    const TileRows<T> inputs(p, at, p.input, p.per_token, p.width);
    const int first = blockIdx.x * kOutputs, outputs = min(int(p.inner_width) - first, kOutputs);
    Block tile([&](int row) { return row < inputs.rows ? inputs(row) : nullptr; },
               [&](int i) {
                   const int output = i / (2 * kHalf) * kHalf + i % kHalf;
                   const Projection which = i % (2 * kHalf) < kHalf ? kGate : kUp;
                   return output < outputs ? weight_row<T>(expert, which, first + output) : nullptr;
               });
    tile.multiply(p.width, are_vectors(expert, kGate, inputs.inputs, p.width) && are_vectors(expert, kUp, inputs.inputs, p.width));
    const float* sums = tile.collect();
    for (int i = threadIdx.x; i < inputs.rows * kOutputs; i += kTileThreads) {
        const int row = i / kOutputs, output = i % kOutputs;
        if (output >= outputs) continue;
        const float* gate_sum = sums + row * kTileRow + output / kHalf * 2 * kHalf + output % kHalf;
        const float gate = biased(expert, kGate, first + output, gate_sum[0]);
        const float up = biased(expert, kUp, first + output, gate_sum[kHalf]);
        T* to = static_cast<T*>(p.inner) + size_t(inputs.routes[row]) * p.inner_width + first;
        to[output] = from_float<T>(gate_one(p, gate, up));
    }
}

// [rows, 128] of what the experts say.
template <class T, int rows> __device__ __forceinline__ void experts_down(const ExpertsParams& p) {
    if (blockIdx.y >= *p.tile_count) return;
    const ExpertTile at = p.tiles[blockIdx.y];
    const ExpertEntry& expert = p.experts[at.expert];
    const TileRows<T> inputs(p, at, p.inner, 1, p.inner_width);
    const int first = blockIdx.x * kTileWeights, outputs = min(int(p.width) - first, kTileWeights);
    Tile<T, rows> tile([&](int row) { return row < inputs.rows ? inputs(row) : nullptr; },
                       [&](int i) { return i < outputs ? weight_row<T>(expert, kDown, first + i) : nullptr; });
    tile.multiply(p.inner_width, are_vectors(expert, kDown, inputs.inputs, p.inner_width));
    const float* sums = tile.collect();
    for (int i = threadIdx.x; i < inputs.rows * kTileWeights; i += kTileThreads) {
        const int row = i / kTileWeights, output = i % kTileWeights;
        if (output >= outputs) continue;
        T* to = static_cast<T*>(p.outer) + size_t(inputs.routes[row]) * p.width + first;
        to[output] = from_float<T>(biased(expert, kDown, first + output, sums[row * kTileRow + output]));
    }
}

#define EXPERTS_TILE(T, suffix, rows)                                                                              \
    extern "C" __global__ void __launch_bounds__(kTileThreads, rows < 128 ? 2 : 1) experts_gate_up_##rows##_##suffix(                  \
        const __grid_constant__ ExpertsParams params) {                                                            \
        experts_gate_up<T, rows>(params);                                                                          \
    }                                                                                                              \
    EXPORT_KERNEL(experts_gate_up_##rows##_##suffix)                                                               \
    extern "C" __global__ void __launch_bounds__(kTileThreads, rows < 128 ? 2 : 1) experts_down_##rows##_##suffix(                     \
        const __grid_constant__ ExpertsParams params) {                                                            \
        experts_down<T, rows>(params);                                                                             \
    }                                                                                                              \
    EXPORT_KERNEL(experts_down_##rows##_##suffix)
EXPERTS_TILE(__half, f16, 32)
EXPERTS_TILE(__half, f16, 128)
EXPERTS_TILE(__nv_bfloat16, bf16, 32)
EXPERTS_TILE(__nv_bfloat16, bf16, 128)

// f32, without tensor cores: a tile has 16 rows, of which a block multiplies all with 16 weights, a slice per warp.
constexpr int kFloatRows = 16;
template <class Weight>
__device__ __forceinline__ void multiply_floats(float* partial, const TileRows<float>& inputs, bool vectors, Weight weight) {
    const int warp = threadIdx.x / 32, length = slice_length(inputs.width);
    const int begin = warp * length, end = min(begin + length, inputs.width);
    WarpSums<float, kFloatRows, 2> sums([&](int row) { return inputs(min(row, inputs.rows - 1)); });
    using Weights = Stream<float, 2>;
    const Weights weights(reinterpret_cast<uint4*>(dynamic_shared) + warp * Weights::kRing, weight);
    if (vectors) {
        weights.add_to(sums, begin, end);
    } else {
        weights.add_elements_to(sums, begin, end);
    }
    sums.write(partial + warp * kFloatRows * 16);
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(kThreads) experts_gate_up_f32(const __grid_constant__ ExpertsParams p) {
    __shared__ float partial[kSlices * kFloatRows * 16];
    if (blockIdx.y >= *p.tile_count) return;
    const ExpertTile at = p.tiles[blockIdx.y];
    const ExpertEntry& expert = p.experts[at.expert];
    const TileRows<float> inputs(p, at, p.input, p.per_token, p.width);
    const int first = blockIdx.x * 8, last = p.inner_width - 1;
    const bool vectors = are_vectors(expert, kGate, inputs.inputs, p.width) && are_vectors(expert, kUp, inputs.inputs, p.width);
    multiply_floats(partial, inputs, vectors,
                    [&](int i) { return weight_row<float>(expert, i < 8 ? kGate : kUp, min(first + i % 8, last)); });
    for (int i = threadIdx.x; i < inputs.rows * 8; i += blockDim.x) {
        const int row = i / 8, output = first + i % 8;
        if (output > last) continue;
        const float gate = biased(expert, kGate, output, sum_slices(partial, kFloatRows * 16, row * 16 + i % 8));
        const float up = biased(expert, kUp, output, sum_slices(partial, kFloatRows * 16, row * 16 + 8 + i % 8));
        static_cast<float*>(p.inner)[size_t(inputs.routes[row]) * p.inner_width + output] = gate_one(p, gate, up);
    }
}
EXPORT_KERNEL(experts_gate_up_f32)

extern "C" __global__ void __launch_bounds__(kThreads) experts_down_f32(const __grid_constant__ ExpertsParams p) {
    __shared__ float partial[kSlices * kFloatRows * 16];
    if (blockIdx.y >= *p.tile_count) return;
    const ExpertTile at = p.tiles[blockIdx.y];
    const ExpertEntry& expert = p.experts[at.expert];
    const TileRows<float> inputs(p, at, p.inner, 1, p.inner_width);
    const int first = blockIdx.x * 16, last = p.width - 1;
    multiply_floats(partial, inputs, are_vectors(expert, kDown, inputs.inputs, p.inner_width),
                    [&](int i) { return weight_row<float>(expert, kDown, min(first + i, last)); });
    for (int i = threadIdx.x; i < inputs.rows * 16; i += blockDim.x) {
        const int row = i / 16, output = first + i % 16;
        if (output > last) continue;
        const float sum = sum_slices(partial, kFloatRows * 16, i);
        static_cast<float*>(p.outer)[size_t(inputs.routes[row]) * p.width + output] = biased(expert, kDown, output, sum);
    }
}
EXPORT_KERNEL(experts_down_f32)

// A token's weighted sum: a block for each.
template <class T> __device__ __forceinline__ void experts_combine(const ExpertsParams& p) {
    const size_t token = blockIdx.x;
    const T* outer = static_cast<const T*>(p.outer) + token * p.per_token * p.width;
    const float* weights = p.weights + token * p.per_token;
    T* out = static_cast<T*>(p.out) + token * p.width;
    for (int i = threadIdx.x; i < int(p.width); i += kThreads) {
        float total = 0.0f;
        for (uint32_t place = 0; place < p.per_token; ++place)
            total = fmaf(weights[place], to_float(outer[size_t(place) * p.width + i]), total);
        out[i] = from_float<T>(total);
    }
}
KERNELS(experts_combine, kThreads, ExpertsParams)
