// How a model that contradicts OPERATORS.md is turned down.
#pragma once

#include <sstream>
#include <string>

#include "shape.hpp"

namespace obc::sparse {

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
