/* A small libcuda for tests: one device with Hopper's rules for splitting SMs, every handle counted, every
 * call able to fail, and the memory of a destroyed green context lost until the primary context goes, as
 * measured with driver 580. Written from the driver's documented interface, without cuda.h, so that it checks
 * what semipd passes.
 *
 * fake_* functions steer it and read it. Misuse that a real driver answers with undefined behaviour (a green
 * context destroyed before its streams, a stream destroyed while busy, a handle used after its end) is
 * counted. */
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_SUPPORTED = 801,
    INVALID_RESOURCE_TYPE = 914,
    INVALID_RESOURCE_CONFIGURATION = 915
};

enum { SM_RESOURCE = 1, STREAM_NON_BLOCKING = 1, GREEN_DEFAULT_STREAM = 1, IGNORE_COSCHEDULING = 1 };
enum { MAGIC_GREEN = 0x67, MAGIC_STREAM = 0x73, MAX_DESCRIPTIONS = 4096, MAX_DEPTH = 64 };
enum { GREEN_BYTES = 1 << 20 };

typedef struct {
    int type;
    unsigned char padding[92];
    unsigned sm_count;
    unsigned char rest[44];
} Resource; /* CUdevResource, 144 bytes in every CUDA from 12.4 on */

typedef struct {
    int magic, streams;
    unsigned sm_count;
} Green;

typedef struct {
    int magic, priority, busy;
    Green* green;
} Stream;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int device_count = 1, driver_version = 13000, sms = 132, major = 9, refuse_small = 0;
static long calls, fail_at, fail_code;
static long lost_bytes;
static int live_green, live_streams, primary_refs, misuse, waited, wait_ms, forbidden;
static char failed_call[64];
static Resource described[MAX_DESCRIPTIONS];
static int descriptions;
static char primary_storage;
static __thread void* current[MAX_DEPTH];
static __thread int depth;

/* Handles are never reused while the library is loaded, so use after the end is seen. */
enum { MAX_CREATED = 1 << 19 };
static Green greens[MAX_CREATED];
static Stream streams[MAX_CREATED];
static int next_green, next_stream;

/* Counts the call; says whether it is the one that has to fail. */
static int fails(const char* name) {
    pthread_mutex_lock(&lock);
    if (forbidden) fprintf(stderr, "%s called after fake_forbid_calls\n", name), abort();
    int now = ++calls == fail_at;
    if (now) snprintf(failed_call, sizeof failed_call, "%s", name);
    pthread_mutex_unlock(&lock);
    return now;
}
#define CALL()                                 \
    do {                                       \
        if (fails(__func__)) return fail_code; \
    } while (0)

static int misused(int result) {
    pthread_mutex_lock(&lock);
    misuse++;
    pthread_mutex_unlock(&lock);
    return result;
}

/* ---- what tests steer and read ---- */
void fake_reset(void) {
    device_count = 1, driver_version = 13000, sms = 132, major = 9, refuse_small = 0;
    calls = fail_at = fail_code = misuse = waited = wait_ms = descriptions = 0;
    failed_call[0] = 0;
}
void fake_fail(long call, int code) { calls = 0, fail_at = call, fail_code = code; }
/* Ends the process at the next call. */
void fake_forbid_calls(void) { forbidden = 1; }
void fake_set_devices(int count) { device_count = count; }
void fake_set_driver_version(int version) { driver_version = version; }
void fake_set_architecture(int compute_major, int sm_count, int refuse) {
    major = compute_major, sms = sm_count, refuse_small = refuse;
}
/* How long waiting for a busy stream takes. */
void fake_set_wait_ms(int milliseconds) { wait_ms = milliseconds; }
void fake_make_busy(void* stream) { ((Stream*)stream)->busy = 1; }
long fake_calls(void) { return calls; }
const char* fake_failed_call(void) { return failed_call; }
int fake_live_green(void) { return live_green; }
int fake_live_streams(void) { return live_streams; }
int fake_primary_refs(void) { return primary_refs; }
long fake_lost_bytes(void) { return lost_bytes; }
int fake_misuse(void) { return misuse; }
int fake_waited(void) { return waited; }
int fake_context_depth(void) { return depth; }
void* fake_stream_green(void* stream) { return ((Stream*)stream)->green; }
int fake_stream_priority(void* stream) { return ((Stream*)stream)->priority; }
int fake_stream_sms(void* stream) {
    Stream* s = stream;
    return s->green ? (int)s->green->sm_count : sms;
}

