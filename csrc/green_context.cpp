#include "green_context.hpp"

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
    Groups split{};
    unsigned made = 1;
    driver_->check(driver_->cuDevSmResourceSplitByCount(&split.primary, &made, &all, &split.remaining,
                                                        split_flags(ignore_coscheduling),
                                                        static_cast<unsigned>(requested)),
                   "cuDevSmResourceSplitByCount",
                   "splitting " + std::to_string(requested) + " of " + std::to_string(sizes.count) + " SMs");
    if (made == 0) refuse("the driver makes no group of that size");
    if (split.remaining.type != CU_DEV_RESOURCE_TYPE_SM || split.remaining.sm.smCount == 0)
        refuse("the group takes " + std::to_string(split.primary.sm.smCount) + " and leaves no remainder");
    return split;
}

SplitPlan Device::plan(int requested, bool ignore_coscheduling) const {
    const Groups split = groups(requested, ignore_coscheduling);
    return {requested, split.primary.sm.smCount, split.remaining.sm.smCount};
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

void Release::operator()(CUgreenCtx green) const noexcept {
    const Driver& driver = context->driver();
    driver.report(driver.cuGreenCtxDestroy(green), "cuGreenCtxDestroy");
}

void Release::operator()(CUstream stream) const noexcept {
    const Driver& driver = context->driver();
    // A green context must not go while its kernels run, and cuStreamDestroy alone would not wait for them.
    const CUresult pushed = driver.cuCtxPushCurrent(context->handle());
    driver.report(pushed, "cuCtxPushCurrent");
    driver.report(driver.cuStreamSynchronize(stream), "cuStreamSynchronize");
    driver.report(driver.cuStreamDestroy(stream), "cuStreamDestroy");
    CUcontext popped = nullptr;
    if (pushed == CUDA_SUCCESS) driver.report(driver.cuCtxPopCurrent(&popped), "cuCtxPopCurrent");
}

Partition::Partition(std::shared_ptr<const PrimaryContext> context, const CUdevResource& sms, int priority)
    : green_(nullptr, Release{context}), stream_(nullptr, Release{context}), priority_(priority) {
    const Driver& driver = context->driver();
    const std::string doing = "creating a partition of " + std::to_string(sms.sm.smCount) +
                              " SMs on device " + std::to_string(context->device().index());
    context->check_priority(priority);
    CUdevResource resource = sms;
    CUdevResourceDesc description = nullptr;
    driver.check(driver.cuDevResourceGenerateDesc(&description, &resource, 1), "cuDevResourceGenerateDesc",
                 doing);
    CUgreenCtx green = nullptr;
    driver.check(
        driver.cuGreenCtxCreate(&green, description, context->device().handle(), CU_GREEN_CTX_DEFAULT_STREAM),
        "cuGreenCtxCreate", doing);
    green_.reset(green);
    CUstream stream = nullptr;
    driver.check(driver.cuGreenCtxStreamCreate(&stream, green, CU_STREAM_NON_BLOCKING, priority),
                 "cuGreenCtxStreamCreate", doing);
    stream_.reset(stream);
    CUdevResource granted{};
    driver.check(driver.cuGreenCtxGetDevResource(green, &granted, CU_DEV_RESOURCE_TYPE_SM),
                 "cuGreenCtxGetDevResource", doing);
    sms_ = granted.sm.smCount;
}

Partition::Partition(std::shared_ptr<const PrimaryContext> context, int priority)
    : green_(nullptr, Release{context}), stream_(nullptr, Release{context}), priority_(priority) {
    const Driver& driver = context->driver();
    context->check_priority(priority);
    const Current current(*context);
    CUdevResource all{};
    driver.check(driver.cuDeviceGetDevResource(context->device().handle(), &all, CU_DEV_RESOURCE_TYPE_SM),
                 "cuDeviceGetDevResource", "asking for the device's SMs");
    sms_ = all.sm.smCount;
    CUstream stream = nullptr;
    driver.check(driver.cuStreamCreateWithPriority(&stream, CU_STREAM_NON_BLOCKING, priority),
                 "cuStreamCreateWithPriority", "creating a stream on the whole device");
    stream_.reset(stream);
}

void Partition::synchronize() const {
    const PrimaryContext& context = *stream_.get_deleter().context;
    const Current current(context);
    context.driver().check(context.driver().cuStreamSynchronize(stream_.get()), "cuStreamSynchronize",
                           "waiting for the work of a partition of " + std::to_string(sms_) + " SMs");
}

std::pair<Partition, Partition> create_split(const std::shared_ptr<const PrimaryContext>& context,
                                             int requested, bool ignore_coscheduling, int primary_priority,
                                             int remaining_priority) {
    const Device::Groups groups = context->device().groups(requested, ignore_coscheduling);
    Partition primary(context, groups.primary, primary_priority);
    Partition remaining(context, groups.remaining, remaining_priority);
    return {std::move(primary), std::move(remaining)};
}

}  // namespace semipd
