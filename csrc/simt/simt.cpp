#include "simt.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "access_hooks.h"
#include "fiber.h"

#ifndef BAYES_KERNELS_SIM_UCONTEXT
#if defined(__x86_64__)
// The order of the pushes is the frame that Stack::prepare builds.
__asm__(R"(
.text
.globl bayes_kernels_sim_switch
.hidden bayes_kernels_sim_switch
.type bayes_kernels_sim_switch, @function
.align 16
bayes_kernels_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size bayes_kernels_sim_switch, .-bayes_kernels_sim_switch
)");
#elif defined(__aarch64__)
__asm__(R"(
.text
.globl bayes_kernels_sim_switch
.hidden bayes_kernels_sim_switch
.type bayes_kernels_sim_switch, %function
.align 4
bayes_kernels_sim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size bayes_kernels_sim_switch, .-bayes_kernels_sim_switch
)");
#endif
#endif

uint3 threadIdx{};
uint3 blockIdx{};
dim3 blockDim{};
dim3 gridDim{};

namespace simt {

__thread int running_thread = -1;
bool in_warp_operation = false;
const AccessHooks* access_hooks = nullptr;

namespace {

// SplitMix64: the same orders on every platform.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  // Fisher-Yates.
  template <class T>
  void shuffle(std::vector<T>& values) {
    for (std::size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[next() % i]);
  }

