// Test program of the emulator: `simt_test CASE` runs one case; a fault goes to stderr and the exit
// status is 1. python_tests/csrc/test_simt.py says which cases must pass and which must be caught,
// and in which builds.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../simt/checks.h"
#include "simt_kernels.h"

using namespace simt_test;
using simt::GuardedArray;

namespace {

void require(bool condition, const std::string& text) {
  if (!condition) throw std::runtime_error("wrong result: " + text);
}

// A correct kernel gives the same bits in every order and with every poison, and keeps to its
// arrays.
template <class T, class Launch>
void stable(const Launch& launch, GuardedArray<T>& out) {
  simt::race_check(launch, {out.region()});
  simt::check_uninitialized(launch, {out.region()});
  out.check();
}

// A linear congruential generator (Knuth's MMIX constants).
struct Random {
  std::uint64_t state;
  unsigned bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<unsigned>(state >> 33);
  }
  int integer(int limit) {
    return static_cast<int>(bits() % static_cast<unsigned>(2 * limit + 1)) - limit;
  }
  float uniform() { return static_cast<float>(bits()) * 0x1p-30f - 1.0f; }
};

std::vector<float> small_integers(std::size_t n, unsigned seed) {
  Random random{seed};
  std::vector<float> values(n);
  for (float& value : values) value = static_cast<float>(random.integer(4));
  return values;
}

// ---- correct kernels

void gram_is_right(int n) {
  const std::vector<float> rows = small_integers(16 * static_cast<std::size_t>(n), 1);
  GuardedArray<float> out(256, -1.0f);
  stable([&] { gram(GramFault::none, rows.data(), out.data(), n); }, out);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      float expected = 0.0f;
      for (int k = 0; k < n; ++k) {
        expected +=
            rows[static_cast<std::size_t>(i * n + k)] * rows[static_cast<std::size_t>(j * n + k)];
      }
      require(out[static_cast<std::size_t>(i * 16 + j)] == expected, "gram");
    }
  }
}

void block_sum_is_right() {
  const std::vector<float> in = small_integers(3 * 256, 2);
  GuardedArray<float> out(3 * 256);
  stable([&] { block_sum(in.data(), out.data(), 3); }, out);
  for (std::size_t i = 0; i < in.size(); ++i) {
    float expected = 0.0f;
    for (std::size_t j = 0; j < 256; ++j) expected += in[i / 256 * 256 + j];
    require(out[i] == expected, "block sum");
  }
}

void warp_operations_are_right() {
  GuardedArray<int> out(32 * 8);
  stable([&] { warp_operations(out.data()); }, out);
  for (int lane = 0; lane < 32; ++lane) {
    const int* own = out.data() + 8 * lane;
    require(own[0] == 10 * (31 - lane), "__shfl_sync");
    require(own[1] == 10 * (lane ^ 5), "__shfl_xor_sync");
    require(own[2] == 10 * (lane % 8 + 3 < 8 ? lane + 3 : lane), "__shfl_down_sync");
    require(own[3] == 10 * (lane % 8 >= 3 ? lane - 3 : lane), "__shfl_up_sync");
    require(own[4] == static_cast<int>(0xaaaaaaaau), "__ballot_sync");
    require(own[5] == 1 && own[6] == 0, "__any_sync, __all_sync");
    require(own[7] == 16, "__shfl_sync of double");
  }
}

enum class Layout { b_n_by_k, b_k_by_n, a_k_by_m };

// Small integers must come out exactly; random numbers to fp32 accuracy of the rounded inputs.
template <class Element>
void matmul_is_right(Layout layout, bool integers) {
  constexpr int m = 32, n = 48, k = 80;
  Random random{3};
  std::vector<Element> a(m * k), b(n * k);
  std::vector<double> a_mk(m * k), b_kn(k * n);
  const auto draw = [&] {
    return integers ? static_cast<float>(random.integer(8)) : random.uniform();
  };
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < k; ++j) {
      const Element value = static_cast<Element>(draw());
      a[static_cast<std::size_t>(layout == Layout::a_k_by_m ? j * m + i : i * k + j)] = value;
      a_mk[static_cast<std::size_t>(i * k + j)] = static_cast<float>(value);
    }
  }
  for (int i = 0; i < k; ++i) {
    for (int j = 0; j < n; ++j) {
      const Element value = static_cast<Element>(draw());
      b[static_cast<std::size_t>(layout == Layout::b_k_by_n ? i * n + j : j * k + i)] = value;
      b_kn[static_cast<std::size_t>(i * n + j)] = static_cast<float>(value);
    }
  }
  GuardedArray<float> c(m * n);
  stable(
      [&] {
        if (layout == Layout::a_k_by_m) {
          matmul_transposed_a(a.data(), b.data(), c.data(), m, n, k);
        } else {
          matmul(a.data(), b.data(), c.data(), m, n, k, layout == Layout::b_k_by_n);
        }
      },
      c);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double expected = 0.0, magnitude = 0.0;
      for (int l = 0; l < k; ++l) {
        const double product =
            a_mk[static_cast<std::size_t>(i * k + l)] * b_kn[static_cast<std::size_t>(l * n + j)];
        expected += product;
        magnitude += std::abs(product);
      }
      const double error =
          std::abs(static_cast<double>(c[static_cast<std::size_t>(i * n + j)]) - expected);
      require(integers ? error == 0.0 : error <= magnitude * k * 0x1p-24, "matmul");
    }
  }
}

