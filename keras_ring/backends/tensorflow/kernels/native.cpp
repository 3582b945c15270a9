// The C++ attention as operations of TensorFlow.
//
// Written against TensorFlow's C interface, which compiles in a second. The
// tensors are heads first and without gaps. What there is already of a result
// comes as a list `before`, of nothing where there is nothing, and is
// overwritten where nobody else holds it.

#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "attention.h"
#include "tensorflow/c/kernels.h"
#include "tensorflow/c/ops.h"
#include "tensorflow/c/tf_datatype.h"
#include "tensorflow/c/tf_status.h"
#include "tensorflow/c/tf_tensor.h"

namespace {

using Shape = std::vector<int64_t>;

struct Status {
  TF_Status* status = TF_NewStatus();
  ~Status() { TF_DeleteStatus(status); }
  operator TF_Status*() { return status; }
};

// What an operation fails with.
struct Failure {
  TF_Code code;
  std::string why;
};

[[noreturn]] void refuse(const std::string& why) {
  throw Failure{TF_INVALID_ARGUMENT, why};
}

void check(TF_Status* status) {
  if (TF_GetCode(status) != TF_OK)
    throw Failure{TF_GetCode(status), TF_Message(status)};
}

using Tensor = std::unique_ptr<TF_Tensor, decltype(&TF_DeleteTensor)>;

Tensor owned(TF_Tensor* tensor) { return {tensor, TF_DeleteTensor}; }

Tensor input(TF_OpKernelContext* context, int number) {
  Status status;
  TF_Tensor* tensor = nullptr;
  TF_GetInput(context, number, &tensor, status);
  check(status);
  return owned(tensor);
}

Shape shape_of(const Tensor& tensor) {
  Shape shape;
  for (int i = 0; i < TF_NumDims(tensor.get()); ++i)
    shape.push_back(TF_Dim(tensor.get(), i));
  return shape;
}

std::string words(const Shape& shape) {
  std::string found = "(";
  for (size_t i = 0; i < shape.size(); ++i)
    found += (i ? ", " : "") + std::to_string(shape[i]);
  return found + ")";
}

void expect(const Tensor& tensor, const char* name, const Shape& wanted) {
  const Shape shape = shape_of(tensor);
  if (shape != wanted)
    refuse(std::string("`") + name + "` must have the shape " + words(wanted) +
           ". Received: " + words(shape) + ".");
}

// (batch, heads, length, width), or (batch, heads, length).
keras_ring_tensor view(const Tensor& tensor) {
  const Shape shape = shape_of(tensor);
  const int64_t width = shape.size() == 4 ? shape[3] : 1;
  return {static_cast<float*>(TF_TensorData(tensor.get())),
          shape[1] * shape[2] * width, shape[2] * width, width};
}

// The attributes of an operation.
struct Attributes {
  int64_t least, most;
  float scale;
  int32_t threads;
};

void* create(TF_OpKernelConstruction* construction) {
  Status status;
  Attributes found{};
  const auto integer = [&](const char* name, int64_t* to) {
    if (TF_GetCode(status) == TF_OK)
      TF_OpKernelConstruction_GetAttrInt64(construction, name, to, status);
  };
  integer("least", &found.least);
  integer("most", &found.most);
  if (TF_GetCode(status) == TF_OK)
    TF_OpKernelConstruction_GetAttrFloat(construction, "scale", &found.scale,
                                         status);
  if (TF_GetCode(status) == TF_OK)
    TF_OpKernelConstruction_GetAttrInt32(construction, "threads",
                                         &found.threads, status);
  if (TF_GetCode(status) != TF_OK) {
    TF_OpKernelConstruction_Failure(construction, status);
    return nullptr;
  }
  return new Attributes(found);
}

void destroy(void* kernel) { delete static_cast<Attributes*>(kernel); }

// Query, key and value, the starts of their parts and the limits of their
// positions: the first six inputs.
struct Inputs {
  Tensor query, key, value, query_starts, key_starts, limits;
  keras_ring_visit visit;

  Inputs(TF_OpKernelContext* context, const Attributes& attributes)
      : query(input(context, 0)),
        key(input(context, 1)),
        value(input(context, 2)),
        query_starts(input(context, 3)),
        key_starts(input(context, 4)),
        limits(input(context, 5)) {
    expect(limits, "limits", {2});
    const auto* limit =
        static_cast<const int64_t*>(TF_TensorData(limits.get()));
    const Shape q = rows("query", query), k = rows("key", key),
                v = rows("value", value);
    if (k[0] != q[0] || k[3] != q[3] || v[0] != k[0] || v[1] != k[1] ||
        v[2] != k[2])
      refuse("`query` (batch, heads, queries, width), `key` (batch, key_heads, "
             "keys, width) and `value` (batch, key_heads, keys, value_width) "
             "must fit each other. Received: " +
             words(q) + ", " + words(k) + " and " + words(v) + ".");
    if (q[1] % k[1])
      refuse("The heads of `query` must be a multiple of those of `key`. "
             "Received: " + words(q) + " and " + words(k) + ".");
    visit = {q[0], q[1], k[1], q[2], k[2], q[3], v[3],
             parts("query_starts", query_starts, q[2]),
             parts("key_starts", key_starts, k[2]),
             static_cast<const int32_t*>(TF_TensorData(query_starts.get())),
             static_cast<const int32_t*>(TF_TensorData(key_starts.get())),
             attributes.least, attributes.most, limit[0], limit[1],
             attributes.scale, attributes.threads};
  }

