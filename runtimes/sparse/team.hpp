// Threads that stay with one another while several operators run.
//
// The host is asked for its threads once. The first to come leads: it runs one operator after another. The
// others follow: they wait for what the leader shares out, and begin a fraction of a microsecond later, where
// the host would take one or more to call them and to come back.
//
// Nobody waits for a thread that has not come: what is shared out and not begun, the leader does itself. So
// it may be alone, for a while or to the end.
#pragma once

#include <atomic>
#include <exception>

#include "host.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace obc::sparse {

class Team final : public Threads {
  public:
    // Runs work(threads) on one of the host's threads, with the others around; throws what it throws. Says
    // whether others came; `expected` are they where they came before.
    template <class Work>
    static bool lead(const Threads& host, bool expected, const Work& work) {
        struct Entrance {
            const Work& work;
            Team team;
            std::atomic<bool> has_leader{false};
            std::exception_ptr failure;
        } entrance{work, Team(expected), {}, {}};
        const auto come = [](void* user, size_t) {
            Entrance& mine = *static_cast<Entrance*>(user);
            if (mine.has_leader.exchange(true)) return mine.team.follow();
            mine.team.leader_ = std::this_thread::get_id();
            mine.team.leads_on_ = current_core();
            try {
                mine.work(mine.team);
            } catch (...) {
                mine.failure = std::current_exception();
            }
            mine.team.dismiss();
        };
        host.each(cores(), come, &entrance);
        if (entrance.failure) std::rethrow_exception(entrance.failure);
        return entrance.team.present() > 1;
    }

