// From processed logits to a token: temperature, filters, choice, log-probabilities, alternatives.
//
// One block per row; nothing is sorted and no float is added by two threads, so what comes out depends on the row alone.
#include "select.cuh"

constexpr int kThreadsMax = 512;

struct SampleParams {
    const float* logits;      // [.., vocabulary], processed
    const RowParams* rows;    // [gridDim.x]
    const Chunk* chunks;      // [gridDim.x, chunks]
    uint32_t* histories;      // [slots, vocabulary]
    uint32_t* chosen;         // [gridDim.x]
    uint32_t* results;        // [gridDim.x, 4]: token, log-probability, number of alternatives, 1
    uint32_t* alternatives;   // [.., capacity, 2]: token, log-probability
    uint32_t vocabulary;
    uint32_t chunks_per_row;
    uint32_t capacity;        // of a row of alternatives
};
EXPORT_PARAMS(SampleParams, logits, rows, chunks, histories, chosen, results, alternatives, vocabulary, chunks_per_row,
              capacity)

// Room for the alternatives of a row, and for ties with the last of them.
constexpr uint32_t kCapacityMax = 128;

// The stages that keep a head of the candidates, in their order. Between the last filter and the alternatives is the
// choice.
enum Stage { kTopK, kTopP, kTypicalP, kAlternatives, kStages };

__device__ __forceinline__ bool is_wanted(const RowParams& row, uint32_t vocabulary, int stage) {
    switch (stage) {
        case kTopK: return row.top_k != 0 && row.top_k < vocabulary;
        case kTopP: return row.top_p < 1.0f;
        case kTypicalP: return row.typical_p < 1.0f;
        default: return row.alternatives != 0;
    }
}

// Fewer where a high temperature has drawn the candidates together.
__device__ __forceinline__ float nats_to_buckets(float temperature) {
    const int exponent = min(max(int(__float_as_uint(temperature) >> 23) - 127, 0), 64);
    return kBucketsPerNat * __uint_as_float(uint32_t(exponent + 127) << 23);
}

// Where the entropy is, which is the mean of the information: relative to the best's.
__device__ __forceinline__ void set_center(Search& search) {
    uint64_t mass = 0, sum = 0;
    each(search.candidates, [&](const Candidates& candidates, float logit, uint32_t) {
        const float share = candidates.share(logit);
        mass += mass_of(share);
        if (share > 0.0f) sum += mass_of(__fmul_rn(share, candidates.below_best(logit)));
    });
    mass = block_sum(mass, search.partial);
    sum = block_sum(sum, search.partial);
    if (threadIdx.x == 0) search.candidates.center = double(sum) / double(mass);
    __syncthreads();
}

// How many of the last ones of a head stay, when they are equal and not all of them can.
__device__ __forceinline__ uint64_t count_of_last(const Cut& cut, int stage, uint32_t capacity) {
    if (stage == kAlternatives) return min(cut.count, capacity - cut.count_above);
    if (stage != kTopP || cut.count == 1) return cut.count;
    const uint64_t mass = cut.mass / cut.count;
    return mass == 0 ? cut.count : (cut.rest + mass - 1) / mass;
}

__device__ __forceinline__ void keep_head(Search& search, const RowParams& row, int stage, uint32_t capacity) {
    Goal goal{false, 0.0f, stage == kTopK ? row.top_k : row.alternatives};
    if (stage == kTopP || stage == kTypicalP) goal = Goal{true, stage == kTopP ? row.top_p : row.typical_p, 0};
    if (stage == kTypicalP) set_center(search);
    const Order order{stage == kTypicalP ? Order::distance : Order::value, nats_to_buckets(row.temperature), 0};
    const uint64_t bound = select(search, order, goal);
    uint32_t bound_id = kNone;
    const uint64_t count = count_of_last(search.cut, stage, capacity);
    if (count < search.cut.count) bound_id = select_ids(search, uint32_t(bound), count);
    __syncthreads();
    if (threadIdx.x == 0) {
        Candidates& candidates = search.candidates;
        if (stage == kTypicalP) {
            candidates.reach = __longlong_as_double(bound);
        } else if (uint32_t(bound) < candidates.bound || bound_id < candidates.bound_id) {
            candidates.bound = uint32_t(bound);
            candidates.bound_id = bound_id;
        }
    }
    __syncthreads();
}

// Those that are likely enough, compared with the likeliest that is left.
__device__ __forceinline__ void keep_likely(Search& search, float share_log) {
    float best = search.candidates.best;
    if (search.candidates.is_typical()) {
        uint64_t first = 0;
        each(search.candidates, [&](const Candidates&, float logit, uint32_t id) { first = max(first, leader(logit, id)); });
        best = leader_value(block_max(first, search.partial));
    }
    if (threadIdx.x == 0) search.candidates.least = __fadd_rn(best, share_log);
    __syncthreads();
}

// An exponential race: the candidate with the largest probability over an exponential variate `-ln(u)` of its own wins,
// which it does with exactly its probability.
struct Race {
    double record = 0.0;
    float bar = 0.0f;         // a little less
    uint32_t winner = kNone;
    uint32_t number = kNone;  // of the block of random bits
    uint4 block{};

    __device__ __forceinline__ void enter(const RowParams& row, float share, uint32_t id) {
        if (id / 2 != number) {
            number = id / 2;
            block = draw_block(row.seed, row.index, number);
        }
        const uint64_t bits = draw_bits(block, id);
        // Since -ln(u) >= 1 - u, most need no logarithm to lose: this is at most 1 - u.
        const float least = float(0xffffff - uint32_t(bits >> 40)) * 5.9604644775390625e-8f;
        if (share < bar * least) return;
        const double speed = double(share) / -log(uniform(bits));
        if (speed > record || (speed == record && id < winner)) {
            record = speed;
            winner = id;
            bar = float(speed) * 0.9999997f;
        }
    }
};

