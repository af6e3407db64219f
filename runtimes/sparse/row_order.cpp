// The row that finds most of its loads in the first cache comes next.
#include "row_order.hpp"

#include <algorithm>
#include <deque>
#include <numeric>

namespace obc {
namespace sparse {

namespace {

// The places that were loaded last, and how many of each row's are among them.
class LoadedLast {
public:
    LoadedLast(const std::vector<std::vector<int32_t>>& loads, int64_t places, int64_t kept)
        : loads_(loads), kept_(kept), rows_of_(static_cast<size_t>(places)), turn_(rows_of_.size(), -1),
          found_(loads.size()) {
        for (size_t row = 0; row < loads.size(); ++row) {
            for (const int32_t place : loads[row]) rows_of_[static_cast<size_t>(place)].push_back(row);
        }
    }

    double share_of(size_t row) const {
        const double all = static_cast<double>(loads_[row].size());
        return all == 0 ? 1.0 : static_cast<double>(found_[row]) / all;
    }

    void load(size_t row) {
        for (const int32_t place : loads_[row]) {
            int64_t& turn = turn_[static_cast<size_t>(place)];
            if (turn < 0) count(place, 1);
            turn = turns_++;
            queue_.push_back({place, turn});
        }
        while (there_ > kept_) {
            const Load oldest = queue_.front();
            queue_.pop_front();
            int64_t& turn = turn_[static_cast<size_t>(oldest.place)];
            if (turn != oldest.turn) continue;  // loaded again since
            turn = -1;
            count(oldest.place, -1);
        }
    }

private:
    struct Load {
        int32_t place;
        int64_t turn;
    };

    void count(int32_t place, int64_t more) {
        there_ += more;
        for (const size_t row : rows_of_[static_cast<size_t>(place)]) found_[row] += more;
    }

    const std::vector<std::vector<int32_t>>& loads_;
    const int64_t kept_;
    std::vector<std::vector<size_t>> rows_of_;  // that load a place
    std::vector<int64_t> turn_;                 // of a place's last load, -1 once it is gone
    std::vector<int64_t> found_;                // of a row's places, there
    std::deque<Load> queue_;
    int64_t turns_ = 0;
    int64_t there_ = 0;
};

}  // namespace

std::vector<size_t> order_by_loads(const std::vector<std::vector<int32_t>>& loads, int64_t places, int64_t kept) {
    LoadedLast loaded(loads, places, kept);
    std::vector<size_t> left(loads.size());
    std::iota(left.begin(), left.end(), size_t{0});
    std::vector<size_t> order;
    while (!left.empty()) {
        const auto next = std::max_element(left.begin(), left.end(), [&loaded](size_t a, size_t b) {
            return loaded.share_of(a) < loaded.share_of(b);
        });
        order.push_back(*next);
        left.erase(next);
        loaded.load(order.back());
    }
    return order;
}

}  // namespace sparse
}  // namespace obc
