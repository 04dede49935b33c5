// The element types that the kernels take, as the bindings pass them.
#pragma once

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };
