// The CUDA driver API, opened with dlopen on first use: this code builds, loads and imports without a driver.
#pragma once

#include <cuda.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#if CUDA_VERSION < 12050
#error "semipd needs the headers of CUDA 12.5 or newer (cuGreenCtxStreamCreate)"
#endif

namespace semipd {

// The one exception: the result, its name, and the call that gave it or that was refused.
class CudaError : public std::runtime_error {
  public:
    CudaError(CUresult code, std::string name, std::string call, const std::string& message)
        : std::runtime_error(message), code_(code), name_(std::move(name)), call_(std::move(call)) {}

    CUresult code() const { return code_; }
    const std::string& name() const { return name_; }
    const std::string& call() const { return call_; }

  private:
    CUresult code_;
    std::string name_;
    std::string call_;
};

// Not every CUresult can be asked of the driver: some say that there is none.
#define SEMIPD_REFUSE(code, call, message) throw ::semipd::CudaError(code, #code, call, message)

// cuda.h defines names such as cuStreamDestroy as macros for their newest version (cuStreamDestroy_v2).
// Stringified after expansion, declaration, member and symbol always agree on the version.
#define SEMIPD_STRING(name) #name
#define SEMIPD_SYMBOL(name) SEMIPD_STRING(name)

#define SEMIPD_BASE_FUNCTIONS(X) \
    X(cuInit)                    \
    X(cuDriverGetVersion)        \
    X(cuGetErrorName)            \
    X(cuGetErrorString)

#define SEMIPD_FUNCTIONS(X)        \
    X(cuCtxGetDevice)              \
    X(cuCtxGetStreamPriorityRange) \
    X(cuCtxPopCurrent)             \
    X(cuCtxPushCurrent)            \
    X(cuDevResourceGenerateDesc)   \
    X(cuDevSmResourceSplitByCount) \
    X(cuDeviceGet)                 \
    X(cuDeviceGetAttribute)        \
    X(cuDeviceGetCount)            \
    X(cuDeviceGetDevResource)      \
    X(cuDeviceGetName)             \
    X(cuDevicePrimaryCtxRelease)   \
    X(cuDevicePrimaryCtxRetain)    \
    X(cuGreenCtxCreate)            \
    X(cuGreenCtxDestroy)           \
    X(cuGreenCtxGetDevResource)    \
    X(cuGreenCtxStreamCreate)      \
    X(cuMemGetInfo)                \
    X(cuStreamCreateWithPriority)  \
    X(cuStreamDestroy)             \
    X(cuStreamSynchronize)

// The functions of one libcuda. Never unloaded: its handles may live until the process ends.
class Driver {
  public:
    // Green contexts came with driver API 12.4, streams with a priority in them with 12.5.
    static constexpr int kVersionNeeded = 12050;

    // Opens libcuda.so.1, or the library that SEMIPD_LIBCUDA names, once each; initialises it and checks its
    // version. Thread-safe. Throws CudaError: no driver, driver too old, no device.
    static const Driver& open() {
        static std::mutex mutex;
        static auto& opened = *new std::map<std::string, std::unique_ptr<Driver>>;
        const char* named = std::getenv("SEMIPD_LIBCUDA");
        const std::string path = named != nullptr && *named != '\0' ? named : "libcuda.so.1";
        const std::lock_guard<std::mutex> lock(mutex);
        auto& driver = opened[path];
        if (!driver) driver.reset(new Driver(path));
        driver->initialise();
        return *driver;
    }

    // Throws CudaError unless the call succeeded; `doing` says what it was for.
    void check(CUresult result, const char* call, const std::string& doing) const {
        if (result == CUDA_SUCCESS) return;
        const std::string message = doing + ": " + call + " failed with " + name_of(result) + " (" +
                                    std::to_string(result) + "): " + text_of(result) + advice(result);
        throw CudaError(result, name_of(result), call, message);
    }

    // For destructors: says on stderr what failed. Silent when the driver or the context is gone before us,
    // as at process exit or after a device reset, since nothing is left to release then.
    void report(CUresult result, const char* call) const noexcept {
        if (result == CUDA_SUCCESS || result == CUDA_ERROR_DEINITIALIZED ||
            result == CUDA_ERROR_CONTEXT_IS_DESTROYED)
            return;
        const char* name = nullptr;
        cuGetErrorName(result, &name);
        std::fprintf(stderr, "semipd: %s failed with %s (%d) while releasing\n", call,
                     name != nullptr ? name : "an unknown error", static_cast<int>(result));
    }

    int version() const {
        int version = 0;
        check(cuDriverGetVersion(&version), "cuDriverGetVersion", "asking for the driver's version");
        return version;
    }

#define SEMIPD_MEMBER(function) decltype(&::function) function = nullptr;
    SEMIPD_BASE_FUNCTIONS(SEMIPD_MEMBER)
    SEMIPD_FUNCTIONS(SEMIPD_MEMBER)
#undef SEMIPD_MEMBER

  private:
    explicit Driver(const std::string& path) : path_(path) {
        void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr)
            SEMIPD_REFUSE(CUDA_ERROR_SHARED_OBJECT_INIT_FAILED, "dlopen",
                          std::string("no CUDA driver: ") + dlerror() +
                              "; install NVIDIA's driver (simulation needs none)");
#define SEMIPD_RESOLVE(function)                                                              \
    function = reinterpret_cast<decltype(function)>(dlsym(library, SEMIPD_SYMBOL(function))); \
    if (function == nullptr && missing_.empty()) missing_ = SEMIPD_SYMBOL(function);
        SEMIPD_BASE_FUNCTIONS(SEMIPD_RESOLVE)
        if (!missing_.empty()) {
            const std::string message = "no CUDA driver: " + path + " has no " + missing_;
            dlclose(library);
            SEMIPD_REFUSE(CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND, "dlsym", message);
        }
        SEMIPD_FUNCTIONS(SEMIPD_RESOLVE)
#undef SEMIPD_RESOLVE
    }

    void initialise() const {
        check(cuInit(0), "cuInit", "starting the CUDA driver " + path_);
        const int found = version();
        if (found < kVersionNeeded)
            SEMIPD_REFUSE(CUDA_ERROR_NOT_SUPPORTED, "cuDriverGetVersion",
                          "the CUDA driver is too old: SM partitions need driver API " +
                              dotted(kVersionNeeded) +
                              " or newer (green contexts 12.4, streams in them 12.5), " + path_ + " offers " +
                              dotted(found) + "; update the driver");
        if (!missing_.empty())
            SEMIPD_REFUSE(CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND, "dlsym",
                          path_ + " says it is driver API " + dotted(found) + " but has no " + missing_ +
                              "; reinstall the driver");
    }

    static std::string dotted(int version) {
        return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
    }

    std::string name_of(CUresult result) const {
        const char* name = nullptr;
        cuGetErrorName(result, &name);
        return name != nullptr ? name : "an unknown error";
    }

    std::string text_of(CUresult result) const {
        const char* text = nullptr;
        cuGetErrorString(result, &text);
        return text != nullptr ? text : "no description";
    }

    static const char* advice(CUresult result) {
        switch (result) {
            case CUDA_ERROR_NO_DEVICE:
                return "; check nvidia-smi and CUDA_VISIBLE_DEVICES (simulation needs no GPU)";
            case CUDA_ERROR_OUT_OF_MEMORY:
                return "; free device memory or create fewer splits";
            case CUDA_ERROR_NOT_SUPPORTED:
                return "; this device or driver has no green contexts";
            default:
                return "";
        }
    }

    std::string path_;
    std::string missing_;
};

}  // namespace semipd
