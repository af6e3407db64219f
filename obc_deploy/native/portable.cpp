// The row solvers for whatever processor the compiler was told of.
#include "layer.hpp"

#define OBC_BYTES 16
#define OBC_TILE_ROWS 4
#define OBC_TILE_VECTORS 2

namespace obc {
namespace portable {
#include "row_solvers.hpp"
}  // namespace portable

constexpr InstructionSet kPortable = {"portable", portable::solvers<float>(), portable::solvers<double>(),
                               portable::find_grid, portable::invert_hessians, portable::output_energy};
}  // namespace obc