    // Called by the leader alone. Each member has a share of its own, the same in each job of as many tasks:
    // neighbouring tasks of one operator work on what those of the last one wrote, which is near to the
    // thread that wrote it. Who is done with its share goes on with the others'.
    void each(int64_t total, void (*one)(void* user, size_t index), void* user) const override {
        const int64_t members = 1 + followers_.load(std::memory_order_acquire);
        if (members == 1 && expects_others_) let_others_run();
        if (members == 1 || total > kMostTasks) {
            for (int64_t index = 0; index < total; ++index) one(user, size_t(index));
            return;
        }
        one_.store(one, std::memory_order_relaxed);
        user_.store(user, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        ++job_;
        for (int64_t member = members - 1; member >= 0; --member) {
            const int64_t first = member * total / members, end = (member + 1) * total / members;
            Share& share = shares_[member];
            share.end.store(end, std::memory_order_relaxed);
            share.open.store(job_ << kTaskBits | uint64_t(end - first), std::memory_order_release);
        }
        int64_t mine = 0;
        for (int64_t member = 0; member < members; ++member) mine += work_off(shares_[member]);
        for (Patience patience; done_.load(std::memory_order_acquire) != total - mine;) patience.wait();
    }

    // A host's threads may wait for a core of their own when they are new; those that come later still are
    // found to be present in a later run.
    int64_t count() const override {
        while (present() < cores() && std::chrono::steady_clock::now() - since_ < kWait) std::this_thread::yield();
        return present();
    }

    int64_t present() const override { return 1 + followers_.load(std::memory_order_relaxed); }

    bool waiting() const override { return true; }

  private:
    explicit Team(bool expects_others) : expects_others_(expects_others) {}

    static constexpr std::chrono::milliseconds kWait{4};
    static constexpr std::chrono::microseconds kFollowersCome{2};  // where they have cores of their own
    static constexpr std::chrono::milliseconds kBetweenMoves{5};

    // Of `open`: a job's number, and how many of its tasks nobody has begun.
    static constexpr int kTaskBits = 32;
    static constexpr int64_t kMostTasks = (int64_t{1} << kTaskBits) - 1;
    static constexpr uint64_t kDismissed = ~uint64_t{0} << kTaskBits;

    // A member's tasks.
    struct alignas(64) Share {
        std::atomic<uint64_t> open{0};
        std::atomic<int64_t> end{0};
    };

    static int64_t tasks_of(uint64_t open) { return int64_t(open & uint64_t(kMostTasks)); }

    // Spins, and after a while lets other threads of the machine go first.
    class Patience {
      public:
        void wait() {
#if defined(__x86_64__)
            _mm_pause();
#endif
            if (++waited_ % kSpins == 0) std::this_thread::yield();
        }

      private:
        static constexpr int kSpins = 256;
        int waited_ = 0;
    };

    // Takes one of a share's tasks: its index, or -1 where all are begun. Had the job ended meanwhile, none
    // would be open: what is read after it was taken belongs to it.
    static int64_t take(Share& share) {
        uint64_t seen = share.open.load(std::memory_order_acquire);
        while (tasks_of(seen) > 0) {
            if (share.open.compare_exchange_weak(seen, seen - 1, std::memory_order_acquire)) {
                return share.end.load(std::memory_order_relaxed) - tasks_of(seen);
            }
        }
        return -1;
    }

    // Runs what is open of a share, and returns how many tasks that was.
    int64_t work_off(Share& share) const {
        int64_t count = 0;
        for (int64_t index; (index = take(share)) >= 0; ++count) {
            one_.load(std::memory_order_relaxed)(user_.load(std::memory_order_relaxed), size_t(index));
        }
        return count;
    }

    void follow() {
        const int core = leads_on_;
        // Once all is over the leader itself comes here, where no other thread was in time.
        if (core >= 0 && std::this_thread::get_id() != leader_) leave_core(core);
        if (is_over_) return;
        const int64_t self = ++followers_;
        if (is_over_) return;  // nobody looks for this one any more
        for (Patience patience;;) {
            const uint64_t open = shares_[self].open.load(std::memory_order_relaxed);
            if (open == kDismissed) break;
            if (tasks_of(open) == 0) {
                patience.wait();
                continue;
            }
            patience = Patience();
            int64_t mine = work_off(shares_[self]);
            for (int64_t member = 0; member < present(); ++member) mine += work_off(shares_[member]);
            done_.fetch_add(mine, std::memory_order_release);
        }
    }

    // Those that do not come may be waiting for this very core: see leave_core. Or they sleep, or are busy: they
    // are let run less and less often.
    void let_others_run() const {
        if (std::chrono::steady_clock::now() - since_ < alone_for_) return;
        std::this_thread::yield();
        alone_for_ = 2 * (std::chrono::steady_clock::now() - since_);
    }

    static int current_core() {
#if defined(__linux__)
        return sched_getcpu();
#else
        return -1;
#endif
    }

    // Goes to another core if this thread is on `core`; from there it may go anywhere. Where cores share no
    // cache, as in small virtual machines, Linux wakes a thread on the core of the one that wakes it, and there
    // they take turns of milliseconds while another core is idle.
    static void leave_core(int core) {
#if defined(__linux__)
        if (current_core() != core) return;
        // Not all the time: there may be more threads than cores.
        static thread_local std::chrono::steady_clock::time_point not_before;
        const auto now = std::chrono::steady_clock::now();
        if (now < not_before) return;
        not_before = now + kBetweenMoves;
        cpu_set_t allowed;
        if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) return;
        cpu_set_t others = allowed;
        CPU_CLR(core, &others);
        if (sched_setaffinity(0, sizeof others, &others) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
#else
        (void)core;
#endif
    }

    void dismiss() {
        is_over_ = true;
        for (int64_t member = followers_; member > 0; --member) {
            shares_[member].open.store(kDismissed, std::memory_order_release);
        }
    }

    mutable Share shares_[kMostThreads];
    alignas(64) mutable std::atomic<void (*)(void*, size_t)> one_{nullptr};
    mutable std::atomic<void*> user_{nullptr};
    mutable uint64_t job_ = 0;
    const bool expects_others_;
    mutable std::chrono::steady_clock::duration alone_for_ = kFollowersCome;
    std::thread::id leader_;         // known once leads_on_ is
    std::atomic<int> leads_on_{-1};  // core
    std::atomic<bool> is_over_{false};
    alignas(64) mutable std::atomic<int64_t> done_{0};
    alignas(64) std::atomic<int64_t> followers_{0};
    const std::chrono::steady_clock::time_point since_ = std::chrono::steady_clock::now();
};

}  // namespace obc::sparse
