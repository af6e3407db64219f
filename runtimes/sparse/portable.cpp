// The innermost loops for whatever processor the compiler was told of.
#include <cstring>

#include "instruction_sets.hpp"

#define OBC_DOT_PORTABLE

namespace obc::sparse {
namespace portable_rows {
#include "rows/rows.hpp"
}  // namespace portable_rows

const InstructionSet kPortable = portable_rows::instruction_set("portable", kPortableConvolution);
}  // namespace obc::sparse
