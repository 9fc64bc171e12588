// Attention of sequences with many rows, on tensor cores: for prompts, also such that follow a cached prefix, where products
// are what takes time (Dao 2023, FlashAttention-2).
//
// A block has 64 or 128 rows, which are the query heads of a key/value head, of several tokens, and takes 64 keys in turn.
// Each of its four warps has 16 or 32 rows to itself, all keys, and the results in registers. While scores are
// multiplied, values travel; while values are, the next keys.
#include "attention_block.cuh"
#include "scores.cuh"

template <class T, class C, int head_dim> struct Prefill {
    using Operand = Operands<T, C>;
    using Factor = typename Operand::Factor;
    static constexpr int kWarps = 4, kThreads = 32 * kWarps;
    static constexpr int kKeys = 64;
    // Of a warp, 16 rows each. With two, keys and values are read half as often; more would not fit into registers.
    static constexpr int kRowTiles = head_dim > 128 ? 1 : 2;
    static constexpr int kWarpRows = 16 * kRowTiles, kBlockRows = kWarps * kWarpRows;
    static constexpr int kUnits = head_dim / 16;
    static constexpr int kRowBytes = head_dim * int(sizeof(C));
    using Tile = Rows<kRowBytes>;
    static constexpr int kTileBytes = kKeys * kRowBytes;
    // Shared memory: keys, values, then queries as left operands, a vector per lane.
    static constexpr int kSharedBytes = 2 * kTileBytes + kBlockRows / 16 * kUnits * 512;

    const AttentionParams& p;
    const Block& block;  // in shared memory: registers are scarce
    int warp, lane, part;
    float sums[kRowTiles][kUnits][2][4] = {};
    Softmax softmax[kRowTiles];

    __device__ __forceinline__ Prefill(const AttentionParams& params, const Block& of_all)
        : p(params), block(of_all), warp(threadIdx.x / 32), lane(threadIdx.x % 32), part(lane % 4) {}

    static __device__ __forceinline__ Tile keys() { return {dynamic_shared}; }
    static __device__ __forceinline__ Tile values() { return {dynamic_shared + kTileBytes}; }
    __device__ __forceinline__ uint4* queries(int m) const {
        return reinterpret_cast<uint4*>(dynamic_shared + 2 * kTileBytes) + (warp * kRowTiles + m) * kUnits * 32 + lane;
    }
    // The first of this lane's rows, of a tile of rows.
    __device__ __forceinline__ int row(int m) const { return warp * kWarpRows + m * 16 + lane / 4; }

    __device__ __forceinline__ void load_queries() const {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
            const T* query[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int of = row(m) + 8 * half;
                query[half] = of < block.rows ? static_cast<const T*>(p.query) + block.at(p, of) * head_dim : nullptr;
            }
            for (int unit = 0; unit < kUnits; ++unit) queries(m)[unit * 32] = Operand::load_queries(query, unit, part);
        }
    }

    // Where 64 keys are, two per lane.
    __device__ __forceinline__ void locate_keys(uint32_t (&slots)[2], int key) const {
        slots[0] = locate<32>(p, block, key);
        slots[1] = locate<32>(p, block, key + 32);
    }
    __device__ __forceinline__ void copy(const Tile& to, const void* cache, const uint32_t (&slots)[2]) const {
        copy_rows<32, kThreads>(p, block, to, 0, cache, slots[0], threadIdx.x);
        copy_rows<32, kThreads>(p, block, to, 32, cache, slots[1], threadIdx.x);
        ptx::commit_group();
    }

    __device__ __forceinline__ void multiply_keys(float (&scores)[kRowTiles][kKeys / 8][4]) const {
        const auto of_lane = Operand::template lane_of_keys<kRowBytes>(lane);
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
            uint32_t left[kRowTiles][4];
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
                const uint4 query = queries(m)[unit * 32];
                left[m][0] = query.x, left[m][1] = query.y, left[m][2] = query.z, left[m][3] = query.w;
            }