template <class Element>
void matmul_all_layouts() {
  for (const Layout layout : {Layout::b_n_by_k, Layout::b_k_by_n, Layout::a_k_by_m}) {
    matmul_is_right<Element>(layout, true);
    matmul_is_right<Element>(layout, false);
  }
}

// Every finite fp16 number, subnormals and both zeros included, survives a product with the
// identity matrix.
void fp16_conversion_is_exact() {
  std::vector<c10::Half> identity(256, c10::Half(0.0f)), numbers(256);
  for (std::size_t i = 0; i < 16; ++i) identity[17 * i] = c10::Half(1.0f);
  GuardedArray<float> c(256);
  for (unsigned begin = 0; begin < 0x10000; begin += 256) {
    if ((begin & 0x7c00u) == 0x7c00u) continue;
    for (unsigned i = 0; i < 256; ++i) numbers[i].x = static_cast<unsigned short>(begin + i);
    matmul(numbers.data(), identity.data(), c.data(), 16, 16, 16, true);
    for (std::size_t i = 0; i < 256; ++i) require(c[i] == static_cast<float>(numbers[i]), "fp16");
  }
}

void copy_async_is_right() {
  for (const int n : {1, 3, 128, 500, 640}) {
    // Source memory is 16-byte aligned and ends right after element n.
    GuardedArray<float> in(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i) + 0.5f;
    GuardedArray<float> out(static_cast<std::size_t>(n));
    stable([&] { copy_async(CopyFault::none, in.data(), out.data(), n); }, out);
    for (std::size_t i = 0; i < out.size(); ++i) require(out[i] == 2.0f * in[i], "cp.async");
  }
}

void early_return_is_allowed() {
  GuardedArray<int> out(64, -1);
  stable([&] { early_return(out.data(), 41); }, out);
  for (int i = 0; i < 64; ++i)
    require(out[static_cast<std::size_t>(i)] == (i < 41 ? 40 - i : -1), "early return");
}

void warp_private_exchange_is_right() {
  GuardedArray<int> out(64);
  stable([&] { warp_private_exchange(out.data()); }, out);
  for (int i = 0; i < 64; ++i) {
    require(out[static_cast<std::size_t>(i)] == (i % 32 + 4) % 32 + 4 * (i / 32),
            "exchange within a warp");
  }
}

void block_counter_is_right() {
  GuardedArray<int> is_last(32);
  stable(
      [&] {
        unsigned counter = 0;
        block_counter(&counter, is_last.data());
        require(counter == 7, "atomicAdd");
      },
      is_last);
  for (std::size_t i = 0; i < 32; ++i) require(is_last[i] == 1, "last block");
}

void last_block_sum_is(TicketFault fault) {
  GuardedArray<float> in(5 * 64), partial(5 * 64), out(64);
  Random random{7};
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = random.uniform();
  const auto launch = [&] {
    int ticket = 0;
    for (std::size_t i = 0; i < partial.size(); ++i) partial[i] = -1.0f;
    last_block_sum(fault, in.data(), partial.data(), &ticket, out.data());
  };
  stable(launch, out);
  for (std::size_t i = 0; i < 64; ++i) {
    float expected = 0.0f;
    for (std::size_t block = 0; block < 5; ++block) expected += in[64 * block + i];
    require(out[i] == expected, "sum of the last block");
  }
}

void transpose_registers_is_right() {
  GuardedArray<unsigned short> in(256), out(256);
  for (std::size_t i = 0; i < 256; ++i) in[i] = static_cast<unsigned short>(257 * i);
  stable([&] { transpose_registers(in.data(), out.data()); }, out);
  for (std::size_t i = 0; i < 256; ++i)
    require(out[i] == in[i / 64 * 64 + i % 8 * 8 + i / 8 % 8], "movmatrix");
}

