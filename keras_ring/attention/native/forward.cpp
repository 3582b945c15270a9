// The forward of exact attention over one visiting chunk on a CPU.
//
// Online softmax over tiles of keys (Dao et al. 2022, arXiv 2205.14135,
// algorithm 1). A few rows of queries at a time meet a tile of keys, so that
// their scores never leave the innermost cache.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "allowed.h"
#include "attention.h"
#include "gemm.h"
#include "pool.h"

using namespace keras_ring;

namespace {

// Queries that go to a slice at a time, and keys that are packed at a time.
constexpr Index FORWARD_ROWS = 96, FORWARD_KEYS = 256;
// Tiles of keys that rows meet one after the other, before the next rows.
constexpr Index TOGETHER = 4;

// A few rows of queries and a tile of keys.
void forward_rows(Index rows, const Band& band, const Mask& mask, Index from,
                  Index width, Index value_width, const float* query,
                  Index query_row, const float* key_turned, Index key_row,
                  const float* value, float factor, float* scores, float* out,
                  float* top, float* total) {
  const Index first = down(band.first(from));
  const Index stop = up(band.end(from + rows - 1));
  if (first >= stop) return;
  const Index columns = stop - first;
  product<false>(rows, columns, query, query_row, 1, key_turned + first,
                 key_row, scores, FORWARD_KEYS, width);
  // What the sums so far are less than they seemed, of each row.
  float decay[up(DOWN)] = {}, new_top[DOWN];
  for (Index i = 0; i < rows; ++i) {
    float* row = scores + i * FORWARD_KEYS;
    hide(row - first, band, mask, from + i, first, stop);
    Vector most = load(row);
    for (Index j = LANES; j < columns; j += LANES) {
      const Vector next = load(row + j);
      most = most < next ? next : most;
    }
    const float highest =
        reduced(most, [](float a, float b) { return a < b ? b : a; });
    // Of the lowest number: no difference of two infinities is taken in a row
    // that saw nothing so far.
    new_top[i] = std::max(
        {top[i], highest * factor, std::numeric_limits<float>::lowest()});
    decay[i] = top[i] - new_top[i];
  }
  for (Index i = 0; i < up(DOWN); i += LANES)
    store(decay + i, exp2(load(decay + i)));
  for (Index i = 0; i < rows; ++i) {
    float* row = scores + i * FORWARD_KEYS;
    const Vector minus = all(-new_top[i]), by = all(factor);
    Vector sum{};
    for (Index j = 0; j < columns; j += LANES) {
      const Vector p = exp2(load(row + j) * by + minus);
      store(row + j, p);
      sum += p;
    }
    total[i] = total[i] * decay[i] +
               reduced(sum, [](float a, float b) { return a + b; });
    if (new_top[i] != top[i])
      for (Index j = 0; j < value_width; j += LANES) {
        float* here = out + i * value_width + j;
        store(here, load(here) * decay[i]);
      }
    top[i] = new_top[i];
  }
  product<true>(rows, value_width, scores, FORWARD_KEYS, 1,
                value + first * value_width, value_width, out, value_width,
                columns);
}

// A tile of keys, packed.
struct Packed {
  Range keys;
  const float *key_turned, *value;
};

// A function of its own: in the place of its call its loops have too few
// registers, and the forward takes a tenth longer.
__attribute__((noinline))
void forward_head(const keras_ring_visit& visit, const Matrix& query,
                  const Matrix& out, const Matrix& lse, const Mask& mask,
                  const std::vector<Packed>& tiles,
                  const std::vector<Range>& queries, Index key_row,
                  float* scores, float* sums, bool go_on) {
  const Index value_width = up(visit.value_width);
  const float factor = visit.scale * LOG2E;
  for (const Range& part : queries)
    for (Index i = 0; i < part.size(); i += DOWN) {
      const Index rows = std::min<Index>(DOWN, part.size() - i);
      const Index row = part.begin + i;
      float top[DOWN], total[DOWN];
      bool begun = false;
      auto begin = [&] {
        for (Index r = 0; r < rows; ++r) {
          const float before = go_on ? *lse.at(row + r) : NEVER;
          const bool there = before != NEVER;
          top[r] =
              there ? before * LOG2E : std::numeric_limits<float>::lowest();
          total[r] = there ? 1.0f : 0.0f;
          float* sum = sums + r * value_width;
          std::fill(sum, sum + value_width, 0.0f);
          if (there)
            std::copy(out.at(row + r), out.at(row + r) + visit.value_width,
                      sum);
        }
        begun = true;
      };
      for (const Packed& tile : tiles) {
        const Band seen = band(visit, part, tile.keys);
        if (seen.first(i) >= seen.end(i + rows - 1)) continue;
        if (!begun) begin();
        forward_rows(rows, seen, mask.from(part.begin, tile.keys.begin), i,
                     visit.width, value_width, query.at(row), query.row,
                     tile.key_turned, key_row, tile.value, factor, scores, sums,
                     top, total);
      }
      if (!begun) {
        if (go_on) continue;
        begin();
      }
      for (Index r = 0; r < rows; ++r) {
        const bool there = total[r] != 0.0f;
        const float by = there ? 1.0f / total[r] : 0.0f;
        for (Index j = 0; j < visit.value_width; ++j)
          out.at(row + r)[j] = sums[r * value_width + j] * by;
        *lse.at(row + r) =
            there ? (top[r] + std::log2(total[r])) * LN2 : NEVER;
      }
    }
}

}  // namespace

