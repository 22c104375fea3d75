// Counts what kernels move between global memory and the multiprocessors, launch by launch.
//
// The compiler does the instrumentation, as for access_check.cpp: kernels are compiled with
// -fsanitize=thread, this file and simt.cpp are not, and this file stands in for libtsan. It makes
// a library of its own (libbayes_kernels_sim_traffic.so), so that the emulator that all other tests
// use pays nothing.
//
// The unit is the request: one instruction of one warp. Lanes that take the same bytes count them
// once, as the hardware does. A request moves whole sectors of 32 bytes; sectors above bytes / 32
// are what is lost by accesses that are not coalesced. Which lanes take part in a request is found
// by counting: the i-th access of each lane from one place in the code since the last barrier.
//
// Not global memory, and so not counted: shared memory, the threads' stacks (registers and kernel
// arguments) and variables of the library (threadIdx and so on). What the compiler keeps in a
// register is read once.
//
// Caches are counted by two bounds of what they may save. The second-level cache is asked for every
// sector once by each block, and gets all stores. The memory gives each sector once to a launch,
// except what the launch has stored before, and takes each sector once that the launch stores and
// does not discard.
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "access_hooks.h"
#include "block_order.h"
#include "simt.h"

namespace simt {
namespace {

constexpr std::uintptr_t sector_bytes = 32;

struct Range {
  std::uintptr_t begin = 0, end = 0;
  bool holds(std::uintptr_t address) const { return address >= begin && address < end; }
};

// What one kernel has moved; index 0: loads, 1: stores.
struct Traffic {
  std::uint64_t launches = 0;
  std::uint64_t bytes[2] = {0, 0};
  std::uint64_t sectors[2] = {0, 0};
  std::uint64_t of_blocks = 0;  // sectors loaded, each once by a block
  std::uint64_t memory[2] = {0, 0};
};

// A sector in a launch.
struct Sector {
  std::uint64_t block = 0;  // the last that loaded it
  bool known = false, stored = false;
};

using Span = std::pair<std::uintptr_t, std::uintptr_t>;  // from, to

// The accesses of a warp from one place in the code since the last barrier.
struct Site {
  bool is_store = false;
  unsigned accesses[32] = {};               // of each lane
  std::vector<std::vector<Span>> requests;  // the i-th access of every lane
};

struct Counter {
  Traffic* kernel = nullptr;
  std::map<std::string, Traffic> kernels;
  std::vector<std::unordered_map<const void*, Site>> warps;
  Range host_stack, library;
  std::unordered_map<std::uintptr_t, Sector> sectors;
  std::uint64_t block = 0;
  bool behind = false;  // the launch must wait for the one in front before it touches memory
  std::vector<bool> waited;
} counter;

BlockOrder order;

void close_request(std::vector<Span>& request, bool is_store) {
  std::sort(request.begin(), request.end());
  std::uintptr_t bytes = 0, sectors = 0, end = 0, next_sector = 0;
  for (const Span& span : request) {
    const std::uintptr_t begin = std::max(span.first, end);
    if (span.second <= begin) continue;
    bytes += span.second - begin;
    end = span.second;
    const std::uintptr_t first = std::max(begin / sector_bytes, next_sector);
    const std::uintptr_t last = (end - 1) / sector_bytes;
    if (last >= first) sectors += last - first + 1;
    next_sector = last + 1;
  }
  counter.kernel->bytes[is_store] += bytes;
  counter.kernel->sectors[is_store] += sectors;
}

void close_warp(unsigned warp) {
  if (warp >= counter.warps.size()) return;
  for (auto& entry : counter.warps[warp]) {
    for (auto& request : entry.second.requests) close_request(request, entry.second.is_store);
  }
  counter.warps[warp].clear();
}

void close_block() {
  for (unsigned warp = 0; warp < counter.warps.size(); ++warp) close_warp(warp);
}

Range stack_of_this_thread() {
  Range range;
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes) != 0) return range;
  void* base = nullptr;
  std::size_t bytes = 0;
  pthread_attr_getstack(&attributes, &base, &bytes);
  pthread_attr_destroy(&attributes);
  range.begin = reinterpret_cast<std::uintptr_t>(base);
  range.end = range.begin + bytes;
  return range;
}

// Where this library's code and variables lie.
Range this_library() {
  Range range;
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* out) {
        Range found{~std::uintptr_t{0}, 0};
        for (unsigned i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
          const std::uintptr_t at = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
          found.begin = std::min(found.begin, at);
          found.end = std::max<std::uintptr_t>(found.end, at + info->dlpi_phdr[i].p_memsz);
        }
        if (!found.holds(reinterpret_cast<std::uintptr_t>(&counter))) return 0;
        *static_cast<Range*>(out) = found;
        return 1;
      },
      &range);
  return range;
}