// What was chosen.
struct Choice {
    uint32_t id;
    uint64_t mass;  // of all candidates
};

// Plain rows were summed by chunks already.
__device__ __forceinline__ Choice choose_plain(Search& search, const Chunk* chunks, uint32_t count, uint32_t best) {
    uint64_t mass = 0;
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
        const Chunk chunk = chunks[i];
        const double share = exp(double(leader_value(chunk.leader)) - double(search.candidates.best));
        mass += uint64_t(double(chunk.mass) * share);
    }
    return Choice{best, block_sum(mass, search.partial)};
}

__device__ __forceinline__ Choice choose(Search& search, const RowParams& row) {
    uint64_t mass = 0, best = 0;
    Race race;
    each(search.candidates, [&](const Candidates& candidates, float logit, uint32_t id) {
        const float share = candidates.share(logit);
        mass += mass_of(share);
        if (!row.draws) {
            best = max(best, leader(logit, id));
        } else if (share > 0.0f) {
            race.enter(row, share, id);
        }
    });
    mass = block_sum(mass, search.partial);
    if (!row.draws) return Choice{leader_id(block_max(best, search.partial)), mass};
    // Positive numbers are in the order of their bits.
    const uint64_t record = __double_as_longlong(race.record), fastest = block_max(record, search.partial);
    return Choice{uint32_t(block_min(record == fastest ? race.winner : kNone, search.partial)), mass};
}

__device__ __forceinline__ float logprob(const Candidates& candidates, float logit, double log_mass) {
    return fminf(float(double(logit) - double(candidates.best) - log_mass), 0.0f);
}

// Writes what is left, of which there is little by now, best first. Answers how many they are.
__device__ __forceinline__ uint32_t list_alternatives(Search& search, double log_mass, uint32_t* out) {
    __shared__ uint64_t found[kCapacityMax];
    if (threadIdx.x == 0) search.listed = 0;
    __syncthreads();
    each(search.candidates, [&](const Candidates&, float logit, uint32_t id) {
        found[atomicAdd(&search.listed, 1u)] = leader(logit, id);
    });
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < search.listed; i += blockDim.x) {
        const uint64_t own = found[i];
        uint32_t better = 0;
        for (uint32_t other = 0; other < search.listed; ++other) better += found[other] > own;
        out[2 * better] = leader_id(own);
        out[2 * better + 1] = __float_as_uint(logprob(search.candidates, leader_value(own), log_mass));
    }
    return search.listed;
}

__device__ __forceinline__ void begin(Search& search, const SampleParams& p, const RowParams& row, float best) {
    if (threadIdx.x == 0) {
        Candidates candidates{};
        candidates.reach = -1.0;
        candidates.logits = p.logits + size_t(row.logits) * p.vocabulary;
        candidates.vocabulary = p.vocabulary;
        candidates.row_best = best;
        candidates.temperature = row.temperature;
        candidates.best = candidates.tempered(best);
        candidates.bound = candidates.bound_id = candidates.listed = kNone;
        candidates.least = -3.40282346638528859812e+38f;  // what is not possible is no candidate
        search.candidates = candidates;
    }
    __syncthreads();
}

__device__ __forceinline__ void finish(const SampleParams& p, const RowParams& row, uint32_t token, float logprob, uint32_t alternatives, bool is_number) {
    if (threadIdx.x != 0) return;
    p.chosen[blockIdx.x] = token;
    uint32_t* result = p.results + 4 * size_t(blockIdx.x);
    result[0] = token;
    result[1] = __float_as_uint(logprob);
    result[2] = alternatives;
    result[3] = is_number;
    if (is_number && row.history != kNone) {
        uint32_t* seen = p.histories + size_t(row.history) * p.vocabulary + token;
        if (*seen >> 16 != 0xffff) *seen += 1u << 16;
    }
}

extern "C" __global__ void __launch_bounds__(kThreadsMax) sample(const __grid_constant__ SampleParams p) {
    __shared__ Search search;
    const RowParams& row = p.rows[blockIdx.x];
    const Chunk* chunks = p.chunks + size_t(blockIdx.x) * p.chunks_per_row;
    uint64_t best = 0;
    for (uint32_t i = threadIdx.x; i < p.chunks_per_row; i += blockDim.x) best = max(best, chunks[i].leader);
    best = block_max(best, search.partial);
    if (best == kBroken || leader_value(best) == -INFINITY) return finish(p, row, kNone, 0.0f, 0, false);

    begin(search, p, row, leader_value(best));
    Choice choice{};
#pragma unroll 1
    for (int stage = 0; stage < kStages; ++stage) {
        if (stage == kAlternatives) {
            if (row.min_p_log > -INFINITY) keep_likely(search, row.min_p_log);
            choice = is_plain(row) ? choose_plain(search, chunks, p.chunks_per_row, leader_id(best)) : choose(search, row);
        }
        if (is_wanted(row, p.vocabulary, stage)) keep_head(search, row, stage, p.capacity);
    }
    const double log_mass = mass_log(choice.mass);
    uint32_t* out = p.alternatives + size_t(row.alternatives_at) * 2 * p.capacity;
    const uint32_t listed = row.alternatives ? list_alternatives(search, log_mass, out) : 0;
    const float chosen = search.candidates.tempered(search.candidates.logits[choice.id]);
    finish(p, row, choice.id, logprob(search.candidates, chosen, log_mass), listed, true);
}
EXPORT_KERNEL(sample)
