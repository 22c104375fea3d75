// csrc/core as a Python module, for tests only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "../core/philox.h"
#include "../core/small_linalg.h"

namespace py = pybind11;
using namespace bayes_kernels;

namespace {

using Numbers = std::vector<double>;

int pitch_of(int r) { return (r + 7) / 8 * 8; }

// Between rows that lie r apart, as Python passes them, and rows that lie a pitch apart.
Numbers padded(const Numbers& m, int r) {
  Numbers out(static_cast<size_t>(r) * pitch_of(r), 0.0);
  for (int i = 0; i < r; ++i)
    for (int j = 0; j < r; ++j) out[i * pitch_of(r) + j] = m.at(i * r + j);
  return out;
}
Numbers packed(const Numbers& m, int r) {
  Numbers out;
  for (int i = 0; i < r; ++i)
    for (int j = 0; j < r; ++j) out.push_back(m.at(i * pitch_of(r) + j));
  return out;
}

}  // namespace

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
  m.def("small_multiply", [](const Numbers& a, const Numbers& b, int r) {
    Numbers out(padded(a, r).size());
    multiply<OneThread>(padded(a, r).data(), padded(b, r).data(), out.data(), r, pitch_of(r));
    return packed(out, r);
  });
  m.def("inverse_root_near_identity", [](const Numbers& s, int r, double limit) {
    Numbers root(padded(s, r).size()), work(3 * root.size());
    double spread = 0;
    const bool ok = inverse_root_near_identity<OneThread>(
        padded(s, r).data(), root.data(), work.data(), r, pitch_of(r), limit, &spread);
    return std::make_tuple(ok, packed(root, r), spread);
  });
  m.def("cholesky", [](const Numbers& s, int r, double tolerance) {
    Numbers u = padded(s, r), diagonal(static_cast<size_t>(r));
    const bool ok =
        cholesky<OneThread>(u.data(), u.data(), diagonal.data(), r, pitch_of(r), tolerance, 0.0);
    return std::make_tuple(ok, packed(u, r));
  });
  m.def("invert_upper", [](const Numbers& u, int r) {
    Numbers out(padded(u, r).size());
    invert_upper<OneThread>(padded(u, r).data(), out.data(), r, pitch_of(r));
    return packed(out, r);
  });
  m.def("symmetric_eigen", [](const Numbers& s, int r) {
    Numbers w = padded(s, r), v(w.size()), values(static_cast<size_t>(r)), flags(1);
    const int sweeps =
        symmetric_eigen<OneThread>(w.data(), v.data(), values.data(), flags.data(), r, pitch_of(r));
    return std::make_tuple(values, packed(v, r), sweeps);
  });
  m.def("compose", [](const Numbers& v, const Numbers& weights, int r) {
    Numbers out(padded(v, r).size());
    compose<OneThread>(padded(v, r).data(), weights.data(), out.data(), r, pitch_of(r));
    return packed(out, r);
  });
}
