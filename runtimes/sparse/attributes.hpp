// A node's attributes, checked as they are read.
#pragma once

#include <cmath>
#include <limits>
#include <optional>

#include "host.hpp"

namespace obc::sparse {

// Where attributes come from: a kernel that is made, or a shape that is inferred.
class AttributeSource {
  public:
    virtual ~AttributeSource() = default;
    virtual std::optional<int64_t> find_int(const char* name) const = 0;
    virtual std::optional<float> find_float(const char* name) const = 0;
    virtual std::optional<std::vector<int64_t>> find_ints(const char* name) const = 0;
    virtual std::optional<std::vector<float>> find_floats(const char* name) const = 0;
    virtual std::optional<std::string> find_string(const char* name) const = 0;
};

class KernelAttributes final : public AttributeSource {
  public:
    KernelAttributes(const ort::Api& api, const ort::KernelInfo* info) : api_(api), info_(info) {}

    std::optional<int64_t> find_int(const char* name) const override {
        int64_t value = 0;
        if (!succeeded(api_, api_.kernel_info_get_int(info_, name, &value))) return std::nullopt;
        return value;
    }
    std::optional<float> find_float(const char* name) const override {
        float value = 0;
        if (!succeeded(api_, api_.kernel_info_get_float(info_, name, &value))) return std::nullopt;
        return value;
    }
    std::optional<std::vector<int64_t>> find_ints(const char* name) const override {
        return find_list<int64_t>(api_.kernel_info_get_ints, name);
    }
    std::optional<std::vector<float>> find_floats(const char* name) const override {
        return find_list<float>(api_.kernel_info_get_floats, name);
    }
    std::optional<std::string> find_string(const char* name) const override {
        size_t size = 0;  // with the zero that ends it
        if (!succeeded(api_, api_.kernel_info_get_string(info_, name, nullptr, &size)) || size == 0)
            return std::nullopt;
        std::string text(size, '\0');
        if (!succeeded(api_, api_.kernel_info_get_string(info_, name, text.data(), &size))) return std::nullopt;
        text.resize(size - 1);
        return text;
    }

  private:
    template <class T>
    std::optional<std::vector<T>> find_list(ort::Status* (*get)(const ort::KernelInfo*, const char*, T*,
                                                                size_t*),
                                            const char* name) const {
        size_t count = 0;
        if (!succeeded(api_, get(info_, name, nullptr, &count))) return std::nullopt;
        std::vector<T> values(count);
        if (count && !succeeded(api_, get(info_, name, values.data(), &count))) return std::nullopt;
        return values;
    }

    const ort::Api& api_;
    const ort::KernelInfo* info_;
};

class InferenceAttributes final : public AttributeSource {
  public:
    InferenceAttributes(const ort::Api& api, const ort::InferenceContext* context)
        : api_(api), context_(context) {}

    std::optional<int64_t> find_int(const char* name) const override {
        return find_one<int64_t>(name, ort::kIntAttribute);
    }
    std::optional<float> find_float(const char* name) const override {
        return find_one<float>(name, ort::kFloatAttribute);
    }
    std::optional<std::vector<int64_t>> find_ints(const char* name) const override {
        return find_list<int64_t>(name, ort::kIntsAttribute);
    }
    std::optional<std::vector<float>> find_floats(const char* name) const override {
        return find_list<float>(name, ort::kFloatsAttribute);
    }
    std::optional<std::string> find_string(const char* name) const override {
        const auto found = find_list<char>(name, ort::kStringAttribute);
        if (!found) return std::nullopt;
        return std::string(found->begin(), found->end());
    }

  private:
    const ort::Attribute* find(const char* name) const {
        const ort::Attribute* attribute = nullptr;
        return succeeded(api_, api_.inference_get_attribute(context_, name, &attribute)) ? attribute
                                                                                         : nullptr;
    }

    template <class T>
    std::optional<T> find_one(const char* name, int type) const {
        const ort::Attribute* attribute = find(name);
        T value{};
        size_t filled = 0;
        if (!attribute ||
            !succeeded(api_, api_.read_attribute(attribute, type, &value, sizeof(T), &filled))) {
            return std::nullopt;
        }
        return value;
    }

    template <class T>
    std::optional<std::vector<T>> find_list(const char* name, int type) const {
        const ort::Attribute* attribute = find(name);
        if (!attribute) return std::nullopt;
        size_t bytes = 0;  // with no room the call fails and says how much it takes
        succeeded(api_, api_.read_attribute(attribute, type, nullptr, 0, &bytes));
        if (bytes == 0 || bytes % sizeof(T)) return std::nullopt;
        std::vector<T> values(bytes / sizeof(T));
        if (!succeeded(api_, api_.read_attribute(attribute, type, values.data(), bytes, &bytes))) {
            return std::nullopt;
        }
        return values;
    }

