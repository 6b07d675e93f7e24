#include "green_context.hpp"

#include <map>
#include <mutex>
#include <new>
#include <optional>

namespace semipd {

namespace {

unsigned split_flags(bool ignore_coscheduling) {
    return ignore_coscheduling ? CU_DEV_SM_RESOURCE_SPLIT_IGNORE_SM_COSCHEDULING : 0;
}

// Makes a context current to this thread for a scope, for the calls that act on the current one.
class Current {
  public:
    explicit Current(const PrimaryContext& context) : driver_(context.driver()) {
        driver_.check(driver_.cuCtxPushCurrent(context.handle()), "cuCtxPushCurrent",
                      "making the primary context current");
    }
    ~Current() {
        CUcontext popped = nullptr;
        driver_.report(driver_.cuCtxPopCurrent(&popped), "cuCtxPopCurrent");
    }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

  private:
    const Driver& driver_;
};

// The group a split of `input` would grant; nothing where the driver refuses the size.
std::optional<unsigned> probe(const Driver& driver, const CUdevResource& input, unsigned size,
                              unsigned flags) {
    CUdevResource group{};
    CUdevResource rest{};
    unsigned groups = 1;
    const CUresult result = driver.cuDevSmResourceSplitByCount(&group, &groups, &input, &rest, flags, size);
    if (result == CUDA_ERROR_INVALID_VALUE || result == CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION) return {};
    driver.check(result, "cuDevSmResourceSplitByCount", "asking which sizes a split can have");
    if (groups == 0) return {};
    return group.sm.smCount;
}

// The process's idle green contexts. Thread-safe. Never destroyed itself, so that nothing calls the driver at
// process exit.
class Pool {
  public:
    static Pool& instance() {
        static Pool& pool = *new Pool;
        return pool;
    }

    // Null where none is idle.
    GreenHandle take(const Device::Group::Name& group) {
        const std::lock_guard<std::mutex> lock(mutex_);
        auto found = idle_.extract(group);
        return found.empty() ? GreenHandle() : std::move(found.mapped());
    }

    void give(const Device::Group::Name& group, GreenHandle green) noexcept {
        const std::lock_guard<std::mutex> lock(mutex_);
        try {
            idle_.emplace(group, std::move(green));
        } catch (const std::bad_alloc&) {  // then `green` still owns it
        }
    }

    void clear() noexcept {
        Idle released;  // outside the lock, since the driver may take its time
        const std::lock_guard<std::mutex> lock(mutex_);
        released.swap(idle_);
    }

  private:
    using Idle = std::multimap<Device::Group::Name, GreenHandle>;

    std::mutex mutex_;
    Idle idle_;
};

GreenHandle create_green(std::shared_ptr<const PrimaryContext> context, CUdevResource sms,
                         const std::string& doing) {
    const Driver& driver = context->driver();
    CUdevResourceDesc description = nullptr;
    driver.check(driver.cuDevResourceGenerateDesc(&description, &sms, 1), "cuDevResourceGenerateDesc", doing);
    CUgreenCtx green = nullptr;
    driver.check(
        driver.cuGreenCtxCreate(&green, description, context->device().handle(), CU_GREEN_CTX_DEFAULT_STREAM),
        "cuGreenCtxCreate", doing);
    return {green, DestroyGreen{std::move(context)}};
}

}  // namespace

Device::Device(int index) : driver_(&Driver::open()), index_(index) {
    int count = 0;
    driver_->check(driver_->cuDeviceGetCount(&count), "cuDeviceGetCount", "counting devices");
    if (index < 0 || index >= count)
        SEMIPD_REFUSE(CUDA_ERROR_INVALID_DEVICE, "cuDeviceGet",
                      "no CUDA device " + std::to_string(index) + ": found " + std::to_string(count) +
                          ", counted from 0; check CUDA_VISIBLE_DEVICES");
    driver_->check(driver_->cuDeviceGet(&handle_, index), "cuDeviceGet",
                   "opening device " + std::to_string(index));
}

Device Device::current() {
    const Driver& driver = Driver::open();
    CUdevice device = 0;
    const CUresult result = driver.cuCtxGetDevice(&device);
    if (result == CUDA_ERROR_INVALID_CONTEXT) return Device(0);
    driver.check(result, "cuCtxGetDevice", "asking for the current device");
    return Device(device);
}

std::string Device::name() const {
    char name[256] = {};
    driver_->check(driver_->cuDeviceGetName(name, sizeof name, handle_), "cuDeviceGetName",
                   "asking for the name of device " + std::to_string(index_));
    return name;
}

int Device::attribute(CUdevice_attribute which) const {
    int value = 0;
    driver_->check(driver_->cuDeviceGetAttribute(&value, which, handle_), "cuDeviceGetAttribute",
                   "asking for the compute capability of device " + std::to_string(index_));
    return value;
}

std::pair<int, int> Device::compute_capability() const {
    return {attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)};
}

