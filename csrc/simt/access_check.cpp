// Checks every access of a kernel to shared memory, as compute-sanitizer's racecheck, initcheck and
// memcheck do.
//
// The compiler does the instrumentation: with -fsanitize=thread GCC and Clang call a function of
// the ThreadSanitizer interface before every load and store. Kernels are compiled so, this file and
// simt.cpp are not, and instead of libtsan the program links with this file, which defines those
// functions.
//
// An access to shared memory faults with the thread's name when
//   * it is not inside a shared array (`out-of-bounds`)
//   * it reads a byte that this block never wrote (`uninitialised`); the target of a cp.async
//   counts as never
//     written until its wait
//   * another thread accessed the byte since the last point that orders the two, and one of the two
//   stores
//     (`race`). __syncthreads orders all threads of a block, __syncwarp those of its warp; shuffles
//     and votes order nothing, as in CUDA. A __syncwarp with a partial mask is taken to order the
//     whole warp.
// Atomic operations race neither with each other nor with plain accesses here.
//
// Loads of global memory that another block stored: block_order.h.
//
// Calls into libc (memcpy with a size unknown at compile time, say) are not seen.
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "access_hooks.h"
#include "block_order.h"
#include "simt.h"

namespace simt {
namespace {

// Time is counted in barriers since the program started, so the records of older blocks need no
// clearing.
using Time = std::uint64_t;

constexpr int nobody = -1;
constexpr int several_of_warp = -2;  // several readers, all of one warp
constexpr int several = -3;

struct Record {
  int thread = nobody;
  unsigned warp = 0;
  Time block_time = 0;  // of the last __syncthreads before the access
  Time warp_time = 0;   // of the last __syncwarp of the warp before it
};

struct Byte {
  Record store;
  Record load;
};

struct Checker {
  std::vector<Byte> bytes;
  Time clock = 1;
  Time block_begin = 1;
  Time block_time = 1;
  Time warp_time[32] = {};
} checker;

BlockOrder order;

void block_begins() {
  checker.bytes.resize(shared_arena().bytes);
  checker.block_begin = checker.block_time = ++checker.clock;
  for (Time& time : checker.warp_time) time = checker.clock;
  order.block_begins();
}
void block_barrier() { checker.block_time = ++checker.clock; }
void warp_barrier(unsigned warp) { checker.warp_time[warp] = ++checker.clock; }

// Whether nothing orders the recorded access before one that `thread` makes now.
bool unordered(const Record& record, int thread, unsigned warp) {
  if (record.thread == nobody || record.thread == thread) return false;
  if (record.block_time != checker.block_time) return false;
  if (record.thread == several || record.warp != warp) return true;
  return record.warp_time == checker.warp_time[warp];
}

const SharedRegion* region_of(const char* address, std::size_t n) {
  for (const SharedRegion& region : *shared_arena().regions) {
    if (address >= region.base && address + n <= region.base + region.bytes) return &region;
  }
  return nullptr;
}

std::string text_of(const SharedRegion& region, std::size_t offset) {
  return "byte " + std::to_string(shared_arena().base + offset - region.base) + " of " +
         region.name;
}

[[noreturn]] void report_race(const char* access, const char* other, const Record& record,
                              const SharedRegion& region, std::size_t offset) {
  std::string who = "several threads";
  if (record.thread >= 0) {
    const unsigned t = static_cast<unsigned>(record.thread);
    who = "thread (" + std::to_string(t % blockDim.x) + "," +
          std::to_string(t / blockDim.x % blockDim.y) + "," +
          std::to_string(t / (blockDim.x * blockDim.y)) + ")";
  }
  stop_kernel(std::string("race: it ") + access + " " + text_of(region, offset) + ", which " + who +
              " " + other + " with no barrier between");
}

void check(const void* address, std::size_t n, bool is_store, int thread) {
  const SharedArena& arena = shared_arena();
  const std::size_t begin =
      static_cast<std::size_t>(static_cast<const char*>(address) - arena.base);
  const unsigned warp = static_cast<unsigned>(thread) / 32;
  const Record now{thread, warp, checker.block_time, checker.warp_time[warp]};
  const SharedRegion* region = region_of(static_cast<const char*>(address), n);
  if (region == nullptr) {
    stop_kernel(std::string("out-of-bounds ") + (is_store ? "store to" : "load from") +
                " shared memory (" + std::to_string(n) + " bytes)");
  }
  for (std::size_t offset = begin; offset < begin + n; ++offset) {
    Byte& byte = checker.bytes[offset];
    if (unordered(byte.store, thread, warp)) {
      report_race(is_store ? "stores to" : "loads", "stored to", byte.store, *region, offset);
    }
    if (is_store) {
      if (unordered(byte.load, thread, warp)) {
        report_race("stores to", "loaded", byte.load, *region, offset);
      }
      byte.store = now;
      continue;
    }
    if (byte.store.thread == nobody || byte.store.block_time < checker.block_begin) {
      stop_kernel("uninitialised read of " + text_of(*region, offset) +
                  ", which no thread of the block has written");
    }
    // Join the readers that a store would still race with, or replace them.
    Record& load = byte.load;
    if (load.thread == nobody || load.block_time != checker.block_time ||
        (load.thread != several && load.warp == warp && load.warp_time != now.warp_time)) {
      load = now;
    } else if (load.thread != several && load.warp != warp) {
      load.thread = several;
    } else if (load.thread >= 0 && load.thread != thread) {
      load.thread = several_of_warp;
    }
  }
}

void on_read(const void* address, std::size_t n, unsigned thread) {
  check(address, n, false, static_cast<int>(thread));
}
void on_write(const void* address, std::size_t n, unsigned thread) {
  check(address, n, true, static_cast<int>(thread));
}
void on_forget(const void* address, std::size_t n) {
  const std::size_t begin =
      static_cast<std::size_t>(static_cast<const char*>(address) - shared_arena().base);
  for (std::size_t offset = begin; offset < begin + n; ++offset) {
    checker.bytes[offset].store.thread = nobody;
  }
}

void launch_begins(const char*, bool) { order.launch_begins(); }
void launch_ends() {}
void on_global_read(const void* address, std::size_t n, unsigned) { order.load(address, n); }
void on_discard(const void* address, unsigned thread) { order.store(address, 128, thread); }
void fence(unsigned thread) { order.fence(thread); }
void atomic(unsigned) { order.atomic(); }

void wait_for_previous(unsigned) {}

const AccessHooks hooks{launch_begins,     launch_ends, block_begins, block_barrier,  warp_barrier,
                        on_read,           on_write,    on_forget,    on_global_read, on_discard,
                        wait_for_previous, fence,       atomic};
const bool installed = [] {
  access_hooks = &hooks;
  return true;
}();

inline void instrumented(const void* address, std::size_t n, bool is_store, const void*) {
  if (running_thread < 0) return;
  const SharedArena& arena = shared_arena();
  const auto offset =
      reinterpret_cast<std::uintptr_t>(address) - reinterpret_cast<std::uintptr_t>(arena.base);
  if (offset < arena.bytes) {
    check(address, n, is_store, running_thread);
  } else if (!in_warp_operation && !on_stack(address)) {
    if (is_store)
      order.store(address, n, static_cast<unsigned>(running_thread));
    else
      order.load(address, n);
  }
}

}  // namespace
}  // namespace simt

#include "access_interface.h"
