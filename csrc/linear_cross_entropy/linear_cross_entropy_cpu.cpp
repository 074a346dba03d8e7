// SPDX-License-Identifier: Apache-2.0
// Vectors lie across tokens, so that sums over ids need no shuffles. Bytes: the logits are read once to be
// reduced, read and written once for their gradient. FLOPs: about 25 an element each time, most of them in
// exp2; 30 more with a cap. Plain cross-entropy has instances of its own, which pay for no option.
#include <algorithm>

#include "common/parallel.h"
#include "common/vec.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// Ids whose logits, one vector of tokens wide, stay in L1 between maximum and sum.
constexpr int64_t kTile = 32;
// Partial results at most; what is summed together does not depend on the number of threads.
constexpr int64_t kParts = 64;
// Tokens whose partial results one thread makes at a time.
constexpr int64_t kColumns = 512;
// Ids a chunk of the gradient.
constexpr int64_t kRows = 64;

// exp(x) for x <= 0, to 2 ulp, exactly 0 below 2^-126, NaN for NaN. x = n ln 2 + f; ln 2 in two parts, the
// first of so few bits that n times it is exact; e^f by the polynomial of Cephes' expf. It takes two thirds
// of the instructions of exp2_product, and half of the time beside the matrix products goes into it.
VecF exp_negative(VecF x) {
    const VecF magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const VecF shifted = x * 1.44269504f + magic, n = shifted - magic;
    const VecF f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    VecF p = broadcast(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * (f * f) + f + 1.0f;
    // A product with 2^n, not a sum of exponents: NaN must stay NaN.
    const VecF power = bitcast<VecF>((bitcast<VecI>(shifted) << 23) + 0x3f800000);
    return x < -87.33654f ? VecF{} : p * power;
}

// Cephes' tanhf: a polynomial near 0, where 1 - exp(-2x) would cancel.
VecF tanh(VecF x) {
    const VecF size = magnitude(x), z = x * x, e = exp_negative(-2.0f * size);
    VecF p = broadcast(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const VecF far = (1.0f - e) / (1.0f + e);
    return size < 0.625f ? p * z * x + x : (x < 0.0f ? -far : far);
}

int64_t rounded_up(int64_t n) {
    return (n + kLanes - 1) / kLanes * kLanes;
}

// The first `count` lanes; the others are 0 and are left alone.
template <typename T>
VecF load_part(const T* p, int64_t count) {
    if (count >= kLanes) return load(p);
    T part[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) part[i] = p[i];
    return load(part);
}
template <typename T>
void store_part(T* p, VecF x, int64_t count) {
    if (count >= kLanes) return store(p, x);
    T part[kLanes];
    store(part, x);
    for (int64_t i = 0; i < count; ++i) p[i] = part[i];
}

template <typename T>
const T* row_of(const Logits& logits, int64_t row) {
    return static_cast<const T*>(logits.data) + row * logits.stride;
}

// What the softmax sees of a product in `row`.
template <bool kPlain>
VecF seen(const Logits& logits, VecF product, int64_t row) {
    if (kPlain) return product;
    if (logits.bias != nullptr) product = product + logits.bias[row];
    return logits.softcap == 0.0f ? product : logits.softcap * tanh(product / logits.softcap);
}

VecF without_infinity(VecF max) {
    return max == -kInf ? VecF{} : max;
}

// What the reduction of a piece keeps of a part of its ids, [width] each.
struct PartStats {
    float *max, *total, *sum, *predicted;
};

// The part of the rows [begin, end), for the columns [left, right).
template <typename T, bool kPlain>
void reduce_part(const LinearCrossEntropyReduce& a, int64_t begin, int64_t end, int64_t left, int64_t right,
                 const PartStats& part) {
    const Logits& logits = a.logits;
    for (int64_t j = left; j < right; j += kLanes) {
        store(part.max + j, broadcast(-kInf));
        store(part.total + j, VecF{});
        if (kPlain) continue;
        store(part.sum + j, VecF{});
        store(part.predicted + j, bitcast<VecF>(VecI{} + int32_t(logits.first + begin)));
    }
    for (int64_t start = begin; start < end; start += kTile) {
        const int64_t rows = std::min(kTile, end - start);
        for (int64_t j = left; j < right; j += kLanes) {
            const int64_t count = logits.n - j;
            const VecF before = load(part.max + j);
            // Rows lie far apart, maybe in the same cache lines' places: each is fetched once. Two chains of
            // maxima, as one comparison would wait for the last.
            VecF tile[kTile], max = before, odd = before;
            for (int64_t r = 0; r < rows; ++r) {
                const VecF product = load_part(row_of<T>(logits, start + r) + j, count);
                tile[r] = seen<kPlain>(logits, product, start + r);
                if (r % 2 == 0)
                    max = maximum(tile[r], max);
                else
                    odd = maximum(tile[r], odd);
            }
            max = maximum(odd, max);
            // No id yet: -inf minus -inf would be NaN.
            const VecF safe = without_infinity(max);
            VecF total = load(part.total + j) * exp_negative(before - safe);
            for (int64_t r = 0; r < rows; ++r) total += exp_negative(tile[r] - safe);
            store(part.max + j, max);
            store(part.total + j, total);
            if (kPlain) continue;
            if (a.sum != nullptr) {
                VecF sum = load(part.sum + j);
                if (start > begin) sum += float(start - begin) * (before - safe);
                for (int64_t r = 0; r < rows; ++r) sum += tile[r] - safe;
                store(part.sum + j, sum);
            }
            if (a.predicted != nullptr) {
                const VecI old = bitcast<VecI>(load(part.predicted + j));
                VecI id = old;
                for (int64_t r = rows; r-- > 0;)
                    id = tile[r] == max ? VecI{} + int32_t(logits.first + start + r) : id;
                store(part.predicted + j, bitcast<VecF>(max > before ? id : old));
            }
        }
    }
}

// The ids before the piece, which are a part as well.
void load_known(const LinearCrossEntropyReduce& a, const PartStats& known) {
    const auto widened = [&](const float* from, float* to) { std::copy(from, from + a.logits.n, to); };
    widened(a.logit_max, known.max);
    widened(a.total, known.total);
    if (a.sum != nullptr) widened(a.sum, known.sum);
    if (a.predicted == nullptr) return;
    for (int64_t j = 0; j < a.logits.n; ++j) known.predicted[j] = bitcast<float>(int32_t(a.predicted[j]));
}

// parts[p] begins at the id ids[p]; they are put together in their order.
void merge(const LinearCrossEntropyReduce& a, const PartStats* parts, const int64_t* ids, int64_t count) {
    const int64_t n = a.logits.n;
    for (int64_t j = 0; j < n; j += kLanes) {
        VecF max = load(parts[0].max + j), total = VecF{}, lost = VecF{}, sum = VecF{};
        for (int64_t p = 1; p < count; ++p) max = maximum(load(parts[p].max + j), max);
        const VecF safe = without_infinity(max);
        for (int64_t p = 0; p < count; ++p) {
            // Kahan's sum: the error of one running sum grows with its length.
            const VecF shift = load(parts[p].max + j) - safe;
            const VecF term = load(parts[p].total + j) * exp_negative(shift) - lost;
            const VecF next = total + term;
            lost = (next - total) - term;
            total = next;
            if (a.sum != nullptr) sum += load(parts[p].sum + j) + float(ids[p + 1] - ids[p]) * shift;
        }
        store_part(a.logit_max + j, max, n - j);
        store_part(a.total + j, total, n - j);
        if (a.sum != nullptr) store_part(a.sum + j, sum, n - j);
        if (a.predicted == nullptr) continue;
        VecI id = bitcast<VecI>(load(parts[0].predicted + j));
        for (int64_t p = count; p-- > 0;)
            id = load(parts[p].max + j) == max ? bitcast<VecI>(load(parts[p].predicted + j)) : id;
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, n - j); ++i) a.predicted[j + i] = id[i];
    }
}

