// What a block of attention does, and how its keys and values get into shared memory.
#pragma once
#include "attention.cuh"
#include "fragments.cuh"

constexpr uint32_t kNoSplit = 0xffffffffu, kNoSlot = 0xffffffffu;
constexpr int kSplitsMax = 32;

// Keys of a split, as a power of two: see sequences.rs.
__device__ __forceinline__ int split_shift(uint32_t context) {
    return max(8, 32 - __clz(int(context - 1)) - 5);
}

// Some query rows of a sequence, and some of the keys that they see. The query heads that share a key/value head are rows
// as well, next to each other: so keys are read once for all of them.
struct Block {
    SequenceRecord sequence;
    uint32_t index;           // of the sequence
    uint32_t kv_head, group;  // query heads of a key/value head
    int first_row, rows;
    int split, splits_begin, splits_end;  // of those that have keys for some row
    int begin, end;           // keys
    int first_visible, last_visible;  // to any row
    int all_visible, none_beyond;     // from which key on, and up to which, all rows see all keys

    __device__ __forceinline__ uint32_t token(int row) const { return uint32_t(first_row + row) / group; }
    __device__ __forceinline__ uint32_t head(int row) const {
        return kv_head * group + uint32_t(first_row + row) % group;
    }
    __device__ __forceinline__ int position(int row) const { return int(sequence.start + token(row)); }
    // Of queries and results.
    __device__ __forceinline__ size_t at(const AttentionParams& p, int row) const {
        return size_t(sequence.first_row + token(row)) * p.heads + head(row);
    }
    // Of partial results.
    __device__ __forceinline__ size_t partial_at(const AttentionParams& p, int row, int of_split) const {
        return size_t(sequence.partials + uint32_t(of_split) * sequence.rows + token(row)) * p.heads + head(row);
    }
    // Whether some row does not see some of these keys.
    __device__ __forceinline__ bool is_masked(int key, int keys) const {
        return key < all_visible || key + keys > none_beyond;
    }
    __device__ __forceinline__ int splits() const { return splits_end - splits_begin; }

    // A split of a sequence that is decoded, or several in one: 2^joined. False where there is nothing to do.
    template <int block_rows> __device__ __forceinline__ bool init_split(const AttentionParams& p, int joined) {
        const uint32_t work = p.work[blockIdx.x];
        if (work == kNoSplit || work & ((1u << joined) - 1)) return false;
        const uint32_t tiles = gridDim.y / p.kv_heads;
        index = work / kSplitsMax;
        split = work % kSplitsMax >> joined;
        kv_head = blockIdx.y / tiles;
        if (!init_rows(p, blockIdx.y % tiles * block_rows, block_rows)) return false;
        const int shift = split_shift(sequence.start + sequence.rows) + joined;
        splits_begin = first_visible >> shift;
        splits_end = (last_visible >> shift) + 1;
        begin = split << shift;
        end = min(begin + (1 << shift), last_visible + 1);
        return splits_begin <= split && split < splits_end;
    }

    // Rows of a sequence that is not decoded, and all of their keys. Blocks along x are tiles of rows, sequence by sequence;
    // of a sequence, those come first that see most.
    template <int block_rows> __device__ __forceinline__ void init_tile(const AttentionParams& p) {
        const uint32_t lane = threadIdx.x % 32, heads_per = p.heads / p.kv_heads;
        uint32_t left = blockIdx.x, tiles = 0;
        for (uint32_t base = 0;; base += 32) {
            tiles = 0;
            if (base + lane < p.work_count)
                tiles = (p.sequences[p.work[base + lane]].rows * heads_per + block_rows - 1) / block_rows;
            uint32_t up_to = tiles;
#pragma unroll
            for (int distance = 1; distance < 32; distance *= 2) {
                const uint32_t before = __shfl_up_sync(kAllLanes, up_to, distance);
                if (int(lane) >= distance) up_to += before;
            }
            const unsigned behind = __ballot_sync(kAllLanes, left < up_to);
            if (behind) {
                const int owner = __ffs(int(behind)) - 1;
                tiles = __shfl_sync(kAllLanes, tiles, owner);
                left -= __shfl_sync(kAllLanes, up_to, owner) - tiles;
                index = p.work[base + owner];
                break;
            }
            left -= __shfl_sync(kAllLanes, up_to, 31);
        }
        kv_head = blockIdx.y;
        init_rows(p, (tiles - 1 - left) * block_rows, block_rows);
        split = splits_begin = 0;
        splits_end = 1;
        begin = 0;
        end = last_visible + 1;
    }

private:
    __device__ __forceinline__ bool init_rows(const AttentionParams& p, int first, int most) {
        sequence = p.sequences[index];
        group = p.heads / p.kv_heads;
        first_row = first;
        rows = min(int(sequence.rows * group) - first, most);
        if (rows <= 0) return false;
        first_visible = ::first_visible(p, position(0));
        last_visible = position(rows - 1);
        all_visible = ::first_visible(p, last_visible);
        none_beyond = position(0) + 1;
        return true;
    }
};

// Where the key of this lane, of so many from `first` on, is in the cache. Lanes that are more locate the same again.
template <int keys> __device__ __forceinline__ uint32_t locate(const AttentionParams& p, const Block& block, int first) {
    const int position = first + int(threadIdx.x % keys);
    const bool valid = position >= block.first_visible && position < block.end;
    return valid ? slot_of(p, p.tables + block.sequence.table, position) : kNoSlot;
}

// Copies keys, or values, that the lanes of each warp have located, to rows from `first` on, a multiple of eight; `thread`
// of `threads`. What no row sees is zero: it is multiplied with a weight of zero.
template <int keys, int threads, int row_bytes>
__device__ __forceinline__ void copy_rows(const AttentionParams& p, const Block& block, Rows<row_bytes> to, int first,
                                          const void* cache, uint32_t slot, int thread) {
    static_assert(keys <= 32, "a lane locates one key");
    using To = Rows<row_bytes>;
    constexpr int chunks = To::kChunks, rows_at_once = threads / chunks;
    const uint32_t stride = p.kv_heads * row_bytes, offset = block.kv_head * row_bytes;
    auto copy = [&](void* chunk, int row, int index, bool there) {
        const uint32_t of_row = __shfl_sync(kAllLanes, slot, row);
        const bool valid = of_row != kNoSlot;
        const size_t from = size_t(valid ? of_row : 0) * stride + (offset + index * 16);
        if (there) ptx::copy_async<16>(chunk, static_cast<const unsigned char*>(cache) + from, valid);
    };
    if constexpr (rows_at_once * chunks * 8 >= threads * 7) {
        // Few threads are left over when each keeps to one chunk, and most of what it computes is the same each time.
        constexpr bool is_power = (rows_at_once & (rows_at_once - 1)) == 0, all = rows_at_once * chunks == threads;
        const int own = thread / chunks, index = thread % chunks;
        const LaneChunk<row_bytes> lane(own, index);
#pragma unroll
        for (int row = 0; row < keys; row += rows_at_once) {
            void* chunk = is_power ? lane.of({to.base + row * row_bytes}, first, To::swizzle(row))
                                   : to.chunk(first + row + own, index);
            const bool there = (all || own < rows_at_once) && (row + rows_at_once <= keys || row + own < keys);
            copy(chunk, row + own, index, there);
        }
    } else {
#pragma unroll
        for (int i = 0; i < keys * chunks; i += threads) {
            const int row = (i + thread) / chunks, index = (i + thread) % chunks;
            const bool there = keys * chunks % threads == 0 || i + thread < keys * chunks;
            copy(to.chunk(first + row, index), row, index, there);
        }
    }
}
