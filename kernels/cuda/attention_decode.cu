// Attention of sequences with few rows, on tensor cores: for generation, where reading the cache is what takes time.
//
// The query heads of a key/value head, of all rows, are the 16 rows of mma.sync (of several blocks, if they are more). The
// keys of a sequence are split by its length alone, and each split is a block (Dao et al. 2023, Flash-Decoding). Its four
// warps take 16 keys in turn and work on their own: each has a ring of tiles in shared memory, keys and values
// alternating, that cp.async fills. The results of the warps are merged in shared memory; those of splits by the block
// that is the last to be done.
#include "merge.cuh"
#include "scores.cuh"

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = 32 * kDecodeWarps;
constexpr int kWarpKeys = 16;
constexpr int kBlockRows = 16;

template <class T, class C, int head_dim> struct Decode {
    using Operand = Operands<T, C>;
    using Factor = typename Operand::Factor;
    static constexpr int kRowBytes = head_dim * int(sizeof(C));
    using Tile = Rows<kRowBytes>;
    static constexpr int kTileBytes = kWarpKeys * kRowBytes;
    static constexpr int kUnits = head_dim / 16;
    // Enough to keep the memory busy with what two or three blocks have under way.
    static constexpr int kFit = 72 * 1024 / (kDecodeWarps * kTileBytes);
    static constexpr int kStages = kFit > 8 ? 8 : kFit;
    static constexpr int kSumStride = head_dim + 8;  // floats; the eight rows of a store are in different banks
    static constexpr int kRingBytes = kDecodeWarps * kStages * kTileBytes;
    static constexpr int kMergeBytes = kDecodeWarps * kBlockRows * kSumStride * 4;
    static constexpr int kQueryBytes = kUnits * 512;
    static constexpr int kSharedBytes = kRingBytes + kQueryBytes;
    static_assert(kMergeBytes <= kSharedBytes, "the sums of the warps fit where the rings were");

    const AttentionParams& p;
    Block block;
    int warp, lane, part;
    float sums[kUnits][2][4] = {};
    Softmax softmax;

    __device__ __forceinline__ explicit Decode(const AttentionParams& params)
        : p(params), warp(threadIdx.x / 32), lane(threadIdx.x % 32), part(lane % 4) {}

    __device__ __forceinline__ Tile tile(int stage) const {
        return {dynamic_shared + (warp * kStages + stage) * kTileBytes};
    }

    // Of each unit the queries as left operand: a vector per lane. All warps need the same.
    static __device__ __forceinline__ uint4* queries() {
        return reinterpret_cast<uint4*>(dynamic_shared + kRingBytes);
    }
    __device__ __forceinline__ void load_queries() const {
        const T* query[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * half;
            query[half] = row < block.rows ? static_cast<const T*>(p.query) + block.at(p, row) * head_dim : nullptr;
        }
        for (int unit = warp; unit < kUnits; unit += kDecodeWarps)
            queries()[unit * 32 + lane] = Operand::load_queries(query, unit, part);
    }

    __device__ __forceinline__ void multiply_keys(float (&scores)[2][4], const Tile& keys) const {
        const auto of_lane = Operand::template lane_of_keys<kRowBytes>(lane);
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
            const uint4 query = queries()[unit * 32 + lane];
            const uint32_t left[4] = {query.x, query.y, query.z, query.w};
            uint32_t right[2][2];
            Operand::load_keys(right, keys, 0, unit, of_lane);
#pragma unroll
            for (int n = 0; n < 2; ++n) multiply<Factor>(scores[n], left, right[n]);
        }
    }

    __device__ __forceinline__ void add_values(const uint32_t (&weights)[4], const Tile& values) {
        const auto of_lane = Operand::template lane_of_values<kRowBytes>(lane);
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
            uint32_t right[2][2];
            Operand::load_values(right, values, 0, unit, of_lane);
#pragma unroll
            for (int n = 0; n < 2; ++n) multiply<Factor>(sums[unit][n], weights, right[n]);
        }
    }

    __device__ __forceinline__ void attend() {
        constexpr int kBlockKeys = kDecodeWarps * kWarpKeys;
        const int first_step = (max(block.begin, block.first_visible) - block.begin) / kBlockKeys;
        const int last_step = (block.end - block.begin + kBlockKeys - 1) / kBlockKeys;
        const int first = block.begin + kWarpKeys * warp;
        // Twice the step, and one more for its values. What comes next is located before it can be issued.
        int issued = 2 * first_step, stage_in = 0, stage = 0;
        uint32_t slot = locate<kWarpKeys>(p, block, first + first_step * kBlockKeys);
        auto issue = [&] {
            if (issued < 2 * last_step) {
                const void* cache = issued % 2 ? p.values : p.keys;
                copy_rows<kWarpKeys, 32>(p, block, tile(stage_in), 0, cache, slot, lane);
                if (issued % 2) slot = locate<kWarpKeys>(p, block, first + (issued / 2 + 1) * kBlockKeys);
            }
            ptx::commit_group();
            ++issued;
            stage_in = stage_in + 1 == kStages ? 0 : stage_in + 1;
        };
        auto next = [&] {
            ptx::wait_group<kStages - 2>();
            __syncwarp();  // the tile is there for all lanes, and nobody reads the one before it any more
            issue();
            const Tile current = tile(stage);
            stage = stage + 1 == kStages ? 0 : stage + 1;
            return current;
        };
#pragma unroll
        for (int i = 0; i < kStages - 1; ++i) issue();
        load_queries();
        __syncthreads();  // the queries are there for all warps
        const float factor = score_factor(p);
        for (int step = first_step; step < last_step; ++step) {
            const int key = first + step * kBlockKeys;
            float scores[2][4] = {}, keep[2];
            multiply_keys(scores, next());
            apply_rules(scores, p, block, lane / 4, key, part);
            if (block.is_masked(key, kWarpKeys)) mask(scores, p, block, lane / 4, key, part);
            softmax.add(scores, factor, keep);
            // The largest scores seldom change.
            if (!__all_sync(kAllLanes, keep[0] == 1.0f && keep[1] == 1.0f)) {
#pragma unroll
                for (int i = 0; i < kUnits * 8; ++i) sums[i / 8][i / 4 % 2][i % 4] *= keep[i / 2 % 2];
            }
            uint32_t weights[4];
            weights_of<Factor>(weights, scores[0], scores[1]);
            add_values(weights, next());
        }
        softmax.finish(factor);
    }

    // The sums of the warps, where the rings were, and what they are relative to.
    __device__ __forceinline__ void share(float2 (&states)[kDecodeWarps][kBlockRows]) const {
        auto* to = reinterpret_cast<float*>(dynamic_shared) + warp * kBlockRows * kSumStride;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * half;
            if (row >= block.rows) continue;
            if (part == 0) states[warp][row] = make_float2(softmax.highest[half], softmax.total[half]);
#pragma unroll
            for (int unit = 0; unit < kUnits; ++unit)
#pragma unroll
                for (int n = 0; n < 2; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        to[row * kSumStride + 16 * unit + Operand::column(n, i, part)] = sums[unit][n][2 * half + i];
        }
    }
};

