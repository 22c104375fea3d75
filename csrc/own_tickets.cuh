// Tickets that are zero whenever a kernel begins, so that one launch is enough: no other clears
// them before. They lie in the library's own memory on the GPU, which is zero when it is loaded,
// and the last block sets its ticket back to zero (ticket.cuh).
//
// Two kernels that run at the same time must not share a slot. Kernels of one stream run one after
// another, and so do those that one capture of a graph takes from one stream: each has a slot,
// which no other ever gets. Numbers of streams and captures are never used again in a process,
// unlike their handles. Where all slots are taken, the caller clears tickets of its own.
#pragma once

#include "cuda_portable.h"

#ifdef BAYES_KERNELS_SIM
// For tests: -1 stands for a GPU whose slots are taken.
extern "C" {
inline __attribute__((visibility("default"))) int bayes_kernels_sim_ticket_slot = 0;
}
#else
#include <map>
#include <mutex>
#include <tuple>
#endif

namespace bayes_kernels {
namespace {

constexpr int kTicketSlots = 256, kTicketsOfSlot = 128;

__device__ int own_tickets[kTicketSlots][kTicketsOfSlot];

#ifdef BAYES_KERNELS_SIM

// Launches run one after another.
inline int ticket_slot(void*) { return bayes_kernels_sim_ticket_slot; }

#else

// The slot of what is launched on a stream of the current device now; -1: none is left.
inline int ticket_slot(void* handle) {
#if CUDART_VERSION >= 12000
  const cudaStream_t stream = static_cast<cudaStream_t>(handle);
  int device = 0;
  unsigned long long number = 0, capture = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaGetDevice(&device) != cudaSuccess || cudaStreamGetId(stream, &number) != cudaSuccess ||
      cudaStreamGetCaptureInfo(stream, &status, &capture) != cudaSuccess) {
    cudaGetLastError();  // not of the launch
    return -1;
  }
  if (status != cudaStreamCaptureStatusActive) capture = 0;
  struct Slots {
    std::mutex mutex;
    std::map<std::tuple<int, bool, unsigned long long, unsigned long long>, int> of;
    std::map<int, int> taken;  // by device
  };
  static Slots& slots = *new Slots;  // threads may outlive static objects
  const std::lock_guard<std::mutex> lock(slots.mutex);
  const auto [found, added] =
      slots.of.try_emplace({device, status == cudaStreamCaptureStatusActive, number, capture}, -1);
  if (added && slots.taken[device] < kTicketSlots) found->second = slots.taken[device]++;
  return found->second;
#else
  static_cast<void>(handle);
  return -1;
#endif
}

#endif

}  // namespace
}  // namespace bayes_kernels
