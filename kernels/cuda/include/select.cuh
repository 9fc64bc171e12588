// The best candidates by some order, until they are so many, or so likely, without a sort.
//
// The order of a candidate is a number. A histogram over all candidates shows in which of its buckets the search ends,
// the next one divides that bucket, and so on, until it is a single number. The first histogram is linear in what the
// order means, so that candidates spread over it; the head up to its bucket is copied to shared memory if it fits, and
// the rest is done there. Counts and masses are integers, so nothing depends on which thread comes first.
#pragma once
#include "candidates.cuh"

constexpr int kBucketBits = 11;
constexpr uint32_t kBuckets = 1u << kBucketBits;
constexpr uint32_t kListMax = 2048;
// Buckets per nat of the first histogram: what is further than 16 nats from the best is rarely looked for, and shares the
// last bucket.
constexpr float kBucketsPerNat = 128.0f;

// A bucket where a search goes on, or has ended.
struct Cut {
    uint64_t mass;         // of its candidates, if that is what is looked for
    uint64_t rest;         // how much of its mass or its count is wanted; at least 1
    uint32_t bucket;
    uint32_t count;        // of its candidates
    uint32_t count_above;  // of the better ones
};

// Shared memory of a row. Everything is the same for all threads.
struct Search {
    uint64_t partial[32];
    Candidates candidates;
    Cut cut;
    // Masses are in two halves: there are no additions of 64 bits in shared memory.
    uint32_t count[kBuckets], low[kBuckets], high[kBuckets];
    Candidate list[kListMax];
    uint32_t listed;
};

// What makes a candidate better than another.
struct Order {
    enum Kind { value, distance, id } kind;
    float buckets_per_nat;
    uint32_t among;  // of the kind `id`: only those with this value_order()
};

// How much is looked for.
struct Goal {
    bool by_mass;
    float share;     // of the mass of all
    uint32_t count;
};

constexpr uint64_t kOutside = ~uint64_t(0);

// The order of a candidate. Smaller is better.
__device__ __forceinline__ uint64_t order_of(const Candidates& candidates, Order order, float logit, uint32_t id) {
    if (order.kind == Order::value) return Candidates::value_order(logit);
    if (order.kind == Order::distance) return __double_as_longlong(candidates.distance(logit));
    return Candidates::value_order(logit) == order.among ? id : kOutside;
}
// Its bucket in the first histogram: not a smaller one for a larger order.
__device__ __forceinline__ uint32_t first_bucket(const Candidates& candidates, Order order, float logit) {
    const float nats = order.kind == Order::distance ? float(candidates.distance(logit)) : candidates.below_best(logit);
    return uint32_t(fminf(nats * order.buckets_per_nat, float(kBuckets - 1)));
}

__device__ __forceinline__ void add(Search& search, uint32_t bucket, uint32_t count, uint64_t mass) {
    atomicAdd(&search.count[bucket], count);
    if (mass == 0) return;
    const uint32_t low = uint32_t(mass), before = atomicAdd(&search.low[bucket], low);
    const uint32_t high = uint32_t(mass >> 32) + (before + low < before);
    if (high) atomicAdd(&search.high[bucket], high);
}
__device__ __forceinline__ uint64_t mass_in(const Search& search, uint32_t bucket) {
    return uint64_t(search.high[bucket]) << 32 | search.low[bucket];
}
// Ends with a barrier.
__device__ __forceinline__ void clear(Search& search, bool by_mass) {
    for (uint32_t bucket = threadIdx.x; bucket < kBuckets; bucket += blockDim.x) {
        search.count[bucket] = 0;
        if (by_mass) search.low[bucket] = search.high[bucket] = 0;
    }
    __syncthreads();
}

// The sum over the threads before this one, and over all.
struct Scan {
    uint64_t before, total;
};
__device__ __forceinline__ Scan block_scan(uint64_t value, uint64_t* partial) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t sum = value;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const uint64_t other = __shfl_up_sync(0xffffffffu, sum, distance);
        if (lane >= unsigned(distance)) sum += other;
    }
    __syncthreads();  // whoever still reads the last result
    if (lane == 31) partial[warp] = sum;
    __syncthreads();
    Scan scan{sum - value, 0};
    for (unsigned other = 0; other < blockDim.x / 32; ++other) {
        if (other < warp) scan.before += partial[other];
        scan.total += partial[other];
    }
    return scan;
}

