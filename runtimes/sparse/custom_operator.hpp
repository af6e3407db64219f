// An operator as a node of ONNX Runtime's graphs.
#pragma once

#include "operator.hpp"
#include "status.hpp"

namespace obc::sparse {

// Of what OPERATORS.md says; files say which one they were written for.
constexpr int kDomainVersion = 3;
constexpr int kOldestDomainVersion = 2;  // without regions

// What is the same for all.
inline ort::CustomOp described() {
    ort::CustomOp op{};
    op.version = ort::kApiVersion;
    op.get_execution_provider = [](const ort::CustomOp*) -> const char* { return nullptr; };  // the CPU's
    op.get_output_count = [](const ort::CustomOp*) -> size_t { return 1; };
    op.get_output_characteristic = [](const ort::CustomOp*, size_t) -> int { return ort::kRequired; };
    op.get_input_memory_type = [](const ort::CustomOp*, size_t) { return 0; };
    op.get_variadic_input_min_arity = [](const ort::CustomOp*) { return 1; };
    op.get_variadic_input_homogeneity = [](const ort::CustomOp*) { return 1; };
    op.get_variadic_output_min_arity = [](const ort::CustomOp*) { return 1; };
    op.get_variadic_output_homogeneity = [](const ort::CustomOp*) { return 1; };
    op.get_start_version = [](const ort::CustomOp*) { return kOldestDomainVersion; };
    op.get_end_version = [](const ort::CustomOp*) { return kDomainVersion; };
    return op;
}

// The shapes of a node's inputs where they are known, else empty ones.
inline std::vector<Shape> inferred_shapes(const ort::Api& api, const ort::InferenceContext* context) {
    size_t count = 0;
    require(api.inference_get_input_count(context, &count));
    std::vector<Shape> shapes;
    shapes.reserve(count);
    for (size_t i = 0; i < count; ++i) {
        ort::TensorInfo* input = nullptr;
        const bool known = succeeded(api, api.inference_get_input(context, i, &input)) && input;
        shapes.push_back(known ? dimensions(api, input) : Shape{});
    }
    return shapes;
}

// Tells the host the shape of an output.
inline void infer_output(const ort::Api& api, ort::InferenceContext* context, size_t index,
                         ort::ElementType type, const Shape& shape) {
    OwnedTensorInfo owner{api};
    require(api.create_tensor_info(&owner.info));
    require(api.set_element_type(owner.info, type));
    require(api.set_dimensions(owner.info, shape.data(), shape.size()));
    require(api.inference_set_output(context, index, owner.info));
}

// Runs `work`. A file that it cannot make sense of is refused with a message when its kernel is made.
template <class Work>
ort::Status* try_to_infer(const ort::Api& api, const Work& work) {
    try {
        work();
    } catch (const HostRefusal& refusal) {
        api.release_status(refusal.status);
    } catch (...) {
    }
    return nullptr;
}

template <class Op>
class CustomOperator : public ort::CustomOp {
  public:
    CustomOperator() : ort::CustomOp(described()) {
        get_name = [](const CustomOp*) { return Op::kName; };
        get_input_type = [](const CustomOp*, size_t i) -> int { return Op::kInputs[i].type; };
        get_input_count = [](const CustomOp*) { return std::size(Op::kInputs); };
        get_output_type = [](const CustomOp*, size_t) -> int { return Op::kOutput; };
        get_input_characteristic = [](const CustomOp*, size_t i) -> int {
            return characteristic(Op::kInputs[i].kind);
        };
        create_kernel_v2 = create;
        kernel_compute_v2 = compute;
        kernel_destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
        infer_output_shape = infer;
    }

    const ort::Api* host = nullptr;  // set when the library is registered; inference is not told of it

  private:
    struct Kernel {
        const ort::Api& api;
        std::string node;
        OperatorOf<Op> op;
    };

    static int characteristic(Kind kind) {
        if (kind == Kind::kVariadic) return ort::kVariadic;
        return is_optional(kind) ? ort::kOptional : ort::kRequired;
    }

    static ort::Status* create(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                               void** kernel) {
        *kernel = nullptr;
        std::string node;
        return status_of(*api, Op::kName, node, [&] {
            node = node_name(*api, info);
            const KernelAttributes source(*api, info);
            *kernel = new Kernel{*api, node, {Attributes(source), Constants(*api, info)}};
        });
    }

    static ort::Status* compute(void* kernel, ort::KernelContext* context) {
        const Kernel& mine = *static_cast<const Kernel*>(kernel);
        return status_of(mine.api, Op::kName, mine.node, [&] {
            const std::vector<Tensor> inputs = inputs_of(mine.api, context, mine.op.constants());
            const Shape shape = mine.op.checked_shape(inputs);
            const Tensor output = output_of(mine.api, context, 0, Op::kOutput, shape);
            if (!shape.has_elements()) return;
            const HostThreads threads(mine.api, context);
            mine.op.run(Run(inputs, threads), output);
        });
    }

    static ort::Status* infer(const ort::CustomOp* op, ort::InferenceContext* context) {
        const ort::Api& api = *static_cast<const CustomOperator*>(op)->host;
        return try_to_infer(api, [&] {
            const InferenceAttributes source(api, context);
            const typename Op::Options options{Attributes(source)};
            infer_output(api, context, 0, Op::kOutput, options.output_shape(inferred_shapes(api, context)));
        });
    }
};

}  // namespace obc::sparse
