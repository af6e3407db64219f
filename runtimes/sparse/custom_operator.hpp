// One C++ class as an operator of ONNX Runtime.
//
// The class, say Op, has
//     kName, kInputs (name, type, kind), kOutput           what the host is told
//     Op::Options(const Attributes&)                       checks what needs no weights
//     Shape Op::Options::output_shape(inputs) const        checks the inputs' shapes
//     Op(const Options&, const Constants&)                 checks and packs weights
//     void run(const Run&, const Tensor& output) const     called by many threads at once
// and refuses what OPERATORS.md does not allow; here that becomes a status with the operator's and
// the node's name. No exception leaves this file.
#pragma once

#include <algorithm>
#include <exception>
#include <iterator>

#include "attributes.hpp"

namespace obc::sparse {

// Of what OPERATORS.md says; files say which one they were written for.
constexpr int kDomainVersion = 2;

enum class Kind { kEachRun, kConstant, kOptional, kOptionalConstant, kVariadic };

struct Input {
    const char* name;
    ort::ElementType type;
    Kind kind;
};

template <class Op>
class CustomOperator : public ort::CustomOp {
  public:
    CustomOperator() : ort::CustomOp{} {
        version = ort::kApiVersion;
        get_name = [](const CustomOp*) { return Op::kName; };
        get_execution_provider = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU's
        get_input_type = [](const CustomOp*, size_t i) -> int { return Op::kInputs[i].type; };
        get_input_count = [](const CustomOp*) { return std::size(Op::kInputs); };
        get_output_type = [](const CustomOp*, size_t) -> int { return Op::kOutput; };
        get_output_count = [](const CustomOp*) -> size_t { return 1; };
        get_input_characteristic = [](const CustomOp*, size_t i) -> int {
            return characteristic(Op::kInputs[i].kind);
        };
        get_output_characteristic = [](const CustomOp*, size_t) -> int { return ort::kRequired; };
        get_input_memory_type = [](const CustomOp*, size_t) { return 0; };
        get_variadic_input_min_arity = [](const CustomOp*) { return 1; };
        get_variadic_input_homogeneity = [](const CustomOp*) { return 1; };
        get_variadic_output_min_arity = [](const CustomOp*) { return 1; };
        get_variadic_output_homogeneity = [](const CustomOp*) { return 1; };
        get_start_version = [](const CustomOp*) { return kDomainVersion; };
        get_end_version = [](const CustomOp*) { return kDomainVersion; };
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
        typename Op::Options options;
        std::vector<std::optional<Tensor>> constants;  // of inputs that have to be
        Op op;

        Kernel(const ort::Api& host_api, std::string name, const Attributes& attributes,
               const Constants& known)
            : api(host_api), node(std::move(name)), options(attributes),
              constants(std::size(Op::kInputs)), op(options, known) {
            for (size_t i = 0; i < constants.size(); ++i) {
                const Kind kind = Op::kInputs[i].kind;
                if (kind == Kind::kConstant || kind == Kind::kOptionalConstant) constants[i] = known.find(i);
            }
        }
    };

    static int characteristic(Kind kind) {
        if (kind == Kind::kVariadic) return ort::kVariadic;
        return kind == Kind::kOptional || kind == Kind::kOptionalConstant ? ort::kOptional
                                                                          : ort::kRequired;
    }

    static std::string node_name(const ort::Api& api, const ort::KernelInfo* info) {
        size_t size = 0;
        if (!succeeded(api, api.kernel_info_get_node_name(info, nullptr, &size)) || size == 0)
            return "";
        std::string name(size, '\0');
        if (!succeeded(api, api.kernel_info_get_node_name(info, name.data(), &size))) return "";
        name.resize(size - 1);  // without the zero that ends it
        return name;
    }

