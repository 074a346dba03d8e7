// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/common/isa.h: the emulated extension has a CUDA part alone.
#pragma once

#include <stdexcept>

#define COGVIEW_DECLARE_PER_ISA(...)
#define COGVIEW_DECLARE_PER_ISA_WITH_BF16(...)
#define COGVIEW_PICK_ISA(function) ::cogview::NoCpuPart()
#define COGVIEW_PICK_ISA_WITH_BF16(function) ::cogview::NoCpuPart()

namespace cogview {

// Made from any arguments, braced lists of them included.
struct Anything {
    template <typename... A>
    Anything(A&&...) {}
};

struct NoCpuPart {
    void operator()(const Anything&, const Anything& = {}, const Anything& = {}) const {
        throw std::runtime_error("the emulated extension has no CPU part");
    }
};

inline const char* isa_name() {
    return "none";
}
inline void set_isa(const char*) {}
inline bool is_amd() {
    return false;
}

}  // namespace cogview
