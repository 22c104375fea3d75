// Runs one CPU kernel once on small fixed inputs, for a tool that counts its instructions:
//
//     valgrind --tool=callgrind --toggle-collect='counted*' count_kernels shrink
//
// Without an argument it names the cases. One thread, no torch. Test builds only;
// python_tests/csrc/test_counters.py holds the bounds.
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../adapter.h"
#include "../cpu_isa.h"
#include "../curvature.h"
#include "../divergence.h"
#include "../kept_draws.h"
#include "../noise.h"
#include "../parallel.h"
#include "../predict.h"
#include "../tall.h"

namespace bayes_kernels {

void run_parallel(int64_t end, int64_t, RangeFunction function, void* context) {
  if (end > 0) function(context, 0, end);
}

}  // namespace bayes_kernels

using namespace bayes_kernels;

// What is counted: everything that is called from here. Not inlined, and found by its name.
extern "C" __attribute__((noinline, visibility("default"))) const char* counted(
    const std::function<const char*()>& run) {
  const char* problem = run();
  __asm__ volatile("" : : "r"(problem) : "memory");
  return problem;
}

namespace {

constexpr int64_t kTokens = 64, kColumns = 256;
constexpr int kRank = 8;

// Smooth numbers in (-1, 1), never zero.
std::vector<float> numbers(int64_t count, int64_t seed) {
  std::vector<float> out(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    out[static_cast<size_t>(i)] = static_cast<float>((i * 37 + seed * 11) % 101 - 50.5f) / 51.0f;
  }
  return out;
}

struct Buffers {
  int64_t key[2] = {42, 7};
  std::vector<float> x = numbers(kTokens * kColumns, 1), y = numbers(kTokens * kColumns, 2);
  std::vector<float> a = numbers(kRank * kColumns, 3), e = numbers(kRank * kColumns, 4);
  std::vector<float> h = numbers(kTokens * kRank, 5), out = numbers(kTokens * kColumns, 6);
  std::vector<float> da = numbers(kRank * kColumns, 7), de = da;
  std::vector<char> workspace;
  // The same bits read as bf16: finite numbers of mixed size.
  std::vector<uint16_t> half = std::vector<uint16_t>(kTokens * kColumns, 0x3f8a), half_out = half;

