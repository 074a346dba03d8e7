// SPDX-License-Identifier: Apache-2.0
// Products of rows as they lie with packed panels of columns. Internal linkage: see common/vec.h.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/matmul.h"
#include "common/pack.h"
#include "common/workspace.h"

namespace cogview {
namespace {

// A panel is units [.., kPanelColumns]: a multiple of 16, as transposing takes.
constexpr int64_t kPanelColumns = std::max(16, kPanel* kLanes);
// Units of the contraction that one running sum takes up, since its error grows with their number.
constexpr int64_t kUnitsOfASum = 512;

// `count` rows of K elements, `stride` elements apart, as units. They are copied where a unit would reach
// into the next row or where products are of another type.
template <bool kBf16, typename T>
class UnitRows {
  public:
    UnitRows(const T* rows, int64_t stride, int64_t count, int64_t K)
        : count_(count),
          units_((K + kPack - 1) / kPack),
          copied_(!std::is_same<T, E>::value || K % kPack != 0 || stride % kPack != 0),
          stride_(copied_ ? units_ : stride / kPack),
          copy_(copied_ ? count * units_ : 0),
          data_(copied_ ? copy_.data : reinterpret_cast<const float*>(rows)) {
        if (!copied_) return;
        E* to = reinterpret_cast<E*>(copy_.data);
        for (int64_t r = 0; r < count; ++r)
            stage_row(rows + r * stride, K, units_ * kPack, false, to + r * units_ * kPack);
    }

    // c[count, columns] (+)= the rows times the first columns, a multiple of kLanes, of a panel. Of rows of
    // no length that is 0.
    void multiply(const float* panel, int64_t columns, float* c, int64_t ldc, bool add) const {
        int64_t u = 0;
        do {
            const int64_t units = std::min(kUnitsOfASum, units_ - u);
            matmul<kBf16>(count_, columns, units, MatmulA{data_ + u, stride_, units, 0},
                          panel + u * kPanelColumns, kPanelColumns, c, ldc, add || u > 0);
            u += kUnitsOfASum;
        } while (u < units_);
    }

  private:
    using E = typename Compute<kBf16>::type;
    static constexpr int64_t kPack = Compute<kBf16>::kPack;

    const int64_t count_, units_;
    const bool copied_;
    const int64_t stride_;
    const Workspace copy_;
    const float* const data_;
};

}  // namespace
}  // namespace cogview