    // Runs `work`; what it throws becomes a status.
    template <class Work>
    static ort::Status* status_of(const ort::Api& api, const std::string& node, const Work& work) {
        try {
            work();
            return nullptr;
        } catch (const HostRefusal& refusal) {
            return refusal.status;
        } catch (const Malformed& malformed) {
            return status(api, ort::kInvalidArgument, node, malformed.message.c_str());
        } catch (const std::bad_alloc&) {
            return status(api, ort::kFail, node, "out of memory");
        } catch (const std::exception& error) {
            return status(api, ort::kFail, node, error.what());
        } catch (...) {
            return status(api, ort::kFail, node, "unknown failure");
        }
    }

    static ort::Status* status(const ort::Api& api, int code, const std::string& node,
                               const char* message) {
        try {
            return api.create_status(code,
                                     (std::string(Op::kName) + " '" + node + "': " + message).c_str());
        } catch (...) {
            return api.create_status(code, Op::kName);
        }
    }

    static ort::Status* create(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                               void** kernel) {
        *kernel = nullptr;
        std::string node;
        return status_of(*api, node, [&] {
            node = node_name(*api, info);
            const KernelAttributes source(*api, info);
            *kernel = new Kernel(*api, node, Attributes(source), Constants(*api, info));
        });
    }

    static ort::Status* compute(void* kernel, ort::KernelContext* context) {
        const Kernel& mine = *static_cast<const Kernel*>(kernel);
        return status_of(mine.api, mine.node, [&] {
            const Run run(mine.api, context, mine.constants);
            check_inputs(mine, run);
            std::vector<Shape> shapes;
            shapes.reserve(run.inputs().size());
            for (const Tensor& input : run.inputs()) shapes.push_back(input.shape);
            const Shape shape = mine.options.output_shape(shapes);
            const Tensor output = run.output(Op::kOutput, shape);
            for (int64_t size : shape) {
                if (size == 0) return;  // nothing to compute
            }
            mine.op.run(run, output);
        });
    }

    static void check_inputs(const Kernel& kernel, const Run& run) {
        for (size_t i = 0; i < run.inputs().size(); ++i) {
            const Input& input = Op::kInputs[std::min(i, std::size(Op::kInputs) - 1)];
            if (!run.has(i)) {
                if (input.kind == Kind::kOptional || input.kind == Kind::kOptionalConstant) continue;
                refuse("input ", i, " '", input.name, "' is missing");
            }
            if (run.input(i).type != input.type) {
                refuse("input '", input.name, "' has element type ", int(run.input(i).type),
                       ", expected ", int(input.type));
            }
            if (input.kind == Kind::kOptionalConstant && !kernel.constants[i]) {
                refuse("input '", input.name, "' is computed, expected an initializer");
            }
        }
    }

    // A file that this cannot make sense of is refused with a message when its kernel is made.
    static ort::Status* infer(const ort::CustomOp* op, ort::InferenceContext* context) {
        const ort::Api* api = static_cast<const CustomOperator*>(op)->host;
        ort::TensorInfo* info = nullptr;
        try {
            size_t count = 0;
            require(api->inference_get_input_count(context, &count));
            std::vector<Shape> shapes;
            for (size_t i = 0; i < count; ++i) {
                ort::TensorInfo* input = nullptr;
                const bool known =
                    succeeded(*api, api->inference_get_input(context, i, &input)) && input;
                shapes.push_back(known ? dimensions(*api, input) : Shape{});
            }
            const InferenceAttributes source(*api, context);
            const Attributes attributes(source);
            const typename Op::Options options(attributes);
            const Shape shape = options.output_shape(shapes);
            require(api->create_tensor_info(&info));
            require(api->set_element_type(info, Op::kOutput));
            require(api->set_dimensions(info, shape.data(), shape.size()));
            require(api->inference_set_output(context, 0, info));
        } catch (const HostRefusal& refusal) {
            api->release_status(refusal.status);
        } catch (...) {
        }
        if (info) api->release_tensor_info(info);
        return nullptr;
    }
};

}  // namespace obc::sparse