template <class T, class C, int head_dim>
__device__ __forceinline__ void attention_decode(const AttentionParams& p) {
    using Kernel = Decode<T, C, head_dim>;
    __shared__ float2 states[kDecodeWarps][kBlockRows];
    __shared__ float factors[kDecodeWarps][kSplitsMax];
    Kernel kernel(p);
    Block& block = kernel.block;
    if (!block.init_split<kBlockRows>(p, 0)) return;
    kernel.attend();
    __syncthreads();  // the rings are free
    kernel.share(states);
    __syncthreads();

    const int splits = block.splits();
    for (int i = threadIdx.x; i < block.rows * head_dim; i += kDecodeThreads) {
        const int row = i / head_dim, column = i % head_dim;
        float highest = -INFINITY, total = 0.0f, sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < kDecodeWarps; ++warp) highest = fmaxf(highest, states[warp][row].x);
#pragma unroll
        for (int warp = 0; warp < kDecodeWarps; ++warp) {
            const auto* from = reinterpret_cast<const float*>(dynamic_shared) + warp * kBlockRows * Kernel::kSumStride;
            const float factor = rescaled(states[warp][row].x, highest);
            total += states[warp][row].y * factor;
            sum += from[row * Kernel::kSumStride + column] * factor;
        }
        if (splits == 1) {
            const float result = sum * final_factor(p, block.head(row), highest, total);
            static_cast<T*>(p.out)[block.at(p, row) * head_dim + column] = from_float<T>(result);
        } else {
            const size_t at = block.partial_at(p, row, block.split);
            p.partial[at * head_dim + column] = sum;
            if (column == 0) p.states[at] = make_float2(highest, total);
        }
    }
    if (splits == 1 || !is_last_split(p, block)) return;
    for (int row = kernel.warp; row < block.rows; row += kDecodeWarps)
        merge_splits<T, head_dim>(p, block, row, factors[kernel.warp]);
}

#define ATTENTION_DECODE_OF(head_dim, suffix, T, C)                                                                  \
    extern "C" __global__ void __launch_bounds__(kDecodeThreads, head_dim > 128 ? 2 : 3)                             \
        attention_decode_##head_dim##_##suffix(const __grid_constant__ AttentionParams params) {                     \
        attention_decode<T, C, head_dim>(params);                                                                    \
    }                                                                                                                \
    EXPORT_KERNEL(attention_decode_##head_dim##_##suffix)
#define ATTENTION_DECODE(head_dim)                                            \
    ATTENTION_DECODE_OF(head_dim, f16, __half, __half)                        \
    ATTENTION_DECODE_OF(head_dim, f16_e4m3, __half, __nv_fp8_e4m3)            \
    ATTENTION_DECODE_OF(head_dim, f16_e5m2, __half, __nv_fp8_e5m2)            \
    ATTENTION_DECODE_OF(head_dim, bf16, __nv_bfloat16, __nv_bfloat16)         \
    ATTENTION_DECODE_OF(head_dim, bf16_e4m3, __nv_bfloat16, __nv_fp8_e4m3)    \
    ATTENTION_DECODE_OF(head_dim, bf16_e5m2, __nv_bfloat16, __nv_fp8_e5m2)
ATTENTION_DECODE(64)
ATTENTION_DECODE(80)
ATTENTION_DECODE(96)
ATTENTION_DECODE(112)
ATTENTION_DECODE(128)
ATTENTION_DECODE(192)
ATTENTION_DECODE(256)
