// Threads that do one thing together: each its part of every phase, after which they wait for all.

class Barrier {
  public:
    // Before anybody waits.
    void expect(int64_t members) { members_ = members; }

    void wait() {
        if (members_ == 1) return;
        const int64_t turn = turn_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members_) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        // Phases take microseconds; a member that has lost its core takes far longer.
        for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
            if (spins >= kSpins) std::this_thread::yield();
        }
    }

  private:
    static constexpr int kSpins = 20000;

    int64_t members_ = 1;
    std::atomic<int64_t> arrived_{0};
    std::atomic<int64_t> turn_{0};
};

struct Span {
    int64_t begin, end;
};

// One of `count` members, who are told apart by their index.
struct Member {
    int64_t index;
    int64_t count;
    Barrier& barrier;

    // Its equal part of `size` columns, whole vectors of `grain`.
    Span columns(int64_t size, int64_t grain) const {
        return {edge(double(index) / double(count), size, grain),
                edge(double(index + 1) / double(count), size, grain)};
    }

    // Its part of the rows of a lower triangle, of which all parts have the same area.
    Span triangle_rows(int64_t size, int64_t grain) const {
        return {edge(std::sqrt(double(index) / double(count)), size, grain),
                edge(std::sqrt(double(index + 1) / double(count)), size, grain)};
    }

  private:
    static int64_t edge(double share, int64_t size, int64_t grain) {
        if (share >= 1.0) return size;
        return int64_t(share * double(size)) / grain * grain;
    }
};

// `work(member)` by as many threads as there can be, at most `most`; it must not throw.
template <class Work>
void together(int64_t most, Work work) {
    Barrier barrier;
    std::atomic<int64_t> count{0};  // once it is known how many there are
    const auto member = [&](int64_t index) {
        int64_t members;
        while ((members = count.load(std::memory_order_acquire)) == 0) std::this_thread::yield();
        work(Member{index, members, barrier});
    };
    with_threads(most, member, [&](int64_t members) {
        barrier.expect(members);
        count.store(members, std::memory_order_release);
        work(Member{0, members, barrier});
    });
}
