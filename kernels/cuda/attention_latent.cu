// Multi-head latent attention, on tensor cores: all query heads share one key of 576 elements, whose first 512 are the value
// (DeepSeek-AI 2024, section 2.1). For generation, where the keys of a sequence are split among blocks, and for prompts.
//
// A block has 16 or 64 rows, which are query heads of one or several tokens, and takes 32 keys in turn. A tile of keys is read
// from the cache once: first as keys, by warps that share out rows and keys; then as values, by warps that have all rows and
// share out columns. Scores are too few to be worth a warp's registers twice, so weights go through shared memory.
#include "merge.cuh"
#include "scores.cuh"

template <class T, class C, int block_rows> struct Latent {
    using Operand = Operands<T, C>;
    using Factor = typename Operand::Factor;
    static constexpr int kKeyDim = 576, kValueDim = 512;
    static constexpr int kKeys = 32;
    static constexpr int kWarps = block_rows == 16 ? 4 : 8, kThreads = 32 * kWarps;
    static constexpr int kRowTiles = block_rows / 16;
    static constexpr int kKeyParts = kWarps / kRowTiles;    // warps that share the keys of some rows
    static constexpr int kPartKeys = kKeys / kKeyParts;     // 8 or 16
    static constexpr int kKeyUnits = kKeyDim / 16, kValueUnits = kValueDim / 16 / kWarps;  // those of a warp
    static constexpr int kRowBytes = kKeyDim * int(sizeof(C));
    using Tile = Rows<kRowBytes>;
    static constexpr int kTileBytes = kKeys * kRowBytes;
    static constexpr int kStages = 4 / int(sizeof(C));
    // Shared memory: the ring of keys, then queries and weights as left operands, a vector per lane.
    static constexpr int kQueryBytes = kRowTiles * kKeyUnits * 512, kWeightBytes = kRowTiles * (kKeys / 16) * 512;
    static constexpr int kSharedBytes = kStages * kTileBytes + kQueryBytes + kWeightBytes;

    struct Shared {
        float highest[kKeyParts][block_rows];  // of the keys of each part, then the sums of their weights
        float keep[block_rows];
        float factors[kWarps][kSplitsMax];
    };

    const AttentionParams& p;
    Shared& shared;
    Block block;
    int warp, lane, part, row_tile, key_part;
    float sums[kRowTiles][kValueUnits][2][4] = {};
    Softmax softmax;  // of the warp's row tile, and its part of the keys

    __device__ __forceinline__ Latent(const AttentionParams& params, Shared& memory)
        : p(params), shared(memory), warp(threadIdx.x / 32), lane(threadIdx.x % 32), part(lane % 4),
          row_tile(warp % kRowTiles), key_part(warp / kRowTiles) {}

    static __device__ __forceinline__ Tile tile(int stage) { return {dynamic_shared + stage * kTileBytes}; }
    static __device__ __forceinline__ uint4* queries(int tile_of_rows) {
        return reinterpret_cast<uint4*>(dynamic_shared + kStages * kTileBytes) + tile_of_rows * kKeyUnits * 32;
    }
    static __device__ __forceinline__ uint4* weights(int tile_of_rows) {
        return reinterpret_cast<uint4*>(dynamic_shared + kStages * kTileBytes + kQueryBytes) +
               tile_of_rows * (kKeys / 16) * 32;
    }

    // Products of the warp's rows with its part of a tile's keys.
    __device__ __forceinline__ void multiply_keys(float (&scores)[kPartKeys / 8][4], const Tile& keys) const {
        constexpr int tiles = kPartKeys / 8;
        float sums_of[2][4] = {};  // of eight keys each, or of every other unit
        const Tile own = {keys.base + key_part * kPartKeys * kRowBytes};
        const auto of_lane = tiles == 2 ? Operand::template lane_of_keys<kRowBytes>(lane)
                                        : Operand::template lane_of_eight_keys<kRowBytes>(lane);
#pragma unroll
        for (int unit = 0; unit < kKeyUnits; unit += 3 - tiles) {
            uint32_t right[2][2];
            if constexpr (tiles == 2) {
                Operand::load_keys(right, own, 0, unit, of_lane);
            } else {
                Operand::load_eight_keys(right, own, 0, unit, of_lane);
            }
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const uint4 query = queries(row_tile)[(unit + (tiles == 2 ? 0 : n)) * 32 + lane];
                const uint32_t left[4] = {query.x, query.y, query.z, query.w};
                multiply<Factor>(sums_of[n], left, right[n]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (tiles == 2) {
                scores[0][i] = sums_of[0][i], scores[1][i] = sums_of[1][i];
            } else {
                scores[0][i] = sums_of[0][i] + sums_of[1][i];
            }
        }
    }

    // The weights of the warp's rows and keys, for all warps. There are barriers within.
    __device__ __forceinline__ void share_weights(float (&scores)[kPartKeys / 8][4], float factor) {
        const int row = row_tile * 16 + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float highest = row_highest(scores, half);
            if (part == 0) shared.highest[key_part][row + 8 * half] = highest;
        }
        __syncthreads();
        float others[2] = {-INFINITY, -INFINITY}, keep[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < kKeyParts; ++i) others[half] = fmaxf(others[half], shared.highest[i][row + 8 * half]);
        softmax.add_below(scores, factor, others, keep);
        if (key_part == 0 && part == 0) shared.keep[row] = keep[0], shared.keep[row + 8] = keep[1];
        uint4* to = weights(row_tile) + key_part * kPartKeys / 16 * 32 + lane;
        if constexpr (kPartKeys == 16) {
            uint32_t a[4];
            weights_of<Factor>(a, scores[0], scores[1]);
            *to = make_uint4(a[0], a[1], a[2], a[3]);
        } else {
            reinterpret_cast<uint2*>(to)[key_part % 2] =
                make_uint2(pack_two<Factor>(scores[0][0], scores[0][1]), pack_two<Factor>(scores[0][2], scores[0][3]));
        }
        __syncthreads();
    }

    // All rows, and the warp's columns.
    __device__ __forceinline__ void add_values(const Tile& values) {
        constexpr int chunks = kValueUnits * Operand::kUnitChunks;
        static_assert(chunks % Tile::kPeriod == 0, "the columns of a warp are permuted among themselves");
        const auto of_lane = Operand::template lane_of_values<kRowBytes>(lane);
        const Tile own = {values.base + warp * chunks * 16};
        float keep[kRowTiles][2];
        bool same = true;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                keep[m][half] = shared.keep[m * 16 + 8 * half + lane / 4];
                same = same && keep[m][half] == 1.0f;
            }
        // The largest scores seldom change.
        if (!__all_sync(kAllLanes, same)) {
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
                for (int i = 0; i < kValueUnits * 8; ++i) sums[m][i / 8][i / 4 % 2][i % 4] *= keep[m][i / 2 % 2];
        }
#pragma unroll
        for (int step = 0; step < kKeys / 16; ++step) {
            uint32_t left[kRowTiles][4];
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
                const uint4 weight = weights(m)[step * 32 + lane];
                left[m][0] = weight.x, left[m][1] = weight.y, left[m][2] = weight.z, left[m][3] = weight.w;
            }
#pragma unroll
            for (int unit = 0; unit < kValueUnits; ++unit) {
                uint32_t right[2][2];
                Operand::load_values(right, own, step * 16, unit, of_lane);
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
                    for (int n = 0; n < 2; ++n) multiply<Factor>(sums[m][unit][n], left[m], right[n]);
            }
        }
    }

    __device__ __forceinline__ void load_queries() const {
        const T* query[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = row_tile * 16 + lane / 4 + 8 * half;
            query[half] = row < block.rows ? static_cast<const T*>(p.query) + block.at(p, row) * kKeyDim : nullptr;
        }
        for (int unit = key_part; unit < kKeyUnits; unit += kKeyParts)
            queries(row_tile)[unit * 32 + lane] = Operand::load_queries(query, unit, part);
    }

    __device__ __forceinline__ void attend() {
        const int first_step = (max(block.begin, block.first_visible) - block.begin) / kKeys;
        const int last_step = (block.end - block.begin + kKeys - 1) / kKeys;
        int issued = first_step;
        uint32_t slot = locate<kKeys>(p, block, block.begin + first_step * kKeys);
        auto issue = [&] {
            if (issued < last_step) {
                copy_rows<kKeys, kThreads>(p, block, tile(issued % kStages), 0, p.keys, slot, threadIdx.x);
                slot = locate<kKeys>(p, block, block.begin + (issued + 1) * kKeys);
            }
            ptx::commit_group();
            ++issued;
        };
#pragma unroll
        for (int i = 0; i < kStages - 1; ++i) issue();
        load_queries();
        const int row = row_tile * 16 + lane / 4;
        const float factor = score_factor(p);
        for (int step = first_step; step < last_step; ++step) {
            ptx::wait_group<kStages - 2>();
            __syncthreads();  // the tile is there for all warps, and nobody reads the one before it any more
            issue();
            const Tile current = tile(step % kStages);
            const int key = block.begin + step * kKeys;
            float scores[kPartKeys / 8][4];
            multiply_keys(scores, current);
            const int own = key + key_part * kPartKeys;
            apply_rules(scores, p, block, row, own, part);
            if (block.is_masked(own, kPartKeys)) mask(scores, p, block, row, own, part);
            share_weights(scores, factor);
            add_values(current);
        }
        softmax.finish(factor);
    }

    __device__ __forceinline__ void write() {
        const bool whole = block.splits() == 1;
        __syncthreads();  // nobody reads what these were before
        const int own = row_tile * 16 + lane / 4;
        if (part == 0) {
            shared.highest[key_part][own] = softmax.total[0], shared.highest[key_part][own + 8] = softmax.total[1];
            if (key_part == 0) shared.keep[own] = softmax.highest[0], shared.keep[own + 8] = softmax.highest[1];
        }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = m * 16 + 8 * half + lane / 4;
                if (row >= block.rows) continue;
                const float highest = shared.keep[row];
                float total = 0.0f;
#pragma unroll
                for (int i = 0; i < kKeyParts; ++i) total += shared.highest[i][row];
                const float factor = whole ? final_factor(p, block.head(row), highest, total) : 1.0f;
                const size_t at = whole ? block.at(p, row) : block.partial_at(p, row, block.split);
                if (!whole && warp == 0 && part == 0) p.states[at] = make_float2(highest, total);
#pragma unroll
                for (int unit = 0; unit < kValueUnits; ++unit) {
                    float columns[2][2];
#pragma unroll
                    for (int i = 0; i < 4; ++i) columns[i / 2][i % 2] = sums[m][unit][i / 2][2 * half + i % 2] * factor;
                    const size_t to = at * kValueDim + 16 * (warp * kValueUnits + unit);
                    if (whole) {
                        Operand::store_columns(static_cast<T*>(p.out) + to, columns[0], columns[1], part);
                    } else {
                        Operand::store_columns(p.partial + to, columns[0], columns[1], part);
                    }
                }
            }
    }
};