void grid_of_three_dimensions_is_right() {
  GuardedArray<int> out(24 * 40);
  stable([&] { grid_of_three_dimensions(out.data()); }, out);
  for (int i = 0; i < 24 * 40; ++i) {
    require(out[static_cast<std::size_t>(i)] == i / 40 * 1000 + i % 40, "indices");
  }
}

void blocks_of_any_size_are_right() {
  for (const int n : {1, 1024, 31, 33, 64, 100, 1000, 32}) {
    GuardedArray<int> out(static_cast<std::size_t>(n));
    stable([&] { block_of_any_size(out.data(), n); }, out);
    for (int i = 0; i < n; ++i) {
      const int expected = (n - 1 - i) + (n - 1 - i / 32 * 32);
      require(out[static_cast<std::size_t>(i)] == expected, "block of " + std::to_string(n));
    }
  }
}

void intrinsics_are_right() {
  alignas(16) float out[8] = {};
  alignas(16) unsigned bits[16] = {};
  intrinsics(out, bits);
  const unsigned expected_bits[9] = {static_cast<unsigned>((0xD2511F53ull * 0x9E3779B9ull) >> 32),
                                     9,
                                     0x60000000u,
                                     15,
                                     17,
                                     0x3f800000u,
                                     0x3ff00000u,
                                     9,
                                     0};
  for (int i = 0; i < 8; ++i)
    require(bits[i] == expected_bits[i], "integer intrinsic " + std::to_string(i));
  // Schoolbook product of two 64-bit numbers in 32-bit digits.
  const unsigned long long x = 0xD2511F53ull, y = 0x9E3779B9ull, p = x * y;
  const unsigned long long middle = (p >> 32) + (p & 0xffffffffull) + (p & 0xffffffffull);
  const unsigned long long high = p + 2 * (p >> 32) + (middle >> 32);
  require(bits[8] == static_cast<unsigned>(high), "__umul64hi");
  require(out[0] == 3.14159274f && out[1] == 0.5f && out[2] == 1.0f, "float intrinsics");
  require(std::abs(out[3] - std::sqrt(0.5f)) < 1e-7f && std::abs(out[4] - std::sqrt(0.5f)) < 1e-7f,
          "sincospif");
  require(out[5] == 5.0f && out[6] == 2.0f && out[7] == 1.0f, "vectors, min and max");
}

void large_shared_memory_is_allowed() {
  float out = 0.0f;
  dynamic_shared_bytes(100 * 1024, true, &out);
  require(out == 3.0f, "100 KiB of dynamic shared memory");
}

// A fault leaves nothing behind: launches after it are right.
void recovery() {
  std::vector<int> out(64);
  for (void (*fault)(int*) : {divergent_barrier, divergent_shuffle, mixed_warp_operations}) {
    bool caught = false;
    try {
      fault(out.data());
    } catch (const std::runtime_error&) {
      caught = true;
    }
    require(caught, "planted fault");
    gram_is_right(70);
  }
}

void host_threads() {
  std::vector<float> results[2];
  std::vector<std::thread> threads;
  const std::vector<float> rows = small_integers(16 * 300, 4);
  for (std::vector<float>& result : results) {
    result.resize(256);
    threads.emplace_back([&rows, &result] {
      for (int i = 0; i < 20; ++i) gram(GramFault::none, rows.data(), result.data(), 300);
    });
  }
  for (std::thread& thread : threads) thread.join();
  require(results[0] == results[1] && results[0][0] > 0.0f, "launches of two host threads");
}

void print_settings() {
  const simt::Settings& s = simt::settings();
  std::printf("%d %llu %d\n", static_cast<int>(s.order), static_cast<unsigned long long>(s.seed),
              s.poison);
}

// ---- faults

void gram_fault(GramFault fault, int n, bool uninitialised) {
  const std::vector<float> rows = small_integers(16 * static_cast<std::size_t>(n), 5);
  GuardedArray<float> out(256);
  const auto launch = [&] { gram(fault, rows.data(), out.data(), n); };
  if (uninitialised) {
    simt::check_uninitialized(launch, {out.region()});
  } else {
    simt::race_check(launch, {out.region()});
  }
}

void copy_fault(CopyFault fault) {
  GuardedArray<float> in(500, 1.5f);
  GuardedArray<float> out(500);
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  const auto launch = [&] { copy_async(fault, in.data(), out.data(), 500); };
  if (fault == CopyFault::no_barrier) {
    simt::race_check(launch, {out.region()});
  } else {
    simt::check_uninitialized(launch, {out.region()});
  }
}

