// SPDX-License-Identifier: Apache-2.0
// What tests/emulation/__init__.py calls through ctypes.
#include "cuda_emulation.h"

extern "C" __attribute__((visibility("default"))) void emulation_configure(unsigned order,
                                                                           int fragment_layout,
                                                                           int shared_limit) {
    emulation::settings = {order, fragment_layout, shared_limit};
    emulation::state.shared_allowed.clear();
}
