// csrc/core as a Python module, for tests only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "core/philox.h"
#include "core/posterior.h"

namespace py = pybind11;
using namespace bayes_kernels;

PYBIND11_MODULE(_core_tests, m) {
  m.def("philox", [](uint64_t seed, uint64_t offset, uint64_t index) {
    const PhiloxBlock b = philox(Key{seed, offset}, index);
    return std::array<uint32_t, 4>{b.word[0], b.word[1], b.word[2], b.word[3]};
  });
  m.def("fold_in", [](uint64_t seed, uint64_t offset, uint64_t data) {
    const Key k = fold_in(Key{seed, offset}, data);
    return std::pair<uint64_t, uint64_t>{k.seed, k.offset};
  });
  m.def("uniform", [](uint32_t word) { return uniform(word); });
  m.def("log_unit", [](float u) { return log_unit(u); });
  m.def("cos_sin_turn", [](float u) {
    float c, s;
    cos_sin_turn(u, &c, &s);
    return std::pair<float, float>{c, s};
  });
  m.def("normal_pair", [](uint32_t a, uint32_t b) {
    float n0, n1;
    normal_pair(a, b, &n0, &n1);
    return std::pair<float, float>{n0, n1};
  });
  m.def("sign_row", [](int64_t row0, int64_t rows_per_id, int64_t row) {
    return sign_row(RowIds{nullptr, row0, rows_per_id}, row);
  });
  m.def("dropout_threshold", [](double p) { return dropout_threshold(p); });
  m.def("gaussian_kl_term", [](bool elbo, double mean, double std, double prior) {
    return gaussian_kl_term(elbo ? Direction::kElbo : Direction::kCode, mean, std, prior);
  });
}
