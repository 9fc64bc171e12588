// The tokens of a row that are still possible, and a pass over them.
#pragma once
#include "element.cuh"
#include "sampling.cuh"

// A token and its logit after temperature.
struct Candidate {
    float logit;
    uint32_t id;
};

// What filters have left of a row. Everything but the list is the same in all threads, each of which has a copy.
struct Candidates {
    const float* logits;
    uint32_t vocabulary;
    bool vectors;        // the row begins at a multiple of 16 bytes, and its width is one
    float row_best, temperature;
    float best;          // after temperature
    // Best first, those up to this one: see value_order().
    uint32_t bound, bound_id;
    // Those whose information is at most this far from the center, as logits below the best's.
    bool typical;
    double center, reach;
    float least;         // those that are at least this large
    // Where all of them are, if they were few enough to be copied there.
    const Candidate* list;
    uint32_t listed;     // or kNone

    __device__ float tempered(float logit) const {
        return temperature == 1.0f ? logit : __fdiv_rn(__fsub_rn(logit, row_best), temperature);
    }
    // Relative to the best's.
    __device__ float share(float logit) const { return exp_negative(__fsub_rn(logit, best)); }
    __device__ double below_best(float logit) const { return double(best) - double(logit); }
    __device__ double distance(float logit) const { return fabs(below_best(logit) - center); }
    // Grows from the best to the worst.
    __device__ static uint32_t value_order(float logit) { return ~ascending(logit); }

    __device__ bool has(float logit, uint32_t id) const {
        const uint32_t order = value_order(logit);
        return (order < bound || (order == bound && id <= bound_id)) && logit >= least &&
               (!typical || distance(logit) <= reach);
    }

    template <class Visit> __device__ __forceinline__ void each(Visit visit) const;

  private:
    template <int count, class Visit> __device__ __forceinline__ void each_of_row(Visit visit) const;
};

// A few loads are under way while a thread works: one pass takes about as long as the memory.
constexpr int kAhead = 3;

template <int count, class Visit> __device__ __forceinline__ void Candidates::each_of_row(Visit visit) const {
    const uint32_t step = blockDim.x * count, first = threadIdx.x * count;
    float ahead[kAhead][count];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
        if (first + i * step < vocabulary) load(ahead[i], logits + first + i * step);
    for (uint32_t at = first; at < vocabulary; at += step) {
        float values[count];
#pragma unroll
        for (int n = 0; n < count; ++n) values[n] = ahead[0][n];
#pragma unroll
        for (int i = 1; i < kAhead; ++i) {
#pragma unroll
            for (int n = 0; n < count; ++n) ahead[i - 1][n] = ahead[i][n];
        }
        if (at + kAhead * step < vocabulary) load(ahead[kAhead - 1], logits + at + kAhead * step);
#pragma unroll
        for (int n = 0; n < count; ++n) {
            const float logit = tempered(values[n]);
            if (has(logit, at + n)) visit(logit, at + n);
        }
    }
}

// Calls `visit(logit, id)` for each of them, in some thread. No barrier before or behind.
template <class Visit> __device__ __forceinline__ void Candidates::each(Visit visit) const {
    if (listed != kNone) {
        for (uint32_t i = threadIdx.x; i < listed; i += blockDim.x) {
            const Candidate candidate = list[i];
            if (has(candidate.logit, candidate.id)) visit(candidate.logit, candidate.id);
        }
    } else if (vectors) {
        each_of_row<4>(visit);
    } else {
        each_of_row<1>(visit);
    }
}
