// The floating-point types that kernels read and write beside their own fp32.
#pragma once

namespace losa {

enum class FloatType : int { kFloat = 0, kBFloat16 = 1, kHalf = 2 };

constexpr int float_type_size(FloatType type) {
  return type == FloatType::kFloat ? 4 : 2;
}

}  // namespace losa