#pragma unroll
            for (int n = 0; n < kKeys / 8; n += 2) {
                uint32_t right[2][2];
                Operand::load_keys(right, keys(), 8 * n, unit, of_lane);
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
                    for (int i = 0; i < 2; ++i) multiply<Factor>(scores[m][n + i], left[m], right[i]);
            }
        }
    }

    __device__ __forceinline__ void add_values(const uint32_t (&weights)[kRowTiles][kKeys / 16][4]) {
        const auto of_lane = Operand::template lane_of_values<kRowBytes>(lane);
#pragma unroll
        for (int step = 0; step < kKeys / 16; ++step)
#pragma unroll
            for (int unit = 0; unit < kUnits; ++unit) {
                uint32_t right[2][2];
                Operand::load_values(right, values(), 16 * step, unit, of_lane);
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
                    for (int i = 0; i < 2; ++i) multiply<Factor>(sums[m][unit][i], weights[m][step], right[i]);
            }
    }

    __device__ __forceinline__ void attend() {
        const int last_step = (block.end + kKeys - 1) / kKeys;
        int step = block.first_visible / kKeys;
        uint32_t slots[2];
        locate_keys(slots, step * kKeys);
        copy(keys(), p.keys, slots);
        load_queries();
        __syncwarp();  // a warp reads its own queries only
        const float factor = score_factor(p);
        for (; step < last_step; ++step) {
            const int key = step * kKeys;
            ptx::wait_group<0>();
            __syncthreads();  // the keys are there for all warps, and nobody reads the values before them any more
            copy(values(), p.values, slots);
            float scores[kRowTiles][kKeys / 8][4] = {};
            multiply_keys(scores);
            locate_keys(slots, key + kKeys);
            const bool masked = block.is_masked(key, kKeys);
            bool same = true;
            float keep[kRowTiles][2];
            uint32_t weights[kRowTiles][kKeys / 16][4];
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
                apply_rules(scores[m], p, block, row(m), key, part);
                if (masked) mask(scores[m], p, block, row(m), key, part);
                softmax[m].add(scores[m], factor, keep[m]);
                same = same && keep[m][0] == 1.0f && keep[m][1] == 1.0f;
#pragma unroll
                for (int n = 0; n < kKeys / 16; ++n)
                    weights_of<Factor>(weights[m][n], scores[m][2 * n], scores[m][2 * n + 1]);
            }
            // The largest scores seldom change.
            if (!__all_sync(kAllLanes, same)) {
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
                    for (int i = 0; i < kUnits * 8; ++i) sums[m][i / 8][i / 4 % 2][i % 4] *= keep[m][i / 2 % 2];
            }
            ptx::wait_group<0>();
            __syncthreads();  // the values are there for all warps, and nobody reads the keys any more
            if (step + 1 < last_step) copy(keys(), p.keys, slots);
            add_values(weights);
        }
    }

    __device__ __forceinline__ void write() {
        const float factor = score_factor(p);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
            softmax[m].finish(factor);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int of = row(m) + 8 * half;
                if (of >= block.rows) continue;
                T* to = static_cast<T*>(p.out) + block.at(p, of) * head_dim;
                const float last = final_factor(p, block.head(of), softmax[m].highest[half], softmax[m].total[half]);
#pragma unroll
                for (int unit = 0; unit < kUnits; ++unit) {
                    float columns[2][2];
#pragma unroll
                    for (int i = 0; i < 4; ++i) columns[i / 2][i % 2] = sums[m][unit][i / 2][2 * half + i % 2] * last;
                    Operand::store_columns(to + 16 * unit, columns[0], columns[1], part);
                }
            }
        }
    }
};

template <class T, class C, int head_dim> __device__ __forceinline__ void attention_prefill(const AttentionParams& p) {
    using Kernel = Prefill<T, C, head_dim>;
    __shared__ Block shared;
    {
        Block block{};
        block.template init_tile<Kernel::kBlockRows>(p);
        if (threadIdx.x == 0) shared = block;
    }
    __syncthreads();
    Kernel kernel(p, shared);
    kernel.attend();
    kernel.write();
}

#define ATTENTION_PREFILL_OF(head_dim, suffix, T, C)                                                                \
    extern "C" __global__ void __launch_bounds__(128, 2)                                                            \
        attention_prefill_##head_dim##_##suffix(const __grid_constant__ AttentionParams params) {                   \
        attention_prefill<T, C, head_dim>(params);                                                                  \
    }                                                                                                               \
    EXPORT_KERNEL(attention_prefill_##head_dim##_##suffix)
#define ATTENTION_PREFILL(head_dim)                                            \
    ATTENTION_PREFILL_OF(head_dim, f16, __half, __half)                        \
    ATTENTION_PREFILL_OF(head_dim, f16_e4m3, __half, __nv_fp8_e4m3)            \
    ATTENTION_PREFILL_OF(head_dim, f16_e5m2, __half, __nv_fp8_e5m2)            \
    ATTENTION_PREFILL_OF(head_dim, bf16, __nv_bfloat16, __nv_bfloat16)         \
    ATTENTION_PREFILL_OF(head_dim, bf16_e4m3, __nv_bfloat16, __nv_fp8_e4m3)    \
    ATTENTION_PREFILL_OF(head_dim, bf16_e5m2, __nv_bfloat16, __nv_fp8_e5m2)
ATTENTION_PREFILL(64)
ATTENTION_PREFILL(80)
ATTENTION_PREFILL(96)
ATTENTION_PREFILL(112)
ATTENTION_PREFILL(128)
ATTENTION_PREFILL(192)
ATTENTION_PREFILL(256)