    const ort::Api& api_;
    const ort::InferenceContext* context_;
};

// Those of one of a region's operators: each name ends with the operator's number.
class NumberedAttributes final : public AttributeSource {
  public:
    NumberedAttributes(const AttributeSource& all, int64_t number)
        : all_(all), ending_("_" + std::to_string(number)) {}

    std::optional<int64_t> find_int(const char* name) const override {
        return all_.find_int((name + ending_).c_str());
    }
    std::optional<float> find_float(const char* name) const override {
        return all_.find_float((name + ending_).c_str());
    }
    std::optional<std::vector<int64_t>> find_ints(const char* name) const override {
        return all_.find_ints((name + ending_).c_str());
    }
    std::optional<std::vector<float>> find_floats(const char* name) const override {
        return all_.find_floats((name + ending_).c_str());
    }
    std::optional<std::string> find_string(const char* name) const override {
        return all_.find_string((name + ending_).c_str());
    }

  private:
    const AttributeSource& all_;
    std::string ending_;
};

struct Limits {
    int64_t least;
    int64_t most;
};

constexpr int64_t kAnyCount = -1;
constexpr int64_t kMostChannels = int64_t(1) << 24;

class Attributes {
  public:
    explicit Attributes(const AttributeSource& source) : source_(source) {}

    int64_t integer(const char* name, Limits limits) const {
        return within(name, needed(name, find_int(name)), limits);
    }
    int64_t integer(const char* name, Limits limits, int64_t otherwise) const {
        return within(name, find_int(name).value_or(otherwise), limits);
    }

    std::vector<int64_t> integers(const char* name, int64_t count, Limits limits) const {
        return all_within(name, needed(name, find_ints(name)), count, limits);
    }
    std::vector<int64_t> integers(const char* name, int64_t count, Limits limits,
                                  int64_t otherwise) const {
        auto found = find_ints(name);
        return all_within(name, found ? *found : std::vector<int64_t>(size_t(count), otherwise), count,
                          limits);
    }

    float real(const char* name, float otherwise) const {
        const float value = find_float(name).value_or(otherwise);
        if (std::isnan(value)) refuse("attribute '", name, "' is not a number");
        return value;
    }

    float scale(const char* name) const { return positive(name, needed(name, find_float(name))); }

    std::vector<float> scales(const char* name, int64_t count) const {
        std::vector<float> values = needed(name, find_list_of_floats(name));
        check_count(name, int64_t(values.size()), count);
        for (float value : values) positive(name, value);
        return values;
    }

    bool has_float(const char* name) const { return find_float(name).has_value(); }

    std::string text(const char* name) const {
        return needed(name, typed(name, source_.find_string(name), "a string"));
    }

    int64_t channels() const { return integer("channels", {1, kMostChannels}); }

  private:
    std::optional<int64_t> find_int(const char* name) const {
        return typed(name, source_.find_int(name), "an int");
    }
    std::optional<float> find_float(const char* name) const {
        return typed(name, source_.find_float(name), "a float");
    }
    std::optional<std::vector<int64_t>> find_ints(const char* name) const {
        return typed(name, source_.find_ints(name), "a list of ints");
    }
    std::optional<std::vector<float>> find_list_of_floats(const char* name) const {
        return typed(name, source_.find_floats(name), "a list of floats");
    }

    // What was found; nothing where there is no such attribute.
    template <class T>
    std::optional<T> typed(const char* name, std::optional<T> found, const char* type) const {
        if (!found && (source_.find_int(name) || source_.find_float(name) || source_.find_ints(name) ||
                       source_.find_floats(name) || source_.find_string(name))) {
            refuse("attribute '", name, "' has another type, expected ", type);
        }
        return found;
    }

    template <class T>
    static T needed(const char* name, std::optional<T> found) {
        if (!found) refuse("attribute '", name, "' is missing");
        return *std::move(found);
    }

    static int64_t within(const char* name, int64_t value, Limits limits) {
        if (value < limits.least || value > limits.most) {
            refuse("attribute '", name, "' is ", value, ", expected ", limits.least, " to ",
                   limits.most);
        }
        return value;
    }

    static void check_count(const char* name, int64_t found, int64_t count) {
        // The host hands over a list of another type as an empty one.
        if (found == 0)
            refuse("attribute '", name, "' has another type or no values, expected a list of numbers");
        if (count != kAnyCount && found != count) {
            refuse("attribute '", name, "' has ", found, " values, expected ", count);
        }
    }

    static std::vector<int64_t> all_within(const char* name, std::vector<int64_t> values, int64_t count,
                                           Limits limits) {
        check_count(name, int64_t(values.size()), count);
        for (int64_t value : values) within(name, value, limits);
        return values;
    }

    static float positive(const char* name, float value) {
        if (!(value > 0) || std::isinf(value)) {
            refuse("attribute '", name, "' is ", value, ", expected a finite number above 0");
        }
        return value;
    }

    const AttributeSource& source_;
};

}  // namespace obc::sparse
