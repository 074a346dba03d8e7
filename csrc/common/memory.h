// SPDX-License-Identifier: Apache-2.0
// What the system tells of caches and pages.
#pragma once

#include <cstdint>

namespace cogview {

// Bytes of the largest cache, which cores share; 0 where the system does not tell.
int64_t shared_cache_bytes();

// Whether nobody has touched the page in the middle of `data` since the system gave it: the first write will
// find it cleared, and in the caches. False where the system does not tell.
bool is_fresh(const void* data, int64_t bytes);

}  // namespace cogview
