// Which pairs of queries and keys count.

#ifndef KERAS_RING_ALLOWED_H
#define KERAS_RING_ALLOWED_H

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention.h"
#include "gemm.h"

namespace keras_ring {

// The score of a pair that does not count.
inline constexpr float NEVER = -std::numeric_limits<float>::infinity();

// Which columns of a tile its rows see: those of row i from `first(i)` to
// before `end(i)`, both growing with i.
struct Band {
  Index apart;  // Position of the first query less that of the first key.
  Index least, most, columns;
  Index first(Index i) const { return within(apart + i - most); }
  Index end(Index i) const { return within(apart + i - least + 1); }
  Index within(Index column) const {
    return std::min(std::max<Index>(column, 0), columns);
  }
};

// Neighbouring queries or keys: from `begin` to before `end` in the chunk, the
// first of them at the global `position`.
struct Range {
  Index begin, end, position;
  Index size() const { return end - begin; }
};

// Of a side that is not cut.
inline constexpr Index NOWHERE = std::numeric_limits<Index>::max() / 2;

// The parts of a side, cut into tiles, and at a position.
inline std::vector<Range> ranges(Index length, Index parts,
                                 const int32_t* starts, Index tile,
                                 Index position = NOWHERE) {
  std::vector<Range> found;
  const Index part = length / parts;
  for (Index p = 0; p < parts; ++p) {
    const Index cut = position - starts[p];
    for (Index i = 0, end; i < part; i = end) {
      end = std::min(i + tile, part);
      if (i < cut && cut < end) end = cut;
      found.push_back({p * part + i, p * part + end, starts[p] + i});
    }
  }
  return found;
}

inline Band band(const keras_ring_visit& visit, const Range& rows,
                 const Range& columns) {
  const Index there =
      visit.least > visit.most || rows.position >= visit.rows
          ? 0
          : std::max<Index>(visit.stop - columns.position, 0);
  return {rows.position - columns.position, visit.least, visit.most,
          std::min(columns.size(), there)};
}

// Whether some of the queries see some of the keys.
inline bool met(const keras_ring_visit& visit, const Range& queries,
                const Range& keys) {
  const Band seen = band(visit, queries, keys);
  return seen.first(0) < seen.end(queries.size() - 1);
}

inline bool met(const keras_ring_visit& visit,
                const std::vector<Range>& queries, const Range& keys) {
  return std::any_of(queries.begin(), queries.end(), [&](const Range& part) {
    return met(visit, part, keys);
  });
}

inline Index size_of(const std::vector<Range>& parts) {
  return parts.back().end - parts.front().begin;
}

// Neighbouring parts in bands of up to so many rows, one part at least.
inline std::vector<std::vector<Range>> bands_of(
    const std::vector<Range>& parts, Index most) {
  std::vector<std::vector<Range>> found;
  for (const Range& part : parts) {
    if (found.empty() || part.begin != found.back().back().end ||
        part.end - found.back().front().begin > most)
      found.emplace_back();
    found.back().push_back(part);
  }
  return found;
}

// Of one head and its keys from some on; no `data` hides nothing.
struct Mask {
  const uint8_t* data;
  Index row;
  // The mask from a query and a key on.
  Mask from(Index query, Index key) const {
    return {data ? data + query * row + key : nullptr, row};
  }
};

inline Mask mask_of(const keras_ring_visit& visit, Index sample,
                    Index number) {
  return {visit.mask ? visit.mask + sample * visit.mask_batch +
                           number * visit.mask_head
                     : nullptr,
          visit.mask_row};
}

// Scores of the pairs of row `i` that do not count, of the columns from `first`
// to before `stop`.
inline void hide(float* row, const Band& band, const Mask& mask, Index i,
                 Index first, Index stop) {
  const Index begin = band.first(i), end = band.end(i);
  std::fill(row + first, row + std::max(begin, first), NEVER);
  std::fill(row + std::min(end, stop), row + stop, NEVER);
  if (!mask.data) return;
  const uint8_t* counts = mask.data + i * mask.row;
  for (Index j = std::max(begin, first); j < std::min(end, stop); ++j)
    row[j] = counts[j] ? row[j] : NEVER;
}

}  // namespace keras_ring

#endif