  Shape per_query(int64_t width) const {
    return {visit.batch, visit.heads, visit.queries, width};
  }
  Shape per_query() const { return {visit.batch, visit.heads, visit.queries}; }

  static Shape rows(const char* name, const Tensor& tensor) {
    const Shape shape = shape_of(tensor);
    if (shape.size() != 4 || shape[1] < 1 || shape[3] < 1)
      refuse(std::string("`") + name + "` must have 4 axes, with some heads "
             "and a width. Received: " + words(shape) + ".");
    return shape;
  }

  static int64_t parts(const char* name, const Tensor& starts, int64_t length) {
    const Shape shape = shape_of(starts);
    if (shape.size() != 1 || shape[0] < 1 || length % shape[0])
      refuse(std::string("`") + name + "` must be a vector with a number for "
             "each of the equal parts of " + std::to_string(length) +
             " positions. Received: " + words(shape) + ".");
    return shape[0];
  }
};

Tensor allocated(TF_OpKernelContext* context, int output, const Shape& shape) {
  Status status;
  size_t bytes = sizeof(float);
  for (int64_t size : shape) bytes *= size;
  TF_Tensor* tensor =
      TF_AllocateOutput(context, output, TF_FLOAT, shape.data(),
                        static_cast<int>(shape.size()), bytes, status);
  check(status);
  return owned(tensor);
}

// What was there before, to be added to: the input itself if nobody else holds
// it, or a copy. Nobody may hold it here either.
Tensor continued(TF_OpKernelContext* context, int from, int output,
                 const char* name, const Shape& shape) {
  expect(input(context, from), name, shape);
  Status status;
  int forwarded = -1;
  Tensor result = owned(TF_ForwardInputOrAllocateOutput(
      context, &from, 1, output, shape.data(), static_cast<int>(shape.size()),
      &forwarded, status));
  check(status);
  if (forwarded < 0) {
    const Tensor before = input(context, from);
    std::memcpy(TF_TensorData(result.get()), TF_TensorData(before.get()),
                TF_TensorByteSize(result.get()));
  }
  return result;
}

// Whether there is something before, behind the first inputs.
bool goes_on(TF_OpKernelContext* context, int first, int count) {
  const int more = TF_NumInputs(context) - first;
  if (more != 0 && more != count)
    refuse("`before` must be of " + std::to_string(count) +
           " tensors or of none. Received: " + std::to_string(more) + ".");
  return more != 0;
}

void done(int32_t status) {
  if (status) throw std::bad_alloc();
}

void forward(TF_OpKernelContext* context, const Attributes& attributes) {
  const Inputs inputs(context, attributes);
  const auto& visit = inputs.visit;
  const Shape shape = inputs.per_query(visit.value_width);
  const bool go_on = goes_on(context, 6, 2);
  const Tensor out = go_on ? continued(context, 6, 0, "out", shape)
                           : allocated(context, 0, shape);
  const Tensor lse =
      go_on ? continued(context, 7, 1, "lse", inputs.per_query())
            : allocated(context, 1, inputs.per_query());
  const auto query = view(inputs.query), key = view(inputs.key),
             value = view(inputs.value), result = view(out),
             result_lse = view(lse);
  done(keras_ring_forward(&visit, &query, &key, &value, &result, &result_lse,
                          go_on));
}

void backward(TF_OpKernelContext* context, const Attributes& attributes) {
  const Inputs inputs(context, attributes);
  const auto& visit = inputs.visit;
  const Tensor lse = input(context, 6), delta = input(context, 7),
               grad_out = input(context, 8);
  expect(lse, "lse", inputs.per_query());
  expect(delta, "delta", inputs.per_query());
  expect(grad_out, "grad_out", inputs.per_query(visit.value_width));
  const Shape shape = inputs.per_query(visit.width);
  const bool go_on = goes_on(context, 9, 1);
  const Tensor grad_query = go_on
                                ? continued(context, 9, 0, "grad_query", shape)
                                : allocated(context, 0, shape);
  const Tensor grad_key = allocated(context, 1, shape_of(inputs.key)),
               grad_value = allocated(context, 2, shape_of(inputs.value));
  const auto query = view(inputs.query), key = view(inputs.key),
             value = view(inputs.value), all_lse = view(lse),
             all_delta = view(delta), all_out = view(grad_out),
             to_query = view(grad_query), to_key = view(grad_key),
             to_value = view(grad_value);
  done(keras_ring_backward(&visit, &query, &key, &value, &all_lse, &all_delta,
                           &all_out, &to_query, &to_key, &to_value, go_on));
}

template <void (*function)(TF_OpKernelContext*, const Attributes&)>
void compute(void* kernel, TF_OpKernelContext* context) {
  Status status;
  try {
    function(context, *static_cast<const Attributes*>(kernel));
    return;
  } catch (const Failure& failure) {
    TF_SetStatus(status, failure.code, failure.why.c_str());
  } catch (const std::bad_alloc&) {
    TF_SetStatus(status, TF_RESOURCE_EXHAUSTED, "No memory for a tile.");
  } catch (const std::exception& error) {
    TF_SetStatus(status, TF_INTERNAL, error.what());
  }
  TF_OpKernelContext_Failure(context, status);
}

// The shapes of results, while a program is traced.
class Shapes {
 public:
  Shapes(TF_ShapeInferenceContext* context, TF_Status* status)
      : context_(context), status_(status) {}

