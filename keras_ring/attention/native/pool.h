// How threads share the work of a visit.

#ifndef KERAS_RING_POOL_H
#define KERAS_RING_POOL_H

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <limits>
#include <vector>

#include "allowed.h"
#include "attention.h"
#include "gemm.h"

namespace keras_ring {

// Call `function(data)` in several threads. What is thrown in one is thrown
// here.
void in_threads(Index threads, void (*function)(void*), void* data);

// What a slice costs, in the time of a whole head.
inline constexpr double SLICE = 0.05;

// In how many slices the work of a sample and key head is cut, `most` at most:
// as many as leave the fewest threads idle at the end, against what each slice
// costs.
inline Index slices_of(const keras_ring_visit& visit, Index most) {
  const Index count = std::max<Index>(1, visit.batch * visit.key_heads);
  const Index threads = std::max<Index>(1, visit.threads);
  Index found = 1;
  double least = std::numeric_limits<double>::infinity();
  // More than one for each thread never helps.
  for (Index slices = 1; slices <= std::min(most, threads); ++slices) {
    const Index turns = (count * slices + threads - 1) / threads;
    const double time = turns * (1.0 / slices + SLICE);
    if (time < least) {
      least = time;
      found = slices;
    }
  }
  return found;
}

// Call a function for each sample, key head and slice, in threads.
template <class Function>
void each(const keras_ring_visit& visit, Index slices,
          const Function& function) {
  const Index count = visit.batch * visit.key_heads * slices;
  std::atomic<Index> next{0};
  auto work = [&] {
    for (Index i = next++; i < count; i = next++)
      function(i / slices / visit.key_heads, i / slices % visit.key_heads,
               i % slices);
  };
  in_threads(
      std::min<Index>(visit.threads, count),
      [](void* data) { (*static_cast<decltype(work)*>(data))(); }, &work);
}

// Every `slices`-th, from `slice` on.
inline std::vector<Range> share(const std::vector<Range>& all, Index slice,
                                Index slices) {
  std::vector<Range> found;
  for (std::size_t i = slice; i < all.size(); i += slices)
    found.push_back(all[i]);
  return found;
}

// What a function of the interface returns.
template <class Function>
int32_t status(const Function& function) {
  try {
    function();
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

}  // namespace keras_ring

#endif
