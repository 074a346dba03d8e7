// SPDX-License-Identifier: Apache-2.0
// setup.py compiles every *_cpu.cpp once per instruction set, with COGVIEW_ISA set to the name of one of
// the namespaces below. The right one is taken at run time. Ops with bfloat16 matrix products (setup.py lists
// them) have two more: avx512bf16 (dot products of pairs) and amx (tile products).
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
#define COGVIEW_DECLARE_PER_ISA_WITH_BF16(...) \
    COGVIEW_DECLARE_PER_ISA(__VA_ARGS__)       \
    namespace avx512bf16 {                     \
    __VA_ARGS__                                \
    }                                          \
    namespace amx {                            \
    __VA_ARGS__                                \
    }
#define COGVIEW_PICK_ISA(function)                                  \
    (::cogview::isa() >= ::cogview::Isa::kAvx512 ? avx512::function \
     : ::cogview::isa() == ::cogview::Isa::kAvx2 ? avx2::function   \
                                                 : portable::function)
#define COGVIEW_PICK_ISA_WITH_BF16(function)                                  \
    (::cogview::isa() == ::cogview::Isa::kAmx          ? amx::function        \
     : ::cogview::isa() == ::cogview::Isa::kAvx512Bf16 ? avx512bf16::function \
                                                       : COGVIEW_PICK_ISA(function))
#else
#define COGVIEW_DECLARE_PER_ISA(...) \
    namespace portable {             \
    __VA_ARGS__                      \
    }
#define COGVIEW_DECLARE_PER_ISA_WITH_BF16(...) COGVIEW_DECLARE_PER_ISA(__VA_ARGS__)
#define COGVIEW_PICK_ISA(function) portable::function
#define COGVIEW_PICK_ISA_WITH_BF16(function) portable::function
#endif

namespace cogview {

// Each has what those before it have.
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// What serves this processor best, or what set_isa() asked for.
Isa isa();
const char* isa_name();
// For tests: "portable", "avx2", "avx512", "avx512bf16" or "amx"; throws std::invalid_argument for one this
// machine lacks.
void set_isa(const char* name);

// Whether AMD made this processor: its caches are not Intel's.
bool is_amd();

}  // namespace cogview