// Splits are twice as long as those of other kernels, because their results are so large.
template <class T, class C, int block_rows> __device__ __forceinline__ void attention_latent(const AttentionParams& p) {
    using Kernel = Latent<T, C, block_rows>;
    __shared__ typename Kernel::Shared shared;
    Kernel kernel(p, shared);
    Block& block = kernel.block;
    if (p.work_count) {
        block.template init_tile<block_rows>(p);
    } else if (!block.template init_split<block_rows>(p, 1)) {
        return;
    }
    kernel.attend();
    kernel.write();
    if (block.splits() == 1 || !is_last_split(p, block)) return;
    for (int row = kernel.warp; row < block.rows; row += Kernel::kWarps)
        merge_splits<T, Kernel::kValueDim>(p, block, row, shared.factors[kernel.warp]);
}

#define ATTENTION_LATENT_OF(rows, suffix, T, C)                                                                     \
    extern "C" __global__ void __launch_bounds__(rows == 16 ? 128 : 256, rows == 16 ? 2 : 1)                        \
        attention_latent_##rows##_##suffix(const __grid_constant__ AttentionParams params) {                        \
        attention_latent<T, C, rows>(params);                                                                       \
    }                                                                                                               \
    EXPORT_KERNEL(attention_latent_##rows##_##suffix)
#define ATTENTION_LATENT(rows)                                            \
    ATTENTION_LATENT_OF(rows, f16, __half, __half)                        \
    ATTENTION_LATENT_OF(rows, f16_e4m3, __half, __nv_fp8_e4m3)            \
    ATTENTION_LATENT_OF(rows, f16_e5m2, __half, __nv_fp8_e5m2)            \
    ATTENTION_LATENT_OF(rows, bf16, __nv_bfloat16, __nv_bfloat16)         \
    ATTENTION_LATENT_OF(rows, bf16_e4m3, __nv_bfloat16, __nv_fp8_e4m3)    \
    ATTENTION_LATENT_OF(rows, bf16_e5m2, __nv_bfloat16, __nv_fp8_e5m2)
ATTENTION_LATENT(16)
ATTENTION_LATENT(64)
