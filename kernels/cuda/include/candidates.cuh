// The tokens of a row that are still possible.
#pragma once
#include "element.cuh"
#include "sampling.cuh"

// A token and its logit after temperature.
struct Candidate {
    float logit;
    uint32_t id;
};

// What is left of a row.
struct Candidates {
    // Those whose information is at most `reach` from the center, both in nats below the best; all if that is negative.
    double center, reach;
    const float* logits;
    // Where all of them are, if they were few enough to be copied there.
    const Candidate* list;
    uint32_t listed;    // or kNone
    uint32_t vocabulary;
    float row_best, temperature;
    float best;         // after temperature
    // The head in value_order(), and of its last ones those up to this id.
    uint32_t bound, bound_id;
    float least;        // those that are at least this large

    __device__ float tempered(float logit) const {
        return temperature == 1.0f ? logit : __fdiv_rn(__fsub_rn(logit, row_best), temperature);
    }
    // A probability, relative to the best's.
    __device__ float share(float logit) const { return exp_negative(__fsub_rn(logit, best)); }
    __device__ float below_best(float logit) const { return __fsub_rn(best, logit); }
    __device__ double distance(float logit) const { return fabs(double(best) - double(logit) - center); }
    __device__ bool is_typical() const { return reach >= 0.0; }
    // Grows from the best to the worst.
    __device__ static uint32_t value_order(float logit) { return ~ascending(logit); }

    __device__ bool has(float logit, uint32_t id) const {
        const uint32_t order = value_order(logit);
        return (order < bound || (order == bound && id <= bound_id)) && logit >= least &&
               (!is_typical() || distance(logit) <= reach);
    }
};

// Loads that are under way while a thread works.
constexpr int kAhead = 4;

template <int count, class Visit> __device__ __forceinline__ void each_of_row(const Candidates& candidates, Visit visit) {
    const uint32_t step = blockDim.x * count, first = threadIdx.x * count, end = candidates.vocabulary;
    // Set, though not looked at: the compiler keeps what is not set in registers from the kernel's beginning on.
    float ahead[kAhead][count] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
        if (first + i * step < end) load(ahead[i], candidates.logits + first + i * step);
#pragma unroll 1
    for (uint32_t at = first; at < end; at += step) {
        float values[count];
#pragma unroll
        for (int n = 0; n < count; ++n) {
            values[n] = ahead[0][n];
#pragma unroll
            for (int i = 1; i < kAhead; ++i) ahead[i - 1][n] = ahead[i][n];
        }
        if (at + kAhead * step < end) load(ahead[kAhead - 1], candidates.logits + at + kAhead * step);
#pragma unroll
        for (int n = 0; n < count; ++n) {
            const float logit = candidates.tempered(values[n]);
            if (candidates.has(logit, at + n)) visit(candidates, logit, at + n);
        }
    }
}

// Calls `visit(candidates, logit, id)` for each candidate, in some thread. No barrier before or behind.
template <class Visit> __device__ __forceinline__ void each(const Candidates& shared, Visit visit) {
    const Candidates candidates = shared;
    if (candidates.listed != kNone) {
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < candidates.listed; i += blockDim.x) {
            const Candidate candidate = candidates.list[i];
            if (candidates.has(candidate.logit, candidate.id)) visit(candidates, candidate.logit, candidate.id);
        }
    } else if (is_vectorized<float>(candidates.logits, candidates.vocabulary)) {
        each_of_row<4>(candidates, visit);
    } else {
        each_of_row<1>(candidates, visit);
    }
}
