// SPDX-License-Identifier: Apache-2.0
// Checks of what XLA hands to a handler: number, type and shape of buffers, with expected and got.
#pragma once
#include <string>
#include <vector>

#include "../csrc/kernels/launch.h"
#include "registry.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

namespace ffi = xla::ffi;

using Shape = std::vector<int64_t>;

inline std::string show(ffi::DataType type, const Shape& shape) {
  std::string s = "type " + std::to_string(static_cast<int>(type)) + " [";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

// Collects the first complaint about one call.
class Checker {
 public:
  explicit Checker(const char* operation) : operation_(operation) {}

  void fail(const std::string& what) {
    if (error_.empty()) error_ = std::string(operation_) + ": " + what;
  }
  bool ok() const { return error_.empty(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument(error_); }

  // The data of `buffer`, which must be of this type and shape; null after a complaint.
  template <typename T>
  T* data(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type, const Shape& shape) {
    const Shape got(buffer.dimensions().begin(), buffer.dimensions().end());
    if (buffer.element_type() == type && got == shape) {
      return static_cast<T*>(buffer.untyped_data());
    }
    fail(std::string(name) + ": expected " + show(type, shape) + ", got " +
         show(buffer.element_type(), got));
    return nullptr;
  }

 private:
  const char* operation_;
  std::string error_;
};

// Operands and results of one call, taken one after the other.
class Buffers {
 public:
  Buffers(ffi::RemainingArgs args, ffi::RemainingRets results, Checker& checker)
      : args_(args), results_(results), checker_(checker) {}

  template <typename T>
  const T* operand(const char* name, ffi::DataType type, const Shape& shape) {
    auto buffer = args_.get<ffi::AnyBuffer>(next_operand_++);
    if (!buffer.has_value()) {
      checker_.fail(std::string(name) + ": expected an operand, got none");
      return nullptr;
    }
    return checker_.data<T>(name, *buffer, type, shape);
  }

  template <typename T>
  T* result(const char* name, ffi::DataType type, const Shape& shape) {
    auto buffer = results_.get<ffi::AnyBuffer>(next_result_++);
    if (!buffer.has_value()) {
      checker_.fail(std::string(name) + ": expected a result, got none");
      return nullptr;
    }
    return checker_.data<T>(name, **buffer, type, shape);
  }

  // The type and the last dimension of an operand that is still to be taken.
  bool peek(size_t ahead, ffi::DataType* type, int64_t* last) const {
    auto buffer = args_.get<ffi::AnyBuffer>(next_operand_ + ahead);
    if (!buffer.has_value() || buffer->dimensions().size() == 0) return false;
    *type = buffer->element_type();
    *last = buffer->dimensions().back();
    return true;
  }

  // Complain about operands or results that nobody took.
  void finish() {
    if (next_operand_ != args_.size() || next_result_ != results_.size()) {
      checker_.fail("expected " + std::to_string(next_operand_) + " operands and " +
                    std::to_string(next_result_) + " results, got " + std::to_string(args_.size()) +
                    " and " + std::to_string(results_.size()));
    }
  }

 private:
  ffi::RemainingArgs args_;
  ffi::RemainingRets results_;
  Checker& checker_;
  size_t next_operand_ = 0, next_result_ = 0;
};

// 24 bits over everything that must be alike on all ranks.
class Signature {
 public:
  Signature& add(int64_t v) {
    for (int i = 0; i < 8; ++i) hash_ = (hash_ ^ (v >> (8 * i) & 0xff)) * 1099511628211ull;
    return *this;
  }
  uint32_t value() const {
    return static_cast<uint32_t>(hash_ ^ hash_ >> 24 ^ hash_ >> 48) & 0xffffff;
  }

 private:
  uint64_t hash_ = 14695981039346656037ull;
};

}  // namespace jax_ep
