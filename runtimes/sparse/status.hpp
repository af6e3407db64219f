// What goes wrong becomes a status for the host; no exception leaves this library.
#pragma once

#include <exception>

#include "host.hpp"

namespace obc::sparse {

inline std::string node_name(const ort::Api& api, const ort::KernelInfo* info) {
    size_t size = 0;
    if (!succeeded(api, api.kernel_info_get_node_name(info, nullptr, &size)) || size == 0) return "";
    std::string name(size, '\0');
    if (!succeeded(api, api.kernel_info_get_node_name(info, name.data(), &size))) return "";
    name.resize(size - 1);  // without the zero that ends it
    return name;
}

inline ort::Status* status(const ort::Api& api, int code, const char* op, const std::string& node,
                           const char* message) {
    try {
        return api.create_status(code, (std::string(op) + " '" + node + "': " + message).c_str());
    } catch (...) {
        return api.create_status(code, op);
    }
}

// Runs `work`; what it throws becomes a status with the operator's and the node's name.
template <class Work>
ort::Status* status_of(const ort::Api& api, const char* op, const std::string& node, const Work& work) {
    try {
        work();
        return nullptr;
    } catch (const HostRefusal& refusal) {
        return refusal.status;
    } catch (const Malformed& malformed) {
        return status(api, ort::kInvalidArgument, op, node, malformed.message.c_str());
    } catch (const std::bad_alloc&) {
        return status(api, ort::kFail, op, node, "out of memory");
    } catch (const std::exception& error) {
        return status(api, ort::kFail, op, node, error.what());
    } catch (...) {
        return status(api, ort::kFail, op, node, "unknown failure");
    }
}

}  // namespace obc::sparse
