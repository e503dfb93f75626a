// All kernels as a library for the CPU, see emulate.h.
#include "emulate.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <vector>

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
namespace {

constexpr size_t STACK = 64 << 10;

// Where so many threads wait, until as many have come as there are.
struct Barrier {
    unsigned waiting = 0;
    uint64_t passed = 0;
};

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

struct Fiber {
    uint3 index;
    unsigned number;
    bool ended = false;
    // What it waits for, and how often that had been passed when it came.
    Barrier* barrier = nullptr;
    uint64_t came = 0;
    bool begun = false;
    // Those that were asked for since the last group ended, and groups that are waited for in turn.
    std::vector<Copy> copies;
    std::deque<std::vector<Copy>> groups;
    jmp_buf where;
    std::unique_ptr<char[]> stack = std::make_unique_for_overwrite<char[]>(STACK);
};

struct Warp {
    Barrier barrier;
    unsigned living = 0;
    uint64_t lanes[32];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Barrier barrier;
unsigned living;
std::vector<char> shared;
Fiber* current;
jmp_buf scheduler;
Kernel* kernels;
Kernel* kernel;
void** arguments;

Warp& warp() { return warps[current->number / 32]; }

void pass(Barrier& barrier) {
    barrier.waiting = 0;
    ++barrier.passed;
}

void wait(Barrier& barrier, unsigned living) {
    if (++barrier.waiting == living) return pass(barrier);
    current->barrier = &barrier;
    current->came = barrier.passed;
    if (!_setjmp(current->where)) _longjmp(scheduler, 1);
}

void run() {
    kernel->call(arguments);
    current->ended = true;
    // A barrier waits for those only that can still come.
    if (--living == barrier.waiting && living > 0) pass(barrier);
    Warp& own = warp();
    if (--own.living == own.barrier.waiting && own.living > 0) pass(own.barrier);
    _longjmp(scheduler, 1);
}

bool ready(const Fiber& fiber) {
    return !fiber.ended && (!fiber.barrier || fiber.barrier->passed != fiber.came);
}

// Runs a fiber until it waits or ends.
void resume(Fiber& fiber) {
    current = &fiber;
    threadIdx = fiber.index;
    fiber.barrier = nullptr;
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.where, 1);
    fiber.begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, run, 0);
    setcontext(&context);
}

void run_block(std::minstd_rand& random) {
    for (Warp& warp : warps) warp = {};
    for (unsigned i = 0; i < fibers.size(); ++i) {
        Fiber& fiber = fibers[i];
        fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        fiber.number = i;
        fiber.ended = fiber.begun = false;
        fiber.barrier = nullptr;
        fiber.copies.clear();
        fiber.groups.clear();
        ++warps[i / 32].living;
    }
    barrier = {};
    living = fibers.size();
    std::vector<Fiber*> order;
    while (living > 0) {
        order.clear();
        for (Fiber& fiber : fibers)
            if (ready(fiber)) order.push_back(&fiber);
        if (order.empty()) {
            fprintf(stderr, "%s: its threads wait for one another for ever\n", kernel->name);
            abort();
        }
        std::shuffle(order.begin(), order.end(), random);
        for (Fiber* fiber : order) resume(*fiber);
    }
}

}  // namespace

Kernel::Kernel(const char* name, void (*call)(void**)) : name(name), call(call), next(kernels) { kernels = this; }

void wait_for_block() { wait(barrier, living); }
void wait_for_warp() { wait(warp().barrier, warp().living); }
uint64_t* lanes() { return warp().lanes; }
unsigned lane() { return current->number % 32; }
void* dynamic_shared() { return shared.data(); }

void copy_later(void* to, const void* from, bool valid) { current->copies.push_back({to, from, valid}); }

void end_group_of_copies() { current->groups.push_back(std::exchange(current->copies, {})); }

void wait_for_copies(unsigned left) {
    for (; current->groups.size() > left; current->groups.pop_front())
        for (const Copy& copy : current->groups.front()) {
            if (copy.valid) memcpy(copy.to, copy.from, 16);
            else memset(copy.to, 0, 16);
        }
}

}  // namespace emulated

// Runs a kernel. Answers false if there is none of the name. One call at a time.
extern "C" bool plumb_emulated_launch(const char* name, const unsigned grid[3], const unsigned block[3],
                                      size_t shared_bytes, void** arguments) {
    using namespace emulated;
    for (kernel = kernels; kernel && strcmp(kernel->name, name) != 0; kernel = kernel->next) {
    }
    if (!kernel) return false;
    emulated::arguments = arguments;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    fibers.resize(block[0] * block[1] * block[2]);
    warps.resize((fibers.size() + 31) / 32);
    std::minstd_rand random(1);
    for (blockIdx.z = 0; blockIdx.z < grid[2]; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid[1]; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid[0]; ++blockIdx.x) {
                // What nobody has written is no zero.
                shared.assign(shared_bytes, '\xff');
                run_block(random);
            }
    return true;
}
