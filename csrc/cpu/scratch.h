// Memory of one task or call, 64-byte aligned and not set to anything. The only scratch of the CPU code: an operator
// takes it, and its kernels get a pointer and say by a function `..._scratch` how many elements they need.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace losa {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(static_cast<std::size_t>(count > 0 ? count : 1) * sizeof(T), kAlign))) {}

  T* get() const { return data_.get(); }
  T& operator[](int64_t index) const { return data_.get()[index]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kAlign); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace losa