 private:
  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  std::uint64_t state_;
};

constexpr std::size_t default_shared_bytes = 48 * 1024;
constexpr std::size_t guard_bytes = 256;
constexpr unsigned char guard_pattern = 0xa5;
constexpr std::size_t arena_bytes = 512 * 1024;
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t stack_bytes = 256 * 1024;
#else
constexpr std::size_t stack_bytes = 128 * 1024;
#endif

struct Site {
  const char* operation = nullptr;
  const char* file = "";
  int line = 0;
};

bool same_site(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

std::string describe(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(site.operation) + " (" + (slash != nullptr ? slash + 1 : site.file) + ":" +
         std::to_string(site.line) + ")";
}

struct Fiber {
  explicit Fiber(unsigned index) : stack(stack_bytes), colour(index) {}
  Stack stack;
  Context context;
  unsigned colour;
  unsigned thread = 0;
};

enum class State : std::uint8_t { unstarted, ready, at_barrier, in_warp_operation, returned };

struct CopyAsync {
  char* destination;
  const char* source;
  int bytes_valid;
  int group;  // number of commits before it by its thread
};

struct Thread {
  uint3 index{};
  State state = State::unstarted;
  std::uint32_t mask = 0;  // of the warp operation it waits in
  Fiber* fiber = nullptr;
  Site site;  // where it waits
};

// The cp.async queue of a thread.
struct CopyQueue {
  int commits = 0;
  std::vector<CopyAsync> in_flight;  // oldest first
};

// A warp operation some lanes of its mask have reached.
struct Rendezvous {
  std::uint32_t mask = 0;
  std::uint32_t arrived = 0;
  Combine combine = nullptr;
  Site site;
  void* payloads[32];
};

struct Warp {
  std::vector<Rendezvous> open;
};

struct Machine {
  // The launch.
  const char* kernel_name = "";
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  unsigned n_threads = 0;
  std::size_t dynamic_bytes = 0;
  std::size_t static_bytes = 0;
  bool opted_in = false;
  bool behind = false;  // of the next launch

  // The block.
  std::vector<Thread> threads;
  std::vector<CopyQueue> copies;  // per thread
  std::vector<Warp> warps;
  std::vector<unsigned> schedule;  // the order in which threads get their turn
  std::size_t turn = 0;            // position in `schedule` of the thread that runs
  std::size_t turn_end = 0;        // a fiber that is done may take the turns up to here itself
  unsigned n_waiting = 0;          // at the barrier
  unsigned n_returned = 0;
  unsigned n_ready = 0;      // unstarted or ready
  std::size_t n_copies = 0;  // cp.async copies and commits issued
  Site barrier;

  // Kept from launch to launch.
  std::uint64_t launches = 0;
  Context host;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle_fibers;
  Fiber* running_fiber = nullptr;
  std::exception_ptr fault;
  std::map<const void*, std::size_t> max_dynamic_shared;
  std::unique_ptr<char[]> arena_memory;
  SharedArena arena{};
  std::vector<SharedRegion> regions;
  std::mutex mutex;
};

Machine machine;

std::string text_of(const uint3& v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

std::string text_of(std::uint32_t mask) {
  char buffer[16];
  std::snprintf(buffer, sizeof(buffer), "0x%08x", mask);
  return buffer;
}

// Stringised kernel names come as written: "(kernel<T, 16>)" or "kernel".
std::string plain_kernel_name() {
  std::string name = machine.kernel_name;
  if (name.size() > 2 && name.front() == '(' && name.back() == ')') {
    name = name.substr(1, name.size() - 2);
  }
  return name;
}

std::string where(int thread) {
  std::string text = "kernel " + plain_kernel_name() + ", block " + text_of(blockIdx);
  if (thread >= 0)
    text += ", thread " + text_of(machine.threads[static_cast<unsigned>(thread)].index);
  return text + ": ";
}

[[noreturn]] void fault_of(int thread, const std::string& text) {
  throw std::runtime_error("simt: " + where(thread) + text);
}

Thread& current() { return machine.threads[static_cast<unsigned>(running_thread)]; }
CopyQueue& current_copies() { return machine.copies[static_cast<unsigned>(running_thread)]; }

void require_kernel(const char* operation) {
  if (running_thread < 0) {
    throw std::runtime_error(std::string("simt: ") + operation +
                             " is for kernels, called outside one");
  }
}

// ---- shared memory

void set_guard(char* begin, std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(begin, bytes);
#else
  std::memset(begin, guard_pattern, bytes);
#endif
}

bool guard_intact([[maybe_unused]] const char* begin, [[maybe_unused]] std::size_t bytes) {
#if !defined(__SANITIZE_ADDRESS__)
  for (std::size_t i = 0; i < bytes; ++i) {
    if (static_cast<unsigned char>(begin[i]) != guard_pattern) return false;
  }
#endif
  return true;
}

std::size_t round_up(std::size_t bytes, std::size_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

// The guard after a region starts right behind its last byte and ends 16-byte aligned.
std::size_t trailing_guard(const SharedRegion& region) {
  return round_up(region.bytes, 16) - region.bytes + guard_bytes;
}

char* add_region(const char* name, const void* site, std::size_t bytes) {
  char* base = machine.arena.base + guard_bytes;
  if (!machine.regions.empty()) {
    const SharedRegion& last = machine.regions.back();
    base = last.base + last.bytes + trailing_guard(last);
  }
  const SharedRegion region{name, site, base, bytes};
  if (base + bytes + trailing_guard(region) > machine.arena.base + machine.arena.bytes) {
    fault_of(running_thread, "the shared arrays do not fit the emulator's arena");
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(base, bytes);
#endif
  set_guard(base + bytes, trailing_guard(region));
  machine.regions.push_back(region);
  return base;
}

void reset_arena() {
  if (!machine.arena_memory) {
    machine.arena_memory = std::make_unique<char[]>(arena_bytes + 128);
    const auto start = reinterpret_cast<std::uintptr_t>(machine.arena_memory.get());
    machine.arena.base = reinterpret_cast<char*>((start + 127) & ~std::uintptr_t{127});
    machine.arena.bytes = arena_bytes;
    machine.arena.regions = &machine.regions;
  }
  machine.regions.clear();
  machine.static_bytes = 0;
#if defined(__SANITIZE_ADDRESS__)
  set_guard(machine.arena.base, machine.arena.bytes);
#else
  set_guard(machine.arena.base, guard_bytes);
#endif
  add_region("the dynamic shared memory", nullptr, machine.dynamic_bytes);
}

void poison(char* begin, std::size_t bytes) { std::memset(begin, settings().poison, bytes); }

void check_guards() {
  const char* begin = machine.arena.base;
  if (!guard_intact(begin, guard_bytes)) {
    fault_of(-1, "store below the start of " + machine.regions.front().name);
  }
  for (const SharedRegion& region : machine.regions) {
    if (!guard_intact(region.base + region.bytes, trailing_guard(region))) {
      fault_of(-1, "store beyond the end of " + region.name + " (" + std::to_string(region.bytes) +
                       " bytes of shared memory), or below the start of the array after it");
    }
  }
}

bool inside_shared(const void* address, std::size_t bytes) {
  const char* begin = static_cast<const char*>(address);
  for (const SharedRegion& region : machine.regions) {
    if (begin >= region.base && begin + bytes <= region.base + region.bytes) return true;
  }
  return false;
}

// ---- scheduling

void make_ready(Thread& thread) {
  thread.state = State::ready;
  ++machine.n_ready;
}

// Suspends the running thread until something makes it ready.
void wait(State state, const Site& site) {
  Thread& thread = current();
  thread.state = state;
  thread.site = site;
  switch_context(thread.fiber->context, machine.host);
}

void open_barrier() {
  machine.n_waiting = 0;
  if (access_hooks != nullptr) access_hooks->block_barrier();
  for (unsigned i = 0; i < machine.n_threads; ++i) {
    Thread& thread = machine.threads[i];
    if (thread.state == State::at_barrier) make_ready(thread);
  }
}

void start(unsigned thread, Fiber* fiber) {
  fiber->thread = thread;
  machine.threads[thread].fiber = fiber;
}

void enter_thread(unsigned thread) {
  running_thread = static_cast<int>(thread);
  threadIdx = machine.threads[thread].index;
}

void finish_thread() {
  if (machine.n_copies != 0 && !current_copies().in_flight.empty()) {
    fail("cp.async copies are still in flight when the thread returns; wait for them");
  }
  current().state = State::returned;
  ++machine.n_returned;
  if (machine.n_waiting != 0 && machine.n_waiting + machine.n_returned == machine.n_threads) {
    open_barrier();
  }
}

// Runs the thread it was started for and, as long as the next turn belongs to a thread that has not
// started, that one too: without barriers a warp costs one switch.
void run_threads(Fiber& fiber) {
  for (;;) {
    machine.body(machine.arguments);
    finish_thread();
    const std::size_t next = machine.turn + 1;
    if (next >= machine.turn_end) return;
    const unsigned thread = machine.schedule[next];
    if (machine.threads[thread].state != State::unstarted) return;
    machine.turn = next;
    --machine.n_ready;
    start(thread, &fiber);
    enter_thread(thread);
  }
}

void fiber_main() {
  enter_context(machine.host);
  for (;;) {
    Fiber& fiber = *machine.running_fiber;
    try {
      run_threads(fiber);
    } catch (...) {
      machine.fault = std::current_exception();
    }
    machine.idle_fibers.push_back(&fiber);
    switch_context(fiber.context, machine.host);
  }
}

Fiber* idle_fiber() {
  if (machine.idle_fibers.empty()) {
    const unsigned index = static_cast<unsigned>(machine.fibers.size());
    machine.fibers.push_back(std::make_unique<Fiber>(index));
    Fiber& fiber = *machine.fibers.back();
    fiber.stack.prepare(fiber.context, fiber_main, fiber.colour);
    machine.idle_fibers.reserve(machine.fibers.size());
    return &fiber;
  }
  Fiber* fiber = machine.idle_fibers.back();
  machine.idle_fibers.pop_back();
  return fiber;
}

void resume(unsigned thread) {
  Thread& t = machine.threads[thread];
  --machine.n_ready;
  if (t.state == State::unstarted) start(thread, idle_fiber());
  t.state = State::ready;
  machine.running_fiber = t.fiber;
  enter_thread(thread);
  switch_context(machine.host, t.fiber->context);
  running_thread = -1;
  if (machine.fault) {
    std::exception_ptr fault = machine.fault;
    machine.fault = nullptr;
    std::rethrow_exception(fault);
  }
}

// Gives every runnable thread in [begin, end) of the schedule a turn.
bool run_turns(std::size_t begin, std::size_t end) {
  bool ran = false;
  machine.turn_end = end;
  for (machine.turn = begin; machine.turn < end; ++machine.turn) {
    const unsigned thread = machine.schedule[machine.turn];
    const State state = machine.threads[thread].state;
    if (state == State::unstarted || state == State::ready) {
      resume(thread);
      ran = true;
    }
  }
  return ran;
}

std::string describe_state(unsigned lane_thread) {
  if (lane_thread >= machine.n_threads) return "does not exist";
  const Thread& thread = machine.threads[lane_thread];
  switch (thread.state) {
    case State::returned:
      return "has returned";
    case State::at_barrier:
      return "waits at " + describe(thread.site);
    case State::in_warp_operation:
      return "waits in " + describe(thread.site) + " with mask " + text_of(thread.mask);
    default:
      return "is runnable";
  }
}

// Nothing can run and not all have returned: some lane waits in a warp operation for one that will
// not come.
[[noreturn]] void report_deadlock() {
  for (unsigned w = 0; w < machine.warps.size(); ++w) {
    for (const Rendezvous& open : machine.warps[w].open) {
      const unsigned first = w * 32 + static_cast<unsigned>(__builtin_ctz(open.arrived));
      const unsigned missing =
          w * 32 + static_cast<unsigned>(__builtin_ctz(open.mask & ~open.arrived));
      fault_of(static_cast<int>(first), "deadlock: " + describe(open.site) + " with mask " +
                                            text_of(open.mask) + " waits for lane " +
                                            std::to_string(missing % 32) + ", which " +
                                            describe_state(missing));
    }
  }
  fault_of(-1, "deadlock");
}

void run_block(Random& random) {
  const unsigned n = machine.n_threads;
  const Order order = settings().order;
  for (const SharedRegion& region : machine.regions) poison(region.base, region.bytes);
  for (unsigned i = 0; i < n; ++i) {
    Thread& thread = machine.threads[i];
    thread.state = State::unstarted;
    machine.schedule[i] = order == Order::reverse ? n - 1 - i : i;
  }
  for (Warp& warp : machine.warps) warp.open.clear();
  if (machine.n_copies != 0) {
    for (CopyQueue& queue : machine.copies) queue = CopyQueue{};
    machine.n_copies = 0;
  }
  machine.n_waiting = 0;
  machine.n_returned = 0;
  machine.n_ready = n;
  if (access_hooks != nullptr) access_hooks->block_begins();

  while (machine.n_returned != n) {
    if (machine.n_ready == 0) report_deadlock();
    if (order == Order::random) {
      random.shuffle(machine.schedule);
      run_turns(0, n);
    } else {
      // Each warp goes as far as it can before the next one starts: its stacks stay in cache.
      for (std::size_t begin = 0; begin < n; begin += 32) {
        const std::size_t end = std::min<std::size_t>(begin + 32, n);
        while (run_turns(begin, end)) {
        }
        if (machine.n_ready == 0) break;
      }
    }
  }
  check_guards();
}

// After a fault the fibers of the block are in the middle of its kernel; all start afresh.
void abandon_fibers() {
  running_thread = -1;
  in_warp_operation = false;
  machine.fault = nullptr;
  machine.idle_fibers.clear();
  for (auto& fiber : machine.fibers) {
    fiber->stack.prepare(fiber->context, fiber_main, fiber->colour);
    machine.idle_fibers.push_back(fiber.get());
  }
}

// A bad value in the environment is reported by the first launch: settings() is also called from C.
std::string environment_fault;

Settings settings_from_environment() {
  Settings result{Order::forward, 1, 0xff, 232448};
  if (const char* order = std::getenv("BAYES_KERNELS_SIM_ORDER")) {
    const std::string text = order;
    if (text == "forward") {
      result.order = Order::forward;
    } else if (text == "reverse") {
      result.order = Order::reverse;
    } else if (text == "random") {
      result.order = Order::random;
    } else {
      environment_fault = "BAYES_KERNELS_SIM_ORDER must be forward, reverse or random, got " + text;
    }
  }
  if (const char* seed = std::getenv("BAYES_KERNELS_SIM_SEED")) {
    result.seed = std::strtoull(seed, nullptr, 0);
  }
  if (const char* value = std::getenv("BAYES_KERNELS_SIM_POISON")) {
    result.poison = static_cast<std::uint8_t>(std::strtoul(value, nullptr, 0));
  }
  return result;
}

void check_launch(dim3 grid, dim3 block, std::size_t dynamic_bytes, std::size_t opted_in_bytes) {
  const auto refuse = [](const std::string& text) {
    throw std::runtime_error("simt: kernel " + plain_kernel_name() + ": " + text);
  };
  (void)settings();
  if (!environment_fault.empty()) refuse(environment_fault);
  const std::uint64_t n = std::uint64_t{block.x} * block.y * block.z;
  if (n < 1 || block.x > 1024 || block.y > 1024 || block.z > 64 || n > 1024) {
    refuse("a block must have 1 to 1024 threads (at most 64 in z), got " +
           text_of(uint3{block.x, block.y, block.z}));
  }
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    refuse("a grid must have 1 to 2147483647 blocks in x and 1 to 65535 in y and z, got " +
           text_of(uint3{grid.x, grid.y, grid.z}));
  }
  if (dynamic_bytes > std::max(opted_in_bytes, default_shared_bytes)) {
    refuse(std::to_string(dynamic_bytes) + " bytes of dynamic shared memory, but " +
           std::to_string(std::max(opted_in_bytes, default_shared_bytes)) +
           " are allowed; call bk_set_max_dynamic_smem before the launch");
  }
}

}  // namespace

// ---- the interface of simt.h

Settings& settings() {
  static Settings instance = settings_from_environment();
  return instance;
}

const SharedArena& shared_arena() { return machine.arena; }

bool on_stack(const void* address) {
  const char* at = static_cast<const char*>(address);
  const Stack& stack = current().fiber->stack;
  return at >= stack.bottom() && at < stack.bottom() + stack.bytes();
}

void fail(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof(buffer), format, arguments);
  va_end(arguments);
  if (running_thread < 0) throw std::runtime_error(std::string("simt: ") + buffer);
  fault_of(running_thread, buffer);
}

void stop_kernel(const std::string& text) {
  machine.fault =
      std::make_exception_ptr(std::runtime_error("simt: " + where(running_thread) + text));
  for (;;) switch_context(current().fiber->context, machine.host);
}

unsigned lane_id() { return static_cast<unsigned>(running_thread) % 32; }

void* dynamic_shared() {
  require_kernel("BK_DYNAMIC_SHARED");
  return machine.regions.front().base;
}

void* static_shared(const void* site, const char* name, std::size_t bytes) {
  require_kernel("BK_SHARED");
  for (const SharedRegion& region : machine.regions) {
    if (region.site == site) return region.base;
  }
  machine.static_bytes += round_up(bytes, 16);
  const std::size_t total = machine.static_bytes + machine.dynamic_bytes;
  if (machine.static_bytes > default_shared_bytes) {
    fail("%zu bytes of static shared memory, at most %zu are allowed", machine.static_bytes,
         default_shared_bytes);
  }
  const std::size_t limit = machine.opted_in ? settings().max_shared_bytes : default_shared_bytes;
  if (total > limit) {
    fail("%zu bytes of static and dynamic shared memory, at most %zu are allowed", total, limit);
  }
  char* base = add_region(name, site, bytes);
  poison(base, bytes);
  return base;
}

void set_max_dynamic_shared(const void* kernel, std::size_t bytes) {
  if (bytes > settings().max_shared_bytes) {
    fail("bk_set_max_dynamic_smem: at most %u bytes, got %zu", settings().max_shared_bytes, bytes);
  }
  const std::lock_guard<std::mutex> lock(machine.mutex);
  std::size_t& limit = machine.max_dynamic_shared[kernel];
  if (bytes > limit) limit = bytes;
}

void block_barrier(const char* file, int line) {
  require_kernel("__syncthreads");
  const Site site{"__syncthreads", file, line};
  if (machine.n_waiting == 0) {
    machine.barrier = site;
  } else if (!same_site(machine.barrier, site)) {
    fail("divergent barrier: at %s while other threads wait at %s", describe(site).c_str(),
         describe(machine.barrier).c_str());
  }
  ++machine.n_waiting;
  if (machine.n_waiting + machine.n_returned == machine.n_threads) {
    open_barrier();
    return;
  }
  wait(State::at_barrier, site);
}

void warp_collective(const char* name, std::uint32_t mask, void* payload, Combine combine,
                     const char* file, int line) {
  require_kernel(name);
  const Site site{name, file, line};
  const unsigned thread = static_cast<unsigned>(running_thread);
  const unsigned lane = thread % 32;
  const unsigned warp_begin = thread - lane;
  const unsigned lanes = std::min(32u, machine.n_threads - warp_begin);
  if ((mask >> lane & 1u) == 0) {
    fail("%s is called by lane %u, which is not in its mask 0x%08x", describe(site).c_str(), lane,
         mask);
  }
  if (lanes < 32) mask &= (1u << lanes) - 1;

  std::vector<Rendezvous>& open = machine.warps[thread / 32].open;
  std::size_t slot = 0;
  while (slot < open.size() && open[slot].mask != mask) ++slot;
  if (slot == open.size()) {
    open.emplace_back();
    open[slot].mask = mask;
    open[slot].combine = combine;
    open[slot].site = site;
  } else if (open[slot].combine != combine) {
    fail("lanes of one warp meet at different operations with mask 0x%08x: %s and %s", mask,
         describe(site).c_str(), describe(open[slot].site).c_str());
  }
  open[slot].payloads[lane] = payload;
  open[slot].arrived |= 1u << lane;
  if (open[slot].arrived != mask) {
    current().mask = mask;
    wait(State::in_warp_operation, site);
    return;
  }
  in_warp_operation = true;
  combine(mask, open[slot].payloads);
  in_warp_operation = false;
  for (unsigned other = 0; other < lanes; ++other) {
    if (other != lane && (mask >> other & 1u) != 0) make_ready(machine.threads[warp_begin + other]);
  }
  if (slot + 1 != open.size()) open[slot] = open.back();
  open.pop_back();
}

void warp_barrier(std::uint32_t mask, const char* file, int line) {
  warp_collective(
      "__syncwarp", mask, nullptr,
      [](std::uint32_t, void* const*) {
        if (access_hooks != nullptr) {
          access_hooks->warp_barrier(static_cast<unsigned>(running_thread) / 32);
        }
      },
      file, line);
}

void combine_shuffle(std::uint32_t mask, void* const* payloads, const char* name) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    Shuffle& own = *static_cast<Shuffle*>(payloads[lane]);
    if (own.source >= 32 || (mask >> own.source & 1u) == 0) {
      const int thread = running_thread - running_thread % 32 + static_cast<int>(lane);
      fault_of(thread, std::string(name) + " reads from lane " + std::to_string(own.source) +
                           ", which takes no part (mask " + text_of(mask) + ")");
    }
    own.result = static_cast<const Shuffle*>(payloads[own.source])->bits;
  }
}

