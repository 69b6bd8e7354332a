// Threads that share the work of a step.

#pragma once

#include <atomic>
#include <cstddef>
#include <thread>

// A part of some work: blocks that were taken, and those of them that are done.
struct alignas(64) Part {
    std::atomic<int> taken, done;
};

// One thread's view of a step. Work is split into a part for every thread, and parts into blocks; who is through with
// its own part goes on with those of the others. So a thread that the system has put aside delays the others by the
// block it holds, and the step at its end; at barriers between, all of them would wait for it each time.
class Team {
  public:
    Team(Part* parts, int rank, int size) : rank(rank), size(size), parts(parts) {}

    // Calls work(from, to) on blocks of [0, count), until all are taken. All threads call with the same numbers.
    template <class Work> void share(int count, int block, Work work) {
        int blocks = (count + block - 1) / block;
        totals[next % MOST] = blocks;
        Part* mine = parts + (size_t)next++ * size;
        for (int other = 0; other < size; other++) {
            int owner = (rank + other) % size, first = start(blocks, owner), last = start(blocks, owner + 1);
            for (int i; (i = first + mine[owner].taken.fetch_add(1, std::memory_order_relaxed)) < last;) {
                work(i * block, (i + 1) * block < count ? (i + 1) * block : count);
                mine[owner].done.fetch_add(1, std::memory_order_release);
            }
        }
    }

    // Waits until all that was shared so far is done.
    void together() {
        for (; waited < next; waited++)
            for (int owner = 0; owner < size; owner++) {
                int blocks = totals[waited % MOST], all = start(blocks, owner + 1) - start(blocks, owner);
                std::atomic<int>& done = parts[(size_t)waited * size + owner].done;
                for (int looks = 0; done.load(std::memory_order_acquire) < all;)
                    if (++looks > PATIENCE) std::this_thread::yield();
            }
    }

    const int rank, size;

  private:
    static constexpr int MOST = 4, PATIENCE = 1000;  // shares between two waits; looks before the processor is offered
    int start(int blocks, int owner) const { return (int)((long)blocks * owner / size); }
    Part* parts;
    int next = 0, waited = 0, totals[MOST];
};
