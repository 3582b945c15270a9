// The small matrix product, and what it multiplies.
//
// Every product is the same one, of numbers spread over a register with rows
// of a packed matrix. Vectors are the compiler's, as wide as the processor's.

#ifndef KERAS_RING_GEMM_H
#define KERAS_RING_GEMM_H

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "attention.h"

namespace keras_ring {

// Numbers in a vector, and vectors and rows of a product that fit into the
// registers with what is multiplied.
#if defined(__AVX512F__)
inline constexpr int LANES = 16, ACROSS = 4, DOWN = 6;
#elif defined(__AVX__)
inline constexpr int LANES = 8, ACROSS = 2, DOWN = 6;
#elif defined(__aarch64__)
inline constexpr int LANES = 4, ACROSS = 4, DOWN = 6;
#else
inline constexpr int LANES = 4, ACROSS = 2, DOWN = 6;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
using Index = int64_t;

// Rows of packed keys do not all begin in the same places of a cache.
inline constexpr Index GAP = LANES;

inline constexpr float LOG2E = 1.44269504088896341f;
inline constexpr float LN2 = 0.69314718055994531f;

constexpr Index up(Index number) {
  return (number + LANES - 1) / LANES * LANES;
}
constexpr Index down(Index number) { return number / LANES * LANES; }

inline Vector load(const float* from) {
  Vector found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

inline void store(float* to, Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
}

// The difference, unlike the sum, is no operation: -0 stays what it is.
inline Vector all(float number) { return number - Vector{}; }

// 2^x to float32's precision; 0 below -127, and what is no number stays none.
inline Vector exp2(Vector x) {
  const Vector lowest = all(-127.0f), magic = all(12582912.0f);
  x = x < lowest ? lowest : x;
  const Vector shifted = x + magic;  // The nearest integer, in the low bits.
  const Vector f = x - (shifted - magic);
  Vector p = all(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  const Vector found = (Vector)((Integers)p + ((Integers)shifted << 23));
  return x == x ? found : x;
}

// One number of all of a vector's, by halves.
template <int N, class Function>
inline float reduced(const float* numbers, const Function& function) {
  if constexpr (N == 1) {
    return *numbers;
  } else {
    float half[N / 2];
    for (int i = 0; i < N / 2; ++i)
      half[i] = function(numbers[i], numbers[i + N / 2]);
    return reduced<N / 2>(half, function);
  }
}

template <class Function>
inline float reduced(Vector vector, const Function& function) {
  float numbers[LANES];
  store(numbers, vector);
  return reduced<LANES>(numbers, function);
}

// c (M, N vectors) = a (M, depth) b (depth, N vectors), added to c with ADD.
// `a` has any strides; rows of `b` and `c` lie `b_row` and `c_row` apart.
template <int M, int N, bool ADD>
inline void block(const float* a, Index a_row, Index a_column, const float* b,
                  Index b_row, float* c, Index c_row, Index depth) {
  Vector sums[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      sums[m][n] = ADD ? load(c + m * c_row + n * LANES) : Vector{};
  for (Index k = 0; k < depth; ++k) {
    Vector right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) right[n] = load(b + k * b_row + n * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vector left = all(a[m * a_row + k * a_column]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n] += left * right[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + m * c_row + n * LANES, sums[m][n]);
}

// The same with up to M rows and any number of vectors.
template <int M, bool ADD>
void rows_of(Index rows, Index columns, const float* a, Index a_row,
             Index a_column, const float* b, Index b_row, float* c,
             Index c_row, Index depth) {
  if (rows < M) {
    if constexpr (M > 1)
      rows_of<M - 1, ADD>(rows, columns, a, a_row, a_column, b, b_row, c,
                          c_row, depth);
    return;
  }
  Index done = 0;
  for (; columns - done >= ACROSS * LANES; done += ACROSS * LANES)
    block<M, ACROSS, ADD>(a, a_row, a_column, b + done, b_row, c + done, c_row,
                          depth);
  if constexpr (ACROSS > 2)
    for (; columns - done >= 2 * LANES; done += 2 * LANES)
      block<M, 2, ADD>(a, a_row, a_column, b + done, b_row, c + done, c_row,
                       depth);
  for (; done < columns; done += LANES)
    block<M, 1, ADD>(a, a_row, a_column, b + done, b_row, c + done, c_row,
                     depth);
}

// c (rows, columns) = a (rows, depth) b (depth, columns), added with ADD;
// `rows` up to DOWN, `columns` whole vectors.
template <bool ADD>
void product(Index rows, Index columns, const float* a, Index a_row,
             Index a_column, const float* b, Index b_row, float* c, Index c_row,
             Index depth) {
  rows_of<DOWN, ADD>(rows, columns, a, a_row, a_column, b, b_row, c, c_row,
                     depth);
}

// Memory that a thread keeps, for what fits into a cache.
class Scratch {
 public:
  // All that `take` gave before is free again.
  void begin(Index numbers) {
    if (static_cast<Index>(memory_.size()) < numbers) memory_.resize(numbers);
    used_ = 0;
  }
  float* take(Index numbers) {
    float* found = memory_.data() + used_;
    used_ += up(numbers);
    return found;
  }

 private:
  std::vector<float> memory_;
  Index used_ = 0;
};

inline thread_local Scratch scratch;

// One head: rows that lie `row` apart.
struct Matrix {
  float* data;
  Index row;
  float* at(Index i) const { return data + i * row; }
};

inline Matrix head(const keras_ring_tensor& tensor, Index sample,
                   Index number) {
  return {tensor.data + sample * tensor.batch + number * tensor.head,
          tensor.row};
}

// Numbers of two vectors in turn, of their first or of their second halves.
template <bool SECOND, int... I>
inline Vector mixed(Vector a, Vector b, std::integer_sequence<int, I...>) {
  constexpr int from = SECOND ? LANES / 2 : 0;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (from + I / 2 + I % 2 * LANES)...);
#else
  return __builtin_shuffle(a, b,
                           Integers{(from + I / 2 + I % 2 * LANES)...});
#endif
}

// A square of as many rows as a vector has numbers.
inline void turn_square(const Matrix& from, float* to, Index to_row) {
  constexpr std::make_integer_sequence<int, LANES> lanes{};
  Vector rows[LANES], next[LANES];
  for (int i = 0; i < LANES; ++i) rows[i] = load(from.at(i));
  // After each step a row has numbers of twice as many of the rows.
  for (int step = 1; step < LANES; step *= 2) {
    for (int i = 0; i < LANES / 2; ++i) {
      next[2 * i] = mixed<false>(rows[i], rows[i + LANES / 2], lanes);
      next[2 * i + 1] = mixed<true>(rows[i], rows[i + LANES / 2], lanes);
    }
    std::copy(next, next + LANES, rows);
  }
  for (int i = 0; i < LANES; ++i) store(to + i * to_row, rows[i]);
}

// to (columns, rows) = from (rows, columns), with zeros behind up to `padded`.
inline void turn(const Matrix& from, Index rows, Index columns, float* to,
                 Index to_row, Index padded) {
  for (Index i = 0; i < rows; i += LANES) {
    Index j = 0;
    if (i + LANES <= rows)
      for (; j + LANES <= columns; j += LANES)
        turn_square({from.at(i) + j, from.row}, to + j * to_row + i, to_row);
    for (; j < columns; ++j)
      for (Index r = i; r < std::min(i + LANES, rows); ++r)
        to[j * to_row + r] = from.at(r)[j];
  }
  for (Index j = 0; j < columns; ++j)
    std::fill(to + j * to_row + rows, to + j * to_row + padded, 0.0f);
}

// to (padded rows, padded columns) = from (rows, columns), zeros elsewhere.
inline void copy(const Matrix& from, Index rows, Index columns, float* to,
                 Index padded_rows, Index padded_columns,
                 float factor = 1.0f) {
  for (Index i = 0; i < rows; ++i) {
    float* row = to + i * padded_columns;
    for (Index j = 0; j < columns; ++j) row[j] = from.at(i)[j] * factor;
    std::fill(row + columns, row + padded_columns, 0.0f);
  }
  std::fill(to + rows * padded_columns, to + padded_rows * padded_columns,
            0.0f);
}

}  // namespace keras_ring

#endif
