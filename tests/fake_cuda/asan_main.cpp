// The partitioner's C++ under AddressSanitizer and UBSan, against the fake driver that SEMIPD_LIBCUDA names.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "green_context.hpp"

using semipd::CudaError;
using semipd::Device;
using semipd::Partition;
using semipd::PrimaryContext;

namespace {

#define REQUIRE(condition)                                                       \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                        \
        }                                                                        \
    } while (0)

void* fake(const char* name) {
    static void* library = dlopen(std::getenv("SEMIPD_LIBCUDA"), RTLD_NOW);
    void* symbol = library != nullptr ? dlsym(library, name) : nullptr;
    REQUIRE(symbol != nullptr);
    return symbol;
}

int read(const char* name) { return reinterpret_cast<int (*)()>(fake(name))(); }
void fail(long call) {
    reinterpret_cast<void (*)(long, int)>(fake("fake_fail"))(call, CUDA_ERROR_OUT_OF_MEMORY);
}
void make_busy(const Partition& partition) {
    reinterpret_cast<void (*)(void*)>(fake("fake_make_busy"))(partition.stream());
}

void require_nothing_left() {
    semipd::release_idle();
    REQUIRE(read("fake_live_green") == 0);
    REQUIRE(read("fake_live_streams") == 0);
    REQUIRE(read("fake_primary_refs") == 0);
    REQUIRE(read("fake_context_depth") == 0);
}

// Everything the library does, with what it hands out moved about as a caller may; the second time with idle
// green contexts.
void live() {
    const Device device(0);
    REQUIRE(device.plan(60, false).granted == 64);
    std::vector<std::unique_ptr<Partition>> kept;
    {
        const auto context = std::make_shared<const PrimaryContext>(device);
        REQUIRE(context->free_bytes() > 0);
        for (const int sms : {8, 60, 128}) {
            auto split = semipd::create_split(context, sms, false, -1, 0);
            kept.push_back(std::move(split.first));
            REQUIRE(kept.back()->sms() + split.second->sms() == 132);
        }
        kept.push_back(std::make_unique<Partition>(context, -5));
    }
    for (const auto& partition : kept) partition->synchronize();  // their context is theirs alone now
}

void every_failure_releases_everything() {
    long refused = 0;
    long call = 1;
    for (bool reached = true; reached; ++call) {
        fail(call);
        try {
            live();
            live();
        } catch (const CudaError& error) {
            REQUIRE(error.code() == CUDA_ERROR_OUT_OF_MEMORY);
            REQUIRE(error.name() == "CUDA_ERROR_OUT_OF_MEMORY");
            ++refused;
        }
        require_nothing_left();
        reached = reinterpret_cast<long (*)()>(fake("fake_calls"))() >= call;
        REQUIRE(read("fake_misuse") == 0);
    }
    fail(0);
    REQUIRE(refused > 50);
    std::printf("%ld calls failed in turn, %ld of them refused\n", call - 2, refused);
}

void destroying_waits_for_work() {
    const auto context = std::make_shared<const PrimaryContext>(Device(0));
    auto split = semipd::create_split(context, 64, true, 0, 0);
    make_busy(*split.first);
    make_busy(*split.second);
}

void threads_share_the_idle_contexts() {
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i)
        threads.emplace_back([] {
            const auto context = std::make_shared<const PrimaryContext>(Device(0));
            for (int round = 0; round < 500; ++round) {
                semipd::create_split(context, 64, false, 0, 0);
                if (round % 10 == 0) semipd::release_idle();
            }
        });
    for (std::thread& thread : threads) thread.join();
    REQUIRE(read("fake_live_green") <= 8);
}

void what_cannot_be_is_refused() {
    const auto context = std::make_shared<const PrimaryContext>(Device(0));
    int refused = 0;
    const auto refuse = [&](auto create) {
        try {
            create();
        } catch (const CudaError&) {
            ++refused;
        }
    };
    refuse([] { Device(1); });
    refuse([] { Device(-1); });
    for (const int sms : {-1, 0, 7, 129, 132, 133, 1 << 30})
        refuse([&] { semipd::create_split(context, sms, false, 0, 0); });
    for (const int priority : {-6, 1}) {
        refuse([&] { semipd::create_split(context, 64, false, priority, 0); });
        refuse([&] { semipd::create_split(context, 64, false, 0, priority); });
        refuse([&] { Partition(context, priority); });
    }
    REQUIRE(refused == 15);
}

}  // namespace

int main() {
    live();
    require_nothing_left();
    every_failure_releases_everything();
    destroying_waits_for_work();
    REQUIRE(read("fake_waited") == 2);
    threads_share_the_idle_contexts();
    what_cannot_be_is_refused();
    require_nothing_left();
    REQUIRE(read("fake_misuse") == 0);
    live();
    REQUIRE(read("fake_live_green") > 0);
    reinterpret_cast<void (*)()>(fake("fake_forbid_calls"))();
    return 0;  // with green contexts idle
}
