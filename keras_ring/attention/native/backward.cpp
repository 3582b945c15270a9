// The backward of exact attention over one visiting chunk on a CPU.
//
// Probabilities are computed again from the log-sum-exp (Dao et al. 2022, arXiv
// 2205.14135, algorithm 4), of a few rows of queries and a tile of keys at a
// time.

#include <algorithm>
#include <limits>
#include <vector>

#include "allowed.h"
#include "attention.h"
#include "gemm.h"
#include "pool.h"

using namespace keras_ring;

namespace {

// Queries and keys that meet at a time.
constexpr Index BACKWARD_ROWS = 96, BACKWARD_KEYS = 256;
// Queries, of all heads that share a key head, that are packed at a time.
constexpr Index BAND = 2048;
// What slices of keys may have of the query's gradient beside the result.
constexpr Index SLICES = Index(1) << 26;

// No gradient.
void clear(const Matrix& rows, const Range& which, Index columns) {
  for (Index i = which.begin; i < which.end; ++i)
    std::fill(rows.at(i), rows.at(i) + columns, 0.0f);
}

// What a few rows of queries and a tile of keys have: scores become
// probabilities, and the gradient of these that of the scores.
void backward_rows(Index rows, const Band& band, const Mask& mask, Index from,
                   Index first, Index stop, float* p, float* grad, Index p_row,
                   const float* minus_lse, const float* delta) {
  for (Index i = 0; i < rows; ++i) {
    float *row = p + i * p_row, *grad_row = grad + i * p_row;
    hide(row, band, mask, from + i, first, stop);
    const Vector minus = all(minus_lse[from + i]), less = all(delta[from + i]);
    for (Index j = first; j < stop; j += LANES) {
      const Vector here = exp2(load(row + j) + minus);
      store(row + j, here);
      store(grad_row + j, here * (load(grad_row + j) - less));
    }
  }
}

// The first row from `row` on for which `found` holds.
template <class Function>
Index search(Index row, Index rows, const Function& found) {
  while (row < rows && !found(row)) ++row;
  return row;
}

// to = from * factor, added to what is there with `more`.
void put(const float* from, float factor, Index count, float* to, bool more) {
  if (more)
    for (Index j = 0; j < count; ++j) to[j] += from[j] * factor;
  else
    for (Index j = 0; j < count; ++j) to[j] = from[j] * factor;
}

// A tile of keys in the backward, with the sums of its gradients.
struct BackwardTile {
  const float *key_turned, *value_turned, *keys;
  float *key_sums, *value_sums;
  Index size;
};

// A part of the queries and a tile of keys: `scaled` (rows, width) and
// `grads_out` (rows, value width) are packed, `query_sums` is added to, `p` and
// `grad_scores` are room for scores.
__attribute__((noinline))
void backward_part(const Band& seen, Index rows, Index D, Index E,
                   const Mask& mask, const BackwardTile& tile,
                   const float* scaled, const float* grads_out,
                   const float* minus_lse, const float* delta,
                   float* query_sums, float* p, float* grad_scores) {
  if (seen.first(0) >= seen.end(rows - 1)) return;
  const Index width = up(D), value_width = up(E), padded = up(tile.size);
  const Index key_row = BACKWARD_KEYS + GAP;
  const bool whole = seen.first(rows - 1) == 0 && seen.end(0) == tile.size;
  for (Index i = 0; i < rows; i += DOWN) {
    const Index some = std::min<Index>(DOWN, rows - i);
    const Index first = down(seen.first(i));
    const Index stop = std::max(first, up(seen.end(i + some - 1)));
    float *row = p + i * key_row, *grad_row = grad_scores + i * key_row;
    if (first < stop) {
      product<false>(some, stop - first, scaled + i * width, width, 1,
                     tile.key_turned + first, key_row, row + first, key_row, D);
      product<false>(some, stop - first, grads_out + i * value_width,
                     value_width, 1, tile.value_turned + first, key_row,
                     grad_row + first, key_row, E);
      backward_rows(some, seen, mask, i, first, stop, row, grad_row, key_row,
                    minus_lse, delta);
    }
    if (!whole)
      for (Index r = 0; r < some; ++r)
        for (float* side : {row + r * key_row, grad_row + r * key_row}) {
          std::fill(side, side + first, 0.0f);
          std::fill(side + stop, side + padded, 0.0f);
        }
    product<true>(some, width, grad_row + first, key_row, 1,
                  tile.keys + first * width, width, query_sums + i * width,
                  width, stop - first);
  }
  Index row = 0;
  for (Index j = 0; j < tile.size; j += DOWN) {
    const Index some = std::min<Index>(DOWN, tile.size - j);
    // The rows that see one of these columns.
    row = search(row, rows, [&](Index i) { return seen.end(i) > j; });
    const Index stop = whole ? rows : search(row, rows, [&](Index i) {
      return seen.first(i) >= j + some;
    });
    product<true>(some, value_width, p + row * key_row + j, 1, key_row,
                  grads_out + row * value_width, value_width,
                  tile.value_sums + j * value_width, value_width, stop - row);
    product<true>(some, width, grad_scores + row * key_row + j, 1, key_row,
                  scaled + row * width, width, tile.key_sums + j * width, width,
                  stop - row);
  }
}

}  // namespace