  // An output with the first axes of an input and the others of another one.
  void set(int output, int first, int axes, int second = -1) {
    Handle whole(known(first), TF_DeleteShapeHandle);
    Handle result = piece(whole, 0, axes);
    if (second >= 0) {
      Handle other(known(second), TF_DeleteShapeHandle);
      Handle rest = piece(other, axes, 4);
      Handle both(TF_NewShapeHandle(), TF_DeleteShapeHandle);
      if (fine())
        TF_ShapeInferenceContextConcatenateShapes(
            context_, result.get(), rest.get(), both.get(), status_);
      result = std::move(both);
    }
    if (fine())
      TF_ShapeInferenceContextSetOutput(context_, output, result.get(),
                                        status_);
  }

 private:
  using Handle = std::unique_ptr<TF_ShapeHandle, void (*)(TF_ShapeHandle*)>;

  bool fine() const { return TF_GetCode(status_) == TF_OK; }

  // An input's shape, which must be of four axes.
  TF_ShapeHandle* known(int input) {
    TF_ShapeHandle* shape = TF_NewShapeHandle();
    if (fine())
      TF_ShapeInferenceContextGetInput(context_, input, shape, status_);
    if (fine())
      TF_ShapeInferenceContextWithRank(context_, shape, 4, shape, status_);
    return shape;
  }

  Handle piece(const Handle& shape, int begin, int end) {
    Handle found(TF_NewShapeHandle(), TF_DeleteShapeHandle);
    if (fine())
      TF_ShapeInferenceContextSubshape(context_, shape.get(), begin, end,
                                       found.get(), status_);
    return found;
  }

  TF_ShapeInferenceContext* context_;
  TF_Status* status_;
};

void forward_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
  Shapes shapes(context, status);
  shapes.set(0, 0, 3, 2);
  shapes.set(1, 0, 3);
}

void backward_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
  Shapes shapes(context, status);
  for (int i = 0; i < 3; ++i) shapes.set(i, i, 4);
}

template <void (*function)(TF_OpKernelContext*, const Attributes&)>
void add(const char* name, const std::vector<const char*>& inputs,
         const std::vector<const char*>& outputs,
         void (*shapes)(TF_ShapeInferenceContext*, TF_Status*)) {
  Status status;
  auto* operation = TF_NewOpDefinitionBuilder(name);
  for (const char* attribute :
       {"count: int >= 0", "least: int", "most: int", "scale: float",
        "threads: int >= 1"})
    TF_OpDefinitionBuilderAddAttr(operation, attribute);
  for (const char* text : {"query: float", "key: float", "value: float",
                           "query_starts: int32", "key_starts: int32",
                           "limits: int64"})
    TF_OpDefinitionBuilderAddInput(operation, text);
  for (const char* text : inputs)
    TF_OpDefinitionBuilderAddInput(operation, text);
  TF_OpDefinitionBuilderAddInput(operation, "before: count * float");
  for (const char* text : outputs)
    TF_OpDefinitionBuilderAddOutput(operation, text);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(operation, shapes);
  TF_RegisterOpDefinition(operation, status);
  if (TF_GetCode(status) != TF_OK) return;
  auto* kernel =
      TF_NewKernelBuilder(name, "CPU", create, compute<function>, destroy);
  TF_RegisterKernelBuilder(name, kernel, status);
}

// When the library is loaded.
const bool added = [] {
  add<forward>("KerasRingForward", {}, {"out: float", "lse: float"},
               forward_shapes);
  add<backward>("KerasRingBackward",
                {"lse: float", "delta: float", "grad_out: float"},
                {"grad_query: float", "grad_key: float", "grad_value: float"},
                backward_shapes);
  return true;
}();

}  // namespace
