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
// Of shared memory, and where it begins by its own count.
constexpr size_t ALIGN = 1024;

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

// A barrier of warpgroup.cuh.
struct Phases {
    int32_t bytes;
    unsigned left : 15, threads : 15, parity : 1;
};

struct BulkCopy {
    void* to;
    const void* from;
    unsigned bytes;
    uint64_t* barrier;
};

struct Fiber {
    uint3 index;
    unsigned number;
    bool ended = false;
    // What it waits for, and how often that had been passed when it came.
    Barrier* barrier = nullptr;
    uint64_t came = 0;
    // Or the parity of what phase.
    const uint64_t* phases = nullptr;
    unsigned parity = 0;
    bool begun = false;
    // Those that were asked for since the last group ended, and groups that are waited for in turn.
    std::vector<Copy> copies;
    std::deque<std::vector<Copy>> groups;
    // In the same way.
    std::vector<Product> products;
    std::deque<std::vector<Product>> product_groups;
    bool may_multiply = false;
    // Whether products might not see what it has copied to shared memory.
    bool unpublished = false;
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
std::vector<Barrier> group_barriers;
unsigned living;
std::vector<char> shared;
size_t shared_bytes;
std::vector<BulkCopy> bulk_copies;
bool barriers_published;
std::minstd_rand dice;
Fiber* current;
jmp_buf scheduler;
Kernel* kernels;
Kernel* kernel;
void** arguments;

[[noreturn]] void refuse(const char* why) {
    fprintf(stderr, "%s: %s\n", kernel->name, why);
    abort();
}

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

Phases of(const uint64_t* barrier) {
    Phases phases;
    memcpy(&phases, barrier, sizeof phases);
    return phases;
}

// Ends its phase if nothing is missing.
void set(uint64_t* barrier, Phases phases) {
    if (phases.left == 0 && phases.bytes == 0) {
        phases.parity ^= 1;
        phases.left = phases.threads;
    }
    memcpy(barrier, &phases, sizeof phases);
}

// Makes one of the copies that go on.
void copy_one() {
    std::swap(bulk_copies[dice() % bulk_copies.size()], bulk_copies.back());
    const BulkCopy copy = bulk_copies.back();
    bulk_copies.pop_back();
    memcpy(copy.to, copy.from, copy.bytes);
    Phases phases = of(copy.barrier);
    phases.bytes -= int32_t(copy.bytes);
    set(copy.barrier, phases);
}

char* start_of_shared() {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared.data()) + ALIGN - 1) / ALIGN * ALIGN);
}

void check(const void* at, size_t bytes) {
    const char *start = start_of_shared(), *first = static_cast<const char*>(at);
    if (first < start || first + bytes > start + shared_bytes) refuse("something lies outside of shared memory");
}

// Where the matrix unit finds an element of a described matrix of rows of 128 bytes, its chunks swizzled: at `column` of
// `row`, columns following one another in blocks of 64, rows in groups of 8.
float element(uint64_t description, unsigned row, unsigned column) {
    const unsigned start = description & 0x3fff, leading = description >> 16 & 0x3fff, stride = description >> 32 & 0x3fff;
    if (description >> 62 != 1 || (description >> 46 & 0xffff) != 0) refuse("a matrix is described as none that is known");
    unsigned at = (start << 4) + column / 64 * (leading << 4) + column % 64 * 2 + row / 8 * (stride << 4) + row % 8 * 128;
    at ^= (at >> 7 & 7) << 4;
    const char* from = start_of_shared() + at - ALIGN;
    __nv_bfloat16 value;
    check(from, sizeof value);
    memcpy(&value, from, sizeof value);
    return __bfloat162float(value);
}

// The part of a product that the current thread has. `groups` are what the lanes of its warp multiply.
void multiply(const std::vector<Product>* const* groups, size_t index) {
    const Product& product = (*groups[lane()])[index];
    const unsigned row = current->number % 128 / 32 * 16 + lane() / 4;
    float left[2][16];
    for (unsigned half = 0; half < 2; ++half)
        for (unsigned k = 0; k < 16; ++k) {
            if (!product.registers) {
                left[half][k] = element(product.left, row + 8 * half, k);
                continue;
            }
            const unsigned owner = (lane() & ~3u) + k % 8 / 2;
            const unsigned pair = (*groups[owner])[index].registers[k / 8 * 2 + half];
            left[half][k] = __bfloat162float({uint16_t(pair >> k % 2 * 16)});
        }
    for (int j = 0; j < product.columns / 8; ++j) {
        float right[2][16];
        for (unsigned c = 0; c < 2; ++c)
            for (unsigned k = 0; k < 16; ++k) {
                const unsigned column = 8 * j + 2 * (lane() % 4) + c;
                right[c][k] = product.registers ? element(product.right, k, column) : element(product.right, column, k);
            }
        for (unsigned c = 0; c < 4; ++c) {
            float sum = product.add ? product.sums[j][c] : 0;
            for (unsigned k = 0; k < 16; ++k) sum += left[c / 2][k] * right[c % 2][k];
            product.sums[j][c] = sum;
        }
    }
}

bool ready(const Fiber& fiber) {
    return !fiber.ended && (!fiber.barrier || fiber.barrier->passed != fiber.came) &&
           (!fiber.phases || of(fiber.phases).parity != fiber.parity);
}

