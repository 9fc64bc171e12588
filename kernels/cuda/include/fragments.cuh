// Tensor cores: rows of keys and values in shared memory, and how a warp reads them as operands of mma.sync m16n8k16.
//
// A lane is `group = lane / 4` and `part = lane % 4`. Of the left operand and of the result it has rows group and group + 8,
// of the right operand column group. A cache of eight-bit floats is copied as it is. A lane then finds four neighbours in
// a register, so the columns that are summed over, and those of a result, are permuted.
#pragma once
#include <type_traits>

#include "element.cuh"

constexpr unsigned kAllLanes = 0xffffffffu;

template <class T> __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::multiply_f16(d, a, b);
}
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::multiply_bf16(d, a, b);
}

// Two numbers of 16 bits in a register.
template <class T> struct Pair;
template <> struct Pair<__half> {
    using Type = __half2;
    static __device__ __forceinline__ Type of(float low, float high) { return __floats2half2_rn(low, high); }
};
template <> struct Pair<__nv_bfloat16> {
    using Type = __nv_bfloat162;
    static __device__ __forceinline__ Type of(float low, float high) { return __floats2bfloat162_rn(low, high); }
};
template <class T> __device__ __forceinline__ uint32_t pack_two(float low, float high) {
    const auto pair = Pair<T>::of(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

// Bytes `first` and `second` of `four`, which are eight-bit floats, as two of type f16.
template <class C, int first, int second> __device__ __forceinline__ uint32_t widen(uint32_t four);
#define WIDEN(first, second)                                                                                    \
    template <> __device__ __forceinline__ uint32_t widen<__nv_fp8_e4m3, first, second>(uint32_t four) {        \
        return ptx::widen_e4m3(first == 0 && second == 1 ? four : ptx::prmt(four, 0, first | second << 4));     \
    }                                                                                                           \
    template <> __device__ __forceinline__ uint32_t widen<__nv_fp8_e5m2, first, second>(uint32_t four) {        \
        return ptx::prmt(four, 0, 0x0404 | first << 4 | second << 12);  /* the upper half of an f16 */          \
    }
WIDEN(0, 1)
WIDEN(2, 3)
WIDEN(0, 2)
WIDEN(1, 3)
#undef WIDEN

// Rows of `row_bytes` in shared memory, in chunks of 16 bytes. Chunks are permuted within a row, so that the same chunk
// of eight rows lies in different banks: ldmatrix reads them in one pass.
template <int row_bytes> struct Rows {
    static constexpr int kChunks = row_bytes / 16;
    static constexpr int kPeriod = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;
    static_assert(row_bytes % 16 == 0, "rows are whole chunks");

    unsigned char* base;

    static __device__ __forceinline__ int swizzle(int row) { return row / (8 / kPeriod) & (kPeriod - 1); }
    __device__ __forceinline__ void* chunk(int row, int index) const {
        return base + (row * kChunks + (index ^ swizzle(row))) * 16;
    }
};

// What a lane adds to rows that begin at a multiple of eight, to find its chunk among them: of index `low` or, for some
// `high` that shares no bit with it, of index `low + high`. The terms that are known when this is compiled stay apart from
// those that depend on the lane.
template <int row_bytes> struct LaneChunk {
    int row, index;  // in bytes
    __device__ __forceinline__ LaneChunk(int of_row, int low)
        : row(of_row * row_bytes), index((low ^ Rows<row_bytes>::swizzle(of_row)) * 16) {}
    __device__ __forceinline__ void* of(Rows<row_bytes> rows, int first, int high) const {
        // Where rows have a power of two of bytes, both are one number.
        const int at = (row_bytes & (row_bytes - 1)) == 0 ? (row + index) ^ high * 16 : row + (index ^ high * 16);
        return rows.base + at + first * row_bytes;
    }
};

// How queries of T and a cache of C become operands: C is T, which is multiplied as it is, or an eight-bit float, which is
// multiplied as f16. A unit is 16 columns.
template <class T, class C> struct Operands {
    static constexpr bool kWidened = sizeof(C) == 1;
    using Factor = std::conditional_t<kWidened, __half, T>;

    // Two neighbours in a row.
    static __device__ __forceinline__ uint32_t load_two(const T* from) {
        if constexpr (std::is_same_v<T, Factor>) {
            return *reinterpret_cast<const uint32_t*>(from);
        } else {
            float values[2];
            load(values, from);
            return pack_two<Factor>(values[0], values[1]);
        }
    }

    // Left operand: a unit of two rows of queries, or of none.
    static __device__ __forceinline__ uint4 load_queries(const T* const (&rows)[2], int unit, int part) {
        uint32_t a[2][2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (!rows[half]) continue;
            const T* row = rows[half] + 16 * unit;
            a[half][0] = load_two(row + (kWidened ? 4 : 2) * part);
            a[half][1] = load_two(row + (kWidened ? 4 * part + 2 : 2 * part + 8));
        }
        return make_uint4(a[0][0], a[1][0], a[0][1], a[1][1]);
    }

    // Which chunk of 16 keys, of eight keys, and of 16 values a lane gives to ldmatrix.
    template <int row_bytes> static __device__ __forceinline__ LaneChunk<row_bytes> lane_of_keys(int lane) {
        if constexpr (kWidened) return {lane % 16, 0};
        return {lane / 16 * 8 + lane % 8, lane / 8 % 2};
    }
    template <int row_bytes> static __device__ __forceinline__ LaneChunk<row_bytes> lane_of_eight_keys(int lane) {
        return {lane % 8, kWidened ? lane / 8 % 2 : lane / 8};
    }
    template <int row_bytes> static __device__ __forceinline__ LaneChunk<row_bytes> lane_of_values(int lane) {
        return {lane % 16, kWidened ? 0 : lane / 16};
    }
    static constexpr int kUnitChunks = kWidened ? 1 : 2;

    // Right operands for products with 16 keys: `b[0]` for the first eight.
    template <int row_bytes>
    static __device__ __forceinline__ void load_keys(uint32_t (&b)[2][2], Rows<row_bytes> keys, int first, int unit,
                                                     const LaneChunk<row_bytes>& lane) {
        load_pairs(b, lane.of(keys, first, unit * kUnitChunks));
    }

    // Right operands for products with eight keys: `b[0]` of a unit, `b[1]` of the next; the first is even.
    template <int row_bytes>
    static __device__ __forceinline__ void load_eight_keys(uint32_t (&b)[2][2], Rows<row_bytes> keys, int first,
                                                           int unit, const LaneChunk<row_bytes>& lane) {
        load_pairs(b, lane.of(keys, first, unit * kUnitChunks));
    }

    // Right operands for weighted sums of 16 values. Of the unit's columns, result n has those of column(n, ...).
    template <int row_bytes>
    static __device__ __forceinline__ void load_values(uint32_t (&b)[2][2], Rows<row_bytes> values, int first, int unit,
                                                       const LaneChunk<row_bytes>& lane) {
        const void* row = lane.of(values, first, unit * kUnitChunks);
        if constexpr (kWidened) {
            uint32_t r[2];
            ptx::load_matrix_x2_transposed(r, row);
#pragma unroll
            for (int i = 0; i < 2; ++i) b[0][i] = widen<C, 0, 2>(r[i]), b[1][i] = widen<C, 1, 3>(r[i]);
        } else {
            uint32_t r[4];
            ptx::load_matrix_x4_transposed(r, row);
            b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
        }
    }
    static __device__ __forceinline__ int column(int n, int element, int part) {
        return kWidened ? 4 * part + 2 * element + n : 8 * n + 2 * part + element;
    }
    // A lane's part of a row of results, of the columns of a unit.
    template <class To>
    static __device__ __forceinline__ void store_columns(To* to, const float (&first)[2], const float (&second)[2], int part) {
        if constexpr (kWidened) {
            store(to + 4 * part, {first[0], second[0], first[1], second[1]});
        } else {
            store(to + 2 * part, first);
            store(to + 8 + 2 * part, second);
        }
    }

private:
    static __device__ __forceinline__ void load_pairs(uint32_t (&b)[2][2], const void* row) {
        if constexpr (kWidened) {
            uint32_t r[2];
            ptx::load_matrix_x2(r, row);
#pragma unroll
            for (int n = 0; n < 2; ++n) b[n][0] = widen<C, 0, 1>(r[n]), b[n][1] = widen<C, 2, 3>(r[n]);
        } else {
            uint32_t r[4];
            ptx::load_matrix_x4(r, row);
            b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
        }
    }
};