std::uint32_t ballot(const char* name, std::uint32_t mask, bool predicate, const char* file,
                     int line) {
  std::uint32_t payload = predicate ? 1 : 0;
  warp_collective(
      name, mask, &payload,
      [](std::uint32_t m, void* const* payloads) {
        std::uint32_t votes = 0;
        for (unsigned lane = 0; lane < 32; ++lane) {
          if ((m >> lane & 1u) != 0) votes |= *static_cast<std::uint32_t*>(payloads[lane]) << lane;
        }
        for (unsigned lane = 0; lane < 32; ++lane) {
          if ((m >> lane & 1u) != 0) *static_cast<std::uint32_t*>(payloads[lane]) = votes;
        }
      },
      file, line);
  return payload;
}

void thread_fence() {
  if (access_hooks != nullptr) access_hooks->fence(static_cast<unsigned>(running_thread));
}
void atomic_operation() {
  if (access_hooks != nullptr) access_hooks->atomic(static_cast<unsigned>(running_thread));
}

// ---- cp.async

void copy_async_16(void* destination, const void* source, int bytes_valid, const char* file,
                   int line) {
  require_kernel("bk_cp_async_16");
  const Site site{"bk_cp_async_16", file, line};
  if (bytes_valid < 0 || bytes_valid > 16) {
    fail("%s: bytes_valid must be 0 to 16, got %d", describe(site).c_str(), bytes_valid);
  }
  if (!inside_shared(destination, 16)) {
    fail("%s: the 16 destination bytes are not inside a shared array", describe(site).c_str());
  }
  if (reinterpret_cast<std::uintptr_t>(destination) % 16 != 0 ||
      (bytes_valid != 0 && reinterpret_cast<std::uintptr_t>(source) % 16 != 0)) {
    fail("%s: source and destination must be 16-byte aligned", describe(site).c_str());
  }
  CopyQueue& queue = current_copies();
  poison(static_cast<char*>(destination), 16);
  if (access_hooks != nullptr) {
    access_hooks->write(destination, 16, static_cast<unsigned>(running_thread));
    access_hooks->forget(destination, 16);
    if (bytes_valid > 0) {
      access_hooks->global_read(source, static_cast<std::size_t>(bytes_valid),
                                static_cast<unsigned>(running_thread));
    }
  }
  ++machine.n_copies;
  queue.in_flight.push_back(CopyAsync{static_cast<char*>(destination),
                                      static_cast<const char*>(source), bytes_valid,
                                      queue.commits});
}