// Writes to `search.cut` the first bucket up to which there is as much as is wanted: `rest` of the mass or the count, or
// `share` of the mass that there is. Begins and ends with a barrier. Every thread looks at its own buckets.
__device__ __forceinline__ void find(Search& search, bool by_mass, uint64_t rest, float share, uint32_t count_above) {
    __syncthreads();
    const uint32_t own = kBuckets / blockDim.x, first = threadIdx.x * own;
    uint64_t count = 0, mass = 0;
    for (uint32_t bucket = first; bucket < first + own; ++bucket) {
        count += search.count[bucket];
        if (by_mass) mass += mass_in(search, bucket);
    }
    const Scan counts = block_scan(count, search.partial);
    const Scan sums = by_mass ? block_scan(mass, search.partial) : counts;
    if (share >= 0.0f) rest = max(uint64_t(1), uint64_t(ceil(double(share) * double(sums.total))));
    rest = min(rest, sums.total);
    if (sums.before < rest && rest <= sums.before + (by_mass ? mass : count)) {
        uint64_t above = sums.before, here = 0;
        uint32_t bucket = first;
        count_above += uint32_t(counts.before);
        for (;; ++bucket) {
            here = by_mass ? mass_in(search, bucket) : search.count[bucket];
            if (rest <= above + here) break;
            above += here;
            count_above += search.count[bucket];
        }
        search.cut = Cut{by_mass ? here : 0, rest - above, bucket, search.count[bucket], count_above};
    }
    __syncthreads();
}

// Divides the numbers from `low` to `high`, which `search.cut` speaks of, until what is wanted of it is clear: all of its
// candidates, or some of those that have the same order. Answers the largest number that is left.
__device__ __forceinline__ uint64_t narrow(Search& search, Order order, bool by_mass, uint64_t low, uint64_t high) {
    while (low < high && (by_mass ? search.cut.count > 1 : search.cut.rest < search.cut.count)) {
        const uint64_t span = high - low;
        const int shift = max(64 - __clzll(span) - kBucketBits, 0);
        clear(search, by_mass);
        each(search.candidates, [&](const Candidates& candidates, float logit, uint32_t id) {
            const uint64_t place = order_of(candidates, order, logit, id) - low;
            if (place <= span) add(search, uint32_t(place >> shift), 1, by_mass ? mass_of(candidates.share(logit)) : 0);
        });
        find(search, by_mass, search.cut.rest, -1.0f, search.cut.count_above);
        low += uint64_t(search.cut.bucket) << shift;
        high = min(high, low + ((uint64_t(1) << shift) - 1));
    }
    return high;
}

// Copies the candidates up to the bucket `search.cut` to the list, if they are in the row and fit. Others are not looked
// for any more. Answers the smallest and the largest order in the bucket.
struct Bounds {
    uint64_t low, high;
};
__device__ __forceinline__ Bounds list_head(Search& search, Order order) {
    const uint32_t bucket = search.cut.bucket, count = search.cut.count_above + search.cut.count;
    const bool lists = search.candidates.listed == kNone && count <= kListMax;
    if (threadIdx.x == 0) search.listed = 0;
    __syncthreads();
    Bounds bounds{kOutside, 0};
    each(search.candidates, [&](const Candidates& candidates, float logit, uint32_t id) {
        const uint32_t own = first_bucket(candidates, order, logit);
        if (own == bucket) {
            const uint64_t number = order_of(candidates, order, logit, id);
            bounds = Bounds{min(bounds.low, number), max(bounds.high, number)};
        }
        if (lists && own <= bucket) search.list[atomicAdd(&search.listed, 1u)] = Candidate{logit, id};
    });
    bounds = Bounds{block_min(bounds.low, search.partial), block_max(bounds.high, search.partial)};
    if (lists && threadIdx.x == 0) {
        search.candidates.list = search.list;
        search.candidates.listed = count;
    }
    __syncthreads();
    return bounds;
}

// Finds the head that the goal asks for: answers the order of its last candidates, and leaves in `search.cut` how many of
// them there are, and what of them is wanted.
__device__ __forceinline__ uint64_t select(Search& search, Order order, Goal goal) {
    clear(search, goal.by_mass);
    // The last bucket may be that of nearly all: threads count it for themselves.
    uint32_t last_count = 0;
    uint64_t last_mass = 0;
    each(search.candidates, [&](const Candidates& candidates, float logit, uint32_t) {
        const uint32_t bucket = first_bucket(candidates, order, logit);
        const uint64_t mass = goal.by_mass ? mass_of(candidates.share(logit)) : 0;
        if (bucket < kBuckets - 1) {
            add(search, bucket, 1, mass);
        } else {
            ++last_count;
            last_mass += mass;
        }
    });
    last_count = __reduce_add_sync(0xffffffffu, last_count);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) last_mass += __shfl_xor_sync(0xffffffffu, last_mass, distance);
    if (threadIdx.x % 32 == 0 && last_count) add(search, kBuckets - 1, last_count, last_mass);
    find(search, goal.by_mass, goal.count, goal.by_mass ? goal.share : -1.0f, 0);
    const Bounds bounds = list_head(search, order);
    return narrow(search, order, goal.by_mass, bounds.low, bounds.high);
}

// Of the candidates that `search.cut` speaks of, which all have this value_order(), the first `count`: the last id.
__device__ __forceinline__ uint32_t select_ids(Search& search, uint32_t value_order, uint64_t count) {
    __syncthreads();
    if (threadIdx.x == 0) search.cut.rest = count;
    __syncthreads();
    return uint32_t(narrow(search, Order{Order::id, 0.0f, value_order}, false, 0, search.candidates.vocabulary - 1));
}
