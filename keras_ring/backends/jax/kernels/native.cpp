// The C++ attention as calls from XLA's programs.
//
// Tensors of rows are (batch, heads, length, width), those of one number a row
// (batch, heads, length). What a call goes on with comes after the others, in
// the memory of the results.

#include <cstring>
#include <utility>

#include "attention.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Rows = ffi::BufferR4<ffi::F32>;
using Numbers = ffi::BufferR3<ffi::F32>;
using Starts = ffi::BufferR1<ffi::S32>;

keras_ring_tensor tensor(Rows rows) {
  const auto sizes = rows.dimensions();
  return {rows.typed_data(), sizes[1] * sizes[2] * sizes[3],
          sizes[2] * sizes[3], sizes[3]};
}

keras_ring_tensor tensor(Numbers numbers) {
  const auto sizes = numbers.dimensions();
  return {numbers.typed_data(), sizes[1] * sizes[2], sizes[2], 1};
}

keras_ring_visit visit_of(Rows query, Rows key, Rows value,
                          Starts query_starts, Starts key_starts, int64_t least,
                          int64_t most, int64_t stop, int64_t rows,
                          float scale, int32_t threads) {
  const auto queries = query.dimensions(), keys = key.dimensions();
  return {queries[0],
          queries[1],
          keys[1],
          queries[2],
          keys[2],
          queries[3],
          value.dimensions()[3],
          static_cast<int64_t>(query_starts.element_count()),
          static_cast<int64_t>(key_starts.element_count()),
          query_starts.typed_data(),
          key_starts.typed_data(),
          least,
          most,
          stop,
          rows,
          scale,
          threads};
}

// The results share their memory with what is gone on with, unless somebody
// has not asked for that.
ffi::Error go_on(ffi::RemainingArgs before, size_t index, void* result,
                 size_t bytes) {
  auto buffer = before.get<ffi::AnyBuffer>(index);
  if (!buffer.has_value()) return buffer.error();
  if (buffer->size_bytes() != bytes)
    return ffi::Error::InvalidArgument("results of another size");
  if (buffer->untyped_data() != result)
    std::memcpy(result, buffer->untyped_data(), bytes);
  return ffi::Error::Success();
}

ffi::Error done(int32_t status) {
  if (status == 0) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a tile");
}

ffi::Error forward(Rows query, Rows key, Rows value, Starts query_starts,
                   Starts key_starts, ffi::RemainingArgs before,
                   ffi::Result<Rows> out, ffi::Result<Numbers> lse,
                   int64_t least, int64_t most, int64_t stop, int64_t rows,
                   float scale, int32_t threads) {
  const bool more = before.size() > 0;
  if (more) {
    auto error = go_on(before, 0, out->untyped_data(), out->size_bytes());
    if (error.failure()) return error;
    error = go_on(before, 1, lse->untyped_data(), lse->size_bytes());
    if (error.failure()) return error;
  }
  const auto visit = visit_of(query, key, value, query_starts, key_starts,
                              least, most, stop, rows, scale, threads);
  const auto q = tensor(query), k = tensor(key), v = tensor(value),
             o = tensor(*out), l = tensor(*lse);
  return done(keras_ring_forward(&visit, &q, &k, &v, &o, &l, more));
}

ffi::Error backward(Rows query, Rows key, Rows value, Starts query_starts,
                    Starts key_starts, Numbers lse, Numbers delta,
                    Rows grad_out, ffi::RemainingArgs before,
                    ffi::Result<Rows> grad_query, ffi::Result<Rows> grad_key,
                    ffi::Result<Rows> grad_value, int64_t least, int64_t most,
                    int64_t stop, int64_t rows, float scale, int32_t threads) {
  const bool more = before.size() > 0;
  if (more) {
    auto error = go_on(before, 0, grad_query->untyped_data(),
                       grad_query->size_bytes());
    if (error.failure()) return error;
  }
  const auto visit = visit_of(query, key, value, query_starts, key_starts,
                              least, most, stop, rows, scale, threads);
  const auto q = tensor(query), k = tensor(key), v = tensor(value),
             l = tensor(lse), d = tensor(delta), g = tensor(grad_out),
             gq = tensor(*grad_query), gk = tensor(*grad_key),
             gv = tensor(*grad_value);
  return done(keras_ring_backward(&visit, &q, &k, &v, &l, &d, &g, &gq, &gk,
                                  &gv, more));
}

template <class Binding>
auto with_attributes(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("least")
      .template Attr<int64_t>("most")
      .template Attr<int64_t>("stop")
      .template Attr<int64_t>("rows")
      .template Attr<float>("scale")
      .template Attr<int32_t>("threads");
}

auto visit_binding() {
  return ffi::Ffi::Bind()
      .Arg<Rows>()
      .Arg<Rows>()
      .Arg<Rows>()
      .Arg<Starts>()
      .Arg<Starts>();
}

}  // namespace

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(keras_ring_xla_forward, forward,
                              with_attributes(visit_binding()
                                                  .RemainingArgs()
                                                  .Ret<Rows>()
                                                  .Ret<Numbers>()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(keras_ring_xla_backward, backward,
                              with_attributes(visit_binding()
                                                  .Arg<Numbers>()
                                                  .Arg<Numbers>()
                                                  .Arg<Rows>()
                                                  .RemainingArgs()
                                                  .Ret<Rows>()
                                                  .Ret<Rows>()
                                                  .Ret<Rows>()));

#pragma GCC visibility pop
