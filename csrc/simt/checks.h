// Checks that run a launch several times and compare its outputs bit by bit.
//
// race_check finds a missing barrier, in shared or global memory: code between two barriers is run
// for the threads in ascending, descending and random order, so of two accesses that race each
// comes first once. It sees a race only where the outputs depend on it.
//
// check_uninitialized finds reads of shared memory that the block never wrote, and of output memory
// that is read before it is written if that is passed as `scratch`: shared memory (and scratch) is
// filled with different bytes in every run. It sees such a read only where the outputs depend on
// the value.
//
// Both restore the first contents of `outputs` before every run, leave the result of the first run
// in them, put the settings back, and throw std::runtime_error on a difference. For a check of
// every access instead, whether or not it changes an output, see access_check.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt.h"

#pragma GCC visibility push(hidden)

namespace simt {

struct Region {
  void* data;
  std::size_t bytes;
};

class OutputComparison {
 public:
  explicit OutputComparison(const std::vector<Region>& outputs)
      : outputs_(outputs), before_(copy()), saved_(settings()) {}
  ~OutputComparison() {
    settings() = saved_;
    if (!after_.empty()) restore(after_);
  }
  OutputComparison(const OutputComparison&) = delete;
  OutputComparison& operator=(const OutputComparison&) = delete;

  template <class Launch>
  void run(const Launch& launch, const char* check, const std::string& setting) {
    restore(before_);
    launch();
    const std::vector<std::vector<char>> result = copy();
    if (after_.empty()) {
      after_ = result;
      first_setting_ = setting;
      return;
    }
    for (std::size_t i = 0; i < result.size(); ++i) {
      for (std::size_t byte = 0; byte < result[i].size(); ++byte) {
        if (result[i][byte] == after_[i][byte]) continue;
        throw std::runtime_error(std::string("simt: ") + check + ": output " + std::to_string(i) +
                                 " differs from byte " + std::to_string(byte) + " on between " +
                                 first_setting_ + " and " + setting);
      }
    }
  }

 private:
  std::vector<std::vector<char>> copy() const {
    std::vector<std::vector<char>> result;
    for (const Region& region : outputs_) {
      const char* begin = static_cast<const char*>(region.data);
      result.emplace_back(begin, begin + region.bytes);
    }
    return result;
  }
  void restore(const std::vector<std::vector<char>>& contents) const {
    for (std::size_t i = 0; i < outputs_.size(); ++i) {
      if (outputs_[i].bytes != 0) {
        std::memcpy(outputs_[i].data, contents[i].data(), outputs_[i].bytes);
      }
    }
  }

  std::vector<Region> outputs_;
  std::vector<std::vector<char>> before_;
  std::vector<std::vector<char>> after_;
  std::string first_setting_;
  Settings saved_;
};

template <class Launch>
void race_check(const Launch& launch, const std::vector<Region>& outputs, int random_orders = 3) {
  OutputComparison comparison(outputs);
  settings().order = Order::forward;
  comparison.run(launch, "race", "forward order");
  settings().order = Order::reverse;
  comparison.run(launch, "race", "reverse order");
  settings().order = Order::random;
  for (int i = 0; i < random_orders; ++i) {
    settings().seed = static_cast<std::uint64_t>(i) + 1;
    comparison.run(launch, "race", "random order " + std::to_string(i + 1));
  }
}

template <class Launch>
void check_uninitialized(const Launch& launch, const std::vector<Region>& outputs,
                         const std::vector<Region>& scratch = {}) {
  OutputComparison comparison(outputs);
  // NaN in every float format; zero; an ordinary number: what one of them hides another shows.
  for (const int poison : {0xff, 0x00, 0x3c}) {
    settings().poison = static_cast<std::uint8_t>(poison);
    for (const Region& region : scratch) std::memset(region.data, poison, region.bytes);
    comparison.run(launch, "uninitialised read", "poison byte " + std::to_string(poison));
  }
}

// n elements between two guards that show stores outside them, for builds without AddressSanitizer.
template <class T>
class GuardedArray {
 public:
  explicit GuardedArray(std::size_t n, T value = T())
      : n_(n), memory_(n * sizeof(T) + 2 * guard, pattern) {
    for (std::size_t i = 0; i < n; ++i) data()[i] = value;
  }
  T* data() { return reinterpret_cast<T*>(memory_.data() + guard); }
  std::size_t size() const { return n_; }
  T& operator[](std::size_t i) { return data()[i]; }
  Region region() { return Region{data(), n_ * sizeof(T)}; }

  // Throws std::runtime_error if a guard has changed.
  void check() const {
    for (std::size_t i = 0; i < guard; ++i) {
      if (memory_[i] != pattern) {
        throw std::runtime_error("simt: out-of-bounds global store " + std::to_string(guard - i) +
                                 " bytes below the start of an array");
      }
      if (memory_[memory_.size() - guard + i] != pattern) {
        throw std::runtime_error("simt: out-of-bounds global store " + std::to_string(i) +
                                 " bytes beyond the end of an array");
      }
    }
  }

 private:
  static constexpr std::size_t guard = 4096;
  static constexpr char pattern = 0x5a;
  std::size_t n_;
  std::vector<char> memory_;  // operator new aligns to 16 bytes, and so does the guard
};

}  // namespace simt

#pragma GCC visibility pop
