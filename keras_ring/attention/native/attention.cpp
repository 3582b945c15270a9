// Exact attention over one visiting chunk on a CPU.
//
// Online softmax over tiles of keys (Dao et al. 2022, arXiv 2205.14135,
// algorithms 1 and 4). A few rows of queries at a time meet a tile of keys, so
// that their scores never leave the innermost cache; every product is the
// same small one, of numbers spread over a register with rows of a packed
// matrix. Vectors are the compiler's, as wide as the processor's.

#include "attention.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <limits>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace {

// Numbers in a vector, and vectors and rows of a product that fit into the
// registers with what is multiplied.
#if defined(__AVX512F__)
constexpr int LANES = 16, ACROSS = 4, DOWN = 6;
#elif defined(__AVX__)
constexpr int LANES = 8, ACROSS = 2, DOWN = 6;
#elif defined(__aarch64__)
constexpr int LANES = 4, ACROSS = 4, DOWN = 6;
#else
constexpr int LANES = 4, ACROSS = 2, DOWN = 6;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
using Index = int64_t;

// Keys that are packed at a time, and in the backward queries.
constexpr Index FORWARD_KEYS = 256, BACKWARD_KEYS = 256, ROWS = 96;
// Tiles of keys that rows of the forward meet one after the other, before the
// next rows.
constexpr Index TOGETHER = 4;
// Queries, of all heads that share a key head, that the backward packs at a
// time.
constexpr Index BAND = 2048;
// What a slice costs, in the time of a whole head.
constexpr double SLICE = 0.05;
// What slices of keys may have of the query's gradient beside the result.
constexpr Index SLICES = Index(1) << 26;
// Rows of packed keys do not all begin in the same places of a cache.
constexpr Index GAP = LANES;

constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.69314718055994531f;
constexpr float NEVER = -std::numeric_limits<float>::infinity();

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

thread_local Scratch scratch;

// One head: rows that lie `row` apart.
struct Matrix {
  float* data;
  Index row;
  float* at(Index i) const { return data + i * row; }
};

Matrix head(const keras_ring_tensor& tensor, Index sample, Index number) {
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
void turn(const Matrix& from, Index rows, Index columns, float* to,
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
void copy(const Matrix& from, Index rows, Index columns, float* to,
          Index padded_rows, Index padded_columns, float factor = 1.0f) {
  for (Index i = 0; i < rows; ++i) {
    float* row = to + i * padded_columns;
    for (Index j = 0; j < columns; ++j) row[j] = from.at(i)[j] * factor;
    std::fill(row + columns, row + padded_columns, 0.0f);
  }
  std::fill(to + rows * padded_columns, to + padded_rows * padded_columns,
            0.0f);
}

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

// A tile that is contiguous in queries and in keys.
struct Range {
  Index begin, end, position;
  Index size() const { return end - begin; }
};

void clear(const Matrix& rows, const Range& which, Index columns) {
  for (Index i = which.begin; i < which.end; ++i)
    std::fill(rows.at(i), rows.at(i) + columns, 0.0f);
}

constexpr Index NOWHERE = std::numeric_limits<Index>::max() / 2;

// The parts of a side, cut into tiles, and at a position.
std::vector<Range> ranges(Index length, Index parts, const int32_t* starts,
                          Index tile, Index position = NOWHERE) {
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

Band band(const keras_ring_visit& visit, const Range& rows,
          const Range& columns) {
  const Index there =
      visit.least > visit.most || rows.position >= visit.rows
          ? 0
          : std::max<Index>(visit.stop - columns.position, 0);
  return {rows.position - columns.position, visit.least, visit.most,
          std::min(columns.size(), there)};
}

// Whether some of the queries see some of the keys.
bool met(const keras_ring_visit& visit, const Range& queries,
         const Range& keys) {
  const Band seen = band(visit, queries, keys);
  return seen.first(0) < seen.end(queries.size() - 1);
}

bool met(const keras_ring_visit& visit, const std::vector<Range>& queries,
         const Range& keys) {
  return std::any_of(queries.begin(), queries.end(), [&](const Range& part) {
    return met(visit, part, keys);
  });
}

Index size_of(const std::vector<Range>& parts) {
  return parts.back().end - parts.front().begin;
}

// Neighbouring parts in bands of up to so many rows, one part at least.
std::vector<std::vector<Range>> bands_of(const std::vector<Range>& parts,
                                         Index most) {
  std::vector<std::vector<Range>> found;
  for (const Range& part : parts) {
    if (found.empty() || part.begin != found.back().back().end ||
        part.end - found.back().front().begin > most)
      found.emplace_back();
    found.back().push_back(part);
  }
  return found;
}

// Threads that wait for work. They stay, with their scratch memory: to start
// one for each call takes as long as a small visit.
class Pool {
 public:
  // Call `work` here and in up to `helpers` threads at once, and return when
  // all of them have.
  void run(Index helpers, const std::function<void()>& work) {
    Job job{&work};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      wanted_ += helpers;
      try {
        for (; count_ < wanted_; ++count_)
          std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        // No more than there are: the caller works as well.
      }
      jobs_.insert(jobs_.end(), helpers, &job);
    }
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());
    done_.wait(lock, [&] { return job.running == 0; });
    wanted_ -= helpers;
  }

 private:
  struct Job {
    const std::function<void()>* work;
    int running = 0;
  };

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return !jobs_.empty(); });
      Job* job = jobs_.front();
      jobs_.pop_front();
      ++job->running;
      lock.unlock();
      (*job->work)();
      lock.lock();
      if (--job->running == 0) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<Job*> jobs_;
  // Threads, and helpers of all calls at this moment.
  Index count_ = 0, wanted_ = 0;
};

