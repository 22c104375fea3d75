#include "kept_draws.h"

#include <cfenv>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

#include "noise.h"

namespace bayes_kernels {
namespace {

constexpr int64_t kDefaultLimit = 64;  // MiB
constexpr size_t kMaxKnown = 4096;     // draws that are known, with their numbers or without

struct DrawName {
  Key subkey;
  int64_t count;
  int rounding;

  bool operator==(const DrawName& other) const {
    return subkey.seed == other.subkey.seed && subkey.offset == other.subkey.offset &&
           count == other.count && rounding == other.rounding;
  }
};

struct HashOfName {
  // A subkey is a block of Philox: its bits are as good as those of a hash.
  size_t operator()(const DrawName& name) const {
    return static_cast<size_t>(name.subkey.seed ^ static_cast<uint64_t>(name.count));
  }
};

using Numbers = std::shared_ptr<const float>;

struct KnownDraw {
  DrawName name;
  Numbers numbers;  // null after the first call
  int64_t bytes() const {
    return numbers == nullptr ? 0 : name.count * static_cast<int64_t>(sizeof(float));
  }
};

int64_t limit_of_environment() {
  const char* text = std::getenv("BAYES_KERNELS_KEPT_DRAWS");
  char* end = nullptr;
  const long long wanted = text != nullptr ? std::strtoll(text, &end, 10) : -1;
  const bool valid =
      text != nullptr && end != text && *end == '\0' && wanted >= 0 && wanted < (int64_t{1} << 40);
  return (valid ? wanted : kDefaultLimit) << 20;
}

class KeptDraws {
 public:
  Numbers find(const DrawName& name, const int64_t* key, int64_t stream) {
    const int64_t size = name.count * static_cast<int64_t>(sizeof(float));
    {
      std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (!lock.owns_lock() || size > limit_) return nullptr;
      const auto found = places_.find(name);
      if (found == places_.end()) {
        draws_.push_front({name, nullptr});
        places_.emplace(name, draws_.begin());
        shrink();
        return nullptr;
      }
      draws_.splice(draws_.begin(), draws_, found->second);
      if (draws_.front().numbers != nullptr) {
        ++hits_;
        return draws_.front().numbers;
      }
    }
    const std::align_val_t line{64};
    Numbers numbers(static_cast<float*>(::operator new(static_cast<size_t>(size), line)),
                    [line](const float* p) { ::operator delete(const_cast<float*>(p), line); });
    normal_cpu({key, stream, const_cast<float*>(numbers.get()), name.count}, nullptr);
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return numbers;
    const auto found = places_.find(name);
    if (found != places_.end() && found->second->numbers == nullptr) {
      found->second->numbers = numbers;
      bytes_ += size;
      shrink();
    }
    return numbers;
  }

  void set_limit(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    shrink();
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    places_.clear();
    draws_.clear();
    bytes_ = hits_ = 0;
  }

  void figures(int64_t* out) {
    const std::lock_guard<std::mutex> lock(mutex_);
    out[0] = limit_;
    out[1] = bytes_;
    out[2] = hits_;
    out[3] = static_cast<int64_t>(draws_.size());
  }

 private:
  // Lets go of the draws that were used least recently, until the rest is within the limits.
  void shrink() {
    while (bytes_ > limit_ || draws_.size() > kMaxKnown) {
      bytes_ -= draws_.back().bytes();
      places_.erase(draws_.back().name);
      draws_.pop_back();
    }
  }

  std::mutex mutex_;
  std::list<KnownDraw> draws_;  // most recently used first
  std::unordered_map<DrawName, std::list<KnownDraw>::iterator, HashOfName> places_;
  int64_t bytes_ = 0, hits_ = 0, limit_ = limit_of_environment();
};

// Made when the library is loaded, so that no thread can be interrupted while it makes it, and
// never destroyed, as threads may outlive static objects.
KeptDraws& kept_draws = *new KeptDraws;

}  // namespace

std::shared_ptr<const float> kept_normals(const int64_t* key, int64_t stream, int64_t count) {
  try {
    return kept_draws.find({subkey(load_key(key), stream, kNormal), count, std::fegetround()}, key,
                           stream);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

}  // namespace bayes_kernels

// For tests and diagnosis. figures: limit and kept numbers in bytes, calls that found a draw, known
// draws.
extern "C" __attribute__((visibility("default"))) void bayes_kernels_kept_draws(int64_t* figures) {
  bayes_kernels::kept_draws.figures(figures);
}
// Another limit; below 0 it stays. Draws and figures are forgotten.
extern "C" __attribute__((visibility("default"))) void bayes_kernels_forget_draws(int64_t limit) {
  bayes_kernels::kept_draws.clear();
  if (limit >= 0) bayes_kernels::kept_draws.set_limit(limit);
}
