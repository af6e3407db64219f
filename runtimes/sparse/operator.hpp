// One C++ class as an operator, whoever runs it: the host, or a region of several.
//
// The class, say Op, has
//     kName, kInputs (name, type, kind), kOutput           what the host is told
//     Op::Options(const Attributes&)                       checks what needs no weights
//     Shape Op::Options::output_shape(inputs) const        checks the inputs' shapes
//     Op(const Options&, const Constants&)                 checks and packs weights
//     void run(const Run&, const Tensor& output) const     called by many threads at once
// and refuses what OPERATORS.md does not allow.
#pragma once

#include <algorithm>
#include <iterator>
#include <memory>

#include "attributes.hpp"

namespace obc::sparse {

enum class Kind { kEachRun, kConstant, kOptional, kOptionalConstant, kVariadic };

inline bool is_constant(Kind kind) { return kind == Kind::kConstant || kind == Kind::kOptionalConstant; }
inline bool is_optional(Kind kind) { return kind == Kind::kOptional || kind == Kind::kOptionalConstant; }

struct Input {
    const char* name;
    ort::ElementType type;
    Kind kind;
};

class Operator {
  public:
    virtual ~Operator() = default;

    // Of inputs that have to be, by place.
    const std::vector<std::optional<Tensor>>& constants() const { return constants_; }

    // Computes `output`, made for the shape that `checked_shape` gave for the same inputs.
    virtual void run(const Run& run, const Tensor& output) const = 0;

    // Of the output; refuses inputs that the operator does not take.
    Shape checked_shape(const std::vector<Tensor>& inputs) const {
        check(inputs);
        std::vector<Shape> shapes;
        shapes.reserve(inputs.size());
        for (const Tensor& input : inputs) shapes.push_back(input.shape);
        return output_shape(shapes);
    }

  protected:
    Operator(const Input* inputs, size_t count, const Constants& known)
        : inputs_(inputs), count_(count), constants_(count) {
        for (size_t i = 0; i < count; ++i) {
            if (is_constant(inputs[i].kind)) constants_[i] = known.find(i);
        }
    }

    virtual Shape output_shape(const std::vector<Shape>& inputs) const = 0;

  private:
    void check(const std::vector<Tensor>& inputs) const {
        for (size_t i = 0; i < inputs.size(); ++i) {
            const size_t place = std::min(i, count_ - 1);
            const Input& input = inputs_[place];
            if (inputs[i].type == ort::kUndefined) {
                if (is_optional(input.kind)) continue;
                refuse("input ", i, " '", input.name, "' is missing");
            }
            require_type(inputs[i], input.name, input.type);
            if (input.kind == Kind::kOptionalConstant && !constants_[place]) {
                refuse("input '", input.name, "' is computed, expected an initializer");
            }
        }
    }

    const Input* inputs_;
    size_t count_;
    std::vector<std::optional<Tensor>> constants_;
};

template <class Op>
class OperatorOf final : public Operator {
  public:
    OperatorOf(const Attributes& attributes, const Constants& known)
        : Operator(Op::kInputs, std::size(Op::kInputs), known), options_(attributes), op_(options_, known) {}

    void run(const Run& run, const Tensor& output) const override { op_.run(run, output); }

  private:
    Shape output_shape(const std::vector<Shape>& inputs) const override {
        return options_.output_shape(inputs);
    }

    typename Op::Options options_;
    Op op_;
};

// What an operator's class can do, for those who know it by name alone.
struct OperatorKind {
    const char* name;
    const Input* inputs;
    size_t count;
    ort::ElementType output;
    std::unique_ptr<Operator> (*make)(const Attributes& attributes, const Constants& known);
    // Of the output, before there are weights.
    Shape (*infer)(const Attributes& attributes, const std::vector<Shape>& inputs);

    bool is_variadic() const { return inputs[count - 1].kind == Kind::kVariadic; }
};

template <class Op>
constexpr OperatorKind kind_of() {
    return {Op::kName, Op::kInputs, std::size(Op::kInputs), Op::kOutput,
            [](const Attributes& attributes, const Constants& known) -> std::unique_ptr<Operator> {
                return std::make_unique<OperatorOf<Op>>(attributes, known);
            },
            [](const Attributes& attributes, const std::vector<Shape>& inputs) {
                return typename Op::Options(attributes).output_shape(inputs);
            }};
}

}  // namespace obc::sparse
