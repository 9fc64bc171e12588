// Attention for all sizes and rules, in f32: one block per row and head, a key per thread, then a few elements of the
// values per thread. Other kernels are faster where they can be used.
#include "attention.cuh"
#include "reduce.cuh"

EXPORT_PARAMS(AttentionParams, query, keys, values, out, slopes, sinks, sequences, tables, work, partial, states,
              counters, sequence_count, work_count, heads, kv_heads, head_dim, value_dim, value_stride, page_shift, window, scale,
              soft_cap)

constexpr int kThreads = 128;

// The sequence of a row, the last that begins at or before it.
__device__ __forceinline__ SequenceRecord sequence_of(const AttentionParams& p, uint32_t row) {
    uint32_t first = 0, behind = p.sequence_count;
    while (first + 1 < behind) {
        const uint32_t middle = (first + behind) / 2;
        if (p.sequences[middle].first_row <= row) {
            first = middle;
        } else {
            behind = middle;
        }
    }
    return p.sequences[first];
}

template <int count, class C> __device__ __forceinline__ float dot(const float* query, const C* key, int width) {
    float sum = 0.0f, elements[count];
#pragma unroll 2
    for (int i = 0; i < width; i += count) {
        load(elements, key + i);
#pragma unroll
        for (int n = 0; n < count; ++n) sum += query[i + n] * elements[n];
    }
    return sum;
}

template <class T, class C> __device__ __forceinline__ void attention_plain(const AttentionParams& p) {
    __shared__ float partial[2][32], weights[kThreads];
    __shared__ uint32_t slots[kThreads];
    const uint32_t row = blockIdx.x, head = blockIdx.y, kv_head = head / (p.heads / p.kv_heads);
    const int head_dim = p.head_dim, value_dim = p.value_dim;
    auto* query = reinterpret_cast<float*>(dynamic_shared);  // [head_dim]
    float* sums = query + head_dim;                          // [value_dim], each thread its own elements
    const size_t at = size_t(row) * p.heads + head;
    const T* from = static_cast<const T*>(p.query) + at * head_dim;
    for (int i = threadIdx.x; i < head_dim; i += kThreads) query[i] = to_float(from[i]);
    for (int i = threadIdx.x; i < value_dim; i += kThreads) sums[i] = 0.0f;
    __syncthreads();

    const SequenceRecord sequence = sequence_of(p, row);
    const uint32_t* table = p.tables + sequence.table;
    const int position = sequence.start + (row - sequence.first_row);
    const float slope = p.slopes ? p.slopes[head] : 0.0f;
    const bool vectors = is_vectorized<C>(p.keys, head_dim);
    // A sink is a score whose value is zero.
    float highest = p.sinks ? p.sinks[head] : -INFINITY, total = p.sinks ? 1.0f : 0.0f;
    for (int base = first_visible(p, position); base <= position; base += kThreads) {
        const int count = min(position + 1 - base, kThreads), mine = threadIdx.x;
        float score = -INFINITY;
        if (mine < count) {
            const uint32_t slot = slot_of(p, table, base + mine);
            slots[mine] = slot;
            const C* key = static_cast<const C*>(p.keys) + (size_t(slot) * p.kv_heads + kv_head) * head_dim;
            score = vectors ? dot<kVector<C>>(query, key, head_dim) : dot<1>(query, key, head_dim);
            score *= p.scale;
            if (p.soft_cap > 0.0f) score = p.soft_cap * tanhf(score / p.soft_cap);
            score += slope * float(base + mine - position);
        }
        const float now = fmaxf(highest, block_max(score, partial[0]));
        const float weight = mine < count ? expf(score - now) : 0.0f, keep = expf(highest - now);
        weights[mine] = weight;
        highest = now;
        total = total * keep + block_sum(weight, partial[1]);
        for (int i = mine; i < value_dim; i += kThreads) {
            float sum = sums[i] * keep;
#pragma unroll 4
            for (int k = 0; k < count; ++k) {
                const size_t value = (size_t(slots[k]) * p.kv_heads + kv_head) * p.value_stride + i;
                sum += weights[k] * to_float(static_cast<const C*>(p.values)[value]);
            }
            sums[i] = sum;
        }
        __syncthreads();  // the next keys overwrite slots, weights and partial sums
    }
    T* to = static_cast<T*>(p.out) + at * value_dim;
    for (int i = threadIdx.x; i < value_dim; i += kThreads) to[i] = from_float<T>(sums[i] / total);
}

#define PLAIN(suffix, T, C)                                                                                          \
    extern "C" __global__ void __launch_bounds__(kThreads, 8)                                                         \
        attention_plain_##suffix(const __grid_constant__ AttentionParams params) {                                   \
        attention_plain<T, C>(params);                                                                               \
    }                                                                                                                \
    EXPORT_KERNEL(attention_plain_##suffix)
#define PLAIN_OF(suffix, T)                 \
    PLAIN(suffix, T, T)                     \
    PLAIN(suffix##_e4m3, T, __nv_fp8_e4m3)  \
    PLAIN(suffix##_e5m2, T, __nv_fp8_e5m2)
PLAIN_OF(f32, float)
PLAIN_OF(f16, __half)
PLAIN_OF(bf16, __nv_bfloat16)
