// An operator as a node of ONNX Runtime's graphs.
#pragma once

#include "operator.hpp"
#include "status.hpp"

namespace obc::sparse {

// Of what OPERATORS.md says; files say which one they were written for.
constexpr int kDomainVersion = 3;
constexpr int kOldestDomainVersion = 2;  // without regions

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

// What the host is told of a node, by class `Node`: it has a name, `kName`, and
//
//   Work: what a node of a graph is made into, which knows its constants;
//   work(api, info): makes it;
//   run(work, api, context): runs it;
//   infer(api, context): tells the shapes of its outputs.
template <class Node>
class CustomNode : public ort::CustomOp {
  public:
    const ort::Api* host = nullptr;  // set when the library is registered; inference is not told of it

  protected:
    CustomNode() : ort::CustomOp{} {
        version = ort::kApiVersion;
        get_name = [](const CustomOp*) { return Node::kName; };
        get_execution_provider = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU's
        get_output_count = [](const CustomOp*) -> size_t { return 1; };
        get_output_characteristic = [](const CustomOp*, size_t) -> int { return ort::kRequired; };
        get_input_memory_type = [](const CustomOp*, size_t) { return 0; };
        get_variadic_input_min_arity = [](const CustomOp*) { return 1; };
        get_variadic_input_homogeneity = [](const CustomOp*) { return 1; };
        get_variadic_output_min_arity = [](const CustomOp*) { return 1; };
        get_variadic_output_homogeneity = [](const CustomOp*) { return 1; };
        get_start_version = [](const CustomOp*) { return kOldestDomainVersion; };
        get_end_version = [](const CustomOp*) { return kDomainVersion; };
        create_kernel_v2 = create;
        kernel_compute_v2 = compute;
        kernel_destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
        infer_output_shape = infer_shapes;
    }

  private:
    struct Kernel {
        const ort::Api& api;
        std::string node;
        typename Node::Work work;
    };

    static ort::Status* create(const CustomOp* op, const ort::Api* api, const ort::KernelInfo* info,
                               void** kernel) {
        *kernel = nullptr;
        std::string node;
        return status_of(*api, Node::kName, node, [&] {
            node = node_name(*api, info);
            *kernel = new Kernel{*api, node, static_cast<const Node*>(op)->work(*api, info)};
        });
    }

    static ort::Status* compute(void* kernel, ort::KernelContext* context) {
        const Kernel& mine = *static_cast<const Kernel*>(kernel);
        return status_of(mine.api, Node::kName, mine.node, [&] { Node::run(mine.work, mine.api, context); });
    }

    // A file that it cannot make sense of is refused with a message when its kernel is made.
    static ort::Status* infer_shapes(const CustomOp* op, ort::InferenceContext* context) {
        const Node& mine = *static_cast<const Node*>(op);
        try {
            mine.infer(*mine.host, context);
        } catch (const HostRefusal& refusal) {
            mine.host->release_status(refusal.status);
        } catch (...) {
        }
        return nullptr;
    }
};

// One of our operators.
template <class Op>
class CustomOperator : public CustomNode<CustomOperator<Op>> {
  public:
    static constexpr const char* kName = Op::kName;
    using Work = OperatorOf<Op>;

    CustomOperator() {
        this->get_input_type = [](const ort::CustomOp*, size_t i) -> int { return Op::kInputs[i].type; };
        this->get_input_count = [](const ort::CustomOp*) { return std::size(Op::kInputs); };
        this->get_output_type = [](const ort::CustomOp*, size_t) -> int { return Op::kOutput; };
        this->get_input_characteristic = [](const ort::CustomOp*, size_t i) -> int {
            return characteristic(Op::kInputs[i].kind);
        };
    }

    Work work(const ort::Api& api, const ort::KernelInfo* info) const {
        const KernelAttributes source(api, info);
        return {Attributes(source), Constants(api, info)};
    }

    static void run(const Work& op, const ort::Api& api, ort::KernelContext* context) {
        const std::vector<Tensor> inputs = inputs_of(api, context, op.constants());
        const Shape shape = op.checked_shape(inputs);
        const Tensor output = output_of(api, context, 0, Op::kOutput, shape);
        if (!shape.has_elements()) return;
        const HostThreads threads(api, context);
        op.run(Run(inputs, threads), output);
    }

    void infer(const ort::Api& api, ort::InferenceContext* context) const {
        const InferenceAttributes source(api, context);
        const typename Op::Options options{Attributes(source)};
        infer_output(api, context, 0, Op::kOutput, options.output_shape(inferred_shapes(api, context)));
    }

  private:
    static int characteristic(Kind kind) {
        if (kind == Kind::kVariadic) return ort::kVariadic;
        return is_optional(kind) ? ort::kOptional : ort::kRequired;
    }
};

}  // namespace obc::sparse
