// SPDX-License-Identifier: Apache-2.0
#include "common/memory.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace cogview {

int64_t shared_cache_bytes() {
#ifdef _SC_LEVEL3_CACHE_SIZE
    return sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
    return 0;
#endif
}

bool is_fresh(const void* data, int64_t bytes) {
#ifdef __linux__
    static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    const uintptr_t middle = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes / 2)) / page * page;
    unsigned char resident = 1;
    return mincore(reinterpret_cast<void*>(middle), page, &resident) == 0 && (resident & 1) == 0;
#else
    (void)data, (void)bytes;
    return false;
#endif
}

}  // namespace cogview
