// SPDX-License-Identifier: Apache-2.0
// Where operands of Hopper's matrix products lie.
//
// In shared memory: rows of 128 bytes (64 elements of 16 bits), whose 16-byte chunks are permuted by the row,
// chunk ^= row & 7 ("128-byte swizzle"). Eight rows are an atom of 1,024 bytes, to which operands are
// aligned. Source: PTX ISA, "Asynchronous warpgroup level matrix instructions".
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace cogview {

constexpr int kSwizzledRow = 128;   // bytes
constexpr int kSwizzleAtom = 1024;  // bytes, eight rows
constexpr int kRowChunks = 8;       // of 16 bytes

// Byte offset of a 16-byte chunk of a row.
COGVIEW_HOST_DEVICE constexpr int swizzled(int row, int chunk) {
    return row * kSwizzledRow + ((chunk ^ (row & 7)) << 4);
}

// Which element of a 64 x N accumulator register `i` of thread `thread` of a warpgroup holds.
COGVIEW_HOST_DEVICE constexpr int accumulator_row(int thread, int i) {
    return thread / 32 * 16 + thread % 32 / 4 + (i & 2 ? 8 : 0);
}
COGVIEW_HOST_DEVICE constexpr int accumulator_column(int thread, int i) {
    return i / 4 * 8 + thread % 4 * 2 + (i & 1);
}

// A tile at a shared address. Groups of eight rows are an atom apart; nothing is wider than an atom, so that
// the other offset is not looked at. Both products read rows of 128 bytes: the one of k has the summed
// dimension along them (K-major), the one of v across them (MN-major, "transposed").
COGVIEW_HOST_DEVICE constexpr uint64_t swizzled_descriptor(uint32_t shared_address) {
    return uint64_t(shared_address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(kSwizzleAtom >> 4) << 32 |
           uint64_t(1) << 62;
}
constexpr uint64_t kAlongRow = 16 * 2 >> 4;               // 16 elements on, in a row
constexpr uint64_t kAcrossRows = 16 * kSwizzledRow >> 4;  // 16 rows on

}  // namespace cogview
