// The first stages of sampling, in place: watermark, bias, penalties, mask; and the best token of each chunk.
//
// A block per chunk of a row. A thread keeps to its own elements, so nothing but the reductions needs a barrier.
#include "element.cuh"
#include "sampling.cuh"

EXPORT_PARAMS(RowParams, seed, index, green_key, green_bound, logits, history, history_length, penalized, green_delta,
              repetition, frequency, presence, count, bias_at, bias_count, mask_at, temperature, top_k, top_p, typical_p,
              min_p_log, draws, alternatives, alternatives_at)

constexpr int kThreadsMax = 256, kPerThread = int(kChunk) / kThreadsMax;

struct LogitsParams {
    float* logits;              // [.., vocabulary]
    const RowParams* rows;      // [gridDim.y], biases and masks behind them
    const uint32_t* histories;  // [slots, vocabulary]
    Chunk* chunks;              // [gridDim.y, gridDim.x]
    uint32_t vocabulary;
};
EXPORT_PARAMS(LogitsParams, logits, rows, histories, chunks, vocabulary)

// What the model itself ruled out stays ruled out.
__device__ __forceinline__ bool is_possible(float logit) { return logit != -INFINITY; }

// Extreme strengths overflow; the largest numbers that there are keep the distribution defined. NaN stays.
__device__ __forceinline__ float finite(float logit) {
    const float largest = 3.40282346638528859812e+38f;
    return logit > largest ? largest : logit < -largest ? -largest : logit;
}

// `seen` counts a token in the prompt, and 2^16 times among those that were generated.
__device__ __forceinline__ float penalized(float logit, const RowParams& row, uint32_t seen) {
    const float generated = float(seen >> 16);
    if (row.repetition != 1.0f) {
        logit = finite(logit < 0.0f ? __fmul_rn(logit, row.repetition) : __fdiv_rn(logit, row.repetition));
    }
    const float share = __fdiv_rn(float((seen & 0xffff) + (seen >> 16)), row.history_length);
    logit = finite(__fsub_rn(logit, __fmul_rn(row.frequency, share)));
    if (seen >> 16) {
        const float penalty = finite(__fadd_rn(row.presence, finite(__fmul_rn(row.count, generated))));
        logit = finite(__fsub_rn(logit, penalty));
    }
    return logit;
}

// Where a chunk's elements are: 4 neighbours with a thread, then 4 with the next.
__device__ __forceinline__ uint32_t place(int vector) { return (vector * blockDim.x + threadIdx.x) * 4; }
__device__ __forceinline__ bool is_own(uint32_t place) { return place / 4 % blockDim.x == threadIdx.x; }

// `tile` holds the chunk from the token `begin` on, `size` of them.
__device__ __forceinline__ void look_back(float* tile, uint32_t begin, uint32_t size, const LogitsParams& p, const RowParams& row) {
    const auto* words = reinterpret_cast<const uint32_t*>(p.rows);
    if (row.green_bound) {
#pragma unroll 1
        for (int vector = 0; vector < kPerThread / 4; ++vector) {
#pragma unroll 1
            for (uint32_t at = place(vector); at < min(place(vector) + 4, size); ++at) {
                if (keyed_hash(row.green_key, begin + at) < row.green_bound) tile[at] += row.green_delta;
            }
        }
    }
    for (uint32_t i = 0; i < row.bias_count; ++i) {
        const uint32_t at = words[row.bias_at + 2 * i] - begin;
        if (at < size && is_own(at) && is_possible(tile[at])) {
            tile[at] = finite(__fadd_rn(tile[at], __uint_as_float(words[row.bias_at + 2 * i + 1])));
        }
    }
    if (row.penalized) {
        const uint32_t* history = p.histories + size_t(row.history) * p.vocabulary + begin;
#pragma unroll 1
        for (int vector = 0; vector < kPerThread / 4; ++vector) {
#pragma unroll 1
            for (uint32_t at = place(vector); at < min(place(vector) + 4, size); ++at) {
                const uint32_t seen = history[at];
                if (seen && is_possible(tile[at])) tile[at] = penalized(tile[at], row, seen);
            }
        }
    }
}