extern "C" int32_t keras_ring_backward(
    const keras_ring_visit* visit, const keras_ring_tensor* query,
    const keras_ring_tensor* key, const keras_ring_tensor* value,
    const keras_ring_tensor* lse, const keras_ring_tensor* delta,
    const keras_ring_tensor* grad_out, const keras_ring_tensor* grad_query,
    const keras_ring_tensor* grad_key, const keras_ring_tensor* grad_value,
    int32_t go_on) {
  return status([&] {
    const auto queries =
        ranges(visit->queries, visit->query_parts, visit->query_starts,
               BACKWARD_ROWS, visit->rows);
    const auto all_keys = ranges(visit->keys, visit->key_parts,
                                 visit->key_starts, BACKWARD_KEYS);
    const Index head_size = visit->queries * visit->width;
    const Index of_slice =
        std::max<Index>(1, visit->batch * visit->heads * head_size);
    const Index most = 1 + SLICES / of_slice;
    const Index slices =
        slices_of(*visit, std::min<Index>(all_keys.size(), most));
    // What all slices but the first have of the query's gradient: who is ready
    // first must not decide on the order of a sum.
    std::vector<float> others((slices - 1) * visit->batch * visit->heads *
                              head_size);
    auto other = [&](Index slice, Index sample, Index number) {
      const Index place =
          ((slice - 1) * visit->batch + sample) * visit->heads + number;
      return Matrix{others.data() + place * head_size, visit->width};
    };
    const Index D = visit->width, E = visit->value_width;
    const Index width = up(D), value_width = up(E);
    const Index key_row = BACKWARD_KEYS + GAP;
    const Index group = visit->heads / visit->key_heads;
    // Of a visiting chunk half the queries may see nothing.
    std::vector<Range> seeing, blind;
    for (const Range& part : queries) {
      const bool some = std::any_of(
          all_keys.begin(), all_keys.end(),
          [&](const Range& tile) { return met(*visit, part, tile); });
      (some ? seeing : blind).push_back(part);
    }
    const auto bands =
        bands_of(seeing, std::max<Index>(BACKWARD_ROWS, BAND / group));
    Index most_rows = 0;
    for (const auto& parts : bands)
      most_rows = std::max(most_rows, size_of(parts));
    each(*visit, slices, [&](Index sample, Index shared, Index slice) {
      const auto keys = share(all_keys, slice, slices);
      scratch.begin((D + E) * key_row + 2 * BACKWARD_KEYS * width +
                    BACKWARD_KEYS * value_width + 2 * BACKWARD_ROWS * key_row +
                    group * (most_rows * (2 * width + value_width) +
                             2 * up(most_rows)) +
                    16 * LANES);
      float* key_turned = scratch.take(D * key_row);
      float* value_turned = scratch.take(E * key_row);
      float* keys_here = scratch.take(BACKWARD_KEYS * width);
      float* key_sums = scratch.take(BACKWARD_KEYS * width);
      float* value_sums = scratch.take(BACKWARD_KEYS * value_width);
      float* p = scratch.take(BACKWARD_ROWS * key_row);
      float* grad_scores = scratch.take(BACKWARD_ROWS * key_row);
      float* all_scaled = scratch.take(group * most_rows * width);
      float* all_grads_out = scratch.take(group * most_rows * value_width);
      float* all_query_sums = scratch.take(group * most_rows * width);
      float* all_minus_lse = scratch.take(group * most_rows);
      float* all_deltas = scratch.take(group * most_rows);
      const Matrix own_key = head(*key, sample, shared);
      const Matrix own_value = head(*value, sample, shared);
      const bool more = go_on && !slice;
      const auto grad_of = [&](Index number) {
        return slice ? other(slice, sample, number)
                     : head(*grad_query, sample, number);
      };
      const Matrix key_grad = head(*grad_key, sample, shared);
      const Matrix value_grad = head(*grad_value, sample, shared);
      // Tiles of keys whose gradients are there.
      std::vector<bool> there(keys.size(), false);
      for (const std::vector<Range>& parts : bands) {
        const Index begin = parts.front().begin;
        const Index count = size_of(parts);
        for (Index h = 0; h < group; ++h) {
          const Index number = shared * group + h, place = h * most_rows;
          const Matrix own_query = head(*query, sample, number);
          const Matrix own_grad = head(*grad_out, sample, number);
          const Matrix own_lse = head(*lse, sample, number);
          const Matrix own_delta = head(*delta, sample, number);
          copy({own_query.at(begin), own_query.row}, count, D,
               all_scaled + place * width, count, width, visit->scale * LOG2E);
          copy({own_grad.at(begin), own_grad.row}, count, E,
               all_grads_out + place * value_width, count, value_width);
          float* sums = all_query_sums + place * width;
          std::fill(sums, sums + count * width, 0.0f);
          for (Index i = 0; i < count; ++i) {
            const float l = *own_lse.at(begin + i);
            all_minus_lse[place + i] = l == NEVER ? NEVER : -l * LOG2E;
            all_deltas[place + i] = *own_delta.at(begin + i);
          }
        }
        for (std::size_t t = 0; t < keys.size(); ++t) {
          const Range& tile = keys[t];
          if (!met(*visit, parts, tile)) continue;
          const Index padded = up(tile.size());
          const Matrix tile_key{own_key.at(tile.begin), own_key.row};
          const Matrix tile_value{own_value.at(tile.begin), own_value.row};
          turn(tile_key, tile.size(), D, key_turned, key_row, padded);
          turn(tile_value, tile.size(), E, value_turned, key_row, padded);
          copy(tile_key, tile.size(), D, keys_here, padded, width);
          std::fill(key_sums, key_sums + padded * width, 0.0f);
          std::fill(value_sums, value_sums + padded * value_width, 0.0f);
          for (Index h = 0; h < group; ++h) {
            const Mask all_pairs = mask_of(*visit, sample, shared * group + h);
            for (const Range& part : parts) {
              const Index place = h * most_rows + part.begin - begin;
              backward_part(band(*visit, part, tile), part.size(), D, E,
                            all_pairs.from(part.begin, tile.begin),
                            {key_turned, value_turned, keys_here, key_sums,
                             value_sums, tile.size()},
                            all_scaled + place * width,
                            all_grads_out + place * value_width,
                            all_minus_lse + place, all_deltas + place,
                            all_query_sums + place * width, p, grad_scores);
            }
          }
          for (Index i = 0; i < tile.size(); ++i) {
            put(key_sums + i * width, LN2, D, key_grad.at(tile.begin + i),
                there[t]);
            put(value_sums + i * value_width, 1.0f, E,
                value_grad.at(tile.begin + i), there[t]);
          }
          there[t] = true;
        }
        for (Index h = 0; h < group; ++h) {
          const Index number = shared * group + h;
          const Matrix grad = grad_of(number);
          for (Index i = 0; i < count; ++i)
            put(all_query_sums + (h * most_rows + i) * width, visit->scale, D,
                grad.at(begin + i), more);
        }
      }
      if (!more)
        for (Index h = 0; h < group; ++h)
          for (const Range& part : blind)
            clear(grad_of(shared * group + h), part, D);
      for (std::size_t t = 0; t < keys.size(); ++t)
        if (!there[t]) {
          clear(key_grad, keys[t], D);
          clear(value_grad, keys[t], E);
        }
    });
    if (slices == 1) return;
    each(*visit, 1, [&](Index sample, Index shared, Index) {
      for (Index slice = 1; slice < slices; ++slice)
        for (Index h = shared * group; h < (shared + 1) * group; ++h) {
          const Matrix grad = head(*grad_query, sample, h);
          const Matrix share = other(slice, sample, h);
          for (Index i = 0; i < visit->queries; ++i)
            for (Index j = 0; j < D; ++j) grad.at(i)[j] += share.at(i)[j];
        }
    });
  });
}
