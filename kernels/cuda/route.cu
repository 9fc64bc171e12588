// The choice of experts: what they are for each token, and their weights. A warp has a token.
#include "element.cuh"
#include "reduce.cuh"

constexpr int kThreadsMax = 128;

enum ScoreKind : uint32_t { kSoftmax, kSigmoid, kSoftmaxOfChosen, kSparseMixer };
enum NormalizeKind : uint32_t { kNoDivisor, kBySum, kByNorm };

struct RouteParams {
    const float* logits;      // [tokens, count]
    const float* correction;  // [count], or null
    uint32_t* experts;        // [tokens, chosen], best first
    float* weights;           // [tokens, chosen]
    uint32_t tokens;
    uint32_t count;  // experts there are
    uint32_t chosen;
    uint32_t score;  // a ScoreKind
    float jitter;    // of a sparse mixer
    uint32_t groups;  // 0 where the choice is not limited to some
    uint32_t groups_chosen;
    uint32_t two_best;  // a group is as good as its two best experts together, not as its best one
    uint32_t normalize;  // a NormalizeKind
    float normalize_by;  // what is added to the sum, or the p of a norm
    float scale;
};
EXPORT_PARAMS(RouteParams, logits, correction, experts, weights, tokens, count, chosen, score, jitter, groups, groups_chosen,
              two_best, normalize, normalize_by, scale)

// Unsigned numbers in the order of the floats, from -NaN to NaN. Zero is none of them: it stands for what cannot be chosen.
__device__ __forceinline__ uint32_t to_key(float value) {
    const uint32_t bits = __float_as_uint(value);
    return max(bits >> 31 ? ~bits : bits | 0x80000000u, 1u);
}
__device__ __forceinline__ float from_key(uint32_t key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// The index of the largest key, the first of equals, for all lanes. The key becomes zero.
__device__ __forceinline__ uint32_t take_best(uint32_t* keys, int count) {
    unsigned long long best = 0;
    for (int i = threadIdx.x % 32; i < count; i += 32)
        best = max(best, static_cast<unsigned long long>(keys[i]) << 32 | uint32_t(~i));
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) best = max(best, __shfl_xor_sync(0xffffffffu, best, distance));
    const uint32_t index = ~uint32_t(best);
    __syncwarp();  // whoever has read the key before
    if (index % 32 == threadIdx.x % 32) keys[index] = 0;
    return index;
}

// In place.
__device__ __forceinline__ void softmax(float* x, int count) {
    const int lane = threadIdx.x % 32;
    float largest = -INFINITY, sum = 0.0f;
    for (int i = lane; i < count; i += 32) largest = fmaxf(largest, x[i]);
    largest = warp_max(largest);
    for (int i = lane; i < count; i += 32) sum += x[i] = expf(x[i] - largest);
    sum = warp_sum(sum);
    for (int i = lane; i < count; i += 32) x[i] /= sum;
}

// Forbids the experts of all groups but the best.
__device__ __forceinline__ void keep_best_groups(const RouteParams& p, uint32_t* keys, uint32_t* groups) {
    const int lane = threadIdx.x % 32, size = p.count / p.groups;
    for (int group = lane; group < int(p.groups); group += 32) {
        uint32_t best = 0, next = 0;
        for (int i = 0; i < size; ++i) {
            const uint32_t key = keys[group * size + i];
            next = max(next, min(best, key));
            best = max(best, key);
        }
        groups[group] = p.two_best ? to_key(from_key(best) + from_key(next)) : best;
    }
    for (uint32_t i = 0; i < p.groups_chosen; ++i) take_best(groups, p.groups);
    __syncwarp();
    for (int i = lane; i < int(p.count); i += 32)
        if (groups[i / size] != 0) keys[i] = 0;
}

// The weight in a softmax over the experts that are as good as this one, but for some noise, and were not chosen before.
__device__ __forceinline__ float mix(const RouteParams& p, const float* logits, const uint32_t* chosen, int place) {
    const float own = logits[chosen[place]];
    float sum = 0.0f;
    for (int i = threadIdx.x % 32; i < int(p.count); i += 32) {
        // Written so that zeros, which cannot be divided, are not far apart.
        bool counts = !((own - logits[i]) / fmaxf(fabsf(logits[i]), own) > 2.0f * p.jitter);
        for (int before = 0; before < place; ++before) counts = counts && int(chosen[before]) != i;
        if (counts) sum += expf(logits[i] - own);
    }
    return 1.0f / warp_sum(sum);
}

__device__ __forceinline__ float divisor(const RouteParams& p, const float* weights) {
    if (p.normalize == kNoDivisor) return 1.0f;
    float sum = 0.0f;
    for (int i = threadIdx.x % 32; i < int(p.chosen); i += 32)
        sum += p.normalize == kBySum ? weights[i] : powf(fabsf(weights[i]), p.normalize_by);
    sum = warp_sum(sum);
    return p.normalize == kBySum ? sum + p.normalize_by : powf(sum, 1.0f / p.normalize_by);
}

extern "C" __global__ void __launch_bounds__(kThreadsMax) route(const __grid_constant__ RouteParams p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = p.count, chosen = p.chosen;
    const uint32_t token = blockIdx.x * (blockDim.x / 32) + warp;
    if (token >= p.tokens) return;
    // What a warp has in shared memory, and nobody else.
    float* scores = reinterpret_cast<float*>(dynamic_shared) + warp * (2 * (count + chosen) + p.groups);
    float* weights = scores + count;
    auto* keys = reinterpret_cast<uint32_t*>(weights + chosen);
    uint32_t *experts = keys + count, *groups = experts + chosen;

    const float* logits = p.logits + size_t(token) * count;
    for (int i = lane; i < count; i += 32) scores[i] = p.score == kSigmoid ? 1.0f / (1.0f + expf(-logits[i])) : logits[i];
    if (p.score == kSoftmax) softmax(scores, count);
    // Scores are in the order of the logits, which are told apart where scores round to the same.
    const bool by_score = p.correction || (p.groups && p.two_best);
    for (int i = lane; i < count; i += 32)
        keys[i] = to_key((by_score ? scores[i] : logits[i]) + (p.correction ? p.correction[i] : 0.0f));
    __syncwarp();
    if (p.groups) keep_best_groups(p, keys, groups);

    for (int place = 0; place < chosen; ++place) {
        const uint32_t expert = take_best(keys, count);
        if (place % 32 == lane) {
            experts[place] = expert;
            weights[place] = scores[expert];
        }
    }
    __syncwarp();
    if (p.score == kSoftmaxOfChosen) softmax(weights, chosen);
    if (p.score == kSparseMixer) {
        for (int place = 0; place < chosen; ++place) {
            const float weight = mix(p, scores, experts, place);
            if (place % 32 == lane) weights[place] = weight;
        }
    }
    const float factor = divisor(p, weights);
    for (int place = lane; place < chosen; place += 32) {
        p.experts[size_t(token) * chosen + place] = experts[place];
        p.weights[size_t(token) * chosen + place] = weights[place] / factor * p.scale;
    }
}
EXPORT_KERNEL(route)
