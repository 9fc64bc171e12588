// Compares the emulation's number types with the toolkit's headers, bit for bit (tests/cuda/conformity.rs). Needs the
// toolkit's include folder, but neither nvcc nor a GPU. Both sides define the same names, so the emulation's live in a
// namespace here: without it the linker would merge the inline functions of both sides, and the comparison would prove
// nothing.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
namespace ours {
#include "emulation_types.hpp"
}
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

static unsigned emu_encode(int format, unsigned float_bits) {  // 0 bf16, 1 half, 2 e4m3, 3 e5m2
    const float f = ours::emu::bit_cast<float>(float_bits);
    switch (format) {
        case 0: return ours::__nv_bfloat16(f).bits;
        case 1: return ours::__half(f).bits;
        case 2: return ours::__nv_fp8_e4m3(f).__x;
        default: return ours::__nv_fp8_e5m2(f).__x;
    }
}
static unsigned emu_decode(int format, unsigned bits) {
    using namespace ours::emu;
    switch (format) {
        case 0: return bit_cast<uint32_t>(float(bit_cast<ours::__nv_bfloat16>(uint16_t(bits))));
        case 1: return bit_cast<uint32_t>(float(bit_cast<ours::__half>(uint16_t(bits))));
        case 2: return bit_cast<uint32_t>(E4M3Format::decode(bits));
        default: return bit_cast<uint32_t>(E5M2Format::decode(bits));
    }
}

static float as_float(unsigned bits) { float f; memcpy(&f, &bits, 4); return f; }
static unsigned as_bits(float f) { unsigned bits; memcpy(&bits, &f, 4); return bits; }
template <class T> static T from_bits(unsigned bits) { T value; memcpy((void*)&value, &bits, sizeof(T)); return value; }
template <class T> static unsigned to_bits(T value) { unsigned bits = 0; memcpy(&bits, (void*)&value, sizeof(T)); return bits; }

static unsigned toolkit_encode(int format, unsigned bits) {
    const float f = as_float(bits);
    switch (format) {
        case 0: return to_bits(__float2bfloat16_rn(f));
        case 1: return to_bits(__float2half_rn(f));
        case 2: return to_bits(__nv_fp8_e4m3(f));
        default: return to_bits(__nv_fp8_e5m2(f));
    }
}
static unsigned toolkit_decode(int format, unsigned bits) {
    switch (format) {
        case 0: return as_bits(__bfloat162float(from_bits<__nv_bfloat16>(bits)));
        case 1: return as_bits(__half2float(from_bits<__half>(bits)));
        case 2: return as_bits(float(from_bits<__nv_fp8_e4m3>(bits)));
        default: return as_bits(float(from_bits<__nv_fp8_e5m2>(bits)));
    }
}

int main() {
    const char* names[] = {"bf16", "half", "e4m3", "e5m2"};
    long wrong = 0, checked = 0;
    for (int format = 0; format < 4; ++format) {
        for (unsigned bits = 0; bits < (format < 2 ? 65536u : 256u); ++bits, ++checked) {
            const unsigned want = toolkit_decode(format, bits), got = emu_decode(format, bits);
            const bool both_nan = as_float(want) != as_float(want) && as_float(got) != as_float(got);
            if (want != got && !both_nan && wrong++ < 10)
                printf("%s decode %04x: toolkit %08x, emulation %08x\n", names[format], bits, want, got);
        }
        // Every float whose upper 20 bits differ, with four tails that probe ties and sticky bits.
        for (unsigned high = 0; high < (1u << 20); ++high)
            for (unsigned tail : {0x000u, 0x001u, 0x800u, 0xfffu}) {
                const unsigned bits = high << 12 | tail;
                const unsigned want = toolkit_encode(format, bits), got = emu_encode(format, bits);
                ++checked;
                const bool is_nan = as_float(bits) != as_float(bits);
                if (want != got && !is_nan && wrong++ < 10)
                    printf("%s encode %08x: toolkit %04x, emulation %04x\n", names[format], bits, want, got);
            }
    }
    printf("number types: %ld conversions compared with the toolkit, %ld differ\n", checked, wrong);
    return wrong != 0;
}