/* ---- the driver API ---- */
int cuInit(unsigned flags) {
    CALL();
    if (flags) return INVALID_VALUE;
    return device_count ? SUCCESS : NO_DEVICE;
}

int cuDriverGetVersion(int* version) {
    CALL();
    *version = driver_version;
    return SUCCESS;
}

int cuGetErrorName(int error, const char** name) {
    switch (error) {
        case INVALID_VALUE:
            *name = "CUDA_ERROR_INVALID_VALUE";
            return SUCCESS;
        case OUT_OF_MEMORY:
            *name = "CUDA_ERROR_OUT_OF_MEMORY";
            return SUCCESS;
        case NO_DEVICE:
            *name = "CUDA_ERROR_NO_DEVICE";
            return SUCCESS;
        case INVALID_CONTEXT:
            *name = "CUDA_ERROR_INVALID_CONTEXT";
            return SUCCESS;
        case NOT_SUPPORTED:
            *name = "CUDA_ERROR_NOT_SUPPORTED";
            return SUCCESS;
        default:
            *name = NULL;
            return INVALID_VALUE;
    }
}

int cuGetErrorString(int error, const char** text) {
    if (error != OUT_OF_MEMORY) return *text = NULL, INVALID_VALUE;
    *text = "out of memory";
    return SUCCESS;
}

int cuDeviceGetCount(int* count) {
    CALL();
    *count = device_count;
    return SUCCESS;
}

int cuDeviceGet(int* device, int index) {
    CALL();
    if (index < 0 || index >= device_count) return INVALID_DEVICE;
    *device = index;
    return SUCCESS;
}

int cuDeviceGetName(char* name, int length, int device) {
    CALL();
    snprintf(name, (size_t)length, "Fake GPU %d", device);
    return SUCCESS;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    CALL();
    (void)device;
    if (attribute != 75 && attribute != 76) return INVALID_VALUE; /* compute capability, major and minor */
    *value = attribute == 75 ? major : 0;
    return SUCCESS;
}

int cuDeviceGetDevResource(int device, Resource* resource, int type) {
    CALL();
    (void)device;
    if (type != SM_RESOURCE) return INVALID_RESOURCE_TYPE;
    memset(resource, 0, sizeof *resource);
    resource->type = SM_RESOURCE;
    resource->sm_count = (unsigned)sms;
    return SUCCESS;
}

/* Measured on an H200 for one group: rounded up to 8, or to 2 without coscheduling, and never above the
 * device. */
int cuDevSmResourceSplitByCount(Resource* result, unsigned* groups, const Resource* input,
                                Resource* remaining, unsigned flags, unsigned count) {
    CALL();
    unsigned step = flags & IGNORE_COSCHEDULING ? 2 : 8;
    if (input->type != SM_RESOURCE) return INVALID_RESOURCE_TYPE;
    if (count > input->sm_count || *groups != 1) return INVALID_RESOURCE_CONFIGURATION;
    if (refuse_small && count < step) return INVALID_RESOURCE_CONFIGURATION;
    unsigned granted = count == 0 ? step : (count + step - 1) / step * step;
    if (granted > input->sm_count) granted = input->sm_count;
    *result = *remaining = *input;
    result->sm_count = granted;
    remaining->sm_count = input->sm_count - granted;
    if (remaining->sm_count == 0) remaining->type = 0; /* CU_DEV_RESOURCE_TYPE_INVALID */
    return SUCCESS;
}

int cuDevResourceGenerateDesc(void** description, Resource* resources, unsigned count) {
    CALL();
    if (count != 1 || resources->type != SM_RESOURCE || !resources->sm_count) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    Resource* kept = &described[descriptions++ % MAX_DESCRIPTIONS];
    *kept = *resources;
    pthread_mutex_unlock(&lock);
    *description = kept;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
    CALL();
    (void)device;
    pthread_mutex_lock(&lock);
    primary_refs++;
    pthread_mutex_unlock(&lock);
    *context = &primary_storage;
    return SUCCESS;
}

static int release_primary(void) {
    pthread_mutex_lock(&lock);
    int below = --primary_refs < 0;
    if (primary_refs == 0) lost_bytes = 0;
    pthread_mutex_unlock(&lock);
    return below ? misused(INVALID_CONTEXT) : SUCCESS;
}

/* A call that destroys and fails has destroyed all the same: that is how the driver reports earlier faults.
 */
int cuDevicePrimaryCtxRelease_v2(int device) {
    (void)device;
    int failed = fails(__func__), result = release_primary();
    return failed ? (int)fail_code : result;
}

