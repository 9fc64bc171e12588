// Ranks add up their numbers, or put their columns side by side, through memory that all of them can read.
//
// Each rank has shared memory: flags, then two slots. A round: every rank copies its numbers to its own slot, tells the
// others, waits for their word, and reads what it needs from their slots. Blocks of the same index do this together: what
// a block reads was written by the blocks of its index, so no rank waits for more than that.
//
// Why two slots suffice: a rank writes to a slot again two rounds later. Before that it has seen the others' word in the
// round between, which they gave after their kernel of the first round had ended, and with it all their reading.
//
// The number of the round is kept on the device, so that a recorded launch can be replayed. Sums are taken in the order of
// the ranks, in f32, and rounded once: all ranks hold the same bits.
#include "element.cuh"

constexpr int kThreadsMax = 512;
constexpr int kRanksMax = 8;
constexpr int kBlocksMax = 64;
// Flags: of block b, from rank r, at [b][r]. A block's are apart from those of others.
constexpr int kFlagsBytes = kBlocksMax * kRanksMax * 4;

struct GroupParams {
    unsigned char* of[kRanksMax];  // flags and slots of each rank
    uint32_t* round;               // of this rank: how many have ended, and how many blocks have ended this one
    const uint32_t* given_up;      // not 0: nobody will come any more
    uint32_t slot_bytes;           // a multiple of 16
    uint32_t rank;
    uint32_t world;
    uint32_t reserved;
};
EXPORT_PARAMS(GroupParams, of, round, given_up, slot_bytes, rank, world, reserved)

struct AllReduceParams {
    GroupParams group;
    void* data;          // [len], of the same length on all ranks
    uint32_t len;        // at most what a slot holds
    uint32_t two_steps;  // each rank sums a part, and reads the others' sums
};
EXPORT_PARAMS(AllReduceParams, group, data, len, two_steps)

struct AllGatherParams {
    GroupParams group;
    const void* own;  // [rows, columns of this rank], in one run
    void* out;        // [rows, columns of all]
    uint32_t begins[kRanksMax + 1];  // columns before those of a rank
    uint32_t rows;
    uint32_t first;   // elements of every rank's run that were dealt with before
    uint32_t count;   // how many are dealt with now, where there are so many: at most what a slot holds
};
EXPORT_PARAMS(AllGatherParams, group, own, out, begins, rows, first, count)

// Tells the others that this block has come to `step` of its round, and waits until they have. What was written before is
// theirs to read then.
__device__ __forceinline__ void meet(const GroupParams& group, uint32_t step) {
    __syncthreads();
    const uint32_t other = threadIdx.x;
    if (other < group.world && other != group.rank) {
        const uint32_t row = blockIdx.x * kRanksMax;
        ptx::store_release_system(reinterpret_cast<uint32_t*>(group.of[other]) + row + group.rank, step);
        const uint32_t* flag = reinterpret_cast<const uint32_t*>(group.of[group.rank]) + row + other;
        // Steps are compared as on a ring: they start over some day. Others may be one round ahead.
        for (uint32_t looks = 0; int32_t(ptx::load_acquire_system(flag) - step) < 0; ++looks) {
            if (looks % 256 == 255 && ptx::load_acquire_system(group.given_up)) break;
        }
    }
    __syncthreads();
}

// The last block to come here ends the round.
__device__ __forceinline__ void end_round(const GroupParams& group, uint32_t round) {
    if (threadIdx.x != 0) return;
    if (atomicAdd(group.round + 1, 1u) == gridDim.x - 1) {
        group.round[0] = round + 1;
        group.round[1] = 0;
    }
}

__device__ __forceinline__ unsigned char* slot_of(const GroupParams& group, uint32_t rank, uint32_t round) {
    return group.of[rank] + kFlagsBytes + size_t(round & 1) * group.slot_bytes;
}

// A vector of a run of `len` elements at any address. Behind the end it is of zeros.
template <class T> __device__ __forceinline__ Pack<T, kVector<T>> load_vector(const T* run, uint32_t vector, uint32_t len) {
    const uint32_t at = vector * kVector<T>;
    if (at + kVector<T> <= len && reinterpret_cast<uintptr_t>(run) % 16 == 0) {
        return reinterpret_cast<const Pack<T, kVector<T>>*>(run)[vector];
    }
    Pack<T, kVector<T>> pack;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) pack.at[i] = at + i < len ? run[at + i] : from_float<T>(0.0f);
    return pack;
}
template <class T>
__device__ __forceinline__ void store_vector(T* run, uint32_t vector, uint32_t len, const Pack<T, kVector<T>>& pack) {
    const uint32_t at = vector * kVector<T>;
    if (at + kVector<T> <= len && reinterpret_cast<uintptr_t>(run) % 16 == 0) {
        reinterpret_cast<Pack<T, kVector<T>>*>(run)[vector] = pack;
        return;
    }
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
        if (at + i < len) run[at + i] = pack.at[i];
    }
}