template <class T, void (*launch)(T*)>
void plain() {
  std::vector<T> out(64);
  launch(out.data());
}

struct Case {
  const char* name;
  void (*run)();
};

const Case cases[] = {
    {"gram",
     [] {
       for (const int n : {1, 32, 200}) gram_is_right(n);
     }},
    {"block_sum", block_sum_is_right},
    {"warp_operations", warp_operations_are_right},
    {"matmul_bf16", matmul_all_layouts<c10::BFloat16>},
    {"matmul_fp16", matmul_all_layouts<c10::Half>},
    {"fp16_conversion", fp16_conversion_is_exact},
    {"copy_async", copy_async_is_right},
    {"early_return", early_return_is_allowed},
    {"warp_private_exchange", warp_private_exchange_is_right},
    {"block_counter", block_counter_is_right},
    {"last_block_sum", [] { last_block_sum_is(TicketFault::none); }},
    {"transpose_registers", transpose_registers_is_right},
    {"grid_of_three_dimensions", grid_of_three_dimensions_is_right},
    {"block_of_any_size", blocks_of_any_size_are_right},
    {"intrinsics", intrinsics_are_right},
    {"large_shared_memory", large_shared_memory_is_allowed},
    {"recovery", recovery},
    {"host_threads", host_threads},
    {"print_settings", print_settings},

    {"no_barrier_before_use", [] { gram_fault(GramFault::no_barrier_before_use, 200, false); }},
    {"no_barrier_after_use", [] { gram_fault(GramFault::no_barrier_after_use, 200, false); }},
    {"short_fill", [] { gram_fault(GramFault::short_fill, 20, true); }},
    {"uninitialised_shared_read",
     [] {
       GuardedArray<int> out(32);
       simt::check_uninitialized([&] { uninitialised_shared_read(out.data()); }, {out.region()});
     }},
    {"copy_no_wait", [] { copy_fault(CopyFault::no_wait); }},
    {"copy_no_commit", [] { copy_fault(CopyFault::no_commit); }},
    {"copy_wait_too_few", [] { copy_fault(CopyFault::wait_too_few); }},
    {"copy_no_barrier", [] { copy_fault(CopyFault::no_barrier); }},
    {"ticket_no_fence", [] { last_block_sum_is(TicketFault::no_fence); }},
    {"ticket_fence_too_late", [] { last_block_sum_is(TicketFault::fence_too_late); }},
    {"ticket_no_fence_of_the_last", [] { last_block_sum_is(TicketFault::no_fence_of_the_last); }},
    {"ticket_one_too_early", [] { last_block_sum_is(TicketFault::one_too_early); }},
    {"divergent_barrier", plain<int, divergent_barrier>},
    {"divergent_shuffle", plain<int, divergent_shuffle>},
    {"shuffle_outside_mask", plain<int, shuffle_outside_mask>},
    {"shuffle_from_idle_lane", plain<int, shuffle_from_idle_lane>},
    {"mixed_warp_operations", plain<int, mixed_warp_operations>},
    {"misaligned_ldmatrix", plain<float, misaligned_ldmatrix>},
    {"global_store",
     [] {
       std::vector<int> out(64);
       global_store(out.data(), 64);
     }},
    {"global_store_guarded",
     [] {
       GuardedArray<int> out(64);
       global_store(out.data(), -1);
       out.check();
     }},
    {"shared_store_above",
     [] {
       std::vector<int> out(64);
       shared_store(32, out.data());
     }},
    {"shared_store_below",
     [] {
       std::vector<int> out(64);
       shared_store(-1, out.data());
     }},
    {"dynamic_shared_store_above",
     [] {
       std::vector<int> out(64);
       dynamic_shared_store(32, out.data());
     }},
    {"dynamic_shared_store_below",
     [] {
       std::vector<int> out(64);
       dynamic_shared_store(-1, out.data());
     }},
    {"too_much_shared_memory",
     [] {
       std::vector<float> out(64);
       dynamic_shared_bytes(49 * 1024, false, out.data());
     }},
    {"empty_grid", [] { block_sum(nullptr, nullptr, 0); }},
};

}  // namespace

int main(int argc, char** argv) {
  const Case* chosen = nullptr;
  for (const Case& entry : cases) {
    if (argc == 2 && std::strcmp(entry.name, argv[1]) == 0) chosen = &entry;
  }
  if (chosen == nullptr) {
    std::fprintf(stderr, "usage: %s CASE, with CASE one of:\n", argv[0]);
    for (const Case& entry : cases) std::fprintf(stderr, "  %s\n", entry.name);
    return 2;
  }
  try {
    chosen->run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