void copy_async_commit() {
  require_kernel("bk_cp_async_commit");
  ++machine.n_copies;
  ++current_copies().commits;
}

void copy_async_wait(int groups_in_flight) {
  require_kernel("bk_cp_async_wait");
  CopyQueue& queue = current_copies();
  // Copies that no commit has closed belong to no group and stay in flight.
  const int first_in_flight = queue.commits - groups_in_flight;
  std::size_t done = 0;
  for (; done < queue.in_flight.size() && queue.in_flight[done].group < first_in_flight; ++done) {
    const CopyAsync& copy = queue.in_flight[done];
    char bytes[16] = {};
    if (copy.bytes_valid > 0) {
      std::memcpy(bytes, copy.source, static_cast<std::size_t>(copy.bytes_valid));
    }
    std::memcpy(copy.destination, bytes, sizeof(bytes));
    if (access_hooks != nullptr) {
      access_hooks->write(copy.destination, 16, static_cast<unsigned>(running_thread));
    }
  }
  queue.in_flight.erase(queue.in_flight.begin(),
                        queue.in_flight.begin() + static_cast<std::ptrdiff_t>(done));
}

// ---- launches behind others

void next_launch_is_behind(bool behind) { machine.behind = behind; }

void wait_for_previous() {
  require_kernel("bk_wait_for_previous");
  if (access_hooks != nullptr)
    access_hooks->wait_for_previous(static_cast<unsigned>(running_thread));
}