  Buffers() {
    for (size_t i = 0; i < half.size(); ++i) {
      half[i] = static_cast<uint16_t>(0x3f00 + i * 37 % 128 + (i % 3 == 0 ? 0x8000 : 0));
    }
  }
  void* room(int64_t bytes) {
    workspace.assign(static_cast<size_t>(bytes) + 64, 0);
    return workspace.data();
  }
  AdapterNoise noise(bool on) { return {on ? key : nullptr, 1, {nullptr, 0, 1}, 0.0}; }
};

const char* shrink(Buffers& s, bool noise, DType dtype) {
  const void* x = dtype == DType::kF32 ? static_cast<void*>(s.x.data()) : s.half.data();
  ShrinkParams p{dtype,          x,          kColumns, s.a.data(), noise ? s.e.data() : nullptr,
                 s.noise(noise), s.h.data(), nullptr,  kTokens,    kColumns,
                 kRank};
  p.workspace = s.room(shrink_workspace_cpu(p));
  return counted([&] { return shrink_cpu(p, nullptr); });
}

const char* shrink_backward(Buffers& s, DType dtype) {
  const bool wide = dtype == DType::kF32;
  const void* x = wide ? static_cast<void*>(s.x.data()) : s.half.data();
  void* dx = wide ? static_cast<void*>(s.out.data()) : s.half_out.data();
  ShrinkBackwardParams p{dtype,      s.h.data(),    x,        kColumns,    s.a.data(),
                         s.e.data(), s.noise(true), dx,       s.da.data(), s.de.data(),
                         nullptr,    kTokens,       kColumns, kRank};
  p.workspace = s.room(shrink_backward_workspace_cpu(p));
  return counted([&] { return shrink_backward_cpu(p, nullptr); });
}

const char* expand(Buffers& s, DType dtype) {
  const bool wide = dtype == DType::kF32;
  const void* base = wide ? static_cast<void*>(s.x.data()) : s.half.data();
  void* y = wide ? static_cast<void*>(s.out.data()) : s.half_out.data();
  ExpandParams p{dtype,   s.h.data(), s.a.data(), base,     kColumns, y,
                 nullptr, 2.0,        kTokens,    kColumns, kRank};
  p.workspace = s.room(expand_workspace_cpu(p));
  return counted([&] { return expand_cpu(p, nullptr); });
}

const char* expand_backward(Buffers& s) {
  ExpandBackwardParams p{DType::kF32, s.y.data(), kColumns, s.h.data(), s.a.data(), s.out.data(),
                         s.da.data(), nullptr,    2.0,      kTokens,    kColumns,   kRank};
  p.workspace = s.room(expand_backward_workspace_cpu(p));
  return counted([&] { return expand_backward_cpu(p, nullptr); });
}

// The backward pass of few tokens, which draws its noise itself; gradients of x, A and rho.
const char* shrink_backward_drawn(Buffers& s) {
  ShrinkBackwardParams p{DType::kF32, s.h.data(),    s.x.data(),   kColumns,    s.a.data(),
                         nullptr,     s.noise(true), s.out.data(), s.da.data(), s.de.data(),
                         nullptr,     kTokens,       kColumns,     kRank};
  p.draw.rho = s.e.data();
  p.workspace = s.room(shrink_backward_workspace_cpu(p));
  return counted([&] { return shrink_backward_cpu(p, nullptr); });
}

// One token through an adapter of a large model without gradients, as adapter_forward runs it:
// without noise, with noise that is drawn, with noise that is kept from earlier tokens.
enum class TokenNoise { kNone, kDrawn, kKept };
const char* token(Buffers& s, TokenNoise noise) {
  constexpr int64_t n = 4096;
  const std::vector<float> x = numbers(n, 1), base = numbers(n, 2), a = numbers(kRank * n, 3),
                           rho = numbers(kRank * n, 4), b = numbers(n * kRank, 5);
  std::vector<float> h(kRank), y(n);
  const bool noisy = noise != TokenNoise::kNone;
  ShrinkParams p{DType::kF32, x.data(), n, a.data(), nullptr, s.noise(noisy),
                 h.data(),    nullptr,  1, n,        kRank};
  if (noisy) p.draw.rho = rho.data();
  ExpandParams q{DType::kF32, h.data(), b.data(), base.data(), n,    y.data(),
                 nullptr,     2.0,      1,        n,           kRank};
  std::vector<char> workspace(static_cast<size_t>(shrink_workspace_cpu(p)) + 64);
  p.workspace = workspace.data();
  q.workspace = s.room(expand_workspace_cpu(q));
  const auto kept = [&] { return kept_normals(s.key, p.noise.stream, kRank * n); };
  if (noise == TokenNoise::kKept && (kept() != nullptr || kept() == nullptr))
    return "the second call of a draw should keep it";
  return counted([&] {
    const auto eps = noise == TokenNoise::kKept ? kept() : nullptr;
    p.draw.eps = eps.get();
    const char* problem = shrink_cpu(p, nullptr);
    return problem != nullptr ? problem : expand_cpu(q, nullptr);
  });
}

const char* scaled_normals(Buffers& s) {
  ScaledNormalParams p{s.key,      1,       Std::kSquare, false, false,
                       s.a.data(), nullptr, s.da.data(),  kRank, kColumns};
  return counted([&] { return scaled_normal_cpu(p, nullptr); });
}

const char* kl(Buffers& s) {
  std::vector<DivergenceItem> items(
      2, {s.a.data(), s.e.data(), nullptr, nullptr, 0.2, kRank * kColumns, 1});
  double value = 0;
  DivergenceParams p{items.data(),     2,       false,  Std::kSquare,
                     Direction::kElbo, nullptr, &value, nullptr};
  p.workspace = s.room(divergence_workspace_cpu(p));
  return counted([&] { return gaussian_kl_cpu(p, nullptr); });
}

const char* predict(Buffers& s, int64_t classes, int64_t samples) {
  std::vector<float> variances = numbers(4 * classes, 8);
  for (float& v : variances) v = v * v;
  PredictParams p{s.key,
                  0,
                  {nullptr, 0, 1},
                  false,
                  false,
                  false,
                  s.x.data(),
                  variances.data(),
                  s.out.data(),
                  s.h.data(),
                  s.h.data() + 8,
                  nullptr,
                  4,
                  classes,
                  samples,
                  nullptr};
  p.workspace = s.room(predict_workspace_cpu(p));
  return counted([&] { return mc_predict_cpu(p, nullptr); });
}

const char* tall_op(Buffers& s, TallOp op, Retraction retraction) {
  // Orthogonal columns of length near one: row i has its one in column i mod 16.
  constexpr int64_t rows = 512, columns = 16;
  std::vector<float> x(rows * columns, 0.0f), d = numbers(rows * columns, 9), out = x;
  for (int64_t i = 0; i < rows; ++i) x[static_cast<size_t>(i * columns + i % columns)] = 0.1767767f;
  for (float& v : d) v *= 0.01f;
  TallItem item{x.data(), op == TallOp::kGram ? nullptr : d.data(), out.data(), rows, columns};
  const double lambda = 0.5;
  int32_t info = -1;
  TallParams p{op, retraction, &item, 1, false, nullptr, &lambda, &info, nullptr};
  p.workspace = s.room(tall_workspace_cpu(p));
  return counted([&] { return tall_cpu(p, nullptr); });
}

// A tenth of the rows are left out where there are weights.
const char* kron(Buffers& s, int64_t d, int64_t rows, DType dtype, bool weighted) {
  std::vector<float> factor(static_cast<size_t>(d * d), 0.0f);
  std::vector<float> weights(static_cast<size_t>(rows), 1.0f);
  for (size_t i = 0; i < weights.size(); i += 10) weights[i] = 0.0f;
  const void* x = dtype == DType::kF32 ? static_cast<void*>(s.x.data()) : s.half.data();
  const KronItem item{factor.data(), x, weighted ? weights.data() : nullptr, d, rows, dtype};
  const double one = 1;
  KronParams p{&item, 1, false, &one, &one, nullptr};
  p.workspace = s.room(kron_workspace_cpu(p));
  return counted([&] { return kron_accumulate_cpu(p, nullptr); });
}

const char* low_rank(Buffers& s) {
  constexpr int64_t d = 512, k = 10, rows = 4;
  std::vector<float> factor = numbers(d * k, 10), x = numbers(rows * d, 11);
  for (int64_t i = 0; i < d * k; ++i)
    factor[static_cast<size_t>(i)] /= 1.0f + static_cast<float>(i % k);
  LowRankItem item{factor.data(), x.data(), d, k, rows};
  LowRankParams p{&item, 1, false, nullptr};
  p.workspace = s.room(low_rank_workspace_cpu(p));
  return counted([&] { return low_rank_update_cpu(p, nullptr); });
}

using Case = std::function<const char*(Buffers&)>;
const std::map<std::string, Case> cases = {
    {"shrink", [](Buffers& s) { return shrink(s, false, DType::kF32); }},
    {"shrink_noise", [](Buffers& s) { return shrink(s, true, DType::kF32); }},
    {"shrink_noise_bf16", [](Buffers& s) { return shrink(s, true, DType::kBF16); }},
    {"shrink_backward", [](Buffers& s) { return shrink_backward(s, DType::kF32); }},
    {"shrink_backward_drawn", shrink_backward_drawn},
    {"shrink_backward_bf16", [](Buffers& s) { return shrink_backward(s, DType::kBF16); }},
    {"expand", [](Buffers& s) { return expand(s, DType::kF32); }},
    {"expand_bf16", [](Buffers& s) { return expand(s, DType::kBF16); }},
    {"expand_backward", expand_backward},
    {"scaled_normal", scaled_normals},
    {"token", [](Buffers& s) { return token(s, TokenNoise::kNone); }},
    {"token_noise_drawn", [](Buffers& s) { return token(s, TokenNoise::kDrawn); }},
    {"token_noise_kept", [](Buffers& s) { return token(s, TokenNoise::kKept); }},
    {"gaussian_kl", kl},
    {"mc_predict_5", [](Buffers& s) { return predict(s, 5, 64); }},
    {"mc_predict_200", [](Buffers& s) { return predict(s, 200, 16); }},
    {"gram", [](Buffers& s) { return tall_op(s, TallOp::kGram, Retraction::kPolar); }},
    {"polar_retract", [](Buffers& s) { return tall_op(s, TallOp::kRetract, Retraction::kPolar); }},
    {"qr_retract", [](Buffers& s) { return tall_op(s, TallOp::kRetract, Retraction::kQr); }},
    {"landing_field",
     [](Buffers& s) { return tall_op(s, TallOp::kLandingField, Retraction::kPolar); }},
    {"low_rank_update", low_rank},
    {"kron", [](Buffers& s) { return kron(s, 64, 256, DType::kF32, false); }},
    {"kron_bf16", [](Buffers& s) { return kron(s, 8, 2048, DType::kBF16, true); }},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    for (const auto& item : cases) std::printf("%s\n", item.first.c_str());
    return argc == 1 ? 0 : 2;
  }
  const auto found = cases.find(argv[1]);
  if (found == cases.end()) {
    std::fprintf(stderr,
                 "count_kernels: case must be one of those listed without an argument, got %s\n",
                 argv[1]);
    return 2;
  }
  Buffers buffers;
  const char* problem = found->second(buffers);
  if (problem != nullptr) {
    std::fprintf(stderr, "count_kernels: %s\n", problem);
    return 1;
  }
  std::printf("%s\n", cpu_path_name());
  return 0;
}