// Runs a fiber until it waits or ends.
void resume(Fiber& fiber) {
    current = &fiber;
    threadIdx = fiber.index;
    fiber.barrier = nullptr;
    fiber.phases = nullptr;
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

void run_block() {
    for (Warp& warp : warps) warp = {};
    for (unsigned i = 0; i < fibers.size(); ++i) {
        Fiber& fiber = fibers[i];
        fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        fiber.number = i;
        fiber.ended = fiber.begun = false;
        fiber.barrier = nullptr;
        fiber.phases = nullptr;
        fiber.copies.clear();
        fiber.groups.clear();
        fiber.products.clear();
        fiber.product_groups.clear();
        fiber.may_multiply = fiber.unpublished = false;
        ++warps[i / 32].living;
    }
    barrier = {};
    group_barriers.assign(warps.size() / 4 + 1, {});
    living = fibers.size();
    std::vector<Fiber*> order;
    // One warp or one thread runs only when no other can.
    const unsigned width = dice() % 2 ? 32 : 1, last = dice() % ((fibers.size() + width - 1) / width);
    while (living > 0) {
        order.clear();
        for (Fiber& fiber : fibers)
            if (fiber.number / width != last && ready(fiber)) order.push_back(&fiber);
        const bool others = !order.empty();
        if (!others)
            for (Fiber& fiber : fibers)
                if (ready(fiber)) order.push_back(&fiber);
        if (!bulk_copies.empty() && dice() % (others ? 8 : order.empty() ? 1 : 2) == 0) copy_one();
        else if (order.empty()) refuse("its threads wait for one another for ever");
        std::shuffle(order.begin(), order.end(), dice);
        for (Fiber* fiber : order) resume(*fiber);
    }
    if (!bulk_copies.empty()) refuse("it ends before its copies");
}

}  // namespace

Kernel::Kernel(const char* name, void (*call)(void**)) : name(name), call(call), next(kernels) { kernels = this; }

void wait_for_block() { wait(barrier, living); }
void wait_for_warp() { wait(warp().barrier, warp().living); }
uint64_t* lanes() { return warp().lanes; }
unsigned lane() { return current->number % 32; }
void* dynamic_shared() { return start_of_shared(); }

void copy_later(void* to, const void* from, bool valid) { current->copies.push_back({to, from, valid}); }

void end_group_of_copies() { current->groups.push_back(std::exchange(current->copies, {})); }

void wait_for_copies(unsigned left) {
    for (; current->groups.size() > left; current->groups.pop_front())
        for (const Copy& copy : current->groups.front()) {
            if (copy.valid) memcpy(copy.to, copy.from, 16);
            else memset(copy.to, 0, 16);
            current->unpublished = true;
        }
}

unsigned shared_address(const void* at) { return unsigned(static_cast<const char*>(at) - start_of_shared() + ALIGN); }

void begin_barrier(uint64_t* barrier, unsigned threads) {
    check(barrier, sizeof *barrier);
    barriers_published = false;
    const Phases phases = {0, threads, threads, 0};
    static_assert(sizeof phases == sizeof *barrier);
    memcpy(barrier, &phases, sizeof phases);
}

void publish_barriers() { barriers_published = true; }

void arrive(uint64_t* barrier, unsigned bytes) {
    if (!barriers_published) refuse("a thread arrives at a barrier that was not published");
    Phases phases = of(barrier);
    if (phases.left == 0) refuse("more threads arrive at a barrier than it counts");
    --phases.left;
    phases.bytes += int32_t(bytes);
    set(barrier, phases);
}

void wait_for_phase(uint64_t* barrier, unsigned parity) {
    current->phases = barrier;
    current->parity = parity;
    if (!_setjmp(current->where)) _longjmp(scheduler, 1);
}

void wait_for_warp_group() { wait(group_barriers[current->number / 128], 128); }

void copy_bulk(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16 != 0)
        refuse("a bulk copy is not of 16 bytes each");
    check(to, bytes);
    bulk_copies.push_back({to, from, bytes, barrier});
    if (dice() % 4 == 0) copy_one();
}

void begin_products() { current->may_multiply = true; }

void multiply_later(const Product& product) {
    if (!current->may_multiply) refuse("products are not begun");
    current->products.push_back(product);
}

void publish_to_products() { current->unpublished = false; }

void end_products() {
    const unsigned first = current->number / 128 * 128;
    for (unsigned i = first; i < first + 128; ++i)
        if (fibers[i].unpublished) refuse("a product reads what was not published to it");
    current->product_groups.push_back(std::exchange(current->products, {}));
    current->may_multiply = false;
}

void wait_for_products(unsigned left) {
    for (; current->product_groups.size() > left; current->product_groups.pop_front()) {
        const std::vector<Product>& group = current->product_groups.front();
        lanes()[lane()] = reinterpret_cast<uint64_t>(&group);
        wait_for_warp();
        const std::vector<Product>* groups[32];
        memcpy(groups, lanes(), sizeof groups);
        for (size_t i = 0; i < group.size(); ++i) multiply(groups, i);
        wait_for_warp();
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
    dice.seed(1);
    emulated::shared_bytes = shared_bytes;
    for (blockIdx.z = 0; blockIdx.z < grid[2]; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid[1]; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid[0]; ++blockIdx.x) {
                // What nobody has written is no zero.
                shared.assign(shared_bytes + ALIGN, '\xff');
                run_block();
            }
    return true;
}