int cuCtxPushCurrent_v2(void* context) {
    CALL();
    if (context != &primary_storage || primary_refs <= 0) return misused(INVALID_CONTEXT);
    if (depth == MAX_DEPTH) return misused(INVALID_CONTEXT);
    current[depth++] = context;
    return SUCCESS;
}

int cuCtxPopCurrent_v2(void** context) {
    int failed = fails(__func__);
    if (depth == 0) return misused(INVALID_CONTEXT);
    *context = current[--depth];
    return failed ? (int)fail_code : SUCCESS;
}

int cuCtxGetDevice(int* device) {
    CALL();
    if (depth == 0) return INVALID_CONTEXT;
    *device = 0;
    return SUCCESS;
}

int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    CALL();
    if (depth == 0) return INVALID_CONTEXT;
    *least = 0, *greatest = -5;
    return SUCCESS;
}

int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    CALL();
    if (depth == 0) return INVALID_CONTEXT;
    *total = (size_t)1 << 36;
    *free_bytes = *total - (size_t)live_green * GREEN_BYTES - (size_t)lost_bytes;
    return SUCCESS;
}

int cuGreenCtxCreate(void** green, void* description, int device, unsigned flags) {
    CALL();
    (void)device;
    if (flags != GREEN_DEFAULT_STREAM) return INVALID_VALUE;
    if (driver_version < 12040) return NOT_SUPPORTED;
    pthread_mutex_lock(&lock);
    if (next_green == MAX_CREATED) abort();
    Green* made = &greens[next_green++];
    made->magic = MAGIC_GREEN;
    made->sm_count = ((Resource*)description)->sm_count;
    live_green++, primary_refs++;
    pthread_mutex_unlock(&lock);
    *green = made;
    return SUCCESS;
}

int cuGreenCtxDestroy(void* green) {
    int failed = fails(__func__);
    Green* g = green;
    if (g->magic != MAGIC_GREEN || g->streams) return misused(INVALID_CONTEXT);
    pthread_mutex_lock(&lock);
    g->magic = 0;
    live_green--, lost_bytes += GREEN_BYTES;
    pthread_mutex_unlock(&lock);
    int result = release_primary();
    return failed ? (int)fail_code : result;
}

int cuGreenCtxGetDevResource(void* green, Resource* resource, int type) {
    CALL();
    Green* g = green;
    if (g->magic != MAGIC_GREEN) return misused(INVALID_CONTEXT);
    if (type != SM_RESOURCE) return INVALID_RESOURCE_TYPE;
    memset(resource, 0, sizeof *resource);
    resource->type = SM_RESOURCE;
    resource->sm_count = g->sm_count;
    return SUCCESS;
}

static int create_stream(void** stream, Green* green, unsigned flags, int priority) {
    if (flags != STREAM_NON_BLOCKING) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    if (next_stream == MAX_CREATED) abort();
    Stream* made = &streams[next_stream++];
    *made = (Stream){MAGIC_STREAM, priority, 0, green};
    if (green) green->streams++;
    live_streams++;
    pthread_mutex_unlock(&lock);
    *stream = made;
    return SUCCESS;
}

int cuGreenCtxStreamCreate(void** stream, void* green, unsigned flags, int priority) {
    CALL();
    Green* g = green;
    if (g->magic != MAGIC_GREEN) return misused(INVALID_CONTEXT);
    return create_stream(stream, g, flags, priority);
}

int cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
    CALL();
    if (depth == 0) return INVALID_CONTEXT;
    return create_stream(stream, NULL, flags, priority);
}

int cuStreamSynchronize(void* stream) {
    CALL();
    Stream* s = stream;
    if (s->magic != MAGIC_STREAM) return misused(INVALID_HANDLE);
    if (depth == 0) return INVALID_CONTEXT;
    if (s->busy) usleep((useconds_t)wait_ms * 1000);
    pthread_mutex_lock(&lock);
    waited += s->busy;
    s->busy = 0;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

int cuStreamDestroy_v2(void* stream) {
    int failed = fails(__func__);
    Stream* s = stream;
    if (s->magic != MAGIC_STREAM) return misused(INVALID_HANDLE);
    if (s->busy) misused(0);
    pthread_mutex_lock(&lock);
    s->magic = 0;
    if (s->green) s->green->streams--;
    live_streams--;
    pthread_mutex_unlock(&lock);
    return failed ? (int)fail_code : SUCCESS;
}
