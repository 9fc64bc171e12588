// What all attention kernels take, and how they find their way through sequences and pages.
#pragma once
#include "element.cuh"

// A sequence of the pass: its rows of the queries, and its page table.
struct alignas(16) SequenceRecord {
    uint32_t first_row;
    uint32_t rows;
    uint32_t start;     // position of the first row
    uint32_t table;     // where the page table begins, in `tables`
    uint32_t partials;  // rows of partial results before its own
    uint32_t unused[3];
};

struct AttentionParams {
    const void* query;    // [T, heads, head_dim]
    const void* keys;     // [slots, kv_heads, head_dim]
    const void* values;   // [slots, kv_heads, value_stride], of which value_dim count
    void* out;            // [T, heads, value_dim]
    const float* slopes;  // [heads], or null
    const float* sinks;   // [heads], or null
    const SequenceRecord* sequences;
    const uint32_t* tables;
    const uint32_t* work;  // what the blocks do, by kernel
    float* partial;        // results of splits, see attention_decode.cu
    float2* states;        // what they are relative to
    uint32_t* counters;    // zero between launches
    uint32_t sequence_count;
    uint32_t work_count;
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t head_dim;
    uint32_t value_dim;
    uint32_t value_stride;
    uint32_t page_shift;
    uint32_t window;       // keys that a row sees, or zero for all
    float scale;
    float soft_cap;        // or zero
};

__device__ __forceinline__ uint32_t slot_of(const AttentionParams& p, const uint32_t* table, uint32_t position) {
    return table[position >> p.page_shift] << p.page_shift | (position & ((1u << p.page_shift) - 1));
}

// The first position that a row at `position` sees.
__device__ __forceinline__ int first_visible(const AttentionParams& p, int position) {
    return p.window ? max(position + 1 - int(p.window), 0) : 0;
}
