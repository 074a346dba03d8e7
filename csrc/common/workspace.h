// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace cogview {

// Uninitialised floats, cache-line aligned. What is given back is kept for the next call, up to 128 MB in
// all: the page faults of fresh memory cost a short call as much as its arithmetic. Thread-safe.
class Workspace {
  public:
    explicit Workspace(int64_t floats);
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    float* data;

  private:
    int64_t bytes_;
};

// Hands back to the system what is kept between calls; gives its bytes.
int64_t free_workspaces();

}  // namespace cogview
