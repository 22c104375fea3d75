// What the blocks of a launch may know of each other. Blocks run one after another here, so that
// every store of a block is there when the next one reads; on a GPU it need not be. A load of what
// another block stored in the same launch is a fault unless
//   * the thread that stored it has passed a __threadfence since, before an atomic operation of its
//     block (the one that tells the others)
//   * the block that loads it has made an atomic operation, and a __threadfence after that
// which is the pattern of a ticket that finds the last block. For the one file of a program that
// sees the accesses to global memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "access_hooks.h"

namespace simt {

class BlockOrder {
 public:
  void launch_begins() {
    stores_.clear();
    block_ = 0;
  }
  void block_begins() {
    ++block_;
    for (auto& words : pending_) words.clear();
    asked_ = knows_ = false;
  }
  void store(const void* address, std::size_t bytes, unsigned thread) {
    if (thread >= pending_.size()) pending_.resize(thread + 1);
    each(address, bytes, [&](std::uintptr_t word) {
      stores_[word] = Store{block_, false};
      pending_[thread].push_back(word);
    });
  }
  void load(const void* address, std::size_t bytes) {
    each(address, bytes, [&](std::uintptr_t word) {
      const auto found = stores_.find(word);
      if (found == stores_.end() || found->second.block == block_) return;
      if (!found->second.fenced) {
        stop_kernel(
            "it loads what another block stored with no __threadfence before its atomic "
            "operation");
      }
      if (!knows_) {
        stop_kernel(
            "it loads what another block stored with no atomic operation and "
            "__threadfence of its own block before");
      }
    });
  }
  void fence(unsigned thread) {
    if (asked_) knows_ = true;
    if (thread >= pending_.size()) return;
    for (const std::uintptr_t word : pending_[thread]) stores_[word].fenced = true;
    pending_[thread].clear();
  }
  void atomic() {
    asked_ = true;
    for (auto& words : pending_) words.clear();  // a fence that comes later is too late
  }

 private:
  struct Store {
    std::uint64_t block;
    bool fenced;
  };
  template <class F>
  static void each(const void* address, std::size_t bytes, const F& f) {
    const auto begin = reinterpret_cast<std::uintptr_t>(address);
    for (std::uintptr_t word = begin / 4; word <= (begin + bytes - 1) / 4; ++word) f(word);
  }
  std::unordered_map<std::uintptr_t, Store> stores_;
  std::vector<std::vector<std::uintptr_t>> pending_;  // of each thread since its last fence
  std::uint64_t block_ = 0;
  bool asked_ = false, knows_ = false;
};

}  // namespace simt
