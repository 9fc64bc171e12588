// Rotates queries and keys in place, and stores keys and values in the cache.
//
// The blocks (t, ...) do token t; a thread takes 16 bytes of a head where the sizes allow that, or else one element.
#include "element.cuh"

constexpr int kThreads = 128;

struct RopeParams {
    void* query;             // [T, heads, head_dim]
    void* key;               // [T, kv_heads, head_dim]
    const void* value;       // [T, value_width], or null
    void* keys;              // [cache_slots, kv_heads, head_dim]
    void* values;            // [cache_slots, value_width], or null
    const float* cos;        // [angles, rotary_dim / 2]
    const float* sin;        // [angles, rotary_dim / 2]
    const uint32_t* angles;  // [T], rows of the table; null where nothing is rotated
    const uint32_t* slots;   // [T]
    uint32_t angle_rows;
    uint32_t cache_slots;
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t head_dim;
    uint32_t value_width;
    uint32_t rotary_dim;     // zero where nothing is rotated
    uint32_t start;
    uint32_t interleaved;    // element 2 j is paired with 2 j + 1; otherwise j with j + rotary_dim / 2
};
EXPORT_PARAMS(RopeParams, query, key, value, keys, values, cos, sin, angles, slots, angle_rows, cache_slots, heads,
              kv_heads, head_dim, value_width, rotary_dim, start, interleaved)

// What a block knows of its token. `keys` and `values` are null where the cache has no such slot.
template <class T, class C> struct Token {
    T* query;
    T* key;
    C* keys;
    const T* value;
    C* values;
    const float* cos;  // null where there is no such angle
    const float* sin;

    __device__ __forceinline__ explicit Token(const RopeParams& p) {
        const size_t t = blockIdx.x;
        const uint32_t slot = p.slots[t], kv_width = p.kv_heads * p.head_dim, half = p.rotary_dim / 2;
        const bool kept = slot < p.cache_slots;
        query = static_cast<T*>(p.query) + t * p.heads * p.head_dim;
        key = static_cast<T*>(p.key) + t * kv_width;
        keys = kept ? static_cast<C*>(p.keys) + size_t(slot) * kv_width : nullptr;
        value = static_cast<const T*>(p.value) + t * p.value_width;
        values = kept ? static_cast<C*>(p.values) + size_t(slot) * p.value_width : nullptr;
        const uint32_t angle = p.rotary_dim ? p.angles[t] : 0;
        const bool turned = p.rotary_dim && angle < p.angle_rows;
        cos = turned ? p.cos + size_t(angle) * half : nullptr;
        sin = turned ? p.sin + size_t(angle) * half : nullptr;
    }
};

// The threads of a token's blocks share `items` among them.
__device__ __forceinline__ uint32_t first_item() { return blockIdx.y * blockDim.x + threadIdx.x; }
__device__ __forceinline__ uint32_t item_step() { return gridDim.y * blockDim.x; }

template <int count>
__device__ __forceinline__ void rotate(float (&a)[count], float (&b)[count], const float* cos, const float* sin) {
    float c[count], s[count];
    load_floats(c, cos);
    load_floats(s, sin);
#pragma unroll
    for (int n = 0; n < count; ++n) {
        const float first = a[n], second = b[n];
        a[n] = first * c[n] - second * s[n];
        b[n] = second * c[n] + first * s[n];
    }
}

// An item is `count` pairs of a head: of queries first, then of keys.
template <int count, class T, class C>
__device__ __forceinline__ void rotate_halves(const RopeParams& p, const Token<T, C>& token) {
    const uint32_t half = p.rotary_dim / 2, per_head = half / count;
    for (uint32_t item = first_item(); item < (p.heads + p.kv_heads) * per_head; item += item_step()) {
        const uint32_t head = item / per_head, pair = item % per_head * count;
        const bool is_key = head >= p.heads;
        const size_t at = size_t(is_key ? head - p.heads : head) * p.head_dim + p.start + pair;
        T* x = (is_key ? token.key : token.query) + at;
        float a[count], b[count];
        load(a, x);
        load(b, x + half);
        if (token.cos) {
            rotate(a, b, token.cos + pair, token.sin + pair);
            store(x, a);
            store(x + half, b);
        }
        if (is_key && token.keys) {
            store(token.keys + at, a);
            store(token.keys + at + half, b);
        }
    }
}

