// SM partitions: a device's SMs split into two green contexts, each with a stream. Ownership is structural:
// what is created from something keeps it alive, so everything is destroyed in the right order on every path.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
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

    struct Groups {
        CUdevResource primary;
        CUdevResource remaining;
    };
    Groups groups(int requested, bool ignore_coscheduling) const;

  private:
    int attribute(CUdevice_attribute which) const;
    CUdevResource all_sms() const;
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

// Deleters of handles, which keep the primary context alive for that long. They never throw: Driver::report.
struct Release {
    std::shared_ptr<const PrimaryContext> context;
    void operator()(CUgreenCtx green) const noexcept;
    void operator()(CUstream stream) const noexcept;  // after its work has completed
};
using GreenHandle = std::unique_ptr<std::remove_pointer_t<CUgreenCtx>, Release>;
using StreamHandle = std::unique_ptr<std::remove_pointer_t<CUstream>, Release>;

// A non-blocking stream and the SMs its work runs on: a green context's, or the whole device's.
// Its destructor waits for the work in flight, then destroys the stream, then the green context.
class Partition {
  public:
    // On the SMs of one group of Device::groups.
    Partition(std::shared_ptr<const PrimaryContext> context, const CUdevResource& sms, int priority);
    // On the whole device.
    Partition(std::shared_ptr<const PrimaryContext> context, int priority);

    // A default move assignment would destroy the old green context before its stream.
    Partition(Partition&&) noexcept = default;
    Partition& operator=(Partition&&) = delete;

    CUstream stream() const { return stream_.get(); }
    unsigned sms() const { return sms_; }
    int priority() const { return priority_; }

    // Waits for the stream's work. Throws CudaError, also with what that work did wrong.
    void synchronize() const;

  private:
    GreenHandle green_;  // destroyed after stream_
    StreamHandle stream_;
    unsigned sms_ = 0;
    int priority_;
};

// Splits the device: `requested` SMs, rounded up, to the first partition, all others to the second.
// Throws CudaError as Device::plan does, for a priority out of range, or with what the driver says.
std::pair<Partition, Partition> create_split(const std::shared_ptr<const PrimaryContext>& context,
                                             int requested, bool ignore_coscheduling, int primary_priority,
                                             int remaining_priority);

}  // namespace semipd
