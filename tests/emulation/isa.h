// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/common/isa.h: the emulated extension has a CUDA part alone.
#pragma once

#include <stdexcept>

#define COGVIEW_DECLARE_PER_ISA(...)
#define COGVIEW_DECLARE_PER_ISA_WITH_BF16(...)
#define COGVIEW_PICK_ISA(function) ::cogview::NoCpuPart()
#define COGVIEW_PICK_ISA_WITH_BF16(function) ::cogview::NoCpuPart()

namespace cogview {

struct NoCpuPart {
    template <typename... A>
    void operator()(A&&...) const {
        throw std::runtime_error("the emulated extension has no CPU part");
    }
};

inline const char* isa_name() {
    return "none";
}
inline void set_isa(const char*) {}

}  // namespace cogview
