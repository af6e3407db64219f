// One instruction set's kernels (included once for each, within a namespace of its own, after the
// set's Codes, TilePixels, Arithmetic and Lanes; no include guard).

#include "packed_tile.hpp"
#include "requantize.hpp"
#include "accumulate.hpp"

typedef void (*Accumulate)(const RowsOfBlocks&);

#define OBC_SHAPE(rows, columns) {rows, columns},
static constexpr TileShape kTileShapes[] = {OBC_TILE_SHAPES(OBC_SHAPE)};
#undef OBC_SHAPE
#define OBC_KERNEL(rows, columns)                                                                    \
    {&accumulate<rows, columns, Ending::kSums>, &accumulate<rows, columns, Ending::kExact>,          \
     &accumulate<rows, columns, Ending::kRectified>, &accumulate<rows, columns, Ending::kRectifiedWholeRange>},
static constexpr Accumulate kAccumulate[][4] = {OBC_TILE_SHAPES(OBC_KERNEL)};
#undef OBC_KERNEL

#include "run_convolution.hpp"

static constexpr ConvolutionKernels kKernels = {
    Lanes::kName,       Lanes::kPixels, Lanes::kPixelBytes, Lanes::kSumBytes, Lanes::kWeightBytes,
    Lanes::kCacheBytes, kTileShapes,    sizeof(kTileShapes) / sizeof(kTileShapes[0]),
    &run_convolution};
