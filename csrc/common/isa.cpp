// SPDX-License-Identifier: Apache-2.0
#include "common/isa.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace cogview {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

Isa best() {
#if COGVIEW_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return Isa::kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return Isa::kAvx2;
#endif
    return Isa::kPortable;
}

Isa& current() {
    static Isa value = best();
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
    for (int i = 0; i <= static_cast<int>(best()); ++i) {
        if (std::strcmp(name, kNames[i]) == 0) {
            current() = static_cast<Isa>(i);
            return;
        }
    }
    throw std::invalid_argument(std::string("instruction set '") + name +
                                "' is not to be had here; the best is " + kNames[static_cast<int>(best())]);
}

}  // namespace cogview
