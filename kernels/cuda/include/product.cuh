// Products of rows of inputs with rows of weights, and the order in which they are summed.
//
// The inputs are cut into slices, and the sums of the slices are added one after the other. Within a slice a sum grows by
// 32 inputs at a time, in two steps of the tensor cores: of each eight that lie together, the first four and the last
// four. All of that follows from the number of inputs alone. So a sum has the same bits in whatever row it is, however
// many rows there are, and whether a warp has one slice (Stream, for few rows) or all of them (tile.cuh, for many).
#pragma once
#include "element.cuh"

constexpr int kSlices = 8;

// Inputs of a slice, a multiple of 64. The last slices may be short or empty.
__host__ __device__ __forceinline__ constexpr int slice_length(int inputs) { return (inputs + 511) / 512 * 64; }

// 16 bytes of a row from element `at` on; zeros from `end` on. With vectors, the row begins at a multiple of 16 bytes, and
// so do `at` and `end`.
template <class T, bool vectors> __device__ __forceinline__ uint4 load_chunk(const T* row, int at, int end) {
    uint4 chunk{0, 0, 0, 0};
    if constexpr (vectors) {
        if (at < end) chunk = *reinterpret_cast<const uint4*>(row + at);
    } else {
        T elements[kVector<T>];
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) elements[i] = at + i < end ? row[at + i] : from_float<T>(0.0f);
        memcpy(&chunk, elements, sizeof(chunk));
    }
    return chunk;
}

template <class T> __device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply<__half>(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::multiply_f16(sums, a, b);
}
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::multiply_bf16(sums, a, b);
}

// Sums of 16 rows with 8 weights over 32 inputs. Lane 4 g + t brings eight inputs from 8 t on of row g (low), of row g + 8
// (high) and of weight g. It gets the sums of row g with the weights 2 t and 2 t + 1, then those of row g + 8.
template <class T> __device__ __forceinline__ void multiply_chunks(float (&sums)[4], uint4 low, uint4 high, uint4 weight) {
    const uint32_t first[4] = {low.x, high.x, low.y, high.y}, first_weight[2] = {weight.x, weight.y};
    multiply<T>(sums, first, first_weight);
    const uint32_t last[4] = {low.z, high.z, low.w, high.w}, last_weight[2] = {weight.z, weight.w};
    multiply<T>(sums, last, last_weight);
}

// The sums of `rows` rows with 8 * `tiles` weights in the registers of a warp. With 16-bit types `rows` is 8 or 16: the
// tensor cores do 16 at once.
template <class T, int rows, int tiles> struct WarpSums {
    static_assert(rows == 8 || rows == 16, "rows of a product on tensor cores");
    const T* inputs[rows / 8];
    float sums[tiles][4] = {};

    template <class Input> __device__ __forceinline__ explicit WarpSums(Input input) {
#pragma unroll
        for (int half = 0; half < rows / 8; ++half) inputs[half] = input(8 * half + threadIdx.x % 32 / 4);
    }

    // wait() is called when the inputs are under way, to get the weights.
    template <bool vectors, class Wait> __device__ __forceinline__ void add(int from, int end, Wait wait) {
        uint4 x[2] = {}, w[tiles];
#pragma unroll
        for (int half = 0; half < rows / 8; ++half) x[half] = load_chunk<T, vectors>(inputs[half], from, end);
        wait(w);
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile) multiply_chunks<T>(sums[tile], x[0], x[1], w[tile]);
    }

    // To [rows, 8 * tiles].
    __device__ __forceinline__ void write(float* to) const {
        const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile)
#pragma unroll
            for (int i = 0; i < rows / 4; ++i)
                to[(group + i / 2 * 8) * 8 * tiles + tile * 8 + pair + i % 2] = sums[tile][i];
    }
};

