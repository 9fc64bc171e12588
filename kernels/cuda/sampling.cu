// From processed logits to a token: temperature, filters, choice, log-probabilities, alternatives.
//
// One block per row; nothing is sorted and no float is added by two threads, so what comes out depends on the row alone.
#include "candidates.cuh"

constexpr int kThreadsMax = 1024;

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

struct Shared {
    uint64_t partial[32];
};

// An exponential race: the candidate with the largest probability over an exponential variate `-ln(u)` of its own wins,
// which it does with exactly its probability.
struct Race {
    double record = 0.0;
    float bar = 0.0f;  // a little less
    uint32_t winner = kNone;
    uint32_t number = kNone;  // of the block of random bits
    uint4 block;

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
__device__ __forceinline__ Choice choose_plain(const Candidates& candidates, const Chunk* chunks, uint32_t count,
                                               uint64_t best, uint64_t* partial) {
    uint64_t mass = 0;
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
        const Chunk chunk = chunks[i];
        const double share = exp(double(leader_value(chunk.leader)) - double(candidates.best));
        mass += uint64_t(double(chunk.mass) * share);
    }
    return Choice{leader_id(best), block_sum(mass, partial)};
}

__device__ __forceinline__ Choice choose(const Candidates& candidates, const RowParams& row, uint64_t* partial) {
    uint64_t mass = 0, best = 0;
    Race race;
    candidates.each([&](float logit, uint32_t id) {
        const float share = candidates.share(logit);
        mass += mass_of(share);
        if (!row.draws) {
            best = max(best, leader(logit, id));
        } else if (share > 0.0f) {
            race.enter(row, share, id);
        }
    });
    mass = block_sum(mass, partial);
    if (!row.draws) return Choice{leader_id(block_max(best, partial)), mass};
    // Positive numbers are in the order of their bits.
    const uint64_t record = __double_as_longlong(race.record);
    const uint64_t fastest = block_max(record, partial);
    return Choice{uint32_t(block_min(record == fastest ? race.winner : kNone, partial)), mass};
}

__device__ __forceinline__ float logprob(const Candidates& candidates, float logit, double log_mass) {
    return fminf(float(double(logit) - double(candidates.best) - log_mass), 0.0f);
}

__device__ __forceinline__ void count_in_history(uint32_t* histories, uint32_t vocabulary, uint32_t slot, uint32_t id) {
    uint32_t* seen = histories + size_t(slot) * vocabulary + id;
    if (*seen >> 16 != 0xffff) *seen += 1u << 16;
}

__device__ __forceinline__ void finish(const SampleParams& p, uint32_t token, float logprob, uint32_t alternatives, bool is_number) {
    if (threadIdx.x != 0) return;
    p.chosen[blockIdx.x] = token;
    uint32_t* result = p.results + 4 * blockIdx.x;
    result[0] = token;
    result[1] = __float_as_uint(logprob);
    result[2] = alternatives;
    result[3] = is_number;
}

extern "C" __global__ void __launch_bounds__(kThreadsMax) sample(const __grid_constant__ SampleParams p) {
    __shared__ Shared shared;
    const RowParams& row = p.rows[blockIdx.x];
    const Chunk* chunks = p.chunks + size_t(blockIdx.x) * p.chunks_per_row;
    uint64_t best = 0;
    for (uint32_t i = threadIdx.x; i < p.chunks_per_row; i += blockDim.x) best = max(best, chunks[i].leader);
    best = block_max(best, shared.partial);
    if (best == kBroken || leader_value(best) == -INFINITY) return finish(p, kNone, 0.0f, 0, false);

    const float row_best = leader_value(best);
    Candidates candidates;
    candidates.logits = p.logits + size_t(row.logits) * p.vocabulary;
    candidates.vocabulary = p.vocabulary;
    candidates.vectors = is_vectorized<float>(p.logits, p.vocabulary);
    candidates.row_best = row_best;
    candidates.temperature = row.temperature;
    candidates.best = candidates.tempered(row_best);
    candidates.bound = candidates.bound_id = candidates.listed = kNone;
    candidates.typical = false;
    candidates.center = candidates.reach = 0.0;
    candidates.least = -INFINITY;
    candidates.list = nullptr;
    const Choice choice = is_plain(row) ? choose_plain(candidates, chunks, p.chunks_per_row, best, shared.partial)
                                        : choose(candidates, row, shared.partial);
    const double log_mass = mass_log(choice.mass);
    const float chosen = candidates.tempered(candidates.logits[choice.id]);
    if (threadIdx.x == 0 && row.history != kNone) count_in_history(p.histories, p.vocabulary, row.history, choice.id);
    finish(p, choice.id, logprob(candidates, chosen, log_mass), 0, true);
}
EXPORT_KERNEL(sample)