// Minus infinity where the mask has no bit. What is no number stays, so that it is noticed.
__device__ __forceinline__ void mask(float* tile, uint32_t begin, uint32_t size, const uint32_t* words) {
#pragma unroll 1
    for (int vector = 0; vector < kPerThread / 4; ++vector) {
#pragma unroll 1
        for (uint32_t at = place(vector); at < min(place(vector) + 4, size); ++at) {
            const bool allowed = words[(begin + at) / 32] >> (begin + at) % 32 & 1;
            if (!allowed && tile[at] < INFINITY) tile[at] = -INFINITY;
        }
    }
}

template <bool vectors>
__device__ __forceinline__ void move(float (&values)[4], const float* from, uint32_t place, uint32_t size) {
    if (vectors && place < size) {
        load(values, from + place);
    } else if (!vectors) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (place + i < size) values[i] = from[place + i];
    }
}
template <bool vectors>
__device__ __forceinline__ void move_back(float* to, const float (&values)[4], uint32_t place, uint32_t size) {
    if (vectors && place < size) {
        store(to + place, values);
    } else if (!vectors) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (place + i < size) to[place + i] = values[i];
    }
}

template <bool vectors>
__device__ __forceinline__ void process(const LogitsParams& p, float* tile, uint64_t* partial) {
    const RowParams& row = p.rows[blockIdx.y];
    const uint32_t begin = blockIdx.x * kChunk, size = min(kChunk, p.vocabulary - begin);
    float* logits = p.logits + size_t(row.logits) * p.vocabulary + begin;
    float values[kPerThread / 4][4];
#pragma unroll
    for (int vector = 0; vector < kPerThread / 4; ++vector) {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[vector][i] = -INFINITY;
        move<vectors>(values[vector], logits, place(vector), size);
    }
    if (row.green_bound || row.bias_count || row.penalized || row.mask_at != kNone) {
#pragma unroll
        for (int vector = 0; vector < kPerThread / 4; ++vector) store(tile + place(vector), values[vector]);
        look_back(tile, begin, size, p, row);
        if (row.mask_at != kNone)
            mask(tile, begin, size, reinterpret_cast<const uint32_t*>(p.rows) + row.mask_at);
#pragma unroll
        for (int vector = 0; vector < kPerThread / 4; ++vector) {
            load(values[vector], tile + place(vector));
            move_back<vectors>(logits, values[vector], place(vector), size);
        }
    }
    uint64_t best = 0;
#pragma unroll
    for (int vector = 0; vector < kPerThread / 4; ++vector) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float value = values[vector][i];
            if (place(vector) + i >= size) continue;
            best = value < INFINITY ? max(best, leader(value, begin + place(vector) + i)) : kBroken;
        }
    }
    best = block_max(best, partial);
    uint64_t mass = 0;
    const float of_best = leader_value(best);
    if (is_plain(row) && of_best > -INFINITY) {
#pragma unroll
        for (int vector = 0; vector < kPerThread / 4; ++vector) {
#pragma unroll
            for (int i = 0; i < 4; ++i) mass += mass_of(exp_negative(values[vector][i] - of_best));
        }
        mass = block_sum(mass, partial);
    }
    if (threadIdx.x == 0) p.chunks[size_t(blockIdx.y) * gridDim.x + blockIdx.x] = Chunk{best, mass};
}

extern "C" __global__ void __launch_bounds__(kThreadsMax, 4) process_logits(const __grid_constant__ LogitsParams params) {
    __shared__ __align__(16) float tile[kChunk];
    __shared__ uint64_t partial[32];
    if (is_vectorized<float>(params.logits, params.vocabulary)) {
        process<true>(params, tile, partial);
    } else {
        process<false>(params, tile, partial);
    }
}
EXPORT_KERNEL(process_logits)
