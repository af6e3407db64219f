// The library's door: ONNX Runtime registers the operators here, and Python asks for the instruction set.
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <string>
#include <tuple>

#include "operators/add.hpp"
#include "operators/average_pool.hpp"
#include "operators/concat.hpp"
#include "operators/depthwise_convolution.hpp"
#include "operators/from_blocks.hpp"
#include "operators/global_average_pool.hpp"
#include "operators/max_pool.hpp"
#include "operators/region.hpp"
#include "operators/sparse_convolution.hpp"
#include "operators/sparse_convolution_float.hpp"
#include "operators/sparse_linear.hpp"
#include "operators/sparse_linear_float.hpp"
#include "operators/to_blocks.hpp"

namespace obc::sparse {

namespace {

constexpr const char* kDomain = "obc_deploy.sparse";

// From the slowest to the fastest.
const InstructionSet* const kSets[] = {
    &kPortable,
#if defined(__x86_64__)
    &kAvx2,
    &kAvx2Vnni,
    &kAvx512Vnni,
#endif
};

const InstructionSet& best() {
    const InstructionSet* found = &kPortable;
    for (const InstructionSet* set : kSets) {
        if (supported(*set->convolution)) found = set;
    }
    return *found;
}

// The set of this name; null where the processor or the build lacks it.
const InstructionSet* named(const std::string& name) {
    for (const InstructionSet* set : kSets) {
        if (name == set->name && supported(*set->convolution)) return set;
    }
    return nullptr;
}

// What an environment variable asks for, where it works here; else the best.
const InstructionSet* at_first() {
    const char* wanted = std::getenv("OBC_DEPLOY_SPARSE_INSTRUCTIONS");
    const InstructionSet* set = wanted ? named(wanted) : nullptr;
    return set ? set : &best();
}

std::atomic<const InstructionSet*>& chosen() {
    static std::atomic<const InstructionSet*> set{at_first()};
    return set;
}

// Of all classes of operators, what is made of each.
template <class... Ops>
struct OperatorsOf {
    static constexpr OperatorKind kKinds[] = {kind_of<Ops>()...};
    std::tuple<CustomOperator<Ops>...> nodes;
};

// They live as long as the library, as sessions refer to them.
struct Operators
    : OperatorsOf<ToBlocks, QuantizeToBlocks, FromBlocks, DequantizeFromBlocks, SparseConvolution,
                  DepthwiseConvolution, SparseLinear, SparseLinearDequantize, MaxPool, AveragePool,
                  GlobalAveragePool, Add, Concat, SparseConvolutionFloat, SparseLinearFloat> {
    RegionOperator region{{kKinds, std::size(kKinds)}};

    // Calls `action` with each operator until one fails.
    template <class Action>
    ort::Status* each(const Action& action) {
        ort::Status* status = nullptr;
        const auto next = [&](auto& op) { return (status = action(op)) == nullptr; };
        (void)(std::apply([&](auto&... node) { return (next(node) && ...); }, nodes) && next(region));
        return status;
    }
};

Operators operators;

}  // namespace

const InstructionSet& instruction_set() { return *chosen().load(); }

extern "C" {
#pragma GCC visibility push(default)

// Called by ONNX Runtime for each set of session options that is to know the operators.
ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
    const ort::Api* api = base->get_api(ort::kApiVersion);
    if (!api) {
        const ort::Api* oldest = base->get_api(1);
        constexpr const char* kTooOld =
            "the operators of obc_deploy.sparse need ONNX Runtime 1.17 or later";
        return oldest ? oldest->create_status(ort::kFail, kTooOld) : nullptr;
    }
    // One domain for all sessions, which must find it as long as they live.
    static std::mutex mutex;
    static ort::Domain* domain = nullptr;
    std::lock_guard<std::mutex> lock(mutex);
    if (!domain) {
        ort::Domain* made = nullptr;
        if (ort::Status* status = api->create_custom_op_domain(kDomain, &made)) return status;
        const auto add = [&](auto& op) {
            op.host = api;
            return api->custom_op_domain_add(made, &op);
        };
        if (ort::Status* status = operators.each(add)) return status;
        domain = made;
    }
    return api->add_custom_op_domain(options, domain);
}

const char* obc_sparse_instruction_set() { return instruction_set().name; }

// Kernels made from now on use this set; 0 where the processor or the build lacks it.
int64_t obc_sparse_use_instruction_set(const char* name) {
    const InstructionSet* set = named(name);
    if (!set) return 0;
    chosen() = set;
    return 1;
}

// Multiplies blocks with pixels in registers alone; returns how many pairs of them.
int64_t obc_sparse_products_alone(int64_t rounds) {
    return instruction_set().convolution->products_alone(rounds);
}

#pragma GCC visibility pop
}  // extern "C"

}  // namespace obc::sparse