// An item is `count` neighbours of a head, which are half as many pairs; or one pair, element by element.
template <int count, class T, class C>
__device__ __forceinline__ void rotate_neighbours(const RopeParams& p, const Token<T, C>& token) {
    constexpr int pairs = count > 1 ? count / 2 : 1, loads = 2 * pairs / count;
    const uint32_t per_head = p.rotary_dim / (2 * pairs);
    for (uint32_t item = first_item(); item < (p.heads + p.kv_heads) * per_head; item += item_step()) {
        const uint32_t head = item / per_head, pair = item % per_head * pairs;
        const bool is_key = head >= p.heads;
        const size_t at = size_t(is_key ? head - p.heads : head) * p.head_dim + p.start + 2 * pair;
        T* x = (is_key ? token.key : token.query) + at;
        float values[loads][count], a[pairs], b[pairs];
#pragma unroll
        for (int i = 0; i < loads; ++i) load(values[i], x + i);
        auto value = [&values](int n) -> float& { return values[n / count][n % count]; };
        if (token.cos) {
#pragma unroll
            for (int n = 0; n < pairs; ++n) a[n] = value(2 * n), b[n] = value(2 * n + 1);
            rotate(a, b, token.cos + pair, token.sin + pair);
#pragma unroll
            for (int n = 0; n < pairs; ++n) value(2 * n) = a[n], value(2 * n + 1) = b[n];
#pragma unroll
            for (int i = 0; i < loads; ++i) store(x + i, values[i]);
        }
        if (is_key && token.keys) {
#pragma unroll
            for (int i = 0; i < loads; ++i) store(token.keys + at + i, values[i]);
        }
    }
}

// What is not rotated of the keys.
template <int count, class T, class C>
__device__ __forceinline__ void store_rest(const RopeParams& p, const Token<T, C>& token) {
    const uint32_t per_head = (p.head_dim - p.rotary_dim) / count;
    for (uint32_t item = first_item(); item < p.kv_heads * per_head; item += item_step()) {
        const uint32_t head = item / per_head, rest = item % per_head * count;
        const size_t at = size_t(head) * p.head_dim + (rest < p.start ? rest : rest + p.rotary_dim);
        float elements[count];
        load(elements, token.key + at);
        store(token.keys + at, elements);
    }
}

template <int count, class T, class C>
__device__ __forceinline__ void store_values(const RopeParams& p, const Token<T, C>& token) {
    for (uint32_t i = first_item() * count; i < p.value_width; i += item_step() * count) {
        float elements[count];
        load(elements, token.value + i);
        store(token.values + i, elements);
    }
}

template <int count, class T, class C>
__device__ __forceinline__ void rope_heads(const RopeParams& p, const Token<T, C>& token) {
    if (p.interleaved) {
        rotate_neighbours<count>(p, token);
    } else {
        rotate_halves<count>(p, token);
    }
    if (token.keys) store_rest<count>(p, token);
}

template <class T, class C> __device__ __forceinline__ void rope(const RopeParams& p) {
    constexpr int vector = kVector<T>;
    const Token<T, C> token(p);
    auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
    const uint32_t run = p.interleaved ? p.rotary_dim : p.rotary_dim / 2;
    if (run % vector == 0 && p.start % vector == 0 && p.head_dim % vector == 0 && aligned(p.query) && aligned(p.key) &&
        aligned(p.keys) && aligned(p.cos) && aligned(p.sin)) {
        rope_heads<vector>(p, token);
    } else {
        rope_heads<1>(p, token);
    }
    if (!token.values) return;
    if (p.value_width % vector == 0 && aligned(p.value) && aligned(p.values)) {
        store_values<vector>(p, token);
    } else {
        store_values<1>(p, token);
    }
}

#define ROPE(name, T, C)                                                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads) rope_##name(const __grid_constant__ RopeParams params) { \
        rope<T, C>(params);                                                                                      \
    }                                                                                                            \
    EXPORT_KERNEL(rope_##name)
ROPE(f32, float, float)
ROPE(f32_e4m3, float, __nv_fp8_e4m3)
ROPE(f32_e5m2, float, __nv_fp8_e5m2)
ROPE(f16, __half, __half)
ROPE(f16_e4m3, __half, __nv_fp8_e4m3)
ROPE(f16_e5m2, __half, __nv_fp8_e5m2)
ROPE(bf16, __nv_bfloat16, __nv_bfloat16)
ROPE(bf16_e4m3, __nv_bfloat16, __nv_fp8_e4m3)
ROPE(bf16_e5m2, __nv_bfloat16, __nv_fp8_e5m2)
