// SM partitions: a device's SMs split into two green contexts, each with a stream. Ownership is structural:
// what is created from something keeps it alive, so everything is destroyed in the right order on every path.
// Green contexts are reused: docs/adr/0003-green-contexts-are-pooled.md says why.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "driver.hpp"

namespace semipd {

// SMs of a device, the smallest group a split can make, and the step group sizes grow by.
struct SmResource {
    unsigned count;
    unsigned minimum;
    unsigned multiple;
};

// What a split into one group and the rest would grant.
struct SplitPlan {
    int requested;
    unsigned granted;
    unsigned remaining;
};

// A device by its CUDA index. Creates nothing on it.
class Device {
  public:
    // Throws CudaError: no driver, driver too old, no such device.
    explicit Device(int index);

    // The device of the calling thread's current context; 0 without one.
    static Device current();

    int index() const { return index_; }
    CUdevice handle() const { return handle_; }
    const Driver& driver() const { return *driver_; }
    int driver_version() const { return driver_->version(); }
    std::string name() const;
    std::pair<int, int> compute_capability() const;

    // Sizes that splits can have. Without coscheduling they are finer, at the price of thread-block clusters.
    SmResource resource(bool ignore_coscheduling) const;

    // Dry run. Throws CudaError for a size below the minimum, above the device's, or that leaves no
    // remainder.
    SplitPlan plan(int requested, bool ignore_coscheduling) const;

    // One side of a split. `name` is the driver, the device, the SMs asked for, whether coscheduling is
    // ignored, and whether this is the remainder: on a device, the same split always gives the same SMs.
    struct Group {
        using Name = std::tuple<const Driver*, CUdevice, int, bool, bool>;
        Name name;
        CUdevResource sms;
    };
    struct Groups {
        Group primary;
        Group remaining;
    };
    Groups groups(int requested, bool ignore_coscheduling) const;

    CUdevResource all_sms() const;

  private:
    int attribute(CUdevice_attribute which) const;
    SmResource by_architecture(unsigned count, bool ignore_coscheduling) const;

    const Driver* driver_;
    int index_;
    CUdevice handle_ = 0;
};

// Stream priorities: lower numbers go first.
struct PriorityRange {
    int least;
    int greatest;
};

// The device's primary context, which torch and the runtime API use too, retained while this lives.
class PrimaryContext {
  public:
    explicit PrimaryContext(const Device& device);
    ~PrimaryContext();
    PrimaryContext(const PrimaryContext&) = delete;
    PrimaryContext& operator=(const PrimaryContext&) = delete;

    const Device& device() const { return device_; }
    const Driver& driver() const { return device_.driver(); }
    CUcontext handle() const { return handle_; }

    PriorityRange priorities() const;
    std::size_t free_bytes() const;

    // Throws CudaError when a stream cannot have this priority.
    void check_priority(int priority) const;

  private:
    Device device_;
    CUcontext handle_ = nullptr;
};

// Destroys a green context and keeps its primary context alive until then. Never throws: Driver::report.
struct DestroyGreen {
    std::shared_ptr<const PrimaryContext> context;
    void operator()(CUgreenCtx green) const noexcept;
};
using GreenHandle = std::unique_ptr<std::remove_pointer_t<CUgreenCtx>, DestroyGreen>;

// A non-blocking stream and the SMs its work runs on: a green context's, or the whole device's.
class Partition {
  public:
    // On the SMs of one group, in an idle green context of that group if there is one. The priority is one
    // that PrimaryContext::check_priority accepts.
    Partition(std::shared_ptr<const PrimaryContext> context, const Device::Group& group, int priority);
    // On the whole device.
    Partition(std::shared_ptr<const PrimaryContext> context, int priority);
    // Waits for the work in flight and destroys the stream. Then the green context is idle, for the next
    // partition of its group; it is destroyed instead if anything went wrong in it.
    ~Partition();
    Partition(const Partition&) = delete;
    Partition& operator=(const Partition&) = delete;

    CUstream stream() const { return stream_; }
    unsigned sms() const { return sms_; }
    int priority() const { return priority_; }

    // Waits for the stream's work. Throws CudaError, also with what that work did wrong.
    void synchronize() const;

  private:
    std::shared_ptr<const PrimaryContext> context_;
    Device::Group::Name group_;
    GreenHandle green_;
    CUstream stream_ = nullptr;
    unsigned sms_ = 0;
    int priority_;
    mutable std::atomic<bool> failed_{false};
};

// Destroys every idle green context. They keep their primary context retained until then.
void release_idle() noexcept;

// Splits the device: `requested` SMs, rounded up, to the first partition, all others to the second.
// Throws CudaError as Device::plan does, for a priority out of range, or with what the driver says.
std::pair<std::unique_ptr<Partition>, std::unique_ptr<Partition>> create_split(
    const std::shared_ptr<const PrimaryContext>& context, int requested, bool ignore_coscheduling,
    int primary_priority, int remaining_priority);

}  // namespace semipd
