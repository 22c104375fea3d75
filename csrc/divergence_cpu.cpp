// Divergence family on the CPU; compiled once per instruction set (cpu_isa.h).
#include "divergence.h"

#include "cpu_isa.h"
#include "parallel.h"

namespace bayes_kernels {
namespace {

// Elements per partial sum. A function of nothing else, so that sums are the same bits for any
// number of threads.
constexpr int64_t kChunk = 4096;

// Deviations whose product is taken before the logarithm: (1e-8)^4 to (1e77)^4 is within fp64, and
// rho^2 of an fp32 rho is at most 1.2e77.
constexpr int64_t kProduct = 4;
constexpr double kMinStd = BK_MIN_RHO * BK_MIN_RHO;

int64_t chunks_of(const DivergenceParams& p) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < p.n_items; ++i) chunks += ceil_div(p.items[i].count, kChunk);
  return chunks;
}

// Calls use(item, chunk number, first element, end element) for every chunk of every item.
template <class Use>
void for_chunks(const DivergenceParams& p, const Use& use) {
  auto body = [&](int64_t begin, int64_t end) {
    int64_t item = 0, start = 0;  // chunk number at which `item` starts
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk - start >= ceil_div(p.items[item].count, kChunk)) {
        start += ceil_div(p.items[item].count, kChunk);
        ++item;
      }
      const int64_t first = (chunk - start) * kChunk;
      const int64_t count = p.items[item].count;
      use(p.items[item], chunk, first, first + kChunk < count ? first + kChunk : count);
    }
  };
  parallel_ranges(chunks_of(p), 4, body);
}

template <class T>
void value(const DivergenceParams& p) {
  double* partial = static_cast<double*>(p.workspace);
  for_chunks(p, [&](const DivergenceItem& item, int64_t chunk, int64_t begin, int64_t end) {
    const T* mean = static_cast<const T*>(item.mean);
    const T* rho = static_cast<const T*>(item.rho);
    double sum = 0;
    auto std_at = [&](int64_t i) {
      return std_of<double>(p.std, rho[item.columns == 1 ? i : i / item.columns]);
    };
    if (sizeof(T) == sizeof(double)) {
      for (int64_t i = begin; i < end; ++i)
        sum += gaussian_kl_term(p.direction, mean[i], std_at(i), item.prior_std);
      partial[chunk] = sum;
      return;
    }
    // The logarithm is what a term costs: one is taken of the product of kProduct deviations. They
    // come from fp32 and are bounded below, so that the product stays within the range of fp64.
    const double prior = item.prior_std, log_prior = log(prior);
    for (int64_t first = begin; first < end; first += kProduct) {
      const int64_t stop = first + kProduct < end ? first + kProduct : end;
      double product = 1, squares = 0;
      for (int64_t i = first; i < stop; ++i) {
        const double m = mean[i], given = std_at(i);
        const double s = given > kMinStd ? given : kMinStd;
        product *= s;
        squares += p.direction == Direction::kElbo ? (s * s + m * m) / (2 * prior * prior)
                                                   : (prior * prior + m * m) / (2 * s * s);
      }
      const double count = static_cast<double>(stop - first);
      const double logs = count * log_prior - log(product);  // sum of log(prior / s)
      sum += squares - 0.5 * count + (p.direction == Direction::kElbo ? logs : -logs);
    }
    partial[chunk] = sum;
  });
  double total = 0;
  for (int64_t chunk = 0, n = chunks_of(p); chunk < n; ++chunk) total += partial[chunk];
  *static_cast<double*>(p.out) = total;
}

// use(address of mean, dKL/dmean), use(address of rho, dKL/drho)
template <class T, class UseMean, class UseRho>
void derivatives(const DivergenceParams& p, const UseMean& use_mean, const UseRho& use_rho) {
  for_chunks(p, [&](const DivergenceItem& item, int64_t, int64_t begin, int64_t end) {
    if (item.columns != 1) return;
    T* mean = static_cast<T*>(item.mean);
    T* rho = static_cast<T*>(item.rho);
    for (int64_t i = begin; i < end; ++i) {
      const double s = std_of<double>(p.std, rho[i]);
      const double dm = gaussian_kl_dmean(p.direction, mean[i], s, item.prior_std);
      const double ds = gaussian_kl_dstd(p.direction, mean[i], s, item.prior_std);
      const double r = rho[i];
      use_mean(item, i, dm);
      use_rho(item, i, ds * std_derivative<double>(p.std, guarded(p.std, r)));
    }
  });
  // Items whose rows share one rho: a row at a time, in order.
  for (int64_t k = 0; k < p.n_items; ++k) {
    const DivergenceItem& item = p.items[k];
    if (item.columns == 1) continue;
    T* mean = static_cast<T*>(item.mean);
    T* rho = static_cast<T*>(item.rho);
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const double r = rho[row];
        const double s = std_of<double>(p.std, r);
        double sum = 0;
        for (int64_t i = row * item.columns; i < (row + 1) * item.columns; ++i) {
          const double m = mean[i];
          sum += gaussian_kl_dstd(p.direction, m, s, item.prior_std);
          use_mean(item, i, gaussian_kl_dmean(p.direction, m, s, item.prior_std));
        }
        use_rho(item, row, sum * std_derivative<double>(p.std, guarded(p.std, r)));
      }
    };
    parallel_ranges(item.count / item.columns, 1, body);
  }
}

template <class T>
void gradient(const DivergenceParams& p) {
  const double weight = static_cast<double>(*static_cast<const T*>(p.weight));
  derivatives<T>(
      p,
      [&](const DivergenceItem& item, int64_t i, double d) {
        static_cast<T*>(item.dmean)[i] = static_cast<T>(weight * d);
      },
      [&](const DivergenceItem& item, int64_t i, double d) {
        static_cast<T*>(item.drho)[i] = static_cast<T>(weight * d);
      });
}

template <class T>
void step(const DivergenceParams& p) {
  const double weight = static_cast<double>(*static_cast<const T*>(p.weight));
  derivatives<T>(
      p,
      [&](const DivergenceItem& item, int64_t i, double d) {
        T* mean = static_cast<T*>(item.mean);
        mean[i] = static_cast<T>(static_cast<double>(mean[i]) - weight * d);
      },
      [&](const DivergenceItem& item, int64_t i, double d) {
        T* rho = static_cast<T*>(item.rho);
        rho[i] = static_cast<T>(static_cast<double>(rho[i]) - weight * d);
      });
}

}  // namespace

int64_t BK_CPU(divergence_workspace)(const DivergenceParams& p) {
  return p.out == nullptr ? 0 : chunks_of(p) * static_cast<int64_t>(sizeof(double));
}

const char* BK_CPU(gaussian_kl)(const DivergenceParams& p, void*) {
  if (p.f64)
    value<double>(p);
  else
    value<float>(p);
  return nullptr;
}

const char* BK_CPU(gaussian_kl_gradient)(const DivergenceParams& p, void*) {
  if (p.f64)
    gradient<double>(p);
  else
    gradient<float>(p);
  return nullptr;
}

const char* BK_CPU(gaussian_kl_step)(const DivergenceParams& p, void*) {
  if (p.f64)
    step<double>(p);
  else
    step<float>(p);
  return nullptr;
}

}  // namespace bayes_kernels
