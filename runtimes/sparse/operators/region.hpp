// Region: several operators as one node, with the session's threads called once for all of them.
//
// The node's inputs are those of its operators that come from outside, weights included; what they hand
// each other lies in memory of the region's own, in which values that are never needed together share places.
#pragma once

#include <memory>
#include <mutex>

#include "../custom_operator.hpp"
#include "../scratch.hpp"
#include "../team.hpp"

namespace obc::sparse {

constexpr int64_t kMostOperators = 4096;

// Kinds of operators, by name.
struct OperatorKinds {
    const OperatorKind* kinds;
    size_t count;

    const OperatorKind* find(const std::string& name) const {
        for (size_t i = 0; i < count; ++i) {
            if (name == kinds[i].name) return &kinds[i];
        }
        return nullptr;
    }
};

// What a region's attributes say.
struct Program {
    // Values are counted: first the node's inputs, then the operators' outputs.
    struct Step {
        const OperatorKind* kind;
        std::string name;
        std::vector<int64_t> inputs;  // values; -1 where an optional one is missing
    };

    int64_t inputs;  // of the node
    std::vector<Step> steps;
    std::vector<size_t> outputs;  // steps whose results are the node's, in order

    Program(const AttributeSource& source, const OperatorKinds& known, int64_t node_inputs)
        : inputs(node_inputs) {
        const Attributes attributes(source);
        const int64_t count = attributes.integer("operators", {1, kMostOperators});
        for (int64_t number = 0; number < count; ++number) {
            const NumberedAttributes own(source, number);
            steps.push_back(step(Attributes(own), number, known));
        }
        std::vector<bool> taken(steps.size());
        for (int64_t number : attributes.integers("results", kAnyCount, {0, count - 1})) {
            if (taken[size_t(number)]) refuse("attribute 'results' names operator ", number, " twice");
            taken[size_t(number)] = true;
            outputs.push_back(size_t(number));
        }
    }

  private:
    Step step(const Attributes& attributes, int64_t number, const OperatorKinds& known) const {
        const std::string op = attributes.text("operator");
        const OperatorKind* kind = known.find(op);
        if (!kind || kind->output != ort::kUint8) {
            refuse("attribute 'operator_", number, "' is '", op, "', expected an operator whose output is uint8");
        }
        std::vector<int64_t> from =
            attributes.integers("inputs", kAnyCount, {-1, inputs + number - 1});
        size_t needed = 0;
        for (size_t i = 0; i < kind->count; ++i) {
            if (!is_optional(kind->inputs[i].kind)) needed = i + 1;
        }
        if (from.size() < needed || (from.size() > kind->count && !kind->is_variadic())) {
            refuse("attribute 'inputs_", number, "' has ", from.size(), " values, expected ", needed,
                   kind->is_variadic() ? " or more" : " to " + std::to_string(kind->count), " for ", op);
        }
        return {kind, attributes.text("name"), std::move(from)};
    }
};

// What goes wrong with one of a region's operators is told with its name.
template <class Work>
auto of_step(const Program::Step& step, const Work& work) {
    try {
        return work();
    } catch (const Malformed& malformed) {
        refuse(step.kind->name, " '", step.name, "': ", malformed.message);
    }
}

// The shape of each step's result; `shape(step, inputs)` knows it.
template <class ShapeOf>
std::vector<Shape> shapes_of(const Program& program, std::vector<Shape> values, const ShapeOf& shape_of) {
    std::vector<Shape> results;
    for (size_t i = 0; i < program.steps.size(); ++i) {
        const Program::Step& step = program.steps[i];
        std::vector<Shape> inputs;
        for (int64_t value : step.inputs) inputs.push_back(value < 0 ? Shape{} : values[size_t(value)]);
        results.push_back(of_step(step, [&] { return shape_of(step, i, inputs); }));
        values.push_back(results.back());
    }
    return results;
}

class Region {
  public:
    Region(const ort::Api& api, const ort::KernelInfo* info, const AttributeSource& source,
           const OperatorKinds& kinds, int64_t inputs, size_t outputs)
        : program_(source, kinds, inputs), constants_(size_t(inputs)) {
        if (program_.outputs.size() != outputs) {
            refuse("attribute 'results' has ", program_.outputs.size(), " values, and there are ", outputs,
                   " outputs");
        }
        for (size_t i = 0; i < program_.steps.size(); ++i) {
            const Program::Step& step = program_.steps[i];
            // A value of another step is no initializer.
            std::vector<int64_t> places = step.inputs;
            for (int64_t& place : places) place = place < inputs ? place : -1;
            const NumberedAttributes own(source, int64_t(i));
            operators_.push_back(of_step(
                step, [&] { return step.kind->make(Attributes(own), Constants(api, info, places)); }));
            const auto& known = operators_.back()->constants();
            for (size_t k = 0; k < std::min(known.size(), places.size()); ++k) {
                if (known[k]) constants_[size_t(places[k])] = known[k];
            }
        }
    }

