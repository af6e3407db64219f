// ONNX Runtime's side as C++: tensors, constants, and its thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <new>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "malformed.hpp"
#include "onnxruntime_api.hpp"

namespace obc::sparse {

// A call of ours that the host turned down; its status goes back to it.
struct HostRefusal {
    ort::Status* status;
};

inline void require(ort::Status* status) {
    if (status) throw HostRefusal{status};
}

// Whether a call worked whose failure means no more than "there is none".
inline bool succeeded(const ort::Api& api, ort::Status* status) {
    if (!status) return true;
    api.release_status(status);
    return false;
}

struct Tensor {
    ort::ElementType type = ort::kUndefined;
    Shape shape;
    void* data = nullptr;

    template <class T>
    const T* read() const {
        return static_cast<const T*>(data);
    }
    template <class T>
    T* write() const {
        return static_cast<T*>(data);
    }
};

inline Shape dimensions(const ort::Api& api, const ort::TensorInfo* info) {
    size_t rank = 0;
    require(api.get_dimensions_count(info, &rank));
    if (rank > kMostDimensions)
        refuse("a tensor has ", rank, " dimensions, expected ", kMostDimensions, " at most");
    Shape shape(rank);
    if (rank) require(api.get_dimensions(info, shape.data(), rank));
    return shape;
}

// What the host gives away for as long as this lives.
struct OwnedTensorInfo {
    const ort::Api& api;
    ort::TensorInfo* info = nullptr;
    ~OwnedTensorInfo() {
        if (info) api.release_tensor_info(info);
    }
};

inline Tensor tensor(const ort::Api& api, const ort::Value* value) {
    OwnedTensorInfo owner{api};
    require(api.get_tensor_info(value, &owner.info));
    int type = ort::kUndefined;
    require(api.get_element_type(owner.info, &type));
    Tensor result;
    result.type = ort::ElementType(type);
    result.shape = dimensions(api, owner.info);
    require(api.get_tensor_mutable_data(const_cast<ort::Value*>(value), &result.data));
    return result;
}

// The host checks the types of a node's inputs; those of a region's operators it does not know.
inline void require_type(const Tensor& tensor, const char* name, ort::ElementType type) {
    if (tensor.type != type) {
        refuse("input '", name, "' has element type ", int(tensor.type), ", expected ", int(type));
    }
}

// Inputs that are the same in each run: initializers.
class Constants {
  public:
    Constants(const ort::Api& api, const ort::KernelInfo* info) : api_(api), info_(info) {}

    // Of an operator within a node: `places` says which of the node's inputs each of its own is. It
    // outlives this.
    Constants(const ort::Api& api, const ort::KernelInfo* info, const std::vector<int64_t>& places)
        : api_(api), info_(info), places_(&places) {}

    std::optional<Tensor> find(size_t index) const {
        if (places_) {
            if (index >= places_->size() || (*places_)[index] < 0) return std::nullopt;
            index = size_t((*places_)[index]);
        }
        int is_constant = 0;
        const ort::Value* value = nullptr;
        if (!succeeded(api_, api_.kernel_info_get_constant_input(info_, index, &is_constant, &value)) ||
            !is_constant || !value) {
            return std::nullopt;
        }
        return tensor(api_, value);
    }

    Tensor get(size_t index, const char* name) const {
        std::optional<Tensor> found = find(index);
        if (!found)
            refuse("input ", index, " '", name, "' is missing or computed, expected an initializer");
        return *std::move(found);
    }

  private:
    const ort::Api& api_;
    const ort::KernelInfo* info_;
    const std::vector<int64_t>* places_ = nullptr;
};

// Threads that take turns at an operator's work.
class Threads {
  public:
    virtual ~Threads() = default;
    // Calls one(user, 0) to one(user, total - 1), and returns when all are done.
    virtual void each(int64_t total, void (*one)(void* user, size_t index), void* user) const = 0;
    // How many there are; may wait a moment for those that are to come.
    virtual int64_t count() const = 0;
    // How many are known to be there by now.
    virtual int64_t present() const = 0;
    // Whether they wait for work, and begin a fraction of a microsecond after a call, or must be called.
    virtual bool waiting() const = 0;
};

constexpr int64_t kMostThreads = 64;

// Asked for once: the answer is in a file of the system's.
inline int64_t cores() {
    static const int64_t count = std::min<int64_t>(std::max(1u, std::thread::hardware_concurrency()), kMostThreads);
    return count;
}

// The session's own.
class HostThreads final : public Threads {
  public:
    HostThreads(const ort::Api& api, ort::KernelContext* context) : api_(api), context_(context) {}

    void each(int64_t total, void (*one)(void* user, size_t index), void* user) const override {
        require(api_.kernel_context_parallel_for(context_, one, size_t(total), 0, user));
    }

