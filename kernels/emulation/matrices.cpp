// Instructions of a whole warp on matrices.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "machine.hpp"

namespace emu {
// Lanes name rows, and other lanes get or give what is in them: an access is that of the lane with the register.
struct MatrixFrame {
    uint32_t* registers;
    char* row;
    int count;
    bool transposed;
    char* halves[4][2];  // where the halves of this lane's registers lie
};
static void count_conflicts(void* const frames[32], int matrix) {
    // Eight rows of 16 bytes are one pass if they fall into different groups of four banks.
    uintptr_t seen[8];
    int used[8] = {}, passes = 0;
    for (int i = 0; i < 8; ++i) {
        seen[i] = reinterpret_cast<uintptr_t>(static_cast<MatrixFrame*>(frames[8 * matrix + i])->row) / 16;
        if (std::find(seen, seen + i, seen[i]) == seen + i) passes = std::max(passes, ++used[seen[i] % 8]);
    }
    machine->conflicts += unsigned(passes - 1);
}
template <bool store> static void move_matrix(void* const frames[32], unsigned) {
    const int count = static_cast<MatrixFrame*>(frames[0])->count;
    for (int matrix = 0; matrix < count; ++matrix) {
        count_conflicts(frames, matrix);
        for (int lane = 0; lane < 32; ++lane) {
            auto* mine = static_cast<MatrixFrame*>(frames[lane]);
            for (int half = 0; half < 2; ++half) {
                int row = lane / 4, column = 2 * (lane % 4) + half;
                if (mine->transposed) std::swap(row, column);
                char* element = static_cast<MatrixFrame*>(frames[8 * matrix + row])->row + 2 * column;
                char* own = reinterpret_cast<char*>(mine->registers + matrix) + 2 * half;
                mine->halves[matrix][half] = element;
                if (store) memcpy(element, own, 2); else memcpy(own, element, 2);
            }
        }
    }
}
static void meet_for_matrices(MatrixFrame& frame, const char* name, Combine combine, Access kind, void* code, Site site) {
    if (int(machine->current->at.lane) < 8 * frame.count) {  // the others' addresses are not used
        const auto row = reinterpret_cast<uintptr_t>(frame.row);
        if (row % 16) fail("%s: row address is not a multiple of 16", name);
        if (!machine->find_cell(row)) fail("%s: row is not in shared memory", name);
    }
    meet(0xffffffffu, name, &frame, combine, site);
    for (int matrix = 0; matrix < frame.count; ++matrix) {
        const auto first = reinterpret_cast<uintptr_t>(frame.halves[matrix][0]);
        const auto second = reinterpret_cast<uintptr_t>(frame.halves[matrix][1]);
        machine->check(first, second == first + 2 ? 4 : 2, kind, code);
        if (second != first + 2) machine->check(second, 2, kind, code);
    }
}
void load_matrix(uint32_t* registers, int count, bool transposed, const void* row, Site site) {
    MatrixFrame frame{registers, static_cast<char*>(const_cast<void*>(row)), count, transposed, {}};
    meet_for_matrices(frame, "ldmatrix", move_matrix<false>, Access::read, __builtin_return_address(0), site);
}
void store_matrix(void* row, const uint32_t* registers, int count, bool transposed, Site site) {
    MatrixFrame frame{const_cast<uint32_t*>(registers), static_cast<char*>(row), count, transposed, {}};
    meet_for_matrices(frame, "stmatrix", move_matrix<true>, Access::write, __builtin_return_address(0), site);
}

// All mma shapes used here are m16n8 with K = 32 bytes of A's row. Lane = 4 * group + part holds, in 32-bit registers:
//   A[half + 2 * chunk]: row group + 8 * half, the elements of word 4 * chunk + part;   B[chunk]: column group, same word
//   C, D: rows group and group + 8, columns 2 * part and 2 * part + 1.
struct MultiplyFrame {
    void* d;
    const uint32_t *a, *b;
    const void* c;
};
static double decode(Element element, uint32_t word, int i) {
    switch (element) {
        case Element::bf16: return bf16_decode(uint16_t(word >> 16 * i));
        case Element::f16: return HalfFormat::decode(uint16_t(word >> 16 * i));
        case Element::tf32: return bit_cast<float>(word & 0xffffe000u);
        case Element::e4m3: return E4M3Format::decode(word >> 8 * i & 255);
        case Element::e5m2: return E5M2Format::decode(word >> 8 * i & 255);
        case Element::s8: return int8_t(word >> 8 * i);
    }
    return 0;
}
template <Element element> static void multiply_all(void* const frames[32], unsigned) {
    constexpr int per_word = element == Element::tf32 ? 1 : element == Element::bf16 || element == Element::f16 ? 2 : 4;
    constexpr int k_size = 8 * per_word;
    double a[16][k_size], b[k_size][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto* frame = static_cast<MultiplyFrame*>(frames[lane]);
        for (int chunk = 0; chunk < 2; ++chunk)
            for (int i = 0; i < per_word; ++i) {
                const int k = (4 * chunk + lane % 4) * per_word + i;
                for (int half = 0; half < 2; ++half) a[lane / 4 + 8 * half][k] = decode(element, frame->a[half + 2 * chunk], i);
                b[k][lane / 4] = decode(element, frame->b[chunk], i);
            }
    }
    double sums[16][8] = {};
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < k_size; ++k)
            for (int column = 0; column < 8; ++column) sums[row][column] += a[row][k] * b[k][column];
    using Accumulator = std::conditional_t<element == Element::s8, int32_t, float>;
    for (int lane = 0; lane < 32; ++lane) {
        const auto* frame = static_cast<MultiplyFrame*>(frames[lane]);
        for (int i = 0; i < 4; ++i) {
            const double sum = sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
            const Accumulator before = static_cast<const Accumulator*>(frame->c)[i];
            // Integers wrap; floats are rounded once, where hardware truncates now and then.
            static_cast<Accumulator*>(frame->d)[i] = std::is_integral_v<Accumulator>
                ? Accumulator(uint32_t(int64_t(sum)) + uint32_t(before)) : Accumulator(sum + before);
        }
    }
}
void multiply(Element element, void* d, const uint32_t* a, const uint32_t* b, const void* c, Site site) {
    static constexpr Combine combines[] = {multiply_all<Element::bf16>, multiply_all<Element::f16>, multiply_all<Element::tf32>,
                                           multiply_all<Element::e4m3>, multiply_all<Element::e5m2>, multiply_all<Element::s8>};
    MultiplyFrame frame{d, a, b, c};
    meet(0xffffffffu, "mma.sync", &frame, combines[int(element)], site);
}
}  // namespace emu