// Without tensor cores, which would round f32: lane 4 g + t sums every fourth four inputs of weight g, with each row.
template <int rows, int tiles> struct WarpSums<float, rows, tiles> {
    const float* inputs[rows];
    float sums[tiles][rows] = {};

    template <class Input> __device__ __forceinline__ explicit WarpSums(Input input) {
#pragma unroll
        for (int row = 0; row < rows; ++row) inputs[row] = input(row);
    }

    template <bool vectors, class Wait> __device__ __forceinline__ void add(int from, int end, Wait wait) {
        uint4 w[tiles];
        wait(w);
#pragma unroll
        for (int row = 0; row < rows; ++row) {
            const uint4 x = load_chunk<float, vectors>(inputs[row], from, end);
#pragma unroll
            for (int tile = 0; tile < tiles; ++tile) {
                float sum = sums[tile][row];
                sum = fmaf(__uint_as_float(x.x), __uint_as_float(w[tile].x), sum);
                sum = fmaf(__uint_as_float(x.y), __uint_as_float(w[tile].y), sum);
                sum = fmaf(__uint_as_float(x.z), __uint_as_float(w[tile].z), sum);
                sums[tile][row] = fmaf(__uint_as_float(x.w), __uint_as_float(w[tile].w), sum);
            }
        }
    }

    // To [rows, 8 * tiles].
    __device__ __forceinline__ void write(float* to) const {
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile)
#pragma unroll
            for (int row = 0; row < rows; ++row) {
                float sum = sums[tile][row];
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                if (threadIdx.x % 4 == 0) to[row * 8 * tiles + tile * 8 + threadIdx.x % 32 / 4] = sum;
            }
    }
};

// What one warp does to multiply few rows with 8 * `tiles` weights, which it reads once. They come through a ring in shared
// memory, of which each lane has its own part and shares it with nobody, so that many reads are under way.
template <class T, int tiles> struct Stream {
    static constexpr int kStep = 4 * kVector<T>;           // inputs of a step: a lane has a quarter of them
    static constexpr int kAhead = tiles == 1 ? 8 : 4;      // steps that are under way
    static constexpr int kRing = kAhead * tiles * 32;      // chunks of a warp's ring
    const T* weights[tiles];
    uint4* ring;

    // weight(i): where row i begins.
    template <class Weight> __device__ __forceinline__ Stream(uint4* ring_of_warp, Weight weight)
        : ring(ring_of_warp + threadIdx.x % 32) {
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile) weights[tile] = weight(8 * tile + threadIdx.x % 32 / 4);
    }

    __device__ __forceinline__ void load(int step, int from, int end) const {
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile)
            ptx::copy_async<16>(ring + (step % kAhead * tiles + tile) * 32, weights[tile] + from, from < end);
    }

    // Adds the products of inputs [begin, end), which are a slice.
    template <class Sums> __device__ __forceinline__ void add_to(Sums& sums, int begin, int end) const {
        const int steps = max(end - begin + kStep - 1, 0) / kStep, first = begin + threadIdx.x % 4 * kVector<T>;
#pragma unroll
        for (int step = 0; step < kAhead - 1; ++step) {
            if (step < steps) load(step, first + step * kStep, end);
            ptx::commit_group();
        }
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            const int next = step + kAhead - 1;
            if (next < steps) load(next, first + next * kStep, end);
            ptx::commit_group();
            sums.template add<true>(first + step * kStep, end, [&](uint4(&w)[tiles]) {
                ptx::wait_group<kAhead - 1>();
#pragma unroll
                for (int tile = 0; tile < tiles; ++tile) w[tile] = ring[(step % kAhead * tiles + tile) * 32];
            });
        }
    }

    // The same for rows at any address.
    template <class Sums> __device__ __forceinline__ void add_elements_to(Sums& sums, int begin, int end) const {
#pragma unroll 1
        for (int at = begin; at < end; at += kStep) {
            const int from = at + threadIdx.x % 4 * kVector<T>;
            sums.template add<false>(from, end, [&](uint4(&w)[tiles]) {
#pragma unroll
                for (int tile = 0; tile < tiles; ++tile) w[tile] = load_chunk<T, false>(weights[tile], from, end);
            });
        }
    }
};

// The sums of a block whose warps have a slice each, from [warps, count] in shared memory.
__device__ __forceinline__ float sum_slices(const float* partial, int count, int index) {
    float total = 0.0f;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += partial[warp * count + index];
    return total;
}

// Where a sum goes, of a type that is known at run time only.
struct Output {
    void* to;
    bool is_float;  // f32 and not T
    bool add;       // to what is there

    template <class T> __device__ __forceinline__ void write(size_t at, float value) const {
        if (is_float) {
            float* out = static_cast<float*>(to) + at;
            *out = add ? *out + value : value;
        } else {
            T* out = static_cast<T*>(to) + at;
            *out = from_float<T>(add ? to_float(*out) + value : value);
        }
    }
};
