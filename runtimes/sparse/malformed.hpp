// How a model that contradicts OPERATORS.md is turned down.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

namespace obc::sparse {

using Shape = std::vector<int64_t>;

// Thrown inside this library only; the operator's adapter makes a status of it.
struct Malformed {
    std::string message;
};

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
    out << '[';
    for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
    return out << ']';
}

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw Malformed{text.str()};
}

}  // namespace obc::sparse