CUdevResource Device::all_sms() const {
    CUdevResource all{};
    driver_->check(driver_->cuDeviceGetDevResource(handle_, &all, CU_DEV_RESOURCE_TYPE_SM),
                   "cuDeviceGetDevResource", "asking for the SMs of device " + std::to_string(index_));
    return all;
}

// NVIDIA's documented limits, for drivers that refuse a size instead of rounding it.
SmResource Device::by_architecture(unsigned count, bool ignore_coscheduling) const {
    const int major = compute_capability().first;
    if (major < 7) return {count, 1, 1};
    if (major == 7 || ignore_coscheduling) return {count, 2, 2};
    if (major == 8) return {count, 4, 2};
    return {count, 8, 8};
}

SmResource Device::resource(bool ignore_coscheduling) const {
    const CUdevResource all = all_sms();
    const unsigned flags = split_flags(ignore_coscheduling);
    // What the driver does with a size is the truth on every architecture and version; a split is not yet a
    // context.
    const auto minimum = probe(*driver_, all, 1, flags);
    if (!minimum) return by_architecture(all.sm.smCount, ignore_coscheduling);
    const auto next = probe(*driver_, all, *minimum + 1, flags);
    if (!next || *next <= *minimum) return by_architecture(all.sm.smCount, ignore_coscheduling);
    return {all.sm.smCount, *minimum, *next - *minimum};
}

Device::Groups Device::groups(int requested, bool ignore_coscheduling) const {
    const SmResource sizes = resource(ignore_coscheduling);
    const auto refuse = [&](const std::string& why) {
        SEMIPD_REFUSE(CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION, "cuDevSmResourceSplitByCount",
                      "asked for " + std::to_string(requested) + " of the " + std::to_string(sizes.count) +
                          " SMs of device " + std::to_string(index_) + ": " + why + "; ask for " +
                          std::to_string(sizes.minimum) + " to " +
                          std::to_string((sizes.count - 1) / sizes.multiple * sizes.multiple) +
                          " in steps of " + std::to_string(sizes.multiple) +
                          (ignore_coscheduling ? "" : ", or in finer steps with ignore_coscheduling"));
    };
    if (requested < 0 || static_cast<unsigned>(requested) < sizes.minimum)
        refuse("a group has at least " + std::to_string(sizes.minimum));
    if (static_cast<unsigned>(requested) > sizes.count) refuse("the device has fewer");
    const CUdevResource all = all_sms();
    CUdevResource primary{};
    CUdevResource remaining{};
    unsigned made = 1;
    driver_->check(driver_->cuDevSmResourceSplitByCount(&primary, &made, &all, &remaining,
                                                        split_flags(ignore_coscheduling),
                                                        static_cast<unsigned>(requested)),
                   "cuDevSmResourceSplitByCount",
                   "splitting " + std::to_string(requested) + " of " + std::to_string(sizes.count) + " SMs");
    if (made == 0) refuse("the driver makes no group of that size");
    if (remaining.type != CU_DEV_RESOURCE_TYPE_SM || remaining.sm.smCount == 0)
        refuse("the group takes " + std::to_string(primary.sm.smCount) + " and leaves no remainder");
    return {{{driver_, handle_, requested, ignore_coscheduling, false}, primary},
            {{driver_, handle_, requested, ignore_coscheduling, true}, remaining}};
}

SplitPlan Device::plan(int requested, bool ignore_coscheduling) const {
    const Groups split = groups(requested, ignore_coscheduling);
    return {requested, split.primary.sms.sm.smCount, split.remaining.sms.sm.smCount};
}

PrimaryContext::PrimaryContext(const Device& device) : device_(device) {
    driver().check(driver().cuDevicePrimaryCtxRetain(&handle_, device.handle()), "cuDevicePrimaryCtxRetain",
                   "retaining the primary context of device " + std::to_string(device.index()));
}

PrimaryContext::~PrimaryContext() {
    driver().report(driver().cuDevicePrimaryCtxRelease(device_.handle()), "cuDevicePrimaryCtxRelease");
}

PriorityRange PrimaryContext::priorities() const {
    const Current current(*this);
    PriorityRange range{};
    driver().check(driver().cuCtxGetStreamPriorityRange(&range.least, &range.greatest),
                   "cuCtxGetStreamPriorityRange", "asking for the range of stream priorities");
    return range;
}