void launch_begins(const char* kernel, bool behind) {
  static const Range library = this_library();
  static thread_local const Range stack = stack_of_this_thread();
  counter.library = library;
  counter.host_stack = stack;
  counter.warps.clear();  // of a launch that ended in a fault
  counter.sectors.clear();
  counter.behind = behind;
  order.launch_begins();
  const std::string name = kernel;
  counter.kernel = &counter.kernels[name.substr(0, name.find('<'))];
  ++counter.kernel->launches;
}
void launch_ends() { close_block(); }

void block_begins() {
  close_block();
  order.block_begins();
  ++counter.block;
  counter.waited.assign(blockDim.x * blockDim.y * blockDim.z, false);
  counter.warps.resize((blockDim.x * blockDim.y * blockDim.z + 31) / 32);
}
void ignore(const void*, std::size_t, unsigned) {}
void forget(const void*, std::size_t) {}
void on_discard(const void* address, unsigned thread) {
  order.store(address, 128, thread);
  const auto begin = reinterpret_cast<std::uintptr_t>(address) / sector_bytes;
  for (std::uintptr_t at = begin; at < begin + 128 / sector_bytes; ++at) {
    const auto found = counter.sectors.find(at);
    if (found == counter.sectors.end() || !found->second.stored) continue;
    found->second.stored = false;
    --counter.kernel->memory[1];
  }
}
void wait_for_previous(unsigned thread) { counter.waited[thread] = true; }
void fence(unsigned thread) { order.fence(thread); }
void atomic(unsigned) { order.atomic(); }

void record(const void* address, std::size_t bytes, bool is_store, const void* site) {
  const unsigned thread = static_cast<unsigned>(running_thread), lane = thread % 32;
  if (counter.behind && !counter.waited[thread])
    stop_kernel("it touches global memory before bk_wait_for_previous");
  if (is_store)
    order.store(address, bytes, thread);
  else
    order.load(address, bytes);
  Site& at = counter.warps[thread / 32][site];
  at.is_store = is_store;
  const unsigned number = at.accesses[lane]++;
  if (number >= at.requests.size()) at.requests.resize(number + 1);
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  at.requests[number].emplace_back(begin, begin + bytes);
  for (std::uintptr_t s = begin / sector_bytes; s <= (begin + bytes - 1) / sector_bytes; ++s) {
    Sector& sector = counter.sectors[s];
    Traffic& kernel = *counter.kernel;
    if (is_store) {
      if (!sector.stored) ++kernel.memory[1];
      sector.stored = true;
    } else {
      if (!sector.known) ++kernel.memory[0];
      if (sector.block != counter.block) ++kernel.of_blocks;
      sector.block = counter.block;
    }
    sector.known = true;
  }
}

void on_global_read(const void* address, std::size_t bytes, unsigned) {
  record(address, bytes, false, reinterpret_cast<const void*>(&on_global_read));
}

const AccessHooks hooks{
    launch_begins, launch_ends,    block_begins, close_block,       close_warp, ignore, ignore,
    forget,        on_global_read, on_discard,   wait_for_previous, fence,      atomic};
const bool installed = [] {
  access_hooks = &hooks;
  return true;
}();

inline void instrumented(const void* pointer, std::size_t bytes, bool is_store, const void* site) {
  if (running_thread < 0 || in_warp_operation) return;
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  if (address - reinterpret_cast<std::uintptr_t>(shared_arena().base) < shared_arena().bytes ||
      counter.host_stack.holds(address) || counter.library.holds(address) || on_stack(pointer)) {
    return;
  }
  record(pointer, bytes, is_store, site);
}

}  // namespace
}  // namespace simt

#include "access_interface.h"

#define BK_SIM_EXPORT extern "C" __attribute__((visibility("default")))

BK_SIM_EXPORT void bayes_kernels_sim_reset_traffic() { simt::counter.kernels.clear(); }

// The number of kernels launched since the reset. Of kernel `index`, in alphabetical order: its
// name, and in `numbers` its launches, bytes loaded, bytes stored, sectors loaded, sectors stored;
// sectors that the second-level cache is asked for by loads; sectors read from memory, written to
// it.
BK_SIM_EXPORT std::uint64_t bayes_kernels_sim_traffic(std::uint64_t index, const char** name,
                                                      std::uint64_t* numbers) {
  std::uint64_t i = 0;
  for (const auto& entry : simt::counter.kernels) {
    if (i++ != index) continue;
    const simt::Traffic& t = entry.second;
    *name = entry.first.c_str();
    numbers[0] = t.launches;
    numbers[5] = t.of_blocks;
    for (int store = 0; store < 2; ++store) {
      numbers[1 + store] = t.bytes[store];
      numbers[3 + store] = t.sectors[store];
      numbers[6 + store] = t.memory[store];
    }
  }
  return simt::counter.kernels.size();
}
