// Rows are independent: each thread takes the next one, with memory of its own made once.

class Progress {
  public:
    explicit Progress(Control* control) : control_(control) {}

    // The row has `after` columns left of `before`; false once the caller wants to stop.
    bool on(int64_t before, int64_t after) {
        control_->done.fetch_add(before * before * before - after * after * after,
                                 std::memory_order_relaxed);
        return !stopped();
    }
    bool end_row(int64_t left) { return on(left, 0); }
    bool stopped() const { return control_->stop.load(std::memory_order_relaxed) != 0; }

  private:
    Control* control_;
};

// What a thread keeps while it solves rows; `run` is false where it was told to stop.
class RowSolver {
  public:
    virtual ~RowSolver() = default;
    virtual bool run(int64_t row, Progress& progress) = 0;
};

template <class Make>
Outcome over_rows(int64_t rows, int64_t thread_count, Control* control, Make make) {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> outcome{kSolved};
    auto work = [&] {
        try {
            std::unique_ptr<RowSolver> solver = make();
            Progress progress(control);
            for (int64_t row; (row = next.fetch_add(1)) < rows;) {
                if (outcome.load() != kSolved) return;
                if (!solver->run(row, progress)) {
                    outcome.store(kStopped);
                    return;
                }
            }
        } catch (const std::bad_alloc&) {
            outcome.store(kNoMemory);
        }
    };
    with_threads(std::min(rows, thread_count), [&](int64_t) { work(); }, [&](int64_t) { work(); });
    return Outcome(outcome.load());
}

template <class Make>
Outcome over_rows(const Layer& layer, Make make) {
    return over_rows(layer.rows, layer.threads, layer.control, make);
}
