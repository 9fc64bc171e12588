// Rows of a table by their numbers: copied as they are, or added.
//
// Block (t, piece) does a piece of row t.
#include "element.cuh"
#include "units.cuh"

constexpr int kThreadsMax = 256;

// All sizes in units.
struct GatherParams {
    const void* table;    // rows of `width`, `stride` apart
    const uint32_t* ids;  // [T], `first` is row 0
    void* out;            // [T, width]
    uint32_t first;
    uint32_t rows;
    uint32_t stride;
    uint32_t width;
};
EXPORT_PARAMS(GatherParams, table, ids, out, first, rows, stride, width)

// Zeros for an id that the table does not have.
template <class Unit> __device__ __forceinline__ void gather_rows(const GatherParams& p) {
    const uint32_t i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= p.width) return;
    const uint32_t row = p.ids[blockIdx.x] - p.first;  // of an id before the first: huge
    Unit unit{};
    if (row < p.rows) unit = static_cast<const Unit*>(p.table)[size_t(row) * p.stride + i];
    static_cast<Unit*>(p.out)[size_t(blockIdx.x) * p.width + i] = unit;
}
UNIT_KERNELS(gather_rows, kThreadsMax, GatherParams)

struct AddEmbeddingParams {
    const void* table;    // rows of `width`, `stride` apart
    const uint32_t* ids;  // [T]
    void* out;            // [T, width]
    uint32_t rows;
    uint32_t stride;
    uint32_t width;
};
EXPORT_PARAMS(AddEmbeddingParams, table, ids, out, rows, stride, width)

template <class T, int count> __device__ __forceinline__ void add_row(const AddEmbeddingParams& p, uint32_t row) {
    const T* from = static_cast<const T*>(p.table) + size_t(row) * p.stride;
    T* to = static_cast<T*>(p.out) + size_t(blockIdx.x) * p.width;
    for (uint32_t i = (blockIdx.y * blockDim.x + threadIdx.x) * count; i < p.width; i += gridDim.y * blockDim.x * count) {
        float values[count], added[count];
        load(values, to + i);
        load(added, from + i);
#pragma unroll
        for (int n = 0; n < count; ++n) values[n] += added[n];
        store(to + i, values);
    }
}

// Nothing is added for an id that the table does not have.
template <class T> __device__ __forceinline__ void add_embedding(const AddEmbeddingParams& p) {
    const uint32_t row = p.ids[blockIdx.x];
    if (row >= p.rows) return;
    if (is_vectorized<T>(p.table, p.stride) && is_vectorized<T>(p.out, p.width)) {
        add_row<T, kVector<T>>(p, row);
    } else {
        add_row<T, 1>(p, row);
    }
}
KERNELS(add_embedding, kThreadsMax, AddEmbeddingParams)
