// What the GPU tests need of a kernel: which SMs a stream's blocks land on, and work that takes a known time.
#include <cuda_runtime.h>

namespace {

constexpr int kMaxSms = 1024;

__global__ void mark_sm(unsigned* seen, long long cycles) {
    unsigned sm;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    seen[sm % kMaxSms] = 1;
    for (const long long start = clock64(); clock64() - start < cycles;) {
    }
}

__global__ void spin(unsigned long long nanoseconds) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - start < nanoseconds);
}

}  // namespace

// Fills seen[i][sm] for `count` streams whose blocks are in flight together. Returns a cudaError_t.
extern "C" int mark_sms(void* const* streams, int count, int blocks, unsigned* seen) {
    unsigned* marks = nullptr;
    const size_t bytes = sizeof(unsigned) * kMaxSms * count;
    cudaError_t error = cudaMalloc(&marks, bytes);
    if (error != cudaSuccess) return error;
    error = cudaMemset(marks, 0, bytes);
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    for (int i = 0; i < count && error == cudaSuccess; ++i) {
        mark_sm<<<blocks, 128, 0, static_cast<cudaStream_t>(streams[i])>>>(marks + i * kMaxSms, 20000);
        error = cudaGetLastError();
    }
    for (int i = 0; i < count && error == cudaSuccess; ++i)
        error = cudaStreamSynchronize(static_cast<cudaStream_t>(streams[i]));
    if (error == cudaSuccess) error = cudaMemcpy(seen, marks, bytes, cudaMemcpyDeviceToHost);
    const cudaError_t freed = cudaFree(marks);
    return error != cudaSuccess ? error : freed;
}

extern "C" int occupy(void* stream, double seconds) {
    spin<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<unsigned long long>(seconds * 1e9));
    return cudaGetLastError();
}

extern "C" int priority_of(void* stream, int* priority) {
    return cudaStreamGetPriority(static_cast<cudaStream_t>(stream), priority);
}
