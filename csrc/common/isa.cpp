// SPDX-License-Identifier: Apache-2.0
#include "common/isa.h"

#include <cstring>
#include <stdexcept>
#include <string>

#if COGVIEW_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cogview {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};

#if COGVIEW_X86
// The processor multiplies bfloat16 tiles, and Linux lets this process use them (it must be asked).
bool has_amx() {
    unsigned a, b, c, d;
    const unsigned wanted = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & wanted) != wanted) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Isa best() {
#if COGVIEW_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
        return has_amx() ? Isa::kAmx : Isa::kAvx512Bf16;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return Isa::kAvx2;
#endif
    return Isa::kPortable;
}

// What is used unless set_isa() says otherwise. On Intel's processors products of pairs of bfloat16 are
// slower than those of floats: on Sapphire Rapids 105 against 180 GFLOP/s, and attention took 1.4 times as
// long. On AMD's Zen 4 attention is 1.5 to 1.75 times as fast with them.
Isa preferred() {
    const Isa most = best();
#if COGVIEW_X86
    if (most == Isa::kAvx512Bf16 && __builtin_cpu_is("intel")) return Isa::kAvx512;
#endif
    return most;
}

Isa& current() {
    static Isa value = preferred();
    return value;
}

}  // namespace

Isa isa() {
    return current();
}

const char* isa_name() {
    return kNames[static_cast<int>(current())];
}

void set_isa(const char* name) {
    static const Isa most = best();
    for (int i = 0; i <= static_cast<int>(most); ++i) {
        if (std::strcmp(name, kNames[i]) == 0) {
            current() = static_cast<Isa>(i);
            return;
        }
    }
    throw std::invalid_argument(std::string("instruction set '") + name +
                                "' is not to be had here; the best is " + kNames[static_cast<int>(most)]);
}

bool is_amd() {
#if COGVIEW_X86
    static const bool amd = [] {
        __builtin_cpu_init();
        return bool(__builtin_cpu_is("amd"));
    }();
    return amd;
#else
    return false;
#endif
}

}  // namespace cogview