    // Those that come within a moment, at most as many as there are cores.
    int64_t count() const override {
        if (cores() < 2) return 1;
        struct Seen {
            std::mutex mutex;
            std::vector<std::thread::id> threads;
            std::atomic<int64_t> count{0};
            std::chrono::steady_clock::time_point end = std::chrono::steady_clock::now() + kWait;
        } seen;
        seen.threads.reserve(size_t(cores()));
        const auto come = [](void* user, size_t) {
            Seen& all = *static_cast<Seen*>(user);
            {
                std::lock_guard<std::mutex> lock(all.mutex);
                const std::thread::id self = std::this_thread::get_id();
                if (std::find(all.threads.begin(), all.threads.end(), self) == all.threads.end()) {
                    all.threads.push_back(self);
                    ++all.count;
                }
            }
            // The others may be waiting for this very core.
            while (all.count < cores() && std::chrono::steady_clock::now() < all.end) std::this_thread::yield();
        };
        each(cores(), come, &seen);
        return seen.count;
    }

    int64_t present() const override { return 1; }
    bool waiting() const override { return false; }

  private:
    static constexpr std::chrono::microseconds kWait{300};

    const ort::Api& api_;
    ort::KernelContext* context_;
};

// One run of one operator.
class Run {
  public:
    // Both outlive it.
    Run(const std::vector<Tensor>& inputs, const Threads& threads) : inputs_(inputs), threads_(threads) {}

    const std::vector<Tensor>& inputs() const { return inputs_; }
    const Tensor& input(size_t index) const { return inputs_[index]; }
    bool has(size_t index) const {
        return index < inputs_.size() && inputs_[index].type != ort::kUndefined;
    }

    const Threads& threads() const { return threads_; }

    // Calls body(0) to body(total - 1), spread over the threads.
    template <class Body>
    void parallel(int64_t total, const Body& body) const {
        if (total <= 0) return;
        if (total == 1) return body(0);
        struct Shared {
            const Body& body;
            std::atomic<bool> failed{false};
        } shared{body};
        const auto one = [](void* user, size_t index) {
            Shared& mine = *static_cast<Shared*>(user);
            try {
                mine.body(int64_t(index));
            } catch (...) {  // nothing but memory can run out in there
                mine.failed = true;
            }
        };
        threads_.each(total, one, &shared);
        if (shared.failed) throw std::bad_alloc();
    }

    // Calls body(first, last) for ranges of 0 to total - 1, of as many as are worth a call: small
    // planes, of `bytes` each, take no longer than that.
    template <class Body>
    void parallel_ranges(int64_t total, int64_t bytes, const Body& body) const {
        const int64_t least = std::max<int64_t>(1, kRangeBytes / std::max<int64_t>(1, bytes));
        const int64_t ranges = (total + least - 1) / least;
        parallel(ranges, [&](int64_t range) {
            body(range * total / ranges, (range + 1) * total / ranges);
        });
    }

    // Calls body(0) to body(total - 1), as many in a row as are worth a call.
    template <class Body>
    void parallel_planes(int64_t total, int64_t bytes, const Body& body) const {
        parallel_ranges(total, bytes, [&](int64_t first, int64_t last) {
            for (int64_t plane = first; plane < last; ++plane) body(plane);
        });
    }

  private:
    static constexpr int64_t kRangeBytes = 16 * 1024;

    const std::vector<Tensor>& inputs_;
    const Threads& threads_;
};

// What the host has for each input of a node; those of `known` are the same in each run: asking the host
// for a tensor takes a while.
inline std::vector<Tensor> inputs_of(const ort::Api& api, ort::KernelContext* context,
                                     const std::vector<std::optional<Tensor>>& known) {
    size_t count = 0;
    require(api.kernel_context_get_input_count(context, &count));
    std::vector<Tensor> inputs;
    inputs.reserve(count);
    for (size_t i = 0; i < count; ++i) {
        if (i < known.size() && known[i]) {
            inputs.push_back(*known[i]);
            continue;
        }
        const ort::Value* value = nullptr;
        require(api.kernel_context_get_input(context, i, &value));
        inputs.push_back(value ? tensor(api, value) : Tensor{});
    }
    return inputs;
}

inline Tensor output_of(const ort::Api& api, ort::KernelContext* context, size_t index, ort::ElementType type,
                        const Shape& shape) {
    ort::Value* value = nullptr;
    require(api.kernel_context_get_output(context, index, shape.data(), shape.size(), &value));
    if (!value) refuse("output ", index, " is missing");
    Tensor output{type, shape};
    require(api.get_tensor_mutable_data(value, &output.data));
    return output;
}

}  // namespace obc::sparse