// Never destroyed, since its threads end with the process. A process that was
// forked has none of them, and gets its own.
Pool*& pool() {
  static Pool* found = [] {
    pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
    return new Pool;
  }();
  return found;
}

std::atomic<keras_ring_parallel> parallel{nullptr};

// Call `work` in several threads. What is thrown in one is thrown here.
void in_threads(Index threads, const std::function<void()>& work) {
  std::mutex mutex;
  std::exception_ptr thrown;
  const std::function<void()> caught = [&] {
    try {
      work();
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      thrown = std::current_exception();
    }
  };
  if (threads < 2)
    caught();
  else if (const keras_ring_parallel call = parallel.load())
    call([](void* data) {
      (*static_cast<const std::function<void()>*>(data))();
    }, const_cast<void*>(static_cast<const void*>(&caught)),
         static_cast<unsigned>(threads), 0);
  else
    pool()->run(threads - 1, caught);
  if (thrown) std::rethrow_exception(thrown);
}

// In how many slices the work of a sample and key head is cut, `most` at most:
// as many as leave the fewest threads idle at the end, against what each slice
// costs.
Index slices_of(const keras_ring_visit& visit, Index most) {
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
  in_threads(std::min<Index>(visit.threads, count), work);
}

// Every `slices`-th, from `slice` on.
std::vector<Range> share(const std::vector<Range>& all, Index slice,
                         Index slices) {
  std::vector<Range> found;
  for (std::size_t i = slice; i < all.size(); i += slices)
    found.push_back(all[i]);
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

Mask mask_of(const keras_ring_visit& visit, Index sample, Index number) {
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
        slices_of(*visit, (visit->queries + ROWS - 1) / ROWS);
    const auto all_queries =
        ranges(visit->queries, visit->query_parts, visit->query_starts,
               slices == 1 ? visit->queries : ROWS, visit->rows);
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

extern "C" int32_t keras_ring_backward(
    const keras_ring_visit* visit, const keras_ring_tensor* query,
    const keras_ring_tensor* key, const keras_ring_tensor* value,
    const keras_ring_tensor* lse, const keras_ring_tensor* delta,
    const keras_ring_tensor* grad_out, const keras_ring_tensor* grad_query,
    const keras_ring_tensor* grad_key, const keras_ring_tensor* grad_value,
    int32_t go_on) {
  return status([&] {
    const auto queries =
        ranges(visit->queries, visit->query_parts, visit->query_starts, ROWS,
               visit->rows);
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
    const auto bands = bands_of(seeing, std::max<Index>(ROWS, BAND / group));
    Index most_rows = 0;
    for (const auto& parts : bands)
      most_rows = std::max(most_rows, size_of(parts));
    each(*visit, slices, [&](Index sample, Index shared, Index slice) {
      const auto keys = share(all_keys, slice, slices);
      scratch.begin((D + E) * key_row + 2 * BACKWARD_KEYS * width +
                    BACKWARD_KEYS * value_width + 2 * ROWS * key_row +
                    group * (most_rows * (2 * width + value_width) +
                             2 * up(most_rows)) +
                    16 * LANES);
      float* key_turned = scratch.take(D * key_row);
      float* value_turned = scratch.take(E * key_row);
      float* keys_here = scratch.take(BACKWARD_KEYS * width);
      float* key_sums = scratch.take(BACKWARD_KEYS * width);
      float* value_sums = scratch.take(BACKWARD_KEYS * value_width);
      float* p = scratch.take(ROWS * key_row);
      float* grad_scores = scratch.take(ROWS * key_row);
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

extern "C" void keras_ring_use_threads(keras_ring_parallel call) {
  parallel = call;
}
