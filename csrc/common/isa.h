// SPDX-License-Identifier: Apache-2.0
// setup.py compiles every *_cpu.cpp once per instruction set, with COGVIEW_ISA set to the name of one of
// the namespaces below. The right one is taken at run time.
#pragma once

// Declares `function` in each namespace: COGVIEW_DECLARE_PER_ISA(void f(int));
#if COGVIEW_X86
#define COGVIEW_DECLARE_PER_ISA(...) \
    namespace portable {             \
    __VA_ARGS__                      \
    }                                \
    namespace avx2 {                 \
    __VA_ARGS__                      \
    }                                \
    namespace avx512 {               \
    __VA_ARGS__                      \
    }
#define COGVIEW_PICK_ISA(function)                                  \
    (::cogview::isa() == ::cogview::Isa::kAvx512 ? avx512::function \
     : ::cogview::isa() == ::cogview::Isa::kAvx2 ? avx2::function   \
                                                 : portable::function)
#else
#define COGVIEW_DECLARE_PER_ISA(...) \
    namespace portable {             \
    __VA_ARGS__                      \
    }
#define COGVIEW_PICK_ISA(function) portable::function
#endif

namespace cogview {

enum class Isa { kPortable, kAvx2, kAvx512 };

// What this processor has, or less where set_isa() asked for less.
Isa isa();
const char* isa_name();
// For tests: "portable", "avx2" or "avx512"; throws std::invalid_argument for one this machine lacks.
void set_isa(const char* name);

}  // namespace cogview
