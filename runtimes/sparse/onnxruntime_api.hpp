// The part of ONNX Runtime's C interface that this library uses.
//
// That interface is a table of function pointers that only ever grows at its end, so a view of the
// entries we call, each at its place, serves every version from 1.17 on without its headers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace obc::sparse::ort {

constexpr uint32_t kApiVersion = 17;  // the first with `kernel_context_parallel_for`

enum ElementType : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7 };
enum Characteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum AttributeType : int {
    kIntAttribute = 1,
    kIntsAttribute = 2,
    kFloatAttribute = 3,
    kFloatsAttribute = 4,
    kStringAttribute = 5
};

struct Status;
struct Value;
struct TensorInfo;  // element type and shape
struct KernelInfo;
struct KernelContext;
struct InferenceContext;
struct Attribute;
struct SessionOptions;
struct Domain;
struct CustomOp;

using Unused = void (*)();

struct Api {
    Status* (*create_status)(int code, const char* message);
    Unused unused_1[25];
    Status* (*create_custom_op_domain)(const char* name, Domain** domain);
    Status* (*custom_op_domain_add)(Domain* domain, const CustomOp* op);
    Status* (*add_custom_op_domain)(SessionOptions* options, Domain* domain);
    Unused unused_29[22];
    Status* (*get_tensor_mutable_data)(Value* value, void** data);
    Unused unused_52[5];
    Status* (*create_tensor_info)(TensorInfo** info);
    Status* (*set_element_type)(TensorInfo* info, int type);
    Status* (*set_dimensions)(TensorInfo* info, const int64_t* dimensions, size_t count);
    Status* (*get_element_type)(const TensorInfo* info, int* type);
    Status* (*get_dimensions_count)(const TensorInfo* info, size_t* count);
    Status* (*get_dimensions)(const TensorInfo* info, int64_t* dimensions, size_t count);
    Unused unused_63[2];
    Status* (*get_tensor_info)(const Value* value, TensorInfo** info);
    Unused unused_66[19];
    Status* (*kernel_info_get_float)(const KernelInfo* info, const char* name, float* value);
    Status* (*kernel_info_get_int)(const KernelInfo* info, const char* name, int64_t* value);
    Status* (*kernel_info_get_string)(const KernelInfo* info, const char* name, char* text,
                                      size_t* size);
    Status* (*kernel_context_get_input_count)(const KernelContext* context, size_t* count);
    Unused unused_89;
    Status* (*kernel_context_get_input)(const KernelContext* context, size_t index,
                                        const Value** value);
    Status* (*kernel_context_get_output)(KernelContext* context, size_t index,
                                         const int64_t* dimensions, size_t count, Value** value);
    Unused unused_92;
    void (*release_status)(Status* status);
    Unused unused_94[5];
    void (*release_tensor_info)(TensorInfo* info);
    Unused unused_100[62];
    Status* (*kernel_info_get_floats)(const KernelInfo* info, const char* name, float* values,
                                      size_t* count);
    Status* (*kernel_info_get_ints)(const KernelInfo* info, const char* name, int64_t* values,
                                    size_t* count);
    Unused unused_164[66];
    Status* (*kernel_info_get_input_count)(const KernelInfo* info, size_t* count);
    Status* (*kernel_info_get_output_count)(const KernelInfo* info, size_t* count);
    Unused unused_232[12];
    Status* (*kernel_info_get_node_name)(const KernelInfo* info, char* name, size_t* size);
    Unused unused_245[4];
    Status* (*kernel_info_get_constant_input)(const KernelInfo* info, size_t index, int* is_constant,
                                              const Value** value);
    Unused unused_250[17];
    Status* (*inference_get_input_count)(const InferenceContext* context, size_t* count);
    Status* (*inference_get_input)(const InferenceContext* context, size_t index, TensorInfo** info);
    Status* (*inference_get_attribute)(const InferenceContext* context, const char* name,
                                       const Attribute** attribute);
    Status* (*inference_set_output)(const InferenceContext* context, size_t index,
                                    const TensorInfo* info);
    Unused unused_271;
    Status* (*read_attribute)(const Attribute* attribute, int type, void* data, size_t bytes,
                              size_t* filled);
    Unused unused_273;
    Status* (*kernel_context_parallel_for)(const KernelContext* context,
                                           void (*body)(void* user, size_t index), size_t total,
                                           size_t batches, void* user);
};

#define OBC_AT(entry, index)                                        \
    static_assert(offsetof(Api, entry) == (index) * sizeof(Unused), \
                  "ONNX Runtime's table has it "                    \
                  "there")
OBC_AT(create_status, 0);
OBC_AT(create_custom_op_domain, 26);
OBC_AT(get_tensor_mutable_data, 51);
OBC_AT(create_tensor_info, 57);
OBC_AT(get_dimensions, 62);
OBC_AT(get_tensor_info, 65);
OBC_AT(kernel_info_get_float, 85);
OBC_AT(kernel_context_get_input, 90);
OBC_AT(release_status, 93);
OBC_AT(release_tensor_info, 99);
OBC_AT(kernel_info_get_floats, 162);
OBC_AT(kernel_info_get_input_count, 230);
OBC_AT(kernel_info_get_node_name, 244);
OBC_AT(kernel_info_get_constant_input, 249);
OBC_AT(inference_get_input_count, 267);
OBC_AT(read_attribute, 272);
OBC_AT(kernel_context_parallel_for, 274);
#undef OBC_AT

struct ApiBase {
    const Api* (*get_api)(uint32_t version);
    const char* (*get_version)();
};

// One operator, as the library hands it over; the host reads the entries its `version` has.
struct CustomOp {
    uint32_t version;
    void* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*);
    const char* (*get_name)(const CustomOp*);
    const char* (*get_execution_provider)(const CustomOp*);
    int (*get_input_type)(const CustomOp*, size_t index);
    size_t (*get_input_count)(const CustomOp*);
    int (*get_output_type)(const CustomOp*, size_t index);
    size_t (*get_output_count)(const CustomOp*);
    void (*kernel_compute)(void* kernel, KernelContext*);
    void (*kernel_destroy)(void* kernel);
    int (*get_input_characteristic)(const CustomOp*, size_t index);
    int (*get_output_characteristic)(const CustomOp*, size_t index);
    int (*get_input_memory_type)(const CustomOp*, size_t index);
    int (*get_variadic_input_min_arity)(const CustomOp*);
    int (*get_variadic_input_homogeneity)(const CustomOp*);
    int (*get_variadic_output_min_arity)(const CustomOp*);
    int (*get_variadic_output_homogeneity)(const CustomOp*);
    Status* (*create_kernel_v2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
    Status* (*kernel_compute_v2)(void* kernel, KernelContext*);
    Status* (*infer_output_shape)(const CustomOp*, InferenceContext*);
    int (*get_start_version)(const CustomOp*);
    int (*get_end_version)(const CustomOp*);
};
static_assert(offsetof(CustomOp, infer_output_shape) == 19 * sizeof(Unused),
              "as ONNX Runtime reads it");

}  // namespace obc::sparse::ort
