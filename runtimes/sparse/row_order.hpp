// In which order rows of blocks are computed, where a tile is larger than the first cache.
//
// What a row loads is in the first cache if one of the last few rows loaded it too. In any order that is
// so for some of it; a row that has much in common with the last ones waits less for the second cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace obc {
namespace sparse {

// Each row after those that loaded most of what it loads: the row of the largest share that is still among
// the `kept` places loaded last comes next, and rows that load nothing come first. `loads` are each row's
// places, from 0 to places - 1.
std::vector<size_t> order_by_loads(const std::vector<std::vector<int32_t>>& loads, int64_t places, int64_t kept);

}  // namespace sparse
}  // namespace obc
