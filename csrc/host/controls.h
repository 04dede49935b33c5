// What tests may ask of the host engine besides running kernels.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace gpu_host {

// Fixes the order of threads in the launches to come.
void set_schedule(uint64_t seed);

// Under AddressSanitizer, makes memory inside a buffer as forbidden as that outside; elsewhere
// nothing.
void poison(uintptr_t address, size_t bytes);
void unpoison(uintptr_t address, size_t bytes);

}  // namespace gpu_host
