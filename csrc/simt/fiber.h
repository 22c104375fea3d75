// Stackful fibers: a stack with a guard page, and a switch between stacks.
//
// On x86-64 and AArch64 the switch is a dozen instructions; glibc's swapcontext, the fallback
// elsewhere (or with BAYES_KERNELS_SIM_UCONTEXT), saves the signal mask and so costs a system call.
// Under AddressSanitizer every switch tells it which stack is current.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(BAYES_KERNELS_SIM_UCONTEXT)
#define BAYES_KERNELS_SIM_UCONTEXT
#endif
#ifdef BAYES_KERNELS_SIM_UCONTEXT
#include <ucontext.h>
#endif

#ifndef BAYES_KERNELS_SIM_UCONTEXT
// Saves the callee-saved registers and the stack pointer of the caller in *save and continues at
// `load`.
extern "C" void bayes_kernels_sim_switch(void** save, void* load);
#endif

namespace simt {

// The execution state of one stack: a fiber's, or the host thread's own.
struct Context {
#ifdef BAYES_KERNELS_SIM_UCONTEXT
  ucontext_t machine;
#else
  void* stack_pointer = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  std::size_t stack_bytes = 0;
#endif
};

// A context that is switched to comes back to the one it was entered from: fibers switch only to
// the host thread and it only to fibers. So on return `to` is the stack control comes from, and its
// bounds are noted again, as the next launch may be another host thread's.
inline void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
#ifdef BAYES_KERNELS_SIM_UCONTEXT
  swapcontext(&from.machine, &to.machine);
#else
  bayes_kernels_sim_switch(&from.stack_pointer, to.stack_pointer);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, &to.stack_bottom, &to.stack_bytes);
#endif
}

// To be called first on a fresh fiber: completes the switch that started it, and learns the bounds
// of the stack it came from.
inline void enter_context([[maybe_unused]] Context& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &from.stack_bottom, &from.stack_bytes);
#endif
}

class Stack {
 public:
  explicit Stack(std::size_t bytes) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    bytes_ = (bytes + page - 1) / page * page + page;
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    mprotect(memory_, page, PROT_NONE);
    guard_ = page;
  }
  ~Stack() { munmap(memory_, bytes_); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return memory_ + guard_; }
  std::size_t bytes() const { return bytes_ - guard_; }

  // Makes `context` start `entry` on this stack. `colour` shifts the start: stacks that all begin
  // at the same offset of a page would compete for the same cache sets.
  void prepare(Context& context, void (*entry)(), unsigned colour) const {
    const std::size_t usable = bytes() - (colour % 16) * 256;
#if defined(__SANITIZE_ADDRESS__)
    // Frames that were abandoned after a fault have left poison behind.
    __asan_unpoison_memory_region(bottom(), bytes());
    context.fake_stack = nullptr;
    context.stack_bottom = bottom();
    context.stack_bytes = bytes();
#endif
#ifdef BAYES_KERNELS_SIM_UCONTEXT
    getcontext(&context.machine);
    context.machine.uc_stack.ss_sp = bottom();
    context.machine.uc_stack.ss_size = usable;
    context.machine.uc_link = nullptr;
    makecontext(&context.machine, entry, 0);
#else
    // What bayes_kernels_sim_switch pops: zeroed registers, then `entry` as the return address.
    const std::uintptr_t top =
        (reinterpret_cast<std::uintptr_t>(bottom()) + usable) & ~std::uintptr_t{15};
#if defined(__x86_64__)
    constexpr std::size_t saved = 6;  // rbp rbx r12 r13 r14 r15
    void** frame = reinterpret_cast<void**>(top) - (saved + 2);
    for (std::size_t i = 0; i < saved + 2; ++i) frame[i] = nullptr;
    frame[saved] = reinterpret_cast<void*>(entry);  // and a null return address of `entry` above it
#else
    constexpr std::size_t saved = 20;  // x19 to x30, d8 to d15
    void** frame = reinterpret_cast<void**>(top) - saved;
    for (std::size_t i = 0; i < saved; ++i) frame[i] = nullptr;
    frame[11] = reinterpret_cast<void*>(entry);  // x30, the link register
#endif
    context.stack_pointer = frame;
#endif
  }

 private:
  char* memory_ = nullptr;
  std::size_t bytes_ = 0;
  std::size_t guard_ = 0;
};

}  // namespace simt