template <typename T, bool kPlain>
void pick(const LinearCrossEntropyReduce& a) {
    for (int64_t j = 0; j < a.logits.n; ++j) {
        const int64_t row = a.target[j] - a.logits.first;
        if (row >= 0 && row < a.logits.v)
            a.picked[j] = seen<kPlain>(a.logits, broadcast(to_float(row_of<T>(a.logits, row)[j])), row)[0];
        else if (a.logits.first == 0)
            a.picked[j] = -kInf;
    }
}

template <typename T, bool kPlain>
void reduce(const LinearCrossEntropyReduce& a, int threads) {
    const int64_t v = a.logits.v, n = a.logits.n, width = rounded_up(n);
    const int64_t rows = std::max((v + kParts - 1) / kParts, 4 * kTile);
    const int64_t fresh = (v + rows - 1) / rows, known = a.logits.first > 0;
    const int64_t size = (kPlain ? 2 : 4) * width;
    const Scratch scratch((fresh + known) * size);
    // The known part comes first, as its ids do.
    PartStats parts[kParts + 1] = {};
    int64_t ids[kParts + 2] = {};
    for (int64_t p = 0; p < fresh + known; ++p) {
        float* data = scratch.data + p * size;
        parts[p] = {data, data + width, data + 2 * width, data + 3 * width};
        ids[p + 1] = a.logits.first + std::min(v, (p + 1 - known) * rows);
    }
    const int64_t columns = (n + kColumns - 1) / kColumns;
    parallel_for(fresh * columns, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t p = i / columns, left = i % columns * kColumns;
            reduce_part<T, kPlain>(a, p * rows, std::min(v, (p + 1) * rows), left,
                                   std::min(n, left + kColumns), parts[p + known]);
        }
    });
    if (known) load_known(a, parts[0]);
    pick<T, kPlain>(a);
    merge(a, parts, ids, fresh + known);
}