// ---- discarded lines

void discard_128(void* address, const char* file, int line) {
  require_kernel("bk_discard_128");
  if (reinterpret_cast<std::uintptr_t>(address) % 128 != 0)
    fail("bk_discard_128 at %s:%d: the address must be a multiple of 128", file, line);
  if (access_hooks != nullptr)
    access_hooks->discard(address, static_cast<unsigned>(running_thread));
  std::memset(address, 0xFF, 128);
}

// ---- tensor cores

namespace {

float from_bf16(std::uint32_t bits) {
  const std::uint32_t wide = bits << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

float from_fp16(std::uint32_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16;
  const std::uint32_t exponent = bits >> 10 & 0x1fu;
  const std::uint32_t fraction = bits & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24, exact
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t wide =
      sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

struct MmaPayload {
  float* d;
  const std::uint32_t* a;
  const std::uint32_t* b;
};

using Row = float __attribute__((vector_size(32)));  // 8 columns

// The whole warp's product at once, by the lane that came last.
template <float (*Convert)(std::uint32_t)>
void combine_mma(std::uint32_t, void* const* payloads) {
  float a[16][16];
  Row b[16];
  for (unsigned lane = 0; lane < 32; ++lane) {
    const MmaPayload& own = *static_cast<const MmaPayload*>(payloads[lane]);
    const unsigned g = lane / 4;
    const unsigned t = lane % 4;
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = g + 8 * (i % 2);
      const unsigned column = 2 * t + 8 * (i / 2);
      a[row][column] = Convert(own.a[i] & 0xffffu);
      a[row][column + 1] = Convert(own.a[i] >> 16);
    }
    for (unsigned i = 0; i < 2; ++i) {
      b[2 * t + 8 * i][g] = Convert(own.b[i] & 0xffffu);
      b[2 * t + 8 * i + 1][g] = Convert(own.b[i] >> 16);
    }
  }
  Row d[16];
  for (unsigned lane = 0; lane < 32; ++lane) {
    const float* own = static_cast<const MmaPayload*>(payloads[lane])->d;
    for (unsigned i = 0; i < 4; ++i) d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2] = own[i];
  }
  for (unsigned m = 0; m < 16; ++m) {
    for (unsigned k = 0; k < 16; ++k) d[m] += a[m][k] * b[k];
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    float* own = static_cast<const MmaPayload*>(payloads[lane])->d;
    for (unsigned i = 0; i < 4; ++i) own[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

struct LoadMatrixPayload {
  const void* row;
  std::uint32_t* out;
};

template <unsigned Count, bool Transposed>
void combine_load_matrix(std::uint32_t, void* const* payloads) {
  std::uint16_t matrix[Count][8][8];
  for (unsigned lane = 0; lane < 8 * Count; ++lane) {
    const void* row = static_cast<const LoadMatrixPayload*>(payloads[lane])->row;
    std::memcpy(matrix[lane / 8][lane % 8], row, 16);
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    std::uint32_t* out = static_cast<const LoadMatrixPayload*>(payloads[lane])->out;
    const unsigned g = lane / 4;
    const unsigned t = lane % 4;
    for (unsigned i = 0; i < Count; ++i) {
      const std::uint32_t low = Transposed ? matrix[i][2 * t][g] : matrix[i][g][2 * t];
      const std::uint32_t high = Transposed ? matrix[i][2 * t + 1][g] : matrix[i][g][2 * t + 1];
      out[i] = low | high << 16;
    }
  }
}

void require_full_warp(const char* name) {
  const unsigned thread = static_cast<unsigned>(running_thread);
  if (thread - thread % 32 + 32 > machine.n_threads) {
    fail("%s needs all 32 lanes of a warp, the block ends within it", name);
  }
}

}  // namespace

void mma_m16n8k16(MmaInput input, float* d, const std::uint32_t* a, const std::uint32_t* b,
                  const char* file, int line) {
  require_kernel("mma_m16n8k16");
  require_full_warp("mma_m16n8k16");
  MmaPayload payload{d, a, b};
  warp_collective("mma_m16n8k16", 0xffffffffu, &payload,
                  input == MmaInput::bf16 ? combine_mma<from_bf16> : combine_mma<from_fp16>, file,
                  line);
}

void load_matrix(int count, bool transposed, std::uint32_t* out, const void* row, const char* file,
                 int line) {
  require_kernel("ldmatrix");
  require_full_warp("ldmatrix");
  const Site site{"ldmatrix", file, line};
  if (lane_id() < 8 * static_cast<unsigned>(count)) {
    if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) {
      fail("%s: the row address must be 16-byte aligned", describe(site).c_str());
    }
    if (!inside_shared(row, 16)) {
      fail("%s: the 16 bytes of the row are not inside a shared array", describe(site).c_str());
    }
    if (access_hooks != nullptr) access_hooks->read(row, 16, static_cast<unsigned>(running_thread));
  }
  LoadMatrixPayload payload{row, out};
  Combine combine = nullptr;
  if (count == 2) {
    combine = transposed ? combine_load_matrix<2, true> : combine_load_matrix<2, false>;
  } else {
    combine = transposed ? combine_load_matrix<4, true> : combine_load_matrix<4, false>;
  }
  warp_collective("ldmatrix", 0xffffffffu, &payload, combine, file, line);
}

void transpose_matrix(int count, std::uint32_t* registers, const char* file, int line) {
  require_kernel("movmatrix");
  require_full_warp("movmatrix");
  struct Payload {
    std::uint32_t* registers;
    int count;
  } payload{registers, count};
  warp_collective(
      "movmatrix", 0xffffffffu, &payload,
      [](std::uint32_t, void* const* payloads) {
        const auto lane = [&](unsigned i) { return static_cast<Payload*>(payloads[i])->registers; };
        for (int i = 0; i < static_cast<Payload*>(payloads[0])->count; ++i) {
          std::uint16_t matrix[8][8];
          for (unsigned l = 0; l < 32; ++l) {
            matrix[l / 4][2 * (l % 4)] = static_cast<std::uint16_t>(lane(l)[i]);
            matrix[l / 4][2 * (l % 4) + 1] = static_cast<std::uint16_t>(lane(l)[i] >> 16);
          }
          for (unsigned l = 0; l < 32; ++l) {
            const unsigned g = l / 4, t = l % 4;
            lane(l)[i] = matrix[2 * t][g] | static_cast<std::uint32_t>(matrix[2 * t + 1][g]) << 16;
          }
        }
      },
      file, line);
}

// ---- launch

void run_grid(const char* kernel_name, const void* kernel, dim3 grid, dim3 block,
              std::size_t dynamic_bytes, void (*body)(void*), void* arguments) {
  // Launches of several host threads queue up at the mutex; one from inside a kernel would wait for
  // itself.
  static thread_local bool launching = false;
  if (launching) fail("a kernel launches a kernel");
  const std::lock_guard<std::mutex> lock(machine.mutex);
  struct Launching {
    Launching() { launching = true; }
    ~Launching() { launching = false; }
  } const mark;
  machine.kernel_name = kernel_name;
  const auto opted_in = machine.max_dynamic_shared.find(kernel);
  machine.opted_in = opted_in != machine.max_dynamic_shared.end();
  check_launch(grid, block, dynamic_bytes, machine.opted_in ? opted_in->second : 0);
  ++machine.launches;

  machine.body = body;
  machine.arguments = arguments;
  machine.dynamic_bytes = dynamic_bytes;
  machine.n_threads = block.x * block.y * block.z;
  machine.threads.resize(machine.n_threads);
  machine.copies.resize(machine.n_threads);
  for (unsigned i = 0; i < machine.n_threads; ++i) {
    machine.threads[i].index = uint3{i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  }
  machine.warps.resize((machine.n_threads + 31) / 32);
  machine.schedule.resize(machine.n_threads);
  blockDim = block;
  gridDim = grid;
  reset_arena();
  const bool behind = std::exchange(machine.behind, false);
  if (access_hooks != nullptr) access_hooks->launch_begins(plain_kernel_name().c_str(), behind);

  const std::uint64_t n_blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  Random random(settings().seed);
  std::vector<std::uint64_t> shuffled;
  if (settings().order == Order::random) {
    shuffled.resize(n_blocks);
    for (std::uint64_t i = 0; i < n_blocks; ++i) shuffled[i] = i;
    random.shuffle(shuffled);
  }
  try {
    for (std::uint64_t turn = 0; turn < n_blocks; ++turn) {
      std::uint64_t index = turn;
      if (settings().order == Order::reverse) index = n_blocks - 1 - turn;
      if (settings().order == Order::random) index = shuffled[turn];
      blockIdx = uint3{static_cast<unsigned>(index % grid.x),
                       static_cast<unsigned>(index / grid.x % grid.y),
                       static_cast<unsigned>(index / (std::uint64_t{grid.x} * grid.y))};
      run_block(random);
    }
  } catch (...) {
    abandon_fibers();
    throw;
  }
  if (access_hooks != nullptr) access_hooks->launch_ends();
}

}  // namespace simt

// ---- controls for tests that load the library

#define BK_SIM_EXPORT extern "C" __attribute__((visibility("default")))

// 0 forward, 1 reverse, 2 random; anything else is refused: returns 0 on success and -1 otherwise.
BK_SIM_EXPORT int bayes_kernels_sim_set_order(int order) {
  if (order < 0 || order > 2) return -1;
  simt::settings().order = static_cast<simt::Order>(order);
  return 0;
}
// The opt-in limit of shared memory per block that the emulated device reports: 232448 (compute
// capability 9.0 and 10.0, the default), 166912 (8.0), 101376 (8.6, 8.9, 12.0). Returns -1 beyond
// the first.
BK_SIM_EXPORT int bayes_kernels_sim_set_max_shared_bytes(unsigned bytes) {
  if (bytes < 48 * 1024 || bytes > 232448) return -1;
  simt::settings().max_shared_bytes = bytes;
  return 0;
}
// Kernels launched since the library was loaded.
BK_SIM_EXPORT std::uint64_t bayes_kernels_sim_launches() {
  const std::lock_guard<std::mutex> lock(simt::machine.mutex);
  return simt::machine.launches;
}
BK_SIM_EXPORT int bayes_kernels_sim_get_order() { return static_cast<int>(simt::settings().order); }
BK_SIM_EXPORT std::uint64_t bayes_kernels_sim_get_seed() { return simt::settings().seed; }
BK_SIM_EXPORT std::uint8_t bayes_kernels_sim_get_poison() { return simt::settings().poison; }
BK_SIM_EXPORT void bayes_kernels_sim_set_seed(std::uint64_t seed) { simt::settings().seed = seed; }
BK_SIM_EXPORT void bayes_kernels_sim_set_poison(std::uint8_t poison) {
  simt::settings().poison = poison;
}
