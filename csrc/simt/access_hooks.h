// What the emulator tells the access check (access_check.cpp) or the count of bytes
// (access_count.cpp), when one of them is linked in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#pragma GCC visibility push(hidden)

namespace simt {

struct SharedRegion {
  std::string name;
  const void* site;  // null for the dynamic shared memory
  char* base;
  std::size_t bytes;
};

// The memory in which all shared arrays of a block lie, guard bytes between them.
struct SharedArena {
  char* base;
  std::size_t bytes;
  const std::vector<SharedRegion>* regions;
};
const SharedArena& shared_arena();

// Whether an address is on the stack of the thread that runs. Only inside kernels.
bool on_stack(const void* address);

// Whether the emulator carries out a warp operation, which reads the lanes' variables.
extern bool in_warp_operation;

// Linear index in its block of the thread that runs, or -1 outside kernels: of this host thread, as
// others may run host code, whose accesses are none of a kernel, meanwhile.
extern __thread int running_thread;

// Ends the launch with a fault of the running thread, without unwinding its stack: for calls the
// compiler believes not to throw.
[[noreturn]] void stop_kernel(const std::string& text);

struct AccessHooks {
  // `behind`: it may begin before the launch in front of it has ended.
  void (*launch_begins)(const char* kernel, bool behind);
  void (*launch_ends)();
  void (*block_begins)();
  void (*block_barrier)();
  void (*warp_barrier)(unsigned warp);
  // `thread` accesses shared memory.
  void (*read)(const void* address, std::size_t bytes, unsigned thread);
  void (*write)(const void* address, std::size_t bytes, unsigned thread);
  // The content becomes undefined: a cp.async is in flight.
  void (*forget)(const void* address, std::size_t bytes);
  // A cp.async of `thread` reads global memory; other reads of it are those of the instrumentation.
  void (*global_read)(const void* address, std::size_t bytes, unsigned thread);
  // `thread` says that nobody needs the 128 bytes any more.
  void (*discard)(const void* address, unsigned thread);
  // `thread` waits for the launch in front.
  void (*wait_for_previous)(unsigned thread);
  // A __threadfence; an atomic operation.
  void (*fence)(unsigned thread);
  void (*atomic)(unsigned thread);
};
// Null unless one of the two is linked in.
extern const AccessHooks* access_hooks;

}  // namespace simt

#pragma GCC visibility pop