std::size_t PrimaryContext::free_bytes() const {
    const Current current(*this);
    std::size_t free = 0;
    std::size_t total = 0;
    driver().check(driver().cuMemGetInfo(&free, &total), "cuMemGetInfo", "asking for free device memory");
    return free;
}

void PrimaryContext::check_priority(int priority) const {
    const PriorityRange range = priorities();
    if (priority < range.greatest || priority > range.least)
        SEMIPD_REFUSE(CUDA_ERROR_INVALID_VALUE, "cuGreenCtxStreamCreate",
                      "stream priority " + std::to_string(priority) + " is out of range: device " +
                          std::to_string(device_.index()) + " has " + std::to_string(range.greatest) +
                          " (first) to " + std::to_string(range.least) + " (last); choose one of those");
}

void DestroyGreen::operator()(CUgreenCtx green) const noexcept {
    const Driver& driver = context->driver();
    driver.report(driver.cuGreenCtxDestroy(green), "cuGreenCtxDestroy");
}

Partition::Partition(std::shared_ptr<const PrimaryContext> context, const Device::Group& group, int priority)
    : context_(std::move(context)), group_(group.name), priority_(priority) {
    const Driver& driver = context_->driver();
    const std::string doing = "creating a partition of " + std::to_string(group.sms.sm.smCount) +
                              " SMs on device " + std::to_string(context_->device().index());
    green_ = Pool::instance().take(group_);
    if (!green_) green_ = create_green(context_, group.sms, doing);
    CUdevResource granted{};
    driver.check(driver.cuGreenCtxGetDevResource(green_.get(), &granted, CU_DEV_RESOURCE_TYPE_SM),
                 "cuGreenCtxGetDevResource", doing);
    sms_ = granted.sm.smCount;
    // Last: the destructor, which destroys the stream, does not run for a constructor that throws.
    driver.check(driver.cuGreenCtxStreamCreate(&stream_, green_.get(), CU_STREAM_NON_BLOCKING, priority),
                 "cuGreenCtxStreamCreate", doing);
}

Partition::Partition(std::shared_ptr<const PrimaryContext> context, int priority)
    : context_(std::move(context)), priority_(priority) {
    const Driver& driver = context_->driver();
    context_->check_priority(priority);
    sms_ = context_->device().all_sms().sm.smCount;
    const Current current(*context_);
    driver.check(driver.cuStreamCreateWithPriority(&stream_, CU_STREAM_NON_BLOCKING, priority),
                 "cuStreamCreateWithPriority", "creating a stream on the whole device");
}

Partition::~Partition() {
    const Driver& driver = context_->driver();
    bool sound = !failed_;
    const auto done = [&](CUresult result, const char* call) {
        driver.report(result, call);
        sound = sound && result == CUDA_SUCCESS;
    };
    // A green context must not go while its kernels run, and cuStreamDestroy alone would not wait for them.
    const CUresult pushed = driver.cuCtxPushCurrent(context_->handle());
    done(pushed, "cuCtxPushCurrent");
    done(driver.cuStreamSynchronize(stream_), "cuStreamSynchronize");
    done(driver.cuStreamDestroy(stream_), "cuStreamDestroy");
    CUcontext popped = nullptr;
    if (pushed == CUDA_SUCCESS) driver.report(driver.cuCtxPopCurrent(&popped), "cuCtxPopCurrent");
    if (green_ && sound) Pool::instance().give(group_, std::move(green_));
}

void Partition::synchronize() const {
    const Driver& driver = context_->driver();
    const Current current(*context_);
    const CUresult result = driver.cuStreamSynchronize(stream_);
    if (result != CUDA_SUCCESS) failed_ = true;
    driver.check(result, "cuStreamSynchronize",
                 "waiting for the work of a partition of " + std::to_string(sms_) + " SMs");
}

void release_idle() noexcept { Pool::instance().clear(); }

std::pair<std::unique_ptr<Partition>, std::unique_ptr<Partition>> create_split(
    const std::shared_ptr<const PrimaryContext>& context, int requested, bool ignore_coscheduling,
    int primary_priority, int remaining_priority) {
    for (const int priority : {primary_priority, remaining_priority}) context->check_priority(priority);
    const Device::Groups groups = context->device().groups(requested, ignore_coscheduling);
    auto primary = std::make_unique<Partition>(context, groups.primary, primary_priority);
    auto remaining = std::make_unique<Partition>(context, groups.remaining, remaining_priority);
    return {std::move(primary), std::move(remaining)};
}

}  // namespace semipd