    // Of the node's inputs, those that are the same in each run.
    const std::vector<std::optional<Tensor>>& constants() const { return constants_; }

    // output(k, shape) is where the k-th output goes.
    template <class Output>
    void run(const std::vector<Tensor>& inputs, const Threads& threads, const Output& output) const {
        const std::shared_ptr<const Layout> layout = layout_for(inputs);
        const ScratchPool::Piece memory = memory_->borrow(size_t(layout->bytes));
        std::vector<Tensor> values = layout->values;
        std::copy(inputs.begin(), inputs.end(), values.begin());
        for (size_t i = 0; i < program_.steps.size(); ++i) {
            values[inputs.size() + i].data = memory.as<unsigned char>() + layout->offsets[i];
        }
        for (size_t k = 0; k < program_.outputs.size(); ++k) {
            Tensor& value = values[inputs.size() + program_.outputs[k]];
            value.data = output(k, value.shape);
        }
        const bool others_came = Team::lead(threads, has_others_, [&](const Threads& team) {
            std::vector<Tensor> arguments;
            for (size_t i = 0; i < program_.steps.size(); ++i) {
                const Program::Step& step = program_.steps[i];
                const Tensor& result = values[inputs.size() + i];
                if (!result.shape.has_elements()) continue;
                arguments.clear();
                for (int64_t value : step.inputs) {
                    arguments.push_back(value < 0 ? Tensor{} : values[size_t(value)]);
                }
                of_step(step, [&] { operators_[i]->run(Run(arguments, team), result); });
            }
        });
        if (others_came) has_others_ = true;
    }

  private:
    // Where values lie, for inputs of certain shapes.
    struct Layout {
        std::vector<Tensor> values;    // of inputs and steps; where, is known when it runs
        std::vector<int64_t> offsets;  // of each step's result in the region's memory
        int64_t bytes = 0;
    };

    // Results that are handed on begin with a cache line; the lowest place that is free is taken.
    class Places {
      public:
        struct Place {
            int64_t begin, end;
            size_t step;
        };

        int64_t take(int64_t bytes, size_t step) {
            bytes = (bytes / kLineBytes + 1) * kLineBytes;
            int64_t begin = 0;
            auto next = taken_.begin();
            for (; next != taken_.end() && next->begin - begin < bytes; ++next) begin = next->end;
            taken_.insert(next, Place{begin, begin + bytes, step});
            most_ = std::max(most_, begin + bytes);
            return begin;
        }

        template <class IsOver>
        void give_back(const IsOver& is_over) {
            taken_.erase(std::remove_if(taken_.begin(), taken_.end(),
                                        [&](const Place& place) { return is_over(place.step); }),
                         taken_.end());
        }

        int64_t most() const { return most_; }

      private:
        std::vector<Place> taken_;  // by where they begin
        int64_t most_ = 0;
    };

    // The last few shapes' layouts are kept.
    std::shared_ptr<const Layout> layout_for(const std::vector<Tensor>& inputs) const {
        constexpr size_t kKept = 4;
        std::lock_guard<std::mutex> lock(mutex_);
        for (const auto& layout : layouts_) {
            const auto same = [](const Tensor& one, const Tensor& other) { return one.shape == other.shape; };
            if (std::equal(inputs.begin(), inputs.end(), layout->values.begin(), same)) return layout;
        }
        if (layouts_.size() == kKept) layouts_.erase(layouts_.begin());
        layouts_.push_back(std::make_shared<const Layout>(layout_of(inputs)));
        return layouts_.back();
    }

