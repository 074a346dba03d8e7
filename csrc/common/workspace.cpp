// SPDX-License-Identifier: Apache-2.0
#include "common/workspace.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace cogview {
namespace {

constexpr int64_t kMostKept = int64_t(128) << 20;

struct Kept {
    int64_t bytes;
    void* memory;
};

struct Pool {
    std::mutex mutex;
    std::vector<Kept> kept;
    int64_t total = 0;
};

// Never destroyed: threads may outlive static objects.
Pool& pool() {
    static Pool* p = new Pool;
    return *p;
}

}  // namespace

Workspace::Workspace(int64_t floats) {
    bytes_ = (std::max<int64_t>(floats, 1) * 4 + 4095) / 4096 * 4096;
    {
        Pool& p = pool();
        std::lock_guard<std::mutex> lock(p.mutex);
        // The smallest that is large enough, unless it is much too large; of equals the one used last, which
        // may still be in a cache.
        auto best = p.kept.end();
        for (auto k = p.kept.begin(); k != p.kept.end(); ++k)
            if (k->bytes >= bytes_ && k->bytes <= 2 * bytes_ &&
                (best == p.kept.end() || k->bytes <= best->bytes))
                best = k;
        if (best != p.kept.end()) {
            bytes_ = best->bytes;
            data = static_cast<float*>(best->memory);
            p.total -= bytes_;
            p.kept.erase(best);
            return;
        }
    }
    data = static_cast<float*>(std::aligned_alloc(64, bytes_));
    if (data == nullptr) throw std::bad_alloc();
}

Workspace::~Workspace() {
    Pool& p = pool();
    std::vector<Kept> freed;
    {
        std::lock_guard<std::mutex> lock(p.mutex);
        p.kept.push_back({bytes_, data});
        p.total += bytes_;
        // The oldest go first.
        while (p.total > kMostKept) {
            p.total -= p.kept.front().bytes;
            freed.push_back(p.kept.front());
            p.kept.erase(p.kept.begin());
        }
    }
    for (const Kept& k : freed) std::free(k.memory);
}

int64_t free_workspaces() {
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    const int64_t bytes = p.total;
    for (const Kept& k : p.kept) std::free(k.memory);
    p.kept.clear();
    p.total = 0;
    return bytes;
}

}  // namespace cogview
