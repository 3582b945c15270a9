// Random visits to the C++ attention against sums in double precision.
//
//     native_cases NUMBER
//
// To be compiled with sanitizers, which see what a comparison does not.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "attention.h"

namespace {

using Numbers = std::vector<float>;

std::mt19937 generator(1);

int between(int low, int high) {
  return low + static_cast<int>(generator() % unsigned(high - low + 1));
}

Numbers drawn(size_t count) {
  std::normal_distribution<float> normal;
  Numbers found(count);
  for (float& number : found) number = normal(generator);
  return found;
}

void expect(double have, double want, const char* what, int number) {
  if (have == want) return;
  const double error = std::fabs(have - want) / (1 + std::fabs(want));
  if (error < 1e-4) return;
  std::printf("%s of case %d is %g and not %g\n", what, number, have, want);
  std::exit(1);
}

// One sequence of (batch, heads, length, width) without gaps.
struct Tensor {
  int heads, length, width;
  Numbers numbers;
  size_t at(int sample, int head, int row) const {
    return ((size_t(sample) * heads + head) * length + row) * width;
  }
  keras_ring_tensor view() {
    return {numbers.data(), int64_t(heads) * length * width,
            int64_t(length) * width, width};
  }
};

void run(int number) {
  const int longest = number % 10 ? 60 : 300;
  const int batch = between(1, 2), key_heads = between(1, 3);
  const int group = between(1, 3), heads = key_heads * group;
  const int width = between(1, 40), value_width = between(1, 40);
  const int query_parts = between(1, 3), key_parts = between(1, 3);
  const int queries = query_parts * between(1, longest);
  const int keys = key_parts * between(1, longest);
  std::vector<int32_t> query_starts, key_starts;
  for (int i = 0; i < query_parts; ++i) query_starts.push_back(between(0, 300));
  for (int i = 0; i < key_parts; ++i) key_starts.push_back(between(0, 300));
  const int64_t far = int64_t(1) << 40;
  const int64_t least = between(0, 2) ? between(-100, 50) : -far;
  // Maybe none at all.
  const int64_t most = between(0, 2) ? between(-50, 150) : far;
  const int64_t stop = between(0, 3) ? far : between(0, 400);
  const int64_t rows = between(0, 3) ? far : between(0, 400);
  const bool masked = between(0, 2) == 0, by_head = between(0, 1);
  std::vector<uint8_t> mask(size_t(batch) * (by_head ? heads : 1) * queries *
                            keys);
  for (uint8_t& counts : mask) counts = between(0, 3) > 0;
  const auto tensor = [&](int heads, int length, int width) {
    const size_t count = size_t(batch) * heads * length * width;
    return Tensor{heads, length, width, drawn(count)};
  };
  // Results hold something else before.
  Tensor query = tensor(heads, queries, width),
         key = tensor(key_heads, keys, width),
         value = tensor(key_heads, keys, value_width),
         out = tensor(heads, queries, value_width),
         lse = tensor(heads, queries, 1), delta = tensor(heads, queries, 1),
         grad_out = tensor(heads, queries, value_width), grad_query = query,
         grad_key = key, grad_value = value;
  const float scale = 0.3f;
  const keras_ring_visit visit{
      batch, heads, key_heads, queries, keys, width, value_width, query_parts,
      key_parts, query_starts.data(), key_starts.data(), least, most, stop,
      rows, scale, between(1, 5), masked ? mask.data() : nullptr,
      int64_t(by_head ? heads : 1) * queries * keys,
      by_head ? int64_t(queries) * keys : 0, keys};
  keras_ring_tensor q = query.view(), k = key.view(), v = value.view(),
                    o = out.view(), l = lse.view(), d = delta.view(),
                    g = grad_out.view(), gq = grad_query.view(),
                    gk = grad_key.view(), gv = grad_value.view();
  keras_ring_forward(&visit, &q, &k, &v, &o, &l, 0);
  keras_ring_backward(&visit, &q, &k, &v, &l, &d, &g, &gq, &gk, &gv, 0);

  std::vector<double> want_key(key.numbers.size()),
      want_value(value.numbers.size());
  for (int b = 0; b < batch; ++b)
    for (int h = 0; h < heads; ++h)
      for (int i = 0; i < queries; ++i) {
        const int part = queries / query_parts;
        const int position = query_starts[i / part] + i % part;
        const float* own = &query.numbers[query.at(b, h, i)];
        const float* grad = &grad_out.numbers[grad_out.at(b, h, i)];
        std::vector<double> scores(keys, -INFINITY);
        double total = 0;
        for (int j = 0; j < keys; ++j) {
          const int key_part = keys / key_parts;
          const int there = key_starts[j / key_part] + j % key_part;
          const size_t pair = size_t(b) * visit.mask_batch +
                              size_t(h) * visit.mask_head + size_t(i) * keys + j;
          if (position - there < least || position - there > most ||
              there >= stop || position >= rows || (masked && !mask[pair]))
            continue;
          const float* seen = &key.numbers[key.at(b, h / group, j)];
          scores[j] = 0;
          for (int x = 0; x < width; ++x)
            scores[j] += double(own[x]) * seen[x] * scale;
          total += std::exp(scores[j]);
        }
        const double log_total = std::log(total);
        expect(lse.numbers[lse.at(b, h, i)], log_total, "lse", number);
        std::vector<double> want_out(value_width), want_query(width);
        for (int j = 0; j < keys; ++j) {
          if (scores[j] == -INFINITY) continue;
          const double p = std::exp(scores[j] - log_total);
          const size_t at = key.at(b, h / group, j);
          const size_t value_at = value.at(b, h / group, j);
          double grad_p = -delta.numbers[delta.at(b, h, i)];
          for (int x = 0; x < value_width; ++x) {
            want_out[x] += p * value.numbers[value_at + x];
            grad_p += double(grad[x]) * value.numbers[value_at + x];
            want_value[value_at + x] += p * grad[x];
          }
          for (int x = 0; x < width; ++x) {
            want_query[x] += p * grad_p * scale * key.numbers[at + x];
            want_key[at + x] += p * grad_p * scale * own[x];
          }
        }
        for (int x = 0; x < value_width; ++x)
          expect(out.numbers[out.at(b, h, i) + x], want_out[x], "out", number);
        for (int x = 0; x < width; ++x)
          expect(grad_query.numbers[query.at(b, h, i) + x], want_query[x],
                 "grad_query", number);
      }
  for (size_t x = 0; x < want_key.size(); ++x)
    expect(grad_key.numbers[x], want_key[x], "grad_key", number);
  for (size_t x = 0; x < want_value.size(); ++x)
    expect(grad_value.numbers[x], want_value[x], "grad_value", number);
}

}  // namespace

int main(int, char** arguments) {
  const int count = std::atoi(arguments[1]);
  for (int number = 0; number < count; ++number) run(number);
  std::printf("%d cases\n", count);
}