    Layout layout_of(const std::vector<Tensor>& inputs) const {
        Layout layout;
        layout.values = inputs;
        // The last step that reads each result; of those that leave the region, none.
        std::vector<size_t> last_read(program_.steps.size(), 0);
        std::vector<bool> leaves(program_.steps.size());
        for (size_t i = 0; i < program_.steps.size(); ++i) {
            for (int64_t value : program_.steps[i].inputs) {
                if (value >= program_.inputs) last_read[size_t(value - program_.inputs)] = i;
            }
        }
        for (size_t step : program_.outputs) leaves[step] = true;
        Places places;
        for (size_t i = 0; i < program_.steps.size(); ++i) {
            const Program::Step& step = program_.steps[i];
            std::vector<Tensor> arguments;
            for (int64_t value : step.inputs) {
                arguments.push_back(value < 0 ? Tensor{} : layout.values[size_t(value)]);
            }
            const Shape shape = of_step(step, [&] { return operators_[i]->checked_shape(arguments); });
            layout.values.push_back(Tensor{step.kind->output, shape});
            layout.offsets.push_back(leaves[i] ? 0 : places.take(bytes_of(shape), i));
            places.give_back([&](size_t made) { return last_read[made] <= i; });
        }
        layout.bytes = places.most();
        return layout;
    }

    static int64_t bytes_of(const Shape& shape) {
        int64_t bytes = 1;  // of codes
        for (int64_t size : shape) bytes *= size;
        return bytes;
    }

    Program program_;
    std::vector<std::unique_ptr<Operator>> operators_;
    std::vector<std::optional<Tensor>> constants_;
    mutable std::atomic<bool> has_others_{false};  // threads that take part
    mutable std::mutex mutex_;
    mutable std::vector<std::shared_ptr<const Layout>> layouts_;
    const std::shared_ptr<ScratchPool> memory_ = ScratchPool::shared();
};

// The node. It takes those operators whose output is codes, for the host must know the type of its own.
class RegionOperator : public CustomNode<RegionOperator> {
  public:
    static constexpr const char* kName = "Region";
    using Work = Region;

    explicit RegionOperator(const OperatorKinds& kinds) : kinds_(kinds) {
        get_input_count = [](const CustomOp*) -> size_t { return 1; };
        get_input_type = [](const CustomOp*, size_t) -> int { return ort::kUndefined; };
        get_input_characteristic = [](const CustomOp*, size_t) -> int { return ort::kVariadic; };
        get_variadic_input_homogeneity = [](const CustomOp*) { return 0; };
        get_output_type = [](const CustomOp*, size_t) -> int { return ort::kUint8; };
        get_output_characteristic = [](const CustomOp*, size_t) -> int { return ort::kVariadic; };
    }

    Region work(const ort::Api& api, const ort::KernelInfo* info) const {
        size_t inputs = 0, outputs = 0;
        require(api.kernel_info_get_input_count(info, &inputs));
        require(api.kernel_info_get_output_count(info, &outputs));
        return {api, info, KernelAttributes(api, info), kinds_, int64_t(inputs), outputs};
    }

    static void run(const Region& region, const ort::Api& api, ort::KernelContext* context) {
        const std::vector<Tensor> inputs = inputs_of(api, context, region.constants());
        region.run(inputs, HostThreads(api, context), [&](size_t index, const Shape& shape) {
            return output_of(api, context, index, ort::kUint8, shape).data;
        });
    }

    void infer(const ort::Api& api, ort::InferenceContext* context) const {
        std::vector<Shape> inputs = inferred_shapes(api, context);
        const InferenceAttributes source(api, context);
        const Program program(source, kinds_, int64_t(inputs.size()));
        const std::vector<Shape> results =
            shapes_of(program, std::move(inputs),
                      [&](const Program::Step& step, size_t number, const std::vector<Shape>& arguments) {
                          const NumberedAttributes own(source, int64_t(number));
                          return step.kind->infer(Attributes(own), arguments);
                      });
        for (size_t k = 0; k < program.outputs.size(); ++k) {
            infer_output(api, context, k, ort::kUint8, results[program.outputs[k]]);
        }
    }

  private:
    OperatorKinds kinds_;
};

}  // namespace obc::sparse