// The sum of a vector over all ranks, as they have it in their slots.
template <class T>
__device__ __forceinline__ Pack<T, kVector<T>> sum_vector(const GroupParams& group, uint32_t round, uint32_t vector) {
    using Vector = Pack<T, kVector<T>>;
    Vector packs[kRanksMax];
#pragma unroll
    for (int rank = 0; rank < kRanksMax; ++rank) {
        if (rank < int(group.world)) packs[rank] = reinterpret_cast<const Vector*>(slot_of(group, rank, round))[vector];
    }
    float sums[kVector<T>];
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) sums[i] = to_float(packs[0].at[i]);
#pragma unroll
    for (int rank = 1; rank < kRanksMax; ++rank) {
        if (rank < int(group.world)) {
#pragma unroll
            for (int i = 0; i < kVector<T>; ++i) sums[i] += to_float(packs[rank].at[i]);
        }
    }
    Vector sum;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) sum.at[i] = from_float<T>(sums[i]);
    return sum;
}

template <class T> __device__ __forceinline__ void all_reduce(const AllReduceParams& p) {
    using Vector = Pack<T, kVector<T>>;
    const GroupParams& group = p.group;
    T* data = static_cast<T*>(p.data);
    const uint32_t round = group.round[0], vectors = (p.len + kVector<T> - 1) / kVector<T>;
    const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    Vector* own = reinterpret_cast<Vector*>(slot_of(group, group.rank, round));
    if (!p.two_steps) {
        for (uint32_t i = first; i < vectors; i += step) own[i] = load_vector(data, i, p.len);
        meet(group, 2 * round + 1);
        for (uint32_t i = first; i < vectors; i += step) store_vector(data, i, p.len, sum_vector<T>(group, round, i));
    } else {
        // Rank r sums the vectors from r * part on. Of every part, a block deals with the same.
        const uint32_t part = (vectors + group.world - 1) / group.world;
        for (uint32_t rank = 0; rank < group.world; ++rank) {
            const uint32_t end = min(part, vectors - min(vectors, rank * part));
            for (uint32_t i = first; i < end; i += step) own[rank * part + i] = load_vector(data, rank * part + i, p.len);
        }
        meet(group, 2 * round + 1);
        const uint32_t begin = group.rank * part, end = min(part, vectors - min(vectors, begin));
        // The others do not read this part of this rank's slot before its word.
        for (uint32_t i = first; i < end; i += step) own[begin + i] = sum_vector<T>(group, round, begin + i);
        meet(group, 2 * round + 2);
        for (uint32_t rank = 0; rank < group.world; ++rank) {
            const Vector* sums = reinterpret_cast<const Vector*>(slot_of(group, rank, round));
            const uint32_t end = min(part, vectors - min(vectors, rank * part));
            for (uint32_t i = first; i < end; i += step) store_vector(data, rank * part + i, p.len, sums[rank * part + i]);
        }
    }
    end_round(group, round);
}
KERNELS(all_reduce, kThreadsMax, AllReduceParams)

template <class T> __device__ __forceinline__ void all_gather(const AllGatherParams& p) {
    using Vector = Pack<T, kVector<T>>;
    const GroupParams& group = p.group;
    const uint32_t round = group.round[0];
    const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    // Of a rank's run, elements from p.first on, if it has so many.
    const auto left = [&](uint32_t rank) {
        const uint32_t len = p.rows * (p.begins[rank + 1] - p.begins[rank]);
        return min(p.count, len - min(len, p.first));
    };
    const uint32_t len = left(group.rank), total = p.begins[group.world];
    Vector* slot = reinterpret_cast<Vector*>(slot_of(group, group.rank, round));
    const T* own = static_cast<const T*>(p.own) + p.first;
    for (uint32_t i = first; i * kVector<T> < len; i += step) slot[i] = load_vector(own, i, len);
    meet(group, 2 * round + 1);
    T* out = static_cast<T*>(p.out);
    for (uint32_t rank = 0; rank < group.world; ++rank) {
        const Vector* theirs = reinterpret_cast<const Vector*>(slot_of(group, rank, round));
        const uint32_t begin = p.begins[rank], cols = p.begins[rank + 1] - begin, len = left(rank);
        for (uint32_t i = first; i * kVector<T> < len; i += step) {
            const Vector pack = theirs[i];
            uint32_t row = (p.first + i * kVector<T>) / cols, col = (p.first + i * kVector<T>) % cols;
#pragma unroll
            for (int n = 0; n < kVector<T>; ++n) {
                if (i * kVector<T> + n < len) out[size_t(row) * total + begin + col] = pack.at[n];
                if (++col == cols) ++row, col = 0;
            }
        }
    }
    end_round(group, round);
}
KERNELS(all_gather, kThreadsMax, AllGatherParams)
