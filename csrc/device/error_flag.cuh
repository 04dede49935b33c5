// What a kernel found wrong in data that only the device has seen. Such data is skipped, never
// followed; the flag tells of it at the caller's next synchronisation.
#pragma once

#include "gpu.cuh"

enum ErrorBit : int {
  kPageOutOfRange = 1,
  kLengthOutOfRange = 2,
  kSlotOutOfRange = 4,
  kNothingToDraw = 8,
  kSettingOutOfRange = 16,
};

GPU_DEVICE void raise_flag(int* flag, ErrorBit bit) {
  if (flag != nullptr) atomicOr(flag, bit);
}
