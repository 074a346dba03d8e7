// SPDX-License-Identifier: Apache-2.0
// Floats in a register of the instruction set this file is compiled for, through the vector extension of GCC
// and Clang: one source for AVX-512, AVX2, SSE2 and NEON.
//
// Only *_cpu.cpp files include this. Everything has internal linkage: were an inline function shared, the
// linker would keep one copy, maybe the AVX-512 one, and crash an older processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "common/dtype.h"

#if COGVIEW_X86
#include <immintrin.h>
#endif

namespace cogview {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecU16 __attribute__((vector_size(2 * kLanes)));
typedef uint8_t VecU8 __attribute__((vector_size(kLanes)));

template <int kCount>
struct Floats {
    typedef float type __attribute__((vector_size(4 * kCount)));
};

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kLog2e = 1.4426950408889634;

template <typename To, typename From>
inline To bitcast(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// kLanes numbers as they lie.
template <typename V, typename E>
inline V lane_vector(const E* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

inline VecF broadcast(float x) {
    return x - VecF{};
}

// Makes the compiler forget how x came about: else it would load a vector again for each of its uses, or
// derive addresses from one another where registers for all of them are free.
inline void hide(VecF& x) {
#if COGVIEW_X86
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
}
template <typename T>
inline void hide(const T*& x) {
    asm("" : "+r"(x));
}

// A thread's working floats, cache-line aligned. Not std::vector, whose members could be shared between
// instruction sets as said above.
struct Scratch {
    float* data;
    explicit Scratch(int64_t n) {
        const size_t bytes = (size_t(n > 0 ? n : 1) * sizeof(float) + 63) / 64 * 64;
        data = static_cast<float*>(std::aligned_alloc(64, bytes));
        if (data == nullptr) throw std::bad_alloc();
    }
    ~Scratch() { std::free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

// ---- one element

inline float to_float(float x) {
    return x;
}
inline float to_float(BFloat16 x) {
    return bitcast<float>(uint32_t(x.bits) << 16);
}
inline float to_float(Half x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    // Compilers disagree about a half type, so by its bits.
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return bitcast<float>(sign | 0x7f800000 | rest << 13);
    const float value = rest < 0x400 ? float(rest) * 0x1p-24f : bitcast<float>((rest << 13) + (112u << 23));
    return bitcast<float>(sign | bitcast<uint32_t>(value));
#endif
}

inline void from_float(float x, float* to) {
    *to = x;
}
inline void from_float(float x, BFloat16* to) {
    const uint32_t u = bitcast<uint32_t>(x);
    // Round to nearest even. A NaN must not round up into infinity.
    to->bits = x != x ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void from_float(float x, Half* to) {
#if defined(__F16C__)
    to->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    const uint32_t u = bitcast<uint32_t>(x), rest = u & 0x7fffffff;
    uint32_t half;
    if (rest > 0x7f800000)  // NaN
        half = 0x7e00;
    else if (rest >= 0x47800000)  // 65,536
        half = 0x7c00;
    else if (rest >= 0x38800000)  // 2^-14: rounded to nearest even, up to infinity
        half = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
    else  // adding 1/2 rounds to a multiple of 2^-24
        half = bitcast<uint32_t>(bitcast<float>(rest) + 0.5f) - bitcast<uint32_t>(0.5f);
    to->bits = uint16_t((u >> 16 & 0x8000) | half);
#endif
}

// ---- kLanes elements, unaligned

inline VecF load(const float* p) {
    VecF v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}
inline VecF load(const BFloat16* p) {
    VecU16 h;
    std::memcpy(&h, p, sizeof(h));
#if defined(__AVX512F__)
    // GCC would widen the halves of h apart, and take two more instructions to join them.
    return bitcast<VecF>(bitcast<VecU>(_mm512_cvtepu16_epi32(bitcast<__m256i>(h))) << 16);
#else
    return bitcast<VecF>(__builtin_convertvector(h, VecU) << 16);
#endif
}
inline VecF load(const Half* p) {
#if defined(__AVX512F__)
    return bitcast<VecF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    return bitcast<VecF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    VecF v;
    for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
    return v;
#endif
}

inline void store(float* p, VecF v) {
    std::memcpy(p, &v, sizeof(v));
}
// Two vectors of consecutive elements, those at even places and those at odd ones: bfloat16 are halves of
// words, which a shift and a mask widen, where widening them in their order takes shuffles besides.
struct EvenOdd {
    VecF even, odd;
};
inline EvenOdd load_words(const BFloat16* p) {
    VecU words;
    std::memcpy(&words, p, sizeof(words));
    return {bitcast<VecF>(words << 16), bitcast<VecF>(words & 0xffff0000)};
}

// Bits whose upper halves are v rounded to bfloat16, ties to even. A NaN stays one: it is made quiet and not
// rounded up.
inline VecU round_to_upper_half(VecF v) {
    const VecU u = bitcast<VecU>(v), quiet = u | 0x400000;
#if defined(__AVX512F__)
    const __m512 x = bitcast<__m512>(v);
    const __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
    const __mmask16 odd =
        _mm512_mask_test_epi32_mask(number, bitcast<__m512i>(u), _mm512_set1_epi32(0x10000));
    const __m512i sum = _mm512_mask_add_epi32(bitcast<__m512i>(quiet), number, bitcast<__m512i>(u),
                                              _mm512_set1_epi32(0x7fff));
    return bitcast<VecU>(_mm512_mask_add_epi32(sum, odd, sum, _mm512_set1_epi32(1)));
#else
    return v != v ? quiet : u + 0x7fff + ((u >> 16) & 1);
#endif
}
inline VecU16 upper_halves(VecU u) {
#if defined(__AVX512BW__)
    alignas(32) static const uint16_t halves[16] = {1,  3,  5,  7,  9,  11, 13, 15,
                                                    17, 19, 21, 23, 25, 27, 29, 31};
    const __m256i odd = _mm256_load_si256(reinterpret_cast<const __m256i*>(halves));
    return bitcast<VecU16>(
        _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_castsi256_si512(odd), bitcast<__m512i>(u))));
#elif defined(__AVX2__)
    const __m256i wide = bitcast<__m256i>(u >> 16);
    return bitcast<VecU16>(_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
#else
    return __builtin_convertvector(u >> 16, VecU16);
#endif
}
inline VecU16 to_bfloat16(VecF v) {
    return upper_halves(round_to_upper_half(v));
}
// v rounded to a bfloat16, as a float.
inline VecF round_to_bfloat16(VecF v) {
    return bitcast<VecF>(round_to_upper_half(v) & 0xffff0000);
}
// The same of two vectors, as words.
inline VecU to_words(EvenOdd v) {
    return round_to_upper_half(v.even) >> 16 | (round_to_upper_half(v.odd) & 0xffff0000);
}
inline void store(BFloat16* p, VecF v) {
    const VecU16 h = to_bfloat16(v);
    std::memcpy(p, &h, sizeof(h));
}
inline void store(Half* p, VecF v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(bitcast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(bitcast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes; ++i) from_float(v[i], &p[i]);
#endif
}

// The rounding error of the product a * b, given its rounded value; 0 where the processor has no FMA.
// By intrinsics: written as a * b - product, the compiler is free to find the same product twice.
inline VecF product_error(VecF a, VecF b, VecF product) {
#if defined(__AVX512F__)
    return bitcast<VecF>(_mm512_fmsub_ps(bitcast<__m512>(a), bitcast<__m512>(b), bitcast<__m512>(product)));
#elif defined(__FMA__)
    return bitcast<VecF>(_mm256_fmsub_ps(bitcast<__m256>(a), bitcast<__m256>(b), bitcast<__m256>(product)));
#elif defined(__ARM_FEATURE_FMA)
    for (int i = 0; i < kLanes; ++i) product[i] = __builtin_fmaf(a[i], b[i], -product[i]);
    return product;
#else
    (void)a, (void)b;
    return product - product;
#endif
}

// b where one of them is NaN.
inline VecF maximum(VecF a, VecF b) {
#if defined(__AVX512F__)
    return bitcast<VecF>(_mm512_max_ps(bitcast<__m512>(a), bitcast<__m512>(b)));
#elif defined(__AVX2__)
    return bitcast<VecF>(_mm256_max_ps(bitcast<__m256>(a), bitcast<__m256>(b)));
#else
    return a > b ? a : b;
#endif
}
inline VecF magnitude(VecF x) {
    return bitcast<VecF>(bitcast<VecU>(x) & 0x7fffffff);
}

// ---- a row as whole vectors and one part: loops are written once, over either tag

struct Whole {};
struct Part {
    int n;  // lanes 0 to n - 1 count
};

template <typename T>
inline VecF load(const T* p, Whole) {
    return load(p);
}
template <typename T>
inline VecF load(const T* p, Part part) {
    T padded[kLanes] = {};
    std::memcpy(padded, p, part.n * sizeof(T));
    return load(padded);
}
template <typename T>
inline void store(T* p, VecF v, Whole) {
    store(p, v);
}
template <typename T>
inline void store(T* p, VecF v, Part part) {
    T padded[kLanes];
    store(padded, v);
    std::memcpy(p, padded, part.n * sizeof(T));
}
// Stores past the caches, for results larger than they are: else each line would first be read. `p` is
// aligned to the vector's bytes; stream_fence() makes them visible to other threads.
inline void stream(float* p, VecF v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, bitcast<__m512>(v));
#elif defined(__AVX2__)
    _mm256_stream_ps(p, bitcast<__m256>(v));
#else
    store(p, v);
#endif
}
inline void stream_bits(void* p, VecU16 h) {
#if defined(__AVX512F__)
    _mm256_stream_si256(static_cast<__m256i*>(p), bitcast<__m256i>(h));
#elif defined(__AVX2__)
    _mm_stream_si128(static_cast<__m128i*>(p), bitcast<__m128i>(h));
#else
    std::memcpy(p, &h, sizeof(h));
#endif
}
inline void stream(Half* p, VecF v) {
    VecU16 h;
    store(reinterpret_cast<Half*>(&h), v);
    stream_bits(p, h);
}
inline void stream(BFloat16* p, VecF v) {
    stream_bits(p, to_bfloat16(v));
}
inline void stream_bits(void* p, VecU words) {
#if defined(__AVX512F__)
    _mm512_stream_si512(static_cast<__m512i*>(p), bitcast<__m512i>(words));
#elif defined(__AVX2__)
    _mm256_stream_si256(static_cast<__m256i*>(p), bitcast<__m256i>(words));
#else
    std::memcpy(p, &words, sizeof(words));
#endif
}
inline void stream_fence() {
#if COGVIEW_X86
    _mm_sfence();
#endif
}

// Zeros in the lanes that do not count.
inline VecF only(VecF v, Whole) {
    return v;
}
inline VecF only(VecF v, Part part) {
    for (int i = part.n; i < kLanes; ++i) v[i] = 0.0f;
    return v;
}

// What a pass over a row adds up, and the largest value it sees (at least 0).
template <int K>
struct Totals {
    VecF sum[K];
    VecF largest;
};

// step(j, tag, totals) for every vector of a row of n. Four sets of totals take turns, as one addition would
// have to wait for the last. Flattened: of several calls GCC would make a function, and keep totals in
// memory.
template <int K, typename Step>
__attribute__((flatten)) inline Totals<K> accumulate(int64_t n, const Step& step) {
    Totals<K> a = {}, b = {}, c = {}, d = {};
    int64_t j = 0;
    for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
        step(j, Whole{}, a);
        step(j + kLanes, Whole{}, b);
        step(j + 2 * kLanes, Whole{}, c);
        step(j + 3 * kLanes, Whole{}, d);
    }
    // An array only now: indexed by a variable it lies in memory, and would be written at each step above.
    Totals<K> t[4] = {a, b, c, d};
    for (int i = 0; j + kLanes <= n; ++i, j += kLanes) step(j, Whole{}, t[i]);
    if (j < n) step(j, Part{int(n - j)}, t[3]);
    for (int k = 0; k < K; ++k) t[0].sum[k] = (t[0].sum[k] + t[1].sum[k]) + (t[2].sum[k] + t[3].sum[k]);
    t[0].largest = maximum(maximum(t[0].largest, t[1].largest), maximum(t[2].largest, t[3].largest));
    return t[0];
}

template <typename Step>
inline void for_each_vector(int64_t n, const Step& step) {
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) step(j, Whole{});
    if (j < n) step(j, Part{int(n - j)});
}

// join(lane, lane + half) until one lane is left: an order that is the same at any optimisation level.
template <int kCount, typename Join>
inline float fold(typename Floats<kCount>::type v, const Join& join) {
    if constexpr (kCount == 1) {
        return v[0];
    } else {
        typename Floats<kCount / 2>::type half[2];
        std::memcpy(half, &v, sizeof(v));
        return fold<kCount / 2>(join(half[0], half[1]), join);
    }
}
inline float reduce_max(VecF v) {
    return fold<kLanes>(v, [](auto a, auto b) { return b > a ? b : a; });
}
inline float reduce_sum(VecF v) {
    return fold<kLanes>(v, [](auto a, auto b) { return a + b; });
}

// Lanes of two vectors side by side, by number.
template <int... kFrom>
inline VecF take_lanes(VecF a, VecF b, std::integer_sequence<int, kFrom...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, kFrom...);
#else
    return __builtin_shuffle(a, b, VecI{kFrom...});
#endif
}
// Of parts of kPart lanes, which two vectors hold, all first halves (0) or all second ones (1).
template <int kPart, int kHalf, int... kLane>
inline VecF take_halves(VecF a, VecF b, std::integer_sequence<int, kLane...>) {
    constexpr int kOf = kPart / 2;
    return take_lanes(
        a, b,
        std::integer_sequence<int, (kLane / kOf * kPart + kLane % kOf + kHalf * kOf) % (2 * kLanes)...>{});
}
// out[i] = reduce_sum(v[i]), the same bits, of kCount vectors, a power of two: one addition serves halves of
// two vectors, then quarters of four. Overwrites v.
template <int kCount, int kPart = kLanes>
inline void reduce_sums(VecF* v, float* out) {
    static_assert((kCount & (kCount - 1)) == 0, "must be a power of two");
    if constexpr (kCount > kLanes) {
        reduce_sums<kCount / 2>(v, out);
        reduce_sums<kCount / 2>(v + kCount / 2, out + kCount / 2);
    } else if constexpr (kPart == 1) {
        std::memcpy(out, v, kCount * sizeof(float));
    } else {
        constexpr int kVectors = (kCount * kPart + kLanes - 1) / kLanes;
        constexpr auto kAll = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 16
        for (int i = 0; i < (kVectors + 1) / 2; ++i) {
            const VecF a = v[2 * i], b = v[2 * i + (kVectors > 1)];
            v[i] = take_halves<kPart, 0>(a, b, kAll) + take_halves<kPart, 1>(a, b, kAll);
        }
        reduce_sums<kCount, kPart / 2>(v, out);
    }
}

template <typename T>
inline float dot(const T* x, const T* y, int64_t n) {
    VecF sum = VecF{};
    int64_t d = 0;
    for (; d + kLanes <= n; d += kLanes) sum += load(x + d) * load(y + d);
    float total = reduce_sum(sum);
    for (; d < n; ++d) total += to_float(x[d]) * to_float(y[d]);
    return total;
}

// 2^(x + low) to 1 ulp for -126 <= x < 128, exactly 0 below (so exp2(-inf) = 0), NaN for NaN; |low| < 2^-16.
// x = n + f with |f| <= 1/2; 2^f by its Chebyshev interpolant of degree 6 (relative error 2.6e-9).
inline VecF exp2(VecF x, VecF low = VecF{}) {
    const VecF magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const VecF shifted = x + magic;
    const VecF f = x - (shifted - magic) + low;
    const VecI n = bitcast<VecI>(shifted) - bitcast<VecI>(magic);
    VecF p = broadcast(0.00015461444854736328f);
    p = p * f + 0.0013400427997112274f;
    p = p * f + 0.009618056938052177f;
    p = p * f + 0.05550327152013779f;
    p = p * f + 0.24022650718688965f;
    p = p * f + 0.6931471824645996f;
    p = p * f + 1.0f;
    // Without signs, since what is not taken may overflow.
    const VecF scaled = bitcast<VecF>(bitcast<VecU>(p) + (bitcast<VecU>(n) << 23));
    return x < -126.0f ? VecF{} : (x != x ? x : scaled);
}

// 2^(x * (factor + factor_low)) for x <= 0: the product carried to twice the precision, since an error of its
// last bit is an error of x * factor ulps in the result. (Without FMA only factor_low is made good.)
inline VecF exp2_product(VecF x, float factor, float factor_low) {
    const VecF high = x * factor;
    // x = -inf: inf - inf would be NaN.
    const VecF low = high < -126.0f ? VecF{} : product_error(x, broadcast(factor), high) + x * factor_low;
    return exp2(high, low);
}

}  // namespace
}  // namespace cogview
