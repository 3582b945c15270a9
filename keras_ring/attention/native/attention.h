// Exact attention over one visiting chunk on a CPU: the C interface.
//
// Numbers are float32. All counts and strides are in numbers, not in bytes.

#ifndef KERAS_RING_ATTENTION_H
#define KERAS_RING_ATTENTION_H

#include <cstdint>

#define KERAS_RING_PUBLIC __attribute__((visibility("default")))

extern "C" {

// (batch, heads, length, width) with neighbouring numbers along the width.
struct keras_ring_tensor {
  float* data;
  int64_t batch, head, row;  // Strides.
};

// What is the same for both directions.
struct keras_ring_visit {
  // A query head reads the key head of its group.
  int64_t batch, heads, key_heads;
  int64_t queries, keys;       // Lengths.
  int64_t width, value_width;  // Of query and key, and of value.
  // A chunk is of equal parts, each with the global position of its first.
  int64_t query_parts, key_parts;
  const int32_t* query_starts;
  const int32_t* key_starts;
  // A pair counts if least <= query position - key position <= most, the key
  // lies before the position `stop` and the query before the position `rows`.
  int64_t least, most, stop, rows;
  float scale;      // Of the products; above 0.
  int32_t threads;  // At most so many.
  // (batch, heads, queries, keys), neighbours along the keys: 0 where a pair
  // does not count. Null where there is nothing to add to the above.
  const uint8_t* mask;
  int64_t mask_batch, mask_head, mask_row;  // Strides.
};

// Both functions return 0, or 1 if there was no memory for a copy of a tile.

// The partial result of the visit. `lse` (batch, heads, queries) is the
// log-sum-exp, -inf in a row that sees nothing. With `go_on`, `out` and `lse`
// hold the result over other keys, and the visit is added.
KERAS_RING_PUBLIC int32_t keras_ring_forward(const keras_ring_visit* visit,
                        const keras_ring_tensor* query,
                        const keras_ring_tensor* key,
                        const keras_ring_tensor* value,
                        const keras_ring_tensor* out,
                        const keras_ring_tensor* lse, int32_t go_on);

// The gradients of the visit. `lse` is over all keys of the sequence, `delta`
// (batch, heads, queries) the sum of out * grad_out less the gradient of the
// log-sum-exp. With `go_on`, the query's is added to `grad_query`.
KERAS_RING_PUBLIC int32_t keras_ring_backward(
    const keras_ring_visit* visit, const keras_ring_tensor* query,
    const keras_ring_tensor* key, const keras_ring_tensor* value,
    const keras_ring_tensor* lse, const keras_ring_tensor* delta,
    const keras_ring_tensor* grad_out, const keras_ring_tensor* grad_query,
    const keras_ring_tensor* grad_key, const keras_ring_tensor* grad_value,
    int32_t go_on);

// The threads of a framework's OpenMP, which would otherwise wait for work on
// the same cores: called as `parallel(function, data, threads, 0)`, it calls
// `function(data)` in that many threads. Null for threads of the library's own.
typedef void (*keras_ring_parallel)(void (*function)(void*), void* data,
                                    unsigned threads, unsigned flags);
KERAS_RING_PUBLIC void keras_ring_use_threads(keras_ring_parallel parallel);

}  // extern "C"

#endif