// Of each token, padded to vectors: the coefficient, and what its gradients are made of, `factor` times
// exp(logit - logit_max) less `off` and, at the target, less `at_target` besides.
struct Factors {
    Scratch coefficient, factor, off, at_target;
    Factors(const LinearCrossEntropyGradient& a, int64_t width)
        : coefficient(width), factor(width), off(width), at_target(width) {
        for (int64_t j = 0; j < width; ++j) {
            const float c = j < a.logits.n ? a.coefficient[j] : 0.0f;
            coefficient.data[j] = c;
            factor.data[j] = c == 0.0f ? 0.0f : c / a.total[j];
            if (c != 0.0f && a.z_loss != 0.0f)
                factor.data[j] *= 1.0f + 2.0f * a.z_loss * (a.logit_max[j] + std::log(a.total[j]));
            off.data[j] = c * a.id_share;
            at_target.data[j] = c * a.target_share;
        }
    }
};

template <bool kPlain>
VecF gradient_of(const Logits& logits, VecF product, int64_t row, VecF logit_max, VecF factor, VecF off) {
    const VecF logit = seen<kPlain>(logits, product, row);
    const VecF g = factor * exp_negative(logit - logit_max) - off;
    if (kPlain || logits.softcap == 0.0f) return g;
    const VecF t = logit / logits.softcap;
    return g * (1.0f - t * t);
}

template <typename T, bool kPlain>
void gradient_of_rows(const LinearCrossEntropyGradient& a, const Factors& factors, int64_t begin,
                      int64_t end) {
    const Logits& logits = a.logits;
    const int64_t n = logits.n;
    const Scratch at_target(n);
    float dbias[kRows] = {};
    const auto row_of_target = [&](int64_t j) {
        const int64_t row = a.target[j] - logits.first;
        return row < begin || row >= end || factors.coefficient.data[j] == 0.0f ? -1 : row;
    };
    // The targets among these ids first: 1 must be taken off before their softmax is rounded.
    for (int64_t j = 0; j < n; ++j) {
        const int64_t row = row_of_target(j);
        if (row < 0) continue;
        const auto with = [&](float off) {
            return gradient_of<kPlain>(logits, broadcast(to_float(row_of<T>(logits, row)[j])), row,
                                       broadcast(a.logit_max[j]), broadcast(factors.factor.data[j]),
                                       broadcast(off))[0];
        };
        const float off = kPlain ? 0.0f : factors.off.data[j];
        at_target.data[j] = with(off + factors.at_target.data[j]);
        if (a.dbias != nullptr) dbias[row - begin] += at_target.data[j] - with(off);
    }
    for (int64_t r = begin; r < end; ++r) {
        T* row = static_cast<T*>(logits.data) + r * logits.stride;
        VecF row_sum = VecF{};
        for (int64_t j = 0; j < n; j += kLanes) {
            const int64_t count = n - j;
            const VecF factor = load(factors.factor.data + j);
            const VecF off = kPlain ? VecF{} : load(factors.off.data + j);
            const VecF g = gradient_of<kPlain>(logits, load_part(row + j, count), r,
                                               load_part(a.logit_max + j, count), factor, off);
            const VecF counts = kPlain ? factor : load(factors.coefficient.data + j);
            // A product would not do: the logits of a token that does not count may be infinite.
            const VecF kept = counts == 0.0f ? VecF{} : g;
            store_part(row + j, kept, count);
            if (!kPlain) row_sum += kept;
        }
        if (a.dbias != nullptr) a.dbias[r] += reduce_sum(row_sum) + dbias[r - begin];
    }
    for (int64_t j = 0; j < n; ++j) {
        const int64_t row = row_of_target(j);
        if (row >= 0) from_float(at_target.data[j], &static_cast<T*>(logits.data)[row * logits.stride + j]);
    }
}

template <typename T, bool kPlain>
void gradient(const LinearCrossEntropyGradient& a, int threads) {
    const Factors factors(a, rounded_up(a.logits.n));
    parallel_for(a.logits.v, kRows, threads,
                 [&](int64_t begin, int64_t end) { gradient_of_rows<T, kPlain>(a, factors, begin, end); });
}

bool is_plain(const Logits& logits) {
    return logits.bias == nullptr && logits.softcap == 0.0f;
}

}  // namespace

void linear_cross_entropy_reduce_cpu(const LinearCrossEntropyReduce& a, int threads) {
    const bool plain = is_plain(a.logits) && a.sum == nullptr && a.predicted == nullptr;
    COGVIEW_DISPATCH_DTYPE(a.logits.dtype, {
        if (plain)
            reduce<scalar_t, true>(a, threads);
        else
            reduce<scalar_t, false>(a, threads);
    });
}

void linear_cross_entropy_gradient_cpu(const LinearCrossEntropyGradient& a, int threads) {
    // z-loss changes the factors alone.
    const bool plain = is_plain(a.logits) && a.id_share == 0.0f && a.dbias == nullptr;
    COGVIEW_DISPATCH_DTYPE(a.logits.dtype, {
        if (plain)
            gradient<scalar_t, true>(a, threads);
        else
            gradient<scalar_t, false>(a, threads);
    });
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