extern "C" int32_t keras_ring_forward(const keras_ring_visit* visit,
                                      const keras_ring_tensor* query,
                                      const keras_ring_tensor* key,
                                      const keras_ring_tensor* value,
                                      const keras_ring_tensor* out,
                                      const keras_ring_tensor* lse,
                                      int32_t go_on) {
  return status([&] {
    const Index slices =
        slices_of(*visit, (visit->queries + FORWARD_ROWS - 1) / FORWARD_ROWS);
    const auto all_queries =
        ranges(visit->queries, visit->query_parts, visit->query_starts,
               slices == 1 ? visit->queries : FORWARD_ROWS, visit->rows);
    const auto all_keys = ranges(visit->keys, visit->key_parts,
                                 visit->key_starts, FORWARD_KEYS);
    const Index value_width = up(visit->value_width);
    const Index key_row = FORWARD_KEYS + GAP;
    const Index group = visit->heads / visit->key_heads;
    each(*visit, slices, [&](Index sample, Index shared, Index slice) {
      const auto queries = share(all_queries, slice, slices);
      std::vector<Range> keys;
      for (const Range& tile : all_keys)
        if (met(*visit, queries, tile)) keys.push_back(tile);
      const Index key_size = visit->width * key_row;
      const Index value_size = FORWARD_KEYS * value_width;
      scratch.begin(TOGETHER * (key_size + value_size) + DOWN * FORWARD_KEYS +
                    DOWN * value_width);
      float* keys_turned = scratch.take(TOGETHER * key_size);
      float* values = scratch.take(TOGETHER * value_size);
      float* scores = scratch.take(DOWN * FORWARD_KEYS);
      float* sums = scratch.take(DOWN * value_width);
      const Matrix own_key = head(*key, sample, shared);
      const Matrix own_value = head(*value, sample, shared);
      bool more = go_on;
      // Once at least, for what is written where nothing counts.
      for (std::size_t first = 0; first == 0 || first < keys.size();
           first += TOGETHER) {
        std::vector<Packed> tiles;
        for (std::size_t i = first; i < std::min(first + TOGETHER, keys.size());
             ++i) {
          const Range& tile = keys[i];
          float* key_turned = keys_turned + tiles.size() * key_size;
          float* tile_value = values + tiles.size() * value_size;
          const Index padded = up(tile.size());
          turn({own_key.at(tile.begin), own_key.row}, tile.size(), visit->width,
               key_turned, key_row, padded);
          copy({own_value.at(tile.begin), own_value.row}, tile.size(),
               visit->value_width, tile_value, padded, value_width);
          tiles.push_back({tile, key_turned, tile_value});
        }
        for (Index h = shared * group; h < (shared + 1) * group; ++h)
          forward_head(*visit, head(*query, sample, h), head(*out, sample, h),
                       head(*lse, sample, h), mask_of(*visit, sample, h), tiles,
                       queries, key_row, scores, sums, more);
        more = true;
      }
    });
  });
}
